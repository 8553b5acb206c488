"""`make wheel-check`: the wheel in dist/ beside one torch after another, in environments of their own.

For each torch it makes an environment, installs that torch and the wheel as a user would, and runs
tests/wheel_smoke.py there, away from the checkout. It prints a table, a row per torch, and writes it into
docs/compatibility.md if asked to. The exit status is 1 if a check failed or torch was replaced.
"""

import argparse
import datetime
import os
import platform
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent
TORCHES = ("2.10.0", "2.11.0", "2.13.0", "newest")
HEAD = "| torch | autograd | modules | checks passed |\n|---|---|---|---|\n"
BEGIN, END = "<!-- make wheel-check writes this -->\n", "<!-- until here -->\n"


def main() -> int:
    options = _parser().parse_args()
    wheel = options.wheel or _only_wheel(ROOT / "dist")
    rows, bad = [], []
    for version in filter(None, re.split(r"[\s,]+", options.torches)):
        with tempfile.TemporaryDirectory() as folder:  # 7 GB for a torch with CUDA: gone before the next
            kept = options.cache.resolve() if options.cache else Path(folder)
            row, faults = check(wheel.resolve(), version, kept / f"torch-{version}")
        bad += [f"torch {version}: {fault}" for fault in faults]
        print(*(f"torch {version}: {fault}" for fault in faults), sep="\n", flush=True)
        rows.append(row)
    table = HEAD + "".join(f"{row}\n" for row in rows)
    print(table)
    if options.write:
        write(options.write, wheel, table)
    return bool(bad)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--wheel", type=Path, help="default: the one in dist/")
    parser.add_argument(
        "--torches",
        default=",".join(TORCHES),
        help="versions, with commas between; 'newest' is the index's (%(default)s)",
    )
    parser.add_argument(
        "--cache", type=Path, help="keep the environments in this folder, and take those that are there"
    )
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the table into this page")
    return parser


def _only_wheel(folder: Path) -> Path:
    found = sorted(folder.glob(f"torch_fastreg-*_{platform.machine()}.whl"))
    if len(found) != 1:
        sys.exit(
            f"{folder} must have one wheel for {platform.machine()}, has {len(found)}; run `make wheel`, or "
            f"name one by --wheel"
        )
    return found[0]


def check(wheel: Path, version: str, folder: Path) -> tuple[str, list[str]]:
    """(the row of the table, what is wrong) for one torch, in the environment `folder`."""
    python = folder / "bin/python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    before = _torch(python)
    if version == "newest" or before.split("+")[0] != version:
        wanted = "torch" if version == "newest" else f"torch=={version}"
        failed = _pip(python, "--upgrade", wanted)
        if failed:
            return f"| {version} | – | – | not installed |", [f"cannot be installed: {failed}"]
        before = _torch(python)
    failed = _pip(python, "--force-reinstall", "--no-deps", str(wheel)) or _pip(python, str(wheel))
    if failed:
        return f"| {before} | – | – | not installed |", [f"the wheel cannot be installed: {failed}"]
    faults = [f"installing the wheel made it {_torch(python)}"] if _torch(python) != before else []
    # -I: neither the checkout nor the user's packages are found.
    done = subprocess.run(
        [str(python), "-I", str(ROOT / "tests/wheel_smoke.py")],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "FASTREG_AUTOGRAD": ""},
    )
    lines = done.stdout.splitlines()
    rows = [line for line in lines if line.startswith("| ")]
    faults += [line for line in lines if line.startswith("FAILED")]
    if not any(line.startswith("fastreg ") and f"of {folder}" in line for line in lines):
        faults.append(f"another fastreg than the wheel's ran, or none: {(lines or ['nothing said'])[-1]}")
    if done.returncode and not faults:
        faults.append(f"exit status {done.returncode}")
    if not rows:
        return f"| {before} | – | – | did not end |", [*faults, done.stderr[-2000:]]
    return rows[-1], faults


def _torch(python: Path) -> str:
    """The version of the torch that is installed; empty if none is."""
    code = "import importlib.metadata as m; print(m.version('torch'))"
    return subprocess.run([str(python), "-I", "-c", code], capture_output=True, text=True).stdout.strip()


def _pip(python: Path, *arguments: str) -> str:
    """Install; empty, or why it failed. pip is as the user has set it up, but for constraints, which may hold
    back a torch that is to be tried.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as nothing:
        print("# no constraint", file=nothing, flush=True)
        done = subprocess.run(
            [str(python), "-m", "pip", "install", "-q", "--no-cache-dir", *arguments],
            capture_output=True,
            text=True,
            env={**os.environ, "PIP_CONSTRAINT": nothing.name},
        )
    return "" if done.returncode == 0 else (done.stderr.strip() or "no reason given").splitlines()[-1]


def write(page: Path, wheel: Path, table: str) -> None:
    """Put the table between the two marks of a page, with what ran, where and when."""
    text = page.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        sys.exit(f"{page} must have one line {BEGIN.strip()!r} and one {END.strip()!r}")
    libc = " ".join(platform.libc_ver())
    ran = (
        f"{datetime.date.today()}, `{wheel.name}`, CPython {platform.python_version()}, "
        f"{platform.machine()}, {libc}:"
    )
    head, rest = text.split(BEGIN)
    page.write_text(f"{head}{BEGIN}{ran}\n\n{table}{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    sys.exit(main())
