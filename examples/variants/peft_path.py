"""DoRA by Hugging Face PEFT, on this package's kernels: adapt, train, merge.

    python examples/variants/peft_path.py

PEFT's own form: a magnitude per output feature, scaling alpha / r, the norm detached. A small random Llama learns the
bytes of this file, so that nothing has to be downloaded.
"""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import dora_kernels

LENGTH = 64


def main() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
            initializer_range=0.1,
        )
    )  # fmt: skip
    size = model.num_parameters()
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, use_dora=True, target_modules="all-linear"))
    model.print_trainable_parameters()
    handle = dora_kernels.patch_peft(model)
    print(f"{len(handle.patched)} layers on this package")

    data = torch.tensor(list(Path(__file__).read_bytes()))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(1, 46):
        starts = torch.randint(len(data) - LENGTH, (8, 1))
        batch = data[starts + torch.arange(LENGTH)]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 15 == 0:
            print(f"step {step}: loss {loss.item():.3f}")

    model.eval()
    with torch.no_grad():
        adapted = model(input_ids=batch).logits
        merged = model.merge_and_unload()
        off = (merged(input_ids=batch).logits - adapted).norm() / adapted.norm()
    print(f"merged: {type(merged).__name__} of {merged.num_parameters():,} parameters, {size:,} before")
    print(f"merged logits differ by {off:.1e}")


if __name__ == "__main__":
    main()
