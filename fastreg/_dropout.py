"""Dropout and its family on one operator, with a mask of one bit per decision.

y = x / (1 - p) where kept, 0 elsewhere (inverted dropout; Srivastava, Hinton, Krizhevsky, Sutskever,
Salakhutdinov 2014), or the textbook form y = x where kept, with the weights that follow multiplied by 1 - p
after training (Goodfellow, Bengio, Courville 2016, section 7.12).

What is drawn for an element depends on (seed, its row-major index) alone: not on device, threads, memory
layout or sharding.
"""

import warnings

import torch
from torch.compiler import is_compiling

from ._checks import check_choice, check_number, check_tensor
from ._registry import define, define_composite, fast
from ._seeds import draw_seed

# `inner` neighbouring elements share a decision; kept ones become scale * x + shift, the others `dropped`.
define(
    "dropout(Tensor input, float p, Tensor seed, int offset=0, SymInt inner=1, float scale=1.0, float "
    "shift=0.0, "
    "float dropped=0.0) -> (Tensor output, Tensor mask)"
)
define(
    "dropout_(Tensor(a!) input, float p, Tensor seed, int offset=0, SymInt inner=1, float scale=1.0, float "
    "shift=0.0, "
    "float dropped=0.0) -> Tensor mask"
)
define(
    "dropout_apply(Tensor input, Tensor mask, SymInt inner=1, float scale=1.0, float shift=0.0, float "
    "dropped=0.0) -> Tensor"
)


def _empty_mask(input, inner):
    return input.new_empty(((input.numel() // inner + 7) // 8,), dtype=torch.uint8)


@torch.library.register_fake("fastreg::dropout")
def _(input, p, seed, offset=0, inner=1, scale=1.0, shift=0.0, dropped=0.0):
    return torch.empty_like(input), _empty_mask(input, inner)


@torch.library.register_fake("fastreg::dropout_")
def _(input, p, seed, offset=0, inner=1, scale=1.0, shift=0.0, dropped=0.0):
    return _empty_mask(input, inner)


@torch.library.register_fake("fastreg::dropout_apply")
def _(input, mask, inner=1, scale=1.0, shift=0.0, dropped=0.0):
    return torch.empty_like(input)


_dropout = torch.ops.fastreg.dropout.default
_dropout_ = torch.ops.fastreg.dropout_.default
_dropout_apply = torch.ops.fastreg.dropout_apply.default


# SELU's lower asymptote, -scale * alpha (Klambauer et al. 2017).
_SELU_FLOOR = -1.7580993408473766


def _constants(form, p):
    """(scale, shift, dropped): kept elements become scale * x + shift, the others `dropped`."""
    if form == "plain":
        return 1.0, 0.0, 0.0
    if form == "alpha":
        if p == 1:  # as torch: all zeros
            return 0.0, 0.0, 0.0
        scale = ((_SELU_FLOOR**2 * p + 1) * (1 - p)) ** -0.5
        shift = -scale * p * _SELU_FLOOR
        return scale, shift, scale * _SELU_FLOOR + shift
    # The inverse of the probability that is drawn with, a multiple of 2^-32: the mean is exact even where p
    # is next to 1.
    threshold = int((1.0 - p) * 2**32 + 0.5)
    return 2**32 / threshold if threshold else 0.0, 0.0, 0.0


class _Masked(torch.autograd.Function):
    """scale * x + shift where kept, of a given mask; its derivative is a function of the same kind."""

    @staticmethod
    def forward(ctx, input, mask, inner, scale, shift=0.0, dropped=0.0):
        ctx.save_for_backward(mask)
        ctx.inner, ctx.scale = inner, scale
        return _dropout_apply(input, mask, inner, scale, shift, dropped)

    @staticmethod
    def backward(ctx, grad):
        return _backward(ctx, grad), None, None, None, None, None


def _backward(ctx, grad):
    run = _Masked.apply if torch.is_grad_enabled() else _dropout_apply
    return run(grad, *ctx.saved_tensors, ctx.inner, ctx.scale)


class _Dropout(torch.autograd.Function):
    """The usual case, kept thin: of a small tensor's time most is spent here."""

    @staticmethod
    def forward(ctx, input, p, seed, inner, scale, shift, dropped):
        output, mask = _dropout(input, p, seed, 0, inner, scale, shift, dropped)
        ctx.save_for_backward(mask)
        ctx.inner, ctx.scale = inner, scale
        return output

    @staticmethod
    def backward(ctx, grad):
        return _backward(ctx, grad), None, None, None, None, None, None


class _DropoutInPlace(torch.autograd.Function):
    """One output only: autograd takes no in-place function of a view that has more."""

    @staticmethod
    def forward(ctx, input, p, seed, inner, scale, shift, dropped):
        ctx.save_for_backward(_dropout_(input, p, seed, 0, inner, scale, shift, dropped))
        ctx.mark_dirty(input)
        ctx.inner, ctx.scale = inner, scale
        return input

    @staticmethod
    def backward(ctx, grad):
        return _backward(ctx, grad), None, None, None, None, None, None


class _DropoutWithMask(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, p, seed, offset, inner, scale, shift, dropped):
        output, mask = _dropout(input, p, seed, offset, inner, scale, shift, dropped)
        ctx.save_for_backward(mask)
        ctx.mark_non_differentiable(mask)
        ctx.set_materialize_grads(False)  # or backward would be given zeros of the mask's size
        ctx.inner, ctx.scale = inner, scale
        return output, mask

    @staticmethod
    def backward(ctx, grad, _):
        return grad if grad is None else _backward(ctx, grad), None, None, None, None, None, None, None


def _transformed():
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def _by_torch(input, p, seed, offset, inner, scale, shift, dropped):
    """(output, mask) from torch's own operators on our mask: they know every transform of torch.func and
    forward-mode derivatives, compiled or not; an autograd.Function that does is slow, and inlined without its
    derivative by torch.compile."""
    mask = _dropout(input.detach(), p, seed, offset, inner)[1]
    decisions = input.numel() // inner
    kept = unpack_mask(mask, (decisions, 1)).expand(decisions, inner).reshape(input.shape)
    value = (input if input.dtype == torch.float64 else input.float()) * scale
    return torch.where(kept, value + shift if shift else value, dropped).to(input.dtype), mask


def _on_shards(op, input, p, inplace, seed, inner, form):
    """On a DTensor: every rank draws for its part what it would draw for the whole tensor."""
    from torch.distributed import broadcast
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = input.device_mesh, input.placements
    if any(placement.is_partial() for placement in placements):
        raise ValueError(
            f"{op}: expected a replicated or sharded DTensor, got {placements}; call .redistribute() first"
        )
    for group in mesh.get_all_groups():  # ranks seed their generators alike or not: rank 0 decides
        broadcast(seed, group=group, group_src=0)
    local = input.to_local()
    dims = input.dim()
    while dims and input.shape[dims - 1 :].numel() <= inner:
        dims -= 1
    shape, start = (
        numbers[:dims] for numbers in compute_local_shape_and_global_offset(input.shape, mesh, placements)
    )
    decided, whole = input.shape[:dims], torch.Size(shape)
    decisions = whole.numel()
    if not local.numel():
        mask, decisions = local.new_empty(0, dtype=torch.uint8), 1
    elif whole[1:] == decided[1:]:  # a run of the whole tensor's decisions
        first = start[0] * decided[1:].numel() if dims else 0
        mask = _dropout(local.new_empty(1).expand(decisions), p, seed, first)[1]
    else:
        kept = unpack_mask(_dropout(local.new_empty(1).expand(decided.numel()), p, seed)[1], decided)
        mask = pack_mask(kept[tuple(slice(i, i + n) for i, n in zip(start, shape, strict=True))])
    output = _Masked.apply(local, mask, max(local.numel() // decisions, 1), *_constants(form, p))
    output = DTensor.from_local(
        output, mesh, placements, run_check=False, shape=input.shape, stride=input.stride()
    )
    return input.copy_(output) if inplace else output


def _run(op, input, p, inplace, generator, inner, form):
    """The operator, through autograd only where a derivative is needed; gives the output."""
    seed = None if generator is None else draw_seed(input.device, generator)
    if fast is not None and not is_compiling():
        output = fast.dropout(input, p, True, inplace, seed, inner, *_constants(form, p))
        if output is not None:
            return output
    if seed is None:
        seed = draw_seed(input.device)
    if type(input) is not torch.Tensor and hasattr(input, "device_mesh"):
        return _on_shards(op, input, p, inplace, seed, inner, form)
    derive = input.requires_grad and torch.is_grad_enabled()
    if inplace:
        if derive and input.is_leaf:
            raise ValueError(
                f"{op}: inplace=True cannot overwrite a leaf tensor that requires a gradient; call it with "
                f"inplace=False"
            )
        if not is_compiling() and not _transformed():
            return _run_in_place(op, input, p, seed, inner, form, derive)
    if is_compiling():
        output = torch.ops.fastreg.dropout_traced(input, p, seed, 0, inner, form)[0]
    elif _transformed():
        output = _by_torch(input, p, seed, 0, inner, *_constants(form, p))[0]
    elif derive:
        output = _Dropout.apply(input, p, seed, inner, *_constants(form, p))
    else:
        output = _dropout(input, p, seed, 0, inner, *_constants(form, p))[0]
    return input.copy_(output) if inplace else output


def _traced(input, p, seed, offset, inner, form):
    if _transformed():
        return _by_torch(input, p, seed, offset, inner, *_constants(form, p))
    return _DropoutWithMask.apply(input, p, seed, offset, inner, *_constants(form, p))


# What torch.compile sees. Where it looks into an autograd.Function it stumbles over floats that it takes for
# variables (two dropouts under dynamic=True), computes with them inexactly, and loses the derivative under
# torch.func.grad; an operator is left to AOTAutograd, which does none of that.
define_composite(
    "dropout_traced(Tensor input, float p, Tensor seed, int offset, SymInt inner, str form) -> (Tensor "
    "output, Tensor mask)",
    _traced,
)


def _run_in_place(op, input, p, seed, inner, form, derive):
    if input.is_neg():
        raise ValueError(
            f"{op}: inplace=True cannot write through a negative view; call it on input.resolve_neg()"
        )
    if derive:
        return _DropoutInPlace.apply(input, p, seed, inner, *_constants(form, p))
    _dropout_(input, p, seed, 0, inner, *_constants(form, p))
    # Or an earlier function that saved `input` would differentiate with the new values.
    torch.autograd.graph.increment_version(input)
    return input


def _check(op, input, p):
    """Raise unless `input` is a tensor and `p` a probability; gives `p` as a float."""
    if not isinstance(input, torch.Tensor):
        check_tensor(op, "input", input)
    if type(p) is float and 0.0 <= p <= 1.0:  # the usual case passes without a call
        return p
    check_number(op, "p", p, 0, 1)
    return float(p)


def dropout(input, p=0.5, training=True, inplace=False, *, generator=None, rescale="train"):
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
        TypeError: `input` is no tensor or `p` no number.

    Source: Srivastava et al. 2014 ("train"); Goodfellow et al. 2016, section 7.12 ("inference").
    """
    if fast is not None and generator is None and rescale == "train" and not is_compiling():
        output = fast.dropout(input, p, training, inplace)
        if output is not None:
            return output
    p = _check("dropout", input, p)
    if rescale != "train":
        check_choice("dropout", "rescale", rescale, ("train", "inference"))
        if not training:
            return input.mul_(1 - p) if inplace else input * (1 - p)
    if not training or p == 0 or input.numel() == 0:
        return input
    form = "inverted" if rescale == "train" else "plain"
    return _run("dropout", input, p, inplace, generator, 1, form)


def dropout_with_mask(input, p=0.5, *, generator=None, seed=None, offset=0):
    """Dropout that gives its mask and takes its seed: for shards, for tests, for a backward pass of one's
    own.

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
    op = "dropout_with_mask"
    p = _check(op, input, p)
    if type(input) is not torch.Tensor and hasattr(input, "device_mesh"):
        raise TypeError(
            f"{op}: input must be a plain tensor, got a DTensor; give it .to_local() and the offset of that "
            f"part"
        )
    if not isinstance(offset, int) or isinstance(offset, bool):
        raise TypeError(f"{op}: offset must be an int, got {type(offset).__name__}")
    if not 0 <= offset < 2**63:
        raise ValueError(f"{op}: offset must be at least 0 and below 2^63, got {offset}")
    if seed is None:
        seed = draw_seed(input.device, generator)
    elif isinstance(seed, int) and not isinstance(seed, bool):
        seed = torch.tensor([(seed + 2**63) % 2**64 - 2**63], device=input.device)
    elif not isinstance(seed, torch.Tensor):
        raise TypeError(f"{op}: seed must be an int or an int64 tensor, got {type(seed).__name__}")
    elif seed.device != input.device:
        raise ValueError(
            f"{op}: seed must be on {input.device} like input, got {seed.device}; move it with "
            f".to(input.device)"
        )
    elif seed.dtype != torch.int64 or seed.numel() != 1:
        raise ValueError(
            f"{op}: seed must be an int or one int64, got {seed.dtype} of shape {tuple(seed.shape)}; "
            "draw it with torch.randint(-(2**63), 2**63 - 1, (1,))"
        )
    if is_compiling():
        return torch.ops.fastreg.dropout_traced(input, p, seed, offset, 1, "inverted")
    if _transformed() or (input.requires_grad and torch.is_grad_enabled()):
        return _traced(input, p, seed, offset, 1, "inverted")
    return _dropout(input, p, seed, offset, 1, *_constants("inverted", p))


def pack_mask(mask):
    """Pack a bool tensor of any shape into uint8 of shape (ceil(numel / 8),): bit i % 8 of byte i // 8 is
    element i.

    Raises:
        TypeError: `mask` is no bool tensor.
    """
    check_tensor("pack_mask", "mask", mask)
    if mask.dtype != torch.bool:
        raise TypeError(
            f"pack_mask: mask must be a bool tensor, got {mask.dtype}; compare it with != 0 first"
        )
    bits = torch.nn.functional.pad(mask.reshape(-1).to(torch.uint8), (0, -mask.numel() % 8)).view(-1, 8)
    return (bits << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(1, dtype=torch.uint8)


def unpack_mask(mask, shape):
    """Unpack a packed mask, uint8 of shape (ceil(numel / 8),), into a bool tensor of `shape`.

    Raises:
        ValueError: `mask` does not have the size that `shape` needs.
        TypeError: `mask` is no uint8 tensor.
    """
    check_tensor("unpack_mask", "mask", mask)
    if mask.dtype != torch.uint8:
        raise TypeError(f"unpack_mask: mask must be a uint8 tensor, got {mask.dtype}")
    numel = torch.Size(shape).numel()
    if mask.shape != ((numel + 7) // 8,):
        raise ValueError(
            f"unpack_mask: mask must have shape ({(numel + 7) // 8},) for {tuple(shape)}, got "
            f"{tuple(mask.shape)}"
        )
    bits = (mask.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8, device=mask.device)) & 1
    return bits.view(-1)[:numel].view(shape).bool()


def _channels(input, batch_dims):
    """Elements per decision, where the first `batch_dims` dimensions are decided one by one."""
    decisions = 1
    for size in input.shape[:batch_dims]:
        decisions *= size
    return input.numel() // max(decisions, 1)


def _feature_dropout(op, input, p, training, inplace, generator, dims, batch_dims):
    p = _check(op, input, p)
    if input.dim() not in dims:
        expected = " or ".join(f"{d}-D" for d in dims)
        raise ValueError(f"{op}: input must be {expected}, got {input.dim()}-D of shape {tuple(input.shape)}")
    if not training or p == 0 or input.numel() == 0:
        return input
    inner = _channels(input, batch_dims)
    return _run(op, input, p, inplace, generator, inner, "inverted")


def dropout1d(input, p=0.5, training=True, inplace=False, *, generator=None):
    """Zero whole channels of (N, C, L) or (C, L) with probability `p`; drop-in for
    `torch.nn.functional.dropout1d`.

    Arguments, dtypes and errors as in `dropout`; one bit per channel is saved for backward.
    Source: Tompson et al. 2015, Efficient object localization using convolutional networks.
    """
    check_tensor("dropout1d", "input", input)
    return _feature_dropout("dropout1d", input, p, training, inplace, generator, (2, 3), input.dim() - 1)


def dropout2d(input, p=0.5, training=True, inplace=False, *, generator=None):
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


def dropout3d(input, p=0.5, training=True, inplace=False, *, generator=None):
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


def _alpha_dropout(op, input, p, training, inplace, generator, inner):
    if not training or p == 0 or input.numel() == 0:
        return input
    return _run(op, input, p, inplace, generator, inner, "alpha")


def alpha_dropout(input, p=0.5, training=False, inplace=False, *, generator=None):
    """Set elements to SELU's negative saturation and rescale, so that zero mean and unit variance are kept.

    Drop-in for `torch.nn.functional.alpha_dropout`; note that `training` is False by default, as there.
    Arguments, dtypes and errors as in `dropout`.
    Source: Klambauer, Unterthiner, Mayr, Hochreiter 2017, Self-normalizing neural networks.
    """
    p = _check("alpha_dropout", input, p)
    return _alpha_dropout("alpha_dropout", input, p, training, inplace, generator, 1)


def feature_alpha_dropout(input, p=0.5, training=False, inplace=False, *, generator=None):
    """`alpha_dropout` of whole channels of (N, C, ...); drop-in for
    `torch.nn.functional.feature_alpha_dropout`.

    Arguments, dtypes and errors as in `dropout`, and a ValueError for an input of fewer than two dimensions.
    Source: Klambauer et al. 2017, Self-normalizing neural networks.
    """
    p = _check("feature_alpha_dropout", input, p)
    if input.dim() < 2:
        raise ValueError(f"feature_alpha_dropout: input must be (N, C, ...), got shape {tuple(input.shape)}")
    return _alpha_dropout(
        "feature_alpha_dropout", input, p, training, inplace, generator, _channels(input, 2)
    )


def drop_path(input, p=0.5, training=True, inplace=False, *, scale_by_keep=True, generator=None):
    """Stochastic depth: zero whole samples of (N, ...), the residual branch of a sample, with probability
    `p`.

    Args:
        input: tensor of at least one dimension; dtypes as in `dropout`.
        scale_by_keep: divide the kept samples by 1 - p, so that the mean is kept.

    Other arguments and errors as in `dropout`.
    Source: Huang, Sun, Liu, Sedra, Weinberger 2016, Deep networks with stochastic depth.
    """
    p = _check("drop_path", input, p)
    if input.dim() == 0:
        raise ValueError("drop_path: input must be (N, ...), got a tensor without dimensions")
    if not training or p == 0 or input.numel() == 0:
        return input
    form = "inverted" if scale_by_keep else "plain"
    return _run("drop_path", input, p, inplace, generator, _channels(input, 1), form)
