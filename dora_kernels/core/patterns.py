"""Names and patterns of layers, and values by pattern: PEFT's ``rank_pattern`` and ``alpha_pattern``."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from dora_kernels.core.expressions import Expression, Steps
from dora_kernels.core.shown import quoted, shown


def compiled(expression: str, argument: str) -> re.Pattern[str]:
    """Compile the caller's own regular expression. A ValueError shows it and names the argument."""
    try:
        return re.compile(expression)
    except re.error as error:
        raise ValueError(f"{argument}: {expression!r} is not a regular expression: {error}") from error


def bounded(expression: str, steps: Steps) -> Expression:
    """Compile a regular expression from a file (see `Expression`). A ValueError shows it and names the file."""
    try:
        return Expression(expression, steps)
    except ValueError as error:
        reason = f"is not a regular expression: {shown(str(error))}"
        raise ValueError(f"{steps.label}: {quoted(expression)} {reason}") from error


def is_named(name: str, ends: Iterable[str]) -> bool:
    """True if `ends` has the name, or the end of it after a dot, as PEFT reads lists of names."""
    return any(name == end or name.endswith(f".{end}") for end in ends)


def unmatched(ends: Iterable[str], names: Iterable[str]) -> list[str]:
    """Quote each of `ends` that is no name, nor the end of one after a dot, and the nearest that is."""
    parts = [name.split(".") for name in names]
    known = {".".join(part[i:]) for part in parts for i in range(len(part))}
    return [f"{end!r}{_nearest(end, known)}" for end in ends if end not in known]


def _nearest(end: str, known: set[str]) -> str:
    found = difflib.get_close_matches(end, sorted(one for one in known if one.count(".") == end.count(".")), 1)
    return f" (the nearest is {found[0]!r})" if found else ""


class ByName:
    """Values for layers, as in `rank_pattern` or `alpha_pattern`: the first key that matches the end of a name counts.

    `beside` are the steps that other expressions of the same file have.

    Raises:
        TypeError: `values` is not a mapping with strings as keys.
        ValueError: a key is not a regular expression, or `Expression` does not support it.
    """

    def __init__(self, values: Any, argument: str, beside: Steps | None = None) -> None:
        values = {} if values is None else values
        if not isinstance(values, Mapping) or not all(isinstance(key, str) for key in values):
            raise TypeError(f"{argument}: expected a mapping of regular expressions to values, got {quoted(values)}")
        self._argument = argument
        steps = Steps(argument, beside)
        self._entries = [(key, bounded(key, steps), value) for key, value in values.items()]
        # Programs write one name for each layer; such keys are looked up in a dict.
        self._names: dict[tuple[str, bool], int] = {}
        for i, (_, expression, _) in enumerate(self._entries):
            if expression.literal is not None:
                self._names.setdefault((expression.literal, expression.anchored), i)
        self._others = [i for i, (_, expression, _) in enumerate(self._entries) if expression.literal is None]

    def get(self, name: str, default: Any) -> Any:
        texts = [(name, True), *((name[start:], False) for start in _starts(name))]
        first = min((self._names[text] for text in texts if text in self._names), default=len(self._entries))
        first = next((i for i in self._others if i < first and _matches(self._entries[i][1], name)), first)
        return default if first == len(self._entries) else self._entries[first][2]

    def unmatched(self, names: Iterable[str]) -> list[str]:
        """Return a sentence for each key that matches none of the adapted layers."""
        missed = [repr(key) for key, expression, _ in self._entries
                  if not any(_matches(expression, name) for name in names)]  # fmt: skip
        return [f"{self._argument}: no adapted layer is {', '.join(missed)}"] if missed else []


def _starts(name: str) -> set[int]:
    """The positions where PEFT lets a key begin: the name's start, and after each dot."""
    return {0, *(i + 1 for i, character in enumerate(name) if character == ".")}


def _matches(expression: Expression, name: str) -> bool:
    return len(name) in expression.ends(name, _starts(name))


def by_pattern(patterns: Any, label: str, beside: Steps | None = None) -> ByName:
    """The values in a file's configuration, where they are called `label`.

    Raises ValueError if `ByName` rejects them.
    """
    try:
        return ByName(patterns or None, label, beside)
    except TypeError as error:
        raise ValueError(str(error)) from error
