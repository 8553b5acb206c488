"""Typical code of a user, which a type checker must take as it stands. It is checked and never run."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastreg as fr
from fastreg.integrations.ignite import EarlyStopping as IgniteStopping
from fastreg.integrations.lightning import EarlyStopping as LightningStopping
from fastreg.integrations.transformers import EarlyStopping as TransformersStopping

model = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), fr.nn.Dropout(0.5), nn.Linear(256, 10))
x, y = torch.rand(32, 784), torch.randint(10, (32,))
loader: Iterable[tuple[Tensor, Tensor]] = [(x, y)]
generator = torch.Generator().manual_seed(0)

# Optimiser and penalties.
groups = fr.optim.penalty_groups(model, l1=1e-5, l2=1e-4, overrides={"3.*": dict(l1=0.0, lr=0.01)})
optimizer = fr.optim.SGD(groups, lr=torch.tensor(0.1), momentum=0.9, l1_mode="proximal")
optimizer = fr.optim.SGD(model.parameters(), 0.1, 0.9, nesterov=True, stochastic_rounding=True)
optimizer = fr.optim.SGD(model.named_parameters())
adamw = fr.optim.AdamW(groups, 1e-3, (0.9, 0.99), l1=1e-6, cautious=True, ema=0.999, max_norm=1.0)
with adamw.averaged():
    norm: Tensor | None = adamw.grad_norm
adamw.copy_averaged_to(model)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
objective: Tensor = F.cross_entropy(model(x), y) + fr.optim.penalty(optimizer)
objective = objective + fr.optim.penalty(model, l2=1e-4) + fr.optim.penalty([x, y], l1=1.0)
sigma: float = fr.optim.prior_scale(1e-4, "laplace", num_samples=1000)
share: float = fr.optim.sparsity(model) + fr.optim.sparsity(x)


# Attacks and adversarial training, with losses that give one number or one value per sample.
def margin(output: Tensor, target: Tensor) -> Tensor:
    return F.multi_margin_loss(output, target, reduction="none")


std = torch.tensor([0.2, 0.3, 0.4])
adversarial: Tensor = fr.fgsm(model, x, y, 8 / 255, loss=margin, bounds=None, norm="l2")
adversarial = fr.fgsm(model.forward, x, y, 0.1 / std, bounds=(-1 / std, 1 / std), generator=generator)
adversarial = fr.pgd(lambda z: model(z), x, y, 0.1, 0.01, 10, restarts=2, loss=nn.CrossEntropyLoss())
adversarial = fr.fgsm_step(x, x, 0.1, 0, 1)
adversarial = fr.fgsm_step(x, x, 0.1, bounds=(0, None))
objective = fr.adversarial_loss(model, x, y, 0.1, weight=1, random_start=True, loss=F.cross_entropy)
scaler = torch.amp.GradScaler("cpu")
objective = fr.adversarial_backward(model, x, y, 0.1, scale=scaler.scale)
for replayed in fr.FreeAdversarial(0.1, replays=4, bounds=(0, 1))(x):
    margin(model(replayed), y).mean().backward()
robust: float = fr.robust_accuracy(model, (x, y), 0.1, steps=10, restarts=2, generator=generator)
robust = fr.robust_accuracy(model, loader, 0.1, alpha=std)

# Calibration.
curve = fr.calibration_curve(model(x), y, bins=10)
wrong: Tensor = curve.confidence - curve.accuracy
error: float = fr.calibration_error(model(x), y, bins=10).item()

# Early stopping.
stopper = fr.EarlyStopping(model, optimizer, mode="max", patience=5, target=0.99, nan="stop")
for _ in range(10):
    if stopper.step(error) or stopper.step(torch.tensor(0.5)):
        break
stopper.restore()
best: float | None = stopper.best


def make() -> tuple[nn.Module, torch.optim.Optimizer]:
    fresh = nn.Linear(784, 10)
    return fresh, fr.optim.SGD(fresh.parameters())


def train_epoch(model: nn.Module, optimizer: torch.optim.Optimizer, loader: Iterable[list[Tensor]]) -> None:
    for inputs, labels in loader:
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()


trained, _ = fr.retrain(
    make, train_epoch, (x, y), (x, y), epochs=stopper, seed=0, batch_size=50, num_workers=2
)
trained, _ = fr.retrain(
    make,
    train_epoch,
    torch.utils.data.TensorDataset(x, y),
    [x, y],
    epochs=3,
    seed=0,
    batch_size=50,
)
LightningStopping("val_loss", patience=3, restore=False)
TransformersStopping("eval_loss", min_delta=0.1, relative=True)
IgniteStopping(lambda engine: 0.5, None, model, mode="min")

# Semi-supervised, multi-task, sharing.
objective = fr.pseudo_label_loss(model(x), model(x), threshold=0.9, hard=False)
objective, rate = fr.pseudo_label_loss(model(x), temperature=0.5, return_mask_rate=True)
encoder, history = fr.pretrain_autoencoder(
    model,
    x,
    fr.TiedDecoder(model),
    loss=F.mse_loss,
    optimizer=lambda p: torch.optim.Adam(p, lr=0.01),
    generator=generator,
)
last: float = history[-1]
total = fr.MultiTaskLoss({"digit": "classification", "ink": 0.3}, bounded=True)
objective = total({"digit": objective, "ink": objective})
total = fr.MultiTaskLoss(["classification", 1])
fr.share_parameters(model, "0.weight", "3.weight")
fr.unshare_parameters(model)
