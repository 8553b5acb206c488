"""Cross-entropy with smoothed targets, its gradient written in the sweep that computes the loss.

loss = -sum_c q_c log softmax(x)_c + z_loss * lse^2 for targets q that move a mass eps off the true class:
onto all k classes alike (Szegedy, Vanhoucke, Ioffe, Shlens, Wojna 2016), or onto the k - 1 others
(Goodfellow, Bengio, Courville 2016, 7.5.1).

The definition in plain torch is `_row_losses`, `_rows` and `_plain` below. An option goes to the places that
csrc/cross_entropy/cross_entropy_math.h lists.
"""

from __future__ import annotations

import contextlib
import functools
import numbers
import operator
import sys
from typing import Any, Literal, NamedTuple, cast

import numpy
import torch
from torch import Tensor
from torch.compiler import is_compiling

from ._checks import (
    DTYPES,
    ArgumentError,
    ArgumentTypeError,
    ClassIndexError,
    check_choice,
    check_constant,
    check_dense,
    check_dtype,
    check_number,
    check_tensor,
    is_int,
    scalar,
)
from ._registry import define, fast
from ._subnormal import flush
from ._transforms import (
    autocast_dtype,
    handed_over,
    has_transformed_parts,
    is_foreign,
    is_hidden,
    is_sharded,
    is_sharded_below,
    is_transformed,
    is_wrapped,
)

Reduction = Literal["none", "mean", "sum"]
Smoothing = Literal["uniform", "others"]
AllIgnored = Literal["nan", "zero"]

_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
_PROXY = torch._C._TorchDispatchModeKey.PROXY


class LossOptions(NamedTuple):
    """The options of the loss, as the operator `cross_entropy` takes them, in its order."""

    reduction: int = 1  # 0: none, 1: mean, 2: sum
    ignore_index: int = -100
    label_smoothing: float = 0.0
    others: bool = False  # smoothing="others"
    z_loss: float = 0.0
    all_ignored_zero: bool = False
    loss_dtype: torch.dtype | None = None

    @classmethod
    def checked(
        cls,
        op: str,
        *,
        reduction: Reduction,
        ignore_index: int,
        label_smoothing: float,
        smoothing: Smoothing,
        z_loss: float,
        all_ignored: AllIgnored,
        loss_dtype: torch.dtype | None,
    ) -> LossOptions:
        """The options that the caller named; raise unless the op has every one of them."""
        if reduction == "elementwise_mean":  # torch's old name of it
            reduction = "mean"
        check_choice(op, "reduction", reduction, tuple(_REDUCTIONS))
        check_choice(op, "smoothing", smoothing, ("uniform", "others"))
        check_choice(op, "all_ignored", all_ignored, ("nan", "zero"))
        label_smoothing, z_loss, ignore_index = map(scalar, (label_smoothing, z_loss, ignore_index))
        if isinstance(ignore_index, (Tensor, numpy.ndarray)) and ignore_index.dtype not in (torch.bool, bool):
            # Of one integer, as torch takes it.
            with contextlib.suppress(TypeError):
                ignore_index = operator.index(ignore_index)
        check_number(op, "label_smoothing", label_smoothing, 0, 1)
        check_number(op, "z_loss", z_loss, 0, sys.float_info.max)
        if not is_int(ignore_index, (numbers.Integral, torch.SymInt)):
            raise TypeError(f"{op}: ignore_index must be an int, got {type(ignore_index).__name__}")
        if isinstance(ignore_index, int) and not -(2**63) <= ignore_index < 2**63:
            raise ArgumentError(f"{op}: ignore_index must fit into 64 bits, got {ignore_index}")
        return cls(
            _REDUCTIONS[reduction],
            ignore_index if isinstance(ignore_index, (int, torch.SymInt)) else int(ignore_index),
            label_smoothing if isinstance(label_smoothing, (float, int)) else float(label_smoothing),
            smoothing == "others",
            z_loss if isinstance(z_loss, (float, int)) else float(z_loss),
            all_ignored == "zero",
            loss_dtype,
        )

    def of_row(self) -> tuple[int, float, bool, float]:
        """The options of a row, without those of the reduction: what `cross_entropy_` takes."""
        return cast(tuple[int, float, bool, float], self[_OF_ROW])

    def are_torchs(self) -> bool:
        """Whether torch's function has them, too."""
        return not ((self.others and self.label_smoothing) or self.z_loss or self.all_ignored_zero)

    def mix_and_base(self, classes: int) -> tuple[float, float]:
        """(mix, base) of q = weight * (mix * target + base), as csrc/cross_entropy/cross_entropy_math.h."""
        eps = self.label_smoothing
        base = 0.0 if eps == 0 else eps / (classes - 1 if self.others else classes)
        return 1 - eps - (base if self.others else 0.0), base

    def smoothed(self, targets: Tensor, weight: Tensor | None) -> Tensor:
        """q of targets (N, C, ...): smoothed and weighted."""
        k = targets.shape[1]
        mix, base = self.mix_and_base(k)
        q = mix * targets + base
        return q if weight is None else q * weight.to(q.dtype).view(1, k, *(1,) * (targets.dim() - 2))

    def with_penalty(self, loss: Tensor, lse: Tensor) -> Tensor:
        """The losses of rows and what the options add to them: z_loss lse^2."""
        # Not for 0, which times a square that overflows would be NaN.
        return loss + self.z_loss * lse**2 if self.z_loss else loss

    def pull(self, lse: Tensor) -> Tensor:
        """The derivative of the penalty with respect to lse, a factor of each p_c: 2 z_loss lse."""
        return 2 * self.z_loss * lse if self.z_loss else torch.zeros_like(lse)


_OF_ROW = slice(LossOptions._fields.index("ignore_index"), LossOptions._fields.index("all_ignored_zero"))

# What the schemas say of LossOptions.of_row(), where a type has the same name as in Python. The sharded
# operators have no defaults. The others have them, because the weight before the options may be left out, and
# what follows a default must have one.
ROW_OPTIONS, ROW_OPTIONS_WITH_DEFAULTS = (
    ", ".join(
        f"{type(default).__name__} {name}" + (f"={default}" if with_defaults else "")
        for name, default in tuple(LossOptions._field_defaults.items())[_OF_ROW]
    )
    for with_defaults in (False, True)
)


def statistics_dtype(input: Tensor) -> torch.dtype:
    """The dtype in which a row is computed."""
    return torch.float64 if input.dtype == torch.float64 else torch.float32


def rows_of(input: Tensor) -> int:
    """Number of rows, that is of class distributions, in (N, C, ...)."""
    return input.numel() // max(input.shape[1], 1)


# ---- the definition in plain torch: what the operators do on a device without a kernel


class _Softmax(NamedTuple):
    """What a row has, classes in dimension 1 of each."""

    log_sum: Tensor  # (N, 1, ...), log of sum_c exp(x_c - top)
    lse: Tensor  # (N, 1, ...)
    p: Tensor  # (N, C, ...)
    missing: Tensor  # (N, C, ...), 1 - p, also where p is nearly 1


def _softmax(x: Tensor) -> tuple[Tensor, _Softmax]:
    """(x_c - top, the softmax). One largest logit stays out of the sum: where it has nearly all the mass, its
    1 would swallow the last digits of the others', which are the whole loss."""
    top, at = x.max(1, keepdim=True)
    shifted = x - top
    e = shifted.exp()
    rest = e.scatter(1, at, 0).sum(1, keepdim=True)
    rest = torch.where(top.isinf(), torch.nan, rest)  # inf - inf
    log_sum, total = rest.log1p(), 1 + rest
    return shifted, _Softmax(log_sum, top + log_sum, e / total, (rest + (1 - e)) / total)


def _row_losses(x: Tensor, q: Tensor, options: LossOptions) -> tuple[Tensor, _Softmax]:
    """(sum_c q_c (lse - x_c) + z_loss lse^2 of each row, the softmax). A class with q_c = 0 may be -inf."""
    shifted, softmax = _softmax(x)
    distance = softmax.log_sum - shifted
    distance = torch.where((q == 0) & (distance == torch.inf), 0, distance)
    return options.with_penalty((q * distance).sum(1), softmax.lse.squeeze(1)), softmax


class _Targets(NamedTuple):
    one_hot: Tensor  # (N, C, ...), or the probabilities
    kept: Tensor  # (N, 1, ...), bool: rows that count
    valid: Tensor  # (N, 1, ...), bool: rows whose class index is ignore_index or in range
    normaliser: Tensor  # of a mean


def _read_targets(
    target: Tensor, weight: Tensor | None, ignore_index: int, shape: torch.Size, dtype: torch.dtype
) -> _Targets:
    """What `target` says of logits of `shape`, without a look at its values."""
    rows = (shape[0], 1, *shape[2:])
    if target.is_floating_point():
        count = rows_of(target)
        all_rows = torch.ones(rows, dtype=torch.bool, device=target.device)
        return _Targets(target.to(dtype), all_rows, all_rows, target.new_full((), count, dtype=dtype))
    index = target.unsqueeze(1)
    kept, in_range = index != ignore_index, (index >= 0) & (index < shape[1])
    index = index.where(in_range, 0)
    # Not in place: under torch.func.vmap the classes are many, and what they are put into is one.
    one_hot = torch.zeros(shape, dtype=dtype, device=target.device).scatter(1, index, 1.0)
    each = kept.to(dtype)
    if weight is not None:
        each = torch.where(kept & in_range, weight.to(dtype)[index], 0)
    return _Targets(one_hot, kept, in_range | ~kept, each.sum())


def _rows(
    input: Tensor, targets: _Targets, weight: Tensor | None, options: LossOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, its gradient, lse) of each row: (N, ...), (N, C, ...), (N, ...).

    gradient_c = (sum q + 2 z_loss lse) p_c - q_c, taken from what the other classes have where p_c is nearly
    1: the difference would lose their digits.
    """
    q = options.smoothed(targets.one_hot, weight)
    x = input.to(q.dtype)
    loss, softmax = _row_losses(x, q, options)
    q_sum, p, missing = q.sum(1, keepdim=True), softmax.p, softmax.missing
    gradient = torch.where(p < 0.5, q_sum * p - q, (q_sum - q) - q_sum * missing)
    gradient = gradient + options.pull(softmax.lse) * p
    gradient = torch.where(targets.valid, gradient, torch.nan).where(targets.kept, 0)
    kept, valid = targets.kept.squeeze(1), targets.valid.squeeze(1)
    loss = torch.where(valid, loss, torch.nan).where(kept, 0)
    return loss, gradient, softmax.lse.squeeze(1).where(kept, 0)


def _plain(
    input: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions, with_grad: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, d loss / d input or nothing, lse) of the operator `cross_entropy`.

    A class index out of range makes its row NaN, as on CUDA: raising would mean waiting for the device.
    """
    targets = _read_targets(target, weight, options.ignore_index, input.shape, statistics_dtype(input))
    loss, gradient, lse = _rows(input, targets, weight, options)
    if options.reduction == 1:
        loss, gradient = loss.sum() / targets.normaliser, gradient / targets.normaliser
        if options.all_ignored_zero:
            loss = torch.where(targets.normaliser == 0, 0, loss)
            gradient = torch.where(targets.normaliser == 0, 0, gradient)
        gradient = torch.where(targets.kept, gradient, 0)
    elif options.reduction == 2:
        loss = loss.sum()
    grad = empty_grad(input, with_grad)
    if with_grad:
        grad.copy_(flush(gradient))
    return loss.to(options.loss_dtype or input.dtype), grad, lse.reshape(-1)


def empty_grad(input: Tensor, with_grad: bool) -> Tensor:
    """A float16 gradient is kept in float32: its small values would vanish before a loss scale could lift
    them."""
    if not with_grad:
        return input.new_empty((0,))
    if input.dtype == torch.float16:
        return input.new_empty(input.shape, dtype=torch.float32)
    return torch.empty_like(input)


def _fake(
    input: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions, with_grad: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    rows = (input.shape[0], *input.shape[2:])
    numel = 1
    for size in rows:
        numel = numel * size
    loss = input.new_empty(rows if options.reduction == 0 else (), dtype=options.loss_dtype or input.dtype)
    return loss, empty_grad(input, with_grad), input.new_empty((numel,), dtype=statistics_dtype(input))


def _with_options(function):
    """`function` with the operator's arguments, whose options come one after another."""

    def operator(input, target, weight=None, *rest):
        count = len(LossOptions._fields)
        return function(input, target, weight, LossOptions(*rest[:count]), *rest[count:])

    return operator


def plain_rows_(
    logits: Tensor, target: Tensor, factor: Tensor, weight: Tensor | None = None, *of_row: Any
) -> Tensor:
    """The operator `cross_entropy_`: overwrites each row of the logits, (rows, classes), with factor * its
    gradient; gives the losses of the rows."""
    options = LossOptions(0, *of_row)
    targets = _read_targets(target, weight, options.ignore_index, logits.shape, statistics_dtype(logits))
    loss, gradient, _ = _rows(logits, targets, weight, options)
    logits.copy_(flush(torch.where(targets.kept, gradient * factor.unsqueeze(1), 0)))
    return loss


def _plain_scale_(values: Tensor, factor: Tensor) -> None:
    dtype = statistics_dtype(values)
    product = values.to(dtype) * factor.reshape(()).to(dtype)
    values.copy_(flush(torch.where(flush(values) == 0, 0, product)))


# ---- the operators

# grad is d loss / d input: of the reduced loss, or of each element's own loss; empty unless with_grad.
define(
    "cross_entropy(Tensor input, Tensor target, Tensor? weight=None, int reduction=1, "
    f"{ROW_OPTIONS_WITH_DEFAULTS}, bool all_ignored_zero=False, ScalarType? loss_dtype=None, "
    "bool with_grad=False) -> (Tensor loss, Tensor grad, Tensor lse)",
    plain=_with_options(_plain),
)
torch.library.register_fake("fastreg::cross_entropy", _with_options(_fake), allow_override=True)
# values *= factor, where 0 stays 0 and what falls below the normal numbers becomes 0. The kernel looks at the
# factor and moves nothing if it is 1.
define("cross_entropy_scale_(Tensor(a!) values, Tensor factor) -> ()", plain=_plain_scale_)


@torch.library.register_fake("fastreg::cross_entropy_scale_", allow_override=True)
def _(values, factor):
    return None


_cross_entropy = torch.ops.fastreg.cross_entropy.default
_cross_entropy_scale_ = torch.ops.fastreg.cross_entropy_scale_.default
_keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph


class _CrossEntropy(torch.autograd.Function):
    """The loss, and as a second output its gradient G with respect to the input.

    G is all that is saved, so that memory for backward is one tensor like the logits and those need not be
    kept alive. That G is an output of this node, not a private buffer, is what makes double backward work:
    differentiating g * G reaches this node again with a gradient for G, and the softmax that the Hessian
    needs is in G itself. The Hessian reads lse too, with z_loss, so that one is an output as well:
    derivatives of any order are right.
    """

    @staticmethod
    def forward(ctx, input, target, weight, *options):
        loss, grad, lse = _cross_entropy(input, target, weight, *options, True)
        ctx.options, ctx.dtype = options, input.dtype
        ctx.save_for_backward(grad, lse, target, weight)
        ctx.set_materialize_grads(False)
        return loss, grad, lse

    @staticmethod
    def backward(ctx, g_loss, g_grad, g_lse):
        grad, lse, target, weight = ctx.saved_tensors
        result = None
        # The second derivative comes first: it reads G, which `scaled` may overwrite.
        if g_grad is not None or g_lse is not None:
            result = _second_order(g_grad, g_lse, grad, lse, target, weight, ctx.options)
        if g_loss is not None:
            kept = counted(target, ctx.options[1])
            first = scaled(grad, g_loss.unsqueeze(1) if ctx.options[0] == 0 else g_loss, kept)
            result = first if result is None else first + result
        return (None if result is None else result.to(ctx.dtype)), *(None,) * (2 + len(ctx.options))


def counted(target: Tensor, ignore_index: int) -> Tensor | None:
    """Which rows count, (N, 1, ...), or None where all do: of probabilities, none can be ignored."""
    return None if target.is_floating_point() else (target != ignore_index).unsqueeze(1)


def scaled(gradient: Tensor, g: Tensor, kept: Tensor | None = None) -> Tensor:
    """gradient * g, with g in its own dtype: rounded to bfloat16 it would put the whole gradient off.

    kept: which rows count, (N, 1, ...), or None for all. With no counted row the mean divides by 0 and g is
    inf or NaN; ignored rows still get 0.

    If nothing else reads the gradient it is scaled in place, and the usual loss.backward(), with a g of 1,
    costs no pass over it.
    """
    if (
        not is_compiling()
        and type(g) is torch.Tensor
        and g.numel() == 1
        and not is_wrapped(g)  # several at once: none can be looked at
        and torch._C._get_dispatch_mode(_PROXY) is None  # make_fx would record this number
        and not torch.is_grad_enabled()
        and not _keeps_graph()
        # The kernel reads g, because reading one on a GPU here would wait for it.
        and (g.device.type == "cuda" or (g.device.type == "cpu" and g.isfinite()))
    ):
        gradient = gradient.detach()
        _cross_entropy_scale_(gradient, g)
        return gradient
    if kept is not None:
        g = torch.where(kept, g, 0)
    product = gradient * g
    if gradient.dtype == torch.float64:
        return product
    # A literal: Dynamo would make a number of the module an input, which it cannot give to a backward pass.
    return torch.where(product.abs() < 2.0**-126, 0.0, product)


def _second_order(
    v: Tensor | None,
    u: Tensor | None,
    grad: Tensor,
    lse: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: tuple,
) -> Tensor:
    """d (<v, G> + <u, lse>) / d input for G = s (b p - q), b = sum q + 2 z lse, with p taken from G.

    It is s b p (v - <p, v>) + 2 z s p <p, v> + p u. The pull 2 z lse is linear in lse, so that its derivative
    times <p, v> is the pull of <p, v>. Here v and u are the gradients for G and lse, s is what a row counts
    in the loss, 0 if ignored, and z is z_loss. p is (G / s + q) / b; where s or b is 0 the row gives 0.
    options: those of LossOptions, in order.
    """
    o, dtype = LossOptions(*options), statistics_dtype(grad)
    grad = grad.to(dtype)
    targets = _read_targets(target, weight, o.ignore_index, grad.shape, dtype)
    q = o.smoothed(targets.one_hot, weight)
    s = targets.kept.to(dtype)
    if o.reduction == 1:
        s = torch.where(targets.kept, s / targets.normaliser, 0)
        if o.all_ignored_zero:  # the loss is 0 whatever the logits are
            s = torch.where(targets.normaliser == 0, 0, s)
    lse = lse.to(dtype).view(s.shape)
    b = q.sum(1, keepdim=True) + o.pull(lse)
    safe = (s != 0) & (b != 0)
    p = torch.where(safe, (grad / s.where(safe, 1) + q) / b.where(safe, 1), 0)
    result = torch.zeros_like(p)
    if v is not None:
        v = v.to(dtype)
        pv = (p * v).sum(1, keepdim=True)
        result = s.where(safe, 0) * p * (b * (v - pv) + o.pull(pv))
    if u is not None:
        result = result + p * u.to(dtype).view(s.shape)
    return result


def check_classes(
    op: str,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: LossOptions,
    *,
    classes: int,
    expected: tuple[torch.Size, torch.Size],
    name: str = "input",
    weight_name: str = "weight",
) -> tuple[Tensor, Tensor | None]:
    """Raise unless the targets and class weights fit `input` and the options; return both as the kernel takes
    them.

    expected: the shapes of a target of class indices and of one of probabilities. name, weight_name: what the
    caller's user knows `input` and `weight` by.
    """
    check_dtype(op, name, input)
    check_dense(op, name, input)
    check_dense(op, "target", target)
    if options.loss_dtype not in (None, input.dtype, torch.float32, torch.float64):
        raise ArgumentError(
            f"{op}: loss_dtype must be torch.float32, torch.float64 or {name}'s {input.dtype}, got "
            f"{options.loss_dtype}"
        )
    target = _checked_target(op, input, target, options, classes, expected, name)
    if weight is not None:
        weight = _checked_weight(op, input, weight, classes, name, weight_name)
    return target, weight


def _checked_target(
    op: str, input: Tensor, target: Tensor, options: LossOptions, classes: int,
    expected: tuple[torch.Size, torch.Size], name: str,
) -> Tensor:  # fmt: skip
    """Class indices as contiguous int64, or the probabilities as they are."""
    if target.device != input.device:
        raise ArgumentError(
            f"{op}: target must be on {input.device} as {name} is, got {target.device}; move it with "
            f".to({name}.device)"
        )
    if target.dtype == torch.bool or target.is_complex():
        raise ArgumentTypeError(
            f"{op}: target must be class indices (int64) or probabilities, got {target.dtype}"
        )
    soft = target.is_floating_point()
    wanted = expected[1 if soft else 0]  # Dynamo of torch 2.10 and 2.11 takes no bool for an index
    if target.shape != wanted:
        remedy = (
            f"class indices must be int64 of shape {tuple(expected[0])}, convert them with .long()"
            if soft
            else "probabilities must be floating point"
        )
        raise ArgumentError(
            f"{op}: target must have shape {tuple(wanted)} for {name} of shape {tuple(input.shape)}, "
            f"got {tuple(target.shape)}; {remedy}"
        )
    if classes == 0:
        raise ClassIndexError(
            f"{op}: there must be at least one class, got {name} of shape {tuple(input.shape)}"
        )
    if options.others and options.label_smoothing > 0 and classes == 1:
        raise ArgumentError(
            f"{op}: smoothing='others' needs at least two classes, got {name} of shape {tuple(input.shape)}"
        )
    if soft:
        check_dtype(op, "probabilities", target)
        if options.ignore_index >= 0:
            raise ArgumentError(
                f"{op}: ignore_index must be negative with a target of probabilities, got "
                f"{options.ignore_index}"
            )
        return target
    return target.to(torch.int64).contiguous()


def _checked_weight(
    op: str, input: Tensor, weight: Tensor, classes: int, name: str, weight_name: str
) -> Tensor:
    """Class weights, contiguous and in the dtype of the statistics."""
    check_tensor(op, weight_name, weight)
    check_dense(op, weight_name, weight)
    if not weight.is_floating_point():
        raise ArgumentTypeError(
            f"{op}: {weight_name} must be floating point, got {weight.dtype}; convert it with .float()"
        )
    check_constant(op, weight_name, weight)
    if weight.shape != (classes,):
        raise ArgumentError(
            f"{op}: {weight_name} must have one value per class, shape ({classes},), got "
            f"{tuple(weight.shape)}"
        )
    if weight.device != input.device:
        raise ArgumentError(
            f"{op}: {weight_name} must be on {input.device} as {name} is, got {weight.device}"
        )
    return weight.detach().to(statistics_dtype(input)).contiguous()


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
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
) -> Tensor:
    """Cross-entropy between logits and classes or class probabilities; drop-in for
    `torch.nn.functional.cross_entropy`.

    Args:
        input: logits, (C,), (N, C) or (N, C, d1, ...); float32, float64, float16 or bfloat16, any strides.
            Never modified.
        target: class indices of shape (), (N,) or (N, d1, ...), an integer dtype; or probabilities of the
            shape of `input`.
        weight: a weight per class, (C,); no gradient flows to it.
        size_average, reduce: deprecated in torch; still understood.
        ignore_index: rows with this class index count for nothing; class indices only.
        reduction: "none", "mean" (over the weights of the targets, as torch; over rows for probabilities) or
            "sum".
        label_smoothing: eps in [0, 1], the mass moved off the target.
        smoothing: where it goes. "uniform": eps / k on every class, the target too (torch). "others": eps /
            (k - 1) on each other class, 1 - eps on the target.
        z_loss: factor of lse^2, added to each counted row's loss before the reduction; keeps logits from
            drifting.
        all_ignored: the mean over no row at all: "nan" (torch) or "zero".
        loss_dtype: dtype of the loss; by default torch's, that of `input`, promoted by the dtypes of
            probabilities and of their class weights (float32 under autocast). torch.float32 gives it
            unrounded.

    Returns:
        The loss, () or, with reduction "none", of the shape of `input` without its classes. Statistics are
        float32 (float64 for float64) whatever the input's dtype. A -inf logit of a class with no target mass,
        by weight 0, probability 0 or no smoothing, gives a finite loss. Saved for backward: the gradient, one
        tensor like `input` (float32 for float16). Twice differentiable in `input`. Gradients below 2^-126,
        with which the matrix products that follow would take many times as long, are 0 (except in float64).

    Raises:
        ValueError: class index out of range (on CUDA, where looking at it would mean waiting for the GPU, the
            loss and the gradient of its row are NaN instead), shapes or devices that do not fit,
            label_smoothing outside [0, 1], an unknown `reduction`, `smoothing` or `all_ignored`,
            `ignore_index` >= 0 with probabilities, a weight that requires a gradient, a dtype without
            kernels.
        TypeError: `input`, `target` or `weight` is no tensor, `target` is bool or complex, `weight` is not
            floating point, an option is no number.

    Where torch raises an IndexError (a class index out of range) or a RuntimeError, these errors are of that
    type, too. A number may be a tensor without dimensions or a scalar of NumPy.

    Source: Szegedy et al. 2016 ("uniform"); Goodfellow et al. 2016, section 7.5.1 ("others"); z_loss: de
    Brebisson and Vincent 2016, Chowdhery et al. 2022.
    """
    # The usual case, in C++. It gives None for what it does not take: the checks below then convert that, or
    # refuse it with the reason, so that the options are checked once on either path.
    if fast is not None and not is_compiling():
        try:
            loss = fast.cross_entropy(
                input,
                target,
                weight,
                size_average,
                ignore_index,
                reduce,
                reduction,
                label_smoothing,
                smoothing,
                z_loss,
                all_ignored,
                loss_dtype,
            )
        except ValueError:  # Python's errors, which follow, are of torch's types, too
            loss = None
        if loss is not None:
            return loss
    if is_foreign(input, target, weight):
        return handed_over(cross_entropy, locals())
    # The options.
    op = "cross_entropy"
    check_tensor(op, "input", input)
    check_tensor(op, "target", target)
    if size_average is not None or reduce is not None:
        reduction = cast(Reduction, torch.nn._reduction.legacy_get_string(size_average, reduce))
    elif reduction == "elementwise_mean":
        torch.nn._reduction.get_enum(reduction)  # warns
    if loss_dtype is None:
        loss_dtype = promoted_dtype(
            input.dtype, target, weight, autocast_dtype(input.device.type) is not None
        )
    options = LossOptions.checked(
        op,
        reduction=reduction,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        smoothing=smoothing,
        z_loss=z_loss,
        all_ignored=all_ignored,
        loss_dtype=loss_dtype,
    )
    # The tensors, and DTensors apart from plain ones.
    if input.dim() == 0:
        raise ArgumentError(
            f"{op}: input must be (C,), (N, C) or (N, C, ...), got a tensor without dimensions"
        )
    unbatched = input.dim() == 1
    expected = input.shape[: 0 if unbatched else 1] + input.shape[2:], input.shape
    target, weight = check_classes(
        op,
        input,
        target,
        weight,
        options,
        classes=input.shape[0 if unbatched else 1],
        expected=expected,
    )
    if has_transformed_parts(input, target, weight):
        return loss_by_torch(op, input, target, weight, options)
    if any(map(is_sharded, (input, target, weight))):
        from ._placed_cross_entropy import loss_of_dtensors

        return loss_of_dtensors(op, input, target, weight, options)
    # The operator takes (N, C) or (N, C, d).
    soft = target.is_floating_point()
    if unbatched:
        input, target = input.unsqueeze(0), target.unsqueeze(0)
    if input.dim() > 3:  # rows side by side as one dimension; a copy only where strides forbid a view
        shape = target.shape[:1] + target.shape[2 if soft else 1 :]
        input = input.flatten(2)
        target = target.flatten(2) if soft else target.flatten(1)
    else:
        shape = None

    if is_compiling():
        loss = loss_of(input, target, weight, options)
    else:
        try:
            loss = loss_of(input, target, weight, options)
        except ValueError as error:  # the kernel's, which knows no IndexError
            raise class_index_error(op, target, options.ignore_index, input.shape[1]) or error from None
    if reduction == "none":
        if unbatched:
            return loss.squeeze(0)
        if shape is not None:
            return loss.view(shape)
    return loss


def loss_of(input: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions) -> Tensor:
    """The loss of arguments that are checked, with as much of autograd as they ask for."""
    if is_transformed() or (torch.is_grad_enabled() and target.requires_grad):
        return _composed(input, target, weight, options)
    if torch.is_grad_enabled() and input.requires_grad:
        return _CrossEntropy.apply(input, target, weight, *options)[0]
    return _cross_entropy(input, target, weight, *options)[0]


def loss_by_torch(
    op: str, input: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions
) -> Tensor:
    """The loss by torch's function, which knows transforms of DTensors as far as torch does."""
    if not options.are_torchs():
        raise ArgumentTypeError(
            f"{op}: DTensors under torch.func and in forward mode have torch's loss alone, got an option "
            f"that torch has not; leave it out, or use .backward()"
        )
    for name, tensor in (("input", input), ("target", target), ("weight", weight)):
        if tensor is not None and not is_sharded_below(tensor):
            raise ArgumentTypeError(
                f"{op}: under torch.func and in forward mode all must be DTensors, got a plain {name}; make "
                f"it one with torch.distributed.tensor.distribute_tensor"
            )
    wide, soft = statistics_dtype(input), target.is_floating_point()
    loss = torch.nn.functional.cross_entropy(
        input.to(wide),
        target.to(wide) if soft else target,
        weight,
        ignore_index=options.ignore_index,
        reduction=list(_REDUCTIONS)[options.reduction],
        label_smoothing=options.label_smoothing,
    )
    return loss.to(options.loss_dtype or input.dtype)


def promoted_dtype(input: torch.dtype, target: Tensor, weight: Tensor | None, autocast: bool) -> torch.dtype:
    """The dtype that torch gives the loss: that of the logits, promoted by those of probabilities and of
    their class weights; float32 for narrower ones under autocast.
    """
    dtypes = [input]
    if input not in DTYPES:  # which is refused soon
        return input
    if target.is_floating_point():
        dtypes += [t.dtype for t in (target, weight) if isinstance(t, Tensor) and t.dtype in DTYPES]
    if autocast:
        dtypes = [torch.promote_types(dtype, torch.float32) for dtype in dtypes]
    return functools.reduce(torch.promote_types, dtypes)


def is_torchs(input: Any, target: Any, weight: Any) -> bool:
    """Whether torch's cross-entropy refuses the dtypes of class indices or of their weights, which ours
    takes: torch has no indices of 32 bits, and wants the weights to be of the dtype of the logits.
    """
    tensors = [t for t in (input, target, weight) if isinstance(t, Tensor)]
    if len(tensors) < 2 + (weight is not None) or target.is_floating_point():
        return False
    if target.dtype not in (torch.int64, torch.uint8):
        return True
    if weight is None or weight.dtype == input.dtype:
        return False
    autocast = autocast_dtype(input.device.type) is not None
    dtypes = {torch.promote_types(t.dtype, torch.float32) if autocast else t.dtype for t in (input, weight)}
    return len(dtypes) > 1


def class_index_error(
    op: str, target: Tensor, ignore_index: int, classes: int, first: int = 0, where: str = ""
) -> ClassIndexError | None:
    """The error for the first class index out of range, in the kernel's words; None where there is none, or
    where looking for it would mean waiting for a GPU. first: the number of the first element; where: whose
    they are, for the end of the sentence.
    """
    if target.device.type != "cpu" or target.is_floating_point():
        return None
    wrong = ((target < 0) | (target >= classes)) & (target != ignore_index)
    if not wrong.any():
        return None
    at = int(wrong.flatten().to(torch.uint8).argmax())
    return ClassIndexError(
        f"{op}: target must be in [0, {classes}) or ignore_index {ignore_index}, got "
        f"{int(target.flatten()[at])} at element {first + at}{where}"
    )


def check_indices(op: str, target: Tensor, ignore_index: int, classes: int, where: str = "") -> None:
    """Raise for a class index out of range where its values can be looked at. where: as in
    `class_index_error`.
    """
    if not is_hidden():
        error = class_index_error(op, target, ignore_index, classes, where=where)
        if error is not None:
            raise error


def _composed(input: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions) -> Tensor:
    """The same loss in torch's operators, which have derivatives of every kind and batching rules: for
    transforms, and for a target that wants a gradient itself, as of a teacher that learns.
    """
    check_indices("cross_entropy", target, options.ignore_index, input.shape[1])
    targets = _read_targets(target, weight, options.ignore_index, input.shape, statistics_dtype(input))
    q = options.smoothed(targets.one_hot, weight)
    loss, _ = _row_losses(input.to(q.dtype), q, options)
    kept, valid = targets.kept.squeeze(1), targets.valid.squeeze(1)
    loss = torch.where(valid, loss, torch.nan).where(kept, 0)
    if options.reduction:
        loss = loss.sum()
    if options.reduction == 1:
        if options.all_ignored_zero:
            empty = targets.normaliser == 0
            loss = torch.where(empty, 0, loss / targets.normaliser.where(~empty, 1))
        else:
            loss = loss / targets.normaliser
    return loss.to(options.loss_dtype or input.dtype)
