"""The nearest pixel: that of torchvision's function of the same name, for images as for masks, by one number
as by one for each sample, eagerly as compiled.
"""

import math

import pytest
import torch
from augment_reference import plain_operators

from fastreg.augment import Augment, Params, Settings, apply
from fastreg.augment import functional as F

T = pytest.importorskip(
    "torchvision.transforms.v2.functional", reason='needs pip install "torch-fastreg[test]"'
)
geometry = pytest.importorskip(
    "torchvision.transforms.v2.functional._geometry", reason='needs pip install "torch-fastreg[test]"'
)
tv_tensors = pytest.importorskip("torchvision.tv_tensors", reason='needs pip install "torch-fastreg[test]"')

pytestmark = pytest.mark.usefixtures("rounded_grids")

SIZES = [(224, 224), (33, 47), (65, 65), (64, 40), (7, 12), (1, 5)]
# (angle, (along x, along y), scale, shear): whole lines of positions lie between two pixels of many of them.
MOVES = [
    *((angle, (0, 0), 1.0, (0, 0)) for angle in (90, 180, 270, 45, 135, 30, 60, 17.3, -90)),
    *((0, (0, 0), 1.0, shear) for shear in ((45, 0), (0, 45), (26.56505117707799, 0), (-45, 20))),
    *((0, (0, 0), scale, (0, 0)) for scale in (0.5, 2.0, 0.75)),
    (10, (3, -2), 1.25, (5, 45)),
]


def numbered(size):
    """An image of float32 of which every pixel has another value."""
    return torch.arange(1.0, size[0] * size[1] + 1).view(1, 1, *size)


def wanted(image, moves=MOVES):
    return torch.cat([T.affine(image, m[0], list(m[1]), m[2], list(m[3])) for m in moves])


def parameters(**changes):
    angle, translate, scale, shear = (torch.tensor([m[i] for m in MOVES]).double() for i in range(4))
    return Params(angle=angle, translate=translate, scale=scale, shear=shear, **changes)


@pytest.mark.parametrize("size", SIZES)
def test_affine_is_torchvisions(size):
    image = numbered(size)
    want = wanted(image)
    for i, (angle, translate, scale, shear) in enumerate(MOVES):
        one = F.affine(image, angle, translate, scale, shear)
        assert torch.equal(one, want[i : i + 1]), MOVES[i]
        mask = tv_tensors.Mask(image[0].int())
        assert torch.equal(F.affine(mask, angle, translate, scale, shear).int(), want[i].int()), MOVES[i]
    angle, translate, scale, shear = (torch.tensor([m[i] for m in MOVES]).double() for i in range(4))
    many = image.expand(len(MOVES), 1, *size)
    assert torch.equal(F.affine(many, angle, translate, scale, shear), want)
    with plain_operators():
        assert torch.equal(F.affine(many, angle, translate, scale, shear), want)


@pytest.mark.parametrize("dtype", (torch.float32, torch.uint8))
@pytest.mark.parametrize("size", SIZES)
def test_images_and_their_masks_take_the_same_pixels(size, dtype):
    image = numbered(size)
    image = (image % 251).to(torch.uint8) if dtype == torch.uint8 else image
    flips = torch.arange(len(MOVES)).remainder(2).double()
    p = parameters(hflip=flips, vflip=1 - flips, settings=Settings(interpolation="nearest"))
    turned = [
        T.affine(
            T.horizontal_flip(image) if flip else T.vertical_flip(image), m[0], list(m[1]), m[2], list(m[3])
        )
        for flip, m in zip(flips, MOVES, strict=True)
    ]
    for batch in (image.expand(len(MOVES), 1, *size), image.expand(len(MOVES), 3, *size)):
        moved = apply(batch, p, masks=batch[:, 0].int())
        assert torch.equal(moved.images, torch.cat(turned).expand(batch.shape))
        assert torch.equal(moved.masks.to(dtype), moved.images[:, 0])


def test_compiled_and_eager_are_one():
    x = numbered((33, 47)).repeat(len(MOVES), 1, 1, 1)
    p = parameters(settings=Settings(interpolation="nearest", size=(20, 31)))

    def both(x, masks):
        moved = apply(x, p, masks=masks)
        return moved.images, moved.masks

    eager = both(x, x[:, 0].int())
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")(x, x[:, 0].int())
    assert torch.equal(eager[0], compiled[0]) and torch.equal(eager[1], compiled[1])
    assert torch.equal(eager[0][:, 0].int(), eager[1])


def test_rotate_is_torchvisions():
    for size in SIZES:
        image = numbered(size)
        for angle in (90, 45, 180, 270, 30, 12.5):
            for expand in (False, True):
                if expand and min(size) == 1:
                    continue
                want = T.rotate(image, angle, expand=expand)
                assert torch.equal(F.rotate(image, angle, expand=expand), want), (size, angle, expand)
            assert torch.equal(F.rotate(image, torch.tensor([float(angle)])), T.rotate(image, angle))


def test_crops_are_torchvisions():
    image = numbered((40, 50))
    for height in (1, 2, 3, 7, 13, 24, 33):
        for out in (1, 2, 3, 5, 7, 13, 24, 33, 50):
            want = T.resized_crop(
                image, 3, 4, height, height + 5, [out, out + 2], T.InterpolationMode.NEAREST
            )
            got = F.resized_crop(image, 3, 4, height, height + 5, (out, out + 2), "nearest")
            assert torch.equal(got, want), (height, out)
            p = Params(
                crop=torch.tensor([[3.0, 4, height, height + 5]]),
                settings=Settings(size=(out, out + 2), interpolation="nearest"),
            )
            moved = apply(image, p, masks=image[:, 0].int())
            assert torch.equal(moved.images, want) and torch.equal(moved.masks, want[:, 0].int())


@pytest.mark.parametrize("flips", ({}, {"hflip": 0.5, "vflip": 0.5}))
def test_what_augment_draws(flips):
    aug = Augment(size=(24, 30), crop=(0.1, 1.0), interpolation="nearest", **flips)
    x = numbered((40, 51)).repeat(20, 1, 1, 1)
    torch.manual_seed(0)
    got, p = aug(x), aug.sample(x, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    assert torch.equal(got, apply(x, aug.sample(x)))
    moved = apply(x, p, masks=x[:, 0].long())
    assert torch.equal(moved.images[:, 0].long(), moved.masks)
    for i in range(len(x)):
        image = x[i]
        image = T.horizontal_flip(image) if flips and p.hflip[i] else image
        image = T.vertical_flip(image) if flips and p.vflip[i] else image
        box = [int(v) for v in p.crop[i]]
        want = T.resized_crop(image, *box, [24, 30], T.InterpolationMode.NEAREST)
        assert torch.equal(moved.images[i], want)


def test_fill_and_memory_format():
    x = torch.rand(2, 3, 9, 11).contiguous(memory_format=torch.channels_last)
    p = Params(
        crop=torch.tensor([[-2.0, -3, 20, 20]]).expand(2, 4),
        settings=Settings(size=(20, 20), interpolation="nearest", padding="fill", fill=(0.1, 0.2, 0.3)),
    )
    got = apply(x, p)
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(got[:, :, 2:11, 3:14], x)
    assert torch.equal(got[:, :, 0, 0], torch.tensor([[0.1, 0.2, 0.3]] * 2))
    whole = apply(
        (x * 255).byte(), Params(crop=p.crop, settings=Settings(**vars(p.settings) | {"fill": 99.6}))
    )
    assert (whole[:, :, 0, 0] == 100).all()


def test_gradient_goes_to_the_pixels_taken():
    x = torch.rand(1, 1, 12, 7, requires_grad=True)
    weight = torch.rand(1, 1, 12, 7)
    (F.rotate(x, 90) * weight).sum().backward()
    own, x.grad = x.grad, None
    (T.rotate(x, 90) * weight).sum().backward()
    torch.testing.assert_close(own, x.grad)


EVERY_DTYPE = (
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64,
    torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64,
)  # fmt: skip


@pytest.mark.parametrize("dtype", EVERY_DTYPE)
@pytest.mark.parametrize("largest", (1, 255, 2**15))
def test_mirrored_samples_of_a_batch(dtype, largest):
    """A batch of which some are mirrored is each of them mirrored, or not, and then turned, to the bit: small
    numbers, which move as bytes, and large ones, negative ones and NaNs, which do not.
    """
    torch.manual_seed(0)
    masks = torch.randint(0 if largest < 256 else -largest, largest + 1, (6, 2, 13, 17)).to(dtype)
    if dtype.is_floating_point:
        masks[:, :, 3, 4], masks[:, :, 3, 5] = math.nan, math.inf
    images, hflip, vflip = torch.rand(6, 3, 13, 17), torch.tensor([0.0, 1, 0, 1, 1, 0]), torch.arange(6) % 2.0
    turn = {"angle": torch.linspace(-40, 60, 6), "scale": torch.full((6,), 1.2)}
    for memory in (torch.contiguous_format, torch.channels_last):
        given = masks.contiguous(memory_format=memory)
        moved = apply(images, Params(hflip=hflip, vflip=vflip, **turn), masks=given)
        for i in range(6):
            own = {name: value[i : i + 1] for name, value in turn.items()}
            axes = [axis for axis, flip in ((-1, hflip), (-2, vflip)) if flip[i]]
            words = masks[i].view(getattr(torch, f"int{8 * masks.element_size()}"))
            mask = words.flip(axes) if axes else words  # which torch has for all of these
            want = apply(images[i], Params(**own), masks=mask.view(dtype)).masks
            assert torch.equal(moved.masks[i].view(words.dtype), want.view(words.dtype))


def test_on_this_processor_torchvisions_pixels_differ_only_between_two(monkeypatch):
    """Its own products round as the processor's library does. Elsewhere it and we take the exact pixel."""
    monkeypatch.undo()  # the fixture's
    rows, columns = size = (24, 31)
    image, compared = numbered(size), 0
    y, x = torch.meshgrid(
        torch.arange(rows).double() - (rows - 1) / 2,
        torch.arange(columns).double() - (columns - 1) / 2,
        indexing="ij",
    )
    for angle, translate, scale, shear in MOVES:
        numbers = angle, [float(t) for t in translate], scale, [float(s) for s in shear]
        a, b, c, d, e, f = geometry._get_inverse_affine_matrix([0.0, 0.0], *numbers)
        u, v = a * x + b * y + c + (columns - 1) / 2, d * x + e * y + f + (rows - 1) / 2
        i, j = u.round(), v.round()
        inside = (i >= 0) & (i < columns) & (j >= 0) & (j < rows)
        exact = torch.where(inside, 1 + i + columns * j, 0).float()
        clear = ((u - u.floor() - 0.5).abs() > 1e-4) & ((v - v.floor() - 0.5).abs() > 1e-4)
        for function in (F.affine, T.affine):
            moved = function(image, angle, list(translate), scale, list(shear))[0, 0]
            assert torch.equal(moved[clear], exact[clear]), (function, angle, shear)
        compared += int(clear.sum())
    assert compared > len(MOVES) * image.numel() / 2
