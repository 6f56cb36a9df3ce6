"""Export to GGUF, the file format of llama.cpp and related programs. Needs the package `gguf`, imported on use."""

from dora_kernels.gguf.adapter import as_lora, export_adapter, read_adapter
from dora_kernels.gguf.model import DTYPES, export_model

__all__ = ["DTYPES", "as_lora", "export_adapter", "export_model", "read_adapter"]
