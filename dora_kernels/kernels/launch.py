"""What every launcher shares: whether kernels are interpreted, the device to launch on, and a probe."""

from __future__ import annotations

import contextlib

import torch
import triton
from torch import Tensor

from dora_kernels.kernels.dot import dot

INTERPRETED = not isinstance(dot, triton.JITFunction)


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[None]:
    """Triton launches on the current device, which need not be the tensor's."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


def probe(device: torch.device) -> None:
    """Compile, launch and check one small kernel; raises what the compiler, the driver or the check has to say."""
    from dora_kernels.kernels.norm import weight_norm

    ones = torch.ones(16, 16, device=device)
    norm = weight_norm(ones, ones, ones, 1.0)
    if not torch.allclose(norm, torch.full_like(norm, 4 * 17.0)):
        raise RuntimeError(f"a 16x16 weight norm came out as {float(norm[0])}, expected 68")
