"""Masks, boxes and key points beside the images: against torchvision's own functions for the same parameters,
by what they promise, and in every shape, dtype and nest in which data sets give them.
"""

import collections
import functools
import math

import pytest
import torch

import fastreg as fr
from fastreg.augment import Augment, Augmented, Params, Settings, apply
from fastreg.augment import functional as AF

vision = pytest.importorskip("torchvision.transforms.v2.functional")
tv = pytest.importorskip("torchvision.tv_tensors")

pytestmark = pytest.mark.usefixtures("rounded_grids")

H, W = 24, 31
NAN = float("nan")
MASK_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool)
MASK_DTYPES += (torch.uint16, torch.uint32, torch.uint64, torch.float32, torch.float16)
FORMATS = ("XYXY", "XYWH", "CXCYWH")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def images(count=4, dtype=torch.float32):
    x = torch.rand(count, 3, H, W)
    return (x * 255).to(dtype) if dtype == torch.uint8 else x.to(dtype)


def some_boxes(*lead, box_format="XYXY", dtype=torch.float32):
    corner, size = torch.rand(*lead, 2) * 15, torch.rand(*lead, 2) * 9 + 1
    xyxy = torch.cat([corner, corner + size], -1)
    if box_format == "XYWH":
        xyxy = torch.cat([corner, size], -1)
    if box_format == "CXCYWH":
        xyxy = torch.cat([corner + size / 2, size], -1)
    return xyxy.to(dtype)


def drawn(count=4, size=None, **on):
    """Hand-made parameters with the steps that are on; angles are no multiples of 45 degrees."""
    f64 = torch.float64
    fields = {
        "hflip": torch.tensor([0, 1, 1, 0], dtype=f64),
        "vflip": torch.tensor([0, 1, 0, 1], dtype=f64),
        "scale": torch.tensor([0.7, 1.3, 0.5, 2.0], dtype=f64),
        "translate": torch.tensor([[3, -2], [0, 4], [-5, 1], [0, 0]], dtype=f64),
        "angle": torch.tensor([17.0, -31, 100, 3], dtype=f64),
        "shear": torch.tensor([[5.0, 0], [0, 9], [-8, 3], [0, 0]], dtype=f64),
        "crop": torch.tensor([[2, 3, 17, 20], [0, 0, 24, 31], [5, 1, 4, 28], [20, 20, 3, 9]], dtype=f64),
    }
    chosen = {name: fields[name][:count] for name, is_on in on.items() if is_on}
    return Params(**chosen, settings=Settings(size=size))


def by_torchvision(target, p, i, fill=0):
    """torchvision's steps one after the other, with the parameters of sample i."""
    if p.hflip is not None and p.hflip[i]:
        target = vision.horizontal_flip(target)
    if p.vflip is not None and p.vflip[i]:
        target = vision.vertical_flip(target)
    if not all(v is None for v in (p.scale, p.translate, p.angle, p.shear)):
        number = lambda v: 0.0 if v is None else v[i].item()  # noqa: E731
        pair = lambda v: [0.0, 0.0] if v is None else v[i].tolist()  # noqa: E731
        scale = 1.0 if p.scale is None else p.scale[i].item()
        filled = {"fill": fill} if isinstance(target, tv.Mask) else {}
        target = vision.affine(target, number(p.angle), pair(p.translate), scale, pair(p.shear), **filled)
    if p.crop is not None:
        target = vision.resized_crop(target, *p.crop[i].int().tolist(), list(p.settings.size))
        return target  # boxes are cut off by the crop
    return vision.clamp_bounding_boxes(target) if isinstance(target, tv.BoundingBoxes) else target


CHAINS = (
    ({"hflip": 1}, None),
    ({"hflip": 1, "vflip": 1}, None),
    ({"scale": 1}, None),
    ({"scale": 1, "translate": 1, "vflip": 1}, None),
    ({"translate": 1}, None),
    ({"angle": 1}, None),
    ({"angle": 1, "scale": 1, "translate": 1, "shear": 1, "hflip": 1}, None),
    ({"crop": 1}, (16, 45)),
    ({"crop": 1, "hflip": 1, "vflip": 1}, (24, 31)),
    ({"crop": 1, "hflip": 1, "scale": 1, "translate": 1}, (50, 12)),
)


@pytest.mark.parametrize("steps, size", CHAINS, ids=lambda v: str(v))
def test_targets_are_torchvisions(steps, size):
    x, p = images(), drawn(**steps, size=size)
    for dtype in MASK_DTYPES:
        high = 2 if dtype == torch.bool else 100
        masks = torch.randint(high, (4, 2, H, W)).to(dtype)
        fill = 1 if dtype == torch.bool else 77
        moved = apply(x, p, masks=masks, mask_fill=fill)
        assert moved.masks.dtype == dtype and moved.boxes is None and moved.visible is None
        for i in range(4):
            same = masks[i] if dtype != torch.uint64 else masks[i].long()
            want = by_torchvision(tv.Mask(same.float()), p, i, 0 if size else fill).to(dtype)
            if (size and not {"scale", "translate"} & steps.keys()) or not size:
                assert torch.equal(moved.masks[i], want), (dtype, i)
    for box_format in FORMATS:
        for dtype in (torch.float32, torch.float64):
            boxes = some_boxes(4, 5, box_format=box_format, dtype=dtype)
            moved = apply(x, p, boxes=boxes, box_format=box_format)
            assert moved.boxes.dtype == dtype and moved.boxes_left.shape == (4, 5)
            for i in range(4):
                one = tv.BoundingBoxes(boxes[i], format=box_format, canvas_size=(H, W))
                want = by_torchvision(one, p, i)
                torch.testing.assert_close(moved.boxes[i], want.as_subclass(torch.Tensor), rtol=0, atol=2e-4)
    points = torch.rand(4, 6, 2) * 24
    moved = apply(x, p, keypoints=points)
    for i in range(4):
        want = by_torchvision(tv.KeyPoints(points[i], canvas_size=(H, W)), p, i)
        torch.testing.assert_close(moved.keypoints[i], want.as_subclass(torch.Tensor), rtol=1e-5, atol=2e-4)
    assert torch.equal(moved.images, apply(x, p))


def test_masks_after_a_scale_and_a_resized_crop():
    """What lies outside after the first step is what the crop sees as outside, with one fill for both."""
    x, p = images(), drawn(scale=1, translate=1, crop=1, hflip=1, size=(50, 12))
    masks = torch.randint(1, 200, (4, H, W))
    moved = apply(x, p, masks=masks)
    for i in range(4):
        assert torch.equal(moved.masks[i], by_torchvision(tv.Mask(masks[i]), p, i).as_subclass(torch.Tensor))


@pytest.mark.parametrize("height, width", [(24, 31), (23, 30), (32, 32), (9, 9)])
def test_positions_between_two_pixels(height, width):
    """Angles and scales that put whole lines of positions between two pixels: torchvision's rounding of its
    grid to float32 says which of the two is taken.
    """
    f64 = torch.float64
    p = Params(
        hflip=torch.tensor([0, 1, 0, 1, 0], dtype=f64),
        angle=torch.tensor([90, -45, 0, 180, 135], dtype=f64),
        scale=torch.tensor([1, 1, 0.5, 2, 1.25], dtype=f64),
    )
    masks = torch.randint(1, 250, (5, height, width), dtype=torch.uint8)
    moved = apply(torch.rand(5, 3, height, width), p, masks=masks).masks
    for i in range(5):
        want = by_torchvision(tv.Mask(masks[i]), p, i)
        assert torch.equal(moved[i], want.as_subclass(torch.Tensor)), i


def test_whole_numbers_are_cut_off_as_torchvision_does():
    x = images()
    crop = {"hflip": 1, "vflip": 1, "crop": 1}
    for steps, size in (
        ({"hflip": 1}, None),
        ({"scale": 1}, None),
        ({"angle": 1, "shear": 1}, None),
        (crop, (20, 45)),
    ):
        p = drawn(**steps, size=size)
        for dtype in (torch.int64, torch.int32):
            boxes, points = some_boxes(4, 5, dtype=dtype), torch.randint(24, (4, 6, 2)).to(dtype)
            moved = apply(x, p, boxes=boxes, keypoints=points)
            assert moved.boxes.dtype == moved.keypoints.dtype == dtype
            for i in range(4):
                one = by_torchvision(tv.BoundingBoxes(boxes[i], format="XYXY", canvas_size=(H, W)), p, i)
                assert torch.equal(moved.boxes[i], one.as_subclass(torch.Tensor))
                one = by_torchvision(tv.KeyPoints(points[i], canvas_size=(H, W)), p, i)
                assert torch.equal(moved.keypoints[i], one.as_subclass(torch.Tensor))
            for box_format in FORMATS if size else ():
                boxes = some_boxes(4, 5, box_format=box_format, dtype=dtype)
                moved = apply(x, p, boxes=boxes, box_format=box_format)
                for i in range(4):
                    one = by_torchvision(
                        tv.BoundingBoxes(boxes[i], format=box_format, canvas_size=(H, W)), p, i
                    )
                    assert torch.equal(moved.boxes[i], one.as_subclass(torch.Tensor)), (box_format, i)


# ---- what they promise


def test_wide_whole_numbers_are_moved_exactly():
    x, p = images(), drawn(angle=1, scale=1)
    numbers = torch.randint(-(2**62), 2**62, (4, H, W))
    small = torch.arange(H * W).view(1, H, W).expand(4, H, W)
    places = apply(x, p, masks=small, mask_fill=-1).masks
    moved = apply(x, p, masks=numbers, mask_fill=-(2**61)).masks
    want = numbers.flatten(1).gather(1, places.clamp(min=0).flatten(1)).view(moved.shape)
    assert torch.equal(moved, torch.where(places < 0, -(2**61), want))
    unsigned = numbers.view(torch.uint64)
    top = 2**64 - 5
    moved = apply(x, p, masks=unsigned, mask_fill=top).masks
    assert moved.dtype == torch.uint64 and torch.equal(
        moved.view(torch.int64)[places < 0].unique(), torch.tensor([-5])
    )


def test_a_box_of_a_mask_stays_the_box_of_the_moved_mask():
    aug = Augment(rotate=40, scale=(0.8, 1.2), shear=10, hflip=0.5, size=(40, 44), crop=(0.4, 1.0))
    x = images(16)
    masks = torch.zeros(16, H, W, dtype=torch.int64)
    masks[:, 8:15, 10:21] = 1
    boxes = torch.tensor([10.0, 8, 21, 15]).expand(16, 1, 4)
    moved = apply(x, aug.sample(x, seed=4), masks=masks, boxes=boxes)
    assert moved.boxes_left.sum() > 8
    for mask, box, left in zip(moved.masks, moved.boxes, moved.boxes_left, strict=True):
        rows, columns = torch.nonzero(mask, as_tuple=True)
        if not left or not len(rows):
            continue
        seen = torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        pixel = 2.5  # a pixel of the source, which the resized crop enlarges
        assert ((seen - box[0]).abs() <= pixel).all(), (seen, box)


def test_points_under_a_composition_are_points_under_its_steps():
    x, points = images(), torch.rand(4, 7, 2, dtype=torch.float64) * 20
    steps = {"angle": 1, "scale": 1, "translate": 1, "shear": 1}
    whole = apply(x, drawn(hflip=1, vflip=1, **steps), keypoints=points).keypoints
    first = apply(x, drawn(hflip=1, vflip=1), keypoints=points).keypoints
    torch.testing.assert_close(whole, apply(x, drawn(**steps), keypoints=first).keypoints)


def test_a_flip_twice_is_the_identity():
    x, p = images(), Params(hflip=torch.ones(4), vflip=torch.ones(4))
    masks, boxes, points = torch.randint(9, (4, H, W)), some_boxes(4, 3), torch.rand(4, 3, 2) * 20
    once = apply(x, p, masks=masks, boxes=boxes, keypoints=points)
    twice = apply(once.images, p, masks=once.masks, boxes=once.boxes, keypoints=once.keypoints)
    assert torch.equal(twice.masks, masks) and torch.equal(twice.images, x)
    torch.testing.assert_close(twice.boxes, boxes)
    torch.testing.assert_close(twice.keypoints, points)
    for flip in (AF.horizontal_flip, AF.vertical_flip):
        for target in (tv.Mask(masks[0]), tv.KeyPoints(points[0], canvas_size=(H, W))):
            torch.testing.assert_close(
                flip(flip(target)).as_subclass(torch.Tensor), target.as_subclass(torch.Tensor)
            )


def test_left_and_right_change_places_where_a_sample_was_mirrored():
    x, p = images(), drawn(hflip=1, vflip=1)  # neither, both, left and right, top and bottom
    points = torch.rand(4, 2, 3, 2) * 20
    seen = torch.rand(4, 2, 3) < 0.5
    order = [2, 1, 0]
    plain = apply(x, p, keypoints=points, visible=seen)
    swapped = apply(x, p, keypoints=points, visible=seen, flip_permutation=order)
    for i, mirrored in enumerate((False, False, True, True)):
        want = plain.keypoints[i][:, order] if mirrored else plain.keypoints[i]
        assert torch.equal(swapped.keypoints[i], want)
        want = plain.visible[i][:, order] if mirrored else plain.visible[i]
        assert torch.equal(swapped.visible[i], want)


def test_what_is_left_of_boxes():
    x = images(1)
    p = Params(crop=torch.tensor([[0.0, 10, 20, 20]]), settings=Settings(size=(20, 20)))
    boxes = torch.tensor(
        [[[2, 2, 8, 8.0], [5, 0, 15, 10], [11, 2, 12, 4], [12, 3, 12, 9], [20, 9, 15, 12], [NAN, 1, 15, 9]]]
    )
    moved = apply(x, p, boxes=boxes)
    assert moved.boxes_left.tolist() == [[False, True, True, False, False, False]]
    assert moved.boxes[0, 1].tolist() == [0, 0, 5, 10] and moved.boxes[0, 0, 2] == 0
    assert math.isnan(moved.boxes[0, 5, 0]) and moved.boxes[0, 5, 3] == 9
    assert apply(x, p, boxes=boxes, min_area=2.5).boxes_left.sum() == 1
    assert apply(x, p, boxes=boxes, min_visibility=0.51).boxes_left.tolist()[0][:3] == [False, False, True]
    assert apply(x, p, boxes=boxes, min_visibility=0.5).boxes_left[0, 1]
    counted = apply(x, p, boxes=boxes, counts=[2])
    assert counted.boxes_left.sum() == 1 and torch.equal(counted.boxes[0, 2:5], boxes[0, 2:5])


def test_what_is_visible_of_points():
    x, p = images(1), Params(translate=torch.tensor([[10.0, 0]]))
    points = torch.tensor([[[0.0, 0, 2], [20.9, 5, 1], [21, 5, 2], [-11, 5, 2], [5, 5, 0], [NAN, 3, 2]]])
    moved = apply(x, p, keypoints=points)
    assert moved.visible.tolist() == [[True, True, False, False, False, False]]
    assert moved.keypoints[0, :, 2].tolist() == [2, 1, 0, 0, 0, 0]
    assert moved.keypoints[0, 0].tolist() == [10, 0, 2] and moved.keypoints[0, 5, 0].isnan()
    given = apply(x, p, keypoints=points[..., :2], visible=torch.tensor([[0, 1, 1, 1, 1, 1]]))
    assert given.visible.tolist() == [[False, True, False, False, True, False]]


def test_erase_and_colours_leave_targets_alone():
    x = images(4, torch.uint8)
    masks, boxes, points = torch.randint(9, (4, H, W)), some_boxes(4, 3), torch.rand(4, 3, 2) * 20
    aug = Augment(erase=1.0, brightness=0.5, blur=(3, (0.5, 1)), mean=0.5, std=0.2)
    moved = aug(x, masks=masks, boxes=boxes, keypoints=points)
    assert torch.equal(moved.masks, masks) and moved.masks.data_ptr() != masks.data_ptr()
    assert torch.equal(moved.boxes, boxes) and torch.equal(moved.keypoints, points)
    assert moved.images.dtype == torch.float32 and moved.boxes_left.all() and moved.visible.all()


def test_padding_of_masks():
    x, masks = images(), torch.randint(1, 9, (4, H, W), dtype=torch.uint8)
    for padding in ("zeros", "fill", "border", "reflect"):
        settings = Settings(padding=padding, fill=0.5)
        p = Params(translate=torch.tensor([[6.0, 0]] * 4), angle=torch.zeros(4), settings=settings)
        moved = apply(x, p, masks=masks).masks
        column = {"border": masks[:, :, 0], "reflect": masks[:, :, 2]}.get(padding, torch.zeros(4, H))
        assert torch.equal(moved[:, :, 3], column.to(torch.uint8)), padding
        assert (apply(x, p, masks=masks, mask_fill=200).masks[:, :, :6] == 200).all()
        straight = Params(translate=p.translate, settings=settings)
        assert torch.equal(apply(x, straight, masks=masks).masks, moved), padding


# ---- shapes, dtypes, nests


def test_shapes():
    aug = Augment(rotate=20, hflip=0.5, size=(12, 14))
    x = images()
    whole = aug.sample(x, seed=1)
    masks, boxes, points = torch.randint(9, (4, H, W)), some_boxes(4, 3), torch.rand(4, 3, 2) * 20
    batch = apply(x, whole, masks=masks, boxes=boxes, keypoints=points)
    assert batch.masks.shape == (4, 12, 14) and isinstance(batch, Augmented)
    lists = apply(x, whole, masks=list(masks), boxes=list(boxes), keypoints=tuple(points))
    assert isinstance(lists.masks, list) and isinstance(lists.visible, list)
    for i in range(4):
        single = aug.sample(x[i], seed=1, offset=i)
        one = apply(x[i], single, masks=masks[i], boxes=boxes[i], keypoints=points[i])
        assert (
            one.images.shape == (3, 12, 14) and one.masks.shape == (12, 14) and one.boxes_left.shape == (3,)
        )
        for name in Augmented._fields:
            got, want, part = getattr(one, name), getattr(batch, name)[i], getattr(lists, name)[i]
            torch.testing.assert_close(got, want)
            torch.testing.assert_close(part, want)
    ragged = apply(x, whole, boxes=[boxes[0], boxes[1][:1], boxes[2][:0], torch.tensor([])])
    assert [len(b) for b in ragged.boxes] == [3, 1, 0, 0] and ragged.boxes_left[3].shape == (0,)
    nothing = torch.rand(0, 3, H, W)
    empty = aug(nothing, masks=masks[:0], boxes=boxes[:0], keypoints=points[:0])
    assert (
        empty.images.shape == (0, 3, 12, 14)
        and empty.masks.shape == (0, 12, 14)
        and empty.boxes.shape == (0, 3, 4)
    )
    none = aug(
        x, masks=torch.zeros(4, 0, H, W, dtype=torch.uint8), boxes=boxes[:, :0], keypoints=points[:, :0]
    )
    assert none.masks.shape == (4, 0, 12, 14) and none.boxes.shape == (4, 0, 4)
    wide = torch.rand(4, 2, 5, 3, 2)
    assert aug(x, keypoints=wide).visible.shape == (4, 2, 5, 3)


def test_dtypes_and_memory():
    aug = Augment(rotate=20, hflip=0.5)
    masks = torch.randint(9, (4, H, W))
    want = None
    for dtype in (torch.float32, torch.uint8, torch.float64, torch.float16, torch.bfloat16):
        for memory in (torch.contiguous_format, torch.channels_last):
            x = images(4, dtype).contiguous(memory_format=memory)
            moved = aug(x, torch.Generator().manual_seed(3), masks=masks, boxes=some_boxes(4, 2))
            assert moved.images.dtype == dtype and moved.images.is_contiguous(memory_format=memory)
            want = moved.masks if want is None else want
            assert torch.equal(moved.masks, want)
    strided = masks.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(aug(x, torch.Generator().manual_seed(3), masks=strided).masks, want)
    half = some_boxes(4, 2, dtype=torch.float16)
    assert aug(x, boxes=half).boxes.dtype == torch.float16


def test_gradients_go_to_boxes_and_points():
    x, p = images(), drawn(angle=1, scale=1, hflip=1)
    points = (torch.rand(4, 3, 2, dtype=torch.float64) * 20).requires_grad_()
    boxes = some_boxes(4, 3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda b, k: apply(x, p, boxes=b, keypoints=k)[2::2], (boxes, points))


def test_autocast_rounds_no_places():
    x, p = images(), drawn(angle=1, scale=1)
    for dtype in (torch.float32, torch.int64):
        boxes, points = some_boxes(4, 3, dtype=dtype), (torch.rand(4, 3, 2) * 20).to(dtype)
        want = apply(x, p, boxes=boxes, keypoints=points)
        with torch.autocast("cpu", torch.bfloat16):
            got = apply(x, p, boxes=boxes, keypoints=points)
        assert torch.equal(got.boxes, want.boxes) and torch.equal(got.keypoints, want.keypoints)


def test_eval_mode():
    aug = Augment(rotate=90, size=(10, 12), crop=4).eval()
    x, boxes = images(), some_boxes(4, 3)
    moved = aug(x, boxes=boxes, masks=torch.ones(4, H, W, dtype=torch.bool))
    assert torch.equal(moved.images, aug(x)) and moved.masks.all()
    shift = torch.tensor([round((W - 12) / 2), round((H - 10) / 2)]).repeat(2)  # as CenterCrop
    torch.testing.assert_close(
        moved.boxes, (boxes - shift).clamp(min=0).minimum(torch.tensor([12.0, 10]).repeat(2))
    )


def sample_of(i=0, box_format="XYXY", **about):
    boxes = some_boxes(2 + i, box_format=box_format)
    return {
        "image": tv.Image((torch.rand(3, H, W) * 255).to(torch.uint8)),
        "target": {
            "mask": tv.Mask(torch.randint(9, (H, W))),
            "found": [tv.BoundingBoxes(boxes, format=box_format, canvas_size=(H, W), **about)],
            "points": tv.KeyPoints(torch.rand(5, 2) * 20, canvas_size=(H, W)),
            "labels": torch.arange(2 + i),
            "name": "a",
        },
    }  # fmt: skip


@pytest.mark.parametrize("box_format", FORMATS)
def test_torchvisions_tensors_in_a_nest(box_format):
    aug = Augment(rotate=30, hflip=0.5, size=(20, 22))
    sample = sample_of(box_format=box_format)
    moved = aug(sample, torch.Generator().manual_seed(1))
    image, target = sample["image"], sample["target"]
    plain = aug(
        image.as_subclass(torch.Tensor), torch.Generator().manual_seed(1),
        masks=target["mask"].as_subclass(torch.Tensor), boxes=target["found"][0].as_subclass(torch.Tensor),
        keypoints=target["points"].as_subclass(torch.Tensor), box_format=box_format,
    )  # fmt: skip
    got = moved["target"]
    assert type(moved["image"]) is tv.Image and type(got["mask"]) is tv.Mask and got["name"] == "a"
    assert torch.equal(moved["image"], plain.images) and torch.equal(got["mask"], plain.masks)
    box = got["found"][0]
    assert type(box) is tv.BoundingBoxes and box.canvas_size == (20, 22) and box.format.value == box_format
    assert torch.equal(box, plain.boxes) and torch.equal(got["points"], plain.keypoints)
    assert type(got["points"]) is tv.KeyPoints and got["points"].canvas_size == (20, 22)
    assert got["labels"] is target["labels"]
    free = aug(sample_of(clamping_mode=None))["target"]["found"][0]
    assert free.clamping_mode is None


def test_torchvisions_tensors_as_arguments():
    sample, aug = sample_of(box_format="CXCYWH")["target"], Augment(vflip=1.0, size=(48, 31))
    moved = aug(
        tv.Image(torch.rand(3, H, W)),
        masks=sample["mask"],
        boxes=sample["found"][0],
        keypoints=sample["points"],
    )
    assert [type(v) for v in moved][:3] == [tv.Image, tv.Mask, tv.BoundingBoxes] and moved.boxes_left.all()
    assert moved.boxes.format.value == "CXCYWH" and moved.keypoints.canvas_size == (48, 31)
    with pytest.raises(TypeError, match="masks must all be of one kind"):
        aug(torch.rand(3, H, W), masks=sample["points"])


@pytest.mark.parametrize("box_format", ["XYWHR", "CXCYWHR", "XYXYXYXY"])
def test_turned_boxes(box_format):
    angles = torch.rand(6, 1) * 80 - 40
    boxes = torch.cat([torch.rand(6, 2) * 8 + 8, torch.rand(6, 2) * 6 + 2, angles], 1)
    boxes = vision.convert_bounding_box_format(boxes, "CXCYWHR", box_format)
    given = tv.BoundingBoxes(boxes, format=box_format, canvas_size=(H, W))
    p = Params(angle=torch.tensor([25.0]), translate=torch.tensor([[2.0, -3]]), scale=torch.tensor([1.1]))
    moved = apply(torch.rand(3, H, W), p, boxes=given)
    want = vision.affine(given, 25.0, [2, -3], 1.1, [0.0, 0.0])
    torch.testing.assert_close(
        moved.boxes.as_subclass(torch.Tensor), want.as_subclass(torch.Tensor), rtol=1e-4, atol=1e-3
    )
    assert moved.boxes_left.all() and moved.boxes.format.value == box_format
    mirrored = apply(torch.rand(3, H, W), Params(hflip=torch.ones(1)), boxes=given)
    want = vision.clamp_bounding_boxes(vision.horizontal_flip(given))
    torch.testing.assert_close(
        mirrored.boxes.as_subclass(torch.Tensor), want.as_subclass(torch.Tensor), rtol=1e-4, atol=1e-3
    )


Pair = collections.namedtuple("Pair", "image target")


def test_nests_of_plain_tensors():
    aug = Augment(hflip=1.0)
    image, boxes, mask = images(1)[0], some_boxes(3), torch.randint(9, (2, H, W))
    target = {"boxes": boxes, "masks": mask, "keypoints": torch.rand(3, 5, 3) * 20, "labels": torch.arange(3)}
    want = aug(image, masks=mask, boxes=boxes, keypoints=target["keypoints"])
    for sample in ((image, target), Pair(image, target), [image, target], {"x": image, "y": target}):
        moved = aug(sample)
        assert type(moved) is type(sample)
        x, y = moved.values() if isinstance(moved, dict) else moved
        assert torch.equal(x, want.images) and torch.equal(y["boxes"], want.boxes)
        assert torch.equal(y["masks"], want.masks) and torch.equal(y["keypoints"], want.keypoints)
        assert y["labels"] is target["labels"]
    labelled = aug((image, 3))
    assert torch.equal(labelled[0], want.images) and labelled[1] == 3
    batch = aug((images(4), {"boxes": some_boxes(4, 2), "labels": torch.arange(4)}))
    assert batch[1]["boxes"].shape == (4, 2, 4)
    parted = aug((images(2), [{"boxes": some_boxes(1)}, {"boxes": some_boxes(4)}]))
    assert [t["boxes"].shape for t in parted[1]] == [(1, 4), (4, 4)]


def test_lists_of_samples():
    aug = Augment(rotate=40, hflip=0.5)
    samples = [(images(1)[0], {"boxes": some_boxes(i + 1)}) for i in range(3)]
    moved = aug(samples, torch.Generator().manual_seed(2))
    columns = aug(tuple(zip(*samples, strict=True)), torch.Generator().manual_seed(2))
    batch = aug(
        torch.stack([x for x, _ in samples]),
        torch.Generator().manual_seed(2),
        boxes=[t["boxes"] for _, t in samples],
    )
    for i in range(3):
        assert torch.equal(moved[i][0], batch.images[i]) and torch.equal(columns[0][i], batch.images[i])
        torch.testing.assert_close(moved[i][1]["boxes"], batch.boxes[i])
        torch.testing.assert_close(columns[1][i]["boxes"], batch.boxes[i])
    sized = Augment(size=(8, 9), rotate=10)
    uneven = [torch.rand(3, 12, 13), torch.rand(3, 20, 10)]
    together = sized(
        uneven, masks=[torch.ones(12, 13, dtype=torch.uint8), torch.ones(20, 10, dtype=torch.uint8)]
    )
    assert together.images.shape == (2, 3, 8, 9) and together.masks[1].shape == (8, 9)


def test_collate_takes_the_image_that_is_named():
    """And leaves another tensor that might be one, wherever it stands."""
    aug = Augment(hflip=1.0)
    images, depth = [torch.rand(3, 8, 10) for _ in range(2)], torch.rand(1, 8, 10)
    boxes = torch.tensor([[1.0, 2, 4, 5]])
    batch = aug.collate([{"depth": depth, "image": x, "boxes": boxes} for x in images], key="image")
    assert torch.equal(batch["image"], torch.stack(images).flip(-1))
    assert torch.equal(batch["depth"][1], depth)
    assert [b.tolist() for b in batch["boxes"]] == [[[6.0, 2.0, 9.0, 5.0]]] * 2
    for key in (1, -2):
        first, second, _ = aug.collate([(depth, x, {"boxes": boxes}) for x in images], key=key)
        assert torch.equal(second, torch.stack(images).flip(-1)) and torch.equal(first[0], depth)


def test_collate():
    aug = Augment(hflip=1.0)
    samples = [sample_of(i) for i in range(3)]
    batch = aug.collate(samples)
    assert batch["image"].shape == (3, 3, H, W) and batch["image"].dtype == torch.uint8
    target = batch["target"]
    assert [len(t["found"][0]) for t in target] == [2, 3, 4] and target[1]["labels"].shape == (3,)
    assert torch.equal(target[2]["mask"], samples[2]["target"]["mask"].flip(-1))
    pairs = [(images(1)[0], {"boxes": some_boxes(2), "labels": torch.arange(2)}) for _ in range(3)]
    x, targets = aug.collate(pairs)
    assert x.shape == (3, 3, H, W) and torch.equal(targets[1]["boxes"][:, 0], W - pairs[1][1]["boxes"][:, 2])
    masks = [(images(1)[0], tv.Mask(torch.randint(9, (H, W)))) for _ in range(3)]
    x, y = functools.partial(aug.collate, mask_fill=255)(masks)
    assert y.shape == (3, H, W) and torch.equal(y[2], masks[2][1].flip(-1))
    loader = torch.utils.data.DataLoader(pairs, batch_size=2, collate_fn=aug.collate)
    assert [len(targets) for _, targets in loader] == [2, 1]
    flat = [
        {"image": images(1)[0], "boxes": some_boxes(2), "labels": torch.arange(2), "id": i} for i in range(2)
    ]
    got = aug.collate(flat)
    assert isinstance(got["boxes"], list) and isinstance(got["labels"], list) and got["id"].tolist() == [0, 1]


# ---- single functions on torchvision's tensors

NEAREST = vision.InterpolationMode.NEAREST  # torchvision before 0.26 knows no strings
SINGLE = (
    ("horizontal_flip", ()),
    ("vertical_flip", ()),
    ("affine", (30, [2, -3], 1.2, [5.0, 3.0])),
    ("affine", (0.0, [2, -3], 0.7, [0.0, 0.0], NEAREST, None, [3.0, 4.0])),
    ("rotate", (40.0,)),
    ("rotate", (90.0, NEAREST, True)),
    ("rotate", (33.0, NEAREST, False, [5.0, 4.0])),
    ("resized_crop", (3, 4, 9, 12, [20, 30])),
    ("resized_crop", (0, 0, 24, 2, [5, 82])),
)


@pytest.mark.parametrize("name, arguments", SINGLE, ids=lambda v: str(v))
def test_single_functions_move_torchvisions_tensors(name, arguments):
    ours, theirs = (functools.partial(getattr(where, name)) for where in (AF, vision))
    for dtype in (torch.uint8, torch.bool, torch.int16, torch.int64, torch.float32):
        for shape in ((H, W), (3, H, W)):
            mask = tv.Mask(torch.randint(2 if dtype == torch.bool else 100, shape).to(dtype))
            got, want = ours(mask, *arguments), theirs(mask, *arguments)
            assert type(got) is tv.Mask and got.dtype == dtype and torch.equal(got, want)
    points = tv.KeyPoints(torch.rand(5, 2) * 20, canvas_size=(H, W))
    got, want = ours(points, *arguments), theirs(points, *arguments)
    assert type(got) is tv.KeyPoints
    torch.testing.assert_close(
        got.as_subclass(torch.Tensor), want.as_subclass(torch.Tensor), rtol=0, atol=1e-4
    )
    for box_format in FORMATS:
        for clamping in ("soft", None):
            boxes = some_boxes(5, box_format=box_format)
            given = tv.BoundingBoxes(boxes, format=box_format, canvas_size=(H, W), clamping_mode=clamping)
            got, want = ours(given, *arguments), theirs(given, *arguments)
            assert type(got) is tv.BoundingBoxes and got.format == want.format
            torch.testing.assert_close(
                got.as_subclass(torch.Tensor), want.as_subclass(torch.Tensor), rtol=0, atol=1e-4
            )
    image = tv.Image(torch.rand(3, H, W))
    got = ours(image, *arguments)
    assert type(got) is tv.Image and got.shape[-2:] == theirs(image, *arguments).shape[-2:]


def test_functions_on_images_keep_their_class_and_refuse_targets():
    image, boxes = (
        tv.Image(torch.rand(3, H, W)),
        tv.BoundingBoxes(some_boxes(2), format="XYXY", canvas_size=(H, W)),
    )
    for name, arguments in (
        ("adjust_brightness", (0.5,)),
        ("invert", ()),
        ("gaussian_blur", (3,)),
        ("normalize", (0.5, 0.5)),
    ):
        step = getattr(AF, name)
        got = step(image, *arguments)
        assert type(got) is tv.Image and torch.equal(got, step(image.as_subclass(torch.Tensor), *arguments))
        with pytest.raises(TypeError, match=f"{name}: inpt must be images, got BoundingBoxes"):
            step(boxes, *arguments)
    stretched = AF.vertical_stretch(boxes, 2.0)
    want = vision.affine(boxes, 0.0, [0, 0], 2.0, [0.0, 0.0])
    torch.testing.assert_close(
        stretched[:, 1::2].as_subclass(torch.Tensor), want[:, 1::2].as_subclass(torch.Tensor)
    )


# ---- bad input, compiling

BAD = (
    (dict(masks=torch.zeros(3, H, W)), ValueError, r"masks must be \(B, H, W\)"),
    (dict(masks=torch.zeros(4, H, W + 1)), ValueError, r"masks must have the images' height and width"),
    (dict(masks=[torch.zeros(H, W)]), ValueError, "one tensor for each of 4 samples"),
    (dict(masks=3), TypeError, "masks must be a torch.Tensor"),
    (dict(masks=torch.zeros(4, H, W, dtype=torch.complex64)), TypeError, "masks must be real"),
    (dict(masks=torch.zeros(4, H, W, dtype=torch.uint8), mask_fill=256), ValueError, "mask_fill must be"),
    (
        dict(masks=torch.zeros(4, H, W, dtype=torch.uint8), mask_fill=0.5),
        ValueError,
        "mask_fill must be a whole",
    ),
    (dict(masks=torch.zeros(4, H, W, dtype=torch.bool), mask_fill=2), ValueError, "mask_fill must be"),
    (dict(boxes=torch.zeros(4, 3, 5)), ValueError, r"boxes must be \(B, N, 4\)"),
    (dict(boxes=torch.zeros(3, 4)), ValueError, r"boxes must be \(B, N, 4\)"),
    (dict(boxes=torch.zeros(4, 3, 4, dtype=torch.bool)), TypeError, "boxes must be numbers"),
    (dict(boxes=torch.zeros(4, 3, 4), box_format="YXYX"), ValueError, "box_format must be"),
    (dict(boxes=torch.zeros(4, 3, 4), counts=[1, 2]), ValueError, "counts must be whole numbers"),
    (dict(boxes=torch.zeros(4, 3, 4), counts=[1, 2, 3, 4]), ValueError, r"counts must be in \[0, 3\]"),
    (dict(boxes=[torch.zeros(3, 4)] * 4, counts=[1] * 4), ValueError, "a list needs none"),
    (dict(boxes=torch.zeros(4, 3, 4), min_area=-1), ValueError, "min_area must be"),
    (dict(boxes=torch.zeros(4, 3, 4), min_visibility=2), ValueError, "min_visibility must be"),
    (
        dict(boxes=torch.zeros(4, 3, 4), flip_permutation=[0]),
        ValueError,
        "flip_permutation is about keypoints",
    ),
    (dict(counts=[1]), ValueError, "counts is about boxes"),
    (dict(keypoints=torch.zeros(4, 3, 4)), ValueError, "keypoints must be numbers of shape"),
    (dict(keypoints=torch.zeros(4, 2)), ValueError, "keypoints must be numbers of shape"),
    (dict(keypoints=torch.zeros(4, 3, 2), flip_permutation=[0, 0, 1]), ValueError, "must be a permutation"),
    (
        dict(keypoints=torch.zeros(4, 3, 2), visible=torch.ones(4, 2)),
        ValueError,
        "visible must be of the key",
    ),
)


@pytest.mark.parametrize("given, error, words", BAD, ids=[str(i) for i in range(len(BAD))])
def test_refused(given, error, words):
    with pytest.raises(error, match=words):
        Augment(hflip=1.0)(images(), **given)


def test_refused_nests():
    aug = Augment(hflip=1.0)
    with pytest.raises(TypeError, match="expected an image among the parts"):
        aug({"label": 3})
    with pytest.raises(ValueError, match="not both"):
        aug((images(1)[0], {"boxes": some_boxes(2)}), masks=torch.zeros(H, W))
    with pytest.raises(ValueError, match="boxes must be"):
        aug((images(1)[0], {"boxes": torch.zeros(3, 5)}))


def test_compiled():
    aug = Augment(rotate=30, hflip=0.5, size=(20, 22), crop=(0.5, 1.0))
    p = aug.sample(images(), seed=5)
    x, masks, boxes, points = (
        images(),
        torch.randint(9, (4, H, W)),
        some_boxes(4, 3),
        torch.rand(4, 3, 2) * 20,
    )

    def step(x, masks, boxes, points, counts):
        return apply(
            x, p, masks=masks, boxes=boxes, keypoints=points, counts=counts, flip_permutation=[2, 1, 0]
        )

    counts = torch.tensor([3, 0, 1, 2])
    want = step(x, masks, boxes, points, counts)
    got = torch.compile(step, backend="eager", fullgraph=True)(x, masks, boxes, points, counts)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    whole = torch.compile(lambda x, m, b: aug(x, masks=m, boxes=b), backend="eager", fullgraph=True)
    moved = whole(x, masks, boxes)
    assert moved.masks.shape == (4, 20, 22) and moved.boxes_left.dtype == torch.bool


def test_the_result_has_names():
    assert fr.augment.Augmented._fields == ("images", "masks", "boxes", "boxes_left", "keypoints", "visible")


def test_masks_with_further_dimensions():
    masks = tv.Mask(torch.randint(9, (2, 3, H, W)))
    got, want = AF.rotate(masks, 33.0), vision.rotate(masks, 33.0)
    assert type(got) is tv.Mask and torch.equal(got, want)


@pytest.mark.parametrize("degrees", [90, -90, 450])
def test_a_quarter_turn_of_sides_that_are_even_and_odd(degrees):
    """Each pixel lies between two, of which images and masks take the same one, torchvision's."""
    for lead, layout in (((), torch.contiguous_format), ((2,), torch.channels_last)):
        for x in (torch.rand(*lead, 3, H, W), torch.randint(256, (*lead, 3, H, W), dtype=torch.uint8)):
            x = x.to(memory_format=layout)
            for fill in (None, [0.25, 0.5, 1.0]):
                got = AF.rotate(x, degrees, fill=fill)
                assert torch.equal(got, vision.rotate(x, degrees, fill=fill))
                assert got.is_contiguous(memory_format=layout)
        assert torch.equal(AF.rotate(x, degrees), AF.rotate(tv.Mask(x), degrees))
