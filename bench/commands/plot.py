"""Draw records: a step's time against tokens, rank and hidden size, kernels under the ceilings, memory, a model.

    python -m bench plot RECORD... --out FOLDER

Several records are drawn together, as one run's. What they have nothing for is left out; a figure is written whole or
not at all. docs/figures is drawn by `python -m bench report`.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from bench import record

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = ("svg", "png", "pdf")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m bench plot`."""
    parser.add_argument("records", type=Path, nargs="+", metavar="RECORD", help="of `python -m bench run`")
    parser.add_argument("--out", type=Path, default=Path("bench-output"), help="a folder (default: bench-output)")
    parser.add_argument("--format", choices=FORMATS, default="svg")


def run(given: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Draw them."""
    try:
        found = [record.read(path) for path in given.records]
    except record.RecordError as error:
        parser.error(str(error))
    try:
        from bench import plots
    except ModuleNotFoundError as error:
        parser.error(f"{error.name} is not installed: pip install 'dora-kernels[bench]'")
    try:
        given.out.mkdir(parents=True, exist_ok=True)
        drawn = plots.draw(plots.merged(found))
        written = write({given.out / f"{name}.{given.format}": figure for name, figure in drawn.items()})
    except OSError as error:
        parser.error(f"--out {given.out}: {error.strerror}")
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        parser.error(f"{', '.join(map(str, given.records))}: not what a run writes: {type(error).__name__}: {error}")
    for path in written:
        print(path)
    if not written:
        parser.error(f"{', '.join(map(str, given.records))}: nothing to draw")
    return 0


def write(figures: dict[Path, Figure]) -> list[Path]:
    """Figures by their path; none is there before all are drawn."""
    from bench import plots

    paths: dict[Path, Path] = {}
    try:
        for path, figure in figures.items():
            paths[path] = path.with_name(f".{path.name}.tmp-{os.getpid()}")
            plots.save(figure, paths[path], path.suffix.removeprefix("."))
        for path, temporary in paths.items():
            os.replace(temporary, path)
    finally:
        for temporary in paths.values():
            temporary.unlink(missing_ok=True)
    return list(paths)
