#!/usr/bin/env bash
# torchvision 0.29.1: shearing a turned bounding box gives another rectangle for the same rectangle whose corners are
# listed from the opposite one. v2.functional.affine makes a rectangle of the sheared parallelogram that keeps the
# longer of its diagonals; for some angles of the box it keeps the shorter one. Both are within the documented format
# XYXYXYXY. Seen for a box of 80 x 40 that is turned by 10 degrees and sheared by 30, its longer side:
#   corners from one end 109.7, from the other end 66.1
# Users of fastreg: fr.augment keeps the longer diagonal whatever corner comes first, so that turned boxes under a
# shear can differ from torchvision's.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 torchvision==0.29.1 numpy
"$folder/venv/bin/python" -W ignore - <<'END'
import math

import torch
import torchvision
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

assert torchvision.__version__.startswith("0.29.1"), torchvision.__version__
turn = math.radians(10)
axes = torch.tensor([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]], dtype=torch.float64)
halves = torch.tensor([[-40, -20], [40, -20], [40, 20], [-40, 20]], dtype=torch.float64)
corners = 200 + halves @ axes


def longer_side(corners):
    box = tv_tensors.BoundingBoxes(corners.reshape(1, 8), format="XYXYXYXY", canvas_size=(400, 400))
    moved = F.affine(box, angle=0.0, translate=[0, 0], scale=1.0, shear=[30.0, 0.0])
    a, b, c = moved.as_subclass(torch.Tensor).view(4, 2)[:3]
    return max((b - a).norm().item(), (c - b).norm().item())


one, other = longer_side(corners), longer_side(corners.roll(2, 0))
print(f"corners from one end {one:.1f}, from the other end {other:.1f}")
assert abs(one - other) > 40, "the same now"
END
