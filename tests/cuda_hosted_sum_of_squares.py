"""The sum of squares, for tests/cuda_hosted.py."""

import torch
from cuda_hosted import numbers, views
from cuda_machine import DTYPES


def check(cuda):
    # No element, one, odd sides, whole words, and more than two chunks of 4096.
    shapes = ((0,), (1,), (7, 37), (33, 64), (9001,))
    for dtype in DTYPES:
        tensors = [view for shape in shapes for view in views(numbers(shape, dtype, 1).nan_to_num(1, 1, 1))]
        want = sum(t.double().square().sum() for t in tensors)
        torch.testing.assert_close(cuda.sum_of_squares(tensors).double(), want, rtol=1e-6, atol=0)
