#!/usr/bin/env bash
# torch 2.13.0: the derivative of the cross-entropy of class indices with respect to the class weights. Asked for
# backwards it is an error: nll_loss_forward is not differentiable with respect to weight. Asked for forwards, by
# torch.func.jvp, it is 0 without a word, by F.cross_entropy and F.nll_loss alike. With probabilities as targets
# it is right. Seen for four rows, and as the difference quotient says:
#   class indices 0.0, it is -0.3818    probabilities 2.8119, it is 2.8119
# Users of fastreg: fr.cross_entropy refuses such a derivative on every way. Modules that are converted, and
# torch's own functions under them, say what torch says.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy
"$folder/venv/bin/python" -W ignore - <<'END'
import torch
import torch.nn.functional as F

torch.manual_seed(0)
x, y = torch.randn(4, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 4])
weight = torch.rand(5, dtype=torch.float64) + 0.5
direction = torch.arange(5, dtype=torch.float64)
losses = {
    "class indices": lambda w: F.cross_entropy(x, y, w),
    "class indices, nll_loss": lambda w: F.nll_loss(x, y, w),
    "probabilities": lambda w: F.cross_entropy(x, x.softmax(1), w),
}
assert torch.__version__.startswith("2.13.0"), torch.__version__
for name, loss in losses.items():
    found = torch.func.jvp(loss, (weight,), (direction,))[1].item()
    quotient = (loss(weight + 1e-6 * direction) - loss(weight - 1e-6 * direction)).item() / 2e-6
    print(f"{name} {found:.4f}, it is {quotient:.4f}")
    if name == "probabilities":
        assert abs(found - quotient) < 1e-6
    else:
        assert found == 0 and abs(quotient) > 0.1, "no longer 0"
try:
    losses["class indices"](weight.requires_grad_())
except RuntimeError as error:
    print("RuntimeError:", error)
else:
    raise SystemExit("backwards it is no longer an error")
END
