"""Merging and unmerging every kind of layer that PEFT gives DoRA to: stock beside patched, adapters far from init."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

from helpers import bf16, f16, f32
from peft.tuners.lora import LoraLayer
from peft_kinds import (
    MERGEABLE,
    active,
    add,
    given,
    output,
    solve,
    twins,
)
from peft_models import (
    check,
    lora_layers,
    one_thread,  # noqa: F401
)

import dora_kernels
from dora_kernels.peft.state import SWITCH


@MERGEABLE
@pytest.mark.parametrize("safe_merge", [False, True], ids=["", "safe"])
@pytest.mark.parametrize("dtype", [f32, bf16, f16], ids=["f32", "bf16", "f16"])
def test_merging(kind, safe_merge, dtype):
    """As exact as stock's, several adapters with norms from the unmerged weight; unmerged bit for bit."""
    models = stock, ours = twins(kind, dtype)
    add(models, kind, r=2, lora_alpha=3)
    weight = lora_layers(ours)[0].get_base_layer().weight
    before = weight.detach().clone()

    def merged(model, names):
        """Stock stays unmerged: before peft 0.21 a second adapter's norm is that of the merged weight."""
        model = active(copy.deepcopy(model), *names).eval()
        if any(SWITCH in vars(layer) for layer in lora_layers(model)):
            model.merge_adapter(names, safe_merge=safe_merge)
        return output(model)

    for names in (["default"], ["second"], ["default", "second"]):
        check(lambda model, names=names: merged(model, names), stock, ours, dtype)
        ours.merge_adapter(names, safe_merge=safe_merge)
        assert weight.dtype == dtype and not torch.equal(weight, before)
        ours.unmerge_adapter()
        assert torch.equal(weight, before)
        layer = lora_layers(ours)[0]
        assert not layer.merged_adapters and not layer._caches and vars(layer)[SWITCH].unmerged is None
        check(output, stock, ours, dtype)


def test_groups_are_not_merged():
    _, ours = twins("conv2d, 2 groups")
    with pytest.raises(NotImplementedError, match="groups"):
        ours.merge_adapter()
    assert vars(lora_layers(ours)[0])[SWITCH].unmerged is None


@MERGEABLE
def test_merged_onto_plain_lora_and_off_again(kind):
    models = stock, ours = twins(kind)
    add(models, kind, "plain", use_dora=False, init_lora_weights=False)
    before = lora_layers(ours)[0].get_base_layer().weight.detach().clone()
    for names in (["plain", "default"], ["default", "plain"]):

        def merged(model, names=names):
            model = copy.deepcopy(active(model, *names))
            if any(SWITCH in vars(layer) for layer in lora_layers(model)):
                model.merge_adapter(names)
            return output(model)

        check(merged, stock, ours)
        active(ours, *names).merge_adapter(names)
        ours.unmerge_adapter()
        assert torch.equal(lora_layers(ours)[0].get_base_layer().weight, before)


@MERGEABLE
def test_a_merged_weight_that_was_changed_is_not_overwritten(kind):
    """Unmerging is arithmetic then, and nothing of the change is lost."""
    _, ours = twins(kind)
    layer = lora_layers(ours)[0]
    weight, delta = layer.get_base_layer().weight, layer.get_delta_weight("default").detach()
    before = weight.detach().clone()
    ours.merge_adapter()
    with torch.no_grad():
        weight.mul_(2)
    ours.unmerge_adapter()
    torch.testing.assert_close(weight.detach(), 2 * before + delta, rtol=1e-5, atol=1e-5)


@MERGEABLE
def test_unmerged_without_a_copy(kind):
    """Two adapters, one of them at another strength: PEFT's arithmetic, in float32."""
    stock, _ = twins(kind)
    add([stock], kind, r=2, lora_alpha=3)
    ours = active(stock, "default", "second")
    dora_kernels.patch_peft(ours, keep_unmerged=False)
    dora_kernels.set_dora_strength(ours, 0.7, "default")
    layer = lora_layers(ours)[0]
    before = layer.get_base_layer().weight.detach().clone()
    ours.merge_adapter(["default"])
    assert vars(layer)[SWITCH].unmerged is None
    ours.unmerge_adapter()
    torch.testing.assert_close(layer.get_base_layer().weight.detach(), before, rtol=1e-5, atol=1e-5)


@MERGEABLE
@pytest.mark.parametrize("safe_merge", [False, True], ids=["", "safe"])
def test_merge_and_unload(kind, safe_merge, monkeypatch):
    """No unmerged weight is copied: there is nothing left to unmerge."""
    from dora_kernels.peft import layer as peft_layer

    stock, ours = twins(kind)

    def unloaded(model):
        model = copy.deepcopy(model).merge_and_unload(safe_merge=safe_merge)
        return {name: p.detach() for name, p in model.named_parameters()}

    monkeypatch.setattr(peft_layer, "Unmerged", None)  # would be called
    check(unloaded, stock, ours)
    plain = ours.unload()
    assert all(type(m).__module__.split(".")[0] != "dora_kernels" for m in plain.modules())


@MERGEABLE
def test_a_failed_safe_merge_leaves_the_model_as_it_was(kind):
    _, ours = twins(kind)
    before = copy.deepcopy(ours.state_dict())
    lora_layers(ours)[0].lora_magnitude_vector["default"].weight.data.view(-1)[0] = torch.inf
    bad = copy.deepcopy(ours.state_dict())
    with pytest.raises(ValueError, match="NaNs detected"):
        ours.merge_adapter(safe_merge=True)
    assert all(torch.equal(one, bad[name]) for name, one in ours.state_dict().items()) and before.keys() == bad.keys()
    assert not lora_layers(ours)[0].merged and vars(lora_layers(ours)[0])[SWITCH].unmerged is None


@MERGEABLE
def test_one_row_that_was_changed_while_merged(kind):
    _, ours = twins(kind)
    layer = lora_layers(ours)[0]
    weight = layer.get_base_layer().weight
    before = weight.detach().clone()
    ours.merge_adapter()
    with torch.no_grad():
        weight[1, 1] += 64.0
    ours.unmerge_adapter()
    changed = (weight.detach() - before).abs() > 1e-3
    assert changed[1, 1].all() and changed.sum() == changed[1, 1].numel()


@pytest.mark.parametrize("kind", ["linear", "Conv1D", "conv1d", "conv2d, channels last", "conv3d"])
@pytest.mark.parametrize("lora_bias", [False, True], ids=["", "lora bias"])
@pytest.mark.parametrize("change", [False, True], ids=["", "changed"])
def test_a_bias_that_was_changed_while_merged(kind, lora_bias, change):
    """What merging has added to it goes again, bit for bit; what somebody else wrote stays."""
    _, ours = twins(kind)
    add([ours], kind, "plain", use_dora=False, lora_bias=lora_bias, init_lora_weights=False)
    bias = lora_layers(ours)[0].get_base_layer().bias
    before = bias.detach().clone()
    ours.merge_adapter(["plain", "default"])
    assert torch.equal(bias, before) != lora_bias
    with torch.no_grad():
        bias += float(change)
    ours.unmerge_adapter()
    assert torch.equal(bias, before) if not change else torch.allclose(bias, before + 1.0)


def test_a_failed_merge_and_unload_leaves_the_options_as_they_were():
    _, ours = twins("linear")
    layer = lora_layers(ours)[0]
    magnitude = layer.lora_magnitude_vector["default"].weight
    kept = magnitude.detach().clone()
    magnitude.data[0] = torch.inf
    with pytest.raises(ValueError, match="NaNs detected"):
        ours.merge_and_unload(safe_merge=True)
    magnitude.data.copy_(kept)
    assert vars(layer)[SWITCH].options.keep_unmerged


@MERGEABLE
@pytest.mark.parametrize("unload", [False, True], ids=["", "unload"])
def test_several_at_once_without_a_copy(kind, unload):
    """Each norm from the unmerged weight: there is a copy for as long as it takes."""
    stock, _ = twins(kind)
    add([stock], kind, r=2, lora_alpha=3)
    ours = active(stock, "default", "second").eval()
    dora_kernels.patch_peft(ours, keep_unmerged=False)
    wanted = output(ours)["y"]
    if unload:
        x = given(ours).detach()
        merged = ours.merge_and_unload()(x).detach()
    else:
        layer = lora_layers(ours)[0]
        before = layer.get_base_layer().weight.detach().clone()
        ours.merge_adapter(["default", "second"])
        merged = output(ours)["y"]
        assert vars(layer)[SWITCH].unmerged is None
        ours.unmerge_adapter()
        torch.testing.assert_close(layer.get_base_layer().weight.detach(), before, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(merged, wanted, rtol=1e-5, atol=1e-5)


@MERGEABLE
def test_one_after_the_other(kind):
    """A plain adapter and then a DoRA adapter: its norm is the unmerged weight's, which comes back bit for bit."""
    _, ours = twins(kind)
    add([ours], kind, "plain", use_dora=False, init_lora_weights=False)
    active(ours, "plain", "default").eval()
    layer, wanted = lora_layers(ours)[0], output(ours)["y"]
    before = layer.get_base_layer().weight.detach().clone()
    ours.merge_adapter(["plain"])
    ours.merge_adapter(["default"])
    torch.testing.assert_close(output(ours)["y"], wanted, rtol=1e-5, atol=1e-5)
    ours.unmerge_adapter()
    assert torch.equal(layer.get_base_layer().weight, before)


@MERGEABLE
def test_a_weight_that_was_changed_between_two_merges(kind):
    """The copy is of another weight then: PEFT's arithmetic, as stock."""
    if kind == "Conv1D" and not hasattr(LoraLayer, "_unmerged_base_weight"):
        pytest.skip("before peft 0.21 stock cannot unmerge a Conv1D")
    stock, ours = models = twins(kind)
    add(models, kind, r=2, lora_alpha=3)
    results = []
    for model in models:
        weight = lora_layers(model)[0].get_base_layer().weight
        model.merge_adapter(["default"])
        with torch.no_grad():
            weight.mul_(1.5)
        model.merge_adapter(["second"])
        merged = weight.detach().clone()
        model.unmerge_adapter()
        results.append((merged, weight.detach().clone()))
    for mine, theirs in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@MERGEABLE
@pytest.mark.parametrize("names", [["default"], ["default", "second"]], ids=["", "two"])
def test_merged_in_inference_mode(kind, names):
    """And unmerged in it: the weights can be trained with afterwards."""
    _, ours = twins(kind)
    add([ours], kind, r=2, lora_alpha=3)
    active(ours, *names)
    wanted = solve(ours)
    with torch.inference_mode():
        ours.merge_adapter(names)
        merged = ours(given(ours).detach())
    torch.testing.assert_close(merged.clone(), wanted["y"], rtol=1e-5, atol=1e-5)
    lora_layers(ours)[0].get_base_layer().weight.requires_grad_().square().sum().backward()
    lora_layers(ours)[0].get_base_layer().weight.requires_grad_(False).grad = None
    with torch.inference_mode():
        ours.unmerge_adapter()
    for name, value in solve(ours).items():
        assert torch.equal(value, wanted[name]), name
