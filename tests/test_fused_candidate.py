"""The candidate that the benchmark times beside the BLAS and compose."""

from __future__ import annotations

import pytest
import torch
from helpers import bf16, f16, f32

pytest.importorskip("triton")


@pytest.mark.parametrize("tokens", [1, 17, 64, 65, 150])
@pytest.mark.parametrize("dtypes", [(bf16, bf16), (f16, f16), (bf16, f32)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_against_the_formula(lane, tokens, dtypes, bias):
    if lane.backend != "triton":
        pytest.skip("about the kernels")
    from bench.fused import fused

    out_features, in_features, rank = 70, 90, 5
    shapes = {"x": (tokens, in_features), "weight": (out_features, in_features), "h": (tokens, rank)}
    x, weight, h = (torch.randn(shape, device=lane.device).to(dtypes[0]) for shape in shapes.values())
    b = torch.randn(out_features, rank, device=lane.device).to(dtypes[1])
    g = torch.rand(out_features, device=lane.device)
    shift = torch.randn(out_features, device=lane.device).to(dtypes[0]) if bias else None
    base = x.double() @ weight.double().t()
    low = h.double() @ b.to(dtypes[0]).double().t()
    wanted = g.double() * (base + 0.7 * low) + (0.0 if shift is None else shift.double())
    for keep in (True, False):
        y, kept = fused(x, weight, h, b, g, shift, 0.7, keep)
        eps = torch.finfo(dtypes[0]).eps
        torch.testing.assert_close(y.double(), wanted, rtol=eps, atol=1e-4)
        assert (kept is None) == (not keep)
        if kept is not None:
            torch.testing.assert_close(kept.double(), base, rtol=eps, atol=1e-4)
