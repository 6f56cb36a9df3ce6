"""Strength, dropout and exact initialisation, for every kind of layer."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

from helpers import bf16
from peft import get_peft_model
from peft_kinds import KINDS, LAYERS, SCALES, Net, active, add, config, given, output, solve, twins
from peft_models import (
    check,
    lora_layers,
    one_thread,  # noqa: F401
)
from torch import nn

import dora_kernels
from dora_kernels.peft.state import SWITCH


@KINDS
def test_strength(kind):
    """``base + k (dora - base)``: 0 is the base model and 1 the adapter, both exactly; merging takes it along."""
    _, ours = twins(kind)
    ours.eval()
    layer = lora_layers(ours)[0]

    def run():
        with torch.no_grad():
            return layer(given(ours))

    dora = run()
    with ours.disable_adapter():
        base = run()
    for k in (0.0, 1.0, 0.25, -0.5, 1.5):
        dora_kernels.set_dora_strength(ours, k)
        if k in (0.0, 1.0):
            assert torch.equal(run(), (base, dora)[int(k)])
        torch.testing.assert_close(run(), base + k * (dora - base), rtol=1e-5, atol=1e-5)
        if "groups" not in kind and (SCALES or "scaled" not in kind):
            ours.merge_adapter()
            torch.testing.assert_close(run(), base + k * (dora - base), rtol=1e-5, atol=1e-5)
            with pytest.raises(ValueError, match="is merged; call unmerge_adapter"):
                dora_kernels.set_dora_strength(ours, 0.5)
            ours.unmerge_adapter()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((None, 1.0), TypeError, r"^model: expected a torch\.nn\.Module, got NoneType"),
        ((nn.Linear(2, 2), 1.0), ValueError, "^model: no patched DoRA layers; call dora_kernels.patch_peft"),
        (("ours", "half"), TypeError, "^strength: expected a number, got str"),
        (("ours", True), TypeError, "^strength: expected a number, got bool"),
        (("ours", float("nan")), ValueError, "^strength: expected a finite number, got nan"),
        (("ours", 0.5, "other"), ValueError, "^adapter: no patched layer has .*'other'; there are default"),
    ],
)
def test_strengths_that_are_none(arguments, error, message):
    _, ours = twins("linear")
    with pytest.raises(error, match=message):
        dora_kernels.set_dora_strength(*(ours if each == "ours" else each for each in arguments))
    assert not vars(lora_layers(ours)[0])[SWITCH].strengths


@KINDS
def test_a_strength_of_0_in_training(kind):
    """The base model's results, and gradients of 0 for whoever waits for them."""
    stock, ours = twins(kind)
    dora_kernels.set_dora_strength(ours, 0.0)
    results = solve(ours)
    with stock.disable_adapter():
        assert torch.equal(results["y"], stock(given(stock)))
    grads = [value for name, value in results.items() if "lora" in name]
    assert len(grads) == 3 and not any(grad.any() for grad in grads)


@KINDS
def test_a_strength_goes_with_its_adapter(kind):
    """Another one of the same name is at full strength."""
    stock, ours = twins(kind)
    add([ours], kind)
    dora_kernels.set_dora_strength(ours, 0.3, "second")
    for model in (stock, ours):
        if model is ours:
            model.delete_adapter("second")
        add([model], kind)
        active(model, "second").eval()
    assert not vars(lora_layers(ours)[0])[SWITCH].strengths
    check(output, stock, ours)


@KINDS
def test_dropout_of_the_low_rank_branch_alone(kind):
    """``dropout="lora"``: one base product, and PEFT's own result where the mask is all ones."""
    stock, _ = twins(kind, lora_dropout=0.4)
    ours = copy.deepcopy(stock)
    dora_kernels.patch_peft(ours, dropout="lora")
    layer = lora_layers(ours)[0]
    if "embedding" in kind:  # which has none
        check(solve, stock, ours)
        return
    x = given(ours)
    torch.manual_seed(1)
    result = layer(x)
    torch.manual_seed(1)
    dropped = layer.lora_dropout["default"](x)
    base = layer.base_layer(x)
    low = layer.scaling["default"] * layer.lora_B["default"](layer.lora_A["default"](dropped))
    with torch.no_grad():
        plain = layer.eval()(x) - base  # (g - 1) (base - b) + g low(x)
        low_x = layer.scaling["default"] * layer.lora_B["default"](layer.lora_A["default"](x))
    bias = (
        0
        if layer.base_layer.bias is None
        else layer.base_layer.bias.view((-1, *(1 for _ in range(base.dim() - 2))) if "conv" in kind else -1)
    )
    m = layer.lora_magnitude_vector["default"].weight
    dims = [d for d in range(base.dim()) if d != (1 if "conv" in kind else base.dim() - 1)]
    g = ((plain + base - bias) * (base - bias + low_x)).sum(dims) / (base - bias + low_x).square().sum(dims)
    g = g.detach().view((-1, *(1 for _ in range(base.dim() - 2))) if "conv" in kind else -1)
    torch.testing.assert_close(result, g * (base - bias + low) + bias, rtol=1e-4, atol=1e-4)
    result.sum().backward()
    assert m.grad is not None and m.grad.isfinite().all()
    stock.eval(), ours.eval()
    check(output, stock, ours)


@KINDS
@pytest.mark.parametrize("adapters", [True, False], ids=["f32", "bf16"])
def test_exact_init(kind, adapters):
    """A fresh bfloat16 model is its base model to rounding; what was trained is left alone; `restore` undoes it."""

    def fresh():
        torch.manual_seed(0)
        return get_peft_model(Net(kind).to(bf16), config(kind), autocast_adapter_dtype=adapters).eval()

    model = fresh()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with model.disable_adapter():
        base = output(model)["y"]
    handle = dora_kernels.patch_peft(model, exact_init=True)
    layer = lora_layers(model)[0]
    if adapters:
        assert handle.rewritten == ["base_model.model.layer (default)"]
        rows = layer.weight.float()
        rows = rows.t() if kind in ("Conv1D", "embedding", "scaled embedding") else rows.flatten(1)
        m = layer.lora_magnitude_vector["default"].weight.flatten()
        torch.testing.assert_close(m, rows.norm(dim=1), rtol=1e-6, atol=0)
        wrong = before["base_model.model.layer.lora_magnitude_vector.default.weight"].flatten()
        assert (wrong / m - 1).abs().max() > 1e-4
    # The bias is added to the rounded product: one rounding more.
    torch.testing.assert_close(output(model)["y"], base, rtol=2**-7, atol=2**-8)
    handle.restore()
    assert handle.rewritten == []
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    for change in ("m", "B"):
        trained = fresh()
        with torch.no_grad():
            layer = lora_layers(trained)[0]
            # The factor that starts at 0.
            zero = layer.lora_embedding_A["default"] if "embedding" in kind else layer.lora_B["default"].weight
            target = zero if change == "B" else layer.lora_magnitude_vector["default"].weight
            target.view(-1)[0] += 1.0
            kept = layer.lora_magnitude_vector["default"].weight.clone()
        assert dora_kernels.patch_peft(trained, exact_init=True).rewritten == []
        assert torch.equal(layer.lora_magnitude_vector["default"].weight, kept)


def test_exact_init_is_not_undone_where_training_went_on():
    torch.manual_seed(0)
    model = get_peft_model(Net("linear").to(bf16), config("linear"))
    handle = dora_kernels.patch_peft(model, exact_init=True)
    magnitude = lora_layers(model)[0].lora_magnitude_vector["default"].weight
    with torch.no_grad():
        magnitude[0] += 1
    kept = magnitude.detach().clone()
    handle.restore()
    assert torch.equal(magnitude, kept)


def test_exact_init_is_for_adapters_that_add_nothing():
    """With a B that is not 0 the magnitude may be PEFT's own start all the same."""
    torch.manual_seed(0)
    model = get_peft_model(Net("linear").to(bf16), config("linear", init_lora_weights=False))
    before = lora_layers(model)[0].lora_magnitude_vector["default"].weight.detach().clone()
    assert dora_kernels.patch_peft(model, exact_init=True).rewritten == []
    assert torch.equal(lora_layers(model)[0].lora_magnitude_vector["default"].weight, before)


def test_exact_init_says_what_it_cannot_reach(caplog):
    model = get_peft_model(Net("linear").to(bf16), config("linear"))
    layer = lora_layers(model)[0]
    layer.scaling["default"] = torch.tensor(1.5)
    before = layer.lora_magnitude_vector["default"].weight.detach().clone()
    with caplog.at_level("WARNING", "dora_kernels"):
        assert dora_kernels.patch_peft(model, exact_init=True).rewritten == []
    assert "left 1 magnitudes unchanged" in caplog.text and "model.layer (default)" in caplog.text
    assert torch.equal(layer.lora_magnitude_vector["default"].weight, before)


@pytest.mark.parametrize("patch", [dora_kernels.patch_peft_globally, None], ids=["globally", ""])
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dropout": "torchtune"}, ValueError, "^dropout: expected 'peft' or 'lora', got 'torchtune'"),
        ({"exact_init": 1}, TypeError, "^exact_init: expected a bool, got int"),
        ({"keep_unmerged": "cpu"}, TypeError, "^keep_unmerged: expected a bool, got str"),
    ],
)
def test_options_that_are_none(patch, options, error, message):
    torch.manual_seed(0)
    model = get_peft_model(Net("linear"), config("linear"))
    with pytest.raises(error, match=message):
        patch(**options) if patch else dora_kernels.patch_peft(model, **options)
    assert not any(SWITCH in vars(layer) for layer in lora_layers(model))


@pytest.mark.parametrize("kind", [kind for kind in LAYERS if "embedding" not in kind])
def test_options_where_pefts_own_code_runs(kind):
    """Behind a hook on the magnitude, as under FSDP1: the same dropout, and no merging that leaves a strength out."""
    stock, _ = twins(kind, lora_dropout=0.4)
    ours, hooked = copy.deepcopy(stock), copy.deepcopy(stock)
    for model in (ours, hooked):
        dora_kernels.patch_peft(model, dropout="lora")
    lora_layers(hooked)[0].lora_magnitude_vector["default"].register_forward_hook(lambda *_: None)
    wanted, results = solve(ours), solve(hooked)
    for name in wanted:
        torch.testing.assert_close(results[name], wanted[name], rtol=1e-4, atol=1e-5)
    if "groups" not in kind:
        dora_kernels.set_dora_strength(hooked, 0.5)
        with pytest.raises(ValueError, match="has a strength of 0.5, which PEFT's own code cannot merge"):
            hooked.merge_adapter()
        assert not lora_layers(hooked)[0].merged
