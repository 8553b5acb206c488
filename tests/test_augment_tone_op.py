"""The operators that policies are made of: a step for each sample, and the words that it is drawn by."""

import pytest
import torch
from helpers import assert_same_bits

import fastreg as fr
from fastreg.augment._plain_draw import augment_words as words_plain
from fastreg.augment._tone_op import OPERATIONS, augment_tones_plain

tones = torch.ops.fastreg.augment_tones.default
words = torch.ops.fastreg.augment_words.default
EVERY = torch.arange(len(OPERATIONS)).repeat(3)

# Sides below 3 have no inner pixel; 31 and 513 end within a vector and just behind a block.
SIDES = [(1, 1), (2, 9), (3, 3), (31, 33), (5, 513), (64, 64)]


def drawn(*shape, levels=256, low=0):
    return torch.randint(low, low + levels, shape, dtype=torch.uint8)


def strengths_of(steps):
    """Factors in [0.01, 1.99]; of posterize 0 to 8 bits."""
    strengths = torch.rand(len(steps), dtype=torch.float64) * 1.98 - 0.99
    bits = torch.randint(0, 9, (len(steps),)).double()
    return torch.where(steps == OPERATIONS.index("Posterize"), bits, strengths)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("sides", SIDES)
def test_the_kernels_do_what_the_definition_does(sides, channels, last):
    """Of any levels, of few, and of one, which has no contrast."""
    for levels, low in ((256, 0), (60, 90), (1, 7)):
        images = drawn(len(EVERY), channels, *sides, levels=levels, low=low)
        if last:
            images = images.contiguous(memory_format=torch.channels_last)
        before, strengths = images.clone(), strengths_of(EVERY)
        got = tones(images, EVERY, strengths)
        assert got.stride() == torch.empty_like(images).stride()
        assert_same_bits(got, augment_tones_plain(images, EVERY, strengths), f"{levels} levels")
        assert_same_bits(images, before, "the images")


def test_strengths_far_from_what_policies_draw():
    images, strength = drawn(7, 3, 9, 11), torch.tensor([0, 5.0, 255.0, -1.0, -0.5, 1e6, 1e-9]).double()
    for name in ("Brightness", "Color", "Contrast", "Sharpness", "Solarize"):
        if name == "Solarize":
            strength = torch.tensor([-3.0, 0, 1e-9, 0.5, 1.0, 1.0, 0.999]).double()
        steps = torch.full((7,), OPERATIONS.index(name))
        want = augment_tones_plain(images, steps, strength)
        assert_same_bits(tones(images, steps, strength), want, name)


def test_a_sample_does_not_depend_on_its_batch():
    images, strengths = drawn(len(EVERY), 3, 12, 10), strengths_of(EVERY)
    whole = tones(images, EVERY, strengths)
    for i in range(len(EVERY)):
        one = slice(i, i + 1)
        assert_same_bits(tones(images[one], EVERY[one], strengths[one]), whole[one], OPERATIONS[EVERY[i]])


def test_any_number_of_threads():
    images, strengths = drawn(len(EVERY), 3, 120, 100), strengths_of(EVERY)
    alone = tones(images, EVERY, strengths)
    torch.set_num_threads(3)
    assert_same_bits(tones(images, EVERY, strengths), alone, "three threads")


def test_images_with_gaps():
    """The policy makes them dense; the operator says so."""
    images = drawn(6, 3, 16, 40)[..., ::2]
    augment = fr.augment.Augment.trivial()
    params = augment.sample(images, seed=3)
    assert_same_bits(
        fr.augment.apply(images, params), fr.augment.apply(images.contiguous(), params), "with gaps"
    )
    with pytest.raises(ValueError, match=r"augment_tones: images must be contiguous or channels last; call"):
        tones(images, EVERY[:6], strengths_of(EVERY[:6]))


def test_nothing():
    for shape in ((0, 3, 4, 4), (2, 3, 0, 4), (2, 1, 4, 0)):
        steps = EVERY[: shape[0]]
        assert tones(drawn(*shape), steps, strengths_of(steps)).shape == shape
    assert words(torch.tensor(3), torch.arange(0), 0, 2).shape == (0, 2, 4)
    assert words(torch.tensor(3), torch.arange(2), 0, 0).shape == (2, 0, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"images": torch.zeros(2, 3, 4, 4)},
            r"images must be uint8 \(B, C, H, W\) with 1 or 3 channels, got",
        ),
        ({"images": drawn(2, 2, 4, 4)}, r"1 or 3 channels, got .* of shape \(2, 2, 4, 4\)"),
        ({"steps": torch.tensor([0])}, r"steps must be a contiguous int64 tensor of \(2,\)"),
        ({"steps": torch.tensor([0, 15])}, r"a step must be in \[0, 15\), got 15 at sample 1"),
        ({"steps": torch.tensor([-1, 0])}, r"a step must be in \[0, 15\), got -1 at sample 0"),
        ({"strengths": torch.zeros(2)}, r"strengths must be a contiguous float64 tensor of \(2,\)"),
        ({"strengths": torch.tensor([0.0, torch.nan]).double()}, r"got nan at sample 1"),
        ({"steps": torch.tensor([10, 0])}, r"posterize keeps 0 to 8 bits, got -0.5 at sample 0"),
        (
            {"steps": torch.tensor([0, 11]), "strengths": torch.tensor([0.0, 1.5]).double()},
            r"a threshold of solarize must be at most 1, got 1.5 at sample 1",
        ),
        (
            {"steps": torch.tensor([0, 9]), "strengths": torch.tensor([0.0, -1.5]).double()},
            r"a strength of sharpness must be at least -1, got -1.5 at sample 1",
        ),
    ],
)
def test_refused(change, message):
    given = {
        "images": drawn(2, 3, 4, 4),
        "steps": torch.tensor([0, 6]),
        "strengths": torch.tensor([-0.5, 0.5]).double(),
    }
    with pytest.raises(ValueError, match="augment_tones: .*" + message):
        tones(*(given | change).values())


def test_words_are_those_of_the_definition():
    index = torch.tensor([0, 1, 2**32 - 1, 2**32, 2**40 + 7])
    for seed in (0, -1, 2**62 + 5):
        given = torch.tensor([seed]), index, 44, 3
        assert_same_bits(words(*given), words_plain(*given), f"seed {seed}")
    with pytest.raises(ValueError, match="augment_words: index must be contiguous int64"):
        words(torch.tensor(1), index.float(), 0, 1)
    with pytest.raises(ValueError, match=r"augment_words: draws must be whole numbers in \[0, 2\^31\]"):
        words(torch.tensor(1), index, -1, 1)
    with pytest.raises(ValueError, match="augment_words: seed must be one int64"):
        words(torch.tensor([1, 2]), index, 0, 1)


def test_opcheck():
    torch.library.opcheck(tones, (drawn(5, 3, 4, 5), EVERY[5:10], strengths_of(EVERY[5:10])))
    torch.library.opcheck(words, (torch.tensor([3]), torch.arange(4), 44, 2))
