"""dropout_add, forward and backward, against residual + dropout(x + bias) in torch; the floor is residual + 2
* x.

Bytes that cannot be avoided: five elements (x, the residual, y, and the gradients of y and x), and the mask's
bit written and read. The residual's gradient is the one that comes, which costs nothing, so that it is left
out. At 2^4 elements it is the call that is timed.
"""

from collections.abc import Iterator
from functools import partial

import torch

import fastreg as fr
from fastreg.benchmarks import _timing
from fastreg.benchmarks._timing import Case, Targets, Work

P = 0.1
LARGE = Targets(eager=4, compile=4, floor=1.8)
TARGETS = {4: Targets(eager=1.6), 14: Targets(eager=3, compile=2, floor=1.15), 20: LARGE, 24: LARGE}
SIZES = {"full": (4, 14, 20, 24), "quick": (4, 14, 20), "tiny": (4, 10)}


def cases(scale: str) -> Iterator[Case]:
    """The rows of the table."""
    for dtype in _timing.DTYPES:
        for power in SIZES[scale]:
            build = partial(_build, 2**power, dtype)
            floor = "residual + 2 * x, forward + backward"
            targets = TARGETS.get(power, Targets())
            yield Case(
                "dropout_add",
                "dropout_add forward + backward",
                f"2^{power}",
                2**power,
                dtype,
                build,
                floor,
                targets,
            )


def _build(n, dtype, device):
    columns = min(n // 2, 1024)
    x, residual = torch.randn(2, n // columns, columns, device=device).to(dtype)
    bias = torch.randn(columns, device=device).to(dtype).requires_grad_()
    x.requires_grad_()
    g = torch.ones_like(x)

    def ours():
        return fr.dropout_add(x, residual, P, bias)

    def theirs(x, bias, residual):
        return residual + torch.nn.functional.dropout(x + bias, P)

    def both(function):
        x.grad = bias.grad = None
        function().backward(g)

    def check():
        x.grad = bias.grad = None
        y = ours()
        y.backward(g)
        kept, tolerance = x.grad != 0, _timing.tolerance(dtype)
        added = torch.where(kept, (x.detach().double() + bias.detach().double()) / (1 - P), 0)
        error = (y.detach().double() - added - residual.double()).abs()
        assert (error <= tolerance * (added.abs() + residual.double().abs() + 1)).all(), (
            f"the output is {error.max()} off"
        )
        wanted = {"input": (x, kept / (1 - P)), "bias": (bias, kept.sum(0) / (1 - P))}
        for name, (leaf, want) in wanted.items():
            close = torch.isclose(leaf.grad.double(), want.double(), rtol=tolerance, atol=0).all()
            assert close, f"the gradient of the {name} is wrong"
        ones, zeros = torch.ones_like(x.detach()), torch.zeros_like(residual)
        drawn = torch.cat([fr.dropout_add(ones, zeros, P) != 0 for _ in range(max(1, 4096 // n))])
        share, spread = drawn.double().mean().item(), (P * (1 - P) / drawn.numel()) ** 0.5
        assert abs(share - (1 - P)) < 6 * spread, f"expected {1 - P} of the elements to be kept, got {share}"

    compiled = torch.compile(theirs, dynamic=False)
    functions = {
        "fastreg": ours,
        "torch": partial(theirs, x, bias, residual),
        "compile": lambda: compiled(x, bias, residual),
        "floor": lambda: torch.add(residual, x, alpha=2),
    }
    return Work(
        {side: partial(both, function) for side, function in functions.items()},
        check,
        moved=5 * n * x.element_size() + n // 4,
        forward={side: functions[side] for side in ("fastreg", "torch")},
        inputs=(x, residual, bias),
    )


if __name__ == "__main__":
    _timing.run_alone("dropout_add")
