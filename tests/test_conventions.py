"""docs/conventions.md, sentence by sentence, against plain torch or a number that was worked out by hand."""

import math

import pytest
import torch
from torch.nn import functional as F

import fastreg as fr
from fastreg.augment import functional as A

# ---- what p means


def test_p_is_the_probability_of_dropping():
    x = torch.ones(100_000)
    y = fr.dropout(x, 0.1)
    assert abs((y == 0).double().mean().item() - 0.1) < 5 * math.sqrt(0.09 / len(x))
    torch.testing.assert_close(y[y != 0], torch.full_like(y[y != 0], 1 / 0.9))
    assert fr.dropout(x, 0.0) is x and not fr.dropout(x, 1.0).any()
    rows = fr.drop_path(torch.ones(10_000, 3), 0.1)
    dropped = (rows == 0).all(1)
    assert abs(dropped.double().mean().item() - 0.1) < 5 * math.sqrt(0.09 / len(rows))
    assert (rows[~dropped] != 0).all()  # whole samples


def test_the_textbook_form_multiplies_in_evaluation():
    x = torch.rand(1000) + 1
    kept = fr.dropout(x, 0.25, rescale="inference")
    assert torch.equal(kept[kept != 0], x[kept != 0])
    torch.testing.assert_close(fr.dropout(x, 0.25, False, rescale="inference"), x * 0.75)
    assert fr.dropout(x, 0.25, False) is x


# ---- smoothing


def smoothed(logits, target, on_target, on_others):
    q = torch.full_like(logits, on_others).scatter_(1, target[:, None], on_target)
    return -(q * logits.log_softmax(1)).sum(1).mean()


def test_smoothing_puts_its_mass_where_the_table_says():
    logits, target, eps, k = torch.randn(6, 5, dtype=torch.float64), torch.arange(6) % 5, 0.2, 5
    uniform = fr.cross_entropy(logits, target, label_smoothing=eps)
    others = fr.cross_entropy(logits, target, label_smoothing=eps, smoothing="others")
    torch.testing.assert_close(uniform, smoothed(logits, target, 1 - eps + eps / k, eps / k))
    torch.testing.assert_close(others, smoothed(logits, target, 1 - eps, eps / (k - 1)))
    torch.testing.assert_close(uniform, F.cross_entropy(logits, target, label_smoothing=eps))
    torch.testing.assert_close(others, F.cross_entropy(logits, target, label_smoothing=eps * k / (k - 1)))


def test_a_mean_with_class_weights_is_over_the_weights_of_the_targets():
    logits, target = torch.randn(6, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 4, -100])
    weight = torch.rand(5, dtype=torch.float64)
    each = fr.cross_entropy(logits, target, weight, reduction="none")
    mean = fr.cross_entropy(logits, target, weight)
    torch.testing.assert_close(mean, each.sum() / weight.sum())


# ---- penalties


@pytest.mark.parametrize("mode", ["subgradient", "proximal"])
def test_a_weight_at_zero_stays_there(mode):
    w = torch.nn.Parameter(torch.tensor([0.0, -0.0, 1.0]))
    w.grad = torch.zeros(3)
    fr.optim.SGD([w], lr=0.1, l1=1.0, l1_mode=mode).step()
    torch.testing.assert_close(w.detach(), torch.tensor([0.0, 0.0, 0.9]))
    fresh = torch.zeros(3, requires_grad=True)
    fr.optim.penalty(fresh, l1=1.0).backward()
    assert not fresh.grad.any()


def test_only_proximal_steps_end_at_zero():
    ends = {}
    for mode in ("subgradient", "proximal"):
        w = torch.nn.Parameter(torch.tensor([0.05]))
        w.grad = torch.zeros(1)
        fr.optim.SGD([w], lr=0.1, l1=1.0, l1_mode=mode).step()
        ends[mode] = w.item()
    assert ends["proximal"] == 0 and ends["subgradient"] == pytest.approx(-0.05)


def test_weight_decay_is_half_of_the_square():
    w = torch.randn(5, dtype=torch.float64, requires_grad=True)
    value = fr.optim.penalty(w, l1=0.5, l2=0.3)
    torch.testing.assert_close(value, 0.5 * w.abs().sum() + 0.15 * w.square().sum())


# ---- images: one pixel, watched


def moved(change):
    """Where the one pixel of a 5 × 5 image, in the middle of its top row, goes: (row, column)."""
    dot = torch.zeros(1, 1, 5, 5)
    dot[..., 0, 2] = 1.0
    return change(dot)[0, 0].round().nonzero().tolist()


def turned(dot):
    augment = fr.augment.Augment(rotate=(90, 90))
    return fr.augment.apply(dot, augment.sample(dot, seed=0))


def test_positive_angles_turn_clockwise_and_rotate_turns_the_other_way():
    assert moved(lambda dot: A.affine(dot, 90.0, (0, 0), 1.0, 0.0)) == [[2, 4]]
    assert moved(turned) == [[2, 4]]
    assert moved(lambda dot: A.rotate(dot, 90.0)) == [[2, 0]]


def test_translation_is_to_the_right_and_down():
    assert moved(lambda dot: A.affine(dot, 0.0, (1, 2), 1.0, 0.0)) == [[2, 3]]


def test_shear_along_x_moves_the_rows_above_to_the_right():
    column = torch.zeros(1, 1, 5, 5)
    column[..., 2] = 1.0
    sheared = A.affine(column, 0.0, (0, 0), 1.0, (45.0, 0.0))[0, 0]
    assert sheared.nonzero().tolist() == [[0, 4], [1, 3], [2, 2], [3, 1], [4, 0]]


def test_torchvision_turns_the_same_way():
    theirs = pytest.importorskip("torchvision.transforms.v2.functional")
    x = torch.rand(1, 3, 6, 7)
    given = dict(angle=20.0, translate=[1, 2], scale=1.2, shear=[10.0, 5.0])
    torch.testing.assert_close(A.affine(x, **given), theirs.affine(x, **given), atol=1e-5, rtol=0)
    torch.testing.assert_close(A.rotate(x, 20.0), theirs.rotate(x, 20.0), atol=1e-5, rtol=0)


def test_torchvisions_random_steps_turn_as_coming_from_says():
    """RandomAffine clockwise as Augment, RandomRotation the other way."""
    v2 = pytest.importorskip("torchvision.transforms.v2")
    assert moved(v2.RandomAffine((90, 90))) == moved(turned)
    assert moved(v2.RandomRotation((90, 90))) == moved(lambda dot: A.rotate(dot, 90.0)) != moved(turned)


def test_a_third_of_a_turn_takes_red_to_green():
    red = torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1)
    torch.testing.assert_close(A.adjust_hue(red, 1 / 3).flatten(), torch.tensor([0.0, 1.0, 0.0]))


def test_resizing_is_by_half_pixel_centres():
    x = torch.rand(1, 3, 6, 7)
    resized = A.resized_crop(x, 0, 0, 6, 7, [12, 14])
    torch.testing.assert_close(
        resized, F.interpolate(x, (12, 14), mode="bilinear", align_corners=False), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize(
    "padding, expected",
    [
        ("zeros", [0, 0, 1, 2, 3]),
        ("border", [1, 1, 1, 2, 3]),
        ("reflect", [2, 1, 1, 2, 3]),
        ("fill", [9, 9, 1, 2, 3]),
    ],
)
def test_what_lies_outside(padding, expected):
    line = torch.arange(1.0, 6).view(1, 1, 1, 5)
    augment = fr.augment.Augment(translate=(0.4, 0.0), padding=padding, fill=9.0)
    params = augment.sample(line, seed=0)
    params.translate = torch.tensor([[2.0, 0.0]], dtype=torch.float64)
    assert fr.augment.apply(line, params).flatten().tolist() == expected


def test_a_blur_reflects_without_repeating_the_edge():
    line = torch.rand(1, 1, 1, 6, dtype=torch.float64)
    weights = torch.exp(-(torch.arange(-1.0, 2, dtype=torch.float64) ** 2) / 2)
    weights = (weights / weights.sum()).view(1, 1, 1, 3)
    expected = F.conv2d(F.pad(line, (1, 1, 0, 0), mode="reflect"), weights)
    torch.testing.assert_close(A.gaussian_blur(line, (3, 1), 1.0), expected)


def test_uint8_is_cut_off_after_each_step():
    x = torch.tensor([3, 101, 255], dtype=torch.uint8).view(1, 1, 1, 3)
    assert A.adjust_brightness(x, 0.5).flatten().tolist() == [1, 50, 127]


# ---- attacks


def test_an_attack_of_one_sample_does_not_depend_on_the_others():
    model = torch.nn.Linear(4, 3).double()
    x, y = torch.rand(5, 4, dtype=torch.float64), torch.arange(5) % 3
    together = fr.fgsm(model, x, y, 0.1, norm="l2", bounds=None)
    alone = torch.cat(
        [fr.fgsm(model, x[i : i + 1], y[i : i + 1], 0.1, norm="l2", bounds=None) for i in range(5)]
    )
    torch.testing.assert_close(together, alone)


def test_the_sign_of_zero_and_nan_is_zero():
    x, grad = torch.full((3,), 0.5), torch.tensor([0.0, -0.0, math.nan])
    assert torch.equal(fr.fgsm_step(x, grad, 0.1, 0.0, 1.0), x)


# ---- seeds and indices


def test_a_value_depends_on_seed_and_index_alone():
    x = torch.rand(4, 6, 8)
    whole, _ = fr.dropout_with_mask(x, 0.5, seed=3)
    part, _ = fr.dropout_with_mask(x[2:], 0.5, seed=3, offset=2 * 48)
    strided, _ = fr.dropout_with_mask(x.permute(2, 0, 1).contiguous().permute(1, 2, 0), 0.5, seed=3)
    assert torch.equal(whole[2:], part) and torch.equal(whole, strided)
    images, augment = torch.rand(6, 1, 4, 4), fr.augment.Augment(rotate=30, hflip=0.5)
    drawn, later = augment.sample(images, seed=3), augment.sample(images[4:], seed=3, offset=4)
    assert torch.equal(drawn.angle[4:], later.angle) and torch.equal(drawn.hflip[4:], later.hflip)


def test_a_call_advances_the_generator_by_one_seed_whatever_the_size():
    states = []
    for size in (4, 4000):
        torch.manual_seed(0)
        fr.dropout(torch.ones(size), 0.5)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_the_bits_of_a_mask():
    kept = torch.tensor([1, 0, 0, 0, 0, 0, 0, 1, 0, 1], dtype=torch.bool)
    assert fr.pack_mask(kept).tolist() == [0b10000001, 0b10]


# ---- patience


@pytest.mark.parametrize(
    "patience, scores, stops_at", [(3, [6, 5, 5, 5, 5, 5], 4), (1, [6, 5, 5], 2), (0, [6, 5, 5], 2)]
)
def test_patience_counts_epochs_in_a_row_without_improvement(patience, scores, stops_at):
    stopper = fr.EarlyStopping(patience=patience)
    stopped = [stopper.step(score) for score in scores]
    assert stopped.index(True) == stops_at and stopper.best_epoch == 1


def test_an_improvement_exceeds_the_least_gain_and_nan_is_none():
    assert [fr.EarlyStopping(patience=1, min_delta=1.0).step(6.0)] == [False]
    stopper = fr.EarlyStopping(patience=1, min_delta=1.0)
    assert [stopper.step(score) for score in (6.0, 5.0)] == [False, True]
    stopper = fr.EarlyStopping(patience=2)
    assert [stopper.step(score) for score in (math.nan, 3.0, math.nan, math.nan)] == [
        False,
        False,
        False,
        True,
    ]
    assert stopper.best == 3.0


# ---- rounding


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_results_are_rounded_once(dtype):
    x, r, bias = (torch.randn(64, 8).to(dtype) for _ in range(3))
    bias = bias[0]
    mask = fr.dropout_with_mask(x, 0.3, generator=torch.Generator().manual_seed(1))[0] != 0
    ours = fr.dropout_add(x, r, 0.3, bias, generator=torch.Generator().manual_seed(1))
    kept = mask | (x == 0)
    exact = torch.where(kept, (x.double() + bias.double()) / 0.7, 0.0) + r.double()
    torch.testing.assert_close(
        ours[x != 0], exact.to(dtype)[x != 0], rtol=torch.finfo(dtype).eps / 2, atol=1e-6
    )
    logits = torch.randn(9, 33).to(dtype)
    loss = fr.cross_entropy(logits, torch.arange(9))
    exact = F.cross_entropy(logits.double(), torch.arange(9))
    assert loss.dtype == dtype and loss == exact.to(dtype)
    wide = fr.cross_entropy(logits, torch.arange(9), loss_dtype=torch.float32)
    torch.testing.assert_close(wide, exact.float())


def test_subnormals_are_kept_but_for_exponentials_of_a_softmax():
    tiny = torch.full((64,), 1e-40)
    assert torch.equal(fr.dropout_add(tiny, torch.zeros(64), 0.0), tiny)
    w = torch.nn.Parameter(tiny.clone())
    w.grad = torch.zeros(64)
    fr.optim.SGD([w], lr=0.1, momentum=0.9).step()
    assert torch.equal(w.detach(), tiny)
    assert torch.equal(fr.fgsm_step(tiny, torch.zeros(64), 0.1, 0.0, 1.0), tiny)
    logits = torch.tensor([[0.0, -95.0, -80.0]], requires_grad=True)
    fr.cross_entropy(logits, torch.tensor([0])).backward()
    assert logits.grad[0, 1] == 0 and logits.grad[0, 2] == pytest.approx(math.exp(-80), rel=1e-5)


def test_dtypes_of_what_is_reported():
    assert fr.calibration_error(torch.randn(9, 3), torch.arange(9) % 3).dtype == torch.float64
    assert fr.optim.penalty(torch.ones(3, dtype=torch.bfloat16), l2=1.0).dtype == torch.float32
    assert fr.optim.penalty(torch.ones(3, dtype=torch.float64), l2=1.0).dtype == torch.float64
