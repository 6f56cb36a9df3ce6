"""A patched PEFT model has stock PEFT's numbers: outputs, losses, every gradient, and whole training runs."""

from __future__ import annotations

import contextlib
import functools

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

from peft_models import (
    KINDS,
    batch,
    check,
    check_logits,
    check_parity,
    config,
    counted,
    lora_layers,
    move_adapter,
    peft_model,
    solve,
    twins,
)

import dora_kernels
from dora_kernels.peft_layers import SWITCH

bf16 = torch.bfloat16
kinds = pytest.mark.parametrize("kind", KINDS)


def caches(model):
    return [cache for layer in lora_layers(model) for cache in vars(layer)[SWITCH].values()]


@kinds
def test_outputs_and_gradients(kind, monkeypatch):
    stock, ours = twins(kind)
    check_parity(stock, ours, batch(kind))
    stock.eval(), ours.eval()
    check_logits(stock, ours, batch(kind))
    with counted(monkeypatch) as counts:
        solve(ours, batch(kind))
    assert counts == {"layer": len(lora_layers(ours)), "norm": 0}


def train(model, kind, fused):
    """The losses of six steps, and the parameters after them. The model is trained in place."""
    model.train()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=3e-3, fused=fused, foreach=False)
    results = {}
    for step in range(6):
        loss = model(**batch(kind, seed=step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        results[f"loss {step}"] = loss.detach()
    return results | {name: p.detach().clone() for name, p in parameters.items()}


@kinds
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_training(kind, fused):
    stock, ours = twins(kind)
    before = ours.state_dict()
    before = {name: t.clone() for name, t in before.items()}
    check(functools.partial(train, kind=kind, fused=fused), stock, ours)
    after = ours.state_dict()
    assert not any(torch.equal(after[name], before[name]) for name in after if "lora_" in name)
    stock.load_state_dict(after)
    check_parity(stock, ours, batch(kind, seed=9))
    stock.eval(), ours.eval()
    check_logits(stock, ours, batch(kind, seed=9))


@kinds
def test_dropout(kind, monkeypatch):
    """PEFT's own form, with a second base product of the dropped input; the same random numbers are drawn."""
    stock, ours = twins(kind, lora_dropout=0.4)

    def seeded(model):
        model.train()
        torch.manual_seed(0)
        return solve(model, batch(kind))

    check(seeded, stock, ours)
    assert seeded(ours)["loss"] != solve(ours, batch(kind))["loss"], "the dropout does nothing"
    with counted(monkeypatch) as counts:
        solve(ours, batch(kind))
    assert counts == {"layer": 0, "norm": len(lora_layers(ours))}
    ours.eval(), stock.eval()
    check_parity(stock, ours, batch(kind))
    # Its own dropout module asleep in a layer that trains.
    for model in (stock, ours):
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.eval()
    check_parity(stock, ours, batch(kind))


OPTIONS = {
    "rank pattern": {"rank_pattern": {"q_proj": 1, "down_proj": 17}},
    "alpha pattern": {"alpha_pattern": {"v_proj": 0.5, "gate_proj": 11}},
    "rslora": {"use_rslora": True, "r": 8},
    "all biases": {"bias": "all"},
    "adapted layers' biases": {"bias": "lora_only"},
    "a head that trains": {"modules_to_save": ["lm_head"]},
    "some layers": {"layers_to_transform": [1]},
    "PiSSA": {"init_lora_weights": "pissa_niter_2"},
    "OLoRA": {"init_lora_weights": "olora"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_options(options):
    stock, ours = twins(**options)
    if options.get("bias"):
        assert any(p.requires_grad for name, p in ours.named_parameters() if name.endswith("q_proj.base_layer.bias"))
    check_parity(stock, ours, batch())


def test_a_base_model_that_trains():
    stock, ours = twins()
    for model in (stock, ours):
        model.requires_grad_(True)
    check_parity(stock, ours, batch())


def test_a_frozen_magnitude():
    stock, ours = twins()
    for model in (stock, ours):
        for name, p in model.named_parameters():
            p.requires_grad_("lora_A" in name)
    check_parity(stock, ours, batch())


autocast = functools.partial(torch.autocast, "cpu", bf16)


@pytest.mark.parametrize("context", [contextlib.nullcontext, autocast], ids=["", "autocast"])
@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["", "dropout"])
@pytest.mark.parametrize("base, adapter", [(bf16, torch.float32), (bf16, bf16), (torch.float32, torch.float32)])
def test_mixed_precision(base, adapter, dropout, context, monkeypatch):
    if base == torch.float32 and context is contextlib.nullcontext:
        pytest.skip("nothing is mixed here")
    stock = peft_model(dtype=base, lora_dropout=dropout)
    assert {p.dtype for p in stock.parameters() if p.requires_grad} == {torch.float32}, "PEFT's default"
    for name, p in stock.named_parameters():
        if "lora_" in name:
            p.data = p.data.to(adapter)
    ours = peft_model(dtype=base, lora_dropout=dropout)
    dora_kernels.patch_peft(ours)
    for name, p in ours.named_parameters():
        if "lora_" in name:
            p.data = p.data.to(adapter)

    def seeded(model):
        torch.manual_seed(0)
        return solve(model, batch())

    check(seeded, stock, ours, context)
    with counted(monkeypatch) as counts, context():
        seeded(ours)
    name = "norm" if dropout else "layer"
    assert counts[name] == len(lora_layers(ours)) and sum(counts.values()) == counts[name]


def test_float64_under_autocast_stays_float64():
    stock, ours = twins()
    stock.double(), ours.double()
    x = torch.randn(5, 32, dtype=torch.float64)
    with autocast():
        theirs, result = (model.get_submodule(NAME)(x) for model in (stock, ours))
    assert result.dtype == theirs.dtype == torch.float64
    torch.testing.assert_close(result, theirs, rtol=1e-12, atol=1e-12)


NAME = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["", "dropout"])
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_gradient_checkpointing(kind, dropout, use_reentrant):
    stock, ours = twins(kind, lora_dropout=dropout)

    def checkpointed(model):
        model.train()
        torch.manual_seed(0)
        return solve(model, batch(kind))

    plain = checkpointed(ours)
    for model in (stock, ours):
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        model.config.use_cache = False
    check(checkpointed, stock, ours)
    results = checkpointed(ours)
    assert all(torch.equal(results[name], plain[name]) for name in plain)
    if dropout == 0.0:
        computed = [cache.computed for cache in caches(ours)]
        checkpointed(ours)
        # The recomputation of a forward takes the norm of that forward.
        assert all(cache.computed <= before + 1 for cache, before in zip(caches(ours), computed, strict=True))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_generation_with_a_cache(kind):
    stock, ours = twins(kind)
    stock.eval(), ours.eval()
    inputs = {"input_ids": batch(kind)["input_ids"]}

    def generate(model):
        return model.generate(
            **inputs, max_new_tokens=8, do_sample=False, use_cache=True, output_scores=True,
            return_dict_in_generate=True,
        )  # fmt: skip

    def scores(model):
        return {str(i): step for i, step in enumerate(generate(model).scores)}

    check(scores, stock, ours)
    assert torch.equal(generate(ours).sequences, generate(stock).sequences)
    assert {cache.computed for cache in caches(ours)} == {1}, "a norm was computed again"


@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["", "dropout"])
def test_compiled_in_one_graph(dropout, monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    stock, ours = twins(lora_dropout=dropout)
    stock.config.use_cache = ours.config.use_cache = False
    stock.eval(), ours.eval()
    ours.compile(fullgraph=True, backend="aot_eager")
    check_parity(stock, ours, batch())
    for model in (stock, ours):
        for layer in lora_layers(model):
            layer.set_scale("default", 0.3)
            layer.lora_B["default"].weight.data.mul_(1.2)
    check_parity(stock, ours, batch(tokens=(3, 7)))
    if dropout == 0.0:
        for model in (stock, ours):
            model.train()
        check_parity(stock, ours, batch())
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["", "dropout"])
@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3)])
def test_no_tokens(kind, shape, dropout):
    for model in twins(kind, lora_dropout=dropout):
        layer = lora_layers(model)[0]
        x = torch.randn(*shape, layer.in_features, requires_grad=True)
        y = layer(x)
        assert y.shape == (*shape, layer.out_features)
        y.sum().backward()
        assert x.grad.shape == x.shape
        assert all((p.grad == 0).all() for name, p in layer.named_parameters() if "lora_" in name)


def test_one_token_without_leading_dimensions():
    """Stock PEFT gives [1, out_features] here."""
    stock, ours = (lora_layers(model)[0] for model in twins())
    x = torch.randn(32)
    assert ours(x).shape == (32,)
    torch.testing.assert_close(ours(x), stock(x)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", ["transposed", "expanded", "every other"])
def test_layouts_of_the_input(layout):
    stock, ours = (lora_layers(model)[0] for model in twins())
    x = {
        "transposed": torch.randn(32, 5, 4).transpose(0, 2),
        "expanded": torch.randn(32).expand(4, 5, 32),
        "every other": torch.randn(4, 5, 64)[..., ::2],
    }[layout]
    torch.testing.assert_close(ours(x), stock(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp", "trace"])
def test_function_transforms(transform):
    """PEFT's plain operations run under them."""
    x = torch.randn(4, 32)
    results = []
    for layer in (lora_layers(model)[0] for model in twins()):
        parameters = {name: p.detach() for name, p in layer.named_parameters()}

        def call(parameters, x, layer=layer):
            return torch.func.functional_call(layer, parameters, (x,)).square().sum()

        if transform == "grad":
            results.append(torch.func.grad(call)(parameters, x)["lora_A.default.weight"])
        elif transform == "vmap":
            results.append(torch.func.vmap(call, in_dims=(None, 0))(parameters, x))
        elif transform == "jvp":
            results.append(torch.func.jvp(lambda x, call=call, p=parameters: call(p, x), (x,), (x,))[1])
        else:
            with torch.no_grad():
                results.append(torch.jit.trace(layer, (x,))(x + 1))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)


def test_zero_rows_are_not_nan():
    """Stock PEFT divides by zero: peft issue 2049."""
    _, ours = twins()
    layer = lora_layers(ours)[0]
    with torch.no_grad():
        layer.base_layer.weight[5] = 0
        layer.lora_B["default"].weight[5] = 0
        layer.lora_magnitude_vector["default"].weight[5] = 0
    assert all(t.isfinite().all() for t in solve(ours, batch()).values())


def test_a_new_adapter_is_the_identity_to_float32():
    from peft import get_peft_model
    from peft_models import base_model

    plain = base_model("llama")
    with torch.no_grad():
        before = plain(**batch()).logits
        model = get_peft_model(plain, config())
        dora_kernels.patch_peft(model)
        torch.testing.assert_close(model(**batch()).logits, before, rtol=1e-5, atol=1e-6)
        move_adapter(model)
        assert not torch.allclose(model(**batch()).logits, before, rtol=1e-2, atol=1e-2)
