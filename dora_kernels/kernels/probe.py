"""A first test of a device: each kernel is compiled, launched and checked once."""

from __future__ import annotations

import torch

from dora_kernels.kernels.compose import compose
from dora_kernels.kernels.factor_grads import factor_grads
from dora_kernels.kernels.norm import weight_norm
from dora_kernels.kernels.product import product, wide_products
from dora_kernels.kernels.scale_reduce import scale_partials


def probe(device: torch.device) -> None:
    """Compile, launch and check each kernel once. Raises the compiler's or driver's error, or RuntimeError.

    It also finds out whether `torch.mm` has wide results here, which cannot be tried during a graph's capture.
    """
    wide_products(device)
    ones = torch.ones(16, 16, device=device, dtype=torch.bfloat16)
    g = torch.ones(16, device=device)
    scaled, _, _, low = scale_partials(ones, ones, g, True, True, None, ones)
    _, dm = factor_grads(ones.float()[None], ones, g.view(1, 16), g, g, 1.0, None)
    assert scaled is not None and low is not None and dm is not None
    found = {
        "weight_norm": (weight_norm(ones, ones, ones, 1.0), 4 * 17.0),
        "weight_norm in float32": (weight_norm(ones.float(), ones.float(), ones.float(), 1.0), 4 * 17.0),
        "compose": (compose(ones, ones, ones, g, None, 1.0, True), 17.0),
        "product": (product(ones, ones, torch.bfloat16), 16.0),
        "scale_reduce": (scaled, 1.0),
        "scale_reduce with a product": (low, 16.0),
        "factor_grads": (dm, 17.0),
    }
    for name, (result, expected) in found.items():
        if not torch.allclose(result.float(), torch.full_like(result.float(), expected)):
            raise RuntimeError(f"{name} of ones gave {float(result.flatten()[0])}, expected {expected}")
