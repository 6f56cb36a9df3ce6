"""Names and numbers as configurations have them."""

from __future__ import annotations

import re
from collections.abc import Iterable


def targets(names: Iterable[str]) -> str:
    """A regular expression that matches `names` in full and no other: a list would match endings, too."""
    return "|".join(re.escape(name) for name in sorted(names))


def whole(number: float) -> float | int:
    """16 for 16.0, as configurations have it."""
    return int(number) if float(number).is_integer() else number
