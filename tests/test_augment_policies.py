"""Policies: which operations and strengths samples draw, and that their pixels are torchvision's."""

import copy
import io

import pytest
import torch

import fastreg as fr
from fastreg.augment import OPERATIONS, Augment, Params, Settings, apply

v2 = pytest.importorskip("torchvision.transforms.v2")
THEIRS = {"trivial": v2.TrivialAugmentWide, "rand": v2.RandAugment}


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def pictures(count, height, width, dtype=torch.uint8, channels=3):
    x = torch.rand(count, channels, height, width)
    return (x * 255).to(dtype) if dtype == torch.uint8 else x.to(dtype)


def one(name, magnitude, **settings):
    return Params(
        operations=torch.tensor([[OPERATIONS.index(name)]]),
        magnitudes=torch.tensor([[magnitude]], dtype=torch.float64),
        settings=Settings(**settings),
    )


@pytest.mark.parametrize("kind", THEIRS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
@pytest.mark.parametrize("size", [(32, 32), (23, 30), (70, 66)], ids=str)
def test_pixels_are_torchvisions(kind, dtype, size):
    x = pictures(1, *size, dtype)
    fills = (None, (100.0, 3.0, 7.0) if dtype == torch.uint8 else (0.3, 0.1, 0.9))
    for interpolation in ("nearest", "bilinear"):
        for fill in fills:
            theirs = THEIRS[kind](
                interpolation=v2.InterpolationMode(interpolation), fill=None if fill is None else list(fill)
            )
            for name, (table, signed) in theirs._AUGMENTATION_SPACE.items():
                strengths = table(31, *size)
                for k in (0, 1, 8, 9, 20, 30) if strengths is not None else (0,):
                    strength = 0.0 if strengths is None else float(strengths[k])
                    for sign in (1, -1) if signed else (1,):
                        want = theirs._apply_image_or_video_transform(
                            x[0], name, sign * strength, theirs.interpolation, theirs._fill
                        )
                        settings = {"policy_interpolation": interpolation, "policy_fill": fill}
                        got = apply(x, one(name, sign * strength, **settings))[0]
                        # A mean of two bytes can lie between two levels: to which it is rounded is a matter
                        # of the last bit, which the fused pass does not share.
                        blended = interpolation == "bilinear" and name in ("ShearX", "ShearY", "Rotate")
                        limit = (1.0 if blended else 0.0) if dtype == torch.uint8 else 2e-5
                        assert (got.double() - want.double()).abs().max() <= limit, (name, k, sign)


def test_tables_are_torchvisions():
    for kind, ours in (("trivial", Augment.trivial(11)), ("rand", Augment.rand(1, 7, 11))):
        theirs = THEIRS[kind](num_magnitude_bins=11)
        table = ours.policy.strengths(60, 91)
        assert list(theirs._AUGMENTATION_SPACE) == list(OPERATIONS[: len(table)])
        for row, (strengths, _) in zip(table, theirs._AUGMENTATION_SPACE.values(), strict=True):
            want = strengths(11, 60, 91)
            assert torch.equal(row, torch.zeros(11).double() if want is None else want.double())


def test_draws_are_uniform():
    """Operations, strengths and signs, each within five standard deviations of its share."""
    count = 40000
    x = torch.empty(count, 3, 2, 2, dtype=torch.uint8)
    p = Augment.trivial().sample(x, seed=5)
    table = Augment.trivial().policy.strengths(2, 2)

    def near(hits, share, total):
        assert abs(hits - share * total) < 5 * (total * share * (1 - share)) ** 0.5

    for k in range(14):
        drawn = p.magnitudes[p.operations == k]
        near(len(drawn), 1 / 14, count)
        if table[k].unique().numel() == 31:
            for strength in table[k]:
                near(int((drawn.abs() == strength).sum()), 1 / 31, len(drawn))
        if 0 < k < 10:
            near(int((drawn < 0).sum()), 0.5 * 30 / 31, len(drawn))
        else:
            assert (drawn >= 0).all()
    p = Augment.rand(3, 9).sample(x[:9000], seed=6)
    assert p.operations.shape == (9000, 3)
    table = Augment.rand(3, 9).policy.strengths(2, 2)
    assert torch.equal(p.magnitudes.abs(), table[p.operations, 9])
    pairs = (p.operations[:, 0] * 14 + p.operations[:, 1]).bincount(minlength=196)
    assert pairs.min() > 10 and pairs.max() < 90  # 46 of each, as rounds are independent


def test_a_sample_draws_the_same_in_any_batch():
    x = pictures(20, 24, 24)
    for aug in (Augment.trivial(hflip=0.5), Augment.rand(2, 12, fill=0.5, interpolation="bilinear")):
        whole = aug.sample(x, seed=3)
        images = apply(x, whole)
        for begin, end in ((0, 1), (7, 9), (11, 20)):
            part = aug.sample(x[begin:end], seed=3, offset=begin)
            assert torch.equal(part.operations, whole.operations[begin:end])
            assert torch.equal(part.magnitudes, whole.magnitudes[begin:end])
            assert torch.equal(apply(x[begin:end], part), images[begin:end])
        index = torch.tensor([5, 2, 19])
        assert torch.equal(apply(x[index], aug.sample(x[index], seed=3, index=index)), images[index])
        assert torch.equal(apply(x[4], aug.sample(x[4], seed=3, offset=4)), images[4])
        generator = torch.Generator().manual_seed(1)
        first = aug(x, generator)
        assert torch.equal(first, aug(x, torch.Generator().manual_seed(1)))
        assert torch.equal(aug.eval()(x), x)
        aug.train()


def test_steps_around_the_operations():
    x = pictures(6, 40, 44)
    aug = Augment.trivial(hflip=0.5, size=(24, 28), crop=(0.3, 1.0), erase=1.0, mean=0.5, std=0.2)
    p = aug.sample(x, seed=1)
    got = apply(x, p)
    assert got.dtype == torch.float32 and got.shape == (6, 3, 24, 28)
    cropped = apply(x, Params(hflip=p.hflip, crop=p.crop, settings=Settings(size=(24, 28))))
    operated = apply(cropped, Params(operations=p.operations, magnitudes=p.magnitudes))
    want = apply(operated, Params(erase=p.erase, settings=Settings(mean=0.5, std=0.2)))
    assert torch.equal(got, want) and not torch.equal(cropped, operated)
    assert torch.equal(Augment(hflip=0.5).sample(x, seed=1).hflip, p.hflip)


def test_parameters_are_printed_saved_and_replayed():
    x = pictures(5, 20, 20)
    aug = Augment.rand(2, 9, size=16, mean=(0.1, 0.2, 0.3), dtype=torch.float32)
    p = aug.sample(x, seed=2)
    file = io.BytesIO()
    torch.save(p, file)
    file.seek(0)
    again = torch.load(file)  # weights_only is the default
    assert torch.equal(apply(x, again), apply(x, p)) and again.settings == p.settings
    assert "operations=tensor" in repr(p) and "rounds=2, magnitude=9" in repr(aug)
    assert copy.deepcopy(aug).policy == aug.policy


def test_targets_move_with_the_operations():
    tv = pytest.importorskip("torchvision.tv_tensors")
    functional = v2.functional
    x, masks = pictures(1, 30, 41), torch.randint(1, 99, (1, 30, 41))
    boxes, points = torch.tensor([[[5.0, 6, 20, 17]]]), torch.tensor([[[8.0, 9], [30, 20]]])
    calls = {
        "ShearX": (0.3, lambda t: functional.affine(t, 0.0, [0, 0], 1.0, [16.69924, 0.0], center=[0.0, 0.0])),
        "TranslateX": (-3.7, lambda t: functional.affine(t, 0.0, [-3, 0], 1.0, [0.0, 0.0])),
        "TranslateY": (4.2, lambda t: functional.affine(t, 0.0, [0, 4], 1.0, [0.0, 0.0])),
        "Rotate": (33.0, lambda t: functional.rotate(t, 33.0)),
        "Solarize": (0.5, lambda t: t),
    }
    for name, (strength, theirs) in calls.items():
        moved = apply(x, one(name, strength), masks=masks, boxes=boxes, keypoints=points)
        assert torch.equal(moved.masks[0], theirs(tv.Mask(masks[0])))
        want = theirs(tv.BoundingBoxes(boxes[0], format="XYXY", canvas_size=(30, 41)))
        torch.testing.assert_close(moved.boxes[0], want.as_subclass(torch.Tensor), rtol=0, atol=1e-3)
        want = theirs(tv.KeyPoints(points[0], canvas_size=(30, 41)))
        torch.testing.assert_close(moved.keypoints[0], want.as_subclass(torch.Tensor), rtol=0, atol=1e-3)
    both = Augment.rand(2, 20, hflip=0.5)(x, masks=masks, boxes=boxes)
    assert both.masks.shape == (1, 30, 41) and both.images.shape == x.shape


def test_dtypes_shapes_and_memory():
    for dtype in (torch.uint8, torch.float32, torch.float64, torch.float16, torch.bfloat16):
        for memory in (torch.contiguous_format, torch.channels_last):
            x = pictures(20, 9, 12, dtype).contiguous(memory_format=memory)
            got = Augment.trivial()(x)
            assert got.dtype == dtype and got.shape == x.shape and got.is_contiguous(memory_format=memory)
            assert got.double().isfinite().all()
    assert Augment.rand()(pictures(20, 9, 12, channels=1)).shape == (20, 1, 9, 12)
    assert Augment.trivial()(pictures(0, 9, 12)).shape == (0, 3, 9, 12)
    assert Augment.trivial()(pictures(1, 9, 12)[0]).shape == (3, 9, 12)
    x = pictures(4, 9, 12)
    assert torch.equal(Augment.rand(0)(x), x)
    before = x.clone()
    Augment.rand(3)(x)
    assert torch.equal(x, before)


def test_an_operation_made_by_hand():
    x = pictures(2, 8, 8)
    assert torch.equal(apply(x[:1], one("Invert", 0.0)), 255 - x[:1])
    assert torch.equal(apply(x[:1], one("Solarize", 1.0)), fr.augment.functional.solarize(x[:1], 255))


def test_compiled():
    x = pictures(6, 12, 12)
    p = Augment.rand().sample(x, seed=1)
    assert torch.equal(torch.compile(lambda x: apply(x, p), backend="eager")(x), apply(x, p))


@pytest.mark.parametrize(
    "make, error, words",
    [
        (lambda: Augment.rand(-1), ValueError, "Augment.rand: n must be"),
        (lambda: Augment.rand(2, 31), ValueError, "magnitude must be less than num_magnitude_bins 31"),
        (lambda: Augment.rand(2, -1), ValueError, "magnitude must be"),
        (lambda: Augment.rand(1.5), TypeError, "Augment.rand: n must be"),
        (lambda: Augment.trivial(1), ValueError, "num_magnitude_bins must be"),
        (lambda: Augment.trivial(interpolation="box"), ValueError, "interpolation must be"),
        (lambda: Augment.trivial(fill="red"), (TypeError, ValueError), "."),
        (lambda: Augment.trivial(colour=3), TypeError, "colour"),
        (lambda: Augment.trivial()(pictures(2, 4, 4, channels=2)), ValueError, "1 or 3 channels"),
        (lambda: Augment.trivial()(255 * torch.rand(2, 3, 4, 4)), ValueError, "must be in"),
        (
            lambda: apply(pictures(1, 4, 4), Params(operations=torch.zeros(1, 1, dtype=torch.int64))),
            ValueError,
            "must both be of shape",
        ),
        (
            lambda: apply(
                pictures(1, 4, 4), Params(operations=torch.tensor([[99]]), magnitudes=torch.zeros(1, 1))
            ),
            ValueError,
            r"operations of params must be in \[0, 14\]",
        ),
    ],
)
def test_refused(make, error, words):
    with pytest.raises(error, match=words):
        make()
