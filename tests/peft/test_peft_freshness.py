"""A patched model's kept norms are never stale, whoever writes its weights and however.

A result with a kept norm must have the very bits of one computed afresh, and be stock PEFT's for the same weights.
"""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

from helpers import adamw_8bit, same_bits
from peft import LoraConfig
from peft_models import (
    agree,
    kept_norms,
    lora_layers,
    move_adapter,
    one_thread,  # noqa: F401
    parts,
    toy_input,
    toy_solve,
    toy_twins,
)

from dora_kernels import invalidate
from dora_kernels.peft.state import SWITCH

with_dropout = pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["", "dropout"])
trained = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])


def forward(model):
    torch.manual_seed(0)
    return model(toy_input())


def is_fresh(model):
    kept = forward(model)
    invalidate(model)
    return torch.equal(kept, forward(model))


def adapters(model):
    return [p for p in model.parameters() if p.requires_grad]


STEPS = {
    "data": lambda p, grad: p.data.sub_(grad, alpha=0.05),
    "new data": lambda p, grad: setattr(p, "data", p.data - 0.05 * grad),
    "no_grad": lambda p, grad: p.sub_(grad, alpha=0.05),
}


@with_dropout
@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS.keys())
def test_updates_by_hand(step, dropout):
    stock, ours, _ = toy_twins(lora_dropout=dropout)
    for _ in range(4):
        agree(stock, ours)
        for model in (stock, ours):
            forward(model).square().mean().backward()
            with torch.no_grad():
                for p in adapters(model):
                    step(p, p.grad)
        assert is_fresh(ours), "a stale norm"
        stock.load_state_dict(ours.state_dict())


OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.05),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
    "fused AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, fused=True),
    "8-bit AdamW": lambda parameters: adamw_8bit(parameters, lr=0.01),
}


@with_dropout
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_optimizers_and_accumulation(make, dropout):
    _, ours, _ = toy_twins(lora_dropout=dropout)
    optimizer = make(adapters(ours))
    for step in range(4):
        for _ in range(3):
            forward(ours).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(forward(ours), forward(copy.deepcopy(ours))), "a stale norm"
        assert {cache.computed for cache in kept_norms(ours)} == {step + 2}, "not one norm for each step"


@with_dropout
@trained
@pytest.mark.parametrize("part", ["base", "A", "B"])
def test_weights_written_in_place(part, training, dropout):
    stock, ours, _ = toy_twins(lora_dropout=dropout)
    stock.train(training), ours.train(training)
    for _ in range(2):
        forward(ours)
        for model in (stock, ours):
            with torch.no_grad():
                parts(model)[part].weight.mul_(1.3)
        assert is_fresh(ours), "a stale norm"
        agree(stock, ours)


@with_dropout
@pytest.mark.parametrize("part", ["base", "A", "B"])
def test_weights_written_through_data_in_evaluation(part, dropout):
    stock, ours, _ = toy_twins(lora_dropout=dropout)
    stock.eval(), ours.eval()
    for _ in range(2):
        forward(ours)
        for model in (stock, ours):
            parts(model)[part].weight.data.mul_(1.3)
        assert is_fresh(ours), "a stale norm"
        agree(stock, ours)


def test_swaps_of_an_average_in_evaluation():
    """As an EMA does, before validation and after it."""
    _, ours, _ = toy_twins()
    ours.eval()
    trained_weights = [p.detach().clone() for p in adapters(ours)]
    averages = [p * 0.8 for p in trained_weights]
    results = []
    for weights in (trained_weights, averages) * 3:
        for p, value in zip(adapters(ours), weights, strict=True):
            p.data.copy_(value)
        results.append(forward(ours).detach())
        assert is_fresh(ours), "a stale norm"
    assert torch.equal(results[0], results[2]) and torch.equal(results[1], results[3])
    assert not torch.allclose(results[0], results[1])


@trained
def test_load_state_dict(training):
    stock, ours, _ = toy_twins()
    stock.train(training), ours.train(training)
    forward(ours)
    state = {name: t * 0.7 for name, t in ours.state_dict().items()}
    for model in (stock, ours):
        model.load_state_dict(state)
    assert is_fresh(ours), "a stale norm"
    agree(stock, ours)
    for assign in (False, True):
        ours.load_state_dict({name: t * 1.1 for name, t in state.items()}, assign=assign)
        assert is_fresh(ours), "a stale norm"


@trained
def test_norms_are_no_part_of_the_state(training):
    stock, ours, _ = toy_twins()
    ours.train(training)
    forward(ours)
    assert all(cache.computed for cache in kept_norms(ours))
    assert list(ours.state_dict()) == list(stock.state_dict())
    assert [name for name, _ in ours.named_buffers()] == [name for name, _ in stock.named_buffers()]


@with_dropout
@trained
def test_set_scale(training, dropout):
    stock, ours, _ = toy_twins(lora_dropout=dropout)
    stock.train(training), ours.train(training)
    for scale in (0.3, 2, 0.3):
        forward(ours)
        for model in (stock, ours):
            for layer in lora_layers(model):
                layer.set_scale("default", scale)
        assert is_fresh(ours), "a stale norm"
        agree(stock, ours)


@with_dropout
@trained
def test_a_base_that_another_adapter_was_merged_into(training, dropout):
    stock, ours, _ = toy_twins(lora_dropout=dropout)
    for model in (stock, ours):
        torch.manual_seed(0)
        model.add_adapter("other", LoraConfig(r=2, target_modules=["first", "second"], init_lora_weights=False))
        model.train(training)
        model.set_adapter("default")
        forward(model)
        model.merge_adapter(["other"])
        for layer in lora_layers(model):  # for good
            layer.merged_adapters.clear()
    assert is_fresh(ours), "a stale norm"
    agree(stock, ours)


@with_dropout
@trained
def test_merged_and_unmerged(training, dropout):
    """Unmerging rounds, so even the base weight that comes back is another."""
    stock, ours, _ = toy_twins(lora_dropout=dropout)
    stock.train(training), ours.train(training)
    for _ in range(3):
        for model in (stock, ours):
            forward(model)
            model.merge_adapter()
            forward(model)
            model.unmerge_adapter()
        assert is_fresh(ours), "a stale norm"
        agree(stock, ours)


def test_merging_forgets_norms():
    """Though on the CPU the weights would show it."""
    _, ours, _ = toy_twins()
    for change in (ours.merge_adapter, ours.unmerge_adapter):
        forward(ours)
        change()
        assert not any(cache._norms for cache in kept_norms(ours))


@trained
def test_an_adapter_deleted_and_added_again(training):
    _, ours, _ = toy_twins()
    for seed in (7, 8):
        ours.add_adapter("other", LoraConfig(r=3, use_dora=True, target_modules=["first", "second"]))
        move_adapter(ours, "other", seed)
        ours.set_adapter("other")
        ours.train(training)
        assert is_fresh(ours), "a stale norm"
        ours.set_adapter("default")
        ours.delete_adapter("other")
        assert is_fresh(ours), "a stale norm"


def test_nothing_of_deleted_adapters_is_kept():
    _, ours, _ = toy_twins()
    for name in ("one", "two", "three"):
        ours.add_adapter(name, LoraConfig(r=3, use_dora=True, target_modules=["first", "second"]))
        ours.set_adapter(name)
        ours(toy_input())
        ours.set_adapter("default")
        ours.delete_adapter(name)
    ours(toy_input())
    assert [list(vars(layer)[SWITCH]) for layer in lora_layers(ours)] == [["default"], ["default"]]


@trained
def test_two_adapters_have_two_norms(training):
    stock, ours, _ = toy_twins()
    for model in (stock, ours):
        model.add_adapter("other", LoraConfig(r=2, use_dora=True, target_modules=["first", "second"]))
        move_adapter(model, "other", seed=7)
        model.train(training)
    for name in ("default", "other") * 3:
        for model in (stock, ours):
            model.set_adapter(name)
        assert is_fresh(ours), "a stale norm"
        agree(stock, ours)


def test_moved_to_other_dtypes():
    stock, ours, _ = toy_twins()
    for dtype in (torch.float64, torch.bfloat16, torch.float32):
        for model in (stock, ours):
            model.to(dtype)
            y = model(toy_input().to(dtype))
        assert y.dtype == dtype
    agree(stock, ours)


def test_the_same_bits_every_time():
    _, ours, _ = toy_twins()
    first = toy_solve(ours)
    assert all(same_bits(toy_solve(ours), first) for _ in range(3))
