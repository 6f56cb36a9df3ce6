"""Adapters of a patched model behave as in stock PEFT: several, switched, disabled, merged, deleted, saved, copied."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

from peft import PeftModel, get_peft_model_state_dict
from peft_models import (
    base_model,
    batch,
    check,
    check_logits,
    check_parity,
    config,
    lora_layers,
    move_adapter,
    one_thread,  # noqa: F401
    peft_model,
    solve,
    twins,
)

import dora_kernels
from dora_kernels.peft.linear import DoraLinear
from dora_kernels.peft.state import SWITCH

both_layouts = pytest.mark.parametrize("kind", ["llama", "gpt2"])  # of the base weight: nn.Linear, Conv1D

# A second adapter of another rank, scaling and reach; and one that is plain LoRA.
SECOND = {"r": 5, "lora_alpha": 2}
PLAIN = {"r": 2, "use_dora": False, "init_lora_weights": False}


def both(models, function):
    """Call `function` on either model, in the same state of the random numbers."""
    results = []
    for model in models:
        torch.manual_seed(11)
        results.append(function(model))
    return results


def add(models, name, kind="llama", seed=5, **options):
    both(models, lambda model: model.add_adapter(name, config(kind, **options)))
    both(models, lambda model: move_adapter(model, name, seed))


def activate(models, *names):
    both(models, lambda model: model.base_model.set_adapter(list(names)))


@both_layouts
@pytest.mark.parametrize("added", ["before", "after"])
def test_several_adapters(kind, added):
    """PEFT applies them one after another, so their order matters."""
    models = stock, _ = twins(kind)
    if added == "before":
        add([stock], "second", kind, **SECOND)
        models = (stock, copy.deepcopy(stock))
        dora_kernels.patch_peft(models[1])
    else:
        add(models, "second", kind, **SECOND)
    add(models, "plain", kind, **PLAIN)
    for names in [("second",), ("default",), ("plain",), ("default", "second"), ("second", "default"),
                  ("plain", "second"), ("default", "plain", "second")]:  # fmt: skip
        activate(models, *names)
        check_parity(*models, batch(kind))


def test_dropout_of_one_of_two_adapters():
    models = twins()
    add(models, "second", lora_dropout=0.3, **SECOND)
    activate(models, "default", "second")

    def seeded(model):
        torch.manual_seed(0)
        return solve(model.train(), batch())

    check(seeded, *models)


def test_adapters_on_new_layers_are_patched():
    stock = peft_model(target_modules=["q_proj"])
    ours = copy.deepcopy(stock)
    handle = dora_kernels.patch_peft(ours)
    assert len(handle.patched) == 2
    add((stock, ours), "second", target_modules=["q_proj", "v_proj", "up_proj"])
    assert len(handle.patched) == 6 and not handle.skipped
    activate((stock, ours), "default", "second")
    check_parity(stock, ours, batch())
    both((stock, ours), lambda model: model.delete_adapter("second"))
    assert len(handle.patched) == 2


def test_a_dora_adapter_on_layers_that_had_plain_lora():
    stock = peft_model()
    both([stock], lambda model: model.add_adapter("wide", config(**PLAIN, target_modules=["lm_head", "q_proj"])))
    ours = copy.deepcopy(stock)
    handle = dora_kernels.patch_peft(ours)
    assert not any("lm_head" in name for name in handle.patched)
    add((stock, ours), "second", target_modules=["lm_head"], **SECOND)
    assert any("lm_head" in name for name in handle.patched)
    activate((stock, ours), "wide", "second")
    check_parity(stock, ours, batch())


def test_switched_by_set_adapter():
    models = twins()
    add(models, "second", **SECOND)
    for name in ("second", "default", "second"):
        both(models, lambda model, name=name: model.set_adapter(name))
        check_parity(*models, batch())


@both_layouts
def test_disabled(kind):
    stock, ours = twins(kind)
    with torch.no_grad(), stock.disable_adapter(), ours.disable_adapter():
        assert torch.equal(ours(**batch(kind)).logits, stock(**batch(kind)).logits)
    check_parity(stock, ours, batch(kind))


@both_layouts
@pytest.mark.parametrize("safe_merge", [False, True], ids=["", "safe"])
def test_merged_and_unmerged(kind, safe_merge):
    """As exact as stock at the least, the unmerged weight bit for bit; and no norm of a merged weight survives."""
    models = stock, ours = twins(kind)
    add(models, "second", kind, **SECOND)
    activate(models, "default", "second")
    check_parity(stock, ours, batch(kind))
    weight = ours.base_model.model.get_parameter(WEIGHT[kind])
    before = weight.detach().clone()
    with torch.no_grad():
        unmerged = ours(**batch(kind)).logits

        def merged(model, names):
            """Stock stays unmerged: before peft 0.21 a second adapter's norm is that of the merged weight."""
            model = copy.deepcopy(model)
            model.base_model.set_adapter(names)
            if any(SWITCH in vars(layer) for layer in lora_layers(model)):
                model.merge_adapter(names, safe_merge=safe_merge)
            return {"logits": model(**batch(kind)).logits}

        for names in (["default"], ["second"], ["default", "second"]):
            check(lambda model, names=names: merged(model, names), stock, ours)
            ours.merge_adapter(names, safe_merge=safe_merge)
            assert not torch.equal(weight, before)
            ours.unmerge_adapter()
            assert torch.equal(weight, before)
            activate(models, "default", "second")
            check_logits(stock, ours, batch(kind))
    assert torch.equal(ours(**batch(kind)).logits, unmerged)


WEIGHT = {
    "llama": "model.layers.0.self_attn.q_proj.base_layer.weight",
    "gpt2": "transformer.h.0.attn.c_attn.base_layer.weight",
}


def test_disabled_while_merged():
    stock, ours = twins()
    with torch.no_grad(), stock.disable_adapter():
        base = stock(**batch()).logits
    ours.merge_adapter()
    with torch.no_grad(), ours.disable_adapter():
        assert torch.equal(ours(**batch()).logits, base)
    check_parity(stock, ours, batch())


@both_layouts
def test_merge_and_unload(kind):
    stock, ours = twins(kind)
    with torch.no_grad():
        check(lambda model: {"logits": copy.deepcopy(model).merge_and_unload()(**batch(kind)).logits}, stock, ours)
    merged = ours.merge_and_unload()
    assert not lora_layers(merged) and not any(type(m).__module__.startswith("dora") for m in merged.modules())


def test_unload():
    _, ours = twins()
    plain = ours.unload()
    with torch.no_grad():
        assert torch.equal(plain(**batch()).logits, base_model("llama")(**batch()).logits)


def test_deleted_and_added_again():
    models = twins()
    add(models, "second", **SECOND)
    both(models, lambda model: model.set_adapter("second"))
    check_parity(*models, batch())
    both(models, lambda model: model.delete_adapter("second"))
    add(models, "second", seed=8, **SECOND)
    activate(models, "second")
    check_parity(*models, batch())
    both(models, lambda model: model.delete_adapter("default"))
    check_parity(*models, batch())


def test_weighted_combination():
    models = twins()
    add(models, "second", r=3)
    both(models, lambda model: model.add_weighted_adapter(["default", "second"], [0.4, 0.7], "both", "linear"))
    both(models, lambda model: move_adapter(model, "both", 9))
    activate(models, "both")
    check_parity(*models, batch())


@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["", "dropout"])
def test_scaling(dropout):
    models = twins(lora_dropout=dropout)
    for model in models:
        model.eval()
    changes = [
        lambda layer: layer.set_scale("default", 0.2),
        lambda layer: layer.scale_layer(3.0),
        lambda layer: layer.unscale_layer(2.0),
        lambda layer: layer.unscale_layer(),
        lambda layer: layer.set_scale("default", 0),
    ]
    for change in changes:
        for model in models:
            for layer in lora_layers(model):
                change(layer)
        check_parity(*models, batch())


def files(folder):
    """The bytes of each file; of the configuration, where PEFT writes a set in any order, the content."""
    contents = {path.name: path.read_bytes() for path in folder.iterdir()}
    adapter = json.loads(contents["adapter_config.json"])
    return {**contents, "adapter_config.json": {**adapter, "target_modules": sorted(adapter["target_modules"])}}


@both_layouts
def test_saved_files_are_the_same_bytes(kind, tmp_path):
    stock, ours = twins(kind)
    assert list(stock.state_dict()) == list(ours.state_dict())
    assert [name for name, _ in stock.named_buffers()] == [name for name, _ in ours.named_buffers()]
    stock.save_pretrained(tmp_path / "stock")
    ours.save_pretrained(tmp_path / "ours")
    assert files(tmp_path / "ours") == files(tmp_path / "stock")
    torch.save(stock.state_dict(), tmp_path / "model.pt")
    ours.load_state_dict(torch.load(tmp_path / "model.pt"))


@both_layouts
def test_saved_with_the_patch_and_loaded_without_it(kind, tmp_path):
    _, ours = twins(kind)
    ours.save_pretrained(tmp_path)
    stock = PeftModel.from_pretrained(base_model(kind), tmp_path, is_trainable=True)
    assert not any(isinstance(layer, DoraLinear) for layer in lora_layers(stock))
    check_parity(stock, ours, batch(kind))


@both_layouts
def test_saved_without_the_patch_and_loaded_into_a_patched_model(kind, tmp_path):
    stock = peft_model(kind)
    stock.save_pretrained(tmp_path)
    ours = peft_model(kind, r=7)
    handle = dora_kernels.patch_peft(ours)
    number = len(handle.patched)
    for low_cpu_mem_usage in (False, True):
        name = f"loaded-{low_cpu_mem_usage}"
        ours.load_adapter(tmp_path, name, is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage)
        ours.set_adapter(name)
        ours.delete_adapter("default" if name == "loaded-False" else "loaded-False")
        assert len(handle.patched) == number and not handle.skipped
        state, wanted = (
            get_peft_model_state_dict(model, adapter_name=n) for model, n in ((ours, name), (stock, "default"))
        )
        assert state.keys() == wanted.keys() and all(torch.equal(state[key], wanted[key]) for key in state)
        check_logits(stock, ours, batch(kind))


def test_loaded_in_a_process_that_does_not_know_this_package(tmp_path):
    _, ours = twins("llama")
    ours.save_pretrained(tmp_path)
    base_model("llama").save_pretrained(tmp_path / "base")
    script = f"""
import sys
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({str(tmp_path / "base")!r}), {str(tmp_path)!r})
assert "dora_kernels" not in sys.modules
import torch
with torch.no_grad():
    torch.save(model(torch.arange(3, 12)[None]).logits, {str(tmp_path / "logits.pt")!r})
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
    with torch.no_grad():
        logits = ours(torch.arange(3, 12)[None]).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_copies_are_patched_and_independent(duplicate):
    stock, ours = twins()
    ours.eval(), stock.eval()
    check_logits(stock, ours, batch())
    other = duplicate(ours)
    for layer in lora_layers(other):
        assert type(layer) is DoraLinear
        assert [cache.computed for cache in vars(layer)[SWITCH].values()] == [0], "a norm came along"
    check_parity(stock, other, batch())
    before = ours(**batch()).logits
    with torch.no_grad():
        for layer in lora_layers(other):
            layer.lora_A["default"].weight.data.mul_(1.5)
            layer.set_scale("default", 2.0)
    assert torch.equal(ours(**batch()).logits, before)
    both_changed = copy.deepcopy(stock)
    both_changed.load_state_dict(other.state_dict())
    for layer in lora_layers(both_changed):
        layer.set_scale("default", 2.0)
    check_parity(both_changed, other, batch())
    handle = dora_kernels.patch_peft(other)
    handle.restore()
    assert all(type(layer) is DoraLinear for layer in lora_layers(ours))
    add((stock, ours), "second", **SECOND)
    check_parity(stock, ours, batch())
