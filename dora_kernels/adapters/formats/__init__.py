"""The formats of adapter files, one per module, and their detection."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from dora_kernels.adapters.formats.base import Format
from dora_kernels.adapters.formats.diffusers import Diffusers
from dora_kernels.adapters.formats.lycoris import Kohya, Lycoris
from dora_kernels.adapters.formats.mlx import Mlx
from dora_kernels.adapters.formats.nvidia import Nvidia
from dora_kernels.adapters.formats.peft import Peft, Sglang, Vllm
from dora_kernels.adapters.formats.qdora import QDoRA
from dora_kernels.adapters.formats.torchtune import Torchtune

FORMATS: dict[str, Format] = {
    format.name: format for format in (Peft(), Diffusers(), Lycoris(), Kohya(), Torchtune(), Nvidia(), QDoRA(), Mlx())
}

WRITTEN: dict[str, Format] = {**FORMATS, **{format.name: format for format in (Vllm(), Sglang())}}
"""Those that are written: also what servers read, plain LoRA in PEFT's files."""

# PEFT's keys are the most general, and part of other formats' keys, so PEFT is tried last.
_ORDER = ("qdora", "nvidia", "torchtune", "mlx", "diffusers", "kohya", "lycoris", "peft")


def check_format(format: Any, *also: str) -> None:
    """Raise ValueError if `format` is not the name of a format that is read, nor one of `also`."""
    if format not in (*FORMATS, *also):
        raise ValueError(f"format: expected one of {', '.join(map(repr, (*also, *FORMATS)))}, got {format!r}")


def detect(keys: Collection[str], config: dict[str, Any]) -> str | None:
    """Return the name of the format of a file with these keys and this configuration, or None."""
    return next((name for name in _ORDER if FORMATS[name].matches(keys, config)), None)
