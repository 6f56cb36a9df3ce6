"""The table on the screen and the picture."""

from __future__ import annotations

import io
import os
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from rich import box
from rich.console import Console
from rich.table import Table

from bench.demo.results import Results, Variant, failures, targets
from bench.demo.settings import CONTROLS, LABELS, LOSS_LIMIT, MAIN
from bench.record import replace

COLOURS = {
    "stock": "tab:orange",
    "patched": "tab:blue",
    "lora": "tab:gray",
    "frozen": "tab:red",
    "stale": "tab:purple",
}
EMPTY = "–"
WIDTH = 100  # where there is no terminal to ask


def table(results: Results) -> Table:
    """All variants and controls, one row each; it fits 80 columns."""
    lengths = list(results.variants["lora"].step_seconds)
    found = Table(
        title="Fine-tuned side by side, interleaved step by step",
        caption="×: times PEFT LoRA, median of neighbouring pairs",
        box=box.HORIZONTALS,
        show_lines=True,
        padding=0,
    )
    found.add_column("variant", min_width=12)
    for length in lengths:
        found.add_column(f"step,\n{length}\ntokens", justify="right", no_wrap=True)
    for name in (
        "peak\nmemory",
        "one\ntoken\nmade",
        "held-out\nloss\n→ after",
        "largest\n|m/‖V‖\n− 1|",
        "loss gap\nto stock\nDoRA",
    ):
        found.add_column(name, justify="right", no_wrap=True)
    for kind, variant in results.variants.items():
        found.add_row(LABELS[kind], *_cells(variant, lengths))
    return found


def _cells(variant: Variant, lengths: list[int]) -> list[str]:
    cells = [EMPTY] * len(lengths)
    for place, length in enumerate(lengths):
        if length in variant.step_seconds:
            cells[place] = (
                f"{variant.step_seconds[length] * 1e3:.0f} ms\n{variant.step_ratio[length]:.2f} ×"
                f"\n{variant.tokens_per_second(length):.0f} tok/s"
            )
    peak, token, held_out, rescale = [EMPTY] * 4
    if variant.peak_bytes is not None:
        peak = f"{variant.peak_bytes / 2**20:.0f} MiB"
    if variant.token_seconds is not None:
        token = f"{variant.token_seconds * 1e3:.0f} ms\n{variant.token_ratio:.2f} ×"
    if variant.held_out_after is not None:
        held_out = f"{variant.held_out_before:.4f}\n→ {variant.held_out_after:.4f}"
    if variant.largest_rescale is not None:
        rescale = f"{variant.largest_rescale:.2%}"
    return [*cells, peak, token, held_out, rescale, _verdict(variant)]


def _verdict(variant: Variant) -> str:
    if variant.loss_difference is None:
        return "(stock)" if variant.kind == "stock" else EMPTY
    word = "[green]PASS[/green]" if variant.same_numbers else "[red]FAIL[/red]"
    if variant.kind in CONTROLS:
        word += ", but\nmust not" if variant.same_numbers else ", as\nit must"
    return f"{variant.loss_difference:.1e}\n{word}"


def show(results: Results, console: Console) -> None:
    """Print the table, the targets, the samples and what went wrong."""
    machine = results.hardware
    place = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} threads"
    chosen = results.settings
    console.print(table(results))
    console.print(
        f"{chosen['model']}, rank {chosen['rank']}, float32, learning rate {chosen['lr']:g}, "
        f"{chosen['data']}; {place}; torch {results.versions.get('torch')}, "
        f"peft {results.versions.get('peft')}; {results.patched_layers} layers patched, "
        f"{results.skipped_layers} skipped",
        highlight=False,
        markup=False,
    )
    console.print()
    for target in targets(results):
        value = EMPTY if target.value is None else f"{target.value:.3g}"
        word = "[green]met[/green]" if target.met else "[yellow]missed[/yellow]"
        console.print(f"{target.name}: {value} (target ≤ {target.limit:g}): {word}", highlight=False)
    saved = results.saved
    if saved:
        console.print(
            "saved adapter in stock PEFT, without dora_kernels: merged and unmerged logits differ by "
            f"{saved['merged_vs_unmerged']:.1e} of the largest logit, and from the patched "
            f"model's by {saved['stock_vs_patched']:.1e}",
            highlight=False,
        )
    console.print()
    for name, text in results.sample.items():
        console.print(f"[bold]{name}:[/bold]", end=" ")
        console.print(text.strip() or "(nothing)", highlight=False, markup=False)
    for note in results.notes:
        console.print(f"note: {note}", highlight=False, markup=False)
    for failure in failures(results):
        console.print(f"[red]failed:[/red] {failure}", highlight=False)


def write_text(results: Results, path: Path) -> None:
    """The same report as plain text."""
    stream = io.StringIO()
    show(results, Console(file=stream, width=WIDTH, color_system=None))
    replace(path, stream.getvalue())


def draw(results: Results, path: Path) -> None:
    """Loss curves, distance to stock, and bars of step and token times."""
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    lengths = list(results.variants["lora"].step_seconds)
    _loss_curves(axes[0][0], results, lengths[-1])
    _distances(axes[0][1], results, lengths[0])
    _step_bars(axes[1][0], results, lengths)
    _token_bars(axes[1][1], results)
    for axis in axes[0]:
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    figure.savefig(temporary, format="png", dpi=120)
    pyplot.close(figure)
    os.replace(temporary, path)


def _loss_curves(axis: Axes, results: Results, length: int) -> None:
    styles = {"stock": ("-", 4, 0.5), "patched": ("--", 1.6, 1.0), "lora": (":", 1.6, 1.0)}
    for kind in MAIN:
        line, width, alpha = styles[kind]
        losses = results.variants[kind].losses[length]
        axis.plot(
            range(1, len(losses) + 1),
            losses,
            line,
            linewidth=width,
            alpha=alpha,
            color=COLOURS[kind],
            label=LABELS[kind],
        )
    axis.set(title=f"Training loss, {length} tokens per step", xlabel="step", ylabel="loss")
    axis.legend()


def _distances(axis: Axes, results: Results, length: int) -> None:
    reference = results.variants["stock"].losses[length]
    floor = 1e-8
    for kind in ("patched", *CONTROLS):
        losses = results.variants[kind].losses[length]
        gaps = [max(floor, abs(a - b)) for a, b in zip(losses, reference, strict=False)]
        axis.semilogy(range(1, len(gaps) + 1), gaps, color=COLOURS[kind], label=LABELS[kind])
    axis.axhline(LOSS_LIMIT, color="black", linestyle=":", label=f"limit {LOSS_LIMIT:g}")
    axis.set(title=f"|loss − stock DoRA's loss|, {length} tokens", xlabel="step", ylim=(floor / 2, 10))
    axis.legend(loc="upper center", ncols=2, fontsize="small")


def _step_bars(axis: Axes, results: Results, lengths: list[int]) -> None:
    width = 0.8 / len(MAIN)
    for place, kind in enumerate(MAIN):
        variant = results.variants[kind]
        bars = axis.bar(
            [index + (place - 1) * width for index in range(len(lengths))],
            [variant.step_seconds[length] * 1e3 for length in lengths],
            width,
            color=COLOURS[kind],
            label=LABELS[kind],
        )
        axis.bar_label(bars, [f"{variant.step_ratio[length]:.2f}×" for length in lengths])
    axis.set_xticks(range(len(lengths)), [f"{length} tokens" for length in lengths])
    axis.set(title="Median training step (× LoRA)", ylabel="ms")
    axis.margins(y=0.15)
    axis.legend()


def _token_bars(axis: Axes, results: Results) -> None:
    shown = [results.variants[kind] for kind in MAIN]
    bars = axis.bar(
        [LABELS[variant.kind] for variant in shown],
        [(variant.token_seconds or 0.0) * 1e3 for variant in shown],
        color=[COLOURS[variant.kind] for variant in shown],
    )
    axis.bar_label(bars, [f"{variant.token_ratio or 0.0:.2f}×" for variant in shown])
    axis.set(title="Median generated token, adapter unmerged (× LoRA)", ylabel="ms")
    axis.margins(y=0.15)
