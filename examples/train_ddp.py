"""Data parallel: augmentation by the index of a sample, an adversarial loss, averaged weights, and a stop on
which all ranks agree. torchrun --nproc-per-node 2 examples/train_ddp.py
"""

import os

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import fastreg as fr

if "RANK" not in os.environ:  # without torchrun: one process
    os.environ |= dict(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
torch.set_num_threads(1)
torch.manual_seed(0)

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
labels = torch.tensor(digits.target)
train = fr.augment.Indexed(TensorDataset(images[:1200], labels[:1200]))
x_valid, y_valid = images[1200:][rank::world], labels[1200:][rank::world]  # a part on each rank
model = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.ReLU(),
    nn.Flatten(), fr.nn.Dropout(0.3), nn.Linear(288, 10),
)  # fmt: skip
ddp = DistributedDataParallel(model)
optimizer = fr.optim.AdamW(ddp.parameters(), lr=3e-3, weight_decay=0.01, max_norm=1.0, ema=0.99)
stopper = fr.EarlyStopping(model, optimizer, patience=3, mode="max")
augment = fr.augment.Augment(rotate=15, translate=(0.1, 0.1))
sampler = DistributedSampler(train, shuffle=True)
# A sample is moved alike on 1, 2 and 4 ranks, and otherwise in each epoch.
loader = DataLoader(train, batch_size=64 // world, sampler=sampler, collate_fn=augment.collate)

for epoch in range(6):
    sampler.set_epoch(epoch)
    train.set_epoch(epoch)
    torch.manual_seed(1000 * epoch + rank)  # another dropout mask on each rank
    for x, y in loader:
        loss = fr.adversarial_loss(ddp, x, y, eps=0.02, loss=fr.nn.CrossEntropyLoss(label_smoothing=0.1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with optimizer.averaged(), torch.no_grad():
        model.eval()
        right = (model(x_valid).argmax(1) == y_valid).double().mean()
        model.train()
        stop = stopper.step(right, count=len(y_valid))  # the mean over ranks, by one message
    if stop:
        break
stopper.restore()  # the best averages
if rank == 0:
    print(f"{world} ranks: {stopper.best:.2%} of the validation set right in epoch {stopper.best_epoch}")
dist.barrier()  # a rank whose partners are gone while it ends is aborted now and then (torch 2.14)
dist.destroy_process_group()
