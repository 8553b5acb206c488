"""The command `fastreg`: doctor, bench and demo."""

import argparse


def main(argv=None):
    """Run `fastreg COMMAND ...`; gives the exit status."""
    parser = argparse.ArgumentParser(
        prog="fastreg", description="Fast, exact regularisation for PyTorch training."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser(
        "doctor", help="what was built, what is loaded, what this machine can run", add_help=False
    )
    commands.add_parser(
        "bench", help="speed and memory against torch and torch.compile, on this machine", add_help=False
    )
    commands.add_parser("demo", help="every method on real data, with a report to look at", add_help=False)
    command, rest = parser.parse_known_args(argv)
    if command.command == "doctor":
        from . import doctor as run
    elif command.command == "bench":
        from . import bench as run
    else:
        from . import demo as run
    return run.main(rest)
