"""The tables of a record, for a terminal."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench.providers import LABELS
from bench.record import Record

WIDTH = 80  # where there is no terminal to ask
EMPTY = "–"


def console() -> Console:
    """The terminal, or a page of `WIDTH` where the output goes to a file."""
    found = Console(highlight=False)
    return found if found.is_terminal else Console(width=WIDTH, highlight=False)


def show(record: Record, screen: Console) -> None:
    """Where it ran, a table for each comparison, what is missing and what failed."""
    hardware, ceilings = record["hardware"], record["ceilings"]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    screen.print(f"{hardware['device']}, {hardware['threads']} threads; {versions}; commit {record['commit'][:12]}")
    screen.print("measured here: " + ", ".join(f"{_ceiling(name)} {rate(value)}" for name, value in ceilings.items()))
    for rows in groups(record["rows"]):
        screen.print()
        screen.print(table(rows))
    if record["curves"]:
        screen.print()
        screen.print(quality_table(record["curves"]))
    for name, reason in record["missing"].items():
        screen.print(f"[yellow]missing[/yellow] {LABELS.get(name, name)}: {escape(reason)}")
    for failure in record["failures"]:
        screen.print(f"[red]FAILED[/red] {escape(failure['stage'])}: {escape(failure['message'])}")
    seconds = f"{sum(record['seconds'].values()):.0f} s"
    screen.print(seconds + ("" if record["failures"] else ", nothing failed"))


def groups(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Rows that were measured side by side."""
    found: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["suite"], row["case"], row["part"]), []).append(row)
    return list(found.values())


def table(rows: list[dict[str, Any]]) -> Table:
    """One comparison: what all rows share stands in the title."""
    first = rows[0]
    found = Table(
        title=f"[bold]{first['suite']}[/bold]: {escape(first['part'])}, {escape(first['case'])}",
        caption=_least(rows), title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0),
    )  # fmt: skip
    for name, justify in _COLUMNS.items():
        found.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for row in rows:
        wrong = is_wrong(row)
        error = worst(row)
        found.add_row(
            LABELS.get(row["provider"], row["provider"]),
            EMPTY if row["us"] is None else duration(row["us"]),
            EMPTY if row["spread"] is None else f"±{row['spread'] * 50:.0f}%",
            *(ratio(row, name) for name in ("peft_dora", "peft_lora")),
            EMPTY if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.1f}",
            EMPTY if row["fraction"] is None else f"{row['fraction']:.0%}",
            f"[red]WRONG[/red] {error}" if wrong else error,
        )
    return found


_COLUMNS = {
    "provider": "left", "time": "right", "spread": "right", "×DoRA": "right", "×LoRA": "right", "peak MiB": "right",
    "limit": "right", "error": "right",
}  # fmt: skip


def _least(rows: list[dict[str, Any]]) -> str | None:
    least: dict[tuple[int, int], float | None] = {}
    for row in rows:
        if row["bytes"] is not None:
            least.setdefault((row["bytes"], row["flops"]), row["floor_us"])
    if not least:
        return None
    (size, flops), floor = max(least.items())
    at_best = "" if floor is None else f": {duration(floor)} at the measured ceilings"
    return f"at least {quantity(size, 'B')} and {quantity(flops, 'FLOP')}{at_best}"


def quality_table(curves: list[dict[str, Any]]) -> Table:
    """What the trainings led to, on held-out examples: the mean over seeds, and from the least to the most."""
    found = Table(title="[bold]quality[/bold] on held-out text", title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("suite", "provider", "rank", "seeds", "loss", "accuracy"):
        found.add_column(name, justify="left" if name in ("suite", "provider") else "right", no_wrap=True)
    by: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for curve in curves:
        by.setdefault((curve["suite"], curve["provider"], curve["rank"]), []).append(curve)
    for (suite, provider, rank), group in sorted(by.items(), key=lambda item: (item[0][0], item[0][2])):
        found.add_row(
            suite, LABELS[provider], str(rank), str(len(group)),
            _range([curve["held_out"] for curve in group], "{:.4f}"),
            _range([curve["accuracy"] for curve in group], "{:.2%}"),
        )  # fmt: skip
    return found


def _range(values: list[float], form: str) -> str:
    mean = form.format(sum(values) / len(values))
    return mean if len(values) == 1 else f"{mean} ({form.format(min(values))} – {form.format(max(values))})"


def is_wrong(row: dict[str, Any]) -> bool:
    """Whether an error exceeds its limit, or is not a number."""
    errors, limits = row["errors"], row["limits"]
    return any(errors[name] is None or errors[name] > limits[name] for name in errors)


def worst(row: dict[str, Any]) -> str:
    """The error nearest to its limit, or furthest beyond."""
    errors, limits = row["errors"], row["limits"]
    if not errors:
        return EMPTY
    if any(value is None for value in errors.values()):
        return "not finite"
    name = max(errors, key=lambda name: errors[name] / limits[name])
    return f"{errors[name]:.0e}"


def ratio(row: dict[str, Any], other: str) -> str:
    """The row's time over another provider's."""
    found = row["ratios"].get(other)
    return EMPTY if found is None else f"{found:.2f}"


def duration(microseconds: float) -> str:
    """With three digits and the unit that fits."""
    for unit, size in (("µs", 1.0), ("ms", 1e3), ("s", 1e6)):
        if microseconds < 1e3 * size:
            return f"{microseconds / size:.3g} {unit}"
    return f"{microseconds / 1e6:.0f} s"


def quantity(value: float, unit: str) -> str:
    """With three digits and a decimal prefix."""
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def rate(value: float) -> str:
    """Per second, of bytes or operations; see `_ceiling`."""
    return quantity(value, "/s").replace(" ", " ")


def _ceiling(name: str) -> str:
    if name == "copy_bytes_per_s":
        return "copy bandwidth in bytes"
    return f"{name.removeprefix('flop_per_s.')} product in FLOP"
