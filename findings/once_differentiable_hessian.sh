#!/usr/bin/env bash
# torch 2.13.0: a custom function whose backward is marked once_differentiable has no second derivative, and
# asking autograd for one raises an error. torch.autograd.functional.hessian gives zeros instead, without a word,
# also with vectorize=True; only strict=True raises. Seen for f = (x^2)^2 at (1, 2), whose Hessian is
# diag(12, 48):
#   [[0.0, 0.0], [0.0, 0.0]]
# Users of fastreg: augmented images had such a backward; now they have derivatives of any order.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy
"$folder/venv/bin/python" -W ignore - <<'END'
import torch
from torch.autograd.functional import hessian


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * x * g


def f(x):
    return Square.apply(x).square().sum()


x = torch.tensor([1.0, 2.0])
assert torch.__version__.startswith("2.13.0"), torch.__version__
print(hessian(lambda x: (x * x).square().sum(), x).tolist())
for vectorize in (False, True):
    found = hessian(f, x, vectorize=vectorize)
    print(found.tolist())
    assert found.count_nonzero() == 0, "no longer zeros"
leaf = x.clone().requires_grad_()
(first,) = torch.autograd.grad(f(leaf), leaf, create_graph=True)
try:
    torch.autograd.grad(first.sum(), leaf)
except RuntimeError as error:
    print("RuntimeError:", error)
else:
    raise SystemExit("autograd itself no longer refuses")
END
