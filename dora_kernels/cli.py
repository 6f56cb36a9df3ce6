"""The command line: `dora-kernels doctor` and `dora-kernels parity`. Needs the `cli` extra, typer and rich.

Exit status: 0 all is well, 1 a backend fails or an error exceeds its budget, 2 bad input or a missing extra.
"""

# Annotations are not postponed here: typer reads those of the commands, which are made once it is known to be there.

import functools
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch

import dora_kernels
from dora_kernels import norm_cache, parity
from dora_kernels.backends import BACKENDS, first_line, resolve, triton_problem
from dora_kernels.parity import Case, Cell, OptionError, Settings

if TYPE_CHECKING:
    import typer
    from rich.console import Console

_TRITON_DISTRIBUTIONS = ("triton", "pytorch-triton", "triton-rocm", "pytorch-triton-rocm", "triton-windows")
_CHECKED_DTYPES = ("float32", "bfloat16", "mixed")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    try:
        import rich.console  # noqa: F401
        import typer  # noqa: F401
    except ImportError as error:
        missing = (error.name or "typer and rich").partition(".")[0]
        print(f"dora-kernels: the command line needs {missing}: pip install 'dora-kernels[cli]'", file=sys.stderr)
        return 2
    try:
        return int(build_app()(args=arguments, standalone_mode=False, prog_name="dora-kernels") or 0)
    except Exception as error:
        # Usage errors come from click, or from the copy of it that newer releases of typer carry.
        if type(error).__name__ == "Abort":
            return 130
        if not hasattr(error, "format_message"):
            raise
        print("error: " + " ".join(error.format_message().split()), file=sys.stderr)
        return 2


def build_app() -> "typer.Typer":
    """The typer application."""
    import typer

    # With empty lists as defaults: the oldest typer supported knows no `list[str] | None`.
    several = functools.partial(typer.Option, default_factory=list, show_default=False)
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

    @app.callback(invoke_without_command=True)
    def top(
        context: typer.Context,
        version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
    ) -> None:
        """DoRA at the price of LoRA: checks of this installation."""
        if version:
            print(f"dora-kernels {dora_kernels.__version__}")
            raise typer.Exit(0)
        if context.invoked_subcommand is None:
            print(context.get_help())
            raise typer.Exit(2)

    @app.command("doctor")
    def doctor_command(
        as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    ) -> None:
        """Versions, devices, the backend 'auto' takes on each and why, and a small real call on each.

        Exit status 1 if a backend that 'auto' takes fails.
        """
        found = doctor()
        print(json.dumps(found, indent=2)) if as_json else _print_doctor(found, _console())
        raise typer.Exit(0 if found["ok"] else 1)

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
            _print_parity(options, cells, _console())
        for cell in failed:
            print(f"{'FAILED' if cell.note else 'OVER BUDGET'}: {cell}", file=sys.stderr)
        raise typer.Exit(1 if failed else 0)

    return app


def doctor() -> dict[str, Any]:
    """What `dora-kernels doctor` finds, ready for JSON."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        for category in (UserWarning, RuntimeWarning):
            warnings.simplefilter("always", category)
        versions = {
            "dora-kernels": dora_kernels.__version__,
            "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
            "torch": str(torch.__version__),
            "triton": _triton_version(),
            "peft": _version("peft"),
            "transformers": _version("transformers"),
            **_toolkit(),
        }
        devices = [_examine(device) for device in _devices()]
    first = {str(each.message).strip().splitlines()[0]: None for each in caught if str(each.message).strip()}
    return {
        "versions": versions,
        "c_compiler": _c_compiler(),
        "triton_interpreter": _interpreted(),
        "norm_reuse": norm_cache.norm_reuse(),
        "devices": devices,
        "warnings": list(first),
        "ok": all(device["works"] for device in devices),
    }


def _version(*distributions: str) -> str | None:
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _triton_version() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return None
    return _version(*_TRITON_DISTRIBUTIONS) or "unknown"


def _toolkit() -> dict[str, str | None]:
    """The toolkit that torch was built with and the driver, as far as they exist."""
    if torch.version.hip is not None:
        return {"rocm": torch.version.hip}
    if torch.version.cuda is None:
        return {"cuda": None}
    driver = None
    loaded = Path("/proc/driver/nvidia/version")
    if loaded.exists():
        match = re.search(r"(\d+\.\d+[\d.]*)", loaded.read_text())
        driver = match.group(1) if match else None
    highest = getattr(torch._C, "_cuda_getDriverVersion", int)() if torch.cuda.is_available() else 0
    if highest:
        driver = f"{driver or 'version unknown'}, up to CUDA {highest // 1000}.{highest % 1000 // 10}"
    return {"cuda": torch.version.cuda, "driver": driver}


def _c_compiler() -> str | None:
    """The compiler that triton takes for its launchers: CC, else gcc or clang. None where there is none."""
    named = os.environ.get("CC")
    if named:
        return shutil.which(named)
    return shutil.which("gcc") or shutil.which("clang")


def _interpreted() -> bool:
    if importlib.util.find_spec("triton") is None:
        return False
    try:
        from dora_kernels import kernels
    except Exception:  # a triton that cannot be imported is told about where it is missed
        return False
    return bool(kernels.INTERPRETED)


def _devices() -> list[torch.device]:
    found = [torch.device("cpu")]
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator()
        assert kind is not None
        found += [torch.device(kind.type, index) for index in range(torch.accelerator.device_count())]
    return found


def _examine(device: torch.device) -> dict[str, Any]:
    """A device: what `auto` takes there, why, and whether that computes the right numbers."""
    found: dict[str, Any] = {"device": str(device), "name": _device_name(device)}
    try:
        problem = triton_problem(device)
    except Exception as error:
        problem = f"importing it failed: {type(error).__name__}: {first_line(error)}"
    found["triton"] = problem or ("available" if device.type == "cuda" else "available in its interpreter, slowly")
    try:
        auto = resolve("auto", (torch.empty(1, device=device),))
    except Exception as error:
        return {**found, "auto": None, "why": first_line(error), "works": False, "check": "auto finds no backend"}
    if auto == "triton":
        why = "a GPU that triton's kernels run on"
    elif device.type == "cuda":
        why = f"triton is not used: {problem}"
    else:
        why = "auto takes triton on GPUs only, torch elsewhere"
    problems = _check(device, auto)
    return {**found, "auto": auto, "why": why, "works": not problems, "check": "; ".join(problems) or "works"}


def _check(device: torch.device, backend: str) -> list[str]:
    """What is wrong with a forward and backward of a small layer, per dtype. By name, so that nothing falls back."""
    problems = []
    for dtype in _CHECKED_DTYPES:
        case = Case((9, 40, 24), 4, dtype, "out")
        try:
            with parity.threads_for(case):
                cells = parity.measure(parity.prepare(case, device), backend)
        except Exception as error:  # the device itself fails, or plain PyTorch on it
            problems.append(f"{dtype}: {type(error).__name__}: {first_line(error)}")
        else:
            problems += [str(cell) for cell in cells if not cell.ok]
    return problems


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        if torch.version.hip is not None:
            return f"{properties.name}, {getattr(properties, 'gcnArchName', 'AMD')}, {memory}"
        return f"{properties.name}, compute capability {properties.major}.{properties.minor}, {memory}"
    if device.type == "cpu":
        return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    return device.type


def _console(stderr: bool = False) -> "Console":
    from rich.console import Console

    # Where nobody watches, rich takes 80 columns, and words break that a search should find.
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, markup=False, highlight=False, width=None if stream.isatty() else 120)


def _print_doctor(found: dict[str, Any], console: "Console") -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, version in found["versions"].items():
        table.add_row(name, version or "none")
    table.add_row("C compiler", found["c_compiler"] or "not found (CC, gcc, clang): triton needs one to launch kernels")
    table.add_row("triton interpreter", "on (TRITON_INTERPRET)" if found["triton_interpreter"] else "off")
    table.add_row("norm reuse", "on" if found["norm_reuse"] else "off")
    for device in found["devices"]:
        table.add_row()
        table.add_row(device["device"], device["name"])
        table.add_row("  auto takes", f"{device['auto'] or 'nothing'}: {device['why']}")
        table.add_row("  triton", device["triton"])
        style = "green" if device["works"] else "bold red"
        check = device["check"] if device["works"] else f"FAILS: {device['check']}"
        table.add_row("  check", Text(check, style))
    for message in found["warnings"]:
        table.add_row()
        table.add_row("warning", message)
    console.print(table)


def _run_with_progress(options: Settings) -> list[Cell]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    console = _console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(options.cases) * len(options.backends))

        def advance(case: Case, backend: str) -> None:
            progress.update(task, advance=1, description=f"{backend}: {case}")

        return parity.run(options, advance)


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
