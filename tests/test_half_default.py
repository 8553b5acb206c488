"""Half precision as the default dtype: programs whose models, data and states are all made in it give what
torch gives, in torch's dtypes, and what torch has not trains.
"""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastreg as fr
from fastreg.augment import functional

THEIRS = SimpleNamespace(F=F, nn=nn, optim=torch.optim, clip=nn.utils.clip_grad_norm_)
OURS = SimpleNamespace(F=fr, nn=fr.nn, optim=fr.optim, clip=nn.utils.clip_grad_norm_)
LOSSES = {
    "plain": {},
    "smoothed": dict(label_smoothing=0.1),
    "sum": dict(reduction="sum"),
    "none": dict(reduction="none"),
}
DROPOUTS = ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout")
STEPS = {
    "SGD": dict(lr=0.1),
    "SGD momentum": dict(lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "SGD maximize": dict(lr=0.1, momentum=0.9, dampening=0.5, maximize=True),
    "AdamW": dict(lr=0.1),
    "AdamW amsgrad": dict(lr=0.1, amsgrad=True, weight_decay=0.1),
}


@pytest.fixture(params=[torch.float16, torch.bfloat16], ids=str, autouse=True)
def half(request):
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


def images():
    return torch.rand(4, 3, 8, 9)


def logits():
    return torch.randn(4, 3)


def labels():
    return torch.tensor([0, 2, 1, 2])


def network():
    return nn.Sequential(nn.Flatten(), nn.Linear(216, 3)).eval()


def of_loss(loss, z, *targets):
    z.requires_grad_()
    value = loss(z, *targets)
    return [value.detach(), *torch.autograd.grad(value.sum(), z)]


def steps(lib, name, compiled=False):
    p = nn.Parameter(torch.linspace(-1, 1, 7))
    optimizer = getattr(lib.optim, name.split()[0])([p], **STEPS[name])
    step = torch.compile(optimizer.step, backend="aot_eager") if compiled else optimizer.step
    for n in range(3):
        p.grad = torch.linspace(1, n + 0.5, 7)
        lib.clip([p], 1.0)
        step()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step()
    shown = {k: v for k, v in optimizer.state[p].items() if torch.is_tensor(v) and k != "momentum_started"}
    return [p.detach(), *shown.values()]


def programs():
    """What both can do, by name: a function of the namespace."""
    for name in DROPOUTS:
        shape = {"dropout1d": (3, 4, 5), "dropout3d": (2, 3, 4, 5, 2)}.get(name, (2, 3, 4, 5))
        for p, training in ((0.5, False), (0.0, True), (1.0, True)):
            yield (
                f"{name} {p} {training}",
                lambda lib, name=name, shape=shape, p=p, training=training: [
                    getattr(lib.F, name)(torch.rand(shape), p, training)
                ],
            )
    for name, options in LOSSES.items():
        yield (
            f"loss {name}",
            lambda lib, o=options: of_loss(lambda z, y: lib.F.cross_entropy(z, y, **o), logits(), labels()),
        )
        yield (
            f"module {name}",
            lambda lib, o=options: of_loss(
                lib.nn.CrossEntropyLoss(torch.tensor([0.5, 1, 2]), **o), logits(), labels()
            ),
        )
        yield (
            f"soft {name}",
            lambda lib, o=options: of_loss(
                lambda z, q: lib.F.cross_entropy(z, q, **o), logits(), torch.rand(4, 3)
            ),
        )
    for causal in (False, True):
        yield (
            f"attention {causal}",
            lambda lib, c=causal: of_loss(
                lambda q: lib.F.scaled_dot_product_attention(q, q, q, is_causal=c), torch.rand(2, 2, 5, 8)
            ),
        )
    for name in STEPS:
        yield name, lambda lib, name=name: steps(lib, name)
    yield "compiled SGD", lambda lib: steps(lib, "SGD momentum", compiled=True)
    yield "compiled AdamW", lambda lib: steps(lib, "AdamW", compiled=True)


PROGRAMS = dict(programs())


@pytest.mark.parametrize("name", PROGRAMS)
def test_what_torch_gives(name, half):
    results = []
    for lib in (OURS, THEIRS):
        torch.manual_seed(0)
        results.append(PROGRAMS[name](lib))
    close = dict(rtol=0.02, atol=2e-3) if half == torch.float16 else dict(rtol=0.05, atol=0.02)
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, **close)  # the dtype, too


def averaged(kind):
    p = nn.Parameter(torch.ones(5))
    optimizer = getattr(fr.optim, kind)([p], lr=0.1, l1=0.01, ema=0.9, ema_warmup=True, max_norm=1.0)
    p.grad = torch.ones(5)
    optimizer.step()
    return [p.detach(), optimizer.state[p]["ema"]]


def multi_task():
    total = fr.MultiTaskLoss({"a": "classification", "b": "regression"})
    loss = total({"a": F.cross_entropy(logits(), labels()), "b": F.mse_loss(logits(), logits())})
    return [g.to(torch.get_default_dtype()) for g in torch.autograd.grad(loss, list(total.parameters()))]


def autoencoder():
    encoder = nn.Sequential(nn.Linear(6, 4), nn.ReLU())
    _, losses = fr.pretrain_autoencoder(encoder, torch.rand(32, 6), epochs=20, batch_size=8)
    assert losses[-1] < losses[0]
    return [*encoder.parameters()]


def stopped():
    model = network()
    stopper = fr.EarlyStopping(model, patience=2)
    assert [stopper.step(loss) for loss in torch.tensor([1.0, 0.5, 0.7, 0.9])] == [False, False, False, True]
    stopper.restore()
    return [*model.parameters()]


OF_OURS = {
    "dropout": lambda: [fr.dropout(images(), 0.5), fr.drop_path(images(), 0.5), fr.nn.DropPath()(images())],
    "dropout_add": lambda: [
        fr.dropout_add(images(), images(), 0.5, torch.rand(9)), fr.nn.DropoutAdd(0.5)(images(), images())
    ],
    "mask": lambda: [fr.dropout_with_mask(images(), 0.5)[0]],
    "loss": lambda: of_loss(
        lambda z: fr.cross_entropy(z, labels(), label_smoothing=0.1, smoothing="others", z_loss=0.1), logits()
    ),
    "linear loss": lambda: of_loss(
        lambda h: fr.linear_cross_entropy(h, torch.rand(3, 3), labels()), logits()
    ),
    "pseudo labels": lambda: of_loss(
        lambda z: fr.pseudo_label_loss(z, 9 * logits(), threshold=0.6), logits()
    ),
    "SGD": lambda: averaged("SGD"),
    "AdamW": lambda: averaged("AdamW"),
    "attacks": lambda: [
        fr.fgsm(network(), images(), labels(), 0.1),
        fr.fgsm(network(), images(), labels(), 0.1, norm="l2", random_start=True),
        fr.pgd(network(), images(), labels(), 0.1, 0.03, 3),
        fr.pgd(network(), images(), labels(), 0.5, 0.2, 3, norm="l2", restarts=2),
        fr.fgsm_step(images(), images() - 0.5, 0.1, 0.05, 0.9),
    ],
    "adversarial loss": lambda: [fr.adversarial_loss(network(), images(), labels(), 0.1)],
    "free": lambda: [next(fr.FreeAdversarial(0.1)(images())).detach()],
    "robust": lambda: [images() * fr.robust_accuracy(network(), (images(), labels()), 0.1, steps=3)],
    "augment": lambda: [
        fr.augment.Augment(hflip=0.5, rotate=15, size=(6, 7), hue=0.05, erase=0.7)(images()),
        fr.augment.Augment.trivial()(images()),
        fr.augment.mixup(images(), labels(), num_classes=3)[0],
        fr.augment.cutmix(images(), labels(), num_classes=3)[0],
    ],
    "functional": lambda: [
        functional.rotate(images(), torch.rand(4)), functional.adjust_hue(images(), torch.rand(4) / 2),
        functional.adjust_contrast(images(), torch.rand(4)), functional.gaussian_blur(images(), 3, 0.7),
        functional.equalize(images()), functional.normalize(images(), (0.4, 0.5, 0.6), (0.2, 0.3, 0.7)),
    ],
    "several tasks": multi_task,
    "autoencoder": autoencoder,
    "early stopping": stopped,
}  # fmt: skip


@pytest.mark.parametrize("name", OF_OURS)
def test_what_torch_has_not(name, half):
    torch.manual_seed(0)
    for value in OF_OURS[name]():
        assert value.dtype == half and value.isfinite().all()


def test_numbers_about_a_model():
    """They are no part of it, and keep the digits."""
    assert fr.optim.penalty(network(), l1=0.1, l2=0.1).dtype == torch.float32
    assert fr.calibration_error(logits(), labels()).dtype == torch.float64
    assert 0 <= fr.optim.sparsity(network()) <= 1
