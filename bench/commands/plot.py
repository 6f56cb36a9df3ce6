r"""How the cost of a training step grows with tokens and with rank, drawn from a record of optimizer steps.

    python -m bench.layer --device cpu --only steps --hidden 1024 --tokens 128 256 512 1024 2048 \
        --ranks 16 64 192 384 768 --dtypes fp32 --limit-s 600 --out bench/results/DATE-scale-cpu.json
    python -m bench plot                                    the newest of these, into docs/scale.svg
    python -m bench plot RECORD --out FILE                  another record; .svg, .png or .pdf

A step is four micro-batches of the record's tokens. A thin line is the straight line nearest to ours, and R² how much
of the growth it explains. Exit status 2 if there is no record, or if it has no steps at three token counts and three
ranks.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

SUMMARY = "a step's cost over tokens and rank, as a picture"
_REPOSITORY = Path(__file__).resolve().parents[1]
_FORMATS = (".svg", ".png", ".pdf")
_NAMES = {"peft_dora": "PEFT DoRA", "peft_lora": "PEFT LoRA", "ours_patched": "PEFT DoRA + patch_peft"}
_COLORS = {"peft_dora": "#b0413e", "peft_lora": "#7f7f7f", "ours_patched": "#1f5fa8"}

Curve = dict[int, float]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m bench plot`."""
    parser.add_argument("record", type=Path, nargs="?", help="default: the newest bench/results/*-scale-*.json")
    parser.add_argument("--out", type=Path, default=_REPOSITORY / "docs" / "scale.svg", help="default: docs/scale.svg")


def run(given: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Draw it."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        parser.error("matplotlib is not installed: pip install 'dora-kernels[test]'")
    matplotlib.use("Agg")
    kept = sorted((_REPOSITORY / "bench" / "results").glob("*-scale-*.json"))
    path = given.record or (kept[-1] if kept else parser.error("there is no bench/results/*-scale-*.json"))
    if given.out.suffix not in _FORMATS:
        parser.error(f"--out {given.out}: expected a name that ends in one of {', '.join(_FORMATS)}")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        over_tokens, over_rank = curves(record)
    except OSError as error:
        parser.error(f"{path}: {error.strerror}")
    except (KeyError, TypeError):
        parser.error(f"{path}: not a record of `python -m bench.layer`")
    except ValueError as error:  # no JSON, too few steps
        parser.error(f"{path}: not a record of optimizer steps: {error}")
    temporary = given.out.with_name(f"{given.out.stem}.tmp-{os.getpid()}{given.out.suffix}")
    try:
        draw(record, over_tokens, over_rank, temporary)
        os.replace(temporary, given.out)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        parser.error(f"--out {given.out}: {error.strerror}")
    print(f"{given.out}: steps of {path.name}")
    return 0


def curves(record: dict[str, Any]) -> tuple[dict[str, Curve], dict[str, Curve]]:
    """Milliseconds by tokens at the smallest rank, and by rank at the most tokens, of each provider.

    A step's tokens are those of all its micro-batches.
    """
    from bench.layer.providers import MICRO_BATCHES

    rows = [row for row in record["layers"] if "step" in row]
    ranks, tokens = {row["rank"] for row in rows}, {row["tokens"] for row in rows}
    if len(ranks) < 3 or len(tokens) < 3:
        raise ValueError(f"expected steps at three token counts and three ranks, got {sorted(tokens)}, {sorted(ranks)}")
    over_tokens: dict[str, Curve] = {name: {} for name in _NAMES}
    over_rank: dict[str, Curve] = {name: {} for name in _NAMES}
    for row in rows:
        if row["rank"] == min(ranks):
            over_tokens[row["provider"]][MICRO_BATCHES * row["tokens"]] = row["step"]["ms"]
        if row["tokens"] == max(tokens):
            over_rank[row["provider"]][row["rank"]] = row["step"]["ms"]
    return over_tokens, over_rank


def straight(curve: Curve) -> tuple[float, float, float]:
    """The nearest straight line's value at 0 and slope, and R²."""
    count, xs, ys = len(curve), list(curve), list(curve.values())
    x_mean, y_mean = sum(xs) / count, sum(ys) / count
    spread = sum((x - x_mean) ** 2 for x in xs)
    slope = sum((x - x_mean) * (y - y_mean) for x, y in curve.items()) / spread
    start = y_mean - slope * x_mean
    left = sum((y - start - slope * x) ** 2 for x, y in curve.items())
    return start, slope, 1.0 - left / sum((y - y_mean) ** 2 for y in ys)


def draw(record: dict[str, Any], over_tokens: dict[str, Curve], over_rank: dict[str, Curve], path: Path) -> None:
    """Two panels beside each other, linear axes that start at 0."""
    from matplotlib import pyplot

    rows = [row for row in record["layers"] if "step" in row]
    hidden, rank = rows[0]["hidden"], min(row["rank"] for row in rows)
    most = max(over_tokens["ours_patched"])
    pyplot.rcParams.update({"svg.hashsalt": "dora_kernels", "svg.fonttype": "none", "font.size": 10})
    figure, panels = pyplot.subplots(1, 2, figsize=(9.5, 3.9), layout="constrained")
    for panel, curves_, label, title in (
        (panels[0], over_tokens, "tokens in a step", f"rank {rank}"),
        (panels[1], over_rank, "rank", f"{most} tokens in a step"),
    ):
        for name, words in _NAMES.items():
            curve = dict(sorted(curves_[name].items()))
            panel.plot(list(curve), list(curve.values()), "o-", color=_COLORS[name], label=words, markersize=4)
        ours = curves_["ours_patched"]
        start, slope, explained = straight(ours)
        ends = [0, max(ours)]
        panel.plot(
            ends, [start + slope * x for x in ends],
            linewidth=0.8, color="black", label=f"straight line, R² = {explained:.4f}",
        )  # fmt: skip
        panel.set(xlabel=label, ylabel="milliseconds", title=title, xlim=(0, None), ylim=(0, None))
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False, fontsize=9)
    hardware, versions = record["hardware"], record["versions"]
    figure.suptitle(
        f"One {hidden}x{hidden} layer, {rows[0]['dtypes']}, optimizer step, {hardware['device']}, "
        f"{hardware['threads']} threads, torch {versions['torch']}, peft {versions['peft']}, {record['commit'][:7]}",
        fontsize=9,
    )
    dateless = {"Date": None} if path.suffix == ".svg" else None
    figure.savefig(path, dpi=150, metadata=dateless)
    pyplot.close(figure)
