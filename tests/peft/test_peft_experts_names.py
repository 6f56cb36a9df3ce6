"""Names of layers that PEFT takes for experts': files that keep these layers, and warnings before training."""

from __future__ import annotations

import json
import re
import warnings

import peft
import pytest
import torch
from experts_models import IDS, MIXTURES, mixture, qwen3_moe
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft_models import one_thread  # noqa: F401
from safetensors.torch import load_file, save_file
from torch import nn

import dora_kernels
from dora_kernels.model.expert_names import is_expert_name
from dora_kernels.peft.targets import CONVERTS

pytestmark = [
    pytest.mark.usefixtures("globally"),
    pytest.mark.skipif(not CONVERTS, reason=f"PEFT {peft.__version__} takes no names for experts'"),
]

STACKS = ["experts.gate_up_proj", "experts.down_proj"]
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def adapted(model, target_modules="all-linear", target_parameters=STACKS, **options):
    options = {"rank": 4, "rank_pattern": {"o_proj": 3, "down_proj": 6}} | options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of ranks above a gate's one output
        dora_kernels.apply_dora(model, target_modules, target_parameters=target_parameters, **options)
    torch.manual_seed(1)
    for layer in dora_kernels.adapted_layers(model).values():
        for parameter in layer.adapter_parameters().values():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def check_loads(folder, kind, wanted):
    """PEFT and this package load the file to the same function, without a layer that is not in it."""
    dora_kernels.check_adapter(folder, mixture(kind))
    loaded = PeftModel.from_pretrained(mixture(kind), folder)
    torch.testing.assert_close(logits(loaded), wanted, rtol=1e-5, atol=1e-6)
    loaded.save_pretrained(folder / "again")
    assert load_file(folder / WEIGHTS).keys() == load_file(folder / "again" / WEIGHTS).keys()
    for each in (folder, folder / "again"):
        ours = mixture(kind)
        dora_kernels.load_adapter(each, ours)
        torch.testing.assert_close(logits(ours), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("use_dora", [True, False], ids=["dora", "lora"])
@pytest.mark.parametrize("kind", MIXTURES)
def test_a_file_has_every_layer(kind, use_dora, tmp_path, globally):
    """Dense layers and shared experts too. Plain LoRA loads in PEFT alone."""
    model = adapted(mixture(kind), use_dora=use_dora)
    dora_kernels.save_adapter(model, tmp_path / "first")
    dora_kernels.save_adapter(dora_kernels.read_adapter(tmp_path / "first"), tmp_path / "second")  # without the model
    if use_dora:
        for name in ("first", "second"):
            check_loads(tmp_path / name, kind, logits(model))
        return
    globally.restore()
    for name in ("first", "second"):
        loaded = PeftModel.from_pretrained(mixture(kind), tmp_path / name)
        torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "targets", [["gate_proj", "up_proj", "down_proj"], ["model.layers.0.self_attn.o_proj"]], ids=["dense", "one"]
)
def test_files_without_stacks(targets, tmp_path):
    """Names that PEFT takes for experts', and one layer out of many that end alike."""
    model = adapted(mixture("glm4_moe"), targets, None)
    dora_kernels.save_adapter(model, tmp_path)
    check_loads(tmp_path, "glm4_moe", logits(model))


def test_the_list_that_was_read(tmp_path):
    """It is written again without the names that PEFT would take."""
    model = adapted(mixture("deepseek_v3"), ["o_proj", "down_proj"])
    dora_kernels.save_adapter(model, tmp_path / "one")
    adapter = dora_kernels.read_adapter(tmp_path / "one")
    adapter.config["target_modules"] = ["o_proj", "mlp.down_proj", "down_proj"]
    dora_kernels.save_adapter(adapter, tmp_path / "two")
    config = json.loads((tmp_path / "two" / CONFIG).read_text())
    assert config["target_modules"] == ["o_proj"]
    assert "model.layers.0.mlp.down_proj.weight" in config["target_parameters"]
    check_loads(tmp_path / "two", "deepseek_v3", logits(model))


def test_a_model_whose_names_are_free(tmp_path):
    """PEFT takes none of Qwen2-MoE's, whose shared experts stay modules."""
    dora_kernels.save_adapter(adapted(mixture("qwen2_moe")), tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert re.fullmatch(config["target_modules"], "model.layers.0.mlp.shared_expert.up_proj")
    assert {name.rpartition(".")[2] for name in config["target_parameters"]} == {"gate_up_proj", "down_proj"}


def changed(folder, **values):
    """Change a file's configuration, and let the file forget that it was saved with another."""
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | values))
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS)


def test_check_adapter(tmp_path):
    """It names what PEFT would leave out, and as it says the file is written anew."""
    model = adapted(mixture("glm4_moe"), ["o_proj", "down_proj"])
    dora_kernels.save_adapter(model, tmp_path / "one")
    config = json.loads((tmp_path / "one" / CONFIG).read_text())
    dense = [name for name in config["target_parameters"] if name.endswith(".weight")]
    names = [*config["target_modules"], *(name.removesuffix(".weight") for name in dense)]
    stacks = sorted(set(config["target_parameters"]) - set(dense))
    ranks = {key.replace(r"\.weight", ""): rank for key, rank in config["rank_pattern"].items()}
    for targets in (names, "|".join(map(re.escape, names))):
        others = {"target_parameters": stacks, "rank_pattern": ranks, "alpha_pattern": ranks}
        changed(tmp_path / "one", target_modules=targets, **others)
        with pytest.raises(ValueError, match=r"down_proj: PEFT takes this name for an expert's, so the layer gets no "):
            dora_kernels.check_adapter(tmp_path / "one", mixture("glm4_moe"))
    again = mixture("glm4_moe")
    dora_kernels.load_adapter(tmp_path / "one", again)
    dora_kernels.save_adapter(again, tmp_path / "two")
    check_loads(tmp_path / "two", "glm4_moe", logits(model))


def test_check_adapter_of_an_expression(tmp_path):
    """PEFT would adapt the other layers' projections too."""
    dora_kernels.save_adapter(adapted(mixture("glm4_moe"), ["model.layers.0.self_attn.o_proj"], None), tmp_path)
    changed(tmp_path, target_modules=r"model\.layers\.0\.self_attn\.o_proj")
    with pytest.raises(ValueError, match=r"has no tensors for model\.layers\.1\.self_attn\.o_proj, which its config"):
        dora_kernels.check_adapter(tmp_path, mixture("glm4_moe"))


def trained(model, **options):
    """The PEFT model, and the warnings about its targets."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = get_peft_model(model, LoraConfig(r=4, use_dora=True, **options))
    said = [str(one.message) for one in caught]
    return model, [one for one in said if one.startswith(("target_modules: ", "target_parameters: "))]


@pytest.mark.parametrize(
    "targets", ["all-linear", ["o_proj", "gate_proj", "up_proj", "down_proj"], r".*\.(gate_proj|up_proj|down_proj)"],
    ids=["all-linear", "list", "expression"],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["deepseek_v3", "glm4_moe", "qwen3_moe"])
def test_peft_leaves_layers_out(kind, targets):
    """The warning names them, and the names it gives adapt them: a fresh adapter changes nothing."""
    linear = [name for name, layer in mixture(kind).named_modules() if isinstance(layer, nn.Linear)]
    left = [name for name in linear if is_expert_name(name)]
    model, (said,) = trained(mixture(kind), target_modules=targets)
    layers = {name.removeprefix("base_model.model."): layer for name, layer in model.named_modules()}
    assert not any(isinstance(layers[name], BaseTunerLayer) for name in left)
    assert said.startswith(f"target_modules: PEFT takes the names of {', '.join(left[:3])}")
    ends = json.loads(re.search(r"target_parameters=(\[.*\])$", said)[1].replace("'", '"'))
    model, said = trained(mixture(kind), target_modules=targets, target_parameters=ends)
    layers = {name.removeprefix("base_model.model."): layer for name, layer in model.named_modules()}
    assert not said and all(isinstance(layers[name], BaseTunerLayer) for name in left)
    torch.testing.assert_close(logits(model), logits(mixture(kind)), rtol=1e-5, atol=1e-5)


def test_nothing_to_do_about_it():
    """In 4 bits PEFT cannot adapt the weights either."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = mixture("qwen3_moe")
    for part in ("gate_proj", "up_proj", "down_proj"):
        layer = getattr(model.model.layers[0].mlp, part)
        packed = bitsandbytes.nn.Linear4bit(layer.in_features, layer.out_features, bias=False)
        packed.weight = bitsandbytes.nn.Params4bit(layer.weight.data, requires_grad=False)
        setattr(model.model.layers[0].mlp, part, packed.to("cpu"))
    _, (said,) = trained(model, target_modules="all-linear")
    assert said.endswith("for experts', so these layers get no adapter")


def test_peft_reads_an_expression_by_its_ends():
    """As the documents say: it adapts the other layers' too."""
    model, _ = trained(mixture("glm4_moe"), target_modules=r".*layers\.0.*q_proj")
    assert sum(isinstance(layer, BaseTunerLayer) for layer in model.modules()) == 2


NOTHING = {
    "no such layers": ("mixtral", {"target_modules": "all-linear"}),
    "names not taken": ("qwen2_moe", {"target_modules": "all-linear"}),
    "excluded": ("qwen3_moe", {"target_modules": "All-Linear", "exclude_modules": r".*layers\.0\.mlp\..*"}),
    "no modules": ("qwen3_moe", {"target_parameters": STACKS}),
    "other modules": ("qwen3_moe", {"target_modules": ["q_proj"]}),
}


@pytest.mark.parametrize(("kind", "options"), NOTHING.values(), ids=list(NOTHING))
def test_peft_leaves_nothing_out(kind, options):
    assert trained(mixture(kind), **options)[1] == []


def test_a_misspelt_parameter_of_a_second_adapter():
    model, _ = trained(qwen3_moe(), target_modules=["q_proj"])
    config = LoraConfig(r=4, use_dora=True, target_parameters=["experts.gate_up_proj", "experts.down_prj"])
    with pytest.warns(RuntimeWarning, match=r"no 'experts\.down_prj' \(the nearest is 'experts\.down_proj'\)"):
        model.add_adapter("two", config)
    assert trained(qwen3_moe(), target_parameters=STACKS)[1] == []
