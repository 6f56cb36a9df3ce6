"""A decoder block of a Llama's shape with PEFT's adapters on all its linear layers: optimizer steps of four
micro-batches, with and without activation checkpointing.

Every model starts from the same numbers. The output and the gradients of the input and of all A, B and magnitudes are
compared with those of the stock model in float64 (its RMSNorm goes through float32 even there), and may err four times
as much as the stock model in its own dtypes. They are compared again after the timed steps.
"""

from __future__ import annotations

import copy
import functools
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import dora_kernels
from bench.layers import least_of
from bench.problem import DTYPES, Results, adapter_gradients, errors, limits, long_step, take_adapters
from bench.providers import ACCUMULATED, Checked, Subject, library

if TYPE_CHECKING:
    from bench.run import Run

PART = f"step of {ACCUMULATED}"
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def stages(run: Run) -> Iterator[tuple[str, Callable[[], None]]]:
    """Every combination of rank, tokens, dtypes and checkpointing."""
    given, cuda = run.given, run.device.type == "cuda"
    shape = tuple(given.block or ((4096, 14336, 32, 8) if cuda else (512, 1376, 8, 4)))
    for rank, tokens, dtypes, checkpointing in itertools.product(
        given.ranks or [16], given.tokens or [2048 if cuda else 128], given.dtypes, (False, True)
    ):
        case = BlockCase(shape, rank, tokens, dtypes, checkpointing, run.device)
        yield f"block: {case.label}", lambda case=case: run.measure(case)


@dataclass
class BlockCase:
    """A block and its input."""

    sizes: tuple[int, ...]
    """hidden and intermediate size, attention heads, key and value heads."""
    rank: int
    tokens: int
    dtypes: str
    checkpointing: bool
    device: torch.device
    suite: str = "block"
    providers: Sequence[str] = ("peft_lora", "peft_dora", "ours")

    @property
    def label(self) -> str:
        """For people."""
        checkpoints = ", checkpointed" if self.checkpointing else ""
        return f"{'x'.join(map(str, self.sizes))}, rank {self.rank}, {self.tokens} tokens, {self.dtypes}{checkpoints}"

    @property
    def facts(self) -> dict[str, Any]:
        """What every row states."""
        return {
            "shape": list(self.sizes), "rank": self.rank, "tokens": self.tokens, "dtypes": self.dtypes,
            "checkpointing": self.checkpointing,
        }  # fmt: skip

    def subject(self, provider: str) -> Subject:
        """The provider's block, its results checked."""
        block = _block(self, provider)
        dora = provider != "peft_lora"
        wanted, allowed = self._dora_judge if dora else self._lora_judge
        found = errors(block.results(), wanted)
        least = self.least("dora" if dora else "lora")

        def again() -> Checked:
            with long_step(block.optimizer):
                block.run_step()
            wanted, allowed = _judge(self, "peft_dora" if dora else "peft_lora", block.model)
            return errors(block.results(), wanted), allowed

        return Subject(provider, {PART: [block.run_step]}, found, allowed, {PART: least}, again=again)

    def least(self, kind: str) -> tuple[int, int]:
        """Bytes and FLOPs of the linear layers; a checkpointed block runs its forward pass twice, of which only the
        second is counted."""
        hidden, wide, heads, kv_heads = self.sizes
        narrow = hidden // heads * kv_heads
        widths = (DTYPES[self.dtypes][0].itemsize, DTYPES[self.dtypes][1].itemsize)
        linears = [(hidden, hidden)] * 2 + [(narrow, hidden)] * 2 + [(wide, hidden)] * 2 + [(hidden, wide)]
        parts = [least_of((self.tokens, n, k, self.rank), widths, kind, ACCUMULATED, True, True) for n, k in linears]
        return sum(size for size, _ in parts), sum(flops for _, flops in parts)

    @functools.cached_property
    def _dora_judge(self) -> tuple[Results, dict[str, float]]:
        return _judge(self, "peft_dora")

    @functools.cached_property
    def _lora_judge(self) -> tuple[Results, dict[str, float]]:
        return _judge(self, "peft_lora")


@dataclass
class Block:
    """One provider's model in training."""

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
        autocast = "+" in self.case.dtypes and self.x.dtype == torch.bfloat16
        with torch.autocast(self.case.device.type, torch.bfloat16, enabled=autocast):
            y: Tensor = self.model(inputs_embeds=self.x).last_hidden_state
        y.backward(self.dy)
        return y.detach()

    def run_step(self) -> None:
        """An optimizer step."""
        for _ in range(ACCUMULATED):
            self.run_pass()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.x.grad = None

    def results(self) -> Results:
        """The output and the gradients."""
        y = self.run_pass()
        assert self.x.grad is not None
        found = {"y": y, "x": self.x.grad, **adapter_gradients(self.model)}
        self.optimizer.zero_grad()
        return found


def _block(case: BlockCase, provider: str) -> Block:
    model = _model(case, use_dora=provider != "peft_lora")
    if provider == "ours":
        handle = dora_kernels.patch_peft(model)
        if handle.skipped:
            raise RuntimeError(f"patch_peft skipped {handle.skipped}")
    return Block(case, model, *_inputs(case))


def _judge(case: BlockCase, provider: str, trained: nn.Module | None = None) -> tuple[Results, dict[str, float]]:
    """The stock model's results in float64, with a trained model's adapters, and what may be off from them."""
    stock = _block(case, provider)
    if trained is not None:
        take_adapters(stock.model, trained)
    exact = Block(case, copy.deepcopy(stock.model).double(), *(t.double() for t in _inputs(case)))
    exact.x = exact.x.detach().requires_grad_()
    wanted = exact.results()
    return wanted, limits(stock.results(), wanted)


def _inputs(case: BlockCase) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(case.device).manual_seed(0)
    base, size = DTYPES[case.dtypes][0], (1, case.tokens, case.sizes[0])
    x, dy = (torch.randn(size, generator=generator, device=case.device).to(base) for _ in range(2))
    return x.requires_grad_(), dy


def _model(case: BlockCase, use_dora: bool) -> Any:
    with library():
        from peft import LoraConfig, get_peft_model
        from transformers import LlamaConfig, LlamaModel
    hidden, intermediate, heads, kv_heads = case.sizes
    base, adapter = DTYPES[case.dtypes]
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_attention_heads=heads, num_key_value_heads=kv_heads,
        num_hidden_layers=1, vocab_size=128, use_cache=False,
    )  # fmt: skip
    with warnings.catch_warnings(), torch.device(case.device):
        warnings.simplefilter("ignore")
        llama = LlamaModel(config).to(base)
        lora = LoraConfig(r=case.rank, lora_alpha=case.rank, use_dora=use_dora, target_modules=list(TARGETS))
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
