"""Philox in plain torch against known answers and against the kernels' own, and the drawing of seeds."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fastreg as fr
from fastreg import _seeds
from fastreg._seeds import Purpose, draw_seed, philox4x32, random_halves, random_words

CPU = torch.device("cpu")
MASK = 0xFFFFFFFF

# Counter, key and result of Philox4x32-10, from the known answers that its authors publish with Random123.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((MASK,) * 4, (MASK,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_known_answers(counter, key, words):
    got = philox4x32(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert tuple(int(word) for word in got) == words == tuple(fr._C.philox4x32(counter, key))


def test_random_counters_and_keys_are_the_kernels():
    numbers = torch.randint(0, 2**32, (300, 6))
    numbers[:40] |= 0xFFFF0000  # large halves, whose products are the largest
    got = torch.stack(philox4x32(tuple(numbers[:, :4].T), tuple(numbers[:, 4:].T)), 1)
    want = [fr._C.philox4x32(row[:4], row[4:]) for row in numbers.tolist()]
    assert got.tolist() == [list(words) for words in want]


@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, -(2**63), 0x0123456789ABCDEF])
@pytest.mark.parametrize(
    "group", [0, 2**32 - 1, 2**61 - 3]
)  # the counter's first word alone; both; the largest
@pytest.mark.parametrize(("draw", "purpose"), [(0, Purpose.DROPOUT), (2**32 - 1, Purpose.AUGMENT)])
def test_the_numbering_of_words(seed, group, draw, purpose):
    key = (seed & MASK, (seed >> 32) & MASK)
    words = [
        word
        for g in (group, group + 1, group + 2)
        for word in fr._C.philox4x32((g & MASK, g >> 32, draw, int(purpose)), key)
    ]
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    at, options = torch.tensor([seed]), dict(draw=draw, purpose=purpose)
    for start, count in ((0, 0), (0, 1), (1, 7), (3, 9), (0, 12)):
        got = random_words(at, 4 * group + start, count, CPU, **options)
        assert got.dtype == torch.int64 and got.tolist() == words[start : start + count]
        got = random_halves(at, 8 * group + start, 2 * count, CPU, **options)
        assert got.tolist() == halves[start : start + 2 * count]


def test_purposes_are_those_of_the_kernels():
    """The kernels number them in csrc/common/philox.h."""
    p, seed = 0.5, torch.tensor([11])
    mask = torch.ops.fastreg.dropout(torch.ones(64), p, seed)[1]
    kept = fr.unpack_mask(mask, (64,))
    halves = {purpose: random_halves(seed, 0, 64, CPU, purpose=purpose) < 2**15 for purpose in Purpose}
    assert [torch.equal(kept, halves[purpose]) for purpose in Purpose] == [True, False, False]


def test_a_device_with_a_generator_draws_two_halves(monkeypatch):
    """Not every device has integers of 64 random bits, so the seed is made of two numbers of 32."""
    drawn = []

    def randint(low, high, shape, device, generator):
        drawn.append((low, high, device, generator))
        return torch.tensor([0xFFFFFFFF, 5])[: shape[0]]

    monkeypatch.setattr(torch, "randint", randint)
    monkeypatch.setattr(_seeds, "_has_generator", lambda device_type: True)
    seed = draw_seed(torch.device("xpu"))
    assert seed.shape == (1,) and seed.item() == 5 - 2**32
    assert drawn == [(0, 2**32, torch.device("xpu"), None)]


@pytest.mark.parametrize("device", ["mps", "xpu"])
@pytest.mark.parametrize("has_generator", [False, True])
def test_seeds_of_fake_devices(device, has_generator, monkeypatch):
    monkeypatch.setattr(_seeds, "_has_generator", lambda device_type: has_generator)
    with FakeTensorMode():
        seed = draw_seed(torch.device(device))
    assert seed.shape == (1,) and seed.dtype == torch.int64
    assert seed.device.type == (device if has_generator else "cpu")


def test_seeds_are_all_of_int64():
    """Every bit of a seed is drawn: over 64 seeds each of them is 0 and 1."""
    seeds = torch.cat([draw_seed(CPU) for _ in range(64)])
    bits = (seeds[:, None] >> torch.arange(64)) & 1
    assert (bits.sum(0) > 0).all() and (bits.sum(0) < 64).all()


def test_compiled_words_are_the_same():
    """Products wrap around in compiled code, too."""
    compiled = torch.compile(lambda seed: random_words(seed, 3, 101, CPU), fullgraph=True)
    for seed in (0, -1, 2**63 - 1, -1234567890123):
        assert torch.equal(compiled(torch.tensor(seed)), random_words(torch.tensor(seed), 3, 101, CPU))
