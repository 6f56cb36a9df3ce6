"""Shared by all other folders: a layer's tensors, dtypes, matrix products, checks of arguments, the reference."""
