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
from peft import LoraConfig, get_peft_model
from peft_models import FIRST, SECOND, anatomy, counted, lora_layers, move_adapter, toy, toy_twins
from torch import nn

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
    layers[SECOND].forward = lambda x: x.new_zeros(len(x), layers[SECOND].out_features)
    x = torch.randn(4, 12, requires_grad=True)
    (model(x).sum() + x.sum()).backward()
    assert handle.patched == [FIRST, SECOND]
    b = layers[SECOND].lora_B["default"].weight
    assert b._post_accumulate_grad_hooks
    handle.restore()
    assert not b._post_accumulate_grad_hooks


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
    assert handle._never_called() == [text.format(name) + ", nor was the model"]
    with model.disable_adapter():
        model(torch.randn(4, 12))
    assert handle._never_called() == [text.format(name) + ": other code computes them, and not dora_kernels"]
    model.eval()(torch.randn(4, 12))
    assert handle._never_called() == []


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_a_model_that_is_only_merged(merge):
    """Its layers are never called, and nothing is wrong with that."""
    model = toy().eval()
    handle = dora_kernels.patch_peft(model)
    merged = getattr(model, merge)() or model
    assert handle._never_called() == []
    merged(torch.randn(4, 12))
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


def encoder(**options):
    """torch's Transformer encoder with moved DoRA adapters, in evaluation, without dropout."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    config = LoraConfig(r=2, use_dora=True, **options)
    return move_adapter(get_peft_model(nn.TransformerEncoder(layer, 2), config)).eval()


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
def test_torchs_encoder_in_evaluation(padded):
    """Its fast path reads the weights of its linear layers, so that it drops their adapters. It is not taken."""
    model = encoder(target_modules=["linear1", "linear2"])
    x, mask = torch.randn(3, 5, 8), torch.arange(5) >= torch.tensor([[5], [4], [2]]) if padded else None
    base, before = model(x, src_key_padding_mask=mask), anatomy(model)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        wanted = model(x, src_key_padding_mask=mask)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    kept = slice(None) if mask is None else ~mask
    assert not torch.allclose(wanted[kept], base[kept], atol=1e-2), "PEFT has no such adapter"
    handle = dora_kernels.patch_peft(model)
    assert len(handle.patched) == 4 and not handle.skipped
    for _ in range(2):  # with the hooks of the first training step, and without
        torch.testing.assert_close(model(x, src_key_padding_mask=mask)[kept], wanted[kept])
        with torch.enable_grad():
            model.train()(x).sum().backward()
        model.eval()
    torch.testing.assert_close(copy.deepcopy(model)(x, src_key_padding_mask=mask)[kept], wanted[kept])
    handle.restore()
    assert torch.equal(model(x, src_key_padding_mask=mask), base) and anatomy(model) == before


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_a_warning_as_an_error_leaves_the_model_alone():
    model = encoder(target_modules=["out_proj", "linear1"])
    before = anatomy(model)
    with pytest.raises(RuntimeWarning, match="reads its weight and never calls it"):
        dora_kernels.patch_peft(model)
    assert anatomy(model) == before


@pytest.mark.parametrize("globally", [False, True])
def test_a_layer_that_is_never_called_is_told_aloud(globally, recwarn):
    """Once, with what to do. A layer of which the adapter does run is not."""
    handles = [dora_kernels.patch_peft_globally()] if globally else []
    try:
        models = [encoder(target_modules=["out_proj", "linear1"]) for _ in range(2)]
        handles += [] if globally else map(dora_kernels.patch_peft, models)
        (said,) = [str(one.message) for one in recwarn if issubclass(one.category, RuntimeWarning)]
        assert "layers.0.self_attn.out_proj (MultiheadAttention reads its weight and never calls it)" in said
        assert "and 1 more; leave them out of target_modules" in said and "linear1" not in said
        assert all(len(handle.skipped) == len(handle.patched) for handle in handles)
    finally:
        for handle in handles:
            handle.restore()
