"""What the optimisers' definitions in plain torch share: numbers, L1, the moving average, rounding.

The compiled kernels compute the same bits; their form of it is csrc/common/optimizer_math.h. They take
float32 below the normal numbers as 0, in what they are given and in what they compute: `flush` and `times`
do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ._checks import arithmetic_dtype
from ._seeds import Purpose, mixed_seed, random_halves
from ._subnormal import flush


def number(value: float | torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A number of the formula in the type of the arithmetic, on the device of `like`."""
    dtype = arithmetic_dtype(like)
    if isinstance(value, torch.Tensor):
        return value.to(like.device, dtype).reshape(())
    return torch.tensor(value, dtype=dtype, device=like.device)


def exact(value: float | torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A number in float64, on the device of `like`; in float32 where the device has no float64."""
    dtype = torch.float32 if like.device.type == "mps" else torch.float64
    if isinstance(value, torch.Tensor):
        return value.to(like.device, dtype).reshape(())
    return torch.tensor(value, dtype=dtype, device=like.device)


def gradient_factor(
    maximize: bool, grad_scale: torch.Tensor | None, clip: torch.Tensor | None, like: torch.Tensor
) -> torch.Tensor:
    """What a gradient is multiplied with: -1 to climb, 1 / grad_scale to unscale it, clip."""
    factor: float | torch.Tensor = -1.0 if maximize else 1.0
    if grad_scale is not None:
        factor = factor / grad_scale.to(torch.promote_types(grad_scale.dtype, arithmetic_dtype(like)))
    result = number(factor, like)
    return result if clip is None else result * number(clip, like)


def times(*factors: torch.Tensor) -> torch.Tensor:
    """Their product from left to right, of which what is subnormal is 0."""
    product = flush(factors[0])
    for factor in factors[1:]:
        product = flush(product * factor)
    return product


def kept_if_small(result: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """A step's weights, of which those stay what they were that are subnormal and would become 0."""
    return torch.where((result == 0) & (flush(old) == 0), old, result)


def l1_pull(w: torch.Tensor, l1: torch.Tensor) -> torch.Tensor:
    """l1 * sign(w)"""
    return torch.where(w > 0, l1, torch.where(w < 0, 0 - l1, 0.0))


def soft_threshold(w: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """sign(w) max(|w| - threshold, 0), as w less the part of it that lies in [-threshold, threshold]."""
    w = flush(w)
    inside = torch.where(w < 0 - threshold, 0 - threshold, w)
    return flush(w - torch.where(inside > threshold, threshold, inside))


def lerp(old: torch.Tensor, new: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """old + weight * (new - old), from the end that is nearer, as torch.lerp does it."""
    near = weight < 0.5
    difference = flush(new - old)
    return flush(torch.where(near, old, new) + times(torch.where(near, weight, weight - 1), difference))


def square_root(x: torch.Tensor) -> torch.Tensor:
    """The root, rounded to nearest as by the processor's instruction. torch's on a CPU need not be: that of
    torch 2.14.1 was seen to be off by one in the last place for a fifth of float32, on an AMD EPYC.
    """
    if x.device.type != "cpu":
        return x.sqrt()
    wide = x.double()
    root = wide.sqrt()
    if x.dtype != torch.float64:
        return root.to(x.dtype)
    # One step of Newton with the exact square of the root, as a product and its error (Dekker 1971).
    high = root * 134217729.0
    high = high - (high - root)
    low = root - high
    square = root * root
    error = ((high * high - square) + 2 * high * low) + low * low
    better = root + ((wide - square) - error) / (2 * root)
    return torch.where(better.isfinite(), better, root)


def averaged(
    average: torch.Tensor, w: torch.Tensor, n_averaged: torch.Tensor, ema: float | torch.Tensor
) -> torch.Tensor:
    """The moving average with the weights w in it, which are the average of a first step."""
    w = flush(w)
    moved = lerp(flush(average.to(w.dtype)), w, number(1 - exact(ema, w), w))
    return torch.where(n_averaged.reshape(()) == 0, w, moved)


class Place(NamedTuple):
    """What a tensor draws by: a number of its own, and where its elements stand in the whole of which it may
    be a part. Element i has the index first + i // columns * row + i % columns there.
    """

    draw: int
    first: int
    columns: int
    row: int


class Rounding(NamedTuple):
    """The random numbers of one tensor in one step: a function of these and of an element's index alone."""

    seed: torch.Tensor
    place: Place


def rounding_of(
    seed: torch.Tensor | None,
    step: torch.Tensor | None,
    places: Sequence[int],
    index: int,
    like: torch.Tensor,
) -> Rounding | None:
    """The random numbers of tensor `index` of a list after that many steps; None without a seed. places has
    four numbers for each tensor, or none: then it draws by its place in the list, as a whole.
    """
    if seed is None:
        return None
    given = places[4 * index : 4 * index + 4]
    place = Place(*given) if given else Place(index, 0, max(1, like.numel()), 0)
    steps = torch.zeros((), device=seed.device) if step is None else step.reshape(()).to(seed.device)
    # What is no count, such as infinity, is as 0: processors disagree about it as an integer.
    steps = torch.where((steps > 0) & (steps < 2.0**63), steps, 0).to(torch.int64)
    return Rounding(mixed_seed(seed.reshape(()), steps), place)


def _round_stochastic(w: torch.Tensor, rounding: Rounding) -> torch.Tensor:
    """Finite float32 numbers rounded to bfloat16, up with the probability of what is cut off (Gupta et al.
    2015).

    bfloat16 is the upper half of a float32: 16 random bits are added to the lower half, then it is cut off.
    """
    draw, first, columns, row = rounding.place
    lengths = [min(columns, w.numel() - i) for i in range(0, w.numel(), columns)]
    rows = [
        random_halves(
            rounding.seed, first + i * row, n, w.device, draw=draw, purpose=Purpose.STOCHASTIC_ROUNDING
        )
        for i, n in enumerate(lengths)
    ]
    halves = torch.cat(rows) if rows else torch.empty(0, dtype=torch.int64, device=w.device)
    bits = w.contiguous().view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    cut = ((bits + halves.view(w.shape)) & 0xFFFF0000).to(torch.int32).view(torch.float32)
    return torch.where(w.isfinite(), cut, w).to(torch.bfloat16)


def rounded(value: torch.Tensor, dtype: torch.dtype, rounding: Rounding | None) -> torch.Tensor:
    """`value` in the type of its tensor; with random numbers, and to bfloat16, at random."""
    if rounding is not None and dtype == torch.bfloat16:
        return _round_stochastic(value, rounding)
    return value.to(dtype)


def is_skipped(found_inf: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor | None:
    """Whether the step changes nothing. The host does not read it, because that would wait for the device."""
    return None if found_inf is None else found_inf.to(like.device).reshape(()) != 0


def store(tensor: torch.Tensor, value: torch.Tensor, skip: torch.Tensor | None) -> None:
    """Write a value of the tensor's dtype, unless the step is skipped."""
    tensor.copy_(value if skip is None else torch.where(skip, tensor, value))


def count(counter: torch.Tensor, skip: torch.Tensor | None) -> None:
    """Add one, unless the step is skipped."""
    counter.add_(1 if skip is None else (~skip).to(counter.device, counter.dtype).reshape(counter.shape))
