"""Augmentation against plain torch in float64: grid_sample, interpolate, conv2d and the formulas of the
colours.

Proven: each step and their composition for every dtype and layout, against torchvision as well where it is
installed; gradients; that parameters depend on seed and global index alone and have the distributions they
should; batches, threads, instruction sets and torch.compile change nothing; wrong arguments are errors.
"""

import copy
import dataclasses
import math
import os
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastreg as fr
from fastreg.augment import Augment, Params, Settings, apply, cutmix, mixup
from fastreg.augment import functional as AF

INF, NAN = float("inf"), float("nan")
SIZES = [(1, 1), (1, 7), (5, 1), (2, 3), (9, 33), (45, 37)]
# float64: positions are whole multiples of 2^-32 of a pixel.
ROUNDING = {
    torch.float32: 1e-6,
    torch.float64: 5e-8,
    torch.float16: 6e-4,
    torch.bfloat16: 5e-3,
    torch.uint8: 1.01 / 255,
}


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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


# ---- references


def reference_warp(x, matrices, size, interpolation="bilinear", padding="zeros", fill=0.0):
    """x (float64) at the positions that `matrices` (B, 2, 3) give to each pixel of the result."""
    height, width = x.shape[2:]
    rows, columns = torch.meshgrid(
        torch.arange(size[0]).double(), torch.arange(size[1]).double(), indexing="ij"
    )
    at = torch.stack([columns, rows, torch.ones_like(rows)], -1) @ matrices.double().transpose(1, 2)[:, None]
    grid = (2 * at + 1) / torch.tensor([width, height]) - 1
    mode = {"border": "border", "reflect": "reflection"}.get(padding, "zeros")
    sample = lambda image: F.grid_sample(image, grid, interpolation, mode, align_corners=False)  # noqa: E731
    if padding != "fill":
        return sample(x)
    inside = sample(torch.ones_like(x))
    if interpolation == "nearest":
        return torch.where(inside < 0.5, fill, sample(x))
    return inside * (sample(x) - fill) + fill


def grey(x):
    return (
        x
        if x.shape[1] == 1
        else (x * torch.tensor([0.2989, 0.587, 0.114], dtype=torch.float64).view(3, 1, 1)).sum(
            1, keepdim=True
        )
    )


def per_sample(value):
    return torch.as_tensor(value).double().view(-1, 1, 1, 1)


def reference_colour(step, x, factor):
    factor = per_sample(factor)
    if step == "brightness":
        return (x * factor).clamp(0, 1)
    if step == "contrast":
        return (x * factor + (1 - factor) * grey(x).mean((1, 2, 3), keepdim=True)).clamp(0, 1)
    if x.shape[1] == 1:
        return x
    if step == "saturation":
        return (x * factor + (1 - factor) * grey(x)).clamp(0, 1)
    r, g, b = x.unbind(1)
    largest, smallest = x.amax(1), x.amin(1)
    spread = torch.where(largest == smallest, 1, largest - smallest)
    sixth = torch.where(
        largest == r, (g - b) / spread, torch.where(largest == g, 2 + (b - r) / spread, 4 + (r - g) / spread)
    )
    h = (sixth / 6 + factor[:, 0]) % 1 * 6
    i, f = h.floor().long() % 6, h - h.floor()
    s = (largest - smallest) / torch.where(largest == 0, 1, largest)
    p, q, t, v = largest * (1 - s), largest * (1 - s * f), largest * (1 - s * (1 - f)), largest
    cases = torch.stack(
        [torch.stack(c, 1) for c in ((v, t, p), (q, v, p), (p, v, t), (p, q, v), (t, p, v), (v, p, q))]
    )
    return cases.gather(0, i[None, :, None].expand(1, -1, 3, -1, -1))[0]


def reference_blur(x, sigma, kernel):
    """Sample by sample, the border mirrored index by index, so that small images are no special case."""

    def mirrored(n, k):
        period = max(2 * (n - 1), 1)
        i = torch.arange(-(k // 2), n + k // 2) % period
        return torch.where(i < n, i, period - i)

    out = []
    for image, s in zip(x, per_sample(sigma).flatten().tolist(), strict=True):
        padded = image[:, mirrored(image.shape[1], kernel)][:, :, mirrored(image.shape[2], kernel)]
        weight = (
            torch.exp(-((torch.arange(kernel).double() - kernel // 2) ** 2) / (2 * s * s))
            if s
            else F.one_hot(torch.tensor(kernel // 2), kernel).double()
        )
        weight = weight / weight.sum()
        out.append(F.conv2d(padded[:, None], (weight[:, None] * weight)[None, None])[:, 0])
    return torch.stack(out)


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
    from fastreg.augment import _op

    return _op.augment_batch("test", x, matrices=matrices, size=size, **settings)


# ---- single steps


@pytest.mark.parametrize("padding", ("zeros", "border", "reflect", "fill"))
@pytest.mark.parametrize("interpolation", ("nearest", "bilinear", "bicubic"))
def test_warp(interpolation, padding):
    for height, width in SIZES:
        for dtype in (torch.float32, torch.float64, torch.uint8):
            x = pictures(4, 3, height, width, dtype)
            size = (height + 4, width + 13)
            m = some_matrices(4, height, width, size)
            fill = 0.25 * (255 if dtype == torch.uint8 else 1)
            got = by_matrix(x, m, size, interpolation=interpolation, padding=padding, fill=fill)
            want = reference_warp(wide(x), m, size, interpolation, padding, 0.25)
            if dtype == torch.uint8:
                want = want.clamp(0, 1)
            assert_images(got, want, dtype, 5e-6 if dtype == torch.float32 else None)


@pytest.mark.parametrize("padding", ("zeros", "border", "reflect", "fill"))
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_turned_a_little(dtype, padding):
    """Neighbouring pixels of few rows have a way of their own for 1 and 3 channels, which must not show: same
    bits as among 5.
    """
    for height, width in (*SIZES, (70, 90)):
        angle = torch.tensor([0.0, 0.02, -0.11, 0.19, 0.25, 0.31, 3.1])  # of 1 to 7 rows for 16 pixels
        scale = torch.tensor([0.3, 1.0, 1.9, -1.1, 1.0, 0.9, 1.3])
        m = torch.zeros(len(angle), 2, 3, dtype=torch.float64)
        m[:, 0, 0], m[:, 0, 1], m[:, 1, 0], m[:, 1, 1] = (
            scale * angle.cos(),
            -angle.sin(),
            angle.sin(),
            angle.cos(),
        )
        size = (height + 9, width + 21)
        m[:, :, 2] = (
            -(m[:, :, :2] @ torch.tensor([size[1], size[0]]).double() / 2)
            + torch.tensor([width, height]) / 2
            - 0.513
        )
        x = pictures(len(m), 5, height, width, dtype)
        fill = 0.25 * (255 if dtype == torch.uint8 else 1)
        five = by_matrix(x, m, size, padding=padding, fill=fill)
        want = reference_warp(wide(x), m, size, "bilinear", padding, 0.25)
        assert_images(
            five,
            want.clamp(0, 1) if dtype == torch.uint8 else want,
            dtype,
            5e-6 if dtype == torch.float32 else None,
        )
        for channels in (slice(3), slice(1)):
            for part in layouts(x[:, channels]):
                assert torch.equal(by_matrix(part, m, size, padding=padding, fill=fill), five[:, channels])


def test_fill_does_not_touch_what_lies_inside():
    """A pixel whose four neighbours lie inside is what it is without a fill value, whatever pixels are
    computed beside it.
    """
    for height, width in ((9, 33), (45, 37)):
        x, m = pictures(5, 3, height, width), some_matrices(5, height, width)
        inside = by_matrix(torch.ones_like(x, dtype=torch.float64), m) == 1
        zeros, filled = by_matrix(x, m), by_matrix(x, m, padding="fill", fill=0.3)
        assert inside.any() and not inside.all() and torch.equal(filled[inside], zeros[inside])


def test_warp_of_many_pixels_keeps_its_precision():
    """At pixel 5000 the last bit of a float32 position is 5e-4 of a pixel."""
    x = pictures(1, 1, 3, 5001)
    m = torch.tensor([[[0.99993, 0.001, 0.313], [0.0001, 1.0, 0.2]]]).double()
    assert_images(
        by_matrix(x, m, padding="border"),
        reference_warp(x.double(), m, (3, 5001), padding="border"),
        tolerance=1e-6,
    )


def test_layouts_and_dtypes():
    colour = {name: torch.tensor([1.2, 0.8]).double() for name in ("brightness", "contrast", "saturation")}
    colour["hue"] = torch.tensor([0.1, -0.2]).double()
    for dtype, tolerance in ROUNDING.items():
        for channels in (1, 3):
            x = pictures(2, channels, 19, 23, dtype)
            m = some_matrices(2, 19, 23)
            want = reference_warp(wide(x), m, (19, 23))
            for name in ("brightness", "contrast", "saturation", "hue"):
                want = reference_colour(name, want, colour[name])
            want = (reference_blur(want, [0.8, 1.1], 5) - 0.4) / 0.3
            from fastreg.augment import _op

            sigma = torch.tensor([0.8, 1.1]).double()
            weights = _op.augment_gaussian(sigma, sigma, 5, 5)
            for y in layouts(x):
                got = by_matrix(y, m, **_op.factors(colour), blur=weights, kernel=(5, 5), mean=0.4, std=0.3)
                tall = dtype in (torch.float16, torch.bfloat16)
                assert_images(
                    got,
                    want,
                    torch.float32 if dtype == torch.uint8 else dtype,
                    8 * tolerance if tall else 1e-4,
                )
                last = y.is_contiguous(memory_format=torch.channels_last) and not y.is_contiguous()
                assert got.is_contiguous(
                    memory_format=torch.channels_last if last else torch.contiguous_format
                )


@pytest.mark.parametrize("step", ("brightness", "contrast", "saturation", "hue"))
def test_colour(step):
    for dtype in ROUNDING:
        for channels, (height, width) in ((1, (9, 17)), (3, (1, 1)), (3, (33, 15))):
            x = pictures(4, channels, height, width, dtype)
            x[0, :, 0, 0] = 0
            factor = [-0.5, -0.13, 0.0, 0.4] if step == "hue" else [0.0, 0.6, 1.0, 1.9]
            got = getattr(AF, f"adjust_{step}")(x, torch.tensor(factor, dtype=torch.float64))
            assert_images(
                got,
                reference_colour(step, wide(x), factor),
                dtype,
                max(ROUNDING[dtype], 5e-6) if dtype != torch.uint8 else 2.01 / 255,
            )
            for i, f in enumerate(factor):
                assert torch.equal(getattr(AF, f"adjust_{step}")(x[i], f), got[i])


@pytest.mark.parametrize("kernel", (1, 3, 5, 9))
def test_blur(kernel):
    for height, width in SIZES:
        for dtype in ROUNDING:
            x = pictures(3, 2, height, width, dtype)
            sigma = [0.0, 0.4, 2.5]
            assert_images(
                AF.gaussian_blur(x, kernel, torch.tensor(sigma)), reference_blur(wide(x), sigma, kernel)
            )


def test_blur_of_two_sizes():
    x = torch.rand(2, 3, 11, 14)
    got = AF.gaussian_blur(x, (3, 7), (0.7, 1.6))
    want = reference_blur(
        reference_blur(x.double().transpose(2, 3), [1.6] * 2, 7).transpose(2, 3), [0.0] * 2, 1
    )
    across = AF.gaussian_blur(AF.gaussian_blur(x.double(), (3, 1), (0.7, 1.0)), (1, 7), (1.0, 1.6))
    assert_images(got, across)
    assert (got.double() - want).abs().max() > 1e-3, "sizes are told apart"


def test_erase_and_normalize():
    x = pictures(3, 3, 7, 9)
    got = AF.erase(
        x,
        torch.tensor([1, 0, 6]),
        torch.tensor([2, 0, 8]),
        torch.tensor([3, 0, 99]),
        torch.tensor([4, 5, 99]),
        0.5,
    )
    want = x.clone()
    want[0, :, 1:4, 2:6] = 0.5
    want[2, :, 6:, 8:] = 0.5
    assert torch.equal(got, want)
    assert torch.equal(
        AF.erase(x, 1, 2, 3, 4, [0.1, 0.2, 0.3])[:, :, 2, 3], torch.tensor([0.1, 0.2, 0.3]).expand(3, 3)
    )
    pixels = torch.rand(3, 3, 4)
    assert torch.equal(AF.erase(x, 1, 2, 3, 4, pixels)[:, :, 1:4, 2:6], pixels.expand(3, -1, -1, -1))
    inside = x.clone()
    assert AF.erase(inside, 0, 0, 2, 2, 9.0, inplace=True) is inside and (inside[..., :2, :2] == 9).all()
    byte = pictures(2, 3, 5, 6, torch.uint8)
    for y in (x, byte):
        mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
        want = (wide(y) - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
        assert_images(AF.normalize(y, mean, std), want, torch.float32)
    assert AF.normalize(x, 0.5, 0.5, inplace=True) is x


def test_flips_move_pixels():
    for dtype in ROUNDING:
        x = pictures(4, 3, 13, 37, dtype)
        x = (
            x
            if dtype == torch.uint8
            else torch.where(torch.rand(4, 3, 13, 37) < 0.1, NAN, x.float()).to(dtype)
        )
        params = Params(hflip=torch.tensor([1.0, 0, 1, 0]), vflip=torch.tensor([0.0, 1, 1, 0]))
        want = torch.stack([x[0].flip(-1), x[1].flip(-2), x[2].flip(-1, -2), x[3]])
        assert torch.equal(apply(x, params).nan_to_num(7), want.nan_to_num(7))
        assert torch.equal(AF.horizontal_flip(x).nan_to_num(7), x.flip(-1).nan_to_num(7))
        assert torch.equal(AF.vertical_flip(x).nan_to_num(7), x.flip(-2).nan_to_num(7))


@pytest.mark.parametrize("padding", ("zeros", "border", "reflect", "fill"))
def test_whole_shifts_move_pixels(padding):
    x = pictures(3, 2, 9, 21)
    shift = torch.tensor([[3.0, -2.0], [-25.0, 1.0], [0.0, 40.0]])
    got = apply(x, Params(translate=shift, settings=Settings(padding=padding, fill=0.5)))
    m = torch.eye(2, 3).repeat(3, 1, 1)
    m[:, :, 2] = -shift
    assert_images(got, reference_warp(x.double(), m, (9, 21), padding=padding, fill=0.5))


def test_vertical_stretch():
    """Pixel y of the result lies at (y - c) / factor + c of the image, in the same column."""
    x = pictures(2, 3, 21, 8)
    m = torch.zeros(2, 2, 3)
    factor = torch.tensor([1.6, 0.7])
    m[:, 0, 0], m[:, 1, 1], m[:, 1, 2] = 1, 1 / factor, 10 - 10 / factor
    assert_images(
        AF.vertical_stretch(x, factor), reference_warp(x.double(), m.double(), (21, 8)), tolerance=2e-6
    )


@pytest.mark.parametrize("antialias", (False, True))
@pytest.mark.parametrize("interpolation", ("nearest", "bilinear", "bicubic"))
def test_resized_crop(interpolation, antialias):
    for dtype in (torch.float32, torch.float64, torch.uint8):
        x = pictures(2, 3, 31, 40, dtype)
        for size in ((9, 7), (50, 11), (31, 70), (1, 1)):
            got = AF.resized_crop(x, 2, 3, 27, 30, size, interpolation, antialias)
            options = {} if interpolation == "nearest" else {"align_corners": False, "antialias": antialias}
            want = F.interpolate(wide(x)[:, :, 2:29, 3:33], size, mode=interpolation, **options)
            if dtype == torch.uint8:
                want = want.clamp(0, 1)
            assert_images(got, want, dtype, 2e-6 if dtype == torch.float32 else None)
    top = torch.tensor([0, 5])
    each = AF.resized_crop(x, top, top + 1, 26 - top, 30, (8, 9), interpolation, antialias)
    for i in range(2):
        assert torch.equal(
            AF.resized_crop(x[i], i * 5, i * 5 + 1, 26 - i * 5, 30, (8, 9), interpolation, antialias), each[i]
        )


def test_antialias_of_a_turned_image():
    """A stripe pattern finer than the result can show becomes grey, not moiré; without antialias it does not."""
    x = (torch.arange(200) % 2).float().expand(1, 1, 200, 200)
    settings = {"size": (40, 40), "padding": "border"}
    angle = torch.tensor([30.0])
    crop = torch.tensor([[50.0, 50.0, 200.0, 200.0]]) - torch.tensor([50.0, 50.0, 0.0, 0.0])
    plain, smooth = (
        apply(x, Params(angle=angle, crop=crop, settings=Settings(antialias=flag, **settings)))[
            ..., 12:28, 12:28
        ]
        for flag in (False, True)
    )
    assert (smooth - 0.5).abs().max() < 0.1 < 0.3 < (plain - 0.5).abs().max()


# ---- against torchvision


def _torchvision():
    return pytest.importorskip("torchvision.transforms.v2.functional", reason="torchvision is not installed")


def assert_like_torchvision(got, want, dtype, tolerance):
    difference = (got.double() - want.double()).abs()
    if dtype != torch.uint8:
        assert difference.max() <= tolerance, difference.max()
    else:  # a level where float32 rounding decides
        assert difference.max() <= 1 and (difference > 0).double().mean() < 0.01


@pytest.mark.parametrize("dtype", (torch.float32, torch.uint8), ids=str)
@pytest.mark.parametrize("channels", (1, 3))
def test_like_torchvision(dtype, channels):
    TF = _torchvision()
    from torchvision.transforms import InterpolationMode

    x = pictures(2, channels, 45, 37, dtype)
    wide_x = x.double() if dtype == torch.float32 else x
    check = lambda got, want, tolerance=1e-5: assert_like_torchvision(got, want, dtype, tolerance)  # noqa: E731
    for interpolation in (InterpolationMode.BILINEAR, InterpolationMode.NEAREST):
        for fill in (None, [0.3 if dtype == torch.float32 else 77.0] * channels):
            args = (17.3, [2.5, -3.25], 1.2, [7.0, -4.0])
            check(AF.affine(x, *args, interpolation, fill), TF.affine(wide_x, *args, interpolation, fill))
            check(
                AF.affine(x, *args, interpolation, fill, [3.0, 9.0]),
                TF.affine(wide_x, *args, interpolation, fill, [3.0, 9.0]),
            )
            for expand in (False, True):
                got = AF.rotate(x, 33.0, interpolation, expand, fill=fill)
                check(got, TF.rotate(wide_x, 33.0, interpolation, expand, fill=fill))
    check(AF.rotate(x, 180), TF.rotate(wide_x, 180))
    for name, factors in (
        ("brightness", (0, 1.3)),
        ("contrast", (0, 1.7)),
        ("saturation", (0, 1.7)),
        ("hue", (-0.5, 0.2)),
    ):
        for factor in factors:
            check(
                getattr(AF, f"adjust_{name}")(x, factor), getattr(TF, f"adjust_{name}")(wide_x, factor), 1e-4
            )
    check(AF.gaussian_blur(x, 5), TF.gaussian_blur(wide_x, [5, 5]))
    check(AF.gaussian_blur(x, (7, 3), (1.3, 0.4)), TF.gaussian_blur(wide_x, [7, 3], [1.3, 0.4]))
    check(AF.erase(x, 3, 4, 5, 60, 7.0), TF.erase(wide_x, 3, 4, 5, 60, torch.tensor(7.0)))
    if dtype == torch.float32:
        check(AF.resized_crop(x, 3, 5, 40, 30, (19, 21)), TF.resized_crop(wide_x, 3, 5, 40, 30, [19, 21]))
        check(
            AF.normalize(x, [0.3] * channels, [0.2] * channels),
            TF.normalize(wide_x, [0.3] * channels, [0.2] * channels),
        )


@pytest.mark.parametrize("dtype", (torch.float32, torch.uint8), ids=str)
def test_composition_like_torchvision(dtype):
    """The documented order, step after step; uint8 stays uint8 and is rounded after every step."""
    TF = _torchvision()
    from torchvision.transforms import InterpolationMode

    x = pictures(3, 3, 45, 37, dtype)
    geometry = dict(rotate=25, translate=(0.1, 0.2), scale=(0.8, 1.2), shear=9, hflip=0.5)
    aug = Augment(**geometry, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.2, blur=(3, (0.4, 2.0)))
    params = aug.sample(x, seed=4)
    got = apply(x, params)
    for i in range(3):
        p = {
            f.name: getattr(params, f.name)[i].tolist()
            for f in dataclasses.fields(params)
            if isinstance(getattr(params, f.name), torch.Tensor)
        }
        y = x[i].double() if dtype == torch.float32 else x[i]
        y = TF.horizontal_flip(y) if p["hflip"] else y
        y = TF.affine(y, p["angle"], p["translate"], p["scale"], p["shear"], InterpolationMode.BILINEAR)
        for name in ("brightness", "contrast", "saturation", "hue"):
            y = getattr(TF, f"adjust_{name}")(y, p[name])
        y = TF.gaussian_blur(y, [3, 3], p["sigma"])
        difference = (got[i].double() - y.double()).abs()
        if dtype == torch.float32:
            assert difference.max() < 1e-4
        else:  # a level in one step may become a few in those that follow
            assert (difference > 1).double().mean() < 0.002


# ---- Augment


def everything(**changes):
    usual = dict(
        hflip=0.5, vflip=0.3, rotate=15, stretch=(0.8, 1.2), scale=(0.9, 1.1), translate=(0.1, 0.2), shear=5,
        size=(20, 30), crop=(0.3, 1.0), brightness=0.3, contrast=0.3, saturation=0.3, hue=0.05, blur=(3, (0.1, 2.0)),
        erase=0.5, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.3),
    )  # fmt: skip
    return Augment(**usual | changes)


def reference(x, params, size):
    """The documented order in float64, each sample by its own parameters."""
    height, width = x.shape[2:]
    matrices = []
    for i in range(len(x)):
        p = {
            f.name: getattr(params, f.name)[i]
            for f in dataclasses.fields(params)
            if isinstance(getattr(params, f.name), torch.Tensor)
        }

        def about_centre(a):
            c = torch.tensor([(width - 1) / 2, (height - 1) / 2]).double()
            return torch.cat(
                [torch.cat([a, (c - a @ c)[:, None]], 1), torch.tensor([[0.0, 0.0, 1.0]]).double()]
            )

        def matrix(a, b, c, d):
            return torch.tensor([[float(a), float(b)], [float(c), float(d)]]).double()

        angle, (sx, sy) = math.radians(p["angle"]), (math.radians(s) for s in p["shear"])
        turn = matrix(math.cos(angle), -math.sin(angle), math.sin(angle), math.cos(angle))
        shear = matrix(1, 0, -math.tan(sy), 1) @ matrix(1, -math.tan(sx), 0, 1)
        shift = torch.eye(3).double()
        shift[:2, 2] = p["translate"]
        flip = matrix(1 - 2 * p["hflip"], 0, 0, 1 - 2 * p["vflip"])
        forward = (
            shift
            @ about_centre(p["scale"] * turn @ shear)
            @ about_centre(matrix(1, 0, 0, p["stretch"]))
            @ about_centre(flip)
        )
        top, left, h, w = p["crop"].tolist()
        crop = torch.tensor(
            [
                [w / size[1], 0, left + w / size[1] / 2 - 0.5],
                [0, h / size[0], top + h / size[0] / 2 - 0.5],
                [0, 0, 1],
            ]
        ).double()
        matrices.append((torch.linalg.inv(forward) @ crop)[:2])
    y = reference_warp(x.double(), torch.stack(matrices), size)
    for name in ("brightness", "contrast", "saturation", "hue"):
        y = reference_colour(name, y, getattr(params, name))
    y = reference_blur(y, params.sigma, 3)
    y = (y - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / torch.tensor([0.2, 0.2, 0.3]).view(3, 1, 1)
    for image, (top, left, h, w) in zip(y, params.erase.tolist(), strict=True):
        image[:, top : top + h, left : left + w] = 0
    return y


def test_composition():
    """All steps at once are one warp by the product of their matrices, then the colours, blur, normalise,
    erase.
    """
    x = pictures(6, 3, 33, 37)
    aug = everything()
    params = aug.sample(x, seed=11)
    assert_images(apply(x, params), reference(x, params, (20, 30)), torch.float32, 2e-4)
    byte = (x * 255).round().to(torch.uint8)
    assert_images(apply(byte, params), reference(byte / 255, params, (20, 30)), torch.float32, 2e-4)


def test_sample_depends_on_seed_and_index_alone():
    x = pictures(40, 3, 25, 31)
    aug = everything()
    params, images = aug.sample(x, seed=3), apply(x, aug.sample(x, seed=3))
    seed = torch.tensor([3])
    for begin, end in ((0, 1), (7, 9), (20, 40)):
        part = aug.sample(x[begin:end], seed=seed, offset=begin)
        for field in dataclasses.fields(Params):
            if field.name != "settings":
                assert torch.equal(getattr(part, field.name), getattr(params, field.name)[begin:end])
        assert torch.equal(apply(x[begin:end], part), images[begin:end])
    assert torch.equal(apply(x[5], aug.sample(x[5], seed=3, offset=5)), images[5])
    # What one step draws does not depend on the others.
    assert torch.equal(Augment(rotate=15).sample(x, seed=3).angle, params.angle)
    assert not torch.equal(aug.sample(x, seed=4).angle, params.angle)
    generator = torch.Generator().manual_seed(1)
    first = aug(x, generator)
    assert torch.equal(first, aug(x, generator=torch.Generator().manual_seed(1)))
    torch.manual_seed(5)
    first = aug(x)
    torch.manual_seed(5)
    assert torch.equal(first, aug(x)) and not torch.equal(first, aug(x))


def test_threads_do_not_matter():
    aug = everything()
    for batch in (1, 3, 17):
        for x in (
            pictures(batch, 3, 60, 70),
            pictures(batch, 3, 60, 70).contiguous(memory_format=torch.channels_last),
        ):
            for size in ((20, 30), (90, 80)):
                params = everything(size=size, antialias=True).sample(x, seed=2)
                images = []
                for threads in (1, 2, 3):
                    torch.set_num_threads(threads)
                    images.append(apply(x, params))
                assert torch.equal(images[0], images[1]) and torch.equal(images[0], images[2])
    assert aug.training


SCRIPT = """
import hashlib, torch, fastreg as fr
torch.manual_seed(0)
for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.uint8):
    for interpolation, padding in (("bilinear", "zeros"), ("bilinear", "fill"), ("nearest", "reflect"), ("bicubic", "border")):
        x = torch.rand(5, 3, 39, 45)
        x = (x * 255).to(dtype) if dtype == torch.uint8 else x.to(dtype)
        aug = fr.augment.Augment(rotate=40, scale=(.3, 1.4), hflip=.5, brightness=.3, contrast=.3, saturation=.3, hue=.2,
                                 blur=(5, (.1, 2)), interpolation=interpolation, padding=padding, fill=.5, antialias=True,
                                 size=(20, 37))
        y = fr.augment.apply(x, aug.sample(x, seed=1))
        print(hashlib.sha1(y.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest())
"""


def test_instruction_sets_give_the_same_bits():
    outputs = []
    for isa in fr._C.build_info()["instruction_sets"].split(","):
        env = {**os.environ, "FASTREG_CPU_CAPABILITY": isa, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True)
        if "that this machine can run" in done.stderr:
            continue
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout.split())
    assert len(outputs[0]) == 20 and all(output == outputs[0] for output in outputs)


def uniform(values, low, high):
    """Within the range, and the Kolmogorov-Smirnov distance to the uniform distribution below its 1e-6
    quantile.
    """
    assert low <= values.min() and values.max() <= high
    u = ((values.double() - low) / (high - low)).sort().values
    n = len(u)
    rank = torch.arange(n, dtype=torch.float64)
    distance = torch.maximum((u - rank / n).abs().max(), ((rank + 1) / n - u).abs().max())
    assert distance < 2.7 / math.sqrt(n), distance


def test_distributions():
    n = 20000
    x = torch.empty(n, 0, 40, 60)  # no channels: only the shape counts
    params = everything(size=(30, 30)).sample(x, seed=0)
    uniform(params.angle, -15, 15)
    uniform(params.stretch, 0.8, 1.2)
    uniform(params.scale, 0.9, 1.1)
    uniform(params.shear[:, 0], -5, 5)
    assert (params.shear[:, 1] == 0).all()
    uniform(params.sigma, 0.1, 2.0)
    for name in ("brightness", "contrast", "saturation"):
        uniform(getattr(params, name), 0.7, 1.3)
    uniform(params.hue, -0.05, 0.05)
    for name, chance in (("hflip", 0.5), ("vflip", 0.3)):
        assert abs(getattr(params, name).mean() - chance) < 5 * math.sqrt(chance * (1 - chance) / n)
    erased = params.erase[:, 2] > 0
    assert abs(erased.double().mean() - 0.5) < 5 * 0.5 / math.sqrt(n)
    top, left, height, width = params.erase[erased].unbind(1)
    assert (
        (top + height <= 30).all()
        and (left + width <= 30).all()
        and (height < 30).all()
        and (width < 30).all()
    )
    share = height * width / 900
    assert 0.01 < share.min() < 0.03 and 0.3 < share.max() < 0.36
    for axis, most in ((0, 6), (1, 8)):
        shift = params.translate[:, axis]
        assert (shift == shift.round()).all() and shift.abs().max() == most
        counts = torch.bincount((shift + most).long())[1:-1]  # whole pixels, the two ends half as often
        assert (counts - counts.double().mean()).abs().max() < 5 * counts.double().mean().sqrt()
    top, left, height, width = params.crop.unbind(1)
    assert (
        (top >= 0).all() and (left >= 0).all() and (top + height <= 40).all() and (left + width <= 60).all()
    )
    assert (
        abs((height * width / 2400).min() - 0.3) < 0.02
        and (width / height).min() > 0.7
        and (width / height).max() < 1.4
    )
    names = ("angle", "scale", "stretch", "brightness", "hue", "sigma", "hflip", "vflip")
    table = torch.stack([*(getattr(params, name) for name in names), params.crop[:, 0], params.shear[:, 0]])
    correlation = torch.corrcoef(torch.cat([table[:, 1:], table[:, :-1]])).fill_diagonal_(0)
    assert correlation.abs().max() < 6 / math.sqrt(n), "columns, and neighbouring samples, are independent"


def test_windows():
    aug = Augment(size=32, crop=4)
    params = aug.sample(torch.empty(20000, 0, 32, 32), seed=1)
    for axis in (0, 1):
        counts = torch.bincount((params.crop[:, axis] + 4).long(), minlength=9)
        assert len(counts) == 9 and (counts - 20000 / 9).abs().max() < 5 * math.sqrt(20000 / 9)
    x = pictures(9, 3, 32, 32)
    params = aug.sample(x, seed=1)
    padded = F.pad(x, (4, 4, 4, 4))
    for i, (top, left, _, _) in enumerate(params.crop.long().tolist()):
        assert torch.equal(apply(x, params)[i], padded[i, :, top + 4 : top + 36, left + 4 : left + 36])


def test_crops_that_do_not_fit_are_taken_from_the_middle():
    params = Augment(size=8, crop=(0.9, 1.0)).sample(torch.empty(50, 3, 10, 100), seed=0)
    assert (params.crop == torch.tensor([0.0, 43.0, 10.0, 13.0])).all()


def test_eval_is_not_random():
    x = pictures(3, 3, 40, 50)
    aug = everything(crop=None).eval()
    want = F.interpolate(x.double(), (20, 30), mode="bilinear", align_corners=False)
    want = (want - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / torch.tensor([0.2, 0.2, 0.3]).view(3, 1, 1)
    assert_images(aug(x), want, tolerance=1e-5)
    assert torch.equal(Augment(size=(10, 20), crop=0).eval()(x), x[:, :, 15:25, 15:35])
    assert torch.equal(Augment(rotate=10).eval()(x), x)


def test_policies():
    x = pictures(4, 3, 32, 32, torch.uint8)
    y = Augment.cifar()(x)
    assert y.shape == (4, 3, 32, 32) and y.dtype == torch.float32 and y.min() < -1
    y = Augment.imagenet(size=64, hue=0.0)(pictures(2, 3, 90, 120))
    assert y.shape == (2, 3, 64, 64) and y.isfinite().all()


# ---- as a part of programs


def test_module():
    aug = everything()
    x = pictures(4, 3, 33, 37)
    model = nn.Sequential(aug, nn.Flatten(), nn.Linear(3 * 20 * 30, 2))
    assert model(x).shape == (4, 2)
    for other in (copy.deepcopy(aug), pickle.loads(pickle.dumps(aug))):
        assert torch.equal(apply(x, other.sample(x, seed=1)), apply(x, aug.sample(x, seed=1)))
    assert "angle=(-15.0, 15.0)" in repr(aug) and Augment().extra_repr() == ""
    assert torch.equal(Augment()(x), x)
    with torch.autocast("cpu", torch.bfloat16):
        assert aug(x).dtype == torch.float32
    with torch.inference_mode():
        assert aug(x).shape == (4, 3, 20, 30)


@pytest.mark.parametrize("dynamic", (False, True))
def test_compile(dynamic):
    torch._dynamo.reset()
    aug = everything()
    compiled = torch.compile(lambda x: aug(x) * 2, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for batch in (3, 5):
        x = pictures(batch, 3, 33, 37)
        torch.manual_seed(1)
        got = compiled(x)
        torch.manual_seed(1)
        assert torch.equal(got, aug(x) * 2)


def test_compile_backward():
    torch._dynamo.reset()
    x = pictures(2, 3, 12, 13)
    params = everything(hue=None).sample(x, seed=1)
    grads = []
    for function in (apply, torch.compile(apply, fullgraph=True, backend="aot_eager")):
        leaf = x.clone().requires_grad_()
        function(leaf, params).square().sum().backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads) and grads[0].abs().max() > 0


def test_opcheck():
    from fastreg.augment import _op

    x = pictures(2, 3, 9, 11)
    m, boxes = some_matrices(2, 9, 11), torch.tensor([[1, 2, 3, 4], [0, 0, 0, 0]])
    colour, blur = torch.full((2, 4), 0.4).double(), torch.full((2, 6), 1 / 3).double()
    windows = torch.tensor([[1, 1, 5, 6], [0, 0, 9, 11]])
    constants = [0.0] * 6 + [2.0] * 3 + [0.5] * 3
    for images in (x, x.contiguous(memory_format=torch.channels_last)):
        tensors = (m, colour, blur, boxes, windows)
        static = (constants, 7, 8, 3, 3, 15, 1, 0, True, True, torch.float32)
        torch.library.opcheck(torch.ops.fastreg.augment.default, (images, *tensors, *static))
        static = (constants, 7, 8, 3, 3, 7, 1, 0, True, True, torch.float32)
        torch.library.opcheck(
            torch.ops.fastreg.augment_backward.default, (torch.rand(2, 3, 7, 8), images, *tensors, *static)
        )
    one, two, four = torch.rand(4).double(), torch.rand(4, 2).double(), torch.rand(4, 4).double()
    for parameters in (
        (one, one, one, one, one, two, two, four),
        (None, None, one, None, four[:, 1], None, four[:, 1:3], None),
    ):
        torch.library.opcheck(torch.ops.fastreg.augment_matrices.default, (one, *parameters, 5, 6, 7, 8))
    torch.library.opcheck(_op.augment_gaussian, (one, four[:, 2], 3, 5))
    bounds = [1.0] * len(_op.COLUMNS)
    drawn = (
        x,
        torch.tensor([3]),
        5,
        4,
        [0.5] * 3,
        bounds,
        bounds,
        1,
        [0.1, 1.0, -0.3, 0.3, 0.0],
        [0.1, 0.3, -1.0, 1.0],
    )
    torch.library.opcheck(_op.augment_draw, (*drawn, [9, 9, 8, 8], 3, 5))


class _Digits(torch.utils.data.Dataset):
    def __len__(self):
        return 10

    def __getitem__(self, i):
        return torch.full((3, 8, 8), i, dtype=torch.uint8), i


@pytest.mark.parametrize("workers", (0, 2))
def test_data_loader(workers):
    loader = torch.utils.data.DataLoader(
        _Digits(), batch_size=4, num_workers=workers, collate_fn=Augment(hflip=0.5, mean=0.0, std=1.0).collate
    )
    seen = torch.cat([images[:, 0, 0, 0] * 255 for images, _ in loader])
    assert torch.allclose(seen, torch.arange(10.0), atol=1e-4)


@pytest.mark.parametrize("padding", ("zeros", "border", "reflect", "fill"))
@pytest.mark.parametrize("interpolation", ("nearest", "bilinear", "bicubic"))
def test_gradient(interpolation, padding):
    x = (torch.rand(2, 3, 6, 7, dtype=torch.float64) * 0.6 + 0.2).requires_grad_()
    options = dict(
        brightness=0.1,
        contrast=0.1,
        saturation=0.1,
        mean=0.5,
        std=0.2,
        interpolation=interpolation,
        padding=padding,
        fill=0.3,
    )
    aug = Augment(
        hflip=0.5, rotate=15, scale=(0.8, 1.4), blur=(3, (0.1, 2)), erase=0.5, size=(5, 8), **options
    )
    params = aug.sample(x, seed=5)
    assert torch.autograd.gradcheck(lambda t: apply(t, params), x)
    if interpolation != "nearest":
        for more in ({}, {"rotate": 30, "scale": (0.3, 0.4)}):
            params = Augment(size=(2, 3), antialias=True, hflip=0.5, **options | more).sample(x, seed=5)
            assert torch.autograd.gradcheck(lambda t: apply(t, params), x)  # noqa: B023


def test_gradient_where_it_is_cut_off():
    """A clamped pixel passes nothing on, as torch's clamp; windows, one channel and narrow dtypes."""
    x = pictures(3, 3, 5, 6).requires_grad_()
    AF.adjust_brightness(x, 1.7).sum().backward()
    assert torch.equal(x.grad, 1.7 * (x.detach() * 1.7 <= 1).float())
    wide_x = torch.rand(2, 1, 9, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: AF.resized_crop(t, 1, 2, 7, 5, (4, 3)), wide_x)
    assert torch.autograd.gradcheck(
        lambda t: AF.resized_crop(t, torch.tensor([1, 0]), 2, 7, 5, (9, 9)), wide_x
    )
    assert torch.autograd.gradcheck(lambda t: AF.adjust_contrast(t, 0.8), wide_x)
    for dtype in (torch.float16, torch.bfloat16):
        narrow = x.detach().to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
        AF.gaussian_blur(narrow, 3).sum().backward()
        assert narrow.grad.dtype == dtype and (narrow.grad.sum((2, 3)) - 30).abs().max() < 0.5
    with pytest.raises(ValueError, match="hue has no gradient"):
        AF.adjust_hue(x, 0.1)
    with torch.no_grad():
        AF.adjust_hue(x, 0.1)
    y = AF.gaussian_blur(x, 3).square()
    (g,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()


# ---- mixtures


def test_mixup():
    images, labels = torch.zeros(500, 3, 2, 2), torch.arange(500) % 10
    images += labels.view(-1, 1, 1, 1)
    targets = F.one_hot(labels, 10).double()
    mixed, soft = mixup(images, targets, alpha=0.5)
    assert torch.allclose(soft.sum(1), torch.ones(500).double()) and ((soft > 0).sum(1) <= 2).all()
    assert torch.allclose(mixed[:, 0, 0, 0].double(), soft @ torch.arange(10).double(), atol=1e-5)
    share = soft[torch.arange(500), labels]
    assert share.min() < 0.05 and share.max() > 0.95
    assert torch.equal(mixup(images, labels, 1.0, 10, generator=torch.Generator().manual_seed(3))[0],
                       mixup(images, labels, 1.0, 10, generator=torch.Generator().manual_seed(3))[0])  # fmt: skip
    byte, soft = mixup(images.to(torch.uint8), labels, num_classes=10)
    assert byte.dtype == torch.uint8 and soft.dtype == torch.float32
    fr.cross_entropy(torch.randn(500, 10), soft)


def test_cutmix():
    images, labels = torch.zeros(300, 1, 8, 9), torch.arange(300) % 4
    images += labels.view(-1, 1, 1, 1)
    mixed, soft = cutmix(images, labels, num_classes=4)
    own = (mixed == labels.view(-1, 1, 1, 1)).double().mean((1, 2, 3))
    differs = soft[torch.arange(300), labels] < 1
    assert torch.allclose(soft[torch.arange(300), labels][differs].double(), own[differs], atol=1e-6)
    assert torch.allclose(soft.sum(1), torch.ones(300)) and differs.double().mean() > 0.5
    for image, label in zip(
        mixed[differs, 0], labels[differs], strict=True
    ):  # what is not the sample's own is one rectangle
        other = image != label
        assert torch.equal(other, other.any(1)[:, None] & other.any(0))


# ---- hostile input


def test_empty_and_tiny():
    for shape in ((0, 3, 5, 6), (2, 0, 5, 6)):
        assert everything(mean=None, std=None, contrast=None, saturation=None, hue=None)(
            torch.empty(shape)
        ).shape == (
            *shape[:2],
            20,
            30,
        )
    assert everything()(torch.rand(2, 3, 1, 1)).isfinite().all()
    assert everything(size=None, crop=None)(torch.rand(2, 3, 1, 1)).shape == (2, 3, 1, 1)
    with pytest.raises(ValueError, match="no pixels"):
        Augment(size=4)(torch.empty(2, 3, 0, 5))


def test_long_images():
    x = torch.rand(1, 1, 2, 40000)
    turned = apply(x, Params(angle=torch.tensor([180.0])))
    assert_images(turned, x.flip(-1, -2).double(), tolerance=1e-5)
    assert torch.equal(Augment(size=(2, 50), crop=0).eval()(x), x[..., 19975:20025])


def test_nan_pixels_stay_where_they_are():
    x = pictures(1, 3, 12, 12)
    x[0, 1, 5, 5] = NAN
    y = AF.rotate(x, 30.0, "bilinear")
    assert 1 <= y.isnan().sum() <= 5 and not y[:, 0].isnan().any()
    assert AF.adjust_brightness(x, 0.5).isnan().sum() == 1
    assert AF.gaussian_blur(x, 3).isnan().sum() == 9
    assert AF.adjust_contrast(x, 0.5).isnan().all()  # the mean of the image is NaN


def test_far_positions():
    x = pictures(1, 1, 5, 5)
    assert (AF.affine(x, 0, (1e6, 0), 1.0, 0, "bilinear") == 0).all()
    for matrix in (1e12, NAN, INF):
        with pytest.raises(ValueError, match="2\\^30 pixels"):
            by_matrix(x, torch.full((1, 2, 3), matrix).double())


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"hflip": 1.5}, "hflip must be in"),
        ({"vflip": NAN}, "vflip must be in"),
        ({"erase": -0.1}, "erase must be in"),
        ({"rotate": (10, -10)}, "lo <= hi"),
        ({"rotate": INF}, "finite"),
        ({"scale": (0, 1)}, "greater than 0"),
        ({"stretch": 1.2}, "stretch must be a pair"),
        ({"translate": (0.1, 1.2)}, "translate must be in"),
        ({"translate": 0.1}, "translate must be a pair"),
        ({"hue": 0.6}, "hue must be at most 0.5"),
        ({"hue": (-0.6, 0)}, "hue must be in"),
        ({"brightness": -0.5}, "brightness must be in"),
        ({"size": (0, 4)}, "size must be whole"),
        ({"size": 4.5}, "size must be whole"),
        ({"crop": (0, 1)}, "crop must be shares"),
        ({"crop": -1}, "crop must be in"),
        ({"blur": 3}, "blur must be"),
        ({"blur": (4, (1, 2))}, "must be odd"),
        ({"blur": (3, (-1, 2))}, "blur must be in"),
        ({"interpolation": "lanczos"}, "interpolation must be one of"),
        ({"padding": "wrap"}, "padding must be one of"),
        ({"fill": NAN}, "fill must be finite"),
        ({"dtype": torch.int32}, "dtype must be"),
    ],
)
def test_wrong_constructor(arguments, message):
    with pytest.raises(ValueError, match=message):
        Augment(**arguments)


def test_wrong_input():
    x = pictures(2, 3, 6, 7)
    with pytest.raises(TypeError, match="must be a torch"):
        Augment()([1])
    with pytest.raises(TypeError, match="int64"):
        apply(x.long(), Params())
    with pytest.raises(ValueError, match=r"must be \(B, C, H, W\)"):
        Augment()(x[None])
    with pytest.raises(ValueError, match=r"channels, height, width"):
        AF.rotate(x[0, 0], 3.0)
    with pytest.raises(ValueError, match="params are of 3 samples"):
        apply(x, Params(angle=torch.zeros(3)))
    for step in ("contrast", "saturation", "hue"):
        with pytest.raises(ValueError, match="1 or 3 channels"):
            Augment(**{step: 0.1})(pictures(2, 4, 5, 5))
        with pytest.raises(ValueError, match="1 or 3 channels"):
            getattr(AF, f"adjust_{step}")(pictures(2, 2, 5, 5), 0.1)
    with pytest.raises(ValueError, match="hue_factor must be in"):
        AF.adjust_hue(x, 0.7)
    with pytest.raises(ValueError, match="hue_factor must be finite and in"):
        AF.adjust_hue(x, torch.tensor([0.1, 0.7]))
    with pytest.raises(ValueError, match="one for each of 2 samples"):
        AF.rotate(x, torch.zeros(3))
    with pytest.raises(ValueError, match="scale must be finite and greater than 0"):
        AF.affine(x, 0, (0, 0), 0.0, 0)
    with pytest.raises(ValueError, match="window of sample 0 must lie inside"):
        AF.resized_crop(x, torch.zeros(2), 0, 7, 7, (3, 3))
    with pytest.raises(ValueError, match="one for each of 3 channels"):
        AF.normalize(x, (0.1, 0.2), 1.0)
    with pytest.raises(ValueError, match="std must not be 0"):
        AF.normalize(x, 0.1, (0.1, 0.0, 0.2))
    with pytest.raises(ValueError, match="does not fit"):
        Augment(size=20, crop=4)(x)
    with pytest.raises(ValueError, match="seed must be one int64"):
        Augment(rotate=3).sample(x, seed=torch.zeros(2))
    with pytest.raises(TypeError, match="offset must be an int"):
        Augment(rotate=3).sample(x, seed=1, offset=0.5)
    with pytest.raises(ValueError, match="cannot become"):
        Augment(rotate=3, dtype=torch.uint8)(x)
    with pytest.raises(ValueError, match="num_classes"):
        mixup(x, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="alpha must be"):
        cutmix(x, torch.tensor([0, 1]), 0.0, 2)
    with pytest.raises(ValueError, match="targets"):
        mixup(x, torch.tensor([0, 1, 2]), num_classes=3)


def test_gallery():
    """One image under each step, of its size; a batch under a policy, in [0, 1]."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from fastreg.augment import gallery

    for image in (pictures(1, 3, 40, 50, torch.uint8)[0], pictures(1, 1, 16, 16)[0]):
        shown = gallery.steps(image)
        assert all(pixels.shape == image.shape for _, pixels in shown) and torch.equal(shown[0][1], image)
        assert len({title for title, _ in shown}) == len(shown) == (14 if len(image) == 3 else 12)
        for title, pixels in shown[1:]:
            assert not torch.equal(pixels, image), title
    figure = gallery.figure(pictures(1, 3, 40, 50)[0], Augment.cifar(), columns=4)
    assert sum(len(axes.images) for axes in figure.axes) == 14 + 8


def calls(x):
    """Every function of fastreg.augment, with numbers and with tensors of one value per sample."""
    each, labels = (
        torch.full((len(x),), 0.3, device=x.device),
        torch.zeros(len(x), dtype=torch.long, device=x.device),
    )
    size = tuple(x.shape[2:])
    return (
        Augment.cifar(size=size)(x),
        Augment.imagenet(size=8)(x),
        Augment.imagenet(size=8).eval()(x),
        everything(size=None, translate=(0.1, 0.2), shear=(1, 2, 3, 4))(x),
        apply(x, Augment(hflip=0.5).sample(x, seed=3, offset=5)),
        apply(x, Params(settings=Settings(size=(4, 5)))),
        AF.rotate(x, each, "bilinear", center=(3.0, 2.0)),
        AF.rotate(x, 30.0, expand=True),
        AF.affine(x, 3, (each, 3), 1.1, (each, 2.0), fill=0.5),
        AF.resized_crop(x, 1, 2, 3, 4, 8),
        AF.resized_crop(x, each, 2, 3, 4, (8, 9), "nearest"),
        AF.adjust_brightness(x, each),
        AF.adjust_contrast(x, 0.5),
        AF.adjust_saturation(x, each),
        AF.adjust_hue(x, 0.1),
        AF.gaussian_blur(x, 3),
        AF.gaussian_blur(x, [3, 5], each),
        AF.erase(x, 1, each, 3, 4, 0.5),
        AF.normalize(x, [0.5] * 3, 0.5),
        AF.vertical_stretch(x, each),
        AF.horizontal_flip(x),
        *mixup(x, labels, num_classes=10),
        *cutmix(x, labels, num_classes=10),
    )


def test_nothing_is_made_on_another_device():
    """On a GPU that is only pretended: every tensor is made on the images' device, and none is copied to or
    from it.
    """
    from torch._subclasses import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode

    class NoCopies(TorchDispatchMode):
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            result = f(*args, **kwargs)
            devices = {t.device.type for t in (*args, result) if isinstance(t, torch.Tensor)}
            assert "_local_scalar_dense" not in str(f) and not ("copy" in str(f) and len(devices) > 1), (
                f,
                args,
                kwargs,
            )
            return result

    with FakeTensorMode(allow_non_fake_inputs=True), NoCopies():
        for result in calls(torch.empty(4, 3, 12, 13, device="cuda")):
            assert result.device.type == "cuda"
    assert all(result.device.type == "cpu" for result in calls(pictures(4, 3, 12, 13)))


def test_a_box_outside_of_the_image():
    x = pictures(1, 3, 8, 9)
    for box in ((-1, 0, 3, 3), (0, 7, 3, 3), (6, 0, 3, 3), (0, 0, 0, 3), (0, 0, 3, -1)):
        with pytest.raises(
            ValueError, match=r"resized_crop: the box must lie inside the image of \(8, 9\), got top"
        ):
            AF.resized_crop(x, *box, 4)


def test_a_step_so_large_that_positions_would_wrap_around():
    """A row of one pixel: the vector's other lanes, whose positions are taken modulo 2^32 pixels, must not be
    read.
    """
    from fastreg.augment import _op

    x = pictures(1, 3, 64, 64)
    for step in (2**32 / 15, 2**33 / 15, -(2**32) / 15, 2.0**26, 2.0**27):
        for row in (0, 1):
            m = torch.tensor([[[0.0, 0.0, 3.5], [0.0, 0.0, 3.5]]], dtype=torch.float64)
            m[0, row, 0] = step
            for interpolation in _op.INTERPOLATIONS:
                with pytest.raises(ValueError, match=r"leads further than 2\^30 pixels"):
                    by_matrix(x, m, (1, 1), interpolation=interpolation)
            m[0, row, 0] = 2.0**25
            want = x[:, :, 3:5, 3:5].mean((2, 3), keepdim=True)
            assert_images(by_matrix(x, m, (1, 1)), want.double(), tolerance=1e-6)
