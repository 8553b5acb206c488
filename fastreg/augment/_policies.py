"""Policies: each sample draws operations and their strengths, as TrivialAugmentWide (Müller, Hutter 2021) and
RandAugment (Cubuk, Zoph, Shlens, Le 2020) do.

Names, strengths and pixels of the operations are torchvision's. A sample pays only for what it drew: each
operation gets the samples that drew it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._checks import check_count, check_number
from . import _op, _tones
from ._geometry import Geometry, sheared, turned
from ._op import Interpolation
from ._params import Params, policy_outside
from ._plain_draw import number_dtype, sample_words

# What a number in `Params.operations` stands for. "Invert" is in neither policy.
OPERATIONS = (
    "Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color", "Contrast",
    "Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize", "Invert",
)  # fmt: skip
SIGNED = 9  # those from the second to this one have a sign
GEOMETRIC = range(1, 6)
_DRAWN = len(OPERATIONS) - 1
_FIRST_WORDS = 48  # of the draws of a sample; those before are of other steps


@dataclasses.dataclass(frozen=True)
class Policy:
    """What samples draw from: `rounds` operations one after the other; of `bins` strengths number
    `magnitude`, or any where that is None.
    """

    rounds: int
    magnitude: int | None
    bins: int
    interpolation: Interpolation = "nearest"
    fill: float | tuple[float, ...] | None = None

    def strengths(self, height: int, width: int) -> Tensor:
        """(operations, bins) float64: the strengths that an operation has, without a sign, as torchvision's
        tables have them, in float32.
        """
        wide = self.magnitude is None  # TrivialAugmentWide
        far = (32.0, 32.0) if wide else (150.0 / 331.0 * width, 150.0 / 331.0 * height)
        shear, turn, tone, kept = (0.99, 135.0, 0.99, 6) if wide else (0.3, 30.0, 0.9, 4)
        ends = [0.0, shear, shear, *far, turn, tone, tone, tone, tone]
        single: Any = {"dtype": torch.float32}  # whatever torch's default dtype is
        rows = [torch.linspace(0.0, end, self.bins, **single) for end in ends]
        bits = 8 - (torch.arange(self.bins, **single) / ((self.bins - 1) / kept)).round()
        nothing = torch.zeros(self.bins, **single)
        rows += [bits, torch.linspace(1.0, 0.0, self.bins, **single), nothing, nothing]
        return torch.stack([row.double() for row in rows])


def checked_policy(
    op: str, rounds: int, magnitude: int | None, bins: int, interpolation: Any, fill: Any, name: str
) -> Policy:
    """A policy of what a caller gave; `name` is what the rounds are called."""
    check_count(op, name, rounds, low=0)
    check_count(op, "num_magnitude_bins", bins, low=2)
    if magnitude is not None:
        check_count(op, "magnitude", magnitude, low=0)
        if magnitude >= bins:
            raise ValueError(f"{op}: magnitude must be less than num_magnitude_bins {bins}, got {magnitude}")
    for value in fill if isinstance(fill, (list, tuple)) else [fill]:
        if value is not None:
            check_number(op, "fill", value, finite=True)
    return Policy(rounds, magnitude, bins, interpolation, tuple(fill) if isinstance(fill, list) else fill)


def draw(policy: Policy, seed: Tensor, index: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """(operations (B, rounds) int64, magnitudes (B, rounds)) of the samples of these global indices."""
    device = index.device
    rounds = _FIRST_WORDS + torch.arange(policy.rounds, device=device)
    words = sample_words(seed.reshape(()).to(device), index[:, None], rounds)
    operations = words[..., 0] * _DRAWN >> 32
    strengths = policy.strengths(height, width).to(device, number_dtype(device))
    bins = words[..., 1] * policy.bins >> 32
    if policy.magnitude is not None:
        bins = torch.full_like(bins, policy.magnitude)
    magnitudes = strengths[operations, bins]
    signed = (operations > 0) & (operations <= SIGNED) & (words[..., 2] < 1 << 31)
    return operations, torch.where(signed, -magnitudes, magnitudes)


def matrices_of(operations: Tensor, magnitudes: Tensor, height: int, width: int) -> Tensor:
    """(B, 2, 3) of one round; of operations that move nothing, the identity. Shears leave the upper left
    corner where it is, as torchvision's.
    """
    zero = torch.zeros_like(magnitudes)

    def only(name: str, value: Tensor) -> Tensor:
        return torch.where(operations == OPERATIONS.index(name), value, zero)

    turned: Tensor = _op.matrices_of(
        magnitudes, (height, width), (height, width), angle=-only("Rotate", magnitudes)
    )
    slant_x, slant_y = only("ShearX", magnitudes), only("ShearY", magnitudes)
    shift_x, shift_y = (only(f"Translate{axis}", magnitudes).trunc() for axis in "XY")
    rows = ((zero, slant_x, 0.5 * slant_x - shift_x), (slant_y, zero, 0.5 * slant_y - shift_y))
    return turned + torch.stack([torch.stack(row, 1) for row in rows], 1)


def steps_of(params: Params, height: int, width: int) -> list[Geometry]:
    """The resampling of each round, of all samples."""
    steps = []
    operations, magnitudes = params.operations, params.magnitudes
    assert operations is not None and magnitudes is not None
    for i in range(operations.shape[1]):
        strengths = magnitudes[:, i].to(number_dtype(operations.device))
        matrices = matrices_of(operations[:, i], strengths, height, width)
        tied = None
        if operations.device.type == "cpu":
            shears = (operations[:, i] == 1) | (operations[:, i] == 2)
            tied = shears | (
                (operations[:, i] == OPERATIONS.index("Rotate")) & ((strengths % 45).abs() < 1e-3)
            )
        size = (height, width)
        steps.append(Geometry(size, size, matrices, affine=None if tied is None else matrices, tied=tied))
    return steps


def _geometric(images: Tensor, operations: Tensor, magnitudes: Tensor, params: Params) -> Tensor:
    padding, fill = policy_outside(params.settings)
    return _op.augment_batch(
        "augment", images, matrices=matrices_of(operations, magnitudes, *images.shape[2:]),
        interpolation=params.settings.policy_interpolation, padding=padding, fill=fill,
    )  # fmt: skip


def _tied(images: Tensor, operations: Tensor, magnitudes: Tensor, params: Params) -> Tensor:
    """Turned by an angle that puts whole lines of positions between two pixels."""
    size = (images.shape[2], images.shape[3])
    matrices = matrices_of(operations, magnitudes, *size)
    step = Geometry(size, size, matrices, affine=matrices)
    return turned(images, step, policy_outside(params.settings)[1])


def _is_tied(degrees: float, height: int, width: int) -> bool:
    eighths = round(degrees / 45)
    if abs(degrees - 45 * eighths) > 1e-3 or eighths % 4 == 0:
        return False
    return eighths % 2 == 1 or height != width


def _factor(step: str) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda images, strength: _op.augment_batch("augment", images, **_op.factors({step: 1 + strength}))


def _colour(images: Tensor, strength: Tensor) -> Tensor:
    """Saturation. Bytes are blended by the very operators of torchvision's, because what they give is cut
    off: the last bit decides about a level.
    """
    if images.dtype != torch.uint8 or images.shape[1] == 1:
        return _factor("saturation")(images, strength)
    r, g, b = images.split(1, 1)
    grey = r.mul(0.2989).add_(g, alpha=0.587).add_(b, alpha=0.114).floor_()
    factor = 1 + strength
    blended = images * factor.float().view(-1, 1, 1, 1)
    if images.device.type != "cpu":
        return blended.addcmul_(grey, (1 - factor).float().view(-1, 1, 1, 1)).clamp_(0, 255).to(torch.uint8)
    for i, rest in enumerate((1 - factor).tolist()):
        blended[i].add_(grey[i], alpha=rest)
    return blended.clamp_(0, 255).to(torch.uint8)


def _solarize(images: Tensor, strength: Tensor) -> Tensor:
    return _tones.solarize(images, strength * (255 if images.dtype == torch.uint8 else 1))


_TONES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Brightness": _factor("brightness"),
    "Color": _colour,
    "Contrast": _factor("contrast"),
    "Sharpness": lambda images, strength: _tones.adjust_sharpness(images, 1 + strength),
    "Posterize": lambda images, strength: _tones.posterize(images, strength.trunc()),
    "Solarize": _solarize,
    "AutoContrast": lambda images, strength: _tones.autocontrast(images),
    "Equalize": lambda images, strength: _tones.equalize(images),
    "Invert": lambda images, strength: _tones.invert(images),
}


def operated(images: Tensor, params: Params) -> Tensor:
    """Images (B, C, H, W) after the operations that their samples drew. On a GPU this waits for the draw, to
    know which operation gets which samples.
    """
    if images.shape[1] not in (1, 3):
        raise ValueError(f"augment: a policy takes images of 1 or 3 channels, got {images.shape[1]}")
    operations, magnitudes = params.operations, params.magnitudes
    assert operations is not None and magnitudes is not None
    magnitudes = magnitudes.to(number_dtype(images.device))
    result, count = images.clone(), len(images)
    tracked = images.requires_grad and torch.is_grad_enabled()
    for i in range(operations.shape[1]):
        for name, samples in _groups(images, operations[:, i], magnitudes[:, i], params).items():
            whole = len(samples) == count
            at = torch.tensor(samples, device=images.device)
            part = result if whole else result.index_select(0, at)
            strength = magnitudes[at, i]
            if name in _TONES:
                part = _TONES[name](part, strength)
            elif name.startswith("Shear"):
                part = sheared(part, strength, name == "ShearX", *policy_outside(params.settings))
            else:
                part = (_tied if name == "tied" else _geometric)(part, operations[at, i], strength, params)
            if whole:
                result = part
            else:
                result = result.index_copy(0, at, part) if tracked else result.index_copy_(0, at, part)
    return result


def _groups(images: Tensor, operations: Tensor, magnitudes: Tensor, params: Params) -> dict[str, list[int]]:
    """Which samples of a round go together: those of one operation, or all that the fused pass moves."""
    is_nearest = params.settings.policy_interpolation == "nearest"
    height, width = images.shape[2:]
    groups: dict[str, list[int]] = {}
    for sample, (number, strength) in enumerate(zip(operations.tolist(), magnitudes.tolist(), strict=True)):
        name = OPERATIONS[number]
        if number in GEOMETRIC and not (is_nearest and name.startswith("Shear")):
            tied = is_nearest and name == "Rotate" and _is_tied(strength, height, width)
            name = "tied" if tied else "moved"
        if name != "Identity":
            groups.setdefault(name, []).append(sample)
    return groups
