"""The merged forward: gradients against the oracle, consumers that write, when V' is made again, what is refused."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from helpers import LANES, NAMES, all_of, bf16, check, f64, leaves_of, make_problem, saved_by, usable
from torch import nn
from torch.utils.checkpoint import checkpoint

import dora_kernels
from dora_kernels import DoRALinear, apply_dora, frozen_norms
from dora_kernels.core.problem import Form, Weights
from dora_kernels.engine import merged
from dora_kernels.engine.layer import run_layer
from dora_kernels.engine.norm_cache import NormCache

SIXTEEN = torch.bfloat16, torch.float16
TRAINED = [name for name in NAMES if name != "weight"]


@pytest.fixture(params=LANES)
def lane(request):
    return usable(request.param)


def results(problem, needs=TRAINED, consume=lambda y: y, run=lambda call, *given: call(*given), backend="auto"):
    form = Form(problem.scaling, problem.magnitude_axis, problem.detach_norm)
    cache = NormCache(form._replace(detach_norm=True), backend, True)
    leaves = leaves_of(problem, needs)

    def layer(x, *tensors):
        return consume(run_layer(x, Weights(*tensors), form, cache, True, backend))

    y = run(layer, *leaves.values())
    assert cache.merged is not None and cache.refreshes == 1
    y.backward(problem.dy)
    return {"y": y.detach(), **{name: leaves[name].grad for name in needs if leaves[name] is not None}}


def needed(problem):
    return [name for name in TRAINED if problem.tensors[name] is not None]


@pytest.mark.parametrize("magnitude_axis", ["out", "in"])
@pytest.mark.parametrize("detach_norm", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_gradients(lane, magnitude_axis, detach_norm, bias):
    problem = make_problem(
        (2, 9), 21, 34, 4, magnitude_axis=magnitude_axis, detach_norm=detach_norm, bias=bias, device=lane.device
    )
    check(results(problem, needed(problem), backend=lane.backend), problem, needed(problem))


@pytest.fixture
def in_sixteen_bits(monkeypatch):
    """What is refused otherwise."""
    monkeypatch.setattr(merged, "DTYPES", (*merged.DTYPES, *SIXTEEN))


@pytest.mark.usefixtures("in_sixteen_bits")
@pytest.mark.parametrize("dtypes", ["bf16", "bf16+fp32", "fp16", "fp16+fp32"])
@pytest.mark.parametrize("magnitude_axis", ["out", "in"])
def test_sixteen_bits(lane, dtypes, magnitude_axis):
    problem = make_problem(
        (2, 9), 40, 34, 4, all_of(dtypes), magnitude_axis=magnitude_axis, detach_norm=False, device=lane.device
    )
    problem.magnitude[3] *= 2.0**-9
    check(results(problem, backend=lane.backend), problem, TRAINED)


@pytest.mark.usefixtures("in_sixteen_bits")
def test_small_updates_are_not_lost():
    """The 16-bit V' moves as far as the float32 one, though hardly an element moves by half of its step."""
    torch.manual_seed(0)
    one = DoRALinear(200, 300, rank=4, dtype=bf16, forward="merged")
    nn.init.normal_(one.lora_B.weight, std=1e-5)
    one(torch.randn(3, 200, dtype=bf16))
    weight, v = one.base_layer.weight.double(), one._norm_cache.merged.weight.double()
    update = one.scaling * one.lora_B.weight.double() @ one.lora_A.weight.double()
    seen = ((v - weight) * update).sum() / update.square().sum()
    deviation = (update.abs() * weight.abs() * 2.0**-7 * update.square()).sum().sqrt() / update.square().sum()
    assert abs(seen - 1) < 5 * deviation < 0.5 and (weight + update).to(bf16).eq(weight).double().mean() > 0.9


@pytest.mark.usefixtures("in_sixteen_bits")
def test_the_same_bits_for_the_same_layer():
    """In every copy, at every refresh; layers with other weights round in other places."""
    x = torch.randn(3, 24, dtype=bf16)
    one, other = layer(dtype=bf16), layer(dtype=bf16)
    first = one(x), one._norm_cache.merged.weight
    dora_kernels.invalidate(one)
    assert torch.equal(one(x), first[0]) and one._norm_cache.refreshes == 2
    other.load_state_dict(one.state_dict())
    assert torch.equal(other(x), first[0])
    base = one.base_layer.weight
    moved = merged._seed(base), merged._seed(base + 1), merged._seed(base.clone())
    assert moved[0] == moved[2] != moved[1]


@pytest.mark.parametrize("magnitude_axis", ["out", "in"])
@pytest.mark.parametrize("detach_norm", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_of_a_high_rank(magnitude_axis, detach_norm, bias):
    """They come from dYᵀ X, and no output is kept."""
    problem = make_problem((90,), 40, 34, 30, magnitude_axis=magnitude_axis, detach_norm=detach_norm, bias=bias)
    problem.magnitude[3] = 0.0
    _, saved = saved_by(lambda: results(problem, needed(problem)))
    assert not any(t.shape == problem.dy.shape for t in saved)
    check(results(problem, needed(problem)), problem, needed(problem))
    check(results(problem, ["lora_A", "magnitude"]), problem, ["lora_A", "magnitude"])


def test_float64():
    problem = make_problem((9,), dtypes=(f64,) * 3)
    check(results(problem), problem, TRAINED)


@pytest.mark.parametrize("needs", [["x"], ["lora_A"], ["lora_B"], ["magnitude"], ["bias"]], ids=str)
@pytest.mark.parametrize("detach_norm", [True, False])
def test_subsets(needs, detach_norm):
    problem = make_problem((9,), detach_norm=detach_norm)
    check(results(problem, needs), problem, needs)


@pytest.mark.parametrize("magnitude_axis", ["out", "in"])
@pytest.mark.parametrize("value", [0.0, -1e-30], ids=str)
def test_magnitudes_of_zero(magnitude_axis, value):
    """Their gradients are not 0."""
    problem = make_problem((9,), magnitude_axis=magnitude_axis)
    problem.magnitude[2] = value
    check(results(problem), problem, TRAINED)


def test_a_row_without_a_norm():
    problem = make_problem((9,))
    problem.weight[4], problem.lora_B[4] = 0.0, 0.0
    check(results(problem), problem, TRAINED)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("reentrant", [None, True, False], ids=str)
def test_consumers_that_write(bias, reentrant):
    problem = make_problem((9,), bias=bias)

    def run(call, *given):
        return call(*given) if reentrant is None else checkpoint(call, *given, use_reentrant=reentrant)

    for writing, plain in [
        (lambda y: y.mul_(3), lambda y: y * 3),
        (torch.sigmoid_, torch.sigmoid),
        (lambda y: y.view(3, 3, -1).add_(1).view(y.shape), lambda y: y + 1),
    ]:
        one, other = (results(problem, needed(problem), consume, run) for consume in (writing, plain))
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_large_bias():
    """It takes no digits from the magnitude's gradient."""
    problem = make_problem((64,))
    problem.bias.fill_(1e5)
    check(results(problem), problem, TRAINED)


def layer(**options):
    torch.manual_seed(0)
    one = DoRALinear(24, 40, bias=False, rank=4, forward="merged", **options)
    nn.init.normal_(one.lora_B.weight, std=0.1)
    return one.train()


def composed(one, **options):
    """The same tensors, run the other way."""
    other = DoRALinear.from_linear(copy.deepcopy(one.base_layer), rank=4, alpha=one.alpha, **options)
    other.load_state_dict(one.state_dict())
    return other.train(one.training)


@pytest.mark.parametrize("options", [{"detach_norm": False}, {"magnitude_axis": "in"}], ids=str)
def test_eps(options):
    one, x = layer(dtype=f64, eps=0.1, **options), torch.randn(5, 24, dtype=f64)
    other = composed(one, eps=0.1, **options)
    mine, theirs = (
        torch.autograd.grad(each(x).pow(2).sum(), [*each.adapter_parameters().values()]) for each in (one, other)
    )
    for pair in zip(mine, theirs, strict=True):
        torch.testing.assert_close(*pair)


def check_right(one, x):
    torch.testing.assert_close(one(x), composed(one)(x), rtol=1e-5, atol=1e-5)


def test_memory():
    """The output is kept once, whoever keeps it too, and nothing else has the size of an activation."""
    one, x = layer(), torch.randn(50, 24, requires_grad=True)
    y, saved = saved_by(lambda: nn.functional.silu(one(x)))
    large = [t for t in saved if t.shape == y.shape]
    assert len(large) == 2 and len({torch._C._data_address(t) for t in large}) == 1
    held = {torch._C._data_address(t) for t in saved} - {torch._C._data_address(t) for t in (x, y, *one.parameters())}
    sizes = [t.numel() for t in saved if torch._C._data_address(t) in held and t.numel() > 40]
    assert sorted(set(sizes)) == [24 * 40, 50 * 40], "V' and the output"


def test_made_once_per_step():
    one, x = layer(), torch.randn(5, 24)
    optimizer = torch.optim.AdamW(one.parameters(), lr=0.1, fused=True)
    for step in range(1, 4):
        for _ in range(3):
            one(x).square().sum().backward()
        assert one._norm_cache.refreshes == step
        one.eval()
        one(x), one(x)
        one.train()
        assert one._norm_cache.refreshes == step
        optimizer.step()
        check_right(one, x)


WRITES = {
    "magnitude": lambda one: one.lora_magnitude_vector.data.mul_(1.5),
    "lora_A": lambda one: one.lora_A.weight.data.mul_(1.5),
    "lora_B": lambda one: one.lora_B.weight.data[3].zero_(),
    "weight": lambda one: one.base_layer.weight.data.mul_(1.5),
    "state": lambda one: one.load_state_dict({name: 2 * t for name, t in one.state_dict().items()}),
    "moved": lambda one: one.double().float().lora_magnitude_vector.data.mul_(2),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("write", WRITES)
def test_writes_are_noticed(write, training):
    one, x = layer().train(training), torch.randn(5, 24)
    one(x)
    WRITES[write](one)
    check_right(one, x)
    assert one._norm_cache.refreshes == 2


def test_a_step_between_forward_and_backward():
    """The backward reads the V' of its forward."""
    one, x = layer(), torch.randn(5, 24, requires_grad=True)
    wanted = torch.autograd.grad(one(x).sum(), x)[0]
    y = one(x)
    WRITES["magnitude"](one)
    one(x)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], wanted)


def test_a_fresh_adapter_is_the_identity():
    base = nn.Linear(24, 40)
    one, x = DoRALinear.from_linear(base, rank=4, forward="merged"), torch.randn(5, 24)
    assert torch.equal(one(x), base(x)) and one._norm_cache.refreshes == 1


def test_copies_and_pickles():
    one, x = layer(), torch.randn(5, 24)
    y = one(x)
    for other in (copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        assert other._norm_cache.merged is None and torch.equal(other(x), y) and other._norm_cache.refreshes == 1


def test_frozen_norms():
    one, x = layer().eval(), torch.randn(5, 24)
    with torch.no_grad(), frozen_norms(one):
        one(x), one(x)
        assert one._norm_cache.refreshes == 1
    WRITES["magnitude"](one)
    check_right(one, x)


def test_second_derivatives():
    one, x = layer(dtype=f64), torch.randn(5, 24, dtype=f64, requires_grad=True)

    def second(layer):
        first = torch.autograd.grad(layer(x).pow(3).sum(), (x, layer.lora_B.weight), create_graph=True)
        return torch.autograd.grad(sum(each.square().sum() for each in first), (x, layer.lora_A.weight))

    for mine, theirs in zip(second(one), second(composed(one))):
        torch.testing.assert_close(mine, theirs)


def test_where_it_runs_composed():
    one, x = layer(), torch.randn(5, 24)
    with torch.autocast("cpu", bf16):
        one(x)
    torch.func.vmap(one.eval())(x)
    one.train().base_layer.weight.requires_grad_(True)
    one(x)
    one.base_layer.weight.requires_grad_(False)
    with DroppedOut(one):
        one(x)
    assert one._norm_cache.refreshes == 0
    one(x)
    assert one._norm_cache.refreshes == 1


class DroppedOut:
    """Dropout is active inside."""

    def __init__(self, one):
        self.one = one

    def __enter__(self):
        self.one.dropout.p = 0.5

    def __exit__(self, *exc):
        self.one.dropout.p = 0.0


def test_refused():
    with pytest.raises(ValueError, match="forward: expected 'composed' or 'merged', got 'fast'"):
        DoRALinear(4, 4, rank=2, forward="fast")
    for dtype in SIXTEEN:
        with pytest.raises(ValueError, match=f"is offered in float32, float64, and base_layer.weight is {dtype}"):
            DoRALinear(4, 4, rank=2, forward="merged", dtype=dtype)
    one = layer().to(bf16)
    one(torch.randn(3, 24, dtype=bf16))
    assert one._norm_cache.refreshes == 0
    model = nn.Sequential(nn.Linear(4, 4), nn.Embedding(3, 4))
    with pytest.raises(ValueError, match="got 'fast'"):
        apply_dora(model, ["0"], forward="fast")
    assert type(model[0]) is nn.Linear and model[0].weight.requires_grad


def test_apply_dora():
    model = nn.Sequential(nn.Embedding(3, 24), nn.Linear(24, 24))
    apply_dora(model, ["0", "1"], rank=2, forward="merged")
    model(torch.arange(3)).sum().backward()
    assert model[1]._norm_cache.refreshes == 1 and "forward='merged'" in repr(model)
    assert dora_kernels.adapted_layers(model)["0"]._norm_cache.refreshes == 0
