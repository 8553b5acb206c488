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
import fastreg.benchmarks
from fastreg.benchmarks import _timing
from fastreg.benchmarks._timing import Case, Targets, Work

OPTIONS = dict(lr=1e-3, weight_decay=1e-2)
L1, DECAY, MAX_NORM = 1e-5, 0.999, 1.0


def transformer():
    """The shapes of four layers of a transformer of width 512."""
    layer = [(1536, 512), (1536,), (512, 512), (512,), (2048, 512), (2048,), (512, 2048), (512,)]
    return (layer + 4 * [(512,)]) * 4


def sizes(scale):
    """(name, shapes, targets of the plain step, of the whole one)"""
    resnet50 = fastreg.benchmarks.load("sgd").resnet50
    one, many = [(2**24,)], [(4096,)] * 256
    if scale == "tiny":
        return [("3 tensors of 16", [(16,)] * 3, Targets(), Targets())]
    rows = [
        ("256 tensors of 4096", many, Targets(floor=0.5), Targets(eager=1 / 0.33)),
        ("one tensor of 2^24", one, Targets(eager=2, floor=1.02), Targets(eager=1 / 0.75)),
    ]
    if scale == "full":
        rows += [
            ("ResNet-50", resnet50(), Targets(floor=1.0), Targets(eager=1 / 0.7)),
            ("4-layer transformer", transformer(), Targets(floor=1.0), Targets(eager=1 / 0.7)),
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


def _parameters(start, gradients):
    copies = [torch.nn.Parameter(tensor.clone()) for tensor in start]
    for parameter, gradient in zip(copies, gradients, strict=True):
        parameter.grad = gradient.clone()
    return copies


def _tensors(shapes, dtype, device):
    return [[torch.randn(shape, device=device).to(dtype) for shape in shapes] for _ in range(2)]


def _fused(start, gradients):
    return torch.optim.AdamW(_parameters(start, gradients), fused=True, **OPTIONS).step


def _check(start, gradients, dtype, **numbers):
    """Two steps against the formula in float64, with factors large enough to show."""
    large = dict(lr=0.1, weight_decay=0.1, **numbers)
    parameters = _parameters(start, gradients)
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
    start, gradients = _tensors(shapes, dtype, device)

    def theirs(parameters, optimizer):
        with torch.no_grad():
            for p in parameters:
                p.grad.add_(p.sign(), alpha=L1)
        optimizer.step()

    eager = _parameters(start, gradients)
    sides = {
        "fastreg": fr.optim.AdamW(_parameters(start, gradients), l1=L1, **OPTIONS).step,
        "torch": partial(theirs, eager, torch.optim.AdamW(eager, foreach=True, **OPTIONS)),
        "floor": _fused(start, gradients),
    }
    moved = 7 * sum(t.numel() * t.element_size() for t in start)
    return Work(sides, partial(_check, start, gradients, dtype, l1=0.1), moved=moved)


def _build_whole(shapes, dtype, device):
    start, gradients = _tensors(shapes, dtype, device)
    parameters = _parameters(start, gradients)
    model = torch.nn.ParameterList(parameters)
    optimizer = torch.optim.AdamW(parameters, fused=True, **OPTIONS)
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(DECAY)
    )

    def theirs():
        torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        optimizer.step()
        average.update_parameters(model)

    sides = {
        "fastreg": fr.optim.AdamW(
            _parameters(start, gradients), ema=DECAY, max_norm=MAX_NORM, **OPTIONS
        ).step,
        "torch": theirs,
        "floor": _fused(start, gradients),
    }
    moved = 10 * sum(t.numel() * t.element_size() for t in start)
    return Work(sides, partial(_check, start, gradients, dtype), moved=moved)


if __name__ == "__main__":
    _timing.run_alone("adamw")
