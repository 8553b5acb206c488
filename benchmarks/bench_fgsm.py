"""The FGSM step x + e * sign(g), clamped, against its torch operations; the floor is x + g, which moves the
same bytes.
"""

from collections.abc import Iterator
from functools import partial

import torch

import fastreg as fr
from fastreg.benchmarks import _timing
from fastreg.benchmarks._timing import Case, Targets, Work

TARGETS = Targets(eager=2.5, compile=1, floor=1.2)
POWERS = {"full": (20, 24), "quick": (20,), "tiny": (8, 10)}
EPS = 0.1


def cases(scale: str) -> Iterator[Case]:
    """The rows of the table."""
    for dtype in _timing.DTYPES:
        for power in POWERS[scale]:
            yield Case(
                "fgsm",
                "fgsm_step",
                f"2^{power}",
                2**power,
                dtype,
                partial(_build, 2**power, dtype),
                "x + g",
                TARGETS,
            )


def _build(n, dtype, device):
    x = torch.rand(n, device=device).to(dtype)
    g = torch.randn(n, device=device).to(dtype)

    def theirs(x, g):
        return (x + EPS * g.sign()).clamp(0, 1)

    def check():
        expected = (x.double() + EPS * g.double().sign()).clamp(0, 1)
        got = fr.fgsm_step(x, g, EPS, 0, 1)
        torch.testing.assert_close(got.double(), expected, rtol=_timing.tolerance(dtype), atol=1e-7)

    compiled = torch.compile(theirs, dynamic=False)
    sides = {
        "fastreg": lambda: fr.fgsm_step(x, g, EPS, 0, 1),
        "torch": lambda: theirs(x, g),
        "compile": lambda: compiled(x, g),
        "floor": lambda: x + g,
    }
    return Work(sides, check, moved=3 * n * x.element_size())


if __name__ == "__main__":
    _timing.run_alone("fgsm")
