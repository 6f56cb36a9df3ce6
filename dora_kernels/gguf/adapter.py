"""An adapter as a GGUF file, and back.

llama.cpp knows LoRA: pairs of tensors ``<name>.lora_a`` and ``<name>.lora_b`` and one ``adapter.lora.alpha``. A magnitude
rescales the rows of W, which no low-rank pair can, so a DoRA adapter carries it as ``<name>.dora_magnitude`` and names
itself "dora" in ``adapter.type``: llama.cpp refuses either. Merge it, or take `as_lora`, for llama.cpp.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dora_kernels.adapters import Adapter, AdapterLayer
from dora_kernels.functional import merge_dora
from dora_kernels.gguf.layout import Layout, replacing

# Values of this package's own, one a layer, in the order of the first.
MODULES = "adapter.dora.modules"
SCALING = "adapter.dora.scaling"
AXES = "adapter.dora.magnitude_axis"
EPS = "adapter.dora.eps"

PARTS = (".lora_a", ".lora_b", ".dora_magnitude")

# GGUF's type of each: written as they are, bit for bit.
TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}


def export_adapter(
    source: nn.Module | Adapter, path: str | os.PathLike[str], *, base: Any = None, force: bool = False
) -> None:
    """Write an adapter as a GGUF file. `read_adapter` gives it back bit for bit; llama.cpp loads it if it is plain LoRA.

    Args:
        source: an adapter, or a transformers model that has one.
        path: the file; written under a temporary name beside it first.
        base: the base model or its configuration; needed for an `Adapter`, which does not say whose it is.
        force: replace an existing file.

    Raises:
        FileExistsError: `path` exists, and not `force`.
        ImportError: the package `gguf` is missing.
        TypeError: no `base` for an `Adapter`.
        ValueError: a model type that GGUF files cannot hold here; a layer that has no name in GGUF, is neither linear
            nor an embedding, or has factors of another dtype than `TYPES`; plain LoRA whose layers need different
            alphas, of which the file has one.
    """
    import gguf

    if isinstance(source, nn.Module):
        from dora_kernels.adapters import extract

        base, source = source if base is None else base, extract(source)
    if base is None:
        raise TypeError("base: an Adapter does not say whose it is; give the base model or its configuration")
    if not source.layers:
        raise ValueError("source: an adapter with no layers")
    layout = Layout.of(getattr(base, "config", base))
    tensors = {}
    for module, name in _weight_names(layout, source.layers).items():
        tensors.update(_to_file(layout, module, name, source.layers[module]))
    plain = all(layer.magnitude is None for layer in source.layers.values())
    with replacing(path, force) as temporary:
        writer = gguf.GGUFWriter(temporary, layout.architecture)
        try:
            writer.add_type("adapter")
            writer.add_string(gguf.Keys.Adapter.TYPE, "lora" if plain else "dora")
            if plain:
                writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, _common_alpha(source.layers))
            writer.add_block_count(layout.blocks)
            writer.add_head_count(layout.heads)
            writer.add_head_count_kv(layout.kv_heads)
            _add_layers(writer, source.layers)
            for name, tensor in tensors.items():
                kind = gguf.GGMLQuantizationType[TYPES[tensor.dtype]]
                writer.add_tensor(name, tensor.cpu().contiguous().view(torch.uint8).numpy(), raw_dtype=kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()


def read_adapter(path: str | os.PathLike[str]) -> Adapter:
    """The adapter in a file that `export_adapter` wrote.

    Raises:
        ImportError: the package `gguf` is missing.
        ValueError: not a GGUF file, cut short, without the values that `export_adapter` writes, or with tensors that
            are missing, left over, or of another dtype than `TYPES`.
    """
    import gguf

    try:
        reader = gguf.GGUFReader(path)
    except FileNotFoundError:
        raise
    except Exception as error:  # whatever the bytes make of the package's reader
        raise ValueError(f"path: {os.fspath(path)} cannot be read as GGUF: {error}") from error

    def value(key: str) -> Any:
        if key not in reader.fields:
            raise ValueError(f"path: {os.fspath(path)} has no value {key}; only files of export_adapter are read")
        return reader.fields[key].contents()

    if value("general.type") != "adapter":
        raise ValueError(f"path: {os.fspath(path)} holds a {value('general.type')}, not an adapter")
    kind = value("general.architecture")
    keys = (f"{kind}.block_count", f"{kind}.attention.head_count", f"{kind}.attention.head_count_kv")
    layout = Layout(kind, *(value(key) for key in keys))
    tensors = {tensor.name: _tensor(tensor) for tensor in reader.tensors}
    layers = {}
    names = _weight_names(layout, value(MODULES))
    for (module, name), scaling, axis, eps in zip(names.items(), value(SCALING), value(AXES), value(EPS)):
        found = [tensors.pop(name + part, None) for part in PARTS]
        layers[module] = _from_file(layout, module, name, found, scaling, axis, eps)
    if tensors:
        raise ValueError(f"path: {os.fspath(path)} has tensors of no layer: {', '.join(sorted(tensors)[:3])}")
    return Adapter(layers, format="gguf")


def as_lora(adapter: Adapter, base: nn.Module, rank: int) -> tuple[Adapter, dict[str, float]]:
    """The nearest plain LoRA of that rank, which llama.cpp loads, and how much of the update it misses.

    A DoRA layer changes W by ``(g - 1) * W + g * s * B @ A``, of full rank in general; its best approximation in the
    Frobenius norm keeps the largest `rank` singular values (Eckart and Young). Linear layers only.

    Args:
        adapter: for `base`.
        base: the model without adapters, or with them unmerged.
        rank: of the result, in every layer.

    Returns:
        The adapter, in float32 with a scaling of 1; by module, ``‖update - B @ A‖ / ‖update‖``, 0 where nothing is
        changed.

    Raises:
        AttributeError: `base` has no module of a layer's name.
        ValueError: a layer that is not linear, or smaller than the rank.
    """
    layers, errors = {}, {}
    for name, layer in adapter.layers.items():
        module: Any = base.get_submodule(name)
        weight = getattr(module, "base_layer", module).weight.detach()
        if layer.kind != "linear" or rank > min(weight.shape):
            raise ValueError(f"rank: {rank} is not possible for {name}, {layer.kind} of shape {list(weight.shape)}")
        wide = weight.double()
        factors = (layer.lora_A.double(), layer.lora_B.double())
        magnitude = None if layer.magnitude is None else layer.magnitude.double()
        merged = merge_dora(wide, *factors, magnitude, scaling=layer.scaling, magnitude_axis=layer.magnitude_axis)
        left, values, right = torch.linalg.svd((merged - wide).float(), full_matrices=False)
        root = values[:rank].sqrt()
        total = float(values.norm())
        errors[name] = float(values[rank:].norm()) / total if total else 0.0
        layers[name] = AdapterLayer("linear", root[:, None] * right[:rank], left[:, :rank] * root, None, 1.0)
    note = f"the nearest LoRA of rank {rank} to an adapter of format {adapter.format}"
    return replace(adapter, layers=layers, notes=[*adapter.notes, note]), errors


def _weight_names(layout: Layout, modules: Any) -> dict[str, str]:
    """GGUF's names of these modules' weights."""
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
        raise ValueError(f"adapter: layer {module} is of kind {layer.kind}; GGUF adapters have linear and embedding")
    # llama.cpp takes rows of an embedding's A by token.
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
    layout: Layout, module: str, name: str, found: list[Tensor | None], scaling: float, axis: str, eps: float
) -> AdapterLayer:
    a, b, magnitude = found
    if a is None or b is None:
        raise ValueError(f"adapter: layer {module} lacks the tensor {name}{PARTS[0 if a is None else 1]}")
    kind = "embedding" if name == "token_embd.weight" else "linear"
    if kind == "embedding":
        a = a.t().contiguous()
    if magnitude is not None and axis == "out":
        magnitude = layout.from_file(name, magnitude)
    if a.shape[0] != b.shape[1]:
        raise ValueError(f"adapter: layer {module} has the ranks {a.shape[0]} and {b.shape[1]} in its two factors")
    return AdapterLayer(kind, a, layout.from_file(name, b), magnitude, scaling, axis, eps)


def _common_alpha(layers: dict[str, AdapterLayer]) -> float:
    """What llama.cpp divides by the rank, in float32, to get every layer's scaling."""
    alphas = {round(layer.scaling * layer.rank, 6): name for name, layer in layers.items()}
    if len(alphas) > 1:
        raise ValueError(
            f"adapter: its layers need different alphas ({', '.join(f'{a:g} in {n}' for a, n in list(alphas.items())[:2])}"
            "); a GGUF file has one. as_lora gives one that all share"
        )
    return next(iter(alphas), 0.0)


def _add_layers(writer: Any, layers: dict[str, AdapterLayer]) -> None:
    import gguf

    double = gguf.GGUFValueType.FLOAT64
    writer.add_array(MODULES, list(layers))
    writer.add_key_value(SCALING, [layer.scaling for layer in layers.values()], gguf.GGUFValueType.ARRAY, double)
    writer.add_array(AXES, [layer.magnitude_axis for layer in layers.values()])
    writer.add_key_value(EPS, [layer.eps for layer in layers.values()], gguf.GGUFValueType.ARRAY, double)


def _tensor(entry: Any) -> Tensor:
    import numpy

    dtype = next((dtype for dtype, name in TYPES.items() if name == entry.tensor_type.name), None)
    if dtype is None:
        raise ValueError(f"adapter: tensor {entry.name} is of type {entry.tensor_type.name}; expected {list(TYPES.values())}")
    raw = torch.from_numpy(numpy.array(entry.data).reshape(-1).view(numpy.uint8))
    return raw.view(dtype).reshape([int(size) for size in reversed(entry.shape)])
