"""The steps that change the values of pixels, each against torchvision's and against what they promise."""

import pytest
import torch

from fastreg.augment import _tones
from fastreg.augment import functional as AF

DTYPES = (torch.uint8, torch.float32, torch.float64, torch.float16, torch.bfloat16)
# Colour and grey, with and without a batch, sides too short for the filter of 3 x 3, one pixel, no image.
SHAPES = (
    (4, 3, 9, 7),
    (3, 16, 17),
    (2, 3, 1, 5, 4),
    (5, 3, 2, 8),
    (2, 3, 1, 1),
    (0, 3, 4, 4),
    (2, 1, 33, 34),
)


def images(shape, dtype, seed=0):
    x = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    x = (x * 0.6 + 0.2).clamp(0.25, 0.75)
    return (x * 255).to(torch.uint8) if dtype == torch.uint8 else x.to(dtype)


CALLS = (
    ("invert", ()),
    ("posterize", (0,)),
    ("posterize", (3,)),
    ("posterize", (8,)),
    ("solarize", (0.5,)),
    ("solarize", (0.0,)),
    ("autocontrast", ()),
    ("equalize", ()),
    ("adjust_sharpness", (0.0,)),
    ("adjust_sharpness", (0.6,)),
    ("adjust_sharpness", (2.5,)),
    ("rgb_to_grayscale", ()),
    ("rgb_to_grayscale", (3,)),
)


def in_units(name, arguments, dtype):
    return tuple(a * 255 for a in arguments) if name == "solarize" and dtype == torch.uint8 else arguments


@pytest.mark.parametrize("name, arguments", CALLS, ids=lambda value: str(value))
def test_values_are_torchvisions(name, arguments):
    theirs = pytest.importorskip("torchvision.transforms.v2.functional")
    for dtype in DTYPES:
        for shape in SHAPES:
            x = images(shape, dtype)
            for view in (x, x.transpose(-1, -2), x.contiguous(memory_format=torch.channels_last)
                         if x.dim() == 4 else x):  # fmt: skip
                before = view.clone()
                got = getattr(AF, name)(view, *in_units(name, arguments, dtype))
                assert torch.equal(view, before) and got.dtype == dtype
                if not x.numel():
                    assert not got.numel()
                    continue
                narrow = dtype in (torch.float16, torch.bfloat16)
                same = view.float() if narrow else view  # torchvision computes these in their own dtype
                want = getattr(theirs, name)(same, *in_units(name, arguments, dtype))
                limit = torch.finfo(dtype).eps if dtype.is_floating_point else 0
                torch.testing.assert_close(got.double(), want.double(), rtol=0, atol=2 * limit)


def test_one_number_for_each_sample():
    for dtype in DTYPES:
        x = images((3, 3, 8, 9), dtype)
        most = 255 if dtype == torch.uint8 else 1
        for name, values in (
            ("posterize", torch.tensor([1, 4, 8])),
            ("solarize", torch.tensor([0.3, 0.5, 1.0]) * most),
            ("adjust_sharpness", torch.tensor([0.0, 1.0, 3.0])),
        ):
            step = getattr(AF, name)
            got = step(x, values)
            for i, value in enumerate(values.tolist()):
                assert torch.equal(got[i], step(x[i], value)), (name, dtype)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_bytes_are_those_of_the_definition(channels):
    """By the operator of policies, which knows images of 1 and 3 channels."""
    x = images((5, channels, 21, 34), torch.uint8)
    for name, value in (
        *[("solarize", t) for t in (-1e20, -3, 0, 0.5, 99.999, 100, 100.25, 254.5, 255)],
        *[("adjust_sharpness", t) for t in (0, 1e-9, 0.3, 1, 77.7, 1e7, 1e20)],
        *[("posterize", t) for t in (0, 1, 2.5, 7.99, 8)],
    ):
        values = torch.tensor([value, value, 1, 0, 1], dtype=torch.float64)
        for given in (value, values):
            assert torch.equal(getattr(AF, name)(x, given), getattr(_tones, name)(x, given)), (name, value)
    for name in ("invert", "autocontrast", "equalize"):
        assert torch.equal(getattr(AF, name)(x), getattr(_tones, name)(x)), name


def test_what_they_promise():
    x = images((2, 3, 32, 31), torch.uint8)
    assert torch.equal(AF.invert(AF.invert(x)), x)
    assert torch.equal(AF.posterize(x, 8), x) and AF.posterize(x, 1).unique().tolist() == [0, 128]
    assert torch.equal(AF.solarize(x, 255), x) and torch.equal(AF.solarize(x, 0), AF.invert(x))
    stretched = AF.autocontrast(x)
    assert (stretched.amin((-2, -1)) == 0).all() and (stretched.amax((-2, -1)) >= 254).all()
    assert torch.equal(AF.adjust_sharpness(x, 1), x)
    flat = torch.full((1, 3, 8, 8), 77, dtype=torch.uint8)
    for step in (AF.autocontrast, AF.equalize):
        assert torch.equal(step(flat), flat)
    # The share of pixels up to a level is that level's share of 255, to within what one level holds.
    some = (torch.rand(1, 1, 200, 200, generator=torch.Generator().manual_seed(1)) ** 2 * 255).to(torch.uint8)
    even = AF.equalize(some).flatten().double()
    for level in (60, 128, 200):
        assert ((even <= level).double().mean() - level / 255).abs() < 0.02


def test_gradients():
    x = (torch.randperm(180).double().view(2, 3, 5, 6) / 181 + 0.001).requires_grad_()  # no two are equal
    for name, arguments in (("invert", ()), ("solarize", (0.5,)), ("autocontrast", ()),
                            ("adjust_sharpness", (0.7,)), ("rgb_to_grayscale", ())):  # fmt: skip
        assert torch.autograd.gradcheck(lambda t, f=name, a=arguments: getattr(AF, f)(t, *a), x)
    with pytest.raises(ValueError, match=r"equalize: its levels have no gradient"):
        AF.equalize(x)


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda x: AF.solarize(x, 1.5), ValueError, r"solarize: threshold must be"),
        (lambda x: AF.solarize((x * 255).to(torch.uint8), 256), ValueError, r"solarize: threshold must be"),
        (lambda x: AF.solarize(x, float("nan")), ValueError, "threshold"),
        (lambda x: AF.posterize(x, 9), ValueError, r"posterize: bits must be"),
        (lambda x: AF.posterize(x, -1), ValueError, r"posterize: bits must be"),
        (lambda x: AF.adjust_sharpness(x, -0.1), ValueError, "sharpness_factor must be"),
        (lambda x: AF.adjust_sharpness(x, torch.ones(4)), ValueError, "one for each of 2 samples"),
        (lambda x: AF.rgb_to_grayscale(x, 2), ValueError, "num_output_channels must be 1 or 3"),
        (lambda x: AF.rgb_to_grayscale(x[:, :2]), ValueError, "must have 1 or 3 channels"),
        (lambda x: AF.equalize(x.int()), TypeError, "equalize: images must be uint8"),
        (lambda x: AF.autocontrast(x[0, 0]), ValueError, "autocontrast: images must be"),
        (lambda x: AF.invert([1.0]), TypeError, r"invert: images must be a torch\.Tensor"),
    ],
)
def test_refused(call, error, words):
    with pytest.raises(error, match=words):
        call(images((2, 3, 5, 6), torch.float32))


def test_compiled():
    x = images((2, 3, 8, 9), torch.uint8)
    for name, arguments in CALLS:
        arguments = in_units(name, arguments, x.dtype)
        step = torch.compile(getattr(AF, name), backend="eager", fullgraph=True)
        assert torch.equal(step(x, *arguments), getattr(AF, name)(x, *arguments)), name


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_solarize_at_the_threshold(dtype):
    """A threshold is a number of the images' dtype, so that a pixel that equals it is inverted."""
    theirs = pytest.importorskip("torchvision.transforms.v2.functional")
    x = torch.arange(2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    x = x[x <= 1][:12000].view(1, 3, 1, -1)
    for threshold in (0.03, 0.1, 0.3, 0.5, 0.7, 1.0):
        assert torch.equal(AF.solarize(x, threshold), theirs.solarize(x, threshold)), threshold


@pytest.mark.parametrize("dtype", (torch.float32, torch.uint8))
@pytest.mark.parametrize("name, arguments", CALLS, ids=lambda value: str(value))
def test_memory_format_and_default_dtype(name, arguments, dtype):
    """Neither the layout in memory nor torch's default dtype changes a result."""
    x, arguments = images((2, 3, 9, 11), dtype), in_units(name, arguments, dtype)
    step = getattr(AF, name)
    want = step(x, *arguments)
    last = step(x.contiguous(memory_format=torch.channels_last), *arguments)
    assert torch.equal(last, want) and last.is_contiguous(memory_format=torch.channels_last)
    torch.set_default_dtype(torch.float16)
    try:
        assert torch.equal(step(x, *arguments), want)
    finally:
        torch.set_default_dtype(torch.float32)
