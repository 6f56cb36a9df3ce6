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


def patched(base, adapters):
    model = peft_model(base, adapters, True)
    assert dora_kernels.patch_peft(model).patched
    return model


VECTORS = 5 * 4 * OUT
"""This call's g and norm, and of 16-bit layers the constants of the operation that scales them."""


@DTYPES
def test_beside_peft(base, adapters):
    lora, dora = (held(peft_model(base, adapters, use_dora), base, adapters) for use_dora in (False, True))
    ours = held(patched(base, adapters), base, adapters)
    # Under autocast the sum of the products is kept in the adapter's float32, as PEFT adds it up.
    output, low = TOKENS * OUT * adapters.itemsize, TOKENS * RANK * base.itemsize
    assert [size for size in ours if size >= output] == [output], "another activation than the base product"
    assert low in ours
    assert sum(ours) <= sum(lora) + output + VECTORS, "more than LoRA and one activation"
    assert sum(ours) + TOKENS * OUT * base.itemsize <= sum(dora), "PEFT's DoRA holds another output at the least"


def test_float32_adapters_without_autocast():
    """x in float32, as PEFT's LoRA, and the product that is scaled."""
    lora, dora = (held(peft_model(bf16, f32, use_dora), bf16, f32, autocast=False) for use_dora in (False, True))
    ours = held(patched(bf16, f32), bf16, f32, autocast=False)
    assert sum(ours) <= sum(lora) + 4 * TOKENS * OUT + VECTORS
    assert sum(ours) + 2 * TOKENS * OUT <= sum(dora)


@DTYPES
def test_frozen_magnitude(base, adapters):
    """No activation more than LoRA keeps."""
    lora = held(peft_model(base, adapters, False), base, adapters)
    model = patched(base, adapters)
    model.base_model.model.linear.lora_magnitude_vector["default"].weight.requires_grad_(False)
    assert sum(held(model, base, adapters)) <= sum(lora) + VECTORS
