"""What the optimisers share: one walk over the parameter groups, then one call of an operator for all tensors
of a group on a device.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch.compiler import is_compiling
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .._checks import DTYPES
from .._registry import fast
from ._groups import (
    Params,
    check_keys,
    check_param,
    check_params,
    free_groups,
    in_numbers,
    refuse_gradient,
    tensor_of,
)


class Column(NamedTuple):
    """One entry of `state[p]` that a step needs: a tensor like the parameter, or a float32 number.

    `make(p, state[p])` gives the entry of a parameter that has none yet.
    """

    name: str
    make: Callable[[torch.Tensor, dict[str, Any]], torch.Tensor]
    is_number: bool = False


def zeros(p: torch.Tensor, state: dict[str, Any]) -> torch.Tensor:
    """Zeros of the parameter's form."""
    return torch.zeros_like(p, memory_format=torch.preserve_format)


class Work(NamedTuple):
    """The tensors of a parameter group on one device, of DTensors the local shards; `state` by column."""

    params: list[torch.Tensor]
    grads: list[torch.Tensor]
    state: list[list[torch.Tensor]]


class OnePass(torch.optim.Optimizer):
    """The part of an optimiser that does not depend on its formula.

    A subclass stands before torch's class of the same name among the bases of the public one, and gives what
    raises NotImplementedError here.
    """

    _op: ClassVar[str]
    # The options of a parameter group that torch's class does not have.
    _own_options: ClassVar[dict[str, Any]]
    # The options that are one number, a tensor or a scalar of NumPy's included.
    _numbers: ClassVar[tuple[str, ...]]

    def _check_group(self, group: dict[str, Any], least: float = -sys.float_info.max) -> None:
        """Raise unless the options of a group make a step. `least` is 0 in the constructor alone."""
        raise NotImplementedError

    def _columns(self, group: dict[str, Any]) -> tuple[Column, ...]:
        """The state that a step of this group needs, in the order in which it is made."""
        raise NotImplementedError

    def _step_fast(self, fast: Any, groups: list[dict[str, Any]]) -> bool | None:
        """Do the step in C++ if this is the usual case; None if it is not, and nothing has been stepped."""
        raise NotImplementedError

    def _call(self, group: dict[str, Any], device: torch.device, work: Work, **scaling: Any) -> None:
        """Call the operator for one group on one device."""
        raise NotImplementedError

    def _begin(self, params: Params, defaults: dict[str, Any]) -> None:
        """What the constructors share."""
        check_params(self._op, params)
        self._check_group(self._in_numbers(defaults), least=0)
        params = free_groups(params) if defaults["l1"] else params
        torch.optim.Optimizer.__init__(self, params, defaults)
        self._let_scaler_into_step()

    def _let_scaler_into_step(self) -> None:
        """With fused=True tell GradScaler, in torch.amp's way, that `step` unscales and looks for overflow.

        Otherwise the scaler decides before the step. Only so do accelerate, Lightning, schedules and step
        hooks learn that a step was skipped, and only so may gradients be clipped under Lightning's mixed
        precisions.
        """
        if self.defaults["fused"]:
            self._step_supports_amp_scaling = True

    def _in_numbers(self, group: dict[str, Any]) -> dict[str, Any]:
        """A parameter group as the operator takes it."""
        return in_numbers(group, self._numbers)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, checked as in the constructor."""
        if not isinstance(param_group, dict) or isinstance(param_group["params"], set):
            super().add_param_group(param_group)  # torch says what is wrong
            return
        group = self._in_numbers({**self.defaults, **param_group})
        check_keys(self._op, group, self.defaults)
        self._check_group(group)
        params = group["params"]
        params = [params] if isinstance(params, torch.Tensor) else list(params)
        unique = {id(tensor_of(p)): p for p in params}
        for p in unique.values():
            if isinstance(tensor_of(p), torch.Tensor):
                check_param(self._op, group, tensor_of(p))
        super().add_param_group({**param_group, "params": list(unique.values())})

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over what `load_state_dict` has read, or a pickle. This class's own options, which a state
        dict of torch's class lacks, stay as they were.
        """
        groups = self.__dict__.get("param_groups", ())
        super().__setstate__(state)
        for i, group in enumerate(self.param_groups):
            before = groups[i] if i < len(groups) else {}
            for name, default in self._own_options.items():
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
        groups = [self._in_numbers(group) for group in self.param_groups]
        for group in groups:
            self._check_group(group)
        # A GradScaler leaves these two here; torch.amp has no other way of telling an optimiser.
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        usual = grad_scale is None and found_inf is None and not is_compiling()
        if usual and fast is not None and self._step_fast(fast, groups):
            return loss
        # All groups are collected before the first is stepped, so that an error leaves everything as it was.
        works = [self._collect(group) for group in groups]
        for group, work in zip(groups, works, strict=True):
            for device, tensors in work.items():
                # torch.compile counts the versions itself. Elsewhere a graph that has saved a weight must
                # find out that the weight has changed.
                if not is_compiling():
                    torch.autograd.graph.increment_version(tensors.params)
                self._call(
                    group,
                    device,
                    tensors,
                    grad_scale=None if grad_scale is None else grad_scale.to(device),
                    found_inf=None if found_inf is None else found_inf.to(device),
                )
        return loss

    def _collect(self, group: dict[str, Any]) -> dict[torch.device, Work]:
        """The tensors of a parameter group by device, checked; of a DTensor the local shard.

        With many small tensors this loop is most of a step. It therefore makes no container per parameter,
        and few calls.
        """
        found: dict[torch.device, Work] = {}
        columns = self._columns(group)
        for p in group["params"]:
            grad = p.grad
            if grad is None:
                continue
            dtype, device = p.dtype, p.device
            if grad.layout != torch.strided or grad.dtype != dtype or dtype not in DTYPES:
                refuse_gradient(self._op, p, grad)
            if dtype == torch.float16 and group["stochastic_rounding"]:
                check_param(self._op, group, p)
            work = found.get(device)
            if work is None:
                work = found[device] = Work([], [], [[] for _ in columns])
            sharded = hasattr(p, "to_local")
            work.params.append(p.to_local() if sharded else p)
            work.grads.append(_like_placed(grad, p).to_local() if sharded else grad)
            if not columns:
                continue
            state = self.state[p]
            for column, values in zip(columns, work.state, strict=True):
                value = state.get(column.name)
                if value is None:
                    value = state[column.name] = column.make(p, state)
                if column.is_number:
                    # load_state_dict gives it the dtype of the parameter; the operator wants float32.
                    if value.dtype != torch.float32:
                        value = state[column.name] = value.float()
                    values.append(value)
                else:
                    values.append(value.to_local() if sharded else value)
        return found


def _like_placed(grad: Any, param: Any) -> Any:
    """A DTensor's gradient, sharded as the parameter is. Partial sums and replicas would update a shard with
    the wrong numbers.
    """
    if hasattr(grad, "placements") and grad.placements != param.placements:
        return grad.redistribute(placements=param.placements)
    return grad


def rate_of(group: dict[str, Any], device: torch.device) -> tuple[float, torch.Tensor | None]:
    """The learning rate as the operators take it: a number, or a tensor beside which the number is 0."""
    lr = group["lr"]
    if not isinstance(lr, torch.Tensor):
        return float(lr), None
    narrow = lr.dtype in (torch.float32, torch.float16, torch.bfloat16)
    return 0.0, lr.detach().to(device, torch.float32 if narrow else torch.float64)


def are_fixed(numbers: Sequence[float]) -> bool:
    """Whether torch.compile takes the numbers for constants, and not for inputs of its graph: of an input it
    cannot know on which side of some bound it lies.
    """
    bound = 0.7071067811865475
    return all(
        statically_known_true(number > bound) or statically_known_true(number <= bound) for number in numbers
    )


def stacked(numbers: Sequence[float]) -> torch.Tensor:
    """The numbers as one tensor, which stay inputs of a compiled graph, inductor's too: as factors of a
    tensor, rather than its contents.
    """
    one = torch.ones((), dtype=torch.float64, device="cpu")
    return torch.stack([one * number for number in numbers])
