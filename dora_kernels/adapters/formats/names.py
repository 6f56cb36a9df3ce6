"""Names and numbers in the form that configurations have."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Any


def targets(names: Iterable[str]) -> str:
    """A regular expression that matches exactly `names`. A list would also match ends of names."""
    return "|".join(re.escape(name) for name in sorted(names))


def targets_again(names: Collection[str], given: Any) -> list[str] | str:
    """The list of a configuration that was read, if it still names all of `names`, else their `targets`.

    PEFT combines adapters only if all have lists, or all expressions.
    """
    ends = given if isinstance(given, list) and all(isinstance(end, str) for end in given) else []
    if ends and all(name in ends or name.endswith(tuple(f".{end}" for end in ends)) for name in names):
        return sorted(ends)
    return targets(names)


def whole(number: float) -> float | int:
    """16 for 16.0, as in configurations."""
    return int(number) if float(number).is_integer() else number
