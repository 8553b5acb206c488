"""The steps of augmentation one by one, for every dtype and layout: against the plain-torch definition in
float64, against torch's interpolate, and against torchvision where it is installed; their gradients; hostile
images and positions.
"""

import dataclasses

import pytest
import torch
from augment_reference import (
    ROUNDING,
    SIZES,
    assert_images,
    by_matrix,
    layouts,
    pictures,
    reference,
    some_matrices,
    wide,
)
from torch.nn import functional as F

from fastreg.augment import Augment, Params, Settings, _op, apply
from fastreg.augment import functional as AF

INF, NAN = float("inf"), float("nan")


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
            want = reference(by_matrix, x, m, size, interpolation=interpolation, padding=padding, fill=0.25)
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
        want = reference(by_matrix, x, m, size, padding=padding, fill=0.25)
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
        reference(by_matrix, x, m, padding="border"),
        tolerance=1e-6,
    )


def test_layouts_and_dtypes():
    colour = {name: torch.tensor([1.2, 0.8]).double() for name in ("brightness", "contrast", "saturation")}
    colour["hue"] = torch.tensor([0.1, -0.2]).double()
    for dtype, tolerance in ROUNDING.items():
        for channels in (1, 3):
            x = pictures(2, channels, 19, 23, dtype)
            m = some_matrices(2, 19, 23)
            sigma = torch.tensor([0.8, 1.1]).double()
            weights = _op.augment_gaussian(sigma, sigma, 5, 5)
            steps = dict(**_op.factors(colour), blur=weights, kernel=(5, 5), mean=0.4, std=0.3)
            want = reference(by_matrix, x, m, **steps)
            for y in layouts(x):
                got = by_matrix(y, m, **steps)
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
                reference(getattr(AF, f"adjust_{step}"), x, torch.tensor(factor, dtype=torch.float64)),
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
            sigma = torch.tensor([0.0, 0.4, 2.5])
            want = reference(AF.gaussian_blur, x, kernel, sigma)
            assert_images(AF.gaussian_blur(x, kernel, sigma), want)


def test_blur_of_two_sizes():
    x = torch.rand(2, 3, 11, 14)
    got = AF.gaussian_blur(x, (3, 7), (0.7, 1.6))
    across = AF.gaussian_blur(AF.gaussian_blur(x.double(), (3, 1), (0.7, 1.0)), (1, 7), (1.0, 1.6))
    assert_images(got, across)
    assert_images(got, reference(AF.gaussian_blur, x, (3, 7), (0.7, 1.6)))
    swapped = reference(AF.gaussian_blur, x, (7, 3), (1.6, 0.7))
    assert (got.double() - swapped).abs().max() > 1e-3, "sizes are told apart"


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
    assert_images(got, reference(by_matrix, x, m.double(), padding=padding, fill=0.5))


def test_vertical_stretch():
    """Pixel y of the result lies at (y - c) / factor + c of the image, in the same column."""
    x = pictures(2, 3, 21, 8)
    m = torch.zeros(2, 2, 3)
    factor = torch.tensor([1.6, 0.7])
    m[:, 0, 0], m[:, 1, 1], m[:, 1, 2] = 1, 1 / factor, 10 - 10 / factor
    assert_images(AF.vertical_stretch(x, factor), reference(by_matrix, x, m.double()), tolerance=2e-6)


@pytest.mark.parametrize("antialias", (False, True))
@pytest.mark.parametrize("interpolation", ("nearest", "bilinear", "bicubic"))
def test_resized_crop(interpolation, antialias):
    for dtype in (torch.float32, torch.float64, torch.uint8):
        x = pictures(2, 3, 31, 40, dtype)
        # Smaller both ways, larger one way and smaller the other, in both orders, and one pixel.
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
    """Stripes finer than the result can show become grey, not moiré; without antialias they do not."""
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

    def check(got, want, tolerance=1e-5):
        assert_like_torchvision(got, want, dtype, tolerance)

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
    assert torch.autograd.gradgradcheck(
        lambda t: AF.gaussian_blur(AF.adjust_contrast(t, 0.8), 3).square(), wide_x[:1, :, :4, :4]
    )


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


@pytest.mark.parametrize(
    "box", [(-2, -4, 5, 10), (3, -4, 60, 6), (-5, 2, 3, 3), (4, 6, 2, 60), (0, -9, 4, 3)]
)
def test_a_box_may_begin_outside_of_the_image(box):
    """The part inside is erased, and no other: on every path, wherever the box begins."""
    x = torch.rand(2, 3, 8, 8)
    i, j, h, w = box
    rows, columns = torch.arange(8).view(-1, 1), torch.arange(8)
    inside = (rows >= i) & (rows < i + h) & (columns >= j) & (columns < j + w)
    assert torch.equal(AF.erase(x, *box, 7.0), torch.where(inside, 7.0, x))
    assert torch.equal(AF.erase(x.clone(), *box, 7.0, inplace=True), torch.where(inside, 7.0, x))
    pixels = torch.rand(3, h, w)
    want = x.clone()
    for r, c in inside.nonzero().tolist():
        want[..., r, c] = pixels[:, r - i, c - j]
    assert torch.equal(AF.erase(x, *box, pixels), want)


def test_one_column_of_pixels_that_shrinks_for_one_sample():
    """Such images need no copy, whatever the stride of a line is."""
    x = torch.rand(2, 3, 100, 1)
    last = x.contiguous(memory_format=torch.channels_last)
    for height in (torch.tensor([100.0, 4.0]), torch.tensor([4.0, 100.0])):
        got, want = (AF.resized_crop(images, 0, 0, height, 1, (8, 8)) for images in (last, x))
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_rotate_with_expand_wants_images():
    with pytest.raises(TypeError, match="rotate"):
        AF.rotate([[0.0]], 10, expand=True)


@pytest.mark.parametrize("factor", [3, 3.0, torch.tensor(3), torch.tensor(3.0)], ids=repr)
def test_brightness_is_clamped_for_every_type_of_factor(factor):
    """torchvision's wraps around where the factor of bytes is an int."""
    image = torch.tensor([0, 50, 85, 86, 100, 255], dtype=torch.uint8).expand(3, 2, 6)
    want = (3 * image.int()).clamp(max=255).to(torch.uint8)
    assert torch.equal(AF.adjust_brightness(image, factor), want)
