"""Augmentation of batches of images in one pass, each sample with its own parameters.

    aug = fastreg.augment.Augment(hflip=0.5, rotate=15, size=(224, 224), brightness=0.3, blur=(3, (0.1, 2.0)))
    images = aug(images)

Steps and their order: horizontal and vertical flip, vertical stretch, then shear, rotation, scale and
translation as torchvision's affine, then crop to size, all of them one matrix and one resampling; brightness,
contrast about the mean of the image as it is by then, saturation, hue; Gaussian blur; normalise; erase. What
a sample draws depends on the seed and its global index alone.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence
from enum import Enum
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .._checks import (
    ArgumentTypeError,
    check_choice,
    check_count,
    check_generator,
    check_number,
    check_tensor,
)
from .._seeds import draw_seed, seed_tensor
from .._shards import seed_of_first_rank
from .._transforms import as_node, is_sharded
from . import _collate, _from_torchvision, _op, _policies, _show, functional
from ._apply import TensorOrList, applied, apply, check_units, options_of
from ._arguments import IMAGE_DTYPES, batched, refuse_parts
from ._geometry import inside_windows, unflipped_crops
from ._indexed import Indexed, numbers_of
from ._mixing import Mixing
from ._op import Interpolation, Padding, PerChannel
from ._params import Params, Settings
from ._parts import part_of, whole_of
from ._policies import OPERATIONS as OPERATIONS
from ._policies import Policy
from ._ranges import (
    Range,
    checked_index,
    constant,
    crop_of,
    interval,
    intervals,
    output_size,
    resize_of,
    translation,
)
from ._structures import augmented_structure, is_labelled
from ._targets import Augmented, BoxFormat, Targets
from ._tv import is_tv_tensor, plain, wrapped
from .mix import cutmix, mixup

__all__ = [
    "Augment",
    "Augmented",
    "Indexed",
    "Params",
    "Settings",
    "apply",
    "cutmix",
    "functional",
    "mixup",
]


# What a sample has that drew no jitter, or no blur: weights of 0 beside the middle, to the last bit.
_NO_JITTER, _NO_BLUR = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.0}, {"sigma": 1 / 64}
_READING = ("mask_fill", "box_format", "min_area", "min_visibility", "flip_permutation")  # of collate
_CROP_RATIO = (math.log(3 / 4), math.log(4 / 3))
_ERASED_SHARE, _ERASED_RATIO = (0.02, 0.33), (math.log(0.3), math.log(3.3))
_COLUMN = {name: i for i, name in enumerate(_op.COLUMNS)}


def _crops_of(table: Tensor) -> Tensor:
    """(B, 4): the boxes (top, left, height, width) in a table of what the samples drew."""
    return table[:, _COLUMN["crop_top"] : _COLUMN["crop_width"] + 1]


def _middle(in_size: tuple[int, int], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """(top, left, height, width) of the window of `size` in the middle."""
    return _centred(in_size[0], size[0]), _centred(in_size[1], size[1]), *size


def _centred(side: int, window: int) -> int:
    """Where a window in the middle begins: at half of the rest, rounded to even, as by CenterCrop."""
    if side < window:
        return -((window - side) // 2)
    half, odd = (side - window) // 2, (side - window) % 2  # in whole numbers, which torch.jit.trace takes
    return half + odd * (half % 2)


class Augment(nn.Module):
    """Augments batches of images, and their targets, each sample with its own parameters, in one pass;
    positive angles turn clockwise. Everything left out is off.

    Args:
        hflip, vflip: probability of mirroring left and right, top and bottom.
        rotate: degrees to either side, or (lo, hi), clockwise.
        stretch: (lo, hi), factor along the height.
        scale: (lo, hi), factor along both axes.
        translate: (fx, fy), the largest shift to either side as a share of width and height; the shift is
            rounded to whole pixels.
        shear: degrees to either side, or (lo, hi), along x; or (lo_x, hi_x, lo_y, hi_y).
        resize: the shorter side, or (height, width), that the images are brought to before all else, as
            torchvision's Resize, by a resampling of its own.
        size: (height, width) of the result in pixels, or one for both; None for that of the images.
        crop: (lo, hi): a box of that share of the image's area, of ratio 3/4 to 4/3, is resized to `size`, as
            torchvision's RandomResizedCrop; a whole number p: a window of `size` of the image with p pixels
            of padding around, as RandomCrop; "center": the window of `size` in the middle, as CenterCrop.
            None: the whole image is resized to `size`.
        brightness, contrast, saturation: factors within that distance of 1, but not negative, or (lo, hi).
        hue: turns to either side, at most 0.5, or (lo, hi).
        jitter_chance: probability that these four change anything, as RandomApply of a ColorJitter.
        grayscale: probability of becoming grey, after all colours, as RandomGrayscale.
        blur: (kernel, (lo, hi)): kernel size, odd, and range of sigma, both in pixels.
        blur_chance: probability of being blurred, as RandomApply of a GaussianBlur.
        erase: probability of erasing a box of 2 to 33 % of the result, of ratio 0.3 to 3.3.
        erase_value: what it is filled with, in the images' units, one or per channel; None for what becomes
            0.
        mean, std: normalise, one or per channel, for images in [0, 1]; uint8 images are divided by 255 first.
        interpolation: "nearest", "bilinear" or "bicubic".
        padding: what lies outside: "zeros", "border", "reflect" or "fill"; nothing does where a part of the
            image is only resized.
        fill: for padding="fill", in the images' units, one or per channel.
        antialias: where the image shrinks, widen the interpolation's filter by as much, as torch's
            interpolate does; with a rotation or shear where it shrinks by more than 2.
        dtype: of the result; None for the images', or float32 where uint8 is normalised.
        mixup, cutmix: alpha of what mixes the images and the `labels` that are then given beside them, 0 for
            off; of both, one for each batch, with probability 1/2.
        num_classes: of labels that are class indices.

    Numbers are uniform in their ranges; the crop's and box's ratio is uniform in its logarithm. In eval mode
    nothing is random: images are only brought to `resize` and `size` (a window from the middle for crop=p)
    and normalised.

    Raises:
        ValueError: a probability outside [0, 1], ranges that are no ranges, unknown names.
        TypeError: what should be a number and is none.
    """

    chances: dict[str, float]  # of hflip, vflip and erase
    grayscale: float = 0.0
    jitter_chance: float = 1.0
    blur_chance: float = 1.0
    ranges: dict[str, tuple[float, float]]  # by column of the table of parameters
    translate: tuple[float, float] | None
    size: tuple[int, int] | None
    crop: int | str | tuple[float, float] | None
    policy: Policy | None = None
    mixing: Mixing = Mixing()

    def __init__(
        self,
        *,
        hflip: float = 0.0,
        vflip: float = 0.0,
        rotate: Range | None = None,
        stretch: Sequence[float] | None = None,
        scale: Sequence[float] | None = None,
        translate: Sequence[float] | None = None,
        shear: Range | None = None,
        resize: int | Sequence[int] | None = None,
        size: int | Sequence[int] | None = None,
        crop: int | Literal["center"] | Sequence[float] | None = None,
        brightness: Range | None = None,
        contrast: Range | None = None,
        saturation: Range | None = None,
        hue: Range | None = None,
        jitter_chance: float = 1.0,
        grayscale: float = 0.0,
        blur: tuple[int | Sequence[int], Sequence[float]] | None = None,
        blur_chance: float = 1.0,
        erase: float = 0.0,
        erase_value: PerChannel | None = None,
        mean: PerChannel | None = None,
        std: PerChannel | None = None,
        interpolation: Interpolation = "bilinear",
        padding: Padding = "zeros",
        fill: PerChannel = 0.0,
        antialias: bool = False,
        dtype: torch.dtype | None = None,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        op = "Augment"
        for name, value in (
            ("hflip", hflip), ("vflip", vflip), ("erase", erase), ("grayscale", grayscale),
            ("jitter_chance", jitter_chance), ("blur_chance", blur_chance),
        ):  # fmt: skip
            check_number(op, name, value, 0, 1)
        check_choice(op, "interpolation", interpolation, _op.INTERPOLATIONS)
        check_choice(op, "padding", padding, _op.PADDINGS)
        self.chances = {"hflip": float(hflip), "vflip": float(vflip), "erase": float(erase)}
        self.grayscale = float(grayscale)
        self.jitter_chance, self.blur_chance = float(jitter_chance), float(blur_chance)
        self.ranges = intervals(
            rotate=rotate, stretch=stretch, scale=scale, brightness=brightness, contrast=contrast,
            saturation=saturation, hue=hue, shear=shear,
        )  # fmt: skip
        self.translate, self.size, self.crop = translation(translate), output_size(size), crop_of(crop)
        kernel = (1, 1)
        if blur is not None:
            if not isinstance(blur, (tuple, list)) or len(blur) != 2:
                raise ValueError(f"{op}: blur must be (kernel, (lo, hi)), got {blur!r}")
            kernel = functional.check_kernel(op, blur[0])
            self.ranges["sigma"] = interval("blur", blur[1], None, 0)
        if dtype is not None and dtype not in IMAGE_DTYPES:
            raise ValueError(f"{op}: dtype must be uint8 or a floating-point dtype, got {dtype}")
        if dtype == torch.uint8 and not (mean is None and std is None):
            raise ValueError(
                f"{op}: dtype must be a floating-point dtype where mean or std is given, whose results bytes "
                f"cannot hold, got {dtype}"
            )
        # What only cuts out a part and resizes it shows nothing from beyond the image: no padding may darken
        # the edges of an image that is enlarged.
        moves = self.translate is not None or bool(self.ranges.keys() & _op.GEOMETRY)
        if self.size is not None and not self._is_window() and not moves:
            padding = "border"
        self._only_crops = isinstance(self.crop, tuple) and not moves
        self.settings = Settings(
            size=self.size, kernel=kernel, erase_value=constant("erase_value", erase_value),
            mean=constant("mean", mean), std=constant("std", std), interpolation=interpolation,
            padding=padding, fill=constant("fill", fill), antialias=antialias, dtype=dtype,
            resize=resize_of(resize),
        )  # fmt: skip
        self.mixing = Mixing(mixup, cutmix, num_classes)
        self.mixing.check()
        # What the operators take of it.
        self._steps = sum(bit for name, bit in _op.STEPS.items() if name in self.ranges)
        self._is_geometric = bool(
            hflip or vflip or self.translate or self.size or crop is not None
            or self.ranges.keys() & _op.GEOMETRY
        )  # fmt: skip
        ranges = {"stretch": (1.0, 1.0), "scale": (1.0, 1.0)} | self.ranges
        self._ends = [[ranges.get(name, (0.0, 0.0))[end] for name in _op.COLUMNS] for end in (0, 1)]

    def _is_window(self) -> bool:
        """Whether a crop is of the result's size."""
        return isinstance(self.crop, (int, str))

    @classmethod
    def cifar(cls, **changes: Any) -> Augment:
        """A window of 32 × 32 from 4 pixels of padding around, mirrored half the time, normalised with
        CIFAR-10's statistics (He, Zhang, Ren, Sun 2016); `changes` are arguments of `Augment`."""
        usual: dict[str, Any] = {
            "hflip": 0.5,
            "size": 32,
            "crop": 4,
            "mean": (0.4914, 0.4822, 0.4465),
            "std": (0.2470, 0.2435, 0.2616),
        }
        return cls(**usual | changes)

    @classmethod
    def imagenet(cls, **changes: Any) -> Augment:
        """A box of 8 to 100 % of the image resized to 224 × 224 (Szegedy et al. 2015), mirrored half the
        time, its colours jittered, normalised with ImageNet's statistics; `changes` are arguments of
        `Augment`."""
        usual: dict[str, Any] = {
            "hflip": 0.5,
            "size": 224,
            "crop": (0.08, 1.0),
            "brightness": 0.4,
            "contrast": 0.4,
            "saturation": 0.4,
            "hue": 0.1,
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "padding": "border",
            "antialias": True,
        }
        return cls(**usual | changes)

    @classmethod
    def trivial(
        cls,
        num_magnitude_bins: int = 31,
        interpolation: Interpolation | Enum = "nearest",
        fill: PerChannel | None = None,
        **changes: Any,
    ) -> Augment:
        """TrivialAugmentWide (Müller, Hutter 2021): each sample draws one of 14 operations and its strength,
        from torchvision's table; a positive "Rotate" turns counter-clockwise, as there.

        Args:
            num_magnitude_bins: how many strengths an operation has.
            interpolation: of the operations that move pixels: "nearest", "bilinear" or "bicubic".
            fill: what lies outside for these, in the images' units, one or per channel; None for zeros.
            changes: arguments of `Augment` for steps around it: geometry, colours and blur come before the
                operations, normalising and erasing after them.

        Raises:
            ValueError: fewer than 2 strengths, an unknown interpolation. TypeError: what should be a number.
        """
        return cls._with_policy("Augment.trivial", 1, None, num_magnitude_bins, interpolation, fill, changes)

    @classmethod
    def rand(
        cls,
        n: int = 2,
        magnitude: int = 9,
        num_magnitude_bins: int = 31,
        interpolation: Interpolation | Enum = "nearest",
        fill: PerChannel | None = None,
        **changes: Any,
    ) -> Augment:
        """RandAugment (Cubuk, Zoph, Shlens, Le 2020): each sample draws `n` of 14 operations, one after the
        other, of strength number `magnitude`, from torchvision's table; a positive "Rotate" turns
        counter-clockwise, as there.

        Args:
            n: number of operations for each sample.
            magnitude: number of the strength, less than `num_magnitude_bins`.

        Other arguments and errors as in `trivial`.
        """
        return cls._with_policy(
            "Augment.rand", n, magnitude, num_magnitude_bins, interpolation, fill, changes
        )

    @classmethod
    def from_torchvision(cls, transforms: Any, **changes: Any) -> Augment:
        """An `Augment` that draws what torchvision's transforms draw, for each sample of a batch its own.

        All geometric steps become one resampling, except for a Resize before a crop or a turn, and the
        colours of ColorJitter are changed in one order; a RandomRotation, which turns counter-clockwise,
        becomes a `rotate` the other way round. MixUp and CutMix, the last step or a RandomChoice of both,
        draw a share and a partner for each sample.

        Args:
            transforms: a Compose of torchvision's v2 (or v1), nested or not, a list of transforms, or the
                `weights.transforms()` of a classifier; those that make tensors of images say nothing.
            changes: arguments of `Augment` that replace what the transforms say.

        Raises:
            ValueError: a transform, or an option of one, that has no place here, or stands where it would do
                something else; the message names it, says why, and what to do.
        """
        known = _from_torchvision.mapped(transforms)
        policy = known.pop("policy", None)
        if policy is None:
            return cls(**known | changes)
        given: dict[str, Any] = dict(policy)
        make = cls.rand if "n" in given else cls.trivial
        augment = cls(**known | changes)
        one = make(**given)
        augment.policy = one.policy
        augment.settings = dataclasses.replace(
            augment.settings,
            policy_interpolation=one.settings.policy_interpolation,
            policy_fill=one.settings.policy_fill,
        )
        return augment

    @classmethod
    def _with_policy(
        cls,
        op: str,
        rounds: int,
        magnitude: int | None,
        bins: int,
        interpolation: Any,
        fill: Any,
        changes: Any,
    ) -> Augment:
        fill = None if fill is None else constant("fill", fill)
        interpolation = functional.check_interpolation(op, interpolation)
        name = "n" if magnitude is not None else "rounds"
        policy = _policies.checked_policy(op, rounds, magnitude, bins, interpolation, fill, name)
        augment = cls(**changes)
        augment.policy = policy
        augment.settings = dataclasses.replace(
            augment.settings, policy_interpolation=interpolation, policy_fill=fill
        )
        return augment

    def sample(
        self,
        batch: Tensor,
        *,
        generator: torch.Generator | None = None,
        seed: int | Tensor | None = None,
        offset: int = 0,
        index: Tensor | None = None,
    ) -> Params:
        """Draw `Params` for a batch.

        Args:
            batch: the images, (B, C, H, W) or (C, H, W); only their shape and device count.
            generator: torch.Generator on their device that the seed is drawn from; None for the default one.
            seed: whole number, or int64 tensor of one element; drawn if None.
            offset: global index of the first sample: sample i draws what it would as number offset + i of one
                large batch.
            index: int64 tensor (B,) of at least 0, the global index of each sample, where they are no
                neighbours: with the index in the dataset and a seed for each epoch, a sample draws the same
                on however many ranks and in whatever batch. Instead of `offset`.

        Raises:
            ValueError: a batch of another shape, a seed that is not one int64, a window that does not fit, an
                index of another shape or dtype, negative or beside an offset.
            TypeError: a batch or an index that is no tensor, an offset that is no int.
        """
        count, (height, width), size = self._shapes(batch)
        if not self.training:
            params = Params(settings=self.settings)
            if self.size is not None and not self._is_window():  # it is only resized
                params.settings = dataclasses.replace(self.settings, padding="border")
            if self.size is not None:
                box = _middle((height, width), size) if self._is_window() else (0, 0, height, width)
                params.crop = _op.rows(box, count, batch.device)
            return params
        check_generator("augment", generator)
        seed, offset, index = self._numbered(count, batch.device, seed, offset, index)
        seed = draw_seed(batch.device, generator) if seed is None else seed_tensor("Augment.sample", seed)
        table, _, _, _, boxes = self._draw(batch, generator, seed, offset, index)
        fields = {
            name: table.select(1, _COLUMN[name]) for name in self.ranges if not name.startswith("shear")
        }
        fields |= {name: table.select(1, _COLUMN[name]) for name in ("hflip", "vflip") if self.chances[name]}
        if self.translate is not None:
            fields["translate"] = table[:, _COLUMN["translate_x"] : _COLUMN["translate_y"] + 1]
        if "shear_x" in self.ranges:
            fields["shear"] = table[:, _COLUMN["shear_x"] : _COLUMN["shear_y"] + 1]
        if self.crop is not None or self.size is not None:
            fields["crop"] = _crops_of(table)
        if self.crop == "center":
            fields["crop"] = _op.rows(_middle((height, width), size), count, batch.device)
        if self.chances["erase"]:
            fields["erase"] = boxes
        if self._has_own_draws():
            at = offset + torch.arange(count, device=batch.device) if index is None else index
            at = at.to(batch.device)
            if self.grayscale:
                grey = _policies.draw_chance(_policies.GREY_DRAW, self.grayscale, seed, at)
                fields["grayscale"] = grey.to(_op.number_dtype(at.device))
            for chance, number, neutral in (
                (self.jitter_chance, _policies.JITTER_DRAW, _NO_JITTER),
                (self.blur_chance, _policies.BLUR_DRAW, _NO_BLUR),
            ):
                if chance < 1:
                    on = _policies.draw_chance(number, chance, seed, at)
                    fields |= {k: torch.where(on, fields[k], v) for k, v in neutral.items() if k in fields}
            if self.policy is not None:
                drawn = _policies.draw(self.policy, seed, at, *size)
                fields["operations"], fields["magnitudes"] = drawn
        return Params(**fields, settings=self.settings)

    def _has_own_draws(self) -> bool:
        """Whether samples draw more than the operator does."""
        by_chance = self.grayscale > 0 or self.jitter_chance < 1 or self.blur_chance < 1
        return by_chance or self.policy is not None

    def _numbered(
        self, count: int, device: torch.device, seed: Any, offset: int, index: Tensor | None
    ) -> tuple[Any, int, Tensor | None]:
        """(seed, offset, index) of `count` samples, the first of which is number `offset` of its batch."""
        if self._numbers is None or index is not None:
            return seed, offset, index
        own, indices = self._numbers
        return own, 0, indices[offset : offset + count].to(device)

    def _shapes(self, batch: Tensor) -> tuple[int, tuple[int, int], tuple[int, int]]:
        """(number of samples, (height, width) of the images, resized, of the result)."""
        op = "Augment.sample"
        check_tensor(op, "batch", batch)
        refuse_parts(op, batch)
        if batch.dim() not in (3, 4):
            raise ValueError(f"{op}: batch must be (B, C, H, W) or (C, H, W), got {tuple(batch.shape)}")
        count = batch.shape[0] if batch.dim() == 4 else 1
        height, width = self.settings.resized(*batch.shape[-2:])
        size = self.size or (height, width)  # of the result
        if isinstance(self.crop, int) and (
            size[0] > height + 2 * self.crop or size[1] > width + 2 * self.crop
        ):
            raise ValueError(
                f"{op}: a window of {size} does not fit into ({height}, {width}) with {self.crop} pixels "
                f"around"
            )
        return count, (height, width), size

    def _draw(
        self,
        batch: Tensor,
        generator: torch.Generator | None = None,
        seed: int | Tensor | None = None,
        offset: int = 0,
        index: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(table of all columns, matrices, colour, blur, boxes): what the samples draw, and what the operator
        takes of it.
        """
        count, (height, width), size = self._shapes(batch)
        check_generator("augment", generator)
        seed, offset, index = self._numbered(count, batch.device, seed, offset, index)
        seed = draw_seed(batch.device, generator) if seed is None else seed_tensor("Augment.sample", seed)
        check_count("Augment.sample", "offset", offset, low=0)
        if index is not None:
            index = checked_index("Augment.sample", index, batch, count, offset)
        low, high = self._ends
        if self.translate is not None:
            low, high = low.copy(), high.copy()
            for axis, share, extent in zip("xy", self.translate, (width, height), strict=True):
                column = _COLUMN[f"translate_{axis}"]
                low[column], high[column] = -share * extent, share * extent
        shares = self.crop if isinstance(self.crop, tuple) else (1.0, 1.0)
        padding = self.crop if isinstance(self.crop, int) else 0
        kind = 1 if isinstance(self.crop, tuple) else 2 if isinstance(self.crop, int) else 0
        crop_box = [*shares, *_CROP_RATIO, float(padding)]
        return _op.augment_draw(
            batch.detach(), seed, offset, count, list(self.chances.values()), low, high, kind, crop_box,
            [*_ERASED_SHARE, *_ERASED_RATIO], [height, width, *size], *self.settings.kernel, index,
        )  # fmt: skip

    def forward(
        self,
        batch: Any,
        generator: torch.Generator | None = None,
        *,
        masks: TensorOrList | None = None,
        boxes: TensorOrList | None = None,
        keypoints: TensorOrList | None = None,
        counts: Tensor | Sequence[int] | None = None,
        visible: TensorOrList | None = None,
        box_format: BoxFormat | Enum = "XYXY",
        mask_fill: float | None = None,
        min_area: float = 0.0,
        min_visibility: float = 0.0,
        flip_permutation: Sequence[int] | None = None,
        labels: Tensor | None = None,
    ) -> Any:
        """The augmented batch, of shape (B, C, *size), by parameters that are drawn from `generator` or the
        default one. With targets, an `Augmented` of images and targets: for all arguments see `apply`.

        A DTensor of images, replicated or sharded over the samples, gives one placed as it is, in which each
        sample draws what it would in the whole batch on one device, by the seed of the mesh's first rank.

        A list of images (C, H, W) becomes one batch, in which each draws what it would in any
        other; where there is a `size`, they may be of different heights and widths.

        A sample (image, target), a dict, or any nest of those and of torchvision's Image, Mask, BoundingBoxes
        and KeyPoints comes back as what it was, with the image and the targets moved; so does a list of
        samples; dataclasses and mappings of other classes are looked into. Without an Image the first tensor
        of three dimensions or more is the image, one under the key "image", "images", "pixel_values" or "img"
        before others; tensors under the keys "boxes" (XYXY), "masks", "mask" and "keypoints", or in a list
        under one of them, are targets, all others stay. A dict of a list of images and lists of their targets
        is a batch, too. All frames of a Video (T, C, H, W) take the same parameters. With `min_area` or
        `min_visibility` there is an entry "boxes_left" beside "boxes".

        With `labels`, (B,) or (B, classes), a pair of images and labels, mixed where `mixup` or `cutmix` is
        on, which a pair (images, labels) as the batch is as well, and a dict that has "label", "labels",
        "target" or "targets"; in eval mode, and without either, the labels stay.
        """
        targets = Targets(
            masks, boxes, keypoints, counts, visible, box_format, mask_fill, min_area, min_visibility,
            flip_permutation,
        )  # fmt: skip
        if isinstance(batch, torch.fx.Proxy):
            return as_node(self, batch)
        if is_sharded(batch):
            return self._of_parts(batch, generator, labels, targets)
        if labels is None and self.mixing.on() and is_labelled(batch):
            batch, labels = batch
        if labels is None and self.mixing.on() and self.training and _collate.fields_of(batch) is not None:
            if targets.given():
                raise ValueError("augment: labels mix without masks, boxes and key points, which do not")
            return _collate.mixed_parts(self._unmixed()(batch, generator), None, self.mixing, generator)
        if labels is not None or (self.mixing.on() and self.training):
            return self._mixed(batch, labels, generator, targets)
        if not isinstance(batch, Tensor) or is_tv_tensor(batch):
            return augmented_structure(self, batch, generator, targets)
        return self._augmented(batch, generator, targets)

    def _augmented(
        self,
        batch: Tensor,
        generator: torch.Generator | None,
        targets: Targets,
        seed: Tensor | None = None,
        index: Tensor | None = None,
    ) -> Any:
        """What `forward` makes of a plain tensor, before it is mixed."""
        # Whether there are steps beside the one pass.
        steps = self._is_geometric and self.settings.interpolation == "nearest"
        steps = steps or self.settings.resize is not None or self.crop == "center" or self._has_own_draws()
        if not self.training or targets.given() or steps:
            params = self.sample(batch, generator=generator, seed=seed, index=index)
            return applied(batch, params, targets)
        images, lead = batched("augment", batch)
        check_units(images, self.settings, self._steps != 0)
        table, matrices, colour, blur, erased = self._draw(batch, generator, seed, index=index)
        windows = None
        if self._only_crops:
            hflip, vflip = (
                table.select(1, _COLUMN[name]) if self.chances[name] else None for name in ("hflip", "vflip")
            )
            windows = unflipped_crops(_crops_of(table), hflip, vflip, images.shape[2:])
            matrices = inside_windows(matrices, windows)
        output = _op.augment_batch(
            "augment",
            images,
            matrices=matrices if self._is_geometric else None,
            windows=windows,
            colour=colour if self._steps else None,
            steps=self._steps,
            blur=blur if "sigma" in self.ranges else None,
            boxes=erased if self.chances["erase"] else None,
            **options_of(self.settings),
        )
        return output if lead else output.squeeze(0)

    def _of_parts(
        self, batch: Any, generator: torch.Generator | None, labels: Tensor | None, targets: Targets
    ) -> Tensor:
        """Each rank's samples, which draw by their place in the whole batch and by the first rank's seed."""
        op = "augment"
        if labels is not None or targets.given() or (self.mixing.on() and self.training):
            raise ArgumentTypeError(
                f"{op}: images as a DTensor are moved alone, got targets, labels or mixing beside them; give "
                f"a rank's own samples, .to_local(), and Params of sample(..., seed=, offset=)"
            )
        local, own = part_of(op, batch)
        seed = index = None
        if self.training:
            check_generator(op, generator)
            seed = draw_seed(batch.device, generator).to(local.device)
            seed = seed_of_first_rank(seed, batch.device_mesh)
            index = torch.arange(own.start, own.stop, device=local.device)
        return whole_of(op, self._augmented(local, generator, Targets(), seed, index), batch)

    def _mixed(
        self, batch: Any, labels: Tensor | None, generator: torch.Generator | None, targets: Targets
    ) -> tuple[Tensor, Tensor]:
        op = "augment"
        if labels is None:
            raise ValueError(f"{op}: mixup and cutmix need labels, one for each image; give labels=")
        if targets.given():
            raise ValueError(f"{op}: labels are given without masks, boxes and key points, which do not mix")
        check_tensor(op, "labels", labels)
        is_plain = isinstance(batch, Tensor) and not is_tv_tensor(batch)
        images = (
            self._augmented(batch, generator, Targets()) if is_plain else self._unmixed()(batch, generator)
        )
        if not self.mixing.on() or not self.training:
            return images, labels
        mixed, soft = self.mixing.mixed(plain(images), labels, generator)
        return wrapped(mixed, images), soft

    # (seed, index of each sample) of a batch whose samples are `Indexed`.
    _numbers: tuple[Tensor, Tensor] | None = None

    def _unmixed(self) -> Augment:
        """This without the step that mixes."""
        alone = copy.copy(self)
        alone.mixing = Mixing()
        return alone

    def show(
        self,
        batch: Any,
        generator: torch.Generator | None = None,
        *,
        draws: int = 1,
        columns: int = 8,
        **targets: Any,
    ) -> Any:
        """A picture of a batch and of what becomes of it: the images in a row, and below them `draws` rows of
        what is drawn for them, normalised or not, with masks, boxes that are left, and visible key points.

        Args:
            batch: whatever `forward` takes; `targets` are its arguments beside it.
            columns: how many images stand side by side; the others follow below.

        Returns:
            A PIL image where Pillow is installed, else a tensor (height, width, 3) of uint8.

        Raises:
            ValueError: no images, draws or columns below 1, and what `forward` raises.
        """
        return _show.shown(self._unmixed(), batch, generator, Targets(**targets), draws, columns)

    def collate(self, samples: list[Any], key: Any = None, **reading: Any) -> Any:
        """For DataLoader(collate_fn=...): torch's default collation, with the images augmented, and with them
        the targets that a data set for detection or segmentation has.

        Args:
            samples: what the dataset yields, `Indexed` or not: images (C, H, W), tensors or NumPy arrays;
                tuples or named tuples, whose first part is the image; dicts or dataclasses, of which the
                image is the only tensor of three dimensions, or called "image", "images", "pixel_values" or
                "img". Images of different sizes are resampled into one batch, of `size`.
            key: key, field or position of the image in a sample; functools.partial(augment.collate, key=...).
            reading: `mask_fill`, `box_format` of plain tensors, `min_area`, `min_visibility` and
                `flip_permutation`, as in `apply` and `forward`.

        Returns:
            A batch of the samples' structure, as torch makes it (a list for tuples, a dataclass for
            dataclasses). Where samples hold targets (see `forward`), boxes, key points, masks (N, H, W),
            nests that hold any, and tensors beside boxes become lists of one for each sample.

        Raises:
            TypeError: no image, or several, are found in a sample. ValueError: different sizes without
            `size`. KeyError: samples without the key.
        """
        for name in reading:
            check_choice("Augment.collate", "argument", name, _READING)
        samples, numbers = numbers_of(samples)
        alone = self._unmixed()
        alone._numbers = numbers
        batch = _collate.collated(samples, key, alone, Targets(**reading))
        mixes = self.mixing.on() and self.training
        if not mixes:
            return batch
        if _collate.fields_of(batch) is not None:
            return _collate.mixed_parts(batch, key, self.mixing)
        if not is_labelled(batch):
            raise TypeError(
                "Augment.collate: mixup and cutmix need samples (image, label), or named parts with a label"
            )
        return list(self.mixing.mixed(*batch))

    def extra_repr(self) -> str:
        """The steps that are on, by the names of the arguments."""
        shown: dict[str, Any] = {name: value for name, value in self.chances.items() if value}
        ranges = {"rotate" if name == "angle" else name: ends for name, ends in self.ranges.items()}
        if "shear_x" in ranges:
            shown["shear"] = ranges.pop("shear_x") + ranges.pop("shear_y")
        if "sigma" in ranges:
            shown["blur"] = (self.settings.kernel, ranges.pop("sigma"))
        shown |= ranges
        shown |= {
            name: getattr(self, name) for name in ("translate", "crop") if getattr(self, name) is not None
        }
        default = Settings()
        shown |= {
            f.name: v
            for f in dataclasses.fields(Settings)
            if f.name != "kernel" and (v := getattr(self.settings, f.name)) != getattr(default, f.name)
        }
        shown |= {"grayscale": self.grayscale} if self.grayscale else {}
        chances = {name: getattr(self, name) for name in ("jitter_chance", "blur_chance")}
        shown |= {name: chance for name, chance in chances.items() if chance < 1}
        shown |= {n: v for n in ("mixup", "cutmix", "num_classes") if (v := getattr(self.mixing, n))}
        texts = [f"{name}={value!r}" for name, value in shown.items()]
        return ", ".join(texts if self.policy is None else [*texts, f"policy={self.policy}"])
