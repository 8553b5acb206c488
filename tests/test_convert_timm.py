"""fr.convert of timm's losses: their values and gradients, on fastreg's operator where it means the same."""

import copy
import pickle

import pytest
import torch
from torch import nn

import fastreg as fr

losses = pytest.importorskip("timm.loss", reason="needs timm", exc_type=ImportError)
OP = "fastreg::cross_entropy"
X, Y, Q = torch.randn(5, 7), torch.tensor([0, 6, 2, 2, 1]), torch.rand(5, 7).softmax(1)


def pairs():
    """(timm's loss, the same converted, targets)"""
    made = [(losses.LabelSmoothingCrossEntropy(s), Y) for s in (0.1, 0.0, 0.6)]
    made.append((losses.SoftTargetCrossEntropy(), Q))
    return [(theirs, fr.convert(copy.deepcopy(theirs)), target) for theirs, target in made]


@pytest.mark.parametrize("case", range(4))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_value_and_gradient(case, dtype):
    theirs, ours, target = pairs()[case]
    target = target.to(dtype) if target.is_floating_point() else target
    x = X.to(dtype, copy=True).requires_grad_()
    exact = x.detach().double().clone().requires_grad_()
    loss, want = ours(x, target), theirs(exact, target.double() if target.is_floating_point() else target)
    loss.backward(), want.backward()
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(loss.double(), want, rtol=2 * eps, atol=2 * eps)
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=4 * eps, atol=4 * eps)
    assert loss.dtype == theirs(X.to(dtype), target).dtype


@pytest.mark.parametrize("case", range(4))
def test_it_runs_on_the_operator(case):
    _, ours, target = pairs()[case]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        ours(X, target)
    assert any(event.key.startswith(OP) for event in profile.key_averages())


def test_a_target_that_another_loss_would_ignore_is_an_error_as_before():
    theirs, ours, _ = pairs()[0]
    for wrong in (-100, 7):
        for loss in (theirs, ours):
            with pytest.raises(RuntimeError, match="out of bounds"):
                loss(X, torch.tensor([0, wrong, 2, 2, 1]))


def test_what_the_operator_means_otherwise_is_computed_as_before():
    theirs, ours, _ = pairs()[0]
    soft, our_soft, _ = pairs()[3]
    for each in (theirs, ours):
        each.confidence = 0.5  # no longer 1 - smoothing
    torch.testing.assert_close(ours(X, Y), theirs(X, Y))
    for each in (theirs, ours):
        each.smoothing, each.confidence = -0.2, 1.2  # sharper
    torch.testing.assert_close(ours(X, Y), theirs(X, Y))
    x, q = torch.randn(2, 3, 7), torch.rand(2, 3, 7)  # of sequences
    torch.testing.assert_close(our_soft(x, q), soft(x, q))
    torch.testing.assert_close(our_soft(X, Q[:1]), soft(X, Q[:1]))  # broadcast
    torch.testing.assert_close(our_soft(X, Y[:, None]), soft(X, Y[:, None]))
    gradients = []
    for loss in (soft, our_soft):
        leaf = Q.clone().requires_grad_()  # a teacher that learns
        loss(X, leaf).backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)
    assert our_soft(X[:0], Q[:0]).isnan() and soft(X[:0], Q[:0]).isnan()


def test_autocast_and_attributes_changed_later():
    theirs, ours, _ = pairs()[0]
    with torch.autocast("cpu", torch.bfloat16):
        z = nn.Linear(7, 7)(X)
        torch.testing.assert_close(ours(z, Y), theirs(z, Y))  # the dtype too
    for each in (theirs, ours):
        each.smoothing, each.confidence = 0.3, 0.7
    torch.testing.assert_close(ours(X, Y), theirs(X, Y))


def test_other_doors():
    for theirs, ours, target in pairs()[::3]:
        twin = pickle.loads(pickle.dumps(ours))
        assert type(twin) is type(ours) and type(ours).__name__ == type(theirs).__name__
        assert repr(ours) == repr(theirs) and vars(ours).keys() == vars(theirs).keys()
        want = theirs(X, target)
        torch.testing.assert_close(torch.compile(ours, backend="eager", fullgraph=True)(X, target), want)
        torch.testing.assert_close(torch.jit.trace(ours, (X, target))(X, target), want)
        if hasattr(torch.jit, "script"):
            torch.testing.assert_close(torch.jit.script(ours)(X, target), want)
        traced = torch.fx.symbolic_trace(ours)
        torch.testing.assert_close(traced(X, target), want)
        program = torch.export.export(ours, (X, target))
        assert "fastreg" not in str(program.graph)
        gradient = torch.func.grad(ours)(X, target)
        torch.testing.assert_close(gradient, torch.func.grad(theirs)(X, target))
    torch._dynamo.reset()
