"""Adapters of parameters in a file: which parameter each key is of, and whether its tensors fit.

PEFT wraps a module once for each of its targeted parameters, in the order in which the module has them, so a key says
only how deep its wrapper lies: ``experts.base_layer.lora_A`` is of the first of two parameters, ``experts.lora_A`` of
the last.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import peft
from peft.tuners import lora
from torch import Tensor, nn

from dora_kernels.core.patterns import is_named
from dora_kernels.core.shown import quoted
from dora_kernels.files import pairs
from dora_kernels.modules.stand_in import is_transposed
from dora_kernels.peft.experts import STOCK
from dora_kernels.peft.stacks import packing

_INSIDE = ".base_layer"

_EXCHANGES = pairs.before_exchange({"peft_version": peft.__version__}, {})
"""True if this version of PEFT exchanges A and B of a stack ``[E, out, in]``."""


class Parameter(NamedTuple):
    """A targeted parameter of a module."""

    name: str
    """Its full name, ``model.layers.0.mlp.experts.down_proj``."""
    shape: tuple[int, ...] | None
    """``[E, out, in]`` or ``[out, in]``; None without a model."""
    columns: int = 0
    """The columns of A in the layout of the PEFT that is installed; 0 if unknown."""
    moved: bool = False
    """True if PEFT 0.19 has exchanged A and B for it, against the versions before."""


def of_file(
    modules: Iterable[str], model: nn.Module | None, file: Path, config_file: Path, config: dict[str, Any]
) -> dict[str, Parameter]:
    """Return the parameters of the file's modules, by module as its keys name it; empty if it targets none.

    Raises:
        ValueError: ``target_parameters`` is not a list of names; or a module of the model has more or fewer targeted
            parameters than the file has.
    """
    targets = config.get("target_parameters") or []
    if not isinstance(targets, list) or not all(isinstance(one, str) for one in targets):
        raise ValueError(f"{config_file}: target_parameters: expected a list of names, got {quoted(targets)}")
    if not targets:
        return {}
    if model is None:
        return {module: Parameter(module, None) for module in modules}
    found: dict[str, Parameter] = {}
    held: dict[str, list[Parameter]] = {}
    for name, module in model.named_modules():
        if isinstance(module, STOCK | lora.LoraLayer) and not isinstance(module, STOCK):
            continue
        plain = name.removeprefix("base_model.model.").replace(_INSIDE, "")
        for key, size in _targeted(module, plain, targets):
            shape = list(size)
            moved = len(shape) == 3 and not getattr(module, "is_transposed", False)
            columns = shape[1] if len(shape) == 3 and not (moved and not _EXCHANGES) else shape[-1]
            if len(shape) == 3 and is_transposed(module):
                shape[1:] = shape[:0:-1]
            held.setdefault(plain, []).append(Parameter(f"{plain}.{key}", tuple(shape), columns, moved))
    names = set(modules)
    for name, own in held.items():
        keys = [name + _INSIDE * depth for depth in reversed(range(len(own)))]
        missing = [parameter.name for key, parameter in zip(keys, own) if key not in names]
        if missing:
            raise ValueError(
                f"{file}: has no tensors for {missing[0]}, which its configuration's target_parameters name"
            )
        found.update(zip(keys, own))
    return found


def _targeted(module: nn.Module, name: str, targets: list[str]) -> Iterator[tuple[str, Iterable[int]]]:
    """Yield a module's targeted parameters and their shapes in PEFT's order, in which the first lies inside.

    Parametrized ones, as 4-bit experts are, PEFT takes by their full names, sorted.
    """
    if hasattr(module, "parametrizations"):
        for target in sorted(set(targets)):
            holder, _, key = target.rpartition(".")
            held = module._parameters.get(key)
            held = packing(module, key) if held is None else held
            if holder == name and held is not None:
                yield key, held.shape
        return
    for key, parameter in module._parameters.items():
        full = f"{name}.{key}"
        if parameter is not None and is_named(full, targets):
            yield key, parameter.shape


def is_stack(parameter: Parameter, parts: dict[str, Tensor], ranks: list[Any]) -> bool:
    """True if the tensors are to be those of a stack: by the model, or by the magnitude."""
    m = parts.get("lora_magnitude_vector")
    if m is None or parameter.shape is not None:
        return m is not None and len(parameter.shape or ()) == 3
    return m.dim() == 2 or (parts.keys() >= {"lora_A", "lora_B"} and list(m.shape) in _flat(parts, ranks))


def _counts(a: Tensor, ranks: list[Any]) -> list[int]:
    """The numbers of experts that the rows of A may be of."""
    return [a.shape[0] // r for r in ranks if isinstance(r, int) and 0 < r <= a.shape[0] and not a.shape[0] % r]


def _flat(parts: dict[str, Tensor], ranks: list[Any]) -> list[list[int]]:
    """The shapes of a stack's magnitude that has lost a dimension."""
    a, b = parts["lora_A"], parts["lora_B"]
    sizes = (b.shape[0], a.shape[1]) if a.dim() == b.dim() == 2 else ()
    return [[count * size] for count in _counts(a, ranks) for size in sizes if count != 1]


def check_parts(file: Path, parameter: Parameter, parts: dict[str, Tensor], ranks: list[Any]) -> None:
    """Raise ValueError if the tensors of a stack's adapter do not fit together, or have none of the ranks."""
    missing = {"lora_A", "lora_B"} - parts.keys()
    if missing:
        raise ValueError(f"{file}: {parameter.name} has no {', '.join(sorted(missing))}")
    a, b, m = parts["lora_A"], parts["lora_B"], parts["lora_magnitude_vector"]
    counts, rank = _counts(a, ranks), " or ".join(map(quoted, ranks))
    count = m.shape[0] if m.dim() == 2 and a.dim() == 2 and m.shape[1] in (b.shape[0], a.shape[1]) else 0
    if a.dim() != 2 or not counts or count not in (0, *counts):
        experts = f"{count} experts" if count else "the experts"
        raise ValueError(
            f"{file}: {parameter.name}: lora_A {list(a.shape)}: expected {experts} times the configuration's rank, "
            f"{rank}, in the first dimension"
        )
    if b.dim() != 2 or b.shape[1] != a.shape[0]:
        raise ValueError(f"{file}: {parameter.name}: lora_B {list(b.shape)} does not fit lora_A {list(a.shape)}")
    if not count:
        raise ValueError(
            f"{file}: {parameter.name}: lora_magnitude_vector {list(m.shape)}: expected [{counts[0]}, {b.shape[0]}], "
            "one value for each output of each expert"
        )


def check_sizes(file: Path, stacks: dict[str, Parameter], modules: dict[str, dict[str, Tensor]], before: bool) -> None:
    """Raise ValueError if a parameter of the model has other sizes than the file's adapter of it, or another layout.

    Args:
        before: True if the file is of PEFT before 0.19, as far as its configuration tells.
    """
    columns = {key: modules[key]["lora_A"].shape[1] for key, each in stacks.items() if each.moved}
    square = {key for key in columns if columns[key] == modules[key]["lora_B"].shape[0]}
    others = [columns[key] != stacks[key].columns for key in columns if key not in square]
    of_other = any(others) if others else before != _EXCHANGES
    for key, parameter in stacks.items():
        shape, parts = parameter.shape, modules[key]
        if shape is None:
            continue
        m, sizes = parts["lora_magnitude_vector"], {parts["lora_A"].shape[1], parts["lora_B"].shape[0]}
        if tuple(m.shape) != shape[:-1] or sizes != set(shape[-2:]):
            raise ValueError(
                f"{file}: {parameter.name}: lora_A {list(parts['lora_A'].shape)}, lora_B {list(parts['lora_B'].shape)} "
                f"and magnitude {list(m.shape)} belong to another parameter than the model's {list(shape)}"
                f"{_turned(parameter, m.shape[0], sizes, stacks.values())}"
            )
        if parameter.moved and (of_other if key in square else columns[key] != parameter.columns):
            raise ValueError(
                f"{file}: {parameter.name}: lora_A {list(parts['lora_A'].shape)} and lora_B are exchanged, as PEFT "
                f"{'from 0.19 on' if _EXCHANGES else 'before 0.19'} saves them; expected those of "
                f"PEFT {peft.__version__}, which would load these without a word if the parameter were square"
            )


def _turned(parameter: Parameter, count: int, sizes: set[int], others: Iterable[Parameter]) -> str:
    """The end of the sentence about tensors that fit another parameter of the module, or nothing."""
    holder = parameter.name.rpartition(".")[0]
    others = (one for one in others if one.name != parameter.name and one.name.rpartition(".")[0] == holder)
    if any((count, sizes) == (other.shape[0], set(other.shape[-2:])) for other in others if other.shape):
        return (
            ", but fit its module's other one: PEFT nests the parameters of 4-bit experts the other way round; "
            "`dora-kernels convert --to peft` writes such a file for whole ones, and load_adapter reads it"
        )
    return ""
