"""The operator behind `fr.optim.SGD`: one step over lists of tensors, in place.

g <- dE/dw + weight_decay * w + l1 * sign(w);  v <- momentum * v + (1 - dampening) * g, v <- g in the first
step;  w <- w - lr * (g + momentum * v if nesterov else v);  average <- ema * average + (1 - ema) * w, average
<- w in the first step. Sources and options: optim/_sgd.py and csrc/sgd/sgd_math.h.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ._checks import arithmetic_dtype, check_dtype, check_no_overlap
from ._optimizer_math import (
    averaged,
    count,
    gradient_factor,
    is_skipped,
    kept_if_small,
    l1_pull,
    number,
    rounded,
    rounding_of,
    soft_threshold,
    store,
    times,
)
from ._step_operator import define_step
from ._subnormal import flush

# --- The operator in plain torch: what the kernels compute, bit for bit.


def sgd_plain(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    momentum_buffers: Sequence[torch.Tensor],
    momentum_started: Sequence[torch.Tensor],
    averages: Sequence[torch.Tensor],
    n_averaged: Sequence[torch.Tensor],
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    l1: float,
    ema: float,
    nesterov: bool,
    proximal: bool,
    decoupled: bool,
    maximize: bool,
    lr_tensor: torch.Tensor | None = None,
    grad_scale: torch.Tensor | None = None,
    found_inf: torch.Tensor | None = None,
    clip: torch.Tensor | None = None,
    ema_tensor: torch.Tensor | None = None,
    seed: torch.Tensor | None = None,
    places: Sequence[int] = (),
) -> None:
    """The operator `sgd_`: one step of all parameters. A found_inf other than 0 skips it: nothing changes.

    momentum_buffers is empty without momentum, momentum_started without dampening, averages and n_averaged
    without a moving average, whose decay is ema, or ema_tensor where that is there. Gradients are multiplied
    by clip. A seed asks for stochastic rounding of bfloat16 parameters and averages, by numbers that depend
    on the seed, the steps and places alone (`rounding_of`); momentum_started then counts the steps.
    """
    for param in params:  # all of them first, so that an error finds nothing stepped
        check_dtype("SGD", "a parameter", param)
        check_no_overlap("SGD", "a parameter", param)
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        wide, skip = arithmetic_dtype(param), is_skipped(found_inf, param)
        rate = number(lr if lr_tensor is None else lr_tensor, param)

        # The gradient of the error, and of the penalties where they belong to it; a factor of 0 makes no NaN
        # of an infinite w.
        old = param.to(wide)
        g = times(grad.to(wide), gradient_factor(maximize, grad_scale, clip, param))
        penalized = weight_decay != 0 or (l1 != 0 and not proximal)
        decay = number(weight_decay, param)
        shrink = torch.where(decay != 0, times(old, decay), 0.0)
        pull = l1_pull(old, number(0.0 if proximal else l1, param))
        if penalized and not decoupled:
            g = flush(flush(g + shrink) + pull)

        # The momentum. The buffer of a first step holds zeros, and the gradient is taken whole.
        v = None
        if momentum_buffers:
            keep, take = number(momentum, param), number(1 - dampening, param)
            if momentum_started:
                first = momentum_started[i].reshape(()) == 0
                keep, take = torch.where(first, 0.0, keep), torch.where(first, 1.0, take)
            v = flush(times(momentum_buffers[i].to(wide), keep) + times(g, take))
            g = flush(g + times(v, number(momentum, param))) if nesterov else v

        # The step, and the penalties that act beside it.
        if penalized and decoupled:
            g = flush(g + flush(shrink + pull))
        w = kept_if_small(flush(flush(old) - times(g, rate)), old)
        if proximal and l1 != 0:
            w = soft_threshold(w, rate * number(l1, param))

        # Back to the tensors.
        rounding = rounding_of(seed, momentum_started[i] if momentum_started else None, places, i, param)
        if averages:
            average = averaged(averages[i], w, n_averaged[i], ema if ema_tensor is None else ema_tensor)
            store(averages[i], rounded(average, param.dtype, rounding), skip)
            count(n_averaged[i], skip)
        store(param, rounded(w, param.dtype, rounding), skip)
        if v is not None:
            store(momentum_buffers[i], v.to(param.dtype), skip)
        if momentum_started and seed is not None:
            count(momentum_started[i], skip)
        elif momentum_started:
            store(momentum_started[i], torch.ones_like(momentum_started[i]), skip)


# --- The operator.

# One call steps all tensors of a parameter group. momentum_started, one float32 flag per tensor that the
# operator sets to 1, is only there with dampening, whose first step differs: only the operator knows whether
# a step was skipped for an overflow, and so was not the first. With a seed it counts the steps, by which the
# numbers are drawn. n_averaged counts, one float32 per tensor, the updates of the average.
sgd_step = define_step(
    "sgd",
    sgd_plain,
    lists="Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, "
    "Tensor(c!)[] momentum_started, Tensor(d!)[] averages, Tensor(e!)[] n_averaged",
    numbers=("lr", "momentum", "dampening", "weight_decay", "l1", "ema"),
    unsigned=("lr", "momentum", "weight_decay"),
    options="bool nesterov, bool proximal, bool decoupled, bool maximize, Tensor? lr_tensor=None, "
    "Tensor? grad_scale=None, Tensor? found_inf=None, Tensor? clip=None, Tensor? ema_tensor=None, "
    "Tensor? seed=None, int[] places=[]",
)
