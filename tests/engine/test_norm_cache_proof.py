"""Writers that are no optimizer's, or no longer: a proof that nothing was written must not be taken for one."""

# ruff: noqa: F811 (fixtures are imported)

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from cached_layer import IN, OUT, Layer, compares, counted, lane, layer, x  # noqa: F401
from torch import nn

from dora_kernels.engine import fingerprints, writes
from dora_kernels.engine.fingerprints import sample
from dora_kernels.engine.norm_cache import set_norm_reuse


def by_hand(*parameters):
    for parameter in parameters:
        parameter.data.sub_(parameter.grad, alpha=0.1)
        parameter.grad = None


def test_the_backward_of_an_older_graph(layer, x):
    """The norm that is at hand was computed after the graph whose backward the update is made from."""
    y = layer(x)
    layer.eval()
    layer(x)
    layer.train()
    with torch.no_grad():
        layer(x)
    y.square().mean().backward()
    by_hand(layer.lora_A, layer.lora_B)
    assert layer.is_right(x), "a stale norm"


def test_a_backward_while_reuse_is_off(layer, x):
    with torch.no_grad():
        layer(x)
    set_norm_reuse(False)
    try:
        layer(x).square().mean().backward()
        by_hand(layer.lora_A, layer.lora_B)
    finally:
        set_norm_reuse(True)
    assert layer.is_right(x), "a stale norm"


def test_the_backward_of_another_layer_with_the_same_factors(layer, x):
    other = copy.deepcopy(layer)
    other.lora_A, other.lora_B = layer.lora_A, layer.lora_B
    with torch.no_grad():
        layer(x)
    other(x).square().mean().backward()
    by_hand(layer.lora_A, layer.lora_B)
    assert layer.is_right(x), "a stale norm"


def test_parameters_that_an_optimizer_has_given_up(layer, x):
    optimizer = torch.optim.SGD([layer.lora_A, layer.lora_B], lr=0.0)
    layer(x).square().mean().backward()
    optimizer.step()
    assert layer.is_right(x)
    optimizer.param_groups[0]["params"] = [nn.Parameter(torch.zeros(1))]
    layer(x).square().mean().backward()
    by_hand(layer.lora_A, layer.lora_B)
    assert layer.is_right(x), "a stale norm"


def owned(layer, x):
    """An optimizer of all that trains, which was seen to step, and a norm computed since."""
    optimizer = torch.optim.SGD([layer.lora_A, layer.lora_B], lr=0.0)
    layer(x).square().mean().backward()
    optimizer.step()
    layer(x)
    return optimizer


def test_a_captured_step_may_be_replayed_at_any_time(layer, x):
    """Nothing runs in Python then: no step, no backward."""
    optimizer = owned(layer, x)
    writes._stepped[id(optimizer)].captured = True
    layer.lora_A.data.mul_(1.5)
    assert layer.is_right(x), "a stale norm"


def test_sharded_parameters_may_be_gathered_anew(layer, x, monkeypatch):
    """Their optimizer owns the sharded ones, of which the layer has what was gathered."""
    layer(x)
    assert counted(layer.cache, lambda: layer(x)) == (0, 1)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    if not compares(layer.lane):
        assert counted(layer.cache, lambda: layer(x))[1] == 0
    layer.lora_A.data.mul_(1.5)
    assert layer.is_right(x), "a stale norm"


def test_an_optimizers_own_parameters_are_not_gathered(layer, x, monkeypatch):
    """As under `DistributedDataParallel`: what is known of one process is known of several."""
    optimizer = owned(layer, x)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert counted(layer.cache, lambda: layer(x)) == (0, 1)
    optimizer.param_groups[0]["lr"] = 0.1
    layer(x).square().mean().backward()
    optimizer.step()
    assert layer.is_right(x), "a stale norm"


@pytest.mark.parametrize("magnitude_axis", ["out", "in"])
def test_a_weight_with_gaps_is_sampled_all_over(lane, x, magnitude_axis):
    layer = Layer(lane, magnitude_axis).eval()
    rows = torch.randn(8 * OUT, 2 * IN, device=lane.device)
    layer.weight = nn.Parameter(rows[:, ::2], requires_grad=False)
    layer.lora_B = nn.Parameter(torch.randn(8 * OUT, layer.lora_A.shape[0], device=lane.device))
    layer.magnitude = nn.Parameter(torch.ones(8 * OUT if magnitude_axis == "out" else IN, device=lane.device))
    with torch.no_grad():
        layer(x)
        layer.weight.data[OUT:].mul_(3)
        assert layer.is_right(x), "a stale norm"


@pytest.mark.parametrize("shape", [(1, 1), (3, 1000), (700, 512), (512, 700), (5, 7)])
def test_the_sample_is_a_part_of_the_weight(shape):
    weight = torch.arange(shape[0] * shape[1], dtype=torch.float32).view(shape)
    for given in (weight, weight.t(), weight[1:], weight[:, 1:], weight[::2, ::3]):
        if given.numel():
            found = sample(given)
            assert set(found.tolist()) <= set(given.flatten().tolist())
            assert min(given.numel(), 1) <= found.numel() <= 3 * fingerprints._SAMPLES


@pytest.mark.parametrize("shape", [(256, 256), (64, 512), (96, 300), (8, 64, 32), (4, 128, 64), (64, 16, 3, 3)])
def test_the_sample_is_spread_over_all_dimensions(shape):
    """A write to a quarter of the columns of all rows, or to one expert, meets it."""
    places = torch.stack(torch.meshgrid(*map(torch.arange, shape), indexing="ij"))
    for transposed in (False, True):
        for each, size in zip(places, shape):
            found = sample(each.transpose(0, 1).contiguous().transpose(0, 1) if transposed else each)
            quarters = (found * 4 // size).unique() if size >= 16 else found.unique()
            assert len(quarters) == min(size, 4) if size >= 16 else len(quarters) == size


def test_nothing_keeps_the_storage_of_a_weight_that_was_converted(layer, x):
    layer(x)
    old = weakref.ref(layer.weight.untyped_storage())
    layer.bfloat16()
    layer(x.bfloat16())
    assert old() is None
