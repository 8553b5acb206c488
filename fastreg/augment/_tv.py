"""torchvision's tensors: known by their class where somebody has loaded torchvision, which is not loaded for
it. Without it there are none.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from .._transforms import with_own_code

_KINDS = {
    "Image": "image",
    "Video": "image",
    "Mask": "masks",
    "BoundingBoxes": "boxes",
    "KeyPoints": "keypoints",
}
ROTATED = {"XYWHR": 5, "CXCYWHR": 5, "XYXYXYXY": 8}  # formats of turned boxes, and their numbers


def _tv_tensors() -> Any:
    """torchvision.tv_tensors where somebody has loaded it; without it there are no tensors of it."""
    return sys.modules.get("torchvision.tv_tensors")


def is_tv_tensor(value: Any) -> bool:
    """Whether it is one of torchvision's tensors."""
    module = None if type(value) is Tensor else _tv_tensors()
    return module is not None and isinstance(value, module.TVTensor)


def tv_kind(value: Any) -> str | None:
    """ "image", "masks", "boxes" or "keypoints"; None of what is no tensor of torchvision's."""
    if not is_tv_tensor(value):
        return None
    kind = next((_KINDS[c.__name__] for c in type(value).__mro__ if c.__name__ in _KINDS), None)
    if kind is None:
        raise TypeError(
            f"augment: of torchvision's tensors Image, Video, Mask, BoundingBoxes and KeyPoints are known, "
            f"got {type(value).__name__}; of what should stay as it is take .as_subclass(torch.Tensor)"
        )
    return kind


def is_video(value: Any) -> bool:
    """Whether it is torchvision's tensor of frames, which are augmented alike."""
    return is_tv_tensor(value) and any(c.__name__ == "Video" for c in type(value).__mro__)


def plain(value: Tensor) -> Tensor:
    """The tensor without torchvision's class."""
    return value.as_subclass(Tensor) if is_tv_tensor(value) else value


def wrapped(value: Tensor, like: Any, size: tuple[int, int] | None = None) -> Tensor:
    """A result as what it was before, of an image of (height, width)."""
    if not is_tv_tensor(like):
        return value
    about = {"canvas_size": size} if size is not None and hasattr(like, "canvas_size") else {}
    if value.dim() > 2 and hasattr(like, "format"):  # torchvision's constructor takes boxes (N, 4) only
        boxes = value.as_subclass(type(like))
        vars(boxes).update(vars(like) | about)
        return boxes
    module: Any = _tv_tensors()
    return module.wrap(value, like=like, **about)


_F = TypeVar("_F", bound=Callable[..., Any])


def of_images(function: _F) -> _F:
    """A function on images for torchvision's Image and Video, too, which come back as such; there is nothing
    that it would do to a Mask, to BoundingBoxes or to KeyPoints.
    """

    @functools.wraps(function)
    def on_any(inpt: Any, *args: Any, **kwargs: Any) -> Any:
        kind = tv_kind(inpt)
        if kind is None:
            return function(inpt, *args, **kwargs)
        if kind != "image":
            raise TypeError(
                f"{function.__name__}: inpt must be images, got {type(inpt).__name__}; leave it as it is"
            )
        result = function(plain(inpt), *args, **kwargs)
        return inpt if kwargs.get("inplace") else wrapped(result, inpt)

    return cast(_F, with_own_code(on_any))


def canvas_of(inpt: Tensor) -> tuple[int, int]:
    """(height, width) of the image that images, or one of torchvision's tensors, belong to."""
    height, width = getattr(inpt, "canvas_size", inpt.shape[-2:])
    return height, width


def _transforms() -> Any:
    """The functions of torchvision.transforms.v2, which is there, because its tensors are."""
    from torchvision.transforms.v2 import functional

    return functional


def is_turned(inpt: Any) -> bool:
    """Whether these are torchvision's boxes of a format that holds an angle or four corners."""
    return is_tv_tensor(inpt) and hasattr(inpt, "format") and inpt.format.value in ROTATED


def by_torchvision(name: str, *args: Any) -> Any:
    """torchvision's own function, for turned boxes, which have a rule of their own at each step."""
    return getattr(_transforms(), name)(*args)


def corners_of(boxes: Tensor, box_format: str) -> Tensor:
    """Turned boxes (..., 5) or (..., 8) as their corners (..., 4, 2)."""
    corners = boxes
    if box_format != "XYXYXYXY":
        corners = _transforms().convert_bounding_box_format(boxes, box_format, "XYXYXYXY")
    return corners.unflatten(-1, (4, 2))


def rectangles(corners: Tensor) -> Tensor:
    """The rectangle of each parallelogram (..., 4, 2), with its centre, along its longer side, and with its
    longer diagonal, as torchvision describes it.
    """
    one, two, three, four = corners.unbind(-2)
    centre, u, v = 0.5 * (one + three), two - one, four - one
    lengths = torch.stack([u.norm(dim=-1), v.norm(dim=-1)], -1)
    along = lengths[..., :1] >= lengths[..., 1:]
    long, other = torch.where(along, u, v), torch.where(along, v, u)
    direction = long / long.norm(dim=-1, keepdim=True).clamp(min=1e-30)
    inner = (direction * other).sum(-1, keepdim=True)
    across = other - inner * direction
    long = long + direction * inner.abs()
    u, v = torch.where(along, long, across), torch.where(along, across, long)
    half_u, half_v = 0.5 * u, 0.5 * v
    return torch.stack(
        [
            centre - half_u - half_v,
            centre + half_u - half_v,
            centre + half_u + half_v,
            centre - half_u + half_v,
        ],
        -2,
    )


def from_corners(
    corners: Tensor, box_format: str, size: tuple[int, int], clamping: str | None
) -> tuple[Tensor, Tensor]:
    """(boxes of a format, cut off by torchvision's rule at the edges of (height, width); their corners)."""
    transforms, flat = _transforms(), corners.flatten(-2)
    lead = flat.shape[:-1]
    flat = flat.reshape(-1, 8)
    if clamping is not None and len(flat):
        module: Any = _tv_tensors()
        kind = module.BoundingBoxFormat.XYXYXYXY
        flat = transforms.clamp_bounding_boxes(flat, kind, size, clamping_mode=clamping)
    boxes = flat
    if box_format != "XYXYXYXY":
        boxes = transforms.convert_bounding_box_format(flat, "XYXYXYXY", box_format)
    return boxes.reshape(*lead, boxes.shape[-1]), flat.reshape(*lead, 4, 2)


def rotated_of_crops(boxes: Tensor, box_format: str, step: Any, clamping: str | None) -> Tensor:
    """Turned boxes (B, N, 5) or (B, N, 8) after flips, a crop and its resize: torchvision cuts them off after
    both of the last, by a rule that knows the crop's own sides. This waits for a GPU.
    """
    if not boxes.numel():  # which torchvision's cut does not take
        return boxes
    module: Any = _tv_tensors()
    transforms, kind = _transforms(), module.BoundingBoxFormat[box_format]
    crops = step.crop.round().long().tolist()
    flips = [[False] * len(boxes) if f is None else (f != 0).tolist() for f in (step.hflip, step.vflip)]
    parts = []
    for part, crop, hflip, vflip in zip(boxes, crops, *flips, strict=True):
        if hflip:
            part = transforms.horizontal_flip_bounding_boxes(part, kind, step.in_size)
        if vflip:
            part = transforms.vertical_flip_bounding_boxes(part, kind, step.in_size)
        part, _ = transforms.resized_crop_bounding_boxes(
            part, kind, *crop, list(step.out_size), clamping_mode=clamping
        )
        parts.append(part)
    return torch.stack(parts)
