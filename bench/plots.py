"""Pictures of a record: each function draws one figure, or returns None where the record has nothing for it."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from bench.providers import ACCUMULATED, LABELS
from bench.record import Record, commit_of, disturbed, machine_of

COLORS = {
    "frozen": "#000000", "peft_lora": "#7f7f7f", "peft_lora_compiled": "#bfbfbf", "peft_dora": "#b0413e",
    "peft_dora_compiled": "#e08a86", "peft_dora_cached": "#d9b3b1",
    "torchtune": "#d98c21", "lycoris": "#6b4c9a", "axolotl": "#c7577f",
    "dense": "#8c6d46", "ours": "#1f5fa8", "ours_compiled": "#7fb2e5",
    "ours_frozen": "#0f3057", "ours_merged": "#b8860b", "ours_lora": "#5a7d9a", "parametrized_dora": "#d98c21",
    "ours_triton": "#0b7a75", "ours_torch": "#3f9e4d", "ours_reference": "#a8c686", "ours_direct": "#8f63b8",
    "ours_factored": "#0b7a75", "ours_unchanged": "#a8c686", "ours_fused": "#e36bae",
    "ours_bank": "#1f5fa8", "ours_bank_lora": "#7fb2e5",
}  # fmt: skip
MARKERS = {"ours": "o", "peft_dora": "s", "peft_lora": "^"}
Curve = dict[int, float]
MEAN_OF = 10
NO_GAP = 1e-9  # a logarithmic axis has no 0
pyplot.rcParams.update({
    "svg.hashsalt": "dora_kernels", "svg.fonttype": "none", "font.size": 9, "figure.dpi": 110,
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
})  # fmt: skip


def growth(record: Record) -> Figure | None:
    """Milliseconds of an optimizer step against tokens, rank and hidden size, all else equal."""
    part = f"step of {ACCUMULATED}"
    rows = [row for row in record["rows"] if row["suite"] == "layer" and row["part"] == part]
    panels = {}
    for axis in ("tokens", "rank", "hidden"):
        found = _series(rows, axis)
        if len(found[1].get("ours", next(iter(found[1].values()), {}))) > 1:
            panels[axis] = found
    if not panels:
        return None
    figure, axes = _panels(len(panels), 4.4, 4.2)
    for panel, (axis, (fixed, curves)) in zip(axes, panels.items()):
        for name, curve in curves.items():
            _line(panel, name, {x * ACCUMULATED if axis == "tokens" else x: y for x, y in curve.items()})
        if axis != "hidden" and len(curves.get("ours", ())) > 2:
            ours = {x * ACCUMULATED if axis == "tokens" else x: y for x, y in curves["ours"].items()}
            start, slope, explained = straight(ours)
            ends = [0, max(ours)]
            label = f"ours as a straight line of {axis}, R² = {explained:.4f}"
            line = [start + slope * x for x in ends]
            panel.plot(ends, line, linewidth=0.9, linestyle=":", color=COLORS["ours"], label=label)
        label = {"tokens": f"tokens in a step, {ACCUMULATED} micro-batches", "hidden": "hidden size"}.get(axis, axis)
        panel.set(xlabel=label, ylabel="milliseconds", title=fixed, xlim=(0, None), ylim=(0, None))
    _legend(figure, axes)
    return _titled(figure, record, "One layer, optimizer step")


def _series(rows: Sequence[dict[str, Any]], axis: str) -> tuple[str, dict[str, Curve]]:
    """The comparison with the most points along an axis: what is fixed in it, and milliseconds by provider."""
    others = [name for name in ("dtypes", "hidden", "tokens", "rank") if name != axis]
    best: tuple[str, dict[str, Curve]] = "", {}
    points = 0
    fixed = {tuple(_value(row, name) for name in others) for row in rows}
    for values in sorted(fixed, key=str):
        curves: dict[str, Curve] = {}
        for row in rows:
            if tuple(_value(row, name) for name in others) == values:
                curves.setdefault(row["provider"], {})[_value(row, axis)] = row["us"] / 1e3
        most = max(len(curve) for curve in curves.values())
        if most > points:
            words = {"hidden": "{}x{}", "tokens": "{} tokens a micro-batch", "rank": "rank {}", "dtypes": "{}"}
            points = most
            best = ", ".join(words[name].format(value, value) for name, value in zip(others, values)), curves
    return best


def _value(row: dict[str, Any], name: str) -> Any:
    return row["shape"][0] if name == "hidden" else row[name]


def straight(curve: Curve) -> tuple[float, float, float]:
    """The nearest straight line's value at 0 and slope, and R²."""
    xs, ys = list(curve), list(curve.values())
    slope, start = statistics.linear_regression(xs, ys)
    mean = statistics.fmean(ys)
    left = sum((y - start - slope * x) ** 2 for x, y in curve.items())
    return start, slope, 1.0 - left / sum((y - mean) ** 2 for y in ys)


def roofline(record: Record) -> Figure | None:
    """FLOPs per second of every kernel against FLOPs per byte, under the measured ceilings."""
    rows = [
        row for row in record["rows"]
        if row["suite"] in ("norm", "compose") and row["us"] and row["bytes"] and row["flops"]
    ]  # fmt: skip
    copy = record["ceilings"].get("copy_bytes_per_s")
    rates = {name: rate for name, rate in record["ceilings"].items() if name.startswith("flop_per_s.")}
    if not rows or not copy or not rates:
        return None
    kernels = list(dict.fromkeys(row["part"] for row in rows))
    figure, axes = _panels(len(kernels), 3.6, 4.2)
    for panel, kernel in zip(axes, kernels):
        mine = [row for row in rows if row["part"] == kernel]
        intensities = [row["flops"] / row["bytes"] for row in mine]
        low, high = min(intensities) / 5, max(intensities) * 5
        slowest = min(row["flops"] / row["us"] for row in mine) / 1e3
        for name, rate in rates.items():
            xs = [low, min(high, max(low, rate / copy)), high]
            label = f"measured ceiling, {name.removeprefix('flop_per_s.')}"
            panel.plot(xs, [min(rate, x * copy) / 1e9 for x in xs], color="black", linewidth=1.0, label=label)
        for name in dict.fromkeys(row["provider"] for row in mine):
            group = [row for row in mine if row["provider"] == name]
            points = [(row["flops"] / row["bytes"], row["flops"] / row["us"] / 1e3) for row in group]
            panel.plot(
                *zip(*points), MARKERS.get(name, "."), color=COLORS[name], label=LABELS[name], linestyle="none",
                markersize=6 if name in MARKERS else 9,
            )  # fmt: skip
        panel.set(
            xscale="log", yscale="log", title="norm, a refresh" if kernel == "refresh" else kernel,
            xlabel="FLOPs per byte, at least", ylabel="GFLOP/s",
            ylim=(slowest / 3, max(min(rate, high * copy) for rate in rates.values()) / 1e9 * 2),
        )  # fmt: skip
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_minor_formatter(NullFormatter())
    _legend(figure, axes)
    return _titled(figure, record, "Kernels under the measured ceilings")


def memory(record: Record) -> Figure | None:
    """Bars of the most memory held at once."""
    rows = [row for row in record["rows"] if row["suite"] == "memory" and row["part"] == "step"]
    if not rows:
        return None
    cases = list(dict.fromkeys(row["case"] for row in rows))
    figure, axes = _panels(len(cases), 5.5, 3.6)
    for panel, case in zip(axes, cases):
        mine = [row for row in rows if row["case"] == case]
        _bars(panel, [row["provider"] for row in mine], [row["peak_bytes"] / 2**20 for row in mine], "{:.1f}")
        panel.set(xlabel="MiB beside what the step began with", title=case)
    return _titled(figure, record, "Peak memory of one layer's optimizer step")


def model(record: Record) -> Figure | None:
    """Bars of a whole model's step, token and memory."""
    rows = [row for row in record["rows"] if row["suite"] == "model"]
    if not rows:
        return None
    length, rank = max((row["tokens"], row["rank"]) for row in rows)
    rows = [row for row in rows if (row["tokens"], row["rank"]) == (length, rank)]
    parts = (
        ("step", "us", 1e3, f"milliseconds, a training step of {length} tokens", "{:.0f}"),
        ("token", "us", 1e3, "milliseconds, a generated token", "{:.0f}"),
        ("step", "peak_bytes", 2**20, f"MiB, peak of a step of {length} tokens", "{:.0f}"),
    )
    figure, axes = _panels(len(parts), 4.2, 2.2)
    for panel, (part, key, unit, label, form) in zip(axes, parts):
        mine = [row for row in rows if row["part"] == part]
        _bars(panel, [row["provider"] for row in mine], [row[key] / unit for row in mine], form)
        panel.set(xlabel=label)
    return _titled(figure, record, f"SmolLM2-135M, adapters of rank {rank} on all linear layers, fp32")


def curves(record: Record) -> Figure | None:
    """Learning curves, and how far ours is from stock at every step beside how far two seeds are from each other."""
    found = [curve for curve in record["curves"] if curve["suite"] == "finetune"]
    found = [curve for curve in found if curve["rank"] == found[0]["rank"]]
    if not found:
        return None
    figure, (losses, apart) = pyplot.subplots(1, 2, figsize=(10.5, 3.9), layout="constrained")
    of = {(curve["provider"], curve["seed"]): curve["losses"] for curve in found}
    seeds = sorted({seed for _, seed in of})
    styles = {"peft_lora": (3.0, 0.35, "-"), "peft_dora": (2.2, 0.5, "-"), "ours": (1.0, 1.0, "--")}
    for name, (width, alpha, style) in styles.items():
        for seed in seeds:
            if (name, seed) in of:
                means = running_mean(of[name, seed])
                losses.plot(
                    list(means), list(means.values()), style, color=COLORS[name], linewidth=width, alpha=alpha,
                    label=LABELS[name] if seed == seeds[0] else None,
                )  # fmt: skip
    losses.set(xlabel="step", ylabel=f"training loss, mean of the last {MEAN_OF} steps")
    losses.legend()
    pairs: list[tuple[Any, Any, str, str]] = [
        (("ours", seed), ("peft_dora", seed), COLORS["ours"], "ours to stock, the same seed") for seed in seeds
    ]
    pairs += [
        (("peft_dora", a), ("peft_dora", b), COLORS["peft_dora"], "stock, seed to seed")
        for a in seeds for b in seeds if a < b
    ]  # fmt: skip
    for one, other, color, label in pairs:
        if one in of and other in of:
            gap = [max(abs(a - b), NO_GAP) for a, b in zip(of[one], of[other])]
            known = apart.get_legend_handles_labels()[1]
            steps = range(1, len(gap) + 1)
            apart.plot(steps, gap, color=color, linewidth=0.9, label=None if label in known else label)
    apart.set(xlabel="step", ylabel=f"difference of the losses ({NO_GAP:.0e}: none)", yscale="log")
    apart.legend()
    words = f"SmolLM2-135M on real prose, {found[0]['tokens']} tokens a step, {len(seeds)} seeds"
    return _titled(figure, record, words)


def running_mean(losses: Sequence[float], width: int = MEAN_OF) -> Curve:
    """The mean of the last `width` losses by step, from the first step that has so many: means of fewer would jump."""
    return {step: statistics.fmean(losses[step - width : step]) for step in range(width, len(losses) + 1)}


def classify(record: Record) -> Figure | None:
    """Accuracy on held-out examples by rank, a dot for each seed."""
    found = [curve for curve in record["curves"] if curve["suite"] == "classify"]
    if not found:
        return None
    figure, panel = pyplot.subplots(figsize=(6.5, 3.6), layout="constrained")
    names = [name for name in ("peft_lora", "peft_dora", "ours") if any(c["provider"] == name for c in found)]
    ranks = sorted({curve["rank"] for curve in found})
    for index, name in enumerate(names):
        points = [
            (ranks.index(curve["rank"]) + 0.2 * (index - 1), 100 * curve["accuracy"])
            for curve in found if curve["provider"] == name
        ]  # fmt: skip
        panel.plot(*zip(*points), MARKERS.get(name, "o"), color=COLORS[name], label=LABELS[name], alpha=0.8)
    panel.set(xticks=range(len(ranks)), xticklabels=[f"rank {rank}" for rank in ranks], ylabel="held-out accuracy, %")
    panel.legend()
    return _titled(figure, record, "MiniLM encoder: which part of Python's library a docstring is from")


FIGURES: dict[str, Callable[[Record], Figure | None]] = {
    "growth": growth, "roofline": roofline, "memory": memory, "model": model, "curves": curves, "classify": classify,
}  # fmt: skip


def draw(record: Record, names: Iterable[str] | None = None) -> dict[str, Figure]:
    """Those figures, or all, that the record has something for; the caller closes them."""
    made = {name: FIGURES[name](record) for name in names or FIGURES}
    return {name: figure for name, figure in made.items() if figure is not None}


def merged(records: Sequence[Record]) -> Record:
    """The first record with the rows and curves of all, and where each was measured."""
    first = records[0]
    origins = "\n".join(dict.fromkeys(map(_origin, records)))
    together = {key: [row for one in records for row in one[key]] for key in ("rows", "curves")}
    return {**first, "origins": origins, **together}


def save(figure: Figure, target: Any, suffix: str) -> None:
    """Into a file or a buffer, the same bytes each time, and close it."""
    figure.savefig(target, format=suffix, dpi=150, metadata={"Date": None} if suffix == "svg" else None)
    pyplot.close(figure)


def write(figures: dict[Path, Figure]) -> list[Path]:
    """Figures by their path; none is there before all are drawn."""
    paths: dict[Path, Path] = {}
    try:
        for path, figure in figures.items():
            paths[path] = path.with_name(f".{path.name}.tmp-{os.getpid()}")
            save(figure, paths[path], path.suffix.removeprefix("."))
        for path, temporary in paths.items():
            os.replace(temporary, path)
    finally:
        for temporary in paths.values():
            temporary.unlink(missing_ok=True)
    return list(paths)


def _panels(count: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    figure, axes = pyplot.subplots(1, count, figsize=(width * count, height), layout="constrained", squeeze=False)
    return figure, list(axes[0])


def _line(panel: Axes, name: str, curve: Curve) -> None:
    ordered = dict(sorted(curve.items()))
    width = 1.8 if name == "ours" else 1.0
    panel.plot(
        list(ordered), list(ordered.values()), MARKERS.get(name, ".") + "-", color=COLORS[name], label=LABELS[name],
        markersize=4, linewidth=width,
    )  # fmt: skip


def _bars(panel: Axes, names: Sequence[str], values: Sequence[float], form: str) -> None:
    places = range(len(names))
    panel.barh(places, values, color=[COLORS[name] for name in names], height=0.7)
    panel.set_yticks(places, [LABELS[name] for name in names])
    panel.invert_yaxis()
    for place, value in zip(places, values):
        panel.annotate(form.format(value), (value, place), (3, 0), textcoords="offset points", va="center", fontsize=8)
    panel.set_xlim(0, max([*values, 0]) * 1.18 or 1)


def _legend(figure: Figure, axes: Iterable[Axes]) -> None:
    """One for all panels, below them."""
    handles: dict[str, Any] = {}
    for panel in axes:
        for handle, label in zip(*panel.get_legend_handles_labels()):
            handles.setdefault(label, handle)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)


def _titled(figure: Figure, record: Record, words: str) -> Figure:
    figure.suptitle(f"{words}\n{record.get('origins') or _origin(record)}", fontsize=9)
    return figure


def _origin(record: Record) -> str:
    """Machine, versions, commit, date, and whether others used the machine too."""
    versions = record["versions"]
    peft = f", peft {versions['peft']}" if "peft" in versions else ""
    busy = ", on a busy machine" if disturbed(record) else ""
    where = f"{machine_of(record['hardware'])}, torch {versions['torch']}{peft}"
    return f"{where}, {commit_of(record)}, {record['date']}{busy}"
