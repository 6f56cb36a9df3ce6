"""`python -m dora_kernels`: the command line."""

import sys

from dora_kernels.cli import main

if __name__ == "__main__":
    sys.exit(main())
