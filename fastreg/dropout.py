"""Dropout and its family on one operator, with a mask of one bit per decision.

y = x / (1 - p) where kept, 0 elsewhere (inverted dropout; Srivastava, Hinton, Krizhevsky, Sutskever, Salakhutdinov 2014), or the
textbook form y = x where kept, with the weights that follow multiplied by 1 - p after training (Goodfellow, Bengio, Courville
2016, section 7.12).

What is drawn for an element depends on (seed, its row-major index) alone: not on device, threads, memory layout or sharding.
"""

import warnings

import torch

from ._library import check_choice, check_number, check_tensor, define, draw_seed

# `inner` neighbouring elements share a decision; kept ones become scale * x + shift, the others `dropped`.
define(
    "dropout(Tensor input, float p, Tensor seed, int offset=0, SymInt inner=1, float scale=1.0, float shift=0.0, "
    "float dropped=0.0) -> (Tensor output, Tensor mask)"
)
define(
    "dropout_(Tensor(a!) input, float p, Tensor seed, int offset=0, SymInt inner=1, float scale=1.0, float shift=0.0, "
    "float dropped=0.0) -> Tensor mask"
)
define("dropout_apply(Tensor input, Tensor mask, SymInt inner=1, float scale=1.0, float shift=0.0, float dropped=0.0) -> Tensor")


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


class _Apply(torch.autograd.Function):
    """grad * scale where kept: linear in grad, so its own derivative is itself."""

    @staticmethod
    def forward(ctx, grad, mask, inner, scale):
        ctx.save_for_backward(mask)
        ctx.inner, ctx.scale = inner, scale
        return _dropout_apply(grad, mask, inner, scale)

    @staticmethod
    def backward(ctx, grad):
        return _Apply.apply(grad, *ctx.saved_tensors, ctx.inner, ctx.scale), None, None, None


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, p, seed, offset, inner, scale, shift, dropped, inplace):
        if inplace:
            mask = _dropout_(input, p, seed, offset, inner, scale, shift, dropped)
            output = input
            ctx.mark_dirty(input)
        else:
            output, mask = _dropout(input, p, seed, offset, inner, scale, shift, dropped)
        ctx.save_for_backward(mask)
        ctx.mark_non_differentiable(mask)
        ctx.set_materialize_grads(False)
        ctx.inner, ctx.scale = inner, scale
        return output, mask

    @staticmethod
    def backward(ctx, grad, _):
        if grad is None:
            return (None,) * 9
        run = _Apply.apply if torch.is_grad_enabled() else _dropout_apply
        return run(grad, *ctx.saved_tensors, ctx.inner, ctx.scale), *(None,) * 8


def _run(op, input, p, inplace, seed, offset, inner, scale, shift=0.0, dropped=0.0):
    """The operator, through autograd only where a gradient is needed; gives (output, mask)."""
    if input.requires_grad and torch.is_grad_enabled():
        if inplace and input.is_leaf:
            raise ValueError(
                f"{op}: inplace=True cannot overwrite a leaf tensor that requires a gradient; call it with inplace=False"
            )
        return _Dropout.apply(input, p, seed, offset, inner, scale, shift, dropped, inplace)
    if inplace:
        return input, _dropout_(input, p, seed, offset, inner, scale, shift, dropped)
    return _dropout(input, p, seed, offset, inner, scale, shift, dropped)


def _check(op, input, p):
    check_tensor(op, "input", input)
    if type(p) is not float or not 0.0 <= p <= 1.0:  # the usual case passes without a call
        check_number(op, "p", p, 0, 1)


def _inverse(keep):
    return 1.0 / keep if keep > 0 else 0.0


def dropout(input, p=0.5, training=True, inplace=False, *, generator=None, rescale="train"):
    """Zero each element with probability `p`; drop-in for `torch.nn.functional.dropout`.

    Args:
        input: tensor of any shape and strides; float32, float64, float16 or bfloat16.
        p: probability of zeroing an element, in [0, 1]; exact to 2^-32. 0 returns `input`, 1 gives zeros.
        training: if False, no element is dropped.
        inplace: write the result into `input`.
        generator: torch.Generator on the input's device to draw the seed from; the default generator if None.
        rescale: "train" divides the kept elements by 1 - p while training (inverted dropout). "inference" is the textbook form:
            kept elements stay as they are while training, and everything is multiplied by 1 - p when `training` is False;
            `fastreg.nn.fold_dropout` moves that factor into the weights.

    Returns:
        Tensor like `input`, memory format kept. A dropped inf or NaN is 0. Saved for backward: one bit per element.

    Raises:
        ValueError: p outside [0, 1] or NaN, unknown `rescale`, a dtype without kernels, or in place on a leaf or on an expanded
            tensor.
        TypeError: `input` is no tensor or `p` no number.

    Source: Srivastava et al. 2014 ("train"); Goodfellow et al. 2016, section 7.12 ("inference").
    """
    _check("dropout", input, p)
    if rescale != "train":
        check_choice("dropout", "rescale", rescale, ("train", "inference"))
        if not training:
            return input.mul_(1 - p) if inplace else input * (1 - p)
    if not training or p == 0 or input.numel() == 0:
        return input
    scale = _inverse(1.0 - p) if rescale == "train" else 1.0
    return _run("dropout", input, p, inplace, draw_seed(input.device, generator), 0, 1, scale)[0]


def dropout_with_mask(input, p=0.5, *, generator=None, seed=None, offset=0):
    """Dropout that gives its mask and takes its seed: for shards, for tests, for a backward pass of one's own.

    Args:
        input: tensor of any shape; float32, float64, float16 or bfloat16.
        p: probability of zeroing an element, in [0, 1].
        generator: where the seed is drawn from, if `seed` is None.
        seed: an int, or an int64 tensor of one element on the input's device.
        offset: global row-major index of the first element, so that a shard draws what the whole tensor would.

    Returns:
        (output, mask): `mask` is uint8 of shape (ceil(numel / 8),), bit i % 8 of byte i // 8 set where element i was kept,
        unused bits 0. `unpack_mask(mask, input.shape)` gives it as booleans.

    Raises:
        ValueError: p outside [0, 1], a negative offset, a seed of another dtype or size, a dtype without kernels.
        TypeError: `input` is no tensor, `p` no number, `seed` or `offset` no int.
    """
    _check("dropout_with_mask", input, p)
    if not isinstance(offset, int):
        raise TypeError(f"dropout_with_mask: offset must be an int, got {type(offset).__name__}")
    if offset < 0:
        raise ValueError(f"dropout_with_mask: offset must be at least 0, got {offset}")
    if seed is None:
        seed = draw_seed(input.device, generator)
    elif isinstance(seed, int) and not isinstance(seed, bool):
        seed = torch.tensor([(seed + 2**63) % 2**64 - 2**63], device=input.device)
    elif not isinstance(seed, torch.Tensor):
        raise TypeError(f"dropout_with_mask: seed must be an int or an int64 tensor, got {type(seed).__name__}")
    return _run("dropout_with_mask", input, p, False, seed, offset, 1, _inverse(1.0 - p))


def pack_mask(mask):
    """Pack a bool tensor of any shape into uint8 of shape (ceil(numel / 8),): bit i % 8 of byte i // 8 is element i.

    Raises:
        TypeError: `mask` is no bool tensor.
    """
    check_tensor("pack_mask", "mask", mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"pack_mask: mask must be a bool tensor, got {mask.dtype}; compare it with != 0 first")
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
        raise ValueError(f"unpack_mask: mask must have shape ({(numel + 7) // 8},) for {tuple(shape)}, got {tuple(mask.shape)}")
    bits = (mask.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8, device=mask.device)) & 1
    return bits.view(-1)[:numel].view(shape).bool()


def _channels(input, batch_dims):
    """Elements per decision, where the first `batch_dims` dimensions are decided one by one."""
    decisions = 1
    for size in input.shape[:batch_dims]:
        decisions *= size
    return input.numel() // max(decisions, 1)


def _feature_dropout(op, input, p, training, inplace, generator, dims, batch_dims):
    _check(op, input, p)
    if input.dim() not in dims:
        expected = " or ".join(f"{d}-D" for d in dims)
        raise ValueError(f"{op}: input must be {expected}, got {input.dim()}-D of shape {tuple(input.shape)}")
    if not training or p == 0 or input.numel() == 0:
        return input
    inner = _channels(input, batch_dims)
    return _run(op, input, p, inplace, draw_seed(input.device, generator), 0, inner, _inverse(1.0 - p))[0]


def dropout1d(input, p=0.5, training=True, inplace=False, *, generator=None):
    """Zero whole channels of (N, C, L) or (C, L) with probability `p`; drop-in for `torch.nn.functional.dropout1d`.

    Arguments, dtypes and errors as in `dropout`; one bit per channel is saved for backward.
    Source: Tompson et al. 2015, Efficient object localization using convolutional networks.
    """
    check_tensor("dropout1d", "input", input)
    return _feature_dropout("dropout1d", input, p, training, inplace, generator, (2, 3), input.dim() - 1)


def dropout2d(input, p=0.5, training=True, inplace=False, *, generator=None):
    """Zero whole channels of (N, C, H, W) with probability `p`; drop-in for `torch.nn.functional.dropout2d`.

    As in torch, a 3-D input is taken as (N, C, L), with a warning. Arguments, dtypes and errors as in `dropout`.
    Source: Tompson et al. 2015, Efficient object localization using convolutional networks.
    """
    check_tensor("dropout2d", "input", input)
    if input.dim() != 4:
        warnings.warn(
            f"dropout2d: a {input.dim()}-D input is taken as (N, C, ...), as torch does; use dropout1d for (N, C, L)",
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
    return _feature_dropout("dropout3d", input, p, training, inplace, generator, range(1, 64), 2 if input.dim() == 5 else 1)


# SELU's lower asymptote, -scale * alpha (Klambauer et al. 2017).
_SELU_FLOOR = -1.7580993408473766


def _alpha_dropout(op, input, p, training, inplace, generator, inner):
    if not training or p == 0 or input.numel() == 0:
        return input
    if p == 1:
        a, shift = 0.0, 0.0  # as torch: all zeros
    else:
        a = ((_SELU_FLOOR**2 * p + 1) * (1 - p)) ** -0.5
        shift = -a * p * _SELU_FLOOR
    return _run(op, input, p, inplace, draw_seed(input.device, generator), 0, inner, a, shift, a * _SELU_FLOOR + shift)[0]


def alpha_dropout(input, p=0.5, training=False, inplace=False, *, generator=None):
    """Set elements to SELU's negative saturation and rescale, so that zero mean and unit variance are kept.

    Drop-in for `torch.nn.functional.alpha_dropout`; note that `training` is False by default, as there. Arguments, dtypes and
    errors as in `dropout`.
    Source: Klambauer, Unterthiner, Mayr, Hochreiter 2017, Self-normalizing neural networks.
    """
    _check("alpha_dropout", input, p)
    return _alpha_dropout("alpha_dropout", input, p, training, inplace, generator, 1)


def feature_alpha_dropout(input, p=0.5, training=False, inplace=False, *, generator=None):
    """`alpha_dropout` of whole channels of (N, C, ...); drop-in for `torch.nn.functional.feature_alpha_dropout`.

    Arguments, dtypes and errors as in `dropout`, and a ValueError for an input of fewer than two dimensions.
    Source: Klambauer et al. 2017, Self-normalizing neural networks.
    """
    _check("feature_alpha_dropout", input, p)
    if input.dim() < 2:
        raise ValueError(f"feature_alpha_dropout: input must be (N, C, ...), got shape {tuple(input.shape)}")
    return _alpha_dropout("feature_alpha_dropout", input, p, training, inplace, generator, _channels(input, 2))


def drop_path(input, p=0.5, training=True, inplace=False, *, scale_by_keep=True, generator=None):
    """Stochastic depth: zero whole samples of (N, ...), the residual branch of a sample, with probability `p`.

    Args:
        input: tensor of at least one dimension; dtypes as in `dropout`.
        scale_by_keep: divide the kept samples by 1 - p, so that the mean is kept.

    Other arguments and errors as in `dropout`.
    Source: Huang, Sun, Liu, Sedra, Weinberger 2016, Deep networks with stochastic depth.
    """
    _check("drop_path", input, p)
    if input.dim() == 0:
        raise ValueError("drop_path: input must be (N, ...), got a tensor without dimensions")
    if not training or p == 0 or input.numel() == 0:
        return input
    scale = _inverse(1.0 - p) if scale_by_keep else 1.0
    return _run("drop_path", input, p, inplace, draw_seed(input.device, generator), 0, _channels(input, 1), scale)[0]
