"""Stacks of experts in PEFT's files: which parameter a key is of, and how its tensors lie.

PEFT wraps a module once for each of its targeted parameters, in the module's order, so the keys of the last parameter
are ``experts.lora_A``, and those of the one before ``experts.base_layer.lora_A``. A ``[E * r, in]`` has one expert
after another; in B ``[out, r * E]`` the expert's index runs fastest, so that expert e's are ``B[:, e::E]``. For Llama
4, whose stacks are transposed without saying so, PEFT exchanges the two; so do its versions before
0.19 for all stacks that are not transposed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dora_kernels.adapters.adapter import AdapterLayer
from dora_kernels.adapters.formats.reader import Reading
from dora_kernels.adapters.formats.writer import Writing
from dora_kernels.core.shown import quoted

EXCHANGED = "exchanged"
"""Entry of `Adapter.config`: the stacks whose A and B PEFT exchanges."""

ALTERNATING = "alternating"
"""Entry of `Adapter.config`: the stacks in which the outputs of gate and up take turns."""

_INSIDE = ".base_layer"
_FIRST = "gate_up_proj", "up_proj", "gate_proj"
_LAST = ("down_proj",)


def names(modules: Sequence[str], targets: Any, reading: Reading) -> dict[str, str]:
    """Return the parameter's name for each module of the keys that stands for one.

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
        if any(f"{holder}.{one.rpartition('.')[2]}".endswith(f".{one}") or one.startswith(f"{holder}.")
               for one in targets):  # fmt: skip
            deepest[holder] = max(deepest.get(holder, 0), module.count(_INSIDE))
    found: dict[str, str] = {}
    for holder, depth in deepest.items():
        own = sorted({one.rpartition(".")[2] for one in targets if _is_in(one, holder)}, key=_place)
        known = [key for key in reading.base_layers or () if key.rpartition(".")[0] == holder]
        in_model = [key.rpartition(".")[2] for key in known if key.rpartition(".")[2] in own]
        order = in_model if len(in_model) == depth + 1 else own
        if len(order) != depth + 1 or (order is own and len(own) > 1 and len(set(map(_place, own))) < len(own)):
            raise reading.error(
                f"{holder}: its configuration names the parameters {', '.join(own)}, and the file has {depth + 1}; "
                "which is which cannot be told without the model"
            )
        for i, key in enumerate(order):
            found[holder + _INSIDE * (depth - i)] = f"{holder}.{key}"
    return found


def _is_in(target: str, holder: str) -> bool:
    """True if a target's module part fits a module's name."""
    module = target.rpartition(".")[0]
    return not module or holder == module or holder.endswith(f".{module}")


def _place(key: str) -> int:
    return 0 if key in _FIRST else 2 if key in _LAST else 1


def rank(reading: Reading, name: str) -> int:
    """The rank that the configuration gives a parameter."""
    ranks = reading.by_pattern(reading.config.get("rank_pattern"), f"{reading.config_file}: rank_pattern")
    return int(reading.number({"r": ranks.get(name, reading.config.get("r"))}, "r"))


def is_stack(module: str, lora_A: Tensor, lora_B: Tensor) -> bool:
    """True for SGLang's tensors with a dimension for the experts, which may be 1 where they share a factor."""
    shapes = lora_A.dim() == lora_B.dim() == 3 and lora_B.shape[2] == lora_A.shape[1]
    return shapes and module.rpartition(".")[2] in (*_FIRST, *_LAST)


def read(
    reading: Reading, module: str, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor | None, scaling: float
) -> AdapterLayer | None:
    """Return the adapter of a stack, or None if the keys are of something else."""
    if is_stack(module, lora_A, lora_B):
        count = max(lora_A.shape[0], lora_B.shape[0])
        if {lora_A.shape[0], lora_B.shape[0]} - {1, count}:
            raise reading.error(f"{module}: lora_B {list(lora_B.shape)} does not fit lora_A {list(lora_A.shape)}")
        return AdapterLayer(
            "experts", lora_A.expand(count, -1, -1), lora_B.expand(count, -1, -1), magnitude, scaling
        )
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
    if count < 1 or lora_A.dim() != 2 or lora_A.shape[0] % count or lora_B.dim() != 2 or lora_B.shape[1] % count:
        raise reading.error(
            f"{name}: lora_A {list(lora_A.shape)} and lora_B {list(lora_B.shape)} are not those of {count} experts"
        )
    a = lora_A.view(count, -1, lora_A.shape[1])
    b = lora_B.reshape(lora_B.shape[0], -1, count).permute(2, 0, 1)
    features = None if base is None else base.features
    if features is None and magnitude is not None and magnitude.shape[1] != b.shape[1]:
        features = b.shape[1], magnitude.shape[1]
    if features is not None and (a.shape[2], b.shape[1]) == features[::-1] != features:
        a, b = b.transpose(1, 2), a.transpose(1, 2)
    return AdapterLayer("experts", a, b.contiguous(), magnitude, scaling)


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
    a, b = layer.lora_A, layer.lora_B
    if exchanged:
        a, b = b.transpose(1, 2), a.transpose(1, 2)
    tensors = {
        f"{key}.lora_A.weight": a.reshape(-1, a.shape[2]),
        f"{key}.lora_B.weight": b.permute(1, 2, 0).reshape(b.shape[1], -1),
    }
    if layer.magnitude is not None:
        tensors[f"{key}.lora_magnitude_vector"] = layer.magnitude
    return tensors
