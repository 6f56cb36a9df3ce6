"""DoRA and LoRA on the stacks of every class of transformers that has them, against the dense formula in float64."""

from __future__ import annotations

import contextlib

import pytest
import torch
from experts_models import IMPLEMENTATIONS, Mixture, dense, experts, experts_classes, stacks, with_weights
from peft import LoraConfig, get_peft_model
from peft_models import Float64

import dora_kernels
from dora_kernels.modules.stand_in import is_transposed

pytestmark = pytest.mark.slow

CLASSES = experts_classes()


def test_the_classes_are_found():
    """Those with a loop of their own are known by their parameters, whatever their names."""
    own_loops = {each.name for each in CLASSES if not each.chooses}
    assert own_loops >= {"Llama4TextExperts", "JetMoeParallelExperts", "LongcatFlashExperts"}
    assert len(CLASSES) > 60 and {each.name for each in CLASSES} >= {"GptOssExperts", "NemotronHExperts"}


@pytest.mark.parametrize(("module", "name", "chooses"), CLASSES, ids=[each.name for each in CLASSES])
def test_every_class(module, name, chooses):
    """Fresh = identity; then output and gradients of each way in which the class can run.

    float64 to 1e-10; the grouped product of PyTorch has no float64 on a CPU, ours has.
    """
    with patched(), Float64():  # some classes compute in float32 whatever their dtype
        for implementation in IMPLEMENTATIONS if chooses else IMPLEMENTATIONS[:1]:
            for use_dora in (True, False):
                check(Mixture(experts(module, name, implementation)), use_dora, implementation)


@contextlib.contextmanager
def patched():
    handle = dora_kernels.patch_peft_globally()
    try:
        yield
    finally:
        handle.restore()


def check(mixture, use_dora, implementation):
    inner = mixture.experts
    config = inner.config if hasattr(inner, "config") else None
    names, transposed = stacks(inner), is_transposed(inner)
    assert names
    if config is not None:
        config._experts_implementation = "eager"
    with torch.no_grad():
        base = mixture()
    if config is not None:
        config._experts_implementation = implementation
    model = get_peft_model(
        mixture,
        LoraConfig(
            use_dora=use_dora, r=2, lora_alpha=3, target_modules=[],
            target_parameters=[f"experts.{name}" for name in names],
        ),
        autocast_adapter_dtype=False,
    )  # fmt: skip
    assert (model() - base).abs().max() <= 1e-13 * base.abs().max()
    torch.manual_seed(2)
    wrappers = [layer for layer in model.modules() if type(layer).__name__ == "ParamWrapper"]
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data += 0.3 * torch.randn_like(parameter)
    y = model()
    up = torch.randn_like(y)
    y.backward(up)
    oracles = {}
    for layer in wrappers:
        magnitude = layer.lora_magnitude_vector["default"].weight if use_dora else None
        factors = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        oracles[layer.parameter_name] = dense(
            getattr(inner, layer.parameter_name), *factors, magnitude, 1.5, transposed
        )
    if config is not None:
        config._experts_implementation = "eager"
    with with_weights(inner, {name: oracle.formed for name, oracle in oracles.items()}):
        expected = inner(*mixture.inputs)
    expected.backward(up)
    assert (y - expected).abs().max() <= 1e-10 * expected.abs().max()
    for layer in wrappers:
        oracle = oracles[layer.parameter_name]
        pairs = [(layer.lora_A["default"].weight, oracle.lora_A), (layer.lora_B["default"].weight, oracle.lora_B)]
        if use_dora:
            pairs.append((layer.lora_magnitude_vector["default"].weight, oracle.magnitude))
        for ours, theirs in pairs:
            assert (ours.grad - theirs.grad).abs().max() <= 1e-9 * theirs.grad.abs().max(), layer.parameter_name
