"""A linear layer and the cross-entropy of its outputs in one, without ever holding all logits.

loss = cross_entropy(hidden @ weight.T + bias, target), one chunk of rows after another: its logits are
overwritten by their gradient, which goes into the gradients of hidden, weight and bias, and the next chunk
takes its place. Nothing is computed twice. Gradients in the forward pass, by chunks: Hsu et al. 2024, Liger
kernel: efficient Triton kernels for LLM training.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ._checks import ArgumentError, check_constant, check_tensor
from ._cross_entropy import (
    ROW_OPTIONS,
    ROW_OPTIONS_WITH_DEFAULTS,
    AllIgnored,
    LossOptions,
    Reduction,
    Smoothing,
    check_classes,
    class_index_error,
    loss_by_torch,
    loss_of,
    plain_rows_,
    promoted_dtype,
    scaled,
    statistics_dtype,
)
from ._flops import tell_counters
from ._registry import define, define_kernel
from ._transforms import (
    autocast_dtype,
    handed_over,
    has_transformed_parts,
    is_foreign,
    is_sharded,
    is_transformed,
    without_autocast,
)

# Overwrites each row of the logits with factor * its gradient; gives the losses of the rows.
define(
    "cross_entropy_(Tensor(a!) logits, Tensor target, Tensor factor, Tensor? weight=None, "
    f"{ROW_OPTIONS_WITH_DEFAULTS}) -> Tensor",
    plain=plain_rows_,
)


@torch.library.register_fake("fastreg::cross_entropy_", allow_override=True)
def _(logits, target, factor, *args, **kwargs):
    return logits.new_empty(logits.shape[:1], dtype=statistics_dtype(logits))


_cross_entropy_ = torch.ops.fastreg.cross_entropy_.default

_STEP = 32  # rows by which matrix products work (171 take longer than 192), and the least of a chunk
_MOST_BYTES = 2**26  # of a chunk: more and nothing gets faster


def _sums_are_wide(hidden: Tensor) -> bool:
    """Whether the chunks' parts of the weight's gradient are added up in float32 where the weight is not.

    Always in float16, which ends at 6e-8, where gradients may lie before a loss scale has lifted them. In
    bfloat16 where that costs less than a tenth of the logits.
    """
    rows, width = hidden.shape
    return hidden.dtype == torch.float16 or (hidden.dtype == torch.bfloat16 and 20 * width <= rows)


def _chunk_rows(hidden: Tensor, classes: int) -> int:
    """Rows in a chunk: less than a tenth of all of them, but never so few that matrix products crawl."""
    rows = len(hidden)
    # Products of 16-bit matrices take scratch memory, too.
    chunk = int(rows * (0.095 if hidden.element_size() > 2 else 0.085))
    # Where bfloat16 sums are narrow, each chunk costs the sum a rounding: there must be few of them.
    if hidden.dtype != torch.bfloat16 or _sums_are_wide(hidden):
        chunk = min(chunk, _MOST_BYTES // max(classes * hidden.element_size(), 1))
    return min(max(chunk // _STEP, 1) * _STEP, rows)


def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    factor: Tensor,
    class_weight: Tensor | None,
    wants: str,
    *of_row,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`by_chunks` with the loss of whole rows. of_row: as in LossOptions.of_row()."""

    def rows_(logits, target, factor, class_weight):
        return _cross_entropy_(logits, target, factor, class_weight, *of_row)

    classes = weight.shape[0]
    return by_chunks(hidden, weight, bias, target, factor, class_weight, wants, rows_, classes)


@torch.no_grad()
def by_chunks(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    factor: Tensor,
    class_weight: Tensor | None,
    wants: str,
    rows_: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor],
    columns: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(losses of the rows, gradients of sum_r factor_r * loss_r with respect to hidden, weight and bias).

    factor: (rows,). wants: which gradients, letters of "hwb"; the others come back empty. rows_(logits,
    target, factor, class_weight) overwrites the logits of a chunk with factor times their gradient and gives
    the losses. columns: of the logits, for the size of a chunk.
    """
    rows, classes, dtype = hidden.shape[0], weight.shape[0], hidden.dtype
    losses, d_hidden, d_weight, d_bias = empty_results(hidden, weight, wants)
    d_bias.zero_()
    if not rows:
        d_weight.zero_()
    scale = None
    if dtype == torch.float16 and rows:  # factors are at most 1 inside: the logits' gradients fit the range
        scale = factor.abs().max()
        scale = torch.where((scale > 0) & scale.isfinite(), scale, 1)  # inf: a mean over no row
        factor = factor / scale
    chunk = _chunk_rows(hidden, columns)
    buffer = hidden.new_empty(chunk, classes)
    with without_autocast(hidden.device.type):
        for begin in range(0, rows, max(chunk, 1)):
            part = slice(begin, min(begin + chunk, rows))
            logits, h = buffer[: part.stop - begin], hidden[part]
            if bias is None:
                torch.mm(h, weight.t(), out=logits)
            else:
                torch.addmm(bias, h, weight.t(), out=logits)
            losses[part] = rows_(logits, target[part], factor[part], class_weight)
            if "h" in wants:
                _add_product(d_hidden[part], logits, weight, first=True)
            if "w" in wants:
                _add_product(d_weight, logits.t(), h, first=begin == 0)
            if "b" in wants:
                d_bias += logits.sum(0, dtype=d_bias.dtype)
    if scale is not None:
        for gradient in (d_hidden, d_weight, d_bias):
            gradient.mul_(scale)
    return losses, d_hidden, d_weight, d_bias


def _add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total += a @ b, or total = a @ b."""
    if total.dtype != a.dtype:
        total.copy_(a @ b) if first else total.add_(a @ b)
    elif first:
        torch.mm(a, b, out=total)
    else:
        total.addmm_(a, b)


def empty_results(hidden: Tensor, weight: Tensor, wants: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    statistics, empty = statistics_dtype(hidden), hidden.new_empty
    narrow, wide = hidden.dtype == torch.float16, _sums_are_wide(hidden)
    return (
        empty(hidden.shape[0], dtype=statistics),
        empty(hidden.shape, dtype=statistics if narrow else None) if "h" in wants else empty(0),
        empty(weight.shape, dtype=statistics if wide else None) if "w" in wants else empty(0),
        empty(weight.shape[0], dtype=statistics) if "b" in wants else empty(0),
    )


define_kernel(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor factor, "
    f"Tensor? class_weight, str wants, {ROW_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
)


@torch.library.register_fake("fastreg::linear_cross_entropy", allow_override=True)
def _(hidden, weight, bias, target, factor, class_weight, wants, *args):
    return empty_results(hidden, weight, wants)


_linear_cross_entropy = torch.ops.fastreg.linear_cross_entropy.default


class _LinearCrossEntropy(torch.autograd.Function):
    """sum_r factor_r * loss_r, whose gradients are computed at once and are all that the backward pass reads;
    or, for `each` row, its loss, whose gradients are computed when their factors arrive."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, target, factor, class_weight, each, *options):
        ctx.wants = "".join(name for name, wanted in zip("hwb", ctx.needs_input_grad, strict=False) if wanted)
        ctx.each, ctx.options = each, options
        wants = "" if each else ctx.wants
        losses, *gradients = _linear_cross_entropy(
            hidden, weight, bias, target, factor, class_weight, wants, *options
        )
        ctx.save_for_backward(hidden, weight, bias, target, factor, class_weight, *gradients)
        return losses if each else weighted_sum(losses, factor)

    @staticmethod
    def backward(ctx, g):
        hidden, weight, bias, target, factor, class_weight, *gradients = ctx.saved_tensors
        if torch.is_grad_enabled():
            results = _differentiable_gradients(ctx, g, hidden, weight, bias, target, factor, class_weight)
        elif ctx.each:
            tell_counters()
            g = g.to(factor.dtype).contiguous()
            gradients = _linear_cross_entropy(
                hidden, weight, bias, target, g, class_weight, ctx.wants, *ctx.options
            )[1:]
            results = [d.to(hidden.dtype) for d in gradients]
        else:
            g = factor_of_sum(g, target, ctx.options[0])
            results = [scaled(d, g).to(hidden.dtype) for d in gradients]
        wanted = (d if name in ctx.wants else None for name, d in zip("hwb", results, strict=True))
        return *wanted, *(None,) * (4 + len(ctx.options))


def factor_of_sum(g: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """g, but 0 where no row counts: a sum over none, divided by their number, sends inf back."""
    return g if target.is_floating_point() else torch.where((target != ignore_index).any(), g, 0)


def _sum_dtype(like: Tensor) -> torch.dtype:
    """The dtype of sums over rows: float64, but on the GPUs that have none."""
    return torch.float32 if like.device.type == "mps" else torch.float64


def weighted_sum(losses: Tensor, factor: Tensor) -> Tensor:
    return (losses.to(_sum_dtype(losses)) * factor).sum()


def _differentiable_gradients(
    ctx, g, hidden, weight, bias, target, factor, class_weight
) -> list[Tensor | None]:
    """For derivatives of derivatives, in operations that have them, with all logits at once. The tensors are
    not read from ctx again: in a checkpoint each can be read once.
    """
    # One may have been computed from another. Seen through views, none depends on another.
    hidden, weight, bias = (x if x is None else x.view_as(x) for x in (hidden, weight, bias))
    logits = torch.nn.functional.linear(hidden, weight, bias)
    options = LossOptions(0, *ctx.options)._replace(loss_dtype=factor.dtype)
    losses = loss_of(logits, target, class_weight, options)
    loss = losses if ctx.each else weighted_sum(losses, factor)
    inputs = {name: x for name, x in zip("hwb", (hidden, weight, bias), strict=True) if name in ctx.wants}
    gradients = torch.autograd.grad(loss, list(inputs.values()), g, create_graph=True)
    found = dict(zip(inputs, gradients, strict=True))
    return [found.get(name) for name in "hwb"]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    smoothing: Smoothing = "uniform",
    z_loss: float = 0.0,
    all_ignored: AllIgnored = "nan",
    loss_dtype: torch.dtype | None = None,
) -> Tensor:
    """cross_entropy(linear(hidden, weight, bias), target) without ever holding all logits.

    Args:
        hidden: what a linear layer turns into logits, (..., H); float32, float64, float16 or bfloat16.
        weight: of that layer, (C, H), of the dtype and on the device of `hidden`.
        target: class indices, (...), an integer dtype; or probabilities, (..., C), to which no gradient
            flows.
        bias: of that layer, (C,), or None.
        class_weight: a weight per class, (C,), `weight` in `cross_entropy`; no gradient flows to it.
        ignore_index, reduction, label_smoothing, smoothing, z_loss, all_ignored, loss_dtype: as in
            `cross_entropy`.

    Returns:
        The loss, () or, with reduction "none", (...). Under autocast the layer computes in autocast's dtype
        and the loss is float32, as for the two functions. Twice differentiable in hidden, weight and bias.

    The forward pass computes the gradients too, chunk by chunk, in the space of less than a tenth of the
    logits (of 32 rows where that is more), and the backward pass only hands them out; with reduction "none"
    they are computed there. They are what is kept for it. The weight's gradient is a sum over chunks, in
    float32; in bfloat16 only where H is less than a twentieth of the rows, else rounded for each of the
    chunks, about thirteen. Gradients of logits below 2^-126 are 0 (except in float64).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a class index out of range (on CUDA: NaN), and
            as `cross_entropy`.
        TypeError: `hidden`, `weight`, `target` or `bias` is no tensor, and as `cross_entropy`.

    Source: Hsu et al. 2024, Liger kernel (gradients in the forward pass, by chunks); the loss as in
    `cross_entropy`.
    """
    if is_foreign(hidden, weight, target, bias, class_weight):
        return handed_over(linear_cross_entropy, locals())
    tell_counters()
    op = "linear_cross_entropy"
    for name, value in (("hidden", hidden), ("weight", weight), ("target", target), ("bias", bias)):
        if name != "bias" or bias is not None:
            check_tensor(op, name, value)
    hidden, weight, bias, options = layer_and_options(
        op, hidden, weight, bias, target, class_weight, loss_dtype,
        reduction=reduction, ignore_index=ignore_index, label_smoothing=label_smoothing, smoothing=smoothing,
        z_loss=z_loss, all_ignored=all_ignored,
    )  # fmt: skip
    classes, shape = weight.shape[0], hidden.shape[:-1]
    target, class_weight = check_classes(
        op,
        hidden,
        target,
        class_weight,
        options,
        classes=classes,
        expected=(shape, torch.Size((*shape, classes))),
        name="hidden",
        weight_name="class_weight",
    )
    if target.is_floating_point():
        check_constant(op, "target", target)
    if has_transformed_parts(hidden, weight, bias, target, class_weight):
        logits = torch.nn.functional.linear(hidden, weight, bias)
        if hidden.dim() > 2:  # classes in dimension 1
            logits = logits.movedim(-1, 1)
            target = target.movedim(-1, 1) if target.is_floating_point() else target
        return loss_by_torch(op, logits, target, class_weight, options)
    if any(map(is_sharded, (hidden, weight, bias, target, class_weight))):
        from ._placed_cross_entropy import linear_loss_of_dtensors

        return linear_loss_of_dtensors(op, hidden, weight, bias, target, class_weight, options)
    return linear_loss(op, hidden, weight, bias, target, class_weight, options)


def linear_loss(
    op: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor,
    class_weight: Tensor | None, options: LossOptions,
) -> Tensor:  # fmt: skip
    """The loss of arguments that are checked and no DTensors."""
    classes, shape = weight.shape[0], hidden.shape[:-1]
    hidden = hidden.reshape(-1, hidden.shape[-1])
    target = target.reshape(-1, classes) if target.is_floating_point() else target.reshape(-1)

    factor = row_factor(hidden, target, class_weight, options)
    each = options.reduction == 0
    arguments = hidden, weight, bias, target, factor, class_weight
    if is_compiling():
        loss = _loss(arguments, each, options)
    else:
        try:
            loss = _loss(arguments, each, options)
        except ValueError as error:  # the kernel's, which knows no IndexError
            raise class_index_error(op, target, options.ignore_index, classes) or error from None
    return finished(loss, shape, hidden, options)


def finished(loss: Tensor, shape: torch.Size, rows: Tensor, options: LossOptions) -> Tensor:
    """The loss in its dtype and shape; the mean over no row is NaN unless the options say otherwise."""
    if options.reduction == 1 and not len(rows) and not options.all_ignored_zero:
        loss = loss + torch.nan
    loss = loss.to(options.loss_dtype or rows.dtype)
    return loss.view(shape) if options.reduction == 0 else loss


def _loss(arguments: tuple, each: bool, options: LossOptions) -> Tensor:
    """The losses of the rows, (rows,), if `each`; else their weighted sum. arguments: the tensors of the
    operator, in order.
    """
    hidden, weight, bias, target, factor, class_weight = arguments
    if is_transformed():
        logits = torch.nn.functional.linear(hidden, weight, bias)
        losses = loss_of(
            logits, target, class_weight, LossOptions(0, *options.of_row(), loss_dtype=factor.dtype)
        )
    elif torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in arguments[:3]):
        return _LinearCrossEntropy.apply(*arguments, each, *options.of_row())
    else:
        losses = _linear_cross_entropy(*arguments, "", *options.of_row())[0]
    return losses if each else weighted_sum(losses, factor)


def as_autocast(
    hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, bool]:
    """The arguments of the linear layer in the dtype of autocast, and whether it is on for them."""
    dtype = autocast_dtype(hidden.device.type)
    if dtype is None or hidden.dtype == torch.float64:
        return hidden, weight, bias, False
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype), True


def layer_and_options(
    op: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor,
    class_weight: Tensor | None, loss_dtype: torch.dtype | None, **given: Any,
) -> tuple[Tensor, Tensor, Tensor | None, LossOptions]:  # fmt: skip
    """The linear layer in the dtype of autocast, checked, and the options of its loss.

    given: the further options that LossOptions.checked takes.
    """
    hidden, weight, bias, autocast = as_autocast(hidden, weight, bias)
    if loss_dtype is None:
        loss_dtype = promoted_dtype(hidden.dtype, target, class_weight, autocast)
    options = LossOptions.checked(op, loss_dtype=loss_dtype, **given)
    check_layer(op, hidden, weight, bias)
    return hidden, weight, bias, options


def check_layer(op: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise unless the shapes, dtypes and devices of the linear layer fit."""
    if hidden.dim() == 0 or weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ArgumentError(
            f"{op}: weight must be (C, H) for hidden of shape (..., H), got {tuple(weight.shape)} for "
            f"{tuple(hidden.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ArgumentError(
            f"{op}: bias must have one value per class, shape ({weight.shape[0]},), got {tuple(bias.shape)}"
        )
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and (value.dtype != hidden.dtype or value.device != hidden.device):
            raise ArgumentError(
                f"{op}: {name} must be {hidden.dtype} on {hidden.device} as hidden is, got {value.dtype} on "
                f"{value.device}; convert it with .to(hidden)"
            )


def row_factor(hidden: Tensor, target: Tensor, class_weight: Tensor | None, options: LossOptions) -> Tensor:
    """What each row's loss counts in the reduced one, (rows,): 1, or 1 / normaliser of a mean."""
    one = torch.ones((), dtype=_sum_dtype(hidden), device=hidden.device)
    if options.reduction == 1:
        normaliser = row_weights(target, class_weight, options.ignore_index, one.dtype).sum()
        one = 1 / normaliser
        if options.all_ignored_zero:
            one = torch.where(normaliser == 0, 0.0, one)
    return one.to(statistics_dtype(hidden)).expand(len(hidden)).contiguous()


def row_weights(target: Tensor, class_weight: Tensor | None, ignore_index: int, dtype: torch.dtype) -> Tensor:
    """What each row counts in the normaliser of a mean: 1, the weight of its class, or 0 where ignored."""
    if target.is_floating_point():
        return target.new_ones(target.shape[:1] + target.shape[2:], dtype=dtype)
    counted = target != ignore_index
    if class_weight is None:
        return counted.to(dtype)
    return class_weight.to(dtype)[target.clamp(0, len(class_weight) - 1)].where(counted, 0)
