"""The single steps of augmentation under torchvision's functional names and argument order; every number may
be one per sample.

Images are (..., C, H, W), uint8 in [0, 255], or float32, float64, float16 or bfloat16 in [0, 1]. The result
has their dtype and memory format. A `Number` is a Python number, or a tensor of shape (B,) that gives one
value to each sample of (B, C, H, W). The results equal torchvision.transforms.v2.functional's within 1e-5
(geometry, blur, brightness) and 1e-4 (contrast, saturation, hue) of an image in [0, 1]; uint8 images are
rounded as there. All but `adjust_hue` are differentiable with respect to the images. A DTensor (B, C, H, W),
replicated or sharded over B, gives one placed as it is; numbers (B,) are those of all its samples.

Every function raises TypeError for another dtype and for what is no number, and ValueError for images of
fewer than three dimensions, for a number that is not finite or out of its range, and for a tensor whose
length is not the number of samples. The values of tensors on a GPU are not looked at: that would wait for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from .._checks import check_choice, check_number, check_tensor, is_int
from .._transforms import is_hidden
from . import _op, _tones
from ._arguments import Number, batched, numbers, pair
from ._geometry import Geometry, before_nearest, windows_of
from ._op import Interpolation, Padding, PerChannel
from ._parts import on_parts
from ._targets import moved_alone, values_known
from ._tone_op import OPERATIONS, toned
from ._tones import rgb_to_grayscale
from ._tv import by_torchvision, canvas_of, is_turned, of_images, plain, tv_kind, wrapped

__all__ = [
    "adjust_brightness",
    "adjust_contrast",
    "adjust_hue",
    "adjust_saturation",
    "adjust_sharpness",
    "affine",
    "autocontrast",
    "equalize",
    "erase",
    "gaussian_blur",
    "horizontal_flip",
    "invert",
    "normalize",
    "posterize",
    "resized_crop",
    "rgb_to_grayscale",
    "rotate",
    "solarize",
    "vertical_flip",
    "vertical_stretch",
]


def _augment(op: str, images: Tensor, **arguments: Any) -> Tensor:
    batch, lead = batched(op, images)
    output = _op.augment_batch(op, batch, **arguments)
    return output if len(lead) == 1 else output.reshape(*lead, *output.shape[1:])


def _matrices(images: Tensor, size: tuple[int, int] | None = None, **fields: Any) -> Tensor:
    """(B, 2, 3) inverse matrices of the named parameters, (B,) or (B, columns); the rest is neutral."""
    one = next(iter(fields.values()))
    return _op.matrices_of(one, images.shape[-2:], size or images.shape[-2:], **fields)


def check_interpolation(op: str, interpolation: Interpolation | Enum) -> Interpolation:
    """The name of an interpolation."""
    # The values of torchvision's enumeration are these names.
    name: Any = interpolation.value if isinstance(interpolation, Enum) else interpolation
    check_choice(op, "interpolation", name, _op.INTERPOLATIONS)
    return name


def _outside(fill: PerChannel | None) -> tuple[Padding, PerChannel]:
    """(padding, fill): torchvision's fill=None is zeros, which it does not blend as a fill value of 0."""
    return ("zeros", 0.0) if fill is None else ("fill", fill)


def _is_target(inpt: Any) -> bool:
    return tv_kind(inpt) not in (None, "image")


def _like(inpt: Tensor) -> Tensor:
    """Images of the shape that a target belongs to, without pixels of their own."""
    return plain(inpt).new_empty((), dtype=torch.float32).expand(1, 1, *canvas_of(inpt))


def _flipped(op: str, name: str, axis: int, inpt: Tensor) -> Tensor:
    check_tensor(op, "inpt", inpt)
    if tv_kind(inpt) in (None, "image", "masks"):
        return wrapped(plain(inpt).flip(axis), inpt)
    if is_turned(inpt):
        return by_torchvision(op, inpt)
    like = _like(inpt)
    on = _op.rows((1,), 1, like.device)[:, 0]
    step = Geometry(
        canvas_of(inpt),
        canvas_of(inpt),
        _op.matrices_of(like, canvas_of(inpt), canvas_of(inpt), **{name: on}),
        is_straight=True,
    )
    setattr(step, name, on)
    return moved_alone(inpt, step, clip=False)


@on_parts
def horizontal_flip(inpt: Tensor) -> Tensor:
    """Mirror left and right, images (..., W) of any dtype, or a Mask, BoundingBoxes or KeyPoints."""
    return _flipped("horizontal_flip", "hflip", -1, inpt)


@on_parts
def vertical_flip(inpt: Tensor) -> Tensor:
    """Mirror top and bottom, images (..., H, W) of any dtype, or a Mask, BoundingBoxes or KeyPoints."""
    return _flipped("vertical_flip", "vflip", -2, inpt)


@on_parts
def affine(
    inpt: Tensor,
    angle: Number,
    translate: Sequence[Number] | Tensor,
    scale: Number,
    shear: Number | Sequence[Number],
    interpolation: Interpolation | Enum = "nearest",
    fill: PerChannel | None = None,
    center: Sequence[float] | None = None,
) -> Tensor:
    """Rotate clockwise, scale and shear about the image's centre, then translate; the size stays.

    Args:
        angle: Number, degrees, clockwise.
        translate: pair of Numbers (x, y), pixels to the right and downwards; or a tensor (B, 2).
        scale: Number, greater than 0.
        shear: Number (along x) or pair of Numbers (along x, along y), degrees; or a tensor (B, 2).
        interpolation: "nearest", "bilinear" or "bicubic"; torchvision's InterpolationMode is understood.
        fill: what lies outside: None for zeros, a number, or one per channel. As in torchvision, a pixel that
            lies partly inside is m * (m-weighted sum of pixels) + (1 - m) * fill with its inner share m.
        center: (x, y) of the fixed point, from the upper left corner; None for the centre.

    Raises:
        ValueError: a number out of range or not finite, an unknown interpolation.
    """
    return _affine("affine", inpt, angle, translate, scale, shear, interpolation, fill, center)


def _affine(
    op, inpt, angle, translate, scale, shear, interpolation, fill, center, size: tuple[int, int] | None = None
) -> Tensor:
    like = _like(inpt) if _is_target(inpt) else plain(inpt)
    batched(op, like)
    interpolation = check_interpolation(op, interpolation)
    if not isinstance(shear, (list, tuple)) and not (isinstance(shear, Tensor) and shear.dim() == 2):
        shear = (shear, 0.0)
    fields = {
        "angle": numbers(op, "angle", angle, like),
        "translate": torch.stack([numbers(op, "translate", v, like) for v in pair(translate)], 1),
        "scale": numbers(op, "scale", scale, like, above=0),
        "shear": torch.stack([numbers(op, "shear", v, like) for v in pair(shear)], 1),
    }
    height, width = like.shape[-2:]
    if size is not None:  # a larger frame about the same centre is a crop that begins outside
        crop = ((height - size[0]) / 2, (width - size[1]) / 2, *size)
        fields["crop"] = _op.rows(crop, len(fields["angle"]), like.device)
    m = _matrices(like, size, **fields)
    if center is not None:  # M (x - d) + d instead of M x
        check_number(op, "center", center[0])
        check_number(op, "center", center[1])
        dx, dy = center[0] - width / 2, center[1] - height / 2
        for row, d in ((0, dx), (1, dy)):
            m[:, row, 2] += d - m[:, row, 0] * dx - m[:, row, 1] * dy
    if _is_target(inpt):
        step = Geometry((height, width), size or (height, width), m)
        if size is not None and tv_kind(inpt) != "masks":
            step.map = _expanded(_matrices(like, angle=fields["angle"]), height, width)
        return moved_alone(inpt, step, fill)
    padding, fill = _outside(fill)
    output = _augment(
        op, like, matrices=m, size=size, interpolation=interpolation, padding=padding, fill=fill
    )
    return wrapped(output, inpt)


def _expanded(matrices: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Where boxes and points go in a frame that the turned image just fits into: its corners begin at 0, as
    in torchvision, while the pixels lie about the middle of a frame of whole pixels.
    """
    linear, _shift = Geometry((height, width), (height, width), matrices).forward() or (matrices, matrices)
    ends = [(linear * linear.new_tensor([x, y])).sum(2) for x in (0, width) for y in (0, height)]
    return linear, -torch.stack(ends).amin(0)


@on_parts
def rotate(
    inpt: Tensor,
    angle: Number,
    interpolation: Interpolation | Enum = "nearest",
    expand: bool = False,
    center: Sequence[float] | None = None,
    fill: PerChannel | None = None,
) -> Tensor:
    """Rotate by `angle` degrees counter-clockwise, as torchvision's rotate (its affine turns the other way).

    Args:
        angle: Number, degrees, counter-clockwise.
        expand: enlarge the frame so that the whole image stays in it. Then `angle` is one number, and
            `center` is left out.

    Other arguments and errors as in `affine`.
    """
    op = "rotate"
    size: tuple[int, int] | None = None
    if expand:
        check_tensor(op, "inpt", inpt)
        check_number(op, "angle", angle)
        height, width = canvas_of(inpt)
        c, s = abs(math.cos(math.radians(angle))), abs(math.sin(math.radians(angle)))
        size = (_reached(height, height * c + width * s), _reached(width, width * c + height * s))
        if angle % 90 == 0:  # The corners lie on whole pixels, whatever rounding says.
            size = (height, width) if angle % 180 == 0 else (width, height)
        if center is not None:
            raise ValueError("rotate: expand=True keeps the centre; leave center out")
    negative = -angle if isinstance(angle, (int, float, Tensor)) else angle
    return _affine(op, inpt, negative, (0.0, 0.0), 1.0, 0.0, interpolation, fill, center, size)


def _reached(side: int, turned: float) -> int:
    """The whole pixels that the corners of a turned image reach, in thousandths, as torchvision counts."""
    return math.ceil(math.trunc((side + turned) * 500) / 1000) - math.floor(
        math.trunc((side - turned) * 500) / 1000
    )


@on_parts
def vertical_stretch(
    inpt: Tensor,
    factor: Number,
    *,
    interpolation: Interpolation | Enum = "bilinear",
    fill: PerChannel | None = None,
) -> Tensor:
    """Stretch the image by `factor` along its height, about its centre; the size stays.

    Args:
        factor: Number, greater than 0: above 1 the image becomes taller and is cut, below 1 it becomes
            flatter.

    Other arguments and errors as in `affine`. Source: dataset augmentation as taught, an affine map diag(1,
    factor).
    """
    op = "vertical_stretch"
    like = _like(inpt) if _is_target(inpt) else plain(inpt)
    batched(op, like)
    m = _matrices(like, stretch=numbers(op, "factor", factor, like, above=0))
    interpolation = check_interpolation(op, interpolation)
    if _is_target(inpt):
        return moved_alone(inpt, Geometry(canvas_of(inpt), canvas_of(inpt), m), fill)
    padding, fill = _outside(fill)
    output = _augment(op, like, matrices=m, interpolation=interpolation, padding=padding, fill=fill)
    return wrapped(output, inpt)


@on_parts
def resized_crop(
    inpt: Tensor,
    top: Number,
    left: Number,
    height: Number,
    width: Number,
    size: int | Sequence[int],
    interpolation: Interpolation | Enum = "bilinear",
    antialias: bool = True,
) -> Tensor:
    """Cut out a box and resize it to (..., C, *size).

    Args:
        top, left, height, width: whole Numbers, pixels; the box lies inside the image.
        size: (height, width) of the result, or one for both.
        interpolation: "nearest", "bilinear" or "bicubic"; torchvision's InterpolationMode is understood.
        antialias: where the box shrinks, widen the interpolation's triangle (or cubic) by as much, as torch's
            interpolate does.

    Raises:
        ValueError: a box that does not lie inside, sizes below 1.
    """
    op = "resized_crop"
    # What is given is checked, as far as the operator does not do it.
    given, inpt = inpt, _like(inpt) if _is_target(inpt) else plain(inpt)
    batched(op, inpt)
    interpolation = check_interpolation(op, interpolation)
    out_height, out_width = (int(v) for v in pair(size))
    if min(out_height, out_width) < 1:
        raise ValueError(f"{op}: size must be at least 1, got {(out_height, out_width)}")
    if not any(isinstance(v, Tensor) for v in (top, left, height, width)):  # the operator looks at tensors
        rows, columns = inpt.shape[-2:]
        is_inside = 0 <= top <= top + height <= rows and 0 <= left <= left + width <= columns
        if not (is_inside and height >= 1 and width >= 1):
            raise ValueError(
                f"{op}: the box must lie inside the image of ({rows}, {columns}), got top {top}, "
                f"left {left}, height {height}, width {width}"
            )
    box = [
        numbers(op, name, v, inpt)
        for name, v in (("top", top), ("left", left), ("height", height), ("width", width))
    ]
    # Targets: turned boxes are moved by torchvision, all others by the matrix.
    if is_turned(given):
        box_numbers = (int(v) for v in (top, left, height, width))
        return by_torchvision(op, given, *box_numbers, [out_height, out_width])
    if _is_target(given):
        crop = torch.stack(box, 1)
        m = _matrices(inpt, (out_height, out_width), crop=crop)
        whole = Geometry(canvas_of(given), (out_height, out_width), m, crop=crop, is_straight=True)
        return moved_alone(given, whole)
    # Images: the nearest pixel is cut out of the whole image, all else is read from a window of it.
    windows = torch.stack(box, 1).long()
    if interpolation == "nearest":
        images, lead = batched(op, inpt)
        crop = windows.to(box[0].dtype)
        inside = windows_of(crop, None, None, canvas_of(inpt))[1]
        if values_known(inside) and not bool(inside.all()):
            raise ValueError(
                f"{op}: the boxes must lie inside the images, got {windows[~inside][0].tolist()}"
            )
        m = _matrices(inpt, (out_height, out_width), crop=crop)
        whole = Geometry(canvas_of(inpt), (out_height, out_width), m, crop=crop, is_straight=True)
        output, _ = before_nearest(images, whole, "border", 0)
        return wrapped(output if len(lead) == 1 else output.reshape(*lead, *output.shape[1:]), given)
    m = torch.zeros(len(windows), 2, 3, dtype=box[0].dtype, device=inpt.device)
    for axis, (extent, out) in enumerate(((box[3], out_width), (box[2], out_height))):
        step = extent / out
        m[:, axis, axis] = step
        m[:, axis, 2] = 0.5 * step - 0.5
    output = _augment(
        op,
        inpt,
        matrices=m,
        size=(out_height, out_width),
        windows=windows,
        interpolation=interpolation,
        padding="border",
        antialias=bool(antialias),
    )
    return wrapped(output, given)


def _adjust(step: str, inpt: Tensor, factor: Number, **limits: float) -> Tensor:
    op = f"adjust_{step}"
    batched(op, inpt)
    channels = inpt.shape[-3]
    if channels not in (1, 3):
        raise ValueError(f"{op}: images must have 1 or 3 channels, got {channels}")
    return _augment(op, inpt, **_op.factors({step: numbers(op, f"{step}_factor", factor, inpt, **limits)}))


@on_parts
@of_images
def adjust_brightness(inpt: Tensor, brightness_factor: Number) -> Tensor:
    """clamp(factor * p) of images of 1 or 3 channels; the factor is at least 0."""
    return _adjust("brightness", inpt, brightness_factor, low=0)


@on_parts
@of_images
def adjust_contrast(inpt: Tensor, contrast_factor: Number) -> Tensor:
    """clamp(factor * p + (1 - factor) * mean of the image's grey) of images of 1 or 3 channels; the factor is
    at least 0.
    """
    return _adjust("contrast", inpt, contrast_factor, low=0)


@on_parts
@of_images
def adjust_saturation(inpt: Tensor, saturation_factor: Number) -> Tensor:
    """clamp(factor * p + (1 - factor) * grey), grey = 0.2989 r + 0.587 g + 0.114 b, of images of 3 channels;
    the factor is at least 0. Images of 1 channel stay as they are.
    """
    return _adjust("saturation", inpt, saturation_factor, low=0)


@on_parts
@of_images
def adjust_hue(inpt: Tensor, hue_factor: Number) -> Tensor:
    """Turn the hue of images of 3 channels by `hue_factor` of a full circle, in [-0.5, 0.5]. Images of 1
    channel stay as they are.

    Raises:
        ValueError: images of 3 channels that need a gradient, which hue does not have.
    """
    return _adjust("hue", inpt, hue_factor, low=-0.5, high=0.5)


@on_parts
@of_images
def gaussian_blur(
    inpt: Tensor,
    kernel_size: int | Sequence[int],
    sigma: Number | Sequence[Number] | None = None,
) -> Tensor:
    """Convolve with a Gaussian, the border reflected without repeating the edge.

    Args:
        kernel_size: odd number of pixels, or a pair (along x, along y).
        sigma: Number of pixels, at least 0, or a pair of Numbers (along x, along y), or a tensor (B, 2); None
            for 0.15 kernel_size + 0.35. A sigma of 0 leaves the image as it is.
    """
    op = "gaussian_blur"
    batched(op, inpt)
    kernel = check_kernel(op, kernel_size)
    pairs = [0.15 * k + 0.35 for k in kernel] if sigma is None else pair(sigma)
    sigma_x, sigma_y = (numbers(op, "sigma", s, inpt, low=0) for s in pairs)
    return _augment(op, inpt, blur=_op.augment_gaussian(sigma_x, sigma_y, *kernel), kernel=kernel)


def check_kernel(op: str, kernel_size: int | Sequence[int]) -> tuple[int, int]:
    """(pixels along x, along y), both odd."""
    kernel = pair(kernel_size)
    if len(kernel) != 2 or any(not is_int(k, int) or k < 1 or k % 2 == 0 for k in kernel):
        raise ValueError(f"{op}: kernel_size must be odd whole numbers of at least 1, got {kernel_size}")
    return kernel


@on_parts
@of_images
def erase(
    inpt: Tensor,
    i: Number,
    j: Number,
    h: Number,
    w: Number,
    v: PerChannel,
    inplace: bool = False,
) -> Tensor:
    """Set the box of height h and width w whose corner is row i, column j to v.

    Args:
        i, j, h, w: whole Numbers, pixels; what lies outside the image is cut off.
        v: in the images' units, a number, one per channel, or a tensor that broadcasts to the box (C, h, w).
        inplace: change the input and return it. Then, and where v is a tensor of pixels, all samples have one
            box.
    """
    op = "erase"
    batched(op, inpt)
    shaped = isinstance(v, Tensor) and v.dim() > 1 and v.shape[-2:].numel() > 1
    if inplace or shaped:
        if any(isinstance(n, Tensor) for n in (i, j, h, w)):
            raise ValueError(f"{op}: inplace=True and a v of pixels take one box for all samples")
        pixels: Any = v
        if isinstance(v, (list, tuple)) or (isinstance(v, Tensor) and v.dim() == 1):
            pixels = torch.as_tensor(v, device=inpt.device, dtype=inpt.dtype).view(-1, 1, 1)
        above, before, high, wide = (int(n) for n in (i, j, h, w))
        top, bottom = max(above, 0), min(above + high, inpt.shape[-2])
        left, right = max(before, 0), min(before + wide, inpt.shape[-1])
        output = inpt if inplace else inpt.clone()
        if top < bottom and left < right:
            if shaped:  # What lies outside of the image is cut off of the pixels, too.
                pixels = pixels.expand(*pixels.shape[:-2], high, wide)
                pixels = pixels[..., top - above : bottom - above, left - before : right - before]
            output[..., top:bottom, left:right] = pixels
        return output
    sides = [numbers(op, name, n, inpt) for name, n in (("i", i), ("j", j), ("h", h), ("w", w))]
    return _augment(op, inpt, boxes=torch.stack(sides, 1).long(), erase_value=v)


@on_parts
@of_images
def normalize(inpt: Tensor, mean: PerChannel, std: PerChannel, inplace: bool = False) -> Tensor:
    """(p - mean) / std per channel; uint8 images are divided by 255 first and become float32.

    Args:
        mean, std: one number, or one per channel, for images in [0, 1]; std is not 0.
        inplace: write the result into a floating-point input and return it.
    """
    op = "normalize"
    output = _augment(op, inpt, mean=mean, std=std)
    if not inplace:
        return output
    if not inpt.is_floating_point():
        raise TypeError(f"{op}: inplace=True needs floating-point images, got {inpt.dtype}")
    return inpt.copy_(output)


# ---- levels


def _is_stepped(op: str, images: Tensor) -> bool:
    """Whether the operator of policies takes the images, which it takes as bytes alone."""
    batched(op, images)
    takes = images.dtype == torch.uint8 and images.shape[-3] in (1, 3) and images.numel() > 0
    return takes and images.device.type in ("cpu", "cuda") and not is_hidden()


def _stepped(images: Tensor, step: str, strengths: Tensor | None = None) -> Tensor:
    """Bytes after one step of all samples, each of its own strength."""
    batch = images.reshape(-1, *images.shape[-3:])
    steps = torch.full((len(batch),), OPERATIONS.index(step), device=images.device)
    if strengths is None:
        strengths = torch.zeros(len(batch), dtype=torch.float64, device=images.device)
    return toned(batch, steps, strengths).view(images.shape)


@on_parts
@of_images
def invert(inpt: Tensor) -> Tensor:
    """1 - p, of uint8 255 - p."""
    if _is_stepped("invert", inpt):
        return _stepped(inpt, "Invert")
    return _tones.invert(inpt)


@on_parts
@of_images
def posterize(inpt: Tensor, bits: Number) -> Tensor:
    """Keep the upper `bits` bits of a pixel, in [0, 8]: of uint8 the others become 0; of floats
    min(floor(p 2^bits), 2^bits - 1) / 2^bits.

    Args:
        bits: whole Number.
    """
    if _is_stepped("posterize", inpt):
        kept = numbers("posterize", "bits", bits, inpt, low=0, high=8)
        return _stepped(inpt, "Posterize", kept)
    return _tones.posterize(inpt, bits)


@on_parts
@of_images
def solarize(inpt: Tensor, threshold: Number) -> Tensor:
    """Invert the pixels of at least `threshold`.

    Args:
        threshold: Number, in the images' units: at most 1, of uint8 at most 255.

    Raises:
        ValueError: a threshold above white.
    """
    if _is_stepped("solarize", inpt):
        least = numbers("solarize", "threshold", threshold, inpt, high=255)
        return _stepped(inpt, "Solarize", least / 255)
    return _tones.solarize(inpt, threshold)


@on_parts
@of_images
def autocontrast(inpt: Tensor) -> Tensor:
    """Stretch each channel of each image to the whole range from black to white; a channel of one value stays
    as it is. uint8 is rounded down, as in torchvision, so that white may become 254.
    """
    if _is_stepped("autocontrast", inpt):
        return _stepped(inpt, "AutoContrast")
    return _tones.autocontrast(inpt)


@on_parts
@of_images
def equalize(inpt: Tensor) -> Tensor:
    """Spread the values of each channel of each image evenly over the 256 levels, by its histogram: level i
    becomes (pixels below i + step // 2) // step, where step is a 255th of the pixels below the highest level
    that there is. A channel in which that is 0 stays as it is. Floats are counted in 256 levels, and are
    multiples of 1/255 afterwards.

    Not differentiable: the gradient is an error.
    """
    if _is_stepped("equalize", inpt):
        return _stepped(inpt, "Equalize")
    return _tones.equalize(inpt)


@on_parts
@of_images
def adjust_sharpness(inpt: Tensor, sharpness_factor: Number) -> Tensor:
    """clamp(factor * p + (1 - factor) * smooth) of the inner pixels, where smooth is a mean over a pixel and
    its neighbours in which the pixel counts 5 times: 0 smooths, 1 changes nothing, above 1 sharpens. The
    border stays as it is; the factor is at least 0.
    """
    if _is_stepped("adjust_sharpness", inpt):
        factor = numbers("adjust_sharpness", "sharpness_factor", sharpness_factor, inpt, low=0)
        return _stepped(inpt, "Sharpness", factor - 1)
    return _tones.adjust_sharpness(inpt, sharpness_factor)
