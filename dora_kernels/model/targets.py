"""Choose the layers to adapt: name patterns, and layers that cannot be adapted."""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Collection, Iterable
from typing import Any

from torch import nn

from dora_kernels.core import validation
from dora_kernels.core.patterns import compiled, is_named, unmatched
from dora_kernels.core.shown import listed
from dora_kernels.model.places import named_modules, parameter_name, parents_of, unwrapped
from dora_kernels.model.weight_readers import WeightReaders
from dora_kernels.modules import (
    AdaptedLayer,
    DoRAConv1d,
    DoRAConv2d,
    DoRAConv3d,
    DoRAEmbedding,
    DoRAExperts,
    DoRALinear,
    LoRAExperts,
    LoRALinear,
)
from dora_kernels.modules.conv import CANNOT_BE_MERGED
from dora_kernels.modules.linear import is_conv1d

_KINDS: dict[type[nn.Module], type[AdaptedLayer]] = {
    nn.Linear: DoRALinear,
    nn.Embedding: DoRAEmbedding,
    nn.Conv1d: DoRAConv1d,
    nn.Conv2d: DoRAConv2d,
    nn.Conv3d: DoRAConv3d,
}


def chosen(
    model: nn.Module,
    places: dict[nn.Module, list[str]],
    target_modules: str | Iterable[str],
    exclude_modules: str | Iterable[str] | None,
    use_dora: bool,
    adapted: Collection[str],
) -> tuple[dict[nn.Module, str], list[str]]:
    """Return the layers that the patterns match, each with the first of its names that matches, and a list of warnings.

    Args:
        adapted: the names of stacks that `target_parameters` adapt.

    Raises:
        TypeError, ValueError: as `dora_kernels.apply_dora`, for the patterns and the matched layers.
    """
    everything = isinstance(target_modules, str) and target_modules.lower() == "all-linear"
    targets = [] if everything else _pattern(target_modules, "target_modules")
    excluded = [] if exclude_modules is None else _pattern(exclude_modules, "exclude_modules")
    skipped = _no_linear_layers(model, places) if everything else set()
    readers = WeightReaders()
    found, dropped = {}, 0
    for module, names in places.items():
        if module in skipped:
            continue
        named = [name for name in names if name and (_is_linear(module) if everything else _matches(targets, name))]
        kept = [name for name in named if not _matches(excluded, name)]
        if kept:
            found[module] = kept[0]
        dropped += bool(named and not kept)
    stacks = {name: sizes for name, sizes in _stacks(model).items() if everything or _matches(targets, name)}
    left = [f"{name} {sizes}" for name, sizes in stacks.items() if name not in adapted]
    beside = f"{listed(left, 3)}: three-dimensional parameters (stacked experts) are adapted by target_parameters"
    if not found:
        end = f"; {beside}" if left else ""
        raise _nothing(model, places, target_modules, exclude_modules if dropped else None, use_dora, end)
    left_out: dict[str, list[str]] = {}
    for module, name in list(found.items()):
        check_bare(model, module, name)
        problem = _problem(model, module, name, use_dora, readers)
        if problem is None:
            check_loaded(module, name)
        elif everything:
            del found[module]
            left_out.setdefault(str(problem), []).append(name)
        else:
            raise type(problem)(f"{name}: {problem}; leave it out with exclude_modules=[{name!r}]")
    reasons = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in left_out.items())
    if not found:
        raise ValueError(f"target_modules: 'all-linear' finds no layer that can be adapted: {reasons}")
    known = [name for names in places.values() for name in names if name]
    missed = _unmatched(targets, [*known, *stacks], "target_modules") + _unmatched(excluded, known, "exclude_modules")
    notes = [f"'all-linear' leaves out {reasons}"] if left_out else []
    if left:
        notes.append(f"{repr('all-linear') if everything else 'target_modules'} leaves out {beside}")
    return found, notes + missed


def _stacks(model: nn.Module) -> dict[str, list[int]]:
    """The shapes, by name, of parameters that stack several matrices, as many linear layers in one.

    Skips torch's own layers.
    """
    return {
        parameter_name(name, key): list(parameter.shape)
        for name, module in named_modules(model)
        if not type(module).__module__.startswith("torch.") and not isinstance(module, AdaptedLayer)
        for key, parameter in module._parameters.items()
        if parameter is not None and parameter.dim() == 3 and min(parameter.shape) > 1
        and key not in {layer.parameter for layer in _stack_layers(model, module, name)}
    }  # fmt: skip


def _nothing(
    model: nn.Module, places: dict[nn.Module, list[str]], target_modules: Any, excluded: Any, use_dora: bool, end: str
) -> ValueError:
    """The error that says why no layer matches. `end` is more to say of layers that do not."""
    if type(model) in _KINDS or is_conv1d(model):
        kind = kind_of(model, use_dora)
        make = "from_linear" if issubclass(kind, LoRALinear) else "from_base"
        return ValueError(
            f"model: it is itself a layer, so there is no parent to replace it in; use {kind.__name__}.{make}(model, "
            "...)"
        )
    if excluded is not None:
        return ValueError(
            f"exclude_modules: {excluded!r} excludes every layer that target_modules={target_modules!r} matches"
        )
    some = ", ".join(name for names in places.values() for name in names[:1] if name and len(name) < 60)[:300]
    return ValueError(f"target_modules: {target_modules!r} matches no layer of the model; it has {some}{end}")


def _pattern(value: Any, argument: str) -> re.Pattern[str] | list[str]:
    if isinstance(value, str):
        return compiled(value, argument)
    try:
        names = list(value)
    except TypeError:
        names = [None]
    if not all(isinstance(one, str) for one in names):
        raise TypeError(f"{argument}: expected a regular expression or names, got {value!r}")
    return names


def _matches(pattern: re.Pattern[str] | list[str], name: str) -> bool:
    if isinstance(pattern, re.Pattern):
        return pattern.fullmatch(name) is not None
    return is_named(name, pattern)


def _unmatched(pattern: re.Pattern[str] | list[str], names: list[str], argument: str) -> list[str]:
    """One sentence for each part of a pattern that matches no name."""
    if isinstance(pattern, re.Pattern):
        missed = [] if any(map(pattern.fullmatch, names)) else [repr(pattern.pattern)]
    else:
        missed = unmatched(pattern, names)
    return [f"{argument}: the model has no {', '.join(missed)}"] if missed else []


def _is_linear(module: nn.Module) -> bool:
    """True for linear layers, including other libraries' (e.g. quantised ones), so that these are reported."""
    sizes = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    alike = all(isinstance(size, int) for size in sizes) and not module._modules
    return isinstance(module, nn.Linear | LoRALinear) or is_conv1d(module) or alike


def _no_linear_layers(model: nn.Module, places: dict[nn.Module, list[str]]) -> set[nn.Module]:
    """The modules that "all-linear" leaves out."""
    skipped = {
        child
        for module in places
        if isinstance(module, AdaptedLayer)
        for child in module.modules()
        if child is not module
    }
    output = getattr(model, "get_output_embeddings", None)
    head = output() if callable(output) else None
    return skipped if head is None else {*skipped, unwrapped(head)}


def kind_of(module: nn.Module, use_dora: bool) -> type[AdaptedLayer]:
    kind = DoRALinear if is_conv1d(module) else _KINDS[type(module)]
    return LoRALinear if kind is DoRALinear and not use_dora else kind


def adapted_layer(module: nn.Module, name: str, use_dora: bool, **options: Any) -> AdaptedLayer:
    """Make the adapted layer of a module (`from_base`). Errors name the layer; its own warnings are suppressed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", re.escape(f"groups: {CANNOT_BE_MERGED}"))
        try:
            return kind_of(module, use_dora).from_base(module, **options)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from error


def chosen_stacks(
    model: nn.Module, places: dict[nn.Module, list[str]], target_parameters: Iterable[str] | None
) -> dict[nn.Module, list[str]]:
    """Return the stacks' full names, in their modules' order, by what is to lie just inside their layers.

    That is the module that has them, or the layer of the stack before them: the last parameter of a module is
    outermost, as in PEFT. What lies further inside comes first.

    Raises:
        TypeError: the names are not names, or a parameter is no stack ``[experts, out, in]`` in a dtype to train in.
        ValueError: a name matches no parameter, or one that is adapted already or parametrized, or without values.
    """
    if target_parameters is None:
        return {}
    targets = _pattern(target_parameters, "target_parameters")
    if not isinstance(targets, list):
        raise TypeError(f"target_parameters: expected a list of names, got {target_parameters!r}")
    found: dict[nn.Module, list[str]] = {}
    known = []
    for module, names in places.items():
        order = list(module._parameters)
        for key, parameter in module._parameters.items():
            name = parameter_name(names[0], key)
            if parameter is None or isinstance(module, AdaptedLayer):
                continue
            known.append(name)
            if not _matches(targets, name):
                continue
            layers = _stack_layers(model, module, names[0])
            others = [layer for layer in layers if layer.parameter != key]
            check_bare(model, module, names[0], name, others)
            if "." not in name:
                raise ValueError(
                    f"model: it is itself the module of {name}, so there is no parent to replace it in; use "
                    f"DoRAExperts(model, {key!r}, ...)"
                )
            if parameter.dim() != 3:
                way_out = ""
                if type(module) in _KINDS:
                    way_out = "; it is a layer's weight: name the layer in target_modules"
                elif parameter.dim() == 2:
                    way_out = "; a parameter of two dimensions, such as a router's, is adapted under PEFT only"
                shape = list(parameter.shape)
                raise TypeError(f"{name}: expected a stack of experts with 3 dimensions, got {shape}{way_out}")
            if parameter.dtype not in validation.DTYPES:
                raise TypeError(f"{name}: expected float32, bfloat16, float16 or float64, got {parameter.dtype}")
            if _is_sharded(parameter):
                raise TypeError(f"{name}: {_SHARDED}")
            if type(parameter) is not nn.Parameter:
                raise TypeError(f"{name}: expected an nn.Parameter, got {type(parameter).__name__}")
            if parameter.is_meta:
                raise ValueError(f"{name}: it is on the meta device, without values; load the weights first")
            before = [layer for layer in others if order.index(layer.parameter) < order.index(key)]
            found.setdefault(before[-1] if before else module, []).append(name)
        for key in getattr(module, "parametrizations", {}):
            if _matches(targets, name := parameter_name(names[0], key)):
                raise ValueError(f"{name}: it is parametrized; quantised experts can be adapted through PEFT only")
    missed = _unmatched(targets, known, "target_parameters")
    if missed:
        raise ValueError(missed[0])
    return found


def _stack_layers(model: nn.Module, module: nn.Module, place: str) -> list[LoRAExperts]:
    """The layers of a module's stacks, innermost first."""
    around = itertools.takewhile(lambda parent: isinstance(parent, LoRAExperts), parents_of(model, place))
    return [layer for layer in around if isinstance(layer, LoRAExperts) and layer._holder() is module]


def adapted_stack(module: nn.Module, name: str, use_dora: bool, **options: Any) -> AdaptedLayer:
    """Make the adapted layer of a parameter, around its module or around the layer of another of its parameters."""
    kind = DoRAExperts if use_dora else LoRAExperts
    try:
        return kind(module, name.rpartition(".")[2], **options).train(module.training)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from error


def check_layer(model: nn.Module, module: nn.Module, name: str, use_dora: bool, readers: WeightReaders) -> None:
    """Raise if the layer may not be replaced, or if its values are not there or not finite."""
    check_bare(model, module, name)
    problem = _problem(model, module, name, use_dora, readers)
    if problem is not None:
        raise type(problem)(f"{name}: {problem}")
    check_loaded(module, name)


def check_bare(
    model: nn.Module, module: nn.Module, place: str, name: str | None = None, allowed: Collection[nn.Module] = ()
) -> None:
    """Raise if the layer at a place has an adapter already.

    Args:
        name: for the message, of a parameter of the layer.
        allowed: layers that may be around it.
    """
    name, what = (place, "layer") if name is None else (name, "parameter")
    around = [each for each in [module, *parents_of(model, place)] if each not in allowed]
    if any(isinstance(one, AdaptedLayer) for one in around):
        raise ValueError(f"{name}: the {what} is adapted already")
    if any(cls.__module__.startswith("peft.") for one in around for cls in type(one).__mro__):
        raise ValueError(
            f"{name}: the {what} is adapted already, by PEFT; use dora_kernels.patch_peft for PEFT's adapters"
        )


def _problem(
    model: nn.Module, module: nn.Module, name: str, use_dora: bool, readers: WeightReaders
) -> Exception | None:
    """Return the error, without the layer's name, if a layer without adapter cannot get one; else None."""
    parents = parents_of(model, name)
    parent, kind = parents[0], f"{type(module).__module__}.{type(module).__name__}"
    held = parent._modules[name.rpartition(".")[2]]
    if held is not module:
        return ValueError(f"the layer is wrapped by itself ({type(held).__name__}); adapt it before wrapping it")
    if nn.utils.parametrize.is_parametrized(module):
        return ValueError("the layer is parametrized; remove the parametrization first")
    weight = module._parameters.get("weight")
    if _is_sharded(weight):
        return TypeError(_SHARDED)
    if _is_quantised(module, weight):
        of = "" if weight is None else f", weight {type(weight).__name__}"
        return TypeError(
            f"the layer is quantised ({kind}{of}); use PEFT to adapt it, and dora_kernels.patch_peft to run that"
        )
    if type(module) not in _KINDS and not is_conv1d(module):
        if isinstance(module, nn.Linear) and (reader := readers.of(parents, name)) is not None:
            return TypeError(f"{type(reader).__name__} reads the weight itself, so the adapter would not run")
        return TypeError(f"expected a plain nn.Linear, Embedding, Conv1d, Conv2d, Conv3d or GPT-2's Conv1D, got {kind}")
    if not use_dora and kind_of(module, use_dora) is not LoRALinear:
        return TypeError(f"use_dora=False is for linear layers, got {kind}")
    if weight is None:
        makers = ", ".join(type(hook).__name__ for hook in module._forward_pre_hooks.values()) or "something else"
        return ValueError(
            f"the weight is not a parameter, but computed in each forward by {makers} (nn.utils.weight_norm, "
            "spectral_norm, prune); remove that first"
        )
    if weight.dtype not in validation.DTYPES:
        return TypeError(f"expected a weight in float32, bfloat16, float16 or float64, got {weight.dtype}")
    if _hooked(module):
        return ValueError("the layer has hooks or a replaced forward, which would no longer run")
    if (reader := readers.of(parents, name)) is not None:
        kernels = f"{type(reader).__name__} reads the weight itself in some of its kernels"
        return TypeError(f"{kernels}, where the adapter would not run")
    return None


_SHARDED = (
    "the layer is sharded; adapt the model before sharding it, or use PEFT and dora_kernels.patch_peft_globally() on a "
    "tensor-parallel model"
)


def _is_sharded(weight: Any) -> bool:
    return type(weight).__name__ == "DTensor"


def _is_quantised(module: nn.Module, weight: nn.Parameter | None) -> bool:
    """True if the layer's class is from a quantisation library, or its weight is of a tensor subclass."""
    if any(cls.__module__.partition(".")[0] in ("bitsandbytes", "hqq") for cls in type(module).__mro__):
        return True
    return weight is not None and type(weight) is not nn.Parameter and not nn.parameter.is_lazy(weight)


def _hooked(module: nn.Module) -> bool:
    own = vars(module)
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return "forward" in own or any(own[one] for one in hooks)


def check_loaded(layer: Any, name: str) -> None:
    """Raise if the weight of a base layer is on the meta device or not finite."""
    if layer.weight.is_meta:
        raise ValueError(f"{name}: its weight is on the meta device, without values; load the weights first")
