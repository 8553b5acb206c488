"""The operators of augmentation in plain torch: what they compute, readable from top to bottom.

They take the arguments and give the results of the compiled operators, and stand in for them on a device
without a kernel. They are what the tests compare the kernels with, in float64. Of output pixel (x, y) of a
sample, in this order:

    geometry    the image at M (x, y, 1), M the sample's inverse matrix, pixel centres at whole numbers
    brightness  p <- clamp(f p)
    contrast    p <- clamp(f p + (1 - f) m), m the mean of grey over the whole output image at this point
    saturation  p <- clamp(f p + (1 - f) grey), grey = 0.2989 r + 0.587 g + 0.114 b
    hue         h <- h + f turns of the colour wheel, s and v stay
    blur        separable, the border reflected without repeating the edge
    normalise   p <- scale p + shift
    erase       p <- a constant inside a box

Pixels lie in [0, 1], or in [0, 255] for uint8. Arithmetic is float32 (float64 for float64) and is rounded
once, at the end; only where the result is uint8 each step rounds, as torchvision's step of the same name.
Nothing waits for the device: a sample whose matrix or window is unusable becomes NaN, or 0 in uint8, as on a
GPU.

One result differs from the kernels': with antialias, a pixel that is not finite spoils its whole line and
column, because the filter is a product of matrices here.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from .._transforms import is_hidden
from ._plain_draw import STEPS, number_dtype

Interpolation = Literal["nearest", "bilinear", "bicubic"]
Padding = Literal["zeros", "border", "reflect", "fill"]
INTERPOLATIONS: tuple[Interpolation, ...] = get_args(Interpolation)  # in the order of the kernels' enums
PADDINGS: tuple[Padding, ...] = get_args(Padding)

_FRACTION = 0xFFFFFFFF
_ONE = 1 << 32  # a pixel, in the units of coordinates
_FARTHEST = 2.0**30  # coordinates of that many pixels and more are an error
# torchvision's way from [0, 1] to bytes: the last 256th is 255. In float32, as the kernels have it.
_STRETCH = (torch.tensor(255.999, dtype=torch.float32, device="cpu") / 255).item()


# ---- geometry


def _reaches(matrices: Tensor, width: int, height: int) -> Tensor:
    """(B,): whether every output pixel lies less than 2^30 pixels away; not if a number is NaN.

    A row counts as 16 pixels at least, as in the kernels.
    """
    across, down, start = matrices.abs().unbind(2)
    return (across * max(width, 16) + down * height + start < _FARTHEST).all(1)


def _pad(i: Tensor, n: Tensor, padding: int) -> tuple[Tensor, Tensor]:
    """(the pixel that stands for pixel i of a line of n, whether there is one)."""
    if PADDINGS[padding] == "reflect":
        i = i % (2 * n)
        i = torch.minimum(i, 2 * n - 1 - i)
    pixel = torch.minimum(i.clamp(min=0), n - 1)
    there = pixel == i if PADDINGS[padding] in ("zeros", "fill") else torch.ones_like(i, dtype=torch.bool)
    return pixel, there


def _taps(coordinate: Tensor, n: Tensor, interpolation: int, padding: int, dtype: torch.dtype) -> list:
    """The (pixel, whether it is there, weight) along one axis that a coordinate takes its value from.

    Coordinates are int64 in units of 2^-32 pixels, exact under addition, so that they are the kernels'.
    """
    whole, t = coordinate >> 32, (coordinate & _FRACTION).to(dtype) * 2.0**-32
    if INTERPOLATIONS[interpolation] == "nearest":
        taps = [(whole, torch.ones_like(t))]
    elif INTERPOLATIONS[interpolation] == "bilinear":
        taps = [(whole, 1 - t), (whole + 1, t)]
    else:  # Keys 1981 with a = -0.75, as torch's grid_sample
        near = lambda x: (1.25 * x - 2.25) * x * x + 1  # noqa: E731
        far = lambda x: ((-0.75 * x + 3.75) * x - 6) * x + 3  # noqa: E731
        weights = (far(t + 1), near(t), near(1 - t), far(2 - t))
        taps = [(whole + k - 1, weight) for k, weight in enumerate(weights)]
    return [(*_pad(pixel, n.view(-1, 1, 1), padding), weight) for pixel, weight in taps]


def _nearest(matrices: Tensor, windows: Tensor, size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """(2, B, *size) int64: the nearest pixel along x and y, by the arithmetic of torch's grid_sample on the
    grid of torchvision's affine, both in `dtype`: coordinates are in halves of the source's side, from its
    middle. Of two pixels that are equally near, or nearly so, their rounding decides.
    """
    n = windows[:, 2:].flip(1).to(matrices.dtype)
    across, down = size[1] - 1, size[0] - 1
    shift = matrices[:, :, 2] - 0.5 * (n - 1) + 0.5 * (matrices[:, :, 0] * across + matrices[:, :, 1] * down)
    half = (0.5 * n).to(dtype)
    rows = torch.cat([matrices[:, :, :2], shift[:, :, None]], 2).to(dtype) / half[:, :, None]
    x = torch.arange(size[1], device=n.device, dtype=dtype) - 0.5 * across
    y = torch.arange(size[0], device=n.device, dtype=dtype)[:, None] - 0.5 * down
    a, b, c, half = (v[:, :, None, None] for v in (*rows.unbind(2), half))
    return nearest_pixel(x * a + y * b + c, half).transpose(0, 1)


def nearest_pixel(grid: Tensor, half: Tensor | float) -> Tensor:
    """int64: the pixel at a place in [-1, 1] of a line of 2 * half, by the arithmetic of torch's
    grid_sample."""
    return ((grid + 1) * half - 0.5).round().clamp(-_FARTHEST, _FARTHEST).long()


def _resample(images, matrices, windows, fill, size, interpolation, padding) -> Tensor:
    """(B, C, *size): windows (top, left, height, width) of the images at the matrices' source points.

    A neighbour of weight 0 is not read, so that a NaN stays where it is when whole pixels move.
    """
    m = (matrices * _ONE).round().to(torch.int64)[:, :, :, None, None]
    rows = torch.arange(size[0], device=images.device)[:, None]
    columns = torch.arange(size[1], device=images.device)
    u, v = (m[:, axis, 0] * columns + m[:, axis, 1] * rows + m[:, axis, 2] for axis in (0, 1))
    if INTERPOLATIONS[interpolation] == "nearest":
        (a, b, c), (d, e, f) = (row.unbind(1) for row in m.unbind(1))
        straight = (a.abs() == _ONE) & (b == 0) & (d == 0) & (e.abs() == _ONE)
        straight = straight & (c % _ONE == 0) & (f % _ONE == 0)  # output pixels are source pixels
        pixels = _nearest(matrices, windows, size, images.dtype)
        u, v = torch.where(straight, torch.stack([u, v]), pixels << 32)
    top, left, height, width = windows.unbind(1)
    value = images.new_zeros(())
    inside = images.new_zeros(())
    complete = torch.ones_like(u, dtype=torch.bool)
    for line, line_there, line_weight in _taps(v, height, interpolation, padding, images.dtype):
        for column, column_there, column_weight in _taps(u, width, interpolation, padding, images.dtype):
            at = (top.view(-1, 1, 1) + line) * images.shape[3] + left.view(-1, 1, 1) + column
            pixel = images.flatten(2).gather(2, at.flatten(1)[:, None].expand(-1, images.shape[1], -1))
            pixel = pixel.unflatten(2, size)
            there = line_there & column_there
            weight = torch.where(there, line_weight * column_weight, 0.0)
            value = value + torch.where((weight != 0)[:, None], weight[:, None] * pixel, 0.0)
            inside = inside + weight
            complete = complete & there
    if PADDINGS[padding] != "fill":
        return value
    # torchvision weighs a fill value so: what lies inside counts for the image twice.
    blend = inside[:, None] * (value - fill) + fill
    return torch.where((complete | (inside == 1))[:, None], value, blend)


def _filter(start, step, first, n, grid, pixels, interpolation, padding, dtype) -> tuple[Tensor, Tensor]:
    """((B, grid, pixels) weights along one axis, (B, grid) whether there are any), as torch's
    interpolate(antialias=True) has them: a triangle, or Keys' cubic with a = -0.5, as wide as the step, cut
    off at the edges of the window of n pixels from `first` on, and brought to sum 1.
    """
    start, step = ((v * _ONE).round().to(torch.int64).view(-1, 1, 1) for v in (start, step))
    first, n = first.view(-1, 1, 1), n.view(-1, 1, 1)
    length = n << 32
    centre = start + step * torch.arange(grid, device=n.device)[:, None] + _ONE // 2  # from the window's edge
    there = (centre >= 0) & (centre <= length)
    if PADDINGS[padding] == "reflect":
        centre = centre.abs() % (2 * length)
        centre = torch.minimum(centre, 2 * length - centre)
    if PADDINGS[padding] in ("border", "reflect"):
        there = torch.ones_like(there)
    centre = torch.minimum(centre.clamp(min=0), length)
    j = torch.arange(pixels, device=n.device) - first
    x = ((j << 32) + _ONE // 2 - centre).abs().to(dtype) / step.abs().clamp(_ONE, 1 << 60).to(dtype)
    if INTERPOLATIONS[interpolation] == "bilinear":
        weight = (1 - x).clamp(min=0)
    else:
        near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
        weight = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
    weight = torch.where((j >= 0) & (j < n), weight, 0.0)
    return weight / weight.sum(2, keepdim=True), there.squeeze(2)


def _shrunk(images, m, windows, fill, size, interpolation, padding) -> tuple[Tensor, Tensor]:
    """(whether a sample shrinks so that it needs a filter (B,), the result of those that do).

    First comes the image on a coarser grid, every pixel of which is a weighted mean, then the resampling from
    there. Where the geometry only shrinks, the grid is the output's and nothing is left to resample; with a
    rotation or shear it has a pixel for each step of more than 2 pixels, else those of the image.
    """
    top, left, height, width = windows.unbind(1)
    extent = torch.stack([width, height], 1)  # along x, y
    shrinks = (m[:, :, 0] ** 2 + m[:, :, 1] ** 2).sqrt()
    straight = ((m[:, 0, 1] == 0) & (m[:, 1, 0] == 0))[:, None]
    # torch's cubic is another one with antialiasing, whether it shrinks or not.
    least = torch.where(straight, 0.0 if INTERPOLATIONS[interpolation] == "bicubic" else 1.0, 2.0)
    on = (shrinks > least).any(1)

    coarse = torch.where(shrinks > 2, (extent / shrinks.clamp(min=2)).ceil().long(), extent)
    out = torch.stack([torch.full_like(width, size[1]), torch.full_like(width, size[0])], 1)
    count = torch.where(straight, out, coarse)
    step = torch.where(straight, torch.stack([m[:, 0, 0], m[:, 1, 1]], 1), extent.to(m.dtype) / count)
    start = torch.where(straight, m[:, :, 2], 0.5 * step - 0.5)
    identity, half = torch.eye(2, 3, dtype=m.dtype, device=m.device), m.new_zeros(3)
    half[2] = 0.5
    rest = torch.where(straight[:, :, None], identity, (m + half) / step[:, :, None] - half)
    on = on & _reaches(rest, size[1], size[0])
    rest = torch.where(on[:, None, None], rest, identity)

    # The grid's size is not known on the host, but it is at most this.
    grid = [max(image, output) for image, output in zip(images.shape[2:], size, strict=True)]
    along = (interpolation, padding, images.dtype)
    columns, across = _filter(start[:, 0], step[:, 0], left, width, grid[1], images.shape[3], *along)
    lines, down = _filter(start[:, 1], step[:, 1], top, height, grid[0], images.shape[2], *along)
    means = lines[:, None] @ images @ columns[:, None].transpose(2, 3)
    outside = fill if PADDINGS[padding] == "fill" else torch.zeros_like(fill)
    means = torch.where((down[:, :, None] & across[:, None])[:, None], means, outside)
    grid_windows = torch.stack([torch.zeros_like(top), torch.zeros_like(top), count[:, 1], count[:, 0]], 1)
    return on, _resample(means, rest, grid_windows, fill, size, interpolation, padding)


def _geometry(images, matrices, windows, fill, size, interpolation, padding, antialias) -> Tensor:
    batch, _, height, width = images.shape
    whole = torch.stack(
        [torch.full((batch,), v, dtype=torch.int64, device=images.device) for v in (0, 0, height, width)], 1
    )
    good = torch.ones(batch, dtype=torch.bool, device=images.device)
    if windows is None:
        windows = whole
    else:
        top, left, h, w = windows.unbind(1)
        good = (top >= 0) & (left >= 0) & (h > 0) & (w > 0) & (h <= height - top) & (w <= width - left)
        windows = torch.where(good[:, None], windows, whole)
    identity = torch.eye(2, 3, dtype=number_dtype(images.device), device=images.device).expand(batch, 2, 3)
    matrices = identity if matrices is None else matrices.view(batch, 2, 3)
    good = good & _reaches(matrices, size[1], size[0])
    matrices = torch.where(good[:, None, None], matrices, identity)
    result = _resample(images, matrices, windows, fill, size, interpolation, padding)
    if antialias and INTERPOLATIONS[interpolation] != "nearest":
        on, filtered = _shrunk(images, matrices, windows, fill, size, interpolation, padding)
        result = torch.where(on.view(-1, 1, 1, 1), filtered, result)
    return torch.where(good.view(-1, 1, 1, 1), result, math.nan)


# ---- colour, blur


def _grey(images: Tensor, quantise: bool) -> Tensor:
    if images.shape[1] == 1:
        return images
    r, g, b = images.unbind(1)
    grey = (r * 0.2989 + g * 0.587 + b * 0.114)[:, None]
    return grey.floor() if quantise else grey


def _hue(images: Tensor, turns: Tensor, quantise: bool) -> Tensor:
    """The colour wheel in units of a sixth. Of a channel n sixths away (5 for red, 3 for green, 1 for blue),
    with k = n + h mod 6: v - (v - min) max(0, min(k, 4 - k, 1)), which is hsv_to_rgb without its six cases.
    """
    r, g, b = images.unbind(1)
    largest = images.amax(1)
    spread = largest - images.amin(1)
    unit = 1 / torch.where(spread > 0, spread, 1.0)
    h = torch.where(
        largest == r, (g - b) * unit, torch.where(largest == g, (b - r) * unit + 2, (r - g) * unit + 4)
    )
    h = (h + 6 * turns.squeeze(1)) % 6
    channels = []
    for n in (5, 3, 1):
        k = (n + h) % 6
        channels.append(largest - spread * torch.minimum(k, 4 - k).clamp(0, 1))
    result = torch.stack(channels, 1)
    return (result * _STRETCH).floor() if quantise else result


def _colour(images: Tensor, colour: Tensor, steps: int, bound: float, quantise: bool) -> Tensor:
    factors = colour.view(-1, 4, 1, 1, 1)
    brightness, contrast, saturation, hue = factors.to(images.dtype).unbind(1)
    rests = (1 - factors).to(images.dtype)  # of what is blended in

    def clamped(pixels: Tensor) -> Tensor:
        pixels = pixels.clamp(0, bound)
        return pixels.floor() if quantise else pixels

    if steps & STEPS["brightness"]:
        images = clamped(images * brightness)
    if steps & STEPS["contrast"]:
        mean = _grey(images, quantise).mean((1, 2, 3), keepdim=True, dtype=number_dtype(images.device))
        images = clamped(images * contrast + rests[:, 1] * mean.to(images.dtype))
    if steps & STEPS["saturation"] and images.shape[1] == 3:
        images = clamped(images * saturation + rests[:, 2] * _grey(images, quantise))
    if steps & STEPS["hue"] and images.shape[1] == 3:
        images = _hue(images, hue, quantise)
    return images


def _blur_columns(images: Tensor, weight: Tensor) -> Tensor:
    """Along the last dimension, by weights (B, kernel)."""
    n, kernel = images.shape[-1], weight.shape[1]
    period = max(2 * (n - 1), 1)
    at = torch.arange(-(kernel // 2), n + kernel // 2, device=images.device) % period
    at = torch.where(at < n, at, period - at)  # reflected about the edge pixels' centres
    result = torch.zeros_like(images)
    for k in range(kernel):
        result = result + weight[:, k].view(-1, 1, 1, 1) * images[..., at[k : k + n]]
    return result


# ---- the operator


def _check(images, grad, matrices, height, width, colour_steps, normalise, dtype) -> None:
    """What the public functions have not checked; the texts are the compiled operators'."""
    op = "augment"
    double, bytes_out = torch.float64 in (images.dtype, dtype), dtype == torch.uint8
    if (double and images.dtype != dtype) or (bytes_out and (images.dtype != torch.uint8 or normalise)):
        raise ValueError(f"{op}: images of {images.dtype} cannot become {dtype}; convert them first")
    if colour_steps & ~STEPS["brightness"] and images.shape[1] not in (1, 3):
        raise ValueError(
            f"{op}: contrast, saturation and hue take images of 1 or 3 channels, got {images.shape[1]}"
        )
    if matrices is None and (height, width) != tuple(images.shape[2:]):
        raise ValueError(f"{op}: without matrices the size is that of images")
    if grad is None:
        if images.shape[2:].numel() == 0 and images.shape[:2].numel() * height * width > 0:
            raise ValueError(f"{op}: images have no pixels, got {tuple(images.shape)}")
    elif images.dtype == torch.uint8:
        raise ValueError(f"{op}: images of uint8 have no gradient")
    elif colour_steps & STEPS["hue"] and images.shape[1] == 3:
        raise ValueError(f"{op}: hue has no gradient; leave hue out, or call it under torch.no_grad()")


def is_last(images: Tensor) -> bool:
    """Whether images (B, C, H, W) lie in memory with their channels last."""
    return not images.is_contiguous() and images.is_contiguous(memory_format=torch.channels_last)


def picked(images: Tensor, at: Tensor) -> Tensor:
    """images[at] of a batch, in its memory format: one copy for each sample, where torch's indexing goes from
    pixel to pixel.
    """
    if is_hidden() or not is_last(images):
        return images.index_select(0, at)
    return images.permute(0, 2, 3, 1).index_select(0, at).permute(0, 3, 1, 2)


def like_images(images: Tensor, height: int, width: int, dtype: torch.dtype) -> Tensor:
    """An empty batch (B, C, height, width) in the images' memory format."""
    layout = torch.channels_last if is_last(images) else torch.contiguous_format
    return torch.empty(
        (*images.shape[:2], height, width), dtype=dtype, device=images.device, memory_format=layout
    )


def augment(
    images: Tensor, matrices: Tensor | None, colour: Tensor | None, blur: Tensor | None, boxes: Tensor | None,
    windows: Tensor | None, constants: list[float], height: int, width: int, blur_width: int,
    blur_height: int, colour_steps: int, interpolation: int, padding: int, antialias: bool, normalise: bool,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """(B, C, height, width) of `dtype`, in the images' memory format, of images (B, C, H, W).

    `matrices` (B, 2, 3), `colour` (B, 4) and `blur` (B, blur_width + blur_height) are float64, `boxes` and
    `windows` (B, 4) of (top, left, height, width) int64; None for a step that is off. `constants` are fill,
    erased value, scale and shift of each channel, in this order; `colour_steps` is a sum of `STEPS`;
    `interpolation` and `padding` count `INTERPOLATIONS` and `PADDINGS`.
    """
    _check(images, None, matrices, height, width, colour_steps, normalise, dtype)
    output = like_images(images, height, width, dtype)
    if output.numel() == 0:
        return output
    wide = torch.float64 if images.dtype == torch.float64 else torch.float32
    bound, quantise = 255.0 if images.dtype == torch.uint8 else 1.0, dtype == torch.uint8
    per_channel = torch.tensor(constants, dtype=wide, device=images.device).view(4, -1, 1, 1)
    fill, erased, scale, shift = per_channel.unbind(0)
    x = images.to(wide)
    if matrices is not None or windows is not None:
        x = _geometry(x, matrices, windows, fill, (height, width), interpolation, padding, antialias)
        x = x.round().clamp(0, bound) if quantise else x
    if colour is not None and colour_steps:
        x = _colour(x, colour, colour_steps, bound, quantise)
    if blur is not None:
        x = _blur_columns(x, blur[:, :blur_width].to(wide))
        x = _blur_columns(x.transpose(2, 3), blur[:, blur_width:].to(wide)).transpose(2, 3)
        x = x.round().clamp(0, bound) if quantise else x
    if normalise:
        x = x * scale + shift
    if boxes is not None:
        top, left, box_height, box_width = boxes.view(-1, 4, 1, 1, 1).unbind(1)
        row = torch.arange(height, device=x.device)[:, None]
        column = torch.arange(width, device=x.device)
        inside = (row >= top) & (row - top < box_height) & (column >= left) & (column - left < box_width)
        x = torch.where(inside, erased, x)
    if quantise:
        x = x.nan_to_num(0.0)
    layout = torch.contiguous_format if output.is_contiguous() else torch.channels_last
    return x.to(dtype).contiguous(memory_format=layout)


def augment_backward(
    grad: Tensor, images: Tensor, matrices: Tensor | None, colour: Tensor | None, blur: Tensor | None,
    boxes: Tensor | None, windows: Tensor | None, constants: list[float], height: int, width: int,
    blur_width: int, blur_height: int, colour_steps: int, interpolation: int, padding: int, antialias: bool,
    normalise: bool, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The gradient with respect to the images, of their shape, dtype and memory format; `grad` is like the
    output of `augment`, of which the other arguments are.
    """
    _check(images, grad, matrices, height, width, colour_steps, normalise, dtype)
    result = like_images(images, images.shape[2], images.shape[3], images.dtype)
    if images.numel() == 0 or grad.numel() == 0:
        return result.zero_()
    with torch.enable_grad():
        leaf = images.detach().requires_grad_()
        output = augment(
            leaf, matrices, colour, blur, boxes, windows, constants, height, width, blur_width, blur_height,
            colour_steps, interpolation, padding, antialias, normalise, dtype,
        )  # fmt: skip
    (gradient,) = torch.autograd.grad(output, leaf, grad)
    return result.copy_(gradient)
