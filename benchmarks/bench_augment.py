"""Augmentation against torchvision's steps one after another, where torchvision is installed; the floor is a
copy of the batch.

Ours draws parameters for every sample, which counts; torchvision's are drawn before, one set for the whole
batch. With all steps further sides draw for every sample too: torchvision's random transforms in a loop over
the samples, and where they are installed kornia and, from bytes, Albumentations and a loop of OpenCV's. All
give float32, from float32 or uint8. Policies, crops, targets and a training step are in
bench_augment_recipes.py.
"""

import dataclasses
from collections.abc import Iterator
from functools import partial

import torch

import fastreg as fr
from fastreg.benchmarks import _opencv, _timing, peers
from fastreg.benchmarks._timing import Case, Targets, Work

try:
    import torchvision.transforms.v2 as transforms
    import torchvision.transforms.v2.functional as vision
except ImportError:  # torchvision is not made for every torch
    vision = None

GEOMETRY = {"hflip": 0.5, "rotate": 15, "scale": (0.9, 1.1), "translate": (0.1, 0.1), "shear": 5}
COLOUR = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}
NORMALISE = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
BLUR = {"blur": (3, (0.1, 2.0))}
CHAINS = {
    "all steps": GEOMETRY | COLOUR | BLUR | NORMALISE,
    "without blur": GEOMETRY | COLOUR | NORMALISE,
    "geometry": GEOMETRY,
}
SMOOTH = {name: value for name, value in CHAINS["all steps"].items() if name != "hue"}  # have a derivative
OTHERS = {224: {"kornia": 12, "loop": 12}, 32: {"kornia": 12, "loop": 100}}  # targets, by the images' side
SHAPES = {"full": ((256, 32), (32, 224)), "quick": ((256, 32), (32, 224)), "tiny": ((2, 9),)}
COPY = "a copy of the batch"


def _targets(name, side, dtype):
    """What a chain of steps should reach."""
    if name == "without blur":
        return Targets(floor=8)
    if name == "geometry":
        return Targets(eager=3 if (side, dtype) == (32, torch.float32) else 2.5)
    others = OTHERS.get(side, {}) | ({"opencv": 2.5} if dtype == torch.uint8 else {})
    floor = 4 if side == 32 else 1.7 if dtype == torch.uint8 else None
    return Targets(eager=10, floor=floor, others=others)


def cases(scale: str) -> Iterator[Case]:
    """The rows of the table."""
    row = partial(Case, "augment", scales=False)
    full = scale != "quick"
    for dtype in (torch.float32, torch.uint8) if vision else ():
        for batch, side in SHAPES[scale]:
            size, count = f"{batch} × 3 × {side} × {side}", 3 * batch * side**2
            for name, steps in CHAINS.items():
                build = partial(_build, steps, batch, side, dtype, name == "all steps")
                targets = _targets(name, side, dtype)
                yield row(f"augmentation, {name}", size, count, dtype, build, COPY, targets)
    for batch, side in SHAPES[scale] if vision and full else ():
        size, count = f"{batch} × 3 × {side} × {side}", 3 * batch * side**2
        yield row(
            "augmentation, gradient of the images", size, count, torch.float32,
            partial(_build_backward, batch, side), COPY, Targets(eager=5),
        )  # fmt: skip
        yield row(
            "augmentation, all steps of one image", f"3 × {side} × {side}", 3 * side**2, torch.uint8,
            partial(_build_one, side), "", Targets(eager=2),
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

        if "opencv" in sides:
            _check_opencv(steps, side)

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
    if everything and dtype == torch.uint8 and _opencv.is_installed() and device == "cpu":
        _opencv.use_threads()
        images = _opencv.rows_of(x)
        sides["opencv"] = lambda: _opencv.loop(images, steps)
    others = peers.sides(x, steps) if everything else {}
    proofs = {name: partial(peers.prove, name, side, by_torchvision) for name in others}
    return Work(sides | others, check, moved=x.numel() * (x.element_size() + 4), proofs=proofs)


def _check_opencv(steps, side):
    """The loop is off by 1.4 levels of 255 in the mean of a photograph: by the rounding of four steps to
    bytes, hues of two degrees, and a warp by float32. Without one of its steps it is off by more than 3."""
    x = _opencv.photographs(8, side)
    aug = fr.augment.Augment(**steps)
    for image, own, p in zip(x.split(1), _opencv.rows_of(x), per_sample(aug.sample(x, seed=1)), strict=True):
        want = by_torchvision(image.double() / 255, p)
        got = _opencv.batch_of([_opencv.augmented(own, p, steps)])
        off = (got - want).abs() * torch.tensor(steps["std"]).view(3, 1, 1) * 255
        assert off.mean() <= 2, f"OpenCV is off by {off.mean():.2f} levels"


def _build_backward(batch, side, device):
    """torchvision's gradient is one of a batch with one set of parameters."""
    x = torch.rand(batch, 3, side, side, device=device, requires_grad=True)
    aug = fr.augment.Augment(**SMOOTH)
    params = aug.sample(x, seed=1)
    drawn, grad = per_sample(params), torch.randn_like(x)

    def check():
        exact = x.detach()[:2].double().requires_grad_()
        weight = grad[:2].double()
        parts = zip(exact.split(1), drawn, strict=False)
        want = torch.autograd.grad(torch.cat([by_torchvision(*part) for part in parts]), exact, weight)[0]
        few = x.detach()[:2].requires_grad_()
        got = torch.autograd.grad(fr.augment.apply(few, aug.sample(few, seed=1)), few, grad[:2])[0]
        torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-3)

    outputs = {"fastreg": fr.augment.apply(x, params), "torch": by_torchvision(x, drawn[0])}
    target = torch.empty_like(grad)
    sides = {
        name: partial(torch.autograd.grad, output, x, grad, retain_graph=True)
        for name, output in outputs.items()
    }
    return Work(sides | {"floor": lambda: target.copy_(grad)}, check, moved=12 * x.numel())


def _build_one(side, device):
    """What a call costs where there is no batch."""
    steps = CHAINS["all steps"]
    work = _build(steps, 1, side, torch.uint8, False, device)
    x = (torch.rand(3, side, side, device=device) * 255).to(torch.uint8)
    aug, one = fr.augment.Augment(**steps, dtype=torch.float32), random_torchvision(steps)
    return Work({"fastreg": lambda: aug(x), "torch": lambda: one(x)}, work.check)


if __name__ == "__main__":
    _timing.run_alone("augment")
