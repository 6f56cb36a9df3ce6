"""What a layer holds between forward and backward, counted by storages, beside PEFT's LoRA and DoRA."""

from __future__ import annotations

import pytest
import torch
from helpers import bf16, f32, saved_by
from peft import LoraConfig, get_peft_model
from torch import nn

import dora_kernels

TOKENS, IN, OUT, RANK = 66, 40, 48, 4
DTYPES = pytest.mark.parametrize(
    ("base", "adapters"), [(f32, f32), (bf16, bf16), (bf16, f32)], ids=["fp32", "bf16", "bf16+fp32"]
)


class Model(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.linear = nn.Linear(IN, OUT, dtype=dtype)

    def forward(self, x):
        return self.linear(x)


def peft_model(base, adapters, use_dora):
    """A PEFT model of one linear layer, in training."""
    torch.manual_seed(0)
    config = LoraConfig(r=RANK, target_modules=["linear"], use_dora=use_dora)
    model = get_peft_model(Model(base), config, autocast_adapter_dtype=adapters != base)
    nn.init.normal_(model.base_model.model.linear.lora_B["default"].weight)
    return model.train()


def held(model, base, adapters, autocast=True):
    """Bytes of every storage that the graph keeps, besides x and the parameters, the largest first."""
    x = torch.randn(2, TOKENS // 2, IN, dtype=base, requires_grad=True)
    with torch.autocast("cpu", bf16, enabled=autocast and adapters != base):
        _, saved = saved_by(lambda: model(x))
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    for tensor in (x, *model.parameters()):
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    return sorted(storages.values(), reverse=True)


@DTYPES
def test_beside_peft(base, adapters):
    lora, dora = (held(peft_model(base, adapters, use_dora), base, adapters) for use_dora in (False, True))
    model = peft_model(base, adapters, True)
    assert dora_kernels.patch_peft(model).patched
    ours = held(model, base, adapters)
    output, low = (TOKENS * size * base.itemsize for size in (OUT, RANK))
    # The base product, h, and this call's g and norm.
    assert sorted(ours) == sorted([output, low, 4 * OUT, 4 * OUT])
    assert sum(ours) <= sum(lora) + output + 8 * OUT, "more than LoRA and one activation"
    assert sum(ours) + output <= sum(dora), "PEFT's DoRA holds another output at the least"


def test_float32_adapters_without_autocast():
    """h in float32, which PEFT keeps of all of x; the base product in 16 bits."""
    lora = held(peft_model(bf16, f32, False), bf16, f32, autocast=False)
    model = peft_model(bf16, f32, True)
    assert dora_kernels.patch_peft(model).patched
    ours = held(model, bf16, f32, autocast=False)
    assert sorted(ours) == sorted([2 * TOKENS * OUT, 4 * TOKENS * RANK, 4 * OUT, 4 * OUT])
    assert 4 * TOKENS * IN in lora and sum(ours) < sum(lora) + 2 * TOKENS * OUT - 3 * TOKENS * IN


@DTYPES
def test_frozen_magnitude(base, adapters):
    model = peft_model(base, adapters, True)
    dora_kernels.patch_peft(model)
    model.base_model.model.linear.lora_magnitude_vector["default"].weight.requires_grad_(False)
    assert sorted(held(model, base, adapters)) == sorted([TOKENS * RANK * base.itemsize, 4 * OUT, 4 * OUT])
