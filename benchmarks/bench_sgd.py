"""A step of SGD with momentum, L1 and L2 against torch's with the usual line for L1.

The floor is torch's fused SGD, which has no L1. Five elements cannot be avoided: p, g and the momentum read,
p and the momentum written.
"""

from collections.abc import Iterator
from functools import partial

import torch

import fastreg as fr
from fastreg.benchmarks import _timing
from fastreg.benchmarks._timing import Case, Targets, Work

OPTIONS = dict(lr=1e-3, momentum=0.9, weight_decay=1e-4)
L1 = 1e-5
ONE, MANY = Targets(eager=2.5, compile=1, floor=1.05), Targets(eager=3.5, floor=1.1)


def resnet50():
    """The shapes of the 161 parameters of a ResNet-50 (He et al. 2016), in the order of torchvision's."""

    def convolution(inputs, outputs, kernel):
        """The weight, then weight and bias of its batch norm."""
        return [(outputs, inputs, kernel, kernel), (outputs,), (outputs,)]

    shapes, inputs = convolution(3, 64, 7), 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += (
                convolution(inputs, width, 1)
                + convolution(width, width, 3)
                + convolution(width, 4 * width, 1)
            )
            if block == 0:
                shapes += convolution(inputs, 4 * width, 1)
            inputs = 4 * width
    return [*shapes, (1000, inputs), (1000,)]


SIZES = {
    "full": (
        ("one tensor of 2^20", [(2**20,)], ONE),
        ("one tensor of 2^24", [(2**24,)], ONE),
        ("256 tensors of 4096", [(4096,)] * 256, MANY),
        ("ResNet-50", resnet50(), MANY),
    ),
    "quick": (("one tensor of 2^20", [(2**20,)], ONE), ("256 tensors of 4096", [(4096,)] * 256, MANY)),
    "tiny": (("one tensor of 2^8", [(2**8,)], Targets()), ("3 tensors of 16", [(16,)] * 3, Targets())),
}


def cases(scale: str) -> Iterator[Case]:
    """The rows of the table."""
    for dtype in _timing.DTYPES:
        for size, shapes, targets in SIZES[scale]:
            elements = sum(torch.Size(shape).numel() for shape in shapes)
            yield Case(
                "sgd",
                "SGD momentum + L1 + L2",
                size,
                elements,
                dtype,
                partial(_build, shapes, dtype),
                "torch's fused SGD, without L1",
                targets,
                scales=len(shapes) == 1,
            )


def _build(shapes, dtype, device):
    start = [torch.randn(shape, device=device).to(dtype) for shape in shapes]
    gradients = [torch.randn(shape, device=device).to(dtype) for shape in shapes]

    def parameters():
        copies = [torch.nn.Parameter(tensor.clone()) for tensor in start]
        for parameter, gradient in zip(copies, gradients, strict=True):
            parameter.grad = gradient.clone()
        return copies

    def theirs(parameters, optimizer):
        with torch.no_grad():
            for p in parameters:
                p.grad.add_(p.sign(), alpha=L1)
        optimizer.step()

    def check():
        # larger than one would train with: each of them must show in the result
        options, l1 = dict(lr=0.1, momentum=0.9, weight_decay=0.1), 0.1
        ours = parameters()
        optimizer = fr.optim.SGD(ours, l1=l1, **options)
        for _ in range(2):
            optimizer.step()
        for got, w, g in zip(ours, start, gradients, strict=True):
            w, g, momentum = w.double(), g.double(), 0
            for _ in range(2):
                momentum = options["momentum"] * momentum + g + options["weight_decay"] * w + l1 * w.sign()
                w = w - options["lr"] * momentum
            tolerance = _timing.tolerance(dtype)
            torch.testing.assert_close(got.detach().double(), w, rtol=tolerance, atol=tolerance)

    sides = {}
    ours = parameters()
    sides["fastreg"] = fr.optim.SGD(ours, l1=L1, **OPTIONS).step
    eager = parameters()
    sides["torch"] = partial(theirs, eager, torch.optim.SGD(eager, **OPTIONS))
    if len(shapes) == 1:  # compiling hundreds of tensors takes minutes on a CPU
        compiled = parameters()
        sides["compile"] = partial(
            torch.compile(theirs, dynamic=False), compiled, torch.optim.SGD(compiled, **OPTIONS)
        )
    sides["floor"] = torch.optim.SGD(parameters(), fused=True, **OPTIONS).step
    return Work(sides, check, moved=5 * sum(t.numel() * t.element_size() for t in start))


if __name__ == "__main__":
    _timing.run_alone("sgd")
