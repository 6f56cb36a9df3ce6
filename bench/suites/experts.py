"""A layer of experts under PEFT (Qwen3-MoE's, gate and up in one stack, down in another), and a whole small model.

`forward and backward` trains the adapters of both stacks with a norm at hand, `one token` is evaluation, the adapter
not merged. Every row has the peak of memory. Stock PEFT has no DoRA there: beside its LoRA stands DoRA written as its
LoRA is, by a parametrization that forms the adapted stack.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import dora_kernels
from bench.problem import dtypes_of, long_step
from bench.providers import Case, Checked, Subject, library
from dora_kernels.testing import error

if TYPE_CHECKING:
    from bench.run import Run

PROVIDERS = ("frozen", "peft_lora", "parametrized_dora", "ours_lora", "ours")
DORA = ("parametrized_dora", "ours")
RANK, SCALING = 16, 2.0
STACKS = ("gate_up_proj", "down_proj")
SHAPES = (32, 512, 512, 512, 4), (8, 1024, 2048, 512, 2), (64, 256, 512, 1024, 8)
"""Experts, hidden size, intermediate size, tokens, experts per token."""
_ALLOWED = 4.0
"""The largest error, relative to that of the dense formula in the same dtypes."""
_PROMPT = 64
"""Tokens in the cache before the one that is timed."""


def cases(run: Run, suite: str) -> Iterator[Case]:
    """The layer's shapes at every dtype, then the model."""
    for dtypes in run.given.dtypes:
        for shape in SHAPES:
            yield LayerOfExperts(dtypes, run.device, shape)
        yield MixtureModel(dtypes, run.device)


class _Experts(nn.Module):
    """The layer and its routing."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        with library():
            from transformers import Qwen3MoeConfig
            from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
        count, hidden, inner, tokens, chosen = shape
        config = Qwen3MoeConfig(
            hidden_size=hidden, moe_intermediate_size=inner, num_experts=count, num_experts_per_tok=chosen
        )
        config._experts_implementation = "grouped_mm"
        self.experts = Qwen3MoeExperts(config).to(dtype).requires_grad_(False)
        generator = torch.Generator().manual_seed(0)
        for name in STACKS:
            weight = getattr(self.experts, name)
            weight.copy_(torch.randn(weight.shape, generator=generator) / weight.shape[2] ** 0.5)
        scores = torch.rand(tokens, count, generator=generator)
        self.routing = scores.topk(chosen, 1).indices, torch.full((tokens, chosen), 1 / chosen, dtype=dtype)
        self.x = torch.randn(tokens, hidden, generator=generator).to(dtype)
        self.up = torch.randn(tokens, hidden, generator=generator).to(dtype)
        self.to(device)
        self.routing = self.routing[0].to(device), self.routing[1].to(device)
        self.x, self.up = self.x.to(device), self.up.to(device)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.shape[0]
        result: Tensor = self.experts(x, self.routing[0][:tokens], self.routing[1][:tokens])
        return result


class _Adapted(nn.Module):
    """DoRA of a stack, formed whole: the parametrization that one would write."""

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        count, outputs, inputs = weight.shape
        self.a = nn.Parameter(torch.empty(count, RANK, inputs, dtype=dtype, device=weight.device))
        self.b = nn.Parameter(torch.empty(count, outputs, RANK, dtype=dtype, device=weight.device))
        self.m = nn.Parameter(torch.empty(count, outputs, dtype=dtype, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        """``m V / |V|``, rounded to the weight's dtype."""
        v = weight + SCALING * (self.b @ self.a)
        return ((self.m / torch.linalg.vector_norm(v, dim=2).detach()).unsqueeze(2) * v).to(weight.dtype)


def adapt(model: nn.Module, provider: str, dtype: torch.dtype, targets: list[str]) -> Any:
    """Return the model with the provider's adapters."""
    if provider == "frozen":
        return model
    if provider == "parametrized_dora":
        for module in mixtures(model):
            for name in STACKS:
                parametrize.register_parametrization(module, name, _Adapted(getattr(module, name), dtype), unsafe=True)
        return model
    with library():
        from peft import LoraConfig, get_peft_model
    handle = dora_kernels.patch_peft_globally() if provider.startswith("ours") else None
    config = LoraConfig(
        use_dora=provider == "ours", r=RANK, lora_alpha=int(SCALING * RANK), target_modules=[],
        target_parameters=targets,
    )  # fmt: skip
    model = get_peft_model(model, config, autocast_adapter_dtype=dtype == torch.float32)
    if handle is not None:
        handle.restore()  # later models are stock again; layers on experts that have a DoRA adapter stay as they are
    if provider == "ours_lora":
        dora_kernels.patch_peft(model)
    return model


def factors(model: nn.Module) -> Iterator[tuple[Any, str, Tensor, Tensor, Tensor | None]]:
    """Each adapted stack: its module and name, A ``[E, r, K]`` and B ``[E, N, r]`` as views, the magnitude."""
    for module in model.modules():
        if type(module).__name__ == "ParamWrapper":
            layer: Any = module
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            m = layer.lora_magnitude_vector["default"].weight if "default" in layer.lora_magnitude_vector else None
            views = a.view(-1, RANK, a.shape[1]), b.view(b.shape[0], RANK, -1).permute(2, 0, 1)
            yield layer.get_base_layer(), layer.parameter_name, *views, m
        for name, parts in getattr(module, "parametrizations", {}).items():
            yield module, name, parts[0].a, parts[0].b, parts[0].m


@torch.no_grad()
def train_a_little(model: nn.Module) -> None:
    """Adapters as in the middle of training, the same for all providers."""
    for module, name, a, b, m in sorted(factors(model), key=lambda each: each[1]):
        generator = torch.Generator().manual_seed(len(name))
        a.copy_(torch.randn(a.shape, generator=generator) / a.shape[2] ** 0.5)
        b.copy_(0.05 * torch.randn(b.shape, generator=generator) / RANK**0.5)
        if m is not None:
            weight = _original(module, name).float()
            m.copy_(torch.linalg.vector_norm(weight, dim=2) * (1 + 0.05 * torch.rand(m.shape, generator=generator)))


def _original(module: Any, name: str) -> Tensor:
    if parametrize.is_parametrized(module, name):
        original: Tensor = module.parametrizations[name].original
        return original
    parameter: Tensor = module._parameters[name]
    return parameter


def formed(model: nn.Module, dtype: torch.dtype) -> Iterator[tuple[Any, str, Tensor]]:
    """Each adapted stack: its module and name, and the adapted weights formed in `dtype`, as the dense formula does."""
    for module, name, a, b, m in factors(model):
        v = _original(module, name).to(dtype) + SCALING * (b.detach().to(dtype) @ a.detach().to(dtype))
        if m is not None:
            v *= (m.detach().to(dtype) / torch.linalg.vector_norm(v, dim=2)).unsqueeze(2)
        yield module, name, v


def mixtures(model: nn.Module) -> list[Any]:
    """The modules that hold the stacks. A parametrized one keeps a dictionary of modules under the same names."""
    found = (module for module in model.modules() if not isinstance(module, nn.ModuleDict))
    return [module for module in found if all(hasattr(module, name) for name in STACKS)]


def allowed(found: Tensor, results: dict[str, Tensor]) -> Checked:
    """The error of a result, and what is allowed: the dense formula's own in the same dtype, times a factor."""
    plain = error(results["plain"], results["exact"])
    return {"y": error(found, results["exact"])}, {"y": max(_ALLOWED * plain, 1e-6)}


@dataclass
class LayerOfExperts(Case):
    """A layer of experts."""

    dtypes: str
    device: torch.device
    shape: tuple[int, int, int, int, int]
    suite = "experts"
    providers = PROVIDERS

    @property
    def label(self) -> str:  # type: ignore[override]
        """For people."""
        count, hidden, inner, tokens, chosen = self.shape
        return f"{count} experts, {hidden}x{inner}, {tokens} tokens to {chosen}, {self.dtypes}"

    @property
    def facts(self) -> dict[str, Any]:  # type: ignore[override]
        """What every row states."""
        return {"shape": list(self.shape[:3]), "rank": RANK, "tokens": self.shape[3], "dtypes": self.dtypes}

    def subject(self, provider: str) -> Subject:
        """The provider's layer."""
        base, adapters = dtypes_of(self.dtypes)
        inner = _Experts(self.shape, base, self.device)
        held = inner.experts
        model = adapt(inner, provider, adapters, [f"experts.{name}" for name in STACKS])
        train_a_little(model)
        leaves = [inner.x.requires_grad_(), *(p for p in model.parameters() if p.requires_grad)]

        def train() -> tuple[Tensor, ...]:
            if not model.training:
                model.train()
            return torch.autograd.grad(model(inner.x), leaves, inner.up)

        token = inner.x.detach()[:1]

        @torch.no_grad()
        def evaluate() -> Tensor:
            if model.training:
                model.eval()
            result: Tensor = model(token)
            return result

        parts = {"forward and backward": [train], "one token": [evaluate]}
        check = functools.partial(self._check, model, inner, held)
        return Subject(provider, parts, *check(), again=functools.partial(_after_a_step, model, check))  # type: ignore[arg-type]

    def _check(self, model: Any, inner: _Experts, held: nn.Module) -> Checked:
        """The output beside the dense formula in float64, and the formula's own error in the layer's dtype."""
        with torch.no_grad():
            y = model(inner.x.detach())
            results = {}
            for name, dtype in (("exact", torch.float64), ("plain", dtypes_of(self.dtypes)[0])):
                weights = {stack: _original(held, stack) for stack in STACKS}
                weights |= {stack: weight for _, stack, weight in formed(model, dtype)}
                results[name] = self._dense(inner, weights, dtype)
        return allowed(y, results)

    def _dense(self, inner: _Experts, weights: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Qwen3-MoE's experts, one after another."""
        stacks = [weights[name].to(dtype) for name in STACKS]
        x, (chosen, scores) = inner.x.detach().to(dtype), inner.routing
        y = torch.zeros_like(x)
        for e in range(self.shape[0]):
            rows, place = torch.where(chosen == e)
            gate, up = (x[rows] @ stacks[0][e].t()).chunk(2, 1)
            h = (nn.functional.silu(gate) * up) @ stacks[1][e].t()
            y.index_add_(0, rows, h * scores[rows, place, None].to(dtype))
        return y


def _after_a_step(model: nn.Module, check: Callable[[], Checked]) -> Checked:
    """A norm that a step has made stale would show."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if parameters:
        optimizer = torch.optim.AdamW(parameters, lr=1e-3)
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        with long_step(optimizer):
            optimizer.step()
        optimizer.zero_grad()
    return check()


@dataclass
class MixtureModel(Case):
    """A Qwen3-MoE of two layers: training with AdamW, and one token after a prompt."""

    dtypes: str
    device: torch.device
    suite = "experts"
    providers = PROVIDERS
    tokens = 256

    @property
    def label(self) -> str:  # type: ignore[override]
        """For people."""
        return f"Qwen3-MoE, 2 layers, 32 experts, {self.tokens} tokens, {self.dtypes}"

    @property
    def facts(self) -> dict[str, Any]:  # type: ignore[override]
        """What every row states."""
        return {"shape": [2, 32, 512, 512], "rank": RANK, "tokens": self.tokens, "dtypes": self.dtypes}

    def subject(self, provider: str) -> Subject:
        """The provider's model."""
        model = adapt(self._base(), provider, dtypes_of(self.dtypes)[1], [f"mlp.experts.{name}" for name in STACKS])
        train_a_little(model)
        parameters = [p for p in model.parameters() if p.requires_grad]
        if not parameters:  # the frozen model's step is the gradient of its input embeddings
            parameters = [model.get_input_embeddings().weight.requires_grad_()]
        optimizer = torch.optim.AdamW(parameters, lr=1e-4) if provider != "frozen" else None

        def step(micro_batches: int = 1) -> None:
            if not model.training:
                model.train()
            for _ in range(micro_batches):
                model(input_ids=self.ids, labels=self.ids, use_cache=False).loss.backward()
            if optimizer is not None:
                optimizer.step()
            for parameter in parameters:
                parameter.grad = None

        with torch.no_grad():
            past = model(input_ids=self.ids[:1, :_PROMPT], use_cache=True).past_key_values

        @torch.no_grad()
        def token() -> None:
            if model.training:
                model.eval()
            model(input_ids=self.ids[:1, _PROMPT : _PROMPT + 1], past_key_values=past, use_cache=True)
            past.crop(-1)

        parts = {"step": [step], "step, 4 micro-batches": [lambda: step(4)], "one token": [token]}
        check = functools.partial(self._check, model)
        again = functools.partial(_after_a_step, model, check) if optimizer is not None else None
        return Subject(provider, parts, *check(), again=again)  # type: ignore[arg-type]

    @functools.cached_property
    def ids(self) -> Tensor:
        """Two texts of random tokens."""
        generator = torch.Generator().manual_seed(1)
        return torch.randint(0, 1024, (2, self.tokens // 2), generator=generator).to(self.device)

    def _base(self) -> Any:
        """The frozen model, the same at each call."""
        with library():
            from transformers import AutoModelForCausalLM, Qwen3MoeConfig
        torch.manual_seed(0)
        config = Qwen3MoeConfig(
            vocab_size=1024, hidden_size=512, intermediate_size=512, moe_intermediate_size=512, num_hidden_layers=2,
            num_attention_heads=8, num_key_value_heads=4, head_dim=64, num_experts=32, num_experts_per_tok=4,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_config(config, dtype=dtypes_of(self.dtypes)[0])
        return model.to(self.device).requires_grad_(False)

    @torch.no_grad()
    def _check(self, model: Any) -> Checked:
        """The logits beside those of a model with the adapted weights formed, in float64 and in the model's dtype."""
        logits, results = model(input_ids=self.ids, use_cache=False).logits, {}
        for name, dtype in (("exact", torch.float64), ("plain", dtypes_of(self.dtypes)[0])):
            dense = self._base().to(dtype)
            dense.set_experts_implementation("eager")
            places = dict(zip(mixtures(model), mixtures(dense), strict=True))
            for module, stack, weight in formed(model, dtype):
                getattr(places[module], stack).data = weight
            results[name] = dense(input_ids=self.ids, use_cache=False).logits
        return allowed(logits, results)
