"""The base weights of a parameter's adapter: the parameter itself, or a quantised stack that is read by expert."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dora_kernels.core.patterns import is_named, unmatched
from dora_kernels.core.shown import listed
from dora_kernels.engine.dispatch import UnsupportedError, warn_once
from dora_kernels.modules.dequantize import bnb_4bit_elements

_PACKED = frozenset({"Mxfp4GptOssExperts", "FbgemmFp8Llama4TextExperts"})
"""Classes whose own kernels read the packed weights, where an adapter could not run."""


_READ_OUTSIDE = frozenset({"DbrxExpertGLU"})
"""Classes whose parameters the module around them reads, outside their own calls."""


class Quantized:
    """A stack ``[E, N, K]`` whose matrices are dequantised when they are asked for, one at a time.

    Attributes:
        carrier: the packed tensor, which changes if the weights do.
    """

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    carrier: Tensor

    def __init__(self, carrier: Tensor, shape: torch.Size, dtype: torch.dtype, transposed: bool) -> None:
        self.carrier, self.dtype, self.device, self._stored = carrier, dtype, carrier.device, shape
        self.shape = torch.Size((shape[0], shape[2], shape[1])) if transposed else shape
        self._transposed = transposed

    is_meta = False

    def dim(self) -> int:
        return 3

    def __getitem__(self, expert: int) -> Tensor:
        matrix = self._read(expert)
        return matrix.t() if self._transposed else matrix

    def _read(self, expert: int) -> Tensor:
        """The matrix as it is stored."""
        raise NotImplementedError


class Bnb4bit(Quantized):
    """A parameter that bitsandbytes has parametrized (`replace_parameter_4bit`)."""

    def __init__(self, packed: Tensor, state: Any, transposed: bool) -> None:
        super().__init__(packed, torch.Size(state.shape), state.dtype, transposed)
        self._elements = bnb_4bit_elements(packed, state)

    def _read(self, expert: int) -> Tensor:
        _, rows, columns = self._stored
        size = rows * columns
        return self._elements(expert * size, (expert + 1) * size).view(rows, columns)


class BlockScaled(Quantized):
    """float8 weights with a float32 scale for each block (transformers' `FP8Experts`), or for each expert."""

    def __init__(self, weight: Tensor, scale: Tensor) -> None:
        super().__init__(weight, weight.shape, torch.float32, False)
        self._weight, self._scale = weight, scale

    def _read(self, expert: int) -> Tensor:
        matrix, scale = self._weight[expert].float(), self._scale[expert].float()
        if scale.dim() == 2 and scale.shape != (1, 1):
            for dim in (0, 1):
                size = matrix.shape[dim]
                scale = scale.repeat_interleave(-(-size // scale.shape[dim]), dim).narrow(dim, 0, size)
        return matrix.mul_(scale)


def stored(module: nn.Module, name: str, transposed: bool) -> Any:
    """The parameter of a module as it is now, or a `Quantized` stack ``[E, N, K]`` of it.

    Raises:
        UnsupportedError: its format is not known.
    """
    parameter = module._parameters.get(name)
    if parameter is None:  # a replica of `torch.nn.DataParallel`
        parameter = vars(module).get("_former_parameters", {}).get(name)
    if parameter is not None:
        scale = module._parameters.get(f"{name}_scale_inv")
        if parameter.dtype == torch.float8_e4m3fn and scale is not None and parameter.dim() == 3:
            return BlockScaled(parameter, scale)
        return parameter
    state = packing(module, name)
    assert parametrize.is_parametrized(module, name)
    original: Any = module.parametrizations[name].original  # type: ignore[index, union-attr]
    if state is None:
        kinds = ", ".join(type(one).__name__ for one in module.parametrizations[name])  # type: ignore[index, union-attr]
        raise UnsupportedError(
            f"{type(module).__name__}.{name}: parametrized by {kinds}; expected a parameter, or bitsandbytes' 4 bits"
        )
    if len(state.shape) != 3:
        return module.parametrizations[name]()  # type: ignore[index, operator]
    return Bnb4bit(original, state, transposed)


def packing(module: nn.Module, name: str) -> Any:
    """bitsandbytes' quant state of a parametrized parameter, or None."""
    if not parametrize.is_parametrized(module, name):
        return None
    first: Any = module.parametrizations[name][0]  # type: ignore[index, union-attr]
    return first.quant_state if type(first).__name__ == "Bnb4bitParametrization" else None


def unsupported(module: nn.Module, name: str) -> str | None:
    """Return the reason why a parameter's adapter cannot run here, or None if it can."""
    kind = type(module).__name__
    if kind in _PACKED:
        return (
            f"{kind} multiplies by its packed weights in kernels of its own; load the model dequantised "
            "(Mxfp4Config(dequantize=True)), or with bitsandbytes' 4 bits"
        )
    if kind in _READ_OUTSIDE:
        return f"the module around {kind} reads its parameters itself, outside its calls"
    parameter = module._parameters.get(name)
    if parameter is not None:
        if hasattr(parameter, "device_mesh") and f"{name}_scale_inv" in module._parameters:
            return "quantised experts that are split over processes; load the model dequantised"
        if parameter.dim() not in (2, 3):
            return f"its parameter has the shape {list(parameter.shape)}; expected 2 dimensions, or 3 for experts"
        scaled = parameter.dtype == torch.float8_e4m3fn and f"{name}_scale_inv" in module._parameters
        if not parameter.dtype.is_floating_point or (parameter.dtype.itemsize < 2 and not scaled):
            return f"its parameter is {parameter.dtype}; expected float32, bfloat16, float16 or float64, or FP8Experts'"
        if scaled and getattr(getattr(module, "config", None), "_experts_implementation", "eager") != "eager":
            return f"{kind} multiplies by packed weights; call model.set_experts_implementation('eager') first"
    elif parametrize.is_parametrized(module, name) and packing(module, name) is None:
        return "its parameter is parametrized; remove the parametrization first"
    return None


def check_targets(tuner: Any, model: nn.Module, adapter_name: str, *_: Any, **__: Any) -> None:
    """Before PEFT adds an adapter, check its ``target_parameters``.

    Raises ValueError if DoRA cannot run on one of them. Warns of names that no parameter has: PEFT does if none has.
    Warns of parameters that ``exclude_modules`` names: PEFT adapts them all the same.
    """
    config = tuner.peft_config[adapter_name]
    targets = getattr(config, "target_parameters", None)
    if not targets or not getattr(config, "use_dora", False):
        return
    excluded = getattr(config, "exclude_modules", None) or []
    known, kept = [], []
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            continue
        plain = name.replace(".base_layer", "")
        for key in {*module._parameters, *getattr(module, "parametrizations", {})}:
            full = f"{plain}.{key}".removeprefix(".")
            known.append(full)
            if is_named(full, targets):
                check(full, module, key, vars(config))
                if _names(excluded, full) or _names(excluded, plain):
                    kept.append(full)
    if kept:
        warn_once(
            f"exclude_modules: PEFT does not apply it to target_parameters, so {listed(sorted(kept), 3)} get adapters; "
            "name those to be adapted alone in target_parameters"
        )
    if missed := unmatched(targets, known):
        warn_once(f"target_parameters: the model has no {', '.join(missed)}")


def _names(pattern: Any, name: str) -> bool:
    """True if an ``exclude_modules`` names it, as PEFT reads that for modules."""
    if isinstance(pattern, str):
        return re.fullmatch(pattern, name) is not None
    return is_named(name, pattern)


_OF_LAYERS = {"lora_dropout": 0, "velora_config": None, "kasa_config": None}
"""Options that a parameter has no place for, and what they have to be."""

_INITIALISATIONS = "gaussian", "eva"
"""Those besides True and False that read no layer's weight."""


def check(full: str, module: nn.Module, name: str, options: Mapping[str, Any]) -> None:
    """Raise ValueError if a parameter, whose full name is for the message, cannot have a DoRA adapter.

    Args:
        options: those of PEFT's configuration.
    """
    if reason := unsupported(module, name):
        raise ValueError(f"{full}: DoRA cannot run on this parameter: {reason}")
    for option, expected in _OF_LAYERS.items():
        if options.get(option):
            raise ValueError(f"{full}: {option}: expected {expected} for a parameter, got {options[option]!r}")
    start = options.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower() not in _INITIALISATIONS:
        known = ", ".join(map(repr, (True, False, *_INITIALISATIONS)))
        raise ValueError(f"{full}: init_lora_weights: expected one of {known} for a parameter, got {start!r}")
