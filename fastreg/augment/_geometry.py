"""Where a pass takes pixels, points and boxes: one matrix for each sample, seen from three sides.

Coordinates of boxes and points are those of torchvision: x to the right and y downwards from the upper left
corner of the image, in which pixel i of a line reaches from i to i + 1 and its centre lies at i + 0.5.
torchvision mirrors key points about the centres of pixels, as if they lay at whole numbers, and boxes about
their edges; so does this.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from .._transforms import is_vmapped
from . import _op
from ._params import Params
from ._plain import Padding


@dataclasses.dataclass
class Geometry:
    """One resampling of B samples.

    `matrices` (B, 2, 3) are the images', from a pixel of the result to its place in the source, or None where
    nothing moves. `is_straight`: lines of the image stay lines of the result. `affine` are those of the part
    between the flips and the crop, where torchvision's own arithmetic is wanted for masks.
    """

    in_size: tuple[int, int]
    out_size: tuple[int, int]
    matrices: Tensor | None
    hflip: Tensor | None = None
    vflip: Tensor | None = None
    crop: Tensor | None = None
    is_straight: bool = False
    affine: Tensor | None = None
    tied: Tensor | None = None  # (B,) bool: samples of which whole lines of positions lie between two pixels
    padding: Padding = "zeros"
    map: tuple[Tensor, Tensor] | None = None  # of boxes and points, where it is not that of the matrices

    @classmethod
    def of(cls, params: Params, height: int, width: int) -> Geometry:
        """What parameters do to images of (height, width)."""
        is_straight = params.angle is None and params.shear is None
        affine, tied = None, None
        moves = (params.stretch, params.scale, params.translate, params.angle, params.shear)
        if params.angle is not None and params.crop is None and params.angle.device.type == "cpu":
            tied = params.angle % 45 == 0
        if (is_straight or tied is not None) and not all(value is None for value in moves):
            bare = dataclasses.replace(
                params,
                hflip=None,
                vflip=None,
                crop=None,
                settings=dataclasses.replace(params.settings, size=None),
            )
            affine = bare.matrices(height, width)
        return cls(
            (height, width), params.settings.size or (height, width), params.matrices(height, width),
            params.hflip, params.vflip, params.crop, is_straight, affine, tied, params.settings.padding,
        )  # fmt: skip

    def crops_alone(self) -> bool:
        """Whether a crop and flips are all there is."""
        return self.is_straight and self.crop is not None and self.affine is None

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
            for name in ("matrices", "hflip", "vflip", "crop", "affine", "tied")
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


# ---- masks


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


def _mask_matrices(geometry: Geometry, matrices: Tensor) -> Tensor:
    """The matrices whose nearest pixel is the one that torch's nearest takes: of a crop that is resized it is
    pixel floor(x * step), which is not the one in the middle.
    """
    crop, (height, width), size = geometry.crop, geometry.in_size, geometry.out_size
    if crop is None and size == (height, width):
        return matrices
    if crop is None:
        sizes = [width / size[1], height / size[0]]
        step = torch.tensor(sizes, dtype=matrices.dtype, device=matrices.device).expand(len(matrices), 2)
    else:
        step = torch.stack([crop[:, 3] / size[1], crop[:, 2] / size[0]], 1).to(matrices.dtype)
    nudge = torch.where(step == 1, 0.0, 2**-20 / step - 0.5)
    moved = matrices.clone()
    moved[:, :, 2] += (matrices[:, :, :2] * nudge[:, None]).sum(2)
    return moved


def _row_of(geometry: Geometry, axis: int, dtype: torch.dtype = torch.float32) -> Tensor | None:
    """(B, 3) of the part between flips and crop for x (0) or y (1), from the middle of the image in halves of
    its side, as torchvision makes its grid of them, in float32 except for images of float64.
    """
    if geometry.affine is None:
        return None
    height, width = geometry.in_size
    m = geometry.affine[:, axis]
    middle, half = 0.5 * (width - 1, height - 1)[axis], 0.5 * (width, height)[axis]
    shift = m[:, 2] - middle + 0.5 * (m[:, 0] * (width - 1) + m[:, 1] * (height - 1))
    return torch.stack([m[:, 0], m[:, 1], shift], 1).to(dtype) / half


def _nearest(grid: Tensor, n: int) -> Tensor:
    """The pixel of a line of n at a place in [-1, 1], by the arithmetic of torch's grid_sample."""
    return ((grid + 1) * (0.5 * n) - 0.5).round().clamp(-(2.0**30), 2.0**30).long()


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
    row = _row_of(geometry, axis)
    if row is not None:
        grid = (pixel.float() - 0.5 * (n - 1)) * row[:, axis, None] + row[:, 2, None]
        pixel = _nearest(grid, n)
    return pixel if flip is None else torch.where(flip[:, None] != 0, n - 1 - pixel, pixel)


def _padded(pixel: Tensor, n: int, padding: Padding) -> tuple[Tensor, Tensor | None]:
    """(a pixel that there is, whether it stands for itself; None where the padding makes it so)."""
    inside = (pixel >= 0) & (pixel < n)
    if padding == "reflect":
        pixel = pixel % (2 * n)
        pixel = torch.minimum(pixel, 2 * n - 1 - pixel)
    return pixel.clamp(0, n - 1), None if padding in ("border", "reflect") else inside


def _taken(masks: Tensor, rows: Tensor, columns: Tensor, geometry: Geometry, fill: Any) -> Tensor:
    """Pixels of masks (B, N, H, W) at rows and columns that broadcast to (B, *out_size)."""
    height, width = geometry.in_size
    padding: Padding = "fill" if fill is not None else geometry.padding
    rows, there = _padded(rows, height, padding)
    columns, beside = _padded(columns, width, padding)
    place = (rows * width + columns).flatten(1)[:, None].expand(-1, masks.shape[1], -1)
    moved = masks.flatten(2).gather(2, place).unflatten(2, geometry.out_size)
    if there is None or beside is None:
        return moved
    if masks.device.type == "cpu" and not torch.compiler.is_compiling() and there.all() and beside.all():
        return moved  # A crop lies inside almost always.
    outside = torch.tensor(fill or 0, device=masks.device).to(masks.dtype).view(1, -1, 1, 1)
    return torch.where((there & beside)[:, None], moved, outside)


def turned(images: Tensor, geometry: Geometry, fill: Any) -> Tensor:
    """Images or masks (B, N, H, W) at the very pixels that torchvision's affine takes: its grid is in
    float32, so that of two pixels that are equally near it may take either.
    """
    height, width = geometry.out_size
    dtype = torch.float64 if images.dtype == torch.float64 else torch.float32
    x = torch.arange(width, device=images.device, dtype=dtype) - 0.5 * (width - 1)
    y = torch.arange(height, device=images.device, dtype=dtype)[:, None] - 0.5 * (height - 1)
    pixels = []
    for axis in (1, 0):
        row = _row_of(geometry, axis, dtype)
        assert row is not None
        a, b, c = row.view(-1, 3, 1, 1).unbind(1)
        pixels.append(_nearest(x * a + y * b + c, geometry.in_size[1 - axis]))
    return _taken(images, pixels[0], pixels[1], geometry, fill)


def sheared(images: Tensor, slant: Tensor, is_x: bool, padding: Padding, fill: Any) -> Tensor:
    """Images (B, C, H, W), sheared along one axis about the upper left corner, at the very pixels that
    torchvision's affine takes with nearest: among its strengths are some that put whole lines of positions
    between two pixels.
    """
    if not images.numel():
        return images.clone()
    height, width = images.shape[2:]
    n, other = (width, height) if is_x else (height, width)
    dtype = torch.float64 if images.dtype == torch.float64 else torch.float32
    along, across = (torch.arange(k, device=images.device, dtype=dtype) - 0.5 * (k - 1) for k in (n, other))
    factor, shift = ((v.to(dtype) / (0.5 * n)).view(-1, 1, 1) for v in (slant, 0.5 * other * slant))
    scaled = along * (torch.ones((), dtype=dtype, device=images.device) / (0.5 * n))
    grid = scaled + across[:, None] * factor if is_x else across * factor + scaled[:, None]
    pixel = _nearest(grid + shift, n)
    inside = ((pixel >= 0) & (pixel < n))[:, None]
    place = pixel.clamp(0, n - 1)[:, None].expand(images.shape)
    moved = images.gather(3 if is_x else 2, place)
    outside = torch.tensor(fill if padding == "fill" else 0.0, device=images.device).to(images.dtype)
    return torch.where(inside, moved, outside.view(1, -1, 1, 1))


def _fits_bytes(masks: Tensor, fill: float | None) -> bool:
    """Whether classes of a wide dtype are small numbers, which move faster as bytes."""
    if masks.element_size() == 1 or masks.dtype.is_floating_point or masks.device.type != "cpu":
        return False
    if torch.compiler.is_compiling() or is_vmapped() or not 0 <= (fill or 0) <= 255:
        return False
    low, high = masks.aminmax()
    return bool(low >= 0) and bool(high <= 255)


def _with_ties(masks: Tensor, geometry: Geometry, fill: float | None, at: Tensor) -> Tensor:
    """Masks of which the samples `at` take torchvision's own pixels."""
    moved = moved_masks(masks, dataclasses.replace(geometry, affine=None, tied=None), fill)
    some = masks[at]
    for flip, axis in ((geometry.hflip, -1), (geometry.vflip, -2)):
        if flip is not None:
            some = torch.where(flip[at].view(-1, 1, 1, 1) != 0, some.flip(axis), some)
    assert geometry.affine is not None
    alone = dataclasses.replace(geometry, affine=geometry.affine[at])
    return moved.index_copy_(0, at, turned(some, alone, fill))


def moved_masks(masks: Tensor, geometry: Geometry, fill: float | None) -> Tensor:
    """Masks (B, N, H, W) at the nearest pixel of the source; what lies outside is `fill`, or, where that is
    None, what the images' padding makes of it.
    """
    if geometry.matrices is None:
        return masks.clone()
    if not masks.numel():
        return masks.new_empty((*masks.shape[:2], *geometry.out_size))
    if geometry.is_straight and (geometry.crop is not None or geometry.affine is not None):
        rows, columns = _line(geometry, 1)[:, :, None], _line(geometry, 0)[:, None]
        return _taken(masks, rows, columns, geometry, fill)
    if geometry.affine is not None and geometry.tied is None:
        return turned(masks, geometry, fill)
    if geometry.tied is not None and not (torch.compiler.is_compiling() or is_vmapped()):
        at = geometry.tied.nonzero()[:, 0]
        if len(at):
            return _with_ties(masks, geometry, fill, at)
    matrices = _mask_matrices(geometry, geometry.matrices)
    if _fits_bytes(masks, fill):
        return _kernel_masks(masks.to(torch.uint8), matrices, geometry, fill).to(masks.dtype)
    return _kernel_masks(masks, matrices, geometry, fill)
