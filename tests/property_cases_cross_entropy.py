"""Checks of cross-entropy for tests/test_properties.py: its operators, and the loss of a linear layer."""

import math

import torch
from helpers import DTYPES
from hypothesis import strategies as st
from property_cases import (
    assert_near,
    doubled,
    one_of,
    op,
    plain,
    random_of,
    shape,
    tensor,
    unchanged,
    values,
    wide_of,
)

import fastreg as fr
from fastreg._cross_entropy import LossOptions


def classes(draw, rows, count, soft, dtype):
    """(targets of `rows`, index -100 among them; the index that is ignored)."""
    random = random_of(draw)
    if soft:
        p = random.random((*rows[:1], count, *rows[1:])) + 1e-3
        return torch.from_numpy(p / p.sum(1, keepdims=True)).to(dtype)
    target = random.integers(0, count, rows)
    target[random.random(rows) < one_of(draw, 0.0, 0.3)] = -100
    return torch.from_numpy(target)


def loss_options(draw, count):
    eps = one_of(draw, 0.0, 0.1, 1.0)
    return [-100, eps, draw(st.booleans()) and count > 1, one_of(draw, 0.0, 0.0, 1e-3)]


def loss_sizes(x, target, weight, options):
    """(of each row: what its loss adds up, what its gradient adds up), in float64."""
    count, z_loss, dtype = x.shape[1], options[-1], x.dtype
    x = x.double()
    lse = x.logsumexp(1).abs()
    lse = torch.where(lse.isfinite(), lse, 0.0)
    sizes = torch.where(x.isfinite(), x.abs(), 0.0)
    furthest = sizes.amax(1) + lse + math.log(count)
    heaviest = 1.0 if weight is None else weight.double().max()
    terms, square = heaviest * furthest, z_loss * lse**2
    if dtype != torch.float64:  # what overflows float32 before weights, shares or z_loss make it smaller
        most = torch.finfo(torch.float32).max
        terms = torch.where(sizes.sum(1) + count * lse > most, 1e39, terms)
        square = torch.where(lse**2 > most, 1e39, square) if z_loss else square
    return terms + square, heaviest + 2 * z_loss * (lse + 1)


def loss_arguments(draw, size, dtype):
    rows, count = (size[0], *size[2:]), size[1]
    target = classes(draw, rows, count, draw(st.booleans()), dtype)
    wide = wide_of(dtype)
    weight = torch.from_numpy(random_of(draw).random(count) + 0.1).to(wide) if draw(st.booleans()) else None
    return target, weight, loss_options(draw, count)


def cross_entropy(draw):
    """Through the public function, which takes any strides; the loss and its gradient."""
    dtype = one_of(draw, *DTYPES)
    size = one_of(draw, 0, 1, 2, 5, 17), one_of(draw, 1, 2, 3, 8, 10, 17, 100, 1000, 5001)
    size += one_of(draw, (), (), (1,), (3,), (7, 2)) if size[1] < 1000 else ()
    x = tensor(draw, size, dtype, most=30)
    target, weight, options = loss_arguments(draw, size, dtype)
    reduction = one_of(draw, 0, 1, 2)
    names = dict(
        zip(("ignore_index", "label_smoothing", "z_loss"), (options[0], options[1], options[3]), strict=True)
    )
    names["smoothing"] = "others" if options[2] else "uniform"
    leaf = x.clone().requires_grad_() if draw(st.booleans()) else x.detach().requires_grad_()
    weighed = weight if weight is None else weight.to(dtype)
    with unchanged(x, target, weighed):
        loss = fr.cross_entropy(leaf, target, weighed, reduction=("none", "mean", "sum")[reduction], **names)
        (grad,) = torch.autograd.grad(loss.sum(), leaf)
    with torch.no_grad():
        arguments = x.double(), *doubled(target, weighed), reduction, *options
        want, want_grad, _ = plain("cross_entropy")(*arguments, False, torch.float64, True)
        of_loss, of_grad = loss_sizes(x, target, weighed, options)
        if reduction:
            of_loss = of_loss.sum()
        if reduction == 1 and want.isfinite():
            divisor = size[0] * math.prod(size[2:])
            if not target.is_floating_point():
                counted = target != -100
                one = torch.ones(size[1]).double() if weight is None else weighed.double()
                divisor = one[target.where(counted, 0)].masked_select(counted).sum()
            of_loss, of_grad = of_loss / divisor, of_grad / divisor
    assert_near(loss.detach(), want, of_loss + torch.zeros_like(want), "loss", noise=2)
    assert_near(
        grad, want_grad, (of_grad + torch.zeros_like(of_grad)).unsqueeze(1).expand(size), "gradient", 2, 1e-37
    )


def cross_entropy_in_place(draw):
    """The operator of the linear cross-entropy, on dense rows."""
    dtype = one_of(draw, *DTYPES)
    size = one_of(draw, 0, 1, 2, 5, 17), one_of(draw, 1, 2, 3, 8, 17, 100, 1000, 5001)
    x = values(draw, size, dtype, most=30)
    target, weight, options = loss_arguments(draw, size, dtype)
    factor = values(draw, size[:1], wide_of(dtype), most=1, hostile=False)
    got = x.clone()
    with unchanged(target, weight, factor):
        losses = op("cross_entropy_")(got, target, factor, weight, *options)
    want_grad = x.double().clone()
    want = plain("cross_entropy_")(want_grad, *doubled(target, factor, weight), *options)
    of_loss, of_grad = loss_sizes(x, target, weight, options)
    assert_near(losses, want, of_loss, "loss", noise=2)
    assert_near(got, want_grad, (of_grad * factor.double()).unsqueeze(1).expand(size), "gradient", 2, 1e-37)


def sharded_rows(draw):
    """(logits of some of the classes, targets as the sharded operators take them, weight, (mix, base))."""
    dtype = one_of(draw, *DTYPES)
    rows, count, others = one_of(draw, 0, 1, 2, 5, 17), one_of(draw, 1, 2, 3, 8, 17, 100, 1000, 5001), 3
    gap = one_of(draw, 0, 1, 5)  # padding beside the classes
    x = values(draw, (rows, count + gap), dtype, most=30)[:, :count]
    target = classes(draw, (rows,), count, draw(st.booleans()), dtype)
    if not target.is_floating_point():
        kind = torch.from_numpy(random_of(draw).random(rows))
        target = torch.where(kind < 0.3, -1, torch.where(target == -100, -2, target))
    weight = torch.from_numpy(random_of(draw).random(count) + 0.1).to(wide_of(dtype))
    eps, smoothing = one_of(draw, 0.0, 0.1, 1.0), draw(st.booleans())
    options = LossOptions(label_smoothing=eps, others=smoothing).mix_and_base(count + others)
    return x, target, weight if draw(st.booleans()) else None, options


def sharded_sums(draw):
    """What a rank sends of its classes. An exponential is as wrong as the distance before it was rounded."""
    x, target, weight, (mix, base) = sharded_rows(draw)
    with unchanged(x, target, weight):
        got = op("cross_entropy_sharded_sums")(x, target, weight, mix, base)
    want = plain("cross_entropy_sharded_sums")(x.double(), *doubled(target, weight), mix, base)
    reach = (x.double() - want[0].unsqueeze(1)).abs()
    reach = torch.where(reach.isfinite(), reach, 0).amax(1)
    if x.dtype != torch.float64:
        reach = torch.where(reach > torch.finfo(torch.float32).max, 1e50, reach)
    heaviest = 1.0 if weight is None else weight.double().max()
    assert_near(got[1], want[1], 90 * want[1], "rest", tiny=1e-37)
    known = ~want[1].isnan()  # else the row is NaN, whatever the other numbers are
    assert torch.equal(got[0, known].double(), want[0, known])
    for row, share in ((2, 1.0), (3, base * x.shape[1])):
        size = heaviest * (share + 1 if target.is_floating_point() else max(share, 1.0)) * (reach + 1)
        assert_near(got[row, known], want[row, known], size[known], f"sum {row}", noise=2)


def sharded_gradient(draw):
    """The gradient, of rows of which this rank has all classes but three, or in place of the logits."""
    x, target, weight, (mix, base) = sharded_rows(draw)
    wide = wide_of(x.dtype)
    top, rest, _, mass = plain("cross_entropy_sharded_sums")(x.double(), *doubled(target, weight), mix, base)
    rest = rest + one_of(draw, 0.0, 1e-6, 3.0)  # of the other ranks
    others = mass
    if not target.is_floating_point():
        mass = torch.full_like(top, 1.5)
        of_target = 1.0 if weight is None else weight.double()[target.clamp(min=0)]
        others = mass - (mix + base) * of_target
    factor = values(draw, x.shape[:1], wide, most=1, hostile=False)
    pull = one_of(draw, 0.0, 1e-3) * torch.where(top.isfinite(), top, 1.0)
    whole = torch.stack((top, rest, mass, others, pull, factor.double())).to(wide)
    got = x if draw(st.booleans()) else torch.empty_like(x, dtype=wide if x.dtype == torch.float16 else None)
    want = torch.empty(x.shape, dtype=torch.float64)
    plain("cross_entropy_sharded_grad_")(want, x.double(), *doubled(target, weight, whole), mix, base)
    with unchanged(target, weight, whole):
        op("cross_entropy_sharded_grad_")(got, x, target, weight, whole, mix, base)
    heaviest = 1.0 if weight is None else weight.double().max()
    size = whole[5].double().abs() * (whole[2].double() + heaviest + whole[4].double().abs())
    assert_near(got, want, size.unsqueeze(1).expand(x.shape), "gradient", noise=6, tiny=1e-37)


def cross_entropy_scale(draw):
    """0 stays 0, whatever the factor; what is below float32's normal numbers counts as 0."""
    x = values(draw, shape(draw), one_of(draw, *DTYPES))
    factor, got = one_of(draw, 1.0, 0.3, 0.0, math.inf), x.clone()
    op("cross_entropy_scale_")(got, torch.tensor(factor))
    least = 0.0 if x.dtype == torch.float64 else 2.0**-126
    zero = (x == 0) | (x.double().abs() < least)
    want = torch.where(zero, 0, x.double() * torch.tensor(factor).double())
    assert_near(got, want, want, tiny=least)


def linear_cross_entropy(draw):
    """Its loss and gradients against torch's own in float64. 16-bit logits are rounded on the way."""
    dtype = one_of(draw, torch.float32, torch.float64)
    rows, width, count = one_of(draw, 1, 2, 5, 70), one_of(draw, 1, 3, 16), one_of(draw, 2, 5, 33)
    hidden, weight = (tensor(draw, s, dtype, most=1, hostile=False) for s in ((rows, width), (count, width)))
    bias = values(draw, (count,), dtype, most=1, hostile=False) if draw(st.booleans()) else None
    target = classes(draw, (rows,), count, draw(st.booleans()), dtype)
    eps, reduction = one_of(draw, 0.0, 0.1), one_of(draw, "mean", "sum", "none")
    if not target.is_floating_point():
        target[0] = 0  # a mean over no row is NaN
    results = []
    for wide in (dtype, torch.float64):
        leaves = [t.detach().to(wide).requires_grad_() for t in (hidden, weight, bias) if t is not None]
        if wide is dtype and not results:
            loss = fr.linear_cross_entropy(
                leaves[0], leaves[1], target, *leaves[2:], label_smoothing=eps, reduction=reduction
            )
        else:
            logits = torch.nn.functional.linear(*leaves)
            each = target.double() if target.is_floating_point() else target
            loss = torch.nn.functional.cross_entropy(logits, each, label_smoothing=eps, reduction=reduction)
        results.append([loss.detach(), *torch.autograd.grad(loss.sum(), leaves)])
    reach = 1 + hidden.abs().max().double() * weight.abs().max().double() * width
    reach = reach + (0 if bias is None else bias.abs().max().double())
    terms = (1.0, *(1 + t.abs().max().double() for t in (weight, hidden)), 1.0)
    for got, want, term in zip(*results, terms, strict=False):
        assert_near(got, want, (rows * reach * term).expand(want.shape), noise=4, tiny=1e-37)


CHECKS = {
    "cross_entropy": cross_entropy,
    "cross_entropy_": cross_entropy_in_place,
    "cross_entropy_scale_": cross_entropy_scale,
    "cross_entropy_sharded_sums": sharded_sums,
    "cross_entropy_sharded_grad_": sharded_gradient,
}
OTHERS = {"linear_cross_entropy": linear_cross_entropy}
WITHOUT_DERIVATIVE = {
    "cross_entropy_": "a part of linear_cross_entropy",
    "cross_entropy_scale_": "a part of the backward pass",
    "cross_entropy_sharded_sums": "a part of the loss of split classes",
    "cross_entropy_sharded_grad_": "a part of the loss of split classes",
}
