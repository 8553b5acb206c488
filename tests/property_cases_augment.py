"""The checks of property_cases.py for the operators of augmentation."""

import math

import torch
from helpers import DTYPES, assert_same_bits
from hypothesis import strategies as st
from property_cases import (
    assert_near,
    laid_out,
    one_of,
    op,
    plain,
    random_of,
    seed,
    tensor,
    unchanged,
    values,
)

from fastreg.augment._plain import INTERPOLATIONS, PADDINGS

# One pixel, whose neighbours are all padding, two, and sides just above vectors of 4, 8, 16 and 32 pixels.
SIDES = (1, 2, 3, 5, 9, 17, 33)


def uniform(draw, *shape):
    return torch.from_numpy(random_of(draw).random(shape))


def matrices(draw, batch, size, out):
    """Inverse matrices: any turn, scale, shear and shift; some that only move whole pixels."""
    if one_of(draw, False, False, True):
        m = torch.eye(2, 3, dtype=torch.float64).repeat(batch, 1, 1)
        m[:, :, 2] = (uniform(draw, batch, 2) * 7 - 3).round()
        return m
    m = uniform(draw, batch, 2, 3) * 4 - 2
    m[:, :, 2] = (uniform(draw, batch, 2) - 0.2) * torch.tensor([size[1], size[0]]) * 1.5
    return m * one_of(draw, 1.0, 1.0, 0.3, 3.0)


def boxes(draw, batch, height, width, inside):
    u = uniform(draw, batch, 4)
    if inside:
        top, left = (u[:, 0] * height).floor(), (u[:, 1] * width).floor()
        h, w = (u[:, 2] * (height - top - 1)).floor() + 1, (u[:, 3] * (width - left - 1)).floor() + 1
        return torch.stack([top, left, h, w], 1).long()
    sides = torch.tensor([height, width, height, width])
    return (u * sides * 1.5 - 2).floor().long()


class Drawn:
    """The arguments of `augment`, and how large what it adds up is."""

    def __init__(self, draw, dtypes, colour):
        dtype = one_of(draw, *dtypes)
        batch, channels = draw(st.integers(0, 3)), one_of(draw, 1, 3, 2)
        size = one_of(draw, *SIDES), one_of(draw, *SIDES)
        out, m = size, None
        if draw(st.booleans()):
            out = one_of(draw, *SIDES), one_of(draw, *SIDES)
            m = matrices(draw, batch, size, out)
        windows = boxes(draw, batch, *size, True) if m is not None and draw(st.booleans()) else None
        antialias = m is not None and draw(st.booleans())
        hostile = not antialias and not colour and dtype.is_floating_point
        if dtype == torch.uint8:
            x = (uniform(draw, batch, channels, *size) * 255).round().to(torch.uint8)
            self.images = laid_out(draw, x)[0]
        elif colour:
            self.images = laid_out(draw, (uniform(draw, batch, channels, *size) * 1.4 - 0.2).to(dtype))[0]
        else:
            x = tensor(draw, (batch, channels, *size), dtype, hostile=hostile, most=4)
            # Beside an infinite pixel the kernels interpolate to NaN, and the definition to infinity.
            self.images = x if x.isfinite().all() else torch.where(x.isinf(), 1.0, x)
        steps = 0
        if colour:
            steps = draw(st.integers(0, 7)) if channels != 2 else draw(st.integers(0, 1))
        kernel = (one_of(draw, 1, 3, 5), one_of(draw, 1, 3, 7)) if draw(st.booleans()) else (1, 1)
        blur = None
        if kernel != (1, 1):
            sigma = uniform(draw, batch, 2) * 3
            blur = plain("augment_gaussian")(sigma[:, 0], sigma[:, 1], *kernel)
        erased = boxes(draw, batch, *out, False) if draw(st.booleans()) else None
        normalise = dtype != torch.uint8 and draw(st.booleans())
        factors = uniform(draw, batch, 4) * 2 if steps else None
        constants = (uniform(draw, 4 * channels) * 2 - 0.5).tolist()
        if dtype == torch.uint8:
            constants[channels : 2 * channels] = [float(round(abs(v) * 100)) for v in constants[:channels]]
        self.rest = [m, factors, blur, erased, windows, constants, *out, *kernel, steps]
        self.rest += [one_of(draw, *range(len(INTERPOLATIONS))), one_of(draw, *range(len(PADDINGS)))]
        self.rest += [antialias, normalise]
        self.dtype, self.out = dtype, (batch, channels, *out)
        largest = self.images.double()[self.images.isfinite()].abs().amax() if self.images.numel() else 0.0
        self.size = torch.as_tensor(largest).double() * 4 + 4  # cubic weights and constants add to it


def augment(draw):
    """Geometry, blur, normalisation and erasing of any numbers; colour steps of images."""
    colour = draw(st.booleans())
    drawn = Drawn(draw, (*DTYPES, torch.uint8), colour)
    got = op("augment")(drawn.images, *drawn.rest, drawn.dtype)
    assert got.shape == drawn.out and got.dtype == drawn.dtype
    if (
        drawn.dtype == torch.uint8
    ):  # each step rounds: the definition in the same steps, one level off at most
        want = plain("augment")(drawn.images, *drawn.rest, drawn.dtype)
        off = (got.int() - want.int()).abs()
        assert not off.numel() or off.max() <= (4 if colour else 1), off.max()
        return
    want = plain("augment")(drawn.images.double(), *drawn.rest, torch.float64)
    assert_near(got, want, drawn.size.expand(want.shape), "augment")


def augment_backward(draw):
    """A sum over where pixels went, whose order is free."""
    drawn = Drawn(draw, DTYPES, False)
    x = drawn.images.nan_to_num(0.5, 0.5, 0.5)
    grad = values(draw, drawn.out, drawn.dtype, most=1, hostile=False)
    got = op("augment_backward")(grad, x, *drawn.rest, drawn.dtype)
    want = plain("augment_backward")(grad.double(), x.double(), *drawn.rest, torch.float64)
    assert got.stride() == torch.empty_like(got).stride()
    largest = grad.double().abs().sum() + 1e-30 if grad.numel() else torch.tensor(1.0)
    assert_near(got, want, (largest * 4).expand(want.shape), "gradient")


def assert_table(got, want, what):
    """float64 on both sides, up to the last bits of exp, cos, sin and tan."""
    torch.testing.assert_close(
        got, want, rtol=1e-11, atol=1e-11, equal_nan=True, msg=lambda m: f"{what}: {m}"
    )


def augment_draw(draw):
    batch, sides = draw(st.integers(0, 9)), [one_of(draw, *SIDES) for _ in range(4)]
    low = (uniform(draw, 22) * 0.4 + 0.3).tolist()
    high = [a + b for a, b in zip(low, (uniform(draw, 22)).tolist(), strict=True)]
    chances = uniform(draw, 3).tolist()
    box = [0.1, one_of(draw, 0.2, 1.0), -0.3, 0.3]
    arguments = [seed(draw), one_of(draw, 0, 1, 2**32 - 2, 2**40), batch, chances, low, high]
    arguments += [one_of(draw, 0, 1, 2), [*box, float(one_of(draw, 0, 4))], box, sides, one_of(draw, 1, 5), 3]
    images = torch.empty(batch, 3, *sides[:2])
    got, want = op("augment_draw")(images, *arguments), plain("augment_draw")(images, *arguments)
    assert_same_bits(got[4], want[4], "boxes")
    for name, a, b in zip(("table", "matrices", "colour", "blur"), got, want, strict=False):
        assert_table(a, b, name)


def augment_matrices(draw):
    batch = draw(st.integers(0, 9))

    def maybe(*tail, scale=1.0, shift=0.0):
        return None if draw(st.booleans()) else uniform(draw, batch, *tail) * scale + shift

    flips = [None if v is None else v.round() for v in (maybe(), maybe())]
    parts = [*flips, maybe(scale=2, shift=0.1), maybe(scale=2, shift=0.1), maybe(scale=720, shift=-360)]
    parts += [maybe(2, scale=9), maybe(2, scale=80, shift=-40), maybe(4, scale=9, shift=1)]
    arguments = [torch.empty(batch), *parts, *(one_of(draw, *SIDES) for _ in range(4))]
    assert_table(op("augment_matrices")(*arguments), plain("augment_matrices")(*arguments), "matrices")


def augment_gaussian(draw):
    """Widths from 0 to infinity."""
    batch = draw(st.integers(0, 9))
    sigmas = [uniform(draw, batch) * one_of(draw, 0.0, 1e-12, 0.1, 3.0, 1e9, 1e200) for _ in range(2)]
    if batch and draw(st.booleans()):
        sigmas[0][0] = math.inf
    sizes = one_of(draw, 1, 3, 23), one_of(draw, 1, 5)
    assert_table(
        op("augment_gaussian")(*sigmas, *sizes), plain("augment_gaussian")(*sigmas, *sizes), "weights"
    )


def augment_words(draw):
    """Whole numbers: the same bits."""
    index = torch.from_numpy(random_of(draw).integers(-(2**40), 2**40, draw(st.integers(0, 9))))
    arguments = seed(draw), index, one_of(draw, 0, 44, 2**31), draw(st.integers(0, 4))
    assert_same_bits(op("augment_words")(*arguments), plain("augment_words")(*arguments), "words")


def augment_tones(draw):
    """Bytes, whose rounding is the definition's: the same bits."""
    batch, channels, sides = draw(st.integers(0, 9)), one_of(draw, 1, 3), [one_of(draw, *SIDES) for _ in "xy"]
    images = (uniform(draw, batch, channels, *sides) * one_of(draw, 255, 255, 20, 0)).round().to(torch.uint8)
    if draw(st.booleans()):
        images = images.contiguous(memory_format=torch.channels_last)
    steps = (uniform(draw, batch) * 15).long()
    strengths = uniform(draw, batch) * one_of(draw, 2.0, 0.1, 1e-3) - one_of(draw, 1.0, 0.0)
    strengths = torch.where(steps == 10, (uniform(draw, batch) * 9).floor(), strengths)  # bits
    strengths = torch.where(steps == 11, strengths.clamp(max=1), strengths)  # of white
    with unchanged(images):
        got = op("augment_tones")(images, steps, strengths)
    order = torch.channels_last if not images.is_contiguous() else torch.contiguous_format
    assert got.is_contiguous(memory_format=order)
    assert_same_bits(got, plain("augment_tones")(images, steps, strengths), "pixels")


CHECKS = {
    "augment": augment,
    "augment_backward": augment_backward,
    "augment_draw": augment_draw,
    "augment_matrices": augment_matrices,
    "augment_gaussian": augment_gaussian,
    "augment_words": augment_words,
    "augment_tones": augment_tones,
}
WITHOUT_DERIVATIVE = {
    "augment_backward": "a part of the backward pass",
    "augment_draw": "gives parameters",
    "augment_matrices": "gives parameters",
    "augment_gaussian": "gives parameters",
    "augment_words": "gives whole numbers",
    "augment_tones": "takes bytes",
}
