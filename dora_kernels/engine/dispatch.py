"""What runs a call: the formula (`torch`) or the fused kernels (`triton`). One rule; the errors of a named backend."""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Iterable
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from dora_kernels.core.problem import Weights
from dora_kernels.engine.formula import transformed

PLAIN = frozenset({Tensor, torch.nn.Parameter, type(None)})

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Output elements from which the fused path wins on a GPU, with gradients and without. By count: with gradients it saves
# about four passes over [tokens, out_features] and costs as many launches more than the formula, of about 5 us of host
# time each, in which a GPU of 4 TB/s moves 20 MB; without, one pass for no launch more. Not timed on a GPU yet.
FUSED_ELEMENTS = 1 << 21
FUSED_ELEMENTS_INFERENCE = 1 << 18


class UnsupportedError(RuntimeError):
    """A backend that was asked for by name cannot do what the call needs."""


class Call(NamedTuple):
    """What the rule looks at."""

    device: str
    dtypes: frozenset[torch.dtype]
    tokens: int
    out_features: int
    in_features: int
    rank: int
    gradients: bool


def prefers_fused(call: Call) -> bool:
    """The rule: True if `auto` takes the fused kernels where they run."""
    if call.device != "cuda" or not call.dtypes <= set(KERNEL_DTYPES):
        return False
    return call.tokens * call.out_features >= (FUSED_ELEMENTS if call.gradients else FUSED_ELEMENTS_INFERENCE)


def resolve(backend: str, x: Tensor, weights: Weights) -> str:
    """The backend that runs a call on `x [..., K]` (or another module's product): "torch" or "triton".

    A backend asked for by name is taken, or `UnsupportedError` says why it cannot be.
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
        if not prefers_fused(call):
            return "torch"
    reason = _unfit((x, *weights)) or triton_problem(x.device)
    if reason is None:
        return "triton"
    if named:
        raise UnsupportedError(f"backend='triton' was asked for and cannot be used on {x.device}: {reason}")
    return "torch"


def norm_backend(backend: str, weight: Tensor) -> str:
    """The backend that computes a norm or merges: the kernels wherever they run, whatever the number of tokens."""
    if backend == "torch" or (backend == "auto" and weight.device.type != "cuda"):
        return "torch"
    reason = _unfit((weight,)) or triton_problem(weight.device)
    if reason is None:
        return "triton"
    if backend == "triton":
        raise UnsupportedError(f"backend='triton' was asked for and cannot be used on {weight.device}: {reason}")
    warn_once(f"dora_kernels: the triton backend is not used on {weight.device}: {reason}; using backend='torch'")
    return "torch"


def _unfit(tensors: Iterable[Tensor | None]) -> str | None:
    """Why the kernels cannot take these tensors; None where they can."""
    for tensor in tensors:
        if type(tensor) not in PLAIN and not torch.compiler.is_compiling():
            return f"it has no kernels for tensors of type {type(tensor).__name__}"
        if tensor is not None and tensor.dtype not in KERNEL_DTYPES:
            return f"it has no kernels for {tensor.dtype}"
    if torch.compiler.is_compiling() or not transformed():
        return None
    return "it does not support torch.func, forward mode and tracing"


def kernels() -> ModuleType:
    """`dora_kernels.kernels`, imported on first use, since it imports triton."""
    from dora_kernels import kernels

    return kernels


_warned: set[str] = set()


def warn_once(message: str) -> None:
    """Warn the first time this process meets `message`."""
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=3)


def triton_problem(device: torch.device) -> str | None:
    """Why the triton backend cannot run on `device`, or None where it can. The answer is kept per device."""
    return _triton_problem(device)


# torch.compile takes the answer and does not trace how it was found. This is what
# torch.compiler.assume_constant_result sets, which cannot be called here: it imports the compiler.
triton_problem._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _triton_problem(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    try:
        from dora_kernels import kernels
    except Exception as error:  # a triton of another platform, or broken
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
    except Exception as error:  # whatever stops a compiler or a driver: no C compiler, a full disk, an old driver
        return f"a first kernel failed: {type(error).__name__}: {first_line(error)}"
    return None


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return (str(error).strip().splitlines() or ["no message"])[0]
