"""Options that several commands have, and numbers among them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

from dora_kernels.adapters import FORMATS

FROM = f"Format of the adapter: auto, {', '.join(FORMATS)}."
AXIS = "Dimension the magnitudes run along: auto, out or in."
SCALING = "Scaling to use instead of the one in the adapter's files."
PREFIX = "Read only layers with this prefix, e.g. lora_te1 or text_encoder."

SEEDS = 0, 2**62
"""The smallest and the largest ``--seed``."""

Number = TypeVar("Number", int, float)


def number(
    option: str, text: str, kind: Callable[[str], Number], least: float = -math.inf, most: float = math.inf
) -> Number:
    """Return the value of an option that is a number.

    Commands take numbers as strings and read them here: what typer says of a bad one differs from version to version,
    and does not show it.

    Args:
        kind: int or float.

    Raises:
        ValueError: it is no such number, not finite, or not within the limits.
    """
    try:
        value = kind(text)
        fits = least <= value <= most and -math.inf < value < math.inf
    except ValueError:
        fits = False
    if not fits:
        limits = f" from {least} to {most}" if most < math.inf else f" of at least {least}" if least > -math.inf else ""
        expected = f"{'a whole' if kind is int else 'a finite'} number{limits}"
        raise ValueError(f"{option}: expected {expected}, got {text!r}")
    return value


def read_options(source_format: str, axis: str, scaling: str, prefix: str) -> dict[str, Any]:
    """Return `read_adapter`'s arguments for ``--from``, ``--axis``, ``--scaling`` and ``--prefix``; each may be "".

    Raises:
        ValueError: the scaling is not a finite number.
    """
    factor = number("--scaling", scaling, float) if scaling else None
    return {"format": source_format, "magnitude_axis": axis, "scaling": factor, "prefix": prefix or None}
