"""A tiny random pipeline of Stable Diffusion XL, and images, as diffusers' training scripts read them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def write(folder: Path) -> None:
    """Write ``pipeline/`` and ``images/`` into `folder`."""
    (folder / "tokenizer").mkdir(parents=True)
    tokens = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    files = [folder / "tokenizer" / name for name in ("vocab.json", "merges.txt")]
    files[0].write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    files[1].write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(*map(str, files), model_max_length=77)
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=len(tokens), hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4,
        projection_dim=32, bos_token_id=len(tokens) - 2, eos_token_id=len(tokens) - 1, pad_token_id=len(tokens) - 1,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8, attention_head_dim=(2, 4), use_linear_projection=True, transformer_layers_per_block=(1, 2),
        cross_attention_dim=64, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=32 + 6 * 8,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 16), latent_channels=4, norm_num_groups=4, sample_size=16,
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
    )  # fmt: skip
    StableDiffusionXLPipeline(
        vae=vae, unet=unet, text_encoder=CLIPTextModel(config), text_encoder_2=CLIPTextModelWithProjection(config),
        tokenizer=tokenizer, tokenizer_2=tokenizer, scheduler=EulerDiscreteScheduler(),
    ).save_pretrained(folder / "pipeline")  # fmt: skip
    (folder / "images").mkdir()
    pixels = numpy.random.default_rng(0)
    for index in range(2):
        image = Image.fromarray(pixels.integers(0, 256, (16, 16, 3), dtype=numpy.uint8))
        image.save(folder / "images" / f"{index}.png")
