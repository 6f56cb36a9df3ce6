"""What is replaced in vLLM: each function wraps the method that `install` names beside it; `stock` is vLLM's own."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from vllm import envs
from vllm.distributed import get_tp_group
from vllm.lora import layers as kinds
from vllm.lora import lora_model as lora_model_module
from vllm.lora.layers import BaseLayerWithLoRA, RowParallelLinearWithLoRA
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights, PackedLoRALayerWeights
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase
from vllm.lora.worker_manager import WorkerLoRAManager
from vllm.model_executor.models.utils import PPMissingLayer

from dora_kernels.vllm.layers import magnitudes_here, write_scale
from dora_kernels.vllm.scale import Route, scale_slots_

_SUPPORTED = (
    kinds.ReplicatedLinearWithLoRA,
    kinds.ColumnParallelLinearWithLoRA,
    kinds.MergedColumnParallelLinearWithLoRA,
    kinds.MergedColumnParallelLinearVariableSliceWithLoRA,
    kinds.QKVParallelLinearWithLoRA,
    kinds.MergedQKVParallelLinearWithLoRA,
    kinds.RowParallelLinearWithLoRA,
)
"""The classes whose output passes `_apply_lora_to_output`; their subclasses' need not (--fully-sharded-loras)."""
_MAGNITUDE = re.compile(r"(.+)\.lora_magnitude_vector(?:\.weight)?")


def install() -> None:
    """Replace the methods, once in a process. Adapters without magnitudes, and their layers, compute what they did."""
    if hasattr(LoRALayerWeights, "magnitude"):
        return
    LoRALayerWeights.magnitude = None  # a tensor; for packed weights a list of one per projection
    # reading an adapter
    _wrap(PEFTHelper, "_validate_features", _allow_dora)
    _wrap(lora_model_module, "parse_fine_tuned_lora_name", _parse_name)
    _wrap(LoRAModel, "from_lora_tensors", _keep_magnitudes)
    _wrap(PackedLoRALayerWeights, "pack", _pack)
    _wrap(WorkerLoRAManager, "_load_adapter", _checked)
    # the slots
    _wrap(LoRAModelManager, "register_module", _add_slots)
    _wrap(LoRAModelManager, "activate_adapter", _activate)
    _wrap(LoRAModelManager, "remove_all_adapters", _forget_weights)
    _wrap(WorkerLoRAManager, "set_active_adapters", _in_one_order)
    _wrap(BaseLinearLayerWithLoRA, "reset_lora", _reset)
    # the forward
    _wrap(PunicaWrapperBase, "_update_base_metadata", _route)
    _wrap(BaseLinearLayerWithLoRA, "_apply_lora_to_output", _scaled)


def _wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:
    found = inspect.getattr_static(owner, name)
    stock = found.__func__ if isinstance(found, classmethod) else found

    @functools.wraps(stock)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return around(stock, *args, **kwargs)

    setattr(owner, name, classmethod(wrapped) if isinstance(found, classmethod) else wrapped)


def _allow_dora(stock: Any, config: Any) -> list[str]:
    stated, config.use_dora = config.use_dora, False
    try:
        refused: list[str] = stock(config)
        return refused
    finally:
        config.use_dora = stated


def _parse_name(stock: Any, name: str, weights_mapper: Any = None) -> Any:
    """A magnitude's key is parsed as its lora_A's would be."""
    found = _MAGNITUDE.fullmatch(name)
    return stock(name if found is None else f"{found[1]}.lora_A.weight", weights_mapper)


def _keep_magnitudes(stock: Any, cls: Any, lora_model_id: int, tensors: Any, peft_helper: Any, **options: Any) -> Any:
    """The magnitudes stay beside their factors, in float32. An adapter without all of its parts is refused."""
    magnitudes = {name: tensor for name, tensor in tensors.items() if _MAGNITUDE.fullmatch(name)}
    rest = {name: tensor for name, tensor in tensors.items() if name not in magnitudes}
    adapter = stock(cls, lora_model_id, rest, peft_helper, **options)
    if magnitudes and not peft_helper.use_dora:
        raise ValueError(f"the adapter has magnitudes ({min(magnitudes)}), and its configuration says use_dora=False")
    skipped = options.get("skip_prefixes") or ()
    for key, magnitude in magnitudes.items():
        if skipped and cls._should_skip_module(key, skipped):
            continue
        name, _ = lora_model_module.parse_fine_tuned_lora_name(key, options.get("weights_mapper"))
        if name not in adapter.loras:
            raise ValueError(f"{key}: a magnitude of a layer that has neither lora_A nor lora_B")
        if magnitude.dim() != 1 or not magnitude.is_floating_point() or not bool(magnitude.isfinite().all()):
            raise ValueError(
                f"{key}: expected a vector of finite numbers, got {magnitude.dtype} of shape {list(magnitude.shape)}"
            )
        adapter.loras[name].magnitude = magnitude.to(options.get("device"), torch.float32)
    for name, lora in adapter.loras.items() if peft_helper.use_dora else ():
        absent = [part for part in ("lora_a", "lora_b", "magnitude") if getattr(lora, part) is None]
        if absent:
            raise ValueError(f"{name}: the configuration says use_dora, and the adapter has no {', no '.join(absent)}")
    return adapter


def _pack(stock: Any, cls: Any, loras: Any) -> Any:
    packed = stock(cls, loras)
    packed.magnitude = [None if lora is None else lora.magnitude for lora in loras]
    return packed


def _checked(stock: Any, manager: Any, request: Any) -> Any:
    """An adapter that this engine cannot serve is refused here, before anything is evicted for it."""
    adapter = stock(manager, request)
    if any(lora.magnitude is not None for lora in adapter.loras.values()):
        try:
            _check(manager._adapter_manager, adapter)
        except ValueError as error:
            raise ValueError(f"DoRA adapter {request.lora_name!r}: {error}") from error
    return adapter


def _check(manager: Any, adapter: Any) -> None:
    if envs.VLLM_LORA_ENABLE_DUAL_STREAM:
        raise ValueError("VLLM_LORA_ENABLE_DUAL_STREAM=1 is not supported with DoRA")
    found: set[int] = set()
    for name, layer in manager.modules.items():
        loras = [manager._get_lora_layer_weights(adapter, part) for part in manager.packed_modules.get(name, [name])]
        found.update(id(lora) for lora in loras)
        if any(lora is not None for lora in loras):
            _check_layer(name, layer, loras)
    ignored = sorted(name for name, lora in adapter.loras.items() if id(lora) not in found)
    elsewhere = any(isinstance(module, PPMissingLayer) for module in manager.model.modules())
    if ignored and not elsewhere:
        raise ValueError(f"{', '.join(ignored[:3])}: no such layer here, or --lora-target-modules leaves it out")


def _check_layer(name: str, layer: BaseLayerWithLoRA, loras: list[Any]) -> None:
    if type(layer) not in _SUPPORTED:
        raise ValueError(f"{name}: DoRA is not supported for {type(layer).__name__}, only for linear layers")
    columns = layer.base_layer.input_size
    for lora in loras:
        if lora is None:
            continue
        shapes = [list(t.shape) for t in (lora.lora_a, lora.lora_b, lora.magnitude)]
        rank, rows = lora.rank, len(lora.lora_b)
        if shapes != [[rank, columns], [rows, rank], [rows]]:
            expected = f"lora_A [{rank}, {columns}], lora_B [N, {rank}] and a magnitude [N]"
            raise ValueError(f"{lora.module_name}: expected {expected}, got {shapes}")
    rows_here = [b.shape[2] for b in layer.lora_b_stacked]
    got: Any
    try:
        got = magnitudes_here(layer, [None if lora is None else lora.magnitude for lora in loras])
        got = [rows if m is None else len(m) for m, rows in zip(got, rows_here)]
    except (ValueError, RuntimeError) as error:
        got = error
    total = sum(0 if lora is None else len(lora.magnitude) for lora in loras)
    if got != rows_here or (None not in loras and total != _rows(layer)):
        raise ValueError(f"{name}: magnitudes of {total} rows do not fit its {_rows(layer)}, {rows_here} here: {got}")


def _rows(layer: Any) -> int:
    """Output features of the whole layer, over all ranks."""
    base = layer.base_layer
    if hasattr(base, "total_num_kv_heads"):  # its output_size counts key and value heads once per rank
        query_key, value = base.total_num_heads + base.total_num_kv_heads, base.total_num_kv_heads
        return int(query_key * base.head_size + value * base.v_head_size)
    return int(base.output_size)


def _add_slots(stock: Any, manager: Any, name: str, layer: Any) -> None:
    stock(manager, name, layer)
    if type(layer) not in _SUPPORTED:
        return
    slots, rows = manager.lora_slots, sum(b.shape[2] for b in layer.lora_b_stacked)
    base = layer.base_layer
    # What the output that is scaled holds: a row-parallel layer adds its bias on rank 0 only.
    elsewhere = base.skip_bias_add or (isinstance(layer, RowParallelLinearWithLoRA) and layer.tp_rank > 0)
    layer.dora_scale = torch.ones(slots, rows, dtype=torch.float32, device=layer.device)
    layer.dora_offset = None if base.bias is None or elsewhere else torch.zeros_like(layer.dora_scale)
    layer.dora_constants = None
    wrapper = manager._get_punica_wrapper(name)
    if not hasattr(wrapper, "dora_route"):
        wrapper.dora_route = Route(wrapper._token_lora_indices.shape[0], slots, wrapper.device)


def _routes(manager: Any) -> list[Route]:
    wrappers = manager.punica_wrapper_mapping.values()
    return [wrapper.dora_route for wrapper in wrappers if hasattr(wrapper, "dora_route")]


def _activate(stock: Any, manager: Any, lora_id: int) -> bool:
    """vLLM has written the factors into a slot: the norms can be computed from it."""
    if not stock(manager, lora_id):
        return False
    adapter, slot = manager._registered_adapters[lora_id], manager.lora_index_to_id.index(lora_id)
    has_magnitudes = False
    try:
        for name, layer in manager.modules.items():
            lora = manager._get_lora_layer_weights(adapter, name)
            if lora is None or lora.magnitude is None:
                continue
            packed = isinstance(lora.magnitude, list)
            magnitudes, factors = (lora.magnitude, lora.lora_a) if packed else ([lora.magnitude], [lora.lora_a])
            if all(magnitude is None for magnitude in magnitudes):
                continue
            has_magnitudes = True
            sharded = isinstance(layer, RowParallelLinearWithLoRA) and layer.tp_size > 1
            rank = max(a.shape[0] for a in factors if a is not None)
            write_scale(layer, slot, rank, magnitudes, get_tp_group().all_reduce if sharded else None)
    except BaseException:
        manager.deactivate_adapter(lora_id)
        raise
    for route in _routes(manager):
        route.scaled[slot] = has_magnitudes
    manager._last_mapping = None  # an adapter reloaded under its id leaves the mapping as it was, and not the route
    return True


def _forget_weights(stock: Any, manager: Any) -> None:
    """vLLM removes all adapters when the base weights have been replaced."""
    stock(manager)
    for layer in manager.modules.values():
        if type(layer) in _SUPPORTED:
            layer.dora_constants = None


def _in_one_order(stock: Any, manager: Any, requests: Any, mapping: Any) -> None:
    """Each rank iterates over a set of names in an order of its own, and would wait for another's norms for ever."""
    stock(manager, sorted((one for one in requests if one), key=lambda one: one.lora_int_id), mapping)


def _reset(stock: Any, layer: Any, index: int) -> None:
    stock(layer, index)
    if type(layer) in _SUPPORTED:
        layer.dora_scale[index] = 1.0
        if layer.dora_offset is not None:
            layer.dora_offset[index] = 0.0


def _route(stock: Any, wrapper: Any, *args: Any, **kwargs: Any) -> None:
    stock(wrapper, *args, **kwargs)
    if hasattr(wrapper, "dora_route"):
        wrapper.dora_route.fill(wrapper.token_lora_indices)


def _scaled(stock: Any, layer: Any, x: Tensor, output: Tensor) -> Tensor:
    y: Tensor = stock(layer, x, output)
    if type(layer) in _SUPPORTED:
        route = layer.punica_wrapper.dora_route
        scale_slots_(y, route.order, route.ends, layer.dora_scale, layer.dora_offset)
    return y
