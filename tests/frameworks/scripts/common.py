"""What the scripts share: the inputs' model with a DoRA adapter, and batches of tokens."""

import sys
from pathlib import Path

import torch
from torch.utils.data import Dataset

INPUTS, OUT = map(Path, sys.argv[1:3])
STEPS = 6


def model():
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(INPUTS / "model")
    return get_peft_model(base, LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules="all-linear"))


class Tokens(Dataset):
    """Twelve rows of random tokens, which are their own labels."""

    def __init__(self):
        self.rows = torch.randint(3, 200, (2 * STEPS, 16), generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {"input_ids": self.rows[index], "labels": self.rows[index]}
