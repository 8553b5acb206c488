"""torchvision's Video: its frames are augmented alike, as one image would be, wherever it stands."""

import numpy as np
import pytest
import torch

from fastreg.augment import Augment, Indexed, functional

T = pytest.importorskip(
    "torchvision.transforms.v2.functional", reason='needs pip install "torch-fastreg[test]"'
)
tv = pytest.importorskip("torchvision.tv_tensors", reason='needs pip install "torch-fastreg[test]"')

H, W, FRAMES = 20, 24, 5
BOXES = torch.tensor([[1.0, 2.0, 9.0, 14.0], [3.0, 4.0, 20.0, 9.0]])


def video(seed=0):
    pixels = torch.rand(FRAMES, 3, H, W, generator=torch.Generator().manual_seed(seed))
    return tv.Video((pixels * 255).to(torch.uint8))


EVERY = {
    "all": Augment(
        hflip=0.5, rotate=30, size=(16, 18), crop=(0.5, 1.0), brightness=0.2, contrast=0.3, saturation=0.3,
        hue=0.1, grayscale=0.5, blur=(3, (0.1, 2.0)), erase=0.5, mean=0.5, std=0.5,
    ),
    "trivial": Augment.trivial(),
    "rand": Augment.rand(2, 9, hflip=0.5),
    "evaluation": Augment(resize=18, size=(16, 16), crop="center", hflip=0.5).eval(),
}  # fmt: skip


@pytest.mark.parametrize("kind", EVERY)
def test_each_frame_is_what_one_image_would_be(kind):
    aug = EVERY[kind]
    for seed in range(4):
        moved = aug(video(), torch.Generator().manual_seed(seed))
        assert type(moved) is tv.Video and len(moved) == FRAMES
        for frame, result in zip(video(), moved, strict=True):
            want = aug(frame, torch.Generator().manual_seed(seed))
            assert torch.equal(result, want)


def test_targets_move_with_all_frames():
    aug = EVERY["all"]
    masks = tv.Mask(torch.randint(9, (FRAMES, H, W)))
    target = {"boxes": BOXES, "masks": masks, "label": 3}
    moved, got = aug((video(), target), torch.Generator().manual_seed(1))
    image, want = aug((tv.Image(video()[0]), target), torch.Generator().manual_seed(1))
    assert torch.equal(moved[0], image) and torch.equal(got["boxes"], want["boxes"]) and got["label"] == 3
    assert type(got["masks"]) is tv.Mask and torch.equal(got["masks"], want["masks"])


def test_samples_and_collate():
    aug, samples = EVERY["all"], [(video(0), 3), (video(0), 2)]
    moved = aug(samples, torch.Generator().manual_seed(0))
    assert [type(v) for v, _ in moved] == [tv.Video] * 2 and not torch.equal(moved[0][0], moved[1][0])
    torch.manual_seed(0)
    batch, labels = aug.collate(samples)
    assert type(batch) is torch.Tensor and batch.shape == (2, FRAMES, 3, 16, 18) and labels.tolist() == [3, 2]
    assert aug.collate([video(), video()]).shape == batch.shape
    assert aug.collate([{"video": video(), "label": 1}] * 2)["video"].shape == batch.shape
    assert aug.collate([(video(), {"boxes": BOXES})] * 2)[1][1]["boxes"].shape == (2, 4)
    data = Indexed([(video(), 0)] * 3, seed=7)
    three, two = aug.collate([data[0], data[1], data[2]])[0], aug.collate([data[2], data[1]])[0]
    assert (
        torch.equal(three[1], two[1])
        and torch.equal(three[2], two[0])
        and not torch.equal(three[0], three[1])
    )


def test_functions_are_torchvisions():
    for name, arguments in (
        ("horizontal_flip", ()), ("rotate", (20.0,)), ("adjust_contrast", (0.6,)), ("posterize", (3,)),
        ("resized_crop", (1, 2, 11, 12, [9, 8])), ("equalize", ()),
    ):  # fmt: skip
        ours = getattr(functional, name)(video(), *arguments)
        theirs = getattr(T, name)(video(), *arguments)
        assert type(ours) is type(theirs) is tv.Video and ours.shape == theirs.shape
        assert (ours.int() - theirs.int()).abs().max() <= 1


def test_a_picture_has_each_frame_with_the_targets():
    flip = Augment(hflip=1.0)
    frames = np.asarray(flip.show([(tv.Image(v), {"boxes": BOXES}) for v in video()]))
    assert np.array_equal(np.asarray(flip.show((video(), {"boxes": BOXES}))), frames)


def test_what_is_no_video_of_one_sample_is_refused():
    with pytest.raises(ValueError, match=r"a Video must be \(T, C, H, W\), got \(2, 5, 3, 20, 24\)"):
        EVERY["all"](tv.Video(torch.rand(2, 5, 3, H, W)))
    with pytest.raises(ValueError, match="inside of the samples"):
        EVERY["all"](video(), boxes=BOXES)


def test_other_classes_of_torchvisions_are_named():
    class Own(tv.TVTensor):
        pass

    with pytest.raises(TypeError, match=r"got Own; of what should stay as it is take \.as_subclass"):
        Augment(hflip=1.0)((torch.rand(3, H, W), torch.rand(3).as_subclass(Own)))
