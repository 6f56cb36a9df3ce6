"""Two wrong DoRA models, which the comparison with stock PEFT must tell from a right one."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.dora import DoraLinearLayer

from bench.demo.model import adapt
from bench.demo.settings import Settings


class StaleNorm(DoraLinearLayer):
    """Stock PEFT's layer with the norm it had at initialisation, never refreshed."""

    first_norm: torch.Tensor

    def get_weight_norm(self, *args: object, **kwargs: object) -> torch.Tensor:
        """The magnitude starts as the norm, so its first value is the first norm."""
        return self.first_norm


def make_control(base: Any, kind: str, settings: Settings) -> Any:
    """A stock PEFT model made wrong: `frozen` (magnitude not trained) or `stale` (old norm)."""
    model = adapt(base, "stock", settings)
    for layer in [m for m in model.modules() if isinstance(m, DoraLinearLayer)]:
        if kind == "frozen":
            layer.weight.requires_grad_(False)
        else:
            layer.first_norm = layer.weight.detach().clone()
            layer.__class__ = StaleNorm
    return model
