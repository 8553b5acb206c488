"""Where a pass takes pixels, points and boxes: one matrix for each sample, seen from three sides.

Coordinates of boxes and points are those of torchvision: x to the right and y downwards from the upper left
corner of the image, in which pixel i of a line reaches from i to i + 1 and its centre lies at i + 0.5.
torchvision mirrors key points about the centres of pixels, as if they lay at whole numbers, and boxes about
their edges; so does this.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._transforms import is_hidden, may_look, wants_derivative
from . import _op
from ._params import Params
from ._plain import Padding, is_last, nearest_pixel


@dataclasses.dataclass
class Geometry:
    """One resampling of B samples.

    `matrices` (B, 2, 3) are the images', from a pixel of the result to its place in the source, or None where
    nothing moves. `is_straight`: lines of the image stay lines of the result. Of what takes the nearest pixel
    flips come first, as a step of their own, because a half is not rounded to the same pixel from the other
    side: `unflipped` are the matrices of all that comes after them, and where lines stay lines those of what
    is between them and the crop.
    """

    in_size: tuple[int, int]
    out_size: tuple[int, int]
    matrices: Tensor | None
    hflip: Tensor | None = None
    vflip: Tensor | None = None
    crop: Tensor | None = None
    is_straight: bool = False
    unflipped: Tensor | None = None
    padding: Padding = "zeros"
    map: tuple[Tensor, Tensor] | None = None  # of boxes and points, where it is not that of the matrices

    @classmethod
    def of(cls, params: Params, height: int, width: int) -> Geometry:
        """What parameters do to images of (height, width)."""
        is_straight = params.angle is None and params.shear is None
        bare = dataclasses.replace(params, hflip=None, vflip=None)
        if is_straight:
            bare = dataclasses.replace(
                bare, crop=None, settings=dataclasses.replace(params.settings, size=None)
            )
        matrices, size = params.matrices(height, width), params.settings.size or (height, width)
        crop = params.crop
        if crop is None and size != (height, width) and matrices is not None:
            crop = _op.rows((0, 0, height, width), len(matrices), matrices.device)
        return cls(
            (height, width), size, matrices, params.hflip, params.vflip, crop, is_straight,
            bare.matrices(height, width) if params.moves() else None, params.settings.padding,
        )  # fmt: skip

    def crops_alone(self) -> bool:
        """Whether a crop and flips are all there is."""
        return self.is_straight and self.crop is not None and self.unflipped is None

    def takes_lines(self) -> bool:
        """Whether the nearest pixels are whole rows and columns, which are not those of the matrices."""
        return self.is_straight and (self.crop is not None or self.unflipped is not None)

    def ratios(self) -> tuple[Tensor, Tensor]:
        """(B,) float32 along x and y: by how much a crop is enlarged. They are of two numbers of float64, as
        torchvision's.
        """
        assert self.crop is not None
        sides = torch.tensor(self.out_size, dtype=self.crop.dtype, device=self.crop.device)
        return (sides[1] / self.crop[:, 3]).float(), (sides[0] / self.crop[:, 2]).float()

    def of_sample(self, i: int) -> Geometry:
        """What happens to sample i, without the others."""
        parts: dict[str, Any] = {
            name: None if (value := getattr(self, name)) is None else value[i : i + 1]
            for name in ("matrices", "hflip", "vflip", "crop", "unflipped")
        }
        return dataclasses.replace(self, **parts)

    def forward(self) -> tuple[Tensor, Tensor] | None:
        """((B, 2, 2), (B, 2)): x -> A x + t of a point of the source, in the coordinates of boxes."""
        if self.map is not None or self.matrices is None:
            return self.map
        linear = self.matrices[:, :, :2]
        shift = self.matrices[:, :, 2] + 0.5 - 0.5 * linear.sum(2)
        (a, b), (c, d) = (row.unbind(1) for row in linear.unbind(1))
        inverse = torch.stack([d, -b, -c, a], 1).view(-1, 2, 2) / (a * d - b * c).view(-1, 1, 1)
        return inverse, -(inverse * shift[:, None]).sum(2)


def after(first: tuple[Tensor, Tensor] | None, then: tuple[Tensor, Tensor] | None) -> Any:
    """The map of one map after another."""
    if first is None or then is None:
        return then if first is None else first
    linear, shift = then
    return (
        (linear[:, :, :, None] * first[0][:, None]).sum(2),
        (linear * first[1][:, None]).sum(2) + shift,
    )


def moved_points(points: Tensor, forward: tuple[Tensor, Tensor] | None) -> Tensor:
    """Points (B, ..., 2) at their places in the result."""
    if forward is None:
        return points
    # No product of matrices, because autocast and TF32 would round it.
    rows = (
        torch.cat([forward[0], forward[1][:, :, None]], 2)
        .to(points.dtype)
        .view(-1, *(1,) * (points.dim() - 2), 2, 3)
    )
    x, y = points[..., 0, None], points[..., 1, None]
    return x * rows[..., 0] + y * rows[..., 1] + rows[..., 2]


def moved_boxes(boxes: Tensor, forward: tuple[Tensor, Tensor] | None, is_straight: bool) -> Tensor:
    """The boxes (B, ..., 4) around the four moved corners of boxes, XYXY.

    Where lines stay lines a box whose ends are the wrong way round stays so, as in torchvision.
    """
    if forward is None:
        return boxes
    x1, y1, x2, y2 = boxes.unbind(-1)
    if is_straight:
        scale = torch.diagonal(forward[0], dim1=1, dim2=2).view(-1, *(1,) * (boxes.dim() - 2), 2)
        scale, shift = scale.to(boxes.dtype), forward[1].view(scale.shape).to(boxes.dtype)
        ends = [boxes[..., :2] * scale + shift, boxes[..., 2:] * scale + shift]
        turned = scale < 0
        return torch.cat([torch.where(turned, ends[1], ends[0]), torch.where(turned, ends[0], ends[1])], -1)
    corners = torch.stack([x1, y1, x2, y1, x2, y2, x1, y2], -1).unflatten(-1, (4, 2))
    corners = moved_points(corners, forward)
    return torch.cat([corners.amin(-2), corners.amax(-2)], -1)


# ---- the nearest pixel, of masks and of images


def _as_bytes(masks: Tensor) -> Tensor:
    """(M, H, W) of any dtype as images (M, bytes of an element, H, W) of uint8, in channels_last."""
    size = masks.element_size()
    flat = masks.contiguous().view(torch.uint8).unflatten(-1, (masks.shape[-1], size))
    return flat.permute(0, 3, 1, 2)


def _fill_bytes(fill: float, dtype: torch.dtype) -> list[float]:
    """The bytes of a number in a dtype."""
    if dtype in (torch.uint8, torch.bool):
        return [float(fill)]
    if dtype.is_floating_point:
        return [float(v) for v in torch.tensor([fill], dtype=dtype, device="cpu").view(torch.uint8).tolist()]
    size = dtype.itemsize
    return [float(int(fill) >> 8 * i & 255) for i in range(size)]


def _kernel_masks(masks: Tensor, matrices: Tensor, geometry: Geometry, fill: float | None) -> Tensor:
    """Masks (B, N, H, W) by the images' own operator: an element is so many channels of bytes."""
    count, channels, height, width = masks.shape
    padding: Padding = "fill" if fill else "zeros" if fill is not None else geometry.padding
    numbers = [0.0] if not fill else _fill_bytes(fill, masks.dtype)
    is_bytes = masks.element_size() == 1
    if is_bytes:
        images, numbers = masks.view(torch.uint8), numbers * channels
    else:
        images = _as_bytes(masks.reshape(-1, height, width))
        numbers = numbers if len(numbers) > 1 else numbers * masks.element_size()
        matrices = matrices.repeat_interleave(channels, 0)
    moved = _op.augment_batch(
        "augment", images, matrices=matrices, size=geometry.out_size, interpolation="nearest",
        padding=padding, fill=numbers,
    )  # fmt: skip
    if is_bytes:
        return moved.view(masks.dtype)
    whole = moved.permute(0, 2, 3, 1).contiguous().flatten(2).view(masks.dtype)
    return whole.view(count, channels, *geometry.out_size)


def _nudged(matrices: Tensor, geometry: Geometry) -> Tensor:
    """The matrices whose nearest pixel is the one that torch's nearest takes: of a crop that is resized it is
    pixel floor(x * step), which is not the one in the middle.
    """
    crop, size = geometry.crop, geometry.out_size
    if crop is None:
        return matrices
    step = torch.stack([crop[:, 3] / size[1], crop[:, 2] / size[0]], 1).to(matrices.dtype)
    nudge = torch.where(step == 1, 0.0, 2**-20 / step - 0.5)
    moved = matrices.clone()
    moved[:, :, 2] += (matrices[:, :, :2] * nudge[:, None]).sum(2)
    return moved


def _middle_row(geometry: Geometry, axis: int) -> Tensor | None:
    """(B, 3) of the part between flips and crop for x (0) or y (1), from the middle of the image in halves of
    its side, as torchvision makes its grid of them, in float32.
    """
    if geometry.unflipped is None:
        return None
    height, width = geometry.in_size
    m = geometry.unflipped[:, axis]
    middle, half = 0.5 * (width - 1, height - 1)[axis], 0.5 * (width, height)[axis]
    shift = m[:, 2] - middle + 0.5 * (m[:, 0] * (width - 1) + m[:, 1] * (height - 1))
    return torch.stack([m[:, 0], m[:, 1], shift], 1).float() / half


def _line(geometry: Geometry, axis: int) -> Tensor:
    """(B, pixels) int64: the pixel that stands for each of a line of the result, along x (0) or y (1): that
    of torchvision's steps one after the other, in the float32 in which torch computes it.
    """
    n, n_out = geometry.in_size[1 - axis], geometry.out_size[1 - axis]
    flip = (geometry.hflip, geometry.vflip)[axis]
    matrices = geometry.matrices
    assert matrices is not None
    pixel = torch.arange(n_out, device=matrices.device).expand(len(matrices), n_out)
    if geometry.crop is not None:
        start, extent = geometry.crop[:, 1 - axis], geometry.crop[:, 3 - axis]
        place = (pixel.float() * (extent.float() / n_out)[:, None]).floor()
        place = torch.minimum(place, extent[:, None].float().ceil() - 1)
        pixel = (start[:, None] + place).floor().long()
    row = _middle_row(geometry, axis)
    if row is not None:
        grid = (pixel.float() - 0.5 * (n - 1)) * row[:, axis, None] + row[:, 2, None]
        pixel = nearest_pixel(grid, 0.5 * n)
    return pixel if flip is None else torch.where(flip[:, None] != 0, n - 1 - pixel, pixel)


def _padded(pixel: Tensor, n: int, padding: Padding) -> tuple[Tensor, Tensor | None]:
    """(a pixel that there is, whether it stands for itself; None where the padding makes it so)."""
    inside = (pixel >= 0) & (pixel < n)
    if padding == "reflect":
        pixel = pixel % (2 * n)
        pixel = torch.minimum(pixel, 2 * n - 1 - pixel)
    return pixel.clamp(0, n - 1), None if padding in ("border", "reflect") else inside


def _taken(images: Tensor, geometry: Geometry, padding: Padding, fill: Any) -> Tensor:
    """Images or masks (B, N, H, W) of which lines stay lines, at the pixels of `_line`."""
    height, width = geometry.in_size
    rows, there = _padded(_line(geometry, 1)[:, :, None], height, padding)
    columns, beside = _padded(_line(geometry, 0)[:, None], width, padding)
    place = (rows * width + columns).flatten(1)[:, None].expand(-1, images.shape[1], -1)
    moved = images.flatten(2).gather(2, place).unflatten(2, geometry.out_size)
    if is_last(images):
        moved = moved.contiguous(memory_format=torch.channels_last)
    if there is None or beside is None:
        return moved
    if may_look(images) and there.all() and beside.all():
        return moved  # A crop lies inside almost always.
    values = fill if isinstance(fill, (list, tuple)) else [fill]
    if padding != "fill":
        values = [0]
    if images.dtype == torch.uint8:
        values = [min(max(round(value), 0), 255) for value in values]
    outside = torch.stack([torch.full((), v, dtype=images.dtype, device=images.device) for v in values])
    return torch.where((there & beside)[:, None], moved, outside.view(1, -1, 1, 1))


_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _mirrored(images: Tensor, on: Tensor, axis: int) -> Tensor:
    """Images or masks (B, N, H, W), mirrored where `on` (B, 1, 1, 1) is true. On a CPU bits are chosen, many
    at a time, where torch.where goes from pixel to pixel because the condition is repeated.
    """
    other = images.flip(axis)
    if images.device.type != "cpu" or is_hidden() or wants_derivative(images):
        return torch.where(on, other, images)
    word = _WORDS[images.element_size()]
    bits, every = images.view(word), on.to(word).neg_()  # all bits of a word, or none
    return other.view(word).bitwise_xor_(bits).bitwise_and_(every).bitwise_xor_(bits).view(images.dtype)


def before_nearest(
    images: Tensor, geometry: Geometry, padding: Padding, fill: Any
) -> tuple[Tensor, Tensor | None]:
    """(images or masks (B, N, H, W), the matrices by which they then take the nearest pixel; None where they
    have taken it already). Both take the same pixels: those of torchvision's steps one after the other.
    """
    matrices = geometry.matrices
    if matrices is None:
        return images, None
    if geometry.takes_lines():
        return _taken(images, geometry, padding, fill), None
    if not geometry.is_straight:
        for flip, axis in ((geometry.hflip, -1), (geometry.vflip, -2)):
            if flip is not None:
                images = _mirrored(images, flip.view(-1, 1, 1, 1) != 0, axis)
        matrices = matrices if geometry.unflipped is None else geometry.unflipped
    return images, _nudged(matrices, geometry)


def _fits_bytes(masks: Tensor, fill: float | None) -> bool:
    """Whether classes of a wide dtype are small numbers, which move faster as bytes."""
    if masks.element_size() == 1 or masks.dtype.is_floating_point or masks.device.type != "cpu":
        return False
    if is_hidden() or not 0 <= (fill or 0) <= 255:
        return False
    low, high = masks.aminmax()
    return bool(low >= 0) and bool(high <= 255)


def moved_masks(masks: Tensor, geometry: Geometry, fill: float | None) -> Tensor:
    """Masks (B, N, H, W) at the nearest pixel of the source; what lies outside is `fill`, or, where that is
    None, what the images' padding makes of it.
    """
    if geometry.matrices is None:
        return masks.clone()
    if not masks.numel():
        return masks.new_empty((*masks.shape[:2], *geometry.out_size))
    # Only where pixels are looked up by the kernel are bytes faster.
    if not geometry.takes_lines() and _fits_bytes(masks, fill):
        return moved_masks(masks.to(torch.uint8), geometry, fill).to(masks.dtype)
    padding: Padding = geometry.padding if fill is None else "fill"
    masks, matrices = before_nearest(masks, geometry, padding, fill or 0)
    return masks if matrices is None else _kernel_masks(masks, matrices, geometry, fill)


# ---- a crop that is resized


def unflipped_crops(crop: Tensor, hflip: Any, vflip: Any, in_size: Sequence[int]) -> Tensor:
    """(B, 4) int64 of (top, left, height, width), where crops (B, 4) of whole pixels lie in the images before
    they are flipped.
    """
    windows = crop.long()
    for axis, flip in ((0, vflip), (1, hflip)):
        if flip is not None:
            start, extent = windows[:, axis], windows[:, axis + 2]
            windows[:, axis] = torch.where(flip != 0, in_size[axis] - extent - start, start)
    return windows


def windows_of(crop: Tensor, hflip: Any, vflip: Any, in_size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """((B, 4) windows, as `unflipped_crops` has them; (B,) whether a crop is of whole pixels that are all
    there). Of another crop the window is the whole image.
    """
    height, width = in_size
    top, left, high, wide = crop.unbind(1)
    inside = (crop == crop.floor()).all(1) & (top >= 0) & (left >= 0) & (high >= 1) & (wide >= 1)
    inside = inside & (top + high <= height) & (left + wide <= width)
    whole = _op.rows((0, 0, height, width), len(crop), crop.device).long()
    return torch.where(inside[:, None], unflipped_crops(crop, hflip, vflip, in_size), whole), inside


def inside_windows(matrices: Tensor, windows: Tensor) -> Tensor:
    """The matrices of images as those of their windows."""
    moved = matrices.clone()
    moved[:, :, 2] -= windows[:, :2].flip(1)
    return moved
