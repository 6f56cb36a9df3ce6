"""Which adapter is in which slot: least recently used ones make room, those in use and pinned ones stay."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from dora_kernels.serving.batch import counted
from dora_kernels.serving.layer import Packed


@dataclass(eq=False)
class Entry:
    """One loaded adapter.

    Attributes:
        name: of the adapter. An entry that was replaced keeps its slot while somebody uses it.
        layers: the names of the layers it changes.
        rank: the largest of its layers.
        nbytes: of its tensors.
        host: its tensors in host memory; None while it is in a slot.
        slot: where it is; None while it is in host memory.
        users: batches that run with it.
        pinned: True if it must stay in its slot.
        used: when it was used last, in the bank's own count.
    """

    name: str
    layers: frozenset[str]
    rank: int
    nbytes: int
    host: dict[str, Packed] | None = field(repr=False)
    slot: int | None = None
    users: int = 0
    pinned: bool = False
    used: int = 0


class Residents:
    """The slots' adapters."""

    def __init__(self, slots: int) -> None:
        self.slots: list[Entry | None] = [None] * slots

    def __iter__(self) -> Iterable[Entry]:  # type: ignore[override]
        return (entry for entry in self.slots if entry is not None)

    def free(self) -> list[int]:
        """Slots without an adapter."""
        return [slot for slot, entry in enumerate(self.slots) if entry is None]

    def room(self, wanted: Sequence[Entry]) -> list[int] | None:
        """Return slots for those of `wanted` that have none: free ones, then the least recently used; None if all are
        taken for now."""
        missing = sum(entry.slot is None for entry in wanted)
        idle = [entry for entry in self.slots if entry and not entry.users and not entry.pinned and entry not in wanted]
        idle.sort(key=lambda entry: entry.used)
        slots = self.free() + [entry.slot for entry in idle if entry.slot is not None]
        return slots[:missing] if len(slots) >= missing else None

    def never(self, wanted: Sequence[Entry], own: Iterable[Entry]) -> str | None:
        """Return why there can be no room even when other threads are done, or None.

        Args:
            own: what the caller's batches around this one use.
        """
        if len(wanted) > len(self.slots):
            return f"{len(wanted)} adapters in one batch, and the bank has {counted(len(self.slots), 'slot')}"
        own = set(own)
        held = [entry for entry in self.slots if entry and entry not in wanted and (entry.pinned or entry in own)]
        if len(wanted) + len(held) <= len(self.slots):
            return None
        names = ", ".join(f"{entry.name!r} ({'pinned' if entry.pinned else 'in use around this'})" for entry in held)
        need = f"{counted(len(wanted), 'adapter')} need{'s' if len(wanted) == 1 else ''} a slot"
        return f"{need}, and {counted(len(self.slots), 'slot')} hold{'s' if len(self.slots) == 1 else ''} {names}"
