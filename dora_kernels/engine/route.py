"""The route of a batch: which slot's adapter each token takes. It is made once per forward and read by every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Route:
    """Tokens grouped by slot.

    Attributes:
        slots: ``[T]`` int64, the slot of each token; the number of slots, S, for a token of the base model.
        order: ``[T]`` int64, the tokens sorted by slot, stable; those of the base model last.
        ends: ``[S]`` int32; slot s has the sorted tokens ``ends[s - 1]`` to ``ends[s]``, which may be none.
        segments: ``(slot, start, end)`` of each slot that has tokens, by slot: the same on the host.
        in_order: True if `order` is 0, 1, 2, ...
    """

    slots: Tensor
    order: Tensor
    ends: Tensor
    segments: tuple[tuple[int, int, int], ...]
    in_order: bool

    @staticmethod
    def of(rows: Sequence[int], count: int, tokens: int = 1, device: torch.device | str = "cpu") -> Route:
        """Return the route of rows of `tokens` consecutive tokens each.

        Args:
            rows: a slot for each row; -1 for the base model.
            count: the number of slots, S.
            tokens: tokens of a row.
            device: where the tensors will be. Nothing is read back from there.
        """
        order = sorted((row for row in range(len(rows)) if rows[row] >= 0), key=rows.__getitem__)
        base = [row for row in range(len(rows)) if rows[row] < 0]
        ends, segments, start = [0] * count, [], 0
        for row in order:
            ends[rows[row]] += tokens
        for slot, size in enumerate(ends):
            if size:
                segments.append((slot, start, start + size))
            start += size
            ends[slot] = start
        order += base
        by_row = torch.tensor([count if slot < 0 else slot for slot in rows], dtype=torch.int64)
        sorted_rows = torch.tensor(order, dtype=torch.int64)
        within = torch.arange(tokens)
        return Route(
            by_row.repeat_interleave(tokens).to(device, non_blocking=True),
            (sorted_rows.unsqueeze(1) * tokens + within).view(-1).to(device, non_blocking=True),
            torch.tensor(ends, dtype=torch.int32).to(device, non_blocking=True),
            tuple(segments),
            order == list(range(len(rows))),
        )
