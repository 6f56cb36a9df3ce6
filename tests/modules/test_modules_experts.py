"""`DoRAExperts` and `apply_dora` on stacks of experts."""

from __future__ import annotations

import copy

import pytest
import torch
from experts_models import Mixture, dense, experts, qwen3_moe, with_weights

import dora_kernels
from dora_kernels import DoRAExperts, LoRAExperts

QWEN = "transformers.models.qwen3_moe.modeling_qwen3_moe", "Qwen3MoeExperts"
GPT = "transformers.models.gpt_oss.modeling_gpt_oss", "GptOssExperts"
STACKS = ["experts.gate_up_proj", "experts.down_proj"]
IDS = torch.arange(18).view(2, 9) * 7 % 64


def adapted(which=QWEN, **options):
    mixture = Mixture(experts(*which))
    names = dora_kernels.apply_dora(mixture, [], rank=2, alpha=3, target_parameters=STACKS, **options)
    assert names == STACKS
    return mixture


def moved(mixture):
    torch.manual_seed(2)
    for layer in dora_kernels.adapted_layers(mixture).values():
        for parameter in layer.adapter_parameters().values():
            parameter.data += 0.3 * torch.randn_like(parameter)
    return mixture


@pytest.mark.parametrize("use_dora", [True, False], ids=["dora", "lora"])
@pytest.mark.parametrize("which", [QWEN, GPT], ids=["qwen3_moe", "gpt_oss"])
def test_values_and_gradients(which, use_dora):
    base = Mixture(experts(*which))()
    mixture = adapted(which, use_dora=use_dora)
    assert (mixture() - base).abs().max() <= 1e-13 * base.abs().max()
    y = moved(mixture)()
    up = torch.randn_like(y)
    y.backward(up)
    layers = dora_kernels.adapted_layers(mixture)
    assert {type(layer) for layer in layers.values()} == {DoRAExperts if use_dora else LoRAExperts}
    inner = layers["experts"]._holder()
    oracles = {}
    for layer in layers.values():
        m = layer.magnitude if use_dora else None
        oracles[layer.parameter] = dense(layer.weight, *layer.factors, m, 1.5, which is GPT)
    with with_weights(inner, {name: each.formed for name, each in oracles.items()}):
        expected = inner(*mixture.inputs)
    expected.backward(up)
    assert (y - expected).abs().max() <= 1e-10 * expected.abs().max()
    for layer in layers.values():
        for ours, part in zip(layer.factors, ("lora_A", "lora_B")):
            theirs = getattr(oracles[layer.parameter], part).grad
            assert (ours.grad - theirs).abs().max() <= 1e-9 * theirs.abs().max()


def test_merging_and_removing():
    mixture = moved(adapted())
    before, kept = mixture(), copy.deepcopy(mixture.state_dict())
    layers = dora_kernels.adapted_layers(mixture)
    for layer in layers.values():
        layer.merge()
    torch.testing.assert_close(mixture(), before, rtol=1e-10, atol=1e-10)
    assert all(torch.equal(value, kept[key]) for key, value in mixture.state_dict().items())
    for layer in layers.values():
        layer.unmerge()
    assert torch.equal(mixture(), before)
    merged = dora_kernels.merge_all(copy.deepcopy(mixture))
    assert type(merged.experts).__name__ == "Qwen3MoeExperts" and not dora_kernels.adapted_layers(merged)
    torch.testing.assert_close(merged(), before, rtol=1e-10, atol=1e-10)
    plain = dora_kernels.remove_dora(mixture)
    assert torch.equal(plain(), Mixture(experts(*QWEN))())


def test_stochastic_rounding_keeps_small_updates():
    """Each expert draws for itself; a small update is lost to nearest rounding, not to stochastic."""
    mixture = Mixture(experts(*QWEN), torch.bfloat16)
    dora_kernels.apply_dora(mixture, [], rank=2, target_parameters=STACKS)
    layer = dora_kernels.adapted_layers(mixture)["experts"]
    with torch.no_grad():
        layer.magnitude.mul_(1 + 2.0**-12)
    before = layer.weight.clone().double()
    changes = {}
    for rounding in ("nearest", "stochastic"):
        layer.merge(rounding, seed=3)
        changes[rounding] = float(((layer.weight.double() - before) / before).mean())
        again = layer.weight.clone()
        layer.unmerge()
        layer.merge(rounding, seed=3)
        assert torch.equal(layer.weight, again)
        layer.unmerge()
    assert changes["nearest"] == 0 and abs(changes["stochastic"] / 2.0**-12 - 1) < 1


def test_state_dict_strength_and_norms():
    mixture = moved(adapted())
    expected = mixture()
    state = dora_kernels.dora_state_dict(mixture)
    assert sorted(state) == [
        f"experts.{inside}{part}" for inside in ("base_layer.", "")
        for part in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
    ]  # fmt: skip
    other = adapted()
    other.load_state_dict(state, strict=False)
    assert torch.equal(other(), expected)
    with dora_kernels.frozen_norms(mixture) as frozen:
        assert len(frozen) == 2 and torch.equal(mixture(), expected)
    base = dora_kernels.remove_dora(adapted())()
    for strength, wanted in ((0.0, base), (1.0, expected)):
        dora_kernels.set_dora_strength(mixture, strength)
        assert torch.equal(mixture(), wanted)


def test_a_whole_model():
    """All its layers and stacks; like PEFT's with the same values."""
    model = qwen3_moe()
    names = dora_kernels.apply_dora(model, ["q_proj"], rank=2, target_parameters=STACKS, rank_pattern={"down_proj": 3})
    assert len(names) == 6
    dora_kernels.mark_only_dora_trainable(model)
    model(input_ids=IDS, labels=IDS).loss.backward()
    layers = dora_kernels.adapted_layers(model)
    assert {layer.rank for layer in layers.values()} == {2, 3}
    assert all(p.grad is not None for layer in layers.values() for p in layer.adapter_parameters().values())


WRONG = {
    "name": ({"target_parameters": ["experts.nothing"]}, ValueError, "the model has no 'experts.nothing'"),
    "string": ({"target_parameters": "experts"}, TypeError, "target_parameters: expected a list of names"),
    "dropout": ({"dropout": 0.1}, ValueError, r"experts\.gate_up_proj: dropout: expected 0 for experts, got 0\.1"),
    "axis": ({"magnitude_axis": "in"}, ValueError, "gate_up_proj: magnitude_axis: expected 'out' for experts"),
    "gradient": ({"detach_norm": False}, ValueError, "detach_norm: expected True for experts, got False"),
    "rank": ({"rank": 0}, ValueError, "rank"),
}


@pytest.mark.parametrize(("options", "error", "said"), WRONG.values(), ids=list(WRONG))
def test_wrong_arguments(options, error, said):
    """The model is as it was."""
    mixture = Mixture(experts(*QWEN))
    before = {name: (p.requires_grad, p.clone()) for name, p in mixture.named_parameters()}
    with pytest.raises(error, match=said):
        dora_kernels.apply_dora(mixture, [], **{"rank": 2, "target_parameters": STACKS, **options})
    now = dict(mixture.named_parameters())
    assert now.keys() == before.keys() and not dora_kernels.adapted_layers(mixture)
    assert all(now[name].requires_grad == flag and torch.equal(now[name], p) for name, (flag, p) in before.items())


def test_a_parameter_that_is_no_stack():
    with pytest.raises(TypeError, match=r"gate\.weight: expected a stack of experts with 3 dimensions, got \[6, 32\]"):
        dora_kernels.apply_dora(qwen3_moe(), [], rank=2, target_parameters=["mlp.gate.weight"])


def test_a_stack_that_is_not_finite():
    mixture = Mixture(experts(*QWEN))
    mixture.experts.down_proj.data[1, 2, 3] = torch.nan
    with pytest.raises(ValueError, match=r"experts\.down_proj: base_layer: its weight has values that are not finite"):
        dora_kernels.apply_dora(mixture, [], rank=2, target_parameters=STACKS)


def test_adapted_twice():
    with pytest.raises(ValueError, match="adapted already"):
        dora_kernels.apply_dora(adapted(), [], rank=2, target_parameters=["base_layer.down_proj"])


def test_read_the_other_way_round():
    """A stack whose orientation is not the declared one gives an error, not another function."""
    mixture = adapted(GPT)
    mixture.experts._holder().is_transposed = False
    with pytest.raises((dora_kernels.UnsupportedError, RuntimeError, ValueError)):
        mixture()
