"""Cross-entropy of DTensors: each rank computes with what it has, rows, classes or both.

Where rows are sharded a rank has the losses of its own, and a mean is over the rows of all ranks. Where
classes are, it is `_sharded_cross_entropy`. The results are placed as those of torch's function are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._cross_entropy import LossOptions, check_indices, loss_of, statistics_dtype
from ._linear_cross_entropy import row_weights
from ._sharded_cross_entropy import sharded_linear_loss, sharded_loss
from ._shards import own_part
from ._transforms import is_sharded


class _Placed(NamedTuple):
    """Where the logits are: `logits` is a DTensor (N, C, ...), of which at most one dimension of the mesh
    shards the classes.
    """

    logits: Any
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
    if tuple(placements) != tuple(logits.placements):
        logits = logits.redistribute(placements=placements)
    return _Placed(logits, class_axis, tuple(row_axes))


def _part(value: Tensor, placed: _Placed, without_classes: bool) -> Tensor:
    """What a rank needs of a target: a plain tensor is the same on all ranks."""
    from torch.distributed.tensor import Replicate, Shard

    placements: list[Any] = []
    for placement in placed.logits.placements:
        if isinstance(placement, Shard) and without_classes:
            dim = placement.dim % placed.logits.dim()
            placement = Replicate() if dim == 1 else Shard(dim - (dim > 1))
        placements.append(placement)
    if is_sharded(value):
        return value.redistribute(placements=placements).to_local()  # type: ignore[attr-defined]
    return value[own_part(value.shape, placed.logits.device_mesh, placements)]


def loss_of_dtensors(
    op: str, input: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions
) -> Tensor:
    """The loss of arguments that are checked and of which one at least is a DTensor. input: (N, C, ...) or
    (C,). The result is a DTensor: a mean is replicated, a sum is partial where rows are sharded, and the
    losses of the rows are placed as the rows are.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    mesh = next(t.device_mesh for t in (input, target, weight) if is_sharded(t))  # type: ignore[union-attr]
    everywhere = [Replicate()] * mesh.ndim
    if not is_sharded(input):
        input = DTensor.from_local(input, mesh, everywhere, run_check=False)
    if input.dim() == 1:
        return loss_of_dtensors(op, input.unsqueeze(0), target.unsqueeze(0), weight, options).reshape(
            () if options.reduction else (1,)
        )
    placed = _placed(input)
    classes, soft = input.shape[1], target.is_floating_point()
    wide = statistics_dtype(input)
    local = placed.logits.to_local()
    target = _part(target, placed, without_classes=not soft)
    if weight is not None and is_sharded(weight):
        weight = weight.full_tensor()  # type: ignore[attr-defined]
    rows = local.shape[:1] + local.shape[2:]
    if local.dim() > 3:  # the operators take rows side by side as one dimension
        local, target = local.flatten(2), target.flatten(2 if soft else 1)
    target = target.contiguous()
    check_indices(op, target, options.ignore_index, classes)

    # This rank's losses, or their sum.
    each = options.reduction == 0
    own = options._replace(reduction=0 if each else 2, loss_dtype=wide)
    if placed.class_axis is None:
        loss = loss_of(local, target, weight, own)
    else:
        first = own_part(input.shape, mesh, placed.logits.placements)[1].start
        group = mesh.get_group(placed.class_axis).group_name
        loss = sharded_loss(op, local, target, weight, own, (group, int(first), classes))
    dtype = options.loss_dtype or input.dtype

    if each:
        shape = input.shape[:1] + input.shape[2:]
        placements: list[Any] = []
        for axis, placement in enumerate(placed.logits.placements):
            dim = placement.dim % input.dim() if axis in placed.row_axes else 0
            placements.append(Shard(dim - (dim > 1)) if axis in placed.row_axes else Replicate())
        strides = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            loss.view(rows).to(dtype), mesh, placements, run_check=False, shape=shape, stride=strides
        )
    summed = [Partial() if axis in placed.row_axes else Replicate() for axis in range(mesh.ndim)]
    if options.reduction == 2:
        return DTensor.from_local(loss.to(dtype), mesh, summed, run_check=False)
    normaliser = row_weights(target, weight, options.ignore_index, wide).sum()
    normaliser = DTensor.from_local(normaliser, mesh, summed, run_check=False).full_tensor()
    if options.all_ignored_zero:
        empty = normaliser == 0
        loss = torch.where(empty, 0, loss / normaliser.where(~empty, 1))
    else:
        loss = loss / normaliser
    return (
        DTensor.from_local(loss, mesh, summed, run_check=False).redistribute(placements=everywhere).to(dtype)
    )


def linear_loss_of_dtensors(
    op: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor,
    class_weight: Tensor | None, options: LossOptions,
) -> Tensor:  # fmt: skip
    """The loss of a linear layer of DTensors; hidden: (..., H), its target (...) or (..., C).

    Of a layer whose classes are sharded, and of rows that are all on every rank, no rank holds its logits.
    """
    from torch.distributed.tensor import DTensor, Replicate, Shard

    classes, shape = weight.shape[0], hidden.shape[:-1]
    soft = target.is_floating_point()
    mesh: Any = weight.device_mesh if is_sharded(weight) else None  # type: ignore[attr-defined]
    by_class = mesh is not None and tuple(weight.placements) == (Shard(0),)  # type: ignore[attr-defined]
    others = [t for t in (hidden, target, class_weight) if t is not None and is_sharded(t)]
    replicated = all(t.placements[0].is_replicate() for t in others)  # type: ignore[attr-defined]
    if by_class and not soft and replicated:

        def local(value: Any) -> Any:
            return value.to_local() if value is not None and is_sharded(value) else value

        if bias is not None:
            placed: Any = bias
            if not is_sharded(bias):
                placed = DTensor.from_local(bias, mesh, [Replicate()], run_check=False)
            bias = placed.redistribute(placements=[Shard(0)])
        first = own_part(weight.shape, mesh, [Shard(0)])[0].start
        where = mesh.get_group().group_name, int(first), classes
        loss = sharded_linear_loss(
            op, local(hidden), local(weight), local(bias), local(target), local(class_weight), options, where
        )
        return DTensor.from_local(loss, mesh, [Replicate()], run_check=False)
    logits = torch.nn.functional.linear(hidden, weight, bias).flatten(0, -2)
    target = target.flatten(0, -2) if soft else target.flatten()
    loss = loss_of_dtensors(op, logits, target, class_weight, options)
    return loss.view(shape) if options.reduction == 0 else loss
