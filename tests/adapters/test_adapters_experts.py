"""Adapters of experts in files: PEFT's, and those of single experts and of stacks that servers read."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from experts_models import Mixture, experts, logits, qwen3_moe
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import dora_kernels
from dora_kernels import AdapterLayer
from dora_kernels.adapters.experts import split

QWEN = "transformers.models.qwen3_moe.modeling_qwen3_moe", "Qwen3MoeExperts"
LLAMA4 = "transformers.models.llama4.modeling_llama4", "Llama4TextExperts"
STACKS = ["experts.gate_up_proj", "experts.down_proj"]


def adapted(use_dora=True):
    model = qwen3_moe()
    dora_kernels.apply_dora(
        model, ["q_proj"], rank=2, alpha=3, use_dora=use_dora, target_parameters=STACKS, rank_pattern={"down_proj": 3}
    )
    torch.manual_seed(3)
    for layer in dora_kernels.adapted_layers(model).values():
        for parameter in layer.adapter_parameters().values():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("use_dora", [True, False], ids=["dora", "lora"])
def test_pefts_files(use_dora, tmp_path):
    """There and back; with the model, and without; and PEFT loads it to the same function."""
    model = adapted(use_dora)
    dora_kernels.save_adapter(model, tmp_path / "out")
    again = qwen3_moe()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # of layers that the file has not
        dora_kernels.load_adapter(tmp_path / "out", again)
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-6)
    read = dora_kernels.read_adapter(tmp_path / "out")
    layer = read.layers["model.layers.1.mlp.experts.down_proj"]
    assert (layer.kind, layer.rank, tuple(layer.lora_B.shape)) == ("experts", 3, (6, 32, 3))
    dora_kernels.save_adapter(read, tmp_path / "twice")
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("out", "twice"))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    handle = dora_kernels.patch_peft_globally()
    try:
        loaded = PeftModel.from_pretrained(qwen3_moe(), tmp_path / "out")
        torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-6)
    finally:
        handle.restore()


def test_what_peft_saves_is_read(tmp_path):
    handle = dora_kernels.patch_peft_globally()
    try:
        model = get_peft_model(
            qwen3_moe(),
            LoraConfig(use_dora=True, r=4, lora_alpha=8, target_modules=["q_proj"], target_parameters=STACKS),
        )
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.data += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(tmp_path)
        ours = qwen3_moe()
        dora_kernels.load_adapter(tmp_path, ours)
        torch.testing.assert_close(logits(ours), logits(model), rtol=1e-5, atol=1e-6)
    finally:
        handle.restore()


def test_llama4s_exchanged_factors(tmp_path):
    """PEFT holds its transposed stacks the other way round."""
    mixture = Mixture(experts(*LLAMA4), torch.float32)
    names = dora_kernels.apply_dora(mixture, [], rank=2, target_parameters=STACKS)
    for layer in dora_kernels.adapted_layers(mixture).values():
        layer.lora_B.weight.data.normal_()
    dora_kernels.save_adapter(mixture, tmp_path)
    handle = dora_kernels.patch_peft_globally()
    try:
        loaded = PeftModel.from_pretrained(Mixture(experts(*LLAMA4), torch.float32), tmp_path)
        torch.testing.assert_close(loaded(), mixture(), rtol=1e-5, atol=1e-5)
    finally:
        handle.restore()
    again = Mixture(experts(*LLAMA4), torch.float32)
    dora_kernels.load_adapter(tmp_path, again)
    torch.testing.assert_close(again(), mixture(), rtol=1e-5, atol=1e-5)
    assert names == STACKS


@pytest.mark.parametrize("format", ["vllm", "sglang"])
def test_servers_files(format, tmp_path):
    model = adapted(use_dora=False)
    dora_kernels.save_adapter(model, tmp_path, format=format)
    shapes = {key: tuple(t.shape) for key, t in load_file(tmp_path / "adapter_model.safetensors").items()}
    start = "base_model.model.model.layers.0.mlp.experts"
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"], config["alpha_pattern"]) == (3, {}, {})  # the servers read no patterns
    if format == "vllm":
        assert shapes[f"{start}.5.up_proj.lora_B.weight"] == (24, 3)
        assert shapes[f"{start}.0.down_proj.lora_A.weight"] == (3, 24)
    else:
        assert shapes[f"{start}.gate_up_proj.lora_A.weight"] == (6, 3, 32)
        assert shapes[f"{start}.down_proj.lora_B.weight"] == (6, 32, 3)
        assert config["target_modules"] == ["down_proj", "gate_up_proj", "q_proj"]
        assert "target_parameters" not in config
    again = qwen3_moe()
    dora_kernels.load_adapter(tmp_path, again)
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("format", ["vllm", "sglang"])
def test_servers_files_in_16_bits(format, tmp_path):
    """A scaling that is folded into B is not rounded to B's 16 bits."""
    torch.manual_seed(0)
    layers = {
        f"layers.0.{name}": AdapterLayer("linear", torch.randn(rank, 8).bfloat16(), torch.randn(6, rank).bfloat16(),
                                         None, scaling)
        for name, rank, scaling in (("q_proj", 2, 1.5), ("k_proj", 3, 1.0), ("v_proj", 3, 1.0))
    }  # fmt: skip
    notes = dora_kernels.save_adapter(dora_kernels.Adapter(layers), tmp_path, format=format)
    assert any("1 of 3 layers was folded into lora_B" in note for note in notes)
    read = dora_kernels.read_adapter(tmp_path).layers
    assert {layer.rank for layer in read.values()} == {3} and len({layer.scaling for layer in read.values()}) == 1
    for name, layer in layers.items():
        one, two = (each.scaling * each.lora_B.double() @ each.lora_A.double() for each in (layer, read[name]))
        torch.testing.assert_close(two, one, rtol=1e-6, atol=1e-6)


def test_gate_and_up_in_turns(tmp_path):
    """In gpt-oss they alternate: halves of the stack are neither of them."""
    gpt_oss = "transformers.models.gpt_oss.modeling_gpt_oss", "GptOssExperts"
    model = Mixture(experts(*gpt_oss), torch.float32)
    dora_kernels.apply_dora(model, [], rank=2, use_dora=False, target_parameters=["experts.gate_up_proj"])
    with pytest.raises(ValueError, match=r"experts\.gate_up_proj cannot be written as 'vllm': gate and up take turns"):
        dora_kernels.save_adapter(model, tmp_path / "out", format="vllm")
    single = dora_kernels.Adapter(split(dora_kernels.extract(model).layers))
    with pytest.raises(ValueError, match=r"experts\.gate_up_proj: gate and up take turns"):
        dora_kernels.attach(Mixture(experts(*gpt_oss), torch.float32), single)
    dora_kernels.save_adapter(dora_kernels.extract(model), tmp_path / "peft")
    notes = dora_kernels.save_adapter(dora_kernels.read_adapter(tmp_path / "peft"), tmp_path / "vllm", format="vllm")
    assert any("in gpt-oss they take turns" in note for note in notes)


@pytest.mark.parametrize("format", ["vllm", "sglang", "lycoris", "mlx"])
def test_formats_without_it(format, tmp_path):
    with pytest.raises(ValueError, match=r"\w+_proj cannot be written as '" + format):
        dora_kernels.save_adapter(adapted(), tmp_path / "out", format=format)
    assert not (tmp_path / "out").exists()


def test_single_experts_with_magnitudes():
    """Split and stacked again it is the same function, also where gate and up have an A of their own."""
    model = adapted()
    adapter = dora_kernels.extract(model)
    single = dora_kernels.Adapter(split(adapter.layers))
    assert single.layers["model.layers.0.mlp.experts.2.up_proj"].magnitude.shape == (24,)
    again = qwen3_moe()
    dora_kernels.attach(again, single)
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-6)
    for name, layer in single.layers.items():
        if "up_proj" in name:
            layer.lora_A.mul_(2)
            layer.lora_B.div_(2)
    again = qwen3_moe()
    dora_kernels.attach(again, single)
    assert dora_kernels.adapted_layers(again)["model.layers.0.mlp.experts.base_layer"].rank == 4
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-6)


def test_a_missing_expert():
    adapter = dora_kernels.extract(adapted())
    layers = split(adapter.layers)
    del layers["model.layers.0.mlp.experts.3.up_proj"]
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.experts\.gate_up_proj: the file has no 3\.up_proj"):
        dora_kernels.attach(qwen3_moe(), dora_kernels.Adapter(layers))


@pytest.mark.parametrize("odd", [{"eps": 0.5}, {"magnitude_axis": "in"}], ids=["eps", "axis"])
def test_single_experts_of_another_function(odd):
    """A stack has no eps and no other axis, so they are refused and not dropped."""
    magnitude = torch.ones(24 if "magnitude_axis" in odd else 32)
    layer = AdapterLayer("linear", torch.ones(2, 24), torch.ones(32, 2), magnitude, 1.0, **odd)
    layers = {f"model.layers.0.mlp.experts.{e}.down_proj": layer for e in range(6)}
    with pytest.raises(ValueError, match=r"0\.mlp\.experts\.down_proj: .* along 'in', or an eps"):
        dora_kernels.attach(qwen3_moe(), dora_kernels.Adapter(layers))


def test_shared_outer_factors(tmp_path):
    """SGLang: one A for all experts of a stack."""
    model = adapted(use_dora=False)
    dora_kernels.save_adapter(model, tmp_path, format="sglang")
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if key.endswith("experts.gate_up_proj.lora_A.weight"))
    tensors[key] = tensors[key][:1].clone()
    save_file(tensors, file)
    read = dora_kernels.read_adapter(tmp_path)
    name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
    assert read.layers[name].lora_A.shape == (6, 3, 32)


def test_converting_to_pefts_files_keeps_stacks(tmp_path):
    """The base model's files hold single experts, but the model that PEFT adapts has stacks."""
    runner = pytest.importorskip("typer.testing").CliRunner()
    from dora_kernels.cli.app import build_app

    dora_kernels.save_adapter(adapted(), tmp_path / "adapter")
    qwen3_moe().save_pretrained(tmp_path / "base")
    call = ["convert", tmp_path / "adapter", tmp_path / "out", "--to", "peft", "--base", tmp_path / "base"]
    assert runner.invoke(build_app(), list(map(str, call))).exit_code == 0
    written, given = (load_file(tmp_path / one / "adapter_model.safetensors") for one in ("out", "adapter"))
    assert written.keys() == given.keys() and all(torch.equal(written[key], given[key]) for key in given)


@pytest.mark.parametrize("stored", ["single", "stacked"])
def test_merging_a_checkpoint(stored, tmp_path):
    """The file holds the layers of each expert, as transformers writes them, or the stacks."""
    from dora_kernels.checkpoints.checkpoint import Checkpoint
    from dora_kernels.checkpoints.merge import merge_checkpoint

    model = adapted()
    dora_kernels.save_adapter(model, tmp_path / "adapter")
    qwen3_moe().save_pretrained(tmp_path / "base")
    if stored == "stacked":
        save_file(qwen3_moe().state_dict(), tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    checkpoint = Checkpoint(tmp_path / "base")
    assert ("model.layers.0.mlp.experts.3.up_proj.weight" in checkpoint) == (stored == "single")
    merge_checkpoint(checkpoint, tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-5, atol=1e-6)
