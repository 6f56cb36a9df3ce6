"""Launch a compiled kernel again without Triton's binder.

``kernel[grid](...)`` inspects every argument at each call, which costs the host as much as five small PyTorch
operations. Here a compiled kernel is kept under everything that its code depends on, and launched as Triton would, with
addresses in place of tensors. The first launch with a given key, which may compile, goes through Triton.

So does every launch if kernels are interpreted, if a profiler's hooks listen to launches, or if this version of Triton
launches differently from those that this was written for, 3.2 to 3.9. The latter is found in Triton's source, with a
warning.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
import sys
import warnings
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import JITFunction
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver

from dora_kernels.kernels.dot import dot

INTERPRETED = not isinstance(dot, JITFunction)

# Triton 3.2 passes only the non-constant arguments to a kernel's launcher; later versions pass all.
_LAUNCH = re.compile(
    r"kernel\.run\(grid_0,grid_1,grid_2,stream,kernel\.function,kernel\.packed_metadata,launch_metadata,"
    r"(knobs\.runtime|self\.CompiledKernel)\.launch_enter_hook,\1\.launch_exit_hook,"
    r"\*(bound_args\.values\(\)|non_constexpr_vals)\)"
)
PLANS = 1024
"""The most plans that a launcher keeps. A model has one for every shape and dtype of its layers."""

_WIDE = 1 << 31
_HIP = torch.version.hip is not None


class _Triton(NamedTuple):
    """How this version of Triton launches."""

    run: Any
    """The function that launches. A tool that wants to see launches may have replaced it."""
    hooks: Any
    """The object that holds the profilers' hooks."""
    takes_constants: bool


class _Kept(NamedTuple):
    """A compiled kernel and its launcher's arguments. The kernel is kept because it owns the code."""

    kernel: Any
    run: Any
    function: Any
    metadata: Any


def _triton() -> _Triton | str:
    """Return how to launch directly, or the reason why this is not known."""
    run = JITFunction.run
    if getattr(run, "__globals__", None) is not vars(sys.modules[JITFunction.__module__]):
        return "JITFunction.run is not Triton's own"
    try:
        found = _LAUNCH.search(re.sub(r"\s+", "", inspect.getsource(run)))
    except (OSError, TypeError) as error:
        return f"Triton's source cannot be read: {error}"
    if found is None:
        return "it launches kernels in a way that this version does not know"
    if found[1] == "knobs.runtime":
        from triton import knobs

        hooks: Any = knobs.runtime
    else:
        hooks = CompiledKernel
    return _Triton(run, hooks, found[2] != "non_constexpr_vals")


_found = "kernels are interpreted" if INTERPRETED else _triton()
_direct = _found if isinstance(_found, _Triton) else None


class Plan:
    """Everything about the launches of a layer that is known before its tensors are, with the kernels compiled for it.

    Args:
        sizes: Integers that the compiler specialises on: a layer's shapes and strides.
        flags: Constants.
        config: A tuple of `dora_kernels.kernels.config`: tile sizes, which are constants too, and two compiler options.
    """

    __slots__ = ("config", "constants", "flags", "kept", "sizes")

    def __init__(self, sizes: tuple[int, ...], flags: tuple[Any, ...], config: Any) -> None:
        self.sizes, self.flags, self.config = sizes, flags, config
        self.constants = (*flags, *config[:-2]) if _direct is not None and _direct.takes_constants else ()
        self.kept: dict[tuple[Any, ...], _Kept] = {}


def launch(
    kernel: Any, plan: Plan, grid: tuple[int, ...], tensors: tuple[Tensor | None, ...], free: tuple[float, ...]
) -> None:
    """Launch a kernel on the device of the first tensor.

    The kernel's arguments are, in this order: `tensors`, with None for absent ones; the plan's sizes; `free`; the
    plan's flags and tile sizes. `free` are numbers that the compiler does not specialise on (`do_not_specialize`, or
    floats), the largest integer first. A plan belongs to one kernel.
    """
    first: Any = tensors[0]
    if _direct is None or not isinstance(kernel, JITFunction):
        if not INTERPRETED and _direct is None:
            _say(str(_found))
        with on_device(first):
            _ordinarily(kernel, plan, grid, tensors, free)
        return
    active = driver.active
    device = active.get_current_device()
    index = first.get_device()
    if index not in (device, -1):
        with torch.cuda.device(first.device):
            launch(kernel, plan, grid, tensors, free)
        return
    pointers: list[int] = []
    kind: list[Any] = [device, free[0] >= _WIDE]
    bits = 0
    for one in tensors:
        if one is None:
            pointers.append(0)
            kind.append(None)
        else:
            pointer = one.data_ptr()
            pointers.append(pointer)
            kind.append(one.dtype)
            if one.get_device() != index:  # Triton would refuse it, or can reach it
                kind.append(one.device)
            bits |= pointer
    if bits & 15:
        kind += [pointer & 15 == 0 for pointer in pointers]
    if _HIP:  # HIP loads differently from tensors of less than 2 GB
        kind += [one is not None and one.untyped_storage().nbytes() >= _WIDE for one in tensors]
    kept = plan.kept.get(tuple(kind))
    enter, leave = _direct.hooks.launch_enter_hook, _direct.hooks.launch_exit_hook
    watched = (enter is not None and getattr(enter, "calls", True)) or (
        leave is not None and getattr(leave, "calls", True)
    )
    if kept is None or watched or JITFunction.run is not _direct.run:
        compiled = _ordinarily(kernel, plan, grid, tensors, free)
        if isinstance(compiled, CompiledKernel):
            plan.kept[tuple(kind)] = _Kept(compiled, compiled.run, compiled.function, compiled.packed_metadata)
        return
    kept.run(
        grid[0], grid[1] if len(grid) > 1 else 1, 1, active.get_current_stream(device),
        kept.function, kept.metadata, None, None, None,
        *pointers, *plan.sizes, *free, *plan.constants,
    )  # fmt: skip


def _ordinarily(kernel: Any, plan: Plan, grid: tuple[int, ...], tensors: Any, free: Any) -> Any:
    return kernel[grid](*tensors, *plan.sizes, *free, *plan.flags, **plan.config._asdict())


@functools.cache
def _say(reason: str) -> None:
    warnings.warn(
        f"dora_kernels: kernel launches use Triton's slower path, with triton {triton.__version__}: {reason}",
        RuntimeWarning,
        stacklevel=4,
    )


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[None]:
    """Make the tensor's device the current one, on which Triton launches."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()
