"""The kernel for Hugging Face's Hub: loaded where nothing of this package is, and its layer in PEFT."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("kernels", reason="make test-hub has an environment with it")
pytest.importorskip("peft")
pytest.importorskip("transformers")

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from peft_models import batch, check_logits, check_parity, one_thread, peft_model  # noqa: F401

import dora_kernels

ROOT = Path(dora_kernels.__file__).parent.parent


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    out = tmp_path_factory.mktemp("hub") / "dora-kernels"
    subprocess.run([sys.executable, ROOT / "hub" / "build.py", out], check=True, capture_output=True)
    return out


WORK = """
import torch


def problem(dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = (5, 48), (40, 48), (4, 48), (40, 4), (40,), (40,)
    x, w, a, b, m, bias = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return [x.requires_grad_(), w, a.requires_grad_(), b.requires_grad_(), m.abs().requires_grad_(), bias]


def results(module):
    found = []
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x, w, a, b, m, bias = problem(dtype)
        m = m.detach().requires_grad_()
        y = module.dora_linear(x, w, a, b, m, bias, scaling=0.5)
        y.square().sum().backward()
        found += [y, x.grad, a.grad, b.grad, m.grad, module.dora_weight_norm(w, a, b, scaling=0.5)]
        found.append(module.merge_dora(w, a, b, m, scaling=0.5))
    return [tensor.detach() for tensor in found]
"""
LOAD = """
import importlib.util, sys
from pathlib import Path
from kernels import get_local_kernel
from kernels._rust import Digest, DigestAlgorithm, Metadata

assert importlib.util.find_spec("dora_kernels") is None, "not an empty environment"
repository = Path(sys.argv[1])
kernel = get_local_kernel(repository)
torch.save(results(kernel), sys.argv[2])
assert "triton" not in sys.modules and "peft" not in sys.modules
x, w, a, b, m, bias = problem(torch.float32)
m = m.detach().requires_grad_()
compiled = torch.compile(kernel.dora_linear, fullgraph=True, backend="aot_eager")
torch.testing.assert_close(compiled(x, w, a, b, m, bias), kernel.dora_linear(x, w, a, b, m, bias))
for variant in (repository / "build").iterdir():
    Metadata.read_from_file(variant / "metadata.json").digest.validate(
        Digest.hash_variant(DigestAlgorithm.SHA256, variant))
"""


def test_in_an_empty_environment(repository, tmp_path):
    """The same bits as the package's, forward, backward, norm and merged weight; digests that `kernels` accepts."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    command = [sys.executable, "-c", WORK + LOAD, repository, tmp_path / "results.pt"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    namespace = {}
    exec(WORK, namespace)
    ours, theirs = namespace["results"](dora_kernels), torch.load(tmp_path / "results.pt")
    assert len(ours) == 21 and all(map(torch.equal, ours, theirs))


@pytest.fixture
def kernelized(repository, monkeypatch):
    """Makes PEFT models run on the kernel's layer."""
    from kernels import LocalLayerRepository, Mode, kernelize, use_kernel_mapping

    monkeypatch.setattr(DoraLinearLayer, "kernel_layer_name", "DoraLinear", raising=False)
    monkeypatch.setattr(DoraLinearLayer, "kernel_condition", staticmethod(lambda module: True), raising=False)
    mapping = {"DoraLinear": {"cpu": LocalLayerRepository(repository, layer_name="DoraLinear")}}

    def kernelize_model(model):
        with use_kernel_mapping(mapping):
            return kernelize(model, mode=Mode.TRAINING, device="cpu", use_fallback=False)

    return kernelize_model


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_model_under_kernelize(kind, kernelized):
    """Outputs and gradients as stock; disabled, the base model; merged and unmerged as stock; and no norm is formed."""
    stock = peft_model(kind)
    ours = kernelized(copy.deepcopy(stock))
    magnitudes = [module for module in ours.modules() if isinstance(module, DoraLinearLayer)]
    assert magnitudes and all("forward" in vars(module) for module in magnitudes)
    check_parity(stock, ours, batch(kind))
    assert all(vars(module)["_dora_kernels"].computed for module in magnitudes)
    assert list(ours.state_dict()) == list(stock.state_dict())
    with ours.disable_adapter(), stock.disable_adapter():
        assert torch.equal(ours(**batch(kind)).logits, stock(**batch(kind)).logits)
    for step in ("merge_adapter", "unmerge_adapter"):
        getattr(ours, step)(), getattr(stock, step)()
        for (name, one), other in zip(ours.named_parameters(), stock.parameters()):
            assert torch.equal(one, other), (step, name)
    check_logits(stock, ours, batch(kind))


def test_training_under_kernelize(kernelized):
    """Fifteen steps of a fused optimizer, whose writes change no version: a norm that was kept would show."""
    stock = peft_model("llama", lora_dropout=0.0)
    models = stock, kernelized(copy.deepcopy(stock))
    losses = []
    for model in models:
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=3e-3, fused=True)
        losses.append([])
        for _ in range(15):
            loss = model.train()(**batch()).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[0][0] - losses[0][-1] > 0.5
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=2e-5, atol=0.0)
