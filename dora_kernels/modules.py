"""Layers that own their parameters: `DoRALinear` and `LoRALinear`, for models built without PEFT."""

from __future__ import annotations

import math
import numbers
import warnings
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dora_kernels import validation
from dora_kernels.functional import dora_weight_norm, layer_scale, merge_dora, run_layer
from dora_kernels.norm_cache import NormCache

if TYPE_CHECKING:
    from typing_extensions import Self


class LoRALinear(nn.Module):
    """``y = base_layer(x) + scaling * lora_B(lora_A(dropout(x)))``: a linear layer with a low-rank adapter.

    The base layer is frozen; lora_A starts as PEFT's (Kaiming uniform), lora_B at zero. Parameters are named as in a
    PEFT adapter file: ``base_layer.weight``, ``base_layer.bias``, ``lora_A.weight``, ``lora_B.weight``; names with an
    adapter's name in them (``lora_A.default.weight``) load as well.

    The layer runs as one function, so hooks on the modules inside it do not fire. It has no `weight` of its own: code
    that reads a linear layer's weight, as `nn.TransformerEncoderLayer` in evaluation does, would leave out the adapter.

    Args:
        in_features, out_features, bias: of the base layer.
        rank: at least 1.
        alpha: the low-rank product is scaled by ``alpha / rank``, or ``alpha / sqrt(rank)`` with `use_rslora`.
            None: scaling 1.
        dropout: probability, on the input of the low-rank branch only, in training.
        backend: as `dora_linear`.
        device, dtype: of the base layer.
        base_layer: an existing layer to adapt, instead of a new one (`from_linear`).
        adapter_dtype: of the adapter; None takes float32 under a 16-bit base layer, as PEFT does, else `dtype`.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of range.
    """

    base_layer: nn.Linear
    lora_A: nn.Linear
    lora_B: nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        rank: int,
        alpha: float | None = None,
        dropout: float = 0.0,
        use_rslora: bool = False,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
        base_layer: nn.Linear | None = None,
    ) -> None:
        super().__init__()
        _check_options(rank, alpha, dropout, backend)
        if base_layer is None:
            base_layer = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        weight = base_layer.weight
        if adapter_dtype is None:
            adapter_dtype = torch.float32 if weight.dtype in (torch.bfloat16, torch.float16) else weight.dtype
        divisor = math.sqrt(rank) if use_rslora else rank
        self.rank = rank
        self.alpha = float(divisor if alpha is None else alpha)
        self.use_rslora = use_rslora
        self.scaling = self.alpha / divisor
        validation.check_scaling(self.scaling)
        self.backend = backend
        self.base_layer = base_layer.requires_grad_(False)
        self.dropout = nn.Dropout(dropout)
        factory: dict[str, Any] = {"bias": False, "device": weight.device, "dtype": adapter_dtype}
        self.lora_A = nn.utils.skip_init(nn.Linear, base_layer.in_features, rank, **factory)
        self.lora_B = nn.utils.skip_init(nn.Linear, rank, base_layer.out_features, **factory)
        self._unmerged: Tensor | None = None
        self._register_state_dict_hook(_save_unmerged)
        self._reset_factors()

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, rank: int, **options: Any) -> Self:
        """Adapt an existing `nn.Linear`, which becomes the base layer (shared, not copied) and is frozen.

        `options` are the class's own: alpha, dropout, use_rslora, backend, adapter_dtype, and for `DoRALinear`
        magnitude_axis and detach_norm.
        """
        if type(linear) is not nn.Linear:
            kind = type(linear).__name__
            raise TypeError(f"linear: expected a torch.nn.Linear itself, whose forward is known, got {kind}")
        has_bias = linear.bias is not None
        layer = cls(linear.in_features, linear.out_features, has_bias, rank=rank, base_layer=linear, **options)
        return layer.train(linear.training)

    def _reset_factors(self) -> None:
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    def reset_adapter(self) -> None:
        """Set the adapter to its start, at which the layer equals its base layer."""
        self._reset_factors()

    @property
    def in_features(self) -> int:
        return self.base_layer.in_features

    @property
    def out_features(self) -> int:
        return self.base_layer.out_features

    @property
    def merged(self) -> bool:
        """Whether the base layer's weight holds the adapter at present."""
        return self._unmerged is not None

    def _merged_weight(self) -> Tensor:
        weight, lora_A, lora_B = self.base_layer.weight, self.lora_A.weight, self.lora_B.weight
        return merge_dora(weight, lora_A, lora_B, None, scaling=self.scaling, backend=self.backend)

    @torch.no_grad()
    def merge(self) -> None:
        """Write the adapted weight into the base layer, keeping the original on the CPU for `unmerge`."""
        if self.merged:
            warnings.warn("the layer is merged already: nothing to do", stacklevel=3)  # past no_grad
            return
        merged = self._merged_weight()
        self._unmerged = self.base_layer.weight.detach().to("cpu", copy=True)
        self.base_layer.weight.copy_(merged)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the base layer's original weight back, bit for bit."""
        if self._unmerged is None:
            warnings.warn("the layer is not merged: nothing to do", stacklevel=3)
            return
        self.base_layer.weight.copy_(self._unmerged)
        self._unmerged = None

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``.

        Raises:
            TypeError, ValueError: x is not a floating-point tensor of that shape.
        """
        validation.check_features(x, self.in_features)
        if self.merged:
            return self.base_layer(x)
        if self.training and self.dropout.p > 0.0:
            low = self.lora_B(self.lora_A(self.dropout(x).to(self.lora_A.weight.dtype)))
            base = self._base(x)
            y = base + self.scaling * low
            return (y if self.base_layer.bias is None else y + self.base_layer.bias).to(base.dtype)
        return run_layer(
            x, self.base_layer.weight, self.lora_A.weight, self.lora_B.weight, None, self.base_layer.bias,
            self.scaling, "out", True, None, self.backend,
        )  # fmt: skip

    def _base(self, x: Tensor) -> Tensor:
        """The base product without the bias, in x's dtype (or autocast's) whatever the weight's."""
        return F.linear(x, self.base_layer.weight.to(x.dtype))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if self.merged:
            raise RuntimeError("the layer is merged: call unmerge() before loading a state dict into it")
        for name in ("lora_A", "lora_B", "lora_magnitude_vector"):
            target = f"{prefix}{name}" if name == "lora_magnitude_vector" else f"{prefix}{name}.weight"
            named = [key for key in state_dict if key.startswith(f"{prefix}{name}.") and key.endswith(".weight")]
            if target not in state_dict and len(named) == 1:
                state_dict[target] = state_dict.pop(named[0])
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        text = f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
        text += f"scaling={self.scaling:g}"
        if self.use_rslora:
            text += ", use_rslora=True"
        if self.backend != "auto":
            text += f", backend={self.backend!r}"
        return text + (", merged" if self.merged else "")


class DoRALinear(LoRALinear):
    """A linear layer with a weight-decomposed low-rank adapter: ``y = x @ (g * V).T + bias``, as `dora_linear`.

    As `LoRALinear`, with a magnitude, ``lora_magnitude_vector`` (also under the name `magnitude`), that starts as the
    norm of ``V = weight + scaling * lora_B @ lora_A``, exact to float32, so that a new layer equals its base layer.
    Dropout is applied to the low-rank branch only, ``g * (W x + scaling * B A dropout(x)) + bias`` (torchtune's form;
    PEFT's also drops part of the base product).

    The norm is kept between calls while nothing it depends on changes; `dora_kernels.invalidate(layer)` after
    writing weights in a way that PyTorch cannot see.

    Args:
        magnitude_axis: "out", a magnitude per output feature, or "in", per input feature.
        detach_norm: no gradient through the norm (section 4.3 of the DoRA paper; PEFT).
    """

    lora_magnitude_vector: nn.Parameter

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        rank: int,
        magnitude_axis: str = "out",
        detach_norm: bool = True,
        **options: Any,
    ) -> None:
        validation.check_axis(magnitude_axis)
        super().__init__(in_features, out_features, bias, rank=rank, **options)
        self.magnitude_axis = magnitude_axis
        self.detach_norm = bool(detach_norm)
        self._norm_cache = NormCache()
        length = self.out_features if magnitude_axis == "out" else self.in_features
        self.lora_magnitude_vector = nn.Parameter(self.lora_A.weight.new_empty(length))
        self._reset_magnitude()

    def reset_adapter(self) -> None:
        """Set the adapter to its start, at which the layer equals its base layer."""
        super().reset_adapter()
        self._reset_magnitude()

    @torch.no_grad()
    def _reset_magnitude(self) -> None:
        if self.lora_magnitude_vector.is_meta:
            return
        self.lora_magnitude_vector.copy_(
            dora_weight_norm(
                self.base_layer.weight, self.lora_A.weight, self.lora_B.weight,
                scaling=self.scaling, magnitude_axis=self.magnitude_axis, backend=self.backend,
            )
        )  # fmt: skip

    @property
    def magnitude(self) -> nn.Parameter:
        """The magnitude, ``[out_features]`` or ``[in_features]``."""
        return self.lora_magnitude_vector

    def _merged_weight(self) -> Tensor:
        return merge_dora(
            self.base_layer.weight, self.lora_A.weight, self.lora_B.weight, self.magnitude,
            scaling=self.scaling, magnitude_axis=self.magnitude_axis, backend=self.backend,
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``.

        Raises:
            TypeError, ValueError: x is not a floating-point tensor of that shape.
        """
        validation.check_features(x, self.in_features)
        if self.merged:
            return self.base_layer(x)
        if self.training and self.dropout.p > 0.0:
            return self._forward_with_dropout(x)
        return run_layer(
            x, self.base_layer.weight, self.lora_A.weight, self.lora_B.weight, self.magnitude, self.base_layer.bias,
            self.scaling, self.magnitude_axis, self.detach_norm, None, self.backend, self._norm_cache, self.training,
        )  # fmt: skip

    def _forward_with_dropout(self, x: Tensor) -> Tensor:
        weight, lora_A, lora_B = self.base_layer.weight, self.lora_A.weight, self.lora_B.weight
        g = layer_scale(
            weight, lora_A, lora_B, self.magnitude,
            self.scaling, self.magnitude_axis, self.detach_norm, self.backend, self._norm_cache, self.training,
        )  # fmt: skip
        dropped = self.dropout(x)
        if self.magnitude_axis == "in":
            x, dropped = (x * g).to(x.dtype), (dropped * g).to(x.dtype)
        base = self._base(x)
        low = self.lora_B(self.lora_A(dropped.to(lora_A.dtype)))
        y = base + self.scaling * low
        if self.magnitude_axis == "out":
            y = y * g
        if self.base_layer.bias is not None:
            y = y + self.base_layer.bias
        return y.to(base.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, magnitude_axis={self.magnitude_axis!r}, detach_norm={self.detach_norm}"


def _save_unmerged(layer: LoRALinear, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """A state dict holds the base weight without the adapter, which it holds as well."""
    key = f"{prefix}base_layer.weight"
    if layer._unmerged is not None and key in state_dict:
        state_dict[key] = layer._unmerged


def _check_options(rank: Any, alpha: Any, dropout: Any, backend: Any) -> None:
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise TypeError(f"rank: expected an int, got {type(rank).__name__}")
    if rank < 1:
        raise ValueError(f"rank: expected at least 1, got {rank}")
    if alpha is not None and (isinstance(alpha, bool) or not isinstance(alpha, numbers.Real)):
        raise TypeError(f"alpha: expected a number, got {type(alpha).__name__}")
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)):
        raise TypeError(f"dropout: expected a probability in [0, 1), got {type(dropout).__name__}")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout: expected a probability in [0, 1), got {dropout}")
    validation.check_backend(backend)
