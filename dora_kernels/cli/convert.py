"""`dora-kernels convert`: an adapter file in another format."""

# Annotations are not postponed here: typer reads those of the commands, which are made once it is known to be there.

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from dora_kernels.adapters import FORMATS, read_adapter, save_adapter
from dora_kernels.checkpoints import Checkpoint, read_for
from dora_kernels.cli.options import AXIS, FROM, SCALING, read_options
from dora_kernels.cli.output import console, errors, progress, say, say_each

if TYPE_CHECKING:
    import typer


def add(app: "typer.Typer") -> None:
    """Add the command."""
    import typer

    @app.command("convert")
    def convert_command(
        source: Annotated[Path, typer.Argument(metavar="IN", help="The adapter: a safetensors file or its folder.")],
        target: Annotated[Path, typer.Argument(metavar="OUT", help="The new folder or file.")],
        to: Annotated[str, typer.Option("--to", metavar="FORMAT", help=f"{', '.join(FORMATS)}.")],
        source_format: Annotated[str, typer.Option("--from", metavar="FORMAT", help=FROM)] = "auto",
        base: Annotated[
            str,
            typer.Option(metavar="MODEL_DIR", show_default=False, help="For its layers' names and sizes."),
        ] = "",
        axis: Annotated[str, typer.Option(metavar="NAME", help=AXIS)] = "auto",
        scaling: Annotated[str, typer.Option(metavar="X", show_default=False, help=SCALING)] = "",
        force: Annotated[bool, typer.Option("--force", help="Overwrite files of OUT.")] = False,
    ) -> None:
        """Write an adapter in another format: the same function, to float32 accuracy.

        Prints what had to be decided or folded. Exit status 2 if the format cannot express the adapter.
        """
        with errors(), progress() as advance:
            options = read_options(source_format, axis, scaling)
            if base:
                adapter, _ = read_for(Checkpoint(base), source, **options)
            else:
                adapter = read_adapter(source, **options)
            advance(f"{source} is read", 2)
            folded = save_adapter(adapter, target, format=to, force=force)
            advance(f"{target} is written", 2)
        output = console()
        say(output, f"{source}: {adapter.format}, {len(adapter.layers)} layers")
        say_each(output, "note", [*adapter.notes, *folded])
        say(output, f"{target}: {to}")
