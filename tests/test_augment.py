"""Augment, its parameters and policies, mixup and cutmix: parameters depend on seed and global index alone
and have the distributions they should; all steps at once are the plain-torch definition's; batches, threads,
instruction sets and torch.compile change nothing; wrong arguments are errors.
"""

import copy
import dataclasses
import math
import pickle

import pytest
import torch
from augment_reference import assert_images, everything, pictures, reference, some_matrices
from helpers import on_each_instruction_set
from torch import nn
from torch.nn import functional as F

import fastreg as fr
from fastreg.augment import Augment, Params, Settings, _op, apply, cutmix, mixup
from fastreg.augment import functional as AF

NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_composition():
    """All steps at once are one resampling by the product of their matrices, then the colours, blur,
    normalise, erase.
    """
    x = pictures(6, 3, 33, 37)
    aug = everything()
    params = aug.sample(x, seed=11)
    assert_images(apply(x, params), reference(apply, x, params), torch.float32, 2e-4)
    byte = (x * 255).round().to(torch.uint8)
    assert_images(apply(byte, params), reference(apply, byte, params), torch.float32, 2e-4)


def test_sample_depends_on_seed_and_index_alone():
    x = pictures(40, 3, 25, 31)
    aug = everything(grayscale=0.5)
    params, images = aug.sample(x, seed=3), apply(x, aug.sample(x, seed=3))
    seed = torch.tensor([3])
    for begin, end in ((0, 1), (7, 9), (20, 40)):
        part = aug.sample(x[begin:end], seed=seed, offset=begin)
        for field in dataclasses.fields(Params):
            if field.name not in ("settings", "operations", "magnitudes"):
                assert torch.equal(getattr(part, field.name), getattr(params, field.name)[begin:end])
        assert torch.equal(apply(x[begin:end], part), images[begin:end])
    assert torch.equal(apply(x[5], aug.sample(x[5], seed=3, offset=5)), images[5])
    # What one step draws does not depend on the others.
    assert torch.equal(Augment(rotate=15).sample(x, seed=3).angle, params.angle)
    assert not torch.equal(aug.sample(x, seed=4).angle, params.angle)
    generator = torch.Generator().manual_seed(1)
    first = aug(x, generator)
    assert torch.equal(first, aug(x, generator=torch.Generator().manual_seed(1)))
    torch.manual_seed(5)
    first = aug(x)
    torch.manual_seed(5)
    assert torch.equal(first, aug(x)) and not torch.equal(first, aug(x))


def test_threads_do_not_matter():
    aug = everything()
    for batch in (1, 3, 17):
        for x in (
            pictures(batch, 3, 60, 70),
            pictures(batch, 3, 60, 70).contiguous(memory_format=torch.channels_last),
        ):
            # Smaller than the images of 60 x 70, and larger.
            for size in ((20, 30), (90, 80)):
                params = everything(size=size, antialias=True).sample(x, seed=2)
                images = []
                for threads in (1, 2, 3):
                    torch.set_num_threads(threads)
                    images.append(apply(x, params))
                assert torch.equal(images[0], images[1]) and torch.equal(images[0], images[2])
    assert aug.training


SCRIPT = """
import hashlib, torch, fastreg as fr
torch.manual_seed(0)
for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.uint8):
    for rule in ("bilinear zeros", "bilinear fill", "nearest reflect", "bicubic border"):
        interpolation, padding = rule.split()
        x = torch.rand(5, 3, 39, 45)
        x = (x * 255).to(dtype) if dtype == torch.uint8 else x.to(dtype)
        aug = fr.augment.Augment(rotate=40, scale=(.3, 1.4), hflip=.5, brightness=.3, contrast=.3,
                                 saturation=.3, hue=.2, blur=(5, (.1, 2)), interpolation=interpolation,
                                 padding=padding, fill=.5, antialias=True, size=(20, 37))
        y = fr.augment.apply(x, aug.sample(x, seed=1))
        print(hashlib.sha1(y.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest())
"""


def test_instruction_sets_give_the_same_bits():
    outputs = [printed.split() for printed in on_each_instruction_set(SCRIPT).values()]
    assert len(outputs[0]) == 20 and all(output == outputs[0] for output in outputs)


def uniform(values, low, high):
    """Within the range, and the Kolmogorov-Smirnov distance to the uniform distribution below its 1e-6
    quantile.
    """
    assert low <= values.min() and values.max() <= high
    u = ((values.double() - low) / (high - low)).sort().values
    n = len(u)
    rank = torch.arange(n, dtype=torch.float64)
    distance = torch.maximum((u - rank / n).abs().max(), ((rank + 1) / n - u).abs().max())
    assert distance < 2.7 / math.sqrt(n), distance


def test_distributions():
    n = 20000
    x = torch.empty(n, 0, 40, 60)  # no channels: only the shape counts
    params = everything(size=(30, 30)).sample(x, seed=0)
    uniform(params.angle, -15, 15)
    uniform(params.stretch, 0.8, 1.2)
    uniform(params.scale, 0.9, 1.1)
    uniform(params.shear[:, 0], -5, 5)
    assert (params.shear[:, 1] == 0).all()
    uniform(params.sigma, 0.1, 2.0)
    for name in ("brightness", "contrast", "saturation"):
        uniform(getattr(params, name), 0.7, 1.3)
    uniform(params.hue, -0.05, 0.05)
    for name, chance in (("hflip", 0.5), ("vflip", 0.3)):
        assert abs(getattr(params, name).mean() - chance) < 5 * math.sqrt(chance * (1 - chance) / n)
    erased = params.erase[:, 2] > 0
    assert abs(erased.double().mean() - 0.5) < 5 * 0.5 / math.sqrt(n)
    top, left, height, width = params.erase[erased].unbind(1)
    assert (
        (top + height <= 30).all()
        and (left + width <= 30).all()
        and (height < 30).all()
        and (width < 30).all()
    )
    share = height * width / 900
    assert 0.01 < share.min() < 0.03 and 0.3 < share.max() < 0.36
    for axis, most in ((0, 6), (1, 8)):
        shift = params.translate[:, axis]
        assert (shift == shift.round()).all() and shift.abs().max() == most
        counts = torch.bincount((shift + most).long())[1:-1]  # whole pixels, the two ends half as often
        assert (counts - counts.double().mean()).abs().max() < 5 * counts.double().mean().sqrt()
    top, left, height, width = params.crop.unbind(1)
    assert (
        (top >= 0).all() and (left >= 0).all() and (top + height <= 40).all() and (left + width <= 60).all()
    )
    assert (
        abs((height * width / 2400).min() - 0.3) < 0.02
        and (width / height).min() > 0.7
        and (width / height).max() < 1.4
    )
    names = ("angle", "scale", "stretch", "brightness", "hue", "sigma", "hflip", "vflip")
    table = torch.stack([*(getattr(params, name) for name in names), params.crop[:, 0], params.shear[:, 0]])
    correlation = torch.corrcoef(torch.cat([table[:, 1:], table[:, :-1]])).fill_diagonal_(0)
    assert correlation.abs().max() < 6 / math.sqrt(n), "columns, and neighbouring samples, are independent"


def test_windows():
    aug = Augment(size=32, crop=4)
    params = aug.sample(torch.empty(20000, 0, 32, 32), seed=1)
    for axis in (0, 1):
        counts = torch.bincount((params.crop[:, axis] + 4).long(), minlength=9)
        assert len(counts) == 9 and (counts - 20000 / 9).abs().max() < 5 * math.sqrt(20000 / 9)
    x = pictures(9, 3, 32, 32)
    params = aug.sample(x, seed=1)
    padded = F.pad(x, (4, 4, 4, 4))
    for i, (top, left, _, _) in enumerate(params.crop.long().tolist()):
        assert torch.equal(apply(x, params)[i], padded[i, :, top + 4 : top + 36, left + 4 : left + 36])


def test_crops_that_do_not_fit_are_taken_from_the_middle():
    params = Augment(size=8, crop=(0.9, 1.0)).sample(torch.empty(50, 3, 10, 100), seed=0)
    assert (params.crop == torch.tensor([0.0, 43.0, 10.0, 13.0])).all()


def test_eval_is_not_random():
    x = pictures(3, 3, 40, 50)
    aug = everything(crop=None).eval()
    want = F.interpolate(x.double(), (20, 30), mode="bilinear", align_corners=False)
    want = (want - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / torch.tensor([0.2, 0.2, 0.3]).view(3, 1, 1)
    assert_images(aug(x), want, tolerance=1e-5)
    assert torch.equal(Augment(size=(10, 20), crop=0).eval()(x), x[:, :, 15:25, 15:35])
    assert torch.equal(Augment(rotate=10).eval()(x), x)


def test_policies():
    x = pictures(4, 3, 32, 32, torch.uint8)
    y = Augment.cifar()(x)
    assert y.shape == (4, 3, 32, 32) and y.dtype == torch.float32 and y.min() < -1
    y = Augment.imagenet(size=64, hue=0.0)(pictures(2, 3, 90, 120))
    assert y.shape == (2, 3, 64, 64) and y.isfinite().all()


def test_module():
    aug = everything()
    x = pictures(4, 3, 33, 37)
    model = nn.Sequential(aug, nn.Flatten(), nn.Linear(3 * 20 * 30, 2))
    assert model(x).shape == (4, 2)
    for other in (copy.deepcopy(aug), pickle.loads(pickle.dumps(aug))):
        assert torch.equal(apply(x, other.sample(x, seed=1)), apply(x, aug.sample(x, seed=1)))
    assert "rotate=(-15.0, 15.0)" in repr(aug) and Augment().extra_repr() == ""
    assert torch.equal(Augment()(x), x)
    with torch.autocast("cpu", torch.bfloat16):
        assert aug(x).dtype == torch.float32
    with torch.inference_mode():
        assert aug(x).shape == (4, 3, 20, 30)


@pytest.mark.parametrize(
    "aug",
    (
        everything(), Augment.cifar(), Augment.imagenet(mixup=0.2, num_classes=10), Augment(),
        Augment(resize=30, size=24, crop="center", shear=(-1, 2, 3, 4), blur=((3, 5), (0.5, 1))),
    ),
)  # fmt: skip
def test_printed_it_can_be_made_again(aug):
    again = eval(repr(aug), {"Augment": Augment, "torch": torch})
    assert again.settings == aug.settings and again.mixing == aug.mixing and repr(again) == repr(aug)
    x = pictures(3, 3, 40, 40)
    assert torch.equal(apply(x, again.sample(x, seed=1)), apply(x, aug.sample(x, seed=1)))


@pytest.mark.parametrize("dynamic", (False, True))
def test_compile(dynamic):
    torch._dynamo.reset()
    aug = everything()
    compiled = torch.compile(lambda x: aug(x) * 2, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for batch in (3, 5):
        x = pictures(batch, 3, 33, 37)
        torch.manual_seed(1)
        got = compiled(x)
        torch.manual_seed(1)
        assert torch.equal(got, aug(x) * 2)


def test_compile_backward():
    torch._dynamo.reset()
    x = pictures(2, 3, 12, 13)
    params = everything(hue=None).sample(x, seed=1)
    grads = []
    for function in (apply, torch.compile(apply, fullgraph=True, backend="aot_eager")):
        leaf = x.clone().requires_grad_()
        function(leaf, params).square().sum().backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads) and grads[0].abs().max() > 0


def test_opcheck():
    x = pictures(2, 3, 9, 11)
    m, boxes = some_matrices(2, 9, 11), torch.tensor([[1, 2, 3, 4], [0, 0, 0, 0]])
    colour, blur = torch.full((2, 4), 0.4).double(), torch.full((2, 6), 1 / 3).double()
    windows = torch.tensor([[1, 1, 5, 6], [0, 0, 9, 11]])
    constants = [0.0] * 6 + [2.0] * 3 + [0.5] * 3
    for images in (x, x.contiguous(memory_format=torch.channels_last)):
        tensors = (m, colour, blur, boxes, windows)
        static = (constants, 7, 8, 3, 3, 15, 1, 0, True, True, torch.float32)
        torch.library.opcheck(torch.ops.fastreg.augment.default, (images, *tensors, *static))
        static = (constants, 7, 8, 3, 3, 7, 1, 0, True, True, torch.float32)
        torch.library.opcheck(
            torch.ops.fastreg.augment_backward.default, (torch.rand(2, 3, 7, 8), images, *tensors, *static)
        )
    one, two, four = torch.rand(4).double(), torch.rand(4, 2).double(), torch.rand(4, 4).double()
    for parameters in (
        (one, one, one, one, one, two, two, four),
        (None, None, one, None, four[:, 1], None, four[:, 1:3], None),
    ):
        torch.library.opcheck(torch.ops.fastreg.augment_matrices.default, (one, *parameters, 5, 6, 7, 8))
    torch.library.opcheck(_op.augment_gaussian, (one, four[:, 2], 3, 5))
    bounds = [1.0] * len(_op.COLUMNS)
    drawn = (
        x,
        torch.tensor([3]),
        5,
        4,
        [0.5] * 3,
        bounds,
        bounds,
        1,
        [0.1, 1.0, -0.3, 0.3, 0.0],
        [0.1, 0.3, -1.0, 1.0],
    )
    torch.library.opcheck(_op.augment_draw, (*drawn, [9, 9, 8, 8], 3, 5))


class _Digits(torch.utils.data.Dataset):
    def __len__(self):
        return 10

    def __getitem__(self, i):
        return torch.full((3, 8, 8), i, dtype=torch.uint8), i


@pytest.mark.parametrize("workers", (0, 2))
def test_data_loader(workers):
    loader = torch.utils.data.DataLoader(
        _Digits(), batch_size=4, num_workers=workers, collate_fn=Augment(hflip=0.5, mean=0.0, std=1.0).collate
    )
    seen = torch.cat([images[:, 0, 0, 0] * 255 for images, _ in loader])
    assert torch.allclose(seen, torch.arange(10.0), atol=1e-4)


def test_mixup():
    images, labels = torch.zeros(500, 3, 2, 2), torch.arange(500) % 10
    images += labels.view(-1, 1, 1, 1)
    targets = F.one_hot(labels, 10).double()
    mixed, soft = mixup(images, targets, alpha=0.5)
    assert torch.allclose(soft.sum(1), torch.ones(500).double()) and ((soft > 0).sum(1) <= 2).all()
    assert torch.allclose(mixed[:, 0, 0, 0].double(), soft @ torch.arange(10).double(), atol=1e-5)
    share = soft[torch.arange(500), labels]
    assert share.min() < 0.05 and share.max() > 0.95
    one, other = (
        mixup(images, labels, 1.0, 10, generator=torch.Generator().manual_seed(3))[0] for _ in range(2)
    )
    assert torch.equal(one, other)
    byte, soft = mixup(images.to(torch.uint8), labels, num_classes=10)
    assert byte.dtype == torch.uint8 and soft.dtype == torch.float32
    fr.cross_entropy(torch.randn(500, 10), soft)


def test_cutmix():
    images, labels = torch.zeros(300, 1, 8, 9), torch.arange(300) % 4
    images += labels.view(-1, 1, 1, 1)
    mixed, soft = cutmix(images, labels, num_classes=4)
    own = (mixed == labels.view(-1, 1, 1, 1)).double().mean((1, 2, 3))
    differs = soft[torch.arange(300), labels] < 1
    assert torch.allclose(soft[torch.arange(300), labels][differs].double(), own[differs], atol=1e-6)
    assert torch.allclose(soft.sum(1), torch.ones(300)) and differs.double().mean() > 0.5
    for image, label in zip(
        mixed[differs, 0], labels[differs], strict=True
    ):  # what is not the sample's own is one rectangle
        other = image != label
        assert torch.equal(other, other.any(1)[:, None] & other.any(0))


def test_empty_and_tiny():
    for shape in ((0, 3, 5, 6), (2, 0, 5, 6)):
        assert everything(mean=None, std=None, contrast=None, saturation=None, hue=None)(
            torch.empty(shape)
        ).shape == (
            *shape[:2],
            20,
            30,
        )
    assert everything()(torch.rand(2, 3, 1, 1)).isfinite().all()
    assert everything(size=None, crop=None)(torch.rand(2, 3, 1, 1)).shape == (2, 3, 1, 1)
    with pytest.raises(ValueError, match="no pixels"):
        Augment(size=4)(torch.empty(2, 3, 0, 5))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"hflip": 1.5}, "hflip must be in"),
        ({"vflip": NAN}, "vflip must be in"),
        ({"erase": -0.1}, "erase must be in"),
        ({"rotate": (10, -10)}, "lo <= hi"),
        ({"rotate": INF}, "finite"),
        ({"scale": (0, 1)}, "greater than 0"),
        ({"stretch": 1.2}, "stretch must be a pair"),
        ({"translate": (0.1, 1.2)}, "translate must be in"),
        ({"translate": 0.1}, "translate must be a pair"),
        ({"hue": 0.6}, "hue must be at most 0.5"),
        ({"hue": (-0.6, 0)}, "hue must be in"),
        ({"brightness": -0.5}, "brightness must be in"),
        ({"size": (0, 4)}, "size must be whole"),
        ({"size": 4.5}, "size must be whole"),
        ({"crop": (0, 1)}, "crop must be shares"),
        ({"crop": -1}, "crop must be in"),
        ({"blur": 3}, "blur must be"),
        ({"blur": (4, (1, 2))}, "must be odd"),
        ({"blur": (3, (-1, 2))}, "blur must be in"),
        ({"interpolation": "lanczos"}, "interpolation must be one of"),
        ({"padding": "wrap"}, "padding must be one of"),
        ({"fill": NAN}, "fill must be finite"),
        ({"dtype": torch.int32}, "dtype must be"),
        (
            {"dtype": torch.uint8, "std": 0.5},
            "dtype must be a floating-point dtype where mean or std is given",
        ),
    ],
)
def test_wrong_constructor(arguments, message):
    with pytest.raises(ValueError, match=message):
        Augment(**arguments)


def test_wrong_input():
    x = pictures(2, 3, 6, 7)
    with pytest.raises(TypeError, match="must be a torch"):
        Augment()([1])
    with pytest.raises(TypeError, match="int64"):
        apply(x.long(), Params())
    with pytest.raises(ValueError, match=r"must be \(B, C, H, W\)"):
        Augment()(x[None])
    with pytest.raises(ValueError, match=r"channels, height, width"):
        AF.rotate(x[0, 0], 3.0)
    with pytest.raises(ValueError, match="params are of 3 samples"):
        apply(x, Params(angle=torch.zeros(3)))
    for step in ("contrast", "saturation", "hue"):
        with pytest.raises(ValueError, match="1 or 3 channels"):
            Augment(**{step: 0.1})(pictures(2, 4, 5, 5))
        with pytest.raises(ValueError, match="1 or 3 channels"):
            getattr(AF, f"adjust_{step}")(pictures(2, 2, 5, 5), 0.1)
    with pytest.raises(ValueError, match="hue_factor must be in"):
        AF.adjust_hue(x, 0.7)
    with pytest.raises(ValueError, match="hue_factor must be finite and in"):
        AF.adjust_hue(x, torch.tensor([0.1, 0.7]))
    with pytest.raises(ValueError, match="one for each of 2 samples"):
        AF.rotate(x, torch.zeros(3))
    with pytest.raises(ValueError, match="scale must be finite and greater than 0"):
        AF.affine(x, 0, (0, 0), 0.0, 0)
    with pytest.raises(ValueError, match="window of sample 0 must lie inside"):
        AF.resized_crop(x, torch.zeros(2), 0, 7, 7, (3, 3))
    with pytest.raises(ValueError, match="one for each of 3 channels"):
        AF.normalize(x, (0.1, 0.2), 1.0)
    with pytest.raises(ValueError, match="std must not be 0"):
        AF.normalize(x, 0.1, (0.1, 0.0, 0.2))
    with pytest.raises(ValueError, match="does not fit"):
        Augment(size=20, crop=4)(x)
    with pytest.raises(ValueError, match="seed must be an int or one int64"):
        Augment(rotate=3).sample(x, seed=torch.zeros(2))
    with pytest.raises(TypeError, match="offset must be an int"):
        Augment(rotate=3).sample(x, seed=1, offset=0.5)
    with pytest.raises(ValueError, match="cannot become"):
        Augment(rotate=3, dtype=torch.uint8)(x)
    with pytest.raises(ValueError, match="num_classes"):
        mixup(x, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="alpha must be"):
        cutmix(x, torch.tensor([0, 1]), 0.0, 2)
    with pytest.raises(ValueError, match="targets"):
        mixup(x, torch.tensor([0, 1, 2]), num_classes=3)


def test_gallery():
    """One image under each step, of its size; a batch under a policy, in [0, 1]."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from fastreg.lecture import gallery

    for image in (pictures(1, 3, 40, 50, torch.uint8)[0], pictures(1, 1, 16, 16)[0]):
        shown = gallery.steps(image)
        assert all(pixels.shape == image.shape for _, pixels in shown) and torch.equal(shown[0][1], image)
        assert len({title for title, _ in shown}) == len(shown) == (14 if len(image) == 3 else 12)
        for title, pixels in shown[1:]:
            assert not torch.equal(pixels, image), title
    figure = gallery.figure(pictures(1, 3, 40, 50)[0], Augment.cifar(), columns=4)
    assert sum(len(axes.images) for axes in figure.axes) == 14 + 8


def calls(x, gamma=True):
    """Every function of fastreg.augment, with numbers and with tensors of one value per sample."""
    each, labels = (
        torch.full((len(x),), 0.3, device=x.device),
        torch.zeros(len(x), dtype=torch.long, device=x.device),
    )
    size = tuple(x.shape[2:])
    return (
        Augment.cifar(size=size)(x),
        Augment.imagenet(size=8)(x),
        Augment.imagenet(size=8).eval()(x),
        everything(size=None, translate=(0.1, 0.2), shear=(1, 2, 3, 4))(x),
        apply(x, Augment(hflip=0.5).sample(x, seed=3, offset=5)),
        apply(x, Params(settings=Settings(size=(4, 5)))),
        AF.rotate(x, each, "bilinear", center=(3.0, 2.0)),
        AF.rotate(x, 30.0, expand=True),
        AF.affine(x, 3, (each, 3), 1.1, (each, 2.0), fill=0.5),
        AF.resized_crop(x, 1, 2, 3, 4, 8),
        AF.resized_crop(x, each, 2, 3, 4, (8, 9), "nearest"),
        AF.adjust_brightness(x, each),
        AF.adjust_contrast(x, 0.5),
        AF.adjust_saturation(x, each),
        AF.adjust_hue(x, 0.1),
        AF.gaussian_blur(x, 3),
        AF.gaussian_blur(x, [3, 5], each),
        AF.erase(x, 1, each, 3, 4, 0.5),
        AF.normalize(x, [0.5] * 3, 0.5),
        AF.vertical_stretch(x, each),
        AF.horizontal_flip(x),
        *(mixup(x, labels, num_classes=10) if gamma else ()),
        *(cutmix(x, labels, num_classes=10) if gamma else ()),
    )


def draws_gamma():
    """Whether torch can draw from a gamma distribution here; on a pretended GPU torch 2.10 cannot."""
    try:
        torch._standard_gamma(torch.ones(2, device="cuda"))
    except RuntimeError:  # NotImplementedError, or what the attempt without a kernel for fakes ends in
        return False
    return True


def test_nothing_is_made_on_another_device():
    """On a GPU that is only pretended: every tensor is made on the images' device, and none is copied to or
    from it.
    """
    from torch._subclasses import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode

    class NoCopies(TorchDispatchMode):
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            result = f(*args, **kwargs)
            devices = {t.device.type for t in (*args, result) if isinstance(t, torch.Tensor)}
            assert "_local_scalar_dense" not in str(f) and not ("copy" in str(f) and len(devices) > 1), (
                f,
                args,
                kwargs,
            )
            return result

    with FakeTensorMode(allow_non_fake_inputs=True), NoCopies():
        for result in calls(torch.empty(4, 3, 12, 13, device="cuda"), draws_gamma()):
            assert result.device.type == "cuda"
    assert all(result.device.type == "cpu" for result in calls(pictures(4, 3, 12, 13)))


def test_a_sample_draws_by_its_index_wherever_it_is():
    """As on two ranks with a DistributedSampler, whose batches hold samples that are no neighbours."""
    augment = Augment(
        hflip=0.5, rotate=30, translate=(0.2, 0.2), crop=(0.3, 1.0), size=(5, 6), blur=(3, (1, 2))
    )
    x = torch.rand(12, 3, 9, 9)
    whole = apply(x, augment.sample(x, seed=4))
    order = torch.randperm(12)
    for part in (order[::2], order[1::2], order[:0]):
        assert torch.equal(apply(x[part], augment.sample(x[part], seed=4, index=part)), whole[part])
    assert torch.equal(apply(x[7], augment.sample(x[7], seed=4, index=torch.tensor([7]))), whole[7])
    for wrong, error, words in (
        (torch.arange(11), ValueError, r"index must be int64 of shape \(12,\)"),
        (torch.arange(12.0), ValueError, "index must be int64"),
        (torch.arange(12) - 1, ValueError, "index must be at least 0, got -1"),
        ([1] * 12, TypeError, "index must be a torch.Tensor"),
    ):
        with pytest.raises(error, match=words):
            augment.sample(x, seed=4, index=wrong)
    with pytest.raises(ValueError, match="offset or index, not both"):
        augment.sample(x, seed=4, index=torch.arange(12), offset=3)


def test_seed_and_offset_of_sample_are_checked():
    augment, x = fr.augment.Augment(rotate=20), torch.rand(3, 3, 8, 8)
    same = [augment.sample(x, seed=seed).angle for seed in (5, 5 + 2**64, torch.tensor([5]))]
    assert torch.equal(same[0], same[1]) and torch.equal(same[0], same[2])
    with pytest.raises(TypeError, match=r"Augment.sample: seed must be an int or an int64 tensor, got float"):
        augment.sample(x, seed=1.5)
    with pytest.raises(ValueError, match=r"Augment.sample: seed must be an int or one int64"):
        augment.sample(x, seed=torch.tensor([1.0]))
    with pytest.raises(ValueError, match=r"Augment.sample: offset must be at least 0, got -1"):
        augment.sample(x, seed=1, offset=-1)


def test_parameters_of_any_real_dtype():
    x = torch.rand(2, 3, 8, 9)
    for dtype in (torch.int64, torch.float32, torch.float16):
        p = Params(
            brightness=torch.tensor([1, 2]).to(dtype), sigma=torch.tensor([1, 3]).to(dtype),
            angle=torch.tensor([90, 4]).to(dtype), erase=torch.tensor([[1, 2, 3, 4]] * 2, dtype=torch.int32),
            hflip=torch.tensor([True, False]), settings=Settings(kernel=(3, 3)),
        )  # fmt: skip
        wide = {n: v.double() if n != "erase" else v.long() for n, v in vars(p).items() if torch.is_tensor(v)}
        assert torch.equal(apply(x, p), apply(x, Params(**wide, settings=p.settings)))
    for error, words, wrong in (
        (
            TypeError,
            r"brightness of params must be a tensor \(2,\) of real numbers, got int",
            {"brightness": 1},
        ),
        (ValueError, r"brightness of params must be of shape \(2,\)", {"brightness": torch.ones(2, 1)}),
        (ValueError, r"translate of params must be of shape \(2, 2\)", {"translate": torch.ones(2)}),
        (ValueError, r"params are of 3 samples \(hue\), images of 2", {"hue": torch.ones(3)}),
        (
            TypeError,
            r"erase of params must be whole numbers, got torch\.float32",
            {"erase": torch.ones(2, 4)},
        ),
    ):
        with pytest.raises(error, match=f"^augment: {words}"):
            apply(x, Params(**wrong))
