"""Real runs of the tools around PEFT on tiny models: stock beside patched, from the same seeds."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

from peft import LoraConfig, get_peft_model
from peft_models import (
    VOCAB,
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
)
from transformers import Trainer, TrainingArguments

import dora_kernels
from dora_kernels.peft.state import SWITCH


@contextlib.contextmanager
def everywhere():
    handle = dora_kernels.patch_peft_globally()
    try:
        yield handle
    finally:
        handle.restore()


def is_patched(model):
    return bool(lora_layers(model)) and all(SWITCH in vars(layer) for layer in lora_layers(model))


def rows(count):
    return [{name: t[0] for name, t in batch(tokens=(1, 9), seed=i).items()} for i in range(count)]


def losses_of(trainer):
    return {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}


def test_a_trainer_that_resumes(tmp_path):
    """A new, patched model goes on from a checkpoint as the run that was not interrupted did; as stock did, too."""

    def trainer(folder, patched, steps):
        model = peft_model(lora_dropout=0.2)
        if patched:
            dora_kernels.patch_peft(model)
        arguments = TrainingArguments(
            str(folder), max_steps=steps, save_steps=3, save_strategy="steps", per_device_train_batch_size=2,
            gradient_accumulation_steps=2, logging_steps=1, learning_rate=1e-2, lr_scheduler_type="constant",
            report_to=[], use_cpu=True, disable_tqdm=True, seed=0,
        )  # fmt: skip
        return Trainer(model=model, args=arguments, train_dataset=rows(24))

    whole = trainer(tmp_path / "ours", True, 6)
    whole.train()
    stock = trainer(tmp_path / "stock", False, 6)
    stock.train()
    resumed = trainer(tmp_path / "ours", True, 6)
    resumed.train(resume_from_checkpoint=str(tmp_path / "ours" / "checkpoint-3"))
    wanted = losses_of(whole)
    assert len(set(wanted.values())) == 6 and is_patched(resumed.model)
    torch.testing.assert_close(losses_of(stock), wanted, rtol=1e-4, atol=0)
    torch.testing.assert_close(losses_of(resumed), wanted, rtol=1e-6, atol=0)


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(3, VOCAB)} | {"<pad>": 0, "<s>": 1, "</s>": 2}
    made = Tokenizer(models.WordLevel(words, unk_token="w3"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("way", ["patch_peft", "patch_peft_globally"])
def test_trls_sft_trainer(way, tmp_path):
    """A model that is patched before, or one that the trainer makes from ``peft_config=``."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    texts = [" ".join(f"w{3 + (7 * i + j * j) % (VOCAB - 3)}" for j in range(12)) for i in range(12)]
    arguments = trl.SFTConfig(
        str(tmp_path), max_steps=4, per_device_train_batch_size=2, logging_steps=1, learning_rate=1e-2, report_to=[],
        use_cpu=True, bf16=False, disable_tqdm=True, save_strategy="no", max_length=16, seed=0,
        gradient_checkpointing=False,
    )  # fmt: skip

    def run(patched):
        data = datasets.Dataset.from_dict({"text": texts})
        torch.manual_seed(5)
        own = {"args": copy.deepcopy(arguments), "train_dataset": data, "processing_class": tokenizer()}
        if way == "patch_peft":
            model = get_peft_model(base_model("llama"), config())
            if patched:
                dora_kernels.patch_peft(model)
            trainer = trl.SFTTrainer(model=model, **own)
        else:
            with everywhere() if patched else contextlib.nullcontext():
                trainer = trl.SFTTrainer(model=base_model("llama"), peft_config=config(), **own)
                assert is_patched(trainer.model) == patched
                trainer.train()
                return losses_of(trainer)
        assert is_patched(trainer.model) == patched
        trainer.train()
        return losses_of(trainer)

    stock, ours = run(False), run(True)
    assert len(set(stock.values())) == 4
    torch.testing.assert_close(ours, stock, rtol=1e-5, atol=0)


@pytest.mark.parametrize("way", ["patch_peft", "patch_peft_globally"])
def test_an_adapter_of_transformers_own(way):
    """``model.add_adapter``: no `PeftModel` around it."""
    torch.manual_seed(0)
    stock = base_model("llama")
    stock.add_adapter(config())
    move_adapter(stock)
    if way == "patch_peft":
        ours = copy.deepcopy(stock)
        dora_kernels.patch_peft(ours)
    else:
        with everywhere() as handle:
            torch.manual_seed(0)
            ours = base_model("llama")
            ours.add_adapter(config())
            move_adapter(ours)
            assert is_patched(ours) and len(handle.patched) == 14
            check_parity(stock, ours, batch())
        return
    assert is_patched(ours)
    check_parity(stock, ours, batch())
    for model in (stock, ours):
        model.disable_adapters()
    check_logits(stock, ours, batch())
    for model in (stock, ours):
        model.enable_adapters()
        model.eval()
    check_logits(stock, ours, batch())
    ids = batch()["input_ids"]
    assert torch.equal(*(model.generate(ids, max_new_tokens=5, do_sample=False) for model in (stock, ours)))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["", "channels-last"])
def test_diffusers_unet(layout):
    """Text to image is one of DoRA's main uses: attention and convolutions, trained, fused and back."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    stock = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8, attention_head_dim=4,
    )  # fmt: skip
    stock.to(memory_format=layout)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "proj_in", "proj_out", "time_emb_proj"]
    stock.add_adapter(LoraConfig(r=2, lora_alpha=3, use_dora=True, target_modules=targets, init_lora_weights=False))
    move_adapter(stock)
    ours = copy.deepcopy(stock)
    handle = dora_kernels.patch_peft(ours)
    assert not handle.skipped and len(handle.patched) == len(lora_layers(stock)) > 20

    def inputs(model):
        generator = torch.Generator().manual_seed(3)
        dtype = next(model.parameters()).dtype
        image = torch.randn(2, 4, 8, 8, generator=generator).to(dtype).contiguous(memory_format=layout)
        return image, torch.tensor([1, 7]), torch.randn(2, 3, 8, generator=generator).to(dtype)

    def run(model):
        model.zero_grad(set_to_none=True)
        y = model(*inputs(model)).sample
        y.square().mean().backward()
        return {"y": y.detach(), **{n: p.grad for n, p in model.named_parameters() if p.requires_grad}}

    # In float32 some of so many gradients are little else than rounding.
    precise = copy.deepcopy(stock).double()
    wanted = run(precise)
    dora_kernels.patch_peft(precise)
    for name, result in run(precise).items():
        off = (result - wanted[name]).norm() / wanted[name].norm()
        assert off <= 1e-10, f"{name}: {off:.1e}"
    for model in (stock, ours):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        for _ in range(3):
            model(*inputs(model)).sample.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    with torch.no_grad():
        trained, wanted = (model.eval()(*inputs(model)).sample for model in (ours, stock))
        torch.testing.assert_close(trained, wanted, rtol=1e-3, atol=1e-4)
        ours.fuse_lora()
        torch.testing.assert_close(ours(*inputs(ours)).sample, trained, rtol=1e-4, atol=1e-5)
        ours.unfuse_lora()
        assert torch.equal(ours(*inputs(ours)).sample, trained)


def test_a_vision_language_model():
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    text = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    base = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_id=VOCAB - 1, vision_feature_layer=-1)
    )
    targets = ["q_proj", "v_proj", "linear_1", "linear_2", "fc1", "patch_embedding", "embed_tokens"]
    stock = move_adapter(get_peft_model(base, LoraConfig(r=2, lora_alpha=3, use_dora=True, target_modules=targets)))
    ours = copy.deepcopy(stock)
    handle = dora_kernels.patch_peft(ours)
    assert not handle.skipped
    kinds = {type(layer).__name__ for layer in lora_layers(ours)}
    assert kinds == {"DoraLinear", "DoraConv2d", "DoraEmbedding"}

    def run(model):
        generator = torch.Generator().manual_seed(3)
        ids = torch.randint(3, VOCAB - 1, (2, 10), generator=generator)
        ids[:, 1:5] = VOCAB - 1  # of the four patches
        image = torch.randn(2, 3, 8, 8, generator=generator).to(next(model.parameters()).dtype)
        return solve(model, {"input_ids": ids, "pixel_values": image, "labels": ids})

    check(run, stock, ours)
