"""Cross-entropy where digits are easily lost, and the definition of the operators in plain torch.

Proven: loss and gradient at the target keep their digits however much of the mass one class has, for rows one
after another and side by side; the kernels do what the definition does on the same numbers in float64; the
definition knows shapes and dtypes without values.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import fastreg as fr
from fastreg import _registry

OPS = torch.ops.fastreg
PLAIN = {
    name: _registry._declared[name] for name in ("cross_entropy", "cross_entropy_", "cross_entropy_scale_")
}
STATISTICS = {torch.float64: torch.float64}
# Of the loss and of the gradient, which float16 keeps in float32.
EPS = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.float16: 2.0**-23, torch.bfloat16: 2.0**-7}


def statistics(dtype):
    return STATISTICS.get(dtype, torch.float32)


def confident(shape, dtype, gap, seed=0):
    """(logits, target): the target's logit lies about `gap` above all others; differences are exact."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g, dtype=torch.float64)
    target = torch.randint(shape[1], (shape[0], *shape[2:]), generator=g)
    x.scatter_(1, target.unsqueeze(1), gap + 4.0)
    return ((x * 16).round() / 16).to(dtype), target


def exact_of_confident(x, target, mass=0.0, z_loss=0.0):
    """(loss, gradient at the target, lse) in float64, from what the other classes have. mass: q of each of
    them."""
    x, index = x.double(), target.unsqueeze(1)
    top = x.gather(1, index)
    shifted = (x - top).scatter(1, index, 0)
    others = shifted.exp().scatter(1, index, 0).sum(1)
    lse, k = top.squeeze(1) + others.log1p(), x.shape[1]
    loss = others.log1p() - mass * shifted.sum(1) + z_loss * lse**2
    missing = others / (1 + others)
    return loss, mass * (k - 1) - missing + 2 * z_loss * lse * (1 - missing), lse


def noise_of(loss, dtype):
    """Relative error of a sum of thousands of exponentials, in the kernel and, in float64, here as well.

    Where the others have a little over an eighth of the 1, the sum counts last bits of 1, 8 of their own.
    """
    others = loss.expm1()
    units = (40 if dtype == torch.float64 else 12) + torch.where(others > 0.12, 4 / others, 0)
    return units * (2.0**-52 if dtype == torch.float64 else 2.0**-23)


# 37 and 5000 classes: one vector and a rest; several blocks. Positions 1, and rows side by side in columns of
# whole vectors and a rest; more classes than columns have, which are gathered.
SHAPES = [(50, 37), (7, 5000), (3, 37, 41), (1, 4200, 20)]


@pytest.mark.parametrize("gap", [1, 3, 6, 10, 15, 22, 30, 60])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_class_has_nearly_all_the_mass(shape, gap, dtype):
    """The gradient at the target, taken as p - 1, would have the error of the last bit of 1: with a gap of 15
    no digit of float32 would be left."""
    x, target = confident(shape, dtype, gap)
    want_loss, want, _ = exact_of_confident(x, target)
    assert want.abs().max() < 1 if gap < 6 else want.abs().max() < 5000 * 2.72**-gap
    loss, grad, _ = OPS.cross_entropy(
        x, target, None, 0, -100, 0.0, False, 0.0, False, statistics(dtype), True
    )
    got = grad.gather(1, target.unsqueeze(1)).squeeze(1).double()
    noise = noise_of(want_loss, dtype)
    assert ((loss.double() - want_loss).abs() <= noise * want_loss).all()
    assert ((got - want).abs() <= (noise + EPS[dtype] / 2) * want.abs()).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_target_of_a_confident_row_with_weights_smoothing_and_z_loss(shape, dtype):
    """With class weights the rows go another way; with smoothing and z-loss a confident row has a gradient
    that is not small."""
    for gap in (6, 22):
        x, target = confident(shape, dtype, gap)
        k = shape[1]
        weight = torch.full((k,), 0.5, dtype=statistics(dtype))
        for w, factor in ((None, 1.0), (weight, 0.5)):
            for eps, others, z_loss in ((0.0, False, 0.0), (0.1, False, 0.0), (0.1, True, 1e-3)):
                base = eps / (k - 1 if others else k)
                want_loss, want, lse = exact_of_confident(x, target, base)
                want_loss = factor * want_loss + z_loss * lse**2
                missing = -exact_of_confident(x, target)[1]
                want = factor * want + 2 * z_loss * lse * (1 - missing)
                loss, grad, _ = OPS.cross_entropy(
                    x, target, w, 0, -100, eps, others, z_loss, False, statistics(dtype), True
                )
                got = grad.gather(1, target.unsqueeze(1)).squeeze(1).double()
                noise = 2 * noise_of(exact_of_confident(x, target)[0], dtype)
                assert ((loss.double() - want_loss).abs() <= noise * want_loss).all()
                # q of all others and z-loss are sums of rounded numbers.
                assert ((got - want).abs() <= (noise + EPS[dtype] / 2) * (want.abs() + eps)).all()


def test_a_loss_far_from_zero_logits_keeps_its_digits():
    """Sums of q x relative to the largest logit, not to 0, in which a million would swallow them."""
    x, target = confident((20, 37), torch.float64, 0.5)
    soft = F.one_hot(target, 37).double() * 0.75 + 0.25 / 37
    want = OPS.cross_entropy(x, soft, None, 0)[0]
    far = x + 2.0**20  # exact
    for t in (soft, target):
        smoothing = 0.0 if t is soft else 0.25
        got = OPS.cross_entropy(far, t, None, 0, -100, smoothing)[0]
        assert ((got - want).abs() <= 1e-14 * want).all()


# ---------------------------------------------------------------- the definition


def cases(dtype):
    """(logits, target, weight, ignore_index) of each kind."""
    g = torch.Generator().manual_seed(3)
    # Rows, rows of one class, rows side by side, and many classes.
    for shape in ((9, 7), (5, 1), (2, 6, 11), (3, 1000)):
        x = (3 * torch.randn(shape, generator=g, dtype=torch.float64)).to(dtype)
        k, places = shape[1], (shape[0], *shape[2:])
        weight = torch.rand(k, generator=g, dtype=torch.float64).to(statistics(dtype)) + 0.1
        index = torch.randint(-1, k, places, generator=g)
        soft = torch.rand(shape, generator=g, dtype=torch.float64).softmax(1).to(dtype)
        yield x, index, None, -1
        yield x, index, weight, -1
        yield x, soft, weight, -100
    hostile = torch.zeros(6, 4, dtype=dtype)
    hostile[1] = -torch.inf
    hostile[2, 1], hostile[3, 2], hostile[4, 3] = torch.nan, torch.inf, -torch.inf
    yield hostile, torch.tensor([0, 1, 2, 3, 0, 2]), None, -100
    yield hostile, torch.tensor([0, -100, -100, -100, 3, 2]), None, -100
    yield torch.zeros(3, 4, dtype=dtype), torch.full((3,), -100), None, -100
    yield torch.zeros(0, 4, dtype=dtype), torch.zeros(0, dtype=torch.int64), None, -100
    for shape in ((0, 4), (0, 4, 3), (2, 4, 0)):
        yield torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype), None, -100


OPTIONS = list(
    itertools.product(
        (0, 1, 2), ((0.0, False), (0.1, False), (0.2, True), (1.0, True)), (0.0, 0.03), (False, True)
    )
)


def near(got, want, dtype, size=1.0):
    """Within a rounding of its dtype, and the noise of the statistics."""
    noise = 1e-14 if dtype == torch.float64 else 2e-6
    rounding = torch.finfo(got.dtype).eps / 2
    torch.testing.assert_close(
        got.double(), want.double(), rtol=rounding + noise, atol=noise * size, equal_nan=True
    )


def test_the_kernels_do_what_the_definition_does_in_float64(dtype):
    for x, target, weight, ignore_index in cases(dtype):
        wide_target = target.double() if target.is_floating_point() else target
        wide_weight = None if weight is None else weight.double()
        for reduction, (eps, others), z_loss, zero in OPTIONS:
            if others and x.shape[1] == 1:
                continue
            options = reduction, ignore_index, eps, others, z_loss, zero, None
            loss, grad, lse = OPS.cross_entropy(x, target, weight, *options, True)
            wants = PLAIN["cross_entropy"](x.double(), wide_target, wide_weight, *options, True)
            for got, want, size in zip((loss, grad, lse), wants, (4.0, 4.0, 1.0), strict=True):
                assert got.shape == want.shape
                near(got, want, dtype, size)
            own = PLAIN["cross_entropy"](x, target, weight, *options, True)
            for got, mine in zip((loss, grad, lse), own, strict=True):
                assert (got.shape, got.dtype, got.stride()) == (mine.shape, mine.dtype, mine.stride())
                near(mine, got, got.dtype if got.dtype != torch.float64 else dtype, 4.0)


def test_the_definition_of_the_operator_in_place(dtype):
    for x, target, weight, ignore_index in cases(dtype):
        if x.dim() != 2:
            continue
        factor = torch.linspace(0.5, 2, len(x), dtype=statistics(dtype))
        for (eps, others), z_loss in itertools.product(((0.0, False), (0.2, True)), (0.0, 0.03)):
            if others and x.shape[1] == 1:
                continue
            options = ignore_index, eps, others, z_loss
            ours, wide = x.clone(), x.double()
            loss = OPS.cross_entropy_(ours, target, factor, weight, *options)
            wide_weight = None if weight is None else weight.double()
            wide_target = target.double() if target.is_floating_point() else target
            want = PLAIN["cross_entropy_"](wide, wide_target, factor.double(), wide_weight, *options)
            near(loss, want, dtype, 4.0)
            smallest = 2.0**-25 if dtype == torch.float16 else 0.0
            assert torch.equal(ours.isnan(), wide.isnan())
            error = (ours.double() - wide).abs().nan_to_num(0)
            rounding = torch.finfo(dtype).eps / 2
            room = (1e-14 if dtype == torch.float64 else 4e-6) + 1.01 * rounding * wide.abs().nan_to_num(0)
            assert (error <= room + smallest).all()


def test_the_definition_of_the_scale(dtype):
    values = torch.randn(5, 7).to(dtype)
    for factor in (torch.tensor(0.37), torch.tensor([0.37], dtype=torch.float64)):
        scaled = values.clone()
        assert PLAIN["cross_entropy_scale_"](scaled, factor) is None
        assert torch.equal(
            scaled, (values.to(statistics(dtype)) * factor.to(statistics(dtype)).view(())).to(dtype)
        )


def test_defaults_may_be_left_out(dtype):
    x, target = torch.randn(4, 5).to(dtype), torch.tensor([0, 1, 2, -100])
    for arguments in ((x, target), (x, target, None), (x, target, None, 2)):
        got = PLAIN["cross_entropy"](*arguments)
        for a, b in zip(got, OPS.cross_entropy(*arguments), strict=True):
            assert a.shape == b.shape
            near(a, b, dtype)


def test_a_class_out_of_range_spoils_its_row_alone():
    """As on CUDA: raising would mean waiting for the device."""
    x, target = torch.randn(4, 5), torch.tensor([0, 5, -1, 2])
    loss, grad, _ = PLAIN["cross_entropy"](x, target, None, 0, -100, 0.0, False, 0.0, False, None, True)
    assert loss.isnan().tolist() == grad.isnan().any(1).tolist() == [False, True, True, False]
    near(loss[::3], F.cross_entropy(x, target.clamp(0, 4), reduction="none")[::3], torch.float32)


@pytest.mark.parametrize("device", ["meta", "fake"])
def test_the_definition_needs_no_values(device, dtype):
    for x, target, weight, ignore_index in cases(dtype):
        real = OPS.cross_entropy(x, target, weight, 0, ignore_index, 0.1, False, 0.1, True, None, True)
        tensors = x, target, weight
        if device == "meta":
            moved = [None if t is None else t.to("meta") for t in tensors]
            got = PLAIN["cross_entropy"](*moved, 0, ignore_index, 0.1, False, 0.1, True, None, True)
        else:
            with FakeTensorMode() as mode:
                moved = [None if t is None else mode.from_tensor(t) for t in tensors]
                got = PLAIN["cross_entropy"](*moved, 0, ignore_index, 0.1, False, 0.1, True, None, True)
        for a, b in zip(got, real, strict=True):
            assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_square_of_a_huge_logit_counts_with_z_loss_alone(dtype):
    """It overflows, and 0 times that would be NaN. Rows that are masked as a whole have such logits."""
    top = 1e300 if dtype == torch.float64 else 1e30
    x = torch.tensor([[top, -top, 0.0], [-top, -top, -top]], dtype=dtype)
    target = torch.tensor([0, 2])
    want = F.cross_entropy(x.double(), target, reduction="none")
    for loss in (PLAIN["cross_entropy"](x, target, None, 0)[0], OPS.cross_entropy(x, target, None, 0)[0]):
        torch.testing.assert_close(loss.double(), want, rtol=4e-3, atol=0)
    each = torch.func.vmap(fr.cross_entropy)(x.unsqueeze(1), target.unsqueeze(1))
    torch.testing.assert_close(each.double(), want, rtol=4e-3, atol=0)
