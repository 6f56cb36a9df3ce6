"""`dora-kernels merge`: what PEFT trains beside an adapter is in the merged files, as merge_and_unload has it."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("safetensors")
pytest.importorskip("transformers")
pytest.importorskip("peft")

import peft
import transformers
from cli_models import llama, rewrite, snapshot
from safetensors.torch import load_file

from dora_kernels.checkpoints.checkpoint import Checkpoint

SIZES = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 30,
}  # fmt: skip


def classifier():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, num_labels=3, pad_token_id=0, tie_word_embeddings=False)
    return transformers.LlamaForSequenceClassification(config).eval()


def biased():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, attention_bias=True, tie_word_embeddings=False)
    return transformers.LlamaForCausalLM(config).eval()


def tied():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, tie_word_embeddings=True)).eval()


def trained(model, folder, **options):
    """PEFT's adapter of a model, all of it moved, saved; and the merged model's state dict."""
    config = peft.LoraConfig(use_dora=True, r=2, lora_alpha=4, target_modules=["q_proj"], **options)
    torch.manual_seed(1)
    adapted = peft.get_peft_model(model, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1 * torch.rand_like(parameter))
    adapted.save_pretrained(folder)
    return adapted.merge_and_unload().state_dict()


def assert_merged(folder, wanted, before):
    """The same tensors as PEFT's, of which other than the adapted ones, bit for bit, are other than before."""
    found = Checkpoint(folder)
    assert set(found) == {key for key in wanted if key in found or key != "lm_head.weight"}
    moved = {key for key in found if key not in before or not torch.equal(found[key], before[key])}
    for key in found:
        exact = {} if "q_proj.weight" in key else {"rtol": 0.0, "atol": 0.0}
        torch.testing.assert_close(found[key], wanted[key], **exact)
    return {key for key in moved if "q_proj.weight" not in key}


@pytest.mark.parametrize(
    ("make", "options", "moved"),
    [
        (classifier, {"task_type": "SEQ_CLS"}, {"score.weight"}),
        (llama, {"modules_to_save": ["lm_head", "embed_tokens"]}, {"lm_head.weight", "model.embed_tokens.weight"}),
        (llama, {"trainable_token_indices": [1, 7]}, {"model.embed_tokens.weight"}),
        (
            llama,
            {"trainable_token_indices": {"embed_tokens": [3], "lm_head": [4, 5]}},
            {"model.embed_tokens.weight", "lm_head.weight"},
        ),
        (tied, {"trainable_token_indices": [2, 29]}, {"model.embed_tokens.weight"}),
        (
            biased,
            {"bias": "all"},
            {f"model.layers.0.self_attn.{name}_proj.bias" for name in ("q", "k", "v", "o")},
        ),
    ],
    ids=["head", "modules", "tokens", "tokens-of-two", "tied-tokens", "biases"],
)  # fmt: skip
def test_as_peft_merges(call, tmp_path, make, options, moved):
    make().save_pretrained(tmp_path / "base", max_shard_size="6KB")
    before = Checkpoint(tmp_path / "base")
    wanted = trained(make(), tmp_path / "adapter", **options)
    status, stdout, stderr = call("merge", tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert (status, stderr) == (0, ""), stderr
    assert assert_merged(tmp_path / "out", wanted, before) == moved
    assert "left out" not in stdout and all(f"note: {key}: as trained" in stdout for key in moved)
    assert call("merge", tmp_path / "base", tmp_path / "adapter", tmp_path / "out2", "--adapter-only")[0] == 0
    found = Checkpoint(tmp_path / "out2")
    assert all(torch.equal(found[key], before[key]) for key in moved)
    status, _, stderr = call("merge", tmp_path / "base", tmp_path / "adapter", tmp_path / "out3", "--strength", "0.5")
    assert status == 2 and "--strength: expected 1" in stderr and "--adapter-only" in stderr


@pytest.mark.parametrize(
    ("make", "options"),
    [(llama, {"modules_to_save": ["lm_head"]}), (llama, {"trainable_token_indices": [1]}), (biased, {"bias": "all"})],
    ids=["modules", "tokens", "biases"],
)
def test_converted(call, tmp_path, make, options):
    """PEFT loads what is written again; a format without a place for it is refused, unless it is left out."""
    wanted = trained(make(), tmp_path / "adapter", **options)
    assert call("convert", tmp_path / "adapter", tmp_path / "again", "--to", "peft")[0] == 0
    found = peft.PeftModel.from_pretrained(make(), tmp_path / "again").merge_and_unload().state_dict()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    for more, status in ((), 2), (("--adapter-only",), 0):
        result = call("convert", tmp_path / "adapter", tmp_path / "other", "--to", "qdora", *more)
        assert result[0] == status and ("beside an adapter of the format 'peft'" in result[2]) == (status == 2)
    assert "other" in {place.name for place in tmp_path.iterdir()}


@pytest.mark.parametrize("size", ["10GB", "4KB"])
def test_a_head_that_the_files_lack_is_added(call, tmp_path, size):
    """Of the model that a classifier was made from, whole or in shards."""
    model = classifier()
    model.save_pretrained(tmp_path / "base", max_shard_size=size)
    places = Checkpoint(tmp_path / "base").shards
    shard = next(file for file, keys in places.items() if "score.weight" in keys)
    rewrite(tmp_path / "base" / shard, lambda tensors: tensors.pop("score.weight"))
    index = tmp_path / "base" / "model.safetensors.index.json"
    total = 0
    if size == "4KB":
        content = json.loads(index.read_text())
        del content["weight_map"]["score.weight"]
        index.write_text(json.dumps(content))
        total = content["metadata"]["total_size"]
    wanted = trained(model, tmp_path / "adapter", task_type="SEQ_CLS")
    status, stdout, stderr = call("merge", tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert (status, stderr) == (0, "") and "note: score.weight: added" in stdout
    assert assert_merged(tmp_path / "out", wanted, Checkpoint(tmp_path / "base")) == {"score.weight"}
    found = transformers.LlamaForSequenceClassification.from_pretrained(tmp_path / "out")
    assert torch.equal(found.score.weight, wanted["score.weight"])
    if total:
        content = json.loads((tmp_path / "out" / index.name).read_text())
        assert content["metadata"]["total_size"] == total + wanted["score.weight"].nbytes


HEAD = "base_model.model.score.weight"
ROWS = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"


@pytest.mark.parametrize(
    ("change", "config", "words"),
    [
        (lambda t: t.update({HEAD: t[HEAD][:2]}), {}, [HEAD, "[3, 16]", "[2, 16]"]),
        (lambda t: t.update({HEAD: t[HEAD].int()}), {}, [HEAD, "torch.int32"]),
        (lambda t: t[HEAD].fill_(float("nan")), {}, [HEAD, "not finite"]),
        (lambda t: t.update({"base_model.model.other.weight": t[HEAD]}), {}, ["other.weight", "no such tensor"]),
        (lambda t: t.update({ROWS: torch.ones(1, 16)}), {}, [ROWS, "trainable_token_indices", "None"]),
        (lambda t: t.update({ROWS: torch.ones(1, 16)}), {"trainable_token_indices": [30]}, ["which has 30", "[30]"]),
        (lambda t: t.update({ROWS: torch.ones(1, 16)}), {"trainable_token_indices": [1, 2]}, ["[2, 16]", "[1, 16]"]),
    ],
    ids=["size", "integers", "nan", "unknown", "no-indices", "beyond", "rows"],
)  # fmt: skip
def test_what_cannot_be_written_is_an_error(call, tmp_path, change, config, words):
    """Unless it is left out."""
    classifier().save_pretrained(tmp_path / "base")
    trained(classifier(), tmp_path / "adapter", task_type="SEQ_CLS")
    rewrite(tmp_path / "adapter" / "adapter_model.safetensors",
            lambda tensors: (change(tensors), tensors.update({k: t.clone() for k, t in tensors.items()})))  # fmt: skip
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    before = snapshot(tmp_path)
    status, stdout, stderr = call("merge", tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert (status, stdout) == (2, "") and stderr.count("\n") == 1 and snapshot(tmp_path) == before
    assert all(word in stderr for word in [*words, "adapter_model.safetensors"]), stderr
    assert call("merge", tmp_path / "base", tmp_path / "adapter", tmp_path / "out", "--adapter-only")[0] == 0
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(found["score.weight"], classifier().score.weight)


@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
def test_trained_modules_of_tied_weights_are_refused(call, tmp_path, module):
    tied().save_pretrained(tmp_path / "base")
    trained(tied(), tmp_path / "adapter", modules_to_save=[module])
    status, _, stderr = call("merge", tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert status == 2 and "output layer is tied to " in stderr and f"{module}.weight" in stderr, stderr
