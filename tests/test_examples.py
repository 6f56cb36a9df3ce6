"""The scripts under `examples/`, each on a tiny model, as a user calls them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("peft")
pytest.importorskip("transformers")

import torch
from peft import PeftModel
from peft_models import base_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import dora_kernels

ROOT = Path(dora_kernels.__file__).parent.parent
WORDS = "the a cat dog sat ran on under mat tree quickly slowly and then slept".split()  # noqa: SIM905


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("example")
    base_model("llama").save_pretrained(folder / "model")
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder / "model")
    (folder / "texts.txt").write_text("\n".join(" ".join(WORDS[i : i + 9]) for i in range(7)))
    return folder


SCRIPTS = {
    "finetune": [sys.executable],
    "qdora": [sys.executable],
    "fsdp2": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_example(name, project):
    """It trains, says so, and saves an adapter that PEFT loads."""
    if name == "qdora":
        pytest.importorskip("bitsandbytes")
    command = [*SCRIPTS[name], f"examples/{name}.py", "--model", "model", "--data", "texts.txt", "--out", f"out-{name}"]
    command[command.index(f"examples/{name}.py")] = str(ROOT / "examples" / f"{name}.py")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("TRITON_INTERPRET", None)
    result = subprocess.run(
        [*command, "--steps", "10", "--batch", "2", "--rank", "2", "--lr", "1e-2"],
        cwd=project, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert "loss" in result.stdout
    dora_kernels.check_adapter(project / f"out-{name}", base_model("llama"))
    model = PeftModel.from_pretrained(base_model("llama"), project / f"out-{name}")
    moved = [p for n, p in model.named_parameters() if "lora_B" in n]
    assert all(torch.isfinite(p).all() and p.abs().max() > 0 for p in moved)
