"""The sum of squares of many tensors against torch's global norm of them, `get_total_norm`.

The floor is a sum of all elements, which reads them once and does nothing else.
"""

from collections.abc import Iterator
from functools import partial

import torch

import fastreg  # noqa: F401
from fastreg.benchmarks import _timing
from fastreg.benchmarks._timing import Case, Targets, Work

SIZES = {
    "full": (("one tensor of 2^24", [(2**24,)]), ("256 tensors of 4096", [(4096,)] * 256)),
    "quick": (("256 tensors of 4096", [(4096,)] * 256),),
    "tiny": (("3 tensors of 16", [(16,)] * 3),),
}


def cases(scale: str) -> Iterator[Case]:
    """The rows of the table."""
    for dtype in _timing.DTYPES:
        for size, shapes in SIZES[scale]:
            elements = sum(torch.Size(shape).numel() for shape in shapes)
            targets = Targets() if scale == "tiny" else Targets(eager=1.0)
            build = partial(_build, shapes, dtype)
            yield Case(
                "sum_of_squares", "sum of squares", size, elements, dtype, build, "a sum", targets,
                scales=len(shapes) == 1,
            )  # fmt: skip


def _build(shapes, dtype, device):
    tensors = [torch.randn(shape, device=device).to(dtype) for shape in shapes]

    def check():
        want = sum(t.double().square().sum() for t in tensors)
        got = torch.ops.fastreg.sum_of_squares(tensors)
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=0)

    sides = {
        "fastreg": partial(torch.ops.fastreg.sum_of_squares, tensors),
        "torch": partial(torch.nn.utils.get_total_norm, tensors),
        "floor": lambda: [t.sum() for t in tensors],
    }
    return Work(sides, check, moved=sum(t.numel() * t.element_size() for t in tensors))


if __name__ == "__main__":
    _timing.run_alone("sum_of_squares")
