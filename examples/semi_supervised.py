"""Pseudo-labels: 100 labelled digits and 2,000 whose labels are not used, against the 100 alone."""

import torch
from torch import nn

import fastreg as fr
from fastreg.lecture.data import load

data = load(None)
mean, std = data.x_train.mean(), data.x_train.std()
labelled = torch.cat([(data.y_train == digit).nonzero()[:10, 0] for digit in range(10)])
x, y = (data.x_train[labelled] - mean) / std, data.y_train[labelled]
unlabelled = (torch.cat([data.x_train, data.x_validation]) - mean) / std
x_test = (data.x_test - mean) / std


def test_error(seed, weight):
    torch.manual_seed(seed)
    layers = [nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10)]
    drop = (fr.nn.Dropout(p) for p in (0.2, 0.5, 0.5))
    model = nn.Sequential(next(drop), *layers[:2], next(drop), *layers[2:4], next(drop), layers[4])
    optimizer = fr.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    for _ in range(200):
        batch = unlabelled[torch.randint(len(unlabelled), (100,))]
        with torch.no_grad():
            weak = model.eval()(batch)  # the weak view: no dropout
        model.train()
        loss = fr.cross_entropy(model(x), y)
        if weight:
            loss = loss + weight * fr.pseudo_label_loss(model(batch), weak, threshold=0.95)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return 100 * (model.eval()(x_test).argmax(1) != data.y_test).double().mean().item()


for name, weight in (("100 labels alone", 0.0), ("and pseudo-labels", 1.0)):
    errors = [test_error(seed, weight) for seed in range(3)]
    print(f"{name}: {sum(errors) / len(errors):.1f} % of the test digits wrong")
