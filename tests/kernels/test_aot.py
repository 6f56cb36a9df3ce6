"""Every shipped launch, compiled ahead of time for every target: it fits, does not spill, and uses the matrix units."""

from __future__ import annotations

import functools
import os
from collections import Counter

import pytest
import torch

pytest.importorskip("triton")

from aot import launches
from aot.command import resources
from aot.resources import TARGETS, Compiled, problems
from aot.traffic import FORMULAS


@functools.cache
def compiled(target: str) -> list[Compiled]:
    """All launches for one target; the kernels of this process may be interpreted, so another compiles them."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    return resources(target, jobs=max(1, (os.cpu_count() or 1) // workers), timeout=580.0)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_every_shipped_launch_fits_and_uses_the_matrix_units(target: str):
    found = compiled(target)
    assert set(Counter(one.kernel for one in found)) == set(FORMULAS)
    dtypes = {one.dtypes for one in found if one.kernel == "weight_norm"}
    assert dtypes >= {"bf16", "bf16+fp32", "fp32"} | ({"fp16", "fp16+fp32"} if TARGETS[target].cuda else set())

    failures = {one.title: problems(one) for one in found if problems(one)}
    assert not failures, "\n".join(f"{title}: {'; '.join(reasons)}" for title, reasons in failures.items())
    unread = {one.unread for one in found if one.unread}
    if unread:
        # Shared memory was checked; registers and instructions are what this tool cannot show.
        pytest.skip(f"{target}: registers, spills and instructions not checked: {'; '.join(sorted(unread))}")


@pytest.mark.slow
def test_no_rank_launches_what_was_not_compiled():
    """The launches compiled are chosen at powers of two; every rank must take the tiles and flags of one of them."""
    bf16, fp32 = torch.bfloat16, torch.float32
    known = {(one.kernel, one.config) for one in launches.shipped(every_dtype=False)}
    missing = {
        call.case
        for dtypes in ((bf16, bf16), (bf16, fp32), (fp32, fp32))
        for rank in range(1, launches.LARGEST_RANK + 1)
        for call in (
            *(make(dtypes, rank) for make in (launches.weight_norm, launches.kept_norm, launches.merge)),
            launches.weight_norm(dtypes, rank, wide=True),
            *(launches.compose(dtypes, 1 + 31 * rank % 500, rank, wide=wide) for wide in (False, True)),
            *((launches.merge(dtypes, rank, seed=0),) if dtypes[0] is bf16 else ()),
        )
        for launch in call.launches
        if (launch.kernel, launch.config) not in known
    }
    assert not missing
