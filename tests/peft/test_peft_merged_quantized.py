"""The merged forward on quantised layers: against float64 on the dequantised weight; what is made once, and when."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

from helpers import bf16, check, f16, f32
from peft_models import (
    lora_layers,
    one_thread,  # noqa: F401
)
from test_peft_quantized import FORMATS, KINDS, batch, peft_model

import dora_kernels
from dora_kernels import testing
from dora_kernels.engine import merged
from dora_kernels.modules import dequantize
from dora_kernels.peft.state import norm_cache

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
NEEDS = ("x", "lora_A", "lora_B", "magnitude")


@pytest.fixture(autouse=True)
def in_sixteen_bits(request, monkeypatch):
    """What is refused otherwise."""
    if "refused" not in request.node.name:
        monkeypatch.setattr(merged, "DTYPES", (*merged.DTYPES, bf16, f16))


def merged_model(kind, dtype=bf16, bias=True, **options):
    """A patched model, its layer, and the same as a problem."""
    model, weight, b = peft_model(kind, dtype, bias, **options)
    layer = lora_layers(model)[0]
    handle = dora_kernels.patch_peft(model, forward="merged")
    assert not handle.skipped
    return model, layer, problem_of(layer, weight, b, dtype)


def problem_of(layer, weight, bias, dtype):
    a, b, m = (part["default"].weight.detach().clone() for part in (
        layer.lora_A, layer.lora_B, layer.lora_magnitude_vector
    ))  # fmt: skip
    x = batch(dtype)
    dy = torch.randn(*x.shape[:-1], len(b), generator=torch.Generator().manual_seed(4)).to(dtype)
    return testing.Problem(x, weight, a, b, m, None if bias is None else bias.detach(), dy, layer.scaling["default"])


def solve(model, problem):
    model.zero_grad(set_to_none=True)
    x = problem.x.clone().requires_grad_()
    y = model(x)
    y.backward(problem.dy)
    layer = lora_layers(model)[0]
    parts = layer.lora_A, layer.lora_B, layer.lora_magnitude_vector
    grads = [x.grad, *(part["default"].weight.grad for part in parts)]
    return {"y": y.detach(), **dict(zip(NEEDS, grads, strict=True))}


def cache_of(layer):
    return norm_cache(layer, "default")


@KINDS
@pytest.mark.parametrize("bias", [True, False], ids=["bias", ""])
@pytest.mark.parametrize("dtype", [f32, bf16], ids=["f32", "bf16"])
def test_training_and_evaluation(kind, bias, dtype):
    model, layer, problem = merged_model(kind, dtype, bias)
    check(solve(model.train(), problem), problem, NEEDS)
    with torch.no_grad():
        y = model.eval()(problem.x)
    off, allowed = testing.distance(y, testing.oracle(problem, ())["y"]), testing.budgets(problem, ())["y"]
    assert y.dtype == dtype and off <= allowed
    check(solve(model.train(), problem), problem, NEEDS)
    assert cache_of(layer).refreshes == 1 and cache_of(layer).merged.weight.dtype == dtype


@pytest.mark.parametrize("kind", ["nf4", "int8", "hqq 4", "torchao int8"])
def test_small_blocks(kind, monkeypatch):
    monkeypatch.setattr(dequantize, "BLOCK_ELEMENTS", 1024)
    model, layer, problem = merged_model(kind)
    assert len(list(dequantize.row_blocks(layer.base_layer)())) > 1
    check(solve(model, problem), problem, NEEDS)


@KINDS
def test_magnitudes_of_zero(kind):
    model, layer, problem = merged_model(kind, f32)
    with torch.no_grad():
        layer.lora_magnitude_vector["default"].weight[5] = problem.magnitude[5] = 0.0
    check(solve(model, problem), problem, NEEDS)


@KINDS
def test_made_once_per_step(kind, monkeypatch):
    """Between steps the base layer is not called, and nothing is dequantised."""
    model, layer, problem = merged_model(kind, f32)
    solve(model, problem)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    with monkeypatch.context() as patch:
        patch.setattr(type(layer.base_layer), "forward", None)
        for _ in range(3):
            solve(model, problem)
    assert cache_of(layer).refreshes == 1
    optimizer.step()
    moved = problem_of(layer, problem.weight, problem.bias, f32)
    check(solve(model, moved), moved, NEEDS)
    assert cache_of(layer).refreshes == 2
    layer.lora_magnitude_vector["default"].weight.data[3] += 1
    moved = problem_of(layer, problem.weight, problem.bias, f32)
    check(solve(model, moved), moved, NEEDS)
    assert cache_of(layer).refreshes == 3


@KINDS
def test_under_autocast(kind):
    """Results have the base layer's dtype, and V' has autocast's."""
    model, layer, problem = merged_model(kind, f32)
    with torch.autocast("cpu", bf16):
        expected = layer.base_layer.forward(problem.x).dtype
        problem = problem.replace(dy=problem.dy.to(expected))
        results = solve(model, problem)
    assert results["y"].dtype == expected and cache_of(layer).merged.weight.dtype == bf16
    rounded = {**results, "y": results["y"].to(bf16)}
    check(rounded, problem, NEEDS, bf16)
    problem = problem.replace(dy=problem.dy.to(f32))
    check(solve(model, problem), problem, NEEDS)  # in the input's again


def test_another_dtype_than_the_input():
    """bitsandbytes multiplies in its own."""
    model, layer, problem = merged_model("nf4", bf16)
    wide = problem.replace(x=problem.x.to(f32), dy=problem.dy.to(f32))
    results = solve(model, wide)
    assert results["y"].dtype == results["x"].dtype == f32 and cache_of(layer).merged.weight.dtype == bf16
    check({**results, "y": results["y"].to(bf16)}, wide, NEEDS, bf16)


@pytest.mark.parametrize("kind", ["nf4", "hqq 4"])
def test_float16(kind):
    model, layer, problem = merged_model(kind, f16)
    check(solve(model, problem), problem, NEEDS)
    assert cache_of(layer).refreshes == 1


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_where_it_runs_composed(kind):
    model, layer, problem = merged_model(kind, f32, lora_dropout=0.4)
    model(problem.x)
    hook = layer.base_layer.register_forward_hook(lambda *_: None)
    model.eval()(problem.x)
    hook.remove()
    assert cache_of(layer).refreshes == 0
    model(problem.x)
    assert cache_of(layer).refreshes == 1
    dora_kernels.patch_peft(model)
    model(problem.x)
    assert cache_of(layer).refreshes == 1 and cache_of(layer).merged is None


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if "hqq" not in kind])  # whose layers cannot be copied
def test_copies_and_frozen_norms(kind):
    model, layer, problem = merged_model(kind, bf16)
    y = model.eval()(problem.x)
    v = cache_of(layer).merged.weight
    assert torch.equal(copy.deepcopy(model)(problem.x), y)
    with torch.no_grad(), dora_kernels.frozen_norms(model):
        model(problem.x), model(problem.x)
        assert torch.equal(cache_of(layer).merged.weight, v) and cache_of(layer).refreshes == 2


def test_refused():
    """By the dtype in which the layer multiplies, or, where only a call shows that, composed."""
    model, *_ = peft_model("nf4", bf16)
    with pytest.raises(ValueError, match=r"offered in float32, float64, and .*layer.base_layer.compute_dtype is"):
        dora_kernels.patch_peft(model, forward="merged")
    model, layer, problem = merged_model("int8", bf16)
    solve(model, problem)
    assert cache_of(layer).refreshes == 0


def test_second_derivatives():
    model, _, problem = merged_model("nf4", f32)
    x = problem.x.clone().requires_grad_()
    (first,) = torch.autograd.grad(model(x).pow(2).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    wide = testing.problems.widened(problem)
    x = wide.x.clone().requires_grad_()
    y = testing.eager(x, *(wide.tensors[name] for name in testing.NAMES[1:]), **wide.options)
    (first,) = torch.autograd.grad(y.pow(2).sum(), x, create_graph=True)
    torch.testing.assert_close(second.double(), torch.autograd.grad(first.sum(), x)[0], rtol=1e-4, atol=1e-4)
