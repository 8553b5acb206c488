"""SGD with momentum and both norm penalties in one pass over memory.

    w <- w - lr * (dE/dw + weight_decay * w + l1 * sign(w))

is a step down the gradient of E + l1 |w|_1 + weight_decay / 2 |w|_2^2 (Goodfellow, Bengio, Courville 2016,
section 7.1).
"""

from __future__ import annotations

import sys
from typing import Any, ClassVar, Literal

import torch

from .._checks import check_number, names_unknown_arguments
from .._sgd import sgd_step
from .._types import Number
from . import _average
from ._average import check_average
from ._groups import Params, check_penalised
from ._one_pass import ROUNDING, Column, OnePass, Scaling, Work, check_rounding, rate_of, seed_of, zeros


class SGD(OnePass, torch.optim.SGD):
    """Stochastic gradient descent with momentum, L2 and L1; drop-in for `torch.optim.SGD`, which it
    subclasses.

    g = dE/dw + weight_decay * w + l1 * sign(w);  v = momentum * v + (1 - dampening) * g, v = g in a
    parameter's first step; w = w - lr * (g + momentum * v if nesterov else v).

    Args:
        params: parameters or parameter groups, as in torch; see `penalty_groups`. A parameter listed twice in
            a group is taken once.
        lr: learning rate, a number or a real tensor of one element.
        momentum, dampening, weight_decay, nesterov, maximize: as in torch.
        l1: factor of the L1 penalty, at least 0. Trainers give two groups, of which one brings weight_decay=0
            and holds biases and norms, all of fewer than two dimensions: beside other groups such a group is
            free of this l1 too, unless it names its own.
        l1_mode: "subgradient" adds l1 * sign(w) to the gradient, sign(0) = 0. "proximal" soft-thresholds by
            lr * l1 after the step, so that weights become exactly 0. With momentum the steps of E grow to 1 /
            (1 - momentum) times lr and the threshold does not: the weights go to the minimum of E + (1 -
            momentum) / (1 - dampening) * l1 |w|_1, unless `scale_penalty` is set.
        decoupled: both penalties act on the weight directly and not through the momentum, as in AdamW.
        scale_penalty: what acts on the weight directly (a proximal l1, both factors if `decoupled`) grows by
            (1 - dampening) / (1 - momentum), as the steps of E do, so that the weights go to the minimum of E
            + l1 |w|_1 + weight_decay / 2 |w|_2^2 whatever the momentum.
        stochastic_rounding, rounding_seed: round bfloat16 parameters up or down at random so that small steps
            count in the mean, by numbers on which all ranks agree, as in `AdamW`; no effect on float32 and
            float64.
        ema, ema_warmup, max_norm, error_if_nonfinite: the moving average of the parameters, and clipping, as
            in `AdamW`.
        fused: there is one implementation, which is fused. True also moves the work of
            `torch.amp.GradScaler` into it, as below.
        foreach: accepted and ignored.
        differentiable: must be False.

    All of these but max_norm, error_if_nonfinite and the last three may differ per group. Parameters are
    float32, float64, float16 or bfloat16, dense, of any strides; or complex, whose parts are stepped as
    numbers of their own, as in torch. DTensor parameters (FSDP2) are stepped shard by shard. State:
    `momentum_buffer` per parameter, as in torch, and checkpoints go both ways; with stochastic_rounding a
    count, `step`. What of the momentum and the average is below 2^-126, where steps
    take many times as long, becomes 0 (except in float64). Gradients and products below it
    count as 0; a weight that would become 0 by that stays what it is.

    Under `torch.amp.GradScaler` all is as with torch's SGD. By default the scaler unscales the gradients
    where they lie, and calls `step` unless they overflowed: accelerate, Lightning and step hooks see a
    skipped step as skipped, and gradients can be clipped. With fused=True unscaling and the check happen in
    the pass of the step, which saves a pass over the gradients and the wait for the device; float16
    parameters, whose gradients torch does not unscale, are stepped too. Then a skipped step changes nothing,
    momentum included, but looks like any other to hooks and wrappers; gradients are still scaled after
    `scaler.step`, and Lightning's mixed precisions refuse to clip them.

    Raises:
        ValueError: a NaN or infinite number, a negative one in the constructor (as in torch, in a group it
            may be), nesterov without momentum or with dampening, an unknown l1_mode, a parameter group made
            with a key that no optimiser and no scheduler of torch reads either, an l1 of complex parameters
            (add `penalty` to the loss), scale_penalty with momentum
            of 1 or more or dampening above 1, differentiable=True, stochastic rounding of float16, a gradient
            of another dtype than its parameter.
        TypeError: a sparse gradient where weight_decay or l1 acts; otherwise it is made dense.

    Source: Sutskever et al. 2013 (momentum as in torch); Daubechies et al. 2004 (proximal); Loshchilov and
    Hutter 2019 (decoupled); Gupta et al. 2015 (stochastic rounding).
    """

    _op: ClassVar[str] = "SGD"
    _own_options: ClassVar[dict[str, Any]] = {
        "l1": 0.0,
        "l1_mode": "subgradient",
        "decoupled": False,
        "scale_penalty": False,
        **ROUNDING,
        **_average.OPTIONS,
    }
    _numbers: ClassVar[tuple[str, ...]] = ("lr", "momentum", "dampening", "weight_decay", "l1", "ema")
    _of_one: ClassVar[tuple[str, ...]] = ("momentum",)
    _takes_sparse: ClassVar[bool] = True

    @names_unknown_arguments("SGD", {"l2": "weight_decay", "lambda_": "weight_decay", "wd": "weight_decay"})
    def __init__(
        self,
        params: Params,
        lr: Number = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        l1: float = 0.0,
        l1_mode: Literal["subgradient", "proximal"] = "subgradient",
        decoupled: bool = False,
        maximize: bool = False,
        stochastic_rounding: bool = False,
        rounding_seed: int = 0,
        scale_penalty: bool = False,
        ema: float | None = None,
        ema_warmup: bool | float = False,
        max_norm: float | None = None,
        error_if_nonfinite: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        defaults = dict(
            lr=lr,
            momentum=momentum,
            dampening=dampening,
            weight_decay=weight_decay,
            nesterov=nesterov,
            l1=l1,
            l1_mode=l1_mode,
            decoupled=decoupled,
            maximize=maximize,
            stochastic_rounding=stochastic_rounding,
            rounding_seed=rounding_seed,
            scale_penalty=scale_penalty,
            ema=ema,
            ema_warmup=ema_warmup,
            max_norm=max_norm,
            error_if_nonfinite=error_if_nonfinite,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
        )
        self._begin(params, defaults)

    def _check_group(self, group: dict[str, Any], least: float = -sys.float_info.max) -> None:
        """Raise unless the options of a group make a step. `least` is 0 only in the constructor."""
        op = self._op
        check_number(op, "dampening", group["dampening"], finite=True, allow_bool=True)
        check_penalised(op, group, ("momentum", "weight_decay"), least)
        check_average(op, group)
        check_rounding(op, group)
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise ValueError(
                f"{op}: nesterov needs momentum > 0 and dampening 0, got {group['momentum']} and "
                f"{group['dampening']}"
            )
        if group.get("scale_penalty") and not (0 <= group["momentum"] < 1 and group["dampening"] <= 1):
            raise ValueError(
                f"{op}: scale_penalty needs momentum in [0, 1) and dampening of at most 1, got "
                f"{group['momentum']} and {group['dampening']}"
            )

    def _columns(self, group: dict[str, Any], skippable: bool) -> tuple[Column, ...]:
        """Flag and count stand first, because they tell a first step by the missing buffer."""
        buffer = (_BUFFER,) if group["momentum"] else ()
        if group["stochastic_rounding"]:
            return (_STEP, *buffer)
        return (_STARTED, *buffer) if buffer and group["dampening"] != 0 else buffer

    def _shown_states(self) -> dict[torch.Tensor, dict[str, Any]]:
        """A momentum that has not begun, because its first step was skipped, is None, as in torch's class.
        That would take the zeros for a momentum, and dampen the first gradient.
        """
        shown = super()._shown_states()
        for p, state in self.state.items():
            begun = state.get("momentum_started", state.get("step"))
            if "momentum_buffer" in state and begun is not None and not begun:
                shown[p] = {**shown.get(p, state), "momentum_buffer": None}
        return shown

    def _step_fast(self, fast: Any, groups: list[dict[str, Any]], *max_norm: Any) -> Any:
        """Call the step in C++."""
        return fast.sgd([_scaled(group) for group in groups], self.state, *max_norm)

    def _call(
        self,
        group: dict[str, Any],
        device: torch.device,
        work: Work,
        scaling: Scaling,
        ema_tensor: torch.Tensor | None,
    ) -> None:
        """Call the operator for one group on one device."""
        group = _scaled(group)
        lr, lr_tensor = rate_of(group, device)
        started = "step" if group["stochastic_rounding"] else "momentum_started"
        names = ("momentum_buffer", started, "ema", "n_averaged")
        lists: Any = (work.params, work.grads, *(work.state.get(name, []) for name in names))
        numbers = (
            lr,
            float(group["momentum"]),
            float(group["dampening"]),
            float(group["weight_decay"]),
            float(group["l1"]),
            float(group["ema"] or 0),
        )
        others = (
            bool(group["nesterov"]),
            group["l1_mode"] == "proximal",
            bool(group["decoupled"]),
            bool(group["maximize"]),
            lr_tensor,
            *scaling,
            ema_tensor,
            seed_of(group, device),
            work.places,
        )
        sgd_step(lists, numbers, others)


def _started(p: torch.Tensor, state: dict[str, Any]) -> torch.Tensor:
    """Whether the momentum has moved already: with a buffer it has."""
    started = 1.0 if "momentum_buffer" in state else 0.0
    return torch.full((), started, dtype=torch.float32, device=p.device)


_STARTED = Column("momentum_started", _started, is_number=True)
_STEP = Column("step", _started, is_number=True)
_BUFFER = Column("momentum_buffer", zeros)


def _scaled(group: dict[str, Any]) -> dict[str, Any]:
    """The group as the operator takes it, with `scale_penalty` carried out."""
    if not group.get("scale_penalty") or not group["momentum"]:
        return group
    direct = (
        ("l1", "weight_decay") if group["decoupled"] else ("l1",) if group["l1_mode"] == "proximal" else ()
    )
    factor = (1 - group["dampening"]) / (1 - group["momentum"])
    return {**group, **{name: group[name] * factor for name in direct}}
