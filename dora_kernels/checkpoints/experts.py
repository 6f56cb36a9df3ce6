"""Adapters of experts for a model's folder, whose files hold stacks or the linear layers of each expert."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from torch import Tensor

from dora_kernels.adapters import Adapter, AdapterLayer
from dora_kernels.adapters.base_layers import BaseLayer, base_layers_of, check_fit
from dora_kernels.adapters.experts import EXPERT, PARTS, split, stacked
from dora_kernels.adapters.formats.stacks import MATRICES

_HOLDERS = ("mlp.experts", "block_sparse_moe.experts"), ("mlp.experts", "feed_forward.experts")
"""Names of the modules in transformers, and those in files where they differ."""

_TRANSPOSED = ("gpt_oss", "llama4", "llama4_text", "aria", "aria_text", "openai_privacy_filter")
"""Models whose stacks are ``[E, in, out]``."""

_ALTERNATING = ("gpt_oss",)
"""Models in whose stacks the outputs of gate and up take turns."""


def holds_stacks(checkpoint: Mapping[str, Tensor], names: Iterable[str]) -> bool:
    """True if some of an adapter's layers are those of single experts, and the checkpoint's files have stacks."""
    return bool(_stacks_of(checkpoint, names, set()))


def _stacks_of(checkpoint: Mapping[str, Tensor], names: Iterable[str], kinds: set[str]) -> dict[str, BaseLayer]:
    """The checkpoint's stacks that the layers of single experts belong to, by the adapter's names."""
    holders = {match["holder"] for name in names if (match := EXPERT.fullmatch(name))}
    found = {}
    for name in (f"{holder}.{stack}" for holder in sorted(holders) for stack in PARTS):
        key = next((key for key in _spellings(name) if key in checkpoint), None)
        if key is not None and checkpoint[key].dim() == 3:
            stored = checkpoint[key]
            mixed = name.endswith("gate_up_proj") and bool(kinds & set(_ALTERNATING))
            found[name] = BaseLayer("experts", (stored.shape[2], stored.shape[1]), stored, mixed, either_way=True)
    return found


def read_stacks_for(
    checkpoint: Mapping[str, Tensor], adapter: Adapter, kinds: set[str]
) -> tuple[Adapter, dict[str, str]]:
    """Return the adapter with its stacks as the checkpoint's files have them, and its layers' checkpoint keys.

    Args:
        kinds: the model's types, as its configuration names them.

    Raises:
        ValueError: a layer is not in the files, or has another size there.
    """
    layers: dict[str, AdapterLayer] = {}
    keys: dict[str, str] = {}
    known = _stacks_of(checkpoint, adapter.layers, kinds)
    for name, layer in stacked(adapter.layers, known, adapter.notes).items():
        if layer.kind != "experts":
            own = {name: layer}
            if name in adapter.config.get(MATRICES, ()):  # its name is the weight's own
                found = next((key for key in _spellings(name) if key in checkpoint), None)
                keys |= {} if found is None else {f"{name}.weight": found}
        elif any(key in checkpoint for key in _spellings(name)):
            keys[f"{name}.weight"] = next(key for key in _spellings(name) if key in checkpoint)
            _check_stack(name, layer, checkpoint[keys[f"{name}.weight"]])
            layers[name] = layer
            continue
        else:
            ways = [split({name: layer}, spelling) for spelling in (0, 1)]
            own = next((way for way in ways if _key(next(iter(way)), checkpoint) is not None), ways[0])
        for one, linear in own.items():
            key = keys.get(f"{one}.weight") or _key(one, checkpoint)
            if key is None:
                raise ValueError(f"adapter: {one}: the model's files have no {one}.weight, nor a stack {name}")
            keys[f"{one}.weight"], layers[one] = key, linear
    single = {name: layer for name, layer in layers.items() if layer.kind != "experts"}
    known = base_layers_of({f"{name}.weight": checkpoint[keys[f"{name}.weight"]] for name in single})
    check_fit(single, known, lambda text: ValueError(f"adapter: {text}"))
    return replace(adapter, layers=layers), keys


def _key(name: str, checkpoint: Mapping[str, Tensor]) -> str | None:
    return next((f"{one}.weight" for one in _spellings(name) if f"{one}.weight" in checkpoint), None)


def _spellings(name: str) -> Iterator[str]:
    for ours, theirs in (("", ""), *_HOLDERS):
        renamed = name.replace(ours, theirs) if ours else name
        yield renamed
        yield renamed.removeprefix("model.")
        yield f"model.{renamed}"
        yield f"language_model.{renamed}"
        yield renamed.replace("model.", "model.language_model.", 1)


def _check_stack(name: str, layer: AdapterLayer, stored: Tensor) -> None:
    count, (inputs, outputs) = layer.lora_A.shape[0], layer.features
    if tuple(stored.shape) not in ((count, outputs, inputs), (count, inputs, outputs)):
        raise ValueError(
            f"adapter: {name} belongs to {count} experts with {inputs} inputs and {outputs} outputs, the model's is "
            f"{list(stored.shape)}"
        )


def stack_transposed(layer: AdapterLayer, stored: Tensor, kinds: set[str]) -> bool:
    """True if a stack is stored as ``[E, in, out]``: by its shape, or by the kind of model if that is square."""
    inputs, outputs = layer.features
    return bool(kinds & set(_TRANSPOSED)) if inputs == outputs else tuple(stored.shape[1:]) == (inputs, outputs)
