"""A process of `python -m bench compare`: measures the package that it finds first, when it is asked to.

Questions come as lines of JSON: first the options, whose answer is the cases' labels; then `prepare` of a case by its
index, `sample` of one of its works, and `finish`, which checks the results again after all those samples.
"""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

from bench import machine

SAMPLE_SECONDS = 0.02


class Worker:
    """The cases of some suites, and the work of the one that is prepared."""

    def __init__(self, package: str, **options: Any) -> None:
        import dora_kernels

        found = Path(str(dora_kernels.__file__)).resolve().parents[1]
        if found != Path(package).resolve():
            raise RuntimeError(f"dora_kernels comes from {found}, not from {package}")
        from bench.run import Options, Run

        self.run = Run(Options(**options))
        self.cases: list[Any] = self.run.cases()
        self.labels = [f"{case.suite}: {case.label}" for case in self.cases]
        self.works: dict[tuple[str, str], Any] = {}
        self.subjects: list[Any] = []

    def prepare(self, index: int) -> dict[str, Any]:
        """The works of a case, each run once, and what is wrong with them."""
        import torch

        from bench import timing

        self.works.clear()
        if any(name.endswith("_compiled") for name in self.run.given.providers or ()):
            torch.compiler.reset()  # after a few recompilations of one function torch runs it uncompiled
        case, self.cases[index] = self.cases[index], None  # its tensors go when the next is prepared
        self.run.record["failures"].clear()
        self.subjects = self.run.subjects(case)
        answers = []
        for subject in self.subjects:
            for part, calls in subject.parts.items():
                candidate = timing.Candidate(subject.provider, calls)
                try:
                    timing.run_passes(candidate, 1)
                    once = timing.elapsed(self.run.device, lambda candidate=candidate: timing.run_passes(candidate, 1))
                except Exception as error:
                    self.run.fail(case.label, f"{subject.provider}: {part}: {type(error).__name__}: {error}")
                    continue
                self.works[part, subject.provider] = candidate
                answers.append({
                    "key": [part, subject.provider], "peak": timing.peak_bytes(self.run.device, calls[0]),
                    "passes": max(1, min(1000, math.ceil(SAMPLE_SECONDS / max(once, 1e-7)))),
                })  # fmt: skip
        return {"works": answers, "failures": self._failures()}

    def finish(self) -> list[str]:
        """What the prepared case's calls have left wrong."""
        from dora_kernels.testing import beyond

        self.run.record["failures"].clear()
        for subject in self.subjects:
            if subject.again and (wrong := beyond(*subject.again())):
                self.run.fail("", f"{subject.provider}: wrong result after what was timed: {'; '.join(wrong)}")
        return self._failures()

    def _failures(self) -> list[str]:
        return [failure["message"] for failure in self.run.record["failures"]]

    def sample(self, key: list[str], passes: int) -> float:
        """Seconds of so many passes over a work's calls, per call."""
        from bench import timing

        candidate = self.works[tuple(key)]  # type: ignore[index]
        timing.run_passes(candidate, 1)
        seconds = timing.elapsed(self.run.device, lambda: timing.run_passes(candidate, passes))
        return seconds / (passes * candidate.calls)


def main() -> int:
    """Answer until the questions end."""
    machine.wait_passively()  # before torch is imported: the other process measures in the meantime
    answers = os.fdopen(os.dup(1), "w")  # what a library prints goes to the other stream
    os.dup2(2, 1)
    worker: Worker | None = None
    for line in sys.stdin:
        question = json.loads(line)
        try:
            if worker is None:
                worker = Worker(**question)
                answer: dict[str, Any] = {"result": worker.labels}
            else:
                answer = {"result": getattr(worker, question.pop("do"))(**question)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
