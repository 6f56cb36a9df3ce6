"""Time the kernels and the whole layer beside PEFT's, and check every one of them first.

    python -m bench.layer --out results.json                    on a GPU
    python -m bench.layer --device cpu --hidden 256 --tokens 32 --ranks 4 --norms 256x256x4 --block 256x512x4x2 \
        --no-compile    a rehearsal
    python -m bench.layer --device cpu --only norms --norms 2048x2048x16    the norm on a CPU
    python -m bench.layer --device cpu --only steps inference --hidden 2048 --tokens 512    training and use on a CPU
    python -m bench.layer --show results.json                   the tables of a record

The record is written after every stage, and a stage that fails leaves the others alone. Exit status 1 if anything
failed: a stage, or a provider whose error exceeds its limit.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import timing
from bench.layer import kernels, report
from bench.layer.block import BlockCase, block_errors, make_blocks
from bench.layer.norms import NormCase, norm_row
from bench.layer.problem import DTYPES, Case, Problem, beyond, errors, limits, make_problem, oracle, plain
from bench.layer.providers import COMPILED, IN_USE, PROVIDERS, Provider, make_provider
from bench.timing import Candidate
from dora_kernels.backends import resolve, triton_problem

_TRACE_LINES = 12
TABLES = ["norms", "kernels", "steps", "inference", "blocks", "layers"]
NORMS = [(4096, 4096, 16), (4096, 4096, 64), (4096, 4096, 384), (8192, 8192, 384), (8192, 28672, 384)]


Parts = dict[str, tuple[Callable[[Provider], Any], bool]]
"""What is timed of a provider by the name it has in the record, and whether it is replayed from a CUDA graph."""
PASSES: Parts = {"forward": (Provider.run_forward, False), "both": (Provider.run_both, False)}
STEP: Parts = {"step": (Provider.run_step, False)}
INFERENCE: Parts = {"inference": (Provider.run_inference, False), "inference_graph": (Provider.run_inference, True)}


class Run:
    """One run: the record, and the stages that fill it."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        self.device = torch.device(given.device)
        self.backend = given.backend or ("triton" if self.device.type == "cuda" else "torch")
        names = (
            "device", "only", "dtypes", "norms", "hidden", "ranks", "tokens", "inference_tokens",
            "block", "block_tokens", "rounds", "sample_ms",
        )  # fmt: skip
        settings = {**{name: getattr(given, name) for name in names}, "backend": self.backend}
        self.record = report.new_record(self.device, settings)
        self.start = time.perf_counter()

    def stage(self, name: str, work: Callable[[], None]) -> None:
        """Run one stage, or say why not, and write the record."""
        begun = time.perf_counter()
        if begun - self.start > self.given.limit_s:
            self.fail(name, f"skipped: {self.given.limit_s} s were over")
            return
        print(f"[{begun - self.start:6.1f} s] {name}", file=sys.stderr, flush=True)
        try:
            work()
        except Exception as error:
            self.fail(name, f"{type(error).__name__}: {error}")
            print("".join(traceback.format_exc().splitlines(True)[-_TRACE_LINES:]), file=sys.stderr, flush=True)
        self.record["seconds"][name] = round(time.perf_counter() - begun, 1)
        if self.given.out:
            report.write(self.record, self.given.out)

    def fail(self, stage: str, message: str) -> None:
        """Note a failure."""
        self.record["failures"].append({"stage": stage, "message": message.strip()[:600]})

    def stages(self) -> Iterator[tuple[str, Callable[[], None]]]:
        """All stages by name, the ceilings first."""
        yield "backend", self.automatic
        yield "ceilings", self.ceilings
        if "norms" in self.given.only:
            yield from self.norm_stages()
        if "kernels" in self.given.only:
            yield from self.kernel_stages()
        if "steps" in self.given.only:
            for case in self.cases(self.given.tokens):
                yield f"step: {case.label}", lambda case=case: self.layer(case, IN_USE, STEP)
        if "inference" in self.given.only:
            for case in self.cases(self.given.inference_tokens):
                names = ("frozen", *IN_USE)
                yield f"inference: {case.label}", lambda case=case, names=names: self.layer(case, names, INFERENCE)
        if "blocks" in self.given.only:
            given = self.given
            for rank, dtypes, checkpointing in itertools.product(given.ranks, given.dtypes, (False, True)):
                block = BlockCase(given.block, rank, given.block_tokens, dtypes, checkpointing, self.device)
                yield block.label, lambda block=block: self.block(block)
        if "layers" in self.given.only:
            # Compiling takes long, so it is done for one rank.
            for case in self.cases(self.given.tokens):
                names = [name for name in PROVIDERS if name != "ours_patched"]
                if self.given.no_compile or case.rank != self.given.ranks[0]:
                    names.remove(COMPILED)
                yield f"layer: {case.label}", lambda case=case, names=names: self.layer(case, names, PASSES)

    def norm_stages(self) -> Iterator[tuple[str, Callable[[], None]]]:
        """The norm at every shape and rank, and in every pair of dtypes."""
        for dtypes in self.given.dtypes:
            for sizes in self.given.norms:
                case = NormCase(*sizes, dtypes, self.device)
                yield f"weight_norm: {case.label}", lambda case=case: self.kernel(norm_row(case, self.backend))

    def kernel_stages(self) -> Iterator[tuple[str, Callable[[], None]]]:
        """compose, alone and with the base product, and scale_reduce."""
        for case in self.cases(self.given.tokens):
            yield f"compose: {case.label}", lambda case=case: self.kernel(kernels.compose_row(case, self.backend))
        # The dtype of the adapters changes little there, and the base product fills the time.
        for case in self.cases([*self.given.inference_tokens, *self.given.tokens]):
            if case.dtypes == self.given.dtypes[0]:
                yield f"product: {case.label}", lambda case=case: self.kernel(kernels.product_row(case, self.backend))
        for base in dict.fromkeys(DTYPES[dtypes][0] for dtypes in self.given.dtypes):
            for size, tokens in itertools.product(self.given.hidden, self.given.tokens):
                case = Case(size, self.given.ranks[0], tokens, kernels.NAMES[base], self.device)
                row = kernels.scale_reduce_row
                yield f"scale_reduce: {case.label}", lambda case=case, row=row: self.kernel(row(case, self.backend))

    def cases(self, tokens: list[int]) -> Iterator[Case]:
        """Every combination of dtypes, hidden size, tokens and rank."""
        given = self.given
        for dtypes, size, count, rank in itertools.product(given.dtypes, given.hidden, tokens, given.ranks):
            yield Case(size, rank, count, dtypes, self.device)

    def interleave(self, candidates: list[Candidate]) -> None:
        """Time candidates with this run's settings."""
        seconds, limit = self.given.sample_ms / 1e3, self.given.limit_s / 10
        timing.interleave(
            candidates, self.device, rounds=self.given.rounds, sample_seconds=seconds, limit_seconds=limit
        )

    def automatic(self) -> None:
        """What patched layers run on: their backend is always "auto"'s choice."""
        chosen = resolve("auto", (torch.empty(0, device=self.device),))
        self.record["settings"]["auto"] = chosen
        if self.device.type == "cuda" and chosen != "triton":
            raise RuntimeError(f"patched layers run on {chosen!r} here: {triton_problem(self.device)}")

    def ceilings(self) -> None:
        """The bandwidth and the matrix rate that everything else is held against."""
        cuda = self.device.type == "cuda"
        found = self.record["ceilings"]
        copied = timing.copy_bandwidth(self.device, 2**31 if cuda else 2**26)
        found["copy_bytes_per_s"] = report.significant(copied)
        product = timing.blas_rate(self.device, 8192 if cuda else 1024, torch.bfloat16)
        found["blas_flop_per_s"] = report.significant(product)

    def kernel(self, row: kernels.KernelRow) -> None:
        """Time one kernel's providers and add a row for each."""
        for provider, reason in row.absent.items():
            self.fail(row.label, f"{provider}: {reason}")
        candidates = []
        for provider, calls in row.calls.items():
            try:
                candidates.append(timing.captured(provider, calls, self.device))
            except Exception as error:
                self.fail(row.label, f"{provider} could not be captured: {type(error).__name__}: {error}")
        self.interleave(candidates)
        ceilings = self.record["ceilings"]
        floor = None
        if len(ceilings) == 2:
            floor = max(row.bytes / ceilings["copy_bytes_per_s"], row.flops / ceilings["blas_flop_per_s"])
        ours = next((candidate for candidate in candidates if candidate.name == "ours"), None)
        for candidate in candidates:
            name = candidate.name
            self.record["kernels"].append({
                "kernel": row.kernel, "label": row.label, "shape": row.shape, "rank": row.rank, "tokens": row.tokens,
                "dtypes": row.dtypes, "provider": name, "us": report.significant(candidate.seconds * 1e6),
                "spread": report.significant(candidate.spread, 2), "bytes": row.bytes, "flops": row.flops,
                "floor_us": None if floor is None else report.significant(floor * 1e6),
                "fraction": None if floor is None else report.significant(floor / candidate.seconds, 3),
                "ratio_to_ours": report.significant(candidate.ratio(ours), 3) if ours else None,
                "error": report.significant(row.errors[name], 3), "limit": report.significant(row.limits[name], 3),
            })  # fmt: skip
            if wrong := beyond({name: row.errors[name]}, row.limits):
                self.fail(row.label, f"wrong result: {wrong[0]}")

    def layer(self, case: Case, names: Iterable[str], parts: Parts) -> None:
        """Check and time providers of the whole layer."""
        first = make_problem(case, 0)
        count = timing.copies_beyond(timing.cache_bytes(self.device), first.nbytes, most=8)
        problems = [first, *(make_problem(case, seed) for seed in range(1, count))]
        providers: dict[str, list[Provider]] = {}
        for name in names:
            try:
                providers[name] = [make_provider(name, problem, case, self.backend) for problem in problems]
            except Exception as error:
                self.fail(case.label, f"{name}: {type(error).__name__}: {error}")
        found, allowed = self.check(case, first, providers)
        for name in [name for name in providers if name not in found]:
            del providers[name]
        rows: dict[str, dict[str, Any]] = {
            name: {
                "label": case.label, "hidden": case.hidden, "rank": case.rank, "tokens": case.tokens,
                "dtypes": case.dtypes, "provider": name,
            }
            for name in providers
        }  # fmt: skip
        for part, (method, in_graph) in parts.items():
            if in_graph and self.device.type != "cuda":
                continue
            candidates = []
            for name, copies in providers.items():
                calls = [lambda copy=copy, method=method: method(copy) for copy in copies]
                candidates.append(timing.captured(name, calls, self.device) if in_graph else Candidate(name, calls))
            self.interleave(candidates)
            by_name = {candidate.name: candidate for candidate in candidates}
            for name, candidate in by_name.items():
                rows[name][part] = {
                    "ms": report.significant(candidate.seconds * 1e3),
                    "spread": report.significant(candidate.spread, 2),
                }
                for other, key in (("peft_lora", "ratio_to_lora"), ("frozen", "ratio_to_frozen")):
                    if other in by_name:
                        rows[name][part][key] = report.significant(candidate.ratio(by_name[other]), 3)
                if method is Provider.run_step:
                    rows[name][part]["peak_bytes"] = timing.peak_bytes(self.device, providers[name][0].run_step)
        for name, row in rows.items():
            row["errors"], row["limits"] = report.rounded(found[name]), report.rounded(allowed[name])
            self.record["layers"].append(row)

    def block(self, case: BlockCase) -> None:
        """Check and time optimizer steps of a decoder block."""
        blocks = list(make_blocks(case))
        found, allowed = block_errors(blocks)
        if wrong := beyond(found, allowed):
            self.fail(case.label, f"ours: wrong result: {'; '.join(wrong)}")
        candidates = {block.name: Candidate(block.name, [block.run_step]) for block in blocks}
        self.interleave(list(candidates.values()))
        for block in blocks:
            candidate = candidates[block.name]
            self.record["blocks"].append({
                "label": case.label, "shape": case.shape, "rank": case.rank, "tokens": case.tokens,
                "dtypes": case.dtypes, "checkpointing": case.checkpointing, "provider": block.name,
                "step": {
                    "ms": report.significant(candidate.seconds * 1e3),
                    "spread": report.significant(candidate.spread, 2),
                    "ratio_to_lora": report.significant(candidate.ratio(candidates["peft_lora"]), 3),
                    "peak_bytes": timing.peak_bytes(self.device, block.run_step),
                },
                "errors": report.rounded(found if block.name == "ours_patched" else {}),
                "limits": report.rounded(allowed if block.name == "ours_patched" else {}),
            })  # fmt: skip

    def check(
        self, case: Case, problem: Problem, providers: dict[str, list[Provider]]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Errors and limits of every provider that runs; the float64 oracle is the judge."""
        found: dict[str, Any] = {}
        allowed: dict[str, Any] = {}
        judges: dict[str, Any] = {}
        for name, copies in providers.items():
            kind = copies[0].kind
            if kind not in judges:
                wanted = oracle(problem, kind)
                judges[kind] = wanted, limits(plain(problem, kind), wanted)
            wanted, allowed[name] = judges[kind]
            try:
                found[name] = errors(copies[0].results(), wanted)
            except Exception as error:
                self.fail(case.label, f"{name}: {type(error).__name__}: {error}")
                continue
            if wrong := beyond(found[name], allowed[name]):
                self.fail(case.label, f"{name}: wrong result: {'; '.join(wrong)}")
        return found, allowed


def _sizes(count: int) -> Callable[[str], tuple[int, ...]]:
    """The type of an option of several sizes."""

    def parse(text: str) -> tuple[int, ...]:
        try:
            sizes = tuple(map(int, text.split("x")))
        except ValueError:
            sizes = ()
        if len(sizes) != count or min(sizes) < 1:
            example = "x".join(["4096", "4096", "16", "8"][:count])
            raise argparse.ArgumentTypeError(f"expected {count} sizes of at least 1, such as {example}, got {text!r}")
        return sizes

    return parse


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.layer", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file for the record")
    parser.add_argument("--show", type=Path, metavar="FILE", help="print the tables of a record and stop")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", choices=["triton", "torch"], help="ours (default: triton on a GPU, else torch)")
    both = ["bf16", "bf16+fp32"]
    parser.add_argument("--dtypes", choices=list(DTYPES), nargs="+", default=both, help="of the layer and the adapter")
    parser.add_argument("--hidden", type=int, nargs="+", default=[4096], help="in_features and out_features")
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64, 384])
    parser.add_argument(
        "--norms", type=_sizes(3), nargs="+", default=NORMS, metavar="NxKxR", help="of the norm: out, in_features, rank"
    )
    parser.add_argument("--only", choices=TABLES, nargs="+", default=TABLES, help="tables")
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 8192], help="of training")
    parser.add_argument("--inference-tokens", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    llama = "hidden and intermediate size, heads, key and value heads of the decoder block"
    parser.add_argument("--block", type=_sizes(4), default=(4096, 14336, 32, 8), metavar="HxIxAxK", help=llama)
    parser.add_argument("--block-tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=21, help="at most, for each comparison")
    parser.add_argument("--sample-ms", type=float, default=4.0, help="length of one sample")
    parser.add_argument(
        "--limit-s", type=float, default=120.0, help="no stage begins after this; a comparison may take a tenth"
    )
    given = parser.parse_args(arguments)
    if given.show:
        print(report.text(json.loads(given.show.read_text(encoding="utf-8"))))
        return 0
    if given.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("no GPU that torch can use; --device cpu rehearses the run")
    run = Run(given)
    for name, work in run.stages():
        run.stage(name, work)
    if given.out:
        report.write(run.record, given.out)
    print(report.text(run.record))
    return 1 if run.record["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
