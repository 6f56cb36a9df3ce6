"""The base model's layers by name, to compare an adapter's names, sizes and axes with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dora_kernels.adapters.adapter import AdapterLayer, article
from dora_kernels.adapters.names import proposal
from dora_kernels.model.places import named_modules
from dora_kernels.modules import AdaptedLayer, dequantize
from dora_kernels.modules.linear import is_conv1d
from dora_kernels.modules.stand_in import alternates, hidden_transposed, is_transposed

CONVOLUTIONS = {"conv1d": nn.Conv1d, "conv2d": nn.Conv2d, "conv3d": nn.Conv3d}
"""Convolution classes by `AdapterLayer.kind`."""


@dataclass(frozen=True)
class BaseLayer:
    """A layer without its adapter.

    Attributes:
        kind: as `AdapterLayer.kind`; None for a two-dimensional tensor in a state dict, which may belong to a linear
            layer, an embedding, or a linear layer that is stored transposed.
        features: input and output size, as `AdapterLayer.features`; if the kind is unknown, those of a linear layer.
        weight: the weight as it is stored.
        alternating: True for a stack in which the outputs of gate and up take turns.
        transposed: True for a stack that the model has as ``[E, in, out]``; `weight` is ``[E, out, in]`` nevertheless.
        exchanged: True for a stack whose A and B PEFT exchanges, because its module does not say that it is transposed.
        either_way: True for a stack of a state dict, which does not say whether it is ``[E, out, in]`` or
            ``[E, in, out]``; features are those of the first.
        packed: True for a parameter that is parametrized, as stacks in 4 bits are; only PEFT adapts it.
    """

    kind: str | None
    features: tuple[int, int]
    weight: Tensor
    alternating: bool = False
    transposed: bool = False
    exchanged: bool = False
    either_way: bool = False
    packed: bool = False

    @property
    def kernel(self) -> tuple[int, ...]:
        """A convolution's kernel size; empty for other kinds."""
        return () if self.kind == "experts" else tuple(self.weight.shape[2:])

    def fits(self, layer: AdapterLayer) -> bool:
        if "experts" in (self.kind, layer.kind) and len(self.weight) != len(layer.lora_A):
            return False
        if layer.kernel != self.kernel:
            return False
        if self.kind is None:
            return layer.kind in ("linear", "embedding") and layer.features in (self.features, self.features[::-1])
        if self.either_way and layer.kind == self.kind:
            return layer.features in (self.features, self.features[::-1])
        return layer.kind == self.kind and layer.features == self.features

    def norms(self, layer: AdapterLayer) -> tuple[Tensor, Tensor] | None:
        """Norms of the adapted weight along "out" and "in" in float64; None if they cannot be computed."""
        delta = layer.scaling * (layer.lora_B.double().flatten(1) @ layer.lora_A.double().flatten(1))
        weight = self.weight.detach().cpu()
        if weight.is_meta or not weight.is_floating_point() or weight.numel() != delta.numel():
            return None
        # A square weight of a state dict may be transposed, so it never decides.
        if self.kind == "embedding" or (weight.dim() == 2 and weight.shape != delta.shape):
            weight = weight.transpose(0, 1)
        adapted = weight.double() + delta.view(weight.shape)
        return adapted.flatten(1).norm(dim=1), adapted.transpose(0, 1).flatten(1).norm(dim=1)


def base_layers_of(model: nn.Module | Mapping[str, Tensor]) -> dict[str, BaseLayer]:
    """The layers of a model, adapted or not, or of a state dict, that can have an adapter."""
    if isinstance(model, nn.Module):
        modules = base_modules(model)
        found = {name: _base_layer(module) for name, module in modules.items()}
        for name, module in modules.items():
            found |= {f"{name}.{key}": stack for key, stack in _stacks_of(module).items()}
    else:
        found = {key.removesuffix(".weight"): _base_layer_of_weight(weight) for key, weight in model.items()
                 if key.endswith(".weight")}  # fmt: skip
        found |= {key: BaseLayer("experts", (tensor.shape[2], tensor.shape[1]), tensor, either_way=True)
                  for key, tensor in model.items() if isinstance(tensor, Tensor) and tensor.dim() == 3}  # fmt: skip
    return {name: base for name, base in found.items() if base is not None}


def check_fit(
    layers: Mapping[str, AdapterLayer], base_layers: Mapping[str, BaseLayer], error: Callable[[str], ValueError]
) -> None:
    """Raise ``error(text)`` if a layer of the adapter is missing in the base model or has another size there."""
    for name, layer in layers.items():
        base = base_layers.get(name)
        if base is None and name.endswith(".weight"):  # PEFT's `target_parameters` of a router, for one
            raise error(
                f"{name}: a parameter that is no layer's and no stack of experts; only PEFT adapts it: "
                "patch_peft_globally(), then PeftModel.from_pretrained"
            )
        if base is None:
            raise error(f"{name}: the model has no such layer{proposal(name, base_layers)}")
        if base.packed:
            raise error(
                f"{name}: it is parametrized (quantised) in the model, and only PEFT adapts it: patch_peft_globally(), "
                "then PeftModel.from_pretrained; or load the model without quantisation"
            )
        if not base.fits(layer):
            here, there = (f" and the kernel {list(one.kernel)}" if one.kernel else "" for one in (layer, base))
            mine, its = article(layer.kind), article(base.kind or "tensor")
            if layer.kind == base.kind == "experts":
                mine, its = (f"a stack of {len(t)} experts" for t in (layer.lora_A, base.weight))
            raise error(
                f"{name} belongs to {mine} with {layer.features[0]} inputs and {layer.features[1]} "
                "outputs"
                f"{here}, the model's is {its} with {base.features[0]} and "
                f"{base.features[1]}{there}"
            )


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Modules by name.

    An adapted layer's base layer has the layer's own name; a shared module is listed under each name.
    """
    found: dict[str, nn.Module] = {}
    inside: tuple[str, ...] = ()
    for name, module in named_modules(model):
        if inside and name.startswith(inside):
            continue
        if isinstance(module, AdaptedLayer):
            inside = (*inside, f"{name}." if name else "")
            while isinstance(module, AdaptedLayer):  # experts have a layer around another for each stack
                module = module.base_layer
        found[name] = module
    return found


def _base_layer(module: nn.Module) -> BaseLayer | None:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return _of_opaque(module)
    if is_conv1d(module):  # stored transposed
        return BaseLayer("linear", (weight.shape[0], weight.shape[1]), weight.transpose(0, 1))
    if isinstance(module, nn.Linear):
        return BaseLayer("linear", (module.in_features, module.out_features), weight)
    if isinstance(module, nn.Embedding):
        return BaseLayer("embedding", (module.num_embeddings, module.embedding_dim), weight)
    for kind, convolution in CONVOLUTIONS.items():
        if isinstance(module, convolution):
            return BaseLayer(kind, (module.in_channels, module.out_channels), weight)
    return _of_opaque(module)


def _of_opaque(module: Any) -> BaseLayer | None:
    """A linear layer of another library, which names its sizes, and whose weight has a format of its own."""
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if not all(isinstance(size, int) for size in sizes) or module._modules:
        return None
    held = dequantize.carrier(module)
    if held is None:
        return None
    return BaseLayer("linear", sizes, held if held.shape == sizes[::-1] else held.new_empty(0))  # type: ignore[arg-type]


def _stacks_of(module: nn.Module) -> dict[str, BaseLayer]:
    """A module's stacks of experts, as ``[E, out, in]``."""
    found = {}
    for key, parameter in module._parameters.items():
        if parameter is not None and parameter.dim() == 3 and not type(module).__module__.startswith("torch."):
            turned = is_transposed(module)
            weight = parameter.transpose(1, 2) if turned else parameter
            mixed = key == "gate_up_proj" and alternates(module)
            features = weight.shape[2], weight.shape[1]
            found[key] = BaseLayer("experts", features, weight, mixed, turned, hidden_transposed(module))
    for key, held in getattr(module, "parametrizations", {}).items():
        if hasattr(held, "original"):  # weight_norm has two tensors instead
            found[key] = BaseLayer("experts", (0, 0), held.original, either_way=True, packed=True)
    return found


def _base_layer_of_weight(weight: Tensor) -> BaseLayer | None:
    if not 2 <= weight.dim() <= 5:
        return None
    kind = None if weight.dim() == 2 else f"conv{weight.dim() - 2}d"
    return BaseLayer(kind, (weight.shape[1], weight.shape[0]), weight)


def axis_by_norms(layer: AdapterLayer, base: BaseLayer) -> tuple[str, float, float] | None:
    """Return the axis whose norm the magnitude follows, and its mean relative distance to that norm and the other.

    A magnitude starts as one of the two norms, and training changes it by a few percent. None if neither is clearly
    nearer (by a factor of two), or if the weight cannot be read.
    """
    norms = base.norms(layer)
    if norms is None or layer.magnitude is None or base.kind is None:
        return None
    magnitude = layer.magnitude.double().cpu()
    distances = [float((magnitude - norm).abs().sum() / norm.sum().clamp_min(1e-300)) for norm in norms]
    if 2.0 * min(distances) >= max(distances):
        return None
    nearest = distances.index(min(distances))
    return ("out", "in")[nearest], distances[nearest], distances[1 - nearest]
