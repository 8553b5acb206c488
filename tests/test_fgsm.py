"""FGSM and PGD against their formulas in float64; test_adversarial.py has the training.

Proven: the fused steps for every dtype, layout and shape of eps and bounds; that an attack leaves no trace on
the model; that signs survive float16; that examples stay in ball and box; the same bits for any thread count
and instruction set; that wrong arguments are errors.
"""

import itertools

import pytest
import torch
from attack_cases import INF, NAN, assert_step, reference_step
from helpers import on_each_instruction_set
from torch import nn

import fastreg as fr

# No dimension, one element, none, images with odd sides and with one channel, one more than a block of 1024.
SHAPES = [
    (),
    (1,),
    (5,),
    (0,),
    (3, 0, 2),
    (2, 3),
    (4, 3, 5, 7),
    (2, 1, 6, 6),
    (1, 3, 1, 5),
    (3, 2, 33, 17),
    (2, 5, 3),
    (1025,),
]


def layouts(x):
    yield "contiguous", x.contiguous()
    yield "reversed", x.permute(*range(x.dim())[::-1]).contiguous().permute(*range(x.dim())[::-1])
    if x.dim() == 4:
        yield "channels_last", x.contiguous(memory_format=torch.channels_last)
    if x.dim() > 1:
        yield "transposed", x.transpose(0, -1).contiguous().transpose(0, -1)
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), 9.0).to(x.dtype)
        wide[..., ::2] = x
        yield "every second", wide[..., ::2]


def pair(shape, dtype):
    x, grad = torch.rand(shape).to(dtype), torch.randn(shape).to(dtype)
    if grad.numel() > 3:
        flat = grad.view(-1)
        flat[::7], flat[1::11], flat[2::13], flat[3::17] = 0.0, NAN, INF, -0.0
        x.view(-1)[4::19] = NAN
        x.view(-1)[3::23] = -0.0
    return x, grad


def numbers(x):
    """eps or bounds in every form that fits x, as (value for fastreg, value that broadcasts as torch
    does).
    """
    yield 0.03, 0.03
    yield torch.tensor(0.03, dtype=torch.float64), 0.03
    yield torch.tensor([0.03], dtype=torch.float64), 0.03
    yield torch.rand(x.shape) * 0.1, None
    for keep in itertools.product((False, True), repeat=x.dim()):
        yield torch.rand([size if k else 1 for size, k in zip(x.shape, keep, strict=True)]) * 0.1, None
    if x.dim() >= 2 and x.shape[0] != x.shape[1]:
        channel, sample = torch.rand(x.shape[1]) * 0.1, torch.rand(x.shape[0]) * 0.1
        ones = (1,) * (x.dim() - 2)
        yield channel, channel.view(-1, *ones)
        yield channel.view(-1, *ones), None
        yield sample, sample.view(-1, 1, *ones)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_step_matches_the_formula(shape, dtype):
    x, grad = pair(shape, dtype)
    for eps, (lower, upper) in itertools.product(
        (0.03, -0.2, 0.0), ((0.0, 1.0), (None, None), (0.2, None), (None, 0.7))
    ):
        assert_step(
            fr.fgsm_step(x, grad, eps, lower, upper), reference_step(x, grad, eps, lower, upper), dtype
        )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape_of_eps_and_bounds(shape, dtype):
    x, grad = pair(shape, dtype)
    for given, broad in numbers(x):
        if isinstance(broad, torch.Tensor) or broad is None:
            broad = given if broad is None else broad
        if isinstance(given, torch.Tensor) and given.numel() == 0 and x.numel():
            continue
        assert_step(fr.fgsm_step(x, grad, given, 0.1, 0.9), reference_step(x, grad, broad, 0.1, 0.9), dtype)
        assert_step(fr.fgsm_step(x, grad, 0.3, given, 0.9), reference_step(x, grad, 0.3, broad, 0.9), dtype)
        assert_step(fr.fgsm_step(x, grad, 0.3, 0.0, given), reference_step(x, grad, 0.3, 0.0, broad), dtype)
        if given is not broad or isinstance(given, torch.Tensor):
            got = fr.fgsm_step(x, grad, given, given, given + 0.5)
            assert_step(got, reference_step(x, grad, broad, broad, broad + 0.5), dtype)


# No images, odd sides, channels of more than a block of 1024, and one channel.
@pytest.mark.parametrize("shape", [(6, 5), (4, 3, 5, 7), (2, 3, 40, 33), (2, 1, 6, 6)], ids=str)
def test_mixed_layouts(shape, dtype):
    x, grad = pair(shape, dtype)
    origin = x + torch.randn(shape).to(dtype) * 0.1
    per_channel = torch.linspace(0.01, 0.1, shape[1]).view(shape[1], *(1,) * (len(shape) - 2))
    for eps in (0.03, per_channel):
        want = fr.fgsm_step(x, grad, eps, 0.0, 1.0)
        projected = torch.ops.fastreg.pgd_step.default
        numbers_ = (0.05, 0.1, 0.0, 1.0)
        want_projected = projected(x, grad, origin, *numbers_)
        for (_, a), (_, b), (_, c) in itertools.product(layouts(x), layouts(grad), layouts(origin)):
            got = fr.fgsm_step(a, b, eps, 0.0, 1.0)
            assert torch.equal(got.nan_to_num(7), want.nan_to_num(7))
            assert got.stride() == torch.empty_like(a).stride()
            assert torch.equal(projected(a, b, c, *numbers_).nan_to_num(7), want_projected.nan_to_num(7))


# No dimension, no element, less than a vector, images, and one more than a block.
@pytest.mark.parametrize("shape", [(), (0,), (5,), (4, 3, 5, 7), (1025,)], ids=str)
def test_projected_step_matches_the_formula(shape, dtype):
    x, grad = pair(shape, dtype)
    origin = (x.nan_to_num(0.5) + torch.randn(shape).to(dtype) * 0.1).to(dtype)
    got = torch.ops.fastreg.pgd_step.default(x, grad, origin, 0.05, 0.08, 0.1, 0.9)
    assert_step(got, reference_step(x, grad, 0.05, 0.1, 0.9, origin, 0.08), dtype)
    if len(shape) == 4:
        work = torch.float64 if dtype == torch.float64 else torch.float32
        alpha, radius = (
            torch.rand(shape[0], 1, 1, 1).to(work) * 0.1,
            torch.rand(1, shape[1], 1, 1).to(work) * 0.1,
        )
        lower, upper = torch.rand(shape).to(work) * 0.3, torch.rand(shape[-1]).to(work) * 0.2 + 0.6
        got = torch.ops.fastreg.pgd_step.default(x, grad, origin, 0, 0, 0, 0, alpha, radius, lower, upper)
        assert_step(got, reference_step(x, grad, alpha, lower, upper, origin, radius), dtype)


def test_signs_of_zero_and_nan_are_zero_and_nan_inputs_stay():
    x = torch.tensor([0.5, 0.5, 0.5, 0.5, 0.5, 0.5, NAN, INF, -INF])
    grad = torch.tensor([0.0, -0.0, NAN, INF, -INF, 1e-45, 1.0, 1.0, 1.0])
    got = fr.fgsm_step(x, grad, 0.25)
    assert torch.equal(got.nan_to_num(9, 10, 11), torch.tensor([0.5, 0.5, 0.5, 0.75, 0.25, 0.75, 9, 10, 11]))
    assert torch.equal(fr.fgsm_step(x, grad, 0.25, 0.0, 0.6)[6:].nan_to_num(9), torch.tensor([9, 0.6, 0.0]))


def test_steps_are_detached_and_leave_their_arguments_alone():
    x, grad = torch.rand(4, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    copies = x.detach().clone(), grad.detach().clone()
    out = fr.fgsm_step(x, grad, 0.1, torch.zeros(3, requires_grad=True), 1.0)
    assert not out.requires_grad and out.data_ptr() != x.data_ptr()
    assert (
        torch.equal(x.detach(), copies[0])
        and torch.equal(grad.detach(), copies[1])
        and x._version == grad._version == 0
    )


def test_one_number_per_sample_or_per_channel_must_be_told_apart():
    x, grad = torch.rand(3, 3, 2, 2), torch.randn(3, 3, 2, 2)
    with pytest.raises(
        ValueError, match=r"fits the batch and the channels.*\(3, 1, 1, 1\) or \(1, 3, 1, 1\)"
    ):
        fr.fgsm_step(x, grad, torch.rand(3))
    with pytest.raises(ValueError, match=r"\(3, 1\) or \(1, 3\)"):
        fr.fgsm_step(x[:, :, 0, 0], grad[:, :, 0, 0], torch.rand(3))
    one = torch.full((1,), 0.1)
    assert torch.equal(fr.fgsm_step(x, grad, one), fr.fgsm_step(x, grad, 0.1))


@pytest.mark.parametrize("narrow", (torch.float32, torch.bfloat16), ids=str)
def test_opcheck(narrow):
    x, grad = torch.rand(3, 2, 5, 5).to(narrow), torch.randn(3, 2, 5, 5).to(narrow)
    per_channel = torch.rand(2, 1, 1)
    for layout in (x.contiguous(memory_format=torch.channels_last), x[..., ::2]):
        g = grad[..., : layout.shape[-1]]
        torch.library.opcheck(torch.ops.fastreg.fgsm_step.default, (layout, g, 0.1, 0.0, 1.0))
        torch.library.opcheck(
            torch.ops.fastreg.fgsm_step.default, (layout, g, 0.1, 0.0, 1.0, per_channel, None, per_channel)
        )
        torch.library.opcheck(
            torch.ops.fastreg.pgd_step.default, (layout, g, layout, 0.1, 0.2, 0.0, 1.0, None, per_channel)
        )


@pytest.mark.parametrize("dynamic", (False, True))
def test_compile_step(dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, g, e: fr.fgsm_step(x, g, e, 0.0, 1.0) * 2,
        fullgraph=True,
        backend="aot_eager",
        dynamic=dynamic,
    )
    # Two sizes, for which there is one graph of dynamic shapes, or two graphs.
    for shape in ((4, 3, 5, 5), (2, 3, 7, 7)):
        x, grad = torch.rand(shape), torch.randn(shape)
        for eps in (0.1, torch.tensor([0.1, 0.2, 0.3])):
            assert torch.equal(compiled(x, grad, eps), fr.fgsm_step(x, grad, eps, 0.0, 1.0) * 2)


SCRIPT = """
import hashlib, torch, fastreg as fr
for threads in (1, 2, 5):
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    one = hashlib.sha256()
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        # More than one thread takes, with a rest; and channels of an odd number of pixels.
        for shape in ((70_003,), (5, 3, 61, 67)):
            x, grad = torch.rand(shape).to(dtype), torch.randn(shape).to(dtype)
            eps = torch.rand(shape[1], *(1,) * (len(shape) - 2)) if len(shape) > 1 else torch.rand(shape)
            for out in (fr.fgsm_step(x, grad, 0.1, 0, 1), fr.fgsm_step(x, grad, eps, 0, 1),
                        torch.ops.fastreg.pgd_step.default(x, grad, x * 0.9, 0.1, 0.05, 0.0, 1.0)):
                one.update(out.view(torch.uint8).numpy().tobytes())
    print(fr._C.build_info()["instruction_set"], one.hexdigest())
"""


def test_the_same_bits_for_any_thread_count_and_instruction_set():
    printed = on_each_instruction_set(SCRIPT)
    lines = [line.split() for text in printed.values() for line in text.splitlines()]
    assert len(lines) == 3 * len(printed) and len({digest for _, digest in lines}) == 1, lines


X, Y = torch.rand(4, 3, 2, 2), torch.tensor([0, 1, 2, 0])


MODEL = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))


WRONG = {
    "grad shape": (ValueError, "grad must have the shape of x", lambda: fr.fgsm_step(X, X[:2], 0.1)),
    "grad dtype": (ValueError, "grad must have the dtype of x", lambda: fr.fgsm_step(X, X.double(), 0.1)),
    "grad device": (ValueError, "grad must have the device of x", lambda: fr.fgsm_step(X, X.to("meta"), 0.1)),
    "x no tensor": (TypeError, "x must be a torch.Tensor", lambda: fr.fgsm_step([1.0], X, 0.1)),
    "grad no tensor": (TypeError, "grad must be a torch.Tensor", lambda: fr.fgsm_step(X, None, 0.1)),
    "integers": (ValueError, "x must be float32", lambda: fr.fgsm_step(X.long(), X.long(), 0.1)),
    "eps None": (TypeError, "eps must be a number", lambda: fr.fgsm_step(X, X, None)),
    "eps text": (TypeError, "eps must be a number", lambda: fr.fgsm_step(X, X, "0.1")),
    "eps NaN": (ValueError, "eps must be finite", lambda: fr.fgsm_step(X, X, NAN)),
    "eps inf": (ValueError, "eps must be finite", lambda: fr.fgsm_step(X, X, -INF)),
    "eps NaN somewhere": (
        ValueError,
        "eps must be finite.*nan",
        lambda: fr.fgsm_step(X, X, torch.tensor([0.1, NAN, 0.1])),
    ),
    "eps length": (
        ValueError,
        "one per channel or one per sample",
        lambda: fr.fgsm_step(X, X, torch.rand(7)),
    ),
    "eps larger than x": (
        ValueError,
        "one per channel",
        lambda: fr.fgsm_step(X, X, torch.rand(2, 4, 3, 2, 2)),
    ),
    "eps bool": (TypeError, "eps must be real", lambda: fr.fgsm_step(X, X, torch.ones(3).bool())),
    "eps complex": (TypeError, "eps must be real", lambda: fr.fgsm_step(X, X, torch.ones(3).cfloat())),
    "lower NaN": (ValueError, "lower must be", lambda: fr.fgsm_step(X, X, 0.1, NAN)),
    "upper NaN somewhere": (
        ValueError,
        "upper must be numbers",
        lambda: fr.fgsm_step(X, X, 0.1, 0, torch.tensor([1, NAN, 1])),
    ),
    "crossed": (
        ValueError,
        "lower must not exceed upper, got 1 and 0",
        lambda: fr.fgsm_step(X, X, 0.1, 1, 0),
    ),
    "crossed somewhere": (
        ValueError,
        "lower must not exceed",
        lambda: fr.fgsm_step(X, X, 0.1, torch.tensor([0, 0.5, 0]), 0.4),
    ),
    "images of bytes": (
        TypeError,
        r"x must be a floating-point tensor.*\.float\(\)",
        lambda: fr.fgsm(MODEL, X.byte(), Y, 0.1),
    ),
    "complex x": (TypeError, "floating-point", lambda: fr.fgsm(MODEL, X.cfloat(), Y, 0.1)),
    "x a list": (TypeError, "x must be a torch.Tensor", lambda: fr.fgsm(MODEL, [1.0], Y, 0.1)),
    "fgsm eps negative": (
        ValueError,
        r"fgsm: eps must be finite and at least 0, got -0.1",
        lambda: fr.fgsm(MODEL, X, Y, -0.1),
    ),
    "fgsm eps negative somewhere": (
        ValueError,
        "eps must be finite and at least 0, got -1",
        lambda: fr.fgsm(MODEL, X, Y, torch.tensor([0, -1, 0])),
    ),
    "fgsm eps NaN": (ValueError, "fgsm: eps must be", lambda: fr.fgsm(MODEL, X, Y, NAN)),
    "fgsm eps inf": (ValueError, "fgsm: eps must be finite", lambda: fr.fgsm(MODEL, X, Y, INF)),
    "fgsm eps None": (TypeError, "fgsm: eps must be a number", lambda: fr.fgsm(MODEL, X, Y, None)),
    "bounds a number": (
        ValueError,
        r"bounds must be \(lower, upper\)",
        lambda: fr.fgsm(MODEL, X, Y, 0.1, bounds=1.0),
    ),
    "bounds three": (ValueError, "bounds must be", lambda: fr.fgsm(MODEL, X, Y, 0.1, bounds=(0, 1, 2))),
    "bounds text": (TypeError, "lower must be a number", lambda: fr.fgsm(MODEL, X, Y, 0.1, bounds=("0", 1))),
    "bounds crossed": (
        ValueError,
        "lower must not exceed upper",
        lambda: fr.fgsm(MODEL, X, Y, 0.1, bounds=(1, 0)),
    ),
    "norm": (ValueError, "norm must be one of 'linf', 'l2'", lambda: fr.fgsm(MODEL, X, Y, 0.1, norm="l1")),
    "y shape": (ValueError, "target must have shape", lambda: fr.fgsm(MODEL, X, Y[:2], 0.1)),
    "y out of range": (ValueError, "target must be in", lambda: fr.fgsm(MODEL, X, Y + 5, 0.1)),
    "x unused": (
        ValueError,
        "fgsm: the loss does not depend on x",
        lambda: fr.fgsm(lambda x: torch.zeros(4, 3), X, Y, 0.1),
    ),
    "x unused, parameters used": (
        ValueError,
        "pgd: the loss does not depend on x",
        lambda: fr.pgd(lambda x: MODEL[1].weight[:, :3] * 1, X[:3], Y[:3], 0.1, 0.1, 1),
    ),
    "steps 0": (ValueError, "steps must be at least 1, got 0", lambda: fr.pgd(MODEL, X, Y, 0.1, 0.1, 0)),
    "steps float": (TypeError, "steps must be an int", lambda: fr.pgd(MODEL, X, Y, 0.1, 0.1, 2.0)),
    "steps bool": (TypeError, "steps must be an int", lambda: fr.pgd(MODEL, X, Y, 0.1, 0.1, True)),
    "alpha negative": (ValueError, "pgd: alpha must be", lambda: fr.pgd(MODEL, X, Y, 0.1, -0.1, 1)),
    "alpha NaN": (ValueError, "pgd: alpha must be", lambda: fr.pgd(MODEL, X, Y, 0.1, NAN, 1)),
    "alpha None": (TypeError, "pgd: alpha must be a number", lambda: fr.pgd(MODEL, X, Y, 0.1, None, 1)),
    "weight 2": (
        ValueError,
        r"adversarial_loss: weight must be in \[0, 1\]",
        lambda: fr.adversarial_loss(MODEL, X, Y, 0.1, weight=2),
    ),
    "weight NaN": (ValueError, "weight must be", lambda: fr.adversarial_loss(MODEL, X, Y, 0.1, weight=NAN)),
    "loss of many numbers": (
        ValueError,
        "loss must give one number or one value per sample",
        lambda: fr.adversarial_loss(MODEL, X, Y, 0.1, loss=lambda z, y: z.repeat(2, 1)),
    ),
    "objective without x": (
        ValueError,
        "adversarial_loss: the loss does not depend on x",
        lambda: fr.adversarial_loss(lambda x: MODEL[1].weight[:, :3] * 1, X[:3], Y[:3], 0.1),
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name):
    error, message, call = WRONG[name]
    with pytest.raises(error, match=message):
        call()


def test_the_raw_operators_check_for_themselves():
    x = torch.rand(4, 3, 2)
    for arguments, message in (
        ((x, x[:2], 0.1, 0.0, 1.0), "grad must have the shape"),
        ((x, x.double(), 0.1, 0.0, 1.0), "grad must have the dtype"),
        ((x, x, 0.1, 0.0, 1.0, torch.rand(5)), "broadcast"),
        ((x, x, 0.1, 0.0, 1.0, torch.rand(4, 1, 2)), "neighbouring"),
        ((x, x, 0.1, 0.0, 1.0, torch.rand(3, 1).double()), "type of accumulation"),
        ((x, x, 0.1, 0.0, 1.0, torch.rand(1, 1, 1, 1)), "broadcasts to x"),
    ):
        with pytest.raises(ValueError, match=message):
            torch.ops.fastreg.fgsm_step.default(*arguments)
    with pytest.raises(ValueError, match="origin must have the shape"):
        torch.ops.fastreg.pgd_step.default(x, x, x[:1], 0.1, 0.1, 0.0, 1.0)
