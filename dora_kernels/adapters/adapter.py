"""An adapter independent of any file: factors, magnitude, scaling and axis of each layer."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from dora_kernels.core import validation

KINDS = ("linear", "embedding", "conv1d", "conv2d", "conv3d", "experts")

SMALL_EPS = 1e-6
"""Largest eps that may be dropped: it changes the layer by at most eps / norm, as little as float32's rounding."""

UNDECIDED = "undecided"
"""The axis of a magnitude that is not known yet, while a file is read."""


@dataclass(frozen=True)
class AdapterLayer:
    """One layer's adapter: ``g * (W + scaling * lora_B @ lora_A)`` with ``g = magnitude / (norm + eps)``.

    Attributes:
        kind: "linear", "embedding", "conv1d", "conv2d" or "conv3d"; "experts" for a stack of linear layers, whose name
            is the parameter's ("model.layers.0.mlp.experts.down_proj").
        lora_A: as PEFT stores it. Linear ``[r, in]``; convolution ``[r, in, *kernel]``; embedding
            ``[r, num_embeddings]``. Experts ``[E, r, in]``.
        lora_B: as PEFT stores it. Linear ``[out, r]``; convolution ``[out, r / groups, 1, ...]``; embedding
            ``[embedding_dim, r]``. Experts ``[E, out, r]``.
        magnitude: ``[out]`` or ``[in]`` by the axis, always one-dimensional, but of experts ``[E, out]``; None for
            plain LoRA.
        scaling: what the low-rank product is multiplied by.
        magnitude_axis: "out" or "in"; of an embedding "out" is the embedding dimension and "in" the vocabulary.
        eps: added to the norm.

    Raises:
        TypeError: a field has a wrong type, or a tensor is not dense, or not float16, bfloat16, float32 or float64.
            Shapes and ranks are checked where the layer is used.
        ValueError: `kind` or `magnitude_axis` has another value, or a number is beyond the range of float64.
    """

    kind: str
    lora_A: Tensor
    lora_B: Tensor
    magnitude: Tensor | None
    scaling: float
    magnitude_axis: str = "out"
    eps: float = 0.0

    def __post_init__(self) -> None:
        for name in ("lora_A", "lora_B", "magnitude"):
            if name != "magnitude" or self.magnitude is not None:
                validation.check_dense(getattr(self, name), name)
        for name, known in (("kind", KINDS), ("magnitude_axis", (*validation.AXES, UNDECIDED))):
            value = getattr(self, name)
            if not isinstance(value, str):
                raise TypeError(f"{name}: expected a str, got {type(value).__name__}")
            if value not in known:
                raise ValueError(f"{name}: expected one of {', '.join(map(repr, known[: len(KINDS)]))}, got {value!r}")
        validation.check_real(self.scaling, "scaling")
        validation.check_real(self.eps, "eps")

    @property
    def rank(self) -> int:
        """Of the factors."""
        return self.lora_A.shape[1 if self.kind == "experts" else 0]

    @property
    def features(self) -> tuple[int, int]:
        """Input and output size: features, channels, or vocabulary and embedding dimension."""
        if self.kind == "experts":
            return self.lora_A.shape[2], self.lora_B.shape[1]
        return self.lora_A.shape[1], self.lora_B.shape[0]

    @property
    def kernel(self) -> tuple[int, ...]:
        """A convolution's kernel size; empty for other kinds."""
        return () if self.kind == "experts" else tuple(self.lora_A.shape[2:])

    @property
    def grouped(self) -> bool:
        """True for a convolution with groups: B has only one group's share of the rank."""
        return self.lora_B.dim() > 2 and self.kind != "experts" and self.lora_B.shape[1] != self.rank


@dataclass
class Adapter:
    """An adapter of a whole model, from a file of any format or from a model.

    Attributes:
        layers: the layers' adapters, by the base model's module names ("model.layers.0.self_attn.q_proj").
        format: the format of the file that it was read from, or "model".
        notes: what was decided about it and why, a sentence each.
        config: the rest of the file's configuration.
        beside: tensors of the file that belong to no adapted layer, by key: PEFT's `modules_to_save`, biases, rows of
            `trainable_token_indices`. `save_adapter` writes them again, in the same format; `attach` leaves them out
            with a warning; `AdapterBank` refuses them.

    Raises:
        TypeError: a field has a wrong type.
    """

    layers: dict[str, AdapterLayer]
    format: str = "model"
    notes: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    beside: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, kind in (("layers", dict), ("format", str), ("notes", list), ("config", dict), ("beside", dict)):
            value = getattr(self, name)
            if not isinstance(value, kind):
                raise TypeError(f"{name}: expected a {kind.__name__}, got {type(value).__name__}")
        for key, layer in self.layers.items():
            if not isinstance(key, str) or not isinstance(layer, AdapterLayer):
                got = f"{type(key).__name__} and {type(layer).__name__}"
                raise TypeError(f"layers: expected names (str) and layers (AdapterLayer), got {got}")

    def __repr__(self) -> str:
        """A short description; the tensors are in `layers`."""
        ranks = sorted({layer.rank for layer in self.layers.values()})
        kinds = sorted({f"DoRA along {layer.magnitude_axis!r}" if layer.magnitude is not None else "plain LoRA"
                        for layer in self.layers.values()})  # fmt: skip
        text = f"{len(self.layers)} layers"
        if ranks:
            text += f", rank {ranks[0]}" + (f" to {ranks[-1]}" if len(ranks) > 1 else "")
        return f"<Adapter of {', '.join([text, *kinds])}, format {self.format!r}>"


def eps_note(eps: float, change: float) -> str:
    """What to say of an eps that was replaced."""
    return f"eps became {eps:.2g}: layers change by at most {change:.2g} / norm, float32's rounding"


def article(kind: str) -> str:
    """A kind with its article, e.g. "an embedding"."""
    if kind == "experts":
        return "a stack of experts"
    return f"an {kind}" if kind == "embedding" else f"a {kind}"


def problem_of(layer: AdapterLayer) -> str | None:
    """Return what is wrong with a layer's shapes and numbers, or None. The tensors' values are not checked."""
    a, b, m = layer.lora_A, layer.lora_B, layer.magnitude
    if layer.kind == "experts":
        return _problem_of_experts(layer)
    dims = {"linear": 2, "embedding": 2, "conv1d": 3, "conv2d": 4, "conv3d": 5}.get(layer.kind)
    if a.dim() != dims or not a.numel():
        return f"lora_A {list(a.shape)} is not the shape of {article(layer.kind)}"
    grouped = b.dim() > 2 and a.shape[0] % max(1, *b.shape[1:2]) == 0
    if b.dim() != dims or not b.numel() or not (b.shape[1] == a.shape[0] or grouped) or set(b.shape[2:]) - {1}:
        return f"lora_B {list(b.shape)} does not fit lora_A {list(a.shape)}"
    length = layer.features[layer.magnitude_axis == "out"]
    if m is not None and m.shape != (length,):
        return f"magnitude {list(m.shape)}: expected [{length}] for axis {layer.magnitude_axis!r}"
    return _problem_of_numbers(layer)


def _problem_of_experts(layer: AdapterLayer) -> str | None:
    a, b, m = layer.lora_A, layer.lora_B, layer.magnitude
    if a.dim() != 3 or not a.numel():
        return f"lora_A {list(a.shape)}: expected [experts, rank, inputs]"
    if b.dim() != 3 or not b.numel() or b.shape[0] != a.shape[0] or b.shape[2] != a.shape[1]:
        return f"lora_B {list(b.shape)} does not fit lora_A {list(a.shape)}"
    if layer.magnitude_axis != "out" or layer.eps:
        return "its magnitudes are along the inputs, or have an eps, which experts do not have"
    if m is not None and m.shape != b.shape[:2]:
        return f"magnitude {list(m.shape)}: expected {list(b.shape[:2])}"
    return _problem_of_numbers(layer)


def _problem_of_numbers(layer: AdapterLayer) -> str | None:
    if not math.isfinite(layer.scaling):
        return f"scaling {layer.scaling:g}: expected a finite number"
    if not 0.0 <= layer.eps < math.inf:
        return f"eps {layer.eps:g}: expected a finite number of at least 0"
    return None
