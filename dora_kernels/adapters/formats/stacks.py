"""Stacks of experts in PEFT's files: which parameter a key is of, and how its tensors lie.

PEFT wraps a module once for each of its targeted parameters, in the module's order, so the keys of the last parameter
are ``experts.lora_A``, and those of the one before ``experts.base_layer.lora_A``. Parameters that are parametrized, as
bitsandbytes' 4 bits are, it takes in the order of their names, so that there ``down_proj`` lies inside.
A ``[E * r, in]`` has one expert after another; in B ``[out, r * E]`` the expert's index runs fastest, so that expert
e's are ``B[:, e::E]``. For Llama 4, whose stacks are transposed without saying so, PEFT exchanges the two; so do its
versions before 0.19 for all stacks that are not transposed. The sizes tell it; for a stack with as many inputs as
outputs those of the file's other stacks do, or else the model and PEFT's version.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from dora_kernels.adapters.adapter import Adapter, AdapterLayer
from dora_kernels.adapters.base_layers import BaseLayer
from dora_kernels.adapters.formats.names import targets_again
from dora_kernels.adapters.formats.reader import Reading
from dora_kernels.adapters.formats.writer import Writing
from dora_kernels.adapters.names import respelled
from dora_kernels.core.expressions import Steps
from dora_kernels.core.patterns import bounded, is_named
from dora_kernels.core.shown import listed, quoted
from dora_kernels.files.pairs import before_exchange
from dora_kernels.model.expert_names import LINEAR, is_expert_name, takes_expert_names
from dora_kernels.model.places import unwrapped

EXCHANGED = "exchanged"
"""Entry of `Adapter.config`: the stacks whose A and B PEFT exchanges."""

BY_VERSION = "by_version"
"""Entry of `Adapter.config`: the stacks of which PEFT's version alone told whether A and B are exchanged, and if so."""

ALTERNATING = "alternating"
"""Entry of `Adapter.config`: the stacks in which the outputs of gate and up take turns; without it that is unknown."""

MATRICES = "matrices"
"""Entry of `Adapter.config`: the linear layers that are parameters of two dimensions, such as a router's weight."""

EXPERT_NAMES = "expert_names"
"""Entry of `Adapter.config`: whether PEFT takes names of the model's layers for experts' (`takes_expert_names`).

Without it, an adapter with stacks is that of such a model.
"""

_INSIDE = ".base_layer"
_PLACES = {"gate_up_proj": 0, "gate_proj": 0, "up_proj": 1, "down_proj": 3}
"""The order of a module's parameters; all others are at `_BETWEEN`."""
_BETWEEN = 2


def layout(names: Collection[str], base_layers: Mapping[str, BaseLayer], model: Any) -> dict[str, Any]:
    """The entries of `Adapter.config` that say how a model's stacks lie in files, and how PEFT reads its names."""
    known = {name: base_layers[name] for name in names if name in base_layers}
    found: dict[str, Any] = {}
    if exchanged := [name for name, base in known.items() if base.exchanged]:
        found[EXCHANGED] = exchanged
    if any(base.kind == "experts" and not base.either_way for base in known.values()):
        found[ALTERNATING] = [name for name, base in known.items() if base.alternating]
    if not isinstance(model, nn.Module):
        return found
    taken, has_stacks = takes_expert_names(unwrapped(model)), any(base.kind == "experts" for base in known.values())
    return found if taken == has_stacks else found | {EXPERT_NAMES: taken}


def guarded(adapter: Adapter) -> Adapter:
    """Return the adapter with a configuration in which PEFT takes no layer for an expert's.

    Layers with such names become parameters, their weights, and the others are listed, which PEFT leaves as they are.
    Nothing changes for a model whose names PEFT does not take.
    """
    stacks = {name for name, layer in adapter.layers.items() if layer.kind == "experts"}
    if not adapter.config.get(EXPERT_NAMES, bool(stacks)):
        return adapter
    given, matrices = adapter.config.get("target_modules"), list(adapter.config.get(MATRICES, ()))
    layers: dict[str, AdapterLayer] = {}
    for name, layer in adapter.layers.items():
        if layer.kind == "linear" and is_expert_name(name):
            name = f"{name}.weight"
            matrices.append(name)
        layers[name] = layer
    others = sorted(layers.keys() - stacks - set(matrices))
    ends = [one for one in given if not is_expert_name(str(one))] if isinstance(given, list) else []
    modules = targets_again(others, ends)
    config = {MATRICES: matrices, "target_modules": modules if isinstance(modules, list) else others}
    return replace(adapter, layers=layers, config=adapter.config | config)


def named(reading: Reading, module: str) -> str:
    """The layer's name for a module of the keys, or the parameter's, unless that is the weight of a linear layer."""
    parameter = reading.stacks.get(module, module)
    base = (reading.base_layers or {}).get(module)
    is_linear = module.rpartition(".")[2] in LINEAR or (base is not None and base.kind == "linear")
    return module if parameter == f"{module}.weight" and is_linear else parameter


def names(modules: Mapping[str, Mapping[str, Tensor]], targets: Any, reading: Reading) -> dict[str, str]:
    """Return the parameter's name for each module of the keys that stands for one.

    Args:
        modules: the tensors of each module in the keys, by part.

    Raises:
        ValueError: ``target_parameters`` is no list of names, or which parameter a key is of cannot be told.
    """
    if not targets:
        return {}
    if not isinstance(targets, list) or not all(isinstance(one, str) for one in targets):
        raise ValueError(f"{reading.config_file}: target_parameters: expected a list of names, got {quoted(targets)}")
    deepest: dict[str, int] = {}
    for module in modules:
        holder = module.replace(_INSIDE, "")
        deepest[holder] = max(deepest.get(holder, 0), module.count(_INSIDE))
    found: dict[str, str] = {}
    is_layer = _layers(reading)
    for holder, depth in deepest.items():
        fitting = [one for one in targets if _is_in(one, holder)]
        own = sorted({one.rpartition(".")[2] for one in fitting if "." in one}, key=_place)
        if len(own) != depth + 1:  # names without a module, as "all-linear" makes them, may be of any
            if not fitting or (depth == 0 and is_layer(holder)):
                continue
            own = sorted({one.rpartition(".")[2] for one in fitting}, key=_place)
        known = [key for key in reading.base_layers or () if key.rpartition(".")[0] == holder]
        in_model = [key.rpartition(".")[2] for key in known if key.rpartition(".")[2] in own]
        if len(in_model) > depth + 1:
            raise _missing(reading, holder, in_model[: -depth - 1])
        order = in_model if len(in_model) == depth + 1 else own
        if len(order) != depth + 1 or (order is own and len(own) > 1 and len(set(map(_place, own))) < len(own)):
            raise reading.error(
                f"{holder}: its configuration names the parameters {', '.join(own)}, and the file has {depth + 1}; "
                "which is which cannot be told without the model"
            )
        keys = [holder + _INSIDE * (depth - i) for i in range(len(order))]
        if missing := [one for key, one in zip(keys, order, strict=True) if key not in modules]:
            raise _missing(reading, holder, missing)
        sizes = [_sizes(modules[key]) for key in keys]
        order, features = _fitting(holder, order, sizes, reading.base_layers or {})
        found |= {key: f"{holder}.{one}" for key, one in zip(keys, order, strict=True)}
        told = {key: _exchanged(modules[key], each) for key, each in zip(keys, features, strict=True)}
        reading.stacks_exchanged |= {key: each for key, each in told.items() if each is not None}
    if len(agreed := set(reading.stacks_exchanged.values())) == 1:
        reading.stacks_exchanged |= dict.fromkeys(found, agreed.pop())
    return found


def _missing(reading: Reading, holder: str, parameters: list[str]) -> ValueError:
    names = listed(f"{holder}.{one}" for one in parameters)
    return reading.error(f"has no tensors for {names}, which its configuration's target_parameters name")


def _layers(reading: Reading) -> Callable[[str], bool]:
    """Return a function that is True for the names of modules that the configuration adapts as layers."""
    targets = reading.config.get("target_modules")
    if isinstance(targets, str):
        if targets == "all-linear":
            return lambda name: True
        pattern = bounded(targets, Steps(f"{reading.config_file}: target_modules"))
        return lambda name: bool(pattern.fullmatch(name))
    ends = [one for one in targets if isinstance(one, str)] if isinstance(targets, list) else []
    return lambda name: is_named(name, ends)


_Sizes = tuple[int, int] | None


def _sizes(parts: Mapping[str, Tensor]) -> _Sizes:
    """The columns of A and the rows of B, which are inputs and outputs unless PEFT has exchanged A and B."""
    a, b = parts.get("lora_A"), parts.get("lora_B")
    return None if a is None or b is None or a.dim() != 2 or b.dim() != 2 else (a.shape[1], b.shape[0])


def _exchanged(parts: Mapping[str, Tensor], features: _Sizes) -> bool | None:
    """True if A and B of a stack are exchanged, by its inputs and outputs or its magnitude; None if these do not tell.

    Args:
        features: the inputs and outputs; None if unknown.
    """
    sizes, m = _sizes(parts), parts.get("magnitude")
    if sizes is None or sizes[0] == sizes[1]:
        return None
    if features is None and m is not None and m.dim() == 2:
        features = next((each for each in (sizes, sizes[::-1]) if each[1] == m.shape[1]), None)
    return None if features not in (sizes, sizes[::-1]) else features != sizes


def _fitting(
    holder: str, order: list[str], sizes: list[_Sizes], base_layers: Mapping[str, BaseLayer]
) -> tuple[list[str], list[_Sizes]]:
    """Return the order of a module's parameters that the sizes fit, and the features of each: None if unknown."""
    bases = {key: base_layers.get(f"{holder}.{key}") for key in order}
    known = {key: base.features for key, base in bases.items() if base is not None and not base.either_way}
    for exchanged in (False, True):
        turned = [None if each is None else each[::-1] if exchanged else each for each in sizes]
        for way in (order, sorted(order)):
            found = dict(zip(way, turned, strict=True))
            if known.keys() == found.keys():
                fits = found == known
            else:
                fits = found.keys() == {"gate_up_proj", "down_proj"} and _belong_together(**found)
            if fits:
                return way, turned
    return order, [known.get(key) for key in order]


def _belong_together(gate_up_proj: _Sizes, down_proj: _Sizes) -> bool:
    """True if these inputs and outputs are those of one module: in no other order, nor exchanged, are they too."""
    if gate_up_proj is None or down_proj is None:
        return False
    return gate_up_proj == (down_proj[1], 2 * down_proj[0])


def _is_in(target: str, holder: str) -> bool:
    """True if a target's module part fits a module's name."""
    module = target.rpartition(".")[0]
    return not module or holder == module or holder.endswith(f".{module}")


def _place(key: str) -> int:
    return _PLACES.get(key, _BETWEEN)


def rank(reading: Reading, name: str) -> int:
    """The rank that the configuration gives a parameter."""
    ranks = reading.by_pattern(reading.config.get("rank_pattern"), f"{reading.config_file}: rank_pattern")
    return int(reading.number({"r": ranks.get(name, reading.config.get("r"))}, "r"))


def count(reading: Reading, module: str, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor | None) -> int:
    """The number of experts whose factors PEFT's tensors of a parameter hold; 1 for a parameter of two dimensions.

    Raises:
        ValueError: the magnitude is not that of experts.
    """
    name, outputs = reading.stacks[module], (lora_B.shape[0], lora_A.shape[1])
    if magnitude is not None and magnitude.dim() == 2 and len(magnitude) and magnitude.shape[1] in outputs:
        return len(magnitude)
    experts = lora_A.shape[0] // max(1, rank(reading, name))
    if magnitude is None:
        return experts
    base = (reading.base_layers or {}).get(name)
    stacked = base is not None and base.kind == "experts"
    if reading.base_layers is None:
        stacked = magnitude.dim() != 1 or magnitude.numel() in {experts * size for size in outputs if experts != 1}
    if not stacked:
        return 1
    own = base.features[1] if base is not None and base.features[1] in outputs else outputs[0]
    raise reading.error(
        f"{name}: lora_magnitude_vector {list(magnitude.shape)}: expected [{experts}, {own}], one value for each "
        "output of each expert"
    )


def is_stack(module: str, lora_A: Tensor, lora_B: Tensor) -> bool:
    """True for SGLang's tensors with a dimension for the experts, which may be 1 where they share a factor."""
    return is_stacked(module, lora_A) and lora_B.dim() == 3 and lora_B.shape[2] == lora_A.shape[1]


def is_stacked(module: str, factor: Tensor) -> bool:
    """True if a factor may be one of these."""
    return factor.dim() == 3 and module.rpartition(".")[2] in _PLACES


def read(
    reading: Reading, module: str, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor | None, scaling: float
) -> AdapterLayer | None:
    """Return the adapter of a stack, or None if the keys are of something else."""
    if is_stack(module, lora_A, lora_B):
        count = max(lora_A.shape[0], lora_B.shape[0])
        if {lora_A.shape[0], lora_B.shape[0]} - {1, count}:
            raise reading.error(f"{module}: lora_B {list(lora_B.shape)} does not fit lora_A {list(lora_A.shape)}")
        return AdapterLayer("experts", lora_A.expand(count, -1, -1), lora_B.expand(count, -1, -1), magnitude, scaling)
    name = reading.stacks.get(module)
    if name is None or (magnitude is not None and magnitude.dim() != 2):
        return None
    base = (reading.base_layers or {}).get(name)
    if magnitude is not None:
        count = magnitude.shape[0]
    elif base is not None:
        count = base.weight.shape[0]
    else:
        count = lora_A.shape[0] // max(1, rank(reading, name))
        if count == 1:
            return None
    if count < 1 or lora_A.dim() != 2 or lora_A.shape[0] % count or lora_B.dim() != 2 or lora_B.shape[1] % count:
        raise reading.error(
            f"{name}: lora_A {list(lora_A.shape)} and lora_B {list(lora_B.shape)} are not those of {count} experts"
        )
    a = lora_A.view(count, -1, lora_A.shape[1])
    b = lora_B.reshape(lora_B.shape[0], -1, count).permute(2, 0, 1)
    layer = AdapterLayer("experts", a, b.contiguous(), magnitude, scaling)
    before = before_exchange(reading.config, reading.header)
    exchanged = reading.stacks_exchanged.get(module)
    if exchanged is None and base is not None and not base.either_way:
        exchanged = _exchanged_for(base, before)
    elif exchanged is None:
        exchanged = reading.by_version[name] = before
    if exchanged and not before and (base is None or base.either_way):  # else the model says it
        reading.exchanged.append(name)
    return swapped(layer) if exchanged else layer


def _exchanged_for(base: BaseLayer, before: bool) -> bool:
    """True if a PEFT before 0.19, or one from then on, exchanges A and B of a model's stack."""
    return not base.transposed if before else base.exchanged


def settled(adapter: Adapter, base_layers: Mapping[str, BaseLayer]) -> Adapter:
    """Return the adapter with A and B exchanged where PEFT's version alone told how they lie, and the model disagrees.

    A stack of a model in `base_layers` is settled by it, and the note about it goes.
    """
    by_version = {name: before for name, before in adapter.config.get(BY_VERSION, {}).items() if name in adapter.layers}
    if not by_version:
        return adapter
    names = respelled(adapter.layers, base_layers)
    bases = {name: base_layers.get(names[name]) for name in by_version}
    told = {name: base for name, base in bases.items() if base is not None and not base.either_way}
    turned = [name for name, base in told.items() if _exchanged_for(base, by_version[name]) != by_version[name]]
    layers = adapter.layers | {name: swapped(adapter.layers[name]) for name in turned}
    left = {name: before for name, before in by_version.items() if name not in told}
    said = note(by_version, adapter.layers)
    notes = [each for each in adapter.notes if each not in said] + note(left, layers)
    return replace(adapter, layers=layers, notes=notes, config=adapter.config | {BY_VERSION: left})


def swapped(layer: AdapterLayer) -> AdapterLayer:
    """A stack's adapter with A and B exchanged."""
    return replace(layer, lora_A=layer.lora_B.transpose(1, 2), lora_B=layer.lora_A.transpose(1, 2).contiguous())


def note(by_version: Mapping[str, bool], layers: Mapping[str, AdapterLayer]) -> list[str]:
    """A sentence about the stacks with as many inputs as outputs, if nothing but PEFT's version told how they lie."""
    square = [name for name in by_version if layers[name].features[0] == layers[name].features[1]]
    if not square:
        return []
    way = "exchanged, as PEFT before 0.19 has them" if by_version[square[0]] else "as PEFT from 0.19 on has them"
    return [f"{listed(square)}: as many inputs as outputs, and no other stack tells A from B; read {way}"]


def keys(parameters: Sequence[str], writing: Writing) -> dict[str, str]:
    """Return the module in the keys for each parameter.

    Raises:
        ValueError: the order of a module's parameters is not known.
    """
    held: dict[str, list[str]] = {}
    for name in parameters:
        holder, _, key = name.rpartition(".")
        held.setdefault(holder, []).append(key)
    found = {}
    for holder, own in held.items():
        order = sorted(own, key=_place)
        if len(set(map(_place, own))) < len(own):
            unknown = f"the order of {' and '.join(order)} in their module is not known"
            raise writing.error(f"{holder}.{order[0]}", unknown)
        for i, key in enumerate(order):
            found[f"{holder}.{key}"] = holder + _INSIDE * (len(order) - 1 - i)
    return found


def written(key: str, layer: AdapterLayer, exchanged: bool) -> dict[str, Tensor]:
    """The tensors of a stack as PEFT has them."""
    layer = swapped(layer) if exchanged else layer
    a, b = layer.lora_A, layer.lora_B
    tensors = {
        f"{key}.lora_A.weight": a.reshape(-1, a.shape[2]),
        f"{key}.lora_B.weight": b.permute(1, 2, 0).reshape(b.shape[1], -1),
    }
    if layer.magnitude is not None:
        tensors[f"{key}.lora_magnitude_vector"] = layer.magnitude
    return tensors
