"""How a layer runs: the formula or the fused kernels, and the norm that is kept between calls."""
