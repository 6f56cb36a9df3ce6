"""Where the tests run: each takes a `lane`, a backend on a device.

    pytest                  the CPU: the torch backend, and the Triton kernels in Triton's interpreter
    pytest -m gpu           the same tests on a GPU, with the compiled kernels
    pytest --hypothesis-profile=search      a longer, random search of the property-based tests
"""

from __future__ import annotations

import collections
import os
from typing import Any

import torch
from hypothesis import HealthCheck, settings

# Triton reads this when it is imported, so it is set before anything here can import it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# What cuBLAS wants before it promises the same bits twice; read when CUDA starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# A table that `tune` has left for this machine would change what runs.
os.environ["DORA_KERNELS_CACHE"] = os.devnull

import pytest
from helpers import LANES, Lane, usable

from dora_kernels import patch_peft_globally
from dora_kernels.engine import dispatch

settings.register_profile(
    "default", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
settings.register_profile("search", settings.get_profile("default"), derandomize=False, max_examples=1000)
settings.load_profile("default")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """What was skipped and why: a line for each reason, where ``-rs`` would print one for each test function."""
    reasons = collections.Counter(report.longrepr[2] for report in terminalreporter.stats.get("skipped", ()))
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"{count} skipped: {reason.removeprefix('Skipped: ')}")


@pytest.fixture(scope="session", params=LANES)
def lane(request: pytest.FixtureRequest) -> Lane:
    return usable(request.param)


@pytest.fixture
def globally():
    """PEFT patched for the length of a test."""
    handle = patch_peft_globally()
    yield handle
    handle.restore()


@pytest.fixture(scope="session", autouse=True)
def poisoned_memory():
    """Fill every fresh allocation with NaN, so that reading what nobody wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()


@pytest.fixture(scope="session", autouse=True)
def one_thread_per_worker():
    """Several workers with a thread pool each would wait for one another's cores."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))


@pytest.fixture(autouse=True)
def fresh_state(monkeypatch: pytest.MonkeyPatch):
    """The same random numbers for each test, and no warning held back because an earlier test met it."""
    torch.manual_seed(0)
    monkeypatch.setattr(dispatch, "_warned", set())


@pytest.fixture
def call(capsys):
    """The command line: exit status, standard output and error of ``call(*arguments)``."""
    from dora_kernels import cli

    def run(*arguments):
        capsys.readouterr()  # transformers' progress
        status = cli.main([str(argument) for argument in arguments])
        return status, *capsys.readouterr()

    return run
