"""The example of an op, the smallest that there is, to be copied (docs/adding_an_op.md): y = factor * x.

Here belongs all of the op that is Python: the formula with its source, the operator's schema, its definition
in plain torch, its fake, which knows the shape of the result, its derivative, and the public function with
its checks. The kernels are in csrc/example. This module is not part of an installed fastreg, and fastreg does
not import it.
"""

from __future__ import annotations

from typing import Any

import torch

from ._checks import check_number, check_tensor
from ._registry import define


def example_plain(input: torch.Tensor, factor: float) -> torch.Tensor:
    """The operator in plain torch: what tests compare with, and what runs on a device without a kernel."""
    wide = torch.promote_types(input.dtype, torch.float32)  # one rounding, at the end
    return (input.to(wide) * factor).to(input.dtype)


define("example(Tensor input, float factor) -> Tensor", example_plain)


@torch.library.register_fake("fastreg::example", allow_override=True)
def _(input, factor):
    return torch.empty_like(input)


_example = torch.ops.fastreg.example.default


class _Example(torch.autograd.Function):
    """The gradient is the op once more, and so is the gradient's gradient."""

    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.factor = factor
        return _example(input, factor)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return example(grad, ctx.factor), None


def example(input: torch.Tensor, factor: float) -> torch.Tensor:
    """factor * input in one pass over memory.

    Args:
        input: tensor of any shape and strides; float32, float64, float16 or bfloat16.
        factor: any number but NaN.

    Returns:
        A new tensor like `input`, memory format kept. It is computed in float32 (float64 for float64) and
        rounded once. Differentiable in `input`, as often as one likes; nothing is saved for that.

    Raises:
        ValueError: `factor` is NaN, or `input` has a dtype without kernels.
        TypeError: `input` is no tensor or `factor` no number.
    """
    check_tensor("example", "input", input)
    check_number("example", "factor", factor)
    if torch.is_grad_enabled() and input.requires_grad:
        return _Example.apply(input, float(factor))
    return _example(input, float(factor))
