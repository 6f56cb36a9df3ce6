"""`save_pretrained` of an adapted model: a warning that says what to do, on the model alone."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import warnings
import weakref

import pytest
import torch

from dora_kernels import apply_dora, attach, extract, load_adapter, merge_all, remove_dora, save_adapter

pytest.importorskip("transformers")
pytest.importorskip("safetensors")

import transformers
from cli_models import llama

IDS = torch.arange(6)[None]


def said(model, folder):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.save_pretrained(folder)
    return [str(one.message) for one in caught if one.filename == __file__]


def test_what_it_warns_of_is_so_and_what_it_advises_works(tmp_path):
    model = llama()
    apply_dora(model, ["q_proj", "down_proj"], rank=2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    wanted = model(IDS).logits
    (text,) = said(model, tmp_path / "adapted")
    assert text.startswith("save_pretrained writes LlamaForCausalLM's adapted layers under names that from_pretrained")
    assert "save_adapter(model, path)" in text and "merge_all(model)" in text
    wrong = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "adapted")
    assert not torch.allclose(wrong(IDS).logits, wanted, atol=1e-3)
    save_adapter(model, tmp_path / "adapter")
    again = llama()
    load_adapter(tmp_path / "adapter", again)
    assert torch.equal(again(IDS).logits, wanted)
    assert said(again.model, tmp_path / "inner") and said(again, tmp_path / "again")
    merge_all(model)
    assert not said(model, tmp_path / "merged") and "save_pretrained" not in vars(model)
    right = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(right(IDS).logits, wanted, atol=1e-4, rtol=1e-4)


def test_it_goes_with_the_adapters_and_with_copies(tmp_path):
    model = llama()
    apply_dora(model, ["q_proj"], rank=2)
    twin = copy.deepcopy(model)
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    for one in (twin, torch.load(stored, weights_only=False)):
        assert said(one, tmp_path)
        assert vars(one)["save_pretrained"]._module() is one
    adapter = extract(model)
    remove_dora(model)
    assert not said(model, tmp_path) and "save_pretrained" not in vars(model)
    attach(model, adapter)
    assert said(model, tmp_path)
    assert "save_pretrained" not in vars(type(model)) and not said(llama(), tmp_path)
    assert inspect.signature(model.save_pretrained) == inspect.signature(llama().save_pretrained)
    gone = weakref.ref(twin)
    gc.collect()
    gc.disable()
    try:
        del twin, one
        assert gone() is None
    finally:
        gc.enable()
