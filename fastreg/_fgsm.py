"""The step of an attack in the maximum norm, x' = clamp(x + eps sign(g), lower, upper), and the same with
projection onto the eps-ball around an origin (Goodfellow, Shlens, Szegedy 2015; Madry et al. 2018). The
attacks themselves are in `attacks.py`.
"""

from __future__ import annotations

import math

import torch

from ._checks import check_number, check_tensor
from ._registry import define
from ._types import Bounds, Number

# Each number of the formula is one value, or a tensor of values that broadcasts over neighbouring dimensions.
define(
    "fgsm_step(Tensor x, Tensor grad, float eps, float lower, float upper, Tensor? eps_values=None, "
    "Tensor? lower_values=None, Tensor? upper_values=None) -> Tensor"
)
define(
    "pgd_step(Tensor x, Tensor grad, Tensor origin, float alpha, float eps, float lower, float upper, "
    "Tensor? alpha_values=None, Tensor? eps_values=None, Tensor? lower_values=None, Tensor? "
    "upper_values=None) -> Tensor"
)


@torch.library.register_fake("fastreg::fgsm_step")
def _(x, grad, eps, lower, upper, eps_values=None, lower_values=None, upper_values=None):
    return torch.empty_like(x)


@torch.library.register_fake("fastreg::pgd_step")
def _(
    x,
    grad,
    origin,
    alpha,
    eps,
    lower,
    upper,
    alpha_values=None,
    eps_values=None,
    lower_values=None,
    upper_values=None,
):
    return torch.empty_like(x)


fgsm_step_op = torch.ops.fastreg.fgsm_step.default
pgd_step_op = torch.ops.fastreg.pgd_step.default


def number_of(op, name, value, x, low=-math.inf, infinite=False):
    """(float, None) for one number, (0.0, tensor) for one per channel, per sample or per element."""
    if not isinstance(value, torch.Tensor):
        check_number(op, name, value, low)
        if abs(value) == math.inf and not infinite:
            raise ValueError(f"{op}: {name} must be finite, got {value}")
        return float(value), None
    if value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{op}: {name} must be real numbers, got {value.dtype}")
    value = value.detach().to(x.device, torch.float64 if x.dtype == torch.float64 else torch.float32)
    if value.numel() == 1:
        value = value.reshape(())
    if value.dim() == 1 and x.dim() >= 2:
        channel, sample = len(value) == x.shape[1], len(value) == x.shape[0]
        if channel and sample:
            raise ValueError(
                f"{op}: {name} of shape {tuple(value.shape)} fits the batch and the channels of x, "
                f"{tuple(x.shape)}; "
                f"give it as {(len(value), *(1,) * (x.dim() - 1))} or "
                f"{(1, len(value), *(1,) * (x.dim() - 2))}"
            )
        if channel:
            value = value.view(-1, *(1,) * (x.dim() - 2))
        elif sample:
            value = value.view(-1, *(1,) * (x.dim() - 1))
    try:
        fits = torch.broadcast_shapes(value.shape, x.shape) == x.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"{op}: {name} must be a number, one per channel or one per sample of x, {tuple(x.shape)}, "
            f"got shape {tuple(value.shape)}"
        )
    if value.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = value[~((value >= low) & (infinite | value.isfinite()))]
        if wrong.numel():
            least = "" if low == -math.inf else f" and at least {low:g}"
            raise ValueError(
                f"{op}: {name} must be {'numbers' if infinite else 'finite'}{least}, got {wrong[0].item()}"
            )
    wide = [d for d, size in enumerate(value.shape) if size != 1]
    lead = x.dim() - value.dim()
    if wide and any(value.shape[d] != x.shape[d + lead] for d in range(wide[0], wide[-1] + 1)):
        value = value.expand(x.shape)
    return 0.0, value.contiguous()


def _check_pair(op, x, grad, name="grad"):
    check_tensor(op, "x", x)
    check_tensor(op, name, grad)
    for what, got, expected in (
        ("shape", tuple(grad.shape), tuple(x.shape)),
        ("dtype", grad.dtype, x.dtype),
        ("device", grad.device, x.device),
    ):
        if got != expected:
            raise ValueError(f"{op}: {name} must have the {what} of x, {expected}, got {got}")


def _text(value):
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else f"{value:g}"


def bounds_of(op, lower, upper, x):
    lower = number_of(op, "lower", -math.inf if lower is None else lower, x, infinite=True)
    upper = number_of(op, "upper", math.inf if upper is None else upper, x, infinite=True)
    low, high = value_of(lower), value_of(upper)
    if lower[1] is None and upper[1] is None:
        crossed = low > high
    else:  # where a look at the values costs nothing
        crossed = x.device.type == "cpu" and not torch.compiler.is_compiling() and bool((low > high).any())
    if crossed:
        raise ValueError(f"{op}: lower must not exceed upper, got {_text(low)} and {_text(high)}")
    return lower, upper


def pair_of(op: str, bounds: Bounds | None) -> Bounds:
    """(lower, upper) of the argument `bounds`, which is such a pair or None."""
    if bounds is None:
        return None, None
    if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
        raise ValueError(f"{op}: bounds must be (lower, upper) or None, got {bounds!r}")
    return bounds[0], bounds[1]


def fgsm_step(
    x: torch.Tensor,
    grad: torch.Tensor,
    eps: Number,
    lower: Number | None = None,
    upper: Number | None = None,
    *,
    bounds: Bounds | None = None,
) -> torch.Tensor:
    """clamp(x + eps * sign(grad), lower, upper) in one pass over memory.

    Args:
        x: tensor of any shape; float32, float64, float16 or bfloat16.
        grad: gradient of the loss with respect to x: its shape, dtype and device.
        eps: step, in the units of x: a number, or a tensor with one value per channel (C,) or (C, 1, 1), per
            sample (B,) or (B, 1, 1, 1), or per element. A negative step goes down the gradient.
        bounds: (lower, upper) of the result, each like `eps` or None; None for no bounds.
        lower, upper: the same two, each as an argument of its own.

    Returns:
        A new tensor like x, detached. sign(0) and sign(NaN) are 0, as in torch; a NaN in x stays.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, NaN numbers, lower above upper, bounds given
            beside lower or upper, a dtype without kernels.
        TypeError: no tensor, or no number.

    Source: Goodfellow, Shlens, Szegedy 2015, Explaining and harnessing adversarial examples.
    """
    op = "fgsm_step"
    _check_pair(op, x, grad)
    if bounds is not None:
        if lower is not None or upper is not None:
            raise ValueError(
                f"{op}: give bounds or lower and upper, not both; bounds=(lower, upper) is enough"
            )
        lower, upper = pair_of(op, bounds)
    step = number_of(op, "eps", eps, x)
    low, high = bounds_of(op, lower, upper, x)
    with torch.no_grad():
        return fgsm_step_op(x.detach(), grad.detach(), step[0], low[0], high[0], step[1], low[1], high[1])


def value_of(number):
    return number[0] if number[1] is None else number[1]


def times(number, sign):
    return number[0] * sign, None if number[1] is None else number[1] * sign
