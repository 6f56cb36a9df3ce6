"""Map names in files, with prefixes or underscores for dots, to the model's names."""

from __future__ import annotations

import difflib
import functools
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator

from dora_kernels.adapters.adapter import Adapter, AdapterLayer
from dora_kernels.adapters.components import components_of, is_component, prefix_of, spellings
from dora_kernels.core.shown import listed, shown

UNDERSCORED = "underscored"
"""Entry of `Adapter.config`: the names are still the file's, with underscores for dots."""

COMPONENTS = "components"
"""Entry of `Adapter.config`: the names start with the pipeline's name of their model."""

PREFIX = "prefix"
"""Entry of `Adapter.config`: the prefix of the file's names, if all have the same."""

# Vision-language models. Their files keep the names from before transformers 4.52 (conversion_mapping.py). Old and new:
_TOWERS = "vision_tower|multi_modal_projector|image_newline"
_RENAMED = (
    # LLaVA and related models
    ((r"language_model\.model\.", "model.language_model."), (r"language_model\.lm_head\.", "lm_head."),
     (r"vision_tower\.vision_model\.", "model.vision_tower."), (rf"({_TOWERS})\b", r"model.\1")),
    ((r"language_model\.model\.", "model.language_model."), (r"language_model\.lm_head\.", "lm_head."),
     (rf"({_TOWERS})\b", r"model.\1")),
    # Qwen2-VL and related models
    ((r"model\.(?!language_model\.|visual\.)", "model.language_model."), (r"visual\.", "model.visual.")),
    # the reverse, for older adapters
    ((r"model\.language_model\.", "language_model.model."), (r"lm_head\.", "language_model.lm_head."),
     (rf"model\.({_TOWERS})\b", r"\1")),
    ((r"model\.language_model\.", "model."), (r"model\.visual\.", "visual.")),
)  # fmt: skip

# Vision transformers. Their files keep the names from before transformers 5 (conversion_mapping.py). Old and new:
_ATTENTION = (
    (r"attention\.(?:attention|self)\.query\.", "attention.q_proj."),
    (r"attention\.(?:attention|self)\.key\.", "attention.k_proj."),
    (r"attention\.(?:attention|self)\.value\.", "attention.v_proj."),
    (r"attention\.output\.dense\.", "attention.o_proj."),
)
_SUBSTITUTED = (
    # ViT, DeiT, BEiT
    ((r"encoder\.layer\.", "layers."), *_ATTENTION, (r"intermediate\.dense\.", "mlp.fc1."),
     (r"output\.dense\.", "mlp.fc2.")),
    # DINOv2
    _ATTENTION,
    # SegFormer
    ((r"encoder\.patch_embeddings\.(\d+)\.", r"stages.\1.patch_embeddings."),
     (r"encoder\.block\.(\d+)\.", r"stages.\1.blocks."), (r"encoder\.layer_norm\.(\d+)\.", r"stages.\1.layer_norm."),
     (r"attention\.self\.sr\.", "attention.sequence_reduction.sequence_reduction."), *_ATTENTION,
     (r"mlp\.dense(\d)\.", r"mlp.fc\1.")),
)  # fmt: skip

# For a longer name, or a model with more layers, no similar name is proposed.
_LONGEST, _MOST = 200, 500


def _changed(rules: tuple[tuple[str, str], ...], key: str) -> str:
    """Rename a key by the first rule that matches its start."""
    for pattern, new in rules:
        if match := re.match(pattern, key):
            return match.expand(new) + key[match.end() :]
    return key


def _substituted(rules: tuple[tuple[str, str], ...], key: str) -> str:
    """Rename a key by all rules."""
    for pattern, new in rules:
        key = re.sub(pattern, new, key)
    return key


RENAMINGS: tuple[Callable[[str], str], ...] = (
    *(functools.partial(_changed, rules) for rules in _RENAMED),
    *(functools.partial(_substituted, rules) for rules in _SUBSTITUTED),
)
"""Renamings of a model's keys from one release of transformers to another."""


def check_prefix(prefix: object) -> str:
    """Return `prefix` without a trailing underscore or dot.

    Raises TypeError or ValueError if no name can start with it.
    """
    if not isinstance(prefix, str):
        raise TypeError(f"prefix: expected a str, got {type(prefix).__name__}")
    if not prefix.strip("_.") or ("." in prefix.rstrip(".") and not is_component(prefix_of(f"{prefix}."))):
        raise ValueError(f"prefix: expected one such as 'lora_te1' or 'text_encoder', got {prefix!r}")
    return prefix[:-1] if prefix[-1] in "._" else prefix


def readings(name: str, requested: str = "") -> Iterator[str]:
    """Yield the model names that a file's name may stand for; in a pipeline, ``<component>.<name>``."""
    yield name
    prefix = prefix_of(name, requested)
    rest = name[len(prefix) + 1 :] if prefix else name
    for spelling in spellings(prefix, rest):
        yield spelling
        for component in components_of(prefix):
            yield f"{component}.{spelling}"


def resolve(
    names: Collection[str],
    known: Collection[str],
    error: Callable[[str], ValueError],
    notes: list[str],
    requested: str = "",
) -> dict[str, str]:
    """Map each of a file's names to the model's name (one of `known`) that it stands for.

    A file may hold layers of several models, distinguished by the prefix (``lora_unet``, ``lora_te1``, ``unet``). If
    all layers with one prefix are the model's, prefixes without any layer of the model are left out, with a note.

    Args:
        requested: a prefix that the names may have.

    Raises:
        ValueError: a name stands for no layer of the model or for several, or two names stand for the same.
    """
    candidates: dict[str, list[str]] = defaultdict(list)
    for name in known:
        candidates[name.replace(".", "_")].append(name)
    found: dict[str, str] = {}
    came: dict[str, str] = {}
    missing: dict[str, list[str]] = defaultdict(list)
    for name in names:
        ways = list(readings(name, requested))
        meant = {way for way in ways if "." in name and way in known}  # then no dot was lost
        meant = meant or {each for way in ways for each in candidates[way.replace(".", "_")]}
        if not meant:
            missing[prefix_of(name, requested)].append(name)
            continue
        if len(meant) > 1:
            raise error(f"{name} may stand for any of {shown(', '.join(sorted(meant)), 1000)}")
        own = meant.pop()
        if own in came:
            raise error(f"{came[own]} and {name} both stand for {own}; pass prefix= to read only one model's layers")
        found[name], came[own] = own, name
    hits = {prefix_of(name, requested) for name in found}
    for prefix, others in missing.items():
        if prefix in hits or not hits or not is_component(prefix):
            rest = others[0][len(prefix) + 1 :] if prefix else others[0]
            raise error(f"{others[0]}: the model has no such layer{proposal(rest, known)}")
        notes.append(f"{len(others)} layers with the prefix {prefix} belong to another model and are left out")
    return found


def respelled(names: Collection[str], known: Collection[str]) -> dict[str, str]:
    """Return the names in the spelling with which the model has them all; unchanged if there is none."""
    for way in (_with_text_model, _without_text_model, *RENAMINGS):
        found = {name: way(f"{name}.weight").removesuffix(".weight") for name in names}
        if len(set(found.values())) == len(found) and all(own in known for own in found.values()):
            return found
    return {name: name for name in names}


def _with_text_model(key: str) -> str:
    return f"text_model.{key}"


def _without_text_model(key: str) -> str:
    return key.removeprefix("text_model.")


def own_layers(
    adapter: Adapter, known: Collection[str], error: Callable[[str], ValueError], notes: list[str]
) -> dict[str, AdapterLayer]:
    """Return an adapter's layers by a model's names; `known` are all of these.

    Raises:
        ValueError: as `resolve`.
    """
    if adapter.config.get(UNDERSCORED) or adapter.config.get(COMPONENTS):
        names = resolve(adapter.layers, known, error, notes, adapter.config.get(PREFIX, ""))
    elif all(name in known for name in adapter.layers):
        return adapter.layers
    else:
        names = respelled(adapter.layers, known)
    return {own: adapter.layers[name] for name, own in names.items()}


def proposal(name: str, known: Collection[str]) -> str:
    """The end of the sentence about a missing layer: the nearest existing name and the differing prefix, or nothing."""
    if len(name) > _LONGEST or not known:
        return ""
    flat = name.replace(".", "_")
    for own in known:
        short, long = sorted((flat, own.replace(".", "_")), key=len)
        if long.endswith(f"_{short}") and short.count("_") > 1:
            more = long[: -len(short)]
            with_it, without = ("model", "adapter") if len(own) > len(flat) else ("adapter", "model")
            start = (own if with_it == "model" else name)[: len(more)]
            return f"; it has {own}: the {with_it}'s names start with {start!r}, the {without}'s do not"
    last = name.rpartition(".")[2]
    alike = [own for own in known if own.rpartition(".")[2] == last or flat.endswith(own.rpartition(".")[2])]
    alike = [own for own in alike or known if len(own) <= _LONGEST][:_MOST]
    best = difflib.get_close_matches(flat, [own.replace(".", "_") for own in alike], 1, 0.5)
    near = next((own for own in alike if best and own.replace(".", "_") == best[0]), None)
    return f"; the nearest is {near}" if near else f"; it has {listed(sorted(known), 2)}"
