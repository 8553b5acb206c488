"""Dropout of channels and of samples, and alpha dropout, on the operators of dropout."""

from __future__ import annotations

import warnings
from typing import NoReturn

import torch
from torch.compiler import is_compiling

from ._checks import ArgumentError, check_dense
from ._dropout import Form, check_input, run_dropout
from ._transforms import handed_over, is_foreign


def _elements_per_decision(op: str, input: torch.Tensor, batch_dims: int) -> int:
    """The number of neighbouring elements that share a decision, where each index of the first `batch_dims`
    dimensions has a decision of its own.
    """
    check_dense(op, "input", input)
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
    batch_dims: int,
) -> torch.Tensor:
    """Dropout with one decision for each index of the first `batch_dims` dimensions. As in torch, an input of
    fewer dimensions matters only where something is drawn.
    """
    if not training or p == 0 or input.numel() == 0:
        return input
    if input.dim() < batch_dims and p != 1:
        _refuse_dimensions(op, input, f"at least {batch_dims}-D")
    inner = _elements_per_decision(op, input, batch_dims)
    return run_dropout(op, input, p, inplace, generator, inner, "inverted")


def _refuse_dimensions(op: str, input: torch.Tensor, expected: str) -> NoReturn:
    raise ArgumentError(
        f"{op}: input must be {expected}, got {input.dim()}-D of shape {tuple(input.shape)}; use dropout to "
        "drop single elements"
    )


def _warn_of_dimensions(op: str, input: torch.Tensor, taken_as: str) -> None:
    """Warn as torch does, with its first words, of an input that torch may one day take as something else."""
    _warn(
        f"{op}: Received a {input.dim()}-D input to {op}, which is deprecated: it is taken as {taken_as}; "
        "use dropout to drop single elements",
        4,
    )


def _warn(text: str, stacklevel: int) -> None:
    """Warn where nothing is compiled: torch.compile would end the graph there."""
    if not is_compiling():
        warnings.warn(text, stacklevel=stacklevel)


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
    if is_foreign(input):
        return handed_over(dropout1d, locals())
    p = check_input("dropout1d", input, p, training)
    if input.dim() not in (2, 3):
        _refuse_dimensions("dropout1d", input, "2-D or 3-D")
    return _feature_dropout("dropout1d", input, p, training, inplace, generator, input.dim() - 1)


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
    if is_foreign(input):
        return handed_over(dropout2d, locals())
    p = check_input("dropout2d", input, p, training)
    if input.dim() == 3:
        _warn(
            "dropout2d: Received a 3D input to dropout2d and assuming that channel-wise 1D dropout behavior "
            "is desired: it is taken as (N, C, L); use dropout1d for that",
            3,
        )
    elif input.dim() != 4:
        _warn_of_dimensions("dropout2d", input, "(N, C, ...)")
    return _feature_dropout("dropout2d", input, p, training, inplace, generator, 2)


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
    if is_foreign(input):
        return handed_over(dropout3d, locals())
    p = check_input("dropout3d", input, p, training)
    if input.dim() not in (4, 5):
        _warn_of_dimensions("dropout3d", input, "(C, ...)")
    batch_dims = 2 if input.dim() == 5 else 1
    return _feature_dropout("dropout3d", input, p, training, inplace, generator, batch_dims)


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
    if is_foreign(input):
        return handed_over(alpha_dropout, locals())
    p = check_input("alpha_dropout", input, p, training)
    if not training or p == 0 or input.numel() == 0:
        return input
    return run_dropout("alpha_dropout", input, p, inplace, generator, 1, "alpha")


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

    Arguments, dtypes and errors as in `dropout`, and a ValueError where something is to be dropped from
    fewer than two dimensions.
    Source: Klambauer et al. 2017, Self-normalizing neural networks.
    """
    if is_foreign(input):
        return handed_over(feature_alpha_dropout, locals())
    op = "feature_alpha_dropout"
    p = check_input(op, input, p, training)
    if not training or p == 0 or input.numel() == 0:
        return input
    if input.dim() < 2 and p != 1:
        _refuse_dimensions(op, input, "at least 2-D, (N, C, ...)")
    inner = _elements_per_decision(op, input, 2)
    return run_dropout(op, input, p, inplace, generator, inner, "alpha")


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
    if is_foreign(input):
        return handed_over(drop_path, locals())
    p = check_input("drop_path", input, p, training)
    if input.dim() == 0:
        raise ValueError("drop_path: input must be (N, ...), got a tensor without dimensions")
    if not training or p == 0 or input.numel() == 0:
        return input
    form: Form = "inverted" if scale_by_keep else "textbook"
    inner = _elements_per_decision("drop_path", input, 1)
    return run_dropout("drop_path", input, p, inplace, generator, inner, form)
