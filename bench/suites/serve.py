"""Many adapters in one batch: the bank beside PEFT's mixed batches, and the base model alone.

A case is a batch of rows whose adapters are drawn uniformly, by Zipf's law with exponent 1.5, or taken in turn
("distinct"). Decoding has a token a row, a prefill 512. The layers are those of a small stack, all fed the same input,
so that what is done once for a forward is shared by several layers, as in a model; a time is that of the whole stack.
`frozen` is the base model alone. The last case is SmolLM2-135M.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dora_kernels
from bench.problem import Judged, dtypes_of
from bench.providers import Case, Subject, Work, library
from bench.suites import finetune
from bench.training import Continuation, patch_all
from dora_kernels import Adapter, AdapterLayer, merge_dora
from dora_kernels.testing import errors, limits

if TYPE_CHECKING:
    from bench.run import Run

PROVIDERS = ("frozen", "peft_lora", "ours", "ours_bank_lora", "ours_bank")
PROMPT, PROMPT_MODEL, CONTINUED = 512, 16, 24
"""Tokens of a row in a prefill, on a layer and on the model, and those made before the cache starts again."""
GRID = [
    (rows, adapters, how)
    for rows in (1, 8, 32)
    for adapters in (1, 8, 32)
    for how in ("uniform", "zipf", "distinct")
    if how == "distinct" or (rows > 1 and adapters > 1)
]
SOME = [(8, 8, "distinct"), (8, 8, "zipf"), (32, 32, "uniform")]
MIXED = (8, 16, 32, 64)
SCALING = 0.5


def cases(run: Run, suite: str) -> Iterator[Case]:
    """Decoding over the whole grid; mixed ranks, prefills and the model over a part of it."""
    given = run.given
    hidden, ranks = given.hidden or [4096 if run.device.type == "cuda" else 1024], given.ranks or [16]
    for dtypes in given.dtypes:
        for size in hidden:
            for tokens in given.tokens or [1]:
                for rank in ranks:
                    for batch in GRID:
                        yield ServeCase(run, *batch, tokens, (rank,), dtypes, size)
                for batch in SOME:
                    yield ServeCase(run, *batch, tokens, MIXED, dtypes, size)
            if not given.tokens:
                for batch in [(1, 1, "distinct"), *SOME]:
                    yield ServeCase(run, *batch, PROMPT, (ranks[0],), dtypes, size)
        if not given.hidden and not given.tokens:
            for batch in [(1, 1, "distinct"), *SOME[:2]]:
                yield ServeModelCase(run, *batch, 1, (ranks[0],), dtypes, 0)


def drawn(rows: int, adapters: int, how: str) -> list[int]:
    """Each row's adapter."""
    if how == "distinct":
        return [row % adapters for row in range(rows)]
    weights = torch.ones(adapters) if how == "uniform" else 1.0 / torch.arange(1, adapters + 1) ** 1.5
    picked: list[int] = torch.multinomial(weights, rows, True, generator=torch.Generator().manual_seed(0)).tolist()
    return picked


@dataclass(eq=False)
class ServeCase(Case):
    """One batch on a stack of layers."""

    run: Run
    rows: int
    adapters: int
    how: str
    tokens: int
    """Of a row."""
    ranks: tuple[int, ...]
    """Of the adapters, in turn."""
    dtypes: str
    hidden: int
    suite = "serve"
    providers = PROVIDERS
    share = 0.02

    @property
    def label(self) -> str:  # type: ignore[override]
        """For people."""
        ranks = f"rank {self.ranks[0]}" if len(self.ranks) == 1 else f"ranks {self.ranks[0]} to {self.ranks[-1]}"
        batch = f"{self.rows} rows, {self.adapters} adapters, {self.how}"
        prompt = "" if self.tokens == 1 else f", {self.tokens} tokens each"
        return f"{self.place}, {batch}{prompt}, {ranks}, {self.dtypes}"

    @property
    def place(self) -> str:
        """What is served."""
        return f"{self.hidden}x{self.hidden}"

    @property
    def facts(self) -> dict[str, Any]:  # type: ignore[override]
        """What every row states."""
        return {
            "shape": [self.hidden, self.hidden], "rank": max(self.ranks), "tokens": self.rows * self.tokens,
            "dtypes": self.dtypes, "rows": self.rows, "adapters": self.adapters, "drawn": self.how,
        }  # fmt: skip

    @functools.cached_property
    def names(self) -> list[str]:
        """Each row's adapter."""
        return [f"a{number}" for number in drawn(self.rows, self.adapters, self.how)]

    @functools.cached_property
    def dtype(self) -> torch.dtype:
        """Of everything."""
        return dtypes_of(self.dtypes)[0]

    @functools.cached_property
    def x(self) -> Tensor:
        """The layers' input."""
        return self._random(0, self.rows, self.tokens, self.hidden).to(self.dtype)

    @functools.cached_property
    def stack(self) -> Stack:
        """The base model: eight layers, two in a prefill."""
        weights = [self._random(1 + i, self.hidden, self.hidden) for i in range(8 if self.tokens == 1 else 2)]
        return Stack([(weight / self.hidden**0.5).to(self.dtype) for weight in weights])

    @functools.cached_property
    def loaded(self) -> dict[str, Adapter]:
        """The DoRA adapters by name; without their magnitudes they are the plain ones."""
        found = {}
        for number in range(self.adapters):
            rank, layers = self.ranks[number % len(self.ranks)], {}
            for i, base in enumerate(self.stack.layers):
                a = self._random(100 * number + i, rank, self.hidden).div(self.hidden**0.5).to(self.dtype)
                b = self._random(-100 * number - i - 1, self.hidden, rank).div(rank**0.5).to(self.dtype)
                norm = (base.weight.float() + SCALING * b.float() @ a.float()).norm(dim=1)
                magnitude = norm * (1.0 + 0.1 * self._random(i, self.hidden))
                layers[f"layers.{i}"] = AdapterLayer("linear", a, b, magnitude, SCALING)
            found[f"a{number}"] = Adapter(layers)
        return found

    def _random(self, seed: int, *shape: int) -> Tensor:
        generator = torch.Generator(self.run.device).manual_seed(seed % (1 << 31))
        return torch.randn(*shape, generator=generator, device=self.run.device)

    def subject(self, provider: str) -> Subject:
        """The provider's forward of the batch, each row checked against float64."""
        model, options, batch = self.served(provider)

        @torch.no_grad()
        def call() -> Any:
            with batch():
                return model(self.x, **options)

        kind = kind_of(provider)
        wanted, allowed = self.judged(kind)
        found, part = errors({"y": call()}, wanted), "decode" if self.tokens == 1 else "prefill"
        return Subject(provider, {part: [call]}, found, allowed, {part: self._least(kind)})

    def served(self, provider: str) -> tuple[Any, dict[str, Any], Callable[[], Any]]:
        """The provider's model with the adapters, what its forward takes of the batch, and what is entered around it.

        Every provider has a copy of the base model's modules and shares the weights.
        """
        model = copy.deepcopy(self.stack, {id(parameter): parameter for parameter in self.stack.parameters()})
        if provider == "frozen":
            return model, {}, contextlib.nullcontext
        dora = kind_of(provider) == "dora"
        if "bank" in provider:
            bank = dora_kernels.AdapterBank(model, slots=self.adapters, max_rank=max(self.ranks))
            for name, adapter in self.loaded.items():
                bank.load(name, adapter if dora else plain(adapter))
            return model, {}, functools.partial(bank.rows, self.names)
        model = peft_model(model, self.loaded, dora, self.dtype)
        if dora:
            patch_all(model)
        return model, {"adapter_names": self.names}, contextlib.nullcontext

    @functools.cache  # noqa: B019  a case lives as long as its run
    def judged(self, kind: str) -> Judged:
        """Exact outputs of all layers, and the errors that a row by row computation in the same dtype has."""
        wanted = {"y": [self._by_row(layer, kind, torch.float64) for layer in range(len(self.stack.layers))]}
        return wanted, limits({"y": [self._by_row(i, kind, self.dtype) for i in range(len(wanted["y"]))]}, wanted)

    def _by_row(self, layer: int, kind: str, dtype: torch.dtype) -> Tensor:
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        weight, rows = self.stack.layers[layer].weight, []
        for x, name in zip(self.x.to(dtype), self.names, strict=True):
            own = self.loaded[name].layers[f"layers.{layer}"]
            y = F.linear(x, weight.to(dtype))
            if kind != "frozen":
                y = y + F.linear(F.linear(x, own.lora_A.to(dtype)), own.lora_B.to(dtype)) * SCALING
            if kind == "dora":
                norm = (weight.to(exact) + SCALING * own.lora_B.to(exact) @ own.lora_A.to(exact)).norm(dim=1)
                y = y * (own.magnitude.to(exact) / norm).to(dtype)  # type: ignore[union-attr]
            rows.append(y)
        return torch.stack(rows)

    def _least(self, kind: str) -> tuple[int, int]:
        """Every operand once, those of each adapter that takes part too."""
        n, tokens, width = self.hidden, self.rows * self.tokens, self.dtype.itemsize
        size, flops = width * (n * n + 2 * tokens * n), 2 * tokens * n * n
        if kind != "frozen":
            size += sum(self.loaded[name].layers["layers.0"].rank * 2 * n * width for name in set(self.names))
            flops += sum(4 * self.tokens * n * self.loaded[name].layers["layers.0"].rank for name in self.names)
        if kind == "dora":
            size += len(set(self.names)) * n * 4
        return size * len(self.stack.layers), flops * len(self.stack.layers)


class Stack(nn.Module):
    """Linear layers side by side."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for weight in weights:
            layer = nn.Linear(*weight.shape[::-1], bias=False, device="meta", dtype=weight.dtype)
            layer.weight = nn.Parameter(weight, requires_grad=False)
            self.layers.append(layer)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Each layer's output of x."""
        return [layer(x) for layer in self.layers]


def kind_of(provider: str) -> str:
    """What a provider computes: "frozen", "lora" or "dora"."""
    return "frozen" if provider == "frozen" else "lora" if provider.endswith("lora") else "dora"


def plain(adapter: Adapter) -> Adapter:
    """The adapter without its magnitudes."""
    return Adapter({name: dataclasses.replace(layer, magnitude=None) for name, layer in adapter.layers.items()})


def peft_model(base: nn.Module, adapters: dict[str, Adapter], dora: bool, dtype: torch.dtype) -> Any:
    """A PEFT model with these adapters."""
    with library():
        from peft import LoraConfig, get_peft_model
    model: Any = None
    for name, adapter in adapters.items():
        rank = next(iter(adapter.layers.values())).rank
        config = LoraConfig(r=rank, lora_alpha=SCALING * rank, target_modules=list(adapter.layers), use_dora=dora)  # type: ignore[arg-type]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if model is None:
                model = get_peft_model(base, config, name, autocast_adapter_dtype=False)
            else:
                model.add_adapter(name, config, autocast_adapter_dtype=False)
        with torch.no_grad():
            for layer_name, layer in adapter.layers.items():
                module = model.base_model.model.get_submodule(layer_name)
                module.lora_A[name].weight.data = layer.lora_A.clone()
                module.lora_B[name].weight.data = layer.lora_B.clone()
                if dora:
                    assert layer.magnitude is not None
                    module.lora_magnitude_vector[name].weight.data = layer.magnitude.to(dtype)
    return model.eval()


@dataclass(eq=False)
class ServeModelCase(ServeCase):
    """One batch on SmolLM2-135M, all linear layers of its blocks adapted."""

    share = 0.03
    place = "SmolLM2-135M"

    @property
    def facts(self) -> dict[str, Any]:  # type: ignore[override]
        """What every row states."""
        return {**super().facts, "shape": self.place}

    def prepare(self) -> None:
        """Without weights the case is missing, not each of its providers."""
        finetune.language_model(self.run)

    @functools.cached_property
    def stack(self) -> Any:
        """The base model."""
        base = finetune.language_model(self.run)[0]
        return (base if self.dtype == torch.float32 else copy.deepcopy(base).to(self.dtype)).eval()

    @functools.cached_property
    def prompt(self) -> Tensor:
        """The same real text for each row."""
        ids: Tensor = finetune.language_model(self.run)[1].batches(PROMPT_MODEL, 1)[0]["input_ids"]
        return ids.expand(self.rows, -1).contiguous()

    @functools.cached_property
    def loaded(self) -> dict[str, Adapter]:
        """Random factors of a hundredth of the weights' size."""
        found = {}
        for number in range(self.adapters):
            layers = {}
            for i, (name, module) in enumerate(self.stack.named_modules()):
                if isinstance(module, nn.Linear) and "lm_head" not in name:
                    a = self._random(1000 * number + i, self.ranks[0], module.in_features) / module.in_features**0.5
                    b = self._random(-1000 * number - i - 1, module.out_features, self.ranks[0]) * 0.02
                    norm = (module.weight.float() + SCALING * b @ a).norm(dim=1)
                    magnitude = norm * (1.0 + 0.05 * self._random(i, module.out_features))
                    layers[name] = AdapterLayer("linear", a.to(self.dtype), b.to(self.dtype), magnitude, SCALING)
            found[f"a{number}"] = Adapter(layers)
        return found

    def subject(self, provider: str) -> Subject:
        """Generated tokens after a prompt, and the prompt's own forward, whose logits are checked."""
        model, options, batch = self.served(provider)
        forward = functools.partial(model, **options)
        token = Continuation(_Called(forward), self.prompt, CONTINUED)

        @torch.no_grad()
        def prefill() -> Tensor:
            with batch():
                logits: Tensor = forward(input_ids=self.prompt, use_cache=False).logits
                return logits

        def decode() -> None:
            with batch():
                token()

        wanted, allowed = self.judged(kind_of(provider))
        parts: dict[str, Sequence[Work]] = {"token": [decode], "prefill": [prefill]}
        return Subject(provider, parts, errors({"logits": prefill()}, wanted), allowed)

    @functools.cache  # noqa: B019
    def judged(self, kind: str) -> Judged:
        """The logits of each adapter alone: merged in float64, and merged in the same dtype."""
        wanted = {"logits": self._alone(kind, torch.float64)}
        return wanted, limits({"logits": self._alone(kind, self.dtype)}, wanted)

    @torch.no_grad()
    def _alone(self, kind: str, dtype: torch.dtype) -> Tensor:
        rows: dict[str, Tensor] = {}
        for name in dict.fromkeys(self.names):
            model = copy.deepcopy(self.stack).to(dtype)
            for layer_name, own in self.loaded[name].layers.items() if kind != "frozen" else ():
                weight = model.get_submodule(layer_name).weight
                magnitude = own.magnitude.to(weight.dtype) if kind == "dora" and own.magnitude is not None else None
                merged = merge_dora(weight, own.lora_A.to(dtype), own.lora_B.to(dtype), magnitude, scaling=own.scaling)
                weight.copy_(merged)
            rows[name] = model(input_ids=self.prompt[:1], use_cache=False).logits[0]
        return torch.stack([rows[name] for name in self.names])


@dataclass
class _Called:
    """A forward in the place of a model in evaluation."""

    forward: Callable[..., Any]
    training = False

    def __call__(self, **inputs: Any) -> Any:
        return self.forward(**inputs)
