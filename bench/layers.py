"""One adapted linear layer by every provider, on the same numbers, for the suites layer, decode, memory and host."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dora_kernels
from bench.problem import LayerShape, long_step
from bench.providers import ACCUMULATED, Missing, library
from dora_kernels.engine.dispatch import triton_problem
from dora_kernels.testing import Problem

PROVIDERS = (
    "frozen", "peft_lora", "peft_lora_compiled", "peft_dora", "peft_dora_compiled", "torchtune", "lycoris",
    "axolotl", "dense", "ours", "ours_merged", "ours_compiled", "ours_triton", "ours_torch",
)  # fmt: skip
IN_EVALUATION = (*PROVIDERS[:4], "peft_dora_cached", *PROVIDERS[4:10], "ours_frozen", *PROVIDERS[10:])
"""Those with what is kept in evaluation alone: PEFT's cache of B·A and the norm, and our frozen norms."""
NEEDS = {
    "frozen": ("x",),
    "lora": ("x", "lora_A", "lora_B"),
    "dora": ("x", "lora_A", "lora_B", "magnitude"),
    "dora_attached": ("x", "lora_A", "lora_B", "magnitude"),
}
"""Kinds of layers, and whose gradients each has. "dora_attached" differentiates the norm too."""
KINDS = {
    "frozen": "frozen", "peft_lora": "lora", "peft_lora_compiled": "lora", "lycoris": "dora_attached",
    "dense": "dora_attached",
}  # fmt: skip
"""What a provider computes, where it is not DoRA with the norm detached: LyCORIS and the usual tutorial train it."""


@dataclass
class Layer:
    """One provider's layer on one copy of the tensors."""

    kind: str
    forward: Callable[[Tensor], Tensor]
    leaves: list[Tensor]
    """x and the trainable parameters, in the order of `NEEDS[kind]`."""
    dy: Tensor
    module: nn.Module
    trains: bool = True
    optimizer: torch.optim.Optimizer | None = None

    def __post_init__(self) -> None:
        if self.leaves[1:]:
            # On a GPU a norm is proven fresh after a backward where a living optimizer that has stepped owns A and B.
            self.run_forward()
            self.optimizer = torch.optim.AdamW(self.leaves[1:], lr=1e-4)
            self.optimizer.step()

    def run_forward(self) -> Tensor:
        """The forward pass of a training step: what the backward needs is kept, then dropped with the output."""
        if not self.module.training:
            self.module.train()
        return self.forward(self.leaves[0])

    def run_both(self) -> tuple[Tensor, ...]:
        """Forward and backward: the gradients of x and of the parameters."""
        return torch.autograd.grad(self.run_forward(), self.leaves, self.dy)

    def run_step(self, micro_batches: int = 1) -> None:
        """An optimizer step of so many forward and backward passes: one refresh of the norm."""
        for _ in range(micro_batches):
            self.leaves[0].grad = None  # of an earlier micro-batch
            self.run_forward().backward(self.dy)
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.leaves[0].grad = None

    def run_step_accumulated(self) -> None:
        """The same with `ACCUMULATED` micro-batches."""
        self.run_step(ACCUMULATED)

    @torch.no_grad()
    def run_inference(self) -> Tensor:
        """One forward pass in evaluation."""
        if self.module.training:
            self.module.eval()
        return self.forward(self.leaves[0])

    def results(self) -> dict[str, Tensor]:
        """The output and the gradients by name."""
        y = self.run_forward()
        return {"y": y.detach(), **dict(zip(NEEDS[self.kind], torch.autograd.grad(y, self.leaves, self.dy)))}

    def moved(self, problem: Problem) -> Problem:
        """The problem with the adapter as one more step, a long one, leaves it."""
        if self.optimizer is not None:
            with long_step(self.optimizer):
                self.run_step()
        names = NEEDS[self.kind][1:]
        return problem.replace(**{
            name: leaf.detach().clone().view_as(getattr(problem, name)) for name, leaf in zip(names, self.leaves[1:])
        })  # fmt: skip


def make_layer(provider: str, problem: Problem, shape: LayerShape) -> Layer:
    """A provider's layer on these tensors; raises Missing, or what the library it needs has to say."""
    x = problem.x.detach().requires_grad_()
    kind = KINDS.get(provider, "dora")
    module, parameters = _MAKERS[provider.removesuffix("_compiled")](problem, shape)
    forward: Callable[[Tensor], Tensor] = module
    if provider.endswith("_compiled"):
        torch._dynamo.config.fail_on_recompile_limit_hit = True  # rather than go on uncompiled
        forward = torch.compile(module)
    if provider == "peft_dora_cached":
        with library():
            from peft.helpers import DoraCaching
        uncached = forward

        def forward(x: Tensor) -> Tensor:
            with DoraCaching():
                return uncached(x)

    if shape.autocast:
        called = forward

        def forward(x: Tensor) -> Tensor:
            with torch.autocast(shape.device.type, shape.base):
                return called(x)

    return Layer(kind, forward, [x, *parameters], problem.dy, module, trains=provider != "ours_frozen")


Made = tuple[nn.Module, list[Tensor]]


def _frozen(problem: Problem, shape: LayerShape) -> Made:
    rows, columns = problem.weight.shape
    layer = nn.Linear(columns, rows, bias=problem.bias is not None, device="meta", dtype=problem.weight.dtype)
    layer.weight = nn.Parameter(problem.weight, requires_grad=False)
    if problem.bias is not None:
        layer.bias = nn.Parameter(problem.bias, requires_grad=False)
    return layer, []


def _peft(
    problem: Problem, shape: LayerShape, dora: bool = True, patch: bool = False, forward: str = "composed"
) -> Made:
    """A PEFT model of one linear layer with the problem's numbers; that layer."""
    with library():
        from peft import LoraConfig, get_peft_model
    model = nn.Module()
    model.linear = _frozen(problem, shape)[0]
    alpha = problem.scaling * shape.rank
    config = LoraConfig(r=shape.rank, lora_alpha=alpha, target_modules=["linear"], use_dora=dora, lora_dropout=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft_model = get_peft_model(model, config, autocast_adapter_dtype=shape.base != shape.adapters)
    layer: Any = peft_model.base_model.model.linear
    parameters = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    if dora:
        parameters.append(layer.lora_magnitude_vector["default"].weight)
    _fill(parameters, problem, shape)
    if not math.isclose(layer.scaling["default"], problem.scaling, rel_tol=1e-12):
        raise RuntimeError(f"PEFT's scaling is {layer.scaling['default']}, not {problem.scaling}")
    peft_model.train()
    if patch:
        try:
            handle = dora_kernels.patch_peft(peft_model, **({} if forward == "composed" else {"forward": forward}))
        except (TypeError, ValueError) as reason:
            if forward == "composed":
                raise
            raise Missing(str(reason)) from None
        if not handle.patched:
            raise RuntimeError(f"patch_peft skipped the layer: {handle.skipped}")
    return layer, parameters


def _torchtune(problem: Problem, shape: LayerShape) -> Made:
    _needs_one_dtype(shape)
    with library():
        from torchtune.modules.peft import DoRALinear
    rows, columns = problem.weight.shape
    layer: Any = DoRALinear(
        columns, rows, shape.rank, problem.scaling * shape.rank, use_bias=problem.bias is not None
    ).to(shape.device)  # fmt: skip
    layer.weight = nn.Parameter(problem.weight, requires_grad=False)
    if problem.bias is not None:
        layer.bias = nn.Parameter(problem.bias, requires_grad=False)
    for factor in (layer.lora_a, layer.lora_b):
        factor.to(shape.adapters)
    layer.magnitude = nn.Parameter(layer.magnitude.detach().to(shape.adapters))
    parameters = [layer.lora_a.weight, layer.lora_b.weight, layer.magnitude]
    _fill(parameters, problem, shape)
    return layer, parameters


class _ThroughAxolotl(nn.Module):
    """A PEFT layer whose tensors axolotl's function reads; the layer's own forward is not called."""

    def __init__(self, layer: nn.Module, function: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.function = layer, function

    def forward(self, x: Tensor) -> Tensor:
        three = x if x.dim() > 2 else x.unsqueeze(0)  # its backward takes no fewer dimensions
        return self.function(self.layer, three).view(*x.shape[:-1], -1)


def _axolotl(problem: Problem, shape: LayerShape) -> Made:
    try:
        from axolotl.kernels.lora import apply_lora_linear
    except ImportError as error:  # it pins PEFT and transformers, so no extra of this package brings it
        raise Missing(f"{error}: axolotl has an environment of its own (make test-frameworks)") from error
    layer, parameters = _peft(problem, shape)
    return _ThroughAxolotl(layer, apply_lora_linear), parameters


def _lycoris(problem: Problem, shape: LayerShape) -> Made:
    _needs_one_dtype(shape)
    with library():
        from lycoris.modules.locon import LoConModule
    base, _ = _frozen(problem, shape)
    layer: Any = LoConModule(
        "layer", base, lora_dim=shape.rank, alpha=problem.scaling * shape.rank, weight_decompose=True, wd_on_out=True
    ).to(shape.device, shape.adapters)
    layer.dora_scale = nn.Parameter(layer.dora_scale.detach())
    layer.apply_to()
    parameters = [layer.lora_down.weight, layer.lora_up.weight, layer.dora_scale]
    _fill(parameters, problem, shape)
    base.adapter = layer  # so that train() and eval() reach it
    return base, parameters


class DenseDoRA(nn.Module):
    """DoRA as tutorials write it: the adapted weight is formed, normalised and multiplied with in every call."""

    def __init__(self, problem: Problem, shape: LayerShape) -> None:
        super().__init__()
        self.linear, _ = _frozen(problem, shape)
        self.lora_A, self.lora_B, self.magnitude = (
            nn.Parameter(torch.empty_like(t, dtype=shape.adapters))
            for t in (problem.lora_A, problem.lora_B, problem.magnitude)
        )
        self.scaling = problem.scaling

    def forward(self, x: Tensor) -> Tensor:
        """``x`` of shape ``[M, in_features]``; ``[M, out_features]``."""
        adapted = self.linear.weight + self.scaling * (self.lora_B @ self.lora_A)
        direction = adapted / adapted.norm(dim=1, keepdim=True)
        return F.linear(x, (self.magnitude[:, None] * direction).to(x.dtype), self.linear.bias)


def _dense(problem: Problem, shape: LayerShape) -> Made:
    _needs_one_dtype(shape)
    module = DenseDoRA(problem, shape)
    parameters: list[Tensor] = [module.lora_A, module.lora_B, module.magnitude]
    _fill(parameters, problem, shape)
    return module, parameters


def _module(problem: Problem, shape: LayerShape, backend: str) -> Made:
    """`DoRALinear` with a backend asked for by name."""
    if backend == "triton" and (reason := triton_problem(shape.device)):
        raise Missing(reason)
    layer = dora_kernels.DoRALinear.from_linear(
        _frozen(problem, shape)[0], rank=shape.rank, alpha=problem.scaling * shape.rank, backend=backend,
        adapter_dtype=shape.adapters,
    ).to(shape.device)  # fmt: skip
    parameters: list[Tensor] = [layer.lora_A.weight, layer.lora_B.weight, layer.magnitude]
    _fill(parameters, problem, shape)
    return layer.train(), parameters


def _needs_one_dtype(shape: LayerShape) -> None:
    if shape.base != shape.adapters and not shape.autocast:
        raise Missing(f"float32 adapters on a {shape.base} layer need autocast here".replace("torch.", ""))


def _fill(parameters: Sequence[Tensor], problem: Problem, shape: LayerShape) -> None:
    values = (problem.lora_A, problem.lora_B, problem.magnitude)
    with torch.no_grad():
        for parameter, value in zip(parameters, values):
            if parameter.dtype != shape.adapters:
                raise RuntimeError(f"a parameter is {parameter.dtype}, not {shape.adapters}")
            parameter.copy_(value.view_as(parameter)).requires_grad_()


def _frozen_norms(problem: Problem, shape: LayerShape) -> Made:
    """A patched layer whose norms stay as they are: it has no parameters to train."""
    frozen_norms: Any = getattr(dora_kernels, "frozen_norms", None)
    if frozen_norms is None:
        raise Missing("dora_kernels has no frozen_norms yet")
    layer, _ = _peft(problem, shape, patch=True)
    layer.eval()
    context: Any = frozen_norms(layer)
    context.__enter__()
    layer.frozen = context  # until the layer goes
    return layer, []


_MAKERS: dict[str, Callable[[Problem, LayerShape], Made]] = {
    "frozen": _frozen,
    "peft_lora": functools.partial(_peft, dora=False),
    "peft_dora": _peft,
    "peft_dora_cached": _peft,
    "torchtune": _torchtune,
    "lycoris": _lycoris,
    "axolotl": _axolotl,
    "dense": _dense,
    "ours": functools.partial(_peft, patch=True),
    "ours_merged": functools.partial(_peft, patch=True, forward="merged"),
    "ours_frozen": _frozen_norms,
    "ours_triton": functools.partial(_module, backend="triton"),
    "ours_torch": functools.partial(_module, backend="torch"),
}
"""A provider's layer; "_compiled" after the name compiles it."""

PARTS: dict[str, tuple[Callable[[Layer], Any], int, bool]] = {
    "forward": (Layer.run_forward, 1, False),
    "forward and backward": (Layer.run_both, 1, True),
    "step": (Layer.run_step, 1, True),
    f"step of {ACCUMULATED}": (Layer.run_step_accumulated, ACCUMULATED, True),
    "inference": (Layer.run_inference, 1, False),
    "inference in a graph": (Layer.run_inference, 1, False),
}
"""What is timed of a layer: the call, its micro-batches, and whether it has a backward."""
