"""`add_weighted_adapter` with DoRA: the sum of what the adapters add to the weights, as one adapter."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

from peft_kinds import MERGEABLE, active, add, config, given, twins
from peft_models import (
    lora_layers,
    move_adapter,
    one_thread,  # noqa: F401
)

import dora_kernels


def layer_output(model):
    with torch.no_grad():
        return lora_layers(model)[0](given(model)).double()


def norm_of(layer, adapter):
    variant = layer.lora_variant[adapter]
    return variant.divisor(layer, adapter, variant.read(layer, adapter))


def three(kind):
    """A patched model with a DoRA adapter of rank 4, one of rank 2, and a plain one; each one's share of the output."""
    _, ours = twins(kind)
    add([ours], kind, r=2, lora_alpha=3)
    add([ours], kind, "plain", r=4, use_dora=False, init_lora_weights=False)
    ours.eval()
    with ours.disable_adapter():
        base = layer_output(ours)
    shares = {name: layer_output(active(ours, name)) - base for name in ("default", "second", "plain")}
    return ours, base, shares


@MERGEABLE
@pytest.mark.parametrize("names", [["default", "second"], ["plain", "second"], ["second", "plain", "default"]], ids=str)
def test_the_sum_of_the_ranks_is_exact(kind, names):
    ours, base, shares = three(kind)
    weights = [0.6, -0.7, 0.3][: len(names)]
    ours.add_weighted_adapter(names, weights, "sum", combination_type="cat")
    wanted = base + sum(weight * shares[name] for name, weight in zip(names, weights, strict=True))
    torch.testing.assert_close(layer_output(active(ours, "sum")), wanted, rtol=1e-4, atol=1e-4)
    assert ours.peft_config["sum"].use_dora and ours.peft_config["sum"].r == sum(
        ours.peft_config[name].r for name in names
    )
    for name in ("default", "second", "plain"):
        torch.testing.assert_close(layer_output(active(ours, name)) - base, shares[name])


@MERGEABLE
def test_at_the_strengths_that_are_set(kind):
    """Of a DoRA adapter; plain LoRA has none."""
    ours, base, _ = three(kind)
    dora_kernels.set_dora_strength(ours, 0.4, "default")
    names = ["default", "second", "plain"]
    shares = [layer_output(active(ours, name)) - base for name in names]
    ours.add_weighted_adapter(names, [0.6, -0.7, 0.3], "sum", combination_type="cat")
    wanted = base + 0.6 * shares[0] - 0.7 * shares[1] + 0.3 * shares[2]
    torch.testing.assert_close(layer_output(active(ours, "sum")), wanted, rtol=1e-4, atol=1e-4)


@MERGEABLE
@pytest.mark.parametrize("combination", [{"combination_type": "cat"}, {"combination_type": "svd", "svd_rank": 3}])
def test_under_autocast(kind, combination):
    """As outside it."""
    ours, *_ = three(kind)
    arguments = ["default", "second"], [0.6, -0.7]
    ours.add_weighted_adapter(*arguments, "sum", **combination)
    with torch.autocast("cpu", torch.bfloat16):
        ours.add_weighted_adapter(*arguments, "within", **combination)
    assert torch.equal(layer_output(active(ours, "within")), layer_output(active(ours, "sum")))


def test_one_adapter_twice():
    ours, base, shares = three("linear")
    ours.add_weighted_adapter(["default", "default"], [0.5, 0.25], "sum", combination_type="cat")
    wanted = base + 0.75 * shares["default"]
    torch.testing.assert_close(layer_output(active(ours, "sum")), wanted, rtol=1e-4, atol=1e-4)


@MERGEABLE
def test_a_row_whose_factors_cancel(kind):
    """``1 + w (g - 1)`` is 0: nothing is left of W to be scaled, and what is added stays what it is."""
    ours, _, _ = three(kind)
    layer = lora_layers(ours)[0]
    magnitude = layer.lora_magnitude_vector["default"].weight
    active(ours, "default")
    with torch.no_grad():
        magnitude.view(-1)[0] = 2.0 * norm_of(layer, "default")[0]
        with ours.disable_adapter():
            base = layer_output(ours)
        share = layer_output(ours) - base
    ours.add_weighted_adapter(["default"], [-1.0], "sum", combination_type="cat")
    torch.testing.assert_close(layer_output(active(ours, "sum")), base - share, rtol=1e-4, atol=1e-4)


@MERGEABLE
def test_a_smaller_rank_is_the_best_of_its_rank(kind):
    """Not exact, and better than any change of its factors by a little."""
    ours, base, shares = three(kind)
    ours.add_weighted_adapter(["default", "second"], [0.5, 0.5], "sum", combination_type="svd", svd_rank=5)
    ours.add_weighted_adapter(["default", "second"], [0.5, 0.5], "all", combination_type="cat")
    layer = lora_layers(ours)[0]

    def update(name, noise=0.0):
        from dora_kernels.peft.combine import factors

        a, b = (t.detach().double().flatten(1) for t in factors(layer, name))
        return layer.scaling[name] * (b * (1 + noise * torch.randn_like(b))) @ a

    torch.manual_seed(0)
    best = (update("sum") - update("all")).norm()
    assert 0 < best < 0.6 * update("all").norm()
    assert all((update("sum", 0.05) - update("all")).norm() > best for _ in range(20))
    # The rows' own scale is that of the exact sum.
    exact = base + 0.5 * (shares["default"] + shares["second"])
    assert (layer_output(active(ours, "sum")) - exact).norm() < (base - exact).norm()


@MERGEABLE
def test_of_a_common_rank(kind):
    _, ours = twins(kind)
    add([ours], kind, "second")
    ours.eval()
    ours.add_weighted_adapter(["default", "second"], [1.0, 0.0], "sum", combination_type="linear")
    torch.testing.assert_close(
        layer_output(active(ours, "sum")), layer_output(active(ours, "default")), rtol=1e-4, atol=1e-4
    )
    ours.add_weighted_adapter(["second"], [1.0], "one")  # PEFT takes "linear" for one
    torch.testing.assert_close(
        layer_output(active(ours, "one")), layer_output(active(ours, "second")), rtol=1e-4, atol=1e-4
    )


def test_saved_as_an_adapter_of_its_own(tmp_path):
    """Which stock PEFT reads."""
    from peft import PeftModel
    from peft_kinds import Net

    ours, *_ = three("linear")
    ours.add_weighted_adapter(["default", "second"], [0.5, 0.5], "sum", combination_type="cat")
    ours.save_pretrained(tmp_path, selected_adapters=["sum"])
    torch.manual_seed(0)
    stock = PeftModel.from_pretrained(Net("linear"), tmp_path / "sum").eval()
    torch.testing.assert_close(layer_output(stock), layer_output(active(ours, "sum")), rtol=1e-4, atol=1e-4)


def test_plain_adapters_are_pefts_affair():
    stock, ours = twins("linear")
    for model in (stock, ours):
        add([model], "linear", "p1", use_dora=False, init_lora_weights=False)
        add([model], "linear", "p2", use_dora=False, init_lora_weights=False)
        move_adapter(model, "p2", 9)
        model.add_weighted_adapter(["p1", "p2"], [0.5, 0.5], "sum", combination_type="ties", density=0.5)
    torch.testing.assert_close(layer_output(active(ours, "sum")), layer_output(active(stock, "sum")))


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (None, {"combination_type": "ties"}, "^combination_type: expected 'cat', 'svd', 'linear' for DoRA .*'ties'"),
        (None, {"weights": [1.0]}, "^weights: expected 2, one for each adapter, got 1"),
        (None, {"adapters": ["default", "missing"]}, "missing"),
        (lambda model: model.merge_adapter(["default"]), {}, "merged; call unmerge_adapter"),
        (lambda model: lora_layers(model)[0].lora_A["second"].to("meta"), {}, "adapter 'second' cannot be read"),
        (
            lambda model: add([model], "linear", "biased", use_dora=False, lora_bias=True, init_lora_weights=False),
            {"adapters": ["default", "biased"]}, "adapter 'biased' has a bias",
        ),
    ],
    ids=["ties", "weights", "missing", "merged", "away", "bias"],
)
def test_refused(change, arguments, message):
    """And the model is as it was."""
    ours, *_ = three("linear")
    if change is not None:
        change(ours)
    before = copy.deepcopy([list(ours.peft_config), [name for name, _ in ours.named_parameters()]])
    values = {"adapters": ["default", "second"], "weights": [0.5, 0.5], "adapter_name": "sum", **arguments}
    with pytest.raises(ValueError, match=message):
        ours.add_weighted_adapter(**{"combination_type": "cat", **values})
    assert [list(ours.peft_config), [name for name, _ in ours.named_parameters()]] == before


def test_grouped_convolutions_are_refused():
    _, ours = twins("conv2d, 2 groups")
    add([ours], "conv2d, 2 groups")
    with pytest.raises(ValueError, match="grouped convolution"):
        ours.add_weighted_adapter(["default", "second"], [0.5, 0.5], "sum", combination_type="cat")
    assert list(ours.peft_config) == ["default", "second"]


def test_a_handle_of_the_whole_model():
    """All layers of a model of several kinds."""
    from peft_models import toy

    model = toy(others=True)
    dora_kernels.patch_peft(model)
    model.add_adapter("second", config("linear", r=2, target_modules=["first", "conv"]))
    move_adapter(model, "second", 5)
    model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "sum", combination_type="cat")
    assert sum("sum" in layer.scaling for layer in lora_layers(model)) == 5
