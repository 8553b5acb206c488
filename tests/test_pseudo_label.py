"""Pseudo-labels against the definition written out in float64."""

import math

import pytest
import torch
from conftest import DTYPES

import fastreg as fr

INF, NAN = math.inf, math.nan
# Rows, one class, more dimensions after the classes, no row, and no row within a sample.
SHAPES = [(5, 3), (1, 1), (33, 10), (2, 4, 7), (2, 3, 4, 5), (0, 3), (2, 3, 0)]


def reference(strong, weak, threshold, temperature, hard):
    """(loss, gradient with respect to strong, mask rate), one sample after the other."""
    classes = strong.shape[1]
    strong, weak = (v.detach().double().movedim(1, -1).reshape(-1, classes) for v in (strong, weak))
    total, rows, counted = 0.0, [], 0
    for s, w in zip(strong, weak, strict=True):
        p = torch.exp(w / temperature - torch.logsumexp(w / temperature, 0))
        if not p.max() >= threshold:
            rows.append(torch.zeros_like(s))
            continue
        q = torch.nn.functional.one_hot(p.argmax(), classes).double() if hard else p
        counted += 1
        total -= (q * (s - s.logsumexp(0))).sum().item()
        rows.append((s.softmax(0) - q) / len(strong))
    grad = torch.stack(rows) if rows else strong
    return total / max(len(rows), 1), grad, counted / max(len(rows), 1)


def flat(tensor):
    return tensor.movedim(1, -1).reshape(-1, tensor.shape[1])


@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "classes first", "every other"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loss_gradient_and_mask_rate(dtype, shape, layout, hard):
    def draw():
        full = torch.randn(shape, dtype=torch.float64).mul(3).to(dtype)
        if layout == "classes first":
            return full.transpose(0, 1).contiguous().transpose(0, 1)
        return full.repeat_interleave(2, 0)[::2] if layout == "every other" else full

    strong, weak = draw().requires_grad_(), draw().requires_grad_()
    for threshold, temperature in ((0.8, 1.0), (0.5, 2.5), (0.95, 0.3)):
        strong.grad = None
        loss, rate = fr.pseudo_label_loss(
            strong, weak, threshold=threshold, temperature=temperature, hard=hard, return_mask_rate=True
        )
        want, want_grad, want_rate = reference(strong, weak, threshold, temperature, hard)
        assert (
            loss.shape == ()
            and loss.dtype == dtype
            and rate.dtype == torch.float32
            and not rate.requires_grad
        )
        eps = torch.finfo(dtype).eps
        assert loss.item() == pytest.approx(want, rel=max(4 * eps, 2e-5), abs=1e-6)
        assert rate.item() == pytest.approx(want_rate, abs=1e-6)
        loss.backward()
        torch.testing.assert_close(
            flat(strong.grad).double(), want_grad, rtol=max(4 * eps, 2e-5), atol=max(eps / 10, 1e-6)
        )
        assert weak.grad is None


def test_the_classic_form_uses_one_view():
    logits = torch.randn(40, 5, requires_grad=True)
    loss = fr.pseudo_label_loss(logits, threshold=0)
    (grad,) = torch.autograd.grad(loss, logits)
    want = -logits.log_softmax(1).max(1).values.mean()  # Lee 2013: the class of the largest logit
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(grad, torch.autograd.grad(want, logits)[0])
    assert torch.equal(
        fr.pseudo_label_loss(logits, threshold=0.6),
        fr.pseudo_label_loss(logits, logits.detach(), threshold=0.6),
    )


def test_the_mean_is_over_all_samples():
    sure, unsure = torch.tensor([[9.0, 0.0]]), torch.tensor([[0.1, 0.0]])
    strong = torch.tensor([[0.0, 1.0]])
    alone = fr.pseudo_label_loss(strong, sure)
    loss, rate = fr.pseudo_label_loss(
        strong.expand(4, 2), torch.cat([sure, unsure, unsure, unsure]), return_mask_rate=True
    )
    torch.testing.assert_close(loss, alone / 4)
    assert rate.item() == 0.25


@pytest.mark.parametrize(
    "weak, threshold, temperature, counted",
    [
        ([0.0, 0.0], 0.5, 1.0, True),  # exactly at the threshold
        ([0.0, 0.0], 0.500001, 1.0, False),
        ([0.1, 0.0], 0.0, 1.0, True),
        ([5.0, 0.0], 1.0, 1.0, False),
        ([200.0, 0.0], 1.0, 1.0, True),
        ([1.0, 0.0], 0.9, 1.0, False),
        ([1.0, 0.0], 0.9, 0.4, True),  # sharpened: softmax(2.5, 0) = 0.924
        ([3.0, 0.0], 0.9, 1.0, True),
        ([3.0, 0.0], 0.9, 2.0, False),  # softened: softmax(1.5, 0) = 0.818
        ([0.0, -INF], 1.0, 1.0, True),
        ([NAN, 9.0], 0.0, 1.0, False),
        ([INF, 0.0], 0.0, 1.0, False),
        ([-INF, -INF], 0.0, 1.0, False),
    ],
)
@pytest.mark.parametrize("hard", [True, False])
def test_who_counts(weak, threshold, temperature, counted, hard):
    strong = torch.tensor([[0.3, -0.7]], requires_grad=True)
    loss, rate = fr.pseudo_label_loss(
        strong,
        torch.tensor([weak]),
        threshold=threshold,
        temperature=temperature,
        hard=hard,
        return_mask_rate=True,
    )
    loss.backward()
    assert rate.item() == counted
    assert (loss.item() != 0) == counted and bool(strong.grad.any()) == counted


@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize("bad", [NAN, INF])
def test_nan_where_it_counts_and_nowhere_else(bad, hard):
    weak = torch.tensor([[9.0, 0.0], [0.1, 0.0], [9.0, 0.0]])
    strong = torch.tensor([[1.0, 0.0], [bad, 0.0], [0.0, 1.0]], requires_grad=True)
    loss = fr.pseudo_label_loss(strong, weak, hard=hard)
    loss.backward()
    want, grad, _ = reference(strong[[0, 2]], weak[[0, 2]], 0.95, 1.0, hard)
    assert loss.item() == pytest.approx(want * 2 / 3, rel=1e-5)
    torch.testing.assert_close(strong.grad[[0, 2]].double(), grad * 2 / 3, rtol=1e-4, atol=1e-7)
    assert not strong.grad[1].any()
    assert not math.isfinite(fr.pseudo_label_loss(strong, weak[[0, 2, 1]], hard=hard).item())


@pytest.mark.parametrize("hard", [True, False])
def test_no_samples_have_a_graph(hard):
    layer = torch.nn.Linear(4, 3)
    loss, rate = fr.pseudo_label_loss(
        layer(torch.empty(0, 4)), torch.empty(0, 3), hard=hard, return_mask_rate=True
    )
    loss.backward()
    assert loss.item() == 0 and rate.item() == 0 and not layer.weight.grad.any()


def test_float16_sums_do_not_overflow():
    strong, weak = torch.zeros(8000, 2, dtype=torch.float16), torch.zeros(8000, 2, dtype=torch.float16)
    strong[:, 0], weak[:, 1] = 30, 30
    assert fr.pseudo_label_loss(strong, weak).item() == 30


def test_views_may_differ_in_dtype_and_autocast_gives_float32():
    strong, weak = torch.randn(6, 3, dtype=torch.bfloat16), torch.randn(6, 3, dtype=torch.float64)
    assert fr.pseudo_label_loss(strong, weak, threshold=0.4).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        loss = fr.pseudo_label_loss(strong, weak, threshold=0.4)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(reference(strong, weak, 0.4, 1.0, True)[0], rel=1e-6)


@pytest.mark.parametrize("hard", [True, False])
def test_under_compile_and_without_gradients(hard):
    def function(strong, weak):
        return fr.pseudo_label_loss(strong, weak, threshold=0.6, hard=hard, return_mask_rate=True)

    strong, weak = torch.randn(20, 4, requires_grad=True), torch.randn(20, 4).mul(3)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for one, other in zip(compiled(strong, weak), function(strong, weak), strict=True):
        torch.testing.assert_close(one, other)
    grads = [torch.autograd.grad(f(strong, weak)[0], strong)[0] for f in (compiled, function)]
    torch.testing.assert_close(*grads)
    with torch.inference_mode():
        torch.testing.assert_close(function(strong, weak)[0], function(strong, weak)[0])


X = torch.zeros(4, 3)


@pytest.mark.parametrize(
    "error, words, arguments",
    [
        (TypeError, "strong_logits must be a torch.Tensor, got list", dict(strong_logits=[1.0])),
        (TypeError, "weak_logits must be floating point, got torch.int64", dict(weak_logits=X.long())),
        (ValueError, r"strong_logits must be .N, C. or", dict(strong_logits=torch.zeros(3))),
        (ValueError, r"got \(4, 0\)", dict(strong_logits=torch.zeros(4, 0))),
        (ValueError, r"both views .* got \(4, 3\) on cpu and \(5, 3\)", dict(weak_logits=torch.zeros(5, 3))),
        (ValueError, "both views .* meta", dict(weak_logits=X.to("meta"))),
        (ValueError, r"threshold must be in \[0, 1\], got 95", dict(threshold=95)),
        (ValueError, "threshold must be .* got nan", dict(threshold=NAN)),
        (TypeError, "threshold must be a number, got str", dict(threshold="high")),
        (ValueError, "temperature must be positive and finite, got 0", dict(temperature=0)),
        (ValueError, "temperature must be .* got inf", dict(temperature=INF)),
        (ValueError, "temperature must be .* got nan", dict(temperature=NAN)),
        (ValueError, "temperature must be .* got -1", dict(temperature=-1)),
    ],
)
def test_errors_say_what_was_expected(error, words, arguments):
    with pytest.raises(error, match=f"pseudo_label_loss: .*{words}"):
        fr.pseudo_label_loss(**{"strong_logits": X, "weak_logits": X, **arguments})


def test_probabilities_are_no_logits():
    """Their softmax is nearly flat: no sample would ever be confident, and the loss 0 without a word."""
    logits = 5 * torch.randn(20, 4)
    for wrong, total in ((logits.softmax(1), 1), (100 * logits.softmax(1), 100)):
        with pytest.raises(ValueError, match=f"pseudo_label_loss: expected logits, .* sum to {total} over"):
            fr.pseudo_label_loss(logits, wrong)
    image = (5 * torch.randn(2, 4, 3, 3)).softmax(1)
    with pytest.raises(ValueError, match="sum to 1 over the classes"):
        fr.pseudo_label_loss(image, threshold=0.0)
    torch.testing.assert_close(
        fr.pseudo_label_loss(logits, logits.softmax(1).log()), fr.pseudo_label_loss(logits, logits)
    )
