"""The operators of cross-entropy, for tests/cuda_hosted.py: the sums of a row are taken in another order
than on the CPU."""

import itertools

import torch
from cuda_hosted import CPU, near, views
from cuda_machine import DTYPES


def check(cuda):
    # One class, few, more rows than a block has warps, long rows, rows side by side, and no row.
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
