"""The Triton kernels of the fused path, one per file. `engine.blocked` has `weight_norm` and `merge` in plain PyTorch.

| primitive | file | reads and writes |
|---|---|---|
| `weight_norm` | norm.py; at high rank factored.py | W once |
| `KeptNorm` | kept.py | A and B once; W once if they changed |
| `Watch` | watch.py | everything it watches, once |
| `merge` | merge.py | W twice, the second time from the cache; the merged weight once |
| `compose` | compose.py | base result once, output once |
| `one_pass` | one_pass.py | W once; the whole forward of few tokens |
| `product` | product.py | the large operand once, if the other has at most 64 columns |
| `factor_grads` | factor_grads.py | matrices of rank r: dB and dm if `compose` keeps the base product |
| `scale_reduce` | scale_reduce.py | gradient and its partner once, scaled gradient once; with dYᵀ H in the same pass |
| `product_over_tokens` | scale_reduce.py | both operands once: each group's dYᵀ H |

Only this folder imports triton. It is imported on first use of the backend.
"""

from dora_kernels.kernels.compose import compose
from dora_kernels.kernels.config import is_worth_keeping
from dora_kernels.kernels.factor_grads import factor_grads
from dora_kernels.kernels.factored import FACTORED, is_factored
from dora_kernels.kernels.kept import KeptNorm
from dora_kernels.kernels.launch import INTERPRETED
from dora_kernels.kernels.merge import merge
from dora_kernels.kernels.norm import weight_norm
from dora_kernels.kernels.one_pass import one_pass
from dora_kernels.kernels.probe import probe
from dora_kernels.kernels.product import product
from dora_kernels.kernels.scale_reduce import product_over_tokens, scale_partials, scale_reduce
from dora_kernels.kernels.watch import Watch

__all__ = [
    "FACTORED",
    "INTERPRETED",
    "KeptNorm",
    "Watch",
    "compose",
    "factor_grads",
    "is_factored",
    "is_worth_keeping",
    "merge",
    "one_pass",
    "probe",
    "product",
    "product_over_tokens",
    "scale_partials",
    "scale_reduce",
    "weight_norm",
]
