"""`dora-kernels tune`: measure this machine's choices for a model's shapes."""

# Annotations are evaluated at once: typer reads them. The commands are made only after typer is known to be installed.

import collections
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from dora_kernels.checkpoints.checkpoint import Checkpoint
from dora_kernels.cli.options import number
from dora_kernels.cli.output import console, errors, say
from dora_kernels.core.validation import DTYPES
from dora_kernels.tuning import tune
from dora_kernels.tuning.shapes import Shape

if TYPE_CHECKING:
    import typer

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}


def add(app: "typer.Typer") -> None:
    """Add the command."""
    import typer

    @app.command("tune")
    def tune_command(
        layers: Annotated[
            list[str], typer.Argument(metavar="LAYERS...", help="OUTxIN or OUTxINxRANK, or a folder of safetensors.")
        ],
        rank: Annotated[str, typer.Option(metavar="R", help="Where none is given.")] = "16",
        tokens: Annotated[str, typer.Option(metavar="N,N", show_default=False, help="Numbers of tokens.")] = "",
        device: Annotated[
            str, typer.Option(metavar="NAME", show_default=False, help="[default: a GPU, else cpu]")
        ] = "",
        dtype: Annotated[
            str, typer.Option(metavar="NAME", show_default=False, help=f"[default: the device's] {', '.join(_DTYPES)}")
        ] = "",
        seconds: Annotated[str, typer.Option(metavar="S", help="About how long it may take.")] = "120",
    ) -> None:
        """Measure which of the package's ways is fastest for a model's layers here, and keep the answers.

        The table goes into the user's cache folder (DORA_KERNELS_CACHE) and counts for this device, dtype and these
        versions. Every candidate's result is checked first. `dora-kernels doctor` shows the tables.
        """
        with errors():
            if dtype and dtype not in _DTYPES:
                raise ValueError(f"--dtype: expected {', '.join(_DTYPES)}, got {dtype!r}")
            default = number("--rank", rank, int, least=1)
            limit = number("--seconds", seconds, float, least=1)
            found = tune(
                [shape for one in layers for shape in _shapes(one, default)], tokens=_numbers(tokens),
                device=device or None, dtype=_DTYPES.get(dtype), seconds=limit,
            )  # fmt: skip
        for line in str(found).splitlines():
            say(console(), line)


def _shapes(given: str, rank: int) -> list[Shape]:
    """The shapes of one argument."""
    sizes = given.split("x")
    if len(sizes) in (2, 3) and all(_is_size(size) for size in sizes):
        numbers = [int(size) for size in sizes]
        return [(numbers[0], numbers[1], numbers[2] if len(numbers) == 3 else rank)]
    if not Path(given).is_dir():
        raise ValueError(f"LAYERS: expected OUTxIN or OUTxINxRANK, each at least 1, or a model's folder, got {given!r}")
    matrices: collections.Counter[tuple[int, int]] = collections.Counter()
    checkpoint = Checkpoint(Path(given))
    for name in checkpoint:
        shape = checkpoint[name].shape if name.endswith(".weight") else ()
        if len(shape) == 2:
            matrices[shape[0], shape[1]] += 1
    # Embeddings and heads are there once or twice.
    shapes = [(rows, columns, rank) for (rows, columns), count in matrices.items() if count > 2]
    if not shapes:
        raise ValueError(f"LAYERS: {given} has no matrix of a shape that several layers share")
    return shapes


def _is_size(text: str) -> bool:
    return text.isdecimal() and int(text) > 0


def _numbers(text: str) -> list[int] | None:
    parts = text.split(",")
    if text and not all(_is_size(part) for part in parts):
        raise ValueError(f"--tokens: expected whole numbers of at least 1 with commas between them, got {text!r}")
    return [int(part) for part in parts] if text else None
