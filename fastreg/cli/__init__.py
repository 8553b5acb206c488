"""The command `fastreg`: doctor, bench and demo.

This package holds only the doors. What stands behind `bench` is `benchmarks/`, and behind `demo` it is
`lecture/`; an installed fastreg has them as `fastreg.benchmarks` and `fastreg.lecture`.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

import fastreg

from .. import _distribution

COMMANDS = {  # name: (the module whose `main(arguments)` gives the exit status, the line of help)
    "doctor": ("fastreg.cli.doctor", "what was built, what is loaded, what this machine can run"),
    "bench": (
        "fastreg.benchmarks.command",
        "speed and memory against torch and torch.compile, on this machine",
    ),
    "demo": ("fastreg.lecture.command", "every method on real data, with a report to look at"),
}
# What writes a report of one machine, and would write it twice.
ONCE = ("bench", "demo")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `fastreg COMMAND ...` with these arguments, by default those of the process. Under torchrun bench
    and demo run on the first rank alone.

    Returns:
        The exit status of the command.
    """
    parser = argparse.ArgumentParser(
        prog="fastreg", description="Fast, exact regularisation for PyTorch training."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, text) in COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)  # the command has a --help of its own
    chosen, rest = parser.parse_known_args(argv)
    if not hasattr(fastreg, "patch"):
        print(
            f"fastreg: {fastreg.__file__} is another project's; {' '.join(_distribution.strangers())}",
            file=sys.stderr,
        )
        return 2
    if chosen.command in ONCE and os.environ.get("RANK", "0") != "0":
        return 0  # torchrun starts it on each rank, and the first does it
    module, _ = COMMANDS[chosen.command]
    return import_module(module).main(rest)
