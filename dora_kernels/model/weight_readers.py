"""Find modules that read the weight of a layer inside them instead of calling the layer. Its adapter would not run.

Mamba's fused kernels read the weights of their projections, `nn.MultiheadAttention` that of its output projection, and
RWKV divides some weights in evaluation. The layers that a class reads are found in its source: every
``self.<layer>.weight`` in its ``forward`` and in the methods that this calls. Classes without source (built-in, or
compiled ahead of time) count as reading nothing.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
import types
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from torch import nn

# Attributes of a weight that can be read without computing with it.
_HARMLESS = {"dtype", "device", "shape", "size", "dim", "ndim", "numel", "is_meta", "is_cuda", "requires_grad"}
_ASKING = {"isinstance", "hasattr", "type"}


class WeightReaders:
    """The weights that modules read, determined once per module."""

    def __init__(self) -> None:
        self._found: dict[nn.Module, list[_Use]] = {}

    def of(self, parents: Iterable[nn.Module], name: str) -> nn.Module | None:
        """Return the module that reads a layer's weight itself in at least one of its code paths, or None.

        Args:
            parents: the modules around the layer, innermost first.
            name: the layer's name in the outermost module.
        """
        return next((parent for parent, use in self._uses(parents, name) if use.reads), None)

    def never_calling(self, parents: Iterable[nn.Module], name: str) -> nn.Module | None:
        """Return the module that reads a layer's weight if no module around the layer calls it, or None."""
        uses = list(self._uses(parents, name))
        return uses[0][0] if uses and all(use.reads for _, use in uses) else None

    def _uses(self, parents: Iterable[nn.Module], name: str) -> Iterator[tuple[nn.Module, _Use]]:
        parts = name.split(".")
        for depth, parent in enumerate(parents, 1):
            if parent not in self._found:
                self._found[parent] = list(_uses_in(parent))
            own = parts[-depth:]
            for use in self._found[parent]:
                if own == use.path if use.from_self else own[-len(use.path) :] == use.path:
                    yield parent, use


class _Use(NamedTuple):
    """A layer that a module's code names."""

    path: list[str]
    from_self: bool
    """True if the path starts at the module itself."""
    reads: bool
    """True if the code reads the layer's weight, False if it names the layer in any other way, to call it say."""


def _uses_in(module: nn.Module) -> Iterator[_Use]:
    seen: set[str] = set()
    waiting = ["forward"]
    while waiting:
        method = waiting.pop()
        if method in seen:
            continue
        seen.add(method)
        for function in _functions(module, method):
            tree = _tree(function)
            if tree is None:
                continue
            for path, root in _found(tree, module):
                if path[-1:] != ["weight"]:
                    waiting += [path[0]] if root == "self" else []
                    yield _Use(path, root == "self", False)
                elif len(path) > 1:
                    yield _Use(path[:-1], root == "self", True)


def _functions(module: nn.Module, method: str) -> Iterator[types.FunctionType]:
    """Yield a method's functions: the module's own, then its classes' up to the first that does not call ``super``."""
    own = vars(module).get(method)
    held = [own.__func__ if isinstance(own, types.MethodType) else own]
    held += [vars(cls).get(method) for cls in type(module).__mro__ if cls not in (nn.Module, object)]
    for one in held:
        function = inspect.unwrap(one) if callable(one) else None
        if isinstance(function, types.FunctionType):
            yield function
            if one is not held[0] and "super" not in function.__code__.co_names:
                return


@functools.lru_cache(maxsize=4096)
def _tree(function: types.FunctionType) -> ast.AST | None:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return None


def _found(node: ast.AST, module: nn.Module) -> Iterator[tuple[list[str], str]]:
    """Yield chains of attributes that are read, without their first name, and that first name."""
    if isinstance(node, ast.If) and (known := _decided(node.test, module)) is not None:
        for statement in node.body if known else node.orelse:
            yield from _found(statement, module)
        return
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _ASKING:
        return
    if isinstance(node, ast.Attribute):
        path, root = [node.attr], node.value
        while isinstance(root, ast.Attribute):
            path.insert(0, root.attr)
            root = root.value
        if isinstance(root, ast.Name) and isinstance(node.ctx, ast.Load):
            if "weight" in path[:-1] and path[path.index("weight") + 1] not in _HARMLESS:
                path = path[: path.index("weight") + 1]
            yield path, root.id
            return
    for part in ast.iter_child_nodes(node):
        yield from _found(part, module)


def _decided(test: ast.expr, module: Any) -> bool | None:
    """The value of a condition that depends only on the module's settings (not its mode); None for any other."""
    for part in ast.walk(test):
        if isinstance(part, ast.Call | ast.NamedExpr | ast.Await | ast.Subscript):
            return None
        if isinstance(part, ast.Name) and part.id != "self":
            return None
        if isinstance(part, ast.Attribute) and part.attr == "training":
            return None
    try:
        value = eval(compile(ast.Expression(test), "condition", "eval"), {"__builtins__": {}}, {"self": module})
    except Exception:
        return None
    return value if isinstance(value, bool) else None
