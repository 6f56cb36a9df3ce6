"""The libraries that the formats are of: they load what is written here and compute it, and what they write is read."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import pytest
import torch
from adapter_models import EPS32, Model, adapted64, adapter_for, assert_same_function
from torch import nn

from dora_kernels import load_adapter, read_adapter, save_adapter

pytest.importorskip("safetensors")
from safetensors.torch import load_file, save_file

LINEAR = ["layers.0.q_proj", "layers.0.up_proj", "layers.1.down", "lm_head"]
CONV = ["layers.0.conv_in", "layers.1.conv"]


def assert_output(got, module, layer, x):
    """`got` is what `module` gives for `x` with the adapted weight, to float32 accuracy."""
    weight = adapted64(module, layer)
    if isinstance(module, nn.Embedding):
        wanted = weight.t()[x]
    else:
        bias = None if module.bias is None else module.bias.double()
        if isinstance(module, nn.Linear):
            wanted = nn.functional.linear(x.double(), weight, bias)
        else:
            wanted = module._conv_forward(x.double(), weight, bias)
    # float32's error of a product, generously: sqrt of the length of its sums
    limit = 16 * EPS32 * float(wanted.abs().max())
    assert float((got.double() - wanted).abs().max()) <= limit


def inputs(module):
    torch.manual_seed(3)
    if isinstance(module, nn.Embedding):
        return torch.randint(module.num_embeddings, (2, 5))
    if isinstance(module, nn.Linear):
        return torch.randn(7, module.in_features)
    return torch.randn(2, module.in_channels, *[9] * (module.weight.dim() - 2))


@pytest.mark.parametrize("plain", [False, True])
def test_peft_loads_what_is_written(tmp_path, plain):
    """All kinds, ranks and alphas by layer, and no layer that the adapter has not, though names end alike."""
    peft = pytest.importorskip("peft")
    model = Model()
    names = [*LINEAR, *CONV, "embed_tokens"]
    adapter = adapter_for(model, names, plain=plain)
    save_adapter(adapter, tmp_path, format="peft")
    original = Model()
    loaded = peft.PeftModel.from_pretrained(model, tmp_path).eval()
    adapted = {name.removeprefix("base_model.model."): module for name, module in loaded.named_modules()
               if isinstance(module, peft.tuners.lora.LoraLayer)}  # fmt: skip
    assert set(adapted) == set(names)
    for name, layer in adapted.items():
        assert layer.use_dora["default"] is not plain
        assert layer.scaling["default"] == pytest.approx(adapter.layers[name].scaling, rel=1e-15)
        x = inputs(original.get_submodule(name))
        with torch.no_grad():
            assert_output(layer(x), original.get_submodule(name), adapter.layers[name], x)


def test_what_peft_writes_is_read(tmp_path):
    """rsLoRA, ranks and alphas by pattern; attached, the model computes the same."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4, lora_alpha=6, use_dora=True, use_rslora=True, target_modules=["q_proj", "up_proj", "lm_head"],
        rank_pattern={"layers.1.q_proj": 2}, alpha_pattern={"up_proj": 3}, init_lora_weights=False,
    )  # fmt: skip
    theirs = peft.get_peft_model(Model(), config).eval()
    for name, parameter in theirs.named_parameters():
        if "magnitude" in name:
            parameter.data.mul_(1 + 0.02 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path)
    ours = Model()
    adapter = load_adapter(tmp_path, ours)
    assert adapter.format == "peft" and len(adapter.layers) == 5
    assert adapter.layers["layers.1.q_proj"].scaling == pytest.approx(6 / 2**0.5)
    assert adapter.layers["layers.0.up_proj"].scaling == pytest.approx(3 / 4**0.5)
    ids = torch.randint(30, (2, 6))
    with torch.no_grad():
        wanted, got = theirs(ids), ours(ids)
    assert float((got - wanted).abs().max()) <= 16 * EPS32 * float(wanted.abs().max())


def test_torchtune_loads_what_is_written(tmp_path):
    model = Model()
    names = ["layers.0.q_proj", "lm_head"]  # without bias, as torchtune's layers here
    adapter = adapter_for(model, names)
    save_adapter(adapter, tmp_path, format="torchtune")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    dora = pytest.importorskip("torchtune.modules.peft")
    for name in names:
        module = model.get_submodule(name)
        their = dora.DoRALinear(module.in_features, module.out_features, config["r"], config["lora_alpha"])
        own = {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}
        their.load_state_dict({"weight": module.weight, **own})
        x = inputs(module)
        with torch.no_grad():
            assert_output(their(x), module, adapter.layers[name], x)


def test_what_torchtune_writes_is_read(tmp_path):
    dora = pytest.importorskip("torchtune.modules.peft")
    torch.manual_seed(0)
    module = nn.Linear(12, 20, bias=False)
    their = dora.DoRALinear(12, 20, rank=4, alpha=6)
    their.load_state_dict({**their.state_dict(), "weight": module.weight})
    nn.init.normal_(their.lora_b.weight)
    their.initialize_dora_magnitude()
    their.magnitude.data.mul_(1 + 0.1 * torch.rand(20))
    theirs, ours = nn.Sequential(their), nn.Sequential(module)
    state = dora.get_adapter_state_dict(theirs.state_dict())
    save_file(state, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 6, "peft_type": "LORA"}))
    x = torch.randn(7, 12)
    adapter = load_adapter(tmp_path, ours)
    assert adapter.format == "torchtune"
    with torch.no_grad():
        wanted, got = theirs(x), ours(x)
    assert float((got - wanted).abs().max()) <= 16 * EPS32 * float(wanted.abs().max())


@pytest.fixture
def locon():
    logging.getLogger("LyCORIS").setLevel("ERROR")
    return pytest.importorskip("lycoris.modules.locon").LoConModule


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("name", [LINEAR[0], LINEAR[1], *CONV])
def test_lycoris_loads_what_is_written(tmp_path, locon, axis, name):
    model = Model()
    adapter = adapter_for(model, [name], axis=axis)
    save_adapter(adapter, tmp_path / "file.safetensors", format="lycoris")
    tensors = load_file(tmp_path / "file.safetensors")
    (prefix,) = {key.partition(".")[0] for key in tensors}
    assert prefix == "lycoris_" + name.replace(".", "_")
    module = model.get_submodule(name)
    own = {key.removeprefix(f"{prefix}."): tensor for key, tensor in tensors.items()}
    rank = own["lora_down.weight"].shape[0]
    their = locon(prefix, module, 1.0, rank, float(own["alpha"]), weight_decompose=True, wd_on_out=axis == "out")
    assert their.dora_scale.shape == own["dora_scale"].shape
    their.load_state_dict(own, strict=False)
    x = inputs(module)
    with torch.no_grad():
        assert_output(their(x), module, adapter.layers[name], x)


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("prefix, format", [("lycoris", "lycoris"), ("lora_unet", "kohya")])
def test_what_lycoris_writes_is_read(tmp_path, locon, axis, prefix, format):
    """With rs_lora and a Tucker core; names with underscores become the model's."""
    model, names = Model(), [*LINEAR, *CONV]
    wanted, state = {}, {}
    for name in names:
        module = model.get_submodule(name)
        their = locon(
            name, module, 1.0, 4, 3.0, use_tucker=True, rs_lora=True, weight_decompose=True, wd_on_out=axis == "out"
        )  # fmt: skip
        nn.init.normal_(their.lora_up.weight, std=0.3)
        their.dora_scale.data.mul_(1 + 0.1 * torch.rand_like(their.dora_scale))
        own = their.custom_state_dict()
        state |= {f"{prefix}_{name.replace('.', '_')}.{key}": tensor.detach().clone() for key, tensor in own.items()}
        wanted[name] = their.get_merged_weight()[0].detach()
    assert any(key.endswith("lora_mid.weight") for key in state)
    save_file(state, tmp_path / "file.safetensors")
    adapter = read_adapter(tmp_path / "file.safetensors", model)
    assert adapter.format == format and set(adapter.layers) == set(names)
    for name, layer in adapter.layers.items():
        assert layer.magnitude_axis == axis
        got = adapted64(model.get_submodule(name), layer)
        assert float((got - wanted[name]).norm()) <= 8 * EPS32 * float(wanted[name].norm())


def test_a_whole_lycoris_network(tmp_path):
    """`create_lycoris` on the model, its own file, attached here."""
    lycoris = pytest.importorskip("lycoris")
    logging.getLogger("LyCORIS").setLevel("ERROR")
    theirs, ours = Model().eval(), Model().eval()
    lycoris.LycorisNetwork.apply_preset({"target_module": ["Linear"]})
    network = lycoris.create_lycoris(theirs, 1.0, linear_dim=4, linear_alpha=2.0, algo="lora", dora_wd=True)
    network.apply_to()
    for name, parameter in network.named_parameters():
        if "lora_up" in name:
            nn.init.normal_(parameter, std=0.3)
        if "dora_scale" in name:
            parameter.data.mul_(1 + 0.1 * torch.rand_like(parameter))
    network.save_weights(str(tmp_path / "file.safetensors"), None, {})
    adapter = load_adapter(tmp_path / "file.safetensors", ours)
    assert {"layers.0.q_proj", "layers.1.up_proj"} <= set(adapter.layers)
    ids = torch.randint(30, (2, 6))
    with torch.no_grad():
        wanted, got = theirs(ids), ours(ids)
    assert float((got - wanted).abs().max()) <= 32 * EPS32 * float(wanted.abs().max())


def test_converted_through_all_libraries(tmp_path):
    """PEFT's own file, by way of every other format and back, in PEFT again."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=["up_proj"], init_lora_weights=False)
    peft.get_peft_model(Model(), config).save_pretrained(tmp_path / "peft")
    model = Model()
    first = adapter = read_adapter(tmp_path / "peft", model)
    for format in ("kohya", "torchtune", "nvidia", "lycoris", "qdora", "mlx", "peft"):
        save_adapter(adapter, tmp_path / f"to-{format}", format=format)
        adapter = read_adapter(tmp_path / f"to-{format}", model)
    assert_same_function(model, adapter, first, 16 * EPS32)
    again = peft.PeftModel.from_pretrained(Model(), tmp_path / "to-peft").eval()
    name = "layers.1.up_proj"
    x = inputs(model.get_submodule(name))
    with torch.no_grad():
        assert_output(again.base_model.model.get_submodule(name)(x), model.get_submodule(name), first.layers[name], x)


def test_saved_again_and_combined_in_peft(tmp_path):
    """PEFT combines adapters only if the configurations of all name their layers in the same way."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["up_proj"], init_lora_weights=False)
    peft.get_peft_model(Model(), config).save_pretrained(tmp_path / "peft")
    adapter = read_adapter(tmp_path / "peft", Model())
    save_adapter(adapter, tmp_path / "again")
    both = peft.PeftModel.from_pretrained(Model(), tmp_path / "peft", "a")
    both.load_adapter(tmp_path / "again", "b")
    both.add_weighted_adapter(["a", "b"], [0.5, 0.5], "ab", combination_type="cat")
    del adapter.layers["layers.1.up_proj"]
    adapter.layers["lm_head"] = replace(adapter_for(Model(), ["lm_head"]).layers["lm_head"], magnitude=None)
    save_adapter(adapter, tmp_path / "other")
    assert isinstance(json.loads((tmp_path / "other" / "adapter_config.json").read_text())["target_modules"], str)
