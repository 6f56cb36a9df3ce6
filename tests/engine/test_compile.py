"""`torch.compile(fullgraph=True)`: agreement with eager, and the contracts of the registered ops."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import NAMES, bf16, check, f32, gradients, leaves_of, make_problem, ours
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.library import opcheck

from dora_kernels import (
    DoRAConv2d,
    DoRAEmbedding,
    DoRALinear,
    LoRALinear,
    dora_linear,
    dora_weight_norm,
    frozen_norms,
    invalidate,
    patch_peft,
)
from dora_kernels.core.problem import Form
from dora_kernels.engine import ops
from dora_kernels.engine.kept_divisor import kept_divisor
from dora_kernels.engine.model_norms import caches
from dora_kernels.engine.norm_cache import NormCache

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


# The kept norm in compiled layers.


class Adapted(nn.Module):
    """A layer whose norm is kept, with its factors moved from their start."""

    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.layer = DoRALinear(24, 20, rank=3, **options)
        with torch.no_grad():
            self.layer.lora_B.weight.normal_()

    def forward(self, x):
        return torch.tanh(self.layer(x))


def patched():
    """The same as a patched PEFT layer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 20))
    config = LoraConfig(r=3, use_dora=True, target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(model, config)
    patch_peft(model)
    return model


def cache_of(model):
    (cache,) = caches(model)
    return cache


KINDS = {
    "own": Adapted,
    "in": lambda: Adapted(magnitude_axis="in"),
    "eps": lambda: Adapted(eps=0.5),
    "patched": patched,
}
kinds = pytest.mark.parametrize("kind", KINDS)


def compiled(model, **options):
    return torch.compile(model, backend="aot_eager", fullgraph=True, **options)


def factors_of(model):
    names = {"lora_A": "A", "lora_B": "B", "magnitude": "m"}
    return {
        letter: p for name, p in model.named_parameters() for part, letter in names.items() if part in name
    } | {"W": next(p for name, p in model.named_parameters() if "base_layer.weight" in name)}


@kinds
def test_the_norm_is_kept_between_compiled_calls(kind):
    model, x = KINDS[kind]().eval(), torch.randn(4, 24)
    run, cache = compiled(model), cache_of(model)
    with torch.no_grad():
        run(x)
        before = cache.computed
        for _ in range(3):
            torch.testing.assert_close(run(x), model(x))
    assert cache.computed == before


@kinds
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["A", "B", "W", "m"])
def test_a_compiled_norm_is_never_stale(kind, training, name):
    """Every write that the eager tests try: in place, through `.data`, a replaced `.data`."""
    model, x = KINDS[kind]().train(training), torch.randn(4, 24)
    run, parameter = compiled(model), factors_of(model)[name]
    for write in (
        lambda: parameter.mul_(1.5),
        lambda: parameter.data.mul_(1.5),
        lambda: setattr(parameter, "data", parameter.data * 1.5),
        lambda: parameter.copy_(parameter + 0.1),
    ):
        torch.testing.assert_close(run(x), model(x))
        with torch.no_grad():
            write()
        got = run(x)  # before eager has seen it
        invalidate(model)
        torch.testing.assert_close(got, model(x))


@kinds
def test_compiled_training_and_eager_evaluation(kind):
    """A compiled training step, then an eager evaluation, and the reverse, against an eager model step by step."""
    model, eager, x = KINDS[kind](), KINDS[kind](), torch.randn(4, 24)
    run = compiled(model)
    trained, wanted = (
        torch.optim.AdamW([p for p in each.parameters() if p.requires_grad], lr=0.05, fused=True)
        for each in (model, eager)
    )
    for step in range(3):
        for each, call, optimizer in ((model, run, trained), (eager, eager, wanted)):
            each.train()
            call(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        for each in (model, eager):
            each.eval()
        with torch.no_grad():
            for call in (model, run) if step % 2 else (run, model):
                torch.testing.assert_close(call(x), eager(x), rtol=1e-4, atol=1e-5)


@kinds
def test_new_lengths_compile_nothing_that_lora_would_not(kind):
    graphs = {}
    for name, make in (("ours", KINDS[kind]), ("lora", lambda: nn.Sequential(LoRALinear(24, 20, rank=3)))):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model = make().eval()
        run = compiled(model)
        with torch.no_grad():
            for tokens in (5, 8, 33, 2):
                run(torch.randn(tokens, 24))
        graphs[name] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs["ours"] <= graphs["lora"]


@kinds
def test_no_opaque_node_around_the_products(kind):
    """Of this package's ops a graph has the norm's alone; frozen not even that."""
    graphs = []

    def record(graph, _):
        targets = {str(node.target) for node in graph.graph.nodes if node.op == "call_function"}
        graphs.append({target for target in targets if "dora_kernels" in target})
        return graph.forward

    model, x = KINDS[kind]().eval(), torch.randn(4, 24)
    with torch.no_grad():
        torch.compile(model, backend=record, fullgraph=True)(x)
        torch._dynamo.reset()
        with frozen_norms(model):
            run = torch.compile(model, backend=record, fullgraph=True)
            torch.testing.assert_close(run(x), model(x))
        torch.testing.assert_close(run(x), model(x))
        factors_of(model)["B"].mul_(2.0)
        torch.testing.assert_close(run(x), model(x))  # no longer frozen
    assert [len(ops) for ops in graphs] == [1, 0, 1]
    assert "kept_divisor" in str(graphs[0])


def test_copies_and_devices_have_slots_of_their_own():
    model, x = Adapted().eval(), torch.randn(4, 24)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.layer.lora_B.weight.mul_(3.0)
        for each in (model, copied):
            torch.testing.assert_close(compiled(each)(x), each(x))
    assert cache_of(model).slot.data_ptr() != cache_of(copied).slot.data_ptr()


# torch.library.opcheck: schema, fake tensors, autograd registration and tracing of every registered op.


@axes
@pytest.mark.parametrize("dtypes", [(f32, f32, f32), (bf16, bf16, f32)], ids=["f32", "bf16"])
def test_opcheck_weight_norm(lane, dtypes, magnitude_axis):
    p = make_problem((1,), 20, 18, 3, dtypes, device=lane.device)
    opcheck(ops.weight_norm_op, (p.weight, p.lora_A, p.lora_B, 0.5, magnitude_axis, lane.backend))
    opcheck(ops.weight_norm_op, (p.weight.t(), p.lora_B.t(), p.lora_A.t(), 0.5, magnitude_axis, lane.backend))


@axes
def test_opcheck_kept_divisor(magnitude_axis):
    p = make_problem((1,), 20, 18, 3, magnitude_axis=magnitude_axis)
    cache = NormCache(Form(1.0, magnitude_axis))
    tensors = (t.detach() for t in (p.weight, p.lora_A, p.lora_B, p.magnitude))
    opcheck(kept_divisor, (cache.slot, *tensors, 0.5, False))


def test_a_graph_without_its_cache():
    """As in another process: the slot says which norm it is."""
    p = make_problem((1,), 20, 18, 3, magnitude_axis="in")
    slot = NormCache(Form(1.0, "in", True, 0.25)).slot.clone()
    tensors = [t.detach() for t in (p.weight, p.lora_A, p.lora_B, p.magnitude)]
    wanted = dora_weight_norm(*tensors[:3], scaling=0.5, magnitude_axis="in") + 0.25
    torch.testing.assert_close(kept_divisor(slot, *tensors, 0.5, False), wanted)
