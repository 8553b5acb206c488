"""The arguments of `Augment` for a list of torchvision's transforms, where each has a place in it.

`Augment` does its steps in one order. Transforms in another order are refused, unless what they draw comes
out the same: flips commute with crops, colours and blur, and with an affine map whose ranges are symmetric.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from .._checks import SINGLE_DTYPES

OP = "Augment.from_torchvision"
ORDER = (
    "a resize that a crop or an affine map follows, affine map or rotation, crop or resize, ColorJitter, "
    "RandomGrayscale, blur, policy, Normalize, RandomErasing, MixUp or CutMix"
)


class _Arguments(dict[str, Any]):
    """Arguments of Augment; each is set once."""

    def __init__(self) -> None:
        super().__init__()
        self.wanted_by: dict[str, str] = {}

    def put(self, transform: Any, **values: Any) -> None:
        own = type(transform).__name__
        for name, value in values.items():
            if self.get(name, value) != value:
                other = self.wanted_by[name]
                raise ValueError(
                    f"{OP}: {own} wants {name}={value!r} where {other} wants {self[name]!r}; Augment has one "
                    f"{name} for all its steps: give both transforms the same, or do {own} outside"
                )
            self[name] = value
            self.wanted_by.setdefault(name, own)


def _wants(transform: Any, condition: bool, what: str, why: str) -> None:
    if not condition:
        raise ValueError(
            f"{OP}: {type(transform).__name__} must have {what}, because {why}, got {transform}; give it "
            f"that, or do it outside"
        )


def _plain_fill(transform: Any) -> Any:
    _wants(transform, not isinstance(transform.fill, dict), "one fill", "masks have `mask_fill` of their own")
    return tuple(transform.fill) if isinstance(transform.fill, list) else transform.fill


def _interpolation(transform: Any) -> str:
    mode = transform.interpolation
    name: str = getattr(mode, "value", mode)
    _wants(
        transform,
        name in ("nearest", "bilinear", "bicubic"),
        'interpolation "nearest", "bilinear" or "bicubic"',
        "Augment knows these",
    )
    return name


def _outside(transform: Any) -> dict[str, Any]:
    fill = _plain_fill(transform)
    return {} if fill is None else {"padding": "fill", "fill": fill}


_CENTRE = "Augment turns about the middle of the image"


def _rotation(t: Any, to: _Arguments) -> None:
    _wants(t, not t.expand, "expand=False", "all images of a batch are of one size")
    _wants(t, t.center is None, "center=None", _CENTRE)
    low, high = t.degrees
    to.put(t, rotate=(-high, -low), interpolation=_interpolation(t), **_outside(t))


def _affine(t: Any, to: _Arguments) -> None:
    _wants(t, t.center is None, "center=None", _CENTRE)
    given = {"translate": t.translate, "scale": t.scale, "shear": t.shear}
    given = {name: tuple(value) for name, value in given.items() if value is not None}
    to.put(t, rotate=tuple(t.degrees), interpolation=_interpolation(t), **given, **_outside(t))


def _resampled(t: Any) -> dict[str, Any]:
    """Arguments of a resize."""
    name = _interpolation(t)
    return {"interpolation": name, "antialias": t.antialias is not False and name != "nearest"}


def _resized_crop(t: Any, to: _Arguments) -> None:
    ratio = all(abs(a - b) < 1e-6 for a, b in zip(t.ratio, (3 / 4, 4 / 3), strict=True))
    _wants(t, ratio, "ratio=(3/4, 4/3)", "Augment draws the ratio between these")
    to.put(t, size=tuple(t.size), crop=tuple(t.scale), **_resampled(t))


def _crop(t: Any, to: _Arguments) -> None:
    padding = t.padding if t.padding is not None else 0
    sides = set(padding) if isinstance(padding, (list, tuple)) else {padding}
    _wants(t, len(sides) == 1, "the same padding on all sides", "crop=p has one number for all")
    _wants(t, not t.pad_if_needed, "pad_if_needed=False", "Augment pads by a given number of pixels")
    modes = {"constant": _outside(t), "edge": {"padding": "border"}, "symmetric": {"padding": "reflect"}}
    _wants(
        t, t.padding_mode in modes, 'padding_mode "constant", "edge" or "symmetric"', "Augment knows these"
    )
    (side,) = sides
    to.put(t, size=tuple(t.size), crop=int(side), **(modes[t.padding_mode] if side else {}))


def _centre(t: Any, to: _Arguments) -> None:
    to.put(t, size=tuple(t.size), crop="center")


def _resize(t: Any, to: _Arguments) -> None:
    to.put(t, size=tuple(t.size), **_resampled(t))


def _resize_first(t: Any, to: _Arguments) -> None:
    why = "Augment knows the shorter side, or (height, width)"
    _wants(t, t.size is not None and t.max_size is None, "a size and max_size=None", why)
    sides = tuple(t.size) if isinstance(t.size, (list, tuple)) else (t.size,)
    to.put(t, resize=sides if len(sides) == 2 else sides[0], **_resampled(t))


def _colours(t: Any, to: _Arguments) -> None:
    names = ("brightness", "contrast", "saturation", "hue")
    to.put(t, **{name: tuple(value) for name in names if (value := getattr(t, name)) is not None})


def _blur(t: Any, to: _Arguments) -> None:
    to.put(t, blur=(tuple(t.kernel_size), tuple(t.sigma)))


def _dtype(t: Any, to: _Arguments) -> None:
    dtype = t.dtype
    if isinstance(dtype, dict):
        dtype = next((v for k, v in dtype.items() if getattr(k, "__name__", k) in ("Image", "others")), None)
    scaled = getattr(t, "scale", True) or dtype == torch.uint8
    floats = dtype in SINGLE_DTYPES
    why = "float images lie in [0, 1] here"
    _wants(t, scaled and floats, "scale=True and dtype float32, float16 or bfloat16", why)
    to.put(t, dtype=dtype)


def _normalise(t: Any, to: _Arguments) -> None:
    to.put(t, mean=tuple(map(float, t.mean)), std=tuple(map(float, t.std)))


def _erase(t: Any, to: _Arguments) -> None:
    usual = tuple(t.scale) == (0.02, 0.33) and tuple(t.ratio) == (0.3, 3.3)
    _wants(t, usual, "scale=(0.02, 0.33) and ratio=(0.3, 3.3)", "Augment draws the box between these")
    value = t.value if isinstance(t.value, (list, tuple)) else [t.value]
    _wants(t, all(v == 0 for v in value), "value=0", "it stands for what is 0 after Normalize")
    to.put(t, erase=float(t.p))


def _policy(rounds: int | None) -> Callable[[Any, _Arguments], None]:
    def put(t: Any, to: _Arguments) -> None:
        fill = _plain_fill(t)
        drawn = {"n": t.num_ops, "magnitude": t.magnitude} if rounds is None else {}
        about = {"num_magnitude_bins": t.num_magnitude_bins, "interpolation": _interpolation(t), "fill": fill}
        to.put(t, policy=drawn | about)

    return put


def _mixing(t: Any, to: _Arguments) -> None:
    name = "mixup" if type(t).__name__ == "MixUp" else "cutmix"
    to.put(t, num_classes=t.num_classes, **{name: float(t.alpha)})


def _choice(t: Any, to: _Arguments) -> None:
    names = sorted(type(one).__name__ for one in t.transforms)
    even = t.p is None or len(set(t.p)) == 1
    why = "Augment takes each of these two for half of the batches"
    _wants(t, names == ["CutMix", "MixUp"] and even, "MixUp and CutMix, with equal probability", why)
    for one in t.transforms:
        _mixing(one, to)


# The argument of each transform that says how probable it is.
_CHANCES = {
    "RandomHorizontalFlip": "hflip",
    "RandomVerticalFlip": "vflip",
    "ColorJitter": "jitter_chance",
    "RandomGrayscale": "grayscale",
    "GaussianBlur": "blur_chance",
    "RandomErasing": "erase",
}


def _within(t: Any) -> tuple[Any, float]:
    """(the transform, its probability) of a RandomApply; of another transform, itself and 1."""
    if type(t).__name__ != "RandomApply" or not type(t).__module__.startswith("torchvision."):
        return t, 1.0
    known = len(t.transforms) == 1 and type(t.transforms[0]).__name__ in _CHANCES
    _wants(t, known, f"one transform of {', '.join(_CHANCES)}", "Augment has a probability for each of these")
    return t.transforms[0], float(t.p)


_Put = Callable[[Any, _Arguments], None]
# (place in the order, what it gives); None for those that may stand anywhere.
KNOWN: dict[str, tuple[int | None, _Put]] = {
    "RandomHorizontalFlip": (None, lambda t, to: to.put(t, hflip=float(t.p))),
    "RandomVerticalFlip": (None, lambda t, to: to.put(t, vflip=float(t.p))),
    "RandomRotation": (1, _rotation),
    "RandomAffine": (1, _affine),
    "RandomResizedCrop": (2, _resized_crop),
    "RandomCrop": (2, _crop),
    "CenterCrop": (2, _centre),
    "Resize": (2, _resize),
    "ColorJitter": (3, _colours),
    "RandomGrayscale": (4, lambda t, to: to.put(t, grayscale=float(t.p))),
    "GaussianBlur": (5, _blur),
    "TrivialAugmentWide": (6, _policy(1)),
    "RandAugment": (6, _policy(None)),
    "ToDtype": (None, _dtype),
    "ConvertImageDtype": (None, _dtype),
    "Normalize": (7, _normalise),
    "RandomErasing": (8, _erase),
    "MixUp": (9, _mixing),
    "CutMix": (9, _mixing),
    "RandomChoice": (9, _choice),
}
_CROPS, _MAPS = {"RandomResizedCrop", "RandomCrop", "CenterCrop"}, {"RandomRotation", "RandomAffine"}
_POLICIES = 6
_ONCE = {1: "an affine map", 2: "a crop or a resize", _POLICIES: "a policy", 9: "a mixture"}
# What makes tensors of images, or is done anyway.
_NOTHING = {"Identity", "ToImage", "PILToTensor", "ToPureTensor", "ClampBoundingBoxes"}


def _preset(preset: Any) -> Iterable[Any]:
    """The steps of what torchvision's weights of classifiers come with, `weights.transforms()`."""
    from torchvision.transforms import v2

    how = {"interpolation": preset.interpolation, "antialias": preset.antialias}
    yield v2.Resize(preset.resize_size, **how)
    yield v2.CenterCrop(preset.crop_size)
    yield v2.ToDtype(torch.float32, scale=True)
    yield v2.Normalize(preset.mean, preset.std)


def _flat(transforms: Any) -> Iterable[Any]:
    if type(transforms).__name__ in ("Compose", "Sequential"):
        transforms = getattr(transforms, "transforms", transforms)
    if isinstance(transforms, (list, tuple)) or type(transforms).__name__ == "Sequential":
        for transform in transforms:
            yield from _flat(transform)
    elif type(transforms).__name__ == "ImageClassification":
        yield from _preset(transforms)
    else:
        yield transforms


def _known(transform: Any, later: set[str]) -> tuple[int | None, _Put]:
    """The place and the arguments of a transform that others follow."""
    name, module = type(transform).__name__, type(transform).__module__
    if not module.startswith("torchvision."):
        raise ValueError(
            f"{OP}: {name} of {module} is no transform of torchvision's, so that Augment cannot know what it "
            f"does; do it outside, before or after"
        )
    if name not in KNOWN:
        raise ValueError(
            f"{OP}: {name} has no counterpart in Augment; do it outside, before or after. Known are "
            f"{', '.join(KNOWN)}"
        )
    if name == "Resize":
        exact = isinstance(transform.size, (list, tuple)) and len(transform.size) == 2
        if later & (_CROPS | _MAPS) or not exact:
            return 0, _resize_first
    return KNOWN[name]


def mapped(transforms: Any) -> dict[str, Any]:
    """The arguments of Augment, and under "policy" those of a policy."""
    to, seen, last = _Arguments(), set(), (-1, "")
    within = [_within(transform) for transform in _flat(transforms)]
    every, chances = [one for one, _ in within], [chance for _, chance in within]
    names = [type(transform).__name__ for transform in every]
    for i, (name, transform) in enumerate(zip(names, every, strict=True)):
        is_theirs = type(transform).__module__.startswith("torchvision.")
        if name in _NOTHING and (is_theirs or name == "Identity"):
            continue
        if name == "ToTensor" and is_theirs:
            to.put(transform, dtype=torch.float32)
            continue
        place, put = _known(transform, set(names[i + 1 :]))
        if name in seen:
            raise ValueError(
                f"{OP}: {name} stands there twice; Augment has each step once: leave one out, or do it "
                f"outside"
            )
        seen.add(name)
        if place is not None:
            _check_place(name, place, *last)
            if place == _POLICIES and "dtype" in to:
                raise ValueError(
                    f"{OP}: {name} stands after {to.wanted_by['dtype']}, which makes floats; Augment does "
                    f"policies before that: put {name} first"
                )
            last = (place, name)
        elif name.endswith("Flip") and not _is_symmetric(to):
            raise ValueError(
                f"{OP}: {name} stands after an affine map of unequal ranges, which would be mirrored; put "
                f"{name} first, as Augment does"
            )
        put(transform, to)
        if chances[i] < 1:
            to[_CHANCES[name]] = chances[i] * to.get(_CHANCES[name], 1.0)
    return dict(to)


def _check_place(name: str, place: int, before: int, other: str) -> None:
    """Raise where a transform stands after another one that Augment does not do before it."""
    if place < before:
        raise ValueError(
            f"{OP}: {name} stands after {other}, which Augment does later; put {name} before {other}, or do "
            f"one of them outside. The order is: {ORDER}; flips stand anywhere"
        )
    if place == before and place in _ONCE:
        raise ValueError(
            f"{OP}: {name} and {other} are each {_ONCE[place]}, of which Augment has one; leave one out, or "
            f"do it outside"
        )


def _is_symmetric(to: dict[str, Any]) -> bool:
    """Whether a mirrored affine map is as likely as the map."""
    ends = [to.get("rotate", (0, 0)), *(to.get("shear", (0, 0, 0, 0))[i : i + 2] for i in (0, 2))]
    return all(not pair or pair[0] == -pair[1] for pair in ends)
