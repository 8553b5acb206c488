"""A representation from 2,000 unlabelled digits, then a classifier on 100 labelled ones, against the 100
alone.
"""

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


def test_error(seed, pretrain):
    torch.manual_seed(seed)
    encoder = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Dropout(0.5), nn.Linear(256, 128), nn.ReLU())
    if pretrain:
        fr.pretrain_autoencoder(encoder, unlabelled, epochs=10)  # denoising: half of each input is dropped
    model = nn.Sequential(fr.nn.Dropout(0.2), encoder, fr.nn.Dropout(0.5), nn.Linear(128, 10))
    optimizer = fr.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    for _ in range(200):
        loss = fr.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return 100 * (model.eval()(x_test).argmax(1) != data.y_test).double().mean().item()


for name, pretrain in (("100 labels alone", False), ("after pretraining", True)):
    errors = [test_error(seed, pretrain) for seed in range(3)]
    print(f"{name}: {sum(errors) / len(errors):.1f} % of the test digits wrong")
