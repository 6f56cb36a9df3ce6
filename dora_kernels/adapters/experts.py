"""Adapters of stacks of experts: attached to a model, and as the linear layers of each expert in files of other names.

Before transformers 5, and in most model files, each expert is a module of its own, ``experts.3.gate_proj``. A stack
holds them all, those for gate and up one above the other. As linear layers the two share A, so a stack's adapter is
theirs without loss. The other way round the stack's rank is the sum of theirs, unless their A is the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dora_kernels import modules
from dora_kernels.adapters.adapter import SMALL_EPS, AdapterLayer, eps_note, problem_of
from dora_kernels.adapters.base_layers import BaseLayer
from dora_kernels.adapters.blocks import names_in_model
from dora_kernels.model.targets import adapted_stack

PARTS = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "gate_proj": (("gate_proj",), ("w1",)),
    "up_proj": (("up_proj",), ("w3",)),
    "down_proj": (("down_proj",), ("w2",)),
}
"""By stack: the names of each expert's linear layers in it, one above the other, in two spellings."""

IN_TURNS = "gate and up take turns in this model's stack, and not in the file"
"""Why the layers of single experts cannot be stacked for some models."""

EXPERT = re.compile(r"(?P<holder>.+)\.(?P<expert>\d+)\.(?P<part>\w+)")
"""The name of a linear layer of one expert."""


def split(layers: Mapping[str, AdapterLayer]) -> dict[str, AdapterLayer]:
    """Return the layers with each stack as the linear layers of its experts.

    Raises:
        ValueError: it is not known of which layers a stack consists.
    """
    found: dict[str, AdapterLayer] = {}
    for name, layer in layers.items():
        if layer.kind != "experts":
            found[name] = layer
            continue
        holder, _, stack = name.rpartition(".")
        if stack not in PARTS:
            raise ValueError(f"{name}: expected one of {', '.join(PARTS)}, to know the linear layers in it")
        parts = PARTS[stack][0]
        if layer.lora_B.shape[1] % len(parts):
            raise ValueError(f"{name}: {layer.lora_B.shape[1]} outputs are not those of {' and '.join(parts)}")
        for e, (a, b) in enumerate(zip(layer.lora_A, layer.lora_B, strict=True)):
            rows = b.shape[0] // len(parts)
            for i, part in enumerate(parts):
                own = slice(i * rows, (i + 1) * rows)
                m = None if layer.magnitude is None else layer.magnitude[e, own].clone()
                one = replace(layer, kind="linear", lora_A=a.clone(), lora_B=b[own].clone(), magnitude=m)
                found[f"{holder}.{e}.{part}"] = one
    return found


def split_weight(name: str, weight: Tensor) -> dict[str, Tensor]:
    """Return a stack's weight ``[E, out, in]`` as those of its experts' linear layers; empty if it is none."""
    holder, _, stack = name.rpartition(".")
    parts = PARTS[stack][0] if stack in PARTS and weight.dim() == 3 else ()
    if not parts or weight.shape[1] % len(parts):
        return {}
    return {
        f"{holder}.{e}.{part}.weight": rows
        for e, one in enumerate(weight) for part, rows in zip(parts, one.chunk(len(parts)), strict=True)
    }  # fmt: skip


def of_expert(layer: AdapterLayer, expert: int) -> AdapterLayer:
    """One expert's adapter, a linear layer's."""
    m = None if layer.magnitude is None else layer.magnitude[expert]
    return replace(layer, kind="linear", lora_A=layer.lora_A[expert], lora_B=layer.lora_B[expert], magnitude=m)


def single_names(known: Mapping[str, BaseLayer]) -> list[str]:
    """The names that a file may have for layers of single experts, where the model (`known`) has stacks of them.

    They are needed to find the dots that a file with underscores has lost.
    """
    found = []
    for own, base in known.items():
        holder, _, stack = own.rpartition(".")
        if base.kind != "experts" or stack not in PARTS:
            continue
        holders = {holder, holder.replace(".mlp.experts", ".block_sparse_moe.experts")}  # now and before transformers 5
        parts = [part for spelling in PARTS[stack] for part in spelling]
        found += [f"{each}.{e}.{part}" for each in holders for e in range(len(base.weight)) for part in parts]
    return found


def stacked(
    adapter: Mapping[str, AdapterLayer], known: Mapping[str, BaseLayer], notes: list[str]
) -> dict[str, AdapterLayer]:
    """Return an adapter's layers with those of experts stacked, where the model (`known`) has stacks of them.

    Raises:
        ValueError: an expert, or one of its layers, is missing; or the model's stacks are no such stacks.
    """
    stacks: dict[str, dict[tuple[int, str], AdapterLayer]] = {}
    names: dict[str, str] = {}
    for name, layer in adapter.items():
        if EXPERT.fullmatch(name) is None or layer.kind != "linear" or name in known:
            continue
        for match in (EXPERT.fullmatch(one.removesuffix(".weight")) for one in names_in_model([f"{name}.weight"])):
            own = None if match is None else _stack_with(match, known)
            if match is not None and own is not None:
                stacks.setdefault(own, {})[int(match["expert"]), match["part"]] = layer
                names[name] = own
                break
    layers = {name: layer for name, layer in adapter.items() if name not in names}
    for own, parts in stacks.items():
        if known[own].alternating:
            raise ValueError(f"adapter: {own}: {IN_TURNS}")
        layers[own] = _stack(own, parts, known[own].weight.shape[0])
    if dropped := max((layer.eps for parts in stacks.values() for layer in parts.values()), default=0.0):
        notes.append(eps_note(0.0, dropped))
    if stacks:
        notes.append(f"the layers of single experts became {len(stacks)} stacks")
    return layers


def _stack_with(match: re.Match[str], known: Mapping[str, BaseLayer]) -> str | None:
    """The name of the stack that has the layer of an expert, if the model has one."""
    return next((own for own in stacks_with(match) if own in known and known[own].kind == "experts"), None)


def stacks_with(match: re.Match[str]) -> list[str]:
    """The names that a stack with the layer of an expert may have."""
    stacks = (stack for stack, spellings in PARTS.items() if any(match["part"] in each for each in spellings))
    return [f"{match['holder']}.{stack}" for stack in stacks]


def _stack(name: str, parts: Mapping[tuple[int, str], AdapterLayer], count: int) -> AdapterLayer:
    present = {part for _, part in parts}
    order = next(each for each in PARTS[name.rpartition(".")[2]] if present & set(each))
    wanted = [(e, part) for e in range(count) for part in order]
    missing = [f"{e}.{part}" for e, part in wanted if (e, part) not in parts]
    if missing or len(parts) != len(wanted):
        what = f"has no {missing[0]}" if missing else f"has more than the model's {count} experts"
        raise ValueError(f"adapter: {name}: the file {what}; a stack is adapted with all its experts or not at all")
    rows = [[parts[e, part] for part in order] for e in range(count)]
    shared = all(torch.equal(one.lora_A, row[0].lora_A) for row in rows for one in row)
    lora_A, lora_B, magnitude = [], [], []
    for row in rows:
        scaled = [one.lora_B * one.scaling for one in row]
        lora_A.append(row[0].lora_A if shared else torch.cat([one.lora_A for one in row]))
        lora_B.append(torch.cat(scaled) if shared else torch.block_diag(*scaled))
        magnitude.append(None if row[0].magnitude is None else torch.cat([_magnitude(one) for one in row]))
    same = len({t.shape for t in lora_A}) == 1 == len({t.shape for t in lora_B})
    if not same or any((m is None) != (magnitude[0] is None) for m in magnitude):
        raise ValueError(f"adapter: {name}: its experts have different sizes or ranks, or only some have a magnitude")
    (axis, eps), *others = {(one.magnitude_axis, one.eps) for row in rows for one in row}
    if magnitude[0] is not None and (others or axis != "out" or eps > SMALL_EPS):
        raise ValueError(f"adapter: {name}: its experts have magnitudes along 'in', or an eps, and stacks have neither")
    m = None if magnitude[0] is None else torch.stack([each for each in magnitude if each is not None])
    return AdapterLayer("experts", torch.stack(lora_A), torch.stack(lora_B), m, 1.0)


def _magnitude(layer: AdapterLayer) -> Tensor:
    assert layer.magnitude is not None
    return layer.magnitude


def plan_stacks(
    model: nn.Module,
    stacks: Mapping[str, AdapterLayer],
    originals: Mapping[str, nn.Module],
    places: Mapping[nn.Module, Collection[str]],
    error: Callable[[str], ValueError],
) -> tuple[dict[nn.Module, Any], list[tuple[AdapterLayer, Any]]]:
    """Plan the adapted layers of stacks. Nothing changes yet.

    Returns:
        New ones, by the module in their place now; and values for those that are there already, with `fill` to be
        written.

    Raises:
        TypeError, ValueError: as `attach`.
    """
    held: dict[str, dict[str, AdapterLayer]] = {}
    for name, layer in stacks.items():
        if problem := problem_of(layer):
            raise error(f"{name}: {problem}")
        tensors = [t for t in (layer.lora_A, layer.lora_B, layer.magnitude) if t is not None]
        if not all(bool(t.isfinite().all()) for t in tensors):
            raise error(f"{name}: it has values that are not finite")
        holder, _, key = name.rpartition(".")
        held.setdefault(holder, {})[key] = layer
    by_name = {name: module for module, names in places.items() for name in names}
    planned: dict[nn.Module, Any] = {}
    values: list[tuple[AdapterLayer, Any]] = []
    for holder, own in held.items():
        module, present = originals[holder], by_name[holder]
        if isinstance(present, modules.AdaptedLayer):
            values += [(layer, _adapted(present, f"{holder}.{key}", layer, error)) for key, layer in own.items()]
            continue
        adapted: Any = module
        for key in [key for key in module._parameters if key in own]:
            layer = own[key]
            dtype = torch.promote_types(layer.lora_A.dtype, layer.lora_B.dtype)
            adapted = adapted_stack(
                adapted, f"{holder}.{key}", layer.magnitude is not None,
                rank=layer.rank, alpha=layer.scaling * layer.rank, adapter_dtype=dtype,
            )  # fmt: skip
            fill(layer, adapted)
        planned[present] = adapted
    return planned, values


def _adapted(present: Any, name: str, layer: AdapterLayer, error: Callable[[str], ValueError]) -> Any:
    """The layer of a stack that is adapted already, if it can take the values."""
    way_out = "call remove_dora(model) first"
    adapted = present
    while isinstance(adapted, modules.LoRAExperts) and adapted.parameter != name.rpartition(".")[2]:
        adapted = adapted.base_layer
    if not isinstance(adapted, modules.LoRAExperts):
        raise ValueError(f"model: {name}: other stacks of its module are adapted, and it is not; {way_out}")
    if adapted.merged:
        raise ValueError(f"model: {name} is merged; call unmerge() first")
    dora, rank = isinstance(adapted, modules.DoRALayer), adapted.rank
    if (dora, rank) != (layer.magnitude is not None, layer.rank):
        there, came = _what(dora, rank), _what(layer.magnitude is not None, layer.rank)
        raise ValueError(f"model: {name} is adapted with {there}, the adapter is {came}; {way_out}")
    dtype = adapted.factors[0].dtype
    for tensor in (layer.lora_A, layer.lora_B, layer.magnitude):
        if tensor is not None and not bool(tensor.to(dtype).isfinite().all()):
            raise error(f"{name}: it has values that are not finite in {dtype}, the layer's")
    return adapted


def _what(dora: bool, rank: int) -> str:
    return f"{'DoRA' if dora else 'plain LoRA'} of rank {rank}"


@torch.no_grad()
def fill(layer: AdapterLayer, adapted: Any) -> None:
    """Write an adapter's values into the layer of its stack."""
    _, a, b = adapted._problem()
    a.copy_(layer.lora_A)
    b.copy_(layer.lora_B)
    if layer.magnitude is not None:
        adapted.lora_magnitude_vector.copy_(layer.magnitude)
    adapted.use_rslora, adapted.alpha = False, layer.scaling * layer.rank
    adapted.scaling = layer.scaling  # alpha / rank would round
