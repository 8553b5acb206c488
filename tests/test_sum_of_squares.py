"""The sum of squares of many tensors: float64 within some roundings, the same bits for every thread count."""

import math
import random

import pytest
import torch
from helpers import DTYPES, threads

OP = torch.ops.fastreg.sum_of_squares.default


def exact(tensors):
    return sum((t.double().square().sum() for t in tensors), torch.zeros((), dtype=torch.float64))


# Around a vector of 16, four of them, a block of 1024 and the 2^15 elements of a piece of work.
@pytest.mark.parametrize("n", [0, 1, 15, 16, 63, 64, 65, 1023, 1025, 32767, 32769, 300_001])
def test_sizes(n, dtype):
    x = torch.randn(n).to(dtype)
    results = []
    for count in (1, 2, 5):
        with threads(count):
            results.append(OP([x]))
    wide = dtype == torch.float64
    assert len({float(r) for r in results}) == 1
    assert results[0].dtype == (torch.float64 if wide else torch.float32) and results[0].shape == ()
    torch.testing.assert_close(results[0].double(), exact([x]), rtol=1e-14 if wide else 1e-6, atol=0)


def test_many_tensors_of_mixed_dtype_and_layout():
    choose = random.Random(1).choice
    tensors = [torch.randn(choose((0, 1, 17, 300)), choose((1, 5))).to(choose(DTYPES)) for _ in range(200)]
    tensors += [torch.randn(40, 60)[::2, 1::3], torch.randn(7, 9).t(), torch.randn(3, 1).expand(3, 400)]
    got = OP(tensors)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, exact(tensors), rtol=1e-7, atol=0)


def test_special_values():
    assert OP([torch.tensor([1.0, math.nan])]).isnan()
    assert OP([torch.tensor([1.0, -math.inf])]) == math.inf
    assert OP([torch.tensor([2e19])]) == math.inf  # as torch's own norm
    assert OP([torch.tensor([65504.0]).half()]) == 65504.0**2


def test_refuses():
    with pytest.raises(ValueError, match="each tensor must be float32"):
        OP([torch.ones(3), torch.ones(3, dtype=torch.int32)])


def test_opcheck(dtype):
    torch.library.opcheck(OP, ([torch.randn(5).to(dtype), torch.randn(3, 4)],))
