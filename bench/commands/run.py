"""Measure, side by side in one process, and check every result against float64 before it is timed.

Providers take turns: the ratio of two is the median over rounds of the quotient within a round, so that a drifting
machine favours none. A provider that is not installed is named; a wrong result is marked and fails the run.

Exit status 1 if anything failed: a stage, or a provider whose error exceeds its limit; 2 for bad input.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import machine
from bench.providers import LABELS
from bench.suites import DEFAULT, SUITES

DTYPES = ("fp32", "bf16", "fp16", "bf16+fp32", "bf16/fp32")
LONG = ("fidelity", "finetune", "classify")
"""Suites that may take longer than five minutes."""
FOLDER = Path("bench-output")


class Several(argparse.Action):
    """Values after one option or several, with spaces or commas between them."""

    def __call__(self, parser: Any, given: Any, values: Any, option: str | None = None) -> None:
        """Add them, each once."""
        kept = list(getattr(given, self.dest) or []) if getattr(given, f"_{self.dest}_given", False) else []
        setattr(given, f"_{self.dest}_given", True)
        setattr(given, self.dest, list(dict.fromkeys([*kept, *(value for part in values for value in part)])))


def names(allowed: Any, what: str) -> Any:
    def parse(text: str) -> list[str]:
        found = [name for name in text.replace("-", "_").split(",") if name]
        if not found:
            raise argparse.ArgumentTypeError(f"expected a name, got {text!r}")
        for name in found:
            if name not in allowed:
                raise argparse.ArgumentTypeError(f"there is no {what} {name!r}, only {', '.join(allowed)}")
        return found

    return parse


def counts(text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",") if part]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise argparse.ArgumentTypeError(f"expected whole numbers of at least 1, got {text!r}")
    return found


def _seeds(text: str) -> list[int]:
    if not all(part.isdigit() for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"expected whole numbers of at least 0, got {text!r}")
    return [int(part) for part in text.split(",")]


def count(text: str) -> int:
    found = counts(text)
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
    hidden, wide, heads, kv_heads = map(int, sizes)
    if hidden % (2 * heads) or heads % kv_heads:
        raise argparse.ArgumentTypeError(
            f"expected an even width for each head, and heads that the key and value heads divide, got {text!r}"
        )
    return hidden, wide, heads, kv_heads


def add_shape_arguments(parser: argparse.ArgumentParser, suites: Sequence[str], default: Sequence[str]) -> None:
    """What is measured, where, and whose; shared with `compare`."""
    several: dict[str, Any] = {"action": Several, "nargs": "+", "metavar": "N", "type": counts}
    named: dict[str, Any] = {"action": Several, "nargs": "+", "metavar": "NAME"}
    described = "\n".join(f"  {name:9} {SUITES[name]}" for name in suites)
    parser.epilog = f"suites ({', '.join(default)} where none is named):\n{described}"
    parser.add_argument("--suite", **named, type=names(suites, "suite"), default=default, help="see below")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    parser.add_argument(
        "--dtype", **named, type=names(DTYPES, "dtype"),
        help="fp32, bf16, fp16; bf16+fp32: float32 adapters on a bfloat16 layer, PEFT's default, under autocast; "
        "bf16/fp32: the same without autocast",
    )  # fmt: skip
    parser.add_argument("--hidden", **several, help="in_features and out_features")
    parser.add_argument("--rank", **several)
    parser.add_argument("--tokens", **several)
    parser.add_argument("--providers", **named, type=names(LABELS, "provider"), help=", ".join(LABELS))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m bench run`."""
    add_shape_arguments(parser, list(SUITES), DEFAULT)
    parser.add_argument(
        "--block", type=_block, metavar="HxIxAxK",
        help="of the suite block: hidden and intermediate size, attention heads, key and value heads",
    )  # fmt: skip
    parser.add_argument("--steps", type=count, default=200, metavar="N", help="of finetune and classify (200)")
    parser.add_argument(
        "--seeds", action=Several, nargs="+", type=_seeds, default=(0, 1, 2), metavar="N", help="of the same (0 1 2)"
    )
    parser.add_argument("--rounds", type=count, default=21, metavar="N", help="of a comparison, at most (21)")
    parser.add_argument("--sample-ms", type=_seconds, default=4.0, metavar="MS", help="length of one sample, about (4)")
    parser.add_argument(
        "--limit-s", type=_seconds, metavar="S", help="no stage begins after this (300; the long suites: 7200)"
    )
    parser.add_argument("--out", type=Path, help="the record, a new .json file (default: bench-output/TIME.json)")
    parser.add_argument("--html", type=Path, metavar="FILE", help="a report with pictures, one new .html file")


def checked_device(name: str | None, parser: argparse.ArgumentParser) -> str:
    """The device's name, or exit status 2."""
    import torch

    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        parser.error(f"--device: expected cpu, cuda or cuda:N, got {name!r}")
    if device.type not in ("cpu", "cuda"):
        parser.error(f"--device: expected cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {name}: no GPU that torch can use; --device cpu runs on the CPU")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        parser.error(f"--device {name}: there are {torch.cuda.device_count()} GPUs")
    return name


def dtypes(given: argparse.Namespace, device: str) -> list[str]:
    """Those asked for, or what is usual on the device."""
    return given.dtype or (["bf16", "bf16+fp32"] if device.startswith("cuda") else ["fp32"])


def _new_files(given: argparse.Namespace, parser: argparse.ArgumentParser) -> Path:
    """The record's path; exit status 2 for files that are there already, or have no place."""
    for option, path, suffix in (("--out", given.out, ".json"), ("--html", given.html, ".html")):
        if path is None:
            continue
        if path.suffix != suffix:
            parser.error(f"{option} {path}: expected a name that ends in {suffix}")
        for one in (path, path.with_suffix(".csv")) if suffix == ".json" else (path,):
            if one.exists():
                parser.error(f"{option} {one}: there is such a file; earlier results are never overwritten")
        if not path.parent.is_dir():
            parser.error(f"{option} {path}: there is no folder {path.parent}")
        if not os.access(path.parent, os.W_OK):
            parser.error(f"{option} {path}: the folder {path.parent} cannot be written to")
    if given.out:
        return Path(given.out)
    try:
        FOLDER.mkdir(exist_ok=True)
    except OSError as error:
        parser.error(f"{FOLDER}, where records go: {error.strerror}")
    return FOLDER / time.strftime(f"%Y-%m-%d-%H%M%S-{os.getpid()}.json")


def run(given: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Measure and show."""
    machine.wait_passively()  # before torch is imported
    machine.quiet_libraries()
    device = checked_device(given.device, parser)
    out = _new_files(given, parser)
    try:
        from bench import show
        from bench.run import Options, Run

        if given.html:
            from bench import html
    except ModuleNotFoundError as error:
        parser.error(f"{error.name} is not installed: pip install 'dora-kernels[bench]'")
    limit = given.limit_s or (7200.0 if set(LONG) & set(given.suite) else 300.0)
    one = Run(Options(
        suites=given.suite, device=device, dtypes=dtypes(given, device), hidden=given.hidden, ranks=given.rank,
        tokens=given.tokens, providers=given.providers, block=given.block, steps=given.steps, seeds=given.seeds,
        rounds=given.rounds, sample_ms=given.sample_ms, limit_s=limit, folder=FOLDER, out=out,
    ))  # fmt: skip
    try:
        one.all()
    except OSError as error:
        parser.error(f"{out}: {error.strerror or error}")
    show.show(one.record, show.console())
    print(f"record: {out}")
    if given.html:
        html.write(one.record, given.html)
        print(f"report: {given.html}")
    return 1 if one.record["failures"] else 0
