"""Cross-entropy in autograd and behind torch's doors.

Proven: derivatives of first to third order; what is saved; the same bits for any thread count and instruction
set; each door (compile, checkpoint, autocast, hooks, opcheck).
"""

import contextlib
import hashlib

import pytest
import torch
import torch.nn.functional as F
from cross_entropy_reference import (
    INF,
    TINY,
    UNIT,
    assert_rounded,
    case,
    loss_and_gradient,
    reference,
)
from helpers import on_each_instruction_set, with_seed
from torch.autograd import gradcheck, gradgradcheck
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import fastreg as fr
from fastreg import _cross_entropy

# ---------------------------------------------------------------- derivatives

DERIVATIVE_OPTIONS = [
    dict(),
    dict(reduction="none"),
    dict(reduction="sum", label_smoothing=0.2),
    dict(label_smoothing=0.2, smoothing="others"),
    dict(label_smoothing=1.0, smoothing="others"),
    dict(z_loss=0.3),
    dict(z_loss=0.3, reduction="none", label_smoothing=0.1, weight=True),
    dict(weight=True),
    dict(weight=True, label_smoothing=0.2, reduction="sum"),
    dict(ignore_index=1),
    dict(ignore_index=1, weight=True, label_smoothing=0.2, z_loss=0.1),
    dict(loss_dtype=torch.float64, all_ignored="zero"),
]


def derivative_case(options, shape, soft):
    options = dict(options)
    x, target = case(shape, torch.float64, soft)
    if options.get("weight"):
        options["weight"] = torch.linspace(0.5, 2, shape[1], dtype=torch.float64)
    if soft:
        options.pop("ignore_index", None)
    return x.requires_grad_(), target, options


@pytest.mark.parametrize("options", DERIVATIVE_OPTIONS, ids=str)
@pytest.mark.parametrize("soft", (False, True), ids=("indices", "probabilities"))
# Rows, and rows side by side.
@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 2)], ids=str)
def test_first_and_second_derivatives(options, soft, shape):
    x, target, options = derivative_case(options, shape, soft)
    assert gradcheck(lambda x: fr.cross_entropy(x, target, **options), x)
    assert gradgradcheck(lambda x: fr.cross_entropy(x, target, **options), x)


@pytest.mark.parametrize("options", DERIVATIVE_OPTIONS, ids=str)
@pytest.mark.parametrize("soft", (False, True), ids=("indices", "probabilities"))
def test_third_derivative(options, soft):
    x, target, options = derivative_case(options, (4, 3), soft)
    v = torch.randn(2, *x.shape, dtype=torch.float64)

    def third(f):
        (a,) = torch.autograd.grad(f(x, target, **options).sum(), x, create_graph=True)
        (b,) = torch.autograd.grad((a * v[0]).sum(), x, create_graph=True)
        return torch.autograd.grad((b * v[1]).sum(), x)[0]

    for name in ("loss_dtype", "all_ignored"):
        options.pop(name, None)
    torch.testing.assert_close(third(fr.cross_entropy), third(reference), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("narrow", (torch.float32, torch.float16, torch.bfloat16), ids=str)
def test_second_derivative_in_every_dtype(narrow):
    x, target = case((6, 10), narrow)
    v = torch.randn(6, 10).to(narrow)

    def second(f, x, v):
        x = x.detach().clone().requires_grad_()
        (a,) = torch.autograd.grad(f(x, target, label_smoothing=0.1), x, create_graph=True)
        return torch.autograd.grad((a * v).sum(), x)[0]

    got, want = second(fr.cross_entropy, x, v), second(reference, x.double(), v.double())
    assert got.dtype == narrow
    torch.testing.assert_close(
        got.double(), want, rtol=4 * UNIT[narrow], atol=8 * UNIT[narrow] * want.abs().max().item()
    )


@pytest.mark.parametrize("scale", (0.3, -2.0, 1024.0), ids=str)
@pytest.mark.parametrize("reduction", ("none", "mean", "sum"))
def test_incoming_gradients_other_than_one(scale, reduction, dtype):
    x, target = case((8, 12), dtype)
    x.requires_grad_()
    (
        fr.cross_entropy(
            x,
            target,
            reduction=reduction,
            loss_dtype=torch.float64 if dtype == torch.float64 else torch.float32,
        )
        * scale
    ).sum().backward()
    want = loss_and_gradient(reference, x.double(), target, torch.tensor(1.0), reduction="sum")[1]
    want = want * scale / (8 if reduction == "mean" else 1)
    room = (
        3.1 * UNIT[dtype] * want.abs()
        + TINY[dtype]
        + (6e-7 if dtype != torch.float64 else 1e-15) * abs(scale)
    )
    assert ((x.grad.double() - want).abs() <= room).all()


def test_a_gradient_of_its_own_for_each_element():
    x, target = case((8, 12), torch.float64)
    g = torch.randn(8, dtype=torch.float64)
    got = loss_and_gradient(fr.cross_entropy, x, target, g, reduction="none")[1]
    torch.testing.assert_close(
        got, loss_and_gradient(reference, x, target, g, reduction="none")[1], rtol=1e-12, atol=1e-15
    )
    x, target = case((3, 5, 4), torch.float64)
    g = torch.randn(3, 4, dtype=torch.float64)
    got = loss_and_gradient(fr.cross_entropy, x, target, g, reduction="none")[1]
    torch.testing.assert_close(
        got, loss_and_gradient(reference, x, target, g, reduction="none")[1], rtol=1e-12, atol=1e-15
    )


def test_float16_gradients_survive_a_loss_scale():
    """Most softmax values of 30,000 rows' mean are below float16's least number; scaled by 65536 they are
    not.
    """
    x, target = case((3000, 50), torch.float16)
    x.requires_grad_()
    (fr.cross_entropy(x, target, loss_dtype=torch.float32) * 65536).backward()
    want = loss_and_gradient(reference, x.double(), target)[1] * 65536
    naive = (want / 65536).half().double() * 65536
    assert (naive == 0).float().mean() > 0.1  # what a gradient stored in float16 before scaling would lose
    assert ((x.grad.double() - want).abs() <= 2.0**-11 * want.abs() * 1.01 + 2.0**-25 + 1e-6 * 22).all()
    small = want.abs() < 2e-3
    assert ((x.grad.double() - want)[small].abs() <= 2.0**-11 * 2e-3 + 1e-6).all() and (
        x.grad[want.abs() > 1e-6] != 0
    ).all()


@pytest.mark.parametrize("leaf", (True, False), ids=("leaf", "non-leaf"))
@pytest.mark.parametrize("reduction", ("mean", "sum"))
def test_two_backward_calls_and_accumulation(leaf, reduction, dtype):
    """backward() hands out the saved gradient itself where it may; nothing that happens to .grad may reach
    it.
    """
    x, target = case((6, 10), dtype)
    want = loss_and_gradient(fr.cross_entropy, x, target, reduction=reduction)[1]
    base = x.clone().requires_grad_()
    inner = base if leaf else base * 1
    inner.retain_grad()
    loss = fr.cross_entropy(inner, target, reduction=reduction)
    loss.backward(retain_graph=True)
    assert torch.equal(inner.grad, want)
    inner.grad.mul_(1000)  # as a clipper or an optimiser would
    base.grad = inner.grad = None
    loss.backward(retain_graph=True)
    assert torch.equal(inner.grad, want)
    loss.backward()
    torch.testing.assert_close(inner.grad, want * 2, rtol=0, atol=0)
    base.grad.zero_()
    fr.cross_entropy(base, target, reduction=reduction).backward()
    assert torch.equal(base.grad, want)
    with pytest.raises(RuntimeError, match=r"second time|freed"):
        loss.backward()


def test_one_loss_used_twice_and_two_losses_of_one_input():
    x, target = case((6, 10), torch.float64)
    x.requires_grad_()
    loss = fr.cross_entropy(x, target)
    (loss + 2 * loss + fr.cross_entropy(x, target, label_smoothing=0.1)).backward()
    want = (
        3 * loss_and_gradient(reference, x, target)[1]
        + loss_and_gradient(reference, x, target, label_smoothing=0.1)[1]
    )
    torch.testing.assert_close(x.grad, want, rtol=1e-12, atol=1e-15)


def test_gradient_towards_probabilities():
    x, soft = case((4, 3), torch.float64, soft=True)
    x.requires_grad_(), soft.requires_grad_()
    for options in (
        dict(),
        dict(label_smoothing=0.2),
        dict(smoothing="others", label_smoothing=0.2, reduction="sum"),
        dict(z_loss=0.1, reduction="none", weight=torch.rand(3, dtype=torch.float64)),
    ):
        assert gradcheck(lambda x, t, o=options: fr.cross_entropy(x, t, **o), (x, soft))
        assert_rounded(fr.cross_entropy(x, soft, **options).detach(), reference(x, soft, **options).detach())


def test_gradient_towards_probabilities_that_are_zero():
    """-log p of every class, also of those that have no mass yet; torch agrees where no logit is infinite."""
    x = torch.tensor([[1.0, 2.0, 0.5], [0.0, 1.0, -INF]])
    one_hot = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]], requires_grad=True)
    loss = fr.cross_entropy(x, one_hot, reduction="sum")
    (grad,) = torch.autograd.grad(loss, one_hot)
    torch.testing.assert_close(grad[0], -x[0].log_softmax(0))
    assert loss.isfinite() and grad.isfinite().all()


def test_gradient_towards_probabilities_of_no_row_at_all():
    soft = torch.rand(0, 3, requires_grad=True)
    assert fr.cross_entropy(torch.randn(0, 3), soft, all_ignored="zero") == 0
    assert fr.cross_entropy(torch.randn(0, 3), soft).isnan()


# ---------------------------------------------------------------- memory and bits


# What divides a sum by the number of its rows, or each row's losses by theirs, where there are none.
DIVIDED = {
    "sum": lambda f, x, t: f(x, t, reduction="sum") / (t != -100).sum(),
    "sum of some": lambda f, x, t: f(x, t, reduction="sum") / 0,
    "NaN": lambda f, x, t: f(x, t) * torch.nan,
    "each sequence": lambda f, x, t: (f(x, t, reduction="none").sum(1) / (t != -100).sum(1)).sum(),
}


@pytest.mark.parametrize("path", ("C++", "Python", "kept graph", "graph of the gradient", "compiled"))
@pytest.mark.parametrize("divided", DIVIDED)
def test_ignored_rows_get_nothing_of_inf_and_nan(divided, path, dtype, monkeypatch):
    x = torch.randn(3, 7, 5).to(dtype)
    for ignored in ((slice(None),), (1,), (slice(None), slice(0, 2))):
        target = torch.randint(7, (3, 5))
        target[ignored] = -100
        grads = []
        for f in (fr.cross_entropy, F.cross_entropy):
            if path == "Python":
                monkeypatch.setattr(_cross_entropy, "fast", None)
            if path == "compiled":
                f = torch.compile(f, backend="aot_eager")
            y = x.clone().requires_grad_()
            more = dict(retain_graph=path == "kept graph", create_graph=path == "graph of the gradient")
            grads += torch.autograd.grad(DIVIDED[divided](f, y, target), y, **more)
        ours, theirs = grads
        counted = (target != -100).unsqueeze(1).expand_as(x)
        assert (ours[~counted] == 0).all() and (theirs[~counted] == 0).all()
        assert torch.equal(ours.isfinite(), theirs.isfinite())


@pytest.mark.parametrize("factor", (1.0, 0.375, 1e-30, -2.0, 0.0))
def test_a_factor_has_the_same_bits_in_place(factor, dtype):
    x, target = case((6, 10), dtype)
    x.requires_grad_()
    kept, taken = (
        torch.autograd.grad(fr.cross_entropy(x, target) * factor, x, retain_graph=keep)[0]
        for keep in (True, False)
    )
    assert torch.equal(kept, taken)


def saved_bytes(f, x):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        loss = f(x)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    return sum(storages.values()), loss


def test_one_tensor_like_the_logits_is_saved(dtype):
    n, k = 64, 1000
    x, target = case((n, k), dtype)
    x.requires_grad_()
    total, _ = saved_bytes(lambda x: fr.cross_entropy(x, target), x)
    size = 4 if dtype == torch.float16 else x.element_size()
    assert n * k * size <= total <= n * k * size + n * 8 * 2 + 64


def test_saved_tensor_hooks():
    x, target = case((6, 10), torch.float32)
    want = loss_and_gradient(fr.cross_entropy, x, target)[1]
    with torch.autograd.graph.save_on_cpu():
        assert torch.equal(loss_and_gradient(fr.cross_entropy, x, target)[1], want)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()):
        assert torch.equal(loss_and_gradient(fr.cross_entropy, x, target)[1], want)


@pytest.mark.parametrize("reentrant", (True, False))
def test_checkpoint(reentrant):
    x, target = case((6, 10), torch.float32)
    want = loss_and_gradient(fr.cross_entropy, x, target)[1]
    x.requires_grad_()
    checkpoint(lambda y: fr.cross_entropy(y * 1, target), x, use_reentrant=reentrant).backward()
    assert torch.equal(x.grad, want)


def test_without_gradients():
    x, target = case((6, 10), torch.float32)
    x.requires_grad_()
    want = fr.cross_entropy(x, target)
    assert want.requires_grad
    with torch.no_grad():
        assert (
            torch.equal(fr.cross_entropy(x, target), want) and not fr.cross_entropy(x, target).requires_grad
        )
    with torch.inference_mode():
        assert torch.equal(fr.cross_entropy(x, target), want)
        inside = fr.cross_entropy(x.clone(), target.clone())
    assert inside.is_inference() and torch.equal(inside, want)
    assert not fr.cross_entropy(x.detach(), target).requires_grad


def test_autocast_gives_float32():
    x, target = case((6, 10), torch.bfloat16)
    x.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = fr.cross_entropy(x, target)
        assert fr.cross_entropy(x, target, loss_dtype=torch.bfloat16).dtype == torch.bfloat16
        assert fr.cross_entropy(x.double(), target).dtype == torch.float64
    assert loss.dtype == torch.float32
    assert_rounded(loss.detach(), reference(x.detach(), target))
    loss.backward()
    assert x.grad.dtype == torch.bfloat16


def test_anomaly_mode_and_hooks():
    x, target = case((6, 10), torch.float32)
    x.requires_grad_()
    seen = []
    x.register_hook(lambda g: seen.append(g.clone()) or g * 2)
    with torch.autograd.detect_anomaly(check_nan=True):
        fr.cross_entropy(x, target).backward()
    assert torch.equal(x.grad, 2 * seen[0])


SCRIPT = """
import hashlib, sys, torch, fastreg as fr

kept = []
for threads in (1, 2, 5):
    torch.set_num_threads(1)  # torch's own softmax depends on the number of threads
    torch.manual_seed(0)
    one = hashlib.sha256()
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        # Many rows, rows side by side that are many, rows of several blocks of 1024, and more dimensions.
        for shape in ((700, 37), (3, 10, 501), (40, 3000), (4, 5, 6, 7)):
            x = (torch.randn(shape) * 5).to(dtype)
            x.view(-1)[::97] = -float("inf")
            t = torch.randint(shape[1], shape[:1] + shape[2:])
            soft = torch.rand(shape).softmax(1).to(dtype)
            w = torch.rand(shape[1])
            torch.set_num_threads(threads)
            for target, options in ((t, {}), (t, dict(weight=w, z_loss=0.1)), (soft, dict(reduction="sum")),
                                    (t, dict(reduction="none", label_smoothing=0.0, ignore_index=1))):
                y = x.clone().requires_grad_()
                loss = fr.cross_entropy(y, target, **options)
                (grad,) = torch.autograd.grad(loss.sum(), y)
                for tensor in (loss.detach(), grad):
                    one.update(tensor.nan_to_num(nan=77.0).reshape(-1).view(torch.uint8).numpy().tobytes())
                    if threads == 1:
                        kept.append(tensor)
            torch.set_num_threads(1)
    print(fr._C.build_info()["instruction_set"], one.hexdigest())
torch.save(kept, sys.argv[1])
"""


def test_the_same_bits_for_any_thread_count_and_for_every_instruction_set_that_fuses(tmp_path):
    """x86-64's baseline lacks the fused multiply-add: there the last bits differ."""
    digests, values = {}, {}
    for isa, printed in on_each_instruction_set(SCRIPT, lambda isa: tmp_path / isa).items():
        lines = [line.split() for line in printed.splitlines()]
        assert [name for name, _ in lines] == [isa] * 3 and len({digest for _, digest in lines}) == 1, lines
        digests[isa], values[isa] = lines[0][1], torch.load(tmp_path / isa)
    assert len({digest for isa, digest in digests.items() if isa != "sse2"}) <= 1, digests
    assert hashlib.sha256(b"").hexdigest() not in digests.values()
    first, *others = values.values()
    for other in others:
        for a, b in zip(first, other, strict=True):
            rtol = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[
                a.dtype
            ]
            torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * 1e-1, equal_nan=True)


# ---------------------------------------------------------------- torch.compile and the operator itself


def compiled_function(x, target, weight):
    y = x * 2
    return (
        fr.cross_entropy(y, target, weight, label_smoothing=0.1)
        + 0.5 * fr.cross_entropy(y, target, reduction="none").sum()
    )


@pytest.mark.parametrize("narrow", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_compile(narrow):
    torch._dynamo.reset()
    compiled = torch.compile(compiled_function, fullgraph=True, backend="aot_eager", dynamic=True)
    # Other numbers of rows and of classes, which dynamic shapes take.
    for shape in ((6, 10), (9, 10), (5, 12)):
        x, target = case(shape, narrow)
        weight = torch.rand(shape[1])
        want = loss_and_gradient(compiled_function, x, target, weight=weight)
        got = loss_and_gradient(compiled, x, target, weight=weight)
        torch.testing.assert_close(got, want, rtol=4 * UNIT[narrow], atol=1e-5)


def test_compile_every_option():
    torch._dynamo.reset()
    x, target = case((2, 3, 4, 5), torch.float32)
    soft = torch.rand(2, 3, 4, 5).softmax(1)
    for t, options in (
        (target, dict(z_loss=0.1, ignore_index=1, all_ignored="zero")),
        (target, dict(label_smoothing=0.1, smoothing="others", reduction="none")),
        (soft, dict(reduction="sum", loss_dtype=torch.float64)),
        (target.int(), dict(weight=torch.rand(3))),
    ):
        compiled = torch.compile(
            lambda x, t, o=options: fr.cross_entropy(x, t, **o), fullgraph=True, backend="aot_eager"
        )
        torch.testing.assert_close(
            loss_and_gradient(compiled, x, t), loss_and_gradient(fr.cross_entropy, x, t, **options)
        )


@pytest.mark.slow
def test_compile_inductor():
    torch._dynamo.reset()
    compiled = torch.compile(compiled_function, fullgraph=True)
    x, target = case((6, 10), torch.float32)
    weight = torch.rand(10)
    want = loss_and_gradient(compiled_function, x, target, weight=weight)
    for _ in range(2):
        torch.testing.assert_close(loss_and_gradient(compiled, x, target, weight=weight), want)
    with pytest.raises(ValueError, match="target must be in"):
        compiled(x, target + 10, weight)


@pytest.mark.parametrize("with_grad", (False, True))
def test_opcheck(with_grad, dtype):
    for shape, soft, weight, reduction in (
        ((6, 10), False, True, 1),
        ((3, 5, 4), True, False, 0),
        ((3, 5, 4), False, False, 0),
        ((0, 5), False, False, 2),
    ):
        x, target = case(shape, dtype, soft)
        w = (
            torch.rand(shape[1], dtype=torch.float64 if dtype == torch.float64 else torch.float32)
            if weight
            else None
        )
        for layout in (x, x.transpose(0, 1).contiguous().transpose(0, 1)):
            torch.library.opcheck(
                torch.ops.fastreg.cross_entropy.default,
                (
                    layout,
                    target,
                    w,
                    reduction,
                    -100,
                    0.1,
                    False,
                    0.1,
                    False,
                    torch.float32 if soft else None,
                    with_grad,
                ),
            )


@pytest.mark.parametrize("retain_graph", [False, True])
def test_a_float32_loss_scales_bfloat16_gradients_in_float32(retain_graph):
    """0.3 is 0.30078 in bfloat16: the whole gradient would be 2.6e-3 too large."""
    x = torch.randn(40, 50).bfloat16().requires_grad_()
    target = torch.randint(50, (40,))
    loss = fr.cross_entropy(x, target, reduction="sum", loss_dtype=torch.float32)
    loss.backward(torch.tensor(0.3), retain_graph=retain_graph)
    wide = x.detach().double().requires_grad_()
    (0.3 * torch.nn.functional.cross_entropy(wide, target, reduction="sum")).backward()
    bias = (x.grad.double() * wide.grad).sum() / wide.grad.square().sum()
    assert abs(bias - 1) < 1e-3


@pytest.mark.parametrize("path", ["cpp", "python"])
def test_a_gradient_for_the_loss_and_for_its_gradient_together(path, monkeypatch):
    if path == "python":
        monkeypatch.setattr(_cross_entropy, "fast", None)
    results = []
    for function in (fr.cross_entropy, torch.nn.functional.cross_entropy):
        x = torch.linspace(-2, 3, 35, dtype=torch.float64).view(5, 7).requires_grad_()
        loss = function(x, torch.tensor([0, 6, 2, 1, 3]), label_smoothing=0.1)
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        (0.5 * loss + gradient.square().sum()).backward()
        results.append(x.grad)
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("tracing", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("door", ["by name", "patch"])
def test_make_fx_records_a_training_step(door, tracing):
    """Its factor cannot be looked at while it is recorded. The masks are drawn when the graph runs."""

    def step(x, weight, y):
        drop, loss = (fr.dropout, fr.cross_entropy) if door == "by name" else (F.dropout, F.cross_entropy)
        weight = weight.detach().requires_grad_()
        value = loss(drop(x @ weight, 0.5), y, label_smoothing=0.1)
        return torch.autograd.grad(value, weight)[0]

    arguments = torch.randn(6, 8), torch.randn(8, 4), torch.arange(6) % 4
    with fr.patched() if door == "patch" else contextlib.nullcontext():
        traced = make_fx(step, tracing_mode=tracing)(*arguments)
        wanted = [with_seed(seed, step, *arguments) for seed in (1, 2)]
    for seed, want in zip((1, 2), wanted, strict=True):
        if door == "by name" or tracing == "real":  # fake tensors are torch's, and so is their dropout
            torch.testing.assert_close(with_seed(seed, traced, *arguments), want)
    assert not torch.equal(*(with_seed(seed, traced, *arguments) for seed in (1, 2)))
