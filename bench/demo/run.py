"""The demo: three models trained in turns, two wrong ones, and the checks that tell them apart."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from peft.tuners.lora.dora import DoraLinearLayer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from safetensors.torch import save_file

import dora_kernels
from bench import machine, plots, record, show, timing, training
from bench.demo import LEAST_STEPS
from bench.providers import Missing
from bench.training import Continuation, Training

MAIN, CONTROLS = ("stock", "patched", "lora"), ("frozen", "stale")
STEP_LIMIT, TOKEN_LIMIT = 1.10, 1.25
"""The aims: times over LoRA's."""
MERGE_LIMIT = 1e-4
"""Of merged against unmerged logits, relative to the largest logit."""
WARMUP = 2
"""First steps and tokens of each loop, left out of the timings."""
SECONDS = {128: 90.0, 256: 150.0, "controls": 80.0, "tokens": 30.0, "process": 120.0}
"""When a phase stops early; training never under `LEAST_STEPS`."""
COLORS = {"stock": "tab:orange", "patched": "tab:blue", "lora": "tab:gray", "frozen": "tab:red", "stale": "tab:purple"}


class StaleNorm(DoraLinearLayer):
    """Stock PEFT's layer with the norm it had at initialisation, never refreshed."""

    first_norm: torch.Tensor

    def get_weight_norm(self, *args: object, **kwargs: object) -> torch.Tensor:
        """The magnitude starts as the norm, so its first value is the first norm."""
        return self.first_norm


@dataclass
class Demo:
    """One run. `results` is what results.json holds, by variant and tokens of a step; ratios are to LoRA."""

    model: str | None
    data: Path | None
    steps: int
    rank: int
    lr: float
    out: Path
    quick: bool

    def run(self) -> int:
        """Everything; 0 if the patched model has stock's numbers and the controls have not."""
        started = time.perf_counter()
        text = training.read_text(self.data)
        self.out.mkdir(parents=True, exist_ok=True)
        self.screen = Console(record=True)
        if not self.screen.is_terminal:
            self.screen = Console(record=True, width=show.WIDTH)
        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            console=self.screen, transient=True, refresh_per_second=2,  # drawing takes time from what is measured
        )  # fmt: skip
        self.lengths = (128,) if self.quick else (128, 256)
        with self.progress:
            with self._phase("Load model and text"):
                self._load(text)
            self._measure()
        self.results["seconds"] = time.perf_counter() - started
        self.results["failures"] = failures(self.results)
        record.replace(self.out / "results.json", json.dumps(self.results, indent=1) + "\n")
        plots.write({self.out / "demo.png": picture(self.results)})
        self._report()
        record.replace(self.out / "report.txt", self.screen.export_text())
        self._say(f"{self.results['seconds']:.0f} s in all; results.json, demo.png, report.txt, adapter: {self.out}")
        return 1 if self.results["failures"] else 0

    def _load(self, text: tuple[str, str]) -> None:
        longest = self.lengths[-1]
        self.source = training.prepare(self.out, self.model)
        self.base = training.load(self.source)
        config = self.base.config
        if self.rank > getattr(config, "hidden_size", self.rank):
            raise Missing(f"--rank {self.rank} is larger than the model's width, {config.hidden_size}")
        if longest > getattr(config, "max_position_embeddings", longest):
            raise Missing(f"--model takes {config.max_position_embeddings} tokens, the demo needs {longest}")
        self.tokenizer = training.load_tokenizer(self.source)
        self.corpus = training.make_corpus(*text, self.tokenizer, longest)
        self.windows = self.corpus.windows(longest, 4 if self.quick else 6)
        hardware = machine.hardware(training.device())
        self.results: dict[str, Any] = {
            "commit": machine.commit(), "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "hardware": {
                "cpu": machine.cpu_name(), "cores": hardware["cores"], "threads": hardware["threads"],
                "gpu": hardware["device"] if training.device().type == "cuda" else None,
            },
            "versions": machine.versions(),
            "settings": {
                "model": Path(self.source).name, "data": self.corpus.name, "steps": self.steps, "rank": self.rank,
                "lr": self.lr, "quick": self.quick,
            },
            "variants": {
                kind: {
                    "step_seconds": {}, "step_ratio": {}, "losses": {}, "token_seconds": None, "token_ratio": None,
                    "peak_bytes": None, "loss_difference": None, "held_out_before": None, "held_out_after": None,
                }
                for kind in (*MAIN, *CONTROLS)
            },
            "notes": [], "saved": {},
        }  # fmt: skip

    def _measure(self) -> None:
        variants = self.results["variants"]
        for length in self.lengths:
            runs = {kind: self._training(kind) for kind in MAIN}
            if length == self.lengths[0]:
                self._held_out(runs, "before")
            self._train(runs, length, self.steps, SECONDS[length])
            for kind, one in runs.items():
                variants[kind]["step_seconds"][length] = statistics.median(one.seconds[WARMUP:])
                variants[kind]["step_ratio"][length] = ratio(one.seconds, runs["lora"].seconds)
            if length == self.lengths[0]:
                self._train({kind: self._control(kind) for kind in CONTROLS}, length, LEAST_STEPS, SECONDS["controls"])
        self._held_out(runs, "after")
        self._tokens(runs)
        with self._phase("Save; load and merge in stock PEFT"):
            self._save_and_check(runs["patched"].model)
        with self._phase("Peak memory of training", len(MAIN)) as advance:
            for kind in MAIN:
                variants[kind]["peak_bytes"] = timing.peak_bytes(training.device(), lambda kind=kind: self._begin(kind))
                advance()

    def _training(self, kind: str) -> Training:
        """A fresh variant; all start from the same A and B."""
        model = training.adapt(self.base, self.rank, dora=kind != "lora")
        if kind == "patched":
            try:
                handle = dora_kernels.patch_peft(model)
            except ValueError as error:
                raise Missing(f"--model: {error}") from error
            self.results["patched_layers"], self.results["skipped_layers"] = len(handle.patched), len(handle.skipped)
        return Training(model, self.lr)

    def _control(self, kind: str) -> Training:
        """A wrong DoRA model, which the comparison has to tell: its magnitude not trained, or its norm an old one."""
        model = training.adapt(self.base, self.rank)
        for layer in [module for module in model.modules() if isinstance(module, DoraLinearLayer)]:
            if kind == "frozen":
                layer.weight.requires_grad_(False)
            else:
                layer.first_norm = layer.weight.detach().clone()
                layer.__class__ = StaleNorm
        return Training(model, self.lr)

    def _begin(self, kind: str) -> None:
        """The first steps of a training: the adapter, its gradients and the optimizer's state are made here."""
        one = self._training(kind)
        for batch in self.corpus.batches(self.lengths[-1], 2):
            one.step(batch)

    def _train(self, runs: dict[str, Training], length: int, steps: int, seconds: float) -> None:
        """Train side by side, and hold the losses against stock's."""
        start, variants = time.perf_counter(), self.results["variants"]
        name = f"Train {', '.join(runs)}, {length} tokens per step"
        with self._phase(name, steps) as advance:

            def after(done: int) -> bool:
                advance()
                over = done >= LEAST_STEPS and time.perf_counter() - start > seconds
                if over and done < steps:
                    self._note(f"{name}: stopped at {done} of {steps} steps, its {seconds:.0f} s were over")
                return not over

            training.in_turns(list(runs.values()), self.corpus.batches(length, steps), after)
        for kind, one in runs.items():
            variants[kind]["losses"][length] = one.losses
        for kind in runs.keys() - {"stock", "lora"}:
            variant = variants[kind]
            gaps = [abs(a - b) for a, b in zip(variant["losses"][length], variants["stock"]["losses"][length])]
            gap = max(gap if gap == gap else float("inf") for gap in gaps)
            variant["loss_difference"] = max(gap, variant["loss_difference"] or 0.0)

    def _held_out(self, runs: dict[str, Training], when: str) -> None:
        with self._phase(f"Held-out loss, {when}", len(runs)) as advance:
            for kind, one in runs.items():
                self.results["variants"][kind][f"held_out_{when}"] = training.held_out(one.model, self.windows)[0]
                advance()

    def _tokens(self, runs: dict[str, Training]) -> None:
        """Greedy tokens with the adapters unmerged, the models taking turns token by token, and a sample."""
        count, where = 16 if self.quick else 48, training.device()
        calls = {kind: Continuation(one.model, self.corpus.prompt, count + WARMUP) for kind, one in runs.items()}
        seconds: dict[str, list[float]] = {kind: [] for kind in runs}
        start = time.perf_counter()
        with self._phase("Generate, adapters unmerged", count) as advance:
            for made in range(count):
                for kind in sorted(calls, key=lambda kind: (MAIN.index(kind) + made) % len(MAIN)):
                    began = training.clock(where)
                    calls[kind]()
                    seconds[kind].append(training.clock(where) - began)
                advance()
                if made > WARMUP + 6 and time.perf_counter() - start > SECONDS["tokens"]:
                    break
        for kind, times in seconds.items():
            self.results["variants"][kind]["token_seconds"] = statistics.median(times[WARMUP:])
            self.results["variants"][kind]["token_ratio"] = ratio(times, seconds["lora"])
        with torch.no_grad():
            ids = runs["patched"].model.generate(
                input_ids=self.corpus.prompt, attention_mask=torch.ones_like(self.corpus.prompt), do_sample=False,
                max_new_tokens=24 if self.quick else 48, pad_token_id=self.tokenizer.eos_token_id,
            )  # fmt: skip
        self.results["sample"] = self.tokenizer.decode(ids[0], skip_special_tokens=True)

    def _save_and_check(self, model: Any) -> None:
        """Save the adapter, then let a fresh process with stock PEFT alone load and merge it."""
        folder, ids = (self.out / "adapter").resolve(), self.windows[0]["input_ids"]
        training.write_folder(folder, model.save_pretrained)
        model.eval()
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[:, -16:]
        paths = [str(machine.REPOSITORY), os.environ.get("PYTHONPATH", "")]
        with tempfile.TemporaryDirectory() as place:
            expected = str(Path(place) / "reference.safetensors")
            save_file({"ids": ids.cpu(), "logits": logits.cpu().contiguous()}, expected)
            try:
                done = subprocess.run(
                    [sys.executable, "-m", "bench.demo.check_saved", self.source, str(folder), expected],
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
                    capture_output=True, text=True, timeout=SECONDS["process"], check=True,
                )  # fmt: skip
                self.results["saved"] = json.loads(done.stdout.strip().splitlines()[-1])
            except subprocess.CalledProcessError as error:
                last = (error.stderr.strip().splitlines() or ["no message"])[-1]
                self._note(f"the check in stock PEFT failed: {last}")
            except subprocess.TimeoutExpired:
                self._note(f"the check in stock PEFT took more than {SECONDS['process']:.0f} s")

    def _report(self) -> None:
        """The table, the aims, the sample and what went wrong."""
        results, variants = self.results, self.results["variants"]
        self.screen.print(show.table(show.demo(results), wrap=True))
        settings, hardware, versions = results["settings"], results["hardware"], results["versions"]
        self._say(
            f"{settings['model']}, rank {self.rank}, float32, learning rate {self.lr:g}, {settings['data']}; "
            f"{hardware['gpu'] or hardware['cpu']}, {hardware['threads']} threads; torch {versions['torch']}, peft "
            f"{versions['peft']}; {results['patched_layers']} layers patched, {results['skipped_layers']} skipped"
        )
        patched = variants["patched"]
        aims = [(f"step, {length} tokens", value, STEP_LIMIT) for length, value in patched["step_ratio"].items()]
        for name, value, limit in (*aims, ("token", patched["token_ratio"], TOKEN_LIMIT)):
            self._say(f"{name}: {value:.2f} of LoRA's (aim: {limit:.2f}): {'met' if value <= limit else 'missed'}")
        for kind in MAIN:
            variant = variants[kind]
            self._say(f"{kind}: held-out loss {variant['held_out_before']:.4f}, then {variant['held_out_after']:.4f}")
        for name, off in results["saved"].items():
            self._say(f"saved adapter in stock PEFT, {name.replace('_', ' ')}: logits differ by {off:.1e}")
        self._say(f"sample: {results['sample'].strip()}")
        for failure in results["failures"]:
            self._say(f"failed: {failure}")

    @contextlib.contextmanager
    def _phase(self, name: str, total: int | None = None) -> Iterator[Callable[[], None]]:
        """One phase with a bar; a line with its time stays on the screen."""
        start, bar = time.perf_counter(), self.progress.add_task(name, total=total)
        try:
            yield lambda: self.progress.advance(bar)
        finally:
            self.progress.remove_task(bar)
        self._say(f"{name}: {time.perf_counter() - start:.1f} s")

    def _note(self, words: str) -> None:
        self.results["notes"].append(words)
        self._say(f"note: {words}")

    def _say(self, words: str) -> None:
        self.screen.print(words, highlight=False, markup=False)


def ratio(seconds: list[float], of: list[float]) -> float:
    """Median of the ratios of neighbours in time, without the warm-up."""
    return statistics.median(a / b for a, b in zip(seconds[WARMUP:], of[WARMUP:], strict=True))


def failures(results: dict[str, Any]) -> list[str]:
    """Why the run must not count as passed; speed is not among the reasons."""
    found, variants = [], results["variants"]
    if not variants["patched"]["loss_difference"] <= show.DEMO_LIMIT:
        found.append(f"the patched model's losses differ from stock's by more than {show.DEMO_LIMIT:g}")
    for kind in CONTROLS:
        if variants[kind]["loss_difference"] <= show.DEMO_LIMIT:
            found.append(f"{show.DEMO[kind]} passed the comparison that it must fail")
    for name, words in {
        "merged_vs_unmerged": "merged and unmerged logits differ",
        "stock_vs_patched": "the saved adapter gives other logits in stock PEFT",
    }.items():
        if not results["saved"].get(name, float("nan")) <= MERGE_LIMIT:  # NaN fails
            found.append(words)
    return found


def picture(results: dict[str, Any]) -> Figure:
    """How far the losses are from stock's, and the times of steps and tokens."""
    figure, (apart, times) = plots.pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    variants = results["variants"]
    lengths = list(variants["lora"]["step_seconds"])
    stock = variants["stock"]["losses"][lengths[0]]
    for kind in ("patched", *CONTROLS):
        gaps = [max(1e-8, abs(a - b)) for a, b in zip(variants[kind]["losses"][lengths[0]], stock)]
        apart.semilogy(range(1, len(gaps) + 1), gaps, color=COLORS[kind], label=show.DEMO[kind])
    apart.axhline(show.DEMO_LIMIT, color="black", linestyle=":", label=f"limit {show.DEMO_LIMIT:g}")
    apart.set(title=f"|loss − stock DoRA's loss|, {lengths[0]} tokens", xlabel="step")
    apart.legend()
    names = [*(f"step, {length} tokens" for length in lengths), "generated token"]
    for place, kind in enumerate(MAIN):
        variant = variants[kind]
        ratios = [*variant["step_ratio"].values(), variant["token_ratio"]]
        bars = times.bar([x + 0.27 * (place - 1) for x in range(len(names))], ratios, 0.27, color=COLORS[kind])
        bars.set_label(show.DEMO[kind])
        times.bar_label(bars, [f"{value:.2f}" for value in ratios])
    times.set_xticks(range(len(names)), names)
    times.set(title="Times, LoRA = 1")
    times.legend()
    return figure
