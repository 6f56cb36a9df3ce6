"""SmolLM2-135M with adapters on all linear layers: training steps and generated tokens, adapters unmerged.

A step is one sequence, forward and backward, then AdamW. The adapters are moved away from their start, the same for
all. The logits, of a text and of one token after a cached prompt, and the gradients of all A, B and magnitudes are
compared with those of the stock model in float64 (its RMSNorm goes through float32 even there), and may err four times
as much as it in its own dtypes. Ours are compared again after the timed steps.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bench.demo import train
from bench.layers import least_of
from bench.problem import DTYPES, Results, adapter_gradients, errors, limits, long_step, take_adapters
from bench.providers import Checked, Subject, Work
from bench.suites.finetune import KINDS, PROVIDERS, RANK, adapted, load, settings

if TYPE_CHECKING:
    from bench.run import Run

PROMPT, CONTINUED = 16, 48
"""Tokens before the first one that is timed, and those made before the cache starts again."""


def stages(run: Run) -> Iterator[tuple[str, Callable[[], None]]]:
    """A step at every number of tokens, and a token."""
    given = run.given
    for dtypes, tokens, rank in itertools.product(given.dtypes, given.tokens or [128], given.ranks or [RANK]):
        case = ModelCase(run, tokens, rank, dtypes)
        yield f"model: {case.label}", lambda case=case: _measure(run, case)


def _measure(run: Run, case: ModelCase) -> None:
    load(run)  # without weights the suite is missing, not each of its providers
    run.measure(case, share=0.1)  # a step of each provider takes seconds


@dataclass
class ModelCase:
    """The model at a length."""

    run: Run
    tokens: int
    rank: int
    dtypes: str
    suite: str = "model"
    providers: Sequence[str] = PROVIDERS

    @property
    def label(self) -> str:
        """For people."""
        return f"SmolLM2-135M, rank {self.rank}, {self.tokens} tokens, {self.dtypes}"

    @property
    def facts(self) -> dict[str, Any]:
        """What every row states."""
        return {"shape": "SmolLM2-135M", "rank": self.rank, "tokens": self.tokens, "dtypes": self.dtypes}

    @functools.cached_property
    def batch(self) -> Tensor:
        """Real text."""
        return load(self.run)[2].batches(self.tokens, 1, seed=0)[0].to(self.run.device)

    def subject(self, provider: str) -> Subject:
        """The provider's model, its results checked."""
        model = self._moved(provider)
        one = train.make_run(KINDS[provider], model, settings(self.run, self.rank))
        kind = "lora" if provider == "peft_lora" else "dora"
        wanted, allowed = self._lora_judge if kind == "lora" else self._dora_judge

        def step() -> None:
            train.train_step(one, self.batch, 0)

        def again() -> Checked:
            with long_step(one.optimizer):
                step()
            wanted, allowed = self._judge("peft_lora" if kind == "lora" else "peft_dora", model)
            return errors(_logits(model, self.batch), wanted), allowed

        parts: dict[str, list[Work]] = {"step": [step], "token": [Continuation(model, self.batch)]}
        least = {
            "step": _least(model, kind, self.tokens, self.rank, self.dtypes, True),
            "token": _least(model, kind, 1, self.rank, self.dtypes, False),
        }
        found = errors(_results(model, self.batch), wanted)
        return Subject(provider, parts, found, allowed, least, again=again if provider == "ours" else None)

    def _moved(self, provider: str) -> Any:
        """A model whose B is not zero and whose magnitudes are not the norms."""
        model = adapted(self.run, provider, self.rank, 0, self.dtypes)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    moved = 0.02 * torch.randn(parameter.shape, generator=generator)
                    parameter.copy_(moved)
                elif "lora_magnitude_vector" in name:
                    parameter.mul_(1.05)
        if "+" in self.dtypes:
            model.forward = torch.autocast(self.run.device.type, DTYPES[self.dtypes][0])(model.forward)
        return model

    def _judge(self, provider: str, trained: Any = None) -> tuple[Results, dict[str, float]]:
        """The stock model's results in float64, of a trained model's adapters the logits, and the errors allowed."""
        stock, results = self._moved(provider), _results
        if trained is not None:
            take_adapters(stock, trained)
            results = _logits
        exact = copy.deepcopy(stock).double()
        if "+" in self.dtypes:
            del exact.forward  # without autocast
        wanted = results(exact, self.batch)
        return wanted, limits(results(stock, self.batch), wanted)

    @functools.cached_property
    def _dora_judge(self) -> tuple[Results, dict[str, float]]:
        return self._judge("peft_dora")

    @functools.cached_property
    def _lora_judge(self) -> tuple[Results, dict[str, float]]:
        return self._judge("peft_lora")


def _results(model: Any, batch: Tensor) -> Results:
    """Logits, and the gradients of the adapters."""
    model.train()
    model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
    found = adapter_gradients(model)
    model.zero_grad(set_to_none=True)
    return {**_logits(model, batch), **found}


@torch.no_grad()
def _logits(model: Any, batch: Tensor) -> Results:
    """Of a text, in training, and of a token after a cached prompt, in evaluation."""
    trained = model(input_ids=batch, use_cache=False).logits
    model.eval()
    cut = min(PROMPT, batch.shape[1] - 1)
    prompt = model(input_ids=batch[:, :cut], use_cache=True)
    following = model(input_ids=batch[:, cut : cut + 1], past_key_values=prompt.past_key_values, use_cache=True)
    model.train()
    return {"logits": trained, "token": following.logits}


class Continuation:
    """Each call makes one more token, greedily; after `CONTINUED` of them it starts again."""

    def __init__(self, model: Any, ids: Tensor) -> None:
        self.model, self.prompt, self.made, self.state = model, ids[:, :PROMPT], 0, None

    @torch.no_grad()
    def __call__(self) -> None:
        """One token."""
        if self.model.training:  # after a step
            self.model.eval()
        if self.state is None or self.made >= CONTINUED:
            first = self.model(input_ids=self.prompt, use_cache=True)
            self.made, self.state = 0, (first.logits[:, -1:].argmax(-1), first.past_key_values)
        token, cache = self.state
        output = self.model(input_ids=token, past_key_values=cache, use_cache=True)
        self.made, self.state = self.made + 1, (output.logits[:, -1:].argmax(-1), output.past_key_values)


def _least(model: nn.Module, kind: str, tokens: int, rank: int, dtypes: str, training: bool) -> tuple[int, int]:
    """Bytes and FLOPs of the linear layers; attention, a few hundredths of them at these lengths, is left out."""
    size = flops = 0
    base, adapter = (dtype.itemsize for dtype in DTYPES[dtypes])
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or ".lora_" in name:
            continue
        layer_kind = kind if name.endswith("base_layer") else "frozen"
        more = least_of(
            (tokens, module.out_features, module.in_features, rank), (base, adapter), layer_kind, 1, training, training
        )
        size, flops = size + more[0], flops + more[1]
    return size, flops
