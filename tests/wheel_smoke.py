"""Whether an installed fastreg works with the torch beside it: python tests/wheel_smoke.py [WORD].

It needs fastreg and torch, nothing else; for inductor a C++ compiler, too. It prints a line for each check
that failed and then a row of the table in docs/compatibility.md: torch, autograd, modules, passed/run. The
exit status is 1 if anything failed. With a WORD only checks with it in their name run. Each check compares
with torch's own function or with a formula in float64.
"""

import contextlib
import copy
import functools
import importlib
import io
import json
import math
import os
import pickle
import shutil
import sys
import time
import traceback
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

with warnings.catch_warnings(record=True) as said_at_import:
    warnings.simplefilter("always")
    fr = importlib.import_module("fastreg")

DTYPES = {"float32": 2e-6, "float64": 1e-12, "float16": 2e-3, "bfloat16": 2e-2}  # and how exact each is
BACKENDS = ("eager", "aot_eager", "inductor")
CHECKS = {}


class Skipped(Exception):
    """A check that this machine cannot run."""


def check(*cases):
    """Registers a check, once or once per case."""

    def register(function):
        name = function.__name__.replace("_", " ").strip()
        for case in cases or (None,):
            CHECKS[name if case is None else f"{name}, {case}"] = (function, () if case is None else (case,))
        return function

    return register


def close(got, want, tolerance=1e-9):
    """Fail unless two tensors have one dtype and values that differ by no more than rounding."""
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def raises(error, text, function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except Exception as got:
        assert isinstance(got, error), f"{type(got).__name__} instead of {error.__name__}: {got}"
        assert text in str(got), f"{text!r} is not in {got}"
    else:
        raise AssertionError(f"no {error.__name__} that says {text!r}")


def seeded(function, *args, seed=3, **kwargs):
    torch.manual_seed(seed)
    return function(*args, **kwargs)


def operators(function, *args):
    """The names of the operators that run in a call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function(*args)
    return {event.key for event in profile.key_averages()}


@functools.cache
def has_gpu():
    """Whether fastreg's CUDA kernels run here."""
    return importlib.import_module("fastreg.cli.doctor").collect()["cuda"]["usable"]


def is_there(name, seen):
    """Whether an operator of fastreg is among them: the one with kernels, or one made of it."""
    return any(each.startswith(f"fastreg::{name}") for each in seen)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
        self.head = nn.Linear(4 * 36, 5)

    def forward(self, x):
        return self.head(self.trunk(x))


def classifier():
    """(a network, images, classes)."""
    torch.manual_seed(0)
    return Net(), torch.rand(6, 3, 8, 8), torch.arange(6) % 5


# ---- the package


@check()
def importing_says_nothing():
    about = [str(w.message) for w in said_at_import]
    assert not about, about


@check()
def doctor_in_json():
    with contextlib.redirect_stdout(io.StringIO()) as out:
        status = importlib.import_module("fastreg.cli").main(["doctor", "--json"])
    report = json.loads(out.getvalue())
    assert not status and report["torch"] == torch.__version__, report
    assert report["fastreg"] == fr.__version__ and report["strangers"] == [], report
    if report["autograd"]["in_use"] == "python":
        assert report["autograd"]["why_not"], report["autograd"]


# ---- dropout


@check(*DTYPES)
def dropout(name):
    x = torch.rand(100, 1000).add(0.5).to(getattr(torch, name)).requires_grad_()
    y = seeded(fr.dropout, x, 0.3)
    kept = y.detach() != 0
    assert abs(kept.double().mean() - 0.7) < 0.01
    tolerance = max(DTYPES[name], 1e-9)  # p is a multiple of 2^-32
    close(y.detach(), torch.where(kept, x.detach().double() / 0.7, 0).to(y.dtype), tolerance)
    y.sum().backward()
    close(x.grad, (kept.double() / 0.7).to(x.dtype), tolerance)
    assert torch.equal(seeded(fr.dropout, x.detach(), 0.3), y.detach())


@check()
def dropout_depends_on_seed_and_index_alone():
    x = torch.ones(7, 33)
    whole, mask = fr.dropout_with_mask(x, 0.4, seed=9)
    part, _ = fr.dropout_with_mask(x[3:], 0.4, seed=9, offset=x[:3].numel())
    assert torch.equal(whole[3:], part)
    assert torch.equal(fr.unpack_mask(mask, x.shape), whole != 0)
    plain = importlib.import_module("fastreg._registry").plain_definition("dropout")
    assert torch.equal(plain(x, 0.4, torch.tensor([9]), 0, 1, 1 / 0.6, 0.0, 0.0)[0], whole)


@check("dropout1d", "dropout2d", "dropout3d", "feature_alpha_dropout")
def whole_channels_are_dropped(name):
    x = torch.rand(50, 40, 3, 3, 3).add(0.5)
    x = x[..., 0] if name == "dropout2d" else x[..., 0, 0] if name == "dropout1d" else x
    y = seeded(getattr(fr, name), x, 0.5, True)
    dropped = y.flatten(2).std(-1) < 1e-6  # all of a channel is one number
    assert 0.4 < dropped.double().mean() < 0.6, dropped.double().mean()
    if name != "feature_alpha_dropout":
        close(y, torch.where(dropped.view(*dropped.shape, *[1] * (x.dim() - 2)), 0.0, 2 * x), 1e-6)


@check()
def alpha_dropout_keeps_mean_and_variance():
    y = seeded(fr.alpha_dropout, seeded(torch.randn, 400_000), 0.3, True)
    assert abs(y.mean()) < 0.01 and abs(y.std() - 1) < 0.01


@check()
def drop_path_drops_whole_samples():
    y = seeded(fr.drop_path, torch.ones(1000, 4), 0.25, True)
    assert bool(((y == 0).all(1) | ((y - 4 / 3).abs() < 1e-6).all(1)).all())
    assert 0.7 < (y != 0).double().mean() < 0.8


@check()
def dropout_add():
    h, residual = (torch.randn(8, 64, dtype=torch.float64, requires_grad=True) for _ in range(2))
    bias = torch.randn(64, dtype=torch.float64, requires_grad=True)
    leaves, results = (h, residual, bias), []
    for function in (
        lambda: fr.dropout_add(h, residual, 0.3, bias),
        lambda: fr.dropout(h + bias, 0.3) + residual,
    ):
        y = seeded(function)
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), leaves)])
    for got, want in zip(*results, strict=True):
        close(got, want)


@check()
def dropout_in_a_checkpoint():
    x = torch.randn(6, 50, requires_grad=True)
    grads = []
    for run in (
        lambda: fr.dropout(x.sin(), 0.5),
        lambda: checkpoint(lambda v: fr.dropout(v.sin(), 0.5), x, use_reentrant=False),
    ):
        grads += torch.autograd.grad(seeded(run).sum(), x)
    assert torch.equal(*grads)


# ---- cross-entropy


def losses(kind):
    """(options, target) for 12 rows of 7 classes."""
    if kind == "probabilities":
        return dict(label_smoothing=0.1), torch.rand(12, 7, dtype=torch.float64).softmax(1)
    target = torch.arange(12) % 7
    if kind == "classes":
        return {}, target
    target[3] = -100
    return dict(weight=torch.rand(7, dtype=torch.float64) + 0.5, label_smoothing=0.1), target


@check("classes", "weights, smoothing, ignored rows", "probabilities")
def cross_entropy_and_two_derivatives(kind):
    options, target = losses(kind)
    x = torch.randn(12, 7, dtype=torch.float64, requires_grad=True)
    direction, results = torch.randn(12, 7, dtype=torch.float64), []
    for function in (fr.cross_entropy, F.cross_entropy):
        loss = function(x, target, **options)
        (first,) = torch.autograd.grad(loss, x, create_graph=True)
        (second,) = torch.autograd.grad((first * direction).sum(), x)
        results.append((loss.detach(), first.detach(), second))
    for got, want in zip(*results, strict=True):
        close(got, want)


@check()
def smoothing_over_the_others():
    x, target = torch.randn(9, 5, dtype=torch.float64), torch.arange(9) % 5
    share = torch.full((9, 5), 0.2 / 4, dtype=torch.float64).scatter_(1, target[:, None], 0.8)
    close(
        fr.cross_entropy(x, target, label_smoothing=0.2, smoothing="others"),
        -(share * x.log_softmax(1)).sum(1).mean(),
    )


@check("float16", "bfloat16")
def cross_entropy_rounds_once(name):
    x = torch.randn(64, 300).mul(4).to(getattr(torch, name)).requires_grad_()
    target, wide = torch.arange(64) % 300, x.detach().double().requires_grad_()
    got, want = fr.cross_entropy(x, target), F.cross_entropy(wide, target)
    assert torch.equal(got.double(), want.to(x.dtype).double())
    close(fr.cross_entropy(x, target, loss_dtype=torch.float32).double(), want, 1e-6)
    (gradient,) = torch.autograd.grad(got, x)
    close(gradient.double(), torch.autograd.grad(want, wide)[0], DTYPES[name])


@check()
def linear_cross_entropy():
    hidden, weight = (torch.randn(n, 6, dtype=torch.float64, requires_grad=True) for n in (40, 11))
    bias, target = torch.randn(11, dtype=torch.float64, requires_grad=True), torch.arange(40) % 11
    results, leaves = [], (hidden, weight, bias)
    for function in (
        lambda: fr.linear_cross_entropy(hidden, weight, target, bias, label_smoothing=0.1),
        lambda: F.cross_entropy(F.linear(hidden, weight, bias), target, label_smoothing=0.1),
    ):
        loss = function()
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        second = torch.autograd.grad(sum((g.sin() * g).sum() for g in first), leaves)
        results.append([loss.detach(), *(g.detach() for g in first), *second])
    for got, want in zip(*results, strict=True):
        close(got, want)


@check("cross_entropy", "dropout")
def vmap_of_grad(name):
    x = torch.randn(5, 7, dtype=torch.float64)
    if name == "dropout":

        def ours(v):
            return fr.dropout(v, 0.5).square().sum()

        gradient = torch.func.vmap(torch.func.grad(ours), randomness="different")(x)
        assert bool(((gradient == 0) | ((gradient - 8 * x).abs() < 1e-9)).all())
        assert 0 < (gradient == 0).sum() < x.numel()
        return
    target = torch.arange(5)
    gradients = [
        torch.func.vmap(torch.func.grad(function))(x, target)
        for function in (fr.cross_entropy, F.cross_entropy)
    ]
    close(*gradients)


# ---- SGD


def stepped(optimizer_class, start, grads, scaler=None, **options):
    p = nn.Parameter(start.clone())
    optimizer = optimizer_class([p], **options)
    for g in grads:
        p.grad = g.clone()
        if scaler is None:
            optimizer.step()
        else:
            scaler.scale(torch.ones(()))  # makes the tensor of its scale
            scaler.step(optimizer)
            scaler.update()
    return p.detach()


@check(*DTYPES)
def sgd(name):
    start, grads = torch.randn(1000), [torch.randn(1000) for _ in range(4)]
    dtype, options = getattr(torch, name), dict(lr=0.05, momentum=0.9, weight_decay=0.1, nesterov=True)
    got = stepped(fr.optim.SGD, start.to(dtype), [g.to(dtype) for g in grads], **options)
    want = stepped(torch.optim.SGD, start.to(dtype), [g.to(dtype) for g in grads], **options)
    close(got, want, 2 * DTYPES[name])


@check(*DTYPES)
def adamw(name):
    start, grads = torch.randn(1000), [torch.randn(1000) for _ in range(4)]
    dtype, options = getattr(torch, name), dict(lr=0.05, betas=(0.9, 0.9), amsgrad=True, eps=0.1)
    got = stepped(fr.optim.AdamW, start.to(dtype), [g.to(dtype) for g in grads], max_norm=1e9, **options)
    wide = torch.promote_types(dtype, torch.float32)  # torch rounds the squares to 16 bits
    want = stepped(
        torch.optim.AdamW, start.to(dtype).to(wide), [g.to(dtype).to(wide) for g in grads], **options
    )
    close(got.to(wide), want, 4 * DTYPES[name])


@check()
def the_average_of_the_weights():
    p = nn.Parameter(torch.randn(1000, dtype=torch.float64))
    optimizer, average = fr.optim.AdamW([p], lr=0.1, ema=0.75), None
    for _ in range(3):
        p.grad = torch.randn_like(p)
        optimizer.step()
        average = p.detach().clone() if average is None else torch.lerp(average, p.detach(), 0.25)
    with optimizer.averaged():
        close(p.detach(), average)


@check()
def sgd_with_proximal_l1():
    w, g = torch.randn(1000, dtype=torch.float64), torch.randn(1000, dtype=torch.float64)
    got = stepped(fr.optim.SGD, w, [g], lr=0.1, l1=3.0, l1_mode="proximal")
    z = w - 0.1 * g
    close(got, z.sign() * (z.abs() - 0.3).clamp(min=0))
    assert 0 < (got == 0).sum() < 1000


@check("by the scaler", "in the step")
def grad_scaler_and_an_overflow_in_the_first_step(where):
    start, grads = torch.randn(100), [torch.randn(100) for _ in range(3)]
    options = dict(lr=0.1, momentum=0.9, weight_decay=0.1)
    want = stepped(torch.optim.SGD, start, grads, **options)
    overflow = grads[0].clone()
    overflow[7] = math.inf
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    scaled = [overflow, *(g * 128 for g in grads)]
    more = dict(fused=True) if where == "in the step" else {}
    close(stepped(fr.optim.SGD, start, scaled, scaler, **options, **more), want, 1e-5)
    assert scaler.get_scale() == 128.0


# ---- adversarial examples


@check()
def fgsm():
    model, x, y = classifier()
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model.eval()(leaf), y), leaf)
    before = copy.deepcopy(model.state_dict())
    close(fr.fgsm(model.eval(), x, y, 0.1), (x + 0.1 * gradient.sign()).clamp(0, 1), 1e-6)
    with torch.no_grad():
        fr.fgsm(model.train(), x, y, 0.1)
    assert model.training and all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@check("linf", "l2")
def pgd(norm):
    model, x, y = classifier()
    model.eval()
    attacked = fr.pgd(model, x, y, 0.1, 0.04, 5, norm=norm)
    change = (attacked - x).flatten(1).norm(dim=1, p=math.inf if norm == "linf" else 2)
    assert change.max() <= 0.1 + 1e-6 and attacked.min() >= 0 and attacked.max() <= 1
    with torch.no_grad():
        assert F.cross_entropy(model(attacked), y) > F.cross_entropy(model(x), y)


@check()
def adversarial_training():
    model, x, y = classifier()
    twin = copy.deepcopy(model)
    fr.adversarial_loss(model, x, y, 0.1).backward()
    fr.adversarial_backward(twin, x, y, 0.1)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert p.grad is not None and bool(p.grad.isfinite().all())
        close(q.grad, p.grad, 1e-4)


# ---- augmentation


def augmentation(**options):
    return fr.augment.Augment(hflip=0.5, rotate=15, scale=(0.8, 1.2), size=(9, 11), brightness=0.3, **options)


@check("uint8", "float32")
def augment(name):
    images = torch.randint(256, (5, 3, 12, 10), dtype=torch.uint8)
    images = images if name == "uint8" else images / 255
    aug = augmentation(contrast=0.2, saturation=0.2, hue=0.05, blur=(3, (0.1, 1.0)), erase=0.5)
    params = aug.sample(images, seed=4)
    whole = fr.augment.apply(images, params)
    part = fr.augment.apply(images[2:], aug.sample(images[2:], seed=4, offset=2))
    assert whole.shape == (5, 3, 9, 11) and whole.dtype == images.dtype and torch.equal(whole[2:], part)
    assert torch.equal(fr.augment.functional.horizontal_flip(images), images.flip(-1))


@check()
def augment_as_grid_sample():
    images = torch.rand(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    aug = fr.augment.Augment(rotate=30, shear=10)
    params = aug.sample(images, seed=1)
    theta = params.matrices(8, 8)
    # Pixel centres at whole numbers become torch's: -1 and 1 are the edges of the image.
    scale = torch.tensor([[0.25, 0, -0.875], [0, 0.25, -0.875], [0, 0, 1]], dtype=torch.float64)
    whole = torch.cat((theta, torch.tensor([[[0.0, 0, 1]]], dtype=torch.float64).expand(2, 1, 3)), 1)
    grid = F.affine_grid((scale @ whole @ scale.inverse())[:, :2], (2, 3, 8, 8), align_corners=False)
    results = []
    for y in (fr.augment.apply(images, params), F.grid_sample(images, grid, align_corners=False)):
        results.append((y.detach(), *torch.autograd.grad(y.sin().sum(), images)))
    for got, want in zip(*results, strict=True):
        close(got, want, 1e-7)


# ---- the other methods


@check()
def early_stopping():
    model = nn.Linear(2, 2)
    stopper = fr.EarlyStopping(model, patience=3)
    for epoch, loss in enumerate([6, 5, 5, 5, 5, 5]):
        with torch.no_grad():
            model.weight.fill_(float(epoch))
        if stopper.step(loss):
            break
    stopper.restore()
    assert epoch == 4 and stopper.best == 5 and bool((model.weight == 1).all())


@check()
def multi_task_sharing_pseudo_labels():
    total = fr.MultiTaskLoss({"a": 1.0, "b": 0.25})
    close(total({"a": torch.tensor(2.0), "b": torch.tensor(4.0)}), torch.tensor(3.0), 1e-6)
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    fr.share_parameters(model, "0.weight", "1.weight")
    assert model[0].weight is model[1].weight
    logits = torch.randn(8, 5, dtype=torch.float64, requires_grad=True)
    loss = fr.pseudo_label_loss(logits, logits.detach() * 9, threshold=0.0)
    close(loss, F.cross_entropy(logits, logits.detach().argmax(1)))


@check()
def modules_are_copied_and_pickled():
    model = nn.Sequential(fr.nn.Dropout(0.3), fr.nn.AlphaDropout(0.2), fr.nn.DropPath(0.1))
    x = torch.randn(4, 50)
    want = seeded(model, x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(seeded(twin, x), want)


# ---- under torch's names


def transformer(p):
    torch.manual_seed(1)
    return nn.Transformer(16, 2, 1, 1, 32, dropout=p, batch_first=True)


@check()
def patch_under_a_transformer():
    source, target = torch.randn(3, 6, 16), torch.randn(3, 5, 16)
    model = transformer(0.0)
    want = model(source, target)
    functions = F.dropout, F.cross_entropy, F.scaled_dot_product_attention
    with fr.patched():
        close(model(source, target), want, 1e-5)
        seen = operators(transformer(0.2), source, target)
        loss = operators(nn.CrossEntropyLoss(), torch.randn(4, 5), torch.arange(4))
    assert is_there("dropout", seen) and "aten::dropout" not in seen, seen
    assert is_there("cross_entropy", loss) and "aten::cross_entropy_loss" not in loss, loss
    assert functions == (F.dropout, F.cross_entropy, F.scaled_dot_product_attention)
    assert not is_there("", operators(transformer(0.2), source, target))


@check()
def convert_after_torch_compile():
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)), torch.ones(4, 8)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert not is_there("dropout", operators(compiled, x))
    fr.convert(compiled)
    assert is_there("dropout", operators(compiled, x))


# ---- torch.compile


def compilable():
    """{name: (a function, its inputs, of which the first needs a gradient)}."""
    x = torch.randn(8, 24)
    y = torch.arange(8)
    weight = torch.randn(12, 24)
    return {
        "dropout": (lambda v: fr.dropout(v, 0.3).square(), [x]),
        "dropout_add": (lambda v, r: fr.dropout_add(v, r, 0.3), [x, torch.randn(8, 24)]),
        "cross_entropy": (lambda v, t: fr.cross_entropy(v, t, label_smoothing=0.1), [x, y]),
        "linear_cross_entropy": (lambda v, w, t: fr.linear_cross_entropy(v, w, t), [x, weight, y]),
        "augment": (augmentation(mean=0.5, std=0.2), [torch.rand(2, 3, 12, 10)]),
        "attention": (
            lambda v: fr.scaled_dot_product_attention(v, v, v, dropout_p=0.3),
            [torch.randn(2, 2, 9, 8)],
        ),
    }


@check(*(f"{name}, {backend}" for backend in BACKENDS for name in compilable()))
def compiled_as_one_graph(case):
    name, backend = case.split(", ")
    function, (x, *rest) = compilable()[name]
    results = []
    for run in (function, torch.compile(function, fullgraph=True, backend=backend)):
        leaf = x.clone().requires_grad_()
        output = seeded(run, leaf, *rest)
        output.sum().backward()
        results.append((output.detach(), leaf.grad))
    if name == "dropout":  # inductor may draw another seed than the eager call does
        (a, _), (b, gradient) = results
        assert abs((a == 0).double().mean() - (b == 0).double().mean()) < 0.25
        close(gradient, torch.where(b == 0, 0, 2 * x / 0.7**2), 1e-5)
    elif backend != "inductor" or "cross_entropy" in name:
        for want, got in zip(*results, strict=True):
            close(got, want, 1e-5)
    assert all(bool(t.isfinite().all()) for t in results[1])


@check(*BACKENDS)
def compiled_patched_model(backend):
    model = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.2, batch_first=True)
    x, y = torch.randn(4, 6, 16), torch.arange(24) % 16

    def loss_of(v):
        return F.cross_entropy(model(v).flatten(0, 1), y)

    with fr.patched():
        compiled = torch.compile(loss_of, fullgraph=True, backend=backend)
        seen = operators(lambda: compiled(x).backward())
    assert is_there("dropout", seen) and is_there("cross_entropy", seen), seen
    assert all(p.grad is not None for p in model.parameters())


@check()
def compiled_under_autocast():
    def block(v, r, w, t):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return fr.cross_entropy(fr.dropout_add(F.linear(v, w), r, 0.3), t)

    arguments = torch.randn(8, 16), torch.randn(8, 16), torch.randn(16, 16), torch.arange(8)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    close(seeded(compiled, *arguments), seeded(block, *arguments), 1e-5)


# ---- operators and errors


def pictures():
    """What `augment` takes: images, all that may be done to them, and the size of the output."""
    images, boxes = torch.rand(2, 3, 9, 11), torch.tensor([[1, 2, 3, 4], [0, 0, 0, 0]])
    matrices = torch.eye(2, 3).double().repeat(2, 1, 1) + 0.1
    colour, blur = torch.full((2, 4), 0.4).double(), torch.full((2, 6), 1 / 3).double()
    windows, constants = torch.tensor([[1, 1, 5, 6], [0, 0, 9, 11]]), [0.0] * 6 + [2.0] * 3 + [0.5] * 3
    static = constants, 7, 8, 3, 3, 7, 1, 0, True, True, torch.float32
    return images, matrices, colour, blur, boxes, windows, *static


def draws():
    """What `augment_draw` takes: bounds of each number that a sample draws."""
    bounds = [1.0] * len(importlib.import_module("fastreg.augment._op").COLUMNS)
    boxes = [0.1, 1.0, -0.3, 0.3, 0.0], [0.1, 0.3, -1.0, 1.0]
    seed = torch.tensor([3])
    return torch.rand(2, 3, 9, 11), seed, 5, 4, [0.5] * 3, bounds, bounds, 1, *boxes, [9, 9, 8, 8], 3, 5


def policies():
    """What `augment_policy` takes: images, and the numbers and strengths of what is done to each in turn."""
    operations, strengths = torch.tensor([[5, 11], [9, 6]]), torch.tensor([[20.0, 0.5], [4.0, 0.3]]).double()
    return torch.rand(2, 3, 9, 11), operations, strengths, 1, True, [0.5]


def operator_arguments():
    """{the name of each operator of one process: its arguments}."""
    device = "cuda" if has_gpu() else "cpu"
    # Numbers that several operators take, then those of optimisers, of attention and of losses.
    x, other, seed, off = torch.randn(3, 8), torch.randn(3, 8), torch.tensor([5]), False
    mask, one, four = (
        torch.full((3,), 90, dtype=torch.uint8),
        torch.rand(4).double(),
        torch.rand(4, 4).double(),
    )
    of_sgd = [x], [other], [x.clone()], [], [], []
    of_adamw = [x], [other], *([torch.rand(3, 8)] for _ in range(3)), [torch.ones(())], [], []
    numbers_of_sgd, numbers_of_adamw = (0.1, 0.9, 0.0, 0.01, 0.02, 0.0), (0.1, 0.9, 0.99, 1e-8, 0.1, 0.0, 0.0)
    tensor_of = functools.partial(torch.tensor, dtype=torch.float64)
    q, k, v = torch.randn(2, 4, 8), torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    of_rows = torch.zeros(2, 4), torch.full((2, 4), 5.0)
    scores, largest, total = torch.randn(2, 4, 5), torch.zeros(2, 4, 1), torch.full((2, 4, 1), 5.0)
    place = None, 0.3, seed, 0, 5, -1, True
    classes, rows = torch.arange(3), torch.rand(3)
    return {
        "dropout": (x, 0.3, seed, 7, 2, 1.5),
        "dropout_": (x, 0.3, seed, 7, 2, 1.5),
        "dropout_mask": (x, 24, 0.3, seed, 7),
        "dropout_apply": (x, mask, 1, 1.5),
        "dropout_traced": (x, 0.3, seed, 7, 2, "inverted"),
        "dropout_add": (x, other, torch.randn(8), 0.3, seed, 1.5),
        "dropout_add_traced": (x, other, torch.randn(8), 0.3, seed),
        "attention": (q, k, v, None, 0.3, off, 0.4, seed, [], []),
        "attention_backward": (
            torch.ones(2, 4, 8),
            q,
            k,
            v,
            None,
            *of_rows,
            0.3,
            off,
            0.4,
            seed,
            "qkv",
            [],
            [],
        ),
        "attention_traced": (q, k, v, None, 0.3, off, 0.4, seed),
        "attention_weights_": (scores, scores.clone(), *place, largest, total),
        "attention_gradient_": (scores, None, scores.clone(), scores.clone(), *place, largest, total),
        "cross_entropy": (x, classes, torch.rand(8), 1, -100, 0.1),
        "cross_entropy_": (x, classes, rows, torch.rand(8), -100, 0.1),
        "cross_entropy_scale_": (x.to(device), torch.tensor(0.5, device=device)),
        "cross_entropy_sharded_sums": (x, classes, torch.rand(8), 0.9, 0.01),
        "cross_entropy_sharded_grad_": (x.clone(), x, classes, None, torch.rand(6, 3), 0.9, 0.01),
        "linear_cross_entropy": (x, torch.randn(6, 8), None, classes, rows, None, "hw", -100, 0.1, off, 0.0),
        "sgd_": (*of_sgd, *numbers_of_sgd, *4 * (off,)),
        "sgd_numbers_": (*of_sgd, tensor_of(numbers_of_sgd), *4 * (off,)),
        "adamw_": (*of_adamw, *numbers_of_adamw, *3 * (off,)),
        "adamw_numbers_": (*of_adamw, tensor_of(numbers_of_adamw), *3 * (off,)),
        "sum_of_squares": ([x, other],),
        "fgsm_step": (x.sigmoid(), other, 0.1, 0.0, 1.0),
        "pgd_step": (x.sigmoid(), other, x.sigmoid(), 0.1, 0.2, 0.0, 1.0),
        "augment": pictures(),
        "augment_backward": (torch.rand(2, 3, 7, 8), *pictures()),
        "augment_draw": draws(),
        "augment_matrices": (one, None, None, one, None, four[:, 1], None, four[:, 1:3], None, 5, 6, 7, 8),
        "augment_gaussian": (one, four[:, 2], 3, 5),
        "augment_words": (seed, torch.arange(3), 48, 2),
        "augment_tones": (
            torch.randint(0, 256, (3, 3, 9, 11), dtype=torch.uint8),
            torch.tensor([7, 9, 13]),
            four[0, :3],
        ),
        "augment_policy": policies(),
        "augment_policy_backward": (torch.rand(2, 3, 9, 11), *policies()),
    }


@check(*operator_arguments())
def opcheck(name):
    torch.library.opcheck(getattr(torch.ops.fastreg, name).default, operator_arguments()[name])


@check()
def every_operator_is_looked_at():
    """Those of losses that are split over ranks need a group, a seed is another at each call, and the example
    is in no wheel.
    """
    there = fr._registry._registered
    others = {"sharded_cross_entropy", "sharded_linear_cross_entropy", "traced_seed"}
    assert set(operator_arguments()) == there - others - {"example"}, there


@check()
def errors_of_python():
    x, y = torch.randn(3, 4), torch.arange(3)
    raises(ValueError, "p must be", fr.dropout, x, 1.5)
    raises(TypeError, "model must be", fr.convert, 3)
    raises(ValueError, "lr must be", fr.optim.SGD, [nn.Parameter(x)], lr=-1.0)
    raises(ValueError, "smoothing", fr.cross_entropy, x, y, smoothing="none")
    raises(ValueError, "patience", fr.EarlyStopping, patience=-1)


@check()
def errors_of_kernels():
    """One class of error, also with a torch that makes every error of a kernel a RuntimeError."""
    dropout, dropout_add = torch.ops.fastreg.dropout.default, torch.ops.fastreg.dropout_add.default
    step = torch.ops.fastreg.fgsm_step.default
    x, seed = torch.randn(3, 4), torch.tensor([1])
    raises(ValueError, "dropout: ", dropout, x, 1.5, seed)
    raises(ValueError, "dropout_add: ", dropout_add, x, torch.randn(2, 2), None, 0.5, seed)
    raises(ValueError, "fgsm_step: ", step, x, torch.randn(2, 2), 0.1, 0.0, 1.0)
    target = torch.tensor([0, 9, 1])
    raises((ValueError, IndexError), "cross_entropy: ", fr.cross_entropy, x, target)


@check()
def a_gpu_draws_the_bits_of_the_cpu():
    if not has_gpu():
        raise Skipped("no GPU")
    x, y = torch.randn(1000), torch.arange(10)
    on_gpu, _ = fr.dropout_with_mask(x.cuda(), 0.3, seed=5)
    assert torch.equal(on_gpu.cpu(), fr.dropout_with_mask(x, 0.3, seed=5)[0])
    logits = x.view(10, 100)
    close(fr.cross_entropy(logits.cuda(), y.cuda()).cpu(), F.cross_entropy(logits, y), 1e-5)


def modules():
    """The compiled modules in use."""
    loaded = (name.removeprefix("fastreg.") for name in sys.modules if name.startswith("fastreg._"))
    return sorted(name for name in loaded if name == "_C" or name.startswith(("_C_", "_autograd_")))


def main() -> int:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    passed, failed, skipped, times = 0, 0, [], {}
    words = [word for word in sys.argv[1:] if not word.startswith("-")]
    wanted = {name: run for name, run in CHECKS.items() if all(word in name for word in words)}
    for name, (function, case) in wanted.items():
        began = time.perf_counter()
        torch.manual_seed(20261129)
        torch._dynamo.reset()
        try:
            if "inductor" in name and compiler is None:
                raise Skipped("no C++ compiler")
            function(*case)
            passed += 1
        except Skipped as reason:
            skipped.append(f"{name}: {reason}")
        except Exception as error:
            failed += 1
            text = " ".join(str(error).split()) or traceback.format_exc().splitlines()[-2].strip()
            print(f"FAILED {name}: {type(error).__name__}: {text[:400]}", flush=True)
        finally:
            fr.unpatch()
        times[name] = time.perf_counter() - began
    if "--times" in sys.argv:
        for name, seconds in sorted(times.items(), key=lambda item: -item[1])[:12]:
            print(f"{seconds:6.1f} s  {name}")
    for reason in skipped:
        print(f"not run: {reason}")
    autograd = "Python" if fr._registry.fast is None else "C++"
    print(f"fastreg {fr.__version__} of {Path(fr.__file__).parent}")
    print(f"| {torch.__version__} | {autograd} | {', '.join(modules())} | {passed}/{passed + failed} |")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
