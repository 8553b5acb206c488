"""Numbers below 2^-126, the smallest normal float32, on which many processors take a multiple of the time.
The floor is the same work of ours on normal numbers; torch does the same work on the same small numbers.

They come up by themselves: as the gradient of rows that a model is sure of, and as the momentum of weights
that get no gradient any more.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F

import fastreg as fr
from fastreg.benchmarks import _timing, optimizers
from fastreg.benchmarks._timing import Case, Targets, Work

SMALL = 1e-40
STATES = {"SGD": ("momentum_buffer",), "AdamW": ("exp_avg", "exp_avg_sq")}
OPTIONS = {"SGD": dict(lr=1e-3, momentum=0.9), "AdamW": dict(lr=1e-3)}
AUGMENT = dict(rotate=15, scale=(0.9, 1.1), brightness=0.4)
INPUT = Targets(floor=1.2)
LINEAR = {"full": (2048, 256, 16000), "tiny": (8, 16, 50)}  # rows, width, classes


def cases(scale: str) -> Iterator[Case]:
    """The rows of the table."""
    n = {"full": 2**22, "quick": 2**20, "tiny": 2**8}[scale]
    for name in STATES:
        for dtype in _timing.DTYPES:
            build = partial(_build_step, name, n, dtype)
            yield _case(f"step of {name} with subnormal state", n, dtype, build, Targets(floor=1.05))
            build = partial(_build_small_gradients, name, n, dtype)
            yield _case(f"step of {name} with gradients of 1e-20", n, dtype, build, Targets(floor=1.05))
    if scale in LINEAR:
        batch, width, classes = LINEAR[scale]
        yield Case(
            "subnormal",
            "linear layer, loss and backward, logits of deviation 16",
            f"{batch} × {width} × {classes}",
            batch * classes,
            torch.float32,
            partial(_build_linear, batch, width, classes),
            "the same with deviation 4",
            Targets(eager=8, floor=1.1),
            rounds=3,
            scales=False,
        )
    for work, build in (
        ("dropout", partial(_build_input, n, lambda x: fr.dropout(x, 0.5), lambda x: F.dropout(x, 0.5))),
        ("fgsm_step", partial(_build_input, n, _ours_fgsm, _theirs_fgsm)),
    ):
        yield _case(f"{work} of subnormal input", n, torch.float32, build, INPUT)
    side = 16 if scale == "tiny" else 128
    yield _case(
        "augmentation of subnormal input",
        16 * 3 * side**2,
        torch.float32,
        partial(_build_augment, side),
        INPUT,
    )


def _case(work: str, n: int, dtype: torch.dtype, build: Callable[[str], Work], targets: Targets) -> Case:
    return Case(
        "subnormal", work, f"{n:,}", n, dtype, build, "the same on normal numbers", targets, scales=False
    )


def _optimizer(cls, n, dtype, device, size, **options):
    """An optimiser of one parameter, whose gradient has numbers of that size, and the parameter."""
    start, gradients = optimizers.tensors([(n,)], dtype, device)
    (parameter,) = optimizers.parameters(start, [gradients[0] * size])
    return cls([parameter], **OPTIONS[cls.__name__], **options), parameter


def _build_step(name, n, dtype, device):
    """Steps without a gradient after the state has become small. In ours it is 0 from the next step on, in
    torch's it stays where it is.
    """

    def stepped(cls, value, **options):
        optimizer, parameter = _optimizer(cls, n, dtype, device, 0.0, **options)
        optimizer.step()
        state = [optimizer.state[parameter][key] for key in STATES[name]]
        for each in state:
            each.fill_(value)
        return optimizer, parameter, state

    optimizer, parameter, state = stepped(getattr(fr.optim, name), SMALL)

    def check():
        optimizer.step()
        assert parameter.isfinite().all() and not any(each.any() for each in state), "the state is kept"

    normal, *_ = stepped(getattr(fr.optim, name), 1e-10)
    theirs, *_ = stepped(getattr(torch.optim, name), SMALL, fused=True)
    return Work({"fastreg": optimizer.step, "torch": theirs.step, "floor": normal.step}, check)


def _build_small_gradients(name, n, dtype, device):
    """The squares of such gradients are subnormal."""
    ours = getattr(fr.optim, name)
    optimizer, parameter = _optimizer(ours, n, dtype, device, 1e-20)

    def check():
        before = parameter.detach().clone()
        optimizer.step()
        assert parameter.isfinite().all() and (parameter - before).abs().max() < 1e-3

    normal, _ = _optimizer(ours, n, dtype, device, 1.0)
    theirs, _ = _optimizer(getattr(torch.optim, name), n, dtype, device, 1e-20, fused=True)
    return Work({"fastreg": optimizer.step, "torch": theirs.step, "floor": normal.step}, check)


def _build_linear(batch, width, classes, device):
    hidden = torch.randn(batch, width, device=device).requires_grad_()
    base = torch.randn(classes, width, device=device) / math.sqrt(width)
    target = torch.randint(classes, (batch,), device=device)

    def both(loss, weight):
        hidden.grad = weight.grad = None
        loss(F.linear(hidden, weight), target).backward()

    sure, unsure = (deviation * base for deviation in (16, 4))
    for weight in (sure, unsure):
        weight.requires_grad_()

    def check():
        got = torch.autograd.grad(fr.cross_entropy(F.linear(hidden, sure), target), hidden)[0]
        want = torch.autograd.grad(F.cross_entropy(F.linear(hidden, sure), target), hidden)[0]
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6 * want.abs().max().item())

    sides = {
        "fastreg": partial(both, fr.cross_entropy, sure),
        "torch": partial(both, F.cross_entropy, sure),
        "floor": partial(both, fr.cross_entropy, unsure),
    }
    return Work(sides, check)


def _ours_fgsm(x):
    return fr.fgsm_step(x, x, 1e-41)


def _theirs_fgsm(x):
    return x + 1e-41 * x.sign()


def _build_input(n, ours, theirs, device):
    x = torch.randn(n, device=device)
    small = x * SMALL

    def check():
        moved = ours(small)
        assert (moved != 0).double().mean() > 0.4, "small numbers are lost"

    return Work(
        {"fastreg": lambda: ours(small), "torch": lambda: theirs(small), "floor": lambda: ours(x)}, check
    )


def _build_augment(side, device):
    """torch's part is the interpolation alone, with one matrix for all images."""
    x = torch.rand(16, 3, side, side, device=device)
    small, aug = x * SMALL, fr.augment.Augment(**AUGMENT)
    matrix = torch.tensor([[0.9, -0.2, 0.0], [0.2, 0.9, 0.0]], device=device).expand(16, 2, 3)
    grid = F.affine_grid(matrix, list(x.shape), align_corners=False)

    def check():
        assert aug(small).abs().max() < 2.0**-126, "small numbers have become larger"

    sides = {
        "fastreg": lambda: aug(small),
        "torch": lambda: F.grid_sample(small, grid, align_corners=False),
        "floor": lambda: aug(x),
    }
    return Work(sides, check)


if __name__ == "__main__":
    _timing.run_alone("subnormal")
