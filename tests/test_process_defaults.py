"""Nothing that is drawn or made is of torch's default dtype, or on its default device: both belong to the
program, which may set them for its own models.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same_bits
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastreg as fr
from fastreg import _registry
from fastreg.augment import functional

X = torch.rand(4, 3, 8, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
Y = torch.tensor([0, 2, 1, 2])
Z = torch.randn(4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float32)
torch.manual_seed(0)
NET = nn.Sequential(
    nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 42, 3)
).eval()
MANY = dict(
    hflip=0.5, vflip=0.5, rotate=15, stretch=(0.8, 1.2), scale=(0.8, 1.2), translate=(0.1, 0.2), shear=5,
    size=(6, 7), crop=(0.3, 0.9), brightness=0.3, contrast=0.3, saturation=0.3, hue=0.05, padding="fill",
    fill=0.3, blur=(3, (0.1, 2.0)), erase=0.7, erase_value=(0.1, 0.2, 0.3), mean=(0.4, 0.5, 0.6),
    std=(0.2, 0.3, 0.4),
)  # fmt: skip


def gradients(loss, *leaves):
    return [loss, *torch.autograd.grad(loss, leaves)]


def stepped(**options):
    """Parameters after three steps, and the state."""
    p = Z.clone().requires_grad_()
    optimizer = fr.optim.SGD([p], lr=0.1, momentum=0.9, weight_decay=0.1, l1=0.01, **options)
    for _ in range(3):
        p.grad = p.detach().sin()
        optimizer.step()
    return [p.detach(), optimizer.state[p]["momentum_buffer"], fr.optim.penalty(optimizer).detach()]


def averaged(cls, **options):
    """Weights and averages after two steps, a checkpoint, and two more."""
    p, state = Z.clone().requires_grad_(), None
    for _ in range(2):
        optimizer = cls([p], lr=0.1, ema=0.9, ema_warmup=True, max_norm=1.0, **options)
        if state is not None:
            optimizer.load_state_dict(state)
        for _ in range(2):
            p.grad = p.detach().sin()
            optimizer.step()
        state = copy.deepcopy(optimizer.state_dict())
    return [p.detach(), optimizer.state[p]["ema"]]


def trained_autoencoder():
    encoder = copy.deepcopy(NET[4:])
    fr.pretrain_autoencoder(encoder, X[:, :, :7, :8].reshape(4, 168), epochs=2, batch_size=2)
    return list(encoder.parameters())


def multi_task():
    total = fr.MultiTaskLoss({"a": "classification", "b": "regression", "c": 0.3})
    loss = total({"a": Z.exp().mean(), "b": Z.square().mean(), "c": Z.abs().mean()})
    return [loss, *torch.autograd.grad(loss, list(total.parameters())), *total.parameters()]


def adversarially_trained():
    model = copy.deepcopy(NET)
    loss = fr.adversarial_loss(model, X, Y, 0.1)
    return gradients(loss, *model.parameters())


def leaf():
    return Z.clone().requires_grad_()


CASES = {
    "dropout": lambda: [fr.dropout(X, 0.3), fr.drop_path(X, 0.3), fr.dropout2d(X, 0.3)],
    "alpha_dropout": lambda: [fr.alpha_dropout(X, 0.3), fr.feature_alpha_dropout(X, 0.3)],
    "dropout_with_mask": lambda: [*fr.dropout_with_mask(X, 0.3), *fr.dropout_with_mask(X, 0.3, seed=3)],
    "dropout_add": lambda: [fr.dropout_add(X, X, 0.3, X[0, 0, 0])],
    "cross_entropy": lambda: gradients(fr.cross_entropy(z := leaf(), Y, label_smoothing=0.1), z),
    "cross_entropy others": lambda: gradients(
        fr.cross_entropy(z := leaf(), Y, Z[0].abs(), label_smoothing=0.1, smoothing="others", z_loss=0.1), z
    ),
    "cross_entropy soft": lambda: gradients(fr.cross_entropy(z := leaf(), Z.softmax(1)), z),
    "linear_cross_entropy": lambda: gradients(
        fr.linear_cross_entropy(z := leaf(), Z, Y, label_smoothing=0.1), z
    ),
    "pseudo_label_loss": lambda: list(
        fr.pseudo_label_loss(3 * Z, 9 * Z, threshold=0.6, return_mask_rate=True)
    ),
    "soft pseudo_label_loss": lambda: [fr.pseudo_label_loss(3 * Z, 9 * Z, threshold=0.6, hard=False)],
    "sgd": stepped,
    "sgd proximal": lambda: stepped(l1_mode="proximal", decoupled=True),
    "sgd averaged": lambda: averaged(fr.optim.SGD, momentum=0.9),
    "adamw averaged": lambda: averaged(fr.optim.AdamW, l1=0.01),
    "attention": lambda: [fr.scaled_dot_product_attention(X, X, X, None, 0.3, is_causal=True)],
    "penalty": lambda: [fr.optim.penalty([]), fr.optim.penalty(Z, l1=0.1, l2=0.3)],
    "fgsm": lambda: [fr.fgsm(NET, X, Y, 0.1), fr.fgsm(NET, X, Y, 0.1, norm="l2", random_start=True)],
    "pgd": lambda: [fr.pgd(NET, X, Y, X[0, :, 0, 0], 0.03, 3, restarts=2)],
    "pgd l2": lambda: [fr.pgd(NET, X, Y, 0.5, 0.2, 3, norm="l2")],
    "fgsm_step": lambda: [fr.fgsm_step(X, X - 0.5, 0.1, 0.05, 0.9)],
    "adversarial_loss": adversarially_trained,
    "free": lambda: [next(fr.FreeAdversarial(0.1)(X)).detach()],
    "robust_accuracy": lambda: [X[0] * fr.robust_accuracy(NET, (X, Y), 0.1, steps=3)],
    "mixup": lambda: list(fr.augment.mixup(X, Y, 0.4, num_classes=3)),
    "mixup uint8": lambda: list(fr.augment.mixup((X * 255).byte(), Z.softmax(1))),
    "cutmix": lambda: list(fr.augment.cutmix(X, Y, num_classes=3)),
    "Augment": lambda: [fr.augment.Augment(**MANY)(X)],
    "Augment uint8": lambda: [fr.augment.Augment(**MANY)((X * 255).byte())],
    "Augment in evaluation": lambda: [fr.augment.Augment(**MANY).eval()(X)],
    "Augment bicubic": lambda: [fr.augment.Augment(size=5, interpolation="bicubic", antialias=True)(X)],
    "Augment.sample": lambda: [
        value
        for value in vars(fr.augment.Augment(**MANY).sample(X, seed=3)).values()
        if isinstance(value, torch.Tensor)
    ],
    "functional geometry": lambda: [
        functional.rotate(X, 13.3),
        functional.affine(X, 13.3, (1, 2), 1.1, (3.3, 4.4)),
        functional.resized_crop(X, 1, 2, 5, 4, (7, 6)),
        functional.vertical_stretch(X, 1.13),
    ],
    "functional colour": lambda: [
        functional.adjust_brightness(X, 1.13),
        functional.adjust_contrast(X, 1.13),
        functional.adjust_saturation(X, 1.13),
        functional.adjust_hue(X, 0.13),
        functional.gaussian_blur(X, 3, 0.7),
        functional.normalize(X, (0.4, 0.5, 0.6), (0.2, 0.3, 0.7)),
    ],
    "functional.erase": lambda: [
        functional.erase(X, 1, 1, 4, 4, 0.3),
        functional.erase(X.clone(), 1, 1, 4, 4, [0.1, 0.2, 0.3], inplace=True),
        functional.erase(X, 1, 1, 4, 4, (0.1, 0.2, 0.3)),
    ],
    "MultiTaskLoss": multi_task,
    "calibration": lambda: [fr.calibration_error(Z, Y), *fr.calibration_curve(Z, Y, bins=3)],
    "pretrain_autoencoder": trained_autoencoder,
}  # fmt: skip


class Plain(TorchDispatchMode):
    """The operators run as they do on a device without kernels."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().split("::")[1].split(".")[0]
        ours = function.namespace == "fastreg" and name in _registry.declared()
        plain = _registry.plain_definition(name) if ours else None
        return (plain or function)(*args, **(kwargs or {}))


@pytest.fixture
def default_dtype():
    yield torch.set_default_dtype
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float64), ids=str)
@pytest.mark.parametrize("plain", (False, True), ids=("kernels", "plain"))
@pytest.mark.parametrize("name", CASES)
def test_another_default_dtype_changes_no_bit(default_dtype, name, plain, dtype):
    def run():
        torch.manual_seed(0)
        if not plain:
            return CASES[name]()
        with Plain():
            return CASES[name]()

    want = run()
    default_dtype(dtype)
    got = run()
    default_dtype(torch.float32)
    for a, b in zip(got, want, strict=True):
        assert_same_bits(a, b, name)


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("MultiTaskLoss", "penalty")])
def test_another_default_device_changes_no_bit(name):
    """A module's parameters and an empty sum are on the default device, as torch's are; nothing else is."""
    torch.manual_seed(0)
    want = CASES[name]()
    with torch.device("meta"):
        torch.manual_seed(0)
        got = CASES[name]()
    for a, b in zip(got, want, strict=True):
        assert_same_bits(a, b, name)


def test_the_learnt_variances_are_float32_whatever_the_default(default_dtype):
    default_dtype(torch.bfloat16)
    total = fr.MultiTaskLoss(["regression"])
    assert [p.dtype for p in total.parameters()] == [torch.float32]
    assert F.mse_loss(Z, Z).dtype == total([F.mse_loss(Z, Z)]).dtype == torch.float32
