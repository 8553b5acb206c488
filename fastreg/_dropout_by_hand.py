"""Dropout of parts that are no DTensors: whoever splits a tensor by hand says where a part lies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ._checks import check_count, check_dense, check_dtype, check_generator
from ._dropout import check_input, dropout_of_part
from ._ranks import process_group
from ._seeds import draw_seed, seed_tensor
from ._shards import sent_by_first
from ._transforms import is_sharded


def dropout(
    local: torch.Tensor,
    p: float = 0.5,
    training: bool = True,
    *,
    shape: Sequence[int],
    start: Sequence[int],
    seed: int | torch.Tensor | None = None,
    group: Any = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """`fastreg.dropout` of a rank's part of a tensor: what it would be in the whole.

    ::

        # the columns of this rank, as tensor parallelism cuts the width of a layer
        hidden = fr.distributed.dropout(hidden, 0.1, shape=(*hidden.shape[:-1], width), start=(0, 0, first))

    Args:
        local: the part, of as many dimensions as the whole; float32, float64, float16 or bfloat16. May be
            empty.
        p: probability of zeroing an element, in [0, 1]. 0 returns `local`.
        training: if False, no element is dropped.
        shape: of the whole.
        start: index in the whole of the part's first element, one number for each dimension. Ranks that hold
            the same elements drop the same.
        seed: an int, or an int64 tensor of one element, the same on all ranks: then nothing is sent. None:
            each rank draws one, and that of the first rank of `group` is sent to all, 8 bytes in one message,
            also where a rank's part is empty.
        group: the ProcessGroup or the DeviceMesh of one dimension whose ranks have the parts; None is the
            default group.
        generator: torch.Generator on the part's device to draw the seed from; the default generator if None.

    Returns:
        Tensor like `local`. Saved for backward: one bit per element of it.

    Raises:
        ValueError: p outside [0, 1] or NaN, a part that does not lie in the whole, a dtype without kernels.
        TypeError: `local` is no tensor or a DTensor, `p` no number, `training` no bool, numbers that are no
            ints. RuntimeError: there is neither a seed nor a process group.

    Source: as `fastreg.dropout`; Shoeybi et al. 2019, Megatron-LM, section 3 (split layers).
    """
    op = "distributed.dropout"
    p = check_input(op, local, p, training)
    if is_sharded(local):
        raise TypeError(f"{op}: local must be a plain tensor, got a DTensor; call fastreg.dropout with it")
    check_dtype(op, "local", local)
    check_dense(op, "local", local)
    if not len(shape) == len(start) == local.dim():
        raise ValueError(
            f"{op}: shape and start must have a number for each of the {local.dim()} dimensions of local, "
            f"got {len(shape)} and {len(start)}"
        )
    for size, first, held in zip(shape, start, local.shape, strict=True):
        check_count(op, "shape", size, 0)
        check_count(op, "start", first, 0)
        if first + held > size:
            raise ValueError(
                f"{op}: local must lie in the whole of shape {tuple(shape)}, got {tuple(local.shape)} from "
                f"{tuple(start)} on"
            )
    check_generator(op, generator)
    if not training or p == 0:
        return local
    if seed is None:
        own = draw_seed(local.device, generator).to(local.device)
        seed = sent_by_first(own, process_group(op, group))
    else:
        seed = seed_tensor(op, seed).to(local.device)
    part = [slice(first, first + held) for first, held in zip(start, local.shape, strict=True)]
    return dropout_of_part(local, p, seed, torch.Size(shape), part, 1, "inverted")
