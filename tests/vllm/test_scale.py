"""The op that scales each slot's tokens: its numbers on both backends, its route, and what a compiler sees of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import Lane, bf16, f16, f32, f64

from dora_kernels.vllm import scale as module
from dora_kernels.vllm.scale import Route, scale_slots_

ROOT = Path(module.__file__).parents[2]
SLOTS = 5
PLAIN = 2  # a slot of an adapter without magnitudes


def route_of(slots: list[int], room: int = 0) -> Route:
    route = Route(len(slots) + room, SLOTS, torch.device("cpu"))
    route.scaled[torch.arange(SLOTS) != PLAIN] = True
    route.fill(torch.tensor(slots))
    return route


ROUTES = {
    "mixed": [3, -1, 0, 3, PLAIN, 4, -1, 0, 3],
    "one token": [1],
    "base and plain": [-1, PLAIN, -1],
    "one slot": [4] * 7,
    "long": [slot % (SLOTS + 1) - 1 for slot in range(150)],
}


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", [f32, bf16, f16], ids=str)
@pytest.mark.parametrize("slots", ROUTES.values(), ids=ROUTES)
def test_each_token_has_its_slots_scale(lane: Lane, monkeypatch, slots, dtype, bias):
    if lane.backend == "triton":
        monkeypatch.setattr(module, "_with_torch", module._with_compose)
    route = route_of(slots, room=3)
    y, g, b = torch.randn(len(slots), 67).to(dtype), torch.rand(SLOTS, 67) * 2, torch.randn(67)
    offset = (1.0 - g) * b if bias else None
    got = y.clone().to(lane.device)
    scale_slots_(got, *(t if t is None else t.to(lane.device) for t in (route.order, route.ends, g, offset)))
    for row, (slot, before, after) in enumerate(zip(slots, y, got.cpu())):
        if slot in (-1, PLAIN):
            assert torch.equal(before, after), row
            continue
        product, plus = before.to(f64) * g[slot].to(f64), 0.0 if offset is None else offset[slot].to(f64)
        # the product and the sum are rounded in float32, then the result once in y's dtype
        bound = torch.finfo(f32).eps * (product.abs() + abs(plus)) + torch.finfo(dtype).eps / 2 * (product + plus).abs()
        bound += torch.finfo(dtype).smallest_normal  # float16's smallest numbers
        assert bool(((product + plus - after.to(f64)).abs() <= bound).all()), row


def test_padding_and_what_was_never_filled_scale_nothing():
    """A captured graph runs on more rows than a forward has tokens."""
    route = Route(8, SLOTS, torch.device("cpu"))
    route.scaled.fill_(True)
    y = torch.randn(8, 4)
    before = y.clone()
    scale_slots_(y, route.order, route.ends, torch.zeros(SLOTS, 4), None)
    assert torch.equal(y, before)
    route.fill(torch.tensor([1, 1, 4, -1]))
    route.fill(torch.tensor([-1, 3]))  # fewer tokens than before
    scale_slots_(y, route.order, route.ends, torch.zeros(SLOTS, 4), None)
    before[1] = 0.0
    assert torch.equal(y, before)


def test_a_compiled_graph_holds_it_whatever_adapters_there_are():
    """Compiled while there is no adapter: one op, and later adapters are not traced away."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    route, g, w = route_of([-1, -1, -1]), torch.rand(SLOTS, 4) + 2.0, torch.randn(4, 6)

    def layer(x):
        y = torch.nn.functional.linear(x, w)
        scale_slots_(y, route.order, route.ends, g, None)
        return y

    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    x = torch.randn(3, 6)
    assert torch.equal(compiled(x), x @ w.T)
    route.fill(torch.tensor([-1, 4, 0]))
    wanted = x @ w.T
    wanted[1:] *= g[[4, 0]]
    torch.testing.assert_close(compiled(x), wanted)
    (graph,) = graphs
    assert [str(node.target) for node in graph.graph.nodes].count("dora_kernels.scale_slots_") == 1


def test_the_ops_schema():
    route = route_of([0, -1, 3])
    op = torch.ops.dora_kernels.scale_slots_.default
    for offset in (None, torch.randn(SLOTS, 4)):
        torch.library.opcheck(op, (torch.randn(3, 4), route.order, route.ends, torch.rand(SLOTS, 4), offset))


_COMPILE = """
import torch
from aot.compiler import compile_launches
from aot.recording import described, instead
from aot.resources import problems
from dora_kernels.vllm.scale import _with_compose

launches = []
for tokens in (8, 2048):
    y, g = torch.empty(tokens, 4096, dtype=torch.bfloat16, device="meta"), torch.empty(8, 4096, device="meta")
    order, ends = torch.empty(8192, dtype=torch.int64, device="meta"), torch.empty(8, dtype=torch.int32, device="meta")
    with instead(lambda one: launches.append(described(one, "compose", "bf16", "rank 0"))):
        _with_compose(y, order, ends, g, g)
assert len(launches) == 2
for target in ("sm_80", "sm_90", "gfx942"):
    for one in compile_launches(target, launches):
        assert not problems(one), (target, problems(one))
"""


@pytest.mark.slow
def test_its_launches_compile_for_gpus():
    """`compose` of rank 0 fits and does not spill; the kernels of this process may be interpreted."""
    pytest.importorskip("triton")
    path = os.pathsep.join(str(ROOT / folder) for folder in (".", "tests", "tests/support"))
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", _COMPILE], env={**environment, "PYTHONPATH": path}, check=True, timeout=500)
