"""The operators behind `fastreg.augment`: schemas, fake kernels, autograd, and one function that calls them.

Their definitions in plain torch are in _plain.py and _plain_draw.py, the formulas of the kernels in
csrc/augment/augment_math.h and augment_draw.h. `matrices` (B, 2, 3) map an output pixel to its place in the
source, pixel centres at whole numbers; `constants` are fill, erased value, scale and shift of each channel, in
this order.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .._registry import define
from . import _plain, _plain_draw
from ._plain import INTERPOLATIONS, PADDINGS, like_images
from ._plain_draw import COLUMNS, STEPS, number_dtype

GEOMETRY = {"stretch", "scale", "angle", "shear_x"}  # columns that make a matrix

_ARGUMENTS = (
    "Tensor images, Tensor? matrices, Tensor? colour, Tensor? blur, Tensor? boxes, Tensor? windows, "
    "float[] constants, SymInt height, SymInt width, int blur_width, int blur_height, int colour_steps, "
    "int interpolation, int padding, bool antialias, bool normalise, ScalarType dtype"
)
define(f"augment({_ARGUMENTS}) -> Tensor", _plain.augment)
define(f"augment_backward(Tensor grad, {_ARGUMENTS}) -> Tensor", _plain.augment_backward)
define(
    "augment_draw(Tensor images, Tensor seed, int offset, SymInt batch, float[] chances, float[] low, "
    "float[] high, int crop, float[] crop_box, float[] erase_box, SymInt[] sizes, int blur_width, "
    "int blur_height) -> (Tensor table, Tensor matrices, Tensor colour, Tensor blur, Tensor boxes)",
    _plain_draw.augment_draw,
)
define(
    "augment_matrices(Tensor like, Tensor? hflip, Tensor? vflip, Tensor? stretch, Tensor? scale, "
    "Tensor? angle, Tensor? translate, Tensor? shear, Tensor? crop, SymInt in_height, SymInt in_width, "
    "SymInt out_height, SymInt out_width) -> Tensor",
    _plain_draw.augment_matrices,
)
define(
    "augment_gaussian(Tensor sigma_x, Tensor sigma_y, int width, int height) -> Tensor",
    _plain_draw.augment_gaussian,
)


@torch.library.register_fake("fastreg::augment")
def _(images, matrices, colour, blur, boxes, windows, constants, height, width, *static):
    return like_images(images, height, width, static[-1])


@torch.library.register_fake("fastreg::augment_backward")
def _(grad, images, *rest):
    return like_images(images, images.shape[2], images.shape[3], images.dtype)


@torch.library.register_fake("fastreg::augment_draw")
def _(images, seed, offset, batch, *rest):
    shapes = ((batch, len(COLUMNS)), (batch, 2, 3), (batch, len(STEPS)), (batch, rest[-2] + rest[-1]))
    tables = (images.new_empty(shape, dtype=number_dtype(images.device)) for shape in shapes)
    return *tables, images.new_empty((batch, 4), dtype=torch.int64)


@torch.library.register_fake("fastreg::augment_matrices")
def _(like, *rest):
    return like.new_empty((like.shape[0], 2, 3), dtype=number_dtype(like.device))


@torch.library.register_fake("fastreg::augment_gaussian")
def _(sigma_x, sigma_y, width, height):
    return sigma_x.new_empty((sigma_x.shape[0], width + height), dtype=sigma_x.dtype)


_augment = torch.ops.fastreg.augment.default
_augment_backward = torch.ops.fastreg.augment_backward.default
augment_draw = torch.ops.fastreg.augment_draw.default
augment_gaussian = torch.ops.fastreg.augment_gaussian.default  # weights along x, then along y, each of sum 1


def augment_matrices(like, in_size, out_size, *, hflip=None, vflip=None, stretch=None, scale=None, angle=None, translate=None,
                     shear=None, crop=None):  # fmt: skip
    """(B, 2, 3) float64 matrices of float64 parameters on the device of `like`, of which there are B; None is
    neutral.
    """
    parameters = (hflip, vflip, stretch, scale, angle, translate, shear, crop)
    return torch.ops.fastreg.augment_matrices.default(like, *parameters, *in_size, *out_size)


class _Augment(torch.autograd.Function):
    @staticmethod
    def forward(ctx, images, matrices, colour, blur, boxes, windows, *static):
        ctx.save_for_backward(images, matrices, colour, blur, boxes, windows)
        ctx.static = static
        return _augment(images, matrices, colour, blur, boxes, windows, *static)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        if grad.is_cuda and torch.are_deterministic_algorithms_enabled():
            message = (
                "augment: on a GPU the images' gradient is added up in no fixed order, so that its last bits "
                "vary; "
                "use torch.use_deterministic_algorithms(True, warn_only=True), or augment on the CPU"
            )
            if not torch.is_deterministic_algorithms_warn_only_enabled():
                raise RuntimeError(message)
            warnings.warn(message, stacklevel=2)
        return _augment_backward(grad, *ctx.saved_tensors, *ctx.static), *(None,) * (5 + len(ctx.static))


def run(
    op,
    images,
    *,
    matrices=None,
    size=None,
    windows=None,
    colour=None,
    steps=0,
    blur=None,
    kernel=(1, 1),
    boxes=None,
    erase_value=None,
    mean=None,
    std=None,
    interpolation="bilinear",
    padding="zeros",
    fill=0.0,
    antialias=False,
    dtype=None,
):
    """The operator on images (B, C, H, W), through autograd only where a derivative is needed.

    `colour` is a table (B, 4) of factors, of which `steps` says, as a sum of STEPS, which are used; `mean`,
    `std`, `fill`, `erase_value` are sequences of one number per channel, or one number. Everything else was
    checked by the caller.
    """
    channels = images.shape[1]
    is_byte = images.dtype == torch.uint8
    normalise = mean is not None or std is not None
    if dtype is None:
        dtype = torch.float32 if is_byte and normalise else images.dtype
    means = per_channel(op, "mean", 0.0 if mean is None else mean, channels)
    stds = per_channel(op, "std", 1.0 if std is None else std, channels)
    if not all(stds):
        raise ValueError(f"{op}: std must not be 0, got {std}")
    top = 255.0 if is_byte and dtype != torch.uint8 else 1.0
    scale = [1 / (top * s) for s in stds]
    shift = [-m / s for m, s in zip(means, stds, strict=True)]
    fills = per_channel(op, "fill", fill, channels)
    if erase_value is None:  # what becomes 0
        erased = [0.0] * channels
    else:
        values = per_channel(op, "erase_value", erase_value, channels)
        erased = [v * a + b for v, a, b in zip(values, scale, shift, strict=True)]
    if dtype == torch.uint8:
        erased = [float(min(max(round(v), 0), 255)) for v in erased]
    height, width = images.shape[2:] if size is None else size
    arguments = (
        images, matrices, colour, blur, boxes, windows, fills + erased + scale + shift, height, width, *kernel, steps,
        INTERPOLATIONS.index(interpolation), PADDINGS.index(padding), antialias, normalise or top != 1.0, dtype,
    )  # fmt: skip
    if images.requires_grad and torch.is_grad_enabled():
        if steps & STEPS["hue"] and channels == 3:
            raise ValueError(
                f"{op}: hue has no gradient with respect to the images; leave hue out, detach the images, or "
                f"use torch.no_grad()"
            )
        return _Augment.apply(*arguments)
    return _augment(*arguments)


def rows(numbers, count, device):
    """(count, len(numbers)) float64 of one row; not from a list, whose copy to a GPU would wait for it."""
    return torch.stack(
        [torch.full((count,), float(v), dtype=torch.float64, device=device) for v in numbers], 1
    )


def factors(named):
    """`colour` and `steps` for run, of a dict of (B,) tensors by the step's name."""
    if not named:
        return {}
    one = next(iter(named.values()))
    return {
        "colour": torch.stack([named.get(name, one) for name in STEPS], 1),
        "steps": sum(STEPS[name] for name in named),
    }


def per_channel(op, name, value, channels):
    """One number per channel, as a list of floats."""
    if isinstance(value, torch.Tensor):
        value = value.reshape(-1).tolist() if value.numel() > 1 else value.item()
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        values = [float(value)] * channels
    else:
        values = [float(v) for v in value]
        if len(values) == 1:
            values = values * channels
    if len(values) != channels:
        raise ValueError(
            f"{op}: {name} must be one number, or one for each of {channels} channels, got {len(values)}"
        )
    if any(v != v or v in (float("inf"), float("-inf")) for v in values):
        raise ValueError(f"{op}: {name} must be finite, got {value}")
    return values
