"""Adversarial examples; `adversarial.py` trains on them.

The fast gradient sign method, x' = clamp(x + eps sign(dJ/dx)) (Goodfellow, Shlens, Szegedy 2015), from x or
from a random start (Wong, Rice, Kolter 2020), and its iterated form with projection, PGD (Kurakin et al.
2017; Madry et al. 2018).
"""

import contextlib
import math

import torch

from ._checks import check_choice, check_count, check_tensor
from ._cross_entropy import cross_entropy
from ._fgsm import bounds_of, fgsm_step_op, number_of, pgd_step_op, times, value_of


def _samples(v):
    """(B, elements of one sample); a tensor without dimensions is one sample."""
    return v.reshape(v.shape[0], math.prod(v.shape[1:])) if v.dim() else v.reshape(1, 1)


def _per_sample(v, x):
    """A value per sample, (B,), in the shape that broadcasts to x."""
    return v.view(-1, *(1,) * (x.dim() - 1)) if x.dim() else v.view(())


def _unit(v):
    """v / |v|_2 per sample and |v|_2, in at least float32; zero stays zero.

    The largest element is divided out first, so that no square under- or overflows.
    """
    rows = _samples(v)
    rows = rows.double() if v.dtype == torch.float64 else rows.float()
    largest = rows.abs().amax(1, keepdim=True) if rows.shape[1] else rows.new_zeros(len(rows), 1)
    rows = rows / largest.where(largest > 0, 1)
    length = rows.norm(dim=1, keepdim=True)
    rows = rows / length.where(length > 0, 1)
    return rows.view(v.shape), _per_sample((largest * length).squeeze(1), v)


def attack_step(op, x, grad, origin, alpha, eps, lower, upper, norm):
    """One ascent step of size alpha in `norm`, projected to the eps-ball around origin (None: no projection)
    and the box.
    """
    if norm == "linf":
        box = (lower[0], upper[0]), (lower[1], upper[1])
        if origin is None:
            return fgsm_step_op(x, grad, alpha[0], *box[0], alpha[1], *box[1])
        return pgd_step_op(x, grad, origin, alpha[0], eps[0], *box[0], alpha[1], eps[1], *box[1])
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    # As sign(NaN) is 0: an element without a gradient takes no part; an infinite one is the largest there is.
    moved = x.to(work) + value_of(alpha) * _unit(grad.nan_to_num())[0]
    if origin is not None:
        delta = moved - origin.to(work)
        direction, size = _unit(delta)
        moved = torch.where(size > value_of(eps), origin.to(work) + direction * value_of(eps), moved)
    return clamp(moved, lower, upper).to(x.dtype)


def clamp(x, lower, upper):
    lower, upper = (
        torch.as_tensor(value_of(bound), device=x.device, dtype=x.dtype) for bound in (lower, upper)
    )
    return torch.minimum(torch.maximum(x, lower), upper)


@contextlib.contextmanager
def _autograd():
    """Gradients even where the caller has switched them off."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


@contextlib.contextmanager
def shielded(model):
    """Running statistics and other buffers move on copies, which are thrown away: not even version counters
    of the originals do.

    Not torch.func.functional_call, which leaves a copy behind in a module that stands at two places of the
    model.
    """
    owner = (
        model if isinstance(model, torch.nn.Module) else getattr(model, "__self__", None)
    )  # model.forward is a model, too
    modules = owner.modules() if isinstance(owner, torch.nn.Module) else ()
    originals = [
        (m, name, buffer) for m in modules for name, buffer in m._buffers.items() if buffer is not None
    ]
    copies = {id(buffer): buffer.clone() for _, _, buffer in originals}
    try:
        for module, name, buffer in originals:
            _set_buffer(module, name, copies[id(buffer)])
        yield
    finally:
        for module, name, buffer in originals:
            _set_buffer(module, name, buffer)


def _set_buffer(module, name, buffer):
    if isinstance(module, torch.jit.ScriptModule):
        setattr(module, name, buffer)
    else:
        module._buffers[name] = buffer


def _loss(loss, logits, y):
    if loss is not None:
        return loss(logits, y).sum()
    return cross_entropy(
        logits, y, reduction="sum", loss_dtype=torch.promote_types(logits.dtype, torch.float32)
    )


def _input_gradient(op, model, x, y, loss):
    """d loss / d x, of x's shape and dtype, with nothing left behind on the model.

    In float16 a gradient below 6e-8 is 0 and has lost its sign, so the loss is scaled up first; samples whose
    gradient overflows are taken from smaller scales. The sum over the batch, not the mean, keeps the batch
    size out of it.
    """
    x = x.detach().clone().requires_grad_()
    if isinstance(y, torch.Tensor) and y.is_inference():
        y = y.clone()
    with shielded(model):
        value = _loss(loss, model(x), y)
    if not computes_in_float16(model, x):
        return gradient_of(op, value, x)
    scales = (2.0**16, 2.0**10, 2.0**4, 1.0, 2.0**-6)
    best = missing = None
    for scale in scales:
        grad = gradient_of(op, value.float() * scale, x, retain_graph=scale != scales[-1])
        bad = ~_samples(grad.isfinite()).all(1)
        best = grad if best is None else torch.where(_per_sample(missing, x), grad, best)
        missing = bad if missing is None else missing & bad
        if not missing.any():
            break
    return best


def gradient_of(op, value, x, retain_graph=None):
    if value.requires_grad:
        (grad,) = torch.autograd.grad(value, x, retain_graph=retain_graph, allow_unused=True)
        if grad is not None:
            return grad
    raise ValueError(
        f"{op}: the loss does not depend on x; expected loss(model(x), y) to be differentiable in x"
    )


def computes_in_float16(model, x):
    device = x.device.type
    return (
        x.dtype == torch.float16
        or (torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16)
        or (isinstance(model, torch.nn.Module) and any(p.dtype == torch.float16 for p in model.parameters()))
    )


def prepare(op, x, eps, bounds, norm):
    check_tensor(op, "x", x)
    if not x.is_floating_point():
        raise TypeError(f"{op}: x must be a floating-point tensor, got {x.dtype}; convert it with .float()")
    check_choice(op, "norm", norm, ("linf", "l2"))
    if bounds is None:
        bounds = (None, None)
    if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
        raise ValueError(f"{op}: bounds must be (lower, upper) or None, got {bounds!r}")
    eps = number_of(op, "eps", eps, x, low=0)
    return eps, *bounds_of(op, *bounds, x)


def fgsm(
    model,
    x,
    y,
    eps,
    *,
    loss=None,
    bounds=(0.0, 1.0),
    targeted=False,
    norm="linf",
    random_start=False,
    generator=None,
):
    """Adversarial examples by one step along the gradient of the loss.

    linf: clamp(x + eps * sign(g)); l2: clamp(x + eps * g / |g|_2 per sample), with g = d loss / d x.

    Args:
        model: callable or Module, called as model(x) in the mode it is in; gives logits unless `loss` takes
            something else. The state of a Module is shielded; a function that calls modules of its own is
            called as it is.
        x: inputs, (B, ...), floating point, in the units of `bounds`.
        y: what `loss` compares with: class indices (B,) or probabilities; with `targeted` the class to be
            mistaken for.
        eps: size of the step, at least 0: a number, or a tensor with one value per channel (C,), per sample
            (B,) or of any shape that broadcasts to x. For normalised inputs divide by their standard
            deviation: 8 / 255 / std.
        loss: callable(model(x), y) -> tensor, summed; cross-entropy if None.
        bounds: (lower, upper) of valid inputs, each like `eps`; None for none.
        targeted: step down the loss of y instead of up.
        norm: "linf" or "l2".
        random_start: take the gradient at a uniform random point of the eps-ball and step 1.25 * eps from
            there, back into the ball: the examples of fast adversarial training.
        generator: torch.Generator on x's device for that point.

    Returns:
        Tensor like x, detached. Nothing else changes: neither modes, buffers such as BatchNorm's statistics,
        nor `.grad` of parameters or of x. Works under no_grad and inference_mode, and under autocast. Only
        random state that the model itself draws from (dropout) moves on.

    Raises:
        ValueError: eps negative, infinite or NaN, bounds that do not fit or cross, an unknown norm, a loss
            that does not depend on x.
        TypeError: x is no floating-point tensor.

    Source: Goodfellow, Shlens, Szegedy 2015; l2: Miyato, Dai, Goodfellow 2017; random_start: Wong, Rice,
    Kolter 2020, Fast is better than free.
    """
    eps, *bounds = prepare("fgsm", x, eps, bounds, norm)
    return one_step(
        "fgsm", model, x, y, eps, bounds, loss, -1.0 if targeted else 1.0, norm, random_start, generator
    )


def one_step(op, model, x, y, eps, bounds, loss, sign, norm, random_start, generator):
    if random_start:
        start = draw_start(x, eps, *bounds, norm, generator)
        return iterate(op, model, x, y, start, eps, times(eps, 1.25 * sign), 1, bounds, loss, norm)
    with _autograd():
        grad = _input_gradient(op, model, x, y, loss)
    with torch.no_grad():
        return attack_step(op, x.detach(), grad, None, times(eps, sign), eps, *bounds, norm)


def pgd(
    model,
    x,
    y,
    eps,
    alpha,
    steps,
    *,
    random_start=True,
    restarts=1,
    loss=None,
    bounds=(0.0, 1.0),
    targeted=False,
    norm="linf",
    generator=None,
):
    """Adversarial examples by projected gradient descent: `steps` steps of size alpha, each projected to the
    eps-ball around x.

    Args:
        alpha: size of one step, like `eps`.
        steps: number of steps, at least 1.
        random_start: begin at a uniform random point of the ball instead of at x.
        restarts: number of random starts, of which each sample keeps the one with the highest loss (with
            `targeted` the lowest). A loss of one's own must then give one value per sample, (B, ...).
        generator: torch.Generator on x's device for these points.

    Other arguments, result and errors as in `fgsm`. In the "linf" norm step and projection are one pass over
    memory.
    Source: Madry, Makelov, Schmidt, Tsipras, Vladu 2018, Towards deep learning models resistant to
    adversarial attacks.
    """
    op = "pgd"
    eps, *bounds = prepare(op, x, eps, bounds, norm)
    sign = -1.0 if targeted else 1.0
    alpha = times(number_of(op, "alpha", alpha, x, low=0), sign)
    check_count(op, "steps", steps)
    check_count(op, "restarts", restarts)
    if restarts > 1 and not random_start:
        raise ValueError(
            f"{op}: {restarts} restarts from the same point find the same; use random_start=True or "
            f"restarts=1"
        )
    best = highest = None
    for _ in range(restarts):
        start = draw_start(x, eps, *bounds, norm, generator) if random_start else x.detach()
        found = iterate(op, model, x, y, start, eps, alpha, steps, bounds, loss, norm)
        if restarts == 1:
            return found
        value = sign * _losses(op, model, found, y, loss)
        if best is None:
            best, highest = found, value
        else:
            better = (value > highest) | highest.isnan()
            best, highest = (
                torch.where(_per_sample(better, x), found, best),
                torch.where(better, value, highest),
            )
    return best


def iterate(op, model, x, y, start, eps, alpha, steps, bounds, loss, norm):
    """`steps` projected steps from `start` in the eps-ball around x."""
    origin, adversarial = x.detach(), start
    for _ in range(steps):
        with _autograd():
            grad = _input_gradient(op, model, adversarial, y, loss)
        with torch.no_grad():
            adversarial = attack_step(op, adversarial, grad, origin, alpha, eps, *bounds, norm)
    return adversarial


@torch.no_grad()
def _losses(op, model, x, y, loss):
    """The loss of every sample, (B,)."""
    with shielded(model):
        output = model(x)
    value = cross_entropy(output, y, reduction="none") if loss is None else loss(output, y)
    if value.dim() == 0 or len(value) != len(x):
        raise ValueError(
            f"{op}: with restarts the loss must give one value per sample, ({len(x)}, ...), got shape "
            f"{tuple(value.shape)}; "
            "use reduction='none'"
        )
    return _samples(value).sum(1)


@torch.no_grad()
def draw_start(x, eps, lower, upper, norm, generator):
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    if norm == "linf":
        noise = torch.rand(x.shape, dtype=work, device=x.device, generator=generator) * 2 - 1
    else:  # uniform in the ball: a uniform direction times U^(1/d)
        noise = torch.randn(x.shape, dtype=work, device=x.device, generator=generator)
        direction, length = _unit(noise)
        radius = torch.rand(length.shape, dtype=work, device=x.device, generator=generator)
        noise = direction * radius ** (1 / max(math.prod(x.shape[1:]), 1))
    return clamp(x.to(work) + value_of(eps) * noise, lower, upper).to(x.dtype)
