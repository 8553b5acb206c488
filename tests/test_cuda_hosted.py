"""Kernels, launches and glue of the CUDA ops under sanitizers, compiled by the host's compiler; cases are in
cuda_hosted.py.
"""

import os
import subprocess
import sys
from pathlib import Path

import cuda_hosted
import pytest
from cuda_machine import hosted_library, sanitizers

OPS = ("dropout", "sgd", "cross_entropy", "fgsm", "augment")


@pytest.mark.parametrize("order", ["forward", "reverse", "random:7"])
@pytest.mark.parametrize("case", [case.__name__ for case in cuda_hosted.CASES])
def test_the_results_of_the_cpu_and_no_fault(case, order):
    """`order`: in which the threads of a block go on, where a missing barrier would show."""
    result = subprocess.run(
        [sys.executable, Path(__file__).with_name("cuda_hosted.py"), hosted_library(OPS), case],
        capture_output=True,
        text=True,
        env={**os.environ, **sanitizers(), "CUDAHOST_ORDER": order},
    )
    assert result.returncode == 0 and f"done: {case}" in result.stdout, (
        result.stdout[-2000:] + result.stderr[-6000:]
    )
    assert "runtime error" not in result.stderr and "cudahost:" not in result.stderr, result.stderr[-6000:]
