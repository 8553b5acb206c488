"""The example, y = factor * x, against torch's own product. The floor is that product too: it moves the same
bytes.

Here belong the cases that `fastreg bench` times, each with a check of the result before anything is timed,
and the targets. `fastreg bench` finds a file by its name, but does not list this one.
"""

from functools import partial

import torch

from fastreg._example import example
from fastreg.benchmarks import _timing
from fastreg.benchmarks._timing import Case, Targets, Work

TARGETS = Targets(floor=1.2)
POWERS = {"full": (20, 24), "quick": (20,), "tiny": (8, 10)}


def cases(scale):
    """The rows of the table."""
    for dtype in _timing.DTYPES:
        for power in POWERS[scale]:
            build, n = partial(_build, 2**power, dtype), 2**power
            yield Case("example", "example", f"2^{power}", n, dtype, build, "x * factor", TARGETS)


def _build(n, dtype, device):
    x = torch.randn(n, device=device).to(dtype)

    def check():
        got, expected = example(x, 0.3).double(), x.double() * 0.3
        torch.testing.assert_close(got, expected, rtol=_timing.tolerance(dtype), atol=1e-7)

    compiled = torch.compile(lambda x: x * 0.3, dynamic=False)
    sides = {
        "fastreg": lambda: example(x, 0.3),
        "torch": lambda: x * 0.3,
        "compile": lambda: compiled(x),
        "floor": lambda: x * 0.3,
    }
    return Work(sides, check, moved=2 * n * x.element_size())


if __name__ == "__main__":
    _timing.run_alone("example")
