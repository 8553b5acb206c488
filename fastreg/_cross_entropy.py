"""Cross-entropy with smoothed targets, its gradient written in the sweep that computes the loss.

loss = -sum_c q_c log softmax(x)_c + z_loss * lse^2 for targets q that move a mass eps off the true class:
onto all k classes alike (Szegedy, Vanhoucke, Ioffe, Shlens, Wojna 2016), or onto the k - 1 others
(Goodfellow, Bengio, Courville 2016, 7.5.1).
"""

import sys

import torch
from torch.compiler import is_compiling

from ._checks import check_choice, check_number, check_tensor
from ._registry import define, fast

_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

# grad is d loss / d input: of the reduced loss, or of each element's own loss; empty unless with_grad.
define(
    "cross_entropy(Tensor input, Tensor target, Tensor? weight=None, int reduction=1, int ignore_index=-100, "
    "float label_smoothing=0.0, bool others=False, float z_loss=0.0, bool all_ignored_zero=False, "
    "ScalarType? loss_dtype=None, bool with_grad=False) -> (Tensor loss, Tensor grad, Tensor lse)"
)
# values *= factor; CUDA only, where the kernel looks at the factor and moves nothing if it is 1.
define("cross_entropy_scale_(Tensor(a!) values, Tensor factor) -> ()")


@torch.library.register_fake("fastreg::cross_entropy")
def _(
    input,
    target,
    weight=None,
    reduction=1,
    ignore_index=-100,
    label_smoothing=0.0,
    others=False,
    z_loss=0.0,
    all_ignored_zero=False,
    loss_dtype=None,
    with_grad=False,
):
    rows = (input.shape[0], *input.shape[2:])
    numel = 1
    for size in rows:
        numel = numel * size
    loss = input.new_empty(rows if reduction == 0 else (), dtype=loss_dtype or input.dtype)
    if not with_grad:
        grad = input.new_empty((0,))
    elif input.dtype == torch.float16:
        grad = input.new_empty(input.shape, dtype=torch.float32)
    else:
        grad = torch.empty_like(input)
    return loss, grad, input.new_empty((numel,), dtype=_statistics_dtype(input))


@torch.library.register_fake("fastreg::cross_entropy_scale_")
def _(values, factor):
    return None


_cross_entropy = torch.ops.fastreg.cross_entropy.default
_cross_entropy_scale_ = torch.ops.fastreg.cross_entropy_scale_.default
_keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph


def _statistics_dtype(input):
    return torch.float64 if input.dtype == torch.float64 else torch.float32


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
        if g_loss is not None:
            result = _scaled(grad, g_loss.unsqueeze(1) if ctx.options[0] == 0 else g_loss)
        if g_grad is not None or g_lse is not None:
            second = _second_order(g_grad, g_lse, grad, lse, target, weight, *ctx.options)
            result = second if result is None else result + second
        return (None if result is None else result.to(ctx.dtype)), *(None,) * (2 + len(ctx.options))


def _scaled(gradient, g):
    """gradient * g. Where nobody else will read the gradient, the usual loss.backward(), with a g of 1, costs
    no pass over it.
    """
    if (
        type(g) is torch.Tensor
        and g.numel() == 1
        and not is_compiling()
        and not torch.is_grad_enabled()
        and not _keeps_graph()
    ):
        if g.device.type == "cpu":
            if g == 1:
                return gradient.detach()
        elif g.device.type == "cuda":  # to look at the value here would be to wait for the GPU
            gradient = gradient.detach()
            _cross_entropy_scale_(gradient, g)
            return gradient
    return gradient * g.to(gradient.dtype)


def _second_order(v, u, grad, lse, target, weight, reduction, ignore_index, eps, others, z_loss, zero, _):
    """d (<v, G> + <u, lse>) / d input for G = s (b p - q), b = sum q + 2 z lse, with p taken from G.

    It is s b p (v - <p, v>) + 2 z s p <p, v> + p u.
    """
    dtype = _statistics_dtype(grad)
    grad, k = grad.to(dtype), grad.shape[1]
    rows = (grad.shape[0], 1, *grad.shape[2:])
    if target.is_floating_point():
        one_hot, keep, count = (
            target.to(dtype),
            torch.ones(rows, dtype=dtype, device=grad.device),
            rows_of(grad),
        )
    else:
        kept = (target != ignore_index).unsqueeze(1)
        index = target.clamp(0, k - 1).unsqueeze(1)
        one_hot = torch.zeros_like(grad).scatter_(1, index, 1.0)
        keep = kept.to(dtype)
        count = (keep if weight is None else keep * weight.to(dtype)[index]).sum()
    spread = 0.0 if eps == 0 else eps / (k - 1 if others else k)
    q = (1 - eps - (spread if others else 0.0)) * one_hot + spread
    if weight is not None:
        q = q * weight.to(dtype).view(1, k, *(1,) * (grad.dim() - 2))
    s = keep
    if reduction == 1:
        s = torch.where(keep == 0, 0, keep / count)
        if zero and not target.is_floating_point():  # the loss is 0 whatever the logits are
            s = torch.where(count == 0, 0, s)
    b = q.sum(1, keepdim=True) + 2 * z_loss * lse.to(dtype).view(rows)
    safe = (s != 0) & (b != 0)
    p = torch.where(safe, (grad / s.where(safe, 1) + q) / b.where(safe, 1), 0)
    result = 0
    if v is not None:
        v = v.to(dtype)
        pv = (p * v).sum(1, keepdim=True)
        result = s.where(safe, 0) * p * (b * (v - pv) + 2 * z_loss * pv)
    if u is not None:
        result = result + p * u.to(dtype).view(rows)
    return result


def rows_of(input):
    """Number of rows, that is of class distributions, in (N, C, ...)."""
    return input.numel() // max(input.shape[1], 1)


def check_options(op, reduction, smoothing, all_ignored, label_smoothing, z_loss, ignore_index):
    """Raise unless every option is one that the op has."""
    check_choice(op, "reduction", reduction, _REDUCTIONS)
    check_choice(op, "smoothing", smoothing, ("uniform", "others"))
    check_choice(op, "all_ignored", all_ignored, ("nan", "zero"))
    check_number(op, "label_smoothing", label_smoothing, 0, 1)
    check_number(op, "z_loss", z_loss, 0, sys.float_info.max)
    if not isinstance(ignore_index, (int, torch.SymInt)) or isinstance(ignore_index, bool):
        raise TypeError(f"{op}: ignore_index must be an int, got {type(ignore_index).__name__}")


def check_classes(
    op,
    input,
    target,
    weight,
    *,
    classes,
    expected,
    ignore_index,
    label_smoothing,
    smoothing,
    loss_dtype,
    name="input",
    weight_name="weight",
):
    """Raise unless targets and class weights fit `input`; gives both in the form that the kernel takes.

    expected: the shapes of a target of class indices and of one of probabilities. name, weight_name: what the
    caller's user knows `input` and `weight` by.
    """
    if input.dtype not in _DTYPES:
        raise ValueError(
            f"{op}: {name} must be float32, float64, float16 or bfloat16, got {input.dtype}; convert it with "
            f".float()"
        )
    if loss_dtype not in (None, input.dtype, torch.float32, torch.float64):
        raise ValueError(
            f"{op}: loss_dtype must be torch.float32, torch.float64 or {name}'s {input.dtype}, got "
            f"{loss_dtype}"
        )
    if target.device != input.device:
        raise ValueError(
            f"{op}: target must be on {input.device} as {name} is, got {target.device}; move it with "
            f".to({name}.device)"
        )
    if target.dtype == torch.bool or target.is_complex():
        raise TypeError(f"{op}: target must be class indices (int64) or probabilities, got {target.dtype}")
    soft = target.is_floating_point()
    if target.shape != expected[soft]:
        raise ValueError(
            f"{op}: target must have shape {tuple(expected[soft])} for {name} of shape {tuple(input.shape)}, "
            f"got {tuple(target.shape)}; "
            f"{'class indices must be int64, convert them with .long()' if soft else 'probabilities must be floating point'}"
        )
    if classes == 0:
        raise ValueError(f"{op}: there must be at least one class, got {name} of shape {tuple(input.shape)}")
    if smoothing == "others" and label_smoothing > 0 and classes == 1:
        raise ValueError(
            f"{op}: smoothing='others' needs at least two classes, got {name} of shape {tuple(input.shape)}"
        )
    if soft:
        if target.dtype not in _DTYPES:
            raise ValueError(
                f"{op}: probabilities must be float32, float64, float16 or bfloat16, got {target.dtype}; "
                f"convert with .float()"
            )
        if ignore_index >= 0:
            raise ValueError(
                f"{op}: ignore_index must be negative with a target of probabilities, got {ignore_index}"
            )
    else:
        target = target.to(torch.int64).contiguous()
    if weight is not None:
        check_tensor(op, weight_name, weight)
        if not weight.is_floating_point():
            raise TypeError(
                f"{op}: {weight_name} must be floating point, got {weight.dtype}; convert it with .float()"
            )
        if weight.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{op}: {weight_name} must not require a gradient, as none is computed; give it with "
                f".detach()"
            )
        if weight.shape != (classes,):
            raise ValueError(
                f"{op}: {weight_name} must have one value per class, shape ({classes},), got "
                f"{tuple(weight.shape)}"
            )
        if weight.device != input.device:
            raise ValueError(
                f"{op}: {weight_name} must be on {input.device} as {name} is, got {weight.device}"
            )
        weight = weight.detach().to(_statistics_dtype(input)).contiguous()
    return target, weight


def cross_entropy(
    input,
    target,
    weight=None,
    size_average=None,
    ignore_index=-100,
    reduce=None,
    reduction="mean",
    label_smoothing=0.0,
    *,
    smoothing="uniform",
    z_loss=0.0,
    all_ignored="nan",
    loss_dtype=None,
):
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
        loss_dtype: dtype of the loss; that of `input` by default (float32 under autocast), torch.float32
            gives it unrounded.

    Returns:
        The loss, () or, with reduction "none", of the target's shape. Statistics are float32 (float64 for
        float64) whatever the input's dtype. A -inf logit of a class with no target mass, by weight 0,
        probability 0 or no smoothing, gives a finite loss. Saved for backward: the gradient, one tensor like
        `input` (float32 for float16). Twice differentiable in `input`.

    Raises:
        ValueError: class index out of range (on CUDA, where to look at it would be to wait for the GPU, the
            loss and the gradient of its row are NaN instead), shapes or devices that do not fit,
            label_smoothing outside [0, 1], an unknown `reduction`, `smoothing` or `all_ignored`,
            `ignore_index` >= 0 with probabilities, a weight that requires a gradient, a dtype without
            kernels.
        TypeError: `input`, `target` or `weight` is no tensor, `target` is bool or complex, `weight` is not
            floating point, an option is no number.

    Source: Szegedy et al. 2016 ("uniform"); Goodfellow et al. 2016, section 7.5.1 ("others"); z_loss: de
    Brebisson and Vincent 2016, Chowdhery et al. 2022.
    """
    if fast is not None and not is_compiling():
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
        if loss is not None:
            return loss
    op = "cross_entropy"
    check_tensor(op, "input", input)
    check_tensor(op, "target", target)
    if size_average is not None or reduce is not None:
        reduction = torch.nn._reduction.legacy_get_string(size_average, reduce)
    check_options(op, reduction, smoothing, all_ignored, label_smoothing, z_loss, ignore_index)
    if input.dim() == 0:
        raise ValueError(f"{op}: input must be (C,), (N, C) or (N, C, ...), got a tensor without dimensions")
    unbatched = input.dim() == 1
    expected = input.shape[: 0 if unbatched else 1] + input.shape[2:], input.shape
    target, weight = check_classes(
        op,
        input,
        target,
        weight,
        classes=input.shape[0 if unbatched else 1],
        expected=expected,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        smoothing=smoothing,
        loss_dtype=loss_dtype,
    )
    soft = target.is_floating_point()
    if unbatched:
        input, target = input.unsqueeze(0), target.unsqueeze(0)
    if input.dim() > 3:  # rows side by side as one dimension; a copy only where strides forbid a view
        shape = target.shape[:1] + target.shape[2 if soft else 1 :]
        input = input.flatten(2)
        target = target.flatten(2) if soft else target.flatten(1)
    else:
        shape = None
    if (
        loss_dtype is None
        and input.dtype in (torch.float16, torch.bfloat16)
        and torch.is_autocast_enabled(input.device.type)
    ):
        loss_dtype = torch.float32

    options = (
        _REDUCTIONS[reduction],
        ignore_index,
        label_smoothing,
        smoothing == "others",
        z_loss,
        all_ignored == "zero",
        loss_dtype,
    )
    if torch.is_grad_enabled() and target.requires_grad:
        loss = _differentiable_in_target(input, target, weight, *options)
    elif torch.is_grad_enabled() and input.requires_grad:
        loss = _CrossEntropy.apply(input, target, weight, *options)[0]
    else:
        loss = _cross_entropy(input, target, weight, *options)[0]
    if reduction == "none":
        if unbatched:
            return loss.squeeze(0)
        if shape is not None:
            return loss.view(shape)
    return loss


def _differentiable_in_target(
    input, target, weight, reduction, ignore_index, eps, others, z_loss, zero, loss_dtype
):
    """The same loss in plain torch operations, for the rare target that wants a gradient itself, as of a
    teacher that learns.
    """
    dtype, k = _statistics_dtype(input), input.shape[1]
    x = input.to(dtype)
    lse = x.logsumexp(1)
    spread = 0.0 if eps == 0 else eps / (k - 1 if others else k)
    q = (1 - eps - (spread if others else 0.0)) * target.to(dtype) + spread
    if weight is not None:
        q = q * weight.view(1, k, *(1,) * (x.dim() - 2))
    log_p = x - lse.unsqueeze(1)
    log_p = torch.where((q == 0) & (log_p == -torch.inf), 0, log_p)
    loss = -(q * log_p).sum(1) + z_loss * lse**2
    if zero and reduction == 1 and rows_of(input) == 0:
        return loss.sum().to(loss_dtype or input.dtype)
    loss = loss.mean() if reduction == 1 else loss.sum() if reduction == 2 else loss
    return loss.to(loss_dtype or input.dtype)
