"""`DoRAExperts` and `apply_dora` on stacks of experts."""

from __future__ import annotations

import copy
import re
import warnings

import pytest
import torch
from experts_models import Mixture, dense, experts, qwen3_moe, with_weights
from safetensors.torch import load_file

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
    """The second of two stacks too, however they nest; the model is as it was."""
    mixture = adapted()
    before = copy.deepcopy(mixture.state_dict())
    for one in STACKS:
        with pytest.raises(ValueError, match=rf"{re.escape(one)}: the parameter is adapted already$"):
            dora_kernels.apply_dora(mixture, [], rank=2, target_parameters=[one])
    with pytest.raises(ValueError, match="the model has no 'experts.nothing'"):
        dora_kernels.apply_dora(mixture, [], rank=2, target_parameters=["experts.nothing"])
    with pytest.raises(ValueError, match="parameter: 'gate_up_proj' is adapted already, by base_layer"):
        DoRAExperts(mixture.experts, "gate_up_proj", rank=2)
    assert mixture.state_dict().keys() == before.keys()


def test_merging_stacks_that_share_a_weight():
    """The advice of the error is what to do, for the layer inside too."""
    mixtures = [Mixture(experts(*QWEN)) for _ in range(2)]
    for stack in ("gate_up_proj", "down_proj"):
        setattr(mixtures[1].experts, stack, getattr(mixtures[0].experts, stack))
    model = torch.nn.ModuleList(mixtures)
    dora_kernels.apply_dora(model, [], rank=2, target_parameters=STACKS)
    layers = {layer.parameter: layer for name, layer in dora_kernels.adapted_layers(model).items() if "0." in name}
    for stack, own in (("down_proj", "base_layer.base_layer"), ("gate_up_proj", "base_layer")):
        with pytest.raises(ValueError, match=rf"0\.experts\.{stack}: .* shared with 1\.experts\.{stack}, ") as caught:
            dora_kernels.merge_all(model)
        advice = str(caught.value).partition("first: ")[2]
        assert advice.startswith(f"layer.{own}.{stack} = ")
        exec(advice, {"layer": layers[stack], "nn": torch.nn})
    dora_kernels.merge_all(model)


def test_a_module_that_has_no_parent():
    """Adapted or not."""
    module = experts(*QWEN).float()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    for model in (module, DoRAExperts(module, "gate_up_proj", rank=2)):
        with pytest.raises(ValueError, match=r"itself the module of down_proj, .* use DoRAExperts\(model, 'down_proj'"):
            dora_kernels.apply_dora(model, [], rank=2, target_parameters=["down_proj"])


def test_adapted_by_peft():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=STACKS)
    model = peft.get_peft_model(qwen3_moe(), config)
    said = r"experts\.(gate_up|down)_proj: the parameter is adapted already, by PEFT; use dora_kernels\.patch_peft"
    with pytest.raises(ValueError, match=said):
        dora_kernels.apply_dora(model, [], rank=2, target_parameters=STACKS)


@pytest.mark.parametrize("order", [STACKS, STACKS[::-1]], ids=["inside_first", "outside_first"])
def test_one_stack_after_the_other(order, tmp_path):
    """The layers nest as those of one call, so state dicts and files are the same."""
    together = moved(adapted())
    mixture = Mixture(experts(*QWEN))
    mixture.experts.gate_up_proj.requires_grad_(False)
    for one in order:
        assert dora_kernels.apply_dora(mixture, [], rank=2, alpha=3, target_parameters=[one]) == [one]
    mixture.load_state_dict(together.state_dict())
    assert torch.equal(mixture(), together())
    for each, folder in ((mixture, "one"), (together, "two")):
        dora_kernels.save_adapter(each, tmp_path / folder)
    one, two = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    merged = dora_kernels.merge_all(copy.deepcopy(mixture))
    torch.testing.assert_close(merged(), together(), rtol=1e-10, atol=1e-10)
    plain = dora_kernels.remove_dora(mixture)
    flags = {name: parameter.requires_grad for name, parameter in plain.named_parameters()}
    assert flags == {"experts.gate_up_proj": False, "experts.down_proj": True}


def test_what_a_second_call_says_of_adapted_stacks():
    """Nothing: "all-linear" leaves none of them out."""
    model = qwen3_moe()
    dora_kernels.apply_dora(model, [], rank=2, target_parameters=STACKS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dora_kernels.apply_dora(model, rank=2)
    for one in STACKS:  # whichever of them nests in the other
        other = next(each for each in STACKS if each != one)
        model = qwen3_moe()
        dora_kernels.apply_dora(model, [], rank=2, target_parameters=[other])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            dora_kernels.apply_dora(model, rank=2, target_parameters=[one])


def test_a_call_that_fails_thaws_all_of_the_module():
    """Parameters of modules inside it too."""
    mixture = Mixture(experts(*QWEN))
    mixture.experts.add_module("scale", torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="rank"):
        dora_kernels.apply_dora(mixture, [], rank=2, target_parameters=STACKS, rank_pattern={"down_proj": 0})
    assert all(parameter.requires_grad for parameter in mixture.parameters())


def test_read_the_other_way_round():
    """A stack whose orientation is not the declared one gives an error, not another function."""
    mixture = adapted(GPT)
    mixture.experts._holder().is_transposed = False
    with pytest.raises((dora_kernels.UnsupportedError, RuntimeError, ValueError)):
        mixture()
