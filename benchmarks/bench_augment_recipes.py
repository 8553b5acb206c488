"""Augmentation as it is trained with, where torchvision is installed: TrivialAugmentWide, random resized
crops, boxes and masks beside the images, and whole training steps fed by a DataLoader.

Ours draws parameters for every sample; torchvision's steps draw one set for each call, so they get one image
after the other, unless a row says otherwise. The floor is a copy of the batch, or what the row says.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import nn
from torch.utils.data import DataLoader, default_collate

import fastreg as fr
from fastreg.benchmarks import _opencv, _timing
from fastreg.benchmarks._timing import Case, Targets, Work
from fastreg.benchmarks.bench_augment import (
    CHAINS,
    COLOUR,
    COPY,
    NORMALISE,
    SHAPES,
    per_sample,
    random_torchvision,
)

try:
    import torchvision.transforms.v2 as transforms
    import torchvision.transforms.v2.functional as vision
    from torchvision import tv_tensors
except ImportError:  # torchvision is not made for every torch
    vision = None

BARE = dict.fromkeys(COLOUR | NORMALISE) | {"hflip": 0.0}
CROPS = {  # of Augment.imagenet: changes, targets
    "random resized crop": (BARE, Targets(eager=2.5)),
    "imagenet()": ({}, Targets(eager=10, others={"loop": 12})),
}
FED = {"full": (64, 4), "quick": (64, 2), "tiny": (4, 2)}  # images of a batch, batches of an epoch


def cases(scale: str) -> Iterator[Case]:
    """The rows of the table."""
    row = partial(Case, "augment_recipes", scales=False)
    threads = _timing.two_threads()
    for batch, side in SHAPES[scale] if vision else ():
        size, count = f"{batch} × 3 × {side} × {side}", 3 * batch * side**2
        yield row(
            "augmentation, TrivialAugmentWide", size, count, torch.uint8,
            partial(_build_trivial, batch, side), COPY, Targets(eager=8, others={"opencv": 3}),
        )  # fmt: skip
        for name in ("all steps", "geometry"):
            yield row(
                f"augmentation, {name}, 8 boxes and a mask", size, count, torch.uint8,
                partial(_build_targets, CHAINS[name], batch, side), "the same without boxes and masks",
                Targets(floor=1.15),
            )  # fmt: skip
    batch, side = (2, 11) if scale == "tiny" else (32, 256)
    for dtype in (torch.float32, torch.uint8) if vision and scale != "quick" else ():
        for name, (changes, targets) in CROPS.items():
            yield row(
                f"augmentation, {name}", f"{batch} × 3 × {side} × {side}", 3 * batch * side**2, dtype,
                partial(_build_crops, changes, name == "imagenet()", batch, side, dtype), COPY, targets,
            )  # fmt: skip
    batch, steps = FED[scale]
    if vision:
        yield row(
            "an epoch of a ResNet of 8 layers, 2 workers crop, mirror and TrivialAugmentWide",
            f"{steps} × {batch} × 3 × 32 × 32", 3 * 32**2 * batch * steps, torch.uint8,
            partial(_build_epoch, batch, steps), "the same images as they are, normalised before",
            Targets(eager=1.5) if scale == "full" else Targets(), threads=threads, rounds=3,
        )  # fmt: skip


def _operated(policy, image, name, strength):
    """One operation of torchvision's policy, by its name and strength."""
    return policy._apply_image_or_video_transform(image, name, strength, policy.interpolation, policy._fill)


def _build_trivial(batch, side, device):
    """torchvision draws one operation for each call, so it gets one image after the other."""
    x = (torch.rand(batch, 3, side, side, device=device) * 255).to(torch.uint8)
    aug, theirs = fr.augment.Augment.trivial(), transforms.TrivialAugmentWide()

    def check():
        drawn = aug.sample(x, seed=1)
        got = fr.augment.apply(x, drawn)
        names = fr.augment.OPERATIONS
        for image, want, k, strength in zip(
            got, x, drawn.operations[:, 0].tolist(), drawn.magnitudes[:, 0].tolist(), strict=True
        ):
            want = _operated(theirs, want, names[k], strength)
            # Contrast is about a mean, whose last bit is another one in another order.
            assert (image.int() - want.int()).abs().float().mean() <= 0.01, names[k]
        if "opencv" in sides:
            _check_opencv(side, theirs)

    target = torch.empty_like(x)
    sides = {
        "fastreg": lambda: aug(x),
        "torch": lambda: torch.stack([theirs(image) for image in x]),
        "floor": lambda: target.copy_(x),
    }
    if _opencv.is_installed() and device == "cpu":
        _opencv.use_threads()
        images = _opencv.rows_of(x)
        sides["opencv"] = lambda: _opencv.trivial_loop(images)
    return Work(sides, check, moved=2 * x.numel())


def _check_opencv(side, theirs):
    """A byte is off by one at most in the mean of a photograph: OpenCV rounds what it blends, where
    torchvision cuts off, and takes another one of two pixels that are equally near."""
    x = _opencv.photographs(4, side)
    for name, (low, high) in _opencv.SPACE.items():
        for image, own, share in zip(x, _opencv.rows_of(x), (0, 0.3, 0.7, 1), strict=True):
            strength = low + (high - low) * share
            strength = round(strength) if name == "Posterize" else strength
            want = _operated(theirs, image, name, strength)
            got = _opencv.batch_of([_opencv.operated(own, name, strength)])[0]
            off = (got.float() - want.float()).abs().mean()
            assert off <= 1.5, f"OpenCV's {name} of {strength} is off by {off:.2f} levels"


def _by_torchvision(image, p, size):
    """A crop and the steps after it of an image (1, C, H, W) with the parameters of a sample."""
    image = vision.horizontal_flip(image) if p.get("hflip") else image
    box = [int(v) for v in p["crop"]]
    image = vision.resized_crop(image, *box, [size, size], antialias=True)
    for name in COLOUR:
        if name in p:
            image = getattr(vision, f"adjust_{name}")(image, p[name])
    image = image if image.is_floating_point() else vision.to_dtype(image, torch.float32, scale=True)
    return vision.normalize(image, p["mean"], p["std"]) if p["mean"] else image


def _random_crops(colours):
    """The transforms of `Augment.imagenet`, or its crop alone."""
    crop = transforms.RandomResizedCrop(224)
    if not colours:
        return crop
    return transforms.Compose(
        [
            crop,
            transforms.RandomHorizontalFlip(),
            transforms.ColorJitter(**COLOUR),
            transforms.ToDtype(torch.float32, scale=True),
            transforms.Normalize(**NORMALISE),
        ]
    )


def _build_crops(changes, colours, batch, side, dtype, device):
    """torchvision has one crop for the whole batch, drawn before."""
    x = torch.rand(batch, 3, side, side, device=device)
    x = (x * 255).to(torch.uint8) if dtype == torch.uint8 else x
    aug, one = fr.augment.Augment.imagenet(**changes, dtype=torch.float32), _random_crops(colours)
    drawn = per_sample(aug.sample(x, seed=1))
    target = torch.empty(batch, 3, 224, 224, device=device)
    source = torch.rand_like(target)

    def check():
        images = x[:2].double() / (255 if dtype == torch.uint8 else 1)
        got = fr.augment.apply(x[:2], aug.sample(x[:2], seed=1)).double()
        want = [_by_torchvision(image, p, 224) for image, p in zip(images.split(1), drawn, strict=False)]
        torch.testing.assert_close(got, torch.cat(want), rtol=0, atol=1e-3)

    sides = {
        "fastreg": lambda: aug(x),
        "torch": lambda: _by_torchvision(x, drawn[0], 224),
        "floor": lambda: target.copy_(source),
    }
    if colours:
        sides["loop"] = lambda: torch.stack([one(image) for image in x])
    return Work(sides, check)


def _build_targets(steps, batch, side, device):
    """torchvision moves the boxes and the mask of one image after the other."""
    x = (torch.rand(batch, 3, side, side, device=device) * 255).to(torch.uint8)
    masks = torch.randint(20, (batch, side, side), device=device, dtype=torch.uint8)
    boxes = torch.rand(batch, 8, 4, device=device) * side / 2
    boxes[..., 2:] += boxes[..., :2]
    aug = fr.augment.Augment(**steps)
    affine = transforms.RandomAffine(steps["rotate"], steps["translate"], steps["scale"], steps["shear"])
    one = transforms.Compose([transforms.RandomHorizontalFlip(steps["hflip"]), affine])
    one = random_torchvision(steps) if "blur" in steps else one
    samples = [
        (
            tv_tensors.Image(image),
            tv_tensors.BoundingBoxes(part, format="XYXY", canvas_size=(side, side)),
            tv_tensors.Mask(mask),
        )
        for image, part, mask in zip(x, boxes, masks, strict=True)
    ]

    def check():
        drawn = aug.sample(x, seed=1)
        moved = fr.augment.apply(x, drawn, masks=masks, boxes=boxes)
        for i, p in enumerate(per_sample(drawn)[:4]):
            given = samples[i][1:]
            given = [vision.horizontal_flip(t) for t in given] if p["hflip"] else given
            want = [vision.affine(t, p["angle"], p["translate"], p["scale"], p["shear"]) for t in given]
            torch.testing.assert_close(moved.boxes[i], want[0].as_subclass(torch.Tensor), rtol=0, atol=1e-2)
            # A position between two pixels is rounded in float32 there.
            assert (moved.masks[i] != want[1]).float().mean() <= 1e-3

    sides = {
        "fastreg": lambda: aug(x, masks=masks, boxes=boxes),
        "torch": lambda: [one(*sample) for sample in samples],
        "floor": lambda: aug(x),
    }
    return Work(sides, check)


STATISTICS = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616)}


class _Residual(nn.Module):
    def __init__(self, width, out, stride):
        super().__init__()
        conv = partial(nn.Conv2d, kernel_size=3, padding=1, bias=False)
        norm = nn.BatchNorm2d
        self.body = nn.Sequential(
            conv(width, out, stride=stride), norm(out), nn.ReLU(), conv(out, out), norm(out)
        )
        self.past = nn.Identity()
        if stride > 1:
            self.past = nn.Sequential(nn.Conv2d(width, out, 1, stride, bias=False), norm(out))

    def forward(self, x):
        return torch.relu(self.past(x) + self.body(x))


def resnet8():
    """He et al. 2016, section 4.2, with n = 1: three blocks of 16, 32 and 64 channels."""
    blocks = (_Residual(16, 16, 1), _Residual(16, 32, 2), _Residual(32, 64, 2))
    first = (nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    return nn.Sequential(*first, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


class _Images(torch.utils.data.Dataset):
    """Random images of CIFAR's shape."""

    def __init__(self, count, transform=None):
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
        self.labels = torch.randint(10, (count,), generator=generator).tolist()
        self.transform = transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        image = self.images[i] if self.transform is None else self.transform(self.images[i])
        return image, self.labels[i]


class _Epoch:
    """A model, its optimiser and its loader; a call is one epoch."""

    def __init__(self, dataset, batch, device, start, collate=None):
        self.model = resnet8().to(device)
        self.model.load_state_dict(start)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
        self.device = device
        # The workers live on between two epochs, and have nothing to do then.
        self.loader = DataLoader(dataset, batch, num_workers=2, collate_fn=collate, persistent_workers=True)

    def step(self, x, y):
        loss = nn.functional.cross_entropy(self.model(x.to(self.device)), y.to(self.device))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def __call__(self):
        return [self.step(x, y) for x, y in self.loader]


def _build_epoch(batch, steps, device):
    start = resnet8().state_dict()
    aug = fr.augment.Augment.trivial(hflip=0.5, size=32, crop=4, **STATISTICS)
    last = [transforms.ToDtype(torch.float32, scale=True), transforms.Normalize(**STATISTICS)]
    first = [
        transforms.RandomCrop(32, padding=4),
        transforms.RandomHorizontalFlip(),
        transforms.TrivialAugmentWide(),
    ]
    normalised = transforms.Compose(last)
    theirs = _Images(batch * steps, transforms.Compose(first + last))
    plain = _Images(batch * steps)
    done = _Images(batch * steps)
    done.images = normalised(plain.images)
    epoch = partial(_Epoch, batch=batch, device=device, start=start)

    def check():
        """The recipe with the parameters of a few samples, one step after the other, and without any."""
        x = plain.images[:8]
        drawn = aug.sample(x, seed=1)
        got, parts = fr.augment.apply(x, drawn), []
        for image, p, k, strength in zip(
            x,
            per_sample(drawn),
            drawn.operations[:, 0].tolist(),
            drawn.magnitudes[:, 0].tolist(),
            strict=True,
        ):
            image = vision.horizontal_flip(image) if p["hflip"] else image
            image = vision.crop(image, *(int(v) for v in p["crop"]))
            image = _operated(first[-1], image, fr.augment.OPERATIONS[k], strength)
            parts.append(normalised(image))
        off = (got - torch.stack(parts)).abs().mean((1, 2, 3))
        assert off.max() <= 1e-3, off
        losses = []
        for data, collate in ((plain, fr.augment.Augment(**STATISTICS).collate), (done, default_collate)):
            few = collate([data[i] for i in range(batch)])
            losses.append(_Epoch(data, batch, device, start).step(*few))
        torch.testing.assert_close(*losses)

    sides = {"fastreg": epoch(plain, collate=aug.collate), "torch": epoch(theirs), "floor": epoch(done)}
    return Work(sides, check)


if __name__ == "__main__":
    _timing.run_alone("augment_recipes")
