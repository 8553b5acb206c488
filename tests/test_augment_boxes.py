"""Boxes of all of torchvision's formats over the edges of a crop: as its v2 moves and cuts them off, step by
step.
"""

import numpy
import pytest
import torch

from fastreg.augment import Augment, Params, Settings, apply

T = pytest.importorskip(
    "torchvision.transforms.v2.functional", reason='needs pip install "torch-fastreg[test]"'
)
tv_tensors = pytest.importorskip("torchvision.tv_tensors", reason='needs pip install "torch-fastreg[test]"')

H, W = 48, 64
FORMATS = ["XYXY", "XYWH", "CXCYWH", "XYWHR", "CXCYWHR", "XYXYXYXY"]


def boxes_of(box_format, count=12, dtype=torch.float32, clamping="soft", seed=0):
    generator = torch.Generator().manual_seed(seed)
    u = torch.rand(count, 5, generator=generator)
    centre = torch.stack([u[:, 0] * W, u[:, 1] * H], 1)
    sides = 4 + u[:, 2:4] * 24
    angle = (u[:, 4] * 360 - 180) * (box_format in FORMATS[3:])
    boxes = torch.cat([centre, sides, angle[:, None]], 1)
    boxes = boxes if box_format in FORMATS[3:] else boxes[:, :4]
    source = tv_tensors.BoundingBoxFormat["CXCYWHR" if box_format in FORMATS[3:] else "CXCYWH"]
    wanted = tv_tensors.BoundingBoxFormat[box_format]
    boxes = T.convert_bounding_box_format(boxes, source, wanted)
    return tv_tensors.BoundingBoxes(
        boxes.to(dtype), format=wanted, canvas_size=(H, W), clamping_mode=clamping
    )


def stepwise(boxes, crop, size, hflip, vflip):
    boxes = T.horizontal_flip(boxes) if hflip else boxes
    boxes = T.vertical_flip(boxes) if vflip else boxes
    return T.resized_crop(boxes, *crop, list(size))


@pytest.mark.parametrize("clamping", ("soft", "hard", None))
@pytest.mark.parametrize("box_format", FORMATS)
def test_over_the_edges_of_a_crop(box_format, clamping):
    crops = [(4, 9, 30, 25), (0, 0, H, W), (20, 30, 28, 34), (10, 3, 7, 50)]
    flips = [(0, 0), (1, 0), (0, 1), (1, 1)]
    # The size of the images, one that is wider, and one that is higher.
    for size in ((48, 64), (20, 60), (33, 17)):
        for crop, (hflip, vflip) in zip(crops, flips, strict=True):
            boxes = boxes_of(box_format, clamping=clamping)
            want = stepwise(boxes, crop, size, hflip, vflip)
            p = Params(
                hflip=torch.tensor([float(hflip)]), vflip=torch.tensor([float(vflip)]),
                crop=torch.tensor([crop]).double(), settings=Settings(size=size),
            )  # fmt: skip
            got = apply(torch.rand(3, H, W), p, boxes=boxes).boxes
            assert got.format == want.format and got.canvas_size == want.canvas_size
            torch.testing.assert_close(
                got.as_subclass(torch.Tensor), want.as_subclass(torch.Tensor), atol=2e-3, rtol=0
            )


@pytest.mark.parametrize("box_format", FORMATS[3:])
def test_turned_boxes_of_a_batch(box_format):
    """Each with its own crop; what does not count stays as it is."""
    aug = Augment(size=(30, 40), crop=(0.1, 0.6), hflip=0.5)
    many = [boxes_of(box_format, 5, seed=i) for i in range(6)]
    x = torch.rand(6, 3, H, W)
    p = aug.sample(x, seed=2)
    counts = torch.tensor([5, 4, 3, 2, 1, 0])
    stacked = torch.stack([b.as_subclass(torch.Tensor) for b in many])
    like = many[0]
    padded = stacked.as_subclass(type(like))
    vars(padded).update(vars(like))
    moved = apply(x, p, boxes=padded, counts=counts)
    listed = apply(x, p, boxes=many)
    for i, boxes in enumerate(many):
        crop = [int(v) for v in p.crop[i]]
        want = stepwise(boxes, crop, (30, 40), bool(p.hflip[i]), False).as_subclass(torch.Tensor)
        n = int(counts[i])
        torch.testing.assert_close(listed.boxes[i].as_subclass(torch.Tensor), want, atol=1e-3, rtol=0)
        torch.testing.assert_close(moved.boxes[i, :n].as_subclass(torch.Tensor), want[:n], atol=1e-3, rtol=0)
        assert torch.equal(moved.boxes[i, n:].as_subclass(torch.Tensor), stacked[i, n:])
        assert not moved.boxes_left[i, n:].any()
    empty = tv_tensors.BoundingBoxes(torch.zeros(0, like.shape[1]), format=like.format, canvas_size=(H, W))
    assert (
        apply(x[:1], Params(crop=p.crop[:1], settings=p.settings), boxes=[empty]).boxes[0].shape
        == empty.shape
    )


def painted(picture, colour):
    return (numpy.asarray(picture) == numpy.array(colour)).all(-1)


@pytest.mark.parametrize("box_format", FORMATS)
def test_boxes_of_every_format_are_drawn(box_format):
    """A square of 20 pixels, about (32, 24), turned by 45 degrees where the format knows an angle."""
    turned = box_format in FORMATS[3:]
    kinds = tv_tensors.BoundingBoxFormat
    box = torch.tensor([[32.0, 24, 20, 20, 45]])[:, : 5 if turned else 4]
    box = T.convert_bounding_box_format(box, kinds["CXCYWHR" if turned else "CXCYWH"], kinds[box_format])
    boxes = tv_tensors.BoundingBoxes(box, format=box_format, canvas_size=(H, W))
    image = tv_tensors.Image(torch.zeros(3, H, W, dtype=torch.uint8))
    aug = Augment(hflip=1.0)
    pictures = [
        aug.show({"image": image, "boxes": boxes}),
        aug.show(image.as_subclass(torch.Tensor), boxes=boxes),
    ]
    pictures.append(aug.show([image.as_subclass(torch.Tensor)], boxes=[boxes]))
    for picture in pictures:
        both = painted(picture, (255, 70, 70))
        for on in (both[:H], both[-H:]):
            rows, columns = numpy.nonzero(on)
            side = 20 * 2**0.5 if turned else 20
            assert abs(columns.min() - (32 - side / 2)) <= 1 and abs(columns.max() - (32 + side / 2)) <= 1
            assert abs(rows.min() - (24 - side / 2)) <= 1 and abs(rows.max() - (24 + side / 2)) <= 1
            assert on.sum() >= (2 * side if turned else 4 * side - 8)


@pytest.mark.parametrize("box_format", FORMATS[3:])
def test_a_sheared_box_is_the_same_from_either_end(box_format):
    """The rectangle that a turned box becomes does not depend on the corner from which it is listed, and has
    the longer diagonal of the parallelogram that its corners move to.
    """
    turns = torch.arange(-180.0, 180.0, 10)
    found = []
    for other_end in (0, 180):
        angle = torch.where(turns + other_end >= 180, turns + other_end - 360, turns + other_end)
        box = torch.tensor([W / 2, H / 2, 16, 8]).expand(len(turns), 4)
        boxes = T.convert_bounding_box_format(
            torch.cat([box, angle[:, None]], 1), tv_tensors.BoundingBoxFormat.CXCYWHR,
            tv_tensors.BoundingBoxFormat[box_format],
        )  # fmt: skip
        boxes = tv_tensors.BoundingBoxes(boxes, format=box_format, canvas_size=(H, W))
        before = T.convert_bounding_box_format(boxes, new_format="XYXYXYXY")
        before = before.as_subclass(torch.Tensor).view(-1, 2)
        moved = apply(
            torch.rand(3, H, W), Params(shear=torch.tensor([[30.0, 0.0]]), settings=Settings()), boxes=boxes,
            keypoints=before,
        )  # fmt: skip
        one, two, three, four = moved.keypoints.view(-1, 4, 2).unbind(1)
        longer = torch.maximum((three - one).norm(dim=1), (four - two).norm(dim=1))
        corners = T.convert_bounding_box_format(moved.boxes, new_format="XYXYXYXY")
        found.append(corners.as_subclass(torch.Tensor).view(-1, 4, 2))
        diagonals = found[-1][:, 2:] - found[-1][:, :2]
        torch.testing.assert_close(diagonals.norm(dim=2), longer[:, None].expand(-1, 2), atol=2e-3, rtol=0)
    torch.testing.assert_close(found[0], found[1].roll(2, 1), atol=2e-3, rtol=0)


def boxes_inside(box_format, count=64):
    """Small boxes around the middle of the image."""
    u = torch.rand(count, 5, generator=torch.Generator().manual_seed(0))
    turned = box_format in FORMATS[3:]
    boxes = torch.cat([20 + 8 * u[:, :2], 1 + 9 * u[:, 2:4], 360 * u[:, 4:] - 180], 1)[
        :, : 5 if turned else 4
    ]
    source = tv_tensors.BoundingBoxFormat["CXCYWHR" if turned else "CXCYWH"]
    wanted = tv_tensors.BoundingBoxFormat[box_format]
    boxes = T.convert_bounding_box_format(boxes, source, wanted)
    return tv_tensors.BoundingBoxes(boxes, format=wanted, canvas_size=(H, W))


@pytest.mark.parametrize("box_format", FORMATS)
def test_what_moves_nothing_leaves_boxes_to_the_bit(box_format):
    """Cutting a turned box off writes it anew, at times with another angle, although it lies inside."""
    boxes = boxes_inside(box_format, 4000)
    for augment in (Augment(brightness=0.3, erase=1.0, blur=(3, (0.1, 1.0))), Augment(rotate=90).eval()):
        moved = augment((torch.rand(3, H, W), boxes))[1]
        assert torch.equal(moved.as_subclass(torch.Tensor), boxes.as_subclass(torch.Tensor))


@pytest.mark.parametrize("box_format", FORMATS)
def test_the_shorter_side_is_resized_as_by_torchvision(box_format):
    """Sides of unequal ratios make a turned box a parallelogram, for which a resize has a rule of its own."""
    boxes = boxes_inside(box_format)
    for side in (95, 31, 17):
        moved = Augment(resize=side)((torch.rand(3, H, W), boxes))[1]
        want = T.resize(boxes, [side])
        assert moved.canvas_size == want.canvas_size
        ours, theirs = (
            T.convert_bounding_box_format(one, new_format="XYXYXYXY") if box_format in FORMATS[3:] else one
            for one in (moved, want)
        )
        ours, theirs = (one.as_subclass(torch.Tensor).view(64, -1, 2) for one in (ours, theirs))
        half_a_turn = theirs.roll(theirs.shape[1] // 2, 1) if theirs.shape[1] == 4 else theirs
        error = torch.minimum((ours - theirs).abs().amax((1, 2)), (ours - half_a_turn).abs().amax((1, 2)))
        assert float(error.max()) < 2e-3
