"""The command line, `dora-kernels`. Needs the `cli` extra (typer and rich); commands on files need safetensors.

Exit status: 0 on success; 1 if a backend fails or an error exceeds its budget; 2 for bad input, a missing extra, or an
output that cannot be written; 141, without a word, if nobody reads the output on.
"""

from dora_kernels.cli.app import build_app, main

__all__ = ["build_app", "main"]
