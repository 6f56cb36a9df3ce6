"""Which backend a call takes, and why: `auto`'s choice, its one-time warnings, and the errors of a named backend."""

from __future__ import annotations

import functools
import importlib.util
import warnings

import torch
from torch import Tensor

BACKENDS = ("auto", "reference", "torch", "triton")

_PLAIN = frozenset({Tensor, torch.nn.Parameter, type(None)})

_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class UnsupportedError(RuntimeError):
    """A backend that was asked for by name cannot do what the call needs."""


_warned: set[str] = set()


def warn_once(message: str) -> None:
    """Warn the first time this process meets `message`."""
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=3)


def resolve(backend: str, tensors: tuple[Tensor | None, ...]) -> str:
    """The backend that runs a call on `tensors` (x or the weight first): "reference", "torch" or "triton".

    "auto" takes triton on a GPU where it runs and torch elsewhere; under `torch.func` transforms, forward-mode
    AD, `torch.jit.trace` and for tensor subclasses (DTensor, …) it warns once and takes the reference. A backend asked
    for by name is taken, or `UnsupportedError` says why it cannot be.
    """
    if backend == "reference":
        return backend
    reason = _only_reference(tensors)
    if reason is not None:
        if backend != "auto":
            raise UnsupportedError(f"backend={backend!r} does not support {reason}; backend='reference' or 'auto' does")
        warn_once(f"dora_kernels: {reason}: using the dense reference, which is slow")
        return "reference"
    if backend == "torch":
        return backend
    first = tensors[0]
    assert first is not None
    if backend == "auto" and first.device.type != "cuda":
        return "torch"
    reason = triton_problem(first.device)
    if reason is None:
        wide = next((t.dtype for t in tensors if t is not None and t.dtype not in _KERNEL_DTYPES), None)
        if wide is None:
            return "triton"
        if backend == "auto":
            return "torch"
        reason = f"it has no kernels for {wide}"
    elif backend == "auto":
        warn_once(f"dora_kernels: the triton backend is not used on {first.device}: {reason}; using backend='torch'")
        return "torch"
    raise UnsupportedError(f"backend='triton' was asked for and is not available on {first.device}: {reason}")


def _only_reference(tensors: tuple[Tensor | None, ...]) -> str | None:
    if torch.compiler.is_compiling():
        return None
    for kind in set(map(type, tensors)) - _PLAIN:
        return f"tensors of type {kind.__name__}"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "torch.func transforms"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode differentiation"
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace"
    return None


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
