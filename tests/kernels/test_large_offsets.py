"""Elements past 2³¹: small shapes whose rows, or columns, lie 2³⁰ elements apart, in memory that is never touched."""

from __future__ import annotations

import mmap

import pytest
import torch
from helpers import FACTORED, bf16, f32, norm_lane

from dora_kernels import dora_weight_norm, merge_dora, testing
from dora_kernels.engine import dispatch
from dora_kernels.engine.fingerprints import sample

APART = 1 << 30
N, K, RANK, TOKENS = 3, 20, 3, 3


class Far:
    """Makes copies of matrices with one index that reaches past 2³¹."""

    def __init__(self):
        self.maps = []

    def __call__(self, t, dim=0):
        assert t.shape[dim] == 3
        size = 2 * APART + t.shape[1 - dim]
        if t.is_cuda:
            flat = torch.empty(size, dtype=t.dtype, device="cuda")
        else:
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
            self.maps.append(mmap.mmap(-1, size * t.element_size(), flags=flags))
            flat = torch.frombuffer(self.maps[-1], dtype=t.dtype)
        strides = (APART, 1) if dim == 0 else (1, APART)
        return flat.as_strided(t.shape, strides).copy_(t)


@pytest.fixture
def far(monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    return Far()


def factors(lane, dtype):
    return [torch.randn(shape, device=lane.device).to(dtype) for shape in ((N, K), (RANK, K), (N, RANK))]


def kernels(lane):
    if lane.backend != "triton":
        pytest.skip("about the kernels")
    return dispatch.kernels()


@pytest.mark.parametrize("which", ["weight", "lora_A", "lora_B", "lora_B columns"])
@pytest.mark.parametrize("dtype", [f32, bf16], ids=str)
@pytest.mark.parametrize("axis", ["out", "in"])
def test_norm_and_merge(lane, far, dtype, which, axis):
    weight, a, b = factors(lane, dtype)
    options = {"scaling": 0.7, "magnitude_axis": axis, "backend": lane.backend}
    magnitude = torch.rand(N if axis == "out" else K, device=lane.device)
    near = dora_weight_norm(weight, a, b, **options), merge_dora(weight, a, b, magnitude, **options)
    if which == "weight":
        weight = far(weight)
    elif which == "lora_A":
        a = far(a)
    else:
        b = far(b, dim=int(which == "lora_B columns"))
    distant = dora_weight_norm(weight, a, b, **options), merge_dora(weight, a, b, magnitude, **options)
    torch.testing.assert_close(distant, near)


@pytest.mark.parametrize("given", FACTORED)
def test_factored_norm(given, far):
    with norm_lane(given) as lane:
        weight, a, b = factors(lane, bf16)
        near = dora_weight_norm(weight, a, b, backend=lane.backend)
        for distant in ((far(weight), a, b), (weight, far(a), b), (weight, a, far(b)), (weight, a, far(b, dim=1))):
            torch.testing.assert_close(dora_weight_norm(*distant, backend=lane.backend), near)


@pytest.mark.parametrize("dtype", [f32, bf16], ids=str)
def test_compose(lane, far, dtype):
    """The base product, and rows of B, past 2³¹."""
    shapes = (TOKENS, K), (TOKENS, RANK), (K, RANK)
    base, h, b = (torch.randn(shape, device=lane.device).to(dtype) for shape in shapes)
    g, bias = torch.rand(K, device=lane.device), torch.randn(K, device=lane.device).to(dtype)
    compose = kernels(lane).compose
    wanted = compose(base.clone(), h, b, g, bias, 0.7, False)
    torch.testing.assert_close(compose(far(base), h, b, g, bias, 0.7, False), wanted)
    torch.testing.assert_close(compose(base.clone(), h, far(b, dim=1), g, bias, 0.7, False), wanted)


@pytest.mark.parametrize("dtype", [f32, bf16], ids=str)
def test_one_pass_over_the_gradient(lane, far, dtype):
    dy, base = (torch.randn(TOKENS, K, device=lane.device).to(dtype) for _ in range(2))
    g = torch.rand(K, device=lane.device)
    scale_reduce = kernels(lane).scale_reduce
    wanted = scale_reduce(dy, base, g, True, True)
    for given in ((far(dy), base), (dy, far(base))):
        torch.testing.assert_close(scale_reduce(*given, g, True, True), wanted)


def test_the_question_whether_a_norm_has_changed(lane, far):
    module = kernels(lane)
    weight, a, b = factors(lane, f32)
    a = far(a)
    kept = module.KeptNorm(N, 0.7, weight.device)
    for change in (1.0, 2.0):
        a[-1] *= change
        norm = testing.weight_norm(weight.double(), a.double(), b.double(), 0.7, "out")
        torch.testing.assert_close(kept.divisor(weight, sample(weight), a, b).double(), norm, rtol=2e-6, atol=0)
