"""One question for a model's forward: what `ask_once` installs, on layers whose norms the device is asked about."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from helpers import KEPT, norm_lane
from torch import nn

from dora_kernels import DoRALinear, frozen_norms, invalidate, set_norm_reuse
from dora_kernels.engine import norm_cache
from dora_kernels.engine.model_forward import AskOnce, ask_once


@pytest.fixture(params=KEPT)
def lane(request):
    with norm_lane(request.param) as lane:
        yield lane


class Model(nn.Module):
    """Two layers, in a module around them."""

    def __init__(self, lane):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Sequential(
            DoRALinear(12, 16, rank=3, backend=lane.backend), nn.ReLU(), DoRALinear(16, 8, rank=2, backend=lane.backend)
        )
        for layer in self.inner[::2]:
            nn.init.normal_(layer.lora_B.weight)
        self.to(lane.device)

    def forward(self, x):
        return self.inner(x)


@pytest.fixture
def model(lane):
    model = Model(lane).eval()
    model.undo = ask_once(model)
    return model


@pytest.fixture
def x(lane):
    return torch.randn(2, 12, device=lane.device)


def counts(model):
    """How many norms were computed, reused and asked of the device."""
    caches = [layer._norm_cache for layer in model.inner[::2]]
    return [sum(getattr(cache, name) for cache in caches) for name in ("computed", "reused", "asked")]


def wanted(model, x):
    """What a copy without hooks and kept norms computes."""
    with torch.no_grad():
        for layer in model.inner:
            x = copy.deepcopy(layer)(x)
    return x


@pytest.mark.parametrize("part", ["model", "inner"])
def test_layers_take_the_answers(model, x, part):
    called = model if part == "model" else model.inner
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(called(x), wanted(model, x))
    assert counts(model) == [0, 6, 0]
    assert norm_cache.answers.norms is None


def test_writes_between_forwards_are_seen(model, x):
    first, _, last = model.inner
    with torch.no_grad():
        for parameter in (first.lora_A.weight, last.lora_B.weight, first.base_layer.weight, last.magnitude):
            model(x)
            parameter.data.mul_(1.5)
            torch.testing.assert_close(model(x), wanted(model, x))
            parameter.mul_(1.5)
            torch.testing.assert_close(model(x), wanted(model, x))
        first.lora_A.weight = nn.Parameter(first.lora_A.weight * 1.5)
        torch.testing.assert_close(model(x), wanted(model, x))


def test_only_what_changed_is_computed(model, x, monkeypatch):
    computed = []
    right = norm_cache.compute_norm
    monkeypatch.setattr(
        "dora_kernels.engine.model_forward.compute_norm",
        lambda weights, *rest: (computed.append(weights.lora_A.shape[0]), right(weights, *rest))[1],
    )
    with torch.no_grad():
        model(x)
        model(x)
        model.inner[2].lora_A.weight.data.add_(1.0)
        model(x)
    assert computed == [3, 2, 2]


def test_a_failed_forward_leaves_no_answers(model, x):
    with pytest.raises(ValueError, match="x: expected"), torch.no_grad():
        model(x[:, :5])
    assert norm_cache.answers.norms is None
    with torch.no_grad():
        model.inner[0].lora_B.weight.data.mul_(2.0)
        torch.testing.assert_close(model.inner[0](x), wanted_of(model.inner[0], x))


def wanted_of(layer, x):
    return copy.deepcopy(layer)(x)


def test_training_and_frozen_norms_do_not_ask(model, x):
    model.train()(x).sum().backward()
    before = counts(model)
    with frozen_norms(model.eval()), torch.no_grad():
        model(x)
    assert counts(model) == before


def test_gradients_in_evaluation_keep_their_snapshot(model, x):
    y = model(x).sum()
    norms = [layer._norm_cache for layer in model.inner[::2]]
    with torch.no_grad():
        for layer in model.inner[::2]:
            layer.lora_A.weight.data.mul_(3.0)
        model(x)
    y.backward()
    reference = Model.forward(model, x)
    assert torch.isfinite(reference).all() and norms
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_copies_and_pickles_ask_for_themselves(model, x):
    with torch.no_grad():
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(without_undo(model)))):
            other.inner[0].lora_A.weight.data.mul_(1.5)
            torch.testing.assert_close(other(x), wanted(other, x))
            torch.testing.assert_close(model(x), wanted(model, x))


def without_undo(model):
    model.__dict__.pop("undo")
    return model


def test_undone(model, x):
    model.undo()
    assert not any(hooks(module) for module in model.modules())
    with torch.no_grad():
        model(x)
    assert counts(model)[2] == 2  # each layer asks


def test_twice_is_once(model):
    ask_once(model)
    assert [hooks(module) for module in (model, model.inner)] == [1, 1]


def hooks(module):
    return sum(isinstance(getattr(hook, "__self__", None), AskOnce) for hook in module._forward_hooks.values())


@pytest.mark.parametrize("remedy", ["invalidate", "no reuse"])
def test_the_remedies_reach_the_answers(model, x, remedy):
    """What docs/design.md gives against writes that nothing can see."""
    with torch.no_grad():
        model(x)
        before = counts(model)[0]
        if remedy == "invalidate":
            invalidate(model)
            model(x)
            torch.testing.assert_close(model(x), wanted(model, x))
        else:
            set_norm_reuse(False)
            try:
                model(x)
                assert counts(model)[0] == before + 2  # computed by the layers, not answered
            finally:
                set_norm_reuse(True)


def test_invalidated_norms_are_computed_anew(model, x, monkeypatch):
    computed = []
    right = norm_cache.compute_norm
    monkeypatch.setattr(
        "dora_kernels.engine.model_forward.compute_norm",
        lambda weights, *rest: (computed.append(weights.lora_A.shape[0]), right(weights, *rest))[1],
    )
    with torch.no_grad():
        model(x)
        invalidate(model.inner[2])
        model(x)
    assert computed == [3, 2, 2]


def test_a_norm_that_could_not_be_computed_is_computed_later(model, x, monkeypatch):
    """The watch has noted the write by then."""
    right = norm_cache.compute_norm
    with torch.no_grad():
        model(x)
        model.inner[0].lora_B.weight.data.mul_(3.0)
        monkeypatch.setattr("dora_kernels.engine.model_forward.compute_norm", failing)
        with pytest.raises(RuntimeError, match="out of memory"):
            model(x)
        monkeypatch.setattr("dora_kernels.engine.model_forward.compute_norm", right)
        torch.testing.assert_close(model(x), wanted(model, x))


def failing(*_):
    raise RuntimeError("out of memory")
