"""DoRA (weight-decomposed low-rank adaptation) at the price of LoRA. See README.md."""

from dora_kernels.functional import dora_linear, dora_weight_norm, merge_dora

__version__ = "0.1.0"
