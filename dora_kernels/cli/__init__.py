"""The command line, `dora-kernels`. Needs the `cli` extra, typer and rich; files need safetensors.

Exit status: 0 all is well, 1 a backend fails or an error exceeds its budget, 2 bad input, a missing extra, or an output
that takes nothing.
"""

from dora_kernels.cli.app import build_app, main

__all__ = ["build_app", "main"]
