"""Names and numbers in the form that configurations have."""

from __future__ import annotations

import re
from collections.abc import Iterable


def targets(names: Iterable[str]) -> str:
    """A regular expression that matches exactly `names`. A list would also match ends of names."""
    return "|".join(re.escape(name) for name in sorted(names))


def whole(number: float) -> float | int:
    """16 for 16.0, as in configurations."""
    return int(number) if float(number).is_integer() else number
