"""Which layers `apply_dora` takes: what "all-linear" leaves out and says, names that match nothing, hopeless calls."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from torch import nn

from dora_kernels import DoRALinear, adapted_layers, apply_dora, attach, extract, load_adapter, save_adapter


class MyLinear(nn.Linear):
    pass


class Packed(nn.Module):
    """A linear layer to the eye alone, as some quantised layers."""

    in_features = out_features = 8


def net(**layers):
    return nn.ModuleDict({"first": nn.Linear(8, 8), **layers})


def warned(call):
    """What is said, from the caller's line."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    assert all(one.filename == __file__ and one.category is UserWarning for one in caught)
    return [str(one.message) for one in caught]


def test_all_linear_leaves_out_what_it_cannot_adapt():
    class Weight(nn.Parameter):
        pass

    foreign = nn.Linear(8, 8)
    foreign.weight = Weight(torch.ones(8, 8))
    integers = nn.Linear(8, 8)
    integers.weight = nn.Parameter(torch.ones(8, 8, dtype=torch.int8), requires_grad=False)
    hooked = nn.Linear(8, 8)
    hooked.register_forward_hook(lambda *_: None)
    model = net(encoder=nn.TransformerEncoderLayer(8, 2, 8), own=MyLinear(8, 8), other=MyLinear(8, 8),
                packed=Packed(), lazy=nn.LazyLinear(8),
                integers=integers, foreign=foreign, hooked=hooked, attention=nn.MultiheadAttention(8, 2))  # fmt: skip
    (text,) = warned(lambda: apply_dora(model, rank=2))
    assert list(adapted_layers(model)) == ["first"]
    for part in (
        "'all-linear' leaves out encoder.self_attn.out_proj, attention.out_proj: MultiheadAttention reads the weight",
        "; encoder.linear1, encoder.linear2: TransformerEncoderLayer reads the weight itself",
        "; own, other: expected a plain nn.Linear, ",
        "; packed: expected a plain nn.Linear, ",
        "; lazy: expected a plain nn.Linear, ",
        "; integers: expected a weight in float32, bfloat16, float16 or float64, got torch.int8",
        "; foreign: the layer is quantised (torch.nn.modules.linear.Linear, weight Weight); use PEFT to adapt it, and "
        "dora_kernels.patch_peft to run that",
        "; hooked: the layer has hooks or a replaced forward",
    ):
        assert part in text
    named = ["encoder.linear1", "own", "other", "packed", "integers", "foreign", "hooked", "lazy"]
    for name in named:
        with pytest.raises((TypeError, ValueError), match=rf"{name}: .*; leave it out with exclude_modules=\['{name}"):
            apply_dora(model, [name])
    assert not warned(lambda: apply_dora(net(own=MyLinear(8, 8)), exclude_modules=["own"]))


def test_bitsandbytes():
    bnb = pytest.importorskip("bitsandbytes")
    model = net(four=bnb.nn.Linear4bit(8, 8), eight=bnb.nn.Linear8bitLt(8, 8, has_fp16_weights=False))
    (text,) = warned(lambda: apply_dora(model, rank=2))
    assert list(adapted_layers(model)) == ["first"]
    for name in ("four", "eight"):
        assert re.search(rf"{name}: the layer is quantised \(bitsandbytes.*; use PEFT to adapt it, .*patch_peft", text)


def test_nothing_that_can_be_adapted():
    model = nn.Sequential(MyLinear(8, 8))
    with pytest.raises(ValueError, match="'all-linear' finds no layer that can be adapted: 0: expected a plain nn"):
        apply_dora(model)
    for layer, make in ((nn.Linear(2, 2), "DoRALinear.from_linear"), (nn.Embedding(2, 2), "DoRAEmbedding.from_base")):
        with pytest.raises(ValueError, match=rf"model: it is itself a layer.*; use {make}\(model"):
            apply_dora(layer)
        assert layer.weight.requires_grad


def test_an_adapter_for_a_layer_that_cannot_have_one(tmp_path):
    """No word of `apply_dora`'s arguments."""
    model = net()
    apply_dora(model, rank=2)
    other = nn.ModuleDict({"first": MyLinear(8, 8)})
    calls = [lambda: attach(other, extract(model))]
    if pytest.importorskip("safetensors"):
        save_adapter(model, tmp_path)
        calls.append(lambda: load_adapter(tmp_path, other))
    for call in calls:
        with pytest.raises(TypeError, match=r"first: expected a plain nn.Linear, .*MyLinear$"):
            call()


def test_names_that_match_nothing():
    model = net(second=nn.Linear(8, 8), block=nn.Sequential(nn.Linear(8, 8)))
    said = warned(lambda: apply_dora(
        model, ["first", "lock.0", "block.0", "third", "irst"], exclude_modules=["second", "fourth"],
        rank_pattern={"first": 2, "second": 3, r"block\.\d": 4}, alpha_pattern={"nope": 1.0},
    ))  # fmt: skip
    assert said == [
        "target_modules: the model has no 'lock.0' (the nearest is 'block.0'), 'third', 'irst' ("
        "the nearest is 'first')",
        "exclude_modules: the model has no 'fourth'",
        "rank_pattern: no adapted layer is 'second'",
        "alpha_pattern: no adapted layer is 'nope'",
    ]
    assert {name: layer.rank for name, layer in adapted_layers(model).items()} == {"first": 2, "block.0": 4}
    said = warned(lambda: apply_dora(model, ["second"], exclude_modules="x.*"))
    assert said == ["exclude_modules: the model has no 'x.*'"]


def test_a_rank_above_the_smaller_side():
    """One warning for all layers; PEFT says nothing, and so does a layer, whose caller gives sizes and rank at once."""
    layers = {f"layer{i}": nn.Linear(8, 5) for i in range(4)}
    convolutions = {"wide": nn.Conv2d(4, 4, 3, groups=2), "narrow": nn.Conv2d(8, 3, 1)}
    model = net(exact=nn.Linear(6, 40), **layers, **convolutions)
    names = ["exact", *layers, *convolutions]
    said = warned(lambda: apply_dora(model, names, rank=6, rank_pattern={"wide": 4, "narrow": 4}))
    assert [text for text in said if text.startswith("rank:")] == [
        "rank: above the smaller side of a layer's weight it adds parameters and no freedom: layer0 (rank 6, 5x8), "
        "layer1 (rank 6, 5x8), layer2 (rank 6, 5x8) and 2 more"
    ]
    assert model.narrow.rank == 4 and model.wide.rank == 4
    assert warned(lambda: apply_dora(net(exact=nn.Linear(6, 40)), ["exact"], rank=6)) == []
    assert warned(lambda: DoRALinear(8, 5, rank=6)) == []


def test_warnings_as_errors_leave_the_model_alone():
    model = net(own=MyLinear(8, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="'all-linear' leaves out own"):
            apply_dora(model)
    assert not adapted_layers(model) and all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_base_layers_of_other_dtypes(dtype):
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.ones(4, 4).to(dtype), requires_grad=False)
    with pytest.raises(TypeError, match=f"base_layer: expected a weight in float32, .* got {dtype}"):
        DoRALinear.from_linear(layer, rank=2)
    with pytest.raises(TypeError, match="adapter_dtype: expected float32, .* got torch.int8"):
        DoRALinear(4, 4, rank=2, adapter_dtype=torch.int8)


class Experts(nn.Module):
    """As transformers 5 has them: one tensor for all, which no layer holds."""

    def __init__(self, **shapes):
        super().__init__()
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.ones(shape)))


def test_all_linear_says_which_experts_it_leaves():
    """Not tokens and positions, which are one matrix, nor convolutions."""
    model = net(experts=Experts(gate_up_proj=(4, 8, 16), down_proj=(4, 8, 8)), token=Experts(cls=(1, 5, 8)),
                conv=nn.Conv1d(8, 8, 3))  # fmt: skip
    assert warned(lambda: apply_dora(model, rank=2)) == [
        "'all-linear' leaves out experts.gate_up_proj [4, 8, 16], experts.down_proj [4, 8, 8]: three-dimensional "
        "parameters (stacked experts) are adapted by target_parameters"
    ]
    assert not warned(lambda: apply_dora(net(experts=Experts(up=(4, 8, 16))), ["first"], rank=2))
    many = net(**{f"experts{i}": Experts(up=(2, 2, 2)) for i in range(5)})
    (text,) = warned(lambda: apply_dora(many, rank=2))
    assert "experts2.up [2, 2, 2] and 2 more: " in text


def test_stacks_are_no_modules():
    """What is said names the argument that adapts them, unless they are named there as well."""

    def model():
        return net(experts=Experts(up=(4, 8, 16), down=(4, 16, 8)), down=nn.Linear(8, 8))

    beside = "experts.down [4, 16, 8]: three-dimensional parameters (stacked experts) are adapted by target_parameters"
    with pytest.raises(ValueError, match=rf"'experts\.down'\] matches no layer .*; {re.escape(beside)}$"):
        apply_dora(model(), ["experts.down"])
    names = ["up", "down"]
    (text,) = warned(lambda: apply_dora(model(), names, rank=2))
    assert text == f"target_modules leaves out experts.up [4, 8, 16], {beside}"
    assert not warned(lambda: apply_dora(model(), names, rank=2, target_parameters=["experts.up", "experts.down"]))
    for targets, start in ((names, "target_modules"), ("all-linear", "'all-linear'")):
        (text,) = warned(lambda named=targets: apply_dora(model(), named, rank=2, target_parameters=["experts.up"]))
        assert text == f"{start} leaves out {beside}"
    shared = model()
    shared.again = shared.experts
    assert not warned(lambda: apply_dora(shared, rank=2, target_parameters=["experts.up", "experts.down"]))


def test_parameters_that_are_no_stacks():
    model = net(gate=Experts(weight=(4, 8)), bias=Experts(bias=(8,)))
    cases = {
        "gate.weight": (
            TypeError,
            r"got \[4, 8\]; a parameter of two dimensions, such as a router's, is .* under PEFT only",
        ),
        "first.weight": (TypeError, r"got \[8, 8\]; it is a layer's weight: name the layer in target_modules"),
        "bias.bias": (TypeError, r"bias\.bias: expected a stack of experts with 3 dimensions, got \[8\]$"),
        "gate.wait": (ValueError, r"the model has no 'gate\.wait' \(the nearest is 'gate\.weight'\)$"),
    }
    for name, (kind, said) in cases.items():
        with pytest.raises(kind, match=said):
            apply_dora(model, [], target_parameters=[name])
    assert not adapted_layers(model)


def test_experts_of_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                                        num_key_value_heads=1, vocab_size=20, num_local_experts=3)  # fmt: skip
    model = transformers.MixtralForCausalLM(config)
    if not any(parameter.dim() == 3 for parameter in model.parameters()):
        pytest.skip("a layer for each expert, before transformers 5")
    (text,) = [each for each in warned(lambda: apply_dora(model, rank=2)) if "three-dimensional" in each]
    assert "layers.0.mlp.experts.gate_up_proj [3, 32, 8]" in text
