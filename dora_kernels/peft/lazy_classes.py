"""Patched classes for PEFT classes that exist only when their library is installed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple


class Recipe(NamedTuple):
    """PEFT's class, the class that is mixed in before it, and a forward for both."""

    module: str
    stock: str
    mixin: Any
    forward: Callable[[Any], Callable[..., Any]]
    """Takes PEFT's class and returns the forward."""


class OnDemand:
    """A module's patched classes by name.

    Each is created on first access, also by pickle, which looks it up by name.
    """

    def __init__(self, module: str, recipes: dict[str, Recipe]) -> None:
        self._module = module
        self.recipes = recipes
        self._made: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        """Return the patched class."""
        if name not in self._made:
            recipe = self.recipes[name]
            stock = getattr(importlib.import_module(recipe.module), recipe.stock)
            self._made[name] = type(name, (recipe.mixin, stock), {
                "stock": stock, "forward": recipe.forward(stock), "__module__": self._module, "__qualname__": name,
                "__doc__": f"PEFT's {recipe.stock} whose DoRA adapters run on this package.",
            })  # fmt: skip
        return self._made[name]

    def attribute(self, name: str) -> Any:
        """The module's ``__getattr__``."""
        if name in self.recipes:
            return self[name]
        raise AttributeError(f"module {self._module!r} has no attribute {name!r}")

    def instead_of(self, kind: type) -> Any:
        """Return the patched class for one of PEFT's classes, or None if there is none."""
        for name, recipe in self.recipes.items():
            if (kind.__module__, kind.__name__) == (recipe.module, recipe.stock):
                return self[name]
        return None
