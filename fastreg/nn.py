"""The functions as modules. Each module with a namesake in torch is a subclass of it, so that isinstance
checks and checkpoints carry over.
"""

from __future__ import annotations

from typing import Literal

import torch

from ._checks import check_choice, check_number
from ._cross_entropy import AllIgnored, LossOptions, Reduction, Smoothing, cross_entropy
from ._dropout import dropout
from ._dropout_add import dropout_add
from ._dropout_family import (
    alpha_dropout,
    drop_path,
    dropout1d,
    dropout2d,
    dropout3d,
    feature_alpha_dropout,
)
from ._fold import fold_dropout

__all__ = [
    "AlphaDropout",
    "CrossEntropyLoss",
    "DropPath",
    "Dropout",
    "Dropout1d",
    "Dropout2d",
    "Dropout3d",
    "DropoutAdd",
    "FeatureAlphaDropout",
    "fold_dropout",
]


class Dropout(torch.nn.Dropout):
    """Zeroes elements with probability `p` while training; drop-in for `torch.nn.Dropout`, on
    `fastreg.dropout`.

    Args:
        p: probability of zeroing an element, in [0, 1].
        inplace: overwrite the input.
        rescale: "train" divides by 1 - p while training; "inference" multiplies by 1 - p in evaluation, the
            textbook form that `fold_dropout` turns into scaled weights.

    Shape: any; dtypes and errors as in `fastreg.dropout`.
    """

    # For a module that `convert` made of torch's, without a call of __init__.
    rescale: Literal["train", "inference"] = "train"

    def __init__(
        self, p: float = 0.5, inplace: bool = False, *, rescale: Literal["train", "inference"] = "train"
    ) -> None:
        check_number("Dropout", "p", p, 0, 1)
        check_choice("Dropout", "rescale", rescale, ("train", "inference"))
        super().__init__(p, inplace)
        self.rescale = rescale

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Apply it; (*) -> (*)."""
        return dropout(input, self.p, self.training, self.inplace, rescale=self.rescale)

    def extra_repr(self) -> str:
        """The arguments as in torch, and `rescale` where it is not the default."""
        return super().extra_repr() + ("" if self.rescale == "train" else f", rescale={self.rescale!r}")


class _CheckedP:
    """Checks p before torch does, because torch lets NaN and strings of digits pass."""

    def __init__(self, p: float = 0.5, inplace: bool = False) -> None:
        check_number(type(self).__name__, "p", p, 0, 1)
        super().__init__(p, inplace)  # type: ignore[call-arg]


class Dropout1d(_CheckedP, torch.nn.Dropout1d):
    """Zeroes channels of (N, C, L) or (C, L); drop-in for `torch.nn.Dropout1d`, on `fastreg.dropout1d`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Apply it; (N, C, L) -> (N, C, L)."""
        return dropout1d(input, self.p, self.training, self.inplace)


class Dropout2d(_CheckedP, torch.nn.Dropout2d):
    """Zeroes channels of (N, C, H, W); drop-in for `torch.nn.Dropout2d`, on `fastreg.dropout2d`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Apply it; (N, C, H, W) -> (N, C, H, W)."""
        return dropout2d(input, self.p, self.training, self.inplace)


class Dropout3d(_CheckedP, torch.nn.Dropout3d):
    """Zeroes channels of (N, C, D, H, W); drop-in for `torch.nn.Dropout3d`, on `fastreg.dropout3d`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Apply it; (N, C, D, H, W) -> (N, C, D, H, W)."""
        return dropout3d(input, self.p, self.training, self.inplace)


class AlphaDropout(_CheckedP, torch.nn.AlphaDropout):
    """Dropout that keeps mean and variance after SELU; drop-in for `torch.nn.AlphaDropout`, on
    `fastreg.alpha_dropout`.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Apply it; (*) -> (*)."""
        return alpha_dropout(input, self.p, self.training, self.inplace)


class FeatureAlphaDropout(_CheckedP, torch.nn.FeatureAlphaDropout):
    """Alpha dropout of whole channels of (N, C, ...); drop-in for `torch.nn.FeatureAlphaDropout`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Apply it; (N, C, ...) -> (N, C, ...)."""
        return feature_alpha_dropout(input, self.p, self.training, self.inplace)


class DropPath(torch.nn.Module):
    """Stochastic depth: zeroes whole samples of a residual branch while training, on `fastreg.drop_path`.

    Args:
        p: probability of zeroing a sample, in [0, 1].
        scale_by_keep: divide the kept samples by 1 - p.

    Shape: (N, ...) -> (N, ...).
    """

    def __init__(self, p: float = 0.5, *, scale_by_keep: bool = True) -> None:
        super().__init__()
        check_number("DropPath", "p", p, 0, 1)
        self.p, self.scale_by_keep = p, scale_by_keep

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Apply it; (N, ...) -> (N, ...)."""
        return drop_path(input, self.p, self.training, scale_by_keep=self.scale_by_keep)

    def extra_repr(self) -> str:
        """The arguments."""
        return f"p={self.p}, scale_by_keep={self.scale_by_keep}"


class DropoutAdd(torch.nn.Module):
    """The end of a residual block, dropout(input + bias) + residual in one pass, on `fastreg.dropout_add`.

    Args:
        p: probability of dropping an element of input + bias while training, in [0, 1].

    Shape: input (*, C), residual (*, C) and bias (C,) or None -> (*, C). The bias is the one that the linear
    layer before leaves out, and stays that layer's parameter.
    """

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        check_number("DropoutAdd", "p", p, 0, 1)
        self.p = p

    def forward(
        self, input: torch.Tensor, residual: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Apply it; (*, C), (*, C) and (C,) -> (*, C)."""
        return dropout_add(input, residual, self.p, bias, self.training)

    def extra_repr(self) -> str:
        """The arguments."""
        return f"p={self.p}"


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """Cross-entropy with smoothed targets; drop-in for `torch.nn.CrossEntropyLoss`, on
    `fastreg.cross_entropy`.

    Args:
        weight, size_average, ignore_index, reduce, reduction, label_smoothing: as in torch.
        smoothing, z_loss, all_ignored, loss_dtype: as in `fastreg.cross_entropy`.

    Shape: (C,), (N, C) or (N, C, d1, ...) and targets -> () or the targets' shape.
    """

    # For a module that `convert` made of torch's, without a call of __init__.
    smoothing: Smoothing = "uniform"
    z_loss: float = 0.0
    all_ignored: AllIgnored = "nan"
    loss_dtype: torch.dtype | None = None
    # torch sets it, with the annotation str.
    reduction: Reduction

    def __init__(
        self,
        weight: torch.Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: Reduction = "mean",
        label_smoothing: float = 0.0,
        *,
        smoothing: Smoothing = "uniform",
        z_loss: float = 0.0,
        all_ignored: AllIgnored = "nan",
        loss_dtype: torch.dtype | None = None,
    ) -> None:
        op = "CrossEntropyLoss"
        LossOptions.checked(
            op,
            reduction=reduction,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            smoothing=smoothing,
            z_loss=z_loss,
            all_ignored=all_ignored,
            loss_dtype=loss_dtype,
        )
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.smoothing, self.z_loss = smoothing, z_loss
        self.all_ignored, self.loss_dtype = all_ignored, loss_dtype

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The loss of logits `input` against `target`."""
        return cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            smoothing=self.smoothing,
            z_loss=self.z_loss,
            all_ignored=self.all_ignored,
            loss_dtype=self.loss_dtype,
        )
