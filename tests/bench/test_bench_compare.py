"""`python -m bench compare`: what counts as a change, and two packages side by side."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch

import dora_kernels
from bench import compare
from bench.__main__ import main
from bench.compare import Change, Comparison, Worker, trimmed

ROOT = Path(dora_kernels.__file__).parents[1]
OPTIONS = {
    "suites": ["host"], "device": "cpu", "dtypes": ["fp32"], "hidden": [16], "ranks": [2], "tokens": [2],
    "providers": ["ours_torch"],
}  # fmt: skip


def change(ratios, peaks=(0, 0)):
    return Change("a case", "a part", "ours", [1.0] * len(ratios), list(ratios), peaks)


@pytest.mark.parametrize("pairs", [8, 9, 15, 21, 40])
def test_the_interval_holds_its_confidence(pairs):
    """The median of n fair pairs lies outside with at most a hundredth, and one more pair cut off would be too many."""
    cut = trimmed(pairs)
    outside = 2 * sum(math.comb(pairs, k) for k in range(cut + 1)) / 2**pairs
    assert outside <= 0.01 < outside + 2 * math.comb(pairs, cut + 1) / 2**pairs


def test_too_few_pairs_say_nothing():
    assert trimmed(7) is None and change([9.0] * 7).verdict == "" and change([9.0] * 8).verdict == "slower"


def test_verdicts():
    wide = [0.8, 0.9, 1.0, 1.1, 1.2] * 3
    assert change(wide).verdict == "" and change([2 * r for r in wide]).verdict == "slower"
    assert change([r / 2 for r in wide]).verdict == "faster"
    assert change([1.03] * 15).verdict == "", "within the margin"
    assert change([*[1.2] * 9, *[0.9] * 6]).verdict == "", "its interval reaches down"
    assert change([1.0] * 15, (1 << 20, 2 << 20)).verdict == "more memory"
    assert change([1.0] * 15, (100, 200)).verdict == "", "a few bytes"
    slow, fast = change([2.0] * 15), change([0.5] * 15)
    assert Comparison([slow, fast]).regressions == [slow]


def test_a_pair_is_compared_with_its_neighbour():
    drifting = Change("a case", "a part", "ours", [1.0, 2.0, 4.0] * 5, [1.1, 2.2, 4.4] * 5)
    assert drifting.ratio == pytest.approx(1.1) and drifting.interval == pytest.approx((1.1, 1.1))


CALL = "    return formula.linear(x, weights, g, form.scaling, "
PAUSE = "    __import__('time').sleep(0.02)\n"


def edit(package, file, old, new):
    """Replace what stands once in a file of the package."""
    path = package / "dora_kernels" / "engine" / file
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


@pytest.fixture
def slow_package(tmp_path):
    """The package, with a pause in every forward."""
    shutil.copytree(ROOT / "dora_kernels", tmp_path / "dora_kernels", ignore=shutil.ignore_patterns("__pycache__"))
    edit(tmp_path, "layer.py", CALL, PAUSE + CALL)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize(("slower_now", "verdict"), [(True, "slower"), (False, "faster")])
def test_a_slow_package_is_told_from_a_fast_one(slow_package, slower_now, verdict):
    packages = (ROOT, slow_package) if slower_now else (slow_package, ROOT)
    done = []
    with Worker(packages[0], OPTIONS) as old, Worker(packages[1], OPTIONS) as new:
        found = compare.compare(old, new, 8, lambda *counts: done.append(counts))
    assert isinstance(found, Comparison) and not found.notes and not found.faults and done == [(1, 1)]
    assert {change.part for change in found.changes} == {"inference", "forward and backward"}
    assert all(change.verdict == verdict for change in found.changes)
    assert all(len(change.before) == len(change.after) == 8 for change in found.changes)


@pytest.mark.slow
def test_what_a_revision_gets_wrong_is_noted(slow_package):
    edit(slow_package, "layer.py", CALL, CALL.replace("form.scaling", "1.01 * form.scaling"))
    with Worker(ROOT, OPTIONS) as old, Worker(slow_package, OPTIONS) as new:
        found = compare.compare(old, new, 1, lambda *_: None)
    assert any("now: ours, torch: wrong result" in fault for fault in found.faults) and not found.notes


@pytest.mark.slow
def test_a_norm_that_steps_make_stale_is_a_fault(slow_package):
    """As fast as nobody else, and right when the layer is made."""
    asked = "        if norm is None or not _enabled:\n            return None\n        weight, "
    edit(slow_package, "norm_cache.py", asked, "        if norm is not None:\n            return norm\n" + asked)
    with Worker(ROOT, OPTIONS, old=True) as old, Worker(slow_package, OPTIONS) as new:
        found = compare.compare(old, new, 1, lambda *_: None)
    (fault,) = found.faults
    assert "now: ours_torch: wrong result after what was timed: y off by" in fault and not found.notes


@pytest.mark.slow
@pytest.mark.parametrize("broken_now", [True, False])
def test_a_revision_that_fails_while_it_is_measured(slow_package, broken_now):
    """The working tree's failure is a regression, the old revision's is not."""
    edit(slow_package, "layer.py", PAUSE, "    raise SystemExit(3)\n")
    packages = (ROOT, slow_package) if broken_now else (slow_package, ROOT)
    with Worker(packages[0], OPTIONS, old=True) as old, Worker(packages[1], OPTIONS) as new:
        found = compare.compare(old, new, 1, lambda *_: None)
    said, silent = (found.faults, found.notes) if broken_now else (found.notes, found.faults)
    (line,) = said
    whose = "the working tree" if broken_now else "the old revision"
    assert line.endswith(f"{whose}: its process ended") and not silent


def test_a_worker_measures_the_package_it_was_given(tmp_path):
    with pytest.raises(RuntimeError, match=r"dora_kernels comes from .*, not from"):
        Worker(tmp_path, OPTIONS)


BAD = {
    "revision": (["no-such-revision"], "there is no revision 'no-such-revision'"),
    "option": (["--help-me"], "the following arguments are required: REF"),
    "an option for a revision": (["--", "--all"], "there is no revision '--all'"),
    "suite": (["HEAD", "--suite", "model"], "--suite: invalid choice: 'model'"),
    "provider": (["HEAD", "--providers", "nobody"], "--providers: invalid choice: 'nobody'"),
    "rounds": (["HEAD", "--rounds", "7"], "--rounds: expected a whole number of at least 8, got '7'"),
    "device": (["HEAD", "--device", "tpu"], "--device: expected cpu, cuda or cuda:N"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_bad_input(capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        main(["compare", *arguments])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and message in said and said.count("\n") == 1


def test_a_revision_that_cannot_be_measured(capsys, monkeypatch):
    def extract(revision, folder):
        (folder / "dora_kernels").mkdir()
        (folder / "dora_kernels" / "__init__.py").write_text("raise ImportError('too old')")
        return "0" * 40

    monkeypatch.setattr(compare, "extract", extract)
    with pytest.raises(SystemExit) as stopped:
        main(["compare", "HEAD", "--device", "cpu"])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and "HEAD: the old revision: ImportError: too old" in said and said.count("\n") == 1


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git repository")
def test_a_revision_beside_itself(capsys):
    status = main([
        "compare", "HEAD", "--suite", "host", "--hidden", "16", "--rank", "2", "--providers", "ours_torch",
        "--rounds", "8", "--device", "cpu",
    ])  # fmt: skip
    said = capsys.readouterr().out
    assert status == 0 and "no regression beyond noise" in said
    assert "host: 16x16, rank 2, 1 token, fp32: inference" in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is missing without a GPU is there")
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git repository")
def test_nothing_that_could_be_compared(capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(SystemExit) as stopped:
        main(["compare", "HEAD", "--suite", "host", "--providers", "ours_triton", "--rounds", "8", "--device", "cpu"])
    said = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and said[-1].endswith("HEAD: none of ours_triton could be measured in both")
