"""Bias, dropout and residual in one pass, on dropout's draw.

y = (x + bias) / (1 - p) + residual where kept, residual elsewhere: how a residual block ends, as a single
operator that reads x and the residual once and writes y and one bit per element. Dropout: Srivastava et al.
2014; the three in one: Shoeybi et al. 2019, Megatron-LM.
"""

import functools

import torch
from torch.compiler import is_compiling

from ._checks import check_tensor
from ._dropout import _backward, _by_torch, _check, _constants, _empty_mask, _run, _transformed
from ._registry import define, define_composite, fast
from ._seeds import draw_seed

define(
    "dropout_add(Tensor input, Tensor residual, Tensor? bias, float p, Tensor seed, float scale=1.0) "
    "-> (Tensor output, Tensor mask)"
)


@torch.library.register_fake("fastreg::dropout_add")
def _(input, residual, bias, p, seed, scale=1.0):
    return torch.empty_like(input), _empty_mask(input, 1)


_dropout_add = torch.ops.fastreg.dropout_add.default


class _DropoutAdd(torch.autograd.Function):
    """The residual's gradient is the one that comes, the input's its dropout by the same mask, the bias's the
    sum of that.
    """

    @staticmethod
    def forward(ctx, input, residual, bias, p, seed, scale):
        output, mask = _dropout_add(input, residual, bias, p, seed, scale)
        ctx.all_kept = p == 0
        if not ctx.all_kept:
            ctx.save_for_backward(mask)
        ctx.inner, ctx.scale = 1, scale
        return output

    @staticmethod
    def backward(ctx, grad):
        wants_input, wants_residual, wants_bias = ctx.needs_input_grad[:3]
        grad_input = grad_bias = None
        if wants_input or wants_bias:
            grad_input = grad if ctx.all_kept else _backward(ctx, grad)
        if wants_bias:
            grad_bias = grad_input.sum_to_size(grad.shape[-1:])
        return (
            grad_input if wants_input else None,
            grad if wants_residual else None,
            grad_bias,
            None,
            None,
            None,
        )


def _traced(input, residual, bias, p, seed):
    constants = _constants("inverted", p)
    if not _transformed():
        return _DropoutAdd.apply(input, residual, bias, p, seed, constants[0])
    wide = torch.promote_types(input.dtype, torch.float32)  # one rounding, as in the kernel
    value = input.to(wide) if bias is None else input.to(wide) + bias.to(wide)
    return (_by_torch(value, p, seed, 0, 1, *constants)[0] + residual.to(wide)).to(input.dtype)


# What torch.compile sees, for the reasons told at dropout_traced.
define_composite(
    "dropout_add_traced(Tensor input, Tensor residual, Tensor? bias, float p, Tensor seed) -> Tensor", _traced
)


def _autocasts(device):
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _check_together(op, input, residual, bias):
    """Raise unless the tensors fit."""
    if residual.shape != input.shape:
        raise ValueError(
            f"{op}: residual must have the shape of input, {tuple(input.shape)}, got "
            f"{tuple(residual.shape)}; "
            "broadcast it with .expand_as(input)"
        )
    if bias is not None and (not input.dim() or bias.shape != input.shape[-1:]):
        raise ValueError(
            f"{op}: bias must have one value per column, shape {tuple(input.shape[-1:])}, got "
            f"{tuple(bias.shape)} "
            f"for input of shape {tuple(input.shape)}; add one of another shape with input + bias"
        )
    for name, value in (("residual", residual), ("bias", bias)):
        if value is not None and (value.dtype != input.dtype or value.device != input.device):
            raise ValueError(
                f"{op}: {name} must be {input.dtype} on {input.device} as input is, got {value.dtype} on "
                f"{value.device}; "
                "convert it with .to(input)"
            )


def dropout_add(input, residual, p=0.5, bias=None, training=True, *, generator=None):
    """dropout(input + bias) + residual in one pass: how a residual block ends.

    Computes (input + bias) / (1 - p) + residual where kept and residual elsewhere, in float32 (float64 for
    float64), rounded once. What is dropped is what `dropout(input + bias, p)` drops for the same seed.

    Args:
        input: tensor of any shape and strides; float32, float64, float16 or bfloat16.
        residual: tensor of the shape, dtype and device of `input`; any strides.
        p: probability of dropping an element, in [0, 1]; exact to 2^-32. 0 drops none, 1 gives the residual.
        bias: (C,) for an input of shape (..., C), of its dtype and device: that of the linear layer before,
            left out there.
        training: if False, no element is dropped.
        generator: torch.Generator on the input's device to draw the seed from; the default generator if None.

    Returns:
        A new tensor like `input`, memory format kept. A dropped inf or NaN does not show. Saved for backward:
        one bit per element. Twice differentiable in the three tensors. Under autocast they may differ in
        dtype: the widest is computed in and returned.

    Raises:
        ValueError: p outside [0, 1] or NaN; a residual or bias of another shape, dtype or device; a dtype
            without kernels.
        TypeError: `input`, `residual` or `bias` is no tensor or `p` no number.

    Source: Srivastava et al. 2014; bias, dropout and residual as one: Shoeybi et al. 2019, Megatron-LM.
    """
    if fast is not None and generator is None and not is_compiling():
        output = fast.dropout_add(input, residual, p, bias, training)
        if output is not None:
            return output
    op = "dropout_add"
    p = _check(op, input, p)
    check_tensor(op, "residual", residual)
    if bias is not None:
        check_tensor(op, "bias", bias)
    dtypes = {t.dtype for t in (input, residual, bias) if t is not None}
    if len(dtypes) > 1 and _autocasts(input.device.type):
        widest = functools.reduce(torch.promote_types, dtypes)
        input, residual, bias = (t if t is None else t.to(widest) for t in (input, residual, bias))
    _check_together(op, input, residual, bias)
    if not training or not input.numel():
        p = 0.0
    if p == 0 and bias is None:
        return input + residual
    if type(input) is not torch.Tensor and hasattr(input, "device_mesh"):
        input = input if bias is None else input + bias
        return (_run(op, input, p, False, generator, 1, "inverted") if p else input) + residual
    if p:
        seed = draw_seed(input.device, generator)
    else:  # for the form: on the CPU it costs a GPU nothing
        seed = torch.zeros(1, dtype=torch.int64, device=input.device if is_compiling() else "cpu")
    bias = bias if bias is None else bias.contiguous()
    if is_compiling():
        return torch.ops.fastreg.dropout_add_traced(input, residual, bias, p, seed)
    derive = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (input, residual, bias)
    )
    if derive or _transformed():
        return _traced(input, residual, bias, p, seed)
    return _dropout_add(input, residual, bias, p, seed, _constants("inverted", p)[0])[0]
