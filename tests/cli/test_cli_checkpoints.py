"""`dora-kernels merge` where a model's files leave something open: names, transposed and tied weights."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("safetensors")
pytest.importorskip("transformers")

import transformers
from adapter_models import adapted64
from cli_models import NAMES, adapter_file, gpt2, llama, plain_linears, rewrite, snapshot
from safetensors.torch import load_file, save_file

from dora_kernels.checkpoints import merge as merging
from dora_kernels.cli import convert, inspect, merge
from dora_kernels.files import storage


def gpt2_as_on_the_hub(folder):
    """Without the prefix that the model's names have."""
    gpt2().save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    save_file({key.removeprefix("transformer."): t for key, t in tensors.items()}, folder / "model.safetensors")
    return folder


# names


def test_what_is_wrong_under_another_prefix_is_said(call, tmp_path):
    """Not that the names are not there."""
    base = gpt2_as_on_the_hub(tmp_path / "base")
    name = "transformer.h.0.mlp.c_fc"
    source, _ = adapter_file(tmp_path, plain_linears(gpt2()), names=[name])

    def shorten(tensors):
        for key in (f"base_model.model.{name}.lora_B.weight", f"base_model.model.{name}.lora_magnitude_vector"):
            tensors[key] = tensors[key][:-1].clone()

    assert call("merge", base, source, tmp_path / "out")[0] == 0
    rewrite(source / "adapter_model.safetensors", shorten)
    status, _, stderr = call("merge", base, source, tmp_path / "out2")
    assert status == 2 and f"{name} belongs to a linear with 16 inputs and 63 outputs" in stderr, stderr
    source, _ = adapter_file(tmp_path / "two", plain_linears(gpt2()), names=[name, "transformer.h.0.mlp.c_proj"])
    rewrite(base / "model.safetensors", lambda tensors: tensors.pop("h.0.mlp.c_proj.weight"))
    status, _, stderr = call("merge", base, source, tmp_path / "out2")
    assert status == 2 and "transformer.h.0.mlp.c_proj: the model has no such layer" in stderr, stderr


VIT = {
    "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip
SEGFORMER = {"hidden_sizes": [8, 8], "depths": [1, 1], "num_attention_heads": [1, 2], "decoder_hidden_size": 8,
             "num_encoder_blocks": 2, "sr_ratios": [2, 1], "patch_sizes": [3, 3], "strides": [2, 2],
             "mlp_ratios": [2, 2]}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "sizes"), [("ViT", VIT), ("DeiT", VIT), ("Beit", VIT), ("Dinov2", VIT), ("Segformer", SEGFORMER)]
)
def test_vision_transformers_whose_files_have_older_names(call, tmp_path, name, sizes):
    """The model and its adapter have the names of transformers 5; `save_pretrained` writes the older ones."""
    peft = pytest.importorskip("peft")
    config = getattr(transformers, f"{name}Config")(**sizes)
    model = getattr(transformers, f"{name}ForImageClassification")(config).eval()
    model.save_pretrained(tmp_path / "base")
    options = {"r": 2, "use_dora": True, "init_lora_weights": False}
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=linear, **options))
    adapted.save_pretrained(tmp_path / "adapter")
    wanted = adapted.merge_and_unload().state_dict()
    status, _, stderr = call("merge", tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert status == 0, stderr
    found = type(model).from_pretrained(tmp_path / "out").state_dict()
    assert found.keys() == wanted.keys()
    for key in wanted:
        torch.testing.assert_close(found[key], wanted[key])


def test_an_undecided_axis_under_another_prefix_is_said(call, tmp_path):
    llama().model.save_pretrained(tmp_path / "base")
    name = "model.layers.0.self_attn.q_proj"
    source, _ = adapter_file(tmp_path, llama(), "lycoris", names=[name])
    rewrite(source / "adapter_model.safetensors",
            lambda tensors: tensors.update({key: t.flatten() for key, t in tensors.items() if "scale" in key}))
    status, _, stderr = call("merge", tmp_path / "base", source, tmp_path / "out")
    assert status == 2 and f"the magnitude of {name} fits the inputs as well as the outputs" in stderr, stderr
    assert call("merge", tmp_path / "base", source, tmp_path / "out", "--axis", "out")[0] == 0


# stored transposed

SQUARE = "transformer.h.0.attn.c_proj"


def edit_json(file, **changes):
    """Set entries of a JSON file; None takes one out."""
    content = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


@pytest.mark.parametrize(
    ("model", "adapter", "right"),
    [
        ({}, {}, True),
        ({"model_type": None}, {}, False),
        ({"model_type": None}, {"fan_in_fan_out": True}, True),
        ({"model_type": "of-its-own"}, {"fan_in_fan_out": True}, True),
        ({"model_type": "speech", "decoder": {"model_type": "gpt2"}}, {}, True),
    ],
    ids=["model_type", "nothing", "adapter", "adapter-of-a-custom-model", "nested"],
)
def test_square_weights_of_conv1d(call, tmp_path, model, adapter, right):
    """Merged as the model computes, or refused where nothing says how they are stored."""
    gpt2().save_pretrained(tmp_path / "base")
    reference = plain_linears(gpt2())
    source, made = adapter_file(tmp_path, reference, names=[SQUARE])
    edit_json(tmp_path / "base" / "config.json", **model)
    edit_json(source / "adapter_config.json", **adapter)
    status, _, stderr = call("merge", tmp_path / "base", source, tmp_path / "out")
    if not right:
        assert status == 2 and f"whether {SQUARE}, which is square, is transposed is open" in stderr, stderr
        return
    assert (status, stderr) == (0, "")
    found = load_file(tmp_path / "out" / "model.safetensors")[f"{SQUARE}.weight"]
    wanted = adapted64(reference.get_submodule(SQUARE), made.layers[SQUARE])
    torch.testing.assert_close(found.t().double(), wanted, rtol=1e-5, atol=1e-6)


def test_square_weights_of_linear_layers_beside_conv1d(call, tmp_path):
    """Of an encoder beside a GPT-2: by the name."""
    gpt2().save_pretrained(tmp_path / "base")
    square = torch.nn.ModuleDict({"query": torch.nn.Linear(16, 16, bias=False)})
    rewrite(tmp_path / "base" / "model.safetensors", lambda t: t.update({"query.weight": square.query.weight.detach()}))
    source, made = adapter_file(tmp_path, square, names=["query"])
    assert call("merge", tmp_path / "base", source, tmp_path / "out")[0] == 0
    found = load_file(tmp_path / "out" / "model.safetensors")["query.weight"]
    torch.testing.assert_close(found.double(), adapted64(square.query, made.layers["query"]), rtol=1e-5, atol=1e-6)


# tied weights

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 30, "vocab_size": 30}


def bert(kind=transformers.BertForMaskedLM):
    torch.manual_seed(0)
    return kind(transformers.BertConfig(**SMALL)), "bert.embeddings.word_embeddings"


def t5():
    torch.manual_seed(0)
    config = transformers.T5Config(d_model=16, d_kv=8, d_ff=30, num_layers=1, num_heads=2, vocab_size=30)
    return transformers.T5ForConditionalGeneration(config), "shared"


def causal():
    return llama(), "model.embed_tokens"


@pytest.mark.parametrize("make", [bert, t5, causal])
@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_word_embeddings": None}, {"tie_word_embeddings": None, "text_config": {"tie_word_embeddings": True}}],
    ids=["as-saved", "unsaid", "nested"],
)
def test_tied_embeddings_are_refused(call, tmp_path, make, changes):
    model, name = make()
    model.save_pretrained(tmp_path / "base")
    edit_json(tmp_path / "base" / "config.json", **{"tie_word_embeddings": True, **changes})
    untied = "lm_head.weight" in load_file(tmp_path / "base" / "model.safetensors")
    source, made = adapter_file(tmp_path, model, names=[name])
    if untied:  # where the file has an output layer of its own, it is
        assert call("merge", tmp_path / "base", source, tmp_path / "out")[0] == 0
        rewrite(tmp_path / "base" / "model.safetensors", lambda tensors: tensors.pop("lm_head.weight"))
    # as large, and no output layer
    rewrite(tmp_path / "base" / "model.safetensors", lambda t: t.update({"block.output.weight": torch.zeros(16, 16)}))
    status, _, stderr = call("merge", tmp_path / "base", source, tmp_path / "out2")
    assert status == 2 and f"{name}: the model's output layer is tied to this embedding" in stderr, stderr
    edit_json(tmp_path / "base" / "config.json", tie_word_embeddings=False, text_config=None)
    assert call("merge", tmp_path / "base", source, tmp_path / "out2")[0] == 0
    found = load_file(tmp_path / "out2" / "model.safetensors")[f"{name}.weight"]
    wanted = adapted64(model.get_submodule(name), made.layers[name])
    torch.testing.assert_close(found.t().double(), wanted, rtol=1e-5, atol=1e-6)


def test_no_output_layer_to_be_tied_to(call, tmp_path):
    """Of a classifier's embedding, and of positions."""
    model, name = bert(transformers.BertForSequenceClassification)
    model.save_pretrained(tmp_path / "classifier")
    source, _ = adapter_file(tmp_path, model, names=[name])
    assert call("merge", tmp_path / "classifier", source, tmp_path / "out")[0] == 0
    gpt2().save_pretrained(tmp_path / "gpt2")
    edit_json(tmp_path / "gpt2" / "config.json", vocab_size=2000)
    source, _ = adapter_file(tmp_path / "positions", gpt2(), names=["transformer.wpe"])
    assert call("merge", tmp_path / "gpt2", source, tmp_path / "out2")[0] == 0


# the other files


def test_shards_of_any_name(call, tmp_path):
    """The merged ones are not overwritten by those they were made of."""
    model = llama()
    model.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").rename(tmp_path / "base" / "weights.dat")
    places = dict.fromkeys(load_file(tmp_path / "base" / "weights.dat"), "weights.dat")
    (tmp_path / "base" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    source, made = adapter_file(tmp_path, model)
    assert call("merge", tmp_path / "base", source, tmp_path / "out")[0] == 0
    found, name = load_file(tmp_path / "out" / "weights.dat"), NAMES[0]
    wanted = adapted64(model.get_submodule(name), made.layers[name])
    torch.testing.assert_close(found[f"{name}.weight"].double(), wanted, rtol=1e-5, atol=1e-6)
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()


def test_files_of_an_adapter_or_of_no_use_are_not_copied(call, tmp_path):
    model = llama()
    source, _ = adapter_file(tmp_path, model)
    shutil.copytree(source, tmp_path / "base")
    model.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "model.safetensors.index.json").write_text("{}")
    assert call("merge", tmp_path / "base", source, tmp_path / "out")[0] == 0
    left = {"adapter_config.json", "adapter_model.safetensors", "model.safetensors.index.json"}
    assert snapshot(tmp_path / "base").keys() - snapshot(tmp_path / "out").keys() == left


@pytest.mark.skipif(not hasattr(os, "fork"), reason="modes of POSIX")
def test_modes_and_disk(call, monkeypatch, tmp_path):
    """The base model's less the umask, and on the disk before the folder is there."""
    llama().save_pretrained(tmp_path / "base", max_shard_size="6KB")
    for i, file in enumerate(sorted((tmp_path / "base").iterdir())):
        file.chmod((0o644, 0o600, 0o666)[i % 3])
    source, _ = adapter_file(tmp_path, llama())
    right, synced = os.fsync, []

    def seen(handle):
        assert not (tmp_path / "out").exists()
        synced.append(os.fstat(handle).st_ino)
        right(handle)

    monkeypatch.setattr(os, "fsync", seen)
    before = os.umask(0o027)
    try:
        assert call("merge", tmp_path / "base", source, tmp_path / "out")[0] == 0
    finally:
        os.umask(before)
    written = {file.name: file.stat() for file in (tmp_path / "out").iterdir()}
    modes = {name: stat.S_IMODE((tmp_path / "base" / name).stat().st_mode) & ~0o027 for name in written}
    assert {name: stat.S_IMODE(file.st_mode) for name, file in written.items()} == modes
    assert {file.st_ino for file in written.values()} == set(synced)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o750


# values


def test_no_infinities_are_written(call, tmp_path):
    """Of magnitudes that float32 holds and the weight's dtype does not."""
    llama(torch.float16).save_pretrained(tmp_path / "base")
    source, _ = adapter_file(tmp_path, llama())
    key = f"base_model.model.{NAMES[1]}.lora_magnitude_vector"
    rewrite(source / "adapter_model.safetensors", lambda tensors: tensors[key].fill_(1e9))
    status, _, stderr = call("merge", tmp_path / "base", source, tmp_path / "out")
    assert status == 2 and f"{NAMES[1]}.weight: merged, it has values that are not finite in torch.float16" in stderr
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


# progress


@pytest.fixture
def steps(monkeypatch):
    """What the commands' bars hear, between what is merged and saved."""
    heard = []

    @contextlib.contextmanager
    def listening():
        yield lambda step, total: heard.append((step, total))

    for command in (convert, inspect, merge):
        monkeypatch.setattr(command, "progress", listening)
    for module, name in ((merging, "_merged"), (storage, "save_tensors")):
        right = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, right=right, name=name: (heard.append(name), right(*a))[1])
    return heard


def test_progress(call, tmp_path, steps):
    """A step after each layer that is merged or compared, and after reading and writing."""
    llama().save_pretrained(tmp_path / "base")
    source, _ = adapter_file(tmp_path, llama())
    steps.clear()
    assert call("merge", tmp_path / "base", source, tmp_path / "out")[0] == 0
    assert steps[-1] == "save_tensors" and steps[:-1:2] == ["_merged"] * 3
    assert {step for step in steps[1:-1:2]} == {(name, 3) for name in NAMES}
    steps.clear()
    assert call("inspect", source, "--base", tmp_path / "base")[0] == 0
    assert {step for step in steps} == {(name, 3) for name in NAMES}
    steps.clear()
    assert call("convert", source, tmp_path / "converted", "--to", "mlx")[0] == 0
    assert steps == [(f"{source} is read", 2), "save_tensors", (f"{tmp_path / 'converted'} is written", 2)]
