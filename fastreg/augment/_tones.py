"""The steps that change the values of pixels by what an image holds or by whole levels, made of torch's
operators: the definitions of `functional`'s of the same names, which have the formulas. Each equals
torchvision.transforms.v2.functional's, for the same dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import arithmetic_dtype
from .._transforms import may_look, wants_derivative
from ._arguments import Number, batched, numbers
from ._parts import on_parts
from ._plain import is_last
from ._tv import of_images


def _most(image: Tensor) -> int:
    """White."""
    return 255 if image.dtype == torch.uint8 else 1


def _wide(image: Tensor) -> Tensor:
    """The image in the type of the arithmetic: float32, and float64 for float64."""
    return image.to(arithmetic_dtype(image))


def narrowed(image: Tensor, dtype: torch.dtype) -> Tensor:
    """The image in a type that holds it. Of floats torch makes bytes one by one on a CPU, and from 16 bits
    many at a time, to the same numbers.
    """
    return (image.to(torch.int16) if dtype == torch.uint8 else image).to(dtype)


def laid_out(image: Tensor, like: Tensor) -> Tensor:
    """The image in the memory format of another."""
    is_batch = like.dim() == 4
    return image.contiguous(memory_format=torch.channels_last) if is_batch and is_last(like) else image


def _per_sample(op: str, name: str, value: Number, image: Tensor, **limits: float) -> Tensor:
    """One number for each sample, in the shape that broadcasts over its pixels."""
    lead = image.shape[:-3]
    return numbers(op, name, value, image, **limits).view(*lead, 1, 1, 1)


def invert(inpt: Tensor) -> Tensor:
    batched("invert", inpt)
    return _most(inpt) - inpt


def posterize(inpt: Tensor, bits: Number) -> Tensor:
    op = "posterize"
    batched(op, inpt)
    levels = 2 ** _per_sample(op, "bits", bits, inpt, low=0, high=8).floor()
    if inpt.dtype == torch.uint8:
        return inpt & (256 - 256 / levels).to(torch.uint8)
    levels = levels.to(arithmetic_dtype(inpt))
    kept = (_wide(inpt) * levels).floor()
    return (torch.minimum(kept.clamp(min=0), levels - 1) / levels).to(inpt.dtype)


def solarize(inpt: Tensor, threshold: Number) -> Tensor:
    op = "solarize"
    batched(op, inpt)
    least = _per_sample(op, "threshold", threshold, inpt, high=_most(inpt))
    if inpt.dtype == torch.uint8:
        # inpt >= least, which torch does byte by byte where it repeats `least`.
        at_least = torch.maximum(inpt, least.float().ceil().clamp(min=0).to(torch.uint8)) == inpt
        return inpt ^ at_least.to(torch.uint8).mul_(255)  # 255 - p is p with every bit turned
    least = least.to(inpt.dtype)  # torch compares with a Python number so.
    return torch.where(inpt >= least, _most(inpt) - inpt, inpt)


def autocontrast(inpt: Tensor) -> Tensor:
    batched("autocontrast", inpt)
    if not inpt.numel():
        return inpt.clone()
    image = _wide(inpt)
    low, high = image.amin((-2, -1), keepdim=True), image.amax((-2, -1), keepdim=True)
    flat = low == high
    scale = torch.where(flat, 1.0, (high - low) * (1 / _most(inpt)))
    return narrowed(((image - torch.where(flat, 0.0, low)) / scale).clamp(0, _most(inpt)), inpt.dtype)


def equalize(inpt: Tensor) -> Tensor:
    op = "equalize"
    batched(op, inpt)
    if wants_derivative(inpt):
        raise ValueError(f"{op}: its levels have no gradient; give it inpt.detach()")
    if not inpt.numel():
        return inpt.clone()
    image = inpt if inpt.dtype == torch.uint8 else (_wide(inpt) * (256 - 1e-3)).to(torch.uint8)
    levels = image.flatten(-2).long()
    histogram = torch.zeros(*levels.shape[:-1], 256, dtype=torch.int64, device=inpt.device)
    histogram.scatter_add_(-1, levels, histogram.new_ones(()).expand(levels.shape))
    below = histogram.cumsum(-1) - histogram
    in_highest = histogram.gather(-1, levels.amax(-1, keepdim=True))
    step = (levels.shape[-1] - in_highest) // 255
    table = ((below + step // 2) // step.clamp(min=1)).clamp(0, 255)
    table = torch.where(step == 0, torch.arange(256, device=inpt.device), table).to(torch.uint8)
    spread = table.gather(-1, levels).view(image.shape)
    if inpt.dtype != torch.uint8:
        spread = (spread.to(arithmetic_dtype(inpt)) / 255).to(inpt.dtype)
    return laid_out(spread, inpt)


def adjust_sharpness(inpt: Tensor, sharpness_factor: Number) -> Tensor:
    op = "adjust_sharpness"
    batched(op, inpt)
    factor = _per_sample(op, "sharpness_factor", sharpness_factor, inpt, low=0)
    if min(inpt.shape[-2:]) < 3 or not inpt.numel():
        return inpt.clone()
    is_bytes = inpt.dtype == torch.uint8
    image = inpt.to(torch.int16) if is_bytes else _wide(inpt)  # which sums of 13 bytes fit into
    height, width = image.shape[-2:]
    rows = [image[..., i : height - 2 + i, :] for i in range(3)]
    three = rows[0] + rows[1] + rows[2]
    nine = three[..., : width - 2] + three[..., 1 : width - 1] + three[..., 2:]
    inner = image[..., 1:-1, 1:-1]
    smooth = nine + 4 * inner
    if is_bytes:  # in float32, whatever torch's default dtype is
        smooth, inner = smooth.float().div_(13).round_(), inner.float()
    else:
        smooth = smooth / 13
    sharp = inpt.clone()
    inside = _blended(inner, smooth - inner, 1 - factor, inpt).clamp(0, _most(inpt))
    sharp[..., 1:-1, 1:-1] = narrowed(inside, inpt.dtype)
    return sharp if is_bytes else sharp.clamp(0, 1)


def _blended(pixels: Tensor, change: Tensor, weight: Tensor, like: Tensor) -> Tensor:
    """pixels + weight * change. Bytes are cut off after it, so that the last bit decides about a level: they
    are added by the operator that torchvision adds them by, which takes one weight at a time.
    """
    lookable = may_look(like)
    if like.dtype != torch.uint8 or not lookable:
        return pixels + weight.to(pixels.dtype) * change
    result, flat = pixels.clone(), change.reshape(-1, *change.shape[-3:])
    parts = result.view(flat.shape)
    for i, alpha in enumerate(weight.expand(*pixels.shape[:-3], 1, 1, 1).reshape(-1).tolist()):
        parts[i].add_(flat[i], alpha=alpha)
    return result


@on_parts
@of_images
def rgb_to_grayscale(inpt: Tensor, num_output_channels: int = 1) -> Tensor:
    """grey = 0.2989 r + 0.587 g + 0.114 b of images of 3 channels, in 1 or 3 channels, rounded down for
    uint8. Images of 1 channel are grey already.

    Raises:
        ValueError: images of another number of channels, a num_output_channels other than 1 and 3.
    """
    op = "rgb_to_grayscale"
    batched(op, inpt)
    channels = inpt.shape[-3]
    if channels not in (1, 3):
        raise ValueError(f"{op}: images must have 1 or 3 channels, got {channels}")
    if num_output_channels not in (1, 3):
        raise ValueError(f"{op}: num_output_channels must be 1 or 3, got {num_output_channels}")
    grey = inpt.clone()
    if channels == 3:
        r, g, b = _wide(inpt).unbind(-3)
        grey = narrowed(0.2989 * r + 0.587 * g + 0.114 * b, inpt.dtype).unsqueeze(-3)
    if num_output_channels == 3:
        grey = grey.expand(*grey.shape[:-3], 3, *grey.shape[-2:]).contiguous()
    return laid_out(grey, inpt)
