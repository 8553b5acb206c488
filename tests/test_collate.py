"""Augment.collate and lists of images: whatever datasets yield becomes the batch that torch's collation would
make, with its images augmented; images of different sizes become one batch; pixels in wrong units are told.
"""

import collections
import dataclasses
import functools

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, default_collate

import fastreg as fr
from fastreg.augment import Augment, Settings, apply

Pair = collections.namedtuple("Pair", ("image", "label"))


@dataclasses.dataclass
class Record:
    image: torch.Tensor
    label: int
    name: str = "a"


@dataclasses.dataclass(frozen=True)
class Frozen:
    label: int
    image: torch.Tensor
    mask: torch.Tensor = dataclasses.field(default_factory=lambda: torch.zeros(1, 4, 5), compare=False)


IMAGES = [torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(i)) for i in range(3)]
STRUCTURES = {
    "image": (lambda x, i: x, lambda b: (b, None)),
    "array": (lambda x, i: x.numpy(), lambda b: (b, None)),
    "tuple": (lambda x, i: (x, i), lambda b: b),
    "list": (lambda x, i: [x, i], lambda b: b),
    "longer tuple": (lambda x, i: (x, i, {"more": 2.0}), lambda b: b[:2]),
    "dict": (lambda x, i: {"image": x, "label": i}, lambda b: (b["image"], b["label"])),
    "dict, label first": (lambda x, i: {"label": i, "x": x}, lambda b: (b["x"], b["label"])),
    "dict of arrays": (
        lambda x, i: {"img": x.numpy(), "label": np.int64(i)},
        lambda b: (b["img"], b["label"]),
    ),
    "dict with a mask": (
        lambda x, i: {"mask": x[:1], "pixel_values": x, "label": i},
        lambda b: (b["pixel_values"], b["label"]),
    ),
    "UserDict": (
        lambda x, i: collections.UserDict(image=x, label=i),
        lambda b: (b["image"], b["label"]),
    ),
    "OrderedDict": (
        lambda x, i: collections.OrderedDict(label=i, image=x),
        lambda b: (b["image"], b["label"]),
    ),
    "named tuple": (Pair, lambda b: (b.image, b.label)),
    "dataclass": (Record, lambda b: (b.image, b.label)),
    "frozen dataclass": (lambda x, i: Frozen(i, x), lambda b: (b.image, b.label)),
}


@pytest.mark.parametrize("kind", STRUCTURES)
def test_every_structure_keeps_its_form_and_its_image_is_augmented(kind):
    make, parts = STRUCTURES[kind]
    samples = [make(x, i) for i, x in enumerate(IMAGES)]
    batch = Augment(hflip=1.0).collate(samples)
    images, labels = parts(batch)
    assert torch.equal(images, torch.stack(IMAGES).flip(-1))
    assert labels is None or labels.tolist() == [0, 1, 2]
    if "dataclass" in kind:
        assert type(batch) is type(samples[0]) and torch.equal(samples[0].image, IMAGES[0])
        assert kind == "frozen dataclass" or batch.name == ["a", "a", "a"]
    else:
        assert type(batch) is type(default_collate(samples))
    # Nothing of the samples was changed.
    assert torch.equal(torch.as_tensor(parts(samples[0])[0]), IMAGES[0])


@pytest.mark.parametrize("workers", (0, 2))
def test_in_a_loader_with_a_key(workers):
    samples = [{"left": x, "right": x, "label": i} for i, x in enumerate(IMAGES)]
    loader = DataLoader(
        samples, 3, num_workers=workers, collate_fn=functools.partial(Augment(hflip=1.0).collate, key="right")
    )
    (batch,) = loader
    assert torch.equal(batch["left"], torch.stack(IMAGES))
    assert torch.equal(batch["right"], torch.stack(IMAGES).flip(-1))
    for given, key in (
        ([(i, x) for i, x in enumerate(IMAGES)], 1),
        ([Pair(i, x) for i, x in enumerate(IMAGES)], 1),
    ):
        assert torch.equal(Augment(hflip=1.0).collate(given, key)[1], torch.stack(IMAGES).flip(-1))
    renamed = Augment(hflip=1.0).collate([Pair(i, x) for i, x in enumerate(IMAGES)], "label")
    assert torch.equal(renamed.label, torch.stack(IMAGES).flip(-1)) and renamed.image.tolist() == [0, 1, 2]


def test_what_holds_no_image_is_refused_with_the_remedy():
    augment, x = Augment(hflip=1.0), IMAGES[0]
    for sample, error, message in (
        ({"left": x, "right": x}, TypeError, r"got 2 in 'left': Tensor, 'right': Tensor; say which .*key="),
        ({"image": [1, 2], "label": 0}, TypeError, r"got 0 in 'image': list, 'label': int; .*key="),
        (Record("file.png", 0), TypeError, "expected one tensor"),
        ((0, x), TypeError, r"images must be tensors \(C, H, W\), got int; .*key="),
        (({"image": x}, 0), TypeError, "images must be tensors .* got dict"),
        ("file.png", TypeError, "images must be tensors .* got str"),
    ):
        with pytest.raises(error, match=rf"^Augment.collate: .*{message}"):
            augment.collate([sample, sample])
    with pytest.raises(KeyError, match=r"samples have no 'img', got \['image'\]"):
        augment.collate([{"image": x}], "img")
    with pytest.raises(TypeError, match="key='image' needs samples with such a part, got tuple of 2"):
        augment.collate([(x, 0)], "image")
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed").new("RGB", (4, 5))
    with pytest.raises(TypeError, match=r"Augment.collate: images must be tensors.*PILToTensor"):
        augment.collate([(image, 0)])


UNEVEN = [
    torch.rand(3, h, w, generator=torch.Generator().manual_seed(h)) for h, w in ((30, 40), (25, 31), (50, 20))
]


@pytest.mark.parametrize("dtype", (torch.float32, torch.uint8), ids=str)
@pytest.mark.parametrize("train", (True, False))
@pytest.mark.parametrize(
    "augment",
    (
        Augment.imagenet(size=16),
        Augment(size=(8, 9), rotate=30, erase=0.5, translate=(0.1, 0.1)),
        Augment(size=20, crop=4, hflip=0.5),
    ),
    ids=("imagenet", "rotate", "window"),
)
def test_images_of_different_sizes_become_one_batch(augment, train, dtype):
    """Each gets what it would as that sample of a batch of images of its size."""
    augment = augment.train(train)
    images = [x if dtype == torch.float32 else (x * 255).byte() for x in UNEVEN]
    got = augment(images, torch.Generator().manual_seed(3))
    assert got.shape == (3, 3, *augment.size)
    for i, image in enumerate(images):
        alike = augment(image.expand(3, *image.shape), torch.Generator().manual_seed(3))
        assert torch.equal(got[i], alike[i])
    torch.manual_seed(5)
    batch = augment.collate([(x, i) for i, x in enumerate(images)])
    torch.manual_seed(5)
    assert torch.equal(batch[0], augment(images)) and batch[1].tolist() == [0, 1, 2]
    torch.manual_seed(5)
    assert torch.equal(augment.collate([{"image": x.numpy()} for x in images])["image"], batch[0])


def test_a_list_of_even_images_is_their_batch():
    augment = Augment(rotate=30, brightness=0.3)
    batch = torch.stack(IMAGES)
    assert torch.equal(
        augment(IMAGES, torch.Generator().manual_seed(1)), augment(batch, torch.Generator().manual_seed(1))
    )


def test_lists_that_become_no_batch_are_refused():
    with pytest.raises(
        ValueError, match=r"^augment: images of different sizes, such as \(25, 31\) and \(50, 20\), "
    ):
        Augment(hflip=0.5)(UNEVEN)
    with pytest.raises(ValueError, match=r"augment: .* give Augment a size="):
        Augment(hflip=0.5).collate([(x, 0) for x in UNEVEN])
    with pytest.raises(ValueError, match=r"same number of channels, dtype and device, got 1 of .* and 3 of"):
        Augment(size=8)([UNEVEN[0], UNEVEN[1][:1]])
    with pytest.raises(ValueError, match="same number of channels"):
        Augment(size=8)([UNEVEN[0], UNEVEN[1].double()])
    with pytest.raises(ValueError, match=r"each image of a list must be \(C, H, W\)"):
        Augment(size=8)([UNEVEN[0][None], UNEVEN[1][None]])
    with pytest.raises(TypeError, match=r"each image of a list must be a torch.Tensor"):
        Augment(size=8)([UNEVEN[0], UNEVEN[1].numpy()])


# --------------------------------------------------------------------------------------------------
# units


@pytest.mark.parametrize(
    "options",
    [
        dict.fromkeys(names.split(), 0.3)
        for names in ("brightness", "contrast", "saturation", "hue", "mean std", "std")
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16, torch.float16), ids=str)
def test_pixels_from_0_to_255_are_no_images_in_0_to_1(options, dtype):
    images = torch.stack(IMAGES)
    images[0, 0, 0, 0], images[0, 0, 0, 1] = 0, 1
    augment = Augment(**options)
    with pytest.raises(
        ValueError, match=r"^augment: .* must be in \[0, 1\] .* up to 255; divide them by 255"
    ):
        augment((images * 255).to(dtype))
    with pytest.raises(ValueError, match="up to 255"):
        apply((images * 255).to(dtype), augment.sample(images))
    augment((images * 255).byte())
    for fine in (
        images,
        images * 1.2 - 0.1,
        (images - 0.45) / 0.2,
        images * torch.inf,
        images * torch.nan,
        images[:0],
    ):
        augment(fine.to(dtype))
    Augment(rotate=30, hflip=0.5, blur=(3, (1, 2)))((images * 255).to(dtype))  # which have no units


def test_a_mean_for_pixels_from_0_to_255():
    images = (torch.stack(IMAGES) * 255).byte()
    mean, std = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
    with pytest.raises(
        ValueError, match=r"^augment: mean and std are for images in \[0, 1\], .* divide both by 255"
    ):
        Augment(mean=mean, std=std)(images)
    with pytest.raises(ValueError, match="divide both by 255"):
        apply(images, fr.augment.Params(settings=Settings(mean=123.0, std=58.0)))
    want = (images.double() - torch.tensor(mean).double().view(3, 1, 1)) / torch.tensor(std).double().view(
        3, 1, 1
    )
    torch.testing.assert_close(
        Augment(mean=mean, std=std)(images.float()), want.float(), rtol=1e-5, atol=1e-5
    )
    scaled = Augment(mean=[m / 255 for m in mean], std=[s / 255 for s in std])
    torch.testing.assert_close(scaled(images), want.float(), rtol=1e-5, atol=1e-5)


def test_mixtures_name_the_class_that_is_none():
    images = torch.stack(IMAGES)
    for mix in (fr.augment.mixup, fr.augment.cutmix):
        name = mix.__name__
        for wrong in (-100, -1, 4):
            with pytest.raises(
                ValueError, match=rf"^{name}: targets must be class indices in \[0, 4\), got {wrong}; "
            ):
                mix(images, torch.tensor([0, wrong, 2]), num_classes=4)
        for labels in (torch.eye(3).long(), torch.ones(3, 1).long(), torch.tensor([True, False, True])):
            with pytest.raises(ValueError, match=rf"^{name}: class indices must be \(B,\), got "):
                mix(images, labels, num_classes=3)
        with pytest.raises(TypeError, match=f"^{name}: num_classes must be an int"):
            mix(images, torch.tensor([0, 1, 2]), num_classes=3.0)
        mix(images, torch.eye(3), num_classes=3)
        mix(images, torch.tensor([0, 1, 2], dtype=torch.uint8), num_classes=3)
