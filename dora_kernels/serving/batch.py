"""The batch that is running: which slot each row has, for the layers that ask. Each thread and task has its own."""

from __future__ import annotations

import contextvars
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from dora_kernels.engine.route import Route

RUNNING: contextvars.ContextVar[Batch | None] = contextvars.ContextVar("dora_kernels_batch", default=None)


@dataclass
class Batch:
    """Rows of a batch and their slots.

    Attributes:
        bank: whose slots they are.
        slots: of each row, or of each token if `packed`; -1 for the base model.
        ranks: of the adapters in the bank's slots.
        repeats: how many neighbouring rows of the model's batch one of `slots` may stand for, besides 1.
        packed: True if `slots` has an entry for each token.
        outer: the batch around this one.
        entries: the adapters in use, each once.
        called, met: True once the model, and a layer with slots, has run in it.
    """

    bank: Any
    slots: Sequence[int]
    ranks: Sequence[int]
    repeats: int = 1
    packed: bool = False
    outer: Batch | None = None
    entries: tuple[Any, ...] = ()
    called: bool = False
    met: bool = False
    _routes: dict[Any, Route] = field(default_factory=dict)

    def route(self, name: str, shape: torch.Size, device: torch.device) -> Route:
        """Return the route for an input of the layer `name`, of this shape without its features."""
        key = shape, device
        route = self._routes.get(key)
        if route is None:
            route = self._routes[key] = self._made(name, shape, device)
        return route

    def _made(self, name: str, shape: torch.Size, device: torch.device) -> Route:
        rows, tokens = len(self.slots), shape.numel()

        def given(noun: str) -> str:
            return f"{counted(rows, noun)} {'was' if rows == 1 else 'were'} given"

        if self.packed:
            if tokens != rows:
                raise ValueError(f"tokens: {given('slot')}, and {name} got {counted(tokens, 'token')}: {list(shape)}")
            return Route.of(self.slots, self.ranks, 1, device)
        if len(shape) > 1:  # [rows, ..., features]
            repeats, rest = divmod(shape[0], rows) if rows else (0, shape[0])
            if rest or repeats not in (1, self.repeats):
                wanted = counted(rows, "row") + (f", or {rows * self.repeats}" if self.repeats > 1 else "")
                got = counted(shape[0], "row")
                raise ValueError(f"rows: {given('adapter')}, and {name} got {got}; expected {wanted}")
        elif (tokens % rows if rows else tokens) or (not shape and rows != 1):
            raise ValueError(
                f"rows: {given('adapter')}, and {name} got {counted(tokens, 'token')}, which they do not divide"
            )
        return Route.of(self.slots, self.ranks, tokens // rows if rows else 0, device)


def around(bank: Any) -> Iterator[Batch]:
    """The batches of this bank in this thread or task, innermost first."""
    batch = RUNNING.get()
    while batch is not None:
        if batch.bank is bank:
            yield batch
        batch = batch.outer


def running(bank: Any) -> Batch | None:
    """The innermost batch of this bank."""
    batch = RUNNING.get()
    if batch is None or batch.bank is bank:
        return batch
    return next(around(bank), None)


@contextmanager
def entered(batch: Batch) -> Iterator[None]:
    """Make it the running batch, without gradients. RuntimeError at the end if the model ran and no adapter did."""
    batch.outer = RUNNING.get()
    token = RUNNING.set(batch)
    try:
        with torch.no_grad():
            yield
    finally:
        RUNNING.reset(token)
    if batch.called and batch.entries and not batch.met:
        raise RuntimeError(
            "rows: the model ran, but none of the layers with adapters, so its output is the base model's; were "
            "they called in another thread, or compiled before the bank was made?"
        )


class Watch:
    """A model's forward pre-hook that notes its calls. A copy of the model has one that does nothing."""

    def __init__(self, bank: Any) -> None:
        self.bank = bank

    def __call__(self, *_: Any) -> None:
        """Note a call in the running batch."""
        if self.bank is not None and (batch := running(self.bank)) is not None:
            batch.called = True

    def __reduce__(self) -> Any:
        return Watch, (None,)


def checked(names: Any) -> list[str | None]:
    """The names as a list. Raises TypeError if they are not a sequence of names and None."""
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise TypeError(f"adapters: expected a sequence of names, got {type(names).__name__}")
    for name in names:
        if name is not None and not isinstance(name, str):
            raise TypeError(f"adapters: expected names and None, got {type(name).__name__}")
    return list(names)


def counted(number: int, noun: str, plural: str = "s") -> str:
    """A number with its noun."""
    return f"{number} {noun}{'' if number == 1 else plural}"
