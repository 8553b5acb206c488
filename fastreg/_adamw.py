"""The operator behind `fr.optim.AdamW`: one step over lists of tensors, in place.

With g = dE/dw, t the number of the step and a moving average of the weights beside it:

    w <- w - lr * weight_decay * w                              decoupled (Loshchilov and Hutter 2019)
    m <- beta1 * m + (1 - beta1) * g;  v <- beta2 * v + (1 - beta2) * g^2
    d = sqrt(v / (1 - beta2^t)) + eps;  w <- w - lr / (1 - beta1^t) * m / d        (Kingma and Ba 2015)
    w <- sign(w) max(|w| - lr * l1 / d, 0)                      the L1 penalty, if proximal
    average <- ema * average + (1 - ema) * w                    average <- w in its first step

The threshold is the proximal operator of l1 |w|_1 in the metric of the step, d / lr: it minimises
l1 |x|_1 + d / (2 lr) (x - w)^2 (Yun, Lozano, Yang 2021; Melchior, Joseph, Moolekamp 2019), so that a weight
rests exactly where dE/dw + l1 * sign(w) contains 0, whatever d. csrc/adamw/adamw_math.h explains the options.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ._checks import arithmetic_dtype, check_dtype, check_no_overlap
from ._optimizer_math import (
    averaged,
    count,
    exact,
    gradient_factor,
    is_skipped,
    kept_if_small,
    l1_pull,
    lerp,
    number,
    rounded,
    rounding_of,
    soft_threshold,
    square_root,
    store,
    times,
)
from ._step_operator import define_step
from ._subnormal import flush

# --- The operator in plain torch: what the kernels compute, bit for bit.


def _power(base: float, step: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """base^step for whole steps below 2^31 by repeated squaring, which is the same on every device."""
    rest = step.to(like.device).reshape(()).nan_to_num(0).clamp(0, 2.0**31 - 128).to(torch.int64)
    result, square = exact(1.0, like), exact(base, like)
    for bit in range(31):
        result = torch.where((rest >> bit) & 1 == 1, result * square, result)
        square = square * square
    return result


def adamw_plain(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    exp_avgs: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor],
    max_exp_avg_sqs: Sequence[torch.Tensor],
    steps: Sequence[torch.Tensor],
    averages: Sequence[torch.Tensor],
    n_averaged: Sequence[torch.Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    l1: float,
    ema: float,
    proximal: bool,
    cautious: bool,
    maximize: bool,
    lr_tensor: torch.Tensor | None = None,
    grad_scale: torch.Tensor | None = None,
    found_inf: torch.Tensor | None = None,
    clip: torch.Tensor | None = None,
    ema_tensor: torch.Tensor | None = None,
    seed: torch.Tensor | None = None,
    places: Sequence[int] = (),
) -> None:
    """The operator `adamw_`: one step of all parameters. A found_inf other than 0 skips it: nothing changes.

    max_exp_avg_sqs is empty without amsgrad, averages and n_averaged without a moving average, whose decay is
    ema, or ema_tensor where that is there. steps may lie on the CPU where nothing can skip the step.
    Gradients are multiplied by clip. cautious: the decay acts only where the update does not push the weight
    away from 0 (Chen et al. 2025). A seed asks for stochastic rounding of bfloat16 parameters and averages,
    by numbers that depend on the seed, steps and places alone (`rounding_of`).
    """
    for param in params:  # all of them first, so that an error finds nothing stepped
        check_dtype("AdamW", "a parameter", param)
        check_no_overlap("AdamW", "a parameter", param)
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        wide, skip = arithmetic_dtype(param), is_skipped(found_inf, param)
        rate = number(lr if lr_tensor is None else lr_tensor, param)
        step = steps[i] + 1
        correction1, correction2 = (number(1 - _power(b, step, param), param) for b in (beta1, beta2))

        # The gradient of the error, and of the L1 penalty where it belongs to it.
        old = param.to(wide)
        w = flush(old)
        g = times(grad.to(wide), gradient_factor(maximize, grad_scale, clip, param))
        if l1 != 0 and not proximal:
            g = flush(g + l1_pull(old, number(l1, param)))

        # The moments.
        m = lerp(flush(exp_avgs[i].to(wide)), g, number(1 - beta1, param))
        v = times(exp_avg_sqs[i].to(wide), number(beta2, param)) + times(number(1 - beta2, param), g, g)
        v = flush(v)
        most = torch.maximum(flush(max_exp_avg_sqs[i].to(wide)), v) if max_exp_avg_sqs else v
        inverse = 1 / (square_root(most) * (1 / square_root(correction2)) + number(eps, param))

        # The decay, the step and the threshold.
        decayed = times(w, 1 - rate * number(weight_decay, param))
        if cautious:
            against = ((m > 0) & (w < 0)) | ((m < 0) & (w > 0))
            decayed = torch.where(against, w, decayed)
        w = kept_if_small(flush(decayed - times(rate / correction1, m, inverse)), old)
        if proximal and l1 != 0:
            w = soft_threshold(w, times(rate * number(l1, param), inverse))

        # Back to the tensors.
        rounding = rounding_of(seed, steps[i], places, i, param)
        if averages:
            average = averaged(averages[i], w, n_averaged[i], ema if ema_tensor is None else ema_tensor)
            store(averages[i], rounded(average, param.dtype, rounding), skip)
            count(n_averaged[i], skip)
        store(param, rounded(w, param.dtype, rounding), skip)
        store(exp_avgs[i], m.to(param.dtype), skip)
        store(exp_avg_sqs[i], v.to(param.dtype), skip)
        if max_exp_avg_sqs:
            store(max_exp_avg_sqs[i], most.to(param.dtype), skip)
        count(steps[i], skip)


# --- The operator.

# One call steps all tensors of a parameter group. steps and n_averaged, one float32 per tensor, count: only
# the operator knows whether a step was skipped for an overflow.
adamw_step = define_step(
    "adamw",
    adamw_plain,
    lists="Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] steps, Tensor(f!)[] averages, Tensor(g!)[] n_averaged",
    numbers=("lr", "beta1", "beta2", "eps", "weight_decay", "l1", "ema"),
    unsigned=("lr", "eps", "weight_decay"),
    options="bool proximal, bool cautious, bool maximize, Tensor? lr_tensor=None, Tensor? grad_scale=None, "
    "Tensor? found_inf=None, Tensor? clip=None, Tensor? ema_tensor=None, Tensor? seed=None, int[] places=[]",
)
