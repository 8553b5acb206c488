"""The plain-torch definition of augmentation against torch's own functions, and the kernels against it.

Proven: it draws the words of the compiled Philox and the numbers of the compiled kernel; its geometry is
grid_sample's and interpolate's, its blur conv2d's, its hue that of the six textbook cases, its matrices the
inverse of the documented product; kernels and definition agree over every interpolation, padding, dtype and
step, gradients included; it runs where there is no kernel, without waiting for the device.
"""

import itertools
import math
import operator
import random

import pytest
import torch
from augment_reference import (
    OPERATORS,
    by_matrix,
    everything,
    pictures,
    plain_operators,
    reference,
    some_matrices,
    wide,
)
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

import fastreg as fr
from fastreg.augment import Augment, Params, Settings, _op, _plain, _plain_draw, apply
from fastreg.augment import functional as AF

KERNELS = torch.ops.fastreg
SEEDS = ((3, 0), (-(2**63), 2**62), (2**63 - 1, -5))  # and offsets: signs and carries of 64 bits


# ---- torch's own functions, and textbook forms


def by_grid_sample(x, matrices, size, interpolation="bilinear", padding="zeros", fill=0.0):
    """x (float64) at the positions that `matrices` (B, 2, 3) give to each pixel of the result, by torch."""
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
    share = torch.tensor([0.2989, 0.587, 0.114], dtype=torch.float64).view(3, 1, 1)
    return x if x.shape[1] == 1 else (x * share).sum(1, keepdim=True)


def per_sample(value):
    return torch.as_tensor(value).double().view(-1, 1, 1, 1)


def by_cases(step, x, factor):
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


def by_convolution(x, sigma, kernel):
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


# ---- the definition is what the texts say


def test_words_are_those_of_the_compiled_philox():
    groups, draws = (5, 2**40 + 3, 2**64 - 1), (0, 2, 2**32 - 1)
    for seed in (0, 2**63 - 1, -123456789012345):
        signed = torch.tensor([group - 2**64 if group >= 2**63 else group for group in groups])
        words = _plain_draw.sample_words(torch.tensor(seed), signed[:, None], torch.tensor(draws))
        key = (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF)
        for (i, group), (k, draw) in itertools.product(enumerate(groups), enumerate(draws)):
            counter = (group & 0xFFFFFFFF, group >> 32, draw, 2)
            assert words[i, k].tolist() == list(fr._C.philox4x32(counter, key))


def draw_arguments(size, out, crop, seed, offset, batch=2000):
    low = [-3.0 * (i % 3) - 0.1 for i in range(len(_op.COLUMNS))]
    high = [value + 2 + i for i, value in enumerate(low)]
    for name, ends in {"stretch": (0.5, 1.5), "scale": (0.6, 1.6), "sigma": (0.0, 2.0)}.items():
        low[_op.COLUMNS.index(name)], high[_op.COLUMNS.index(name)] = ends
    crop_box = [0.3, 1.0, math.log(3 / 4), math.log(4 / 3), 4.0]
    erase_box = [0.02, 0.33, math.log(0.3), math.log(3.3)]
    return (
        torch.empty(1, 0, *size), torch.tensor([seed]), offset, batch, [0.5, 0.3, 0.5], low, high, crop,
        crop_box, erase_box, [*size, *out], 3, 5,
    )  # fmt: skip


@pytest.mark.parametrize("crop", (0, 1, 2))
def test_draws_are_the_kernels(crop):
    for size in ((40, 60), (10, 100), (100, 10), (7, 7)):  # of the long ones few boxes fit
        out = (30, 30) if crop != 2 else (min(size), min(size))
        for seed, offset in SEEDS:
            arguments = draw_arguments(size, out, crop, seed, offset)
            want, got = KERNELS.augment_draw(*arguments), _plain_draw.augment_draw(*arguments)
            index = offset + torch.arange(arguments[3])
            both = [f(*arguments, index) for f in (KERNELS.augment_draw, _plain_draw.augment_draw)]
            for a, b in zip((*want, *got), (*both[0], *both[1]), strict=True):
                assert torch.equal(a, b)
            for a, b in zip(got, want, strict=True):
                assert a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride()
                difference = (a - b).abs() / b.abs().clamp(min=1)
                assert difference.max() < 1e-13  # the last bits of exp, cos, sin and tan
            assert torch.equal(got[0], want[0]) and torch.equal(got[4], want[4])


def test_tables_are_the_kernels():
    one, two, four = torch.rand(9).double() + 0.1, torch.randn(9, 2).double(), torch.rand(9, 4).double()
    flip = (one > 0.5).double()
    for parameters in (
        (flip, 1 - flip, one, one + 0.2, 99 * one, two, 9 * two, four),
        (None, flip, None, one, None, two, None, None),
        (flip, None, one, None, one, None, two, four),
        (None,) * 8,
    ):
        arguments = (one, *parameters, 5, 6, 7, 8)
        torch.testing.assert_close(
            _plain_draw.augment_matrices(*arguments), KERNELS.augment_matrices(*arguments), rtol=0, atol=1e-11
        )
    sigma = torch.tensor([0.0, 1e-9, 0.3, 2.5, 400.0]).double()
    for width, height in ((1, 1), (3, 5), (23, 1)):
        torch.testing.assert_close(
            _plain_draw.augment_gaussian(sigma, sigma.flip(0), width, height),
            KERNELS.augment_gaussian(sigma, sigma.flip(0), width, height),
            rtol=0,
            atol=1e-14,
        )


def test_matrices_are_the_inverse_of_the_documented_product():
    """Flips, stretch, shear, rotation, scale and translation about the centre, then the crop."""
    height, width, size = 33, 37, (20, 30)
    aug = everything(translate=(0.1, 0.2), shear=(-5, 5, -9, 9))
    params = aug.sample(torch.empty(6, 3, height, width), seed=11)
    centre = torch.tensor([(width - 1) / 2, (height - 1) / 2]).double()

    def about_centre(a, b, c, d):
        m = torch.eye(3).double()
        m[:2, :2] = torch.tensor([[a, b], [c, d]], dtype=torch.float64)
        m[:2, 2] = centre - m[:2, :2] @ centre
        return m

    got = params.matrices(height, width)
    for i in range(6):
        angle = math.radians(params.angle[i])
        slant_x, slant_y = (math.tan(math.radians(s)) for s in params.shear[i])
        scale, shift = params.scale[i], torch.eye(3).double()
        shift[:2, 2] = params.translate[i]
        forward = (
            shift
            @ about_centre(scale, 0, 0, scale)
            @ about_centre(math.cos(angle), -math.sin(angle), math.sin(angle), math.cos(angle))
            @ about_centre(1, 0, -slant_y, 1)
            @ about_centre(1, -slant_x, 0, 1)
            @ about_centre(1, 0, 0, params.stretch[i])
            @ about_centre(1 - 2 * params.hflip[i], 0, 0, 1 - 2 * params.vflip[i])
        )
        top, left, h, w = params.crop[i].tolist()
        step_x, step_y, crop = w / size[1], h / size[0], torch.eye(3).double()
        crop[0, 0], crop[0, 2] = step_x, left + 0.5 * step_x - 0.5
        crop[1, 1], crop[1, 2] = step_y, top + 0.5 * step_y - 0.5
        torch.testing.assert_close(got[i], (torch.linalg.inv(forward) @ crop)[:2], rtol=0, atol=1e-11)


@pytest.mark.parametrize("padding", _op.PADDINGS)
@pytest.mark.parametrize("interpolation", _op.INTERPOLATIONS)
def test_geometry_is_grid_samples(interpolation, padding):
    for height, width in ((1, 1), (2, 3), (19, 23)):
        x, size = torch.rand(4, 3, height, width).double(), (height + 4, width + 13)
        m = some_matrices(4, height, width, size)
        got = reference(by_matrix, x, m, size, interpolation=interpolation, padding=padding, fill=0.25)
        want = by_grid_sample(x, m, size, interpolation, padding, 0.25)
        torch.testing.assert_close(got, want, rtol=0, atol=5e-8)


@pytest.mark.parametrize("interpolation", _op.INTERPOLATIONS)
def test_resizing_is_interpolates(interpolation):
    x = torch.rand(2, 3, 31, 40).double()
    options = {} if interpolation == "nearest" else {"align_corners": False, "antialias": True}
    # Smaller both ways, larger one way and smaller the other, in both orders, and one pixel.
    for size in ((9, 7), (50, 11), (31, 70), (1, 1)):
        got = reference(AF.resized_crop, x, 2, 3, 27, 30, size, interpolation)
        want = F.interpolate(x[:, :, 2:29, 3:33], size, mode=interpolation, **options)
        torch.testing.assert_close(got, want, rtol=0, atol=5e-8)


@pytest.mark.parametrize("step", _op.STEPS)
def test_colours_are_the_textbooks(step):
    factor = torch.tensor([-0.5, -0.13, 0.0, 0.4] if step == "hue" else [0.0, 0.6, 1.0, 1.9]).double()
    for channels, (height, width) in ((1, (9, 17)), (3, (1, 1)), (3, (33, 15))):
        x = torch.rand(4, channels, height, width).double()
        x[0, :, 0, 0] = 0
        got = reference(getattr(AF, f"adjust_{step}"), x, factor)
        torch.testing.assert_close(got, by_cases(step, x, factor), rtol=0, atol=1e-12)


def test_blur_is_a_convolution():
    sigma = torch.tensor([0.0, 0.4, 2.5]).double()
    for (height, width), kernel in itertools.product(((1, 1), (1, 7), (2, 3), (9, 33)), (1, 3, 9)):
        x = torch.rand(3, 2, height, width).double()
        got = reference(AF.gaussian_blur, x, kernel, sigma)
        torch.testing.assert_close(got, by_convolution(x, sigma, kernel), rtol=0, atol=1e-12)


def test_what_cannot_be_computed_is_nan():
    """An unusable matrix or window makes its sample NaN, 0 in uint8, and leaves the others alone."""
    good = torch.tensor([[0.9, 0.1, 0.2], [0.0, 1.1, 0.3]]).double()
    for bad in (1e12, float("nan"), float("inf"), 2.0**29):
        m = torch.stack([good, good.clone().fill_(bad)])
        for dtype in (torch.float32, torch.uint8):
            x = pictures(2, 3, 5, 6, dtype)
            with plain_operators():
                y = by_matrix(x, m, antialias=True)
            assert (y[1] == 0).all() if dtype == torch.uint8 else y[1].isnan().all()
            want = by_matrix(x[:1], m[:1], antialias=True)[0]
            torch.testing.assert_close(y[0], want, rtol=0, atol=1 if dtype == torch.uint8 else 1e-6)
    windows = torch.tensor([[0, 0, 5, 6], [0, 3, 5, 4]])
    y = reference(by_matrix, torch.rand(2, 1, 5, 6), good.repeat(2, 1, 1), windows=windows)
    assert y[0].isfinite().all() and y[1].isnan().all()


def test_nan_pixels_stay_where_they_are_when_whole_pixels_move():
    x = torch.rand(1, 3, 8, 9).double()
    x[0, 1, 5, 5] = math.nan
    for params in (Params(hflip=torch.ones(1)), Params(translate=torch.tensor([[2.0, -1.0]]))):
        assert reference(apply, x, params).isnan().sum() == 1


# ---- the kernels are the definition


def call_of(index, dtype, interpolation, padding, antialias, steps, blur, erase, normalise):
    """Arguments of the operator: 4 samples, turned and scaled; some calls with windows, shrinking far, or
    channels last.
    """
    batch, channels, height, width, size = 4, 3, 9, 13, (7, 11)
    chance = random.Random(index)
    x = pictures(batch, channels, height, width, dtype)
    if chance.random() < 0.3:
        x = x.contiguous(memory_format=torch.channels_last)
    m = some_matrices(batch, height, width, size)
    if chance.random() < 0.5:
        m[:, :, :2] *= 1.9
        m[:, :, 2] -= 4.3
    if chance.random() < 0.3:
        m[:, 0, 1] = m[:, 1, 0] = 0  # a filter from the image to the result, without a grid in between
    colour = torch.rand(batch, 4).double() * 0.8 + 0.4
    colour[:, 3] -= 0.8
    sigma = torch.rand(batch).double() + 0.3
    weights = None if blur is None else KERNELS.augment_gaussian(sigma, sigma + 0.4, *blur)
    boxes = torch.tensor([[1, 2, 3, 4], [0, 0, 0, 0], [-1, 5, 20, 2], [6, 10, 9, 9]]) if erase else None
    windows = None
    if chance.random() < 0.5:
        windows = torch.tensor([[0, 0, 9, 13], [1, 2, 5, 6], [2, 0, 7, 13], [8, 12, 1, 1]])
    out = torch.float32 if dtype == torch.uint8 and normalise else dtype
    top = 255.0 if dtype == torch.uint8 else 1.0
    erased, scale = 128.0 if out == torch.uint8 else 0.5, 2.0 / top if normalise else 1.0
    constants = [0.25 * top] * 3 + [erased] * 3 + [scale] * 3 + [0.1] * 3
    static = (constants, *size, *(blur or (1, 1)), steps, interpolation, padding, antialias, normalise, out)
    return x, (m, colour, weights, boxes, windows), static


# Of interpolation, padding, antialias, colour steps, blur, erase, normalise.
OPTIONS = (range(3), range(4), (False, True), (0, 1, 7, 15), (None, (3, 5)), (False, True), (False, True))
COMBINATIONS = list(enumerate(itertools.product(*OPTIONS)))
# Of one result; float16 is rounded once.
BOUNDS = {torch.float32: 1e-5, torch.float64: 1e-13, torch.float16: 2e-3, torch.uint8: 1e-5}


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_the_kernels_give_the_same(dtype):
    unequal = count = 0
    # All for the two kinds of arithmetic; for the other two dtypes a share that meets every option.
    for index, options in COMBINATIONS[:: 1 if dtype in (torch.float32, torch.uint8) else 7]:
        x, tables, static = call_of(index, dtype, *options)
        want = _plain.augment(x, *tables, *static)
        got = KERNELS.augment(x, *tables, *static)
        assert got.dtype == want.dtype and got.shape == want.shape and got.stride() == want.stride(), options
        difference = (got.double() - want.double()).abs()
        if static[-1] == torch.uint8:  # a level where float32 rounding decides
            assert difference.max() <= 1, options
            unequal, count = unequal + (difference > 0).sum(), count + difference.numel()
        else:
            assert difference.max() <= BOUNDS[dtype], options
    assert unequal <= 1e-3 * count


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.float16), ids=str)
def test_the_kernels_give_the_same_gradient(dtype):
    for index, options in COMBINATIONS[::5]:
        x, tables, static = call_of(index, dtype, *options)
        if static[5] & _op.STEPS["hue"]:
            continue
        grad = torch.rand(4, 3, 7, 11).to(dtype)
        want = _plain.augment_backward(grad, x, *tables, *static)
        got = KERNELS.augment_backward(grad, x, *tables, *static)
        assert got.dtype == want.dtype and got.shape == want.shape and got.stride() == want.stride(), options
        largest = want.abs().max().double().clamp(min=1)
        assert (got.double() - want.double()).abs().max() <= BOUNDS[dtype] * largest, options


# ---- on a device without a kernel


@pytest.fixture(scope="module")
def scratch_operators():
    """The definitions as operators of their own, with the schemas, and called as the fallback is."""
    library = torch.library.Library("fastreg_plain", "DEF")
    for name, plain in OPERATORS.items():
        schema = getattr(KERNELS, name).default._schema
        library.define(str(schema).removeprefix("fastreg::"))
        library.impl(name, plain, "CompositeExplicitAutograd")
    yield torch.ops.fastreg_plain


def test_the_fallback_is_the_definition(scratch_operators):
    for name, plain in OPERATORS.items():
        assert fr._registry.plain_definition(name) is plain
    x = pictures(3, 3, 12, 13)
    aug = everything(size=(8, 9), hue=None)
    got = {}
    for kind, operators in (("kernel", KERNELS), ("plain", scratch_operators)):
        with pytest.MonkeyPatch.context() as patch:
            for name in OPERATORS:
                patch.setattr(_op, name, getattr(operators, name).default)
            leaf = x.clone().requires_grad_()
            y = aug(leaf, torch.Generator().manual_seed(5))
            y.square().sum().backward()
            got[kind] = (y.detach(), leaf.grad)
    torch.testing.assert_close(got["plain"], got["kernel"], rtol=1e-4, atol=1e-4)
    assert got["plain"][1].abs().max() > 0.1


def test_a_device_without_float64(monkeypatch):
    """There the tables of parameters are float32, and so are the positions that come of them."""
    assert _plain_draw.number_dtype(torch.device("mps")) == torch.float32
    x = pictures(8, 3, 40, 50)
    for aug in (everything(), everything(antialias=True, scale=(2.5, 3.0))):
        with plain_operators():
            want = aug(x, torch.Generator().manual_seed(5))
            with monkeypatch.context() as patch:
                for module in (_op, _plain, _plain_draw):
                    patch.setattr(module, "number_dtype", lambda device: torch.float32)
                got = aug(x, torch.Generator().manual_seed(5))
                drawn = _plain_draw.augment_draw(*draw_arguments((40, 50), (20, 30), 1, 3, 0))
        assert {t.dtype for t in drawn[:4]} == {torch.float32}
        torch.testing.assert_close(got, want, rtol=0, atol=2e-3)  # a millionth of a pixel's place


@pytest.mark.parametrize("device", ("cuda", "meta"))
def test_other_devices(device):
    """On pretended devices: nothing is made on another device, and nothing waits for one.

    Most devices cannot be pretended where torch is built without them, a GPU can.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(4, 3, 9, 13, device=device)
        drawn = _plain_draw.augment_draw(x, *draw_arguments((9, 13), (7, 11), 1, 3, 0, batch=4)[1:])
        assert all(t.device.type == device for t in drawn)
        for antialias, dtype in ((False, torch.uint8), (True, torch.float32)):
            images = x.to(dtype)
            windows = torch.empty(4, 4, dtype=torch.int64, device=device)
            tables = (drawn[1], drawn[2], drawn[3], drawn[4], windows)
            static = ([0.5] * 12, 7, 11, 3, 5, 7, 2, 2, antialias, False, dtype)
            y = _plain.augment(images, *tables, *static)
            assert y.device.type == device and y.shape == (4, 3, 7, 11) and y.dtype == dtype
        if device == "meta":  # the engine of autograd asks a GPU
            grad = _plain.augment_backward(y.float(), x, *tables, *static[:-1], torch.float32)
            assert grad.device.type == device and grad.shape == x.shape
        # And through the public functions, up to the operators' fakes.
        assert everything()(x).device.type == device
        assert AF.rotate(x, torch.empty(4, device=device), "bilinear").device.type == device


def test_wrong_input_is_refused_as_by_the_kernels():
    cases = (
        (lambda x: Augment(rotate=3, dtype=torch.uint8)(x), (2, 3, 6, 7)),
        (lambda x: Augment(contrast=0.1)(x), (2, 4, 5, 5)),
        (lambda x: Augment(size=4)(x), (2, 3, 0, 5)),
        (lambda x: Augment(rotate=3).sample(x, seed=torch.zeros(2)), (2, 3, 6, 7)),
    )
    for function, shape in cases:
        texts = []
        for call in (operator.call, reference):
            with pytest.raises(ValueError) as error:
                call(function, torch.rand(shape))
            texts.append(str(error.value).split(" ", 2)[:2])
        assert texts[0] == texts[1]
    for shape in ((0, 3, 5, 6), (2, 0, 5, 6)):
        steps = dict(mean=None, std=None, contrast=None, saturation=None, hue=None)
        assert reference(everything(**steps), torch.empty(shape)).shape == (*shape[:2], 20, 30)
    x = torch.rand(2, 3, 4, 5).double()
    assert torch.equal(reference(apply, x, Params(settings=Settings())), wide(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8], ids=str)
@pytest.mark.parametrize("size", [(40, 50), (11, 40)], ids=str)  # enlarged, and along one axis only
def test_resizing_does_not_mix_in_what_is_beyond_the_image(size, dtype):
    """As torchvision's resize, whatever the padding, in training and in evaluation."""
    x = torch.rand(2, 3, 20, 31, generator=torch.Generator().manual_seed(0)).add(0.5).clamp(max=1)
    x = (x * 255).byte() if dtype == torch.uint8 else x
    want = torch.nn.functional.interpolate(x.double(), size, mode="bilinear", align_corners=False)
    for augment in (
        Augment(size=size), Augment(size=size, hflip=1.0, padding="zeros"),
        Augment(size=size, crop=(0.5, 1.0)), Augment(size=size, rotate=10).eval(),
    ):  # fmt: skip
        got = augment(x).double()
        assert got.min() >= x.min()  # no black comes in
        if augment.crop is None:
            got = got.flip(-1) if augment.chances["hflip"] and augment.training else got
            assert (got - want).abs().max() <= (0.51 if dtype == torch.uint8 else 1e-5)
