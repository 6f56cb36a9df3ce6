"""Batches with an adapter for each row: without gradients, linear layers run all adapters by slots."""

from __future__ import annotations

import copy

import pytest

pytest.importorskip("peft")

import torch
from helpers import bf16, f32
from peft import LoraConfig, get_peft_model
from peft_models import move_adapter, one_thread  # noqa: F401
from torch import nn

import dora_kernels
from dora_kernels.peft import mixed

NAMES = ["second", "__base__", "default", "plain", "second"]


def made(dtype=f32, adapters=None):
    torch.manual_seed(1)
    base = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 8, bias=False)).to(dtype)
    values = {"lora_alpha": 5, "target_modules": ["0", "2"]}
    model = get_peft_model(base, LoraConfig(r=3, use_dora=True, **values))
    for name, options in (("second", {"r": 5, "use_dora": True}), ("plain", {"r": 2, "init_lora_weights": False})):
        model.add_adapter(name, LoraConfig(**values, **options))
    for parameter_name, parameter in model.named_parameters():
        if "lora_" in parameter_name:
            parameter.data = parameter.data.to(adapters or dtype)
    for seed, name in enumerate(("default", "second", "plain")):
        move_adapter(model, name, seed)
    dora_kernels.patch_peft(model)
    return model.eval()


def alone(model, name, x):
    if name == "__base__":
        with model.disable_adapter():
            return model(x)
    model.set_adapter(name)
    return model(x)


@pytest.fixture
def routed(monkeypatch):
    """The names of the adapters that ran by slots, a list for each layer's call."""
    calls = []
    kept = mixed.routed
    monkeypatch.setattr(mixed, "routed", lambda *args: (calls.append(sorted(args[4])), kept(*args))[1])
    return calls


@pytest.mark.parametrize("tokens", [(), (3,), (2, 2)], ids=["2d", "3d", "4d"])
@pytest.mark.parametrize(
    ("dtype", "adapters"), [(f32, f32), (bf16, f32), (bf16, bf16)], ids=["f32", "bf16/f32", "bf16"]
)
@torch.no_grad()
def test_rows(routed, dtype, adapters, tokens):
    """Row by row what the adapter alone gives, in one operation for all."""
    model = made(dtype, adapters)
    x = torch.randn(len(NAMES), *tokens, 12).to(dtype)
    y = model(x, adapter_names=NAMES)
    assert routed == [["default", "plain", "second"]] * 2
    assert y.dtype == dtype
    for i, name in enumerate(NAMES):
        wanted = alone(model, name, x)[i]
        tolerance = {} if dtype == f32 else {"rtol": 2**-6, "atol": 2**-6}
        torch.testing.assert_close(y[i], wanted, **tolerance)
    with model.disable_adapter():
        assert torch.equal(y[1], model(x)[1])


def test_what_stays_with_the_modules(routed):
    """Gradients, hooks, strengths and autocast; the results are the same."""
    model = made()
    x = torch.randn(len(NAMES), 12)
    with torch.no_grad():
        wanted = model(x, adapter_names=NAMES)
    routed.clear()
    torch.testing.assert_close(model(x, adapter_names=NAMES), wanted)
    assert not routed
    layer = model.base_model.model[0]
    seen = []
    handle = layer.lora_A["second"].register_forward_hook(lambda *given: seen.append(given))
    with torch.no_grad():
        torch.testing.assert_close(model(x, adapter_names=NAMES), wanted)
    assert len(seen) == 1 and routed == [["default", "plain"], ["default", "plain", "second"]]
    handle.remove()
    routed.clear()
    dora_kernels.set_dora_strength(model, 0.0)
    with torch.no_grad():
        weakened = model(x, adapter_names=NAMES)
        torch.testing.assert_close(weakened[0], alone(model, "__base__", x)[0])
        with torch.autocast("cpu", bf16):
            model(x, adapter_names=NAMES)
    assert routed == [["plain"]] * 2


@torch.no_grad()
def test_a_written_adapter_and_a_copy(routed):
    """The norm follows a write, unless it is frozen; a restored model refuses DoRA as PEFT does."""
    model = made()
    x = torch.randn(len(NAMES), 12)
    before = model(x, adapter_names=NAMES)
    model.base_model.model[0].lora_B["second"].weight.mul_(1.5)
    after = model(x, adapter_names=NAMES)
    assert not torch.allclose(before[0], after[0])
    torch.testing.assert_close(after[0], alone(model, "second", x)[0])
    model.set_adapter("default")
    torch.testing.assert_close(copy.deepcopy(model)(x, adapter_names=NAMES), after)
    model.base_model.set_adapter(["default", "second"])
    with dora_kernels.frozen_norms(model) as handle:
        assert len(handle) == 4
        torch.testing.assert_close(model(x, adapter_names=NAMES), after)
