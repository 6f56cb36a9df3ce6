"""Match regular expressions from untrusted files in bounded time.

Python's `re` tries one alternative after another: ``(a+)+$`` takes 2^n steps and ``.*.*.*x`` n^3, so a file could stop
a program for ever. Here all alternatives advance together, as the set of positions that the text can be matched up to,
so no position is visited twice. Nested counts and many expressions can still take long, so there is a limit of steps.
For expressions without groups to remember the result is that of `re`. Back references, conditions, atomic groups and
flags are errors.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from typing import Any

_parser: Any = importlib.import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")

_Node = Callable[[str, "set[int]"], "set[int]"]
"""Maps positions in a text to the positions after a match of the node."""

STEPS = 10_000_000
"""Limit of steps (one step is one position at one node): a few seconds.

A thousand layers and ten expressions take about a tenth.
"""


class Steps:
    """The steps that all expressions of one file may take together. `label` names the file in errors."""

    def __init__(self, label: str) -> None:
        self.label, self._left = label, STEPS

    def take(self, count: int) -> None:
        self._left -= count
        if self._left < 0:
            raise ValueError(f"{self.label}: matching the regular expressions takes more than {STEPS} steps")


class Expression:
    """A regular expression.

    Attributes:
        literal: the text, if the expression matches only one text; else None.
        anchored: True if it starts with ``^``, which `literal` leaves out.

    Raises:
        ValueError: it is not a valid expression, or it uses a feature that is not supported.
    """

    def __init__(self, pattern: str, steps: Steps) -> None:
        self._steps = steps
        try:
            tree = _parser.parse(pattern)
            if tree.state.flags & ~re.UNICODE:
                raise ValueError("flags such as (?i) are not supported")
            self._run = self._sequence(list(tree))
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(str(error) or type(error).__name__) from error
        items = list(tree)
        self.anchored = bool(items) and items[0] == (_parser.AT, _parser.AT_BEGINNING)
        self.literal = _literal(items[self.anchored :])

    def fullmatch(self, text: str) -> bool:
        """True if it matches the whole text, as `re.fullmatch`."""
        return len(text) in self.ends(text, {0})

    def ends(self, text: str, starts: set[int]) -> set[int]:
        """The positions where matches end that start at one of `starts`."""
        try:
            return self._run(text, starts)
        except RecursionError as error:
            raise ValueError(f"{self._steps.label}: a regular expression is nested too deeply") from error

    def _sequence(self, items: list[Any]) -> _Node:
        nodes: list[_Node] = []
        while items:
            run = next((i for i, item in enumerate(items) if item[0] is not _parser.LITERAL), len(items))
            nodes.append(_text(_literal(items[:run]) or "") if run else self._node(*items[0]))
            items = items[run or 1 :]
        steps = self._steps

        def sequence(text: str, starts: set[int]) -> set[int]:
            for node in nodes:
                if not starts:
                    break
                steps.take(1 + len(starts))
                starts = node(text, starts)
            return starts

        return sequence

    def _node(self, kind: Any, value: Any) -> _Node:
        if kind in (_parser.LITERAL, _parser.NOT_LITERAL, _parser.ANY, _parser.IN):
            test = _character(kind, value)
            return lambda text, starts: {at + 1 for at in starts if at < len(text) and test(text[at])}
        if kind is _parser.BRANCH:
            return self._branch(value[1])
        if kind is _parser.SUBPATTERN and not value[1] and not value[2]:
            return self._sequence(list(value[3]))
        if kind in (_parser.MAX_REPEAT, _parser.MIN_REPEAT):
            return self._repeat(*value)
        if kind in (_parser.ASSERT, _parser.ASSERT_NOT):
            return self._look(kind is _parser.ASSERT, *value)
        if kind is _parser.AT:
            holds = _PLACES[str(value)]
            return lambda text, starts: {at for at in starts if holds(text, at)}
        raise ValueError(f"{str(kind).lower().replace('_', ' ')} is not supported")

    def _branch(self, branches: list[Any]) -> _Node:
        texts = [_literal(list(branch)) for branch in branches]
        known = {text for text in texts if text is not None}
        lengths = {len(text) for text in known}
        others = [self._sequence(list(branch)) for branch, text in zip(branches, texts) if text is None]

        def branch(text: str, starts: set[int]) -> set[int]:
            self._steps.take(len(starts) * len(lengths))
            ends = {at + length for at in starts for length in lengths if text[at : at + length] in known}
            return ends.union(*(other(text, starts) for other in others))

        return branch

    def _repeat(self, least: int, most: int, items: Any) -> _Node:
        node = self._sequence(list(items))

        def repeat(text: str, starts: set[int]) -> set[int]:
            for _ in range(least):
                before, starts = starts, node(text, starts)
                if not starts or starts == before:  # further repetitions change nothing
                    break
            found, latest, turns = set(starts), starts, least
            while latest and turns < most:
                latest = node(text, latest) - found
                found |= latest
                turns += 1
            return found

        return repeat

    def _look(self, wanted: bool, direction: int, items: Any) -> _Node:
        node, (width, widest) = self._sequence(list(items)), items.getwidth()
        if direction < 0 and width != widest:
            raise ValueError("look-behind requires fixed-width pattern")

        def seen(text: str, at: int) -> bool:
            if direction > 0:
                return bool(node(text, {at}))
            return at >= width and at in node(text, {at - width})

        return lambda text, starts: {at for at in starts if seen(text, at) == wanted}


def _literal(items: list[Any]) -> str | None:
    """The one text that a sequence matches; None if it contains more than literals."""
    if not all(kind is _parser.LITERAL for kind, _ in items):
        return None
    return "".join(chr(value) for _, value in items)


def _text(literal: str) -> _Node:
    return lambda text, starts: {at + len(literal) for at in starts if text.startswith(literal, at)}


def _character(kind: Any, value: Any) -> Callable[[str], bool]:
    """A function that returns True if the node matches a character."""
    if kind is _parser.LITERAL:
        return lambda c: ord(c) == value
    if kind is _parser.NOT_LITERAL:
        return lambda c: ord(c) != value
    if kind is _parser.ANY:
        return lambda c: c != "\n"
    if kind is _parser.RANGE:
        return lambda c: value[0] <= ord(c) <= value[1]
    if kind is _parser.CATEGORY:
        name = str(value).removeprefix("CATEGORY_")
        wanted, test = not name.startswith("NOT_"), _CATEGORIES[name.removeprefix("NOT_")]
        return lambda c: test(c) == wanted
    wanted = value[0][0] is not _parser.NEGATE
    tests = [_character(*item) for item in value[not wanted :]]
    return lambda c: any(test(c) for test in tests) == wanted


def _is_word(c: str) -> bool:
    return c.isalnum() or c == "_"


def _at_boundary(text: str, at: int) -> bool:
    before, after = at > 0 and _is_word(text[at - 1]), at < len(text) and _is_word(text[at])
    return before != after


_CATEGORIES: dict[str, Callable[[str], bool]] = {"DIGIT": str.isdecimal, "SPACE": str.isspace, "WORD": _is_word}

_PLACES: dict[str, Callable[[str, int], bool]] = {
    "AT_BEGINNING": lambda text, at: at == 0,
    "AT_BEGINNING_STRING": lambda text, at: at == 0,
    "AT_END": lambda text, at: at == len(text) or text[at:] == "\n",
    "AT_END_STRING": lambda text, at: at == len(text),
    "AT_BOUNDARY": _at_boundary,
    "AT_NON_BOUNDARY": lambda text, at: not _at_boundary(text, at),
}
