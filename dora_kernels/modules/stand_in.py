"""An adapted weight in a module's own forward: what stands in the parameter's place for the length of one call.

The forward of a mixture of experts reads its stack of weights in many ways: expert by expert, gathered by token, or
whole in a grouped product. The `StandIn` answers these products with those of the adapted experts, so the module's own
code runs, with its gates, clamps and biases. In all other operations the adapted weights are formed.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dora_kernels.core.precision import no_autocast
from dora_kernels.engine.dispatch import UnsupportedError, warn_once
from dora_kernels.engine.experts import Experts

_MISSING = object()

Index = int | Tensor | None
"""Which experts a stand-in is of: one, one for each row, or all."""


class StandIn:
    """An adapted parameter of a module: ``[E, N, K]`` or ``[E, K, N]``, or ``[N, K]`` of a single matrix.

    Args:
        experts: called once, when the parameter is first read.
        name: of the layer and parameter, for messages.
        rows_first: True if the parameter's rows are the outputs, ``[E, N, K]``.
        single: True if the parameter is one matrix ``[N, K]``.
    """

    def __init__(
        self, experts: Callable[[], Experts], name: str, rows_first: bool = True, single: bool = False
    ) -> None:
        self._make, self._name = experts, name
        self._made: Experts | None = None
        self._whole = self
        self._index: Index = 0 if single else None
        self._rows_first = rows_first
        self._met = False
        self._grad = torch.is_grad_enabled()

    @property
    def met(self) -> bool:
        """True if the call has read the parameter."""
        return self._whole._met

    def check_met(self, x: Any) -> None:
        """Warn once if a call with tokens has not read the parameter: its adapter had no part in the result."""
        if not self.met and isinstance(x, Tensor) and x.numel():
            warn_once(
                f"{self._name}: a call of its module has not read this parameter, so the adapter had no part in it; "
                "that is right only if no token was routed to these experts"
            )

    def made(self) -> Experts:
        """The experts, made now if nobody has asked for them. This does not count as reading the parameter."""
        whole = self._whole
        if whole._made is None:
            with torch.set_grad_enabled(whole._grad):  # the first to ask may want a shape, under no_grad
                whole._made = whole._make()
        return whole._made

    @property
    def _experts(self) -> Experts:
        self._whole._met = True
        return self.made()

    def _view(self, index: Index, rows_first: bool) -> StandIn:
        view = object.__new__(StandIn)
        view.__dict__.update(self.__dict__)
        view._index, view._rows_first = index, rows_first
        return view

    # What a forward asks of its parameter.

    @property
    def shape(self) -> torch.Size:
        e, n, k = self._experts.weight.shape
        matrix = (n, k) if self._rows_first else (k, n)
        if self._index is None:
            return torch.Size((e, *matrix))
        return torch.Size(matrix if isinstance(self._index, int) else (len(self._index), *matrix))

    @property
    def dtype(self) -> torch.dtype:
        return self._experts.weight.dtype

    @property
    def device(self) -> torch.device:
        return self._experts.weight.device

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def dim(self) -> int:
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def element_size(self) -> int:
        return self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: Any) -> Any:
        if self._index is None:
            if isinstance(index, Tensor) and index.dtype in (torch.int64, torch.int32) and index.dim() < 2:
                return self._view(int(index) if index.dim() == 0 else index, self._rows_first)
            if isinstance(index, int) and not isinstance(index, bool):
                count = len(self)
                if not -count <= index < count:
                    raise IndexError(f"{self._name}: index {index} is out of range for {count} experts")
                return self._view(index % count, self._rows_first)
        return self.formed()[index]

    def transpose(self, dim0: int, dim1: int) -> Any:
        last = {self.ndim - 2, self.ndim - 1}
        if {dim0 % self.ndim, dim1 % self.ndim} == last:
            return self._view(self._index, not self._rows_first)
        return self.formed().transpose(dim0, dim1)

    swapaxes = transpose

    @property
    def mT(self) -> Any:
        return self.transpose(-2, -1)

    @property
    def T(self) -> Any:
        return self.transpose(0, 1) if self.ndim == 2 else self.formed().T

    def t(self) -> Any:
        return self.transpose(0, 1) if self.ndim == 2 else self.formed().t()

    def to(self, *args: Any, **kwargs: Any) -> StandIn:
        """Itself: products are computed in the input's dtype, where the weights are."""
        return self

    contiguous = to

    def __matmul__(self, other: Any) -> Any:
        return self.__torch_function__(torch.matmul, (), (self, other))

    def __rmatmul__(self, other: Any) -> Any:
        return self.__torch_function__(torch.matmul, (), (other, self))

    def __getattr__(self, name: str) -> Any:
        # No address: a kernel would silently read the base weight there.
        if name.startswith("__") or name in ("data_ptr", "data", "untyped_storage", "storage"):
            who = self.__dict__.get("_name")
            raise AttributeError(f"{who}: inside its layer's call the adapted weight has no {name}")
        return getattr(self.formed(), name)

    def formed(self) -> Tensor:
        """The adapted weights as a tensor: of all experts, which takes the memory of the stack, or of those indexed."""
        experts = self._experts
        if isinstance(self._index, int):
            weight = experts.formed_one(self._index)
        else:
            warn_once(
                f"{self._name}: the layer's forward uses its weights in a way that needs them whole, so the adapted "
                "weights of all experts are formed"
            )
            weight = experts.formed() if self._index is None else experts.formed()[self._index]
        return weight if self._rows_first else weight.transpose(-2, -1)

    def _of_outputs(self, rows_first: bool) -> Experts:
        """The experts for a product that takes ``[N, K]`` (`rows_first`) or ``[K, N]``."""
        if self._rows_first == rows_first:
            return self._experts
        if any(each.g is not None for each in self._experts.adapters):
            read, made = ("out, in", "in, out") if rows_first else ("in, out", "out, in")
            raise UnsupportedError(
                f"{self._name}: the layer's forward reads this weight as [experts, {read}], and the adapter's "
                f"magnitudes were made for [experts, {made}]; set is_transposed={not rows_first} on the module that "
                "holds it, and make the adapter again"
            )
        return self._experts.turned()

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # transformers' own op, found by its name, stands for the grouped product where PyTorch cannot compile it.
        fallback = getattr(function, "__name__", "") == "grouped_mm_fallback"
        answer = _grouped_mm if fallback else _PRODUCTS.get(function)
        if answer is not None:
            result = answer(*args, **(kwargs or {}))
            if result is not None:
                return result
        named = {name: _formed(each) for name, each in (kwargs or {}).items()}
        return function(*map(_formed, args), **named)


def _formed(value: Any) -> Any:
    if isinstance(value, StandIn):
        return value.formed()
    return type(value)(_formed(each) for each in value) if type(value) in (list, tuple) else value


# The products: each returns None if the weights have to be formed.


def _linear(input: Any, weight: Any, bias: Tensor | None = None) -> Tensor | None:
    if not isinstance(input, Tensor) or not isinstance(weight, StandIn) or not isinstance(weight._index, int):
        return None
    y = weight._of_outputs(True).linear(input, weight._index)
    return y if bias is None else y + bias.to(y.dtype)


def _matmul(input: Any, other: Any) -> Tensor | None:
    if isinstance(other, StandIn):
        return _right(input, other, False) if isinstance(input, Tensor) else None
    return _left(input, other)


def _left(weight: StandIn, x: Tensor) -> Tensor | None:
    """``weight @ x`` is the transpose of ``xᵀ @ weightᵀ``."""
    if x.dim() < 2 or (weight.ndim == 3) != (x.dim() == 3):
        return None
    y = _right(x.transpose(-2, -1), weight, True)
    return None if y is None else y.transpose(-2, -1)


def _right(x: Tensor, weight: StandIn, rows_first: bool) -> Tensor | None:
    """``x`` through the experts that `weight` is of."""
    index = weight._index
    if isinstance(index, int):
        return weight._of_outputs(rows_first).linear(x, index)
    if x.dim() != 3 or len(x) != len(weight):
        return None
    experts, (count, rows, _) = weight._of_outputs(rows_first), x.shape
    flat = x.reshape(count * rows, x.shape[2])
    if index is None:
        y = experts.grouped(flat, range(rows, count * rows + 1, rows) if rows else [0] * count)
    else:
        y = experts.selected(flat, index.repeat_interleave(rows) if rows != 1 else index)
    return y.view(count, rows, y.shape[1])


def _mm(input: Any, mat2: Any) -> Tensor | None:
    """`_matmul`, by the argument names of `torch.mm` and `torch.bmm`."""
    return _matmul(input, mat2)


def _grouped_mm(input: Any, mat2: Any, offs: Tensor | None = None, **options: Any) -> Tensor | None:
    if not isinstance(mat2, StandIn) or not isinstance(input, Tensor) or offs is None or mat2._index is not None:
        return None
    if any(value is not None for value in options.values()) or input.dim() != 2:
        return None
    with no_autocast(input.device):  # autocast leaves grouped products alone
        return mat2._of_outputs(False).grouped(input, offs)


_PRODUCTS: dict[Any, Callable[..., Tensor | None]] = {
    F.linear: _linear,
    torch.matmul: _matmul,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    torch.mm: _mm,
    Tensor.mm: _mm,
    torch.bmm: _mm,
    Tensor.bmm: _mm,
}
for _name in ("grouped_mm", "_grouped_mm"):
    for _module in (F, torch):
        if hasattr(_module, _name):
            _PRODUCTS[getattr(_module, _name)] = _grouped_mm


_TRANSPOSED = frozenset({"Llama4TextExperts"})
"""Classes whose stacks are ``[E, in, out]`` and that do not say so by `is_transposed`."""

_ALTERNATING = frozenset({"GptOssExperts"})


def is_transposed(module: nn.Module) -> bool:
    """True if the module's stacks are ``[E, in, out]``: what it says itself, or for its class is known."""
    return bool(getattr(module, "is_transposed", False)) or hidden_transposed(module)


def hidden_transposed(module: nn.Module) -> bool:
    """True if the module's stacks are ``[E, in, out]`` and it does not say so."""
    return type(module).__name__ in _TRANSPOSED and not getattr(module, "is_transposed", False)


def alternates(module: nn.Module) -> bool:
    """True if the outputs of gate and up take turns in the module's ``gate_up_proj``, instead of all of gate first."""
    return type(module).__name__ in _ALTERNATING


_turns: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()
"""A lock for each module: threads that call it take turns, since each has a stand-in of its own in its place."""


@contextlib.contextmanager
def standing_in(module: nn.Module, name: str, stand_in: StandIn) -> Iterator[None]:
    """Let `stand_in` be ``module.name`` for the length of a call. A module's own attributes come before parameters."""
    turn = contextlib.nullcontext() if torch.compiler.is_compiling() else _turns.setdefault(module, threading.RLock())
    with turn:
        own: Any = module.__dict__
        value: Any = stand_in
        parametrizations = module._modules.get("parametrizations")
        if parametrizations is not None and name in parametrizations._modules:  # a property of the class comes first
            own, value = parametrizations._modules, _Parametrized(stand_in, parametrizations._modules[name])
        before = own.get(name, _MISSING)
        own[name] = value
        try:
            yield
        finally:
            if before is _MISSING:
                del own[name]
            else:
                own[name] = before


class _Parametrized(nn.Module):
    """In the place of a parameter's parametrizations, which it still shows."""

    def __init__(self, stand_in: StandIn, replaced: Any) -> None:
        super().__init__()
        self.__dict__.update(stand_in=stand_in, replaced=replaced)

    def forward(self) -> Any:
        return self.__dict__["stand_in"]

    @property
    def original(self) -> Tensor:
        """The packed parameter."""
        original: Tensor = self.__dict__["replaced"].original
        return original

    def __getitem__(self, index: int) -> Any:
        return self.__dict__["replaced"][index]
