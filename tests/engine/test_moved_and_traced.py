"""What a kept norm must not survive, or outlive: traces, gradients through it, moves to another device."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from dora_kernels import DoRALinear, frozen_norms, patch_peft
from dora_kernels.core.precision import full_precision


def moved_layer(**options):
    torch.manual_seed(0)
    layer = DoRALinear(12, 8, rank=2, **options)
    nn.init.normal_(layer.lora_B.weight)
    return layer


def patched():
    torch.manual_seed(0)
    config = LoraConfig(r=2, use_dora=True, target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(nn.Sequential(nn.Linear(12, 8)), config).eval()
    patch_peft(model)
    return model


@pytest.mark.parametrize("make", [moved_layer, patched])
def test_a_trace_computes_the_norm(make):
    """After an eager call, whose norm is kept."""
    model, x = make().eval(), torch.randn(3, 12)
    with torch.no_grad():
        model(x)
        traced = torch.jit.trace(model, (x,), check_trace=False)
        next(p for name, p in model.named_parameters() if "lora_B" in name).mul_(3.0)
        torch.testing.assert_close(traced(x), model(x))


def test_a_frozen_norm_has_its_gradient():
    layer, x = moved_layer(detach_norm=False), torch.randn(3, 12)
    parameters = [layer.lora_A.weight, layer.lora_B.weight, layer.magnitude]
    wanted = torch.autograd.grad(layer(x).square().sum(), parameters)
    with frozen_norms(layer):
        torch.testing.assert_close(torch.autograd.grad(layer(x).square().sum(), parameters), wanted)


@pytest.mark.parametrize("make", [moved_layer, patched])
def test_moving_frees_the_old_weights(make):
    model = make()
    model(torch.randn(3, 12)).sum().backward()
    model.zero_grad()
    old = [weakref.ref(p.untyped_storage()) for p in model.parameters()]
    model.to("meta")
    gc.collect()
    assert not [one for one in old if one() is not None]


def test_threads_share_the_precision():
    """The setting of the process changes back when the last of them has left."""
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    if not hasattr(matmul, "fp32_precision"):
        pytest.skip("this torch has no such setting")
    before, inside, leave = matmul.fp32_precision, threading.Event(), threading.Event()
    matmul.fp32_precision = "bf16"
    try:

        def other():
            with full_precision(torch.device("cpu")):
                inside.set()
                leave.wait()

        thread = threading.Thread(target=other)
        thread.start()
        inside.wait()
        with full_precision(torch.device("cpu")):
            leave.set()
            thread.join()
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "bf16"
    finally:
        matmul.fp32_precision = before
