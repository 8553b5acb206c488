"""Checks of arguments, with the errors that every op raises: "op: what must be, got what; remedy"."""

from __future__ import annotations

import math
import numbers
from collections.abc import Collection
from typing import Any

import torch

# The element types that the kernels compute with; all others are refused, or left to torch.
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def arithmetic_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The type that an op computes with: float64 for float64, float32 for everything else."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def check_number(
    op: str,
    name: str,
    value: Any,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    finite: bool = False,
    allow_bool: bool = False,
) -> None:
    """Raise unless `value` is a real number in [low, high], and not infinite where `finite` is set.

    NaN is in no interval. NumPy's scalars are numbers; True and False only where `allow_bool` is set.
    """
    is_number = isinstance(value, (int, float, numbers.Real))
    if not is_number or (isinstance(value, bool) and not allow_bool):
        raise TypeError(f"{op}: {name} must be a number, got {_kind(value)}")
    # No math.isinf: torch.compile may hand in a symbol for the number.
    if low <= value <= high and (not finite or -math.inf < value < math.inf):
        return
    if low == -math.inf and high == math.inf:
        expected = "finite"
    elif finite and high == math.inf:
        expected = f"finite and at least {low:g}"
    else:
        expected = f"in [{low:g}, {high:g}]"
    raise ValueError(f"{op}: {name} must be {expected}, got {value}")


def _kind(value: Any) -> str:
    """The type of a value, and the value itself where it is a string: '0.1' explains the mistake."""
    return f"{type(value).__name__} {value!r}" if isinstance(value, str) else type(value).__name__


def check_count(op: str, name: str, value: Any, low: float = 1) -> None:
    """Raise unless `value` is an integer of at least `low`."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}")
    if value < low:
        raise ValueError(f"{op}: {name} must be at least {low}, got {value}")


def check_choice(op: str, name: str, value: Any, choices: Collection[Any]) -> None:
    """Raise unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{op}: {name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_tensor(op: str, name: str, value: Any) -> None:
    """Raise unless `value` is a tensor."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(value).__name__}")


def check_dtype(op: str, name: str, value: torch.Tensor) -> None:
    """Raise unless `value` has one of `DTYPES`; the compiled kernels raise the same error."""
    if value.dtype not in DTYPES:
        raise ValueError(
            f"{op}: {name} must be float32, float64, float16 or bfloat16, got {value.dtype}; "
            "convert it with .float()"
        )


def check_no_overlap(op: str, name: str, value: torch.Tensor) -> None:
    """Raise if elements of `value`, which is to be written to, share memory."""
    if any(stride == 0 and size > 1 for size, stride in zip(value.shape, value.stride(), strict=True)):
        raise ValueError(
            f"{op}: the elements of {name} must not share memory, got strides {value.stride()}; "
            "call it on a .clone()"
        )


def check_initialised(op: str, model: Any) -> None:
    """Raise if a parameter or buffer of a Module, or of the Module that a method belongs to, has no shape."""
    owner = model if isinstance(model, torch.nn.Module) else getattr(model, "__self__", None)
    if not isinstance(owner, torch.nn.Module):
        return
    for name, tensor in (*owner.named_parameters(), *owner.named_buffers()):
        if torch.nn.parameter.is_lazy(tensor):
            raise ValueError(
                f"{op}: {name} of a lazy layer has no shape yet; run the model once on a batch first"
            )
