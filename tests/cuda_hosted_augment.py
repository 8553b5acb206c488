"""The operators of augmentation, for tests/cuda_hosted.py: the same bits, except
for the mean of float64 images; the gradient is added up in another order."""

import functools
import itertools
import os

import torch
from cuda_hosted import CPU, near, same
from cuda_machine import DTYPES


def pictures(batch, channels, height, width, dtype, seed=0):
    x = torch.rand(
        batch, channels, height, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    return (x * 255).round().to(dtype) if dtype == torch.uint8 else x.to(dtype)


def augmentations(
    batch, height, width, channels, padding, interpolation, antialias=False, blur=None, steps=15, seed=0
):
    """Arguments of the operator except for the images, its output size and its dtype: one straight
    sample, one that shrinks, one of each kind of a turned one, as many as there are."""
    generator = torch.Generator().manual_seed(seed)
    angle = torch.tensor([0.0, 0.4, -2.0, 0.2])[torch.arange(batch) % 4].double()
    scale = torch.tensor([1.0, 2.7, 0.6, 1.1])[torch.arange(batch) % 4].double()
    c, s = angle.cos() * scale, angle.sin() * scale
    shift = torch.randint(-2, 3, (2, batch), generator=generator).double()
    m = torch.stack([c, -s, shift[0] + (1 - c + s) * width / 2, s, c, shift[1] + (1 - s - c) * height / 2], 1)
    m[0] = torch.tensor([1.0, 0, shift[0, 0], 0, 1, shift[1, 0]])
    colour = torch.rand(batch, 4, generator=generator, dtype=torch.float64) + 0.5
    colour[:, 3] -= 1
    steps &= 15 if channels in (1, 3) else 1
    weights = None
    if blur:
        weights = torch.cat(
            [torch.softmax(torch.rand(batch, k, generator=generator, dtype=torch.float64), 1) for k in blur],
            1,
        )
    boxes = torch.tensor([[1, 2, 3, 4], [0, 0, 0, 0], [-1, 3, 400, 2], [2, -2, 3, 5]]).repeat(
        batch // 4 + 1, 1
    )[:batch]
    windows = torch.tensor([[0, 0, height, width], [1, 0, height - 1, width]]).repeat(batch // 2 + 1, 1)[
        :batch
    ]
    constants = [0.3 + 0.1 * (i % 5) for i in range(4 * channels)]
    tables = (
        m.view(batch, 2, 3),
        colour if steps else None,
        weights,
        boxes.contiguous(),
        windows.contiguous(),
        constants,
    )
    return tables, (*(blur or (1, 1)), steps, interpolation, padding, antialias, True)


def check(cuda):
    # In which order threads go on has nothing to do with how the images lie in memory, and one float stands
    # for all: their code is the same template. That of bytes is not.
    in_order = os.environ.get("CUDAHOST_ORDER", "forward") == "forward"
    layouts = ("contiguous", "last", "part") if in_order else ("contiguous",)
    dtypes = (*DTYPES, torch.uint8) if in_order else (torch.float32, torch.uint8)
    # Forward and backward with every padding and interpolation, and each stage on and off.
    for dtype, channels, layout in itertools.product(dtypes, (1, 3, 5), layouts):
        equal = functools.partial(near, tolerance=1e-14) if dtype == torch.float64 else same
        x = pictures(5, channels, 11, 13, dtype)
        if layout == "last":
            x = x.contiguous(memory_format=torch.channels_last)
        if layout == "part":
            x = pictures(5, channels, 11, 27, dtype)[:, :, :, 1::2]
        for padding, interpolation, antialias, blur, steps in (
            (0, 1, False, None, 15),
            (1, 1, False, (3, 5), 13),
            (2, 2, False, None, 0),
            (3, 1, False, None, 0),
            (3, 1, True, (1, 3), 2),
            (3, 2, True, None, 15),
            (2, 0, False, (15, 17), 7),
        ):
            tables, static = augmentations(
                len(x), 11, 13, channels, padding, interpolation, antialias, blur, steps
            )
            for size, out in (((11, 13), None), ((5, 37), torch.bfloat16)):
                out = out or (torch.float32 if dtype == torch.uint8 else dtype)
                if dtype == torch.float64:
                    out = dtype
                args = (x, *tables, *size, *static, out)
                equal(cuda.augment(*args), CPU.augment(*args), (dtype, channels, layout, static, size))
                if dtype == torch.uint8:
                    args = (*args[:-2], False, torch.uint8)
                    same(cuda.augment(*args), CPU.augment(*args), (dtype, channels, layout, static, size))
                    continue
                args = (*static[:2], static[2] & (15 if channels == 1 else 7), *static[3:])
                grad = torch.rand(
                    5, channels, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64
                ).to(out)
                args = (grad, x, *tables, *size, *args, out)
                tolerance = {torch.float64: 1e-12, torch.float32: 2e-5}.get(
                    dtype, 2**-6 if dtype == torch.bfloat16 else 2**-9
                )
                near(
                    cuda.augment_backward(*args),
                    CPU.augment_backward(*args),
                    (dtype, channels, layout, static, size),
                    tolerance,
                )
    # Samples whose matrix or window is not usable.
    bad = torch.eye(2, 3, dtype=torch.float64).repeat(4, 1, 1)
    bad[1, 0, 0], bad[2, 1, 2] = float("nan"), 1e300
    windows = torch.tensor([[0, 0, 11, 13]] * 3 + [[5, 0, 7, 13]])
    x = pictures(4, 3, 11, 13, torch.float32)
    args = (
        bad,
        None,
        None,
        None,
        windows,
        [0.0] * 6 + [1.0] * 3 + [0.0] * 3,
        11,
        13,
        1,
        1,
        0,
        1,
        0,
        False,
        False,
        torch.float32,
    )
    got = cuda.augment(x, *args)
    assert torch.equal(got[0], x[0]) and got[1:].isnan().all()
    assert cuda.augment_backward(torch.ones_like(x), x, *args)[1:].abs().max() == 0
    seed = torch.tensor([5])
    low, high = [0.5] * 22, [1.5] * 22
    for crop in (0, 1, 2):
        boxes = ([0.1, 1.0, -0.3, 0.3, 2.0], [0.1, 0.3, -1.0, 1.0])
        args = (x, seed, 7, 9, [0.5, 0.5, 0.5], low, high, crop, *boxes, [11, 13, 8, 9])
        for kernel in ((3, 5, torch.arange(9) * 7), (1, 1)):
            drawn, expected = cuda.augment_draw(*args, *kernel), CPU.augment_draw(*args, *kernel)
            for ours, theirs in zip(drawn, expected, strict=True):
                near(ours, theirs, crop, 1e-13)
        table = expected[0]
        one = table[:, 2]
        args = (
            one,
            table[:, 0],
            None,
            one,
            table[:, 3],
            table[:, 4],
            table[:, 5:7],
            table[:, 7:9],
            table[:, 9:13],
            11,
            13,
            8,
            9,
        )
        near(cuda.augment_matrices(*args), CPU.augment_matrices(*args), crop, 1e-13)
    sigma = torch.tensor([0.0, 1e-12, 0.3, 2.0, 1e9], dtype=torch.float64)
    for args in ((sigma, sigma, 3, 3), (sigma, sigma.repeat(2)[::2], 1, 25)):
        near(cuda.augment_gaussian(*args), CPU.augment_gaussian(*args), args[2:], 1e-15)
    check_tones(cuda)


def check_tones(cuda):
    steps = torch.arange(15)
    strengths = torch.rand(15, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for channels, last, sides in itertools.product(
        (1, 3), (False, True), ((1, 1), (7, 9), (16, 12), (91, 91))
    ):
        x = pictures(15, channels, *sides, torch.uint8)
        if last:
            x = x.contiguous(memory_format=torch.channels_last)
        same(
            cuda.augment_tones(x, steps, strengths),
            CPU.augment_tones(x, steps, strengths),
            (channels, last, sides),
        )
    args = (torch.tensor([5]), torch.arange(9) * 2**35, 64, 3)
    same(cuda.augment_words(*args), CPU.augment_words(*args), "words")
