"""Masks of one bit per decision: bit i % 8 of byte i // 8 is 1 where decision i is "kept", else 0."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ._checks import check_tensor


def empty_mask(input: torch.Tensor, inner: int) -> torch.Tensor:
    """An uninitialized mask for `input`, whose elements share a decision by runs of `inner`."""
    return input.new_empty(((input.numel() // inner + 7) // 8,), dtype=torch.uint8)


def pack_mask(mask: torch.Tensor) -> torch.Tensor:
    """Pack a bool tensor of any shape into uint8 of shape (ceil(numel / 8),): bit i % 8 of byte i // 8 is
    element i.

    Raises:
        TypeError: `mask` is no bool tensor.
    """
    check_tensor("pack_mask", "mask", mask)
    if mask.dtype != torch.bool:
        raise TypeError(
            f"pack_mask: mask must be a bool tensor, got {mask.dtype}; compare it with != 0 first"
        )
    bits = torch.nn.functional.pad(mask.reshape(-1).to(torch.uint8), (0, -mask.numel() % 8)).view(-1, 8)
    return (bits << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(1, dtype=torch.uint8)


def unpack_mask(mask: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Unpack a packed mask, uint8 of shape (ceil(numel / 8),), into a bool tensor of `shape`.

    Raises:
        ValueError: `mask` does not have the size that `shape` needs.
        TypeError: `mask` is no uint8 tensor.
    """
    check_tensor("unpack_mask", "mask", mask)
    if mask.dtype != torch.uint8:
        raise TypeError(f"unpack_mask: mask must be a uint8 tensor, got {mask.dtype}")
    numel = torch.Size(shape).numel()
    if mask.shape != ((numel + 7) // 8,):
        raise ValueError(
            f"unpack_mask: mask must have shape ({(numel + 7) // 8},) for {tuple(shape)}, got "
            f"{tuple(mask.shape)}"
        )
    bits = (mask.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8, device=mask.device)) & 1
    return bits.view(-1)[:numel].view(shape).bool()
