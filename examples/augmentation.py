"""Augmentation: twenty digits of each class, changed anew in every step, teach more than as they are."""

import torch
from torch import nn

import fastreg as fr
from fastreg.lecture.data import load

data = load(None)
chosen = torch.cat([(data.y_train == digit).nonzero()[:20, 0] for digit in range(10)])  # 200 digits
x, y = data.x_train[chosen].view(-1, 1, 28, 28), data.y_train[chosen]
x_test = data.x_test.view(-1, 1, 28, 28)
background = x.min().item()  # what comes into view at the border

policies = {
    "as they are": {},
    "a vertical stretch": dict(stretch=(0.8, 1.2)),
    "turn, stretch, shift, shear": dict(rotate=15, stretch=(0.8, 1.2), translate=(0.1, 0.1), shear=10),
}


def train(options, seed, steps=100):
    torch.manual_seed(seed)
    augment = fr.augment.Augment(**options, padding="fill", fill=background)
    first, second = nn.Conv2d(1, 16, 5, 2), nn.Conv2d(16, 32, 5, 2)
    model = nn.Sequential(augment, first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))
    optimizer = fr.optim.SGD(model.parameters(), lr=0.03, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        fr.cross_entropy(model(x), y).backward()
        optimizer.step()
    model.eval()  # the augmentation is off
    return 100 * (model(x_test).argmax(1) != data.y_test).double().mean().item()


for name, options in policies.items():
    errors = [train(options, seed) for seed in range(2)]
    print(f"{name:<28} test error {sum(errors) / 2:.1f} %  ({', '.join(f'{e:.1f}' for e in errors)})")
