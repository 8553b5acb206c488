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
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ._checks import (
    ArgumentError,
    arithmetic_dtype,
    check_dense,
    check_dtype,
    check_generator,
    check_number,
    check_tensor,
    scalar,
)
from ._dropout import constants_of, dropout_inplace_op, dropout_op, dropout_with_mask
from ._dropout_masks import unpack_mask
from ._registry import define_composite, define_kernel, fast
from ._seeds import draw_seed
from ._shards import own_part, seed_of_first_rank
from ._transforms import autocast_dtype, is_sharded, is_transformed, without_autocast

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
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        scores = scores + attn_mask.to(wide)
    elif attn_mask is not None:
        scores = scores + torch.zeros_like(attn_mask, dtype=wide).masked_fill(~attn_mask, -math.inf)
    if is_causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, -math.inf)
    unseeing = (scores == -math.inf).all(-1, keepdim=True)
    weights = scores.masked_fill(unseeing, 0).softmax(-1).masked_fill(unseeing, 0)
    return (torch.where(kept, weights * factor, 0) @ value.to(wide)).to(query.dtype)


def _by_torch(query, key, value, attn_mask, p, is_causal, scale, seed, whole=(), start=()):
    """The definition with the mask of a seed; whole, start: as in `_first_heads`.

    The operator of dropout only draws. torch's operators do the rest, because they know every derivative.
    """
    batch, each = _batch_of(query, key, value), (query.shape[-2], key.shape[-2])
    shape = (*(whole or batch), *each)
    one = torch.empty(1, dtype=torch.float32, device=query.device)
    mask = dropout_op(one.expand(math.prod(shape)), p, seed)[1]
    kept = unpack_mask(mask, shape)
    for dim, first in enumerate(start):
        kept = kept.narrow(dim, first, batch[dim])
    return attention_plain(query, key, value, attn_mask, kept, _factor(p), is_causal, scale)


def _batch_of(*tensors: Tensor) -> torch.Size:
    first = tensors[0].shape[:-2]
    if all(t.shape[:-2] == first for t in tensors):  # torch's function is slow
        return first
    return torch.broadcast_shapes(*(t.shape[:-2] for t in tensors))


def _factor(p: float) -> float:
    return constants_of("inverted", p)[0]


# --- What is done to a block of scores between its matrix products: one sweep on the CPU, by the kernels in
# csrc/attention, and the same in torch's operators on every other device.


def _weights_in_torch(scores, mask, p, seed, first_row, keys, query, largest, total) -> None:
    """Turn scores into dropped weights that are not divided by their sums, and give a row's largest score and
    its sum.
    """
    _add_masks(scores, mask, query)
    torch.amax(scores, -1, keepdim=True, out=largest)
    largest.clamp_(min=torch.finfo(scores.dtype).min)  # or -inf less -inf would be NaN
    scores.sub_(largest).exp_()
    torch.sum(scores, -1, keepdim=True, out=total)
    total.clamp_(min=1)  # it is at least 1, but where a query may see no key: there 0 is divided
    scores.copy_(_dropped(scores, p, seed, first_row, keys))


def _gradient_in_torch(scores, gradients, mask, p, seed, first_row, keys, query, largest, total) -> None:
    """Turn scores into dropped weights again, and the gradient of those into that of the scores.

    With the weights W and the dropped weights D it is D * gradients - W * (sum of D * gradients) / total.
    """
    _add_masks(scores, mask, query)
    weights = scores.sub_(largest).exp_()
    dropped = _dropped(weights, p, seed, first_row, keys)
    if gradients is not None:
        gradients.mul_(dropped)
        gradients.addcmul_(weights, gradients.sum(-1, keepdim=True).div_(total), value=-1)
    scores.copy_(dropped)


def _add_masks(scores: Tensor, mask: Tensor | None, query: int) -> None:
    """query: as the kernels have it, the place of the first row in its head where attention is causal."""
    if mask is not None and mask.dtype == torch.bool:
        scores.masked_fill_(~mask, -math.inf)
    elif mask is not None:
        scores.add_(mask)
    if query >= 0:
        scores.masked_fill_(torch.ones_like(scores[0], dtype=torch.bool).triu_(query + 1), -math.inf)


def _dropped(weights: Tensor, p: float, seed: Tensor, first_row: int, keys: int) -> Tensor:
    """Dropout of weights. A draw is for whole rows; where a causal block has a part of them, the rest is
    drawn in vain.
    """
    whole = weights.new_zeros(*weights.shape[:2], keys)
    part = whole[..., : weights.shape[2]].copy_(weights)
    dropout_inplace_op(whole, p, seed, first_row * keys, 1, _factor(p))
    return part


define_kernel(
    "attention_weights_(Tensor(a!) scores, Tensor? mask, float p, Tensor seed, int first_row, int keys, "
    "int query, Tensor(b!) largest, Tensor(c!) total) -> ()",
    _weights_in_torch,
)
define_kernel(
    "attention_gradient_(Tensor(a!) scores, Tensor(b!)? gradients, Tensor? mask, float p, Tensor seed, "
    "int first_row, int keys, int query, Tensor largest, Tensor total) -> ()",
    _gradient_in_torch,
)
_weights_op = torch.ops.fastreg.attention_weights_.default
_gradient_op = torch.ops.fastreg.attention_gradient_.default


# --- Attention by blocks.

_BLOCK_BYTES = 2**19  # of scores: they and their gradients stay in cache, and matrix products are long enough
_BLOCK_BYTES_GPU = 2**26  # a kernel must be large enough to fill the device
_CAUSAL_PARTS = 8  # rows of a causal head are cut at least that often: only so is half of the work left out
_CAUSAL_ROWS = 64  # but not below that many


class _Block(NamedTuple):
    """Rows [row, end) of the heads [head, last) of part `outer` of the batch, and the keys that they see.

    Its views of the tensors are made once per head where they can: in a short block they cost time.
    """

    outer: int
    head: int
    last: int
    row: int
    end: int
    columns: int
    query: Tensor
    key: Tensor  # transposed
    value: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.last - self.head, self.end - self.row, self.columns

    @property
    def heads(self) -> slice:
        return slice(self.head, self.last)

    @property
    def rows(self) -> slice:
        return slice(self.row, self.end)


class _Blocks:
    """The tensors of an attention, cut into blocks, and the memory in which a block is computed.

    A block has all rows of some heads, or some rows of one head: so the indices of its weights are
    neighbours, and one call draws their mask.
    """

    def __init__(self, query, key, value, attn_mask, p, is_causal, scale, seed, whole, start, one_head=False):
        wide = arithmetic_dtype(query)
        self.batch = _batch_of(query, key, value)
        self.length, self.keys = query.shape[-2], key.shape[-2]
        self.is_causal, self.p, self.scale, self.seed = is_causal, p, scale, seed
        self.heads_in_all = math.prod(self.batch)

        tensors = [_readable(t, wide) for t in (query, key, value)]
        tensors = [t.expand(*self.batch, *t.shape[-2:]) for t in tensors]
        mask = None if attn_mask is None else attn_mask.expand(*self.batch, self.length, self.keys)
        apart = bool(whole) or not all(
            _is_mergeable(t) for t in (*tensors, *([] if mask is None else [mask]))
        )
        self.inner = self.batch[-1] if apart else self.heads_in_all
        self.query, self.key, self.value = (self._cut(t) for t in tensors)
        self.mask = None if mask is None else self._cut(mask)
        # The global number of the first head of each part, which counts in the shape of the whole batch.
        self.first_heads = _first_heads(self.batch, self.inner, whole, start)

        size = (_BLOCK_BYTES if query.is_cpu else _BLOCK_BYTES_GPU) // tensors[0].element_size()
        self.group, self.step = self._sizes(size, one_head)
        # So that each gradient is written once, and does not grow from zeros.
        self.whole_heads = self.step >= self.length and not (is_causal and self.length < self.keys)
        self.memory = [tensors[0].new_empty(self.group * self.step * self.keys) for _ in range(2)]
        self.spaces: dict[tuple[int, tuple[int, int, int]], Tensor] = {}

    def _cut(self, tensor: Tensor) -> list[Tensor]:
        """Views of shape (heads, rows, columns), one for each part of the batch."""
        if self.inner == self.heads_in_all:
            return [_flat(tensor)]
        return list(_all_of(tensor))

    def _sizes(self, size: int, one_head: bool) -> tuple[int, int]:
        """(heads, rows) of a block of about `size` scores."""
        step = max(size // self.keys // 8 * 8, 32)
        if self.is_causal:
            step = min(step, max(_CAUSAL_ROWS, -(-self.length // _CAUSAL_PARTS)))
        if step < self.length:
            return 1, step
        group = 1 if one_head else max(size // (self.length * self.keys), 1)
        return min(group, self.inner), self.length

    def __iter__(self) -> Iterator[_Block]:
        for outer, head in self._groups():
            last = min(head + self.group, self.inner)
            heads = slice(head, last)
            key, value = self.key[outer][heads].transpose(1, 2), self.value[outer][heads]
            for i, query in enumerate(self.query[outer][heads].split(self.step, 1)):
                row, columns = i * self.step, self.keys
                end = row + query.shape[1]
                if self.is_causal and end < columns:
                    columns = end
                part = (key, value) if columns == self.keys else (key[:, :, :columns], value[:, :columns])
                yield _Block(outer, head, last, row, end, columns, query, *part)

    def _groups(self) -> Iterator[tuple[int, int]]:
        """(part of the batch, first head) of blocks that have the same heads."""
        for outer in range(len(self.query)):
            for head in range(0, self.inner, self.group):
                yield outer, head

    def parts(self, tensor: Tensor) -> Iterator[Tensor]:
        """The rows of each block, in order, of a tensor of shape (heads, rows, ...)."""
        for outer, head in self._groups():
            first, last = head, min(head + self.group, self.inner)
            yield from tensor[outer * self.inner + first : outer * self.inner + last].split(self.step, 1)

    def number(self, block: _Block) -> slice:
        """Which heads of the flattened batch a block has."""
        first = block.outer * self.inner
        return slice(first + block.head, first + block.last)

    def space(self, which: int, shape: tuple[int, int, int]) -> Tensor:
        """Memory `which` as a tensor of that shape."""
        if (which, shape) not in self.spaces:
            self.spaces[which, shape] = self.memory[which][: math.prod(shape)].view(shape)
        return self.spaces[which, shape]

    def scores(self, block: _Block) -> Tensor:
        """A block's products of queries and keys, scaled, in the first memory."""
        scores = self.space(0, block.shape)
        return torch.baddbmm(scores, block.query, block.key, beta=0, alpha=self.scale, out=scores)

    def place(self, block: _Block) -> tuple[Tensor | None, float, Tensor, int, int, int]:
        """The arguments of the kernels that say where a block stands."""
        mask = None
        if self.mask is not None:
            mask = self.mask[block.outer][block.heads, block.rows, : block.columns]
        first_row = (self.first_heads[block.outer] + block.head) * self.length + block.row
        return mask, self.p, self.seed, first_row, self.keys, block.row if self.is_causal else -1

    def sums_over_rows(self, width: int) -> Tensor:
        """Memory for the gradient of keys or values, transposed: so matrix products write long rows, which
        takes a quarter less time.
        """
        like = self.memory[0]
        new = like.new_empty if self.whole_heads else like.new_zeros
        return new(*self.batch, width, self.keys)

    def add_over_rows(self, total: Tensor, block: _Block, of_keys: Tensor, x: Tensor, factor: float) -> None:
        """total += factor * x^T of_keys for a block, whose matrices have a row for each query."""
        target = total[self.number(block), :, : block.columns]
        beta = 0 if self.whole_heads else 1
        torch.baddbmm(target, x.transpose(1, 2), of_keys, beta=beta, alpha=factor, out=target)


def _readable(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in a type and with strides that matrix products take as they are."""
    tensor = tensor.to(dtype)
    if tensor.stride(-1) != 1 or tensor.stride(-2) < tensor.shape[-1]:
        return tensor.contiguous()
    return tensor


def _is_mergeable(tensor: Tensor) -> bool:
    """Whether the dimensions of the batch can become one without a copy."""
    try:
        _flat(tensor)
    except RuntimeError:
        return False
    return True


def _flat(tensor: Tensor) -> Tensor:
    """A view of shape (heads of the whole batch, rows, columns); also of a tensor without elements."""
    return tensor.view(math.prod(tensor.shape[:-2]), *tensor.shape[-2:])


def _all_of(tensor: Tensor) -> Iterator[Tensor]:
    """The parts of a tensor of shape (..., heads, rows, columns) with three dimensions."""
    if tensor.dim() == 3:
        yield tensor
        return
    for part in tensor:
        yield from _all_of(part)


def _first_heads(batch: torch.Size, inner: int, whole: Sequence[int], start: Sequence[int]) -> list[int]:
    """The global number of the first head of each part of the batch that is worked on.

    whole, start: the shape of the batch of which this is a part, and where the part begins; empty: all of it.
    """
    if not whole:
        return [inner * i for i in range(math.prod(batch) // inner)]
    numbers = torch.arange(math.prod(whole)).view(*whole)
    for dim, (first, size) in enumerate(zip(start, batch, strict=True)):
        numbers = numbers.narrow(dim, first, size)
    return numbers.reshape(-1, inner)[:, 0].tolist()


@torch.no_grad()
def _forward(
    query, key, value, attn_mask, p, is_causal, scale, seed, whole, start
) -> tuple[Tensor, Tensor, Tensor]:
    """(the output, the largest score of each row, the row's sum of e^(score - largest))."""
    batch, wide, length = _batch_of(query, key, value), arithmetic_dtype(query), query.shape[-2]
    output = query.new_empty(*batch, length, value.shape[-1], dtype=wide)
    largest, total = (query.new_empty(*batch, length, 1, dtype=wide) for _ in range(2))
    if math.prod(batch) and length and key.shape[-2]:
        blocks = _Blocks(query, key, value, attn_mask, p, is_causal, scale, seed, whole, start)
        flat = [_flat(t) for t in (output, largest, total)]
        with without_autocast(query.device.type):
            for block, *parts in zip(blocks, *map(blocks.parts, flat), strict=True):
                _forward_of(blocks, block, *parts)
            output.div_(total)
    else:
        output.zero_()
    return output.to(query.dtype), largest.squeeze(-1), total.squeeze(-1)


def _forward_of(blocks: _Blocks, block: _Block, output: Tensor, largest: Tensor, total: Tensor) -> None:
    """Write a block's part of the results; the output is not divided by the sum yet."""
    weights = blocks.scores(block)
    _weights_op(weights, *blocks.place(block), largest, total)
    torch.bmm(weights, block.value, out=output)


@torch.no_grad()
def _backward(
    grad, query, key, value, attn_mask, largest, total, p, is_causal, scale, seed, wants, whole, start
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of query, key, value and the mask; `wants` has a letter of "qkvm" for each that is
    computed, and the others come back empty.

    With the weights W, the dropped weights D and the output's gradient G: dV = D^T G, and the gradient of
    the scores is D * (G V^T) - W * (sum of D * (G V^T) over the row). The division of a row of weights by
    their sum is done once, in G.
    """
    wide, batch = arithmetic_dtype(query), _batch_of(query, key, value)
    length, keys, inputs = query.shape[-2], key.shape[-2], (query, key, value, attn_mask)
    if not (math.prod(batch) and length and keys):
        return tuple(
            t.new_zeros(t.shape) if c in wants else query.new_empty(0)
            for c, t in zip("qkvm", inputs, strict=True)
        )
    blocks = _Blocks(*inputs, p, is_causal, scale, seed, whole, start, one_head="m" in wants)
    found = {"q": query.new_empty(*batch, *query.shape[-2:], dtype=wide)} if "q" in wants else {}
    for name, tensor in (("k", key), ("v", value)):
        if name in wants:
            found[name] = blocks.sums_over_rows(tensor.shape[-1])
    if "m" in wants:
        found["m"] = attn_mask.new_zeros(attn_mask.shape, dtype=wide)
    total = total.unsqueeze(-1)
    # The quotient of two tensors with other strides may have any, and matrix products want rows.
    rows = [_flat(t.contiguous()) for t in (grad.to(wide) / total, largest.unsqueeze(-1), total)]
    flat = {name: _flat(t) for name, t in found.items() if name != "m"}
    with without_autocast(query.device.type):
        for block, *parts in zip(blocks, *map(blocks.parts, rows), strict=True):
            d_scores = _backward_of(blocks, block, wants, flat, *parts)
            if "m" in wants:
                _add_to_mask(found["m"], d_scores[0], block, blocks)
    found |= {name: found[name].mT for name in "kv" if name in wants}
    return tuple(
        found[name].sum_to_size(like.shape).to(like.dtype).contiguous()
        if name in wants
        else query.new_empty(0)
        for name, like in zip("qkvm", inputs, strict=True)
    )


def _backward_of(
    blocks: _Blocks,
    block: _Block,
    wants: str,
    found: dict[str, Tensor],
    grad: Tensor,
    largest: Tensor,
    total: Tensor,
) -> Tensor:
    """Add a block's part to the gradients that are to be found, and give that of its scores."""
    dropped, d_scores = blocks.scores(block), blocks.space(1, block.shape)
    if wants != "v":
        torch.bmm(grad, block.value.transpose(1, 2), out=d_scores)
    _gradient_op(dropped, None if wants == "v" else d_scores, *blocks.place(block), largest, total)
    if "v" in found:
        blocks.add_over_rows(found["v"], block, dropped, grad, 1.0)
    if "q" in found:
        rows = found["q"][blocks.number(block), block.rows]
        torch.baddbmm(rows, d_scores, block.key.transpose(1, 2), beta=0, alpha=blocks.scale, out=rows)
    if "k" in found:
        blocks.add_over_rows(found["k"], block, d_scores, block.query, blocks.scale)
    return d_scores


def _add_to_mask(d_mask: Tensor, d_scores: Tensor, block: _Block, blocks: _Blocks) -> None:
    """Add the gradient of the scores of one head to that of the mask, which may be broadcast."""
    whole = d_mask.view((1,) * (len(blocks.batch) + 2 - d_mask.dim()) + d_mask.shape)
    index = _unravelled(block.outer * blocks.inner + block.head, blocks.batch)
    part = whole[tuple(i if size > 1 else 0 for i, size in zip(index, whole.shape, strict=False))]
    part = part[block.rows if part.shape[0] > 1 else slice(1)]
    part = part[:, : block.columns]  # a single column stays what it is
    part += d_scores.sum_to_size(part.shape)


def _unravelled(number: int, shape: Sequence[int]) -> list[int]:
    index = []
    for size in reversed(shape):
        number, i = divmod(number, size)
        index.append(i)
    return index[::-1]


define_kernel(
    "attention(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, float p, bool is_causal, "
    "float scale, Tensor seed, SymInt[] whole, SymInt[] start) -> (Tensor, Tensor, Tensor)",
    _forward,
)
define_kernel(
    "attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor? attn_mask, "
    "Tensor largest, Tensor total, float p, bool is_causal, float scale, Tensor seed, str wants, "
    "SymInt[] whole, SymInt[] start) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
)


@torch.library.register_fake("fastreg::attention", allow_override=True)
def _(query, key, value, *args):
    batch, wide = _batch_of(query, key, value), arithmetic_dtype(query)
    output = query.new_empty(*batch, query.shape[-2], value.shape[-1])
    return output, *(query.new_empty(*batch, query.shape[-2], dtype=wide) for _ in range(2))


@torch.library.register_fake("fastreg::attention_backward", allow_override=True)
def _(grad, query, key, value, attn_mask, largest, total, p, is_causal, scale, seed, wants, *args):
    return tuple(
        like.new_empty(like.shape) if letter in wants else query.new_empty(0)
        for letter, like in zip("qkvm", (query, key, value, attn_mask), strict=True)
    )


_attention_op = torch.ops.fastreg.attention.default
_attention_backward_op = torch.ops.fastreg.attention_backward.default


# --- Autograd.


class _Attention(torch.autograd.Function):
    """Its backward pass computes the weights again, block by block."""

    @staticmethod
    def forward(ctx, query, key, value, attn_mask, p, is_causal, scale, seed, whole, start):
        output, largest, total = _attention_op(
            query, key, value, attn_mask, p, is_causal, scale, seed, whole, start
        )
        ctx.save_for_backward(query, key, value, attn_mask, largest, total, seed)
        ctx.options = p, is_causal, scale
        ctx.part = whole, start
        return output

    @staticmethod
    def backward(ctx, grad):
        *inputs, largest, total, seed = ctx.saved_tensors
        wants = "".join(name for name, wanted in zip("qkvm", ctx.needs_input_grad, strict=False) if wanted)
        if torch.is_grad_enabled() or is_transformed():
            # For derivatives of derivatives, and of batches of them, by the definition.
            found = _differentiable_gradients(grad, inputs, wants, ctx.options, seed, *ctx.part)
        else:
            gradients = _attention_backward_op(
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
    """The output by way of all weights, in operators of which autograd knows the derivatives."""
    dtype, wide = query.dtype, arithmetic_dtype(query)
    if dtype != wide:
        query, key, value = query.to(wide), key.to(wide), value.to(wide)
    scores = torch.matmul(query * scale, key.transpose(-2, -1))
    if is_causal:
        scores = scores + scores.new_full(scores.shape[-2:], -math.inf).triu_(1)
    elif attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask.to(wide)
    weights = torch.softmax(scores, -1)
    if weights.numel() and bool(weights.detach()[..., 0].isnan().any()):
        weights = torch.ops.aten._safe_softmax(scores, -1)  # 0 for a query that may see no key
    dropped = None
    if fast is not None:
        dropped = fast.dropout(weights, p, True, False, seed, 1, *constants_of("inverted", p))
    if dropped is None:
        dropped = dropout_with_mask(weights, p, seed=seed)[0]
    output = torch.matmul(dropped, value)
    return output if dtype == wide else output.to(dtype)


def _are_few(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether to compute all weights at once. It looks at values, which tensors of a mode may not have."""
    if type(query) not in _PLAIN or not query.is_cpu or torch._C._len_torch_dispatch_stack():
        return False
    heads = math.prod(_batch_of(query, key, value))
    return heads * query.shape[-2] * key.shape[-2] <= _FEW


# --- The public function.


def _check(op: str, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None) -> None:
    """Raise unless the tensors fit together, heads that are shared left aside."""
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
    if scale is None:
        scale = query.shape[-1] ** -0.5 if query.shape[-1] else 1.0  # without a width all scores are 0
    if any(map(is_sharded, (query, key, value, attn_mask))):
        _check_shards(op, query, key, value, attn_mask, enable_gqa)
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
    if _are_few(query, key, value):
        with without_autocast("cpu"):
            return _at_once(*arguments)
    inputs = (t for t in arguments[:4] if t is not None)
    if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
        return _differentiable(*arguments)
    return _attention_op(*arguments, [], [])[0]


def _check_shards(
    op: str, query: Any, key: Any, value: Any, attn_mask: Tensor | None, enable_gqa: bool
) -> None:
    """Raise unless each rank can work on heads of its own."""
    tensors = query, key, value
    if not all(map(is_sharded, tensors)) or any(
        (t.device_mesh, t.placements, t.shape[:-2]) != (query.device_mesh, query.placements, query.shape[:-2])
        for t in tensors
    ):
        raise ValueError(
            f"{op}: of DTensors, query, key and value must all be some, with one mesh, one placement and one "
            "number of heads; call .redistribute() or repeat the heads first"
        )
    if any(
        not placement.is_replicate()
        and not (placement.is_shard() and placement.dim % query.dim() < query.dim() - 2)
        for placement in query.placements
    ):
        raise ValueError(
            f"{op}: DTensors must be replicated or sharded in the dimensions before the last two, got "
            f"{query.placements}; call .redistribute() first"
        )
    if attn_mask is not None and (is_sharded(attn_mask) or attn_mask.requires_grad):
        raise ValueError(
            f"{op}: beside DTensors, attn_mask must be a plain tensor, the whole one on every rank, that "
            "needs no gradient; give it .full_tensor() or .detach()"
        )
    if enable_gqa:
        raise ValueError(
            f"{op}: of DTensors, enable_gqa must be False, got True; repeat the heads with "
            ".repeat_interleave()"
        )


def _run_on_shards(query, key, value, attn_mask, p, is_causal, scale, seed):
    """The output of DTensors: every rank draws for its heads what one process would."""
    from torch.distributed.tensor import DTensor

    mesh, placements = query.device_mesh, query.placements
    seed = seed_of_first_rank(seed.to(query.to_local().device), mesh)  # a GPU's seed is drawn on the CPU
    part = own_part(query.shape, mesh, placements)[:-2]
    whole, start = list(query.shape[:-2]), [own.start for own in part]
    if attn_mask is not None:
        missing = query.dim() - attn_mask.dim()
        for dim, own in enumerate(part):
            if dim >= missing and attn_mask.shape[dim - missing] > 1:
                attn_mask = attn_mask.narrow(dim - missing, own.start, own.stop - own.start)
    tensors = (t.to_local() for t in (query, key, value))
    output = _Attention.apply(*tensors, attn_mask, p, is_causal, scale, seed, whole, start)
    size = torch.Size((*query.shape[:-1], value.shape[-1]))
    strides = torch.empty(size, device="meta").stride()
    return DTensor.from_local(output, mesh, placements, run_check=False, shape=size, stride=strides)


def _as_autocast(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The tensors in the dtype of autocast, where it is on for their device; float64 stays as it is."""
    dtype = autocast_dtype(query.device.type)
    if dtype is None:
        return query, key, value, attn_mask
    narrow = (torch.float32, torch.float16, torch.bfloat16)
    query, key, value = (t.to(dtype) if t.dtype in narrow else t for t in (query, key, value))
    if attn_mask is not None and attn_mask.dtype in narrow:
        attn_mask = attn_mask.to(dtype)
    return query, key, value, attn_mask
