"""Adapters of experts for a model's folder, whose files hold stacks or the linear layers of each expert."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import Tensor

from dora_kernels.adapters import Adapter, AdapterLayer
from dora_kernels.adapters.base_layers import base_layers_of, check_fit
from dora_kernels.adapters.experts import split

_HOLDERS = ("mlp.experts", "block_sparse_moe.experts"), ("mlp.experts", "feed_forward.experts")
"""Names of the modules in transformers, and those in files where they differ."""

_TRANSPOSED = ("gpt_oss", "llama4", "llama4_text", "aria", "aria_text", "openai_privacy_filter")
"""Models whose stacks are ``[E, in, out]``."""


def read_stacks_for(checkpoint: Mapping[str, Tensor], adapter: Adapter) -> tuple[Adapter, dict[str, str]]:
    """Return the adapter with its stacks as the checkpoint's files have them, and its layers' checkpoint keys.

    Raises:
        ValueError: a layer is not in the files, or has another size there.
    """
    layers: dict[str, AdapterLayer] = {}
    keys: dict[str, str] = {}
    for name, layer in adapter.layers.items():
        if layer.kind != "experts":
            own = {name: layer}
        elif any(key in checkpoint for key in _spellings(name)):
            keys[f"{name}.weight"] = next(key for key in _spellings(name) if key in checkpoint)
            _check_stack(name, layer, checkpoint[keys[f"{name}.weight"]])
            layers[name] = layer
            continue
        else:
            ways = [split({name: layer}, spelling) for spelling in (0, 1)]
            own = next((way for way in ways if _key(next(iter(way)), checkpoint) is not None), ways[0])
        for one, linear in own.items():
            key = _key(one, checkpoint)
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


def of_expert(layer: AdapterLayer, expert: int) -> AdapterLayer:
    """One expert's adapter, a linear layer's."""
    m = None if layer.magnitude is None else layer.magnitude[expert]
    return replace(layer, kind="linear", lora_A=layer.lora_A[expert], lora_B=layer.lora_B[expert], magnitude=m)
