"""Text from files as it may be printed: without control characters, and short."""

from __future__ import annotations

from typing import Any

LONGEST = 1000
"""Characters that a name in a file may have: no module's is nearly as long."""


def shown(text: str, longest: int = 200) -> str:
    """A text with escapes for what is not printable, cut to about `longest`."""
    if len(text) > longest:
        text = f"{text[: longest - 20]} ... {text[-20:]} ({len(text)} characters)"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def quoted(value: Any) -> str:
    """The repr of what a file says, `shown`."""
    return shown(repr(value))


def name_problem(name: str) -> str | None:
    """What is wrong with a name in a file, None if nothing is."""
    if len(name) > LONGEST:
        return f"a name of {len(name)} characters, expected at most {LONGEST}: {shown(name, 100)}"
    if not name.isprintable():
        return f"a name with characters that cannot be printed: {shown(name)}"
    return None
