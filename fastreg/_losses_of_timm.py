"""timm's losses on `fastreg.cross_entropy`: what `convert` makes of them, by their names, without timm.

Each keeps the attributes and the name of the loss that it was, and its own formula, which it computes by
torch wherever the operator does not mean the same.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.jit import is_scripting

from ._checks import DTYPES
from ._cross_entropy import cross_entropy
from ._transforms import is_recorded

# No class index has this value, so that none is ignored. timm's losses know no such index.
_NONE_IGNORED = -(2**63)


def _is_plain(*values: torch.Tensor) -> bool:
    """Whether the operator takes these tensors, two matrices or a matrix and its indices."""
    return (
        not is_recorded()
        and all(type(value) in (torch.Tensor, torch.nn.Parameter) for value in values)
        and values[0].dim() == 2
        and values[0].numel() > 0
        and values[0].dtype in DTYPES
        # Autocast takes torch's cross-entropy up to float32 on every device, its log_softmax not on a CPU.
        and not (values[0].is_cpu and torch.is_autocast_enabled("cpu"))
    )


class LabelSmoothingCrossEntropy(torch.nn.Module):
    """confidence * -log p_target + smoothing * mean of -log p, over classes; the mean over samples.

    Shape: (N, C) and int64 (N,) -> ().
    """

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The loss of logits `x` against class indices."""
        if is_scripting():
            return _smoothed(x, target, self.smoothing, self.confidence)  # type: ignore[arg-type]
        else:
            return _smoothed_or_torchs(self, x, target)


def _smoothed_or_torchs(loss: Any, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    if (
        _is_plain(x, target)
        and target.dtype == torch.int64
        and target.shape == x.shape[:1]
        and 0 <= loss.smoothing <= 1
        and loss.confidence == 1.0 - loss.smoothing
    ):
        try:
            return cross_entropy(x, target, None, None, _NONE_IGNORED, None, "mean", loss.smoothing)
        except ValueError:  # an index out of range, about which torch says its own below
            pass
    return _smoothed(x, target, loss.smoothing, loss.confidence)


def _smoothed(x: torch.Tensor, target: torch.Tensor, smoothing: float, confidence: float) -> torch.Tensor:
    logs = F.log_softmax(x, -1)
    right = logs.gather(-1, target.unsqueeze(1)).squeeze(1)
    return -(confidence * right + smoothing * logs.mean(-1)).mean()


class SoftTargetCrossEntropy(torch.nn.Module):
    """-sum over classes of target * log p; the mean over samples.

    Shape: (..., C) and (..., C) -> ().
    """

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The loss of logits `x` against probabilities."""
        if is_scripting():
            return _soft(x, target)
        else:
            return _soft_or_torchs(x, target)


def _soft_or_torchs(x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    if (
        _is_plain(x, target)
        and target.shape == x.shape
        and target.dtype in DTYPES
        and not target.requires_grad
    ):
        return cross_entropy(x, target)
    return _soft(x, target)


def _soft(x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return -(target * F.log_softmax(x, -1)).sum(-1).mean()
