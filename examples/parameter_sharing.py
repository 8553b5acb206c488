"""Parameter sharing: four layers, or one, read the quadrants of a digit; a convolution shares as the one."""

import torch
from torch import nn

import fastreg as fr
from fastreg.lecture.data import load

data = load(None)
mean, std = data.x_train.mean(), data.x_train.std()


class Reader(nn.Module):
    def __init__(self, shared):
        super().__init__()
        self.quadrants = nn.ModuleList(nn.Linear(14 * 14, 64) for _ in range(4))
        self.head = nn.Linear(4 * 64, 10)
        if shared:
            fr.share_parameters(*self.quadrants)

    def forward(self, x):
        parts = ((x - mean) / std).view(-1, 2, 14, 2, 14).transpose(2, 3).reshape(len(x), 4, 14 * 14)
        return self.head(torch.cat([read(parts[:, i]) for i, read in enumerate(self.quadrants)], 1).relu())


def train(seed, shared):
    torch.manual_seed(seed)
    model = Reader(shared)
    optimizer = fr.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    for _ in range(20):
        for batch in torch.randperm(len(data.x_train)).split(50):
            optimizer.zero_grad()
            fr.cross_entropy(model(data.x_train[batch]), data.y_train[batch]).backward()
            optimizer.step()
    return model, (model(data.x_test).argmax(1) != data.y_test).double().mean().item()


for name, shared in (("four layers", False), ("one, shared", True)):
    models, errors = zip(*(train(seed, shared) for seed in range(3)), strict=True)
    print(f"{name}: {sum(p.numel() for p in models[0].parameters())} parameters, {sum(errors) / 3:.1%} wrong")
