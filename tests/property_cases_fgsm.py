"""Checks of the steps of attacks for tests/test_properties.py."""

import math

import torch
from helpers import DTYPES, assert_same_bits
from hypothesis import strategies as st
from property_cases import (
    assert_near,
    doubled,
    one_of,
    op,
    plain,
    random_of,
    shape,
    tensor,
    unchanged,
    wide_of,
)


def number(draw, x, least=0.0):
    """A number, or a tensor of them that broadcasts along x's channels, samples or elements."""
    size = one_of(draw, None, "channel", "sample", "element") if x.dim() >= 2 else None
    if size is None:
        return one_of(draw, 0.0, 0.1, 1e-30, 3.0) + least, None
    each = {"element": x.shape, "sample": x.shape[:1] + (1,) * (x.dim() - 1)}.get(
        size, (x.shape[1],) + (1,) * (x.dim() - 2)
    )
    random = torch.from_numpy(random_of(draw).random(each)).to(wide_of(x.dtype))
    return 0.0, random.expand(torch.broadcast_shapes(each, (1,) * x.dim())) + least


def as_double(pair):
    value, tensor = pair
    return torch.tensor(value, dtype=torch.float64) if tensor is None else tensor.double()


def numbers_of(x, *pairs):
    """What an operator takes: the numbers, then their tensors, in float32 for float32 arithmetic."""
    return [value for value, _ in pairs], [tensor for _, tensor in pairs]


def box(draw, x):
    if draw(st.booleans()):
        return (-math.inf, None), (math.inf, None)
    return number(draw, x, -1.0), number(draw, x, 2.5)


def size_of(*terms):
    return sum(torch.where(t.isfinite(), t.double().abs(), 0.0) for t in terms)


def fgsm_step(draw):
    dtype = one_of(draw, *DTYPES)
    size = shape(draw)
    x, grad = tensor(draw, size, dtype), tensor(draw, size, dtype)
    eps, (low, high) = number(draw, x), box(draw, x)
    (e, a, b), tensors = numbers_of(x, eps, low, high)
    with unchanged(x, grad):
        got = op("fgsm_step")(x, grad, e, a, b, *tensors)
    want = plain("fgsm_step")(x.double(), grad.double(), e, a, b, *doubled(*tensors))
    terms = [x, *(as_double(pair) for pair in (eps, low, high))]
    assert_near(got, want, size_of(*terms) + torch.zeros_like(want))
    assert_same_bits(got, plain("fgsm_step")(x, grad, e, a, b, *tensors), "plain")


def pgd_step(draw):
    dtype = one_of(draw, *DTYPES)
    size = shape(draw)
    x, grad, origin = (tensor(draw, size, dtype) for _ in range(3))
    alpha, eps, (low, high) = number(draw, x), number(draw, x), box(draw, x)
    (s, e, a, b), tensors = numbers_of(x, alpha, eps, low, high)
    with unchanged(x, grad, origin):
        got = op("pgd_step")(x, grad, origin, s, e, a, b, *tensors)
    want = plain("pgd_step")(*doubled(x, grad, origin), s, e, a, b, *doubled(*tensors))
    terms = [x, origin, *(as_double(pair) for pair in (alpha, eps, low, high))]
    assert_near(got, want, size_of(*terms) + torch.zeros_like(want))
    assert_same_bits(got, plain("pgd_step")(x, grad, origin, s, e, a, b, *tensors), "plain")


CHECKS = {"fgsm_step": fgsm_step, "pgd_step": pgd_step}
WITHOUT_DERIVATIVE = {
    "fgsm_step": "a step of an attack, which starts from a detached image",
    "pgd_step": "a step of an attack, which starts from a detached image",
}
