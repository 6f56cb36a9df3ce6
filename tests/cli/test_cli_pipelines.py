"""The command line on the files of diffusers' models and pipelines, and of vision-language models."""

from __future__ import annotations

import json
import re

import pytest
import torch
from adapter_models import EPS32, adapted64, adapter_for, assert_same_function

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("safetensors")
pytest.importorskip("transformers")

import transformers
from cli_models import rewrite
from pipeline_models import UNET, adapted_pipeline, clip, modules_of, trained, unet
from safetensors.torch import load_file

from dora_kernels import Adapter, read_adapter, save_adapter

pytestmark = [
    pytest.mark.filterwarnings("ignore:target_modules"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing"),
]


def assert_merged(folder, model, adapter, keys):
    """The files' weights are the adapted ones; `keys` says where a layer's is."""
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    for name, layer in adapter.layers.items():
        wanted = adapted64(model.get_submodule(name), layer)
        got = tensors[keys(name)].double()
        assert float((got - wanted).norm()) <= 8 * EPS32 * float(wanted.norm()), name


@pytest.mark.parametrize("format", ["kohya", "diffusers", "peft"])
@pytest.mark.parametrize("sharded", [False, True])
def test_a_model_of_diffusers(call, tmp_path, format, sharded):
    """Its `diffusion_pytorch_model` is inspected, and merged into, also in shards."""
    model = unet()
    model.save_pretrained(tmp_path / "base", **({"max_shard_size": "20KB"} if sharded else {}))
    adapter = trained(model, UNET[:2])
    save_adapter(adapter, tmp_path / "adapter", format=format)
    status, out, stderr = call("inspect", tmp_path / "adapter", "--base", tmp_path / "base", "--json")
    assert status == 0 and json.loads(out)["g"] is not None, stderr
    status, _, stderr = call("merge", tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert status == 0, stderr
    merged = type(model).from_pretrained(tmp_path / "out")
    for name, layer in adapter.layers.items():
        wanted = adapted64(unet().get_submodule(name), layer)
        got = merged.get_submodule(name).weight.detach().double()
        assert float((got - wanted).norm()) <= 8 * EPS32 * float(wanted.norm()), name


@pytest.mark.parametrize("start", ["", "text_model."])
def test_a_pipeline_is_joined_read_and_split(call, tmp_path, start):
    """Two PEFT folders, one file of kohya's, and each of the two merged into its model again."""
    make, models, wanted, prefixes = adapted_pipeline("SD 1.5")
    for component, model in models.items():
        save_adapter(model, tmp_path / component)
        make()[component].save_pretrained(tmp_path / "base" / component)

    def renamed(tensors):
        new = {f"{start}{key.removeprefix('text_model.')}": tensor for key, tensor in tensors.items()}
        tensors.clear()
        tensors.update(new)

    rewrite(tmp_path / "base" / "text_encoder" / "model.safetensors", renamed)
    arguments = ("convert", tmp_path / "unet", tmp_path / "all.safetensors", "--component", "unet")
    status, out, stderr = call(*arguments, "--to", "kohya", "--join", f"text_encoder={tmp_path / 'text_encoder'}")
    assert status == 0 and f"{tmp_path / 'text_encoder'}: peft, " in out, stderr
    assert_same_function(modules_of(make()), read_adapter(tmp_path / "all.safetensors", make()), wanted, 8 * EPS32)
    for component, prefix in prefixes.items():
        base, target = tmp_path / "base" / component, tmp_path / f"merged-{component}"
        for more in ((), ("--prefix", prefix)):
            status, _, stderr = call("merge", base, tmp_path / "all.safetensors", target, "--force", *more)
            assert status == 0, stderr
        own = Adapter({name.partition(".")[2]: layer for name, layer in wanted.layers.items()
                       if name.startswith(f"{component}.")})  # fmt: skip
        before = start if component == "text_encoder" else ""
        assert_merged(target, make()[component], own, lambda name, before=before: f"{before}{name}.weight")
        arguments = ("convert", tmp_path / "all.safetensors", tmp_path / f"split-{component}", "--prefix", prefix)
        status, _, stderr = call(*arguments, "--to", "peft", "--base", base)
        assert status == 0, stderr
        split = read_adapter(tmp_path / f"split-{component}")
        split.layers = {name.removeprefix("text_model."): layer for name, layer in split.layers.items()}
        assert_same_function(make()[component], split, own, 8 * EPS32)
    status, out, stderr = call("inspect", tmp_path / "all.safetensors", "--prefix", "lora_te", "--json")
    found = json.loads(out)
    assert status == 0 and all(name.startswith("lora_te_text_model_encoder") for name in found["layers"]), stderr


def test_joining_what_cannot_be(call, tmp_path):
    save_adapter(trained(clip(), ["q_proj"]), tmp_path / "te")
    base = ("convert", tmp_path / "te", tmp_path / "out", "--to", "kohya")
    for more, said in (
        (("--component", "unet"), "--component (the name of IN's model) and --join"),
        (("--join", f"unet={tmp_path / 'te'}"), "--component (the name of IN's model) and --join"),
        (("--component", "unet", "--join", f"unet={tmp_path / 'te'}"), "expected NAME=ADAPTER with a different name"),
        (("--component", "unet", "--join", "text_encoder"), "expected NAME=ADAPTER with a different name each"),
        (("--component", "vae", "--join", f"unet={tmp_path / 'te'}"), "there is no prefix for a pipeline's vae"),
    ):
        status, _, stderr = call(*base, *more)
        assert status == 2 and said in stderr, stderr
    status, _, stderr = call("convert", tmp_path / "te", tmp_path / "out", "--to", "kohya", "--to-prefix", "lora_te2")
    assert status == 0, stderr
    (file,) = (tmp_path / "out").glob("*.safetensors")
    assert all(key.startswith("lora_te2_text_model_encoder_layers_") for key in load_file(file))


def test_errors_advise_an_option_that_there_is(call, tmp_path):
    """SDXL's text encoders have the same names: --prefix is advised, and works."""
    for i, prefix in enumerate(("lora_te1", "lora_te2")):
        save_adapter(trained(clip(seed=i), ["q_proj"]), tmp_path / f"{i}.safetensors", format="kohya", prefix=prefix)
    rewrite(tmp_path / "0.safetensors", lambda tensors: tensors.update(load_file(tmp_path / "1.safetensors")))
    clip().save_pretrained(tmp_path / "base")
    arguments = (tmp_path / "base", tmp_path / "0.safetensors", tmp_path / "out")
    status, _, stderr = call("merge", *arguments)
    assert status == 2 and "pass --prefix to read only one model's layers" in " ".join(stderr.split()), stderr
    for command in ("convert", "inspect", "merge"):
        assert "--prefix" in call(command, "--help")[1]
    status, _, stderr = call("merge", *arguments, "--prefix", "lora_te2")
    assert status == 0, stderr


def llava():
    torch.manual_seed(0)
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
              "image_size": 8, "patch_size": 4, "projection_dim": 8}  # fmt: skip
    text = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 1, "vocab_size": 40, "tie_word_embeddings": False}  # fmt: skip
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision), text_config=transformers.LlamaConfig(**text),
        image_token_id=39, tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.LlavaForConditionalGeneration(config).eval()


def qwen2_vl():
    torch.manual_seed(0)
    text = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 1, "vocab_size": 40, "tie_word_embeddings": False,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}  # fmt: skip
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
    config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)
    return transformers.Qwen2VLForConditionalGeneration(config).eval()


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("make", [llava, qwen2_vl])
def test_vision_language_models(call, tmp_path, make, old):
    """Their files keep the names of before; adapters with today's names, or with those of before, fit."""
    model = make()
    model.save_pretrained(tmp_path / "base")
    keys = load_file(tmp_path / "base" / "model.safetensors")
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    names = [name for name in linear if re.search(r"q_proj|down_proj|attn\.qkv|lm_head", name)]
    assert not {f"{name}.weight" for name in names if "language_model" in name} & keys.keys()
    assert any("vis" in name for name in names) and "lm_head" in names
    adapter = adapter_for(model, names, rank=2, scaling=0.5)

    def before(name):
        for start, was in ((r"^model\.language_model\.", "model." if make is qwen2_vl else "language_model.model."),
                           (r"^model\.vis", "vis"), (r"^model\.multi", "multi"),
                           *(() if make is qwen2_vl else ((r"^lm_head", "language_model.lm_head"),))):  # fmt: skip
            name = re.sub(start, was, name)
        return name

    def stored(name):
        key = f"{before(name)}.weight"
        return key if key in keys else key.replace("vision_tower.", "vision_tower.vision_model.")

    given = Adapter({before(name): layer for name, layer in adapter.layers.items()}) if old else adapter
    save_adapter(given, tmp_path / "adapter")
    status, out, stderr = call("inspect", tmp_path / "adapter", "--base", tmp_path / "base", "--json")
    assert status == 0 and len(json.loads(out)["layers"]) == len(names), stderr
    status, _, stderr = call("merge", tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert status == 0, stderr
    assert_merged(tmp_path / "out", model, adapter, stored)
    again = type(model).from_pretrained(tmp_path / "out")
    for name, layer in adapter.layers.items():
        wanted = adapted64(model.get_submodule(name), layer)
        error = again.get_submodule(name).weight.detach().double() - wanted
        assert float(error.norm()) <= 8 * EPS32 * float(wanted.norm())
