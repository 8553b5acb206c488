"""The loss of a language model's last layer, F.cross_entropy(F.linear(hidden, weight), target), forward and
backward, without ever holding all logits. What counts is the memory beyond the inputs and their gradients, as
a share of the logits' bytes.

Without smoothing torch has a form in chunks too, from 2.14 on. It is one more side where it is there, and the
memory is then a share of its. With smoothing that form builds all logits, and warns. On a GPU the libraries
that `peers` finds are further sides.
"""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F

import fastreg as fr
from fastreg.benchmarks import _timing, peers
from fastreg.benchmarks._timing import Case, Targets, Work

TARGETS = {0.1: Targets(eager=1.11, compile=1, peak=0.1), 0.0: Targets(peak=0.25, others={"chunked": 1.0})}
SHAPES = {"full": (2048, 512, 32000), "quick": (256, 128, 4000), "tiny": (16, 8, 50)}
CHUNKS = getattr(torch.nn, "LinearCrossEntropyOptions", None)
FLOOR = "the three matrix products alone, of all rows at once"


def cases(scale: str) -> Iterator[Case]:
    """The rows of the table."""
    tokens, width, classes = SHAPES[scale]
    for dtype in _timing.DTYPES:
        for smoothing, targets in TARGETS.items():
            build = partial(_build, tokens, width, classes, smoothing, dtype)
            size = f"{tokens} × {width} × {classes}"
            work = "linear_cross_entropy forward + backward" + ("" if smoothing else ", no smoothing")
            targets = targets if scale == "full" else Targets()
            yield Case(
                "linear_cross_entropy", work, size, tokens * classes, dtype, build, FLOOR, targets, rounds=5
            )


def _build(tokens, width, classes, smoothing, dtype, device):
    hidden = torch.randn(tokens, width, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(classes, width, device=device) / width**0.5).to(dtype).requires_grad_()
    target = torch.randint(0, classes, (tokens,), device=device)

    def ours(hidden, weight):
        return fr.linear_cross_entropy(hidden, weight, target, label_smoothing=smoothing)

    def theirs(hidden, weight):
        return F.cross_entropy(F.linear(hidden, weight), target, label_smoothing=smoothing)

    def both(function):
        hidden.grad = weight.grad = None
        function(hidden, weight).backward()

    def check():
        # float32 and not float64, in which these matrices would take a minute
        exact = [tensor.detach().float().requires_grad_() for tensor in (hidden, weight)]
        expected, got = theirs(*exact), ours(hidden, weight)
        torch.testing.assert_close(got.float(), expected, rtol=10 * _timing.tolerance(dtype), atol=0)
        expected, got = torch.autograd.grad(expected, exact), torch.autograd.grad(got, (hidden, weight))
        for a, b in zip(got, expected, strict=True):
            error = ((a.float() - b).norm() / b.norm()).item()
            assert error < _timing.tolerance(dtype), (
                f"expected torch's gradients, got one that is off by {error:.1e} of its norm"
            )

    functions = {"fastreg": ours, "torch": theirs, "compile": torch.compile(theirs, dynamic=False)}
    peak_of = ("logits", tokens * classes * hidden.element_size())
    if CHUNKS and not smoothing:
        options = CHUNKS()
        functions["chunked"] = lambda hidden, weight: F.linear_cross_entropy(
            hidden, weight, target, options=options
        )
        peak_of = ("chunks", _timing.peak_bytes(partial(both, functions["chunked"]), device))
    others = peers.losses(peers.LINEAR_LOSSES, smoothing, target)
    functions |= others

    plain, matrix = hidden.detach(), weight.detach()
    logits, d_hidden, d_weight = (
        plain.new_empty(tokens, classes),
        torch.empty_like(plain),
        torch.empty_like(matrix),
    )

    def floor():
        torch.mm(plain, matrix.t(), out=logits)
        torch.mm(logits, matrix, out=d_hidden)
        torch.mm(logits.t(), plain, out=d_weight)

    return Work(
        {side: partial(both, function) for side, function in functions.items()} | {"floor": floor},
        check,
        forward={"fastreg": lambda: ours(hidden, weight), "torch": lambda: theirs(hidden, weight)},
        inputs=(hidden, weight, target),
        peak_of=peak_of,
        proofs={
            name: partial(
                peers.prove_loss,
                functions[name],
                theirs,
                [hidden, weight],
                3 * _timing.tolerance(dtype),
            )
            for name in others
        },
    )


if __name__ == "__main__":
    _timing.run_alone("linear_cross_entropy")
