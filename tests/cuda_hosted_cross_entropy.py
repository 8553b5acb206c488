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
    for dtype, shape in itertools.product(DTYPES, ((3, 1), (5, 10), (2, 1003), (0, 4))):
        check_sharded(cuda, dtype, *shape)


def check_sharded(cuda, dtype, rows, k):
    """What a rank computes of its classes, rows with gaps between them and at any address."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    tolerance = {torch.float64: 1e-12, torch.float32: 4e-6}.get(dtype, 2**-7)
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(rows, k + 3, generator=generator, dtype=torch.float64).to(dtype)
    index = torch.randint(-2, k, (rows,), generator=generator)  # -1: on another rank, -2: does not count
    soft = torch.softmax(torch.randn(rows, k, generator=generator), 1)
    weight = torch.rand(k, generator=generator, dtype=wide) + 0.1
    factor = torch.rand(rows, generator=generator, dtype=wide)
    for in_place, x in ((False, logits[:, 1 : k + 1]), (True, logits[:, :k].contiguous())):
        for target, w, mix, base in (
            (index, None, 0.9, 0.1 / k), (index, weight, 0.9, 0.1 / k), (index, None, 1.0, 0.0),
            (index, weight, -0.1, 0.1), (soft, None, 1.0, 0.0), (soft, weight, 0.8, 0.2 / k),
        ):  # fmt: skip
            what = dtype, rows, k, target.dtype, mix
            of_cpu = CPU.cross_entropy_sharded_sums(x, target, w, mix, base)
            near(cuda.cross_entropy_sharded_sums(x, target, w, mix, base), of_cpu, what, 4e-6 * k**0.5)
            mass = of_cpu[3] if target is soft else torch.full_like(factor, 1.5)
            whole = torch.stack((of_cpu[0] + 0.1, of_cpu[1] + 0.2, mass, mass * 0.5, mass * 0.1, factor))
            grads = []
            for op in (cuda, CPU):
                y = x.clone() if in_place else x
                wider = torch.float32 if dtype == torch.float16 else dtype
                g = y if in_place else torch.empty_like(y, dtype=wider)
                op.cross_entropy_sharded_grad_(g, y, target, w, whole, mix, base)
                grads.append(g)
            near(*grads, (*what, "gradient", in_place), tolerance)
