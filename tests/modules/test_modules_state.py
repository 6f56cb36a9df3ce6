"""The state of `DoRALinear` and `LoRALinear`: merged and not, saved, loaded, copied, made on meta, taken from PEFT."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from test_modules import axes, bf16, f32, kinds, one_thread, random_layer  # noqa: F401
from torch import nn

from dora_kernels import DoRALinear, LoRALinear, merge_dora


@axes
@kinds
@pytest.mark.parametrize("dtype", [f32, bf16])
def test_merge_and_unmerge(kind, magnitude_axis, dtype):
    options = {"magnitude_axis": magnitude_axis} if kind is DoRALinear else {}
    layer = random_layer(kind, dtype=dtype, **options)
    x = torch.randn(5, 9).to(dtype)
    original, before = layer.base_layer.weight.clone(), layer(x).detach()
    names = list(layer.state_dict())
    layer.merge()
    assert layer.merged and "merged" in repr(layer)
    magnitude = layer.magnitude if kind is DoRALinear else None
    wanted = merge_dora(original, layer.lora_A.weight, layer.lora_B.weight, magnitude, scaling=layer.scaling, **options)
    assert torch.equal(layer.base_layer.weight, wanted)
    assert torch.equal(layer(x), layer.base_layer(x))
    torch.testing.assert_close(layer(x), before, **({} if dtype == f32 else {"rtol": 0.03, "atol": 0.03}))
    with pytest.warns(UserWarning, match="merged already"):
        layer.merge()
    assert torch.equal(layer.base_layer.weight, wanted) and list(layer.state_dict()) == names
    layer.unmerge()
    assert not layer.merged and torch.equal(layer.base_layer.weight, original)
    assert torch.equal(layer(x), before), "a norm of the merged weight was kept"
    with pytest.warns(UserWarning, match="not merged"):
        layer.unmerge()
    assert torch.equal(layer.base_layer.weight, original)


@kinds
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("merged", [False, True])
def test_copies_are_independent(kind, duplicate, merged):
    layer = random_layer(kind)
    x = torch.randn(5, 9)
    original, before = layer.base_layer.weight.clone(), layer(x)
    if merged:
        layer.merge()
    other = duplicate(layer)
    assert torch.equal(other(x), layer(x)) and repr(other) == repr(layer)
    with torch.no_grad():
        other.lora_A.weight.mul_(2)
        if merged:
            other.unmerge()
            assert layer.merged and torch.equal(other.base_layer.weight, original)
            layer.unmerge()
    assert torch.equal(layer(x), before) and not torch.allclose(other(x), before)


def test_state_dict_has_pefts_names():
    adapter = ["lora_A.weight", "lora_B.weight", "lora_magnitude_vector"]
    base = ["base_layer.bias", "base_layer.weight"]
    layer = DoRALinear(4, 4, rank=2)
    layer(torch.ones(1, 4))  # keeps a norm, which is no part of the state
    assert sorted(layer.state_dict()) == base + adapter
    assert sorted(LoRALinear(4, 4, rank=2).state_dict()) == base + adapter[:2]


@pytest.mark.parametrize("prefix", ["", "net.0."])
@pytest.mark.parametrize("style", ["file", "model"])
def test_names_with_an_adapters_name_load(style, prefix):
    source = random_layer()
    state = {f"{prefix}{name}": t for name, t in source.state_dict().items()}
    if style == "model":
        state = {
            name.replace("lora_A.", "lora_A.mine.").replace("lora_B.", "lora_B.mine.")
            .replace("magnitude_vector", "magnitude_vector.mine.weight"): t
            for name, t in state.items()
        }  # fmt: skip
        assert f"{prefix}lora_magnitude_vector.mine.weight" in state
    names = list(state)
    layer = random_layer()
    model = nn.ModuleDict({"net": nn.Sequential(layer)}) if prefix else layer
    model.load_state_dict(state)
    assert list(state) == names, "the caller's dict was changed"
    x = torch.randn(3, 9)
    assert torch.equal(layer(x), source(x))


def test_two_adapters_in_one_state_dict_are_refused():
    layer = random_layer()
    state = layer.state_dict()
    state["lora_A.one.weight"] = state["lora_A.two.weight"] = state.pop("lora_A.weight")
    with pytest.raises(RuntimeError, match=r"Missing key.*lora_A\.weight"):
        layer.load_state_dict(state)


@kinds
def test_a_merged_layer_saves_its_base_weight(kind):
    """Loaded elsewhere, it is the same layer unmerged, not the adapter twice."""
    layer, other = random_layer(kind), random_layer(kind)
    x = torch.randn(3, 9)
    before = layer(x)
    layer.merge()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), before)
    with pytest.raises(RuntimeError, match="the layer is merged: call unmerge"):
        layer.load_state_dict(other.state_dict())


def test_a_loaded_norm_is_fresh():
    layer, other = random_layer().eval(), random_layer()
    x = torch.randn(3, 9)
    layer(x)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(x), other(x))


@kinds
def test_made_on_meta(kind):
    layer = kind(9, 7, rank=3, device="meta")
    assert {p.device.type for p in layer.parameters()} == {"meta"}
    other = random_layer(kind)
    x = torch.randn(3, 9)
    layer.load_state_dict(other.state_dict(), assign=True)
    layer.scaling = other.scaling
    assert torch.equal(layer(x), other(x))
    layer = kind(9, 7, rank=3, device="meta").to_empty(device="cpu")
    layer.base_layer.reset_parameters()
    layer.reset_adapter()
    torch.testing.assert_close(layer(x), layer.base_layer(x))


@pytest.mark.parametrize("use_dora", [True, False], ids=["dora", "lora"])
@pytest.mark.parametrize("use_rslora", [True, False], ids=["rslora", ""])
def test_numbers_of_pefts_layer(use_dora, use_rslora):
    pytest.importorskip("peft")
    pytest.importorskip("transformers")
    from peft_models import check, toy, toy_input

    stock = toy(use_dora=use_dora, use_rslora=use_rslora, init_lora_weights=False).base_model.model.first
    kind = DoRALinear if use_dora else LoRALinear
    ours = kind(12, 20, rank=3, alpha=4, use_rslora=use_rslora)
    ours.load_state_dict(stock.state_dict())

    def solve(layer):
        layer.zero_grad()
        x = toy_input().to(layer.base_layer.weight.dtype).requires_grad_()
        y = layer(x)
        y.square().sum().backward()
        grads = {
            name.replace(".default", "").replace("vector.weight", "vector"): p.grad
            for name, p in layer.named_parameters()
            if p.grad is not None
        }
        assert len(grads) == (3 if use_dora else 2)
        return {"y": y.detach(), "x": x.grad, **grads}

    check(solve, stock, ours)


def test_an_adapters_file(tmp_path):
    pytest.importorskip("peft")
    pytest.importorskip("transformers")
    from peft_models import parts, toy, toy_input
    from safetensors.torch import load_file

    stock = toy()
    stock.save_pretrained(tmp_path)
    ours = DoRALinear.from_linear(copy.deepcopy(parts(stock)["base"]), rank=3, alpha=4)
    prefix = "base_model.model.first."
    state = load_file(tmp_path / "adapter_model.safetensors")
    result = ours.load_state_dict(
        {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}, strict=False
    )
    assert not result.unexpected_keys and all(name.startswith("base_layer.") for name in result.missing_keys)
    torch.testing.assert_close(ours(toy_input()), parts(stock)["layer"](toy_input()))
