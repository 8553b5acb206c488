#!/usr/bin/env bash
# torch 2.14.1: compiled dropout with torch._functorch.config.activation_memory_budget = 0, where the forward pass is
# computed again in the backward pass, draws another mask there: half of the gradients belong to elements that were
# dropped, without a word. Seen for 1,000 elements, half of them dropped:
#   0 gradients of another mask with a budget of 1, 549 with 0
# Users of fastreg: a mask is a function of the seed, and the seed is drawn again by the kept state of the generator.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 numpy
"$folder/venv/bin/python" -W ignore - <<'END'
import torch
from torch._functorch import config

assert torch.__version__.startswith("2.14.1"), torch.__version__


def wrong(budget):
    torch.manual_seed(0)
    torch._dynamo.reset()
    x = torch.rand(1000, requires_grad=True)
    with config.patch(activation_memory_budget=budget):
        f = torch.compile(lambda x: (torch.nn.functional.dropout(x.exp()) + 1).log().cos(), backend="aot_eager")
        y = f(x)
    y.sum().backward()
    dropped = y == 1  # the cosine of log 1
    return ((x.grad == 0) != dropped).sum().item()


kept, again = wrong(1.0), wrong(0.0)
print(f"{kept} gradients of another mask with a budget of 1, {again} with 0")
assert kept == 0 and again > 300, "the same now"
END
