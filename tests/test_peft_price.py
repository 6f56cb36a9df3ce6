"""What a call of a patched layer costs and changes: nothing at an adapter's start, nothing asked under `frozen_norms`."""

from __future__ import annotations

import copy
import functools
import sys

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

from peft import LoraConfig, get_peft_model
from peft_kinds import KINDS, Net, add, config, given, output, twins
from peft_models import (
    lora_layers,
    one_thread,  # noqa: F401
)
from test_peft_quantized import FORMATS, IN, peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

import dora_kernels
from dora_kernels import frozen_norms
from dora_kernels.engine import norm_cache
from dora_kernels.engine.model_norms import caches


def fresh(net, **options):
    """A patched model whose adapter is as PEFT makes it, and the net itself."""
    base = copy.deepcopy(net)
    model = get_peft_model(net, LoraConfig(**{"r": 4, "lora_alpha": 6, "use_dora": True, **options}))
    handle = dora_kernels.patch_peft(model)
    assert handle.patched
    return model, base, handle


class Wide(nn.Module):
    """Layers for which a product with a bias adds up in another order than one without."""

    def __init__(self, bias):
        super().__init__()
        self.layer, self.other = nn.Linear(4096, 24, bias=bias), nn.Linear(24, 1000, bias=bias)
        for p in self.parameters():
            nn.init.normal_(p, std=0.02 if p.dim() > 1 else 1.0)

    def forward(self, x):
        return self.other(torch.tanh(self.layer(x)))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("lead", [(1,), (7,), (2, 3), ()], ids=str)
def test_a_fresh_adapter_changes_nothing(bias, lead):
    """To the bit, with the magnitude that PEFT gave it."""
    model, base, _ = fresh(Wide(bias), target_modules=["layer", "other"])
    x = torch.randn(*lead, 4096)
    wanted = base(x)
    for training in (True, False):
        model.train(training)
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                for _ in range(2):
                    assert torch.equal(model(x), wanted)
    with torch.no_grad(), frozen_norms(model):
        assert torch.equal(model(x), wanted)


@KINDS
def test_a_fresh_adapter_of_any_kind(kind):
    torch.manual_seed(0)
    net = Net(kind)
    base = copy.deepcopy(net)
    model = get_peft_model(net, config(kind))
    assert dora_kernels.patch_peft(model).patched
    x = given(model)
    wanted = base(x)
    for training in (True, False):
        model.train(training)
        for _ in range(2):
            assert torch.equal(model(x), wanted)


def test_gpt2s_layer():
    net = nn.Sequential(Conv1D(36, 4096))
    nn.init.normal_(net[0].bias)
    model, base, _ = fresh(net, target_modules=["0"], fan_in_fan_out=True)
    x = torch.randn(3, 4096)
    assert torch.equal(model(x), base(x))


def test_once_b_moves_the_norm_is_the_true_one():
    model, base, handle = fresh(Wide(True), target_modules=["layer"])
    layer = model.base_model.model.layer
    x = torch.randn(3, 4096)
    assert torch.equal(model(x), base(x))
    with torch.no_grad():
        layer.lora_B["default"].weight[5].fill_(0.3)
    wanted = layer(x)
    handle.restore()
    torch.testing.assert_close(wanted.double(), layer.double()(x.double()), rtol=1e-5, atol=1e-5)


# Frozen


def no_questions(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("a norm was computed or asked for")

    for name in ("norm", "known", "still_holds"):
        monkeypatch.setattr(norm_cache.NormCache, name, fail)
    monkeypatch.setattr("dora_kernels.engine.layer.compute_norm", fail)
    monkeypatch.setattr("dora_kernels.engine.ops.weight_norm", fail)


@KINDS
def test_frozen(kind, monkeypatch):
    """No question inside; fresh again after the release, whatever was written."""
    _, model = twins(kind)
    model.eval()
    wanted = output(model)
    with frozen_norms(model) as handle:
        assert len(handle) == 1
        with monkeypatch.context() as patch:
            no_questions(patch)
            for _ in range(3):
                torch.testing.assert_close(output(model), wanted)
        (layer,) = lora_layers(model)
        name = "lora_embedding_B" if "embedding" in kind else "lora_B"
        factor = getattr(layer, name)["default"]
        with torch.no_grad():
            getattr(factor, "weight", factor).mul_(3.0)
        stale = output(model)
    fresh = output(model)
    torch.testing.assert_close(fresh, output(copy.deepcopy(model)))
    assert not torch.allclose(stale["y"], fresh["y"]), "the norm inside was not the frozen one"


@KINDS
def test_training_inside(kind):
    _, model = twins(kind)

    def grads():
        model.zero_grad()
        model(given(model)).square().sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    wanted = grads()
    with frozen_norms(model):
        torch.testing.assert_close(grads(), wanted)
    torch.testing.assert_close(grads(), wanted)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["nf4", "int8", "hqq 4", "torchao int8"])
def test_frozen_quantised_layers(kind, monkeypatch):
    model, _, _ = peft_model(kind)
    assert dora_kernels.patch_peft(model).patched
    model.eval()
    x = torch.randn(3, IN, dtype=torch.bfloat16)
    assert kind in FORMATS
    with torch.no_grad():
        model(x)
        wanted = model(x)
        with frozen_norms(model) as handle:
            assert len(handle) == 1
            with monkeypatch.context() as patch:
                no_questions(patch)
                torch.testing.assert_close(model(x), wanted)
        assert all(cache.frozen is None for cache in caches(model))
        torch.testing.assert_close(model(x), wanted)


def test_two_adapters():
    """Those that are active are frozen; another one is not, and is asked as before."""
    stock, model = twins("linear")
    add((stock, model), "linear")
    model.eval()
    (layer,) = lora_layers(model)
    first = output(model)
    with frozen_norms(model) as handle:
        assert len(handle) == 1
        model.set_adapter("second")
        second = output(model)
        with torch.no_grad():
            layer.lora_B["second"].weight.mul_(2.0)
        moved = output(model)
        assert not torch.allclose(moved["y"], second["y"])
        torch.testing.assert_close(moved, output(copy.deepcopy(model)))
        model.set_adapter("default")
        torch.testing.assert_close(output(model), first)


def test_nothing_is_left_to_freeze():
    torch.manual_seed(0)
    model, _, handle = fresh(nn.Sequential(nn.Linear(12, 10)), target_modules=["0"])
    model.merge_adapter()
    with pytest.raises(ValueError, match="no DoRA layer with a norm to freeze"):
        frozen_norms(model)
    model.unmerge_adapter()
    with model.disable_adapter(), pytest.raises(ValueError, match="no DoRA layer with a norm to freeze"):
        frozen_norms(model)
    with frozen_norms(model):
        pass
    handle.restore()
    with pytest.raises(ValueError, match="no DoRA layer with a norm to freeze"):
        frozen_norms(model)


# The price


def python_calls(function):
    """How many Python functions run in it."""
    names = []

    def profile(frame, event, _):
        if event == "call":
            names.append(frame.f_code.co_qualname if hasattr(frame.f_code, "co_qualname") else frame.f_code.co_name)

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(before)
    return names


@pytest.mark.parametrize("kind", ["linear", "Conv1D"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
def test_few_functions_run_in_a_call(kind, training, frozen):
    """Once the norm is kept: at most 15, nn.Module's own among them. Before, there were 45."""
    _, model = twins(kind)
    model.train(training)
    (layer,) = lora_layers(model)
    x = torch.randn(4, 12)
    for _ in range(2):
        layer(x)
    handle = frozen_norms(model) if frozen else None
    layer(x)
    calls = python_calls(functools.partial(layer, x))
    assert "DoraLinear.forward" in calls or "forward" in calls
    assert len(calls) <= 15, calls
    if handle is not None:
        handle.release()


# Stale in none of the ways that keep an address


@pytest.mark.parametrize("kind", ["linear", "Conv1D"])
def test_a_square_weight_transposed_in_place(kind):
    """As conversions do: the same memory, shape and version, other strides."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 16) if kind == "linear" else Conv1D(16, 16))
    model, *_ = fresh(net, target_modules=["0"], fan_in_fan_out=kind == "Conv1D", init_lora_weights=False)
    model.eval()
    layer = model.base_model.model[0]
    x = torch.randn(5, 16)
    with torch.no_grad():
        model(x)
        layer.base_layer.weight.data = layer.base_layer.weight.data.t()
        torch.testing.assert_close(model(x), copy.deepcopy(model)(x))


def test_a_rank_cut_off_in_place():
    _, model = twins("linear")
    model.eval()
    (layer,) = lora_layers(model)
    output(model)
    with torch.no_grad():
        layer.lora_A["default"].weight.data = layer.lora_A["default"].weight.data[:2]
        layer.lora_B["default"].weight.data = layer.lora_B["default"].weight.data[:, :2]
    torch.testing.assert_close(output(model), output(copy.deepcopy(model)))
