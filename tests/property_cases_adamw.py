"""The check of AdamW for tests/test_properties.py."""

import itertools
import math

import torch
from helpers import DTYPES, assert_same_bits
from hypothesis import strategies as st
from property_cases import Written, one_of, op, plain, seed, shape, tensor, unchanged, values


def adamw(draw):
    """Every layout and hostile number: the bits of the definition, and nothing written beside the tensors."""
    form = amsgrad, average = draw(st.booleans()), draw(st.booleans())
    numbers = [one_of(draw, 0.0, 0.1, 1e-30), one_of(draw, 0.9, 0.0), one_of(draw, 0.999, 0.5)]
    numbers += [
        one_of(draw, 1e-8, 0.0),
        one_of(draw, 0.0, 0.01),
        one_of(draw, 0.0, 0.02),
        one_of(draw, 0.9, 0.1),
    ]
    choices = (None, 0.07), (None, 3.0), (None, 0.0, 1.0), (None, 0.3), (None, 0.8)
    given = [one_of(draw, *choice) for choice in choices]
    options = [draw(st.booleans()) for _ in range(3)]
    options += [None if value is None else torch.tensor(value) for value in given]
    options += [seed(draw) if draw(st.booleans()) else None]
    lists = [[] for _ in range(8)]
    for _ in range(draw(st.integers(1, 3))):
        dtype, size = one_of(draw, *DTYPES), shape(draw)
        for i in (0, 2, 3, *((4,) if form[0] else ()), *((6,) if form[1] else ())):
            lists[i].append(values(draw, size, dtype, most=30))
        lists[1].append(tensor(draw, size, dtype, most=30))
        lists[5].append(torch.tensor(one_of(draw, 0.0, 3.0, math.inf)))
        lists[7].extend([torch.tensor(one_of(draw, 0.0, 1.0))] if average else [])
    assert bool(lists[4]) == amsgrad
    written = {i: [Written(draw, t) for t in lists[i]] for i in (0, 2, 3, 4, 6)}
    counts = {i: [t.clone() for t in lists[i]] for i in (5, 7)}
    got = [[w.tensor for w in written[i]] if i in written else counts.get(i, lists[1]) for i in range(8)]
    with unchanged(*lists[1]):
        op("adamw_")(*got, *numbers, *options)
    want = [[t.clone() for t in group] for group in lists]
    plain("adamw_")(*want, *numbers, *options)
    for i in range(8):
        for mine, theirs in zip(got[i], want[i], strict=True):
            assert_same_bits(mine, theirs, f"list {i}")
    for each in itertools.chain(*written.values()):
        each.check()


CHECKS = {"adamw_": adamw}
WITHOUT_DERIVATIVE = {"adamw_": "a step of an optimiser"}
