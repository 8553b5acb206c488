"""Patched `torch.nn.functional.linear_cross_entropy`, and the module by way of it, take and refuse what
torch's do, argument by argument, and give the same losses and gradients.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from doors import assert_same_patched
from torch import nn

T = torch.tensor
pytestmark = pytest.mark.skipif(
    not hasattr(F, "linear_cross_entropy"), reason="this torch has no linear_cross_entropy"
)
NUMBERS = {
    "0": 0,
    "0.0": 0.0,
    "0.1": 0.1,
    "1": 1,
    "True": True,
    "None": None,
    "text": "0.1",
    "list": [0.1],
    "np.float32": np.float32(0.1),
    "np.float64": np.float64(0.1),
    "np.int64": np.int64(1),
    "0-dim array": np.array(0.1),
    "tensor": T(0.1),
    "1-D tensor": T([0.1]),
    "integer tensor": T(1),
    "tensor with a gradient": T(0.1, requires_grad=True),
    "negative": -0.1,
    "above 1": 1.5,
    "NaN": float("nan"),
    "complex": 0.1 + 0j,
    "-100": -100,
    "a class": 2,
    "huge": 10**30,
}
REDUCTIONS = ["mean", "sum", "none", "elementwise_mean", "MEAN", "", None, 1, b"mean", ["mean"]]


def arguments():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(shape, generator=generator).requires_grad_() for shape in ((6, 4), (5, 4)))
    return hidden, weight, T([0, 1, 2, 3, 4, 2])


@pytest.mark.parametrize("name", ["label_smoothing", "ignore_index"])
@pytest.mark.parametrize("number", NUMBERS)
def test_numbers(number, name):
    h, w, t = arguments()
    assert_same_patched(lambda: F.linear_cross_entropy(h, w, t, **{name: NUMBERS[number]}), leaves=(h, w))


@pytest.mark.parametrize("reduction", REDUCTIONS, ids=repr)
def test_reduction(reduction):
    h, w, t = arguments()
    assert_same_patched(lambda: F.linear_cross_entropy(h, w, t, reduction=reduction), leaves=(h, w))


OTHERS = {
    "array": lambda x: x.detach().numpy(),
    "None": lambda x: None,
    "list": lambda x: x.tolist(),
    "float64": lambda x: x.detach().double(),
    "bfloat16": lambda x: x.detach().bfloat16(),
    "integers": lambda x: x.detach().long(),
    "int32": lambda x: x.detach().int(),
    "uint8": lambda x: x.detach().abs().to(torch.uint8),
    "complex": lambda x: x.detach().to(torch.complex64),
    "sparse": lambda x: x.detach().to_sparse(),
    "a row less": lambda x: x[:-1],
    "one more dimension": lambda x: x.unsqueeze(0),
    "one dimension less": lambda x: x[0],
    "no row": lambda x: x[:0],
    "strided": lambda x: x.detach().repeat_interleave(2, 0)[::2],
    "turned": lambda x: x.detach().flip(0),
    "a parameter": lambda x: nn.Parameter(x.detach()) if x.is_floating_point() else x,
}


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("other", OTHERS)
def test_tensors(other, which):
    given = list(arguments())
    given[which] = OTHERS[other](given[which])
    assert_same_patched(lambda: F.linear_cross_entropy(*given))


@pytest.mark.parametrize("name", ["linear_bias", "weight"])
@pytest.mark.parametrize("other", OTHERS)
def test_bias_and_class_weights(other, name):
    h, w, t = arguments()
    more = OTHERS[other](torch.tensor([0.5, 1.0, 1.5, 2.0, 0.25]))
    assert_same_patched(lambda: F.linear_cross_entropy(h, w, t, **{name: more}), leaves=(h, w))


TARGETS = {
    "out of range": T([0, 1, 2, 3, 4, 5]),
    "negative": T([0, 1, 2, 3, 4, -1]),
    "ignored": T([0, 1, 2, 3, 4, -100]),
    "all ignored": T([-100] * 6),
    "probabilities": torch.full((6, 5), 0.2),
    "probabilities of integers": torch.ones(6, 5, dtype=torch.int64),
    "bool": T([True] * 6),
}


@pytest.mark.parametrize("eps", [0.0, 0.1])
@pytest.mark.parametrize("target", TARGETS)
def test_targets(target, eps):
    h, w, _ = arguments()
    t = TARGETS[target]
    assert_same_patched(lambda: F.linear_cross_entropy(h, w, t, label_smoothing=eps), leaves=(h, w))


def test_calls():
    h, w, t = arguments()
    for call in (
        lambda: F.linear_cross_entropy(input=h, linear_weight=w, target=t),
        lambda: F.linear_cross_entropy(h, w, target=t),
        lambda: F.linear_cross_entropy(h, w, t, None),
        lambda: F.linear_cross_entropy(h, w),
        lambda: F.linear_cross_entropy(h, w, t, bias=None),
        lambda: F.linear_cross_entropy(h, w, t, input=h),
        lambda: F.linear_cross_entropy(h, w, t, options="x"),
    ):
        assert_same_patched(call)


MODULES = {
    "": {},
    "bias": dict(bias=True),
    "bias=1": dict(bias=1),
    "bias=None": dict(bias=None),
    "float64": dict(dtype=torch.float64),
    "sum": dict(reduction="sum"),
    "no such reduction": dict(reduction="all"),
    "smoothing": dict(label_smoothing=0.1),
    "smoothing as text": dict(label_smoothing="x"),
    "ignored": dict(ignore_index=2),
    "ignored as a float": dict(ignore_index=2.0),
    "class weights": dict(weight=torch.ones(5)),
    "too few class weights": dict(weight=torch.ones(4)),
    "class weights in a list": dict(weight=[1.0] * 5),
    "unknown": dict(smoothing=0.1),
    "out_features": dict(out_features=(2,)),
}


@pytest.mark.parametrize("options", MODULES)
def test_module(options):
    def call(first=4, classes=5):
        torch.manual_seed(0)
        module = nn.LinearCrossEntropyLoss(first, classes, **MODULES[options])
        h, _, t = arguments()
        dtype = next(module.parameters()).dtype
        return module(h.detach().to(dtype), t)

    for sizes in ((4, 5), (4.0, 5), (4, 5.0), ("4", 5), (4, True), (-1, 5), (np.int64(4), 5), (T(4), 5)):
        assert_same_patched(lambda sizes=sizes: call(*sizes))
