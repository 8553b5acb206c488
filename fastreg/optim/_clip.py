"""Clipping by the global norm of the gradients: one read of them, and a factor that the step multiplies with
(Pascanu, Mikolov, Bengio 2013).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from .._checks import check_choice, check_number
from .._optimizer_math import square_root
from .._shards import sum_over_ranks
from .._sum_of_squares import sum_of_squares

if TYPE_CHECKING:
    from ._one_pass import Scaling, Work


OPTIONS: dict[str, Any] = {"max_norm": None, "error_if_nonfinite": False}


def check_clipping(op: str, options: dict[str, Any]) -> None:
    """Raise unless the options of clipping make sense. An infinite max_norm gives only the norm."""
    if options["max_norm"] is not None:
        check_number(op, "max_norm", options["max_norm"], 0)
    check_choice(op, "error_if_nonfinite", options["error_if_nonfinite"], (False, True))


def check_group_of_clipping(op: str, group: dict[str, Any]) -> None:
    """Raise if a parameter group has options of clipping, which nothing would read there."""
    for name in OPTIONS:
        if name in group:
            raise ValueError(
                f"{op}: {name} is one for all parameter groups, got it in one of them; give it to "
                f"the constructor alone. Under ZeroRedundancyOptimizer, which gives each rank's part an "
                f"optimiser of its own, clip before the step instead"
            )


def clipped(
    op: str, norm: torch.Tensor, scaling: Scaling, options: dict[str, Any]
) -> tuple[torch.Tensor, Scaling]:
    """The norm of all gradients, unscaled, and the scaling that clips them as
    `torch.nn.utils.clip_grad_norm_` does and skips the step where the norm is not finite.

    Raises:
        RuntimeError: a norm that is not finite, if the options ask for it; not where a GradScaler has found
            the overflow, and skips the step itself.
    """
    if scaling.grad_scale is not None:
        norm = norm / scaling.grad_scale.to(norm.device, norm.dtype).reshape(())
    bad = ~norm.isfinite()
    known = None if scaling.found_inf is None else scaling.found_inf.to(norm.device).reshape(()) != 0
    if options["error_if_nonfinite"] and bool(bad if known is None else bad & ~known):
        raise RuntimeError(
            f"{op}: the norm of the gradients must be finite, got {norm.item()}; look for the cause, or let "
            f"error_if_nonfinite=False skip such steps"
        )
    factor = (options["max_norm"] / (norm + 1e-6)).clamp(max=1.0)
    skip = bad if known is None else bad | known
    return norm, scaling._replace(found_inf=skip.float(), clip=factor)


def norm_of(works: Iterable[Work]) -> torch.Tensor:
    """The norm of all gradients as one vector; of DTensors over all shards, of which only sums travel."""
    whole: dict[torch.device, list[torch.Tensor]] = {}
    sharded: dict[Any, list[torch.Tensor]] = {}
    for work in works:
        for i, p in work.owners.items():
            sharded.setdefault((p.device_mesh, p.placements), []).append(work.grads[i])
        grads = work.grads
        if work.owners:
            grads = [grad for i, grad in enumerate(grads) if i not in work.owners]
        if grads:
            whole.setdefault(grads[0].device, []).extend(grads)
    sums = [sum_of_squares(grads) for grads in whole.values()]
    sums += [sum_over_ranks(sum_of_squares(grads), *where).full_tensor() for where, grads in sharded.items()]
    if not sums:
        return torch.zeros((), device="cpu")
    total = sums[0]
    for each in sums[1:]:
        total = total + each.to(total.device)
    return square_root(total)
