"""Gradients of the losses below float32's smallest normal number are zero: the matrix products that follow
would take 10 to 40 times as long. All others are what they were.
"""

import pytest
import torch
from helpers import run_python

import fastreg as fr
from fastreg._cross_entropy import LossOptions

NORMAL = 2.0**-126


def wide(shape, dtype, seed=0):
    """Logits of deviation 16, of which many have a probability about the smallest normal number."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 16
    x[:, :, ...].view(-1)[::7] -= 60
    return x.to(dtype)


def soft(shape):
    """Targets with most of their probabilities zero."""
    t = torch.zeros(shape)
    t[:, 1], t[:, 3] = 0.75, 0.25
    return t


FORMS = {
    "rows": ((6, 1003), {}),
    "short rows": ((70, 10), {}),
    "columns": ((2, 21, 9, 5), {}),
    "weights": ((6, 1003), dict(weight=torch.linspace(0, 2, 1003))),
    "tiny weights": ((6, 1003), dict(weight=torch.full((1003,), 1e-37), label_smoothing=0.1)),
    "probabilities": ((6, 1003), {}),
    "sum": ((6, 1003), dict(reduction="sum")),
    "z_loss": ((6, 1003), dict(z_loss=1e-4)),
    "smoothed": ((6, 1003), dict(label_smoothing=0.1, smoothing="others")),
}


def target_of(form, shape):
    if form == "probabilities":
        return soft(shape)
    return torch.arange(shape[0] * torch.Size(shape[2:]).numel()).reshape(shape[0], *shape[2:]) % shape[1]


def gradient(form, dtype, factor=1.0, function=fr.cross_entropy):
    shape, options = FORMS[form]
    x = wide(shape, dtype).requires_grad_()
    target = target_of(form, shape)
    if dtype == torch.float64:
        options = {name: v.double() if isinstance(v, torch.Tensor) else v for name, v in options.items()}
        target = target.double() if target.is_floating_point() else target
    (function(x, target, **options) * factor).backward()
    return x.grad


@pytest.mark.parametrize("narrow", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("factor", [1.0, -1.0, 0.125, 1e-20, 3.0])
@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_normal_or_zero(form, factor, narrow):
    got = gradient(form, narrow, factor)
    assert not ((got != 0) & (got.abs() < NORMAL)).any()
    shape, options = FORMS[form]
    x = wide(shape, narrow).double().requires_grad_()
    options = {name: v.double() if isinstance(v, torch.Tensor) else v for name, v in options.items()}
    target = target_of(form, shape)
    target = target.double() if target.is_floating_point() else target
    (fr.cross_entropy(x, target, **options) * factor).backward()
    want = x.grad
    # The exponential itself ends at 2^-126: what is left may be that much times the factor.
    tolerance = {torch.float32: 3e-5, torch.bfloat16: 8e-3}[narrow]
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=4 * NORMAL * max(1.0, abs(factor)))
    if factor == 1.0 and form in ("rows", "columns", "weights", "probabilities", "sum"):
        below = (want != 0) & (want.abs() < NORMAL / 1.01)
        assert below.any() and not got[below].any(), "the case has no number that is flushed"
        above = want.abs() > NORMAL * 2**20
        assert got[above].all()


@pytest.mark.parametrize("form", ["rows", "columns"])
def test_float64_is_kept(form):
    got = gradient(form, torch.float64, 2.0**-100)
    assert ((got != 0) & (got.abs() < NORMAL)).any()


def test_float16_keeps_its_own():
    """They begin at 2^-14 and carry what a loss scale would lift."""
    got = gradient("rows", torch.float16, 1e-3)
    assert ((got != 0) & (got.abs() < 2.0**-14)).sum() > 10


def test_other_ways_to_the_gradient():
    """Compiled, by the definition, where the graph is kept or differentiated."""
    shape = (6, 1003)
    x, target = wide(shape, torch.float32), target_of("rows", shape)

    def of(function, **options):
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(function(leaf) * 0.125, leaf, **options)[0]

    def loss(leaf):
        return fr.cross_entropy(leaf, target)

    found = [of(loss), of(loss, retain_graph=True), of(loss, create_graph=True).detach()]
    found.append(of(lambda leaf: fr.cross_entropy(leaf, target, reduction="none").mean()))
    found.append(of(torch.compile(loss, backend="aot_eager")))
    for got in found:
        assert not ((got != 0) & (got.abs() < NORMAL)).any()
        torch.testing.assert_close(got, found[0], rtol=1e-6, atol=0)
    grad = torch.ops.fastreg.cross_entropy(x, target, None, with_grad=True)[1]
    plain = fr._registry.plain_definition("cross_entropy")(x, target, None, *LossOptions(), True)[1]
    for got in (grad, plain):
        assert not ((got != 0) & (got.abs() < NORMAL)).any() and (got == 0).sum() > 100


@pytest.mark.parametrize(
    "function", [fr.cross_entropy, fr.linear_cross_entropy, fr.optim.SGD, fr.optim.AdamW]
)
def test_the_docstring_says_so(function):
    assert "2^-126" in function.__doc__


CODE = """
import time, torch, fastreg as fr
torch.manual_seed(0)
hidden, target = torch.randn(512, 128), torch.randint(4000, (512,))
def seconds(weight):
    start = time.process_time()
    fr.cross_entropy(hidden @ weight.t(), target).backward()
    return time.process_time() - start
weights = [torch.nn.Parameter(torch.randn(4000, 128) * deviation / 128**0.5) for deviation in (16, 4)]
turns = [[seconds(weight) for weight in weights] for _ in range(15)]  # in turn: others share the machine
confident, usual = map(min, zip(*turns))
print(confident / usual)
"""


def test_confident_rows_are_no_slower():
    """With subnormal numbers in its gradient the backward pass takes 5 times as long and more."""
    assert float(run_python(CODE, check=True, OMP_NUM_THREADS="1").stdout) < 2
