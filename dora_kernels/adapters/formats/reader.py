"""A file while it is read: its content, the caller's options, and the decisions made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from dora_kernels.adapters.adapter import UNDECIDED, AdapterLayer, problem_of
from dora_kernels.adapters.base_layers import BaseLayer, axis_by_norms
from dora_kernels.core.expressions import Steps
from dora_kernels.core.patterns import ByName, by_pattern
from dora_kernels.core.shown import listed, quoted
from dora_kernels.files import storage


@dataclass
class Reading:
    """The input of a format's `read`.

    Attributes:
        file, tensors: the safetensors file and everything in it.
        config_file, config: the configuration beside it, and its content; None and empty without one.
        base_layers: the base model's layers; None without a model.
        magnitude_axis, scaling: the caller's values; "auto" and None mean that the file decides.
        notes: decisions and their reasons.
        header: the metadata of the safetensors file.
    """

    file: Path
    tensors: Mapping[str, Tensor]
    config_file: Path | None = None
    config: dict[str, Any] = field(default_factory=dict)
    base_layers: dict[str, BaseLayer] | None = None
    magnitude_axis: str = "auto"
    scaling: float | None = None
    notes: list[str] = field(default_factory=list)
    header: Mapping[str, str] = field(default_factory=dict)
    stacks: dict[str, str] = field(default_factory=dict)
    """Of PEFT's adapters of parameters: the parameter's name by the name in the keys."""
    stacks_exchanged: dict[str, bool] = field(default_factory=dict)
    """True for those whose A and B are exchanged in the file, as far as sizes tell."""
    by_version: dict[str, bool] = field(default_factory=dict)
    """The same of those of which PEFT's version alone tells, by the parameter's name."""
    exchanged: list[str] = field(default_factory=list)
    """Those whose A and B PEFT exchanges from 0.19 on."""
    matrices: list[str] = field(default_factory=list)
    """Those of two dimensions."""
    beside: dict[str, Tensor] = field(default_factory=dict)
    """Tensors that belong to no adapter, by key."""
    _patterns: dict[str, ByName] = field(default_factory=dict)
    _steps: Steps = field(default_factory=lambda: Steps(""))

    def error(self, text: str) -> ValueError:
        return ValueError(f"{self.file}: {text}")

    def number(self, config: Mapping[str, Any], *names: str, where: str = "") -> float:
        """Return a finite number of the configuration.

        The last of `names` is its key, in the object that the other names lead to.

        Args:
            where: the configuration's name in errors, if it is not its file.

        Raises:
            ValueError: the number is missing, or not a number.
        """
        value: Any = config
        for name in names:
            value = value.get(name) if isinstance(value, Mapping) else None
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= 1e30:
            key, way_out = ".".join(names), "pass scaling= to read it anyway"
            if not where and self.config_file is None:
                missing = self.file.with_name("adapter_config.json")
                raise self.error(f"it needs {missing}, which is missing, for its {key}; {way_out}")
            said = f"expected a number, got {quoted(value)}"
            raise ValueError(f"{where or self.config_file}: {key}: {said}; {way_out}")
        return float(value)

    def by_pattern(self, values: Any, label: str) -> ByName:
        """Return a configuration's values by name pattern.

        Each label is parsed once. Raises ValueError if they are invalid.
        """
        if label not in self._patterns:
            self._patterns[label] = by_pattern(values, label, self._steps)
        return self._patterns[label]

    def vector(self, key: str, tensor: Tensor, features: tuple[int, int], fixed: str | None) -> tuple[Tensor, str]:
        """Return a magnitude with one long dimension as ``[length]``, and its axis, which may be `UNDECIDED`.

        Args:
            fixed: the format's only axis, if it has only one.
        """
        if tensor.numel() != max(tensor.shape, default=0):
            raise self.error(f"{key} {list(tensor.shape)}: expected one long dimension")
        lengths = {"in": features[0], "out": features[1]}
        fitting = [axis for axis in ("out", "in") if lengths[axis] == tensor.numel()]
        requested = fixed if self.magnitude_axis == "auto" else self.magnitude_axis
        if not fitting or (requested is not None and requested not in fitting):
            along = f"axis {requested!r}" if requested else "a magnitude"
            wanted = " or ".join(str(lengths[axis]) for axis in ([requested] if requested else ["out", "in"]))
            hint = f"; magnitude_axis={fitting[0]!r} would fit" if fitting else ""
            raise self.error(f"{key} {list(tensor.shape)}: {along} needs {wanted} values{hint}")
        axis = requested or (fitting[0] if len(fitting) == 1 else UNDECIDED)
        return tensor.reshape(-1), axis

    def decide(self, layers: dict[str, AdapterLayer]) -> dict[str, AdapterLayer]:
        """Return `layers` with every undecided axis decided, by the file's other layers or by the base weights.

        Raises:
            ValueError: nothing decides, or base weights contradict each other. The message asks for
            ``magnitude_axis=``.
        """
        undecided = {name: layer for name, layer in layers.items() if layer.magnitude_axis == UNDECIDED}
        if not undecided:
            return layers
        known = {layer.magnitude_axis for name, layer in layers.items() if name not in undecided and _decides(layer)}
        if len(known) == 1:
            axis = known.pop()
            self.notes.append(f"magnitude_axis of {listed(undecided)}: {axis!r}, as in the layers that are not square")
        else:
            axis = self._by_norms(undecided)
        return {name: replace(layer, magnitude_axis=axis) if name in undecided else layer
                for name, layer in layers.items()}  # fmt: skip

    def _by_norms(self, undecided: dict[str, AdapterLayer]) -> str:
        axes: set[str] = set()
        found: list[tuple[float, float]] = []
        for name, layer in undecided.items():
            base = (self.base_layers or {}).get(name)
            if base is not None and base.fits(layer) and (near := axis_by_norms(layer, base)) is not None:
                axes.add(near[0])
                found.append(near[1:])
        if len(axes) != 1:
            if not self.base_layers:
                reason = "no model was given to compare its norms"
            else:
                reason = f"the model's weights {'contradict each other' if axes else 'do not decide'}"
            raise self.error(
                f"the magnitude of {listed(undecided)} fits the inputs as well as the outputs, and {reason}: "
                "pass magnitude_axis='out' or 'in'"
            )
        axis = axes.pop()
        own, other = (sum(each[i] for each in found) / len(found) for i in (0, 1))
        self.notes.append(
            f"magnitude_axis of {listed(undecided)}: {axis!r}, because the magnitude is {own:.1%} from that norm of "
            f"the adapted weight and {other:.1%} from the other"
        )
        return axis

    def check(self, label: str, layer: AdapterLayer) -> None:
        """Raise ValueError if a layer's tensors do not fit together, or if its scaling is out of range."""
        if problem := problem_of(layer):
            raise self.error(f"{label}: {problem}")

    def check_tensor(self, key: str) -> Tensor:
        storage.check_tensor(self.file, key, self.tensors[key])
        return self.tensors[key]


def _decides(layer: AdapterLayer) -> bool:
    return layer.magnitude is not None and layer.features[0] != layer.features[1]
