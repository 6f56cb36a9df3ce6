"""Make text from files safe to print: without control characters, and short."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

LONGEST = 1000
"""Longest allowed name in a file, in characters. No module's name is nearly as long."""


def shown(text: str, longest: int = 200) -> str:
    """Return the text with unprintable characters escaped, cut to about `longest` characters."""
    if len(text) > longest:
        text = f"{text[: longest - 20]} ... {text[-20:]} ({len(text)} characters)"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def quoted(value: Any) -> str:
    """Return the repr of a value from a file, made safe by `shown`."""
    return shown(repr(value))


def listed(names: Iterable[str], most: int = 1) -> str:
    """The first `most` names, and how many more there are."""
    every = list(names)
    return ", ".join(every[:most]) + (f" and {len(every) - most} more" if len(every) > most else "")


def name_problem(name: str) -> str | None:
    """Return what is wrong with a name from a file, or None."""
    if len(name) > LONGEST:
        return f"a name of {len(name)} characters, expected at most {LONGEST}: {shown(name, 100)}"
    if not name.isprintable():
        return f"a name with characters that cannot be printed: {shown(name)}"
    return None
