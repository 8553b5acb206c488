"""Checks of arguments, with the errors that every op raises: "op: what must be, got what; remedy"."""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import numbers
from collections.abc import Callable, Collection, Mapping
from typing import Any, ParamSpec

import numpy
import torch

from ._transforms import wants_derivative


class ArgumentError(ValueError, RuntimeError):
    """An argument that fastreg cannot compute with, where torch raises a ValueError or a RuntimeError."""


class ClassIndexError(ValueError, IndexError):
    """A class index that is out of range."""


class ArgumentTypeError(TypeError, RuntimeError):
    """A tensor of a kind that fastreg cannot compute with, where torch raises a RuntimeError."""


class UnsupportedError(ValueError, NotImplementedError):
    """A dtype or layout without kernels, where torch raises a RuntimeError or a NotImplementedError."""


# The element types that the kernels compute with; all others are refused, or left to torch.
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# Those of them whose arithmetic is float32.
SINGLE_DTYPES = tuple(dtype for dtype in DTYPES if dtype != torch.float64)
# Pairs of these, whose memory is that of a tensor with one dimension more.
COMPLEX_DTYPES = (torch.complex64, torch.complex128, torch.complex32)


def or_torchs(refusal: Exception, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What torch's function gives for arguments that fastreg's has refused.

    Raises:
        Exception: of torch's type, where torch refuses them, too; `refusal` itself where it has that type.
    """
    try:
        return function(*args, **kwargs)
    except Exception as error:
        raise (refusal if isinstance(refusal, type(error)) else error) from None


def scalar(value: Any) -> Any:
    """The number in a tensor without dimensions, which torch takes for a number; all else as it is, one
    without memory and one of which a derivative is asked for, too.
    """
    if not isinstance(value, torch.Tensor) or value.dim() or value.device.type == "meta":
        return value
    return value if value.requires_grad or wants_derivative(value) else value.item()


def check_constant(op: str, name: str, tensor: torch.Tensor) -> None:
    """Raise where a derivative is asked for with respect to an argument that has none."""
    if wants_derivative(tensor):
        raise ArgumentError(
            f"{op}: {name} must not require a gradient, as none is computed; give it with .detach()"
        )


def arithmetic_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The type that an op computes with: float64 for float64 and pairs of it, float32 for everything else."""
    return torch.float64 if tensor.dtype in (torch.float64, torch.complex128) else torch.float32


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

    NaN is in no interval. Numbers are those that torch's operators take, so NumPy's scalars, too, but no
    fraction; True and False only where `allow_bool` is set.
    """
    is_number = isinstance(value, (int, float, numpy.floating, numpy.integer))
    if not is_number or (isinstance(value, bool) and not allow_bool):
        kind = ArgumentTypeError if isinstance(value, torch.Tensor) else TypeError
        raise kind(f"{op}: {name} must be a number, got {_kind(value)}")
    # No math.isinf: torch.compile may hand in a symbol for the number.
    if low <= value <= high and (not finite or -math.inf < value < math.inf):
        return
    if low == -math.inf and high == math.inf:
        expected = "finite"
    elif finite and high == math.inf:
        expected = f"finite and at least {low:g}"
    else:
        expected = f"in [{low:g}, {high:g}]"
    raise ArgumentError(f"{op}: {name} must be {expected}, got {value}")


_Arguments = ParamSpec("_Arguments")


def names_unknown_arguments(
    op: str, meant: Mapping[str, str] | None = None
) -> Callable[[Callable[_Arguments, None]], Callable[_Arguments, None]]:
    """A decorator of a constructor, whose error for a keyword that it does not know says which it knows.

    `meant` has what others call an argument, and the argument.
    """

    def decorate(init: Callable[_Arguments, None]) -> Callable[_Arguments, None]:
        known = list(inspect.signature(init).parameters)[1:]

        @functools.wraps(init)
        def run(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> None:
            for name in kwargs:
                if name not in known:
                    close = difflib.get_close_matches(name.lower(), known, 1)
                    close = [meant[name.lower()]] if meant and name.lower() in meant else close
                    raise TypeError(
                        f"{op}: arguments must be {', '.join(known)}, got {name!r}"
                        + (f"; use {close[0]}" if close else "; leave it out")
                    )
            init(*args, **kwargs)

        return run

    return decorate


def _kind(value: Any) -> str:
    """The type of a value, and the value itself where it is a string: '0.1' explains the mistake."""
    return f"{type(value).__name__} {value!r}" if isinstance(value, str) else type(value).__name__


def is_int(value: Any, kind: Any = numbers.Integral) -> bool:
    """Whether `value` is an integer of that kind. True and False are none, although Python counts them in."""
    return isinstance(value, kind) and not isinstance(value, bool)


def check_count(op: str, name: str, value: Any, low: float = 1) -> None:
    """Raise unless `value` is an integer of at least `low`."""
    if not is_int(value):
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


def check_generator(op: str, generator: Any) -> None:
    """Raise unless `generator` is a torch.Generator or None."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(
            f"{op}: generator must be a torch.Generator, got {type(generator).__name__}; of a seed make one "
            f"with torch.Generator().manual_seed(seed)"
        )


def check_dtype(op: str, name: str, value: torch.Tensor) -> None:
    """Raise unless `value` has one of `DTYPES`; the compiled kernels raise the same error."""
    if value.dtype not in DTYPES:
        raise UnsupportedError(
            f"{op}: {name} must be float32, float64, float16 or bfloat16, got {value.dtype}; "
            "convert it with .float()"
        )


def check_dense(op: str, name: str, value: torch.Tensor) -> None:
    """Raise unless `value` is strided, neither sparse nor nested."""
    if value.is_nested:
        raise UnsupportedError(
            f"{op}: {name} must be a dense tensor, got a nested one; give its tensors one by "
            "one, or padded by .to_padded_tensor(0.0)"
        )
    if value.layout != torch.strided:
        raise UnsupportedError(
            f"{op}: {name} must be a dense tensor, got {value.layout}; convert it with .to_dense()"
        )


def check_no_overlap(op: str, name: str, value: torch.Tensor) -> None:
    """Raise if elements of `value`, which is to be written to, share memory."""
    if 0 in value.shape:  # without elements, whose strides may be anything
        return
    if any(stride == 0 and size > 1 for size, stride in zip(value.shape, value.stride(), strict=True)):
        raise ArgumentError(
            f"{op}: the elements of {name} must not share memory, got strides {value.stride()}; "
            "call it on a .clone()"
        )


def module_of(model: Any) -> torch.nn.Module | None:
    """The Module that a model is, or whose method it is, such as model.forward; None for anything else."""
    owner = model if isinstance(model, torch.nn.Module) else getattr(model, "__self__", None)
    return owner if isinstance(owner, torch.nn.Module) else None


def check_initialised(op: str, model: Any) -> None:
    """Raise if a parameter or buffer of a Module, or of the Module that a method belongs to, has no shape."""
    owner = module_of(model)
    if owner is None:
        return
    for name, tensor in (*owner.named_parameters(), *owner.named_buffers()):
        if torch.nn.parameter.is_lazy(tensor):
            raise ValueError(
                f"{op}: {name} of a lazy layer has no shape yet; run the model once on a batch first"
            )
