"""The pure function that augments images, and what belongs to them, by given parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from enum import Enum
from typing import Any, overload

import torch
from torch import Tensor

from .._transforms import is_hidden, may_look
from . import _op, _policies, _tones
from ._arguments import batched
from ._geometry import Geometry, before_nearest, inside_windows, windows_of
from ._params import COUNTED, FIELDS, SETTINGS, Params, Settings
from ._targets import Augmented, BoxFormat, Targets, values_known

TensorOrList = Tensor | Sequence[Tensor]


def options_of(settings: Settings) -> dict[str, Any]:
    """The settings as arguments by name. torch.compile of torch 2.10 cannot spread vars(settings)."""
    return {name: getattr(settings, name) for name in SETTINGS}


@overload
def apply(images: Tensor, params: Params) -> Tensor: ...


@overload
def apply(
    images: Tensor,
    params: Params,
    *,
    masks: TensorOrList | None = ...,
    boxes: TensorOrList | None = ...,
    keypoints: TensorOrList | None = ...,
    counts: Tensor | Sequence[int] | None = ...,
    visible: TensorOrList | None = ...,
    box_format: BoxFormat | Enum = ...,
    mask_fill: float | None = ...,
    min_area: float = ...,
    min_visibility: float = ...,
    flip_permutation: Sequence[int] | None = ...,
) -> Augmented: ...


def apply(
    images: Tensor,
    params: Params,
    *,
    masks: TensorOrList | None = None,
    boxes: TensorOrList | None = None,
    keypoints: TensorOrList | None = None,
    counts: Tensor | Sequence[int] | None = None,
    visible: TensorOrList | None = None,
    box_format: BoxFormat | Enum = "XYXY",
    mask_fill: float | None = None,
    min_area: float = 0.0,
    min_visibility: float = 0.0,
    flip_permutation: Sequence[int] | None = None,
) -> Tensor | Augmented:
    """Augment images, and their targets, with given parameters, `angle` clockwise; pure, and differentiable
    with respect to the images, except for hue, and to boxes and key points.

    Args:
        images: (B, C, H, W), or (C, H, W) with parameters of one sample; uint8 in [0, 255], or float32,
            float64, float16 or bfloat16 in [0, 1].
        params: `Params`, of `Augment.sample` or made by hand.
        masks: (B, H, W) or (B, N, H, W) of any real dtype, or a list of one (H, W) or (N, H, W) for each
            sample; of one image (C, H, W) without the B. They take the nearest pixel.
        boxes: (B, N, 4), padded, or a list of (N, 4); in pixels, of whole or floating-point numbers. A box
            becomes the box around its four moved corners, cut off at the edges of the result.
        keypoints: (B, ..., K, 2), pairs (x, y), or a list of (..., K, 2); or of 3, the last of which is 0 for
            what is not visible, and becomes 0 for what leaves the image. They are not cut off.
        counts: whole numbers (B,), how many of the boxes (B, N, 4) a sample has; the rest stay as they are.
        visible: of the key points' shape without the last dimension; 0 or False for what is not visible.
        box_format: "XYXY", "XYWH" or "CXCYWH", or torchvision's BoundingBoxFormat.
        mask_fill: what masks hold outside of the image; None for 0, or for what padding="border" and
            "reflect" put there.
        min_area, min_visibility: what must be left of a box in the result: pixels, and the share of the moved
            box that is not cut off.
        flip_permutation: which key point takes the place of each where a sample was mirrored, such as left
            and right hands; a permutation of range(K).

    Returns:
        (B, C, *size), in the images' memory format. float32 for uint8 images that are normalised, else of the
        images' dtype, or `settings.dtype`. Arithmetic is float32 (float64 for float64) and rounded once; only
        where uint8 stays uint8 each step rounds as torchvision's. With targets, an `Augmented` of the images
        and of what became of them, each of its own dtype and shape: whole numbers are cut off, as torchvision
        does. A box of no area, or with a coordinate that is NaN, is not left; a NaN stays where it is. A key
        point of NaN or infinity is not visible, and infinity may become NaN.

    Raises:
        ValueError: images that are no images, parameters of another batch size, contrast, saturation or hue
            with other than 1 or 3 channels, hue of images that need a gradient, a matrix that is not finite
            or leads further than 2^30 pixels away (on a GPU, which that would make us wait for, the sample
            becomes NaN, or 0 in uint8); targets whose shape or device does not fit the images, an unknown
            format, a fill that masks cannot hold, no permutation.
        TypeError: another dtype, targets that are no tensors.
        RuntimeError: in backward on a GPU under `torch.use_deterministic_algorithms(True)`, because the
            gradient is added up in no fixed order there.
    """
    targets = Targets(
        masks, boxes, keypoints, counts, visible, box_format, mask_fill, min_area, min_visibility,
        flip_permutation,
    )  # fmt: skip
    return applied(images, params, targets)


def _counted(images: Tensor, params: Params) -> Params:
    """Parameters that say how many samples there are; with only a size, the whole image is the crop."""
    if params.settings.size is None or any(getattr(params, name) is not None for name in COUNTED):
        return params
    box = (0, 0, *images.shape[-2:])
    return dataclasses.replace(params, crop=_op.rows(box, images.shape[:-3].numel(), images.device))


def _resizing(params: Params, images: Tensor) -> Params | None:
    """The parameters of a resize that comes before all else, where there is one."""
    settings, (height, width) = params.settings, images.shape[-2:]
    size = settings.resized(height, width)
    if size == (height, width):
        return None
    how = {name: getattr(settings, name) for name in ("interpolation", "antialias")}
    box = _op.rows((0, 0, height, width), images.shape[:-3].numel(), images.device)
    return Params(crop=box, settings=Settings(size=size, padding="border", **how))


def steps_of(images: Tensor, params: Params) -> list[Geometry]:
    """The resamplings of images (B, C, H, W) or (C, H, W), one after the other."""
    steps, resizing = [], _resizing(params, images)
    if resizing is not None:
        steps.append(Geometry.of(resizing, *images.shape[-2:]))
        images = images.new_empty(()).expand(*images.shape[:-2], *steps[0].out_size)
    params = _counted(images, params)
    steps.append(Geometry.of(params, *images.shape[-2:]))
    if params.operations is None:
        return steps
    return [*steps, *_policies.steps_of(params, *steps[-1].out_size)]


_WIDE = {"translate": (2,), "shear": (2,), "crop": (4,), "erase": (4,)}


def _checked(params: Params, count: int) -> Params:
    """Parameters of so many samples, each in the dtype that the operators take."""
    changed: dict[str, Any] = {}
    for name in FIELDS:
        value, wanted = getattr(params, name), (count, *_WIDE.get(name, ()))
        if value is None:
            continue
        if not isinstance(value, Tensor) or value.is_complex():
            got = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(
                f"augment: {name} of params must be a tensor {wanted} of real numbers, got {got}; make one "
                f"with torch.tensor"
            )
        if value.dim():
            _check_count(name, value, count)
        if value.shape != wanted:
            raise ValueError(
                f"augment: {name} of params must be of shape {wanted}, got {tuple(value.shape)}; sample anew"
            )
        if name == "erase":
            if value.is_floating_point():
                raise TypeError(
                    f"augment: erase of params must be whole numbers, got {value.dtype}; take .long()"
                )
            changed[name] = value.long().contiguous()
        else:
            changed[name] = value.to(_op.number_dtype(value.device))
    for name in ("operations", "magnitudes"):
        value = getattr(params, name)
        if value is not None:
            _check_count(name, value, count)
    return dataclasses.replace(params, **changed)


def _check_count(name: str, value: Tensor, count: int) -> None:
    """Raise unless a parameter is of so many samples."""
    if len(value) != count:
        raise ValueError(
            f"augment: params are of {len(value)} samples ({name}), images of {count}; sample anew"
        )


def _check_operations(params: Params) -> None:
    operations, magnitudes = params.operations, params.magnitudes
    if operations is None and magnitudes is None:
        return
    if (
        operations is None
        or magnitudes is None
        or operations.shape != magnitudes.shape
        or operations.dim() != 2
    ):
        shapes = [None if v is None else tuple(v.shape) for v in (operations, magnitudes)]
        raise ValueError(
            f"augment: operations and magnitudes of params must both be of shape (B, n), got {shapes[0]} and "
            f"{shapes[1]}"
        )
    if operations.is_floating_point() or operations.is_complex() or operations.dtype == torch.bool:
        raise TypeError(
            f"augment: operations of params must be whole numbers, places in OPERATIONS, got "
            f"{operations.dtype}; take .long()"
        )
    if may_look(operations):
        if not bool(magnitudes.isfinite().all()):
            raise ValueError("augment: magnitudes of params must be finite, got inf or NaN; sample anew")
        most = len(_policies.OPERATIONS) - 1
        if bool(((operations < 0) | (operations > most)).any()):
            raise ValueError(f"augment: operations of params must be in [0, {most}], see OPERATIONS")


def _images(batch: Tensor, params: Params) -> Tensor:
    """The images of `apply`."""
    resizing = _resizing(params, batch)
    if resizing is not None:
        batch = _images(batch, resizing)
    settings = dataclasses.replace(params.settings, resize=None)
    params = _counted(batch, dataclasses.replace(params, settings=settings))
    colour = {name: value for name in _op.STEPS if (value := getattr(params, name)) is not None}
    check_units(batch, settings, len(colour) > 0 or params.operations is not None)
    bare = dataclasses.replace(settings, mean=None, std=None, erase_value=None, dtype=None)
    last = dataclasses.replace(
        settings, size=None, kernel=(1, 1), antialias=False, padding="zeros", interpolation="nearest"
    )
    if params.operations is not None:
        # What normalises and erases comes after the operations, as in recipes of torchvision's.
        first = dataclasses.replace(params, operations=None, magnitudes=None, erase=None, settings=bare)
        if settings.size is not None or any(getattr(first, name) is not None for name in FIELDS):
            batch = _images(batch, first)
        batch = _policies.operated(batch, params)
        params, colour = Params(erase=params.erase, settings=last), {}
        if params.erase is None and last.mean is None and last.std is None and last.dtype is None:
            return batch
    elif params.grayscale is not None:
        # It comes between the colours and the blur.
        first = dataclasses.replace(params, grayscale=None, sigma=None, erase=None, settings=bare)
        batch = _images(batch, first)
        if batch.shape[1] != 1:
            grey = _tones.rgb_to_grayscale(batch, 3)
            batch = torch.where(params.grayscale.view(-1, 1, 1, 1) != 0, grey, batch)
        last = dataclasses.replace(last, kernel=settings.kernel)
        params, colour = Params(erase=params.erase, sigma=params.sigma, settings=last), {}
    sigma = params.sigma
    blur = None if sigma is None else _op.augment_gaussian(sigma, sigma, *settings.kernel)
    arguments = options_of(settings) | _op.factors(colour) | {"blur": blur, "boxes": params.erase}
    if settings.interpolation == "nearest":
        geometry = Geometry.of(params, *batch.shape[2:])
        batch, matrices = before_nearest(batch, geometry, settings.padding, settings.fill)
        arguments |= {"matrices": matrices, "size": None if matrices is None else settings.size}
    else:
        arguments["matrices"] = params.matrices(*batch.shape[2:])
    if settings.interpolation != "nearest" and params.crop is not None and not params.moves():
        return _cropped(batch, params, arguments)
    return _op.augment_batch("augment", batch, **arguments)


def _cropped(images: Tensor, params: Params, arguments: dict[str, Any]) -> Tensor:
    """Images of which a crop is resized. Of a crop that lies in the image nothing outside is looked at: its
    border is repeated, as torchvision's resized_crop does. Of another one the padding counts.
    """
    assert params.crop is not None
    windows, inside = windows_of(params.crop, params.hflip, params.vflip, images.shape[2:])
    own = arguments | {
        "matrices": inside_windows(arguments["matrices"], windows), "windows": windows, "padding": "border"
    }  # fmt: skip
    if params.settings.padding == "border" or (values_known(inside) and bool(inside.all())):
        return _op.augment_batch("augment", images, **own)
    padded = _op.augment_batch("augment", images, **arguments)
    if values_known(inside) and not bool(inside.any()):
        return padded
    return torch.where(inside.view(-1, 1, 1, 1), _op.augment_batch("augment", images, **own), padded)


def applied(images: Tensor, params: Params, targets: Targets) -> Any:
    """`apply` with the targets as one."""
    op = "augment"
    batch, lead = batched(op, images)
    if len(lead) > 1:
        raise ValueError(f"{op}: images must be (B, C, H, W) or (C, H, W), got {tuple(images.shape)}")
    params = _checked(params, len(batch))
    has_targets = targets.given()
    if has_targets:
        targets.check(batch, len(lead))
    _check_operations(params)
    output = _images(batch, params)
    steps = steps_of(batch, params) if has_targets else []
    output = output if lead else output.squeeze(0)
    return targets.moved(output, steps, not lead) if has_targets else output


def check_units(images: Tensor, settings: Settings, coloured: bool) -> None:
    """Raise where pixels from 0 to 255 meet steps that are for images in [0, 1].

    Pixels on a GPU are not looked at, because that would wait for it.
    """
    op = "augment"
    means = settings.mean if isinstance(settings.mean, tuple) else (settings.mean or 0.0,)
    large = max(means) > 1  # They are for pixels from 0 to 255.
    if images.dtype == torch.uint8:
        if large:
            raise ValueError(
                f"{op}: mean and std are for images in [0, 1], to which uint8 images are scaled first, got "
                f"mean={settings.mean}; divide both by 255"
            )
        return
    normalised = not large and (settings.mean is not None or settings.std is not None)
    if not (coloured or normalised) or images.device.type != "cpu" or not images.numel():
        return
    if is_hidden():
        return
    # Four images of the batch tell as much as all, for a fraction of the time.
    least, largest = images.detach()[:: (len(images) + 3) // 4].aminmax()
    if least >= 0 and 2 < largest <= 65535:
        raise ValueError(
            f"{op}: floating-point images must be in [0, 1] for changes of colour, mean and std, got values "
            f"up to {largest.item():g}; divide them by 255, or give uint8"
        )
