"""How the CPU visits the slots of a batch: in place, or on a copy of the rows that is sorted by slot.

Products of one slot's tokens at a time cost an operation each. Where many slots have few tokens, a batched product over
a range of slots costs one operation for all. It reads the factors where they lie; slots with fewer tokens are padded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

# Costs in the time of one slot of a batched product. Two cores, 1024x1024, rank 16: a slot of a batched product takes
# 2 us in float32 and 4 us in bfloat16, a further row 1 us; an operation of its own takes 8 us and 37 us.
_SEGMENT, _BATCH, _ROW = 6.0, 2.0, 0.5

# Tokens of a run from which it is worked on in place. Sorting 512 tokens of 8 slots costs 0.12 of the base product.
_LONG_RUN = 64


@dataclass(frozen=True)
class Plan:
    """The work of a route. Its rows are the tokens themselves, or a sorted and padded copy of them.

    Attributes:
        gather: ``[G]``, the token of each row; None if the rows are the tokens.
        scatter: the row of each of `tokens`; None if the rows are these tokens'.
        tokens: the tokens that have an adapter, where the rows are a copy; None if all have one.
        batch: first slot, end of the slots and rows per slot of the batched product, which has the first rows; None if
            there is none.
        segments: ``(slot, start, end)`` of rows that have a product of their own.
        slots: all slots at work.
    """

    gather: Tensor | None
    scatter: Tensor | None
    tokens: Tensor | None
    batch: tuple[int, int, int] | None
    segments: tuple[tuple[int, int, int], ...]
    slots: tuple[int, ...]
    _widths: dict[tuple[int, ...], tuple[int, int]] = field(default_factory=dict, repr=False, compare=False)

    def widths(self, ranks: tuple[int, ...]) -> tuple[int, int]:
        """The largest rank of all slots at work, and of those in the batched product. Most layers ask the same."""
        known = self._widths.get(ranks)
        if known is None:
            batched = 0 if self.batch is None else max(ranks[slot] for slot in self.slots if slot not in self._alone)
            known = self._widths[ranks] = max((ranks[slot] for slot in self.slots), default=0), batched
        return known

    @property
    def _alone(self) -> set[int]:
        return {slot for slot, _, _ in self.segments}


def plan_of(rows: Sequence[int], tokens: int, batched: bool) -> Plan:
    """Return the plan.

    Args:
        rows: the slot of each row; -1 for none.
        tokens: consecutive tokens of a row.
        batched: False allows no batched product.
    """
    runs = _runs(rows, tokens)
    sizes: dict[int, int] = {}
    for slot, start, end in runs:
        sizes[slot] = sizes.get(slot, 0) + end - start
    slots = tuple(sorted(sizes))
    active, total = sum(sizes.values()), len(rows) * tokens
    size = _batched_size(sizes) if batched and len(runs) > 1 else 0
    if size and runs == tuple(
        (slot, i * size, (i + 1) * size) for i, slot in enumerate(range(slots[0], slots[-1] + 1))
    ):
        return Plan(None, None, None, (slots[0], slots[-1] + 1, size), (), slots)
    if len(runs) <= 1 or active >= _LONG_RUN * len(runs) or (not size and len(runs) == len(slots)):
        return Plan(None, None, None, None, runs, slots)
    members: dict[int, list[int]] = {slot: [] for slot in slots}
    for slot, start, end in runs:
        members[slot] += range(start, end)
    small = [slot for slot in slots if sizes[slot] <= size]
    batch = (small[0], small[-1] + 1, size) if small else None
    gather: list[int] = []
    place: dict[int, int] = {}
    for slot in range(*batch[:2]) if batch else ():
        own = members[slot] if slot in small else []
        place.update(zip(own, range(len(gather), len(gather) + size), strict=False))
        gather += own + [runs[0][1]] * (size - len(own))
    segments = []
    for slot in slots:
        if slot not in small:
            segments.append((slot, len(gather), len(gather) + sizes[slot]))
            place.update(zip(members[slot], range(len(gather), len(gather) + sizes[slot]), strict=True))
            gather += members[slot]
    copied = torch.tensor(gather)
    if len(gather) == active < total:
        return Plan(copied, None, copied, batch, tuple(segments), slots)
    visited = sorted(place)
    scatter = torch.tensor([place[token] for token in visited])
    return Plan(copied, scatter, None if active == total else torch.tensor(visited), batch, tuple(segments), slots)


def _runs(rows: Sequence[int], tokens: int) -> tuple[tuple[int, int, int], ...]:
    """Neighbouring tokens of one slot: ``(slot, start, end)``."""
    runs: list[tuple[int, int, int]] = []
    for i, slot in enumerate(rows):
        start, end = i * tokens, (i + 1) * tokens
        if slot >= 0 and runs and runs[-1][0] == slot and runs[-1][2] == start:
            start = runs.pop()[1]
        if slot >= 0 and tokens:
            runs.append((slot, start, end))
    return tuple(runs)


def _batched_size(sizes: dict[int, int]) -> int:
    """The most rows of a slot that takes part in the batched product; 0 if none should."""
    best, chosen = sum(_SEGMENT + _ROW * size for size in sizes.values()), 0
    for limit in sorted(set(sizes.values())):
        small = [slot for slot, size in sizes.items() if size <= limit]
        cost = _BATCH + (max(small) - min(small) + 1) * (1.0 + _ROW * limit)
        cost += sum(_SEGMENT + _ROW * size for size in sizes.values() if size > limit)
        if cost < best:
            best, chosen = cost, limit
    return chosen
