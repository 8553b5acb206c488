"""The FGSM step x + e * sign(g), clamped, against its torch operations; the floor is x + g, which moves the
same bytes.
"""

from collections.abc import Iterator
from functools import partial

import torch

import fastreg as fr
from fastreg.benchmarks import _timing
from fastreg.benchmarks._timing import Case, Targets, Work

SMALL, LARGE = Targets(eager=1.5), Targets(eager=2.5, compile=1, floor=1.2)
TARGETS = {16: SMALL, 3072: SMALL, 2**14: SMALL, 2**20: LARGE, 2**24: LARGE}
# 3,072 is one image of CIFAR.
SIZES = {"full": (16, 3072, 2**14, 2**20, 2**24), "quick": (16, 3072, 2**20), "tiny": (2**8, 2**10)}
EPS = 0.1


def cases(scale: str) -> Iterator[Case]:
    """The rows of the table."""
    for dtype in _timing.DTYPES:
        for n in SIZES[scale]:
            yield Case(
                "fgsm",
                "fgsm_step",
                f"2^{n.bit_length() - 1}" if n.bit_count() == 1 else f"{n:,}",
                n,
                dtype,
                partial(_build, n, dtype),
                "x + g",
                TARGETS.get(n, Targets()),
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
