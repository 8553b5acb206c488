#!/usr/bin/env bash
# torch 2.13.0: an optimiser writes all of its options into the parameter group dicts that it is given. The next
# optimiser made of the same list takes them for the user's: a second optimiser with lr=0.5 runs at the first
# one's 0.001. Seen:
#   ['amsgrad', 'betas', ...]
#   0.001
# Users of fastreg: fr.optim.penalty_groups gives a new list at each call; make one for each optimiser.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy
"$folder/venv/bin/python" -W ignore - <<'END'
import torch

groups = [{"params": [torch.nn.Parameter(torch.ones(1))]}]
torch.optim.Adam(groups, lr=0.001)
print(sorted(groups[0]))
lr = torch.optim.SGD(groups, lr=0.5).param_groups[0]["lr"]
print(lr)
assert torch.__version__.startswith("2.13.0"), torch.__version__
assert "betas" in groups[0] and lr == 0.001, "the options no longer stay"
END
