"""`dora-kernels doctor`: versions, devices, and a check of the numbers that `auto`'s backend computes on each."""

# Annotations are evaluated at once: typer reads them. The commands are made only after typer is known to be installed.

import importlib.util
import json
import os
import platform
import re
import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch

import dora_kernels
from dora_kernels.cli import cases
from dora_kernels.cli.output import console
from dora_kernels.core.extras import TRITON, version_of
from dora_kernels.core.validation import DTYPES
from dora_kernels.engine import choices, norm_cache
from dora_kernels.engine.dispatch import first_line, norm_backend, triton_problem

if TYPE_CHECKING:
    import typer
    from rich.console import Console

_CHECKED_DTYPES = ("float32", "bfloat16", "mixed")


def add(app: "typer.Typer") -> None:
    """Add the command."""
    import typer

    @app.command("doctor")
    def doctor_command(
        as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    ) -> None:
        """Show versions, devices, the backend that 'auto' chooses on each and why, and run a small real call on each.

        Exit status 1 if a backend that 'auto' chooses fails.
        """
        found = doctor()
        print(json.dumps(found, indent=2)) if as_json else _print_doctor(found, console())
        raise typer.Exit(0 if found["ok"] else 1)


def doctor() -> dict[str, Any]:
    """Return the report of `dora-kernels doctor`, ready for JSON."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        for category in (UserWarning, RuntimeWarning):
            warnings.simplefilter("always", category)
        versions = {
            "dora-kernels": dora_kernels.__version__,
            "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
            "torch": str(torch.__version__),
            "triton": _triton_version(),
            "peft": version_of("peft"),
            "transformers": version_of("transformers"),
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


def _triton_version() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return None
    return version_of(*TRITON) or "unknown"


def _toolkit() -> dict[str, str | None]:
    """The toolkit that torch was built with and the driver, if they exist."""
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
    """The compiler that triton uses for its launchers: CC, else gcc or clang; None if there is none."""
    named = os.environ.get("CC")
    if named:
        return shutil.which(named)
    return shutil.which("gcc") or shutil.which("clang")


def _interpreted() -> bool:
    if importlib.util.find_spec("triton") is None:
        return False
    try:
        from dora_kernels import kernels
    except Exception:  # a broken triton is reported elsewhere
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
    """Report on a device: the backend that `auto` chooses, the reason, and whether it computes the right numbers."""
    found: dict[str, Any] = {"device": str(device), "name": _device_name(device)}
    try:
        problem = triton_problem(device)
    except Exception as error:
        problem = f"its import failed: {type(error).__name__}: {first_line(error)}"
    found["triton"] = problem or ("available" if device.type == "cuda" else "available, in its slow interpreter")
    try:
        auto = norm_backend("auto", torch.empty(1, device=device))
    except Exception as error:
        return {**found, "auto": None, "why": first_line(error), "works": False, "check": "auto finds no backend"}
    if auto == "triton":
        why = "a GPU that triton's kernels run on"
    elif device.type == "cuda":
        why = f"triton is not used: {problem}"
    else:
        why = "auto uses triton on GPUs only, torch elsewhere"
    problems = _check(device, auto)
    found["tuned"] = _tables(device)
    return {**found, "auto": auto, "why": why, "works": not problems, "check": "; ".join(problems) or "works"}


def _tables(device: torch.device) -> dict[str, str]:
    """The tables of choices for a device, by dtype: what they hold and where they are, or why they are ignored."""
    found: dict[str, str] = {}
    for dtype in DTYPES if device.type in ("cpu", "cuda") else ():
        said = []
        try:
            paths = {"": choices.table_path(device, dtype), "shipped, ": choices.shipped_path(device, dtype)}
        except FileNotFoundError as error:
            return {"any dtype": f"no table: {error}"}
        for whose, path in paths.items():
            table, reason = choices.read_table(path, device)
            if table is not None:
                when = table.get("measured", "at some time")
                said.append(f"{whose}{len(table['layers'])} shapes, measured {when}: {path}")
            elif reason is not None:
                said.append(f"{whose}ignored, {reason}: {path}")
        if said:
            found[str(dtype).removeprefix("torch.")] = "; ".join(said)
    return found


def _check(device: torch.device, backend: str) -> list[str]:
    """Return what is wrong with a forward and backward of a small layer, per dtype.

    The backend is named: no fallback.
    """
    problems = []
    for dtype in _CHECKED_DTYPES:
        case = cases.Case((9, 40, 24), 4, dtype, "out")
        try:
            with cases.threads_for(case):
                cells = cases.measure(cases.prepare(case, device), backend)
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
        for dtype, state in device.get("tuned", {}).items():
            table.add_row("  tuned", f"{dtype}: {state}")
        if not device.get("tuned"):
            table.add_row("  tuned", "no table: the shipped defaults (dora-kernels tune measures)")
        style = "green" if device["works"] else "bold red"
        check = device["check"] if device["works"] else f"FAILS: {device['check']}"
        table.add_row("  check", Text(check, style))
    for message in found["warnings"]:
        table.add_row()
        table.add_row("warning", message)
    console.print(table)
