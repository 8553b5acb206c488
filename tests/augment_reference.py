"""What the tests of augmentation share: images, matrices, a module with every step on, and the reference.

The reference is the plain-torch definition of the operators in float64, which test_augment_plain.py compares
with torch's own functions.
"""

import contextlib
import math
from unittest import mock

import torch
from torch.nn import functional as F

from fastreg.augment import Augment, _op, _plain, _plain_draw

SIZES = [(1, 1), (1, 7), (5, 1), (2, 3), (9, 33), (45, 37)]  # below and above a vector, odd, single lines
# Of one result, in [0, 1]. In float64 positions are whole multiples of 2^-32 of a pixel.
ROUNDING = {
    torch.float32: 1e-6,
    torch.float64: 5e-8,
    torch.float16: 6e-4,
    torch.bfloat16: 5e-3,
    torch.uint8: 1.01 / 255,
}
OPERATORS = {
    "augment": _plain.augment,
    "augment_backward": _plain.augment_backward,
    "augment_draw": _plain_draw.augment_draw,
    "augment_matrices": _plain_draw.augment_matrices,
    "augment_gaussian": _plain_draw.augment_gaussian,
}


@contextlib.contextmanager
def plain_operators():
    """Inside, the public functions of fastreg.augment call the plain-torch definitions."""
    with mock.patch.multiple(_op, **OPERATORS):
        yield


def reference(function, images, *args, **kwargs):
    """What `function` makes of the images in float64, in [0, 1], by the plain-torch definitions."""
    with plain_operators():
        return function(wide(images), *args, **kwargs)


def pictures(batch, channels, height, width, dtype=torch.float32):
    x = torch.rand(batch, channels, height, width)
    return (x * 255).round().to(dtype) if dtype == torch.uint8 else x.to(dtype)


def wide(x):
    """In float64, in [0, 1]."""
    return x.double() / 255 if x.dtype == torch.uint8 else x.double()


def assert_images(got, want, dtype=None, tolerance=None):
    dtype = dtype or got.dtype
    assert got.dtype == dtype and got.shape == want.shape
    assert (wide(got) - want).abs().max() <= (tolerance or ROUNDING[dtype]) if want.numel() else True


def layouts(x):
    yield x
    yield x.contiguous(memory_format=torch.channels_last)
    yield F.pad(x, (2, 1, 1, 3))[..., 1:-3, 2:-1]
    yield x.repeat_interleave(2, 3)[..., ::2]
    yield x.transpose(2, 3).contiguous().transpose(2, 3)


def some_matrices(batch, height, width, size=None):
    """Turned, scaled, shifted, two mirrored; no position is a tie between two pixels."""
    size = size or (height, width)
    m = torch.zeros(batch, 2, 3, dtype=torch.float64)
    for i in range(batch):
        angle, scale = 0.7 * i, 1 + 0.15 * i
        a = (
            scale
            * torch.tensor([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]]).double()
        )
        a[:, 0] *= (-1) ** (i // 2)
        m[i, :, :2] = a
        centre = torch.tensor([(width - 1) / 2, (height - 1) / 2]).double()
        m[i, :, 2] = (
            centre + 0.37 * i - 0.013 - a @ (torch.tensor([(size[1] - 1) / 2, (size[0] - 1) / 2]).double())
        )
    return m


def by_matrix(x, matrices, size=None, **settings):
    return _op.augment_batch("test", x, matrices=matrices, size=size, **settings)


def everything(**changes):
    usual = dict(
        hflip=0.5, vflip=0.3, rotate=15, stretch=(0.8, 1.2), scale=(0.9, 1.1), translate=(0.1, 0.2), shear=5,
        size=(20, 30), crop=(0.3, 1.0), brightness=0.3, contrast=0.3, saturation=0.3, hue=0.05,
        blur=(3, (0.1, 2.0)), erase=0.5, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.3),
    )  # fmt: skip
    return Augment(**usual | changes)
