"""Read, write, attach and combine adapter files of every published format."""

from dora_kernels.adapters.adapter import Adapter, AdapterLayer
from dora_kernels.adapters.attachment import attach, extract
from dora_kernels.adapters.combine import CombineReport, combine_adapters, with_strength
from dora_kernels.adapters.formats import FORMATS
from dora_kernels.adapters.load import load_adapter, read_adapter
from dora_kernels.adapters.save import save_adapter

__all__ = [
    "FORMATS",
    "Adapter",
    "AdapterLayer",
    "CombineReport",
    "attach",
    "combine_adapters",
    "extract",
    "load_adapter",
    "read_adapter",
    "save_adapter",
    "with_strength",
]
