"""What augmentation looks like: one image under each step, and a batch of it under a policy.

`python -m fastreg.lecture.gallery docs/augment.png` draws the picture of the README, of a photograph that
comes with matplotlib.
"""

import dataclasses
import io
import sys

import numpy
import torch
from torch import Tensor

from fastreg.augment import Augment, apply, functional


def steps(image: Tensor) -> list[tuple[str, Tensor]]:
    """One image (C, H, W) under each step alone: a list of (what was done, image of the same size).

    Colour steps are left out where the image has other than 1 or 3 channels, saturation and hue where it has
    one.
    """
    channels, height, width = image.shape
    shown = [
        ("as it is", image),
        ("horizontal flip", functional.horizontal_flip(image)),
        ("vertical stretch 1.4", functional.vertical_stretch(image, 1.4)),
        ("rotate 20°", functional.rotate(image, 20, "bilinear")),
        ("shear 15°", functional.affine(image, 0, (0, 0), 1.0, 15.0, "bilinear")),
        ("scale 0.7", functional.affine(image, 0, (0, 0), 0.7, 0.0, "bilinear")),
        ("translate", functional.affine(image, 0, (width // 6, height // 8), 1.0, 0.0, "bilinear")),
        (
            "crop",
            functional.resized_crop(image, height // 8, width // 5, height // 2, width // 2, (height, width)),
        ),
    ]
    if channels in (1, 3):
        shown += [
            ("brightness 1.5", functional.adjust_brightness(image, 1.5)),
            ("contrast 0.5", functional.adjust_contrast(image, 0.5)),
        ]
    if channels == 3:
        shown += [
            ("saturation 2", functional.adjust_saturation(image, 2.0)),
            ("hue 0.15", functional.adjust_hue(image, 0.15)),
        ]
    kernel = min(height, width) // 16 * 2 + 1
    blur = functional.gaussian_blur(image, kernel, kernel / 5)
    return [
        *shown,
        ("Gaussian blur", blur),
        ("erase", functional.erase(image, height // 3, width // 4, height // 3, width // 3, 0)),
    ]


def batch(image: Tensor, augment: Augment, count: int, seed: int = 0) -> Tensor:
    """`count` copies of an image (C, H, W) under a policy, without its normalisation: (count, C, *size)."""
    images = image.expand(count, *image.shape)
    params = augment.sample(images, seed=seed)
    params.settings = dataclasses.replace(params.settings, mean=None, std=None)
    return apply(images, params)


def with_targets(image: Tensor, augment: Augment, masks: Tensor, boxes: Tensor, count: int) -> list[Tensor]:
    """Pictures (H, W, 3) of one image (C, H, W) with a mask (H, W) and boxes (N, 4) drawn on it: as it is,
    and under `count` - 1 draws of a policy that keeps its size.
    """
    generator = torch.Generator().manual_seed(0)
    rows = augment.show(
        image[None], generator, draws=count - 1, columns=1, masks=masks[None], boxes=boxes[None]
    )
    pixels = torch.from_numpy(numpy.array(rows))
    height = image.shape[1]
    gap = (len(pixels) - count * height) // max(count - 1, 1)
    return [pixels[i * (height + gap) :][:height] for i in range(count)]


def figure(image: Tensor, augment: Augment | None = None, columns: int = 7, seed: int = 0):
    """A matplotlib Figure: the image under each step, and below a batch under `augment` (`Augment.imagenet()`
    if None).

    Args:
        image: (C, H, W) of 1 or 3 channels, uint8 or floating point in [0, 1].
    """
    from matplotlib.figure import Figure

    augment = augment or Augment.imagenet()
    alone = steps(image)
    rows = -(-len(alone) // columns)
    result = Figure(figsize=(1.6 * columns, 1.85 * rows + 1.65 * 2), layout="constrained")
    upper, lower = result.subfigures(2, 1, height_ratios=(1.85 * rows, 1.65 * 2))
    upper.suptitle("One step alone", fontsize=11)
    lower.suptitle("A batch of the same image under a policy", fontsize=11)

    def show(axes, pixels, title=""):
        axes.axis("off")
        pixels = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels.float()
        axes.imshow(pixels.clamp(0, 1).expand(3, -1, -1).permute(1, 2, 0).numpy())
        axes.set_title(title, fontsize=8)

    cells = upper.subplots(rows, columns, squeeze=False).ravel()
    for axes in cells:
        axes.axis("off")
    for axes, (title, pixels) in zip(cells, alone, strict=False):
        show(axes, pixels, title)
    for axes, pixels in zip(
        lower.subplots(2, columns, squeeze=False).flat, batch(image, augment, 2 * columns, seed), strict=True
    ):
        show(axes, pixels)
    return result


def photograph(side: int = 512) -> Tensor:
    """The upper square of matplotlib's sample photograph: uint8 (3, side, side)."""
    from matplotlib.cbook import get_sample_data
    from PIL import Image

    with get_sample_data("grace_hopper.jpg") as file:
        picture = Image.open(file).convert("RGB")
    width = min(picture.size)
    picture = picture.crop((0, 0, width, width)).resize((side, side))
    return torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(side, side, 3).movedim(2, 0)


def main(path: str) -> None:
    """Write the picture of the README, with 256 colours, which take a quarter of the bytes."""
    from PIL import Image

    file = io.BytesIO()
    figure(photograph()).savefig(file, dpi=90)
    Image.open(file).convert("RGB").quantize(256).save(path, optimize=True)


if __name__ == "__main__":
    main(sys.argv[1])
