"""The scripts under `examples/`, each on a tiny model, as a user calls them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("peft")
pytest.importorskip("transformers")

import torch
from experts_models import qwen3_moe
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


def printed(command, folder):
    """What a command prints that succeeds."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("TRITON_INTERPRET", None)
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_example(name, project):
    """It trains, says so, and saves an adapter that PEFT loads."""
    if name == "qdora":
        pytest.importorskip("bitsandbytes")
    script = ROOT / "examples" / f"{name}.py"
    command = [*SCRIPTS[name], script, "--model", "model", "--data", "texts.txt", "--out", f"out-{name}"]
    assert "loss" in printed([*command, "--steps", "10", "--batch", "2", "--rank", "2", "--lr", "1e-2"], project)
    dora_kernels.check_adapter(project / f"out-{name}", base_model("llama"))
    model = PeftModel.from_pretrained(base_model("llama"), project / f"out-{name}")
    moved = [p for n, p in model.named_parameters() if "lora_B" in n]
    assert all(torch.isfinite(p).all() and p.abs().max() > 0 for p in moved)


def test_serve(project):
    """Each customer's tokens are those that it has alone; the base model's are the base model's."""
    script = ROOT / "examples" / "serve.py"
    command = [sys.executable, script, "--model", "model", "--prompt", "the cat", "--tokens", "6"]
    text = printed(command, project)
    rows = dict(re.findall(r"^(base model|alice|bob|carol) +'(.*)'$", text, re.MULTILINE))
    assert len(rows) == 4 and all(row.startswith("the cat") for row in rows.values()) and len(set(rows.values())) > 2
    ((base, slots, host),) = numbers(r"base model ([\d,]+) bytes, slots ([\d,]+), host ([\d,]+)", text)
    assert base == sum(p.nbytes for p in base_model("llama").parameters()) and slots and not host
    model = base_model("llama").eval()
    dora_kernels.apply_dora(model, ["q_proj", "v_proj"], rank=3)
    dora_kernels.save_adapter(model, project / "mine")
    text = printed([*command, "--adapter", "mine=mine"], project)
    assert f"mine         {rows['base model']!r}" in text, "a fresh adapter changes nothing"


def test_experts(project):
    """The same on a mixture of experts: every stack, the router and the attention have moved."""
    qwen3_moe(vocab_size=64).save_pretrained(project / "mixture")
    for file in (project / "model").glob("token*"):
        (project / "mixture" / file.name).write_bytes(file.read_bytes())
    script = [sys.executable, ROOT / "examples" / "experts.py", "--model", "mixture", "--data", "texts.txt"]
    options = ["--out", "out-experts", "--steps", "10", "--batch", "2", "--rank", "2", "--lr", "1e-2"]
    assert "loss" in printed([*script, *options], project)
    handle = dora_kernels.patch_peft_globally()
    try:
        model = PeftModel.from_pretrained(qwen3_moe(vocab_size=64), project / "out-experts")
    finally:
        handle.restore()
    moved = {n: p for n, p in model.named_parameters() if "lora_B" in n}
    assert all(torch.isfinite(p).all() and p.abs().max() > 0 for p in moved.values())
    assert sum("experts" in name for name in moved) == 4


def variant(name, folder):
    return printed([sys.executable, ROOT / "examples" / "variants" / f"{name}.py"], folder)


def numbers(pattern, text):
    """Of every match of the pattern, its groups."""
    rows = [match.groups() for match in re.finditer(pattern, text)]
    assert rows, text
    return [[float(number.replace(",", "")) for number in row] for row in rows]


def test_article(tmp_path):
    """Every customer's adapter is small, helps, from its file as after training, and leaves the base model alone."""
    text = variant("article", tmp_path)
    ((whole,),) = numbers(r"base model +([\d.]+) KiB", text)
    trained = numbers(r"([\d.]+) KiB, +([\d.]+)% right after training", text)
    served = numbers(r"([\d.]+)% right with the base model, +([\d.]+)% adapted", text)
    assert len(trained) == len(served) == 3
    for (size, right), (base, adapted) in zip(trained, served):
        assert size < whole / 20 and adapted == right > base + 5
    assert "the base model is as before" in text


def test_mlp(tmp_path):
    """LoRA and DoRA learn with a tenth of the parameters; merged, DoRA has as many as before and is as right."""
    rows = numbers(r"([\d,]+) of ([\d,]+) parameters train +([\d.]+)%", variant("mlp", tmp_path))
    (trained, total, before), plain, lora, dora, merged = rows
    assert trained == total and plain[:2] == [trained, total] and plain[2] > before + 10
    assert all(row[0] < trained / 10 and row[2] > before + 10 for row in (lora, dora))
    assert merged == [total, total, dora[2]]  # what trained before it was adapted trains again


def test_peft_path(tmp_path):
    """The merged model is of the base model's size and gives the adapted model's logits."""
    text = variant("peft_path", tmp_path)
    assert "trainable params: 37,120 ||" in text and "14 layers on this package" in text
    losses = numbers(r"loss ([\d.]+)", text)
    assert losses == sorted(losses, reverse=True)
    ((size, before),) = numbers(r"of ([\d,]+) parameters, ([\d,]+) before", text)
    assert size == before
    assert numbers(r"logits differ by (\S+)", text)[0][0] < 1e-5


def test_column_norm(tmp_path):
    """A tutorial's checkpoint gives the tutorial's outputs, attached and merged."""
    errors = numbers(r"differ by (\S+)", variant("column_norm", tmp_path))
    assert len(errors) == 2 and all(error < 1e-5 for (error,) in errors)
