"""Samples and batches as data sets give them: images and targets in any nest of tuples, lists and dicts.

torchvision's tensors are known by their class, and no torchvision is loaded for it. Everything comes back as
what it was, in the same place; what is no image and no target is not touched.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor
from torch.utils._pytree import SUPPORTED_NODES, MappingKey, tree_flatten_with_path, tree_unflatten

from .._checks import check_generator, check_tensor
from .._seeds import draw_seed
from ._apply import applied, steps_of
from ._params import COUNTED, Params
from ._targets import OP, Augmented, Targets
from ._tv import is_tv_tensor, is_video, plain, tv_kind, wrapped

# Under which of these names an image stands, where several parts of a sample could be one.
NAMES = ("image", "images", "pixel_values", "img")
# Under which of these keys a plain tensor is a target.
KEYS = {"boxes": "boxes", "masks": "masks", "mask": "masks", "keypoints": "keypoints"}


class Leaf(NamedTuple):
    """A part of a structure: where it stands, what it is, and its kind, None for what stays."""

    path: tuple[Any, ...]
    value: Any
    kind: str | None


def _is_image(value: Any) -> bool:
    return (
        isinstance(value, Tensor)
        and value.dim() >= 3
        and (value.is_floating_point() or value.dtype == torch.uint8)
    )


def name_of(key: Any) -> Any:
    """A key, position or field of a path."""
    return next((getattr(key, name) for name in ("key", "idx", "name") if hasattr(key, name)), None)


def _key_of(path: Sequence[Any]) -> Any:
    """The key or field that a part stands under, or the list that holds it; None where there is none."""
    return next((name_of(key) for key in reversed(path) if not hasattr(key, "idx")), None)


def leaves_of(structure: Any, place: Any = None) -> tuple[list[Leaf], Any]:
    """(all parts in order, what puts them together again). Images are torchvision's, or else the first tensor
    that may be one and has an image's name, or else the first that may be one; where a `place` at the top is
    given, what stands there is an image in any case.
    """
    flat, spec = tree_flatten_with_path(structure)
    leaves = []
    for path, value in flat:
        kind, key = tv_kind(value), _key_of(path)
        if kind is None and isinstance(value, Tensor) and isinstance(key, str):
            kind = KEYS.get(key)
        leaves.append(Leaf(tuple(path), value, kind))
    here = [
        i
        for i, leaf in enumerate(leaves)
        if place is None or (leaf.path[:1] and name_of(leaf.path[0]) == place)
    ]
    if not any(leaves[i].kind == "image" for i in here):
        found = [i for i in here if leaves[i].kind is None and _is_image(leaves[i].value)]
        named = [i for i in found if leaves[i].path and name_of(leaves[i].path[-1]) in NAMES]
        for first in (named or found)[:1]:
            leaves[first] = leaves[first]._replace(kind="image")
    return leaves, spec


def is_record(value: Any) -> bool:
    """Whether it is a dataclass's."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def record_fields(record: Any) -> dict[str, Any]:
    """The parts of a dataclass's instance."""
    return {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}


def record_with(record: Any, parts: Mapping[Any, Any]) -> Any:
    """A copy with other parts, also of a frozen one."""
    whole = copy.copy(record)
    for name, value in parts.items():
        object.__setattr__(whole, name, value)
    return whole


def _children(value: Any) -> dict[Any, Any] | None:
    """The parts of what torch's nests do not look into: a dataclass, or a mapping of another class."""
    if type(value) in SUPPORTED_NODES or isinstance(value, Tensor):
        return None
    if isinstance(value, Mapping):
        return dict(value)
    if is_record(value):
        return record_fields(value)
    return None


def opened(value: Any) -> tuple[Any, Callable[[Any], Any]]:
    """(a nest with dicts in the place of dataclasses and of other mappings, what makes of such a nest one of
    the classes that were there).
    """
    parts = _children(value)
    is_sequence = isinstance(value, (list, tuple))
    if parts is None and isinstance(value, dict):
        parts = dict(value)
    if parts is None and not is_sequence:
        return value, lambda result: result
    inner = {key: opened(part) for key, part in (enumerate(value) if parts is None else parts.items())}

    def closed(result: Any) -> Any:
        found = {key: close(result[key]) for key, (_, close) in inner.items()}
        if is_sequence:
            return type(value)(*found.values()) if hasattr(value, "_fields") else type(value)(found.values())
        if isinstance(value, Mapping) and not isinstance(value, MutableMapping):
            return found
        if not isinstance(value, Mapping):
            return record_with(value, found)
        whole: Any = copy.copy(value)
        for key, part in found.items():
            whole[key] = part
        return whole

    plain_parts = {key: part for key, (part, _) in inner.items()}
    if not is_sequence:
        return plain_parts, closed
    values = plain_parts.values()
    return (type(value)(*values) if hasattr(value, "_fields") else type(value)(values)), closed


def is_closed(value: Any) -> bool:
    """Whether there is something in a nest that `opened` opens."""
    if _children(value) is not None:
        return True
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return any(map(is_closed, inner))


def check_open(structure: Any, targets: Targets) -> None:
    """Raise where what is left of boxes is asked for and would stand in a class that has no place for it."""
    if targets.is_picky() and is_closed(structure):
        raise ValueError(
            f"{OP}: min_area and min_visibility in a nest need dicts, lists and tuples, got a dataclass or a "
            f"mapping of another class in it; give boxes= beside the images"
        )


def with_tensors(structure: Any) -> Any:
    """A nest with tensors in the place of NumPy's arrays of numbers."""
    flat, spec = tree_flatten_with_path(structure)
    numeric = (isinstance(v, numpy.ndarray) and v.dtype.kind in "biuf" for _, v in flat)
    return tree_unflatten(
        [torch.as_tensor(v) if is_array else v for (_, v), is_array in zip(flat, numeric, strict=True)], spec
    )


def has_targets(structure: Any) -> bool:
    """Whether there is a target beside the image."""
    return any(leaf.kind not in (None, "image") for leaf in leaves_of(structure)[0])


def has_video(structure: Any) -> bool:
    """Whether there is a tensor of frames somewhere in it."""
    return any(is_video(leaf.value) for leaf in leaves_of(structure)[0])


def has_image(structure: Any) -> bool:
    """Whether there is an image somewhere in it."""
    return any(leaf.kind == "image" for leaf in leaves_of(structure)[0])


def owner_of(leaf: Leaf, image: Leaf, whole: Any, count: int) -> int | None:
    """Which sample of a batch a part belongs to, by its place in a list of as many as there are samples,
    beside the images; None of what belongs to all.
    """
    part = whole
    for depth, key in enumerate(leaf.path):
        index = getattr(key, "idx", None)
        inside = leaf.path[:depth] == image.path[:depth] and depth < len(image.path)
        if index is not None and not inside and isinstance(part, (list, tuple)) and len(part) == count:
            return index
        try:
            part = key.get(part)
        except (TypeError, AttributeError, KeyError):
            return None
    return None


class _Move(NamedTuple):
    """A target among the parts, checked, and the sample of a batch that it belongs to, None for all."""

    place: int
    targets: Targets
    owner: int | None


def _moves(leaves: list[Leaf], whole: Any, image: Leaf, targets: Targets) -> list[_Move]:
    """The targets of a structure, checked against its images."""
    images, moves = plain(image.value), []
    is_batch = images.dim() == 4
    batch = images if is_batch else images[None]
    is_listed = image.path[-1:] and hasattr(image.path[-1], "idx") and _key_of(image.path) in NAMES
    alike = [leaf for leaf in leaves if leaf.path[:-1] == image.path[:-1] and _is_image(leaf.value)]
    for place, leaf in enumerate(leaves):
        if leaf.kind in (None, "image"):
            continue
        if is_listed and not is_tv_tensor(image.value) and len(alike) > 1:
            raise ValueError(
                f"{OP}: expected one image beside targets in a nest, got a list of {len(alike)}; give the "
                f"dict that holds both lists alone, or a list of samples"
            )
        if leaf.kind == "boxes" and targets.is_picky():
            _check_named(leaf)
        owner = owner_of(leaf, image, whole, len(batch)) if is_batch else None
        about: dict[str, Any] = dict.fromkeys(("masks", "boxes", "keypoints", "counts", "visible"))
        about[str(leaf.kind)] = leaf.value
        if leaf.kind != "keypoints":
            about["flip_permutation"] = None
        one = dataclasses.replace(targets, **about)
        one.check(batch if owner is None else batch[owner : owner + 1], is_batch and owner is None)
        moves.append(_Move(place, one, owner))
    return moves


def _check_named(boxes: Leaf) -> None:
    """Raise where there is no place beside boxes for what says which are left."""
    at = _place_of_key(boxes.path)
    if not at or not isinstance(at[-1], MappingKey):
        raise ValueError(
            f"{OP}: min_area and min_visibility in a nest need boxes under a key of a dict, beside which "
            f"<key>_left says what is left, got them at {boxes.path}; give boxes= beside the images"
        )


def _place_of_key(path: tuple[Any, ...]) -> tuple[Any, ...]:
    """The path of a part, or of the list that it stands in."""
    return path[:-1] if path and hasattr(path[-1], "idx") else path


def _repeated(params: Params, count: int) -> Params:
    """The parameters of one image for each of so many."""
    drawn = {name: value for name in COUNTED if (value := getattr(params, name)) is not None}
    return dataclasses.replace(params, **{k: v.repeat_interleave(count, 0) for k, v in drawn.items()})


def augmented_sample(aug: Any, structure: Any, targets: Targets, place: Any = None, **how: Any) -> Any:
    """A sample, or a batch of them as one structure; `how` says what is drawn, as in `Augment.sample`."""
    leaves, spec = leaves_of(structure, place)
    images = [leaf for leaf in leaves if leaf.kind == "image"]
    if not images:
        held = ", ".join(type(leaf.value).__name__ for leaf in leaves)
        raise TypeError(
            f"{OP}: expected an image among the parts of a sample, a uint8 or floating-point tensor (C, H, "
            f"W), got {held or 'nothing'}; convert PIL images with torchvision's PILToTensor"
        )
    sizes = {tuple(leaf.value.shape[-2:]) for leaf in images} | {leaf.value.dim() for leaf in images}
    if len(sizes) > 2:
        raise ValueError(
            f"{OP}: the images of one sample must be of one size, got "
            f"{[tuple(leaf.value.shape) for leaf in images]}"
        )
    first = plain(images[0].value)
    frames = len(first) if is_video(images[0].value) else None
    if frames is not None:
        if first.dim() != 4:
            raise ValueError(
                f"{OP}: a Video must be (T, C, H, W), got {tuple(first.shape)}; give a list of them"
            )
        first = first.new_empty(()).expand(first.shape[1:])
    moves = _moves(leaves, structure, images[0]._replace(value=first), targets)
    params = aug.sample(first, **how)
    steps = steps_of(first, params) if moves else []
    of_images = params if frames is None else _repeated(params, frames)
    results = [
        wrapped(applied(plain(leaf.value), of_images, Targets()), leaf.value)
        if leaf.kind == "image"
        else leaf.value
        for leaf in leaves
    ]
    left: dict[tuple[Any, ...], list[Tensor]] = {}
    for at, one, owner in moves:
        here = steps if owner is None else [step.of_sample(owner) for step in steps]
        is_single = first.dim() == 3 or owner is not None
        moved = one.moved(first, here, is_single)
        results[at] = getattr(moved, str(leaves[at].kind))
        if one.is_picky() and moved.boxes_left is not None:
            left.setdefault(_place_of_key(leaves[at].path), []).append(moved.boxes_left)
    whole = tree_unflatten(results, spec)
    for path, parts in left.items():
        beside = whole
        for key in path[:-1]:
            beside = key.get(beside)
        is_list = isinstance(path[-1].get(beside), (list, tuple))
        beside[f"{path[-1].key}_left"] = parts if is_list else parts[0]
    return whole


def _is_sequence(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and not hasattr(value, "_fields")


def _is_plain_list(value: Any) -> bool:
    """Whether it is a list of images that become one batch."""
    return _is_sequence(value) and all(
        (isinstance(part, Tensor) or hasattr(part, "__array__"))
        and not is_tv_tensor(part)
        and getattr(part, "ndim", 0) >= 3
        for part in value
    )


def is_labelled(batch: Any) -> bool:
    """Whether it is a pair of images (B, C, H, W) and labels (B,) or (B, classes)."""
    if not _is_sequence(batch) or len(batch) != 2 or not all(isinstance(part, Tensor) for part in batch):
        return False
    images, labels = batch
    return images.dim() == 4 and labels.dim() in (1, 2) and len(labels) == len(images)


def _columns_of(batch: dict[Any, Any]) -> tuple[list[Any], Any] | None:
    """`samples_of` of a dict of lists: one of images, and others that have as many parts."""
    lists = {key: part for key, part in batch.items() if _is_sequence(part)}
    images = [
        key for key, part in lists.items() if _is_plain_list(part) and part and all(map(_is_image, part))
    ]
    if not images or any(isinstance(part, Tensor) and _is_image(part) for part in batch.values()):
        return None
    first = next((key for key in images if key in NAMES), images[0])
    if first in KEYS:
        return None
    count = len(lists[first])
    for key, part in batch.items():
        if key in KEYS and (key not in lists or len(part) != count):
            got = len(part) if key in lists else type(part).__name__
            raise ValueError(
                f"{OP}: {key!r} beside a list of {count} images must be a list of one part for each, got "
                f"{got}"
            )
    columns = {key: part for key, part in lists.items() if len(part) == count}

    def together(results: list[Any]) -> Any:
        whole: Any = copy.copy(batch)
        whole.update({key: type(part)(r[key] for r in results) for key, part in columns.items()})
        return whole

    return [{key: part[i] for key, part in columns.items()} for i in range(count)], together


def samples_of(structure: Any) -> tuple[list[Any], Any] | None:
    """(samples, what makes of their results a structure again) of a batch that is a list of samples, a tuple
    of lists or a dict of lists; None of a single structure.
    """
    if isinstance(structure, dict):
        return _columns_of(structure)
    if not _is_sequence(structure) or not structure:
        return None
    nested = all(isinstance(part, (list, tuple, Mapping)) for part in structure)
    is_list = isinstance(structure, list)
    first = structure[0]
    if len(structure) > 1 and all(_is_sequence(part) and len(part) == len(first) for part in structure):
        images = [isinstance(part, Tensor) and part.dim() == 3 and _is_image(part) for part in first]
        if images and all(
            images
        ):  # as (images, targets) come from collate_fn=lambda batch: tuple(zip(*batch))
            kinds = [type(part) for part in structure]

            def together(results: list[Any]) -> Any:
                columns = zip(*results, strict=True)
                return type(structure)(kind(c) for kind, c in zip(kinds, columns, strict=True))

            return list(zip(*structure, strict=True)), together
    if (nested or is_list) and all(has_image(part) for part in structure):
        return list(structure), type(structure)
    return None


def augmented_structure(aug: Any, batch: Any, generator: torch.Generator | None, targets: Targets) -> Any:
    """What `Augment` makes of anything but a plain tensor."""
    check_open(batch, targets)
    if is_closed(batch):
        inside, close = opened(batch)
        return close(augmented_structure(aug, inside, generator, targets))
    if not isinstance(batch, (Tensor, list, tuple, Mapping)):
        check_tensor(OP, "images", batch)
    if _is_sequence(batch) and not any(isinstance(leaf.value, Tensor) for leaf in leaves_of(batch)[0]):
        got = type(batch[0] if batch else None)
        remedy = "; convert PIL images with torchvision's PILToTensor" if got.__module__[:3] == "PIL" else ""
        raise TypeError(f"{OP}: each image of a list must be a torch.Tensor, got {got.__name__}{remedy}")
    if _is_plain_list(batch):
        return _together(aug, batch, generator, targets)
    if is_tv_tensor(batch) and tv_kind(batch) == "image" and not is_video(batch):
        result = aug(plain(batch), generator, **targets.arguments())
        if isinstance(result, Augmented):
            return result._replace(images=wrapped(result.images, batch))
        return wrapped(result, batch)
    if targets.given():
        raise ValueError(
            f"{OP}: give targets as arguments beside a tensor of images, or inside of the samples, not both"
        )
    samples = samples_of(batch)
    if samples is None:
        return augmented_sample(aug, batch, targets, generator=generator)
    parts, together = samples
    return together(augmented_samples(aug, parts, targets, generator))


def augmented_samples(
    aug: Any, samples: Sequence[Any], targets: Targets, generator: Any = None, place: Any = None
) -> list[Any]:
    """Each sample as in a batch of all."""
    check_generator(OP, generator)
    image = next((leaf for leaf in leaves_of(samples[0], place)[0] if leaf.kind == "image"), None)
    seed = None
    if aug.training and image is not None:
        seed = draw_seed(image.value.device, generator)
    return [
        augmented_sample(aug, sample, targets, place, seed=seed, offset=i) for i, sample in enumerate(samples)
    ]


def _together(aug: Any, images: Sequence[Tensor], generator: torch.Generator | None, targets: Targets) -> Any:
    """The batch of a list of images."""
    op = OP
    kinds = set()
    for image in images:
        check_tensor(op, "each image of a list", image)
        if image.dim() != 3:
            raise ValueError(f"{op}: each image of a list must be (C, H, W), got {tuple(image.shape)}")
        kinds.add((image.shape[0], image.dtype, image.device))
    if len(kinds) != 1:
        got = " and ".join(sorted(f"{channels} of {dtype} on {device}" for channels, dtype, device in kinds))
        raise ValueError(
            f"{op}: images of a list must have the same number of channels, dtype and device, got {got}; "
            f"make all of them RGB, for one"
        )
    sizes = sorted({tuple(image.shape[1:]) for image in images})
    if len(sizes) == 1:
        return aug(torch.stack(list(images)), generator, **targets.arguments())
    if aug.size is None:
        raise ValueError(
            f"{op}: images of different sizes, such as {sizes[0]} and {sizes[-1]}, become no batch; give "
            f"Augment a size=(height, width)"
        )
    # What a sample draws depends on the seed and on its index alone.
    check_generator(op, generator)
    seed = draw_seed(images[0].device, generator) if aug.training else None
    parts = [
        applied(image[None], aug.sample(image[None], seed=seed, offset=i), targets.of_sample(i, len(images)))
        for i, image in enumerate(images)
    ]
    if not targets.given():
        return torch.cat(parts)
    rows = [[None if v is None else v[0] for v in part] for part in parts]
    whole, *columns = ([*column] for column in zip(*rows, strict=True))
    return Augmented(torch.stack(whole), *(None if column[0] is None else column for column in columns))
