"""Products where the BLAS differs from device to device, and what an infinity in a product becomes."""

from __future__ import annotations

import sys

import pytest
import torch

pytest.importorskip("triton")

from dora_kernels import kernels
from dora_kernels.engine import dispatch
from dora_kernels.kernels import INTERPRETED

module = sys.modules[kernels.product.__module__]
interpreted = pytest.mark.skipif(not INTERPRETED, reason="the interpreter is off")
bf16, f32 = torch.bfloat16, torch.float32
GPU = torch.device("cuda", 0)


@pytest.fixture
def unknown(monkeypatch):
    """A GPU that nothing is known of, whose `torch.mm` is the CPU's in float64."""
    monkeypatch.setattr(module, "_wide", {})
    monkeypatch.setattr(dispatch, "_problems", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *shape, device=None, **rest: ones(*shape, **rest))
    real = torch.mm
    return lambda left, right, out_dtype: real(left.double(), right.double()).to(out_dtype)


def test_wide_products_are_tried_once_and_by_their_numbers(unknown, monkeypatch):
    asked = []

    def mm(left, right, out_dtype):
        asked.append(left.dtype)
        return unknown(left, right, out_dtype)

    monkeypatch.setattr(torch, "mm", mm)
    assert module.wide_products(GPU) and module.wide_products(GPU)
    assert asked == [bf16, torch.float16]
    assert not module.wide_products(torch.device("cpu"))


@pytest.mark.parametrize("error", [RuntimeError, TypeError])
def test_where_wide_products_raise_they_are_not_used(unknown, monkeypatch, error):
    def mm(*_, **__):
        raise error("no out_dtype")

    monkeypatch.setattr(torch, "mm", mm)
    assert not module.wide_products(GPU)


def test_where_wide_products_are_rounded_they_are_not_used(unknown, monkeypatch):
    monkeypatch.setattr(torch, "mm", lambda left, right, out_dtype: unknown(left, right, bf16).to(out_dtype))
    assert not module.wide_products(GPU)


def test_nothing_is_tried_in_a_capture_and_nothing_remembered(unknown, monkeypatch):
    monkeypatch.setattr(torch, "mm", unknown)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(dispatch, "_find_problem", lambda device: pytest.fail("tried in a capture"))
    assert not module.wide_products(GPU)
    assert "capture" in dispatch.triton_problem(GPU)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(dispatch, "_find_problem", lambda device: None)
    assert module.wide_products(GPU) and dispatch.triton_problem(GPU) is None


def same(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3, equal_nan=True)


@interpreted
def test_infinities_stay_infinities():
    """An infinite factor times an exact one, whose small pieces are 0."""
    torch.manual_seed(0)
    h, B = torch.randn(20, 16), torch.randn(64, 16)
    h[3, 2], h[5, 1], B[7, 4], B[:, 2] = torch.inf, -torch.inf, torch.inf, 1.5
    for base in (torch.randn(20, 64).to(bf16), torch.randn(20, 64)):
        wanted = base.float() + 0.5 * h @ B.t()
        assert wanted.isinf().sum() > 100
        same(kernels.compose(base.float(), h, B, None, None, 0.5, True), wanted)
        assert torch.equal(kernels.compose(base, h, B, None, None, 0.5, True).isinf(), wanted.isinf())
    x, A = torch.randn(20, 64).to(bf16), torch.randn(64, 16)
    x[2, 3], A[3], A[5, 6] = torch.inf, 1.0, -torch.inf
    same(kernels.product(x, A, f32), x.float() @ A)
