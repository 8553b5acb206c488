"""A small training of very many steps goes as in plain torch to the last step, and its memory stays flat.

The model is a softmax regression in float64 with dropout on its inputs, smoothed cross-entropy, and SGD with
momentum, or AdamW with an average, and proximal L1. It is convex, so that two trainings which do the same
stay together. Of the reference, the masks are compared with NumPy's Philox, loss and gradient are torch's,
the step is written out.

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
BETA1, BETA2, EPS, DECAY, EMA = 0.9, 0.99, 1e-8, 0.01, 0.9


class Reference:
    """The training in plain torch, by a generator that draws the same seeds."""

    def __init__(self, weight, seed, name):
        self.w, self.v, self.count = weight.clone(), torch.zeros_like(weight), 0
        self.square, self.ema = torch.zeros_like(weight), weight.clone()
        self.generator = torch.Generator().manual_seed(seed)
        self.update = {"SGD": self.by_sgd, "AdamW": self.by_adamw}[name]

    def by_sgd(self, w, g):
        self.v = MOMENTUM * self.v + g
        return self.shrunk(w - LR * self.v, LR * L1)

    def by_adamw(self, w, g):
        self.v = BETA1 * self.v + (1 - BETA1) * g
        self.square = BETA2 * self.square + (1 - BETA2) * g * g
        metric = (self.square / (1 - BETA2**self.count)).sqrt() + EPS
        w = w * (1 - LR * DECAY) - LR / (1 - BETA1**self.count) * self.v / metric
        w = self.shrunk(w, LR * L1 / metric)
        self.ema = w.clone() if self.count == 1 else EMA * self.ema + (1 - EMA) * w
        return w

    @staticmethod
    def shrunk(w, by):
        return w.sign() * (w.abs() - by).clamp(min=0)

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
        self.w = self.update(w.detach(), g)
        return loss.item()


class Ours:
    def __init__(self, weight, seed, name):
        self.w = torch.nn.Parameter(weight.clone())
        self.generator = torch.Generator().manual_seed(seed)
        options = {
            "SGD": dict(momentum=MOMENTUM),
            "AdamW": dict(betas=(BETA1, BETA2), eps=EPS, weight_decay=DECAY, ema=EMA),
        }[name]
        optimizer = getattr(fr.optim, name)
        self.optimizer = optimizer([self.w], lr=LR, l1=L1, l1_mode="proximal", **options)

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


def train(name, steps):
    """(largest difference of a loss, of a weight or an average at the end, growth of memory in bytes, steps
    with a 0).
    """
    make = torch.Generator().manual_seed(1)
    x = torch.randn(64, 12, generator=make, dtype=torch.float64)
    y = (x @ torch.randn(12, 5, generator=make, dtype=torch.float64)).argmax(1)
    weight = torch.randn(5, 12, generator=make, dtype=torch.float64) * 0.1
    ours, theirs, apart, start, zeros = Ours(weight, 7, name), Reference(weight, 7, name), 0.0, 0, 0
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
    pairs = [(ours.w.detach(), theirs.w)]
    if name == "AdamW":
        pairs.append((ours.optimizer.state[ours.w]["ema"], theirs.ema))
    return apart, max((a - b).abs().max().item() for a, b in pairs), grown, zeros


def check(name, steps):
    apart, weights, grown, zeros = train(name, steps)
    print(
        f"{name}, {steps} steps: losses differ by {apart:.2e} at most, weights by {weights:.2e} at the end; ",
        end="",
    )
    print(f"memory grew by {grown / 2**20:.2f} MiB; after {zeros} steps a weight was 0")
    assert apart < 1e-10 and weights < 1e-10
    assert grown < 4 * 2**20 and zeros > 0


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_some_steps(name):
    check(name, 600)


@pytest.mark.long
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_very_many_steps(name):
    check(name, STEPS)
