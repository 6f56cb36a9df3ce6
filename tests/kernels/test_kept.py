"""The norm kept on the device: one computed afresh to float32 rounding, and left alone where nothing has changed."""

from __future__ import annotations

import threading

import pytest
import torch
from helpers import LANES, bf16, f16, f32, usable

from dora_kernels.core.scale import safe_divisor
from dora_kernels.engine.fingerprints import sample

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
        return self.kept.divisor(weight, sample(weight), a, b)

    def is_right(self, divisor):
        """To the bit what a norm is that is not kept, where K is split among programs."""
        return torch.equal(divisor, safe_divisor(self.kernels.weight_norm(*self.tensors, SCALING)))

    def computes(self):
        """Whether the next call computes the norm; what is kept is exchanged for a number that none can be."""
        kept = self.kept._divisor.clone()
        self.kept._divisor.fill_(-7.0)
        divisor = self()
        if self.is_right(divisor):
            return True
        assert (divisor == -7.0).all(), "neither computed nor what was kept"
        self.kept._divisor.copy_(kept)
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
    sample(weight)[7].mul_(2)
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


def test_a_zero_row_is_infinite(lane, kernels):
    kept = Kept(kernels, *factors(lane))
    kept.tensors[0][3] = 0.0
    kept.tensors[2][3] = 0.0
    divisor = kept()
    assert divisor[3] == torch.inf and divisor.isinf().sum() == 1 and kept.is_right(divisor)


def test_memory_of_another_is_never_taken_for_its_own(lane, kernels):
    """Nothing is initialised: a new one may get the memory that an old one's fingerprints are still in."""
    old = Kept(kernels, *factors(lane))
    old()
    new = Kept(kernels, *old.tensors)
    new()
    for name in ("_seen", "_changed", "_divisor"):
        setattr(new.kept, name, getattr(old.kept, name).clone())
    assert new.computes()


def test_threads(lane, kernels, monkeypatch):
    """A thread that is held up between its two launches, as by a first compilation, and another that overtakes it."""
    from dora_kernels.kernels import kept as module

    kept, held_up, overtaken = Kept(kernels, *factors(lane)), threading.Event(), threading.Event()
    real = module.renew_divisor

    def slow(*args):
        if threading.current_thread() is first:
            held_up.set()
            overtaken.wait(0.5)
        real(*args)

    monkeypatch.setattr(module, "renew_divisor", slow)
    kept.kept._divisor.fill_(-7.0)
    first = threading.Thread(target=kept)
    second = threading.Thread(target=lambda: (kept(), overtaken.set()))
    first.start()
    assert held_up.wait(60)
    second.start()
    first.join()
    second.join()
    assert kept.is_right(kept()), "the first thread's launch was told that nothing had changed"


def test_a_call_that_fails_leaves_nothing_stale(lane, kernels, monkeypatch):
    from dora_kernels.kernels import kept as module

    kept = Kept(kernels, *factors(lane))
    kept()
    kept.tensors[1].mul_(2)

    def no_memory(*_):
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr(module, "renew_divisor", no_memory)
        with pytest.raises(torch.OutOfMemoryError):
            kept()
    assert kept.computes(), "seen, but never computed"


def test_another_rank(lane, kernels):
    kept = Kept(kernels, *factors(lane))
    kept()
    weight, a, b = kept.tensors
    kept.tensors = weight, torch.cat([a] * 4), torch.cat([b] * 4, 1)
    assert kept.computes() and not kept.computes()
