"""Steps that a sample has by chance: the jitter of colours and the blur, as torchvision's RandomApply has
them.
"""

import io

import pytest
import torch

from fastreg.augment import Augment, apply

v2 = pytest.importorskip("torchvision.transforms.v2", reason='needs pip install "torch-fastreg[test]"')
T = pytest.importorskip(
    "torchvision.transforms.v2.functional", reason='needs pip install "torch-fastreg[test]"'
)

N = 4000
COLOURS = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1}


def pictures(count, dtype=torch.uint8, side=9):
    pixels = torch.randint(256, (count, 3, side, side + 2), generator=torch.Generator().manual_seed(0))
    return pixels.to(torch.uint8) if dtype == torch.uint8 else pixels.to(dtype) / 255


def both(**changes):
    arguments = {"blur": (3, (0.5, 2.0)), "jitter_chance": 0.8, "blur_chance": 0.3, **COLOURS}
    return Augment(**{**arguments, **changes})


def test_how_often_and_what():
    aug, every = both(), both(jitter_chance=1.0, blur_chance=1.0)
    x = pictures(1).expand(N, 3, 9, 11)
    p, q = aug.sample(x, seed=3), every.sample(x, seed=3)
    jittered, blurred = p.brightness != 1, p.sigma != 1 / 64
    for on, chance in ((jittered, 0.8), (blurred, 0.3), (jittered & blurred, 0.24)):
        assert abs(on.double().mean() - chance) < 4 * (chance * (1 - chance) / N) ** 0.5
    for name in COLOURS:  # all four, or none, and as strong as without a chance
        neutral = 0.0 if name == "hue" else 1.0
        want = torch.where(jittered, getattr(q, name), neutral)
        assert torch.equal(getattr(p, name), want)
    assert torch.equal(p.sigma[blurred], q.sigma[blurred])
    more = both(hflip=0.5, grayscale=0.4, erase=0.5).sample(x, seed=3)  # each draw on its own
    draws = [more.hflip != 0, more.grayscale != 0, more.erase[:, 2] > 0, jittered, blurred]
    draws += [q.brightness > q.brightness.median(), q.sigma > q.sigma.median()]
    together = torch.corrcoef(torch.stack(draws).double()) - torch.eye(len(draws))
    assert together.abs().max() < 4.5 / N**0.5


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
def test_a_sample_that_drew_nothing_stays(dtype):
    aug, x = both(), pictures(64, dtype)
    p = aug.sample(x, seed=1)
    got = apply(x, p)
    still = (p.brightness == 1) & (p.sigma == 1 / 64)
    assert still.any()
    bound = {torch.uint8: 0, torch.float32: 2e-6, torch.float64: 1e-14}[dtype]  # hue goes there and back
    assert (got[still].double() - x[still].double()).abs().max() <= bound
    assert torch.equal(apply(x, both(jitter_chance=0.0, blur_chance=0.0, hue=None).sample(x, seed=1)), x)
    torch.manual_seed(0)
    called = aug(x)
    torch.manual_seed(0)
    assert torch.equal(called, apply(x, aug.sample(x)))
    assert torch.equal(aug.eval()(x), x)


def test_the_other_samples_are_torchvisions():
    aug, x = both(grayscale=0.3, hflip=0.5), pictures(48, torch.float32)
    p = aug.sample(x, seed=5)
    got = apply(x, p)
    for i, image in enumerate(x):
        image = T.horizontal_flip(image) if p.hflip[i] else image
        if p.brightness[i] != 1:
            for name in COLOURS:
                image = getattr(T, f"adjust_{name}")(image, float(getattr(p, name)[i]))
        image = T.rgb_to_grayscale(image, 3) if p.grayscale[i] else image
        image = T.gaussian_blur(image, [3, 3], [float(p.sigma[i])]) if p.sigma[i] != 1 / 64 else image
        torch.testing.assert_close(got[i], image, rtol=0, atol=1e-4)


def test_by_the_index_alone_printed_saved_and_compiled():
    aug, x = both(), pictures(32)
    p = aug.sample(x, seed=2)
    part = aug.sample(x[7:12], seed=2, offset=7)
    assert torch.equal(part.sigma, p.sigma[7:12]) and torch.equal(part.hue, p.hue[7:12])
    assert "jitter_chance=0.8" in repr(aug) and "blur_chance=0.3" in repr(aug)
    assert repr(eval(repr(aug), {"Augment": Augment})) == repr(aug)
    file = io.BytesIO()
    torch.save(p, file)
    file.seek(0)
    assert torch.equal(apply(x, torch.load(file)), apply(x, p))
    step = torch.compile(aug, fullgraph=True, backend="aot_eager")
    torch.manual_seed(0)
    want = aug(x)
    torch.manual_seed(0)
    assert torch.equal(step(x), want)


def test_random_apply_of_torchvisions():
    recipe = [
        v2.RandomResizedCrop(24),
        v2.RandomApply([v2.RandomHorizontalFlip(0.5)], p=0.5),
        v2.RandomApply([v2.ColorJitter(*COLOURS.values())], p=0.8),
        v2.RandomGrayscale(0.2),
        v2.RandomApply(torch.nn.ModuleList([v2.GaussianBlur(5, (0.1, 2.0))]), p=0.5),
        v2.ToDtype(torch.float32, scale=True),
    ]
    aug = Augment.from_torchvision(v2.Compose(recipe))
    want = Augment(
        size=(24, 24), crop=(0.08, 1.0), antialias=True, hflip=0.25, jitter_chance=0.8, grayscale=0.2,
        **COLOURS, blur=(5, (0.1, 2.0)), blur_chance=0.5, dtype=torch.float32,
    )  # fmt: skip
    assert repr(aug) == repr(want) and aug.settings == want.settings
    assert aug(pictures(4, side=40)).shape == (4, 3, 24, 24)
    for within in ([v2.RandomRotation(5)], [v2.GaussianBlur(3), v2.GaussianBlur(3)]):
        with pytest.raises(ValueError, match="RandomApply must have one transform of RandomHorizontalFlip, "):
            Augment.from_torchvision([v2.RandomApply(within)])
    with pytest.raises(ValueError, match="ColorJitter stands after GaussianBlur"):
        Augment.from_torchvision([recipe[4], recipe[2]])


@pytest.mark.parametrize("name", ["jitter_chance", "blur_chance"])
def test_what_is_no_chance_is_refused(name):
    for wrong, error in ((1.5, ValueError), (-0.1, ValueError), ("x", TypeError)):
        with pytest.raises(error, match=f"{name} must be"):
            Augment(**{name: wrong})
