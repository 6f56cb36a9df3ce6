"""Compile every shipped launch of every kernel for every target, without a GPU, and show what each asks for.

    python -m bench.aot                         all targets, a table of the largest figures per kernel
    python -m bench.aot --target sm_90 --all    one target, one row per launch
    python -m bench.aot --target sm_90 --json   records, for programs

Exit status 1 if a launch does not compile, does not fit, spills on a CUDA target, or lacks matrix instructions.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bench.static.resources import TARGETS, Compiled, problems

_REPOSITORY = Path(__file__).resolve().parents[1]


def records(target: str, jobs: int = 1, timeout: float = 900.0) -> list[Compiled]:
    """Every shipped launch for one target, compiled in a new process: the caller may import triton as interpreter."""
    command = [sys.executable, "-m", "bench.aot", "--target", target, "--jobs", str(jobs), "--json"]
    done = subprocess.run(command, cwd=_REPOSITORY, capture_output=True, text=True, timeout=timeout)
    if done.returncode not in (0, 1) or not done.stdout:
        raise RuntimeError(f"{' '.join(command)} exited with {done.returncode}: {done.stderr[-2000:]}")
    return [Compiled(**record) for record in json.loads(done.stdout)]


def _row(one: Compiled) -> list[str]:
    def known(figure: int | None) -> str:
        return "?" if figure is None else str(figure)

    shared = "?" if one.shared is None else f"{one.shared / 1024:.1f}"
    spills = f"{known(one.spills)} ({one.stack} B)" if one.stack else known(one.spills)
    matrix = " ".join(f"{count} {name}" for name, count in one.matrix.items()) or "-"
    config = " ".join(f"{name}={value}" for name, value in one.config.items())
    return [one.target, one.kernel, one.dtypes, shared, known(one.registers), spills, matrix, f"{one.case}; {config}"]


def _summary(found: list[Compiled]) -> list[list[str]]:
    """Per target, kernel and dtypes: the largest figure of each kind, and the matrix instructions of all launches."""
    groups: dict[tuple[str, str, str], list[Compiled]] = {}
    for one in found:
        groups.setdefault((one.target, one.kernel, one.dtypes), []).append(one)
    rows = []
    for key, group in groups.items():
        shared, registers, spills = (
            max(getattr(one, name) or 0 for one in group) for name in ("shared", "registers", "spills")
        )
        matrix = " ".join(sorted({name for one in group for name in one.matrix})) or "-"
        rows.append([*key, str(len(group)), f"{shared / 1024:.1f}", str(registers), str(spills), matrix])
    return rows


def _print(header: list[str], rows: list[list[str]]) -> None:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.aot", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="may be given several times")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one per core)")
    parser.add_argument("--all", action="store_true", help="one row per launch instead of the largest figures")
    parser.add_argument("--json", action="store_true", help="records instead of a table")
    given = parser.parse_args(arguments)
    if importlib.util.find_spec("triton") is None:
        parser.error("triton is not installed")
    # Read when triton is imported, which happens below: an interpreted kernel has nothing to compile.
    os.environ.pop("TRITON_INTERPRET", None)
    from bench.static.compiler import compile_shipped

    start = time.perf_counter()
    found = compile_shipped(given.target or TARGETS, given.jobs)
    wrong = {one.title: problems(one) for one in found if problems(one)}
    if given.json:
        json.dump([one.as_dict() for one in found], sys.stdout)
        return 1 if wrong else 0
    figures = ["shared KiB", "registers", "spills", "matrix instructions"]
    if given.all:
        _print(["target", "kernel", "dtypes", *figures, "launch"], [_row(one) for one in found])
    else:
        _print(["target", "kernel", "dtypes", "launches", *figures], _summary(found))
    print(f"{len(found)} launches compiled in {time.perf_counter() - start:.0f} s")
    for reason in sorted({one.unread for one in found if one.unread}):
        print(f"not read: {sum(one.unread == reason for one in found)} launches: {reason}")
    for title, reasons in wrong.items():
        print(f"FAILED  {title}: {'; '.join(reasons)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
