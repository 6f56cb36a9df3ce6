"""Benchmarks: is it faster than what you use now, by how much, where not, and how far from the limit.

    python -m bench run                 everything that fits into five minutes on two cores
    python -m bench run --suite layer decode --hidden 4096 --rank 16 64 --tokens 512
    python -m bench run --suite finetune        half an hour: learning curves from several seeds
    python -m bench compare v0.1.0      this working tree beside another revision; exit status 1 on a regression
    python -m bench plot RECORD         pictures of a record
    python -m bench report              docs/benchmarks.md and the README's tables, from bench/results
    python -m bench static              what the kernels move and multiply, without a GPU

`python -m bench COMMAND --help` explains a command. Exit status 2: bad input, in one line.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

COMMANDS = {
    "run": "measure, side by side, and check every result against float64",
    "compare": "measure the working tree against another git revision",
    "plot": "draw a record",
    "report": "render the documents' tables and figures from the committed records",
    "static": "bytes, FLOPs, registers, shared memory and matrix instructions of the kernels, without a GPU",
}
"""Each is `bench.commands.NAME`, with `add_arguments(parser)`, and `run(given, parser)` for the exit status."""


class Parser(argparse.ArgumentParser):
    """argparse, with one line where it prints its usage too."""

    def error(self, message: str) -> NoReturn:
        """Exit status 2."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = Parser(prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in COMMANDS.items():
        one = commands.add_parser(name, help=summary, formatter_class=argparse.RawDescriptionHelpFormatter)
        if words[:1] == [name]:  # the others' modules are not imported
            command = importlib.import_module(f"bench.commands.{name}")
            one.description = command.__doc__
            command.add_arguments(one)
            one.set_defaults(run=command.run, parser=one)
    given = parser.parse_args(words)
    try:
        status: int = given.run(given, given.parser)
        sys.stdout.flush()
    except BrokenPipeError:  # `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return status


if __name__ == "__main__":
    sys.exit(main())
