"""Zero in place of numbers below float32's smallest normal one, which processors compute with 10 to 40 times
as slowly; csrc/common/flush.h in plain torch.
"""

from __future__ import annotations

import torch

SMALLEST_NORMAL = 2.0**-126


def flush(x: torch.Tensor) -> torch.Tensor:
    """Zero, of the same sign, where a float32 is subnormal; float64 as it is."""
    return x if x.dtype == torch.float64 else torch.where(x.abs() < SMALLEST_NORMAL, x * 0, x)


# The number below it in each dtype that has one.
_LARGEST_SUBNORMAL = {torch.float32: 2.0**-126 - 2.0**-149, torch.bfloat16: 2.0**-126 - 2.0**-133}


def flush_(x: torch.Tensor) -> torch.Tensor:
    """`flush` in place and in one pass."""
    largest = _LARGEST_SUBNORMAL.get(x.dtype)
    return x if largest is None else torch.hardshrink(x, largest, out=x)
