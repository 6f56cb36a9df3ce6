"""`dora-kernels merge`: merge an adapter into a model's files."""

# Annotations are evaluated at once: typer reads them. The commands are made only after typer is known to be installed.

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from dora_kernels.checkpoints.checkpoint import Checkpoint
from dora_kernels.checkpoints.merge import merge_checkpoint
from dora_kernels.cli.options import AXIS, FROM, PREFIX, SCALING, SEEDS, number, read_options
from dora_kernels.cli.output import console, errors, progress, say, say_each

if TYPE_CHECKING:
    import typer


def add(app: "typer.Typer") -> None:
    """Add the command."""
    import typer

    @app.command("merge")
    def merge_command(
        base: Annotated[Path, typer.Argument(metavar="BASE", help="Folder with the model's safetensors.")],
        adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="A file of any format, or its folder.")],
        out: Annotated[Path, typer.Argument(metavar="OUT", help="The new folder.")],
        rounding: Annotated[
            str,
            typer.Option(metavar="NAME", help="nearest, or stochastic, which keeps updates too small for 16 bits."),
        ] = "nearest",
        seed: Annotated[str, typer.Option(metavar="N", help="Seed of stochastic rounding.")] = "0",
        strength: Annotated[str, typer.Option(metavar="X", help="0 is the base model, 1 the adapter.")] = "1.0",
        source_format: Annotated[str, typer.Option("--from", metavar="FORMAT", help=FROM)] = "auto",
        axis: Annotated[str, typer.Option(metavar="NAME", help=AXIS)] = "auto",
        scaling: Annotated[str, typer.Option(metavar="X", show_default=False, help=SCALING)] = "",
        prefix: Annotated[str, typer.Option(metavar="NAME", show_default=False, help=PREFIX)] = "",
        adapter_only: Annotated[
            bool, typer.Option("--adapter-only", help="Leave out tensors trained beside the adapter (modules_to_save).")
        ] = False,
        force: Annotated[bool, typer.Option("--force", help="Replace OUT if it is a model's folder.")] = False,
    ) -> None:
        """Merge an adapter into a model, file by file, without holding the model in memory.

        OUT has BASE's files, including its configuration and tokenizer. It is moved into place when it is complete.
        """
        with errors():
            options = read_options(source_format, axis, scaling, prefix)
            options |= {"seed": number("--seed", seed, int, *SEEDS), "strength": number("--strength", strength, float)}
            checkpoint = Checkpoint(base)
            with progress() as advance:
                merged = merge_checkpoint(
                    checkpoint, adapter, out, rounding=rounding, force=force, adapter_only=adapter_only,
                    advance=advance, **options,
                )  # fmt: skip
        output = console()
        say_each(output, "note", merged.notes)
        say(output, f"{out}: {len(merged.layers)} layers merged from {merged.format}")
