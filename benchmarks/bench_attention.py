"""Attention with dropout on its weights, forward and backward: scaled_dot_product_attention(q, k, v,
dropout_p=0.1) against torch's, which on a CPU holds all weights. `flash` is torch's own kernel by blocks,
which knows no dropout and is timed without it: what dropout costs beside it. The floor is the seven matrix
products alone, of one head after the other. Memory is a share of torch's."""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F

import fastreg as fr
from fastreg.benchmarks import _timing
from fastreg.benchmarks._timing import Case, Targets, Work

P = 0.1
SMALL, LARGE = (8, 4, 128, 64), (1, 8, 2048, 64)
SHAPES = {
    "full": (SMALL, (4, 8, 512, 64), (2, 8, 1024, 64), LARGE),
    "quick": (SMALL, (1, 8, 512, 64)),
    "tiny": ((1, 2, 16, 8),),
}
TARGETS = {
    SMALL: Targets(eager=2.1),
    (4, 8, 512, 64): Targets(eager=3.2, others={"flash": 0.8}),
    (2, 8, 1024, 64): Targets(eager=3.2, others={"flash": 0.8}),
    LARGE: Targets(eager=3.8, peak=0.1),
}
FLOOR = "the seven matrix products"


def cases(scale: str) -> Iterator[Case]:
    """The rows of the table."""
    for dtype in _timing.DTYPES:
        for shape in SHAPES[scale]:
            targets = TARGETS.get(shape, Targets())
            if dtype == torch.bfloat16:
                targets = Targets(eager=3, peak=0.1) if shape == LARGE else Targets()
            yield _case(shape, dtype, False, targets)
    yield _case(SHAPES[scale][-1], torch.float32, True, Targets())


def _case(shape: tuple[int, ...], dtype: torch.dtype, is_causal: bool, targets: Targets) -> Case:
    batch, heads, length, _ = shape
    return Case(
        "attention",
        f"{'causal ' if is_causal else ''}attention with dropout, forward + backward",
        " × ".join(map(str, shape)),
        batch * heads * length**2,
        dtype,
        partial(_build, shape, dtype, is_causal),
        FLOOR,
        targets,
        rounds=5,
        scales=False,
    )


def _build(shape, dtype, is_causal, device):
    q, k, v = (torch.randn(shape, device=device).to(dtype).requires_grad_() for _ in range(3))
    g = torch.randn(shape, device=device).to(dtype)

    def attend(function, p=P):
        return function(q, k, v, None, p, is_causal)

    def both(function, p=P):
        q.grad = k.grad = v.grad = None
        attend(function, p).backward(g)

    ours, theirs = fr.scaled_dot_product_attention, F.scaled_dot_product_attention

    def check():
        _check_values([t.detach()[:1, :1] for t in (q, k, v)], is_causal)
        ones = torch.ones_like(q[:1, :1])
        zeros = torch.zeros_like(ones)
        mean = fr.scaled_dot_product_attention(zeros, zeros, ones, None, P).double().mean().item()
        spread = (P / (1 - P)) ** 0.5 / shape[2]
        assert abs(mean - 1) < 6 * spread + _timing.tolerance(dtype), f"expected a mean of 1, got {mean}"

    compiled = torch.compile(theirs, dynamic=False)
    sides = {
        "fastreg": partial(both, ours),
        "torch": partial(both, theirs),
        "compile": partial(both, compiled),
        "flash": partial(both, theirs, 0.0),
        "floor": _products(*(t.detach() for t in (q, k, v))),
    }
    return Work(
        sides,
        check,
        forward={"fastreg": partial(attend, ours), "torch": partial(attend, theirs)},
        inputs=(q, k, v),
        peak_of=("torch's", max(_timing.peak_bytes(sides["torch"], device), 1)),
    )


def _check_values(tensors: list[torch.Tensor], is_causal: bool) -> None:
    """One head, its output and gradients, against all weights at once in float64."""
    q, k, v = leaves = [t.clone().requires_grad_() for t in tensors]
    seed = 1234
    generator = torch.Generator(q.device).manual_seed(seed)
    got = fr.scaled_dot_product_attention(q, k, v, None, P, is_causal, generator=generator)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    scores = exact[0] @ exact[1].mT / q.shape[-1] ** 0.5
    if is_causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    generator.manual_seed(seed)
    want = fr.dropout(scores.softmax(-1), P, generator=generator) @ exact[2]
    pairs = [(got, want)]
    pairs += zip(
        torch.autograd.grad(got.double().square().sum(), leaves),
        torch.autograd.grad(want.square().sum(), exact),
        strict=True,
    )
    for ours, theirs in pairs:
        error = ((ours.double() - theirs).norm() / theirs.norm()).item()
        assert error < 2 * _timing.tolerance(q.dtype), (
            f"expected float64's values, got one that is off by {error:.1e}"
        )


def _products(q, k, v):
    """The products of an attention and its gradients, in float32, with one head's memory."""
    q, k, v = (t.float().flatten(0, 1) for t in (q, k, v))
    weights, out = q.new_empty(q.shape[1], k.shape[1]), torch.empty_like(q[0])

    def run():
        for i in range(len(q)):
            for _ in range(3):  # the scores, twice, and the gradient of the weights
                torch.mm(q[i], k[i].t(), out=weights)
            for _ in range(2):  # the output, and the gradient of query
                torch.mm(weights, v[i], out=out)
            for _ in range(2):  # the gradients of key and value
                torch.mm(weights.t(), q[i], out=out)

    return run


if __name__ == "__main__":
    _timing.run_alone("attention")
