"""Bias, dropout and residual in one pass, with the random numbers of dropout.

y = (x + bias) / (1 - p) + residual where kept, residual elsewhere: this is how a residual block ends. As a
single operator it reads x and the residual once and writes y and one bit per element. Dropout: Srivastava et
al. 2014; the three in one: Shoeybi et al. 2019, Megatron-LM.
"""

from __future__ import annotations

import functools

import torch
from torch.compiler import is_compiling

from ._checks import ArgumentTypeError, arithmetic_dtype, check_dtype, check_generator, check_tensor
from ._dropout import (
    check_input,
    constants_of,
    draw_decisions,
    dropout_mask_op,
    masked_gradient,
    run_dropout,
)
from ._dropout_masks import empty_mask, pack_mask, unpack_mask
from ._registry import define, define_composite, fast
from ._seeds import draw_seed_for
from ._shards import refuse_transformed_parts
from ._transforms import autocast_dtype, handed_over, is_foreign, is_recorded, is_sharded, is_transformed

# --- The operator in plain torch: what the kernels compute, bit for bit.


def add_where_kept(
    input: torch.Tensor, residual: torch.Tensor, bias: torch.Tensor | None, kept: torch.Tensor, scale: float
) -> torch.Tensor:
    """(x + bias) * scale + residual where kept, residual elsewhere, in the type of the arithmetic."""
    wide = arithmetic_dtype(input)
    value = input.to(wide) if bias is None else input.to(wide) + bias.to(wide)
    residual = residual.to(wide)
    return torch.where(kept, value * scale + residual, residual)


def dropout_add_plain(
    input: torch.Tensor,
    residual: torch.Tensor,
    bias: torch.Tensor | None,
    p: float,
    seed: torch.Tensor,
    scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(output, mask) of the operator `dropout_add`."""
    check_dtype("dropout_add", "input", input)
    kept = draw_decisions(input.numel(), p, seed, 0, input.device)
    value = add_where_kept(input, residual, bias, kept.view(input.shape), scale)
    return torch.empty_like(input).copy_(value), pack_mask(kept)


# --- The operator.

define(
    "dropout_add(Tensor input, Tensor residual, Tensor? bias, float p, Tensor seed, float scale=1.0) "
    "-> (Tensor output, Tensor mask)",
    plain=dropout_add_plain,
)


@torch.library.register_fake("fastreg::dropout_add", allow_override=True)
def _(input, residual, bias, p, seed, scale=1.0):
    return torch.empty_like(input), empty_mask(input, 1)


dropout_add_op = torch.ops.fastreg.dropout_add.default


class _DropoutAdd(torch.autograd.Function):
    """The residual's gradient is the output's, the input's is the dropout of that by the same mask, and the
    bias's is the sum of the input's over the rows.
    """

    @staticmethod
    def forward(ctx, input, residual, bias, p, seed, scale):
        output, mask = dropout_add_op(input, residual, bias, p, seed, scale)
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
            kept = grad if ctx.all_kept else masked_gradient(ctx, grad)
            grad_input = kept if wants_input else None
            grad_bias = kept.sum_to_size(grad.shape[-1:]) if wants_bias else None
        return (
            grad_input,
            grad if wants_residual else None,
            grad_bias,
            None,
            None,
            None,
        )


def _differentiable(input, residual, bias, p, seed):
    """The output with a derivative, under transforms by torch's operators (`_by_torch` in _dropout.py)."""
    scale = constants_of("inverted", p)[0]
    if not is_transformed():
        return _DropoutAdd.apply(input, residual, bias, p, seed, scale)
    kept = unpack_mask(dropout_mask_op(input.detach(), input.numel(), p, seed), input.shape)
    return add_where_kept(input, residual, bias, kept, scale).to(input.dtype)


# What torch.compile sees, for the reasons given at dropout_traced.
define_composite(
    "dropout_add_traced(Tensor input, Tensor residual, Tensor? bias, float p, Tensor seed) -> Tensor",
    _differentiable,
)


def _check_together(op: str, input: torch.Tensor, residual: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Raise unless the tensors fit together."""
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


def _is_plain(tensor: torch.Tensor | None) -> bool:
    return tensor is not None and not is_sharded(tensor)


def dropout_add(
    input: torch.Tensor,
    residual: torch.Tensor,
    p: float = 0.5,
    bias: torch.Tensor | None = None,
    training: bool = True,
    *,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """dropout(input + bias) + residual in one pass: how a residual block ends.

    Computes (input + bias) / (1 - p) + residual where kept and residual elsewhere, in float32 (float64 for
    float64), rounded once. What is dropped is what `dropout(input + bias, p)` drops for the same seed.

    Args:
        input: tensor of any shape and strides; float32, float64, float16 or bfloat16.
        residual: tensor of the shape, dtype and device of `input`; any strides.
        p: probability of dropping an element, in [0, 1]; exact to 2^-32. 0 drops none, 1 gives the residual.
        bias: (C,) for an input of shape (..., C), of its dtype and device: the bias that the linear layer
            before leaves out.
        training: if False, no element is dropped.
        generator: torch.Generator on the input's device to draw the seed from; the default generator if None.

    Returns:
        A new tensor like `input`, memory format kept. A dropped inf or NaN does not show. Saved for backward:
        one bit per element. Twice differentiable in the three tensors. Under autocast they may differ in
        dtype; the widest is the one of the arithmetic and of the result.

    Raises:
        ValueError: p outside [0, 1] or NaN; a residual or bias of another shape, dtype or device; a dtype
            without kernels.
        TypeError: `input`, `residual` or `bias` is no tensor or `p` no number; DTensors beside plain tensors.

    Source: Srivastava et al. 2014; bias, dropout and residual as one: Shoeybi et al. 2019, Megatron-LM.
    """
    if fast is not None and generator is None and not is_compiling():
        output = fast.dropout_add(input, residual, p, bias, training)
        if output is not None:
            return output
    if is_foreign(input, residual, bias):
        return handed_over(dropout_add, locals())
    op = "dropout_add"
    p = check_input(op, input, p)
    check_generator(op, generator)
    check_tensor(op, "residual", residual)
    if bias is not None:
        check_tensor(op, "bias", bias)
    dtypes = {t.dtype for t in (input, residual, bias) if t is not None}
    if len(dtypes) > 1 and autocast_dtype(input.device.type):
        widest = functools.reduce(torch.promote_types, dtypes)
        input, residual = input.to(widest), residual.to(widest)
        bias = None if bias is None else bias.to(widest)
    _check_together(op, input, residual, bias)
    refuse_transformed_parts(op, input, residual, bias)
    plain = [name for name, t in (("input", input), ("residual", residual), ("bias", bias)) if _is_plain(t)]
    if plain and any(map(is_sharded, (input, residual, bias))):
        raise ArgumentTypeError(
            f"{op}: input, residual and bias must all be DTensors or all plain tensors, got a plain "
            f"{plain[0]} beside DTensors; make it one with torch.distributed.tensor.distribute_tensor"
        )
    if not training or not input.numel():
        p = 0.0
    if p == 0:
        if bias is None:
            return input + residual
        if is_compiling() or is_recorded():
            # A compiler fuses additions itself, and what is exported for evaluation has no operator of ours.
            check_dtype(op, "input", input)
            wide = arithmetic_dtype(input)
            return (input.to(wide) + bias.to(wide) + residual.to(wide)).to(input.dtype)
    if is_sharded(input):
        wide, dtype = arithmetic_dtype(input), input.dtype
        if wide != dtype:  # so that there is one rounding, at the end
            input, residual = input.to(wide), residual.to(wide)
        input = input if bias is None else input + bias.to(wide)
        input = run_dropout(op, input, p, False, generator, 1, "inverted") if p else input
        return (input + residual).to(dtype)
    # Where nothing is dropped the operator does not use its seed. On the CPU it costs a GPU nothing.
    seed = draw_seed_for(p, input.device, generator) if p else torch.zeros(1, dtype=torch.int64, device="cpu")
    bias = bias if bias is None else bias.contiguous()
    if is_compiling():
        return torch.ops.fastreg.dropout_add_traced(input, residual, bias, p, seed)
    derive = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (input, residual, bias)
    )
    if derive or is_transformed():
        return _differentiable(input, residual, bias, p, seed)
    return dropout_add_op(input, residual, bias, p, seed, constants_of("inverted", p)[0])[0]
