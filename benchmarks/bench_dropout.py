"""Dropout, forward and backward, against torch.nn.functional.dropout; the floor is x * 2, forward and
backward.

Bytes that cannot be avoided: four elements (x, y and their gradients), and the mask's bit written and read.
At 2^4 elements it is the call that is timed.
"""

from collections.abc import Iterator
from functools import partial

import torch

import fastreg as fr
from fastreg.benchmarks import _timing
from fastreg.benchmarks._timing import Case, Targets, Work

LARGE = Targets(eager=12, compile=5, floor=1.8)
TARGETS = {4: Targets(eager=1.05), 14: Targets(eager=4, compile=2, floor=1.15), 20: LARGE, 24: LARGE}
SIZES = {
    "full": ((4, 0.1), (14, 0.1), (20, 0.1), (20, 0.5), (24, 0.1)),
    "quick": ((4, 0.1), (14, 0.1), (20, 0.1)),
    "tiny": ((4, 0.1), (10, 0.1)),
}


def cases(scale: str) -> Iterator[Case]:
    """The rows of the table."""
    for dtype in _timing.DTYPES:
        for power, p in SIZES[scale]:
            build = partial(_build, 2**power, p, dtype)
            targets = TARGETS.get(power, Targets())
            work = "dropout forward + backward" + (f", p = {p}" if p != 0.1 else "")
            yield Case(
                "dropout", work, f"2^{power}", 2**power, dtype, build, "x * 2, forward + backward", targets
            )


def _build(n, p, dtype, device):
    x = torch.randn(n, device=device).to(dtype).requires_grad_()
    g = torch.ones_like(x)

    def ours(x):
        return fr.dropout(x, p)

    def theirs(x):
        return torch.nn.functional.dropout(x, p)

    def both(function):
        x.grad = None
        function(x).backward(g)

    def check():
        x.grad = None
        y = ours(x)
        y.backward(g)
        kept = (y != 0) | (x == 0)
        close = partial(torch.testing.assert_close, rtol=_timing.tolerance(dtype), atol=0)
        close(y.detach().double(), torch.where(kept, x.detach().double() / (1 - p), 0))
        close(x.grad.double(), torch.where(kept, g.double() / (1 - p), 0))
        drawn = torch.cat([ours(torch.ones_like(g)) != 0 for _ in range(max(1, 4096 // n))])
        share, spread = drawn.double().mean().item(), (p * (1 - p) / drawn.numel()) ** 0.5
        assert abs(share - (1 - p)) < 6 * spread, f"expected {1 - p} of the elements to be kept, got {share}"

    functions = {
        "fastreg": ours,
        "torch": theirs,
        "compile": torch.compile(theirs, dynamic=False),
        "floor": lambda x: x * 2,
    }
    return Work(
        {side: partial(both, function) for side, function in functions.items()},
        check,
        moved=4 * n * x.element_size() + n // 4,
        forward={"fastreg": lambda: ours(x), "torch": lambda: theirs(x)},
        inputs=(x,),
    )


if __name__ == "__main__":
    _timing.run_alone("dropout")
