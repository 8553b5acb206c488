"""What the checks in property_cases_<op>.py share: what they draw, and how they compare.

A check draws its arguments from hypothesis: shapes, strides, storage offsets, dtypes, broadcast, options, and
numbers of every size with NaN, infinities, zeros of both signs and subnormals among them.
"""

import contextlib
import math

import numpy as np
import torch
from helpers import assert_same_bits
from hypothesis import strategies as st

from fastreg import _registry

HOSTILE = np.array(
    [0.0, -0.0, math.nan, math.inf, -math.inf, 1e-40, -1e-40, 5e-324, 6e-8, 2.0**-126, 65504.0, 65520.0,
     -3.3e38, 3.4e38, 1e300, -1e300, 1.0, -1.0, 0.5]
)  # fmt: skip
LENGTHS = (0, 1, 2, 3, 5, 7, 8, 9, 16, 17, 33, 63, 64, 65, 255, 1023, 1030, 4097)
LONG = 40_003  # several threads work on it
FILL = 77.0  # what lies in memory around a tensor
NOISE = {torch.float32: 1e-6, torch.float64: 4e-15}  # of the arithmetic, relative to the largest term


def op(name):
    return getattr(torch.ops.fastreg, name).default


def plain(name):
    return _registry.plain_definition(name)


def wide_of(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


# --- What is drawn


def one_of(draw, *choices):
    return draw(st.sampled_from(choices))


def shape(draw, least=0, most=5):
    dims = draw(st.integers(least, most))
    if dims == 1:
        return (one_of(draw, *LENGTHS, LONG),)
    sizes = {0: (), 2: LENGTHS[:-3], 3: LENGTHS[:11]}.get(dims, LENGTHS[:7])
    return tuple(one_of(draw, *sizes) for _ in range(dims))


def seed(draw):
    return torch.tensor([draw(st.integers(-(2**63), 2**63 - 1))])


def random_of(draw):
    return np.random.default_rng(draw(st.integers(0, 2**32 - 1)))


def values(draw, shape, dtype, most=300, hostile=True):
    """Numbers about one power of ten, at most 10^most, of which a share is replaced by HOSTILE ones."""
    random = random_of(draw)
    power = one_of(draw, *(p for p in (0, 0, 0, -3, 1, -8, -40, 4, 30, 300) if p <= most))
    x = random.standard_normal(math.prod(shape)) * 10.0**power
    share = one_of(draw, 0.0, 0.05, 0.5, 1.0) if hostile else 0.0
    at = random.random(x.size) < share
    x[at] = random.choice(HOSTILE, int(at.sum()))
    return torch.from_numpy(x).to(dtype).view(shape)


def laid_out(draw, x, expand=False):
    """(a tensor equal to x, or to a repeated part of x if it may `expand`; the memory it lies in)."""
    kinds = ["contiguous", "offset", "permuted", "sliced"]
    kinds += ["channels_last"] if x.dim() == 4 else []
    kinds += ["expanded"] if expand and x.dim() and x.numel() else []
    kind = one_of(draw, *kinds)
    if kind == "offset":  # no vector is aligned
        base = torch.full((x.numel() + 9,), FILL, dtype=x.dtype)
        start = draw(st.integers(1, 8))
        view = base[start : start + x.numel()].view(x.shape)
    elif kind == "permuted":
        order = draw(st.permutations(range(x.dim())))
        base = torch.full([x.shape[d] for d in order], FILL, dtype=x.dtype)
        view = base.permute([order.index(d) for d in range(x.dim())])
    elif kind == "sliced":
        base = torch.full([2 * n + 1 for n in x.shape], FILL, dtype=x.dtype)
        view = base[tuple(slice(1, None, 2) for _ in x.shape)]
    elif kind == "channels_last":
        base = view = torch.empty_like(x, memory_format=torch.channels_last)
    elif kind == "expanded":
        d = draw(st.integers(0, x.dim() - 1))
        base = x.narrow(d, 0, 1).clone()
        return base.expand(x.shape), base
    else:
        base = view = torch.empty_like(x)
    view.copy_(x)
    return view, base


def tensor(draw, shape, dtype, expand=True, **options):
    return laid_out(draw, values(draw, shape, dtype, **options), expand)[0]


class Written:
    """A tensor that an operator writes to, and that nothing beside it is written."""

    def __init__(self, draw, x):
        self.tensor, self.base = laid_out(draw, x)
        self.before = self.base.clone()

    def check(self):
        self.tensor.fill_(FILL)
        around, before = self.base.clone(), self.before.clone()
        inside = torch.as_strided(
            before, self.tensor.shape, self.tensor.stride(), self.tensor.storage_offset()
        )
        inside.fill_(FILL)
        assert_same_bits(around, before, "memory beside the tensor")


@contextlib.contextmanager
def unchanged(*tensors):
    """The operator inside leaves these as they were."""
    before = [None if t is None else t.clone() for t in tensors]
    yield
    for t, old in zip(tensors, before, strict=True):
        if t is not None:
            assert_same_bits(t, old, "an input")


# --- What is compared


def assert_near(got, want, magnitude, what="", noise=1.0, tiny=0.0):
    """`got` is what float64 says, up to the noise of the arithmetic, rounded to its dtype.

    magnitude: the sum of what is added up, without signs. Rounding is monotone, so that the result lies
    between the ends' roundings. Where the terms overflow the arithmetic, no finite number is expected.
    """
    assert got.shape == want.shape, (what, got.shape, want.shape)
    wide, want = wide_of(got.dtype), want.double()
    magnitude = torch.where(magnitude.isfinite(), magnitude.double().abs(), want.abs())
    room = (
        magnitude * NOISE[wide] * noise + tiny + 2 * torch.finfo(wide).smallest_normal * torch.finfo(wide).eps
    )
    room = torch.where(want.isfinite(), room, 0.0)
    low, high = (want - room).to(got.dtype), (want + room).to(got.dtype)
    right = ((low <= got) & (got <= high)) | (got.isnan() & want.isnan())
    over = ~got.isfinite() & (magnitude * 1.01 > torch.finfo(wide).max)
    wrong = ~(right | over)
    assert not wrong.any(), (
        f"{what}: {got[wrong].flatten()[:3].tolist()} for {want[wrong].flatten()[:3].tolist()} at "
        f"{wrong.nonzero()[:3].tolist()}, room {room[wrong].flatten()[:3].tolist()}"
    )


def doubled(*tensors):
    return [t.double() if t is not None and t.is_floating_point() else t for t in tensors]
