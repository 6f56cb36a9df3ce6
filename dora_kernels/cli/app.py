"""The typer application that holds the commands."""

# Annotations are evaluated at once: typer reads them. The commands are made only after typer is known to be installed.

import io
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import dora_kernels
from dora_kernels.cli import convert, doctor, inspect, merge, parity, serve_check, tune
from dora_kernels.core.extras import load

if TYPE_CHECKING:
    import typer

_SIGPIPE = 128 + 13
"""The exit status that a shell shows of a program whose reader has gone."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    try:
        for package in ("rich", "typer"):
            load(package, "cli", "the command line needs")
    except ImportError as error:
        print(f"dora-kernels: {error}", file=sys.stderr)
        return 2
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for names of files, if it is ASCII
    try:
        status = int(build_app()(args=arguments, standalone_mode=False, prog_name="dora-kernels") or 0)
        sys.stdout.flush()
        return status
    except (BrokenPipeError, SystemExit):  # nobody reads on; rich and click exit then
        _discard_unwritten()
        return _SIGPIPE
    except OSError as error:  # a full device
        _discard_unwritten()
        print(f"error: standard output: {error.strerror}", file=sys.stderr)
        return 2
    except Exception as error:
        # Usage errors come from click, or from the copy of it that newer releases of typer contain.
        if type(error).__name__ == "Abort":
            return 130
        if not hasattr(error, "format_message"):
            raise
        print("error: " + " ".join(error.format_message().split()), file=sys.stderr)
        return 2


def _discard_unwritten() -> None:
    """Send nowhere what standard output still holds, and error if it fails: it would fail again when Python ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    try:
        sys.stderr.flush()
    except OSError:
        os.dup2(nowhere, sys.stderr.fileno())


def build_app() -> "typer.Typer":
    """Build the typer application."""
    import typer

    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

    @app.callback(invoke_without_command=True)
    def top(
        context: typer.Context,
        version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
    ) -> None:
        """DoRA at the price of LoRA: checks of this installation, and adapter files."""
        if version:
            print(f"dora-kernels {dora_kernels.__version__}")
            raise typer.Exit(0)
        if context.invoked_subcommand is None:
            print(context.get_help())
            raise typer.Exit(2)

    for command in (doctor, parity, tune, convert, merge, inspect, serve_check):
        command.add(app)
    return app
