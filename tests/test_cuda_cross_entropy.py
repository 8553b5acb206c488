"""The CUDA kernels of cross-entropy, executed without a GPU, against the formula in float64."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from cuda_machine import (
    DTYPES,
    SCHEDULES,
    dtype_number,
    interpreted,
    needs_nvcc,
    structure,
    traffic,
)

pytestmark = needs_nvcc

Strides = structure("CrossEntropyArgs::Strides", "int64 outer, inner, cls")
CrossEntropyArgs = structure(
    "CrossEntropyArgs",
    """int64 ignore_index
    double label_smoothing
    bool others
    double z_loss
    int dtype, target_dtype
    pointer logits, grad, target, soft_target, weight, row_loss, row_lse
    int64 outer, inner, classes
    Strides logits_stride, grad_stride, target_stride
    double mix, base, grad_factor
    pointer row_factor""",
    Strides=Strides,
)
CrossEntropyReduction = structure("CrossEntropyReduction", "int64 kind\nbool all_ignored_zero")
CrossEntropyLaunch = structure(
    "CrossEntropyLaunch",
    """CrossEntropyArgs rows
    CrossEntropyReduction reduction
    int loss_dtype
    pointer loss, lse, scratch""",
    CrossEntropyArgs=CrossEntropyArgs,
    CrossEntropyReduction=CrossEntropyReduction,
)
CrossEntropyScale = structure(
    "CrossEntropyScale", "int dtype, factor_dtype\npointer values\nint64 numel\npointer factor"
)
SUM_BLOCKS = 256


def coefficients(k, eps, others):
    spread = 0.0 if eps == 0 else eps / (k - 1 if others else k)
    return 1 - eps - (spread if others else 0.0), spread


def run(
    x,
    target,
    weight=None,
    reduction="mean",
    ignore_index=-100,
    eps=0.0,
    others=False,
    z_loss=0.0,
    zero=False,
    loss_dtype=None,
    with_grad=True,
    row_factor=None,
    in_place=False,
    like=None,
    misaligned=0,
    debug=False,
    **options,
):
    """(loss, grad, lse, reports) of the CUDA launcher. x: (N, C) or (N, C, inner); like: the form of the
    gradient.
    """
    # What there is, on the host.
    statistics = torch.float64 if x.dtype == torch.float64 else torch.float32
    n, k = x.shape[:2]
    inner = x.shape[2] if x.dim() == 3 else n
    outer = n if x.dim() == 3 else 1
    rows = outer * inner
    soft = target.is_floating_point()
    like = torch.empty_like(x) if like is None else like
    if x.dtype == torch.float16:
        like = torch.empty_strided(like.shape, like.stride(), dtype=torch.float32)
    loss_dtype = loss_dtype or statistics
    loss = torch.empty(rows if reduction == "none" else (), dtype=loss_dtype)
    slots = {}

    def strides(t):
        return Strides(0, *t.stride()) if t.dim() == 2 else Strides(t.stride(0), t.stride(2), t.stride(1))

    # What the launcher takes: tensors in the memory of the machine, then the two structures.
    def arguments(machine):
        slots["x"] = machine.put(x, "x", offset=misaligned, readonly=not in_place)
        if with_grad:
            slots["grad"] = (
                slots["x"]
                if in_place
                else machine.room(like, "grad", offset=misaligned * like.element_size() // x.element_size())
            )
        slots["target"] = machine.put(target, "target")
        for name, tensor in (("weight", weight), ("row_factor", row_factor)):
            if tensor is not None:
                slots[name] = machine.put(tensor, name)
        slots["loss"] = machine.room(loss, "loss")
        slots["lse"] = machine.room(torch.empty(rows, dtype=statistics), "lse")
        if reduction != "none":
            slots["scratch"] = machine.room(
                torch.empty(2 + 2 * SUM_BLOCKS + rows, dtype=statistics), "scratch"
            )
        at = {name: slot.at for name, slot in slots.items()}
        mix, base = coefficients(k, eps, others)
        form = slots["grad"].like if with_grad else x
        args = CrossEntropyArgs(
            ignore_index=ignore_index,
            label_smoothing=eps,
            others=others,
            z_loss=z_loss,
            dtype=dtype_number(x.dtype),
            target_dtype=dtype_number(target.dtype) if soft else 0,
            logits=at["x"],
            grad=at.get("grad"),
            target=None if soft else at["target"],
            soft_target=at["target"] if soft else None,
            weight=at.get("weight"),
            outer=outer,
            inner=inner,
            classes=k,
            logits_stride=strides(x),
            grad_stride=strides(form),
            target_stride=strides(target) if soft else Strides(),
            mix=mix,
            base=base,
            grad_factor=1.0,
            row_factor=at.get("row_factor"),
        )
        return CrossEntropyLaunch(
            args,
            CrossEntropyReduction(("none", "mean", "sum").index(reduction), zero),
            dtype_number(loss_dtype),
            at["loss"],
            at["lse"],
            at.get("scratch"),
        )

    # The launch and its results.
    kernels = interpreted("cross_entropy", debug=True) if debug else interpreted("cross_entropy")
    reports = kernels.run("cross_entropy_forward_cuda", arguments, CrossEntropyLaunch, **options)
    grad = slots["grad"].result() if with_grad else None
    return slots["loss"].result(), grad, slots["lse"].result(), reports


def exact(
    x,
    target,
    weight=None,
    reduction="mean",
    ignore_index=-100,
    eps=0.0,
    others=False,
    z_loss=0.0,
    zero=False,
    row_factor=None,
    **_,
):
    """(loss, grad, lse, parts) in float64, rows in the order of the kernel; loss of each row if reduction is
    none.

    parts: the sizes of the numbers whose sum the gradient is, where they may cancel.
    """
    k = x.shape[1]
    x = x.double().movedim(1, -1)
    shape = x.shape
    x = x.reshape(-1, k)
    w = torch.ones(k, dtype=torch.float64) if weight is None else weight.double()
    mix, base = coefficients(k, eps, others)
    if target.is_floating_point():
        keep, t = torch.ones(len(x), dtype=torch.bool), target.double().movedim(1, -1).reshape(-1, k)
        normaliser = len(x)
    else:
        flat = target.reshape(-1)
        keep = flat != ignore_index
        index = flat.where(keep, 0)
        t = torch.nn.functional.one_hot(index, k).double()
        normaliser = (w[index] * keep).sum().item()
    # What the target gives each class, then the softmax, loss and gradient of each row.
    q = w * (mix * t + base)
    if mix + base == 0:
        q = torch.where(t == 1, 0, q)
    # One largest logit apart from the others: where they are small, float64 itself would lose them beside it.
    top, at = x.max(1, keepdim=True)
    e = (x - top).exp()
    others = e.scatter(1, at, 0).sum(1, keepdim=True)
    lse, p, not_p = (top + others.log1p())[:, 0], e / (1 + others), (others + (1 - e)) / (1 + others)
    loss = torch.where(q == 0, 0, q * (others.log1p() - (x - top))).sum(1) + z_loss * lse**2
    factor = (
        1.0
        if reduction != "mean"
        else 0.0
        if normaliser == 0 and zero
        else 1 / normaliser
        if normaliser
        else torch.nan
    )
    factor = torch.full_like(loss, factor) if row_factor is None else row_factor.double()
    q_sum = q.sum(1, keepdim=True)
    grad = torch.where(p < 0.5, q_sum * p - q, (q_sum - q) - q_sum * not_p) + 2 * z_loss * lse[:, None] * p
    grad = grad * factor[:, None]
    parts = grad.abs() + (2 * q * factor[:, None].abs() if eps or z_loss or target.is_floating_point() else 0)
    # Rows that are ignored, and the reduction.
    loss, lse, grad = (
        torch.where(keep, loss, 0),
        torch.where(keep, lse, 0),
        torch.where(keep[:, None], grad, 0),
    )
    if reduction == "sum":
        loss = loss.sum()
    elif reduction == "mean":
        loss = loss.sum() * 0 if normaliser == 0 and zero else loss.sum() / normaliser
    return loss, grad.reshape(shape).movedim(-1, 1), lse, parts.reshape(shape).movedim(-1, 1)


def ulps(value, expected, unit, magnitude=None):
    """The largest error of what is finite, in units of the last place of the expected value, or of a larger
    magnitude that it is made of; the rest must be the same."""
    odd = ~expected.isfinite()
    assert torch.equal(torch.nan_to_num(value[odd].double(), 1.5), torch.nan_to_num(expected[odd], 1.5))
    if odd.all():
        return 0.0
    magnitude = expected.abs() if magnitude is None else torch.maximum(expected.abs(), magnitude)
    spacing = torch.exp2(magnitude.clamp(min=2.0**-126).log2().floor()) * torch.finfo(unit).eps
    return ((value.double() - expected).abs() / spacing)[~odd].max().item()


def check(x, target, loss_ulps=2.0, grad_tolerance=2.0**-19, **options):
    """Runs and compares; gives the reports. The gradient's tolerance is that of float32."""
    loss, grad, lse, reports = run(x, target, **options)
    expected_loss, expected_grad, expected_lse, parts = exact(x, target, **options)
    unit = torch.float64 if x.dtype == torch.float64 else torch.float32
    top = x.double().amax(1).reshape(-1)
    lse_error = ulps(lse, expected_lse, unit, torch.maximum(top.abs(), (expected_lse - top).abs()))
    loss_error = ulps(loss, expected_loss, unit)
    assert lse_error <= 2
    assert loss_error <= loss_ulps
    if grad is not None:
        scale = 2.0**-29 if x.dtype == torch.float64 else 1.0
        rounding, tiny = torch.finfo(grad.dtype).eps / 2, torch.finfo(grad.dtype).smallest_normal
        error = (grad.double() - expected_grad).abs()
        allowed = rounding * expected_grad.abs() + grad_tolerance * scale * parts + 2 * tiny
        worst = (error / allowed)[~(grad.isnan() & expected_grad.isnan())].max().item()
        assert worst <= 1
    return reports


def numbers(*shape, dtype=torch.float32, seed=0, scale=3.0):
    return (
        scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ).to(dtype)


def classes(*shape, k, ignored=0.2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(k, shape, generator=generator)
    return target.where(torch.rand(shape, generator=generator) >= ignored, -100)


# Shapes for each way of sharing rows out: a thread per row of few classes; a warp per row; a block per row; a
# thread per row of rows side by side, by tiles of 128 and of 32 of them, and without a tile.
WAYS = {
    "few": (150, 7),
    "warp": (5, 301),
    "block": (2, 2051),
    "columns": (2, 11, 137),
    "narrow columns": (1, 330, 37),
    "direct columns": (1, 1310, 16),
}
SLOW = ("narrow columns", "direct columns")


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", ["few", "warp", "block", "columns"])
def test_every_schedule(way, dtype, schedule):
    shape = WAYS[way]
    x = numbers(*shape, dtype=dtype)
    check(x, classes(shape[0], *shape[2:], k=shape[1]), schedule=schedule)


OPTIONS = {
    "uniform": dict(eps=0.1),
    "others": dict(eps=0.2, others=True, reduction="sum"),
    "weight": dict(weight=True),
    "weight, uniform": dict(weight=True, eps=0.1, reduction="none"),
    "weight, others": dict(weight=True, eps=0.3, others=True),
    "z-loss": dict(z_loss=1e-3, reduction="none"),
    "all": dict(weight=True, eps=0.1, z_loss=1e-2, reduction="sum"),
    "smoothed away": dict(eps=1.0, others=True),
    "in place": dict(in_place=True, eps=0.1, reduction="none", row_factor=True),
    "without gradient": dict(with_grad=False, eps=0.1),
}


@pytest.mark.parametrize(
    ("way", "options"),
    [
        (way, options)
        for way in WAYS
        for options in OPTIONS
        if way not in SLOW or options in ("all", "in place")
    ],
)
def test_options(way, options):
    shape = WAYS[way]
    dtype = DTYPES[(list(WAYS).index(way) + list(OPTIONS).index(options)) % 4]
    x, target, more = (
        numbers(*shape, dtype=dtype, scale=1.0),
        classes(shape[0], *shape[2:], k=shape[1]),
        dict(OPTIONS[options]),
    )
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    if more.get("weight"):
        more["weight"] = numbers(shape[1], dtype=statistics, seed=2).abs() + 0.1
    if more.get("row_factor"):
        more["row_factor"] = numbers(target.numel(), dtype=statistics, seed=3)
    check(x, target, loss_ulps=8, **more)


@pytest.mark.parametrize("target_dtype", DTYPES)
@pytest.mark.parametrize("way", ["few", "warp", "block", "columns"])
def test_probabilities(way, target_dtype):
    shape = WAYS[way]
    x = numbers(*shape, dtype=DTYPES[list(WAYS).index(way) % 4], scale=1.0)
    target = numbers(*shape, seed=4).softmax(1).to(target_dtype)
    weight = numbers(shape[1], seed=2).abs().to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    for options in (dict(), dict(weight=weight, eps=0.1, reduction="none", z_loss=1e-3)):
        check(x, target, loss_ulps=4, **options)


def test_probabilities_of_columns_too_long_for_a_tile():
    x = numbers(1, 1310, 16, scale=1.0)
    check(x, numbers(1, 1310, 16, seed=4).softmax(1), loss_ulps=4)


@pytest.mark.parametrize(
    ("dtype", "misaligned"),
    [(dtype, bytes) for dtype in DTYPES for bytes in (2, 4, 8) if bytes % dtype.itemsize == 0],
)
def test_unaligned(dtype, misaligned):
    # A thread for each row, a warp for each, and a thread for each of rows side by side.
    for shape in ((33, 5), (3, 301), (1, 20, 130)):
        check(
            numbers(*shape, dtype=dtype),
            classes(shape[0], *shape[2:], k=shape[1]),
            misaligned=misaligned,
            eps=0.1,
        )


VIEWS = {
    "transposed": lambda x: x[:400].reshape(20, 20).t(),
    "few rows, transposed": lambda x: x[:400].reshape(100, 4).t(),
    "steps": lambda x: x.reshape(20, 200)[::2, 1::3],
    "rows": lambda x: x.reshape(10, 400)[3:, 5:],
    "even rows": lambda x: x.reshape(10, 400)[:, 16:],
    "few classes": lambda x: x.reshape(100, 40)[:, 2:9],
    "channels last": lambda x: x.reshape(4, 10, 100).transpose(1, 2),
    "channels last, cut": lambda x: x.reshape(4, 10, 100)[:, 1:, 3:].transpose(1, 2),
    "positions cut": lambda x: x.reshape(2, 20, 100)[:, :, 3:],
    "batch cut": lambda x: x.reshape(4, 10, 100)[::2, ::2],
    "expanded": lambda x: x[:300].reshape(1, 300).expand(5, 300),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("view", VIEWS)
def test_strides(view, dtype):
    x = VIEWS[view](numbers(4000, dtype=dtype, scale=1.0))
    target = classes(x.shape[0], *x.shape[2:], k=x.shape[1])
    check(x, target, like=torch.empty_like(x), eps=0.1, schedule="random")
    check(x, target, like=torch.empty(x.shape, dtype=dtype))
    soft = (
        VIEWS[view](numbers(4000, seed=5).abs())
        if view != "expanded"
        else numbers(*x.shape, seed=5).softmax(1)
    )
    check(x, soft, like=torch.empty(x.shape, dtype=dtype), reduction="none", loss_ulps=4)


def test_few_strided_rows_of_float16_in_place():
    x = numbers(6, 320, dtype=torch.float16)[:, 7:]
    check(x, classes(6, k=313), in_place=True, row_factor=torch.ones(6), reduction="none")


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_exceed_shared_memory(dtype):
    k = 90_001 if dtype.itemsize == 2 else 42_003
    check(numbers(1, k, dtype=dtype), torch.tensor([k - 2]), eps=0.1)
    if dtype == torch.bfloat16:
        check(
            numbers(1, k, dtype=dtype),
            torch.tensor([k - 2]),
            in_place=True,
            row_factor=torch.ones(1),
            reduction="none",
        )


@pytest.mark.parametrize("way", WAYS)
def test_logits_that_ascend(way):
    """The reference moves at every step of a row in order, were it to follow each: thousands of roundings."""
    shape = WAYS[way]
    x = (
        (torch.arange(shape[1]) * (40.0 / shape[1]))
        .view(1, -1, *(1,) * (len(shape) - 2))
        .expand(shape)
        .contiguous()
    )
    check(x, classes(shape[0], *shape[2:], k=shape[1]), reduction="none", grad_tolerance=2.0**-18)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_class_has_nearly_all_the_mass(dtype):
    """The loss is what the others have, far below the last bit of 1."""
    # The three as in test_unaligned.
    for shape in ((150, 7), (3, 301), (1, 21, 137)):
        x = numbers(*shape, dtype=dtype)
        target = torch.zeros(shape[0], *shape[2:], dtype=torch.int64)
        x[:, 0] = 40.0
        loss = exact(x, target, reduction="none")[0]
        assert 0 < loss.max() < 1e-12
        distance = 60 if dtype == torch.float32 else 4  # float32 rounds the difference of the logits
        check(x, target, reduction="none", loss_ulps=distance, grad_tolerance=distance * 2.0**-23)


HOSTILE = [
    "nan",
    "inf",
    "-inf",
    "all -inf",
    "-inf at the target",
    "largest negative",
    "huge",
    "-inf at all others",
]


@pytest.mark.parametrize("hostile", HOSTILE)
@pytest.mark.parametrize("way", ["few", "warp", "block", "columns"])
def test_hostile_logits(way, hostile):
    shape = {"few": (40, 7), "warp": (3, 301), "block": (1, 1030), "columns": (1, 9, 40)}[way]
    x, target = numbers(*shape), classes(shape[0], *shape[2:], k=shape[1], ignored=0)
    index = target.unsqueeze(1)
    if hostile in ("nan", "inf"):
        x[0, 3] = float(hostile)
    elif hostile == "all -inf":
        x[-1] = -torch.inf
    elif hostile == "-inf at the target":
        x.scatter_(1, index, -torch.inf)
    elif hostile == "-inf at all others":
        x = torch.full_like(x, -torch.inf).scatter_(1, index, 3.0)
    else:
        value = {"-inf": -torch.inf, "largest negative": torch.finfo(torch.float32).min, "huge": 3e38}[
            hostile
        ]
        x[:, : shape[1] // 2] = value
    for eps in (0.0, 0.1):
        loss, grad, _, _ = run(x, target, reduction="none", eps=eps)
        theirs = x.double().requires_grad_()
        expected = torch.nn.functional.cross_entropy(theirs, target, reduction="none", label_smoothing=eps)
        expected.sum().backward()
        expected, expected_grad = expected.detach().reshape(-1).float(), theirs.grad.float()
        assert torch.equal(loss.isfinite(), expected.isfinite()) and torch.equal(
            loss.isnan(), expected.isnan()
        )
        assert torch.allclose(loss[loss.isfinite()], expected[expected.isfinite()], rtol=1e-5, atol=1e-6)
        finite = expected_grad.isfinite()
        assert torch.equal(finite, grad.isfinite())
        assert torch.allclose(grad[finite], expected_grad[finite], rtol=1e-4, atol=1e-6)


def test_a_class_without_target_mass_may_be_minus_inf():
    # The three as in test_unaligned.
    for shape in ((150, 7), (3, 301), (1, 21, 137)):
        x, target = numbers(*shape), torch.full((shape[0], *shape[2:]), 2)
        x[:, 1] = -torch.inf
        weight = torch.ones(shape[1])
        weight[1] = 0
        check(x, target, weight=weight, eps=0.1, loss_ulps=4)
        soft = numbers(*shape, seed=4).softmax(1)
        soft[:, 1] = 0
        check(x, soft, loss_ulps=4)
        x[:, 1], x[:, 2] = 0, -torch.inf
        check(x, target, eps=1.0, others=True, loss_ulps=4)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("zero", [False, True])
def test_no_row_counts(zero, reduction):
    # The three as in test_unaligned, and no row.
    for shape in ((20, 7), (3, 301), (0, 5), (1, 21, 137)):
        x, target = numbers(*shape), torch.full((shape[0], *shape[2:]), -100)
        loss, grad, lse, _ = run(x, target, reduction=reduction, zero=zero)
        if reduction == "none":
            assert loss.shape == (target.numel(),) and (loss == 0).all()
        else:
            assert loss.isnan() if reduction == "mean" and not zero else loss == 0
        assert (grad == 0).all() and (lse == 0).all()
    loss, _, _, _ = run(numbers(0, 5), numbers(0, 5), reduction=reduction, zero=zero)
    assert loss.numel() == 0 or (loss.isnan() if reduction == "mean" and not zero else loss == 0)
    check(numbers(9, 4), classes(9, k=4), weight=torch.zeros(4), zero=True, reduction=reduction)


def test_one_class():
    check(numbers(300, 1), torch.zeros(300, dtype=torch.int64), eps=0.1)


@pytest.mark.parametrize("weighted", [False, True])
# The three as in test_unaligned, and rows of many classes.
@pytest.mark.parametrize("shape", [(20, 7), (3, 301), (2, 2051), (1, 21, 137)], ids=str)
def test_class_index_out_of_range(shape, weighted):
    """Nothing is read or written out of bounds; the row's loss and gradient are NaN, every other row is
    right.
    """
    x, target = numbers(*shape), classes(shape[0], *shape[2:], k=shape[1], ignored=0)
    weight = numbers(shape[1], seed=2).abs() if weighted else None
    wrong = (0,) * target.dim(), (-1,) * target.dim()
    good = target.clone()
    for at, value in zip(wrong, (shape[1], -(2**40)), strict=True):
        target[at] = value
        good[at] = -100
    loss, grad, _, _ = run(x, target, weight=weight, reduction="none")
    expected, expected_grad, _, _ = exact(x, good, weight=weight, reduction="none")
    bad = good.reshape(-1) == -100
    assert torch.equal(loss.isnan(), bad) and torch.allclose(loss[~bad].double(), expected[~bad], rtol=1e-5)
    rows, expected_rows = (t.movedim(1, -1).reshape(-1, shape[1]) for t in (grad, expected_grad))
    assert rows[bad].isnan().all() and torch.allclose(
        rows[~bad].double(), expected_rows[~bad], rtol=1e-4, atol=1e-7
    )
    for reduction in ("mean", "sum"):
        loss, grad, _, _ = run(x, target, weight=weight, reduction=reduction)
        rows = grad.movedim(1, -1).reshape(-1, shape[1])
        assert loss.isnan() and rows[bad].isnan().all() and rows[~bad].isfinite().all()


def test_a_debug_build_names_the_op():
    run(numbers(4, 7), torch.tensor([0, 6, -100, 2]), debug=True)
    with pytest.raises(AssertionError, match="device assert failed"):
        run(numbers(4, 7), torch.tensor([0, 7, 1, 2]), debug=True)
    library = Path(interpreted("cross_entropy", debug=True).library._name).read_bytes()
    assert ", ".join(str(letter) for letter in b"cross_entropy: class index out of range").encode() in library


@pytest.mark.parametrize("loss_dtype", DTYPES)
def test_loss_dtype(loss_dtype):
    for reduction in ("none", "mean"):
        x, target = numbers(40, 7, dtype=torch.bfloat16), classes(40, k=7)
        loss, _, _, _ = run(x, target, reduction=reduction, loss_dtype=loss_dtype, with_grad=False)
        wide, _, _, _ = run(x, target, reduction=reduction, with_grad=False)
        assert loss.dtype == loss_dtype and torch.equal(loss, wide.to(loss_dtype))


def test_sums_of_many_rows():
    """Several blocks add up; the sum is right to the last bit, and the number of rows exact."""
    x, target = numbers(9000, 2), classes(9000, k=2)
    rows, _, _, _ = run(x, target, reduction="none", with_grad=False)
    for reduction, n in (("sum", 1), ("mean", (target != -100).sum())):
        loss, _, _, _ = run(x, target, reduction=reduction, with_grad=False)
        assert abs(loss.double() / (rows.double().sum() / n) - 1) < 2.0**-23
    rows[7] = torch.inf
    x[7] = torch.tensor([0.0, -torch.inf])
    target[7] = 1
    assert run(x, target, with_grad=False)[0] == torch.inf


def test_the_same_bits_in_every_schedule():
    # The three as in test_unaligned, and a row of many classes.
    for shape in ((40, 7), (2, 301), (1, 1030), (1, 9, 40)):
        x, target = numbers(*shape), classes(shape[0], *shape[2:], k=shape[1])
        first, *others = (run(x, target, schedule=s, eps=0.1)[:3] for s in SCHEDULES)
        assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4, 8192), (4, 8191), (2048, 10), (512, 63), (1, 24, 2048)], ids=str)
def test_bytes_moved(shape, dtype):
    """The floor of the header: of each logit and its gradient, and of each row."""
    x, target = numbers(*shape, dtype=dtype), classes(shape[0], *shape[2:], k=shape[1], ignored=0)
    _, grad, _, reports = run(x, target)
    statistics = max(dtype.itemsize, 4)
    rows = target.numel()
    floor = x.numel() * (dtype.itemsize + grad.element_size()) + rows * (8 + 8 + 3 * statistics)
    # Few rows: a sector for a number, read by each warp. A warp's 32 numbers of float64 in a row off
    # alignment lie in 9 sectors.
    of_rows = floor if rows > 100 else floor + 1000 * rows
    most = 1.05 * (9 / 8 if dtype == torch.float64 and shape[1] % 4 else 1)
    assert floor <= traffic(reports) <= most * of_rows, reports[-3]
    _, _, _, reports = run(x, target, with_grad=False, reduction="none")
    floor = x.numel() * dtype.itemsize + rows * (8 + 2 * statistics)
    of_rows = floor if rows > 100 else floor + 1000 * rows
    assert floor <= traffic(reports) <= most * of_rows, reports[0]


def test_a_long_row_is_read_twice():
    x = numbers(1, 100_000, dtype=torch.bfloat16)
    _, _, _, reports = run(x, torch.tensor([5]), reduction="none")
    assert 600_000 <= traffic(reports) <= 1.05 * 600_000


@pytest.mark.parametrize("layout", ["rows", "few", "columns"])
def test_more_than_2_31_elements(layout):
    n, k = {"rows": (70_001, 32_768), "few": (2**29 + 77, 4), "columns": (2**28 + 37, 9)}[layout]
    threads = 1 if layout == "rows" else 128
    written = {}

    def value(i):
        return ((i % 251) * 0.03125 - 4).astype(np.float32)

    def arguments(machine):
        virtual = machine.device.virtual
        x = virtual(4 * n * k, "x", lambda offsets, width: value(offsets // 4))
        target = virtual(8 * n, "target", lambda offsets, width: (offsets // 8 % k).astype(np.int64))
        grad, loss, lse = virtual(4 * n * k, "grad"), virtual(4 * n, "loss"), virtual(4 * n, "lse")
        written.update(grad=grad, loss=loss, lse=lse)
        strides = Strides(0, 1, n) if layout == "columns" else Strides(0, k, 1)
        args = CrossEntropyArgs(
            ignore_index=-100,
            logits=x.addr,
            grad=grad.addr,
            target=target.addr,
            outer=1,
            inner=n,
            classes=k,
            logits_stride=strides,
            grad_stride=strides,
            mix=1.0,
            grad_factor=1.0,
        )
        return CrossEntropyLaunch(args, CrossEntropyReduction(0, False), 0, loss.addr, lse.addr, None)

    last = (n - 1) // threads
    interpreted("cross_entropy").run(
        "cross_entropy_forward_cuda", arguments, CrossEntropyLaunch, blocks=sorted({0, last % 2**20})
    )
    rows, loss = written["loss"].writes(np.float32)
    at, grad = written["grad"].writes(np.float32)
    assert rows.max() == n - 1 and at.max() == n * k - 1 and len(at) == len(rows) * k == len(set(at.tolist()))
    index = (
        np.arange(k)[None, :] * n + rows[:, None] if layout == "columns" else rows[:, None] * k + np.arange(k)
    )
    x, target = torch.from_numpy(value(index)), torch.from_numpy(rows % k)
    expected, expected_grad, _, _ = exact(x, target, reduction="none")
    assert torch.allclose(torch.from_numpy(loss).double(), expected, rtol=1e-6)
    order, wanted = np.argsort(at), np.argsort(index.reshape(-1))
    assert np.array_equal(at[order], index.reshape(-1)[wanted])
    assert np.allclose(grad[order], expected_grad.numpy().reshape(-1)[wanted], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [1.0, 0.375, math.inf])
def test_scale(dtype, factor):
    for n, misaligned in ((5003, 0), (300, dtype.itemsize), (0, 0)):
        x, slots = numbers(n, dtype=dtype), {}
        x[::7] = 0  # as in ignored rows, which get nothing of a factor of inf
        for factor_dtype in DTYPES:

            def arguments(machine, x=x, n=n, misaligned=misaligned, factor_dtype=factor_dtype, slots=slots):
                slots["x"] = machine.put(x, "x", offset=misaligned, readonly=False)
                g = machine.put(torch.tensor(factor, dtype=factor_dtype), "g")
                return CrossEntropyScale(
                    dtype_number(dtype), dtype_number(factor_dtype), slots["x"].at, n, g.at
                )

            reports = interpreted("cross_entropy").run(
                "cross_entropy_scale_cuda", arguments, CrossEntropyScale
            )
            assert torch.equal(slots["x"].result(), torch.where(x == 0, 0, x * factor))
            if factor == 1 and n:
                assert traffic(reports) < 3000  # the factor alone, by each warp


def for_the_table(dtype):
    """What tests/cuda_table.py takes: (what, dtype, elements, floor in bytes, reports, op)."""
    for what, shape in {
        "a row per block": (8, 32_000),
        "a row per warp": (256, 1000),
        "a row per thread": (16_384, 10),
        "pixels": (1, 24, 8192),
        "rows beyond shared memory": (2, 131_072),
    }.items():
        x, target = numbers(*shape, dtype=dtype), classes(shape[0], *shape[2:], k=shape[1], ignored=0)
        _, grad, _, reports = run(x, target, reduction="none", eps=0.1)
        floor = x.numel() * (dtype.itemsize + grad.element_size()) + target.numel() * 16
        yield (
            f"cross-entropy with gradient, {what} {shape}",
            dtype,
            x.numel(),
            floor,
            reports,
            "cross_entropy",
        )


# What tests/test_cuda_mutations.py breaks: the text of the kernel, what stands there instead, which test must
# fail, and what it must say.
MUTATIONS = {
    "missing barrier": (
        "  __syncthreads();\n  if (threadIdx.x >= kLanes) return;",
        "  if (threadIdx.x >= kLanes) return;",
        test_sums_of_many_rows,
        "race",
    ),
}
