"""One layer in four suites, each at every combination of dtypes, hidden size, tokens and rank.

layer: `forward` and `forward and backward` find the norm at hand, as the further micro-batches of an optimizer step do;
a `step` is one micro-batch, then AdamW, so that the norm is computed in each; the longer step has four of them.
decode: evaluation, a few tokens at a time, the adapter not merged; on a GPU also replayed from a CUDA graph.
memory: the most that training holds at once, beside what it began with; nothing is timed.
host: a layer so small that what is timed is Python, the launches and PyTorch's own work for each call.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from bench import timing
from bench.layers import IN_EVALUATION, NEEDS, PARTS, PROVIDERS, Layer, make_layer
from bench.problem import Judged, LayerShape, ShapeCase, make_problem
from bench.providers import Checked, Subject, Work
from dora_kernels.testing import Problem, eager, error, errors, limits, oracle, solve

if TYPE_CHECKING:
    from bench.run import Run


def cases(run: Run, suite: str) -> Iterator[LayerCase]:
    """The suite's comparisons."""
    cuda = run.device.type == "cuda"
    hidden, tokens, ranks, parts, providers, copies = {
        # One call's tensors fill a cache by themselves, and reading W is a hundredth of its time.
        "layer": (
            [4096] if cuda else [1024], [256, 8192] if cuda else [256], [16],
            tuple(part for part in PARTS if not part.startswith("inference")), PROVIDERS, 2,
        ),
        "decode": (
            [4096] if cuda else [1024], [1, 8, 64] if cuda else [1], [16], ("inference", "inference in a graph"),
            IN_EVALUATION, 12,
        ),
        "memory": (
            [4096] if cuda else [2048], [8192] if cuda else [256], [16], ("forward and backward", "step"), PROVIDERS, 1,
        ),
        "host": ([64], [1], [8], ("inference", "forward and backward"), IN_EVALUATION, 1),
    }[suite]  # fmt: skip
    for shape in run.shapes(hidden, tokens, ranks):
        yield LayerCase(shape, suite, parts, providers, copies)


@dataclass
class LayerCase(ShapeCase):
    """A comparison of layers."""

    shape: LayerShape
    suite: str
    parts: Sequence[str]
    providers: Sequence[str] = PROVIDERS
    most_copies: int = 12
    _judged: dict[str, Judged] = field(default_factory=dict, init=False)

    @property
    def timed(self) -> bool:  # type: ignore[override]
        """False for memory."""
        return self.suite != "memory"

    @functools.cached_property
    def problems(self) -> list[Problem]:
        """Copies that exceed the cache, if `most_copies` can."""
        first = make_problem(self.shape, 0)
        size = sum(t.nbytes for t in (first.x, *first.factors, first.dy))
        count = timing.copies_beyond(timing.cache_bytes(self.shape.device), size, most=self.most_copies)
        return [first, *(make_problem(self.shape, seed) for seed in range(1, count))]

    def subject(self, provider: str) -> Subject:
        """The provider's layer on every copy, checked on the first."""
        layers = [make_layer(provider, problem, self.shape) for problem in self.problems]
        first, kind = layers[0], layers[0].kind
        if kind not in self._judged:
            self._judged[kind] = judged(self.problems[0], kind)
        graph = {"inference in a graph"}
        names = [name for name in self.parts if name not in graph or self.shape.device.type == "cuda"]
        names = [name for name in names if first.trains or name.startswith("inference")]
        parts: dict[str, list[Work]] = {
            name: [functools.partial(PARTS[name][0], layer) for layer in layers] for name in names
        }
        least = {name: self._least(name, kind) for name in names}
        return Subject(
            provider, parts, *self._check(first, self._judged[kind]), least, frozenset(graph),
            again=lambda: self._check(first, judged(first.moved(self.problems[0]), kind)),
        )  # fmt: skip

    def _check(self, layer: Layer, judge: Judged) -> Checked:
        """The errors of what is timed, and those allowed."""
        wanted, allowed = judge
        found = errors(layer.results(), wanted) if layer.trains else {}
        if "inference" in self.parts:
            found["inference"] = error(layer.run_inference(), wanted["y"])
            allowed = {**allowed, "inference": allowed["y"]}
        return found, {name: limit for name, limit in allowed.items() if name in found}

    def _least(self, part: str, kind: str) -> tuple[int, int]:
        shape = self.shape
        return least_of(
            (shape.tokens, shape.hidden, shape.hidden, shape.rank), shape.widths, kind, *PARTS[part][1:], "step" in part
        )


def judged(problem: Problem, kind: str) -> Judged:
    """What a kind of layer computes exactly, and the errors that plain PyTorch operations allow it."""
    problem = problem.replace(detach_norm=kind != "dora_attached")
    if not kind.startswith("dora"):
        problem = problem.replace(magnitude=None)
    if kind == "frozen":
        problem = problem.replace(lora_B=torch.zeros_like(problem.lora_B))
    wanted = oracle(problem, NEEDS[kind])
    return wanted, limits(solve(eager, problem, NEEDS[kind]), wanted)


def least_of(
    sizes: tuple[int, int, int, int], widths: tuple[int, int], kind: str, micro_batches: int, backward: bool, step: bool
) -> tuple[int, int]:
    """The fewest bytes and FLOPs: every operand read or written once in each pass, every product done once.

    Sizes are tokens, out_features, in_features and rank, widths the bytes of an element of the layer and of the
    adapter. An optimizer step reads and writes each trained parameter, its gradient and two moments, and refreshes
    the norm.
    """
    m, n, k, r = sizes
    wide, narrow = widths
    dora, adapted = kind.startswith("dora"), kind != "frozen"
    factors = r * (n + k) + (n if dora else 0) if adapted else 0
    low = 2 * m * r * (n + k) if adapted else 0
    size, flops = wide * (m * k + n * k + m * n) + narrow * factors, 2 * m * n * k + low
    if backward:
        # dY, W and dX; x for dA, and the base product for dm.
        kept = (m * k if adapted else 0) + (m * n if dora else 0)
        size += wide * (m * n + n * k + m * k + kept) + narrow * 2 * factors
        flops += 2 * m * n * k + 2 * low
    size, flops = micro_batches * size, micro_batches * flops
    if step and adapted:
        size += narrow * 7 * factors
        if dora:
            size, flops = size + wide * n * k, flops + 2 * n * k * r
    return size, flops
