"""mixup and CutMix as the last step of `Augment`."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from .._checks import check_count, check_number
from .mix import cutmix, mixup


@dataclasses.dataclass(frozen=True)
class Mixing:
    """What `Augment` does to images and labels after all else: mixup or CutMix, with these alphas, 0 for off;
    of both, either for the whole batch with probability 1/2, as torchvision's recipes have it.
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    num_classes: int | None = None

    def check(self) -> None:
        """Raise for what is no alpha or no number of classes."""
        for name in ("mixup", "cutmix"):
            check_number("Augment", name, getattr(self, name), 0, finite=True)
        if self.num_classes is not None:
            check_count("Augment", "num_classes", self.num_classes)

    def on(self) -> bool:
        """Whether anything is mixed."""
        return self.mixup > 0 or self.cutmix > 0

    def mixed(
        self, images: Tensor, labels: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """(images, soft labels (B, classes))."""
        both = self.mixup > 0 and self.cutmix > 0
        if both and torch.compiler.is_compiling():  # A graph has both, and takes one.
            coin = torch.rand((), generator=generator, device=images.device, dtype=torch.float32) < 0.5
            of_each = (
                mixup(images, labels, self.mixup, self.num_classes, generator=generator),
                cutmix(images, labels, self.cutmix, self.num_classes, generator=generator),
            )
            mixed, soft = (torch.where(coin, one, other) for one, other in zip(*of_each, strict=True))
            return mixed, soft
        if both:
            # The choice is drawn where the seeds are, on the CPU, so that nothing waits for a GPU.
            is_cpu = generator is None or generator.device.type == "cpu"
            coin = torch.rand((), generator=generator if is_cpu else None, device="cpu")
        if self.mixup > 0 and (not both or bool(coin < 0.5)):
            return mixup(images, labels, self.mixup, self.num_classes, generator=generator)
        return cutmix(images, labels, self.cutmix, self.num_classes, generator=generator)
