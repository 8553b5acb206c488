#!/usr/bin/env bash
# torch 2.13.0: a step hook of a subclass of an optimiser whose `step` calls `super().step()` runs once for each
# step, until somewhere an optimiser of the base class itself has been made. From then on it runs twice: torch
# wraps `step` of every class at the first optimiser made of it, and the wrapper of the base class runs the hooks
# of the subclass's instance again. Seen:
#   before: 1, after: 2
# Users of fastreg: fr.optim.SGD does not call its base's step, and a test holds that its hooks run once.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy
"$folder/venv/bin/python" -W ignore - <<'END'
import torch


class Mine(torch.optim.SGD):
    def step(self, closure=None):
        return super().step(closure)


def runs():
    weight = torch.nn.Parameter(torch.ones(1))
    weight.grad = torch.ones(1)
    calls = []
    optimizer = Mine([weight], lr=0.1)
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    optimizer.step()
    return len(calls)


before = runs()
torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
after = runs()
print(f"before: {before}, after: {after}")
assert torch.__version__.startswith("2.13.0"), torch.__version__
assert (before, after) == (1, 2), "the hooks run once for each step"
END
