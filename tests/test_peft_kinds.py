"""Every kind of layer that PEFT gives DoRA to, under every operation: stock beside patched, adapters far from init."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

from helpers import bf16, f16, f32, saved_by
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft_models import (
    Special,
    check,
    lora_layers,
    move_adapter,
    one_thread,  # noqa: F401
)
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import dora_kernels
from dora_kernels.peft.state import SWITCH

VOCAB = 23


class Scaled(nn.Embedding):
    """As Gemma's, which multiplies by the root of the hidden size."""

    def __init__(self, *args):
        super().__init__(*args)
        self.register_buffer("embed_scale", torch.tensor(3.5), persistent=False)

    def forward(self, ids):
        return super().forward(ids) * self.embed_scale.to(self.weight.dtype)


def channels_last(layer):
    return layer.to(memory_format=torch.channels_last)


# Each takes [4, 12] numbers, or indices, to some shape.
LAYERS = {
    "linear": (lambda: nn.Linear(12, 10), (4, 12)),
    "linear subclass": (lambda: Special(12, 10, bias=False), (4, 3, 12)),
    "Conv1D": (lambda: Conv1D(10, 12), (4, 12)),
    "embedding": (lambda: nn.Embedding(VOCAB, 10, padding_idx=2), None),
    "scaled embedding": (lambda: Scaled(VOCAB, 10), None),
    "conv1d": (lambda: nn.Conv1d(6, 10, 3, padding=1), (4, 6, 7)),
    "conv2d": (lambda: nn.Conv2d(6, 10, 3, stride=2, padding=1), (4, 6, 5, 5)),
    "conv2d 1x1": (lambda: nn.Conv2d(6, 10, 1, bias=False), (4, 6, 5, 5)),
    "conv2d, channels last": (lambda: channels_last(nn.Conv2d(6, 10, 3)), (4, 6, 5, 5)),
    "conv2d, 2 groups": (lambda: nn.Conv2d(6, 10, 3, groups=2), (4, 6, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(3, 5, 2), (2, 3, 4, 4, 4)),
}
KINDS = pytest.mark.parametrize("kind", LAYERS)
# Before peft 0.18 an embedding's own scale is left out of what DoRA adds, so that merging changes the output.
SCALES = hasattr(BaseTunerLayer, "_get_embed_scale")
MERGEABLE = pytest.mark.parametrize(
    "kind", [kind for kind in LAYERS if "groups" not in kind and (SCALES or "scaled" not in kind)]
)


class Net(nn.Module):
    """A layer of the kind, and something after it to have a gradient through."""

    def __init__(self, kind):
        super().__init__()
        make, self.shape = LAYERS[kind]
        self.layer = make()

    def forward(self, x):
        return torch.tanh(self.layer(x))


def config(kind, **options):
    values = {"r": 4, "lora_alpha": 6, "use_dora": True, "target_modules": ["layer"], **options}
    return LoraConfig(fan_in_fan_out=kind == "Conv1D", **values)


def twins(kind, dtype=f32, autocast_adapter_dtype=True, **options):
    """A stock model of one layer, its adapter far from where it starts, and a patched copy."""
    torch.manual_seed(0)
    stock = get_peft_model(
        Net(kind).to(dtype), config(kind, **options), autocast_adapter_dtype=autocast_adapter_dtype
    )
    move_adapter(stock)
    ours = copy.deepcopy(stock)
    handle = dora_kernels.patch_peft(ours)
    assert handle.patched == ["base_model.model.layer"] and not handle.skipped
    return stock, ours


def add(models, kind, name="second", seed=5, **options):
    for model in models:
        torch.manual_seed(7)
        model.add_adapter(name, config(kind, **options))
        move_adapter(model, name, seed)


def given(model, seed=3):
    """The input of a model, in its dtype; numbers ask for a gradient."""
    generator = torch.Generator().manual_seed(seed)
    shape = model.base_model.model.shape
    if shape is None:
        return torch.randint(0, VOCAB, (4, 3), generator=generator)
    x = torch.randn(shape, generator=generator).to(next(model.parameters()).dtype)
    return x.requires_grad_()


def solve(model, **extra):
    """Output and every gradient, the input's too; no gradient is left behind."""
    torch.manual_seed(1)
    model.zero_grad(set_to_none=True)
    x = given(model)
    y = model(x, **extra)
    y.double().square().sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    model.zero_grad(set_to_none=True)
    return {"y": y.detach(), **grads, **({"x": x.grad} if x.is_floating_point() else {})}


def output(model, **extra):
    with torch.no_grad():
        return {"y": model(given(model), **extra)}


def active(model, *names):
    model.base_model.set_adapter(list(names))
    return model


DTYPES = {
    "f32": (f32, False, None),
    "bf16": (bf16, False, None),
    "bf16, adapters f32": (bf16, True, None),
    "f16": (f16, False, None),
    "autocast": (f32, True, bf16),
    "bf16 under autocast": (bf16, True, bf16),
}


@KINDS
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES.keys())
def test_forward_and_backward(kind, dtypes):
    dtype, adapters, autocast = dtypes
    stock, ours = twins(kind, dtype, autocast_adapter_dtype=adapters)
    check(solve, stock, ours, autocast or dtype, lambda: torch.autocast("cpu", autocast, enabled=autocast is not None))
    for model in (stock, ours):
        model.eval()
    check(output, stock, ours, autocast or dtype, lambda: torch.autocast("cpu", autocast, enabled=autocast is not None))


@KINDS
def test_dropout(kind):
    """In both terms, as PEFT's, with the same mask."""
    check(solve, *twins(kind, lora_dropout=0.4))


@KINDS
def test_a_trained_base_layer(kind):
    """Its weight and bias get the gradients of the stock formula."""
    stock, ours = twins(kind, bias="all")
    for model in (stock, ours):
        model.base_model.model.layer.base_layer.requires_grad_()
    check(solve, stock, ours)


@KINDS
def test_training(kind):
    """Ten steps end at the same parameters: no norm is stale, none is missing."""

    def trained(model):
        model = copy.deepcopy(model)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.02)
        for _ in range(10):
            model(given(model).detach()).sub(0.5).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    check(trained, *twins(kind))


@KINDS
def test_checkpointing(kind):
    stock, ours = twins(kind)
    for model in (stock, ours):
        net = model.base_model.model
        plain = net.forward
        net.forward = lambda x, plain=plain: checkpoint(plain, x, use_reentrant=False)
    wanted, results = solve(stock), solve(ours)
    for name in wanted:
        torch.testing.assert_close(results[name], wanted[name], rtol=1e-4, atol=1e-5)


@KINDS
def test_several_adapters(kind):
    """Together in either order, switched, one deleted, one renamed by deletion and addition."""
    models = stock, ours = twins(kind)
    add(models, kind, r=2, lora_alpha=3)
    add(models, kind, "plain", use_dora=False, init_lora_weights=False)
    for names in (["default", "second"], ["second", "default"], ["plain", "second"], ["second"], ["default"]):
        for model in models:
            active(model, *names)
        check(solve, stock, ours)
    for model in models:
        model.delete_adapter("default")
        active(model, "second")
    check(solve, stock, ours)
    add(models, kind, "default", seed=9)
    for model in models:
        active(model, "default", "second")
    check(solve, stock, ours)


@KINDS
def test_disabled(kind):
    stock, ours = twins(kind)
    with stock.disable_adapter(), ours.disable_adapter():
        assert torch.equal(output(stock)["y"], output(ours)["y"])
    check(solve, stock, ours)


@KINDS
def test_scaled(kind):
    """`set_scale`, `scale_layer` and back, with the norm that belongs to each."""
    stock, ours = twins(kind)
    for change in (
        lambda layer: layer.set_scale("default", 0.3),
        lambda layer: layer.scale_layer(4.0),
        lambda layer: layer.unscale_layer(2.0),
        lambda layer: layer.unscale_layer(),
    ):
        for model in (stock, ours):
            change(lora_layers(model)[0])
        check(solve, stock, ours)


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
        assert not lora_layers(ours)[0].merged_adapters and vars(lora_layers(ours)[0])[SWITCH].unmerged is None
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


@KINDS
def test_saved_and_loaded(kind, tmp_path):
    """Stock reads what a patched model saves, and the other way round; copies and pickles are patched models."""
    stock, ours = twins(kind)
    assert get_peft_model_state_dict(ours).keys() == get_peft_model_state_dict(stock).keys()
    ours.save_pretrained(tmp_path / "ours")
    stock.save_pretrained(tmp_path / "stock")
    torch.manual_seed(0)
    base = Net(kind)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
    assert torch.equal(output(loaded.eval())["y"], output(stock.eval())["y"])
    patched = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "stock")
    dora_kernels.patch_peft(patched)
    result = output(ours.eval())["y"]
    for model in (patched.eval(), copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(output(model)["y"], result)
        assert all(SWITCH in vars(layer) for layer in lora_layers(model))


@KINDS
@pytest.mark.parametrize("adapters", [True, False], ids=["f32", "bf16"])
def test_a_batch_of_several_adapters(kind, adapters):
    """Row by row what the adapter alone gives; stock PEFT refuses DoRA there."""
    dtype = f32 if adapters else bf16
    models = stock, ours = twins(kind, dtype, autocast_adapter_dtype=adapters)
    add(models, kind, r=2, lora_alpha=3)
    add(models, kind, "plain", use_dora=False, init_lora_weights=False)
    for model in models:
        model.eval()
    names = (["second", "__base__", "default", "plain"] * 2)[: len(given(ours))]
    with pytest.raises(ValueError, match="DoRA"):
        output(stock, adapter_names=names)
    mixed = output(ours, adapter_names=names)["y"]
    assert mixed.dtype == output(ours)["y"].dtype
    for row, name in enumerate(names):
        if name == "__base__":
            with ours.disable_adapter():
                alone = output(ours)["y"]
        else:
            alone = output(active(ours, name))["y"]
        # A bfloat16 layer on its own is one function, in a batch a composition: one rounding of 1 apart.
        torch.testing.assert_close(mixed[row], alone[row], **({} if adapters else {"rtol": 0, "atol": 2**-7}))


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
def test_what_an_evaluation_reuses(kind):
    """The norm is computed once; a write that no version shows is seen."""
    stock, ours = twins(kind)
    for model in (stock, ours):
        model.eval()
    for _ in range(3):
        output(ours)
    cache = vars(lora_layers(ours)[0])[SWITCH]["default"]
    assert (cache.computed, cache.reused) == (1, 2)
    for model in (stock, ours):
        factors = [p for name, p in model.named_parameters() if "lora_B" in name or "lora_embedding_B" in name]
        factors[0].data.mul_(1.5)
    check(output, stock, ours)


def test_an_embedding_forms_nothing_of_the_table(monkeypatch):
    """Neither forward nor backward holds or makes a dense matrix of its size; stock makes several."""

    class Large(nn.Module):
        shape = None

        def __init__(self):
            super().__init__()
            self.layer = nn.Embedding(4096, 32)

        def forward(self, ids):
            return self.layer(ids)

    torch.manual_seed(0)
    model = move_adapter(get_peft_model(Large(), config("embedding")))
    layer = lora_layers(model)[0]
    sizes = []
    from torch.utils._python_dispatch import TorchDispatchMode

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple | list) else (out,):
                if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in own:
                    sizes.append(t.untyped_storage().nbytes())
            return out

    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    ids = torch.arange(8).view(2, 4)
    with Sizes():
        model(ids).sum().backward()
    assert max(sizes) >= 4 * 4096 * 32, "stock forms the product"
    dora_kernels.patch_peft(model)
    monkeypatch.setattr("dora_kernels.torch_backend._BLOCK_ELEMENTS", 1 << 12)
    monkeypatch.setattr("dora_kernels.torch_backend._kept.block", None)
    model.zero_grad(set_to_none=True)
    sizes.clear()
    with Sizes():
        model(ids).sum().backward()
    rank_sized = 4 * 4096 * 4
    assert max(sizes) <= rank_sized + 4 * (1 << 12), "more than lora_A's own gradient"
    assert layer.lora_embedding_A["default"].grad is not None


@pytest.mark.parametrize("kind", ["embedding", "linear subclass"])
def test_what_is_saved(kind):
    """One activation beyond plain LoRA."""
    _, ours = twins(kind)
    torch.manual_seed(0)
    plain = get_peft_model(Net(kind), config(kind, use_dora=False))

    def held(model):
        x = given(model)
        y, saved = saved_by(lambda: model.base_model.model.layer(x))
        own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), x)}
        kept = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
        return sum(size for at, size in kept.items() if at not in own), y

    lora, y = held(plain)
    assert held(ours)[0] <= lora + y.nbytes + 2 * 4 * y.shape[-1]


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
    bias = 0 if layer.base_layer.bias is None else layer.base_layer.bias.view(
        (-1, *(1 for _ in range(base.dim() - 2))) if "conv" in kind else -1
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
        with pytest.raises(ValueError, match="has a strength of 0.5, with which PEFT's own code cannot merge"):
            hooked.merge_adapter()
        assert not lora_layers(hooked)[0].merged
