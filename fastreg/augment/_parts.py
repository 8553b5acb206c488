"""Images as DTensors: each rank augments the samples that it holds, as the whole batch would be."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, cast

import torch
from torch import Tensor
from torch.overrides import handle_torch_function

from .._shards import local_part, one_by_one, own_part, refuse_transformed_parts, whole_of_parts
from .._transforms import is_foreign, is_sharded, with_own_code
from ._arguments import pair

_Arguments = ParamSpec("_Arguments")

# Arguments whose tensors have one value per channel, or none for a sample.
_NOT_OF_SAMPLES = frozenset(("fill", "v", "mean", "std", "center", "size", "kernel_size"))

# Arguments that are one number or a pair of them.
_PAIRS = frozenset(("translate", "sigma"))


def part_of(op: str, images: Any) -> tuple[Tensor, slice]:
    """(the images that this rank holds, which ones of all they are).

    Raises:
        ValueError: a DTensor that splits something else than the first of four dimensions.
    """
    refuse_transformed_parts(op, images)
    placements = images.placements
    if images.dim() != 4 or not all(p.is_replicate() or p.is_shard(0) for p in placements):
        raise ValueError(
            f"{op}: images as a DTensor must be (B, C, H, W), replicated or sharded over B, got "
            f"{tuple(images.shape)} placed {placements}; call .redistribute(placements=[Shard(0)]) first"
        )
    return local_part(images), own_part(images.shape, images.device_mesh, placements)[0]


def whole_of(op: str, local: Tensor, images: Any) -> Tensor:
    """What a rank has made of its images, as a DTensor placed as they are."""
    shape = torch.Size((images.shape[0], *local.shape[1:]))
    return one_by_one(op, whole_of_parts(local, images.device_mesh, images.placements, shape))


def on_parts(function: Callable[_Arguments, Tensor]) -> Callable[_Arguments, Tensor]:
    """A decorator of functions of images, each of which stands alone, that lets them take DTensors."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def run(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> Tensor:
        images: Any = args[0] if args else kwargs.get("inpt")
        if is_foreign(images):
            return handle_torch_function(run, (images,), *args, **kwargs)
        if not is_sharded(images):
            return function(*args, **kwargs)
        local, own = part_of(function.__name__, images)

        def cut(value: Any) -> Any:
            if isinstance(value, (list, tuple)):
                return type(value)(map(cut, value))
            if is_sharded(value):
                value = value.full_tensor()
            of_samples = isinstance(value, Tensor) and value.dim() and len(value) == len(images) > 1
            return value[own] if of_samples else value

        bound = signature.bind(*args, **kwargs)
        for name, value in bound.arguments.items():
            if name in _PAIRS and isinstance(value, Tensor) and value.dim() == 1:
                value = pair(value)  # which a part of two numbers would be taken for
            if name not in _NOT_OF_SAMPLES and name != "inpt":
                bound.arguments[name] = cut(value)
        bound.arguments["inpt"] = local
        output = cast(Any, function)(*bound.args, **bound.kwargs)
        return images if output is local else whole_of(function.__name__, output, images)

    return with_own_code(run)
