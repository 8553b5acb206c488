"""The operator of SGD, for tests/cuda_hosted.py."""

import itertools

import torch
from cuda_hosted import CPU, numbers, same, views
from cuda_machine import DTYPES


def check(cuda):
    modes = (  # momentum, dampening, weight_decay, l1, ema, nesterov, proximal, decoupled, maximize
        (0.0, 0.0, 0.0, 0.0, 0.0, False, False, False, False),
        (0.9, 0.0, 0.1, 0.1, 0.9, True, False, False, True),
        (0.9, 0.5, 0.1, 0.1, 0.7, False, True, True, False),
    )
    # No element, one, odd sides, and a whole chunk of 2048 with a rest.
    shapes = ((0,), (1,), (7, 37), (33, 64))
    for dtype, (momentum, dampening, *mode) in itertools.product(DTYPES, modes):
        parts = [[view for shape in shapes for view in views(numbers(shape, dtype, k))] for k in range(4)]
        states = []
        for ops in (cuda, CPU):
            params, grads, buffers, averages = ([t.clone() for t in part] for part in parts)
            buffers = buffers if momentum else []
            started = [torch.tensor(float(i % 2)) for i in range(len(params))] if dampening else []
            averages = averages if mode[2] else []  # the first of them is empty, and lies nowhere
            counts = [torch.tensor(float(i % 3)) for i in range(len(averages))]
            lr, scale, overflow = torch.tensor(0.25), torch.tensor(64.0), torch.tensor(0.0)
            seed = torch.tensor([5]) if dtype == torch.bfloat16 else None
            ops.sgd_(
                params, grads, buffers, started, averages, counts, 0.0, momentum, dampening, *mode, lr, scale,
                overflow, None, None, seed,
            )  # fmt: skip
            states.append(params + buffers + started + averages + counts)
        for ours, theirs in zip(*states, strict=True):
            same(ours, theirs, (dtype, momentum, mode))
