"""How plain operations visit the slots of a batch: in which groups, in place or on a copy of the rows sorted by slot.

A product of one slot's tokens costs an operation. A batched product over neighbouring slots costs one operation for all
of them; it reads their factors where they lie, those of slots between that have no tokens too, and slots with fewer
tokens than others are padded. The groups with the least sum of costs are taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Microseconds of a group's two products (two cores, 1024x1024, factors not in the cache), between what is measured
# where the second thread spins while it waits and where it sleeps. For each width of the elements: a group of one row,
# which needs no second thread (12 to 18 in float32), any other group (10 to 100), and its slots at rank 16.
_COSTS = {False: (15.0, 60.0, 4.5), True: (60.0, 85.0, 3.5)}
_RANK = 16.0
_ROW = 0.5
# Sorting copies the rows of x, of the result, and the result back.
_SORT, _COPY = 5.0, 1.2


class Group(NamedTuple):
    """Slots whose tokens are multiplied by one operation."""

    first: int
    """The first slot, and the end of the slots."""
    end: int
    size: int
    """Rows of each slot, some of them padding."""
    start: int
    """The first of its rows."""

    @property
    def stop(self) -> int:
        """The end of its rows."""
        return self.start + (self.end - self.first) * self.size


@dataclass(frozen=True)
class Plan:
    """The work of a route. Its rows are the tokens themselves, or a sorted and padded copy of them.

    Attributes:
        groups: in the order of their rows.
        gather: ``[G]``, the token of each row; None if the rows are the tokens.
        scatter: the row of each of `tokens`; None if the rows are these tokens'.
        tokens: the tokens that have an adapter, where the rows are a copy; None if all have one.
        slots: all slots at work, ascending.
    """

    groups: tuple[Group, ...]
    gather: Tensor | None
    scatter: Tensor | None
    tokens: Tensor | None
    slots: tuple[int, ...]
    _kept: dict[int, tuple[Any, Any, list[tuple[Group, int, Any]]]] = field(
        default_factory=dict, repr=False, compare=False
    )

    def parts(self, stack: Any, ranks: tuple[int, ...], side: str) -> list[tuple[Group, int, Any]]:
        """Return each group with its rank and its part of a stack; groups of rank 0 are left out.

        The parts of a stacked tensor are views, kept for the further forwards of a batch.

        Args:
            stack: of factors ("A": ``[S, R, K]``, "B": ``[S, N, R]``) or of vectors ("g": ``[S, N]``).
        """
        known = self._kept.get(id(stack))
        if known is not None and known[0] is stack and known[1] is ranks:
            return known[2]
        found = []
        for group in self.groups:
            rank = max(ranks[slot] for slot in self.slots if group.first <= slot < group.end)
            if rank:
                found.append((group, rank, _part(stack, group, rank, side)))
        if isinstance(stack, Tensor):
            self._kept[id(stack)] = stack, ranks, found
        return found


def _part(stack: Any, group: Group, rank: int, side: str) -> Any:
    if group.end - group.first > 1:
        part = stack[group.first : group.end]
        if side == "g":
            return part.unsqueeze(1)
        return part[:, :rank].mT if side == "A" else part.mT[:, :rank]
    part = stack[group.first]
    if part is None or side == "g":
        return part
    return part[:rank].t() if side == "A" else part.t()[:rank]


def plan_of(
    rows: Sequence[int], tokens: int, ranks: Sequence[int], stacked: bool, narrow: bool, device: torch.device
) -> Plan:
    """Return the plan.

    Args:
        rows: the slot of each row; -1 for none.
        tokens: consecutive tokens of a row.
        ranks: of the slots' adapters.
        stacked: False allows no group of several slots.
        narrow: True for elements of 16 bits.
        device: of the indices.
    """
    runs = _runs(rows, tokens)
    sizes: dict[int, int] = {}
    for slot, start, end in runs:
        sizes[slot] = sizes.get(slot, 0) + end - start
    slots = tuple(sorted(sizes))
    active, total = sum(sizes.values()), len(rows) * tokens
    in_place = _in_place(runs, stacked)
    groups = _grouped(sizes, ranks, stacked, narrow)
    if _cost(in_place, ranks, narrow) <= _cost(groups, ranks, narrow) + _SORT + _COPY * active:
        return Plan(tuple(in_place), None, None, None, slots)
    members: dict[int, list[int]] = {slot: [] for slot in slots}
    for slot, start, end in runs:
        members[slot] += range(start, end)
    gather: list[int] = []
    place: dict[int, int] = {}
    for group in groups:
        for slot in range(group.first, group.end):
            own = members.get(slot, [])
            place.update(zip(own, range(len(gather), len(gather) + group.size), strict=False))
            gather += own + [runs[0][1]] * (group.size - len(own))
    copied = torch.tensor(gather, device=device)
    if len(gather) == active < total:
        return Plan(tuple(groups), copied, None, copied, slots)
    visited = sorted(place)
    scatter = torch.tensor([place[token] for token in visited], device=device)
    return Plan(
        tuple(groups), copied, scatter, None if active == total else torch.tensor(visited, device=device), slots
    )


def _runs(rows: Sequence[int], tokens: int) -> list[tuple[int, int, int]]:
    """Neighbouring tokens of one slot: ``(slot, start, end)``."""
    runs: list[tuple[int, int, int]] = []
    for i, slot in enumerate(rows):
        start, end = i * tokens, (i + 1) * tokens
        if slot >= 0 and runs and runs[-1][0] == slot and runs[-1][2] == start:
            start = runs.pop()[1]
        if slot >= 0 and tokens:
            runs.append((slot, start, end))
    return runs


def _in_place(runs: Sequence[tuple[int, int, int]], stacked: bool) -> list[Group]:
    """Groups of the tokens as they lie."""
    groups: list[Group] = []
    for slot, start, end in runs:
        last = groups[-1] if groups else None
        if stacked and last and (last.end, last.stop, last.size) == (slot, start, end - start):
            groups[-1] = last._replace(end=slot + 1)
        else:
            groups.append(Group(slot, slot + 1, end - start, start))
    return groups


def _grouped(sizes: dict[int, int], ranks: Sequence[int], stacked: bool, narrow: bool) -> list[Group]:
    """Groups of slots in ascending order, with the least cost."""
    slots = sorted(sizes)
    best: list[tuple[float, int]] = [(0.0, 0)]  # the cost of the first n slots, and where their last group begins
    for n in range(1, len(slots) + 1):
        size = rank = 0
        found = (float("inf"), 0)
        for begin in range(n - 1, -1, -1):
            if n - begin > 1 and not stacked:
                break
            size, rank = max(size, sizes[slots[begin]]), max(rank, ranks[slots[begin]])
            span = slots[n - 1] - slots[begin] + 1
            found = min(found, (best[begin][0] + _group_cost(span, size, rank, narrow), begin))
        best.append(found)
    cuts, n = [], len(slots)
    while n:
        cuts.append((best[n][1], n))
        n = best[n][1]
    groups: list[Group] = []
    for begin, n in reversed(cuts):
        size = max(sizes[slot] for slot in slots[begin:n])
        groups.append(Group(slots[begin], slots[n - 1] + 1, size, groups[-1].stop if groups else 0))
    return groups


def _cost(groups: Sequence[Group], ranks: Sequence[int], narrow: bool) -> float:
    return sum(_group_cost(end - first, size, max(ranks[first:end]), narrow) for first, end, size, _ in groups)


def _group_cost(span: int, size: int, rank: int, narrow: bool) -> float:
    alone, several, slot = _COSTS[narrow]
    return (alone if span * size == 1 else several) + span * (slot * rank / _RANK + _ROW * size)
