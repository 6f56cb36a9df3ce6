"""`slots_shrink` and `slots_compose`: each row by its adapter, whatever the route."""

from __future__ import annotations

import random

import pytest
import torch
from helpers import bf16, f32, f64
from torch.utils._python_dispatch import TorchDispatchMode

from dora_kernels.engine.route import Route
from dora_kernels.engine.slots import slots_compose, slots_shrink
from dora_kernels.testing import beyond, errors, limits


class Batch:
    """Random factors in slots, and a batch that uses some of them."""

    def __init__(self, seed, dtype, sizes=(6, 5), rank=4, rows=None, tokens=None):
        draw, make = random.Random(seed), torch.Generator().manual_seed(seed)

        def tensor(*shape):
            return torch.randn(*shape, generator=make, dtype=f64)

        self.slots, (self.k, self.n) = draw.randint(1, 9), sizes
        self.ranks = tuple(draw.randint(0, rank) for _ in range(self.slots))
        self.tokens = draw.choice([1, 1, 2, 5]) if tokens is None else tokens
        count = draw.randint(0, 12) if rows is None else rows
        self.rows = [draw.randint(-1, self.slots - 1) for _ in range(count)]
        if draw.random() < 0.3:
            self.rows.sort()
        wide = f64 if dtype == f64 else f32
        self.x = tensor(count * self.tokens, self.k).to(dtype)
        self.base = tensor(count * self.tokens, self.n).to(dtype)
        self.a, self.b = tensor(self.slots, rank, self.k).to(dtype), tensor(self.slots, rank, self.n).to(dtype).mT
        self.g = (0.5 + tensor(self.slots, self.n).abs()).to(wide) if draw.random() < 0.7 else None
        self.bias = tensor(self.slots, self.n).to(wide) if self.g is not None and draw.random() < 0.5 else None
        for slot, own in enumerate(self.ranks):
            self.a[slot, own:], self.b[slot, :, own:] = 0, 0
            if not own and self.g is not None:
                self.g[slot] = 1
            if not own and self.bias is not None:
                self.bias[slot] = 0

    def by_row(self, dtype):
        """One token after another, in plain operations."""
        found = self.base.to(dtype)
        for row, slot in enumerate(self.rows):
            if slot < 0:
                continue
            tokens = slice(row * self.tokens, (row + 1) * self.tokens)
            y = found[tokens] + self.x[tokens].to(dtype) @ self.a[slot].to(dtype).T @ self.b[slot].to(dtype).T
            if self.g is not None:
                y = (y * self.g[slot].to(dtype)).to(dtype)
            if self.bias is not None:
                y = y + self.bias[slot].to(dtype)
            found = torch.cat([found[: tokens.start], y, found[tokens.stop :]])
        return found

    def run(self, stacked=True, keep=True, backend="torch", device="cpu"):
        route = Route.of(self.rows, self.ranks, self.tokens, device)
        base, a, b, g, bias = (
            t if t is None else t.to(device) for t in (self.base.clone(), self.a, self.b, self.g, self.bias)
        )
        if not stacked:
            a, b = ([t[s, :r] if r else None for s, r in enumerate(self.ranks)] for t in (a, b.mT))
            b = [t if t is None else t.T for t in b]
            g, bias = g if g is None else list(g), bias if bias is None else list(bias)
        h = slots_shrink(self.x.to(device), a, route, self.ranks, backend)
        y = slots_compose(base, h, b, g, bias, route, self.ranks, keep, backend)
        if keep:
            assert torch.equal(base.cpu(), self.base)
        return y.cpu()

    @property
    def without(self):
        """Tokens of the base model, and of adapters that leave the layer as it is."""
        own = torch.tensor([slot < 0 for slot in self.rows]).repeat_interleave(self.tokens)
        return own if len(self.rows) else torch.zeros(0, dtype=torch.bool)


@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "sequence"])
@pytest.mark.parametrize("keep", [True, False], ids=["keep", "in place"])
def test_any_route(stacked, keep):
    """In float64 to the last digits: empty slots and batches, ranks of 0, base rows to the bit."""
    for seed in range(150):
        batch = Batch(seed, f64)
        y = batch.run(stacked, keep)
        assert torch.allclose(y, batch.by_row(f64), rtol=1e-12, atol=1e-12), f"seed {seed}"
        assert torch.equal(y[batch.without], batch.base[batch.without])


@pytest.mark.parametrize("dtype", [f32, bf16], ids=["f32", "bf16"])
def test_errors_by_backend(lane, dtype):
    """Within a factor of the errors of plain operations, row by row."""
    for seed in range(2 if lane.interpreted else 12):
        batch = Batch(101 + seed, dtype, (40, 36), 7, rows=9)
        wanted = {"y": batch.by_row(f64)}
        y = batch.run(backend=lane.backend, device=lane.device)
        found, allowed = errors({"y": y}, wanted), limits({"y": batch.by_row(dtype)}, wanted)
        assert not beyond(found, allowed), (seed, beyond(found, allowed))
        assert torch.equal(y[batch.without], batch.base[batch.without])


@pytest.mark.parametrize("dtype", [bf16, f32], ids=["bf16", "f32"])
def test_long_rows(dtype):
    """Hundreds of tokens for each slot, one slot after another and in one operation."""
    for rows in ([0, 1], [1, 0, -1, 1]):
        batch = next(b for b in (Batch(seed, dtype, (9, 8), tokens=150) for seed in range(99)) if b.bias is not None)
        make = torch.Generator().manual_seed(5)
        batch.slots, batch.ranks, batch.rows = 2, (4, 4), rows
        batch.a, batch.b = (
            torch.randn(2, 4, 9, generator=make).to(dtype),
            torch.randn(2, 4, 8, generator=make).to(dtype).mT,
        )
        batch.g, batch.bias = torch.rand(2, 8, generator=make) + 0.5, torch.randn(2, 8, generator=make)
        batch.x = torch.randn(150 * len(rows), 9, generator=make).to(dtype)
        batch.base = torch.randn(150 * len(rows), 8, generator=make).to(dtype)
        for biased in (True, False):
            batch.bias = batch.bias if biased else None
            wanted = {"y": batch.by_row(f64)}
            found, allowed = errors({"y": batch.run()}, wanted), limits({"y": batch.by_row(dtype)}, wanted)
            assert not beyond(found, allowed), beyond(found, allowed)
            assert found["y"] <= allowed["y"] / 3, "rounded once"


def test_the_order_of_rows():
    """Rows in another order give the same rows in that order."""
    for seed in range(20):
        batch = Batch(seed, f64, rows=11, tokens=2)
        y = batch.run().view(11, 2, -1)
        order = torch.randperm(11, generator=torch.Generator().manual_seed(seed))
        for name in ("x", "base"):
            tensor = getattr(batch, name)
            setattr(batch, name, tensor.view(11, 2, -1)[order].reshape(tensor.shape))
        batch.rows = [batch.rows[i] for i in order]
        torch.testing.assert_close(batch.run().view(11, 2, -1), y[order], rtol=1e-12, atol=1e-12)


class Largest(TorchDispatchMode):
    """The elements of the largest tensor that an operation makes."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not function.is_view:
            self.elements = max(self.elements, out.numel())
        return out


@pytest.mark.parametrize("how", ["sorted", "mixed", "one each"])
def test_weights_are_not_gathered(how):
    """Nothing is made that is larger than the padded batch, let alone of a factor for each token."""
    rows = {"sorted": [0] * 6 + [1] * 6, "mixed": [0, 2, 1, 3, 0, 0, 1, 2, 3, 3, 2, 0], "one each": list(range(12))}[
        how
    ]
    ranks, k, n = (8,) * 12, 32, 32
    a, b = torch.randn(12, 8, k), torch.randn(12, 8, n).mT
    x, base, route = torch.randn(12, k), torch.randn(12, n), Route.of(rows, ranks)
    with Largest() as largest:
        slots_compose(base, slots_shrink(x, a, route, ranks), b, torch.rand(12, n), None, route, ranks)
    assert 0 < largest.elements <= 2 * 12 * 32


def test_the_route():
    route = Route.of([2, -1, 0, 2], (1, 1, 1, 1), 2)
    assert route.order.tolist() == [4, 5, 0, 1, 6, 7, 2, 3] and route.order.dtype == torch.int64
    assert route.ends.tolist() == [2, 2, 6, 6] and route.ends.dtype == torch.int32
    assert route.slots == (0, 2) and route.width((3, 9, 2, 9)) == 3
    empty = Route.of([], (1, 1))
    assert (empty.order.numel(), empty.ends.tolist(), empty.slots) == (0, [0, 0], ())


def plan(rows, tokens=1, ranks=16, narrow=False):
    made = Route.of(rows, (ranks,) * 33, tokens).plan(True, narrow)
    return [tuple(group) for group in made.groups], made.gather


def test_groups():
    """What is one operation: see the costs in engine/segments.py."""
    groups, gather = plan([0, 1, 2, 3, 4, 5, 6, 7])
    assert groups == [(0, 8, 1, 0)] and gather is None, "in order, one each: in place"
    groups, gather = plan([5, 1, 2, 6, 3, 0, 7, 4])
    assert groups == [(0, 8, 1, 0)] and gather.tolist() == [5, 1, 2, 4, 7, 0, 3, 6], "sorted"
    groups, gather = plan([0, 0, 0, 31])
    assert [group[:2] for group in groups] == [(0, 1), (31, 32)] and gather is None, "far apart: not those between"
    groups, gather = plan([1, 0, 1], 512)
    assert groups == [(1, 2, 512, 0), (0, 2, 512, 512)] and gather is None, "long rows stay"
    groups, gather = plan([0, 1, 1, 2, 3, 4, 5, 6])
    assert groups == [(0, 7, 2, 0)] and len(gather) == 14, "padded"
