"""One run: the suites' stages in turn, the record that they fill, and what is shown meanwhile."""

from __future__ import annotations

import functools
import gc
import itertools
import math
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench import machine, record, suites, timing
from bench.problem import LayerShape, dtypes_of
from bench.providers import LABELS, REFERENCES, Case, Missing, Subject, library
from bench.record import rounded, significant
from bench.timing import Candidate
from dora_kernels.testing import beyond

_TRACE_LINES = 12


@dataclass(frozen=True)
class Options:
    """What was asked for; None where each suite has a default of its own."""

    suites: Sequence[str]
    device: str
    dtypes: Sequence[str]
    hidden: Sequence[int] | None = None
    ranks: Sequence[int] | None = None
    tokens: Sequence[int] | None = None
    providers: Sequence[str] | None = None
    block: Sequence[int] | None = None
    steps: int = 200
    seeds: Sequence[int] = (0, 1, 2)
    rounds: int = 21
    sample_ms: float = 4.0
    limit_s: float = 300.0
    folder: Path = Path("bench-output")
    out: Path | None = None


class Run:
    """A run of the options' suites."""

    def __init__(self, given: Options, console: Console | None = None) -> None:
        self.given = given
        self.device = torch.device(given.device)
        settings = {name: value for name, value in asdict(given).items() if name not in ("folder", "out")}
        self.record = record.new(self.device, settings)
        self.shared: dict[str, Any] = {}
        """What stages of one suite keep for each other; dropped between suites."""
        self.console = console or Console(stderr=True)
        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            console=self.console, transient=True,
            auto_refresh=False,  # nothing is drawn while something is timed
        )  # fmt: skip
        self._bar = self.progress.add_task("", total=None)
        self._detail = self.progress.add_task("", total=None, visible=False)
        self._start, self._others = time.perf_counter(), machine.Others()

    def all(self) -> None:
        """Every stage; a failed one leaves the others alone."""
        stages = deque([("ceilings", self.ceilings), *self.stages()])
        with self.progress:
            self.progress.update(self._bar, total=len(stages))
            suite = None
            try:
                while stages:  # a stage that is done lets go of its tensors
                    name, work = stages.popleft()
                    if suite != (suite := name.partition(":")[0]):
                        self.shared.clear()
                    self.stage(name, work)
                    self.progress.advance(self._bar)
            except KeyboardInterrupt:
                self.fail(name, f"interrupted, {len(stages)} stages before the end")
        if not any(self.record[name] for name in ("rows", "curves", "failures")):
            asked = f"{', '.join(self.given.providers or LABELS)} in {', '.join(self.given.suites)}"
            self.fail("run", f"nothing was measured: none of {asked}")
        if self.given.out:
            record.write(self.record, self.given.out)

    def stages(self) -> Iterator[tuple[str, Callable[[], None]]]:
        """All stages of all suites, by name."""
        for name in self.given.suites:
            try:
                with library():
                    suite = suites.load(name)
            except Missing as reason:
                self.miss(name, str(reason))
                continue
            if hasattr(suite, "stages"):
                yield from suite.stages(self, name)
            else:
                for case in suite.cases(self, name):
                    yield f"{name}: {case.label}", functools.partial(self.measure, case)

    def cases(self) -> list[Case]:
        """All comparisons of all suites, for those who measure them in another way."""
        return [case for name in self.given.suites for case in suites.load(name).cases(self, name)]

    def shapes(self, hidden: Sequence[int], tokens: Sequence[int], ranks: Sequence[int]) -> Iterator[LayerShape]:
        """Every combination of dtypes, hidden size, tokens and rank, with these where the options name none."""
        given = self.given
        for dtypes, size, count, rank in itertools.product(
            given.dtypes, given.hidden or hidden, given.tokens or tokens, given.ranks or ranks
        ):
            yield LayerShape(size, rank, count, dtypes, self.device)

    def stage(self, name: str, work: Callable[[], None]) -> None:
        """Run one stage, or say why not, and write the record."""
        begun = time.perf_counter()
        if begun - self._start > self.given.limit_s:
            self.fail(name, f"skipped: {self.given.limit_s:g} s were over (--limit-s)")
            return
        self.progress.update(self._bar, description=name)
        self.progress.update(self._detail, visible=False)
        self.progress.refresh()
        try:
            work()
        except Missing as reason:
            self.miss(name.partition(":")[0], str(reason))
        except Exception as error:
            self.fail(name, f"{type(error).__name__}: {error}")
            print("".join(traceback.format_exc().splitlines(True)[-_TRACE_LINES:]), file=sys.stderr, flush=True)
        if any(name.endswith("_compiled") for name in self.given.providers or LABELS):
            torch.compiler.reset()  # after a few recompilations of one function torch runs it uncompiled
        gc.collect()
        self.hold_against_ceilings()
        self.record["seconds"][name] = round(time.perf_counter() - begun, 1)
        self.record["hardware"]["others"] = self._others.cores()
        if self.given.out:
            record.write(self.record, self.given.out)

    def advance(self, done: int, total: int) -> None:
        """Show how far a long stage has come."""
        self.progress.update(self._detail, visible=True, completed=done, total=total, description="")
        self.progress.refresh()

    def fail(self, stage: str, message: str) -> None:
        """Note a failure."""
        self.record["failures"].append({"stage": stage, "message": message.strip()[:600]})

    def chosen(self, names: Sequence[str]) -> list[str]:
        """Those of the names that `--providers` asks for."""
        return [name for name in names if self.given.providers is None or name in self.given.providers]

    def ceilings(self, rounds: int = 11) -> None:
        """The bandwidth and the matrix rates that everything is held against: the best seen.

        Taken first, and again before each comparison: a machine that others use too has its better times.
        """
        cuda, found = self.device.type == "cuda", self.record["ceilings"]

        def keep(name: str, rate: float) -> None:
            found[name] = significant(max(rate, found.get(name, 0.0)))

        size = 2**31 if cuda else max(2**26, 4 * timing.cache_bytes(self.device))
        keep("copy_bytes_per_s", timing.copy_bandwidth(self.device, size, rounds))
        for dtype in dict.fromkeys((torch.float32, *(dtypes_of(name)[0] for name in self.given.dtypes))):
            name = f"flop_per_s.{str(dtype).removeprefix('torch.')}"
            # Without instructions for it a 16-bit product takes seconds, and is no ceiling.
            if found.get(name, math.inf) > 0.1 * found.get("flop_per_s.float32", 0.0):
                keep(name, timing.blas_rate(self.device, 8192 if cuda else 1024, dtype, rounds))

    def hold_against_ceilings(self) -> None:
        """Fill in each row's time at the ceilings, of its fewest bytes or FLOPs, whichever take longer, and the share
        of that in its own time.

        A 16-bit product may be done in float32, where a CPU without 16-bit instructions is hundreds of times faster.
        """
        found = self.record["ceilings"]
        for row in self.record["rows"]:
            names = ("float32", str(dtypes_of(row["dtypes"])[0]).removeprefix("torch."))
            rates = [found[f"flop_per_s.{name}"] for name in names if f"flop_per_s.{name}" in found]
            if row["us"] and row["bytes"] is not None and rates and "copy_bytes_per_s" in found:
                floor = max(row["bytes"] / found["copy_bytes_per_s"], row["flops"] / max(rates))
                row["floor_us"], row["fraction"] = significant(floor * 1e6), significant(floor * 1e6 / row["us"], 3)

    def miss(self, name: str, reason: str) -> None:
        """Note what cannot be had: a provider, or a suite."""
        known = self.record["missing"].get(name)
        if not known or reason not in known:
            self.record["missing"][name] = f"{known}; {reason}" if known else reason

    def subjects(self, case: Case) -> list[Subject]:
        """The chosen providers that run, each checked; a wrong one is a failure, and is timed all the same."""
        found = []
        for name in self.chosen(case.providers):
            try:
                subject = case.subject(name)
            except Missing as reason:
                self.miss(name, str(reason))
                continue
            except Exception as error:
                self.fail(f"{case.suite}: {case.label}", f"{LABELS[name]}: {type(error).__name__}: {error}")
                continue
            if wrong := beyond(subject.errors, subject.limits):
                self.fail(f"{case.suite}: {case.label}", f"{LABELS[name]}: wrong result: {'; '.join(wrong)}")
            found.append(subject)
        return found

    def measure(self, case: Case) -> None:
        """Check and time the providers of a case side by side, and add a row for each and each part; then check again.

        A part may take the case's share of the run's time; three rounds are made in any case.
        """
        case.prepare()
        if case.timed:
            self.ceilings(rounds=3)
        subjects, first = self.subjects(case), len(self.record["rows"])
        for part in dict.fromkeys(part for subject in subjects for part in subject.parts):
            candidates = self._candidates(case, part, subjects)
            if case.timed:
                timing.interleave(
                    list(candidates.values()), self.device, rounds=self.given.rounds,
                    sample_seconds=self.given.sample_ms / 1e3, limit_seconds=self.given.limit_s * case.share,
                )  # fmt: skip
            else:
                for candidate in candidates.values():  # what only the first call of all holds is not its peak
                    timing.run_passes(candidate, 1)
            for subject in (subject for subject in subjects if subject.provider in candidates):
                self.record["rows"].append(self._row(case, part, subject, candidates))
        for subject in (one for one in subjects if one.again and not beyond(one.errors, one.limits)):
            self._check_again(case, subject, self.record["rows"][first:])

    def _candidates(self, case: Case, part: str, subjects: Sequence[Subject]) -> dict[str, Candidate]:
        """By provider; one whose calls cannot be captured in a CUDA graph is missing, ours a failure."""
        found = {}
        for subject in (subject for subject in subjects if part in subject.parts):
            name, calls = subject.provider, subject.parts[part]
            try:
                found[name] = (
                    timing.captured(name, calls, self.device, subject.in_place)
                    if part in subject.in_graph
                    else Candidate(name, calls)
                )
            except Exception as error:
                words = f"{part} in a CUDA graph: {type(error).__name__}: {error}"
                if name.startswith("ours"):
                    self.fail(f"{case.suite}: {case.label}", f"{LABELS[name]}: {words}")
                else:
                    self.miss(name, words)
        return found

    def _check_again(self, case: Case, subject: Subject, rows: Sequence[dict[str, Any]]) -> None:
        """After the timed calls, of whom some have trained the layer: rows of one that is wrong now say so."""
        assert subject.again is not None
        errors, limits = subject.again()
        if wrong := beyond(errors, limits):
            message = f"{LABELS[subject.provider]}: wrong result after what was timed: {'; '.join(wrong)}"
            self.fail(f"{case.suite}: {case.label}", message)
            for row in (row for row in rows if row["provider"] == subject.provider):
                row["errors"], row["limits"] = rounded(errors), rounded(limits)

    def _row(self, case: Case, part: str, subject: Subject, candidates: dict[str, Candidate]) -> dict[str, Any]:
        candidate = candidates[subject.provider]
        least = subject.least.get(part)
        row = {
            "suite": case.suite, "case": case.label, "part": part, "provider": subject.provider, **case.facts,
            "us": None, "spread": None, "rounds": len(candidate.samples),
            "peak_bytes": timing.peak_bytes(self.device, subject.parts[part][0]) if subject.parts[part] else None,
            "bytes": least and least[0], "flops": least and least[1], "floor_us": None, "fraction": None,
            "ratios": {}, "errors": rounded(subject.errors), "limits": rounded(subject.limits),
        }  # fmt: skip
        if candidate.samples:
            row["us"], row["spread"] = significant(candidate.seconds * 1e6), significant(candidate.spread, 2)
            row["ratios"] = {
                name: significant(candidate.ratio(candidates[name]), 3) for name in REFERENCES if name in candidates
            }
        return row
