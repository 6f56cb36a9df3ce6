"""Benchmarks: is it faster than what you use now, by how much, where not, and how far from the limit.

    python -m bench run                 everything that fits into five minutes on two cores
    python -m bench run --suite layer decode --hidden 4096 --rank 16 64 --tokens 512
    python -m bench run --suite finetune        half an hour: learning curves from several seeds
    python -m bench compare v0.1.0      this working tree beside another revision; exit status 1 on a regression
    python -m bench plot RECORD         pictures of a record
    python -m bench report              docs/benchmarks.md and the README's tables, from bench/results
    python -m bench static              what the kernels move and multiply, without a GPU

`python -m bench COMMAND --help` explains a command. Exit status 2: bad input, in one line.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from bench import machine, record
from bench.providers import DTYPES, LABELS
from bench.suites import DEFAULT, LONG, SUITES

# Libraries are imported where they are needed: torch reads the environment that `run` sets, and `--help` needs none.

FOLDER = Path("bench-output")
FORMATS = ("svg", "png", "pdf")
COMPARED = ("norm", "compose", "layer", "decode", "host", "memory")
LEAST_ROUNDS = 8
"""Pairs, for their median to have an interval: `bench.compare.trimmed`."""
_DAMAGED = (AttributeError, IndexError, KeyError, TypeError, ValueError, ZeroDivisionError)
"""What a record that no run has written raises."""


class Parser(argparse.ArgumentParser):
    """argparse, with one line where it prints its usage too."""

    def error(self, message: str) -> NoReturn:
        """Exit status 2."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = Parser(prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (add_arguments, call) in COMMANDS.items():
        summary, _, description = (call.__doc__ or "").partition("\n")
        one = commands.add_parser(
            name, help=summary, description=f"{summary}\n{description}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        if words[:1] == [name]:  # what the static account needs is not imported for the others
            add_arguments(one)
        one.set_defaults(call=call, parser=one)
    given = parser.parse_args(words)
    try:
        status: int = given.call(given, given.parser)
        sys.stdout.flush()
    except ModuleNotFoundError as error:
        given.parser.error(f"{error.name} is not installed: pip install 'dora-kernels[bench]'")
    except BrokenPipeError:  # `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return status


def run(given: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Measure, side by side in one process, and check every result against float64 before it is timed.

    Providers take turns: the ratio of two is the median over rounds of the quotient within a round, so that a drifting
    machine favours none. A provider that is not installed is named; a wrong result is marked and fails the run.

    Exit status 1 if anything failed: a stage, or a provider whose error exceeds its limit; 2 for bad input.
    """
    machine.wait_passively()  # before torch is imported
    machine.quiet_libraries()
    chosen = _chosen(given, parser)
    out = _new_files(given, parser)
    from bench import show
    from bench.run import Options, Run

    if given.html:
        from bench import html
    limit = given.limit_s or (7200.0 if set(LONG) & set(given.suite) else 300.0)
    one = Run(Options(
        **chosen, block=given.block, steps=given.steps, seeds=given.seeds, rounds=given.rounds, limit_s=limit,
        folder=FOLDER, out=out,
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


def compare(given: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Measure the working tree's package beside another revision's, and name what became slower beyond noise.

        python -m bench compare HEAD~1
        python -m bench compare v0.1.0 --suite layer --hidden 2048 --rank 16 64

    Both run this working tree's benchmarks, in a process each, taking turns. Exit status 1 if something has become
    slower, takes more memory, is wrong or gone; 2 for bad input, such as a revision that these benchmarks cannot
    measure.
    """
    from bench import compare, show

    chosen = _chosen(given, parser)
    chosen["providers"] = given.providers or ["ours", "ours_triton", "ours_torch"]
    with tempfile.TemporaryDirectory() as folder:
        try:
            commit = compare.extract(given.revision, Path(folder))
            found = compare.compare_packages(Path(folder), chosen, given.rounds)
        except ValueError as error:
            parser.error(str(error))
        except RuntimeError as error:
            parser.error(f"{given.revision}: {error}")
    compare.show(found, f"{given.revision} ({commit[:10]})", show.console())
    return 1 if found.regressions or found.faults else 0


def plot(given: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Draw records: a step's time against tokens, rank and hidden size, kernels under the ceilings, memory, a model.

    Several records are drawn together, as one run's. What they have nothing for is left out; a figure is written whole
    or not at all. docs/figures is drawn by `python -m bench report`.
    """
    names = ", ".join(map(str, given.records))
    try:
        found = [record.read(path) for path in given.records]
    except record.RecordError as error:
        parser.error(str(error))
    from bench import plots

    try:
        given.out.mkdir(parents=True, exist_ok=True)
        drawn = plots.draw(plots.merged(found))
        written = plots.write({given.out / f"{name}.{given.format}": figure for name, figure in drawn.items()})
    except OSError as error:
        parser.error(f"--out {given.out}: {error.strerror}")
    except _DAMAGED as error:
        parser.error(f"{names}: not what a run writes: {type(error).__name__}: {error}")
    for path in written:
        print(path)
    if not written:
        parser.error(f"{names}: nothing to draw")
    return 0


def report(given: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Render the tables and figures of README.md and docs/benchmarks.md from the newest records in bench/results.

        python -m bench report              rewrite what has changed
        python -m bench report --check      change nothing; exit status 1 if a document is out of date

    What stands between `<!-- NAME: rendered ... -->` and `<!-- NAME: end -->` is rendered, with the machine, the
    versions, the commit and the date of the record it comes from. A record that cannot be read leaves every document as
    it is.
    """
    from bench import report

    try:
        texts = report.documents()
        drawn = {} if given.check else report.figures()
    except (record.RecordError, OSError) as error:
        parser.error(str(error))
    except _DAMAGED as error:
        parser.error(f"a record in {report.RESULTS} or a document's markers: {type(error).__name__}: {error}")
    stale = [path for path, text in texts.items() if path.read_text(encoding="utf-8") != text]
    if given.check:
        for path in stale:
            print(f"{path.relative_to(machine.REPOSITORY)} is out of date: python -m bench report")
        return 1 if stale else 0
    for path in report.write({path: texts[path] for path in stale}, drawn):
        print(path.relative_to(machine.REPOSITORY))
    return 0


def static(given: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Count what the kernels move, multiply and ask of every target, without a GPU.

        python -m bench static                                      all three tables
        python -m bench static --layers                             whole layers alone
        python -m bench static --choices                            what the defaults choose by shape, and why
        python -m bench static --no-compile --all                   the traffic alone, by operand
        python -m bench static --kernel compose --target sm_90 --all    one row per launch
        python -m bench static --target sm_90 --json                records, for programs

    Bytes are those of the elements that the programs ask for, of which the L2 cache serves a part; "large" are W and
    what has the size of the activations. The least is every input and every result once, and two FLOPs for each element
    of the low-rank product and rank; issued FLOPs count whole tiles and every product that a float32 product is made
    of.

    Exit status 1 if a launch does not compile, does not fit, spills on a CUDA target, or lacks matrix instructions.
    """
    status: int = machine.from_tests("aot.command").run(given, parser)
    return status


# The options.


def _add_run(parser: argparse.ArgumentParser) -> None:
    _add_shapes(parser, list(SUITES), DEFAULT)
    parser.add_argument(
        "--block", type=_block, metavar="HxIxAxK",
        help="of the suite block: hidden and intermediate size, attention heads, key and value heads",
    )  # fmt: skip
    parser.add_argument("--steps", type=_at_least(1), default=200, metavar="N", help="of finetune and classify (200)")
    parser.add_argument(
        "--seeds", nargs="+", type=_at_least(0), default=(0, 1, 2), metavar="N", help="of the same (0 1 2)"
    )
    parser.add_argument("--rounds", type=_at_least(1), default=21, metavar="N", help="of a comparison, at most (21)")
    parser.add_argument(
        "--limit-s", type=_seconds, metavar="S", help="no stage begins after this (300; the long suites: 7200)"
    )
    parser.add_argument("--out", type=Path, help="the record, a new .json file (default: bench-output/TIME.json)")
    parser.add_argument("--html", type=Path, metavar="FILE", help="a report with pictures, one new .html file")


def _add_compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("revision", metavar="REF", help="a commit, branch or tag")
    _add_shapes(parser, COMPARED, ("norm", "layer", "decode", "host"))
    parser.add_argument(
        "--rounds", type=_at_least(LEAST_ROUNDS), default=15, metavar="N",
        help=f"pairs of samples (15; {LEAST_ROUNDS} at least: fewer cannot show a change)",
    )  # fmt: skip


def _add_plot(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("records", type=Path, nargs="+", metavar="RECORD", help="of `python -m bench run`")
    parser.add_argument("--out", type=Path, default=FOLDER, help="a folder (default: bench-output)")
    parser.add_argument("--format", choices=FORMATS, default="svg")


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a document is out of date")


def _add_static(parser: argparse.ArgumentParser) -> None:
    machine.from_tests("aot.command").add_arguments(parser)


COMMANDS: dict[str, tuple[Callable[..., None], Callable[..., int]]] = {
    "run": (_add_run, run), "compare": (_add_compare, compare), "plot": (_add_plot, plot),
    "report": (_add_report, report), "static": (_add_static, static),
}  # fmt: skip


def _add_shapes(parser: argparse.ArgumentParser, suites: Sequence[str], default: Sequence[str]) -> None:
    """What is measured, where, and whose."""
    several: dict[str, Any] = {"nargs": "+", "metavar": "N", "type": _at_least(1)}
    named: dict[str, Any] = {"nargs": "+", "metavar": "NAME"}
    described = "\n".join(f"  {name:9} {SUITES[name]}" for name in suites)
    parser.epilog = f"suites ({', '.join(default)} where none is named):\n{described}"
    parser.add_argument("--suite", **named, choices=suites, default=default, help="see below")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    parser.add_argument(
        "--dtype", **named, choices=DTYPES,
        help="fp32, bf16, fp16; bf16+fp32: float32 adapters on a bfloat16 layer, PEFT's default, under autocast; "
        "bf16/fp32: the same without autocast",
    )  # fmt: skip
    parser.add_argument("--hidden", **several, help="in_features and out_features")
    parser.add_argument("--rank", **several)
    parser.add_argument("--tokens", **several)
    parser.add_argument("--providers", **named, choices=list(LABELS), help=", ".join(LABELS))


def _at_least(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, got {text!r}")
        return int(text)

    return parse


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


def _chosen(given: argparse.Namespace, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """What `_add_shapes` asked for, as `bench.run.Options` takes it; exit status 2 for a device that is not there."""
    import torch

    name = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        parser.error(f"--device: expected cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {name}: no GPU that torch can use; --device cpu runs on the CPU")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        parser.error(f"--device {name}: there are {torch.cuda.device_count()} GPUs")
    return {
        "suites": list(given.suite), "device": name, "hidden": given.hidden, "ranks": given.rank,
        "tokens": given.tokens, "providers": given.providers,
        "dtypes": given.dtype or (["bf16", "bf16+fp32"] if device.type == "cuda" else ["fp32"]),
    }  # fmt: skip


def _new_files(given: argparse.Namespace, parser: argparse.ArgumentParser) -> Path:
    """The record's path; exit status 2 for files that are there already, or have no place."""
    for option, path, suffix in (("--out", given.out, ".json"), ("--html", given.html, ".html")):
        if path is None:
            continue
        if path.suffix != suffix:
            parser.error(f"{option} {path}: expected a name that ends in {suffix}")
        if path.exists():
            parser.error(f"{option} {path}: there is such a file; earlier results are never overwritten")
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


if __name__ == "__main__":
    sys.exit(main())
