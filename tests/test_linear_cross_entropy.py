"""Linear cross-entropy against a linear layer and the written formula in float64.

Proven: value and gradients for every dtype, option and shape, whatever the chunk; that no more than a tenth
of the logits is ever held; float16 gradients below its range; derivatives of second order; each door
(compile, checkpoint, autocast, opcheck); that wrong arguments are errors and leave their inputs untouched.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fastreg as fr
from fastreg import _linear_cross_entropy as module

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def reference(hidden, weight, target, bias=None, class_weight=None, **options):
    """In float64, all logits at once; torch's cross-entropy, and the extras written out."""
    smoothing, z_loss = options.pop("smoothing", "uniform"), options.pop("z_loss", 0.0)
    z = F.linear(hidden, weight, bias).reshape(-1, len(weight))
    k, soft = z.shape[1], target.is_floating_point()
    target = target.reshape(-1, k).double() if soft else target.reshape(-1)
    ignored = torch.zeros(len(z), dtype=torch.bool) if soft else target == options.get("ignore_index", -100)
    w = torch.ones(k, dtype=torch.float64) if class_weight is None else class_weight.double()
    t = target if soft else F.one_hot(target.where(~ignored, 0), k).double()
    eps = options.get("label_smoothing", 0.0)
    q = w * ((1 - eps) * t + eps * (1 / k if smoothing == "uniform" else (1 - t) / (k - 1)))
    lse = z.logsumexp(1)
    losses = ((q * (lse.unsqueeze(1) - z)).sum(1) + z_loss * lse**2).where(~ignored, 0)
    if options.get("reduction", "mean") == "none":
        return losses.view(hidden.shape[:-1])
    if options.get("reduction", "mean") == "sum":
        return losses.sum()
    return losses.sum() / (
        len(z) if soft or (class_weight is None and not ignored.any()) else (t * w).sum(1)[~ignored].sum()
    )


def case(shape=(37,), width=24, classes=19, dtype=torch.float32, bias=True, soft=False, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*shape, width, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    weight = (torch.randn(classes, width, generator=g, dtype=torch.float64) * 0.3).to(dtype).requires_grad_()
    b = torch.randn(classes, generator=g, dtype=torch.float64).to(dtype).requires_grad_() if bias else None
    if soft:
        return (
            hidden,
            weight,
            torch.rand(*shape, classes, generator=g, dtype=torch.float64).softmax(-1).to(dtype),
            b,
        )
    return hidden, weight, torch.randint(classes, shape, generator=g), b


def assert_matches(hidden, weight, target, bias, **options):
    inputs = [x for x in (hidden, weight, bias) if x is not None]
    wide = [None if x is None else x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    got = fr.linear_cross_entropy(hidden, weight, target, bias, **options)
    want = reference(*wide[:2], target, wide[2], **{k: v for k, v in options.items() if k != "loss_dtype"})
    tolerance = TOLERANCE[hidden.dtype]
    assert got.shape == want.shape and got.dtype == options.get("loss_dtype", hidden.dtype)
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)
    g = torch.rand(want.shape, dtype=torch.float64) + 0.5
    grads = torch.autograd.grad(got, inputs, g.to(got.dtype))
    for x, a, b in zip(
        inputs, grads, torch.autograd.grad(want, [w for w in wide if w is not None], g), strict=True
    ):
        assert a.dtype == x.dtype and a.shape == x.shape
        # An element's error goes with the sizes of the terms that were added up to it, not with their sum.
        torch.testing.assert_close(
            a.double(), b, rtol=0, atol=tolerance * (b.abs().max().item() if b.numel() else 0)
        )


@pytest.fixture(params=[1, 5, 1000], ids=lambda rows: f"chunks of {rows}")
def chunk(request, monkeypatch):
    """Chunks of one row, of a number that divides nothing, of all rows."""
    monkeypatch.setattr(module, "_chunk_rows", lambda hidden, classes: min(request.param, len(hidden)))


# --------------------------------------------------------------------------------------------------
# values, gradients
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_value_and_gradients(dtype, reduction, bias, chunk):
    assert_matches(
        *case(dtype=dtype, bias=bias), reduction=reduction, label_smoothing=0.1, loss_dtype=max_dtype(dtype)
    )


def max_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


@pytest.mark.parametrize(
    ("smoothing", "z_loss", "weighted", "soft"),
    list(itertools.product(("uniform", "others"), (0.0, 0.05), (False, True), (False, True))),
)
def test_options(smoothing, z_loss, weighted, soft, chunk):
    hidden, weight, target, bias = case((5, 7), dtype=torch.float64, soft=soft)
    options = dict(smoothing=smoothing, z_loss=z_loss, label_smoothing=0.2)
    if weighted:
        options["class_weight"] = torch.rand(19, dtype=torch.float64) + 0.5
    if not soft:
        target[0, :3] = options["ignore_index"] = -7
    for reduction in ("mean", "sum", "none"):
        assert_matches(hidden, weight, target, bias, reduction=reduction, **options)


# Of the rows: no dimension, one row, several dimensions with and without a side of 1, and no row.
@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (2, 1, 3, 2), (0,), (3, 0)])
def test_shapes(shape, dtype):
    hidden, weight, target, bias = case(shape, dtype=dtype)
    assert_matches(hidden, weight, target, bias, reduction="none")
    assert_matches(hidden, weight, target, bias, reduction="sum")


def test_strided_inputs():
    hidden, weight, target, _ = case((12, 4), dtype=torch.float64, bias=False)
    assert_matches(hidden.detach().transpose(0, 1).requires_grad_(), weight, target.t(), None)
    wide = torch.randn(24, 19, dtype=torch.float64).t().requires_grad_()
    assert_matches(hidden, wide, target, None)
    assert_matches(
        hidden.detach()[..., ::2].requires_grad_(), weight.detach()[:, 1::2].requires_grad_(), target, None
    )


def test_no_row_counted():
    hidden, weight, target, bias = case(dtype=torch.float64)
    target.fill_(-100)
    assert fr.linear_cross_entropy(hidden, weight, target, bias).isnan()
    zero = fr.linear_cross_entropy(hidden, weight, target, bias, all_ignored="zero")
    assert zero == 0 and not any(g.any() for g in torch.autograd.grad(zero, (hidden, weight, bias)))
    divided = fr.linear_cross_entropy(hidden, weight, target, bias, reduction="sum") / 0
    assert divided.isnan() and not any(g.any() for g in torch.autograd.grad(divided, (hidden, weight, bias)))
    hidden, weight, target, bias = case((0,), dtype=torch.float64)
    assert fr.linear_cross_entropy(hidden, weight, target, bias).isnan()
    assert fr.linear_cross_entropy(hidden, weight, target, bias, all_ignored="zero") == 0


def test_only_the_gradients_that_are_wanted():
    hidden, weight, target, bias = case(dtype=torch.float64)
    full = torch.autograd.grad(fr.linear_cross_entropy(hidden, weight, target, bias), (hidden, weight, bias))
    for i, x in enumerate((hidden, weight, bias)):
        inputs = [y.detach().requires_grad_(i == j) for j, y in enumerate((hidden, weight, bias))]
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: saved.append(t.numel()) or t, lambda t: t
        ):
            loss = fr.linear_cross_entropy(inputs[0], inputs[1], target, inputs[2])
        torch.testing.assert_close(torch.autograd.grad(loss, inputs[i])[0], full[i], rtol=1e-12, atol=1e-14)
        known = [hidden.numel(), weight.numel(), bias.numel(), len(target), len(target)]
        assert sum(saved) == sum(known) + x.numel()  # the inputs, which live anyway, and one gradient
    assert not fr.linear_cross_entropy(hidden.detach(), weight.detach(), target).requires_grad
    with torch.no_grad():
        assert not fr.linear_cross_entropy(hidden, weight, target, bias).requires_grad


def test_inputs_are_left_alone_and_backward_repeats():
    hidden, weight, target, bias = case()
    before = [x.detach().clone() for x in (hidden, weight, target, bias)]
    loss = fr.linear_cross_entropy(hidden, weight, target, bias)
    first = torch.autograd.grad(loss, (hidden, weight, bias), retain_graph=True)
    for g in first:
        g.mul_(3)  # the caller's own
    second = torch.autograd.grad(loss, (hidden, weight, bias))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, 3 * b)
    assert all(torch.equal(a, b) for a, b in zip(before, (hidden, weight, target, bias), strict=True))


def test_float16_gradients_below_its_range_survive_a_loss_scale():
    hidden, weight, target, _ = case((64, 50), width=8, classes=300, dtype=torch.float16, bias=False)
    scale = 2.0**14
    loss = fr.linear_cross_entropy(hidden, weight, target, loss_dtype=torch.float32)
    got = torch.autograd.grad(loss * scale, (hidden, weight))
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    want = torch.autograd.grad(reference(*wide, target) * scale, wide)
    assert (want[0] / scale).abs().median() < 2**-13  # or the test would show nothing
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=3e-3 * b.abs().max().item())


def test_bfloat16_sums_of_many_chunks(monkeypatch):
    """Ten thousand rows of a narrow layer in 400 chunks, each too small to count beside the bfloat16 sum."""
    hidden, weight, target, _ = case((10000,), width=16, classes=40, dtype=torch.bfloat16, bias=False)
    with torch.no_grad():
        hidden += 3  # a sum that grows steadily
    logits = F.linear(hidden, weight).detach().double().requires_grad_()  # rounded, as a layer rounds them
    d_logits = torch.autograd.grad(F.cross_entropy(logits, target, reduction="sum"), logits)[0]
    want = d_logits.t() @ hidden.detach().double()
    monkeypatch.setattr(module, "_chunk_rows", lambda hidden, classes: 25)

    def error():
        got = torch.autograd.grad(fr.linear_cross_entropy(hidden, weight, target, reduction="sum"), weight)[0]
        return ((got.double() - want).norm() / want.norm()).item()

    assert error() < 0.003
    monkeypatch.setattr(module, "_sums_are_wide", lambda hidden: False)
    assert error() > 0.01


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck_of_both_orders(reduction):
    hidden, weight, target, bias = case((5,), width=3, classes=4, dtype=torch.float64)
    target[0] = -100

    def f(hidden, weight, bias):
        options = dict(label_smoothing=0.1, z_loss=0.01, class_weight=torch.tensor([1.0, 2.0, 0.5, 1.0]))
        return fr.linear_cross_entropy(hidden, weight, target, bias, reduction=reduction, **options)

    assert gradcheck(f, (hidden, weight, bias))
    assert gradgradcheck(f, (hidden, weight, bias))


# --------------------------------------------------------------------------------------------------
# memory
class Largest(TorchDispatchMode):
    """Most bytes alive at once among the tensors that operations make while it is on."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.alive[storage.data_ptr()] = (
                    torch.multiprocessing.reductions.StorageWeakRef(storage),
                    storage.nbytes(),
                )
        self.alive = {key: value for key, value in self.alive.items() if not value[0].expired()}
        self.peak = max(self.peak, sum(nbytes for _, nbytes in self.alive.values()))
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_never_more_than_a_tenth_of_the_logits(dtype):
    rows, width, classes = 600, 40, 3000
    hidden, weight, target, _ = case((rows,), width=width, classes=classes, dtype=dtype, bias=False)

    def peak(f):
        with Largest() as mode:
            grads = torch.autograd.grad(f(), (hidden, weight))
            outputs = sum(g.numel() * g.element_size() for g in grads)
        return (mode.peak - outputs) / (rows * classes * hidden.element_size())

    assert peak(lambda: fr.linear_cross_entropy(hidden, weight, target, label_smoothing=0.1)) <= 0.1
    assert (
        peak(lambda: F.cross_entropy(F.linear(hidden, weight), target, label_smoothing=0.1)) > 1
    )  # what the test can see


def test_chunks():
    for rows, width, classes, dtype in (
        (2048, 512, 32000, torch.float32),
        (2048, 512, 32000, torch.bfloat16),
        (10**6, 4096, 128_000, torch.bfloat16),
        (600, 40, 3000, torch.float32),
    ):
        chunk = module._chunk_rows(torch.empty(rows, width, dtype=dtype, device="meta"), classes)
        assert chunk * 10 <= rows and chunk * classes * dtype.itemsize <= 2**26 + classes * dtype.itemsize
    few = torch.empty(
        8192, 4096, dtype=torch.bfloat16, device="meta"
    )  # the sum is in bfloat16: few chunks, however large
    assert 8192 / module._chunk_rows(few, 128_000) <= 13
    for rows, expected in ((0, 0), (7, 7), (100, 32), (640, 32), (700, 64), (2048, 192)):
        assert module._chunk_rows(torch.empty(rows, 3), 5) == expected


# --------------------------------------------------------------------------------------------------
# doors
def test_opcheck():
    hidden, weight, target, bias = case((9,), width=4, classes=5)
    factor = torch.rand(9)
    for wants in ("", "hwb", "w"):
        arguments = (
            hidden.detach(),
            weight.detach(),
            bias.detach(),
            target,
            factor,
            None,
            wants,
            -100,
            0.1,
            False,
            0.0,
        )
        torch.library.opcheck(torch.ops.fastreg.linear_cross_entropy.default, arguments)
    torch.library.opcheck(
        torch.ops.fastreg.cross_entropy_.default,
        (torch.randn(9, 5), target, factor, torch.rand(5), -100, 0.1),
    )


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(reduction, dynamic):
    def f(hidden, weight, target, bias):
        return fr.linear_cross_entropy(
            hidden * 2, weight, target, bias, reduction=reduction, label_smoothing=0.1
        ).sum()

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (37, 50):
        hidden, weight, target, bias = case((rows,))
        for a, b in zip(
            torch.autograd.grad(compiled(hidden, weight, target, bias), (hidden, weight, bias)),
            torch.autograd.grad(f(hidden, weight, target, bias), (hidden, weight, bias)),
            strict=True,
        ):
            torch.testing.assert_close(a, b)


def test_autocast_is_that_of_the_two_functions():
    hidden, weight, target, bias = case((50,))
    with torch.autocast("cpu", torch.bfloat16):
        got = fr.linear_cross_entropy(hidden, weight, target, bias)
        want = fr.cross_entropy(F.linear(hidden, weight, bias), target)
    assert got.dtype == want.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    for a, b in zip(
        torch.autograd.grad(got, (hidden, weight, bias)),
        torch.autograd.grad(want, (hidden, weight, bias)),
        strict=True,
    ):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0, atol=2e-2 * b.abs().max().item())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(use_reentrant):
    hidden, weight, target, bias = case()
    plain = fr.linear_cross_entropy(hidden, weight, target, bias)
    again = checkpoint(fr.linear_cross_entropy, hidden, weight, target, bias, use_reentrant=use_reentrant)
    for a, b in zip(
        torch.autograd.grad(plain, (hidden, weight, bias)),
        again.backward() or (hidden.grad, weight.grad, bias.grad),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_inference_mode():
    hidden, weight, target, bias = case()
    with torch.inference_mode():
        inside = fr.linear_cross_entropy(hidden, weight, target, bias)
    assert torch.equal(inside.clone(), fr.linear_cross_entropy(hidden, weight, target, bias).detach())


# --------------------------------------------------------------------------------------------------
# errors
def test_errors_name_the_op_and_the_remedy():
    hidden, weight, target, bias = (None if x is None else x.detach() for x in case())
    f = fr.linear_cross_entropy

    cases = [
        (lambda: f(hidden, weight[:, 1:], target), ValueError, "weight must be"),
        (lambda: f(hidden, weight[0], target), ValueError, "weight must be"),
        (lambda: f(hidden, weight, target, bias[1:]), ValueError, "bias must have"),
        (lambda: f(hidden, weight.double(), target), ValueError, "convert it with .to"),
        (lambda: f(hidden, weight, target, bias.double()), ValueError, "bias must be torch.float32"),
        (lambda: f(hidden.long(), weight.long(), target), ValueError, "hidden must be float32"),
        (lambda: f(hidden, weight, target[1:]), ValueError, "target must have shape"),
        (lambda: f(hidden, weight, target + 19), ValueError, "target must be in"),
        (lambda: f(hidden, weight, target - 1), ValueError, "target must be in"),
        (lambda: f(hidden, weight, target == 0), TypeError, "class indices"),
        (lambda: f(hidden, weight, target, label_smoothing=1.5), ValueError, "label_smoothing"),
        (lambda: f(hidden, weight, target, label_smoothing=float("nan")), ValueError, "label_smoothing"),
        (lambda: f(hidden, weight, target, reduction="avg"), ValueError, "reduction"),
        (lambda: f(hidden, weight, target, class_weight=torch.ones(3)), ValueError, "class_weight must have"),
        (
            lambda: f(hidden, weight, target, class_weight=torch.ones(19, requires_grad=True)),
            ValueError,
            "class_weight must not",
        ),
        (lambda: f(hidden, weight, target, loss_dtype=torch.int32), ValueError, "loss_dtype"),
        (lambda: f(hidden, weight, torch.rand(37, 19), ignore_index=3), ValueError, "ignore_index"),
        (lambda: f(hidden, [1], target), TypeError, "weight must be a torch.Tensor"),
        (lambda: f(torch.tensor(1.0), weight, target), ValueError, "weight must be"),
        (lambda: f(hidden, weight[:0], target), ValueError, "at least one class"),
    ]
    for call, error, words in cases:
        with pytest.raises(error, match=words) as caught:
            call()
        assert str(caught.value).startswith("linear_cross_entropy: ") or "cross_entropy_: target" in str(
            caught.value
        )


def test_the_raw_op_checks_for_itself():
    op, target, factor = torch.ops.fastreg.cross_entropy_.default, torch.tensor([0, 1]), torch.ones(2)
    for arguments, words in (
        ((torch.zeros(2, 3).t(), torch.tensor([0, 1, 0]), torch.ones(3)), "contiguous"),
        ((torch.zeros(2, 3, 1), target, factor), "contiguous"),
        ((torch.zeros(2, 3), target, torch.ones(1)), "factor"),
        ((torch.zeros(2, 3), target, factor.double()), "factor"),
        ((torch.zeros(2, 3), torch.tensor([0, 3]), factor), "target must be in"),
    ):
        before = arguments[0].clone()
        with pytest.raises(ValueError, match=words):
            op(*arguments)
        assert torch.equal(before, arguments[0])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_a_number_in_one_row_stays_in_it(value):
    hidden, weight, target, _ = case(dtype=torch.float64, bias=False)
    with torch.no_grad():
        hidden[3, 2] = value
    losses = fr.linear_cross_entropy(hidden, weight, target, reduction="none")
    assert losses[3].isnan() and losses.isnan().sum() == 1
    d_hidden = torch.autograd.grad(losses.nan_to_num(0).sum(), hidden)[0]
    assert not d_hidden[torch.arange(37) != 3].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_gradients_of_a_mean_over_no_row_are_zero(dtype):
    hidden, weight = (
        torch.randn(6, 8).to(dtype).requires_grad_(),
        torch.randn(5, 8).to(dtype).requires_grad_(),
    )
    loss = fr.linear_cross_entropy(hidden, weight, torch.full((6,), -100))
    assert loss.isnan()
    loss.backward()
    assert not hidden.grad.any() and not weight.grad.any()


@pytest.mark.parametrize("frozen", [(), (0,), (1,)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_products_are_counted(frozen, reduction):
    """As those of the two functions; with reduction "none" the logits are computed again."""
    shapes, counts = ((40, 6), (9, 6)), []
    for loss in (fr.linear_cross_entropy, lambda h, w, y, **more: F.cross_entropy(h @ w.t(), y, **more)):
        layer = [torch.randn(s).requires_grad_(i not in frozen) for i, s in enumerate(shapes)]
        with FlopCounterMode(display=False) as counter:
            loss(*layer, torch.arange(40) % 9, reduction=reduction).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] + (2 * 40 * 6 * 9 if reduction == "none" else 0)


def test_several_gradients_at_once_by_vmap():
    """torch.func.vmap of a backward pass whose graph ends with it: the factor cannot be looked at."""
    hidden, weight = torch.randn(4, 3, requires_grad=True), torch.randn(5, 3)
    loss = fr.linear_cross_entropy(hidden, weight, torch.arange(4))
    (one,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    got = torch.func.vmap(lambda g: torch.autograd.grad(loss, hidden, g)[0])(torch.tensor([1.0, -2.0]))
    torch.testing.assert_close(got, torch.stack([one, -2 * one]))
