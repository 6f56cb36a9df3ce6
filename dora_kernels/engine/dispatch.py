"""Choose the backend of a call: the formula ("torch") or the fused kernels ("triton")."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from dora_kernels.core.precision import low_rank_dtype
from dora_kernels.core.problem import Weights
from dora_kernels.engine import choices, cost, tiles
from dora_kernels.engine.formula import transformed

PLAIN = frozenset({Tensor, torch.nn.Parameter, type(None)})

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# What one program of `kernels.one_pass` holds.
ONE_PASS_TOKENS = 64
ONE_PASS_RANK = 64


class UnsupportedError(RuntimeError):
    """Raised if a backend asked for by name cannot do what the call needs."""


class Call(NamedTuple):
    """The properties of a call that `prefers_fused` decides by."""

    device: str
    dtypes: frozenset[torch.dtype]
    tokens: int
    out_features: int
    in_features: int
    rank: int
    gradients: bool
    one_pass: bool = False


def takes_one_pass(x: Tensor, weights: Weights) -> bool:
    """True if the kernels compute this forward in one launch and one read of W (`kernels.one_pass`).

    That is so for few tokens in 16 bits, if W and the low-rank branch are in x's dtype. The vendor's products would
    take as long for W, which is all that few tokens read, and need four launches more. A table of `choices` may say
    up to how many tokens it was the faster way.
    """
    tokens, dtype, lora_A, weight = x.numel() // max(x.shape[-1], 1), x.dtype, weights.lora_A, weights.weight
    rank = lora_A.shape[0]
    if not (0 < tokens <= ONE_PASS_TOKENS and 0 < rank <= ONE_PASS_RANK and dtype.itemsize == 2):
        return False
    if not (weight.dtype == dtype == low_rank_dtype(x, lora_A)):
        return False
    if _one_pass is not None:
        return _one_pass
    known = choices.measured(x.device, dtype, weight.shape[0], weight.shape[1], rank)
    return bool(tokens <= known.get("one_pass_to_tokens", ONE_PASS_TOKENS))


_one_pass: bool | None = None


@contextmanager
def one_pass(taken: bool) -> Iterator[None]:
    """Inside, `kernels.one_pass` is taken wherever it can be, or never, whatever was measured before."""
    global _one_pass
    before, _one_pass = _one_pass, taken
    try:
        yield
    finally:
        _one_pass = before


def prefers_fused(call: Call) -> bool:
    """True if ``backend="auto"`` should use the fused kernels, given that they can run."""
    if call.device != "cuda" or not call.dtypes <= set(KERNEL_DTYPES):
        return False
    if call.one_pass and not call.gradients:
        return True
    first = cost.first_tokens("fused", "formula", call.gradients, call.out_features, call.in_features, call.rank)
    return first is not None and call.tokens >= first


def _chosen(call: Call, x: Tensor, weight: Tensor) -> bool:
    """`prefers_fused`, or what was measured for such a layer on this device."""
    if call.device != "cuda":
        return False
    known = choices.measured(x.device, weight.dtype, call.out_features, call.in_features, call.rank)
    part = "training" if call.gradients else "evaluation"
    if part in known.get("fused_from_tokens", ()):
        first = known["fused_from_tokens"][part]
        return first is not None and call.tokens >= first and call.dtypes <= set(KERNEL_DTYPES)
    return prefers_fused(call)


def resolve(backend: str, x: Tensor, weights: Weights) -> str:
    """Return the backend, "torch" or "triton", for a call on `x [..., K]` or on another module's product.

    Raises:
        UnsupportedError: `backend` is "triton", and it cannot run this call.
    """
    if backend == "torch" or (backend == "auto" and x.device.type != "cuda"):
        return "torch"
    named = backend == "triton"
    if torch.compiler.is_compiling():  # the compiler fuses plain operations itself
        return "torch"
    if not named:
        dtypes = frozenset(t.dtype for t in (x, *weights) if t is not None)
        tokens = x.numel() // max(x.shape[-1], 1) if x.dim() else 1
        (rank, in_features), out_features = weights.lora_A.shape, weights.lora_B.shape[0]
        call = Call(x.device.type, dtypes, tokens, out_features, in_features, rank, torch.is_grad_enabled())
        if x.dim():
            call = call._replace(one_pass=takes_one_pass(x, weights))
        if not _chosen(call, x, weights.weight):
            return "torch"
    reason = _unfit((x, *weights)) or triton_problem(x.device)
    if reason is None:
        return "triton"
    if named:
        raise UnsupportedError(f"backend='triton' cannot be used on {x.device}: {reason}")
    return "torch"


def norm_backend(backend: str, weight: Tensor) -> str:
    """Return the backend for a norm or a merge: the kernels wherever they can run, whatever the number of tokens.

    Raises:
        UnsupportedError: `backend` is "triton", and it cannot run here.
    """
    if backend == "torch" or (backend == "auto" and weight.device.type != "cuda"):
        return "torch"
    reason = _unfit((weight,)) or triton_problem(weight.device)
    if reason is None:
        return "triton"
    if backend == "triton":
        raise UnsupportedError(f"backend='triton' cannot be used on {weight.device}: {reason}")
    warn_once(f"dora_kernels: the triton backend is not used on {weight.device}: {reason}; using backend='torch'")
    return "torch"


def _unfit(tensors: Iterable[Tensor | None]) -> str | None:
    """Return the reason why the kernels cannot take these tensors, or None if they can."""
    for tensor in tensors:
        if type(tensor) not in PLAIN and not torch.compiler.is_compiling():
            return f"it has no kernels for tensors of type {type(tensor).__name__}"
        if tensor is not None and tensor.dtype not in KERNEL_DTYPES:
            return f"it has no kernels for {tensor.dtype}"
    if torch.compiler.is_compiling() or not transformed():
        return None
    return "it does not support torch.func, forward mode and tracing"


def kernels() -> ModuleType:
    """Return `dora_kernels.kernels`. It is imported on first use because it imports triton."""
    from dora_kernels import kernels

    return kernels


_warned: set[str] = set()


def warn_once(message: str) -> None:
    """Issue `message` as a RuntimeWarning, once per process."""
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=3)


def triton_problem(device: torch.device) -> str | None:
    """Return the reason why the triton backend cannot run on `device`, or None if it can.

    It is found out once per device, with a first launch. While a CUDA graph is captured nothing can be tried, so an
    unknown device has a reason until the capture ends.
    """
    if device not in _problems:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return "no kernel has run there yet, and none can be tried in a CUDA graph's capture; call the layer before"
        _problems[device] = _find_problem(device)
    return _problems[device]


# torch.compile must use the answer without tracing how it was found. torch.compiler.assume_constant_result would set
# this attribute, but calling it imports the compiler.
triton_problem._dynamo_marked_constant = True  # type: ignore[attr-defined]


_problems: dict[torch.device, str | None] = {}


def _find_problem(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    try:
        from dora_kernels import kernels
    except Exception as error:  # a broken triton, or one built for another platform
        return f"triton cannot be imported: {type(error).__name__}: {first_line(error)}"
    if kernels.INTERPRETED:
        return None
    if device.type != "cuda":
        return f"it needs a GPU (or TRITON_INTERPRET=1), and the tensors are on {device}"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        major, minor = torch.cuda.get_device_capability(device)
        return f"it needs compute capability 8.0 or later, and {device} has {major}.{minor}"
    try:
        kernels.probe(device)
        if measured := choices.tiles(device):
            tiles.replace(measured)
        kernels.FACTORED.update(choices.factored_norms(device))
    except Exception as error:  # anything that stops a compiler or driver: no C compiler, a full disk, an old driver
        return f"a first kernel failed: {type(error).__name__}: {first_line(error)}"
    return None


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message."""
    return (str(error).strip().splitlines() or ["no message"])[0]
