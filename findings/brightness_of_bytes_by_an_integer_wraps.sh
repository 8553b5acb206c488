#!/usr/bin/env bash
# torchvision 0.29.1: v2.functional.adjust_brightness of a uint8 image by a factor that is an int wraps around beyond
# 255, where the same factor as a float is clamped. Seen for the pixel 100 and the factors 3 and 3.0:
#   44 and 255
# Users of fastreg: fr.augment.functional.adjust_brightness clamps whatever the type of the factor.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 torchvision==0.29.1 numpy
"$folder/venv/bin/python" -W ignore - <<'END'
import torch
import torchvision
from torchvision.transforms.v2 import functional as F

assert torchvision.__version__.startswith("0.29.1"), torchvision.__version__
image = torch.full((3, 2, 2), 100, dtype=torch.uint8)
whole, real = (F.adjust_brightness(image, factor).unique().tolist() for factor in (3, 3.0))
print(f"by 3: {whole}, by 3.0: {real}")
assert whole == [44] and real == [255], "the same now"
END
