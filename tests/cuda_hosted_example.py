"""The operator of the example, for tests/cuda_hosted.py.

Here belongs `check(cuda)`: it calls the operators of `cuda`, which are the CUDA kernels behind the checks of
example_op.cpp, and compares them with those of the CPU.
"""

import itertools

import torch
from cuda_hosted import CPU, numbers, same, views
from cuda_machine import DTYPES

from fastreg import _example  # noqa: F401


def check(cuda):
    # No dimension, no element, one, odd sides, and whole words.
    for dtype, shape in itertools.product(DTYPES, ((), (0,), (1,), (7, 37), (33, 64))):
        for x in views(numbers(shape, dtype)):
            same(cuda.example(x, 0.3), CPU.example(x, 0.3), (dtype, shape))
    try:
        cuda.example(torch.ones(3), float("nan"))
    except ValueError:
        return
    raise AssertionError("a NaN was not refused")
