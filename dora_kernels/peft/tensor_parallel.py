"""DoRA on layers that transformers' tensor parallelism splits: how an adapter starts, and a linear layer's forward.

PEFT raises while it creates such an adapter, so `patch_peft_globally` replaces the ``init`` of its variants as long as
it is on. Which process has which part of a tensor: `shards`.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer, LoraModel, variants
from peft.tuners.lora import model as lora_model
from peft.tuners.lora.dora import DoraEmbeddingLayer, DoraLinearLayer
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers
from torch import Tensor, distributed, nn

from dora_kernels.core.patterns import is_named
from dora_kernels.core.precision import cast, compute_dtype
from dora_kernels.core.problem import Form, Weights
from dora_kernels.core.scale import quotient
from dora_kernels.engine import formula
from dora_kernels.engine.collectives import copied, summed
from dora_kernels.engine.layer import layer_norm, norm_now, run_layer
from dora_kernels.peft import shards
from dora_kernels.peft.plan import accepts, single_function
from dora_kernels.peft.state import active_dropout, norm_cache


def allow() -> Callable[[], None]:
    """Let PEFT create DoRA adapters on split layers from now on. Returns a function that ends this."""
    kinds: tuple[Any, ...] = variants.DoraLinearVariant, variants.DoraEmbeddingVariant
    before = [(kind, vars(kind)["init"]) for kind in kinds]
    for kind, init in before:
        kind.init = staticmethod(wrapped(init.__func__))

    def undo() -> None:
        for kind, init in before:
            if getattr(kind.init, "__wrapped__", None) is init.__func__:
                kind.init = init

    return undo


def check_targets(tuner: Any, model: nn.Module, adapter_name: str, *_: Any, **__: Any) -> None:
    """Raise ValueError, before PEFT adds an adapter, if it targets a part of the model that is split in a way that PEFT
    has no adapters for.

    PEFT warns of some, and then raises at the first forward, or trains with wrong gradients.
    """
    plan = getattr(lora_model, "get_tp_plan_and_mesh", None)
    if plan is None or getattr(model, "_device_mesh", None) is None or not isinstance(tuner, LoraModel):
        return
    config = copy.copy(tuner.peft_config[adapter_name])
    _check_copies(model, config)
    config = tuner._prepare_adapter_config(config, tuner.get_model_config(model))
    config = _maybe_include_all_linear_layers(config, model)
    init = config.init_lora_weights
    for name, module in model.named_modules():
        base = module.get_base_layer() if isinstance(module, LoraLayer) else module
        _check_parameters(name, base, config)
        style, mesh = plan(model, name)
        if style is None or not isinstance(base, nn.Linear | nn.Embedding) or not config.target_modules:
            continue
        if not tuner._check_target_module_exists(config, name):
            continue
        if style not in shards.STYLES:
            raise ValueError(
                f"target_modules: {name} cannot have an adapter: its tensor-parallel style is {style!r}; expected one "
                f"of {', '.join(shards.STYLES)}"
            )
        if getattr(base.weight, "device_mesh", mesh) != mesh:
            raise ValueError(
                f"target_modules: {name} cannot have an adapter: its tensor-parallel weight is sharded by FSDP2 already"
                "; add the adapter before fully_shard"
            )
        if isinstance(init, str) and init.lower() != "gaussian":
            raise ValueError(
                f"init_lora_weights: expected True, False or 'gaussian', since {name} is tensor-parallel, got {init!r}"
            )


def _check_copies(model: nn.Module, config: Any) -> None:
    """Check what PEFT would copy: the copy of a split module runs with the original's tensors, and does not train."""
    saved, tokens = config.modules_to_save or (), getattr(config, "trainable_token_indices", None)
    embedding: Any = getattr(model, "get_input_embeddings", lambda: None)
    embedding = embedding() if tokens else None
    for name, module in model.named_modules():
        if any(name.endswith(end) for end in saved) and shards.holds_parallel(module):
            raise ValueError(f"modules_to_save: expected modules that are not tensor-parallel, got {name}")
        found = any(name.endswith(end) for end in tokens) if isinstance(tokens, dict) else module is embedding
        if tokens and found and shards.holds_parallel(module):
            raise ValueError(f"trainable_token_indices: {name} is tensor-parallel; add it to target_modules instead")


def _check_parameters(name: str, module: nn.Module, config: Any) -> None:
    """Check the ``target_parameters`` of a split layer, which is not one of experts."""
    for key, parameter in module._parameters.items():
        full = f"{name}.{key}"
        if parameter is None or parameter.dim() == 3 or not shards.is_parallel(vars(module).get("forward")):
            continue
        if is_named(full, getattr(config, "target_parameters", None) or ()):
            raise ValueError(f"target_parameters: {full} is tensor-parallel; target its layer by target_modules")


@contextmanager
def whole_parameters() -> Iterator[None]:
    """Let PEFT add adapters of tensor-parallel parameters (``target_parameters``): it takes each for a linear layer.

    Every process has such factors whole, and uses what belongs to its part (`peft.experts`).
    """
    original = getattr(lora_model, "get_tp_plan_and_mesh", None)
    if original is None:
        yield
        return

    def plan_of_modules(model: nn.Module, key: str) -> Any:
        try:
            model.get_submodule(key)
        except AttributeError:
            return None, None
        return original(model, key)

    lora_model.get_tp_plan_and_mesh = plan_of_modules
    try:
        yield
    finally:
        lora_model.get_tp_plan_and_mesh = original


def wrapped(original: Callable[..., None]) -> Callable[..., None]:
    """Return PEFT's ``init`` of a variant, with `start` for split layers."""

    @functools.wraps(original)
    def init(module: Any, adapter_name: str, **kwargs: Any) -> None:
        if not start(module, adapter_name):
            original(module, adapter_name=adapter_name, **kwargs)

    return init


@torch.no_grad()
def start(module: Any, adapter: str) -> bool:
    """Give a new adapter of a split layer its magnitude, the norm of the whole rows; False for a layer that is whole.

    The factor that every process has is made that of the first one: PEFT does so for its default start only.

    Raises:
        ValueError: the layer is split in a way that PEFT has no adapters for.
    """
    base = module.get_base_layer()
    reason = shards.problem(base)
    if reason is not None:
        raise ValueError(f"a {type(base).__name__} cannot have a DoRA adapter: {reason}")
    split = shards.split_of(module)
    if split is None:
        return False
    embedding = split.style == "embedding_rowwise"
    if embedding:
        a, b = module.lora_embedding_A[adapter], module.lora_embedding_B[adapter]
        weight, own_a = shards.part(base.weight).t(), split.columns(a)
    else:
        a, b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
        weight, own_a = shards.part(base.weight), a
    whole = a if split.of_rows else b
    distributed.broadcast(whole.data, distributed.get_global_rank(split.group, 0), split.group)
    form = Form(module.scaling[adapter], group=split.norm_group)
    norm = norm_now(Weights(weight, own_a, b), form, "auto").to(b.dtype)
    if "lora_magnitude_vector" not in module.adapter_layer_names:
        module.adapter_layer_names = (*module.adapter_layer_names, "lora_magnitude_vector")
    magnitude: Any = DoraEmbeddingLayer(True) if embedding else DoraLinearLayer(module.fan_in_fan_out)
    magnitude.weight = nn.Parameter(split.rows(norm, base.weight.shape[0]) if split.of_rows else norm)
    module.lora_magnitude_vector[adapter] = magnitude
    return True


def forward(layer: Any, x: Tensor) -> Tensor | None:
    """Run a split linear layer as one function; returns None if PEFT's forward has to call the modules.

    One sum over the group in the forward or, if the rows are split, in the backward.
    """
    split = shards.split_of(layer)
    found = None if split is None or formula.transformed() else single_function(layer)
    if split is None or found is None or not accepts(x, found[1].weight, layer.in_features):
        return None
    adapter, weights = found
    if active_dropout(layer, adapter):
        return None
    form, cache = shards.form_of(layer, adapter), norm_cache(layer, adapter)
    if torch.is_autocast_enabled(x.device.type):
        x = cast(x, compute_dtype(x))
    norm = layer_norm(weights, form, cache, layer.training, "auto")
    rows = x.reshape(-1, x.shape[-1])
    if split.of_rows:
        rows, a = copied(split.group, rows, weights.lora_A)
        y = run_layer(rows, weights._replace(lora_A=a), form, norm=norm)
    else:
        (b,) = copied(split.group, weights.lora_B)
        product = run_layer(rows, Weights(weights.weight, weights.lora_A, b), form)
        cache.unnoticed_backward = True
        g = quotient(weights.magnitude, norm.divisor, product)
        y = formula.scaled(summed(split.group, product), g, weights.bias)
    return y.view(*x.shape[:-1], y.shape[1])


def untraced(layer: Any, x: Tensor) -> Tensor:
    """Run a split layer between two graphs of a compiled model: the compiler cannot trace what processes agree on."""
    y: Tensor = _uncompiled[0](layer, x)
    return y


_uncompiled: list[Callable[..., Tensor]] = []


def prepare(model: nn.Module) -> None:
    """Make a model with split layers ready, if it has some: see `shards.mend` and `untraced`."""
    if shards.mend(model) and not _uncompiled:
        _uncompiled.append(torch.compiler.disable(lambda layer, x: layer(x)))  # imports the compiler


def base_product(split: shards.Split, x: Tensor, weight: Tensor) -> Tensor:
    """``x Wᵀ`` for one process's part of the weight."""
    if split.of_rows:
        return nn.functional.linear(copied(split.group, x)[0], weight)
    return summed(split.group, nn.functional.linear(x, weight))
