"""Lanes: a backend on a device. Problems, the oracle and the error budgets are those of `dora_kernels.testing`."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from dora_kernels import dora_linear, dora_weight_norm
from dora_kernels.core import reference
from dora_kernels.core.precision import compute_dtype
from dora_kernels.core.scale import safe_divisor
from dora_kernels.testing import (  # noqa: F401  for the tests, which have all their helpers from here
    NAMES,
    Problem,
    all_of,
    budgets,
    check,
    distance,
    eager,
    error,
    exact_merge,
    gradients,
    leaves_of,
    make_problem,
    norm_bound,
    oracle,
    same_bits,
    solve,
    true_norm,
)

f64, f32, bf16, f16 = torch.float64, torch.float32, torch.bfloat16, torch.float16


class Lane(NamedTuple):
    """A backend on a device."""

    backend: str
    device: str

    @property
    def interpreted(self) -> bool:
        return self.backend == "triton" and self.device == "cpu"


LANES = [
    pytest.param(Lane("torch", "cpu"), id="torch"),
    pytest.param(Lane("triton", "cpu"), id="triton"),
    pytest.param(Lane("torch", "cuda"), id="torch-cuda", marks=pytest.mark.gpu),
    pytest.param(Lane("triton", "cuda"), id="triton-cuda", marks=pytest.mark.gpu),
]


def usable(lane: Lane) -> Lane:
    """The lane, or a skip where this machine lacks it. A GPU that triton refuses is not skipped: that is a failure."""
    if lane.device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    if lane.backend == "triton" and importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    if lane.interpreted and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("the interpreter is off: the compiled kernels are tested on the GPU")
    return lane


def adamw_8bit(parameters: Iterable[Tensor], lr: float) -> torch.optim.Optimizer:
    """bitsandbytes' optimizer, its state in 8 bits for tensors of any size."""
    optim = pytest.importorskip("bitsandbytes", reason="bitsandbytes, whose 8-bit optimizer this is, is missing").optim
    return optim.AdamW8bit(parameters, lr=lr, min_8bit_size=1)


class Forced(NamedTuple):
    """A lane on which thresholds are 0, so that small problems take the path of large ones."""

    lane: Lane
    thresholds: tuple[str, ...]


def _forced(name: str, lane: Lane, *constants: str) -> Any:
    """With these constants, which are thresholds, at 0."""
    marks = pytest.mark.gpu if lane.device == "cuda" else ()
    return pytest.param(Forced(lane, tuple(f"dora_kernels.{one}" for one in constants)), id=name, marks=marks)


# The other form of the norm, which the CPU takes for large weights only, and the kernels at high ranks.
_LARGE = ("engine.blocked._FACTORED_ELEMENTS", "engine.blocked._FACTORED_FEATURES")
FACTORED = [
    _forced("torch-factored", Lane("torch", "cpu"), *_LARGE),
    _forced("triton-factored", Lane("triton", "cpu"), "kernels.factored.DIRECT_RANK"),
    _forced("triton-cuda-factored", Lane("triton", "cuda"), "kernels.factored.DIRECT_RANK"),
]
# The norm kept on the device, which is worth it for large weights only.
KEPT = [
    _forced("triton-kept", Lane("triton", "cpu"), "kernels.config._KEPT_BYTES"),
    _forced("triton-cuda-kept", Lane("triton", "cuda"), "kernels.config._KEPT_BYTES"),
]


@contextlib.contextmanager
def norm_lane(given: Lane | Forced) -> Iterator[Lane]:
    """`usable`, with the thresholds of a `Forced` lane at 0 inside."""
    lane, thresholds = given if isinstance(given, Forced) else (given, ())
    usable(lane)
    with pytest.MonkeyPatch.context() as patch:
        for name in thresholds:
            patch.setattr(name, 0)
        yield lane


def ours(problem: Problem, backend: str, needs: Iterable[str] = NAMES, **extra: Any) -> dict[str, Any]:
    return solve(dora_linear, problem, needs, backend=backend, **extra)


def reference_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor | None,
    bias: Tensor | None = None,
    *,
    scaling: float = 1.0,
    magnitude_axis: str = "out",
    detach_norm: bool = True,
    weight_norm: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """`dora_linear` by the dense oracle, with V formed whole."""
    return reference.dora_linear(
        x, weight, lora_A, lora_B, magnitude, bias, scaling, magnitude_axis, detach_norm, weight_norm,
        compute_dtype(x), eps,
    )  # fmt: skip


def divisor_of(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, backend: str = "auto") -> Tensor:
    """What a magnitude along "out" is divided by."""
    return safe_divisor(dora_weight_norm(weight, lora_A, lora_B, scaling=scaling, backend=backend))


def saved_by(function: Callable[[], Any]) -> tuple[Any, list[Tensor]]:
    """`function()`, and every tensor that its graph keeps for the backward."""
    saved: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        return function(), saved
