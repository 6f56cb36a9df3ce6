"""The route of a batch: which slot's adapter each token takes. It is made once per forward and read by every layer."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dora_kernels.engine.segments import Plan, plan_of


@dataclass(frozen=True)
class Route:
    """Tokens grouped by slot.

    Attributes:
        order: ``[T]`` int64, the tokens sorted by slot, stable; those of the base model last.
        ends: ``[S]`` int32; slot s has the sorted tokens ``ends[s - 1]`` to ``ends[s]``, which may be none.
        rows: on the host, the slot of each row of `tokens` consecutive tokens; -1 for the base model.
        tokens: tokens of a row.
    """

    order: Tensor
    ends: Tensor
    rows: tuple[int, ...]
    tokens: int

    @staticmethod
    def of(rows: Sequence[int], count: int, tokens: int = 1, device: torch.device | str = "cpu") -> Route:
        """Return the route of rows of consecutive tokens.

        Args:
            rows: a slot for each row; -1 for the base model.
            count: the number of slots, S.
            tokens: tokens of a row.
            device: where the tensors will be. Nothing is read back from there.
        """
        order = sorted(range(len(rows)), key=[count if slot < 0 else slot for slot in rows].__getitem__)
        ends = [0] * count
        for slot in rows:
            if slot >= 0:
                ends[slot] += tokens
        for slot in range(1, count):
            ends[slot] += ends[slot - 1]
        sorted_tokens = (torch.tensor(order, dtype=torch.int64).unsqueeze(1) * tokens + torch.arange(tokens)).view(-1)
        return Route(
            sorted_tokens.to(device, non_blocking=True),
            torch.tensor(ends, dtype=torch.int32).to(device, non_blocking=True),
            tuple(rows),
            tokens,
        )

    @functools.cached_property
    def plan(self) -> Plan:
        """How the CPU visits the slots."""
        return plan_of(self.rows, self.tokens, batched=True)

    @functools.cached_property
    def loop(self) -> Plan:
        """The same, for factors that are not stacked: one slot after another."""
        return plan_of(self.rows, self.tokens, batched=False)
