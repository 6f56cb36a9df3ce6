"""Every pair of formats: what is written in one, read, written in the other and read again is the same function."""

from __future__ import annotations

import itertools

import pytest
import torch
from adapter_models import EPS32, Model, adapter_for, assert_same_function

from dora_kernels import read_adapter, save_adapter
from dora_kernels.adapters import FORMATS

pytest.importorskip("safetensors")

LINEAR = ["layers.0.q_proj", "layers.0.up_proj", "layers.1.down", "lm_head"]
CONV = ["layers.0.conv_in", "layers.1.conv"]
EVERY = {"peft", "diffusers", "lycoris", "kohya", "torchtune", "nvidia", "qdora", "mlx"}

# what is adapted, how, and which formats can hold it
CONTENTS = {
    "linear, out": (LINEAR, {}, EVERY),
    "linear, in": (LINEAR, {"axis": "in"}, {"lycoris", "kohya"}),
    "linear, one rank and scaling": (LINEAR, {"rank": 4, "scaling": 2.0}, EVERY),
    "linear, plain": (LINEAR, {"plain": True}, EVERY - {"nvidia", "qdora"}),
    "linear, bfloat16": (LINEAR, {"dtype": torch.bfloat16}, EVERY),
    "linear, eps 1e-8": (LINEAR, {"eps": 1e-8}, EVERY),
    "linear, eps 1e-3": (LINEAR, {"eps": 1e-3}, set()),
    "convolutions, out": (CONV, {}, {"peft", "diffusers", "lycoris", "kohya"}),
    "convolutions, in": (CONV, {"axis": "in"}, {"lycoris", "kohya"}),
    "embedding, out": (["embed_tokens"], {}, {"peft"}),
    "embedding, in": (["embed_tokens"], {"axis": "in"}, {"mlx"}),
    "embedding, plain": (["embed_tokens"], {"plain": True}, {"peft", "mlx"}),
    "groups, out": (["layers.0.grouped"], {"rank": 4}, set()),
    "groups, plain": (["layers.0.grouped"], {"rank": 4, "plain": True}, {"peft", "diffusers"}),
}


def test_the_table_names_every_format():
    assert set(FORMATS) == EVERY


@pytest.fixture(scope="module")
def model():
    return Model()


@pytest.mark.parametrize("content", CONTENTS)
def test_conversion_between_any_two(model, content, tmp_path):
    names, options, able = CONTENTS[content]
    adapter = adapter_for(model, names, **options)
    # eps goes where a format has none: it is all that 1e-8 and LyCORIS's 1.2e-7 are of norms of about 1
    limit = (4 + 4 * (not options.get("plain", False))) * EPS32
    for first, second in itertools.product(sorted(able), repeat=2):
        one, two = tmp_path / f"{first}-{second}-1", tmp_path / f"{first}-{second}-2"
        save_adapter(adapter, one, format=first)
        read = read_adapter(one, model)
        assert read.format == first
        save_adapter(read, two, format=second)
        again = read_adapter(two, model)
        assert again.format == second
        if "groups" not in content:  # there is no weight of theirs
            assert_same_function(model, again, adapter, limit)
        for name, layer in again.layers.items():
            sent = adapter.layers[name]
            assert (layer.kind, layer.magnitude_axis) == (sent.kind, sent.magnitude_axis)
            if options.get("dtype") is torch.bfloat16:
                assert layer.lora_A.dtype == layer.magnitude.dtype == torch.bfloat16


@pytest.mark.parametrize("content", CONTENTS)
def test_what_a_format_cannot_express_is_refused(model, content, tmp_path):
    names, options, able = CONTENTS[content]
    adapter = adapter_for(model, names, **options)
    for format in EVERY - able:
        with pytest.raises(ValueError, match=f"{names[0]} cannot be written as '{format}': ") as refused:
            save_adapter(adapter, tmp_path / format, format=format)
        assert not (tmp_path / format).exists()
        assert "groups" not in str(refused.value) or "save_file(dora_state_dict(model), ...)" in str(refused.value)


@pytest.mark.parametrize("format", sorted(EVERY))
def test_format_by_name_and_file_by_name(model, format, tmp_path):
    """The file itself instead of its folder, and every other format's name refused."""
    adapter = adapter_for(model, LINEAR)
    save_adapter(adapter, tmp_path, format=format)
    file = tmp_path / FORMATS[format].weights
    assert_same_function(model, read_adapter(file, model, format=format), adapter, 8 * EPS32)
    alike = {"diffusers", "lycoris", "kohya"}
    for other in EVERY - {format} - (alike if format in alike else set()):
        with pytest.raises(ValueError, match=f"format='{other}', but its keys are those of '{format}'"):
            read_adapter(file, model, format=other)


def test_folding_says_so_and_keeps_bfloat16_where_it_is_exact(model, tmp_path):
    adapter = adapter_for(model, LINEAR[:2], dtype=torch.bfloat16)
    first, second = adapter.layers.values()
    object.__setattr__(first, "scaling", 0.5)
    object.__setattr__(second, "scaling", 2.0)
    notes = save_adapter(adapter, tmp_path / "exact", format="qdora")
    assert notes == ["the scaling of 2 of 2 layers was folded into lora_B: the format has only one"]
    read = read_adapter(tmp_path / "exact", model)
    assert {layer.lora_B.dtype for layer in read.layers.values()} == {torch.bfloat16}
    assert_same_function(model, read, adapter, 0.0)
    object.__setattr__(second, "scaling", 0.3)
    (note,) = save_adapter(adapter, tmp_path / "rounded", format="qdora")
    assert note.endswith("1 lora_B became float32")
    assert_same_function(model, read_adapter(tmp_path / "rounded", model), adapter, EPS32)
