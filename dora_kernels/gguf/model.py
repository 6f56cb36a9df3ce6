"""Write a merged model as a GGUF file."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dora_kernels.core.extras import load
from dora_kernels.files.replacing import replacing
from dora_kernels.files.storage import as_path
from dora_kernels.gguf.layout import INTERLEAVED, Layout
from dora_kernels.gguf.tokenizer import add_tokenizer

# GGUF's types of files and tensors that the `gguf` package can write.
DTYPES = {
    "f32": ("ALL_F32", "F32"),
    "f16": ("MOSTLY_F16", "F16"),
    "bf16": ("MOSTLY_BF16", "BF16"),
    "q8_0": ("MOSTLY_Q8_0", "Q8_0"),
    "q5_1": ("MOSTLY_Q5_1", "Q5_1"),
    "q5_0": ("MOSTLY_Q5_0", "Q5_0"),
    "q4_1": ("MOSTLY_Q4_1", "Q4_1"),
    "q4_0": ("MOSTLY_Q4_0", "Q4_0"),
}

_MERGE_FIRST = "merge first: model = model.merge_and_unload() for PEFT, merge_all(model) for this package's layers"


def export_model(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    dtype: str = "f32",
    force: bool = False,
) -> None:
    """Write a transformers model (Llama, Mistral or Qwen 2) as a GGUF file, in the layout of llama.cpp's own converter.

    Matrices are stored as `dtype`, vectors as float32. With a quantized dtype, matrices whose rows are not a multiple
    of its blocks of 32 are stored as float16. One tensor is converted at a time. A scaled rotary embedding ("llama3",
    "linear") is written as llama.cpp reads it; transformers' GGUF loader does not read it.

    Args:
        model: a model without adapters. Frozen or tied parameters make no difference.
        path: the file. It is first written under a temporary name beside it.
        tokenizer: a fast tokenizer of byte-level BPE. Without one the file has no vocabulary and accepts token ids
            only.
        dtype: a key of `DTYPES`.
        force: replace an existing file.

    Raises:
        FileExistsError: `path` exists and `force` is False.
        ImportError: the package `gguf` is missing.
        ValueError: the file cannot hold the model type, one of its settings or the tokenizer; the model has adapters;
            or a tensor has no name in GGUF, is not floating-point, or is beyond the dtype's range.
    """
    gguf = load("gguf", "gguf", "GGUF files need")

    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}; expected one of {', '.join(DTYPES)}")
    layout = Layout.of(model.config)
    tensors = _named_tensors(model, layout)
    file_type, tensor_type = DTYPES[dtype]
    kinds = {name: _kind(tensor, gguf.GGMLQuantizationType[tensor_type]) for name, tensor in tensors.items()}
    with replacing(as_path(path), force=force) as (temporary,):
        writer = gguf.GGUFWriter(temporary, layout.architecture)
        try:
            _add_metadata(writer, model.config, layout, tensors["token_embd.weight"].shape[0])
            writer.add_file_type(gguf.LlamaFileType[file_type])
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            if tokenizer is None:
                writer.add_tokenizer_model("none")
            else:
                add_tokenizer(writer, tokenizer, tensors["token_embd.weight"].shape[0])
            _write_tensors(writer, layout, tensors, kinds)
        finally:
            writer.close()


def _named_tensors(model: nn.Module, layout: Layout) -> dict[str, Tensor]:
    """The model's tensors by GGUF name."""
    config: Any = model.config
    for name, module in model.named_modules():
        if hasattr(module, "base_layer"):
            raise ValueError(f"model: {name} ({type(module).__name__}) still has an adapter; {_MERGE_FIRST}")
    _check_supported(config)
    names, tensors = layout.names(), {}
    embedding = model.get_input_embeddings().weight  # type: ignore[operator]
    for key, tensor in model.state_dict(keep_vars=True).items():
        if tensor is embedding and key.startswith("lm_head."):
            continue  # tied: readers use the embedding if the file has no output matrix
        name = names.get_name(key, (".weight", ".bias"))
        if name is None:
            raise ValueError(f"model: tensor {key} has no name in GGUF's architecture {layout.architecture!r}")
        if not tensor.is_floating_point() or tensor.is_meta:
            what = "on the meta device" if tensor.is_meta else f"of {tensor.dtype}"
            raise ValueError(f"model: tensor {key} is {what}; expected floating-point values (dequantize, load first)")
        tensors[name] = tensor.detach()
    factors = _rope_factors(model, layout)
    if factors is not None:
        tensors["rope_freqs.weight"] = factors
    return tensors


def _check_supported(config: Any) -> None:
    settings = {
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "mlp_bias": (False,),
    }
    for name, known in settings.items():
        value = getattr(config, name, known[0])
        if value not in known:
            raise ValueError(f"model: config.{name}={value!r}; only {known[0]!r} can be written")


def _rope(config: Any) -> tuple[str, float]:
    """Type and base of the rotary embedding, from the configuration of transformers 4 or 5."""
    settings = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kind = settings.get("rope_type", settings.get("type", "default"))
    return kind, float(settings.get("rope_theta", None) or config.rope_theta)


def _head_size(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _rope_factors(model: Any, layout: Layout) -> Tensor | None:
    """The factors by which llama.cpp divides the rotary frequencies, ``[head_size / 2]``; None if there are none."""
    kind, base = _rope(model.config)
    if kind == "default":
        return None
    if kind not in ("linear", "llama3") or layout.architecture != INTERLEAVED:
        raise ValueError(f"model: rotary embedding of type {kind!r} cannot be written for {layout.architecture}")
    size = _head_size(model.config)
    plain = base ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    return (plain / model.get_decoder().rotary_emb.inv_freq.double().cpu()).float()


def _add_metadata(writer: Any, config: Any, layout: Layout, rows: int) -> None:
    writer.add_type("model")
    writer.add_name(Path(str(getattr(config, "_name_or_path", "") or layout.architecture)).name)
    # llama.cpp's Llama has no sliding window. Up to the window's length the two agree.
    context = min(config.max_position_embeddings, getattr(config, "sliding_window", None) or math.inf)
    writer.add_context_length(int(context))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(layout.blocks)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(layout.heads)
    writer.add_head_count_kv(layout.kv_heads)
    size = _head_size(config)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(_rope(config)[1])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(rows)


def _kind(tensor: Tensor, wanted: Any) -> Any:
    import gguf

    if tensor.ndim < 2:
        return gguf.GGMLQuantizationType.F32
    if tensor.shape[-1] % gguf.GGML_QUANT_SIZES[wanted][0]:
        return gguf.GGMLQuantizationType.F16
    return wanted


def _write_tensors(writer: Any, layout: Layout, tensors: dict[str, Tensor], kinds: dict[str, Any]) -> None:
    import gguf
    import numpy

    for name, tensor in tensors.items():
        size = math.prod(gguf.quant_shape_to_byte_shape(tensor.shape, kinds[name]))
        writer.add_tensor_info(name, tuple(tensor.shape), numpy.dtype(numpy.float32), size, kinds[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, tensor in tensors.items():
        values = layout.to_file(name, tensor).to("cpu", torch.float32).contiguous().numpy()
        largest = numpy.abs(values).max(initial=0.0)
        if not largest <= (65504.0 if kinds[name] == gguf.GGMLQuantizationType.F16 else numpy.finfo(numpy.float32).max):
            raise ValueError(f"model: tensor {name} has the value {largest}, which {kinds[name].name} cannot hold")
        writer.write_tensor_data(gguf.quantize(values, kinds[name]))
