"""Unsloth's FastLanguageModel with TRL's SFTTrainer."""

import unsloth  # noqa: F401 (it has to come first)
from common import INPUTS, OUT, STEPS
from datasets import load_dataset
from trl import SFTConfig, SFTTrainer
from unsloth import FastLanguageModel

model, tokenizer = FastLanguageModel.from_pretrained(
    str(INPUTS / "model"), max_seq_length=128, dtype=None, load_in_4bit=False, local_files_only=True
)
model = FastLanguageModel.get_peft_model(
    model, r=4, lora_alpha=8, lora_dropout=0.0, use_dora=True, use_gradient_checkpointing=False, random_state=0,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
)  # fmt: skip
data = load_dataset("json", data_files=str(INPUTS / "data" / "text.jsonl"), split="train")
arguments = SFTConfig(
    str(OUT), max_steps=STEPS, logging_steps=1, save_steps=STEPS, per_device_train_batch_size=2, learning_rate=1e-3,
    report_to="none", use_cpu=True, dataset_text_field="text", max_length=128, bf16=False, fp16=False,
)  # fmt: skip
SFTTrainer(model=model, processing_class=tokenizer, train_dataset=data, args=arguments).train()
