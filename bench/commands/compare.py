"""Measure the working tree's package against another git revision's, and name what has become slower beyond noise.

    python -m bench compare HEAD~1
    python -m bench compare v0.1.0 --suite layer --hidden 2048 --rank 16 64

Both run this working tree's benchmarks, in a process each, taking turns. Exit status 1 if something has become slower,
takes more memory, is wrong or gone; 2 for bad input, such as a revision that these benchmarks cannot measure.
"""

from __future__ import annotations

import argparse
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from bench.commands import run as run_command
from bench.machine import REPOSITORY, git

SUITES = ("norm", "compose", "layer", "decode", "host", "memory")
PROVIDERS = ("ours", "ours_triton", "ours_torch")
PACKAGE = "dora_kernels"
LEAST = 8
"""Pairs, for their median to have an interval: `bench.compare.trimmed`."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m bench compare`."""
    parser.add_argument("revision", metavar="REF", help="a commit, branch or tag")
    run_command.add_shape_arguments(parser, SUITES, ("norm", "layer", "decode", "host"))
    parser.add_argument(
        "--rounds", type=run_command.count, default=15, metavar="N", help=f"pairs of samples (15; {LEAST} at least)"
    )


def run(given: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Measure both and show what changed."""
    if given.rounds < LEAST:
        parser.error(f"--rounds {given.rounds}: expected at least {LEAST}; fewer pairs cannot show a change")
    try:
        commit = git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{given.revision}^{{commit}}")
    except FileNotFoundError:
        parser.error("git is not installed")
    except subprocess.TimeoutExpired:
        parser.error("git gave no answer")
    except subprocess.CalledProcessError:
        parser.error(f"there is no revision {given.revision!r} in {REPOSITORY}")
    device = run_command.checked_device(given.device, parser)
    with tempfile.TemporaryDirectory() as folder:
        try:
            _extract(commit, Path(folder))
        except subprocess.CalledProcessError:
            parser.error(f"revision {given.revision!r} has no {PACKAGE}")
        options: dict[str, Any] = {
            "suites": list(given.suite), "device": device, "dtypes": run_command.dtypes(given, device),
            "hidden": given.hidden, "ranks": given.rank, "tokens": given.tokens,
            "providers": given.providers or list(PROVIDERS),
        }  # fmt: skip
        try:
            return _compare(Path(folder), given, commit, options)
        except RuntimeError as error:
            parser.error(f"{given.revision}: {error}")
        except ModuleNotFoundError as error:
            parser.error(f"{error.name} is not installed: pip install 'dora-kernels[bench]'")


def _compare(folder: Path, given: argparse.Namespace, commit: str, options: dict[str, Any]) -> int:
    from rich.console import Console
    from rich.progress import Progress

    from bench import compare, show

    screen = show.console()
    progress = Progress(console=Console(stderr=True), transient=True, auto_refresh=False)
    bar = progress.add_task(f"{given.revision} and the working tree", total=None)

    def advance(done: int, cases: int) -> None:
        progress.update(bar, completed=done, total=cases)
        progress.refresh()

    with compare.Worker(folder, options, old=True) as old, compare.Worker(REPOSITORY, options) as new, progress:
        found = compare.compare(old, new, given.rounds, advance)
    if not found.changes and not found.faults:
        for note in found.notes:
            print(f"note: {note}")
        raise RuntimeError(f"none of {', '.join(options['providers'])} could be measured in both")
    cells = []
    for change in found.changes:
        low, high = change.interval
        kind = {"faster": "ours", "": ""}.get(change.verdict, "wrong")
        cells.append((kind, [
            f"{change.case}: {change.part}", show.LABELS[change.provider].removeprefix("ours").strip(":, "),
            f"{change.ratio:.2f} ({low:.2f} – {high:.2f})", change.verdict or show.EMPTY,
        ]))  # fmt: skip
    title = f"the working tree over {given.revision} ({commit[:10]}): time, median of pairs (99 % interval)"
    screen.print(show.table(show.Sheet(title, ["case", "ours", "ratio", ""], cells)))
    for note in found.notes:
        screen.print(f"note: {note}", markup=False)
    for fault in found.faults:
        screen.print(f"REGRESSION {fault}", markup=False)
    worse = compare.regressions(found.changes)
    for change in worse:
        peaks = " -> ".join(show.quantity(peak, "B") for peak in change.peaks)
        screen.print(
            f"REGRESSION {change.case}: {change.part}, {show.LABELS[change.provider]}: {change.verdict}, "
            f"{change.ratio:.2f} times the time, peak {peaks}", markup=False,
        )  # fmt: skip
    if not worse and not found.faults:
        screen.print("no regression beyond noise")
    return 1 if worse or found.faults else 0


def _extract(commit: str, folder: Path) -> None:
    """The package as it was."""
    archive = folder / "package.tar"
    git("archive", f"--output={archive}", commit, PACKAGE)
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    archive.unlink()
