"""The check of the example for tests/test_properties.py.

Here belong one check for each operator, which draws its arguments from hypothesis by the functions of
property_cases.py and compares with the definition in plain torch, in float64; CHECKS, by the operators'
names; and WITHOUT_DERIVATIVE, which operators tests/derivative_cases.py has no case of, and why.
"""

import math

from helpers import DTYPES
from property_cases import assert_near, one_of, op, plain, shape, tensor, unchanged

from fastreg import _example  # noqa: F401  It declares the operator.


def example(draw):
    x, factor = tensor(draw, shape(draw), one_of(draw, *DTYPES)), one_of(draw, 0.3, -2.0, 0.0, math.inf, 1e30)
    with unchanged(x):
        got = op("example")(x, factor)
    want = plain("example")(x.double(), factor)
    assert_near(got, want, want)


CHECKS = {"example": example}
WITHOUT_DERIVATIVE = {"example": "tests/test_example_op.py has its derivatives"}
