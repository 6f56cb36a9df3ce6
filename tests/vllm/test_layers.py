"""g of a slot, on stand-ins for vLLM's layers: against float64, from a weight at hand and through a forward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import bf16, f32, f64

from dora_kernels.vllm.layers import row_norms, write_scale

SLOTS, SLOT, RANK = 3, 1, 5


class UnquantizedLinearMethod:
    """As vLLM's, which is told by its name. A CPU's packed layer has this method too, and an empty weight."""

    calls = 0

    def apply(self, base, x, bias):
        self.calls += len(x)
        return F.linear(x, base.kept, bias)


class Base:
    def __init__(self, weight, bias, sizes, opaque):
        self.quant_method, self.kept, self.bias, self.output_sizes = UnquantizedLinearMethod(), weight, bias, sizes
        self.weight = weight.new_empty(0) if opaque else weight


class Layer:
    """One rank's part of a layer of vLLM's, with an adapter in one slot."""

    tp_size = 1

    def __init__(self, weight, factors, sizes, bias=None, opaque=False, room=2):
        self.base_layer = Base(weight, bias, sizes, opaque)
        self.n_slices = len(factors)
        slices = [(a, b) for a, b in factors]
        dtype, (k, rows) = weight.dtype, (weight.shape[1], [b.shape[0] for _, b in slices])
        self.lora_a_stacked = [torch.zeros(SLOTS, 1, RANK + room, k, dtype=dtype) for _ in slices]
        self.lora_b_stacked = [torch.zeros(SLOTS, 1, n, RANK + room, dtype=dtype) for n in rows]
        for (a, b), stacked_a, stacked_b in zip(slices, self.lora_a_stacked, self.lora_b_stacked):
            stacked_a[SLOT, 0, : len(a)] = a
            stacked_b[SLOT, 0, :, : len(a)] = b
        self.dora_scale = torch.ones(SLOTS, sum(rows))
        self.dora_offset = None if bias is None else torch.zeros(SLOTS, sum(rows))
        self.dora_constants = None

    def expand_packed_lora(self, first, second):
        return first, [*second[0].split(self.base_layer.output_sizes[:2]), second[1]]


def problem(sizes, k=24, dtype=f32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(sum(sizes), k, generator=generator).to(dtype)
    factors = [
        (torch.randn(RANK, k, generator=generator).to(dtype), torch.randn(n, RANK, generator=generator).to(dtype))
        for n in sizes
    ]
    magnitudes = [torch.randn(n, generator=generator) for n in sizes]
    return weight, factors, magnitudes


def exact(weight, factors, sizes):
    parts = weight.to(f64).split(sizes)
    return [(w + b.to(f64) @ a.to(f64)).norm(dim=1) for w, (a, b) in zip(parts, factors)]


@pytest.mark.parametrize("opaque", [False, True], ids=["weight", "forward"])
@pytest.mark.parametrize("dtype", [f32, bf16], ids=str)
def test_g_of_a_merged_layer(dtype, opaque):
    """A slice without an adapter keeps 1, other slots and the weight are not touched; the offset belongs to g."""
    sizes = [12, 7, 7]
    weight, factors, magnitudes = problem(sizes, dtype=dtype)
    bias = torch.randn(sum(sizes)).to(dtype)
    layer = Layer(weight, factors, sizes, bias, opaque)
    write_scale(layer, SLOT, RANK, [magnitudes[0], None, magnitudes[2]], None)
    wanted = torch.cat([m / n for m, n in zip(magnitudes, exact(weight, factors, sizes))])
    wanted[12:19] = 1.0
    bound = 1e-5 if dtype == f32 or not opaque else 0.02  # a bfloat16 layer rounds U = W Aᵀ
    torch.testing.assert_close(layer.dora_scale[SLOT].to(f64), wanted, rtol=bound, atol=bound / 10)
    assert bool((layer.dora_scale[[0, 2]] == 1).all()) and bool((layer.dora_scale[SLOT, 12:19] == 1).all())
    torch.testing.assert_close(layer.dora_offset[SLOT], (1 - layer.dora_scale[SLOT]) * bias)


def test_the_forward_is_asked_for_the_weight_once():
    """Loading costs r tokens for each slice, after the first."""
    sizes = [12, 7]
    weight, factors, magnitudes = problem(sizes)
    layer = Layer(weight, factors, sizes, opaque=True)
    method = layer.base_layer.quant_method
    write_scale(layer, SLOT, RANK, magnitudes, None)
    before = method.calls
    write_scale(layer, SLOT, RANK, magnitudes, None)
    assert method.calls - before == 2 * RANK < before - 24


@pytest.mark.parametrize("opaque", [False, True], ids=["weight", "forward"])
def test_row_parallel_ranks_are_summed(opaque):
    """Two ranks hold half of each row of W and of A; the sum of their squares is the whole row's."""
    sizes = [10]
    weight, factors, (magnitude,) = problem(sizes)
    ((a, b),) = factors
    halves = zip(weight.chunk(2, 1), a.chunk(2, 1))
    ranks = [Layer(half.contiguous(), [(of_a, b)], sizes, opaque=opaque) for half, of_a in halves]
    squares = [torch.cat(row_norms(rank, SLOT, RANK)).square() for rank in ranks]
    for rank, other in zip(ranks, reversed(squares)):
        write_scale(rank, SLOT, RANK, [magnitude], lambda own, other=other: own + other)
    torch.testing.assert_close(ranks[0].dora_scale, ranks[1].dora_scale)
    (norm,) = exact(weight, factors, sizes)
    torch.testing.assert_close(ranks[0].dora_scale[SLOT].to(f64), magnitude / norm, rtol=1e-5, atol=1e-6)


def test_a_row_of_zeros_gives_zero():
    weight, factors, magnitudes = problem([6])
    weight[2], factors[0][1][2] = 0.0, 0.0
    layer = Layer(weight, factors, [6])
    write_scale(layer, SLOT, RANK, magnitudes, None)
    assert layer.dora_scale[SLOT, 2] == 0.0 and bool(layer.dora_scale.isfinite().all())


def test_one_magnitude_for_all_slices():
    """A layer that is merged in the adapter's file too, and one whose file has the first two slices in one."""
    sizes = [12, 7, 7]
    weight, factors, magnitudes = problem(sizes)
    for given in ([torch.cat(magnitudes)], [torch.cat(magnitudes[:2]), magnitudes[2]], magnitudes):
        layer = Layer(weight, factors, sizes)
        write_scale(layer, SLOT, RANK, given, None)
        wanted = torch.cat([m / n for m, n in zip(magnitudes, exact(weight, factors, sizes))])
        torch.testing.assert_close(layer.dora_scale[SLOT].to(f64), wanted, rtol=1e-5, atol=1e-6)


def test_magnitudes_are_cut_as_b_is():
    """By the layer's own `slice_lora_b`, which knows how many copies of a key's head there are."""
    weight, factors, (magnitude,) = problem([8])
    ((a, b),) = factors
    layer = Layer(weight[4:].contiguous(), [(a, b[4:])], [8])
    layer.tp_size, layer.slice_lora_b = 2, lambda column: column[4:]
    write_scale(layer, SLOT, RANK, [magnitude], None)
    (norm,) = exact(weight, factors, [8])
    torch.testing.assert_close(layer.dora_scale[SLOT].to(f64), (magnitude / norm)[4:], rtol=1e-5, atol=1e-6)
