"""The calibration curve and the expected calibration error, against a count by hand and against a network's
cure.
"""

import math

import pytest
import torch
from torch import nn

import fastreg as fr
from fastreg import calibration, calibration_curve, calibration_error


def reference(logits, target, bins):
    """One prediction after another: [(count, accuracy, confidence) per bin], expected calibration error."""
    rows = [[] for _ in range(bins)]
    for z, t in zip(logits.double().softmax(1).tolist(), target.tolist(), strict=True):
        confidence = max(z)
        index = next(m for m in range(bins) if confidence <= (m + 1) / bins or m == bins - 1)
        rows[index].append((z.index(confidence) == t, confidence))
    error = sum(abs(sum(right for right, _ in row) - sum(c for _, c in row)) for row in rows) / len(logits)
    return [
        (len(row), *(math.fsum(v) / len(row) if row else math.nan for v in zip(*row, strict=True)))
        if row
        else (0, math.nan, math.nan)
        for row in rows
    ], error


@pytest.mark.parametrize("bins", (1, 4, 15))
# One sample, two classes, several, and one class, whose confidence is always 1.
@pytest.mark.parametrize("shape", ((1, 2), (50, 2), (333, 7), (20, 1)), ids=str)
def test_against_the_reference(shape, bins, dtype):
    logits, target = (3 * torch.randn(shape)).to(dtype), torch.randint(shape[1], shape[:1])
    target = torch.where(torch.rand(shape[0]) < 0.6, logits.argmax(1), target)
    curve, error = (
        fr.calibration_curve(logits, target, bins=bins),
        fr.calibration_error(logits, target, bins=bins),
    )
    want, want_error = reference(logits, target, bins)
    assert (
        all(v.dtype == torch.float64 and v.shape == (bins,) for v in curve)
        and error.shape == ()
        and error.dtype == torch.float64
    )
    torch.testing.assert_close(
        torch.stack(curve, 1), torch.tensor(want, dtype=torch.float64), rtol=1e-12, atol=1e-12, equal_nan=True
    )
    assert error.item() == pytest.approx(want_error, abs=1e-12)
    torch.testing.assert_close(fr.calibration_error(logits.T.contiguous().T, target, bins=bins), error)
    assert fr.calibration_error(logits.requires_grad_(), target, bins=bins).requires_grad is False


def test_by_hand():
    confidence = torch.tensor([0.95, 0.95, 0.95, 0.95, 0.55, 0.55, 1.0], dtype=torch.float64)
    right = torch.tensor([True, True, True, False, True, False, True])
    logits = torch.stack([confidence, 1 - confidence], 1).log()  # log-probabilities are logits
    got = fr.calibration_error(logits, (~right).long(), bins=10)
    # (0.9, 1] holds 5, 4 of them right, confidence 0.96; (0.5, 0.6] holds 2, 1 of them right, 0.55
    assert got.item() == pytest.approx((5 * abs(0.8 - 0.96) + 2 * 0.05) / 7, abs=1e-12)
    assert fr.calibration_curve(logits, (~right).long(), bins=10).count.tolist() == [
        0,
        0,
        0,
        0,
        0,
        2,
        0,
        0,
        0,
        5,
    ]


def test_ends():
    sure = torch.tensor([[0.0, 1000.0], [math.inf, 0.0]])
    assert (
        fr.calibration_error(sure[:1], torch.tensor([1])) == 0
        and fr.calibration_error(sure[:1], torch.tensor([0])) == 1
    )
    for broken in (sure, torch.full((2, 2), math.nan)):  # a softmax with an infinity is NaN
        assert fr.calibration_error(broken, torch.tensor([1, 0])).isnan()
        assert fr.calibration_curve(broken, torch.tensor([1, 0])).count.sum() == (1 if broken is sure else 0)
    assert fr.calibration_error(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)).isnan()
    assert fr.calibration_curve(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)).count.sum() == 0


def test_refused():
    logits, target = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    for call in (fr.calibration_curve, fr.calibration_error):
        for arguments, error, message in (
            ((logits.numpy(), target), TypeError, "logits must be a torch.Tensor"),
            ((logits, [0, 1, 2, 0]), TypeError, "target must be a torch.Tensor"),
            ((logits.long(), target), TypeError, "logits must be floating point"),
            ((logits[0], target), ValueError, r"logits must be \(N, k\), got \(3,\)"),
            ((torch.randn(4, 0), target), ValueError, r"logits must be \(N, k\)"),
            (
                (logits, target[:2]),
                ValueError,
                r"target must be class indices \(4,\), got torch.int64 \(2,\)",
            ),
            ((logits, logits), ValueError, r"of probabilities take .argmax\(1\)"),
        ):
            with pytest.raises(
                error, match=f"{call.__name__}: {message}" if "argmax" not in message else message
            ):
                call(*arguments)
        with pytest.raises(ValueError, match=f"{call.__name__}: bins must be at least 1, got 0"):
            call(logits, target, bins=0)
        with pytest.raises(TypeError, match=f"{call.__name__}: bins must be an int"):
            call(logits, target, bins=2.0)


def test_what_has_no_label_is_left_out_and_impossible_classes_are_refused():
    logits, target = 3 * torch.randn(50, 4), torch.randint(4, (50,))
    known = torch.rand(50) > 0.4
    marked = target.where(known, -100)
    torch.testing.assert_close(
        calibration_error(logits, marked), calibration_error(logits[known], target[known])
    )
    for a, b in zip(
        calibration_curve(logits, marked), calibration_curve(logits[known], target[known]), strict=True
    ):
        torch.testing.assert_close(a, b, equal_nan=True)
    assert calibration_error(logits, torch.full_like(target, -100)).isnan()
    for wrong in (4, -1, 255):
        for op in (calibration_error, calibration_curve):
            with pytest.raises(
                ValueError, match=rf"{op.__name__}: .* in \[0, 4\) or -100, got {wrong}; mark what"
            ):
                op(logits, target.index_fill(0, torch.tensor([3]), wrong))


def test_where_nobody_may_look_an_impossible_class_makes_nan(monkeypatch):
    logits, target = torch.randn(5, 3), torch.tensor([0, 1, 2, 3, -100])
    monkeypatch.setattr(calibration, "may_look", lambda x: False)
    assert calibration_error(logits, target).isnan()
    assert calibration_error(logits, target.clamp(max=2)).isfinite()


def test_probabilities_percentages_and_one_hot_rows_are_no_logits():
    logits, target = 3 * torch.randn(50, 4), torch.randint(4, (50,))
    p = logits.softmax(1)
    for scale in (1, 100):
        for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
            with pytest.raises(
                ValueError, match=f"calibration_error: logits must be logits, .* sum to {scale}, as"
            ):
                calibration_error((scale * p).to(dtype), target)
    with pytest.raises(ValueError, match="as probabilities are"):
        calibration_curve(torch.eye(4)[target], target)
    torch.testing.assert_close(calibration_error(p.log(), target), calibration_error(logits, target))
    torch.testing.assert_close(
        calibration_error((100 * p / 100).log(), target), calibration_error(logits, target)
    )
    for fine in (torch.zeros(3, 4), torch.rand(50, 4), p + 0.1, torch.ones(3, 1)):
        calibration_error(fine, target[: len(fine)] % fine.shape[1])


def test_label_smoothing_calibrates_a_network_on_the_digits(digits):
    """A network that knows 1,000 digits by heart is too sure of others; smoothed, in either convention, it is
    less so.
    """
    x, y = digits
    error, sure = {}, {}
    for epsilon, smoothing in ((0, "uniform"), (0.02, "uniform"), (0.02, "others")):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))
        optimizer = fr.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for batch in (b for _ in range(40) for b in torch.randperm(1000).split(100)):
            optimizer.zero_grad()
            fr.cross_entropy(
                model(x[batch]), y[batch], label_smoothing=epsilon, smoothing=smoothing
            ).backward()
            optimizer.step()
        with torch.no_grad():
            logits = model(x[1000:])
        error[epsilon, smoothing] = fr.calibration_error(logits, y[1000:]).item()
        sure[epsilon, smoothing] = logits.softmax(1).amax(1).mean().item()
    assert error[0, "uniform"] > 0.04
    for smoothing in ("uniform", "others"):
        assert (
            error[0.02, smoothing] < 0.75 * error[0, "uniform"]
            and sure[0.02, smoothing] < sure[0, "uniform"] - 0.03
        )
