"""What torch.utils.flop_counter counts of operators that multiply matrices inside.

That module is not imported here, because it imports Triton. A counter copies the table of formulas when it is
made; ours are added to its copy when one of the operators is about to run under it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.compiler import is_compiling
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack


def _product(rows: int, inner: int, columns: int) -> int:
    return 2 * rows * inner * columns


def _attention(query, key, value, *rest: Any, out_val: Any = None) -> int:
    weights = math.prod(torch.broadcast_shapes(*(t.shape[:-2] for t in (query, key, value))))
    weights *= query.shape[-2] * key.shape[-2]
    return _product(weights, query.shape[-1], 1) + _product(weights, value.shape[-1], 1)


def _attention_backward(grad, query, key, value, *rest: Any, out_val: Any = None) -> int:
    """The scores and the gradient of the weights, and the gradients that are wanted."""
    wants = next(argument for argument in rest if isinstance(argument, str))
    weights = grad.shape[:-1].numel() * key.shape[-2]
    widths = {"q": query.shape[-1], "k": key.shape[-1], "v": value.shape[-1]}
    total = widths["q"] + sum(width for name, width in widths.items() if name in wants)
    return _product(weights, total + (widths["v"] if wants != "v" else 0), 1)


def _linear_cross_entropy(hidden, weight, *rest: Any, out_val: Any = None) -> int:
    """The logits, and the gradients that are wanted of the layer's input and of its weight."""
    wants = next(argument for argument in reversed(rest) if isinstance(argument, str))
    rows, width = hidden.shape
    return _product(rows, width, len(weight)) * (1 + ("h" in wants) + ("w" in wants))


_FORMULAS: dict[str, Callable[..., int]] = {
    "attention": _attention,
    "attention_backward": _attention_backward,
    "linear_cross_entropy": _linear_cross_entropy,
    "sharded_linear_cross_entropy": _linear_cross_entropy,
}


def tell_counters() -> None:
    """Add the formulas to the tables of the counters that are active."""
    if is_compiling() or not torch._C._len_torch_dispatch_stack():
        return
    for mode in _get_current_dispatch_mode_stack():
        table: Any = getattr(getattr(mode, "counter", None), "flop_registry", None)
        if isinstance(table, dict):
            for name, formula in _FORMULAS.items():
                table.setdefault(getattr(torch.ops.fastreg, name), formula)
