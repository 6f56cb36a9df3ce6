"""Where adapters of experts lie in files and models, in every order: servers', 4 bits', routers', single experts'."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from experts_models import Mixture, experts, logits, moved, qwen3_moe
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import dora_kernels
from dora_kernels.adapters.experts import split

QWEN = "transformers.models.qwen3_moe.modeling_qwen3_moe", "Qwen3MoeExperts"
GPT = "transformers.models.gpt_oss.modeling_gpt_oss", "GptOssExperts"
INKLING = "transformers.models.inkling.modeling_inkling", "InklingSharedExperts"
NEMOTRON = "transformers.models.nemotron_h.modeling_nemotron_h", "NemotronHExperts"
STACKS = ["experts.gate_up_proj", "experts.down_proj"]


def adapted(use_dora=True, **options):
    model = qwen3_moe()
    options = {"rank": 2, "alpha": 3, "target_parameters": STACKS, **options}
    dora_kernels.apply_dora(model, ["q_proj"], use_dora=use_dora, **options)
    return moved(model)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folders of one model, whose files hold the layers of single experts, as transformers writes them, or stacks."""
    folder = tmp_path_factory.mktemp("bases")
    for name in ("single", "stacked"):
        qwen3_moe().save_pretrained(folder / name)
    save_file(qwen3_moe().state_dict(), folder / "stacked" / "model.safetensors", metadata={"format": "pt"})
    return folder


def command(*arguments):
    runner = pytest.importorskip("typer.testing").CliRunner()
    from dora_kernels.cli.app import build_app

    found = runner.invoke(build_app(), list(map(str, arguments)))
    assert found.exit_code == 0, found.output
    return found.output


def written(layout, folder):
    """An adapter's file in one layout, and the model that it stands for."""
    model = adapted(layout in ("peft", "single"))
    if layout == "single":
        adapter = dora_kernels.extract(model)
        adapter.layers = split(adapter.layers)
        dora_kernels.save_adapter(adapter, folder)
    else:
        dora_kernels.save_adapter(model, folder, format="peft" if layout == "lora" else layout)
    return model


LAYOUTS = "peft", "lora", "single", "vllm", "sglang"


@pytest.mark.parametrize(("layout", "stored"), itertools.product(LAYOUTS, ("single", "stacked")))
def test_every_layout_into_every_folder(layout, stored, bases, tmp_path):
    """Merged, inspected and converted beside a model's folder by the command line."""
    model = written(layout, tmp_path / "adapter")
    command("merge", bases / stored, tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-5, atol=1e-6)
    assert "experts" in command("inspect", tmp_path / "adapter", "--base", bases / stored)
    command("convert", tmp_path / "adapter", tmp_path / "peft", "--to", "peft", "--base", bases / stored)
    again = qwen3_moe()
    dora_kernels.load_adapter(tmp_path / "peft", again)
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-6)


def test_stochastic_rounding_of_a_folder(bases, tmp_path):
    """The bits of `merge_all` with the same seed, also where nearest rounding would give others."""
    model = qwen3_moe(dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    save_file(model.state_dict(), file, metadata={"format": "pt"})
    dora_kernels.apply_dora(model, [], rank=2, target_parameters=STACKS)
    dora_kernels.save_adapter(moved(model), tmp_path / "adapter")
    found = {}
    for rounding in ("nearest", "stochastic"):
        out = tmp_path / rounding
        command("merge", tmp_path / "base", tmp_path / "adapter", out, "--rounding", rounding, "--seed", 5)
        found[rounding] = load_file(out / "model.safetensors")
    wanted = dora_kernels.merge_all(model, "stochastic", 5).state_dict()
    stacks = [key for key in wanted if ".experts." in key]
    assert len(stacks) == 4
    for key in stacks:
        assert torch.equal(found["stochastic"][key], wanted[key]), key
        assert not torch.equal(found["nearest"][key], wanted[key]), key


def test_inspecting_stacks(bases, tmp_path):
    """A fresh adapter's magnitudes are the norms of its weights: g is 1 for every output of every expert."""
    from dora_kernels.cli.inspect import inspect

    model = qwen3_moe()
    dora_kernels.apply_dora(model, [], rank=2, target_parameters=STACKS)
    dora_kernels.save_adapter(model, tmp_path)
    found = inspect(tmp_path, bases / "stacked")["layers"]["model.layers.1.mlp.experts.down_proj"]
    assert found["kind"] == "experts" and all(abs(found["g"][each] - 1) < 1e-6 for each in ("min", "median", "max"))


def test_gate_and_up_in_turns_in_a_folder(tmp_path):
    """Single experts' gate and up are no halves of gpt-oss's stacks."""
    from dora_kernels.checkpoints.checkpoint import Checkpoint, read_for

    adapter = dora_kernels.extract(adapted(False))
    dora_kernels.save_adapter(dora_kernels.Adapter(split(adapter.layers)), tmp_path / "adapter")
    base = tmp_path / "base"
    qwen3_moe().save_pretrained(base)
    save_file(qwen3_moe().state_dict(), base / "model.safetensors")
    (base / "config.json").write_text('{"model_type": "gpt_oss"}')
    with pytest.raises(ValueError, match=r"mlp\.experts\.gate_up_proj: gate and up take turns in this model's stack"):
        read_for(Checkpoint(base), tmp_path / "adapter")


@pytest.mark.parametrize("use_dora", [True, False], ids=["dora", "lora"])
def test_what_all_linear_trains(use_dora, bases, tmp_path, globally):
    """PEFT names the stacks without their modules, and adapts the router, a matrix that is no layer's."""
    model = moved(get_peft_model(qwen3_moe(), LoraConfig(use_dora=use_dora, r=4, target_modules="all-linear")))
    model.save_pretrained(tmp_path / "adapter")
    adapter = dora_kernels.read_adapter(tmp_path / "adapter")
    kinds = {
        name.removeprefix("model.layers.0."): layer.kind for name, layer in adapter.layers.items() if ".0." in name
    }
    assert kinds == dict.fromkeys(("mlp.experts.gate_up_proj", "mlp.experts.down_proj"), "experts") | dict.fromkeys(
        ("mlp.gate.weight", *(f"self_attn.{one}_proj" for one in "qkvo")), "linear"
    )
    for stored in ("single", "stacked"):
        command("merge", bases / stored, tmp_path / "adapter", tmp_path / stored)
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / stored)
        torch.testing.assert_close(logits(merged), logits(model), rtol=1e-5, atol=1e-6)
    command("convert", tmp_path / "adapter", tmp_path / "again", "--to", "peft")
    again = PeftModel.from_pretrained(qwen3_moe(), tmp_path / "again")
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-6)
    adapter = dora_kernels.read_adapter(tmp_path / "adapter")
    with pytest.raises(
        ValueError, match=r"mlp\.gate\.weight cannot be written as 'mlx': only PEFT's format"
    ):
        dora_kernels.save_adapter(adapter, tmp_path / "mlx", format="mlx")


def test_a_pattern_for_the_linear_layers(tmp_path, globally):
    """A regular expression names the layers, and names without a module the stacks."""
    config = LoraConfig(
        use_dora=True, r=4, target_modules=r".*\.[qv]_proj", target_parameters=["gate_up_proj", "down_proj"]
    )
    model = moved(get_peft_model(qwen3_moe(), config))
    model.save_pretrained(tmp_path)
    ours = qwen3_moe()
    dora_kernels.load_adapter(tmp_path, ours)
    assert len(dora_kernels.adapted_layers(ours)) == 8
    torch.testing.assert_close(logits(ours), logits(model), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("use_dora", [True, False], ids=["dora", "lora"])
def test_files_of_4_bit_experts(use_dora, tmp_path, globally):
    """PEFT nests parametrized parameters by their names: there down_proj lies inside. The sizes tell."""
    pytest.importorskip("bitsandbytes")
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    sizes = {"hidden_size": 64, "moe_intermediate_size": 64, "num_hidden_layers": 1}
    packed = qwen3_moe(**sizes)
    dense = copy.deepcopy(packed)
    for name in ("gate_up_proj", "down_proj"):
        holder = packed.model.layers[0].mlp.experts
        replace_parameter_4bit(holder, name, compress_statistics=True)
        getattr(dense.model.layers[0].mlp.experts, name).data.copy_(getattr(holder, name))
    base = copy.deepcopy(packed)
    names = [f"model.layers.0.mlp.{name}" for name in STACKS]
    config = LoraConfig(use_dora=use_dora, r=4, target_modules=[], target_parameters=names)
    model = moved(get_peft_model(packed, config))
    model.save_pretrained(tmp_path / "packed")
    ours = copy.deepcopy(dense)
    dora_kernels.load_adapter(tmp_path / "packed", ours)
    torch.testing.assert_close(logits(ours), logits(model), rtol=1e-5, atol=1e-5)
    command("convert", tmp_path / "packed", tmp_path / "whole", "--to", "peft")
    loaded = PeftModel.from_pretrained(copy.deepcopy(dense), tmp_path / "whole")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)
    if use_dora:
        for each in (base, model):
            dora_kernels.check_adapter(tmp_path / "packed", each)
        with pytest.raises(
            ValueError, match=r"experts\.gate_up_proj: .* fit its module's other one: .* 4-bit"
        ):
            dora_kernels.check_adapter(tmp_path / "packed", dense)
    with pytest.raises(
        ValueError, match=r"experts\.down_proj: it is parametrized; quantised experts"
    ):
        dora_kernels.apply_dora(base, [], rank=2, target_parameters=STACKS[1:])


@pytest.mark.parametrize("which", [INKLING, NEMOTRON], ids=["inkling", "nemotron_h"])
def test_stacks_of_other_names(which, tmp_path, globally):
    """Three in a module, gate and up each in one of its own; and up without a gate."""
    base = Mixture(experts(*which), torch.float32)
    names = [key for key, parameter in base.named_parameters() if parameter.dim() == 3]
    for use_dora in (True, False):
        model, folder = copy.deepcopy(base), tmp_path / str(use_dora)
        dora_kernels.apply_dora(model, [], rank=2, use_dora=use_dora, target_parameters=names)
        moved(model)
        dora_kernels.save_adapter(model, folder / "peft")
        torch.testing.assert_close(PeftModel.from_pretrained(copy.deepcopy(base), folder / "peft")(), model())
        if not use_dora:
            dora_kernels.save_adapter(model, folder / "vllm", format="vllm")
            keys = load_file(folder / "vllm" / "adapter_model.safetensors").keys()
            assert "base_model.model.experts.1.up_proj.lora_A.weight" in keys
            again = copy.deepcopy(base)
            dora_kernels.load_adapter(folder / "vllm", again)
            torch.testing.assert_close(again(), model())
            with pytest.raises(
                ValueError, match=r"_proj cannot be written as 'sglang': SGLang knows stacks"
            ):
                dora_kernels.save_adapter(model, folder / "sglang", format="sglang")


@pytest.mark.parametrize("use_dora", [True, False], ids=["dora", "lora"])
@pytest.mark.parametrize("which", [QWEN, GPT], ids=["qwen3_moe", "gpt_oss"])
def test_a_state_dict_as_the_base(which, use_dora, tmp_path):
    """It does not say which way round its stacks are."""
    base = Mixture(experts(*which), torch.float32)
    model = copy.deepcopy(base)
    dora_kernels.apply_dora(model, [], rank=2, use_dora=use_dora, target_parameters=STACKS)
    dora_kernels.save_adapter(moved(model), tmp_path)
    read = dora_kernels.read_adapter(tmp_path, base.state_dict())
    again = copy.deepcopy(base)
    dora_kernels.attach(again, read)
    torch.testing.assert_close(again(), model())
    fewer = {key: tensor[:3] for key, tensor in base.state_dict().items()}
    with pytest.raises(ValueError, match=r"experts\.\w+_proj(:| belongs to a stack) .*experts"):
        dora_kernels.read_adapter(tmp_path, fewer)


def test_experts_that_are_adapted_already(tmp_path):
    """They take the values, or say what differs; then nothing has changed."""
    model = adapted()
    dora_kernels.save_adapter(model, tmp_path / "adapter")
    other = qwen3_moe()
    dora_kernels.apply_dora(other, ["q_proj"], rank=2, target_parameters=STACKS)
    before = dora_kernels.adapted_layers(other)
    dora_kernels.load_adapter(tmp_path / "adapter", other)
    after = dora_kernels.adapted_layers(other)
    assert before.keys() == after.keys()
    assert all(after[name] is layer for name, layer in before.items() if "experts" in name)
    torch.testing.assert_close(logits(other), logits(model), rtol=1e-6, atol=1e-6)
    holder = r"^model: model\.layers\.0\.mlp\.experts\.\w+_proj"
    for options, said in (
        ({"rank": 3}, rf"{holder} is adapted with DoRA of rank 3, the adapter is DoRA of rank 2; call remove_dora"),
        ({"use_dora": False}, rf"{holder} is adapted with plain LoRA of rank 2, the adapter is DoRA of rank 2"),
        (
            {"target_parameters": STACKS[:1]},
            r"experts\.down_proj: other stacks of its module are adapted",
        ),
    ):
        other = adapted(**options)
        expected = logits(other)
        with pytest.raises(ValueError, match=said):
            dora_kernels.load_adapter(tmp_path / "adapter", other)
        assert torch.equal(logits(other), expected)
    dora_kernels.adapted_layers(model)["model.layers.0.mlp.experts"].merge()
    with pytest.raises(ValueError, match=r"experts\.down_proj is merged; call unmerge\(\) first"):
        dora_kernels.load_adapter(tmp_path / "adapter", model)
