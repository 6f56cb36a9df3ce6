"""Hooks on a patched layer's parts: each fires once, and the results are stock PEFT's."""

from __future__ import annotations

import pytest
import torch
from torch.nn.modules import module as nn_module

pytest.importorskip("peft")
pytest.importorskip("transformers")

from peft_models import (
    FIRST,
    SECOND,
    agree,
    counted,
    one_thread,  # noqa: F401
    parts,
    toy_solve,
    toy_twins,
)

with_dropout = pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["", "dropout"])


HOOKS = {
    "forward": lambda module, hook: module.register_forward_hook(hook),
    "forward pre": lambda module, hook: module.register_forward_pre_hook(hook),
    "forward with keywords": lambda module, hook: module.register_forward_hook(hook, with_kwargs=True),
    "backward": lambda module, hook: module.register_full_backward_hook(hook),
    "backward pre": lambda module, hook: module.register_full_backward_pre_hook(hook),
}


# PEFT does not call a dropout that is an identity.
PARTS = [(part, p) for part in ("base", "A", "B", "magnitude", "layer") for p in (0.0, 0.3)] + [("dropout", 0.3)]


@pytest.mark.parametrize("part, dropout", PARTS)
@pytest.mark.parametrize("register", HOOKS.values(), ids=HOOKS.keys())
def test_hooks_fire_once(register, part, dropout):
    stock, ours, handle = toy_twins(lora_dropout=dropout)
    fired = []
    registered = register(parts(ours)[part], lambda *args: fired.append(part))
    agree(stock, ours)
    assert fired == [part]
    registered.remove()
    agree(stock, ours)
    assert fired == [part] and handle.patched == [FIRST, SECOND]


@with_dropout
@pytest.mark.parametrize("magnitude", [False, True], ids=["", "magnitude"])
def test_hooks_on_all_modules_at_once(dropout, magnitude, monkeypatch):
    """With one on the magnitude PEFT's own module composes, which would call A and B twice."""
    stock, ours, _ = toy_twins(lora_dropout=dropout)
    fired = []
    hooked = ("base", "A", "B", *(("magnitude",) if magnitude else ()))
    for name in hooked:
        for kind, register in HOOKS.items():
            register(parts(ours)[name], lambda *args, name=name, kind=kind: fired.append((name, kind)))
    with counted(monkeypatch) as counts:
        agree(stock, ours)
    assert sorted(fired) == sorted((name, kind) for name in hooked for kind in HOOKS)
    assert sum(counts.values()) == 2 - magnitude


@with_dropout
def test_a_hook_for_all_modules_fires_once_for_each(dropout):
    stock, ours, _ = toy_twins(lora_dropout=dropout)
    fired = []
    hook = nn_module.register_module_forward_hook(lambda module, *args: fired.append(module))
    try:
        result = toy_solve(ours)
    finally:
        hook.remove()
    torch.testing.assert_close(result, toy_solve(stock))
    for name in ("base", "A", "B", "layer"):
        assert fired.count(parts(ours)[name]) == 1


@with_dropout
def test_hooks_that_change_the_base_result(dropout):
    stock, ours, _ = toy_twins(lora_dropout=dropout)
    for model in (stock, ours):
        parts(model)["base"].register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))
        parts(model)["base"].register_forward_hook(lambda module, args, result: result * 3 + 1)
    agree(stock, ours)


@pytest.mark.parametrize("part, dropout", [case for case in PARTS if case[0] != "magnitude"])
def test_a_forward_of_a_modules_own(part, dropout):
    stock, ours, _ = toy_twins(lora_dropout=dropout)
    calls = []
    module = parts(ours)[part]
    original = module.forward
    module.forward = lambda *args: calls.append(part) or original(*args)
    agree(stock, ours)
    assert calls == [part]
