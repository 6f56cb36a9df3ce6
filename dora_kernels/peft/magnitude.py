"""PEFT's module of a magnitude, changed to call lora_A and lora_B once instead of twice."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import dora as peft_dora
from peft.tuners.lora.dora import DoraLinearLayer
from torch import Tensor, nn


class DoraMagnitude(DoraLinearLayer):
    """PEFT's magnitude module, but it calls lora_A and lora_B only once.

    PEFT calls each twice, first with an identity matrix to get their weights, which may be whole only during a call.
    """

    def forward(self, x: Tensor, *, lora_A: Any, lora_B: Any, **kwargs: Any) -> Tensor:
        """PEFT's forward, with the weights taken from the calls."""
        cached = getattr(peft_dora, "ENABLE_DORA_CACHING", False)  # with PEFT's cache the identity is not used
        if not cached and not torch.compiler.is_compiling() and _inner_linear(lora_A) and _inner_linear(lora_B):
            lora_A = _Called(lora_A, x)
            lora_B = _Called(lora_B, lora_A.result)
        # Not super(): another thread may have restored the module's class since the call began.
        result: Tensor = DoraLinearLayer.forward(self, x, lora_A=lora_A, lora_B=lora_B, **kwargs)
        return result


class _Called:
    """Stands in for lora_A or lora_B after its one call. The first call gives the weight, the second the result."""

    def __init__(self, module: nn.Module, x: Tensor) -> None:
        seen: list[Tensor] = []
        inner: Any = _inner_linear(module)

        def record(one: Any, *_: Any) -> None:
            # Replicas (`torch.nn.DataParallel`) share the dictionary of hooks, and run at the same time.
            if one is inner:
                seen.append(one.weight.detach().clone())

        handle = inner.register_forward_hook(record, prepend=True)
        try:
            self.result: Tensor = module(x)
        finally:
            handle.remove()
        self.weight = seen[0]
        self._shown = False

    def __call__(self, x: Tensor) -> Tensor:
        if self._shown:
            return self.result
        self._shown = True
        return F.linear(x, self.weight)


def _inner_linear(module: nn.Module) -> nn.Linear | None:
    """Return the linear layer inside a wrapper, if the wrapper's output for an identity matrix shows its weight."""
    inner = next((one for one in module.modules() if isinstance(one, nn.Linear)), None)
    return inner if type(inner) is nn.Linear and inner.bias is None else None
