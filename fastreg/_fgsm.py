"""The step of an attack in the maximum norm, x' = clamp(x + eps sign(g), lower, upper), and the same step
with projection onto the eps-ball around an origin (Goodfellow, Shlens, Szegedy 2015; Madry et al. 2018). The
attacks themselves are in attacks.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch.compiler import is_compiling

from ._checks import arithmetic_dtype, check_dtype, check_number, check_tensor
from ._registry import define, fast
from ._shards import own_part, whole_of_parts
from ._transforms import is_sharded, may_look
from ._types import Bounds, FgsmParameter, Number

# --- The operators in plain torch: what the kernels compute, bit for bit.


def _moved(x: torch.Tensor, grad: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """x + step * sign(grad), where the sign of 0 and of NaN is 0."""
    return torch.where(grad > 0, x + step, torch.where(grad < 0, x - step, x))


def _clamp(x: torch.Tensor, lower: torch.Tensor, upper: torch.Tensor) -> torch.Tensor:
    """x in [lower, upper]. A NaN in x stays. A NaN bound does not bound; it can only arrive from a GPU or
    within a compiled program, where values are not looked at.
    """
    x = torch.where(upper < x, upper, x)
    return torch.where(lower > x, lower, x)


def _parameter_tensor(value: float, values: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    """A parameter as a tensor in the type of the arithmetic."""
    wide = arithmetic_dtype(x)
    return torch.tensor(value, dtype=wide, device=x.device) if values is None else values


def fgsm_step_plain(
    x: torch.Tensor,
    grad: torch.Tensor,
    eps: float,
    lower: float,
    upper: float,
    eps_values: torch.Tensor | None = None,
    lower_values: torch.Tensor | None = None,
    upper_values: torch.Tensor | None = None,
) -> torch.Tensor:
    """The operator `fgsm_step`: clamp(x + eps * sign(grad), lower, upper)."""
    check_dtype("fgsm_step", "x", x)
    wide = arithmetic_dtype(x)
    moved = _moved(x.to(wide), grad, _parameter_tensor(eps, eps_values, x))
    box = _parameter_tensor(lower, lower_values, x), _parameter_tensor(upper, upper_values, x)
    return torch.empty_like(x).copy_(_clamp(moved, *box))


def pgd_step_plain(
    x: torch.Tensor,
    grad: torch.Tensor,
    origin: torch.Tensor,
    alpha: float,
    eps: float,
    lower: float,
    upper: float,
    alpha_values: torch.Tensor | None = None,
    eps_values: torch.Tensor | None = None,
    lower_values: torch.Tensor | None = None,
    upper_values: torch.Tensor | None = None,
) -> torch.Tensor:
    """The operator `pgd_step`: x + alpha * sign(grad), clamped to [origin - eps, origin + eps] and then to
    [lower, upper].
    """
    check_dtype("pgd_step", "x", x)
    wide = arithmetic_dtype(x)
    moved = _moved(x.to(wide), grad, _parameter_tensor(alpha, alpha_values, x))
    center, radius = origin.to(wide), _parameter_tensor(eps, eps_values, x)
    near = _clamp(moved, center - radius, center + radius)
    box = _parameter_tensor(lower, lower_values, x), _parameter_tensor(upper, upper_values, x)
    return torch.empty_like(x).copy_(_clamp(near, *box))


# --- The operators.

define(
    "fgsm_step(Tensor x, Tensor grad, float eps, float lower, float upper, Tensor? eps_values=None, "
    "Tensor? lower_values=None, Tensor? upper_values=None) -> Tensor",
    plain=fgsm_step_plain,
)
define(
    "pgd_step(Tensor x, Tensor grad, Tensor origin, float alpha, float eps, float lower, float upper, "
    "Tensor? alpha_values=None, Tensor? eps_values=None, Tensor? lower_values=None, "
    "Tensor? upper_values=None) -> Tensor",
    plain=pgd_step_plain,
)


@torch.library.register_fake("fastreg::fgsm_step", allow_override=True)
def _(x, *others, **options):
    return torch.empty_like(x)


@torch.library.register_fake("fastreg::pgd_step", allow_override=True)
def _(x, *others, **options):
    return torch.empty_like(x)


fgsm_step_op = torch.ops.fastreg.fgsm_step.default
pgd_step_op = torch.ops.fastreg.pgd_step.default

# --- Steps, radii and bounds, as the user gives them. Here each is called a parameter.


def parameter_of(
    op: str,
    name: str,
    value: float | torch.Tensor,
    x: torch.Tensor,
    low: float = -math.inf,
    infinite: bool = False,
) -> FgsmParameter:
    """A number, or a tensor with one per channel, per sample or per element of x, as a parameter.

    Returns (number, None) or (0.0, tensor); the operators take both.

    Raises unless all are at least `low`, and finite where `infinite` is not set. Values on a GPU are not
    looked at, because that would wait for the GPU.
    """
    if not isinstance(value, torch.Tensor):
        if isinstance(value, (list, tuple)) or type(value).__name__ == "ndarray":
            raise TypeError(
                f"{op}: {name} must be a number or a tensor, got {type(value).__name__}; make it one with "
                f"torch.as_tensor"
            )
        check_number(op, name, value, low, finite=not infinite)
        return float(value), None
    if value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{op}: {name} must be real numbers, got {value.dtype}")
    if is_sharded(value):
        value = cast(torch.Tensor, value.full_tensor())  # type: ignore[attr-defined]
    value = value.detach().to(x.device, arithmetic_dtype(x))
    value = _aligned(op, name, value, x)
    if may_look(value):
        wrong = value[~((value >= low) & (infinite | value.isfinite()))]
        if wrong.numel():
            least = "" if low == -math.inf else f" and at least {low:g}"
            raise ValueError(
                f"{op}: {name} must be {'numbers' if infinite else 'finite'}{least}, got {wrong[0].item()}"
            )
    return 0.0, _with_neighbouring_dimensions(value, x)


def _aligned(op: str, name: str, value: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """`value` in a shape that broadcasts to x.

    Raises where it has none, and where batch and channels have the same size, so that either could be meant.
    """
    if value.numel() == 1:
        value = value.reshape(())
    if value.dim() == 1 and x.dim() >= 2:
        channel, sample = len(value) == x.shape[1], len(value) == x.shape[0]
        if channel and sample:
            raise ValueError(
                f"{op}: {name} of shape {tuple(value.shape)} fits the batch and the channels of x, "
                f"{tuple(x.shape)}; give it as {(len(value), *(1,) * (x.dim() - 1))} or "
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
    return value


def _with_neighbouring_dimensions(value: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """`value`, contiguous, and expanded where a dimension of size 1 lies between larger ones."""
    wide = [d for d, size in enumerate(value.shape) if size != 1]
    lead = x.dim() - value.dim()
    if wide and any(value.shape[d] != x.shape[d + lead] for d in range(wide[0], wide[-1] + 1)):
        value = value.expand(x.shape)
    return value.contiguous()


def value_of(parameter: FgsmParameter) -> float | torch.Tensor:
    """The parameter for use in torch's arithmetic."""
    return parameter[0] if parameter[1] is None else parameter[1]


def times(parameter: FgsmParameter, factor: float) -> FgsmParameter:
    """The parameter times a factor."""
    return parameter[0] * factor, None if parameter[1] is None else parameter[1] * factor


def bounds_of(
    op: str, lower: Number | None, upper: Number | None, x: torch.Tensor
) -> tuple[FgsmParameter, FgsmParameter]:
    """Both bounds as the operators take them, None being no bound; raises where lower exceeds upper."""
    lower_parameter = parameter_of(op, "lower", -math.inf if lower is None else lower, x, infinite=True)
    upper_parameter = parameter_of(op, "upper", math.inf if upper is None else upper, x, infinite=True)
    low, high = value_of(lower_parameter), value_of(upper_parameter)
    if lower_parameter[1] is None and upper_parameter[1] is None:
        crossed = bool(low > high)
    else:  # tensors are looked at where that costs nothing
        crossed = may_look(x) and bool(torch.as_tensor(low > high, device="cpu").any())
    if crossed:
        raise ValueError(f"{op}: lower must not exceed upper, got {_text(low)} and {_text(high)}")
    return lower_parameter, upper_parameter


def both_bounds(op: str, bounds: Bounds | None) -> Bounds:
    """(lower, upper) of the argument `bounds`, which is such a pair or None."""
    if bounds is None:
        return None, None
    if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
        raise ValueError(f"{op}: bounds must be (lower, upper) or None, got {bounds!r}")
    return bounds[0], bounds[1]


def of_part(parameter: FgsmParameter, x: Any, placements: Sequence[Any]) -> FgsmParameter:
    """The parameter of a DTensor x for the part of it that this rank has under `placements`."""
    number, value = parameter
    if value is None or value.dim() == 0:
        return parameter
    if is_sharded(value):
        return number, value.redistribute(x.device_mesh, placements).to_local()  # type: ignore[attr-defined]
    return number, value.expand(x.shape)[own_part(x.shape, x.device_mesh, placements)].contiguous()


def check_placed(op: str, name: str, x: Any) -> None:
    """Raise for a DTensor whose parts are yet to be added up."""
    if is_sharded(x) and any(placement.is_partial() for placement in x.placements):
        raise ValueError(
            f"{op}: {name} must be a replicated or sharded DTensor, got {x.placements}; call .redistribute() "
            f"first"
        )


def _text(value: float | torch.Tensor) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else f"{value:g}"


def _check_pair(op: str, x: torch.Tensor, grad: torch.Tensor) -> None:
    check_tensor(op, "x", x)
    check_tensor(op, "grad", grad)
    for what, got, expected in (
        ("shape", tuple(grad.shape), tuple(x.shape)),
        ("dtype", grad.dtype, x.dtype),
        ("device", grad.device, x.device),
    ):
        if got != expected:
            raise ValueError(f"{op}: grad must have the {what} of x, {expected}, got {got}")


# --- The public function.


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
            sample (B,) or (B, 1, 1, 1), or per element. A negative step goes down the gradient. Beside
            DTensors a plain tensor has the values of the whole x, the same on all ranks.
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
    if fast is not None and bounds is None and not is_compiling():
        output = fast.fgsm_step(x, grad, eps, lower, upper)
        if output is not None:
            return cast(torch.Tensor, output)
    op = "fgsm_step"
    _check_pair(op, x, grad)
    if bounds is not None:
        if lower is not None or upper is not None:
            raise ValueError(
                f"{op}: give bounds or lower and upper, not both; bounds=(lower, upper) is enough"
            )
        lower, upper = both_bounds(op, bounds)
    step = parameter_of(op, "eps", eps, x)
    low, high = bounds_of(op, lower, upper, x)
    with torch.no_grad():
        x, grad = x.detach(), grad.detach()
        if is_sharded(x) or is_sharded(grad):
            return _step_of_shards(op, x, grad, step, low, high)
        return fgsm_step_op(x, grad, step[0], low[0], high[0], step[1], low[1], high[1])


def _step_of_shards(
    op: str, x: Any, grad: Any, step: FgsmParameter, low: FgsmParameter, high: FgsmParameter
) -> torch.Tensor:
    """The step of DTensors: each rank's of its part, placed as x is."""
    if not (is_sharded(x) and is_sharded(grad)):
        which = "x" if is_sharded(x) else "grad"
        raise TypeError(
            f"{op}: x and grad must both be DTensors or both plain tensors, got a DTensor as {which} alone; "
            f"make the other with torch.distributed.tensor.distribute_tensor"
        )
    check_placed(op, "x", x)
    mesh, placements = x.device_mesh, x.placements
    grad = grad.redistribute(mesh, placements)
    numbers, values = zip(*(of_part(each, x, placements) for each in (step, low, high)), strict=True)
    moved = fgsm_step_op(x.to_local(), grad.to_local(), *numbers, *values)
    return whole_of_parts(moved, mesh, placements, x.shape, x.stride())
