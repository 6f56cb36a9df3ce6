"""The models of a pipeline whose adapters one file may hold: their names in files, and the spelling of their layers.

diffusers' pipelines call their models ``unet``, ``transformer``, ``prior``, ``text_encoder``, ``text_encoder_2``, ...
(loaders/lora_pipeline.py). kohya's sd-scripts (networks/lora.py, lora_flux.py, lora_sd3.py) and musubi-tuner write
``lora_unet`` for any denoiser, ``lora_te`` for the text encoder of SD 1 and 2, ``lora_te1`` and ``lora_te2`` for
the CLIPs of SDXL and SD 3, ``lora_te1`` and ``lora_te3`` for CLIP and T5 of Flux, ``lora_te3`` for T5 of SD 3.
OneTrainer (modules/util/convert_lora_util.py) numbers text encoders as the pipeline does, and has ``lora_transformer``.
ComfyUI (comfy/lora.py) reads all of these, and its own ``diffusion_model.`` and ``text_encoders.<which>.transformer.``.

Files have ``text_model.`` in the names of a CLIP's layers; transformers 5 does not in `CLIPTextModel`. For SDXL,
sd-scripts' files have Stability's names of the U-Net's layers (`ldm`).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

from dora_kernels.adapters.ldm import from_ldm

_UNDERSCORED = re.compile(r"(lycoris|lora_(?:prior_)?unet|lora_transformer|lora_prior_te|lora_te\d?|lora)_")
_DOTTED = re.compile(
    r"(base_model\.model|diffusion_model|unet|transformer(?:_2)?|prior|text_encoder(?:_\d)?"
    r"|text_encoders\.\w+(?:\.transformer)?)\."
)

_DENOISERS = ("unet", "transformer", "prior", "diffusion_model")
_COMPONENTS = {
    "lora_unet": _DENOISERS,
    "lora_transformer": ("transformer", "diffusion_model"),
    "lora_prior_unet": ("prior",),
    "lora_prior_te": ("text_encoder",),
    "lora_te": ("text_encoder",),
    "lora_te1": ("text_encoder",),
    "lora_te2": ("text_encoder_2",),
    "lora_te3": ("text_encoder_3", "text_encoder_2"),  # T5 is Flux's second text encoder
    "lora_te4": ("text_encoder_4",),
    "diffusion_model": _DENOISERS,
    "text_encoders.clip_l.transformer": ("text_encoder",),
    "text_encoders.clip_g.transformer": ("text_encoder_2",),
    "text_encoders.t5xxl.transformer": ("text_encoder_3", "text_encoder_2"),
}

# Layers of a CLIP text model as transformers 5 names them, and of a T5 encoder.
_CLIP = re.compile(r"(?:encoder[._]layers[._]\d+[._](?:self_attn[._](?:[qkv]|out)_proj|mlp[._]fc[12])|"
                   r"embeddings[._](?:token|position)_embedding)")  # fmt: skip
_T5 = re.compile(r"encoder[._]block[._]\d+[._]layer[._]\d+[._].+|shared")

_UNET = re.compile(r"(?:down|up|mid|input|output|middle)_blocks?\.")

# SDXL's U-Net: the only one with more than one block in a transformer.
_SDXL = re.compile(r"unet\.(?:add_embedding\.|.+\.transformer_blocks\.[1-9])")


def prefix_of(name: str, requested: str = "") -> str:
    """The part of a name that says which model it belongs to: `requested`, "lora_te1", "text_encoder_2", ...; or ""."""
    found = _UNDERSCORED.match(name) or _DOTTED.match(name)
    own = found[1] if found else ""
    # a layer of text_encoder_2 is not one of text_encoder
    if requested and len(requested) >= len(own) and name.startswith((f"{requested}_", f"{requested}.")):
        return requested
    return own


def is_underscored(prefix: str) -> bool:
    """True if names with the prefix have underscores for dots."""
    return _UNDERSCORED.fullmatch(f"{prefix}_") is not None


def is_component(prefix: str) -> bool:
    """True if the prefix says which model of a pipeline a name belongs to."""
    return prefix not in ("", "lycoris", "lora", "base_model.model")


def components_of(prefix: str) -> tuple[str, ...]:
    """The names that a pipeline may have for the model with this prefix in a file."""
    return _COMPONENTS.get(prefix, (prefix,) if is_component(prefix) else ())


def spellings(prefix: str, name: str) -> Iterator[str]:
    """Yield a layer's name, without its prefix, and then the other names that the same layer may have in a model."""
    yield name
    if name.startswith(("text_model.", "text_model_")):
        yield name[len("text_model.") :]
    elif is_text_encoder(prefix):
        yield f"text_model.{name}"
    elif (other := from_ldm(name)) is not None:
        yield other


def is_text_encoder(prefix: str) -> bool:
    """True if a prefix, or a pipeline's name of a model, is that of a text encoder."""
    return prefix.startswith(("lora_te", "lora_prior_te", "text_encoder"))


def in_files(name: str) -> str:
    """A text encoder's layer name as files have it: a CLIP's with ``text_model.``."""
    return f"text_model.{name}" if _CLIP.fullmatch(name) else name


def kohya_prefixes(components: Collection[str], names: Collection[str]) -> dict[str, str]:
    """kohya's prefix for each of a pipeline's models. Models for which kohya's files have no prefix are left out.

    Args:
        components: the pipeline's names of the models.
        names: names of their layers, ``<component>.<name>``.
    """
    single = set(components) <= {"unet", "text_encoder"} and not any(map(_SDXL.match, names))
    found: dict[str, str] = {}
    for component in components:
        number = re.fullmatch(r"text_encoder(?:_(\d))?", component)
        if component in _DENOISERS:
            found[component] = "lora_prior_unet" if component == "prior" else "lora_unet"
        elif number:
            start = f"{component}."
            t5 = any(_T5.fullmatch(name.removeprefix(start)) for name in names if name.startswith(start))
            one = "lora_te" if single else "lora_te1"
            found[component] = "lora_te3" if t5 else f"lora_te{number[1]}" if number[1] else one
    return found


def model_of(names: Collection[str], known: Collection[str] = ()) -> str:
    """The pipeline's name for a model with layers of these names: "text_encoder", "text_encoder_3", "unet", ...

    Args:
        names: names of the adapted layers.
        known: names of all of the model's layers, if there is a model.
    """
    tokens = not known or any(name.endswith("token_embedding") for name in known)
    if all(name.startswith("text_model.") or _CLIP.fullmatch(name) for name in names) and tokens:
        return "text_encoder"
    if all(map(_T5.fullmatch, names)):
        return "text_encoder_3"
    return "unet" if any(map(_UNET.match, names)) else "transformer"
