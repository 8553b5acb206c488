"""What the functions on images share: images of any leading shape as a batch, and numbers, one for all
samples or one for each.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .._checks import DTYPES, ArgumentTypeError, check_constant, check_number, check_tensor
from .._shards import refuse_transformed_parts
from .._transforms import is_sharded, may_look
from . import _op

Number = float | Tensor  # one number, or one for each sample

IMAGE_DTYPES = (torch.uint8, *DTYPES)


def refuse_parts(op: str, images: Any) -> None:
    """Raise for a DTensor where there is no form for one."""
    refuse_transformed_parts(op, images)
    if is_sharded(images):
        raise ArgumentTypeError(
            f"{op}: images must be a plain tensor, got a DTensor; give a rank's own samples, .to_local(), "
            f"and their place among all as offset= or index= where something is drawn"
        )


def batched(op: str, images: Tensor) -> tuple[Tensor, torch.Size]:
    """(images (..., C, H, W) as (B, C, H, W), their leading shape)."""
    check_tensor(op, "images", images)
    refuse_parts(op, images)
    if images.dtype not in IMAGE_DTYPES:
        raise TypeError(
            f"{op}: images must be uint8, float32, float64, float16 or bfloat16, got {images.dtype}; convert "
            f"them with .float()"
        )
    if images.dim() < 3:
        raise ValueError(f"{op}: images must be (..., channels, height, width), got {tuple(images.shape)}")
    lead = images.shape[:-3]
    return images if images.dim() == 4 else images.reshape(lead.numel(), *images.shape[-3:]), lead


def numbers(
    op: str,
    name: str,
    value: Number,
    images: Tensor,
    low: float = -math.inf,
    high: float = math.inf,
    above: float | None = None,
) -> Tensor:
    """A tensor (B,) of one number or one per sample, each finite, in [low, high] and greater than `above`; it
    is float64 on the images' device, or float32 where that has no float64.
    """
    batch, dtype = images.shape[:-3].numel(), _op.number_dtype(images.device)
    if not isinstance(value, Tensor):
        check_number(op, name, value, low, high)
        check_number(op, name, value, finite=True)
        if above is not None and not value > above:
            raise ValueError(f"{op}: {name} must be finite and greater than {above}, got {value}")
        return torch.full((batch,), float(value), dtype=dtype, device=images.device)
    if value.is_complex():
        raise TypeError(f"{op}: {name} must be real, got {value.dtype}")
    check_constant(op, name, value)
    value = value.to(images.device, dtype)
    if value.numel() == 1:
        value = value.reshape(1).expand(batch)
    if value.shape != (batch,):
        raise ValueError(
            f"{op}: {name} must be a number or one for each of {batch} samples, got shape "
            f"{tuple(value.shape)}"
        )
    if may_look(value):
        good = (
            (value >= low) & (value <= high) & value.isfinite() & (True if above is None else value > above)
        )
        if not good.all():
            limits = f"in [{low:g}, {high:g}]" if above is None else f"greater than {above}"
            raise ValueError(f"{op}: {name} must be finite and {limits}, got {value[~good][0].item()}")
    return value.contiguous()


def pair(value: Any) -> tuple[Any, Any]:
    """(a, b) of a pair, of a tensor (2,) or (B, 2), or of one for both."""
    if isinstance(value, Tensor) and value.dim() and value.shape[-1] == 2 and value.dim() <= 2:
        return value[..., 0], value[..., 1]
    if isinstance(value, (list, tuple)):
        return (value[0], value[0]) if len(value) == 1 else tuple(value)
    return value, value
