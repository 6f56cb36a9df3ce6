"""Every kind of layer that PEFT gives DoRA to, under every operation: stock beside patched, adapters far from init."""

from __future__ import annotations

import contextlib
import copy
import pickle

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

from helpers import bf16, f16, f32, saved_by
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from peft_kinds import (
    KINDS,
    Net,
    active,
    add,
    config,
    given,
    output,
    solve,
    twins,
)
from peft_models import (
    check,
    lora_layers,
    move_adapter,
    one_thread,  # noqa: F401
)
from torch import nn
from torch.utils.checkpoint import checkpoint

import dora_kernels
from dora_kernels.peft.state import SWITCH

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
def test_compiled(kind):
    """One graph, forward and backward; none of the kinds breaks it."""
    torch._dynamo.reset()
    stock, ours = twins(kind)
    ours.forward = torch.compile(ours.forward, backend="aot_eager", fullgraph=True)
    check(solve, stock, ours)
    torch._dynamo.reset()


@KINDS
def test_pefts_own_caching(kind):
    """`DoraCaching` fills and empties PEFT's caches as without this package."""
    helpers = pytest.importorskip("peft.helpers")
    if not hasattr(helpers, "DoraCaching"):
        pytest.skip("since peft 0.18")
    models = twins(kind)
    caches = [lora_layers(model)[0].lora_magnitude_vector["default"]._dora_cache for model in models]

    def run(full):
        with torch.no_grad():
            stock, ours = (model(given(model)) for model in models)
        torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-5)
        assert [bool(cache) for cache in caches] == [full, full]

    run(False)
    with helpers.DoraCaching():
        run(False)  # in training
        for model in models:
            model.eval()
        run(True)
        pickle.dumps(models[1])
    run(False)
    with helpers.DoraCaching():
        run(True)
        for model in models:
            model.train()
        assert not any(caches)
        run(False)


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
    rows = len(given(ours))
    alone = {}
    for name in ("default", "second", "plain", "__base__"):
        with ours.disable_adapter() if name == "__base__" else contextlib.nullcontext():
            alone[name] = output(ours if name == "__base__" else active(ours, name))["y"]
    for names in (["second", "__base__", "default", "plain"], ["default", "default", "plain", "default"]):
        names = names[:rows]
        with pytest.raises(ValueError, match="DoRA"):
            output(stock, adapter_names=names)
        mixed = output(ours, adapter_names=names)["y"]
        assert mixed.dtype == alone["default"].dtype
        wanted = torch.stack([alone[name][row] for row, name in enumerate(names)])
        # A bfloat16 layer on its own is one function, in a batch a composition: one rounding of 1 apart.
        torch.testing.assert_close(mixed, wanted, **({} if adapters else {"rtol": 0, "atol": 2**-7}))


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
    monkeypatch.setattr("dora_kernels.core.products.BLOCK_ELEMENTS", 1 << 12)
    monkeypatch.setattr("dora_kernels.core.products._kept.block", None)
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
