"""`make wheel-merge WHEELS="one.whl another.whl"`: the wheels of several CPythons as one file.

The compiled modules have the CPython in their names and lie side by side; everything else must be the same in
all of them. The tag of the new file lists these CPythons, so that pip installs it for them and no other.
"""

import argparse
import calendar
import hashlib
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
COMPILED = re.compile(r"(\w+)\.cpython-\w+-[\w-]+\.so")
OWN = ("RECORD", "WHEEL")  # what each wheel says of itself


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wheels", type=Path, nargs="+", help="one for each CPython, of one version")
    out = ROOT / "dist/merged"  # `make wheel` keeps one file for each architecture in dist/
    parser.add_argument("--out", type=Path, default=out, help="the folder for it (%(default)s)")
    options = parser.parse_args()
    made = merge(options.wheels, options.out)
    sha256 = hashlib.sha256(made.read_bytes()).hexdigest()
    print(f"{made}: {made.stat().st_size / 2**20:.1f} MiB, sha256 {sha256}")
    return 0


def merge(wheels: list[Path], out: Path) -> Path:
    """Write the wheel that has the modules of all of them into the folder `out`."""
    for first, other in itertools.combinations(wheels, 2):
        if fault := _difference(first, other):
            sys.exit(f"{other.name} does not fit {first.name}: {fault}")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary, zipfile.ZipFile(wheels[0]) as archive:
        packed = Path(temporary) / "packed"
        packed.mkdir()
        for wheel in wheels:  # into one folder, which is named by distribution and version
            _wheel("unpack", "--dest", f"{temporary}/unpacked", str(wheel))
        (folder,) = (Path(temporary) / "unpacked").iterdir()
        (told,) = folder.glob("*.dist-info/WHEEL")
        tags = [f"Tag: {tag}" for wheel in wheels for tag in _tags(wheel)]
        lines = [line for line in told.read_text().splitlines() if line and not line.startswith("Tag: ")]
        told.write_text("\n".join([*lines, *tags]) + "\n")
        # The dates are those of the first, so that the same wheels give the same bytes.
        date = calendar.timegm((*archive.infolist()[0].date_time, 0, 0, 0))
        _wheel("pack", "--dest-dir", str(packed), str(folder), SOURCE_DATE_EPOCH=str(date))
        (made,) = packed.iterdir()
        return Path(shutil.copy2(made, out))


def _wheel(*arguments: str, **environment: str) -> None:
    command = [sys.executable, "-m", "wheel", *arguments]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, **environment})


def _tags(wheel: Path) -> list[str]:
    """Each tag that a wheel's name stands for."""
    pythons, abis, platforms = (part.split(".") for part in wheel.stem.split("-")[-3:])
    return [f"{python}-{abi}-{where}" for python in pythons for abi in abis for where in platforms]


def _difference(first: Path, other: Path) -> str:
    """Why two wheels cannot be one, or nothing."""
    one, two = first.stem.split("-"), other.stem.split("-")
    if (one[:2], one[-1]) != (two[:2], two[-1]):
        return "another version or platform"
    if set(_tags(first)) & set(_tags(other)):
        return "the same CPython"
    with zipfile.ZipFile(first) as a, zipfile.ZipFile(other) as b:
        parts = [{name: COMPILED.fullmatch(Path(name).name) for name in part.namelist()} for part in (a, b)]
        # Not every torch has a wheel for every CPython, so that the C++ autograd of some may be missing.
        modules = [{m[1] for m in part.values() if m and "_autograd_" not in m[1]} for part in parts]
        if modules[0] != modules[1]:
            return f"only one of them has {', '.join(sorted(modules[0] ^ modules[1]))}"
        texts = [{name for name, m in part.items() if not m and Path(name).name not in OWN} for part in parts]
        differ = texts[0] ^ texts[1] or {name for name in texts[0] if a.read(name) != b.read(name)}
    return f"{min(differ)} is another" if differ else ""


if __name__ == "__main__":
    sys.exit(main())
