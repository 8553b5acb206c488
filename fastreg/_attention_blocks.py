"""Attention by blocks of query rows: the operators of `_attention.py` that compute it and its gradients.

A block's scores are a matrix product. One sweep turns them into dropped weights, which the next product
reads. The kernels in csrc/attention do the sweep on the CPU, and torch's operators on every other device.

In the names, `whole` and `start` are the shape of the batch of which this process has a part, and where the
part begins; both are empty where it has all of it. `wants` has a letter for each gradient that is wanted: q,
k, v, and m for the mask's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._checks import arithmetic_dtype
from ._dropout import constants_of, dropout_inplace_op
from ._registry import define_kernel
from ._subnormal import flush_
from ._transforms import without_autocast


def batch_of(*tensors: Tensor) -> torch.Size:
    """The shape to which the dimensions before the last two broadcast."""
    first = tensors[0].shape[:-2]
    if all(t.shape[:-2] == first for t in tensors):  # torch's function is slow
        return first
    return torch.broadcast_shapes(*(t.shape[:-2] for t in tensors))


def kept_factor(p: float) -> float:
    """What weights that are kept are multiplied with."""
    return constants_of("inverted", p)[0]


def mask_in_numbers(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What a mask adds to the scores: -inf where a key may not be seen. Because it is added, a key that is
    NaN makes the score NaN there, too, as with torch.
    """
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -math.inf)


# --- The sweeps between the products, in torch's operators.


def _weights_in_torch(
    scores, dropped, mask, p, seed, first_row, keys, query, normalised, largest, total
) -> None:
    """Write the dropped weights, which may overwrite the scores, and each row's largest score and sum.

    normalised: whether the weights are divided by the sums.
    """
    _add_masks(scores, mask, query)
    torch.amax(scores, -1, keepdim=True, out=largest)
    largest.clamp_(min=torch.finfo(scores.dtype).min)  # or -inf less -inf would be NaN
    weights = (scores - largest).exp_()
    torch.sum(weights, -1, keepdim=True, out=total)
    total.clamp_(min=1)  # it is less only where a query may see no key: there 0 is divided by it
    if normalised:
        weights.div_(total)
    dropped.copy_(_dropped(weights, p, seed, first_row, keys))


def _gradient_in_torch(
    scores, dropped, gradients, d_scores, mask, p, seed, first_row, keys, query, normalised, largest, total
) -> None:
    """Write the dropped weights again, and the gradient of the scores, each unless it is None.

    With the weights W, the dropped weights D and P the gradients of the dropped weights, the gradient of the
    scores is D * P - W * (sum of D * P) / total.
    """
    _add_masks(scores, mask, query)
    weights = (scores - largest).exp_()
    kept = _dropped(weights, p, seed, first_row, keys)
    if d_scores is not None:
        product = kept * (gradients / total if normalised else gradients)
        d_scores.copy_(product - weights * (product.sum(-1, keepdim=True) / total))
    if dropped is not None:
        dropped.copy_(kept)


def _add_masks(scores: Tensor, mask: Tensor | None, query: int) -> None:
    """Add the mask to the scores, and -inf above the diagonal where attention is causal: query is then the
    number of the first row in its head, and else -1.
    """
    if mask is not None:
        scores.add_(mask_in_numbers(mask, scores.dtype))
    if query >= 0:
        scores.masked_fill_(torch.ones_like(scores[0], dtype=torch.bool).triu_(query + 1), -math.inf)


def _dropped(weights: Tensor, p: float, seed: Tensor, first_row: int, keys: int) -> Tensor:
    """Dropout of weights. Whole rows are drawn; where a causal block has a part of them, the rest of the draw
    is thrown away.
    """
    whole = weights.new_zeros(*weights.shape[:2], keys)
    part = whole[..., : weights.shape[2]].copy_(weights)
    dropout_inplace_op(whole, p, seed, first_row * keys, 1, kept_factor(p))
    return part


define_kernel(
    "attention_weights_(Tensor(a!) scores, Tensor(b!) dropped, Tensor? mask, float p, Tensor seed, "
    "int first_row, int keys, int query, bool normalised, Tensor(c!) largest, Tensor(d!) total) -> ()",
    _weights_in_torch,
)
define_kernel(
    "attention_gradient_(Tensor(a!) scores, Tensor(b!)? dropped, Tensor? gradients, Tensor(c!)? d_scores, "
    "Tensor? mask, float p, Tensor seed, int first_row, int keys, int query, bool normalised, "
    "Tensor largest, Tensor total) -> ()",
    _gradient_in_torch,
)
attention_weights_op = torch.ops.fastreg.attention_weights_.default
attention_gradient_op = torch.ops.fastreg.attention_gradient_.default


# --- The blocks.

_BLOCK_BYTES = 2**20  # of scores: they stay in the cache, and the matrix products are still long enough
_BLOCK_BYTES_GPU = 2**26  # of scores: a kernel must be large enough to fill the device
# A causal block leaves out the keys after its last row. A head is cut into this many blocks at least, so that
# nearly half of the work is left out, but a block does not get fewer rows than _CAUSAL_ROWS for that.
_CAUSAL_PARTS, _CAUSAL_ROWS = 8, 64


class _Block(NamedTuple):
    """Rows [row, end) of the heads [head, last) of part `outer` of the batch, and the keys that they see.

    key and value are views that all blocks of the same heads share where they can, because making them costs
    time in a short block.
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

    A block has all rows of some heads, or some rows of one head: so its weights are neighbours in the order
    in which dropout numbers them, and one call draws for all of them.

    The dimensions of the batch become one, that of the heads, where a view can do that for all tensors. Where
    it cannot, the last of them is that of the heads, and each index of the others is a part of the batch,
    with tensors of its own.
    """

    def __init__(self, query, key, value, attn_mask, p, is_causal, scale, seed, whole, start, one_head=False):
        wide = arithmetic_dtype(query)
        self.batch = batch_of(query, key, value)
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
        # A block of all rows of its heads gives all of a key's gradient, which is then written, and not added
        # to zeros. Keys that no causal query sees need the zeros.
        self.whole_heads = self.step >= self.length and not (is_causal and self.length < self.keys)
        self.memory = [tensors[0].new_empty(self.group * self.step * self.keys) for _ in range(2)]
        self.spaces: dict[tuple[int, tuple[int, int, int]], Tensor] = {}

    def _cut(self, tensor: Tensor) -> list[Tensor]:
        """Views of shape (heads, rows, columns), one for each part of the batch."""
        if self.inner == self.heads_in_all:
            return [flat_batch(tensor)]
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

    def heads_of(self, block: _Block) -> slice:
        """Which heads a block has, counted through all parts of the batch."""
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

    def place(self, block: _Block) -> tuple[Tensor | None, float, Tensor, int, int, int, bool]:
        """The arguments of the kernels between their tensors: the mask, dropout's, where the block stands
        among all rows, and that its weights are not divided by their sums.
        """
        mask = None
        if self.mask is not None:
            mask = self.mask[block.outer][block.heads, block.rows, : block.columns]
        first_row = (self.first_heads[block.outer] + block.head) * self.length + block.row
        return mask, self.p, self.seed, first_row, self.keys, block.row if self.is_causal else -1, False

    def sums_over_rows(self, width: int) -> Tensor:
        """Memory for the gradient of keys or values, transposed: so matrix products write long rows, which
        takes a quarter less time.
        """
        like = self.memory[0]
        new = like.new_empty if self.whole_heads else like.new_zeros
        return new(*self.batch, width, self.keys)

    def add_over_rows(self, total: Tensor, block: _Block, of_keys: Tensor, x: Tensor, factor: float) -> None:
        """total += factor * x^T of_keys for a block, whose matrices have a row for each query."""
        target = total[self.heads_of(block), :, : block.columns]
        beta = 0 if self.whole_heads else 1
        torch.baddbmm(target, x.transpose(1, 2), of_keys, beta=beta, alpha=factor, out=target)


def _readable(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in that dtype, with strides that a matrix product reads without a copy of its own."""
    tensor = tensor.to(dtype)
    if tensor.stride(-1) != 1 or tensor.stride(-2) < tensor.shape[-1]:
        return tensor.contiguous()
    return tensor


def _is_mergeable(tensor: Tensor) -> bool:
    """Whether the dimensions of the batch can become one without a copy."""
    try:
        flat_batch(tensor)
    except RuntimeError:
        return False
    return True


def flat_batch(tensor: Tensor) -> Tensor:
    """A view of shape (heads of the whole batch, rows, columns); also of a tensor without elements."""
    return tensor.view(math.prod(tensor.shape[:-2]), *tensor.shape[-2:])


def _all_of(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors of three dimensions in one of shape (..., heads, rows, columns), in order."""
    if tensor.dim() == 3:
        yield tensor
        return
    for part in tensor:
        yield from _all_of(part)


def _first_heads(batch: torch.Size, inner: int, whole: Sequence[int], start: Sequence[int]) -> list[int]:
    """The number of the first head of each part of the batch, among the heads of the whole batch."""
    if not whole:
        return [inner * i for i in range(math.prod(batch) // inner)]
    numbers = torch.arange(math.prod(whole), device="cpu").view(*whole)
    for dim, (first, size) in enumerate(zip(start, batch, strict=True)):
        numbers = numbers.narrow(dim, first, size)
    return numbers.reshape(-1, inner)[:, 0].tolist()


@torch.no_grad()
def _forward(
    query, key, value, attn_mask, p, is_causal, scale, seed, whole, start
) -> tuple[Tensor, Tensor, Tensor]:
    """(the output, the largest score of each row, the row's sum of e^(score - largest))."""
    batch, wide, length = batch_of(query, key, value), arithmetic_dtype(query), query.shape[-2]
    output = query.new_empty(*batch, length, value.shape[-1], dtype=wide)
    largest, total = (query.new_empty(*batch, length, 1, dtype=wide) for _ in range(2))
    if math.prod(batch) and length and key.shape[-2]:
        blocks = _Blocks(query, key, value, attn_mask, p, is_causal, scale, seed, whole, start)
        flat = [flat_batch(t) for t in (output, largest, total)]
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
    attention_weights_op(weights, weights, *blocks.place(block), largest, total)
    torch.bmm(weights, block.value, out=output)


@torch.no_grad()
def _backward(
    grad, query, key, value, attn_mask, largest, total, p, is_causal, scale, seed, wants, whole, start
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of query, key, value and the mask; those that are not in `wants` come back empty.

    The formulas are in csrc/attention/attention_math.h: the gradient of the output is divided by the sums of
    the weights once, before all blocks.
    """
    wide, batch = arithmetic_dtype(query), batch_of(query, key, value)
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
    # What is subnormal in the gradient would make its products twenty times as slow.
    of_sums = flush_(grad.to(wide) / total)
    rows = [flat_batch(t.contiguous()) for t in (of_sums, largest.unsqueeze(-1), total)]
    flat = {name: flat_batch(t) for name, t in found.items() if name != "m"}
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
    """Add a block's part to the gradients in `found`, and return the gradient of its scores."""
    dropped = blocks.scores(block)
    d_scores = blocks.space(1, block.shape)
    if wants != "v":
        torch.bmm(grad, block.value.transpose(1, 2), out=d_scores)
    both = (None, None) if wants == "v" else (d_scores, d_scores)
    attention_gradient_op(dropped, dropped, *both, *blocks.place(block), largest, total)
    if "v" in found:
        blocks.add_over_rows(found["v"], block, dropped, grad, 1.0)
    if "q" in found:
        rows = found["q"][blocks.heads_of(block), block.rows]
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
    part = part[:, : block.columns]  # of a mask of one column, that one
    part += d_scores.sum_to_size(part.shape)


def _unravelled(number: int, shape: Sequence[int]) -> list[int]:
    """The index, one number per dimension, of element `number` in row-major order."""
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
    batch, wide = batch_of(query, key, value), arithmetic_dtype(query)
    output = query.new_empty(*batch, query.shape[-2], value.shape[-1])
    return output, *(query.new_empty(*batch, query.shape[-2], dtype=wide) for _ in range(2))


@torch.library.register_fake("fastreg::attention_backward", allow_override=True)
def _(grad, query, key, value, attn_mask, largest, total, p, is_causal, scale, seed, wants, *args):
    return tuple(
        like.new_empty(like.shape) if letter in wants else query.new_empty(0)
        for letter, like in zip("qkvm", (query, key, value, attn_mask), strict=True)
    )


attention_op = torch.ops.fastreg.attention.default
attention_backward_op = torch.ops.fastreg.attention_backward.default
