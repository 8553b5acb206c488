"""Numbers below float32's smallest normal one, with which processors take 10 to 40 times as long. The
gradients of the losses and the state of the optimisers have none; the arithmetic of the losses, the
optimisers, attention and augmentation takes them as 0; dropout and `fgsm_step` give what torch gives. None of
them takes longer.
"""

import math

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


# ---- what is kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.1, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("function", [fr.dropout, fr.dropout2d, fr.drop_path, fr.dropout_add])
def test_dropout_of_subnormal_numbers_is_exact(function, p, dtype):
    """Kept elements are x * scale, rounded once; the smallest of them among normal ones, and both signs."""
    torch.manual_seed(3)
    x = (torch.randn(8, 3, 7, 19) * 2.0 ** torch.randint(-149, -120, (8, 3, 7, 19))).to(dtype)
    x.view(-1)[:5] = torch.tensor([2.0**-149, -(2.0**-149), 2.0**-126, 0.0, -0.0])
    g = x.flip(0).contiguous()
    leaf = x.clone().requires_grad_()
    torch.manual_seed(4)
    out = function(leaf, torch.zeros_like(x), p) if function is fr.dropout_add else function(leaf, p)
    (back,) = torch.autograd.grad(out, leaf, g)
    torch.manual_seed(4)
    ones = torch.ones_like(x)
    kept = (function(ones, ones * 0, p) if function is fr.dropout_add else function(ones, p)) != 0
    scale = torch.tensor(2.0**32 / (2.0**32 - round(p * 2.0**32)), dtype=torch.float32).double()
    for got, number in ((out, x), (back, g)):
        want = torch.where(kept, number.double() * scale, 0).float().to(dtype)
        assert torch.equal(got, want)
    small = kept & (x != 0) & (x.abs() < NORMAL)
    assert small.sum() > 50 and out[small].all()


@pytest.mark.parametrize("optimizer", [fr.optim.SGD, fr.optim.AdamW])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_subnormal_weight_that_is_not_moved_stays(optimizer, dtype):
    tiny = torch.full((70,), torch.finfo(dtype).tiny / 8, dtype=dtype)
    tiny[::2] *= -1
    for options in ({}, dict(weight_decay=0.01), dict(ema=0.9)):
        w = torch.nn.Parameter(tiny.clone())
        w.grad = torch.zeros_like(w)
        optimizer([w], lr=0.1, **options).step()
        assert torch.equal(w.detach(), tiny) or dtype == torch.float64
        torch.testing.assert_close(w.detach(), tiny, rtol=0.02, atol=0)
    w = torch.nn.Parameter(tiny.clone())
    w.grad = torch.zeros_like(w)
    optimizer([w], lr=0.1, l1=1.0, l1_mode="proximal").step()
    assert not w.any(), "the proximal step makes it exactly 0"


def test_the_pull_of_l1_sees_the_sign_of_a_subnormal_weight():
    w = torch.nn.Parameter(torch.tensor([1e-40, -1e-40, 0.0]))
    w.grad = torch.zeros(3)
    fr.optim.SGD([w], lr=0.5, l1=0.25).step()
    assert w.tolist() == [-0.125, 0.125, 0.0]


@pytest.mark.parametrize("optimizer", [fr.optim.SGD, fr.optim.AdamW])
@pytest.mark.parametrize("size", [1e-10, 1e-20, 1e-30, 1e-37, 1e-40])
def test_steps_with_tiny_gradients(optimizer, size):
    """As in float64, whatever falls below the normal numbers on the way."""
    torch.manual_seed(0)
    start, grads = torch.randn(300), [torch.randn(300) * size for _ in range(3)]
    found = []
    for dtype in (torch.float32, torch.float64):
        w = torch.nn.Parameter(start.to(dtype, copy=True))
        step = optimizer([w], lr=0.1, **(dict(momentum=0.9) if optimizer is fr.optim.SGD else {}))
        for g in grads:
            w.grad = g.to(dtype)
            step.step()
        found.append(w.detach().double())
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("size", [1e-16, 1e-19, 1e-20, 1e-22, 1e-30, 3e-38])
def test_norms_of_tiny_gradients(size):
    """Squares far below the normal numbers count as well."""
    torch.manual_seed(0)
    parts = [torch.randn(n) * size for n in (1, 5, 1023, 5000)]
    for part in parts[1:]:
        part[::3] = 0
    w = [torch.nn.Parameter(torch.zeros_like(part)) for part in parts]
    for each, part in zip(w, parts, strict=True):
        each.grad = part.clone()
    want = math.sqrt(sum(part.double().square().sum().item() for part in parts))
    got = math.sqrt(torch.ops.fastreg.sum_of_squares([each.grad for each in w]).double().item())
    # The sum is given in float32, in which it is subnormal, or 0, for the smallest.
    assert got == pytest.approx(want, rel=1e-5) if want**2 > NORMAL else got < 2.0**-63


def test_augmentation_moves_subnormal_pixels_as_they_are():
    x = torch.randn(4, 3, 20, 33) * 1e-39
    assert torch.equal(fr.augment.Augment(hflip=1.0)(x), x.flip(-1))
    turned = fr.augment.Augment(rotate=(90, 90))(torch.rand(2, 3, 16, 16) * 1e-39)
    assert turned.abs().max() < NORMAL


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("factor", [0.3, 2.0**-20, -7.0])
def test_a_scaled_gradient_is_the_definition(dtype, factor):
    x = (torch.rand(37, 50) + 1) * 2.0 ** torch.randint(-126, -100, (37, 50))
    x = torch.where(torch.rand(37, 50) < 0.1, 0, x * torch.randn(37, 50).sign()).to(dtype)
    got, want = x.clone(), x.clone()
    torch.ops.fastreg.cross_entropy_scale_(got, torch.tensor(factor))
    fr._registry.plain_definition("cross_entropy_scale_")(want, torch.tensor(factor))
    assert torch.equal(got, want) and ((got == 0) & (x != 0)).any() == (abs(factor) < 1)


# ---- and none takes longer


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


TIMES = """
import time, torch, fastreg as fr
torch.manual_seed(0)
n = 2**16
x, image = torch.randn(n), torch.rand(4, 3, 72, 72)
target = torch.randint(256, (256,))
augment = fr.augment.Augment(rotate=15, brightness=0.4, blur=(3, (0.5, 1.0)))

def step(optimizer, size, **options):
    w = torch.nn.Parameter(x.clone())
    w.grad = x * size
    return optimizer([w], lr=1e-3, **options).step

def loss(size, factor=1.0):
    leaf = (x * size).view(256, 256).requires_grad_()
    return lambda: (fr.cross_entropy(leaf, target, label_smoothing=0.1) * factor).backward()

def attend(size):
    heads, g = (torch.randn(3, 2, 640, 16).requires_grad_() for _ in range(2))
    return lambda: torch.autograd.grad(
        fr.scaled_dot_product_attention(heads, heads, heads, dropout_p=0.1), heads, g.detach() * size)

def back(size):
    leaf = image.clone().requires_grad_()
    return lambda: torch.autograd.grad(augment(leaf), leaf, image * size)

OPS = {
    "dropout": lambda size: (lambda small=x * size: fr.dropout(small, 0.3)),
    "dropout in bfloat16": lambda size: (lambda small=(x * size).bfloat16(): fr.dropout(small, 0.3)),
    "dropout_add": lambda size: (lambda small=x * size: fr.dropout_add(small, small, 0.3)),
    "fgsm_step": lambda size: (lambda small=x * size: fr.fgsm_step(small, small, 1e-41)),
    "SGD": lambda size: step(fr.optim.SGD, size, momentum=0.9, weight_decay=1e-4),
    "AdamW": lambda size: step(fr.optim.AdamW, size),
    "sum_of_squares": lambda size: (lambda small=[x * size]: torch.ops.fastreg.sum_of_squares(small)),
    "loss of small logits": lambda size: loss(size),
    "loss with a small factor": lambda size: loss(1.0, size),
    "gradient of attention": attend,
    "augment": lambda size: (lambda small=image * size: augment(small)),
    "gradient of augment": back,
}
for name, of in OPS.items():
    works = [of(size) for size in (1e-40, 1e-20, 1.0)]
    best = [float("inf")] * 3
    for _ in range(15):  # in turn: others share the machine
        for i, work in enumerate(works):
            start = time.process_time()
            work()
            best[i] = min(best[i], time.process_time() - start)
    print(f"{name}:{max(best[:2]) / best[2]:.2f}")
"""


def test_no_op_is_slower_with_small_numbers():
    """They took up to 40 times as long."""
    printed = run_python(TIMES, check=True, OMP_NUM_THREADS="1").stdout.split("\n")
    ratios = {name: float(ratio) for name, ratio in (line.split(":") for line in printed if line)}
    assert len(ratios) == 12 and max(ratios.values()) < 2.5, ratios


def test_confident_rows_are_no_slower():
    """With subnormal numbers in its gradient the backward pass takes 5 times as long and more."""
    assert float(run_python(CODE, check=True, OMP_NUM_THREADS="1").stdout) < 2
