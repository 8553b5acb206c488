"""The CUDA kernels for rows of which a rank has some of the classes, executed without a GPU, against the
definition in plain torch in float64.
"""

import pytest
import torch
from cuda_machine import DTYPES, SCHEDULES, dtype_number, interpreted, needs_nvcc, structure, traffic
from test_cuda_cross_entropy import CrossEntropyArgs, Strides

from fastreg import _registry

pytestmark = needs_nvcc

ShardedArgs = structure("ShardedArgs", "pointer sums, whole", base=CrossEntropyArgs)
# One warp for a row; several, with rests beside the words; and no word at all.
SHAPES = ((5, 37), (2, 4099), (3, 3))


def plain(name):
    return _registry.plain_definition(f"cross_entropy_sharded_{name}")


def inputs(rows, k, dtype, soft=False, weighted=False):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = (3 * torch.randn(rows, k)).to(dtype)
    target = torch.arange(rows) * 7 % (k + 2) - 2  # -2: does not count, -1: on another rank
    if soft:
        target = torch.softmax(torch.randn(rows, k), 1)
    return x, target, (torch.rand(k) + 0.5).to(wide) if weighted else None


def launch(x, target, weight, mix, base, whole=None, in_place=False, misaligned=0, **options):
    """(what the launcher wrote, reports): the sums, or with `whole` the gradient."""
    statistics = torch.float64 if x.dtype == torch.float64 else torch.float32
    slots, (rows, k) = {}, x.shape
    soft = target.is_floating_point()
    like = torch.empty_like(x, dtype=statistics if x.dtype == torch.float16 and not in_place else None)

    def arguments(machine):
        slots["x"] = machine.put(x, "x", offset=misaligned * x.itemsize, readonly=not in_place)
        slots["target"] = machine.put(target, "target")
        if weight is not None:
            slots["weight"] = machine.put(weight, "weight")
        if whole is None:
            slots["out"] = machine.room(torch.empty(4, rows, dtype=statistics), "sums")
        else:
            slots["whole"] = machine.put(whole, "whole")
            offset = misaligned * like.itemsize
            slots["out"] = slots["x"] if in_place else machine.room(like, "grad", offset=offset)
        at = {name: slot.at for name, slot in slots.items()}
        return ShardedArgs(
            dtype=dtype_number(x.dtype),
            target_dtype=dtype_number(target.dtype) if soft else 0,
            logits=at["x"],
            grad=None if whole is None else at["out"],
            target=None if soft else at["target"],
            soft_target=at["target"] if soft else None,
            weight=at.get("weight"),
            outer=1,
            inner=rows,
            classes=k,
            logits_stride=Strides(0, k, 1),
            grad_stride=Strides(0, k, 1),
            target_stride=Strides(0, k, 1),
            mix=mix,
            base=base,
            grad_factor=1.0,
            sums=at["out"],
            whole=at.get("whole"),
        )

    launcher = f"cross_entropy_sharded_{'sums' if whole is None else 'gradient'}_cuda"
    reports = interpreted("cross_entropy").run(launcher, arguments, ShardedArgs, **options)
    return slots["out"].result(), reports


def whole_of(x, target, weight, mix, base):
    """What the ranks would find out together, were this one's classes all but a few."""
    doubled = [t.double() if t is not None and t.is_floating_point() else t for t in (target, weight)]
    top, rest, _, mass = plain("sums")(x.double(), *doubled, mix, base)
    others = mass
    if not target.is_floating_point():
        of_target = 1.0 if weight is None else doubled[1][target.clamp(min=0)]
        mass = torch.full_like(top, 2.0)
        others = mass - (mix + base) * of_target
    whole = torch.stack((top + 0.5, rest + 0.25, mass, others, *torch.rand(2, len(x)).double()))
    return whole.to(torch.float64 if x.dtype == torch.float64 else torch.float32), doubled


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("soft, weighted", ((0, 0), (0, 1), (1, 1)))
def test_values(shape, soft, weighted, dtype):
    """Smoothed, without smoothing, and where the target has no mass; at any address, and in place."""
    x, target, weight = inputs(*shape, dtype, soft, weighted)
    for mix, base, misaligned in ((0.9, 0.1 / 5000, 0), (1.0, 0.0, 1), (-0.01, 0.01, 3)):
        if soft and mix < 0:
            continue
        whole, (wide_target, wide_weight) = whole_of(x, target, weight, mix, base)
        want = plain("sums")(x.double(), wide_target, wide_weight, mix, base)
        got, _ = launch(x, target, weight, mix, base, misaligned=misaligned)
        tolerance = 1e-12 if dtype == torch.float64 else 3e-6
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=10 * tolerance)
        want = torch.empty(shape, dtype=torch.float64)
        plain("grad_")(want, x.double(), wide_target, wide_weight, whole.double(), mix, base)
        for in_place in (False, True):
            got, _ = launch(
                x.clone(), target, weight, mix, base, whole, in_place, misaligned,
            )  # fmt: skip
            rounding = max(tolerance, torch.finfo(got.dtype).eps)
            torch.testing.assert_close(got.double(), want, rtol=rounding, atol=tolerance)


def test_schedules():
    """In whatever order threads go on, the bits are the same."""
    x, target, weight = inputs(2, 4099, torch.bfloat16)
    whole, _ = whole_of(x, target, weight, 0.9, 0.1 / 5000)
    for more in ({}, {"whole": whole}):
        results = [launch(x, target, weight, 0.9, 0.1 / 5000, schedule=each, **more)[0] for each in SCHEDULES]
        assert all(torch.equal(results[0], other) for other in results[1:])


def test_hostile_rows():
    """A NaN, infinities, no class with a mass; where a row does not count, nothing of it is read."""
    x, target, _ = inputs(6, 300, torch.float32)
    target[:] = torch.tensor([5, 5, -2, -1, 5, 5])
    x[0, 7], x[1], x[2, 9], x[3, :] = torch.nan, -torch.inf, torch.nan, -torch.inf
    x[4, 8], x[5, 5] = torch.inf, -torch.inf
    got, _ = launch(x, target, None, 1.0, 0.0)
    want = plain("sums")(x, target, None, 1.0, 0.0)
    assert got[1, [0, 4]].isnan().all() and (got[:, 2] == 0).all()
    known = [1, 2, 3, 5]
    torch.testing.assert_close(got[:, known], want[:, known], rtol=1e-6, atol=0)
    whole = torch.stack((want[0].clamp(-3, 9).nan_to_num(9.0), *torch.ones(5, 6)))
    got, _ = launch(x, target, None, 1.0, 0.0, whole=whole)
    assert got[0].isnan().sum() == 1 and (got[2] == 0).all() and got[[1, 3, 5]].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_moved(dtype):
    x, target, _ = inputs(4, 8192, dtype)
    target.clamp_(min=-1)
    whole, _ = whole_of(x, target, None, 0.9, 0.1 / 8192)
    for more in ({}, {"whole": whole}):
        got, reports = launch(x, target, None, 0.9, 0.1 / 8192, **more)
        floor = x.nbytes + got.nbytes
        assert floor <= traffic(reports) <= 1.02 * floor + 4096


def for_the_table(dtype):
    """What tests/cuda_table.py takes: (what, dtype, elements, floor in bytes, reports, op)."""
    shape = 8, 16_000
    x, target, _ = inputs(*shape, dtype)
    target.clamp_(min=-1)
    whole, _ = whole_of(x, target, None, 0.9, 0.1 / 32_000)
    sums, gradient = (launch(x, target, None, 0.9, 0.1 / 32_000, whole=w)[1] for w in (None, whole))
    for what, reports, floor in (("sums", sums, x.nbytes), ("gradient", gradient, 2 * x.nbytes)):
        yield (
            f"cross-entropy of split classes, {what} {shape}",
            dtype,
            x.numel(),
            floor,
            reports,
            "cross_entropy",
        )
