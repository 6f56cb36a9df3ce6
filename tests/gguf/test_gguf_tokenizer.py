"""Tokenizers in GGUF files, and the example that writes them all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import dora_kernels

pytest.importorskip("gguf")
pytest.importorskip("peft")
pytest.importorskip("transformers")

import gguf
from gguf_models import SIZES, WAYS, byte_level, random_model, words
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dora_kernels import load_adapter
from dora_kernels.gguf import export_model, read_adapter


@pytest.mark.parametrize("name", WAYS)
def test_how_text_is_cut_has_a_name(name, tmp_path):
    model = random_model("llama")
    model.resize_token_embeddings(300)
    export_model(model, tmp_path / "m.gguf", tokenizer=WAYS[name]())
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    assert fields["tokenizer.ggml.pre"].contents() == name
    tokens, types = (fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "token_type"))
    assert len(tokens) == len(types) == 300 and tokens[0] == "<|bos|>" and tokens[-1] == "[PAD299]"
    assert [types[0], types[5], types[-1]] == [gguf.TokenType.CONTROL, gguf.TokenType.NORMAL, gguf.TokenType.UNUSED]
    assert fields["tokenizer.ggml.merges"].contents() == ["t h", "th e", "Ġ the", "1 2"]
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 1
    assert fields["tokenizer.ggml.add_bos_token"].contents() is False


def test_tokenizers_that_are_refused(tmp_path):
    model = random_model()
    model.resize_token_embeddings(300)
    unknown = byte_level(*words(r"\w+"))
    with pytest.raises(ValueError, match=r"no GGUF name is known for .* split by \['.*w\+', 'bytes'\]; known: gpt-2"):
        export_model(model, tmp_path / "m.gguf", tokenizer=unknown)
    piece = Tokenizer(models.BPE({"a": 0}, [], byte_fallback=True))
    with pytest.raises(ValueError, match=r"BPE with byte fallback \(SentencePiece\)"):
        export_model(model, tmp_path / "m.gguf", tokenizer=PreTrainedTokenizerFast(tokenizer_object=piece))
    with pytest.raises(ValueError, match=r"token 261 has no row in the embedding, which has 96"):
        export_model(random_model(), tmp_path / "m.gguf", tokenizer=WAYS["gpt-2"]())
    assert not list(tmp_path.iterdir())


TEXTS = [
    "The capital of France is Paris, isn't it?  1234567 + 89",
    "def f(x):\n\treturn  x ** 2  # naïve café — 你好 🙂\r\n\r\n",
    "<|im_start|>user\nHi<|im_end|>\n",
    "",
]


def test_a_real_tokenizer_gives_the_same_ids(tmp_path):
    pytest.importorskip("sentencepiece")
    pytest.importorskip("peft")
    from bench import training

    try:
        source = training.packaged_file(training.WEIGHTS_PACKAGE, ".gguf")
    except training.Missing as error:
        pytest.skip(str(error))
    wanted = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    model = random_model()
    model.resize_token_embeddings(len(wanted))
    export_model(model, tmp_path / "m.gguf", tokenizer=wanted, dtype="f16")
    found = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    for text in TEXTS:
        assert found(text)["input_ids"] == wanted(text)["input_ids"], text
    assert len(wanted(TEXTS[0])["input_ids"]) > 10
    for name in ("bos_token_id", "eos_token_id", "unk_token_id", "pad_token_id", "chat_template"):
        assert getattr(found, name) == getattr(wanted, name), name


@pytest.mark.slow
def test_the_example(tmp_path):
    """The whole way with a tiny model: every file is there, and transformers reads the float32 one back exactly."""
    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, "vocab_size": 300, "max_position_embeddings": 256}))
    model.save_pretrained(tmp_path / "model")
    WAYS["gpt-2"]().save_pretrained(tmp_path / "model")
    root = Path(dora_kernels.__file__).parents[1]
    options = ["--no-memory", "--steps", "2", "--rank", "2", "--lora-rank", "3"]
    command = [sys.executable, root / "examples" / "merge_to_gguf.py", "--model", "model", "--out", "out", *options]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("TRITON_INTERPRET", None)
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    assert any(line.startswith("merged-f32.gguf") and "difference of a logit 0," in line for line in lines), lines
    sizes = [line.split(":")[1].split(",")[:2] for line in lines if line.startswith(("base: ", "merged: "))]
    assert len(sizes) == 2 and sizes[0] == sizes[1]
    found = read_adapter(tmp_path / "out" / "adapter.gguf")
    assert found.layers.keys() == load_adapter(tmp_path / "out" / "adapter").layers.keys()
    assert {layer.rank for layer in read_adapter(tmp_path / "out" / "adapter-lora.gguf").layers.values()} == {3}
    assert (tmp_path / "out" / "reference.npz").is_file()
