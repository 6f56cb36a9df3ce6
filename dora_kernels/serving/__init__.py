"""Serve many adapters on one base model: `AdapterBank`."""

from dora_kernels.serving.bank import AdapterBank

__all__ = ["AdapterBank"]
