"""The step of AdamW in plain torch, and steps drawn at random, for the tests of AdamW."""

import torch
from helpers import DTYPES

NAMES = ("params", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "steps", "averages", "n_averaged")
USUAL = dict(
    lr=0.01, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1, l1=0.0, ema=0.0, proximal=False,
    cautious=False, maximize=False,
)  # fmt: skip


def reference(w, g, m, v, t, *, lr, beta1, beta2, eps, weight_decay, l1, proximal, cautious, maximize, **_):
    """Step t from 1 on in float64, as the papers have it; gives w, m, v."""
    g = (-g if maximize else g) + (0 if proximal else l1) * w.sign()
    m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
    update = m / (1 - beta1**t)
    metric = (v / (1 - beta2**t)).sqrt() + eps
    decay = (update * w >= 0).to(w.dtype) if cautious else 1
    w = w - lr * (update / metric + weight_decay * decay * w)
    if proximal:
        w = w.sign() * (w.abs() - lr * l1 / metric).clamp(min=0)
    return w, m, v


def numbers(choose, shape, dtype, hostile=True):
    """A tensor of some size of numbers, of either memory format, with odd ones among them."""
    x = torch.randn(shape) * choose((1, 1e-3, 30))
    if hostile and x.numel() > 20:
        odd = [0.0, -0.0, torch.inf, torch.nan, 1e-39, -1e-30, -torch.inf]
        x.view(-1)[: len(odd)] = torch.tensor(odd)
    x = x.to(dtype)
    return x.mT.contiguous().mT if x.dim() > 1 and choose((False, True)) else x


def step_case(choose, shapes, dtypes=DTYPES, hostile=True):
    """Lists of tensors and options of one step, chosen at random: all options meet each other in some."""
    lists = [[] for _ in NAMES]
    amsgrad, average = choose((False, True)), choose((False, True))
    for shape in shapes:
        dtype = choose(dtypes)
        for i in (0, 1, 2):
            lists[i].append(numbers(choose, shape, dtype, hostile))
        for i in (3, 4) if amsgrad else (3,):
            lists[i].append(numbers(choose, shape, dtype, hostile).abs())
        lists[5].append(torch.tensor(choose((0.0, 1.0, 7.0, 1000.0, 2.0**24))))
        if average:
            lists[6].append(numbers(choose, shape, dtype, hostile))
            lists[7].append(torch.tensor(choose((0.0, 1.0))))
    return lists, dict(
        lr=choose((0.0, 1e-3, 0.1)),
        beta1=choose((0.9, 0.3, 0.0)),
        beta2=choose((0.999, 0.5, 0.0)),
        eps=choose((1e-8, 0.0, 1e-3)),
        weight_decay=choose((0.0, 0.1)),
        l1=choose((0.0, 0.02, 1.0)),
        ema=choose((0.0, 0.9, 0.4)),
        proximal=choose((False, True)),
        cautious=choose((False, True)),
        maximize=choose((False, True)),
        lr_tensor=choose((None, torch.tensor(0.07))),
        grad_scale=choose((None, torch.tensor(3.0))),
        found_inf=choose((None, None, torch.tensor(0.0), torch.tensor(1.0))),
        clip=choose((None, torch.tensor(0.3))),
        ema_tensor=choose((None, torch.tensor(0.8))),
        seed=choose((None, torch.tensor([-12345]))),
    )
