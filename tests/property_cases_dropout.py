"""Checks of dropout's operators for tests/test_properties.py."""

import math

import numpy as np
import torch
from helpers import DTYPES, assert_same_bits
from hypothesis import strategies as st
from property_cases import (
    Written,
    assert_near,
    doubled,
    one_of,
    op,
    plain,
    random_of,
    seed,
    shape,
    tensor,
    unchanged,
    values,
)

import fastreg as fr


def constants(draw):
    """(p, seed, offset, inner's share, scale, shift, dropped)."""
    p = draw(st.floats(0, 1) | st.sampled_from([0.0, 1.0, 0.5, 0.1, 1e-9, 1 - 1e-9]))
    return p, one_of(draw, 1.0, 1 / 0.7, 1e-30, 1e30), one_of(draw, 0.0, 0.3), one_of(draw, 0.0, -1.1)


def dropout_arguments(draw, x):
    p, scale, shift, dropped = constants(draw)
    inner = one_of(draw, 1, max(math.prod(x.shape[1:]), 1), x.shape[-1] if x.dim() and x.shape[-1] else 1)
    offset = one_of(draw, 0, 1, 7, 8, 2**32 - 3, 2**62 + 5)
    return p, seed(draw), offset, inner, scale, shift, dropped


def assert_dropped(got, x, kept, constants):
    """By the definition in float64; and the plain definition's bits, the sign of a zero among them."""
    inner, scale, shift, dropped = constants
    want = plain("dropout_apply")(x.double(), kept, inner, scale, shift, dropped)
    size = plain("dropout_apply")(x.double().abs(), kept, inner, scale, abs(shift), abs(dropped))
    assert_near(got, want, size)
    assert_same_bits(got, plain("dropout_apply")(x, kept, inner, scale, shift, dropped), "plain")


def dropout(draw):
    dtype = one_of(draw, *DTYPES)
    x = tensor(draw, shape(draw), dtype)
    arguments = dropout_arguments(draw, x)
    with unchanged(x):
        got, mask = op("dropout")(x, *arguments)
    assert got.stride() == torch.empty_like(x).stride()
    assert_same_bits(mask, plain("dropout")(x.double(), *arguments)[1], "mask")
    assert_dropped(got, x, mask, arguments[3:])


def dropout_in_place(draw):
    dtype = one_of(draw, *DTYPES)
    x = values(draw, shape(draw), dtype)
    written = Written(draw, x)
    arguments = dropout_arguments(draw, x)
    mask = op("dropout_")(written.tensor, *arguments)
    assert_same_bits(mask, plain("dropout")(x.double(), *arguments)[1], "mask")
    assert_dropped(written.tensor, x, mask, arguments[3:])
    written.check()


def dropout_mask(draw):
    """Of rows, the decisions that a mask of the whole tensor has in those places."""
    decisions, columns, gap = (draw(st.integers(0, 70)), draw(st.integers(1, 40)), draw(st.integers(0, 20)))
    p, at = constants(draw)[0], seed(draw)
    offset = one_of(draw, 0, 1, 7, 8, 2**32 - 3, 2**62 + 5)
    like = torch.empty(0)
    row = columns + gap
    got = op("dropout_mask")(like, decisions, p, at, offset, columns, row)
    rows = -(-decisions // columns)
    whole = op("dropout")(torch.ones(rows * row), p, at, offset)[1]
    want = fr.unpack_mask(whole, (rows, row))[:, :columns].reshape(-1)[:decisions]
    assert_same_bits(got, fr.pack_mask(want), "mask")
    assert_same_bits(got, plain("dropout_mask")(like, decisions, p, at, offset, columns, row), "plain")
    neighbours = op("dropout_mask")(like, rows * row, p, at, offset)
    assert_same_bits(neighbours, whole, "one row")
    assert_same_bits(neighbours, plain("dropout_mask")(like, rows * row, p, at, offset), "plain, one row")


def dropout_apply(draw):
    dtype = one_of(draw, *DTYPES)
    x = tensor(draw, shape(draw), dtype)
    _, scale, shift, dropped = constants(draw)
    inner = one_of(draw, 1, max(math.prod(x.shape[1:]), 1))
    mask = torch.from_numpy(random_of(draw).integers(0, 256, -(-(x.numel() // inner) // 8), dtype=np.uint8))
    with unchanged(x, mask):
        got = op("dropout_apply")(x, mask, inner, scale, shift, dropped)
    assert_dropped(got, x, mask, (inner, scale, shift, dropped))


def dropout_add(draw):
    dtype = one_of(draw, *DTYPES)
    size = shape(draw)
    x, residual = tensor(draw, size, dtype), tensor(draw, size, dtype)
    bias = values(draw, size[-1:], dtype) if size and draw(st.booleans()) else None
    arguments = (constants(draw)[0], seed(draw), one_of(draw, 1.0, 1 / 0.7, 1e30))
    with unchanged(x, residual, bias):
        got, mask = op("dropout_add")(x, residual, bias, *arguments)
    want, kept = plain("dropout_add")(*doubled(x, residual, bias), *arguments)
    assert_same_bits(mask, kept, "mask")
    large = [t if t is None else t.abs() for t in doubled(x, residual, bias)]
    assert_near(got, want, plain("dropout_add")(*large, *arguments)[0])


CHECKS = {
    "dropout": dropout,
    "dropout_": dropout_in_place,
    "dropout_apply": dropout_apply,
    "dropout_mask": dropout_mask,
    "dropout_add": dropout_add,
}
WITHOUT_DERIVATIVE = {"dropout_apply": "a part of the backward pass", "dropout_mask": "draws"}
