"""torchvision's recipes as an `Augment`: what is not random is the same, step by step; what does not map is
named, with the reason and the remedy.
"""

import pytest
import torch

import fastreg
from fastreg.augment import Augment, apply

torchvision = pytest.importorskip("torchvision", reason='needs pip install "torch-fastreg[test]"')
v2 = pytest.importorskip("torchvision.transforms.v2", reason='needs pip install "torch-fastreg[test]"')
T = pytest.importorskip(
    "torchvision.transforms.v2.functional", reason='needs pip install "torch-fastreg[test]"'
)
tv_tensors = pytest.importorskip("torchvision.tv_tensors", reason='needs pip install "torch-fastreg[test]"')


def picture(height, width, dtype=torch.uint8, batch=()):
    return (torch.rand(*batch, 3, height, width) * 255).round().to(dtype)


def recipe(*transforms, **changes):
    return Augment.from_torchvision(v2.Compose(transforms), **changes)


@pytest.mark.parametrize("sides", ((40, 61), (61, 40), (33, 33), (20, 90)))
@pytest.mark.parametrize("size", (24, (27, 35), [30]))
def test_resize_and_the_window_in_the_middle(size, sides):
    transforms = v2.Resize(size), v2.CenterCrop((21, 18))
    image = picture(*sides)
    want = v2.Compose(transforms)(image)
    for aug in (recipe(*transforms), recipe(*transforms).eval()):
        assert (aug(image).int() - want.int()).abs().max() <= 1
    nearest = (v2.Resize(size, T.InterpolationMode.NEAREST), transforms[1])
    assert torch.equal(recipe(*nearest)(image), v2.Compose(nearest)(image))
    boxes = tv_tensors.BoundingBoxes(
        torch.tensor([[3.0, 4, 15, 16], [0, 0, 39, 30]]), format="XYXY", canvas_size=sides
    )
    mask = tv_tensors.Mask((image[:1] > 99).to(torch.uint8))
    points = tv_tensors.KeyPoints(torch.tensor([[3.0, 4], [18.5, 12.25]]), canvas_size=sides)
    sample = {"image": tv_tensors.Image(image), "boxes": boxes, "mask": mask, "points": points}
    got, want = recipe(*transforms)(sample), v2.Compose(transforms)(sample)
    for name in ("boxes", "points"):
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=1e-4)
    assert torch.equal(got["mask"], want["mask"]) and got["boxes"].canvas_size == (21, 18)


def test_the_shorter_side_alone():
    aug = recipe(v2.Resize(17), v2.RandomHorizontalFlip(1.0))
    image = picture(40, 61)
    want = T.horizontal_flip(T.resize(image, [17]))
    assert (aug(image).int() - want.int()).abs().max() <= 1
    assert aug.eval()(image).shape == want.shape


@pytest.mark.parametrize("turn", (v2.RandomRotation, v2.RandomAffine))
def test_a_resize_before_a_turn(turn):
    """It is a resampling of its own there, too; a turn in the same resampling would have other pixels."""
    transforms = v2.Resize((24, 30)), turn((20, 20), interpolation=T.InterpolationMode.BILINEAR)
    sample = {
        "image": tv_tensors.Image(picture(40, 61)),
        "mask": tv_tensors.Mask(torch.randint(9, (40, 61))),
        "points": tv_tensors.KeyPoints(torch.tensor([[30.0, 14], [18.5, 22.25]]), canvas_size=(40, 61)),
    }
    got, want = recipe(*transforms)(sample), v2.Compose(transforms)(sample)
    assert (got["image"].int() - want["image"].int()).abs().max() <= 2  # rounded twice
    assert torch.equal(got["mask"], want["mask"])
    torch.testing.assert_close(got["points"], want["points"], rtol=0, atol=1e-4)


def test_what_weights_come_with():
    preset = torchvision.models.ResNet50_Weights.IMAGENET1K_V2.transforms()
    x = picture(250, 300, batch=(2,))
    for given in (preset, [v2.RandomHorizontalFlip(0.0), preset]):
        aug = Augment.from_torchvision(given)
        for one in (aug, aug.eval()):
            torch.testing.assert_close(one(x), preset(x), rtol=0, atol=1.5 / 255 / 0.224)
    with pytest.raises(ValueError, match="Resize stands after RandomRotation"):
        Augment.from_torchvision([v2.RandomRotation(5, T.InterpolationMode.BILINEAR), preset])


def test_a_random_window_of_a_resized_image():
    aug = recipe(v2.Resize(32), v2.RandomCrop(24, padding=2), v2.RandomHorizontalFlip())
    x = picture(40, 61, batch=(8,))
    p = aug.sample(x, seed=0)
    got = apply(x, p, keypoints=torch.tensor([[[20.0, 11.0]]]).expand(8, 1, 2))
    small = T.resize(x, [32])
    for i in range(8):
        one = T.horizontal_flip(small[i]) if p.hflip[i] else small[i]
        top, left = (int(v) for v in p.crop[i, :2])
        assert (got.images[i].int() - T.crop(one, top, left, 24, 24).int()).abs().max() <= 1
        points = tv_tensors.KeyPoints(torch.tensor([[20.0, 11.0]]), canvas_size=(40, 61))
        points = T.resize(points, [32])
        points = T.horizontal_flip(points) if p.hflip[i] else points
        want = T.crop(points, top, left, 24, 24)
        torch.testing.assert_close(got.keypoints[i], want.as_subclass(torch.Tensor), rtol=0, atol=1e-4)
    assert p.crop[:, :2].unique(dim=0).shape[0] > 4


def test_images_of_several_sizes_become_a_batch():
    aug = recipe(v2.Resize(32), v2.CenterCrop(24))
    batch = aug.collate([(picture(40 + i, 61), i) for i in range(3)])
    assert batch[0].shape == (3, 3, 24, 24)


@pytest.mark.parametrize("dtype", (torch.uint8, torch.float32))
def test_grayscale(dtype):
    x = picture(9, 11, batch=(400,))
    x = x if dtype == torch.uint8 else x.float() / 255
    aug = recipe(v2.ColorJitter(0.3, 0.2, 0.4, 0.1), v2.RandomGrayscale(0.3), v2.GaussianBlur(3))
    p = aug.sample(x, seed=1)
    grey = p.grayscale != 0
    assert 0.2 < grey.double().mean() < 0.4
    coloured = apply(x, aug.sample(x, seed=1).__class__(**vars(p) | {"grayscale": None, "sigma": None}))
    want = torch.where(grey.view(-1, 1, 1, 1), T.rgb_to_grayscale(coloured, 3), coloured)
    want = torch.stack([T.gaussian_blur(v, [3, 3], [float(s)]) for v, s in zip(want, p.sigma, strict=True)])
    bound = 1 if dtype == torch.uint8 else 1e-5
    assert (apply(x, p).double() - want.double()).abs().max() <= bound
    for part in (slice(0, 7), slice(300, 400)):  # by the index, whatever the batch
        own = aug.sample(x[part], seed=1, offset=part.start)
        assert torch.equal(own.grayscale, p.grayscale[part])
    assert aug.eval().sample(x).grayscale is None
    one = picture(5, 5)[:1]
    assert torch.equal(Augment(grayscale=1.0)(one), one)
    assert "grayscale=0.3" in repr(aug)


def test_mixtures():
    x, y = picture(8, 8, batch=(6,)), torch.arange(6) % 5
    for given, want in (
        (v2.MixUp(alpha=0.4, num_classes=5), {"mixup": 0.4, "cutmix": 0.0}),
        (v2.CutMix(alpha=0.7, num_classes=5), {"mixup": 0.0, "cutmix": 0.7}),
        (v2.RandomChoice([v2.CutMix(num_classes=5), v2.MixUp(alpha=0.2, num_classes=5)]),
         {"mixup": 0.2, "cutmix": 1.0}),
    ):  # fmt: skip
        aug = recipe(v2.RandomHorizontalFlip(), given)
        assert {name: getattr(aug.mixing, name) for name in want} == want and aug.mixing.num_classes == 5
        images, labels = aug(x, labels=y)
        assert images.shape == x.shape and labels.shape == (6, 5)
        torch.testing.assert_close(labels.sum(1), torch.ones(6))


def test_padding_of_a_turn_stays_black():
    """Also where a resize follows, whose own border shows nothing from beyond the image."""
    aug = recipe(v2.RandomRotation((45, 45), T.InterpolationMode.BILINEAR), v2.Resize((32, 32)))
    assert aug(torch.ones(1, 3, 32, 32))[0, :, 0, 0].abs().max() == 0


@pytest.mark.parametrize(
    "transforms, words",
    [
        ([v2.RandomPerspective()], "RandomPerspective has no counterpart in Augment; do it outside"),
        ([v2.RandomApply([v2.RandomRotation(5)])], "RandomApply must have one transform of Random"),
        ([torch.nn.Flatten()], r"Flatten of torch\.nn\.modules\.flatten is no transform of torchvision's"),
        ([v2.CenterCrop(4), v2.RandomCrop(4)], "RandomCrop and CenterCrop are each a crop or a resize"),
        ([v2.ColorJitter(0.1), v2.CenterCrop(4)], "CenterCrop stands after ColorJitter, which Augment does"),
        ([v2.RandomGrayscale(), v2.ColorJitter(0.1)], "ColorJitter stands after RandomGrayscale"),
        ([v2.RandomRotation(3), v2.Resize(8)], "Resize stands after RandomRotation"),
        ([v2.Resize(8, max_size=9)], "Resize must have a size and max_size=None, because"),
        ([v2.RandomRotation(3, expand=True)], "RandomRotation must have expand=False, because all images"),
        ([v2.RandomRotation(3), v2.Resize((8, 8))],
         "Resize wants interpolation='bilinear' where RandomRotation wants 'nearest'; .* give both"),
        ([v2.ToDtype(torch.float32, scale=True), v2.RandAugment()],
         "RandAugment stands after ToDtype, which makes floats; .* put RandAugment first"),
        ([v2.RandomAffine((3, 9)), v2.RandomHorizontalFlip()],
         "RandomHorizontalFlip stands after an affine map .* put RandomHorizontalFlip first"),
        ([v2.RandomAffine(5, center=(1, 2))], "RandomAffine must have center=None, because"),
        ([v2.RandomResizedCrop(8, ratio=(1, 2))], "RandomResizedCrop must have ratio"),
        ([v2.RandomResizedCrop(8), v2.RandomAffine(5)], "RandomAffine stands after RandomResizedCrop"),
        ([v2.RandomCrop(8, (1, 2))], "RandomCrop must have the same padding on all sides, because"),
        ([v2.ToDtype(torch.float32)], "ToDtype must have scale=True"),
        ([v2.RandomHorizontalFlip(), v2.RandomHorizontalFlip()], "RandomHorizontalFlip stands there twice"),
        ([v2.RandomChoice([v2.ColorJitter(0.1)])], "RandomChoice must have MixUp and CutMix"),
        ([v2.MixUp(num_classes=3), v2.CutMix(num_classes=3)], "CutMix and MixUp are each a mixture"),
        ([v2.RandomErasing(value=1)], "RandomErasing must have value=0, because"),
    ],
)  # fmt: skip
def test_what_does_not_map_is_named(transforms, words):
    with pytest.raises(ValueError, match=rf"^Augment\.from_torchvision: {words}"):
        Augment.from_torchvision(transforms)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"resize": 0}, "resize must be whole numbers"),
        ({"resize": (1, 2, 3)}, "resize must be"),
        ({"resize": 3.5}, "resize must be"),
        ({"crop": "middle"}, 'crop must be .* or "center"'),
        ({"grayscale": 1.5}, "grayscale must be"),
    ],
)
def test_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        Augment(**changes)


def test_parameters_are_saved_and_replayed(tmp_path):
    x = picture(30, 41, batch=(3,))
    aug = Augment(resize=24, size=20, crop="center", grayscale=0.5)
    p = aug.sample(x, seed=4)
    torch.save(p, tmp_path / "p")
    assert torch.equal(apply(x, torch.load(tmp_path / "p")), apply(x, p))
    compiled = torch.compile(lambda x: apply(x, p), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), apply(x, p))
    assert fastreg.augment.Augment(resize=[24]).settings.resize == 24
