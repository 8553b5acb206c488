#!/usr/bin/env bash
# torch 2.14.1: the second derivative of a sum over ranks is that of one rank's summand. The gradient of what
# DTensor.full_tensor() gives for partial sums is right. Differentiated once more, it lacks what the other ranks add,
# without a word. The sum of squares s of four ones on two ranks, and the gradient of |grad of s^2|^2. Seen:
#   one process: 1536.0, two ranks: 1024.0
# Users of fastreg: it takes parts of DTensors, and sums over ranks, by functions of its own, of which each is the
# gradient of the other.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 numpy
cat > "$folder/look.py" <<'PYTHON'
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

assert torch.__version__.startswith("2.14.1"), torch.__version__


def second(w, sum_of_squares):
    (gradient,) = torch.autograd.grad(sum_of_squares(w) ** 2, w, create_graph=True)
    (second,) = torch.autograd.grad(sum_of_squares(gradient), w)
    return (second.full_tensor() if isinstance(second, DTensor) else second)[0].item()


def on_rank(rank, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))

    def over_ranks(w):
        own = (w.to_local() ** 2).sum()
        return DTensor.from_local(own, mesh, [Partial()]).full_tensor()

    one = second(torch.ones(4, requires_grad=True), lambda w: (w**2).sum())
    two = second(distribute_tensor(torch.ones(4), mesh, [Shard(0)]).requires_grad_(), over_ranks)
    if rank == 0:
        print(f"one process: {one}, two ranks: {two}")
    assert one == 1536 and two == 1024, "something else now"
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(on_rank, args=(f"{sys.argv[1]}/store",), nprocs=2)
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/look.py" "$folder" 2> "$folder/errors" || { cat "$folder/errors"; exit 1; }
