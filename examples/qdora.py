"""Fine-tune a causal language model in 4 bits with DoRA (QDoRA): bitsandbytes' NF4, on one GPU, or on a CPU.

    python examples/qdora.py --model HuggingFaceTB/SmolLM2-135M --data texts.txt --out adapter
"""

from __future__ import annotations

import common
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, Trainer, TrainingArguments

import dora_kernels


def main() -> None:
    options = common.parser(__doc__.splitlines()[0]).parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        options.model,
        dtype=torch.bfloat16,
        quantization_config=quantization,
        device_map={"": 0 if torch.cuda.is_available() else "cpu"},
    )
    model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    config = LoraConfig(r=options.rank, lora_alpha=2 * options.rank, use_dora=True, target_modules="all-linear")
    model = get_peft_model(model, config)
    dora_kernels.patch_peft(model)

    batches = common.batches(tokenizer, common.lines(options.data), 1, options.length)
    data = [{name: t[0] for name, t in next(batches).items()} for _ in range(options.steps * options.batch)]
    arguments = TrainingArguments(
        str(options.out), max_steps=options.steps, per_device_train_batch_size=options.batch, learning_rate=options.lr,
        gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False},
        logging_steps=10, report_to=[], save_strategy="no", use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip

    def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        padding = {"input_ids": tokenizer.pad_token_id, "attention_mask": 0, "labels": -100}
        return {
            name: torch.nn.utils.rnn.pad_sequence([row[name] for row in rows], batch_first=True, padding_value=value)
            for name, value in padding.items()
        }

    Trainer(model=model, args=arguments, train_dataset=data, data_collator=collate).train()
    model.save_pretrained(options.out)


if __name__ == "__main__":
    main()
