"""The parameters of augmentation as data: what all samples share, and what each of them drew."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from . import _op
from ._op import Interpolation, Padding


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all samples of a batch share.

    `size` (height, width) of the result in pixels, None for the images'; `kernel` of the blur along (x, y) in
    pixels; `erase_value` in the images' units, None for what becomes 0; `mean` and `std` for images in
    [0, 1]; `fill` in the images' units; `dtype` of the result, None for the images', or float32 where uint8
    is normalised. Numbers per channel are one for all, or a tuple. `policy_interpolation` and `policy_fill`
    are those of the operations that samples draw by a policy, where a fill of None is zeros. `resize` is the
    shorter side, or (height, width), that images are brought to before all else; all parameters are then of
    images of that size. See `Augment`.
    """

    size: tuple[int, int] | None = None
    kernel: tuple[int, int] = (1, 1)
    erase_value: float | tuple[float, ...] | None = None
    mean: float | tuple[float, ...] | None = None
    std: float | tuple[float, ...] | None = None
    interpolation: Interpolation = "bilinear"
    padding: Padding = "zeros"
    fill: float | tuple[float, ...] = 0.0
    antialias: bool = False
    dtype: torch.dtype | None = None
    policy_interpolation: Interpolation = "nearest"
    policy_fill: float | tuple[float, ...] | None = None
    resize: int | tuple[int, int] | None = None

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of images after `resize`, as torchvision's Resize has them."""
        if not isinstance(self.resize, int):
            return self.resize or (height, width)
        short, long = min(height, width), max(height, width)
        side = int(self.resize * long / short)
        return (self.resize, side) if height <= width else (side, self.resize)


@dataclasses.dataclass
class Params:
    """What each of B samples drew: float64 tensors of shape (B,) unless said otherwise; None for a step that
    is off.

    Two numbers along (x, y): `translate`, in pixels, and `shear`, in degrees. Boxes of (top, left, height,
    width): `crop`, in the input's pixels, and `erase`, int64, in the output's. `angle` is in degrees,
    clockwise; `hue` in turns; `sigma`, of the blur, in pixels; flips and `grayscale` are 0 or 1; `stretch`,
    `scale`, `brightness`, `contrast` and `saturation` are factors. Of a policy of n operations for each
    sample, `operations` and `magnitudes` are (B, n): places in `fastreg.augment.OPERATIONS`, and the
    strengths of torchvision with their signs, by which a positive "Rotate" turns counter-clockwise.
    """

    hflip: Tensor | None = None
    vflip: Tensor | None = None
    stretch: Tensor | None = None
    scale: Tensor | None = None
    angle: Tensor | None = None
    translate: Tensor | None = None  # (B, 2)
    shear: Tensor | None = None  # (B, 2)
    crop: Tensor | None = None  # (B, 4)
    brightness: Tensor | None = None
    contrast: Tensor | None = None
    saturation: Tensor | None = None
    hue: Tensor | None = None
    sigma: Tensor | None = None
    erase: Tensor | None = None  # (B, 4)
    settings: Settings = dataclasses.field(default_factory=Settings)
    operations: Tensor | None = None  # (B, n)
    magnitudes: Tensor | None = None  # (B, n)
    grayscale: Tensor | None = None

    def moves(self) -> bool:
        """Whether anything but flips and a crop moves the pixels."""
        return any(getattr(self, name) is not None for name in MOVES)

    def matrices(self, height: int, width: int) -> Tensor | None:
        """(B, 2, 3) float64: from a pixel (x, y, 1) of the result to its place in an image of (height,
        width), pixel centres at whole numbers; None if no pixel moves.

        Raises:
            ValueError: no parameter says how many samples there are.
        """
        names = ("hflip", "vflip", *MOVES, "crop")
        geometry = {
            name: value.to(_op.number_dtype(value.device))
            for name in names
            if (value := getattr(self, name)) is not None
        }
        size = self.settings.size or (height, width)
        if not geometry and size == (height, width):
            return None
        some = next((value for name in COUNTED if (value := getattr(self, name)) is not None), None)
        if some is None:
            raise ValueError(
                "Params.matrices: no parameter says how many samples there are; set crop to the whole image"
            )
        some = some if some.is_floating_point() else some.to(_op.number_dtype(some.device))
        return _op.matrices_of(some, (height, width), size, **geometry)


MOVES = ("stretch", "scale", "angle", "translate", "shear")
COUNTED = tuple(field.name for field in dataclasses.fields(Params) if field.name != "settings")
FIELDS = tuple(name for name in COUNTED if name not in ("operations", "magnitudes"))
_OWN = {"policy_interpolation", "policy_fill", "resize"}  # of steps of their own
SETTINGS = tuple(field.name for field in dataclasses.fields(Settings) if field.name not in _OWN)
# torch.load reads them with weights_only=True, which is its default.
torch.serialization.add_safe_globals([Params, Settings])


def policy_outside(settings: Settings) -> tuple[Padding, float | tuple[float, ...]]:
    """(padding, fill) of the operations of a policy."""
    fill = settings.policy_fill
    return ("zeros", 0.0) if fill is None else ("fill", fill)
