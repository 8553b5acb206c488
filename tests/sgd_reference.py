"""The step of SGD in plain torch, and what tests/test_sgd*.py share beside it."""

import torch
from hypothesis import settings

OP = torch.ops.fastreg.sgd_.default


def flushed(x):
    return x if x.dtype == torch.float64 else x.where(~(x.abs() < 2.0**-126), 0)


def reference(
    w,
    g,
    v,
    first,
    *,
    lr=1e-3,
    momentum=0.0,
    dampening=0.0,
    weight_decay=0.0,
    nesterov=False,
    l1=0.0,
    l1_mode="subgradient",
    decoupled=False,
    maximize=False,
):
    """One step in the dtype of w, g, v, every operation rounded as IEEE says; gives the new w and v. What is
    below float32's normal numbers counts as 0, but for the sign of a weight; one that ends at 0 stays.
    """
    old = w
    w, g, v = map(flushed, (w, g, v))
    lr, momentum, take, l2, l1 = (w.new_tensor(x) for x in (lr, momentum, 1 - dampening, weight_decay, l1))
    penalties = [flushed(l2 * w)] if l2 else []
    penalties += [l1 * old.sign()] if l1 and l1_mode == "subgradient" else []
    g = -g if maximize else g
    g = g if decoupled else sum(penalties, g)
    if momentum:
        v = flushed(g if first else flushed(momentum * v) + flushed(take * g))
        g = flushed(g + flushed(momentum * v)) if nesterov else v
    w = flushed(w - flushed(lr * (g + sum(penalties) if decoupled else g)))
    w = torch.where((w == 0) & (flushed(old) == 0), old, w)
    if l1 and l1_mode == "proximal":
        w = w.sign() * (w.abs() - lr * l1).clamp(min=0)
    return w, v


def rounded_reference(w, grads, started=False, v=None, **options):
    """Steps over `grads`, computed in float32 (float64 for float64), w and v rounded once a step."""
    wide = torch.float64 if w.dtype == torch.float64 else torch.float32
    v = torch.zeros_like(w) if v is None else v
    for g in grads:
        new_w, new_v = reference(w.to(wide), g.to(wide), v.to(wide), not started, **options)
        w, v, started = new_w.to(w.dtype), new_v.to(w.dtype), True
    return w, v


def parameter(data):
    return torch.nn.Parameter(data.detach())


def run(cls, start, grads, after=None, **options):
    """Step copies of the tensors `start` over `grads` (one list a step); gives the parameters and the
    optimiser.
    """
    params = [parameter(w.clone()) for w in start]
    optimizer = cls(params, **options)
    for step_grads in grads:
        for p, g in zip(params, step_grads, strict=True):
            p.grad = None if g is None else g.clone()
        optimizer.step()
        if after:
            after(optimizer)
    return params, optimizer


def strided(values, layout):
    """`values` with other strides, inside memory whose rest is filled with 77; gives the tensor and that
    memory.
    """
    if layout == "contiguous":
        base = torch.full((values.numel() + 5,), 77.0, dtype=values.dtype)
        view = base[3 : 3 + values.numel()].view(values.shape)  # an odd offset: no vector is aligned
    elif layout == "transposed":
        order = tuple(range(values.dim()))[::-1]
        base = torch.full([values.shape[d] for d in order], 77.0, dtype=values.dtype)
        view = base.permute(order)
    elif layout == "channels_last":
        base = view = torch.full_like(values, 77.0, memory_format=torch.channels_last)
    elif layout == "sliced":
        base = torch.full([2 * n + 1 for n in values.shape], 77.0, dtype=values.dtype)
        view = base[tuple(slice(1, None, 2) for _ in values.shape)]
    view.copy_(values)
    return view, base


quick = settings(deadline=None, max_examples=60)


def scaler_with(scale):
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10**6)
    scaler.scale(torch.ones(()))  # its scale tensor is made lazily
    return scaler
