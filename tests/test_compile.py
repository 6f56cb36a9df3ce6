"""`torch.compile(fullgraph=True)`: agreement with eager, and the contracts of the registered ops."""

from __future__ import annotations

import pytest
import torch
from helpers import NAMES, bf16, check, f32, gradients, leaves_of, make_problem, ours
from torch.library import opcheck

from dora_kernels import DoRAConv2d, DoRAEmbedding, dora_linear, dora_weight_norm
from dora_kernels.engine import ops

axes = pytest.mark.parametrize("magnitude_axis", ["out", "in"])
detachments = pytest.mark.parametrize("detach_norm", [True, False], ids=["detached", "full"])


@pytest.fixture(autouse=True)
def clean_compiler():
    """No graph of one test is another's; and the compiler's own scratch memory needs no poison."""
    torch._dynamo.reset()
    torch.utils.deterministic.fill_uninitialized_memory = False
    yield
    torch.utils.deterministic.fill_uninitialized_memory = True


def layer(leaves, options, backend):
    return dora_linear(**leaves, **options, backend=backend)


def compiled_results(problem, lane, compiler, needs=NAMES, **options):
    leaves = leaves_of(problem, needs)
    y = torch.compile(layer, backend=compiler, fullgraph=True, **options)(leaves, problem.options, lane.backend)
    return {"y": y.detach(), **gradients(y, leaves, problem.dy)}


@pytest.mark.parametrize("dtypes", [(f32, f32, f32), (bf16, bf16, f32)], ids=["f32", "bf16"])
@axes
@detachments
def test_fullgraph(lane, dtypes, magnitude_axis, detach_norm):
    problem = make_problem(
        (3, 5), 37, 41, 4, dtypes, magnitude_axis=magnitude_axis, detach_norm=detach_norm, device=lane.device
    )
    check(compiled_results(problem, lane, "aot_eager"), problem)


@pytest.mark.parametrize("needs", [{"lora_A", "lora_B", "magnitude"}, {"x", "lora_A", "lora_B"}, set(NAMES)], ids=len)
@pytest.mark.parametrize("magnitude", [True, False], ids=["dora", "lora"])
def test_fullgraph_of_frozen_parts(lane, needs, magnitude):
    problem = make_problem((15,), 37, 41, 4, bias=False, magnitude=magnitude, device=lane.device)
    needs = {name for name in needs if problem.tensors[name] is not None}
    check(compiled_results(problem, lane, "aot_eager", needs), problem, needs)


OTHERS = {
    "embedding": (lambda **o: DoRAEmbedding(9, 6, rank=2, **o), lambda: torch.randint(0, 9, (3, 4))),
    "conv": (lambda **o: DoRAConv2d(4, 6, 3, rank=2, **o), lambda: torch.randn(2, 4, 5, 5)),
    "groups": (lambda **o: DoRAConv2d(4, 6, 3, groups=2, rank=2, **o), lambda: torch.randn(2, 4, 5, 5)),
}


@axes
@detachments
@pytest.mark.parametrize("kind", OTHERS)
def test_fullgraph_of_other_layers(kind, magnitude_axis, detach_norm):
    make, draw = OTHERS[kind]
    layer, x = make(magnitude_axis=magnitude_axis, detach_norm=detach_norm, eps=0.1), draw()
    with torch.no_grad():
        for factor in layer.factors:
            factor.normal_()
    results = []
    for call in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        y = call(x)
        adapter = list(layer.adapter_parameters().values())
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), adapter)])
    torch.testing.assert_close(*results)


@pytest.mark.slow
@axes
def test_inductor(lane, magnitude_axis):
    problem = make_problem((15,), 37, 41, 4, magnitude_axis=magnitude_axis, detach_norm=False, device=lane.device)
    check(compiled_results(problem, lane, "inductor"), problem)


@pytest.mark.slow
def test_inductor_around_the_layer(lane):
    """Consumers that the compiler fuses and may write in place, under autocast."""
    problem = make_problem((6, 5), 24, 24, 4, device=lane.device)

    def block(leaves):
        x, parameters = leaves["x"], {name: t for name, t in leaves.items() if name != "x"}
        with torch.autocast(lane.device, dtype=bf16):
            hidden = torch.nn.functional.silu(dora_linear(x, **parameters, **problem.options, backend=lane.backend))
            return dora_linear(hidden, **parameters, **problem.options, backend=lane.backend).float().square().mean()

    results = []
    for function in (block, torch.compile(block, fullgraph=True)):
        leaves = leaves_of(problem)
        results.append(torch.autograd.grad(function(leaves), list(leaves.values())))
    for name, got, wanted in zip(NAMES, *results, strict=True):
        off = (got - wanted).norm() / wanted.norm()
        # Two layers deep, each rounds to bfloat16 at about six places, in an order that the compiler may change.
        assert off < 6 * torch.finfo(bf16).eps, f"{name} is off by {off:.1e}"


@axes
def test_any_number_of_tokens(lane, magnitude_axis):
    torch._dynamo.utils.counters.clear()
    run = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (5, 8, 33, 2):
        problem = make_problem((tokens,), 37, 41, 4, magnitude_axis=magnitude_axis, device=lane.device)
        leaves = leaves_of(problem)
        y = run(leaves, problem.options, lane.backend)
        check({"y": y.detach(), **gradients(y, leaves, problem.dy)}, problem)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@axes
def test_the_norm_compiles(lane, magnitude_axis):
    problem = make_problem((1,), 37, 41, 4, magnitude_axis=magnitude_axis, device=lane.device)

    def norm(weight, lora_A, lora_B):
        return dora_weight_norm(weight, lora_A, lora_B, magnitude_axis=magnitude_axis, backend=lane.backend)

    tensors = problem.weight, problem.lora_A, problem.lora_B
    assert torch.equal(torch.compile(norm, backend="aot_eager", fullgraph=True)(*tensors), norm(*tensors))


def test_eager_and_compiled_do_not_mix_up_their_graphs(lane):
    problem = make_problem(device=lane.device)
    for _ in range(2):
        check(compiled_results(problem, lane, "aot_eager"), problem)
        check(ours(problem, lane.backend), problem)


# torch.library.opcheck: schema, fake tensors, autograd registration and tracing of every registered op.


@axes
@pytest.mark.parametrize("dtypes", [(f32, f32, f32), (bf16, bf16, f32)], ids=["f32", "bf16"])
def test_opcheck_weight_norm(lane, dtypes, magnitude_axis):
    p = make_problem((1,), 20, 18, 3, dtypes, device=lane.device)
    opcheck(ops.weight_norm_op, (p.weight, p.lora_A, p.lora_B, 0.5, magnitude_axis, lane.backend))
    opcheck(ops.weight_norm_op, (p.weight.t(), p.lora_B.t(), p.lora_A.t(), 0.5, magnitude_axis, lane.backend))
