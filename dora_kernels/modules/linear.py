"""Linear layers with an adapter: `LoRALinear` and `DoRALinear`, on `nn.Linear` and GPT-2's `Conv1D`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dora_kernels.core import validation
from dora_kernels.core.problem import Form
from dora_kernels.engine.layer import layer_scale, run_layer
from dora_kernels.engine.merged import check_forward, check_merged_dtype
from dora_kernels.modules.base import AdaptedLayer
from dora_kernels.modules.dora_layer import DoRALayer

if TYPE_CHECKING:
    from typing_extensions import Self


def is_conv1d(module: Any) -> bool:
    """True for GPT-2's `Conv1D`. It is found by name, so transformers need not be installed."""
    return _is_conv1d_class(type(module))


def _is_conv1d_class(cls: type) -> bool:
    return cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils"


class LoRALinear(AdaptedLayer):
    """``y = base_layer(x) + scaling * lora_B(lora_A(dropout(x)))``: a linear layer with a low-rank adapter.

    The base layer is frozen. lora_A starts as in PEFT (Kaiming uniform), lora_B with zeros. Parameters are named as in
    a PEFT adapter file: ``base_layer.weight``, ``base_layer.bias``, ``lora_A.weight``, ``lora_B.weight``. Names with an
    adapter's name in them (``lora_A.default.weight``) can be loaded too.

    The layer runs as one function, so hooks on the modules inside it do not run. Its `weight` is the base layer's: code
    that multiplies by it, as `nn.TransformerEncoderLayer` does in evaluation, leaves out the adapter.

    Args:
        in_features: of a new base layer.
        out_features: of a new base layer.
        bias: True if a new base layer has a bias.
        rank: of the factors, at least 1.
        device: of a new base layer.
        dtype: of a new base layer.
        base_layer: an existing `nn.Linear` or GPT-2's `Conv1D` to adapt, instead of a new one (`from_linear`). Of a
            subclass the weight is adapted, and what its forward does beside is left out.

    Keyword Args:
        alpha (float | None): the low-rank product is scaled by ``alpha / rank``, or ``alpha / sqrt(rank)`` with
            `use_rslora`. None: scaling 1.
        dropout (float): probability, on the input of the low-rank branch only, in training.
        use_rslora (bool): divide alpha by the root of the rank instead of the rank.
        backend (str): as `dora_linear`.
        adapter_dtype (torch.dtype | None): of the adapter; None takes float32 for a 16-bit base layer, as PEFT does,
            else the base layer's dtype.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range, or a weight of `base_layer` is not finite.
    """

    kind = nn.Linear
    lora_A: Any
    lora_B: Any

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        rank: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        base_layer: nn.Module | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if base_layer is None:
            base_layer = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        factory = self._set_up(base_layer, rank=rank, **options)
        self._transposed = not isinstance(base_layer, nn.Linear)
        out_features, in_features = self._weight().shape
        self.lora_A = nn.utils.skip_init(nn.Linear, in_features, self.rank, bias=False, **factory)
        self.lora_B = nn.utils.skip_init(nn.Linear, self.rank, out_features, bias=False, **factory)
        self._start()

    def _check_base(self, base_layer: Any, rank: int) -> None:
        if isinstance(base_layer, nn.Linear) or any(map(_is_conv1d_class, type(base_layer).__mro__)):
            return
        kind = type(base_layer).__name__
        raise TypeError(f"base_layer: expected a torch.nn.Linear or GPT-2's Conv1D, got {kind}")

    @classmethod
    def from_base(cls, base: nn.Module, *, rank: int, **options: Any) -> Self:
        """Adapt an `nn.Linear` or GPT-2's `Conv1D`, which becomes the base layer (shared, not copied) and is frozen.

        Args:
            base: the layer.
            rank: of the factors, at least 1.
            **options: keyword arguments of the class.

        Raises:
            TypeError: `base` is neither, or a subclass, whose forward is not known.
        """
        if type(base) is not nn.Linear and not is_conv1d(base):
            kind = type(base).__name__
            raise TypeError(
                f"base: expected exactly a torch.nn.Linear, not a subclass, whose forward is unknown; got {kind}"
            )
        return cls(0, 0, rank=rank, base_layer=base, **options).train(base.training)  # base_layer has its own sizes

    @classmethod
    def from_linear(cls, linear: nn.Module, *, rank: int, **options: Any) -> Self:
        """Adapt a layer, as `from_base` does.

        Args:
            linear: the layer.
            rank: of the factors, at least 1.
            **options: keyword arguments of the class.
        """
        return cls.from_base(linear, rank=rank, **options)

    def _reset_factors(self) -> None:
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    @property
    def in_features(self) -> int:
        return self.lora_A.in_features

    @property
    def out_features(self) -> int:
        return self.lora_B.out_features

    @property
    def factors(self) -> tuple[nn.Parameter, nn.Parameter]:
        """A ``[rank, in_features]`` and B ``[out_features, rank]``."""
        return self.lora_A.weight, self.lora_B.weight

    def _weight(self) -> Tensor:
        """The weight as ``[out_features, in_features]``. Conv1D stores it transposed."""
        weight: Tensor = self.base_layer.weight
        return weight.t() if self._transposed else weight

    def _problem(self) -> tuple[Tensor, Tensor, Tensor]:
        return self._weight(), self.lora_A.weight, self.lora_B.weight

    def _write(self, merged: Tensor) -> None:
        self._weight().copy_(merged)

    def _check_input(self, x: Tensor) -> None:
        validation.check_features(x, self.in_features)

    def _adapted(self, x: Tensor) -> Tensor:
        """Maps ``[..., in_features]`` to ``[..., out_features]``."""
        if self._drops:
            return self._sum(x, self.dropout(x))
        return run_layer(x, self._weights(), Form(self.scaling), backend=self.backend)

    def _base(self, x: Tensor) -> Tensor:
        """The base layer's output in x's dtype. x is cast if the base layer accepts only its own dtype."""
        if x.dtype == self.base_layer.weight.dtype:
            return super()._base(x)
        bias = self.base_layer.bias
        return F.linear(x, self._weight().to(x.dtype), None if bias is None else bias.to(x.dtype))

    def _sum(self, x: Tensor, dropped: Tensor, g: Tensor | None = None) -> Tensor:
        """``g * (W x + scaling * B A dropped) + bias``, in the base product's dtype: x's, or autocast's."""
        base = F.linear(x, self._weight().to(x.dtype))
        _, lora_A, lora_B = self._problem()
        dtype = torch.promote_types(dropped.dtype, lora_A.dtype)
        h = F.linear(dropped.to(dtype), lora_A.to(dtype))
        y = base + self.scaling * F.linear(h, lora_B.to(h.dtype))
        if g is not None:
            y = y * g
        bias = self.base_layer.bias
        return (y if bias is None else y + bias).to(base.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {super().extra_repr()}"


class DoRALinear(DoRALayer, LoRALinear):
    """A linear layer with a weight-decomposed low-rank adapter: ``y = x @ (g * V).T + bias``, as `dora_linear`.

    It is a `LoRALinear` with a magnitude, ``lora_magnitude_vector`` (also `magnitude`). The magnitude starts as the
    norm of ``V = weight + scaling * lora_B @ lora_A``, exact to float32, so a new layer equals its base layer. Dropout
    is applied to the low-rank branch only, ``g * (W x + scaling * B A dropout(x)) + bias`` (torchtune's form; PEFT's
    also drops part of the base product).

    The arguments are those of `LoRALinear` and the following.

    Keyword Args:
        magnitude_axis (str): "out", a magnitude per output feature, or "in", per input feature.
        detach_norm (bool): no gradient through the norm (section 4.3 of the DoRA paper; PEFT).
        eps (float): added to the norm.
        forward (str): "composed", or "merged": ``g * V`` is written once per optimizer step, and a call is one product
            with it (docs/merged.md).
    """

    def _set_up(self, base_layer: Any, *, forward: str = "composed", **options: Any) -> dict[str, Any]:
        check_forward(forward)
        if forward == "merged":
            check_merged_dtype(getattr(getattr(base_layer, "weight", None), "dtype", None), "base_layer.weight")
        factory = super()._set_up(base_layer, **options)
        self._norm_cache.merges = forward == "merged"
        return factory

    def extra_repr(self) -> str:
        return super().extra_repr() + (", forward='merged'" if self._norm_cache.merges else "")

    def _adapted(self, x: Tensor) -> Tensor:
        """Maps ``[..., in_features]`` to ``[..., out_features]``."""
        if not self._drops:
            return run_layer(x, self._weights(), self._form, self._norm_cache, self.training, self.backend)
        g = layer_scale(self._weights(), self._form, self._norm_cache, self.training, self.backend)
        dropped = self.dropout(x)
        if self.magnitude_axis == "out":
            return self._sum(x, dropped, g)
        return self._sum((x * g).to(x.dtype), dropped * g)
