"""The least layer with a norm cache, and the lanes to try it on: for tests that import its fixtures."""

from __future__ import annotations

import pytest
import torch
from helpers import FACTORED, KEPT, LANES, Lane, norm_lane
from torch import nn

from dora_kernels import dora_linear
from dora_kernels.core.problem import Form, Weights
from dora_kernels.engine.layer import run_layer
from dora_kernels.engine.norm_cache import NormCache

IN, OUT, RANK = 24, 20, 3


def _slow(lane):
    """Interpreted: the quick tier has kernels/test_kept.py and engine/test_model_forward.py."""
    return pytest.param(*lane.values, id=lane.id, marks=[*lane.marks, pytest.mark.slow])


_FORCED = [_slow(lane) if lane.id.startswith("triton") else lane for lane in (*FACTORED, *KEPT)]


@pytest.fixture(scope="module", params=[*(lane for lane in LANES if lane.id != "triton"), *_FORCED])
def lane(request):
    """Not plainly interpreted: how a norm is computed is nothing to the cache. But |W|² is its own to keep."""
    with norm_lane(request.param) as lane:
        yield lane


def compares(lane):
    """Whether the host looks at A and B; elsewhere what writes them has to be known, or the device is asked."""
    return lane == Lane("torch", "cpu")


def asks(lane):
    """Whether the device is asked where the host cannot know."""
    if lane.backend != "triton":
        return False
    from dora_kernels.kernels import config

    return config._KEPT_BYTES == 0


class Layer(nn.Module):
    """The least that a layer does: parameters, a scaling, and a cache."""

    def __init__(self, lane, magnitude_axis="out"):
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def parameter(*shape, trains=True):
            values = torch.randn(*shape, generator=generator) * 0.3
            return nn.Parameter(values.to(lane.device), requires_grad=trains)

        self.lane, self.magnitude_axis, self.scaling = lane, magnitude_axis, 0.8
        self.weight = parameter(OUT, IN, trains=False)
        self.lora_A, self.lora_B = parameter(RANK, IN), parameter(OUT, RANK)
        self.magnitude = parameter(OUT if magnitude_axis == "out" else IN)
        self.cache = NormCache()

    @property
    def arguments(self):
        return self.weight, self.lora_A, self.lora_B, self.magnitude

    def forward(self, x):
        form = Form(self.scaling, self.magnitude_axis)
        return run_layer(x, Weights(*self.arguments), form, self.cache, self.training, self.lane.backend)

    def fresh(self, x):
        with torch.no_grad() if not torch.is_grad_enabled() else torch.enable_grad():
            return dora_linear(
                x, *self.arguments,
                scaling=self.scaling, magnitude_axis=self.magnitude_axis, backend=self.lane.backend,
            )  # fmt: skip

    def is_right(self, x):
        """Bit for bit, except that a kept norm adds up in another order than one computed afresh."""
        rounding = 1e-5 if asks(self.lane) else 0.0
        return torch.allclose(self(x), self.fresh(x), rtol=rounding, atol=rounding)


@pytest.fixture
def x(lane):
    return torch.randn(6, IN, generator=torch.Generator().manual_seed(1)).to(lane.device)


@pytest.fixture(params=["out", "in"])
def layer(request, lane):
    return Layer(lane, request.param)


def counted(cache, function):
    """How many norms `function` computed, and how many it reused."""
    before = cache.computed, cache.reused
    function()
    return cache.computed - before[0], cache.reused - before[1]


def accumulate(layer, x, micro_batches):
    for i in range(micro_batches):
        assert layer.is_right(x + i), "a stale norm"
        layer(x + i).square().mean().backward()
