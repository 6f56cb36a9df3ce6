"""`dora-kernels merge`: models saved by transformers, adapters in all formats; and bad input of every command."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("safetensors")
pytest.importorskip("transformers")

import transformers
from adapter_models import adapted64, adapter_for
from cli_models import NAMES, adapter_file, gpt2, llama, plain_linears, rewrite, snapshot
from safetensors.torch import load_file, save_file

from dora_kernels import merge_all
from dora_kernels.adapters import FORMATS, Adapter, attach, read_adapter, save_adapter
from dora_kernels.checkpoints.checkpoint import Checkpoint
from dora_kernels.files import storage


@pytest.fixture(params=["whole", "shards"])
def base(request, tmp_path):
    """A folder of a tiny Llama, with something beside the weights."""
    folder = tmp_path / "base"
    llama().save_pretrained(folder, max_shard_size="10GB" if request.param == "whole" else "6KB")
    assert len(list(folder.glob("*.safetensors"))) == 1 or request.param == "shards"
    (folder / "tokenizer.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"unmerged")
    (folder / "more").mkdir()
    (folder / "more" / "notes.txt").write_text("kept")
    return folder


# merge


@pytest.mark.parametrize("format", list(FORMATS))
def test_merged_as_in_memory(call, tmp_path, base, format):
    """The same bits, in the same files, which transformers loads."""
    source, _ = adapter_file(tmp_path, llama(), format)
    status, stdout, stderr = call("merge", base, source, tmp_path / "out")
    assert (status, stderr) == (0, ""), stderr
    assert f"3 layers merged from {format}" in stdout
    expected = llama()
    attach(expected, read_adapter(source, expected))
    merge_all(expected)
    found = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    wanted = expected.state_dict()
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in found.state_dict().items())
    assert not any(torch.equal(found.get_submodule(name).weight, llama().get_submodule(name).weight) for name in NAMES)
    before, after = snapshot(base), snapshot(tmp_path / "out")
    assert before.keys() - after.keys() == {"pytorch_model.bin"} and not after.keys() - before.keys()
    assert all(after[name] == before[name] for name in after if not name.endswith(".safetensors"))


@pytest.mark.parametrize("seed", [0, 7])
def test_stochastic_rounding_as_in_memory(call, tmp_path, seed):
    """Each layer draws by its own name."""
    llama(torch.bfloat16).save_pretrained(tmp_path / "base")
    source, _ = adapter_file(tmp_path, llama())
    arguments = ["--rounding", "stochastic", "--seed", seed]
    assert call("merge", tmp_path / "base", source, tmp_path / "out", *arguments)[0] == 0
    expected = llama(torch.bfloat16)
    attach(expected, read_adapter(source, expected))
    merge_all(expected, "stochastic", seed)
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name in NAMES:
        assert torch.equal(found[f"{name}.weight"], expected.get_submodule(name).weight)
    other = llama(torch.bfloat16)
    attach(other, read_adapter(source, other))
    merge_all(other, "stochastic", seed + 1)
    assert not torch.equal(found[f"{NAMES[0]}.weight"], other.get_submodule(NAMES[0]).weight)


@pytest.mark.parametrize("strength", [0.0, 0.5, -1.0])
def test_at_a_strength(call, tmp_path, base, strength):
    model = llama()
    source, adapter = adapter_file(tmp_path, model)
    assert call("merge", base, source, tmp_path / "out", "--strength", strength)[0] == 0
    found = Checkpoint(tmp_path / "out")
    for name in NAMES:
        weight = model.get_submodule(name).weight.detach()
        if strength == 0.0:
            assert torch.equal(found[f"{name}.weight"], weight)
        wanted = weight.double() + strength * (adapted64(model.get_submodule(name), adapter.layers[name]) - weight)
        torch.testing.assert_close(found[f"{name}.weight"].double(), wanted, rtol=1e-6, atol=1e-6)


def test_names_with_another_prefix(call, tmp_path):
    """Of the inner model's file, and of an adapter of the inner model."""
    model = llama()
    model.model.save_pretrained(tmp_path / "inner")
    source, adapter = adapter_file(tmp_path, model)
    assert "layers.0.self_attn.q_proj.weight" in Checkpoint(tmp_path / "inner")
    assert call("merge", tmp_path / "inner", source, tmp_path / "out")[0] == 0
    model.save_pretrained(tmp_path / "outer")
    inner = Adapter({name.removeprefix("model."): layer for name, layer in adapter.layers.items()})
    save_adapter(inner, tmp_path / "of-inner")
    assert call("merge", tmp_path / "outer", tmp_path / "of-inner", tmp_path / "out2")[0] == 0
    name = NAMES[1]
    wanted = adapted64(model.get_submodule(name), adapter.layers[name]).float()
    for found in (load_file(tmp_path / "out" / "model.safetensors")[f"{name.removeprefix('model.')}.weight"],
                  load_file(tmp_path / "out2" / "model.safetensors")[f"{name}.weight"]):  # fmt: skip
        torch.testing.assert_close(found, wanted)
    tensors = load_file(tmp_path / "outer" / "model.safetensors")
    both = {**{f"transformer.{key}": tensor.clone() for key, tensor in tensors.items()}, **tensors}
    shutil.copytree(tmp_path / "outer", tmp_path / "both")
    save_file(both, tmp_path / "both" / "model.safetensors")
    renamed = Adapter({name.removeprefix("model.layers."): layer for name, layer in adapter.layers.items()})
    save_adapter(renamed, tmp_path / "nobody")
    status, _, stderr = call("merge", tmp_path / "both", tmp_path / "nobody", tmp_path / "out3")
    assert status == 2 and "0.self_attn.q_proj: the model has no such layer" in stderr


def test_ambiguous_names(call, tmp_path):
    model = llama()
    tensors = {prefix + key.removeprefix("model."): tensor.clone()
               for key, tensor in model.state_dict().items() for prefix in ("model.", "transformer.")}  # fmt: skip
    (tmp_path / "base").mkdir()
    save_file(tensors, tmp_path / "base" / "model.safetensors")
    adapter = adapter_for(model, NAMES, rank=2, scaling=1.0)
    inner = Adapter({name.removeprefix("model."): layer for name, layer in adapter.layers.items()})
    save_adapter(inner, tmp_path / "a")
    status, _, stderr = call("merge", tmp_path / "base", tmp_path / "a", tmp_path / "out")
    assert status == 2 and "its names are ambiguous: layers.0.self_attn.q_proj may stand for" in stderr


@pytest.mark.parametrize("known", [True, False])
def test_conv1d_is_stored_transposed(call, tmp_path, known):
    """GPT-2's: square ones by the kind of model, without which they are refused."""
    model = gpt2()
    model.save_pretrained(tmp_path / "base")
    names = ["transformer.h.0.attn.c_attn", "transformer.h.0.attn.c_proj", "transformer.h.0.mlp.c_fc"]
    source, adapter = adapter_file(tmp_path, plain_linears(gpt2()), names=names)
    if not known:
        (tmp_path / "base" / "config.json").unlink()
        status, _, stderr = call("merge", tmp_path / "base", source, tmp_path / "out")
        assert status == 2 and f"whether {names[1]}, which is square, is too is open" in stderr
        return
    status, _, stderr = call("merge", tmp_path / "base", source, tmp_path / "out")
    assert (status, stderr) == (0, "")
    found = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out")
    reference = plain_linears(gpt2())
    for name in names:
        wanted = adapted64(reference.get_submodule(name), adapter.layers[name])
        torch.testing.assert_close(found.get_submodule(name).weight.t().double(), wanted, rtol=1e-5, atol=1e-6)


def test_tied_weights_are_refused(call, tmp_path):
    model = gpt2()
    model.save_pretrained(tmp_path / "base")
    for name, message in (("lm_head", "lm_head: .*tied to the embedding"), ("transformer.wte", "wte: .*is tied to")):
        source, _ = adapter_file(tmp_path / name, model, names=[name])
        status, _, stderr = call("merge", tmp_path / "base", source, tmp_path / "out")
        assert status == 2 and stderr.count("\n") == 1 and re.search(message, stderr), stderr
    assert not (tmp_path / "out").exists()


# what must not be lost


def test_nothing_is_overwritten_without_force(call, tmp_path, base):
    source, _ = adapter_file(tmp_path, llama())
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("mine")
    for arguments in (["merge", base, source, out], ["convert", source, source, "--to", "peft"]):
        status, stdout, stderr = call(*arguments)
        assert (status, stdout) == (2, "") and "exists already" in stderr and stderr.count("\n") == 1
    status, stdout, stderr = call("merge", base, source, out, "--force")
    assert (status, stdout) == (2, "") and "not replaced: it contains precious, which is neither a" in stderr
    assert snapshot(out) == {"precious": b"mine"}
    (out / "precious").rename(out / "data.json")
    status, stdout, stderr = call("merge", base, source, out, "--force")
    assert (status, stdout) == (2, "") and "contains neither config.json nor safetensors" in stderr
    (out / "data.json").rename(out / "config.json")
    for _ in range(2):  # the second replaces what has the base model's folder, too
        assert call("merge", base, source, out, "--force")[0] == 0
        assert snapshot(out)["config.json"] == snapshot(base)["config.json"]
    for place in ("more/mine.txt", "docs/mine.json", "thesis.txt"):
        (out / place).parent.mkdir(exist_ok=True)
        (out / place).write_text("mine")
        status, _, stderr = call("merge", base, source, out, "--force")
        assert status == 2 and "not replaced: " in stderr and (out / place).read_text() == "mine"
        (out / place).unlink()
        if place.startswith("docs"):
            (out / place).parent.rmdir()
    assert call("convert", source, source, "--to", "peft", "--force")[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter-peft", "base", "out"]


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_crash_leaves_the_old_files_whole(call, monkeypatch, tmp_path, step):
    """A write that fails at any shard, with what it had written half done."""
    llama().save_pretrained(tmp_path / "base", max_shard_size="6KB")
    source, _ = adapter_file(tmp_path, llama())
    out = tmp_path / "out"
    assert call("merge", tmp_path / "base", source, out)[0] == 0
    before, right, written = snapshot(tmp_path), storage.save_tensors, []

    def failing(file, tensors, metadata=None):
        written.append(file)
        if len(written) == step:
            file.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        right(file, tensors, metadata)

    monkeypatch.setattr(storage, "save_tensors", failing)
    status, _, stderr = call("merge", tmp_path / "base", source, out, "--strength", "0.5", "--force")
    assert status == 2 and "No space left on device" in stderr and len(written) == step
    assert snapshot(tmp_path) == before
    written[:] = [None] * (step - 1)
    status, _, stderr = call("convert", source, source, "--to", "peft", "--force")
    assert status == 2 and "No space left on device" in stderr
    assert snapshot(tmp_path) == before


# bad input


def truncate(file):
    file.write_bytes(file.read_bytes()[:-10])


KEY = f"base_model.model.{NAMES[1]}.lora_B.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda base, adapter: shutil.rmtree(base), ["base", "no such folder"]),
        (lambda base, adapter: (base / "model.safetensors").unlink(), ["neither model.safetensors", "pickle"]),
        (lambda base, adapter: truncate(base / "model.safetensors"), ["model.safetensors", "truncated"]),
        (lambda base, adapter: truncate(adapter / "adapter_model.safetensors"), ["adapter_model", "truncated"]),
        (lambda base, adapter: shutil.rmtree(adapter), ["adapter", "no such file"]),
        (
            lambda base, adapter: rewrite(base / "model.safetensors", lambda t: t.pop(f"{NAMES[1]}.weight")),
            [NAMES[1], "no such layer"],
        ),
        (
            lambda base, adapter: rewrite(
                base / "model.safetensors",
                lambda t: t.update({f"{NAMES[1]}.weight": t[f"{NAMES[1]}.weight"].to(torch.int8)}),
            ),
            [f"{NAMES[1]}.weight", "torch.int8"],
        ),
        (
            lambda base, adapter: (base / "config.json").write_text('{"quantization_config": {}}'),
            ["quantization_config"],
        ),
        (
            lambda base, adapter: rewrite(
                adapter / "adapter_model.safetensors", lambda t: t[KEY].fill_(float("nan"))
            ),
            [KEY, "not finite"],
        ),
        (lambda base, adapter: (base / "config.json").write_text("{"), ["config.json", "valid model's configuration"]),
    ],
    ids=["folder", "pickle", "base", "adapter", "missing", "layer", "int8", "quantised", "nan", "config"],
)  # fmt: skip
def test_bad_files(call, tmp_path, change, words):
    base = tmp_path / "base"
    llama().save_pretrained(base)
    (base / "pytorch_model.bin").write_bytes(b"x")
    source, _ = adapter_file(tmp_path, llama())
    change(base, source)
    status, stdout, stderr = call("merge", base, source, tmp_path / "out")
    assert (status, stdout) == (2, "") and stderr.startswith("error: ") and stderr.count("\n") == 1
    for word in words:
        assert word in stderr
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ({}, ["no weight_map"]),
        ({"weight_map": {"a.weight": "../secret.safetensors"}}, ["a.weight", "'../secret.safetensors'"]),
        ({"weight_map": {"a.weight": "gone.safetensors"}}, ["gone.safetensors", "no such file"]),
        ({"weight_map": {"a.weight": "part.safetensors"}}, ["part.safetensors", "a.weight is missing"]),
    ],
    ids=["empty", "outside", "gone", "other"],
)
def test_bad_indices(call, tmp_path, index, words):
    base = tmp_path / "base"
    base.mkdir()
    save_file({"b.weight": torch.zeros(1)}, base / "part.safetensors")
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    source, _ = adapter_file(tmp_path, llama())
    status, _, stderr = call("merge", base, source, tmp_path / "out")
    assert status == 2 and all(word in stderr for word in words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["convert", "adapter", "new", "--to", "zip"], ["--to: expected", "'peft'", "'zip'"]),
        (["convert", "adapter", "new", "--to", "mlx", "--to-prefix", "unet"], ["--to-prefix: "]),
        (["convert", "adapter", "new", "--to", "peft", "--from", "zip"], ["--from: expected", "'auto'", "'zip'"]),
        (["convert", "adapter", "new", "--to", "mlx", "--axis", "row"], ["'out' or 'in'", "'row'"]),
        (["convert", "adapter", "new"], ["--to"]),
        (["convert", "adapter", "new", "--to", "mlx", "--from", "kohya"], ["'kohya'", "'peft'"]),
        (["convert", "adapter", "new", "--to", "peft", "--base", "nowhere"], ["nowhere", "no such folder"]),
        (["merge", "base", "adapter", "base"], ["expected a folder outside"]),
        (["merge", "base", "adapter", "base/inside"], ["expected a folder outside"]),
        (["merge", "base", "adapter", "adapter"], ["expected a folder outside"]),
        (["merge", "base", "adapter", "out", "--rounding", "up"], ["rounding", "'up'"]),
        (["merge", "base", "adapter", "out", "--seed", "-1"], ["--seed"]),
        (["merge", "base", "adapter", "out", "--strength", "nan"], ["strength", "nan"]),
        (["merge", "base", "adapter", "base/config.json"], ["is a file"]),
        (["inspect", "nowhere"], ["nowhere"]),
        (["inspect", "adapter", "--base", "adapter"], ["neither model.safetensors"]),
    ],
    ids=" ".join,
)
def test_bad_arguments(call, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    llama().save_pretrained("base")
    adapter_file(tmp_path, llama())[0].rename("adapter")
    before = snapshot(tmp_path)
    status, stdout, stderr = call(*arguments, *(["--force"] if arguments[0] == "merge" else []))
    assert (status, stdout) == (2, "") and stderr.startswith("error: ") and stderr.count("\n") == 1, stderr
    for word in words:
        assert word in stderr
    assert snapshot(tmp_path) == before
