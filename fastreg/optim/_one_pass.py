"""What the optimisers share: one walk over the parameter groups, then one call of an operator for all tensors
of a group on a device.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch.compiler import is_compiling

from .._checks import DTYPES, SINGLE_DTYPES, ArgumentError, arithmetic_dtype, check_choice, is_int
from .._registry import fast
from .._shards import own_part, place_in_whole
from .._transforms import is_sharded
from ._average import Averages, average_idle, warmed_up
from ._clip import OPTIONS as CLIPPING
from ._clip import check_clipping, check_group_of_clipping, clipped, norm_of
from ._groups import (
    Params,
    check_keys,
    check_param,
    check_params,
    checked_gradient,
    free_groups,
    in_numbers,
    tensor_of,
)


class Column(NamedTuple):
    """One entry of `state[p]` that a step needs: a tensor like the parameter, or a float32 number.

    `make(p, state[p])` gives the entry of a parameter that has none yet. A number lies on the parameter's
    device, or where it was found if it is `anywhere`.
    """

    name: str
    make: Callable[[torch.Tensor, dict[str, Any]], torch.Tensor]
    is_number: bool = False
    anywhere: bool = False


def zeros(p: torch.Tensor, state: dict[str, Any]) -> torch.Tensor:
    """Zeros of the parameter's form."""
    return torch.zeros_like(p, memory_format=torch.preserve_format)


def zero(p: torch.Tensor, state: dict[str, Any]) -> torch.Tensor:
    """A count on the parameter's device."""
    return torch.zeros((), dtype=torch.float32, device=p.device)


def _copy(p: torch.Tensor, state: dict[str, Any]) -> torch.Tensor:
    """The parameter itself, which is what its average is before the first step."""
    return p.detach().clone(memory_format=torch.preserve_format)


_AVERAGE = (Column("ema", _copy), Column("n_averaged", zero, is_number=True))


class Work(NamedTuple):
    """The tensors of a parameter group on one device; of a DTensor its local shard."""

    owners: dict[int, Any]  # the DTensors themselves, by their index in `params`
    params: list[torch.Tensor]
    grads: list[torch.Tensor]
    state: dict[str, list[torch.Tensor]]  # one list for each column
    # (parameter, average, count) of each parameter without a gradient
    idle: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    places: list[int]  # with stochastic rounding, the four numbers of each tensor that `rounding_of` takes
    # (complex tensor, what stands for it above) where that is a copy, which is written back after the step
    copies: list[tuple[torch.Tensor, torch.Tensor]]


class Scaling(NamedTuple):
    """What multiplies the gradients, and what skips the step: tensors of one number on the device."""

    grad_scale: torch.Tensor | None
    found_inf: torch.Tensor | None
    clip: torch.Tensor | None

    def to(self, device: torch.device) -> Scaling:
        """The same on another device."""
        return Scaling(*(None if value is None else value.to(device) for value in self))


# The options of stochastic rounding. What an element of a parameter draws in a step depends on this seed, on
# the parameter's count of steps and number among all of the optimiser's, and on the element's index in the
# whole parameter. These are the same on all ranks that hold a replica or a shard of it, which therefore agree
# without a message, whatever their generators.
ROUNDING: dict[str, Any] = {"stochastic_rounding": False, "rounding_seed": 0}


def check_rounding(op: str, group: dict[str, Any]) -> None:
    """Raise unless the options of rounding at random make sense."""
    check_choice(op, "stochastic_rounding", group["stochastic_rounding"], (False, True))
    seed = group["rounding_seed"]
    if not is_int(seed, int):
        raise TypeError(f"{op}: rounding_seed must be an int, got {type(seed).__name__}")
    if not -(2**63) <= seed < 2**63:
        raise ArgumentError(
            f"{op}: rounding_seed must be an int64, in [-2^63, 2^63), got {seed}; use torch.initial_seed() % "
            f"2**63, for example"
        )


class OnePass(Averages):
    """The part of an optimiser that does not depend on its formula.

    A subclass stands before torch's class of the same name among the bases of the public one, and gives what
    raises NotImplementedError here.
    """

    # The options of a parameter group that torch's class does not have.
    _own_options: ClassVar[dict[str, Any]]
    # The options that are one number, a tensor or a scalar of NumPy's included.
    _numbers: ClassVar[tuple[str, ...]]
    _of_one: ClassVar[tuple[str, ...]]  # of these, torch takes tensors of shape (1,)
    _takes_sparse: ClassVar[bool]  # whether torch's class takes sparse gradients

    # The norm of the last step's gradients. One tensor that the steps write to, since a compiled or captured
    # step makes no new attribute.
    _norm: torch.Tensor | None = None

    def _check_group(self, group: dict[str, Any], least: float = -sys.float_info.max) -> None:
        """Raise unless the options of a group make a step. `least` is 0 only in the constructor."""
        raise NotImplementedError

    def _columns(self, group: dict[str, Any], skippable: bool) -> tuple[Column, ...]:
        """The state that a step of this group needs, in the order in which it is made. Whether a `skippable`
        step happens is known only on the device.
        """
        raise NotImplementedError

    def _step_fast(self, fast: Any, groups: list[dict[str, Any]], *max_norm: Any) -> Any:
        """Call the step in C++. It gives the norm of the gradients, or True where it does not clip, and None
        where nothing has been stepped.
        """
        raise NotImplementedError

    def _call(
        self,
        group: dict[str, Any],
        device: torch.device,
        work: Work,
        scaling: Scaling,
        ema_tensor: torch.Tensor | None,
    ) -> None:
        """Call the operator for one group on one device."""
        raise NotImplementedError

    def _begin(self, params: Params, defaults: dict[str, Any]) -> None:
        """What the constructors share."""
        check_params(self._op, params)
        check_clipping(self._op, defaults)
        self._check_group(self._in_numbers(defaults), least=0)
        params = free_groups(self._op, params) if defaults["l1"] else params
        torch.optim.Optimizer.__init__(self, params, defaults)
        self._let_scaler_into_step()
        self._make_norm()

    def _make_norm(self) -> None:
        """The tensor that clipping writes its norm to."""
        first = next((p for group in self.param_groups for p in group["params"]), None)
        if first is not None and self.defaults["max_norm"] is not None:
            self._norm = torch.full((), math.nan, dtype=arithmetic_dtype(first), device=first.device)

    def _keep_norm(self, norm: torch.Tensor) -> None:
        """Write the norm of a step to where it is kept; elsewhere, if the parameters have moved."""
        kept = self._norm
        if kept is None or kept.device != norm.device or kept.dtype != norm.dtype:
            self._norm = norm
        else:
            kept.copy_(norm)

    @property
    def grad_norm(self) -> torch.Tensor | None:
        """The norm of the gradients of the last step over all groups, before clipping: shape (), float32
        (float64 with float64 gradients), on the device of the first. NaN before the first step, None without
        `max_norm`.
        """
        return None if self._norm is None else self._norm.clone()

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
        return in_numbers(group, self._numbers, self._of_one)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, checked as in the constructor."""
        if not isinstance(param_group, dict) or isinstance(param_group["params"], set):
            super().add_param_group(param_group)  # torch says what is wrong
            return
        check_group_of_clipping(self._op, param_group)
        group = self._in_numbers({**self.defaults, **param_group})
        check_keys(self._op, param_group, self.defaults)
        params = group["params"]
        params = [params] if isinstance(params, torch.Tensor) else list(params)
        self._check_group({**group, "params": params})
        unique = {id(tensor_of(p)): p for p in params}
        for p in unique.values():
            if isinstance(tensor_of(p), torch.Tensor):
                check_param(self._op, group, tensor_of(p))
        # The very dict is kept, as torch does: who handed it in may change it later.
        param_group["params"] = list(unique.values())
        super().add_param_group(param_group)
        for name in CLIPPING:
            param_group.pop(name)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this class or of torch's."""
        if self._is_averaged:
            raise RuntimeError(
                f"{self._op}: load_state_dict must not run inside averaged(), where the parameters are the "
                f"averages; leave the block first"
            )

        def keep(_: Any, given: dict[str, Any]) -> None:
            self._given = given

        # After all other hooks, which may give torch another dict than this one.
        handle = self.register_load_state_dict_pre_hook(keep)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
            self.__dict__.pop("_given", None)

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
        for values in self.state.values():
            for name, value in values.items() if isinstance(values, dict) else ():
                # The momentum of sparse gradients, as torch's SGD has it.
                if isinstance(value, torch.Tensor) and value.layout != torch.strided:
                    values[name] = value.to_dense()
        self._restore_numbers()
        if "defaults" in state:  # from a copy or a pickle
            self.defaults = {**CLIPPING, **self._own_options, **self.defaults}  # older ones have less
            self._let_scaler_into_step()
            self._make_norm()

    def _restore_numbers(self) -> None:
        """Take numbers as the state dict has them, in float32: torch gives all but "step" the dtype of the
        parameter, and bfloat16 has no 257.
        """
        for values in self.state.values():
            for name in ("step", "momentum_started", "n_averaged"):
                if isinstance(values, dict) and isinstance(values.get(name), torch.Tensor):
                    values[name] = values[name].float()
        given = self.__dict__.get("_given")
        if given is None:
            return
        keys = (key for group in given["param_groups"] for key in group["params"])
        params = (p for group in self.param_groups for p in group["params"])
        for key, p in zip(keys, params, strict=True):
            for name in ("momentum_started", "n_averaged"):
                if name in given["state"].get(key, ()):
                    value = torch.as_tensor(given["state"][key][name], device="cpu")
                    self.state[p][name] = value.to(p.device, torch.float32, copy=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform one step; `closure` recomputes the loss, which is returned, as in torch."""
        if self._is_averaged:
            raise RuntimeError(
                f"{self._op}: step must not run inside averaged(), where the parameters are the averages; "
                f"leave the block first"
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if is_compiling():
            for group in self.param_groups:
                self._init_group(group)
        groups = [self._in_numbers(group) for group in self.param_groups]
        for group in groups:
            check_group_of_clipping(self._op, group)
            self._check_group(group)
        # A GradScaler leaves these two here; torch.amp has no other way of telling an optimiser.
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if found_inf is not None and not isinstance(found_inf, torch.Tensor):
            found_inf = torch.tensor(float(found_inf), device="cpu")  # a scaler that saw no gradient says 0
        scaling = Scaling(grad_scale, found_inf, None)
        usual = grad_scale is None and found_inf is None and not is_compiling()
        if usual and fast is not None and self._step_usual(fast, groups):
            return loss
        # All groups are collected before the first is stepped, so that an error leaves everything as it was.
        max_norm = self.defaults["max_norm"]
        skippable = found_inf is not None or max_norm is not None
        works, first = [], 0
        for group in groups:
            works.append(self._collect(group, skippable, first))
            first += len(group["params"])
        if max_norm is not None:
            norm = norm_of(work for by_device in works for work in by_device.values())
            norm, scaling = clipped(self._op, norm, scaling, self.defaults)
            self._keep_norm(norm)
        for group, work in zip(groups, works, strict=True):
            for device, tensors in work.items():
                self._step_on(device, group, tensors, scaling.to(device))
        return loss

    def _init_group(self, group: dict[str, Any], *_: Any) -> None:
        """Make the state that a step of the group needs.

        Of torch's optimisers and their subclasses Dynamo calls the method of this name itself, instead of
        tracing it: a graph that made the state would serve for the first step alone.
        """
        group = self._in_numbers(group)
        averages = group["ema"] is not None
        columns = self._columns(group, self.defaults["max_norm"] is not None)
        columns += _AVERAGE if averages else ()
        for p in group["params"] if columns else ():
            if p.grad is not None or (averages and self._averages_idle(p)):
                state = self.state[p]
                for column in columns:
                    if state.get(column.name) is None:
                        state[column.name] = column.make(p, state)

    def _step_usual(self, fast: Any, groups: list[dict[str, Any]]) -> bool:
        """Do the step in C++ if this is the usual case; False if it is not, and nothing has been stepped."""
        max_norm = self.defaults["max_norm"]
        done = self._step_fast(fast, groups, *(() if max_norm is None else (max_norm,)))
        if isinstance(done, torch.Tensor):
            self._keep_norm(done)
        return done is not None

    def _step_on(self, device: torch.device, group: dict[str, Any], work: Work, scaling: Scaling) -> None:
        """Step the parameters of a group on one device."""
        # torch.compile counts the versions itself. Elsewhere a graph that has saved a weight must find out
        # that the weight has changed.
        if not is_compiling():
            torch.autograd.graph.increment_version(work.params)
        ema_tensor = None
        if group["ema"] is not None and group["ema_warmup"]:
            counts = work.state["n_averaged"] or [count for _, _, count in work.idle]
            ema_tensor = warmed_up(group["ema"], group["ema_warmup"], counts)
        if work.params:
            self._call(group, device, work, scaling, ema_tensor)
            for tensor, copy in work.copies:
                tensor.copy_(torch.view_as_complex(copy))
        if work.idle:
            average_idle(work.idle, group["ema"] if ema_tensor is None else ema_tensor, scaling.found_inf)

    def _collect(self, group: dict[str, Any], skippable: bool, first: int) -> dict[torch.device, Work]:
        """The tensors of a parameter group by device, checked; of a DTensor the local shard. `first` is the
        number of the first parameter among all of the optimiser's.

        With many small tensors this loop is most of a step. It therefore makes no container per parameter,
        and few calls.
        """
        found: dict[torch.device, tuple[Work, list[Any]]] = {}
        averages, rounds = group["ema"] is not None, group["stochastic_rounding"]
        is_complex = False
        columns = self._columns(group, skippable) + (_AVERAGE if averages else ())
        for i, p in enumerate(group["params"], first):
            grad = p.grad
            if grad is None and not (averages and self._averages_idle(p)):
                continue
            dtype, device = p.dtype, p.device
            if dtype not in DTYPES or (
                grad is not None and (grad.layout != torch.strided or grad.dtype != dtype)
            ):
                grad = checked_gradient(self._op, group, p, grad, self._takes_sparse)
                is_complex = is_complex or dtype.is_complex
            if rounds and dtype == torch.float16:
                check_param(self._op, group, p)
            here = found.get(device)
            if here is None:
                work = Work({}, [], [], {column.name: [] for column in columns}, [], [], [])
                rows = [(*column, work.state[column.name]) for column in columns]
                found[device] = work, rows
            else:
                work, rows = here
            sharded = type(p) is not torch.nn.Parameter and is_sharded(p)
            if grad is not None:
                if sharded:
                    work.owners[len(work.params)] = p
                work.params.append(p.to_local() if sharded else p)
                work.grads.append(_own_gradient(grad, p) if sharded else grad)
                if rounds:
                    work.places.extend((i, *(_place(self._op, p) if sharded else (0, max(1, p.numel()), 0))))
            if not rows:
                continue
            state, is_cpu = self.state[p], p.is_cpu
            for name, make, is_number, anywhere, values in rows:
                value = state.get(name)
                if value is None:
                    value = state[name] = make(p, state)
                if is_number:
                    if not (is_cpu or anywhere) and value.is_cpu:
                        value = state[name] = value.to(device)
                elif sharded:
                    value = value.to_local()
                if grad is not None:
                    values.append(value)
            if grad is None:
                average = state["ema"]
                local = (p.to_local(), average.to_local()) if sharded else (p, average)
                work.idle.append((*local, state["n_averaged"]))
        return {device: _as_real(work) if is_complex else work for device, (work, _) in found.items()}

    def _averages_idle(self, p: torch.Tensor) -> bool:
        """Whether a parameter without a gradient is averaged: one that may get one, except those of lazy
        layers that have not run, and one that has been frozen since it had one.
        """
        if p.requires_grad:
            return not isinstance(p, torch.nn.UninitializedParameter)
        return "ema" in self.state.get(p, ())


def _as_real(work: Work) -> Work:
    """The same memory, where complex numbers are pairs of real ones, which is how torch steps them too.

    In compiled code it is a copy: torch 2.14 makes there the view of a tensor that an operator changes anew,
    by sizes and strides alone, which are not those of complex numbers.
    """

    def real(tensor: torch.Tensor) -> torch.Tensor:
        return torch.view_as_real(tensor) if tensor.is_complex() else tensor

    def changed(tensor: torch.Tensor) -> torch.Tensor:
        if not (is_compiling() and tensor.is_complex()):
            return real(tensor)
        copy = real(tensor).clone()
        work.copies.append((tensor, copy))
        return copy

    return work._replace(
        params=[changed(p) for p in work.params],
        grads=[real(grad.resolve_conj()) for grad in work.grads],
        state={name: [changed(value) for value in values] for name, values in work.state.items()},
        idle=[(real(p), real(average), n_averaged) for p, average, n_averaged in work.idle],
    )


def _own_gradient(grad: Any, param: Any) -> Any:
    """This rank's part of a DTensor's gradient, sharded as the parameter is. Partial sums and replicas would
    update a shard with the wrong numbers.
    """
    if hasattr(grad, "placements") and grad.placements != param.placements:
        grad = grad.redistribute(placements=param.placements)
    own = grad.to_local()
    # Gradients of FSDP2 are views, whose sizes torch.compile of torch 2.14 takes for unknown numbers. It
    # fails where such a number stays without a known one that it equals.
    return own.expand_as(param.to_local()) if is_compiling() else own


def _place(op: str, param: Any) -> tuple[int, int, int]:
    """Where in the whole parameter the elements of its local shard stand."""
    place = place_in_whole(param.shape, own_part(param.shape, param.device_mesh, param.placements))
    if place is None:
        raise ValueError(
            f"{op}: stochastic_rounding needs shards of whole rows, or of one dimension, got "
            f"{param.placements} of a parameter of shape {tuple(param.shape)}; switch it off"
        )
    return place


def seed_of(group: dict[str, Any], device: torch.device) -> torch.Tensor | None:
    """The seed of rounding as the operators take it; None without rounding. It lies on the CPU, which needs
    no copy, except in compiled code.
    """
    if not group["stochastic_rounding"]:
        return None
    where = device if is_compiling() else torch.device("cpu")
    return torch.full((1,), group["rounding_seed"], dtype=torch.int64, device=where)


def rate_of(group: dict[str, Any], device: torch.device) -> tuple[float, torch.Tensor | None]:
    """The learning rate as the operators take it: a number, or a tensor beside which the number is 0."""
    lr = group["lr"]
    if not isinstance(lr, torch.Tensor):
        return float(lr), None
    dtype = torch.float32 if lr.dtype in SINGLE_DTYPES else torch.float64  # of whole numbers, too
    return 0.0, lr.detach().to(device, dtype)
