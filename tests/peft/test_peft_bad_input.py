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
    base_model,
    lora_layers,
    one_thread,  # noqa: F401
    peft_model,
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

def long_named(tensors):
    """One layer's name is long."""
    for key in list(tensors):
        if ".first." in key:
            tensors[key.replace("first", 900 * "a")] = tensors.pop(key)


FILES = {
    "truncated": (cut, WEIGHTS, "truncated, or not a safetensors file"),
    "no safetensors": (lambda f: (f / WEIGHTS).write_bytes(b"pickle"), WEIGHTS, "truncated, or not a safetensors file"),
    "no magnitude": (lambda f: rewrite(f, lambda t: t.pop(M)), WEIGHTS, "first has no lora_magnitude_vector"),
    "NaN": (lambda f: rewrite(f, lambda t: t[M].fill_(float("nan"))), WEIGHTS, f"{M} has values that are not finite"),
    "another rank": (
        lambda f: rewrite(f, lambda t: t.update({A: torch.zeros(7, 12)})), WEIGHTS,
        "first.lora_A [7, 12] does not have the rank of its configuration, 3",
    ),
    "factors of two ranks": (
        lambda f: rewrite(f, lambda t: t.update({A.replace("_A", "_B"): torch.zeros(20, 2)})), WEIGHTS,
        "first.lora_B [20, 2] does not fit lora_A [3, 12]",
    ),
    "a short magnitude": (
        lambda f: rewrite(f, lambda t: t.update({M: torch.zeros(5)})), WEIGHTS,
        "first.lora_magnitude_vector [5]: lora_B needs [20]",
    ),
    "a magnitude of two dimensions": (
        lambda f: rewrite(f, lambda t: t.update({M: torch.ones(1, 20)})), WEIGHTS,
        "first.lora_magnitude_vector [1, 20]: lora_B needs [20]",
    ),
    "a vector for a factor": (
        lambda f: rewrite(f, lambda t: t.update({A: torch.ones(3)})), WEIGHTS, "first.lora_A [3] does not have the",
    ),
    "integers": (
        lambda f: rewrite(f, lambda t: t.update({A: torch.ones(3, 12, dtype=torch.int32)})), WEIGHTS,
        f"{A} is of torch.int32, which is no floating-point type",
    ),
    "another model": (
        lambda f: (rewrite(f, renamed), configure(f, target_modules=".*")), WEIGHTS,
        "third: the model has no such layer",
    ),
    "a smaller model": (
        lambda f: rewrite(f, lambda t: [t.pop(key) for key in list(t) if "second" in key]), WEIGHTS,
        "has no tensors for second, which its configuration's target_modules name",
    ),
    "other targets": (
        lambda f: configure(f, target_modules=["second", "conv", "special", "embedding"]), WEIGHTS,
        "first: its configuration's target_modules do not name it",
    ),
    "another size": (
        lambda f: rewrite(f, lambda t: t.update({A: torch.zeros(3, 13)})), WEIGHTS,
        "first belongs to a layer with 13 inputs and 20 outputs, the model's has 12 and 20",
    ),
    "empty": (lambda f: save_file({}, f / WEIGHTS), WEIGHTS, "contains no LoRA tensors"),
    "no DoRA": (
        lambda f: configure(f, use_dora=False), CONFIG, "expected peft_type 'LORA' with use_dora, got 'LORA', False"
    ),
    "no scaling": (lambda f: configure(f, lora_alpha=None), CONFIG, "lora_alpha: expected a number, got None"),
    "no rank patterns": (
        lambda f: configure(f, rank_pattern=[1]), CONFIG, "rank_pattern: expected a mapping of regular expressions to"
    ),
    "a bad rank pattern": (
        lambda f: configure(f, rank_pattern={"(": 1}), CONFIG, "rank_pattern: '(' is not a regular expression: "
    ),
    "a word for a rank": (
        lambda f: configure(f, r="x", rank_pattern={}), WEIGHTS, "does not have the rank of its configuration, 'x'"
    ),
    "a number for targets": (lambda f: configure(f, target_modules=5), CONFIG, "target_modules, exclude_modules, lay"),
    "bad targets": (lambda f: configure(f, target_modules="("), CONFIG, "target_modules: '(' is not a regular"),
    "bad exclusions": (lambda f: configure(f, exclude_modules="("), CONFIG, "exclude_modules: '(' is not a regular"),
    "targets that take for ever": (
        lambda f: (rewrite(f, long_named), configure(f, target_modules="(([a-z]+)+[a-z]+)+!")), WEIGHTS,
        "its configuration's target_modules do not name it",
    ),
    "exclusions that take for ever": (
        lambda f: (rewrite(f, long_named), configure(f, exclude_modules="(([a-z]+)+[a-z]+)+!", target_modules=".*")),
        WEIGHTS, "aaa: the model has no such layer",
    ),
    "a rank pattern that takes for ever": (
        lambda f: (rewrite(f, long_named), configure(f, rank_pattern={"(([a-z]+)+[a-z]+)+!": 1}, r=7)), WEIGHTS,
        "does not have the rank of its configuration, 7",
    ),
    "saved modules that take for ever": (
        lambda f: (rewrite(f, long_named), configure(f, modules_to_save=["(([a-z]+)+[a-z]+)+!"], target_modules=".*")),
        WEIGHTS, "aaa: the model has no such layer",
    ),
    "no names of saved modules": (
        lambda f: configure(f, modules_to_save=[5]), CONFIG, "modules_to_save: expected names, got [5]"
    ),
    "a layers_pattern that is no name": (
        lambda f: configure(f, layers_pattern="(a+)+"), CONFIG,
        "layers_pattern: expected the names of modules, got '(a+)+'",
    ),
    "more replications than memory": (
        lambda f: (rewrite(f, renamed), configure(f, layer_replication=[[0, 10**12]], target_modules=".*")), WEIGHTS,
        "third: the model has no such layer",
    ),
    "half a replication": (
        lambda f: configure(f, layer_replication=[[0, 1.5]]), CONFIG, "layer_replication: expected pairs of numbers"
    ),
    "no replication": (
        lambda f: configure(f, layer_replication="x"), CONFIG, "layer_replication: expected pairs of numbers, got 'x'"
    ),
    "no configuration": (lambda f: (f / CONFIG).write_text("{"), CONFIG, "not a valid adapter configuration"),
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


def test_a_pickle(saved):
    """Which is not read."""
    (saved / WEIGHTS).rename(saved / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match=f"{WEIGHTS}: no such file, only adapter_model.bin, a pickle"):
        dora_kernels.check_adapter(saved)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("nowhere/there",), FileNotFoundError, "^nowhere/there: no such folder; expected one written by"),
        ((None,), TypeError, r"^path: expected a str or os\.PathLike, got NoneType"),
        ((".", "llama"), TypeError, r"^model: expected a torch\.nn\.Module, got str"),
    ],
)
def test_what_is_no_folder(arguments, error, message):
    with pytest.raises(error, match=message):
        dora_kernels.check_adapter(*arguments)


def test_replicated_layers(tmp_path):
    """The file has more layers than the base model that they are made from."""
    model = peft_model("llama", layer_replication=[[0, 2], [1, 2], [0, 1]])
    model.save_pretrained(tmp_path)
    dora_kernels.check_adapter(tmp_path, base_model("llama"))
    dora_kernels.check_adapter(tmp_path, model)
    configure(tmp_path, layer_replication=None)
    with pytest.raises(ValueError, match=r"layers\.2.*: the model has no such layer"):
        dora_kernels.check_adapter(tmp_path, base_model("llama"))


def test_against_a_peft_model_and_with_rank_patterns(tmp_path):
    model = toy(others=True, rank_pattern={"first": 5})
    model.save_pretrained(tmp_path)
    dora_kernels.check_adapter(tmp_path)
    dora_kernels.check_adapter(tmp_path, model)
    dora_kernels.check_adapter(tmp_path, get_peft_model(Toy(True), model.peft_config["default"]))
