"""Types that the arguments of several functions share. docs/arguments.md says what the arguments mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

from torch import Tensor

# One number for all elements, or a tensor of them with one value per channel, per sample or per element.
Number: TypeAlias = float | Tensor

# (lower, upper) of valid values; None stands for no bound.
Bounds: TypeAlias = tuple[Number | None, Number | None]

# loss(output, target): one number, or one value per sample, (B, ...). `_losses.py` checks and reduces it.
Loss: TypeAlias = Callable[[Any, Any], Tensor]

# What is called as model(x): a Module, or a function.
Model: TypeAlias = Callable[..., Any]

# The norm that measures the size of an attack.
Norm: TypeAlias = Literal["linf", "l2"]

# A step, a radius or a bound of an attack, as its operator takes it: (number, None) or (0.0, tensor).
FgsmParameter: TypeAlias = tuple[float, Tensor | None]
