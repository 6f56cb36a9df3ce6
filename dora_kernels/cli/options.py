"""Options shared by the commands that read an adapter."""

from __future__ import annotations

from typing import Any

from dora_kernels.adapters import FORMATS

FROM = f"The adapter's: auto, {', '.join(FORMATS)}."
AXIS = "Of the adapter's magnitudes: auto, out, in."
SCALING = "Instead of what the adapter's files say."
PREFIX = "Of the adapter's names: read the layers of one model, lora_te1 or text_encoder."


def read_options(source_format: str, axis: str, scaling: str, prefix: str) -> dict[str, Any]:
    """Return the arguments of `read_adapter` for ``--from``, ``--axis``, ``--scaling`` and ``--prefix``, which may be
    "".

    Raises:
        ValueError: the scaling is not a number.
    """
    # A string, because the oldest supported typer does not know `float | None`.
    try:
        number = float(scaling) if scaling else None
    except ValueError:
        raise ValueError(f"--scaling: expected a number, got {scaling!r}") from None
    return {"format": source_format, "magnitude_axis": axis, "scaling": number, "prefix": prefix or None}
