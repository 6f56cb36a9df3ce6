"""The tables of a record, as sheets of cells, and those on a terminal."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench.providers import LABELS
from bench.record import Record, commit_of, disturbed, machine_of
from dora_kernels.testing import ROW

WIDTH = 80  # where there is no terminal to ask
EMPTY = "–"
LAST = 50
"""Losses at the end of a training, for their mean."""
DEMO = {
    "stock": "PEFT DoRA",
    "patched": "PEFT DoRA + `patch_peft`",
    "lora": "PEFT LoRA",
    "frozen": "control: magnitude frozen",
    "stale": "control: norm never refreshed",
}
"""What `make demo` trains; the last two are wrong on purpose."""
DEMO_LIMIT = 1e-5
"""Of the difference of losses that are the same."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Sheet:
    """A table: each row has a kind, "ours", "wrong" or "", and its cells."""

    title: str
    head: Sequence[str]
    rows: Sequence[tuple[str, Sequence[str]]]
    note: str | None = None


def console() -> Console:
    """The terminal, or a page of `WIDTH` where the output goes to a file."""
    found = Console(highlight=False)
    return found if found.is_terminal else Console(width=WIDTH, highlight=False)


def show(record: Record, screen: Console) -> None:
    """Where it ran, a table for each comparison, what is missing and what failed."""
    hardware = record["hardware"]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    screen.print(f"{machine_of(hardware)}; {versions}; commit {commit_of(record)}")
    found = ", ".join(ceiling(name, value) for name, value in record["ceilings"].items())
    screen.print(f"measured here: {found}")
    if warning := disturbed(record):
        screen.print(f"[yellow]busy[/yellow] {warning}")
    for sheet in tables(record):
        screen.print()
        screen.print(table(sheet))
    for name, reason in record["missing"].items():
        screen.print(f"[yellow]missing[/yellow] {LABELS.get(name, name)}: {escape(reason)}")
    for failure in record["failures"]:
        screen.print(f"[red]FAILED[/red] {escape(failure['stage'])}: {escape(failure['message'])}")
    seconds = f"{sum(record['seconds'].values()):.0f} s"
    screen.print(seconds + ("" if record["failures"] else ", nothing failed"))


def tables(record: Record) -> list[Sheet]:
    """Every comparison, then what is compared by errors or quality alone."""
    rows = record["rows"]
    found = [comparison(group) for group in groups(row for row in rows if row["suite"] != "fidelity")]
    errors = [row for row in rows if row["suite"] == "fidelity"]
    by_suite: dict[str, list[Row]] = {}
    for curve in record["curves"]:
        by_suite.setdefault(curve["suite"], []).append(curve)
    return [*found, *fidelity(errors), *map(quality, by_suite.values())]


def groups(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows that were measured side by side."""
    found: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["suite"], row["case"], row["part"]), []).append(row)
    return list(found.values())


def comparison(rows: Sequence[Row]) -> Sheet:
    """One comparison: what all rows share stands in the title and below."""
    first = rows[0]
    timed = any(row["us"] is not None for row in rows)
    head = ["provider", "time", "spread", "×DoRA", "×LoRA", "MiB", "ceiling", "error"]
    cells = []
    for row in rows:
        wrong = is_wrong(row)
        cells.append((_kind(row), [
            LABELS.get(row["provider"], row["provider"]),
            EMPTY if row["us"] is None else duration(row["us"]),
            EMPTY if row["spread"] is None else f"±{row['spread'] * 50:.0f}%",
            *(_number(row["ratios"].get(name), "{:.2f}") for name in ("peft_dora", "peft_lora")),
            EMPTY if row["peak_bytes"] is None else mebibytes(row["peak_bytes"]),
            _number(row["fraction"], "{:.0%}"),
            f"WRONG {worst(row)}" if wrong else worst(row),
        ]))  # fmt: skip
    note = _least(rows)
    if first["suite"] == "model" and timed:
        made = first["tokens"] if first["part"] == "step" else 1
        rates = ", ".join(f"{LABELS[row['provider']]} {made / row['us'] * 1e6:.3g}" for row in rows)
        note = f"tokens per second: {rates}; {note}"
    kept = [i for i in range(len(head)) if timed or i not in (1, 2, 3, 4, 6)]
    return Sheet(
        f"{first['suite']}: {first['part']}, {first['case']}", [head[i] for i in kept],
        [(kind, [row[i] for i in kept]) for kind, row in cells], note,
    )  # fmt: skip


def fidelity(rows: Sequence[Row]) -> list[Sheet]:
    """Largest error of any rank: ours over PEFT's, and PEFT's."""
    stock = {row["case"]: row["errors"] for row in rows if row["provider"] == "peft_dora"}
    sheets = []
    for provider in dict.fromkeys(row["provider"] for row in rows if row["provider"] != "peft_dora"):
        mine = [row for row in rows if row["provider"] == provider and row["case"] in stock]
        cells = []
        trained = [row for row in mine if "y" in row["errors"]]
        names = list(dict.fromkeys(name for row in trained for name in row["errors"] if not name.endswith(ROW)))
        for dtypes, condition in dict.fromkeys((row["dtypes"], row["condition"]) for row in trained):
            group = [row for row in trained if (row["dtypes"], row["condition"]) == (dtypes, condition)]
            figures = [quotient(group, stock, name) for name in names]
            kind = "wrong" if any(is_wrong(row) for row in group) else ""
            cells.append((kind, [dtypes, condition, *figures]))
        notes = []
        for dtypes in dict.fromkeys(row["dtypes"] for row in mine):
            ratios = [ratio for row in trained if row["dtypes"] == dtypes for ratio in _ratios(row, stock)]
            if ratios:
                below = sum(ratio <= 1.0 for ratio in ratios)
                notes.append(f"{dtypes} in {below} of {len(ratios)} cells, at most {max(ratios):.2f} times it")
        note = f"at most PEFT's: {'; '.join(notes)}" if notes else None
        if cells:
            title = f"fidelity: error over PEFT's, the largest of all ranks: {LABELS[provider]}"
            sheets.append(Sheet(title, ["dtypes", "condition", *names], cells, note))
    fresh = [row for row in rows if "g" in row["errors"]]
    if fresh:
        cells = []
        for row in fresh:
            own, exact = (f"{row['errors'][name]:.0e}" for name in ("g", "m"))
            cells.append((_kind(row), [LABELS[row["provider"]], row["dtypes"], own, exact]))
        title = "fidelity: a layer that nobody has trained, max |m / norm − 1|"
        sheets.append(Sheet(title, ["provider", "dtypes", "its own norm", "float64's"], cells))
    return sheets


def quotient(group: Sequence[Row], stock: dict[str, Any], name: str) -> str:
    """The largest error over PEFT's in a group; PEFT's where it is not a number."""
    found = []
    for row in group:
        mine, theirs = row["errors"][name], stock[row["case"]][name]
        if theirs is None:
            return "PEFT: not finite"
        found.append(math.inf if mine is None else mine / theirs if theirs else float(mine > 0))
    largest = max(found)
    return f"{largest:.2g}" if largest < 0.01 else f"{largest:.2f}" if largest < 100 else f"{largest:.0f}"


def _ratios(row: Row, stock: dict[str, Any]) -> list[float]:
    """Of every error that both have."""
    pairs = [(row["errors"][name], stock[row["case"]].get(name)) for name in row["errors"] if not name.endswith(ROW)]
    return [math.inf if mine is None else mine / theirs for mine, theirs in pairs if theirs]


def quality(curves: Sequence[Row]) -> Sheet:
    """What a suite's trainings led to, on held-out examples: the mean over seeds, and from the least to the most."""
    by: dict[tuple[str, int], list[Row]] = {}
    for curve in curves:
        by.setdefault((curve["provider"], curve["rank"]), []).append(curve)
    cells = []
    for (provider, rank), group in sorted(by.items(), key=lambda item: item[0][1]):
        cells.append(("ours" if provider == "ours" else "", [
            LABELS[provider], str(rank), str(len(group)),
            _range([curve["held_out"] for curve in group], "{:.4f}"),
            _range([100 * curve["accuracy"] for curve in group], "{:.1f}"),
        ]))  # fmt: skip
    head = ["provider", "rank", "seeds", "loss", "% right"]
    return Sheet(f"{curves[0]['suite']}: on held-out text, mean (least – most)", head, cells)


def gaps(curves: list[dict[str, Any]], suite: str = "finetune", provider: str = "ours") -> dict[str, float]:
    """How far ours is from stock, and stock's seeds from each other: at most over steps, and on held-out text.

    Between seeds the smallest difference of any two counts, and beside it the largest.
    """
    of = {(curve["provider"], curve["rank"], curve["seed"]): curve for curve in curves if curve["suite"] == suite}
    trainings = sorted({key[1:] for key in of})
    pairs = [(of[(provider, *key)], of[("peft_dora", *key)]) for key in trainings]
    others = [
        (of[("peft_dora", *one)], of[("peft_dora", *other)])
        for one, other in itertools.combinations(trainings, 2) if one[0] == other[0]
    ]  # fmt: skip
    found = {}
    for what, apart in _APART.items():
        between = [apart(*pair) for pair in others]
        found[f"{what}, ours to stock"] = max(apart(*pair) for pair in pairs)
        found[f"{what}, seed to seed"], found[f"{what}, seed to seed, at most"] = min(between), max(between)
    return found


def last(curve: dict[str, Any]) -> float:
    """The mean of the last losses of a training."""
    losses = curve["losses"][-LAST:]
    return float(sum(losses) / len(losses))


_APART: dict[str, Callable[[dict[str, Any], dict[str, Any]], float]] = {
    "loss": lambda a, b: max(abs(x - y) for x, y in zip(a["losses"], b["losses"], strict=True)),
    "last losses": lambda a, b: abs(last(a) - last(b)),
    "held-out loss": lambda a, b: abs(a["held_out"] - b["held_out"]),
    "held-out accuracy": lambda a, b: abs(a["accuracy"] - b["accuracy"]),
}
"""How far two trainings are from each other."""


def demo(result: Record) -> Sheet:
    """The variants and controls of `make demo`: times, and those of LoRA's; memory; whether the losses are stock's."""
    variants = result["variants"]
    lengths = list(variants["lora"]["step_seconds"])
    head = ["", *(f"step, {length} tokens" for length in lengths), "generated token"]
    head.append(f"peak memory, {lengths[-1]} tokens")
    rows = []
    for kind, label in DEMO.items():
        variant = variants[kind]
        pairs = [(variant["step_seconds"].get(length), variant["step_ratio"].get(length)) for length in lengths]
        pairs.append((variant["token_seconds"], variant["token_ratio"]))
        cells = ["" if seconds is None else f"{seconds * 1e3:.0f} ms ({ratio:.2f}× LoRA)" for seconds, ratio in pairs]
        peak, off = variant["peak_bytes"], variant["loss_difference"]
        cells.append("" if peak is None else f"{peak / 2**20:.0f} MiB")
        same = "" if off is None else f"yes, within {off:.1e}" if off <= DEMO_LIMIT else f"**no**, off by {off:.1e}"
        rows.append(("ours" if kind == "patched" else "", [label, *cells, same]))
    return Sheet("Fine-tuned side by side, in turns", [*head, "same losses as PEFT DoRA"], rows)


def is_wrong(row: Row) -> bool:
    """Whether an error exceeds its limit, or is not a number."""
    errors, limits = row["errors"], row["limits"]
    return any(name in limits and (errors[name] is None or errors[name] > limits[name]) for name in errors)


def worst(row: Row) -> str:
    """The error nearest to its limit, or furthest beyond."""
    errors, limits = row["errors"], row["limits"]
    if not is_wrong(row):
        errors = {name: off for name, off in errors.items() if not name.endswith(ROW)}
    if not errors:
        return EMPTY
    if any(value is None for value in errors.values()):
        return "not finite"
    return f"{errors[max(errors, key=lambda name: errors[name] / limits.get(name, 1.0))]:.0e}"


def duration(microseconds: float) -> str:
    """With three digits and the unit that fits."""
    for unit, size in (("µs", 1.0), ("ms", 1e3)):
        if microseconds < 999.5 * size:
            return f"{microseconds / size:.3g} {unit}"
    return f"{microseconds / 1e6:.3g} s"


def mebibytes(size: int) -> str:
    """With three digits or more."""
    mib = size / 2**20
    return f"{mib:.2f}" if mib < 10 else f"{mib:.1f}" if mib < 100 else f"{mib:.0f}"


def quantity(value: float, unit: str) -> str:
    """With three digits and a decimal prefix."""
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def ceiling(name: str, value: float) -> str:
    """A measured rate in words."""
    if name == "copy_bytes_per_s":
        return f"copying {quantity(value, 'B/s')}"
    return f"{name.removeprefix('flop_per_s.')} products {quantity(value, 'FLOP/s')}"


def _kind(row: Row) -> str:
    return "wrong" if is_wrong(row) else "ours" if row["provider"] == "ours" else ""


def _number(value: float | None, form: str) -> str:
    return EMPTY if value is None else form.format(value)


def _least(rows: Sequence[Row]) -> str | None:
    least = {(row["bytes"], row["flops"]): row["floor_us"] for row in rows if row["bytes"] is not None}
    if not least:
        return None
    (size, flops), floor = max(least.items())
    at_best = "" if floor is None else f", {duration(floor)} at the ceilings"
    return f"MiB: peak memory; at least {quantity(size, 'B')} and {quantity(flops, 'FLOP')}{at_best}"


def _range(values: Sequence[float], form: str) -> str:
    mean = form.format(sum(values) / len(values))
    return mean if len(values) == 1 else f"{mean} ({form.format(min(values))} – {form.format(max(values))})"


def table(sheet: Sheet, wrap: bool = False) -> Table:
    """A sheet for the terminal; `wrap`: figures may take several lines."""
    found = Table(
        title=f"[bold]{escape(sheet.title)}[/bold]", caption=sheet.note, title_justify="left", caption_justify="left",
        box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0),
    )  # fmt: skip
    for index, name in enumerate(sheet.head):
        # where a terminal is narrow the first column takes more lines, and no figure is cut off
        found.add_column(name, justify="right" if index else "left", no_wrap=index > 0 and not wrap, overflow="fold")
    for kind, cells in sheet.rows:
        found.add_row(*(cell.replace("**", "") for cell in cells), style={"ours": "bold", "wrong": "red"}.get(kind))
    return found
