"""`dora-kernels merge` where a model's files leave something open: names, transposed and tied weights."""

from __future__ import annotations

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("safetensors")
pytest.importorskip("transformers")

from cli_models import adapter_file, gpt2, llama, plain_linears, rewrite
from safetensors.torch import load_file, save_file


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
    assert status == 2 and f"{name} is of a linear with 16 inputs and 63 outputs" in stderr, stderr
    source, _ = adapter_file(tmp_path / "two", plain_linears(gpt2()), names=[name, "transformer.h.0.mlp.c_proj"])
    rewrite(base / "model.safetensors", lambda tensors: tensors.pop("h.0.mlp.c_proj.weight"))
    status, _, stderr = call("merge", base, source, tmp_path / "out2")
    assert status == 2 and "transformer.h.0.mlp.c_proj: the model has no such layer" in stderr, stderr


def test_an_undecided_axis_under_another_prefix_is_said(call, tmp_path):
    llama().model.save_pretrained(tmp_path / "base")
    name = "model.layers.0.self_attn.q_proj"
    source, _ = adapter_file(tmp_path, llama(), "lycoris", names=[name])
    rewrite(source / "adapter_model.safetensors",
            lambda tensors: tensors.update({key: t.flatten() for key, t in tensors.items() if "scale" in key}))
    status, _, stderr = call("merge", tmp_path / "base", source, tmp_path / "out")
    assert status == 2 and f"the magnitude of {name} fits inputs and outputs" in stderr, stderr
    assert call("merge", tmp_path / "base", source, tmp_path / "out", "--axis", "out")[0] == 0
