"""What the handle says of layers that other code computes: foreign kernels, replaced forwards."""

from __future__ import annotations

import copy
import gc
import pickle
import types
import weakref

import pytest

pytest.importorskip("peft")
pytest.importorskip("transformers")

import torch
from peft_models import FIRST, SECOND, counted, lora_layers, toy, toy_twins

import dora_kernels
from dora_kernels.peft import calls
from dora_kernels.peft.calls import REASON
from dora_kernels.peft.state import switch


def steal(layer):
    """As a foreign kernel does it: the layer's weights, and not its forward."""
    a, b, m = (getattr(layer, part)["default"].weight for part in ("lora_A", "lora_B", "lora_magnitude_vector"))

    def forward(self, x):
        v = layer.base_layer.weight + layer.scaling["default"] * b @ a
        return torch.nn.functional.linear(x, (m / v.norm(dim=1).detach()).unsqueeze(1) * v, layer.base_layer.bias)

    layer.forward = types.MethodType(forward, layer)


def hooks(model):
    return sum(isinstance(getattr(hook, "__self__", None), calls.FirstStep)
               for module in model.modules() for hook in module._forward_hooks.values())  # fmt: skip


def step(model):
    model(torch.randn(4, 12)).square().sum().backward()


@pytest.fixture(autouse=True)
def every_warning(monkeypatch):
    monkeypatch.setattr(dora_kernels.engine.dispatch, "_warned", set())


@pytest.mark.parametrize("when", ["before its first step", "after it"])
def test_a_layer_computed_elsewhere(when):
    """It is skipped from the first step on, and patched again once it is called; the others stay patched."""
    model = toy()
    handle = dora_kernels.patch_peft(model)
    layers = dict(model.named_modules())
    layer = layers[SECOND]
    if when == "after it":  # then it has been called, and nothing looks any more: what is promised is the first step
        step(model)
    steal(layer)
    assert handle.patched == [FIRST, SECOND]
    if when == "after it":
        step(model)
        assert handle.patched == [FIRST, SECOND] and not hooks(model)
        return
    model.eval()(torch.randn(4, 12))
    assert handle.patched == [FIRST, SECOND], "without a gradient there is no proof"
    model.train()
    with pytest.warns(RuntimeWarning, match=f"DoRA layers of PeftModel train and are never called.*{SECOND}"):
        step(model)
    assert handle.patched == [FIRST] and handle.skipped == {SECOND: REASON} and not hooks(model)
    assert not layer.lora_B["default"].weight._post_accumulate_grad_hooks
    assert handle._never_called() == []
    del layer.forward
    step(model)
    assert handle.patched == [FIRST, SECOND] and handle.skipped == {}


def test_a_layer_that_takes_no_part():
    """Not called and without a gradient, as an expert that no token went to: nothing is said against it."""
    model = toy()
    handle = dora_kernels.patch_peft(model)
    layers = dict(model.named_modules())
    layers[SECOND].forward = torch.nn.Identity()
    with torch.random.fork_rng():
        model(torch.randn(4, 12)).square().sum().backward()
    assert handle.patched == [FIRST, SECOND]


def test_copies_pickles_and_the_end():
    """The watch is copied with the model, keeps nothing alive, and `restore` removes it."""
    model = toy()
    handle = dora_kernels.patch_peft(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert hooks(other)
        step(other)
        assert not hooks(other) and hooks(model)
    steal(dict(model.named_modules())[SECOND])
    step(model)
    kept = [weakref.ref(layer) for layer in model.modules() if switch(layer) is not None]
    del other
    handle.restore()
    del model
    gc.collect()
    assert not any(ref() is not None for ref in kept)


def test_a_model_without_a_call():
    model = toy()
    handle = dora_kernels.patch_peft(model)
    text = "WARNING: none of the 2 patched DoRA layers of {} was ever called"
    name = type(model).__name__
    assert handle._never_called() == [text.format(name)]
    with model.disable_adapter():
        model(torch.randn(4, 12))
    assert handle._never_called() == [text.format(name) + ": other code computes them, and not dora_kernels"]
    model.eval()(torch.randn(4, 12))
    assert handle._never_called() == []


def keep_device_forward(self, *args, **kwargs):
    """As ms-swift's, whose module and name it has."""
    x = args[0]
    return self.forward_origin(x.to(self.weight.device) if self.weight.device != x.device else x, *args[1:], **kwargs)


keep_device_forward.__module__ = "swift.tuners.peft"


@pytest.mark.parametrize("known", [True, False])
def test_a_forward_that_only_moves_its_input(known, monkeypatch):
    """ms-swift's layers run as one function; with any other forward they are called module by module."""
    _, ours, _ = toy_twins()
    plain, seen = copy.deepcopy(ours), []
    for layer in lora_layers(ours):
        for part in (layer.lora_A["default"], layer.lora_B["default"]):
            part.forward_origin = part.forward
            forward = keep_device_forward if known else lambda self, x: (seen.append(1), self.forward_origin(x))[1]
            part.forward = types.MethodType(forward, part)
    x = torch.randn(4, 12)
    with counted(monkeypatch) as counts:
        results = [ours(x), ours(x)]
    wanted = plain(x)
    assert all(torch.equal(y, wanted) if known else torch.allclose(y, wanted) for y in results)
    assert (counts["layer"], len(seen)) == ((4, 0) if known else (0, 8))
    layer.lora_A["default"].forward = lambda x: 0 * layer.lora_A["default"].forward_origin(x)
    assert not torch.allclose(ours(x), wanted), "a later forward was not called"
