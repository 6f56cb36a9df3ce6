"""`examples/quickstart.ipynb`, cell after cell, with a tiny model in place of the one it would download."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("peft")
pytest.importorskip("transformers")

import dora_kernels
from tests.frameworks import inputs

ROOT = Path(dora_kernels.__file__).parent.parent
NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"


@pytest.mark.slow
def test_quickstart(tmp_path):
    """Both trainings have the same losses, the adapter loads as it was saved, and the merged model says the same."""
    notebook = json.loads(NOTEBOOK.read_text())
    assert notebook["nbformat"] == 4 and not any(cell.get("outputs") for cell in notebook["cells"])
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["metadata"] for cell in cells[:2]] == [{"tags": ["install"]}, {}]
    (tmp_path / "quickstart.py").write_text("\n".join("".join(cell["source"]) for cell in cells[1:]))
    inputs.write(tmp_path / "inputs")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
                   "QUICKSTART_MODEL": str(tmp_path / "inputs" / "model"), "QUICKSTART_STEPS": "3"}  # fmt: skip
    command = [sys.executable, "quickstart.py"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    text = result.stdout
    assert "PatchHandle(patched=14, skipped=0)" in text
    losses = re.findall(r"loss without (\S+)  with (\S+)", text)
    assert len(losses) == 3 and all(abs(float(one) - float(other)) < 2e-5 for one, other in losses)
    assert float(re.search(r"logits differ by (\S+)", text)[1]) < 1e-5
    answers = dict(re.findall(r"^(after|merged): +(.*)$", text, re.MULTILINE))
    assert answers["after"] == answers["merged"] and (tmp_path / "quickstart-merged" / "model.safetensors").exists()
