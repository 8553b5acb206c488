"""The CUDA kernels of augmentation, executed without a GPU, against the CPU operators: the same bits,
except for sums.
"""

import ctypes

import numpy as np
import pytest
import torch
from cuda_hosted_augment import augmentations, pictures
from cuda_machine import (
    DTYPES,
    SCHEDULES,
    Seed,
    interpreted,
    needs_nvcc,
    seed_at,
    structure,
    traffic,
)
from helpers import same_bits as same

import fastreg
from fastreg.augment import _op

pytestmark = needs_nvcc

CPU = torch.ops.fastreg
PIXELS = (*DTYPES, torch.uint8)
AugmentArgs = structure(
    "AugmentArgs",
    """int in_type, out_type
    int64 batch, channels, in_height, in_width, out_height, out_width
    pointer images, output
    four in_stride, out_stride
    pointer matrices, colour, blur, boxes, windows, constants
    int64 blur_width, blur_height
    int colour_steps, interpolation, padding
    bool antialias, normalise
    pointer grad
    four grad_stride
    pointer scratch""",
    four=ctypes.c_int64 * 4,
)
SampleArgs = structure(
    "SampleArgs",
    """Seed seed
    uint64 offset
    pointer index
    int64 batch, in_height, in_width, out_height, out_width
    double hflip, vflip, erase
    columns low, high
    int crop
    two crop_area, crop_log_ratio
    double padding
    two erase_area, erase_log_ratio
    pointer out""",
    columns=ctypes.c_double * 22,
    two=ctypes.c_double * 2,
)
MatrixArgs = structure(
    "MatrixArgs",
    """int64 batch, in_height, in_width, out_height, out_width
    pointers column
    int64s stride
    pointer out""",
    pointers=ctypes.c_void_p * 13,
    int64s=ctypes.c_int64 * 13,
)

DrawArgs = structure(
    "DrawArgs",
    "SampleArgs sample\nMatrixArgs matrix\npointer colour\nint64 blur_width, blur_height\npointer blur, "
    "boxes",
    SampleArgs=SampleArgs,
    MatrixArgs=MatrixArgs,
)
GaussianArgs = structure(
    "GaussianArgs",
    "int64 batch, width, height\npointer sigma_x, sigma_y\nint64 stride_x, stride_y\npointer out",
)


def arguments(machine, x, tables, size, static, out_dtype, output, grad=None, misaligned=0):
    """(AugmentArgs, what must stay alive) with all but the scratch."""
    matrices, colour, blur, boxes, windows, constants = tables
    blur_width, blur_height, steps, interpolation, padding, antialias, normalise = static
    held = (ctypes.c_double * len(constants))(*constants)
    at = {}
    for name, table in (
        ("matrices", matrices),
        ("colour", colour),
        ("blur", blur),
        ("boxes", boxes),
        ("windows", windows),
    ):
        at[name] = None if table is None else machine.put(table, name).at
    four = ctypes.c_int64 * 4
    return AugmentArgs(
        PIXELS.index(x.dtype), PIXELS.index(out_dtype), *x.shape, *size,
        machine.put(x, "images", misaligned).at, output.at, four(*x.stride()), four(*output.like.stride()),
        at["matrices"], at["colour"], at["blur"], at["boxes"], at["windows"],
        ctypes.addressof(held), blur_width, blur_height, steps, interpolation, padding, antialias, normalise,
        None if grad is None else machine.put(grad, "grad").at,
        four(*(grad.stride() if grad is not None else ())), None,
    ), held  # fmt: skip


def with_scratch(machine, args, backward=False):
    name = "augment_backward_cuda_bytes" if backward else "augment_cuda_bytes"
    count = getattr(interpreted("augment").library, f"_ZN7fastreg{len(name)}{name}ERKNS_11AugmentArgsE")
    count.restype = ctypes.c_int64
    nbytes = count(ctypes.byref(args))
    assert nbytes >= 0
    args.scratch = machine.device.empty(max(nbytes, 1), np.uint8, "scratch").addr
    return args


def run(x, tables, size, static, dtype, grad=None, misaligned=0, **options):
    """(the operator's result, or with a gradient that of its backward, reports) of the CUDA launcher."""
    like = _op.like_images(x, *size, dtype) if grad is None else _op.like_images(x, *x.shape[2:], x.dtype)
    kept = []

    def make(machine):
        output = machine.room(like, "output", misaligned)
        args, held = arguments(machine, x, tables, size, static, dtype, output, grad, misaligned)
        kept[:] = [output, held]
        return with_scratch(machine, args, grad is not None)

    launcher = "augment_cuda" if grad is None else "augment_backward_cuda"
    reports = interpreted("augment").run(launcher, make, AugmentArgs, **options)
    return kept[0].result(), reports


def wide(dtype):
    """The dtype of the result of images of `dtype`."""
    return torch.float32 if dtype == torch.uint8 else dtype


def assert_same(got, want):
    if want.dtype == torch.float64:  # whose mean is summed in another order
        torch.testing.assert_close(got, want, rtol=0, atol=1e-14, equal_nan=True)
    else:
        assert same(got, want)


@pytest.mark.parametrize("dtype", PIXELS)
@pytest.mark.parametrize("channels", (1, 3, 4))
def test_the_same_bits_as_on_the_cpu(channels, dtype):
    for (interpolation, padding), size in zip(
        ((0, 3), (1, 0), (1, 3), (1, 2), (2, 1), (2, 3)),
        ((9, 7), (9, 14), (9, 7), (6, 7), (1, 30), (9, 7)),
        strict=True,
    ):
        x = pictures(3, channels, 9, 7, dtype)
        tables, static = augmentations(3, 9, 7, channels, padding, interpolation, seed=padding)
        want = CPU.augment(x, *tables, *size, *static, wide(dtype))
        assert_same(run(x, tables, size, static, wide(dtype))[0], want)
    for schedule in SCHEDULES:
        assert_same(run(x, tables, size, static, wide(dtype), schedule=schedule)[0], want)
    assert_same(run(x, tables, size, static, wide(dtype), misaligned=wide(dtype).itemsize)[0], want)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.uint8))
def test_two_pixels_that_are_equally_near(dtype):
    """Turns and shears that put whole lines of positions between two pixels, and a place far outside."""
    angle = torch.tensor([90.0, 45, 135, 30, 0, 0, 10]).double()
    slant = torch.tensor([[0.0, 0]] * 4 + [[45, 0], [0, 26.56505117707799], [0, 0]]).double()
    shift = torch.tensor([[0.0, 0]] * 6 + [[1e7, -3]]).double()
    for height, width in ((7, 12), (9, 9)):
        x = pictures(7, 1, height, width, dtype)
        m = fastreg.augment.Params(angle=angle, shear=slant, translate=shift).matrices(height, width)
        tables = (m, None, None, None, None, [0.5, 0.0, 1.0, 0.0])
        for padding in (2, 3):
            static = (1, 1, 0, 0, padding, False, False)
            want = CPU.augment(x, *tables, height, width, *static, dtype)
            assert same(run(x, tables, (height, width), static, dtype)[0], want)
        assert padding == 3 and (want[6] == want[6, 0, 0, 0]).all(), "far away there is the fill alone"
    if dtype != torch.uint8:
        grad = pictures(7, 1, height, width, dtype, seed=1)
        want = CPU.augment_backward(grad, x, *tables, height, width, *static, dtype)
        got, _ = run(x, tables, (height, width), static, dtype, grad)
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", (torch.float32, torch.uint8))
@pytest.mark.parametrize("blur", ((3, 3), (1, 5), (15, 3), (3, 29)))
def test_blur(blur, dtype):
    """In tiles, a large kernel by way of an image in memory; where tiles meet, and where the image is smaller
    than they are.
    """
    for shape in ((1, 3, 37, 40), (2, 1, 4, 150)):
        x = pictures(*shape, dtype)
        tables, static = augmentations(shape[0], *shape[2:], shape[1], 2, 1, blur=blur)
        want = CPU.augment(x, *tables, *shape[2:], *static, torch.float32)
        got, reports = run(x, tables, shape[2:], static, torch.float32)
        assert_same(got, want)
        assert len(reports) == 2 + (max(blur) > 13), (
            "sums of grey, tiles, and the second half of a large blur"
        )
    for schedule in SCHEDULES[1:]:
        assert_same(run(x, tables, shape[2:], static, torch.float32, schedule=schedule)[0], want)
    if dtype == torch.uint8:
        static = (*static[:-1], False)
        assert same(
            run(x, tables, shape[2:], static, dtype)[0], CPU.augment(x, *tables, *shape[2:], *static, dtype)
        )


@pytest.mark.parametrize(
    ("dtype", "padding"),
    list(zip((torch.float32, torch.bfloat16, torch.uint8, torch.float64), range(4), strict=True)),
)
@pytest.mark.parametrize("interpolation", (1, 2))
def test_antialias(interpolation, dtype, padding):
    x = pictures(2, 3, 13, 17, dtype)
    tables, static = augmentations(2, 13, 17, 3, padding, interpolation, antialias=True)
    want = CPU.augment(x, *tables, 13, 17, *static, wide(dtype))
    assert_same(run(x, tables, (13, 17), static, wide(dtype))[0], want)
    plain = CPU.augment(x, *tables, 13, 17, *static[:-2], False, True, wide(dtype))
    assert ((want - plain).abs()[1] > 0.01).double().mean() > 0.1, "the second sample shrinks, in sight"


def test_bytes_stay_bytes():
    x = pictures(4, 3, 19, 23, torch.uint8)
    tables, static = augmentations(4, 19, 23, 3, 1, 1, blur=(3, 3))
    static = (*static[:-1], False)
    got, _ = run(x, tables, (19, 23), static, torch.uint8)
    assert same(got, CPU.augment(x, *tables, 19, 23, *static, torch.uint8))


def test_strides():
    x = pictures(3, 6, 21, 24, torch.float16)[:, ::2, 1::2, 3:].contiguous(memory_format=torch.channels_last)
    tables, static = augmentations(3, *x.shape[2:], 3, 2, 1)
    for images in (x, pictures(3, 6, 21, 24, torch.float16)[:, ::2, 1::2, 3:]):
        want = CPU.augment(images, *tables, *images.shape[2:], *static, torch.float16)
        got = run(images, tables, images.shape[2:], static, torch.float16)[0]
        assert same(got, want) and got.stride() == want.stride()


def test_a_sample_that_is_no_good_is_nan():
    """On the CPU these are errors; here the host cannot look at them."""
    matrices = torch.eye(2, 3, dtype=torch.float64).repeat(4, 1, 1)
    matrices[1, 0, 0], matrices[2, 1, 2] = float("inf"), 2.0**30
    windows = torch.tensor([[0, 0, 6, 5], [0, 0, 6, 5], [0, 0, 6, 5], [3, 0, 4, 5]])
    x = pictures(4, 3, 6, 5, torch.float32)
    tables = (
        matrices,
        torch.full((4, 4), 0.5).double(),
        None,
        None,
        windows,
        [0.0] * 6 + [1.0] * 3 + [0.0] * 3,
    )
    for steps in (0, 15):
        got, _ = run(x, tables, (6, 5), (1, 1, steps, 1, 0, True, False), torch.float32)
        assert got[0].isfinite().all() and got[1:].isnan().all()
        grad, _ = run(
            x, tables, (6, 5), (1, 1, steps & 7, 1, 0, True, False), torch.float32, torch.ones_like(x)
        )
        assert grad[0].abs().max() > 0 and grad[1:].abs().max() == 0
    bytes_, _ = run((x * 255).byte(), tables, (6, 5), (1, 1, 0, 1, 0, False, False), torch.uint8)
    assert bytes_[0].max() > 0 and bytes_[1:].max() == 0


GRADIENTS = (  # interpolation, padding, blur, antialias
    (0, 0, None, False),
    (1, 3, (3, 5), False),
    (2, 2, None, False),
    (1, 1, (7, 1), True),
)


def assert_gradient(x, given, schedules=SCHEDULES[:1]):
    interpolation, padding, blur, antialias = given
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-5}.get(
        x.dtype, 2**-6 if x.dtype == torch.bfloat16 else 2**-9
    )
    steps = 15 if x.shape[1] == 1 else 7
    tables, static = augmentations(
        len(x), *x.shape[2:], x.shape[1], padding, interpolation, antialias, blur, steps
    )
    grad = pictures(*x.shape[:2], 5, 8, x.dtype, seed=1)
    want = CPU.augment_backward(grad, x, *tables, 5, 8, *static, x.dtype)
    for schedule in schedules:
        got, _ = run(x, tables, (5, 8), static, x.dtype, grad, schedule=schedule)
        torch.testing.assert_close(got.double(), want.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("given", GRADIENTS)
@pytest.mark.parametrize("channels", (1, 3, 4))
def test_gradient(channels, given):
    assert_gradient(pictures(2, channels, 7, 6, torch.float32), given)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float16, torch.bfloat16))
def test_gradient_of_other_dtypes(dtype):
    assert_gradient(pictures(2, 3, 7, 6, dtype), GRADIENTS[1])


def test_gradient_in_any_order():
    assert_gradient(pictures(2, 3, 7, 6, torch.float32), GRADIENTS[1], SCHEDULES[1:])


# ---- traffic


def typical(batch, side, blur=None, steps=15):
    """What training draws: a flip, a turn by up to 15 degrees, a scale by up to 10 %, and colours."""
    generator = torch.Generator().manual_seed(0)
    aug = fastreg.augment.Augment(hflip=0.5, rotate=15, scale=(0.9, 1.1), translate=(0.1, 0.1))
    drawn = aug.sample(torch.empty(batch, 3, side, side), seed=1)
    colour = torch.rand(batch, 4, generator=generator, dtype=torch.float64)
    weights = torch.full((batch, 2 * blur), 1 / blur).double() if blur else None
    tables = (
        drawn.matrices(side, side),
        colour if steps else None,
        weights,
        None,
        None,
        [0.0] * 6 + [2.0] * 3 + [-1.0] * 3,
    )
    return tables, (blur or 1, blur or 1, steps, 1, 0, False, True)


def for_the_table(dtype):
    """(what, dtype, values, floor in bytes, reports, op) of typical calls, as tests/cuda_table.py writes them
    down.
    """
    x = pictures(4, 3, 128, 128, dtype)
    values, floor = x.numel(), x.numel() * (dtype.itemsize + 4)
    for what, blur, steps in (
        ("geometry", None, 0),
        ("geometry and colour", None, 15),
        ("all steps, blur 3 × 3", 3, 15),
    ):
        tables, static = typical(4, 128, blur, steps)
        yield (
            f"augment, {what}",
            dtype,
            values,
            floor,
            run(x, tables, (128, 128), static, torch.float32)[1],
            "augment",
        )


def unique(reports, name, op):
    """Bytes of a buffer that each launch moves at least, every sector of 32 bytes once."""
    return [rows[name, op]["unique"] for report in reports if (name, op) in (rows := report.traffic.rows)]


@pytest.mark.parametrize("dtype", (torch.float32, torch.uint8))
@pytest.mark.parametrize(
    ("blur", "steps", "launches"),
    [(None, 13, 1), (None, 15, 2), (3, 13, 1), (3, 15, 2), (17, 13, 2), (17, 15, 3)],
)
def test_launches_and_bytes(blur, steps, launches, dtype):
    x = pictures(2, 3, 64, 64, dtype)
    tables, static = typical(2, 64, blur, steps)
    got, reports = run(x, tables, (64, 64), static, torch.float32)
    assert same(got, CPU.augment(x, *tables, 64, 64, *static, torch.float32))
    assert len(reports) == launches
    source = unique(reports, "images", "ld")
    assert len(source) == (2 if steps & 2 else 1), "read by the sums of grey, and by what makes the pixels"
    assert all(nbytes <= x.numel() * x.element_size() for nbytes in source)
    written = [
        report.traffic.rows["output", "st"] for report in reports if ("output", "st") in report.traffic.rows
    ]
    assert len(written) == 1 and 32 * written[0]["sectors"] == written[0]["bytes"] == got.numel() * 4, (
        "whole sectors, each once"
    )


def test_neighbours_come_from_few_sectors():
    """Of every bilinear value four neighbours are read, a warp's from sectors that lie side by side."""
    x = pictures(2, 3, 64, 64, torch.float32)
    tables, static = typical(2, 64, steps=0)
    _, reports = run(x, tables, (64, 64), static, torch.float32)
    row = reports[0].traffic.rows["images", "ld"]
    assert row["bytes"] <= 4 * x.numel() * 4
    assert 32 * row["sectors"] <= 4 * 3 * x.numel() * 4, "a turned row of 32 pixels crosses a few lines"
    straight = (torch.eye(2, 3, dtype=torch.float64).repeat(2, 1, 1), *tables[1:])
    _, reports = run(x, straight, (64, 64), static, torch.float32)
    assert traffic(reports, without=("matrices",)) == 2 * x.numel() * 4


# ---- large


def test_more_items_than_blocks():
    """2^20 blocks and three: the first blocks take a second sample, whose mean and factors are its own."""
    batch, written = 2**20 + 3, []

    def make(machine):
        virtual = machine.device.virtual
        images = virtual(
            4 * batch, "images", lambda offsets, width: (offsets // 4 % 7 / 7).astype(np.float32)
        )
        colour = virtual(32 * batch, "colour", lambda offsets, width: 0.5 + (offsets // 32 % 5) / 10.0)
        output = virtual(4 * batch, "output", None)
        held = (ctypes.c_double * 4)(0, 0, 1, 0)
        written[:] = [output, held]
        strides = (ctypes.c_int64 * 4)(1, 1, 1, 1)
        return AugmentArgs(
            0, 0, batch, 1, 1, 1, 1, 1, images.addr, output.addr, strides, strides, None, colour.addr, None,
            None, None, ctypes.addressof(held), 1, 1, 1, 1, 0, False, False, None, strides, None,
        )  # fmt: skip

    interpreted("augment").run("augment_cuda", make, AugmentArgs, blocks=[0, 2, 5])
    at, values = written[0].writes(np.float32)
    assert sorted(at) == [0, 2, 5, 2**20, 2**20 + 2]
    factor = (0.5 + (at % 5) / 10.0).astype(np.float32)
    np.testing.assert_array_equal(values, np.minimum((at % 7 / 7).astype(np.float32) * factor, np.float32(1)))


def test_more_than_2_31_values():
    batch, side, written = 2800, 512, []
    n = batch * 3 * side * side
    assert n > 2**31

    def value(i):
        return (i % 8191 / 8192).astype(np.float32)

    def make(machine):
        images = machine.device.virtual(4 * n, "images", lambda offsets, width: value(offsets // 4))
        output = machine.device.virtual(4 * n, "output", None)
        held = (ctypes.c_double * 12)(*[0.0] * 6, *[2.0] * 3, *[0.0] * 3)
        written[:] = [output, held]
        strides = (ctypes.c_int64 * 4)(3 * side * side, side * side, side, 1)
        return AugmentArgs(
            0, 0, batch, 3, side, side, side, side, images.addr, output.addr, strides, strides, None, None,
            None, None, None, ctypes.addressof(held), 1, 1, 0, 1, 0, False, True, None, strides, None,
        )  # fmt: skip

    last = batch * side * side // 1024 - 1
    interpreted("augment").run("augment_cuda", make, AugmentArgs, blocks=[0, last])
    at, values = written[0].writes(np.float32)
    assert at.max() == n - 1 and len(set(at)) == len(at) == 2 * 3 * 1024
    np.testing.assert_array_equal(values, 2 * value(at))


# ---- parameters


@pytest.mark.parametrize("crop", range(3))
def test_parameters_are_the_cpus(crop):
    seed, low, high, batch = torch.tensor([-5]), [0.25] * 22, [1.75] * 22, 300
    chances, crop_box, erase_box, sizes = (
        [0.5, 0.25, 0.75],
        [0.1, 1.0, -0.3, 0.3, 2.0],
        [0.1, 0.3, -1.0, 1.0],
        [11, 13, 8, 9],
    )
    blur, index = (3, 5), torch.arange(300) ** 2 * 2**40
    want = CPU.augment_draw(
        torch.empty(0), seed, 7, batch, chances, low, high, crop, crop_box, erase_box, sizes, *blur,
        None if crop else index,
    )  # fmt: skip
    table, kept = want[0], []

    def draw(machine):
        two, columns = ctypes.c_double * 2, ctypes.c_double * 22
        kept[:] = [machine.room(t, f"result {i}") for i, t in enumerate(want)]
        sample = SampleArgs(
            seed_at(machine, seed) if crop else Seed(2**64 - 5, None), 7,
            None if crop else machine.put(index, "index").at, batch, *sizes, *chances,
            columns(*low), columns(*high), crop, two(*crop_box[:2]), two(*crop_box[2:4]), crop_box[4],
            two(*erase_box[:2]), two(*erase_box[2:]), kept[0].at,
        )  # fmt: skip
        own = (ctypes.c_void_p * 13)(*[kept[0].at + 8 * i for i in range(13)])
        matrix = MatrixArgs(batch, *sizes, own, (ctypes.c_int64 * 13)(*[22] * 13), kept[1].at)
        return DrawArgs(sample, matrix, kept[2].at, *blur, kept[3].at, kept[4].at)

    interpreted("augment").run("augment_draw_cuda", draw, DrawArgs)
    for got, expected in zip(kept, want, strict=True):
        torch.testing.assert_close(got.result(), expected, rtol=1e-13, atol=1e-13)
    want = table

    def matrices(machine):
        place = machine.put(want, "params")
        columns, strides = (ctypes.c_void_p * 13)(), (ctypes.c_int64 * 13)()
        for i in (2, 3, 4, *range(7, 13)):  # the flips and the translation are neutral
            columns[i], strides[i] = place.at + 8 * i, 22
        kept[:] = [machine.room(torch.empty(batch, 2, 3, dtype=torch.float64), "out")]
        return MatrixArgs(batch, 11, 13, 8, 9, columns, strides, kept[0].at)

    interpreted("augment").run("augment_matrices_cuda", matrices, MatrixArgs)
    fields = (None, None, want[:, 2], want[:, 3], want[:, 4], None, want[:, 7:9], want[:, 9:13])
    expected = CPU.augment_matrices(want[:, 2], *fields, 11, 13, 8, 9)
    torch.testing.assert_close(kept[0].result(), expected, rtol=1e-13, atol=1e-13)


def test_weights_of_the_blur_are_the_cpus():
    sigma = torch.tensor([0.0, 1e-12, 0.3, 2.0, 1e9], dtype=torch.float64)
    kept = []

    def gaussian(machine):
        place = machine.put(sigma, "sigma").at
        kept[:] = [machine.room(torch.empty(5, 8, dtype=torch.float64), "out")]
        return GaussianArgs(5, 3, 5, place, place, 1, 1, kept[0].at)

    interpreted("augment").run("augment_gaussian_cuda", gaussian, GaussianArgs)
    torch.testing.assert_close(kept[0].result(), CPU.augment_gaussian(sigma, sigma, 3, 5), rtol=1e-14, atol=0)


TABLE_DTYPES = (torch.float32, torch.uint8)  # of the images in tests/cuda_table.py

# What tests/test_cuda_build.py knows of the kernels by parts of their names. A row of float64 parameters for
# each sample of a batch takes a few threads, once; cosines have a stack.
FLOAT64_PRODUCTS = 4  # of the strength of a policy's step, by one thread for its block
FLOAT64_ROWS = ("draw_rows", "matrix_rows", "gaussian_rows", "shrink_rows")
# 80 registers, for three blocks on a multiprocessor, where more than a pixel is kept; 160, for one, where a
# pixel is the sum of many, where its gradient is taken, and for float64.
REGISTERS = {"Shrunken": 160, "backward": 160, "ImageId": 160, "grey_sums": 80, "augment_tiles": 80}

# What tests/test_cuda_mutations.py breaks: the text of the kernel, what stands there instead, which test must
# fail, and what it must say.
MUTATIONS = {
    "missing barrier in shared memory": (
        "    __syncthreads();\n    for_each_in(made_height, width,",
        "    for_each_in(made_height, width,",
        lambda: test_blur((3, 3), torch.float32),
        "race",
    ),
    "no barrier between two samples": (
        "  __syncthreads();  // no thread is at work on the last item\n  A mean = 0;",
        "  A mean = 0;",
        test_more_items_than_blocks,
        "race",
    ),
}
