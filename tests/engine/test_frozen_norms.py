"""`frozen_norms`: the user's promise that nothing is written, under which no layer asks anything."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import dora_kernels
from dora_kernels import DoRAConv2d, DoRAEmbedding, DoRALinear, frozen_norms, invalidate
from dora_kernels.engine import norm_cache
from dora_kernels.engine.model_norms import FrozenNorms, caches

OWN = {
    "linear": (lambda: DoRALinear(12, 10, rank=3), lambda: torch.randn(4, 12)),
    "linear, no bias": (lambda: DoRALinear(12, 10, bias=False, rank=3, alpha=6), lambda: torch.randn(4, 12)),
    "linear, in": (lambda: DoRALinear(12, 10, rank=3, magnitude_axis="in"), lambda: torch.randn(2, 3, 12)),
    "linear, full": (lambda: DoRALinear(12, 10, rank=3, detach_norm=False, eps=0.3), lambda: torch.randn(4, 12)),
    "linear, dropout": (lambda: DoRALinear(12, 10, rank=3, dropout=0.5), lambda: torch.randn(4, 12)),
    "conv": (lambda: DoRAConv2d(4, 6, 3, rank=2), lambda: torch.randn(2, 4, 5, 5)),
    "conv, in": (lambda: DoRAConv2d(4, 6, 3, rank=2, magnitude_axis="in"), lambda: torch.randn(2, 4, 5, 5)),
    "conv, groups": (lambda: DoRAConv2d(4, 6, 3, rank=2, groups=2), lambda: torch.randn(2, 4, 5, 5)),
    "embedding": (lambda: DoRAEmbedding(9, 6, rank=2), lambda: torch.randint(0, 9, (3, 4))),
    "embedding, full": (lambda: DoRAEmbedding(9, 6, rank=2, detach_norm=False), lambda: torch.randint(0, 9, (3, 4))),
}  # fmt: skip
kinds = pytest.mark.parametrize("kind", OWN)
pytestmark = pytest.mark.filterwarnings("ignore:groups")


def made(kind):
    """A model of one layer whose adapter has moved, and its input."""
    torch.manual_seed(0)
    make, draw = OWN[kind]
    layer = make()
    with torch.no_grad():
        for factor in layer.factors:
            factor.normal_()
        layer.lora_magnitude_vector.mul_(1.3)
    return nn.Sequential(layer), draw()


def counts(model):
    return [(cache.computed, cache.reused, cache.asked) for cache in caches(model)]


@pytest.fixture
def nothing_is_asked(monkeypatch):
    """From its call on, whoever computes a norm or asks whether one still holds fails."""

    def start():
        def fail(*_, **__):
            raise AssertionError("a norm was computed or asked for")

        for name in ("norm", "known", "still_holds"):
            monkeypatch.setattr(norm_cache.NormCache, name, fail)
        monkeypatch.setattr("dora_kernels.engine.layer.compute_norm", fail)
        monkeypatch.setattr("dora_kernels.engine.ops.weight_norm", fail)
        monkeypatch.setattr("dora_kernels.engine.formula.weight_norm", fail)

    return start


@kinds
def test_nothing_is_asked_inside(kind, nothing_is_asked, monkeypatch):
    model, x = made(kind)
    model.eval()
    with torch.no_grad():
        wanted = model(x)
        with frozen_norms(model) as handle:
            before = counts(model)
            assert isinstance(handle, FrozenNorms) and len(handle) == len(list(caches(model))) == 1
            nothing_is_asked()
            for _ in range(3):
                torch.testing.assert_close(model(x), wanted)
            with torch.inference_mode():
                torch.testing.assert_close(model(x), wanted)
            assert counts(model) == before
        monkeypatch.undo()
        assert torch.equal(model(x), wanted)
        assert counts(model) != before, "nothing is asked after the release"


@kinds
def test_writes_are_not_seen_inside_and_are_afterwards(kind):
    """With W, B and the magnitude as they are, but a norm of before."""
    model, x = made(kind)
    layer = model[0].eval()
    with torch.no_grad():
        before = model(x)
        with frozen_norms(model):
            torch.testing.assert_close(model(x), before)
            layer.factors[1].mul_(3.0)
            frozen = model(x)
        fresh = copy.deepcopy(model)(x)
        torch.testing.assert_close(model(x), fresh)
        assert not torch.allclose(frozen, fresh), "the norm inside was not the frozen one"


def test_release_twice_and_the_handle():
    model, x = made("linear")
    handle = frozen_norms(model)
    assert len(handle) == 1
    handle.release()
    handle.release()
    assert len(handle) == 0
    with frozen_norms(model) as other:
        handle.release()  # of the first: the second is not its own
        assert len(other) == 1 and model[0]._norm_cache.frozen is not None
        model(x)
    assert model[0]._norm_cache.frozen is None


def test_an_exception_releases():
    model, _ = made("linear")
    with pytest.raises(KeyError), frozen_norms(model):
        raise KeyError("x")
    assert model[0]._norm_cache.frozen is None


@kinds
def test_training_inside(kind):
    """Gradients reach the adapter as they do outside; the magnitude's too."""
    model, x = made(kind)
    layer = model[0].train()
    if kind == "linear, dropout":
        layer.dropout.p = 0.0
    parameters = [*layer.factors, layer.lora_magnitude_vector]
    dy = torch.randn_like(model(x))
    wanted = torch.autograd.grad(model(x), parameters, dy)
    with frozen_norms(model):
        grads = torch.autograd.grad(model(x), parameters, dy)
    if layer.detach_norm:
        torch.testing.assert_close(grads, wanted)
    else:  # the norm is a constant inside: by the promise it does not change
        torch.testing.assert_close(grads[2], wanted[2])
    again = torch.autograd.grad(model(x), parameters, dy)
    torch.testing.assert_close(again, wanted)


@pytest.mark.parametrize("inside", ["bfloat16 autocast", "float64", "bfloat16"])
@pytest.mark.parametrize("kind", [kind for kind in OWN if "linear" in kind])
def test_other_dtypes_of_x(kind, inside):
    model, x = made(kind)
    model.eval()
    autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled="autocast" in inside)
    x = x if "autocast" in inside else x.to(getattr(torch, inside))
    with torch.no_grad(), autocast:
        wanted = model(x)
        with frozen_norms(model):
            y = model(x)
        assert y.dtype == wanted.dtype
        torch.testing.assert_close(y, wanted)


def test_an_adapter_that_is_fresh_is_the_identity_inside_too():
    base = nn.Linear(4096, 24)
    layer = DoRALinear.from_linear(copy.deepcopy(base), rank=4).eval()
    x = torch.randn(5, 4096)
    with frozen_norms(layer), torch.no_grad():
        assert torch.equal(layer(x), base(x))


def test_copies_are_not_frozen():
    model, x = made("linear")
    with frozen_norms(model):
        twin = copy.deepcopy(model)
    with torch.no_grad():
        twin[0].lora_B.weight.mul_(2.0)
        torch.testing.assert_close(twin(x), copy.deepcopy(twin)(x))
    assert twin[0]._norm_cache.frozen is None


def test_a_layer_itself_and_one_used_twice():
    model, x = made("linear")
    with frozen_norms(model[0]) as handle:
        assert len(handle) == 1
    layer = DoRALinear(8, 8, rank=2)
    with frozen_norms(nn.Sequential(layer, layer)) as handle:
        assert len(handle) == 1


def test_what_cannot_be_frozen():
    model, _ = made("linear")
    with pytest.raises(TypeError, match="module: expected a torch.nn.Module, got list"):
        frozen_norms([model])
    for empty in (nn.Linear(2, 2), nn.Sequential(dora_kernels.LoRALinear(2, 2, rank=1))):
        with pytest.raises(ValueError, match="module: no DoRA layer with a norm to freeze"):
            frozen_norms(empty)
    layer = DoRALinear(8, 8, rank=2)
    layer.merge()
    with pytest.raises(ValueError, match="module: no DoRA layer with a norm to freeze"):
        frozen_norms(layer)


def test_frozen_twice():
    """Nothing is frozen by a call that raises."""
    model = nn.Sequential(DoRALinear(8, 8, rank=2), DoRALinear(8, 8, rank=2))
    with frozen_norms(model[1]):
        with pytest.raises(ValueError, match="module: its norms are frozen already; release that handle first"):
            frozen_norms(model)
        assert model[0]._norm_cache.frozen is None and model[1]._norm_cache.frozen is not None
    with frozen_norms(model) as handle:
        assert len(handle) == 2


def test_a_norm_that_cannot_be_computed_freezes_nothing(monkeypatch):
    model = nn.Sequential(DoRALinear(8, 8, rank=2), DoRALinear(8, 8, rank=2))
    real = norm_cache.compute_norm
    done = []

    def second_fails(*args, **options):
        if done:
            raise RuntimeError("out of memory")
        done.append(1)
        return real(*args, **options)

    monkeypatch.setattr("dora_kernels.engine.model_norms.compute_norm", second_fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        frozen_norms(model)
    assert [layer._norm_cache.frozen for layer in model] == [None, None]


def test_invalidate_while_frozen():
    model, x = made("linear")
    with frozen_norms(model):
        with pytest.raises(ValueError, match="module: its norms are frozen; release the handle of frozen_norms first"):
            invalidate(model)
        model(x)
    invalidate(model)


def test_a_frozen_norm_is_no_inference_tensor():
    """Made in inference mode, and trained on afterwards."""
    model, x = made("linear")
    with torch.inference_mode():
        handle = frozen_norms(model)
        model(x)
    model(x).sum().backward()
    assert model[0].lora_magnitude_vector.grad is not None
    handle.release()
