"""The operator of AdamW, for tests/cuda_hosted.py."""

import random

import torch
from adamw_reference import NAMES, step_case
from cuda_hosted import CPU, same


def check(cuda):
    torch.manual_seed(4)
    choose = random.Random(4).choice
    for _ in range(24):
        # No element, one, odd sides, whole words, and no dimension.
        lists, options = step_case(choose, ((0,), (1,), (7, 37), (33, 64), ()))
        states = []
        for ops in (cuda, CPU):
            states.append([[t.clone() for t in tensors] for tensors in lists])
            ops.adamw_(*states[-1], **options)
        for name, mine, theirs in zip(NAMES, *states, strict=True):
            for a, b in zip(mine, theirs, strict=True):
                same(a, b, (name, options))
