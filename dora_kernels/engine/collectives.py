"""What the processes of a tensor-parallel group exchange for a layer that is split over them. See docs/parallel.md.

Every process of the group calls these functions in the same order, whatever its own tensors hold.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable


def copied(group: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Return tensors that are the same in all processes, for a product with a split one; their gradients are summed."""
    if not torch.is_grad_enabled():
        return tensors
    copies: tuple[Tensor, ...] = _Copied.apply(group, *tensors)
    return copies


def summed(group: Any, part: Tensor) -> Tensor:
    """Return the sum of the processes' parts of a product, written over `part`, which no backward may need."""
    if torch.is_grad_enabled() and part.requires_grad:
        total: Tensor = _Summed.apply(group, part)
        return total
    return _sum(group, part)


def taking_part(result: Tensor, *tensors: Tensor) -> Tensor:
    """Return a copy of `result` whose backward gives `tensors` gradients of 0.

    So a process that has used none of them takes part in the sums of their gradients (`copied`).
    """
    copy: Tensor = _TakingPart.apply(result, *tensors)
    return copy


def all_true(group: Any, own: list[bool], device: torch.device) -> list[bool]:
    """Return for each of `own` whether it is true in every process."""
    flags = torch.tensor(own, dtype=torch.int32, device=device)
    distributed.all_reduce(flags, distributed.ReduceOp.MIN, group)
    return list(map(bool, flags.tolist()))


def whole_norm(group: Any, part: Tensor, *zeros: bool) -> tuple[Tensor, list[bool]]:
    """Return the norm of rows that are split over the group, and which of `zeros` are true in every process.

    Args:
        part: the norm of this process's part of the rows, of any shape.
    """
    nonzero = torch.tensor([not zero for zero in zeros], dtype=part.dtype, device=part.device)
    total = _sum(group, torch.cat([part.square().flatten(), nonzero]))
    norm, counts = total[: part.numel()], total[part.numel() :]
    return norm.sqrt().view(part.shape), [not count for count in counts.tolist()]


def gathered(group: Any, part: Tensor, dim: int, own: Tensor, size: int) -> Tensor:
    """Return a tensor of which each process has the elements `own` along `dim`, of `size` elements there."""
    shape = list(part.shape)
    shape[dim] = size
    return _sum(group, part.new_zeros(shape).index_copy(dim, own.to(part.device), part))


def _sum(group: Any, part: Tensor) -> Tensor:
    distributed.all_reduce(part, group=group)
    return part


class _Copied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        return tensors

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # What has no gradient here has zeros: another process may have one.
        parts = [g.contiguous() if needed else None for g, needed in zip(grads, ctx.needs_input_grad[1:], strict=True)]
        # Written over: they are results of products, which nobody else holds.
        waiting = [distributed.all_reduce(part, group=ctx.group, async_op=True) for part in parts if part is not None]
        for each in waiting:
            each.wait()
        return None, *parts


class _TakingPart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, result: Tensor, *tensors: Tensor) -> Tensor:
        ctx.count = len(tensors)
        return result.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, *(None,) * ctx.count


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: Any, part: Tensor) -> Tensor:
        ctx.mark_dirty(part)
        return _sum(group, part)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad
