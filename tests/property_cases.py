"""One check per operator with any input that it takes, against its plain-torch definition in float64, for
tests/test_properties.py.

A check draws its arguments from hypothesis: shapes, strides, storage offsets, dtypes, broadcast, options, and
numbers of every size with NaN, infinities, zeros of both signs and subnormals among them.
"""

import contextlib
import itertools
import math

import numpy as np
import torch
from helpers import DTYPES, assert_same_bits
from hypothesis import strategies as st

import fastreg as fr
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


# --- Dropout


def constants(draw):
    """(p, seed, offset, inner's share, scale, shift, dropped)."""
    p = draw(st.floats(0, 1) | st.sampled_from([0.0, 1.0, 0.5, 0.1, 1e-9, 1 - 1e-9]))
    return p, one_of(draw, 1.0, 1 / 0.7, 1e-30, 1e30), one_of(draw, 0.0, 0.3), one_of(draw, 0.0, -1.1)


def dropout_arguments(draw, x):
    p, scale, shift, dropped = constants(draw)
    inner = one_of(draw, 1, max(math.prod(x.shape[1:]), 1), x.shape[-1] if x.dim() and x.shape[-1] else 1)
    offset = one_of(draw, 0, 1, 7, 8, 2**32 - 3, 2**62 + 5)
    return p, seed(draw), offset, inner, scale, shift, dropped


def assert_dropped(got, x, kept, constants):
    """By the definition in float64; and the plain definition's bits, the sign of a zero among them."""
    inner, scale, shift, dropped = constants
    want = plain("dropout_apply")(x.double(), kept, inner, scale, shift, dropped)
    size = plain("dropout_apply")(x.double().abs(), kept, inner, scale, abs(shift), abs(dropped))
    assert_near(got, want, size)
    assert_same_bits(got, plain("dropout_apply")(x, kept, inner, scale, shift, dropped), "plain")


def dropout(draw):
    dtype = one_of(draw, *DTYPES)
    x = tensor(draw, shape(draw), dtype)
    arguments = dropout_arguments(draw, x)
    with unchanged(x):
        got, mask = op("dropout")(x, *arguments)
    assert got.stride() == torch.empty_like(x).stride()
    assert_same_bits(mask, plain("dropout")(x.double(), *arguments)[1], "mask")
    assert_dropped(got, x, mask, arguments[3:])


def dropout_in_place(draw):
    dtype = one_of(draw, *DTYPES)
    x = values(draw, shape(draw), dtype)
    written = Written(draw, x)
    arguments = dropout_arguments(draw, x)
    mask = op("dropout_")(written.tensor, *arguments)
    assert_same_bits(mask, plain("dropout")(x.double(), *arguments)[1], "mask")
    assert_dropped(written.tensor, x, mask, arguments[3:])
    written.check()


def dropout_mask(draw):
    """Of rows, the decisions that a mask of the whole tensor has in those places."""
    decisions, columns, gap = (draw(st.integers(0, 70)), draw(st.integers(1, 40)), draw(st.integers(0, 20)))
    p, at = constants(draw)[0], seed(draw)
    offset = one_of(draw, 0, 1, 7, 8, 2**32 - 3, 2**62 + 5)
    like = torch.empty(0)
    row = columns + gap
    got = op("dropout_mask")(like, decisions, p, at, offset, columns, row)
    rows = -(-decisions // columns)
    whole = op("dropout")(torch.ones(rows * row), p, at, offset)[1]
    want = fr.unpack_mask(whole, (rows, row))[:, :columns].reshape(-1)[:decisions]
    assert_same_bits(got, fr.pack_mask(want), "mask")
    assert_same_bits(got, plain("dropout_mask")(like, decisions, p, at, offset, columns, row), "plain")
    neighbours = op("dropout_mask")(like, rows * row, p, at, offset)
    assert_same_bits(neighbours, whole, "one row")
    assert_same_bits(neighbours, plain("dropout_mask")(like, rows * row, p, at, offset), "plain, one row")


def dropout_apply(draw):
    dtype = one_of(draw, *DTYPES)
    x = tensor(draw, shape(draw), dtype)
    _, scale, shift, dropped = constants(draw)
    inner = one_of(draw, 1, max(math.prod(x.shape[1:]), 1))
    mask = torch.from_numpy(random_of(draw).integers(0, 256, -(-(x.numel() // inner) // 8), dtype=np.uint8))
    with unchanged(x, mask):
        got = op("dropout_apply")(x, mask, inner, scale, shift, dropped)
    assert_dropped(got, x, mask, (inner, scale, shift, dropped))


def dropout_add(draw):
    dtype = one_of(draw, *DTYPES)
    size = shape(draw)
    x, residual = tensor(draw, size, dtype), tensor(draw, size, dtype)
    bias = values(draw, size[-1:], dtype) if size and draw(st.booleans()) else None
    arguments = (constants(draw)[0], seed(draw), one_of(draw, 1.0, 1 / 0.7, 1e30))
    with unchanged(x, residual, bias):
        got, mask = op("dropout_add")(x, residual, bias, *arguments)
    want, kept = plain("dropout_add")(*doubled(x, residual, bias), *arguments)
    assert_same_bits(mask, kept, "mask")
    large = [t if t is None else t.abs() for t in doubled(x, residual, bias)]
    assert_near(got, want, plain("dropout_add")(*large, *arguments)[0])


def example(draw):
    x, factor = tensor(draw, shape(draw), one_of(draw, *DTYPES)), one_of(draw, 0.3, -2.0, 0.0, math.inf, 1e30)
    with unchanged(x):
        got = op("example")(x, factor)
    want = plain("example")(x.double(), factor)
    assert_near(got, want, want)


# --- Attacks


def number(draw, x, least=0.0):
    """A number, or a tensor of them that broadcasts along x's channels, samples or elements."""
    size = one_of(draw, None, "channel", "sample", "element") if x.dim() >= 2 else None
    if size is None:
        return one_of(draw, 0.0, 0.1, 1e-30, 3.0) + least, None
    each = {"element": x.shape, "sample": x.shape[:1] + (1,) * (x.dim() - 1)}.get(
        size, (x.shape[1],) + (1,) * (x.dim() - 2)
    )
    random = torch.from_numpy(random_of(draw).random(each)).to(wide_of(x.dtype))
    return 0.0, random.expand(torch.broadcast_shapes(each, (1,) * x.dim())) + least


def as_double(pair):
    value, tensor = pair
    return torch.tensor(value, dtype=torch.float64) if tensor is None else tensor.double()


def numbers_of(x, *pairs):
    """What an operator takes: the numbers, then their tensors, in float32 for float32 arithmetic."""
    return [value for value, _ in pairs], [tensor for _, tensor in pairs]


def box(draw, x):
    if draw(st.booleans()):
        return (-math.inf, None), (math.inf, None)
    return number(draw, x, -1.0), number(draw, x, 2.5)


def size_of(*terms):
    return sum(torch.where(t.isfinite(), t.double().abs(), 0.0) for t in terms)


def fgsm_step(draw):
    dtype = one_of(draw, *DTYPES)
    size = shape(draw)
    x, grad = tensor(draw, size, dtype), tensor(draw, size, dtype)
    eps, (low, high) = number(draw, x), box(draw, x)
    (e, a, b), tensors = numbers_of(x, eps, low, high)
    with unchanged(x, grad):
        got = op("fgsm_step")(x, grad, e, a, b, *tensors)
    want = plain("fgsm_step")(x.double(), grad.double(), e, a, b, *doubled(*tensors))
    terms = [x, *(as_double(pair) for pair in (eps, low, high))]
    assert_near(got, want, size_of(*terms) + torch.zeros_like(want))
    assert_same_bits(got, plain("fgsm_step")(x, grad, e, a, b, *tensors), "plain")


def pgd_step(draw):
    dtype = one_of(draw, *DTYPES)
    size = shape(draw)
    x, grad, origin = (tensor(draw, size, dtype) for _ in range(3))
    alpha, eps, (low, high) = number(draw, x), number(draw, x), box(draw, x)
    (s, e, a, b), tensors = numbers_of(x, alpha, eps, low, high)
    with unchanged(x, grad, origin):
        got = op("pgd_step")(x, grad, origin, s, e, a, b, *tensors)
    want = plain("pgd_step")(*doubled(x, grad, origin), s, e, a, b, *doubled(*tensors))
    terms = [x, origin, *(as_double(pair) for pair in (alpha, eps, low, high))]
    assert_near(got, want, size_of(*terms) + torch.zeros_like(want))
    assert_same_bits(got, plain("pgd_step")(x, grad, origin, s, e, a, b, *tensors), "plain")


# --- SGD


def sgd(draw):
    momentum = one_of(draw, 0.0, 0.9)
    dampening = one_of(draw, 0.0, 0.3) if momentum else 0.0
    nesterov = bool(momentum) and not dampening and draw(st.booleans())
    numbers = [one_of(draw, 0.0, 0.1, 1e-30, 10.0), momentum, dampening]
    numbers += [one_of(draw, 0.0, 0.01), one_of(draw, 0.0, 0.02, 0.5), 0.0]
    proximal, decoupled, maximize = (draw(st.booleans()) for _ in range(3))
    lr_tensor, scale, skip = (
        one_of(draw, None, 0.07),
        one_of(draw, None, 3.0, 65536.0),
        one_of(draw, None, 0.0, 1.0),
    )
    rest = [None if v is None else torch.tensor(v) for v in (lr_tensor, scale, skip)]
    stochastic = seed(draw) if draw(st.booleans()) else None
    tensors = [], [], [], []
    for _ in range(draw(st.integers(1, 3))):
        dtype, size = one_of(draw, *DTYPES), shape(draw)
        tensors[0].append(values(draw, size, dtype, most=30))
        tensors[1].append(tensor(draw, size, dtype, most=30))
        if momentum:
            first = draw(st.booleans())
            tensors[2].append(torch.zeros(size, dtype=dtype) if first else values(draw, size, dtype, most=30))
            tensors[3].extend([torch.tensor(float(not first))] if dampening else [])
    params, buffers = ([Written(draw, t) for t in tensors[i]] for i in (0, 2))
    started = [t.clone() for t in tensors[3]]
    options = [nesterov, proximal, decoupled, maximize, *rest, None, None, stochastic]
    with unchanged(*tensors[1]):
        op("sgd_")(
            [w.tensor for w in params],
            tensors[1],
            [v.tensor for v in buffers],
            started,
            [],
            [],
            *numbers,
            *options,
        )

    want = [[t.double().clone() for t in group] for group in tensors[:3]]
    flags = [t.clone() for t in tensors[3]]
    plain("sgd_")(*want, flags, [], [], *numbers, *options[:-1], None)
    size = [[s * t.double().abs() for t in group] for s, group in zip((1, -1, -1), tensors, strict=False)]
    lr, _, _, weight_decay, l1, _ = numbers
    negative = [lr, momentum, dampening, -weight_decay, -l1, 0.0]
    plain("sgd_")(
        *size,
        [t.clone() for t in tensors[3]],
        [],
        [],
        *negative,
        nesterov,
        False,
        decoupled,
        False,
        *rest,
        None,
    )
    # The same with a rate of 1: the size of what the rate is multiplied with, which may overflow before.
    full = [[s * t.double().abs() for t in group] for s, group in zip((1, -1, -1), tensors, strict=False)]
    plain("sgd_")(
        *full, [t.clone() for t in tensors[3]], [], [], 1.0, *negative[1:], nesterov, False, decoupled, False,
        None, *rest[1:], None,
    )  # fmt: skip
    own = [[t.clone() for t in group] for group in tensors]
    plain("sgd_")(*own, [], [], *numbers, *options)
    for i, written in enumerate(params):
        if stochastic is not None and written.tensor.dtype == torch.bfloat16:
            assert_same_bits(written.tensor, own[0][i], "stochastic rounding")
        else:
            rate = lr if lr_tensor is None else lr_tensor
            # A product may underflow or a momentum be flushed before lr, 10 at most, makes it larger.
            tiny = 1e-322 if written.tensor.dtype == torch.float64 else 2e-37
            terms = size[0][i].abs() + rate * l1
            fits = full[0][i].abs() * 1.01 < torch.finfo(wide_of(written.tensor.dtype)).max
            fits |= ~want[0][i].isfinite()
            assert_near(written.tensor[fits], want[0][i][fits], terms[fits], "parameter", tiny=tiny)
        written.check()
    for i, written in enumerate(buffers):
        tiny = 0.0 if written.tensor.dtype == torch.float64 else 2.0**-126
        assert_near(written.tensor, want[2][i], size[2][i], "momentum", tiny=tiny)
        written.check()
    # Rounding at random counts the steps there; else it says whether there was one.
    for got, flag in zip(started, own[3], strict=True):
        assert_same_bits(got, flag, "started")


# --- AdamW


def adamw(draw):
    """Every layout and hostile number: the bits of the definition, and nothing written beside the tensors."""
    form = amsgrad, average = draw(st.booleans()), draw(st.booleans())
    numbers = [one_of(draw, 0.0, 0.1, 1e-30), one_of(draw, 0.9, 0.0), one_of(draw, 0.999, 0.5)]
    numbers += [
        one_of(draw, 1e-8, 0.0),
        one_of(draw, 0.0, 0.01),
        one_of(draw, 0.0, 0.02),
        one_of(draw, 0.9, 0.1),
    ]
    choices = (None, 0.07), (None, 3.0), (None, 0.0, 1.0), (None, 0.3), (None, 0.8)
    given = [one_of(draw, *choice) for choice in choices]
    options = [draw(st.booleans()) for _ in range(3)]
    options += [None if value is None else torch.tensor(value) for value in given]
    options += [seed(draw) if draw(st.booleans()) else None]
    lists = [[] for _ in range(8)]
    for _ in range(draw(st.integers(1, 3))):
        dtype, size = one_of(draw, *DTYPES), shape(draw)
        for i in (0, 2, 3, *((4,) if form[0] else ()), *((6,) if form[1] else ())):
            lists[i].append(values(draw, size, dtype, most=30))
        lists[1].append(tensor(draw, size, dtype, most=30))
        lists[5].append(torch.tensor(one_of(draw, 0.0, 3.0, math.inf)))
        lists[7].extend([torch.tensor(one_of(draw, 0.0, 1.0))] if average else [])
    assert bool(lists[4]) == amsgrad
    written = {i: [Written(draw, t) for t in lists[i]] for i in (0, 2, 3, 4, 6)}
    counts = {i: [t.clone() for t in lists[i]] for i in (5, 7)}
    got = [[w.tensor for w in written[i]] if i in written else counts.get(i, lists[1]) for i in range(8)]
    with unchanged(*lists[1]):
        op("adamw_")(*got, *numbers, *options)
    want = [[t.clone() for t in group] for group in lists]
    plain("adamw_")(*want, *numbers, *options)
    for i in range(8):
        for mine, theirs in zip(got[i], want[i], strict=True):
            assert_same_bits(mine, theirs, f"list {i}")
    for each in itertools.chain(*written.values()):
        each.check()


def sum_of_squares(draw):
    tensors = [
        tensor(draw, shape(draw), one_of(draw, *DTYPES), most=15) for _ in range(draw(st.integers(1, 3)))
    ]
    with unchanged(*tensors):
        got = op("sum_of_squares")(tensors)
    want = plain("sum_of_squares")(tensors)
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-37, equal_nan=True)


# --- Cross-entropy


def classes(draw, rows, count, soft, dtype):
    """(targets of `rows`, index -100 among them; the index that is ignored)."""
    random = random_of(draw)
    if soft:
        p = random.random((*rows[:1], count, *rows[1:])) + 1e-3
        return torch.from_numpy(p / p.sum(1, keepdims=True)).to(dtype)
    target = random.integers(0, count, rows)
    target[random.random(rows) < one_of(draw, 0.0, 0.3)] = -100
    return torch.from_numpy(target)


def loss_options(draw, count):
    eps = one_of(draw, 0.0, 0.1, 1.0)
    return [-100, eps, draw(st.booleans()) and count > 1, one_of(draw, 0.0, 0.0, 1e-3)]


def loss_sizes(x, target, weight, options):
    """(of each row: what its loss adds up, what its gradient adds up), in float64."""
    count, z_loss, dtype = x.shape[1], options[-1], x.dtype
    x = x.double()
    lse = x.logsumexp(1).abs()
    lse = torch.where(lse.isfinite(), lse, 0.0)
    furthest = torch.where(x.isfinite(), x.abs(), 0.0).amax(1) + lse + math.log(count)
    heaviest = 1.0 if weight is None else weight.double().max()
    square = z_loss * lse**2
    if z_loss and dtype != torch.float64:  # lse^2 may overflow float32 before z_loss makes it smaller
        square = torch.where(lse**2 > torch.finfo(torch.float32).max, 1e39, square)
    return heaviest * furthest + square, heaviest + 2 * z_loss * (lse + 1)


def loss_arguments(draw, size, dtype):
    rows, count = (size[0], *size[2:]), size[1]
    target = classes(draw, rows, count, draw(st.booleans()), dtype)
    wide = wide_of(dtype)
    weight = torch.from_numpy(random_of(draw).random(count) + 0.1).to(wide) if draw(st.booleans()) else None
    return target, weight, loss_options(draw, count)


def cross_entropy(draw):
    """Through the public function, which takes any strides; the loss and its gradient."""
    dtype = one_of(draw, *DTYPES)
    size = one_of(draw, 0, 1, 2, 5, 17), one_of(draw, 1, 2, 3, 8, 10, 17, 100, 1000, 5001)
    size += one_of(draw, (), (), (1,), (3,), (7, 2)) if size[1] < 1000 else ()
    x = tensor(draw, size, dtype, most=30)
    target, weight, options = loss_arguments(draw, size, dtype)
    reduction = one_of(draw, 0, 1, 2)
    names = dict(
        zip(("ignore_index", "label_smoothing", "z_loss"), (options[0], options[1], options[3]), strict=True)
    )
    names["smoothing"] = "others" if options[2] else "uniform"
    leaf = x.clone().requires_grad_() if draw(st.booleans()) else x.detach().requires_grad_()
    weighed = weight if weight is None else weight.to(dtype)
    with unchanged(x, target, weighed):
        loss = fr.cross_entropy(leaf, target, weighed, reduction=("none", "mean", "sum")[reduction], **names)
        (grad,) = torch.autograd.grad(loss.sum(), leaf)
    with torch.no_grad():
        arguments = x.double(), *doubled(target, weighed), reduction, *options
        want, want_grad, _ = plain("cross_entropy")(*arguments, False, torch.float64, True)
        of_loss, of_grad = loss_sizes(x, target, weighed, options)
        if reduction:
            of_loss = of_loss.sum()
        if reduction == 1 and want.isfinite():
            divisor = size[0] * math.prod(size[2:])
            if not target.is_floating_point():
                counted = target != -100
                one = torch.ones(size[1]).double() if weight is None else weighed.double()
                divisor = one[target.where(counted, 0)].masked_select(counted).sum()
            of_loss, of_grad = of_loss / divisor, of_grad / divisor
    assert_near(loss.detach(), want, of_loss + torch.zeros_like(want), "loss", noise=2)
    assert_near(
        grad, want_grad, (of_grad + torch.zeros_like(of_grad)).unsqueeze(1).expand(size), "gradient", 2, 1e-37
    )


def cross_entropy_in_place(draw):
    """The operator of the linear cross-entropy, on dense rows."""
    dtype = one_of(draw, *DTYPES)
    size = one_of(draw, 0, 1, 2, 5, 17), one_of(draw, 1, 2, 3, 8, 17, 100, 1000, 5001)
    x = values(draw, size, dtype, most=30)
    target, weight, options = loss_arguments(draw, size, dtype)
    factor = values(draw, size[:1], wide_of(dtype), most=1, hostile=False)
    got = x.clone()
    with unchanged(target, weight, factor):
        losses = op("cross_entropy_")(got, target, factor, weight, *options)
    want_grad = x.double().clone()
    want = plain("cross_entropy_")(want_grad, *doubled(target, factor, weight), *options)
    of_loss, of_grad = loss_sizes(x, target, weight, options)
    assert_near(losses, want, of_loss, "loss", noise=2)
    assert_near(got, want_grad, (of_grad * factor.double()).unsqueeze(1).expand(size), "gradient", 2, 1e-37)


def cross_entropy_scale(draw):
    """There is a kernel on CUDA only; here it is the plain definition in the tensor's own dtype."""
    x = values(draw, shape(draw), one_of(draw, *DTYPES))
    factor, got = one_of(draw, 1.0, 0.3, 0.0, math.inf), x.clone()
    plain("cross_entropy_scale_")(got, torch.tensor(factor))
    want = torch.where(x == 0, 0, x.double() * torch.tensor(factor).double())
    assert_near(got, want, want, tiny=0.0 if x.dtype == torch.float64 else 2.0**-126)


def linear_cross_entropy(draw):
    """Its loss and gradients against torch's own in float64. 16-bit logits are rounded on the way."""
    dtype = one_of(draw, torch.float32, torch.float64)
    rows, width, count = one_of(draw, 1, 2, 5, 70), one_of(draw, 1, 3, 16), one_of(draw, 2, 5, 33)
    hidden, weight = (tensor(draw, s, dtype, most=1, hostile=False) for s in ((rows, width), (count, width)))
    bias = values(draw, (count,), dtype, most=1, hostile=False) if draw(st.booleans()) else None
    target = classes(draw, (rows,), count, draw(st.booleans()), dtype)
    eps, reduction = one_of(draw, 0.0, 0.1), one_of(draw, "mean", "sum", "none")
    if not target.is_floating_point():
        target[0] = 0  # a mean over no row is NaN
    results = []
    for wide in (dtype, torch.float64):
        leaves = [t.detach().to(wide).requires_grad_() for t in (hidden, weight, bias) if t is not None]
        if wide is dtype and not results:
            loss = fr.linear_cross_entropy(
                leaves[0], leaves[1], target, *leaves[2:], label_smoothing=eps, reduction=reduction
            )
        else:
            logits = torch.nn.functional.linear(*leaves)
            each = target.double() if target.is_floating_point() else target
            loss = torch.nn.functional.cross_entropy(logits, each, label_smoothing=eps, reduction=reduction)
        results.append([loss.detach(), *torch.autograd.grad(loss.sum(), leaves)])
    reach = 1 + hidden.abs().max().double() * weight.abs().max().double() * width
    reach = reach + (0 if bias is None else bias.abs().max().double())
    terms = (1.0, *(1 + t.abs().max().double() for t in (weight, hidden)), 1.0)
    for got, want, term in zip(*results, terms, strict=False):
        assert_near(got, want, (rows * reach * term).expand(want.shape), noise=4, tiny=1e-37)


def sgd_numbers(draw):
    """The same step, whose numbers lie in a tensor."""
    size, dtype = (one_of(draw, 1, 9, 65),), one_of(draw, *DTYPES)
    x, grad = (values(draw, size, dtype, most=30) for _ in range(2))
    numbers = torch.tensor([one_of(draw, 0.1, -0.1), 0.0, 0.0, 0.01, 0.02, 0.0]).double()
    got, want = x.clone(), x.clone()
    options = [False, draw(st.booleans()), draw(st.booleans()), draw(st.booleans())]
    op("sgd_numbers_")([got], [grad], [], [], [], [], numbers, *options)
    plain("sgd_")([want], [grad], [], [], [], [], *numbers.tolist(), *options)
    assert_same_bits(got, want, "numbers in a tensor")
