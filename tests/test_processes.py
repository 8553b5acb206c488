"""Threads that call ops at once, loaders whose workers are forked or spawned, the end of the interpreter."""

import os
import subprocess
import sys

import process_cases
import pytest
from helpers import ROOT

from fastreg.cli import doctor


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_threads_workers_and_the_end():
    """One process for all, because each imports torch: the workers are forked after the ops' threads have
    started, and at the end tensors and graphs are alive, and a function of atexit calls an op.
    """
    command = [sys.executable, process_cases.__file__]
    environment = {**os.environ, "GOMP_SPINCOUNT": "0"}  # a waiting thread leaves the core to the others
    if doctor._gil() != "always":
        environment["PYTHON_GIL"] = "0"  # where triton, which torch imports with its compiler, switches it on
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr[-4000:])
    assert (
        done.stdout.split() == ["threads", "schedule", "fork", "spawn", "end", "True"] and not done.stderr
    ), done.stderr[-4000:]


@pytest.mark.skipif(doctor._gil() == "always", reason="this Python has a GIL for good")
def test_no_module_of_ours_switches_the_gil_on():
    """The kernels, and the C++ autograd where there is one for this torch."""
    code = "import sys, torch; print(sys._is_gil_enabled()); import fastreg; print(sys._is_gil_enabled())"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["False", "False"]


def test_every_module_says_that_it_needs_no_gil():
    """On every Python: one module that does not say so switches the GIL on where it could be off."""
    heads = [line for path in (ROOT / "csrc").rglob("*.cpp") for line in path.read_text().splitlines()]
    heads = [line for line in heads if line.startswith("PYBIND11_MODULE(")]
    assert len(heads) == 3 and all("mod_gil_not_used()" in line for line in heads), heads
