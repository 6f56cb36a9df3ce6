"""What the examples share: their arguments, and batches of tokens from a file of texts."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase


def parser(description: str) -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(description=description)
    arguments.add_argument("--model", required=True, help="a causal language model, as transformers names or finds it")
    arguments.add_argument("--data", required=True, type=Path, help="a text file, one example a line")
    arguments.add_argument("--out", required=True, type=Path, help="a folder for the adapter")
    arguments.add_argument("--steps", type=int, default=100)
    arguments.add_argument("--batch", type=int, default=4, help="examples a step and process")
    arguments.add_argument("--length", type=int, default=512, help="tokens of an example at most")
    arguments.add_argument("--rank", type=int, default=16)
    arguments.add_argument("--lr", type=float, default=2e-4)
    return arguments


def lines(data: Path) -> list[str]:
    texts = [line for line in data.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not texts:
        raise SystemExit(f"--data: {data} has no lines")
    return texts


def batches(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], size: int, length: int, rank: int = 0, world: int = 1
) -> Iterator[dict[str, Tensor]]:
    """Endless, in an order that all processes share; each takes its part."""
    order = torch.Generator().manual_seed(0)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    while True:
        chosen = torch.randint(len(texts), (world * size,), generator=order).tolist()[rank * size : (rank + 1) * size]
        batch = tokenizer(
            [texts[i] for i in chosen], return_tensors="pt", padding=True, truncation=True, max_length=length
        )
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        yield {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}
