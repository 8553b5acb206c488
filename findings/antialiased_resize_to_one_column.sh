#!/usr/bin/env bash
# torch 2.14.1: F.interpolate with mode="bilinear" and antialias=True gives wrong values where the result has one
# column: every row is the first one. The same column beside a copy of itself is resized as it should be. float32 and
# float64 on a CPU. Seen for the column 1, 2, 3 that becomes two rows:
#   one column [1.375, 1.375], the first of two equal columns [1.375, 2.625]
# Users of fastreg: fr.augment.functional.resized_crop filters by its own kernel and gives 1.375, 2.625.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 numpy
"$folder/venv/bin/python" -W ignore - <<'END'
import torch
from torch.nn.functional import interpolate

assert torch.__version__.startswith("2.14.1"), torch.__version__
for dtype in (torch.float32, torch.float64):
    column = torch.tensor([1.0, 2.0, 3.0], dtype=dtype).view(1, 1, 3, 1)
    options = {"mode": "bilinear", "antialias": True}
    one = interpolate(column, (2, 1), **options).flatten().tolist()
    two = interpolate(column.expand(1, 1, 3, 2).contiguous(), (2, 2), **options)[0, 0, :, 0].tolist()
    print(f"{dtype}: one column {one}, the first of two equal columns {two}")
    assert one[0] == one[1] and two == [1.375, 2.625], "the same now"
END
