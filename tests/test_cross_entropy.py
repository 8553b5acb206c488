"""Cross-entropy against its written formula in float64, and against torch wherever torch has the feature.

Proven: values and gradients for every dtype, shape, layout and option, also where torch gives NaN or rounds
badly; derivatives of first to third order; that nothing is overwritten; the same bits for any thread count
and instruction set; each door (compile, checkpoint, autocast, hooks); that wrong arguments are errors.
"""

import hashlib
import itertools
import os
import random
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

import fastreg as fr

INF = float("inf")
UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
TINY = {torch.float64: 1e-300, torch.float32: 1e-37, torch.float16: 2.0**-25, torch.bfloat16: 1e-37}
SHAPES = [
    (5,),
    (1,),
    (3, 1),
    (7, 2),
    (6, 10),
    (4, 17),
    (3, 5, 4),
    (2, 10, 33),
    (2, 3, 4, 5),
    (2, 3, 2, 3, 2),
    (3, 1000),
]


def reference(
    x,
    target,
    weight=None,
    ignore_index=-100,
    label_smoothing=0.0,
    smoothing="uniform",
    z_loss=0.0,
    reduction="mean",
):
    """The formula, in float64. Rows are (N, C, ...) or (C,)."""
    dim, k, x, soft = (
        min(1, x.dim() - 1),
        x.shape[min(1, x.dim() - 1)],
        x.double(),
        target.is_floating_point(),
    )
    spread, w = (
        (label_smoothing / k, 1.0) if smoothing == "uniform" else (label_smoothing / max(k - 1, 1), 1.0)
    )
    kept = torch.ones_like(x.select(dim, 0)) if soft else (target != ignore_index).double()
    t = target.double() if soft else F.one_hot(target.long().where(kept > 0, 0), k).movedim(-1, dim).double()
    if weight is not None:
        w = weight.double().view(k, *(1,) * (x.dim() - dim - 1))
    q, lse = (
        w * ((1 - label_smoothing - (spread if smoothing == "others" else 0)) * t + spread),
        x.logsumexp(dim),
    )
    loss = kept * (torch.where(q == 0, 0, q * (lse.unsqueeze(dim) - x)).sum(dim) + z_loss * lse**2)
    divisor = (
        kept.sum()
        if soft or weight is None
        else (kept * weight.double()[target.long().where(kept > 0, 0)]).sum()
    )
    return loss if reduction == "none" else loss.sum() if reduction == "sum" else loss.sum() / divisor


def assert_rounded(got, want, what="", noise=1e-6):
    """`got` is `want` (float64) rounded once to its dtype, up to the noise of float32 statistics."""
    noise = 1e-14 if got.dtype == torch.float64 else noise
    room = (want.to(got.dtype).double() - want).abs().nan_to_num(0) + noise * want.abs().clamp(min=1)
    same = (got.double() == want) | ((got.double() - want).abs() <= room) | (got.isnan() & want.isnan())
    assert same.all(), f"{what}: {got[~same].flatten()[:4]} for {want[~same].flatten()[:4]}"


def assert_gradient(got, want, scale=1.0, what=""):
    """Each element within one rounding of its dtype, plus float32's (float64's) noise on a difference p - q
    of size `scale`.
    """
    noise = 2e-15 if got.dtype == torch.float64 else 6e-7
    room = want.abs() * UNIT[got.dtype] * 1.01 + TINY[got.dtype] + noise * scale
    worst = ((got.double() - want).abs() - room).max() if got.numel() else torch.tensor(0.0)
    assert worst <= 0, f"{what}: off by {worst}"


def case(shape, dtype, soft=False, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = (torch.randn(shape, generator=g, dtype=torch.float64) * 3).to(dtype)
    dim = min(1, len(shape) - 1)
    if soft:
        return x, torch.rand(shape, generator=g, dtype=torch.float64).softmax(dim).to(dtype)
    return x, torch.randint(shape[dim], shape[:dim] + shape[dim + 1 :], generator=g)


def loss_and_gradient(f, x, target, g=None, **options):
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    loss = f(x, target, **options)
    g = torch.ones_like(loss) if g is None else g.to(loss.dtype)
    (grad,) = torch.autograd.grad(loss, x, g)
    assert not grad.requires_grad
    return loss.detach(), grad


def option_sets(k, soft):
    weight = torch.rand(k, dtype=torch.float64) + 0.5
    weight[::3] = 0 if k > 1 else 1.5
    ignore = (-100, -1) if soft else (-100, 0, k - 1, -1)
    for reduction, eps, smoothing, w, i in itertools.product(
        ("none", "mean", "sum"), (0.0, 0.1, 1.0), ("uniform", "others"), (None, weight), ignore
    ):
        if smoothing == "uniform" or (k > 1 and eps > 0):
            yield dict(
                reduction=reduction, label_smoothing=eps, smoothing=smoothing, weight=w, ignore_index=i
            )


def check_case(x, target, options):
    want_loss, want_grad = loss_and_gradient(reference, x.double(), target, **options)
    got_loss, got_grad = loss_and_gradient(fr.cross_entropy, x, target, **options)
    assert got_loss.dtype == got_grad.dtype == x.dtype and got_loss.shape == want_loss.shape
    assert got_grad.shape == x.shape
    assert_rounded(got_loss, want_loss, options)
    if want_loss.isfinite().all():
        assert_gradient(
            got_grad, want_grad, max(1.0, want_grad.abs().max().item() if x.numel() else 1.0), options
        )


# ---------------------------------------------------------------- values and first gradients


@pytest.mark.parametrize("soft", (False, True), ids=("indices", "probabilities"))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_formula(shape, dtype, soft):
    x, target = case(shape, dtype, soft)
    k = shape[min(1, len(shape) - 1)]
    options = list(option_sets(k, soft))
    if len(shape) > 2 or k > 17:
        options = random.Random(str(shape)).sample(options, 24)
    if k == 17:
        x = x * 5  # rows with one dominant class take a way of their own
    for chosen in options:
        check_case(x, target, chosen)


def test_matches_the_formula_at_a_vocabulary(dtype):
    x, target = case((3, 32000), dtype)
    for options in (
        dict(),
        dict(label_smoothing=0.1),
        dict(label_smoothing=0.1, smoothing="others", weight=torch.rand(32000)),
    ):
        check_case(x, target, options)
    check_case(*case((2, 32000), dtype, soft=True), dict(reduction="sum"))


@pytest.mark.parametrize("real", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("shape", [(5,), (6, 10), (2, 10, 3), (2, 3, 4, 5)], ids=str)
@pytest.mark.parametrize("soft", (False, True), ids=("indices", "probabilities"))
def test_agrees_with_torch_wherever_torch_has_it(shape, real, soft):
    x, target = case(shape, real, soft)
    for options in option_sets(shape[min(1, len(shape) - 1)], soft):
        if options.pop("smoothing") == "others":
            continue
        options["weight"] = None if options["weight"] is None else options["weight"].to(real)
        want_loss, want_grad = loss_and_gradient(F.cross_entropy, x, target, **options)
        got_loss, got_grad = loss_and_gradient(fr.cross_entropy, x, target, **options)
        torch.testing.assert_close(got_loss, want_loss, rtol=3e-6, atol=2e-6, equal_nan=True)
        torch.testing.assert_close(got_grad, want_grad, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("legacy", itertools.product((None, True, False), (None, True, False)), ids=str)
def test_deprecated_arguments_mean_what_they_mean_in_torch(legacy):
    x, target = case((6, 10), torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = F.cross_entropy(x, target, None, legacy[0], -100, legacy[1])
        got = fr.cross_entropy(x, target, None, legacy[0], -100, legacy[1])
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("kind", (torch.int64, torch.int32, torch.int16, torch.uint8), ids=str)
def test_integer_targets_of_any_type_and_stride(kind):
    x, target = case((2, 10, 6), torch.float64)
    want = reference(x, target, reduction="none")
    padded = torch.full((2, 12), 77).to(kind)
    padded[:, ::2] = target.to(kind)
    assert_rounded(fr.cross_entropy(x, padded[:, ::2], reduction="none"), want)
    assert_rounded(fr.cross_entropy(x, target.to(kind).t().contiguous().t(), reduction="none"), want)


def layouts(x):
    """The same values in other places of memory."""
    yield "contiguous", x.contiguous()
    for d in range(x.dim() - 1):
        yield f"dimensions {d} and {d + 1} swapped", x.transpose(d, d + 1).contiguous().transpose(d, d + 1)
    yield "reversed", x.permute(*range(x.dim())[::-1]).contiguous().permute(*range(x.dim())[::-1])
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), 99.0).to(x.dtype)
    wide[..., ::2] = x
    yield "every second", wide[..., ::2]
    tall = torch.full((x.shape[0], x.shape[1] + 3, *x.shape[2:]), 99.0).to(x.dtype)
    tall[:, 2:-1] = x
    yield "a slice of the classes", tall[:, 2:-1]
    if x.dim() == 4:
        yield "channels_last", x.contiguous(memory_format=torch.channels_last)
    shifted = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape)
    yield "an odd address", shifted.copy_(x)


@pytest.mark.parametrize("shape", [(6, 37), (3, 10, 35), (2, 5, 3, 7), (2, 3, 2, 3, 4)], ids=str)
@pytest.mark.parametrize("soft", (False, True), ids=("indices", "probabilities"))
def test_any_strides(shape, soft, dtype):
    """Rows side by side are summed class by class, others lane by lane: the last bits may differ, the
    reference decides.
    """
    x, target = case(shape, dtype, soft)
    options = dict(label_smoothing=0.1, weight=torch.rand(shape[1]), reduction="none")
    want_loss, want_grad = loss_and_gradient(reference, x.double(), target, **options)
    for name, same in layouts(x):
        for _, other in layouts(target) if soft else [("", target)]:
            before = same.clone()
            loss, grad = loss_and_gradient(fr.cross_entropy, same, other, **options)
            assert_rounded(loss, want_loss, name)
            assert_gradient(grad, want_grad, 1.5, name)
            assert torch.equal(same, before)


@pytest.mark.parametrize("classes", [2, 3, 63, 65, 700])
@pytest.mark.parametrize("positions", [1, 2, 7, 15, 16, 17, 33, 100])
@pytest.mark.parametrize("soft", (False, True), ids=("indices", "probabilities"))
def test_rows_side_by_side(classes, positions, soft, dtype):
    x, target = case((3, classes, positions), dtype, soft)
    for options in (
        dict(),
        dict(label_smoothing=0.1, weight=torch.rand(classes) + 0.1, z_loss=0.1),
        dict(label_smoothing=0.3, smoothing="others"),
    ):
        if not soft:
            target[1, ..., : positions // 2] = options["ignore_index"] = -1
        for reduction in ("none", "sum"):
            want, want_grad = loss_and_gradient(reference, x.double(), target, reduction=reduction, **options)
            got, grad = loss_and_gradient(fr.cross_entropy, x, target, reduction=reduction, **options)
            assert_rounded(got, want, noise=2e-6)
            assert_gradient(grad, want_grad, 4.0)


def test_many_classes_side_by_side(dtype):
    """Beyond what is taken a lane for each row."""
    x, target = case((1, 4100, 17), dtype)
    want, want_grad = loss_and_gradient(reference, x.double(), target, reduction="none")
    got, grad = loss_and_gradient(fr.cross_entropy, x, target, reduction="none")
    assert_rounded(got, want)
    assert_gradient(grad, want_grad)


def test_hostile_rows_side_by_side_keep_to_themselves(dtype):
    x, target = case((1, 5, 40), dtype)
    x[0, :, 3] = -INF
    x[0, 1, 7], x[0, 2, 11], x[0, 3, 15] = float("nan"), INF, -INF
    x[0, :, 19] = torch.tensor([0.0, 60, 0, -60, 0]).to(dtype)  # one class has all the mass
    target[0, 19], target[0, 15] = 1, 3
    for options in (dict(), dict(label_smoothing=1.0, smoothing="others")):
        want, want_grad = loss_and_gradient(reference, x.double(), target, reduction="none", **options)
        got, grad = loss_and_gradient(fr.cross_entropy, x, target, reduction="none", **options)
        fine = [i for i in range(40) if i not in (3, 7, 11, 15)]
        assert_rounded(got[:, fine], want[:, fine])
        assert_gradient(grad[..., fine], want_grad[..., fine])
        assert got[0, [3, 7, 11]].isnan().all() and grad[0, :, [3, 7, 11]].isnan().any(0).all()
        if options:
            assert got[0, 15].isfinite()  # the class of -inf has no mass
        else:
            assert got[0, 15] == INF


def test_expanded_logits(dtype):
    row, target = case((1, 10), dtype)[0], torch.arange(10)
    x = row.expand(10, 10)
    loss, grad = loss_and_gradient(fr.cross_entropy, x, target, reduction="none")
    assert_rounded(loss, reference(x, target, reduction="none"))
    assert_gradient(grad, loss_and_gradient(reference, x.double(), target, reduction="none")[1])
    column = case((10, 1), dtype)[0].expand(10, 4)
    assert_rounded(
        fr.cross_entropy(column, target % 4, reduction="none"), torch.full((10,), 4.0).double().log()
    )


def test_the_gradient_keeps_the_memory_format():
    x = torch.randn(2, 5, 3, 4).contiguous(memory_format=torch.channels_last).requires_grad_()
    fr.cross_entropy(x, torch.randint(5, (2, 3, 4))).backward()
    assert x.grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", [(0, 5), (2, 5, 0), (0, 5, 3), (2, 5, 0, 3)], ids=str)
@pytest.mark.parametrize("soft", (False, True), ids=("indices", "probabilities"))
def test_empty(shape, soft, dtype):
    x, target = case(shape, dtype, soft)
    for reduction in ("none", "sum", "mean"):
        loss, grad = loss_and_gradient(fr.cross_entropy, x, target, reduction=reduction)
        assert grad.shape == shape
        if reduction == "none":
            assert loss.shape == shape[:1] + shape[2:]
        else:
            assert loss.isnan() if reduction == "mean" else loss == 0
    assert fr.cross_entropy(x, target, all_ignored="zero") == 0


@pytest.mark.slow
def test_more_than_2_to_the_31_logits():
    n, k = 70_000, 32_768
    x = torch.zeros(n, k, dtype=torch.bfloat16)  # pages that are never written cost no memory
    x[-3:] = torch.randn(3, k) * 4
    target = torch.randint(k, (n,))
    loss = fr.cross_entropy(x, target, reduction="none", loss_dtype=torch.float32)
    assert_rounded(loss[-3:], reference(x[-3:], target[-3:], reduction="none"))
    assert_rounded(loss[:-3], torch.tensor(float(k)).double().log().expand(n - 3))


# ---------------------------------------------------------------- options


@pytest.mark.parametrize("soft", (False, True), ids=("indices", "probabilities"))
def test_z_loss(soft, dtype):
    x, target = case((6, 10), dtype, soft)
    for reduction, weight, eps in itertools.product(
        ("none", "mean", "sum"), (None, torch.rand(10)), (0.0, 0.1)
    ):
        ignore = {} if soft else {"ignore_index": target[0].item()}
        check_case(
            x, target, dict(z_loss=0.03, reduction=reduction, weight=weight, label_smoothing=eps, **ignore)
        )


def test_smoothing_others_is_the_textbook_target():
    x, target = case((6, 10), torch.float64)
    q = torch.full((6, 10), 0.1 / 9, dtype=torch.float64)
    q[torch.arange(6), target] = 0.9
    want = -(q * x.log_softmax(1)).sum(1)
    assert_rounded(
        fr.cross_entropy(x, target, label_smoothing=0.1, smoothing="others", reduction="none"), want
    )
    assert not torch.allclose(
        fr.cross_entropy(x, target, label_smoothing=0.1, reduction="none"), want, rtol=1e-4
    )


def test_all_ignored(dtype):
    x, target = torch.randn(4, 5).to(dtype), torch.full((4,), -100)
    loss, grad = loss_and_gradient(fr.cross_entropy, x, target)
    assert loss.isnan() and torch.equal(grad, torch.zeros_like(x))
    loss, grad = loss_and_gradient(fr.cross_entropy, x, target, all_ignored="zero")
    assert loss == 0 and torch.equal(grad, torch.zeros_like(x))
    assert fr.cross_entropy(x, target, reduction="sum") == 0
    target[1] = 2  # with one row counted both mean the same
    assert fr.cross_entropy(x, target, all_ignored="zero") == fr.cross_entropy(x, target)


def test_rows_without_weight_are_no_rows():
    x, target, weight = torch.randn(4, 5), torch.full((4,), 3), torch.tensor([1.0, 1, 1, 0, 1])
    assert fr.cross_entropy(x, target, weight).isnan() and F.cross_entropy(x, target, weight).isnan()
    loss, grad = loss_and_gradient(fr.cross_entropy, x, target, weight=weight, all_ignored="zero")
    assert loss == 0 and torch.equal(grad, torch.zeros(4, 5))


def test_all_ignored_zero_has_zero_second_derivatives():
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(
        fr.cross_entropy(x, torch.full((4,), -100), all_ignored="zero"), x, create_graph=True
    )
    assert torch.equal(torch.autograd.grad(grad.sum(), x)[0], torch.zeros(4, 5, dtype=torch.float64))


@pytest.mark.parametrize("narrow", (torch.bfloat16, torch.float16), ids=str)
def test_loss_dtype_gives_the_loss_unrounded(narrow):
    x, target = case((64, 100), narrow)
    want = reference(x, target, reduction="none")
    for wide in (torch.float32, torch.float64):
        loss = fr.cross_entropy(x, target, reduction="none", loss_dtype=wide)
        assert loss.dtype == wide
        torch.testing.assert_close(loss.double(), want, rtol=2e-6, atol=0)
    loss, grad = loss_and_gradient(fr.cross_entropy, x, target, loss_dtype=torch.float32)
    assert loss.dtype == torch.float32 and grad.dtype == narrow
    assert fr.cross_entropy(x.double(), target, loss_dtype=torch.float32).dtype == torch.float32


def test_the_bfloat16_loss_is_rounded_once_where_torch_rounds_on_the_way():
    x, target = case((256, 1000), torch.bfloat16)
    want = reference(x, target, reduction="none")
    best = (want.bfloat16().double() - want).abs()
    ours = (fr.cross_entropy(x, target, reduction="none").double() - want).abs()
    torchs = (F.cross_entropy(x, target, reduction="none").double() - want).abs()
    assert (ours <= best + 1e-6 * want).all()
    assert (torchs > best + 1e-3).any()  # if torch mends it, this test may go
    # One row, two eights among 998 zeros: exactly 0.8479, nearest bfloat16 0.84765625; torch says 0.84375.
    x = torch.zeros(1, 1000, dtype=torch.bfloat16)
    x[0, :2] = 8
    target = torch.tensor([1])
    assert reference(x, target).item() == pytest.approx(0.8479, abs=5e-5)
    assert fr.cross_entropy(x, target).item() == 0.84765625 != F.cross_entropy(x, target).item()


@pytest.mark.parametrize("real", (torch.float32, torch.bfloat16, torch.float64), ids=str)
def test_small_losses_keep_their_digits(real):
    # A confident row: torch computes log(1 + 1e-9) = 0 in float32; the loss and both gradients are there.
    for gap in (3.0, 8.0, 20.0, 60.0):
        x = torch.tensor([[gap, 0.0, -1.0], [-1.0, 0.0, gap]]).to(real)
        target = torch.tensor([0, 2])
        loss, grad = loss_and_gradient(fr.cross_entropy, x, target, reduction="none")
        want = torch.tensor(-gap).double().exp() * (1 + torch.tensor(-1.0).double().exp())
        torch.testing.assert_close(
            loss.double(), want.log1p().expand(2), rtol=max(1.1 * UNIT[real], 1e-6), atol=0
        )
        p_rest = want / (1 + want)
        if gap < 30:  # beyond, 1 - p is below float64's resolution of 1
            torch.testing.assert_close(grad[0, 0].double(), -p_rest, rtol=max(2.1 * UNIT[real], 1e-6), atol=0)
    if real == torch.float32:
        assert F.cross_entropy(torch.tensor([20.0, 0.0]), torch.tensor(0)) == 0
        assert fr.cross_entropy(torch.tensor([20.0, 0.0]), torch.tensor(0)) > 0


# ---------------------------------------------------------------- infinities, NaN, extremes


def test_a_class_that_cannot_be_and_needs_not_be(dtype):
    """-inf logits of classes without target mass: finite loss, zero gradient there."""
    x = torch.tensor([[1.0, -INF, 0.5, -1.0], [0.0, 2.0, -INF, -INF]]).to(dtype)
    kept = [[0, 2, 3], [0, 1]]
    weight = torch.tensor([1.0, 0.5, 2.0, 1.5])
    target = torch.tensor([2, 0])
    soft = torch.tensor([[0.25, 0, 0.5, 0.25], [0.5, 0.5, 0, 0]])
    for t, w in ((target, None), (target, weight), (soft.to(dtype), None), (soft.to(dtype), weight)):
        loss, grad = loss_and_gradient(fr.cross_entropy, x, t, weight=w, reduction="none")
        for r, columns in enumerate(kept):
            one = t[r, columns] if t.is_floating_point() else torch.tensor(columns.index(t[r]))
            small_w = None if w is None else w[columns]
            row, want_grad = loss_and_gradient(
                reference, x[r, columns].double(), one, weight=small_w, reduction="sum"
            )
            assert_rounded(loss[r], row)
            assert_gradient(grad[r, columns], want_grad)
            assert (grad[r, [c for c in range(4) if c not in columns]] == 0).all()


def test_a_zero_weight_saves_a_smoothed_class_that_cannot_be():
    x, target = torch.tensor([[1.0, -INF, 0.5]]), torch.tensor([0])
    weight = torch.tensor([1.0, 0.0, 1.0])
    options = dict(weight=weight, label_smoothing=0.1, reduction="sum")
    loss, grad = loss_and_gradient(fr.cross_entropy, x, target, **options)
    lse = torch.tensor([1.0, 0.5]).double().logsumexp(0)
    want = (0.9 + 0.1 / 3) * (lse - 1) + 0.1 / 3 * (lse - 0.5)
    assert_rounded(loss, want)
    assert grad.isfinite().all() and grad[0, 1] == 0
    assert F.cross_entropy(x, target, **options).isnan()  # the fault in torch


def test_torch_fails_where_probability_zero_meets_minus_infinity():
    x, soft = torch.tensor([[1.0, -INF, 0.5]]), torch.tensor([[0.5, 0.0, 0.5]])
    assert F.cross_entropy(x, soft).isnan()
    assert fr.cross_entropy(x, soft).isfinite()


@pytest.mark.parametrize("weight", (None, torch.tensor([0.5, 1.0, 2.0, 0.25])), ids=("", "weighted"))
def test_smoothing_onto_all_others_leaves_the_target_free_to_be_impossible(weight):
    x, target = torch.tensor([[-INF, 1.0, 0.5, 0.0]]), torch.tensor([0])
    loss, grad = loss_and_gradient(
        fr.cross_entropy, x, target, weight=weight, label_smoothing=1.0, smoothing="others", reduction="sum"
    )
    w = torch.ones(3) if weight is None else weight[1:]
    want, want_grad = loss_and_gradient(
        reference,
        x[:, 1:].double(),
        torch.full((1, 3), 1 / 3, dtype=torch.float64),
        weight=w,
        reduction="sum",
    )
    assert_rounded(loss, want)
    assert_gradient(grad[:, 1:], want_grad)
    assert grad[0, 0] == 0


def test_mass_on_a_class_that_cannot_be_is_an_infinite_loss(dtype):
    x = torch.tensor([[1.0, -INF, 0.5]]).to(dtype)
    assert fr.cross_entropy(x, torch.tensor([1])) == INF == F.cross_entropy(x.float(), torch.tensor([1]))
    for smoothing in ("uniform", "others"):
        assert fr.cross_entropy(x, torch.tensor([0]), label_smoothing=0.1, smoothing=smoothing) == INF
    assert fr.cross_entropy(x, torch.tensor([[0.5, 0.25, 0.25]]).to(dtype)) == INF


@pytest.mark.parametrize("bad", (float("nan"), INF), ids=str)
@pytest.mark.parametrize("k", (3, 16, 40))
def test_nan_and_plus_infinity_spoil_their_row_alone(bad, k, dtype):
    for place in {0, 1, k // 2, k - 1}:
        x, target = case((3, k), dtype)
        x[1, place] = bad
        loss, grad = loss_and_gradient(fr.cross_entropy, x, target, reduction="none")
        assert loss[1].isnan() and grad[1].isnan().any()
        assert loss[[0, 2]].isfinite().all() and grad[[0, 2]].isfinite().all()


def test_a_row_of_minus_infinity_is_nan(dtype):
    x = torch.full((2, 20), -INF).to(dtype)
    x[1] = 0
    loss = fr.cross_entropy(x, torch.tensor([1, 1]), reduction="none")
    assert loss[0].isnan() and loss[1].isfinite()


def test_ignored_rows_may_hold_anything(dtype):
    x, target = torch.full((3, 20), float("nan")).to(dtype), torch.tensor([-100, 4, -100])
    x[1] = torch.randn(20)
    loss, grad = loss_and_gradient(fr.cross_entropy, x, target)
    assert loss.isfinite() and grad.isfinite().all() and (grad[[0, 2]] == 0).all()


@pytest.mark.parametrize("real", (torch.float32, torch.float64, torch.bfloat16), ids=str)
def test_huge_logits(real):
    for big in (1e30, torch.finfo(real).max / 4):
        x = torch.tensor([[big, -big, 0.0], [big, big, -big]], dtype=real)
        loss, grad = loss_and_gradient(fr.cross_entropy, x, torch.tensor([0, 1]), reduction="none")
        assert_rounded(loss, torch.tensor([0.0, 0.6931471805599453], dtype=torch.float64))
        assert torch.equal(grad, torch.tensor([[0.0, 0, 0], [0.5, -0.5, 0]]).to(real))
        loss = fr.cross_entropy(x, torch.tensor([2, 2]), reduction="none", loss_dtype=torch.float64)
        torch.testing.assert_close(loss, x.double().max(1)[0] - x[:, 2].double(), rtol=1e-7, atol=1)


def test_logits_are_never_modified(dtype):
    for shape, soft in itertools.product([(5,), (6, 10), (2, 10, 33), (3, 1000)], (False, True)):
        x, target = case(shape, dtype, soft)
        weight = torch.rand(shape[min(1, len(shape) - 1)])
        copies = x.clone(), target.clone(), weight.clone()
        for options in (dict(), dict(label_smoothing=0.1, z_loss=0.1, weight=weight)):
            leaf = x.requires_grad_()
            fr.cross_entropy(leaf, target, **options).backward()
            x = leaf.detach()
            assert all(torch.equal(a, b) for a, b in zip((x, target, weight), copies, strict=True))
            assert leaf._version == target._version == weight._version == 0


def test_the_exponential_is_within_2_ulp():
    """Read from the softmax in the gradient: for logits 0 and x it is e^x / (1 + e^x), two roundings away
    from e^x.
    """
    x = torch.cat([torch.linspace(-87.3, 0, 400_001), -torch.logspace(-8, 1.9, 20_000)])
    logits = torch.stack([torch.zeros_like(x), x], 1).requires_grad_()
    p = torch.autograd.grad(
        fr.cross_entropy(logits, torch.zeros(len(x), dtype=torch.int64), reduction="sum"), logits
    )[0]
    want = x.double().exp()
    got = p[:, 1].double() * (1 + want)
    ulp = torch.ldexp(torch.ones(len(x), dtype=torch.float64), want.frexp()[1] - 24)
    assert ((got - want).abs() / ulp).max() < 3.5
    far = torch.tensor([[0.0, -88.0], [0.0, -104.0], [0.0, -1e30], [0.0, -INF]], requires_grad=True)
    p = torch.autograd.grad(fr.cross_entropy(far, torch.zeros(4, dtype=torch.int64), reduction="sum"), far)[0]
    assert torch.equal(p, torch.zeros(4, 2))


# ---------------------------------------------------------------- derivatives

DERIVATIVE_OPTIONS = [
    dict(),
    dict(reduction="none"),
    dict(reduction="sum", label_smoothing=0.2),
    dict(label_smoothing=0.2, smoothing="others"),
    dict(label_smoothing=1.0, smoothing="others"),
    dict(z_loss=0.3),
    dict(z_loss=0.3, reduction="none", label_smoothing=0.1, weight=True),
    dict(weight=True),
    dict(weight=True, label_smoothing=0.2, reduction="sum"),
    dict(ignore_index=1),
    dict(ignore_index=1, weight=True, label_smoothing=0.2, z_loss=0.1),
    dict(loss_dtype=torch.float64, all_ignored="zero"),
]


def derivative_case(options, shape, soft):
    options = dict(options)
    x, target = case(shape, torch.float64, soft)
    if options.get("weight"):
        options["weight"] = torch.linspace(0.5, 2, shape[1], dtype=torch.float64)
    if soft:
        options.pop("ignore_index", None)
    return x.requires_grad_(), target, options


@pytest.mark.parametrize("options", DERIVATIVE_OPTIONS, ids=str)
@pytest.mark.parametrize("soft", (False, True), ids=("indices", "probabilities"))
@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 2)], ids=str)
def test_first_and_second_derivatives(options, soft, shape):
    x, target, options = derivative_case(options, shape, soft)
    assert gradcheck(lambda x: fr.cross_entropy(x, target, **options), x)
    assert gradgradcheck(lambda x: fr.cross_entropy(x, target, **options), x)


@pytest.mark.parametrize("options", DERIVATIVE_OPTIONS, ids=str)
@pytest.mark.parametrize("soft", (False, True), ids=("indices", "probabilities"))
def test_third_derivative(options, soft):
    x, target, options = derivative_case(options, (4, 3), soft)
    v = torch.randn(2, *x.shape, dtype=torch.float64)

    def third(f):
        (a,) = torch.autograd.grad(f(x, target, **options).sum(), x, create_graph=True)
        (b,) = torch.autograd.grad((a * v[0]).sum(), x, create_graph=True)
        return torch.autograd.grad((b * v[1]).sum(), x)[0]

    for name in ("loss_dtype", "all_ignored"):
        options.pop(name, None)
    torch.testing.assert_close(third(fr.cross_entropy), third(reference), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("narrow", (torch.float32, torch.float16, torch.bfloat16), ids=str)
def test_second_derivative_in_every_dtype(narrow):
    x, target = case((6, 10), narrow)
    v = torch.randn(6, 10).to(narrow)

    def second(f, x, v):
        x = x.detach().clone().requires_grad_()
        (a,) = torch.autograd.grad(f(x, target, label_smoothing=0.1), x, create_graph=True)
        return torch.autograd.grad((a * v).sum(), x)[0]

    got, want = second(fr.cross_entropy, x, v), second(reference, x.double(), v.double())
    assert got.dtype == narrow
    torch.testing.assert_close(
        got.double(), want, rtol=4 * UNIT[narrow], atol=8 * UNIT[narrow] * want.abs().max().item()
    )


@pytest.mark.parametrize("scale", (0.3, -2.0, 1024.0), ids=str)
@pytest.mark.parametrize("reduction", ("none", "mean", "sum"))
def test_incoming_gradients_other_than_one(scale, reduction, dtype):
    x, target = case((8, 12), dtype)
    x.requires_grad_()
    (
        fr.cross_entropy(
            x,
            target,
            reduction=reduction,
            loss_dtype=torch.float64 if dtype == torch.float64 else torch.float32,
        )
        * scale
    ).sum().backward()
    want = loss_and_gradient(reference, x.double(), target, torch.tensor(1.0), reduction="sum")[1]
    want = want * scale / (8 if reduction == "mean" else 1)
    room = (
        3.1 * UNIT[dtype] * want.abs()
        + TINY[dtype]
        + (6e-7 if dtype != torch.float64 else 1e-15) * abs(scale)
    )
    assert ((x.grad.double() - want).abs() <= room).all()


def test_a_gradient_of_its_own_for_each_element():
    x, target = case((8, 12), torch.float64)
    g = torch.randn(8, dtype=torch.float64)
    got = loss_and_gradient(fr.cross_entropy, x, target, g, reduction="none")[1]
    torch.testing.assert_close(
        got, loss_and_gradient(reference, x, target, g, reduction="none")[1], rtol=1e-12, atol=1e-15
    )
    x, target = case((3, 5, 4), torch.float64)
    g = torch.randn(3, 4, dtype=torch.float64)
    got = loss_and_gradient(fr.cross_entropy, x, target, g, reduction="none")[1]
    torch.testing.assert_close(
        got, loss_and_gradient(reference, x, target, g, reduction="none")[1], rtol=1e-12, atol=1e-15
    )


def test_float16_gradients_survive_a_loss_scale():
    """Most softmax values of 30,000 rows' mean are below float16's least number; scaled by 65536 they are
    not.
    """
    x, target = case((3000, 50), torch.float16)
    x.requires_grad_()
    (fr.cross_entropy(x, target, loss_dtype=torch.float32) * 65536).backward()
    want = loss_and_gradient(reference, x.double(), target)[1] * 65536
    naive = (want / 65536).half().double() * 65536
    assert (naive == 0).float().mean() > 0.1  # what a gradient stored in float16 before scaling would lose
    assert ((x.grad.double() - want).abs() <= 2.0**-11 * want.abs() * 1.01 + 2.0**-25 + 1e-6 * 22).all()
    small = want.abs() < 2e-3
    assert ((x.grad.double() - want)[small].abs() <= 2.0**-11 * 2e-3 + 1e-6).all() and (
        x.grad[want.abs() > 1e-6] != 0
    ).all()


@pytest.mark.parametrize("leaf", (True, False), ids=("leaf", "non-leaf"))
@pytest.mark.parametrize("reduction", ("mean", "sum"))
def test_two_backward_calls_and_accumulation(leaf, reduction, dtype):
    """backward() hands out the saved gradient itself where it may; nothing that happens to .grad may reach
    it.
    """
    x, target = case((6, 10), dtype)
    want = loss_and_gradient(fr.cross_entropy, x, target, reduction=reduction)[1]
    base = x.clone().requires_grad_()
    inner = base if leaf else base * 1
    inner.retain_grad()
    loss = fr.cross_entropy(inner, target, reduction=reduction)
    loss.backward(retain_graph=True)
    assert torch.equal(inner.grad, want)
    inner.grad.mul_(1000)  # as a clipper or an optimiser would
    base.grad = inner.grad = None
    loss.backward(retain_graph=True)
    assert torch.equal(inner.grad, want)
    loss.backward()
    torch.testing.assert_close(inner.grad, want * 2, rtol=0, atol=0)
    base.grad.zero_()
    fr.cross_entropy(base, target, reduction=reduction).backward()
    assert torch.equal(base.grad, want)
    with pytest.raises(RuntimeError, match=r"second time|freed"):
        loss.backward()


def test_one_loss_used_twice_and_two_losses_of_one_input():
    x, target = case((6, 10), torch.float64)
    x.requires_grad_()
    loss = fr.cross_entropy(x, target)
    (loss + 2 * loss + fr.cross_entropy(x, target, label_smoothing=0.1)).backward()
    want = (
        3 * loss_and_gradient(reference, x, target)[1]
        + loss_and_gradient(reference, x, target, label_smoothing=0.1)[1]
    )
    torch.testing.assert_close(x.grad, want, rtol=1e-12, atol=1e-15)


def test_gradient_towards_probabilities():
    x, soft = case((4, 3), torch.float64, soft=True)
    x.requires_grad_(), soft.requires_grad_()
    for options in (
        dict(),
        dict(label_smoothing=0.2),
        dict(smoothing="others", label_smoothing=0.2, reduction="sum"),
        dict(z_loss=0.1, reduction="none", weight=torch.rand(3, dtype=torch.float64)),
    ):
        assert gradcheck(lambda x, t, o=options: fr.cross_entropy(x, t, **o), (x, soft))
        assert_rounded(fr.cross_entropy(x, soft, **options).detach(), reference(x, soft, **options).detach())


def test_gradient_towards_probabilities_that_are_zero():
    """-log p of every class, also of those that have no mass yet; torch agrees where no logit is infinite."""
    x = torch.tensor([[1.0, 2.0, 0.5], [0.0, 1.0, -INF]])
    one_hot = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]], requires_grad=True)
    loss = fr.cross_entropy(x, one_hot, reduction="sum")
    (grad,) = torch.autograd.grad(loss, one_hot)
    torch.testing.assert_close(grad[0], -x[0].log_softmax(0))
    assert loss.isfinite() and grad.isfinite().all()


def test_gradient_towards_probabilities_of_no_row_at_all():
    soft = torch.rand(0, 3, requires_grad=True)
    assert fr.cross_entropy(torch.randn(0, 3), soft, all_ignored="zero") == 0
    assert fr.cross_entropy(torch.randn(0, 3), soft).isnan()


# ---------------------------------------------------------------- memory and bits


def saved_bytes(f, x):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        loss = f(x)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    return sum(storages.values()), loss


def test_one_tensor_like_the_logits_is_saved(dtype):
    n, k = 64, 1000
    x, target = case((n, k), dtype)
    x.requires_grad_()
    total, _ = saved_bytes(lambda x: fr.cross_entropy(x, target), x)
    size = 4 if dtype == torch.float16 else x.element_size()
    assert n * k * size <= total <= n * k * size + n * 8 * 2 + 64


def test_saved_tensor_hooks():
    x, target = case((6, 10), torch.float32)
    want = loss_and_gradient(fr.cross_entropy, x, target)[1]
    with torch.autograd.graph.save_on_cpu():
        assert torch.equal(loss_and_gradient(fr.cross_entropy, x, target)[1], want)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()):
        assert torch.equal(loss_and_gradient(fr.cross_entropy, x, target)[1], want)


@pytest.mark.parametrize("reentrant", (True, False))
def test_checkpoint(reentrant):
    x, target = case((6, 10), torch.float32)
    want = loss_and_gradient(fr.cross_entropy, x, target)[1]
    x.requires_grad_()
    checkpoint(lambda y: fr.cross_entropy(y * 1, target), x, use_reentrant=reentrant).backward()
    assert torch.equal(x.grad, want)


def test_without_gradients():
    x, target = case((6, 10), torch.float32)
    x.requires_grad_()
    want = fr.cross_entropy(x, target)
    assert want.requires_grad
    with torch.no_grad():
        assert (
            torch.equal(fr.cross_entropy(x, target), want) and not fr.cross_entropy(x, target).requires_grad
        )
    with torch.inference_mode():
        assert torch.equal(fr.cross_entropy(x, target), want)
        inside = fr.cross_entropy(x.clone(), target.clone())
    assert inside.is_inference() and torch.equal(inside, want)
    assert not fr.cross_entropy(x.detach(), target).requires_grad


def test_autocast_gives_float32():
    x, target = case((6, 10), torch.bfloat16)
    x.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = fr.cross_entropy(x, target)
        assert fr.cross_entropy(x, target, loss_dtype=torch.bfloat16).dtype == torch.bfloat16
        assert fr.cross_entropy(x.double(), target).dtype == torch.float64
    assert loss.dtype == torch.float32
    assert_rounded(loss.detach(), reference(x.detach(), target))
    loss.backward()
    assert x.grad.dtype == torch.bfloat16


def test_anomaly_mode_and_hooks():
    x, target = case((6, 10), torch.float32)
    x.requires_grad_()
    seen = []
    x.register_hook(lambda g: seen.append(g.clone()) or g * 2)
    with torch.autograd.detect_anomaly(check_nan=True):
        fr.cross_entropy(x, target).backward()
    assert torch.equal(x.grad, 2 * seen[0])


SCRIPT = """
import hashlib, sys, torch, fastreg as fr

kept = []
for threads in (1, 2, 5):
    torch.set_num_threads(1)  # torch's own softmax depends on the number of threads
    torch.manual_seed(0)
    one = hashlib.sha256()
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        for shape in ((700, 37), (3, 10, 501), (40, 3000), (4, 5, 6, 7)):
            x = (torch.randn(shape) * 5).to(dtype)
            x.view(-1)[::97] = -float("inf")
            t = torch.randint(shape[1], shape[:1] + shape[2:])
            soft = torch.rand(shape).softmax(1).to(dtype)
            w = torch.rand(shape[1])
            torch.set_num_threads(threads)
            for target, options in ((t, {}), (t, dict(weight=w, z_loss=0.1)), (soft, dict(reduction="sum")),
                                    (t, dict(reduction="none", label_smoothing=0.0, ignore_index=1))):
                y = x.clone().requires_grad_()
                loss = fr.cross_entropy(y, target, **options)
                (grad,) = torch.autograd.grad(loss.sum(), y)
                for tensor in (loss.detach(), grad):
                    one.update(tensor.nan_to_num(nan=77.0).reshape(-1).view(torch.uint8).numpy().tobytes())
                    if threads == 1:
                        kept.append(tensor)
            torch.set_num_threads(1)
    print(fr._C.build_info()["instruction_set"], one.hexdigest())
torch.save(kept, sys.argv[1])
"""


def test_the_same_bits_for_any_thread_count_and_for_every_instruction_set_that_fuses(tmp_path):
    """x86-64's baseline lacks the fused multiply-add: there the last bits differ."""
    digests, values = {}, {}
    for isa in fr._C.build_info()["instruction_sets"].split(","):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, tmp_path / isa],
            env={**os.environ, "FASTREG_CPU_CAPABILITY": isa, "GOMP_SPINCOUNT": "0"},
            capture_output=True,
            text=True,
        )
        if "that this machine can run" in done.stderr:
            continue
        assert done.returncode == 0, done.stderr
        lines = [line.split() for line in done.stdout.splitlines()]
        assert [name for name, _ in lines] == [isa] * 3 and len({digest for _, digest in lines}) == 1, lines
        digests[isa], values[isa] = lines[0][1], torch.load(tmp_path / isa)
    assert len({digest for isa, digest in digests.items() if isa != "sse2"}) <= 1, digests
    assert hashlib.sha256(b"").hexdigest() not in digests.values()
    first, *others = values.values()
    for other in others:
        for a, b in zip(first, other, strict=True):
            rtol = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[
                a.dtype
            ]
            torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * 1e-1, equal_nan=True)


# ---------------------------------------------------------------- torch.compile and the operator itself


def compiled_function(x, target, weight):
    y = x * 2
    return (
        fr.cross_entropy(y, target, weight, label_smoothing=0.1)
        + 0.5 * fr.cross_entropy(y, target, reduction="none").sum()
    )


@pytest.mark.parametrize("narrow", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_compile(narrow):
    torch._dynamo.reset()
    compiled = torch.compile(compiled_function, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((6, 10), (9, 10), (5, 12)):
        x, target = case(shape, narrow)
        weight = torch.rand(shape[1])
        want = loss_and_gradient(compiled_function, x, target, weight=weight)
        got = loss_and_gradient(compiled, x, target, weight=weight)
        torch.testing.assert_close(got, want, rtol=4 * UNIT[narrow], atol=1e-5)


def test_compile_every_option():
    torch._dynamo.reset()
    x, target = case((2, 3, 4, 5), torch.float32)
    soft = torch.rand(2, 3, 4, 5).softmax(1)
    for t, options in (
        (target, dict(z_loss=0.1, ignore_index=1, all_ignored="zero")),
        (target, dict(label_smoothing=0.1, smoothing="others", reduction="none")),
        (soft, dict(reduction="sum", loss_dtype=torch.float64)),
        (target.int(), dict(weight=torch.rand(3))),
    ):
        compiled = torch.compile(
            lambda x, t, o=options: fr.cross_entropy(x, t, **o), fullgraph=True, backend="aot_eager"
        )
        torch.testing.assert_close(
            loss_and_gradient(compiled, x, t), loss_and_gradient(fr.cross_entropy, x, t, **options)
        )


@pytest.mark.slow
def test_compile_inductor():
    torch._dynamo.reset()
    compiled = torch.compile(compiled_function, fullgraph=True)
    x, target = case((6, 10), torch.float32)
    weight = torch.rand(10)
    want = loss_and_gradient(compiled_function, x, target, weight=weight)
    for _ in range(2):
        torch.testing.assert_close(loss_and_gradient(compiled, x, target, weight=weight), want)
    with pytest.raises(ValueError, match="target must be in"):
        compiled(x, target + 10, weight)


@pytest.mark.parametrize("with_grad", (False, True))
def test_opcheck(with_grad, dtype):
    for shape, soft, weight, reduction in (
        ((6, 10), False, True, 1),
        ((3, 5, 4), True, False, 0),
        ((3, 5, 4), False, False, 0),
        ((0, 5), False, False, 2),
    ):
        x, target = case(shape, dtype, soft)
        w = (
            torch.rand(shape[1], dtype=torch.float64 if dtype == torch.float64 else torch.float32)
            if weight
            else None
        )
        for layout in (x, x.transpose(0, 1).contiguous().transpose(0, 1)):
            torch.library.opcheck(
                torch.ops.fastreg.cross_entropy.default,
                (
                    layout,
                    target,
                    w,
                    reduction,
                    -100,
                    0.1,
                    False,
                    0.1,
                    False,
                    torch.float32 if soft else None,
                    with_grad,
                ),
            )


# ---------------------------------------------------------------- wrong arguments


def x24():
    return torch.randn(2, 4)


T2 = torch.tensor([0, 1])
WRONG = {
    "class too large": (
        ValueError,
        r"target must be in \[0, 4\).*got 4 at element 1",
        lambda: (x24(), torch.tensor([0, 4])),
        {},
    ),
    "class negative": (ValueError, r"got -1 at element 0", lambda: (x24(), torch.tensor([-1, 0])), {}),
    "class far": (ValueError, "target must be in", lambda: (x24(), torch.tensor([0, 2**40])), {}),
    "int8 -100 is ignore_index, uint8 156 is not": (
        ValueError,
        "got 156",
        lambda: (x24(), torch.tensor([0, 156], dtype=torch.uint8)),
        {},
    ),
    "batch sizes": (
        ValueError,
        r"target must have shape \(2,\).*got \(3,\)",
        lambda: (x24(), torch.tensor([0, 1, 2])),
        {},
    ),
    "spatial sizes": (
        ValueError,
        "target must have shape",
        lambda: (torch.randn(2, 4, 3), torch.zeros(2, 4).long()),
        {},
    ),
    "target like probabilities, but int": (
        ValueError,
        "target must have shape",
        lambda: (x24(), torch.zeros(2, 4).long()),
        {},
    ),
    "float indices": (ValueError, r"int64.*\.long\(\)", lambda: (x24(), torch.tensor([0.0, 1.0])), {}),
    "one index for a batch": (ValueError, "target must have shape", lambda: (x24(), torch.tensor(1)), {}),
    "indices for one row": (
        ValueError,
        r"target must have shape \(\)",
        lambda: (torch.randn(4), torch.tensor([1])),
        {},
    ),
    "soft shape": (ValueError, "target must have shape", lambda: (x24(), torch.rand(2, 5)), {}),
    "bool target": (TypeError, "got torch.bool", lambda: (x24(), torch.tensor([True, False])), {}),
    "bool mask": (TypeError, "got torch.bool", lambda: (x24(), torch.ones(2, 4).bool()), {}),
    "complex target": (TypeError, "got torch.complex64", lambda: (x24(), torch.ones(2, 4).cfloat()), {}),
    "integer logits": (ValueError, r"got torch.int64; .*\.float\(\)", lambda: (x24().long(), T2), {}),
    "complex logits": (ValueError, "got torch.complex64", lambda: (x24().cfloat(), T2), {}),
    "float8 logits": (ValueError, "got torch.float8", lambda: (x24().to(torch.float8_e5m2), T2), {}),
    "no dimension": (ValueError, "without dimensions", lambda: (torch.tensor(1.0), torch.tensor(0)), {}),
    "no class": (ValueError, "at least one class", lambda: (torch.randn(2, 0), T2), {}),
    "input no tensor": (TypeError, "input must be a torch.Tensor, got list", lambda: ([[1.0, 2.0]], T2), {}),
    "target no tensor": (TypeError, "target must be a torch.Tensor, got list", lambda: (x24(), [0, 1]), {}),
    "weight no tensor": (
        TypeError,
        "weight must be a torch.Tensor",
        lambda: (x24(), T2),
        dict(weight=[1.0] * 4),
    ),
    "weight length": (
        ValueError,
        r"shape \(4,\), got \(5,\)",
        lambda: (x24(), T2),
        dict(weight=torch.ones(5)),
    ),
    "weight matrix": (
        ValueError,
        "weight must have one value",
        lambda: (x24(), T2),
        dict(weight=torch.ones(4, 1)),
    ),
    "weight int": (TypeError, "got torch.int64", lambda: (x24(), T2), dict(weight=torch.ones(4).long())),
    "weight complex": (
        TypeError,
        "got torch.complex64",
        lambda: (x24(), T2),
        dict(weight=torch.ones(4).cfloat()),
    ),
    "weight learned": (
        ValueError,
        "detach",
        lambda: (x24(), T2),
        dict(weight=torch.ones(4, requires_grad=True)),
    ),
    "target elsewhere": (
        ValueError,
        "target must be on cpu",
        lambda: (x24(), torch.zeros(2, device="meta").long()),
        {},
    ),
    "weight elsewhere": (
        ValueError,
        "weight must be on cpu",
        lambda: (x24(), T2),
        dict(weight=torch.ones(4, device="meta")),
    ),
    "smoothing NaN": (
        ValueError,
        "label_smoothing must be in",
        lambda: (x24(), T2),
        dict(label_smoothing=float("nan")),
    ),
    "smoothing negative": (
        ValueError,
        "label_smoothing must be in",
        lambda: (x24(), T2),
        dict(label_smoothing=-0.1),
    ),
    "smoothing 2": (
        ValueError,
        r"label_smoothing must be in \[0, 1\], got 2",
        lambda: (x24(), T2),
        dict(label_smoothing=2),
    ),
    "smoothing text": (
        TypeError,
        "label_smoothing must be a number",
        lambda: (x24(), T2),
        dict(label_smoothing="0.1"),
    ),
    "reduction": (
        ValueError,
        "reduction must be one of 'none', 'mean', 'sum'",
        lambda: (x24(), T2),
        dict(reduction="avg"),
    ),
    "smoothing kind": (ValueError, "smoothing must be one of", lambda: (x24(), T2), dict(smoothing="other")),
    "all_ignored": (
        ValueError,
        "all_ignored must be one of",
        lambda: (x24(), T2),
        dict(all_ignored="ignore"),
    ),
    "others alone": (
        ValueError,
        "at least two classes",
        lambda: (torch.randn(2, 1), torch.zeros(2).long()),
        dict(smoothing="others", label_smoothing=0.1),
    ),
    "z_loss negative": (ValueError, "z_loss must be", lambda: (x24(), T2), dict(z_loss=-1e-4)),
    "z_loss inf": (ValueError, "z_loss must be", lambda: (x24(), T2), dict(z_loss=INF)),
    "z_loss NaN": (ValueError, "z_loss must be", lambda: (x24(), T2), dict(z_loss=float("nan"))),
    "ignored class of probabilities": (
        ValueError,
        "ignore_index must be negative",
        lambda: (x24(), torch.rand(2, 4)),
        dict(ignore_index=2),
    ),
    "ignore_index float": (
        TypeError,
        "ignore_index must be an int",
        lambda: (x24(), T2),
        dict(ignore_index=1.5),
    ),
    "loss_dtype": (ValueError, "loss_dtype must be", lambda: (x24(), T2), dict(loss_dtype=torch.float16)),
    "loss_dtype int": (ValueError, "loss_dtype must be", lambda: (x24(), T2), dict(loss_dtype=torch.int32)),
}


@pytest.mark.parametrize("requires_grad", (False, True), ids=("", "grad"))
@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name, requires_grad):
    error, message, arguments, options = WRONG[name]
    x, target = arguments()
    if requires_grad and isinstance(x, torch.Tensor) and x.is_floating_point():
        x.requires_grad_()
    with pytest.raises(error, match=message) as caught:
        fr.cross_entropy(x, target, **options)
    assert str(caught.value).startswith("cross_entropy: ")


def test_wrong_probabilities_that_want_a_gradient():
    soft = torch.rand(2, 4, requires_grad=True)
    with pytest.raises(ValueError, match="loss_dtype must be"):
        fr.cross_entropy(x24(), soft, loss_dtype=torch.int32)
    with pytest.raises(ValueError, match="input must be float32"):
        fr.cross_entropy(x24().long(), soft)


def test_the_raw_operator_checks_for_itself():
    op = torch.ops.fastreg.cross_entropy.default
    for arguments, message in (
        ((torch.randn(4), torch.tensor(0)), r"\(N, C, ...\)"),
        ((x24(), torch.tensor([0, 1, 2])), "class indices"),
        ((x24(), torch.rand(2, 5)), "shape of input"),
        ((x24(), T2, torch.ones(3)), "weight must have one value"),
        ((x24(), T2, torch.ones(4).double()), "weight must"),
        ((x24(), T2, None, 1, -100, 1.5), "label_smoothing"),
        ((x24(), T2, None, 1, -100, 0.0, False, -1.0), "z_loss"),
        ((torch.randn(2, 4, 3, 2).transpose(2, 3), torch.zeros(2, 2, 3).long()), "merge"),
        ((x24(), torch.tensor([0, 9])), "target must be in"),
    ):
        with pytest.raises(ValueError, match=message):
            op(*arguments)
