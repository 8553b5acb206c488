"""`fastreg bench`: speed and memory of every op against torch and torch.compile, on this machine."""

import argparse
import datetime
import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from fastreg import _distribution
from fastreg.cli import doctor
from fastreg.cli.common import INTERRUPTED, UsageError, positive, writable_folder, write

from . import _timing, contribution, load, machine, ops, table

SCHEMA = 1  # of results.json
SECONDS = {"full": 3.0, "quick": 0.6, "tiny": 0.01}  # of measuring, for a usual case

# Memory that a process gives back to the system and fetches again at each call costs more time than the work
# on it. glibc reads these variables when a process starts.
ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
    "MALLOC_TOP_PAD_": str(2**28),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmarks with the command line arguments `argv`.

    Returns:
        0 if all cases ran, whatever they reached; 1 if one failed or its result was wrong; 2 for unusable
        options; 130 if it was interrupted, with the rows that had finished.
    """
    options = _parser(ops()).parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that cannot show ✓ shows ?
    try:
        if options.markdown:
            return _markdown(options.markdown)
        if isinstance(options.contribute, str):
            return _contribute(_read("--contribute", options.contribute), Path(options.contribute).parent)
        _check_device(options.device)
        _check_ops(options.ops, ops())
        if options.device == "cpu" and sys.platform == "linux" and not _memory_is_kept():
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **ALLOCATOR})
        return _run(options)
    except UsageError as error:
        print(f"fastreg bench: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before the first case or while the pictures were being drawn
        print("\nfastreg bench: interrupted", file=sys.stderr)
        return INTERRUPTED
    except ModuleNotFoundError as error:
        if error.name not in ("matplotlib", "rich"):
            raise
        print(
            f"fastreg bench: {error.name} is missing; run: {_distribution.install('bench')}", file=sys.stderr
        )
        return 2


def _parser(known: list[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastreg bench", description=__doc__.split(": ", 1)[1])
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="where the ops run (default: %(default)s)"
    )
    parser.add_argument(
        "--threads",
        type=positive,
        metavar="N",
        help="CPU threads (default: 1; whole training steps: 2 where there are as many)",
    )
    parser.add_argument(
        "--ops",
        type=lambda text: [name.strip() for name in text.split(",") if name.strip()],
        metavar="NAME,...",
        default=known,
        help=f"some of {', '.join(known)} (default: all)",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="without the largest sizes and without torch.compile: about two minutes",
    )
    parser.add_argument(
        "--no-compile", action="store_true", help="do not time torch.compile, which has to compile each case"
    )
    parser.add_argument(
        "--out", metavar="FOLDER", default="bench", help="where the results go (default: %(default)s)"
    )
    parser.add_argument(
        "--markdown", metavar="FILE.json", help="only print the table of earlier results as Markdown"
    )
    parser.add_argument(
        "--contribute",
        nargs="?",
        const=True,
        metavar="FILE.json",
        help="also write the results without anything personal, for benchmarks/results/; of earlier results "
        "with their file",
    )
    # For the tests: the numbers mean nothing.
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    return parser


def _check_device(device: str) -> None:
    cuda = doctor.collect()["cuda"]
    if device == "cuda" and not cuda["usable"]:
        raise UsageError(f"--device cuda: {cuda['why_not']}; or run with --device cpu")


def _check_ops(names: list[str], known: list[str]) -> None:
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise UsageError(f"--ops: expected some of {', '.join(known)}, got {', '.join(unknown) or 'nothing'}")


def _memory_is_kept() -> bool:
    return all(os.environ.get(name) == value for name, value in ALLOCATOR.items())


def _run(options: argparse.Namespace) -> int:
    from . import figures, view  # which need matplotlib and rich

    # What is asked for.
    folder = writable_folder(options.out)
    scale = "tiny" if options.tiny else "quick" if options.quick else "full"
    compiled = not (options.no_compile or options.quick)
    cases = [case for op in options.ops for case in load(op).cases(scale)]
    torch.set_num_threads(options.threads or 1)
    if compiled:
        torch._logging.set_logs(all=logging.ERROR)  # its remarks would be written across the bar
    # What the file holds before the first case.
    results = {
        "schema": SCHEMA,
        "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "machine": machine.describe(options.device, memory_kept=_memory_is_kept()),
        "settings": {
            "device": options.device,
            "threads": options.threads or 1,
            "ops": options.ops,
            "scale": scale,
            "compile": compiled,
        },
        "copy_bandwidth": _timing.Clock(options.device).copy_bandwidth(
            2**20 if options.tiny else _timing.COPY
        ),
        "rows": [],
        "failed": [],
        "planned": len(cases),
        "partial": True,
    }
    # The cases, each written as soon as it is measured, so that an interrupted run keeps what it has.
    began = time.monotonic()
    progress = view.Progress(results, len(cases))
    try:
        with progress:
            for case in cases:
                progress.begins(case)
                try:
                    row = _timing.measure_case(
                        case,
                        options.device,
                        seconds=SECONDS[scale],
                        threads=options.threads,
                        compiled=compiled,
                        bandwidth=results["copy_bandwidth"],
                    )
                except Exception as error:  # one case must not cost the others their results
                    message = (
                        str(error)
                        if isinstance(error, _timing.WrongResult)
                        else f"{case.name}: {type(error).__name__}: {error}"
                    )
                    results["failed"].append({"op": case.op, "case": case.name, "error": message})
                    progress.failed(message)
                else:
                    results["rows"].append(row)
                    progress.finished(row)
                _write(folder / "results.json", json.dumps(results, indent=1) + "\n")
        results["partial"] = False
    except KeyboardInterrupt:
        pass
    # The table and the pictures.
    results["seconds"] = time.monotonic() - began
    results["machine"]["load_after"] = machine.load()
    _write(folder / "results.json", json.dumps(results, indent=1) + "\n")
    _write(folder / "table.md", table.markdown(results))
    written = ["results.json", "table.md"]
    for name, picture in figures.pictures(results):
        _write(folder / name, picture)
        written.append(name)
    progress.summary(results, folder, written)
    if options.contribute and not results["partial"]:
        _contribute(results, folder)
    return INTERRUPTED if results["partial"] else 1 if results["failed"] else 0


def _write(path: Path, content: str | bytes) -> None:
    try:
        write(path, content)
    except OSError as error:
        raise UsageError(f"{path} cannot be written ({error}); choose another folder with --out") from error


def _markdown(name: str) -> int:
    print(table.markdown(_read("--markdown", name)), end="")
    return 0


def _contribute(results: dict, folder: Path) -> int:
    try:
        made = contribution.contribution(results)
    except contribution.NotAContribution as error:
        raise UsageError(f"--contribute: {error}") from error
    path = folder / contribution.file_name(made)
    _write(path, json.dumps(made, indent=1) + "\n")
    print(
        f"{path} names the processor and the software, and no host, user or path; it belongs into "
        "benchmarks/results/"
    )
    return 0


def _read(option: str, name: str) -> dict:
    try:
        results = json.loads(Path(name).expanduser().read_text(encoding="utf-8"))
        if not isinstance(results, dict) or results.get("schema") != SCHEMA:
            raise ValueError(f"expected results of schema {SCHEMA}")
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{option}: {name} cannot be read as results ({error}); give a results.json that `fastreg "
            f"bench` wrote"
        ) from error
    return results
