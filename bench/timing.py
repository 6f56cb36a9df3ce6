"""Times taken side by side, so that a machine that drifts favours nobody.

Every round times every candidate once, in an order that turns from round to round. What is compared is the median over
rounds of the quotient of two times of one round. On a GPU the times are those of events around the work, with the
device idle before, so that a candidate which keeps the device waiting for Python pays for it.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

Work = Callable[[], Any]


@dataclass
class Candidate:
    """Something to time: the same call on one or several copies of its inputs, taken in turn."""

    name: str
    copies: Sequence[Work]
    calls: int = 0
    """Calls made by one pass over the copies; more than their number where one of them is a captured graph."""
    samples: list[float] = field(default_factory=list)
    """Seconds per call, one for each round."""

    def __post_init__(self) -> None:
        self.calls = self.calls or len(self.copies)

    @property
    def seconds(self) -> float:
        """The median."""
        return statistics.median(self.samples)

    @property
    def spread(self) -> float:
        """The distance between the quartiles, of fewer than four samples between the extremes, over the median."""
        if len(self.samples) < 4:
            return (max(self.samples) - min(self.samples)) / self.seconds
        low, _, high = statistics.quantiles(self.samples, n=4)
        return (high - low) / self.seconds

    def ratio(self, other: Candidate) -> float:
        """This one's time over `other`'s: the median of the quotients within each round."""
        return statistics.median(mine / theirs for mine, theirs in zip(self.samples, other.samples))


def elapsed(device: torch.device, work: Work) -> float:
    """Seconds that `work` takes, the device idle before and after."""
    if device.type != "cuda":
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start_event.record()
    work()
    end_event.record()
    torch.cuda.synchronize(device)
    return start_event.elapsed_time(end_event) / 1e3


def interleave(
    candidates: Sequence[Candidate],
    device: torch.device,
    *,
    rounds: int = 21,
    sample_seconds: float = 4e-3,
    limit_seconds: float = 10.0,
) -> None:
    """Fill the candidates' `samples`: at least 3 rounds, at most `rounds`, none begun after `limit_seconds`.

    A sample repeats the pass over the copies until it lasts about `sample_seconds`. Where one of the candidates has to
    repeat it, each makes one call before a sample: the candidate before it left its own things in the caches.
    """
    start = time.perf_counter()
    passes = {}
    for candidate in candidates:
        for work in candidate.copies:  # compiles, allocates, fills caches
            work()
        once = elapsed(device, lambda candidate=candidate: run_passes(candidate, 1))
        passes[candidate.name] = max(1, min(1000, math.ceil(sample_seconds / max(once, 1e-7))))
    warm = max(passes.values(), default=1) > 1
    orders = itertools.cycle([list(candidates), list(reversed(candidates))])
    for index in range(rounds):
        if index >= 3 and time.perf_counter() - start > limit_seconds:
            break
        order = next(orders)
        turn = index // 2 % len(order)
        for candidate in order[turn:] + order[:turn]:
            count = passes[candidate.name]
            if warm:
                candidate.copies[-1]()
            seconds = elapsed(device, lambda candidate=candidate, count=count: run_passes(candidate, count))
            candidate.samples.append(seconds / (count * candidate.calls))


def run_passes(candidate: Candidate, passes: int) -> None:
    for _ in range(passes):
        for work in candidate.copies:
            work()


def captured(name: str, copies: Sequence[Work], device: torch.device, in_place: bool = False) -> Candidate:
    """A candidate whose calls are replayed from one CUDA graph, without Python between them; as it is on a CPU.

    A replay has to have the calls' results, unless those change their own inputs.
    """
    if device.type != "cuda":
        return Candidate(name, copies)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        called = [work() for work in copies]
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = [work() for work in copies]
    graph.replay()
    if not in_place and any(differ(*pair) for pair in zip(called, replayed)):
        raise RuntimeError("its replay has another result than the calls")
    return Candidate(name, [graph.replay], calls=len(copies))


def differ(result: Any, other: Any) -> bool:
    """Whether two results, tensors or sequences of them, are not the same up to rounding."""
    if isinstance(result, torch.Tensor):
        return not float((result.double() - other.double()).norm()) <= 0.01 * float(result.double().norm())
    return any(differ(*pair) for pair in zip(result, other))


def peak_bytes(device: torch.device, work: Work) -> int:
    """The most memory for tensors that `work` holds at once, beside what was there before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with _quiet(), torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        work()
    held = most = 0
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the profiler's C++ code writes to file descriptor 2 whenever it starts and stops."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def copies_beyond(cache_bytes: int, bytes_each: int, most: int = 64) -> int:
    """How many copies of inputs of `bytes_each` make 1.5 times the cache: taken in turn, none is found there."""
    return min(most, max(2, math.ceil(1.5 * cache_bytes / max(bytes_each, 1))))


def cache_bytes(device: torch.device) -> int:
    """The last-level cache: the GPU's L2; for a CPU, the largest that the system names, or 32 MiB."""
    if device.type == "cuda":
        size: int = torch.cuda.get_device_properties(device).L2_cache_size
        return size
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max([int(size[:-1]) * 2**10 for size in sizes if size.endswith("K")], default=32 * 2**20)


def copy_bandwidth(device: torch.device, size: int, rounds: int) -> float:
    """Bytes per second, read plus written, of a large copy on the device: the best of the rounds."""
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    candidate = Candidate("copy", [lambda: target.copy_(source)])
    interleave([candidate], device, rounds=rounds)
    return 2 * source.nbytes / min(candidate.samples)


def blas_rate(device: torch.device, size: int, dtype: torch.dtype, rounds: int) -> float:
    """Operations per second of a large square matrix product on random data: the best of the rounds."""
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    candidate = Candidate("product", [lambda: left @ right])
    interleave([candidate], device, rounds=rounds)
    return 2 * size**3 / min(candidate.samples)
