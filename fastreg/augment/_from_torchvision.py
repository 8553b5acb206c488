"""The arguments of `Augment` for a list of torchvision's transforms, where each has a place in it.

`Augment` does its steps in one order. Transforms in another order are refused, unless what they draw comes
out the same: flips commute with crops, colours and blur, and with an affine map whose ranges are symmetric.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

OP = "Augment.from_torchvision"
ORDER = "affine map or rotation, crop or resize, colours, blur, policy, dtype and normalise, erase"


class _Arguments(dict[str, Any]):
    """Arguments of Augment; each is set once."""

    def put(self, transform: Any, **values: Any) -> None:
        for name, value in values.items():
            if self.get(name, value) != value:
                raise ValueError(
                    f"{OP}: {type(transform).__name__} wants {name}={value!r} where another transform wants "
                    f"{self[name]!r}; Augment has one for all"
                )
            self[name] = value


def _wants(transform: Any, condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(
            f"{OP}: {type(transform).__name__} must have {what}, got {transform}; change it there"
        )


def _plain_fill(transform: Any) -> Any:
    _wants(transform, not isinstance(transform.fill, dict), "one fill for images")
    return tuple(transform.fill) if isinstance(transform.fill, list) else transform.fill


def _interpolation(transform: Any) -> str:
    mode = transform.interpolation
    name: str = getattr(mode, "value", mode)
    _wants(
        transform,
        name in ("nearest", "bilinear", "bicubic"),
        'interpolation "nearest", "bilinear" or "bicubic"',
    )
    return name


def _outside(transform: Any) -> dict[str, Any]:
    fill = _plain_fill(transform)
    return {} if fill is None else {"padding": "fill", "fill": fill}


def _rotation(t: Any, to: _Arguments) -> None:
    _wants(t, not t.expand and t.center is None, "expand=False and center=None")
    low, high = t.degrees
    to.put(t, rotate=(-high, -low), interpolation=_interpolation(t), **_outside(t))


def _affine(t: Any, to: _Arguments) -> None:
    _wants(t, t.center is None, "center=None")
    given = {"translate": t.translate, "scale": t.scale, "shear": t.shear}
    given = {name: tuple(value) for name, value in given.items() if value is not None}
    to.put(t, rotate=tuple(t.degrees), interpolation=_interpolation(t), **given, **_outside(t))


def _resized_crop(t: Any, to: _Arguments) -> None:
    ratio = all(abs(a - b) < 1e-6 for a, b in zip(t.ratio, (3 / 4, 4 / 3), strict=True))
    _wants(t, ratio, "ratio=(3/4, 4/3)")
    antialias = t.antialias is not False and _interpolation(t) != "nearest"
    to.put(t, size=tuple(t.size), crop=tuple(t.scale), interpolation=_interpolation(t), antialias=antialias)
    to.setdefault("padding", "border")


def _crop(t: Any, to: _Arguments) -> None:
    padding = t.padding if t.padding is not None else 0
    sides = set(padding) if isinstance(padding, (list, tuple)) else {padding}
    _wants(t, len(sides) == 1 and not t.pad_if_needed, "the same padding on all sides")
    modes = {"constant": _outside(t), "edge": {"padding": "border"}, "symmetric": {"padding": "reflect"}}
    _wants(t, t.padding_mode in modes, 'padding_mode "constant", "edge" or "symmetric"')
    (side,) = sides
    to.put(t, size=tuple(t.size), crop=int(side), **(modes[t.padding_mode] if side else {}))


def _resize(t: Any, to: _Arguments) -> None:
    size = t.size
    exact = isinstance(size, (list, tuple)) and len(size) == 2 and t.max_size is None
    _wants(t, exact, "size=(height, width)")
    antialias = t.antialias is not False and _interpolation(t) != "nearest"
    to.put(t, size=tuple(size), interpolation=_interpolation(t), antialias=antialias)
    to.setdefault("padding", "border")


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
    _wants(
        t, scaled and dtype in (torch.float32, torch.float16, torch.bfloat16), "scale=True and a float dtype"
    )
    to.put(t, dtype=dtype)


def _normalise(t: Any, to: _Arguments) -> None:
    to.put(t, mean=tuple(map(float, t.mean)), std=tuple(map(float, t.std)))


def _erase(t: Any, to: _Arguments) -> None:
    usual = tuple(t.scale) == (0.02, 0.33) and tuple(t.ratio) == (0.3, 3.3)
    _wants(t, usual, "scale=(0.02, 0.33) and ratio=(0.3, 3.3)")
    value = t.value if isinstance(t.value, (list, tuple)) else [t.value]
    _wants(t, all(v == 0 for v in value), "value=0")
    to.put(t, erase=float(t.p))


def _policy(rounds: int | None) -> Callable[[Any, _Arguments], None]:
    def put(t: Any, to: _Arguments) -> None:
        fill = _plain_fill(t)
        drawn = {"n": t.num_ops, "magnitude": t.magnitude} if rounds is None else {}
        about = {"num_magnitude_bins": t.num_magnitude_bins, "interpolation": _interpolation(t), "fill": fill}
        to.put(t, policy=drawn | about)

    return put


_Put = Callable[[Any, _Arguments], None]
# (place in the order, what it gives); None for those that may stand anywhere.
KNOWN: dict[str, tuple[int | None, _Put]] = {
    "RandomHorizontalFlip": (None, lambda t, to: to.put(t, hflip=float(t.p))),
    "RandomVerticalFlip": (None, lambda t, to: to.put(t, vflip=float(t.p))),
    "RandomRotation": (0, _rotation),
    "RandomAffine": (0, _affine),
    "RandomResizedCrop": (1, _resized_crop),
    "RandomCrop": (1, _crop),
    "Resize": (1, _resize),
    "ColorJitter": (2, _colours),
    "GaussianBlur": (3, _blur),
    "TrivialAugmentWide": (4, _policy(1)),
    "RandAugment": (4, _policy(None)),
    "ToDtype": (None, _dtype),
    "ConvertImageDtype": (None, _dtype),
    "Normalize": (5, _normalise),
    "RandomErasing": (6, _erase),
}
# What makes tensors of images, or is done anyway.
_NOTHING = {"Identity", "ToImage", "PILToTensor", "ToPureTensor", "ClampBoundingBoxes"}


def _flat(transforms: Any) -> Iterable[Any]:
    if type(transforms).__name__ in ("Compose", "Sequential"):
        transforms = getattr(transforms, "transforms", transforms)
    if isinstance(transforms, (list, tuple)) or type(transforms).__name__ == "Sequential":
        for transform in transforms:
            yield from _flat(transform)
    else:
        yield transforms


def mapped(transforms: Any) -> dict[str, Any]:
    """The arguments of Augment, and under "policy" those of a policy."""
    to, seen, last = _Arguments(), set(), (-1, "")
    for transform in _flat(transforms):
        name = type(transform).__name__
        known = KNOWN.get(name) if type(transform).__module__.startswith("torchvision.") else None
        if known is None and name in _NOTHING:
            continue
        if known is None and name == "ToTensor":
            to.put(transform, dtype=torch.float32)
            continue
        if known is None:
            raise ValueError(
                f"{OP}: {name} has no place in Augment; leave it out and do it before or after. Known are "
                f"{', '.join(KNOWN)}"
            )
        if name in seen:
            raise ValueError(f"{OP}: {name} stands there twice; Augment has each step once")
        seen.add(name)
        place, put = known
        if place is not None:
            if place < last[0] or (place == last[0] and place in (0, 1)):
                raise ValueError(
                    f"{OP}: {name} stands after {last[1]}; "
                    f"the order of Augment is {ORDER}; flips stand anywhere"
                )
            if place == 4 and "dtype" in to:
                raise ValueError(f"{OP}: {name} stands after what makes floats; here it comes before that")
            last = (place, name)
        elif name.endswith("Flip") and not _is_symmetric(to):
            raise ValueError(f"{OP}: {name} stands after an affine map of unequal ranges; put it first")
        put(transform, to)
    return dict(to)


def _is_symmetric(to: dict[str, Any]) -> bool:
    """Whether a mirrored affine map is as likely as the map."""
    ends = [to.get("rotate", (0, 0)), *(to.get("shear", (0, 0, 0, 0))[i : i + 2] for i in (0, 2))]
    return all(not pair or pair[0] == -pair[1] for pair in ends)
