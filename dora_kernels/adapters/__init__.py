"""Adapter files of every published form, and what is in them."""

from dora_kernels.adapters.layers import Adapter, AdapterLayer

__all__ = ["Adapter", "AdapterLayer"]
