"""The operator behind `fr.optim.SGD`: one step over lists of tensors, in place.

g <- dE/dw + weight_decay * w + l1 * sign(w);  v <- momentum * v + (1 - dampening) * g, v <- g in the first
step;  w <- w - lr * (g + momentum * v if nesterov else v). Sources and options: optim/_sgd.py and
csrc/sgd/sgd_math.h.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ._checks import arithmetic_dtype, check_dtype, check_no_overlap
from ._registry import define, define_kernel
from ._seeds import Purpose, random_halves

# --- The operator in plain torch: what the kernels compute, bit for bit.


def _number(value: float | torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A number of the formula in the type of the arithmetic, on the device of `like`."""
    dtype = arithmetic_dtype(like)
    if isinstance(value, torch.Tensor):
        return value.to(like.device, dtype).reshape(())
    return torch.tensor(value, dtype=dtype, device=like.device)


def _penalty(
    w: torch.Tensor, weight_decay: torch.Tensor, l1: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(weight_decay * w, l1 * sign(w)); a factor of 0 makes no NaN of an infinite w."""
    shrink = torch.where(weight_decay != 0, weight_decay * w, 0.0)
    return shrink, torch.where(w > 0, l1, torch.where(w < 0, 0 - l1, 0.0))


def _soft_threshold(w: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """sign(w) max(|w| - threshold, 0), as w less the part of it that lies in [-threshold, threshold]."""
    inside = torch.where(w < 0 - threshold, 0 - threshold, w)
    return w - torch.where(inside > threshold, threshold, inside)


def _round_stochastic(w: torch.Tensor, seed: torch.Tensor, tensor_index: int) -> torch.Tensor:
    """Finite float32 numbers rounded to bfloat16, up with the probability of what is cut off (Gupta et al.
    2015).

    bfloat16 is the upper half of a float32: 16 random bits are added to the lower half, then it is cut off.
    """
    halves = random_halves(
        seed, 0, w.numel(), w.device, draw=tensor_index, purpose=Purpose.STOCHASTIC_ROUNDING
    )
    bits = w.contiguous().view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    cut = ((bits + halves.view(w.shape)) & 0xFFFF0000).to(torch.int32).view(torch.float32)
    return torch.where(w.isfinite(), cut, w).to(torch.bfloat16)


def sgd_plain(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    momentum_buffers: Sequence[torch.Tensor],
    momentum_started: Sequence[torch.Tensor],
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    l1: float,
    nesterov: bool,
    proximal: bool,
    decoupled: bool,
    maximize: bool,
    lr_tensor: torch.Tensor | None = None,
    grad_scale: torch.Tensor | None = None,
    found_inf: torch.Tensor | None = None,
    seed: torch.Tensor | None = None,
) -> None:
    """The operator `sgd_`: one step of all parameters. A found_inf other than 0 skips it: nothing changes.

    momentum_buffers is empty without momentum, and momentum_started without dampening. A seed asks for
    stochastic rounding of bfloat16 parameters.
    """
    for param in params:  # all of them first, so that an error finds nothing stepped
        check_dtype("SGD", "a parameter", param)
        check_no_overlap("SGD", "a parameter", param)
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        wide = arithmetic_dtype(param)
        rate = _number(lr if lr_tensor is None else lr_tensor, param)

        # The gradient of the error, and of the penalties where they belong to it.
        old = param.to(wide)
        sign = -1.0 if maximize else 1.0
        if grad_scale is not None:
            grad_factor = sign / grad_scale.to(torch.promote_types(grad_scale.dtype, wide))
        g = grad.to(wide) * _number(sign if grad_scale is None else grad_factor, param)
        penalized = weight_decay != 0 or (l1 != 0 and not proximal)
        shrink, pull = _penalty(old, _number(weight_decay, param), _number(0.0 if proximal else l1, param))
        if penalized and not decoupled:
            g = g + shrink + pull

        # The momentum. The buffer of a first step holds zeros, and the gradient is taken whole.
        v = None
        if momentum_buffers:
            keep, take = _number(momentum, param), _number(1 - dampening, param)
            if momentum_started:
                first = momentum_started[i].reshape(()) == 0
                keep, take = torch.where(first, 0.0, keep), torch.where(first, 1.0, take)
            v = keep * momentum_buffers[i].to(wide) + take * g
            g = g + _number(momentum, param) * v if nesterov else v

        # The step, and the penalties that act beside it.
        if penalized and decoupled:
            g = g + (shrink + pull)
        w = old - rate * g
        if proximal and l1 != 0:
            w = _soft_threshold(w, rate * _number(l1, param))

        # Back to the tensors; `skip` is not read on the host, because that would wait for the device.
        skip = torch.zeros((), dtype=torch.bool, device=param.device)
        if found_inf is not None:
            skip = found_inf.to(param.device).reshape(()) != 0
        if seed is not None and param.dtype == torch.bfloat16:
            rounded = _round_stochastic(w, seed, i)
        else:
            rounded = w.to(param.dtype)
        param.copy_(torch.where(skip, param, rounded))
        if v is not None:
            buffer = momentum_buffers[i]
            buffer.copy_(torch.where(skip, buffer, v.to(buffer.dtype)))
            if momentum_started:
                momentum_started[i].masked_fill_(~skip, 1)


# --- The operator.

# One call steps all tensors of a parameter group. momentum_started, one float32 flag per tensor that the
# operator sets to 1, is only there with dampening, whose first step differs: only the operator knows whether
# a step was skipped for an overflow, and so was not the first.
define(
    "sgd_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, Tensor(c!)[] momentum_started, "
    "float lr, float momentum, float dampening, float weight_decay, float l1, bool nesterov, bool proximal, "
    "bool decoupled, bool maximize, Tensor? lr_tensor=None, Tensor? grad_scale=None, "
    "Tensor? found_inf=None, Tensor? seed=None) -> ()",
    plain=sgd_plain,
)


def sgd_with_numbers(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    momentum_buffers: Sequence[torch.Tensor],
    momentum_started: Sequence[torch.Tensor],
    numbers: Sequence[float],
    *others: Any,
) -> None:
    """The operator with (lr, momentum, dampening, weight_decay, l1) in one. The kernels take no negative
    factors, which a group may be given later, to climb for example: those go to plain torch.
    """
    lr, momentum, _, weight_decay, _ = numbers
    step: Any = sgd_plain if min(lr, momentum, weight_decay) < 0 else sgd_
    step(params, grads, momentum_buffers, momentum_started, *numbers, *others)


def _with_numbers(params, grads, momentum_buffers, momentum_started, numbers, *others):
    sgd_with_numbers(params, grads, momentum_buffers, momentum_started, numbers.tolist(), *others)


# The same for a compiled step whose numbers change, under a schedule for example. torch.compile makes a new
# graph for every value of an operator's float, but not for the values in a tensor. It lies on the CPU, where
# reading it waits for no device.
define_kernel(
    "sgd_numbers_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, "
    "Tensor(c!)[] momentum_started, Tensor numbers, bool nesterov, bool proximal, bool decoupled, "
    "bool maximize, Tensor? lr_tensor=None, Tensor? grad_scale=None, Tensor? found_inf=None, "
    "Tensor? seed=None) -> ()",
    _with_numbers,
)


@torch.library.register_fake("fastreg::sgd_", allow_override=True)
@torch.library.register_fake("fastreg::sgd_numbers_", allow_override=True)
def _(params, grads, momentum_buffers, momentum_started, *args, **kwargs):
    return None


sgd_ = torch.ops.fastreg.sgd_.default
sgd_numbers_ = torch.ops.fastreg.sgd_numbers_.default
