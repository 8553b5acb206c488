"""Augmentation against torchvision's steps one after another, where torchvision is installed; the floor is a copy of the batch.

Ours draws parameters for every sample, which counts; torchvision's are drawn before, one set for the whole batch. Both give
float32, from float32 or uint8.
"""

import dataclasses
from functools import partial

import torch
from fastreg.benchmarks import _timing
from fastreg.benchmarks._timing import Case, Targets, Work

import fastreg as fr

try:
    import torchvision
    import torchvision.transforms.v2.functional as vision
except ImportError:  # not made for every torch
    vision = None

GEOMETRY = {"hflip": 0.5, "rotate": 15, "scale": (0.9, 1.1), "translate": (0.1, 0.1), "shear": 5}
COLOUR = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}
NORMALISE = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
BLUR = {"blur": (3, (0.1, 2.0))}
CHAINS = {
    "all steps": (GEOMETRY | COLOUR | BLUR | NORMALISE, Targets(eager=10)),
    "without blur": (GEOMETRY | COLOUR | NORMALISE, Targets(floor=8)),
    "geometry": (GEOMETRY, Targets(eager=2.5)),
}
SHAPES = {"full": ((256, 32), (32, 224)), "quick": ((256, 32), (32, 224)), "tiny": ((2, 9),)}


def cases(scale):
    """The rows of the table."""
    for dtype in (torch.float32, torch.uint8) if vision else ():
        for batch, side in SHAPES[scale]:
            for name, (steps, targets) in CHAINS.items():
                size = f"{batch} × 3 × {side} × {side}"
                build = partial(_build, steps, batch, side, dtype)
                work = f"augmentation, {name}"
                yield Case("augment", work, size, 3 * batch * side**2, dtype, build, "a copy of the batch", targets, scales=False)


def by_torchvision(x, params):
    """The steps that are on, for a batch with the parameters of its first sample; float32."""
    fields = {f.name: getattr(params, f.name) for f in dataclasses.fields(params)}
    p = {name: value[0].tolist() for name, value in fields.items() if isinstance(value, torch.Tensor)}
    x = vision.horizontal_flip(x) if p["hflip"] else x
    bilinear = torchvision.transforms.InterpolationMode.BILINEAR
    x = vision.affine(x, p["angle"], p["translate"], p["scale"], p["shear"], bilinear)
    for name in COLOUR:
        if name in p:
            x = getattr(vision, f"adjust_{name}")(x, p[name])
    if "sigma" in p:
        x = vision.gaussian_blur(x, [3, 3], p["sigma"])
    x = x if x.is_floating_point() else vision.to_dtype(x, torch.float32, scale=True)
    return vision.normalize(x, NORMALISE["mean"], NORMALISE["std"]) if params.settings.mean else x


def _build(steps, batch, side, dtype, device):
    x = torch.rand(batch, 3, side, side, device=device)
    if dtype == torch.uint8:
        x = (x * 255).to(torch.uint8)
    aug = fr.augment.Augment(**steps, dtype=torch.float32)
    drawn = aug.sample(x, seed=1)

    def check():
        images = x[:1].double() / (255 if dtype == torch.uint8 else 1)  # without the roundings that uint8 takes on its way
        want = by_torchvision(images, aug.sample(x[:1], seed=1))
        torch.testing.assert_close(fr.augment.apply(x[:1], aug.sample(x[:1], seed=1)).double(), want, rtol=0, atol=1e-3)

    source = x.float()
    target = torch.empty_like(source)
    sides = {
        "fastreg": lambda: aug(x),
        "torch": lambda: by_torchvision(x, drawn),
        "floor": lambda: target.copy_(source),
    }
    return Work(sides, check, moved=x.numel() * (x.element_size() + 4))


if __name__ == "__main__":
    _timing.run_alone("augment")
