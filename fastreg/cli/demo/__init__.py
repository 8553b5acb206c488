"""`fastreg demo`: every method on real data, in plain PyTorch and with fastreg, with a report to look at."""

import argparse
import json
import sys

from ..common import INTERRUPTED, UsageError, positive, writable_folder, write

QUICK_EPOCHS, FULL_EPOCHS = 12, 30


def main(argv: list[str] | None = None) -> int:
    """Run the demo with the command line arguments `argv`.

    Returns:
        0 if the run completed, whichever claims held; 2 for unusable data or options; 130 if it was interrupted, with a
        partial report of the trainings that had finished.
    """
    options = _parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that cannot show ✓ shows ?
    try:
        return _run(options)
    except KeyboardInterrupt:  # before the training began or while the report was being written
        print("\nfastreg demo: interrupted", file=sys.stderr)
        return INTERRUPTED
    except ModuleNotFoundError as error:
        if error.name not in ("matplotlib", "PIL", "rich"):
            raise
        print(f'fastreg demo: {error.name} is missing; run: pip install "fastreg[demo]"', file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastreg demo", description=__doc__.split(": ", 1)[1])
    parser.add_argument(
        "--data",
        metavar="FILE.npz|FOLDER",
        help="your own examples: an .npz file with arrays X and y, or a folder with one folder of images per class "
        "(default: 5,000 handwritten digits)",
    )
    parser.add_argument("--out", metavar="FOLDER", default="report", help="where the report goes (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="one seed and fewer epochs: under half a minute")
    parser.add_argument("--seeds", type=positive, metavar="N", help="repetitions (default: 3; with --quick 1)")
    parser.add_argument(
        "--threads",
        type=positive,
        metavar="N",
        default=1,
        help="CPU threads (default: 1; the network is small, more threads gain little and wait for each other on a busy machine)",
    )
    return parser


def _run(options: argparse.Namespace) -> int:
    import torch

    from . import data, progress, report, results, train

    seeds = options.seeds or (1 if options.quick else 3)
    epochs = QUICK_EPOCHS if options.quick else FULL_EPOCHS
    torch.set_num_threads(options.threads)
    try:
        folder = writable_folder(options.out)
        examples = data.load(options.data)
    except UsageError as error:
        print(f"fastreg demo: {error}", file=sys.stderr)
        return 2

    view = progress.Progress(examples, train.RECIPES, seeds, epochs)
    runs, interrupted = [], False
    try:
        with view:
            for seed in range(seeds):  # the outer loop, so that an early Ctrl-C leaves a seed of every method
                for recipe in train.RECIPES:
                    for pair in train.train(examples, recipe, seed, epochs):
                        view.epoch(recipe, pair)
                    runs += pair
                    view.finished(recipe, pair)
    except KeyboardInterrupt:
        interrupted = True

    settings = {"seeds": seeds, "epochs": epochs, "quick": options.quick, "data": options.data}
    measured = results.assemble(examples, runs, settings, planned=2 * seeds * len(train.RECIPES))
    try:
        write(folder / "results.json", json.dumps(results.jsonable(measured), indent=1) + "\n")
        write(folder / "index.html", report.page(measured, runs))
    except OSError as error:
        print(f"fastreg demo: the report cannot be written ({error}); choose another folder with --out", file=sys.stderr)
        return 2
    view.summary(measured, folder / "index.html")
    return INTERRUPTED if interrupted else 0
