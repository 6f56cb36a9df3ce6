"""The demo from beginning to end."""

from __future__ import annotations

import importlib.util
import subprocess
import time
from typing import Any

import torch
from rich.console import Console

from bench import machine
from bench.demo import children, data, generate, report, results, train
from bench.demo import model as models
from bench.demo.controls import make_control
from bench.demo.phases import Phases
from bench.demo.results import Results, Variant
from bench.demo.settings import (
    BOXES,
    CONTROLS,
    LABELS,
    LEAST_STEPS,
    MAIN,
    TRAIN_BOXES,
    DemoError,
    Settings,
)


class Demo:
    """One run: the loaded model and text, and the results as they come in."""

    def __init__(self, settings: Settings, phases: Phases, text: tuple[str, str]) -> None:
        self.settings = settings
        self.phases = phases
        self.runs: dict[str, train.Run] = {}
        with phases.phase("Prepare the model"):
            self.source = models.prepare(settings)
        longest = settings.lengths[-1]
        with phases.phase("Load model and text"):
            self.base = models.load(self.source)
            models.check_sizes(self.base, settings.rank, longest)
            self.tokenizer = models.load_tokenizer(self.source)
            self.corpus = data.make_corpus(*text, self.tokenizer, longest)
        self.windows = self._placed(self.corpus.windows(longest, settings.windows))
        self.prompt = self.corpus.prompt.to(models.device())
        record = results.settings_record(settings, self.source, self.corpus.name)
        self.results = Results(results.hardware(), machine.versions(), record)
        self.results.sample["prompt"] = self.tokenizer.decode(self.prompt[0])
        for kind in (*MAIN, *CONTROLS):
            self.results.variants[kind] = Variant(kind)

    def _placed(self, batches: list[torch.Tensor]) -> list[torch.Tensor]:
        return [batch.to(models.device()) for batch in batches]

    def _batches(self, length: int, steps: int) -> list[torch.Tensor]:
        return self._placed(self.corpus.batches(length, steps, self.settings.seed))

    def _models(self) -> dict[str, Any]:
        return {kind: run.model for kind, run in self.runs.items()}

    def start_runs(self) -> None:
        """Fresh variants, all from the same A and B."""
        self.runs.clear()
        for kind in MAIN:
            model = models.adapt(self.base, kind, self.settings)
            if kind == "patched":
                handle = models.patch(model)
                self.results.patched_layers = len(handle.patched)
                self.results.skipped_layers = len(handle.skipped)
            self.runs[kind] = train.make_run(kind, model, self.settings)

    def sample(self, name: str, model: Any) -> None:
        """Keep a text sample of a model."""
        with self.phases.phase(f"Sample of text, {name}", box=BOXES["sample"]) as phase:
            text = generate.sample(model, self.tokenizer, self.prompt, self.settings.sample_tokens, phase)
        self.results.sample[name] = text

    def held_out(self, when: str) -> None:
        """Held-out loss of the three variants; "after" takes the windows that "before" took."""
        with self.phases.phase(f"Held-out loss, {when}", len(self.windows), BOXES[when]) as phase:
            least = 2 if when == "before" else len(self.windows)
            losses, done = train.held_out_losses(self._models(), self.windows, phase, least)
        self.windows = self.windows[:done]
        for kind, loss in losses.items():
            setattr(self.results.variants[kind], f"held_out_{when}", loss)

    def train(self, length: int) -> None:
        """Train the three variants interleaved and keep their figures."""
        steps = self.settings.wanted_steps
        with self.phases.phase(f"Train three ways, {length} tokens per step", steps, TRAIN_BOXES[length]) as phase:
            batches = self._batches(length, steps)
            train.train(list(self.runs.values()), batches, phase, self.settings.seed)
        lora = self.runs["lora"]
        for kind, run in self.runs.items():
            variant = self.results.variants[kind]
            variant.losses[length] = run.losses
            variant.times[length] = run.seconds
            variant.step_seconds[length] = train.median(run.seconds)
            variant.step_ratio[length] = train.ratio(run.seconds, lora.seconds)
        self._compare("patched", length)

    def _compare(self, kind: str, length: int) -> None:
        variant, stock = self.results.variants[kind], self.results.variants["stock"]
        gap = train.largest_difference(variant.losses[length], stock.losses[length])
        variant.loss_difference = max(gap, variant.loss_difference or 0.0)

    def train_controls(self, length: int) -> None:
        """Train the two wrong models on what stock was trained on."""
        runs = [train.make_run(kind, make_control(self.base, kind, self.settings), self.settings) for kind in CONTROLS]
        with self.phases.phase(
            f"Train the controls, {length} tokens per step", LEAST_STEPS, BOXES["controls"]
        ) as phase:
            train.train(runs, self._batches(length, LEAST_STEPS), phase, self.settings.seed)
        for run in runs:
            variant = self.results.variants[run.kind]
            variant.losses[length] = run.losses
            variant.largest_rescale = models.largest_rescale(run.model)
            self._compare(run.kind, length)

    def finish_runs(self) -> None:
        """What is measured on the trained models."""
        self.held_out("after")
        for kind, run in self.runs.items():
            self.results.variants[kind].largest_rescale = models.largest_rescale(run.model)
        count = self.settings.timed_tokens
        with self.phases.phase("Generate, adapters unmerged", count, BOXES["tokens"]) as phase:
            seconds = generate.time_tokens(self._models(), self.prompt, count, phase)
        for kind, times in seconds.items():
            self.results.variants[kind].token_seconds = train.median(times)
            self.results.variants[kind].token_ratio = train.ratio(times, seconds["lora"])

    def save_and_check(self) -> None:
        """Save the patched model's adapter and check it in stock PEFT."""
        with self.phases.phase("Save; load and merge in stock PEFT") as phase:
            try:
                self.results.saved = children.save_and_check(
                    self.runs["patched"].model,
                    self.source,
                    self.windows[0],
                    (self.settings.out / "adapter").resolve(),
                )
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                phase.note = f"{phase.name}: {error}"

    def memory(self) -> None:
        """Peak memory, each variant in a process of its own."""
        with self.phases.phase("Peak memory, a process each", len(MAIN)) as phase:
            peaks = children.peak_memory(self.source, self.settings, phase)
        for kind, peak in peaks.items():
            self.results.variants[kind].peak_bytes = peak

    def everything(self) -> None:
        """All phases in order."""
        self.start_runs()
        self._check_same_start()
        # Before training every variant is the base model, which is the fastest of them.
        self.sample("before", self.base)
        self.held_out("before")
        for length in self.settings.lengths:
            if length != self.settings.lengths[0]:
                self.start_runs()
            self.train(length)
            if length == self.settings.lengths[0]:
                self.train_controls(length)
        self.finish_runs()
        self.sample("after", self.runs["patched"].model)
        self.save_and_check()
        self.memory()

    def _check_same_start(self) -> None:
        stock = dict(self.runs["stock"].model.named_parameters())
        for kind in ("patched", "lora"):
            for name, parameter in self.runs[kind].model.named_parameters():
                if not torch.equal(parameter, stock[name]):
                    raise RuntimeError(f"{LABELS[kind]} starts from another {name} than stock DoRA")


def console() -> Any:
    """The terminal, or a wide page where the output goes to a file."""
    found = Console()
    return found if found.is_terminal else Console(width=report.WIDTH)


def run(settings: Settings) -> int:
    """Run the demo; 0 if the patched model has stock's numbers and the controls have not."""
    started = time.perf_counter()
    if importlib.util.find_spec("dora_kernels") is None:
        raise DemoError("the package dora_kernels is not installed")
    machine.quiet_libraries()
    text = data.read_text(settings.data)
    settings.out.mkdir(parents=True, exist_ok=True)
    screen = console()
    with Phases(screen) as phases:
        demo = Demo(settings, phases, text)
        demo.everything()
    found = demo.results
    found.phase_seconds, found.notes = phases.seconds, phases.notes
    found.seconds = time.perf_counter() - started
    results.write_json(found, settings.out / "results.json")
    report.draw(found, settings.out / "demo.png")
    report.write_text(found, settings.out / "report.txt")
    screen.print()
    report.show(found, screen)
    screen.print(
        f"\n{found.seconds:.0f} s in all; results.json, demo.png, report.txt and the adapter are in {settings.out}",
        highlight=False,
    )
    return 1 if results.failures(found) else 0
