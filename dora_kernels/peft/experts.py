"""LoRA and DoRA on parameters that are targeted by name (``target_parameters``): stacks of experts, above all.

PEFT adapts such a parameter by a parametrization, which forms the adapted stack at every forward and its gradient at
every backward, and refuses DoRA. Here a `StandIn` takes the parameter's place for the length of the call and computes
the adapted products. A magnitude has one value for each output of each expert: ``[E, N]``, in a file under
``lora_magnitude_vector``. PEFT has no DoRA that such a layer could be restored to, so with a DoRA adapter it stays
patched.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from peft.tuners import lora
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, distributed, nn

from dora_kernels.core.precision import accumulation_dtype, cast
from dora_kernels.core.problem import Weights
from dora_kernels.engine import experts, ops
from dora_kernels.engine.collectives import all_true, copied, gathered, taking_part, whole_norm
from dora_kernels.engine.dispatch import UnsupportedError, norm_backend
from dora_kernels.functional import dora_weight_norm
from dora_kernels.modules.stand_in import StandIn, is_transposed, standing_in
from dora_kernels.peft import stacks
from dora_kernels.peft.layer import DoraLayer, DoraVariant, NormSource
from dora_kernels.peft.magnitude import DoraMagnitude
from dora_kernels.peft.merging import merged_rows, unmerged_rows
from dora_kernels.peft.shards import cut_of
from dora_kernels.peft.state import SWITCH, Switch, norm_cache, strength, switch

STOCK: Any = lora.layer.ParamWrapper
"""PEFT's class."""


class ExpertsVariant(DoraVariant):
    """The DoRA adapter of a parameter."""

    stock = None
    starts_exact = True

    @staticmethod
    def init(module: Any, adapter_name: str, **kwargs: Any) -> None:
        """Give the adapter its first magnitude, with which it changes nothing: exact to float32, whatever W's dtype."""
        with torch.no_grad():
            weights = module.problem(adapter_name)
        if hasattr(weights.weight, "to_local"):
            raise UnsupportedError(
                f"{module._name()}: it is split as {weights.weight.placements}; expected a whole parameter, or experts "
                "spread over processes by expert parallelism (DistributedConfig(ep_size=...))"
            )
        device = weights.lora_A.device
        magnitude = DoraMagnitude(fan_in_fan_out=False)
        if device.type == "meta" or weights.weight.is_meta:
            norm = torch.empty(weights.weight.shape[:-1], dtype=accumulation_dtype(weights.weight), device="meta")
        else:
            norm = _norm(weights, module.scaling[adapter_name])
        cut = vars(module)[SWITCH].cut
        if cut is not None:
            of_rows = module.norm_group is None
            norm = gathered(cut.group, norm, 1, cut.own, cut.size) if of_rows else whole_norm(cut.group, norm)[0]
        elif norm.shape[0] != module.num_experts and norm.dim() == 2:
            norm = _gathered(norm, vars(module)[SWITCH].group)
        magnitude.weight = nn.Parameter(norm.to(device))
        module.lora_magnitude_vector[adapter_name] = magnitude

    @staticmethod
    def read(layer: Any, adapter: str) -> Weights | None:
        if switch(layer) is None:
            return None
        stored = layer._stored()
        sharded = hasattr(stored, "to_local")  # by FSDP2, outside a call
        if sharded or not (layer.lora_A[adapter].weight.numel() and math.prod(stored.shape)):
            return None
        weights: Weights = layer.problem(adapter)
        return None if any(hasattr(t, "to_local") for t in weights) else weights

    @classmethod
    def norm_source(cls, layer: Any, adapter: str, weights: Weights) -> NormSource:
        """Of a quantised stack the norm is computed expert by expert, and kept while the packed weights stay.

        Of experts that are cut it depends on the whole factors, whose parts may be copies.
        """
        if vars(layer)[SWITCH].cut is not None:
            source = weights._replace(lora_A=layer.lora_A[adapter].weight, lora_B=layer.lora_B[adapter].weight)
            parts = Weights(*(t.detach() for t in weights[:3]))
            return source, functools.partial(_cut_norm, parts, layer.scaling[adapter], layer.norm_group)
        if isinstance(weights.weight, Tensor):
            return weights, None
        carrier: Any = weights.weight.carrier
        return weights._replace(weight=carrier), functools.partial(_norm, weights, layer.scaling[adapter])


@torch.no_grad()
def _norm(weights: Weights, scaling: float) -> Tensor:
    """The norm of every row, ``[E, N]``."""
    weight, lora_A, lora_B, _, _ = weights
    if isinstance(weight, Tensor):
        return ops.weight_norm(weight, lora_A, lora_B, scaling, "out", norm_backend("auto", weight))
    pairs = enumerate(zip(lora_A, lora_B.contiguous(), strict=True))
    return torch.stack([dora_weight_norm(weight[e], a, b, scaling=scaling) for e, (a, b) in pairs])


def _cut_norm(weights: Weights, scaling: float, group: Any) -> Tensor:
    """The norm of every row of experts that are cut: of all processes' columns together, or of this one's rows."""
    norm = _norm(weights, scaling)
    return norm if group is None else whole_norm(group, norm)[0]


class ParamWrapper(DoraLayer, STOCK):
    """PEFT's LoRA layer on a parameter, run by this package. PEFT asks for the class's name, so it has the same."""

    stock = STOCK
    variants: ClassVar[dict[Any, Any]] = {}

    def problem(self: Any, adapter: str) -> Weights:
        """The adapter's tensors: ``[E, N, K]``, ``[E, r, K]``, ``[E, N, r]``, ``[E, N]``; without E for one matrix."""
        transposed, weight = is_transposed(self.get_base_layer()), self._stored()
        a, b = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        magnitude = self.lora_magnitude_vector[adapter].weight if adapter in self.lora_magnitude_vector else None
        if not (a.numel() and math.prod(weight.shape)):
            which = f"the adapter {adapter!r}" if math.prod(weight.shape) else "the parameter"
            raise UnsupportedError(
                f"{self._name()}: {which} is not in memory inside its layer's call (DeepSpeed ZeRO-3 has partitioned "
                "it); use ZeRO-2, FSDP2 or expert parallelism for adapters of experts"
            )
        if weight.dim() == 3:
            count, rank = self.num_experts, self.r[adapter]
            own, cut = slice(None), None if (state := switch(self)) is None else state.cut
            if weight.shape[0] != count or cut is not None:
                a, b, magnitude, own = self._shared(weight, a, b, magnitude)
            a, b = a.view(count, rank, a.shape[1])[own], b.view(b.shape[0], rank, count).permute(2, 0, 1)[own]
            magnitude = None if magnitude is None else magnitude[own]
            if transposed and isinstance(weight, Tensor):
                weight = weight.transpose(1, 2)
            # PEFT <= 0.18 puts A on the first dimension, later versions on the last unless the module says otherwise.
            if transposed == getattr(self, "_did_swap_in_out_features", False):
                a, b = b.transpose(1, 2), a.transpose(1, 2)
            if cut is not None and self.norm_group is None:
                b, magnitude = cut.take(b, 1), cut.take(magnitude, 1)
            elif cut is not None:
                a = cut.take(a, 2)
            if a.shape[-1] != weight.shape[2] or b.shape[1] != weight.shape[1]:
                raise UnsupportedError(
                    f"{self._name()}: its weight is {list(weight.shape)} here, as [experts, out, in], and the adapter "
                    f"{adapter!r} is made for {b.shape[1]} outputs and {a.shape[-1]} inputs; tensor-parallel experts "
                    "need another plan, such as expert parallelism (DistributedConfig(ep_size=...))"
                )
        return Weights(weight, a, b, magnitude)

    def _shared(self: Any, weight: Any, *tensors: Any) -> tuple[Any, ...]:
        """The adapter's tensors, which all processes hold whole, with gradients summed; and which experts are here."""
        group = vars(self)[SWITCH].group
        if group is None or self.num_experts % weight.shape[0]:
            raise UnsupportedError(
                f"{self._name()}: expected the weights of {self.num_experts} experts, got {weight.shape[0]}"
            )
        shared = iter(copied(group, *(t for t in tensors if t is not None)))
        first = 0 if vars(self)[SWITCH].cut is not None else distributed.get_rank(group) * weight.shape[0]
        return *(None if t is None else next(shared) for t in tensors), slice(first, first + weight.shape[0])

    def _stored(self: Any) -> Any:
        """The parameter as it is now. It is read at each use: a wrapper may show its own shard of it inside a call."""
        weight = stacks.stored(self.get_base_layer(), self.parameter_name, is_transposed(self.get_base_layer()))
        return weight.to_local().detach() if self._find_group() is not None else weight

    def _find_group(self: Any) -> Any:
        """The group whose processes have some experts, or a part of each expert, if the parameter shows that now."""
        module, state = self.get_base_layer(), vars(self).get(SWITCH)
        parameter = module._parameters.get(self.parameter_name)
        if state is None or getattr(parameter, "device_mesh", None) is None or parameter.device_mesh.ndim != 1:
            return None  # of two dimensions it is outside FSDP2's calls
        if not getattr(module, "_is_expert_parallel", False):
            if state.cut is None:
                state.cut = cut_of(module, parameter)
            if state.cut is None:
                return None
        state.group = parameter.device_mesh.get_group()
        return state.group

    @property
    def norm_group(self: Any) -> Any:
        """The group that has to sum up a norm's squares: each process has some columns of every expert."""
        cut = getattr(switch(self), "cut", None)
        transposed = cut is not None and is_transposed(self.get_base_layer())
        return None if cut is None or (cut.dim == 1) != transposed else cut.group

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """PEFT's forward, with a `StandIn` for the parameter in place of the parametrization."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        if switch(self) is None or self.disable_adapters or self.merged or not active or kwargs.get("adapter_names"):
            return STOCK.forward(self, x, *args, **kwargs)
        self._check_forward_args(x, *args, **kwargs)
        shared = self._find_group() is not None
        module, ndim = self.get_base_layer(), self._parameter_ndim()
        stand_in = StandIn(
            functools.partial(self._experts, active), self._name(), ndim == 2 or not is_transposed(module), ndim == 2
        )
        # What processes share is exchanged by all, also by one whose experts get no tokens.
        own = stand_in.made() if shared else None
        with standing_in(module, self.parameter_name, stand_in):
            result = self.base_layer(x, *args, **kwargs)
        if own is None:
            if not torch.compiler.is_compiling():
                stand_in.check_met(x)
        elif torch.is_grad_enabled() and not stand_in.met:
            result = taking_part(
                result, *(t for one in own.adapters for t in (one.lora_A, one.lora_B, one.g) if t is not None)
            )
        return result

    def _parameter_ndim(self: Any) -> int:
        return getattr(self, "_param_ndim", None) or self._stored().dim()

    def _name(self: Any) -> str:
        state = switch(self)
        name = state.name if state is not None and state.name else type(self.get_base_layer()).__name__
        return f"{name.replace('.base_layer', '')}.{self.parameter_name}"

    def _experts(self: Any, names: list[str]) -> experts.Experts:
        adapters, weight = [], None
        for name in names:
            weights = self.problem(name)
            weight, g = weights.weight, None
            if weights.magnitude is not None:
                g = cast(ExpertsVariant.scale(self, name, weights), accumulation_dtype(weight))
            a, b = weights.lora_A, weights.lora_B
            if g is not None and not torch.is_grad_enabled():
                b = norm_cache(self, name).contiguous_b(b)
            if weight.dim() == 2:
                weight, a, b = weight.unsqueeze(0), a.unsqueeze(0), b.unsqueeze(0)
                g = None if g is None else g.unsqueeze(0)
            adapters.append(experts.Adapter(a, b, g, float(self.scaling[name]), strength(self, name)))
        assert weight is not None
        return experts.Experts(weight, adapters)

    def update_layer(self: Any, adapter_name: str, r: int, lora_alpha: int, **kwargs: Any) -> None:
        """Add an adapter as PEFT does, with a magnitude if its configuration asks for DoRA."""
        use_dora, plain = _without_dora(kwargs)
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, **plain)
        self.agree(adapter_name)
        if use_dora:
            self.add_magnitude(adapter_name)

    def agree(self: Any, adapter_name: str) -> None:
        """Give all processes of an expert-parallel group the same first values: each trains a part of them."""
        group = self._find_group()
        if group is not None:
            for factor in (self.lora_A[adapter_name].weight, self.lora_B[adapter_name].weight):
                distributed.broadcast(factor.data, distributed.get_global_rank(group, 0), group)

    def add_magnitude(self: Any, adapter_name: str) -> None:
        """Make a plain LoRA adapter a DoRA adapter."""
        self.agree(adapter_name)
        self.use_dora[adapter_name] = True
        self.lora_variant[adapter_name] = ExpertsVariant()
        for factor in (self.lora_A[adapter_name], self.lora_B[adapter_name]):
            if factor.weight.dtype.itemsize < 2:  # PEFT gives them float8, the parameter's dtype
                factor.weight.data = factor.weight.data.float()
        ExpertsVariant.init(self, adapter_name)
        norm_cache(self, adapter_name).move(self.lora_magnitude_vector[adapter_name].weight.device)
        trains = self.lora_A[adapter_name].weight.requires_grad
        self.lora_magnitude_vector[adapter_name].weight.requires_grad_(trains)

    @torch.no_grad()
    def _merge(self: Any, safe_merge: bool, adapter_names: list[str] | None) -> None:
        """Merge one expert at a time, computed in float32 and rounded once."""
        self._merged_into()
        names = [name for name in check_adapters_to_merge(self, adapter_names) or () if name in self.lora_A]
        for name in names:
            finite = not safe_merge or all([bool(merged.isfinite().all()) for _, merged in self._merged(name)])
            if safe_merge and not self._agree_on(finite):
                raise ValueError(
                    f"{self._name()}: NaNs detected in the merged weights. The adapter {name} seems to be broken"
                )
            for target, merged in self._merged(name):
                target.copy_(merged)
            self.merged_adapters.append(name)

    def _agree_on(self: Any, own: bool) -> bool:
        group = self._find_group()
        return own if group is None else all_true(group, [own], self._stored().device)[0]

    def _merged(self: Any, name: str) -> Any:
        """Yield each expert's weight ``[N, K]``, and its merged weight."""
        kept, (weight, a, b, magnitude, _) = vars(self)[SWITCH].unmerged, self.problem(name)
        unmerged = weight
        if self.merged_adapters and magnitude is not None and kept is not None:
            turned = weight.dim() == 3 and is_transposed(self.get_base_layer())
            unmerged = kept.weight.transpose(1, 2) if turned else kept.weight
        norms: list[Any] = []
        for w, before, one_a, one_b, m in by_expert(weight.data, unmerged, a, b, magnitude):
            scaling, k = self.scaling[name], strength(self, name)
            merged, norm = merged_rows(w, before.to(w.device), one_a, one_b, m, scaling, k, self.norm_group)
            norms.append(norm)
            yield w, merged
        if magnitude is not None:
            self._cache_store(f"{name}-weight_norm", torch.stack(norms).view(magnitude.shape))

    @torch.no_grad()
    def _unmerge(self: Any) -> None:
        """Undo merging by arithmetic, as exactly as that allows. Used if no unmerged weight was kept."""
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            weight, a, b, magnitude, _ = self.problem(name)
            norm = None if magnitude is None else self._cache_pop(f"{name}-weight_norm")
            for w, one_a, one_b, m, n in by_expert(weight.data, a, b, magnitude, norm):
                w.copy_(unmerged_rows(w, one_a, one_b, m, n, self.scaling[name], strength(self, name)))

    def _merged_into(self: Any) -> Any:
        weight = self._stored()
        if isinstance(weight, stacks.Quantized):
            raise ValueError(f"{self._name()}: cannot merge into quantised experts; merge into the dequantised model")
        return _Holder(weight)

    def _keeps_unmerged(self) -> bool:
        return True  # PEFT's subtraction leaves 5e-4 of a bfloat16 weight


def by_expert(weight: Tensor, *others: Any) -> Any:
    """The tensors of one expert after another, without a first dimension."""
    if weight.dim() == 2:
        return [(weight, *others)]
    return ((w, *(None if t is None else t[e] for t in others)) for e, w in enumerate(weight))


def _gathered(part: Tensor, group: Any) -> Tensor:
    parts = [torch.empty_like(part) for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(parts, part.contiguous(), group)
    return torch.cat(parts)


class _Holder:
    """A parameter under the name `weight`, for what keeps and restores a layer's weight."""

    bias = None

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight


def _without_dora(options: dict[str, Any]) -> tuple[bool, dict[str, Any]]:
    """Whether PEFT's options ask for DoRA, and the options of plain LoRA.

    PEFT hands over a configuration since 0.21, before that its fields.
    """
    config = options.get("config")
    if config is None:
        use_dora = bool(options.get("use_dora"))
        return use_dora, options | {"use_dora": False} if use_dora else options
    if not config.use_dora:
        return False, options
    plain = copy.copy(config)
    plain.use_dora = False
    return True, options | {"config": plain}


def unsupported(layer: Any) -> str | None:
    """Return the reason why a `ParamWrapper` cannot be patched, or None if it can."""
    return stacks.unsupported(layer.get_base_layer(), layer.parameter_name)


def allow() -> Callable[[], None]:
    """Let PEFT make DoRA adapters of parameters from now on. Returns a function that ends this."""
    original = STOCK.__init__

    @functools.wraps(original)
    def __init__(self: Any, base_layer: Any, adapter_name: str, parameter_name: str, **kwargs: Any) -> None:
        use_dora, plain = _without_dora(kwargs)
        if use_dora:
            module = base_layer.get_base_layer() if isinstance(base_layer, STOCK) else base_layer
            name = kwargs.get("target_name") or f"{type(module).__name__}.{parameter_name}"
            config = kwargs.get("config")
            stacks.check(name, module, parameter_name, kwargs if config is None else vars(config))
        original(self, base_layer, adapter_name, parameter_name=parameter_name, **plain)
        if use_dora:
            self.__class__ = ParamWrapper
            setattr(self, SWITCH, Switch())
            switch(self).name = str(kwargs.get("target_name") or "").rpartition(".")[0]  # type: ignore[union-attr]
            self.add_magnitude(adapter_name)

    def undo() -> None:
        if getattr(STOCK.__init__, "__wrapped__", None) is original:
            STOCK.__init__ = original

    STOCK.__init__ = __init__
    return undo
