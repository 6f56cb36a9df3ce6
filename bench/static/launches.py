"""The launches that ship, taken from the launchers themselves.

A launcher runs on tensors of the "meta" device with its kernel replaced by a recorder, so that a `Launch` holds what a
real call would pass: the tile sizes chosen for that shape and dtype, the flags derived from them, the strides.
`shipped` lists one launch per distinct configuration over ranks and token counts, for each dtype and layout that the
layer calls it with; tests/test_aot.py checks that no rank from 1 to 1024 launches anything else.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

KERNELS = ("weight_norm", "compose", "scale_reduce")
LARGEST_RANK = 1024
# Powers of two and their successors: what the configurations distinguish, they distinguish there.
TOKENS = sorted({n for i in range(15) for n in (2**i, 2**i + 1)})
RANKS = [n for n in TOKENS if n <= LARGEST_RANK]

_MODULES = {"weight_norm": "norm", "compose": "compose", "scale_reduce": "scale_reduce"}
_SIZE = 4096
_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_BF16, _FP16, _FP32 = torch.bfloat16, torch.float16, torch.float32
# Base layer and adapter.
DTYPES = ((_BF16, _BF16), (_FP16, _FP16), (_BF16, _FP32), (_FP16, _FP32), (_FP32, _FP32))


@dataclass(frozen=True)
class Argument:
    """How one argument reaches the compiler: a type, or a constant; `aligned` is divisibility by 16."""

    name: str
    type: str
    constant: Any = None
    aligned: bool = False


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel: what the compiler sees of it, and words for people."""

    kernel: str
    dtypes: str
    case: str
    arguments: tuple[Argument, ...]
    num_warps: int
    num_stages: int

    @property
    def config(self) -> tuple[tuple[str, Any], ...]:
        """Tile sizes, derived flags and warps: what the choice of configuration decides."""
        flags = [(a.name, a.constant) for a in self.arguments if a.name.isupper() and a.type == "constexpr"]
        sizes = [flag for flag in flags if flag[0] not in ("M", "N", "K", "R", "F", "INTERPRETED")]
        return (*sizes, ("num_warps", self.num_warps), ("num_stages", self.num_stages))

    def __getitem__(self, name: str) -> Any:
        return dict(self.config)[name]

    @property
    def signature(self) -> Hashable:
        """Equal for launches that compile to the same code."""
        return self.kernel, self.arguments, self.num_warps, self.num_stages


class _Recorder:
    """Stands in for a jitted kernel; `kernel[grid](...)` keeps the arguments."""

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.arguments: dict[str, Any] = {}

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*positional: Any, **named: Any) -> None:
            self.arguments = {**dict(zip(self.names, positional)), **named}

        return launch


def kernel_of(name: str) -> Any:
    """The jitted kernel of a primitive."""
    return getattr(_module(name), f"{name}_kernel")


def record(name: str, dtypes: tuple[torch.dtype, torch.dtype], case: str, call: Callable[[Any], Any]) -> Launch:
    """The launch that `call` makes; it is handed the launcher."""
    module, kernel = _module(name), kernel_of(name)
    recorder = _Recorder(kernel.arg_names)
    with _replaced(module, f"{name}_kernel", recorder):
        call(getattr(module, name))
    given = recorder.arguments
    options = {key: given.pop(key) for key in ("num_warps", "num_stages")}
    labels = list(dict.fromkeys(_NAMES[dtype] for dtype in dtypes))
    arguments = tuple(_argument(key, given[key], key.isupper() and key not in "MNKRF") for key in recorder.names)
    return Launch(name, "+".join(labels), case, arguments, **options)


def _argument(name: str, value: Any, constexpr: bool) -> Argument:
    """Triton's own rules: None and 1 become constants, 16-byte alignment of pointers and sizes is known."""
    if constexpr or value is None or (type(value) is int and value == 1):
        return Argument(name, "constexpr", value)
    if isinstance(value, Tensor):
        return Argument(name, f"*{_NAMES[value.dtype]}", aligned=value.storage_offset() * value.itemsize % 16 == 0)
    if isinstance(value, float):
        return Argument(name, "fp32")
    return Argument(name, "i32" if abs(value) < 2**31 else "i64", aligned=value % 16 == 0)


def _module(name: str) -> Any:
    return importlib.import_module(f"dora_kernels.kernels.{_MODULES[name]}")


@contextlib.contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def _empty(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(rows, columns, dtype=dtype, device="meta")


def weight_norm(
    dtypes: tuple[torch.dtype, torch.dtype], rank: int, size: int = _SIZE, conv1d: bool = False, axis: str = "out"
) -> Launch:
    """A norm of a `size` x `size` weight; `conv1d`: stored transposed, as GPT-2 does."""
    w = _empty(size, size, dtypes[0])
    a, b = _empty(rank, size, dtypes[1]), _empty(size, rank, dtypes[1])
    weight = w.t() if conv1d else w
    case = f"rank {rank}, axis {axis}{', Conv1D' if conv1d else ''}{'' if size == _SIZE else f', size {size}'}"
    operands = (weight, a, b) if axis == "out" else (weight.t(), b.t(), a.t())
    return record("weight_norm", dtypes, case, lambda launcher: launcher(*operands, 0.5))


def compose(
    dtypes: tuple[torch.dtype, torch.dtype],
    tokens: int,
    rank: int,
    size: int = _SIZE,
    magnitude: bool = True,
    bias: bool = True,
) -> Launch:
    """A compose of `tokens` x `size` base results."""
    base, h = _empty(tokens, size, dtypes[0]), _empty(tokens, rank, dtypes[0])
    b = _empty(size, rank, dtypes[1])
    g = torch.empty(size, device="meta") if magnitude else None
    offset = torch.empty(size, dtype=dtypes[0], device="meta") if bias else None
    absent = "".join(f", no {name}" for name, there in (("g", magnitude), ("bias", bias)) if not there)
    case = f"rank {rank}, {tokens} tokens{absent}{'' if size == _SIZE else f', size {size}'}"
    return record("compose", dtypes, case, lambda launcher: launcher(base, h, b, g, offset, 0.5, True))


def scale_reduce(
    dtype: torch.dtype, tokens: int, size: int = _SIZE, scaled: bool = True, dot: bool = True, total: bool = True
) -> Launch:
    """A pass over `tokens` x `size` gradients that makes any of its three results."""
    grad = _empty(tokens, size, dtype)
    other = _empty(tokens, size, dtype) if dot else None
    g = torch.empty(size, device="meta") if scaled else None
    absent = "".join(f", no {name}" for name, there in (("scaled", scaled), ("dot", dot), ("sum", total)) if not there)
    case = f"{tokens} tokens{absent}{'' if size == _SIZE else f', size {size}'}"
    call = lambda launcher: launcher(grad, other, g, scaled, total)  # noqa: E731
    return record("scale_reduce", (dtype, dtype), case, call)


def shipped(every_dtype: bool = True) -> list[Launch]:
    """Every launch to compile, each distinct signature once; float16 follows bfloat16 unless `every_dtype`."""
    dtypes = [pair for pair in DTYPES if every_dtype or pair[0] is not _FP16]
    found = [launch for pair in dtypes for make in (_norms, _composes) for launch in make(pair)]
    found += [launch for base, adapter in dtypes if base is adapter for launch in _scale_reduces(base)]
    return list({launch.signature: launch for launch in found}.values())


def _classes(values: Iterable[int], make: Callable[[int], Launch]) -> list[int]:
    """A value for every configuration that `make` meets; multiples of 16, and large ones, are preferred."""
    ordered = sorted(values, key=lambda value: (value % 16 == 0, value))
    return list({make(value).config: value for value in ordered}.values())


def _norms(dtypes: tuple[torch.dtype, torch.dtype]) -> Iterator[Launch]:
    ranks = _classes(RANKS, lambda rank: weight_norm(dtypes, rank))
    for rank in ranks:
        yield weight_norm(dtypes, rank)
        yield weight_norm(dtypes, rank, axis="in")
    yield weight_norm(dtypes, 8)
    if dtypes[0] is _FP16:
        return
    for rank in (64, max(ranks)):
        yield weight_norm(dtypes, rank, conv1d=True)
        yield weight_norm(dtypes, rank, conv1d=True, axis="in")
        # Odd sizes and ranks leave no load aligned.
        yield weight_norm(dtypes, rank - 1, size=_SIZE - 1)
    if dtypes[1] is _BF16:
        yield weight_norm(dtypes, 1)


def _composes(dtypes: tuple[torch.dtype, torch.dtype]) -> Iterator[Launch]:
    for tokens in _classes(TOKENS, lambda count: compose(dtypes, count, 64)):
        for rank in _classes(RANKS, lambda rank, tokens=tokens: compose(dtypes, tokens, rank)):
            yield compose(dtypes, tokens, rank)
    yield compose(dtypes, 8191, 383, size=_SIZE - 1)
    if dtypes == (_BF16, _BF16):
        yield compose(dtypes, 1, 16)
        for magnitude, bias in ((False, False), (True, False), (False, True)):
            yield compose(dtypes, 8192, LARGEST_RANK, magnitude=magnitude, bias=bias)


def _scale_reduces(dtype: torch.dtype) -> Iterator[Launch]:
    for tokens in _classes(TOKENS, lambda count: scale_reduce(dtype, count)):
        yield scale_reduce(dtype, tokens)
    yield scale_reduce(dtype, 8191, size=_SIZE - 1)
    if dtype is not _BF16:
        return
    for wanted in ((True, True, False), (True, False, False), (False, False, True)):
        yield scale_reduce(dtype, 8192, _SIZE, *wanted)
