#!/usr/bin/env bash
# torch 2.13.0, NumPy 2: torch.optim.SGD takes a NumPy scalar as learning rate, negates it, and a negated unsigned
# integer wraps around: with lr=np.uint8(1) and gradients of 1 the weight climbs by 255 a step instead of falling
# by 1. Seen, after two steps from 2.0:
#   0.0 with lr=1.0, 512.0 with lr=np.uint8(1)
# Users of fastreg: fr.optim.SGD takes the number as it is and gives 0.0.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 "numpy>=2,<3"
"$folder/venv/bin/python" -W ignore - <<'END'
import numpy as np
import torch

ends = []
for lr in (1.0, np.uint8(1)):
    weight = torch.nn.Parameter(torch.tensor([2.0]))
    optimizer = torch.optim.SGD([weight], lr=lr)
    for _ in range(2):
        weight.grad = torch.ones(1)
        optimizer.step()
    ends.append(weight.item())
print(ends)
assert torch.__version__.startswith("2.13.0"), torch.__version__
assert ends == [0.0, 512.0], "it no longer wraps"
END
