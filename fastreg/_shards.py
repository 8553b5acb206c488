"""What ops of DTensors share: the part of the whole that this rank has, and the seed that all ranks use."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.compiler import is_compiling


def own_part(shape: torch.Size, mesh: Any, placements: Sequence[Any]) -> tuple[slice, ...]:
    """Where in a tensor of `shape` this rank's part lies, a slice for each dimension."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sizes, starts = compute_local_shape_and_global_offset(shape, mesh, placements)
    return tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))


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


def seed_of_first_rank(seed: torch.Tensor, mesh: Any) -> torch.Tensor:
    """The seed of a mesh's first rank, which decides: generators may be seeded differently."""
    from torch.distributed import broadcast
    from torch.distributed._functional_collectives import broadcast as traced_broadcast

    for axis in range(mesh.ndim):
        if mesh.size(axis) == 1:
            continue
        if is_compiling():
            seed = traced_broadcast(seed, 0, (mesh, axis))
        else:
            broadcast(seed, group=mesh.get_group(axis), group_src=0)
    return seed
