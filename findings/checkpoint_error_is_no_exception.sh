#!/usr/bin/env bash
# torch 2.13.0: what torch.distributed.checkpoint raises where a checkpoint lacks a key, CheckpointException, derives
# from BaseException and not from Exception. A trainer's `except Exception` around the loading of a checkpoint does
# not see it, and neither does `except RuntimeError`, which is what the planner raised inside. Seen where a key is
# missing:
#   CheckpointException, its bases: BaseException
# Users of fastreg: fr.optim.load_planner() reads checkpoints of torch's optimisers, which lack the keys of ours.
# Where loading fails all the same, catch torch.distributed.checkpoint.api.CheckpointException by its name.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy
cd "$folder"
"$folder/venv/bin/python" -W ignore - 2>errors <<'END' || { cat errors; exit 1; }
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

assert torch.__version__.startswith("2.13.0"), torch.__version__
dcp.save({"weight": torch.zeros(3)}, checkpoint_id="checkpoint", no_dist=True)
try:
    try:
        dcp.load({"weight": torch.zeros(3), "bias": torch.zeros(1)}, checkpoint_id="checkpoint", no_dist=True)
    except Exception as error:
        raise SystemExit(f"it is an Exception now: {type(error)}") from None
except CheckpointException as error:
    bases = ", ".join(base.__name__ for base in type(error).__bases__)
    print(f"{type(error).__name__}, its bases: {bases}")
    assert bases == "BaseException"
END
