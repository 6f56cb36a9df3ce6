"""Shared by all kinds of patched layers: how their variants are read, merging, unmerging, mixed batches."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor

from dora_kernels.core.problem import Weights
from dora_kernels.engine.model_norms import KeptNorm
from dora_kernels.peft import mixed
from dora_kernels.peft.merging import Unmerged, add_plain, merged_rows, unmerged_rows
from dora_kernels.peft.shards import agreed, form_of, like, part, split_of, write
from dora_kernels.peft.state import (
    active_dropout,
    divisor,
    dora_adapters,
    forget_norms,
    interpolated,
    norm_cache,
    scale,
    settings,
    strength,
    switch,
)

NormSource = tuple[Weights, "Callable[[], Tensor] | None"]


class DoraVariant:
    """PEFT's DoRA variant for one kind of layer, on this package. It is mixed in before PEFT's own, `stock`."""

    stock: ClassVar[Any]
    starts_exact: ClassVar[bool] = False
    """True if the first magnitude is this package's, the norm in float32."""
    by_slots: ClassVar[bool] = False
    """True if it is a linear layer's, so that batches of several adapters may run by slots."""

    @staticmethod
    def read(layer: Any, adapter: str) -> Weights | None:
        """Return the adapter as a linear problem, or None if its tensors cannot be read."""
        raise NotImplementedError

    @staticmethod
    def rows(layer: Any, weight: Tensor) -> Tensor:
        """Return the base weight, or a tensor of its shape, as ``[N, K]``: a view."""
        raise NotImplementedError

    @classmethod
    def norm_source(cls, layer: Any, adapter: str, weights: Weights) -> NormSource:
        """Return the tensors that the norm depends on.

        The function computes it if it is not that of the linear problem.
        """
        return weights, None

    @classmethod
    def divisor(cls, layer: Any, adapter: str, weights: Weights) -> Tensor:
        """Return the divisor of the magnitude."""
        return divisor(layer, adapter, *cls.norm_source(layer, adapter, weights))

    @classmethod
    def scale(cls, layer: Any, adapter: str, weights: Weights) -> Tensor:
        """Return ``g`` as a differentiable vector."""
        assert weights.magnitude is not None
        return scale(layer, adapter, weights.magnitude, cls.divisor(layer, adapter, weights))

    @classmethod
    def pefts_forward(cls, module: Any, adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """Run PEFT's modules, with this package's options, for an adapter whose tensors cannot be read."""
        state = settings(module)
        state.by_modules = True
        if state.options.dropout == "peft" or not active_dropout(module, adapter):
            dora = cls.stock.forward(module, active_adapter=adapter, x=x, result=result, **kwargs)
        else:
            dora = result + module.lora_magnitude_vector[adapter](
                module.lora_dropout[adapter](x), lora_A=module.lora_A[adapter], lora_B=module.lora_B[adapter],
                scaling=module.scaling[adapter], base_layer=module.get_base_layer(), base_result=result,
            )  # fmt: skip
        return interpolated(module, adapter, result, dora)

    @classmethod
    def merge_safe(cls, module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Return the merged weight."""
        merged = cls._merged(module, active_adapter, orig_weight)
        if merged is None:
            merged = cls.stock.merge_safe(module, active_adapter, orig_weight)
        elif split_of(module) is not None:
            if not agreed(module.get_base_layer(), bool(part(merged).isfinite().all())):
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {active_adapter} seems to be broken"
                )
            merged = write(module.get_base_layer().weight, merged)
        return merged

    @classmethod
    def merge_unsafe(cls, module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        """Write the merged weight into `orig_weight`."""
        merged = cls._merged(module, active_adapter, orig_weight)
        if merged is None:
            cls.stock.merge_unsafe(module, active_adapter, orig_weight)
        else:
            orig_weight.data = write(orig_weight, merged)

    @classmethod
    @torch.no_grad()
    def _merged(cls, layer: Any, adapter: str, weight: Tensor) -> Tensor | None:
        """Return ``g * (weight + s B A)``, rounded once, with the unmerged weight's g; None if PEFT has to merge."""
        state = switch(layer)
        weights = cls.read(layer, adapter)
        k = strength(layer, adapter)
        if state is None or weights is None or (layer.merged_adapters and state.unmerged is None):
            if k != 1.0:
                raise ValueError(f"adapter {adapter!r} has a strength of {k}, which PEFT's own code cannot merge")
            return None
        whole, weight = weight, part(weight)
        unmerged = cls.rows(layer, state.unmerged.weight.to(weight.device) if layer.merged_adapters else weight)
        rows = cls.rows(layer, weight.detach())
        merged, norm = merged_rows(
            rows, unmerged.detach(), *weights[1:4], layer.scaling[adapter], k, form_of(layer, adapter).group
        )
        result = torch.empty_like(weight.detach())
        cls.rows(layer, result).copy_(merged)
        # PEFT's own unmerge looks here for the norm that it divides by.
        layer._cache_store(f"{adapter}-weight_norm", norm.view(part(layer.lora_magnitude_vector[adapter].weight).shape))
        return like(whole, result)

    @classmethod
    @torch.no_grad()
    def unmerge(cls, module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Undo `merge_safe` by arithmetic, as exactly as that allows. Used if no unmerged weight was kept."""
        weights = cls.read(module, active_adapter)
        if weights is None:
            unmerged: Tensor = cls.stock.unmerge(module, active_adapter, orig_weight)
            return unmerged
        whole, orig_weight = orig_weight, part(orig_weight)
        norm = module._cache_pop(f"{active_adapter}-weight_norm").view(-1)
        k, rows = strength(module, active_adapter), cls.rows(module, orig_weight.detach())
        result = torch.empty_like(orig_weight.detach())
        cls.rows(module, result).copy_(unmerged_rows(rows, *weights[1:4], norm, module.scaling[active_adapter], k))
        return write(whole, like(whole, result))


def _stock_method(layer: Any, name: str) -> Callable[..., Any]:
    """PEFT's own method of a layer that another thread may be restoring: then `super()` raises."""
    cls = type(layer)
    method: Callable[..., Any] = getattr(cls.stock if issubclass(cls, DoraLayer) else cls, name)
    return functools.partial(method, layer)


class DoraLayer:
    """A LoRA layer with DoRA adapters that run on this package.

    It is mixed in before one of PEFT's classes, `stock`.
    """

    stock: ClassVar[Any]
    variants: ClassVar[dict[Any, Any]]
    """Maps PEFT's DoRA variant for this kind of layer to this package's."""
    lora_variant: dict[str, Any]

    def resolve_lora_variant(self, **kwargs: Any) -> Any:
        """Return PEFT's variant for a new adapter, with a DoRA variant replaced."""
        return self.patched_variant(super().resolve_lora_variant(**kwargs))  # type: ignore[misc]

    @classmethod
    def patched_variant(cls, variant: Any) -> Any:
        """Return this package's variant in place of PEFT's DoRA variant; any other is returned as it is."""
        stock = getattr(variant, "stock", type(variant))  # a registered variant of this package is not yet this layer's
        return cls.variants[stock]() if stock in cls.variants else variant

    @classmethod
    def restored_variant(cls, variant: Any) -> Any:
        """Return PEFT's own variant again."""
        return variant.stock() if isinstance(variant, DoraVariant) else variant

    def merge(self: Any, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge as PEFT does.

        The unmerged weight is kept on the CPU, for `unmerge` and for the norms of further adapters.
        Without `Options.keep_unmerged` it is kept only while several adapters are merged in one call.
        """
        state = switch(self)
        if state is None:
            return super().merge(safe_merge, adapter_names)  # type: ignore[misc]
        keep = state.options.keep_unmerged
        names = self.active_adapters if adapter_names is None else adapter_names
        with self._writing():
            if self.merged_adapters:
                if state.unmerged is not None and not state.unmerged.is_of(self._merged_into()):
                    state.unmerged = None  # somebody has changed the weight since
            elif names and self._keeps_unmerged() and (keep or set(names[1:]) & set(dora_adapters(self))):
                state.unmerged = self._keep()
            try:
                self._merge(safe_merge, adapter_names)
                if state.record is not None:
                    state.record.called = True  # a merged layer has nothing more to call
            finally:  # PEFT writes the weight through `.data`, which changes no version
                forget_norms(self)
                if not self.merged_adapters or not keep:
                    state.unmerged = None
                elif state.unmerged is not None:
                    state.unmerged.merged(self._merged_into())

    def unmerge(self: Any) -> None:
        """Restore the kept weight bit for bit. Without one, or if it was changed since, use PEFT's arithmetic."""
        state = switch(self)
        if state is None:
            return super().unmerge()  # type: ignore[misc]
        kept, state.unmerged = state.unmerged, None
        with self._writing():
            if kept is not None and self.merged_adapters and kept.is_of(self._merged_into()):
                kept.put_back(self._merged_into())
                for name in self.merged_adapters:
                    self._caches.pop(f"{name}-weight_norm", None)
                self.merged_adapters.clear()
            else:
                self._unmerge()
        forget_norms(self)

    def _merge(self: Any, safe_merge: bool, adapter_names: list[str] | None) -> None:
        """PEFT's `merge`; of a split layer it cannot merge plain LoRA adapters."""
        if split_of(self) is None:
            super().merge(safe_merge, adapter_names)  # type: ignore[misc]
            return
        for name in check_adapters_to_merge(self, adapter_names) or ():
            if name in self.lora_variant:
                super().merge(safe_merge, [name])  # type: ignore[misc]
            elif name in self.scaling:
                add_plain(self, name, 1.0, check=safe_merge)
                self.merged_adapters.append(name)

    def _unmerge(self: Any) -> None:
        """PEFT's `unmerge`; of a split layer it cannot unmerge plain LoRA adapters."""
        if split_of(self) is None:
            super().unmerge()  # type: ignore[misc]
            return
        for name in reversed(self.merged_adapters.copy()):
            if name in self.lora_variant:
                self.merged_adapters[:] = [name]
                super().unmerge()  # type: ignore[misc]
            elif name in self.scaling:
                add_plain(self, name, -1.0)
        self.merged_adapters.clear()

    def _keep(self: Any) -> Any:
        return Unmerged(self._merged_into())

    def _keeps_unmerged(self: Any) -> bool:
        """True if unmerging puts back a copy."""
        return bool(dora_adapters(self))

    def _merged_into(self: Any) -> Any:
        """What holds the weight that merging writes."""
        return self.get_base_layer()

    @contextmanager
    def _writing(self: Any) -> Iterator[None]:
        """Leave inference mode: tensors written in it could not be trained afterwards."""
        inference = torch.is_inference_mode_enabled() and any(t.is_inference() for t in self.base_layer.parameters())
        with torch.inference_mode(inference), torch.no_grad():
            yield

    def delete_adapter(self: Any, adapter_name: str) -> None:
        """Delete as PEFT does. A later adapter of the same name starts with a new cache."""
        super().delete_adapter(adapter_name)  # type: ignore[misc]
        state = switch(self)
        if state is not None:
            state.pop(adapter_name, None)
            state.strengths.pop(adapter_name, None)
            state.exact_norms.discard(adapter_name)

    def _apply(self: Any, *args: Any, **kwargs: Any) -> Any:
        """PyTorch's, for `to` and similar methods; the norm caches forget, and with it the old tensors' memory."""
        result = super()._apply(*args, **kwargs)  # type: ignore[misc]
        state = switch(self)
        if state is not None:
            state.plan = None
        forget_norms(self)
        for name, cache in (state or {}).items():
            if name in self.lora_magnitude_vector:
                cache.move(self.lora_magnitude_vector[name].weight.device)
        return result

    @property
    def norm_group(self: Any) -> Any:
        """The process group over which the rows of the linear problem are split, or None."""
        split = split_of(self)
        return None if split is None else split.norm_group

    def kept_norms(self: Any) -> Iterator[KeptNorm]:
        """Yield the norms that `frozen_norms` may freeze: those of the active adapters that can be read."""
        if switch(self) is None or self.merged_adapters or self.disable_adapters:
            return
        for name in self.active_adapters:
            variant = self.lora_variant.get(name)
            weights = variant.read(self, name) if isinstance(variant, DoraVariant) else None
            if weights is not None:
                source, compute = variant.norm_source(self, name, weights)
                # The magnitude as a vector, whatever the other tensors are.
                tensors = source._replace(magnitude=weights.magnitude)
                yield KeptNorm(norm_cache(self, name), tensors, form_of(self, name), "auto", compute)

    def _check_forward_args(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> None:
        """PEFT's checks, but DoRA is allowed in a batch with several adapters."""
        names = kwargs.get("adapter_names")
        if names is not None and switch(self) is not None:
            kwargs["adapter_names"] = self._without_ours(names)
        _stock_method(self, "_check_forward_args")(x, *args, **kwargs)

    def _mixed_batch_forward(self: Any, x: Tensor, *args: Any, adapter_names: list[str], **kwargs: Any) -> Tensor:
        """The adapters that can be read run by slots, all at once; the others as PEFT runs them, one after another."""
        if switch(self) is None:
            return _stock_method(self, "_mixed_batch_forward")(x, *args, adapter_names=adapter_names, **kwargs)
        read = mixed.readable(self, x, adapter_names)
        others = ["__base__" if name in read else name for name in self._without_ours(adapter_names)]
        result = _stock_method(self, "_mixed_batch_forward")(x, *args, adapter_names=others, **kwargs)
        if read:
            result = mixed.routed(self, x, result, adapter_names, read)
        for name in dict.fromkeys(adapter_names):
            if name not in others and name not in read and name in self.lora_variant:
                rows = torch.tensor([i for i, one in enumerate(adapter_names) if one == name], device=result.device)
                part = result.index_select(0, rows)
                own = self._adapter_input(x.index_select(0, rows), name)
                dora = self.lora_variant[name].forward(self, active_adapter=name, x=own, result=part)
                result = result.index_copy(0, rows, dora.to(result.dtype))
        return result

    def _adapter_input(self: Any, x: Tensor, adapter: str) -> Tensor:
        """Cast x as PEFT's forward does before it calls the adapter."""
        return self._cast_input_dtype(x, self.lora_A[adapter].weight.dtype)

    def _without_ours(self: Any, adapter_names: list[str]) -> list[str]:
        """A mixed batch's adapter names, with the base model's name in place of this package's adapters."""
        ours = {name for name, variant in self.lora_variant.items() if isinstance(variant, DoraVariant)}
        return ["__base__" if name in ours else name for name in adapter_names]
