"""Every kernel and launcher against float64: small calls of every dtype pair, aligned and odd shapes, and strides."""

from __future__ import annotations

import pytest
import torch
from aot.recording import instead, kernels
from helpers import LANES, usable

pytest.importorskip("triton")

from tests import kernel_cases

# Of the largest element: two roundings to the dtype, and what float32 sums lose.
TOLERANCES = {"bf16": 2.0**-7, "fp16": 2.0**-10, "fp32": 3e-6}


@pytest.fixture(scope="module", params=[lane for lane in LANES if lane.id.startswith("triton")])
def lane(request):
    return usable(request.param)


def tolerance(kernel, dtypes):
    """A norm is summed in float32 whatever it is of; the pieces of float32 adapters of a 16-bit weight cost digits."""
    if kernel in ("weight_norm", "kept_norm"):
        return TOLERANCES["fp32"] if dtypes.startswith("fp32") else 1e-5
    return max(TOLERANCES[one] for one in dtypes.split("+"))


@pytest.mark.parametrize("kernel", kernel_cases.KERNELS)
def test_against_float64(lane, kernel):
    failures, tried = [], 0
    for name, dtypes, call, reference in kernel_cases.cases(lane.device, kernel):
        tried += 1
        first = call()
        # Compiled kernels are launched directly from the second time on.
        for found, again, wanted in zip(first, call(), reference, strict=True):
            if found is None or wanted is None:
                assert found is again is wanted is None, name
                continue
            assert found.shape == wanted.shape, name
            if not torch.equal(found, again):
                failures.append(f"{name} {dtypes}: another result when called again")
            error = float((found.double() - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30))
            if not error <= tolerance(kernel, dtypes):
                failures.append(f"{name} {dtypes}: {error:.1e} from float64")
    assert tried and not failures, "\n".join(failures)


def test_every_jitted_kernel_is_launched(lane):
    """The list has a case for each of them."""
    launched = set()
    with instead(lambda made: launched.add(made.kernel)):
        for _, _, call, _ in kernel_cases.cases(lane.device):
            call()
    assert launched == set(kernels())
