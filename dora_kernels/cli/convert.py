"""`dora-kernels convert`: an adapter file in another format."""

# Annotations are evaluated at once: typer reads them. The commands are made only after typer is known to be installed.

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from dora_kernels.adapters import Adapter, read_adapter, save_adapter
from dora_kernels.adapters.formats import WRITTEN
from dora_kernels.checkpoints.checkpoint import Checkpoint, read_for
from dora_kernels.cli.options import AXIS, FROM, PREFIX, SCALING, read_options
from dora_kernels.cli.output import console, errors, progress, say, say_each

if TYPE_CHECKING:
    import typer


def add(app: "typer.Typer") -> None:
    """Add the command."""
    import typer

    several = functools.partial(typer.Option, default_factory=list, show_default=False)

    @app.command("convert")
    def convert_command(
        source: Annotated[Path, typer.Argument(metavar="IN", help="The adapter: a safetensors file or its folder.")],
        target: Annotated[Path, typer.Argument(metavar="OUT", help="The new folder or file.")],
        to: Annotated[str, typer.Option("--to", metavar="FORMAT", help=f"{', '.join(WRITTEN)}.")],
        join: Annotated[
            list[str],
            several(metavar="NAME=ADAPTER", help="Another model's, text_encoder=DIR, for the same file; repeatable."),
        ],
        source_format: Annotated[str, typer.Option("--from", metavar="FORMAT", help=FROM)] = "auto",
        base: Annotated[
            str,
            typer.Option(metavar="MODEL_DIR", show_default=False, help="Base model, for its layers' names and sizes."),
        ] = "",
        axis: Annotated[str, typer.Option(metavar="NAME", help=AXIS)] = "auto",
        scaling: Annotated[str, typer.Option(metavar="X", show_default=False, help=SCALING)] = "",
        prefix: Annotated[str, typer.Option(metavar="NAME", show_default=False, help=PREFIX)] = "",
        to_prefix: Annotated[
            str,
            typer.Option(metavar="NAME", show_default=False, help="Prefix of OUT's names (lycoris, kohya, diffusers)."),
        ] = "",
        component: Annotated[
            str,
            typer.Option(metavar="NAME", show_default=False, help="IN's model in a pipeline, e.g. unet; with --join."),
        ] = "",
        adapter_only: Annotated[
            bool, typer.Option("--adapter-only", help="Leave out tensors beside the adapter (modules_to_save).")
        ] = False,
        force: Annotated[bool, typer.Option("--force", help="Overwrite existing files.")] = False,
    ) -> None:
        """Write an adapter in another format: the same function, to float32 accuracy.

        With --component and --join, the adapters of several models of a pipeline go into one file (kohya, diffusers).
        Prints what was decided or folded. Exit status 2 if the format cannot express the adapter.
        """
        with errors(), progress() as advance:
            options = read_options(source_format, axis, scaling, prefix)
            if base:
                adapter, _ = read_for(Checkpoint(base), source, as_files=False, **options)
            else:
                adapter = read_adapter(source, **options)
            others = _joined(component, join)
            read = {component: adapter} | others
            for one in read.values() if adapter_only else ():
                one.beside.clear()
            advance(f"{source} is read", 2)
            whole = read if others else adapter
            with errors(format="--to", prefix="--to-prefix"):
                folded = save_adapter(whole, target, format=to, prefix=to_prefix or None, force=force)
            advance(f"{target} is written", 2)
        output = console()
        for one, place in zip(read.values(), (source, *(each.partition("=")[2] for each in join)), strict=True):
            say(output, f"{place}: {one.format}, {len(one.layers)} layers")
        say_each(output, "note", [*(note for one in read.values() for note in one.notes), *folded])
        say(output, f"{target}: {to}")


def _joined(component: str, join: list[str]) -> dict[str, Adapter]:
    """The adapters of ``--join`` by the names of their models. Raises ValueError if names are missing or repeated."""
    if bool(component) != bool(join):
        raise ValueError("--component (the name of IN's model) and --join NAME=ADAPTER: expected both or neither")
    names = [component, *(each.partition("=")[0] for each in join)]
    if len(set(names)) < len(names) or not all(each.partition("=")[2] for each in join):
        raise ValueError(f"--join: expected NAME=ADAPTER with a different name each, got {', '.join(join)}")
    return {name: read_adapter(each.partition("=")[2]) for name, each in zip(names[1:], join, strict=True)}
