"""The operators of dropout, for tests/cuda_hosted.py."""

import itertools

import torch
from cuda_hosted import CPU, numbers, same, views
from cuda_machine import DTYPES


def check(cuda):
    seed = torch.tensor([77])
    like = torch.empty(0)
    for decisions, columns, row in (
        (0, 1, 1),
        (1, 1, 5),
        (63, 3, 7),
        (64, 5, 5),
        (1000, 41, 50),
        (999, 0, 0),
    ):
        for offset in (0, 3, 2**61 + 5):
            arguments = like, decisions, 0.3, seed, offset, columns, row
            same(cuda.dropout_mask(*arguments), CPU.dropout_mask(*arguments), arguments[1:])
    # No element, one, odd sides, and whole words.
    for dtype, shape in itertools.product(DTYPES, ((0,), (1,), (7, 37), (33, 64))):
        for x in views(numbers(shape, dtype)):
            for p, offset in ((0.4, 0), (0.0, 5), (1.0, 3)):
                ours, mask = cuda.dropout(x, p, seed, offset, 1, 1 / 0.6, 0.0, 0.0)
                theirs, their_mask = CPU.dropout(x, p, seed, offset, 1, 1 / 0.6, 0.0, 0.0)
                same(ours, theirs, (dtype, shape, p, offset))
                same(mask, their_mask, (dtype, shape, p, offset))
            same(cuda.dropout_apply(x, mask, 1, 2.0), CPU.dropout_apply(x, mask, 1, 2.0), (dtype, shape))
            if x.dim() == 2:
                inner = x.shape[1]
                args = (x, 0.5, seed, 0, inner, 0.9, 0.1, -1.0)
                for ours, theirs in zip(cuda.dropout(*args), CPU.dropout(*args), strict=True):
                    same(ours, theirs, (dtype, shape, "inner"))
            ours, theirs = x.clone(), x.clone()
            same(cuda.dropout_(ours, 0.3, seed), CPU.dropout_(theirs, 0.3, seed), (dtype, shape, "in place"))
            same(ours, theirs, (dtype, shape, "in place"))
