"""The machine, the versions and the commit that a benchmark ran with. Imports no torch at import."""

from __future__ import annotations

import importlib
import logging
import os
import platform
import subprocess
import sys
import time
import warnings
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

REPOSITORY = Path(__file__).resolve().parents[1]
_VERSIONED = ("torch", "triton", "peft", "transformers", "torchtune", "lycoris-lora", "axolotl", "numpy")


def from_tests(name: str) -> Any:
    """A module of tests/support/: what the tests compute and a command here only prints."""
    tests = str(REPOSITORY / "tests" / "support")
    if tests not in sys.path:
        sys.path.insert(0, tests)
    return importlib.import_module(name)


def wait_passively() -> None:
    """Let idle threads of torch's pools sleep soon; read by torch when it is imported.

    A pool of threads that spins without end starves any other on two cores, as when generation follows training. One
    that does not spin takes 0.1 ms to wake for every small operation: 100000 turns, a few milliseconds, avoid both.
    """
    os.environ["GOMP_SPINCOUNT"] = "100000"
    os.environ["KMP_BLOCKTIME"] = "2"


def quiet_libraries() -> None:
    """Silence what the libraries say about a plain run: that they deprecate, load weights, or have no GPU."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # where they are not imported yet
    for name in ("transformers", "torchao", "torch.utils._pytree", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="peft")


def cpu_name() -> str:
    """As its maker calls it, where the system says so."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def hardware(device: torch.device) -> dict[str, Any]:
    """What the figures depend on."""
    import torch

    found: dict[str, Any] = {"device": cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if device.type != "cuda":  # the name alone does not tell a CPU with 16-bit products from one without
        return {**found, "capability": torch.backends.cpu.get_cpu_capability()}
    properties = torch.cuda.get_device_properties(device)
    return {
        **found,
        "device": properties.name,
        "driver": _driver(),
        "memory": properties.total_memory,
        "l2": properties.L2_cache_size,
        "multiprocessors": properties.multi_processor_count,
        "capability": ".".join(map(str, torch.cuda.get_device_capability(device))),
    }


class Others:
    """What else ran on the machine since this was made."""

    def __init__(self) -> None:
        self._start = self._now()

    def cores(self) -> float | None:
        """How many cores the other processes kept busy, on average; None where the system does not say."""
        if self._start is None or (now := self._now()) is None or now[0] <= self._start[0]:
            return None
        wall, busy = (after - before for before, after in zip(self._start, now))
        return round(max(0.0, busy / wall), 2)

    @staticmethod
    def _now() -> tuple[float, float] | None:
        """Seconds on the clock, and seconds of CPU that were not this process's or its children's."""
        try:
            fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
            user, nice, system, _, _, interrupts, soft, steal = map(int, fields[:8])
        except (OSError, ValueError):
            return None
        busy = (user + nice + system + interrupts + soft + steal) / os.sysconf("SC_CLK_TCK")
        return time.monotonic(), busy - sum(os.times()[:4])


def versions() -> dict[str, str]:
    """Of Python and of the libraries compared, those that are installed."""
    import torch

    found = {"python": platform.python_version()}
    for name in _VERSIONED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if torch.version.cuda or torch.version.hip:
        found["cuda" if torch.version.cuda else "hip"] = str(torch.version.cuda or torch.version.hip)
    return found


def git(*arguments: str) -> str:
    """The output of a git command in the repository; raises `subprocess.CalledProcessError` with git's own words."""
    command = ["git", "-C", str(REPOSITORY), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()


def commit() -> str:
    """The commit measured, "+" where files differ from it; "unknown" outside a repository.

    COMMIT in the environment says it where there is no repository.
    """
    if given := os.environ.get("COMMIT"):
        return given
    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != REPOSITORY:
            return "unknown"
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return lines[0] if lines else None
