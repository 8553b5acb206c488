"""Sharded parameters (FSDP2), and a training that outlives a rank: all ranks start again and go on from the
last whole checkpoint, with the batches and the masks of a run that nobody disturbed.

torchrun --nproc-per-node 4 --max-restarts 1 examples/train_fsdp.py checkpoints
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

import fastreg as fr

if "RANK" not in os.environ:  # without torchrun: one process
    os.environ |= dict(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
store, rank, world = next(dist.rendezvous("env://"))
# A store of its own for each start, or ranks that start again ask for those that are gone (torch 2.14).
store = dist.PrefixStore("start " + os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
torch.set_num_threads(1)
torch.manual_seed(0)
folder = Path(sys.argv[1] if len(sys.argv) > 1 else "checkpoints")
x, y = torch.tensor(load_digits().data, dtype=torch.float32) / 16, torch.tensor(load_digits().target)
layers = [nn.Sequential(nn.Linear(n, 128), nn.ReLU(), fr.nn.Dropout(0.2)) for n in (64, 128, 128)]
model = nn.Sequential(*layers, nn.Linear(128, 10))
for module in (*layers, model):
    fully_shard(module)
optimizer = fr.optim.AdamW(model.parameters(), lr=2e-3, l1=1e-5, max_norm=1.0, ema=0.98)
first, done = 0, sorted(folder.glob("step-*"))  # a folder has that name when all of it is there
if done:
    first, states = int(done[-1].name.removeprefix("step-")), get_state_dict(model, optimizer)
    dcp.load({"model": states[0], "optimizer": states[1]}, checkpoint_id=done[-1])
    set_state_dict(model, optimizer, model_state_dict=states[0], optim_state_dict=states[1])
for step in range(first, 120):
    torch.manual_seed(step)  # a batch and masks of its own for each step, whenever it is computed
    batch = torch.randperm(1400)[:256][rank::world]
    torch.manual_seed(1000 * step + rank)
    loss = fr.cross_entropy(model(x[batch]), y[batch], label_smoothing=0.1)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if (step + 1) % 40 == 0:
        states = get_state_dict(model, optimizer)
        dcp.save({"model": states[0], "optimizer": states[1]}, checkpoint_id=folder / "unfinished")
        if rank == 0:
            (folder / "unfinished").rename(folder / f"step-{step + 1:04}")
model.eval()
with optimizer.averaged(), torch.no_grad():
    loss = fr.cross_entropy(model(x[1400:]), y[1400:])
if rank == 0:
    print(f"{world} ranks, steps {first} to 120: validation loss {loss:.6f}")
dist.barrier()  # a rank whose partners are gone while it ends is aborted now and then (torch 2.14)
dist.destroy_process_group()
