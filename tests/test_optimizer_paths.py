"""Clipping, averages and rounding at random in the step as Python collects it and as C++ does: the same
bits.
"""

import math

import pytest
import torch
from helpers import DTYPES
from optimizer_reference import StepSpy, on_both_paths
from sgd_reference import parameter

import fastreg as fr

pytestmark = pytest.mark.skipif(
    not hasattr(fr._registry.fast, "adamw"), reason=f"no C++ path: {fr._registry.why_not_fast}"
)
KINDS = {fr.optim.SGD: dict(lr=0.1, momentum=0.9), fr.optim.AdamW: dict(lr=0.1, amsgrad=True)}


@pytest.fixture(params=KINDS, ids=lambda cls: cls.__name__)
def make(request):
    return lambda params, **options: request.param(params, **{**KINDS[request.param], **options})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        dict(max_norm=0.5),
        dict(max_norm=1e9, ema=0.9),
        dict(ema=0.9, ema_warmup=True),
        dict(max_norm=math.inf, ema=0.999, ema_warmup=0.75),
        dict(max_norm=2, ema=0.5, ema_warmup=1, error_if_nonfinite=True),
        dict(ema=0.9, ema_warmup=0.0),
        dict(max_norm=0.5, ema=0.9, ema_warmup=True, stochastic_rounding=True, rounding_seed=-5),
    ],
    ids=str,
)
def test_the_same_bits(monkeypatch, make, options, dtype):
    """Over two groups, one of which warms up alone; a step with an infinite gradient is skipped by both."""
    if dtype == torch.float16:  # for which there is none
        options = options | dict(stochastic_rounding=False)

    def tensor(seed, *shape):
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    skips = "max_norm" in options and not options.get("error_if_nonfinite")

    def run():
        params = [parameter(tensor(i, *shape)) for i, shape in enumerate([(6, 50), (), (3, 0), (2100,)])]
        second = {"params": params[2:], "lr": 0.01, "l1": 0.3, "rounding_seed": 2**62}
        optimizer = make([{"params": params[:2]}, second], **options)
        norms = []
        for step in range(5):
            for i, p in enumerate(params):
                p.grad = tensor(10 * step + i, *p.shape)
            if step == 3 and skips:
                params[3].grad[77] = math.inf
            optimizer.step()
            norms += [] if optimizer.grad_norm is None else [optimizer.grad_norm]
        return (
            [p.detach() for p in params] + norms + [v for s in optimizer.state.values() for v in s.values()]
        )

    # The first step makes the state, in Python, which skips steps too.
    assert on_both_paths(monkeypatch, run) == 4 - skips


def test_what_is_left_to_python(monkeypatch, make):
    """A parameter that is averaged without a gradient, gradients of another form, and no gradient at all."""

    def run():
        a, b = parameter(torch.ones(3, 4)), parameter(torch.ones(2))
        optimizer = make([a, b], ema=0.5, max_norm=1.0)
        for step in range(5):
            a.grad, b.grad = torch.full((3, 4), step + 1.0), torch.ones(2)
            if step == 2:
                b.grad = None
            if step == 3:
                a.grad = torch.arange(12.0).view(4, 3).t()
            if step == 4:
                a.grad = b.grad = None
            optimizer.step()
        values = [v.clone() for p in (a, b) for v in optimizer.state[p].values()]
        return [a.detach(), b.detach(), optimizer.grad_norm, *values]

    assert on_both_paths(monkeypatch, run) == 1


def test_a_norm_that_is_not_finite_raises_before_anything_is_stepped(monkeypatch, make):
    for path in (None, StepSpy()):
        monkeypatch.setattr(fr.optim._one_pass, "fast", path)
        p = parameter(torch.ones(3))
        optimizer = make([p], max_norm=1.0, error_if_nonfinite=True)
        p.grad = torch.ones(3)
        optimizer.step()
        before = p.detach().clone()
        p.grad = torch.tensor([1.0, math.nan, 1.0])
        with pytest.raises(RuntimeError, match="norm of the gradients must be finite"):
            optimizer.step()
        assert torch.equal(p.detach(), before)


@pytest.mark.parametrize("options", [dict(), dict(max_norm=1.0)], ids=str)
def test_an_error_in_a_later_group_finds_nothing_stepped(monkeypatch, make, options):
    monkeypatch.setattr(fr.optim._one_pass, "fast", spy := StepSpy())
    a, b = parameter(torch.ones(3)), parameter(torch.ones(3))
    optimizer = make([{"params": [a]}, {"params": [b]}], **options)
    a.grad, b.grad = torch.ones(3), torch.ones(3)
    optimizer.step()
    before, b.grad = a.detach().clone(), torch.ones(3).to_sparse()
    optimizer.param_groups[1]["weight_decay"] = 0.1
    with pytest.raises(TypeError, match="sparse"):
        optimizer.step()
    assert torch.equal(a.detach(), before) and spy.taken == 0
