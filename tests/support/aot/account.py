"""The traffic of the primitives at fixed shapes, as issued and the least possible."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from aot import launches
from aot.launches import DTYPES, Call
from aot.recording import Launch
from aot.traffic import LARGE, Traffic, issued, least

_WEIGHTS = (((4096, 4096), 16), ((4096, 4096), 64), ((4096, 4096), 384), ((8192, 8192), 384), ((8192, 28672), 384))
_TOKENS = (8192, 1)
_EXPERTS = 64
_STACK = ((1536, 2048), 16)
_RANKS = (16, 64, 384)


@dataclass(frozen=True)
class Row:
    """One call: its launches, what they move, and what they might have moved."""

    call: Call
    launches: list[Launch]
    issued: Traffic
    least: Traffic

    @property
    def ratio(self) -> float:
        return self.issued.bytes / self.least.bytes

    @property
    def large_ratio(self) -> float:
        """Of the operands of the size of W or of the activations alone."""
        return self.issued.of(LARGE[self.call.primitive]) / self.least.of(LARGE[self.call.primitive])

    @property
    def flops_ratio(self) -> float | None:
        return self.issued.flops / self.least.flops if self.least.flops else None

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        made = [{"kernel": one.kernel, "grid": one.grid, "config": dict(one.config)} for one in self.launches]
        return {
            "kernel": self.call.primitive,
            "dtypes": self.call.dtypes,
            "case": self.call.case,
            "launches": made,
            "issued": asdict(self.issued),
            "least": asdict(self.least),
            "ratio": self.ratio,
            "large_ratio": self.large_ratio,
            "flops_ratio": self.flops_ratio,
        }


def table(found: list[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and rows; dtypes with the same figures share a row."""
    header = ["kernel", "call", "dtypes", "read MB", "written MB", "least MB"]
    header += ["bytes/least", "large/least", "GFLOP", "FLOPs/least"]
    dtypes: dict[tuple[str, ...], list[str]] = {}
    for row in found:
        moved = _megabytes(sum(row.issued.loaded.values()), sum(row.issued.stored.values()), row.least.bytes)
        flops = ["-", "-"]
        if row.flops_ratio is not None:
            flops = [f"{row.issued.flops / 1e9:.3f}", f"{row.flops_ratio:.2f}"]
        figures = (row.call.primitive, row.call.case, *moved, f"{row.ratio:.2f}", f"{row.large_ratio:.2f}", *flops)
        dtypes.setdefault(figures, []).append(row.call.dtypes)
    return header, [[*figures[:2], ", ".join(names), *figures[2:]] for figures, names in dtypes.items()]


def operands_table(found: list[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and rows, one for each operand; what PyTorch operations make has their names."""
    cells = []
    for row in found:
        for name in dict.fromkeys((*row.issued.loaded, *row.issued.stored)):
            loaded, stored = row.issued.loaded.get(name, 0), row.issued.stored.get(name, 0)
            wanted = row.least.of((name,))
            ratio = f"{(loaded + stored) / wanted:.2f}" if wanted else "-"
            cells.append(
                [row.call.primitive, row.call.case, row.call.dtypes, name, *_megabytes(loaded, stored, wanted), ratio]
            )
    return ["kernel", "call", "dtypes", "operand", "read MB", "written MB", "least MB", "bytes/least"], cells


def _megabytes(*sizes: int) -> list[str]:
    return [f"{size / 1e6:.3f}" for size in sizes]


def rows(primitives: Iterable[str]) -> list[Row]:
    """Every primitive at every shape and in every dtype that ships."""
    with on_a_gpu():
        return [_row(call) for primitive in primitives for call in _CALLS[primitive]()]


@contextlib.contextmanager
def on_a_gpu() -> Iterator[None]:
    """Tensors of the "cuda" device are made without memory and without a GPU: launchers ask for the device."""
    from dora_kernels.kernels import product

    wide = mock.patch.dict(sys.modules[product.__module__]._wide, {torch.device("cuda", 0): True})
    with FakeTensorMode(), mock.patch.object(torch.cuda, "current_device", lambda: 0), wide:
        yield


def _row(call: Call) -> Row:
    recorded = call.run()
    return Row(call, recorded.launches, issued(call, recorded), least(call, recorded.results))


def _weight_norms() -> Iterator[Call]:
    for shape, rank in _WEIGHTS:
        for dtypes in DTYPES:
            alone = launches.weight_norm(dtypes, rank, shape, device="cuda")
            given = launches.weight_norm(dtypes, rank, shape, square=True, device="cuda")
            # The direct form has no use for |W|².
            yield from (alone,) if alone.config == given.config else (alone, given)
    for dtypes in DTYPES:
        yield launches.weight_norm(dtypes, _STACK[1], _STACK[0], groups=_EXPERTS, device="cuda")


def _kept_norms() -> Iterator[Call]:
    for unchanged in (False, True):
        for shape, rank in _WEIGHTS:
            for dtypes in DTYPES:
                yield launches.kept_norm(dtypes, rank, shape, unchanged=unchanged, device="cuda")


def _merges() -> Iterator[Call]:
    for shape, rank in _WEIGHTS:
        for dtypes in DTYPES:
            yield launches.merge(dtypes, rank, shape, device="cuda")
    for dtypes in DTYPES:
        yield launches.merge(dtypes, _STACK[1], _STACK[0], groups=_EXPERTS, device="cuda")


def _composes() -> Iterator[Call]:
    for tokens in _TOKENS:
        for rank in _RANKS:
            for dtypes in DTYPES:
                yield launches.compose(dtypes, tokens, rank, device="cuda")
    for dtypes in DTYPES:
        yield launches.compose(dtypes, 16384, 16, groups=_EXPERTS, bias=False, device="cuda")
        for tokens in (32, 8192):
            yield launches.compose(dtypes, tokens, 64, groups=32, adapters=True, keep=False, device="cuda")


def _products() -> Iterator[Call]:
    for dtypes in DTYPES:
        for tokens in _TOKENS:
            yield launches.product(dtypes, tokens, 4096, 16, device="cuda")
        yield launches.product(dtypes, 4096, 8192, 16, transposed=True, out=torch.float32, device="cuda")
        yield launches.product(dtypes, 16384, 4096, 16, groups=_EXPERTS, device="cuda")
        yield launches.product(dtypes, 32, 4096, 64, groups=32, adapters=True, device="cuda")


def _one_passes() -> Iterator[Call]:
    for dtypes in DTYPES:
        if dtypes[0] is not torch.float32:
            for tokens in (1, 64):
                for rank in (16, 64):
                    yield launches.one_pass(dtypes, tokens, rank, device="cuda")
            yield launches.one_pass(dtypes, 64, 64, (1024, 4096), keep=True, device="cuda")


def _scale_reduces() -> Iterator[Call]:
    for tokens in _TOKENS:
        for base, adapter in DTYPES:
            if base is adapter:
                yield launches.scale_reduce(base, tokens, device="cuda")
    for tokens in (8192, 1024):
        for rank in (16, 64):
            yield launches.scale_reduce(torch.bfloat16, tokens, total=False, rank=rank, device="cuda")
    for rank in (0, 16):
        yield launches.scale_reduce(torch.bfloat16, 16384, total=False, groups=_EXPERTS, rank=rank, device="cuda")
    yield launches.product_over_tokens(torch.bfloat16, 16384, groups=_EXPERTS, device="cuda")


def _factor_grads() -> Iterator[Call]:
    for rank in _RANKS:
        for dtypes in DTYPES:
            parts = 16 if rank <= 64 else 1
            yield launches.factor_grads(dtypes, rank, strips=parts if rank <= 64 else 32, parts=parts, device="cuda")
    for dtypes in DTYPES:
        yield launches.factor_grads(dtypes, 16, strips=1, groups=_EXPERTS, device="cuda")


_CALLS = {
    "weight_norm": _weight_norms,
    "kept_norm": _kept_norms,
    "merge": _merges,
    "compose": _composes,
    "product": _products,
    "one_pass": _one_passes,
    "scale_reduce": _scale_reduces,
    "factor_grads": _factor_grads,
}
