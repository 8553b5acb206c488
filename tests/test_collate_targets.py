"""Targets in whatever classes samples have, beside samples without any, and beside other pictures: they are
moved, or there is an error, and never are they left where they were.
"""

import collections
import dataclasses

import numpy as np
import pytest
import torch

import fastreg as fr
from fastreg.augment import Augment

tv_tensors = pytest.importorskip("torchvision.tv_tensors", reason='needs pip install "torch-fastreg[test]"')

HEIGHT, WIDTH = 20, 31
IMAGE = torch.rand(3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0))
BOXES = torch.tensor([[1.0, 2.0, 5.0, 8.0]])
FLIPPED = torch.tensor([[26.0, 2.0, 30.0, 8.0]])
FLIP = Augment(hflip=1.0)


class Dict(dict):
    """A dict of another class."""


@dataclasses.dataclass
class Record:
    image: torch.Tensor
    boxes: torch.Tensor
    label: int = 0


@dataclasses.dataclass(frozen=True)
class Frozen:
    image: torch.Tensor
    target: dict


SAMPLES = {
    "dataclass": (lambda: Record(IMAGE, BOXES), lambda s: s.image, lambda s: s.boxes),
    "frozen": (lambda: Frozen(IMAGE, {"boxes": BOXES}), lambda s: s.image, lambda s: s.target["boxes"]),
    "dict subclass": (lambda: Dict(image=IMAGE, boxes=BOXES), lambda s: s["image"], lambda s: s["boxes"]),
    "within a tuple": (lambda: (IMAGE, Dict(boxes=BOXES)), lambda s: s[0], lambda s: s[1]["boxes"]),
    "UserDict": (
        lambda: collections.UserDict(image=IMAGE, boxes=BOXES), lambda s: s["image"], lambda s: s["boxes"]
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", SAMPLES)
def test_targets_in_other_classes_move(kind):
    make, image, boxes = SAMPLES[kind]
    moved = FLIP(make())
    assert type(moved) is type(make())
    assert torch.equal(image(moved), IMAGE.flip(-1)) and torch.equal(boxes(moved), FLIPPED)
    assert torch.equal(boxes(make()), BOXES)
    pair = FLIP([make(), make()])
    assert len(pair) == 2 and torch.equal(boxes(pair[1]), FLIPPED)


@pytest.mark.parametrize("kind", SAMPLES)
def test_collated_targets_in_other_classes_move(kind):
    make, image, boxes = SAMPLES[kind]
    batch = FLIP.collate([make(), make()])
    found = boxes(batch) if kind not in ("within a tuple", "frozen") else None
    if found is None:
        targets = batch[1] if kind == "within a tuple" else batch.target
        found = [target["boxes"] for target in targets]
    assert torch.equal(image(batch), IMAGE.flip(-1).expand(2, -1, -1, -1))
    assert len(found) == 2 and all(torch.equal(one, FLIPPED) for one in found)
    if kind == "dataclass":
        assert isinstance(batch, Record) and batch.label.tolist() == [0, 0]


def test_numpy_targets_move():
    sample = {"image": IMAGE.numpy(), "boxes": BOXES.numpy(), "name": "a"}
    batch = FLIP.collate([sample, sample])
    assert all(torch.equal(one, FLIPPED) for one in batch["boxes"]) and batch["name"] == ["a", "a"]
    assert torch.equal(batch["image"][1], IMAGE.flip(-1))
    assert isinstance(sample["boxes"], np.ndarray)


@pytest.mark.parametrize("first", [0, 1])
def test_samples_without_objects_do_not_take_the_others_away(first):
    box = tv_tensors.BoundingBoxes(BOXES, format="XYXY", canvas_size=(HEIGHT, WIDTH))
    samples = [(IMAGE, {"id": 7}), (IMAGE, {"id": 8, "boxes": box, "labels": torch.tensor([3])})]
    targets = FLIP.collate(samples[::-1] if first else samples)[1]
    there = targets[1 - first]
    assert targets[first] == {"id": 7} and there["id"] == 8
    assert torch.equal(there["boxes"].as_subclass(torch.Tensor), FLIPPED)


def test_boxes_that_are_none():
    batch = FLIP.collate([{"image": IMAGE, "boxes": None}, {"image": IMAGE, "boxes": BOXES}])
    assert batch["boxes"][0] is None and torch.equal(batch["boxes"][1], FLIPPED)


def test_parts_that_some_samples_lack():
    with pytest.raises(KeyError, match=r"samples must have the same parts, got \['image'\] in the first"):
        FLIP.collate([{"image": IMAGE}, {"image": IMAGE, "boxes": BOXES}])


@pytest.mark.parametrize("targets", [{}, {"boxes": BOXES}], ids=["alone", "with boxes"])
def test_the_image_is_the_one_of_that_name(targets):
    depth = torch.ones(1, HEIGHT, WIDTH)
    dark = Augment(brightness=(0.0, 0.0))
    sample = {"depth": depth, "image": torch.ones(3, HEIGHT, WIDTH), **targets}
    for moved in (dark(sample), {k: v[0] for k, v in dark.collate([sample]).items()}):
        assert not moved["image"].any() and torch.equal(moved["depth"], depth)


@pytest.mark.parametrize("form", ["XYWHR", "CXCYWHR", "XYXYXYXY"])
def test_turned_boxes_of_an_image_without_objects(form):
    count = 8 if form == "XYXYXYXY" else 5
    boxes = tv_tensors.BoundingBoxes(torch.zeros(0, count), format=form, canvas_size=(HEIGHT, WIDTH))
    for moved in (FLIP((IMAGE, boxes))[1], fr.augment.functional.horizontal_flip(boxes)):
        assert moved.shape == (0, count) and moved.format == boxes.format


def test_pictures_show_what_is_visible_and_counted():
    points = torch.tensor([[[5.0, 5.0], [15.0, 15.0]]])
    plain = np.asarray(Augment().show(IMAGE[None], keypoints=points[:, :1]))
    hidden = np.asarray(Augment().show(IMAGE[None], keypoints=points, visible=torch.tensor([[1, 0]])))
    assert (plain == hidden).all()
    boxes = torch.tensor([[[2.0, 2.0, 9.0, 9.0], [12.0, 8.0, 20.0, 15.0]]])
    one = np.asarray(Augment().show(IMAGE[None], boxes=boxes[:, :1]))
    counted = np.asarray(Augment().show(IMAGE[None], boxes=boxes, counts=[1]))
    assert (one[:HEIGHT] == counted[:HEIGHT]).all()


Named = collections.namedtuple("Named", "image y")


@dataclasses.dataclass
class Labelled:
    pixel_values: torch.Tensor
    labels: torch.Tensor


@pytest.mark.parametrize("kind", (dict, Named, Labelled))
def test_mixtures_of_named_parts(kind):
    """Images and labels are found by their names, and all else stays."""
    augment = Augment(hflip=0.5, mixup=0.4, num_classes=7)
    images = [torch.rand(3, 8, 8) for _ in range(6)]
    if kind is dict:
        samples = [{"image": v, "label": i, "path": str(i)} for i, v in enumerate(images)]
    else:
        samples = [kind(v, torch.tensor(i)) for i, v in enumerate(images)]
    batch = augment.collate(samples)
    parts = batch if kind is dict else vars(batch) if kind is Labelled else batch._asdict()
    image, label = list(parts)[:2]
    assert parts[image].shape == (6, 3, 8, 8) and parts[label].shape == (6, 7)
    torch.testing.assert_close(parts[label].sum(1), torch.ones(6))
    assert kind is not dict or parts["path"] == [str(i) for i in range(6)]
    again = Augment.collate(augment.eval(), samples)
    whole = again if kind is dict else vars(again) if kind is Labelled else again._asdict()
    assert whole[label].tolist() == list(range(6))
    batch = again if kind is not dict else {**again, "other": torch.zeros(6)}
    moved = augment.train()(batch)
    parts = moved if kind is dict else vars(moved) if kind is Labelled else moved._asdict()
    assert parts[label].shape == (6, 7)
    with pytest.raises(TypeError, match="mixup and cutmix need labels"):
        augment({"image": torch.rand(6, 3, 8, 8), "one": torch.zeros(6), "two": torch.zeros(6)})


@pytest.mark.parametrize("kind", [list, tuple])
def test_targets_in_a_list_under_their_key_move(kind):
    images = torch.stack([IMAGE, IMAGE])
    masks, points = (IMAGE[:1] > 0.5).long(), torch.tensor([[[3.0, 4.0]]])
    batch = {
        "image": images,
        "boxes": kind([BOXES, BOXES[:0]]),
        "masks": kind([masks, masks.repeat(3, 1, 1)]),
    }
    moved = FLIP({**batch, "keypoints": kind([points, points])})
    assert type(moved["boxes"]) is kind and [len(part) for part in moved["boxes"]] == [1, 0]
    assert torch.equal(moved["boxes"][0], FLIPPED)
    assert torch.equal(moved["masks"][0], masks.flip(-1)) and moved["masks"][1].shape[0] == 3
    assert moved["keypoints"][1].flatten().tolist() == [WIDTH - 1 - 3, 4]
    one = FLIP((IMAGE, {"masks": [masks[0], masks[0]], "boxes": BOXES}))
    assert torch.equal(one[1]["masks"][1], masks[0].flip(-1))
    collated = FLIP.collate([{"image": IMAGE, "boxes": [BOXES, BOXES]}] * 2)
    assert all(torch.equal(part, FLIPPED) for sample in collated["boxes"] for part in sample)


def test_a_dict_of_lists_is_a_batch():
    batch = collections.OrderedDict(
        images=[IMAGE, IMAGE[:, :9]], boxes=[BOXES, BOXES], labels=[1, 2], name="x"
    )
    moved = FLIP(batch)
    assert type(moved) is collections.OrderedDict and moved["labels"] == [1, 2] and moved["name"] == "x"
    assert torch.equal(moved["images"][0], IMAGE.flip(-1)) and torch.equal(
        moved["images"][1], IMAGE[:, :9].flip(-1)
    )
    assert all(torch.equal(boxes, FLIPPED) for boxes in moved["boxes"])
    turn = Augment(rotate=180)
    own = turn({"images": [IMAGE] * 4, "boxes": [BOXES] * 4}, torch.Generator().manual_seed(0))
    samples = turn([(IMAGE, {"boxes": BOXES})] * 4, torch.Generator().manual_seed(0))
    for image, boxes, (other, target) in zip(own["images"], own["boxes"], samples, strict=True):
        assert torch.equal(image, other) and torch.equal(boxes, target["boxes"])
    assert not torch.equal(own["images"][0], own["images"][1])


@pytest.mark.parametrize(
    "batch, message",
    [
        (
            {"images": [IMAGE] * 2, "boxes": [BOXES]},
            "'boxes' beside a list of 2 images must be a list of one",
        ),
        ({"images": [IMAGE] * 2, "boxes": BOXES}, "'boxes' beside a list of 2 images must .* got Tensor"),
        ({"x": {"images": [IMAGE] * 2, "boxes": [BOXES] * 2}}, "expected one image beside targets in a nest"),
    ],
)
def test_lists_that_do_not_fit_are_refused(batch, message):
    with pytest.raises(ValueError, match=message):
        FLIP(batch)


def test_what_is_left_of_boxes_stands_beside_them():
    boxes = torch.cat([BOXES, torch.tensor([[0.0, 0.0, 2.0, 2.0]])])
    target = {"boxes": boxes, "labels": torch.tensor([3, 4])}
    for asked in ({"min_area": 5}, {"min_visibility": 0.1, "min_area": 5}):
        assert FLIP((IMAGE, target), **asked)[1]["boxes_left"].tolist() == [True, False]
        batch = FLIP.collate(
            [(IMAGE, target), (IMAGE, {"boxes": boxes[:0], "labels": boxes[:0, 0]})], **asked
        )
        assert [t["boxes_left"].tolist() for t in batch[1]] == [[True, False], []]
        named = FLIP.collate([{"image": IMAGE, **target}] * 2, **asked)
        assert [left.tolist() for left in named["boxes_left"]] == [[True, False]] * 2
        listed = FLIP({"image": torch.stack([IMAGE] * 2), "boxes": [boxes, BOXES]}, **asked)
        assert [left.tolist() for left in listed["boxes_left"]] == [[True, False], [True]]
    assert set(FLIP((IMAGE, target))[1]) == {"boxes", "labels"} == set(target)
    own = tv_tensors.BoundingBoxes(BOXES, format="XYXY", canvas_size=(HEIGHT, WIDTH))
    for sample, message in (
        ((IMAGE, own), "need boxes under a key of a dict"),
        (Record(IMAGE, BOXES), "dataclass"),
    ):
        with pytest.raises(ValueError, match=message):
            FLIP(sample, min_area=5)
        with pytest.raises(ValueError, match=message):
            FLIP.collate([sample], min_area=5)


def test_collate_names_the_arguments_it_has():
    for name in ("counts", "visible", "masks", "bogus"):
        with pytest.raises(
            ValueError, match=f"collate: argument must be one of 'mask_fill', .* got '{name}'"
        ):
            FLIP.collate([(IMAGE, 3)], **{name: 1})


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("is_theirs", [False, True])
def test_pictures_of_batches_show_the_targets_of_each_sample(count, is_theirs):
    """As many boxes as samples, too, which are no batch of single boxes."""
    boxes = BOXES + torch.tensor([[0.0], [4.0], [9.0]])[:count]
    if is_theirs:
        boxes = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(HEIGHT, WIDTH))
    points = torch.tensor([[[15.0, 3.0]]])
    samples = [(IMAGE, {"boxes": boxes}), (IMAGE, {"boxes": boxes[:1], "keypoints": points})]
    images, targets = torch.stack([IMAGE, IMAGE]), [target for _, target in samples]
    want = np.asarray(FLIP.show(samples))
    assert (want != np.asarray(FLIP.show(images))).any()
    for batch in ((images, targets), {"image": images, "target": targets}, (images, {"x": targets})):
        assert np.array_equal(np.asarray(FLIP.show(batch)), want)
    alone = np.asarray(FLIP.show([(image, {"boxes": target["boxes"]}) for image, target in samples]))
    columns = {"boxes": [target["boxes"] for target in targets]}
    for batch in ({"image": images, **columns}, {"images": [IMAGE, IMAGE], **columns}):
        assert np.array_equal(np.asarray(FLIP.show(batch)), alone)
