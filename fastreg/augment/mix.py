"""Mixtures of two samples of a batch and of their labels: mixup and CutMix.

x = lambda x_i + (1 - lambda) x_j (Zhang, Cissé, Dauphin, Lopez-Paz 2018), or x_j inside a box of x_i (Yun,
Han, Oh, Chun, Choe, Yoo 2019); y = lambda y_i + (1 - lambda) y_j. Each sample draws its own lambda and its
own partner.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._checks import check_count, check_generator, check_number, check_tensor
from .._recomputation import drawn
from .._transforms import may_look
from ._arguments import batched
from ._plain import picked
from ._tones import narrowed


def _draw(
    op: str,
    images: Tensor,
    targets: Tensor,
    alpha: float,
    num_classes: int | None,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(soft targets (B, classes), partners (B,), lambda ~ Beta(alpha, alpha) (B,), float32)."""
    batched(op, images)
    check_tensor(op, "targets", targets)
    check_number(op, "alpha", alpha, 0)
    if not 0 < alpha < math.inf:
        raise ValueError(f"{op}: alpha must be finite and greater than 0, got {alpha}")
    if images.dim() != 4 or len(targets) != len(images):
        raise ValueError(
            f"{op}: images must be (B, C, H, W) and targets (B,) or (B, classes), "
            f"got {tuple(images.shape)} and {tuple(targets.shape)}"
        )
    if targets.is_floating_point():
        if targets.dim() != 2:
            raise ValueError(
                f"{op}: targets of probabilities must be (B, classes), got {tuple(targets.shape)}"
            )
    else:
        if num_classes is None:
            raise ValueError(f"{op}: targets of class indices need num_classes")
        check_count(op, "num_classes", num_classes)
        if targets.dim() != 1 or targets.dtype == torch.bool:
            raise ValueError(
                f"{op}: class indices must be (B,), got {targets.dtype} {tuple(targets.shape)}; of one-hot "
                f"rows take .float()"
            )
        if may_look(targets):
            wrong = targets[(targets < 0) | (targets >= num_classes)]
            if wrong.numel():
                raise ValueError(
                    f"{op}: targets must be class indices in [0, {num_classes}), got {wrong[0].item()}; a "
                    f"sample without a label has no mixed label, leave it out"
                )
        targets = torch.nn.functional.one_hot(targets.long(), num_classes).float()
    check_generator(op, generator)
    partner = drawn(generator, lambda: torch.randperm(len(images), device=images.device, generator=generator))
    alphas = torch.full((2, len(images)), float(alpha), dtype=torch.float32, device=images.device)
    gamma = drawn(generator, lambda: torch._standard_gamma(alphas, generator=generator))
    share = gamma[0] / gamma.sum(0).clamp(min=torch.finfo(torch.float32).tiny)  # Beta(alpha, alpha)
    return targets, partner, share


def _mixed_targets(targets: Tensor, partner: Tensor, share: Tensor) -> Tensor:
    return torch.lerp(targets[partner], targets, share[:, None].to(targets.dtype))


def mixup(
    images: Tensor,
    targets: Tensor,
    alpha: float = 0.2,
    num_classes: int | None = None,
    *,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Mix each sample with another of the batch, and their labels.

    Args:
        images: (B, C, H, W), uint8 (the result is rounded), float32, float64, float16 or bfloat16.
        targets: (B,) class indices, which need `num_classes`, or (B, classes) probabilities.
        alpha: of Beta(alpha, alpha), greater than 0; small values mix little.
        num_classes: number of classes of class indices.
        generator: torch.Generator on the images' device; None for the default one.

    Returns:
        (images, targets (B, classes)) as `fastreg.cross_entropy` takes them: the images of their dtype, the
        targets float32 for class indices, else of their dtype.

    Raises:
        ValueError: shapes that do not fit, alpha not greater than 0, class indices without num_classes or
            outside of [0, num_classes) (on a GPU, torch's own error).
        TypeError: images or targets that are no tensors, images of another dtype.
    """
    targets, partner, share = _draw("mixup", images, targets, alpha, num_classes, generator)
    weight = share.view(-1, 1, 1, 1)
    if images.dtype == torch.uint8:
        mixed = torch.lerp(picked(images, partner).float(), images.float(), weight).round_()
        mixed = narrowed(mixed, torch.uint8)
    else:
        mixed = torch.lerp(picked(images, partner), images, weight.to(images.dtype))
    return mixed, _mixed_targets(targets, partner, share)


def cutmix(
    images: Tensor,
    targets: Tensor,
    alpha: float = 1.0,
    num_classes: int | None = None,
    *,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Replace a box of each sample by that of another, and mix the labels by area.

    The box has a share 1 - lambda of the area and the image's ratio, its centre is uniform, and what lies
    outside is cut off; labels are mixed by the area that is left. Arguments, result and errors as in `mixup`.
    """
    targets, partner, share = _draw("cutmix", images, targets, alpha, num_classes, generator)
    height, width = images.shape[2:]
    centre = drawn(
        generator,
        lambda: torch.rand(2, len(images), dtype=torch.float32, device=images.device, generator=generator),
    )
    inside = []
    for extent, at in zip((height, width), centre, strict=True):
        half = 0.5 * extent * (1 - share).sqrt()
        low, high = ((at * extent + sign * half).round().clamp(0, extent) for sign in (-1, 1))
        pixel = torch.arange(extent, device=images.device)
        inside.append((pixel >= low[:, None]) & (pixel < high[:, None]))
    box = inside[0][:, None, :, None] & inside[1][:, None, None, :]
    left = 1 - box.sum((1, 2, 3)).float() / max(height * width, 1)
    return torch.where(box, picked(images, partner), images), _mixed_targets(targets, partner, left)
