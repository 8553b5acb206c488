"""Dropout of channels and of samples, and alpha dropout, on the operators of dropout."""

from __future__ import annotations

import warnings
from collections.abc import Collection

import torch

from ._checks import check_tensor
from ._dropout import Form, check_input, run_dropout


def _elements_per_decision(input: torch.Tensor, batch_dims: int) -> int:
    """The number of neighbouring elements that share a decision, where each index of the first `batch_dims`
    dimensions has a decision of its own.
    """
    decisions = 1
    for size in input.shape[:batch_dims]:
        decisions *= size
    return input.numel() // max(decisions, 1)


def _feature_dropout(
    op: str,
    input: torch.Tensor,
    p: float,
    training: bool,
    inplace: bool,
    generator: torch.Generator | None,
    dims: Collection[int],
    batch_dims: int,
) -> torch.Tensor:
    """Dropout with one decision for each index of the first `batch_dims` dimensions; `dims` are the numbers
    of dimensions that `input` may have.
    """
    p = check_input(op, input, p)
    if input.dim() not in dims:
        expected = " or ".join(f"{d}-D" for d in dims)
        raise ValueError(f"{op}: input must be {expected}, got {input.dim()}-D of shape {tuple(input.shape)}")
    if not training or p == 0 or input.numel() == 0:
        return input
    inner = _elements_per_decision(input, batch_dims)
    return run_dropout(op, input, p, inplace, generator, inner, "inverted")


def dropout1d(
    input: torch.Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Zero whole channels of (N, C, L) or (C, L) with probability `p`; drop-in for
    `torch.nn.functional.dropout1d`.

    Arguments, dtypes and errors as in `dropout`; one bit per channel is saved for backward.
    Source: Tompson et al. 2015, Efficient object localization using convolutional networks.
    """
    check_tensor("dropout1d", "input", input)
    return _feature_dropout("dropout1d", input, p, training, inplace, generator, (2, 3), input.dim() - 1)


def dropout2d(
    input: torch.Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Zero whole channels of (N, C, H, W) with probability `p`; drop-in for `torch.nn.functional.dropout2d`.

    As in torch, a 3-D input is taken as (N, C, L), with a warning. Arguments, dtypes and errors as in
    `dropout`.
    Source: Tompson et al. 2015, Efficient object localization using convolutional networks.
    """
    check_tensor("dropout2d", "input", input)
    if input.dim() != 4:
        warnings.warn(
            f"dropout2d: a {input.dim()}-D input is taken as (N, C, ...), as torch does; use dropout1d for "
            f"(N, C, L)",
            stacklevel=2,
        )
    return _feature_dropout("dropout2d", input, p, training, inplace, generator, range(2, 64), 2)


def dropout3d(
    input: torch.Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Zero whole channels of (N, C, D, H, W) or (C, D, H, W); drop-in for `torch.nn.functional.dropout3d`.

    Arguments, dtypes and errors as in `dropout`.
    Source: Tompson et al. 2015, Efficient object localization using convolutional networks.
    """
    check_tensor("dropout3d", "input", input)
    if input.dim() not in (4, 5):
        warnings.warn(f"dropout3d: a {input.dim()}-D input is taken as (C, ...), as torch does", stacklevel=2)
    return _feature_dropout(
        "dropout3d", input, p, training, inplace, generator, range(1, 64), 2 if input.dim() == 5 else 1
    )


def _alpha_dropout(
    op: str,
    input: torch.Tensor,
    p: float,
    training: bool,
    inplace: bool,
    generator: torch.Generator | None,
    inner: int,
) -> torch.Tensor:
    if not training or p == 0 or input.numel() == 0:
        return input
    return run_dropout(op, input, p, inplace, generator, inner, "alpha")


def alpha_dropout(
    input: torch.Tensor,
    p: float = 0.5,
    training: bool = False,
    inplace: bool = False,
    *,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Set elements to SELU's negative saturation and rescale, so that zero mean and unit variance are kept.

    Drop-in for `torch.nn.functional.alpha_dropout`; note that `training` is False by default, as there.
    Arguments, dtypes and errors as in `dropout`.
    Source: Klambauer, Unterthiner, Mayr, Hochreiter 2017, Self-normalizing neural networks.
    """
    p = check_input("alpha_dropout", input, p)
    return _alpha_dropout("alpha_dropout", input, p, training, inplace, generator, 1)


def feature_alpha_dropout(
    input: torch.Tensor,
    p: float = 0.5,
    training: bool = False,
    inplace: bool = False,
    *,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """`alpha_dropout` of whole channels of (N, C, ...); drop-in for
    `torch.nn.functional.feature_alpha_dropout`.

    Arguments, dtypes and errors as in `dropout`, and a ValueError for an input of fewer than two dimensions.
    Source: Klambauer et al. 2017, Self-normalizing neural networks.
    """
    p = check_input("feature_alpha_dropout", input, p)
    if input.dim() < 2:
        raise ValueError(f"feature_alpha_dropout: input must be (N, C, ...), got shape {tuple(input.shape)}")
    return _alpha_dropout(
        "feature_alpha_dropout", input, p, training, inplace, generator, _elements_per_decision(input, 2)
    )


def drop_path(
    input: torch.Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    scale_by_keep: bool = True,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Stochastic depth: zero whole samples of (N, ...), the residual branch of a sample, with probability
    `p`.

    Args:
        input: tensor of at least one dimension; dtypes as in `dropout`.
        scale_by_keep: divide the kept samples by 1 - p, so that the mean is kept.

    Other arguments and errors as in `dropout`.
    Source: Huang, Sun, Liu, Sedra, Weinberger 2016, Deep networks with stochastic depth.
    """
    p = check_input("drop_path", input, p)
    if input.dim() == 0:
        raise ValueError("drop_path: input must be (N, ...), got a tensor without dimensions")
    if not training or p == 0 or input.numel() == 0:
        return input
    form: Form = "inverted" if scale_by_keep else "textbook"
    return run_dropout("drop_path", input, p, inplace, generator, _elements_per_decision(input, 1), form)
