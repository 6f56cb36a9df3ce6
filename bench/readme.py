"""Render README.md's table of the demo from the newest committed result: `python -m bench.readme [--check]`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- demo: rendered by `python -m bench.readme` -->", "<!-- demo: end -->"
LABELS = {
    "stock": "PEFT DoRA",
    "patched": "**PEFT DoRA + `patch_peft`**",
    "lora": "PEFT LoRA",
    "frozen": "control: magnitude frozen",
    "stale": "control: norm never refreshed",
}


def newest() -> Path:
    """The demo's newest result; names begin with the date."""
    return max((ROOT / "bench" / "results").glob("*-demo-*.json"))


def table(result: dict[str, Any]) -> str:
    """The markdown between the markers."""
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
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n\n" + note


def _timed(seconds: float, ratio: float) -> str:
    return f"{seconds * 1e3:.0f} ms ({ratio:.2f}× LoRA)"


def _same(difference: float | None) -> str:
    if difference is None:
        return ""
    return f"yes, within {difference:.1e}" if difference <= 1e-5 else f"**no**, off by {difference:.1e}"


def rendered(text: str) -> str:
    """`text` with the part between the markers replaced."""
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n{table(json.loads(newest().read_text(encoding='utf-8')))}\n{END}{after}"


def main() -> int:
    """Rewrite README.md, or with --check say whether it would change (exit status 1)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if README.md is out of date")
    path = ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    new = rendered(text)
    if parser.parse_args().check:
        return int(new != text)
    temporary = path.with_name("README.md.tmp")
    temporary.write_text(new, encoding="utf-8")
    os.replace(temporary, path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
