"""What each sample of a batch draws, and the tables that the operator `augment` takes of it, in plain torch.

Numbers are uniform in intervals, by a counter-based generator of (seed, global index of the sample); boxes
are torchvision's RandomResizedCrop and RandomErasing; the matrix is torchvision's affine, then crop, stretch
and flips. csrc/augment/augment_draw.h has the same as kernels: the same words, and the same numbers to the
last bits of exp, cos, sin and tan.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._seeds import Purpose, philox4x32

# Columns of the table of parameters, as ParamColumn in csrc/augment/augment_draw.h.
COLUMNS = (
    "hflip", "vflip", "stretch", "scale", "angle", "translate_x", "translate_y", "shear_x", "shear_y",
    "crop_top", "crop_left", "crop_height", "crop_width",
    "brightness", "contrast", "saturation", "hue", "sigma",
    "erase_top", "erase_left", "erase_height", "erase_width",
)  # fmt: skip
STEPS = {"brightness": 1, "contrast": 2, "saturation": 4, "hue": 8}

_WORD = 0xFFFFFFFF


def number_dtype(device: torch.device) -> torch.dtype:
    """The dtype of tables of parameters: float64, or float32 on a device that has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def sample_words(seed: Tensor, samples: Tensor, draw: Tensor) -> Tensor:
    """The four words of each sample and draw, int64 in [0, 2^32), with a last dimension of 4.

    The words of a sample are those of the Philox group of its global index, by the key `seed`.
    """
    counter = (samples & _WORD, samples >> 32 & _WORD, draw, torch.full_like(draw, int(Purpose.AUGMENT)))
    words = philox4x32(counter, (seed & _WORD, seed >> 32 & _WORD))
    return torch.stack(torch.broadcast_tensors(*words), -1)


def augment_words(seed: Tensor, index: Tensor, first: int, count: int) -> Tensor:
    """(B, count, 4) int64: the words of the draws [first, first + count) of the samples `index` (B,)."""
    draws = torch.arange(first, first + count, device=index.device)
    return sample_words(seed.reshape(()).to(index.device), index[:, None], draws)


def _uniform(words: Tensor) -> Tensor:
    """Uniform in (0, 1), never an end."""
    return (words.to(number_dtype(words.device)) + 0.5) * 2.0**-32


def _draw_box(seed, index, draw, area, log_ratio, height, width, inside) -> tuple[Tensor, Tensor]:
    """(boxes (B, 4), whether one was found): of some share of the area and some ratio of width to height, the
    first of ten attempts that fits, as torchvision's RandomResizedCrop and RandomErasing draw it.
    """
    u = _uniform(sample_words(seed, index[:, None], draw + torch.arange(10, device=index.device)))
    size = height * width * (area[0] + (area[1] - area[0]) * u[..., 0])
    ratio = (log_ratio[0] + (log_ratio[1] - log_ratio[0]) * u[..., 1]).exp()
    h, w = (size / ratio).sqrt().round(), (size * ratio).sqrt().round()
    fits = (w <= width) & (h <= height) if inside else (w < width) & (h < height)
    fits = fits & (w >= 1) & (h >= 1)
    top, left = ((height - h + 1) * u[..., 2]).floor(), ((width - w + 1) * u[..., 3]).floor()
    boxes = torch.stack([top, left, h, w], -1)
    first = fits.long().argmax(1)
    return boxes.gather(1, first[:, None, None].expand(-1, 1, 4)).squeeze(1), fits.any(1)


def _draw_crop(seed, index, crop, crop_box, sizes, u_top, u_left) -> Tensor:
    """(B, 4): the whole image (crop 0), a box by its share of the area (1) or a window of the output's size
    (2).
    """
    height, width, out_height, out_width = sizes
    box = torch.stack([torch.full_like(u_top, v) for v in (0, 0, height, width)], 1)
    if crop == 1:
        # torchvision's way out is the largest box in the middle whose ratio is allowed.
        least, most = math.exp(crop_box[2]), math.exp(crop_box[3])
        h = float(round(width / least)) if width / height < least else float(height)
        w = float(round(height * most)) if width / height > most else float(width)
        middle = (math.floor((height - h) / 2), math.floor((width - w) / 2), h, w)
        box = torch.stack([torch.full_like(u_top, v) for v in middle], 1)
        drawn, found = _draw_box(seed, index, 16, crop_box[:2], crop_box[2:4], height, width, True)
        box = torch.where(found[:, None], drawn, box)
    if crop == 2:
        padding = crop_box[4]
        box[:, 0] = ((height + 2 * padding - out_height + 1) * u_top).floor() - padding
        box[:, 1] = ((width + 2 * padding - out_width + 1) * u_left).floor() - padding
        box[:, 2], box[:, 3] = out_height, out_width
    return box


def augment_draw(
    images: Tensor, seed: Tensor, offset: int, batch: int, chances: list[float], low: list[float],
    high: list[float], crop: int, crop_box: list[float], erase_box: list[float], sizes: list[int],
    blur_width: int, blur_height: int, index: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(table (B, 22), matrices (B, 2, 3), colour (B, 4), blur (B, width + height), boxes (B, 4)): what the
    samples from number `offset` on draw, or those of the numbers `index`, and what `augment` takes of it.

    `chances` are those of hflip, vflip and erase; `low` and `high` the ends of each column; `crop_box` the
    crop's area, logarithm of the ratio and padding; `erase_box` the erased area and logarithm of the ratio;
    `sizes` the height and width of the image and of the output.
    """
    device, dtype = images.device, number_dtype(images.device)
    if seed.dtype != torch.int64 or seed.numel() != 1:
        raise ValueError(
            f"augment: seed must be one int64, got {seed.dtype} of shape {tuple(seed.shape)}; draw it with "
            f"torch.randint(-2**63, 2**63 - 1, (1,))"
        )
    seed = seed.reshape(()).to(device)
    if index is None:
        index = offset + torch.arange(batch, device=device)
    u = _uniform(sample_words(seed, index[:, None], torch.arange(5, device=device))).flatten(1)
    # Each column has a word of its own, so that what it draws does not depend on the other steps.
    count = COLUMNS.index("erase_top")
    first, last = (torch.tensor(ends[:count], dtype=dtype, device=device) for ends in (low, high))
    columns = dict(zip(COLUMNS, (first + (last - first) * u[:, :count]).unbind(1), strict=False))
    word = dict(zip(COLUMNS, u.unbind(1), strict=False))
    for name, chance in zip(("hflip", "vflip"), chances, strict=False):
        columns[name] = (word[name] < chance).to(dtype)
    for name in ("translate_x", "translate_y"):
        columns[name] = columns[name].round()  # whole pixels, as torchvision's RandomAffine
    crops = _draw_crop(seed, index, crop, crop_box, sizes, word["crop_top"], word["crop_left"])
    erased, found = _draw_box(seed, index, 32, erase_box[:2], erase_box[2:], sizes[2], sizes[3], False)
    # The words of the crop's height and width are not used by the crop.
    erased = torch.where((found & (word["crop_height"] < chances[2]))[:, None], erased, 0.0)
    for name, column in zip(("top", "left", "height", "width"), range(4), strict=True):
        columns[f"crop_{name}"], columns[f"erase_{name}"] = crops[:, column], erased[:, column]
    table = torch.stack([columns[name] for name in COLUMNS], 1)
    translate, shear = (
        torch.stack([columns[f"{name}_x"], columns[f"{name}_y"]], 1) for name in ("translate", "shear")
    )
    hflip, vflip, stretch, scale, angle = (columns[name] for name in COLUMNS[:5])
    in_height, in_width, out_height, out_width = sizes
    matrices = augment_matrices(
        table, hflip, vflip, stretch, scale, angle, translate, shear, crops, in_height, in_width, out_height,
        out_width,
    )  # fmt: skip
    colour = torch.stack([columns[name] for name in STEPS], 1)
    blur = augment_gaussian(columns["sigma"], columns["sigma"], blur_width, blur_height)
    return table, matrices, colour, blur, erased.to(torch.int64)


def augment_matrices(
    like: Tensor, hflip: Tensor | None, vflip: Tensor | None, stretch: Tensor | None, scale: Tensor | None,
    angle: Tensor | None, translate: Tensor | None, shear: Tensor | None, crop: Tensor | None,
    in_height: int, in_width: int, out_height: int, out_width: int,
) -> Tensor:  # fmt: skip
    """(B, 2, 3) inverse matrices of B samples, as many as `like` has: from an output pixel through crop, then
    C S^-1 R^-1 ... C^-1 about the centre of the image (torchvision's affine), then stretch and flips, to the
    source. None is neutral.
    """
    zero = torch.zeros(like.shape[0], dtype=number_dtype(like.device), device=like.device)
    one = zero + 1
    stretch, scale = (one if v is None else v for v in (stretch, scale))
    angle = zero if angle is None else angle * (math.pi / 180)
    shift_x, shift_y = (zero, zero) if translate is None else translate.unbind(1)
    slant_x, slant_y = (zero, zero) if shear is None else (shear * (math.pi / 180)).tan().unbind(1)
    whole = (zero, zero, zero + in_height, zero + in_width)
    top, left, height, width = whole if crop is None else crop.unbind(1)
    mirror_x, mirror_y = (one if v is None else torch.where(v != 0, -one, one) for v in (hflip, vflip))

    a = angle.cos() + angle.sin() * slant_y  # cos(angle - shear_y) / cos(shear_y)
    b = -(a * slant_x + angle.sin())
    c = angle.sin() - angle.cos() * slant_y  # sin(angle - shear_y) / cos(shear_y)
    d = angle.cos() - c * slant_x
    m00, m01 = d / scale * mirror_x, -b / scale * mirror_x
    m10, m11 = -c / scale / stretch * mirror_y, a / scale / stretch * mirror_y
    # Output pixel x lies at step_x x + start_x of the image before it was cropped, seen from its centre.
    centre_x, centre_y = 0.5 * (in_width - 1), 0.5 * (in_height - 1)
    step_x, step_y = width / out_width, height / out_height
    start_x = left + 0.5 * step_x - 0.5 - centre_x - shift_x
    start_y = top + 0.5 * step_y - 0.5 - centre_y - shift_y
    rows = (
        (m00 * step_x, m01 * step_y, m00 * start_x + m01 * start_y + centre_x),
        (m10 * step_x, m11 * step_y, m10 * start_x + m11 * start_y + centre_y),
    )
    return torch.stack([torch.stack(row, 1) for row in rows], 1)


def augment_gaussian(sigma_x: Tensor, sigma_y: Tensor, width: int, height: int) -> Tensor:
    """(B, width + height): the weights of a blur along x, then along y: exp(-x^2 / (2 sigma^2)) at whole
    numbers around 0, brought to sum 1; all on the middle where sigma is 0.
    """
    parts = []
    for sigma, size in ((sigma_x, width), (sigma_y, height)):
        x = torch.arange(size, device=sigma.device) - size // 2
        weight = (-0.5 * (x / sigma[:, None].clamp(min=1e-8)) ** 2).exp()
        weight = torch.where(x == 0, 1.0, torch.where(sigma[:, None] > 0, weight, 0.0))
        parts.append(weight / weight.sum(1, keepdim=True))
    return torch.cat(parts, 1)
