"""Tiny models of four architectures with DoRA adapters in the middle of training, and how to compare two of them.

**The budget.** The oracle is a float64 copy of the stock PEFT model, in which also those intermediate results that a
model forces into float32 are float64. A patched model's distance from it, in the Frobenius norm, may be twice the
largest of that of the stock model in the same dtypes, and those of five copies of it whose weights have moved by up
to one eps each: what rounding does to the problem, by chance a little more or less (and of one eps of the result's own
norm: a single number may be exact by luck).
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners import lora
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import dora_kernels
from dora_kernels.peft import embedding, linear, plan
from dora_kernels.peft import layer as peft_layer
from dora_kernels.peft.layer import DoraLayer
from dora_kernels.peft.state import SWITCH

VOCAB = 61


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """For whoever imports it. Models this small spend their time waking threads, on a busy machine above all."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


_MAKERS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "llama": (
        lambda: LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCAB, hidden_size=32, intermediate_size=44, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, attention_bias=True,
                bos_token_id=1, eos_token_id=2, pad_token_id=0,
            )
        ),
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    ),
    "gpt2": (
        lambda: GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCAB, n_embd=32, n_inner=44, n_layer=2, n_head=4, n_positions=32,
                resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=2, pad_token_id=0,
            )
        ),
        ["c_attn", "c_fc", "c_proj"],
    ),
    "bert": (
        lambda: BertForMaskedLM(
            BertConfig(
                vocab_size=VOCAB, hidden_size=32, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4,
                max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
            )
        ),
        ["query", "key", "value", "attention.output.dense"],
    ),
    "t5": (
        lambda: T5ForConditionalGeneration(
            T5Config(
                vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=44, num_layers=2, num_heads=4, dropout_rate=0.0,
                feed_forward_proj="gated-gelu", decoder_start_token_id=0, pad_token_id=0, eos_token_id=2,
            )
        ),
        ["q", "k", "v", "o", "wi_0", "wi_1", "wo"],
    ),
}  # fmt: skip

KINDS = tuple(_MAKERS)


def base_model(kind: str) -> nn.Module:
    """The same weights at every call; biases and norms moved from their constant start, and layers that matter."""
    torch.manual_seed(1)
    model = _MAKERS[kind][0]()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif "embed" not in name and "wte" not in name:
                parameter.mul_(0.5 if kind == "t5" else 3)
    return model


def config(kind: str = "llama", **options: Any) -> LoraConfig:
    values = {"r": 3, "lora_alpha": 5, "use_dora": True, "target_modules": list(_MAKERS[kind][1]), **options}
    return LoraConfig(fan_in_fan_out=kind == "gpt2", **values)


def peft_model(kind: str = "llama", *, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    """A stock PEFT model, its adapter moved far from where it starts."""
    model = get_peft_model(base_model(kind).to(dtype), config(kind, **options))
    return move_adapter(model)

# The layers of a `Toy` in a PEFT model, as a handle names them.
FIRST, SECOND = "base_model.model.first", "base_model.model.second"


class Toy(nn.Module):
    """A net of two linear layers, and three of other kinds."""

    def __init__(self, others: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 20), nn.Linear(20, 8)
        if others:
            self.embedding, self.conv, self.special = nn.Embedding(9, 12), nn.Conv2d(1, 2, 3), Special(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class Special(nn.Linear):
    """A subclass of nn.Linear, with what may be a forward of its own: PEFT takes it for one."""


def toy(*, others: bool = False, **options: Any) -> nn.Module:
    """A stock PEFT model of `Toy`, its adapter moved."""
    torch.manual_seed(1)
    targets = ["first", "second"] + (["embedding", "conv", "special"] if others else [])
    values = {"r": 3, "lora_alpha": 4, "use_dora": True, "target_modules": targets, **options}
    return move_adapter(get_peft_model(Toy(others), LoraConfig(**values)))


def wrapped(model: nn.Module, name: str) -> nn.Module:
    """The model with one layer whose `forward` somebody has replaced, as accelerate's hooks do."""
    layer = model.get_submodule(f"base_model.model.{name}")
    layer.forward = functools.partial(type(layer).forward, layer)
    return model


def toy_twins(**options: Any) -> tuple[nn.Module, nn.Module, dora_kernels.PatchHandle]:
    """A stock PEFT model, a copy that is patched, and its handle."""
    stock = toy(**options)
    ours = copy.deepcopy(stock)
    return stock, ours, dora_kernels.patch_peft(ours)


def twins(kind: str = "llama", **options: Any) -> tuple[nn.Module, nn.Module]:
    """A stock PEFT model, and a copy of it that is patched."""
    stock = peft_model(kind, **options)
    ours = copy.deepcopy(stock)
    dora_kernels.patch_peft(ours)
    return stock, ours


@torch.no_grad()
def move_adapter(model: nn.Module, adapter: str = "default", seed: int = 2) -> nn.Module:
    """As after long training: ``s B A`` about as large as W, magnitudes half to one and a half times the norm."""
    generator = torch.Generator().manual_seed(seed)

    def normal(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator).to(like.dtype)

    for layer in lora_layers(model):
        if adapter not in layer.scaling:
            continue
        if isinstance(layer, lora.Embedding):
            A, B = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
        else:
            A, B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        A.copy_(normal(A) / A[0].numel() ** 0.5)
        B.copy_(normal(B) * layer.weight.float().std().item() * A[0].numel() ** 0.5 / B.shape[1] ** 0.5)
        if adapter in layer.lora_magnitude_vector:
            m = layer.lora_magnitude_vector[adapter].weight
            shape, groups = m.shape, getattr(layer.base_layer, "groups", 1)
            weight = layer.weight.double()
            if isinstance(layer, lora.Embedding) or getattr(layer, "fan_in_fan_out", False):
                weight = weight.t()
            # With groups PEFT cuts the product's rows into the weight's.
            low = (B.double().reshape(B.shape[0] // groups, -1) @ A.double().flatten(1)).reshape(weight.shape)
            norm = (weight + layer.scaling[adapter] * low).flatten(1).norm(dim=1)
            m.copy_((norm * (0.5 + torch.rand(norm.shape, generator=generator, dtype=torch.float64))).view(shape))
    return model


def lora_layers(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, lora.LoraLayer)]


def kept_norms(model: nn.Module) -> list[Any]:
    """The norm caches of a patched model."""
    return [cache for layer in lora_layers(model) for cache in vars(layer)[SWITCH].values()]


def batch(kind: str = "llama", tokens: tuple[int, int] = (2, 9), seed: int = 3) -> dict[str, Tensor]:
    ids = torch.randint(3, VOCAB, tokens, generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids.flip(1) if kind in ("bert", "t5") else ids}


def solve(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Logits, loss, and the gradient of every parameter that requires one, by name. No gradient is left behind."""
    model.zero_grad(set_to_none=True)
    out = model(**inputs)
    out.loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    missing = [name for name, grad in grads.items() if grad is None]
    assert not missing, f"no gradient: {missing}"
    model.zero_grad(set_to_none=True)
    return {"logits": out.logits.detach(), "loss": out.loss.detach(), **grads}


class Float64(TorchFunctionMode):
    """Whoever asks for float32 gets float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        wide = [torch.float64 if a is torch.float32 else a for a in args]
        return func(*wide, **{k: torch.float64 if a is torch.float32 else a for k, a in (kwargs or {}).items()})


def exact(stock: nn.Module) -> nn.Module:
    """The float64 copy of a stock model."""
    assert not any(isinstance(layer, DoraLayer) for layer in stock.modules())
    return copy.deepcopy(stock).double()


def moved(stock: nn.Module, dtype: torch.dtype, seed: int) -> nn.Module:
    """A copy whose every weight has moved by a random relative amount of up to one eps of `dtype`."""
    model = copy.deepcopy(stock)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            step = 2 * torch.rand(p.shape, generator=generator, dtype=torch.float64) - 1
            p.copy_(p.double() * (1 + torch.finfo(dtype).eps * step))
    return model


def check(
    run: Callable[[nn.Module], dict[str, Tensor]],
    stock: nn.Module,
    ours: nn.Module,
    dtype: torch.dtype = torch.float32,
    context: Callable[[], Any] = contextlib.nullcontext,
) -> None:
    """All of `run`'s results on our model within their budget, of stock's dtypes and shapes.

    `dtype` is the one computed in; `context` (autocast) is entered for all models but the oracle.
    """
    with Float64():
        wanted = run(exact(stock))
    copies = [moved(stock, dtype, seed) for seed in range(4, 9)]
    with context():
        results, theirs = run(ours), [run(model) for model in (stock, *copies)]
    assert results.keys() == theirs[0].keys() == wanted.keys()
    failures = []
    for name, want in wanted.items():
        assert want.dtype == torch.float64, name
        assert results[name].dtype == theirs[0][name].dtype, name
        assert results[name].shape == theirs[0][name].shape, name
        own_rounding = torch.finfo(results[name].dtype).eps * want.norm().item()
        off, allowed = distance(results[name], want), 2 * max(own_rounding, *(distance(t[name], want) for t in theirs))
        if not off <= allowed:
            failures.append(f"{name} of norm {want.norm():.2e} is off by {off:.2e}, allowed {allowed:.2e}")
    assert not failures, "; ".join(failures)


def distance(result: Tensor, wanted: Tensor) -> float:
    return (result.double() - wanted.double()).norm().item()


def check_parity(stock: nn.Module, ours: nn.Module, inputs: dict[str, Tensor], **options: Any) -> None:
    """Logits, loss and every gradient."""
    check(lambda model: solve(model, inputs), stock, ours, **options)


def check_logits(stock: nn.Module, ours: nn.Module, inputs: dict[str, Tensor], **options: Any) -> None:
    """Logits without gradients."""

    @torch.no_grad()
    def logits(model: nn.Module) -> dict[str, Tensor]:
        return {"logits": model(**inputs).logits}

    check(logits, stock, ours, **options)


def anatomy(model: nn.Module) -> list[Any]:
    """All that a patch could have changed, but for the norms that PEFT keeps."""
    return [
        (name, type(module), list(vars(module)), [(k, type(v)) for k, v in getattr(module, "lora_variant", {}).items()])
        for name, module in model.named_modules()
    ]


def parts(model: nn.Module) -> dict[str, Any]:
    """The modules of a toy's first adapted layer."""
    layer: Any = model.get_submodule("base_model.model.first")
    return {
        "base": layer.base_layer,
        "A": layer.lora_A["default"],
        "B": layer.lora_B["default"],
        "magnitude": layer.lora_magnitude_vector["default"],
        "dropout": layer.lora_dropout["default"],
        "layer": layer,
    }


def toy_input() -> Tensor:
    return torch.randn(4, 12, generator=torch.Generator().manual_seed(0))


def toy_solve(model: nn.Module) -> dict[str, Tensor]:
    """Output and every gradient of a toy, with the same dropout each time."""
    torch.manual_seed(0)
    model.zero_grad()
    x = toy_input().to(next(model.parameters()).dtype).requires_grad_()
    y = model(x)
    y.square().sum().backward()
    grads = {n.removeprefix("_orig_mod."): p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad, **grads}


def agree(stock: nn.Module, ours: nn.Module) -> None:
    """Two toys have the same results."""
    check(toy_solve, stock, ours)


@contextlib.contextmanager
def counted(monkeypatch: Any) -> Iterator[dict[str, int]]:
    """How often this package is reached inside: whole layers ("layer"), or their norm alone ("norm")."""
    counts = {"layer": 0, "norm": 0}

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for owner, name in ((linear, "run_layer"), (plan.Plan, "scale")):
            patch.setattr(owner, name, counting("layer", getattr(owner, name)))
        for module, name in ((peft_layer, "scale"), (linear, "run_compose"), (embedding, "run_compose")):
            patch.setattr(module, name, counting("norm", getattr(module, name)))
        yield counts
