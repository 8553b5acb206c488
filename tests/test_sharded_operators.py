"""What a rank computes of its classes, `cross_entropy_sharded_sums` and `cross_entropy_sharded_grad_`, beside
what test_properties.py draws; the loss that is made of it is in test_sharded_cross_entropy.py.
"""

import pytest
import torch
from helpers import DTYPES, assert_same_bits, on_each_instruction_set, threads
from property_cases import op, plain

import fastreg as fr

SUMS, GRAD = op("cross_entropy_sharded_sums"), op("cross_entropy_sharded_grad_")


def whole_of(sums, mass, others, factor, pull=0.0):
    rows = sums.shape[1]
    return torch.stack(
        (sums[0], sums[1], *(torch.zeros(rows) + each for each in (mass, others, pull, factor)))
    ).to(sums)


def grad_of(x, target, weight, whole, mix, base):
    grad = torch.empty_like(x, dtype=torch.float32 if x.dtype == torch.float16 else x.dtype)
    GRAD(grad, x, target, weight, whole, mix, base)
    return grad


@pytest.mark.parametrize("soft", (False, True))
def test_rows_that_are_certain(soft):
    """Where one class has nearly all of the mass, sum and gradient keep their digits: the difference of two
    numbers near 1 would have none.
    """
    x = torch.randn(64, 333)
    at = torch.arange(64) * 5
    x[torch.arange(64), at] += torch.linspace(12, 40, 64)
    target = torch.nn.functional.one_hot(at, 333).float() if soft else at
    sums, want = (
        SUMS(x, target, None, 1.0, 0.0),
        plain("cross_entropy_sharded_sums")(x.double(), target, None, 1.0, 0.0),
    )
    torch.testing.assert_close(sums.double(), want, rtol=4e-6, atol=1e-37)
    whole = whole_of(want, 1.0, 1.0 if soft else 0.0, 0.5)
    exact = torch.empty(x.shape, dtype=torch.float64)
    plain("cross_entropy_sharded_grad_")(exact, x.double(), target, None, whole, 1.0, 0.0)
    got = grad_of(x, target, None, whole.float(), 1.0, 0.0)
    torch.testing.assert_close(got.double(), exact, rtol=4e-6, atol=2.0**-126)
    assert (got[torch.arange(64), at] < 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_part_of_which_nothing_is_known(dtype):
    """Only NaN, and nothing but -inf, which has no mass; also where they are the only class."""
    for k in (1, 40):
        x = torch.full((3, k), -torch.inf).to(dtype)
        x[1, 0] = torch.nan
        sums = SUMS(x, torch.tensor([-1, -1, 0]), None, 1.0, 0.0)
        assert sums[1].isnan().tolist() == [False, True, False] and (sums[1, [0, 2]] == 0).all()
        assert (sums[0, [0, 2]] == -torch.inf).all() and sums[2].tolist()[::2] == [0, -torch.inf]


def test_a_target_without_mass_may_be_infinite():
    """smoothing="others" with all of the mass elsewhere: base and mix counted apart would be inf - inf."""
    x = torch.randn(2, 9)
    x[0, 4] = -torch.inf
    for weight in (None, torch.rand(9) + 0.5):
        sums = SUMS(x, torch.tensor([4, 3]), weight, -0.125, 0.125)
        rest = [c for c in range(9) if c != 4]
        each = 0.125 * (1.0 if weight is None else weight[rest])
        torch.testing.assert_close(sums[3, 0], (each * (x[0, rest] - x[0].max())).sum())
        assert (sums[2] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place_and_in_many_threads(dtype):
    """The gradient has the same bits wherever it goes and however many threads there are."""
    x = torch.randn(37, 1003).to(dtype)
    target = torch.arange(37) * 29 % 1005 - 2
    soft = torch.softmax(torch.randn(37, 1003), 1)
    for t in (target, soft):
        results = []
        for count in (1, 3):
            with threads(count):
                sums = SUMS(x, t, None, 0.9, 1e-4)
                whole = whole_of(sums, 1.0, 0.1, 0.5, 1e-3)
                results.append((sums, grad_of(x, t, None, whole, 0.9, 1e-4)))
        for one, three in zip(*results, strict=True):
            assert_same_bits(one, three)
        if dtype != torch.float16:  # there the gradient is wider
            padded = torch.cat((x, torch.full((37, 3), 5.0).to(dtype)), 1)
            GRAD(padded[:, :1003], padded[:, :1003], t, None, whole, 0.9, 1e-4)
            assert_same_bits(padded[:, :1003].contiguous(), results[0][1])
            assert (padded[:, 1003:] == 5).all()


CODE = """
import hashlib, torch, fastreg
digest = hashlib.sha256()
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    torch.manual_seed(0)
    x = (5 * torch.randn(30, 1001)).to(dtype)
    for target in (torch.arange(30) - 2, torch.softmax(torch.randn(30, 1001), 1)):
        for weight in (None, torch.rand(1001)):
            sums = torch.ops.fastreg.cross_entropy_sharded_sums(x, target, weight, 0.9, 1e-4)
            whole = torch.cat((sums[:2], torch.rand(4, 30)))
            grad = torch.empty_like(x, dtype=torch.float32 if dtype == torch.float16 else dtype)
            torch.ops.fastreg.cross_entropy_sharded_grad_(grad, x, target, weight, whole, 0.9, 1e-4)
            digest.update(sums.numpy().tobytes() + grad.view(torch.uint8).numpy().tobytes())
print(digest.hexdigest())
"""


def test_every_instruction_set_that_fuses_gives_the_same_bits():
    digests = on_each_instruction_set(CODE)
    fused = {digest for isa, digest in digests.items() if isa in ("avx2", "avx512", "neon")}
    assert len(fused) <= 1 and digests


def test_no_rows():
    for dtype in DTYPES:
        x, target = torch.empty(0, 5, dtype=dtype), torch.empty(0, dtype=torch.int64)
        sums = SUMS(x, target, None, 1.0, 0.0)
        assert sums.shape == (4, 0)
        GRAD(x, x, target, None, torch.empty(6, 0).to(sums.dtype), 1.0, 0.0)
        assert grad_of(x, target, None, torch.empty(6, 0).to(sums.dtype), 1.0, 0.0).shape == (0, 5)


def test_wrong_arguments():
    x, target, whole = torch.randn(3, 5), torch.tensor([0, -1, -2]), torch.rand(6, 3)
    grad = torch.empty_like(x)
    for words, call in (
        ("each row without gaps, got", lambda: SUMS(x.t().contiguous().t(), target, None, 1.0, 0.0)),
        (r"target must be in \[-2, 5\), got 5", lambda: SUMS(x, target + 5, None, 1.0, 0.0)),
        ("weight must have one value", lambda: SUMS(x, target, torch.ones(4), 1.0, 0.0)),
        ("must be float32", lambda: SUMS(x.long(), target, None, 1.0, 0.0)),
        ("grad must have the shape", lambda: GRAD(grad[:2], x, target, None, whole, 1.0, 0.0)),
        ("grad must have the dtype", lambda: GRAD(grad.half(), x, target, None, whole, 1.0, 0.0)),
        ("whole must be contiguous", lambda: GRAD(grad, x, target, None, whole[:4], 1.0, 0.0)),
    ):
        with pytest.raises(fr._checks.ArgumentError, match=words):
            call()
