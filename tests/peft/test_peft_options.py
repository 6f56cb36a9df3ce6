"""What else PEFT runs DoRA with: replicated layers, trained tokens, tied embeddings, other variants, scalings."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

from peft import LoraConfig, get_peft_model
from peft_models import (
    base_model,
    batch,
    check_logits,
    check_parity,
    config,
    lora_layers,
    move_adapter,
    one_thread,  # noqa: F401
    peft_model,
    twins,
)

import dora_kernels

FIELDS = {field.name for field in dataclasses.fields(LoraConfig)}


def test_replicated_layers():
    """Two layers share a base weight, each with an adapter and a norm of its own."""
    stock, ours = twins(layer_replication=[[0, 2], [0, 2]])
    assert len(lora_layers(ours)) == 28
    check_parity(stock, ours, batch())


def test_trained_tokens():
    stock = peft_model(trainable_token_indices={"embed_tokens": [5, 7]})
    with torch.no_grad():
        for name, parameter in stock.named_parameters():
            if "token_adapter" in name or "trainable_tokens" in name:
                parameter.add_(0.1)
    ours = copy.deepcopy(stock)
    dora_kernels.patch_peft(ours)
    check_parity(stock, ours, batch())


TIED = [["embed_tokens", "q_proj"], ["lm_head", "q_proj"], ["embed_tokens", "lm_head"]]


@pytest.mark.parametrize("targets", TIED, ids=str)
def test_tied_embeddings(targets):
    """An embedding and a head on one weight, each adapted as PEFT does."""
    torch.manual_seed(0)
    base = base_model("llama")
    base.config.tie_word_embeddings = True
    base.lm_head.weight = base.get_input_embeddings().weight
    stock = move_adapter(get_peft_model(base, config(target_modules=targets)))
    ours = copy.deepcopy(stock)
    handle = dora_kernels.patch_peft(ours)
    assert not handle.skipped and len(handle.patched) >= len(targets)
    check_parity(stock, ours, batch())


def test_an_embedding_that_is_also_trained_elsewhere():
    """`modules_to_save` beside an adapted embedding."""
    stock, ours = twins(target_modules=["embed_tokens", "v_proj"], modules_to_save=["lm_head"])
    check_parity(stock, ours, batch())


@pytest.mark.skipif("alora_invocation_tokens" not in FIELDS, reason="a variant of a later PEFT")
@pytest.mark.parametrize("names", [["default", "other"], ["other", "default"]], ids=str)
def test_another_variant_in_the_same_layer(names):
    """aLoRA, which acts from its invocation tokens on: both in their order."""
    models = stock, ours = twins()
    for model in models:
        torch.manual_seed(3)
        model.add_adapter("other", config(use_dora=False, alora_invocation_tokens=[5, 6], init_lora_weights=False))
        model.base_model.set_adapter(names)
    inputs = batch()
    inputs["input_ids"][:, 4:6] = torch.tensor([5, 6])
    check_logits(*(model.eval() for model in models), inputs)
    for model in models:
        model.base_model.set_adapter("default")
    check_logits(stock, ours, inputs)


def test_a_scaling_that_is_a_tensor():
    """As for compiled hotswapping: PEFT's own code, every kind of layer."""
    from peft.utils.hotswap import prepare_model_for_compiled_hotswap

    stock, ours = twins(target_modules=["embed_tokens", "q_proj", "down_proj"])
    for model in (stock, ours):
        prepare_model_for_compiled_hotswap(model, target_rank=5)
    assert all(isinstance(layer.scaling["default"], torch.Tensor) for layer in lora_layers(ours))
    check_logits(stock, ours, batch())


def test_an_adapter_that_was_hotswapped(tmp_path):
    """PEFT swaps plain LoRA only: it refuses DoRA files, patched or not."""
    from peft.utils.hotswap import hotswap_adapter

    stock, ours = twins()
    stock.save_pretrained(tmp_path)
    for model in (stock, ours):
        with pytest.raises((KeyError, ValueError, RuntimeError)):
            hotswap_adapter(model, str(tmp_path), adapter_name="default")
