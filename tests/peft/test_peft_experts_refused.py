"""Parameters and options with which DoRA on experts cannot run: an error by name, before anything is adapted."""

from __future__ import annotations

import json

import pytest
import torch
from experts_models import IDS, AnyConfig, qwen3_moe
from peft import LoraConfig, PeftModel, get_peft_model
from peft_models import one_thread  # noqa: F401
from safetensors.torch import load_file, save_file
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn.utils import parametrize

import dora_kernels
from dora_kernels.peft.experts import ParamWrapper

pytestmark = pytest.mark.usefixtures("globally")

TARGETS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def config(**options):
    return LoraConfig(**{
        "use_dora": True, "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "target_parameters": TARGETS,
        **options,
    })  # fmt: skip


def refused(model, said, **options):
    """The error says what, and the model is as it was, its first layers too."""
    before = {name: (id(parameter), parameter.requires_grad) for name, parameter in model.named_parameters()}
    with pytest.raises(ValueError, match=said):
        get_peft_model(model, config(**options))
    assert {name: (id(p), p.requires_grad) for name, p in model.named_parameters()} == before


OPTIONS = {
    "dropout": ({"lora_dropout": 0.1}, "lora_dropout: expected 0 for a parameter, got 0.1"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights: expected one of .* got 'pissa_niter_4'"),
    "olora": ({"init_lora_weights": "olora"}, "init_lora_weights: expected one of True, False, 'gaussian', 'eva' "),
    "orthogonal": ({"init_lora_weights": "orthogonal"}, "init_lora_weights: .* got 'orthogonal'"),
}


@pytest.mark.parametrize(("options", "said"), OPTIONS.values(), ids=list(OPTIONS))
def test_options(options, said):
    """Some of them PEFT would meet with an AttributeError after it has adapted the linear layers."""
    refused(qwen3_moe(), rf"^model\.layers\.0\.mlp\.experts\.\w+_proj: {said}", **options)


@pytest.mark.parametrize("start", [True, False, "gaussian"])
def test_initialisations_of_parameters(start):
    model = qwen3_moe()
    before = model(IDS).logits
    model = get_peft_model(model, config(init_lora_weights=start))
    # q_proj's first magnitude is PEFT's own
    torch.testing.assert_close(model(IDS).logits, before, rtol=0, atol=1e-6 if start else 10)


def _holding(value):
    def change(experts):
        experts._parameters["down_proj"] = nn.Parameter(value, requires_grad=value.is_floating_point())

    return change


def _parametrized(experts):
    parametrize.register_parametrization(experts, "down_proj", nn.Identity())


PARAMETERS = {
    "int16": (_holding(torch.zeros(6, 32, 24, dtype=torch.int16)), "its parameter is torch.int16; expected float32, "),
    "float8": (_holding(torch.zeros(6, 32, 24).to(torch.float8_e4m3fn)), "its parameter is torch.float8_e4m3fn; "),
    "four": (_holding(torch.zeros(6, 1, 32, 24)), r"the shape \[6, 1, 32, 24\]; expected 2 dimensions, or 3"),
    "one": (_holding(torch.zeros(6)), r"its parameter has the shape \[6\]; expected 2 dimensions, or 3"),
    "parametrized": (_parametrized, "its parameter is parametrized; remove the parametrization first"),
}


@pytest.mark.parametrize(("change", "said"), PARAMETERS.values(), ids=list(PARAMETERS))
def test_parameters(change, said):
    """In the last layer only: those before it are not adapted either."""
    model = qwen3_moe()
    change(model.model.layers[1].mlp.experts)
    refused(
        model, rf"^model\.layers\.1\.mlp\.experts\.down_proj: DoRA cannot run on this parameter: .*{said}",
        target_parameters=[*TARGETS, "model.layers.1.mlp.experts.down_proj"],
    )  # fmt: skip


def test_a_second_adapter():
    """It is refused as the first would be, and the model still has the first alone."""
    model = get_peft_model(qwen3_moe(), config())
    before = model(IDS).logits
    with pytest.raises(ValueError, match=r"experts\.\w+_proj: lora_dropout: expected 0 for a parameter, got 0\.3"):
        model.add_adapter("two", config(lora_dropout=0.3))
    assert list(model.peft_config) == ["default"] and not any(".two." in name for name, _ in model.named_parameters())
    assert torch.equal(model(IDS).logits, before)


class Around(nn.Module):
    """A model with a linear layer and one module of experts."""

    def __init__(self, experts):
        super().__init__()
        self.q_proj = nn.Linear(4, 4)
        self.experts = experts


def test_experts_that_the_module_around_them_reads():
    from transformers.models.dbrx.modeling_dbrx import DbrxExpertGLU

    settings = AnyConfig()
    settings.ffn_act_fn = {"name": "silu"}
    said = r"^experts\.w1: DoRA cannot run .*: the module around DbrxExpertGLU reads its parameters itself"
    refused(Around(DbrxExpertGLU(settings)), said, target_parameters=["experts.w1"])


def test_experts_with_kernels_for_packed_weights():
    """fbgemm's float8 experts; MXFP4's are in test_peft_experts_quantized.py."""
    from transformers.integrations import fbgemm_fp8

    settings = AnyConfig()
    settings.num_local_experts = 2
    said = r"^experts\.down_proj: DoRA cannot run .*: FbgemmFp8Llama4TextExperts multiplies by its packed weights in ke"
    refused(Around(fbgemm_fp8.FbgemmFp8Llama4TextExperts(settings)), said, target_parameters=["experts.down_proj"])


@pytest.mark.parametrize(("how", "placement"), [("experts", Shard(0)), ("tensor", Shard(1))], ids=["ep", "tp"])
def test_split_fp8(how, placement, tmp_path):
    """A process has some experts, or a part of each, and the blocks' scales do not say which."""
    from transformers.integrations.finegrained_fp8 import FP8Experts

    settings = qwen3_moe("eager").config
    experts = FP8Experts(settings, block_size=(16, 16))
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for name, where in (("down_proj", placement), ("down_proj_scale_inv", Replicate())):
            whole = experts._parameters[name].detach()
            split = distribute_tensor(whole.view(torch.uint8) if whole.element_size() == 1 else whole, mesh, [where])
            split = split.view(whole.dtype)
            experts._parameters[name] = nn.Parameter(split, requires_grad=False)
        said = (
            r"^experts\.down_proj: DoRA cannot run .*: quantised experts that are split over processes; load the model"
        )
        refused(Around(experts), said, target_parameters=["experts.down_proj"])
    finally:
        distributed.destroy_process_group()


def test_a_router_outside_peft(tmp_path):
    """Its adapter is that of one matrix, which only PEFT holds; another name is no layer at all."""
    get_peft_model(qwen3_moe(), config(target_parameters=["mlp.gate.weight"])).save_pretrained(tmp_path)
    model = qwen3_moe()
    before = dict(model.named_parameters())
    said = (
        r"model\.layers\.0\.mlp\.gate\.weight: a parameter .* only PEFT adapts it: patch_peft_globally\(\), then Peft"
    )
    for load in (dora_kernels.load_adapter, dora_kernels.read_adapter):
        with pytest.raises(ValueError, match=said):
            load(tmp_path, model)
    now = dict(model.named_parameters())
    assert now.keys() == before.keys() and all(now[name] is before[name] for name in before)
    loaded = PeftModel.from_pretrained(model, tmp_path)  # as it says
    assert any(isinstance(layer, ParamWrapper) for layer in loaded.modules())


def test_magnitudes_that_the_configuration_does_not_name(tmp_path, globally):
    """PEFT would load the rest of the file as plain LoRA, another function, without a word."""
    get_peft_model(qwen3_moe(), config()).save_pretrained(tmp_path)
    path, file = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_dora": False}))
    with pytest.raises(
        ValueError, match=r"adapter_config\.json: expected peft_type 'LORA' with use_dora, got .* False"
    ):
        dora_kernels.check_adapter(tmp_path, qwen3_moe())
    with pytest.raises(ValueError, match=r"it has magnitudes, and .*adapter_config\.json says use_dora=False"):
        dora_kernels.load_adapter(tmp_path, qwen3_moe())
    # Without them it is the LoRA part, for PEFT alone too.
    tensors = {key: tensor for key, tensor in load_file(file).items() if "magnitude" not in key}
    save_file(tensors, file)
    globally.restore()
    stock = PeftModel.from_pretrained(qwen3_moe(), tmp_path)
    assert not any(isinstance(layer, ParamWrapper) for layer in stock.modules())
    ours = qwen3_moe()
    dora_kernels.load_adapter(tmp_path, ours)
    torch.testing.assert_close(ours(IDS).logits, stock(IDS).logits, rtol=1e-5, atol=1e-6)
