"""Values for some layers by patterns of their names: PEFT's ``rank_pattern`` and ``alpha_pattern``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any


def compiled(expression: str, argument: str, around: str = "{}") -> re.Pattern[str]:
    """A regular expression, with `around` around it; ValueError, as it was given and for what, where it is none."""
    try:
        re.compile(expression)
        return re.compile(around.format(expression))
    except re.error as error:
        raise ValueError(f"{argument}: {expression!r} is no regular expression: {error}") from error


class ByName:
    """Values for some layers, `rank_pattern` or `alpha_pattern`: the first whose key matches the end of a name counts.

    Raises:
        TypeError: `values` is no mapping with strings as keys.
        ValueError: a key is no regular expression.
    """

    def __init__(self, values: Any, argument: str) -> None:
        values = {} if values is None else values
        if not isinstance(values, Mapping) or not all(isinstance(key, str) for key in values):
            raise TypeError(f"{argument}: expected a mapping of regular expressions to values, got {values!r}")
        self._argument = argument
        self._values = [(compiled(key, argument, r"(.*\.)?({})$"), key, value) for key, value in values.items()]

    def get(self, name: str, default: Any) -> Any:
        return next((value for pattern, _, value in self._values if pattern.match(name)), default)

    def unmatched(self, names: Iterable[str]) -> list[str]:
        """A sentence where a key matches none of the adapted layers."""
        missed = [repr(key) for pattern, key, _ in self._values if not any(map(pattern.match, names))]
        return [f"{self._argument}: no adapted layer is {', '.join(missed)}"] if missed else []


def by_pattern(patterns: Any, name: str, default: Any, label: str) -> Any:
    """The value that `ByName` has for a name in a file's configuration; ValueError for any that it refuses.

    Args:
        patterns: values by regular expressions, or None.
        label: what an error calls them.
    """
    try:
        return ByName(patterns or None, label).get(name, default)
    except TypeError as error:
        raise ValueError(str(error)) from error
