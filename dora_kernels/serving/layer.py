"""The slots of one layer of a model: stacked factors, scales and biases, and the forward that puts them to work."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dora_kernels.core.precision import no_autocast
from dora_kernels.engine.dispatch import triton_problem
from dora_kernels.engine.route import Route
from dora_kernels.engine.slots import slots_compose, slots_shrink
from dora_kernels.modules.linear import is_conv1d
from dora_kernels.serving.batch import Batch, running


class Packed(NamedTuple):
    """One layer's part of an adapter, as a slot holds it."""

    lora_A: Tensor
    """``[r, K]``."""
    lora_B: Tensor
    """``[r, N]``, transposed, times the scaling."""
    g: Tensor | None
    """``[N]``, the magnitude over the norm; None for plain LoRA."""
    bias: Tensor | None
    """``[N]``, ``(1 - g) * b`` where the base layer has a bias b."""

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self if tensor is not None)

    def to(self, device: torch.device) -> Packed:
        """A copy on the device."""
        copies: Any = (None if t is None else t.to(device, copy=True) for t in self)
        return Packed(*copies)


class Stacks(NamedTuple):
    """All slots of a layer. A forward reads one of these, so that a larger one may take its place at any time."""

    lora_A: Tensor
    """``[S, R, K]``; zeros beyond a slot's rank."""
    lora_B: Tensor
    """``[S, N, R]``, in memory ``[S, R, N]``: so what belongs to the first r of a slot is contiguous for every r."""
    g: Tensor | None
    """``[S, N]``, 1 for plain LoRA; None until there is a DoRA adapter."""
    bias: Tensor | None
    """``[S, N]``; None without g or bias."""
    ranks: tuple[int, ...]
    """0 where a slot's adapter leaves the layer as it is."""
    scaled: frozenset[int]
    """The slots with a magnitude."""


class Target(NamedTuple):
    """A layer that an adapter changes."""

    name: str
    module: nn.Module
    weight: Tensor | None
    """``[N, K]``; None if the layer does not show it."""
    bias: Tensor | None
    features: tuple[int, int]
    """Input and output size."""
    dtype: torch.dtype
    """Of the layer's output, and of the factors in its slots."""
    device: torch.device


class LayerSlots:
    """A layer's slots, which its forward uses from here on."""

    def __init__(self, bank: Any, target: Target) -> None:
        self.bank, self.name, self.module = bank, target.name, target.module
        self.in_features, self.out_features = target.features
        self.dtype, self.device = target.dtype, target.device
        self.stacks: Stacks | None = None
        self._wide: tuple[Stacks, Stacks] | None = None
        """For outputs of a wider dtype: stacks, and these with their factors in that dtype."""
        self.backend = "triton" if self.device.type == "cuda" and triton_problem(self.device) is None else "torch"
        self._forward = self.module.__dict__["forward"] = Forward(self)
        self._fresh = self._forward.former is None and (type(self.module) is nn.Linear or is_conv1d(self.module))

    def remove(self) -> None:
        """Leave the module as it was."""
        self._forward.remove()

    @property
    def nbytes(self) -> int:
        wide = () if self._wide is None else self._wide[1][:2]
        return sum(t.nbytes for t in (*(self.stacks or ()), *wide) if isinstance(t, Tensor))

    def grown(self, slots: int, packed: Packed) -> Stacks:
        """Return stacks that have room for it: the present ones, or larger copies."""
        rank, wide = packed.lora_A.shape[0], None if packed.g is None else packed.g.dtype
        old = self.stacks
        if old is None:
            nothing = torch.zeros(0, 0, 0, dtype=self.dtype, device=self.device)
            old = Stacks(nothing, nothing, None, None, (0,) * slots, frozenset())
        a, b, g, bias = old[:4]
        if rank > a.shape[1]:
            a, b = (
                torch.zeros(slots, rank, features, dtype=self.dtype, device=self.device)
                for features in (self.in_features, self.out_features)
            )
            b = b.mT
            if old.lora_A.numel():
                a[:, : old.lora_A.shape[1]] = old.lora_A
                b[:, :, : old.lora_B.shape[2]] = old.lora_B
        if g is None and packed.g is not None:
            g = torch.ones(slots, self.out_features, dtype=wide, device=self.device)
        if bias is None and packed.bias is not None:
            bias = torch.zeros(slots, self.out_features, dtype=wide, device=self.device)
        return Stacks(a, b, g, bias, old.ranks, old.scaled)

    def write(self, slot: int, packed: Packed | None) -> None:
        """Put an adapter's part into a slot that no forward reads, or none."""
        if self.stacks is None:
            return
        a, b, g, bias, ranks, scaled = self.stacks
        rank = 0 if packed is None else packed.lora_A.shape[0]
        a[slot, rank:].zero_()
        b[slot, :, rank:].zero_()
        if packed is not None:
            a[slot, :rank].copy_(packed.lora_A)
            b.mT[slot, :rank].copy_(packed.lora_B)
        if g is not None:
            g[slot] = 1.0 if packed is None or packed.g is None else packed.g
        if bias is not None:
            bias[slot] = 0.0 if packed is None or packed.bias is None else packed.bias
        is_scaled = packed is not None and packed.g is not None
        self.stacks = self.stacks._replace(
            ranks=(*ranks[:slot], rank, *ranks[slot + 1 :]),
            scaled=scaled | {slot} if is_scaled else scaled - {slot},
        )

    def read(self, slot: int) -> Packed | None:
        """Copy a slot's content to host memory."""
        if self.stacks is None or not (rank := self.stacks.ranks[slot]):
            return None
        a, b, g, bias, _, scaled = self.stacks
        has_g = g is not None and slot in scaled
        part = Packed(
            a[slot, :rank], b.mT[slot, :rank], g[slot] if g is not None and has_g else None,
            bias[slot] if bias is not None and has_g else None,
        )  # fmt: skip
        return part.to(torch.device("cpu"))

    def run(self, batch: Batch, x: Tensor, base: Tensor) -> Tensor:
        """Return the layer's output in the running batch, from its input and the base layer's output."""
        batch.met = True
        stacks, dtype = self.stacks, self.dtype
        if stacks is None:
            return base
        route = batch.route(self.name, x.shape[:-1], x.device)
        keep = not self._fresh
        if x.dtype == dtype == base.dtype:
            return self._added(route, stacks, x, base, keep)
        if base.dtype.itemsize > dtype.itemsize:  # rows of the base model stay as they are
            dtype = base.dtype
            stacks = self._widened(stacks, dtype)
        with no_autocast(x.device):
            return self._added(route, stacks, x.to(dtype), base.to(dtype), keep).to(base.dtype)

    def _widened(self, stacks: Stacks, dtype: torch.dtype) -> Stacks:
        """The stacks with their factors in `dtype`, the same tensors in every forward: a route keeps views of them."""
        kept = self._wide
        if kept is None or kept[0] is not stacks or kept[1].lora_A.dtype != dtype:
            wide = stacks._replace(lora_A=stacks.lora_A.to(dtype), lora_B=stacks.lora_B.to(dtype))
            kept = self._wide = stacks, wide
        return kept[1]

    def _added(self, route: Route, stacks: Stacks, x: Tensor, base: Tensor, keep: bool) -> Tensor:
        """The output, all in the factors' dtype."""
        lora_A, lora_B, g, bias, ranks, scaled = stacks
        if not route.width(ranks):
            return base
        if g is not None and scaled.isdisjoint(route.slots):
            g = None
        h = slots_shrink(x.reshape(-1, self.in_features), lora_A, route, ranks, self.backend)
        rows = base.reshape(-1, self.out_features)
        return slots_compose(rows, h, lora_B, g, bias, route, ranks, keep, self.backend).view(base.shape)


class Forward:
    """The forward of a layer with slots, in the layer's own dictionary: whoever compiled the layer compiles it anew.

    In a copy of the model, also a pickled one, it is the layer's former forward.
    """

    def __init__(self, layer: LayerSlots) -> None:
        self.layer: LayerSlots | None = layer
        self.module = layer.module
        self.former = self.module.__dict__.get("forward")
        """What somebody had put into the layer's dictionary before; None for the forward of its class."""

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output, with the adapters of the running batch."""
        module = self.module
        former = functools.partial(type(module).forward, module) if self.former is None else self.former
        base: Tensor = former(*args, **kwargs)
        if self.layer is None or (batch := running(self.layer.bank)) is None:
            return base
        return self.layer.run(batch, args[0] if args else next(iter(kwargs.values())), base)

    def remove(self) -> None:
        """Leave the layer as it was; where somebody has wrapped this since, do nothing but call the former one."""
        self.layer = None
        if self.module.__dict__.get("forward") is self:
            del self.module.__dict__["forward"]
            if self.former is not None:
                self.module.__dict__["forward"] = self.former

    def __getstate__(self) -> Any:
        return {**vars(self), "layer": None}
