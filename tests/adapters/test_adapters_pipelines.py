"""One file with the adapters of several models of a pipeline, and diffusers' own files."""

from __future__ import annotations

import json

import pytest
import torch
from adapter_models import EPS32, adapter_for, assert_same_function
from torch import nn

pytest.importorskip("safetensors")
pytest.importorskip("transformers")

from pipeline_models import (
    PIPELINES,
    adapted_pipeline,
    clip,
    expected_of,
    modules_of,
    peft_state,
    t5,
    trained,
    unet,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dora_kernels import Adapter, attach, extract, load_adapter, read_adapter, save_adapter
from dora_kernels.core import expressions

pytestmark = [
    pytest.mark.filterwarnings("ignore:target_modules"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing"),
]


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("format", ["kohya", "diffusers"])
def test_one_file_of_a_whole_pipeline(tmp_path, name, format):
    """Written in one call, with the ecosystem's names, read in one call, with the models or without, and for each."""
    make, models, wanted, prefixes = adapted_pipeline(name)
    file = tmp_path / "file.safetensors"
    save_adapter(models, file, format=format)
    keys = load_file(file)
    separator = "_" if format == "kohya" else "."
    of = prefixes if format == "kohya" else {component: component for component in prefixes}
    for component, prefix in of.items():
        own = [key for key in keys if key.startswith(prefix + separator)]
        parts = 4 if format == "kohya" else 3
        assert len(own) == parts * sum(each.startswith(f"{component}.") for each in wanted.layers)
        if "text_encoder" in component and not isinstance(make()[component], type(t5())):
            assert all(key.startswith(separator.join((prefix, "text_model", "encoder", "layers"))) for key in own)
    fresh = make()
    read = load_adapter(file, fresh)
    assert read.format == format and not any("another model" in note for note in read.notes)
    assert_same_function(modules_of(make()), read, wanted, 8 * EPS32)
    assert_same_function(modules_of(make()), extract(fresh), wanted, 8 * EPS32)
    again = tmp_path / "again.safetensors"
    save_adapter(read, again, format=format)
    assert load_file(again).keys() == keys.keys()
    without = read_adapter(file)
    fresh = make()
    attach(fresh, without)
    assert_same_function(modules_of(make()), extract(fresh), wanted, 8 * EPS32)
    for component, prefix in of.items():
        one = make()[component]
        alone = read_adapter(file, one, prefix=prefix)
        expected = Adapter({layer.partition(".")[2]: each for layer, each in wanted.layers.items()
                            if layer.startswith(f"{component}.")})  # fmt: skip
        assert_same_function(one, alone, expected, 8 * EPS32)


def test_joined_from_adapters(tmp_path):
    """PEFT folders of each model, one file; of other formats it is refused, and split again."""
    _, models, wanted, _ = adapted_pipeline("SD 1.5")
    for component, model in models.items():
        save_adapter(model, tmp_path / component)
    parts = {component: read_adapter(tmp_path / component) for component in models}
    for format in ("kohya", "diffusers"):
        file = tmp_path / f"{format}.safetensors"
        save_adapter(parts, file, format=format)
        assert_same_function(modules_of(PIPELINES["SD 1.5"][0]()), read_adapter(file, PIPELINES["SD 1.5"][0]()), wanted,
                             8 * EPS32)  # fmt: skip
    with pytest.raises(ValueError, match="adapters of text_encoder, unet, but the format 'peft' holds only one; pass"):
        save_adapter(parts, tmp_path / "new")
    with pytest.raises(ValueError, match="prefix= needs a single model"):
        save_adapter(parts, tmp_path / "new.safetensors", format="kohya", prefix="lora_te1")
    with pytest.raises(TypeError, match="source: unet: expected a torch.nn.Module or an Adapter, got str"):
        save_adapter({"unet": "x"}, tmp_path / "new.safetensors", format="kohya")
    alone = read_adapter(file, prefix="text_encoder")
    save_adapter(alone, tmp_path / "split")
    assert set(read_adapter(tmp_path / "split").layers) == {
        f"text_model.{name.partition('.')[2]}" for name in wanted.layers if name.startswith("text_encoder.")
    }  # fmt: skip


@pytest.mark.parametrize("format", ["kohya", "diffusers"])
def test_dora_of_one_and_lora_of_another(tmp_path, format):
    """Each model is DoRA throughout, or plain LoRA: other mixtures are refused, this is kept as it is."""
    models, file = {"unet": unet(), "text_encoder": clip()}, tmp_path / "file.safetensors"
    adapters = {"unet": trained(models["unet"], ["to_q"]), "text_encoder": trained(models["text_encoder"], ["q_proj"],
                                                                                   use_dora=False)}  # fmt: skip
    save_adapter(models, file, format=format)
    wanted = Adapter({f"{component}.{name}": layer for component, adapter in adapters.items()
                      for name, layer in adapter.layers.items()})  # fmt: skip
    fresh = {"unet": unet(), "text_encoder": clip()}
    load_adapter(file, fresh)
    assert_same_function(modules_of({"unet": unet(), "text_encoder": clip()}), extract(fresh), wanted, 8 * EPS32)
    save_adapter(read_adapter(file), tmp_path / "again.safetensors", format=format)
    assert load_file(tmp_path / "again.safetensors").keys() == load_file(file).keys()
    tensors = load_file(file)
    magnitude = next(key for key in tensors if key.endswith(("dora_scale", "lora_magnitude_vector")))
    save_file({key: tensor for key, tensor in tensors.items() if key != magnitude}, file)
    with pytest.raises(ValueError, match="has no dora_scale, which other layers have"):
        read_adapter(file)


@pytest.mark.parametrize("prefix", ["lora_te", "lora_te1"])
def test_a_real_text_encoders_file(tmp_path, prefix):
    """With text_model in its names, for models with and without, and written so for both."""
    for projection in (False, True):
        model = clip(projection)
        adapter = trained(model, ["q_proj", "fc1"])
        file = tmp_path / "file.safetensors"
        save_adapter(model, file, format="kohya", force=True, **({} if prefix == "lora_te" else {"prefix": prefix}))
        keys = load_file(file)
        assert {key.partition("_layers_")[0] for key in keys} == {f"{prefix}_text_model_encoder"}
        for other in (False, True):
            read = read_adapter(file, clip(other))
            start = "text_model." if other else ""
            expected = {start + name.removeprefix("text_model."): layer for name, layer in adapter.layers.items()}
            assert_same_function(clip(other), read, Adapter(expected), 8 * EPS32)


@pytest.mark.parametrize("start", ["unet.", "text_encoder.", "", "other."])
def test_diffusers_own_conversion_to_kohya(tmp_path, start):
    """It half changes the names of magnitudes: they are read as PEFT's, square layers and convolutions, too."""
    diffusers = pytest.importorskip("diffusers")
    make = clip if start == "text_encoder." else unet
    targets = ["q_proj", "fc1"] if start == "text_encoder." else ["to_k", "to_out.0", "conv1"]
    state = peft_state(make(), targets)
    converted = diffusers.utils.convert_state_dict_to_kohya({start + key: t for key, t in state.items()})
    assert any("." in key.rpartition(".lora_magnitude_vector")[0] or "." in key.rpartition(".dora_scale")[0]
               for key in converted)  # fmt: skip
    save_file({key: t.contiguous() for key, t in converted.items()}, tmp_path / "file.safetensors")
    if start == "other.":  # no program's: refused, and nothing of it is left out
        with pytest.raises(ValueError, match="the model has no such layer"):
            read_adapter(tmp_path / "file.safetensors", make())
    else:
        read = read_adapter(tmp_path / "file.safetensors", make())
        assert_same_function(make(), read, expected_of(state), 0.0)
    without = read_adapter(tmp_path / "file.safetensors")
    assert len(without.layers) == len(expected_of(state).layers)
    for layer in without.layers.values():
        assert (layer.magnitude_axis, layer.eps) == ("out", 0.0) and layer.magnitude is not None


@pytest.mark.parametrize("part", ["lora_magnitude_vector", "dora_scale", "magnitude", "lora_magnitude_vector.weight"])
@pytest.mark.parametrize("format", ["peft", "diffusers", "lycoris", "kohya", "torchtune", "nvidia", "qdora", "mlx"])
@pytest.mark.parametrize("name", ["nowhere", "deep.nowhere", "lora_unet_nowhere", "base_model.model.nowhere"])
def test_no_magnitude_is_left_out(tmp_path, format, part, name):
    """Beside whole layers, of a layer that has nothing else: in no format a note."""
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4))
    save_adapter(adapter_for(model, ["0"], rank=2, scaling=1.0, plain=format not in ("nvidia", "qdora")),
                 tmp_path, format=format)  # fmt: skip
    (file,) = tmp_path.glob("*.safetensors")
    save_file({**load_file(file), f"{name}.{part}": torch.ones(4)}, file)
    with pytest.raises(ValueError, match=rf"file|nowhere.*(has no|is part of an adapter|{part})"):
        read_adapter(tmp_path)


@pytest.mark.parametrize("metadata", [True, False])
def test_diffusers_saves_and_reads(tmp_path, metadata):
    """`save_lora_weights`, with and without the configurations in the header, is read; what is written it loads."""
    diffusers = pytest.importorskip("diffusers")
    peft = pytest.importorskip("peft")
    states, configs = {}, {}
    for component, make, targets in (("unet", unet, ["to_k", "conv1"]), ("text_encoder", clip, ["q_proj", "fc1"])):
        states[component] = peft_state(make(), targets)
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, use_dora=True)
        configs[component] = {key: sorted(value) if isinstance(value, set) else value
                              for key, value in config.to_dict().items()}  # fmt: skip
    more = {"unet_lora_adapter_metadata": configs["unet"], "text_encoder_lora_adapter_metadata":
            configs["text_encoder"]} if metadata else {}  # fmt: skip
    diffusers.StableDiffusionPipeline.save_lora_weights(
        tmp_path, states["unet"], states["text_encoder"], **more
    )
    with safe_open(tmp_path / "pytorch_lora_weights.safetensors", "pt") as opened:
        assert ("lora_adapter_metadata" in (opened.metadata() or {})) is metadata
    read = read_adapter(tmp_path, {"unet": unet(), "text_encoder": clip()})
    assert read.format == "diffusers"
    assert {layer.scaling for layer in read.layers.values()} == {2.0 if metadata else 1.0}
    wanted = {f"{component}.{name}": layer for component, state in states.items()
              for name, layer in expected_of(state).layers.items()}  # fmt: skip
    assert read.layers.keys() == wanted.keys()
    for name, layer in read.layers.items():
        assert torch.equal(layer.magnitude, wanted[name].magnitude)
    save_adapter(read, tmp_path / "new", format="diffusers")
    model = unet()
    tensors = load_file(tmp_path / "new" / "pytorch_lora_weights.safetensors")
    model.load_lora_adapter(tensors, prefix="unet")
    layers = dict(model.named_modules())
    for name, layer in read.layers.items():
        component, _, own = name.partition(".")
        if component == "unet":
            theirs = layers[own]
            assert theirs.use_dora["default_0"] and theirs.scaling["default_0"] == 1.0
            product = layer.scaling * (layer.lora_B.flatten(1) @ layer.lora_A.flatten(1))
            weights = [theirs.lora_B["default_0"].weight, theirs.lora_A["default_0"].weight]
            torch.testing.assert_close(weights[0].flatten(1) @ weights[1].flatten(1), product)
            assert torch.equal(theirs.lora_magnitude_vector["default_0"].weight.flatten(), layer.magnitude)


def test_a_contradiction_in_the_header(tmp_path):
    state = peft_state(clip(), ["q_proj"])
    tensors = {f"text_encoder.{key}": tensor for key, tensor in state.items()}
    file, header = tmp_path / "file.safetensors", {"text_encoder.r": 2, "text_encoder.lora_alpha": 2}
    save_file(tensors, file, {"lora_adapter_metadata": json.dumps(header)})
    with pytest.raises(ValueError, match=r"lora_A \[4, 16\]: the configuration says rank 2"):
        read_adapter(file, clip())
    save_file(tensors, file, {"lora_adapter_metadata": json.dumps({"text_encoder.layer_replication": [[0, 1]]})})
    with pytest.raises(ValueError, match="file.safetensors: lora_adapter_metadata: text_encoder: layer_replication"):
        read_adapter(file)
    for text in ("[", "[1]"):
        save_file(tensors, file, {"lora_adapter_metadata": text})
        with pytest.raises(ValueError, match="file.safetensors: lora_adapter_metadata: not a JSON object"):
            read_adapter(file)
    header = {"text_encoder.r": 4, "text_encoder.lora_alpha": 8}
    more = {f"{key.removesuffix('.lora_A.weight')}.alpha": torch.tensor(2.0) for key in tensors if "lora_A" in key}
    save_file({**tensors, **more}, file, {"lora_adapter_metadata": json.dumps(header)})
    with pytest.raises(ValueError, match=r"alpha: a scaling of 0\.5, and lora_adapter_metadata says 2"):
        read_adapter(file)


def hostile(**fields):
    return json.dumps({f"text_encoder.{name}": value for name, value in {"r": 4, "lora_alpha": 8, **fields}.items()})


HUGE = 1_000_000 * "\x1b[2J"
HEADERS = {
    "nested": ('{"text_encoder.r":' + "[" * 900 + "]" * 900 + "}", "not a JSON object: "),
    "no number": (hostile(r=HUGE), "text_encoder: r: expected a number, got "),
    "refused": (hostile(lora_bias=HUGE), "text_encoder: lora_bias="),
    "a model": (json.dumps({f"{HUGE}.peft_type": "ADALORA"}), r"\\x1b.+: peft_type: expected "),
    "no expression": (hostile(rank_pattern={HUGE + "(": 4}), "text_encoder: rank_pattern: "),
    "no mapping": (hostile(alpha_pattern=[1]), "text_encoder: alpha_pattern: expected a mapping"),
    "steps": (hostile(rank_pattern={f".*{'(a{1,90}' * 5}{'){1,90}' * 5}!{i}": 7 for i in range(200)}),
              "text_encoder: rank_pattern: to match the regular expressions takes more"),
}  # fmt: skip


@pytest.mark.timeout(60)
@pytest.mark.parametrize("what", HEADERS)
def test_headers_that_are_hostile(tmp_path, what):
    """One error in bounded time, of printable characters, that names the file and the entry."""
    state = {f"text_encoder.{key}": tensor for key, tensor in peft_state(clip(), ["q_proj"]).items()}
    long = {key.replace("text_encoder.", f"text_encoder.{900 * 'a'}"): tensor for key, tensor in state.items()}
    file, (text, message) = tmp_path / "file.safetensors", HEADERS[what]
    save_file(long if what == "steps" else state, file, {"lora_adapter_metadata": text})
    with pytest.raises(ValueError, match=f"file.safetensors: lora_adapter_metadata: {message}") as error:
        read_adapter(file)
    assert str(error.value).isprintable() and len(str(error.value)) < 1000


def test_the_models_of_a_header_share_their_steps(tmp_path, monkeypatch):
    """Patterns are each model's own; what they may cost is the file's."""
    monkeypatch.setattr(expressions, "STEPS", 1000)
    file = tmp_path / "file.safetensors"

    def write(models):
        names = [f"text_encoder_{i}" for i in range(models)]
        tensors = {f"{name}.{20 * 'a'}.lora_{part}.weight": torch.ones(2, 2) for name in names for part in "AB"}
        fields = {"r": 2, "lora_alpha": 2, "alpha_pattern": {"(a|b)+!": 1}}
        header = {f"{name}.{field}": value for name in names for field, value in fields.items()}
        save_file(tensors, file, {"lora_adapter_metadata": json.dumps(header)})

    write(2)
    assert {layer.scaling for layer in read_adapter(file).layers.values()} == {1.0}
    write(10)
    with pytest.raises(ValueError, match=r"text_encoder_\d: alpha_pattern: to match the regular expressions takes"):
        read_adapter(file)


def test_models_by_name_that_are_none(tmp_path):
    save_adapter({"text_encoder": trained(clip(), ["q_proj"])}, tmp_path, format="diffusers")
    for models, error, text in (
        ({"a.b": clip()}, ValueError, "expected a pipeline's name of a model, such as 'text_encoder', got 'a.b'"),
        ({"text_encoder": nn.Linear(2, 2)}, ValueError, "text_encoder is itself a layer"),
        ({"text_encoder": clip(), "unet": 3}, TypeError, "expected torch.nn.Modules by name, got int for 'unet'"),
    ):
        with pytest.raises(error, match=f"model: {text}"):
            load_adapter(tmp_path, models)
