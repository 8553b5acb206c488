"""The operator `augment_tones`: the steps of a policy that change values, one for each sample.

The formulas are in csrc/augment/augment_tones.h; names, strengths and pixels are torchvision's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .._registry import define
from . import _op, _tones
from ._plain import is_last, picked

# What a number in `Params.operations` stands for. "Invert" is in neither policy.
OPERATIONS = (
    "Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color", "Contrast",
    "Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize", "Invert",
)  # fmt: skip
GEOMETRIC = range(1, 6)


def _factor(step: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The operation that is a colour step of the fused pass, with a factor of 1 + strength."""
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
    blended = images.float().mul_(factor.float().view(-1, 1, 1, 1))  # at once, torch goes byte by byte
    if images.device.type != "cpu":
        blended = blended.addcmul_(grey, (1 - factor).float().view(-1, 1, 1, 1))
    else:
        for i, rest in enumerate((1 - factor).tolist()):
            blended[i].add_(grey[i], alpha=rest)
    return _tones.narrowed(blended.clamp_(0, 255), torch.uint8)


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


def _toned(name: str, images: Tensor, strengths: Tensor) -> Tensor:
    return _TONES[name](images, strengths) if name in _TONES else images.clone()


def augment_tones_plain(images: Tensor, steps: Tensor, strengths: Tensor) -> Tensor:
    """Images (B, C, H, W) of 1 or 3 channels after a step for each sample, of its own strength. The operator
    takes bytes; here floats are taken as well, and can be differentiated.

    Args:
        steps: (B,) int64, places in OPERATIONS. Those that change no values copy.
        strengths: (B,) float64, as `Policy.strengths` has them.

    Samples of one step are brought together, and all are brought back at the end, by two copies of the batch.
    On a GPU this waits for the steps, to know which gets which samples.
    """
    samples_of: dict[str, list[int]] = {}
    for sample, number in enumerate(steps.tolist()):
        samples_of.setdefault(OPERATIONS[number], []).append(sample)
    if len(samples_of) < 2:
        return _toned(next(iter(samples_of), "Identity"), images, strengths)
    at = torch.tensor([i for samples in samples_of.values() for i in samples], device=images.device)
    counts = [len(samples) for samples in samples_of.values()]
    given = (whole.split(counts) for whole in (picked(images, at), strengths[at]))
    parts = [_toned(name, *part) for name, *part in zip(samples_of, *given, strict=True)]
    return _tones.laid_out(picked(torch.cat(parts), at.argsort()), images)


define("augment_tones(Tensor images, Tensor steps, Tensor strengths) -> Tensor", augment_tones_plain)


@torch.library.register_fake("fastreg::augment_tones", allow_override=True)
def _(images, steps, strengths):
    return torch.empty_like(images)


def toned(images: Tensor, steps: Tensor, strengths: Tensor) -> Tensor:
    """The operator where images are bytes, else its definition."""
    if images.dtype != torch.uint8:
        return augment_tones_plain(images, steps, strengths)
    dense = images if is_last(images) else images.contiguous()
    return torch.ops.fastreg.augment_tones.default(dense, steps.contiguous(), strengths.contiguous())
