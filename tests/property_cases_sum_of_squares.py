"""The check of the sum of squares for tests/test_properties.py."""

import torch
from helpers import DTYPES
from hypothesis import strategies as st
from property_cases import one_of, op, plain, shape, tensor, unchanged


def sum_of_squares(draw):
    tensors = [
        tensor(draw, shape(draw), one_of(draw, *DTYPES), most=15) for _ in range(draw(st.integers(1, 3)))
    ]
    with unchanged(*tensors):
        got = op("sum_of_squares")(tensors)
    want = plain("sum_of_squares")(tensors)
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-37, equal_nan=True)


CHECKS = {"sum_of_squares": sum_of_squares}
WITHOUT_DERIVATIVE = {"sum_of_squares": "a part of the step of an optimiser"}
