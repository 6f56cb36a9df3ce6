"""Command line: `python -m bench.demo`."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from bench import machine
from bench.demo import LEAST_STEPS
from bench.providers import Missing

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def demo(
    model: Annotated[str | None, typer.Option(help="Causal model id or folder [default: SmolLM2-135M]")] = None,
    data: Annotated[
        Path | None, typer.Option(help="Text file to train on [default: Python's language reference]")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps at each length, at least 20 [default: 24]")] = None,
    rank: Annotated[int, typer.Option(help="Rank of the adapters")] = 16,
    lr: Annotated[float, typer.Option(help="Learning rate of AdamW")] = 1e-3,
    out: Annotated[Path, typer.Option(help="Folder for everything written")] = Path("demo-output"),
    quick: Annotated[bool, typer.Option(help="128 tokens only, fewer steps and samples")] = False,
) -> int:
    """Fine-tune one model three ways side by side and compare speed, memory and numbers."""
    if rank < 1:
        raise Missing(f"--rank must be at least 1, not {rank}")
    if not (math.isfinite(lr) and lr > 0):
        raise Missing(f"--lr must be a positive number, not {lr}")
    if steps is not None and steps < LEAST_STEPS:
        raise Missing(f"--steps must be at least {LEAST_STEPS}, not {steps}")
    if data is not None and not data.is_file():
        raise Missing(f"--data: there is no file {data}")
    if model is not None and not Path(model).is_dir() and (not model.strip() or model.startswith((".", "/", "~"))):
        raise Missing(f"--model: there is no folder {model!r}")
    if out.exists() and not out.is_dir():
        raise Missing(f"--out: {out} is a file, not a folder")
    _prepare_environment(offline=model is None or Path(model).is_dir())
    # Not at the top: torch must find the environment above when it is imported.
    from bench.demo.run import Demo

    return Demo(model, data, steps or (LEAST_STEPS if quick else 24), rank, lr, out, quick).run()


def _prepare_environment(offline: bool) -> None:
    """Set what torch and the Hugging Face libraries read when they are imported."""
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(min(2, os.cpu_count() or 1))
    machine.wait_passively()
    machine.quiet_libraries()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["TQDM_DISABLE"] = "1"
    os.environ["TRANSFORMERS_VERBOSITY"] = os.environ["HF_HUB_VERBOSITY"] = "error"
    if offline:
        os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"


def main() -> int:
    """Run the command line; 0 all checks passed, 1 a check failed, 2 bad input."""
    try:
        return int(app(standalone_mode=False) or 0)
    except Missing as error:
        message = str(error)
    except Exception as error:
        # Usage errors come from the library typer carries; its name differs between releases.
        if not hasattr(error, "format_message"):
            raise
        message = error.format_message()
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
