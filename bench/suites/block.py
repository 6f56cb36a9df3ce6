"""A decoder block of a Llama's shape with PEFT's adapters on all its linear layers: optimizer steps, with and without
activation checkpointing, ours beside PEFT's LoRA and DoRA.

Every model starts from the same numbers. A DoRA model's output and input gradient are compared with those of the stock
model in float32, and may err four times as much as the stock model in its own dtype.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import dora_kernels
from bench.layer.problem import ALLOWED, DTYPES, FLOOR, error
from bench.layer.providers import MICRO_BATCHES


@dataclass(frozen=True)
class BlockCase:
    """One row of the block's table."""

    shape: tuple[int, int, int, int]
    """hidden and intermediate size, attention heads, key and value heads."""
    rank: int
    tokens: int
    dtypes: str
    checkpointing: bool
    device: torch.device

    @property
    def label(self) -> str:
        """For people."""
        sizes = "x".join(map(str, self.shape))
        checkpoints = ", checkpointed" if self.checkpointing else ""
        return f"block {sizes}, rank {self.rank}, {self.tokens} tokens, {self.dtypes}{checkpoints}"


@dataclass
class Block:
    """One provider's model in training."""

    name: str
    case: BlockCase
    model: nn.Module
    x: Tensor
    dy: Tensor

    def __post_init__(self) -> None:
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5)

    def run_pass(self) -> Tensor:
        """One micro-batch, forward and backward; the output."""
        self.x.grad = None
        base, adapter = DTYPES[self.case.dtypes]
        with torch.autocast(self.case.device.type, torch.bfloat16, enabled=self.x.dtype == base != adapter):
            y: Tensor = self.model(inputs_embeds=self.x).last_hidden_state
        y.backward(self.dy)
        return y.detach()

    def run_step(self) -> None:
        """An optimizer step of `MICRO_BATCHES` micro-batches."""
        for _ in range(MICRO_BATCHES):
            self.run_pass()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def results(self) -> dict[str, Tensor]:
        """Output and input gradient."""
        y = self.run_pass()
        assert self.x.grad is not None
        found = {"y": y, "x": self.x.grad}
        self.optimizer.zero_grad()
        return found


def make_blocks(case: BlockCase) -> Iterator[Block]:
    """PEFT's LoRA, PEFT's DoRA and ours."""
    for name in ("peft_lora", "peft_dora", "ours_patched"):
        model = _model(case, use_dora=name != "peft_lora")
        if name == "ours_patched":
            handle = dora_kernels.patch_peft(model)
            if handle.skipped:
                raise RuntimeError(f"patch_peft skipped {handle.skipped}")
        yield Block(name, case, model, *_inputs(case))


def block_errors(blocks: list[Block]) -> tuple[dict[str, float], dict[str, float]]:
    """The errors of ours, and what is allowed."""
    stock, ours = (next(block for block in blocks if block.name == name) for name in ("peft_dora", "ours_patched"))
    exact = Block("exact", stock.case, copy.deepcopy(stock.model).float(), *(t.float() for t in _inputs(stock.case)))
    exact.x = exact.x.detach().requires_grad_()
    wanted, plain, found = (block.results() for block in (exact, stock, ours))
    limits = {name: max(FLOOR, ALLOWED * error(plain[name], wanted[name])) for name in wanted}
    return {name: error(found[name], wanted[name]) for name in wanted}, limits


def _inputs(case: BlockCase) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(case.device).manual_seed(0)
    base, size = DTYPES[case.dtypes][0], (1, case.tokens, case.shape[0])
    x, dy = (torch.randn(size, generator=generator, device=case.device).to(base) for _ in range(2))
    return x.requires_grad_(), dy


def _model(case: BlockCase, use_dora: bool) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaModel

    hidden, intermediate, heads, kv_heads = case.shape
    base, adapter = DTYPES[case.dtypes]
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_attention_heads=heads, num_key_value_heads=kv_heads,
        num_hidden_layers=1, vocab_size=128, use_cache=False,
    )  # fmt: skip
    with warnings.catch_warnings(), torch.device(case.device):
        warnings.simplefilter("ignore")
        llama = LlamaModel(config).to(base)
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        lora = LoraConfig(r=case.rank, lora_alpha=case.rank, use_dora=use_dora, target_modules=targets)
        model = get_peft_model(llama, lora, autocast_adapter_dtype=base != adapter)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.02)
            elif "lora_magnitude_vector" in name:
                parameter.mul_(1.1)
    if case.checkpointing:
        model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()
