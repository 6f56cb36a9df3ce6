"""Measure, side by side in one process, and check every result against float64 before it is timed.

Providers take turns: the ratio of two is the median over rounds of the quotient within a round, so that a drifting
machine favours none. A provider that is not installed is named; a wrong result is marked and fails the run.

Exit status 1 if anything failed: a stage, or a provider whose error exceeds its limit; 2 for bad input.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from bench import machine
from bench.providers import LABELS
from bench.suites import DEFAULT, SUITES

DTYPES = ("fp32", "bf16", "fp16", "bf16+fp32")


class Several(argparse.Action):
    """Values after one option or several, with spaces or commas between them."""

    def __call__(self, parser: Any, given: Any, values: Any, option: str | None = None) -> None:
        """Add them, each once."""
        kept = list(getattr(given, self.dest) or []) if getattr(given, f"_{self.dest}_given", False) else []
        setattr(given, f"_{self.dest}_given", True)
        setattr(given, self.dest, list(dict.fromkeys([*kept, *(value for part in values for value in part)])))


def _names(allowed: Any, what: str) -> Any:
    def parse(text: str) -> list[str]:
        names = [name for name in text.replace("-", "_").split(",") if name]
        for name in names:
            if name not in allowed:
                raise argparse.ArgumentTypeError(f"no {what} {name!r}; there are {', '.join(allowed)}")
        return names

    return parse


def _counts(text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",") if part]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise argparse.ArgumentTypeError(f"expected whole numbers of at least 1, got {text!r}")
    return found


def _count(text: str) -> int:
    found = _counts(text)
    if len(found) != 1:
        raise argparse.ArgumentTypeError(f"expected one whole number, got {text!r}")
    return found[0]


def _seconds(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not 0 < found < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return found


def _block(text: str) -> tuple[int, ...]:
    sizes = text.split("x")
    if len(sizes) != 4 or not all(size.isdigit() and int(size) for size in sizes):
        raise argparse.ArgumentTypeError(f"expected four sizes of at least 1, such as 4096x14336x32x8, got {text!r}")
    return tuple(map(int, sizes))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m bench run`."""
    suites = "\n".join(f"  {name:9} {words}" for name, words in SUITES.items())
    parser.epilog = f"suites ({', '.join(DEFAULT)} where none is named):\n{suites}"
    several: dict[str, Any] = {"action": Several, "nargs": "+", "metavar": "N", "type": _counts}
    names: dict[str, Any] = {"action": Several, "nargs": "+", "metavar": "NAME"}
    parser.add_argument("--suite", **names, type=_names(SUITES, "suite"), default=DEFAULT, help="see below")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    parser.add_argument(
        "--dtype", **names, type=_names(DTYPES, "dtype"),
        help="fp32, bf16, fp16 or bf16+fp32: float32 adapters on a bfloat16 layer under autocast, PEFT's default",
    )  # fmt: skip
    parser.add_argument("--hidden", **several, help="in_features and out_features")
    parser.add_argument("--rank", **several)
    parser.add_argument("--tokens", **several)
    parser.add_argument("--providers", **names, type=_names(LABELS, "provider"), help=", ".join(LABELS))
    parser.add_argument(
        "--block", type=_block, default=(4096, 14336, 32, 8), metavar="HxIxAxK",
        help="of the suite block: hidden and intermediate size, attention heads, key and value heads",
    )  # fmt: skip
    parser.add_argument("--steps", type=_count, default=200, metavar="N", help="of finetune and classify")
    parser.add_argument("--seeds", type=_count, default=3, metavar="N", help="of finetune and classify")
    parser.add_argument("--rounds", type=_count, default=21, metavar="N", help="of a comparison, at most")
    parser.add_argument("--sample-ms", type=_seconds, default=4.0, metavar="MS", help="length of one sample, about")
    parser.add_argument(
        "--limit-s", type=_seconds, metavar="S", help="no stage begins after this (300; finetune and classify: 7200)"
    )
    parser.add_argument("--out", type=Path, help="the record, a new .json file (default: bench-output/TIME.json)")
    parser.add_argument("--html", type=Path, metavar="FILE", help="a report with pictures, one file, a new one")


def run(given: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Measure and show."""
    long = {"finetune", "classify"} & set(given.suite)
    if long or "model" in given.suite:
        machine.wait_passively()
    import torch

    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        kind = torch.device(device).type
    except RuntimeError:
        kind = "unknown"
    if kind not in ("cpu", "cuda"):
        parser.error(f"--device: expected cpu, cuda or cuda:N, got {device!r}")
    if kind == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {device}: no GPU that torch can use; --device cpu runs on the CPU")
    if kind == "cuda" and (torch.device(device).index or 0) >= torch.cuda.device_count():
        parser.error(f"--device {device}: there are {torch.cuda.device_count()} GPUs")
    folder = Path("bench-output")
    out = given.out or folder / time.strftime("%Y-%m-%d-%H%M%S.json")
    for option, path, suffix in (("--out", out, ".json"), ("--html", given.html, ".html")):
        if path is None:
            continue
        if path.suffix != suffix:
            parser.error(f"{option} {path}: expected a name that ends in {suffix}")
        if path.exists():
            parser.error(f"{option} {path}: there is such a file; earlier results are never overwritten")
        if path == given.out and not path.parent.is_dir() or path == given.html and not path.parent.is_dir():
            parser.error(f"{option} {path}: there is no folder {path.parent}")

    from bench import show
    from bench.run import Options, Run

    out.parent.mkdir(parents=True, exist_ok=True)
    one = Run(Options(
        suites=given.suite, device=device, dtypes=given.dtype or (["bf16", "bf16+fp32"] if kind == "cuda" else ["fp32"]),
        hidden=given.hidden, ranks=given.rank, tokens=given.tokens, providers=given.providers, block=given.block,
        steps=given.steps, seeds=given.seeds, rounds=given.rounds, sample_ms=given.sample_ms,
        limit_s=given.limit_s or (7200.0 if long else 300.0), folder=folder, out=out,
    ))  # fmt: skip
    one.all()
    show.show(one.record, show.console())
    print(f"record: {out}")
    if given.html:
        from bench import html

        html.write(one.record, given.html)
        print(f"report: {given.html}")
    return 1 if one.record["failures"] else 0
