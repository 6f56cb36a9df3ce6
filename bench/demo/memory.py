"""Peak memory of one variant in a process of its own: `python -m bench.demo.memory REQUEST`."""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

from bench.demo.settings import Settings

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")


class PeakMemory:
    """Growth of this process's memory, or of the GPU's, since `start`; in bytes.

    The kernel's own high-water mark where it can be reset (Linux), else samples.
    """

    def __init__(self, cuda: bool) -> None:
        self._cuda = cuda
        self._exact = False
        self._before = 0
        self._highest = 0
        self._done = threading.Event()

    def start(self) -> None:
        """Take the present as zero."""
        if self._cuda:
            import torch

            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
            return
        try:
            CLEAR.write_text("5")
            self._before = _status("VmRSS")
            self._exact = True
        except (OSError, KeyError):
            import psutil

            process = psutil.Process()
            self._before = process.memory_info().rss
            threading.Thread(target=self._watch, args=(process,), daemon=True).start()

    def _watch(self, process: Any) -> None:
        while not self._done.wait(0.002):
            self._highest = max(self._highest, process.memory_info().rss)

    def growth(self) -> int:
        """Highest value since `start`, less the value then."""
        self._done.set()
        if self._cuda:
            import torch

            return int(torch.cuda.max_memory_allocated() - self._before)
        return (_status("VmHWM") if self._exact else self._highest) - self._before


def _status(key: str) -> int:
    fields = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return int(fields[key].split()[0]) * 1024


def measure(kind: str, source: str, settings: Settings, tokens: int, seconds: float) -> dict[str, Any]:
    """Train a few steps (the first creates the optimizer's state) and report the peak."""
    import torch

    import dora_kernels  # noqa: F401  for every kind, so that its code is no difference
    from bench.demo.model import adapt, device, load, patch
    from bench.demo.train import make_run, train_step

    started = time.perf_counter()
    base = load(source)
    peak = PeakMemory(device().type == "cuda")
    peak.start()
    model = adapt(base, kind, settings)
    if kind == "patched":
        patch(model)
    run = make_run(kind, model, settings)
    ids = torch.randint(base.config.vocab_size, (1, tokens), device=device())
    for step in range(3):
        if step >= 2 and time.perf_counter() - started > seconds:
            break
        train_step(run, ids, step)
    return {"peak_bytes": peak.growth(), "steps": len(run.losses)}


def main() -> None:
    """Answer one JSON request with one JSON line."""
    request = json.loads(sys.argv[1])
    settings = Settings(rank=request["rank"], lr=request["lr"])
    answer = measure(request["kind"], request["source"], settings, request["tokens"], request["seconds"])
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
