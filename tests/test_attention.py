"""scaled_dot_product_attention: by blocks it is what all weights at once give, in float64, with the mask that
`fr.dropout_with_mask` draws for the same seed; whatever the masks, heads, strides, blocks and threads; in
memory that grows with the length; and all of it holds through every door of torch.
"""

import copy
import itertools
import math
import re

import pytest
import torch
import torch.nn.functional as F
from helpers import on_ranks, run_python, threads, with_seed
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fastreg as fr
from fastreg import _attention, _attention_blocks

OP = torch.ops.fastreg.attention.default
BACKWARD = torch.ops.fastreg.attention_backward.default
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
SEED = 11


def numbers(*shape, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)


def tensors(length, keys, width=8, width_of_values=8, heads=(2, 3), dtype=torch.float32):
    shapes = (length, width), (keys, width), (keys, width_of_values)
    return [numbers(*heads, *shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)]


def kept(shape, p, seed=SEED):
    """Which weights `fr.dropout_with_mask` keeps, after torch.manual_seed(seed)."""
    mask = with_seed(seed, fr.dropout_with_mask, torch.ones(1).expand(math.prod(shape)), p)[1]
    return fr.unpack_mask(mask, shape)


def reference(q, k, v, mask=None, p=0.3, is_causal=False, scale=None, seed=SEED):
    """In float64, in torch's operators and in the order of the formula."""
    q, k, v = (t.double() for t in (q, k, v))
    scores = q @ k.mT * (scale if scale is not None else q.shape[-1] ** -0.5)
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -math.inf)
    elif mask is not None:
        scores = scores + mask.double()
    weights = torch.ops.aten._safe_softmax(scores, -1)
    factor = 2**32 / math.floor((1 - p) * 2**32 + 0.5)  # the inverse of the probability that is drawn with
    return (kept(weights.shape, p, seed) * weights * factor) @ v


def compare(q, k, v, mask=None, p=0.3, is_causal=False, noise=0.0, **options):
    """Output and gradients against the reference, within the dtype's tolerance and `noise`; gives them."""
    leaves = [t.clone().requires_grad_() if t is not None and t.is_floating_point() else t
              for t in (q, k, v, mask)]  # fmt: skip
    wanted = [t for t in leaves if t is not None and t.requires_grad]
    got = with_seed(SEED, fr.scaled_dot_product_attention, *leaves, p, is_causal, **options)
    if options.pop("enable_gqa", False):
        expand = [t.repeat_interleave(q.shape[-3] // t.shape[-3], -3) for t in leaves[1:3]]
        want = reference(leaves[0], *expand, leaves[3], p, is_causal, **options)
    else:
        want = reference(*leaves, p, is_causal, **options)
    assert got.dtype == q.dtype and got.shape == want.shape and got.is_contiguous()
    g = numbers(*got.shape, dtype=got.dtype, seed=9)
    gradients = torch.autograd.grad(got, wanted, g), torch.autograd.grad(want, wanted, g.double())
    pairs = [(got, want), *zip(*gradients, strict=True)]
    for (ours, theirs), like in zip(pairs, (q, *wanted), strict=True):
        assert ours.dtype == like.dtype
        size = max(theirs.abs().max().item(), 1) if theirs.numel() else 1
        room = TOLERANCE[q.dtype] + noise
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=room, atol=room * size)
    return [pair[0] for pair in pairs]


@pytest.fixture(params=[None, 2**9, 2**20], ids="blocks of {} bytes".format)
def block_bytes(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(_attention, "_FEW", -1)
        monkeypatch.setattr(_attention_blocks, "_BLOCK_BYTES", request.param)


@pytest.fixture
def by_blocks(monkeypatch):
    monkeypatch.setattr(_attention, "_FEW", -1)


# ---- the values: keys within a vector, and beyond one with a part left over; rows within a block and beyond


@pytest.mark.parametrize("sizes", [(5, 7), (33, 130), (131, 131)], ids=str)
def test_values_against_float64(sizes, dtype, block_bytes):
    compare(*tensors(*sizes, width=9, width_of_values=5, dtype=dtype))


# (queries, keys): more queries, more keys, and as many of both.
@pytest.mark.parametrize("sizes", [(130, 33), (33, 130), (131, 131)], ids=str)
def test_causal(sizes, dtype, block_bytes):
    compare(*tensors(*sizes, dtype=dtype), is_causal=True)


MASKS = {
    "all": (2, 3, 70, 41),
    "of a head": (3, 1, 41),
    "of a sample": (2, 1, 70, 41),
    "of keys": (2, 1, 1, 41),
    "of queries": (70, 1),
    "shared": (70, 41),
    "of a key": (41,),
    "one": (),
}


@pytest.mark.parametrize("shape", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("kind", ["bool", "float", "-inf"])
def test_masks(shape, kind, block_bytes):
    dtype = torch.float64
    q, k, v = tensors(70, 41, dtype=dtype)
    seen = torch.rand(shape, generator=torch.Generator().manual_seed(4)) < 0.7
    mask = seen if kind == "bool" else numbers(*shape, dtype=dtype)
    if kind == "-inf":
        mask = mask.masked_fill(~seen, -math.inf)
    compare(q, k, v, mask)


def test_a_float32_mask_of_16_bit_tensors(block_bytes):
    q, k, v = tensors(20, 30, dtype=torch.bfloat16)
    gradient = compare(q, k, v, numbers(20, 30))[-1]
    assert gradient.dtype == torch.float32


@pytest.mark.parametrize("scale", [0.3, -2.0, 0.0, 3])
def test_scale(scale, block_bytes):
    compare(*tensors(20, 30), scale=scale)


@pytest.mark.parametrize(
    "shapes",
    [
        ((5, 8), (7, 8), (7, 4)),
        ((3, 5, 8), (3, 7, 8), (3, 7, 4)),
        ((2, 2, 3, 5, 8), (2, 2, 3, 7, 8), (2, 2, 3, 7, 4)),
        ((2, 3, 5, 8), (3, 7, 8), (2, 1, 7, 4)),
        ((3, 5, 8), (2, 1, 7, 8), (7, 4)),
    ],
    ids=str,
)
def test_dimensions_of_the_batch(shapes, block_bytes):
    compare(*(numbers(*shape) for shape in shapes))


@pytest.mark.parametrize("heads", [(6, 3, 3), (6, 1, 1), (6, 3, 2)], ids=str)
@pytest.mark.parametrize("masked", [None, "each", "shared", "plain", "causal"])
def test_shared_heads(heads, masked, block_bytes):
    q, k, v = (numbers(2, h, n, 8, seed=h) for h, n in zip(heads, (17, 30, 30), strict=True))
    shape = {"each": (2, 6, 17, 30), "shared": (2, 1, 17, 30), "plain": (17, 30)}.get(masked)
    compare(q, k, v, numbers(*shape) if shape else None, is_causal=masked == "causal", enable_gqa=True)


def layouts(x):
    """(..., rows, columns) as modules make it, and worse."""
    yield "heads beside features", x.transpose(1, 2).contiguous().transpose(1, 2)
    yield "of nn.MultiheadAttention", x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
    yield "transposed", x.mT.contiguous().mT
    yield "in steps", x.repeat_interleave(2, -1)[..., ::2]
    yield "expanded", x[:, :1].expand_as(x)
    yield "a row for all", x[..., :1, :].expand_as(x)


@pytest.mark.parametrize("index", range(6))
@pytest.mark.parametrize("is_causal", [False, True])
def test_strides(index, is_causal, block_bytes):
    views = [list(layouts(t))[index][1] for t in tensors(40, 40)]
    plain = [t.clone(memory_format=torch.contiguous_format) for t in views]
    for ours, theirs in zip(
        compare(*views, is_causal=is_causal), compare(*plain, is_causal=is_causal), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("shape", [(0, 3, 4, 8), (2, 3, 0, 8)], ids=str)
def test_without_queries(shape, block_bytes):
    q = numbers(*shape).requires_grad_()
    k = numbers(*shape[:2], 5, 8).requires_grad_()
    out = fr.scaled_dot_product_attention(q, k, k, dropout_p=0.3)
    assert out.shape == shape
    assert all((g == 0).all() for g in torch.autograd.grad(out.sum(), (q, k)))


def test_without_keys_or_widths(block_bytes):
    q, none = numbers(2, 3, 4, 8).requires_grad_(), numbers(2, 3, 0, 8)
    for mask in (None, torch.ones(4, 0, dtype=torch.bool), torch.ones(4, 0)):
        out = fr.scaled_dot_product_attention(q, none, none, mask, 0.3)
        assert torch.equal(out, torch.zeros(2, 3, 4, 8)) and not torch.autograd.grad(out.sum(), q)[0].any()
    v = numbers(2, 3, 5, 6)
    compare(numbers(2, 3, 4, 0), numbers(2, 3, 5, 0), v, scale=1.0)
    want = with_seed(SEED, fr.scaled_dot_product_attention, q[..., :0], v[..., :0], v, dropout_p=0.3)
    torch.testing.assert_close(want.double(), reference(q[..., :0], v[..., :0], v, scale=1.0))
    assert fr.scaled_dot_product_attention(q, numbers(2, 3, 5, 8), v[..., :0], dropout_p=0.3).shape == (
        2,
        3,
        4,
        0,
    )


# ---- the sweeps over a block

BLOCK = 2, 5, 37  # heads, rows and columns; two vectors of float32 and a part of one


@pytest.mark.parametrize("columns", [1, 8, 37, 1030], ids="{} columns".format)  # around vectors and a block
@pytest.mark.parametrize("kind", ["plain", "causal", "bool", "float", "bfloat16", "steps", "no key"])
@pytest.mark.parametrize("wide", [torch.float32, torch.float64], ids=str)
def test_the_kernels_do_what_torchs_operators_do(columns, kind, wide):
    """Of both sweeps, on rows that begin anywhere in a byte of the mask, in place and out of place."""
    shape = 2, 5, columns
    scores, p, first_row, keys = 3 * numbers(*shape, dtype=wide), 0.3, 11, columns + 3
    mask = {
        "bool": numbers(*shape) > -0.5,
        "float": numbers(*shape, dtype=wide),
        "bfloat16": numbers(2, 1, columns).bfloat16().expand(shape),
        "steps": numbers(5, columns, 4, dtype=wide)[..., 1].expand(shape),
        "no key": torch.zeros(shape, dtype=torch.bool),
    }.get(kind)
    query = 2 if kind == "causal" else -1
    place = mask, p, torch.tensor([SEED]), first_row, keys, query
    ours, theirs = torch.ops.fastreg, _attention_blocks
    for normalised, in_place in ((True, False), (False, True)):
        found = []
        for weights, gradient in (
            (ours.attention_weights_.default, ours.attention_gradient_.default),
            (theirs._weights_in_torch, theirs._gradient_in_torch),
        ):
            largest, total = (torch.empty(2, 5, 1, dtype=wide) for _ in range(2))
            s, d_scores = scores.clone(), numbers(*shape, dtype=wide, seed=3)
            dropped = s if in_place else torch.empty_like(s)
            weights(s, dropped, *place, normalised, largest, total)
            found.append([dropped.clone(), largest, total])
            s, g = scores.clone(), d_scores.clone()
            if in_place:
                gradient(s, s, g, g, *place, normalised, largest, total)
                found[-1] += [s, g]
            else:
                gradient(s, None, d_scores, g, *place, normalised, largest, total)
                found[-1].append(g)
        for ours_, theirs_ in zip(*found, strict=True):
            torch.testing.assert_close(ours_, theirs_, rtol=1e-5, atol=2e-6)


def test_only_the_dropped_weights():
    s, place = numbers(*BLOCK), (None, 0.3, torch.tensor([SEED]), 0, BLOCK[-1], -1, False)
    largest, total = (torch.empty(2, 5) for _ in range(2))
    again, weights = s.clone(), s.clone()
    torch.ops.fastreg.attention_weights_(weights, weights, *place, largest, total)
    torch.ops.fastreg.attention_gradient_(again, again, None, None, *place, largest, total)
    assert torch.equal(again, weights) and weights.any()


def test_gradients_of_scores_are_never_subnormal():
    """The products after them would crawl."""
    s, place = torch.zeros(1, 1, 64), (None, 0.3, torch.tensor([SEED]), 0, 64, -1, True)
    largest, total = (torch.empty(1, 1) for _ in range(2))
    torch.ops.fastreg.attention_weights_(s, torch.empty_like(s), *place, largest, total)
    for size, nonzero in ((1e-37, False), (1e-30, True)):
        d_scores = torch.empty_like(s)
        p = size * numbers(1, 1, 64)
        torch.ops.fastreg.attention_gradient_(s, None, p, d_scores, *place, largest, total)
        small = (d_scores != 0) & (d_scores.abs() < 2**-126)
        assert not small.any() and bool(d_scores.any()) == nonzero


@pytest.mark.parametrize(
    ("words", "change"),
    [
        ("shape (heads, rows, columns)", dict(scores=torch.zeros(5, 37))),
        ("must be float32 or float64", dict(scores=torch.zeros(BLOCK, dtype=torch.half))),
        ("p must be in [0, 1]", dict(p=1.5)),
        ("seed must be one int64", dict(seed=torch.zeros(1))),
        ("mask must have the shape", dict(mask=torch.zeros(5, 37))),
        ("keys at least 37", dict(keys=36)),
        ("largest must be contiguous", dict(largest=torch.empty(2, 4))),
        ("dropped must be contiguous", dict(dropped=torch.empty(2, 37, 5).mT)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_kernels_refuse_what_does_not_fit(words, change):
    arguments = dict(
        scores=torch.zeros(BLOCK), dropped=torch.empty(BLOCK), mask=None, p=0.3,
        seed=torch.tensor([SEED]), first_row=0, keys=37, query=-1, normalised=True,
        largest=torch.empty(2, 5), total=torch.empty(2, 5),
    )  # fmt: skip
    with pytest.raises((ValueError, RuntimeError), match=re.escape(words)):
        torch.ops.fastreg.attention_weights_.default(*(arguments | change).values())


# ---- what is dropped


def test_the_mask_is_that_of_dropout_for_every_block(by_blocks, monkeypatch):
    """With equal scores and the unit matrix for values the output shows the dropped weights."""
    for length, keys in ((3, 5), (65, 33)):
        q, k, v = (
            torch.zeros(2, 3, length, 4),
            torch.zeros(2, 3, keys, 4),
            torch.eye(keys).expand(2, 3, -1, -1),
        )
        want = kept((2, 3, length, keys), 0.4)
        # Bytes of a block: from as few rows as it may have to all heads at once.
        for size in (2**8, 2**13, 2**20):
            for count in (1, 2):
                monkeypatch.setattr(_attention_blocks, "_BLOCK_BYTES", size)
                with threads(count):
                    got = with_seed(SEED, fr.scaled_dot_product_attention, q, k, v, dropout_p=0.4)
                    assert torch.equal(got != 0, want)
                    got = with_seed(SEED, fr.scaled_dot_product_attention, q, k, v, None, 0.4, True)
                    assert torch.equal(got != 0, want.tril())


@pytest.mark.parametrize("p", [1e-9, 0.9, 1.0])
def test_probabilities(p, block_bytes):
    q, k, v = tensors(40, 50)
    if p < 1:
        compare(q, k, v, p=p)
    else:
        out = fr.scaled_dot_product_attention(q.requires_grad_(), k, v, dropout_p=p)
        assert not out.any() and not torch.autograd.grad(out.sum(), q)[0].any()


def test_the_mean_is_that_without_dropout():
    q, k, v = tensors(6, 9)
    q, k, v = (t[None].expand(1000, *t.shape) for t in (q, k, v))
    mean = fr.scaled_dot_product_attention(q, k, v, dropout_p=0.3).mean(0)
    torch.testing.assert_close(mean, F.scaled_dot_product_attention(q[0], k[0], v[0]), rtol=0, atol=0.1)


def test_generators():
    q, k, v = tensors(6, 9)

    def run(seed):
        return fr.scaled_dot_product_attention(
            q, k, v, dropout_p=0.3, generator=torch.Generator().manual_seed(seed)
        )

    assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))
    state = torch.get_rng_state()
    run(3)
    fr.scaled_dot_product_attention(q, k, v)  # nothing is dropped, nothing is drawn
    assert torch.equal(state, torch.get_rng_state())


def test_without_dropout_it_is_torchs():
    q, k, v = (t.requires_grad_() for t in tensors(40, 50))
    mask = numbers(40, 50)
    for arguments, options in (
        ((q, k, v), {}),
        ((q, k, v, mask), {"scale": 0.1}),
        ((q, k, v, None, 0.0, True), {}),
    ):
        assert torch.equal(
            fr.scaled_dot_product_attention(*arguments, **options),
            F.scaled_dot_product_attention(*arguments, **options),
        )
    q, k = numbers(2, 6, 5, 8), numbers(2, 3, 5, 8)
    ours, theirs = (
        f(q, k, k, enable_gqa=True) for f in (fr.scaled_dot_product_attention, F.scaled_dot_product_attention)
    )
    assert torch.equal(ours, theirs)


# ---- hostile numbers


@pytest.mark.parametrize("kind", ["bool", "float", "none", "causal"])
def test_a_query_that_sees_no_key_gives_zero_as_torchs(kind, block_bytes):
    q, k, v = tensors(40, 50)
    mask = torch.ones(40, 50, dtype=torch.bool)
    mask[7] = False
    if kind == "float":
        mask = torch.zeros(40, 50).masked_fill(~mask, -math.inf)
    if kind in ("none", "causal"):  # scores that overflow to -inf
        mask = None
        q[:, :, 7], k = -1e30, k.abs() * 1e30 + 1e20
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out = fr.scaled_dot_product_attention(*leaves, mask, 0.3, kind == "causal")
    assert (out[:, :, 7] == 0).all()
    with sdpa_kernel(SDPBackend.MATH):
        assert (F.scaled_dot_product_attention(*leaves, mask, 0.0, kind == "causal")[:, :, 7] == 0).all()
    gradients = torch.autograd.grad(out[:, :, 7].sum(), leaves)
    assert all((g == 0).all() for g in gradients)
    if mask is not None:
        assert out.isfinite().all()


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan], ids=str)
def test_infinities_stay_in_their_row(value, block_bytes):
    q, k, v = tensors(40, 50)
    q[0, 1, 7, 3] = value
    out = fr.scaled_dot_product_attention(q, k, v, dropout_p=0.3)
    assert out[0, 1, 7].isnan().all()
    out[0, 1, 7] = 0
    assert out.isfinite().all()
    v[0, 1, 7, 3] = value
    q[0, 1, 7, 3] = 0
    out = with_seed(SEED, fr.scaled_dot_product_attention, q, k, v, dropout_p=0.3)
    assert out.isfinite().all(-2).logical_not().nonzero().tolist() == [[0, 1, 3]]


@pytest.mark.parametrize("size", [30.0, 1e3, 1e5])
def test_large_scores(size, block_bytes):
    q, k, v = tensors(40, 50, dtype=torch.float64)
    q = (q * size).round()  # so that float32 has the scores exactly
    q, k, v = (t.float() for t in (q, k.round(), v))
    largest = (q @ k.mT).abs().max().item()
    compare(
        q, k, v, scale=1.0, noise=torch.finfo(torch.float32).eps * largest
    )  # as rounding the scores gives


# ---- derivatives


def test_gradients_of_gradients(block_bytes):
    q, k, v = (t.requires_grad_() for t in tensors(3, 4, 2, 2, heads=(2,), dtype=torch.float64))
    mask = numbers(3, 4, dtype=torch.float64).requires_grad_()

    def f(q, k, v, mask):
        return with_seed(SEED, fr.scaled_dot_product_attention, q, k, v, mask, 0.3)

    assert torch.autograd.gradcheck(f, (q, k, v, mask), fast_mode=True)
    assert torch.autograd.gradgradcheck(f, (q, k, v, mask), fast_mode=True)

    def causal(q, k, v):
        return with_seed(SEED, fr.scaled_dot_product_attention, q, k, v, None, 0.3, True)

    assert torch.autograd.gradcheck(causal, (q, k, v), fast_mode=True)
    assert torch.autograd.gradgradcheck(causal, (q, k, v), fast_mode=True)


@pytest.mark.parametrize("wanted", ["q", "k", "v", "m", "qv", "km", "vm"])
def test_only_the_gradients_that_are_wanted(wanted, block_bytes):
    inputs = dict(zip("qkvm", (*tensors(20, 30), numbers(20, 30)), strict=True))
    leaves = {name: t.clone().requires_grad_(name in wanted) for name, t in inputs.items()}
    got = with_seed(SEED, fr.scaled_dot_product_attention, *leaves.values(), 0.3)
    want = reference(*leaves.values())
    g = numbers(*got.shape)
    some = [leaves[name] for name in wanted]
    for ours, theirs in zip(
        torch.autograd.grad(got, some, g), torch.autograd.grad(want, some, g.double()), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_saved_for_backward(by_blocks):
    q, k, v = (t.requires_grad_() for t in tensors(40, 50))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fr.scaled_dot_product_attention(q, k, v, dropout_p=0.3)
    own = sum(t.numel() for t in saved if not any(t is x for x in (q, k, v)))
    assert own == 2 * 2 * 3 * 40 + 1  # two numbers a row, and the seed


# ---- doors


def case():
    return [t.requires_grad_() for t in tensors(20, 30)]


def test_opcheck():
    seed = torch.tensor([SEED])
    q, k, v = case()
    q, k, v = (t.detach() for t in (q, k, v))
    for mask, is_causal, wants in ((None, True, "qkv"), (numbers(20, 30), False, "qm")):
        options = (0.3, is_causal, 0.4, seed)
        torch.library.opcheck(OP, (q, k, v, mask, *options, [], []))
        out, largest, total = OP(q, k, v, mask, *options, [], [])
        arguments = torch.ones_like(out), q, k, v, mask, largest, total, *options, wants, [], []
        torch.library.opcheck(BACKWARD, arguments, test_utils=("test_schema", "test_faketensor"))


def test_compiled():
    q, k, v = case()

    def f(q, k, v):
        return fr.scaled_dot_product_attention(q, k, v, dropout_p=0.3) + fr.scaled_dot_product_attention(
            q, q, q, None, 0.3, True
        )

    torch._dynamo.reset()
    run = torch.compile(f, backend="aot_eager", fullgraph=True)
    ours, theirs = with_seed(3, run, q, k, v), with_seed(3, f, q, k, v)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(*(torch.autograd.grad(o.sum(), (q, k, v)) for o in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b)
    torch._dynamo.reset()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint(use_reentrant, block_bytes):
    q, k, v = case()
    run = lambda *t: fr.scaled_dot_product_attention(*t, dropout_p=0.3)  # noqa: E731
    ours = with_seed(3, lambda: checkpoint(run, q, k, v, use_reentrant=use_reentrant))
    theirs = with_seed(3, run, q, k, v)
    assert torch.equal(ours, theirs)
    for a, b in zip(*(torch.autograd.grad(o.sum(), (q, k, v)) if not use_reentrant else backward(o, (q, k, v))
                      for o in (ours, theirs)), strict=True):  # fmt: skip
        assert torch.equal(a, b)


def backward(out, leaves):
    for leaf in leaves:
        leaf.grad = None
    out.sum().backward()
    return [leaf.grad for leaf in leaves]


def test_autocast(block_bytes):
    q, k, v = case()
    with torch.autocast("cpu", torch.bfloat16):
        for inputs in ((q, k, v), (q.half(), k, v)):
            for mask in (None, numbers(20, 30), numbers(20, 30, dtype=torch.float16)):
                out = fr.scaled_dot_product_attention(*inputs, mask, 0.3)
                assert out.dtype == torch.bfloat16
        assert (
            fr.scaled_dot_product_attention(*(t.double() for t in (q, k, v)), dropout_p=0.3).dtype
            == torch.float64
        )
        out = with_seed(SEED, fr.scaled_dot_product_attention, q, k, v, dropout_p=0.3)
    gradients = torch.autograd.grad(out.float().sum(), (q, k, v))
    assert all(g.dtype == torch.float32 for g in gradients)
    torch.testing.assert_close(out.double(), reference(q, k, v), rtol=3e-2, atol=3e-2)


def test_inference_deterministic_and_fake(block_bytes):
    q, k, v = tensors(20, 30)
    want = with_seed(3, fr.scaled_dot_product_attention, q, k, v, dropout_p=0.3)
    torch.use_deterministic_algorithms(True)
    try:
        with torch.inference_mode():
            assert torch.equal(with_seed(3, fr.scaled_dot_product_attention, q, k, v, dropout_p=0.3), want)
    finally:
        torch.use_deterministic_algorithms(False)
    out = fr.scaled_dot_product_attention(*(t.to("meta") for t in (q, k, v)), dropout_p=0.3)
    assert out.is_meta and out.shape == want.shape and out.stride() == want.stride()
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in (q, k, v)]
        assert fr.scaled_dot_product_attention(*fakes, dropout_p=0.3).shape == want.shape
    traced = torch.fx.experimental.proxy_tensor.make_fx(
        lambda *t: fr.scaled_dot_product_attention(*t, dropout_p=0.3)
    )(q, k, v)
    assert torch.equal(with_seed(3, traced, q, k, v), with_seed(3, traced, q, k, v))


@pytest.mark.parametrize("options", [{}, dict(enable_gqa=True), dict(is_causal=True)], ids=str)
def test_products_are_counted(options):
    """Forward as of torch's function; backward two products a gradient, and the scores once more."""
    q, k, v = tensors(5, 7, width_of_values=3)
    if "enable_gqa" in options:
        k, v = k[:, :1].clone(), v[:, :1].clone()
    for t in (q, k, v):
        t.requires_grad_()
    counts = []
    for function in (fr.scaled_dot_product_attention, F.scaled_dot_product_attention):
        with FlopCounterMode(display=False) as forward:
            output = function(q, k, v, dropout_p=0.3, **options)
        with FlopCounterMode(display=False) as backward:
            output.sum().backward()
        counts += [forward.get_total_flops(), backward.get_total_flops()]
    scores = 2 * 2 * 3 * 5 * 7 * 8
    assert counts[0] == counts[2] > 0 and counts[1] == counts[3] + scores


def test_per_sample_gradients():
    q, k, v = tensors(4, 5, heads=(3, 2), dtype=torch.float64)

    def loss(q, k, v):
        return fr.scaled_dot_product_attention(q, k, v, dropout_p=0.3).pow(2).sum()

    torch.manual_seed(3)
    each = torch.func.vmap(torch.func.grad(loss), randomness="same")(q, k, v)
    for i in range(3):
        torch.manual_seed(3)
        torch.testing.assert_close(torch.func.grad(loss)(q[i], k[i], v[i]), each[i])


def test_memory_grows_with_the_length():
    """The peak of a process that attends to 3,072 tokens, forward and backward, beside that of 1,024."""
    code = """
import resource, sys, torch, fastreg as fr
torch.set_num_threads(1)
def peak(n):
    q, k, v = (torch.randn(1, 1, n, 16, requires_grad=True) for _ in range(3))
    fr.scaled_dot_product_attention(q, k, v, dropout_p=0.1).sum().backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(peak(1024), peak(3072))
"""
    small, large = map(float, run_python(code, check=True, OMP_NUM_THREADS=1).stdout.split())
    assert large - small < 18, (small, large)  # MiB; all weights once are 36


def _shared_heads_on_shards(rank):
    """Heads that are shared, masks of every kind and place, and other placements of key and value: the values
    and gradients of the whole, by fastreg's name and by torch's where it is patched.
    """
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    generator = torch.Generator().manual_seed(4)
    q = torch.randn(3, 6, 7, 8, generator=generator)
    full = torch.randn(3, 6, 7, 9, generator=generator)
    for groups, placement, mask, of_mask in itertools.product(
        (6, 3, 2), (Replicate(), Shard(0), Shard(1)), (None, full, full[0, :1], full < 0.5), (0, 1, 2)
    ):
        k, v = (torch.randn(3, groups, 9, 8, generator=generator) for _ in range(2))
        inputs = [q, k, v, *([] if mask is None else [mask])]
        options = dict(dropout_p=0.3, enable_gqa=True)
        leaves = [t.clone().requires_grad_(t.is_floating_point()) for t in inputs]
        differ = [t for t in leaves if t.requires_grad]
        want = with_seed(1, fr.scaled_dot_product_attention, *leaves, **options)
        wanted = torch.autograd.grad(want.pow(2).sum(), differ)
        parts = [distribute_tensor(t, mesh, [placement]) for t in (q, k, v)]
        parts[1] = distribute_tensor(k, mesh, [Replicate()])  # it goes where query is
        if mask is not None:
            by = (None, Replicate(), Shard(mask.dim() - 1))[of_mask]
            parts.append(mask.clone() if by is None else distribute_tensor(mask, mesh, [by]))
        parts = [t.requires_grad_(t.is_floating_point()) for t in parts]
        differ = [t for t in parts if t.requires_grad]
        for name in (fr, F):
            with fr.patched():
                got = with_seed(1 + rank, name.scaled_dot_product_attention, *parts, **options)
            assert got.placements == (placement,)
            what = groups, placement, None if mask is None else (mask.shape, mask.dtype, by), name
            torch.testing.assert_close(got.full_tensor(), want, msg=lambda text, what=what: f"{what}: {text}")
            for part, grad in zip(wanted, torch.autograd.grad(got.pow(2).sum(), differ), strict=True):
                grad = grad.full_tensor() if isinstance(grad, DTensor) else grad
                torch.testing.assert_close(grad, part, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_shared_heads_and_masks_of_dtensors():
    on_ranks(2, _shared_heads_on_shards)


def _on_shards(rank):
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    for mask in (None, torch.rand(3, 1, 20, 30, generator=torch.Generator().manual_seed(2)) < 0.7):
        tensors_ = tensors(20, 30, heads=(3, 5))
        for placement in (Replicate(), Shard(0), Shard(1)):
            whole = [t.clone().requires_grad_() for t in tensors_]
            want = with_seed(1, fr.scaled_dot_product_attention, *whole, mask, 0.3)
            want.pow(2).sum().backward()
            parts = [distribute_tensor(t, mesh, [placement]).requires_grad_() for t in tensors_]
            got = with_seed(1 + rank, fr.scaled_dot_product_attention, *parts, mask, 0.3)
            got.pow(2).sum().backward()
            assert got.placements == (placement,)
            torch.testing.assert_close(got.full_tensor(), want)
            for part, leaf in zip(parts, whole, strict=True):
                torch.testing.assert_close(part.grad.full_tensor(), leaf.grad)
    rows = [distribute_tensor(t, mesh, [Shard(2)]) for t in tensors_]
    for wrong, options, words in (
        (rows, {}, "must be replicated or sharded in the dimensions before the last two"),
        ((parts[0], *rows[1:]), {}, "got key with"),
        ((parts[0], *tensors_[1:]), {}, "query, key and value must all be some"),
    ):
        with pytest.raises(ValueError, match=words):
            fr.scaled_dot_product_attention(*wrong, dropout_p=0.3, **options)


@pytest.mark.slow
def test_dtensors_draw_what_the_whole_tensor_draws():
    on_ranks(2, _on_shards)


# ---- errors

Q, K, V = tensors(4, 5)
REFUSED = {
    "query must be a torch.Tensor, got list": (([1], K, V), {}, TypeError),
    "attn_mask must be a torch.Tensor, got bool": ((Q, K, V, True), {}, TypeError),
    "dropout_p must be in \\[0, 1\\], got 1.5": ((Q, K, V, None, 1.5), {}, RuntimeError),
    "dropout_p must be in \\[0, 1\\], got nan": ((Q, K, V, None, math.nan), {}, ValueError),
    "dropout_p must be a number, got str": ((Q, K, V, None, "0.1"), {}, TypeError),
    "is_causal must be True or False, got int": ((Q, K, V, None, 0.1, 1), {}, TypeError),
    "scale must be finite": ((Q, K, V), {"scale": math.inf}, ValueError),
    "generator must be a torch.Generator, got int": ((Q, K, V), {"generator": 3}, TypeError),
    "key must be torch.float32 on cpu as query is, got torch.float64": ((Q, K.double(), V), {}, RuntimeError),
    "value must be torch.float32 on cpu as query is, got torch.float32 on meta": (
        (Q, K, V.to("meta")), {}, RuntimeError,
    ),
    "query must be float32, float64, float16 or bfloat16, got torch.int32": (
        [t.int() for t in (Q, K, V)], {}, RuntimeError,
    ),
    "query must be a dense tensor, got torch.sparse_coo": ((Q.to_sparse(), K, V), {}, RuntimeError),
    "query must have at least 2 dimensions": ((Q[0, 0, 0], K, V), {}, RuntimeError),
    "key must have the width of query, 8, got shape \\(2, 3, 5, 7\\)": ((Q, K[..., :7], V), {}, RuntimeError),
    "value must have a row for each of the 5 rows of key, got": ((Q, K, V[..., :4, :]), {}, RuntimeError),
    "must broadcast, got shapes .*; where query has more heads, set enable_gqa=True": (
        (Q, K[:, :2], V[:, :2]), {}, RuntimeError,
    ),
    "the heads of key must divide those of query, 3, got 2": (
        (Q, K[:, :2], V), {"enable_gqa": True}, RuntimeError,
    ),
    "with enable_gqa=True the tensors must have at least 3 dimensions": (
        (Q[0, 0], K[0, 0], V[0, 0]), {"enable_gqa": True}, RuntimeError,
    ),
    "attn_mask must be None where is_causal=True": ((Q, K, V, torch.ones(4, 5), 0.1, True), {}, RuntimeError),
    "attn_mask must be bool, float32 or torch.float32 as query is, got torch.int64": (
        (Q, K, V, torch.ones(4, 5).long()), {}, RuntimeError,
    ),
    "attn_mask must be on cpu as query is, got meta": (
        (Q, K, V, torch.ones(4, 5, device="meta")), {}, RuntimeError,
    ),
    "attn_mask must broadcast to the weights' shape \\(2, 3, 4, 5\\), got \\(3, 5\\)": (
        (Q, K, V, torch.ones(3, 5)), {}, RuntimeError,
    ),
    "attn_mask must broadcast to the weights' shape \\(2, 3, 4, 5\\), got \\(1, 2, 3, 4, 5\\)": (
        (Q, K, V, torch.ones(1, 2, 3, 4, 5)), {}, RuntimeError,
    ),
}  # fmt: skip


@pytest.mark.parametrize("words", REFUSED)
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_errors(words, p):
    arguments, options, kind = REFUSED[words]
    if len(arguments) < 5:
        options = {"dropout_p": p, **options}
    before = torch.get_rng_state()
    with pytest.raises(kind, match=f"^scaled_dot_product_attention: .*{words}"):
        fr.scaled_dot_product_attention(*copy.copy(arguments), **options)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("door", ["held", "by blocks", "torch's operators", "transformed"])
def test_a_key_out_of_sight_that_is_no_number_shows_as_with_torch(value, door, monkeypatch):
    """Whatever the size: torch adds -inf where a key is out of sight, and the sum is NaN."""
    q, k, v = tensors(3, 4)
    k[..., 3, :] = value
    mask = torch.tensor([True, True, True, False]).expand(3, 4)
    if door == "by blocks":
        monkeypatch.setattr(_attention, "_FEW", -1)
    run = fr.scaled_dot_product_attention
    if door == "torch's operators":
        monkeypatch.setattr(_attention, "_FEW", -1)
        monkeypatch.setattr(_attention_blocks, "attention_weights_op", _attention_blocks._weights_in_torch)
    elif door == "transformed":
        run = torch.func.vmap(run, in_dims=(0, 0, 0, None, None), randomness="different")
    with sdpa_kernel(SDPBackend.MATH):
        want = F.scaled_dot_product_attention(q, k, v, mask, 1e-9)
    for options in ({}, {"generator": torch.Generator()})[: 1 if door == "transformed" else 2]:
        assert torch.equal(run(q, k, v, mask, 1e-9, **options).isnan(), want.isnan())
