"""Fine-tune a causal language model with DoRA on one GPU, or on a CPU.

    python examples/finetune.py --model HuggingFaceTB/SmolLM2-135M --data texts.txt --out adapter
"""

from __future__ import annotations

import common
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import dora_kernels


def main() -> None:
    options = common.parser(__doc__.splitlines()[0]).parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(
        options.model, dtype=torch.bfloat16 if device == "cuda" else torch.float32
    )
    config = LoraConfig(r=options.rank, lora_alpha=2 * options.rank, use_dora=True, target_modules="all-linear")
    model = get_peft_model(model.to(device), config)
    dora_kernels.patch_peft(model, exact_init=True)

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=options.lr)
    batches = common.batches(tokenizer, common.lines(options.data), options.batch, options.length)
    for step in range(1, options.steps + 1):
        batch = {name: tensor.to(device) for name, tensor in next(batches).items()}
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == options.steps:
            print(f"step {step}: loss {loss.item():.4f}")
    model.save_pretrained(options.out)


if __name__ == "__main__":
    main()
