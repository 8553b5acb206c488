"""Dropout: the bits are Philox's, the same for every layout, split, thread count and instruction set; the
values are one rounding of scale * x where kept and 0 elsewhere; the derivative reads one bit per element; and
all of it holds through every door of torch (autograd, compile, checkpoint, torch.func, DTensor). References
are NumPy or plain torch and share no code with the op."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import DTYPES
from dropout_reference import (
    OP,
    OP_APPLY,
    OP_IN_PLACE,
    draws,
    kept_reference,
    philox,
    scale_of,
    values_reference,
)
from helpers import assert_same_bits, on_each_instruction_set, run_python, threads, with_seed
from hypothesis import given, settings
from hypothesis import strategies as st

import fastreg as fr

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
    assert_same_bits(y, values_reference(x, kept, scale_of(0.4)))


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


def test_thread_count_does_not_change_bits(dtype):
    x = torch.randn(200_003).to(dtype)
    want = None
    for count in (1, 2, 5):
        with threads(count):
            got = [
                *fr.dropout_with_mask(x, 0.3, seed=1, offset=3),
                *OP(x[:200_000], 0.3, torch.tensor([1]), 0, 5, 2.0),
                OP_APPLY(x[:200_000], OP(x[:200_000], 0.3, torch.tensor([1]), 0, 5)[1], 5, 2.0, 1.0, -1.0),
            ]
        want = want or got
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


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


# Odd sides; sides of 1, which have no stride; more than a block; a run longer than a block.
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
    assert_same_bits(want, values_reference(x, kept, 2.0, 0.5, -1.0))
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


# Cuts within and between the bytes of the mask, and within and between the blocks of 1024.
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
    # Around a byte of the mask, a vector of 16 and a block of 1024, and more than one thread takes.
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


def test_every_instruction_set_gives_the_same_bits():
    lines = {name: printed.split() for name, printed in on_each_instruction_set(DIGEST).items()}
    assert all(ran == name for name, (ran, _) in lines.items())
    assert len({digest for _, digest in lines.values()}) == 1, lines


def test_an_impossible_instruction_set_is_refused_at_import():
    result = run_python("import fastreg", FASTREG_CPU_CAPABILITY="nonsense")
    assert result.returncode != 0
    assert (
        "FASTREG_CPU_CAPABILITY: expected one of" in result.stderr
        and "got 'nonsense'; unset it" in result.stderr
    )


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
    assert_same_bits(y, values_reference(x, kept, scale_of(p)))
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
    assert_same_bits(y, x)
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
        (torch.tensor([0.5]), "Tensor"),
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
            match=f"^({name}|dropout): input must be float32, float64, float16 or bfloat16, got "
            f"({shown}|{dtype}); convert",
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
        match=r"dropout: input must be a dense tensor, got torch.sparse_coo; convert it with \.to_dense\(\)",
    ):
        fr.dropout(torch.eye(3).to_sparse())
    with pytest.raises(
        ValueError, match=r"dropout: input must be a dense tensor, got torch._mkldnn.*\.to_dense\(\)"
    ):
        fr.dropout(torch.eye(3).to_mkldnn())


def test_outputs_survive_copy_and_pickle():
    y, mask = fr.dropout_with_mask(torch.randn(30), seed=1)
    for again in (copy.deepcopy((y, mask)), pickle.loads(pickle.dumps((y, mask)))):
        assert torch.equal(again[0], y) and torch.equal(again[1], mask)
