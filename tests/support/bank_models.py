"""A tiny model and its customers' adapters, as PEFT saved them, and what PEFT alone makes of each."""

from __future__ import annotations

import copy
import functools

import torch
from peft import PeftModel, get_peft_model
from peft_models import VOCAB, base_model, config, move_adapter

from dora_kernels import Adapter
from dora_kernels.adapters import AdapterLayer

SPECS = {
    "alice": {"r": 4},
    "bob": {"r": 7, "use_dora": False, "target_modules": ["q_proj", "down_proj"]},
    "carol": {"r": 2, "target_modules": ["v_proj", "up_proj"], "use_rslora": True},
    "dave": {"r": 3, "rank_pattern": {"q_proj": 5}},
}
"""DoRA and plain LoRA of several ranks, on different layers."""


@functools.cache
def saved(tmp):
    """The base model, PEFT's model of each adapter by name, and the folder of their files."""
    base = base_model("llama").eval()
    alone = {None: base}
    for seed, (name, options) in enumerate(SPECS.items()):
        model = get_peft_model(copy.deepcopy(base), config("llama", **options))
        alone[name] = move_adapter(model, seed=seed).eval()
        model.save_pretrained(tmp / name)
    assert all(isinstance(model, PeftModel) for name, model in alone.items() if name)
    return base, alone, tmp


def tokens(rows, length=6, seed=0):
    """Random ones."""
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def small(rank=2, features=(5, 4), seed=0, dora=True, names=("0",), dtype=torch.float32):
    """An adapter for linear layers of a stack."""
    make = torch.Generator().manual_seed(seed)
    layers = {}
    for name in names:
        a, b = torch.randn(rank, features[0], generator=make), torch.randn(features[1], rank, generator=make)
        magnitude = 1 + torch.rand(features[1], generator=make) if dora else None
        layers[name] = AdapterLayer("linear", a.to(dtype), b.to(dtype), magnitude, 0.5)
    return Adapter(layers)


def expected(weight, bias, x, adapter, name="0"):
    """The oracle, in float64."""
    w, x = weight.double(), x.double()
    if adapter is not None:
        layer = adapter.layers[name]
        w = w + layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
        if layer.magnitude is not None:
            w = w * (layer.magnitude.double() / w.norm(dim=1))[:, None]
    y = x @ w.T
    return y if bias is None else y + bias.double()
