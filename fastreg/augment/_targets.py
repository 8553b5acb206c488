"""Masks, boxes and key points beside the images, moved by the images' matrices.

A box becomes the box around its four moved corners, cut off at the edges of the result, as in torchvision; a
mask takes the nearest pixel; a key point goes where the picture below it goes. Colours, blur and erasing
leave all three as they are, as torchvision's RandomErasing does.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from .._checks import check_choice, check_number, check_tensor
from .._transforms import is_hidden
from . import _tv
from ._geometry import Geometry, after, moved_boxes, moved_masks, moved_points
from ._op import number_dtype

OP = "augment"
BoxFormat = Literal["XYXY", "XYWH", "CXCYWH"]
FORMATS = get_args(BoxFormat)
_WHOLE = {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
_WHOLE |= {torch.uint16, torch.uint32, torch.uint64}


class Augmented(NamedTuple):
    """Images and what was moved with them; None for what was not given.

    `images` (B, C, H, W); `masks` of their shape except for H and W; `boxes` in their own format, and
    `boxes_left`, whether enough of each is left; `keypoints` of their own shape, and `visible`, whether each
    was visible and lies inside. For a list of targets, lists.
    """

    images: Tensor
    masks: Any = None
    boxes: Any = None
    boxes_left: Any = None
    keypoints: Any = None
    visible: Any = None


def values_known(*tensors: Tensor) -> bool:
    """Whether values can be looked at without waiting for a GPU or breaking a graph."""
    if is_hidden():
        return False
    return all(tensor.device.type == "cpu" for tensor in tensors)


def _check_fill(fill: Any, masks: Sequence[Tensor]) -> None:
    if fill is None:
        return
    check_number(OP, "mask_fill", fill)
    for dtype in {mask.dtype for mask in masks}:
        low, high = (0, 1) if dtype == torch.bool else (-math.inf, math.inf)
        if dtype in _WHOLE:
            low, high = torch.iinfo(dtype).min, torch.iinfo(dtype).max
        whole = dtype == torch.bool or dtype in _WHOLE
        if not low <= fill <= high or (whole and fill != int(fill)):
            kind = "a whole number" if whole else "a number"
            raise ValueError(f"{OP}: mask_fill must be {kind} that {dtype} masks can hold, got {fill}")


@dataclasses.dataclass
class Targets:
    """What a caller gave beside the images, and how it is to be read; see `apply`."""

    masks: Any = None
    boxes: Any = None
    keypoints: Any = None
    counts: Any = None
    visible: Any = None
    box_format: Any = "XYXY"
    mask_fill: float | None = None
    min_area: float = 0.0
    min_visibility: float = 0.0
    flip_permutation: Any = None
    likes: dict[str, Any] = dataclasses.field(init=False, default_factory=dict)  # torchvision's, as given
    clamping: str | None = dataclasses.field(init=False, default="soft")  # whether boxes are cut off, and how

    def given(self) -> bool:
        """Whether there is anything to move. What is said of targets that are not there is an error."""
        for name, of in (("counts", "boxes"), ("visible", "keypoints"), ("flip_permutation", "keypoints")):
            if getattr(self, name) is not None and getattr(self, of) is None:
                raise ValueError(f"{OP}: {name} is about {of}, got none; give {of} too")
        return not (self.masks is None and self.boxes is None and self.keypoints is None)

    def is_picky(self) -> bool:
        """Whether boxes are left only from some size on."""
        return bool(self.min_area or self.min_visibility)

    def arguments(self) -> dict[str, Any]:
        """What it was made of, by name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.init}

    def of_sample(self, i: int, count: int) -> Targets:
        """The targets of sample i of a list of images, as those of a batch of one."""
        parts: dict[str, Any] = {}
        for name in ("masks", "boxes", "keypoints", "counts", "visible"):
            value = getattr(self, name)
            if value is not None and len(value) != count:
                raise ValueError(
                    f"{OP}: {name} must be of one part for each of {count} images, got {len(value)}"
                )
            parts[name] = None if value is None else value[i : i + 1]
        return dataclasses.replace(self, **parts)

    def _unwrap(self) -> None:
        """Take torchvision's tensors for plain ones, and remember what they were."""
        for name in ("masks", "boxes", "keypoints"):
            value = getattr(self, name)
            parts = value if isinstance(value, (list, tuple)) else [value]
            if not any(_tv.is_tv_tensor(part) for part in parts):
                continue
            kinds = {_tv.tv_kind(part) for part in parts}
            if kinds != {name}:
                raise TypeError(
                    f"{OP}: {name} must all be of one kind, got {[type(p).__name__ for p in parts]}"
                )
            self.likes[name] = value
            if name == "boxes":
                about = {(part.format.value, part.clamping_mode) for part in parts}
                if len(about) > 1:
                    raise ValueError(f"{OP}: boxes of one call must be of one format and clamping mode")
                ((self.box_format, self.clamping),) = about
            flat = [_tv.plain(part) for part in parts]
            setattr(self, name, flat if isinstance(value, (list, tuple)) else flat[0])

    def _wrap(self, name: str, value: Any, size: tuple[int, int]) -> Any:
        like = self.likes.get(name)
        if like is None:
            return value
        if isinstance(value, list):
            return [_tv.wrapped(part, one, size) for part, one in zip(value, like, strict=True)]
        return _tv.wrapped(value, like, size)

    def _parts(self, name: str, value: Any, count: int, images: Tensor) -> list[Tensor]:
        """The tensors of a list, one for each sample, or the one tensor of all, on the images' device."""
        is_list = isinstance(value, (list, tuple))
        if is_list and len(value) != count:
            raise ValueError(
                f"{OP}: {name} must be a list of one tensor for each of {count} samples, got {len(value)}"
            )
        for part in value if is_list else [value]:
            check_tensor(OP, name, part)
            if part.device != images.device:
                raise ValueError(
                    f"{OP}: {name} must be on the images' device {images.device}, got {part.device}; move "
                    f"them there"
                )
            if part.is_complex():
                raise TypeError(f"{OP}: {name} must be real, got {part.dtype}")
        return list(value) if is_list else [value]

    def check(self, images: Tensor, lead: int | bool) -> None:
        """Raise for what cannot be moved with images (B, C, H, W), which were given with `lead` leading
        dimensions; before any work.
        """
        self._unwrap()
        self.box_format = self.box_format.value if isinstance(self.box_format, Enum) else self.box_format
        self.box_format = self.box_format.upper() if isinstance(self.box_format, str) else self.box_format
        if "boxes" not in self.likes:
            check_choice(OP, "box_format", self.box_format, FORMATS)
        check_number(OP, "min_area", self.min_area, 0)
        check_number(OP, "min_visibility", self.min_visibility, 0, 1)
        count, sides = len(images), tuple(images.shape[2:])
        head = (count,) if lead else ()
        if self.masks is not None:
            self._check_masks(images, head, sides)
        if self.boxes is not None:
            self._check_boxes(images, head)
        if self.keypoints is not None:
            self._check_keypoints(images, head)

    def _check_masks(self, images: Tensor, head: tuple[int, ...], sides: tuple[int, ...]) -> None:
        parts = self._parts("masks", self.masks, len(images), images)
        for part in parts:
            single = isinstance(self.masks, (list, tuple)) or not head
            wanted = () if single else head
            if part.dim() - len(wanted) not in (2, 3) or part.shape[: len(wanted)] != wanted:
                shapes = "(H, W) or (N, H, W)" if single else "(B, H, W) or (B, N, H, W)"
                raise ValueError(
                    f"{OP}: masks must be {shapes} for images of {tuple(images.shape)}, got "
                    f"{tuple(part.shape)}"
                )
            if tuple(part.shape[-2:]) != sides:
                raise ValueError(
                    f"{OP}: masks must have the images' height and width {sides}, got "
                    f"{tuple(part.shape[-2:])}"
                )
        _check_fill(self.mask_fill, parts)

    def _check_boxes(self, images: Tensor, head: tuple[int, ...]) -> None:
        parts = self._parts("boxes", self.boxes, len(images), images)
        is_list = isinstance(self.boxes, (list, tuple))
        numbers = _tv.ROTATED.get(self.box_format, 4)
        for part in parts:
            empty = part.dim() == 1 and not part.numel()  # torch.tensor([]) of a sample without boxes
            wanted = () if is_list or not head else head
            if not empty and (
                part.dim() != len(wanted) + 2
                or part.shape[-1] != numbers
                or part.shape[: len(wanted)] != wanted
            ):
                shapes = "(B, N, 4), or a list of (N, 4)" if head else "(N, 4)"
                raise ValueError(
                    f"{OP}: boxes must be {shapes} for images of {tuple(images.shape)}, got "
                    f"{tuple(part.shape)}"
                )
            if part.dtype == torch.bool:
                raise TypeError(f"{OP}: boxes must be numbers, got {part.dtype}")
        if self.counts is None:
            return
        if is_list or not head:
            raise ValueError(f"{OP}: counts are for boxes of shape (B, N, 4); a list needs none")
        self.counts = torch.as_tensor(self.counts, device=images.device)
        if self.counts.shape != head or self.counts.dtype not in _WHOLE:
            raise ValueError(
                f"{OP}: counts must be whole numbers of shape {head}, one for each sample, got "
                f"{self.counts.dtype} of shape {tuple(self.counts.shape)}"
            )
        most = self.boxes.shape[1]
        if values_known(self.counts) and bool(((self.counts < 0) | (self.counts > most)).any()):
            raise ValueError(f"{OP}: counts must be in [0, {most}], got {self.counts.tolist()}")

    def _check_keypoints(self, images: Tensor, head: tuple[int, ...]) -> None:
        parts = self._parts("keypoints", self.keypoints, len(images), images)
        is_list = isinstance(self.keypoints, (list, tuple))
        wanted = () if is_list or not head else head
        for part in parts:
            good = part.dim() >= len(wanted) + 2 and part.shape[-1] in (2, 3)
            if not good or part.shape[: len(wanted)] != wanted or part.dtype == torch.bool:
                shapes = "(B, ..., K, 2) or a list of (..., K, 2)" if head else "(..., K, 2)"
                raise ValueError(
                    f"{OP}: keypoints must be numbers of shape {shapes} (or of 3, the last of them the "
                    f"visibility) for images of {tuple(images.shape)}, got {part.dtype} of shape "
                    f"{tuple(part.shape)}"
                )
        if self.visible is not None:
            seen = self._parts("visible", self.visible, len(images), images)
            if len(seen) != len(parts) or any(
                v.shape != p.shape[:-1] for v, p in zip(seen, parts, strict=True)
            ):
                raise ValueError(
                    f"{OP}: visible must be of the key points' shape without the last dimension, got "
                    f"{[tuple(v.shape) for v in seen]} for {[tuple(p.shape) for p in parts]}"
                )
        if self.flip_permutation is None:
            return
        order = [int(v) for v in self.flip_permutation]
        for part in parts:
            if sorted(order) != list(range(part.shape[-2])):
                raise ValueError(
                    f"{OP}: flip_permutation must be a permutation of the {part.shape[-2]} key points, got "
                    f"{order}"
                )
        self.flip_permutation = order

    def moved(self, images: Tensor, steps: Sequence[Geometry], is_single: bool) -> Augmented:
        """All of it after the given resamplings; `images` are augmented already."""
        masks = boxes = left = keypoints = visible = None
        steps = [step for step in steps if step.matrices is not None] or steps[-1:]
        if self.masks is not None:
            masks = _each(self.masks, is_single, lambda part, i: self._moved_masks(part, steps, i))
        forward = None
        for step in steps:
            forward = after(forward, step.forward())
        if self.boxes is not None:
            both = _each(self.boxes, is_single, lambda part, i: self._moved_boxes(part, steps, forward, i))
            boxes, left = _pair(both)
        if self.keypoints is not None:
            both = _each(self.keypoints, is_single, lambda part, i: self._moved_keypoints(part, steps, i))
            keypoints, visible = _pair(both)
        size = steps[-1].out_size
        return Augmented(
            images, self._wrap("masks", masks, size), self._wrap("boxes", boxes, size), left,
            self._wrap("keypoints", keypoints, size), visible,
        )  # fmt: skip

    def _moved_masks(self, masks: Tensor, steps: Sequence[Geometry], i: int | None) -> Tensor:
        flat = masks.dim() == 3
        for step in steps:
            step = step if i is None else step.of_sample(i)
            four = masks[:, None] if flat else masks
            if masks.dtype in (torch.uint16, torch.uint32, torch.uint64):  # which torch has few operators for
                signed = getattr(torch, str(masks.dtype).removeprefix("torch.u"))
                fill = self.mask_fill
                half = 2 ** (8 * masks.element_size() - 1)
                fill = fill - 2 * half if fill is not None and fill >= half else fill
                moved = moved_masks(four.view(signed), step, fill).view(masks.dtype)
            else:
                moved = moved_masks(four, step, self.mask_fill)
            masks = moved[:, 0] if flat else moved
        return masks

    def _moved_boxes(self, boxes: Tensor, steps: Sequence[Geometry], forward: Any, i: int | None) -> Any:
        if boxes.dim() == 2:  # (B, 0) of torch.tensor([])
            boxes = boxes.reshape(len(boxes), 0, _tv.ROTATED.get(self.box_format, 4))
        crops = [step if i is None else step.of_sample(i) for step in steps]
        alone = all(step.crops_alone() for step in crops)
        if self.box_format in _tv.ROTATED:
            moved, left = self._moved_rotated(boxes, crops, alone, _one_map(forward, i))
            return self._without_padding(boxes, moved, left)
        xyxy = to_xyxy(boxes.to(_arithmetic(boxes)), self.box_format)
        straight = all(step.is_straight for step in steps)
        around = moved_boxes(xyxy, _one_map(forward, i), straight)
        cut = around if self.clamping is None else clipped(around, steps[-1].out_size)
        there, area = _area(xyxy) > 0, _area(cut)
        left = there & (area > 0) & (area >= self.min_area)
        left = left & (area >= self.min_visibility * _area(around))
        moved = from_xyxy(cut, self.box_format).to(boxes.dtype)  # cut off, as torchvision does
        if not boxes.dtype.is_floating_point and alone:
            moved = boxes
            for step in crops:
                xyxy = to_xyxy(moved.to(_arithmetic(boxes)), self.box_format)
                moved = self._cropped_whole(xyxy, boxes.dtype, step)
        return self._without_padding(boxes, moved, left)

    def _without_padding(self, boxes: Tensor, moved: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
        """(moved boxes, those left), where boxes that do not count are as they were."""
        if self.counts is None:
            return moved, left
        known = torch.arange(boxes.shape[1], device=boxes.device) < self.counts[:, None]
        return torch.where(known[:, :, None], moved, boxes), left & known

    def _cropped_whole(self, xyxy: Tensor, dtype: torch.dtype, step: Geometry) -> Tensor:
        """Boxes of whole numbers after a crop, and then after its resize, which torchvision cuts off after
        each of the two, in their own format.
        """
        height, width = step.in_size
        lead = (-1, *(1,) * (xyxy.dim() - 2))
        assert step.crop is not None
        top, left, high, wide = (side.to(xyxy.dtype).view(lead) for side in step.crop.unbind(1))
        x1, y1, x2, y2 = xyxy.unbind(-1)
        for flip, axis in ((step.hflip, 0), (step.vflip, 1)):
            if flip is not None:
                on, side = flip.view(lead) != 0, (width, height)[axis]
                low, far = (x1, x2) if axis == 0 else (y1, y2)
                low, far = torch.where(on, side - far, low), torch.where(on, side - low, far)
                x1, y1, x2, y2 = (low, y1, far, y2) if axis == 0 else (x1, low, x2, far)
        ends = [(x1 - left, wide), (y1 - top, high), (x2 - left, wide), (y2 - top, high)]
        if self.clamping is not None:
            cut = [torch.minimum(end.clamp(min=0), most) for end, most in ends]
        else:
            cut = [end for end, _ in ends]
        whole = from_xyxy(torch.stack(cut, -1), self.box_format).to(dtype)
        across, down = (ratio.view(lead) for ratio in step.ratios())
        ratio = torch.stack([across, down] * 2, -1)
        return (whole * ratio).to(dtype)

    def _moved_rotated(self, boxes: Tensor, steps: list[Geometry], alone: bool, forward: Any) -> Any:
        before = _tv.corners_of(boxes.to(number_dtype(boxes.device)), self.box_format)
        around = before
        if forward is not None:
            around = _tv.rectangles(moved_points(before, forward))
            mirrored = torch.linalg.det(forward[0]) < 0  # The corners go round the same way again.
            around = torch.where(mirrored.view(-1, 1, 1, 1), around[..., [1, 0, 3, 2], :], around)
        if alone:
            moved = boxes
            for step in steps:
                moved = _tv.rotated_of_crops(moved, self.box_format, step, self.clamping)
            corners = _tv.corners_of(moved.to(before.dtype), self.box_format)
        else:
            moved, corners = _tv.from_corners(around, self.box_format, steps[-1].out_size, self.clamping)
        if forward is None:  # Cutting off writes boxes anew that lie inside, too.
            moved = torch.where(_is_inside(before, steps[-1].out_size)[..., None], boxes, moved)
        area, whole = _polygon_area(corners), _polygon_area(around)
        left = (_polygon_area(before) > 0) & (area > 0) & (area >= self.min_area)
        left = left & (area >= self.min_visibility * whole)
        return moved.to(boxes.dtype), left

    def _moved_keypoints(self, points: Tensor, steps: Sequence[Geometry], i: int | None) -> Any:
        places, mirrored = points[..., :2].to(_arithmetic(points)), None
        whole = not points.dtype.is_floating_point and all(step.crops_alone() for step in steps)
        for step in steps:
            one = step if i is None else step.of_sample(i)
            shifts = []
            for flip in (one.hflip, one.vflip):
                if flip is None:
                    shifts.append(places.new_zeros(len(places)))
                    continue
                on = flip != 0
                shifts.append(on.to(places.dtype))  # torchvision mirrors points about the centres of pixels
                mirrored = on if mirrored is None else mirrored ^ on
            places = places + torch.stack(shifts, 1).view(-1, *(1,) * (places.dim() - 2), 2)
            if whole:  # which torchvision cuts off after each step
                places = _points_of_crop(places, one).to(points.dtype).to(places.dtype)
            else:
                places = moved_points(places, one.forward())
        height, width = steps[-1].out_size
        x, y = places.unbind(-1)
        inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
        seen = inside
        given = self.visible if i is None or self.visible is None else self.visible[i]
        if given is not None:
            seen = seen & (given.reshape(seen.shape) != 0)
        if points.shape[-1] == 3:
            seen = seen & (points[..., 2] != 0)
        moved = places.to(points.dtype)
        if points.shape[-1] == 3:
            moved = torch.cat([moved, torch.where(seen, points[..., 2], 0).to(points.dtype)[..., None]], -1)
        if mirrored is not None and self.flip_permutation is not None:
            turned = mirrored.view(-1, *(1,) * (moved.dim() - 1))
            moved = torch.where(turned, moved[..., self.flip_permutation, :], moved)
            seen = torch.where(turned[..., 0], seen[..., self.flip_permutation], seen)
        return moved, seen


def _each(value: Any, is_single: bool, move: Callable[[Tensor, int | None], Any]) -> Any:
    """What becomes of a tensor for all samples, or of a list of one for each."""
    if isinstance(value, (list, tuple)):
        return [_first(move(part[None], i)) for i, part in enumerate(value)]
    return _first(move(value[None], None)) if is_single else move(value, None)


def _first(value: Any) -> Any:
    return tuple(part[0] for part in value) if isinstance(value, tuple) else value[0]


def _pair(value: Any) -> tuple[Any, Any]:
    if isinstance(value, list):
        return [first for first, _ in value], [second for _, second in value]
    return value


def _one_map(forward: Any, i: int | None) -> Any:
    return forward if forward is None or i is None else tuple(part[i : i + 1] for part in forward)


def moved_alone(target: Tensor, step: Geometry, fill: Any = None, *, clip: bool = True) -> Tensor:
    """One of torchvision's tensors of a single image after a resampling; without `clip` boxes are not cut off
    at the edges.
    """
    kind = str(_tv.tv_kind(target))
    if kind == "masks" and target.dim() > 3:  # torchvision takes any leading dimensions
        flat = _tv.wrapped(_tv.plain(target).flatten(0, -3), target)
        alone = _tv.plain(moved_alone(flat, step, fill))
        return _tv.wrapped(alone.unflatten(0, target.shape[:-2]), target)
    fill = fill[0] if isinstance(fill, (list, tuple)) and len(fill) == 1 else fill
    given: dict[str, Any] = {kind: target}
    targets = Targets(**given, mask_fill=fill or 0)
    size = step.in_size if kind == "masks" else (1, 1)
    images = _tv.plain(target).new_empty((), dtype=torch.float32).expand(1, 1, *size)
    targets.check(images, 0)
    if not clip:
        targets.clamping = None
    moved: Tensor = getattr(targets.moved(images, [step], True), kind)
    return moved


def to_xyxy(boxes: Tensor, box_format: str) -> Tensor:
    """Boxes of a format as (x1, y1, x2, y2)."""
    if box_format == "XYXY":
        return boxes
    start, size = boxes[..., :2], boxes[..., 2:]
    start = start - 0.5 * size if box_format == "CXCYWH" else start
    return torch.cat([start, start + size], -1)


def from_xyxy(boxes: Tensor, box_format: str) -> Tensor:
    """(x1, y1, x2, y2) in a format."""
    if box_format == "XYXY":
        return boxes
    start, end = boxes[..., :2], boxes[..., 2:]
    place = 0.5 * (start + end) if box_format == "CXCYWH" else start
    return torch.cat([place, end - start], -1)


def clipped(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes (x1, y1, x2, y2), cut off at the edges of an image of (height, width)."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    height, width = size
    return torch.stack([x1.clamp(0, width), y1.clamp(0, height), x2.clamp(0, width), y2.clamp(0, height)], -1)


def _is_inside(corners: Tensor, size: tuple[int, int]) -> Tensor:
    """Whether corners (..., 4, 2) all lie in an image of (height, width)."""
    x, y = corners.unbind(-1)
    return ((x >= 0) & (x <= size[1]) & (y >= 0) & (y <= size[0])).all(-1)


def _area(boxes: Tensor) -> Tensor:
    x1, y1, x2, y2 = boxes.unbind(-1)
    return (x2 - x1).clamp(min=0) * (y2 - y1).clamp(min=0)


def _points_of_crop(places: Tensor, step: Geometry) -> Tensor:
    """Points (B, ..., 2) of whole numbers, shifted for a flip, after the flip and a crop, in torchvision's
    float32.
    """
    height, width = step.in_size
    lead = (-1, *(1,) * (places.dim() - 2))
    assert step.crop is not None
    along = []
    for axis, flip, side in ((0, step.hflip, width), (1, step.vflip, height)):
        place = places[..., axis]
        if flip is not None:
            place = torch.where(flip.view(lead) != 0, side - place, place)
        start = step.crop[:, 1 - axis].to(place.dtype).view(lead)
        along.append((place - start) * step.ratios()[axis].view(lead))
    return torch.stack(along, -1)


def _polygon_area(corners: Tensor) -> Tensor:
    """The areas (...) of polygons (..., K, 2)."""
    x, y = corners.unbind(-1)
    return 0.5 * (x * y.roll(-1, -1) - x.roll(-1, -1) * y).sum(-1).abs()


def _arithmetic(numbers: Tensor) -> torch.dtype:
    """The dtype to compute in. Of whole numbers it is torchvision's float32, because it cuts results off."""
    return number_dtype(numbers.device) if numbers.is_floating_point() else torch.float32
