"""The norm kept on the device: the bits of a direct one computed afresh, and left alone where nothing has changed."""

from __future__ import annotations

import pytest
import torch
from helpers import LANES, bf16, f16, f32, usable

pytest.importorskip("triton")

ROWS, COLUMNS, RANK, SCALING = 40, 300, 8, 0.7


@pytest.fixture(scope="module", params=[lane for lane in LANES if lane.id.startswith("triton")])
def lane(request):
    return usable(request.param)


@pytest.fixture
def kernels(lane):
    from dora_kernels import kernels

    return kernels


def factors(lane, dtypes=(f32, f32), transposed=False):
    generator = torch.Generator().manual_seed(0)
    shapes = (ROWS, COLUMNS), (RANK, COLUMNS), (ROWS, RANK)
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    weight, a, b = (t.to(lane.device, dtype) for t, dtype in zip(tensors, (dtypes[0], dtypes[1], dtypes[1])))
    return (weight.t(), b.t(), a.t()) if transposed else (weight, a, b)


class Kept:
    """A kept norm beside the tensors it is of."""

    def __init__(self, kernels, weight, a, b):
        self.kernels, self.tensors = kernels, (weight, a, b)
        self.kept = kernels.KeptNorm(weight.shape[0], SCALING, weight.device)

    def __call__(self):
        weight, a, b = self.tensors
        sample = (weight if weight.is_contiguous() else weight.t()).view(-1)[::97]
        return self.kept.norm(weight, sample, a, b)

    def fresh(self):
        return self.kernels.weight_norm(*self.tensors, SCALING)

    def computes(self):
        """Whether the next call computes the norm; what is kept is exchanged for a number that none can be."""
        kept = self.kept._norm.clone()
        self.kept._norm.fill_(-7.0)
        norm = self()
        if torch.equal(norm, self.fresh()):
            return True
        assert (norm == -7.0).all(), "neither computed nor what was kept"
        self.kept._norm.copy_(kept)
        return False


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtypes", [(f32, f32), (bf16, bf16), (f16, f16), (bf16, f32)], ids=str)
def test_computed_only_where_something_changed(lane, kernels, dtypes, transposed):
    kept = Kept(kernels, *factors(lane, dtypes, transposed))
    assert kept.computes()
    assert not kept.computes() and not kept.computes()
    weight, a, b = kept.tensors
    for tensor in (a, b):
        for place in ((0, 0), (-1, -1)):
            tensor[place] = -tensor[place]  # one bit
            assert kept.computes(), "a changed element was not seen"
            assert not kept.computes()
    (weight if weight.is_contiguous() else weight.t()).view(-1)[97].mul_(2)
    assert kept.computes(), "a changed element of the sample was not seen"
    assert not kept.computes()


def test_what_is_exchanged_or_undone_is_seen(lane, kernels):
    """Changes that a plain sum or a plain xor of the elements would miss."""
    kept = Kept(kernels, *factors(lane))
    kept()
    _, a, b = kept.tensors
    a[[0, 1]] = a[[1, 0]]
    assert kept.computes()
    b.neg_()
    assert kept.computes()
    a[:, [5, 9]] = a[:, [9, 5]]
    assert kept.computes()
    a[0, 3], a[0, 4] = a[0, 3] + 1, a[0, 4] - 1
    assert kept.computes()
    b[4] = 0.0
    assert kept.computes()
    b[4] = -0.0
    assert kept.computes()


def test_norms_have_memory_of_their_own(lane, kernels):
    kept = Kept(kernels, *factors(lane))
    first = kept()
    before = first.clone()
    kept.tensors[1].mul_(2)
    second = kept()
    assert torch.equal(first, before) and not torch.equal(first, second)
    second.fill_(3.0)
    assert torch.equal(kept(), kept.fresh())


def test_a_call_that_fails_leaves_nothing_stale(lane, kernels, monkeypatch):
    from dora_kernels.kernels import kept as module

    kept = Kept(kernels, *factors(lane))
    kept()
    kept.tensors[1].mul_(2)

    def no_memory(*_):
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr(module, "direct_norm", no_memory)
        with pytest.raises(torch.OutOfMemoryError):
            kept()
    assert kept.computes(), "seen, but never computed"


def test_another_rank(lane, kernels):
    kept = Kept(kernels, *factors(lane))
    kept()
    weight, a, b = kept.tensors
    kept.tensors = weight, torch.cat([a] * 4), torch.cat([b] * 4, 1)
    assert kept.computes() and not kept.computes()
