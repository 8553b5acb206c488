"""Mistakes that users make: each gives one line that names the function, what it wants, what it got, and the
way out.
"""

import inspect
import re

import numpy as np
import pytest
import torch
from torch import nn

import fastreg as fr

X, Y, IMAGES = torch.rand(2, 3), torch.tensor([0, 1]), torch.rand(2, 3, 4, 4)
MODEL = nn.Linear(3, 3)
ENCODER = nn.Linear(3, 2)

# Every public function that takes a generator, called where it is used.
GENERATORS = {
    "dropout": lambda g: fr.dropout(X, generator=g),
    "dropout1d": lambda g: fr.dropout1d(IMAGES[0], generator=g),
    "dropout2d": lambda g: fr.dropout2d(IMAGES, generator=g),
    "dropout3d": lambda g: fr.dropout3d(IMAGES[None], generator=g),
    "alpha_dropout": lambda g: fr.alpha_dropout(X, training=True, generator=g),
    "feature_alpha_dropout": lambda g: fr.feature_alpha_dropout(IMAGES, training=True, generator=g),
    "drop_path": lambda g: fr.drop_path(X, generator=g),
    "dropout_with_mask": lambda g: fr.dropout_with_mask(X, generator=g),
    "dropout_add": lambda g: fr.dropout_add(X, X, generator=g),
    "scaled_dot_product_attention": lambda g: fr.scaled_dot_product_attention(
        X, X, X, None, 0.5, generator=g
    ),
    "augment.Augment": lambda g: fr.augment.Augment(hflip=0.5)(IMAGES, generator=g),
    "augment.Augment.sample": lambda g: fr.augment.Augment(hflip=0.5).sample(IMAGES, generator=g),
    "augment.mixup": lambda g: fr.augment.mixup(IMAGES, Y, num_classes=2, generator=g),
    "augment.cutmix": lambda g: fr.augment.cutmix(IMAGES, Y, num_classes=2, generator=g),
    "fgsm": lambda g: fr.fgsm(MODEL, X, Y, 0.1, random_start=True, generator=g),
    "pgd": lambda g: fr.pgd(MODEL, X, Y, 0.1, 0.1, 1, generator=g),
    "adversarial_loss": lambda g: fr.adversarial_loss(MODEL, X, Y, 0.1, random_start=True, generator=g),
    "robust_accuracy": lambda g: fr.robust_accuracy(MODEL, (X, Y), 0.1, steps=1, generator=g),
    "pretrain_autoencoder": lambda g: fr.pretrain_autoencoder(ENCODER, X, epochs=1, generator=g),
}


@pytest.mark.parametrize("wrong", [3, "cpu", torch.manual_seed], ids=["number", "text", "function"])
@pytest.mark.parametrize("name", GENERATORS)
def test_what_is_no_generator(name, wrong):
    op = name.removeprefix("augment.").partition(".")[0].replace("Augment", "augment")
    with pytest.raises(
        TypeError, match=rf"^{op}: generator must be a torch\.Generator, got {type(wrong).__name__}; .*seed"
    ):
        GENERATORS[name](wrong)


@pytest.mark.parametrize("name", GENERATORS)
def test_a_generator_is_taken(name):
    first, second = (GENERATORS[name](torch.Generator().manual_seed(1)) for _ in range(2))
    assert type(first) is type(second)


def test_no_function_with_a_generator_is_forgotten():
    public = {name: getattr(fr, name) for name in fr.__all__}
    public |= {f"augment.{name}": getattr(fr.augment, name) for name in fr.augment.__all__}
    for name, value in public.items():
        if inspect.isfunction(value) and "generator" in inspect.signature(value).parameters:
            assert name in GENERATORS


OPTIMIZER = fr.optim.SGD

MISTAKES = [
    (
        lambda: fr.optim.penalty_groups(MODEL.parameters()),
        "penalty_groups: model must be a torch.nn.Module, .* got generator; give the model itself",
    ),
    (
        lambda: fr.optim.prior_scale([1e-4, 1.0]),
        "prior_scale: value must be one number, got list of 2; call it",
    ),
    (
        lambda: fr.optim.prior_scale(torch.ones(3)),
        r"prior_scale: value must be one number, got Tensor of shape \(3,\); call it for each",
    ),
    (
        lambda: fr.optim.prior_scale(np.ones((2, 1))),
        r"prior_scale: value .* got ndarray of shape \(2, 1\); call",
    ),
    (
        lambda: fr.optim.prior_scale(0.1, num_samples=torch.ones(2)),
        "prior_scale: num_samples must be one number",
    ),
    (
        lambda: fr.optim.SGD(MODEL, lr=0.1),
        r"SGD: params must be .*, got Linear; give model\.parameters\(\) or",
    ),
    (
        lambda: fr.optim.SGD(MODEL.parameters, lr=0.1),
        r"SGD: params must be .*, got the method parameters, which was not called; give model\.param",
    ),
    (lambda: OPTIMIZER(MODEL.parameters(), l2=0.1), "SGD: arguments must be .*, got 'l2'; use weight_decay$"),
    (lambda: OPTIMIZER(MODEL.parameters(), L1=0.1), "SGD: arguments must be .*, got 'L1'; use l1$"),
    (lambda: OPTIMIZER(MODEL.parameters(), momentun=0.1), "SGD: .* got 'momentun'; use momentum$"),
    (lambda: OPTIMIZER(MODEL.parameters(), zzz=0.1), "SGD: .* got 'zzz'; leave it out$"),
    (
        lambda: fr.EarlyStopping(MODEL, 5),
        "EarlyStopping: .* got an int; pass every model .* by name, such as patience=5$",
    ),
    (
        lambda: fr.EarlyStopping(MODEL, "max"),
        "EarlyStopping: .* got a str; pass every model .* by name, such as mode='max'$",
    ),
    (lambda: fr.EarlyStopping(MODEL, nn.Linear), "EarlyStopping: .* got the class Linear; .* by name$"),
    (
        lambda: fr.EarlyStopping(MODEL, patince=5),
        "EarlyStopping: arguments must be .* got 'patince'; use patience$",
    ),
]
for what in ([0.1] * 3, (0.1,) * 3, np.full(3, 0.1)):
    text = rf"eps must be a number or a tensor, got {type(what).__name__}; make it one with torch\.as_tensor"
    MISTAKES += [
        (lambda e=what: fr.fgsm(MODEL, X, Y, e), f"fgsm: {text}"),
        (lambda e=what: fr.pgd(MODEL, X, Y, e, 0.1, 1), f"pgd: {text}"),
        (lambda e=what: fr.adversarial_loss(MODEL, X, Y, e), f"adversarial_loss: {text}"),
        (lambda e=what: fr.adversarial_backward(MODEL, X, Y, e), f"adversarial_backward: {text}"),
        (lambda e=what: fr.robust_accuracy(MODEL, (X, Y), e, steps=1), f"robust_accuracy: {text}"),
        (lambda e=what: next(fr.FreeAdversarial(e, replays=2)(X)), f"FreeAdversarial: {text}"),
        (lambda e=what: fr.fgsm_step(X, X, e, 0.0, 1.0), f"fgsm_step: {text}"),
    ]


@pytest.mark.parametrize(("call", "text"), MISTAKES, ids=[text[:40] for _, text in MISTAKES])
def test_one_line_that_says_what_to_do(call, text):
    with pytest.raises(TypeError) as caught:
        call()
    assert re.match(text, str(caught.value)), str(caught.value)
    assert "\n" not in str(caught.value)


def test_prior_scale_takes_tensors_of_one_number():
    for one in (torch.tensor(4), np.float32(4), np.array([4.0]), torch.tensor([4.0])):
        assert fr.optim.prior_scale(one, num_samples=one) == fr.optim.prior_scale(4.0, num_samples=4) == 0.25


def test_the_constructors_keep_their_signatures():
    assert list(inspect.signature(fr.optim.SGD).parameters)[:2] == ["params", "lr"]
    assert "patience" in inspect.signature(fr.EarlyStopping).parameters
