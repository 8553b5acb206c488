"""Checks of SGD for tests/test_properties.py: every option, and the numbers of a compiled step."""

import torch
from helpers import DTYPES, assert_same_bits
from hypothesis import strategies as st
from property_cases import (
    Written,
    assert_near,
    one_of,
    op,
    plain,
    seed,
    shape,
    tensor,
    unchanged,
    values,
    wide_of,
)


def sgd(draw):
    momentum = one_of(draw, 0.0, 0.9)
    dampening = one_of(draw, 0.0, 0.3) if momentum else 0.0
    nesterov = bool(momentum) and not dampening and draw(st.booleans())
    numbers = [one_of(draw, 0.0, 0.1, 1e-30, 10.0), momentum, dampening]
    numbers += [one_of(draw, 0.0, 0.01), one_of(draw, 0.0, 0.02, 0.5), 0.0]
    proximal, decoupled, maximize = (draw(st.booleans()) for _ in range(3))
    lr_tensor, scale, skip = (
        one_of(draw, None, 0.07),
        one_of(draw, None, 3.0, 65536.0),
        one_of(draw, None, 0.0, 1.0),
    )
    rest = [None if v is None else torch.tensor(v) for v in (lr_tensor, scale, skip)]
    stochastic = seed(draw) if draw(st.booleans()) else None
    tensors = [], [], [], []
    for _ in range(draw(st.integers(1, 3))):
        dtype, size = one_of(draw, *DTYPES), shape(draw)
        tensors[0].append(values(draw, size, dtype, most=30))
        tensors[1].append(tensor(draw, size, dtype, most=30))
        if momentum:
            first = draw(st.booleans())
            tensors[2].append(torch.zeros(size, dtype=dtype) if first else values(draw, size, dtype, most=30))
            tensors[3].extend([torch.tensor(float(not first))] if dampening else [])
    params, buffers = ([Written(draw, t) for t in tensors[i]] for i in (0, 2))
    started = [t.clone() for t in tensors[3]]
    options = [nesterov, proximal, decoupled, maximize, *rest, None, None, stochastic]
    with unchanged(*tensors[1]):
        op("sgd_")(
            [w.tensor for w in params],
            tensors[1],
            [v.tensor for v in buffers],
            started,
            [],
            [],
            *numbers,
            *options,
        )

    want = [[t.double().clone() for t in group] for group in tensors[:3]]
    flags = [t.clone() for t in tensors[3]]
    plain("sgd_")(*want, flags, [], [], *numbers, *options[:-1], None)
    size = [[s * t.double().abs() for t in group] for s, group in zip((1, -1, -1), tensors, strict=False)]
    lr, _, _, weight_decay, l1, _ = numbers
    negative = [lr, momentum, dampening, -weight_decay, -l1, 0.0]
    plain("sgd_")(
        *size,
        [t.clone() for t in tensors[3]],
        [],
        [],
        *negative,
        nesterov,
        False,
        decoupled,
        False,
        *rest,
        None,
    )
    # The same with a rate of 1 and undamped: the size of what is multiplied with these, which may overflow
    # before.
    full = [[s * t.double().abs() for t in group] for s, group in zip((1, -1, -1), tensors, strict=False)]
    plain("sgd_")(
        *full, [t.clone() for t in tensors[3]], [], [], 1.0, momentum, 0.0, *negative[3:], nesterov, False,
        decoupled, False, None, *rest[1:], None,
    )  # fmt: skip
    fit = [
        [
            (f.abs() * 1.01 < torch.finfo(wide_of(t.dtype)).max) | ~w.isfinite()
            for f, w, t in zip(*group, strict=True)
        ]
        for group in ((full[0], want[0], tensors[0]), (full[2], want[2], tensors[2]))
    ]
    own = [[t.clone() for t in group] for group in tensors]
    plain("sgd_")(*own, [], [], *numbers, *options)
    for i, written in enumerate(params):
        if stochastic is not None and written.tensor.dtype == torch.bfloat16:
            assert_same_bits(written.tensor, own[0][i], "stochastic rounding")
        else:
            rate = lr if lr_tensor is None else lr_tensor
            # A product may underflow or a momentum be flushed before lr, 10 at most, makes it larger.
            tiny = 1e-322 if written.tensor.dtype == torch.float64 else 2e-37
            terms = size[0][i].abs() + rate * l1
            fits = fit[0][i]
            assert_near(written.tensor[fits], want[0][i][fits], terms[fits], "parameter", tiny=tiny)
        written.check()
    for i, written in enumerate(buffers):
        tiny = 0.0 if written.tensor.dtype == torch.float64 else 2.0**-126
        fits = fit[1][i]
        assert_near(written.tensor[fits], want[2][i][fits], size[2][i][fits], "momentum", tiny=tiny)
        written.check()
    # Rounding at random counts the steps there; else it says whether there was one.
    for got, flag in zip(started, own[3], strict=True):
        assert_same_bits(got, flag, "started")


def sgd_numbers(draw):
    """The same step, whose numbers lie in a tensor."""
    size, dtype = (one_of(draw, 1, 9, 65),), one_of(draw, *DTYPES)
    x, grad = (values(draw, size, dtype, most=30) for _ in range(2))
    numbers = torch.tensor([one_of(draw, 0.1, -0.1), 0.0, 0.0, 0.01, 0.02, 0.0]).double()
    got, want = x.clone(), x.clone()
    options = [False, draw(st.booleans()), draw(st.booleans()), draw(st.booleans())]
    op("sgd_numbers_")([got], [grad], [], [], [], [], numbers, *options)
    plain("sgd_")([want], [grad], [], [], [], [], *numbers.tolist(), *options)
    assert_same_bits(got, want, "numbers in a tensor")


CHECKS = {"sgd_": sgd}
OTHERS = {"sgd_numbers_": sgd_numbers}
WITHOUT_DERIVATIVE = {"sgd_": "a step of an optimiser"}
