"""A step of SGD with momentum, L1 and L2 against torch's with the usual line for L1.

The second kind of row clips by the global norm and keeps a moving average, for which torch takes three calls.
The floor is torch's fused SGD, which has no L1. Five elements cannot be avoided: p, g and the momentum read,
p and the momentum written.
"""

from collections.abc import Iterator
from functools import partial

import torch

import fastreg as fr
from fastreg.benchmarks import _timing, optimizers
from fastreg.benchmarks._timing import Case, Targets, Work

OPTIONS = dict(lr=1e-3, momentum=0.9, weight_decay=1e-4)
L1 = 1e-5
ONE, MANY = Targets(eager=2.5, compile=1, floor=1.05), Targets(eager=3.5, floor=1.1)
SMALL = Targets(eager=3.5, floor=0.5)  # whose step is the way from Python to the kernel

SIZES = {
    "full": (
        ("one tensor of 2^20", [(2**20,)], ONE),
        ("one tensor of 2^24", [(2**24,)], ONE),
        ("256 tensors of 4096", [(4096,)] * 256, MANY),
        ("200 tensors of 64", [(64,)] * 200, SMALL),
        ("ResNet-50", optimizers.resnet50(), MANY),
    ),
    "quick": (("one tensor of 2^20", [(2**20,)], ONE), ("256 tensors of 4096", [(4096,)] * 256, MANY)),
    "tiny": (("one tensor of 2^8", [(2**8,)], Targets()), ("3 tensors of 16", [(16,)] * 3, Targets())),
}


def cases(scale: str) -> Iterator[Case]:
    """The rows of the table."""
    for dtype in _timing.DTYPES:
        for size, shapes, targets in SIZES[scale]:
            elements = sum(torch.Size(shape).numel() for shape in shapes)
            described = dict(
                size=size,
                elements=elements,
                dtype=dtype,
                floor="torch's fused SGD, without L1",
                scales=len(shapes) == 1,
            )
            build = partial(_build, shapes, dtype)
            yield Case("sgd", "SGD momentum + L1 + L2", build=build, targets=targets, **described)
            if scale != "quick":
                build = partial(_build_whole, shapes, dtype)
                yield Case("sgd", "SGD momentum + clipping + average", build=build, **described)


def _check(start, gradients, dtype, clipped=False):
    """Two steps against the formula in float64, with factors large enough to show."""
    ours, l1 = optimizers.parameters(start, gradients), 0.1
    norm = torch.stack([g.double().norm() for g in gradients]).norm()
    factor = 0.5 if clipped else 1
    more = dict(ema=0.9, max_norm=0.5 * norm.item()) if clipped else {}
    optimizer = fr.optim.SGD(ours, lr=0.1, momentum=0.9, weight_decay=0.1, l1=l1, **more)
    for _ in range(2):
        optimizer.step()
    for got, w, g in zip(ours, start, gradients, strict=True):
        w, g, momentum = w.double(), g.double() * factor, 0
        for _ in range(2):
            momentum = 0.9 * momentum + g + 0.1 * w + l1 * w.sign()
            w = w - 0.1 * momentum
        tolerance = _timing.tolerance(dtype)
        torch.testing.assert_close(got.detach().double(), w, rtol=tolerance, atol=tolerance)


def _build(shapes, dtype, device):
    start, gradients = optimizers.tensors(shapes, dtype, device)
    parameters = partial(optimizers.parameters, start, gradients)
    eager = parameters()
    theirs = partial(optimizers.with_l1, l1=L1)
    sides = {
        "fastreg": fr.optim.SGD(parameters(), l1=L1, **OPTIONS).step,
        "torch": partial(theirs, eager, torch.optim.SGD(eager, **OPTIONS)),
    }
    if len(shapes) == 1:  # compiling hundreds of tensors takes minutes on a CPU
        compiled = parameters()
        sides["compile"] = partial(
            torch.compile(theirs, dynamic=False), compiled, torch.optim.SGD(compiled, **OPTIONS)
        )
    sides["floor"] = torch.optim.SGD(parameters(), fused=True, **OPTIONS).step
    moved = 5 * sum(t.numel() * t.element_size() for t in start)
    return Work(sides, partial(_check, start, gradients, dtype), moved=moved)


def _build_whole(shapes, dtype, device):
    start, gradients = optimizers.tensors(shapes, dtype, device)
    ours, theirs = partial(fr.optim.SGD, **OPTIONS), partial(torch.optim.SGD, **OPTIONS)
    sides = optimizers.with_clipping_and_average(ours, theirs, start, gradients)
    moved = 8 * sum(t.numel() * t.element_size() for t in start)
    return Work(sides, partial(_check, start, gradients, dtype, clipped=True), moved=moved)


if __name__ == "__main__":
    _timing.run_alone("sgd")
