"""`AdapterBank`: many adapters on one base model, a different one for each row of a batch."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dora_kernels.adapters import Adapter, read_adapter
from dora_kernels.serving.batch import Batch, Watch, around, checked, counted, entered
from dora_kernels.serving.layer import LayerSlots, Packed, Stacks, Target
from dora_kernels.serving.pack import check_base, packed
from dora_kernels.serving.residents import Entry, Residents

Source = str | os.PathLike[str] | Adapter


class AdapterBank:
    """Adapters of many users on one base model, with a choice for each row of a batch.

    ```python
    bank = dora_kernels.AdapterBank(model, slots=8)
    bank.load("alice", "alice_adapter")
    bank.load("bob", "bob.safetensors")
    with bank.rows(["alice", None, "bob"]):
        logits = model(**inputs).logits
    tokens = bank.generate(inputs, adapters=["alice", None, "bob"], max_new_tokens=20)
    ```

    DoRA and plain LoRA of different ranks and on different layers serve side by side. The scale of each row of a
    DoRA weight, its magnitude over its norm, is computed when an adapter is loaded, in float32 from the base weight:
    no forward computes or compares a norm. The model keeps its parameters, its state dict and its modules; the layers
    that an adapter changes get a `forward` of their own. Outside of `rows`, `tokens` and `generate` the model is
    the base model. Do not write its weights while adapters are loaded.

    All methods may be called by several threads. A slot is written only while no batch uses it: `rows` waits until
    other threads leave one, if it has to.

    Args:
        model: any model with linear layers, quantised ones included. It stays the same object.
        slots: how many adapters can be used at the same time; more may be loaded. The slots lie on the layers' devices.
        max_rank: the largest rank of an adapter. Slots have the largest rank that was loaded, not this one.
        host_limit: bytes of the host memory that adapters without a slot may take; None for any number.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: a number is out of range, or the model is PEFT's wrapper of one.
    """

    def __init__(self, model: nn.Module, slots: int = 8, max_rank: int = 64, host_limit: int | None = None) -> None:
        check_base(model)
        for name, value, least in (("slots", slots, 1), ("max_rank", max_rank, 1), ("host_limit", host_limit, 0)):
            if value is None and name == "host_limit":
                continue
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
            if value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")
        self.model, self.max_rank, self.host_limit = model, max_rank, host_limit
        self._lock = threading.Condition()
        self._entries: dict[str, Entry] = {}
        self._layers: dict[str, LayerSlots] = {}
        self._residents = Residents(slots)
        self._clock, self._closed, self._nested_waits = 0, False, False
        self._watch = model.register_forward_pre_hook(Watch(self))

    def __repr__(self) -> str:
        """The model's class, and what is loaded."""
        with self._lock:
            held = f"{counted(len(self._entries), 'adapter')} in {counted(len(self._residents.slots), 'slot')}"
        return f"<AdapterBank of {type(self.model).__name__}, {'closed' if self._closed else held}>"

    def load(self, name: str, adapter: Source) -> None:
        """Load an adapter. It gets a free slot if there is one, else it waits in host memory until it is used.

        Args:
            name: by which rows ask for it.
            adapter: a file or folder of any format that `read_adapter` reads, or an `Adapter`.

        Raises:
            TypeError, FileNotFoundError, OSError: as `read_adapter`.
            RuntimeError: the bank is closed.
            ValueError: the name is taken; as `read_adapter`; it is not an adapter for this model; its rank is above
                max_rank, or its magnitude is along "in"; or host_limit would be exceeded. The bank is as it was.
        """
        self._check_new(name)
        parts = self._parts(adapter)
        with self._lock:
            self._check_new(name)
            self._add(name, parts, None)

    def replace(self, name: str, adapter: Source) -> None:
        """Put another adapter in the place of a loaded one. Batches that run with the old one end with the old one.

        Raises:
            TypeError, FileNotFoundError, OSError, ValueError: as `load`; or there is no adapter of this name.
        """
        with self._lock:
            self._entry(name)
        parts = self._parts(adapter)
        with self._lock:
            self._add(name, parts, self._entry(name))

    def unload(self, name: str) -> None:
        """Forget an adapter.

        Raises:
            ValueError: there is no adapter of this name, or a batch is running with it.
        """
        with self._lock:
            entry = self._entry(name)
            if entry.users:
                raise ValueError(f"name: {name!r} is in use by {counted(entry.users, 'running batch', 'es')}")
            del self._entries[name]
            self._forget(entry)
            self._lock.notify_all()

    def pin(self, name: str, pinned: bool = True) -> None:
        """Bring an adapter into a slot and keep it there; with ``pinned=False`` let it go again.

        Raises:
            ValueError: there is no adapter of this name, or all slots are pinned.
        """
        with self._lock:
            entry = self._entry(name)
            if pinned:
                self._seat([name], "name")
                entry = self._entry(name)
            entry.pinned = bool(pinned)
            self._lock.notify_all()

    @property
    def names(self) -> list[str]:
        """The loaded adapters, in the order of loading."""
        with self._lock:
            return list(self._entries)

    @property
    def resident(self) -> dict[str, int]:
        """The slots of the adapters that have one, by name."""
        with self._lock:
            return {name: entry.slot for name, entry in self._entries.items() if entry.slot is not None}

    def memory(self) -> dict[str, int]:
        """Bytes of the tensors by tier: "slots", allocated on the layers' devices, and "host", of adapters without."""
        with self._lock:
            host = sum(entry.nbytes for entry in self._entries.values() if entry.slot is None)
            return {"slots": sum(layer.nbytes for layer in self._layers.values()), "host": host}

    def close(self) -> None:
        """Unload everything and leave the model as it was. Nothing can be loaded any more.

        Raises:
            ValueError: a batch is running.
        """
        with self._lock:
            if used := [entry.name for entry in self._residents.slots if entry and entry.users]:
                raise ValueError(f"the bank: {', '.join(map(repr, used))} are in use by running batches")
            for layer in self._layers.values():
                layer.remove()
            self._watch.remove()
            self._layers, self._entries, self._closed = {}, {}, True
            self._residents = Residents(len(self._residents.slots))

    @contextmanager
    def rows(self, adapters: Sequence[str | None], repeats: int = 1) -> Iterator[None]:
        """Run the model's forwards in this block with an adapter for each row of the batch. Gradients are off in it.

        Args:
            adapters: a name for each row; None for the base model.
            repeats: how many neighbouring rows of the model's batch may stand for one of these, besides 1: beams.

        Raises:
            TypeError: `adapters` is not a sequence of names.
            ValueError: there is no adapter of a name, or more adapters than slots that are not pinned; or this block
                lies within another one, and so does another thread's that waits for slots. In the forward: the batch
                has another number of rows.
            RuntimeError: at the end, if the model ran and none of its adapted layers did.
        """
        with self._running(checked(adapters), "adapters", repeats=repeats):
            yield

    @contextmanager
    def tokens(self, slot_index: Sequence[int] | Tensor, names: Sequence[str] | None = None) -> Iterator[None]:
        """As `rows`, for packed batches: with an adapter for each token.

        Args:
            slot_index: for each token a slot as in `resident`, or with `names` an index into these; -1 for the base
                model. Without `names`, pin the adapters, so that no other thread moves them.
            names: adapters.

        Raises:
            TypeError, ValueError, RuntimeError: as `rows`; or there is no adapter in a slot.
        """
        index = [int(i) for i in (slot_index.tolist() if isinstance(slot_index, Tensor) else slot_index)]
        if names is None:
            with self._lock:
                chosen: Sequence[str | None] = [entry.name if entry else None for entry in self._residents.slots]
        else:
            chosen = checked(names)
        wrong = [i for i in index if not -1 <= i < len(chosen) or (i >= 0 and chosen[i] is None)]
        if wrong:
            known = ", ".join(f"{i}: {name!r}" for i, name in enumerate(chosen) if name is not None) or "none"
            raise ValueError(
                f"slot_index: there is no adapter at {wrong[0]}; -1 is the base model, and there are {known}"
            )
        used = [None if i < 0 else chosen[i] for i in index]
        with self._running(used, "names", packed=True):
            yield

    def generate(
        self, inputs: Tensor | Mapping[str, Any] | None = None, adapters: Sequence[str | None] = (), **options: Any
    ) -> Any:
        """Call the model's `generate` with an adapter for each row of `inputs`.

        Args:
            inputs: what the tokenizer returned, or a tensor of token ids. None if `options` have them, as in
                ``generate(**inputs, adapters=...)``.
            adapters: as for `rows`; required.
            options: for `generate`. Beams and returned sequences of a row have its adapter.

        Returns:
            What `generate` returns.

        Raises:
            TypeError, ValueError: as `rows`, and as the model's `generate`.
        """
        if not adapters:
            raise TypeError("adapters: expected a name or None for each row, got none")
        config = options.get("generation_config") or getattr(self.model, "generation_config", None)
        expanded = [
            options.get(key) or getattr(config, key, None) or 1 for key in ("num_beams", "num_return_sequences")
        ]
        with self.rows(adapters, repeats=max(expanded)):
            model: Any = self.model
            if isinstance(inputs, Tensor):
                return model.generate(inputs, **options)
            return model.generate(**(inputs or {}), **options)

    def _check_new(self, name: str) -> None:
        if not isinstance(name, str):
            raise TypeError(f"name: expected a str, got {type(name).__name__}")
        if self._closed:
            raise RuntimeError("the bank is closed; make another one")
        if name in self._entries:
            raise ValueError(f"name: {name!r} is loaded already; replace it, or unload it first")

    def _entry(self, name: Any, argument: str = "name") -> Entry:
        entry = self._entries.get(name)
        if entry is None:
            known = ", ".join(map(repr, self._entries)) or "none"
            raise ValueError(f"{argument}: there is no adapter {name!r} in the bank, which has {known}")
        return entry

    @torch.inference_mode(False)
    def _parts(self, adapter: Source) -> list[tuple[Target, Packed]]:
        """The adapter, packed. The base weights are read here, outside of the lock."""
        if not isinstance(adapter, Adapter):
            adapter = read_adapter(adapter, self.model)
        return packed(self.model, adapter, self.max_rank)

    @torch.inference_mode(False)  # slots are written later, and inference tensors could not be
    def _add(self, name: str, parts: list[tuple[Target, Packed]], old: Entry | None) -> None:
        """Add an entry; in the place of `old`, if given. What may fail comes first."""
        entry = Entry(
            name, frozenset(target.name for target, _ in parts), max(part.lora_A.shape[0] for _, part in parts),
            sum(part.nbytes for _, part in parts),
            {target.name: part.to(torch.device("cpu")) for target, part in parts},
        )  # fmt: skip
        self._check_host([e for e in self._entries.values() if e is not old] + [entry])
        made: list[LayerSlots] = []
        grown: list[tuple[LayerSlots, Stacks]] = []
        try:
            for target, part in parts:
                layer = self._layers.get(target.name)
                if layer is None:
                    made.append(layer := LayerSlots(self, target))
                grown.append((layer, layer.grown(len(self._residents.slots), part)))
        except BaseException:
            for layer in made:
                layer.remove()
            raise
        self._layers.update((layer.name, layer) for layer in made)
        for layer, stacks in grown:
            layer.stacks = stacks
        if old is not None:
            entry.pinned, entry.used = old.pinned, old.used
        self._entries[name] = entry
        if old is not None:
            old.pinned = False
            if not old.users:
                self._forget(old)
        if free := self._residents.free():
            self._put(entry, free[0])
        self._lock.notify_all()

    def _check_host(self, entries: list[Entry]) -> None:
        """Whichever adapters have slots, the others must fit into the host's memory."""
        sizes = sorted((entry.nbytes for entry in entries), reverse=True)
        most = sum(sizes[: max(0, len(sizes) - len(self._residents.slots))])
        if self.host_limit is not None and most > self.host_limit:
            raise ValueError(
                f"adapter: {len(sizes)} adapters in {len(self._residents.slots)} slots could need {most} bytes of host "
                f"memory, above host_limit={self.host_limit}; unload one first"
            )

    def _forget(self, entry: Entry) -> None:
        """Empty an entry's slot."""
        if entry.slot is not None:
            for layer in self._layers.values():
                layer.write(entry.slot, None)
            self._residents.slots[entry.slot] = None
            entry.slot = None

    def _put(self, entry: Entry, slot: int) -> None:
        """Move an entry from host memory into a slot, whose entry moves to host memory."""
        host, out = entry.host or {}, self._residents.slots[slot]
        self._synchronize()
        if out is not None:
            parts = {name: self._layers[name].read(slot) for name in out.layers}
            out.host, out.slot = {name: part for name, part in parts.items() if part is not None}, None
        for name, layer in self._layers.items():
            layer.write(slot, host.get(name))
        self._synchronize()
        entry.host, entry.slot, self._residents.slots[slot] = None, slot, entry

    def _synchronize(self) -> None:
        """Wait for the GPUs: other threads may use other streams."""
        for device in {layer.device for layer in self._layers.values() if layer.device.type == "cuda"}:
            torch.cuda.synchronize(device)

    def _seat(self, names: Sequence[str], argument: str) -> list[Entry]:
        """Give each adapter a slot, waiting for other threads' batches if there is no other way. Holds the lock."""
        own = [entry for batch in around(self) for entry in batch.entries]
        while True:
            wanted = [self._entry(name, argument) for name in names]
            if reason := self._residents.never(wanted, own):
                raise ValueError(f"{argument}: {reason}")
            slots = self._residents.room(wanted)
            if slots is not None:
                break
            self._wait(bool(own), argument)
        for entry, slot in zip([entry for entry in wanted if entry.slot is None], slots, strict=True):
            self._put(entry, slot)
        for entry in wanted:
            self._clock += 1
            entry.used = self._clock
        return wanted

    def _wait(self, nested: bool, argument: str) -> None:
        """Wait for a change. Two blocks within others would wait for each other's slots for ever: only one may wait."""
        if nested and self._nested_waits:
            raise ValueError(
                f"{argument}: expected a free slot, since another thread's block within a block waits for one too, got "
                f"none of {counted(len(self._residents.slots), 'slot')}"
            )
        self._nested_waits |= nested
        try:
            self._lock.wait()
        finally:
            self._nested_waits &= not nested

    @contextmanager
    def _running(
        self, names: Sequence[str | None], argument: str, repeats: int = 1, packed: bool = False
    ) -> Iterator[None]:
        """Run a batch with these adapters, which keep their slots meanwhile."""
        distinct = [name for name in dict.fromkeys(names) if name is not None]
        with self._lock:
            entries = self._seat(distinct, argument)
            for entry in entries:
                entry.users += 1
            places = {entry.name: entry.slot for entry in entries if entry.slot is not None}
            slots = [-1 if name is None else places[name] for name in names]
            ranks = [0 if entry is None else entry.rank for entry in self._residents.slots]
        try:
            with entered(Batch(self, slots, ranks, repeats, packed, entries=tuple(entries))):
                yield
        finally:
            with self._lock:
                for entry in entries:
                    entry.users -= 1
                    heir = self._entries.get(entry.name)
                    if not entry.users and heir is not entry:  # it was replaced
                        slot = entry.slot
                        self._forget(entry)
                        if slot is not None and heir is not None and heir.slot is None:
                            self._put(heir, slot)
                self._lock.notify_all()
