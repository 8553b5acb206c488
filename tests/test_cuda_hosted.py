"""Kernels, launches and glue of the CUDA ops under sanitizers, compiled by the host's compiler; the case of
an op is in cuda_hosted_<op>.py.
"""

import functools
import os
import subprocess
import sys
from pathlib import Path

import cuda_hosted
import pytest
from cuda_machine import hosted_library, sanitizers

ORDERS = ("forward", "reverse", "random:7")


@functools.cache
def every_case():
    """What all cases print in one process: to import torch under the sanitizers takes longer than a case."""
    program = [sys.executable, Path(__file__).with_name("cuda_hosted.py")]
    return subprocess.run(
        [*program, hosted_library(), ",".join(ORDERS), *cuda_hosted.CASES],
        capture_output=True,
        text=True,
        env={**os.environ, **sanitizers()},
    )


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", cuda_hosted.CASES)
def test_the_results_of_the_cpu_and_no_fault(case, order):
    """`order`: in which the threads of a block go on, where a missing barrier would show."""
    result = every_case()
    assert f"done: {case} {order}\n" in result.stdout, result.stdout[-2000:] + result.stderr[-6000:]
    assert "runtime error" not in result.stderr and "cudahost:" not in result.stderr, result.stderr[-6000:]
    if case == cuda_hosted.CASES[-1]:
        assert result.returncode == 0, result.stderr[-6000:]
