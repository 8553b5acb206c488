"""Augmentation against torchvision's steps one after another, where torchvision is installed; the floor is a
copy of the batch.

Ours draws parameters for every sample, which counts; torchvision's are drawn before, one set for the whole
batch. With all steps two further sides draw for every sample too: torchvision's random transforms in a loop
over the samples, and kornia where it is installed. All give float32, from float32 or uint8.
"""

import dataclasses
from collections.abc import Iterator
from functools import partial

import torch

import fastreg as fr
from fastreg.benchmarks import _timing
from fastreg.benchmarks._timing import Case, Targets, Work

try:
    import torchvision.transforms.v2 as transforms
    import torchvision.transforms.v2.functional as vision
    from torchvision import tv_tensors
except ImportError:  # torchvision is not made for every torch
    vision = None
try:
    import kornia.augmentation as kornia
except ImportError:
    kornia = None

GEOMETRY = {"hflip": 0.5, "rotate": 15, "scale": (0.9, 1.1), "translate": (0.1, 0.1), "shear": 5}
COLOUR = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}
NORMALISE = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
BLUR = {"blur": (3, (0.1, 2.0))}
CHAINS = {
    "all steps": (GEOMETRY | COLOUR | BLUR | NORMALISE, Targets(eager=10)),
    "without blur": (GEOMETRY | COLOUR | NORMALISE, Targets(floor=8)),
    "geometry": (GEOMETRY, Targets(eager=2.5)),
}
OTHERS = {224: {"kornia": 12, "loop": 12}, 32: {"kornia": 12, "loop": 100}}  # targets, by the images' side
SHAPES = {"full": ((256, 32), (32, 224)), "quick": ((256, 32), (32, 224)), "tiny": ((2, 9),)}


def cases(scale: str) -> Iterator[Case]:
    """The rows of the table."""
    for dtype in (torch.float32, torch.uint8) if vision else ():
        for batch, side in SHAPES[scale]:
            for name, (steps, targets) in CHAINS.items():
                size = f"{batch} × 3 × {side} × {side}"
                everything = name == "all steps"
                if everything:
                    targets = dataclasses.replace(targets, others=OTHERS.get(side, {}))
                build = partial(_build, steps, batch, side, dtype, everything)
                work = f"augmentation, {name}"
                yield Case(
                    "augment",
                    work,
                    size,
                    3 * batch * side**2,
                    dtype,
                    build,
                    "a copy of the batch",
                    targets,
                    scales=False,
                )

    for batch, side in SHAPES[scale] if vision else ():
        size, count = f"{batch} × 3 × {side} × {side}", 3 * batch * side**2
        yield Case(
            "augment", "augmentation, TrivialAugmentWide", size, count, torch.uint8,
            partial(_build_trivial, batch, side), "a copy of the batch", Targets(eager=8), scales=False,
        )  # fmt: skip
        for name in ("all steps", "geometry"):
            yield Case(
                "augment", f"augmentation, {name}, 8 boxes and a mask", size, count, torch.uint8,
                partial(_build_targets, CHAINS[name][0], batch, side), "the same without boxes and masks",
                Targets(floor=1.15), scales=False,
            )  # fmt: skip


def by_torchvision(x, p):
    """The steps that are on, for a batch with the parameters `p` of one sample; float32."""
    x = vision.horizontal_flip(x) if p["hflip"] else x
    bilinear = transforms.InterpolationMode.BILINEAR
    x = vision.affine(x, p["angle"], p["translate"], p["scale"], p["shear"], bilinear)
    for name in COLOUR:
        if name in p:
            x = getattr(vision, f"adjust_{name}")(x, p[name])
    if "sigma" in p:
        x = vision.gaussian_blur(x, [3, 3], p["sigma"])
    x = x if x.is_floating_point() else vision.to_dtype(x, torch.float32, scale=True)
    return vision.normalize(x, p["mean"], p["std"]) if p["mean"] else x


def random_torchvision(steps):
    """The same steps with parameters drawn by torchvision, one set for each call."""
    bilinear = transforms.InterpolationMode.BILINEAR
    return transforms.Compose(
        [
            transforms.RandomHorizontalFlip(steps["hflip"]),
            transforms.RandomAffine(
                steps["rotate"], steps["translate"], steps["scale"], steps["shear"], bilinear
            ),
            transforms.ColorJitter(**{name: steps[name] for name in COLOUR}),
            transforms.GaussianBlur(*steps["blur"]),
            transforms.ToDtype(torch.float32, scale=True),
            transforms.Normalize(steps["mean"], steps["std"]),
        ]
    )


def random_kornia(steps):
    """The same steps with parameters drawn by kornia, for each sample its own; from images in [0, 1]."""
    return torch.nn.Sequential(
        kornia.RandomHorizontalFlip(p=steps["hflip"]),
        kornia.RandomAffine(steps["rotate"], steps["translate"], steps["scale"], steps["shear"], p=1.0),
        kornia.ColorJitter(**{name: steps[name] for name in COLOUR}, p=1.0),
        kornia.RandomGaussianBlur((3, 3), steps["blur"][1], p=1.0),
        kornia.Normalize(steps["mean"], steps["std"]),
    )


def per_sample(params):
    """A dict of Python numbers for each sample."""
    fields = {f.name: getattr(params, f.name) for f in dataclasses.fields(params)}
    fields = {name: value.tolist() for name, value in fields.items() if isinstance(value, torch.Tensor)}
    shared = {"mean": params.settings.mean, "std": params.settings.std}
    return [dict(zip(fields, values, strict=True)) | shared for values in zip(*fields.values(), strict=True)]


def _build(steps, batch, side, dtype, everything, device):
    x = torch.rand(batch, 3, side, side, device=device)
    if dtype == torch.uint8:
        x = (x * 255).to(torch.uint8)
    aug = fr.augment.Augment(**steps, dtype=torch.float32)
    drawn = per_sample(aug.sample(x, seed=1))

    def check():
        # In float64, without the roundings that uint8 takes on its way.
        images = x[:2].double() / (255 if dtype == torch.uint8 else 1)
        got = fr.augment.apply(x[:2], aug.sample(x[:2], seed=1)).double()
        want = torch.cat([by_torchvision(image, p) for image, p in zip(images.split(1), drawn, strict=False)])
        torch.testing.assert_close(got, want, rtol=0, atol=1e-3)

    source = x.float()
    target = torch.empty_like(source)
    sides = {
        "fastreg": lambda: aug(x),
        "torch": lambda: by_torchvision(x, drawn[0]),
        "floor": lambda: target.copy_(source),
    }
    if everything:
        one = random_torchvision(steps)
        sides["loop"] = lambda: torch.stack([one(image) for image in x])
    if everything and kornia:
        chain = random_kornia(steps)
        sides["kornia"] = lambda: chain(x if dtype == torch.float32 else x.float() / 255)
    return Work(sides, check, moved=x.numel() * (x.element_size() + 4))


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
            want = theirs._apply_image_or_video_transform(
                want, names[k], strength, theirs.interpolation, theirs._fill
            )
            # Contrast is about a mean, whose last bit is another one in another order.
            assert (image.int() - want.int()).abs().float().mean() <= 0.01, names[k]

    target = torch.empty_like(x)
    sides = {
        "fastreg": lambda: aug(x),
        "torch": lambda: torch.stack([theirs(image) for image in x]),
        "floor": lambda: target.copy_(x),
    }
    return Work(sides, check, moved=2 * x.numel())


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


if __name__ == "__main__":
    _timing.run_alone("augment")
