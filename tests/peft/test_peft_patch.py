"""`patch_peft`: what it reaches, what its handle says, the way back, and its errors."""

from __future__ import annotations

import copy
import logging
import subprocess
import sys
import threading
import warnings

import pytest
import torch
import torch.nn.utils.parametrize as parametrize
from torch import nn
from torch.nn.utils import prune

pytest.importorskip("peft")
pytest.importorskip("transformers")

import peft
from helpers import same_bits
from peft import LoraConfig, get_peft_model
from peft.tuners import lora
from peft_models import (
    FIRST,
    SECOND,
    Toy,
    anatomy,
    batch,
    counted,
    one_thread,  # noqa: F401
    solve,
    toy,
    toy_input,
    toy_solve,
    toy_twins,
    twins,
    wrapped,
)

import dora_kernels
from dora_kernels.peft.linear import DoraLinear


def test_the_handle():
    stock = wrapped(toy(others=True), "special")
    handle = dora_kernels.patch_peft(stock)
    others = [f"base_model.model.{name}" for name in ("embedding", "conv", "special")]
    assert handle.patched == [FIRST, SECOND, *others[:2]]
    assert list(handle.skipped) == others[2:]
    assert handle.skipped[others[2]].startswith("its forward was replaced")
    assert repr(handle) == "PatchHandle(patched=4, skipped=1)"
    assert type(stock.get_submodule(others[2])) is lora.Linear, "what is skipped is untouched"


def test_a_layer_whose_weight_its_parent_reads():
    """`nn.MultiheadAttention` never calls its output projection: nobody's adapter runs there."""
    block = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "after": nn.Linear(8, 8)})
    stock = get_peft_model(block, LoraConfig(r=2, target_modules=["out_proj", "after"], use_dora=True))
    handle = dora_kernels.patch_peft(stock)
    assert handle.patched == ["base_model.model.after"]
    assert handle.skipped == {
        "base_model.model.attention.out_proj": "MultiheadAttention reads its weight and never calls it"
    }


@pytest.mark.parametrize("hooked", ["lora_A", "lora_B", "lora_magnitude_vector"])
@pytest.mark.parametrize("name", [FIRST, "base_model.model.conv"])
def test_restored_while_a_layer_is_called(name, hooked):
    """As another thread may do it: the call ends right, and the next is PEFT's."""
    layer = toy(others=True).eval().get_submodule(name)
    x = toy_input() if name == FIRST else torch.randn(2, 1, 5, 5)
    expected, stock = layer(x), type(layer)
    handle = dora_kernels.patch_peft(layer)
    calls = []
    layer.get_submodule(f"{hooked}.default").register_forward_pre_hook(lambda *_: calls.append(handle.restore()))
    assert type(layer) is not stock
    for _ in range(2):
        torch.testing.assert_close(layer(x), expected)
    assert calls and type(layer) is stock


def test_calls_while_another_thread_patches_and_restores():
    model, x = toy(others=True).eval(), toy_input()
    expected, stop, failures = model(x), threading.Event(), []

    def call():
        while not stop.is_set():
            try:
                torch.testing.assert_close(model(x), expected)
            except Exception as error:
                failures.append(error)
                return

    threads = [threading.Thread(target=call) for _ in range(3)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for _ in range(60):
            dora_kernels.patch_peft(model).restore()
    finally:
        sys.setswitchinterval(interval)
        stop.set()
        for thread in threads:
            thread.join()
    assert not failures, failures


def test_names_are_those_of_the_model_that_was_given():
    model = toy()
    assert dora_kernels.patch_peft(model.base_model.model).patched == ["first", "second"]


@pytest.mark.parametrize("kind", ["toy", "llama", "gpt2"])
@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["", "dropout"])
def test_restore_gives_the_model_back_as_it_was(kind, dropout):
    if kind == "toy":
        stock, ours, handle = toy_twins(others=True, lora_dropout=dropout)
        run = toy_solve
    else:
        stock, ours = twins(kind, lora_dropout=dropout)
        handle = dora_kernels.patch_peft(ours)

        def run(model):
            torch.manual_seed(0)
            return solve(model, batch(kind))

    before = copy.deepcopy(stock)
    assert anatomy(ours) != anatomy(before)
    run(ours)
    handle.restore()
    assert handle.patched == [] and handle.skipped[next(iter(handle.skipped))]
    assert anatomy(ours) == anatomy(before)
    assert same_bits(run(ours), run(stock)), "not stock's bits"
    handle.restore()
    assert anatomy(ours) == anatomy(before)
    # And patched again, by a handle of its own.
    again = dora_kernels.patch_peft(ours)
    assert again.patched == handle.patched != []
    run(ours)
    again.restore()
    assert anatomy(ours) == anatomy(before) and same_bits(run(ours), run(stock))


def test_adapters_added_while_patched_are_stock_after_restore():
    stock, ours, handle = toy_twins()
    other = LoraConfig(r=2, use_dora=True, target_modules=["first", "second"], init_lora_weights=False)
    for model in (stock, ours):
        torch.manual_seed(0)
        model.add_adapter("other", other)
    handle.restore()
    assert anatomy(ours) == anatomy(stock)
    for model in (stock, ours):
        model.set_adapter("other")
    assert same_bits(toy_solve(ours), toy_solve(stock))


def test_patched_twice():
    stock, ours, handle = toy_twins()
    patched = anatomy(ours)
    second = dora_kernels.patch_peft(ours)
    assert anatomy(ours) == patched
    assert second.patched == handle.patched == [FIRST, SECOND]
    handle.restore()
    assert anatomy(ours) == anatomy(stock) and second.patched == []
    second.restore()
    assert anatomy(ours) == anatomy(stock)


def test_restore_reaches_classes_derived_from_the_patch():
    """As FSDP2's `fully_shard` derives one from the class of each module it is given."""
    _, ours, handle = toy_twins()
    layers = [layer for layer in ours.modules() if type(layer) is DoraLinear]
    for layer in layers:
        layer.__class__ = type("FSDPDoraLinear", (DoraLinear,), {})
    handle.restore()
    with pytest.MonkeyPatch.context() as patch, counted(patch) as calls:
        toy_solve(ours)
    assert layers and not any(calls.values())


@pytest.mark.parametrize("strength", [1.0, 0.3])
@pytest.mark.parametrize("keep_unmerged", [True, False], ids=["", "no copy"])
def test_restored_while_merged(strength, keep_unmerged):
    """Unmerged: PEFT knows neither the copy nor the strength."""
    stock, ours, _ = toy_twins(others=True)
    handle = dora_kernels.patch_peft(ours, keep_unmerged=keep_unmerged)
    before = {name: p.clone() for name, p in ours.named_parameters() if "base_layer" in name}
    dora_kernels.set_dora_strength(ours, strength)
    ours.merge_adapter()
    handle.restore()
    for name, parameter in before.items():
        rounding = {"rtol": 0, "atol": 0} if keep_unmerged else {}
        torch.testing.assert_close(ours.get_parameter(name), parameter, **rounding)
    assert anatomy(ours) == anatomy(stock)


@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["", "dropout"])
def test_calls_reach_this_package(dropout, monkeypatch):
    """Once for every layer that is listed, and for no other."""
    stock, ours, handle = toy_twins(lora_dropout=dropout)
    with counted(monkeypatch) as counts:
        ours(toy_input())
        assert counts == ({"layer": 0, "norm": 2} if dropout else {"layer": 2, "norm": 0})
        ours.eval()(toy_input())
        assert counts == ({"layer": 2, "norm": 2} if dropout else {"layer": 4, "norm": 0})
        with ours.disable_adapter():
            ours(toy_input())
        handle.restore()
        ours(toy_input())
        stock(toy_input())
        assert sum(counts.values()) == 4


def test_one_line_is_logged(caplog):
    caplog.set_level(logging.INFO)
    _, ours, _ = toy_twins(others=True)
    ours(toy_input())
    records = [record for record in caplog.records if record.name.startswith("dora_kernels")]
    assert [(record.levelname, record.getMessage()) for record in records] == [
        ("INFO", "patched 5 DoRA layers of PeftModel, skipped 0, backend torch")
    ]


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def freed(layer):
    layer.lora_A["default"].weight.untyped_storage().resize_(0)


ELSEWHERE = {
    "parametrized base": lambda layer: parametrize.register_parametrization(layer.base_layer, "weight", Doubled()),
    "parametrized A": lambda layer: parametrize.register_parametrization(layer.lora_A["default"], "weight", Doubled()),
    "pruned base": lambda layer: prune.random_unstructured(layer.base_layer, "weight", 0.5),
    "pruned bias": lambda layer: prune.random_unstructured(layer.base_layer, "bias", 0.5),
    "pruned B": lambda layer: prune.random_unstructured(layer.lora_B["default"], "weight", 0.5),
    "weight norm": lambda layer: nn.utils.parametrizations.weight_norm(layer.lora_B["default"]),
    "a wrapped magnitude": lambda layer: layer.lora_magnitude_vector.__setattr__("default", Wrapper(layer)),
    "A of another class": lambda layer: setattr(layer.lora_A["default"], "__class__", type("Mine", (nn.Linear,), {})),
}
AWAY = {
    "base on meta": lambda layer: layer.base_layer.to("meta"),
    "A on meta": lambda layer: layer.lora_A.to("meta"),
    "A's storage freed": freed,
    "W gathered away": lambda layer: setattr(layer.base_layer.weight, "data", torch.empty(0)),
}


class Wrapper(nn.Module):
    """As FSDP puts one around PEFT's small modules."""

    def __init__(self, layer):
        super().__init__()
        self.module = layer.lora_magnitude_vector["default"]

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


@pytest.mark.filterwarnings("error:DoRA layers")  # PEFT computes them, and no foreign kernel
@pytest.mark.parametrize("change", ELSEWHERE.values(), ids=ELSEWHERE.keys())
@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["", "dropout"])
def test_weights_that_may_not_be_read(change, dropout, monkeypatch):
    """The layer is left to PEFT from then on, and the handle says so."""
    stock, ours, handle = toy_twins(lora_dropout=dropout)
    for model in (stock, ours):
        torch.manual_seed(0)
        change(model.base_model.model.first)
    assert handle.patched == [SECOND] and list(handle.skipped) == [FIRST]
    with counted(monkeypatch) as counts:
        torch.testing.assert_close(toy_solve(ours), toy_solve(stock))
    assert sum(counts.values()) == 1


@pytest.mark.parametrize("change", AWAY.values(), ids=AWAY.keys())
def test_weights_that_are_away(change):
    """Stock PEFT raises there; at any rate nothing reads what is not there."""
    _, ours, handle = toy_twins()
    change(ours.base_model.model.first)
    assert handle.patched == [SECOND]
    assert "cannot be read" in handle.skipped[FIRST]


def test_a_layer_comes_back_when_its_weights_do(monkeypatch):
    _, ours, handle = toy_twins()
    layer = ours.base_model.model.first
    parametrize.register_parametrization(layer.lora_A["default"], "weight", Doubled())
    assert handle.patched == [SECOND]
    parametrize.remove_parametrizations(layer.lora_A["default"], "weight")
    assert handle.patched == [FIRST, SECOND]
    weight = layer.base_layer.weight.data
    layer.base_layer.weight.data = torch.empty(0)
    assert handle.patched == [SECOND]
    layer.base_layer.weight.data = weight
    assert handle.patched == [FIRST, SECOND]


NOTHING = {
    "no PEFT layers": (lambda: Toy(False), "it has no LoRA layers; call peft.get_peft_model"),
    "plain LoRA": (lambda: toy(use_dora=False), "none of its 2 LoRA layers has a DoRA adapter; set use_dora=True"),
    "all skipped": (
        lambda: wrapped(toy(others=True, target_modules=["special"]), "special"),
        r"none of its 1 DoRA layers is supported; base_model\.model\.special: its forward was replaced",
    ),
    "another method": (lambda: get_peft_model(Toy(False), peft.LoHaConfig(target_modules=["first"])), "no LoRA layers"),
}


@pytest.mark.parametrize("make, message", NOTHING.values(), ids=NOTHING.keys())
def test_nothing_to_patch(make, message):
    model = make()
    before = anatomy(model)
    with pytest.raises(ValueError, match=f"^model: nothing to patch, .*{message}"):
        dora_kernels.patch_peft(model)
    assert anatomy(model) == before


@pytest.mark.parametrize("model", [None, "llama", {}, Toy])
def test_not_a_model(model):
    with pytest.raises(TypeError, match=r"^model: expected a torch\.nn\.Module, got (NoneType|str|dict|type)$"):
        dora_kernels.patch_peft(model)


def test_importing_changes_nothing():
    script = """
import sys
import dora_kernels
assert "peft" not in sys.modules, "PEFT was imported"
from peft.tuners import lora
from peft.tuners.lora import variants
from peft.tuners.tuners_utils import BaseTuner
def state():
    classes = BaseTuner, lora.LoraModel, lora.Linear, lora.layer, variants.DoraLinearVariant
    return [dict(vars(each)) for each in classes]
before = state()
dora_kernels.patch_peft, dora_kernels.patch_peft_globally, dora_kernels.PatchHandle
assert state() == before, "importing patched PEFT"
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


@pytest.mark.parametrize(
    "version, warns", [("0.16.3", True), ("0.17.0", False), ("0.21.9.dev0", False), ("0.22.0", True)]
)
def test_versions_that_are_not_tested(version, warns, monkeypatch):
    """They work, and it is said once."""
    monkeypatch.setattr(peft, "__version__", version)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            assert dora_kernels.patch_peft(toy()).patched == [FIRST, SECOND]
    messages = [str(each.message) for each in caught if "dora_kernels" in str(each.message)]
    assert messages == ([f"dora_kernels is tested with peft 0.17 to 0.21, and this is {version}"] if warns else [])
