"""Whole layers, forward and backward: launches, passes over what is large, and what is kept in between.

Every operation of PyTorch that moves data is a launch. A pass reads or writes one tensor of a size once, in units of
the layer's 16-bit dtype: a float32 tensor of that size is two passes. Counts do not depend on sizes, so they are taken
at small ones that tell all tensors apart. PEFT's layers run on the CPU, where they call the same operations; ours is
what its Function runs on a GPU, with the norm at hand, and on lines of their own the norm and a call in evaluation.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from aot.account import on_a_gpu
from aot.launches import DTYPES
from aot.recording import NAMES, Launch, Made, Operation, Operations, described, instead
from aot.traffic import FORMULAS
from dora_kernels.core.problem import Form, Weights
from dora_kernels.engine.fingerprints import sample

M, N, K, R = 96, 320, 256, 8
SIZES = {"[M, N]": M * N, "[M, K]": M * K, "[N, K]": N * K}
_SCALING = 0.5


@dataclass(frozen=True)
class LayerRow:
    """One direction of one layer."""

    provider: str
    dtypes: str
    part: str
    launches: int
    passes: dict[str, float]
    saved: float | None
    """Bytes that the forward keeps for the backward beside x and parameters, over those of the output."""

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self)


def table(found: list[LayerRow]) -> tuple[list[str], list[list[str]]]:
    """Header and rows."""
    header = ["layer", "dtypes", "part", "launches", *(f"passes {name}" for name in SIZES), "kept / output"]
    cells = []
    for row in found:
        passes = [f"{row.passes[name]:g}" for name in SIZES]
        kept = "-" if row.saved is None else f"{row.saved:.2f}"
        cells.append([row.provider, row.dtypes, row.part, str(row.launches), *passes, kept])
    return header, cells


def rows() -> list[LayerRow]:
    """The frozen layer, PEFT's LoRA and DoRA and ours, with 16-bit and with float32 adapters under autocast."""
    found = []
    for base, adapter in DTYPES:
        if base is torch.bfloat16:
            dtypes = NAMES[base] if base is adapter else f"{NAMES[base]}+{NAMES[adapter]}"
            for provider, layer in _peft_layers(adapter).items():
                found += _peft_rows(provider, dtypes, layer, base is not adapter)
            found += _our_rows(dtypes, adapter)
    return found


def _peft_layers(adapter: torch.dtype) -> dict[str, nn.Module]:
    from peft import LoraConfig, get_peft_model

    layers: dict[str, nn.Module] = {}
    for provider, use_dora in (("frozen", None), ("PEFT LoRA", False), ("PEFT DoRA", True)):
        model = nn.Module()
        model.linear = nn.Linear(K, N, bias=False, dtype=torch.bfloat16).requires_grad_(False)
        if use_dora is not None:
            config = LoraConfig(r=R, target_modules=["linear"], use_dora=use_dora)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                peft = get_peft_model(model, config, autocast_adapter_dtype=adapter == torch.float32)
            model = peft.base_model.model
        layers[provider] = model.linear
    return layers


def _peft_rows(provider: str, dtypes: str, layer: nn.Module, autocast: bool) -> list[LayerRow]:
    x = torch.randn(M, K, dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(M, N, dtype=torch.bfloat16)
    trained = [x, *(p for p in layer.parameters() if p.requires_grad)]
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    context = torch.autocast("cpu", torch.bfloat16, enabled=autocast)
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with Operations({}) as forward, hooks, context:
        y = layer(x)
    with Operations({}) as backward:
        torch.autograd.grad(y, trained, dy)
    for known in (x, *layer.parameters()):
        saved.pop(known.untyped_storage().data_ptr(), None)
    return [
        _row(provider, dtypes, "forward", forward.made, [], sum(saved.values())),
        _row(provider, dtypes, "backward", backward.made, [], None),
    ]


def _our_rows(dtypes: str, adapter: torch.dtype) -> list[LayerRow]:
    from dora_kernels import kernels
    from dora_kernels.engine import fused

    def make(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device="cuda")

    # Under autocast the products of rank r are in its dtype.
    with on_a_gpu(), mock.patch.object(fused, "low_rank_dtype", lambda x, _: x.dtype):
        x, dy, weight = make(M, K), make(M, N), make(N, K)
        a, b, m = make(R, K, dtype=adapter), make(N, R, dtype=adapter), make(N, dtype=adapter)
        divisor, weights, form = make(N, dtype=torch.float32), Weights(weight, a, b, m), Form(_SCALING)
        norm = _recorded(lambda: kernels.weight_norm(weight, a, b, _SCALING))

        def forward() -> Any:
            scale = fused.Scale(m / divisor, divisor)
            return scale, *fused.forward(x, weights, scale, form, True)

        first = _recorded(forward)
        scale, _, h, base = first.result
        needs = fused.Needs(True, False, True, True, True, False)
        kept = kernels.KeptNorm(N, _SCALING, x.device)

        def evaluate() -> Any:
            return fused.forward(
                x, weights, fused.Scale(None, kept.divisor(weight, sample(weight), a, b)), form, False
            )

        in_use = _recorded(evaluate)
        second = _recorded(lambda: fused.backward(dy, weights, fused.Saved(x, h, base, scale), form, needs))
        saved = sum(one.untyped_storage().nbytes() for one in (*scale, h, base))
    ours = "dora_kernels"
    return [
        _row(ours, dtypes, "norm, once a step", norm.operations, norm.launches, None),
        _row(ours, dtypes, "forward", first.operations, first.launches, saved),
        _row(ours, dtypes, "backward", second.operations, second.launches, None),
        _row(ours, dtypes, "evaluation, unchanged", in_use.operations, in_use.launches, None, unchanged=True),
    ]


@dataclass(frozen=True)
class _Recorded:
    result: Any
    launches: list[Launch]
    operations: list[Operation]


def _recorded(work: Callable[[], Any]) -> _Recorded:
    launches: list[Launch] = []

    def launch(made: Made) -> None:
        launches.append(described(made, "layer", "", ""))

    with instead(launch), Operations({}) as operations:
        result = work()
    return _Recorded(result, launches, operations.made)


def _row(
    provider: str,
    dtypes: str,
    part: str,
    operations: list[Operation],
    launches: list[Launch],
    saved: int | None,
    unchanged: bool = False,
) -> LayerRow:
    moved = dict.fromkeys(SIZES, 0.0)
    for operation in operations:
        for elements, size in operation.touched:
            for name, wanted in SIZES.items():
                moved[name] += size if elements == wanted else 0
    for launch in launches:
        # Of what a kernel moves, the operands of a size are asked for once; the others are small, or in the cache.
        traffic = FORMULAS[launch.kernel](launch, unchanged)
        for side in (traffic.loaded, traffic.stored):
            for operand, size in side.items():
                for name, wanted in SIZES.items():
                    moved[name] += size if size == wanted * launch[f"{operand}_ptr"] else 0
    passes = {name: round(size / (2 * SIZES[name]), 2) for name, size in moved.items()}
    kept = None if saved is None else saved / (2 * M * N)
    return LayerRow(provider, dtypes, part, len(operations) + len(launches), passes, kept)
