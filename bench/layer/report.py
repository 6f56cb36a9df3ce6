"""The JSON record of a run, and the text table made from it."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from bench.layer.providers import MICRO_BATCHES, PROVIDERS
from bench.machine import cpu_name

SCHEMA = 2
_STEP = [
    ("step", "ms", "step"), ("step", "ratio_to_lora", "x LoRA"), ("step", "spread", "spread"),
    ("step", "peak_bytes", "peak MB"),
]  # fmt: skip
_LAYER_TABLES = {
    "Whole layer": ("layers", [
        ("forward", "ms", "fwd"), ("forward", "ratio_to_lora", "x LoRA"),
        ("both", "ms", "fwd+bwd"), ("both", "ratio_to_lora", "x LoRA"), ("both", "ratio_to_frozen", "x frozen"),
    ]),
    f"Optimizer step of {MICRO_BATCHES} micro-batches": ("layers", _STEP),
    f"Decoder block, optimizer step of {MICRO_BATCHES} micro-batches": ("blocks", _STEP),
    "Inference": ("layers", [
        ("inference", "ms", "call"), ("inference", "ratio_to_lora", "x LoRA"), ("inference", "spread", "spread"),
        ("inference_graph", "ms", "in a graph"), ("inference_graph", "ratio_to_lora", "x LoRA"),
    ]),
}  # fmt: skip
"""Title to the record's key, and part, key and heading of each column."""
_VERSIONED = ("torch", "triton", "peft", "transformers", "numpy")
_REPOSITORY = Path(__file__).resolve().parents[2]


def new_record(device: torch.device, settings: dict[str, Any]) -> dict[str, Any]:
    """A record with everything but figures; bench/results/README.md describes it."""
    return {
        "schema": SCHEMA,
        "suite": "layer",
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "hardware": _hardware(device),
        "versions": _versions(),
        "settings": settings,
        "ceilings": {},
        "kernels": [],
        "layers": [],
        "blocks": [],
        "failures": [],
        "seconds": {},
    }


def _commit() -> str:
    """The commit measured, "+" where files differ from it; "unknown" outside a repository."""
    if given := os.environ.get("COMMIT"):
        return given

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(_REPOSITORY), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != _REPOSITORY:
            return "unknown"
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _VERSIONED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if torch.version.cuda or torch.version.hip:
        found["cuda" if torch.version.cuda else "hip"] = str(torch.version.cuda or torch.version.hip)
    return found


def _hardware(device: torch.device) -> dict[str, Any]:
    found: dict[str, Any] = {"device": cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if device.type != "cuda":
        return found
    properties = torch.cuda.get_device_properties(device)
    return {
        **found,
        "device": properties.name,
        "driver": _driver(),
        "memory": properties.total_memory,
        "l2": properties.L2_cache_size,
        "multiprocessors": properties.multi_processor_count,
        "capability": ".".join(map(str, torch.cuda.get_device_capability(device))),
    }


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return lines[0] if lines else None


def write(record: dict[str, Any], path: Path) -> None:
    """The record so far, complete or not at all, one figure row a line."""
    rows = {key: record[key] for key in ("kernels", "layers", "blocks", "failures")}
    head = {key: value for key, value in record.items() if key not in rows}
    parts = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    for key, values in rows.items():
        lines = ",\n".join(f"  {json.dumps(value)}" for value in values)
        parts.append(f" {json.dumps(key)}: [\n{lines}\n ]" if values else f" {json.dumps(key)}: []")
    _replace(path, "{\n" + ",\n".join(parts) + "\n}\n")
    _replace(path.with_suffix(".csv"), _csv(record))


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _csv(record: dict[str, Any]) -> str:
    """A line for each figure: table, label, provider, what was measured, its value."""
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow(["table", "label", "provider", "figure", "value"])
    for table in ("kernels", "layers", "blocks"):
        for row in record[table]:
            for key, value in row.items():
                figures = value if isinstance(value, dict) else {"": value}
                for name, figure in figures.items():
                    if isinstance(figure, (int, float)) and not isinstance(figure, bool):
                        title = f"{key}.{name}" if name else key
                        writer.writerow([table, row["label"], row["provider"], title, figure])
    return lines.getvalue()


def significant(figure: float, digits: int = 4) -> float | None:
    """Rounded for the record; None for what JSON has no number for."""
    return float(f"{figure:.{digits}g}") if math.isfinite(figure) else None


def rounded(figures: dict[str, float]) -> dict[str, float | None]:
    """Errors or limits for the record."""
    return {name: significant(figure, 3) for name, figure in figures.items()}


def text(record: dict[str, Any]) -> str:
    """The tables, for a terminal."""
    hardware, ceilings = record["hardware"], record["ceilings"]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    lines = [f"{hardware['device']}, driver {hardware.get('driver') or '-'}; {versions}; commit {record['commit']}"]
    if "copy_bytes_per_s" in ceilings:
        lines.append(f"measured copy bandwidth {ceilings['copy_bytes_per_s'] / 1e12:.3g} TB/s (read + written)")
    if "blas_flop_per_s" in ceilings:
        lines.append(f"measured bf16 matrix product {ceilings['blas_flop_per_s'] / 1e12:.3g} TFLOP/s")
    if record["kernels"]:
        lines += ["", "Kernels, L2-cold, without host time. floor: bytes or operations over the measured ceiling."]
        lines += _table(["kernel", "provider", "µs", "floor µs", "floor/time", "x ours", "error/limit"], [
            [
                row["label"], row["provider"], f"{row['us']:.1f}", _number(row["floor_us"]), _number(row["fraction"]),
                _number(row["ratio_to_ours"]), f"{_number(row['error'])}/{_number(row['limit'])}",
            ]
            for row in record["kernels"]
        ])  # fmt: skip
    for title, (table, columns) in _LAYER_TABLES.items():
        rows = [row for row in record.get(table, ()) if columns[0][0] in row]
        if rows:
            lines += ["", f"{title}, milliseconds, host time included (x LoRA: PEFT's plain LoRA)."]
            lines += _table(["layer", "provider", *(name for _, _, name in columns), "worst error/limit"], [
                [row["label"], PROVIDERS[row["provider"]], *(_cell(row, *where) for *where, _ in columns), _worst(row)]
                for row in rows
            ])  # fmt: skip
    for failure in record["failures"]:
        lines.append(f"FAILED  {failure['stage']}: {failure['message']}")
    lines.append(f"{sum(record['seconds'].values()):.0f} s" + ("" if record["failures"] else ", nothing failed"))
    return "\n".join(lines)


def _number(figure: float | None) -> str:
    return "-" if figure is None else f"{figure:.3g}"


def _worst(row: dict[str, Any]) -> str:
    """The largest error as a fraction of its limit."""
    errors, limits = row["errors"], row["limits"]
    if not errors:
        return "-"
    if any(value is None for value in errors.values()):
        return "not finite"
    return f"{max(errors[name] / limits[name] for name in errors):.2f}"


def _cell(row: dict[str, Any], part: str, key: str) -> str:
    figure = row.get(part, {}).get(key)
    if figure is None:
        return "-"
    return f"{figure / 1e6:.1f}" if key == "peak_bytes" else f"{figure:.3f}" if key == "ms" else f"{figure:.2f}"


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines, previous = [], ""
    for row in [header, *rows]:
        # A label is printed once for its group.
        first = "" if row[0] == previous else row[0]
        previous = row[0]
        cells = [first.ljust(widths[0]), row[1].ljust(widths[1])]
        cells += [cell.rjust(width) for cell, width in zip(row[2:], widths[2:])]
        lines.append("  ".join(cells).rstrip())
    return lines
