"""Dropout on one operator, with a mask of one bit per decision.

y = x / (1 - p) where kept, 0 elsewhere (inverted dropout; Srivastava, Hinton, Krizhevsky, Sutskever,
Salakhutdinov 2014), or the textbook form y = x where kept, with the weights that follow multiplied by 1 - p
after training (Goodfellow, Bengio, Courville 2016, section 7.12).

What is drawn for an element depends on (seed, its row-major index) alone: not on device, threads, memory
layout or sharding. Dropout of channels and samples and alpha dropout, which run on the same operators, are in
_dropout_family.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch.compiler import is_compiling

from ._checks import (
    ArgumentError,
    arithmetic_dtype,
    check_choice,
    check_dense,
    check_dtype,
    check_generator,
    check_no_overlap,
    check_number,
    check_tensor,
    is_int,
    scalar,
)
from ._dropout_masks import empty_mask, pack_mask, unpack_mask
from ._registry import define, define_composite, fast
from ._seeds import draw_seed_for, random_halves, seed_tensor
from ._shards import (
    local_part,
    one_by_one,
    own_part,
    place_in_whole,
    refuse_transformed_parts,
    seed_of_first_rank,
    whole_of_parts,
)
from ._transforms import handed_over, is_foreign, is_sharded, is_transformed

Form = Literal["inverted", "textbook", "alpha"]

# --- The operators in plain torch: what the kernels compute, bit for bit.


def draw_decisions(
    count: int, p: float, seed: torch.Tensor, offset: int, device: torch.device
) -> torch.Tensor:
    """Which of the decisions [offset, offset + count) are "kept", each with probability 1 - p; bool (count,).

    16 random bits settle all but one decision in 65,536, and 16 further bits settle that one. Together they
    are a 32-bit number that is compared with (1 - p) * 2^32, rounded to an integer.
    """
    threshold = keep_threshold(p)
    if threshold == 2**32:
        return torch.ones(count, dtype=torch.bool, device=device)
    upper, lower = threshold >> 16, threshold & 0xFFFF
    first = random_halves(seed, offset, count, device)
    kept = first < upper
    if lower:
        second = random_halves(seed, offset, count, device, draw=1)
        kept |= (first == upper) & (second < lower)
    return kept


def keep_threshold(p: float) -> int:
    """The probability of keeping that is drawn with, in units of 2^-32."""
    return int((1.0 - p) * 2**32 + 0.5)


def scale_where_kept(
    input: torch.Tensor, kept: torch.Tensor, inner: int, scale: float, shift: float, dropped: float
) -> torch.Tensor:
    """scale * x + shift where kept, `dropped` elsewhere, in the type of the arithmetic.

    `kept` has one value for each run of `inner` neighbouring elements.
    """
    kept = kept.view(-1, 1).expand(-1, inner).reshape(input.shape)
    value = input.to(arithmetic_dtype(input)) * scale
    if shift:  # x * scale + 0 would turn -0 into 0
        value = value + shift
    return torch.where(kept, value, dropped)


def dropout_plain(
    input: torch.Tensor,
    p: float,
    seed: torch.Tensor,
    offset: int = 0,
    inner: int = 1,
    scale: float = 1.0,
    shift: float = 0.0,
    dropped: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(output, mask) of the operator `dropout`: `inner` neighbouring elements share a decision, kept elements
    become scale * x + shift and the others `dropped`.
    """
    check_dtype("dropout", "input", input)
    kept = draw_decisions(input.numel() // inner, p, seed, offset, input.device)
    output = torch.empty_like(input).copy_(scale_where_kept(input, kept, inner, scale, shift, dropped))
    return output, pack_mask(kept)


def dropout_inplace_plain(
    input: torch.Tensor,
    p: float,
    seed: torch.Tensor,
    offset: int = 0,
    inner: int = 1,
    scale: float = 1.0,
    shift: float = 0.0,
    dropped: float = 0.0,
) -> torch.Tensor:
    """The mask of the operator `dropout_`, which writes the output into `input`."""
    check_no_overlap("dropout", "input", input)
    output, mask = dropout_plain(input, p, seed, offset, inner, scale, shift, dropped)
    input.copy_(output)
    return mask


def dropout_mask_plain(
    like: torch.Tensor,
    decisions: int,
    p: float,
    seed: torch.Tensor,
    offset: int = 0,
    columns: int = 0,
    row: int = 0,
) -> torch.Tensor:
    """The operator `dropout_mask`: the mask of decisions that are rows of a larger tensor's, on the device of
    `like`. Decision i is number offset + i // columns * row + i % columns there, and offset + i if columns
    is 0.
    """
    if not columns:
        return pack_mask(draw_decisions(decisions, p, seed, offset, like.device))
    rows = [
        draw_decisions(min(columns, decisions - first), p, seed, offset + first // columns * row, like.device)
        for first in range(0, decisions, columns)
    ]
    return pack_mask(torch.cat(rows) if rows else torch.empty(0, dtype=torch.bool, device=like.device))


def dropout_apply_plain(
    input: torch.Tensor,
    mask: torch.Tensor,
    inner: int = 1,
    scale: float = 1.0,
    shift: float = 0.0,
    dropped: float = 0.0,
) -> torch.Tensor:
    """The operator `dropout_apply`: dropout by a mask that was drawn before."""
    check_dtype("dropout_apply", "input", input)
    kept = unpack_mask(mask, (input.numel() // inner,))
    return torch.empty_like(input).copy_(scale_where_kept(input, kept, inner, scale, shift, dropped))


# --- The operators: their schemas, and the shapes of their results for torch.compile.

define(
    "dropout(Tensor input, float p, Tensor seed, SymInt offset=0, SymInt inner=1, float scale=1.0, "
    "float shift=0.0, float dropped=0.0) -> (Tensor output, Tensor mask)",
    plain=dropout_plain,
)
define(
    "dropout_(Tensor(a!) input, float p, Tensor seed, SymInt offset=0, SymInt inner=1, float scale=1.0, "
    "float shift=0.0, float dropped=0.0) -> Tensor mask",
    plain=dropout_inplace_plain,
)
define(
    "dropout_mask(Tensor like, SymInt decisions, float p, Tensor seed, SymInt offset=0, SymInt columns=0, "
    "SymInt row=0) -> Tensor",
    plain=dropout_mask_plain,
)
define(
    "dropout_apply(Tensor input, Tensor mask, SymInt inner=1, float scale=1.0, float shift=0.0, "
    "float dropped=0.0) -> Tensor",
    plain=dropout_apply_plain,
)


@torch.library.register_fake("fastreg::dropout", allow_override=True)
def _(input, p, seed, offset=0, inner=1, scale=1.0, shift=0.0, dropped=0.0):
    return torch.empty_like(input), empty_mask(input, inner)


@torch.library.register_fake("fastreg::dropout_", allow_override=True)
def _(input, p, seed, offset=0, inner=1, scale=1.0, shift=0.0, dropped=0.0):
    return empty_mask(input, inner)


@torch.library.register_fake("fastreg::dropout_mask", allow_override=True)
def _(like, decisions, p, seed, offset=0, columns=0, row=0):
    return like.new_empty((decisions + 7) // 8, dtype=torch.uint8)


@torch.library.register_fake("fastreg::dropout_apply", allow_override=True)
def _(input, mask, inner=1, scale=1.0, shift=0.0, dropped=0.0):
    return torch.empty_like(input)


dropout_op = torch.ops.fastreg.dropout.default
dropout_inplace_op = torch.ops.fastreg.dropout_.default
dropout_mask_op = torch.ops.fastreg.dropout_mask.default
dropout_apply_op = torch.ops.fastreg.dropout_apply.default


# SELU's lower asymptote, -scale * alpha (Klambauer et al. 2017).
_SELU_FLOOR = -1.7580993408473766


def constants_of(form: Form, p: float) -> tuple[float, float, float]:
    """(scale, shift, dropped) of a form of dropout: kept elements become scale * x + shift, the others
    `dropped`.
    """
    if form == "textbook":
        return 1.0, 0.0, 0.0
    if form == "alpha":
        if p == 1:  # all zeros, as in torch
            return 0.0, 0.0, 0.0
        scale = ((_SELU_FLOOR**2 * p + 1) * (1 - p)) ** -0.5
        shift = -scale * p * _SELU_FLOOR
        return scale, shift, scale * _SELU_FLOOR + shift
    # The inverse of the probability that is drawn with: so the mean is exact even where p is next to 1.
    threshold = keep_threshold(p)
    return 2**32 / threshold if threshold else 0.0, 0.0, 0.0


# --- Autograd.


class _Masked(torch.autograd.Function):
    """scale * x + shift where kept, of a given mask; its derivative is a function of the same kind."""

    @staticmethod
    def forward(ctx, input, mask, inner, scale, shift=0.0, dropped=0.0):
        ctx.save_for_backward(mask)
        ctx.inner, ctx.scale = inner, scale
        return dropout_apply_op(input, mask, inner, scale, shift, dropped)

    @staticmethod
    def backward(ctx, grad):
        return masked_gradient(ctx, grad), None, None, None, None, None


def masked_gradient(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
    """The gradient of dropout's input: the output's gradient times `ctx.scale` where the saved mask keeps."""
    apply = _Masked.apply if torch.is_grad_enabled() else dropout_apply_op
    return apply(grad, *ctx.saved_tensors, ctx.inner, ctx.scale)


class _Dropout(torch.autograd.Function):
    """The usual case, kept thin: most of a small tensor's time is spent here."""

    @staticmethod
    def forward(ctx, input, p, seed, inner, scale, shift, dropped):
        output, mask = dropout_op(input, p, seed, 0, inner, scale, shift, dropped)
        ctx.save_for_backward(mask)
        ctx.inner, ctx.scale = inner, scale
        return output

    @staticmethod
    def backward(ctx, grad):
        return masked_gradient(ctx, grad), None, None, None, None, None, None


class _DropoutInPlace(torch.autograd.Function):
    """It has one output only, because autograd refuses an in-place function of a view that has more."""

    @staticmethod
    def forward(ctx, input, p, seed, inner, scale, shift, dropped):
        ctx.save_for_backward(dropout_inplace_op(input, p, seed, 0, inner, scale, shift, dropped))
        ctx.mark_dirty(input)
        ctx.inner, ctx.scale = inner, scale
        return input

    @staticmethod
    def backward(ctx, grad):
        return masked_gradient(ctx, grad), None, None, None, None, None, None


class _DropoutWithMask(torch.autograd.Function):
    """Gives the mask, too."""

    @staticmethod
    def forward(ctx, input, p, seed, offset, inner, scale, shift, dropped):
        output, mask = dropout_op(input, p, seed, offset, inner, scale, shift, dropped)
        ctx.save_for_backward(mask)
        ctx.mark_non_differentiable(mask)
        ctx.set_materialize_grads(False)  # or backward would be given zeros of the mask's size
        ctx.inner, ctx.scale = inner, scale
        return output, mask

    @staticmethod
    def backward(ctx, grad, _):
        grad_input = None if grad is None else masked_gradient(ctx, grad)
        return grad_input, None, None, None, None, None, None, None


def _by_torch(input, p, seed, offset, inner, scale, shift, dropped):
    """(output, mask), where the operator only draws the mask and torch's operators do the rest.

    torch's operators know every transform of torch.func and forward-mode derivatives, compiled or not. An
    autograd.Function that knows them is slow, and torch.compile inlines it without its derivative.
    """
    mask = dropout_mask_op(input.detach(), input.numel() // inner, p, seed, offset)
    kept = unpack_mask(mask, (input.numel() // inner,))
    return scale_where_kept(input, kept, inner, scale, shift, dropped).to(input.dtype), mask


def _differentiable(input, p, seed, offset, inner, form):
    """(output, mask) with a derivative."""
    if is_transformed():
        return _by_torch(input, p, seed, offset, inner, *constants_of(form, p))
    return _DropoutWithMask.apply(input, p, seed, offset, inner, *constants_of(form, p))


# What torch.compile sees. If it looked into an autograd.Function, it would take floats for variables and
# fail (two dropouts under dynamic=True), compute with them inexactly, and lose the derivative under
# torch.func.grad. It leaves an operator to AOTAutograd, which does none of that.
define_composite(
    "dropout_traced(Tensor input, float p, Tensor seed, SymInt offset, SymInt inner, str form) "
    "-> (Tensor output, Tensor mask)",
    _differentiable,
)


# --- The usual steps from a public function to the operator.


def check_input(op: str, input: torch.Tensor, p: float, training: bool = True) -> float:
    """Raise unless `input` is a tensor, `p` a probability and `training` a bool; gives `p` as a float."""
    if not isinstance(input, torch.Tensor):
        check_tensor(op, "input", input)
    if training is not True and training is not False and not isinstance(training, torch.SymBool):
        raise TypeError(f"{op}: training must be True or False, got {type(training).__name__}")
    if type(p) is float and 0.0 <= p <= 1.0:  # the usual case passes without a call
        return p
    p = scalar(p)
    check_number(op, "p", p, 0, 1)
    return float(p)


def run_dropout(
    op: str,
    input: torch.Tensor,
    p: float,
    inplace: bool,
    generator: torch.Generator | None,
    inner: int,
    form: Form,
) -> torch.Tensor:
    """Draw a seed and apply dropout, through autograd only where a derivative is needed; gives the output."""
    check_generator(op, generator)
    seed = None if generator is None else draw_seed_for(p, input.device, generator)
    if fast is not None and not is_compiling():
        try:
            output = fast.dropout(input, p, True, inplace, seed, inner, *constants_of(form, p))
        except ValueError:  # Python's errors, which follow, are of torch's types, too
            output = None
        if output is not None:
            return output
    check_dtype(op, "input", input)
    check_dense(op, "input", input)
    refuse_transformed_parts(op, input)
    if seed is None:
        seed = draw_seed_for(p, input.device)
    if is_sharded(input):
        return _run_on_shards(op, input, p, inplace, seed, inner, form)
    derive = input.requires_grad and torch.is_grad_enabled()
    if inplace:
        if derive and input.is_leaf:
            raise ArgumentError(
                f"{op}: inplace=True cannot overwrite a leaf tensor that requires a gradient; call it with "
                "inplace=False"
            )
        if not is_compiling() and not is_transformed():
            return _run_in_place(op, input, p, seed, inner, form, derive)
    if is_compiling():
        output = torch.ops.fastreg.dropout_traced(input, p, seed, 0, inner, form)[0]
    elif is_transformed():
        output = _by_torch(input, p, seed, 0, inner, *constants_of(form, p))[0]
    elif derive:
        output = _Dropout.apply(input, p, seed, inner, *constants_of(form, p))
    else:
        output = dropout_op(input, p, seed, 0, inner, *constants_of(form, p))[0]
    return input.copy_(output) if inplace else output


def _run_in_place(op, input, p, seed, inner, form, derive):
    check_no_overlap(op, "input", input)
    if input.is_neg():
        raise ArgumentError(
            f"{op}: inplace=True cannot write through a negative view; call it on input.resolve_neg()"
        )
    if derive:
        return _DropoutInPlace.apply(input, p, seed, inner, *constants_of(form, p))
    dropout_inplace_op(input, p, seed, 0, inner, *constants_of(form, p))
    # Otherwise an earlier function that saved `input` would differentiate with the new values.
    torch.autograd.graph.increment_version(input)
    return input


def _run_on_shards(op, input, p, inplace, seed, inner, form):
    """Dropout of a DTensor: every rank draws for its part what it would draw for the whole tensor."""
    mesh, placements = input.device_mesh, input.placements
    if any(placement.is_partial() for placement in placements):
        raise ValueError(
            f"{op}: expected a replicated or sharded DTensor, got {placements}; call .redistribute() first"
        )
    local = local_part(input)
    seed = seed.to(
        local.device
    )  # a GPU's seed is drawn on the CPU, and its ranks may have no way to send that
    seed = seed_of_first_rank(seed, mesh)

    part = own_part(input.shape, mesh, placements)
    output = dropout_of_part(local, p, seed, input.shape, part, inner, form)
    output = one_by_one(op, whole_of_parts(output, mesh, placements, input.shape, input.stride()))
    return input.copy_(output) if inplace else output


def dropout_of_part(
    local: torch.Tensor,
    p: float,
    seed: torch.Tensor,
    shape: torch.Size,
    part: Sequence[slice],
    inner: int,
    form: Form,
) -> torch.Tensor:
    """What dropout makes of the part of a tensor of `shape` when it is applied to the whole."""
    # What is held, counted in decisions: the dimensions that are decided index by index.
    dims = len(shape)
    while dims and shape[dims - 1 :].numel() <= inner:
        dims -= 1
    decided, part = shape[:dims], part[:dims]
    decisions = local.shape[:dims].numel() if local.numel() else 0
    # The mask of that, then dropout by it.
    place = place_in_whole(decided, part)
    if place is not None:
        mask = dropout_mask_op(local, decisions, p, seed, *place)
    else:
        whole = dropout_mask_op(local, decided.numel(), p, seed)
        mask = pack_mask(unpack_mask(whole, decided)[tuple(part)])
    return _Masked.apply(local, mask, max(local.numel() // max(decisions, 1), 1), *constants_of(form, p))


# --- The public functions.


def dropout(
    input: torch.Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    generator: torch.Generator | None = None,
    rescale: Literal["train", "inference"] = "train",
) -> torch.Tensor:
    """Zero each element with probability `p`; drop-in for `torch.nn.functional.dropout`.

    Args:
        input: tensor of any shape and strides; float32, float64, float16 or bfloat16.
        p: probability of zeroing an element, in [0, 1]; exact to 2^-32. 0 returns `input`, 1 gives zeros.
        training: if False, no element is dropped.
        inplace: write the result into `input`.
        generator: torch.Generator on the input's device to draw the seed from; the default generator if None.
        rescale: "train" divides the kept elements by 1 - p while training (inverted dropout). "inference" is
            the textbook form: kept elements stay as they are while training, and everything is multiplied by
            1 - p when `training` is False; `fastreg.nn.fold_dropout` moves that factor into the weights.

    Returns:
        Tensor like `input`, memory format kept. A dropped inf or NaN is 0. Saved for backward: one bit per
        element.

    Raises:
        ValueError: p outside [0, 1] or NaN, unknown `rescale`, a dtype without kernels, or in place on a leaf
            or on an expanded tensor.
        TypeError: `input` is no tensor, `p` no number or `training` no bool.

    Where torch raises a RuntimeError, these are RuntimeErrors, too. A number may be a tensor without
    dimensions or a scalar of NumPy.

    Source: Srivastava et al. 2014 ("train"); Goodfellow et al. 2016, section 7.12 ("inference").
    """
    if fast is not None and generator is None and rescale == "train" and not is_compiling():
        try:
            output = fast.dropout(input, p, training, inplace)
        except ValueError:  # Python's errors, which follow, are of torch's types, too
            output = None
        if output is not None:
            return output
    if is_foreign(input):
        return handed_over(dropout, locals())
    p = check_input("dropout", input, p, training)
    if rescale != "train":
        check_choice("dropout", "rescale", rescale, ("train", "inference"))
        if not training:
            return input.mul_(1 - p) if inplace else input * (1 - p)
    if not training or p == 0 or input.numel() == 0:
        return input
    form: Form = "inverted" if rescale == "train" else "textbook"
    return run_dropout("dropout", input, p, inplace, generator, 1, form)


def dropout_with_mask(
    input: torch.Tensor,
    p: float = 0.5,
    *,
    generator: torch.Generator | None = None,
    seed: int | torch.Tensor | None = None,
    offset: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dropout that returns its mask and takes its seed: for shards, for tests, for a backward pass that you
    write.

    Args:
        input: tensor of any shape; float32, float64, float16 or bfloat16.
        p: probability of zeroing an element, in [0, 1].
        generator: where the seed is drawn from, if `seed` is None.
        seed: an int, or an int64 tensor of one element on the input's device.
        offset: global row-major index of the first element, so that a shard draws what the whole tensor
            would.

    Returns:
        (output, mask): `mask` is uint8 of shape (ceil(numel / 8),), bit i % 8 of byte i // 8 set where
        element i was kept, unused bits 0. `unpack_mask(mask, input.shape)` gives it as booleans.

    Raises:
        ValueError: p outside [0, 1], a negative offset, a seed of another dtype or size, a dtype without
            kernels.
        TypeError: `input` is no tensor, `p` no number, `seed` or `offset` no int.
    """
    if is_foreign(input):
        return handed_over(dropout_with_mask, locals())
    op = "dropout_with_mask"
    p = check_input(op, input, p)
    refuse_transformed_parts(op, input)
    if is_sharded(input):
        raise TypeError(
            f"{op}: input must be a plain tensor, got a DTensor; give it .to_local() and the offset of that "
            "part"
        )
    if not is_int(offset, int):
        raise TypeError(f"{op}: offset must be an int, got {type(offset).__name__}")
    if not 0 <= offset < 2**63:
        raise ValueError(f"{op}: offset must be at least 0 and below 2^63, got {offset}")
    check_generator(op, generator)
    seed = draw_seed_for(p, input.device, generator) if seed is None else _seed_tensor(op, seed, input)
    if is_compiling():
        return torch.ops.fastreg.dropout_traced(input, p, seed, offset, 1, "inverted")
    if is_transformed() or (input.requires_grad and torch.is_grad_enabled()):
        return _differentiable(input, p, seed, offset, 1, "inverted")
    return dropout_op(input, p, seed, offset, 1, *constants_of("inverted", p))


def _seed_tensor(op: str, seed: int | torch.Tensor, input: torch.Tensor) -> torch.Tensor:
    """A seed that the caller gave, on the device of the input."""
    if isinstance(seed, torch.Tensor) and seed.device != input.device:
        raise ValueError(
            f"{op}: seed must be on {input.device} like input, got {seed.device}; move it with "
            ".to(input.device)"
        )
    return seed_tensor(op, seed).to(input.device)
