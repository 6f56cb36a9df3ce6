"""Files of experts' adapters that are not what they should be: both readers name the parameter, and what came."""

from __future__ import annotations

import json

import pytest
import torch
from experts_models import mixture, qwen3_moe
from safetensors.torch import load_file, save_file

import dora_kernels

STACKS = ["experts.gate_up_proj", "experts.down_proj"]
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
HOLDER = "model.layers.1.mlp.experts"
KEY = f"base_model.model.{HOLDER}.lora_"
A, B, M = f"{KEY}A.weight", f"{KEY}B.weight", f"{KEY}magnitude_vector"


@pytest.fixture
def saved(tmp_path):
    """down_proj has rank 3: A is [18, 24], B [32, 18] and the magnitude [6, 32]."""
    model = qwen3_moe()
    dora_kernels.apply_dora(model, [], rank=2, target_parameters=STACKS, rank_pattern={"down_proj": 3})
    dora_kernels.save_adapter(model, tmp_path)
    return tmp_path


def change(folder, changed):
    tensors = load_file(folder / WEIGHTS)
    changed(tensors)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / WEIGHTS)


def said_by(*calls):
    """What each call says, with the file's name."""
    texts = []
    for call in calls:
        with pytest.raises(ValueError) as caught:
            call()
        texts.append(str(caught.value))
    return texts


def readers(folder, with_model=True):
    """`load_adapter` and `check_adapter`, with the model and, on request, without."""
    models = (qwen3_moe(), None) if not with_model else (qwen3_moe(),)
    return [lambda call=call, model=model: call(folder, model) for model in models
            for call in (dora_kernels.load_adapter, dora_kernels.check_adapter)]  # fmt: skip


EXPECTED = "expected [6, 32], one value for each output of each expert"
MAGNITUDES = {
    "transposed": (lambda m: m.t(), f"lora_magnitude_vector [32, 6]: {EXPECTED}"),
    "flat": (lambda m: m.flatten(), f"lora_magnitude_vector [192]: {EXPECTED}"),
    "short": (lambda m: m[:, :-1], f"lora_magnitude_vector [6, 31]: {EXPECTED}"),
}


@pytest.mark.parametrize(("changed", "said"), MAGNITUDES.values(), ids=list(MAGNITUDES))
def test_magnitudes(changed, said, saved):
    change(saved, lambda tensors: tensors.update({M: changed(tensors[M])}))
    for text in said_by(*readers(saved, with_model=False)):
        assert text.startswith(f"{saved / WEIGHTS}: {HOLDER}") and text.endswith(said)


@pytest.mark.parametrize("rows", [17, 6])
def test_factors(rows, saved):
    """The shape that came, not one expert's part of it."""
    change(saved, lambda tensors: tensors.update({A: tensors[A][:rows]}))
    for text in said_by(*readers(saved, with_model=False)):
        assert f": {HOLDER}" in text and f"lora_A [{rows}, 24]: " in text and "6 experts" in text


@pytest.mark.parametrize(("inside", "stack"), [(True, "gate_up_proj"), (False, "down_proj")], ids=["inner", "outer"])
def test_a_missing_stack(inside, stack, saved):
    def without(tensors):
        for key in [key for key in tensors if ".layers.1." in key and (".base_layer." in key) == inside]:
            del tensors[key]

    change(saved, without)
    said = f"has no tensors for {HOLDER}.{stack}, which its configuration's target_parameters name"
    assert said_by(*readers(saved)) == 2 * [f"{saved / WEIGHTS}: {said}"]


@pytest.mark.parametrize("key", [f"{KEY}C.weight", f"{KEY}B.bias", f"{KEY}scale"])
def test_a_part_that_is_unknown(key, saved):
    change(saved, lambda tensors: tensors.update({key: torch.ones(32)}))
    for text in said_by(*readers(saved, with_model=False)):
        assert text.startswith(f"{saved / WEIGHTS}: {key} belongs to an adapted layer, but ")


def test_tensors_beside_the_adapter(saved):
    """Names with lora in them elsewhere are none of its parts."""
    change(saved, lambda tensors: tensors.update({"base_model.model.lora_head.weight": torch.ones(3)}))
    dora_kernels.check_adapter(saved, qwen3_moe())


def test_another_number_of_experts(saved):
    """Both numbers are said, and nothing of another order of the stacks, which this is not."""
    (text,) = said_by(lambda: dora_kernels.load_adapter(saved, qwen3_moe(num_experts=8)))
    assert text.endswith(
        "belongs to a stack of 6 experts with 32 inputs and 48 outputs, the model's is a stack of 8 experts with 32 "
        "and 48"
    )
    model = mixture("mixtral")  # whose down_proj has gate_up_proj's sizes
    model = type(model)(type(model.config)(**{**model.config.to_dict(), "num_local_experts": 4}))
    for each, there in ((model, [4, 96, 32]), (qwen3_moe(num_experts=8), [8, 48, 32])):
        (text,) = said_by(lambda each=each: dora_kernels.check_adapter(saved, each))
        assert text.endswith(f"and magnitude [6, 48] belong to another parameter than the model's {there}")


def test_a_configuration_that_is_missing(saved):
    (saved / CONFIG).unlink()
    for place in (saved, saved / WEIGHTS):
        (text,) = said_by(lambda place=place: dora_kernels.load_adapter(place))
        assert text == (
            f"{saved / WEIGHTS}: it needs {saved / CONFIG}, which is missing, for its r; pass scaling= to read it "
            "anyway"
        )


def test_one_expert(tmp_path):
    """A stack of one is a stack."""
    model = qwen3_moe(num_experts=1, num_experts_per_tok=1)
    dora_kernels.apply_dora(model, [], rank=2, target_parameters=STACKS)
    dora_kernels.save_adapter(model, tmp_path)
    other = qwen3_moe(num_experts=1, num_experts_per_tok=1)
    dora_kernels.check_adapter(tmp_path, other)
    dora_kernels.load_adapter(tmp_path, other)
    assert json.loads((tmp_path / CONFIG).read_text())["use_dora"]
