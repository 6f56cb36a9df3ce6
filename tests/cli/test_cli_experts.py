"""The commands agree with the functions about adapters of experts: what is refused, warned of and rounded."""

from __future__ import annotations

import re
import shutil

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("rich")
from experts_models import IDS, moved, qwen3_moe
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import dora_kernels
from dora_kernels.adapters.experts import split

STACKS = ["experts.gate_up_proj", "experts.down_proj"]


def gpt_oss():
    sizes = {
        "vocab_size": 64, "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 1, "head_dim": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2,
        "layer_types": ["full_attention"], "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt_oss", **sizes))


def adapted(model, use_dora, modules=(), **options):
    dora_kernels.apply_dora(
        model, list(modules), rank=2, alpha=3, use_dora=use_dora, target_parameters=STACKS, **options
    )
    return moved(model)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folders of one model in bfloat16, whose files hold the layers of single experts, or stacks."""
    folder = tmp_path_factory.mktemp("bases")
    model = qwen3_moe(dtype=torch.bfloat16)
    for name in ("single", "stacked"):
        model.save_pretrained(folder / name)
    save_file(model.state_dict(), folder / "stacked" / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A folder with DoRA of the same model's stacks and linear layers."""
    folder = tmp_path_factory.mktemp("adapter")
    dora_kernels.save_adapter(adapted(qwen3_moe(dtype=torch.bfloat16), True, ["o_proj"]), folder)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder of PEFT's."""
    folder = tmp_path_factory.mktemp("trained")
    config = LoraConfig(use_dora=True, r=2, target_modules=["o_proj"], target_parameters=STACKS)
    handle = dora_kernels.patch_peft_globally()
    get_peft_model(qwen3_moe(dtype=torch.bfloat16), config).save_pretrained(folder)
    handle.restore()
    return folder


# convert


@pytest.mark.parametrize("to", ["vllm", "sglang"])
def test_converting_gate_and_up_in_turns(to, call, tmp_path):
    """Of gpt-oss neither writes what servers would read as gate above up; without a base a note says what to give."""
    model = gpt_oss()
    model.save_pretrained(tmp_path / "base")
    adapted(model, False)
    dora_kernels.save_adapter(model, tmp_path / "adapter")
    with pytest.raises(ValueError, match="gate and up take turns in it"):
        dora_kernels.save_adapter(model, tmp_path / "out", format=to)
    arguments = "convert", tmp_path / "adapter", tmp_path / "out", "--to", to
    status, _, stderr = call(*arguments, "--base", tmp_path / "base")
    assert status == 2 and "gate and up take turns in it" in stderr and not (tmp_path / "out").exists()
    read = dora_kernels.read_adapter(tmp_path / "adapter", gpt_oss())
    with pytest.raises(ValueError, match="gate and up take turns in it"):
        dora_kernels.save_adapter(read, tmp_path / "out", format=to)
    status, stdout, _ = call(*arguments)
    assert status == 0 and "gate_up_proj was read as gate above up" in stdout and "--base MODEL_DIR" in stdout


@pytest.mark.parametrize("to", ["vllm", "sglang"])
def test_a_base_leaves_nothing_to_note(to, call, tmp_path):
    model = qwen3_moe()
    model.save_pretrained(tmp_path / "base")
    dora_kernels.save_adapter(adapted(model, False), tmp_path / "adapter")
    arguments = "convert", tmp_path / "adapter", tmp_path / "out", "--to", to, "--base", tmp_path / "base"
    status, stdout, stderr = call(*arguments)
    assert status == 0 and "note" not in stdout, (stdout, stderr)
    read = dora_kernels.read_adapter(tmp_path / "adapter", qwen3_moe())
    assert not dora_kernels.save_adapter(read, tmp_path / "python", format=to)
    ours, wanted = (load_file(tmp_path / each / "adapter_model.safetensors") for each in ("out", "python"))
    assert ours.keys() == wanted.keys() and all(torch.equal(ours[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("to", ["mlx", "torchtune", "nvidia", "qdora", "lycoris", "kohya", "diffusers"])
def test_formats_without_experts(to, call, bases, adapter, tmp_path):
    """They refuse stacks with a base whose files hold single experts, as without one."""
    refusal = f"cannot be written as '{to}': the format has no experts"
    for base in ((), ("--base", bases / "single"), ("--base", bases / "stacked")):
        status, _, stderr = call("convert", adapter, tmp_path / "out", "--to", to, *base)
        assert status == 2 and refusal in stderr and not (tmp_path / "out").exists(), (base, stderr)


# merge


@pytest.mark.parametrize("stored", ["single", "stacked"])
def test_stochastic_rounding_of_experts(stored, call, bases, adapter, tmp_path):
    """The bits of `merge_all`, also where the files hold single experts: each draws those of its place in the stack."""
    options = "--rounding", "stochastic", "--seed", 5
    assert call("merge", bases / stored, adapter, tmp_path / "merged", *options)[0] == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.bfloat16).state_dict()
    model = qwen3_moe(dtype=torch.bfloat16)
    dora_kernels.load_adapter(adapter, model)
    wanted = dora_kernels.merge_all(model, "stochastic", 5).state_dict()
    for key, tensor in wanted.items():
        assert torch.equal(merged[key], tensor), key


def test_magnitudes_along_the_inputs(call, bases, adapter, tmp_path):
    """Of stacks there are none: an error, as for a linear layer, with and without a model."""
    said = "'in': a stack of experts has magnitudes along 'out' only"
    for base in (None, qwen3_moe()):
        with pytest.raises(ValueError, match=rf"mlp\.experts\S*: magnitude_axis={said}"):
            dora_kernels.read_adapter(adapter, base, magnitude_axis="in")
    status, _, stderr = call("merge", bases / "stacked", adapter, tmp_path / "merged", "--axis", "in")
    assert status == 2 and f"--axis {said}" in stderr


# files that lack something


def incomplete(source, target, lost):
    """A copy of an adapter's folder without the tensors of some layers."""
    shutil.copytree(source, target)
    tensors = load_file(target / "adapter_model.safetensors")
    kept = {key: tensor for key, tensor in tensors.items() if not re.search(lost, key)}
    assert 0 < len(kept) < len(tensors)
    save_file(kept, target / "adapter_model.safetensors")
    return target


LOST = {
    r"layers\.1\.": ["model.layers.1.self_attn.o_proj", "model.layers.1.mlp.experts.down_proj"],
    r"layers\.0\.self_attn\.o_proj": ["model.layers.0.self_attn.o_proj"],
}


@pytest.mark.parametrize(("lost", "names"), LOST.items(), ids=["layer", "linear"])
def test_layers_without_tensors(lost, names, call, bases, trained, tmp_path):
    """They are named, in a loaded model and in files of both kinds."""
    source = incomplete(trained, tmp_path / "adapter", lost)
    with pytest.warns(RuntimeWarning, match="it has no tensors for .* name; they stay as they are") as warned:
        dora_kernels.load_adapter(source, qwen3_moe(dtype=torch.bfloat16))
    said = [str(warned[0].message)]
    for stored in ("single", "stacked"):
        status, stdout, stderr = call("merge", bases / stored, source, tmp_path / stored)
        assert status == 0, stderr
        said.append(stdout)
    assert all(name in text for name in names for text in said), said
    assert all(text.count("self_attn.o_proj") == sum("o_proj" in name for name in names) for text in said), said


def test_a_module_without_its_outer_stack(call, bases, trained, tmp_path):
    """The keys of the stacks that are there say that one is missing."""
    source = incomplete(trained, tmp_path / "adapter", r"layers\.1\.mlp\.experts\.lora")
    missing = "has no tensors for model.layers.1.mlp.experts.down_proj, which its configuration"
    with pytest.raises(ValueError, match=missing):
        dora_kernels.load_adapter(source, qwen3_moe(dtype=torch.bfloat16))
    for stored in ("single", "stacked"):
        status, _, stderr = call("merge", bases / stored, source, tmp_path / stored)
        assert status == 2 and missing in stderr


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["o_proj", "q_proj"], "exclude_modules": ["layers.1.self_attn.q_proj"]},
        {"target_modules": ["o_proj"], "layers_to_transform": [1]},
        {"target_modules": r".*layers\.0.*o_proj"},
        {"target_modules": "all-linear"},
        {"target_modules": ["o_proj"], "target_parameters": STACKS},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["gate_proj", "up_proj", "down_proj"]},
    ],
)
def test_no_false_alarms(options, call, bases, tmp_path, globally):
    """Whatever PEFT leaves out."""
    model = get_peft_model(qwen3_moe(dtype=torch.bfloat16), LoraConfig(use_dora=True, r=2, **options))
    model.save_pretrained(tmp_path / "adapter")
    for stored in ("single", "stacked"):
        status, stdout, stderr = call("merge", bases / stored, tmp_path / "adapter", tmp_path / stored)
        assert status == 0 and "no tensors" not in stdout, (stdout, stderr)
    try:
        notes = dora_kernels.load_adapter(tmp_path / "adapter", qwen3_moe(dtype=torch.bfloat16)).notes
    except ValueError as error:
        assert "only PEFT adapts it" in str(error)
    else:
        assert "no tensors" not in " ".join(notes)


@pytest.mark.parametrize("stored", ["single", "stacked"])
def test_experts_without_tensors(stored, call, bases, tmp_path):
    adapter = dora_kernels.extract(adapted(qwen3_moe(dtype=torch.bfloat16), True))
    adapter.layers = split(adapter.layers)
    dora_kernels.save_adapter(adapter, tmp_path / "whole")
    source = incomplete(tmp_path / "whole", tmp_path / "adapter", r"layers\.0\.mlp\.experts\.2\.")
    with pytest.raises(ValueError, match=r"the file has no 2\.\w+_proj"):
        dora_kernels.load_adapter(source, qwen3_moe(dtype=torch.bfloat16))
    status, _, stderr = call("merge", bases / stored, source, tmp_path / "merged")
    assert status == 2 and re.search(r"mlp\.experts\S*: the file has no 2\.\w+_proj", stderr), stderr


# names with underscores


@pytest.mark.parametrize("use_dora", [True, False], ids=["dora", "lora"])
@pytest.mark.parametrize("to", ["lycoris", "kohya", "diffusers"])
def test_single_experts_with_underscores(to, use_dora, call, tmp_path):
    """They are stacked for a model with stacks, read with it or attached later, and merged into files of both kinds."""
    model = adapted(qwen3_moe(), use_dora)
    adapter = dora_kernels.extract(model)
    adapter.layers = split(adapter.layers)
    dora_kernels.save_adapter(adapter, tmp_path / "adapter", format=to)
    wanted = model(IDS).logits
    for read in (None, qwen3_moe()):
        own = qwen3_moe()
        dora_kernels.attach(own, dora_kernels.read_adapter(tmp_path / "adapter", read))
        torch.testing.assert_close(own(IDS).logits, wanted, rtol=1e-5, atol=1e-5)
    own = qwen3_moe()
    adapter = dora_kernels.load_adapter(tmp_path / "adapter", own)
    assert "the layers of single experts became 4 stacks" in adapter.notes
    torch.testing.assert_close(own(IDS).logits, wanted, rtol=1e-5, atol=1e-5)
    for stored in ("single", "stacked"):
        qwen3_moe().save_pretrained(tmp_path / stored)
        if stored == "stacked":
            file = tmp_path / stored / "model.safetensors"
            save_file(qwen3_moe().state_dict(), file, metadata={"format": "pt"})
        out = tmp_path / f"merged-{stored}"
        status, _, stderr = call("merge", tmp_path / stored, tmp_path / "adapter", out)
        assert status == 0, stderr
        merged = AutoModelForCausalLM.from_pretrained(out)
        torch.testing.assert_close(merged(IDS).logits, wanted, rtol=1e-5, atol=1e-5)
