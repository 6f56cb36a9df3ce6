"""`patch_peft(model, forward="merged")`: PEFT's results from one product per layer; options, refusals, restoring."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

from peft_models import (
    batch,
    check_parity,
    lora_layers,
    one_thread,  # noqa: F401
    peft_model,
    twins,
)

import dora_kernels
from dora_kernels.engine import merged
from dora_kernels.peft.state import SWITCH, norm_cache


def refreshes(model):
    """How often each layer has made its merged weight."""
    return {norm_cache(layer, "default").refreshes for layer in lora_layers(model)}


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_parity(architecture):
    stock, ours = twins(architecture)
    handle = dora_kernels.patch_peft(ours, forward="merged")
    assert not handle.skipped
    check_parity(stock, ours, batch(architecture))
    assert refreshes(ours) == {1}


def test_training_and_evaluation():
    """A step is noticed, by the optimizer of transformers' Trainer; evaluation uses the same weight."""
    stock, ours = twins()
    dora_kernels.patch_peft(ours, forward="merged")
    optimizers = [
        torch.optim.AdamW([p for p in each.parameters() if p.requires_grad], lr=1e-2, fused=True)
        for each in (stock, ours)
    ]
    for _ in range(2):
        for model, optimizer in zip((stock, ours), optimizers):
            model.train()(**batch()).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert refreshes(ours) == {2}
    with torch.no_grad():
        logits = [each.eval()(**batch()).logits for each in (stock, ours)]
        ours(**batch())
    torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-3)
    assert refreshes(ours) == {3}


def test_the_options_of_the_last_call():
    _, ours = twins()
    dora_kernels.patch_peft(ours, forward="merged")
    ours(**batch())
    copied = copy.deepcopy(ours)
    copied(**batch())
    assert refreshes(copied) == {1}
    handle = dora_kernels.patch_peft(ours)
    ours(**batch())
    assert refreshes(ours) == {1}
    assert all(norm_cache(layer, "default").merged is None for layer in lora_layers(ours))
    handle.restore()
    assert all(SWITCH not in vars(layer) for layer in lora_layers(ours))


def test_bfloat16(monkeypatch):
    with pytest.raises(ValueError, match=r"offered in .*q_proj.base_layer.weight is torch.bfloat16"):
        dora_kernels.patch_peft(peft_model(dtype=torch.bfloat16), forward="merged")
    monkeypatch.setattr(merged, "DTYPES", (*merged.DTYPES, torch.bfloat16))
    stock = peft_model(dtype=torch.bfloat16)
    ours = copy.deepcopy(stock)
    dora_kernels.patch_peft(ours, forward="merged")
    check_parity(stock, ours, batch(), dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        ours(**batch())
    assert refreshes(ours) == {1}


def test_refused():
    model = peft_model()
    with pytest.raises(ValueError, match="forward: expected 'composed' or 'merged', got 'fused'"):
        dora_kernels.patch_peft(model, forward="fused")
    assert all(SWITCH not in vars(layer) for layer in lora_layers(model))
