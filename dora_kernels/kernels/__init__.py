"""The `triton` backend: the primitives of `dora_kernels.torch_backend` as Triton kernels, one file each.

| primitive | file | reads and writes |
|---|---|---|
| `weight_norm` | norm.py; at high rank factored.py | W once |
| `KeptNorm` | kept.py | A and B once; W once where they changed |
| `Watch` | watch.py | all that it watches once |
| `merge` | merge.py | W twice, the second time from the cache; the merged weight once |
| `compose` | compose.py | base result once, output once |
| `factor_grads` | factor_grads.py | matrices of rank r: dB and dm where `compose` keeps the base product |
| `scale_reduce` | scale_reduce.py | gradient and its partner once, scaled gradient once |

This folder alone imports triton; it is imported on first use of the backend.
"""

from torch import Tensor

from dora_kernels.kernels.compose import compose
from dora_kernels.kernels.config import is_factored, is_worth_keeping
from dora_kernels.kernels.factor_grads import factor_grads
from dora_kernels.kernels.kept import KeptNorm
from dora_kernels.kernels.launch import INTERPRETED, probe
from dora_kernels.kernels.merge import merge
from dora_kernels.kernels.norm import weight_norm
from dora_kernels.kernels.scale_reduce import scale_partials, scale_reduce
from dora_kernels.kernels.watch import Watch


def keeps_sum(base: Tensor, h: Tensor, lora_B: Tensor) -> bool:
    """`compose` keeps the base product itself: writing the sum back would be another pass."""
    return False


__all__ = [
    "INTERPRETED",
    "KeptNorm",
    "Watch",
    "compose",
    "factor_grads",
    "is_factored",
    "is_worth_keeping",
    "keeps_sum",
    "merge",
    "probe",
    "scale_partials",
    "scale_reduce",
    "weight_norm",
]
