"""What a caller gave to `Augment`, checked: ranges that numbers are drawn from, sizes, constants, indices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._checks import check_number, check_tensor, is_int
from .._transforms import may_look
from . import _op
from ._arguments import pair
from ._op import PerChannel

Range = float | Sequence[float]  # a distance to both sides, or (lo, hi)


def interval(
    name: str, value: Any, centre: float | None = None, low: float = -math.inf, high: float = math.inf
) -> tuple[float, float]:
    """(lo, hi) of a pair, or of a number that is the distance to both sides of `centre`, cut at `low` and
    `high`.
    """
    op = "Augment"
    if isinstance(value, (int, float)) and centre is not None:
        check_number(op, name, value, 0)
        check_number(op, name, value, finite=True)
        value = (max(centre - value, low), min(centre + value, high))
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise ValueError(
            f"{op}: {name} must be {'a number or ' if centre is not None else ''}a pair (lo, hi), got "
            f"{value!r}"
        )
    for end in value:
        check_number(op, name, end, low, high)
        check_number(op, name, end, finite=True)
    if value[0] > value[1]:
        raise ValueError(f"{op}: {name} must be (lo, hi) with lo <= hi, got {value}")
    return float(value[0]), float(value[1])


def intervals(**given: Any) -> dict[str, tuple[float, float]]:
    """The range of each column of the table that is drawn from one, of the arguments that are not None."""
    limits = {
        "rotate": (0, -math.inf, math.inf),
        "stretch": (None, 0, math.inf),
        "scale": (None, 0, math.inf),
        "brightness": (1, 0, math.inf),
        "contrast": (1, 0, math.inf),
        "saturation": (1, 0, math.inf),
        "hue": (0, -0.5, 0.5),
    }
    shear, hue = given.pop("shear"), given["hue"]
    ranges = {
        "angle" if name == "rotate" else name: interval(name, value, *limits[name])
        for name, value in given.items()
        if value is not None
    }
    for name in ("stretch", "scale"):
        if ranges.get(name, (1, 1))[0] <= 0:
            raise ValueError(f"Augment: {name} must be greater than 0, got {ranges[name]}")
    if isinstance(hue, (int, float)) and hue > 0.5:
        raise ValueError(f"Augment: hue must be at most 0.5, got {hue}")
    if shear is not None:
        four = isinstance(shear, (tuple, list)) and len(shear) == 4
        ranges["shear_x"] = interval("shear", shear[:2] if four else shear, 0)
        ranges["shear_y"] = interval("shear", shear[2:], 0) if four else (0.0, 0.0)
    return ranges


def translation(translate: Any) -> tuple[float, float] | None:
    if translate is None:
        return None
    if not isinstance(translate, (tuple, list)) or len(translate) != 2:
        raise ValueError(f"Augment: translate must be a pair (fx, fy), got {translate!r}")
    for value in translate:
        check_number("Augment", "translate", value, 0, 1)
    return float(translate[0]), float(translate[1])


def output_size(size: Any) -> tuple[int, int] | None:
    if size is None:
        return None
    sides = tuple(pair(size))
    if len(sides) != 2 or any(not is_int(v, int) or v < 1 for v in sides):
        raise ValueError(f"Augment: size must be whole numbers of at least 1, (height, width), got {size!r}")
    return sides


def resize_of(resize: Any) -> int | tuple[int, int] | None:
    """The shorter side, or (height, width)."""
    if resize is None:
        return None
    sides = tuple(resize) if isinstance(resize, (tuple, list)) else (resize,)
    if len(sides) not in (1, 2) or any(not is_int(v, int) or v < 1 for v in sides):
        raise ValueError(
            f"Augment: resize must be whole numbers of at least 1, the shorter side or (height, width), got "
            f"{resize!r}"
        )
    return sides[0] if len(sides) == 1 else (sides[0], sides[1])


def crop_of(crop: Any) -> int | str | tuple[float, float] | None:
    """The padding of a window, "center", or a range of shares of the area."""
    if crop is None or crop == "center":
        return crop
    if isinstance(crop, str):
        raise ValueError(f'Augment: crop must be (lo, hi), a whole number or "center", got {crop!r}')
    if is_int(crop, int):
        check_number("Augment", "crop", crop, 0, 2**20)
        return crop
    shares = interval("crop", crop, None, 0, 1)
    if not shares[0] > 0:
        raise ValueError(f"Augment: crop must be shares of the area greater than 0, got {crop}")
    return shares


def constant(name: str, value: PerChannel | None) -> Any:
    """One number, or a tuple of one per channel: settings are compared and hashed."""
    if value is None:
        return None
    count = 1 if isinstance(value, (int, float)) else len(torch.as_tensor(value, device="cpu").view(-1))
    values = _op.per_channel("Augment", name, value, count)
    return values[0] if len(values) == 1 else tuple(values)


def checked_index(op: str, index: Tensor, batch: Tensor, count: int, offset: int) -> Tensor:
    check_tensor(op, "index", index)
    if index.dtype != torch.int64 or index.shape != (count,):
        raise ValueError(
            f"{op}: index must be int64 of shape ({count},), one for each sample, got {index.dtype} of shape "
            f"{tuple(index.shape)}"
        )
    if offset:
        raise ValueError(f"{op}: give offset or index, not both, got offset {offset}; add it to the index")
    if may_look(index) and bool((index < 0).any()):
        raise ValueError(f"{op}: index must be at least 0, got {int(index.min())}")
    return index.to(batch.device).contiguous()
