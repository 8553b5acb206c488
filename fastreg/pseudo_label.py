"""Semi-supervised learning by pseudo-labels: the network's own confident predictions become targets.

    p = softmax(weak / T),    q = one-hot(argmax p)
    loss = 1/N sum over i of [max p_i >= threshold] * H(q_i, softmax(strong_i))

Lee 2013, "Pseudo-label"; with two views of each input and a threshold Sohn et al. 2020, "FixMatch". Beyond
them: soft targets q = p.
"""

from __future__ import annotations

import math
from typing import Literal, overload

import torch

from ._checks import check_number, check_tensor
from ._cross_entropy import cross_entropy
from ._losses import row_sum_of_shares
from ._transforms import handed_over, is_foreign, is_transformed, may_look

__all__ = ["pseudo_label_loss"]

_IGNORED = -100


@overload
def pseudo_label_loss(
    strong_logits: torch.Tensor,
    weak_logits: torch.Tensor | None = None,
    *,
    threshold: float = 0.95,
    temperature: float = 1.0,
    hard: bool = True,
    return_mask_rate: Literal[False] = False,
) -> torch.Tensor: ...


@overload
def pseudo_label_loss(
    strong_logits: torch.Tensor,
    weak_logits: torch.Tensor | None = None,
    *,
    threshold: float = 0.95,
    temperature: float = 1.0,
    hard: bool = True,
    return_mask_rate: Literal[True],
) -> tuple[torch.Tensor, torch.Tensor]: ...


def pseudo_label_loss(
    strong_logits: torch.Tensor,
    weak_logits: torch.Tensor | None = None,
    *,
    threshold: float = 0.95,
    temperature: float = 1.0,
    hard: bool = True,
    return_mask_rate: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of unlabelled samples against what the network itself is sure of.

    Add it to the supervised loss, `cross_entropy(logits, y) + weight * pseudo_label_loss(...)`.

    Args:
        strong_logits: logits of the strongly distorted view (dropout, noise, augmentation), (N, C) or (N, C,
            d1, ...); float32, float64, float16 or bfloat16. The gradient flows here.
        weak_logits: logits of the weakly distorted or clean view of the same samples, same shape; they make
            the targets and get no gradient. None: `strong_logits` itself, the pseudo-label of Lee 2013 (which
            has threshold=0).
        threshold: in [0, 1]; a sample counts if the largest of its probabilities p is at least this.
        temperature: T > 0 in p = softmax(weak_logits / T). Below 1 it sharpens, above 1 it softens, both the
            confidence that is held against `threshold` and soft targets; the class of a hard target is the
            same for every T.
        hard: the target is the most probable class (of equal ones the first). False: p itself.
        return_mask_rate: give (loss, mask_rate).

    Returns:
        The loss, shape (), in the dtype of `strong_logits` (float32 under autocast): the mean over all N * d1
        * ... samples, with 0 for those that are not confident, so that the weight of the term grows as the
        network learns. No samples: 0, with a graph. mask_rate is the share of samples that count, a float32
        tensor of shape () without a gradient; 0 for no samples.

    A sample whose weak logits have a NaN or +inf is not confident; a NaN in strong logits gives a NaN loss if
    the sample counts, and nothing if it does not.

    Raises:
        ValueError: shapes, devices or dtypes that do not fit, threshold outside [0, 1], temperature not
            positive and finite; on the CPU, weak logits that are at least 0 and sum to 1 or 100 over the
            classes, as probabilities and percentages do: no sample would ever be confident.
        TypeError: no tensors, or no numbers.

    Source: Lee 2013, Pseudo-label: the simple and efficient semi-supervised learning method for deep neural
    networks; Sohn et al. 2020, FixMatch; soft targets: Xie et al. 2020, Unsupervised data augmentation.
    """
    if is_foreign(strong_logits, weak_logits):
        return handed_over(pseudo_label_loss, locals())
    weak_logits = strong_logits if weak_logits is None else weak_logits
    _check(strong_logits, weak_logits, threshold, temperature)

    # The targets, and which samples count.
    with torch.no_grad():
        weak = weak_logits if weak_logits.dtype == torch.float64 else weak_logits.float()
        p = (weak / temperature).softmax(1)
        confidence, label = p.max(1)
        counted = confidence >= threshold  # False for NaN

    # Their loss. Samples that do not count are taken out of it by ignore_index, or where targets are
    # probabilities by zeros in the logits too, since 0 * NaN would be NaN.
    statistics_dtype = torch.promote_types(strong_logits.dtype, torch.float32)
    if hard:
        logits, target = strong_logits, label.where(counted, _IGNORED)
    else:
        inside = counted.unsqueeze(1)
        logits, target = strong_logits.where(inside, 0), p.where(inside, 0)
    # A float16 sum may overflow where its mean does not.
    loss = cross_entropy(
        logits, target, ignore_index=_IGNORED, reduction="sum", loss_dtype=statistics_dtype
    ) / max(label.numel(), 1)
    if not torch.is_autocast_enabled(strong_logits.device.type):
        loss = loss.to(strong_logits.dtype)
    if not return_mask_rate:
        return loss
    return loss, counted.sum(dtype=torch.float32) / max(label.numel(), 1)


def _check(
    strong_logits: torch.Tensor, weak_logits: torch.Tensor, threshold: float, temperature: float
) -> None:
    op = "pseudo_label_loss"
    for name, logits in (("strong_logits", strong_logits), ("weak_logits", weak_logits)):
        check_tensor(op, name, logits)
        if not logits.is_floating_point():
            raise TypeError(
                f"{op}: {name} must be floating point, got {logits.dtype}; give logits, not classes"
            )
        if logits.dim() < 2 or logits.shape[1] == 0:
            raise ValueError(
                f"{op}: {name} must be (N, C) or (N, C, ...) with C > 0, got {tuple(logits.shape)}"
            )
    if strong_logits.shape != weak_logits.shape or strong_logits.device != weak_logits.device:
        raise ValueError(
            f"{op}: both views must have one shape and device, got "
            f"{tuple(strong_logits.shape)} on {strong_logits.device} and {tuple(weak_logits.shape)} on "
            f"{weak_logits.device}; pass the logits of the same samples"
        )
    looked_at = may_look(weak_logits) and not is_transformed()
    if looked_at and (total := row_sum_of_shares(weak_logits)) is not None:
        raise ValueError(
            f"{op}: expected logits, got numbers of at least 0 that sum to {total:g} over the classes, "
            f"as probabilities do; give the model's outputs before softmax, or p.log()"
        )
    check_number(op, "threshold", threshold, 0, 1)
    check_number(op, "temperature", temperature)
    if not 0 < temperature < math.inf:
        raise ValueError(
            f"{op}: temperature must be positive and finite, got {temperature}; hard=True is the limit 0"
        )
