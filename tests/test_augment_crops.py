"""Crops that are resized: those of torchvision's resized_crop, whose border is the crop's own."""

import pytest
import torch
from augment_reference import plain_operators

from fastreg.augment import Augment, Params, Settings, apply, functional

T = pytest.importorskip(
    "torchvision.transforms.v2.functional", reason='needs pip install "torch-fastreg[test]"'
)
tv_tensors = pytest.importorskip("torchvision.tv_tensors", reason='needs pip install "torch-fastreg[test]"')

MODES = {"bilinear": T.InterpolationMode.BILINEAR, "bicubic": T.InterpolationMode.BICUBIC}


def resized(x, p, size, interpolation, antialias):
    """torchvision's steps of what was drawn, one after the other."""
    parts = []
    for i, image in enumerate(x):
        image = T.horizontal_flip(image) if p.hflip is not None and p.hflip[i] else image
        image = T.vertical_flip(image) if p.vflip is not None and p.vflip[i] else image
        box = [int(v) for v in p.crop[i]]
        parts.append(T.resized_crop(image, *box, list(size), MODES[interpolation], antialias))
    return torch.stack(parts)


@pytest.mark.parametrize("antialias", (False, True))
@pytest.mark.parametrize("interpolation", MODES)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.uint8))
def test_random_resized_crop_is_torchvisions(interpolation, antialias, dtype):
    x = torch.rand(24, 3, 33, 40)
    x = (x * 255).round().to(dtype) if dtype == torch.uint8 else x.to(dtype)
    # Smaller than the images of 33 x 40, and larger.
    for size in ((20, 24), (48, 50)):
        aug = Augment(
            size=size,
            crop=(0.05, 1.0),
            hflip=0.5,
            vflip=0.5,
            interpolation=interpolation,
            antialias=antialias,
        )
        p = aug.sample(x, seed=3)
        # Of bytes torch cuts off what a cubic overshoots after each axis; here that is done at the end.
        exact = x.double() if dtype == torch.uint8 and interpolation == "bicubic" else x
        want = resized(exact, p, size, interpolation, antialias)
        want = want.round().clamp(0, 255) if dtype == torch.uint8 else want
        bound = 1 if dtype == torch.uint8 else 2e-5
        got = apply(x, p)
        assert (got.double() - want.double()).abs().max() <= bound
        with plain_operators():
            assert (apply(x, p).double() - want.double()).abs().max() <= bound
        torch.manual_seed(5)
        one = aug(x)
        torch.manual_seed(5)
        assert torch.equal(one, apply(x, aug.sample(x)))


@pytest.mark.parametrize("padding", ("zeros", "border", "reflect", "fill"))
def test_a_crop_inside_has_its_own_border_whatever_lies_outside(padding):
    """And one that reaches out has the padding; by the tables as by a look at them."""
    x = torch.rand(3, 3, 20, 20)
    crop = torch.tensor([[5.0, 6, 8, 7], [0, 0, 20, 20], [-4, 0, 12, 12]])
    settings = Settings(size=(30, 30), padding=padding, fill=0.7)
    got = apply(x, Params(crop=crop, settings=settings))
    want = resized(x[:2], Params(crop=crop[:2]), (30, 30), "bilinear", False)
    torch.testing.assert_close(got[:2], want, rtol=0, atol=2e-5)
    alone = apply(x[2:], Params(crop=crop[2:], settings=settings))
    assert torch.equal(got[2:], alone)
    assert (alone[:, :, 0] - {"zeros": 0, "fill": 0.7}.get(padding, alone[:, :, 0])).abs().max() < 1e-6
    compiled = torch.compile(lambda x: apply(x, Params(crop=crop, settings=settings)), backend="aot_eager")
    assert torch.equal(compiled(x), got)


def test_gradient_of_a_crop():
    x = torch.rand(6, 3, 17, 19, dtype=torch.float64, requires_grad=True)
    for antialias in (False, True):
        aug = Augment(size=(12, 25), crop=(0.1, 0.7), hflip=0.5, antialias=antialias)
        p = aug.sample(x, seed=1)
        weight = torch.rand(6, 3, 12, 25, dtype=torch.float64)
        (own,) = torch.autograd.grad((apply(x, p) * weight).sum(), x)
        (want,) = torch.autograd.grad((resized(x, p, (12, 25), "bilinear", antialias) * weight).sum(), x)
        torch.testing.assert_close(own, want, rtol=0, atol=1e-6)


def test_windows_in_the_middle_are_torchvisions():
    for height in range(4, 16):
        for width in (5, 8, 13):
            x = torch.rand(1, 3, height, width)
            # Windows that are smaller than the image, and larger in one direction or both.
            for size in ((4, 4), (5, 8), (9, 3)):
                aug = Augment(size=size, crop=8).eval()
                assert torch.equal(aug(x), T.center_crop(x, list(size))), (height, width, size)


@pytest.mark.parametrize("rows", range(17, 32))
def test_boxes_and_points_stay_on_the_image_in_a_window_beyond_it(rows):
    """torchvision moves them by one pixel more where the window exceeds the image by 3, 7 or 11 pixels."""
    image = torch.zeros(1, 20, 24)
    image[0, 5, 7] = 1
    boxes, points = torch.tensor([[7.0, 5.0, 8.0, 6.0]]), torch.tensor([[7.5, 5.5]])
    moved = Augment(size=(rows, 24), crop="center")(image, masks=image[0], boxes=boxes, keypoints=points)
    assert torch.equal(moved.images, T.center_crop(image, [rows, 24]))
    _, y, x = moved.images.nonzero()[0].tolist()
    assert moved.masks.nonzero().tolist() == [[y, x]] and moved.boxes.tolist() == [[x, y, x + 1, y + 1]]
    assert moved.keypoints.tolist() == [[x + 0.5, y + 0.5]]
    theirs = T.center_crop(tv_tensors.KeyPoints(points, canvas_size=(20, 24)), [rows, 24])[0, 1].item()
    assert theirs == y + 0.5 + (rows - 20 in (3, 7, 11))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_column_is_resized_as_if_it_were_one_of_many(dtype):
    """Which torch's antialiased resize does not do."""
    many = torch.rand(2, 3, 7, 4, dtype=dtype)
    many[..., 1:] = many[..., :1]
    # Of the 7 rows: one, fewer, as many and more.
    for rows in (1, 2, 3, 7, 11):
        one = functional.resized_crop(many[..., :1], 0, 0, 7, 1, [rows, 1], antialias=True)
        want = torch.nn.functional.interpolate(
            many.double(), (rows, 4), mode="bilinear", antialias=True, align_corners=False
        )[..., :1]
        torch.testing.assert_close(one.double(), want, rtol=0, atol=1e-6)
