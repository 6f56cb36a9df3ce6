"""The change that `upstream/peft.md` proposes, on a copy of the installed PEFT: its own tests, and this package."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("peft")
pytest.importorskip("transformers")

import peft

import dora_kernels

ROOT = Path(dora_kernels.__file__).parent.parent
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not peft.__version__.startswith("0.21."), reason="the change is for peft 0.21"),
    pytest.mark.skipif(shutil.which("git") is None, reason="git applies the change"),
]


@pytest.fixture(scope="module")
def changed(tmp_path_factory):
    """A folder with PEFT's package, changed, and with the change's tests."""
    folder = tmp_path_factory.mktemp("changed")
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(peft.__file__).parent, folder / "src" / "peft", ignore=ignored)
    subprocess.run(["git", "apply", ROOT / "upstream" / "peft.diff"], cwd=folder, check=True)
    return folder


def run(changed, *command):
    path = os.pathsep.join(map(str, [changed / "src", ROOT, ROOT / "tests" / "support"]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, *command], cwd=changed, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_its_own_tests(changed):
    assert " passed" in run(changed, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "tests")


PROGRAM = """
import copy
import torch
from peft.tuners import lora
from peft.tuners.lora.variants import DoraLinearVariant
from peft_models import base_model, batch, check_parity, config, counted, lora_layers, move_adapter, peft_model
import dora_kernels
from peft import get_peft_model

stock = peft_model("llama")
handle = dora_kernels.patch_peft_globally()
ours = move_adapter(get_peft_model(base_model("llama"), config("llama")))
assert all(type(layer) is lora.Linear for layer in lora_layers(ours)), "a class was exchanged"
assert type(ours.base_model) is lora.LoraModel
ours.load_state_dict(stock.state_dict())
with counted(__import__("pytest").MonkeyPatch()) as counts:
    check_parity(stock, ours, batch())
print("FUSED", counts["layer"] // len(lora_layers(ours)), len(handle.patched), handle.skipped)

before = ours(**batch()).logits
ours.merge_adapter()
torch.testing.assert_close(ours(**batch()).logits, before, atol=1e-4, rtol=1e-4)
ours.unmerge_adapter()
torch.testing.assert_close(ours(**batch()).logits, before, atol=1e-4, rtol=1e-4)

local = dora_kernels.patch_peft(ours)      # with all options: classes are exchanged, and exchanged back
assert all(type(layer) is not lora.Linear for layer in lora_layers(ours)) and not local.skipped
local.restore()
handle.restore()
assert all(type(layer) is lora.Linear for layer in lora_layers(ours))
assert all(type(layer.lora_variant["default"]) is DoraLinearVariant for layer in lora_layers(ours))
plain = get_peft_model(base_model("llama"), config("llama"))
assert type(lora_layers(plain)[0].lora_variant["default"]) is DoraLinearVariant
"""


def test_this_package_registers(changed):
    assert "FUSED 1 14 {}" in run(changed, "-c", PROGRAM)
