"""Exports see plain operations: what leaves PyTorch knows no op of this package."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from dora_kernels import apply_dora, patch_peft


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 5)).eval()


def own():
    model = small()
    apply_dora(model, rank=2)
    return model


def patched():
    model = get_peft_model(small(), LoraConfig(r=2, use_dora=True, target_modules=["0", "2"]))
    patch_peft(model)
    return model.eval()


def trained(make):
    model = make()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return model, torch.randn(3, 12)


@pytest.mark.parametrize("make", [own, patched])
def test_exported_program(make):
    model, x = trained(make)
    with torch.no_grad():
        wanted = copy.deepcopy(model)(x)
        program = torch.export.export(model, (x,))
        torch.testing.assert_close(program.module()(x), wanted)
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert targets and not {target for target in targets if "dora_kernels" in target}


@pytest.mark.parametrize("make", [own, patched])
def test_onnx(make, tmp_path):
    """An unmerged model, run by ONNX Runtime."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, x = trained(make)
    torch.onnx.export(model, (x,), tmp_path / "model.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (given,) = session.get_inputs()
    (y,) = session.run(None, {given.name: x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(y), model(x))
