"""`patch_peft_globally`: every entrance of PEFT, models with DoRA and only those, and the end of it."""

from __future__ import annotations

import gc
import logging

import pytest

pytest.importorskip("peft")
pytest.importorskip("transformers")

import peft
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTuner
from peft_models import (
    FIRST,
    SECOND,
    Toy,
    anatomy,
    base_model,
    batch,
    config,
    counted,
    lora_layers,
    move_adapter,
    one_thread,  # noqa: F401
    toy,
)

import dora_kernels
from dora_kernels.peft.linear import DoraLinear
from dora_kernels.peft.state import SWITCH


@pytest.fixture
def everywhere():
    original = BaseTuner.inject_adapter
    handle = dora_kernels.patch_peft_globally()
    yield handle
    handle.restore()
    assert BaseTuner.inject_adapter is original


def dora(model):
    return all(type(layer) is DoraLinear for layer in lora_layers(model)) and bool(lora_layers(model))


def load_adapter(tmp_path):
    toy().save_pretrained(tmp_path)
    model = get_peft_model(Toy(False), LoraConfig(r=2, target_modules=["first"]))
    model.load_adapter(tmp_path, "loaded")
    model.set_adapter("loaded")
    return model


def from_pretrained(tmp_path):
    toy().save_pretrained(tmp_path)
    return peft.PeftModel.from_pretrained(Toy(False), tmp_path)


def add_adapter(tmp_path):
    model = get_peft_model(Toy(False), LoraConfig(r=2, target_modules=["first"]))
    model.add_adapter("other", LoraConfig(use_dora=True, target_modules=["first", "second"]))
    model.set_adapter("other")
    return model


def inject(tmp_path):
    return inject_adapter_in_model(LoraConfig(use_dora=True, target_modules=["first", "second"]), Toy(False))


def transformers_add_adapter(tmp_path):
    model = base_model("llama")
    model.add_adapter(config("llama"))
    return model


def transformers_load_adapter(tmp_path):
    get_peft_model(base_model("llama"), config("llama")).save_pretrained(tmp_path)
    model = base_model("llama")
    model.load_adapter(str(tmp_path))
    return model


ENTRANCES = [
    lambda tmp_path: toy(), load_adapter, from_pretrained, add_adapter, inject,
    transformers_add_adapter, transformers_load_adapter,
]  # fmt: skip
ENTRANCE_NAMES = ["get_peft_model", *(entrance.__name__ for entrance in ENTRANCES[1:])]


@pytest.mark.parametrize("entrance", ENTRANCES, ids=ENTRANCE_NAMES)
def test_every_entrance(entrance, everywhere, tmp_path, monkeypatch):
    model = move_adapter(entrance(tmp_path))
    assert dora(model)
    names = [name for name, module in model.named_modules() if module in lora_layers(model)]
    assert names and all(any(name.endswith(listed) for listed in everywhere.patched) for name in names)
    with counted(monkeypatch) as counts:
        model(**batch()) if "transformers" in getattr(entrance, "__name__", "") else model(torch.randn(4, 12))
    assert counts["layer"] == len(lora_layers(model))
    everywhere.restore()
    assert not any(isinstance(layer, DoraLinear) for layer in lora_layers(model))
    assert not any(isinstance(layer, DoraLinear) for layer in lora_layers(move_adapter(entrance(tmp_path))))


def test_globally_only_models_made_afterwards_and_only_dora(tmp_path):
    before, plain = toy(), toy(use_dora=False)
    snapshots = anatomy(before), anatomy(plain)
    other = anatomy(get_peft_model(Toy(False), peft.LoHaConfig(target_modules=["first"])))
    handle = dora_kernels.patch_peft_globally()
    try:
        assert anatomy(toy(use_dora=False)) == snapshots[1]
        assert anatomy(get_peft_model(Toy(False), peft.LoHaConfig(target_modules=["first"]))) == other
        assert handle.patched == [] and handle.skipped == {}
        assert anatomy(toy()) != snapshots[0]
        assert (anatomy(before), anatomy(plain)) == snapshots
    finally:
        handle.restore()


def test_globally_one_line_is_logged_for_each_model(everywhere, caplog):
    caplog.set_level(logging.INFO, logger="dora_kernels")
    first = toy(others=True)
    toy(use_dora=False)
    second = toy()
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [f"patched {count} DoRA layers of Toy, backend torch" for count in (5, 2)]
    assert len(everywhere.patched) == 7 and first is not second
    del first
    gc.collect()
    assert len(everywhere.patched) == 2, "the handle keeps models alive"


def test_a_wrapper_put_on_top_of_the_global_patch_stays(monkeypatch):
    original = BaseTuner.inject_adapter
    handle = dora_kernels.patch_peft_globally()
    calls = []
    ours = BaseTuner.inject_adapter

    def on_top(self, *args, **kwargs):
        calls.append(1)
        return ours(self, *args, **kwargs)

    BaseTuner.inject_adapter = on_top
    try:
        handle.restore()
        assert BaseTuner.inject_adapter is on_top
        assert anatomy(toy()) and calls and not dora(toy())
    finally:
        BaseTuner.inject_adapter = original


@pytest.mark.parametrize("first_ends_first", [True, False])
def test_globally_twice(first_ends_first):
    """The last one's options count, as long as it is on; PEFT is as it was when both have ended."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.tuners.lora import awq
    from test_peft_refused import peft_model

    def as_it_is():
        return BaseTuner.inject_adapter, awq.AwqLoraLinear.__init__, PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType.LORA]

    def dropout():
        return vars(lora_layers(toy())[0])[SWITCH].options.dropout

    before = as_it_is()
    one, two = dora_kernels.patch_peft_globally(), dora_kernels.patch_peft_globally(dropout="lora")
    assert dropout() == "lora"
    ends, stays = (one, two) if first_ends_first else (two, one)
    ends.restore()
    assert dropout() == ("lora" if first_ends_first else "peft")
    assert lora_layers(peft_model("awq")[0])[0].use_dora["default"]
    model = toy()
    assert stays.patched and not ends.patched
    stays.restore()
    assert as_it_is() == before and not dora(model)
    stays.restore()
    assert as_it_is() == before


def test_globally_and_locally(everywhere):
    assert repr(everywhere) == "PatchHandle(patched=0, skipped=0, of models made from now on)"
    model = toy()
    local = dora_kernels.patch_peft(model)
    assert local.patched == [FIRST, SECOND] and everywhere.patched == ["first", "second"]
    assert repr(everywhere) == "PatchHandle(patched=2, skipped=0)"
    everywhere.restore()
    local.restore()
    assert type(model.base_model) is LoraModel and not dora(model)


def test_layers_of_several_models_have_several_names(everywhere):
    one, two = (get_peft_model(Toy(False), LoraConfig(r=2, use_dora=True, target_modules=["first"])) for _ in range(2))
    assert len(set(everywhere.patched)) == len(lora_layers(one)) + len(lora_layers(two)) == len(everywhere.patched)
    assert everywhere.patched[0].endswith("first")
