"""Smoothed cross-entropy against torch's; the floor is z * 2, which reads and writes each logit once.

Forward and backward together cannot avoid reading each logit and writing its gradient; a forward pass,
reading it. On a GPU the libraries that `peers` finds are further sides of rows of logits.
"""

import math
from collections.abc import Iterator
from functools import partial

import torch

import fastreg as fr
from fastreg.benchmarks import _timing, peers
from fastreg.benchmarks._timing import Case, Targets, Work

SMOOTHING = 0.1
BOTH, FORWARD = "smoothed cross-entropy forward + backward", "smoothed cross-entropy forward"
SHAPES = {
    "full": (
        (BOTH, 512, 32000),
        (BOTH, 256, 1000),
        (BOTH, 128, 10),
        (BOTH, 4, 21, 128, 128),
        (FORWARD, 4, 4),
    ),
    "quick": ((BOTH, 256, 1000), (BOTH, 128, 10), (BOTH, 4, 21, 128, 128), (FORWARD, 4, 4)),
    "tiny": ((BOTH, 16, 10), (BOTH, 2, 3, 4, 5), (FORWARD, 4, 4)),
}


def _targets(classes, dtype):
    exact = dtype == torch.float32
    return {
        32000: Targets(eager=5, compile=3, floor=1.6 if exact else 2.2),
        1000: Targets(eager=4.5, compile=3, floor=1.9),
        21: Targets(eager=1.5, compile=1, floor=1.8 if exact else 2.5),
        10: Targets(eager=1.5, compile=1, floor=7),
    }.get(classes, Targets(eager=1.5, compile=1))


def cases(scale: str) -> Iterator[Case]:
    """The rows of the table."""
    for dtype in _timing.DTYPES:
        for work, *shape in SHAPES[scale]:
            build = partial(_build, shape, work == BOTH, dtype)
            size, targets = " × ".join(map(str, shape)), _targets(shape[1], dtype)
            yield Case("cross_entropy", work, size, math.prod(shape), dtype, build, "z * 2", targets)


def _build(shape, backward, dtype, device):
    z = torch.randn(shape, device=device).to(dtype).requires_grad_(backward)
    y = torch.randint(0, shape[1], (shape[0], *shape[2:]), device=device)

    def ours(z, y):
        return fr.cross_entropy(z, y, label_smoothing=SMOOTHING)

    def theirs(z, y):
        return torch.nn.functional.cross_entropy(z, y, label_smoothing=SMOOTHING)

    def both(function, z=z):
        z.grad = None
        loss = function(z, y)
        if backward:
            loss.backward()

    def check():
        exact = z.detach().double().requires_grad_(backward)
        expected, got = theirs(exact, y), ours(z, y)
        torch.testing.assert_close(got.double(), expected, rtol=_timing.tolerance(dtype), atol=0)
        if backward:
            (expected,), (got,) = torch.autograd.grad(expected, exact), torch.autograd.grad(got, z)
            torch.testing.assert_close(
                got.double(),
                expected,
                rtol=10 * _timing.tolerance(dtype),
                atol=1e-6 * expected.abs().max().item(),
            )

    plain = z.detach()
    functions = {"fastreg": ours, "torch": theirs, "compile": torch.compile(theirs, dynamic=False)}
    sides = {side: partial(both, function) for side, function in functions.items()}
    others = peers.losses(peers.LOSSES, SMOOTHING, y) if len(shape) == 2 else {}
    for name, function in others.items():
        own = plain.clone().requires_grad_(backward)  # a library may write into it
        sides[name] = partial(both, lambda z, y, function=function: function(z), own)
    return Work(
        sides | {"floor": lambda: plain * 2},
        check,
        proofs={
            name: partial(
                peers.prove_loss, function, lambda z: theirs(z, y), [z], 3 * _timing.tolerance(dtype)
            )
            for name, function in others.items()
        },
        moved=(1 + backward) * z.numel() * z.element_size(),
        forward={"fastreg": lambda: ours(z, y), "torch": lambda: theirs(z, y)} if backward else {},
        inputs=(z, y),
    )


if __name__ == "__main__":
    _timing.run_alone("cross_entropy")
