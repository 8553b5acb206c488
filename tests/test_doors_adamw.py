"""`fr.optim.AdamW` takes what torch's takes for numbers and flags, at construction, in a group and written
into it later, and refuses the rest with torch's type.
"""

import numpy as np
import pytest
import torch

import fastreg as fr

T = torch.tensor
NUMBERS = {
    "0": 0,
    "1": 1,
    "True": True,
    "np.float64": np.float64(0.25),
    "np.float32": np.float32(0.25),
    "np.int64": np.int64(1),
    "0-dim array": np.array(0.25),
    "tensor": T(0.25),
    "float64 tensor": T(0.25, dtype=torch.float64),
    "int tensor": T(1),
    "one element": T([0.25]),
    "learned": T(0.25, requires_grad=True),
    "string": "0.25",
    "None": None,
    "list": [0.25],
}
FLAGS = {"1": 1, "0": 0, "None": None, "np.bool_": np.bool_(True), "tensor": T(True), "string": "yes"}
BETAS = {
    "list": [0.5, 0.75],
    "tensors": (T(0.5), T(0.75)),
    "tensors of one element": (T([0.5]), T([0.75])),
    "one tensor": T([0.5, 0.75]),
    "one array": np.array([0.5, 0.75]),
    "no pair": 0.5,
    "None": None,
    "1": (1.0, 0.5),
    "below 0": (0.5, -0.5),
    "NaN": (float("nan"), 0.5),
}


def trained(AdamW, options, group=None, later=None):
    """The parameter after three steps, or the error of the constructor or of the first step that has one;
    `later` is written into the group before the second.
    """
    p = torch.nn.Parameter(T([[2.0, -1.0], [0.5, 3.0]]))
    try:
        optimizer = AdamW([{"params": [p], **(group or {})}], **options)
        for i in range(3):
            if i == 1:
                optimizer.param_groups[0].update(later or {})
            p.grad = p.detach() * (i + 1) - 1
            optimizer.step()
    except Exception as error:
        return error
    return p.detach()


def assert_same(options, **more):
    want, got = (trained(AdamW, options, **more) for AdamW in (torch.optim.AdamW, fr.optim.AdamW))
    if isinstance(want, Exception):
        assert isinstance(got, type(want)), (want, got)
    else:
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


# Where torch's step, which is not fused, stumbles over what its constructor takes, ours computes.
STUMBLES = {("lr", "one element"), ("eps", "0-dim array")}


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("name", ["lr", "eps", "weight_decay"])
def test_numbers(name, number):
    value = NUMBERS[number]
    if (name, number) in STUMBLES:
        assert isinstance(trained(fr.optim.AdamW, {name: value}), torch.Tensor)
        return
    assert_same({name: value})
    assert_same({}, group={name: value})
    if not isinstance(value, (str, list, type(None))):
        assert_same({}, later={name: value})


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("name", ["amsgrad", "maximize"])
def test_flags(name, flag):
    assert_same({name: FLAGS[flag]})
    assert_same({}, group={name: FLAGS[flag]})


@pytest.mark.parametrize("betas", BETAS)
def test_betas(betas):
    assert_same({"betas": BETAS[betas]})
    if not isinstance(trained(torch.optim.AdamW, {"betas": BETAS[betas]}), Exception):
        assert_same({}, group={"betas": BETAS[betas]})
