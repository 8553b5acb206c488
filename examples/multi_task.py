"""Multi-task learning: one trunk for the digit, its parity and its slant, by fixed and learnt weights."""

import torch
from torch import nn

import fastreg as fr
from fastreg.lecture.data import load

data = load(None)
mean, std = data.x_train.mean(), data.x_train.std()
chosen = torch.cat([(data.y_train == digit).nonzero()[:20, 0] for digit in range(10)])  # 200 digits
ink, digit, side = data.x_train[chosen].view(-1, 28, 28), data.y_train[chosen], torch.arange(28.0)
x, x_test = (ink.flatten(1) - mean) / std, (data.x_test - mean) / std
down = side - (ink.sum(2) @ side / ink.sum((1, 2)))[:, None]  # of each row, from the centre of the ink
right = side - (ink.sum(1) @ side / ink.sum((1, 2)))[:, None]
slant = torch.einsum("nij,ni,nj->n", ink, down, right) / torch.einsum("nij,ni->n", ink, down**2)
slant = (slant - slant.mean()) / slant.std()


def train(seed, tasks):
    torch.manual_seed(seed)
    layers = [nn.Linear(784, 256), nn.ReLU(), fr.nn.Dropout(0.5), nn.Linear(256, 128), nn.ReLU()]
    trunk = nn.Sequential(fr.nn.Dropout(0.2), *layers, fr.nn.Dropout(0.5))
    heads = nn.ModuleList(nn.Linear(128, n) for n in (10, 2, 1))
    total = fr.MultiTaskLoss(tasks)
    optimizer = fr.optim.SGD(nn.ModuleList([trunk, heads, total]).parameters(), lr=0.02, momentum=0.9)
    for _ in range(300):
        hidden = trunk(x)
        a, b, c = (head(hidden) for head in heads)
        losses = fr.cross_entropy(a, digit), fr.cross_entropy(b, digit % 2), (c[:, 0] - slant).square().mean()
        optimizer.zero_grad()
        total(losses).backward()
        optimizer.step()
    return (heads[0](trunk.eval()(x_test)).argmax(1) != data.y_test).double().mean().item(), total.weights()


rows = {"alone": [1, 0, 0], "equal weights": [1, 1, 1], "learnt": ["classification"] * 2 + ["regression"]}
for name, tasks in rows.items():
    errors, weights = zip(*(train(seed, tasks) for seed in range(2)), strict=True)
    print(f"{name}: {sum(errors) / 2:.1%} of the digits wrong, weights {[round(w, 2) for w in weights[0]]}")
