"""Values for some layers by patterns of their names: PEFT's ``rank_pattern`` and ``alpha_pattern``."""

from __future__ import annotations

import re
from typing import Any


def by_pattern(patterns: Any, name: str, default: Any, label: str) -> Any:
    """The value of the first pattern that matches the end of `name`, from a dot on; `default` if none does.

    Args:
        patterns: values by regular expressions, or None.
        label: what an error calls them.

    Raises:
        ValueError: they are none.
    """
    try:
        items = dict(patterns or {}).items()
        return next((value for key, value in items if re.match(rf"(.*\.)?({key})$", name)), default)
    except (TypeError, ValueError, re.error) as error:
        raise ValueError(f"{label}: expected regular expressions and their values: {error}") from error
