"""The operator of dropout_add, for tests/cuda_hosted.py."""

import itertools

import torch
from cuda_hosted import CPU, numbers, same, views
from cuda_machine import DTYPES


def check(cuda):
    seed = torch.tensor([77])
    # No row, one element, odd sides, and whole words.
    for dtype, shape in itertools.product(DTYPES, ((0, 3), (1, 1), (7, 37), (33, 64))):
        bias = numbers(shape[-1:], dtype, 2)
        for x, residual in zip(views(numbers(shape, dtype)), views(numbers(shape, dtype, 1)), strict=True):
            for given in (None, bias):
                args = (x, residual, given, 0.4, seed, 1 / 0.6)
                for ours, theirs in zip(cuda.dropout_add(*args), CPU.dropout_add(*args), strict=True):
                    same(ours, theirs, (dtype, shape, given is None))
