"""The single steps of augmentation under torchvision's functional names and argument order; every number may
be one per sample.

Images are (..., C, H, W), uint8 in [0, 255] or floating point in [0, 1]. Where an argument says "number", a
tensor of shape (B,) gives one value to each sample of (B, C, H, W). The results equal
torchvision.transforms.v2.functional's within 1e-5 (geometry, blur, brightness) and 1e-4 (contrast,
saturation, hue) of an image in [0, 1]; uint8 images are rounded as there. All but `adjust_hue` are
differentiable with respect to the images.
"""

import math

import torch

from .._checks import check_choice, check_number, check_tensor
from . import _op

DTYPES = (torch.uint8, torch.float32, torch.float64, torch.float16, torch.bfloat16)


def batched(op, images):
    """(images as (B, C, H, W), their leading shape)."""
    check_tensor(op, "images", images)
    if images.dtype not in DTYPES:
        raise TypeError(
            f"{op}: images must be uint8, float32, float64, float16 or bfloat16, got {images.dtype}; convert "
            f"them with .float()"
        )
    if images.dim() < 3:
        raise ValueError(f"{op}: images must be (..., channels, height, width), got {tuple(images.shape)}")
    lead = images.shape[:-3]
    return images if images.dim() == 4 else images.reshape(lead.numel(), *images.shape[-3:]), lead


def _run(op, images, **arguments):
    batch, lead = batched(op, images)
    output = _op.run(op, batch, **arguments)
    return output if len(lead) == 1 else output.reshape(*lead, *output.shape[1:])


def numbers(op, name, value, images, low=-math.inf, high=math.inf, above=None):
    """A float64 tensor (B,) of one number or one per sample, each in [low, high] and greater than `above`."""
    batch = images.shape[:-3].numel()
    if not isinstance(value, torch.Tensor):
        check_number(op, name, value, low, high)
        if abs(value) == math.inf or (above is not None and not value > above):
            raise ValueError(
                f"{op}: {name} must be finite{'' if above is None else f' and greater than {above}'}, got "
                f"{value}"
            )
        return torch.full((batch,), float(value), dtype=torch.float64, device=images.device)
    if value.is_complex():
        raise TypeError(f"{op}: {name} must be real, got {value.dtype}")
    value = value.detach().to(images.device, torch.float64)
    if value.numel() == 1:
        value = value.reshape(1).expand(batch)
    if value.shape != (batch,):
        raise ValueError(
            f"{op}: {name} must be a number or one for each of {batch} samples, got shape "
            f"{tuple(value.shape)}"
        )
    if value.device.type == "cpu" and not torch.compiler.is_compiling():
        good = (
            (value >= low) & (value <= high) & value.isfinite() & (True if above is None else value > above)
        )
        if not good.all():
            limits = f"in [{low:g}, {high:g}]" if above is None else f"greater than {above}"
            raise ValueError(f"{op}: {name} must be finite and {limits}, got {value[~good][0].item()}")
    return value.contiguous()


def pair(value):
    """(a, b) of a pair, or of one for both."""
    if isinstance(value, torch.Tensor) and value.dim() and value.shape[-1] == 2 and value.dim() <= 2:
        return value[..., 0], value[..., 1]
    if isinstance(value, (list, tuple)):
        return (value[0], value[0]) if len(value) == 1 else tuple(value)
    return value, value


def _matrices(images, size=None, **fields):
    """(B, 2, 3) inverse matrices of the named parameters, float64 of (B,) or (B, columns); the rest neutral."""
    return _op.augment_matrices(
        next(iter(fields.values())), images.shape[-2:], size or images.shape[-2:], **fields
    )


def _check_interpolation(op, interpolation):
    name = getattr(interpolation, "value", interpolation)  # torchvision's enumeration has its names as values
    check_choice(op, "interpolation", name, _op.INTERPOLATIONS)
    return name


def _outside(fill):
    """(padding, fill): torchvision's fill=None is zeros, which it blends otherwise than a fill value of 0."""
    return ("zeros", 0.0) if fill is None else ("fill", fill)


def horizontal_flip(inpt):
    """Mirror left and right."""
    check_tensor("horizontal_flip", "inpt", inpt)
    return inpt.flip(-1)


def vertical_flip(inpt):
    """Mirror top and bottom."""
    check_tensor("vertical_flip", "inpt", inpt)
    return inpt.flip(-2)


def affine(inpt, angle, translate, scale, shear, interpolation="nearest", fill=None, center=None):
    """Rotate by `angle` degrees clockwise, scale, shear, then translate, about the image's centre; the size
    stays.

    Args:
        angle: number, degrees, clockwise.
        translate: pair of numbers (x, y), pixels to the right and downwards; or a tensor (B, 2).
        scale: number, greater than 0.
        shear: number (along x) or pair of numbers (along x, along y), degrees; or a tensor (B, 2).
        interpolation: "nearest", "bilinear" or "bicubic"; torchvision's InterpolationMode is understood.
        fill: what lies outside: None for zeros, a number, or one per channel. As in torchvision, a pixel that
            lies partly inside is m * (m-weighted sum of pixels) + (1 - m) * fill with its inner share m.
        center: (x, y) of the fixed point, from the upper left corner; None for the centre.

    Raises:
        ValueError: a number out of range or not finite, an unknown interpolation.
    """
    return _affine("affine", inpt, angle, translate, scale, shear, interpolation, fill, center)


def _affine(op, inpt, angle, translate, scale, shear, interpolation, fill, center, size=None):
    batched(op, inpt)
    interpolation = _check_interpolation(op, interpolation)
    if not isinstance(shear, (list, tuple)) and not (isinstance(shear, torch.Tensor) and shear.dim() == 2):
        shear = (shear, 0.0)
    fields = {
        "angle": numbers(op, "angle", angle, inpt),
        "translate": torch.stack([numbers(op, "translate", v, inpt) for v in pair(translate)], 1),
        "scale": numbers(op, "scale", scale, inpt, above=0),
        "shear": torch.stack([numbers(op, "shear", v, inpt) for v in pair(shear)], 1),
    }
    height, width = inpt.shape[-2:]
    if size is not None:  # a larger frame about the same centre is a crop that begins outside
        crop = ((height - size[0]) / 2, (width - size[1]) / 2, *size)
        fields["crop"] = _op.rows(crop, len(fields["angle"]), inpt.device)
    m = _matrices(inpt, size, **fields)
    if center is not None:  # M (x - d) + d instead of M x
        check_number(op, "center", center[0])
        check_number(op, "center", center[1])
        dx, dy = center[0] - width / 2, center[1] - height / 2
        for row, d in ((0, dx), (1, dy)):
            m[:, row, 2] += d - m[:, row, 0] * dx - m[:, row, 1] * dy
    padding, fill = _outside(fill)
    return _run(op, inpt, matrices=m, size=size, interpolation=interpolation, padding=padding, fill=fill)


def rotate(inpt, angle, interpolation="nearest", expand=False, center=None, fill=None):
    """Rotate by `angle` degrees counter-clockwise, as torchvision's rotate (its affine turns the other way).

    Args:
        angle: number, degrees, counter-clockwise.
        expand: enlarge the frame so that the whole image stays in it; `angle` is one number then.

    Other arguments and errors as in `affine`.
    """
    op = "rotate"
    size = None
    if expand:
        check_number(op, "angle", angle)
        height, width = inpt.shape[-2:]
        c, s = abs(math.cos(math.radians(angle))), abs(math.sin(math.radians(angle)))
        size = tuple(
            math.ceil(math.trunc((side + turned) * 500) / 1000)
            - math.floor(math.trunc((side - turned) * 500) / 1000)
            for side, turned in ((height, height * c + width * s), (width, width * c + height * s))
        )  # whole pixels that the corners reach, in thousandths, as torchvision counts
        if center is not None:
            raise ValueError("rotate: expand=True keeps the centre; leave center out")
    negative = -angle if isinstance(angle, (int, float, torch.Tensor)) else angle
    return _affine(op, inpt, negative, (0.0, 0.0), 1.0, 0.0, interpolation, fill, center, size)


def vertical_stretch(inpt, factor, interpolation="bilinear", fill=None):
    """Stretch the image by `factor` along its height, about its centre; the size stays.

    Args:
        factor: number, greater than 0: above 1 the image becomes taller and is cut, below 1 it becomes
            flatter.

    Other arguments and errors as in `affine`. Source: dataset augmentation as taught, an affine map diag(1,
    factor).
    """
    op = "vertical_stretch"
    batched(op, inpt)
    m = _matrices(inpt, stretch=numbers(op, "factor", factor, inpt, above=0))
    padding, fill = _outside(fill)
    return _run(
        op,
        inpt,
        matrices=m,
        interpolation=_check_interpolation(op, interpolation),
        padding=padding,
        fill=fill,
    )


def resized_crop(inpt, top, left, height, width, size, interpolation="bilinear", antialias=True):
    """Cut out a box and resize it.

    Args:
        top, left, height, width: whole numbers, or tensors (B,); the box lies inside the image.
        size: (height, width) of the result, or one for both.
        interpolation: "nearest", "bilinear" or "bicubic".
        antialias: where the box shrinks, widen the interpolation's triangle (or cubic) by as much, as torch's
            interpolate does.

    Raises:
        ValueError: a box that does not lie inside, sizes below 1.
    """
    op = "resized_crop"
    batched(op, inpt)
    interpolation = _check_interpolation(op, interpolation)
    size = tuple(int(v) for v in pair(size))
    if min(size) < 1:
        raise ValueError(f"{op}: size must be at least 1, got {size}")
    if not any(
        isinstance(v, torch.Tensor) for v in (top, left, height, width)
    ):  # a GPU's tensors are not looked at
        rows, columns = inpt.shape[-2:]
        if not (
            0 <= top <= top + height <= rows
            and 0 <= left <= left + width <= columns
            and height >= 1
            and width >= 1
        ):
            raise ValueError(
                f"{op}: the box must lie inside the image of ({rows}, {columns}), got top {top}, left "
                f"{left}, height {height}, "
                f"width {width}"
            )
    box = [
        numbers(op, name, v, inpt)
        for name, v in (("top", top), ("left", left), ("height", height), ("width", width))
    ]
    windows = torch.stack(box, 1).long()
    m = torch.zeros(len(windows), 2, 3, dtype=torch.float64, device=inpt.device)
    # torch's nearest takes pixel floor(x * step), every other interpolation has centre on centre.
    nudge = -0.5 + 2**-20 if interpolation == "nearest" else None
    for axis, (extent, out) in enumerate(((box[3], size[1]), (box[2], size[0]))):
        step = extent / out
        m[:, axis, axis] = step
        m[:, axis, 2] = 0.5 * step - 0.5 if nudge is None else nudge
    antialias = bool(antialias) and interpolation != "nearest"
    return _run(
        op,
        inpt,
        matrices=m,
        size=size,
        windows=windows,
        interpolation=interpolation,
        padding="border",
        antialias=antialias,
    )


def _adjust(step, inpt, factor, **limits):
    op = f"adjust_{step}"
    _, _ = batched(op, inpt)
    channels = inpt.shape[-3]
    if channels not in (1, 3):
        raise ValueError(f"{op}: images must have 1 or 3 channels, got {channels}")
    return _run(op, inpt, **_op.factors({step: numbers(op, f"{step}_factor", factor, inpt, **limits)}))


def adjust_brightness(inpt, brightness_factor):
    """clamp(factor * p); factor is a number of at least 0."""
    return _adjust("brightness", inpt, brightness_factor, low=0)


def adjust_contrast(inpt, contrast_factor):
    """clamp(factor * p + (1 - factor) * mean of the image's grey); factor is a number of at least 0."""
    return _adjust("contrast", inpt, contrast_factor, low=0)


def adjust_saturation(inpt, saturation_factor):
    """clamp(factor * p + (1 - factor) * grey), grey = 0.2989 r + 0.587 g + 0.114 b; factor is a number of at
    least 0.
    """
    return _adjust("saturation", inpt, saturation_factor, low=0)


def adjust_hue(inpt, hue_factor):
    """Turn the hue by `hue_factor` of a full circle, a number in [-0.5, 0.5]. It has no gradient: an error
    says so.
    """
    return _adjust("hue", inpt, hue_factor, low=-0.5, high=0.5)


def gaussian_blur(inpt, kernel_size, sigma=None):
    """Convolve with a Gaussian, the border reflected without repeating the edge.

    Args:
        kernel_size: odd number of pixels, or a pair (along x, along y).
        sigma: number, or pair of numbers (along x, along y); None for 0.15 kernel_size + 0.35. A sigma of 0
            leaves the image as it is. A tensor has shape (B,), or (B, 2).
    """
    op = "gaussian_blur"
    batched(op, inpt)
    kernel = check_kernel(op, kernel_size)
    sigmas = [0.15 * k + 0.35 for k in kernel] if sigma is None else pair(sigma)
    sigmas = [numbers(op, "sigma", s, inpt, low=0) for s in sigmas]
    return _run(op, inpt, blur=_op.augment_gaussian(*sigmas, *kernel), kernel=kernel)


def check_kernel(op, kernel_size):
    """(along x, along y), both odd."""
    kernel = pair(kernel_size)
    if len(kernel) != 2 or any(
        not isinstance(k, int) or isinstance(k, bool) or k < 1 or k % 2 == 0 for k in kernel
    ):
        raise ValueError(f"{op}: kernel_size must be odd whole numbers of at least 1, got {kernel_size}")
    return kernel


def erase(inpt, i, j, h, w, v, inplace=False):
    """Set the box of height h and width w whose corner is row i, column j to v.

    Args:
        i, j, h, w: whole numbers, or tensors (B,); what lies outside of the image is cut off.
        v: number, or one per channel, or a tensor that broadcasts to the box (C, h, w).
        inplace: change the input.
    """
    op = "erase"
    batched(op, inpt)
    shaped = isinstance(v, torch.Tensor) and v.dim() > 1 and v.shape[-2:].numel() > 1
    if inplace or shaped:
        if any(isinstance(n, torch.Tensor) for n in (i, j, h, w)):
            raise ValueError(f"{op}: inplace=True and a v of pixels take one box for all samples")
        if isinstance(v, (list, tuple)) or (isinstance(v, torch.Tensor) and v.dim() == 1):
            v = torch.as_tensor(v).to(inpt.device, inpt.dtype).view(-1, 1, 1)
        output = inpt if inplace else inpt.clone()
        output[..., i : i + h, j : j + w] = v
        return output
    box = [numbers(op, name, n, inpt) for name, n in (("i", i), ("j", j), ("h", h), ("w", w))]
    return _run(op, inpt, boxes=torch.stack(box, 1).long(), erase_value=v)


def normalize(inpt, mean, std, inplace=False):
    """(p - mean) / std per channel; uint8 images count in units of 255 and become float32.

    Args:
        mean, std: one number, or one per channel; std is not 0.
        inplace: write the result into a floating-point input.
    """
    op = "normalize"
    output = _run(op, inpt, mean=mean, std=std)
    if not inplace:
        return output
    if not inpt.is_floating_point():
        raise TypeError(f"{op}: inplace=True needs floating-point images, got {inpt.dtype}")
    return inpt.copy_(output)
