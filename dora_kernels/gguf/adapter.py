"""Write an adapter as a GGUF file, and read it back.

llama.cpp supports LoRA: pairs of tensors ``<name>.lora_a`` and ``<name>.lora_b`` and one ``adapter.lora.alpha``. A
magnitude rescales W, which no low-rank pair can do. So a DoRA adapter stores it as ``<name>.dora_magnitude`` and has
the ``adapter.type`` "dora"; llama.cpp rejects both. For llama.cpp, merge the adapter or use `as_lora`.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dora_kernels.adapters import Adapter, AdapterLayer, extract
from dora_kernels.adapters.adapter import problem_of
from dora_kernels.adapters.beside import check_written
from dora_kernels.core.extras import load
from dora_kernels.core.shown import name_problem, quoted, shown
from dora_kernels.files.replacing import replacing
from dora_kernels.files.storage import as_path, check_tensor
from dora_kernels.functional import merge_dora
from dora_kernels.gguf.header import check_header
from dora_kernels.gguf.layout import ARCHITECTURES, Layout

# Values of this package's own: one per layer, in the order of the first.
MODULES = "adapter.dora.modules"
SCALING = "adapter.dora.scaling"
AXES = "adapter.dora.magnitude_axis"
EPS = "adapter.dora.eps"

# Limit for a model's layers, or heads, because names are made for each.
_MOST_BLOCKS = 10_000

PARTS = (".lora_a", ".lora_b", ".dora_magnitude")

# GGUF's types. Tensors are written as they are, bit for bit.
TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}


def export_adapter(
    source: nn.Module | Adapter, path: str | os.PathLike[str], *, base: Any = None, force: bool = False
) -> None:
    """Write an adapter as a GGUF file.

    `read_adapter` returns it bit for bit. llama.cpp can load it if it is plain LoRA.

    Args:
        source: an adapter, or a transformers model with this package's layers in it (for PEFT's model: `load_adapter`
            of what it saves).
        path: the file. It is first written under a temporary name beside it.
        base: the base model or its configuration; required for an `Adapter`, which does not know its base model.
        force: replace an existing file.

    Raises:
        FileExistsError: `path` exists and `force` is False.
        ImportError: the package `gguf` is missing.
        TypeError: `base` is missing for an `Adapter`.
        ValueError: the model type is not supported; a layer has no name in GGUF, is neither linear nor an embedding, or
            has factors of a dtype that is not in `TYPES`; or layers of a plain LoRA need different alphas, while the
            file has one; or the adapter has tensors in `Adapter.beside`.
    """
    gguf = load("gguf", "gguf", "GGUF files need")

    if isinstance(source, nn.Module):
        base, adapter = source if base is None else base, extract(source)
    else:
        adapter = source
    if base is None:
        raise TypeError(
            "base: required for an Adapter, which does not know its base model; pass the model or its configuration"
        )
    check_written(adapter, "gguf")
    layers = adapter.layers
    if not layers:
        raise ValueError("source: the adapter has no layers")
    layout = Layout.of(getattr(base, "config", base))
    tensors = {}
    for module, name in _weight_names(layout, layers).items():
        tensors.update(_to_file(layout, module, name, layers[module]))
    plain = all(layer.magnitude is None for layer in layers.values())
    with replacing(as_path(path), force=force) as (temporary,):
        writer = gguf.GGUFWriter(temporary, layout.architecture)
        try:
            writer.add_type("adapter")
            writer.add_string(gguf.Keys.Adapter.TYPE, "lora" if plain else "dora")
            if plain:
                writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, _common_alpha(layers))
            writer.add_block_count(layout.blocks)
            writer.add_head_count(layout.heads)
            writer.add_head_count_kv(layout.kv_heads)
            _add_layers(writer, layers)
            for name, tensor in tensors.items():
                kind = gguf.GGMLQuantizationType[TYPES[tensor.dtype]]
                writer.add_tensor(name, tensor.cpu().contiguous().view(torch.uint8).numpy(), raw_dtype=kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()


def read_adapter(path: str | os.PathLike[str]) -> Adapter:
    """Return the adapter in a file that `export_adapter` wrote.

    Raises:
        ImportError: the package `gguf` is missing.
        FileNotFoundError: there is no such file.
        ValueError: it is not a GGUF file, is truncated, lacks the values that `export_adapter` writes, or has tensors
            that are missing, left over, of wrong shapes, not finite, or of a dtype that is not in `TYPES`.
    """
    gguf = load("gguf", "gguf", "GGUF files need")

    file = as_path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    check_header(file)
    try:
        reader = gguf.GGUFReader(file)
    except OSError:
        raise
    except Exception as error:  # damaged bytes can raise anything in the package's reader
        raise ValueError(f"{file}: truncated, or not a GGUF file: {shown(str(error))}") from error

    def value(key: str) -> Any:
        if key not in reader.fields:
            raise ValueError(f"{file}: has no value {key}; only files written by export_adapter can be read")
        try:
            return reader.fields[key].contents()
        except (UnicodeDecodeError, IndexError) as error:
            raise ValueError(f"{file}: {key}: {error}") from error

    def values(key: str, kind: type) -> list[Any]:
        found = value(key)
        if not isinstance(found, list) or not all(type(each) is kind for each in found):
            raise ValueError(f"{file}: {key}: expected a list of {kind.__name__}, got {quoted(found)}")
        return found

    if value("general.type") != "adapter":
        raise ValueError(f"{file}: holds a {shown(str(value('general.type')))}, not an adapter")
    kind = value("general.architecture")
    if kind not in ARCHITECTURES.values():
        raise ValueError(f"{file}: general.architecture: expected {', '.join(ARCHITECTURES)}, got {quoted(kind)}")
    keys = (f"{kind}.block_count", f"{kind}.attention.head_count", f"{kind}.attention.head_count_kv")
    for key in keys:
        if type(value(key)) is not int or not 0 < value(key) <= _MOST_BLOCKS:
            raise ValueError(f"{file}: {key}: expected an int of 1 to {_MOST_BLOCKS}, got {quoted(value(key))}")
    layout = Layout(kind, *(value(key) for key in keys))
    tensors = {tensor.name: _tensor(file, tensor) for tensor in reader.tensors}
    for name, tensor in tensors.items():
        check_tensor(file, name, tensor)
    layers = {}
    modules, axes = values(MODULES, str), values(AXES, str)
    scalings, all_eps = values(SCALING, float), values(EPS, float)
    if not len(set(modules)) == len(modules) == len(scalings) == len(axes) == len(all_eps):
        raise ValueError(f"{file}: {MODULES}, {SCALING}, {AXES} and {EPS}: expected one value of each per layer")
    if set(axes) - {"out", "in"}:
        raise ValueError(f"{file}: {AXES}: expected 'out' or 'in', got {quoted(min(set(axes) - {'out', 'in'}))}")
    if problem := next(filter(None, map(name_problem, modules)), None):
        raise ValueError(f"{file}: {problem}")
    try:
        names = _weight_names(layout, modules)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    for (module, name), scaling, axis, eps in zip(names.items(), scalings, axes, all_eps):
        found = [tensors.pop(name + part, None) for part in PARTS]
        layers[module] = _from_file(layout, f"{file}: {name}", name, found, scaling, axis, eps)
    if tensors:
        raise ValueError(f"{file}: has tensors that belong to no layer: {shown(', '.join(sorted(tensors)[:3]))}")
    return Adapter(layers, format="gguf")


def as_lora(adapter: Adapter, base: nn.Module, rank: int) -> tuple[Adapter, dict[str, float]]:
    """Return the nearest plain LoRA of the given rank, which llama.cpp can load, and how much of the update it misses.

    A DoRA layer changes W by ``(g - 1) * W + g * s * B @ A``, of full rank in general. The best approximation in the
    Frobenius norm keeps the largest `rank` singular values (Eckart and Young). Linear layers only.

    Args:
        adapter: an adapter for `base`.
        base: the model without adapters, or with unmerged ones.
        rank: the rank of every layer of the result.

    Returns:
        The adapter, in float32 with a scaling of 1; and by module ``‖update - B @ A‖ / ‖update‖``, 0 if nothing is
        changed.

    Raises:
        AttributeError: `base` has no module with a layer's name.
        ValueError: a layer is not linear, or smaller than the rank.
    """
    layers, errors = {}, {}
    for name, layer in adapter.layers.items():
        module: Any = base.get_submodule(name)
        weight = getattr(module, "base_layer", module).weight.detach()
        if layer.kind != "linear" or rank > min(weight.shape):
            raise ValueError(
                f"rank: {rank} is not possible for {name}, a layer of kind {layer.kind} and shape {list(weight.shape)}"
            )
        wide = weight.double()
        factors = (layer.lora_A.double(), layer.lora_B.double())
        magnitude = None if layer.magnitude is None else layer.magnitude.double()
        axis, eps = layer.magnitude_axis, layer.eps
        merged = merge_dora(wide, *factors, magnitude, scaling=layer.scaling, magnitude_axis=axis, eps=eps)
        left, values, right = torch.linalg.svd((merged - wide).float(), full_matrices=False)
        root = values[:rank].sqrt()
        total = float(values.norm())
        errors[name] = float(values[rank:].norm()) / total if total else 0.0
        layers[name] = AdapterLayer("linear", root[:, None] * right[:rank], left[:, :rank] * root, None, 1.0)
    note = f"the nearest LoRA of rank {rank} to an adapter of format {adapter.format}"
    return replace(adapter, layers=layers, notes=[*adapter.notes, note]), errors


def _weight_names(layout: Layout, modules: Any) -> dict[str, str]:
    """The GGUF names of these modules' weights."""
    known = layout.names()
    names = {}
    for module in modules:
        name = known.get_name(module)
        if name is None:
            raise ValueError(f"adapter: layer {module} has no name in GGUF's architecture {layout.architecture!r}")
        names[module] = f"{name}.weight"
    return names


def _to_file(layout: Layout, module: str, name: str, layer: AdapterLayer) -> dict[str, Tensor]:
    if layer.kind not in ("linear", "embedding"):
        raise ValueError(
            f"adapter: layer {module} is of kind {layer.kind}; GGUF adapters can have linear and embedding layers"
        )
    # llama.cpp reads rows of an embedding's A by token.
    a = layer.lora_A.t() if layer.kind == "embedding" else layer.lora_A
    tensors = [a, layout.to_file(name, layer.lora_B), layer.magnitude]
    if tensors[2] is not None and layer.magnitude_axis == "out":
        tensors[2] = layout.to_file(name, tensors[2])
    found = {name + part: tensor.detach() for part, tensor in zip(PARTS, tensors) if tensor is not None}
    for tensor in found.values():
        if tensor.dtype not in TYPES:
            raise ValueError(f"adapter: layer {module} is in {tensor.dtype}; expected one of {list(TYPES)}")
    return found


def _from_file(
    layout: Layout, where: str, name: str, found: list[Tensor | None], scaling: float, axis: str, eps: float
) -> AdapterLayer:
    a, b, magnitude = found
    if a is None or b is None:
        raise ValueError(f"{where}{PARTS[0 if a is None else 1]} is missing")
    kind = "embedding" if name == "token_embd.weight" else "linear"
    if kind == "embedding":
        a = a.t().contiguous()
    try:
        b = layout.from_file(name, b)
        if magnitude is not None and axis == "out":
            magnitude = layout.from_file(name, magnitude)
    except RuntimeError as error:
        raise ValueError(f"{where}: {list(b.shape)}: its rows do not fit the attention heads") from error
    layer = AdapterLayer(kind, a, b, magnitude, scaling, axis, eps)
    problem = problem_of(layer)
    if problem is not None:
        raise ValueError(f"{where}: {problem}")
    return layer


def _common_alpha(layers: dict[str, AdapterLayer]) -> float:
    """The alpha that gives every layer's scaling when llama.cpp divides it by the rank, in float32."""
    alphas = {round(layer.scaling * layer.rank, 6): name for name, layer in layers.items()}
    if len(alphas) > 1:
        some = ", ".join(f"{alpha:g} in {name}" for alpha, name in list(alphas.items())[:2])
        raise ValueError(f"adapter: layers need different alphas ({some}), but a GGUF file has only one; see as_lora")
    return next(iter(alphas))


def _add_layers(writer: Any, layers: dict[str, AdapterLayer]) -> None:
    import gguf

    double = gguf.GGUFValueType.FLOAT64
    writer.add_array(MODULES, list(layers))
    writer.add_key_value(SCALING, [layer.scaling for layer in layers.values()], gguf.GGUFValueType.ARRAY, double)
    writer.add_array(AXES, [layer.magnitude_axis for layer in layers.values()])
    writer.add_key_value(EPS, [layer.eps for layer in layers.values()], gguf.GGUFValueType.ARRAY, double)


def _tensor(file: Path, entry: Any) -> Tensor:
    import numpy

    dtype = next((dtype for dtype, name in TYPES.items() if name == entry.tensor_type.name), None)
    if dtype is None:
        known = ", ".join(TYPES.values())
        raise ValueError(f"{file}: {entry.name} is of type {entry.tensor_type.name}; expected one of {known}")
    raw = torch.from_numpy(numpy.array(entry.data).reshape(-1).view(numpy.uint8))
    return raw.view(dtype).reshape([int(size) for size in reversed(entry.shape)])
