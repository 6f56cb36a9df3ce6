"""Which of PEFT's layers are patched with what, and whether a layer's calls run on this package.

The classes here are subclasses of PEFT's, exchanged through ``__class__``, so that state dicts, deepcopy, pickle and
isinstance are untouched.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from peft.tuners import lora
from peft.tuners.lora.dora import DoraLinearLayer
from peft.utils.other import _freeze_adapter
from torch import nn

from dora_kernels.peft import conv, embedding, gptq, linear, quantized
from dora_kernels.peft.combine import COMBINATIONS, combine
from dora_kernels.peft.config import follow_configs
from dora_kernels.peft.layer import DoraLayer
from dora_kernels.peft.state import SWITCH, Options, Switch, dora_adapters, norm_cache, switch

logger = logging.getLogger("dora_kernels")


class Kind(NamedTuple):
    """What takes the place of a class of PEFT's, and why it may not."""

    patched: Any
    unsupported: Callable[[Any], str | None]


_KINDS: dict[Any, Kind] = {
    lora.Linear: Kind(linear.DoraLinear, linear.unsupported),
    lora.Embedding: Kind(embedding.DoraEmbedding, embedding.unsupported),
    conv.DoraConv1d.stock: Kind(conv.DoraConv1d, conv.unsupported),
    conv.DoraConv2d.stock: Kind(conv.DoraConv2d, conv.unsupported),
    conv.DoraConv3d.stock: Kind(conv.DoraConv3d, conv.unsupported),
}


def _kind(stock: type) -> Kind | None:
    kind = _KINDS.get(stock)
    patched = None if kind is not None else quantized.patched_class(stock) or gptq.patched_class(stock)
    if patched is not None:
        kind = _KINDS[stock] = Kind(patched, lambda layer: None)
    return kind


def _is_ours(layer: Any) -> bool:
    """Whether it is of a class made here, not of one that somebody derived from it."""
    kind = _kind(layer.stock) if isinstance(layer, DoraLayer) else None
    return kind is not None and kind.patched is type(layer)


class LoraModel(lora.LoraModel):
    """PEFT's LoRA tuner; layers that a later adapter creates are patched as well."""

    def inject_adapter(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        """PEFT's injection, then the patch."""
        super().inject_adapter(model, *args, **kwargs)
        patch_layers(model)
        follow_configs(model, self.peft_config)

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        **kwargs: Any,
    ) -> None:
        """PEFT's for plain LoRA; with DoRA among them the sum of what the adapters add to the weights (`combine`).

        ``combination_type``: "cat", exact, of the sum of the ranks; "svd", of `svd_rank` or the largest rank; "linear",
        of the common rank. The new adapter is a DoRA adapter, with a scaling of 1.

        Raises:
            ValueError: another combination, weights that are not one number an adapter, adapters that are not there or
                merged, or weights that cannot be read. The model is as it was.
        """
        known = [name for name in adapters if name in self.peft_config and self.peft_config[name].use_dora]
        if not known or not any(switch(module) is not None for module in self.model.modules()):
            super().add_weighted_adapter(
                adapters, weights, adapter_name, combination_type=combination_type, svd_rank=svd_rank, **kwargs
            )
            return
        if adapter_name in self.peft_config:
            return
        if len(weights) != len(adapters):
            raise ValueError(f"weights: expected {len(adapters)}, one for each adapter, got {len(weights)}")
        if combination_type not in COMBINATIONS:
            expected = ", ".join(repr(one) for one in COMBINATIONS)
            raise ValueError(f"combination_type: expected {expected} for DoRA adapters, got {combination_type!r}")
        layers = {name: layer for name, layer in self.model.named_modules() if isinstance(layer, lora.LoraLayer)}
        for name, layer in layers.items():
            if layer.merged_adapters:
                raise ValueError(f"{name}: {layer.merged_adapters} are merged; call unmerge_adapter() before")
        _, rank, target_modules = self._check_add_weighted_adapter(adapters, combination_type, svd_rank)
        self.peft_config[adapter_name] = dataclasses.replace(
            self.peft_config[known[0]],
            r=rank, lora_alpha=rank, target_modules=target_modules, alpha_pattern={}, rank_pattern={}, use_rslora=False,
        )  # fmt: skip
        try:
            self.inject_adapter(self.model, adapter_name)
            _freeze_adapter(self.model, adapter_name)
            errors = {
                name: combine(layer, name, adapters, weights, adapter_name)
                for name, layer in self.model.named_modules()
                if isinstance(layer, lora.LoraLayer) and adapter_name in layer.scaling
            }
        except BaseException:
            self.delete_adapter(adapter_name)
            raise
        worst = max(errors, key=lambda name: errors[name])
        logger.info(
            "combined %d adapters of %d layers into %r, rank %d; of an update is lost at most %.1e, in %s",
            len(adapters), len(errors), adapter_name, rank, errors[worst], worst,
        )  # fmt: skip

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        """PEFT's; no unmerged weight is kept, for there is nothing left to unmerge."""
        with _keeping_nothing(self.model):
            return super()._unload_and_optionally_merge(*args, **kwargs)


@contextmanager
def _keeping_nothing(model: nn.Module) -> Iterator[None]:
    states = [state for layer in model.modules() if (state := switch(layer)) is not None]
    options = [state.options for state in states]
    for state in states:
        state.options = state.options._replace(keep_unmerged=False)
    try:
        yield
    finally:
        for state, before in zip(states, options, strict=True):
            state.options = before


def patch_layers(model: nn.Module, options: Options | None = None) -> None:
    """Patch every layer of `model` that can be, DoRA adapters or not: one may be added later.

    `options` are set on those that are patched already too; without any the new ones take what these have.
    """
    layer: Any
    known = [state for layer in model.modules() if (state := switch(layer)) is not None]
    if options is not None:
        for state in known:
            state.options = options
    elif known:
        options = known[0].options
    for layer in model.modules():
        kind = _kind(type(layer))
        if kind is not None and unsupported(layer) is None:
            layer.__class__ = kind.patched
        if not _is_ours(layer):
            continue
        for magnitude in _magnitudes(layer, DoraLinearLayer):
            magnitude.__class__ = linear.DoraMagnitude
        if SWITCH not in vars(layer):
            for name, variant in layer.lora_variant.items():
                layer.lora_variant[name] = layer.patched_variant(variant)
            setattr(layer, SWITCH, Switch(options))
        for name in dora_adapters(layer):
            # There before a compiler traces the layer.
            norm_cache(layer, name).move(layer.lora_magnitude_vector[name].weight.device)


def _magnitudes(layer: Any, kind: type) -> list[Any]:
    """Its modules of magnitudes of just that class, within whatever wrapper."""
    vectors = getattr(layer, "lora_magnitude_vector", None)  # before there is one
    return [] if vectors is None else [module for module in vectors.modules() if type(module) is kind]


def restore_layers(model: nn.Module) -> None:
    """Undo `patch_layers`; of what PEFT has no DoRA for, all that can be undone is a layer without such an adapter.

    What is merged is unmerged: PEFT alone might not get there, without the copy and the strengths.
    """
    layer: Any
    for layer in model.modules():
        if dora_adapters(layer) and isinstance(layer, gptq.DoraRefused):
            continue
        if switch(layer) is not None and layer.merged_adapters:
            layer.unmerge()
        if isinstance(layer, DoraLayer):
            if _is_ours(layer):  # a class that FSDP2 derived from it stays, with the switch off
                layer.__class__ = layer.stock
            for name, variant in layer.lora_variant.items():
                layer.lora_variant[name] = DoraLayer.restored_variant(variant)
            for magnitude in _magnitudes(layer, linear.DoraMagnitude):
                magnitude.__class__ = DoraLinearLayer
            layer.__dict__.pop(SWITCH, None)


def unsupported(layer: Any) -> str | None:
    """Why `layer`, one of PEFT's LoRA layers, cannot be patched; None where it can."""
    kind = _kind(layer.stock if isinstance(layer, DoraLayer) else type(layer))
    if kind is None:
        return f"{type(layer).__module__}.{type(layer).__name__}: this kind of LoRA layer is not supported"
    reason = kind.unsupported(layer)
    if reason is None and not isinstance(layer, DoraLayer) and "forward" in vars(layer):
        return "it has a forward of its own (a hook of accelerate, for example): patch before that is installed"
    return reason


def out_of_reach(layer: Any) -> str | None:
    """Why the calls of `layer` do not run on this package as things stand; None where they do."""
    reason = unsupported(layer)
    if reason is not None:
        return reason
    if switch(layer) is None:
        return "not patched: restored, or made after the patch"
    variants = [(name, layer.lora_variant.get(name)) for name in dora_adapters(layer)]
    if all(not hasattr(variant, "read") or variant.read(layer, name) is None for name, variant in variants):
        return (
            "its weights cannot be read outside their modules' calls (parametrized, wrapped, sharded, offloaded, "
            "on meta, a hook on the magnitude), or its scaling is a tensor"
        )
    return None
