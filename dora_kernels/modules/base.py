"""Base class of all adapted layers: a frozen base layer, two factors, merging, strength, a state under PEFT's names."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from dora_kernels.core import validation
from dora_kernels.core.precision import accumulation_dtype
from dora_kernels.core.problem import Form, Weights
from dora_kernels.engine.model_norms import KeptNorm
from dora_kernels.engine.norm_cache import NormCache
from dora_kernels.functional import dora_weight_norm, merge_dora
from dora_kernels.rounding import is_coarse, stochastic

if TYPE_CHECKING:
    from typing_extensions import Self

T = TypeVar("T")


_OPTIONS = frozenset({
    "alpha", "dropout", "use_rslora", "backend", "adapter_dtype", "magnitude_axis", "detach_norm", "eps", "forward",
})  # fmt: skip
"""The keyword arguments that belong to the adapter; a layer's other keyword arguments go to its base layer."""


class AdaptedLayer(nn.Module):
    """A frozen `base_layer` and an adapter of its weight: the base class of every adapted layer.

    Attributes:
        base_layer: the layer that is adapted, frozen.
        rank: of the factors.
        alpha: what the scaling is made from.
        use_rslora: True if alpha is divided by the root of the rank.
        scaling: factor of the low-rank product, ``alpha / rank`` or ``alpha / sqrt(rank)``.
        dropout: the dropout module on the input of the low-rank branch.
        backend: as `dora_linear`.
    """

    kind: ClassVar[Any]
    """The class of the base layer."""
    # A kind of layer says how its tensors are the linear problem of docs/math.md (`_problem`) and what its forward is
    # (`_adapted`); the rest is written once, for the problem.
    base_layer: Any
    dropout: nn.Dropout
    rank: int
    alpha: float
    scaling: float
    use_rslora: bool
    backend: str
    magnitude_axis: str = "out"
    state_names: ClassVar[tuple[str, ...]] = ("lora_A.weight", "lora_B.weight")
    """The adapter's tensors in a state dict, as PEFT names them."""

    def _set_up(
        self,
        base_layer: Any,
        *,
        rank: int,
        alpha: float | None = None,
        dropout: float = 0.0,
        use_rslora: bool = False,
        backend: str = "auto",
        adapter_dtype: torch.dtype | None = None,
    ) -> dict[str, Any]:
        """Check and set the options that every layer has and freeze the base layer.

        Returns the adapter's device and dtype.
        """
        validation.check_options(rank, alpha, dropout, backend, adapter_dtype)
        validation.check_flag(use_rslora, "use_rslora")
        rank = int(rank)
        self._check_base(base_layer, rank)
        weight = self._weight_of(base_layer)
        if weight.dtype not in validation.DTYPES:
            raise TypeError(
                f"base_layer: expected a weight in float32, bfloat16, float16 or float64, got {weight.dtype}"
            )
        if not weight.is_meta and not bool(weight.detach().isfinite().all()):
            raise ValueError("base_layer: its weight has values that are not finite")
        divisor = math.sqrt(rank) if use_rslora else rank
        self.rank = rank
        self.alpha = float(divisor if alpha is None else alpha)
        self.use_rslora = use_rslora
        self.scaling = self.alpha / divisor
        validation.check_scaling(self.scaling)
        self.backend = backend
        self._strength = 1.0
        self._thawed = tuple(name for name, p in self._frozen_in(base_layer).named_parameters() if p.requires_grad)
        self._frozen_in(base_layer).requires_grad_(False)
        self.base_layer = base_layer
        self.dropout = nn.Dropout(float(dropout))
        self._unmerged: Tensor | None = None
        self._register_state_dict_hook(_save_unmerged)
        if adapter_dtype is None:
            adapter_dtype = torch.float32 if weight.dtype in (torch.bfloat16, torch.float16) else weight.dtype
        return {"device": weight.device, "dtype": adapter_dtype}

    @classmethod
    def _base_and_options(
        cls, base_layer: nn.Module | None, base_args: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[nn.Module, dict[str, Any]]:
        """Return the base layer, given or made from the other `options`, and the adapter's part of `options`."""
        own = {name: options.pop(name) for name in _OPTIONS & options.keys()}
        if base_layer is None:
            base_layer = cls.kind(*base_args, **options)
        elif options:
            raise TypeError(f"{cls.__name__}: got an unexpected keyword argument {min(options)!r} beside base_layer")
        return base_layer, own

    def _check_base(self, base_layer: Any, rank: int) -> None:
        """Check the base layer before it is frozen."""
        if not isinstance(base_layer, self.kind):
            raise TypeError(f"base_layer: expected a torch.nn.{self.kind.__name__}, got {type(base_layer).__name__}")

    def _start(self) -> None:
        """Set the factors to their initial values, once they exist."""
        self._reset_factors()

    @classmethod
    def from_base(cls, base: nn.Module, *, rank: int, **options: Any) -> Self:
        """Adapt an existing layer, which becomes the base layer (shared, not copied) and is frozen.

        Args:
            base: the layer.
            rank: of the factors, at least 1.
            **options: keyword arguments of the class.

        Raises:
            TypeError: `base` is not a layer that the class adapts, or an option has a wrong type.
            ValueError: an option is out of range, or the base layer has settings that cannot be adapted, or values that
                are not finite.
        """
        if type(base) is not cls.kind:
            raise TypeError(
                f"base: expected a torch.nn.{cls.kind.__name__} and not a subclass, got {type(base).__name__}"
            )
        return cls(base_layer=base, rank=rank, **options).train(base.training)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("weight", "bias"):
            raise AttributeError(f"{name}: it belongs to the base layer; set base_layer.{name}")
        super().__setattr__(name, value)

    @property
    def weight(self) -> Tensor:
        """The base layer's weight, without the adapter, as in PEFT's layers: models ask it for its dtype."""
        return self._weight_of(self.base_layer)

    def _frozen_in(self, base_layer: Any) -> nn.Module:
        """The part of a base layer that is frozen."""
        frozen: nn.Module = base_layer
        return frozen

    def _weight_name(self) -> str:
        """The parameter's name in the base layer."""
        return "weight"

    def _weight_of(self, base_layer: Any) -> Tensor:
        """The parameter of a base layer that is adapted."""
        weight: Tensor = base_layer.weight
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        bias: Tensor | None = getattr(self.base_layer, "bias", None)
        return bias

    @property
    def factors(self) -> tuple[nn.Parameter, nn.Parameter]:
        """A and B, in the shapes in which PEFT stores them."""
        raise NotImplementedError

    def _problem(self) -> tuple[Tensor, Tensor, Tensor]:
        """The base weight as ``[N, K]``, A as ``[r, K]`` and B as ``[N, r]``: views if the memory layout allows."""
        raise NotImplementedError

    def _weights(self) -> Weights:
        """The linear problem, with the magnitude as a vector and the bias."""
        return Weights(*self._problem(), None, self.bias)

    def _adapted(self, x: Tensor) -> Tensor:
        """The layer's output at strength 1."""
        raise NotImplementedError

    def _base(self, x: Tensor) -> Tensor:
        """The base layer's output, for every x that `_adapted` accepts."""
        y: Tensor = self.base_layer(x)
        return y

    def _reset_factors(self) -> None:
        raise NotImplementedError

    def _write(self, merged: Tensor) -> None:
        """Write a weight ``[N, K]`` into the base layer."""
        self.weight.copy_(merged)

    def _unmergeable_reason(self) -> str | None:
        """Return the reason why the base layer's weight cannot hold the adapter, or None if it can."""
        for name, parameter in self.adapter_parameters().items():
            if parameter.is_meta:
                return f"its {name} is on the meta device, without values"
            if not bool(parameter.detach().isfinite().all()):
                return f"its {name} has values that are not finite"
        return None

    @property
    def _cannot_be_merged(self) -> bool:
        """True if the adapter can be neither merged nor saved."""
        return False

    def _merge_arguments(self) -> dict[str, Any]:
        """The arguments of `merge_dora` in addition to the problem."""
        return {"magnitude": None, "scaling": self.scaling, "backend": self.backend}

    def reset_adapter(self) -> None:
        """Set the adapter to its initial values, with which the layer equals its base layer."""
        self._reset_factors()

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """The adapter's tensors by their names in a state dict."""
        return {name: self.get_parameter(name) for name in self.state_names}

    @property
    def merged(self) -> bool:
        """True if the base layer's weight currently holds the adapter."""
        return self._unmerged is not None

    @property
    def strength(self) -> float:
        """The factor k of ``y = base + k * (adapted - base)``: 0 is the base layer to the bit, 1 the adapter as it is.

        A merge applies it. It is not part of the state dict.

        Raises:
            TypeError: it is set to something that is no number.
            ValueError: it is set to a number that is not finite, or while the layer is merged.
        """
        return self._strength

    @strength.setter
    def strength(self, value: float) -> None:
        validation.check_strength(value)
        if self.merged:
            raise ValueError(
                "strength: the layer is merged, and keeps the strength it was merged with; call unmerge() first"
            )
        self._strength = float(value)

    def _merged_weight(self, rounding: str, seed: int) -> Any:
        """The merged weight ``[N, K]``, or whatever `_write` takes."""
        return self._merged_matrix(self._problem(), rounding, seed)

    def _merged_matrix(
        self, problem: tuple[Tensor, Tensor, Tensor], rounding: str, seed: int, magnitude: Tensor | None = None
    ) -> Tensor:
        """The merged weight of one matrix; a `magnitude` stands for the layer's."""
        weight, lora_A, lora_B = problem
        arguments: dict[str, Any] = {**self._merge_arguments(), "rounding": rounding, "seed": seed}
        if magnitude is not None:
            arguments["magnitude"] = magnitude
        if self.strength == 1.0:
            return merge_dora(weight, lora_A, lora_B, **arguments)
        wide = weight.to(accumulation_dtype(weight))
        merged = torch.lerp(wide, merge_dora(wide, lora_A, lora_B, **arguments), self.strength)
        drawn = rounding == "stochastic" and is_coarse(weight.dtype)
        return stochastic(merged, weight.dtype, seed) if drawn else merged.to(weight.dtype)

    @torch.no_grad()
    def merge(self, rounding: str = "nearest", seed: int = 0) -> None:
        """Write the adapted weight into the base layer. The original weight is kept on the CPU for `unmerge`.

        Args:
            rounding: "nearest" or "stochastic", as in `merge_dora`.
            seed: of stochastic rounding, in ``[0, 2**63)``.

        Raises:
            TypeError: `seed` is no int.
            ValueError: no weight of the base layer's can hold the adapter (a convolution with groups), or a value of
                the adapter is not finite.
        """
        if self.merged:
            warnings.warn("the layer is merged already: nothing to do", stacklevel=3)  # skips no_grad's frame
            return
        reason = self._unmergeable_reason()
        if reason is not None:
            raise ValueError(f"the layer cannot be merged: {reason}")
        merged = self._merged_weight(rounding, seed)
        self._unmerged = self.weight.detach().to("cpu", copy=True)
        self._write(merged)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the base layer's original weight back, bit for bit."""
        if self._unmerged is None:
            warnings.warn("the layer is not merged: nothing to do", stacklevel=3)
            return
        self.weight.copy_(self._unmerged)
        self._unmerged = None

    @property
    def _drops(self) -> bool:
        """True if dropout is active."""
        return self.training and self.dropout.p > 0.0

    def _release(self) -> nn.Module:
        """Return the base layer as it is, merged or not, and let those of its parameters train that did before."""
        self._unmerged = None
        base: nn.Module = self.base_layer
        for name in self._thawed:
            self._frozen_in(base).get_parameter(name).requires_grad_(True)
        return base

    def _check_input(self, x: Tensor) -> None:
        """Check x before anything is computed, for what the base layer does not check itself."""

    def forward(self, x: Tensor) -> Tensor:
        """The base layer's forward with the adapter.

        Args:
            x: as the base layer takes it.

        Returns:
            As the base layer returns it.

        Raises:
            TypeError: x is of a type that the base layer does not take.
            ValueError: x is of a shape that the base layer does not take.
        """
        self._check_input(x)
        if self.merged or self._strength == 0.0:
            return self._base(x)
        y = self._adapted(x)
        return y if self._strength == 1.0 else torch.lerp(self._base(x).to(y.dtype), y, self._strength)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if self.merged:
            raise RuntimeError("the layer is merged: call unmerge() before loading a state dict into it")
        for name in self.state_names:  # also accept names with an adapter's name in them, as in a PEFT model
            root = f"{prefix}{name.removesuffix('.weight')}."
            named = [key for key in state_dict if key.startswith(root) and not key.endswith(".bias")]
            if f"{prefix}{name}" not in state_dict and len(named) == 1:
                state_dict[f"{prefix}{name}"] = state_dict.pop(named[0])
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        text = f"rank={self.rank}, scaling={self.scaling:g}"
        if self.use_rslora:
            text += ", use_rslora=True"
        if self.backend != "auto":
            text += f", backend={self.backend!r}"
        if self._strength != 1.0:
            text += f", strength={self._strength:g}"
        return text + (", merged" if self.merged else "")


class DoRALayer(AdaptedLayer):
    """An `AdaptedLayer` with a magnitude: ``lora_magnitude_vector`` in PEFT's shape, and as a vector under `magnitude`.

    It starts as the norm of the adapted weight (plus eps), exact to float32, so a new layer equals its base layer.

    The norm is kept between calls while nothing it depends on changes. Call `dora_kernels.invalidate(layer)` after
    writing weights in a way that PyTorch cannot see.

    Attributes:
        magnitude_axis: "out" or "in", the dimension of the weight that the magnitudes run along.
        detach_norm: True if no gradient flows through the norm (section 4.3 of the DoRA paper; PEFT).
        eps: added to the norm, ``g = magnitude / (norm + eps)``.
    """

    lora_magnitude_vector: nn.Parameter
    detach_norm: bool
    eps: float

    def _set_up(
        self,
        base_layer: nn.Module,
        *,
        magnitude_axis: str = "out",
        detach_norm: bool = True,
        eps: float = 0.0,
        **options: Any,
    ) -> dict[str, Any]:
        validation.check_axis(magnitude_axis)
        validation.check_eps(eps)
        validation.check_flag(detach_norm, "detach_norm")
        factory = super()._set_up(base_layer, **options)
        self.magnitude_axis = magnitude_axis
        self.detach_norm = bool(detach_norm)
        self.eps = float(eps)
        self._norm_cache = NormCache(self._form._replace(detach_norm=True), self.backend)
        return factory

    def _start(self) -> None:
        super()._start()
        dtype, device = self.factors[0].dtype, self.weight.device
        self.lora_magnitude_vector = nn.Parameter(torch.empty(self._magnitude_shape(), dtype=dtype, device=device))
        self._norm_cache.move(device)
        self._reset_magnitude()

    state_names = (*AdaptedLayer.state_names, "lora_magnitude_vector")

    def _weights(self) -> Weights:
        """The linear problem, with the magnitude as a vector and the bias."""
        return Weights(*self._problem(), self.magnitude, self.bias)

    @property
    def _form(self) -> Form:
        return Form(self.scaling, self.magnitude_axis, self.detach_norm, self.eps)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """PyTorch's, for `to` and similar methods; the norm cache forgets, and with it the old tensors' memory."""
        result = super()._apply(*args, **kwargs)
        self._norm_cache.invalidate()
        self._norm_cache.move(self.weight.device)
        return result

    def kept_norms(self) -> Iterator[KeptNorm]:
        """Yield the norms that `frozen_norms` may freeze."""
        if not self.merged:
            yield KeptNorm(self._norm_cache, self._weights(), self._form, self.backend)

    @property
    def magnitude(self) -> Tensor:
        """The magnitude as a vector. If PEFT's shape is a vector, this is the parameter itself."""
        return self.lora_magnitude_vector

    def _magnitude_shape(self) -> tuple[int, ...]:
        weight = self._problem()[0]
        return tuple(weight.shape[:-1] if self.magnitude_axis == "out" else weight.shape[1:])

    def _weight_norm(self) -> Tensor:
        """The norm of the adapted weight, one value per magnitude."""
        return dora_weight_norm(
            *self._problem(), scaling=self.scaling, magnitude_axis=self.magnitude_axis, backend=self.backend
        )

    def reset_adapter(self) -> None:
        """Set the adapter to its initial values, with which the layer equals its base layer."""
        super().reset_adapter()
        self._reset_magnitude()

    @torch.no_grad()
    def _reset_magnitude(self) -> None:
        magnitude = self.lora_magnitude_vector
        if not magnitude.is_meta:
            magnitude.copy_((self._weight_norm() + self.eps).view(magnitude.shape))

    def _merge_arguments(self) -> dict[str, Any]:
        return {
            **super()._merge_arguments(),
            "magnitude": self.magnitude,
            "magnitude_axis": self.magnitude_axis,
            "eps": self.eps,
        }

    def extra_repr(self) -> str:
        text = f"{super().extra_repr()}, magnitude_axis={self.magnitude_axis!r}, detach_norm={self.detach_norm}"
        return f"{text}, eps={self.eps:g}" if self.eps else text


def showing(*names: str) -> Callable[[type[T]], type[T]]:
    """Class decorator that adds properties of the base layer which models read, such as a convolution's stride."""

    def shown(name: str) -> property:
        return property(lambda layer: getattr(layer.base_layer, name), doc="The base layer's.")

    def decorate(cls: type[T]) -> type[T]:
        for name in names:
            setattr(cls, name, shown(name))
        return cls

    return decorate


def _save_unmerged(layer: AdaptedLayer, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Store the base weight without the adapter, which the state dict holds as well."""
    key = f"{prefix}base_layer.{layer._weight_name()}"
    if layer._unmerged is not None and key in state_dict:
        state_dict[key] = layer._unmerged
