"""Pictures of what an `Augment` does, with the targets drawn on them; tensors are all that they need."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from .._checks import check_count
from ._params import Settings
from ._structures import leaves_of, owner_of, samples_of
from ._targets import Augmented, Targets, to_xyxy
from ._tv import ROTATED, corners_of, is_tv_tensor, is_video, plain, wrapped

OP = "Augment.show"
_COLOURS = ((255, 70, 70), (70, 210, 70), (80, 120, 255), (250, 210, 60), (220, 90, 220), (70, 220, 220))
_GAP = 2


@dataclasses.dataclass
class _Cell:
    """An image (C, H, W) and its own targets, boxes (N, 4) XYXY, or the corners (N, 4, 2) of turned ones."""

    image: Tensor
    masks: Tensor | None = None
    boxes: Tensor | None = None
    keypoints: Tensor | None = None


def _colour(i: int, device: torch.device) -> Tensor:
    return torch.tensor(_COLOURS[i % len(_COLOURS)], dtype=torch.float32, device=device).view(3, 1)


def _as_rgb(image: Tensor, settings: Settings | None) -> Tensor:
    """(3, H, W) float32 in [0, 255], with what was normalised as it was."""
    pixels = image.detach().float()
    if settings is not None and (settings.mean is not None or settings.std is not None):
        for scale, add in ((settings.std, False), (settings.mean, True)):
            if scale is not None:
                number = torch.tensor(scale, device=pixels.device, dtype=torch.float32).view(-1, 1, 1)
                pixels = pixels + number if add else pixels * number
    pixels = pixels if image.dtype == torch.uint8 else pixels * 255
    if len(pixels) != 3:
        pixels = torch.cat([pixels, pixels[-1:], pixels[-1:]])[:3] if len(pixels) else pixels
    return pixels.nan_to_num(0.0).clamp(0, 255)


def _drawn(cell: _Cell, settings: Settings | None) -> Tensor:
    """The picture of one image, (3, H, W) uint8."""
    picture = _as_rgb(cell.image, settings)
    height, width = picture.shape[1:]
    device = picture.device
    if cell.masks is not None:
        layers = cell.masks if cell.masks.dim() == 3 else cell.masks[None]
        for n, layer in enumerate(layers.reshape(-1, height, width)):
            values = layer.long() if not layer.is_floating_point() else (layer > 0).long()
            for value in values.unique().tolist()[:64]:
                if value:
                    on = values == value
                    shade = _colour(n if cell.masks.dim() == 3 else value - 1, device)
                    picture[:, on] = 0.5 * picture[:, on] + 0.5 * shade
    for n, box in enumerate(() if cell.boxes is None else cell.boxes.float().cpu()):
        if box.dim() == 2:
            _outline(picture, box, _colour(n, device))
            continue
        x1, y1, x2, y2 = box.tolist()
        if not (x2 > x1 and y2 > y1):  # nothing is left, or a NaN
            continue
        left, right = (min(max(int(v), 0), width - 1) for v in (x1, x2 - 1e-3))
        top, bottom = (min(max(int(v), 0), height - 1) for v in (y1, y2 - 1e-3))
        shade = _colour(n, device)
        for row in (top, bottom):
            picture[:, row, left : right + 1] = shade
        for column in (left, right):
            picture[:, top : bottom + 1, column] = shade
    points = () if cell.keypoints is None else cell.keypoints.float().cpu().flatten(0, -2).tolist()
    for n, point in enumerate(points):
        hidden = len(point) == 3 and not point[2]
        if hidden or not (0 <= point[0] < width and 0 <= point[1] < height):
            continue
        x, y = int(point[0]), int(point[1])
        shade = _colour(n, device)
        picture[:, y, max(x - 2, 0) : x + 3] = shade
        picture[:, max(y - 2, 0) : y + 3, x] = shade
    return picture.round().to(torch.uint8).cpu()


def _outline(picture: Tensor, corners: Tensor, shade: Tensor) -> None:
    """Draw the four sides of corners (4, 2), as far as they lie in the picture."""
    height, width = picture.shape[1:]
    if not bool(corners.isfinite().all()):
        return
    for start, end in zip(corners, corners.roll(-1, 0), strict=True):
        steps = 2 * min(int((end - start).abs().amax()), 4 * (height + width)) + 2
        share = torch.linspace(0, 1, steps, dtype=torch.float32)[:, None]
        x, y = (start + share * (end - start)).floor().clamp(-1, 2**30).long().unbind(1)
        inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
        picture[:, y[inside].to(picture.device), x[inside].to(picture.device)] = shade


def _format_of(boxes: Any, box_format: str) -> str:
    """The format of boxes, one tensor or a list: torchvision's know their own."""
    first = boxes[0] if isinstance(boxes, (list, tuple)) and boxes else boxes
    own: str = first.format.value if is_tv_tensor(first) else box_format
    return own


def _outlines(boxes: Tensor, box_format: str) -> Tensor:
    """Boxes as `_Cell` has them."""
    numbers = boxes.float()
    return corners_of(numbers, box_format) if box_format in ROTATED else to_xyxy(numbers, box_format)


def _part(value: Any, i: int, single: bool) -> Any:
    if value is None:
        return None
    part = value[0] if single and isinstance(value, (list, tuple)) else value if single else value[i]
    return plain(part)


def _batch_cells(images: Tensor, moved: Any, box_format: str) -> list[_Cell]:
    """The cells of a batch of tensors; `moved` has its targets."""
    single = images.dim() == 3
    cells = []
    for i in range(1 if single else len(images)):
        masks, boxes, points = (
            _part(getattr(moved, name), i, single) for name in ("masks", "boxes", "keypoints")
        )
        boxes = None if boxes is None else _outlines(boxes, _format_of(moved.boxes, box_format))
        seen = _part(getattr(moved, "visible", None), i, single)
        if points is not None and seen is not None:  # as the third number of a point
            points = torch.cat([points[..., :2], seen.to(points.dtype).unsqueeze(-1)], -1)
        if boxes is not None and getattr(moved, "boxes_left", None) is not None:
            boxes = boxes[_part(moved.boxes_left, i, single)]
        cells.append(_Cell(plain(images if single else images[i]), masks, boxes, points))
    return cells


def _nest_cells(nest: Any) -> list[_Cell]:
    """The cells of a sample, or of a batch as one nest."""
    leaves = leaves_of(nest)[0]
    image = next(leaf for leaf in leaves if leaf.kind == "image")
    images = plain(image.value)
    count = len(images) if images.dim() == 4 else 0
    found: list[dict[str, Any]] = [{} for _ in range(count or 1)]
    for leaf in leaves:
        if leaf.kind in (None, "image"):
            continue
        of_all = count == 0 or is_video(image.value)
        owner = None if of_all else owner_of(leaf, image, nest, count)
        for i in range(count or 1) if owner is None else [owner]:
            is_own = of_all or owner is not None
            value = leaf.value if is_own else wrapped(plain(leaf.value)[i], leaf.value)
            found[i].setdefault(str(leaf.kind), value)
    return [
        _batch_cells(images[i] if count else images, Augmented(images, **parts), "XYXY")[0]
        for i, parts in enumerate(found)
    ]


def _cells(batch: Any, box_format: str) -> list[_Cell]:
    """The cells of whatever `Augment` takes and gives."""
    if isinstance(batch, Augmented):
        return _batch_cells(batch.images, batch, box_format)
    if isinstance(batch, Tensor):
        return _batch_cells(batch, Augmented(batch), box_format)
    if isinstance(batch, (list, tuple)) and all(isinstance(x, Tensor) and x.dim() == 3 for x in batch):
        return [_Cell(plain(image)) for image in batch]
    parts = samples_of(batch)
    return [cell for sample in (parts[0] if parts else [batch]) for cell in _nest_cells(sample)]


def _grid(rows: list[list[Tensor]], columns: int) -> Tensor:
    """(height, width, 3): rows of pictures, so many side by side, one below the other."""
    height = max(p.shape[1] for row in rows for p in row)
    width = max(p.shape[2] for row in rows for p in row)
    count = len(rows[0])
    columns = min(columns, count)
    bands = -(-count // columns)
    whole = torch.full(
        (3, bands * len(rows) * (height + _GAP) - _GAP, columns * (width + _GAP) - _GAP),
        255,
        dtype=torch.uint8,
    )
    for r, row in enumerate(rows):
        for i, picture in enumerate(row):
            top = ((i // columns) * len(rows) + r) * (height + _GAP)
            left = i % columns * (width + _GAP)
            whole[:, top : top + picture.shape[1], left : left + picture.shape[2]] = picture
    return whole.permute(1, 2, 0).contiguous()


def _counted(targets: Targets) -> Tensor | None:
    """Which of the padded boxes there are, where their counts say so."""
    if targets.counts is None or not isinstance(targets.boxes, Tensor):
        return None
    counts = torch.as_tensor(targets.counts, device=targets.boxes.device).view(-1, 1)
    return torch.arange(targets.boxes.shape[-2], device=counts.device) < counts


def shown(aug: Any, batch: Any, generator: Any, targets: Targets, draws: int, columns: int) -> Any:
    """The picture of `Augment.show`."""
    check_count(OP, "draws", draws)
    check_count(OP, "columns", columns)
    given = targets.arguments()
    box_format = getattr(targets.box_format, "value", targets.box_format)
    after = [aug(batch, generator, **given) for _ in range(draws)]
    before: Any = batch
    if targets.given() and isinstance(batch, Tensor):
        before = Augmented(
            batch, targets.masks, targets.boxes, _counted(targets), targets.keypoints, targets.visible
        )
    elif targets.given():
        before = [
            dataclasses.replace(
                cell,
                masks=_part(targets.masks, i, False),
                boxes=None
                if targets.boxes is None
                else _outlines(_part(targets.boxes, i, False), _format_of(targets.boxes, box_format)),
                keypoints=_part(targets.keypoints, i, False),
            )
            for i, cell in enumerate(_cells(batch, box_format))
        ]
    first = (
        before
        if isinstance(before, list) and before and isinstance(before[0], _Cell)
        else _cells(before, box_format)
    )
    if not first:
        raise ValueError(f"{OP}: the batch has no images")
    rows = [[_drawn(cell, None) for cell in first]]
    rows += [[_drawn(cell, aug.settings) for cell in _cells(one, box_format)] for one in after]
    picture = _grid(rows, columns)
    try:
        from PIL import Image
    except ImportError:
        return picture
    return Image.frombytes("RGB", (picture.shape[1], picture.shape[0]), bytes(picture.flatten().tolist()))
