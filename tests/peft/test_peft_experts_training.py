"""A small mixture of experts learns a real text: beside the dense formula in float64, and beside PEFT's LoRA."""

from __future__ import annotations

import copy
from pydoc_data.topics import topics

import pytest
import torch
from experts_models import qwen3_moe
from peft import LoraConfig, get_peft_model
from peft_models import Float64, one_thread  # noqa: F401

import dora_kernels
from dora_kernels.peft.experts import ParamWrapper
from dora_kernels.peft.kinds import restore_layers

pytestmark = pytest.mark.slow

TARGETS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
STEPS, ROWS, LENGTH = 12, 4, 48
TEXT = torch.tensor(list(topics["assignment"].encode()[: STEPS * ROWS * LENGTH])).view(STEPS, ROWS, LENGTH)


def adapted(dtype, use_dora=True, layers=2):
    model = qwen3_moe("eager", dtype, vocab_size=256, max_position_embeddings=64, num_hidden_layers=layers)
    handle = dora_kernels.patch_peft_globally()
    try:
        torch.manual_seed(1)
        config = LoraConfig(
            use_dora=use_dora, r=4, lora_alpha=8, target_modules=[], target_parameters=TARGETS, init_lora_weights=False
        )
        return get_peft_model(model, config, autocast_adapter_dtype=False)
    finally:
        handle.restore()


def wrappers(model):
    return [layer for layer in model.modules() if type(layer).__name__ == "ParamWrapper"]


def train(model, before_step=lambda: None, run=None):
    """The losses of AdamW's steps over the text."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3, eps=1e-4)
    losses = []
    for batch in TEXT:
        before_step()
        loss = model(input_ids=batch, labels=batch).loss if run is None else run(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def formula(model):
    """The same steps with every adapted stack formed by the dense formula, in plain operations."""
    layers = wrappers(model)
    held = [layer.get_base_layer() for layer in layers]

    def run(batch):
        for layer, module in zip(layers, held):
            weight, a, b, m, _ = layer.problem("default")
            v = weight.detach() + 2.0 * b @ a
            formed = (m / torch.linalg.vector_norm(v, dim=2).detach()).unsqueeze(2) * v
            module.__dict__[layer.parameter_name] = formed
        try:
            with model.disable_adapter():
                return model(input_ids=batch, labels=batch).loss
        finally:
            for layer, module in zip(layers, held):
                module.__dict__.pop(layer.parameter_name, None)

    # disable_adapter freezes nothing: the adapters' parameters are in the formed weights
    return train(model, run=run)


def test_the_losses_are_those_of_the_dense_formula():
    ours = adapted(torch.float64)
    narrow = copy.deepcopy(ours).float()
    with Float64():
        truth = formula(copy.deepcopy(ours))
        losses = train(ours)
    assert losses == pytest.approx(truth, rel=1e-10)
    assert losses[-1] < losses[0] - 0.1
    assert train(narrow) == pytest.approx(truth, rel=1e-5)


def test_the_witness_would_see_a_stale_norm_or_a_frozen_magnitude():
    truth = train(adapted(torch.float32))
    model = adapted(torch.float32)
    with dora_kernels.frozen_norms(model):
        stale = train(model)
    model = adapted(torch.float32)
    for layer in wrappers(model):
        layer.lora_magnitude_vector["default"].weight.requires_grad_(False)
    frozen = train(model)
    for wrong in (stale, frozen):
        assert max(abs(a - b) / b for a, b in zip(wrong, truth)) > 1e-4


def test_with_the_magnitude_kept_at_the_norm_it_is_pefts_lora():
    lora, model = adapted(torch.float32, use_dora=False), adapted(torch.float32)
    restore_layers(lora)
    assert not any(isinstance(layer, ParamWrapper) for layer in lora.modules())
    with torch.no_grad():
        for ours, theirs in zip(wrappers(model), wrappers(lora)):
            for part in ("lora_A", "lora_B"):
                getattr(ours, part)["default"].weight.copy_(getattr(theirs, part)["default"].weight)
    for layer in wrappers(model):
        layer.lora_magnitude_vector["default"].weight.requires_grad_(False)

    @torch.no_grad()
    def at_the_norm():
        for layer in wrappers(model):
            weight, a, b, m, _ = layer.problem("default")
            m.copy_(torch.linalg.vector_norm(weight + 2.0 * b @ a, dim=2))

    assert train(model, at_the_norm) == pytest.approx(train(lora), rel=1e-5)


def test_a_trainer(tmp_path):
    """transformers' Trainer with its default optimizer and accumulation, and a checkpoint that it resumes from."""
    from transformers import Trainer, TrainingArguments

    data = [{"input_ids": row, "labels": row} for row in TEXT.view(-1, LENGTH)]
    options = {
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 4, "save_steps": 2,
        "learning_rate": 5e-3, "report_to": [], "use_cpu": True, "logging_steps": 1, "seed": 1, "disable_tqdm": True,
    }  # fmt: skip

    def trainer(model):
        return Trainer(model=model, args=TrainingArguments(str(tmp_path), **options), train_dataset=data)

    first = trainer(adapted(torch.float32))
    first.train()
    losses = [entry["loss"] for entry in first.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    dora_kernels.check_adapter(tmp_path / "checkpoint-4")
    resumed = trainer(adapted(torch.float32))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    ours, theirs = (dict(each.model.named_parameters()) for each in (resumed, first))
    for name in (name for name, p in theirs.items() if p.requires_grad):
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-6)


def test_trl(tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    data = Dataset.from_list([{"input_ids": row.tolist()} for row in TEXT.view(-1, LENGTH)[:8]])
    config = trl.SFTConfig(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True, bf16=False,
        dataset_kwargs={"skip_prepare_dataset": True}, disable_tqdm=True, logging_steps=1, max_length=LENGTH,
    )  # fmt: skip
    tokenizer = _byte_tokenizer()
    trainer = trl.SFTTrainer(
        model=adapted(torch.float32), args=config, train_dataset=data, processing_class=tokenizer
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2 and all(loss > 0 for loss in losses)


def _byte_tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({f"<{i}>": i for i in range(256)}, unk_token="<0>"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<0>", eos_token="<1>", unk_token="<0>")


def test_compiled():
    """In one graph, forward and backward, with grouped and batched products."""
    for implementation in ("grouped_mm", "batched_mm"):
        model = adapted(torch.float32, layers=1)
        model.base_model.model.set_experts_implementation(implementation)
        batch = TEXT[0]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        again = compiled(input_ids=batch, labels=batch).loss
        again.backward()
        assert again.item() == pytest.approx(loss.item(), rel=1e-6)
        for name, gradient in expected.items():
            own = model.get_parameter(name).grad
            assert (own - gradient).norm() <= 1e-5 * gradient.norm(), name
