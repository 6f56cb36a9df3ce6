"""What a call launches: kernels, grids and arguments, recorded in place of running them or, interpreted, beside it."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

NAMES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
    torch.bool: "i1",
}
_SUFFIX = "_kernel"


@dataclass(frozen=True)
class Argument:
    """How one argument reaches the compiler: a type, or a constant; `aligned` is divisibility by 16."""

    name: str
    type: str
    constant: Any = None
    aligned: bool = False


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel: what the compiler sees of it, its grid and sizes, and words for people."""

    kernel: str
    primitive: str
    dtypes: str
    case: str
    arguments: tuple[Argument, ...]
    options: tuple[tuple[str, int], ...]
    grid: tuple[int, ...] = field(compare=False)
    values: dict[str, Any] = field(compare=False)
    """Every argument that is no tensor; of a tensor the size of an element, 0 where it is absent."""

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def type(self, name: str) -> str:
        """As the compiler is told."""
        return next(one.type for one in self.arguments if one.name == name)

    @property
    def config(self) -> tuple[tuple[str, Any], ...]:
        """Tile sizes, derived flags and warps: what the choice of configuration decides."""
        flags = [(a.name, a.constant) for a in self.arguments if a.name.isupper() and a.type == "constexpr"]
        sizes = [flag for flag in flags if flag[0] not in ("M", "N", "K", "R", "F", "INTERPRETED")]
        return *sizes, *{"num_warps": 4, **dict(self.options)}.items()

    @property
    def signature(self) -> Hashable:
        """Equal for launches that compile to the same code."""
        return self.kernel, self.arguments, self.options


@dataclass(frozen=True)
class Made:
    """A launch as it was made, with its tensors."""

    kernel: str
    jitted: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensor arguments, `w_ptr` by the name of `w`."""
        found = {name: value for name, value in self.arguments.items() if isinstance(value, Tensor)}
        return {name.removesuffix("_ptr"): value for name, value in found.items()}

    def run(self) -> None:
        self.jitted[self.grid](**self.arguments, **self.options)


@functools.cache
def kernels() -> dict[str, Any]:
    """Every jitted kernel of the package, by its name less `_kernel`."""
    return {
        name.removesuffix(_SUFFIX): value
        for module in _modules()
        for name, value in vars(module).items()
        if name.endswith(_SUFFIX)
    }


@functools.cache
def _modules() -> list[ModuleType]:
    package = importlib.import_module("dora_kernels.kernels")
    names = [found.name for found in pkgutil.iter_modules(package.__path__)]
    return [importlib.import_module(f"{package.__name__}.{name}") for name in names]


class _Recorder:
    """Stands in for a jitted kernel: `kernel[grid](...)` hands the launch to `made`."""

    def __init__(self, name: str, kernel: Any, made: Callable[[Made], None]) -> None:
        self.name, self.kernel, self.made = name, kernel, made

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*positional: Any, **named: Any) -> None:
            names = list(self.kernel.arg_names)
            given = {**dict(zip(names, positional)), **named}
            arguments = {name: given.pop(name) for name in names}
            programs = tuple(grid(arguments) if callable(grid) else grid)
            self.made(Made(self.name, self.kernel, programs, arguments, given))

        return launch


@contextlib.contextmanager
def instead(made: Callable[[Made], None]) -> Iterator[None]:
    """Every launch of the package's kernels goes to `made`."""
    recorders = {name: _Recorder(name, kernel, made) for name, kernel in kernels().items()}
    before = [(module, name, value) for module in _modules() for name, value in vars(module).items()]
    before = [(module, name, value) for module, name, value in before if name.endswith(_SUFFIX)]
    try:
        for module, name, _ in before:
            setattr(module, name, recorders[name.removesuffix(_SUFFIX)])
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def described(made: Made, primitive: str, dtypes: str, case: str) -> Launch:
    """The launch without its tensors."""
    constants, plain = _annotated(made.kernel)
    arguments, values = [], {}
    for name, value in made.arguments.items():
        arguments.append(_argument(name, value, name in constants, name not in plain))
        present = value.element_size() if isinstance(value, Tensor) else 0
        values[name] = present if name.endswith("_ptr") else value
    options = tuple(made.options.items())
    return Launch(made.kernel, primitive, dtypes, case, tuple(arguments), options, made.grid, values)


@functools.cache
def _annotated(kernel: str) -> tuple[frozenset[str], frozenset[str]]:
    """The arguments that are constants, and those whose values the compiler must not look at."""
    jitted = kernels()[kernel]
    parameters = inspect.signature(jitted.fn).parameters.values()
    # An interpreted kernel has its options under another name.
    options = {**vars(jitted), **vars(jitted).get("kwargs", {})}
    constants = (one.name for one in parameters if "constexpr" in str(one.annotation))
    return frozenset(constants), frozenset(options.get("do_not_specialize") or ())


def _argument(name: str, value: Any, constexpr: bool, specialized: bool) -> Argument:
    """Triton's own rules: None and 1 become constants, 16-byte alignment of pointers and sizes is known."""
    if constexpr or value is None or (specialized and type(value) is int and value == 1):
        return Argument(name, "constexpr", value)
    if isinstance(value, Tensor):
        return Argument(name, f"*{NAMES[value.dtype]}", aligned=value.storage_offset() * value.itemsize % 16 == 0)
    if isinstance(value, float):
        return Argument(name, "fp32")
    return Argument(name, "i32" if abs(value) < 2**31 else "i64", aligned=specialized and value % 16 == 0)


@dataclass(frozen=True)
class Operation:
    """A PyTorch operation beside the kernels: the bytes of what it is given, by operand, and of what it makes."""

    name: str
    loaded: dict[str, int]
    stored: int
    flops: int
    touched: tuple[tuple[int, int], ...]
    """Elements and bytes of each tensor that is read or written."""


class Operations(TorchDispatchMode):
    """Records PyTorch operations that move data: no views, no empty tensors.

    A tensor that lies in an operand's memory has the operand's name, any other that of the operation.
    """

    def __init__(self, operands: dict[str, Tensor | None]) -> None:
        super().__init__()
        self.made: list[Operation] = []
        self.names = {_memory(one): name for name, one in operands.items() if one is not None}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = f"torch.{func.overloadpacket.__name__}"
        moves = func.namespace == "aten" and not func.is_view
        if moves and not name.startswith(("torch.empty", "torch.new_empty", "torch._unsafe_view")):
            loaded: dict[str, int] = {}
            for one in _tensors((args, kwargs)):
                owner = self.names.get(_memory(one), name)
                loaded[owner] = loaded.get(owner, 0) + size(one)
            counter = flop_registry.get(func.overloadpacket)
            flops = counter(*_tensors(args), out_val=result) if counter else 0
            touched = tuple((one.numel(), size(one)) for one in _tensors((args, kwargs, result)))
            self.made.append(Operation(name, loaded, sum(size(one) for one in _tensors(result)), flops, touched))
        return result


def size(tensor: Tensor) -> int:
    """In bytes."""
    return tensor.numel() * tensor.element_size()


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _tensors(tree: Any) -> tuple[Tensor, ...]:
    return tuple(leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
