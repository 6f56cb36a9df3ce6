"""`DoRAConv1d`, `DoRAConv2d` and `DoRAConv3d`: convolutions with a weight-decomposed low-rank adapter."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dora_kernels.core import convolution
from dora_kernels.core.problem import Weights
from dora_kernels.engine.layer import layer_norm, layer_scale
from dora_kernels.engine.model_norms import KeptNorm
from dora_kernels.functional import dora_weight_norm
from dora_kernels.modules.base import showing
from dora_kernels.modules.dora_layer import DoRALayer

KEPT_BY = "use extract and attach, or safetensors.torch.save_file(dora_state_dict(model), ...)"
CANNOT_BE_MERGED = f"an adapter of a convolution with groups can be neither merged nor saved to a file; {KEPT_BY}"


@showing("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
class _DoRAConv(DoRALayer):
    """``y = conv(x, g * V) + bias``, ``V = weight + scaling * lora_B @ lora_A``, ``g = magnitude / (||V|| + eps)``.

    lora_A is a convolution from all input channels to `rank`, with the base layer's stride, padding, dilation and
    padding mode. lora_B is one of kernel size 1. Their shapes are PEFT's, ``[rank, in_channels, *kernel]`` and
    ``[out_channels, rank / groups, 1, ...]``. (PEFT's A has no dilation, and pads with zeros whatever the mode.) The
    norm is the exact one of what the layer computes, with groups too, unlike PEFT's. No grouped weight can hold such an
    adapter, so a layer with groups can be neither merged nor saved to a file, and a warning says so. Dropout is applied
    to the low-rank branch only.

    Args:
        *base_args: positional arguments of a new `torch.nn` convolution.
        rank: of the factors, at least 1, and a multiple of the groups.
        base_layer: an existing convolution to adapt, instead of a new one (`from_base`).
        **options: the following, and keyword arguments of a new `torch.nn` convolution.

    Keyword Args:
        alpha (float | None): as `LoRALinear`.
        dropout (float): as `LoRALinear`.
        use_rslora (bool): as `LoRALinear`.
        backend (str): as `dora_linear`.
        adapter_dtype (torch.dtype | None): as `LoRALinear`.
        magnitude_axis (str): "out", a magnitude per output channel, the norm over input channels and kernel (PEFT), or
            "in", per input channel, the norm over output channels and kernel.
        detach_norm (bool): no gradient through the norm.
        eps (float): added to the norm.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range.
    """

    lora_A: Any
    lora_B: Any

    def __init__(self, *base_args: Any, rank: int, base_layer: nn.Module | None = None, **options: Any) -> None:
        super().__init__()
        base_layer, options = self._base_and_options(base_layer, base_args, options)
        factory = self._set_up(base_layer, rank=rank, **options)
        base = self.base_layer
        self.lora_A = nn.utils.skip_init(
            self.kind, base.in_channels, self.rank, base.kernel_size, base.stride, base.padding, base.dilation,
            padding_mode=base.padding_mode, bias=False, **factory,
        )  # fmt: skip
        factory_b = {**factory, "groups": base.groups, "bias": False}
        self.lora_B = nn.utils.skip_init(self.kind, self.rank, base.out_channels, 1, **factory_b)
        self._start()
        if self._cannot_be_merged:
            warnings.warn(f"groups: {CANNOT_BE_MERGED}", stacklevel=2)

    def _check_base(self, base_layer: Any, rank: int) -> None:
        super()._check_base(base_layer, rank)
        if rank % base_layer.groups:
            raise ValueError(f"rank: expected a multiple of the {base_layer.groups} groups, got {rank}")

    def _reset_factors(self) -> None:
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    @property
    def factors(self) -> tuple[nn.Parameter, nn.Parameter]:
        """A ``[rank, in_channels, *kernel]`` and B ``[out_channels, rank / groups, 1, ...]``."""
        return self.lora_A.weight, self.lora_B.weight

    @property
    def magnitude(self) -> Tensor:
        """The magnitude as a vector, a view of the parameter ``[1, channels, 1, ...]``."""
        return self.lora_magnitude_vector.view(-1)

    def _magnitude_shape(self) -> tuple[int, ...]:
        base = self.base_layer
        channels = base.out_channels if self.magnitude_axis == "out" else base.in_channels
        return (1, channels, *(1 for _ in base.kernel_size))

    def _low_rank(self, x: Tensor) -> Tensor:
        """``lora_B(lora_A(x))``, unscaled, in the wider of x's and the adapter's dtype."""
        lora_A, lora_B = self.lora_A, self.lora_B
        dtype = torch.promote_types(x.dtype, lora_A.weight.dtype)
        h = lora_A._conv_forward(x.to(dtype), lora_A.weight.to(dtype), None)
        low: Tensor = lora_B._conv_forward(h, lora_B.weight.to(h.dtype), None)
        return low

    @property
    def _channels_last(self) -> bool:
        return self.base_layer.groups == 1 and not self.base_layer.weight.is_contiguous()

    def _problem(self) -> tuple[Tensor, Tensor, Tensor]:
        last = self._channels_last
        weight, lora_A = self.base_layer.weight, self.lora_A.weight
        return convolution.rows(weight, last), convolution.rows(lora_A, last), self.lora_B.weight.flatten(1)

    def _write(self, merged: Tensor) -> None:
        weight = self.base_layer.weight
        weight.copy_(convolution.from_rows(merged, weight.shape, self._channels_last))

    def _weight_norm(self) -> Tensor:
        """The norm per channel. Differentiable if gradients are enabled and the norm is not detached."""
        weights, groups, axis = Weights(*self._problem()), self.base_layer.groups, self.magnitude_axis
        if groups > 1:
            norm = convolution.exact_grouped_norm(*weights[:3], self.scaling, groups, axis)
        else:
            form = self._form._replace(detach_norm=not torch.is_grad_enabled(), eps=0.0)
            norm = layer_norm(weights, form, None, self.training, self.backend).divisor
            norm = norm.masked_fill(torch.isinf(norm), 0.0)
        if axis == "in":
            norm = convolution.over_kernel(norm, self.base_layer.weight.shape, groups, self._channels_last)
        return norm

    def _scale(self) -> Tensor:
        """``g``, in a shape that broadcasts over channels."""
        weights, compute = self._norm_source()
        g = layer_scale(weights, self._form, self._norm_cache, self.training, self.backend, compute)
        return self._per_channel(g)

    def _norm_source(self) -> tuple[Weights, Callable[[], Tensor] | None]:
        """The tensors that the norm depends on. The function computes it if it is not the row norm of a matrix."""
        last, weight, (lora_A, lora_B) = self._channels_last, self.base_layer.weight, self.factors
        views = convolution.is_view(weight, last) and convolution.is_view(lora_A, last)
        if self.base_layer.groups == 1 and self.magnitude_axis == "out" and views:
            return self._weights(), None
        # The problem's tensors are copies, which show no writes, so these are the originals.
        return Weights(weight, lora_A, lora_B, self.magnitude), self._weight_norm

    def kept_norms(self) -> Iterator[KeptNorm]:
        """Yield the norms that `frozen_norms` may freeze."""
        if not self.merged:
            weights, compute = self._norm_source()
            yield KeptNorm(self._norm_cache, weights, self._form, self.backend, compute)

    def _per_channel(self, vector: Tensor) -> Tensor:
        return vector.view(-1, *(1 for _ in self.base_layer.kernel_size))

    def _adapted(self, x: Tensor) -> Tensor:
        """``[batch, in_channels, ...]`` (or without the batch) to ``[batch, out_channels, ...]``."""
        base, g = self.base_layer, self._scale()
        dropped = self.dropout(x) if self._drops else None
        dtype, read = x.dtype, x if dropped is None else dropped
        if self.magnitude_axis == "in":
            x = x * g
            read = x if dropped is None else dropped * g  # not rounded, unlike the base layer's input
        result: Tensor = base(x.to(dtype))
        low = self._low_rank(read)
        if self.magnitude_axis == "in":
            return torch.add(result, low, alpha=self.scaling).to(result.dtype)
        bias = None if base.bias is None else self._per_channel(base.bias)
        return convolution.compose(result, low, g, bias, self.scaling).to(result.dtype)

    @property
    def _cannot_be_merged(self) -> bool:
        groups: int = self.base_layer.groups
        return groups > 1

    def _unmergeable_reason(self) -> str | None:
        if self._cannot_be_merged:
            return f"its update reads all channels, which no weight of a convolution with groups can hold; {KEPT_BY}"
        return super()._unmergeable_reason()

    def _merge_arguments(self) -> dict[str, Any]:
        """Along "in" a column of the problem is scaled by its channel's g, whatever the column's own norm."""
        arguments = super()._merge_arguments()
        if self.magnitude_axis == "in":
            own = dora_weight_norm(*self._problem(), scaling=self.scaling, magnitude_axis="in", backend=self.backend)
            g = self._scale().expand(-1, *self.base_layer.kernel_size)
            columns = g.movedim(0, -1) if self._channels_last else g
            arguments |= {"magnitude": columns.flatten() * own, "eps": 0.0}
        return arguments


class DoRAConv1d(_DoRAConv):
    __doc__ = _DoRAConv.__doc__
    kind = nn.Conv1d


class DoRAConv2d(_DoRAConv):
    __doc__ = _DoRAConv.__doc__
    kind = nn.Conv2d


class DoRAConv3d(_DoRAConv):
    __doc__ = _DoRAConv.__doc__
    kind = nn.Conv3d
