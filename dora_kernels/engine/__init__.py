"""The layer's computation: the formula or the fused kernels, and the norm kept between calls."""
