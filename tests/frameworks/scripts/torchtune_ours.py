"""torchtune's Llama whose DoRA layers this package computes: a builder to name in a recipe's configuration."""

import sys

from torchtune.models import llama2
from torchtune.modules.peft import DoRALinear

import dora_kernels


class Layer(DoRALinear):
    """torchtune's layer, with its parameters and checkpoints, and this package's forward."""

    def forward(self, x):
        if self.disabled:
            return super().forward(x)
        return dora_kernels.dora_linear(
            x, self.weight, self.lora_a.weight, self.lora_b.weight, self.magnitude, self.bias, scaling=self.scaling
        )


def lora_llama2(**options):
    model = llama2.lora_llama2(**options)
    layers = [module for module in model.modules() if type(module) is DoRALinear]
    for layer in layers:
        layer.__class__ = Layer
    print(f"dora_kernels: {len(layers)} DoRA layers of torchtune", file=sys.stderr)
    return model
