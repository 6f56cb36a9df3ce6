"""Render the documents' tables from the newest committed results: `python -m bench.readme [--check]`."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LABELS = {
    "stock": "PEFT DoRA",
    "patched": "**PEFT DoRA + `patch_peft`**",
    "lora": "PEFT LoRA",
    "frozen": "control: magnitude frozen",
    "stale": "control: norm never refreshed",
}


def newest(kind: str) -> dict[str, Any]:
    """The newest result of a kind; names begin with the date."""
    path = max((ROOT / "bench" / "results").glob(f"*-{kind}-*.json"))
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def demo_table(result: dict[str, Any]) -> str:
    """The demo's three runs and two controls."""
    variants = result["variants"]
    lengths = list(variants["lora"]["step_seconds"])
    steps = [f"step, {length} tokens" for length in lengths]
    head = ["", *steps, "generated token", "peak memory", "same losses as PEFT DoRA"]
    rows = [head, ["---"] + ["---:"] * (len(head) - 2) + ["---"]]
    for kind, label in LABELS.items():
        variant = variants[kind]
        cells = [label]
        for length in lengths:
            seconds = variant["step_seconds"].get(length)
            cells.append("" if seconds is None else _timed(seconds, variant["step_ratio"][length]))
        token, peak = variant["token_seconds"], variant["peak_bytes"]
        cells.append("" if token is None else _timed(token, variant["token_ratio"]))
        cells.append("" if peak is None else f"{peak / 2**20:.0f} MiB")
        cells.append(_same(variant["loss_difference"]))
        rows.append(cells)
    hardware, versions, settings = result["hardware"], result["versions"], result["settings"]
    place = hardware["gpu"] or f"{hardware['cpu']}, {hardware['threads']} threads"
    note = (
        f"{settings['model']}, all linear layers, rank {settings['rank']}, float32, on {place}; "
        f"torch {versions['torch']}, peft {versions['peft']}; ratios are medians over steps run in turn, "
        "in one process."
    )
    return _markdown(rows) + "\n\n" + note


def norm_table(result: dict[str, Any]) -> str:
    """PEFT's norm over ours, and ours in milliseconds."""
    found = {(row["dtypes"], row["shape"], row["rank"], row["provider"]): row for row in result["kernels"]}
    ranks = sorted({row["rank"] for row in result["kernels"]})
    rows = [["W and adapters", "shape", *(f"rank {rank}" for rank in ranks)], ["---", "---"] + ["---:"] * len(ranks)]
    for dtypes, shape in dict.fromkeys(key[:2] for key in found):
        cells = []
        for rank in ranks:
            ours, peft = (found[dtypes, shape, rank, provider] for provider in ("ours", "peft"))
            cells.append(f"{peft['ratio_to_ours']:.1f}× ({ours['us'] / 1e3:.1f} ms)")
        rows.append([dtypes, shape, *cells])
    note = (
        f"{_place(result)}; medians over calls made in turn, in one process, W not in the cache. "
        f"Largest errors against float64, relative: ours {_worst(result, 'ours')}, PEFT's {_worst(result, 'peft')}."
    )
    return _markdown(rows) + "\n\n" + note


def layer_table(result: dict[str, Any]) -> str:
    """Steps and inference over PEFT's LoRA: ours, and PEFT's DoRA in brackets."""
    ratios: dict[tuple[str, int, str], dict[int, dict[str, float]]] = {}
    for row in result["layers"]:
        for part, words in (("step", "step of {} tokens four times"), ("inference", "inference, {} token(s)")):
            if part in row:
                key = row["dtypes"], row["hidden"], words.format(row["tokens"])
                ratios.setdefault(key, {}).setdefault(row["rank"], {})[row["provider"]] = row[part]["ratio_to_lora"]
    ranks = sorted({row["rank"] for row in result["layers"]})
    rows = [["dtypes", "hidden", "", *(f"rank {rank}" for rank in ranks)]]
    rows.append(["---", "---:", "---"] + ["---:"] * len(ranks))
    for (dtypes, hidden, words), by_rank in ratios.items():
        cells = [(by_rank[rank]["ours_patched"], by_rank[rank]["peft_dora"]) for rank in ranks]
        rows.append([dtypes, str(hidden), words, *(f"{ours:.2f} ({peft:.2f})" for ours, peft in cells)])
    steps = [row for row in result["layers"] if "step" in row and row["provider"] == "ours_patched"]
    mean = statistics.geometric_mean(row["step"]["ratio_to_lora"] for row in steps)
    note = (
        f"{_place(result)}; medians over runs made in turn, in one process. Over all steps the geometric mean of ours "
        f"is {mean:.3f}."
    )
    return _markdown(rows) + "\n\n" + note


def _place(result: dict[str, Any]) -> str:
    hardware, versions = result["hardware"], result["versions"]
    return (
        f"{hardware['device']}, {hardware['threads']} threads; torch {versions['torch']}, peft {versions['peft']}; "
        f"commit {result['commit'][:7]}"
    )


def _worst(result: dict[str, Any], provider: str) -> str:
    errors: dict[str, float] = {}
    for row in result["kernels"]:
        if row["provider"] == provider:
            errors[row["dtypes"]] = max(errors.get(row["dtypes"], 0.0), row["error"])
    return ", ".join(f"{error:.0e} ({dtypes})" for dtypes, error in errors.items())


def _markdown(rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _timed(seconds: float, ratio: float) -> str:
    return f"{seconds * 1e3:.0f} ms ({ratio:.2f}× LoRA)"


def _same(difference: float | None) -> str:
    if difference is None:
        return ""
    return f"yes, within {difference:.1e}" if difference <= 1e-5 else f"**no**, off by {difference:.1e}"


TABLES: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "demo": ("README.md", demo_table),
    "norm": ("docs/benchmarks.md", norm_table),
    "layer": ("docs/benchmarks.md", layer_table),
}
"""Of each kind of result, the document and what is written into it between the markers."""


def documents() -> dict[Path, str]:
    """Every document with its tables rendered anew."""
    texts: dict[Path, str] = {}
    for kind, (name, table) in TABLES.items():
        path = ROOT / name
        text = texts.get(path) or path.read_text(encoding="utf-8")
        begin, end = f"<!-- {kind}: rendered by `python -m bench.readme` -->", f"<!-- {kind}: end -->"
        before, rest = text.split(begin)
        texts[path] = f"{before}{begin}\n{table(newest(kind))}\n{end}{rest.split(end)[1]}"
    return texts


def main() -> int:
    """Rewrite the documents, or with --check say whether one would change (exit status 1)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a document is out of date")
    check = parser.parse_args().check
    for path, text in documents().items():
        if check and path.read_text(encoding="utf-8") != text:
            return 1
        if not check:
            temporary = path.with_name(f"{path.name}.tmp")
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
