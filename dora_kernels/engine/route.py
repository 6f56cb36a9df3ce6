"""The route of a batch: which slot's adapter each token takes. It is made once per forward and read by every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

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
        ranks: of the slots' adapters; a layer's may be smaller.
        slots: those with tokens, ascending.
    """

    order: Tensor
    ends: Tensor
    rows: tuple[int, ...]
    tokens: int
    ranks: tuple[int, ...]
    slots: tuple[int, ...]
    _widths: dict[tuple[int, ...], int] = field(default_factory=dict, repr=False, compare=False)
    _plans: dict[tuple[bool, bool], Plan] = field(default_factory=dict, repr=False, compare=False)

    @staticmethod
    def of(rows: Sequence[int], ranks: Sequence[int], tokens: int = 1, device: torch.device | str = "cpu") -> Route:
        """Return the route of rows of consecutive tokens.

        Args:
            rows: a slot for each row; -1 for the base model.
            ranks: of the adapters in the slots.
            tokens: tokens of a row.
            device: where the tensors will be. Nothing is read back from there.
        """
        count = len(ranks)
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
            tuple(ranks),
            tuple(sorted(set(rows) - {-1})) if tokens else (),
        )

    def width(self, ranks: tuple[int, ...]) -> int:
        """The largest rank at work in a layer with these ranks. Most layers ask the same."""
        width = self._widths.get(ranks)
        if width is None:
            width = self._widths[ranks] = max((ranks[slot] for slot in self.slots), default=0)
        return width

    def plan(self, stacked: bool, narrow: bool) -> Plan:
        """How plain PyTorch operations visit the slots.

        Args:
            stacked: True if the factors of all slots are one tensor.
            narrow: True for elements of 16 bits.
        """
        plan = self._plans.get((stacked, narrow))
        if plan is None:
            plan = plan_of(self.rows, self.tokens, self.ranks, stacked, narrow, self.order.device)
            self._plans[stacked, narrow] = plan
        return plan
