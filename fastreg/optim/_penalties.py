"""The norm penalties by themselves: parameter groups, the penalty's value, its prior, and the sparsity."""

from __future__ import annotations

import fnmatch
import functools
import itertools
import math
import operator
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast

import numpy
import torch
from torch.compiler import is_compiling

from .._checks import DTYPES, arithmetic_dtype, check_choice, check_initialised, check_number, check_tensor
from .._shards import full, local_part, sum_over_ranks, whole_of_parts
from .._sum_of_squares import sum_of_squares
from .._transforms import is_sharded, is_transformed, is_wrapped
from ._groups import Params, check_factor, tensor_of

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
    """Parameter groups for `SGD` or `AdamW` with a penalty on the weights alone.

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
        check_factor(op, name, value)
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
        beside = own if _is_wrapped(module, name) else f"{own}{name}."
        yield from _named_parameters(child, f"{full}{name}.", beside)


def _is_wrapped(module: torch.nn.Module, name: str) -> bool:
    """Whether the child of that name is what the module wraps."""
    return name in _WRAPPED or (name == "module" and isinstance(module, _WRAPPERS))


def without_wrappers(module: torch.nn.Module, prefix: str = "") -> Iterator[tuple[str, torch.nn.Parameter]]:
    """(name, parameter) as `named_parameters` gives them, a tied one under each of its names, except for
    the wrappers' part of a name.
    """
    for leaf, p in module._parameters.items():
        if p is not None:
            yield prefix + leaf, p
    for name, child in module._modules.items():
        if child is not None:
            yield from without_wrappers(child, prefix if _is_wrapped(module, name) else f"{prefix}{name}.")


def _options(op: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of one pattern under the optimiser's names, checked."""
    options = dict(given)
    if "l2" in options:
        options["weight_decay"] = options.pop("l2")
    for name in ("l1", "weight_decay"):
        if name in options:
            check_factor(op, name, options[name])
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
            one that knows none, such as `torch.optim.SGD`, about which there is a UserWarning. The
            weight_decay of an AdamW counts as it is given, although the decay acts beside the gradient.
        l1, l2: factors for what brings none of its own.

    Returns:
        Tensor of shape (), float32 (float64 for float64 parameters), differentiable (the derivative of |w| at
        0 is 0). A parameter that comes twice counts once.
    """
    for name, value in (("l1", l1), ("l2", l2)):
        check_factor("penalty", name, value)
    source: Any = params_or_groups
    if isinstance(source, torch.optim.Optimizer):
        source = _penalised(source)
    elif isinstance(source, torch.nn.Module):
        source = penalty_groups(source, l1=l1, l2=l2)
    elif isinstance(source, (torch.Tensor, dict)):
        source = [source]
    seen: set[int] = set()
    kinds: dict[_Kind, list[Any]] = {}
    for item in source:
        group: dict[str, Any] = item if isinstance(item, dict) else {"params": [item]}
        factors = group.get("l1", l1), group.get("weight_decay", l2)
        for p in [group["params"]] if isinstance(group["params"], torch.Tensor) else group["params"]:
            p = tensor_of(p)
            check_tensor("penalty", "each parameter", p)
            if id(p) not in seen:
                seen.add(id(p))
                where = (p.device_mesh, p.placements) if _is_in_parts(p) else None
                kinds.setdefault(_Kind(where, *factors), []).append(p)
    by_number = all(isinstance(factor, (int, float)) for kind in kinds for factor in kind[1:])
    if kinds and by_number and not (is_compiling() or is_transformed()):
        with torch.no_grad():
            parts = [(kind, [_own_part(kind, p) for p in params]) for kind, params in kinds.items()]
        if all(map(_is_usual, itertools.chain.from_iterable(own for _, own in parts))):
            return cast(torch.Tensor, _Penalty.apply(parts, *itertools.chain.from_iterable(kinds.values())))
    return _over_all((kind, _by_formula(kind, params)) for kind, params in kinds.items())


class _Kind(NamedTuple):
    """What parameters have in common that are summed up together."""

    where: Any  # (mesh, placements) of DTensors of which this rank has a part, or None
    l1: float
    l2: float


def _own_part(kind: _Kind, p: Any) -> torch.Tensor:
    """What this rank has of a parameter."""
    return cast(torch.Tensor, p) if kind.where is None else local_part(p)


def _is_usual(w: torch.Tensor) -> bool:
    """Whether an operator may read its memory."""
    return type(w) in (torch.Tensor, torch.nn.Parameter) and w.dtype in DTYPES and w.layout is torch.strided


def _by_formula(kind: _Kind, params: Sequence[Any]) -> Iterator[torch.Tensor]:
    """The terms of parameters of one kind, of DTensors those of this rank; every derivative is autograd's."""
    for p in params:
        w = _own_part(kind, p)
        w = w.to(torch.promote_types(w.dtype, arithmetic_dtype(w)))
        # A factor of 0 leaves out the pass over memory, and the NaN that 0 times an infinite weight is.
        if kind.l1:
            yield kind.l1 * w.abs().sum()
        if kind.l2:
            parts = torch.view_as_real(w.resolve_conj()) if w.is_complex() else w
            yield 0.5 * kind.l2 * (parts * parts).sum()
        if not (kind.l1 or kind.l2) and not is_sharded(p):
            yield w.new_zeros((), dtype=arithmetic_dtype(w))


def _by_operators(kind: _Kind, own: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The same, with one term for all tensors of a dtype on a device."""
    alike: dict[Any, list[torch.Tensor]] = {}
    for w in own:
        alike.setdefault((w.device, arithmetic_dtype(w)), []).append(w)
    for (device, dtype), tensors in alike.items():
        if kind.l1:
            yield kind.l1 * torch.stack([w.abs().sum(dtype=dtype) for w in tensors]).sum()
        if kind.l2:
            yield 0.5 * kind.l2 * sum_of_squares(tensors)
        if not (kind.l1 or kind.l2) and kind.where is None:
            yield torch.zeros((), dtype=dtype, device=device)


def _over_all(kinds: Iterable[tuple[_Kind, Iterable[torch.Tensor]]]) -> torch.Tensor:
    """The sum of the terms of all kinds, over all ranks."""
    terms: list[torch.Tensor] = []
    placed: dict[Any, list[torch.Tensor]] = {}
    for kind, own in kinds:
        (terms if kind.where is None else placed.setdefault(kind.where, [])).extend(own)
    terms += [
        sum_over_ranks(functools.reduce(operator.add, parts), *where)
        for where, parts in placed.items()
        if parts
    ]
    return torch.zeros((), dtype=torch.float32) if not terms else _sum_of(terms)


class _Penalty(torch.autograd.Function):
    """The penalty as one node of autograd's graph, however many parameters there are: a node for each of the
    small sums, and for each DTensor's part, costs several times as much as the sum.
    """

    @staticmethod
    def forward(
        ctx: Any, parts: list[tuple[_Kind, list[torch.Tensor]]], *params: torch.Tensor
    ) -> torch.Tensor:
        ctx.counts = [(kind, len(own)) for kind, own in parts]
        ctx.save_for_backward(*params)
        return _over_all((kind, _by_operators(kind, own)) for kind, own in parts)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        params, wanted = ctx.saved_tensors, ctx.needs_input_grad[1:]
        kinds = list(_of_kinds(ctx.counts, params))
        made: tuple[torch.Tensor | None, ...]
        if torch.is_grad_enabled() or is_wrapped(grad):  # of higher order, or several gradients at once
            again = torch.is_grad_enabled()
            with torch.enable_grad():
                value = _over_all((kind, _by_formula(kind, own)) for kind, own in kinds)
            needed = itertools.compress(params, wanted)
            made = torch.autograd.grad(value, tuple(needed), grad, create_graph=again, allow_unused=True)
        else:
            each = ((kind, p) for kind, own in kinds for p in own)
            made = tuple(_gradient(*one, grad) for one in itertools.compress(each, wanted))
        rest = iter(made)
        return None, *(next(rest) if one else None for one in wanted)


def _of_kinds(
    counts: list[tuple[_Kind, int]], params: Sequence[torch.Tensor]
) -> Iterator[tuple[_Kind, Sequence[torch.Tensor]]]:
    first = 0
    for kind, count in counts:
        yield kind, params[first : first + count]
        first += count


def _gradient(kind: _Kind, p: Any, grad: torch.Tensor) -> torch.Tensor | None:
    """grad (l1 sign w + l2 w), placed as the parameter is, with one rounding; None where both are 0."""
    local = _own_part(kind, p)
    w = local.to(arithmetic_dtype(local))
    grad = grad.to(w.device, w.dtype)
    made = w.sgn().mul_(grad * kind.l1) if kind.l1 else None
    if kind.l2:
        pull = w * (grad * kind.l2)
        made = pull if made is None else made.add_(pull)
    if made is None:
        return None
    made = made.to(local.dtype)
    if kind.where is None:
        return made
    mesh, placements = kind.where
    return cast(torch.Tensor, whole_of_parts(made, mesh, placements, p.shape, p.stride()))


def _is_in_parts(p: Any) -> bool:
    """Whether it is a DTensor of which each rank has a part, or all."""
    return is_sharded(p) and not any(placement.is_partial() for placement in p.placements)


def _penalised(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The groups of an optimiser with what it penalises, and how."""
    groups = []
    for group in optimizer.param_groups:
        factors = {name: group.get(name, 0.0) for name in ("l1", "weight_decay")}
        for name, factor in factors.items():
            if factor and name not in optimizer.defaults:
                warnings.warn(
                    f"penalty: {type(optimizer).__name__} does not apply the {name} of its groups, which is "
                    f"left out here too; use fastreg.optim.SGD or AdamW for it",
                    stacklevel=3,
                )
                factors[name] = 0.0
        groups.append({"params": [p for p in group["params"] if p.requires_grad], **factors})
    return groups


def _sum_of(terms: list[torch.Tensor]) -> torch.Tensor:
    """The sum of numbers. Those of DTensors that are sharded alike are added up first, so that however many
    there are, their shards meet in one message.
    """
    plain: list[torch.Tensor] = []
    placed: dict[Any, Any] = {}
    for term in terms:
        if is_sharded(term):
            where: Any = term
            key = where.device_mesh, where.placements
            placed[key] = placed[key] + term if key in placed else term
        else:
            plain.append(term)
    return functools.reduce(operator.add, [*plain, *map(full, placed.values())])


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
    zeros: dict[torch.device, list[torch.Tensor]] = {}
    placed: dict[Any, list[torch.Tensor]] = {}
    for each in tensors:
        p: Any = each
        if _is_in_parts(p):
            placed.setdefault((p.device_mesh, p.placements), []).append((p.to_local() == 0).sum())
        else:
            zeros.setdefault(p.device, []).append((p == 0).sum())
    for where, parts in placed.items():
        zeros.setdefault(parts[0].device, []).append(
            sum_over_ranks(functools.reduce(operator.add, parts), *where)
        )
    return sum(int(_sum_of(counts)) for counts in zeros.values()) / total if total else 0.0
