#!/usr/bin/env bash
# torch 2.14.1 (2.13.0 does not): where torchrun starts ranks again (--max-restarts), those with the gloo backend
# look for the ranks that are gone. The agent keeps one store for all starts, and init_process_group("gloo") finds
# in it the addresses of the start before: "Gloo connectFullMesh failed". TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before
# torchrun, or a PrefixStore with TORCHELASTIC_RESTART_COUNT around the store in the script, helps. Seen:
#   as it is: 0 of 2 ranks end their second start
#   TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1: 2 of 2 ranks end their second start
#   a PrefixStore for each start: 2 of 2 ranks end their second start
# Users of fastreg: examples/train_fsdp.py has the PrefixStore, docs/cluster.md the variable.
# pytorch/pytorch#135712 tells of the same with NCCL, and is closed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 numpy
cat > "$folder/ranks.py" <<'END'
import os
import sys

import torch
import torch.distributed as dist

start = os.environ["TORCHELASTIC_RESTART_COUNT"]
if sys.argv[1] == "prefix":
    store, rank, world = next(dist.rendezvous("env://"))
    dist.init_process_group("gloo", store=dist.PrefixStore(start, store), rank=rank, world_size=world)
else:
    dist.init_process_group("gloo")
dist.all_reduce(torch.ones(1))
if start == "0":
    sys.exit(1)  # the start that fails
print("the end")
dist.destroy_process_group()
END
run() { # prints how many of two ranks end their second start
  { timeout 120 "$folder/venv/bin/torchrun" --nproc-per-node 2 --max-restarts 1 "$folder/ranks.py" "$1" 2>"$folder/errors" || true; } | grep -c "the end" || true
}
plain=$(run plain)
grep -q "connectFullMesh failed" "$folder/errors"
alone=$(TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 run plain)
prefix=$(run prefix)
echo "as it is: $plain of 2 ranks end their second start"
echo "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1: $alone of 2 ranks end their second start"
echo "a PrefixStore for each start: $prefix of 2 ranks end their second start"
"$folder/venv/bin/python" -c 'import torch; assert torch.__version__.startswith("2.14.1")'
[ "$plain $alone $prefix" = "0 2 2" ]
