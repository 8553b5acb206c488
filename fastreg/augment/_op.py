"""The operators behind `fastreg.augment`: schemas, fake kernels, autograd, and one function that calls them.

Their definitions in plain torch are in _plain.py and _plain_draw.py, the formulas of the kernels in
csrc/augment/augment_math.h and augment_draw.h. `matrices` (B, 2, 3) map an output pixel to its place in the
source, pixel centres at whole numbers; `constants` are fill, erased value, scale and shift of each channel,
in this order.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from .._checks import check_constant
from .._registry import define
from .._transforms import is_recorded, is_transformed
from . import _plain, _plain_draw
from ._plain import INTERPOLATIONS, PADDINGS, Interpolation, Padding, like_images
from ._plain_draw import COLUMNS, STEPS, number_dtype

PerChannel = float | Sequence[float] | Tensor  # one number, or one number for each channel

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
    "int blur_height, Tensor? index=None) -> (Tensor table, Tensor matrices, Tensor colour, Tensor blur, "
    "Tensor boxes)",
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
define("augment_words(Tensor seed, Tensor index, int first, int count) -> Tensor", _plain_draw.augment_words)


@torch.library.register_fake("fastreg::augment", allow_override=True)
def _(images, matrices, colour, blur, boxes, windows, constants, height, width, *static):
    return like_images(images, height, width, static[-1])


@torch.library.register_fake("fastreg::augment_backward", allow_override=True)
def _(grad, images, *rest):
    return like_images(images, images.shape[2], images.shape[3], images.dtype)


@torch.library.register_fake("fastreg::augment_draw", allow_override=True)
def _(
    images, seed, offset, batch, chances, low, high, crop, crop_box, erase_box, sizes, blur_width,
    blur_height, index=None,
):  # fmt: skip
    shapes = ((batch, len(COLUMNS)), (batch, 2, 3), (batch, len(STEPS)), (batch, blur_width + blur_height))
    tables = (images.new_empty(shape, dtype=number_dtype(images.device)) for shape in shapes)
    return *tables, images.new_empty((batch, 4), dtype=torch.int64)


@torch.library.register_fake("fastreg::augment_matrices", allow_override=True)
def _(like, *rest):
    return like.new_empty((like.shape[0], 2, 3), dtype=number_dtype(like.device))


@torch.library.register_fake("fastreg::augment_gaussian", allow_override=True)
def _(sigma_x, sigma_y, width, height):
    return sigma_x.new_empty((sigma_x.shape[0], width + height), dtype=sigma_x.dtype)


@torch.library.register_fake("fastreg::augment_words", allow_override=True)
def _(seed, index, first, count):
    return index.new_empty((index.shape[0], count, 4), dtype=torch.int64)


augment = torch.ops.fastreg.augment.default
augment_backward = torch.ops.fastreg.augment_backward.default
augment_draw = torch.ops.fastreg.augment_draw.default
augment_matrices = torch.ops.fastreg.augment_matrices.default
augment_gaussian = torch.ops.fastreg.augment_gaussian.default
augment_words = torch.ops.fastreg.augment_words.default


class _Augment(torch.autograd.Function):
    @staticmethod
    def forward(ctx, images, matrices, colour, blur, boxes, windows, *static):
        ctx.save_for_backward(images, matrices, colour, blur, boxes, windows)
        ctx.static = static
        return augment(images, matrices, colour, blur, boxes, windows, *static)

    @staticmethod
    def backward(ctx, grad):
        none = (None,) * (5 + len(ctx.static))
        images, *rest = ctx.saved_tensors
        if (
            torch.is_grad_enabled()
        ):  # A derivative of this derivative may be wanted: torch's operators have it.
            output = _plain.augment(images, *rest, *ctx.static)
            return torch.autograd.grad(output, images, grad, create_graph=True)[0], *none
        if grad.is_cuda and torch.are_deterministic_algorithms_enabled():
            message = (
                "augment: on a GPU the images' gradient is added up in no fixed order, so that its last bits "
                "vary; use torch.use_deterministic_algorithms(True, warn_only=True), or augment on the CPU"
            )
            if not torch.is_deterministic_algorithms_warn_only_enabled():
                raise RuntimeError(message)
            warnings.warn(message, stacklevel=2)
        return augment_backward(grad, images, *rest, *ctx.static), *none


def augment_batch(
    op: str,
    images: Tensor,
    *,
    matrices: Tensor | None = None,
    size: tuple[int, int] | None = None,
    windows: Tensor | None = None,
    colour: Tensor | None = None,
    steps: int = 0,
    blur: Tensor | None = None,
    kernel: tuple[int, int] = (1, 1),
    boxes: Tensor | None = None,
    erase_value: PerChannel | None = None,
    mean: PerChannel | None = None,
    std: PerChannel | None = None,
    interpolation: Interpolation = "bilinear",
    padding: Padding = "zeros",
    fill: PerChannel = 0.0,
    antialias: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The operator on images (B, C, H, W), through autograd only where a derivative is needed.

    The caller has checked everything but the numbers per channel: `mean`, `std`, `fill`, `erase_value`.

    Args:
        op: the public function's name, for errors.
        matrices: (B, 2, 3); None where no pixel moves.
        size: (height, width) of the result; None for the images'.
        windows: (B, 4) int64 of (top, left, height, width): the part of a sample that counts as its image.
        colour: (B, 4) factors, of which `steps` says, as a sum of STEPS, which are used.
        blur: (B, sum of kernel) weights, along x and then along y.
        boxes: (B, 4) int64 of (top, left, height, width), erased.
    """
    normalise = mean is not None or std is not None
    if dtype is None:
        dtype = torch.float32 if images.dtype == torch.uint8 and normalise else images.dtype
    constants, scaled = _constants(op, images, dtype, mean, std, fill, erase_value)
    height, width = images.shape[2:] if size is None else size
    arguments = (
        images, matrices, colour, blur, boxes, windows, constants, height, width, *kernel, steps,
        INTERPOLATIONS.index(interpolation), PADDINGS.index(padding), antialias, normalise or scaled, dtype,
    )  # fmt: skip
    if is_transformed():
        return _plain.augment(*arguments)
    if images.requires_grad and torch.is_grad_enabled():
        if steps & STEPS["hue"] and images.shape[1] == 3:
            raise ValueError(
                f"{op}: hue has no gradient with respect to the images; leave hue out, detach the images, or "
                f"use torch.no_grad()"
            )
        return _Augment.apply(*arguments)
    return augment(*arguments)


def _constants(op, images, dtype, mean, std, fill, erase_value) -> tuple[list[float], bool]:
    """(fill, erased value, scale and shift of each channel, whether bytes become numbers in [0, 1])."""
    channels, scaled = images.shape[1], images.dtype == torch.uint8 and dtype != torch.uint8
    means = per_channel(op, "mean", 0.0 if mean is None else mean, channels)
    stds = per_channel(op, "std", 1.0 if std is None else std, channels)
    if not all(stds):
        raise ValueError(f"{op}: std must not be 0, got {std}")
    top = 255.0 if scaled else 1.0
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
    return fills + erased + scale + shift, scaled


def matrices_of(
    like: Tensor, in_size: Sequence[int], out_size: Sequence[int], **parameters: Tensor | None
) -> Tensor:
    """(B, 2, 3) matrices of the fields of `Params` that make them, in `number_dtype` on the device of `like`,
    which has B samples; those left out are neutral.
    """
    names = ("hflip", "vflip", "stretch", "scale", "angle", "translate", "shear", "crop")
    compute: Any = _plain_draw.augment_matrices if is_recorded() else augment_matrices
    return compute(like, *(parameters.get(name) for name in names), *in_size, *out_size)


def rows(numbers: Iterable[float], count: int, device: torch.device) -> Tensor:
    """(count, len(numbers)), every row the numbers.

    They are not made from a list, because its copy to a GPU would wait for the GPU.
    """
    dtype = number_dtype(device)
    return torch.stack([torch.full((count,), float(v), dtype=dtype, device=device) for v in numbers], 1)


def factors(named: Mapping[str, Tensor]) -> dict[str, Any]:
    """`colour` and `steps` for augment_batch, of (B,) tensors by the step's name."""
    if not named:
        return {}
    one = next(iter(named.values()))
    return {
        "colour": torch.stack([named.get(name, one) for name in STEPS], 1),
        "steps": sum(STEPS[name] for name in named),
    }


def per_channel(op: str, name: str, value: PerChannel, channels: int) -> list[float]:
    """One finite number per channel, from as many or from one for all."""
    if isinstance(value, Tensor):
        check_constant(op, name, value)
        numbers: list[float] = value.reshape(-1).tolist()
        value = numbers if len(numbers) != 1 else numbers[0]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        values = [float(value)] * channels
    else:
        values = [float(v) for v in cast(Sequence[float], value)]
        if len(values) == 1:
            values = values * channels
    if len(values) != channels:
        raise ValueError(
            f"{op}: {name} must be one number, or one for each of {channels} channels, got {len(values)}"
        )
    if any(v != v or v in (math.inf, -math.inf) for v in values):  # torch.compile does not trace isfinite
        raise ValueError(f"{op}: {name} must be finite, got {value}")
    return values
