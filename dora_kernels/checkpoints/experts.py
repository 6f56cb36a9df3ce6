"""Adapters of experts for a model's folder, whose files hold stacks or the linear layers of each expert."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from dora_kernels.adapters import Adapter, AdapterLayer
from dora_kernels.adapters.base_layers import BaseLayer, base_layers_of, check_fit
from dora_kernels.adapters.experts import EXPERT, IN_TURNS, PARTS, split, stacked, stacks_with
from dora_kernels.adapters.formats.stacks import ALTERNATING, MATRICES, settled
from dora_kernels.adapters.names import proposal
from dora_kernels.rounding import seed_for

SPLIT = "split"
"""Entry of `Adapter.config`: the stacks that layers of single experts were split from, by these layers' names."""

_SILENT = ("llama4", "llama4_text")
"""Models whose stacks are ``[E, in, out]`` without their saying so: PEFT from 0.19 on exchanges A and B."""

_TRANSPOSED = ("gpt_oss", "aria", "aria_text", "openai_privacy_filter", *_SILENT)
"""Models whose stacks are ``[E, in, out]``."""

_TRANSPOSED_IN_FILES = ("qwen3_vl_moe", "qwen3_vl_moe_text", *_TRANSPOSED)
"""Models whose stacks are that in their files."""

_ALTERNATING = ("gpt_oss",)
"""Models in whose stacks the outputs of gate and up take turns."""


def places_of(name: str) -> list[str]:
    """The names without ``.weight`` that files may have for an adapter's layer: as a stack, or as single experts'."""
    holder, _, last = name.rpartition(".")
    found = [name.removesuffix(".weight")]
    if match := EXPERT.fullmatch(name):
        found += [f"{match['holder']}.{stack}" for stack in PARTS]
    return [*found, f"{holder}.0.{PARTS[last][0][0]}"] if last in PARTS else found


def holds_stacks(checkpoint: Mapping[str, Tensor], known: Mapping[str, str], names: Iterable[str]) -> bool:
    """True if some of an adapter's layers are those of single experts, and the checkpoint's files have stacks.

    Args:
        known: the checkpoint's keys by the adapter's names for them.
    """
    return bool(_stacks_of(checkpoint, known, names, set()))


def _stacks_of(
    checkpoint: Mapping[str, Tensor], known: Mapping[str, str], names: Iterable[str], kinds: set[str]
) -> dict[str, BaseLayer]:
    """The checkpoint's stacks that the layers of single experts belong to, by the adapter's names."""
    holders = {match["holder"] for name in names if (match := EXPERT.fullmatch(name))}
    found = {}
    for name in (f"{holder}.{stack}" for holder in sorted(holders) for stack in PARTS):
        key = known.get(name)
        if key is not None and checkpoint[key].dim() == 3:
            stored = checkpoint[key]
            mixed = name.endswith("gate_up_proj") and bool(kinds & set(_ALTERNATING))
            found[name] = BaseLayer("experts", (stored.shape[2], stored.shape[1]), stored, mixed, either_way=True)
    return found


def read_stacks_for(
    checkpoint: Mapping[str, Tensor],
    known: Mapping[str, str],
    adapter: Adapter,
    kinds: set[str],
    error: Callable[[str], ValueError],
    as_files: bool,
) -> tuple[Adapter, dict[str, str]]:
    """Return the adapter with its stacks as the checkpoint's files have them, and its layers' checkpoint keys.

    Args:
        known: the checkpoint's keys by the adapter's names for them.
        kinds: the model's types, as its configuration names them.
        error: makes the error from its text.
        as_files: False leaves stacks whole where the files have single experts.

    Raises:
        ValueError: a layer is not in the files, or has another size there.
    """
    adapter = _as_the_model_has_them(adapter, kinds)
    layers: dict[str, AdapterLayer] = {}
    came_from: dict[str, str] = {}
    keys = dict(known)
    matrices = adapter.config.get(MATRICES, ())
    stacks = _stacks_of(checkpoint, known, adapter.layers, kinds)
    whole = stacked(adapter.layers, stacks, adapter.notes)
    for name, layer in whole.items():
        if layer.kind == "experts" and (key := known.get(name)) is not None:
            _check_stack(name, layer, checkpoint[key], error)
            keys[f"{name}.weight"], layers[name] = key, layer
            continue
        for one, linear in split({name: layer}).items():
            wanted = one if one in matrices else f"{one}.weight"  # a matrix's name is the weight's own
            key = known.get(wanted)
            if key is None:
                what = f"{name}: the model's files have no such stack, nor {wanted}" if one != name else (
                    f"{one}: the model's files have no {wanted}")  # fmt: skip
                raise error(f"{what}{_nearest(wanted, checkpoint)}")
            keys[f"{one}.weight"], layers[one] = key, linear
            if layer.kind == "experts":
                came_from[one] = name
    single = {name: layer for name, layer in layers.items() if layer.kind != "experts"}
    base_layers = base_layers_of({f"{name}.weight": checkpoint[keys[f"{name}.weight"]] for name in single})
    check_fit(single, base_layers, error)
    config = adapter.config | {SPLIT: came_from}
    if kinds:
        mixed = kinds & set(_ALTERNATING)
        config[ALTERNATING] = [name for name in whole if name.endswith(".gate_up_proj")] if mixed else []
    return replace(adapter, layers=layers if as_files else whole, config=config), keys


def check_whole(layers: Iterable[str], known: Iterable[str], error: Callable[[str], ValueError]) -> None:
    """Raise ``error(text)`` if layers of single experts lack some of the experts in the files (`known`)."""
    adapted: dict[tuple[str, str], set[str]] = {}
    for match in filter(None, map(EXPERT.fullmatch, layers)):
        if not stacks_with(match) or not match["holder"].endswith("experts"):
            continue
        adapted.setdefault((match["holder"], match["part"]), set()).add(match["expert"])
    for match in filter(None, (EXPERT.fullmatch(key.removesuffix(".weight")) for key in known)):
        if match["expert"] not in adapted.get((match["holder"], match["part"]), {match["expert"]}):
            raise error(
                f"{match['holder']}: the file has no {match['expert']}.{match['part']}; experts are adapted all or not "
                "at all"
            )


def check_halves(stacks: Iterable[str], kinds: set[str], error: Callable[[str], ValueError]) -> None:
    """Raise ``error(text)`` if single experts were stacked for a model in which gate and up take turns."""
    mixed = next((name for name in stacks if name.endswith("gate_up_proj") and kinds & set(_ALTERNATING)), None)
    if mixed is not None:
        raise error(f"{mixed}: {IN_TURNS}")


def seed_and_place(adapter: Adapter, name: str, seed: int) -> tuple[int, int]:
    """A layer's seed for stochastic rounding, and how many parts of its stack lie above it: as in a loaded model."""
    stack = adapter.config.get(SPLIT, {}).get(name)
    match = EXPERT.fullmatch(name)
    if stack is None or match is None:
        return seed_for(seed, name), 0
    parts = PARTS[stack.rpartition(".")[2]][0]
    return seed_for(seed_for(seed, stack), match["expert"]), parts.index(match["part"])


def _nearest(wanted: str, keys: Iterable[str]) -> str:
    """The end of the sentence about a missing weight: the nearest in the files, or nothing."""
    weights = (key for key in keys if key.rpartition(".")[2] in ("weight", *PARTS))
    return proposal(wanted.removesuffix(".weight"), [key.removesuffix(".weight") for key in weights])


def _as_the_model_has_them(adapter: Adapter, kinds: set[str]) -> Adapter:
    """The adapter with A and B of its stacks as a model of these kinds has them (`settled`)."""
    if not kinds & set(_TRANSPOSED):
        return adapter
    base = BaseLayer("experts", (0, 0), torch.empty(0), transposed=True, exchanged=bool(kinds & set(_SILENT)))
    return settled(adapter, dict.fromkeys(adapter.layers, base))


def _check_stack(name: str, layer: AdapterLayer, stored: Tensor, error: Callable[[str], ValueError]) -> None:
    count, (inputs, outputs) = layer.lora_A.shape[0], layer.features
    if tuple(stored.shape) not in ((count, outputs, inputs), (count, inputs, outputs)):
        raise error(
            f"{name} belongs to {count} experts with {inputs} inputs and {outputs} outputs, the model's is "
            f"{list(stored.shape)}"
        )


def stack_transposed(layer: AdapterLayer, stored: Tensor, kinds: set[str]) -> bool:
    """True if a stack is stored as ``[E, in, out]``: by its shape, or by the kind of model if that is square."""
    inputs, outputs = layer.features
    if inputs == outputs:
        return bool(kinds & set(_TRANSPOSED_IN_FILES))
    return tuple(stored.shape[1:]) == (inputs, outputs)
