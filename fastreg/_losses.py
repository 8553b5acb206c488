"""What `loss=` is, in every function that takes it.

    loss(output, target) -> tensor: one number, or one value per sample, (B, ...)

The function that calls a loss reduces what it gives, each as it needs:

- an attack takes the sum, so that the gradient of one sample does not depend on the size of the batch;
- a training objective takes the mean;
- `pgd` with restarts compares each sample's runs, and so needs one value per sample.

One number is taken as it is: it may be a mean or a sum already.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from ._cross_entropy import cross_entropy
from ._types import Loss

IGNORED = -100  # the class of what has no label, as in cross-entropy
_REMEDY = "loss=lambda output, y: torch.nn.functional.cross_entropy(output{key}, y)"


def count_of(x: torch.Tensor) -> int:
    """The number of samples in x; a tensor without dimensions is one sample."""
    return len(x) if x.dim() else 1


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """(B, elements of one sample)."""
    return x.reshape(count_of(x), math.prod(x.shape[1:]))


def checked_loss(op: str, value: Any, count: int) -> torch.Tensor:
    """`value`, what a loss gave for `count` samples, where it is as the contract says."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(
            f"{op}: loss must give a tensor, got {type(value).__name__}; do not call .item() in it"
        )
    if value.numel() != 1 and (not value.dim() or len(value) != count):
        raise ValueError(
            f"{op}: loss must give one number or one value per sample, ({count}, ...), got shape "
            f"{tuple(value.shape)}; reduce it with .mean() or .sum()"
        )
    return value


def check_logits(op: str, output: Any, remedy: str = _REMEDY) -> None:
    """Raise unless a model gave a tensor; `remedy` holds a {key}, where the logits are likely to be."""
    if isinstance(output, torch.Tensor):
        return
    if isinstance(output, Mapping):
        names = [name for name, value in output.items() if isinstance(value, torch.Tensor)]
        key = f"[{'logits' if 'logits' in output or not names else names[0]!r}]"
    elif isinstance(output, (tuple, list)) and not hasattr(output, "logits"):
        key = "[0]"
    else:
        key = ".logits"
    raise TypeError(
        f"{op}: the model must give a tensor of logits, got {type(output).__name__}; pass "
        f"{remedy.format(key=key)}, or a function that calls the model and takes its logits"
    )


def row_sum_of_shares(logits: torch.Tensor) -> float | None:
    """1 or 100 where each of several rows (N, k, ...) is of numbers that are at least 0 and sum to that, as
    probabilities and percentages do and logits do not; else None.
    """
    rows = logits.numel() // max(logits.shape[1], 1) if logits.dim() > 1 else 0
    if rows < 2 or logits.shape[1] < 2 or not bool((logits >= 0).all()):  # A single row may do so by chance.
        return None
    total = logits.detach().double().sum(1)
    # Probabilities in bfloat16 are off by 2^-9 each.
    room = min(0.02, max(1e-4, 2 * torch.finfo(logits.dtype).eps))
    return next((whole for whole in (1.0, 100.0) if bool(((total / whole - 1).abs() <= room).all())), None)


def attacked_loss(op: str, loss: Loss | None, output: Any, target: Any, count: int) -> torch.Tensor:
    """The sum over the samples, (), which an attack climbs; cross-entropy if `loss` is None."""
    if loss is not None:
        return checked_loss(op, loss(output, target), count).sum()
    check_logits(op, output)
    return cross_entropy(
        output, target, reduction="sum", loss_dtype=torch.promote_types(output.dtype, torch.float32)
    )


def trained_loss(op: str, loss: Loss | None, output: Any, target: Any, count: int) -> torch.Tensor:
    """The mean over the samples, (), which training descends; cross-entropy if `loss` is None."""
    if loss is None:
        check_logits(op, output)
        return cross_entropy(output, target)
    value = checked_loss(op, loss(output, target), count)
    return value if value.dim() == 0 else value.mean()


def loss_per_sample(op: str, loss: Loss | None, output: Any, target: Any, count: int) -> torch.Tensor:
    """The loss of every sample, (B,); cross-entropy if `loss` is None."""
    if loss is None:
        check_logits(op, output)
        value = cross_entropy(output, target, reduction="none")
    else:
        value = loss(output, target)
    if not isinstance(value, torch.Tensor) or value.dim() == 0 or len(value) != count:
        got = f"shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
        raise ValueError(
            f"{op}: with restarts the loss must give one value per sample, ({count}, ...), got {got}; use "
            "reduction='none'"
        )
    return rows_of(value).sum(1)
