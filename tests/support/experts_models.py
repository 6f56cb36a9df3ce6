"""Mixtures of experts for the tests: every class of transformers that has stacks, and small whole models."""

from __future__ import annotations

import ast
import contextlib
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", minversion="5", reason="before transformers 5 no model has stacks")
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3MoeConfig  # noqa: E402

COUNT, HIDDEN, INNER = 5, 8, 6
IDS = torch.arange(18).view(2, 9) * 7 % 64
"""Tokens for `qwen3_moe`."""
IMPLEMENTATIONS = "eager", "batched_mm", "grouped_mm"


class ExpertsClass(NamedTuple):
    """A class of transformers with stacks of experts."""

    module: str
    name: str
    chooses: bool
    """True if it chooses between `IMPLEMENTATIONS`; else it has a loop of its own."""


def experts_classes() -> list[ExpertsClass]:
    """Every class with a stack of experts, from the sources: importing them all takes long.

    A stack is a parameter of three dimensions, of which the first is a number of experts.
    """
    found = []
    for path in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        source = path.read_text()
        if "expert" not in source:
            continue
        module = f"transformers.models.{path.parent.name}.{path.stem}"
        for cls in (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)):
            chooses = any("use_experts_implementation" in ast.unparse(each) for each in cls.decorator_list)
            if chooses or any(map(_makes_stack, ast.walk(cls))):
                found.append(ExpertsClass(module, cls.name, chooses))
    return found


def _makes_stack(node: ast.AST) -> bool:
    """True for ``nn.Parameter(torch.empty(num_experts, ..., ...))``, with sizes one by one or as a tuple."""
    if not (isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Parameter") and node.args):
        return False
    made = node.args[0]
    sizes = made.args if isinstance(made, ast.Call) else []
    if len(sizes) == 1 and isinstance(sizes[0], ast.Tuple | ast.List):
        sizes = sizes[0].elts
    return len(sizes) == 3 and "expert" in ast.unparse(sizes[0])


class AnyConfig:
    """Answers every class's questions about its sizes."""

    _experts_implementation = "eager"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "num_experts_per_tok" or "shared" in name:
            return 2
        answers = {
            "zero": 1, "expert": COUNT, "act": "silu", "cap": 7.0, "limit": 7.0, "beta": 1.5, "alpha": 1.702,
            "eps": 1e-6, "latent": None, "intermediate": INNER, "ffn_hidden": INNER, "size": HIDDEN, "dim": HIDDEN,
        }  # fmt: skip
        if "hidden_size" in name or "hidden_dim" in name:
            return HIDDEN
        if "intermediate" in name or "ffn_hidden" in name:
            return INNER
        return next((answer for part, answer in answers.items() if part in name), 1)


class Mixture(nn.Module):
    """A model that is nothing but its experts, with fixed inputs."""

    def __init__(self, experts: nn.Module, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.experts = experts.to(dtype)
        torch.manual_seed(1)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5)
        name, tokens = type(experts).__name__, 7
        if name == "Llama4TextExperts":
            self.inputs: tuple[Any, ...] = (torch.randn(3 * COUNT, HIDDEN, dtype=dtype),)
        elif name == "JetMoeParallelExperts":
            self.inputs = (torch.randn(9, HIDDEN, dtype=dtype), [2, 0, 3, 4, 0])
        elif name == "InklingSharedExperts":
            self.inputs = (torch.randn(tokens, HIDDEN, dtype=dtype), torch.rand(tokens, 2, dtype=dtype))
        else:  # the last expert has no tokens
            chosen = torch.stack([torch.randperm(COUNT - 1)[:2] for _ in range(tokens)])
            self.inputs = (torch.randn(tokens, HIDDEN, dtype=dtype), chosen, torch.rand(tokens, 2, dtype=dtype))

    def forward(self) -> Tensor:
        result: Tensor = self.experts(*self.inputs)
        return result


def experts(module: str, name: str, implementation: str = "eager") -> nn.Module:
    cls, config = getattr(importlib.import_module(module), name), AnyConfig()
    config._experts_implementation = implementation
    made: nn.Module = cls(COUNT, HIDDEN, INNER) if name == "JetMoeParallelExperts" else cls(config)
    return made


def stacks(module: nn.Module) -> list[str]:
    return [name for name, parameter in module.named_parameters() if parameter.dim() == 3]


class Dense(NamedTuple):
    """The oracle of one adapter: leaves in the adapter's stored shapes, and the weights that they make."""

    lora_A: Tensor
    lora_B: Tensor
    magnitude: Tensor | None
    formed: Tensor


def dense(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor | None, scaling: float, transposed: bool = False
) -> Dense:
    """DoRA's dense formula on a stack as it is stored, in float64, with PEFT's 0.19 layout of the factors."""
    a, b = (t.detach().double().requires_grad_() for t in (lora_A, lora_B))
    m = None if magnitude is None else magnitude.detach().double().requires_grad_()
    count = weight.shape[0]
    delta = b.view(b.shape[0], -1, count).permute(2, 0, 1) @ a.view(count, -1, a.shape[1])
    if delta.shape != weight.shape or (transposed and a.shape[1] == weight.shape[1] != weight.shape[2]):
        delta = delta.transpose(1, 2)
    v = weight.double() + scaling * delta
    if m is not None:
        along = 1 if transposed else 2
        v = (m / torch.linalg.vector_norm(v, dim=along).detach()).unsqueeze(along) * v
    return Dense(a, b, m, v)


@contextlib.contextmanager
def with_weights(module: nn.Module, weights: dict[str, Tensor]) -> Iterator[None]:
    """Let tensors with a history stand in the place of parameters."""
    module.__dict__.update(weights)
    try:
        yield
    finally:
        for name in weights:
            del module.__dict__[name]


def qwen3_moe(implementation: str = "grouped_mm", dtype: torch.dtype = torch.float32, **sizes: int) -> Any:
    torch.manual_seed(0)
    defaults = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 24,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_experts": 6,
        "num_experts_per_tok": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    model = AutoModelForCausalLM.from_config(Qwen3MoeConfig(**defaults | sizes), dtype=dtype)
    model.set_experts_implementation(implementation)
    return model


def moved(model: nn.Module) -> nn.Module:
    """The model with adapters as in the middle of training."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter += 0.1 * torch.randn_like(parameter)
    return model


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """Of `IDS`."""
    result: Tensor = model(IDS).logits
    return result


_ROUTED = {"n_routed_experts": 6, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
_SIZES: dict[str, dict[str, Any]] = {
    "deepseek_v3": _ROUTED | {
        "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
        "v_head_dim": 8,
    },
    "glm4_moe": _ROUTED | {"head_dim": 8},
    "qwen3_moe": {"num_experts": 6, "head_dim": 8, "mlp_only_layers": [0]},
    "mixtral": {"num_local_experts": 6},
    "qwen2_moe": {"num_experts": 6, "shared_expert_intermediate_size": 24},
}  # fmt: skip
MIXTURES = tuple(_SIZES)


def mixture(kind: str) -> Any:
    """A small model of two layers: the first dense, where the kind has such, the second with experts, some shared."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 24,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2,
        "max_position_embeddings": 64, "pad_token_id": 0,
    }  # fmt: skip
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes | _SIZES[kind])).eval()
