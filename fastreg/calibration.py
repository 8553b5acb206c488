"""Calibration of a classifier: is it right as often as its confidence, max_k softmax(logits)_k, says?

    error = sum over bins of count / N * |accuracy - confidence|

Label smoothing and early stopping make networks less overconfident, and this error measures by how much
(Guo, Pleiss, Sun, Weinberger 2017).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ._checks import check_count, check_tensor
from ._losses import IGNORED, row_sum_of_shares
from ._transforms import may_look

__all__ = ["CalibrationCurve", "calibration_curve", "calibration_error"]


class CalibrationCurve(NamedTuple):
    """What `calibration_curve` gives, one value per bin."""

    count: torch.Tensor  # type: ignore[assignment]  # It hides tuple.count.
    accuracy: torch.Tensor
    confidence: torch.Tensor


def calibration_curve(logits: torch.Tensor, target: torch.Tensor, *, bins: int = 15) -> CalibrationCurve:
    """Accuracy and mean confidence of the predictions in each of `bins` intervals of confidence, (m / bins,
    (m + 1) / bins].

    Args:
        logits: (N, k), floating point; log-probabilities are logits too.
        target: class indices, (N,), int64. Predictions of class -100, `cross_entropy`'s ignore_index, are
            left out.
        bins: number of intervals, at least 1.

    Returns:
        CalibrationCurve(count, accuracy, confidence), float64 tensors (bins,); accuracy and confidence of an
        empty bin are NaN. Predictions of NaN are counted in no bin.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit, bins below 1; on the CPU, classes outside of
            [0, k) and logits whose rows are all at least 0 and sum to 1 or 100, as probabilities and
            percentages do. On a GPU, where nobody may look, a class outside makes everything NaN.

    Source: the reliability diagram of Niculescu-Mizil and Caruana 2005, as in Guo et al. 2017.
    """
    op = "calibration_curve"
    count, accuracy, confidence = _sums(op, logits, target, bins)
    return CalibrationCurve(count, accuracy / count, confidence / count)


def calibration_error(logits: torch.Tensor, target: torch.Tensor, *, bins: int = 15) -> torch.Tensor:
    """Expected calibration error: sum over bins of count / N * |accuracy - confidence|.

    Args as in `calibration_curve`.

    Returns:
        Tensor of shape (), float64, in [0, 1]; NaN if a prediction is or none is left.

    Source: Naeini, Cooper, Hauskrecht 2015; Guo, Pleiss, Sun, Weinberger 2017, On calibration of modern
    neural networks.
    """
    count, accuracy, confidence = _sums("calibration_error", logits, target, bins)
    total = (target != IGNORED).sum()
    gap = (accuracy - confidence).abs().sum() / total
    return gap.where(count.sum() == total, torch.nan)


@torch.no_grad()
def _sums(
    op: str, logits: torch.Tensor, target: torch.Tensor, bins: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Per bin: how many predictions, how many of them right, the sum of their confidences."""
    check_tensor(op, "logits", logits)
    check_tensor(op, "target", target)
    check_count(op, "bins", bins)
    if not logits.is_floating_point():
        raise TypeError(
            f"{op}: logits must be floating point, got {logits.dtype}; give the model's outputs before argmax"
        )
    if logits.dim() != 2 or not logits.shape[1]:
        raise ValueError(
            f"{op}: logits must be (N, k), got {tuple(logits.shape)}; move other dimensions into the first"
        )
    if target.shape != logits.shape[:1] or target.dtype.is_floating_point or target.dtype == torch.bool:
        raise ValueError(
            f"{op}: target must be class indices ({len(logits)},), got {target.dtype} {tuple(target.shape)}; "
            "of probabilities take .argmax(1)"
        )
    labelled = target != IGNORED
    impossible = labelled & ((target < 0) | (target >= logits.shape[1]))
    if may_look(logits):
        if impossible.any():
            raise ValueError(
                f"{op}: target must be class indices in [0, {logits.shape[1]}) or {IGNORED}, got "
                f"{target[impossible][0].item()}; mark what has no label with {IGNORED}"
            )
        if (total := row_sum_of_shares(logits)) is not None:
            raise ValueError(
                f"{op}: logits must be logits, got rows that are at least 0 and sum to {total:g}, as "
                f"probabilities are; give p.log(), of percentages (p / 100).log()"
            )
    confidence, predicted = logits.double().softmax(1).max(1)
    known = (labelled & ~confidence.isnan()).double()
    known = known.where(~impossible.any(), torch.nan)
    confidence = confidence.nan_to_num()
    which = ((confidence * bins).ceil().long() - 1).clamp(0, bins - 1)
    right = (predicted == target).double()

    def per_bin(v: torch.Tensor) -> torch.Tensor:
        return confidence.new_zeros(bins).index_add(0, which, known * v)

    return per_bin(known), per_bin(right), per_bin(confidence)
