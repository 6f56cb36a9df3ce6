"""The typer application that holds the commands."""

# Annotations are evaluated at once: typer reads them. The commands are made only after typer is known to be installed.

import errno
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
    except (OSError, SystemExit) as error:  # a full device or a closed pipe; for these rich and click only exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # otherwise it fails again when Python ends
        reason = error.strerror if isinstance(error, OSError) else os.strerror(errno.EPIPE)
        print(f"error: standard output: {reason}", file=sys.stderr)
        return 2
    except Exception as error:
        # Usage errors come from click, or from the copy of it that newer releases of typer contain.
        if type(error).__name__ == "Abort":
            return 130
        if not hasattr(error, "format_message"):
            raise
        print("error: " + " ".join(error.format_message().split()), file=sys.stderr)
        return 2


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
