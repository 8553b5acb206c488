"""Adversarial examples; `adversarial.py` trains on them.

The fast gradient sign method, x' = clamp(x + eps sign(dJ/dx)) (Goodfellow, Shlens, Szegedy 2015), from x or from a random start
(Wong, Rice, Kolter 2020), and its iterated form with projection, PGD (Kurakin et al. 2017; Madry et al. 2018).
"""

import contextlib
import math

import torch

from ._library import check_choice, check_count, check_number, check_tensor, define
from .cross_entropy import cross_entropy

# Each number of the formula is one value, or a tensor of values that broadcasts over neighbouring dimensions.
define(
    "fgsm_step(Tensor x, Tensor grad, float eps, float lower, float upper, Tensor? eps_values=None, "
    "Tensor? lower_values=None, Tensor? upper_values=None) -> Tensor"
)
define(
    "pgd_step(Tensor x, Tensor grad, Tensor origin, float alpha, float eps, float lower, float upper, "
    "Tensor? alpha_values=None, Tensor? eps_values=None, Tensor? lower_values=None, Tensor? upper_values=None) -> Tensor"
)


@torch.library.register_fake("fastreg::fgsm_step")
def _(x, grad, eps, lower, upper, eps_values=None, lower_values=None, upper_values=None):
    return torch.empty_like(x)


@torch.library.register_fake("fastreg::pgd_step")
def _(x, grad, origin, alpha, eps, lower, upper, alpha_values=None, eps_values=None, lower_values=None, upper_values=None):
    return torch.empty_like(x)


_fgsm_step = torch.ops.fastreg.fgsm_step.default
_pgd_step = torch.ops.fastreg.pgd_step.default


def _number(op, name, value, x, low=-math.inf, infinite=False):
    """(float, None) for one number, (0.0, tensor) for one per channel, per sample or per element."""
    if not isinstance(value, torch.Tensor):
        check_number(op, name, value, low)
        if abs(value) == math.inf and not infinite:
            raise ValueError(f"{op}: {name} must be finite, got {value}")
        return float(value), None
    if value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{op}: {name} must be real numbers, got {value.dtype}")
    value = value.detach().to(x.device, torch.float64 if x.dtype == torch.float64 else torch.float32)
    if value.numel() == 1:
        value = value.reshape(())
    if value.dim() == 1 and x.dim() >= 2:
        channel, sample = len(value) == x.shape[1], len(value) == x.shape[0]
        if channel and sample:
            raise ValueError(
                f"{op}: {name} of shape {tuple(value.shape)} fits the batch and the channels of x, {tuple(x.shape)}; "
                f"give it as {(len(value), *(1,) * (x.dim() - 1))} or {(1, len(value), *(1,) * (x.dim() - 2))}"
            )
        if channel:
            value = value.view(-1, *(1,) * (x.dim() - 2))
        elif sample:
            value = value.view(-1, *(1,) * (x.dim() - 1))
    try:
        fits = torch.broadcast_shapes(value.shape, x.shape) == x.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"{op}: {name} must be a number, one per channel or one per sample of x, {tuple(x.shape)}, "
            f"got shape {tuple(value.shape)}"
        )
    if value.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = value[~((value >= low) & (infinite | value.isfinite()))]
        if wrong.numel():
            least = "" if low == -math.inf else f" and at least {low:g}"
            raise ValueError(f"{op}: {name} must be {'numbers' if infinite else 'finite'}{least}, got {wrong[0].item()}")
    wide = [d for d, size in enumerate(value.shape) if size != 1]
    lead = x.dim() - value.dim()
    if wide and any(value.shape[d] != x.shape[d + lead] for d in range(wide[0], wide[-1] + 1)):
        value = value.expand(x.shape)
    return 0.0, value.contiguous()


def _check_pair(op, x, grad, name="grad"):
    check_tensor(op, "x", x)
    check_tensor(op, name, grad)
    for what, got, expected in (
        ("shape", tuple(grad.shape), tuple(x.shape)),
        ("dtype", grad.dtype, x.dtype),
        ("device", grad.device, x.device),
    ):
        if got != expected:
            raise ValueError(f"{op}: {name} must have the {what} of x, {expected}, got {got}")


def _text(value):
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else f"{value:g}"


def _bounds(op, lower, upper, x):
    lower = _number(op, "lower", -math.inf if lower is None else lower, x, infinite=True)
    upper = _number(op, "upper", math.inf if upper is None else upper, x, infinite=True)
    low, high = _value(lower), _value(upper)
    if lower[1] is None and upper[1] is None:
        crossed = low > high
    else:  # where a look at the values costs nothing
        crossed = x.device.type == "cpu" and not torch.compiler.is_compiling() and bool((low > high).any())
    if crossed:
        raise ValueError(f"{op}: lower must not exceed upper, got {_text(low)} and {_text(high)}")
    return lower, upper


def fgsm_step(x, grad, eps, lower=None, upper=None):
    """clamp(x + eps * sign(grad), lower, upper) in one pass over memory.

    Args:
        x: tensor of any shape; float32, float64, float16 or bfloat16.
        grad: gradient of the loss with respect to x: its shape, dtype and device.
        eps: step, in the units of x: a number, or a tensor with one value per channel (C,) or (C, 1, 1), per sample (B,) or
            (B, 1, 1, 1), or per element. A negative step goes down the gradient.
        lower, upper: bounds of the result, as `eps`; None for none.

    Returns:
        A new tensor like x, detached. sign(0) and sign(NaN) are 0, as in torch; a NaN in x stays.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, NaN numbers, lower above upper, a dtype without kernels.
        TypeError: no tensor, or no number.

    Source: Goodfellow, Shlens, Szegedy 2015, Explaining and harnessing adversarial examples.
    """
    op = "fgsm_step"
    _check_pair(op, x, grad)
    eps = _number(op, "eps", eps, x)
    lower, upper = _bounds(op, lower, upper, x)
    with torch.no_grad():
        return _fgsm_step(x.detach(), grad.detach(), eps[0], lower[0], upper[0], eps[1], lower[1], upper[1])


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


def _value(number):
    return number[0] if number[1] is None else number[1]


def _attack_step(op, x, grad, origin, alpha, eps, lower, upper, norm):
    """One ascent step of size alpha in `norm`, projected to the eps-ball around origin (None: no projection) and the box."""
    if norm == "linf":
        box = (lower[0], upper[0]), (lower[1], upper[1])
        if origin is None:
            return _fgsm_step(x, grad, alpha[0], *box[0], alpha[1], *box[1])
        return _pgd_step(x, grad, origin, alpha[0], eps[0], *box[0], alpha[1], eps[1], *box[1])
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    # As sign(NaN) is 0: an element without a gradient takes no part; an infinite one is the largest there is.
    moved = x.to(work) + _value(alpha) * _unit(grad.nan_to_num())[0]
    if origin is not None:
        delta = moved - origin.to(work)
        direction, size = _unit(delta)
        moved = torch.where(size > _value(eps), origin.to(work) + direction * _value(eps), moved)
    return _clamp(moved, lower, upper).to(x.dtype)


def _clamp(x, lower, upper):
    lower, upper = (torch.as_tensor(_value(bound), device=x.device, dtype=x.dtype) for bound in (lower, upper))
    return torch.minimum(torch.maximum(x, lower), upper)


@contextlib.contextmanager
def _autograd():
    """Gradients even where the caller has switched them off."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


@contextlib.contextmanager
def _shielded(model):
    """Running statistics and other buffers move on copies, which are thrown away: not even version counters of the originals do.

    Not torch.func.functional_call, which leaves a copy behind in a module that stands at two places of the model.
    """
    owner = model if isinstance(model, torch.nn.Module) else getattr(model, "__self__", None)  # model.forward is a model, too
    modules = owner.modules() if isinstance(owner, torch.nn.Module) else ()
    originals = [(m, name, buffer) for m in modules for name, buffer in m._buffers.items() if buffer is not None]
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
    return cross_entropy(logits, y, reduction="sum", loss_dtype=torch.promote_types(logits.dtype, torch.float32))


def _input_gradient(op, model, x, y, loss):
    """d loss / d x, of x's shape and dtype, with nothing left behind on the model.

    In float16 a gradient below 6e-8 is 0 and has lost its sign, so the loss is scaled up first; samples whose gradient
    overflows are taken from smaller scales. The sum over the batch, not the mean, keeps the batch size out of it.
    """
    x = x.detach().clone().requires_grad_()
    if isinstance(y, torch.Tensor) and y.is_inference():
        y = y.clone()
    with _shielded(model):
        value = _loss(loss, model(x), y)
    if not _computes_in_float16(model, x):
        return _gradient(op, value, x)
    scales = (2.0**16, 2.0**10, 2.0**4, 1.0, 2.0**-6)
    best = missing = None
    for scale in scales:
        grad = _gradient(op, value.float() * scale, x, retain_graph=scale != scales[-1])
        bad = ~_samples(grad.isfinite()).all(1)
        best = grad if best is None else torch.where(_per_sample(missing, x), grad, best)
        missing = bad if missing is None else missing & bad
        if not missing.any():
            break
    return best


def _gradient(op, value, x, retain_graph=None):
    if value.requires_grad:
        (grad,) = torch.autograd.grad(value, x, retain_graph=retain_graph, allow_unused=True)
        if grad is not None:
            return grad
    raise ValueError(f"{op}: the loss does not depend on x; expected loss(model(x), y) to be differentiable in x")


def _computes_in_float16(model, x):
    device = x.device.type
    return (
        x.dtype == torch.float16
        or (torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16)
        or (isinstance(model, torch.nn.Module) and any(p.dtype == torch.float16 for p in model.parameters()))
    )


def _prepare(op, x, eps, bounds, norm):
    check_tensor(op, "x", x)
    if not x.is_floating_point():
        raise TypeError(f"{op}: x must be a floating-point tensor, got {x.dtype}; convert it with .float()")
    check_choice(op, "norm", norm, ("linf", "l2"))
    if bounds is None:
        bounds = (None, None)
    if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
        raise ValueError(f"{op}: bounds must be (lower, upper) or None, got {bounds!r}")
    eps = _number(op, "eps", eps, x, low=0)
    return eps, *_bounds(op, *bounds, x)


def _times(number, sign):
    return number[0] * sign, None if number[1] is None else number[1] * sign


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
        model: callable or Module, called as model(x) in the mode it is in; gives logits unless `loss` takes something else. The
            state of a Module is shielded; a function that calls modules of its own is called as it is.
        x: inputs, (B, ...), floating point, in the units of `bounds`.
        y: what `loss` compares with: class indices (B,) or probabilities; with `targeted` the class to be mistaken for.
        eps: size of the step, at least 0: a number, or a tensor with one value per channel (C,), per sample (B,) or of any shape
            that broadcasts to x. For normalised inputs divide by their standard deviation: 8 / 255 / std.
        loss: callable(model(x), y) -> tensor, summed; cross-entropy if None.
        bounds: (lower, upper) of valid inputs, each like `eps`; None for none.
        targeted: step down the loss of y instead of up.
        norm: "linf" or "l2".
        random_start: take the gradient at a uniform random point of the eps-ball and step 1.25 * eps from there, back into the
            ball: the examples of fast adversarial training.
        generator: torch.Generator on x's device for that point.

    Returns:
        Tensor like x, detached. Nothing else changes: neither modes, buffers such as BatchNorm's statistics, nor `.grad` of
        parameters or of x. Works under no_grad and inference_mode, and under autocast. Only random state that the model itself
        draws from (dropout) moves on.

    Raises:
        ValueError: eps negative, infinite or NaN, bounds that do not fit or cross, an unknown norm, a loss that does not depend
            on x.
        TypeError: x is no floating-point tensor.

    Source: Goodfellow, Shlens, Szegedy 2015; l2: Miyato, Dai, Goodfellow 2017; random_start: Wong, Rice, Kolter 2020, Fast is
    better than free.
    """
    eps, *bounds = _prepare("fgsm", x, eps, bounds, norm)
    return _one_step("fgsm", model, x, y, eps, bounds, loss, -1.0 if targeted else 1.0, norm, random_start, generator)


def _one_step(op, model, x, y, eps, bounds, loss, sign, norm, random_start, generator):
    if random_start:
        start = _random_start(x, eps, *bounds, norm, generator)
        return _iterate(op, model, x, y, start, eps, _times(eps, 1.25 * sign), 1, bounds, loss, norm)
    with _autograd():
        grad = _input_gradient(op, model, x, y, loss)
    with torch.no_grad():
        return _attack_step(op, x.detach(), grad, None, _times(eps, sign), eps, *bounds, norm)


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
    """Adversarial examples by projected gradient descent: `steps` steps of size alpha, each projected to the eps-ball around x.

    Args:
        alpha: size of one step, like `eps`.
        steps: number of steps, at least 1.
        random_start: begin at a uniform random point of the ball instead of at x.
        restarts: number of random starts, of which each sample keeps the one with the highest loss (with `targeted` the lowest).
            A loss of one's own must then give one value per sample, (B, ...).
        generator: torch.Generator on x's device for these points.

    Other arguments, result and errors as in `fgsm`. In the "linf" norm step and projection are one pass over memory.
    Source: Madry, Makelov, Schmidt, Tsipras, Vladu 2018, Towards deep learning models resistant to adversarial attacks.
    """
    op = "pgd"
    eps, *bounds = _prepare(op, x, eps, bounds, norm)
    sign = -1.0 if targeted else 1.0
    alpha = _times(_number(op, "alpha", alpha, x, low=0), sign)
    check_count(op, "steps", steps)
    check_count(op, "restarts", restarts)
    if restarts > 1 and not random_start:
        raise ValueError(f"{op}: {restarts} restarts from the same point find the same; use random_start=True or restarts=1")
    best = highest = None
    for _ in range(restarts):
        start = _random_start(x, eps, *bounds, norm, generator) if random_start else x.detach()
        found = _iterate(op, model, x, y, start, eps, alpha, steps, bounds, loss, norm)
        if restarts == 1:
            return found
        value = sign * _losses(op, model, found, y, loss)
        if best is None:
            best, highest = found, value
        else:
            better = (value > highest) | highest.isnan()
            best, highest = torch.where(_per_sample(better, x), found, best), torch.where(better, value, highest)
    return best


def _iterate(op, model, x, y, start, eps, alpha, steps, bounds, loss, norm):
    """`steps` projected steps from `start` in the eps-ball around x."""
    origin, adversarial = x.detach(), start
    for _ in range(steps):
        with _autograd():
            grad = _input_gradient(op, model, adversarial, y, loss)
        with torch.no_grad():
            adversarial = _attack_step(op, adversarial, grad, origin, alpha, eps, *bounds, norm)
    return adversarial


@torch.no_grad()
def _losses(op, model, x, y, loss):
    """The loss of every sample, (B,)."""
    with _shielded(model):
        output = model(x)
    value = cross_entropy(output, y, reduction="none") if loss is None else loss(output, y)
    if value.dim() == 0 or len(value) != len(x):
        raise ValueError(
            f"{op}: with restarts the loss must give one value per sample, ({len(x)}, ...), got shape {tuple(value.shape)}; "
            "use reduction='none'"
        )
    return _samples(value).sum(1)


@torch.no_grad()
def _random_start(x, eps, lower, upper, norm, generator):
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    if norm == "linf":
        noise = torch.rand(x.shape, dtype=work, device=x.device, generator=generator) * 2 - 1
    else:  # uniform in the ball: a uniform direction times U^(1/d)
        noise = torch.randn(x.shape, dtype=work, device=x.device, generator=generator)
        direction, length = _unit(noise)
        radius = torch.rand(length.shape, dtype=work, device=x.device, generator=generator)
        noise = direction * radius ** (1 / max(math.prod(x.shape[1:]), 1))
    return _clamp(x.to(work) + _value(eps) * noise, lower, upper).to(x.dtype)
