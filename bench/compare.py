"""Two revisions of the package measured side by side: a process for each, taking turns, sample by sample.

Both run the working tree's `bench`; only `dora_kernels` differs. A pair of neighbouring samples gives a quotient, and
the median of the pairs lies, with a probability of at least `CONFIDENCE`, within an interval that two of the pairs
bound, whatever their distribution. What lies beyond `MARGIN` with all of that interval is a change.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.machine import REPOSITORY, git

PACKAGE = "dora_kernels"
CONFIDENCE = 0.99
MARGIN = 1.05
"""Two processes with the same code differ by up to 1.04 on two cores, by where their memory lies."""
LEAST_PEAK = 1 << 16
"""Bytes: a smaller growth of the peak memory is not named."""


@dataclass
class Change:
    """One provider's work at one case and part, in both revisions."""

    case: str
    part: str
    provider: str
    before: list[float] = field(default_factory=list)
    after: list[float] = field(default_factory=list)
    """Seconds per call, one for each pair."""
    peaks: tuple[int, int] = (0, 0)

    @property
    def ratio(self) -> float:
        """Now over before: the median of the pairs."""
        return statistics.median(b / a for a, b in zip(self.before, self.after))

    @property
    def interval(self) -> tuple[float, float]:
        """Where that median lies with `CONFIDENCE`; all of the numbers where there are too few pairs to say."""
        ratios = sorted(b / a for a, b in zip(self.before, self.after))
        cut = trimmed(len(ratios))
        return (0.0, math.inf) if cut is None else (ratios[cut], ratios[-1 - cut])

    @property
    def verdict(self) -> str:
        """"slower", "faster", "more memory", or nothing."""
        low, high = self.interval
        if low > MARGIN:
            return "slower"
        before, after = self.peaks
        if after > before * MARGIN and after - before > LEAST_PEAK:
            return "more memory"
        return "faster" if high < 1.0 / MARGIN else ""


def trimmed(pairs: int) -> int | None:
    """How many of the sorted quotients lie outside the median's interval at each end; None for too few pairs.

    The k-th smallest of n exceeds the median with the probability that fewer than k of n fair coins fall on heads.
    """
    outside, cut = 0.0, None
    for k in range(pairs // 2):
        outside += math.comb(pairs, k) / 2.0**pairs
        if 2.0 * outside > 1.0 - CONFIDENCE:
            break
        cut = k
    return cut


class Worker:
    """A process that measures one revision's package when it is asked to."""

    def __init__(self, package: Path, options: dict[str, Any], old: bool = False) -> None:
        self.name, self.old = "the old revision" if old else "the working tree", old
        paths = [str(package), str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.worker"],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONSAFEPATH": "1"},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            self.cases: list[str] = self.ask(package=str(package), **options)
        except BaseException:
            self.__exit__()
            raise

    def ask(self, **question: Any) -> Any:
        """One question, one answer, both a line of JSON."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(f"{self.name}: its process ended")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"{self.name}: {answer['error']}")
        return answer["result"]

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()


@dataclass
class Comparison:
    """What was found."""

    changes: list[Change] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What the old revision has not, or got wrong."""
    faults: list[str] = field(default_factory=list)
    """What the working tree gets wrong, or has no more."""

    @property
    def regressions(self) -> list[Change]:
        """Changes for the worse."""
        return [change for change in self.changes if change.verdict in ("slower", "more memory")]


def extract(revision: str, folder: Path) -> str:
    """Write the package as it was in a revision into a folder; the commit.

    Raises:
        ValueError: there is no git, no such revision, or no package in it.
    """
    try:
        commit = git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
    except FileNotFoundError:
        raise ValueError("git is not installed") from None
    except subprocess.TimeoutExpired:
        raise ValueError("git gave no answer") from None
    except subprocess.CalledProcessError:
        raise ValueError(f"there is no revision {revision!r} in {REPOSITORY}") from None
    archive = folder / "package.tar"
    try:
        git("archive", f"--output={archive}", commit, PACKAGE)
    except subprocess.CalledProcessError:
        raise ValueError(f"revision {revision!r} has no {PACKAGE}") from None
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    archive.unlink()
    return commit


def compare_packages(folder: Path, options: dict[str, Any], rounds: int) -> Comparison:
    """The package in a folder beside the working tree's.

    Raises:
        RuntimeError: nothing could be measured in both.
    """
    from rich.console import Console
    from rich.progress import Progress

    progress = Progress(console=Console(stderr=True), transient=True, auto_refresh=False)
    bar = progress.add_task("the old revision and the working tree", total=None)

    def advance(done: int, cases: int) -> None:
        progress.update(bar, completed=done, total=cases)
        progress.refresh()

    with Worker(folder, options, old=True) as old, Worker(REPOSITORY, options) as new, progress:
        found = compare(old, new, rounds, advance)
    if not found.changes and not found.faults:
        notes = "".join(f"; {note}" for note in found.notes)
        raise RuntimeError(f"none of {', '.join(options['providers'])} could be measured in both{notes}")
    return found


def show(found: Comparison, before: str, screen: Any) -> None:
    """A table of the changes, what could not be compared, and the regressions."""
    from bench import show

    cells = []
    for change in found.changes:
        low, high = change.interval
        kind = {"faster": "ours", "": ""}.get(change.verdict, "wrong")
        cells.append((kind, [
            f"{change.case}: {change.part}", show.LABELS[change.provider].removeprefix("ours").strip(":, "),
            f"{change.ratio:.2f} ({low:.2f} – {high:.2f})", change.verdict or show.EMPTY,
        ]))  # fmt: skip
    title = f"the working tree over {before}: time, median of pairs (99 % interval)"
    screen.print(show.table(show.Sheet(title, ["case", "ours", "ratio", ""], cells)))
    lines = [f"note: {note}" for note in found.notes] + [f"REGRESSION {fault}" for fault in found.faults]
    for change in found.regressions:
        peaks = " -> ".join(show.quantity(peak, "B") for peak in change.peaks)
        lines.append(
            f"REGRESSION {change.case}: {change.part}, {show.LABELS[change.provider]}: {change.verdict}, "
            f"{change.ratio:.2f} times the time, peak {peaks}"
        )
    if not found.regressions and not found.faults:
        lines.append("no regression beyond noise")
    for line in lines:
        screen.print(line, markup=False)


def compare(old: Worker, new: Worker, rounds: int, advance: Callable[[int, int], None]) -> Comparison:
    """Measure every case in both, and say after each how many are done, of how many."""
    found = Comparison()
    for index, label in enumerate(new.cases):
        before, after = (_asked(worker, found, label, do="prepare", index=index) for worker in (old, new))
        if before is None or after is None:
            continue
        found.notes += [f"{label}: before: {reason}" for reason in before["failures"]]
        found.faults += [f"{label}: now: {reason}" for reason in after["failures"]]
        works = {tuple(work["key"]): work for work in after["works"]}
        others = {tuple(work["key"]): work for work in before["works"]}
        found.notes += [f"{label}: {' '.join(key)}: only now" for key in works.keys() - others.keys()]
        found.faults += [f"{label}: {' '.join(key)}: only before" for key in others.keys() - works.keys()]
        for key in [key for key in works if key in others]:
            part, provider = key
            peaks = others[key]["peak"], works[key]["peak"]
            change = Change(label, part, provider, peaks=peaks)
            passes = max(works[key]["passes"], others[key]["passes"])
            for turn in range(rounds):
                pair = [(old, change.before), (new, change.after)]
                for worker, samples in pair if turn % 2 else reversed(pair):
                    samples.append(_asked(worker, found, label, do="sample", key=list(key), passes=passes))
            if None not in change.before + change.after:
                found.changes.append(change)
        for worker, words, name in ((old, found.notes, "before"), (new, found.faults, "now")):
            words += [f"{label}: {name}: {reason}" for reason in _asked(worker, found, label, do="finish") or ()]
        advance(index + 1, len(new.cases))
    return found


def _asked(worker: Worker, found: Comparison, label: str, **question: Any) -> Any:
    """The answer, or None and a note of the error: the old revision's is nobody's fault."""
    try:
        return worker.ask(**question)
    except RuntimeError as error:
        words = found.notes if worker.old else found.faults
        if (line := f"{label}: {error}") not in words:
            words.append(line)
        return None
