"""Files of pipelines: diffusers' own, its conversion to kohya, kohya's and OneTrainer's of several models in one file."""

from __future__ import annotations

import json

import pytest
import torch
from adapter_models import EPS32, adapter_for, assert_same_function
from torch import nn

from dora_kernels import Adapter, apply_dora, attach, extract, load_adapter, read_adapter, save_adapter

pytest.importorskip("safetensors")
pytest.importorskip("transformers")
from safetensors import safe_open
from safetensors.torch import load_file, save_file

pytestmark = [
    pytest.mark.filterwarnings("ignore:target_modules"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing"),
]

ATTENTION = ["q_proj", "v_proj", "out_proj", "fc1"]


def unet(sdxl=False):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    more = {"transformer_layers_per_block": (1, 2)} if sdxl else {}
    return diffusers.UNet2DConditionModel(
        sample_size=8, layers_per_block=2, block_out_channels=(8, 16), norm_num_groups=4, cross_attention_dim=12,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4, **more,
    )  # fmt: skip


def clip(projection=False, seed=1, hidden=16):
    import transformers

    torch.manual_seed(seed)
    config = transformers.CLIPTextConfig(
        vocab_size=30, hidden_size=hidden, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=8, projection_dim=12, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return (transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel)(config).eval()


def t5():
    import transformers

    torch.manual_seed(3)
    config = transformers.T5Config(vocab_size=30, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    return transformers.T5EncoderModel(config).eval()


class Transformer(nn.Module):
    """With names as those of diffusers' transformers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        attention = nn.ModuleDict({"to_q": nn.Linear(12, 12), "to_out": nn.ModuleList([nn.Linear(12, 12)])})
        self.transformer_blocks = nn.ModuleList([nn.ModuleDict({"attn": attention})])
        self.proj_out = nn.Linear(12, 6)


def trained(model, targets, **options):
    """Adapted, with values as of training; the adapter."""
    apply_dora(model, targets, rank=2, **options)
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.3)
            if "magnitude" in name:
                parameter.mul_(1 + 0.02 * torch.randn_like(parameter))
    return extract(model)


def modules_of(models):
    """As one, without adapters."""
    return nn.ModuleDict(models)


UNET = ["to_q", "to_out.0", "conv1", "ff.net.2"]
PIPELINES = {
    "SD 1.5": (lambda: {"unet": unet(), "text_encoder": clip()}, {"unet": "lora_unet", "text_encoder": "lora_te"}),
    "SDXL": (
        lambda: {"unet": unet(sdxl=True), "text_encoder": clip(), "text_encoder_2": clip(True, 2, 20)},
        {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"},
    ),
    "Flux": (
        lambda: {"transformer": Transformer(), "text_encoder": clip(), "text_encoder_2": t5()},
        {"transformer": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te3"},
    ),
    "SD 3": (
        lambda: {"transformer": Transformer(), "text_encoder": clip(True), "text_encoder_2": clip(True, 2, 20),
                 "text_encoder_3": t5()},
        {"transformer": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2",
         "text_encoder_3": "lora_te3"},
    ),
}  # fmt: skip
TARGETS = [*UNET, *ATTENTION, "SelfAttention.q", "DenseReluDense.wo"]


def adapted_pipeline(name):
    make, prefixes = PIPELINES[name]
    models = make()
    adapters = {component: trained(model, TARGETS) for component, model in models.items()}
    wanted = Adapter({f"{component}.{layer}": each for component, adapter in adapters.items()
                      for layer, each in adapter.layers.items()})  # fmt: skip
    return make, models, wanted, prefixes


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
    with pytest.raises(ValueError, match="adapters of text_encoder, unet, and the format 'peft' is of one model; read"):
        save_adapter(parts, tmp_path / "new")
    with pytest.raises(ValueError, match="prefix= is for one model"):
        save_adapter(parts, tmp_path / "new.safetensors", format="kohya", prefix="lora_te1")
    with pytest.raises(TypeError, match="source: unet: expected a torch.nn.Module or an Adapter, got str"):
        save_adapter({"unet": "x"}, tmp_path / "new.safetensors", format="kohya")
    alone = read_adapter(file, prefix="text_encoder")
    save_adapter(alone, tmp_path / "split")
    assert set(read_adapter(tmp_path / "split").layers) == {
        f"text_model.{name.partition('.')[2]}" for name in wanted.layers if name.startswith("text_encoder.")
    }  # fmt: skip


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


def peft_state(model, targets):
    """What PEFT gives of an adapted model, and the adapter."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=4, use_dora=True, target_modules=targets, init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "magnitude" in name:
            parameter.data.mul_(1 + 0.02 * torch.randn_like(parameter))
    return {key.removeprefix("base_model.model."): tensor.detach().clone() for key, tensor in
            peft.get_peft_model_state_dict(adapted).items()}  # fmt: skip


def expected_of(state):
    """Without anything of this package's readers."""
    from dora_kernels.adapters import AdapterLayer

    names = [key.removesuffix(".lora_A.weight") for key in state if key.endswith(".lora_A.weight")]
    layers = {}
    for name in names:
        a, b = state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"]
        m = state[f"{name}.lora_magnitude_vector"].flatten()
        layers[name] = AdapterLayer("linear" if a.dim() == 2 else "conv2d", a, b, m, 1.0)
    return Adapter(layers)


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
    with pytest.raises(ValueError, match=rf"file|nowhere.*(has no|is a part of an adapter|{part})"):
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
    with pytest.raises(ValueError, match=r"lora_A \[4, 16\] has not the rank 2 of its configuration"):
        read_adapter(file, clip())
    save_file(tensors, file, {"lora_adapter_metadata": json.dumps({"text_encoder.layer_replication": [[0, 1]]})})
    with pytest.raises(ValueError, match="file.safetensors: lora_adapter_metadata: text_encoder: layer_replication"):
        read_adapter(file)
    for text in ("[", "[1]"):
        save_file(tensors, file, {"lora_adapter_metadata": text})
        with pytest.raises(ValueError, match="file.safetensors: lora_adapter_metadata: no JSON object"):
            read_adapter(file)
    header = {"text_encoder.r": 4, "text_encoder.lora_alpha": 8}
    more = {f"{key.removesuffix('.lora_A.weight')}.alpha": torch.tensor(2.0) for key in tensors if "lora_A" in key}
    save_file({**tensors, **more}, file, {"lora_adapter_metadata": json.dumps(header)})
    with pytest.raises(ValueError, match=r"alpha: a scaling of 0\.5, and lora_adapter_metadata says 2"):
        read_adapter(file)


OLD = {
    "lora": {"lora_A.weight": "lora.down.weight", "lora_B.weight": "lora.up.weight"},
    "lora_linear_layer": {"lora_A.weight": "lora_linear_layer.down.weight", "lora_B.weight": "lora_linear_layer.up.weight"},
    "lora_down": {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"},
}  # fmt: skip


@pytest.mark.parametrize("start", ["unet.", "", "diffusion_model."])
@pytest.mark.parametrize("parts", OLD)
@pytest.mark.parametrize("processor", [False, True])
def test_older_names_of_diffusers(tmp_path, start, parts, processor):
    state, tensors = peft_state(unet(), ["to_k", "to_out.0"]), {}
    for key, tensor in state.items():
        for new, old in OLD[parts].items():
            key = key.replace(new, old)
        key = key.replace(".to_", ".processor.to_") if processor else key
        tensors[start + key] = tensor
    save_file(tensors, tmp_path / "file.safetensors")
    assert_same_function(unet(), read_adapter(tmp_path / "file.safetensors", unet()), expected_of(state), 0.0)


@pytest.mark.parametrize("start", ["unet.", ""])
def test_attention_processors(tmp_path, start):
    """``attn1.processor.to_out_lora.down.weight``, of a U-Net and of a text encoder."""
    state = {key: t for key, t in peft_state(unet(), ["to_k", "to_out.0"]).items() if "magnitude" not in key}
    tensors = {}
    for key, tensor in state.items():
        key = key.replace(".to_out.0.", ".to_out.").replace(".to_", ".processor.to_")
        tensors[start + key.replace(".lora_A.", "_lora.down.").replace(".lora_B.", "_lora.up.")] = tensor
    save_file(tensors, tmp_path / "file.safetensors")
    read = read_adapter(tmp_path / "file.safetensors", unet())
    assert {f"{name}.lora_A.weight" for name in read.layers} == {key for key in state if "lora_A" in key}
    state = {key: t for key, t in peft_state(clip(), ["q_proj", "out_proj"]).items() if "magnitude" not in key}
    tensors = {}
    for key, tensor in state.items():
        key = key.replace("q_proj", "to_q").replace("out_proj", "to_out")
        key = f"text_encoder.text_model.{key}"
        tensors[key.replace(".lora_A.", "_lora.down.").replace(".lora_B.", "_lora.up.")] = tensor
    save_file(tensors, tmp_path / "file.safetensors")
    read = read_adapter(tmp_path / "file.safetensors", clip())
    assert {f"{name}.lora_A.weight" for name in read.layers} == {key for key in state if "lora_A" in key}


@pytest.mark.parametrize("alpha", [False, True])
@pytest.mark.parametrize("start", ["diffusion_model.", "transformer.", "unet.", "text_encoders.clip_l.transformer."])
def test_comfyuis_and_musubi_tuners(tmp_path, start, alpha):
    """PEFT's parts with alpha and dora_scale beside them: LyCORIS's meaning, either axis."""
    model = Transformer()
    names = ["transformer_blocks.0.attn.to_q", "proj_out"]
    for axis in ("out", "in"):
        adapter = adapter_for(model, names, axis=axis, rank=2, scaling=0.5 if alpha else 1.0)
        tensors = {}
        for name, layer in adapter.layers.items():
            tensors |= {f"{start}{name}.lora_A.weight": layer.lora_A, f"{start}{name}.lora_B.weight": layer.lora_B}
            shape = (-1, 1) if axis == "out" else (1, -1)
            tensors[f"{start}{name}.dora_scale"] = layer.magnitude.reshape(shape)
            if alpha:
                tensors[f"{start}{name}.alpha"] = torch.tensor(1.0)
        save_file(tensors, tmp_path / "file.safetensors")
        read = read_adapter(tmp_path / "file.safetensors", model)
        assert read.format == "diffusers" and {layer.magnitude_axis for layer in read.layers.values()} == {axis}
        assert_same_function(model, read, adapter, 8 * EPS32)


@pytest.mark.parametrize("te", ["lora_te2", "lora_te3"])
def test_onetrainers(tmp_path, te):
    """``lora_transformer`` beside ``lora_te1`` and the T5 as the second, for each model and for all, without an option."""
    make, _, wanted, _ = adapted_pipeline("Flux")
    starts = {"transformer": "lora_transformer", "text_encoder": "lora_te1", "text_encoder_2": te}
    tensors = {}
    for name, layer in wanted.layers.items():
        component, _, own = name.partition(".")
        own = f"text_model.{own}" if component == "text_encoder" else own
        key = f"{starts[component]}_{own.replace('.', '_')}"
        tensors |= {f"{key}.lora_down.weight": layer.lora_A, f"{key}.lora_up.weight": layer.lora_B,
                    f"{key}.alpha": torch.tensor(layer.scaling * layer.rank),
                    f"{key}.dora_scale": layer.magnitude.reshape(-1, 1)}  # fmt: skip
    save_file(tensors, tmp_path / "file.safetensors")
    assert_same_function(modules_of(make()), read_adapter(tmp_path / "file.safetensors", make()), wanted, 8 * EPS32)
    for component, model in make().items():
        read = read_adapter(tmp_path / "file.safetensors", model)
        expected = Adapter({name.partition(".")[2]: layer for name, layer in wanted.layers.items()
                            if name.startswith(f"{component}.")})  # fmt: skip
        assert_same_function(model, read, expected, 8 * EPS32)
        assert len([note for note in read.notes if "are of another model" in note]) == 2


SGM = {
    "input_blocks_1_0_in_layers_2": "down_blocks.0.resnets.0.conv1",
    "input_blocks_2_0_out_layers_3": "down_blocks.0.resnets.1.conv2",
    "input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
    "input_blocks_4_1_transformer_blocks_0_attn1_to_q": "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
    "input_blocks_4_0_skip_connection": "down_blocks.1.resnets.0.conv_shortcut",
    "middle_block_1_proj_in": "mid_block.attentions.0.proj_in",
    "middle_block_2_in_layers_2": "mid_block.resnets.1.conv1",
    "output_blocks_2_1_transformer_blocks_1_ff_net_2": "up_blocks.0.attentions.2.transformer_blocks.1.ff.net.2",
    "output_blocks_2_2_conv": "up_blocks.0.upsamplers.0.conv",
    "output_blocks_5_0_emb_layers_1": "up_blocks.1.resnets.2.time_emb_proj",
    "time_embed_0": "time_embedding.linear_1",
    "time_embed_2": "time_embedding.linear_2",
    "input_blocks_0_0": "conv_in",
    "out_2": "conv_out",
}  # fmt: skip


def test_stabilitys_names_of_sdxl(tmp_path):
    """As sd-scripts writes them."""
    model = unet(sdxl=True)
    adapter = adapter_for(model, SGM.values())
    save_adapter(adapter, tmp_path / "file.safetensors", format="kohya")
    there = {own.replace(".", "_"): name for name, own in SGM.items()}
    tensors = {}
    for key, tensor in load_file(tmp_path / "file.safetensors").items():
        name, _, part = key.removeprefix("lora_unet_").partition(".")
        tensors[f"lora_unet_{there[name]}.{part}"] = tensor
    save_file(tensors, tmp_path / "file.safetensors")
    assert_same_function(model, read_adapter(tmp_path / "file.safetensors", model), adapter, 8 * EPS32)


def test_models_by_name_that_are_none(tmp_path):
    save_adapter({"text_encoder": trained(clip(), ["q_proj"])}, tmp_path, format="diffusers")
    for models, error, text in (
        ({"a.b": clip()}, ValueError, "expected a pipeline's name of a model, such as 'text_encoder', got 'a.b'"),
        ({"text_encoder": nn.Linear(2, 2)}, ValueError, "text_encoder is a layer itself"),
        ({"text_encoder": clip(), "unet": 3}, TypeError, "expected torch.nn.Modules by name, got int for 'unet'"),
    ):
        with pytest.raises(error, match=f"model: {text}"):
            load_adapter(tmp_path, models)
