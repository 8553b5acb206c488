"""The operator `sum_of_squares`: of all elements of a list of tensors, in one read.

Its square root is the global norm of the gradients by which they are clipped (Pascanu, Mikolov, Bengio 2013).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ._checks import arithmetic_dtype, check_dtype
from ._registry import define


def _result_dtype(tensors: Sequence[torch.Tensor]) -> torch.dtype:
    double = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if double else torch.float32


def sum_of_squares_plain(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The operator: float32 of shape (), or float64 if one of the tensors is. A square of float32 that leaves
    its range, of 2e19 for example, gives inf.
    """
    for tensor in tensors:
        check_dtype("sum_of_squares", "each tensor", tensor)
    total = torch.zeros((), dtype=_result_dtype(tensors), device=tensors[0].device)
    for tensor in tensors:
        total = total + tensor.to(arithmetic_dtype(tensor)).square().sum()
    return total


define("sum_of_squares(Tensor[] tensors) -> Tensor", plain=sum_of_squares_plain)


@torch.library.register_fake("fastreg::sum_of_squares", allow_override=True)
def _(tensors):
    return tensors[0].new_empty((), dtype=_result_dtype(tensors))


sum_of_squares = torch.ops.fastreg.sum_of_squares.default
