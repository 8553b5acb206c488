"""torch.compile takes policies and mixtures whole, and gives what they give eagerly."""

import pytest
import torch

from fastreg.augment import Augment, apply


@pytest.fixture(autouse=True)
def fresh_graphs():
    """Each case compiles its own, so that torch counts no recompilations."""
    torch._dynamo.reset()


AROUND = {"size": 12, "crop": (0.1, 1.0), "hflip": 0.5, "mean": 0.5, "std": 0.2, "erase": 0.5}


@pytest.mark.parametrize("dtype", (torch.uint8, torch.float32))
@pytest.mark.parametrize("make", (Augment.trivial, Augment.rand))
@pytest.mark.parametrize("around", ({}, AROUND), ids=("alone", "recipe"))
def test_policies(make, around, dtype):
    x = torch.rand(16, 3, 15, 18)
    x = (x * 255).to(dtype) if dtype == torch.uint8 else x
    aug = make(fill=0.3 if dtype == torch.float32 else 7, **around)
    compiled = torch.compile(aug, fullgraph=True, backend="aot_eager")
    for seed in range(2):
        torch.manual_seed(seed)
        want = aug(x)
        torch.manual_seed(seed)
        assert torch.equal(compiled(x), want)


def test_gradient_of_a_policy():
    x = torch.rand(12, 3, 9, 11)
    aug = Augment.trivial()
    p = aug.sample(x, seed=0)
    p.operations[p.operations == 13] = 1  # equalize has no gradient
    weight, gradients = torch.rand_like(x), []
    for function in (apply, torch.compile(apply, fullgraph=True, backend="aot_eager")):
        leaf = x.clone().requires_grad_()
        (function(leaf, p) * weight).sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().sum() > 0


@pytest.mark.parametrize("mixing", ({"mixup": 0.3}, {"cutmix": 1.0}, {"mixup": 0.3, "cutmix": 1.0}))
def test_mixtures(mixing):
    x, labels = torch.rand(8, 3, 9, 10), torch.arange(8) % 5
    aug = Augment(hflip=0.5, num_classes=5, **mixing)
    images, soft = torch.compile(aug, fullgraph=True, backend="aot_eager")(x, labels=labels)
    assert images.shape == x.shape and soft.shape == (8, 5)
    torch.testing.assert_close(soft.sum(1), torch.ones(8))
    assert not torch.equal(images, x)
