"""Tiny models of transformers, and folders of adapters for them, for the command line to read."""

from __future__ import annotations

import torch
import transformers
from adapter_models import adapter_for
from safetensors.torch import load_file, save_file
from torch import nn

from dora_kernels.adapters import save_adapter

NAMES = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"]


def llama(dtype=torch.float32, **options):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=30, tie_word_embeddings=False, **options,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).to(dtype).eval()


def gpt2():
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=30)).eval()


def plain_linears(model):
    """The model with `nn.Linear` for Conv1D, for the helpers of adapters."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__ == "Conv1D":
                linear = nn.Linear(*child.weight.shape)
                linear.weight = nn.Parameter(child.weight.detach().t().contiguous())
                setattr(module, name, linear)
    return model


def adapter_file(tmp_path, model, format="peft", names=tuple(NAMES), **options):
    adapter = adapter_for(model, names, rank=3, scaling=0.5, **options)
    folder = tmp_path / f"adapter-{format}"
    save_adapter(adapter, folder, format=format)
    return folder, adapter


def snapshot(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def rewrite(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
