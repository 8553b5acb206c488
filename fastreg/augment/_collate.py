"""The images among what a dataset yields: found in a sample, taken out of it, and put back as a batch.

A sample is an image, or a tuple, named tuple, dict or dataclass that holds one.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from ._structures import (
    NAMES,
    augmented_samples,
    check_open,
    has_targets,
    has_video,
    is_record,
    leaves_of,
    name_of,
    opened,
    record_fields,
    record_with,
    with_tensors,
)
from ._targets import Targets
from ._tv import is_video, plain, tv_kind, wrapped

OP = "Augment.collate"


def fields_of(sample: Any) -> dict[Any, Any] | None:
    """The named parts of a dict, named tuple or dataclass; None of what has none."""
    if isinstance(sample, Mapping):
        return dict(sample)
    if isinstance(sample, tuple) and hasattr(sample, "_fields"):
        return dict(zip(sample._fields, sample, strict=True))
    if is_record(sample):
        return record_fields(sample)
    return None


def _is_image(value: Any) -> bool:
    """Whether a value is a tensor or an array of (C, H, W)."""
    return (isinstance(value, Tensor) or hasattr(value, "__array__")) and getattr(value, "ndim", 0) == 3


def place_of(sample: Any, key: Any) -> Any:
    """Where a sample holds its image: a key, field or position; None where it is one."""
    fields = fields_of(sample)
    if fields is None:
        sequence = isinstance(sample, (tuple, list))
        if key is not None and not (sequence and isinstance(key, int) and -len(sample) <= key < len(sample)):
            raise TypeError(f"{OP}: key={key!r} needs samples with such a part, got {_text(sample)}")
        return (0 if key is None else key % len(sample)) if sequence else None
    if key is not None:
        name = list(fields)[key] if isinstance(key, int) and key not in fields else key
        if name not in fields:
            raise KeyError(f"{OP}: samples have no {key!r}, got {list(fields)}; give the images' key")
        return name
    if isinstance(sample, tuple):
        return next(iter(fields))
    images = [name for name, value in fields.items() if _is_image(value)]
    named = [name for name in images if name in NAMES]
    found = images if len(images) == 1 else named
    if len(found) != 1:
        held = ", ".join(f"{name!r}: {type(value).__name__}" for name, value in fields.items())
        raise TypeError(
            f"{OP}: expected one tensor (C, H, W) in each sample, got {len(images)} in {held}; say which it "
            f"is with collate_fn=functools.partial(augment.collate, key=...), and make images tensors in the "
            f"dataset"
        )
    return found[0]


def part_of(sample: Any, place: Any) -> Any:
    """What stands at a place of a sample."""
    if place is None:
        return sample
    fields = fields_of(sample)
    return sample[place] if fields is None else fields[place]


def with_part(sample: Any, place: Any, value: Any) -> Any:
    """A sample, or a batch of them, with another value at a place."""
    if place is None:
        return value
    if isinstance(sample, Mapping):
        changed: Any = copy.copy(sample) if isinstance(sample, MutableMapping) else dict(sample)
        changed[place] = value
        return changed
    if isinstance(sample, tuple) and hasattr(sample, "_fields"):
        return type(sample)(**{**(fields_of(sample) or {}), place: value})
    changed = list(sample)
    changed[place] = value
    return changed


def _together(parts: list[Any], lists: bool) -> Any:
    """What stands at one place of all samples: a batch, or a list of what differs in length. A sample without
    objects may lack targets that others have.
    """
    tensors = all(isinstance(part, Tensor) for part in parts)
    kinds = {tv_kind(part) for part in parts if isinstance(part, Tensor)}
    if tensors and (kinds == {"image"} or (kinds == {"masks"} and all(part.dim() == 2 for part in parts))):
        lists = False
    elif (
        kinds & {"boxes", "keypoints", "masks"}
        or any(map(has_targets, parts))
        or any(part is None for part in parts)
    ):
        lists = True
    elif not tensors or parts[0].dim() == 0:
        lists = False
    return list(parts) if lists else torch.utils.data.default_collate([_plain(part) for part in parts])


def _plain(part: Any) -> Any:
    return plain(part) if isinstance(part, Tensor) else part


LABELS = ("label", "labels", "target", "targets")


def mixed_parts(batch: Any, key: Any, mixing: Any, generator: torch.Generator | None = None) -> Any:
    """A batch of named parts with its images and labels mixed. Labels are called so, or are the only tensor
    (B,) or (B, classes) beside the images.
    """
    place, fields = place_of(_shapes_of_one(batch), key), fields_of(batch) or {}
    images = fields[place]
    fitting = [
        name
        for name, value in fields.items()
        if name != place and isinstance(value, Tensor) and value.dim() in (1, 2) and len(value) == len(images)
    ]
    named = [name for name in fitting if name in LABELS]
    found = named or fitting
    if len(found) != 1:
        raise TypeError(
            f"augment: mixup and cutmix need labels, one tensor (B,) or (B, classes) beside the images, "
            f"called one of {', '.join(LABELS)}, got {list(fields)}"
        )
    mixed, soft = mixing.mixed(plain(images), plain(fields[found[0]]), generator)
    parts = {**fields, place: wrapped(mixed, images), found[0]: soft}
    if is_record(batch):
        return record_with(batch, parts)
    return type(batch)(**parts) if isinstance(batch, tuple) else {**batch, **parts}


def _shapes_of_one(batch: Any) -> Any:
    """A batch of named parts as a sample of it, of which only the shapes count."""
    fields = fields_of(batch) or {}
    parts = {
        name: value[0] if isinstance(value, Tensor) and value.dim() and len(value) else value
        for name, value in fields.items()
    }
    if is_record(batch):
        return record_with(batch, parts)
    return type(batch)(**parts) if isinstance(batch, tuple) else parts


def with_targets(samples: list[Any], place: Any, augment: Any, targets: Targets) -> Any:
    """The batch of samples with targets, which become lists of one for each sample, as do tensors beside
    boxes and key points; images and masks of one height and width are stacked.
    """
    moved = augmented_samples(augment, samples, targets, place=place)
    first = moved[0]
    fields = fields_of(first)
    names: list[Any] = list(range(len(first))) if fields is None else list(fields)
    for i, sample in enumerate(moved):
        own = fields_of(sample)
        held = list(range(len(sample))) if own is None else list(own)
        if set(held) != set(names):
            raise KeyError(
                f"{OP}: samples must have the same parts, got {names} in the first and {held} in sample {i}; "
                f"give a sample without objects empty targets"
            )
    at = [[part_of(sample, name) for sample in moved] for name in names]
    every = [leaves_of(sample, place)[0] for sample in samples]
    leaves = every[0]
    image = next(leaf for leaf in leaves if leaf.kind == "image")
    images = names.index(place if place is not None else name_of(image.path[0]))
    sizes = {tuple(part.shape) for part in at[images] if isinstance(part, Tensor)}
    if len(sizes) > 1:
        raise ValueError(
            f"{OP}: images of different sizes, such as {min(sizes)} and {max(sizes)}, become no batch; give "
            f"Augment a size=(height, width)"
        )
    lists = any(leaf.kind in ("boxes", "keypoints") for leaves in every for leaf in leaves)
    parts = [_together(part, lists and i != images) for i, part in enumerate(at)]
    if fields is None:
        return parts
    if isinstance(first, Mapping):
        return dict(zip(names, parts, strict=True))
    return type(first)(*parts)


def collated(samples: list[Any], key: Any, augment: Any, targets: Targets) -> Any:
    """The samples as a batch, as torch's default collation makes it, with their images augmented.

    `augment` gets them as one tensor, or as a list of tensors where their sizes differ. Samples with targets
    become what `with_targets` says.
    """
    if any(map(is_video, samples)):
        return collated([(sample,) for sample in samples], key, augment, targets)[0]
    for sample in samples:
        check_open(sample, targets)
    inside = [with_tensors(opened(sample)[0]) for sample in samples]
    if any(map(has_targets, inside)) or any(map(has_video, inside)):
        at = None if key is None else place_of(samples[0], key)
        parts = with_targets(inside, at, augment, targets)
        return record_with(samples[0], parts) if is_record(samples[0]) else parts
    collate = torch.utils.data.default_collate
    place = place_of(samples[0], key)
    images = [part_of(sample, place) for sample in samples]
    for image in images:
        known = isinstance(image, Tensor) or hasattr(image, "__array__")
        if not known or type(image).__module__.partition(".")[0] == "PIL":
            raise TypeError(
                f"{OP}: images must be tensors (C, H, W), got {_text(image)}; convert them in the dataset, "
                f"as torchvision's PILToTensor does, or say where they are with "
                f"functools.partial(augment.collate, key=...)"
            )
    uneven = len({tuple(image.shape) for image in images}) > 1
    batch = augment([torch.as_tensor(image) for image in images] if uneven else collate(images))
    if place is None:
        return batch
    if is_record(samples[0]):
        fields = [fields_of(sample) or {} for sample in samples]
        parts = {
            name: batch if name == place else collate([each[name] for each in fields]) for name in fields[0]
        }
        return record_with(samples[0], parts)
    return with_part(collate([with_part(sample, place, 0) for sample in samples]), place, batch)


def _text(value: Any) -> str:
    return (
        f"{type(value).__name__} of {len(value)}"
        if isinstance(value, (tuple, list))
        else type(value).__name__
    )
