"""What tests of the doors to fastreg share: flags, and that a call has one outcome, patched or not."""

import numpy as np
import torch

import fastreg as fr

FLAGS = {
    "True": True,
    "False": False,
    "1": 1,
    "0": 0,
    "None": None,
    "np.bool": np.bool_(True),
    "tensor": torch.tensor(True),
    "1-D tensor": torch.tensor([True]),
    "text": "x",
    "1.0": 1.0,
}


def _outcome(call, leaves):
    """The error of a call, or what kind of tensor it gives, and the tensor with the gradients of `leaves`."""
    try:
        result = call()
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        gradients = torch.autograd.grad(result.sum(), wanted) if wanted else ()
    except Exception as error:
        return error
    kind = type(result), result.dtype, tuple(result.shape), result.layout, result.requires_grad
    return kind, [result.detach(), *gradients]


def assert_same_patched(call, compares_values=True, leaves=()):
    want = _outcome(call, leaves)
    with fr.patched():
        got = _outcome(call, leaves)
    if isinstance(want, Exception):
        assert isinstance(got, type(want)), f"{got!r}, torch: {want!r}"
        return
    assert not isinstance(got, Exception), f"{got!r}, torch: {want!r}"
    assert got[0] == want[0]
    for mine, theirs in zip(got[1], want[1], strict=True) if compares_values else ():
        torch.testing.assert_close(mine, theirs, equal_nan=True)
