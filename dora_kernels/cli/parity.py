"""`dora-kernels parity`: errors against a float64 oracle, beside those of PEFT's formula."""

# Annotations are not postponed here: typer reads those of the commands, which are made once it is known to be there.

import functools
import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import torch

import dora_kernels
from dora_kernels import parity
from dora_kernels.cli.output import console, progress
from dora_kernels.core.validation import BACKENDS
from dora_kernels.parity import Case, Cell, OptionError, Settings

if TYPE_CHECKING:
    import typer
    from rich.console import Console


def add(app: "typer.Typer") -> None:
    """Add the command."""
    import typer

    # With empty lists as defaults: the oldest typer supported knows no `list[str] | None`.
    several = functools.partial(typer.Option, default_factory=list, show_default=False)

    @app.command("parity")
    def parity_command(
        shape: Annotated[
            list[str],
            several(metavar="M,N,K", help="Tokens, out and in features. [default: 128,512,384 and 37,131,257]"),
        ],
        dtype: Annotated[
            list[str],
            several(metavar="NAME", help=f"{', '.join(parity.DTYPES)} (adapters in float32). [default: all]"),
        ],
        rank: Annotated[list[int], several(metavar="R", help="[default: 16]")],
        axis: Annotated[list[str], several(metavar="NAME", help="Magnitude axis: out, in. [default: both]")],
        backend: Annotated[
            list[str],
            several(metavar="NAME", help=f"{', '.join(BACKENDS)}. [default: torch, and triton where it runs]"),
        ],
        device: Annotated[
            str, typer.Option(metavar="NAME", show_default=False, help="[default: an accelerator, else cpu]")
        ] = "",
        seed: Annotated[int, typer.Option(min=0, max=2**62, help="Of the random problems.")] = 0,
        weight: Annotated[bool, typer.Option("--weight", help="The base weight's gradient too.")] = False,
        as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    ) -> None:
        """A table of errors against a float64 oracle, forward and every gradient, beside those of PEFT's formula.

        Options of a name may be given several times. Exit status 1 if an error exceeds its budget.
        """
        try:
            options = parity.settings(shape, dtype, rank, axis, backend, device or None, seed, weight)
            cells = _run_with_progress(options)
        except OptionError as error:
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(2) from None
        failed = [cell for cell in cells if not cell.ok]
        if as_json:
            print(json.dumps(_parity_json(options, cells), indent=2, allow_nan=False))
        else:
            _print_parity(options, cells, console())
        for cell in failed:
            print(f"{'FAILED' if cell.note else 'OVER BUDGET'}: {cell}", file=sys.stderr)
        raise typer.Exit(1 if failed else 0)


def _run_with_progress(options: Settings) -> list[Cell]:
    total = len(options.cases) * len(options.backends)
    with progress() as advance:
        return parity.run(options, lambda case, backend: advance(f"{backend}: {case}", total))


def _parity_json(options: Settings, cells: list[Cell]) -> dict[str, Any]:
    return {
        "dora_kernels": dora_kernels.__version__,
        "torch": str(torch.__version__),
        "device": str(options.device),
        "seed": options.seed,
        "rule": parity.RULE,
        "backends": list(options.backends),
        "not_run": options.not_run,
        "cells": [cell.as_dict() for cell in cells],
        "ok": all(cell.ok for cell in cells),
    }


def _print_parity(options: Settings, cells: list[Cell], console: "Console") -> None:
    from rich.table import Table
    from rich.text import Text

    console.print("Error against a float64 oracle, ||a - exact|| / ||exact||; norm: the largest of an element.")
    console.print(parity.RULE)
    groups: dict[tuple[Any, ...], dict[Case, dict[str, Cell]]] = {}
    for cell in cells:
        group = groups.setdefault((cell.backend, cell.case.shape, cell.case.rank), {})
        group.setdefault(cell.case, {})[cell.quantity] = cell
    for (backend, (tokens, out_features, in_features), rank), rows in groups.items():
        title = f"{backend} on {options.device}: {tokens} tokens, {in_features} to {out_features} features, rank {rank}"
        table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 1))
        table.add_column("dtype", no_wrap=True)
        table.add_column("", no_wrap=True, style="dim")
        for quantity in options.quantities:
            table.add_column(quantity, justify="right", no_wrap=True)
        for case, row in rows.items():
            if "call" in row:
                table.add_row(case.dtype, "ours", *(Text("failed", "bold red") for _ in options.quantities))
                table.add_row(f"axis {case.axis}")
                continue
            measured = [row[quantity] for quantity in options.quantities]
            ours = [Text(f"{cell.error:.1e}", "green" if cell.ok else "bold red") for cell in measured]
            table.add_row(case.dtype, "ours", *ours)
            table.add_row(f"axis {case.axis}", "PEFT", *(f"{cell.peft:.1e}" for cell in measured))
            table.add_row("", "budget", *(f"{cell.budget:.1e}" for cell in measured), style="dim")
        console.print()
        console.print(table)
    console.print()
    for name, reason in options.not_run.items():
        console.print(f"{name} was not run: {reason}")
    failed = sum(not cell.ok for cell in cells)
    if failed:
        console.print(Text(f"{failed} of {len(cells)} errors exceed their budget, or their call failed.", "bold red"))
        return
    nearest = max(cells, key=lambda cell: cell.error / cell.budget)
    share = nearest.error / nearest.budget
    console.print(f"All {len(cells)} errors are within their budgets. The nearest, at {share:.0%} of it: {nearest}")
