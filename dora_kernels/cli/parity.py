"""`dora-kernels parity`: errors of `dora_linear` against a float64 reference, beside those of PEFT's formula.

Problems, reference and budgets are those of `dora_kernels.testing`. The baseline is PEFT's formula in the same dtypes.
The error of a result a is ``||a - exact|| / ||exact||``, computed in float64; that of the norm is the largest relative
error of an element. The norm, always in float32 accuracy, has a bound of its own (`testing.norm_bound`), or twice the
error of PEFT's norm if PEFT computes it in float32 too.
"""

# Annotations are evaluated at once: typer reads them. The commands are made only after typer is known to be installed.

import functools
import itertools
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import torch

import dora_kernels
from dora_kernels import testing
from dora_kernels.cli.cases import DTYPES, Case, Cell, measure, prepare, quantities, threads_for
from dora_kernels.cli.options import SEEDS, number
from dora_kernels.cli.output import console, errors, progress
from dora_kernels.core.validation import AXES, BACKENDS
from dora_kernels.engine.dispatch import first_line, triton_problem

if TYPE_CHECKING:
    import typer
    from rich.console import Console

RULE = (
    "Budget: ours may be off by twice the error of PEFT's formula in the same dtypes, by twice what the exact result "
    "moves by when every input moves by up to one eps of the compute dtype, or by twice what it moves by when the norm "
    "of a 16-bit weight moves by its bound, whichever is largest; an element of the norm by "
    + ", ".join(f"{testing.norm_bound(*pair):.0e} ({name})" for name, pair in DTYPES.items())
    + ", or twice PEFT's error where its norm is in float32."
)

DEFAULT_SHAPES = ("128,512,384", "37,131,257")  # the first has whole tiles only, the second none
INTERPRETED_SHAPES = ("37,131,257",)  # Triton's interpreter takes half a minute for the other
DEFAULT_RANKS = (16,)


@dataclass(frozen=True)
class Settings:
    cases: tuple[Case, ...]
    backends: tuple[str, ...]
    not_run: dict[str, str]
    device: torch.device
    seed: int
    weight_gradient: bool

    @property
    def quantities(self) -> tuple[str, ...]:
        return quantities(self.weight_gradient)


def settings(
    shapes: Sequence[str] | None = None,
    dtypes: Sequence[str] | None = None,
    ranks: Sequence[int] | None = None,
    axes: Sequence[str] | None = None,
    backends: Sequence[str] | None = None,
    device: str | None = None,
    seed: int = 0,
    weight_gradient: bool = False,
) -> Settings:
    """Check the options of the command line. None or an empty list means the default.

    Raises:
        ValueError: a value is unknown, or not possible here.
    """
    names = _known("--dtype", dtypes, tuple(DTYPES)) or tuple(DTYPES)
    along = _known("--axis", axes, AXES) or AXES
    where = _find_device(device)
    run, not_run = _choose_backends(_known("--backend", backends, BACKENDS), where)
    interpreted = "triton" in run and where.type != "cuda"
    sizes = [_parse_shape(shape) for shape in shapes or (INTERPRETED_SHAPES if interpreted else DEFAULT_SHAPES)]
    cases = itertools.product(dict.fromkeys(sizes), dict.fromkeys(ranks or DEFAULT_RANKS), names, along)
    return Settings(
        tuple(Case(size, rank, dtype, axis) for size, rank, dtype, axis in cases),
        run, not_run, where, seed, weight_gradient,
    )  # fmt: skip


def run(options: Settings, advance: Callable[[Case, str], None] = lambda case, backend: None) -> list[Cell]:
    """Return every cell, case by case. `advance` is called after each case and backend."""
    cells = []
    for case in options.cases:
        with threads_for(case):
            try:
                yardstick = prepare(case, options.device, options.seed, options.weight_gradient)
            except (RuntimeError, MemoryError) as error:
                raise ValueError(f"--shape: {case} failed on {options.device}: {first_line(error)}") from error
            for backend in options.backends:
                cells += measure(yardstick, backend)
                advance(case, backend)
    return cells


def _parse_shape(text: str) -> tuple[int, int, int]:
    parts = text.split(",")
    try:
        tokens, out_features, in_features = (int(part) for part in parts)
    except ValueError:
        raise ValueError(f"--shape: expected tokens,out_features,in_features, as 128,512,384; got {text!r}") from None
    if min(tokens, out_features, in_features) < 1:
        raise ValueError(f"--shape: expected three sizes of at least 1, got {text!r}")
    return tokens, out_features, in_features


def _known(option: str, values: Sequence[str] | None, known: tuple[str, ...]) -> tuple[str, ...]:
    for value in values or ():
        if value not in known:
            raise ValueError(f"{option}: expected one of {', '.join(known)}; got {value!r}")
    return tuple(dict.fromkeys(values or ()))


def _find_device(name: str | None) -> torch.device:
    if name is None:
        name = "cpu"
        if torch.accelerator.is_available():
            name = str(torch.accelerator.current_accelerator())
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # also fails for "meta"
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device: {name!r} is not available: {first_line(error)}") from None
    return device


def _choose_backends(named: tuple[str, ...], device: torch.device) -> tuple[tuple[str, ...], dict[str, str]]:
    """Return the backends to run, and why others are not run. A backend asked for by name has to be available."""
    chosen = named or ("torch", "triton")
    problem = triton_problem(device) if "triton" in chosen else None
    if problem is None:
        return chosen, {}
    if named:
        raise ValueError(f"--backend: triton is not available on {device}: {problem}")
    return tuple(name for name in chosen if name != "triton"), {"triton": problem}


def add(app: "typer.Typer") -> None:
    """Add the command."""
    import typer

    # Empty lists as defaults, because the oldest supported typer does not know `list[str] | None`.
    several = functools.partial(typer.Option, default_factory=list, show_default=False)

    @app.command("parity")
    def parity_command(
        shape: Annotated[
            list[str],
            several(metavar="M,N,K", help="Tokens, output and input features. [default: 128,512,384 and 37,131,257]"),
        ],
        dtype: Annotated[
            list[str],
            several(metavar="NAME", help=f"{', '.join(DTYPES)} (adapters in float32). [default: all]"),
        ],
        rank: Annotated[list[str], several(metavar="R", help="[default: 16]")],
        axis: Annotated[list[str], several(metavar="NAME", help="Magnitude axis: out, in. [default: both]")],
        backend: Annotated[
            list[str],
            several(metavar="NAME", help=f"{', '.join(BACKENDS)}. [default: torch, and triton where it runs]"),
        ],
        device: Annotated[
            str, typer.Option(metavar="NAME", show_default=False, help="[default: an accelerator, else cpu]")
        ] = "",
        seed: Annotated[str, typer.Option(metavar="N", help="Seed of the random problems.")] = "0",
        weight: Annotated[bool, typer.Option("--weight", help="Also check the base weight's gradient.")] = False,
        as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    ) -> None:
        """Show errors against a float64 reference, forward and every gradient, beside those of PEFT's formula.

        Options may be repeated. Exit status 1 if an error exceeds its budget.
        """
        with errors():
            ranks = [number("--rank", one, int, least=1) for one in rank]
            start = number("--seed", seed, int, *SEEDS)
            options = settings(shape, dtype, ranks, axis, backend, device or None, start, weight)
            cells = _run_with_progress(options)
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
        return run(options, lambda case, backend: advance(f"{backend}: {case}", total))


def _parity_json(options: Settings, cells: list[Cell]) -> dict[str, Any]:
    return {
        "dora_kernels": dora_kernels.__version__,
        "torch": str(torch.__version__),
        "device": str(options.device),
        "seed": options.seed,
        "rule": RULE,
        "backends": list(options.backends),
        "not_run": options.not_run,
        "cells": [cell.as_dict() for cell in cells],
        "ok": all(cell.ok for cell in cells),
    }


def _print_parity(options: Settings, cells: list[Cell], console: "Console") -> None:
    from rich.table import Table
    from rich.text import Text

    console.print(
        "Error against a float64 reference, ||a - exact|| / ||exact||; norm: the largest error of an element."
    )
    console.print(RULE)
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
        console.print(Text(f"{failed} of {len(cells)} results exceed their budget or failed.", "bold red"))
        return
    nearest = max(cells, key=lambda cell: cell.error / cell.budget)
    share = nearest.error / nearest.budget
    console.print(f"All {len(cells)} errors are within their budgets. The nearest, at {share:.0%} of it: {nearest}")
