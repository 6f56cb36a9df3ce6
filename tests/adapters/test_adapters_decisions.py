"""What a file leaves open: which axis, which names, which kind; decided from evidence and said, or refused."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from adapter_models import EPS32, Model, adapter_for, assert_same_function
from torch import nn

from dora_kernels import attach, extract, load_adapter, read_adapter, save_adapter

pytest.importorskip("safetensors")
from safetensors.torch import load_file, save_file

SQUARE = ["layers.0.q_proj", "layers.1.q_proj"]


def vectors(tmp_path, axis, names, **options):
    """A kohya file whose dora_scale have one dimension, and its adapter."""
    adapter = adapter_for(Model(), names, axis=axis, **options)
    file = tmp_path / "file.safetensors"
    save_adapter(adapter, file, format="kohya")
    save_file({key: t.flatten() if key.endswith("dora_scale") else t for key, t in load_file(file).items()}, file)
    return file, adapter


@pytest.mark.parametrize("axis", ["out", "in"])
def test_by_shape(tmp_path, axis):
    """``[out, 1]`` or ``[1, in]`` tell of square layers, too; no model is needed."""
    adapter = adapter_for(Model(), SQUARE, axis=axis)
    save_adapter(adapter, tmp_path / "file.safetensors", format="lycoris")
    read = read_adapter(tmp_path / "file.safetensors")
    assert {layer.magnitude_axis for layer in read.layers.values()} == {axis}
    assert not any("magnitude_axis" in note for note in read.notes)


@pytest.mark.parametrize("axis", ["out", "in"])
def test_by_the_other_layers(tmp_path, axis):
    file, _ = vectors(tmp_path, axis, [*SQUARE, "layers.0.up_proj"])
    read = read_adapter(file)
    assert {layer.magnitude_axis for layer in read.layers.values()} == {axis}
    assert read.notes[-1] == (
        f"magnitude_axis of lora_unet_layers_0_q_proj and 1 more: {axis!r}, as in the layers that are not square"
    )


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("weights", ["model", "state dict"])
def test_by_the_norms(tmp_path, axis, weights):
    file, adapter = vectors(tmp_path, axis, SQUARE)
    model = Model()
    if weights == "state dict":
        # a square matrix of a state dict may be stored either way: no evidence
        with pytest.raises(ValueError, match="the model's weights do not decide: pass magnitude_axis="):
            read_adapter(file, model.state_dict())
        return
    read = read_adapter(file, model)
    assert read.notes[0].startswith(f"magnitude_axis of layers.0.q_proj and 1 more: {axis!r}, because the magnitude ")
    assert_same_function(model, read, adapter, 8 * EPS32)


def test_by_the_norms_of_an_adapted_model(tmp_path):
    file, _ = vectors(tmp_path, "in", SQUARE)
    model = Model()
    attach(model, adapter_for(model, SQUARE, seed=4))
    assert read_adapter(file, model).layers[SQUARE[0]].magnitude_axis == "in"


def test_no_evidence_is_an_error(tmp_path):
    file, adapter = vectors(tmp_path, "in", SQUARE)
    with pytest.raises(ValueError, match="no model was given to compare its norms: pass magnitude_axis='out' or 'in'"):
        read_adapter(file)
    model = Model()
    assert_same_function(model, read_adapter(file, model, magnitude_axis="in"), adapter, 8 * EPS32)
    for name in SQUARE:  # orthogonal: rows and columns have the same norms, and m is neither
        nn.init.orthogonal_(model.get_submodule(name).weight, gain=50.0)
    with pytest.raises(ValueError, match="the model's weights do not decide"):
        read_adapter(file, model)


def test_contradicting_evidence_is_an_error(tmp_path):
    model, one, two = Model(), adapter_for(Model(), SQUARE[:1]), adapter_for(Model(), SQUARE[1:], axis="in")
    one.layers |= two.layers
    file = tmp_path / "file.safetensors"
    save_adapter(one, file, format="lycoris")
    save_file({key: t.flatten() if key.endswith("dora_scale") else t for key, t in load_file(file).items()}, file)
    with pytest.raises(ValueError, match="the model's weights contradict each other"):
        read_adapter(file, model)


@pytest.mark.parametrize("format", ["peft", "torchtune", "nvidia", "qdora", "mlx"])
def test_a_format_that_fixes_it(tmp_path, format):
    """Square layers are "out" whatever the weights say; what does not fit is an error that names the other axis."""
    adapter = adapter_for(Model(), SQUARE)
    for layer in adapter.layers.values():
        layer.magnitude.fill_(3.0)
    save_adapter(adapter, tmp_path, format=format)
    read = read_adapter(tmp_path, Model())
    assert {layer.magnitude_axis for layer in read.layers.values()} == {"out"}
    assert read_adapter(tmp_path, magnitude_axis="in").layers[SQUARE[0]].magnitude_axis == "in"
    name = "layers.0.up_proj"
    save_adapter(adapter_for(Model(), [name]), tmp_path, format=format, force=True)
    with pytest.raises(ValueError, match=r"axis 'in' needs 12 values; magnitude_axis='out' would fit"):
        read_adapter(tmp_path, magnitude_axis="in")


def test_underscores_become_the_models_names(tmp_path):
    """Without a model they stay; another format is refused then, attaching resolves them."""
    model, names = Model(), ["layers.0.up_proj", "lm_head"]
    adapter = adapter_for(model, names)
    save_adapter(adapter, tmp_path / "file.safetensors", format="lycoris")
    without = read_adapter(tmp_path / "file.safetensors")
    assert list(without.layers) == ["lycoris_layers_0_up_proj", "lycoris_lm_head"]
    assert any("pass the model" in note for note in without.notes)
    with pytest.raises(ValueError, match="lycoris_layers_0_up_proj cannot be written as 'peft': .* its model"):
        save_adapter(without, tmp_path / "peft")
    save_adapter(without, tmp_path / "again.safetensors", format="lycoris")
    assert load_file(tmp_path / "again.safetensors").keys() == load_file(tmp_path / "file.safetensors").keys()
    assert attach(model, without) == names
    named = read_adapter(tmp_path / "file.safetensors", Model().state_dict())
    assert list(named.layers) == names


def ambiguous():
    """``a.b_c`` and ``a_b.c`` are both ``a_b_c``."""
    return nn.ModuleDict({
        "a": nn.ModuleDict({"b_c": nn.Linear(6, 4)}),
        "a_b": nn.ModuleDict({"c": nn.Linear(6, 4)}),
    })  # fmt: skip


def test_ambiguous_names(tmp_path):
    model = ambiguous()
    adapter = adapter_for(model, ["a.b_c"])
    save_adapter(adapter, tmp_path / "file.safetensors", format="lycoris")
    with pytest.raises(ValueError, match="lycoris_a_b_c may stand for any of a.b_c, a_b.c"):
        read_adapter(tmp_path / "file.safetensors", model)
    with pytest.raises(ValueError, match="a.b_c cannot be written as 'kohya': .* the same as that of a_b.c"):
        save_adapter(adapter_for(model, ["a.b_c", "a_b.c"]), tmp_path / "two.safetensors", format="kohya")


def test_a_name_without_dots_does_not_win(tmp_path):
    """``a_b`` and ``a.b`` are both ``a_b``: neither read nor written for such a model; an adapter alone is written."""
    model = nn.ModuleDict({"a": nn.ModuleDict({"b": nn.Linear(6, 4)}), "a_b": nn.Linear(6, 4)})
    for name in ("a.b", "a_b"):
        adapter, file = adapter_for(model, [name]), tmp_path / f"{name}.safetensors"
        save_adapter(adapter, file, format="lycoris")
        for failing in (lambda: read_adapter(file, model), lambda: attach(model, read_adapter(file))):  # noqa: B023
            with pytest.raises(ValueError, match=r"lycoris_a_b may stand for any of a\.b, a_b$"):
                failing()
        adapted = copy.deepcopy(model)
        attach(adapted, adapter)
        for format in ("lycoris", "kohya"):
            with pytest.raises(ValueError, match=f"{name} cannot be written as '{format}': .* the same as that of a.b"):
                save_adapter(adapted, tmp_path / "new.safetensors", format=format)
        save_adapter(adapted, tmp_path / "peft", force=True)
        assert list(read_adapter(tmp_path / "peft", model).layers) == [name]


def test_dots_in_the_file_decide(tmp_path):
    """A file of PEFT's keys, or of a converter's, whose names are the model's own."""
    model = nn.ModuleDict({"a": nn.ModuleDict({"b": nn.Linear(6, 4)}), "a_b": nn.Linear(6, 4)})
    file = tmp_path / "file.safetensors"
    save_adapter(adapter_for(model, ["a.b"]), file, format="lycoris")
    save_file({key.replace("lycoris_a_b", "a.b"): tensor for key, tensor in load_file(file).items()}, file)
    assert list(read_adapter(file, model).layers) == ["a.b"]


def kohya(tmp_path, prefixes):
    """A file with the same adapter under each prefix, of another layer for a prefix with a name."""
    file = tmp_path / "file.safetensors"
    save_adapter(adapter_for(Model(), ["lm_head"]), file, format="kohya", force=True)
    tensors = load_file(file)
    tensors = {key.replace("lora_unet_lm_head", one): t.clone() for one in prefixes for key, t in tensors.items()}
    save_file(tensors, file)
    return file


def test_a_file_of_several_models(tmp_path):
    """The text encoders' layers are left out beside the U-Net's, if none of them is the model's."""
    file = kohya(tmp_path, ["lora_unet_lm_head", "lora_te1_text_model_encoder", "lora_te2_text_model_encoder"])
    read = read_adapter(file, Model())
    assert list(read.layers) == ["lm_head"]
    assert read.notes == [
        f"1 layers with the prefix lora_te{i} belong to another model and are left out" for i in (1, 2)
    ]
    assert len(read_adapter(file).layers) == 3
    with pytest.raises(ValueError, match="lora_(unet|te)_lm_head and lora_(unet|te)_lm_head both stand for lm_head"):
        read_adapter(kohya(tmp_path, ["lora_unet_lm_head", "lora_te_lm_head"]), Model())
    with pytest.raises(ValueError, match="lora_unet_other: the model has no such layer"):
        read_adapter(kohya(tmp_path, ["lora_unet_lm_head", "lora_unet_other"]), Model())
    with pytest.raises(ValueError, match="lora_unet_other: the model has no such layer"):
        read_adapter(kohya(tmp_path, ["lora_unet_other"]), Model())


def sdxl(tmp_path):
    """Two text encoders with the same names and other sizes, and their adapters, in one file."""
    models, adapters, tensors = {}, {}, {}
    for i, prefix in enumerate(("lora_te1", "lora_te2", "lora_unet")):
        layers = nn.ModuleDict({"fc1": nn.Linear(6 + i, 4), "fc2": nn.Linear(4, 6)})
        models[prefix] = nn.ModuleDict({"text_model": layers})
        adapters[prefix] = adapter_for(models[prefix], ["text_model.fc1", "text_model.fc2"])
        file = tmp_path / f"{prefix}.safetensors"
        save_adapter(adapters[prefix], file, format="kohya", prefix=prefix)
        tensors |= load_file(file)
    assert {key.partition("_text")[0] for key in tensors} == set(models)
    save_file(tensors, tmp_path / "all.safetensors")
    return tmp_path / "all.safetensors", models, adapters


def test_one_model_of_several_by_its_prefix(tmp_path):
    """Read, with or without the model, attached, and written again under the prefix that it had."""
    file, models, adapters = sdxl(tmp_path)
    for prefix, model in models.items():
        with pytest.raises(ValueError, match="both stand for text_model.fc.; pass prefix="):
            read_adapter(file, model)
        named, unnamed = read_adapter(file, model, prefix=prefix), read_adapter(file, prefix=f"{prefix}_")
        assert named.notes[0] == f"4 layers without the prefix {prefix} are left out"
        assert_same_function(model, named, adapters[prefix])
        for adapter in (named, unnamed):
            save_adapter(adapter, tmp_path / "again.safetensors", format="kohya", force=True)
            alone = load_file(tmp_path / f"{prefix}.safetensors")
            assert load_file(tmp_path / "again.safetensors").keys() == alone.keys()
        assert attach(copy.deepcopy(model), unnamed) == list(adapters[prefix].layers)
        load_adapter(file, model, prefix=prefix)
        assert_same_function(model, extract(model), adapters[prefix])
    save_adapter(named, tmp_path / "other.safetensors", format="lycoris")
    assert all(key.startswith("lycoris_text_model") for key in load_file(tmp_path / "other.safetensors"))


def test_prefixes_of_ones_own(tmp_path):
    model, file = Model(), tmp_path / "file.safetensors"
    save_adapter(adapter_for(model, SQUARE), file, format="lycoris", prefix="my")
    assert list(read_adapter(file, model, prefix="my").layers) == SQUARE
    without = read_adapter(file, prefix="my")
    assert without.config == {"underscored": True, "prefix": "my"}
    assert attach(Model(), without) == SQUARE
    with pytest.raises(ValueError, match="my_layers_0_q_proj cannot be written as 'lycoris': .* with its model"):
        save_adapter(without, file, format="lycoris", prefix="lora_te1", force=True)
    with pytest.raises(ValueError, match="file.safetensors: prefix: no layer has 'lora_te';"):
        read_adapter(file, model, prefix="lora_te")
    save_adapter(adapter_for(model, SQUARE), tmp_path / "peft")
    with pytest.raises(ValueError, match="prefix: .* has the format 'peft', whose names have no prefix"):
        read_adapter(tmp_path / "peft", model, prefix="lora_te")
    with pytest.raises(ValueError, match="prefix: names in the format 'peft' have no prefix"):
        save_adapter(adapter_for(model, SQUARE), tmp_path / "new", prefix="lora_te")
    for prefix, error in (("", ValueError), ("_", ValueError), ("a.b", ValueError), (3, TypeError)):
        with pytest.raises(error, match="prefix: expected"):
            read_adapter(file, model, prefix=prefix)
        with pytest.raises(error, match="prefix: expected"):
            save_adapter(adapter_for(model, SQUARE), file, format="kohya", prefix=prefix, force=True)


def test_text_encoders_are_named_so(tmp_path):
    model = nn.ModuleDict({"text_model": nn.ModuleDict({"a": nn.Linear(6, 4)}), "other": nn.Linear(6, 4)})
    save_adapter(adapter_for(model, ["text_model.a", "other"]), tmp_path / "file.safetensors", format="kohya")
    keys = load_file(tmp_path / "file.safetensors")
    assert {key.partition(".")[0] for key in keys} == {"lora_te_text_model_a", "lora_unet_other"}


def test_mlx_embeddings(tmp_path):
    """The same keys as a linear layer's: by the model, by the magnitude's length, by the name."""
    model = nn.ModuleDict({"wte": nn.Embedding(12, 12), "proj": nn.Linear(12, 12), "table": nn.Embedding(30, 12)})
    adapter = adapter_for(model, ["wte", "table"], axis="in")
    adapter.layers |= adapter_for(model, ["proj"]).layers
    save_adapter(adapter, tmp_path, format="mlx")
    kinds = {"wte": "embedding", "table": "embedding", "proj": "linear"}
    for base in (model, None):
        read = read_adapter(tmp_path, base)
        assert {name: layer.kind for name, layer in read.layers.items()} == kinds
        assert_same_function(model, read, adapter, 8 * EPS32)
    assert "wte was taken for a layer of kind 'embedding' by its name" in read.notes


@pytest.mark.parametrize("format, where", [("torchtune", "r"), ("nvidia", "r"), ("mlx", "lora_parameters.scale")])
def test_scaling_needs_a_configuration(tmp_path, format, where):
    adapter = adapter_for(Model(), SQUARE, rank=4, scaling=0.3)
    save_adapter(adapter, tmp_path, format=format)
    (tmp_path / "adapter_config.json").unlink()
    said = rf"it needs .*adapter_config\.json, which is missing, for its {where}; pass scaling= to read it"
    with pytest.raises(ValueError, match=said):
        read_adapter(tmp_path)
    read = read_adapter(tmp_path, scaling=0.3)
    assert read.notes[-1] == "scaling 0.3, as requested"
    assert_same_function(Model(), read, adapter, 0.0)


def test_alpha_of_kohya_files(tmp_path):
    """An integer, as sd-scripts stores it; none, scaling 1."""
    file = tmp_path / "file.safetensors"
    save_adapter(adapter_for(Model(), SQUARE, rank=4, scaling=0.5), file, format="kohya")
    tensors = load_file(file)
    save_file({key: torch.tensor(2) if key.endswith("alpha") else t for key, t in tensors.items()}, file)
    assert read_adapter(file, Model()).layers[SQUARE[0]].scaling == 0.5
    save_file({key: t for key, t in tensors.items() if not key.endswith("alpha")}, file)
    read = read_adapter(file, Model())
    assert read.layers[SQUARE[0]].scaling == 1.0 and "has no alpha: scaling 1" in read.notes[0]


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("names", ["", "lora_unet"])
def test_pefts_factors_with_lycoris_alpha_and_scale(tmp_path, names, plain):
    """ComfyUI reads them as kohya's; a configuration of PEFT's beside them says something else."""
    model, adapter = Model(), adapter_for(Model(), [*SQUARE, "layers.0.conv_in"], axis="in", plain=plain)
    file = tmp_path / "adapter_model.safetensors"
    save_adapter(adapter, file, format="kohya")
    tensors = {}
    for key, tensor in load_file(file).items():
        name, _, part = key.partition(".")
        if not names:
            name = next(each for each in adapter.layers if each.replace(".", "_") == name.removeprefix("lora_unet_"))
        tensors[f"{name}.{part}".replace("lora_down", "lora_A").replace("lora_up", "lora_B")] = tensor
    save_file(tensors, file)
    read = read_adapter(file, model)
    assert read.format == ("kohya" if names else "lycoris")
    assert_same_function(model, read, adapter)
    assert read.config == ({"prefix": names} if names else {})
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 4}))
    with pytest.raises(ValueError, match=r"\.alpha belongs to an adapted layer, but the format 'peft' has no such"):
        read_adapter(file, model)


def test_peft_files_of_torchtune(tmp_path):
    """Magnitudes, and no use_dora in the configuration."""
    save_adapter(adapter_for(Model(), SQUARE), tmp_path)
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in config.items() if key != "use_dora"}))
    weights = tmp_path / "adapter_model.safetensors"
    save_file(load_file(weights), weights)
    assert read_adapter(tmp_path).notes == ["read as DoRA because it has magnitudes; no configuration says use_dora"]


def test_other_tensors_are_named(tmp_path):
    """Trained layer norms of a QDoRA file, a saved head of a PEFT file."""
    save_adapter(adapter_for(Model(), SQUARE), tmp_path, format="qdora")
    file = tmp_path / "model_state_dict.safetensors"
    save_file({**load_file(file), "norm.weight": torch.ones(3), "norm.bias": torch.ones(3)}, file)
    assert read_adapter(file).notes == ["norm.bias and 1 more: not part of the adapter, but beside it"]
