"""float32 adapters on a 16-bit layer, PEFT's default: without autocast the low-rank branch is computed in float32.

The yardstick is PEFT's own layer, or along "in" and with the norm attached, which it does not have, the same operations
in the same dtypes; the oracle is in float64. Ours may err `LUCK` times as much: the rms error of 150 elements, the
smallest result compared, scatters by 1 / sqrt(2·150), the quotient of two by 8 %, and this is three times that. Results
of float32 accuracy may be off by `SUMS`, four units of float32, which the order of sums decides, and where the kernels
make the norm by its own bound.
"""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    NAMES,
    bf16,
    distance,
    divisor_of,
    f16,
    f32,
    f64,
    leaves_of,
    make_problem,
    norm_bound,
    oracle,
    ours,
    same_bits,
    solve,
)
from peft import LoraConfig, get_peft_model
from torch import nn

import dora_kernels
from dora_kernels import DoRAConv2d, DoRALinear, LoRALinear, dora_linear, testing
from dora_kernels.core import products
from dora_kernels.core.problem import Weights
from dora_kernels.engine import dispatch
from dora_kernels.engine.layer import run_compose
from dora_kernels.engine.products import mm

LUCK = 1.25
SUMS = 4 * torch.finfo(f32).eps
ADAPTED = ("x", "lora_A", "lora_B", "magnitude")
BASES = pytest.mark.parametrize("base", [bf16, f16], ids=["bf16", "f16"])


def make(base, rank=20, lead=(6, 11), **options):
    return make_problem(lead, 130, 150, rank, (base, base, f32), **options)


def compared(results, yardstick, problem, names, backend="torch"):
    """Each result's distance from the oracle within `LUCK` times the yardstick's."""
    wanted = oracle(problem)
    bound = SUMS if backend == "torch" else norm_bound(problem.weight, problem.lora_A, problem.lora_B)
    off = {n: (distance(results[n], wanted[n]), distance(yardstick[n], wanted[n])) for n in ("y", *names)}
    failures = [f"{n} off by {mine:.2e}, PEFT's by {theirs:.2e}" for n, (mine, theirs) in off.items()
                if not mine <= max(LUCK * theirs, bound * wanted[n].norm())]  # fmt: skip
    assert not failures, "; ".join(failures)


class Model(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.linear = layer

    def forward(self, x):
        return self.linear(x)


def base_layer(problem):
    layer = nn.Linear(130, 150, bias=problem.bias is not None, dtype=problem.weight.dtype)
    layer.weight.data, layer.bias = problem.weight, None if problem.bias is None else nn.Parameter(problem.bias)
    return layer.requires_grad_(False)


def peft_model(problem, dropout=0.0):
    rank, dora = problem.lora_A.shape[0], problem.magnitude is not None
    config = LoraConfig(
        r=rank, lora_alpha=problem.scaling * rank, target_modules=["linear"], use_dora=dora, lora_dropout=dropout
    )
    model = get_peft_model(Model(base_layer(problem)), config)
    layer = model.base_model.model.linear
    factors = [layer.lora_A["default"], layer.lora_B["default"]]
    if dora:
        factors.append(layer.lora_magnitude_vector["default"])
    for module, tensor in zip(factors, (problem.lora_A, problem.lora_B, problem.magnitude)):
        assert module.weight.dtype == f32
        module.weight.data = tensor.clone()
    return model.train(), [module.weight for module in factors]


def run(module, parameters, problem):
    x = problem.x.detach().requires_grad_()
    y = module(x)
    grads = torch.autograd.grad(y, [x, *parameters], problem.dy)
    return {"y": y.detach(), **dict(zip(ADAPTED, grads))}


def peft_operations(x, weight, lora_A, lora_B, magnitude, bias, scaling, magnitude_axis, detach_norm, **_):
    """What PEFT's layer does, for both axes: x cast to the adapter's dtype, the base product in its own."""
    norm = testing.weight_norm(weight, lora_A, lora_B, scaling, magnitude_axis)
    g = testing.magnitude_scale(magnitude, norm.detach() if detach_norm else norm)
    wide = x.to(lora_A.dtype)
    if magnitude_axis == "in":
        wide = wide * g
    low = scaling * F.linear(F.linear(wide, lora_A), lora_B)
    if magnitude_axis == "in":
        y = F.linear(wide.to(x.dtype), weight) + low
    else:
        y = g * (F.linear(x, weight) + low)
    return (y if bias is None else y + bias).to(x.dtype)


@BASES
@pytest.mark.parametrize(("rank", "bias"), [(1, True), (7, False), (16, True), (33, False)])
def test_as_near_as_pefts_layer(lane, base, rank, bias):
    problem = make(base, rank, bias=bias, device=lane.device)
    compared(ours(problem, lane.backend), run(*peft_model(problem), problem), problem, ADAPTED, lane.backend)


@BASES
def test_as_near_as_pefts_lora(lane, base):
    problem = make(base, magnitude=False, bias=True, device=lane.device)
    stock = run(*peft_model(problem), problem)
    compared(ours(problem, lane.backend), stock, problem, ADAPTED[:3])
    layer = LoRALinear.from_linear(base_layer(problem), rank=20, alpha=14, backend=lane.backend)
    layer.lora_A.weight.data, layer.lora_B.weight.data = problem.lora_A, problem.lora_B
    compared(run(layer, [layer.lora_A.weight, layer.lora_B.weight], problem), stock, problem, ADAPTED[:3])


@BASES
@pytest.mark.parametrize("magnitude_axis", ["out", "in"])
@pytest.mark.parametrize("detach_norm", [True, False], ids=["detached", "full"])
def test_both_axes_and_norms(lane, base, magnitude_axis, detach_norm):
    for rank, lead in ((20, (66,)), (33, (5, 13)))[lane.interpreted :]:
        problem = make(base, rank, lead, magnitude_axis=magnitude_axis, detach_norm=detach_norm, device=lane.device)
        results = ours(problem, lane.backend)
        compared(results, solve(peft_operations, problem), problem, ADAPTED, lane.backend)


@pytest.mark.parametrize("path", ["fused", "hooked", "dropout"])
def test_patched_layers(path):
    problem = make(bf16)
    dropout = 0.3 if path == "dropout" else 0.0
    results = []
    for patched in (False, True):
        model, parameters = peft_model(problem, dropout)
        if patched:
            assert dora_kernels.patch_peft(model).patched
            if path == "hooked":
                model.base_model.model.linear.lora_A["default"].register_forward_hook(lambda *_: None)
        torch.manual_seed(0)
        results.append(run(model, parameters, problem))
    if path == "dropout":  # of part of the base product too: PEFT's formula, with its own masks
        for name in ("lora_A", "lora_B"):
            assert distance(results[1][name], results[0][name]) < 1e-5 * results[0][name].norm(), name
    else:
        compared(results[1], results[0], problem, ADAPTED)


def test_dropout_of_the_low_rank_branch():
    problem = make(bf16)
    layer = DoRALinear.from_linear(base_layer(problem), rank=20, alpha=14, dropout=0.3)
    parameters = [layer.lora_A.weight, layer.lora_B.weight, layer.magnitude]
    for parameter, name in zip(parameters, ADAPTED[1:]):
        parameter.data = getattr(problem, name).clone()
    torch.manual_seed(0)
    results = run(layer.train(), parameters, problem)
    torch.manual_seed(0)
    kept = F.dropout(torch.ones_like(problem.x), 0.3).to(f64)

    def exact(x, weight, lora_A, lora_B, magnitude, bias, scaling, **_):
        g = magnitude / (weight + scaling * lora_B @ lora_A).norm(dim=1).detach()
        return g * (F.linear(x, weight) + scaling * F.linear(F.linear(x * kept, lora_A), lora_B)) + bias

    wanted = solve(exact, problem.map(lambda t: t.to(f64)))
    # 1 / 0.7 is rounded to bfloat16 in the mask, as it is in `kept`; x times it once more.
    for name, allowed in (("y", 4e-3), ("x", 6e-3), ("lora_A", 4e-3), ("lora_B", 4e-3), ("magnitude", 4e-3)):
        assert distance(results[name], wanted[name]) < allowed * wanted[name].norm(), name


@pytest.mark.parametrize("magnitude_axis", ["out", "in"])
def test_subsets_of_gradients_have_the_same_bits(lane, magnitude_axis):
    problem = make(bf16, 5, (7,), magnitude_axis=magnitude_axis, device=lane.device)
    whole = ours(problem, lane.backend)
    for size in (1, 2, 5):
        for needs in itertools.combinations(NAMES, size):
            if lane.interpreted and needs not in (("lora_A",), ("lora_A", "lora_B"), NAMES[1:]):
                continue
            some = ours(problem, lane.backend, needs)
            exact = {name: whole[name] for name in some if name not in ("y", "x", "magnitude")}
            assert same_bits({name: some[name] for name in exact}, exact), needs


@BASES
@pytest.mark.parametrize("dtypes", ["mixed", "float32"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
def test_under_autocast_as_near_as_pefts_layer(lane, base, dtypes, bias):
    """There all products are in autocast's dtype, and PEFT's error is the bar for every gradient."""
    problem = make(base if dtypes == "mixed" else f32, lead=(66,), bias=bias, device=lane.device)
    if dtypes == "float32":  # whose base product is rounded, too
        problem = problem.map(lambda t: t.to(base).to(f32))
    problem = problem.replace(dy=problem.dy.to(base))
    leaves = leaves_of(problem, ADAPTED)
    model, parameters = peft_model(problem)
    with torch.autocast(lane.device, base):
        y = dora_linear(**leaves, **problem.options, backend=lane.backend)
        stock_x = problem.x.detach().requires_grad_()
        stock_y = model(stock_x)
    wanted = [leaves[name] for name in ADAPTED]
    results = {"y": y.detach(), **dict(zip(ADAPTED, torch.autograd.grad(y, wanted, problem.dy)))}
    grads = torch.autograd.grad(stock_y, [stock_x, *parameters], problem.dy.to(stock_y.dtype))
    compared(results, {"y": stock_y.detach(), **dict(zip(ADAPTED, grads))}, problem, ADAPTED, lane.backend)


@BASES
@pytest.mark.parametrize("detach_norm", [True, False], ids=["detached", "full"])
def test_under_autocast_the_kernels_are_in_its_dtype(lane, base, detach_norm):
    """Forward and, outside of autocast, backward: the products of rank r are 16-bit ones, bit for bit."""
    if lane.backend != "triton":
        pytest.skip("about the kernels")
    problem = make(base, lead=(66,), detach_norm=detach_norm, device=lane.device)
    leaves = leaves_of(problem)
    with torch.autocast(lane.device, base):
        y = dora_linear(**leaves, **problem.options, backend=lane.backend)
    grads = dict(zip(NAMES, torch.autograd.grad(y, list(leaves.values()), problem.dy)))
    a, b = problem.lora_A.to(base), problem.lora_B.to(base)
    divisor = divisor_of(problem.weight, problem.lora_A, problem.lora_B, problem.scaling, lane.backend)
    g = problem.magnitude / divisor
    h = F.linear(problem.x, a)
    kernels = dispatch.kernels()
    product = F.linear(problem.x, problem.weight)
    assert torch.equal(
        y, kernels.compose(product, h, problem.lora_B, g, problem.bias, problem.scaling, True)
    )
    d = problem.dy @ (problem.lora_B * (g * problem.scaling).unsqueeze(1)).to(base)
    scaled, *_, p = kernels.scale_partials(problem.dy, None, g, True, False, None, h)
    assert torch.equal(grads["x"], torch.mm(d, a).addmm_(scaled, problem.weight))
    if detach_norm:
        assert torch.equal(grads["lora_A"], mm(d.t(), problem.x, f32))
        assert torch.equal(grads["lora_B"], p.sum(0) * (g * problem.scaling).unsqueeze(1))
    assert b.dtype == h.dtype == base


@BASES
def test_compose_takes_a_wider_h(lane, base):
    """Embeddings and other layers' base products; h as float32 lora_A makes it."""
    problem = make(base, bias=False, lead=(66,), device=lane.device)

    def composed(x, weight, lora_A, lora_B, magnitude, bias, scaling, backend, **_):
        divisor = divisor_of(weight, lora_A, lora_B, scaling, backend)
        h = F.linear(x.to(f32), lora_A)
        weights = Weights(weight, lora_A, lora_B, magnitude)
        return run_compose(F.linear(x, weight), h, weights, scaling, lambda: divisor, backend)

    results = solve(composed, problem, ADAPTED, backend=lane.backend)
    assert results["y"].dtype == base
    compared(results, solve(peft_operations, problem), problem, ADAPTED, lane.backend)


@pytest.mark.parametrize("narrow", [bf16, f16, f32])
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_mixed_products_are_exact(narrow, layout, monkeypatch):
    """In one block and in several, of either layout."""
    generator = torch.Generator().manual_seed(0)
    wide = f64 if narrow == f32 else f32
    left = torch.randn(90, 70, generator=generator).to(narrow)
    left = left if layout == "rows" else left.t().contiguous().t()
    right = torch.randn(70, 5, generator=generator, dtype=f64).to(wide)
    exact = left.double() @ right.double()
    for elements in (1 << 20, 16 * 70):
        monkeypatch.setattr(products, "BLOCK_ELEMENTS", elements)
        for found in (
            mm(left, right, wide),
            mm(right.t(), left.t(), wide).t(),
        ):
            assert found.dtype == wide
            assert distance(found, exact) < 4 * torch.finfo(wide).eps * exact.norm()


@pytest.mark.parametrize("magnitude_axis", ["out", "in"])
@pytest.mark.parametrize("kind, dropout", [("linear", 0.5), ("conv", 0.0), ("conv", 0.5)])
def test_layers_round_no_input_of_the_low_rank_branch(kind, dropout, magnitude_axis):
    """Where it is no part of one function, too: the factors' gradients are as exact as those of a float32 layer."""
    torch.manual_seed(0)
    options = {"rank": 8, "magnitude_axis": magnitude_axis, "dropout": dropout, "bias": False, "dtype": bf16}
    layer = DoRALinear(64, 48, **options) if kind == "linear" else DoRAConv2d(16, 24, 3, **options)
    with torch.no_grad():
        layer.lora_B.weight.normal_(0, 0.1)
        layer.lora_magnitude_vector.mul_(1.234)
    x = torch.randn(*((100, 64) if kind == "linear" else (4, 16, 9, 9))).to(bf16)
    dy = torch.randn_like(layer(x))
    results = []
    for dtype in (f64, f32, None):
        one = layer if dtype is None else copy.deepcopy(layer).to(dtype)
        torch.manual_seed(1)
        y = one(x if dtype is None else x.to(dtype))
        results.append(torch.autograd.grad(y, one.factors, dy.to(y.dtype)))
    for wanted, theirs, mine in zip(*results, strict=True):
        assert distance(mine, wanted) <= max(LUCK * distance(theirs, wanted), SUMS * wanted.norm())
