"""Random layers in training, and what a DoRA function makes of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from dora_kernels.core.reference import weight_norm

f64, f32, bf16, f16 = torch.float64, torch.float32, torch.bfloat16, torch.float16

DTYPES = {
    "fp32": (f32, f32),
    "bf16": (bf16, bf16),
    "fp16": (f16, f16),
    "bf16+fp32": (bf16, f32),
    "fp16+fp32": (f16, f32),
}
"""By name: the dtype of the activations and the base layer, and that of the adapter. PEFT keeps adapters in float32."""

NAMES = ("x", "weight", "lora_A", "lora_B", "magnitude", "bias")
"""The differentiable arguments of a DoRA layer, in the order of `dora_kernels.dora_linear`."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """A layer in training, and an upstream gradient.

    Attributes:
        x: ``[..., in_features]``.
        weight: ``[out_features, in_features]``.
        lora_A: ``[rank, in_features]``.
        lora_B: ``[out_features, rank]``.
        magnitude: ``[out_features]`` for axis "out", ``[in_features]`` for "in"; None for plain LoRA.
        bias: ``[out_features]`` or None.
        dy: ``[..., out_features]``, the gradient of the output.
        scaling: Factor of ``lora_B @ lora_A``.
        magnitude_axis: "out" or "in".
        detach_norm: True if no gradient flows through the norm.
        eps: Added to the norm.
    """

    x: Tensor
    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    magnitude: Tensor | None
    bias: Tensor | None
    dy: Tensor
    scaling: float
    magnitude_axis: str = "out"
    detach_norm: bool = True
    eps: float = 0.0

    @property
    def tensors(self) -> dict[str, Tensor | None]:
        """The arguments in `NAMES`."""
        return {name: getattr(self, name) for name in NAMES}

    @property
    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """W, A and B."""
        return self.weight, self.lora_A, self.lora_B

    @property
    def options(self) -> dict[str, Any]:
        """The arguments that are not tensors."""
        return {
            "scaling": self.scaling, "magnitude_axis": self.magnitude_axis, "detach_norm": self.detach_norm,
            "eps": self.eps,
        }  # fmt: skip

    def replace(self, **changes: Any) -> Problem:
        """A copy with some fields replaced."""
        return dataclasses.replace(self, **changes)

    def map(self, change: Callable[[Tensor], Tensor]) -> Problem:
        """A copy with `change` applied to every tensor, including `dy`."""
        tensors = {**self.tensors, "dy": self.dy}
        return self.replace(**{name: None if t is None else change(t) for name, t in tensors.items()})


def all_of(name: str) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
    """The `dtypes` of `make_problem` for a name in `DTYPES`.

    Raises:
        ValueError: there is no such name.
    """
    if name not in DTYPES:
        raise ValueError(f"name: expected one of {', '.join(DTYPES)}; got {name!r}")
    base, adapter = DTYPES[name]
    return base, base, adapter


def make_problem(
    lead: tuple[int, ...] = (7,),
    in_features: int = 51,
    out_features: int = 45,
    rank: int = 3,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype] = (f32, f32, f32),
    *,
    magnitude_axis: str = "out",
    detach_norm: bool = True,
    bias: bool = True,
    magnitude: bool = True,
    scaling: float = 0.7,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Problem:
    """Make a random layer in training.

    The low-rank product is about as large as W, magnitudes differ from the norm by up to half, and the bias is larger
    than the output.

    Args:
        lead: Leading dimensions of x.
        dtypes: Dtypes of x and `dy`, of the base layer, and of the adapter.
        bias: False for a layer without bias.
        magnitude: False for plain LoRA.
        device: The tensors' device. Random numbers are drawn there on a CUDA device, and on the CPU otherwise.
        seed: The same seed gives the same numbers.
    """
    device = torch.device(device)
    drawn = device if device.type == "cuda" else torch.device("cpu")
    generator = torch.Generator(drawn).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=f64, device=drawn)

    of_x, of_base, of_adapter = dtypes
    weight = (normal(out_features, in_features) / in_features**0.5).to(of_base)
    lora_A = (normal(rank, in_features) / in_features**0.5).to(of_adapter)
    lora_B = (normal(out_features, rank) / rank**0.5).to(of_adapter)
    norm = weight_norm(weight.to(f64), lora_A.to(f64), lora_B.to(f64), scaling, magnitude_axis)
    moved = norm * (0.5 + torch.rand(norm.shape, generator=generator, dtype=f64, device=drawn))
    problem = Problem(
        x=normal(*lead, in_features).to(of_x),
        weight=weight,
        lora_A=lora_A,
        lora_B=lora_B,
        magnitude=moved.to(of_adapter) if magnitude else None,
        bias=(3 * normal(out_features)).to(of_base) if bias else None,
        dy=normal(*lead, out_features).to(of_x),
        scaling=scaling,
        magnitude_axis=magnitude_axis,
        detach_norm=detach_norm,
    )
    return problem.map(lambda t: t.to(device))


def leaves_of(problem: Problem, needs: Iterable[str] = NAMES) -> dict[str, Tensor | None]:
    """The problem's tensors as leaves of a new graph, with their own strides; those in `needs` require grad."""
    needs = set(needs)
    return {n: None if t is None else t.detach().requires_grad_(n in needs) for n, t in problem.tensors.items()}


def solve(
    function: Callable[..., Tensor], problem: Problem, needs: Iterable[str] = NAMES, **extra: Any
) -> dict[str, Any]:
    """Call `function` as `dora_kernels.dora_linear` is called, with `extra` arguments.

    Returns:
        The output "y", and the gradient of every needed input that the problem has, by name.
    """
    leaves = leaves_of(problem, needs)
    y = function(**leaves, **problem.options, **extra)
    return {"y": y.detach(), **gradients(y, leaves, problem.dy.to(y.dtype))}


def gradients(y: Tensor, leaves: dict[str, Tensor | None], dy: Tensor, **extra: Any) -> dict[str, Tensor]:
    """The gradient of every leaf that requires one, by name."""
    wanted = {name: t for name, t in leaves.items() if t is not None and t.requires_grad}
    if not wanted:
        assert not y.requires_grad
        return {}
    return dict(zip(wanted, torch.autograd.grad(y, list(wanted.values()), dy, **extra), strict=True))


def widened(problem: Problem) -> Problem:
    """The problem in float64, on the CPU where its device has no float64."""
    device = problem.x.device
    try:
        torch.zeros(1, dtype=f64, device=device)
    except (RuntimeError, TypeError):
        device = torch.device("cpu")
    return problem.map(lambda t: t.to(device).to(f64))
