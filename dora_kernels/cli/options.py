"""Options shared by the commands that read an adapter."""

from __future__ import annotations

from typing import Any

from dora_kernels.adapters import FORMATS

FROM = f"Format of the adapter: auto, {', '.join(FORMATS)}."
AXIS = "Dimension the magnitudes run along: auto, out or in."
SCALING = "Scaling to use instead of the one in the adapter's files."
PREFIX = "Read only layers with this prefix, e.g. lora_te1 or text_encoder."


def read_options(source_format: str, axis: str, scaling: str, prefix: str) -> dict[str, Any]:
    """Return `read_adapter`'s arguments for ``--from``, ``--axis``, ``--scaling`` and ``--prefix``; each may be "".

    Raises:
        ValueError: the scaling is not a number.
    """
    # A string, because the oldest supported typer does not know `float | None`.
    try:
        number = float(scaling) if scaling else None
    except ValueError:
        raise ValueError(f"--scaling: expected a number, got {scaling!r}") from None
    return {"format": source_format, "magnitude_axis": axis, "scaling": number, "prefix": prefix or None}
