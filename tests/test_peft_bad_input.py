"""Models that cannot be right and adapter files that are not what they should be: errors that name layer and file."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

from peft import get_peft_model
from peft_models import (
    FIRST,
    Toy,
    anatomy,
    lora_layers,
    one_thread,  # noqa: F401
    toy,
)
from safetensors.torch import load_file, save_file

import dora_kernels

LAYERS = {
    "merged": (lambda model: model.merge_adapter(), "['default'] are merged into its weight; call unmerge_adapter()"),
    "on meta": (lambda model: model.to("meta"), "the lora_A of adapter 'default' is on the meta device; load the"),
    "NaN in A": (
        lambda model: first(model).lora_A["default"].weight.data.fill_(float("nan")),
        "the lora_A of adapter 'default' has values that are not finite",
    ),
    "an infinite magnitude": (
        lambda model: first(model).lora_magnitude_vector["default"].weight.data.fill_(float("inf")),
        "the magnitude of adapter 'default' has values that are not finite",
    ),
    "no magnitude": (
        lambda model: first(model).lora_magnitude_vector.pop("default"),
        "adapter 'default' has use_dora=True and no magnitude",
    ),
}


def first(model):
    return model.get_submodule(FIRST)


@pytest.mark.parametrize("change, message", LAYERS.values(), ids=LAYERS.keys())
def test_models(change, message):
    model = toy()
    change(model)
    before = anatomy(model)
    with pytest.raises(ValueError) as error:
        dora_kernels.patch_peft(model)
    assert str(error.value).startswith(f"model: {FIRST}: ") and message in str(error.value)
    assert anatomy(model) == before


@pytest.fixture
def saved(tmp_path):
    toy(others=True).save_pretrained(tmp_path)
    return tmp_path


def rewrite(folder, change):
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def configure(folder, **values):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def cut(folder):
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-40])


def renamed(tensors):
    for key in [key for key in tensors if "first" in key]:
        tensors[key.replace("first", "third")] = tensors.pop(key)


A, M = f"{FIRST}.lora_A.weight", f"{FIRST}.lora_magnitude_vector"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"

FILES = {
    "truncated": (cut, WEIGHTS, "truncated, or no safetensors file"),
    "no safetensors": (lambda f: (f / WEIGHTS).write_bytes(b"pickle"), WEIGHTS, "truncated, or no safetensors file"),
    "no magnitude": (lambda f: rewrite(f, lambda t: t.pop(M)), WEIGHTS, f"{FIRST} has no lora_magnitude_vector"),
    "NaN": (lambda f: rewrite(f, lambda t: t[M].fill_(float("nan"))), WEIGHTS, f"{M} has values that are not finite"),
    "another rank": (
        lambda f: rewrite(f, lambda t: t.update({A: torch.zeros(7, 12)})), WEIGHTS,
        f"{FIRST}.lora_A has rank 7, its configuration says 3",
    ),
    "factors of two ranks": (
        lambda f: rewrite(f, lambda t: t.update({A.replace("_A", "_B"): torch.zeros(20, 2)})), WEIGHTS,
        f"{FIRST}.lora_B [20, 2] does not fit lora_A [3, 12]",
    ),
    "a short magnitude": (
        lambda f: rewrite(f, lambda t: t.update({M: torch.zeros(5)})), WEIGHTS,
        f"{FIRST}.lora_magnitude_vector has 5 values, lora_B 20 rows",
    ),
    "another model": (
        lambda f: rewrite(f, renamed), WEIGHTS, "third: the model has no such layer",
    ),
    "another size": (
        lambda f: rewrite(f, lambda t: t.update({A: torch.zeros(3, 13)})), WEIGHTS,
        f"{FIRST} is of a layer with 13 inputs and 20 outputs, the model's has 12 and 20",
    ),
    "empty": (lambda f: save_file({}, f / WEIGHTS), WEIGHTS, "no LoRA tensors in it"),
    "no DoRA": (
        lambda f: configure(f, use_dora=False), CONFIG, "expected peft_type 'LORA' with use_dora, got 'LORA', False"
    ),
    "no configuration": (lambda f: (f / CONFIG).write_text("{"), CONFIG, "no adapter configuration"),
}  # fmt: skip


@pytest.mark.parametrize("change, file, message", FILES.values(), ids=FILES.keys())
def test_files(change, file, message, saved):
    model = Toy(True)
    dora_kernels.check_adapter(saved, model)
    change(saved)
    with pytest.raises(ValueError) as error:
        dora_kernels.check_adapter(saved, model)
    assert str(error.value).startswith(f"{saved / file}: ") and message in str(error.value)
    assert not lora_layers(model)


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_files_that_are_not_there(name, saved):
    (saved / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name}: no such file"):
        dora_kernels.check_adapter(saved)


def test_against_a_peft_model_and_with_rank_patterns(tmp_path):
    model = toy(others=True, rank_pattern={"first": 5})
    model.save_pretrained(tmp_path)
    dora_kernels.check_adapter(tmp_path)
    dora_kernels.check_adapter(tmp_path, model)
    dora_kernels.check_adapter(tmp_path, get_peft_model(Toy(True), model.peft_config["default"]))
