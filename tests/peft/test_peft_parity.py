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
    one_thread,  # noqa: F401
    peft_model,
    solve,
    twins,
)

import dora_kernels
from dora_kernels.peft.state import SWITCH

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
    # At 3e-3 and the default eps, with which a gradient that is all rounding moves its parameter as far as any other,
    # one of 13 roundings of stock's own T5 ran away from the others.
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-3, eps=1e-3, fused=fused, foreach=False)
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

    check(seeded, stock, ours, bf16, context)
    with counted(monkeypatch) as counts, context():
        seeded(ours)
    name = "norm" if dropout else "layer"
    assert counts[name] == len(lora_layers(ours)) and sum(counts.values()) == counts[name]


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["", "dropout"])
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_gradient_checkpointing(kind, dropout, use_reentrant):
    stock, ours = twins(kind, lora_dropout=dropout)

    def checkpointed(model):
        model.train()
        if next(model.parameters()).dtype != torch.float64:  # the oracle's `Float64` does not reach into a backward
            model.enable_input_require_grads()
            model.config.use_cache = False
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        torch.manual_seed(0)
        return solve(model, batch(kind))

    check(checkpointed, stock, ours)
    before = [cache.computed for cache in caches(ours)]
    checkpointed(ours)
    # The recomputation of a forward takes the norm of that forward.
    assert [cache.computed for cache in caches(ours)] == before


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
