"""Dropout: the bits are Philox's, the same for every layout, split, thread count and instruction set; the
values are one rounding of scale * x where kept and 0 elsewhere; the derivative reads one bit per element; and
all of it holds through every door of torch (autograd, compile, checkpoint, torch.func, DTensor). References
are NumPy or plain torch and share no code with the op."""

import copy
import inspect
import math
import os
import pickle
import subprocess
import sys
import warnings
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import DTYPES
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

import fastreg as fr

OP = torch.ops.fastreg.dropout.default
OP_IN_PLACE = torch.ops.fastreg.dropout_.default
OP_APPLY = torch.ops.fastreg.dropout_apply.default
MASK32 = 0xFFFFFFFF


# --------------------------------------------------------------------------------------------------
# references
def philox(c0, c1, c2, c3, seed):
    """Philox4x32-10 after Salmon et al. 2011, on arrays of counters; four arrays of 32-bit words."""
    c = [np.asarray(word, dtype=np.uint64) for word in np.broadcast_arrays(c0, c1, c2, c3)]
    k0, k1 = seed & MASK32, seed >> 32 & MASK32
    for _ in range(10):
        a, b = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        low, high = np.uint64(MASK32), np.uint64(32)
        c = [(b >> high) ^ c[1] ^ np.uint64(k0), b & low, (a >> high) ^ c[3] ^ np.uint64(k1), a & low]
        k0, k1 = (k0 + 0x9E3779B9) & MASK32, (k1 + 0xBB67AE85) & MASK32
    return c


def draws(seed, offset, count):
    """The 16 high and the 16 low random bits of the elements [offset, offset + count)."""
    index = np.uint64(offset) + np.arange(count, dtype=np.uint64)
    group, j = index // np.uint64(8), (index % np.uint64(8)).astype(np.int64)
    halves = []
    for draw in (0, 1):
        words = np.stack(philox(group & np.uint64(MASK32), group >> np.uint64(32), draw, 0, seed))
        halves.append(words[j // 2, np.arange(count)] >> (16 * (j % 2)).astype(np.uint64) & np.uint64(0xFFFF))
    return halves


def kept_reference(seed, offset, count, p):
    """Whether each element is kept: 32 random bits below (1 - p) 2^32."""
    high, low = draws(seed % 2**64, offset, count)
    return (high << np.uint64(16) | low) < np.uint64(math.floor((1 - p) * 2**32 + 0.5))


def scale_of(p):
    kept = math.floor((1 - p) * 2**32 + 0.5)
    return 2**32 / kept if kept else 0.0


def values_reference(x, kept, scale, shift=0.0, dropped=0.0):
    """One rounding to the dtype at the end, arithmetic in float32 or float64."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    value = x.to(wide) * torch.tensor(scale, dtype=wide)
    if shift:
        value = value + torch.tensor(shift, dtype=wide)
    return torch.where(kept, value, torch.tensor(dropped, dtype=wide)).to(x.dtype)


def assert_same(got, want):
    """Equal bits, except that one NaN is like another."""
    assert got.dtype == want.dtype and got.shape == want.shape
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0))
    assert torch.equal(torch.signbit(got)[~got.isnan()], torch.signbit(want)[~want.isnan()])


def with_seed(seed, f, *args, **kwargs):
    torch.manual_seed(seed)
    return f(*args, **kwargs)


# --------------------------------------------------------------------------------------------------
# the bits
KNOWN_ANSWERS = [  # Random123's kat_vectors: counter, key, result
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize("counter, key, expected", KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, expected):
    counter, key, expected = ([int(word, 16) for word in text.split()] for text in (counter, key, expected))
    assert fr._C.philox4x32(counter, key) == expected
    assert [
        int(word) for word in philox(*counter, key[0] | key[1] << 32)
    ] == expected  # the reference of this file too


OFFSETS = (0, 1, 7, 8, 2**33 + 5, 2**40 - 3, 2**62 + 3)
SEEDS = (0, 1, -1, 2**63 - 1, -(2**63), 0x9E3779B97F4A7C15, -12345678901234567)


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("seed", SEEDS)
def test_mask_is_the_reference_bit_for_bit(seed, offset):
    for count, p in ((1, 0.5), (7, 0.5), (8, 0.3), (1000, 0.1), (2500, 0.7)):
        _, mask = fr.dropout_with_mask(torch.ones(count), p, seed=seed, offset=offset)
        expected = np.packbits(
            kept_reference(seed, offset, count, p), bitorder="little"
        )  # pads with 0: unused bits too
        assert np.array_equal(mask.numpy(), expected), (count, p)


@pytest.mark.parametrize(
    "count", [*range(1, 68), 1023, 1024, 1025, 8191, 8192, 8193, 32767, 32768, 32769, 65537]
)
@pytest.mark.parametrize("offset", [0, 5])
def test_mask_and_values_at_every_odd_size(count, offset):
    x = torch.randn(count)
    y, mask = fr.dropout_with_mask(x, 0.4, seed=9, offset=offset)
    kept = torch.from_numpy(kept_reference(9, offset, count, 0.4))
    assert mask.dtype == torch.uint8 and mask.shape == ((count + 7) // 8,)
    assert np.array_equal(mask.numpy(), np.packbits(kept.numpy(), bitorder="little"))
    assert_same(y, values_reference(x, kept, scale_of(0.4)))


@pytest.mark.parametrize("p", [0.3, 0.5 + 2**-17, 1 / 3])
@pytest.mark.parametrize("offset", [0, 3])
def test_ties_of_the_first_sixteen_bits_are_settled_by_the_next(p, offset):
    count, seed = 2**20, 77
    threshold = math.floor((1 - p) * 2**32 + 0.5)
    high, _ = draws(seed, offset, count)
    tie = high == np.uint64(threshold >> 16)
    expected = kept_reference(seed, offset, count, p)
    assert expected[tie].any() and not expected[tie].all()  # both outcomes are in the sample
    mask = fr.dropout_with_mask(torch.ones(count), p, seed=seed, offset=offset)[1]
    assert np.array_equal(np.unpackbits(mask.numpy(), bitorder="little").astype(bool), expected)


def test_a_keep_probability_below_two_to_the_minus_sixteen_is_exact():
    p, count = 1 - 3 * 2**-18, 2**21  # every kept element is a tie of the first 16 bits
    y, mask = fr.dropout_with_mask(torch.ones(count, dtype=torch.float64), p, seed=5)
    expected = kept_reference(5, 0, count, p)
    assert 5 < expected.sum() < 60
    assert torch.equal(fr.unpack_mask(mask, (count,)), torch.from_numpy(expected))
    assert torch.equal(y[torch.from_numpy(expected)].unique(), torch.tensor([2**18 / 3], dtype=torch.float64))


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 3000),
    p=st.floats(0, 1),
    seed=st.integers(-(2**63), 2**64 - 1),
    offset=st.integers(0, 2**62),
)
def test_mask_of_anything(count, p, seed, offset):
    y, mask = fr.dropout_with_mask(torch.ones(count), p, seed=seed, offset=offset)
    kept = kept_reference(seed, offset, count, p)
    assert np.array_equal(mask.numpy(), np.packbits(kept, bitorder="little"))
    assert np.array_equal(y.numpy(), np.where(kept, np.float32(scale_of(p)), np.float32(0)))


def test_an_int_seed_is_taken_modulo_two_to_the_64_and_equals_its_tensor():
    x = torch.ones(500)
    for seed in SEEDS:
        wrapped = torch.tensor([(seed + 2**63) % 2**64 - 2**63])
        want = fr.dropout_with_mask(x, seed=seed)[1]
        assert torch.equal(want, fr.dropout_with_mask(x, seed=wrapped)[1])
        assert torch.equal(want, fr.dropout_with_mask(x, seed=wrapped.squeeze())[1])
        assert torch.equal(want, fr.dropout_with_mask(x, seed=seed + 2**64)[1])


# -------------------------------------------------------------------------------------------- the same bits,
# whatever else
def test_thread_count_does_not_change_bits(dtype):
    x = torch.randn(200_003).to(dtype)
    want = None
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            got = [
                *fr.dropout_with_mask(x, 0.3, seed=1, offset=3),
                *OP(x[:200_000], 0.3, torch.tensor([1]), 0, 5, 2.0),
                OP_APPLY(x[:200_000], OP(x[:200_000], 0.3, torch.tensor([1]), 0, 5)[1], 5, 2.0, 1.0, -1.0),
            ]
            want = want or got
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    finally:
        torch.set_num_threads(before)


def layouts(x):
    """The values of a 4-D x in other memory layouts."""
    yield "contiguous", x
    yield "channels_last", x.to(memory_format=torch.channels_last)
    yield "transposed", x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    yield "reversed", x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1] + 3), math.nan)
    wide[..., 1:-2:2] = x
    yield "sliced", wide[..., 1:-2:2]
    rows = x.new_full((x.shape[0], x.shape[1] + 2, *x.shape[2:]), math.nan)
    rows[:, 1:-1] = x
    yield "sliced rows", rows[:, 1:-1]
    shifted = x.new_empty(x.numel() + 1)
    shifted[1:] = x.flatten()
    yield "storage offset", shifted[1:].view(x.shape)


@pytest.mark.parametrize("shape", [(3, 5, 7, 9), (2, 1, 3, 1), (5, 6, 17, 19), (4, 3, 1, 1200)])
@pytest.mark.parametrize("inner_dims", [0, 2, 3])
def test_memory_layout_does_not_change_bits_and_is_kept(dtype, shape, inner_dims):
    x = torch.randn(shape).to(dtype)
    inner = math.prod(shape[4 - inner_dims :])
    seed, arguments = torch.tensor([3]), (3, inner, 2.0, 0.5, -1.0)
    want, want_mask = OP(x, 0.4, seed, *arguments)
    kept = (
        torch.from_numpy(kept_reference(3, 3, x.numel() // inner, 0.4)).repeat_interleave(inner).view(shape)
    )
    assert_same(want, values_reference(x, kept, 2.0, 0.5, -1.0))
    for name, other in layouts(x):
        assert torch.equal(other, x), name
        y, mask = OP(other, 0.4, seed, *arguments)
        assert torch.equal(y, want) and torch.equal(mask, want_mask), name
        assert y.stride() == torch.empty_like(other).stride(), name
        again = OP_APPLY(other, mask, inner, 2.0, 0.5, -1.0)
        assert torch.equal(again, want) and again.stride() == y.stride(), name
        mine = other.clone() if name != "sliced" else other
        assert torch.equal(OP_IN_PLACE(mine, 0.4, seed, *arguments), want_mask) and torch.equal(mine, want), (
            name
        )


def test_in_place_writes_between_the_elements_of_a_view_nowhere():
    base = torch.full((40, 11), 7.0)
    fr.dropout(base[:, 2:9:3], 1 - 1e-12, inplace=True)
    outside = torch.ones(11, dtype=torch.bool)
    outside[2:9:3] = False
    assert (base[:, outside] == 7).all() and (base[:, ~outside] == 0).all()


def test_expanded_inputs_draw_for_every_element(dtype):
    row = torch.randn(37).to(dtype)
    for x in (row.expand(50, 37), row.unsqueeze(1).expand(37, 50), row[:1].expand(3000), row[0].expand(7, 9)):
        got, want = (fr.dropout_with_mask(t, 0.5, seed=2) for t in (x, x.contiguous()))
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_many_dimensions_and_a_limit_that_is_said():
    x = torch.randn([2] * 16)
    reverse = x.permute(*range(15, -1, -1))
    assert torch.equal(
        fr.dropout_with_mask(reverse, seed=1)[0], fr.dropout_with_mask(reverse.contiguous(), seed=1)[0]
    )
    assert fr.dropout(torch.randn([1] * 40 + [3])).shape == (*[1] * 40, 3)
    with pytest.raises(
        ValueError, match=r"dropout: at most 16 dimensions that do not merge, got 17; call \.contiguous\(\)"
    ):
        fr.dropout(torch.randn([2] * 17).permute(*range(16, -1, -1)))


@pytest.mark.parametrize("cut", [1, 7, 8, 1000, 4096, 4999])
def test_shards_with_their_offset_draw_what_the_whole_draws(dtype, cut):
    x = torch.randn(5000).to(dtype)
    for base in (0, 2**33 + 5):
        whole, mask = fr.dropout_with_mask(x, 0.3, seed=8, offset=base)
        a, mask_a = fr.dropout_with_mask(x[:cut], 0.3, seed=8, offset=base)
        b, mask_b = fr.dropout_with_mask(x[cut:], 0.3, seed=8, offset=base + cut)
        assert torch.equal(torch.cat([a, b]), whole)
        parts = [fr.unpack_mask(m, (n,)) for m, n in ((mask_a, cut), (mask_b, 5000 - cut))]
        assert torch.equal(torch.cat(parts), fr.unpack_mask(mask, (5000,)))


def test_every_dtype_draws_the_same():
    masks = {dtype: fr.dropout_with_mask(torch.ones(777, dtype=dtype), 0.2, seed=4)[1] for dtype in DTYPES}
    assert all(torch.equal(mask, masks[torch.float32]) for mask in masks.values())


DIGEST = """
import hashlib, torch, fastreg as fr
torch.set_num_threads(1); torch.manual_seed(0)
digest = hashlib.sha256()
def add(*tensors):
    for t in tensors: digest.update(t.contiguous().view(torch.uint8).numpy().tobytes())
for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
    for n in (1, 7, 15, 16, 17, 33, 1023, 1025, 40001):
        x = torch.randn(n) * 10.0 ** torch.randint(-9, 6, (n,))
        x = torch.cat([x, torch.tensor([0.0, -0.0, torch.inf, -torch.inf])]).to(dtype)
        for p in (0.1, 0.5, 1 / 3):
            add(*fr.dropout_with_mask(x, p, seed=n, offset=n))
            add(*torch.ops.fastreg.dropout(x, p, torch.tensor([n]), 0, x.numel(), 1.3, 0.7, -0.3))
            add(*torch.ops.fastreg.dropout(x, p, torch.tensor([n]), 0, 1, 1.3, 0.7, -0.3))
    x = torch.randn(6, 7, 9, 11).to(dtype).to(memory_format=torch.channels_last)
    add(*fr.dropout_with_mask(x, 0.4, seed=5))
print(fr._C.build_info()["instruction_set"], digest.hexdigest())
"""


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_every_instruction_set_gives_the_same_bits():
    sets = fr._C.build_info()["instruction_sets"].split(",")
    lines = {}
    for name in sets:
        result = run_python(DIGEST, FASTREG_CPU_CAPABILITY=name)
        if "that this machine can run" in result.stderr:
            continue
        assert result.returncode == 0, result.stderr
        ran, lines[name] = result.stdout.split()
        assert ran == name
    assert len(lines) >= 1 and len(set(lines.values())) == 1, lines
    assert set(sets[: 1 + sets.index(fr._C.build_info()["instruction_set"])]) <= set(lines)


def test_an_impossible_instruction_set_is_refused_at_import():
    result = run_python("import fastreg", FASTREG_CPU_CAPABILITY="nonsense")
    assert result.returncode != 0
    assert (
        "FASTREG_CPU_CAPABILITY: expected one of" in result.stderr
        and "got 'nonsense'; unset it" in result.stderr
    )


# --------------------------------------------------------------------------------------------------
# the values
@pytest.mark.parametrize("p", [0.1, 0.3, 0.5, 0.9, 1e-12, 1 - 1e-9])
def test_values_are_one_rounding_of_scale_times_x(dtype, p):
    x = torch.cat(
        [
            torch.randn(3000) * 10.0 ** torch.randint(-10, 10, (3000,)),
            torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan]),
        ]
    )
    info = torch.finfo(dtype)
    x = torch.cat(
        [
            x.to(dtype),
            torch.tensor([info.max, -info.max, info.tiny, info.smallest_normal / 2], dtype=dtype).repeat(20),
        ]
    )
    y, mask = fr.dropout_with_mask(x, p, seed=6)
    kept = torch.from_numpy(kept_reference(6, 0, x.numel(), p))
    assert torch.equal(fr.unpack_mask(mask, x.shape), kept)
    assert_same(y, values_reference(x, kept, scale_of(p)))
    assert not y[~kept].any() and not y[~kept].isnan().any()


def test_a_dropped_infinity_or_nan_is_zero_where_torch_gives_nan(dtype):
    x = torch.tensor([math.inf, -math.inf, math.nan] * 100, dtype=dtype)
    y, mask = fr.dropout_with_mask(x, 0.5, seed=1)
    kept = fr.unpack_mask(mask, x.shape)
    assert (y[~kept] == 0).all() and 100 < (~kept).sum() < 200
    assert not torch.signbit(y[~kept]).any()
    infinities = torch.full((300,), math.inf, dtype=dtype, requires_grad=True)
    assert (
        F.dropout(infinities, 0.5).isnan().any()
    )  # torch multiplies by its mask: the fault that we don't have
    assert not fr.dropout(infinities, 0.5).isnan().any()


def test_zero_is_identity_and_one_gives_zeros(dtype):
    x = torch.randn(3, 5).to(dtype)
    x[0, 0] = math.nan
    assert fr.dropout(x, 0.0) is x and fr.dropout(x, 0) is x
    assert fr.dropout(x, 0.7, training=False) is x
    for one in (1, 1.0):
        y = fr.dropout(x, one)
        assert torch.equal(y, torch.zeros_like(x)) and y.dtype == dtype
    leaf = x.clone().requires_grad_()
    fr.dropout(leaf, 1.0).sum().backward()
    assert torch.equal(leaf.grad, torch.zeros_like(x))
    y, mask = fr.dropout_with_mask(x, 0.0)
    assert_same(y, x)
    assert fr.unpack_mask(mask, x.shape).all()


def test_no_elements_and_no_dimensions(dtype):
    for shape in ((0,), (3, 0, 2)):
        x = torch.empty(shape, dtype=dtype, requires_grad=True)
        for f in (fr.dropout, fr.alpha_dropout, fr.drop_path):
            y = f(x, 0.5, True)
            assert y.shape == shape and y.dtype == dtype
            y.sum().backward()
        y, mask = fr.dropout_with_mask(x)
        assert y.shape == shape and mask.shape == (0,)
    scalar = torch.tensor(3.0, dtype=dtype)
    outcomes = {fr.dropout_with_mask(scalar, 0.5, seed=s)[0].item() for s in range(20)}
    assert outcomes == {0.0, 6.0}
    assert fr.dropout(scalar).shape == () and fr.dropout(scalar.clone(), inplace=True).shape == ()


def test_the_keep_frequency_is_exact():
    n = 2**22
    for p in (0.1, 0.5, 1 / 3, 0.999):
        kept = fr.unpack_mask(fr.dropout_with_mask(torch.empty(1).expand(n), p, seed=11)[1], (n,))
        assert abs(kept.sum().item() - n * (1 - p)) < 5 * math.sqrt(n * p * (1 - p)), p


@pytest.mark.parametrize("p", [0.5, 0.3])
def test_neighbouring_decisions_are_independent(p):
    """Chi-square of the 256 patterns of eight decisions: mean 255, standard deviation sqrt(510)."""
    n = 2**22
    mask = fr.dropout_with_mask(torch.empty(1).expand(n), p, seed=12)[1]
    count = torch.bincount(mask.int(), minlength=256).double()
    ones = torch.tensor([bin(i).count("1") for i in range(256)], dtype=torch.float64)
    expected = n / 8 * (1 - p) ** ones * p ** (8 - ones)
    chi_square = ((count - expected) ** 2 / expected).sum().item()
    assert abs(chi_square - 255) < 5 * math.sqrt(510), chi_square


def test_the_mean_is_kept_and_seeds_are_independent():
    n, p = 2**21, 0.4
    x = torch.rand(n, dtype=torch.float64) + 0.5
    outputs = [fr.dropout_with_mask(x, p, seed=s)[0] for s in (0, 1, 2**32, -1)]
    for y in outputs:
        sigma = math.sqrt(p / (1 - p) * x.pow(2).sum().item())
        assert abs((y.sum() - x.sum()).item()) < 5 * sigma
    signs = [(y != 0).double() - (1 - p) for y in outputs]
    for i, a in enumerate(signs):
        for b in signs[:i]:
            assert abs((a * b).sum().item()) < 5 * math.sqrt(n) * p * (1 - p)
        assert abs((a[1:] * a[:-1]).sum().item()) < 5 * math.sqrt(n) * p * (1 - p)


def test_the_scale_is_the_inverse_of_the_probability_that_is_drawn_with():
    """P(kept) is a multiple of 2^-32; next to p = 1 dividing by 1 - p would shift the mean (by 7% at 1 -
    1e-9).
    """
    for p in (1e-12, 0.1, 0.5, 1 - 1e-6, 1 - 1e-9, 1 - 2**-32):
        kept = math.floor((1 - p) * 2**32 + 0.5)
        y = fr.dropout_with_mask(torch.ones(100_000, dtype=torch.float64), p, seed=1)[0]
        assert set(y.unique().tolist()) <= {0.0, 2**32 / kept}
        leaf = torch.ones(4, requires_grad=True, dtype=torch.float64)
        y = fr.dropout(leaf, p)
        y.sum().backward()
        assert torch.equal(leaf.grad, y.detach())
    for p in np.linspace(0.01, 0.99, 99):  # in float32 the same number as torch's
        assert np.float32(scale_of(p)) == np.float32(1 / (1 - p))


@pytest.mark.slow
def test_more_than_two_to_the_31_elements():
    n, tail = 2**31 + 4099, 5000
    x = torch.full((1,), 1.5, dtype=torch.bfloat16).expand(n)
    y, mask = fr.dropout_with_mask(x, 0.5, seed=3, offset=5)
    for start in (0, 2**31 - 2500, n - tail):
        want = fr.dropout_with_mask(x[:tail], 0.5, seed=3, offset=5 + start)[0]
        assert torch.equal(y[start : start + tail], want)
    assert np.array_equal(
        mask[-512:].numpy(),
        np.packbits(
            kept_reference(3, 5 + 8 * (mask.numel() - 512), n - 8 * (mask.numel() - 512), 0.5),
            bitorder="little",
        ),
    )
    again = OP_APPLY(x, mask, 1, 2.0)
    assert torch.equal(again[n - tail :], fr.dropout_with_mask(x[:tail], 0.5, seed=3, offset=5 + n - tail)[0])
    every = y[5 :: 2**16]  # few elements, far apart
    assert torch.equal(
        OP_APPLY(every, mask[:4097], 1, 2.0), OP_APPLY(every.contiguous(), mask[:4097], 1, 2.0)
    )
    kept = fr.unpack_mask(OP_IN_PLACE(every, 0.5, torch.tensor([3])), every.shape)
    assert not y[5 :: 2**16][~kept].any() and 16000 < kept.sum() < 17000


# --------------------------------------------------------------------------------------------------
# autograd
@pytest.mark.parametrize("noncontiguous", [False, True])
def test_the_gradient_is_scale_where_kept(dtype, noncontiguous):
    x = torch.randn(31, 67).to(dtype).requires_grad_()
    y, mask = fr.dropout_with_mask(x, 0.3, seed=2)
    assert y.requires_grad and not mask.requires_grad
    grad = torch.randn(67, 31).to(dtype).t() if noncontiguous else torch.randn(31, 67).to(dtype)
    y.backward(grad)
    assert_same(x.grad, values_reference(grad, fr.unpack_mask(mask, x.shape), scale_of(0.3)))


FAMILY = {
    "dropout": lambda x: fr.dropout(x, 0.4),
    "in place": lambda x: fr.dropout(x * 1.0, 0.4, inplace=True),
    "with_mask": lambda x: fr.dropout_with_mask(x, 0.4)[0],
    "dropout1d": lambda x: fr.dropout1d(x, 0.4),
    "alpha": lambda x: fr.alpha_dropout(x, 0.4, True),
    "feature_alpha": lambda x: fr.feature_alpha_dropout(x, 0.4, True),
    "drop_path": lambda x: fr.drop_path(x, 0.4),
    "textbook": lambda x: fr.dropout(x, 0.4, rescale="inference"),
}


@pytest.mark.parametrize("name", FAMILY)
def test_gradcheck_first_and_second_order(name):
    def f(x):
        return with_seed(5, FAMILY[name], x).pow(3)

    x = torch.randn(4, 3, 2, dtype=torch.float64, requires_grad=True)
    assert (
        0 < (f(x) == f(torch.zeros_like(x))).sum() < x.numel()
    )  # some dropped, some kept: the check sees both
    assert torch.autograd.gradcheck(f, x)
    assert torch.autograd.gradgradcheck(f, x)
    assert torch.autograd.gradcheck(f, x, check_forward_ad=True, check_backward_ad=False)


def test_gradients_of_expanded_and_strided_layout():
    x = torch.randn(6, 5, 4, 3).to(memory_format=torch.channels_last).requires_grad_()
    y, mask = fr.dropout_with_mask(x, 0.3, seed=2)
    kept = fr.unpack_mask(mask, x.shape)
    y.sum().backward()  # the gradient that arrives is one number, expanded
    assert_same(x.grad, values_reference(torch.ones(x.shape), kept, scale_of(0.3)))


@pytest.mark.parametrize("n", [1, 8, 1000, 4097])
def test_one_bit_per_element_is_saved_and_the_input_is_let_go(dtype, n):
    saved = []
    x = torch.randn(n, dtype=torch.float32).to(dtype).requires_grad_()
    for run, bits in (
        (lambda t: fr.dropout(t, 0.5), n),
        (lambda t: fr.dropout(t * 1, 0.5, inplace=True), n),
        (lambda t: fr.dropout_with_mask(t, 0.5)[0], n),
        (lambda t: fr.drop_path(t.expand(3, n), 0.5), 3),
    ):
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
            y = run(x)
        assert [(t.dtype, t.numel()) for t in saved] == [(torch.uint8, (bits + 7) // 8)]
        y.sum().backward()
    hidden = x * 2
    y, reference = fr.dropout(hidden), weakref.ref(hidden)
    del hidden
    assert reference() is None and y.requires_grad


def test_retain_graph_repeats_and_a_freed_graph_says_so():
    x = torch.randn(50, requires_grad=True)
    y = fr.dropout(x)
    (first,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    (second,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(first, second) and first.any()
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y.sum(), x)


def test_in_place_means_what_it_means_in_torch():
    x = torch.randn(20, 30, requires_grad=True)
    hidden = x * 2
    version = hidden._version
    y = with_seed(1, fr.dropout, hidden, 0.3, inplace=True)
    assert y is hidden and hidden._version == version + 1
    want = with_seed(1, fr.dropout, (x * 2).detach(), 0.3)
    assert torch.equal(y, want)
    y.sum().backward()
    assert_same(x.grad, torch.where(want != 0, torch.tensor(scale_of(0.3)) * 2, torch.tensor(0.0)))


def test_in_place_on_a_view_reaches_its_base():
    x = torch.randn(4, 50, requires_grad=True)
    base = x * 2
    fr.dropout(base[1], 0.5, inplace=True)
    kept = (base[1] != 0).detach()
    assert 0 < kept.sum() < 50
    base.sum().backward()
    want = torch.full((4, 50), 2.0)
    want[1] = torch.where(kept, 4.0, 0.0)
    assert torch.equal(x.grad, want)


def test_in_place_without_gradient_still_invalidates_what_was_saved():
    x, w = torch.randn(10), torch.randn(10, requires_grad=True)
    y = x * w  # saves x
    fr.dropout(x, 0.5, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    with torch.no_grad():
        leaf = torch.ones(1000, requires_grad=True)
        assert fr.dropout(leaf, 0.5, inplace=True) is leaf and 400 < (leaf == 0).sum() < 600
    with torch.inference_mode():
        t = torch.ones(1000)
        assert fr.dropout(t, 0.5, inplace=True) is t and 400 < (t == 0).sum() < 600


def test_in_place_errors_come_before_any_write():
    leaf = torch.ones(100, requires_grad=True)
    with pytest.raises(
        ValueError,
        match="dropout: inplace=True cannot overwrite a leaf tensor that requires a gradient; call it",
    ):
        fr.dropout(leaf, 0.5, inplace=True)
    shared = torch.ones(3, 1)
    for x in (shared.expand(3, 50), torch.ones(12).as_strided((5, 4), (2, 1))):
        with pytest.raises(
            ValueError, match="dropout: inplace needs an input whose elements do not share memory; call it"
        ):
            fr.dropout(x, 0.5, inplace=True)
        assert (x == 1).all()
    whole = torch.arange(10)
    with pytest.raises(ValueError, match=r"dropout: input must be float32, .*got Long"):
        fr.dropout(whole, 0.5, inplace=True)
    assert torch.equal(leaf.detach(), torch.ones(100)) and torch.equal(whole, torch.arange(10))


def test_negative_views():
    view = torch.randn(200, dtype=torch.complex64).conj().imag
    assert view.is_neg()
    assert torch.equal(
        fr.dropout_with_mask(view, seed=1)[0], fr.dropout_with_mask(view.resolve_neg(), seed=1)[0]
    )
    with pytest.raises(ValueError, match="negative view"):
        fr.dropout(view, inplace=True)


# --------------------------------------------------------------------------------------------------
# doors of torch
@pytest.mark.parametrize("layout", ["contiguous", "strided", "empty"])
def test_opcheck(dtype, layout):
    x = {
        "contiguous": torch.randn(3, 5, 8),
        "strided": torch.randn(8, 5, 6)[::2].transpose(0, 2),
        "empty": torch.empty(0, 4),
    }[layout]
    x, seed = x.to(dtype), torch.tensor([5])
    inner = 1 if layout == "empty" else 2
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for args in ((x, 0.3, seed), (x, 0.3, seed, 7, inner, 1.5, 0.5, -1.0)):
        torch.library.opcheck(OP, args, test_utils=utilities)
        torch.library.opcheck(OP_IN_PLACE, (x.clone(), *args[1:]), test_utils=utilities)
    mask = OP(x, 0.3, seed, 0, inner)[1]
    torch.library.opcheck(OP_APPLY, (x, mask, inner, 1.5, 0.5, -1.0), test_utils=utilities)


def compiled_equals_eager(f, inputs, backend, dynamic=None):
    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, backend=backend, dynamic=dynamic)
    for x in inputs:
        results = []
        for run in (f, compiled):
            leaf = x.clone().requires_grad_()
            y = with_seed(3, run, leaf)
            y.pow(2).sum().backward()
            results.append((y.detach(), leaf.grad))
        assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
        assert results[0][1].any()
        assert torch.equal(*(with_seed(4, run, x) for run in (f, compiled)))


@pytest.mark.parametrize("name", FAMILY)
def test_compile_aot_eager(name):
    compiled_equals_eager(FAMILY[name], [torch.randn(6, 5, 4)], "aot_eager")


@pytest.mark.parametrize("name", ["dropout", "in place", "dropout1d", "alpha"])
def test_compile_with_dynamic_shapes(name):
    compiled_equals_eager(
        FAMILY[name],
        [torch.randn(6, 5, 4), torch.randn(3, 9, 7), torch.randn(17, 2, 31)],
        "aot_eager",
        dynamic=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_inductor(dynamic):
    def f(x):
        y = fr.dropout(torch.relu(x) * 2, 0.3)
        return fr.dropout(fr.alpha_dropout(y + 1, 0.3, True) * 1.0, 0.5, inplace=True)

    compiled_equals_eager(f, [torch.randn(6, 5, 4), torch.randn(9, 7, 33)], "inductor", dynamic)


def test_compile_with_dynamic_shapes_and_many_layers():
    """Under dynamic=True every float with a name is a variable: modules' p, globals, default arguments."""
    modules = (
        fr.nn.Dropout(0.1),
        fr.nn.AlphaDropout(0.2),
        fr.nn.Dropout(0.1),
        fr.nn.DropPath(0.3),
        fr.nn.Dropout1d(0.1),
    )
    model = torch.nn.Sequential(*modules, fr.nn.FeatureAlphaDropout(0.1), fr.nn.AlphaDropout(0.3))
    for f in (model, lambda x: fr.alpha_dropout(fr.dropout(fr.alpha_dropout(x, 0.3, True), 0.5), 0.3, True)):
        compiled_equals_eager(f, [torch.randn(6, 5, 4), torch.randn(13, 9, 7)], "aot_eager", dynamic=True)


def test_compile_with_a_probability_that_changes():
    torch._dynamo.reset()
    compiled = torch.compile(fr.dropout, fullgraph=True, backend="aot_eager")
    x = torch.randn(100)
    for p in (0.3, 0.4, 0.5, 0.6, 0.0, 1.0):
        assert torch.equal(with_seed(1, compiled, x, p), with_seed(1, fr.dropout, x, p)), p


def test_compile_writes_in_place_into_the_callers_tensor():
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda t: fr.dropout(t, 0.5, inplace=True) + 1, fullgraph=True, backend="aot_eager"
    )
    mine, want = torch.ones(100), torch.ones(100)
    with_seed(1, compiled, mine)
    with_seed(1, fr.dropout, want, 0.5, inplace=True)
    assert torch.equal(mine, want) and 0 < (mine == 0).sum() < 100


def test_compile_saves_no_more_than_the_mask():
    torch._dynamo.reset()
    saved = []
    compiled = torch.compile(lambda t: fr.dropout(t, 0.5), fullgraph=True, backend="aot_eager")
    x = torch.randn(8000, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        y = compiled(x)
    assert 0 < sum(t.nbytes for t in saved) <= 1008
    y.sum().backward()
    assert torch.equal(x.grad != 0, y != 0)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", FAMILY)
def test_checkpoint_draws_the_same_mask_again(name, use_reentrant):
    x = torch.randn(16, 9, 5, requires_grad=True)
    want = with_seed(2, FAMILY[name], x)
    (want_grad,) = torch.autograd.grad(want.pow(2).sum(), x)
    torch.manual_seed(2)
    y = checkpoint(FAMILY[name], x, use_reentrant=use_reentrant)
    torch.rand(100)  # the generator moves on between forward and recomputation
    y.pow(2).sum().backward()
    assert torch.equal(y, want) and torch.equal(x.grad, want_grad)


def test_no_grad_and_inference_mode():
    x = torch.randn(100, requires_grad=True)
    want = with_seed(1, fr.dropout, x).detach()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y = with_seed(1, fr.dropout, x)
            assert not y.requires_grad and torch.equal(y, want)
            y, mask = fr.dropout_with_mask(x, seed=1)
            assert not y.requires_grad and mask.numel() == 13


def test_autocast_changes_nothing(dtype):
    x = torch.randn(100).to(dtype).requires_grad_()
    want = with_seed(1, fr.dropout, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = with_seed(1, fr.dropout, x)
        assert F.dropout(x).dtype == y.dtype == dtype and torch.equal(y, want)
    y.sum().backward()
    assert torch.equal(x.grad != 0, y != 0)


@pytest.mark.parametrize("name", FAMILY)
def test_manual_seed_reproduces_and_a_second_call_differs(name):
    x = torch.randn(64, 40, 3)
    a, b = with_seed(1, FAMILY[name], x), FAMILY[name](x)
    assert torch.equal(with_seed(1, FAMILY[name], x), a) and not torch.equal(a, b)


def test_a_generator_is_reproducible_and_leaves_the_global_one_alone():
    x = torch.randn(20, 30, 2)
    calls = (
        lambda g: fr.dropout(x, generator=g),
        lambda g: fr.dropout_with_mask(x, generator=g)[0],
        lambda g: fr.dropout1d(x, generator=g),
        lambda g: fr.dropout2d(x[None], generator=g),
        lambda g: fr.dropout3d(x[..., None, None], generator=g),
        lambda g: fr.alpha_dropout(x, training=True, generator=g),
        lambda g: fr.feature_alpha_dropout(x, training=True, generator=g),
        lambda g: fr.drop_path(x, generator=g),
    )
    for call in calls:
        state = torch.get_rng_state()
        g = torch.Generator().manual_seed(7)
        a, b = call(g), call(g)
        torch.rand(3)
        assert torch.equal(call(torch.Generator().manual_seed(7)), a) and not torch.equal(a, b)
        torch.set_rng_state(state)
        call(g)
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", [name for name in FAMILY if name != "drop_path"])
def test_torch_func(name):
    f = FAMILY[name]
    x = torch.randn(3, 4, dtype=torch.float64)
    if name == "dropout1d":
        x = torch.randn(3, 4, 2, dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    (want,) = torch.autograd.grad(with_seed(1, f, leaf).pow(2).sum(), leaf)
    loss = lambda t: f(t).pow(2).sum()  # noqa: E731
    torch.testing.assert_close(with_seed(1, torch.func.grad(loss), x), want)
    output, tangent = with_seed(1, torch.func.jvp, f, (x,), (torch.ones_like(x),))
    jacobian = with_seed(1, torch.func.jacrev(f), x)
    torch.testing.assert_close(jacobian.reshape(x.numel(), -1).sum(1), tangent.flatten())
    torch.testing.assert_close(output, with_seed(1, f, x))
    same = with_seed(1, torch.func.vmap(f, randomness="same"), torch.stack([x, 2 * x]))
    torch.testing.assert_close(same[0], with_seed(1, f, x))
    torch.testing.assert_close(same[1], with_seed(1, f, 2 * x))
    grads = with_seed(1, torch.func.vmap(torch.func.grad(loss), randomness="same"), torch.stack([x, x]))
    torch.testing.assert_close(grads[1], want)
    different = torch.func.vmap(f, randomness="different")(x.expand(20, *x.shape))
    assert len({tuple(sample.flatten().tolist()) for sample in different}) > 3
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(f)(torch.stack([x, x]))


def test_torch_func_gives_the_bits_of_the_op(dtype):
    x = torch.randn(700).to(dtype)
    for name in ("dropout", "alpha"):
        output, _ = with_seed(1, torch.func.jvp, FAMILY[name], (x,), (x,))
        assert_same(output, with_seed(1, FAMILY[name], x))


def test_compiled_torch_func_gradient():
    torch._dynamo.reset()
    f = torch.func.grad(lambda t: fr.dropout(t).pow(2).sum())
    x = torch.randn(40)
    got = with_seed(1, torch.compile(f, fullgraph=True, backend="aot_eager"), x)
    assert torch.equal(got, with_seed(1, f, x)) and got.any()


def test_meta_and_fake_tensors():
    x = torch.empty(3, 4, 5, 6, device="meta").to(memory_format=torch.channels_last)
    y = fr.dropout(x)
    assert y.device.type == "meta" and y.stride() == x.stride()
    assert fr.dropout_with_mask(x)[1].shape == (45,)
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        y, mask = fr.dropout_with_mask(torch.empty(3, 7, dtype=torch.bfloat16, requires_grad=True))
        assert y.shape == (3, 7) and y.dtype == torch.bfloat16 and mask.shape == (3,)


def _on_shards(rank, path):
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for shape in ((8, 6), (7, 3, 5), (1, 5, 2, 3)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        channels = fr.dropout2d if len(shape) == 4 else fr.dropout1d
        for f in (fr.dropout, channels, fr.drop_path, lambda t: fr.alpha_dropout(t, 0.5, True)):
            for placement in (Replicate(), Shard(0), Shard(1)):
                whole = x.clone().requires_grad_()
                want = with_seed(1, f, whole)
                want.pow(2).sum().backward()
                part = distribute_tensor(x, mesh, [placement]).requires_grad_()
                got = with_seed(1 + rank, f, part)  # ranks that seed differently agree all the same
                got.pow(2).sum().backward()
                assert got.placements == (placement,)
                assert torch.equal(got.full_tensor(), want) and torch.equal(
                    part.grad.full_tensor(), whole.grad
                )
    part = distribute_tensor(torch.ones(6, 4), mesh, [Shard(0)])
    assert fr.dropout(part, 0.5, inplace=True) is part and 0 < (part.full_tensor() == 0).sum() < 24
    with pytest.raises(
        TypeError, match=r"dropout_with_mask: input must be a plain tensor, got a DTensor; give it \.to_local"
    ):
        fr.dropout_with_mask(part)
    torch.distributed.barrier()  # or torch aborts a rank whose partner is gone
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_dtensor_draws_what_the_whole_tensor_draws(tmp_path):
    torch.multiprocessing.spawn(_on_shards, (tmp_path / "store",), nprocs=2)


# --------------------------------------------------------------------------------------------------
# the family
def sharing(y):
    """The number of leading dimensions that are decided one by one."""
    dims = y.dim()
    while dims and (y == y.narrow(dims - 1, 0, 1)).all():
        dims -= 1
    return dims


@pytest.mark.filterwarnings("ignore:dropout", "ignore::UserWarning")
@pytest.mark.parametrize("name", ["dropout1d", "dropout2d", "dropout3d", "feature_alpha_dropout"])
def test_feature_dropout_shares_decisions_as_torch_does(name):
    ours, theirs = getattr(fr, name), getattr(F, name)
    for dims in range(7):
        x = torch.ones((9, 8, 7, 6, 5, 4)[:dims])
        try:
            want = sharing(theirs(x, 0.5, True))
        except RuntimeError:
            with pytest.raises(ValueError, match=f"{name}: input must be"):
                ours(x, 0.5, True)
            continue
        y = ours(x, 0.5, True)
        assert sharing(y) == want, dims
        assert y.unique().numel() == 2
        if dims == 4:
            torch.testing.assert_close(
                with_seed(1, ours, x.to(memory_format=torch.channels_last), 0.5, True),
                with_seed(1, ours, x, 0.5, True),
            )


def test_dropout2d_warns_about_odd_dimensions_as_torch_does():
    for f in (fr.dropout2d, F.dropout2d):
        with pytest.warns(UserWarning, match="dropout2d"):
            f(torch.ones(3, 4, 5))
    for f in (fr.dropout3d, F.dropout3d):
        with pytest.warns(UserWarning, match="dropout3d"):
            f(torch.ones(3, 4, 5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (
            fr.dropout1d(torch.ones(3, 4)),
            fr.dropout2d(torch.ones(3, 4, 5, 6)),
            fr.dropout3d(torch.ones(3, 4, 5, 6)),
        )


def test_feature_dropout_saves_a_bit_per_channel_and_scales(dtype):
    x = torch.randn(6, 7, 5, 3).to(dtype)
    y = with_seed(1, fr.dropout2d, x, 0.3)
    kept = (y != 0).flatten(2).any(2)
    assert 0 < kept.sum() < 42
    assert_same(y, values_reference(x, kept[..., None, None].expand(x.shape), scale_of(0.3)))


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_alpha_dropout_is_torchs_formula(dtype, p):
    alpha = 1.7580993408473766
    a = 1 / math.sqrt((alpha**2 * p + 1) * (1 - p))
    b = alpha * a * p
    x = torch.randn(3000).to(dtype)
    y = with_seed(1, fr.alpha_dropout, x, p, True)
    seed = with_seed(1, torch.randint, -(2**63), 2**63 - 1, (1,)).item()
    kept = torch.from_numpy(kept_reference(seed, 0, 3000, p))
    tolerance = dict(rtol=torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)
    torch.testing.assert_close(y.double(), torch.where(kept, x.double() * a + b, b - alpha * a), **tolerance)
    theirs = F.alpha_dropout(torch.ones(3000, dtype=torch.float64), p, True).unique()
    torch.testing.assert_close(
        fr.alpha_dropout(torch.ones(3000, dtype=torch.float64), p, True).unique(), theirs
    )


def test_alpha_dropout_keeps_mean_and_variance():
    n = 2**20
    x = torch.randn(n, dtype=torch.float64)
    for f in (fr.alpha_dropout, lambda *args: fr.feature_alpha_dropout(x[:, None], *args[1:])):
        y = f(x, 0.3, True)
        assert abs(y.mean().item()) < 5 / math.sqrt(n)
        assert abs(y.var().item() - 1) < 5 * math.sqrt(y.pow(4).mean().item() / n)
    assert torch.equal(fr.alpha_dropout(x, 1.0, True), F.alpha_dropout(x, 1.0, True))


def test_drop_path_is_timms(dtype):
    x = torch.randn(400, 3, 5).to(dtype)
    for scale_by_keep in (True, False):
        y = with_seed(1, fr.drop_path, x, 0.3, scale_by_keep=scale_by_keep)
        kept = (y != 0).flatten(1).any(1)
        assert abs(kept.sum().item() - 280) < 5 * math.sqrt(400 * 0.21)
        assert_same(
            y,
            values_reference(x, kept[:, None, None].expand(x.shape), scale_of(0.3) if scale_by_keep else 1.0),
        )
    assert fr.drop_path(x, 0.3, False) is x and not fr.drop_path(x, 1.0).any()


@pytest.mark.parametrize(
    "name", ["dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"]
)
def test_arguments_are_torchs_and_the_rest_by_keyword(name):
    ours, theirs = (list(inspect.signature(getattr(m, name)).parameters.values()) for m in (fr, F))
    for mine, torchs in zip(ours, theirs, strict=False):
        assert (mine.name, mine.default, mine.kind) == (torchs.name, torchs.default, torchs.kind)
    assert len(ours) >= len(theirs)
    assert all(extra.kind == extra.KEYWORD_ONLY for extra in ours[len(theirs) :])
    x = torch.randn(2, 3, 4) if name == "dropout1d" else torch.randn(2, 3, 4, 5)
    assert (getattr(fr, name)(x) is x) == (
        getattr(F, name)(x) is x or torch.equal(getattr(F, name)(x), x)
    )  # training by default?


def test_the_textbook_form():
    x = torch.randn(1000, requires_grad=True)
    y = with_seed(1, fr.dropout, x, 0.3, rescale="inference")
    kept = y != 0
    assert torch.equal(y[kept], x[kept]) and 600 < kept.sum() < 800
    y.sum().backward()
    assert torch.equal(x.grad, kept.float())
    assert torch.equal(fr.dropout(x, 0.3, False, rescale="inference"), x * 0.7)
    mine = x.detach().clone()
    assert fr.dropout(mine, 0.3, False, True, rescale="inference") is mine and torch.equal(
        mine, x.detach() * 0.7
    )
    assert not fr.dropout(x, 1.0, False, rescale="inference").any()


# --------------------------------------------------------------------------------------------------
# pack, unpack
@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (8,), (9,), (3, 5, 7), (2, 0, 3)])
def test_pack_and_unpack_are_inverse(shape):
    mask = torch.rand(shape) < 0.5
    packed = fr.pack_mask(mask)
    assert np.array_equal(packed.numpy(), np.packbits(mask.numpy().reshape(-1), bitorder="little"))
    assert packed.dtype == torch.uint8 and packed.shape == ((mask.numel() + 7) // 8,)
    assert (
        torch.equal(fr.unpack_mask(packed, shape), mask) and fr.unpack_mask(packed, shape).dtype == torch.bool
    )
    assert torch.equal(
        fr.pack_mask(mask[None].transpose(0, -1) if shape else mask),
        packed if len(shape) < 2 else fr.pack_mask(mask[None].transpose(0, -1).contiguous()),
    )


def test_pack_and_unpack_errors():
    with pytest.raises(TypeError, match="pack_mask: mask must be a bool tensor, got torch"):
        fr.pack_mask(torch.zeros(3, dtype=torch.uint8))
    with pytest.raises(TypeError, match=r"pack_mask: mask must be a torch\.Tensor, got list"):
        fr.pack_mask([True])
    with pytest.raises(TypeError, match="unpack_mask: mask must be a uint8 tensor, got torch"):
        fr.unpack_mask(torch.zeros(3, dtype=torch.bool), (3,))
    for size in (0, 1, 3):
        with pytest.raises(
            ValueError, match=rf"unpack_mask: mask must have shape \(2,\) for \(3, 4\), got \({size},\)"
        ):
            fr.unpack_mask(torch.zeros(size, dtype=torch.uint8), (3, 4))
    with pytest.raises(ValueError, match="unpack_mask: mask must have shape"):
        fr.unpack_mask(torch.zeros(1, 2, dtype=torch.uint8), (3, 4))


# --------------------------------------------------------------------------------------------------
# hostile
FUNCTIONS = [
    "dropout",
    "dropout_with_mask",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "alpha_dropout",
    "feature_alpha_dropout",
    "drop_path",
]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_bad_probability_or_input_is_refused(name):
    f, x = getattr(fr, name), torch.randn(2, 3, 4, 5) if name != "dropout1d" else torch.randn(2, 3, 4)
    for p, shown in ((math.nan, "nan"), (1.5, "1.5"), (-0.1, "-0.1"), (2, "2"), (math.inf, "inf")):
        with pytest.raises(ValueError, match=rf"^{name}: p must be in \[0, 1\], got {shown}"):
            f(x, p)
    for p, kind in (
        ("0.5", "str"),
        (None, "NoneType"),
        (True, "bool"),
        (1j, "complex"),
        (torch.tensor(0.5), "Tensor"),
    ):
        with pytest.raises(TypeError, match=f"^{name}: p must be a number, got {kind}"):
            f(x, p)
    for bad in ([1.0, 2.0], None, 3.0, np.ones(3)):
        with pytest.raises(
            TypeError, match=f"^{name}: input must be a torch.Tensor, got {type(bad).__name__}"
        ):
            f(bad)
    options = {} if name == "dropout_with_mask" else {"training": True}
    for dtype, shown in (
        (torch.int64, "Long"),
        (torch.complex64, "ComplexFloat"),
        (torch.uint8, "Byte"),
        (torch.bool, "Bool"),
    ):
        with pytest.raises(
            ValueError,
            match=f"^dropout: input must be float32, float64, float16 or bfloat16, got {shown}; convert",
        ):
            f(torch.ones(x.shape).to(dtype), 0.5, **options)


def test_numbers_of_numpy_are_numbers():
    x = torch.randn(50)
    want = with_seed(1, fr.dropout, x, 0.25)
    for p in (np.float64(0.25), np.float32(0.25), np.float16(0.25)):
        assert torch.equal(with_seed(1, fr.dropout, x, p), want)
    assert not fr.dropout(x, np.int64(1)).any()


def test_bad_seeds_and_offsets_are_refused():
    x, op = torch.randn(5), "dropout_with_mask"
    for seed in (
        torch.tensor([1.0]),
        torch.tensor([1], dtype=torch.int32),
        torch.tensor([1, 2]),
        torch.empty(0, dtype=torch.int64),
    ):
        with pytest.raises(
            ValueError, match=f"{op}: seed must be an int or one int64, got {seed.dtype} of shape .*; draw it"
        ):
            fr.dropout_with_mask(x, seed=seed)
    with pytest.raises(ValueError, match=f"{op}: seed must be on cpu like input, got meta; move it"):
        fr.dropout_with_mask(x, seed=torch.empty(1, dtype=torch.int64, device="meta"))
    for seed, kind in ((True, "bool"), (1.0, "float"), ("1", "str")):
        with pytest.raises(TypeError, match=f"{op}: seed must be an int or an int64 tensor, got {kind}"):
            fr.dropout_with_mask(x, seed=seed)
    for offset in (-1, 2**63):
        with pytest.raises(
            ValueError, match=rf"{op}: offset must be at least 0 and below 2\^63, got {offset}"
        ):
            fr.dropout_with_mask(x, offset=offset)
    for offset, kind in ((1.0, "float"), (True, "bool"), (None, "NoneType")):
        with pytest.raises(TypeError, match=f"{op}: offset must be an int, got {kind}"):
            fr.dropout_with_mask(x, offset=offset)
    with pytest.raises(ValueError, match="dropout: rescale must be one of 'train', 'inference', got 'never'"):
        fr.dropout(x, rescale="never")


def test_the_raw_ops_check_for_themselves():
    x, seed = torch.randn(6), torch.tensor([1])
    with pytest.raises(ValueError, match=r"dropout: seed must be one int64, got Float of shape \(1,\)"):
        OP(x, 0.5, seed.float())
    with pytest.raises(ValueError, match=r"dropout: p must be in \[0, 1\], got nan"):
        OP(x, math.nan, seed)
    with pytest.raises(ValueError, match="dropout: offset must be at least 0, got -1"):
        OP(x, 0.5, seed, -1)
    for inner in (0, -1, 4):
        with pytest.raises(ValueError, match=f"inner must divide the number of elements, 6, got {inner}"):
            OP(x, 0.5, seed, 0, inner)
    for mask in (torch.zeros(2, dtype=torch.uint8), torch.zeros(1), torch.zeros(0, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"dropout_apply: mask must be contiguous uint8 of shape \(1,\)"):
            OP_APPLY(x, mask)


def test_other_layouts_and_devices_say_what_to_do():
    with pytest.raises(
        ValueError,
        match=r"dropout: expected dense tensors, got torch.sparse_coo of torch.float32; .*\.to_dense\(\)",
    ):
        fr.dropout(torch.eye(3).to_sparse())
    with pytest.raises(
        ValueError, match=r"dropout: expected dense tensors, got torch._mkldnn .*\.to_dense\(\)"
    ):
        fr.dropout(torch.eye(3).to_mkldnn())


def test_outputs_survive_copy_and_pickle():
    y, mask = fr.dropout_with_mask(torch.randn(30), seed=1)
    for again in (copy.deepcopy((y, mask)), pickle.loads(pickle.dumps((y, mask)))):
        assert torch.equal(again[0], y) and torch.equal(again[1], mask)
