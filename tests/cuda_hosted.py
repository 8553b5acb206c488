"""The CUDA kernels, launches and glue of every op under AddressSanitizer and UndefinedBehaviorSanitizer,
without a GPU.

Not a test module: `tests/test_cuda_hosted.py` runs it in a process of its own, `python cuda_hosted.py LIBRARY
CASE`, with the sanitizers loaded first. The library holds the operators `torch.ops.fastreg_cudahost.*`, which
take CPU tensors; each case compares operators with those of the CPU. tests/test_cuda_device.py runs the same
cases on a GPU.
"""

import functools
import itertools
import sys

import torch
from cuda_machine import DTYPES
from cuda_machine import same as same_bits

import fastreg

CPU = torch.ops.fastreg


def load(path):
    """Declare the operators again, in the namespace of the library, and load it."""
    declared = torch.library.Library("fastreg_cudahost", "DEF")
    for name in (*fastreg._registry.declared(),):
        schema = str(getattr(CPU, name).default._schema)
        declared.define(schema.replace("fastreg::", "", 1))
    torch.ops.load_library(path)
    return declared, torch.ops.fastreg_cudahost


def numbers(shape, dtype, seed=0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if x.numel() > 40:
        x.view(-1)[[3, 17, 31]] = torch.tensor([float("nan"), float("inf"), -0.0], dtype=torch.float64)
    return x.to(dtype)


def same(a, b, what):
    assert a.stride() == b.stride() and same_bits(a, b), what


def views(x):
    """The same numbers in several layouts: contiguous, off alignment by an element, transposed, in steps."""
    yield x
    room = torch.empty(x.numel() + 1, dtype=x.dtype)
    yield room[1:].view(x.shape).copy_(x)
    if x.dim() == 2:
        yield x.t().contiguous().t()
        yield torch.empty(x.shape[0], 2 * x.shape[1], dtype=x.dtype)[:, ::2].copy_(x)


def dropout(cuda):
    seed = torch.tensor([77])
    for dtype, shape in itertools.product(DTYPES, ((0,), (1,), (7, 37), (33, 64))):
        for x in views(numbers(shape, dtype)):
            for p, offset in ((0.4, 0), (0.0, 5), (1.0, 3)):
                ours, mask = cuda.dropout(x, p, seed, offset, 1, 1 / 0.6, 0.0, 0.0)
                theirs, their_mask = CPU.dropout(x, p, seed, offset, 1, 1 / 0.6, 0.0, 0.0)
                same(ours, theirs, (dtype, shape, p, offset))
                same(mask, their_mask, (dtype, shape, p, offset))
            same(cuda.dropout_apply(x, mask, 1, 2.0), CPU.dropout_apply(x, mask, 1, 2.0), (dtype, shape))
            if x.dim() == 2:
                inner = x.shape[1]
                args = (x, 0.5, seed, 0, inner, 0.9, 0.1, -1.0)
                for ours, theirs in zip(cuda.dropout(*args), CPU.dropout(*args), strict=True):
                    same(ours, theirs, (dtype, shape, "inner"))
            ours, theirs = x.clone(), x.clone()
            same(cuda.dropout_(ours, 0.3, seed), CPU.dropout_(theirs, 0.3, seed), (dtype, shape, "in place"))
            same(ours, theirs, (dtype, shape, "in place"))


def dropout_add(cuda):
    seed = torch.tensor([77])
    for dtype, shape in itertools.product(DTYPES, ((0, 3), (1, 1), (7, 37), (33, 64))):
        bias = numbers(shape[-1:], dtype, 2)
        for x, residual in zip(views(numbers(shape, dtype)), views(numbers(shape, dtype, 1)), strict=True):
            for given in (None, bias):
                args = (x, residual, given, 0.4, seed, 1 / 0.6)
                for ours, theirs in zip(cuda.dropout_add(*args), CPU.dropout_add(*args), strict=True):
                    same(ours, theirs, (dtype, shape, given is None))


def sgd(cuda):
    modes = (  # momentum, dampening, weight_decay, l1, nesterov, proximal, decoupled, maximize
        (0.0, 0.0, 0.0, 0.0, False, False, False, False),
        (0.9, 0.0, 0.1, 0.1, True, False, False, True),
        (0.9, 0.5, 0.1, 0.1, False, True, True, False),
    )
    shapes = ((0,), (1,), (7, 37), (33, 64))
    for dtype, (momentum, dampening, *mode) in itertools.product(DTYPES, modes):
        parts = [[view for shape in shapes for view in views(numbers(shape, dtype, k))] for k in range(3)]
        states = []
        for ops in (cuda, CPU):
            params, grads, buffers = ([t.clone() for t in part] for part in parts)
            buffers = buffers if momentum else []
            started = [torch.tensor(float(i % 2)) for i in range(len(params))] if dampening else []
            lr, scale, overflow = torch.tensor(0.25), torch.tensor(64.0), torch.tensor(0.0)
            seed = torch.tensor([5]) if dtype == torch.bfloat16 else None
            ops.sgd_(
                params, grads, buffers, started, 0.0, momentum, dampening, *mode, lr, scale, overflow, seed
            )
            states.append(params + buffers + started)
        for ours, theirs in zip(*states, strict=True):
            same(ours, theirs, (dtype, momentum, mode))


def fgsm(cuda):
    for dtype, shape in itertools.product(DTYPES, ((0,), (1,), (7, 37), (33, 64), (2, 3, 5, 8))):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        for x, grad in zip(views(numbers(shape, dtype)), views(numbers(shape, dtype, 1)), strict=True):
            bounds = [None]
            if x.dim() > 1:
                bounds.append(torch.rand(shape[-1:], dtype=wide))
                bounds.append(torch.rand((shape[-2], 1), dtype=wide))
            for upper in bounds:
                args = (0.1, -1.0, 0.7, None, None, upper)
                same(cuda.fgsm_step(x, grad, *args), CPU.fgsm_step(x, grad, *args), (dtype, shape, upper))
                args = (x.neg(), 0.1, 0.2, -1.0, 0.7, None, upper, None, None)
                same(cuda.pgd_step(x, grad, *args), CPU.pgd_step(x, grad, *args), (dtype, shape, upper))


def near(a, b, what, tolerance):
    torch.testing.assert_close(
        a.double(), b.double(), rtol=tolerance, atol=tolerance, equal_nan=True, msg=lambda m: f"{what}: {m}"
    )


def cross_entropy(cuda):
    """The sums of a row are taken in another order than on the CPU."""
    shapes = ((3, 1), (5, 10), (70, 33), (3, 1000), (2, 5003), (2, 7, 40), (1, 70, 5), (0, 4))
    for dtype, shape in itertools.product(DTYPES, shapes):
        tolerance = {torch.float64: 1e-12, torch.float32: 2e-6}.get(
            dtype, 2**-7 if dtype == torch.bfloat16 else 2**-10
        )
        generator = torch.Generator().manual_seed(1)
        logits = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        k, places = shape[1], (shape[0], *shape[2:])
        target = torch.randint(-1, k, places, generator=generator)  # -1: ignored
        loss_dtype = torch.float32 if dtype.itemsize == 2 else None
        soft = torch.softmax(torch.randn(shape, generator=generator), 1)
        weight = (
            torch.rand(
                k, generator=generator, dtype=torch.float64 if dtype == torch.float64 else torch.float32
            )
            + 0.1
        )
        for x in views(logits):
            for t, w, reduction, smoothing, others, z_loss in (
                (target, None, 1, 0.1, False, 0.0),
                (target, weight, 0, 0.2, k > 1, 1e-2),
                (target, weight, 1, 0.0, False, 0.0),
                (soft, None, 2, 0.0, False, 0.0),
            ):
                args = (t, w, reduction, -1, smoothing, others, z_loss, True, loss_dtype, True)
                for ours, theirs in zip(
                    cuda.cross_entropy(x, *args), CPU.cross_entropy(x, *args), strict=True
                ):
                    near(ours, theirs, (dtype, shape, args[2:]), tolerance)
            if len(shape) == 2 and x.is_contiguous():
                factor = torch.rand(shape[0], generator=generator, dtype=weight.dtype)
                ours, theirs = x.clone(), x.clone()
                args = (target, factor, None, -1, 0.1, False, 0.0)
                near(
                    cuda.cross_entropy_(ours, *args),
                    CPU.cross_entropy_(theirs, *args),
                    (dtype, shape, "in place"),
                    tolerance,
                )
                near(ours, theirs, (dtype, shape, "in place"), tolerance)
        scaled = logits.clone()
        cuda.cross_entropy_scale_(scaled, torch.tensor(0.5))
        near(scaled, logits * 0.5, (dtype, shape, "scale"), 0.0)
        wrong = torch.full(places, k)  # out of range: nothing is read there
        loss, grad, _ = cuda.cross_entropy(logits, wrong, None, 0, -1, 0.0, False, 0.0, False, None, True)
        assert loss.isnan().all() and grad.isnan().all()


def pictures(batch, channels, height, width, dtype, seed=0):
    x = torch.rand(
        batch, channels, height, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    return (x * 255).round().to(dtype) if dtype == torch.uint8 else x.to(dtype)


def augmentations(
    batch, height, width, channels, padding, interpolation, antialias=False, blur=None, steps=15, seed=0
):
    """Arguments of the operator but for the images, its output size and its dtype: one straight sample, one
    that shrinks, one of each kind of a turned one, as many as there are."""
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


def augment(cuda):
    """The same bits, but for the mean of float64 images; the gradient is added up in another order."""
    for dtype, channels, layout in itertools.product(
        (*DTYPES, torch.uint8), (1, 3, 5), ("contiguous", "last", "part")
    ):
        check = functools.partial(near, tolerance=1e-14) if dtype == torch.float64 else same
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
                check(cuda.augment(*args), CPU.augment(*args), (dtype, channels, layout, static, size))
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
        for kernel in ((3, 5), (1, 1)):
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


CASES = (dropout, dropout_add, sgd, cross_entropy, fgsm, augment)


def main(library, name):
    keep, cuda = load(library)
    for case in CASES:
        if case.__name__ == name:
            case(cuda)
            print("done:", name)
    del keep


if __name__ == "__main__":
    main(*sys.argv[1:])
