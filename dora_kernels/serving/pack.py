"""Check an adapter against a model, and pack it as slots hold it, with g computed once and for all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dora_kernels.adapters.adapter import Adapter, AdapterLayer, article, problem_of
from dora_kernels.adapters.attachment import joined
from dora_kernels.adapters.base_layers import base_layers_of, check_fit
from dora_kernels.adapters.beside import WAY_OUT, trained
from dora_kernels.adapters.names import own_layers
from dora_kernels.core.precision import accumulation_dtype, no_autocast
from dora_kernels.core.problem import Form, Weights
from dora_kernels.core.validation import DTYPES
from dora_kernels.engine.dispatch import norm_backend
from dora_kernels.engine.norm import compute_norm
from dora_kernels.model.places import parents_of, places_of, submodule
from dora_kernels.model.targets import check_bare
from dora_kernels.model.weight_readers import WeightReaders
from dora_kernels.modules import dequantize
from dora_kernels.modules.linear import is_conv1d
from dora_kernels.modules.opaque import constants_of, input_dtype, opaque_norm
from dora_kernels.serving.layer import Packed, Target


def packed(model: nn.Module, adapter: Adapter, max_rank: int) -> list[tuple[Target, Packed]]:
    """Return each layer's part of the adapter, on the layer's device.

    Raises:
        ValueError: it is not an adapter for this model, or not one that a bank can serve. The message names the layer.
    """
    base_layers = base_layers_of(joined(model))
    layers = own_layers(adapter, base_layers, _error, adapter.notes)
    if not layers:
        raise _error("it has no layers")
    if names := trained(adapter, joined(model)):
        raise _error(f"{names} trained beside the adapter, which a bank does not serve; {WAY_OUT}")
    check_fit(layers, base_layers, _error)
    for name, layer in layers.items():
        if problem := _refusal(layer, max_rank):
            raise _error(f"{name}: {problem}")
    targets = _targets(model, layers)
    return [(target, _packed(target, layers[target.name])) for target in targets]


def check_base(model: nn.Module) -> None:
    """Raise TypeError if it is no model, ValueError if it is PEFT's wrapper of one, whose layers have other names."""
    if any(each.__module__.partition(".")[0] == "peft" for each in type(joined(model)).__mro__):
        name = type(model).__name__
        raise ValueError(f"model: expected the base model, which model.unload() returns, got PEFT's {name} around it")


def _error(text: str) -> ValueError:
    return ValueError(f"adapter: {text}")


def _refusal(layer: AdapterLayer, max_rank: int) -> str | None:
    """What keeps a bank from serving a layer's adapter, or None."""
    if layer.kind != "linear":
        return f"a bank serves linear layers, and this belongs to {article(layer.kind)}"
    if problem := problem_of(layer):
        return problem
    if layer.magnitude is not None and layer.magnitude_axis != "out":
        return f"its magnitude is along {layer.magnitude_axis!r}; a bank serves magnitudes along 'out'"
    if layer.rank > max_rank:
        return f"its rank is {layer.rank}, above max_rank={max_rank}"
    for part, tensor in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B), ("magnitude", layer.magnitude)):
        if tensor is not None and not bool(tensor.isfinite().all()):
            return f"{part} has values that are not finite"
    return None


def _targets(model: nn.Module, layers: Mapping[str, AdapterLayer]) -> list[Target]:
    """The layers, of which each may have hooks of its own, and none an adapter."""
    places, readers, taken = places_of(model), WeightReaders(), dict[nn.Module, str]()
    found = []
    for name in layers:
        module = submodule(model, name)
        if other := taken.get(module):
            raise _error(f"{other} and {name} are the same module in the model")
        taken[module] = name
        for place in places[module]:
            check_bare(model, module, place)
            if (reader := readers.of(parents_of(model, place), place)) is not None:
                kernels = f"{type(reader).__name__} reads the weight itself in some of its kernels"
                raise _error(f"{place}: {kernels}, where the adapter would not run")
        found.append(_target(name, module))
    return found


@torch.no_grad()
def _target(name: str, module: Any) -> Target:
    weight = module._parameters.get("weight")
    plain = isinstance(weight, nn.Parameter) and type(weight) is nn.Parameter and weight.dtype in DTYPES
    if type(weight).__name__ == "DTensor":
        raise _error(f"{name}: the layer is sharded, which a bank does not serve")
    if plain and weight.dim() == 2:
        if weight.is_meta:
            raise ValueError(f"model: {name}: its weight is on the meta device, without values; load the weights first")
        rows = weight.detach().t() if is_conv1d(module) else weight.detach()
        bias = module._parameters.get("bias")
        return Target(name, module, rows, bias, (rows.shape[1], rows.shape[0]), weight.dtype, weight.device)
    held = dequantize.carrier(module)
    if held is None:
        raise _error(f"{name}: {type(module).__name__} shows neither a weight nor a tensor that could hold one")
    like = torch.empty(0, dtype=torch.float32, device=held.device)
    zeros = like.new_zeros(1, module.in_features, dtype=input_dtype(module, like))
    with no_autocast(held.device):
        out = module.forward(zeros)
    bias = out[0].clone() if bool(out.any()) else None
    return Target(name, module, None, bias, (module.in_features, out.shape[1]), out.dtype, held.device)


@torch.no_grad()
def _packed(target: Target, layer: AdapterLayer) -> Packed:
    """One layer's part: factors in the layer's dtype, rounded once, and g in float32 from the unrounded ones."""
    weight, device = target.weight, target.device
    wide = accumulation_dtype(weight, layer.lora_A, layer.lora_B)
    a, b = layer.lora_A.to(device, wide), layer.lora_B.to(device, wide)
    g = bias = None
    if layer.magnitude is not None:
        magnitude = layer.magnitude.to(device, wide)

        def opaque() -> Tensor:
            constants = lambda: constants_of(target.module, a, target.features[0])  # noqa: E731
            return opaque_norm(target.module, a, b, layer.scaling, constants)

        weights = Weights(a if weight is None else weight, a, b, magnitude)
        form = Form(layer.scaling, eps=layer.eps)
        backend = norm_backend("auto", weights.weight)
        divisor = compute_norm(weights, form, backend, compute=opaque if weight is None else None).divisor
        g = magnitude / divisor.to(wide)
        if target.bias is not None:
            bias = (1.0 - g) * target.bias.to(wide)
    scaled = b.t() * layer.scaling
    return Packed(a.to(target.dtype), scaled.to(target.dtype).contiguous(), g, bias)
