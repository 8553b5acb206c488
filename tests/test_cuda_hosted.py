"""Kernels, launches and glue of the CUDA ops under sanitizers, compiled by the host's compiler; the case of
an op is in cuda_hosted_<op>.py.
"""

import os
import subprocess
import sys
from pathlib import Path

import cuda_hosted
import pytest
from cuda_machine import hosted_library, sanitizers


@pytest.mark.parametrize("order", ["forward", "reverse", "random:7"])
@pytest.mark.parametrize("case", cuda_hosted.CASES)
def test_the_results_of_the_cpu_and_no_fault(case, order):
    """`order`: in which the threads of a block go on, where a missing barrier would show."""
    result = subprocess.run(
        [sys.executable, Path(__file__).with_name("cuda_hosted.py"), hosted_library(), case],
        capture_output=True,
        text=True,
        env={**os.environ, **sanitizers(), "CUDAHOST_ORDER": order},
    )
    assert result.returncode == 0 and f"done: {case}" in result.stdout, (
        result.stdout[-2000:] + result.stderr[-6000:]
    )
    assert "runtime error" not in result.stderr and "cudahost:" not in result.stderr, result.stderr[-6000:]
