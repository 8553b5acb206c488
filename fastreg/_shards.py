"""What ops of DTensors share: the part of the whole that this rank has, the whole of the parts, and the seed
that all ranks use.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch.compiler import is_compiling

from ._checks import ArgumentTypeError
from ._transforms import has_transformed_parts, is_transformed, is_wrapped


def own_part(shape: torch.Size, mesh: Any, placements: Sequence[Any]) -> tuple[slice, ...]:
    """Where in a tensor of `shape` this rank's part lies, a slice for each dimension.

    The cut is torch.chunk's: all ranks but the last have parts of one size, rounded up.

    Raises:
        ValueError: a strided shard whose rows do not follow one another, a rank outside of the mesh.
    """
    _check_inside(mesh)
    starts, sizes = [0] * len(shape), list(shape)
    # FSDP2 of a tensor that is split over another mesh dimension already: that split, which stands later, was
    # made first. Dynamo of torch 2.10 cannot trace hasattr of a placement.
    strided = [k for k, placement in enumerate(placements) if getattr(placement, "split_factor", None)]
    for axis in strided:
        dim, factor = placements[axis].dim, placements[axis].split_factor
        before = [
            k for k in range(axis + 1, len(placements)) if placements[k].is_shard() and k not in strided
        ]
        if factor != math.prod(mesh.size(k) for k in before if placements[k].dim == dim):
            raise ValueError(
                f"fastreg: a part of a DTensor must be rows that follow one another, got {placements}; call "
                f".redistribute() first"
            )
    for axis in (*(k for k in range(len(placements)) if k not in strided), *strided):
        placement = placements[axis]
        if placement.is_shard() or axis in strided:
            dim, ranks = placement.dim, mesh.size(axis)
            most = (sizes[dim] + ranks - 1) // ranks
            start = min(most * mesh.get_local_rank(axis), sizes[dim])
            starts[dim] += start
            sizes[dim] = min(most, sizes[dim] - start)
    return tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))


def _check_inside(mesh: Any) -> None:
    """Raise on a rank that is not in the mesh, which holds no part of its tensors."""
    if not is_compiling() and mesh.get_coordinate() is None:
        raise ValueError(
            f"fastreg: expected a rank of the DTensor's mesh, {mesh.mesh.tolist()}, got one outside; call it "
            f"only on its ranks"
        )


def refuse_transformed_parts(op: str, *tensors: Any) -> None:
    """Raise for DTensors under torch.func and in forward mode, where only a loss has a form for them."""
    if has_transformed_parts(*tensors):
        raise ArgumentTypeError(
            f"{op}: DTensors have derivatives by backward passes alone, got one under torch.func or in "
            f"forward mode; call it on a rank's own part, .to_local(), or use .backward()"
        )


def one_by_one(op: str, result: Any) -> Any:
    """A DTensor whose gradients come one at a time; several at once are refused."""

    def check(gradient: torch.Tensor) -> None:
        if is_wrapped(gradient):
            raise ArgumentTypeError(
                f"{op}: a DTensor has one gradient at a time, got a batch of them (is_grads_batched or "
                f"torch.func.vmap); compute them one after another"
            )

    if result.requires_grad and not is_compiling():
        result.register_hook(check)
    return result


def place_in_whole(shape: torch.Size, part: Sequence[slice]) -> tuple[int, int, int] | None:
    """(first, columns, row): element i of a part of a tensor of `shape` is element first + i // columns * row
    + i % columns of the whole. None for a part that three numbers do not tell, of the second and the third
    dimension for example.
    """
    lengths = [each.stop - each.start for each in part]
    if 0 in lengths:
        return 0, 1, 0
    cut = [k for k, (length, size) in enumerate(zip(lengths, shape, strict=True)) if length < size]
    if not cut:
        return 0, math.prod(shape), 0
    if any(math.prod(lengths[:k]) > 1 for k in cut[:-1]):
        return None
    strides = [math.prod(shape[k + 1 :]) for k in range(len(shape))]
    first = sum(each.start * stride for each, stride in zip(part, strides, strict=True))
    last = cut[-1]
    return first, lengths[last] * strides[last], shape[last] * strides[last]


def local_part(whole: Any, placements: Sequence[Any] | None = None, gradients: Any = None) -> torch.Tensor:
    """What this rank has of a DTensor, which is first placed otherwise where `placements` are given.

    gradients: how the gradient of the part is placed, where that is not as the part is.

    Its gradient has a gradient. Those of to_local and redistribute have no graph with torch 2.10, and with
    2.14.1 the second derivative of a sum over ranks is that of one rank's summand.
    """
    if whole.requires_grad and _has_backward_alone():
        at = tuple(whole.placements if placements is None else placements)
        return cast(torch.Tensor, _Part.apply(whole, at, at if gradients is None else tuple(gradients)))
    if placements is not None:
        # Also where nothing has to move: then the gradient is placed as the whole is.
        whole = whole.redistribute(placements=placements)
    return cast(torch.Tensor, whole.to_local(grad_placements=gradients))


def full(whole: Any) -> torch.Tensor:
    """What `DTensor.full_tensor` gives, by `local_part`."""
    from torch.distributed.tensor import Replicate

    return local_part(whole, [Replicate()] * whole.device_mesh.ndim)


def whole_of_parts(
    local: torch.Tensor,
    mesh: Any,
    placements: Sequence[Any],
    shape: torch.Size | None = None,
    stride: Any = None,
    then: tuple[Any, ...] | None = None,
) -> Any:
    """The DTensor of which this rank has the part `local`, placed as `then` says in the end.

    shape: its shape; None where all ranks have parts of one shape. stride: contiguous as a whole, where none
    is given. Its gradient has a gradient, as that of `local_part` has.
    """
    if stride is None and shape is not None:
        stride = torch.empty(shape, device="meta").stride()
    make = _Whole.apply if local.requires_grad and _has_backward_alone() else _whole
    return make(local, mesh, tuple(placements), shape, stride, then)


def _has_backward_alone() -> bool:
    """Whether derivatives are those of backward passes, for which a function of our own is enough."""
    return torch.is_grad_enabled() and not (is_compiling() or is_transformed())


def _whole(local: torch.Tensor, mesh: Any, placements: Any, shape: Any, stride: Any, then: Any) -> Any:
    from torch.distributed.tensor import DTensor

    whole = DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=stride)
    return whole if then in (None, whole.placements) else whole.redistribute(placements=then)


class _Part(torch.autograd.Function):
    """`local_part`, whose gradient is `whole_of_parts`."""

    @staticmethod
    def forward(ctx: Any, whole: Any, placements: Any, gradients: Any) -> torch.Tensor:
        ctx.whole = whole.device_mesh, whole.placements, whole.shape, whole.stride()
        ctx.gradients = gradients
        moved = whole if placements == whole.placements else whole.redistribute(placements=placements)
        local = moved.to_local()
        ctx.stride = local.stride() if moved is whole else None
        return cast(torch.Tensor, local.view_as(local))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        mesh, placements, shape, stride = ctx.whole
        if grad.stride() != ctx.stride:
            grad, stride = grad.contiguous(), None
        then = _of_gradient(placements)
        return whole_of_parts(grad, mesh, ctx.gradients, shape, stride, then), None, None


class _Whole(torch.autograd.Function):
    """`whole_of_parts`, whose gradient is `local_part`."""

    @staticmethod
    def forward(ctx: Any, local: torch.Tensor, mesh: Any, placements: Any, *rest: Any) -> Any:
        ctx.placements = placements
        return _whole(local.detach(), mesh, placements, *rest)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        part = local_part(grad, _of_gradient(ctx.placements), ctx.placements)
        return part, None, None, None, None, None


def _of_gradient(placements: Sequence[Any]) -> tuple[Any, ...]:
    """How a gradient is placed: that of a sum of parts is the same for each of them."""
    from torch.distributed.tensor import Replicate

    return tuple(Replicate() if placement.is_partial() else placement for placement in placements)


def sum_over_ranks(value: torch.Tensor, mesh: Any, placements: Sequence[Any]) -> Any:
    """The DTensor that is the sum of what each rank has of its parts of others; along a dimension of the mesh
    that holds replicas all have the same.
    """
    from torch.distributed.tensor import Partial, Replicate

    by = [Replicate() if placement.is_replicate() else Partial() for placement in placements]
    return whole_of_parts(value, mesh, by)


def seed_of_first_rank(seed: torch.Tensor, mesh: Any) -> torch.Tensor:
    """The seed of a mesh's first rank, which decides: generators may be seeded differently."""
    _check_inside(mesh)
    for axis in range(mesh.ndim):
        if mesh.size(axis) > 1:
            seed = sent_by_first(seed, (mesh, axis) if is_compiling() else mesh.get_group(axis))
    return seed


def sent_by_first(value: torch.Tensor, group: Any) -> torch.Tensor:
    """What the first rank of a group has, which `value` then holds on all; one message."""
    from torch.distributed import broadcast
    from torch.distributed._functional_collectives import broadcast as traced_broadcast

    if is_compiling():
        return traced_broadcast(value, 0, group)
    broadcast(value, group=group, group_src=0)
    return value
