"""Set the strength of a model's adapters: `set_dora_strength`."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from dora_kernels.core import validation
from dora_kernels.model.apply import adapted_layers


def set_dora_strength(model: nn.Module, strength: float, adapter: str | None = None) -> None:
    """Make every adapted layer of `model` compute ``base + strength * (adapted - base)``.

    This sets the layers of this package (`AdaptedLayer`) and the DoRA adapters of the PEFT layers that `patch_peft` has
    patched. 0 is the base model exactly, 1 the adapter as it was trained. Other values interpolate and extrapolate the
    output of each layer. (PEFT's ``set_scale`` changes the norm too: even at 0 the magnitude remains, as
    ``m / ||W||``.) Where several adapters are active, each is interpolated from the result of the one before it.

    A merge applies the strength. Files do not record it: `with_strength` makes an adapter with the strength in it.

    Args:
        model: the model, changed in place.
        strength: any finite number.
        adapter: the name of a PEFT adapter. None means all of them, and the layers of this package, whose adapters have
            no name.

    Raises:
        TypeError: `model` is not a module, or `strength` is not a number.
        ValueError: `strength` is not finite, there is no such layer, `adapter` is not a DoRA adapter of a patched
            layer, or a layer is merged. No strength has changed then.
    """
    own = adapted_layers(model)
    validation.check_strength(strength)
    patched = _patched(model)
    if not own and not patched:
        raise ValueError("model: no patched DoRA layers; call dora_kernels.patch_peft(model) first, or apply_dora")
    if adapter is not None:
        own, known = {}, sorted({each[1] for each in patched})
        patched = [each for each in patched if each[1] == adapter]
        if not patched:
            there = f"there are {', '.join(known)}" if known else "the layers of this package have one without a name"
            raise ValueError(f"adapter: no patched layer has a DoRA adapter {adapter!r}; {there}")
    for name, one, layer, _ in patched:
        if one in layer.merged_adapters:
            raise ValueError(f"model: adapter {one!r} of {name} is merged; call unmerge_adapter() first")
    for name, layer in own.items():
        if layer.merged:
            raise ValueError(f"model: {name} is merged; call unmerge() first")
    for _, one, _, strengths in patched:
        strengths[one] = float(strength)
    for layer in own.values():
        layer.strength = strength


def _patched(model: nn.Module) -> list[tuple[str, str, Any, dict[str, float]]]:
    # No layer is patched before this module is imported, and importing it would import PEFT.
    state = sys.modules.get("dora_kernels.peft.state")
    return state.strengths_of(model) if state is not None else []
