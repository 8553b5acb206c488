#!/usr/bin/env bash
# torchvision 0.29.1 with torch 2.14.1: v2.functional.rotate and affine by the nearest pixel make their grid of
# positions by a product of matrices, whose rounding MKL chooses by the processor's instructions. Where positions lie
# between two pixels, as all do for a quarter turn of 24 x 31, the same image gives others on another processor.
# MKL_CBWR tells one processor to round as another. Seen on an Intel processor with AVX-512:
#   24 of 744 pixels differ
# Users of fastreg: augmentation takes the same pixels on every processor.
set -euo pipefail
grep -q GenuineIntel /proc/cpuinfo && grep -q avx512f /proc/cpuinfo ||
  { echo "this needs an Intel processor with AVX-512, which can round as those without it"; exit 2; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 torchvision==0.29.1 numpy
cat > "$folder/turn.py" <<'END'
import sys

import torch
import torchvision
from torchvision.transforms.v2 import functional as F

assert torchvision.__version__.startswith("0.29.1"), torchvision.__version__
torch.save(F.rotate(torch.arange(1.0, 745.0).view(1, 24, 31), 90.0), sys.argv[1])
END
for rounding in AVX2 AVX512; do
  MKL_CBWR=$rounding "$folder/venv/bin/python" -W ignore "$folder/turn.py" "$folder/$rounding.pt"
done
"$folder/venv/bin/python" -W ignore - "$folder" <<'END'
import sys

import torch

one, other = (torch.load(f"{sys.argv[1]}/{name}.pt") for name in ("AVX2", "AVX512"))
print(f"{(one != other).sum().item()} of {one.numel()} pixels differ")
assert (one != other).sum() == 24, "the same now"
END
