"""SGD with momentum and both norm penalties in one pass over memory, and the penalties by themselves.

    w <- w - lr * (dE/dw + weight_decay * w + l1 * sign(w))

is a step down the gradient of E + l1 |w|_1 + weight_decay / 2 |w|_2^2 (Goodfellow, Bengio, Courville 2016,
section 7.1).
"""

from __future__ import annotations

import fnmatch
import functools
import inspect
import math
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, NoReturn, TypeAlias

import numpy
import torch
from torch.compiler import is_compiling
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ._checks import (
    DTYPES,
    ArgumentError,
    UnsupportedError,
    check_choice,
    check_initialised,
    check_number,
    check_tensor,
    names_unknown_arguments,
)
from ._registry import fast
from ._seeds import draw_seed
from ._sgd import sgd_, sgd_numbers_, sgd_with_numbers
from ._types import Number

__all__ = ["SGD", "penalty", "penalty_groups", "prior_scale", "sparsity"]

# What torch takes as parameters: tensors, (name, tensor) pairs, or groups, dicts whose "params" are either.
Params: TypeAlias = Iterable[torch.Tensor] | Iterable[tuple[str, torch.Tensor]] | Iterable[dict[str, Any]]

# The tensors of one device in a step: params, grads, momentum_buffers, momentum_started.
Work: TypeAlias = tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]
_NO_AVERAGES: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])


# The options of a parameter group that torch.optim.SGD does not have.
_OWN_OPTIONS = {
    "l1": 0.0,
    "l1_mode": "subgradient",
    "decoupled": False,
    "scale_penalty": False,
    "stochastic_rounding": False,
}


class SGD(torch.optim.SGD):
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
        stochastic_rounding: round bfloat16 parameters up or down at random so that small steps count in the
            mean; no effect on float32 and float64. The seed comes from the device's default generator:
            data-parallel ranks must seed it alike.
        fused: there is one implementation, which is fused. True also moves the work of
            `torch.amp.GradScaler` into it, as below.
        foreach: accepted and ignored.
        differentiable: must be False.

    All of these but the last three may differ per group. Parameters are float32, float64, float16 or
    bfloat16, dense, of any strides; DTensor parameters (FSDP2) are stepped shard by shard. State:
    `momentum_buffer` per parameter, as in torch, and checkpoints go both ways.

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
            with a key that no optimiser and no scheduler of torch reads either, scale_penalty with momentum
            of 1 or more or dampening above 1, differentiable=True, stochastic rounding of float16, a gradient
            of another dtype than its parameter.
        TypeError: a sparse gradient.

    Source: Sutskever et al. 2013 (momentum as in torch); Daubechies et al. 2004 (proximal); Loshchilov and
    Hutter 2019 (decoupled); Gupta et al. 2015 (stochastic rounding).
    """

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
        scale_penalty: bool = False,
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
            scale_penalty=scale_penalty,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
        )
        _check_params(params)
        _check_group(_in_numbers(defaults), least=0)
        torch.optim.Optimizer.__init__(self, _free_groups(params) if l1 else params, defaults)
        self._let_scaler_into_step()

    def _let_scaler_into_step(self) -> None:
        """With fused=True tell GradScaler, in torch.amp's way, that `step` unscales and looks for overflow.

        Otherwise the scaler decides before the step. Only so do accelerate, Lightning, schedules and step
        hooks learn that a step was skipped, and only so may gradients be clipped under Lightning's mixed
        precisions.
        """
        if self.defaults["fused"]:
            self._step_supports_amp_scaling = True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, checked as in the constructor."""
        if not isinstance(param_group, dict) or isinstance(param_group["params"], set):
            super().add_param_group(param_group)  # torch says what is wrong
            return
        group = _in_numbers({**self.defaults, **param_group})
        _check_keys(group, self.defaults)
        _check_group(group)
        params = group["params"]
        params = [params] if isinstance(params, torch.Tensor) else list(params)
        unique = {id(_tensor_of(p)): p for p in params}
        for p in unique.values():
            if isinstance(_tensor_of(p), torch.Tensor):
                _check_param(group, _tensor_of(p))
        super().add_param_group({**param_group, "params": list(unique.values())})

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over what `load_state_dict` has read, or a pickle. This class's own options, which a state
        dict of `torch.optim.SGD` lacks, stay as they were.
        """
        groups = self.__dict__.get("param_groups", ())
        super().__setstate__(state)
        for i, group in enumerate(self.param_groups):
            before = groups[i] if i < len(groups) else {}
            for name, default in _OWN_OPTIONS.items():
                group.setdefault(name, before.get(name, default))
        for values in self.state.values():  # load_state_dict gives the flag the dtype of the parameter
            if "momentum_started" in values:
                values["momentum_started"] = values["momentum_started"].float()
        if "defaults" in state:  # from a copy or a pickle
            self._let_scaler_into_step()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform one step; `closure` recomputes the loss, which is returned, as in torch."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = [_in_numbers(group) for group in self.param_groups]
        for group in groups:
            _check_group(group)
        groups = [_scaled(group) for group in groups]
        # A GradScaler leaves these two here; torch.amp has no other way of telling an optimiser.
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        usual = grad_scale is None and found_inf is None and not is_compiling()
        if usual and fast is not None and fast.sgd(groups, self.state):
            return loss
        # All groups are collected before the first is stepped, so that an error leaves everything as it was.
        works = [self._collect(group) for group in groups]
        for group, work in zip(groups, works, strict=True):
            for device, lists in work.items():
                _step(group, device, lists, grad_scale, found_inf)
        return loss

    def _collect(self, group: dict[str, Any]) -> dict[torch.device, Work]:
        """The tensors of a parameter group by device, checked; of a DTensor the local shard.

        With many small tensors this loop is most of a step. It therefore makes no call and no container per
        parameter.
        """
        work: dict[torch.device, Work] = {}
        momentum, dampening = group["momentum"] != 0, group["dampening"] != 0
        for p in group["params"]:
            grad = p.grad
            if grad is None:
                continue
            dtype, device = p.dtype, p.device
            if grad.layout != torch.strided or grad.dtype != dtype or dtype not in DTYPES:
                _refuse_gradient(p, grad)
            if dtype == torch.float16 and group["stochastic_rounding"]:
                _check_param(group, p)
            lists = work.get(device)
            if lists is None:
                lists = work[device] = ([], [], [], [])
            sharded = hasattr(p, "to_local")
            lists[0].append(p.to_local() if sharded else p)
            lists[1].append(_like_placed(grad, p).to_local() if sharded else grad)
            if not momentum:
                continue
            state = self.state[p]
            buffer = state.get("momentum_buffer")
            fresh = buffer is None
            if fresh:
                buffer = state["momentum_buffer"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            lists[2].append(buffer.to_local() if sharded else buffer)
            if dampening:
                flag = state.get("momentum_started")
                if flag is None:
                    flag = torch.full((), 0.0 if fresh else 1.0, dtype=torch.float32, device=device)
                # load_state_dict gives the flag the dtype of the parameter; the operator wants float32.
                state["momentum_started"] = flag = flag.float()
                lists[3].append(flag)
        return work


def _step(
    group: dict[str, Any],
    device: torch.device,
    lists: Work,
    grad_scale: torch.Tensor | None,
    found_inf: torch.Tensor | None,
) -> None:
    """One call of the operator: the tensors of a parameter group on one device."""
    # torch.compile counts the versions itself. Elsewhere a graph that has saved a weight must find out that
    # the weight has changed.
    if not is_compiling():
        torch.autograd.graph.increment_version(lists[0])
    lr = group["lr"]
    lr_tensor = None
    if isinstance(lr, torch.Tensor):
        narrow = lr.dtype in (torch.float32, torch.float16, torch.bfloat16)
        lr_tensor, lr = lr.detach().to(device, torch.float32 if narrow else torch.float64), 0.0
    numbers = (
        float(lr),
        float(group["momentum"]),
        float(group["dampening"]),
        float(group["weight_decay"]),
        float(group["l1"]),
        0.0,
    )
    others = (
        bool(group["nesterov"]),
        group["l1_mode"] == "proximal",
        bool(group["decoupled"]),
        bool(group["maximize"]),
        lr_tensor,
        None if grad_scale is None else grad_scale.to(device),
        None if found_inf is None else found_inf.to(device),
        None,
        None,
        draw_seed(device) if group["stochastic_rounding"] else None,
    )
    if not is_compiling():
        sgd_with_numbers(*lists, *_NO_AVERAGES, numbers, *others)
    elif all(map(_fixed, numbers)) and min(numbers[0], numbers[1], numbers[3]) >= 0:
        sgd_(*lists, *_NO_AVERAGES, *numbers, *others)
    else:
        # As factors of a tensor, rather than its contents, they stay inputs of inductor's graph too.
        one = torch.ones((), dtype=torch.float64, device="cpu")
        sgd_numbers_(*lists, *_NO_AVERAGES, torch.stack([one * number for number in numbers]), *others)


def _fixed(number: float) -> bool:
    """Whether torch.compile takes the number for a constant, and not for an input of its graph: of an input
    it cannot know on which side of some bound it lies.
    """
    bound = 0.7071067811865475
    return statically_known_true(number > bound) or statically_known_true(number <= bound)


def _free_groups(params: Any) -> Any:
    """Parameters as given, where groups of biases and norms that are free of weight_decay are free of l1."""
    if isinstance(params, (torch.Tensor, dict, str)) or not isinstance(params, Iterable):
        return params  # of one tensor torch says what is wrong
    params = list(params)
    free = [isinstance(group, dict) and _is_free(group) for group in params]
    if all(free):
        return params
    return [{**group, "l1": 0.0} if is_free else group for group, is_free in zip(params, free, strict=True)]


def _is_free(group: dict[str, Any]) -> bool:
    """Whether a group asks for no decay, names no l1, and holds nothing but biases, norms and the like."""
    params = group.get("params", ())
    decays = "weight_decay" not in group or bool(group["weight_decay"])
    if decays or "l1" in group or not isinstance(params, (list, tuple, torch.Tensor)):
        return False
    tensors = [_tensor_of(p) for p in ([params] if isinstance(params, torch.Tensor) else params)]
    return all(isinstance(p, torch.Tensor) and p.dim() < 2 for p in tensors)


def _tensor_of(param: Any) -> Any:
    """A parameter; torch also takes (name, parameter)."""
    return param[1] if isinstance(param, tuple) else param


def _like_placed(grad: Any, param: Any) -> Any:
    """A DTensor's gradient, sharded as the parameter is. Partial sums and replicas would update a shard with
    the wrong numbers.
    """
    if hasattr(grad, "placements") and grad.placements != param.placements:
        return grad.redistribute(placements=param.placements)
    return grad


def _in_numbers(group: dict[str, Any]) -> dict[str, Any]:
    """A parameter group whose factors are Python's numbers: torch also takes tensors and NumPy's scalars. A
    learning rate that is a tensor on another device, or in compiled code, stays one.
    """
    changed = {}
    for name in ("lr", "momentum", "dampening", "weight_decay", "l1"):
        value = group[name]
        if type(value) in (float, int, bool):
            continue
        if isinstance(value, numpy.generic) or (name == "lr" and isinstance(value, numpy.ndarray)):
            changed[name] = value.item()
        elif isinstance(value, torch.Tensor) and _stands_for_number(name, value):
            changed[name] = value.detach().item()
    return {**group, **changed} if changed else group


def _stands_for_number(name: str, value: torch.Tensor) -> bool:
    """Whether torch takes the tensor for a number, and its value is to be read."""
    if name == "lr":
        known = value.device.type == "cpu" and not is_compiling()
        return known and value.numel() == 1 and value.dtype != torch.bool
    return value.dim() == 0 or (name == "momentum" and value.shape == (1,))


def _check_group(group: dict[str, Any], least: float = -sys.float_info.max) -> None:
    """Raise unless the options of a group make a step. `least` is 0 in the constructor alone, as in torch."""
    op = "SGD"
    lr = group["lr"]
    if isinstance(lr, torch.Tensor) and (lr.numel() != 1 or lr.dtype == torch.bool or lr.is_complex()):
        raise UnsupportedError(
            f"{op}: lr must be a number or a real tensor of one element, got {lr.dtype} {tuple(lr.shape)}"
        )
    for name in ("lr", "momentum", "weight_decay"):
        if name != "lr" or not isinstance(lr, torch.Tensor):
            _check_factor(op, name, group[name], least)
    _check_factor(op, "l1", group["l1"])
    check_number(op, "dampening", group["dampening"], finite=True, allow_bool=True)
    check_choice(op, "l1_mode", group["l1_mode"], ("subgradient", "proximal"))
    if group["l1_mode"] == "proximal" and group["l1"] and not isinstance(lr, torch.Tensor) and lr < 0:
        raise ArgumentError(f"{op}: lr must be at least 0 with a proximal l1, got {lr}; use 'subgradient'")
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
    if group["differentiable"]:
        raise ValueError(
            f"{op}: differentiable must be False, the fused step has no gradient; use torch.optim.SGD for "
            f"that"
        )


# What others read of a parameter group: torch's schedulers and averages, and the multipliers and names that
# timm, detectron2, mmengine and others keep there.
_OTHERS_KEYS = {
    *("params", "param_names", "name", "group_name", "initial_lr", "min_lr", "max_lr", "swa_lr"),
    *("base_momentum", "max_momentum", "lr_scale", "lr_mult", "wd_mult", "decay_mult"),
}


@functools.cache
def _keys_of_torch() -> frozenset[str]:
    """The options of torch's optimisers, which write all of theirs into the groups that they are given."""
    kinds = (kind for kind in vars(torch.optim).values() if isinstance(kind, type))
    kinds = (kind for kind in kinds if issubclass(kind, torch.optim.Optimizer))
    return frozenset(name for kind in kinds for name in inspect.signature(kind).parameters)


def _check_keys(group: dict[str, Any], own: Mapping[str, Any]) -> None:
    """Raise where a new group has a key that nothing reads, such as L1 for l1."""
    unknown = [key for key in group if key not in own and key not in _OTHERS_KEYS]
    unknown = [key for key in unknown if key not in _keys_of_torch()]
    if unknown:
        raise ValueError(
            f"SGD: a parameter group has {', '.join(map(repr, unknown))}, which nothing reads; expected "
            f"{', '.join(own)}. What your own code keeps there, set in optimizer.param_groups afterwards"
        )


def _scaled(group: dict[str, Any]) -> dict[str, Any]:
    """The group as the operator takes it, with `scale_penalty` carried out."""
    if not group.get("scale_penalty") or not group["momentum"]:
        return group
    direct = (
        ("l1", "weight_decay") if group["decoupled"] else ("l1",) if group["l1_mode"] == "proximal" else ()
    )
    factor = (1 - group["dampening"]) / (1 - group["momentum"])
    return {**group, **{name: group[name] * factor for name in direct}}


def _check_params(params: Any) -> None:
    """Raise where a model, or one of its methods, is given in the place of its parameters."""
    got = None
    if isinstance(params, torch.nn.Module):
        got = type(params).__name__
    elif inspect.ismethod(params):
        got = f"the method {params.__name__}, which was not called"
    if got:
        raise TypeError(
            f"SGD: params must be parameters or parameter groups, got {got}; give model.parameters() or "
            f"fastreg.optim.penalty_groups(model, ...)"
        )


def _check_factor(op: str, name: str, value: Any, least: float = 0) -> None:
    """torch takes True and False as 1 and 0, and so do the factors of a parameter group."""
    if isinstance(value, (int, float)) and least <= value < 0:
        return
    check_number(op, name, value, 0, finite=True, allow_bool=True)


def _check_param(group: dict[str, Any], p: torch.Tensor) -> None:
    if group["stochastic_rounding"] and p.dtype == torch.float16:
        raise ValueError(
            "SGD: stochastic_rounding is for bfloat16 parameters, got torch.float16; switch it off"
        )
    if p.layout == torch.strided and any(
        stride == 0 and size > 1 for size, stride in zip(p.shape, p.stride(), strict=True)
    ):
        raise ValueError(
            f"SGD: a parameter's elements must not share memory, got strides {p.stride()}; use .clone()"
        )


def _refuse_gradient(p: torch.Tensor, grad: torch.Tensor) -> NoReturn:
    if p.dtype not in DTYPES:
        raise TypeError(
            f"SGD: parameters must be float32, float64, float16 or bfloat16, got {p.dtype}; use "
            f"torch.optim.SGD"
        )
    if grad.layout != torch.strided:
        raise TypeError(
            f"SGD: gradients must be dense, got {grad.layout}; use sparse=False or torch.optim.SGD"
        )
    raise ValueError(
        f"SGD: a gradient must have the dtype of its parameter, {p.dtype}, got {grad.dtype}; convert it with "
        f".to({p.dtype})"
    )


_NORMS = (
    torch.nn.modules.batchnorm._NormBase,
    torch.nn.LayerNorm,
    torch.nn.GroupNorm,
    torch.nn.RMSNorm,
    torch.nn.LocalResponseNorm,
)


def penalty_groups(
    model: torch.nn.Module,
    *,
    l1: float = 0.0,
    l2: float = 0.0,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups for `SGD` with a penalty on the weights alone.

    Biases, parameters of normalisation layers and all others of fewer than two dimensions get no penalty:
    shrinking them costs fit and simplifies nothing (Goodfellow et al. 2016, section 7.1).

    Args:
        model: Module. A parameter under several names is one parameter and is penalised once; of a weight
            under `torch.nn.utils.parametrize`, what it is made of.
        l1, l2: factors of |w|_1 and of 1/2 |w|_2^2; l2 is what torch calls weight_decay.
        overrides: {pattern: dict(...)}: options for the parameters whose name matches the pattern (`fnmatch`,
            "encoder.*"), with or without what torch.compile, DistributedDataParallel, AveragedModel and
            parametrizations add to it. l1, l2 (or weight_decay) and any other option of a parameter group,
            such as lr. They win over the rule above; where several patterns match, the later wins.

    Returns:
        List of parameter groups, dicts with "params", "l1", "weight_decay" and what overrides adds;
        parameters that do not require a gradient are left out.

    Raises:
        ValueError: a negative or NaN factor, a pattern that matches no parameter, a lazy layer that has not
            run yet.
        TypeError: model is no Module.
    """
    op = "penalty_groups"
    for name, value in (("l1", l1), ("l2", l2)):
        _check_factor(op, name, value)
    changes = {pattern: _options(op, options) for pattern, options in (overrides or {}).items()}

    if not isinstance(model, torch.nn.Module):
        raise TypeError(
            f"{op}: model must be a torch.nn.Module, whose parameters have names, got "
            f"{type(model).__name__}; give the model itself"
        )
    check_initialised(op, model)

    # Every parameter with all of its names, and which of them no penalty acts on.
    names: dict[torch.nn.Parameter, list[str]] = {}
    free: set[torch.nn.Parameter] = set()
    for owner, own_name, full_name, p in _named_parameters(model):
        names.setdefault(p, []).extend({own_name, full_name})
        if p.dim() < 2 or isinstance(owner, _NORMS) or own_name.endswith("bias"):
            free.add(p)
    for pattern in changes:
        if not any(fnmatch.fnmatchcase(name, pattern) for own in names.values() for name in own):
            raise ValueError(
                f"{op}: overrides pattern {pattern!r} matches no parameter; see model.named_parameters()"
            )

    # Parameters with the same options are one group.
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for p, own in names.items():
        if not p.requires_grad:
            continue
        options: dict[str, Any] = {"l1": 0.0, "weight_decay": 0.0}
        if p not in free:
            options = {"l1": l1, "weight_decay": l2}
        for pattern, changed in changes.items():
            if any(fnmatch.fnmatchcase(name, pattern) for name in own):
                options = {**options, **changed}
        same = tuple(sorted(options.items(), key=str))
        groups.setdefault(same, {"params": [], **options})["params"].append(p)
    return list(groups.values())


# Wrappers whose names users leave out: by the name of the module that they wrap, and by the wrapper's type
# where that name is a usual one.
_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
_WRAPPERS = (
    torch.nn.DataParallel,
    torch.nn.parallel.DistributedDataParallel,
    torch.optim.swa_utils.AveragedModel,
)


def _named_parameters(
    module: torch.nn.Module, full: str = "", own: str = ""
) -> Iterator[tuple[torch.nn.Module, str, str, torch.nn.Parameter]]:
    """(module, name without wrappers, full name, parameter) for every place where a parameter stands.

    What `torch.nn.utils.parametrize` makes of a weight has the weight's name without wrappers, and belongs to
    the weight's module.
    """
    for leaf, p in module._parameters.items():
        if p is not None:
            yield module, own + leaf, full + leaf, p
    for name, child in module._modules.items():
        if child is None:
            continue
        if name == "parametrizations" and torch.nn.utils.parametrize.is_parametrized(module):
            for leaf, originals in child.named_children():
                where = f"{full}parametrizations.{leaf}."
                for original, p in originals._parameters.items():
                    if p is not None:
                        yield module, own + leaf, where + original, p
                for each, function in originals.named_children():
                    yield from _named_parameters(function, f"{where}{each}.", f"{where}{each}.")
            continue
        wrapped = name in _WRAPPED or (name == "module" and isinstance(module, _WRAPPERS))
        yield from _named_parameters(child, f"{full}{name}.", own if wrapped else f"{own}{name}.")


def _options(op: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of one pattern under the optimiser's names, checked."""
    options = dict(given)
    if "l2" in options:
        options["weight_decay"] = options.pop("l2")
    for name in ("l1", "weight_decay"):
        if name in options:
            _check_factor(op, name, options[name])
    return options


def penalty(
    params_or_groups: Params | torch.optim.Optimizer | torch.nn.Module | torch.Tensor | dict[str, Any],
    *,
    l1: float = 0.0,
    l2: float = 0.0,
) -> torch.Tensor:
    """The regulariser lambda * Omega(w) = sum of l1 |w|_1 + l2 / 2 |w|_2^2, to report E + lambda * Omega or
    to add it to a loss.

    Args:
        params_or_groups: an optimiser, its `param_groups` or `penalty_groups(...)`, which bring their own
            "l1" and "weight_decay"; a Module, to whose weights the factors below apply by the rule of
            `penalty_groups`, without biases and norms; or a tensor or tensors, all of which they apply to.
            Of an optimiser counts what it penalises: no parameter that requires no gradient, and no "l1" of
            one that knows none, such as `torch.optim.SGD`, about which there is a UserWarning.
        l1, l2: factors for what brings none of its own.

    Returns:
        Tensor of shape (), float32 (float64 for float64 parameters), differentiable (the derivative of |w| at
        0 is 0). A parameter that comes twice counts once.
    """
    for name, value in (("l1", l1), ("l2", l2)):
        _check_factor("penalty", name, value)
    source: Any = params_or_groups
    if isinstance(source, torch.optim.Optimizer):
        source = _penalised(source)
    elif isinstance(source, torch.nn.Module):
        source = penalty_groups(source, l1=l1, l2=l2)
    elif isinstance(source, (torch.Tensor, dict)):
        source = [source]
    seen: set[int] = set()
    total: torch.Tensor | None = None
    for item in source:
        group: dict[str, Any] = item if isinstance(item, dict) else {"params": [item]}
        group_l1, group_l2 = group.get("l1", l1), group.get("weight_decay", l2)
        for p in [group["params"]] if isinstance(group["params"], torch.Tensor) else group["params"]:
            p = _tensor_of(p)
            check_tensor("penalty", "each parameter", p)
            if id(p) in seen:
                continue
            seen.add(id(p))
            w = p if p.dtype == torch.float64 else p.float()
            term = w.new_zeros(())
            # A factor of 0 leaves out the pass over memory, and the NaN that 0 times an infinite weight is.
            if group_l1:
                term = term + group_l1 * w.abs().sum()
            if group_l2:
                term = term + 0.5 * group_l2 * (w * w).sum()
            term = _whole(term)
            total = term if total is None else total + term
    return torch.zeros((), dtype=torch.float32) if total is None else total


def _penalised(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The groups of an optimiser with what it penalises, and how."""
    groups = []
    for group in optimizer.param_groups:
        factors = {name: group.get(name, 0.0) for name in ("l1", "weight_decay")}
        for name, factor in factors.items():
            if factor and name not in optimizer.defaults:
                warnings.warn(
                    f"penalty: {type(optimizer).__name__} does not apply the {name} of its groups, which is "
                    f"left out here too; use fastreg.optim.SGD for it",
                    stacklevel=3,
                )
                factors[name] = 0.0
        groups.append({"params": [p for p in group["params"] if p.requires_grad], **factors})
    return groups


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """A sum over all elements; of a DTensor, over all of its shards."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def prior_scale(
    value: float | torch.Tensor,
    prior: Literal["gaussian", "laplace"] = "gaussian",
    *,
    num_samples: float | torch.Tensor = 1,
    inverse: bool = False,
) -> float:
    """The prior whose MAP estimate a penalty is: from the penalty's factor to the prior's scale, or back.

    With a loss that is the mean of -log p(y | x, w) over `num_samples` examples, minimising loss + penalty
    maximises the posterior p(w | data) for independent zero-mean weights (Goodfellow et al. 2016, sections
    5.6.1 and 7.1):

    - "gaussian": p(w) ~ exp(-w^2 / (2 sigma^2)), penalty l2 / 2 w^2:  sigma = 1 / sqrt(l2 * num_samples);
    - "laplace":  p(w) ~ exp(-|w| / sigma),        penalty l1 |w|:      sigma = 1 / (l1 * num_samples),
      standard deviation sqrt(2) sigma.

    Cross-entropy is such a loss as it stands, for a categorical likelihood. Squared error is one for a
    Gaussian likelihood after division by twice the noise's variance s^2: with torch's `mse_loss` give value /
    (2 s^2), and multiply the factor that `inverse` gives by 2 s^2; with half of it, the least squares of
    LASSO and ridge regression, s^2.

    Args:
        value: the factor, l2 or l1, of the penalty; with `inverse` the scale sigma. A number or a tensor of
            one, at least 0; 0 gives inf, inf gives 0.
        prior: "gaussian" (L2) or "laplace" (L1).
        num_samples: examples the loss is a mean over; 1 for a loss that is their sum. A number or a tensor of
            one, too.
        inverse: go from sigma to the factor.

    Returns:
        float: sigma in the units of the weights, or the factor.

    Raises:
        ValueError: a negative or NaN value, num_samples below 1, an unknown prior.
        TypeError: what is no number, or several.
    """
    op = "prior_scale"
    value, count = _number_of(op, "value", value), _number_of(op, "num_samples", num_samples)
    check_number(op, "value", value, 0)
    value = float(value)
    check_number(op, "num_samples", count, 1)
    check_choice(op, "prior", prior, ("gaussian", "laplace"))
    if value == 0:
        return math.inf
    # The divisions come one after the other and the square last, since value * value and value * count can
    # leave the range of a float where the result does not.
    if prior == "laplace":  # The map is its own inverse.
        return 1 / value / count
    if inverse:
        return (1 / value / math.sqrt(count)) * (1 / value / math.sqrt(count))
    return 1 / math.sqrt(value) / math.sqrt(count)


def _number_of(op: str, name: str, value: Any) -> Any:
    """The number in a tensor or array of one; all else as it is."""
    if isinstance(value, (torch.Tensor, numpy.ndarray)):
        if value.size != 1 if isinstance(value, numpy.ndarray) else value.numel() != 1:
            raise TypeError(
                f"{op}: {name} must be one number, got {type(value).__name__} of shape {tuple(value.shape)}; "
                f"call it for each"
            )
        return value.item()
    if isinstance(value, (list, tuple)):
        raise TypeError(
            f"{op}: {name} must be one number, got {type(value).__name__} of {len(value)}; call it for each"
        )
    return value


def sparsity(model: torch.nn.Module | torch.Tensor | Iterable[torch.Tensor]) -> float:
    """Share of exactly zero elements among the parameters of a Module, or of the given tensors; shared ones
    count once.

    Returns:
        float in [0, 1]; 0 for no parameters at all.

    Raises:
        TypeError: what is no tensor. ValueError: a lazy layer that has not run yet.
    """
    op = "sparsity"
    check_initialised(op, model)
    given = model.parameters() if isinstance(model, torch.nn.Module) else model
    given = [given] if isinstance(given, torch.Tensor) else list(given)
    for each in given:
        check_tensor(op, "each parameter", each)
    tensors = {id(p): p for p in given}.values()
    total = sum(p.numel() for p in tensors)
    return sum(int(_whole((p == 0).sum())) for p in tensors) / total if total else 0.0
