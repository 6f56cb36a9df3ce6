"""The JSON record of a run: made, written whole or not at all, and read back with its faults named.

bench/results/README.md describes what it holds.
"""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import machine
from bench.providers import LABELS

if TYPE_CHECKING:
    import torch

SCHEMA = 3
TABLES = ("rows", "curves", "failures")
_KEYS = ("schema", "commit", "date", "hardware", "versions", "settings", "ceilings", "missing", "seconds", *TABLES)
_LABELS = ("suite", "case", "part", "provider")

BUSY = 0.3
"""Cores that others may keep busy. With one of two taken, what waits for a second thread takes milliseconds and not
microseconds: PEFT's DoRA on a layer of 64 features 18 ms for 0.17."""

Record = dict[str, Any]


class RecordError(Exception):
    """A file that is no record, in one line."""


def new(device: torch.device, settings: dict[str, Any]) -> Record:
    """A record with everything but figures."""
    return {
        "schema": SCHEMA,
        "commit": machine.commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "hardware": machine.hardware(device),
        "versions": machine.versions(),
        "settings": settings,
        "ceilings": {},
        "missing": {},
        "seconds": {},
        **{name: [] for name in TABLES},
    }


def read_json(path: Path) -> Any:
    """What a file holds, or RecordError."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecordError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RecordError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from error
    except ValueError as error:
        raise RecordError(f"{path}: truncated, or not JSON: {error}") from error


def read(path: Path) -> Record:
    """The record in a file, or RecordError."""
    found = read_json(path)
    if not isinstance(found, dict) or "schema" not in found:
        raise RecordError(f"{path}: not a record of `python -m bench run`")
    if found["schema"] != SCHEMA:
        raise RecordError(f"{path}: a record of schema {found['schema']!r}, expected {SCHEMA}")
    if absent := [key for key in _KEYS if key not in found]:
        raise RecordError(f"{path}: a record without {', '.join(map(repr, absent))}")
    for name in TABLES:
        rows = found[name]
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise RecordError(f"{path}: {name!r} is not a list of objects")
    for row in found["rows"]:
        if absent := [key for key in (*_LABELS, "us") if key not in row]:
            raise RecordError(f"{path}: a row without {', '.join(map(repr, absent))}")
        if row["provider"] not in LABELS:
            raise RecordError(f"{path}: a row of {row['provider']!r}, no provider that is known here")
    return found


def write(record: Record, path: Path) -> None:
    """The record so far, a row a line."""
    parts = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in record.items() if key not in TABLES]
    for key in TABLES:
        lines = ",\n".join(f"  {json.dumps(value)}" for value in record[key])
        parts.append(f" {json.dumps(key)}: [\n{lines}\n ]" if lines else f" {json.dumps(key)}: []")
    replace(path, "{\n" + ",\n".join(parts) + "\n}\n")


def replace(path: Path, text: str) -> None:
    """Write a file whole, through a temporary name."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def machine_of(hardware: dict[str, Any]) -> str:
    """The machine of a record, in a few words."""
    capability = f" ({hardware['capability']})" if "capability" in hardware else ""
    plural = "" if hardware["threads"] == 1 else "s"
    return f"{hardware['device']}{capability}, {hardware['threads']} thread{plural}"


def disturbed(record: Record) -> str | None:
    """A sentence where other processes have a share in the times; None where they, or there, are none."""
    hardware = record["hardware"]
    others = hardware.get("others") or 0.0
    if others <= BUSY or not any(row["us"] for row in record["rows"]):
        return None
    cores = f"{others:g} of {hardware['cores']} cores"
    return f"other processes kept {cores} busy meanwhile: these times are not to be trusted"


def commit_of(record: Record) -> str:
    """The commit, shortened, with its "+"."""
    commit = str(record["commit"])
    return commit[:7] + "+" * commit.endswith("+")


def significant(figure: float, digits: int = 4) -> float | None:
    """Rounded for the record; None for what JSON has no number for."""
    return float(f"{figure:.{digits}g}") if math.isfinite(figure) else None


def rounded(figures: dict[str, float], digits: int = 3) -> dict[str, float | None]:
    """Several figures for the record."""
    return {name: significant(figure, digits) for name, figure in figures.items()}
