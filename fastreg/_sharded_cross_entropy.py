"""Cross-entropy of logits whose classes are split over ranks: one gather of four numbers a row, nothing else.

The loss is that of `_cross_entropy`, over the whole vocabulary. Of its own classes each rank computes, for
each row, in float32 (float64 for float64):

    top = max x,  rest = sum_c exp(x_c - top) - 1,  and two sums of w_c (x_c - top), by kind of target

All ranks gather them and put them together in the order of the ranks, hence with the same bits:

    M = max top,  rest = rest_M + sum_r (1 + rest_r) exp(top_r - M),  lse = M + log1p(rest)

The 1 of the largest logit stays out of the sum, and no sum is over logits that are not centred: half of a
vocabulary 10^4 below the other half costs no digits (online softmax: Milakov and Gimelshein 2018; over ranks:
Shoeybi et al. 2019, whose three messages these are in one). The gradient is local, and written while the rank
waits for nobody.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch import distributed as dist
from torch.compiler import is_compiling

from ._checks import ArgumentError, UnsupportedError, check_constant, check_count, check_tensor
from ._cross_entropy import (
    ROW_OPTIONS,
    AllIgnored,
    LossOptions,
    Reduction,
    Smoothing,
    check_classes,
    class_index_error,
    counted,
    empty_grad,
    promoted_dtype,
    scaled,
    statistics_dtype,
)
from ._linear_cross_entropy import (
    by_chunks,
    empty_results,
    factor_of_sum,
    finished,
    layer_and_options,
    row_factor,
    weighted_sum,
)
from ._ranks import process_group, raise_the_first
from ._registry import define, define_kernel
from ._subnormal import flush
from ._transforms import autocast_dtype, is_sharded, is_transformed, may_look

# What a rank sends of a row in place of the distance of the target, which is at most 0, and of 1 + the
# weights of its classes: the class is out of range, the row does not count.
_OUTSIDE, _IGNORED = torch.inf, 0.5
# What stands for a class index of the whole in place of one of this rank's.
_ELSEWHERE, _UNCOUNTED = -1, -2


class _Shard(NamedTuple):
    """The classes [first, first + held) of `classes`, which this rank has; `group` has them all."""

    group: str
    first: int
    held: int
    classes: int


class _Whole(NamedTuple):
    """What all of them together say of each row; (rows,) each."""

    loss: Tensor
    top: Tensor
    rest: Tensor  # sum_c exp(x_c - top) - 1
    mass: Tensor  # sum of the targets
    pull: Tensor  # what the penalty adds to each p_c in the gradient
    owners: Tensor  # how many ranks say that the target is among their classes
    outside: Tensor  # bool: some rank has a class out of range there
    apart: Tensor  # bool: some ranks ignore the row and others do not


class _Targets(NamedTuple):
    """The targets of rows, and their q_c = weight_c (mix t_c + base) in the classes of this rank."""

    # (rows,), the class among this rank's, _ELSEWHERE or _UNCOUNTED; or probabilities, (rows, held)
    here: Tensor
    kept: Tensor  # (rows,), bool
    outside: Tensor  # (rows,), bool: the target is none of the classes
    weight: Tensor | None  # (held,)
    mix: float
    base: float
    total: Tensor  # (), the weights of all classes
    local: Tensor  # (), those of this rank's
    own: Tensor  # (rows,), what only the target's class has; this and the next two are 0 for probabilities
    others: Tensor  # (rows,), the sum of q without the target's class
    mass: Tensor  # (rows,), the sum of q

    @property
    def soft(self) -> bool:
        return self.here.is_floating_point()


def _read_targets(
    target: Tensor, weight: Tensor | None, options: LossOptions, shard: _Shard, dtype: torch.dtype
) -> _Targets:
    k = shard.classes
    mix, base = options.mix_and_base(k)
    if weight is None:
        own_weight = None
        total, local = (target.new_full((), count, dtype=dtype) for count in (k, shard.held))
    else:
        weight = weight.to(dtype)
        own_weight = weight[shard.first : shard.first + shard.held]
        total, local = weight.sum(), own_weight.sum()
    if target.is_floating_point():
        kept = torch.ones(len(target), dtype=torch.bool, device=target.device)
        zero = target.new_zeros(len(target), dtype=dtype)
        here = target[:, : shard.held]
        return _Targets(here, kept, ~kept, own_weight, mix, base, total, local, zero, zero, zero)
    kept, column = target != options.ignore_index, target - shard.first
    outside = kept & ((target < 0) | (target >= k))
    here = column.where((column >= 0) & (column < shard.held), _ELSEWHERE).where(kept, _UNCOUNTED)
    of_target = torch.ones_like(target, dtype=dtype) if weight is None else weight[target.clamp(0, k - 1)]
    others = base * (total - of_target)
    own, mass = mix * of_target, others + (mix + base) * of_target
    return _Targets(here, kept, outside, own_weight, mix, base, total, local, own, others, mass)


# ---- what a rank computes of its own classes: csrc/cross_entropy/cross_entropy_sharded.h in plain torch


def _plain_q(x: Tensor, target: Tensor, weight: Tensor | None, mix: float, base: float) -> Tensor:
    """q of this rank's classes, of the shape of x."""
    if target.is_floating_point():
        t = target.to(x.dtype)
    else:
        here = target.clamp(min=0).unsqueeze(1)
        t = torch.zeros_like(x).scatter_(1, here, (target >= 0).to(x.dtype).unsqueeze(1))
    q = mix * t + base
    return q if weight is None else q * weight


def sharded_sums_plain(
    logits: Tensor, target: Tensor, weight: Tensor | None, mix: float, base: float
) -> Tensor:
    """The operator `cross_entropy_sharded_sums`: (4, rows), what is sent of logits (rows, classes)."""
    x = logits.to(statistics_dtype(logits))
    top, at = x.max(1)
    shifted = x - torch.where(top == -torch.inf, 0, top).unsqueeze(1)
    rest = shifted.exp().scatter_(1, at.unsqueeze(1), 0).sum(1)
    rest = torch.where((top == torch.inf) | top.isnan(), torch.nan, rest)  # the scatter has hidden it
    soft = target.is_floating_point()
    # Without a mass the target is left out: it may be -inf.
    q = _plain_q(x, target, weight, mix if soft or mix + base == 0 else 0.0, base)
    dot = torch.where(q == 0, 0, q * shifted).sum(1)
    if soft:
        return torch.stack((top, rest, dot, q.sum(1)))
    distance = shifted.gather(1, target.clamp(min=0).unsqueeze(1)).squeeze(1)
    distance = distance.where((target >= 0) & (mix + base != 0), 0)
    return torch.stack((top, rest, distance, dot)).masked_fill_(target == _UNCOUNTED, 0)


def sharded_grad_plain_(
    grad: Tensor, logits: Tensor, target: Tensor, weight: Tensor | None, whole: Tensor, mix: float,
    base: float,
) -> None:  # fmt: skip
    """The operator `cross_entropy_sharded_grad_`: factor * (mass p_c - q_c + pull p_c) into grad, which may
    be the logits. whole: (6, rows), top, rest, mass, others, pull and factor.

    Where p is nearly 1, mass p - q is taken from what the other classes hold: the difference would lose their
    digits.
    """
    x = logits.to(whole.dtype)
    top, rest, mass, others, pull, factor = whole.unsqueeze(2)
    e, total = (x - top).exp(), 1 + rest
    p, missing = e / total, (rest + (1 - e)) / total
    q = _plain_q(x, target, weight, mix, base)
    left = mass - q
    if not target.is_floating_point():
        is_target = torch.arange(x.shape[1], device=x.device) == target.unsqueeze(1)
        left = torch.where(is_target, others, left)
    gradient = factor * (torch.where(p < 0.5, mass * p - q, left - mass * missing) + pull * p)
    if not target.is_floating_point():  # NaN of a row that does not count is none of its gradient
        gradient = gradient.masked_fill(target.unsqueeze(1) == _UNCOUNTED, 0)
    grad.copy_(flush(gradient))


define(
    "cross_entropy_sharded_sums(Tensor logits, Tensor target, Tensor? weight, float mix, float base) -> "
    "Tensor",
    plain=sharded_sums_plain,
)
define(
    "cross_entropy_sharded_grad_(Tensor(a!) grad, Tensor logits, Tensor target, Tensor? weight, "
    "Tensor whole, float mix, float base) -> ()",
    plain=sharded_grad_plain_,
)


@torch.library.register_fake("fastreg::cross_entropy_sharded_sums", allow_override=True)
def _(logits, target, weight, mix, base):
    return logits.new_empty((4, logits.shape[0]), dtype=statistics_dtype(logits))


@torch.library.register_fake("fastreg::cross_entropy_sharded_grad_", allow_override=True)
def _(grad, logits, target, weight, whole, mix, base):
    return None


def _statistics(logits: Tensor, targets: _Targets) -> Tensor:
    """What this rank sends: (4, rows), the largest logit, the sum of exponentials, and two of the targets."""
    dtype = statistics_dtype(logits)
    if logits.shape[1] == 0:
        sums = logits.new_zeros((4, len(logits)), dtype=dtype)
        sums[0] = -torch.inf
    else:
        sums = torch.ops.fastreg.cross_entropy_sharded_sums.default(
            logits, targets.here, targets.weight, targets.mix, targets.base
        )
    if not targets.soft:
        # A rank that does not hold the target says so by a number above 0, 1 + the weights of its classes,
        # which the others need.
        distance = torch.where(targets.here >= 0, sums[2], 1 + targets.local)
        sums[2] = distance.masked_fill_(~targets.kept, _IGNORED).masked_fill_(targets.outside, _OUTSIDE)
    return sums


# ---- what the ranks find out together


def _together(gathered: Tensor, targets: _Targets, options: LossOptions) -> _Whole:
    """The statistics of all ranks, (ranks, 4, rows), in one."""
    top, rest, t, u = gathered.unbind(1)
    highest, winner = top.max(0)
    there = top != -torch.inf
    base, highest_base = top.where(there, 0), highest.where(highest != -torch.inf, 0)
    d = base - highest_base
    parts = torch.where(there, (1 + rest) * d.exp(), rest)  # 0, or NaN where a logit is
    whole_rest = parts.scatter(0, winner.unsqueeze(0), 0).sum(0)
    whole_rest = whole_rest + rest.gather(0, winner.unsqueeze(0)).squeeze(0)
    whole_rest = torch.where(highest.isinf(), torch.nan, whole_rest)  # inf - inf
    log_sum = whole_rest.log1p()
    lse = highest_base + log_sum
    if targets.soft:
        mass = u.sum(0)
        far = (t + torch.where(u == 0, 0, u * d)).sum(0)
        loss = torch.where(mass == 0, 0, mass * log_sum) - far
        owners = torch.ones_like(winner)
        outside = apart = torch.zeros_like(winner, dtype=torch.bool)
    else:
        ignored = t == _IGNORED
        outside, apart = (t == _OUTSIDE).any(0), ignored.any(0) != ignored.all(0)
        owner = ~(t > 0)
        weights = torch.where(owner, 0, t - 1)  # of the classes of each rank; the owner's is what is left
        weights = torch.where(owner, targets.total - weights.sum(0), weights)
        mass = targets.mass
        loss = mass * log_sum
        loss = loss - torch.where(targets.own == 0, 0, targets.own * torch.where(owner, t + d, 0).sum(0))
        if targets.base:
            loss = loss - (u + torch.where(weights == 0, 0, targets.base * weights * d)).sum(0)
        owners = owner.sum(0) + ignored.all(0)
    loss = options.with_penalty(loss, lse)
    loss, pull = loss.where(targets.kept, 0), options.pull(lse)
    return _Whole(loss, highest_base, whole_rest, mass, pull, owners, outside, apart)


def _gather(statistics: Tensor, group: str) -> Tensor:
    """The one message: (4, rows) of each rank, (ranks, 4, rows)."""
    process_group = _group_of(group)
    ranks = dist.get_world_size(process_group)
    gathered = statistics.new_empty((ranks, *statistics.shape))
    _all_gather(gathered.flatten(0, 1), statistics, group=process_group)
    return gathered


def _group_of(name: str) -> dist.ProcessGroup:
    return dist.distributed_c10d._resolve_process_group(cast(Any, name))


def _all_gather(out: Tensor, part: Tensor, group: dist.ProcessGroup) -> None:
    """torch 2.14 has a new name for it, and warns of the old one."""
    (getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor)(out, part, group=group)


def _rows_(
    logits: Tensor, target: Tensor, factor: Tensor, weight: Tensor | None, options: LossOptions,
    shard: _Shard, gradient: Tensor | None, first: int = 0,
) -> Tensor:  # fmt: skip
    """The losses of rows; into `gradient`, which may be `logits`, goes factor times theirs.

    logits: (rows, columns), of which those beyond shard.held are padding, with a gradient of 0. first: the
    number of the first row.
    """
    x = logits[:, : shard.held]
    targets = _read_targets(target, weight, options, shard, statistics_dtype(logits))
    whole = _together(_gather(_statistics(x, targets), shard.group), targets, options)
    wrong = whole.outside | whole.apart | (whole.owners != 1)  # what all ranks see alike
    if may_look(logits):
        if wrong.any():
            error = _why_wrong(target, options, shard, whole, wrong, first)
            raise_the_first(error, _group_of(shard.group))
    else:  # Raising would mean waiting for the device.
        whole = whole._replace(loss=torch.where(wrong, torch.nan, whole.loss))
        factor = torch.where(wrong, torch.nan, factor)
    if gradient is not None:
        if shard.held:
            torch.ops.fastreg.cross_entropy_sharded_grad_.default(
                gradient[:, : shard.held], x, targets.here, targets.weight,
                torch.stack((whole.top, whole.rest, whole.mass, targets.others, whole.pull, factor)),
                targets.mix, targets.base,
            )  # fmt: skip
        gradient[:, shard.held :].zero_()
    return whole.loss


def _why_wrong(
    target: Tensor, options: LossOptions, shard: _Shard, whole: _Whole, wrong: Tensor, first: int
) -> Exception | None:
    """What this rank has to say of rows that are wrong on some rank."""
    op = "distributed.cross_entropy"
    if whole.outside.any():
        where = f" of rank {dist.get_rank()}"
        return class_index_error(op, target, options.ignore_index, shard.classes, first, where)
    at = int(wrong.to(torch.uint8).argmax())
    row = f"row {first + at}"
    if whole.apart[at]:
        got = f"{row}, which some ranks ignore and others do not"
    else:
        got = f"{int(whole.owners[at])} ranks that hold class {int(target[at])}, the target of {row}"
    return ArgumentError(
        f"{op}: each class must be on one rank and the targets must be the same on all, got {got}; check "
        f"target, first_class and num_classes"
    )


# ---- the operators


@torch.no_grad()
def _forward(
    logits: Tensor, target: Tensor, factor: Tensor, weight: Tensor | None, group: str, first: int,
    classes: int, with_grad: bool, *of_row: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    shard = _shard_of(logits.shape[1], group, first, classes)
    logits = _in_rows(logits)
    gradient = empty_grad(logits, with_grad)
    losses = _rows_(
        logits, target, factor, weight, LossOptions(0, *of_row), shard, gradient if with_grad else None
    )
    return losses, gradient


def _in_rows(logits: Tensor) -> Tensor:
    """With the classes of a row side by side, as the kernels take them."""
    return logits if logits.stride(1) == 1 else logits.contiguous()


def _shard_of(columns: int, group: str, first: int, classes: int) -> _Shard:
    return _Shard(group, min(first, classes), max(0, min(columns, classes - first)), classes)


# Losses of the rows, and factor times their gradient, which is empty unless with_grad.
define_kernel(
    "sharded_cross_entropy(Tensor logits, Tensor target, Tensor factor, Tensor? weight, str group, "
    f"int first, int classes, bool with_grad, {ROW_OPTIONS}) -> (Tensor losses, Tensor grad)",
    _forward,
)


@torch.library.register_fake("fastreg::sharded_cross_entropy", allow_override=True)
def _(logits, target, factor, weight, group, first, classes, with_grad, *of_row):
    return factor.new_empty(factor.shape), empty_grad(_in_rows(logits), with_grad)


@torch.no_grad()
def _forward_linear(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, factor: Tensor,
    class_weight: Tensor | None, group: str, first: int, classes: int, wants: str, *of_row: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    shard = _shard_of(weight.shape[0], group, first, classes)
    options = LossOptions(0, *of_row)

    first = 0  # row of a chunk

    def rows_(logits, target, factor, class_weight):
        nonlocal first
        gradient = logits if wants else None
        losses = _rows_(logits, target, factor, class_weight, options, shard, gradient, first)
        first += len(logits)
        return losses

    process_group = _group_of(group)
    # All ranks must cut the rows alike, whatever number of classes each of them has.
    columns = -(-classes // dist.get_world_size(process_group))
    losses, d_hidden, d_weight, d_bias = by_chunks(
        hidden, weight, bias, target, factor, class_weight, wants, rows_, columns
    )
    if "h" in wants:  # Each rank has what its classes add to it.
        dist.all_reduce(d_hidden, group=process_group)
    return losses, d_hidden, d_weight, d_bias


define_kernel(
    "sharded_linear_cross_entropy(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor factor, "
    f"Tensor? class_weight, str group, int first, int classes, str wants, {ROW_OPTIONS}) -> "
    "(Tensor, Tensor, Tensor, Tensor)",
    _forward_linear,
)


@torch.library.register_fake("fastreg::sharded_linear_cross_entropy", allow_override=True)
def _(hidden, weight, bias, target, factor, class_weight, group, first, classes, wants, *of_row):
    return empty_results(hidden, weight, wants)


# Only compiled code needs operators. Elsewhere whoever watches the messages of torch.distributed sees ours.


def _sharded(*arguments: Any) -> tuple[Tensor, Tensor]:
    return (torch.ops.fastreg.sharded_cross_entropy.default if is_compiling() else _forward)(*arguments)


def _sharded_linear(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    operator = torch.ops.fastreg.sharded_linear_cross_entropy.default
    return (operator if is_compiling() else _forward_linear)(*arguments)


def _once(op: str) -> None:
    if torch.is_grad_enabled():
        raise NotImplementedError(
            f"{op}: the derivative of its gradient would need another message and is not there; take "
            f"fastreg.cross_entropy of all logits for derivatives of derivatives"
        )


class _ShardedCrossEntropy(torch.autograd.Function):
    """sum_r factor_r * loss_r; or, for `each` row, its loss. What is kept is the gradient of that."""

    @staticmethod
    def forward(ctx, logits, target, factor, weight, each, *rest):
        losses, gradient = _sharded(logits, target, factor, weight, *rest[:3], True, *rest[3:])
        ctx.each, ctx.dtype, ctx.rest = each, logits.dtype, rest
        ctx.save_for_backward(gradient, target)
        return losses if each else weighted_sum(losses, factor)

    @staticmethod
    def backward(ctx, g):
        _once("distributed.cross_entropy")
        gradient, target = ctx.saved_tensors
        kept = counted(target, ctx.rest[3])
        first = scaled(gradient, g.unsqueeze(1) if ctx.each else g, kept)
        return first.to(ctx.dtype), *(None,) * (4 + len(ctx.rest))


class _ShardedLinearCrossEntropy(torch.autograd.Function):
    """sum_r factor_r * loss_r, whose gradients are computed at once; or, for `each` row, its loss, whose
    gradients are computed when their factors arrive, which takes the messages of another forward pass.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, target, factor, class_weight, each, *rest):
        ctx.wants = "".join(name for name, wanted in zip("hwb", ctx.needs_input_grad, strict=False) if wanted)
        ctx.each, ctx.rest = each, rest
        losses, *gradients = _sharded_linear(
            hidden,
            weight,
            bias,
            target,
            factor,
            class_weight,
            *rest[:3],
            "" if each else ctx.wants,
            *rest[3:],
        )
        saved = (hidden, weight, bias, target, factor, class_weight) if each else (target, *gradients)
        ctx.dtype = hidden.dtype
        ctx.save_for_backward(*saved)
        return losses if each else weighted_sum(losses, factor)

    @staticmethod
    def backward(ctx, g):
        _once("distributed.linear_cross_entropy")
        saved, rest = ctx.saved_tensors, ctx.rest
        if ctx.each:
            *inputs, factor, class_weight = saved
            g = g.to(factor.dtype).contiguous()
            saved = _sharded_linear(*inputs, g, class_weight, *rest[:3], ctx.wants, *rest[3:])[1:]
            g = torch.ones((), dtype=g.dtype, device=g.device)
        else:
            target, *saved = saved
            g = factor_of_sum(g, target, rest[3])
        wanted = (
            scaled(d, g).to(ctx.dtype) if name in ctx.wants else None
            for name, d in zip("hwb", saved, strict=True)
        )
        return *wanted, *(None,) * (4 + len(rest))


# ---- the public functions


def _checked_shard(op: str, group: Any, first_class: int, num_classes: int) -> tuple[str, int, int]:
    check_count(op, "first_class", first_class, 0)
    check_count(op, "num_classes", num_classes)
    return process_group(op, group).group_name, int(first_class), int(num_classes)


def _refuse(op: str, *tensors: Tensor | None) -> None:
    if any(map(is_sharded, tensors)):
        raise UnsupportedError(
            f"{op}: tensors must be a rank's own part, got a DTensor; give its .to_local(), or call "
            f"fastreg.{op.rpartition('.')[2]}, which knows how DTensors are placed"
        )
    if is_transformed():
        raise NotImplementedError(
            f"{op}: there are no transforms of torch.func and no forward mode for it; take "
            f"fastreg.cross_entropy of all logits"
        )


def cross_entropy(
    local_logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    group: Any = None,
    first_class: int,
    num_classes: int,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    smoothing: Smoothing = "uniform",
    z_loss: float = 0.0,
    all_ignored: AllIgnored = "nan",
    loss_dtype: torch.dtype | None = None,
) -> Tensor:
    """`fastreg.cross_entropy` of logits whose classes are split over the ranks of a group.

    Every rank of the group calls it with its own classes and the same targets, and gets the same loss.

    Args:
        local_logits: this rank's classes, (N, c) or (N, c, d1, ...), c >= 0, also other numbers on other
            ranks; float32, float64, float16 or bfloat16. Never modified.
        target: class indices among all classes, (N,) or (N, d1, ...), an integer dtype; or this rank's part
            of probabilities, of the shape of `local_logits`.
        weight: a weight per class, (num_classes,), all of them on every rank.
        group: the ProcessGroup or the DeviceMesh of one dimension over which the classes are split; None is
            the default group.
        first_class: the index of this rank's first class. The parts of all ranks make up the classes, each
            of them once.
        num_classes: how many classes there are. Columns beyond them are padding: no class, gradient 0.
        ignore_index, reduction, label_smoothing, smoothing, z_loss, all_ignored, loss_dtype: as in
            `fastreg.cross_entropy`; both smoothings go over all classes.

    Returns:
        The loss, equal on all ranks to the last bit; () or, with reduction "none", (N, d1, ...). One message,
        a gather of four float32 (float64 for float64) per row and rank, in the forward pass, and none in the
        backward pass. Saved for that: the gradient, one tensor like `local_logits` (float32 for float16).

    Raises:
        RuntimeError: there is no process group.
        ValueError: as `fastreg.cross_entropy`; on the CPU also a target that no rank holds, or several do, or
            that some ranks ignore. A class index out of range on one rank and these are raised on all ranks
            alike (elsewhere than on the CPU: the loss of the row is NaN, and so is its gradient).
        TypeError: as `fastreg.cross_entropy`; group, first_class or num_classes of another type.
        NotImplementedError: derivatives of its gradient, transforms of torch.func.

    Source: Shoeybi et al. 2019, Megatron-LM, section 3 (the loss of split classes, there by three messages);
    Milakov and Gimelshein 2018 (sums of exponentials put together); the loss as in `fastreg.cross_entropy`.
    """
    op = "distributed.cross_entropy"
    for name, value in (("local_logits", local_logits), ("target", target)):
        check_tensor(op, name, value)
    shard = _checked_shard(op, group, first_class, num_classes)
    _refuse(op, local_logits, target, weight)
    if loss_dtype is None:
        autocast = autocast_dtype(local_logits.device.type) is not None
        loss_dtype = promoted_dtype(local_logits.dtype, target, weight, autocast)
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
    if local_logits.dim() < 2:
        raise ArgumentError(
            f"{op}: local_logits must be (N, C) or (N, C, ...), got shape {tuple(local_logits.shape)}"
        )
    shape = local_logits.shape[:1] + local_logits.shape[2:]
    target, weight = check_classes(
        op, local_logits, target, weight, options,
        classes=num_classes, expected=(shape, local_logits.shape), name="local_logits",
    )  # fmt: skip
    return sharded_loss(op, local_logits, target, weight, options, shard)


def sharded_loss(
    op: str, logits: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions,
    shard: tuple[str, int, int],
) -> Tensor:  # fmt: skip
    """The loss of arguments that are checked. shard: the group's name, first_class and num_classes."""
    soft = target.is_floating_point()
    if soft:
        check_constant(op, "target", target)
    shape = logits.shape[:1] + logits.shape[2:]
    logits = logits.movedim(1, -1).flatten(0, -2)
    target = target.movedim(1, -1).flatten(0, -2) if soft else target.reshape(-1)
    factor = row_factor(logits, target, weight, options)
    each = options.reduction == 0
    if torch.is_grad_enabled() and logits.requires_grad:
        loss = _ShardedCrossEntropy.apply(logits, target, factor, weight, each, *shard, *options.of_row())
    else:
        losses = _sharded(logits, target, factor, weight, *shard, False, *options.of_row())[0]
        loss = losses if each else weighted_sum(losses, factor)
    return finished(loss, shape, logits, options)


def linear_cross_entropy(
    hidden: Tensor,
    local_weight: Tensor,
    target: Tensor,
    local_bias: Tensor | None = None,
    *,
    group: Any = None,
    first_class: int,
    num_classes: int,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    smoothing: Smoothing = "uniform",
    z_loss: float = 0.0,
    all_ignored: AllIgnored = "nan",
    loss_dtype: torch.dtype | None = None,
) -> Tensor:
    """`fastreg.linear_cross_entropy` with a layer whose classes are split over the ranks of a group.

    Every rank calls it with the same hidden and targets and with its own rows of the weight.

    Args:
        hidden: (..., H), the same on all ranks; float32, float64, float16 or bfloat16.
        local_weight: this rank's rows of the layer's weight, (c, H).
        target: class indices among all classes, (...), an integer dtype; or this rank's part of
            probabilities, (..., c).
        local_bias: this rank's part of the bias, (c,), or None.
        group, first_class, num_classes: as in `distributed.cross_entropy`.
        class_weight: a weight per class, (num_classes,), all of them on every rank.
        ignore_index, reduction, label_smoothing, smoothing, z_loss, all_ignored, loss_dtype: as in
            `fastreg.cross_entropy`.

    Returns:
        The loss, equal on all ranks. The logits are never whole, not even a rank's own: they are computed by
        chunks of rows, with one gather of four numbers a row and rank for each. The gradient of hidden is
        that of all classes: it is summed over the ranks once, in the forward pass, and the backward pass has
        no message, except with reduction "none", where gradients are computed only there.

    Raises:
        As `distributed.cross_entropy` and `fastreg.linear_cross_entropy`.

    Source: Hsu et al. 2024, Liger kernel (gradients by chunks); Shoeybi et al. 2019, Megatron-LM, section 3.
    """
    op = "distributed.linear_cross_entropy"
    named = (
        ("hidden", hidden),
        ("local_weight", local_weight),
        ("target", target),
        ("local_bias", local_bias),
    )
    for name, value in named:
        if name != "local_bias" or local_bias is not None:
            check_tensor(op, name, value)
    shard = _checked_shard(op, group, first_class, num_classes)
    _refuse(op, hidden, local_weight, target, local_bias, class_weight)
    hidden, weight, bias, options = layer_and_options(
        op, hidden, local_weight, local_bias, target, class_weight, loss_dtype,
        reduction=reduction, ignore_index=ignore_index, label_smoothing=label_smoothing, smoothing=smoothing,
        z_loss=z_loss, all_ignored=all_ignored,
    )  # fmt: skip
    columns, shape = weight.shape[0], hidden.shape[:-1]
    target, class_weight = check_classes(
        op, hidden, target, class_weight, options,
        classes=num_classes, expected=(shape, torch.Size((*shape, columns))), name="hidden",
        weight_name="class_weight",
    )  # fmt: skip
    return sharded_linear_loss(op, hidden, weight, bias, target, class_weight, options, shard)


def sharded_linear_loss(
    op: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor,
    class_weight: Tensor | None, options: LossOptions, shard: tuple[str, int, int],
) -> Tensor:  # fmt: skip
    """The loss of arguments that are checked. shard: the group's name, first_class and num_classes."""
    shape = hidden.shape[:-1]
    hidden = hidden.reshape(-1, hidden.shape[-1])
    if target.is_floating_point():
        check_constant(op, "target", target)
        target = target.flatten(0, -2)
    else:
        target = target.reshape(-1)
    factor = row_factor(hidden, target, class_weight, options)
    each = options.reduction == 0
    arguments = hidden, weight, bias, target, factor, class_weight
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in arguments[:3]):
        loss = _ShardedLinearCrossEntropy.apply(*arguments, each, *shard, *options.of_row())
    else:
        losses = _sharded_linear(*arguments, *shard, "", *options.of_row())[0]
        loss = losses if each else weighted_sum(losses, factor)
    return finished(loss, shape, hidden, options)
