"""What the kernels ask for, counted while Triton's interpreter runs them.

Every load, store, tile product and atomic of the interpreter is counted on its way: the bytes of the lanes that no mask
leaves out, by the tensor argument whose memory the addresses lie in, and the distinct addresses among them.

Needs TRITON_INTERPRET=1 in the environment when triton is imported, and tensors on the CPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from aot.launches import Call, Recorded
from aot.recording import Launch, Made
from aot.traffic import Traffic


@dataclass
class Counts(Traffic):
    """`Traffic` as counted, and the bytes at distinct addresses."""

    distinct_loaded: dict[str, int] = field(default_factory=dict)
    distinct_stored: dict[str, int] = field(default_factory=dict)
    atomics: int = 0


@dataclass
class _Side:
    """The loads or the stores of a launch: the addresses and the size of an element, by operand."""

    tensors: dict[str, Tensor]
    addresses: dict[str, list[np.ndarray]] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)

    def see(self, pointers: Any, mask: Any) -> None:
        """An access that the interpreter is about to make."""
        lanes = pointers.data[np.broadcast_to(mask.data, pointers.data.shape).astype(bool)]
        if not lanes.size:
            return
        name = self._owner(int(lanes.min()), int(lanes.max()))
        self.addresses.setdefault(name, []).append(lanes)
        self.sizes[name] = pointers.get_element_ty().primitive_bitwidth // 8

    def _owner(self, lowest: int, highest: int) -> str:
        for name, tensor in self.tensors.items():
            start = tensor.untyped_storage().data_ptr()
            if start <= lowest and highest < start + tensor.untyped_storage().nbytes():
                return name
        raise AssertionError(f"addresses {lowest} to {highest} lie in none of {list(self.tensors)}")

    def bytes(self, distinct: bool) -> dict[str, int]:
        found = {name: np.concatenate(lanes) for name, lanes in self.addresses.items()}
        return {
            name: self.sizes[name] * int((np.unique(lanes) if distinct else lanes).size)
            for name, lanes in found.items()
        }


def counted(call: Call) -> tuple[Recorded, list[tuple[Launch, Counts]]]:
    """Run a call in the interpreter: every launch that it made, and what was counted in it."""
    counts: list[Counts] = []
    recorded = call.run(lambda made: counts.append(count(made)))
    return recorded, list(zip(recorded.launches, counts, strict=True))


def count(made: Made) -> Counts:
    """Run a launch."""
    # Where two arguments are one tensor, loads are of the first of them and stores of the last.
    loads, stores = _Side(made.tensors), _Side(dict(reversed(made.tensors.items())))
    counts = Counts()

    def dot(a: Any, b: Any) -> None:
        counts.flops += 2 * a.data.size * b.data.shape[-1]

    def atomic() -> None:
        counts.atomics += 1

    with _watched(loads.see, stores.see, dot, atomic):
        made.run()
    counts.loaded, counts.distinct_loaded = loads.bytes(False), loads.bytes(True)
    counts.stored, counts.distinct_stored = stores.bytes(False), stores.bytes(True)
    return counts


@contextlib.contextmanager
def _watched(
    load: Callable[[Any, Any], None],
    store: Callable[[Any, Any], None],
    dot: Callable[[Any, Any], None],
    atomic: Callable[[], None],
) -> Iterator[None]:
    """The interpreter tells of each access before it makes it; its plain loads and stores go through the masked ones.

    The operands after the ones named here differ between versions of triton.
    """
    from triton.runtime.interpreter import InterpreterBuilder

    def masked_load(self: Any, pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        load(pointers, mask)
        return before["create_masked_load"](self, pointers, mask, *rest, **named)

    def masked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        store(pointers, mask)
        return before["create_masked_store"](self, pointers, value, mask, *rest, **named)

    def product(self: Any, a: Any, b: Any, *rest: Any, **named: Any) -> Any:
        dot(a, b)
        return before["create_dot"](self, a, b, *rest, **named)

    def atomics(name: str) -> Callable[..., Any]:
        def seen(self: Any, *rest: Any, **named: Any) -> Any:
            atomic()
            return before[name](self, *rest, **named)

        return seen

    watching = {"create_masked_load": masked_load, "create_masked_store": masked_store, "create_dot": product}
    watching.update({name: atomics(name) for name in dir(InterpreterBuilder) if name.startswith("create_atomic")})
    before = {name: getattr(InterpreterBuilder, name) for name in watching}
    try:
        for name, watch in watching.items():
            setattr(InterpreterBuilder, name, watch)
        yield
    finally:
        for name, original in before.items():
            setattr(InterpreterBuilder, name, original)
