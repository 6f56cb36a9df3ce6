"""The kept norm is never stale, whoever writes the weights and however, optimizers aside."""

# ruff: noqa: F811 (fixtures are imported)

from __future__ import annotations

import pytest
import torch
from cached_layer import IN, OUT, RANK, Layer, accumulate, compares, lane, layer, x  # noqa: F401
from torch import nn

from dora_kernels import invalidate


@pytest.mark.parametrize("training", [True, False])
def test_changes_that_show(layer, x, training):
    layer.train(training)
    assert layer.is_right(x)
    layer.scaling = 0.3
    assert layer.is_right(x), "stale after a changed scaling"
    for name in ("weight", "lora_A", "lora_B"):
        parameter = getattr(layer, name)
        with torch.no_grad():
            parameter.mul_(1.5)
        assert layer.is_right(x), f"stale after {name} was written in place"
        parameter.data = parameter.data * 1.5
        assert layer.is_right(x), f"stale after {name}.data was replaced"
        setattr(layer, name, nn.Parameter(parameter.detach() * 1.5))
        assert layer.is_right(x), f"stale after {name} was replaced"
    layer.load_state_dict({name: t * 0.7 for name, t in layer.state_dict().items()})
    assert layer.is_right(x), "stale after load_state_dict"
    layer.double().float()
    assert layer.is_right(x)


@pytest.mark.parametrize("name", ["weight", "lora_A", "lora_B"])
def test_writes_through_data_in_evaluation(layer, x, name):
    """As EMA swaps and hotswaps write: neither a version nor a step moves."""
    layer.eval()
    assert layer.is_right(x)
    kept = getattr(layer, name).detach().clone()
    getattr(layer, name).data.mul_(1.5)
    assert layer.is_right(x), "a stale norm"
    getattr(layer, name).data.copy_(kept)
    assert layer.is_right(x), "a stale norm"


@pytest.mark.parametrize("name", ["weight", "lora_A", "lora_B"])
def test_writes_through_data_between_training_and_evaluation(layer, x, name):
    layer(x)
    for training in (False, True, False, True):
        getattr(layer, name).data.mul_(1.5)
        layer.train(training)
        assert layer.is_right(x), "a stale norm"


@pytest.mark.parametrize("name", ["weight", "lora_A", "lora_B"])
def test_writes_through_data_after_an_optimizer_step(layer, x, name):
    """As merging an adapter into its base during training does, after the step."""
    optimizer = torch.optim.AdamW([layer.lora_A, layer.lora_B], lr=0.1, fused=True)
    for _ in range(3):
        accumulate(layer, x, 2)
        optimizer.step()
        optimizer.zero_grad()
        getattr(layer, name).data.mul_(1.1)
    assert layer.is_right(x)


@pytest.mark.parametrize("name", ["weight", "lora_A", "lora_B"])
def test_writes_through_data_within_a_step(layer, x, name):
    """As SAM and average swaps in training mode write, beside the optimizer that owns the parameters."""
    optimizer = torch.optim.AdamW([layer.lora_A, layer.lora_B], lr=0.1, fused=True)
    for _ in range(2):
        accumulate(layer, x, 2)
        optimizer.step()
        optimizer.zero_grad()
    layer(x).sum().backward()
    kept = getattr(layer, name).detach().clone()
    getattr(layer, name).data.mul_(1.5)
    if not compares(layer.lane):
        invalidate(layer)  # nothing can see it there
    assert layer.is_right(x), "a stale norm"
    getattr(layer, name).data.copy_(kept)
    if not compares(layer.lane):
        invalidate(layer)
    assert layer.is_right(x), "a stale norm"


@pytest.mark.parametrize("shape", [(40 * OUT, IN), (OUT, 40 * IN)], ids=["tall", "wide"])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_part_of_the_weight_written(lane, shape, transposed):
    """A fiftieth of it in one piece, wherever; and over steps that renew the norm but not what is kept of W."""
    layer, x = Layer(lane), torch.randn(2, shape[1], device=lane.device)
    values = torch.randn(shape[::-1] if transposed else shape, device=lane.device)
    layer.weight = nn.Parameter(values.t() if transposed else values, requires_grad=False)
    layer.lora_A = nn.Parameter(torch.randn(RANK, shape[1], device=lane.device))
    layer.lora_B = nn.Parameter(torch.randn(shape[0], RANK, device=lane.device))
    layer.magnitude = nn.Parameter(torch.ones(shape[0], device=lane.device))
    layer.eval()
    pieces = values.view(50, -1)
    for piece in range(0, 50, 16 if lane.interpreted else 1):
        assert layer.is_right(x)
        pieces.data[piece].mul_(2)
    layer.lora_B.data.mul_(1.1)
    assert layer.is_right(x)


@pytest.mark.parametrize("change", [lambda w: w.view(-1)[1].add_(100.0), lambda w: w[-1, -2].mul_(50.0)])
def test_few_elements_written_where_versions_show_it(lane, change):
    """However few: the sample is for what shows nowhere else."""
    layer, x = Layer(lane), torch.randn(2, IN, device=lane.device)
    layer.weight = nn.Parameter(torch.randn(40 * OUT, IN, device=lane.device), requires_grad=False)
    layer.lora_B = nn.Parameter(torch.randn(40 * OUT, RANK, device=lane.device))
    layer.magnitude = nn.Parameter(torch.ones(40 * OUT, device=lane.device))
    for training in (False, True):
        layer.train(training)
        for _ in range(3):
            assert layer.is_right(x), "a stale norm"
            with torch.no_grad():
                change(layer.weight)
        layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
        with torch.no_grad():
            change(layer.weight)
        assert layer.is_right(x), "stale after the weight was replaced"


def test_swapped_tensors(layer, x):
    """`torch.utils.swap_tensors`, which modules may use to change dtype, refuses tensors with weak references."""
    optimizer = torch.optim.SGD([layer.lora_A, layer.lora_B], lr=0.1)
    layer(x).sum().backward()
    optimizer.step()
    layer(x)
    layer.zero_grad()
    for name in ("weight", "lora_A", "lora_B"):
        old = getattr(layer, name)
        torch.utils.swap_tensors(old, nn.Parameter(2 * old.detach(), requires_grad=old.requires_grad))
        assert layer.is_right(x), "a stale norm"
