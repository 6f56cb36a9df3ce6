"""The commands' output: consoles, and progress on standard error if it is a terminal."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from dora_kernels.core.shown import shown

if TYPE_CHECKING:
    from rich.console import Console


# Arguments of the Python functions, as their errors name them, and the commands' options for them.
_FLAGS = {"force=True": "--force", "adapter_only=True": "--adapter-only"}
_OPTIONS = {
    "magnitude_axis": "--axis",
    "scaling": "--scaling",
    "prefix": "--prefix",
    "format": "--from",
    "strength": "--strength",
    "rounding": "--rounding",
    "device": "--device",
}


_ENDLESS = 1 << 20

# Limits: characters per line, and lines of one kind.
_LONGEST, _LINES = 4000, 200


def console(stderr: bool = False) -> Console:
    """Standard output, or error, for plain text without markup."""
    from rich.console import Console

    # Without a terminal, rich would assume 80 columns, and cut and wrap text that should be searchable.
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, markup=False, highlight=False, width=None if stream.isatty() else _ENDLESS)


def say(output: Console, text: str) -> None:
    """Print a line, without terminal control characters."""
    output.print(shown(text, _LONGEST), soft_wrap=True)


def say_each(output: Console, what: str, texts: Sequence[str]) -> None:
    """Print each text as a line that begins with `what`, and how many more there are."""
    for text in texts[:_LINES]:
        say(output, f"{what}: {text}")
    if len(texts) > _LINES:
        say(output, f"{what}: and {len(texts) - _LINES} more")


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str, int], None]]:
    """Show a progress bar on standard error if that is a terminal. Yields a function to call after each step."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    stderr = console(stderr=True)
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as bar:
        task = bar.add_task("", total=None)
        yield lambda step, total: bar.update(task, advance=1, description=step, total=total)


@contextlib.contextmanager
def errors(**options: str) -> Iterator[None]:
    """Print errors about files and arguments as one line on standard error, and exit with status 2.

    Args:
        options: the command's options for arguments, where they are not those of `_OPTIONS`.
    """
    import typer

    try:
        yield
    except (ValueError, TypeError, OSError, ImportError) as error:
        text = str(error)
        for argument, flag in _FLAGS.items():
            text = re.sub(rf"\b{argument}", flag, text)
        for argument, option in (_OPTIONS | options).items():
            text = re.sub(rf"^{argument}: ", f"{option}: ", text)
            text = re.sub(rf"\b{argument}=", f"{option} ", text)
        print("error: " + shown(" ".join(text.split()), _LONGEST), file=sys.stderr)
        raise typer.Exit(2) from None
