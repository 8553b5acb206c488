"""Checks of attention for tests/test_properties.py: the two sweeps over a block of scores, and the whole."""

import math

import torch
from helpers import DTYPES
from hypothesis import strategies as st
from property_cases import NOISE, laid_out, one_of, op, random_of, seed, tensor, unchanged, values, wide_of

import fastreg as fr
from fastreg import _attention, _attention_blocks

COLUMNS = (1, 2, 3, 7, 8, 9, 16, 17, 33, 64, 65, 255, 1030)
SMALLEST = 1.2e-38  # below it a float32 is subnormal, and gradients of scores are 0


def mask_of(draw, shape, wide):
    """A mask that may be repeated or lie anywhere, or None; of numbers with infinities among them."""
    kind = one_of(draw, "none", "bool", "wide", "narrow")
    if kind == "none":
        return None
    if kind == "bool":
        seen = torch.from_numpy(random_of(draw).random(shape) < one_of(draw, 0.0, 0.7, 1.0))
        return laid_out(draw, seen, expand=True)[0]
    dtype = wide if kind == "wide" else one_of(draw, torch.float16, torch.bfloat16)
    return tensor(draw, shape, dtype, most=1)


class Block:
    """A block of scores, where it stands, and what the sweep over it writes."""

    def __init__(self, draw, hostile):
        wide = one_of(draw, torch.float32, torch.float64)
        columns = one_of(draw, *COLUMNS)
        self.shape = draw(st.integers(1, 3)), draw(st.integers(1, 4 if columns > 100 else 9)), columns
        self.scores = values(draw, self.shape, wide, most=2, hostile=hostile)
        self.query = one_of(draw, -1, -1, 0, 1, columns - 1, columns + 3)
        self.mask = mask_of(draw, self.shape, wide)
        p = one_of(draw, 0.0, 0.1, 0.5, 0.999, 1.0)
        first_row, keys = draw(st.integers(0, 2**20)), columns + one_of(draw, 0, 0, 1, 7, 8)
        self.normalised = draw(st.booleans())
        self.place = p, seed(draw), first_row, keys, self.query, self.normalised
        self.noise = NOISE[wide] * (4 + math.sqrt(columns))

    def sums(self, dtype):
        return tuple(torch.full((*self.shape[:2], 1), 77.0, dtype=dtype) for _ in range(2))

    def definition(self):
        """(dropped weights, largest, total), in float64."""
        scores, sums = self.scores.to(torch.float64, copy=True), self.sums(torch.float64)
        dropped = torch.empty_like(scores)
        _attention_blocks._weights_in_torch(scores, dropped, self.wide_mask(), *self.place, *sums)
        return dropped, *sums

    def wide_mask(self):
        return self.mask if self.mask is None or self.mask.dtype == torch.bool else self.mask.double()

    def close(self, got, want, size, rows):
        """Compare the rows that are numbers."""
        got, want = got.double()[rows], want[rows]
        room = self.noise * size.expand_as(want) if isinstance(size, torch.Tensor) else self.noise * size
        assert ((got - want).abs() <= room + SMALLEST).all(), (got - want).abs().max()


def attention_weights(draw):
    block = Block(draw, hostile=True)
    scores = block.scores.clone()  # to which the mask may be added
    dropped = scores if draw(st.booleans()) else torch.full_like(scores, 77.0)
    largest, total = block.sums(scores.dtype)
    with unchanged(*([] if block.mask is None else [block.mask])):
        op("attention_weights_")(scores, dropped, block.mask, *block.place, largest, total)
    want, want_largest, want_total = block.definition()
    finite = (want_largest.isfinite() & want_total.isfinite()).squeeze(-1)
    # Scores next to the greatest number may overflow where they meet a mask; the definition has more room.
    fits = finite & (want_largest.abs().squeeze(-1) < 1e6)
    assert total[fits].isfinite().all() and not total[~finite].isfinite().any()
    block.close(largest, want_largest, want_largest[fits].abs() + 1, fits)
    far = 1 + want_largest[fits].abs()  # the digits of a sum of score and mask are those of its size
    block.close(total, want_total, want_total[fits] * far, fits)
    block.close(dropped, want, block_size(want, fits) * far, fits)
    assert torch.equal((dropped == 0)[fits] | (want == 0)[fits], (dropped == 0)[fits])


def block_size(want, rows):
    """What the terms of each row are at most."""
    return want[rows].abs().amax(-1, keepdim=True) + 1e-3


def attention_gradient(draw):
    block = Block(draw, hostile=False)
    want_weights, largest, total = block.definition()
    wide = block.scores.dtype
    gradients = values(draw, block.shape, wide, most=4, hostile=False)
    what = one_of(draw, "all", "dropped", "d_scores")
    in_place = what == "all" and draw(st.booleans())
    scores = block.scores.clone()
    dropped = None if what == "d_scores" else scores if in_place else torch.full_like(scores, 77.0)
    given = None if what == "dropped" else gradients.clone()
    d_scores = None if given is None else given if in_place else torch.full_like(scores, 77.0)
    sums = largest.to(wide), total.to(wide)
    op("attention_gradient_")(scores, dropped, given, d_scores, block.mask, *block.place, *sums)

    want, want_d = torch.empty_like(want_weights), torch.empty_like(want_weights)
    place = block.wide_mask(), *block.place, *(each.double() for each in sums)
    wide_scores = block.scores.to(torch.float64, copy=True)
    _attention_blocks._gradient_in_torch(wide_scores, want, gradients.double(), want_d, *place)
    rows = (largest.isfinite() & total.isfinite() & (largest.abs() < 1e6)).squeeze(-1)
    # A score that is less than the largest by n has an e^-n off by n roundings.
    far = 200 + 2 * largest[rows].abs()
    if dropped is not None:
        block.close(dropped, want, far * block_size(want, rows), rows)
    if d_scores is not None:
        terms = want.abs() * gradients.double().abs() / (total if block.normalised else 1)
        size = terms.sum(-1, keepdim=True) + terms.amax(-1, keepdim=True)
        block.close(d_scores, want_d, far * size[rows], rows)


def scaled_dot_product_attention(draw):
    """All of it, forwards and backwards, held at once or by blocks of any size."""
    dtype = one_of(draw, *DTYPES)
    batch = one_of(draw, (), (2,), (3, 2), (2, 1, 2))
    length, keys = one_of(draw, 0, 1, 5, 17, 40), one_of(draw, 0, 1, 7, 33, 70)
    width, of_values = one_of(draw, 1, 3, 8, 17), one_of(draw, 1, 4, 9)
    gqa = bool(batch) and draw(st.booleans())
    groups = (*batch[:-1], 1) if gqa else batch
    # Some dimensions of the batch may be missing, and broadcast.
    of_keys = groups if gqa else groups[one_of(draw, 0, 0, len(groups)) :]
    most = 0
    q = tensor(draw, (*batch, length, width), dtype, most=most, hostile=False)
    k = tensor(draw, (*of_keys, keys, width), dtype, most=most, hostile=False)
    v = tensor(draw, (*of_keys, keys, of_values), dtype, most=most, hostile=False)
    is_causal = draw(st.booleans())
    shape = (*batch, length, keys)
    mask = None if is_causal else mask_of(draw, shape[one_of(draw, 0, len(batch)) :], wide_of(dtype))
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(one_of(draw, dtype, torch.float32) if dtype != torch.float64 else dtype)
        mask = mask.nan_to_num(0.0, -math.inf, -math.inf).clamp(max=30.0)
    p, scale = one_of(draw, 0.1, 0.5, 1.0), one_of(draw, None, 0.3, -1.0)

    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.detach().requires_grad_()
        leaves.append(mask)
    generator = torch.Generator().manual_seed(5)
    few, size = _attention._FEW, _attention_blocks._BLOCK_BYTES
    _attention._FEW = one_of(draw, few, -1)
    _attention_blocks._BLOCK_BYTES = one_of(draw, size, 2**9)
    try:
        got = fr.scaled_dot_product_attention(
            *leaves[:3], mask, p, is_causal, scale=scale, enable_gqa=gqa, generator=generator
        )
        grad = values(draw, got.shape, dtype, most=0, hostile=False)
        found = torch.autograd.grad(got, leaves, grad)
    finally:
        _attention._FEW, _attention_blocks._BLOCK_BYTES = few, size
    assert got.dtype == dtype and got.shape == (*batch, length, of_values)

    kept = torch.zeros(shape, dtype=torch.bool)
    if kept.numel():
        ones, generator = torch.ones(1).expand(kept.numel()), torch.Generator().manual_seed(5)
        kept = fr.unpack_mask(fr.dropout_with_mask(ones, p, generator=generator)[1], shape)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    wide_mask = wide[3] if len(wide) > 3 else mask
    factor = width**-0.5 if scale is None else scale
    want = _attention.attention_plain(
        *wide[:3], wide_mask, kept, _attention_blocks.kept_factor(p), is_causal, factor
    )
    wanted = torch.autograd.grad(want, wide, grad.double(), allow_unused=True)
    room = {torch.float64: 1e-11, torch.float32: 5e-5, torch.float16: 6e-3, torch.bfloat16: 5e-2}[dtype]
    for ours, theirs in zip((got, *found), (want, *wanted), strict=True):
        theirs = torch.zeros_like(ours, dtype=torch.float64) if theirs is None else theirs
        largest = max(1.0, theirs.abs().max().item()) if theirs.numel() else 1.0
        torch.testing.assert_close(ours.double(), theirs, rtol=room, atol=room * largest)


CHECKS = {"attention_weights_": attention_weights, "attention_gradient_": attention_gradient}
OTHERS = {"scaled_dot_product_attention": scaled_dot_product_attention}
