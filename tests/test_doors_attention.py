"""Patched `scaled_dot_product_attention` takes and refuses what torch's does, argument by argument.

Without dropout, or with all of it, results are equal; with it, only whether there is one, its dtype and
shape.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from doors import FLAGS, assert_same_patched

T = torch.tensor
NUMBERS = {
    "0": 0,
    "0.0": 0.0,
    "1": 1,
    "half": 0.5,
    "True": True,
    "False": False,
    "None": None,
    "text": "0.5",
    "list": [0.5],
    "np.float32": np.float32(0.5),
    "np.float64": np.float64(0.5),
    "np.float16": np.float16(0.5),
    "np.int64": np.int64(0),
    "np.bool": np.bool_(False),
    "0-dim array": np.array(0.5),
    "1-dim array": np.array([0.5]),
    "tensor": T(0.5),
    "float64 tensor": T(0.5, dtype=torch.float64),
    "bfloat16 tensor": T(0.5, dtype=torch.bfloat16),
    "integer tensor": T(0),
    "bool tensor": T(False),
    "1-D tensor": T([0.5]),
    "tensor with a gradient": T(0.5, requires_grad=True),
    "negative": -0.1,
    "above 1": 1.5,
    "NaN": float("nan"),
    "inf": float("inf"),
    "complex": 0.5 + 0j,
    "huge": 10**30,
    "a parameter": torch.nn.Parameter(T(0.5)),
}
FLAGS = FLAGS | {"np.int64": np.int64(1)}


def tensors(*shape, **options):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*(shape or (2, 2, 5, 4)), generator=generator).to(**options) for _ in range(3)]


@pytest.mark.parametrize("number", NUMBERS)
def test_dropout_p(number):
    value = NUMBERS[number]
    q, k, v = tensors()
    assert_same_patched(
        lambda: F.scaled_dot_product_attention(q, k, v, dropout_p=value), compares_values=False
    )
    assert_same_patched(lambda: F.scaled_dot_product_attention(q, k, v, None, value), compares_values=False)


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("number", NUMBERS)
def test_scale(number, p):
    value = NUMBERS[number]
    q, k, v = tensors()
    call = lambda: F.scaled_dot_product_attention(q, k, v, dropout_p=p, scale=value)  # noqa: E731
    assert_same_patched(call, compares_values=p == 0)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("name", ["is_causal", "enable_gqa"])
@pytest.mark.parametrize("flag", FLAGS)
def test_flags(flag, name, p):
    q, k, v = tensors()
    options = {name: FLAGS[flag]}
    assert_same_patched(lambda: F.scaled_dot_product_attention(q, k, v, dropout_p=p, **options), p == 0)
    if name == "is_causal":
        assert_same_patched(lambda: F.scaled_dot_product_attention(q, k, v, None, p, FLAGS[flag]), p == 0)


MASKS = {
    "bool": torch.ones(5, 5, dtype=torch.bool).tril(),
    "float": torch.zeros(5, 5),
    "broadcast": torch.zeros(2, 1, 1, 5),
    "one": torch.zeros(1),
    "0-dim": T(0.0),
    "float64": torch.zeros(5, 5, dtype=torch.float64),
    "bfloat16": torch.zeros(5, 5, dtype=torch.bfloat16),
    "integers": torch.zeros(5, 5, dtype=torch.int64),
    "uint8": torch.ones(5, 5, dtype=torch.uint8),
    "wrong shape": torch.zeros(5, 4),
    "more dimensions": torch.zeros(1, 2, 2, 5, 5),
    "array": np.zeros((5, 5), dtype=np.float32),
    "a number": 0.0,
    "list": [[0.0] * 5] * 5,
    "text": "causal",
    "sparse": torch.zeros(5, 5).to_sparse(),
    "with a gradient": torch.zeros(5, 5, requires_grad=True),
    "empty": torch.zeros(0),
}


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("mask", MASKS)
def test_attn_mask(mask, is_causal, p):
    q, k, v = tensors()
    given = MASKS[mask]
    assert_same_patched(lambda: F.scaled_dot_product_attention(q, k, v, given, p, is_causal), p == 0)


INPUTS = {
    "integers": dict(dtype=torch.int64),
    "bool": dict(dtype=torch.bool),
    "complex": dict(dtype=torch.complex64),
    "float16": dict(dtype=torch.float16),
    "float64": dict(dtype=torch.float64),
    "float8": dict(dtype=torch.float8_e4m3fn),
    "meta": dict(device="meta"),
}


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("kind", INPUTS)
def test_inputs(kind, p):
    q, k, v = tensors(**INPUTS[kind])
    assert_same_patched(
        lambda: F.scaled_dot_product_attention(q, k, v, dropout_p=p), p == 0 and kind != "meta"
    )


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize(
    "other", ["dtype", "device", "array", "None", "list", "sparse", "width", "length", "batch"]
)
def test_one_input_that_does_not_fit(other, which, p):
    given = tensors()
    given[which] = {
        "dtype": lambda x: x.double(),
        "device": lambda x: x.to("meta"),
        "array": lambda x: x.numpy(),
        "None": lambda x: None,
        "list": lambda x: x.tolist(),
        "sparse": lambda x: x.to_sparse(),
        "width": lambda x: x[..., :3],
        "length": lambda x: x[..., :3, :],
        "batch": lambda x: x.repeat(3, 1, 1, 1),
    }[other](given[which])
    assert_same_patched(lambda: F.scaled_dot_product_attention(*given, dropout_p=p), p == 0)


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(
    "shape", [(5, 4), (2, 5, 4), (1, 2, 2, 5, 4), (4,), (), (0, 2, 5, 4), (2, 2, 0, 4), (2, 2, 5, 0)]
)
def test_shapes(shape, p):
    q, k, v = tensors(*shape) if shape else [T(1.0)] * 3
    assert_same_patched(lambda: F.scaled_dot_product_attention(q, k, v, dropout_p=p), p != 0.3)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_calls(p):
    """By position, by name, too many, too few, unknown names."""
    q, k, v = tensors()
    for call in (
        lambda: F.scaled_dot_product_attention(query=q, key=k, value=v, dropout_p=p),
        lambda: F.scaled_dot_product_attention(q, k, value=v, attn_mask=None, dropout_p=p, is_causal=True),
        lambda: F.scaled_dot_product_attention(q, k, v, None, p, True, scale=0.5, enable_gqa=False),
        lambda: F.scaled_dot_product_attention(q, k, v, None, p, True, 0.5),
        lambda: F.scaled_dot_product_attention(q, k, v, dropout=p),
        lambda: F.scaled_dot_product_attention(q, k, dropout_p=p),
        lambda: F.scaled_dot_product_attention(q, k, v, q, query=q, dropout_p=p),
        lambda: F.scaled_dot_product_attention(dropout_p=p),
    ):
        assert_same_patched(call, p == 0)
