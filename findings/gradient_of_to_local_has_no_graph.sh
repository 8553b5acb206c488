#!/usr/bin/env bash
# torch 2.10.0: the gradient of DTensor.to_local() has no graph. With create_graph=True a gradient of a loss of a rank's
# own part comes back without a grad_fn though it depends on the parameter, so that what is differentiated once more (a
# gradient penalty, a Hessian-vector product) loses that part, with an error at best. Seen:
#   plain: True, by to_local: False
# Users of fastreg: its ops take a rank's part of a DTensor by a function of their own, whose gradient has a graph.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.10.0 numpy
"$folder/venv/bin/python" -W ignore - 2> /dev/null <<'PYTHON'
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

assert torch.__version__.startswith("2.10.0"), torch.__version__
dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))


def has_graph(p, own):
    part = own(p)
    (gradient,) = torch.autograd.grad((part**3).sum(), p, create_graph=True)
    return gradient.grad_fn is not None


plain = has_graph(torch.nn.Parameter(torch.randn(4, 3)), lambda p: p)
placed = torch.nn.Parameter(distribute_tensor(torch.randn(4, 3), mesh, [Shard(0)]))
by_to_local = has_graph(placed, lambda p: p.to_local())
print(f"plain: {plain}, by to_local: {by_to_local}")
assert (plain, by_to_local) == (True, False), "something else now"
PYTHON
