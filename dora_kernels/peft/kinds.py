"""Map PEFT's layer classes to the patched ones, patch and restore layers, and tell whether a layer's calls run here.

A layer is patched by changing its ``__class__`` to a subclass of PEFT's, so state dicts, deepcopy, pickle and
isinstance work as before.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from peft.tuners import lora
from peft.tuners.lora.dora import DoraLinearLayer
from peft.utils.other import _freeze_adapter
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dora_kernels.peft import (
    calls,
    conv,
    embedding,
    experts,
    fast_path,
    gptq,
    linear,
    quantized,
    shards,
    tensor_parallel,
)
from dora_kernels.peft.combine import COMBINATIONS, combine
from dora_kernels.peft.config import follow_configs
from dora_kernels.peft.layer import DoraLayer
from dora_kernels.peft.magnitude import DoraMagnitude
from dora_kernels.peft.registered import RegisteredLinearVariant
from dora_kernels.peft.state import SWITCH, Options, Switch, dora_adapters, hooked, norm_cache, switch

logger = logging.getLogger("dora_kernels")


class Kind(NamedTuple):
    """One of PEFT's classes, its patched class, and the check that tells why a layer cannot be patched."""

    patched: Any
    unsupported: Callable[[Any], str | None]


_KINDS: dict[Any, Kind] = {
    lora.Linear: Kind(linear.DoraLinear, linear.unsupported),
    lora.Embedding: Kind(embedding.DoraEmbedding, embedding.unsupported),
    conv.DoraConv1d.stock: Kind(conv.DoraConv1d, conv.unsupported),
    conv.DoraConv2d.stock: Kind(conv.DoraConv2d, conv.unsupported),
    conv.DoraConv3d.stock: Kind(conv.DoraConv3d, conv.unsupported),
    experts.ParamWrapper.stock: Kind(experts.ParamWrapper, experts.unsupported),
}


def _kind(stock: type) -> Kind | None:
    kind = _KINDS.get(stock)
    patched = None if kind is not None else quantized.patched_class(stock) or gptq.patched_class(stock)
    if patched is not None:
        kind = _KINDS[stock] = Kind(patched, lambda layer: None)
    return kind


def runs_here(layer: Any) -> bool:
    """True for a LoRA layer of which a patch takes the calls: one with a DoRA adapter, or any on a parameter."""
    return isinstance(layer, lora.LoraLayer) and (bool(dora_adapters(layer)) or isinstance(layer, experts.STOCK))


def _is_registered(layer: Any) -> bool:
    """True for PEFT's own linear layer with a variant that PEFT asks for the whole output."""
    variants = layer.lora_variant.values() if type(layer) is lora.Linear else ()
    return any(isinstance(variant, RegisteredLinearVariant) for variant in variants)


def _is_ours(layer: Any) -> bool:
    """True if the layer's class was made here, not derived from such a class by somebody else."""
    kind = _kind(layer.stock) if isinstance(layer, DoraLayer) else None
    return kind is not None and kind.patched is type(layer)


class LoraModel(lora.LoraModel):
    """PEFT's LoRA tuner. It also patches the layers that a later adapter creates."""

    def inject_adapter(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        """Inject the adapter as PEFT does, then patch."""
        tensor_parallel.check_targets(self, model, *args, **kwargs)
        with tensor_parallel.whole_parameters():
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
        """PEFT's method for plain LoRA; with DoRA adapters, the sum of what they add to the weights (`combine`).

        ``combination_type`` is "cat" (exact; its rank is the sum of the ranks), "svd" (rank `svd_rank`, or the largest
        rank) or "linear" (the common rank). The new adapter is a DoRA adapter with a scaling of 1.

        Raises:
            ValueError: another combination type; not one weight per adapter; adapters that do not exist or are merged;
                or weights that cannot be read. The model is unchanged then.
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
                raise ValueError(f"{name}: {layer.merged_adapters} are merged; call unmerge_adapter() first")
            if shards.split_of(layer) is not None or getattr(switch(layer), "group", None) is not None:
                raise ValueError(f"{name}: the layer is split over processes; add up its adapters in one process")
        with _unnamed_parameters(self.peft_config[name] for name in adapters if name in self.peft_config):
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
            "combined %d adapters of %d layers into %r, rank %d; at most %.1e of an update is lost, in %s",
            len(adapters), len(errors), adapter_name, rank, errors[worst], worst,
        )  # fmt: skip

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        """PEFT's method, without keeping unmerged weights, since no layer is left to unmerge."""
        with _keeping_nothing(self.model):
            return super()._unload_and_optionally_merge(*args, **kwargs)


@contextmanager
def _unnamed_parameters(configs: Iterable[Any]) -> Iterator[None]:
    """Hide the targeted parameters from PEFT, which cannot add up their adapters."""
    hidden = [(config, config.target_parameters) for config in configs if getattr(config, "target_parameters", None)]
    for config, _ in hidden:
        config.target_parameters = None
    try:
        yield
    finally:
        for config, names in hidden:
            config.target_parameters = names


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


def patch_layers(model: nn.Module, options: Options | None = None, *, exchange_linear: bool = True) -> None:
    """Patch every layer of `model` that can be patched, with or without DoRA adapters, since one may be added later.

    Args:
        options: also set on layers that are patched already. None: new layers take the options of those.
        exchange_linear: False leaves linear layers with a registered variant (`registered`) their class.
    """
    layer: Any
    known = [state for layer in model.modules() if (state := switch(layer)) is not None]
    if options is not None:
        for state in known:
            state.options = options
            for cache in state.values():
                cache.merges, cache.merged = options.forward == "merged", None
    elif known:
        options = known[0].options
    tensor_parallel.prepare(model)
    for name, layer in model.named_modules():
        kind = _kind(type(layer))
        stays = not exchange_linear and _is_registered(layer)
        if kind is not None and unsupported(layer) is None and not stays:
            layer.__class__ = kind.patched
        if not (_is_ours(layer) or (stays and unsupported(layer) is None)):
            continue
        for magnitude in _magnitudes(layer, DoraLinearLayer):
            magnitude.__class__ = DoraMagnitude
        if SWITCH not in vars(layer):
            for adapter, variant in layer.lora_variant.items() if not stays else ():
                layer.lora_variant[adapter] = layer.patched_variant(variant)
            setattr(layer, SWITCH, Switch(options))
            if isinstance(layer, experts.ParamWrapper):
                for adapter in layer.lora_A:
                    layer.agree(adapter)
        vars(layer)[SWITCH].name = name
        for adapter in dora_adapters(layer):
            # Create the cache before a compiler traces the layer.
            norm_cache(layer, adapter).move(layer.lora_magnitude_vector[adapter].weight.device)
    fast_path.avoid(model)


def _magnitudes(layer: Any, kind: type) -> list[Any]:
    """The layer's magnitude modules of exactly that class, inside any wrapper."""
    vectors = getattr(layer, "lora_magnitude_vector", None)  # not before the first adapter
    return [] if vectors is None else [module for module in vectors.modules() if type(module) is kind]


def restore_layers(model: nn.Module) -> None:
    """Undo `patch_layers`.

    Merged layers are unmerged first: without the kept weight and the strengths, PEFT alone might not unmerge exactly.
    Layers for which PEFT has no DoRA can be restored only if they have no DoRA adapter.
    """
    layer: Any
    shards.undo_mend(model)
    fast_path.permit(model)
    for layer in model.modules():
        if dora_adapters(layer) and isinstance(layer, gptq.DoraRefused | experts.ParamWrapper):
            continue
        if switch(layer) is not None and layer.merged_adapters:
            layer.unmerge()
        if isinstance(layer, DoraLayer) or _is_registered(layer):
            if _is_ours(layer):  # a class that FSDP2 derived from it stays, with the switch off
                layer.__class__ = layer.stock
            for name, variant in layer.lora_variant.items():
                layer.lora_variant[name] = DoraLayer.restored_variant(variant)
            for magnitude in _magnitudes(layer, DoraMagnitude):
                magnitude.__class__ = DoraLinearLayer
            layer.__dict__.pop(SWITCH, None)


def unsupported(layer: Any) -> str | None:
    """Return the reason why `layer`, one of PEFT's LoRA layers, cannot be patched, or None if it can."""
    kind = _kind(layer.stock if isinstance(layer, DoraLayer) else type(layer))
    if kind is None:
        return f"{type(layer).__module__}.{type(layer).__name__}: this kind of LoRA layer is not supported"
    reason = kind.unsupported(layer)
    if reason is None and switch(layer) is None and "forward" in vars(layer):
        return "its forward was replaced (by a hook of accelerate, for example); patch before that"
    return reason


def _obstacle(layer: Any) -> str:
    """Return what stands in the way of reading the tensors of the layer's DoRA adapters."""
    base = layer.base_layer
    for name in dora_adapters(layer):
        if isinstance(layer.scaling[name], Tensor):
            return f"the scaling of adapter {name!r} is a tensor"
        parts = {"base_layer": base}
        for part in ("lora_A", "lora_B", "lora_magnitude_vector"):
            holder = getattr(layer, part, None) or {}
            if name in holder:
                parts[f"{part}.{name}"] = holder[name]
        for part, module in parts.items():
            if parametrize.is_parametrized(module):
                return f"{part} is parametrized"
            weight = module._parameters.get("weight") if isinstance(module, nn.Module) else None
            if weight is None:
                continue
            if weight.is_meta:
                return f"{part}.weight is on the meta device (offloaded, or not loaded yet)"
            if type(weight) not in (nn.Parameter, Tensor):
                return f"{part}.weight is a {type(weight).__name__}"
            if weight.numel() == 0 or not weight.data_ptr():
                return f"{part}.weight has no memory now (sharded by FSDP or ZeRO-3)"
        if hooked(parts.get(f"lora_magnitude_vector.{name}", base)):
            return f"the magnitude of adapter {name!r} has a hook, or a forward of its own"
    kinds = ", ".join(f"{part} is a {type(module).__name__}" for part, module in parts.items())
    return f"its modules are not PEFT's own, their shapes or devices differ, or a wrapper shards them; {kinds}"


def out_of_reach(layer: Any) -> str | None:
    """Return the reason why the calls of `layer` currently do not run on this package, or None if they do."""
    reason = unsupported(layer)
    if reason is not None:
        return reason
    if switch(layer) is None:
        return "not patched: restored, or made after the patch"
    found = [(name, layer.lora_variant.get(name)) for name in dora_adapters(layer)]
    if found and all(not hasattr(variant, "read") or variant.read(layer, name) is None for name, variant in found):
        return f"its weights cannot be read outside their modules' calls: {_obstacle(layer)}"
    return calls.REASON if calls.bypassed(layer) else None
