"""Tile sizes of the kernels that a table of `choices` puts in the place of the shipped ones.

The kernels ask functions of `kernels.config` for their tiles. `replaced` puts others in their place, in the modules
that ask, and lets these forget the launches they have prepared.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

ASKED = {
    "compose_config": ("compose", "_plan"),
    "scale_reduce_config": ("scale_reduce", "_plan"),
    "product_config": ("product", "_plan"),
    "one_pass_config": ("one_pass", "_plans"),
    "norm_config": ("norm", "_plan"),
}
"""By function: the kernel's module that asks it, and what remembers its answers there."""


def key_of(function: str, arguments: Sequence[Any]) -> str:
    """A question in a table, such as ``compose_config(False, 16, 1)``."""
    return f"{function}({', '.join(map(str, arguments))})"


def replace(tiles: Mapping[str, Sequence[int]], asked: Callable[[str, Any], None] | None = None) -> Callable[[], None]:
    """Answer these questions in this way, all others as before. Returns a function that undoes it.

    Args:
        tiles: the answers, by `key_of`.
        asked: called with every question and its answer.
    """
    undo = []
    for function, (name, plan) in ASKED.items():
        module: Any = importlib.import_module(f"..kernels.{name}", __package__)
        shipped = getattr(module, function)

        def answer(*arguments: Any, _function: str = function, _shipped: Callable[..., Any] = shipped) -> Any:
            key, config = key_of(_function, arguments), _shipped(*arguments)
            if key in tiles:
                config = type(config)(*tiles[key])
            if asked is not None:
                asked(key, config)
            return config

        setattr(module, function, answer)
        getattr(module, plan).cache_clear()
        undo.append((module, function, shipped, plan))

    def back() -> None:
        for module, function, shipped, plan in undo:
            setattr(module, function, shipped)
            getattr(module, plan).cache_clear()

    return back


@contextmanager
def replaced(
    tiles: Mapping[str, Sequence[int]], asked: Callable[[str, Any], None] | None = None
) -> Iterator[None]:
    """`replace`, undone at the end."""
    back = replace(tiles, asked)
    try:
        yield
    finally:
        back()
