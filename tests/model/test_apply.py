"""`apply_dora` and what goes with it: which layers it takes, shared and tied ones, what it refuses, merging, counts."""

from __future__ import annotations

import copy
import functools
import re

import pytest
import torch
import torch.nn.utils.prune
from helpers import bf16, f32, f64
from torch import nn

from dora_kernels import (
    DoRAConv1d,
    DoRAConv2d,
    DoRAEmbedding,
    DoRALinear,
    LoRALinear,
    adapted_layers,
    apply_dora,
    attach,
    dora_state_dict,
    extract,
    mark_only_dora_trainable,
    merge_all,
    remove_dora,
    trainable_summary,
)


class Net(nn.Module):
    """Layers of every kind, one that is there twice, and a head that is tied to the embedding."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.block = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
        self.again = self.block[0]
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        x = self.conv(self.embedding(x).transpose(1, 2)).transpose(1, 2)
        return self.head(self.norm(self.again(self.block(x))))

    def get_output_embeddings(self):
        return self.head


X = torch.arange(20).view(4, 5) % 11
EVERYTHING = ["embedding", "conv", "0", "2", "head"]


def moved(model):
    """Adapters far from their start."""
    torch.manual_seed(1)
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            for parameter in layer.adapter_parameters().values():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def snapshot(model):
    """Everything that a failed call may not change."""
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    return repr(model), flags, {name: t.clone() for name, t in model.state_dict().items()}, model(X).detach()


def unchanged(model, before):
    now = snapshot(model)
    same = all(torch.equal(t, now[2][name]) for name, t in before[2].items())
    return now[:2] == before[:2] and now[2].keys() == before[2].keys() and same and torch.equal(now[3], before[3])


def same_state(model, before):
    state = model.state_dict()
    assert list(state) == list(before[2]) and all(torch.equal(t, before[2][name]) for name, t in state.items())
    torch.testing.assert_close(model(X), before[3])  # frozen layers may take another kernel


TARGETS = [
    ("all-linear", None, ["block.0", "block.2"]),
    ("All-Linear", ["2"], ["block.0"]),
    ([*EVERYTHING], None, ["embedding", "conv", "block.0", "block.2", "head"]),
    (["again"], None, ["again"]),
    (("block.2",), None, ["block.2"]),
    (["lock.2", "head"], None, ["head"]),
    (r".*\.[02]", None, ["block.0", "block.2"]),
    (r"block", r"block", None),
    (r"block\.(0|2)|conv", r".*\.0", ["conv", "block.2"]),
    (["conv", "head"], ["head"], ["conv"]),
]


@pytest.mark.parametrize("targets, excluded, names", TARGETS, ids=str)
def test_targets(targets, excluded, names):
    model = Net()
    before = snapshot(model)
    if names is None:
        with pytest.raises(ValueError, match="exclude_modules: 'block' excludes every layer that target_modules"):
            apply_dora(model, targets, exclude_modules=excluded)
        assert unchanged(model, before)
        return
    assert apply_dora(model, targets, exclude_modules=excluded) == names
    kinds = {"embedding": DoRAEmbedding, "conv": DoRAConv1d}
    for name in names:
        assert type(model.get_submodule(name)) is kinds.get(name, DoRALinear)
    assert len(adapted_layers(model)) == len(names)
    torch.testing.assert_close(model(X), before[3])


def test_options_reach_the_layers():
    model = Net()
    options = {"magnitude_axis": "in", "detach_norm": False, "eps": 0.25, "backend": "torch", "dropout": 0.125}
    apply_dora(
        model, EVERYTHING, rank=4, alpha=8, use_rslora=True, adapter_dtype=f64, rank_pattern={"block.0": 2, "k.2": 3},
        alpha_pattern={r"\d": 5, "block.2": 7}, **options,
    )  # fmt: skip
    layers = adapted_layers(model)
    assert {name: layer.rank for name, layer in layers.items()} == {
        "embedding": 4, "conv": 4, "block.0": 2, "block.2": 4, "head": 4
    }  # fmt: skip
    assert [layer.alpha for layer in layers.values()] == [8, 8, 5, 5, 8]
    for layer in layers.values():
        assert layer.scaling == layer.alpha / layer.rank**0.5
        assert {name: getattr(layer, name) for name in options if name != "dropout"} | {
            "dropout": layer.dropout.p
        } == options
        assert {p.dtype for p in layer.adapter_parameters().values()} == {f64}


def test_plain_lora():
    model = Net()
    assert apply_dora(model, use_dora=False, rank=2) == ["block.0", "block.2"]
    assert {type(layer) for layer in adapted_layers(model).values()} == {LoRALinear}
    assert merge_all(moved(model)) is model and not adapted_layers(model)


def test_a_shared_layer_is_adapted_once_and_put_back_everywhere():
    model = Net()
    shared, before = model.again, snapshot(model)
    apply_dora(model)
    assert model.again is model.block[0] and model.again.base_layer is shared
    assert list(adapted_layers(model)) == ["block.0", "block.2"]
    assert not torch.equal(moved(model)(X), before[3])
    assert remove_dora(model) is model
    assert model.again is model.block[0] is shared
    same_state(model, before)


def test_tied_weights_have_adapters_of_their_own():
    model = Net()
    apply_dora(model, EVERYTHING, rank=2)
    assert model.embedding.base_layer.weight is model.head.base_layer.weight
    moved(model)
    y = model(X)
    y.sum().backward()
    assert all(model.get_parameter(name).grad is not None for name in dora_state_dict(model))
    table, head = (layer.base_layer.weight + layer.scaling * product for layer, product in (
        (model.embedding, (model.embedding.lora_embedding_B @ model.embedding.lora_embedding_A).T),
        (model.head, model.head.lora_B.weight @ model.head.lora_A.weight),
    ))  # fmt: skip
    plain = copy.deepcopy(model)
    plain.embedding = nn.Embedding.from_pretrained(model.embedding.magnitude / table.norm(dim=0) * table)
    plain.head = nn.Linear(8, 11, bias=False)
    plain.head.weight = nn.Parameter(model.head.magnitude.view(-1, 1) / head.norm(dim=1, keepdim=True) * head)
    torch.testing.assert_close(plain(X), y)


@pytest.mark.parametrize("targets, other", [(["embedding"], r"head\.weight"), (["head"], r"embedding\.weight"),
                                            (["embedding", "head"], "head")])  # fmt: skip
def test_merging_refuses_tied_weights(targets, other):
    model = Net()
    apply_dora(model, [*targets, "2"], rank=2)
    before = snapshot(moved(model))
    with pytest.raises(ValueError, match=f"its weight is shared with {other}, which merging would also change"):
        merge_all(model)
    assert unchanged(model, before)
    layer = adapted_layers(model)[targets[0]]
    layer.base_layer.weight = nn.Parameter(layer.base_layer.weight.clone())
    torch.testing.assert_close(merge_all(model)(X), before[3])


@pytest.mark.parametrize("first", ["adapted", "held"])
def test_merging_refuses_a_base_layer_that_is_held_elsewhere(first):
    """Whichever comes first in the model."""
    base = nn.Linear(4, 4)
    modules = {"adapted": DoRALinear.from_linear(base, rank=2), "held": base}
    model = nn.ModuleDict({name: modules[name] for name in (first, *(modules.keys() - {first}))})
    before = base.weight.clone()
    with pytest.raises(ValueError, match=r"adapted: its weight is shared with held\.weight"):
        merge_all(model)
    assert torch.equal(base.weight, before) and not model["adapted"].merged


@pytest.mark.parametrize("dtype", [f32, bf16])
def test_merge_all(dtype):
    model = Net().to(dtype)
    apply_dora(model, ["conv", "0", "2"], rank=2)
    moved(model)
    model.conv.strength = 0.5
    model.block[2].merge()
    wanted = model(X)
    bare = Net().to(dtype)
    assert merge_all(model) is model
    assert list(model.state_dict()) == list(bare.state_dict()) and repr(model) == repr(bare)
    tolerance = {} if dtype == f32 else {"rtol": 0.03, "atol": 0.06}
    torch.testing.assert_close(model(X), wanted, **tolerance)
    with pytest.raises(ValueError, match="model: it has no adapted layers"):
        merge_all(model)


def test_merging_with_stochastic_rounding():
    merged = []
    for seed in (3, 3, 4):
        model = moved_copy(bf16)
        merged.append(merge_all(model, "stochastic", seed).block[2].weight)
    assert torch.equal(merged[0], merged[1]) and not torch.equal(merged[0], merged[2])
    twins = nn.ModuleList([nn.Linear(8, 8, dtype=bf16)])
    twins.append(copy.deepcopy(twins[0]))
    apply_dora(twins, rank=1)
    with torch.no_grad():
        for layer in twins:
            layer.magnitude.mul_(1.001)
            layer.lora_A.weight.copy_(twins[0].lora_A.weight)
    merge_all(twins, "stochastic", 3)
    assert not torch.equal(twins[0].weight, twins[1].weight), "two layers drew the same"
    model = moved_copy(f32)
    before = snapshot(model)
    with pytest.raises(ValueError, match="rounding: expected 'nearest' or 'stochastic', got 'up'"):
        merge_all(model, "up")
    assert unchanged(model, before)


def moved_copy(dtype):
    model = Net().to(dtype)
    apply_dora(model, ["conv", "0", "2"], rank=2)
    return moved(model)


def test_merging_refuses_groups():
    model = nn.Sequential(*(nn.Conv2d(4, 4, 3, padding=1, groups=groups) for groups in (1, 2, 2)))
    kept = r"use extract and attach, or safetensors\.torch\.save_file\(dora_state_dict\(model\), \.\.\.\)"
    with pytest.warns(UserWarning) as warned:
        apply_dora(model, ["0", "1", "2"], rank=2)
    (warning,) = warned
    assert re.fullmatch(rf"1, 2: .* groups can be neither merged nor saved to a file; {kept}", str(warning.message))
    assert warning.filename == __file__
    weight = model[0].base_layer.weight.clone()
    with pytest.raises(ValueError, match=rf"1: the layer cannot be merged: its update reads all channels.*{kept}"):
        merge_all(model)
    assert type(model[0]) is DoRAConv2d and torch.equal(model[0].base_layer.weight, weight)


def test_remove_unmerges():
    model = Net()
    before = snapshot(model)
    apply_dora(model)
    for layer in adapted_layers(moved(model)).values():
        layer.merge()
    same_state(remove_dora(model), before)


def test_what_trains_and_is_counted():
    model = Net()
    apply_dora(model, EVERYTHING, rank=2, alpha=4)
    summary = trainable_summary(model)
    assert summary.total == sum(p.numel() for p in model.parameters())
    assert summary.trainable == summary.total - 11 * 8 - (8 * 8 * 3 + 8) - 2 * (8 * 8 + 8)
    mark_only_dora_trainable(model)
    summary = trainable_summary(model)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names == set(dora_state_dict(model)) and len(names) == 15
    assert summary.layers == {
        "embedding": 11 * 2 + 2 * 8 + 8, "conv": 2 * 24 + 8 * 2 + 8, "block.0": 40, "block.2": 40,
        "head": 8 * 2 + 2 * 11 + 11,
    }  # fmt: skip
    assert summary.trainable == sum(summary.layers.values()) and summary.share == summary.trainable / summary.total
    with pytest.raises(ValueError, match=r"call apply_dora\(model\) first"):
        mark_only_dora_trainable(Net())


@pytest.mark.parametrize("end", [remove_dora, merge_all])
def test_what_trained_trains_again(end):
    """Of the base layers, also through `attach`; what else was frozen is the caller's."""
    model = Net()
    model.block[2].bias.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    apply_dora(model, ["conv", "0", "2"], rank=4)
    other = Net()
    apply_dora(other, ["conv", "0", "2"], rank=2)
    attach(model, extract(other))
    end(copy.deepcopy(model))
    end(model)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    apply_dora(model, ["conv", "0", "2"], rank=2)
    mark_only_dora_trainable(model)
    end(model)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained == ["conv.weight", "conv.bias", "block.0.weight", "block.0.bias", "block.2.weight"]


def test_state_dict_round_trip():
    models = [moved_copy(f32), Net()]
    apply_dora(models[1], ["conv", "0", "2"], rank=2)
    state = dora_state_dict(models[0])
    assert sorted(name for name in state if name.startswith("conv")) == [
        "conv.lora_A.weight", "conv.lora_B.weight", "conv.lora_magnitude_vector"
    ]  # fmt: skip
    result = models[1].load_state_dict(state, strict=False)
    assert not result.unexpected_keys
    missing = {name for name in result.missing_keys if "lora_" in name}
    assert missing == {f"again.{name}" for name in models[1].again.state_names}, "the shared layer's other name alone"
    assert torch.equal(models[0](X), models[1](X))


def hooked(model):
    model.block[2].register_forward_hook(lambda *_: None)


def wrapped(model):
    model.block[2].forward = functools.partial(nn.Linear.forward, model.block[2])


def parametrized(model):
    nn.utils.parametrizations.weight_norm(model.block[2])


def derived(model):
    model.block[2] = type("MyLinear", (nn.Linear,), {})(8, 8)


def integers(model):
    model.block[2].weight = nn.Parameter(torch.ones(8, 8, dtype=torch.int8), requires_grad=False)
    model.block[2].forward = lambda x: x


def fp8(model):
    model.block[2].weight = nn.Parameter(torch.ones(8, 8).to(torch.float8_e4m3fn), requires_grad=False)
    model.block[2].forward = lambda x: x


def pruned(model):
    nn.utils.prune.l1_unstructured(model.block[2], "weight", 0.3)


NAMED = {"target_modules": ["0", "2"]}
LEAVE = r"; leave it out with exclude_modules=\['block\.2'\]"
REFUSED = [
    (hooked, NAMED, ValueError, rf"block\.2: the layer has hooks or a replaced forward.*{LEAVE}"),
    (wrapped, NAMED, ValueError, rf"block\.2: the layer has hooks or a replaced forward.*{LEAVE}"),
    (parametrized, NAMED, ValueError, rf"block\.2: the layer is parametrized.*{LEAVE}"),
    (derived, NAMED, TypeError, rf"block\.2: expected a plain nn\.Linear, .* got .*MyLinear{LEAVE}"),
    (integers, NAMED, TypeError, rf"block\.2: expected a weight in float32, .* got torch.int8{LEAVE}"),
    (fp8, NAMED, TypeError, rf"block\.2: expected a weight in float32, .* got torch.float8_e4m3fn{LEAVE}"),
    (pruned, NAMED, ValueError, rf"block\.2: the weight is .* computed in each forward by L1Unstructured .*{LEAVE}"),
    (None, {"target_modules": ["0", "norm"]}, TypeError, "norm: expected a plain .* got .*LayerNorm"),
    (None, {"target_modules": ".*"}, TypeError, "block: expected a plain .* got .*Sequential"),
    (None, {"target_modules": ["0", "conv"], "use_dora": False}, TypeError, "conv: use_dora=False is for linear"),
    (None, {"target_modules": 3}, TypeError, "target_modules: expected a regular expression or names, got 3"),
    (None, {"target_modules": ["nothing"]}, ValueError, r"target_modules: \['nothing'\] matches no layer"),
    (None, {"target_modules": "(0"}, ValueError, r"target_modules: '\(0' is not a regular expression: missing \)"),
    (None, {"exclude_modules": "["}, ValueError, r"exclude_modules: '\[' is not a regular expression"),
    (None, {"rank_pattern": {"*": 2}}, ValueError, r"rank_pattern: '\*' is not a regular expression: nothing to"),
    (None, {"alpha_pattern": ["2"]}, TypeError, r"alpha_pattern: expected a mapping of regular .*, got \['2'\]"),
    (None, {"adapter_dtype": "bfloat16"}, TypeError, "adapter_dtype: expected float32, .* got 'bfloat16'"),
    (None, {"adapter_dtype": torch.int8}, TypeError, "adapter_dtype: expected .* got torch.int8"),
    (None, {"exclude_modules": ["0", "2", "again"]}, ValueError, "exclude_modules: .* excludes every layer that"),
    (None, {"rank_pattern": {"2": 0}}, ValueError, r"block\.2: rank: expected at least 1, got 0"),
    (None, {"alpha_pattern": {"2": "x"}}, TypeError, r"block\.2: alpha: expected a number, got str"),
    (None, {"magnitude_axis": "rows"}, ValueError, "magnitude_axis: expected 'out' or 'in'"),
    (None, {"eps": -1.0}, ValueError, "eps: expected a finite number of at least 0"),
    (None, {"backend": "cuda"}, ValueError, "backend: expected one of"),
]


@pytest.mark.parametrize("change, options, error, message", REFUSED, ids=lambda v: getattr(v, "__name__", str(v)[:40]))
def test_what_is_refused_leaves_the_model_as_it_was(change, options, error, message):
    model = Net()
    if change is not None:
        change(model)
    before = snapshot(model)
    with pytest.raises(error, match=message):
        apply_dora(model, **options)
    assert unchanged(model, before)


def test_adapted_already():
    model = moved_copy(f32)
    before = snapshot(model)
    for targets in ("all-linear", ["conv"], ["base_layer"], ["embedding", "lora_A"]):
        with pytest.raises(ValueError, match="the layer is adapted already"):
            apply_dora(model, targets)
        assert unchanged(model, before)
    apply_dora(model, ["embedding"])


def test_attention_and_encoder_layers():
    """Their own code reads the weights, so an adapter would be left out, in evaluation or always."""
    attention = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "out": nn.Linear(8, 8)})
    with pytest.raises(TypeError, match=r"attention\.out_proj: MultiheadAttention reads the weight itself"):
        apply_dora(attention, ["out_proj"])
    with pytest.warns(UserWarning, match="leaves out attention.out_proj: MultiheadAttention reads the weight itself"):
        assert apply_dora(attention) == ["out"]
    encoder = nn.TransformerEncoderLayer(8, 2)
    with pytest.raises(TypeError, match=r"linear1: TransformerEncoderLayer reads the weight itself"):
        apply_dora(encoder, ["linear1"])
    with pytest.raises(ValueError, match=r"'all-linear' finds no layer .*[:;] linear1, linear2: TransformerEncoder"):
        apply_dora(encoder)


def test_a_model_of_peft():
    """It has adapters, but none that these functions merge or save: PEFT's own do."""
    model = nn.Sequential(nn.Linear(2, 2))
    model.peft_config = {}
    for call, name in ((merge_all, "merge_and_unload"), (remove_dora, "unload"), (extract, "save_pretrained")):
        with pytest.raises(ValueError, match=rf"for a PEFT model call model\.{name}\("):
            call(model)


def test_no_model():
    for call in (apply_dora, adapted_layers, remove_dora, merge_all, mark_only_dora_trainable, dora_state_dict):
        with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got dict"):
            call({})
    with pytest.raises(ValueError, match="model: it is itself an adapted layer"):
        merge_all(DoRALinear(2, 2, rank=1))
