"""The forward of few tokens: when it is one launch, and that it is one."""

from __future__ import annotations

import pytest
import torch

from dora_kernels.core.problem import Form, Weights
from dora_kernels.engine import dispatch, fused
from dora_kernels.engine.fused import Scale

bf16, f32 = torch.bfloat16, torch.float32


def problem(tokens, rank, dtype=bf16, adapter=bf16, device="cpu"):
    def make(*shape, dtype):
        return torch.zeros(shape, dtype=dtype, device=device)

    factors = make(rank, 32, dtype=adapter), make(48, rank, dtype=adapter)
    return make(tokens, 32, dtype=dtype), Weights(make(48, 32, dtype=dtype), *factors, make(48, dtype=f32))


@pytest.mark.parametrize("tokens, rank, taken", [(1, 16, 1), (64, 64, 1), (65, 16, 0), (64, 65, 0), (0, 16, 0)])
def test_for_few_tokens_of_a_low_rank(tokens, rank, taken):
    assert dispatch.takes_one_pass(*problem(tokens, rank)) == bool(taken)


def test_for_16_bits_in_which_the_low_rank_branch_is():
    assert not dispatch.takes_one_pass(*problem(4, 8, f32, f32))
    x, weights = problem(4, 8, adapter=f32)
    assert not dispatch.takes_one_pass(x, weights)
    with torch.autocast("cpu", bf16):
        assert dispatch.takes_one_pass(x, weights)
    assert not dispatch.takes_one_pass(x, weights._replace(weight=weights.weight.float()))


def test_without_gradients_it_is_preferred():
    call = dispatch.Call("cuda", frozenset({bf16}), 1, 4096, 4096, 16, False, one_pass=True)
    assert dispatch.prefers_fused(call)
    assert not dispatch.prefers_fused(call._replace(one_pass=False))
    assert not dispatch.prefers_fused(call._replace(gradients=True))


def test_it_is_one_launch():
    pytest.importorskip("triton")
    from aot import layers
    from aot.account import on_a_gpu

    with on_a_gpu():
        x, weights = problem(4, 8, device="cuda")
        scale = Scale(None, torch.zeros(48, device="cuda"))
        done = layers._recorded(lambda: fused.forward(x, weights, scale, Form(0.5), False))
    assert [launch.kernel for launch in done.launches] == ["one_pass"] and not done.operations
