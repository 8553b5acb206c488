"""Parameter groups: what an optimiser takes as parameters and as numbers, and what it refuses."""

from __future__ import annotations

import functools
import gc
import inspect
import itertools
from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeAlias, cast

import numpy
import torch
from torch.compiler import is_compiling

from .._checks import (
    COMPLEX_DTYPES,
    DTYPES,
    ArgumentError,
    ArgumentTypeError,
    UnsupportedError,
    check_choice,
    check_number,
)
from .._transforms import may_look

_LARGEST = torch.finfo(torch.float32).max

# What torch takes as parameters: tensors, (name, tensor) pairs, or groups, dicts whose "params" are either.
Params: TypeAlias = Iterable[torch.Tensor] | Iterable[tuple[str, torch.Tensor]] | Iterable[dict[str, Any]]


def tensor_of(param: Any) -> Any:
    """A parameter; torch also takes (name, parameter)."""
    return param[1] if isinstance(param, tuple) else param


def check_params(op: str, params: Any) -> None:
    """Raise where a model, or one of its methods, is given in the place of its parameters."""
    got = None
    if isinstance(params, torch.nn.Module) and not isinstance(params, torch.nn.ParameterList):
        got = type(params).__name__
    elif inspect.ismethod(params):
        got = f"the method {params.__name__}, which was not called"
    if got:
        raise TypeError(
            f"{op}: params must be parameters or parameter groups, got {got}; give model.parameters() or "
            f"fastreg.optim.penalty_groups(model, ...)"
        )


def free_groups(op: str, params: Any) -> Any:
    """Parameters as given, where groups of biases and norms that are free of weight_decay are free of l1."""
    if isinstance(params, (torch.Tensor, dict, str)) or not isinstance(params, Iterable):
        return params  # of one tensor torch says what is wrong
    params = list(params)
    if len(params) < 2:
        return params
    free = [isinstance(group, dict) and _is_free(op, group) for group in params]
    if all(free):
        return params
    for group in itertools.compress(params, free):
        group["l1"] = 0.0
    return params


def _is_free(op: str, group: dict[str, Any]) -> bool:
    """Whether a group asks for no decay, names no l1, and holds nothing but biases, norms and the like.

    Raises:
        ValueError: that depends on a lazy layer that has not run yet.
    """
    params = group.get("params", ())
    decays = "weight_decay" not in group or bool(group["weight_decay"])
    if decays or "l1" in group or not isinstance(params, (list, tuple, torch.Tensor)):
        return False
    tensors = [tensor_of(p) for p in ([params] if isinstance(params, torch.Tensor) else params)]
    shaped = [p for p in tensors if not torch.nn.parameter.is_lazy(p)]
    if not all(isinstance(p, torch.Tensor) and p.dim() < 2 for p in shaped):
        return False
    if len(shaped) < len(tensors):
        raise ArgumentError(
            f"{op}: whether l1 acts on a group without weight_decay depends on the shapes of its parameters, "
            f"got one of a lazy layer, which has none yet; run the model once on a batch first, or give the "
            f"group its own l1"
        )
    return True


def in_numbers(group: dict[str, Any], names: Iterable[str], of_one: Collection[str]) -> dict[str, Any]:
    """A parameter group whose factors are Python's numbers: torch also takes tensors, those of one element
    for the names in `of_one`, and NumPy's scalars. A learning rate that is a tensor on another device, or in
    compiled code, stays one.
    """
    changed = {}
    for name in names:
        value = group[name]
        if type(value) in (float, int, bool):
            continue
        is_array = isinstance(value, numpy.ndarray) and (name == "lr" or not value.ndim)
        if isinstance(value, numpy.generic) or is_array:
            changed[name] = value.item()
        elif isinstance(value, torch.Tensor) and _stands_for_number(name, value, of_one):
            changed[name] = value.detach().item()
    return {**group, **changed} if changed else group


def _stands_for_number(name: str, value: torch.Tensor, of_one: Collection[str]) -> bool:
    """Whether torch takes the tensor for a number, and its value is to be read."""
    if name == "lr":
        return may_look(value) and value.numel() == 1 and value.dtype != torch.bool
    return value.dim() == 0 or (name in of_one and value.shape == (1,))


def check_penalised(op: str, group: dict[str, Any], names: Iterable[str], least: float) -> None:
    """Raise unless lr, l1, l1_mode and the factors of these names make a step. A factor is at least `least`,
    which is 0 only in the constructor, as in torch.
    """
    lr = group["lr"]
    if isinstance(lr, torch.Tensor) and (lr.numel() != 1 or lr.dtype == torch.bool or lr.is_complex()):
        raise UnsupportedError(
            f"{op}: lr must be a number or a real tensor of one element, got {lr.dtype} {tuple(lr.shape)}"
        )
    for name in ("lr", *names):
        if name != "lr" or not isinstance(lr, torch.Tensor):
            check_factor(op, name, group[name], least)
    check_factor(op, "l1", group["l1"])
    for name in ("lr", "l1", *names, "dampening"):
        value = group.get(name, 0)
        # With a huge eps nothing moves, as it should.
        if name != "eps" and not isinstance(value, torch.Tensor):
            _check_representable(op, name, value, group.get("params", ()))
    check_choice(op, "l1_mode", group["l1_mode"], ("subgradient", "proximal"))
    if group["l1_mode"] == "proximal" and group["l1"] and not isinstance(lr, torch.Tensor) and lr < 0:
        raise ArgumentError(f"{op}: lr must be at least 0 with a proximal l1, got {lr}; use 'subgradient'")
    if group["differentiable"]:
        raise ValueError(
            f"{op}: differentiable must be False, the fused step has no gradient; use torch.optim.{op} for "
            f"that"
        )


def _check_representable(op: str, name: str, value: float, params: Iterable[Any]) -> None:
    """Raise for a factor that is infinite in the arithmetic of one of the parameters."""
    if -_LARGEST <= value <= _LARGEST:
        return
    tensors = (tensor_of(p) for p in params)
    narrow = {p.dtype for p in tensors if isinstance(p, torch.Tensor)} - {torch.float64, torch.complex128}
    if narrow:
        raise ArgumentError(
            f"{op}: {name} must be within ±{_LARGEST:.3g}, which is all that the arithmetic of "
            f"{', '.join(map(str, narrow))} parameters holds, got {value}; give a smaller number"
        )


def check_factor(op: str, name: str, value: Any, least: float = 0) -> None:
    """torch takes True and False as 1 and 0, and so do the factors of a parameter group."""
    if isinstance(value, (int, float)) and least <= value < 0:
        return
    check_number(op, name, value, 0, finite=True, allow_bool=True)


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


def check_keys(op: str, group: dict[str, Any], own: Mapping[str, Any]) -> None:
    """Raise where a new group has a key that nothing reads, such as L1 for l1."""
    unknown = [key for key in group if key not in own and key not in _OTHERS_KEYS]
    unknown = [key for key in unknown if key not in _keys_of_torch()]
    if unknown and not _is_anothers(group):
        raise ValueError(
            f"{op}: a parameter group has {', '.join(map(repr, unknown))}, which nothing reads; expected "
            f"{', '.join(own)}. What your own code keeps there, set in optimizer.param_groups afterwards"
        )


def _is_anothers(group: dict[str, Any]) -> bool:
    """Whether another optimiser has this very group: one that wraps ours, as SAM does, and reads its own keys
    there. Nothing tells who it is but the list of all objects.
    """
    optimizers = (o for o in gc.get_objects() if issubclass(type(o), torch.optim.Optimizer))
    return any(group is each for o in optimizers for each in vars(o).get("param_groups", ()))


def check_param(op: str, group: dict[str, Any], p: torch.Tensor) -> None:
    """Raise for a parameter that the options of its group, or its own memory, do not let be stepped."""
    check_dtype_of(op, group, p)
    if torch.nn.parameter.is_lazy(p):
        return  # its memory comes with the first batch, and is its own
    if p.layout == torch.strided and any(
        stride == 0 and size > 1 for size, stride in zip(p.shape, p.stride(), strict=True)
    ):
        raise ValueError(
            f"{op}: a parameter's elements must not share memory, got strides {p.stride()}; use .clone()"
        )


def check_dtype_of(op: str, group: dict[str, Any], p: torch.Tensor) -> None:
    """Raise for a parameter whose dtype the options of its group do not go with."""
    if group["stochastic_rounding"] and p.dtype in (torch.float16, torch.complex32):
        raise ValueError(
            f"{op}: stochastic_rounding is for bfloat16 parameters, got {p.dtype}; switch it off"
        )
    if group["l1"] and p.dtype in COMPLEX_DTYPES:
        raise ValueError(
            f"{op}: l1 must be 0 for complex parameters, whose absolute value is not that of single parts, "
            f"got {p.dtype}; give their group l1=0 and add fastreg.optim.penalty(...) to the loss"
        )


def checked_gradient(
    op: str, group: dict[str, Any], p: torch.Tensor, grad: Any, takes_sparse: bool
) -> torch.Tensor | None:
    """The gradient with which a parameter can be stepped, a sparse one made dense; None where there is none,
    and an average beside it.
    """
    if p.dtype not in DTYPES and p.dtype not in COMPLEX_DTYPES:
        raise TypeError(
            f"{op}: parameters must be float32, float64, float16, bfloat16 or complex, got {p.dtype}; use "
            f"torch.optim.{op}"
        )
    check_dtype_of(op, group, p)
    if not is_compiling() and p.is_conj():  # in compiled code torch says so
        raise RuntimeError(
            f"{op}: a complex parameter must lie in memory as it is, got a conjugate that nobody has carried "
            f"out; use .resolve_conj()"
        )
    if grad is None:
        return None
    if grad.layout != torch.strided and not takes_sparse:
        raise ArgumentTypeError(
            f"{op} does not support sparse gradients, got {grad.layout}; use sparse=False or "
            f"torch.optim.SparseAdam"
        )
    if grad.layout != torch.strided and (group["weight_decay"] or group["l1"]):
        raise ArgumentTypeError(
            f"{op}: gradients must be dense where weight_decay or l1 acts, got {grad.layout}; use "
            f"sparse=False, or give this parameter a group without either"
        )
    if grad.dtype != p.dtype:
        raise ValueError(
            f"{op}: a gradient must have the dtype of its parameter, {p.dtype}, got {grad.dtype}; convert it "
            f"with .to({p.dtype})"
        )
    return cast(torch.Tensor, grad.to_dense())
