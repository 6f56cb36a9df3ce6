"""What trains whole models: the suites model, finetune and classify, and the demo, each on a tiny one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dora_kernels

pytest.importorskip("peft")
pytest.importorskip("transformers")

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast as Fast

from bench import show, training
from bench.providers import Missing
from bench.run import Options, Run
from bench.training import Training, held_out, in_turns
from dora_kernels.engine import merged

ROOT = Path(dora_kernels.__file__).parents[1]
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(autouse=True)
def plain_memory(monkeypatch):
    """torch's profiler counts fills."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A language model and an encoder that read characters."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    names = ["<pad>", "<s>", "</s>", "<unk>", *map(chr, range(32, 127))]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    llama = LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=len(names), max_position_embeddings=256))
    bert = BertForSequenceClassification(BertConfig(**SIZES, vocab_size=len(names), num_labels=10))
    for name, model in (("llama", llama), ("bert", bert)):
        model.save_pretrained(folder / name)
        Fast(tokenizer_object=tokenizer, **special).save_pretrained(folder / name)
    return {name: folder / name for name in ("llama", "bert")}


@pytest.fixture
def tiny(folders, monkeypatch):
    """Both in the place of the packaged models."""
    monkeypatch.setattr(training, "prepare", lambda *_: str(folders["llama"]))
    monkeypatch.setattr(training, "packaged_file", lambda *_: folders["bert"] / "model.safetensors")


def options(suite, **more):
    given = {"ranks": [4], "tokens": [24], "steps": 4, "seeds": (0, 1), "rounds": 3, "sample_ms": 0.1}
    return Options([suite], "cpu", **{"dtypes": ["fp32"], **given, **more})


@pytest.mark.slow
@pytest.mark.parametrize("dtypes", ["fp32", "bf16+fp32"])
def test_the_model_suite(tiny, dtypes):
    run = Run(options("model", dtypes=[dtypes]))
    run.all()
    assert not run.record["failures"] and not run.record["missing"]
    rows = {(row["provider"], row["part"]): row for row in run.record["rows"]}
    assert rows.keys() == {(name, part) for name in ("peft_dora", "ours", "peft_lora") for part in ("step", "token")}
    assert all({"logits", "token", "lora_A", "lora_B"} <= row["errors"].keys() for row in rows.values())
    assert ("magnitude" in rows["ours", "step"]["errors"]) and "magnitude" not in rows["peft_lora", "step"]["errors"]


@pytest.mark.parametrize("suite", ["finetune", "classify"])
def test_learning_curves(tiny, suite):
    run = Run(options(suite))
    run.all()
    assert not run.record["failures"] and not run.record["missing"]
    curves = run.record["curves"]
    assert [(curve["provider"], curve["seed"]) for curve in curves] == [
        (name, seed) for seed in (0, 1) for name in ("peft_dora", "ours", "peft_lora")
    ]
    assert all(len(curve["losses"]) == 4 and 0 <= curve["accuracy"] <= 1 for curve in curves)
    found = show.gaps(curves, suite)
    assert found["loss, ours to stock"] < 1e-4 < found["loss, seed to seed"]


def test_learning_curves_of_the_merged_forward(tiny, monkeypatch):
    """In 16 bits, where it rounds its weight: named, beside stock alone."""
    monkeypatch.setattr(merged, "DTYPES", merged.DTYPES)  # which it widens
    run = Run(options("finetune", dtypes=["bf16+fp32"], providers=["peft_dora", "ours_merged"]))
    run.all()
    assert not run.record["missing"]
    curves = run.record["curves"]
    assert [(curve["provider"], curve["dtypes"], curve["tokens"]) for curve in curves] == 2 * [
        ("peft_dora", "bf16+fp32", 24), ("ours_merged", "bf16+fp32", 24)
    ]  # fmt: skip
    stock, ours = curves[:2]
    assert stock["losses"] != ours["losses"] and abs(stock["held_out"] - ours["held_out"]) < 0.05


def test_a_model_that_is_far_from_stock_fails(tiny, monkeypatch):
    """As far as another seed is."""

    def other(model, **options):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_A" in name:
                    parameter.copy_(torch.randn_like(parameter))

    monkeypatch.setattr(training, "patch_all", other)
    run = Run(options("finetune"))
    run.all()
    assert any("from stock's, seeds differ by" in failure["message"] for failure in run.record["failures"])


class Toy(torch.nn.Module):
    """A model of one number, which counts its steps."""

    def __init__(self, order, name):
        super().__init__()
        self.weight, self.order, self.name = torch.nn.Parameter(torch.ones(())), order, name

    def forward(self, x, labels=None):
        self.order.append(self.name)
        logits = torch.stack([x * self.weight, torch.zeros_like(x)], -1)
        return type("Output", (), {"loss": (x * self.weight).sum(), "logits": logits})


def test_turns_and_when_they_end():
    order: list[str] = []
    trainings = [Training(Toy(order, name)) for name in "ab"]
    in_turns(trainings, [{"x": torch.ones(1)}] * 9, lambda done: done < 3)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert [len(one.losses) for one in trainings] == [3, 3] and trainings[0].losses == trainings[1].losses


def test_held_out_counts_examples():
    """Three examples in two batches: two right answers of three, and the mean loss over examples."""
    batches = [{"x": torch.tensor([1.0, 1.0]), "labels": torch.tensor([0, 1])},
               {"x": torch.tensor([-1.0]), "labels": torch.tensor([1])}]  # fmt: skip
    loss, right = held_out(Toy([], ""), batches)
    assert right == pytest.approx(2 / 3) and loss == pytest.approx((2 * 2.0 - 1.0) / 3)


def test_text_is_split_by_paragraphs():
    """No paragraph is both trained on and held out; repeats count once."""
    paragraphs = [f"Paragraph {i} " + "word " * 60 for i in range(30)]
    corpus = training.make_corpus("a", "\n\n".join([*paragraphs, paragraphs[0]]), ids_of, 16)
    known = [sum(t[::61].tolist().count(i) for t in (corpus.train, corpus.held_out)) for i in range(30)]
    assert len(corpus.train) + len(corpus.held_out) >= 30 * 61 and max(known) <= 1
    assert 0.05 < len(corpus.held_out) / len(corpus.train) < 0.2 and corpus.prompt.shape == (1, 24)
    with pytest.raises(Missing, match="--data: a is too short: .* at least 64 and 16 are needed"):
        training.make_corpus("a", "One.", ids_of, 16)


def ids_of(text, add_special_tokens):
    """A number for each word after "Paragraph": its own number, then 99 for each "word"."""
    return {"input_ids": [int(word) if word.isdigit() else 99 for word in text.split() if word != "Paragraph"]}


BAD = {
    "rank": (["--rank", "0"], "--rank must be at least 1, not 0"),
    "lr": (["--lr", "nan"], "--lr must be a positive number, not nan"),
    "steps": (["--steps", "3"], "--steps must be at least 20, not 3"),
    "data": (["--data", "nowhere.txt"], "--data: there is no file nowhere.txt"),
    "model": (["--model", "./nowhere"], "--model: there is no folder './nowhere'"),
    "option": (["--fast"], "No such option: --fast"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_bad_input_of_the_demo(arguments, message, capsys, monkeypatch):
    from bench.demo import __main__ as demo

    monkeypatch.setattr(sys, "argv", ["demo", *arguments])
    assert demo.main() == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


@pytest.mark.slow
def test_the_demo(folders, tmp_path):
    options = ["--quick", "--rank", "4", "--model", folders["llama"], "--out", tmp_path]
    command = [sys.executable, "-m", "bench.demo", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "demo.png", "report.txt", "results.json"}
    results = json.loads((tmp_path / "results.json").read_text())
    off = {kind: variant["loss_difference"] for kind, variant in results["variants"].items()}
    assert off["patched"] <= show.DEMO_LIMIT < min(off["frozen"], off["stale"]) and not results["failures"]
    assert set(results["saved"]) == {"merged_vs_unmerged", "stock_vs_patched"} and "control: norm" in done.stdout
    assert [cells[0] for _, cells in show.demo(results).rows] == list(show.DEMO.values())
