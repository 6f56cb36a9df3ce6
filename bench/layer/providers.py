"""Who computes the layer: this package (called directly, and through a patched PEFT layer), PEFT, the frozen layer."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import dora_kernels
from bench.layer.problem import NAMES, Case, Problem

# In the order of the tables. `reused`: the norm is at hand, as in the further micro-batches of an optimizer step;
# `refreshed`: it is computed in this forward pass, as in the first.
PROVIDERS = {
    "frozen": "frozen layer",
    "peft_lora": "PEFT LoRA",
    "peft_dora": "PEFT DoRA",
    "peft_dora_compiled": "PEFT DoRA, torch.compile",
    "ours_patched": "ours, patched PEFT",
    "ours_patched_reused": "ours, patched PEFT, norm reused",
    "ours_patched_refreshed": "ours, patched PEFT, norm refreshed",
    "ours_linear_reused": "ours, dora_linear, norm given",
    "ours_linear_refreshed": "ours, dora_linear, norm computed",
}
COMPILED = "peft_dora_compiled"
IN_USE = ("peft_lora", "peft_dora", "ours_patched")
"""Those that are timed as a user has them: in whole optimizer steps and in inference."""
MICRO_BATCHES = 4
"""Of an optimizer step."""


@dataclass
class Provider:
    """One implementation on one copy of the tensors."""

    name: str
    kind: str
    forward: Callable[[Tensor], Tensor]
    leaves: list[Tensor]
    """x and the trainable parameters, in the order of `NAMES[kind]`."""
    dy: Tensor
    layer: nn.Module | None = None
    optimizer: torch.optim.Optimizer | None = None

    def run_forward(self) -> Tensor:
        """The forward pass of a training step: what the backward needs is kept, then dropped with the output."""
        return self.forward(self.leaves[0])

    def run_both(self) -> tuple[Tensor, ...]:
        """Forward and backward: the gradients of x and of the parameters."""
        return torch.autograd.grad(self.run_forward(), self.leaves, self.dy)

    def run_step(self) -> None:
        """An optimizer step of `MICRO_BATCHES` forward and backward passes: one refresh of the norm."""
        if self.optimizer is None:
            self.optimizer = torch.optim.AdamW(self.leaves[1:], lr=1e-4)
        for _ in range(MICRO_BATCHES):
            self.leaves[0].grad = None
            self.run_forward().backward(self.dy)
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def run_inference(self) -> Tensor:
        """One forward pass in evaluation; the layer is left there."""
        if self.layer is not None and self.layer.training:
            self.layer.eval()
        return self.run_forward()

    def results(self) -> dict[str, Tensor]:
        """The output and the gradients by name."""
        y = self.run_forward()
        return {"y": y.detach(), **dict(zip(NAMES[self.kind], torch.autograd.grad(y, self.leaves, self.dy)))}


def make_provider(name: str, problem: Problem, case: Case, backend: str) -> Provider:
    """A provider of `PROVIDERS` on these tensors; raises what the package it needs has to say."""
    x = problem.x.detach().requires_grad_()
    if name == "frozen":
        layer = _linear(problem)
        return Provider(name, "frozen", _autocast(case, layer), [x], problem.dy, layer)
    if name.startswith("ours_linear"):
        return _direct(name, problem, case, x, backend)
    kind = "lora" if name == "peft_lora" else "dora"
    model, layer = peft_layer(problem, case, dora=kind == "dora")
    parameters = _parameters(layer, kind)
    forward: Callable[[Tensor], Tensor] = layer
    if name == COMPILED:
        forward = torch.compile(layer)
    if name.startswith("ours_patched"):
        handle = dora_kernels.patch_peft(model)
        if not handle.patched:
            raise RuntimeError(f"patch_peft skipped the layer: {handle.skipped}")
        if name == "ours_patched_refreshed":

            def forward(x: Tensor) -> Tensor:
                dora_kernels.invalidate(layer)
                return layer(x)

        elif name == "ours_patched_reused":
            _own(layer, x, parameters, case)
            _check_reuse(layer, x, problem.dy, parameters, case)
    return Provider(name, kind, _autocast(case, forward), [x, *parameters], problem.dy, layer)


def _direct(name: str, problem: Problem, case: Case, x: Tensor, backend: str) -> Provider:
    tensors = (problem.lora_A, problem.lora_B, problem.magnitude)
    a, b, m = (t.detach().clone().requires_grad_() for t in tensors)
    norm = None
    if name == "ours_linear_reused":
        norm = dora_kernels.dora_weight_norm(problem.weight, a, b, scaling=problem.scaling, backend=backend)

    def forward(x: Tensor) -> Tensor:
        return dora_kernels.dora_linear(
            x, problem.weight, a, b, m, scaling=problem.scaling, weight_norm=norm, backend=backend
        )

    return Provider(name, "dora", _autocast(case, forward), [x, a, b, m], problem.dy)


def _linear(problem: Problem) -> nn.Linear:
    size = problem.weight.shape[0]
    layer = nn.Linear(size, size, bias=False, device="meta", dtype=problem.weight.dtype)
    layer.weight = nn.Parameter(problem.weight, requires_grad=False)
    return layer


def peft_layer(problem: Problem, case: Case, dora: bool) -> tuple[nn.Module, Any]:
    """A PEFT model of one linear layer with the problem's numbers, and that layer."""
    from peft import LoraConfig, get_peft_model

    model = nn.Module()
    model.linear = _linear(problem)
    config = LoraConfig(
        r=case.rank, lora_alpha=problem.scaling * case.rank, target_modules=["linear"], use_dora=dora, lora_dropout=0.0
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft_model = get_peft_model(model, config, autocast_adapter_dtype=case.autocast)
    layer = peft_model.base_model.model.linear
    kind = "dora" if dora else "lora"
    with torch.no_grad():
        for parameter, name in zip(_parameters(layer, kind), NAMES[kind][1:]):
            if parameter.dtype != case.adapters:
                raise RuntimeError(f"PEFT made {name} in {parameter.dtype}, not {case.adapters}")
            parameter.copy_(getattr(problem, name))
    if layer.scaling["default"] != problem.scaling:
        raise RuntimeError(f"PEFT's scaling is {layer.scaling['default']}, not {problem.scaling}")
    return peft_model.train(), layer


def _parameters(layer: Any, kind: str) -> list[Tensor]:
    found = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    return [*found, layer.lora_magnitude_vector["default"].weight] if kind == "dora" else found


def _autocast(case: Case, forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    if not case.autocast:
        return forward

    def under_autocast(x: Tensor) -> Tensor:
        with torch.autocast(case.device.type, case.base):
            return forward(x)

    return under_autocast


def _own(layer: nn.Module, x: Tensor, parameters: list[Tensor], case: Case) -> None:
    """Let an optimizer step once, without moving anything: a norm is reused after a backward only where one does."""
    _autocast(case, layer)(x)
    torch.optim.SGD(parameters, lr=0.0).step()


def _check_reuse(layer: nn.Module, x: Tensor, dy: Tensor, parameters: list[Tensor], case: Case) -> None:
    """What is called reused must be: no norm is computed in the forward passes that follow a first backward."""
    from dora_kernels.peft.state import norm_cache

    cache = norm_cache(layer, "default")
    computed = -1
    for _ in range(3):
        computed = cache.computed
        torch.autograd.grad(_autocast(case, layer)(x), [x, *parameters], dy)
    if cache.computed != computed:
        raise RuntimeError("the patched layer computed its norm again where nothing had changed")


