"""Tensor parallel: hidden units and classes are split over the ranks. Dropout of split units and the loss of
split logits are those of one process: the numbers are the same on 1, 2 and 4 ranks, except for rounding.

torchrun --nproc-per-node 4 examples/train_tensor_parallel.py
"""

import os

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import fastreg as fr

if "RANK" not in os.environ:  # without torchrun: one process
    os.environ |= dict(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
dist.init_process_group("gloo")
mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
torch.set_num_threads(1)
torch.manual_seed(0)

digits = load_digits()
x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
model = nn.Sequential(
    nn.Linear(64, 256), nn.ReLU(), fr.nn.Dropout(0.3), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10)
)
parallelize_module(
    model,
    mesh,
    {
        "0": ColwiseParallel(use_local_output=False),  # so that dropout sees which units it has
        "3": RowwiseParallel(output_layouts=Replicate()),
        "5": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False),
    },
)
optimizer = fr.optim.AdamW(model.parameters(), lr=2e-3, l1=1e-5, max_norm=1.0)

for step in range(60):
    torch.manual_seed(1000 * step + dist.get_rank())  # the first rank's seed decides
    batch = (step * 128 + torch.arange(128)) % 1400
    loss = fr.cross_entropy(model(x[batch]), y[batch], label_smoothing=0.1)  # of logits split by classes
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if dist.get_rank() == 0 and (step + 1) % 20 == 0:
        print(f"step {step + 1}: loss {loss.full_tensor():.4f}, gradients' norm {optimizer.grad_norm:.3f}")
dist.barrier()  # a rank whose partners are gone while it ends is aborted now and then (torch 2.14)
dist.destroy_process_group()
