"""Launches: a compiled kernel is kept, and launched again without Triton's binder.

``kernel[grid](...)`` looks at every argument anew, which costs the host as much as five small PyTorch operations. A
kept kernel is found by what its code depends on, and launched as Triton does it then, with addresses in place of
tensors. The first launch of a kind, which may compile, goes Triton's way.

So does every launch where kernels are interpreted, where a profiler's hooks want to hear of launches, and where Triton
launches otherwise than the versions that this was written for, 3.2 to 3.9: that is read in its source, and warned of.
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

# Triton 3.2 hands a kernel's launcher what is no constant, later versions everything.
_LAUNCH = re.compile(
    r"kernel\.run\(grid_0,grid_1,grid_2,stream,kernel\.function,kernel\.packed_metadata,launch_metadata,"
    r"(knobs\.runtime|self\.CompiledKernel)\.launch_enter_hook,\1\.launch_exit_hook,"
    r"\*(bound_args\.values\(\)|non_constexpr_vals)\)"
)
PLANS = 1024
"""How many plans a launcher keeps: a model has one for every shape and dtype of its layers."""

_WIDE = 1 << 31
_HIP = torch.version.hip is not None


class _Triton(NamedTuple):
    """How this version of Triton launches."""

    run: Any
    """The function that does; somebody who wants to see launches may have put another in its place."""
    hooks: Any
    """What has the hooks of profilers."""
    takes_constants: bool


class _Kept(NamedTuple):
    """A compiled kernel with what its launcher is given. The kernel itself is there to be kept: it owns the code."""

    kernel: Any
    run: Any
    function: Any
    metadata: Any


def _triton() -> _Triton | str:
    """How to launch directly, or why it is not known."""
    run = JITFunction.run
    if getattr(run, "__globals__", None) is not vars(sys.modules[JITFunction.__module__]):
        return "JITFunction.run is not Triton's own"
    try:
        found = _LAUNCH.search(re.sub(r"\s+", "", inspect.getsource(run)))
    except (OSError, TypeError) as error:
        return f"Triton's source cannot be read: {error}"
    if found is None:
        return "it launches kernels in a way that is not known here"
    if found[1] == "knobs.runtime":
        from triton import knobs

        hooks: Any = knobs.runtime
    else:
        hooks = CompiledKernel
    return _Triton(run, hooks, found[2] != "non_constexpr_vals")


_found = "kernels are interpreted" if INTERPRETED else _triton()
_direct = _found if isinstance(_found, _Triton) else None


class Plan:
    """What is decided about the launches of a layer before its tensors are there, with the kernels compiled for it.

    Args:
        sizes: Integers that the compiler looks at: what a layer's shapes and strides decide.
        flags: Constants.
        config: A tuple of `dora_kernels.kernels.config`: tiles, which are constants too, and two compiler options.
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

    Its arguments are, in this order: `tensors`, None where one is absent; the plan's sizes; `free`, which are numbers
    that the compiler does not look at (`do_not_specialize`, or floats), the largest integer first; the plan's flags and
    tiles. Every plan is of one kernel.
    """
    first: Any = tensors[0]
    if _direct is None or not isinstance(kernel, JITFunction):
        if not INTERPRETED:
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
            if one.get_device() != index:  # which Triton refuses, or can reach
                kind.append(one.device)
            bits |= pointer
    if bits & 15:
        kind += [pointer & 15 == 0 for pointer in pointers]
    if _HIP:  # whose loads of less than 2 GB are others
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
        f"dora_kernels: a launch costs the host more than it could, with triton {triton.__version__}: {reason}",
        RuntimeWarning,
        stacklevel=4,
    )


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[None]:
    """Triton launches on the current device, which need not be the tensor's."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()
