"""The step of AdamW in plain torch, and what tests of the optimisers share beside it."""

import torch
from helpers import same_values

import fastreg as fr

BOTH = {"SGD": fr.optim.SGD, "AdamW": fr.optim.AdamW}


def reference(
    w,
    grads,
    *,
    lr=1e-3,
    betas=(0.9, 0.999),
    eps=1e-8,
    weight_decay=1e-2,
    amsgrad=False,
    l1=0.0,
    l1_mode="proximal",
    cautious=False,
    maximize=False,
    ema=None,
    power=None,
):
    """Steps over `grads` in the dtype of w; gives w, m, v, the greatest v and the average."""
    m, v, most, average = torch.zeros_like(w), torch.zeros_like(w), torch.zeros_like(w), None
    for n, g in enumerate(grads):
        g = (-g if maximize else g) + (l1 * w.sign() if l1_mode == "subgradient" else 0)
        m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g * g
        most = torch.maximum(most, v) if amsgrad else v
        d = (most / (1 - betas[1] ** (n + 1))).sqrt() + eps
        decay = weight_decay * (m * w >= 0).to(w) if cautious else weight_decay
        w = w - lr * decay * w - lr / (1 - betas[0] ** (n + 1)) * m / d
        if l1_mode == "proximal":
            w = w.sign() * (w.abs() - lr * l1 / d).clamp(min=0)
        if ema is not None:
            now = ema if power is None else min(ema, 1 - (1 + n) ** -power)
            average = w if n == 0 else now * average + (1 - now) * w
    return w, m, v, most, average


class StepSpy:
    """The C++ path of the optimisers, which counts the steps that it has taken."""

    taken = 0

    def __getattr__(self, name):
        function = getattr(fr._registry.fast, name)

        def call(*arguments):
            result = function(*arguments)
            self.taken += result is not None
            return result

        return call


def on_both_paths(monkeypatch, run):
    """What `run` gives must not depend on the path; how many steps C++ took."""
    spy, results = StepSpy(), []
    for path in (None, spy):
        monkeypatch.setattr(fr.optim._one_pass, "fast", path)
        results.append(run())
    for a, b in zip(*results, strict=True):
        assert a.stride() == b.stride() and same_values(a.contiguous(), b.contiguous())
    return spy.taken
