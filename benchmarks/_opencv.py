"""What a data loader without batches does: one image (H, W, 3) of bytes after the other, by OpenCV, as
plainly as it can be written and with a table wherever a byte decides alone.

OpenCV is not exact: a hue has 180 levels, each step rounds to bytes, and versions before 5 take the
neighbours of a pixel by positions that are rounded to 1/32 of a pixel. So results are compared with
torchvision's on images that change slowly, as photographs do, and by the mean of how far they are off.
"""

import math
import random

import numpy as np
import torch

try:
    import cv2
except ImportError:
    cv2 = None

LEVELS = np.arange(256, dtype=np.float32)
SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13


def is_installed():
    return cv2 is not None


def use_threads():
    """As many as torch has."""
    cv2.setNumThreads(torch.get_num_threads())


def photographs(batch, side):
    """(batch, 3, side, side) bytes that change slowly from pixel to pixel."""
    coarse = torch.rand(batch, 3, max(2, side // 8), max(2, side // 8))
    fine = torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic", align_corners=True)
    return (fine * 255).round().clamp(0, 255).to(torch.uint8)


def rows_of(x):
    """A list of the images of a batch, (H, W, 3)."""
    return [np.ascontiguousarray(image.permute(1, 2, 0).numpy()) for image in x]


def batch_of(images):
    """The batch of images (H, W, 3)."""
    return torch.from_numpy(np.stack([image.transpose(2, 0, 1) for image in images]))


def by_table(image, table):
    """Each byte by a table (256) of any numbers, which are cut off."""
    return cv2.LUT(image, np.clip(table, 0, 255).astype(np.uint8))


def warped(image, linear, shift, middle, flags):
    """linear @ (p - middle) + middle + shift of a pixel p."""
    matrix = np.empty((2, 3))
    matrix[:, :2] = linear
    matrix[:, 2] = middle + shift - matrix[:, :2] @ middle
    return cv2.warpAffine(image, matrix, image.shape[1::-1], flags=flags)


def grey_of(image):
    return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)


def more_saturated(image, factor):
    grey = cv2.cvtColor(grey_of(image), cv2.COLOR_GRAY2RGB)
    return cv2.addWeighted(image, factor, grey, 1 - factor, 0)


def more_contrast(image, factor):
    return by_table(image, factor * LEVELS + (1 - factor) * cv2.mean(grey_of(image))[0])


# ---- the steps of `Augment`


def draw(steps):
    """The parameters of one image."""
    near = {
        name: 1 + random.uniform(-steps[name], steps[name])
        for name in ("brightness", "contrast", "saturation")
    }
    return near | {
        "hflip": random.random() < steps["hflip"],
        "angle": random.uniform(-steps["rotate"], steps["rotate"]),
        "translate": [random.uniform(-share, share) for share in steps["translate"]],
        "scale": random.uniform(*steps["scale"]),
        "shear": (random.uniform(-steps["shear"], steps["shear"]), 0.0),
        "hue": random.uniform(-steps["hue"], steps["hue"]),
        "sigma": random.uniform(*steps["blur"][1]),
    }


def augmented(image, p, steps):
    """Flip, affine, colours, blur and normalisation of an image (H, W, 3); float32. `translate` is in
    pixels."""
    if p["hflip"]:
        image = cv2.flip(image, 1)
    middle = (np.array(image.shape[1::-1]) - 1) / 2
    turn, slant = math.radians(p["angle"]), [math.radians(v) for v in p["shear"]]
    a, b = math.cos(turn - slant[1]) / math.cos(slant[1]), math.sin(turn - slant[1]) / math.cos(slant[1])
    linear = [
        [a, -a * math.tan(slant[0]) - math.sin(turn)],
        [b, -b * math.tan(slant[0]) + math.cos(turn)],
    ]
    image = warped(image, p["scale"] * np.array(linear), p["translate"], middle, cv2.INTER_LINEAR)
    image = by_table(image, p["brightness"] * LEVELS)
    image = more_contrast(image, p["contrast"])
    image = more_saturated(image, p["saturation"])
    h, s, v = cv2.split(cv2.cvtColor(image, cv2.COLOR_RGB2HSV))
    h = cv2.LUT(h, ((LEVELS + round(180 * p["hue"])) % 180).astype(np.uint8))
    image = cv2.cvtColor(cv2.merge([h, s, v]), cv2.COLOR_HSV2RGB)
    size = steps["blur"][0]
    image = cv2.GaussianBlur(image, (size, size), p["sigma"])
    mean, std = (np.array(steps[name], np.float32) for name in ("mean", "std"))
    return cv2.LUT(image, ((LEVELS[:, None] / 255 - mean) / std)[None])


def loop(images, steps):
    """The batch of images that each draw their parameters."""
    results = []
    for image in images:
        p = draw(steps)
        p["translate"] = [
            round(share * side) for share, side in zip(p["translate"], image.shape[1::-1], strict=True)
        ]
        results.append(augmented(image, p, steps))
    return batch_of(results)


# ---- TrivialAugmentWide

SPACE = {
    "Identity": (0, 0), "ShearX": (0.0, 0.99), "ShearY": (0.0, 0.99), "TranslateX": (0.0, 32.0),
    "TranslateY": (0.0, 32.0), "Rotate": (0.0, 135.0), "Brightness": (0.0, 0.99), "Color": (0.0, 0.99),
    "Contrast": (0.0, 0.99), "Sharpness": (0.0, 0.99), "Posterize": (8, 2), "Solarize": (1.0, 0.0),
    "AutoContrast": (0, 0), "Equalize": (0, 0),
}  # fmt: skip
SIGNED = [name for name, (low, _) in SPACE.items() if low == 0.0 and isinstance(low, float)]


def sharper(image, factor):
    smooth = cv2.filter2D(image, -1, SMOOTH)
    sharp = cv2.addWeighted(image, factor, smooth, 1 - factor, 0)
    result = image.copy()
    result[1:-1, 1:-1] = sharp[1:-1, 1:-1]
    return result


def stretched(image):
    low, high = (f(f(image, 0), 0).astype(np.float32) for f in (np.min, np.max))
    scale = np.where(high > low, 255 / np.maximum(high - low, 1), 1)
    table = (LEVELS[:, None] - np.where(high > low, low, 0)) * scale
    return by_table(image, table[None])


def equalized(image):
    tables = []
    for c in range(3):
        histogram = cv2.calcHist([image], [c], None, [256], [0, 256]).ravel().astype(np.int64)
        used = histogram.nonzero()[0]
        step = (histogram.sum() - histogram[used[-1]]) // 255
        below = histogram.cumsum() - histogram
        tables.append((below + step // 2) // step if step else LEVELS)
    return by_table(image, np.stack(tables, 1)[None])


def operated(image, name, strength):
    """One operation, by its name and strength."""
    nearest, corner = cv2.INTER_NEAREST, np.array([-0.5, -0.5])
    match name:
        case "ShearX":
            return warped(image, [[1, -strength], [0, 1]], 0, corner, nearest)
        case "ShearY":
            return warped(image, [[1, 0], [-strength, 1]], 0, corner, nearest)
        case "TranslateX":
            return warped(image, np.eye(2), [int(strength), 0], corner, nearest)
        case "TranslateY":
            return warped(image, np.eye(2), [0, int(strength)], corner, nearest)
        case "Rotate":
            c, s = math.cos(math.radians(strength)), math.sin(math.radians(strength))
            return warped(image, [[c, s], [-s, c]], 0, (np.array(image.shape[1::-1]) - 1) / 2, nearest)
        case "Brightness":
            return by_table(image, (1 + strength) * LEVELS)
        case "Color":
            return more_saturated(image, 1 + strength)
        case "Contrast":
            return more_contrast(image, 1 + strength)
        case "Sharpness":
            return sharper(image, 1 + strength)
        case "Posterize":
            return by_table(image, np.arange(256) & (256 - 2 ** (8 - int(strength))))
        case "Solarize":
            return by_table(image, np.where(255 * strength <= LEVELS, 255 - LEVELS, LEVELS))
        case "AutoContrast":
            return stretched(image)
        case "Equalize":
            return equalized(image)
    return image


def trivial_loop(images):
    """The batch of images that each draw an operation and one of 31 strengths."""
    results = []
    for image in images:
        name = random.choice(list(SPACE))
        low, high = SPACE[name]
        strength = low + (high - low) * random.randrange(31) / 30
        strength = -strength if name in SIGNED and random.random() < 0.5 else strength
        results.append(operated(image, name, round(strength) if name == "Posterize" else strength))
    return batch_of(results)
