"""A whole model with adapters on all its linear layers, in two suites.

model: SmolLM2-135M on real text. A step is one sequence, forward and backward, then AdamW; a token is one more of a
continuation, adapters unmerged.
block: a decoder block of a Llama's shape on random tokens, with and without activation checkpointing: optimizer steps
of four micro-batches.

The adapters are moved away from their start, the same for all. The logits, of a text and of one token after a cached
prompt, and the gradients of all A, B and magnitudes are compared with those of the stock model in float64 (its RMSNorm
goes through float32 even there), and may err four times as much as it in its own dtypes. They are compared again after
the timed steps.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bench.problem import Judged, adapter_gradients, dtypes_of, long_step, take_adapters
from bench.providers import ACCUMULATED, Case, Checked, Subject, Work, library
from bench.suites import finetune
from bench.suites.layer import least_of
from bench.training import Continuation, Inputs, Training, adapt, patch_all
from dora_kernels.testing import errors, limits

if TYPE_CHECKING:
    from bench.run import Run

PROMPT, CONTINUED = 16, 48
"""Tokens before the first one that is timed, and those made before the cache starts again."""
BLOCK, BLOCK_CUDA = (512, 1376, 8, 4), (4096, 14336, 32, 8)
VOCABULARY = 128


def cases(run: Run, suite: str) -> Iterator[ModelCase]:
    """Every number of tokens and rank; of a block, with and without checkpointing."""
    given, cuda = run.given, run.device.type == "cuda"
    if suite == "model":
        for dtypes, tokens, rank in itertools.product(given.dtypes, given.tokens or [128], given.ranks or [16]):
            yield ModelCase(run, suite, tokens, rank, dtypes)
        return
    sizes = tuple(given.block or (BLOCK_CUDA if cuda else BLOCK))
    for rank, tokens, dtypes, checkpointing in itertools.product(
        given.ranks or [16], given.tokens or [2048 if cuda else 128], given.dtypes, (False, True)
    ):
        yield BlockCase(run, suite, tokens, rank, dtypes, sizes, checkpointing)


@dataclass
class ModelCase(Case):
    """The model at a length."""

    run: Run
    suite: str
    tokens: int
    rank: int
    dtypes: str
    _judges: dict[bool, Judged] = field(default_factory=dict, init=False)
    providers = finetune.PROVIDERS
    share = 0.1  # a step of each provider takes seconds
    accumulated = 1

    @property
    def label(self) -> str:  # type: ignore[override]
        """For people."""
        return f"SmolLM2-135M, rank {self.rank}, {self.tokens} tokens, {self.dtypes}"

    @property
    def facts(self) -> dict[str, Any]:  # type: ignore[override]
        """What every row states."""
        return {"shape": "SmolLM2-135M", "rank": self.rank, "tokens": self.tokens, "dtypes": self.dtypes}

    def prepare(self) -> None:
        """Without weights the suite is missing, not each of its providers."""
        finetune.language_model(self.run)

    @functools.cached_property
    def batch(self) -> Inputs:
        """Real text."""
        inputs: Inputs = finetune.language_model(self.run)[1].batches(self.tokens, 1)[0]
        return inputs

    def adapted(self, provider: str) -> Any:
        """The provider's model as its library makes it."""
        return finetune.adapted(self.run, provider, self.rank, 0, self.dtypes)

    def parts(self, model: Any, step: Work) -> dict[str, Sequence[Work]]:
        """What is timed."""
        return {"step": [step], "token": [Continuation(model, self.batch["input_ids"][:, :PROMPT], CONTINUED)]}

    def subject(self, provider: str) -> Subject:
        """The provider's model, its results checked."""
        model = self._moved(provider)
        one, dora = Training(model, lr=finetune.LEARNING_RATE), provider != "peft_lora"
        if dora not in self._judges:
            self._judges[dora] = self._judge(dora)
        wanted, allowed = self._judges[dora]

        def step() -> None:
            for _ in range(self.accumulated - 1):
                model(**self.batch).loss.backward()
            one.step(self.batch)

        def again() -> Checked:
            with long_step(one.optimizer):
                step()
            wanted, allowed = self._judge(dora, model)
            return errors(_logits(model, self.batch), wanted), allowed

        parts = self.parts(model, step)
        least = {name: self._least(model, "dora" if dora else "lora", name != "token") for name in parts}
        found = errors(_results(model, self.batch), wanted)
        return Subject(provider, parts, found, allowed, least, again=again)

    def _moved(self, provider: str) -> Any:
        """A model whose B is not zero and whose magnitudes are not the norms."""
        model = self.adapted(provider)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
                elif "lora_magnitude_vector" in name:
                    parameter.mul_(1.05)
        if "+" in self.dtypes:
            model.forward = torch.autocast(self.run.device.type, dtypes_of(self.dtypes)[0])(model.forward)
        return model

    def _judge(self, dora: bool, trained: Any = None) -> Judged:
        """The stock model's results in float64, of a trained model's adapters the logits, and the errors allowed."""
        stock, results = self._moved("peft_dora" if dora else "peft_lora"), _results
        if trained is not None:
            take_adapters(stock, trained)
            results = _logits
        exact = copy.deepcopy(stock).double()
        if "+" in self.dtypes:
            del exact.forward  # without autocast
        wanted = results(exact, self.batch)
        return wanted, limits(results(stock, self.batch), wanted)

    def _least(self, model: nn.Module, kind: str, training: bool) -> tuple[int, int]:
        """Bytes and FLOPs of the linear layers; attention, a few hundredths of them at these lengths, is left out.

        A checkpointed block runs its forward pass twice, of which only the second is counted.
        """
        size = flops = 0
        base, adapter = (dtype.itemsize for dtype in dtypes_of(self.dtypes))
        for name, module in model.named_modules():
            if not isinstance(module, nn.Linear) or ".lora_" in name:
                continue
            sizes = self.tokens if training else 1, module.out_features, module.in_features, self.rank
            layer_kind = kind if name.endswith("base_layer") else "frozen"
            passes = self.accumulated if training else 1
            more = least_of(sizes, (base, adapter), layer_kind, passes, training, training)
            size, flops = size + more[0], flops + more[1]
        return size, flops


@dataclass
class BlockCase(ModelCase):
    """A decoder block: a model of one layer."""

    sizes: tuple[int, ...]
    """hidden and intermediate size, attention heads, key and value heads."""
    checkpointing: bool
    providers = ("peft_lora", "peft_dora", "ours")
    share = Case.share
    accumulated = ACCUMULATED

    @property
    def label(self) -> str:  # type: ignore[override]
        """For people."""
        checkpoints = ", checkpointed" if self.checkpointing else ""
        return f"{'x'.join(map(str, self.sizes))}, rank {self.rank}, {self.tokens} tokens, {self.dtypes}{checkpoints}"

    @property
    def facts(self) -> dict[str, Any]:  # type: ignore[override]
        """What every row states."""
        return {**super().facts, "shape": list(self.sizes), "checkpointing": self.checkpointing}

    def prepare(self) -> None:
        """Nothing is needed."""

    @functools.cached_property
    def batch(self) -> Inputs:
        """Random tokens."""
        ids = torch.randint(VOCABULARY, (1, self.tokens), generator=torch.Generator().manual_seed(0))
        ids = ids.to(self.run.device)
        return {"input_ids": ids, "labels": ids, "use_cache": False}

    def adapted(self, provider: str) -> Any:
        """The provider's block, its input's gradient computed too, as that of a block inside a model is."""
        with library():
            from transformers import LlamaConfig, LlamaForCausalLM
        hidden, intermediate, heads, kv_heads = self.sizes
        base_dtype, adapter_dtype = dtypes_of(self.dtypes)
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=hidden, intermediate_size=intermediate, num_attention_heads=heads, num_hidden_layers=1,
            num_key_value_heads=kv_heads, vocab_size=VOCABULARY, max_position_embeddings=max(self.tokens, 2048),
        )  # fmt: skip
        with torch.device(self.run.device):
            base = LlamaForCausalLM(config).to(base_dtype)
            model = adapt(base, self.rank, dora=provider != "peft_lora")
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(adapter_dtype)
        if provider == "ours":
            patch_all(model)
        model.enable_input_require_grads()
        if self.checkpointing:
            model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
        return model

    def parts(self, model: Any, step: Work) -> dict[str, Sequence[Work]]:
        """What is timed."""
        return {f"step of {ACCUMULATED}": [step]}


def _results(model: Any, batch: Inputs) -> dict[str, Any]:
    """Logits, and the gradients of the adapters."""
    model.train()
    model(**batch).loss.backward()
    found = adapter_gradients(model)
    model.zero_grad(set_to_none=True)
    return {**_logits(model, batch), **found}


@torch.no_grad()
def _logits(model: Any, batch: Inputs) -> dict[str, Tensor]:
    """Of a text, in training, and of a token after a cached prompt, in evaluation."""
    ids = batch["input_ids"]
    trained = model(input_ids=ids, use_cache=False).logits
    model.eval()
    cut = min(PROMPT, ids.shape[1] - 1)
    prompt = model(input_ids=ids[:, :cut], use_cache=True)
    following = model(input_ids=ids[:, cut : cut + 1], past_key_values=prompt.past_key_values, use_cache=True)
    model.train()
    return {"logits": trained, "token": following.logits}
