"""A step of AdamW with L1, alone and with what stands beside it: clipping by the global norm and a
moving average of the weights, which torch makes with `clip_grad_norm_` and `AveragedModel`. All sides are the
optimisers themselves, `step()` from Python.

The floor is torch's fused AdamW, which has no L1; ours is proximal, as by default. Seven elements cannot be
avoided: p, g and both moments read, p and the moments written. docs/speed.md says what bounds the rows.
"""

from collections.abc import Iterator
from functools import partial

import torch

import fastreg as fr
from fastreg.benchmarks import _timing, optimizers
from fastreg.benchmarks._timing import Case, Targets, Work

OPTIONS = dict(lr=1e-3, weight_decay=1e-2)
L1 = 1e-5


def sizes(scale):
    """(name, shapes, targets of the plain step, of the whole one)"""
    one, many = [(2**24,)], [(4096,)] * 256
    if scale == "tiny":
        return [("3 tensors of 16", [(16,)] * 3, Targets(), Targets())]
    rows = [
        ("256 tensors of 4096", many, Targets(floor=0.5), Targets(eager=1 / 0.33)),
        ("one tensor of 2^24", one, Targets(eager=2, floor=1.02), Targets(eager=1 / 0.75)),
    ]
    if scale == "full":
        rows += [
            ("ResNet-50", optimizers.resnet50(), Targets(floor=1.0), Targets(eager=1 / 0.7)),
            ("4-layer transformer", optimizers.transformer(), Targets(floor=1.0), Targets(eager=1 / 0.7)),
        ]
    return rows


def cases(scale: str) -> Iterator[Case]:
    """The rows of the table."""
    for dtype in _timing.DTYPES:
        for size, shapes, plain, whole in sizes(scale):
            elements = sum(torch.Size(shape).numel() for shape in shapes)
            if dtype == torch.bfloat16 and plain.floor == 1.02:
                plain = Targets(eager=2, floor=0.75)
            for what, build, targets in (
                ("AdamW + L1", _build, plain),
                ("AdamW + clipping + average", _build_whole, whole),
            ):
                yield Case(
                    "adamw",
                    what,
                    size,
                    elements,
                    dtype,
                    partial(build, shapes, dtype),
                    "torch's fused AdamW alone",
                    targets,
                    scales=len(shapes) == 1,
                )


def _check(start, gradients, dtype, **numbers):
    """Two steps against the formula in float64, with factors large enough to show."""
    large = dict(lr=0.1, weight_decay=0.1, **numbers)
    parameters = optimizers.parameters(start, gradients)
    optimizer = fr.optim.AdamW(parameters, **large)
    for _ in range(2):
        optimizer.step()
    tolerance = 4 * _timing.tolerance(dtype)
    for got, w, g in zip(parameters, start, gradients, strict=True):
        w, m, v = w.double(), 0, 0
        for t in (1, 2):
            m, v = 0.9 * m + 0.1 * g.double(), 0.999 * v + 0.001 * g.double() ** 2
            d = (v / (1 - 0.999**t)).sqrt() + 1e-8
            w = w - 0.1 * (0.1 * w + m / (1 - 0.9**t) / d)
            w = w.sign() * (w.abs() - 0.1 * numbers.get("l1", 0.0) / d).clamp(min=0)
        near = (got.detach().double() - w).abs() <= tolerance * (1 + w.abs())
        assert near.double().mean() > 0.99  # a gradient beside 0 has a sign of its own


def _build(shapes, dtype, device):
    start, gradients = optimizers.tensors(shapes, dtype, device)
    parameters = partial(optimizers.parameters, start, gradients)
    eager = parameters()
    sides = {
        "fastreg": fr.optim.AdamW(parameters(), l1=L1, **OPTIONS).step,
        "torch": partial(optimizers.with_l1, eager, torch.optim.AdamW(eager, foreach=True, **OPTIONS), L1),
        "floor": torch.optim.AdamW(parameters(), fused=True, **OPTIONS).step,
    }
    moved = 7 * sum(t.numel() * t.element_size() for t in start)
    return Work(sides, partial(_check, start, gradients, dtype, l1=0.1), moved=moved)


def _build_whole(shapes, dtype, device):
    start, gradients = optimizers.tensors(shapes, dtype, device)
    ours, theirs = partial(fr.optim.AdamW, **OPTIONS), partial(torch.optim.AdamW, **OPTIONS)
    sides = optimizers.with_clipping_and_average(ours, theirs, start, gradients)
    moved = 10 * sum(t.numel() * t.element_size() for t in start)
    return Work(sides, partial(_check, start, gradients, dtype), moved=moved)


if __name__ == "__main__":
    _timing.run_alone("adamw")
