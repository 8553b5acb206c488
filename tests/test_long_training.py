"""A small training of very many steps goes as in plain torch to the last step, and its memory stays flat.

The model is a softmax regression in float64 with dropout on its inputs, smoothed cross-entropy, and SGD with
momentum and proximal L1. It is convex, so that two trainings which do the same stay together. Of the
reference, the masks are compared with NumPy's Philox, loss and gradient are torch's, the step is written out.

FASTREG_STEPS is the number of steps of the long test.
"""

import gc
import os
import resource

import pytest
import torch
import torch.nn.functional as F
from dropout_reference import kept_reference, scale_of

import fastreg as fr
from fastreg import _seeds

STEPS = int(os.environ.get("FASTREG_STEPS", "1_000_000"))
LR, MOMENTUM, L1, P, SMOOTHING = 0.05, 0.9, 0.03, 0.3, 0.1


class Reference:
    """The training in plain torch, by a generator that draws the same seeds."""

    def __init__(self, weight, seed):
        self.w, self.v, self.count = weight.clone(), torch.zeros_like(weight), 0
        self.generator = torch.Generator().manual_seed(seed)

    def step(self, x, y):
        seed = _seeds.draw_seed(x.device, self.generator)
        kept = fr.unpack_mask(fr.dropout_with_mask(x, P, seed=seed)[1], x.shape)
        if self.count % 97 == 0:  # NumPy takes ten times as long as all the rest
            assert kept.flatten().tolist() == kept_reference(seed.item(), 0, x.numel(), P).tolist()
        self.count += 1
        x = torch.where(kept, x * scale_of(P), 0.0)
        w = self.w.requires_grad_()
        loss = F.cross_entropy(x @ w.t(), y, label_smoothing=SMOOTHING)
        (g,) = torch.autograd.grad(loss, w)
        self.v = MOMENTUM * self.v + g
        w = w.detach() - LR * self.v
        self.w = w.sign() * (w.abs() - LR * L1).clamp(min=0)
        return loss.item()


class Ours:
    def __init__(self, weight, seed):
        self.w = torch.nn.Parameter(weight.clone())
        self.generator = torch.Generator().manual_seed(seed)
        self.optimizer = fr.optim.SGD([self.w], lr=LR, momentum=MOMENTUM, l1=L1, l1_mode="proximal")

    def step(self, x, y):
        self.optimizer.zero_grad()
        x = fr.dropout(x, P, generator=self.generator)
        loss = fr.cross_entropy(x @ self.w.t(), y, label_smoothing=SMOOTHING)
        loss.backward()
        self.optimizer.step()
        return loss.item()


def resident():
    """Bytes of this process in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def train(steps):
    """(largest difference of a loss, of a weight at the end, growth of memory in bytes, steps with a 0)."""
    make = torch.Generator().manual_seed(1)
    x = torch.randn(64, 12, generator=make, dtype=torch.float64)
    y = (x @ torch.randn(12, 5, generator=make, dtype=torch.float64)).argmax(1)
    weight = torch.randn(5, 12, generator=make, dtype=torch.float64) * 0.1
    ours, theirs, apart, start, zeros = Ours(weight, 7), Reference(weight, 7), 0.0, 0, 0
    for i in range(steps):
        part = slice(i % 8 * 8, i % 8 * 8 + 8)
        a, b = ours.step(x[part], y[part]), theirs.step(x[part], y[part])
        apart = max(apart, abs(a - b))
        zeros += (ours.w == 0).any().item()
        if i == min(2000, steps // 2):  # what is allocated once is there
            gc.collect()
            start = resident()
    gc.collect()
    grown = resident() - start
    return apart, (ours.w.detach() - theirs.w).abs().max().item(), grown, zeros


def check(steps):
    apart, weights, grown, zeros = train(steps)
    print(
        f"{steps} steps: losses differ by {apart:.2e} at most, weights by {weights:.2e} at the end; ", end=""
    )
    print(f"memory grew by {grown / 2**20:.2f} MiB; after {zeros} steps a weight was 0")
    assert apart < 1e-10 and weights < 1e-10
    assert grown < 4 * 2**20 and zeros > 0


def test_some_steps():
    check(600)


@pytest.mark.long
def test_very_many_steps():
    check(STEPS)
