#!/usr/bin/env bash
# torch 2.14.1: a compiled function that reads the local part of an FSDP2 parameter's gradient, as a step of one's own
# optimizer does, raises an IndexError from within the tracer on two ranks or more: that part is a view of what was
# reduced, and its sizes are taken for unknown numbers. The same function without torch.compile runs. Seen:
#   eager: (4, 5), compiled: IndexError
# Users of fastreg: the compiled steps of fr.optim.SGD and AdamW run on what FSDP2 has split.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 numpy
"$folder/venv/bin/python" -W ignore - 2> /dev/null <<'PYTHON'
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

assert torch.__version__.startswith("2.14.1"), torch.__version__
dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
layer = torch.nn.Linear(5, 8, bias=False)
fully_shard(layer)
layer(torch.randn(4, 5)).sum().backward()


@torch.no_grad()
def doubled(p):
    p.to_local().mul_(2.0)
    return p.grad.to_local() * 2


eager = tuple(doubled(layer.weight).shape)
try:
    torch.compile(doubled, backend="aot_eager")(layer.weight)
    compiled = "runs"
except Exception as error:
    inner = error.__cause__ or error
    compiled = "IndexError" if "IndexError" in repr(inner) + str(error) else repr(inner)
print(f"eager: {eager}, compiled: {compiled}")
assert eager == (4, 5) and compiled == "IndexError", "something else now"
PYTHON
