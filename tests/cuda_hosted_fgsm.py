"""The operators of FGSM and PGD, for tests/cuda_hosted.py."""

import itertools

import torch
from cuda_hosted import CPU, numbers, same, views
from cuda_machine import DTYPES


def check(cuda):
    # No element, one, odd sides, whole words, and images with channels.
    for dtype, shape in itertools.product(DTYPES, ((0,), (1,), (7, 37), (33, 64), (2, 3, 5, 8))):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        for x, grad in zip(views(numbers(shape, dtype)), views(numbers(shape, dtype, 1)), strict=True):
            bounds = [None]
            if x.dim() > 1:
                bounds.append(torch.rand(shape[-1:], dtype=wide))
                bounds.append(torch.rand((shape[-2], 1), dtype=wide))
            for upper in bounds:
                args = (0.1, -1.0, 0.7, None, None, upper)
                same(cuda.fgsm_step(x, grad, *args), CPU.fgsm_step(x, grad, *args), (dtype, shape, upper))
                args = (x.neg(), 0.1, 0.2, -1.0, 0.7, None, upper, None, None)
                same(cuda.pgd_step(x, grad, *args), CPU.pgd_step(x, grad, *args), (dtype, shape, upper))
