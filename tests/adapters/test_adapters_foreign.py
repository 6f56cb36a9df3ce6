"""Names that other programs give the layers and parts of adapters: older diffusers, ComfyUI, OneTrainer, sd-scripts."""

from __future__ import annotations

import pytest
import torch
from adapter_models import EPS32, adapter_for, assert_same_function

pytest.importorskip("safetensors")
pytest.importorskip("transformers")

from pipeline_models import (
    Transformer,
    adapted_pipeline,
    clip,
    expected_of,
    modules_of,
    peft_state,
    unet,
)
from safetensors.torch import load_file, save_file

from dora_kernels import Adapter, read_adapter, save_adapter

pytestmark = [
    pytest.mark.filterwarnings("ignore:target_modules"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing"),
]


OLD = {
    "lora": {"lora_A.weight": "lora.down.weight", "lora_B.weight": "lora.up.weight"},
    "lora_linear_layer": {"lora_A.": "lora_linear_layer.down.", "lora_B.": "lora_linear_layer.up."},
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
    """``lora_transformer`` beside ``lora_te1``, T5 as the second, for each model and for all, without an option."""
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
        assert len([note for note in read.notes if "belong to another model" in note]) == 2


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
