"""Checks of arguments, with the errors that every op gives: op, what was expected, what came."""

import math
import numbers

import torch


def check_number(op, name, value, low=-math.inf, high=math.inf):
    """Raise unless `value` is a real number in [low, high]; NaN is in no interval."""
    if not isinstance(value, (int, float, numbers.Real)) or isinstance(
        value, bool
    ):  # NumPy's scalars are Real
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")
    if not low <= value <= high:
        interval = "finite" if (low, high) == (-math.inf, math.inf) else f"in [{low:g}, {high:g}]"
        raise ValueError(f"{op}: {name} must be {interval}, got {value}")


def check_count(op, name, value):
    """Raise unless `value` is an integer of at least 1."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{op}: {name} must be at least 1, got {value}")


def check_choice(op, name, value, choices):
    """Raise unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{op}: {name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_tensor(op, name, value):
    """Raise unless `value` is a tensor."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(value).__name__}")
