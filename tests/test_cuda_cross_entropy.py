"""The CUDA kernels of cross-entropy, executed without a GPU, against the formula in float64."""

import numpy as np
import pytest
import torch
from cuda_machine import DTYPES, SCHEDULES, dtype_number, interpreted, needs_cudacheck, needs_nvcc, structure, traffic

pytestmark = [needs_cudacheck, needs_nvcc]

Strides = structure("Strides", "int64 outer, position, cls")
CrossEntropyArgs = structure(
    "CrossEntropyArgs",
    """int dtype, target_dtype
    pointer logits, grad, target, soft_target, weight, row_loss, row_lse
    int64 outer, positions, classes
    Strides logits_stride, grad_stride, target_stride
    int64 ignore_index
    double mix, base, z_loss, grad_factor
    pointer row_factor""",
    Strides=Strides,
)
CrossEntropyLaunch = structure(
    "CrossEntropyLaunch",
    """CrossEntropyArgs rows
    int64 reduction
    bool all_ignored_zero
    int loss_dtype
    pointer loss, lse, scratch""",
    CrossEntropyArgs=CrossEntropyArgs,
)
CrossEntropyScale = structure("CrossEntropyScale", "int dtype, factor_dtype\npointer values\nint64 numel\npointer factor")
SUM_BLOCKS = 256


def coefficients(k, eps, others):
    spread = 0.0 if eps == 0 else eps / (k - 1 if others else k)
    return 1 - eps - (spread if others else 0.0), spread


def run(x, target, weight=None, reduction="mean", ignore_index=-100, eps=0.0, others=False, z_loss=0.0, zero=False,
        loss_dtype=None, with_grad=True, row_factor=None, in_place=False, like=None, misaligned=0, debug=False, **options):  # fmt: skip
    """(loss, grad, lse, reports) of the CUDA launcher. x: (N, C) or (N, C, positions); like: the form of the gradient."""
    statistics = torch.float64 if x.dtype == torch.float64 else torch.float32
    n, k = x.shape[:2]
    positions = x.shape[2] if x.dim() == 3 else n
    outer = n if x.dim() == 3 else 1
    rows = outer * positions
    soft = target.is_floating_point()
    like = torch.empty_like(x) if like is None else like
    if x.dtype == torch.float16:
        like = torch.empty_strided(like.shape, like.stride(), dtype=torch.float32)
    loss_dtype = loss_dtype or statistics
    loss = torch.empty(rows if reduction == "none" else (), dtype=loss_dtype)
    slots = {}

    def strides(t):
        return Strides(0, *t.stride()) if t.dim() == 2 else Strides(t.stride(0), t.stride(2), t.stride(1))

    def arguments(machine):
        slots["x"] = machine.put(x, "x", offset=misaligned, readonly=not in_place)
        if with_grad:
            slots["grad"] = slots["x"] if in_place else machine.room(like, "grad", offset=misaligned * like.element_size() // x.element_size())
        slots["target"] = machine.put(target, "target")
        for name, tensor in (("weight", weight), ("row_factor", row_factor)):
            if tensor is not None:
                slots[name] = machine.put(tensor, name)
        slots["loss"] = machine.room(loss, "loss")
        slots["lse"] = machine.room(torch.empty(rows, dtype=statistics), "lse")
        if reduction != "none":
            slots["scratch"] = machine.room(torch.empty(2 + 2 * SUM_BLOCKS + rows, dtype=statistics), "scratch")
        at = {name: slot.at for name, slot in slots.items()}
        mix, base = coefficients(k, eps, others)
        form = slots["grad"].like if with_grad else x
        args = CrossEntropyArgs(
            dtype_number(x.dtype), dtype_number(target.dtype) if soft else 0,
            at["x"], at.get("grad"), None if soft else at["target"], at["target"] if soft else None, at.get("weight"), None, None,
            outer, positions, k, strides(x), strides(form), strides(target) if soft else Strides(),
            ignore_index, mix, base, z_loss, 1.0, at.get("row_factor"),
        )  # fmt: skip
        number = ("none", "mean", "sum").index(reduction)
        return CrossEntropyLaunch(
            args, number, zero, dtype_number(loss_dtype), at["loss"], at["lse"], at.get("scratch")
        )

    reports = interpreted("cross_entropy", debug).run("cross_entropy_forward_cuda", arguments, CrossEntropyLaunch, **options)
    grad = slots["grad"].result() if with_grad else None
    return slots["loss"].result(), grad, slots["lse"].result(), reports


def exact(x, target, weight=None, reduction="mean", ignore_index=-100, eps=0.0, others=False, z_loss=0.0, zero=False,
          row_factor=None, **_):  # fmt: skip
    """(loss, grad, lse) in float64, rows in the order of the kernel; loss of each row if reduction is none."""
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
    q = w * (mix * t + base)
    if mix + base == 0:
        q = torch.where(t == 1, 0, q)
    # One largest logit apart from the others: where they are small, float64 itself would lose them beside it.
    top, at = x.max(1, keepdim=True)
    e = (x - top).exp()
    others = e.scatter(1, at, 0).sum(1, keepdim=True)
    lse, not_p = (top + others.log1p())[:, 0], (others + (1 - e)) / (1 + others)
    loss = torch.where(q == 0, 0, q * (others.log1p() - (x - top))).sum(1) + z_loss * lse**2
    factor = 1.0 if reduction != "mean" else 0.0 if normaliser == 0 and zero else 1 / normaliser if normaliser else torch.nan
    factor = torch.full_like(loss, factor) if row_factor is None else row_factor.double()
    q_sum = q.sum(1, keepdim=True)
    grad = ((q_sum - q) - q_sum * not_p + 2 * z_loss * lse[:, None] * e / (1 + others)) * factor[:, None]
    grad = torch.where(q == 0, (q_sum + 2 * z_loss * lse[:, None]) * e / (1 + others) * factor[:, None], grad)
    loss, lse, grad = torch.where(keep, loss, 0), torch.where(keep, lse, 0), torch.where(keep[:, None], grad, 0)
    if reduction == "sum":
        loss = loss.sum()
    elif reduction == "mean":
        loss = loss.sum() * 0 if normaliser == 0 and zero else loss.sum() / normaliser
    return loss, grad.reshape(shape).movedim(-1, 1), lse


def ulps(value, expected, unit, magnitude=None):
    """The largest error of what is finite, in units of the last place of the expected value, or of a larger magnitude that it is
    made of; the rest must be the same."""
    odd = ~expected.isfinite()
    assert torch.equal(torch.nan_to_num(value[odd].double(), 1.5), torch.nan_to_num(expected[odd], 1.5))
    if odd.all():
        return 0.0
    magnitude = expected.abs() if magnitude is None else torch.maximum(expected.abs(), magnitude)
    spacing = torch.exp2(magnitude.clamp(min=2.0**-126).log2().floor()) * torch.finfo(unit).eps
    return ((value.double() - expected).abs() / spacing)[~odd].max().item()


def check(x, target, loss_ulps=2.0, grad_tolerance=2.0**-20, grad_floor=0.0, **options):
    """Runs and compares; gives the reports. The gradient's tolerances, relative and absolute, are those of float32."""
    loss, grad, lse, reports = run(x, target, **options)
    expected_loss, expected_grad, expected_lse = exact(x, target, **options)
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
        allowed = (rounding + grad_tolerance * scale) * expected_grad.abs() + grad_floor * scale + 2 * tiny
        worst = (error / allowed)[~(grad.isnan() & expected_grad.isnan())].max().item()
        assert worst <= 1
    return reports


def numbers(*shape, dtype=torch.float32, seed=0, scale=3.0):
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


def classes(*shape, k, ignored=0.2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(k, shape, generator=generator)
    return target.where(torch.rand(shape, generator=generator) >= ignored, -100)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(300, 3), (5, 65), (3, 5003), (2, 19, 201)], ids=str)
def test_every_schedule(shape, dtype, schedule):
    x = numbers(*shape, dtype=dtype)
    check(x, classes(shape[0], *shape[2:], k=shape[1]), schedule=schedule)
