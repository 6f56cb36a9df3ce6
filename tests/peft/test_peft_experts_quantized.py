"""DoRA on quantised experts: dequantised one expert at a time, or refused by name."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from allocations import Allocations
from experts_models import IDS, qwen3_moe
from peft import LoraConfig, PeftModel, get_peft_model
from peft_models import one_thread  # noqa: F401
from torch import nn

import dora_kernels
from dora_kernels.peft.experts import ParamWrapper

pytestmark = pytest.mark.usefixtures("globally")

STACKS = "gate_up_proj", "down_proj"


def adapted(model, names, **options):
    return get_peft_model(
        model, LoraConfig(use_dora=True, r=4, lora_alpha=8, target_modules=[], target_parameters=names, **options)
    )


def by_name(model):
    return {layer._name(): layer for layer in model.modules() if isinstance(layer, ParamWrapper)}


def trained_alike(*models):
    torch.manual_seed(5)
    for layers in zip(*(sorted(by_name(model).items()) for model in models)):
        for part in ("lora_A", "lora_B", "lora_magnitude_vector"):
            first, *others = (getattr(layer, part)["default"].weight for _, layer in layers)
            first.data += 0.1 * torch.randn_like(first)
            for other in others:
                other.data.copy_(first)


def compare(quantised, dense, run):
    ours, theirs = run(quantised), run(dense)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    up = torch.randn_like(ours)
    ours.backward(up)
    theirs.backward(up)
    one, two = by_name(quantised), by_name(dense)
    assert one.keys() == two.keys()
    for name in one:
        for part in ("lora_A", "lora_B", "lora_magnitude_vector"):
            gradients = [getattr(layer, part)["default"].weight.grad for layer in (one[name], two[name])]
            assert (gradients[0] - gradients[1]).norm() <= 1e-5 * gradients[1].norm(), (name, part)


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
def test_bitsandbytes_4bit(implementation):
    pytest.importorskip("bitsandbytes")
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    # Rows of whole blocks: bitsandbytes' own kernel for CPUs is wrong for shorter ones.
    model = qwen3_moe(implementation, hidden_size=64, moe_intermediate_size=64, num_hidden_layers=1)
    dense = copy.deepcopy(model)
    packed, plain = (each.model.layers[0].mlp.experts for each in (model, dense))
    for name in STACKS:
        replace_parameter_4bit(packed, name, compress_statistics=True)
        getattr(plain, name).data.copy_(getattr(packed, name))
    with torch.no_grad():
        before = dense(IDS).logits
    names = [f"model.layers.0.mlp.experts.{name}" for name in STACKS]  # as PEFT wants them for parametrized ones
    model, dense = adapted(model, names), adapted(dense, names)
    torch.testing.assert_close(model(IDS).logits, before, rtol=1e-5, atol=1e-5)
    trained_alike(model, dense)
    compare(model, dense, lambda each: each(IDS).logits)
    with Allocations() as made:
        model(input_ids=IDS, labels=IDS).loss.backward()
    assert made.largest < 6 * 128 * 64 / 2  # the stack of gate_up
    before = model(IDS).logits
    with pytest.raises(ValueError, match=r"experts\.\w+: cannot merge into quantised experts"):
        model.merge_adapter()
    assert torch.equal(model(IDS).logits, before)


def test_a_file_for_a_model_in_4_bits(tmp_path):
    """This package adapts whole stacks only: a refusal by name, and the way out that it names."""
    pytest.importorskip("bitsandbytes")
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    def packed():
        model = qwen3_moe(hidden_size=64, moe_intermediate_size=64, num_hidden_layers=1)
        for name in STACKS:
            replace_parameter_4bit(model.model.layers[0].mlp.experts, name)
        return model

    adapted(packed(), [f"model.layers.0.mlp.experts.{name}" for name in STACKS]).save_pretrained(tmp_path)
    model = packed()
    said = r"experts\.\w+_proj: it is parametrized \(quantised\) in the model, and only PEFT adapts it: patch_peft_"
    for load in (dora_kernels.load_adapter, dora_kernels.read_adapter):
        with pytest.raises(ValueError, match=said):
            load(tmp_path, model)
    assert not dora_kernels.adapted_layers(model)
    assert len(by_name(PeftModel.from_pretrained(model, tmp_path))) == 2
    dora_kernels.load_adapter(tmp_path, qwen3_moe(hidden_size=64, moe_intermediate_size=64, num_hidden_layers=1))


def fp8(experts, plain):
    """The same weights, in blocks of float8 and as the numbers that they stand for."""
    for name in STACKS:
        weight, scale = getattr(experts, name), getattr(experts, f"{name}_scale_inv")
        weight.data.copy_((40 * torch.randn(weight.shape)).to(weight.dtype))
        scale.data.copy_(0.005 + 0.005 * torch.rand(scale.shape))
        blocks = scale.repeat_interleave(16, 1).repeat_interleave(16, 2)
        getattr(plain, name).data.copy_(weight.float() * blocks)


class Holder(nn.Module):
    def __init__(self, experts):
        super().__init__()
        self.experts = experts

    def forward(self, *args):
        return self.experts(*args)


def test_fp8():
    from transformers.integrations.finegrained_fp8 import FP8Experts
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = qwen3_moe("eager").config
    config._experts_implementation = "eager"
    packed, plain = FP8Experts(config, block_size=(16, 16)), Qwen3MoeExperts(config)
    config.hidden_size, config.moe_intermediate_size = 32, 32
    packed, plain = FP8Experts(config, block_size=(16, 16)), Qwen3MoeExperts(config)
    torch.manual_seed(0)
    fp8(packed, plain)
    x, chosen, weights = torch.randn(7, 32), torch.randint(0, 6, (7, 2)), torch.rand(7, 2)
    names = [f"experts.{name}" for name in STACKS]
    models = [adapted(Holder(each), names) for each in (packed, plain)]
    assert all(p.dtype == torch.float32 for p in models[0].parameters() if p.requires_grad)
    trained_alike(*models)
    compare(*models, lambda each: each(x, chosen, weights))


def test_fp8_on_its_own_kernels_is_refused():
    from transformers.integrations.finegrained_fp8 import FP8Experts

    config = qwen3_moe().config
    assert config._experts_implementation == "grouped_mm"
    with pytest.raises(ValueError, match=r"experts\.gate_up_proj: DoRA cannot run .*'eager'"):
        adapted(Holder(FP8Experts(config, block_size=(16, 16))), ["experts.gate_up_proj"])


def test_mxfp4_is_refused():
    from transformers.integrations.mxfp4 import Mxfp4GptOssExperts

    sizes = SimpleNamespace(num_local_experts=2, intermediate_size=32, hidden_size=32)
    with pytest.raises(ValueError, match=r"experts\.gate_up_proj: DoRA cannot run .* Mxfp4GptOssExperts .*dequantize"):
        adapted(Holder(Mxfp4GptOssExperts(sizes)), ["experts.gate_up_proj"])


def test_dropout_is_refused():
    with pytest.raises(ValueError, match=r"mlp\.experts\.gate_up_proj: lora_dropout: expected 0 .* got 0\.1"):
        adapted(qwen3_moe(), ["mlp.experts.gate_up_proj"], lora_dropout=0.1)
