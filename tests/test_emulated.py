"""The wheel for 64-bit Arm on a machine that is none: tests/wheel_smoke.py under an emulator, with a Python
and a torch for that machine unpacked into a folder. Nothing is installed.

It downloads 300 MB and takes long, so it runs where it is asked for: pytest -m emulated.
"""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, run

EMULATOR = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
PYTHON = ".".join(map(str, sys.version_info[:2]))
# The oldest torch, whose wheel for that machine has no CUDA. What it needs is named here, because pip would
# take what it needs on this machine.
TORCH = (
    *("torch==2.10.0", "numpy", "typing_extensions", "sympy", "mpmath", "networkx"),
    *("jinja2", "markupsafe", "filelock", "fsspec"),
)
NEEDED = {
    "qemu-user-static": EMULATOR,
    "g++-aarch64-linux-gnu": shutil.which("aarch64-linux-gnu-g++"),
    "apt-get and dpkg-deb": shutil.which("apt-get") and shutil.which("dpkg-deb"),
    "auditwheel, which `make wheel` installs": importlib.util.find_spec("auditwheel"),
}

pytestmark = [
    pytest.mark.emulated,
    pytest.mark.skipif(platform.machine() != "x86_64", reason="only where aarch64 is another architecture"),
    pytest.mark.skipif(not all(NEEDED.values()), reason=f"needs {[n for n, t in NEEDED.items() if not t]}"),
]


def unpack_python(root, folder):
    """This Python as Debian builds it for the other machine. apt takes notes in `folder` alone."""
    for name in ("state/lists/partial", "cache/archives/partial"):
        (folder / name).mkdir(parents=True)
    (folder / "status").touch()
    settings = {
        "Dir::State": folder / "state",
        "Dir::State::status": folder / "status",
        "Dir::Cache": folder / "cache",
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
    }
    apt = ["apt-get", "-q", *(f"-o{name}={value}" for name, value in settings.items())]
    run(*apt, "update")
    wanted = (f"python{PYTHON}", "libstdc++6", "libgomp1")
    if subprocess.run([*apt, "-s", "install", *wanted], capture_output=True).returncode:
        pytest.skip(f"apt has no python{PYTHON} for arm64")
    run(*apt, "install", "-y", "--no-install-recommends", "--download-only", *wanted)
    for package in (folder / "cache/archives").glob("*.deb"):
        run("dpkg-deb", "-x", package, root)


def unpack_torch(site, folder):
    """torch for the other machine, whatever constraint holds back the one that is installed here."""
    (folder / "constraints.txt").touch()
    platforms = [f"--platform=manylinux_{glibc}_aarch64" for glibc in ("2_28", "2_27", "2_26", "2_17")]
    pip = (sys.executable, "-m", "pip", "install", "-q", "--no-compile", "--no-deps", "--only-binary=:all:")
    environment = {**os.environ, "PIP_CONSTRAINT": str(folder / "constraints.txt")}
    run(*pip, "--target", site, "--python-version", PYTHON, *platforms, *TORCH, env=environment)


def test_the_smoke_of_the_wheel_for_another_machine(tmp_path):
    root, site = tmp_path / "root", tmp_path / "site"
    unpack_python(root, tmp_path / "apt")
    unpack_torch(site, tmp_path)
    run(sys.executable, ROOT / "tools/wheel.py", "--arch", "aarch64", "--out", tmp_path / "dist")
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    shutil.unpack_archive(wheel, site, "zip")

    # Without a compiler for that machine inductor is not tried.
    environment = {"PATH": str(tmp_path), "HOME": str(tmp_path), "PYTHONPATH": str(site)}
    python = next(root.glob(f"usr/bin/python{PYTHON}"))
    smoke = Path(shutil.copy(ROOT / "tests/wheel_smoke.py", tmp_path))
    printed = run(EMULATOR, "-L", root, python, "-s", smoke, cwd=tmp_path, env=environment)
    print(printed)
    *_, where, row = printed.splitlines()
    assert where.endswith(f" of {site / 'fastreg'}") and row.startswith("| 2.10.0")
    assert "| Python | _C |" in row and int(row.split("/")[1].split()[0]) > 80
    left_out = [line for line in printed.splitlines() if "not run: " in line]
    assert all("no C++ compiler" in line or "GPU" in line for line in left_out), left_out
