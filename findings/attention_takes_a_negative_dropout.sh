#!/usr/bin/env bash
# torch 2.13.0, CPU: scaled_dot_product_attention with a negative dropout_p. Where the values are as wide as the
# keys it is refused, by a message about dropout above 0, since the fused kernel is asked whether it has dropout.
# Where they are of another width, the way through all weights is taken, which drops nothing below 0: the negative
# probability is ignored in silence. Seen:
#   values of width 16: RuntimeError scaled_dot_product_attention_flash_attention: Currently do not support dropout > 0
#   values of width 12: the result without dropout
# Users of fastreg: fr.scaled_dot_product_attention raises ValueError for both, and fr.patch() does what torch does.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy
"$folder/venv/bin/python" -W ignore - <<'END'
import torch

attention = torch.nn.functional.scaled_dot_product_attention
query, key = torch.randn(1, 2, 8, 16), torch.randn(1, 2, 8, 16)
try:
    attention(query, key, torch.randn(1, 2, 8, 16), dropout_p=-0.2)
except RuntimeError as error:
    print("values of width 16: RuntimeError", error)
    refused = "Currently do not support dropout > 0" in str(error)
else:
    refused = False
value = torch.randn(1, 2, 8, 12)
ignored = torch.equal(attention(query, key, value, dropout_p=-0.2), attention(query, key, value))
print("values of width 12:", "the result without dropout" if ignored else "another result")
assert torch.__version__.startswith("2.13.0") and refused and ignored
END
