"""AdamW with both norm penalties, clipping and the moving average in one pass over memory.

The step of Adam (Kingma and Ba 2015) with the decay beside it (Loshchilov and Hutter 2019), in the order and
with the rounding of `torch.optim.AdamW`.
"""

from __future__ import annotations

import sys
from typing import Any, ClassVar, Literal

import numpy
import torch
from torch.compiler import is_compiling

from .._adamw import adamw_step
from .._checks import ArgumentError, check_choice, check_number, names_unknown_arguments
from .._types import Number
from . import _average
from ._average import check_average
from ._groups import Params, check_penalised
from ._one_pass import ROUNDING, Column, OnePass, Scaling, Work, check_rounding, rate_of, seed_of, zero, zeros


class AdamW(OnePass, torch.optim.AdamW):
    """AdamW with L1, cautious decay, clipping and a moving average; drop-in for `torch.optim.AdamW`, which it
    subclasses.

    With g = dE/dw, step number t, m and v the averages of g and of g^2, d = sqrt(v / (1 - beta2^t)) + eps:
    w = w - lr * weight_decay * w;  w = w - lr / (1 - beta1^t) * m / d;  w = sign(w) max(|w| - lr l1 / d, 0).

    Args:
        params: parameters or parameter groups, as in torch; see `penalty_groups`. A parameter listed twice in
            a group is taken once.
        lr: learning rate, a number or a real tensor of one element.
        betas: decays of m and v in [0, 1), numbers or tensors of one element. Those on a GPU are read in
            every step, which waits for it.
        eps, weight_decay, amsgrad, maximize: as in torch.
        l1: factor of the L1 penalty, at least 0. Trainers give two groups, of which one brings weight_decay=0
            and holds biases and norms, all of fewer than two dimensions: beside other groups such a group is
            free of this l1 too, unless it names its own.
        l1_mode: "proximal" soft-thresholds after the step, so that weights become exactly 0. AdamW goes
            down E in the metric of diag(d) / lr: it minimises g w + d / (2 lr) (w - w_old)^2 for each weight.
            With l1 |w| added the minimum is the soft threshold by lr * l1 / d of what the step gave: a weight
            that E holds weakly, so of small d, is pulled more. Where the gradient has always been 0, as for
            rows of an embedding that no batch has had yet, d is eps and one step of lr 1e-3, l1 1e-6, eps
            1e-8 takes away 0.1: give such tables l1=0 (`penalty_groups(overrides=...)`) or a larger eps.
            A weight rests where dE/dw + l1 sign(w) contains 0, whatever d, so the fixed points are those of
            E + l1 |w|_1; with a threshold of lr * l1 they would be others. "subgradient" adds l1 * sign(w)
            to the gradient, sign(0) = 0, from where m and v rescale it: small weights oscillate around 0.
        cautious: the decay acts only where update and weight agree in sign, m * w >= 0, so where both pull
            towards 0, and does not shift the minimum of E.
        stochastic_rounding: round bfloat16 parameters and averages up or down at random so that small steps
            count in the mean; no effect on float32 and float64. No generator is drawn from: the numbers are a
            function of rounding_seed, the parameter's count of steps, its number among the optimiser's and an
            element's index, so that replicas and shards on all ranks agree, and resumed training does.
        rounding_seed: an int64, kept with the other options in state_dict. The same on all ranks; another one
            for other numbers, such as torch.initial_seed() % 2**63 where all ranks are seeded alike.
        ema: decay of a moving average of the parameters, in [0, 1); None for none. It is taken in the same
            pass, with the weight before it is rounded, and is `state[p]["ema"]`: the weights after a
            parameter's first step, then ema * average + (1 - ema) * weights, as `AveragedModel` with
            `get_ema_multi_avg_fn(ema)` does. As with every option of a group, a loaded state dict's counts:
            one without averages switches them off. In bfloat16 a decay above 0.99 hardly moves it without
            stochastic_rounding.
        ema_warmup: let the decay of update n, counted from 0, be min(ema, 1 - (1 + n)^-power), so that the
            first weights are forgotten early; torch's AveragedModel has none. True is the power 2/3 with
            which timm's ModelEmaV3 (`use_warmup=True`) and diffusers' EMAModel (`use_ema_warmup=True`) do it;
            a number is another, theirs for short trainings is 0.75.
        max_norm: clip the gradients by their norm over all groups and devices, as
            `torch.nn.utils.clip_grad_norm_` does, with the factor min(1, max_norm / (norm + 1e-6)). They are
            only read. The norm is `grad_norm`, a tensor on the device; with inf there is only the norm. Of
            DTensors it is over all shards. A norm that is not finite skips the step, state included.
        error_if_nonfinite: raise RuntimeError in place of that, which waits for the device.
        capturable: the counts of steps lie on the parameters' devices, as in torch; otherwise on the CPU
            unless fused or max_norm is set. A step can be captured in a CUDA graph with either.
        fused: there is one implementation, which is fused. True also moves the work of
            `torch.amp.GradScaler` into it, as in `SGD`; max_norm is then of the unscaled gradients.
        foreach: accepted and ignored.
        differentiable: must be False.

    All of these but max_norm, error_if_nonfinite and the last three may differ per group. Parameters are
    float32, float64, float16 or bfloat16, dense, of any strides; or complex, whose parts are stepped as
    numbers of their own, as in torch. DTensor parameters (FSDP2) are stepped shard by shard. State: `step`,
    `exp_avg`, `exp_avg_sq` and `max_exp_avg_sq` per parameter, as in torch, and checkpoints
    go both ways; `ema` and `n_averaged` with an average, where a parameter without a gradient counts as one
    that stays where it is. One that is frozen from the start has no average, and begins one in the first step
    after it is unfrozen. What of the moments and the average is below 2^-126, where steps take
    many times as long, becomes 0 (except in float64). Gradients and products below it
    count as 0; a weight that would become 0 by that stays what it is.

    Raises:
        ValueError: a NaN or infinite number, a negative one in the constructor (as in torch, in a group it
            may be), betas or ema outside of [0, 1), an unknown l1_mode, a parameter group made with a key
            that no optimiser and no scheduler of torch reads either, an l1 of complex parameters (add
            `penalty` to the loss), differentiable=True, stochastic rounding
            of float16, a gradient of another dtype than its parameter.
        TypeError: a sparse gradient.

    Source: Yun, Lozano, Yang 2021 and Melchior, Joseph, Moolekamp 2019 (proximal, in the metric of the step);
    Chen et al. 2025 (cautious decay); Reddi et al. 2018 (amsgrad); Gupta et al. 2015 (stochastic rounding).
    """

    _op: ClassVar[str] = "AdamW"
    _own_options: ClassVar[dict[str, Any]] = {
        "l1": 0.0,
        "l1_mode": "proximal",
        "cautious": False,
        **ROUNDING,
        **_average.OPTIONS,
    }
    _numbers: ClassVar[tuple[str, ...]] = ("lr", "eps", "weight_decay", "l1", "ema")
    _of_one: ClassVar[tuple[str, ...]] = ("eps", "weight_decay")
    _takes_sparse: ClassVar[bool] = False

    @names_unknown_arguments("AdamW", {"l2": "weight_decay", "lambda_": "weight_decay", "wd": "weight_decay"})
    def __init__(
        self,
        params: Params,
        lr: Number = 1e-3,
        betas: tuple[Number, Number] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        l1: float = 0.0,
        l1_mode: Literal["subgradient", "proximal"] = "proximal",
        cautious: bool = False,
        maximize: bool = False,
        stochastic_rounding: bool = False,
        rounding_seed: int = 0,
        ema: float | None = None,
        ema_warmup: bool | float = False,
        max_norm: float | None = None,
        error_if_nonfinite: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        defaults = dict(
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            amsgrad=amsgrad,
            l1=l1,
            l1_mode=l1_mode,
            cautious=cautious,
            maximize=maximize,
            stochastic_rounding=stochastic_rounding,
            rounding_seed=rounding_seed,
            ema=ema,
            ema_warmup=ema_warmup,
            max_norm=max_norm,
            error_if_nonfinite=error_if_nonfinite,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=True,
        )
        self._begin(params, defaults)

    def _in_numbers(self, group: dict[str, Any]) -> dict[str, Any]:
        """A parameter group as the operator takes it."""
        group = super()._in_numbers(group)
        for name in ("amsgrad", "maximize"):  # which torch only asks whether they are true
            if type(group[name]) is not bool:
                group = {**group, name: bool(group[name])}
        betas = group["betas"]
        if isinstance(betas, (numpy.ndarray, torch.Tensor)) and betas.shape == (2,):
            group = {**group, "betas": tuple(betas.tolist())}
        elif isinstance(betas, list) or (
            isinstance(betas, tuple) and not all(type(beta) is float for beta in betas)
        ):
            group = {**group, "betas": tuple(map(_beta, betas))}
        return group

    def _check_group(self, group: dict[str, Any], least: float = -sys.float_info.max) -> None:
        """Raise unless the options of a group make a step. `least` is 0 only in the constructor."""
        op = self._op
        check_penalised(op, group, ("eps", "weight_decay"), least)
        check_average(op, group)
        check_rounding(op, group)
        betas = group["betas"]
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            kind = ArgumentError if hasattr(betas, "__len__") else TypeError
            raise kind(f"{op}: betas must be two numbers, got {betas!r}; use (0.9, 0.999)")
        for i, beta in enumerate(betas):
            check_number(op, f"betas[{i}]", beta, finite=True, allow_bool=True)
            if not 0 <= beta < 1:
                raise ArgumentError(f"{op}: betas[{i}] must be in [0, 1), got {beta}")
        check_choice(op, "cautious", group["cautious"], (False, True))
        if not group.get("decoupled_weight_decay", True):
            raise ValueError(
                f"{op}: decoupled_weight_decay must be True, got False; use torch.optim.Adam for an L2 "
                f"penalty inside of the gradient"
            )

    def _columns(self, group: dict[str, Any], skippable: bool) -> tuple[Column, ...]:
        """The count of steps lies where torch keeps it, or on the device that skips steps."""
        on_device = skippable or group["capturable"] or group["fused"]
        columns = (_STEP if on_device else _STEP_ON_CPU, _AVERAGE, _SQUARE)
        return (*columns, _MOST) if group["amsgrad"] else columns

    def _step_fast(self, fast: Any, groups: list[dict[str, Any]], *max_norm: Any) -> Any:
        """Call the step in C++."""
        return fast.adamw(groups, self.state, *max_norm)

    def _call(
        self,
        group: dict[str, Any],
        device: torch.device,
        work: Work,
        scaling: Scaling,
        ema_tensor: torch.Tensor | None,
    ) -> None:
        """Call the operator for one group on one device."""
        if (
            device.type == "cuda"
            and not is_compiling()
            and work.state["step"][0].device.type == "cpu"
            and torch.cuda.is_current_stream_capturing()
        ):
            raise RuntimeError(
                f"{self._op}: a step in a CUDA graph needs its count of steps on the device, or every replay "
                f"takes the same count; construct with capturable=True"
            )
        lr, lr_tensor = rate_of(group, device)
        names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step", "ema", "n_averaged")
        lists: Any = (work.params, work.grads, *(work.state.get(name, []) for name in names))
        beta1, beta2 = group["betas"]
        numbers = (
            lr,
            float(beta1),
            float(beta2),
            float(group["eps"]),
            float(group["weight_decay"]),
            float(group["l1"]),
            float(group["ema"] or 0),
        )
        others = (
            group["l1_mode"] == "proximal",
            bool(group["cautious"]),
            bool(group["maximize"]),
            lr_tensor,
            *scaling,
            ema_tensor,
            seed_of(group, device),
            work.places,
        )
        adamw_step(lists, numbers, others)


def _beta(value: Any) -> Any:
    """The number in a tensor of one element, which torch takes too; all else as it is."""
    if isinstance(value, numpy.generic) or (isinstance(value, torch.Tensor) and value.numel() == 1):
        return value.item()
    return value


def _zero_on_cpu(p: torch.Tensor, state: dict[str, Any]) -> torch.Tensor:
    """A count where torch's AdamW has it by default."""
    return torch.zeros((), dtype=torch.float32, device="cpu")


_STEP = Column("step", zero, is_number=True)
_STEP_ON_CPU = Column("step", _zero_on_cpu, is_number=True, anywhere=True)
_AVERAGE = Column("exp_avg", zeros)
_SQUARE = Column("exp_avg_sq", zeros)
_MOST = Column("max_exp_avg_sq", zeros)
