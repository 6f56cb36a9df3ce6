"""`python -m bench static`, whose help says what it prints: the account of the kernels as tables or records."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from aot import PRIMITIVES
from aot.resources import TARGETS, Compiled, problems

_REPOSITORY = Path(__file__).resolve().parents[3]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m bench static`."""
    several = "may be given several times"
    parser.add_argument("--kernel", action="append", choices=PRIMITIVES, help=several)
    parser.add_argument("--target", action="append", choices=list(TARGETS), help=several)
    parser.add_argument("--layers", action="store_true", help="whole layers beside PEFT's alone, which takes seconds")
    parser.add_argument("--choices", action="store_true", help="what the defaults choose for each shape, and why")
    parser.add_argument("--no-compile", action="store_true", help="the traffic alone, which takes seconds")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one per core)")
    parser.add_argument("--all", action="store_true", help="every operand and every launch instead of sums and maxima")
    parser.add_argument("--json", action="store_true", help="records instead of tables")


def run(given: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Print what was asked for."""
    if given.choices:
        from aot import choices

        if given.json:
            json.dump({"choices": choices.rows()}, sys.stdout)
        else:
            _print(*choices.table())
            print(choices.STATEMENT)
        return 0
    for needed in ("torch", "triton", "peft"):
        if importlib.util.find_spec(needed) is None:
            parser.error(f"{needed} is not installed")
    # Read when triton is imported, which happens below: an interpreted kernel has nothing to compile.
    os.environ.pop("TRITON_INTERPRET", None)
    from aot import account, compiler, layers

    primitives = given.kernel or PRIMITIVES
    rows = [] if given.layers else account.rows(primitives)
    if not given.json and rows:
        _print(*account.operands_table(rows) if given.all else account.table(rows))
    whole = [] if given.kernel else layers.rows()
    if not given.json and whole:
        print(end="\n" if rows else "")
        _print(*layers.table(whole))
    start = time.perf_counter()
    found = []
    if not (given.no_compile or given.layers):
        found = compiler.compile_shipped(given.target or TARGETS, given.jobs, primitives)
    wrong = {one.title: problems(one) for one in found if problems(one)}
    if given.json:
        tables = {"traffic": rows, "layers": whole, "resources": found}
        json.dump({name: [row.as_dict() for row in table] for name, table in tables.items()}, sys.stdout)
    elif found:
        print()
        _print_resources(found, given.all)
        print(f"{len(found)} launches compiled in {time.perf_counter() - start:.0f} s")
        for title, reasons in wrong.items():
            print(f"FAILED  {title}: {'; '.join(reasons)}")
    return 1 if wrong else 0


def resources(target: str, jobs: int = 1, timeout: float = 900.0) -> list[Compiled]:
    """Every shipped launch for one target, compiled in a new process: the caller may import triton as interpreter."""
    command = [sys.executable, "-m", "bench", "static", "--target", target, "--jobs", str(jobs), "--json"]
    done = subprocess.run(command, cwd=_REPOSITORY, capture_output=True, text=True, timeout=timeout)
    if done.returncode not in (0, 1) or not done.stdout:
        raise RuntimeError(f"{' '.join(command)} exited with {done.returncode}: {done.stderr[-2000:]}")
    return [Compiled(**record) for record in json.loads(done.stdout)["resources"]]


def _print_resources(found: list[Compiled], every: bool) -> None:
    figures = ["shared KiB", "registers", "spills", "matrix instructions"]
    if every:
        _print(["target", "kernel", "dtypes", *figures, "launch"], [_row(one) for one in found])
    else:
        _print(["target", "kernel", "dtypes", "launches", *figures], _summary(found))
    for reason in sorted({one.unread for one in found if one.unread}):
        print(f"not read: {sum(one.unread == reason for one in found)} launches: {reason}")


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
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip(), flush=True)
