"""What a run was asked to do, and the fixed choices of the demo. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

LABELS = {
    "stock": "stock PEFT DoRA",
    "patched": "DoRA + patch_peft",
    "lora": "PEFT LoRA",
    "frozen": "control: frozen magnitude",
    "stale": "control: norm never refreshed",
}
MAIN = ("stock", "patched", "lora")
CONTROLS = ("frozen", "stale")

LEAST_STEPS = 20  # the loss comparison is made over at least this many steps
LOSS_LIMIT = 1e-5
STEP_LIMIT = 1.10
TOKEN_LIMIT = 1.25
MERGE_LIMIT = 1e-4  # merged against unmerged logits, relative to the largest logit
WARMUP = 2  # first steps and tokens of each loop, left out of the timings

# Seconds a phase may take before it stops early. Training never stops under LEAST_STEPS.
TRAIN_BOXES = {128: 90.0, 256: 150.0}
BOXES = {
    "before": 25.0,
    "controls": 80.0,
    "after": 25.0,
    "tokens": 30.0,
    "sample": 12.0,
    "memory": 30.0,  # for each variant; its two least steps may take longer, up to "process"
    "process": 120.0,
}


class DemoError(Exception):
    """Input the demo cannot use; shown as one line, exit status 2."""


@dataclass(frozen=True)
class Settings:
    """One run of the demo; bad values raise `DemoError`."""

    model: str | None = None
    data: Path | None = None
    steps: int | None = None
    rank: int = 16
    lr: float = 1e-3
    out: Path = Path("demo-output")
    quick: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise DemoError(f"--rank must be at least 1, not {self.rank}")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise DemoError(f"--lr must be a positive number, not {self.lr}")
        if self.steps is not None and self.steps < LEAST_STEPS:
            raise DemoError(f"--steps must be at least {LEAST_STEPS}, not {self.steps}")
        if self.data is not None and not self.data.is_file():
            raise DemoError(f"--data: there is no file {self.data}")
        if self.model is not None and not Path(self.model).is_dir():
            if not self.model.strip():
                raise DemoError("--model is empty")
            if self.model.startswith((".", "/", "~")):
                raise DemoError(f"--model: there is no folder {self.model}")
        if self.out.exists() and not self.out.is_dir():
            raise DemoError(f"--out: {self.out} is a file, not a folder")

    @property
    def alpha(self) -> int:
        """`lora_alpha`: a scaling of 2, so that a lost scaling would show."""
        return 2 * self.rank

    @property
    def wanted_steps(self) -> int:
        """Training steps at each length."""
        return self.steps or (LEAST_STEPS if self.quick else 24)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens per training step."""
        return (128,) if self.quick else (128, 256)

    @property
    def windows(self) -> int:
        """Held-out windows, each as long as the longest training step."""
        return 4 if self.quick else 6

    @property
    def timed_tokens(self) -> int:
        """Tokens generated to time one."""
        return 16 if self.quick else 48

    @property
    def sample_tokens(self) -> int:
        """Length of the shown samples."""
        return 24 if self.quick else 48

    @property
    def offline(self) -> bool:
        """Whether everything needed is on this machine."""
        return self.model is None or Path(self.model).is_dir()
