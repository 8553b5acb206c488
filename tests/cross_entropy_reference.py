"""What the tests of cross-entropy share: the written formula in float64, inputs, tolerances."""

import torch
import torch.nn.functional as F

INF = float("inf")
UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
TINY = {torch.float64: 1e-300, torch.float32: 1e-37, torch.float16: 2.0**-25, torch.bfloat16: 1e-37}


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
