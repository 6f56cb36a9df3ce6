"""Fine-tune a mixture of experts with DoRA on its attention, its router and all its experts.

    python examples/experts.py --model Qwen/Qwen3-30B-A3B --data texts.txt --out adapter

PEFT alone has no DoRA on experts. The adapter's file is PEFT's, with a magnitude for each output of each expert;
loading it again needs `patch_peft_globally()` too.
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
    ).to(device)
    dora_kernels.patch_peft_globally(exact_init=True)  # before get_peft_model, where PEFT would refuse
    config = LoraConfig(
        r=options.rank, lora_alpha=2 * options.rank, use_dora=True, target_modules="all-linear",
        target_parameters=experts_of(model),
    )  # fmt: skip
    model = get_peft_model(model, config)
    model.print_trainable_parameters()

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=options.lr)
    batches = common.batches(tokenizer, common.lines(options.data), options.batch, options.length)
    for step in range(1, options.steps + 1):
        batch = {name: tensor.to(device) for name, tensor in next(batches).items()}
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == options.steps:
            print(f"step {step}: loss {loss.item():.4f}")
    model.save_pretrained(options.out)
    dora_kernels.check_adapter(options.out)


def experts_of(model: torch.nn.Module) -> list[str]:
    """The names of the stacks of experts, without the layers' numbers."""
    stacks = {
        ".".join(name.split(".")[-2:])
        for name, parameter in model.named_parameters()
        if parameter.dim() == 3 and "expert" in name
    }
    return sorted(stacks)


if __name__ == "__main__":
    main()
