"""The family of dropout (channels, alpha, stochastic depth, the textbook form) and masks packed and
unpacked.
"""

import inspect
import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from dropout_reference import kept_reference, scale_of, values_reference
from helpers import assert_same_bits, with_seed

import fastreg as fr


def sharing(y):
    """The number of leading dimensions that are decided one by one."""
    dims = y.dim()
    while dims and (y == y.narrow(dims - 1, 0, 1)).all():
        dims -= 1
    return dims


@pytest.mark.filterwarnings("ignore:dropout", "ignore::UserWarning")
@pytest.mark.parametrize("name", ["dropout1d", "dropout2d", "dropout3d", "feature_alpha_dropout"])
def test_feature_dropout_shares_decisions_as_torch_does(name):
    ours, theirs = getattr(fr, name), getattr(F, name)
    for dims in range(7):
        x = torch.ones((9, 8, 7, 6, 5, 4)[:dims])
        try:
            want = sharing(theirs(x, 0.5, True))
        except RuntimeError:
            with pytest.raises(ValueError, match=f"{name}: input must be"):
                ours(x, 0.5, True)
            continue
        y = ours(x, 0.5, True)
        assert sharing(y) == want, dims
        assert y.unique().numel() == 2
        if dims == 4:
            torch.testing.assert_close(
                with_seed(1, ours, x.to(memory_format=torch.channels_last), 0.5, True),
                with_seed(1, ours, x, 0.5, True),
            )


def test_dropout2d_warns_about_odd_dimensions_as_torch_does():
    for f in (fr.dropout2d, F.dropout2d):
        with pytest.warns(UserWarning, match="dropout2d"):
            f(torch.ones(3, 4, 5))
    for f in (fr.dropout3d, F.dropout3d):
        with pytest.warns(UserWarning, match="dropout3d"):
            f(torch.ones(3, 4, 5))
    for f in (fr.dropout2d, fr.dropout3d):  # a warning would end the graph
        x, compiled = torch.ones(3, 4, 5), torch.compile(f, backend="eager", fullgraph=True)
        with pytest.warns(UserWarning, match=f.__name__):
            want = with_seed(1, f, x)
        assert torch.equal(with_seed(1, compiled, x), want)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (
            fr.dropout1d(torch.ones(3, 4)),
            fr.dropout2d(torch.ones(3, 4, 5, 6)),
            fr.dropout3d(torch.ones(3, 4, 5, 6)),
        )


def test_feature_dropout_saves_a_bit_per_channel_and_scales(dtype):
    x = torch.randn(6, 7, 5, 3).to(dtype)
    y = with_seed(1, fr.dropout2d, x, 0.3)
    kept = (y != 0).flatten(2).any(2)
    assert 0 < kept.sum() < 42
    assert_same_bits(y, values_reference(x, kept[..., None, None].expand(x.shape), scale_of(0.3)))


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_alpha_dropout_is_torchs_formula(dtype, p):
    alpha = 1.7580993408473766
    a = 1 / math.sqrt((alpha**2 * p + 1) * (1 - p))
    b = alpha * a * p
    x = torch.randn(3000).to(dtype)
    y = with_seed(1, fr.alpha_dropout, x, p, True)
    seed = with_seed(1, torch.randint, -(2**63), 2**63 - 1, (1,)).item()
    kept = torch.from_numpy(kept_reference(seed, 0, 3000, p))
    tolerance = dict(rtol=torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)
    torch.testing.assert_close(y.double(), torch.where(kept, x.double() * a + b, b - alpha * a), **tolerance)
    theirs = F.alpha_dropout(torch.ones(3000, dtype=torch.float64), p, True).unique()
    torch.testing.assert_close(
        fr.alpha_dropout(torch.ones(3000, dtype=torch.float64), p, True).unique(), theirs
    )


def test_alpha_dropout_keeps_mean_and_variance():
    n = 2**20
    x = torch.randn(n, dtype=torch.float64)
    for f in (fr.alpha_dropout, lambda *args: fr.feature_alpha_dropout(x[:, None], *args[1:])):
        y = f(x, 0.3, True)
        assert abs(y.mean().item()) < 5 / math.sqrt(n)
        assert abs(y.var().item() - 1) < 5 * math.sqrt(y.pow(4).mean().item() / n)
    assert torch.equal(fr.alpha_dropout(x, 1.0, True), F.alpha_dropout(x, 1.0, True))


def test_drop_path_is_timms(dtype):
    x = torch.randn(400, 3, 5).to(dtype)
    for scale_by_keep in (True, False):
        y = with_seed(1, fr.drop_path, x, 0.3, scale_by_keep=scale_by_keep)
        kept = (y != 0).flatten(1).any(1)
        assert abs(kept.sum().item() - 280) < 5 * math.sqrt(400 * 0.21)
        assert_same_bits(
            y,
            values_reference(x, kept[:, None, None].expand(x.shape), scale_of(0.3) if scale_by_keep else 1.0),
        )
    assert fr.drop_path(x, 0.3, False) is x and not fr.drop_path(x, 1.0).any()


@pytest.mark.parametrize(
    "name", ["dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"]
)
def test_arguments_are_torchs_and_the_rest_by_keyword(name):
    ours, theirs = (list(inspect.signature(getattr(m, name)).parameters.values()) for m in (fr, F))
    for mine, torchs in zip(ours, theirs, strict=False):
        assert (mine.name, mine.default, mine.kind) == (torchs.name, torchs.default, torchs.kind)
    assert len(ours) >= len(theirs)
    assert all(extra.kind == extra.KEYWORD_ONLY for extra in ours[len(theirs) :])
    x = torch.randn(2, 3, 4) if name == "dropout1d" else torch.randn(2, 3, 4, 5)
    assert (getattr(fr, name)(x) is x) == (
        getattr(F, name)(x) is x or torch.equal(getattr(F, name)(x), x)
    )  # training by default?


def test_the_textbook_form():
    x = torch.randn(1000, requires_grad=True)
    y = with_seed(1, fr.dropout, x, 0.3, rescale="inference")
    kept = y != 0
    assert torch.equal(y[kept], x[kept]) and 600 < kept.sum() < 800
    y.sum().backward()
    assert torch.equal(x.grad, kept.float())
    assert torch.equal(fr.dropout(x, 0.3, False, rescale="inference"), x * 0.7)
    mine = x.detach().clone()
    assert fr.dropout(mine, 0.3, False, True, rescale="inference") is mine and torch.equal(
        mine, x.detach() * 0.7
    )
    assert not fr.dropout(x, 1.0, False, rescale="inference").any()


# Around one byte of the mask, no element, and several dimensions.
@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (8,), (9,), (3, 5, 7), (2, 0, 3)])
def test_pack_and_unpack_are_inverse(shape):
    mask = torch.rand(shape) < 0.5
    packed = fr.pack_mask(mask)
    assert np.array_equal(packed.numpy(), np.packbits(mask.numpy().reshape(-1), bitorder="little"))
    assert packed.dtype == torch.uint8 and packed.shape == ((mask.numel() + 7) // 8,)
    assert (
        torch.equal(fr.unpack_mask(packed, shape), mask) and fr.unpack_mask(packed, shape).dtype == torch.bool
    )
    assert torch.equal(
        fr.pack_mask(mask[None].transpose(0, -1) if shape else mask),
        packed if len(shape) < 2 else fr.pack_mask(mask[None].transpose(0, -1).contiguous()),
    )


def test_pack_and_unpack_errors():
    with pytest.raises(TypeError, match="pack_mask: mask must be a bool tensor, got torch"):
        fr.pack_mask(torch.zeros(3, dtype=torch.uint8))
    with pytest.raises(TypeError, match=r"pack_mask: mask must be a torch\.Tensor, got list"):
        fr.pack_mask([True])
    with pytest.raises(TypeError, match="unpack_mask: mask must be a uint8 tensor, got torch"):
        fr.unpack_mask(torch.zeros(3, dtype=torch.bool), (3,))
    for size in (0, 1, 3):
        with pytest.raises(
            ValueError, match=rf"unpack_mask: mask must have shape \(2,\) for \(3, 4\), got \({size},\)"
        ):
            fr.unpack_mask(torch.zeros(size, dtype=torch.uint8), (3, 4))
    with pytest.raises(ValueError, match="unpack_mask: mask must have shape"):
        fr.unpack_mask(torch.zeros(1, 2, dtype=torch.uint8), (3, 4))
