"""What was measured, what it is held against, and the JSON file."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.demo.settings import (
    CONTROLS,
    LABELS,
    LOSS_LIMIT,
    MERGE_LIMIT,
    STEP_LIMIT,
    TOKEN_LIMIT,
    Settings,
)
from bench.machine import cpu_name
from bench.record import replace


@dataclass
class Variant:
    """The figures of one variant; by tokens per step where a dictionary. Ratios are to LoRA."""

    kind: str
    step_seconds: dict[int, float] = field(default_factory=dict)
    step_ratio: dict[int, float] = field(default_factory=dict)
    losses: dict[int, list[float]] = field(default_factory=dict)
    times: dict[int, list[float]] = field(default_factory=dict)
    peak_bytes: int | None = None
    token_seconds: float | None = None
    token_ratio: float | None = None
    loss_difference: float | None = None
    held_out_before: float | None = None
    held_out_after: float | None = None
    largest_rescale: float | None = None

    def tokens_per_second(self, length: int) -> float:
        """Training speed at a length."""
        return length / self.step_seconds[length]

    @property
    def same_numbers(self) -> bool:
        """Whether its losses are stock DoRA's."""
        return self.loss_difference is not None and self.loss_difference <= LOSS_LIMIT


@dataclass
class Results:
    """Everything a run found out."""

    hardware: dict[str, Any]
    versions: dict[str, str]
    settings: dict[str, Any]
    variants: dict[str, Variant] = field(default_factory=dict)
    patched_layers: int = 0
    skipped_layers: int = 0
    sample: dict[str, str] = field(default_factory=dict)
    saved: dict[str, float] = field(default_factory=dict)
    phase_seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(frozen=True)
class Target:
    """A figure against the limit it should keep."""

    name: str
    value: float | None
    limit: float

    @property
    def met(self) -> bool:
        """Whether the measured value is within the limit."""
        return self.value is not None and self.value <= self.limit


def targets(results: Results) -> list[Target]:
    """What the patched model should reach."""
    patched = results.variants["patched"]
    found = [
        Target(f"DoRA step / LoRA step, {length} tokens", value, STEP_LIMIT)
        for length, value in patched.step_ratio.items()
    ]
    found.append(Target("DoRA token / LoRA token, unmerged", patched.token_ratio, TOKEN_LIMIT))
    found.append(Target("largest loss difference to stock", patched.loss_difference, LOSS_LIMIT))
    return found


def failures(results: Results) -> list[str]:
    """Why the run must not count as passed; speed is not among the reasons."""
    found = []
    if not results.variants["patched"].same_numbers:
        found.append(f"the patched model's losses differ from stock's by more than {LOSS_LIMIT:g}")
    for kind in CONTROLS:
        if results.variants[kind].same_numbers:
            found.append(f"{LABELS[kind]} passed the comparison that it must fail")
    for name, text in (
        ("merged_vs_unmerged", "merged and unmerged logits differ"),
        ("stock_vs_patched", "the saved adapter gives other logits in stock PEFT"),
    ):
        # Written so that NaN fails.
        if not results.saved.get(name, float("nan")) <= MERGE_LIMIT:
            found.append(text)
    return found


def hardware() -> dict[str, Any]:
    """The machine, in the words that a reader of the figures needs."""
    import torch

    found: dict[str, Any] = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "gpu": None,
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def settings_record(settings: Settings, source: str, corpus: str) -> dict[str, Any]:
    """The settings as written to JSON, without folders of this machine."""
    return {
        "model": Path(source).name if Path(source).is_dir() else source,
        "data": corpus,
        "steps": settings.wanted_steps,
        "rank": settings.rank,
        "alpha": settings.alpha,
        "lr": settings.lr,
        "seed": settings.seed,
        "quick": settings.quick,
        "dtype": "float32",
    }


def write_json(results: Results, path: Path) -> None:
    """Write everything, complete or not at all."""
    record = asdict(results)
    record["targets"] = [{**asdict(target), "met": target.met} for target in targets(results)]
    record["failures"] = failures(results)
    replace(path, json.dumps(record, indent=1) + "\n")
