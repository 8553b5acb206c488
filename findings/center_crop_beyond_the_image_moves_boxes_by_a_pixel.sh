#!/usr/bin/env bash
# torchvision 0.29.1: v2.CenterCrop to a size that exceeds the image's by 3, 7, 11, … pixels moves boxes and key points
# by one pixel more than the image and its mask: half of the negative difference is rounded to even for the former, and
# the padding on the left and upper side is the difference divided by 2, rounded down, for the latter. Seen for
# 20 rows that become 23:
#   pixel in row 6, mask in row 6, box from 7.0, key point at 7.5
# Users of fastreg: Augment(size=..., crop="center") moves boxes and key points as it moves the image.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 torchvision==0.29.1 numpy
"$folder/venv/bin/python" -W ignore - <<'END'
import torch
import torchvision
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

assert torchvision.__version__.startswith("0.29.1"), torchvision.__version__
image = torch.zeros(1, 20, 24)
image[0, 5, 7] = 1
mask = tv_tensors.Mask(image)
box = tv_tensors.BoundingBoxes([[7.0, 5.0, 8.0, 6.0]], format="XYXY", canvas_size=(20, 24))
point = tv_tensors.KeyPoints([[7.5, 5.5]], canvas_size=(20, 24))
pixel, other = (F.center_crop(each, [23, 24]).nonzero()[0, 1].item() for each in (image, mask))
top = F.center_crop(box, [23, 24])[0, 1].item()
place = F.center_crop(point, [23, 24])[0, 1].item()
print(f"pixel in row {pixel}, mask in row {other}, box from {top}, key point at {place}")
assert (pixel, other) == (6, 6) and (top, place) == (7.0, 7.5), "the same now"
END
