"""`fastreg demo`: every method on real data, in plain PyTorch and with fastreg, with a report to look at."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib import import_module

from fastreg import _distribution
from fastreg.cli.common import INTERRUPTED, UsageError, positive, writable_folder, write

QUICK_EPOCHS, FULL_EPOCHS = 12, 30


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo with the command line arguments `argv`.

    Returns:
        0 if the run completed, whichever claims held; 2 for unusable data or options; 130 if it was
        interrupted, with a partial report of the trainings that had finished.
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
        if error.name not in ("matplotlib", "PIL", "rich", "sklearn"):
            raise
        name = {"sklearn": "scikit-learn"}.get(error.name, error.name)
        print(f"fastreg demo: {name} is missing; run: {_distribution.install('demo')}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastreg demo", description=__doc__.split(": ", 1)[1])
    parser.add_argument(
        "--data",
        metavar="FILE.npz|FOLDER",
        help="your own examples: an .npz file with arrays X and y, or a folder with one folder of images "
        "per class (default: 5,000 handwritten digits)",
    )
    parser.add_argument(
        "--out", metavar="FOLDER", default="report", help="where the report goes (default: %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="one seed and fewer epochs: under a minute")
    parser.add_argument(
        "--only",
        metavar="NAME,...",
        help="some sections of the report alone, by their names: --only dropout,l1",
    )
    parser.add_argument(
        "--seeds", type=positive, metavar="N", help="repetitions (default: 5; with --quick 1)"
    )
    parser.add_argument(
        "--threads",
        type=positive,
        metavar="N",
        default=1,
        help="CPU threads (default: 1; the network is small, more threads gain little and wait for each "
        "other on a busy machine)",
    )
    return parser


def _run(options: argparse.Namespace) -> int:
    import torch

    from . import data, progress, report, train
    from .results import Results
    from .section import Lab
    from .sections import SECTIONS

    seeds = options.seeds or (1 if options.quick else 5)
    epochs = QUICK_EPOCHS if options.quick else FULL_EPOCHS
    torch.set_num_threads(options.threads)
    try:
        sections = _chosen(options.only, SECTIONS)
        folder = writable_folder(options.out)
        examples = data.load(options.data)
        for package in {package: None for section in sections for package in section.packages}:
            import_module(package)  # asked for now rather than after minutes of work
    except UsageError as error:
        print(f"fastreg demo: {error}", file=sys.stderr)
        return 2

    settings = {
        "seeds": seeds,
        "epochs": epochs,
        "quick": options.quick,
        "data": options.data,
        **train.SETTINGS,
    }
    settings["sections"] = [section.key for section in sections]
    steps = len(report.recipes(sections)) + sum(section.measure is not None for section in sections)
    found = Results(examples, settings, report.titles(sections), planned=seeds * steps)
    view = progress.Progress(found, sections)
    interrupted = False
    try:
        with view:
            for seed in range(seeds):  # the outer loop, so that an early Ctrl-C leaves a seed of every method
                lab = Lab(examples, seed, epochs, options.quick, found)
                for section in sections:
                    _work(section, lab, view)
    except KeyboardInterrupt:
        interrupted = True

    try:
        claims = report.verdicts(found, sections)
        summary = report.summary(found, sections)
        flat = [{"section": key, **asdict(verdict)} for key, judged in claims.items() for verdict in judged]
        write(folder / "results.json", json.dumps(found.jsonable(flat, summary), indent=1) + "\n")
        write(folder / "index.html", report.page(found, sections))
    except OSError as error:
        print(
            f"fastreg demo: the report cannot be written ({error}); choose another folder with --out",
            file=sys.stderr,
        )
        return 2
    view.summary(claims, folder / "index.html")
    return INTERRUPTED if interrupted else 0


def _work(section, lab, view) -> None:
    """Train what the section needs and no section before it has trained with this seed, then take its
    measurements.
    """
    from . import train

    for recipe in section.trained:
        if (recipe.key, "fastreg") in lab.runs:
            continue
        for pair in train.train(lab.data, recipe, lab.seed, lab.epochs):
            view.epoch(section, lab.seed, recipe, pair)
        for run in pair:
            lab.runs[recipe.key, run.side.name] = run
            lab.results.add(run.record())
            if lab.seed == 0 and run.side is train.Fastreg:
                lab.results.runs[recipe.key] = run
        lab.results.finished += 1
        view.trained(section, lab.seed, recipe, pair)
    if section.measure is not None:
        for record in section.measure(lab):
            lab.results.add(record)
            view.measured(section, lab.seed, record)
        lab.results.finished += 1
    view.finished(section, lab.seed)


def _chosen(only: str | None, sections):
    """The sections named in --only, in the order of the lecture."""
    if only is None:
        return sections
    names = [name.strip() for name in only.split(",") if name.strip()]
    known = [section.key for section in sections]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        what = f"there is no section {', '.join(unknown)}" if unknown else "names no section"
        raise UsageError(f"--only: {what}; choose from {', '.join(known)}")
    return tuple(section for section in sections if section.key in names)
