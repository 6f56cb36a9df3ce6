"""Training the variants interleaved, so that a drifting machine favours none."""

from __future__ import annotations

import itertools
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from bench.demo.phases import Phase
from bench.demo.settings import LEAST_STEPS, WARMUP, Settings


@dataclass
class Run:
    """One variant in training, and what was seen of it."""

    kind: str
    model: Any
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def make_run(kind: str, model: Any, settings: Settings) -> Run:
    """A variant with its optimizer."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # Weight decay would pull the magnitudes towards zero.
    return Run(kind, model, torch.optim.AdamW(trained, lr=settings.lr, weight_decay=0.0))


def clock(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def train_step(run: Run, batch: torch.Tensor, seed: int) -> None:
    """One timed step: forward, backward, optimizer."""
    # A base model with dropout of its own draws the same mask in every variant.
    torch.manual_seed(seed)
    start = clock(batch.device)
    loss = run.model(input_ids=batch, labels=batch, use_cache=False).loss
    loss.backward()
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.seconds.append(clock(batch.device) - start)
    run.losses.append(loss.item())


def train(runs: list[Run], batches: list[torch.Tensor], phase: Phase, seed: int) -> None:
    """Train all runs on the same batches; every order of the runs comes equally often."""
    orders = list(itertools.permutations(runs))
    for step, batch in enumerate(batches):
        if step >= LEAST_STEPS and phase.over():
            phase.stopped(step, len(batches), "steps")
            break
        for run in orders[step % len(orders)]:
            train_step(run, batch, seed + step)
        phase.advance()


def held_out_losses(
    models: dict[str, Any],
    windows: list[torch.Tensor],
    phase: Phase,
    least: int = 2,
) -> tuple[dict[str, float], int]:
    """Mean loss of each model on the same windows, and how many windows there was time for."""
    sums = dict.fromkeys(models, 0.0)
    done = 0
    for window in windows:
        if done >= least and phase.over():
            phase.stopped(done, len(windows), "windows")
            break
        for kind, model in models.items():
            model.eval()
            with torch.no_grad():
                sums[kind] += model(input_ids=window, labels=window, use_cache=False).loss.item()
            model.train()
        done += 1
        phase.advance()
    return {kind: total / done for kind, total in sums.items()}, done


def median(seconds: list[float]) -> float:
    """Median without the warm-up."""
    return statistics.median(seconds[WARMUP:])


def ratio(seconds: list[float], of: list[float]) -> float:
    """Median of the ratios of neighbours in time, without the warm-up."""
    pairs = zip(seconds[WARMUP:], of[WARMUP:], strict=True)
    return statistics.median(a / b for a, b in pairs)


def largest_difference(losses: list[float], reference: list[float]) -> float:
    """Largest difference of two loss curves over the steps both have; NaN counts as infinite."""
    gaps = [abs(a - b) for a, b in zip(losses, reference, strict=False)]
    return max(gap if gap == gap else float("inf") for gap in gaps)
