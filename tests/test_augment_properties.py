"""What holds for any images, targets and parameters: boxes of masks, points under compositions, flips,
targets that are none, and every single function against torchvision's.
"""

import math
import os

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastreg.augment import Params, Settings, apply
from fastreg.augment import functional as AF

T = pytest.importorskip("torchvision.transforms.v2.functional")

EXAMPLES = int(os.environ.get("FASTREG_EXAMPLES", "60"))
any_case = settings(
    max_examples=EXAMPLES,
    derandomize=EXAMPLES <= 100,
    deadline=None,
    suppress_health_check=(HealthCheck.too_slow, HealthCheck.data_too_large),
)


class Drawn:
    """Numbers of a case."""

    def __init__(self, data):
        self.data = data
        self.random = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), label="seed"))

    def one_of(self, *choices):
        return self.data.draw(st.sampled_from(choices))

    def uniform(self, low, high, *shape):
        return torch.from_numpy(np.asarray(self.random.uniform(low, high, shape)))

    def number(self, low, high):
        """One of the ends, or any between."""
        return self.one_of(low, high, float(self.uniform(low, high)), float(self.uniform(low, high)))

    def flips(self, count):
        return {name: self.uniform(0, 1, count).round() for name in ("hflip", "vflip")}

    def affine(self, count, turns=180.0, slants=20.0):
        return {
            "angle": self.uniform(-turns, turns, count),
            "scale": self.uniform(0.7, 1.4, count),
            "translate": self.uniform(-6, 6, count, 2).round(),
            "shear": self.uniform(-slants, slants, count, 2),
        }

    def image(self, dtype, channels, height, width):
        """Of few levels, or of any."""
        x = self.uniform(0, 1, channels, height, width)
        x = (x * 4).round() / 4 if self.one_of(False, True) else x
        return (x * 255).round().to(dtype) if dtype == torch.uint8 else x.to(dtype)


def seen_box(mask):
    rows, columns = torch.nonzero(mask, as_tuple=True)
    return torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])


@any_case
@given(st.data())
def test_a_box_of_a_mask_is_the_box_of_the_moved_mask_within_a_pixel(data):
    """Where lines stay lines also over the edges; turned ones where nothing is cut off, because of a turned
    rectangle that is cut off another box is left."""
    drawn = Drawn(data)
    height, width = drawn.data.draw(st.integers(24, 60)), drawn.data.draw(st.integers(24, 60))
    top, left = (int(drawn.uniform(0, side - 12)) for side in (height, width))
    bottom, right = top + int(drawn.uniform(6, 12)), left + int(drawn.uniform(6, 12))
    mask = torch.zeros(1, height, width, dtype=torch.uint8)
    mask[0, top:bottom, left:right] = 1
    turned = drawn.one_of(False, True)
    p = Params(**drawn.flips(1), **drawn.affine(1, slants=0.0), stretch=drawn.uniform(0.8, 1.25, 1))
    if turned:
        p.stretch = None
    else:
        p.angle = p.shear = None
    box = torch.tensor([[[left, top, right, bottom]]], dtype=torch.float64)
    moved = apply(torch.zeros(1, 1, height, width), p, masks=mask, boxes=box)
    whole = apply(torch.zeros(1, 1, height, width), p, boxes=box, min_visibility=1 - 1e-6).boxes_left
    if not moved.masks.any() or (turned and not whole.all()):
        return
    off = (seen_box(moved.masks[0]) - moved.boxes[0, 0]).abs().max()
    assert off <= 1, off


@any_case
@given(st.data())
def test_points_and_boxes_under_a_composition_are_those_under_its_steps(data):
    drawn, count = Drawn(data), 3
    x = torch.zeros(count, 1, 30, 40)
    points = drawn.uniform(-50, 90, count, 5, 2)
    boxes = torch.cat([drawn.uniform(0, 28, count, 5, 2), drawn.uniform(28, 30, count, 5, 2)], 2)
    crop = drawn.uniform(1, 14, count, 4).round()
    flips, rest = drawn.flips(count), drawn.affine(count)
    size = Settings(size=(drawn.one_of(10, 30, 50), drawn.one_of(9, 40, 41)))
    steps = [Params(**flips), Params(**rest), Params(crop=crop, settings=size)]
    whole = apply(x, Params(**flips, **rest, crop=crop, settings=size), keypoints=points)
    for step in steps:
        points = apply(x, step, keypoints=points).keypoints
    torch.testing.assert_close(whole.keypoints, points, rtol=0, atol=1e-8)
    # Boxes only where lines stay lines: around turned ones there is a box once, not once for each step.
    straight = Params(**flips, crop=crop, settings=size)
    once = apply(x, straight, boxes=boxes)
    twice = apply(x, steps[2], boxes=apply(x, steps[0], boxes=boxes).boxes)
    assert torch.equal(once.boxes_left, twice.boxes_left)
    torch.testing.assert_close(once.boxes, twice.boxes, rtol=0, atol=1e-4)


@any_case
@given(st.data())
def test_flip_twice_is_the_identity(data):
    drawn, count = Drawn(data), 4
    height, width = drawn.one_of(1, 2, 7, 16, 33), drawn.one_of(1, 2, 9, 17, 32)
    x = torch.stack([drawn.image(drawn.one_of(torch.uint8, torch.float32), 3, height, width)] * count)
    given_ = {
        "masks": drawn.uniform(0, 99, count, 2, height, width).to(drawn.one_of(torch.int64, torch.uint8)),
        "keypoints": drawn.uniform(-9, 40, count, 3, 2),
    }
    near = drawn.uniform(0, 1, count, 3, 2) * torch.tensor([width / 2, height / 2])
    given_["boxes"] = torch.cat([near, near * 2], -1)
    p = Params(**drawn.flips(count))
    once = apply(x, p, **given_)
    twice = apply(once.images, p, masks=once.masks, keypoints=once.keypoints, boxes=once.boxes)
    assert torch.equal(twice.images, x) and torch.equal(twice.masks, given_["masks"])
    for name in ("keypoints", "boxes"):
        torch.testing.assert_close(getattr(twice, name), given_[name], rtol=0, atol=1e-12)
    for flip in (AF.horizontal_flip, AF.vertical_flip):
        assert torch.equal(flip(flip(x)), x)


STRANGE = (math.nan, math.inf, -math.inf, 0.0, -5.0, 1e30, 7.0, 12.0)


@any_case
@given(st.data())
def test_targets_that_are_none_are_not_left_and_disturb_nobody(data):
    """NaN, infinity, no area, the wrong way round, outside, or none at all."""
    drawn = Drawn(data)
    count, many = drawn.one_of(0, 1, 3), drawn.one_of(0, 1, 4)
    x = torch.zeros(count, 1, 20, 24)
    dtype = drawn.one_of(torch.float32, torch.float64)
    p = Params(**drawn.flips(count), **(drawn.affine(count) if drawn.one_of(False, True) else {}))
    boxes = torch.from_numpy(drawn.random.choice(STRANGE, (count, many, 4))).to(dtype)
    points = torch.from_numpy(drawn.random.choice(STRANGE, (count, many, 2))).to(dtype)
    good = torch.tensor([3.0, 4, 15, 16], dtype=dtype).expand(count, 1, 4)
    middle = torch.tensor([11.0, 9.0], dtype=dtype).expand(count, 1, 2)
    alone = apply(x, p, boxes=good, keypoints=middle)
    moved = apply(x, p, boxes=torch.cat([boxes, good], 1), keypoints=torch.cat([points, middle], 1))
    assert moved.boxes.shape == (count, many + 1, 4) and moved.boxes.dtype == dtype
    assert torch.equal(moved.boxes[:, many:], alone.boxes)
    assert torch.equal(moved.boxes_left[:, many:], alone.boxes_left)
    assert torch.equal(moved.keypoints[:, many:], alone.keypoints)
    assert torch.equal(moved.visible[:, many:], alone.visible)
    is_box = (boxes[..., 2:] > boxes[..., :2]).all(-1) & ~boxes.isnan().any(-1)
    assert not (moved.boxes_left[:, :many] & ~is_box).any()
    assert not (moved.visible[:, :many] & ~points.isfinite().all(-1)).any()
    left = moved.boxes[moved.boxes_left]
    assert ((left >= 0) & (left <= left.new_tensor([24, 20, 24, 20]))).all()
    assert (left[:, 2:] > left[:, :2]).all()
    # A NaN stays one, and no target of numbers becomes one.
    for before, after in ((boxes, moved.boxes[:, :many]), (points, moved.keypoints[:, :many])):
        assert after[before.isnan().any(-1)].isnan().any(-1).all()
        assert after[before.isfinite().all(-1)].isfinite().all()


# ---- every single function, with any parameters


def _affine(drawn, x):
    way = T.InterpolationMode[drawn.one_of("NEAREST", "BILINEAR")]
    fill = drawn.one_of(None, [drawn.number(0, 1) * (255 if x.dtype == torch.uint8 else 1)] * x.shape[0])
    angle, scale = drawn.number(-180, 180), drawn.number(0.4, 2.5)
    shear, shift = [[drawn.number(-most, most) for _ in "xy"] for most in (30, 9)]
    centre = drawn.one_of(None, [drawn.number(-3, 30), drawn.number(0, 20)])
    return angle, shift, scale, shear, way, fill, centre


def _rotate(drawn, x):
    angle, _, _, _, way, fill, centre = _affine(drawn, x)
    expand = drawn.one_of(False, True)
    return angle, way, expand, None if expand else centre, fill


def _crop(drawn, x):
    height, width = x.shape[1:]
    h, w = int(drawn.uniform(1, height + 1)), int(drawn.uniform(1, width + 1))
    top, left = int(drawn.uniform(0, height - h + 1)), int(drawn.uniform(0, width - w + 1))
    # To one column with antialias, torch 2.14 repeats the first row; one pixel of bytes is an error there.
    size = [drawn.one_of(2, 5, 16, 33), drawn.one_of(2, 7, 17)]
    return (
        top,
        left,
        h,
        w,
        size,
        T.InterpolationMode[drawn.one_of("BILINEAR", "NEAREST")],
        drawn.one_of(False, True),
    )


def _blur(drawn, x):
    kernel = [drawn.one_of(*(k for k in (1, 3, 5, 7) if k // 2 < side)) for side in (x.shape[2], x.shape[1])]
    return kernel, [drawn.number(0.1, 3), drawn.number(0.1, 3)]


def _erase(drawn, x):
    corner, sides = [[int(drawn.uniform(0, n)) for n in x.shape[1:]] for _ in range(2)]
    value = drawn.number(0, 1) * (255 if x.dtype == torch.uint8 else 1)
    return *corner, *sides, round(value) if x.dtype == torch.uint8 else value


def _tone(low, high):
    return lambda drawn, x: (float(drawn.number(low, high)),)  # by a whole 3, torchvision's bytes wrap around


FUNCTIONS = {
    "adjust_brightness": _tone(0, 3), "adjust_contrast": _tone(0, 3), "adjust_hue": _tone(-0.5, 0.5),
    "adjust_saturation": _tone(0, 3), "adjust_sharpness": _tone(0, 3), "affine": _affine,
    "autocontrast": lambda drawn, x: (), "equalize": lambda drawn, x: (), "erase": _erase,
    "gaussian_blur": _blur, "horizontal_flip": lambda drawn, x: (), "invert": lambda drawn, x: (),
    "normalize": lambda drawn, x: [[drawn.number(low, 1) for _ in x] for low in (0, 0.1)],
    "posterize": lambda drawn, x: (drawn.one_of(*range(9)),), "resized_crop": _crop,
    "rgb_to_grayscale": lambda drawn, x: (drawn.one_of(1, 3),), "rotate": _rotate,
    "solarize": lambda drawn, x: (drawn.number(0, 1) * (255 if x.dtype == torch.uint8 else 1),),
    "vertical_flip": lambda drawn, x: (),
}  # fmt: skip


def test_every_function_of_torchvisions_is_here():
    assert {name for name in AF.__all__ if hasattr(T, name)} == set(FUNCTIONS)


def _wanted(name, x, arguments):
    if name == "erase":
        return T.erase(x, *arguments[:4], torch.tensor(arguments[4], dtype=x.dtype))
    return getattr(T, name)(x, *arguments)


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
@any_case
@given(data=st.data())
def test_a_function_is_torchvisions(name, data):
    drawn = Drawn(data)
    dtype = torch.float32 if name == "normalize" else drawn.one_of(torch.float32, torch.uint8)
    channels = 3 if name in ("adjust_hue", "adjust_saturation") else drawn.one_of(1, 3)
    x = drawn.image(dtype, channels, drawn.one_of(3, 8, 17, 30), drawn.one_of(3, 9, 16, 33))
    arguments = FUNCTIONS[name](drawn, x)
    nearest = T.InterpolationMode.NEAREST in arguments
    # Nearest pixels and levels are decided by float32 on both sides; what is interpolated has an exact value.
    decided = nearest or name in ("equalize", "posterize", "solarize", "invert", "erase")
    want = _wanted(name, x.double() if dtype == torch.float32 and not decided else x, arguments)
    got = getattr(AF, name)(x, *arguments)
    assert got.shape == want.shape and got.dtype == dtype
    off = (got.double() - want.double()).abs()
    if decided and name != "equalize":
        assert torch.equal(got, want), off.max()
    elif dtype == torch.uint8:  # a level where the last bit of float32 decides
        assert off.max() <= 1, off.max()
        # torch resizes bytes by weights of 16 bits.
        few = 1 if name == "resized_crop" else max(0.02, 1 / off.numel())
        assert (off > 0).double().mean() <= few, (off > 0).double().mean()
    else:
        assert off.max() <= 1e-4, off.max()
