"""Attention with dropout on its weights, without ever holding all of the weights.

O = dropout(softmax(Q K^T * scale + mask)) V, one block of query rows after another: its scores, their softmax
and its dropout stay in the processor's cache and are overwritten by those of the next block. Kept for the
backward pass are the inputs and the seed; it computes the same blocks with the same mask again. So memory
grows with the number of queries and of keys, and not with their product. Attention: Vaswani et al. 2017,
Attention is all you need; by blocks: Rabe, Staats 2021, Self-attention does not need O(n^2) memory, and Dao
et al. 2022, FlashAttention.

Whether a weight is dropped depends on (seed, its row-major index in (batch, head, query, key)) alone, as
everywhere in fastreg: blocks, threads and shards do not show. Deviation from both sources: a row's keys are
not cut into blocks, because a row of scores fits into the cache of a processor, and so the softmax needs no
running maximum.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ._attention_blocks import (
    attention_backward_op,
    attention_gradient_op,
    attention_op,
    attention_weights_op,
    batch_of,
    flat_batch,
    kept_factor,
    mask_in_numbers,
)
from ._checks import (
    SINGLE_DTYPES,
    ArgumentError,
    arithmetic_dtype,
    check_dense,
    check_dtype,
    check_generator,
    check_number,
    check_tensor,
    scalar,
)
from ._dropout import dropout_mask_op
from ._dropout_masks import unpack_mask
from ._flops import tell_counters
from ._registry import define_composite, fast
from ._seeds import draw_seed
from ._shards import (
    local_part,
    one_by_one,
    own_part,
    refuse_transformed_parts,
    seed_of_first_rank,
    whole_of_parts,
)
from ._transforms import (
    autocast_dtype,
    handed_over,
    is_foreign,
    is_sharded,
    is_transformed,
    is_wrapped,
    without_autocast,
)

# torch's own, also while it is patched.
_torchs = torch.nn.functional.scaled_dot_product_attention

# --- The definition in plain torch.


def attention_plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    kept: Tensor,
    factor: float,
    is_causal: bool,
    scale: float,
) -> Tensor:
    """The output, by way of all weights; a query that may see no key gets 0.

    kept: bool of the weights' shape, (..., L, S). factor: what kept weights are multiplied with.
    """
    wide = arithmetic_dtype(query)
    scores = (query.to(wide) * scale) @ key.to(wide).transpose(-2, -1)
    if attn_mask is not None:
        scores = scores + mask_in_numbers(attn_mask, wide)
    weights = _softmax(scores, is_causal)
    return (torch.where(kept, weights * factor, 0) @ value.to(wide)).to(query.dtype)


def _softmax(scores: Tensor, is_causal: bool) -> Tensor:
    """The weights of scores, 0 for a query that may see no key."""
    if is_causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, -math.inf)
    unseeing = (scores == -math.inf).all(-1, keepdim=True)
    return scores.masked_fill(unseeing, 0).softmax(-1).masked_fill(unseeing, 0)


def _by_torch(query, key, value, attn_mask, p, is_causal, scale, seed, whole=(), start=()):
    """The output by the definition, with the dropout of a seed, and by operators of torch that have every
    derivative. whole, start: as in `_attention_blocks`.
    """
    batch, each = batch_of(query, key, value), (query.shape[-2], key.shape[-2])
    shape = (*(whole or batch), *each)
    kept = unpack_mask(dropout_mask_op(query.detach(), math.prod(shape), p, seed), shape)
    for dim, first in enumerate(start):
        kept = kept.narrow(dim, first, batch[dim])
    return attention_plain(query, key, value, attn_mask, kept, kept_factor(p), is_causal, scale)


# --- Autograd.


class _Attention(torch.autograd.Function):
    """Its backward pass computes the weights again, block by block."""

    @staticmethod
    def forward(ctx, query, key, value, attn_mask, p, is_causal, scale, seed, whole, start):
        output, largest, total = attention_op(
            query, key, value, attn_mask, p, is_causal, scale, seed, whole, start
        )
        ctx.save_for_backward(query, key, value, attn_mask, largest, total, seed)
        ctx.options = p, is_causal, scale
        ctx.part = whole, start
        return output

    @staticmethod
    def backward(ctx, grad):
        tell_counters()
        *inputs, largest, total, seed = ctx.saved_tensors
        wants = "".join(name for name, wanted in zip("qkvm", ctx.needs_input_grad, strict=False) if wanted)
        if torch.is_grad_enabled() or is_transformed() or is_wrapped(grad):
            # For derivatives of derivatives, and of batches of them, by the definition.
            found = _differentiable_gradients(grad, inputs, wants, ctx.options, seed, *ctx.part)
        else:
            gradients = attention_backward_op(
                grad, *inputs, largest, total, *ctx.options, seed, wants, *ctx.part
            )
            found = {name: g for name, g in zip("qkvm", gradients, strict=True) if name in wants}
        return *(found.get(name) for name in "qkvm"), *(None,) * 6


def _differentiable_gradients(grad, inputs, wants, options, seed, whole, start) -> dict[str, Tensor]:
    """The gradients that are wanted, in operations that have derivatives."""
    with torch.enable_grad(), without_autocast(grad.device.type):
        # One input may have been computed from another. Seen through views, none depends on another.
        views: list[Any] = [None if t is None else t.view_as(t) for t in inputs]
        query, key, value, attn_mask = views
        p, is_causal, scale = options
        output = _by_torch(query, key, value, attn_mask, p, is_causal, scale, seed, whole, start)
        wanted = [x for name, x in zip("qkvm", views, strict=True) if name in wants]
        gradients = torch.autograd.grad(output, wanted, grad, create_graph=True)
    return dict(zip(wants, gradients, strict=True))


def _differentiable(query, key, value, attn_mask, p, is_causal, scale, seed) -> Tensor:
    """The output with a derivative; under transforms by torch's operators."""
    if is_transformed():
        with without_autocast(query.device.type):
            return _by_torch(query, key, value, attn_mask, p, is_causal, scale, seed)
    return _Attention.apply(query, key, value, attn_mask, p, is_causal, scale, seed, [], [])


# What torch.compile sees, for the reasons given at dropout_traced.
define_composite(
    "attention_traced(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, float p, bool is_causal, "
    "float scale, Tensor seed) -> Tensor",
    _differentiable,
)


# --- Few weights, all at once.

# At most that many weights are held, which is faster than to compute them again.
_FEW = 2**19
_PLAIN = (Tensor, torch.nn.Parameter)


def _at_once(query, key, value, attn_mask, p, is_causal, scale, seed) -> Tensor:
    """The output by way of all weights; autograd knows the derivatives of the products."""
    dtype, wide = query.dtype, arithmetic_dtype(query)
    if dtype != wide:
        query, key, value = query.to(wide), key.to(wide), value.to(wide)
    scores = torch.matmul(query * scale, key.transpose(-2, -1))
    if attn_mask is not None:
        scores = scores + mask_in_numbers(attn_mask, wide)
    output = torch.matmul(_DroppedSoftmax.apply(scores, p, is_causal, seed), value)
    return output if dtype == wide else output.to(dtype)


class _DroppedSoftmax(torch.autograd.Function):
    """dropout(softmax(scores)) over the last dimension. With is_causal, query i sees the keys up to i. A
    query that may see no key gets 0.
    """

    @staticmethod
    def forward(ctx, scores, p, is_causal, seed):
        scores, dropped = scores.contiguous(), torch.empty_like(scores)
        largest, total = (scores.new_empty(*scores.shape[:-1], 1) for _ in range(2))
        place = None, p, seed, 0, scores.shape[-1], 0 if is_causal else -1, True
        attention_weights_op(
            flat_batch(scores), flat_batch(dropped), *place, flat_batch(largest), flat_batch(total)
        )
        ctx.save_for_backward(scores, largest, total, seed)
        ctx.options = p, is_causal
        return dropped

    @staticmethod
    def backward(ctx, grad):
        scores, largest, total, seed = ctx.saved_tensors
        p, is_causal = ctx.options
        if torch.is_grad_enabled() or is_transformed() or is_wrapped(grad):
            return _differentiable_gradient_of_softmax(grad, scores, p, is_causal, seed), None, None, None
        d_scores = torch.empty_like(scores)
        place = None, p, seed, 0, scores.shape[-1], 0 if is_causal else -1, True
        both = flat_batch(grad.contiguous()), flat_batch(d_scores)
        attention_gradient_op(flat_batch(scores), None, *both, *place, flat_batch(largest), flat_batch(total))
        return d_scores, None, None, None


def _differentiable_gradient_of_softmax(grad, scores, p, is_causal, seed) -> Tensor:
    """The gradient of _DroppedSoftmax in operations that have derivatives."""
    with torch.enable_grad(), without_autocast(grad.device.type):
        scores = scores.view_as(scores)  # so that it depends on nothing that came before
        weights = _softmax(scores, is_causal)
        kept = unpack_mask(dropout_mask_op(scores, scores.numel(), p, seed), scores.shape)
        output = torch.where(kept, weights * kept_factor(p), 0)
        return torch.autograd.grad(output, scores, grad, create_graph=True)[0]


def _are_few(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether to compute all weights at once, by kernels that read memory, which tensors of a mode may not
    have.
    """
    if type(query) not in _PLAIN or not query.is_cpu or torch._C._len_torch_dispatch_stack():
        return False
    heads = math.prod(batch_of(query, key, value))
    return heads * query.shape[-2] * key.shape[-2] <= _FEW


# --- The public function.


def _check(op: str, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None) -> None:
    """Raise unless the tensors fit together. Whether the heads fit is checked by the two functions below."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_dense(op, name, tensor)
        check_dtype(op, name, tensor)
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise ArgumentError(
                f"{op}: {name} must be {query.dtype} on {query.device} as query is, got {tensor.dtype} on "
                f"{tensor.device}; convert it with .to(query)"
            )
        if tensor.dim() < 2:
            raise ArgumentError(
                f"{op}: {name} must have at least 2 dimensions, (..., length, width), got shape "
                f"{tuple(tensor.shape)}; give it the missing ones with .view()"
            )
    if key.shape[-1] != query.shape[-1]:  # (..., S, E)
        raise ArgumentError(
            f"{op}: key must have the width of query, {query.shape[-1]}, got shape {tuple(key.shape)}; "
            "project both to one width"
        )
    if value.shape[-2] != key.shape[-2]:  # (..., S, Ev)
        raise ArgumentError(
            f"{op}: value must have a row for each of the {key.shape[-2]} rows of key, got shape "
            f"{tuple(value.shape)}; take both from the same tokens"
        )
    if attn_mask is None:
        return
    check_dense(op, "attn_mask", attn_mask)
    if attn_mask.dtype not in (torch.bool, torch.float32, query.dtype):
        raise ArgumentError(
            f"{op}: attn_mask must be bool, float32 or {query.dtype} as query is, got {attn_mask.dtype}; "
            "convert it with .bool() or .to(query.dtype)"
        )
    if attn_mask.device != query.device:
        raise ArgumentError(
            f"{op}: attn_mask must be on {query.device} as query is, got {attn_mask.device}; move it with "
            ".to(query.device)"
        )


def _check_broadcast(
    op: str, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, enable_gqa: bool
) -> None:
    """Raise unless the dimensions of the batch and the mask broadcast."""
    shapes = [t.shape[: -3 if enable_gqa else -2] for t in (query, key, value)]
    try:  # torch's function is slow
        batch = shapes[0] if shapes[0] == shapes[1] == shapes[2] else torch.broadcast_shapes(*shapes)
    except RuntimeError:
        hint = "" if enable_gqa else "; where query has more heads, set enable_gqa=True"
        raise ArgumentError(
            f"{op}: the dimensions of query, key and value before the last two must broadcast, got shapes "
            f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}{hint or '; expand them'}"
        ) from None
    if attn_mask is None:
        return
    heads = query.shape[-3:-2] if enable_gqa else ()
    weights = torch.Size((*batch, *heads, query.shape[-2], key.shape[-2]))
    sizes = zip(reversed(attn_mask.shape), reversed(weights), strict=False)
    if attn_mask.dim() > len(weights) or any(size not in (1, want) for size, want in sizes):
        raise ArgumentError(
            f"{op}: attn_mask must broadcast to the weights' shape {tuple(weights)}, got "
            f"{tuple(attn_mask.shape)}; give it the missing dimensions with .unsqueeze()"
        )


def _check_groups(op: str, query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raise unless the heads of key and value can be shared by those of query."""
    if min(t.dim() for t in (query, key, value)) < 3:
        raise ArgumentError(
            f"{op}: with enable_gqa=True the tensors must have at least 3 dimensions, (..., heads, length, "
            f"width), got shapes {tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}; "
            "give them the missing one with .unsqueeze(0)"
        )
    heads = query.shape[-3]
    for name, tensor in (("key", key), ("value", value)):
        if not tensor.shape[-3] or heads % tensor.shape[-3]:
            raise ArgumentError(
                f"{op}: the heads of {name} must divide those of query, {heads}, got {tensor.shape[-3]}; "
                "repeat them so that they do"
            )


def _of_groups(query, key, value, attn_mask, *options) -> Tensor:
    """The output where heads of key and value are shared. They are not copied: the heads of query become
    (groups, heads of a group).
    """
    heads, groups = query.shape[-3], key.shape[-3]
    if value.shape[-3] != groups:  # rare
        key, value = (t.repeat_interleave(heads // t.shape[-3], -3) for t in (key, value))
        return _run(query, key, value, attn_mask, *options)
    query = query.unflatten(-3, (groups, heads // groups))
    if attn_mask is not None and attn_mask.dim() > 2:
        shared = attn_mask.shape[-3] == 1
        attn_mask = attn_mask.unsqueeze(-3) if shared else attn_mask.unflatten(-3, query.shape[-4:-2])
    return _run(query, key.unsqueeze(-3), value.unsqueeze(-3), attn_mask, *options).flatten(-4, -3)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """dropout(softmax(query @ key.T * scale + mask)) @ value; drop-in for
    `torch.nn.functional.scaled_dot_product_attention`.

    With dropout, memory for the forward and the backward pass grows with L and with S, not with L * S as
    torch's does on a CPU; up to 2^19 weights are held, because that is faster. Without dropout torch's own
    function is called.

    Args:
        query: (..., L, E); float32, float64, float16 or bfloat16; any strides.
        key: (..., S, E), of the dtype and on the device of `query`.
        value: (..., S, Ev), likewise. The dimensions before the last two broadcast.
        attn_mask: broadcasts to (..., L, S). bool: True where a query may see a key; float32 or the dtype of
            query: added to the scores, with a gradient.
        dropout_p: probability of dropping a weight, in [0, 1]; exact to 2^-32. There is no training mode: it
            drops whenever it is above 0.
        is_causal: query i sees the keys up to i only; not with a mask.
        scale: of the scores; 1 / sqrt(E) if None.
        enable_gqa: heads of key and value, dimension -3, are shared by as many heads of query as there are
            for each.
        generator: torch.Generator on the query's device to draw the seed from; the default generator if None.

    DTensors may be replicated or sharded in the dimensions before the last two, the mask in any; a plain mask
    is the same on all ranks. A rank computes the heads of query that it holds.

    Returns:
        (..., L, Ev), of the dtype of query, contiguous. A query that may see no key gets 0. Arithmetic is
        float32 (float64 for float64), with one rounding. Kept for backward are the inputs, a seed and two
        numbers a row. The backward pass computes the weights again. Twice differentiable in query, key, value
        and a float mask; second derivatives hold all weights. Under autocast its dtype is taken, as by
        torch's function.

    Raises:
        ValueError: dropout_p outside [0, 1] or NaN; shapes, dtypes or devices that do not fit; a mask and
            is_causal at once; a scale that is not finite; a dtype without kernels.
        TypeError: a tensor that is none, or another argument of the wrong type.

    Where torch raises a RuntimeError, a ValueError is a RuntimeError, too.

    Source: Vaswani et al. 2017; by blocks: Rabe, Staats 2021 and Dao et al. 2022, FlashAttention; dropout:
    Srivastava et al. 2014.
    """
    if fast is not None and enable_gqa is False and generator is None and not is_compiling():
        output = fast.attention(query, key, value, attn_mask, dropout_p, is_causal, scale, _FEW)
        if output is not None:
            return output
    if is_foreign(query, key, value, attn_mask):
        return handed_over(scaled_dot_product_attention, locals())
    op = "scaled_dot_product_attention"
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_tensor(op, name, tensor)
    if attn_mask is not None:
        check_tensor(op, "attn_mask", attn_mask)
    for name, flag in (("is_causal", is_causal), ("enable_gqa", enable_gqa)):
        if not isinstance(flag, bool):
            raise TypeError(f"{op}: {name} must be True or False, got {type(flag).__name__}")
    p, scale = scalar(dropout_p), scalar(scale)
    check_number(op, "dropout_p", p, 0, 1, allow_bool=True)
    if scale is not None:
        check_number(op, "scale", scale, finite=True, allow_bool=True)
    check_generator(op, generator)
    query, key, value, attn_mask = _as_autocast(query, key, value, attn_mask)
    _check(op, query, key, value, attn_mask)
    if is_causal and attn_mask is not None:
        raise ArgumentError(
            f"{op}: attn_mask must be None where is_causal=True, got a mask of shape "
            f"{tuple(attn_mask.shape)}; join them: attn_mask & torch.ones_like(attn_mask).tril()"
        )
    if enable_gqa:
        _check_groups(op, query, key, value)
    _check_broadcast(op, query, key, value, attn_mask, enable_gqa)
    if p == 0:
        return _torchs(query, key, value, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa)
    refuse_transformed_parts(op, query, key, value, attn_mask)
    if scale is None:
        scale = query.shape[-1] ** -0.5 if query.shape[-1] else 1.0  # without a width all scores are 0
    if any(map(is_sharded, (query, key, value, attn_mask))):
        _check_shards(op, query, key, value, enable_gqa)
        run = _run_on_shards
    else:
        run = _of_groups if enable_gqa else _run
    seed = draw_seed(query.device, generator)
    return run(query, key, value, attn_mask, float(p), is_causal, float(scale), seed)


def _run(query, key, value, attn_mask, p, is_causal, scale, seed) -> Tensor:
    """The output, through autograd only where a derivative is needed."""
    arguments = query, key, value, attn_mask, p, is_causal, scale, seed
    if is_compiling():
        return torch.ops.fastreg.attention_traced(*arguments)
    if is_transformed():
        return _differentiable(*arguments)
    tell_counters()
    if _are_few(query, key, value):
        with without_autocast("cpu"):
            return _at_once(*arguments)
    inputs = (t for t in arguments[:4] if t is not None)
    if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
        return _differentiable(*arguments)
    return attention_op(*arguments, [], [])[0]


def _check_shards(op: str, query: Any, key: Any, value: Any, enable_gqa: bool) -> None:
    """Raise unless each rank can work on heads of its own."""
    tensors, lead = (query, key, value), -3 if enable_gqa else -2
    if not all(map(is_sharded, tensors)) or any(
        (t.device_mesh, t.shape[:lead]) != (query.device_mesh, query.shape[:lead]) for t in tensors
    ):
        raise ValueError(
            f"{op}: of DTensors, query, key and value must all be some, on one mesh, with the same "
            f"dimensions before the last {-lead}; make them some with distribute_tensor, or expand them first"
        )
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if any(
            not placement.is_replicate()
            and not (placement.is_shard() and placement.dim % tensor.dim() < tensor.dim() - 2)
            for placement in tensor.placements
        ):
            raise ValueError(
                f"{op}: DTensors must be replicated or sharded in the dimensions before the last two, got "
                f"{name} with {tensor.placements}; call .redistribute() first"
            )


def _run_on_shards(query, key, value, attn_mask, p, is_causal, scale, seed):
    """The output of DTensors: every rank draws for its heads what one process would. It is placed as query
    is, and so are the heads of key and value that a rank takes.
    """
    mesh, placements = query.device_mesh, query.placements
    own = local_part(query)
    seed = seed_of_first_rank(seed.to(own.device), mesh)  # a GPU's seed is drawn on the CPU
    part = own_part(query.shape, mesh, placements)[:-2]
    whole, start = list(query.shape[:-2]), [held.start for held in part]
    if attn_mask is not None:
        attn_mask = _whole_mask(attn_mask, query)
        missing = query.dim() - attn_mask.dim()
        for dim, held in enumerate(part):
            if dim >= missing and attn_mask.shape[dim - missing] > 1:
                attn_mask = attn_mask.narrow(dim - missing, held.start, held.stop - held.start)
    tensors = own, _heads_for(query, key), _heads_for(query, value)
    output = _Attention.apply(*tensors, attn_mask, p, is_causal, scale, seed, whole, start)
    size = torch.Size((*query.shape[:-1], value.shape[-1]))
    return one_by_one("scaled_dot_product_attention", whole_of_parts(output, mesh, placements, size))


def _heads_for(query: Any, tensor: Any) -> Tensor:
    """The heads of key, or of value, that the heads of query on this rank attend to; those that several of
    them share are repeated.
    """
    from torch.distributed.tensor import Partial, Replicate

    mesh, placements = query.device_mesh, list(query.placements)
    if tensor.shape[:-2] == query.shape[:-2]:
        return local_part(tensor, placements)
    heads = query.dim() - 3  # the dimension of the heads
    each = query.shape[heads] // tensor.shape[heads]
    axes = [axis for axis, p in enumerate(placements) if p.is_shard() and p.dim % query.dim() == heads]
    if tensor.shape[heads] % math.prod(mesh.size(axis) for axis in axes) == 0:  # whole groups everywhere
        return local_part(tensor, placements).repeat_interleave(each, heads)
    gradients = [Partial() if axis in axes else p for axis, p in enumerate(placements)]
    placements = [Replicate() if axis in axes else p for axis, p in enumerate(placements)]
    own = own_part(query.shape, mesh, query.placements)[heads]
    taken = torch.arange(own.start, own.stop, device=query.device) // each
    return local_part(tensor, placements, gradients).index_select(heads, taken)


def _whole_mask(attn_mask: Any, query: Any) -> Tensor:
    """The mask, all of it; its gradient is the sum over the ranks that have other heads."""
    from torch.distributed.tensor import Partial, Replicate

    mesh = query.device_mesh
    everywhere = [Replicate()] * mesh.ndim
    if not is_sharded(attn_mask):
        if not attn_mask.requires_grad:
            return attn_mask
        attn_mask = whole_of_parts(attn_mask, mesh, everywhere)
    gradients = [Partial() if placement.is_shard() else Replicate() for placement in query.placements]
    return local_part(attn_mask, everywhere, gradients)


def _as_autocast(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The tensors in the dtype of autocast, where it is on for their device; float64 stays as it is."""
    dtype = autocast_dtype(query.device.type)
    if dtype is None:
        return query, key, value, attn_mask
    query, key, value = (t.to(dtype) if t.dtype in SINGLE_DTYPES else t for t in (query, key, value))
    if attn_mask is not None and attn_mask.dtype in SINGLE_DTYPES:
        attn_mask = attn_mask.to(dtype)
    return query, key, value, attn_mask
