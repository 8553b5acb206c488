"""Cross-entropy against its written formula in float64, and against torch wherever torch has the feature.

Proven: values and gradients for every dtype, shape, layout and option, also where torch gives NaN or rounds
badly, and where one class has nearly all the mass; that nothing is overwritten. Derivatives, bits and doors
are in test_cross_entropy_autograd.py, wrong arguments in test_cross_entropy_arguments.py, the definition in
plain torch in test_cross_entropy_definition.py.
"""

import functools
import itertools
import random
import warnings

import pytest
import torch
import torch.nn.functional as F
from cross_entropy_reference import (
    INF,
    UNIT,
    assert_gradient,
    assert_rounded,
    case,
    loss_and_gradient,
    reference,
)

import fastreg as fr

# Up to five dimensions; one row and one class; 17 classes are a vector and one, 1000 many vectors and a rest.
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
    dtypes = [x.dtype]
    if target.is_floating_point():  # torch promotes the loss of probabilities
        dtypes += [t.dtype for t in (target, options.get("weight")) if t is not None]
    assert got_loss.dtype == functools.reduce(torch.promote_types, dtypes) and got_grad.dtype == x.dtype
    assert got_loss.shape == want_loss.shape and got_grad.shape == x.shape
    if got_loss.dtype == torch.float64 != x.dtype:  # promoted, but of statistics in float32
        got_loss = got_loss.float()
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
# One row without a batch, rows, and rows side by side in one and two dimensions.
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


@pytest.mark.parametrize("legacy", list(itertools.product((None, True, False), repeat=2)), ids=str)
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


# Rows of two vectors of 16 and a rest; rows side by side in one, two and three dimensions.
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


# Classes around the short sums of 64, rows around the 16 lanes and the tiles of 16.
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
# Classes that are less than a vector of 16, one vector, and two with a rest.
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
    # Unbatched, rows one after another, rows side by side, and a row of many vectors.
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
