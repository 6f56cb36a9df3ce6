"""Accounts and pictures: `python -m bench SUITE --help`. `python -m bench.layer --help` times kernels and layers."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from bench import plot
from bench.static import command as static

SUITES = {"static": static, "plot": plot}
"""Modules with SUMMARY, `add_arguments(parser)` and `run(given, parser)`, which returns the exit status."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    suites = parser.add_subparsers(dest="suite", required=True, metavar="SUITE")
    for name, suite in SUITES.items():
        one = suites.add_parser(
            name, help=suite.SUMMARY, description=suite.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        suite.add_arguments(one)
        one.set_defaults(run=suite.run, parser=one)
    given = parser.parse_args(arguments)
    try:
        status: int = given.run(given, given.parser)
        sys.stdout.flush()
    except BrokenPipeError:  # `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status


if __name__ == "__main__":
    sys.exit(main())
