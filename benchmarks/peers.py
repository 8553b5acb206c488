"""Other libraries that do what fastreg does, found by import; each is proven before it is timed.

Augmentation: each builds its chain from the same `steps`, whose parameters it draws for every sample itself.
Every step alone, with a range of one value, does to photographs what torchvision does.

Losses on a GPU, by kernels of Triton and CUDA: they have torch's value and gradient in float64.
"""

import importlib
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch

from fastreg.benchmarks import _opencv

try:
    import kornia.augmentation as kornia
except ImportError:
    kornia = None
try:
    import albumentations
except ImportError:
    albumentations = None

COLOUR = ("brightness", "contrast", "saturation", "hue")
ONE = (1.0, 1.0)
NEUTRAL = {
    "hflip": 0.0, "rotate": (0.0, 0.0), "scale": ONE, "translate": None, "shear": (0.0, 0.0),
    "brightness": ONE, "contrast": ONE, "saturation": ONE, "hue": (0.0, 0.0), "blur": (3, (0.1, 0.1)),
    "mean": (0.0,) * 3, "std": (1.0,) * 3,
}  # fmt: skip
# The steps with one value each: what torchvision's functions take, and the ranges of that value alone.
ALONE = {
    "hflip": ({"hflip": True}, {"hflip": 1.0}),
    "rotate": ({"angle": 15.0}, {"rotate": (15.0, 15.0)}),
    "scale": ({"scale": 1.1}, {"scale": (1.1, 1.1)}),
    "shear": ({"shear": (5.0, 0.0)}, {"shear": (5.0, 5.0)}),
    "brightness": ({"brightness": 0.7}, {"brightness": (0.7, 0.7)}),
    "contrast": ({"contrast": 0.7}, {"contrast": (0.7, 0.7)}),
    "saturation": ({"saturation": 0.7}, {"saturation": (0.7, 0.7)}),
    "hue": ({"hue": 0.1}, {"hue": (0.1, 0.1)}),
    "blur": ({"sigma": 1.0}, {"blur": (3, (1.0, 1.0))}),
    "mean": ({"mean": (0.5, 0.4, 0.3)}, {"mean": (0.5, 0.4, 0.3)}),
    "std": ({"std": (0.5, 0.4, 0.3)}, {"std": (0.5, 0.4, 0.3)}),
}
AS_IT_IS = {
    "hflip": False, "angle": 0.0, "translate": (0, 0), "scale": 1.0, "shear": (0.0, 0.0),
    "mean": NEUTRAL["mean"], "std": NEUTRAL["std"],
}  # fmt: skip


def by_kornia(steps: dict) -> Callable:
    """A function of a batch, float32 in [0, 1] or bytes."""
    chain = torch.nn.Sequential(
        kornia.RandomHorizontalFlip(p=steps["hflip"]),
        kornia.RandomAffine(steps["rotate"], steps["translate"], steps["scale"], steps["shear"], p=1.0),
        kornia.ColorJitter(**{name: steps[name] for name in COLOUR}, p=1.0),
        kornia.RandomGaussianBlur((steps["blur"][0],) * 2, steps["blur"][1], p=1.0),
        kornia.Normalize(steps["mean"], steps["std"]),
    )
    return lambda x: chain(x if x.is_floating_point() else x.float() / 255)


def by_albumentations(steps: dict) -> Callable:
    """A function of a list of images (H, W, 3) of bytes, which it takes one after the other."""
    low, high = _range(steps["rotate"])
    shares = steps["translate"] or (0.0, 0.0)
    chain = albumentations.Compose(
        [
            albumentations.HorizontalFlip(p=steps["hflip"]),
            albumentations.Affine(
                scale=steps["scale"],
                keep_ratio=True,
                translate_percent={axis: _range(share) for axis, share in zip("xy", shares, strict=True)},
                rotate=(-high, -low),  # counter-clockwise
                shear={"x": _range(steps["shear"]), "y": (0.0, 0.0)},
                p=1.0,
            ),
            albumentations.ColorJitter(**{name: steps[name] for name in COLOUR}, p=1.0),
            albumentations.GaussianBlur((steps["blur"][0],) * 2, steps["blur"][1], p=1.0),
            albumentations.Normalize(steps["mean"], steps["std"], p=1.0),
        ]
    )
    return lambda images: _opencv.batch_of([chain(image=image)["image"] for image in images])


def _range(value):
    return value if isinstance(value, tuple) else (-value, value)


def sides(x: torch.Tensor, steps: dict) -> dict[str, Callable]:
    """What augments the batch `x` by each library that is installed and takes it, by its name. A chain is
    made at the first call, because a library of another version may not take the steps.
    """
    found = {}
    if kornia:
        by_batch = cache(lambda: by_kornia(steps))
        found["kornia"] = lambda: by_batch()(x)
    if albumentations and x.dtype == torch.uint8 and x.device.type == "cpu":
        _opencv.use_threads()
        images, one_by_one = _opencv.rows_of(x), cache(lambda: by_albumentations(steps))
        found["albumentations"] = lambda: one_by_one()(images)
    return found


def prove(name: str, side: int, by_torchvision: Callable) -> None:
    """Raise unless every step of a library does what torchvision's does. A mean of 0.5 levels of 255 is what
    Albumentations loses by rounding to bytes; a step that is left out shows as 0.9 and more.
    """
    x = _opencv.photographs(4, side)
    for step, (value, steps) in ALONE.items():
        p = AS_IT_IS | value
        want = by_torchvision(x.double() / 255, p)
        if name == "kornia":
            got = by_kornia(NEUTRAL | steps)(x)
        else:
            got = by_albumentations(NEUTRAL | steps)(_opencv.rows_of(x))
        off = ((got - want).abs() * torch.tensor(p["std"]).view(3, 1, 1)).mean() * 255
        assert off <= 0.7, f"{step} is off by {off:.2f} levels of 255"


# ---- losses


def _liger(module: Any, smoothing: float) -> Callable:
    return module.LigerCrossEntropyLoss(label_smoothing=smoothing)


def _apex(module: Any, smoothing: float) -> Callable:
    loss = module.SoftmaxCrossEntropyLoss.apply
    return lambda z, y: loss(z, y, smoothing, -100, True).mean()  # of float32 losses; no class is padding


def _flash_attention(module: Any, smoothing: float) -> Callable:
    return module.CrossEntropyLoss(label_smoothing=smoothing)


def _transformer_engine(module: Any, smoothing: float) -> Callable:
    """Of sequences, (batch, length, classes)."""
    return lambda z, y: module.parallel_cross_entropy(z[None], y[None], smoothing, True)


def _liger_linear(module: Any, smoothing: float) -> Callable:
    loss = module.LigerFusedLinearCrossEntropyLoss(label_smoothing=smoothing)
    return lambda hidden, weight, y: loss(weight, hidden, y)


# By the name of the side: where its library has it, and what makes of it a function of logits and classes.
LOSSES = {
    "liger": ("liger_kernel.transformers", _liger),
    "apex": ("apex.contrib.xentropy", _apex),
    "flash-attn": ("flash_attn.losses.cross_entropy", _flash_attention),
    "transformer-engine": ("transformer_engine.pytorch.cross_entropy", _transformer_engine),
}
# ... of inputs of a layer, its weight and classes.
LINEAR_LOSSES = {"liger": ("liger_kernel.transformers", _liger_linear)}


def losses(known: dict[str, tuple[str, Callable]], smoothing: float, y: torch.Tensor) -> dict[str, Callable]:
    """The mean losses of classes `y` by the libraries that are installed, by their names; on a GPU alone."""
    found = {}
    for name, (module, make) in known.items() if y.is_cuda else ():
        try:
            library = importlib.import_module(module)
        except ImportError:
            continue
        built = cache(partial(make, library, smoothing))  # at the first call, as above
        found[name] = lambda *inputs, built=built: built()(*inputs, y)
    return found


def prove_loss(function: Callable, exact: Callable, inputs: list[torch.Tensor], tolerance: float) -> None:
    """Raise unless a loss of `inputs` has the value and the gradients that `exact` has in float64, but for
    `tolerance` of their norm. A library may write into what it is given: it gets copies.
    """
    for wanted, name in ((False, "value"), (True, "gradient")):
        wide = [x.detach().double().requires_grad_(wanted) for x in inputs]
        own = [x.detach().clone().requires_grad_(wanted) for x in inputs]
        want, got = exact(*wide), function(*own)
        pairs = [(got, want)]
        if wanted:
            pairs = zip(torch.autograd.grad(got, own), torch.autograd.grad(want, wide), strict=True)
        for a, b in pairs:
            off = ((a.double() - b).norm() / b.norm()).item()
            assert off <= tolerance, f"its {name} is off by {off:.1e} of the norm"
