"""Policies: which operations and strengths samples draw, and that their pixels are torchvision's."""

import copy
import io

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import fastreg as fr
from fastreg.augment import OPERATIONS, Augment, Params, Settings, _policies, apply

v2 = pytest.importorskip("torchvision.transforms.v2")
pytestmark = pytest.mark.usefixtures("rounded_grids")
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
# Even sides, an odd one, which has its middle on a pixel, and sides of more than 64 pixels.
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


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
def test_pixels_of_the_way_that_a_gpu_goes(interpolation):
    """Which does not look at who drew what."""
    for memory in (torch.contiguous_format, torch.channels_last):
        x = pictures(300, 13, 18).contiguous(memory_format=memory)
        params = Augment.trivial(interpolation=interpolation, fill=90).sample(x, seed=1)
        given = params.operations[:, 0], params.magnitudes[:, 0], params
        got = _policies._in_two_passes(x, *given)
        assert torch.equal(got, apply(x, params)) and got.is_contiguous(memory_format=memory)


def test_strengths_are_computed_once():
    x, augment = pictures(4, 9, 12), Augment.trivial()
    first = augment.sample(x, seed=1).magnitudes
    kept = _policies._kept_strengths.cache_info()
    assert torch.equal(augment.sample(x, seed=1).magnitudes, first)
    assert _policies._kept_strengths.cache_info().hits == kept.hits + 1
    narrow = x[..., :7]
    with FakeTensorMode() as mode:
        assert augment.sample(mode.from_tensor(narrow), seed=1).magnitudes.shape == (4, 1)
    assert _policies._kept_strengths.cache_info().currsize == kept.currsize
    assert augment.sample(narrow, seed=1).magnitudes.isfinite().all()


def test_an_operation_made_by_hand():
    x = pictures(2, 8, 8)
    assert torch.equal(apply(x[:1], one("Invert", 0.0)), 255 - x[:1])
    assert torch.equal(apply(x[:1], one("Solarize", 1.0)), fr.augment.functional.solarize(x[:1], 255))


def test_compiled():
    x = pictures(6, 12, 12)
    p = Augment.rand().sample(x, seed=1)
    assert torch.equal(torch.compile(lambda x: apply(x, p), backend="eager")(x), apply(x, p))


@pytest.mark.filterwarnings("error:.*custom operator:UserWarning")
@pytest.mark.parametrize("names", ["Rotate Solarize Sharpness ShearX", "Identity Identity Identity Identity"])
def test_the_operators_of_compiled_code(names):
    """Also where a mode has switched autograd off, which the backward operator needs; identity is a copy."""
    x, grad = pictures(2, 9, 11, torch.float32), torch.rand(2, 3, 9, 11)
    operations = torch.tensor([OPERATIONS.index(name) for name in names.split()]).view(2, 2)
    p = Params(operations=operations, magnitudes=torch.full((2, 2), 0.3).double(), settings=Settings())
    given = x, p.operations, p.magnitudes, 0, False, []
    policy, backward = (getattr(torch.ops.fastreg, f"augment_policy{of}") for of in ("", "_backward"))
    torch.library.opcheck(policy.default, given)
    torch.library.opcheck(backward.default, (grad, *given))
    x.requires_grad_()
    with FlopCounterMode(display=False):
        got = backward(grad, *given)
    assert torch.equal(got, torch.autograd.grad(apply(x, p), x, grad)[0])
    compiled = torch.compile(lambda x: apply(x, p), backend="aot_eager")(x)
    assert torch.equal(got, torch.autograd.grad(compiled, x, grad)[0])


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


# ---- torchvision's transforms as an Augment


def fixed(degrees=10.0, **changes):
    options = {"scale": (1.2, 1.2), "shear": (5, 5, 3, 3), "interpolation": v2.InterpolationMode.BILINEAR}
    return v2.RandomAffine((degrees, degrees), **options | changes)


def test_transforms_that_draw_nothing_give_torchvisions_pixels():
    x = pictures(2, 24, 28, torch.float32)
    chains = (
        [v2.RandomHorizontalFlip(1.0), fixed(), v2.Normalize([0.1, 0.2, 0.3], [0.5, 0.6, 0.7])],
        [v2.RandomVerticalFlip(1.0), v2.RandomRotation((30, 30), fill=0.5)],
        [fixed(fill=[0.1, 0.2, 0.3]), v2.ColorJitter((1.5, 1.5)), v2.GaussianBlur(3, (0.7, 0.7))],
        [v2.RandomRotation((0, 0)), v2.ColorJitter(saturation=(0.5, 0.5))],
        [v2.Resize((11, 13)), v2.RandomHorizontalFlip(1.0)],
        [v2.RandomResizedCrop((12, 16), (1, 1)), v2.ToDtype(torch.float32, scale=True)],
        [v2.RandomCrop((24, 28))],
    )
    for chain in chains:
        ours = Augment.from_torchvision(v2.Compose([v2.ToImage(), v2.Compose(chain)]))
        if isinstance(chain[0], v2.RandomResizedCrop):
            # A box of the whole area is the whole image only where its ratio is drawn so.
            assert ours.crop == (1.0, 1.0) and ours.size == (12, 16) and ours.settings.antialias
            continue
        torch.testing.assert_close(ours(x), v2.Compose(chain)(x), rtol=0, atol=2e-5)


def test_arguments_of_the_usual_recipe():
    chain = v2.Compose(
        [
            v2.RandomResizedCrop(176, antialias=True),
            v2.RandomHorizontalFlip(0.3),
            v2.TrivialAugmentWide(fill=[1, 2, 3]),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
            v2.RandomErasing(0.1),
        ]
    )
    aug = Augment.from_torchvision(chain, erase=0.2)
    want = Augment.trivial(
        fill=(1, 2, 3), size=176, crop=(0.08, 1.0), hflip=0.3, mean=(0.485, 0.456, 0.406), erase=0.2,
        std=(0.229, 0.224, 0.225), antialias=True, padding="border", dtype=torch.float32,
    )  # fmt: skip
    assert repr(aug) == repr(want) and aug.settings == want.settings
    x = pictures(3, 200, 190)
    assert torch.equal(apply(x, aug.sample(x, seed=1)), apply(x, want.sample(x, seed=1)))
    rand = Augment.from_torchvision([v2.RandAugment(3, 5)])
    assert rand.policy == Augment.rand(3, 5).policy
    window = Augment.from_torchvision([v2.RandomCrop(32, 4, padding_mode="symmetric")])
    assert window.crop == 4 and window.settings.padding == "reflect"
    turned = Augment.from_torchvision([v2.RandomRotation((-5, 20))])
    assert turned.ranges["angle"] == (-20, 5)


# ---- pictures


def test_a_picture_shows_images_and_targets():
    image = pytest.importorskip("PIL.Image")
    x = torch.zeros(3, 3, 20, 30)
    masks = torch.zeros(3, 20, 30, dtype=torch.int64)
    masks[:, 2:6, 3:9] = 1
    boxes, points = torch.tensor([[[3.0, 2, 9, 6]]] * 3), torch.tensor([[[20.0, 15]]] * 3)
    aug = Augment(hflip=1.0, mean=0.5, std=0.25)
    picture = aug.show(x, masks=masks, boxes=boxes, keypoints=points, draws=2, columns=2)
    assert isinstance(picture, image.Image)
    # Two side by side, three rows of each, twice, with gaps of two pixels.
    assert picture.size == (2 * 32 - 2, 6 * 22 - 2)
    numbers = torch.tensor(list(picture.tobytes())).view(picture.height, picture.width, 3)
    before, after = numbers[:20, :30], numbers[22:42, :30]
    assert before[2, 3].tolist() == [255, 70, 70] == before[5, 8].tolist()  # the box's edge
    assert before[3, 5].tolist() == [128, 35, 35] and before[15, 20].tolist() == [255, 70, 70]
    assert after[2, 30 - 4].tolist() == [255, 70, 70] and after[3, 30 - 6].tolist() == [128, 35, 35]
    assert after[15, 30 - 1 - 20].tolist() == [255, 70, 70] and after[10, 2].tolist() == [0, 0, 0]


def test_a_picture_of_any_batch():
    tv = pytest.importorskip("torchvision.tv_tensors")
    x = pictures(3, 20, 30)
    boxes = torch.tensor([[3.0, 2, 9, 6]])
    sample = (tv.Image(x[0]), {"boxes": tv.BoundingBoxes(boxes, format="XYXY", canvas_size=(20, 30))})
    for aug in (Augment(rotate=20), Augment.rand(), Augment(size=(20, 30), mean=0.5)):
        batches = [(x, 3), (x[0], 1), (x.float() / 255, 3), ([x[0], x[1]], 2), (sample, 1), ([sample] * 4, 4)]
        batches += [({"image": x, "label": 3}, 3), (x[:, :1], 3), (x.bfloat16() / 255, 3)]
        for batch, count in batches:
            picture = aug.show(batch)
            assert picture.size == (count * 32 - 2, 42)
    uneven = Augment(size=12).show([x[0], x[1][:, :9]], masks=[torch.zeros(20, 30), torch.zeros(9, 30)])
    assert uneven.size == (62, 42)
    with pytest.raises(ValueError, match=r"Augment\.show: draws must be"):
        Augment().show(x, draws=0)
    with pytest.raises(ValueError, match=r"Augment\.show: the batch has no images"):
        Augment().show(x[:0])


# ---- whole recipes


def test_boxes_of_the_random_resized_crop_are_torchvisions():
    """Height, width and place of boxes, each by the largest distance of the two distribution functions."""
    draws, size = 2500, (60, 90)
    theirs = v2.RandomResizedCrop(8)
    sample = [torch.empty(3, *size)]
    want = torch.tensor(
        [
            [p["top"], p["left"], p["height"], p["width"]]
            for p in (theirs.make_params(sample) for _ in range(draws))
        ]
    )
    got = Augment.imagenet().sample(torch.empty(20000, 3, *size), seed=1).crop
    for column in range(4):
        levels = torch.arange(0, 91)
        one = (got[:, column, None] <= levels).double().mean(0)
        two = (want[:, column, None] <= levels).double().mean(0)
        assert (one - two).abs().max() < 1.95 * (1 / draws + 1 / 20000) ** 0.5, column  # one in a thousand


def test_mixing_is_a_step_after_all_others():
    x, y = pictures(8, 20, 20), torch.arange(8)
    for name, mix in (("mixup", fr.augment.mixup), ("cutmix", fr.augment.cutmix)):
        aug = Augment.imagenet(size=12, num_classes=10, **{name: 0.7})
        images, soft = aug(x, torch.Generator().manual_seed(3), labels=y)
        generator = torch.Generator().manual_seed(3)
        alone = Augment.imagenet(size=12)(x, generator)
        want, targets = mix(alone, y, 0.7, 10, generator=generator)
        assert torch.equal(images, want) and torch.equal(soft, targets) and soft.shape == (8, 10)
        again = aug([x, y], torch.Generator().manual_seed(3))
        assert torch.equal(again[0], images) and torch.equal(again[1], soft)
        assert f"{name}=0.7" in repr(aug) and "num_classes=10" in repr(aug)
        with pytest.raises(ValueError, match="mixup and cutmix need labels"):
            aug(x)
        assert aug.show(x).size == (8 * 22 - 2, 42)
        batch = aug.collate([(image, int(label)) for image, label in zip(x, y, strict=True)])
        assert batch[0].shape == (8, 3, 12, 12) and batch[1].shape == (8, 10)
        with pytest.raises(TypeError, match=r"need samples \(image, label\)"):
            aug.collate(list(x))
        images, same = aug.eval()(x, labels=y)
        assert torch.equal(same, y) and torch.equal(images, Augment.imagenet(size=12).eval()(x))
        assert torch.equal(aug(x), images)


def test_mixup_or_cutmix():
    x, y = torch.zeros(64, 1, 8, 8), torch.eye(64)
    x[:] = torch.linspace(0, 1, 64).view(-1, 1, 1, 1)
    aug = Augment(mixup=0.5, cutmix=0.5)
    cut = 0
    for seed in range(40):
        images, soft = aug(x, torch.Generator().manual_seed(seed), labels=y)
        torch.testing.assert_close(soft.sum(1), torch.ones(64))
        torch.testing.assert_close(images.mean((1, 2, 3)), soft @ x[:, 0, 0, 0], rtol=0, atol=1e-5)
        cut += bool((images.flatten(1).amax(1) != images.flatten(1).amin(1)).any())
    assert 8 <= cut <= 32
    images, same = Augment(hflip=0.5)(x, labels=y)
    assert same is y
    for bad, error in (
        (dict(mixup=-1), ValueError),
        (dict(cutmix=float("nan")), ValueError),
        (dict(num_classes=0), ValueError),
    ):
        with pytest.raises(error):
            Augment(**bad)
    with pytest.raises(ValueError, match="do not mix"):
        aug(x, labels=y, masks=torch.zeros(64, 8, 8))
    with pytest.raises(ValueError, match="need num_classes"):
        aug(x, labels=torch.arange(64))


def test_draws_do_not_depend_on_the_default_dtype():
    x, drawn = pictures(64, 24, 31), []
    for dtype in (torch.float32, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            drawn.append([Augment.trivial().sample(x, seed=1), Augment.rand(3).sample(x, seed=1)])
        finally:
            torch.set_default_dtype(torch.float32)
    for one, other in zip(*drawn, strict=True):
        assert torch.equal(one.magnitudes, other.magnitudes)


def test_a_mixed_image_of_torchvision_stays_one():
    tensors = pytest.importorskip("torchvision.tv_tensors")
    images, labels = Augment(mixup=0.2, num_classes=3)(
        tensors.Image(pictures(2, 8, 8)), labels=torch.tensor([0, 2])
    )
    assert type(images) is tensors.Image and type(labels) is torch.Tensor


def test_operations_that_are_none_are_refused():
    x, number = pictures(2, 8, 8), torch.full((2, 1), 5)
    for operations, magnitude, error, words in (
        (number.float(), 1.0, TypeError, "operations of params must be whole numbers"),
        (number, float("nan"), ValueError, "magnitudes of params must be finite"),
    ):
        params = Params(operations=operations, magnitudes=torch.full((2, 1), magnitude))
        with pytest.raises(error, match=f"augment: {words}"):
            apply(x, params)
