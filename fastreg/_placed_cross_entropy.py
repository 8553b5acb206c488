"""Cross-entropy of DTensors: each rank computes with what it has, rows, classes or both.

Where rows are sharded a rank has the losses of its own, and a mean is over the rows of all ranks. Where
classes are, it is `_sharded_cross_entropy`. The results are placed as those of torch's function are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist
from torch.compiler import is_compiling

from ._cross_entropy import LossOptions, check_indices, loss_of, statistics_dtype
from ._linear_cross_entropy import linear_loss, row_weights
from ._ranks import raise_the_first
from ._sharded_cross_entropy import sharded_linear_loss, sharded_loss
from ._shards import full, local_part, one_by_one, own_part, whole_of_parts
from ._transforms import is_sharded, may_look


class _Placed(NamedTuple):
    """How the logits (N, C, ...) are placed while the loss is computed: at most one dimension of the mesh
    shards the classes.
    """

    mesh: Any
    placements: tuple[Any, ...]
    class_axis: int | None  # of the mesh
    row_axes: tuple[int, ...]


def _placed(logits: Any) -> _Placed:
    """Partial sums are added up. Where several dimensions of the mesh shard the classes, these are gathered
    until only one does.
    """
    from torch.distributed.tensor import Replicate, Shard

    placements: list[Any] = []
    class_axis, row_axes = None, []
    for axis, placement in enumerate(logits.placements):
        kept: Any = Replicate()
        if type(placement) is Shard:
            dim = placement.dim % logits.dim()
            if dim != 1:
                row_axes.append(axis)
                kept = placement
            elif class_axis is None:
                class_axis, kept = axis, placement
        placements.append(kept)
    return _Placed(logits.device_mesh, tuple(placements), class_axis, tuple(row_axes))


def _part(value: Tensor, placed: _Placed, dims: int, without_classes: bool) -> Tensor:
    """What a rank needs of a target, of logits of `dims` dimensions: a plain one is the same on all ranks."""
    from torch.distributed.tensor import Replicate, Shard

    placements: list[Any] = []
    for placement in placed.placements:
        if isinstance(placement, Shard) and without_classes:
            dim = placement.dim % dims
            placement = Replicate() if dim == 1 else Shard(dim - (dim > 1))
        placements.append(placement)
    if is_sharded(value):
        return local_part(value, placements)
    return value[own_part(value.shape, placed.mesh, placements)]


def loss_of_dtensors(
    op: str, input: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions
) -> Tensor:
    """The loss of arguments that are checked and of which one at least is a DTensor. input: (N, C, ...) or
    (C,). The result is a DTensor: a mean is replicated, a sum is partial where rows are sharded, and the
    losses of the rows are placed as the rows are.
    """
    from torch.distributed.tensor import Replicate, Shard

    mesh = next(t.device_mesh for t in (input, target, weight) if is_sharded(t))  # type: ignore[union-attr]
    everywhere = [Replicate()] * mesh.ndim
    if not is_sharded(input):
        input = whole_of_parts(input, mesh, everywhere)
    if input.dim() == 1:
        loss = loss_of_dtensors(op, input.unsqueeze(0), target.unsqueeze(0), weight, options)
        return loss if options.reduction else loss.squeeze(0)
    placed = _placed(input)
    classes, soft = input.shape[1], target.is_floating_point()
    wide = statistics_dtype(input)
    local = local_part(input, placed.placements)
    target = _part(target, placed, input.dim(), without_classes=not soft)
    if weight is not None and is_sharded(weight):
        weight = weight.full_tensor()  # type: ignore[attr-defined]
    rows = local.shape[:1] + local.shape[2:]
    if local.dim() > 3:  # the operators take rows side by side as one dimension
        local, target = local.flatten(2), target.flatten(2 if soft else 1)
    target = target.contiguous()

    # This rank's losses, or their sum.
    each = options.reduction == 0
    own = options._replace(reduction=0 if each else 2, loss_dtype=wide)

    def losses() -> Tensor:
        if placed.class_axis is None:
            _check_rows(op, target, options, classes)
            return loss_of(local, target, weight, own)
        first = own_part(input.shape, mesh, placed.placements)[1].start
        group = mesh.get_group(placed.class_axis).group_name
        return sharded_loss(op, local, target, weight, own, (group, int(first), classes))

    dtype = options.loss_dtype or input.dtype
    if each:
        shape = input.shape[:1] + input.shape[2:]
        placements: list[Any] = []
        for axis, placement in enumerate(placed.placements):
            dim = placement.dim % input.dim() if axis in placed.row_axes else 0
            placements.append(Shard(dim - (dim > 1)) if axis in placed.row_axes else Replicate())
        loss = _of_all_ranks(losses, target, mesh, placed.row_axes)
        return one_by_one(op, whole_of_parts(loss.view(rows).to(dtype), mesh, placements, shape))
    loss = _over_all_rows(losses, target, weight, options, mesh, placed.row_axes, wide, dtype)
    return one_by_one(op, loss)


def _check_rows(op: str, target: Tensor, options: LossOptions, classes: int) -> None:
    """Raise for a class index out of range in this rank's rows."""
    where = "" if is_compiling() else f" of rank {dist.get_rank()}"
    check_indices(op, target, options.ignore_index, classes, where)


def _of_all_ranks(losses: Callable[[], Tensor], target: Tensor, mesh: Any, row_axes: Sequence[int]) -> Tensor:
    """losses(), unless it raises on a rank that has other rows: then all raise the error of the first that
    has one, of which a message tells. Where values are not looked at nobody raises, and nothing is sent.
    """
    if not row_axes or not may_look(target):
        return losses()
    groups = [mesh.get_group(axis) for axis in row_axes]
    failed, loss = None, None
    try:
        loss = losses()
    except ValueError as error:
        failed = error
    found = torch.tensor(failed is not None, dtype=torch.uint8, device="cpu")
    for group in groups:
        dist.all_reduce(found, dist.ReduceOp.MAX, group=group)
    if found:
        raise_the_first(failed, *groups)
    assert loss is not None
    return loss


def _over_all_rows(
    losses: Callable[[], Tensor], target: Tensor, weight: Tensor | None, options: LossOptions, mesh: Any,
    row_axes: tuple[int, ...], wide: torch.dtype, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The sum, partial where rows are sharded, or the mean over all rows, which is on every rank.

    losses() gives the sum of this rank's rows in the dtype `wide`, or raises; target: theirs. For a mean the
    ranks send each other what their rows count, and with it whether one has raised: then all raise its error.
    """
    from torch.distributed.tensor import Partial, Replicate

    summed = [Partial() if axis in row_axes else Replicate() for axis in range(mesh.ndim)]
    if options.reduction == 2:
        loss = _of_all_ranks(losses, target, mesh, row_axes)
        return whole_of_parts(loss.to(dtype), mesh, summed)
    failed: Exception | None = None
    loss = target.new_zeros((), dtype=wide)
    try:
        loss = losses()
    except ValueError as error:
        failed = error
    counted = row_weights(target, weight, options.ignore_index, loss.dtype).sum()
    sent = torch.stack((counted, counted.new_full((), failed is not None)))
    got = full(whole_of_parts(sent, mesh, summed))
    if may_look(got) and got[1] > 0:
        raise_the_first(failed, *(mesh.get_group(axis) for axis in row_axes))
    normaliser = got[0]
    if options.all_ignored_zero:
        empty = normaliser == 0
        loss = torch.where(empty, 0, loss / normaliser.where(~empty, 1))
    else:
        loss = loss / normaliser
    return whole_of_parts(loss, mesh, summed, then=(Replicate(),) * mesh.ndim).to(dtype)


def linear_loss_of_dtensors(
    op: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor,
    class_weight: Tensor | None, options: LossOptions,
) -> Tensor:  # fmt: skip
    """The loss of a linear layer of DTensors; hidden: (..., H), its target (...) or (..., C). No rank holds
    its logits.

    One dimension of the mesh may split the classes and the others the rows. Whatever else is split is
    gathered: the rows over the ranks that split the classes, the layer over those that split the rows, and H.
    """
    from torch.distributed.tensor import Partial, Replicate, Shard

    tensors = (hidden, weight, bias, target, class_weight)
    mesh = next(t.device_mesh for t in tensors if is_sharded(t))  # type: ignore[union-attr]
    axes, rows = range(mesh.ndim), hidden.dim() - 1

    def placed(tensor: Tensor) -> Any:
        """A plain tensor is the same on all ranks."""
        if is_sharded(tensor):
            return tensor
        return whole_of_parts(tensor, mesh, [Replicate()] * mesh.ndim)

    def shards(tensor: Any, dims: Sequence[int]) -> list[int]:
        """The dimensions of the mesh that split one of these dimensions."""
        each = enumerate(placed(tensor).placements)
        return [axis for axis, p in each if type(p) is Shard and p.dim % tensor.dim() in dims]

    class_axis = next(iter(shards(weight, [0])), None)
    row_axes = tuple(axis for axis in shards(hidden, range(rows)) if axis != class_axis)
    of_rows = [placed(hidden).placements[axis] if axis in row_axes else Replicate() for axis in axes]
    of_layer = [Shard(0) if axis == class_axis else Replicate() for axis in axes]
    of_gradient = [Partial() if axis in row_axes else placement for axis, placement in enumerate(of_layer)]
    of_target = list(of_rows)
    if target.is_floating_point() and class_axis is not None:
        of_target[class_axis] = Shard(rows)

    def part(tensor: Any, placements: Any, gradient: Any) -> Any:
        return local_part(placed(tensor), placements, gradient)

    parts = (
        part(hidden, of_rows, of_rows),
        part(weight, of_layer, of_gradient),
        bias if bias is None else part(bias, of_layer, of_gradient),
        part(target, of_target, of_target).contiguous(),
        class_weight.full_tensor() if is_sharded(class_weight) else class_weight,  # type: ignore[union-attr]
    )
    wide = statistics_dtype(hidden)
    own = options._replace(reduction=2 if options.reduction else 0, loss_dtype=wide)

    def losses() -> Tensor:
        if class_axis is None:
            _check_rows(op, parts[3], options, weight.shape[0])
            return linear_loss(op, *parts, own)
        first = own_part(weight.shape, mesh, of_layer)[0].start
        shard = mesh.get_group(class_axis).group_name, int(first), weight.shape[0]
        return sharded_linear_loss(op, *parts, own, shard)

    dtype = options.loss_dtype or hidden.dtype
    if options.reduction == 0:
        loss = _of_all_ranks(losses, parts[3], mesh, row_axes)
        return one_by_one(op, whole_of_parts(loss.to(dtype), mesh, of_rows, hidden.shape[:-1]))
    target = parts[3].flatten(0, -2) if parts[3].is_floating_point() else parts[3].flatten()
    return one_by_one(op, _over_all_rows(losses, target, parts[4], options, mesh, row_axes, wide, dtype))
