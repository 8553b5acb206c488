"""The Makefile, in a checkout of a few files whose pip writes down what it is asked for: what is up to date
is left alone, and a checkout that has moved is told what to do.
"""

import os
import shutil
import subprocess

import pytest
from helpers import ROOT

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")

PYTHON = """#!/bin/sh
# `python -m venv .venv` makes a pip that notes its arguments; all else succeeds.
[ "$2" = venv ] || exit 0
mkdir -p .venv/bin
printf '#!/bin/sh\\necho "$*" >> asked\\n' > .venv/bin/pip
cp "$0" .venv/bin/python
chmod +x .venv/bin/pip
"""


@pytest.fixture
def checkout(tmp_path):
    folder = tmp_path / "a checkout"
    for name in ("CMakeLists.txt", "pyproject.toml", "csrc/op/op_cpu.cpp", "cmake/find.cmake"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    shutil.copy(ROOT / "Makefile", folder)
    (folder / "python").write_text(PYTHON)
    (folder / "python").chmod(0o755)
    return folder


def asked(checkout, *goals):
    """(what pip was asked for by `make *goals`, what make said and whether it failed)."""
    command = ("make", "PYTHON=./python", *goals)
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "FASTREG_", "TORCH_CUDA_"))}
    done = subprocess.run(command, cwd=checkout, env=env, capture_output=True, text=True)
    notes = checkout / "asked"
    lines = notes.read_text().splitlines() if notes.exists() else []
    notes.unlink(missing_ok=True)
    return lines, (done.stdout + done.stderr, done.returncode)


def make(checkout, *goals):
    lines, (said, failed) = asked(checkout, *goals)
    assert not failed, said
    return lines


def test_what_is_built_is_left_alone(checkout):
    first = make(checkout, "build")
    assert [line.split()[:2] for line in first] == [["install", "torch"], ["install", "--no-build-isolation"]]
    assert make(checkout, "build") == []
    lines, (said, _) = asked(checkout, "build")
    assert not lines and "Nothing to be done" in said
    # What is installed for the tests builds nothing again.
    extras = make(checkout, ".venv/.test")
    assert extras[0].endswith("-q -e .[demo,test]") and not any(line.endswith(" -e .") for line in extras)
    assert make(checkout, "build", ".venv/.test") == []


@pytest.mark.parametrize(
    "name", ("csrc/op/op_cpu.cpp", "cmake/find.cmake", "CMakeLists.txt", "pyproject.toml")
)
def test_what_has_changed_is_built(checkout, name):
    make(checkout, "build")
    new = (checkout / ".venv/.built").stat().st_mtime + 1
    os.utime(checkout / name, (new, new))
    (line,) = make(checkout, "build")
    assert line.endswith("-v -e .")


def test_another_torch_is_installed_and_built_for(checkout):
    make(checkout, "build")
    first, second = make(checkout, "build", "TORCH=torch==2.13.0")
    assert first.startswith("install torch==2.13.0 ") and second.endswith("-v -e .")
    assert make(checkout, "build", "TORCH=torch==2.13.0") == []


def test_a_checkout_that_has_moved_is_told_what_to_do(checkout):
    make(checkout, "build")
    moved = checkout.rename(checkout.with_name("moved"))
    for goal in ("build", "test", "lint"):
        lines, (said, failed) = asked(moved, goal)
        assert failed and not lines
        assert f".venv was made in {checkout} and does not work in {moved}; make clean, then make" in said
    make(moved, "clean")
    assert len(make(moved, "build")) == 2
