"""Adversarial examples. `adversarial.py` trains on them.

    x' = clamp(x + eps * sign(dJ/dx), lower, upper)

is the fast gradient sign method (Goodfellow, Shlens, Szegedy 2015), started at x or at a random point (Wong,
Rice, Kolter 2020). PGD repeats the step and projects each result onto the eps-ball around x (Kurakin et al.
2017; Madry et al. 2018).
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.utils.checkpoint

from ._checks import (
    arithmetic_dtype,
    check_choice,
    check_count,
    check_generator,
    check_initialised,
    check_tensor,
    module_of,
)
from ._fgsm import (
    both_bounds,
    bounds_of,
    check_placed,
    fgsm_step_op,
    of_part,
    parameter_of,
    pgd_step_op,
    times,
    value_of,
)
from ._losses import attacked_loss, count_of, loss_per_sample, rows_of
from ._ranks import raise_the_first
from ._shards import own_part, seed_of_first_rank, whole_of_parts
from ._transforms import autocast_dtype, is_sharded, may_look
from ._types import Bounds, FgsmParameter, Loss, Model, Norm, Number

__all__ = ["fgsm", "pgd"]


class Ball(NamedTuple):
    """Where an attack may go: at most `eps` away from its origin in `norm`, and between the bounds."""

    eps: FgsmParameter
    lower: FgsmParameter
    upper: FgsmParameter
    norm: Norm


# ------------------------------------------------------------------------------------------------------------
# One step


def _per_sample(v: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A value per sample, (B,), in the shape that broadcasts to x."""
    return v.view(-1, *(1,) * (x.dim() - 1)) if x.dim() else v.view(())


def _unit(v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """v / |v|_2 per sample and |v|_2, in at least float32; zero stays zero.

    The largest element is divided out first, so that no square overflows or underflows.
    """
    rows = rows_of(v)
    rows = rows.double() if v.dtype == torch.float64 else rows.float()
    largest = rows.abs().amax(1, keepdim=True) if rows.shape[1] else rows.new_zeros(len(rows), 1)
    rows = rows / largest.where(largest > 0, 1)
    length = rows.norm(dim=1, keepdim=True)
    rows = rows / length.where(length > 0, 1)
    return rows.view(v.shape), _per_sample((largest * length).squeeze(1), v)


def attack_step(
    x: torch.Tensor, grad: torch.Tensor, origin: torch.Tensor | None, alpha: FgsmParameter, ball: Ball
) -> torch.Tensor:
    """One step of size alpha up the gradient, projected to the ball around origin (None: no projection) and
    to the bounds.
    """
    if is_sharded(x):
        return _step_of_parts(x, grad, origin, alpha, ball)
    eps, lower, upper, norm = ball
    if norm == "linf":
        if origin is None:
            return fgsm_step_op(x, grad, alpha[0], lower[0], upper[0], alpha[1], lower[1], upper[1])
        numbers, values = zip(alpha, eps, lower, upper, strict=True)
        return pgd_step_op(x, grad, origin, *numbers, *values)
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    # sign(NaN) is 0, and so an element without a gradient takes no part here either. An infinite gradient
    # becomes the largest finite one.
    moved = x.to(work) + value_of(alpha) * _unit(grad.nan_to_num())[0]
    if origin is not None:
        delta = moved - origin.to(work)
        direction, size = _unit(delta)
        moved = torch.where(size > value_of(eps), origin.to(work) + direction * value_of(eps), moved)
    return clamp(moved, lower, upper).to(x.dtype)


def _step_of_parts(x: Any, grad: Any, origin: Any, alpha: FgsmParameter, ball: Ball) -> torch.Tensor:
    """The step of DTensors: each rank's of its part, placed as x is. The l2 norm needs whole samples."""
    from torch.distributed.tensor import Replicate

    mesh, placements = x.device_mesh, x.placements
    if ball.norm == "l2":
        placements = [p if p.is_shard(0) else Replicate() for p in placements]
    own: list[Any] = [
        t if t is None else t.redistribute(mesh, placements).to_local() for t in (x, grad, origin)
    ]
    moved = attack_step(
        own[0], own[1], own[2], of_part(alpha, x, placements), _ball_of_part(ball, x, placements)
    )
    return whole_of_parts(moved, mesh, placements, x.shape, x.stride()).redistribute(mesh, x.placements)


def _ball_of_part(ball: Ball, x: Any, placements: Sequence[Any]) -> Ball:
    eps, lower, upper = (of_part(each, x, placements) for each in (ball.eps, ball.lower, ball.upper))
    return Ball(eps, lower, upper, ball.norm)


def clamp(x: torch.Tensor, lower: FgsmParameter, upper: FgsmParameter) -> torch.Tensor:
    """x between the bounds."""
    low, high = (torch.as_tensor(value_of(bound), device=x.device, dtype=x.dtype) for bound in (lower, upper))
    return torch.minimum(torch.maximum(x, low), high)


# ------------------------------------------------------------------------------------------------------------
# The gradient of the input, with no trace on the model


@contextlib.contextmanager
def _autograd() -> Iterator[None]:
    """Gradients even where the caller has switched them off."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


@contextlib.contextmanager
def shielded(model: Any) -> Iterator[None]:
    """Running statistics and other buffers change on copies, which are thrown away. Not even the version
    counters of the originals move.

    torch.func.functional_call does not serve here: where one module stands at two places of the model, it
    leaves a copy behind in one of them.
    """
    owner = module_of(model)
    modules = () if owner is None else owner.modules()
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


@contextlib.contextmanager
def alone(model: Any) -> Iterator[None]:
    """DistributedDataParallel computes as the model that it wraps.

    The gradient of an input is a rank's own business. Through the wrapper the forward pass would send the
    buffers of rank 0, and static_graph=True would take this backward pass, which reaches no parameter, for
    the pattern of all that follow: the gradients of the training steps would never be averaged again.
    """
    wrappers = [m for m in ddp_of(model) if "forward" not in m.__dict__]
    try:
        for wrapper in wrappers:
            wrapper.__dict__["forward"] = wrapper.module.__call__
        yield
    finally:
        for wrapper in wrappers:
            wrapper.__dict__.pop("forward", None)


def ddp_of(model: Any) -> list[torch.nn.parallel.DistributedDataParallel]:
    """The wrappers for data parallel training in a model, itself among them."""
    owner = module_of(model)
    modules = () if owner is None else owner.modules()
    return [m for m in modules if isinstance(m, torch.nn.parallel.DistributedDataParallel)]


def _set_buffer(module: torch.nn.Module, name: str, buffer: torch.Tensor) -> None:
    if isinstance(module, torch.jit.ScriptModule):
        setattr(module, name, buffer)
    else:
        module._buffers[name] = buffer


class _PlainCheckpoints:
    """Checkpoints of the reentrant kind are made as torch's other kind, while anyone is inside.

    torch refuses the gradient of an input alone through a reentrant checkpoint, whose backward pass also adds
    to `.grad` of whatever parameters it meets. The other kind computes the same and adds nothing. The
    exchange holds for all threads, because the backward pass of a GPU, which recomputes nested checkpoints,
    runs on a thread of its own.
    """

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                torch.utils.checkpoint.CheckpointFunction.apply = staticmethod(_checkpoint)

    def __exit__(self, *error: Any) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                del torch.utils.checkpoint.CheckpointFunction.apply


def _checkpoint(function: Any, preserve_rng_state: bool, *args: Any) -> Any:
    """What CheckpointFunction.apply does, without reentering the backward pass."""

    def run(*args: Any) -> Any:
        # Checkpoints in it stay of one kind when the caller's backward pass runs it again.
        with plain_checkpoints:
            return function(*args)

    return torch.utils.checkpoint.checkpoint(
        run, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state
    )


plain_checkpoints = _PlainCheckpoints()


def _input_gradient(op: str, model: Model, x: torch.Tensor, y: Any, loss: Loss | None) -> torch.Tensor:
    """d loss / d x, of x's shape and dtype, with nothing left behind on the model."""
    check_initialised(op, model)
    x = x.detach().clone().requires_grad_()
    if isinstance(y, torch.Tensor) and y.is_inference():
        y = y.clone()
    # The backward pass is shielded too, because checkpoints run the model's modules again in it.
    with shielded(model), alone(model), plain_checkpoints:
        return _signed_gradient(op, model, x, attacked_loss(op, loss, model(x), y, count_of(x)))


def _signed_gradient(op: str, model: Model, x: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """d value / d x.

    In float16 a gradient below 6e-8 is 0 and has lost its sign, so the loss is scaled up first. A sample
    whose gradient overflows takes it from a smaller scale.
    """
    if not computes_in_float16(model, x):
        return gradient_of(op, value, x)
    first, *others = (2.0**16, 2.0**10, 2.0**4, 1.0, 2.0**-6)
    best = gradient_of(op, value.float() * first, x, retain_graph=True)
    missing = _overflown(best)
    for scale in others:
        if not missing.any():
            break
        grad = gradient_of(op, value.float() * scale, x, retain_graph=scale != others[-1])
        best = torch.where(_per_sample(missing, x), grad, best)
        missing = missing & _overflown(grad)
    return best


def _overflown(grad: torch.Tensor) -> torch.Tensor:
    """Which samples have a gradient that is not finite, (B,)."""
    return ~rows_of(grad.isfinite()).all(1)


def gradient_of(
    op: str, value: torch.Tensor, x: torch.Tensor, retain_graph: bool | None = None
) -> torch.Tensor:
    """d value / d x, or an error where value does not depend on x."""
    if value.requires_grad:
        try:
            (grad,) = torch.autograd.grad(value, x, retain_graph=retain_graph, allow_unused=True)
        except RuntimeError as error:
            if "torch.utils.checkpoint is incompatible" not in str(error):
                raise
            raise RuntimeError(
                f"{op}: the model's checkpoints do not give the gradient of its input; make them by "
                f"torch.utils.checkpoint with use_reentrant=False"
            ) from error
        if grad is not None:
            return grad
    raise no_gradient(op)


def no_gradient(op: str) -> ValueError:
    """The error for a loss that does not depend on x."""
    return ValueError(
        f"{op}: the loss does not depend on x; expected loss(model(x), y) to be differentiable in x"
    )


def computes_in_float16(model: Any, x: torch.Tensor) -> bool:
    """Whether a gradient of the model's input may pass through float16."""
    device = x.device.type
    return (
        x.dtype == torch.float16
        or autocast_dtype(device) == torch.float16
        or (isinstance(model, torch.nn.Module) and any(p.dtype == torch.float16 for p in model.parameters()))
    )


# ------------------------------------------------------------------------------------------------------------
# Attacks


def prepare(op: str, x: torch.Tensor, eps: Number, bounds: Bounds | None, norm: Norm) -> Ball:
    """The arguments that every attack has, checked, and x too."""
    return around(op, x, check_ball(op, x, eps, bounds, norm))


def check_ball(op: str, x: torch.Tensor, eps: Number, bounds: Bounds | None, norm: Norm) -> Ball:
    """The arguments that every attack has, checked."""
    check_tensor(op, "x", x)
    check_placed(op, "x", x)
    if not x.is_floating_point():
        raise TypeError(f"{op}: x must be a floating-point tensor, got {x.dtype}; convert it with .float()")
    check_choice(op, "norm", norm, ("linf", "l2"))
    lower, upper = both_bounds(op, bounds)
    size = parameter_of(op, "eps", eps, x, low=0)
    box = bounds_of(op, lower, upper, x)
    return Ball(size, box[0], box[1], norm)


@torch.no_grad()
def around(op: str, x: torch.Tensor, ball: Ball) -> Ball:
    """`ball` with bounds that hold all of x, so that no clamp moves an element of x by itself.

    Raises where x is seen to lie outside of the bounds by more than rounding.
    """
    lower, upper = (value_of(bound) for bound in (ball.lower, ball.upper))
    if (ball.lower == (-math.inf, None) and ball.upper == (math.inf, None)) or not x.numel():
        return ball
    if is_sharded(x):
        return _around_parts(op, x, ball)
    wide = x.detach().to(arithmetic_dtype(x))
    if may_look(x):
        if not isinstance(lower, torch.Tensor) and not isinstance(upper, torch.Tensor):
            least, largest = wide.aminmax()  # one pass over x, where all is well
            if lower <= least and largest <= upper:
                return ball
        if not ((wide < lower) | (wide > upper)).any():
            return ball
        # Bounds and images that were normalised apart from each other differ in the last places.
        room = 4 * torch.finfo(x.dtype).eps * wide.abs().clamp(min=1)
        if ((wide < lower - room) | (wide > upper + room)).any():
            low, high = wide.nan_to_num(0, math.inf, -math.inf).aminmax()
            raise ValueError(
                f"{op}: x must lie within bounds, from {_range_text(lower, min)} to "
                f"{_range_text(upper, max)}, got values from {low.item():.4g} to {high.item():.4g}; give the "
                f"bounds of x, for images normalised with mean and std bounds=((0 - mean) / std, (1 - mean) "
                f"/ std) and eps / std, or clamp x"
            )
    lows, highs = (torch.as_tensor(bound, dtype=wide.dtype, device=x.device) for bound in (lower, upper))
    return ball._replace(
        lower=(0.0, torch.minimum(lows, wide).contiguous()),
        upper=(0.0, torch.maximum(highs, wide).contiguous()),
    )


def _around_parts(op: str, x: Any, ball: Ball) -> Ball:
    """`around` of a DTensor. One message tells whether some rank's part lies outside of the bounds: then all
    raise the same error.
    """
    mesh, placements, local = x.device_mesh, x.placements, x.to_local()
    groups = [mesh.get_group(axis) for axis in range(mesh.ndim)]
    own = _ball_of_part(ball, x, placements)
    failed, held = None, own
    try:
        held = around(op, local, own)
    except ValueError as error:
        failed = error
    found = torch.tensor([held is not own, failed is not None], dtype=torch.uint8, device=local.device)
    for group in groups:
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX, group=group)
    if may_look(x):
        if found[1]:
            raise_the_first(failed, *groups)
        if not found[0]:
            return ball

    def bound(parameter: FgsmParameter, end: Any) -> FgsmParameter:
        wide = local.to(arithmetic_dtype(local))
        part = end(torch.as_tensor(value_of(parameter), dtype=wide.dtype, device=wide.device), wide)
        return 0.0, whole_of_parts(part.contiguous(), mesh, placements, x.shape, x.stride())

    return ball._replace(lower=bound(own.lower, torch.minimum), upper=bound(own.upper, torch.maximum))


def _range_text(bound: float | torch.Tensor, end: Any) -> str:
    """The least of the lower bounds, or the largest of the upper ones."""
    return f"{end(bound.flatten().tolist()) if isinstance(bound, torch.Tensor) else bound:.4g}"


def fgsm(
    model: Model,
    x: torch.Tensor,
    y: Any,
    eps: Number,
    *,
    loss: Loss | None = None,
    bounds: Bounds | None = (0.0, 1.0),
    targeted: bool = False,
    norm: Norm = "linf",
    random_start: bool = False,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Adversarial examples by one step along the gradient of the loss.

    linf: clamp(x + eps * sign(g)); l2: clamp(x + eps * g / |g|_2 per sample), with g = d loss / d x.

    Args:
        model: callable or Module, called as model(x) in the mode it is in; gives logits unless `loss` takes
            something else. The state of a Module is shielded; a function that calls modules of its own is
            called as it is.
        x: inputs, (B, ...), floating point, in the units of `bounds`; or a DTensor, replicated or sharded in
            any dimension, for a model that takes it. The values are then those of the whole x, y, eps and
            bounds, plain tensors the same on all ranks, and where the generators differ the first rank's
            counts.
        y: what `loss` compares with: class indices (B,) or probabilities; with `targeted` the class that the
            model shall see.
        eps: size of the step, at least 0: a number, or a tensor with one value per channel (C,), per sample
            (B,) or of any shape that broadcasts to x. For normalised inputs divide by their standard
            deviation: 8 / 255 / std.
        loss: loss(output, target) -> tensor, called as loss(model(x), y): one number, or one value per
            sample, (B, ...). An attack takes the sum, a training objective the mean. Cross-entropy if None.
        bounds: (lower, upper) of valid inputs, each like `eps` or None; None for no bounds. For inputs
            normalised with mean and std: ((0 - mean) / std, (1 - mean) / std).
        targeted: step down the loss of y instead of up.
        norm: "linf" or "l2".
        random_start: take the gradient at a uniform random point of the eps-ball and step 1.25 * eps from
            there, back into the ball: the examples of fast adversarial training.
        generator: torch.Generator on x's device for that point.

    Returns:
        Tensor like x, detached, no element of which is more than eps away from that of x, up to the rounding
        of its dtype. Nothing else changes: neither modes, buffers such as BatchNorm's statistics,
        nor `.grad` of parameters or of x. Works under no_grad and inference_mode, and under autocast. Only
        random state that the model itself draws from (dropout) moves on.

    Raises:
        ValueError: eps negative, infinite or NaN, bounds that do not fit or cross, x outside of them (on a
            GPU, where nobody may look, such an element only never moves further away), an unknown norm, a
            loss that does not depend on x or is neither one number nor one value per sample.
        TypeError: x is no floating-point tensor, the loss gives no tensor, or the model gives no tensor of
            logits and there is no `loss` that takes what it gives.

    Source: Goodfellow, Shlens, Szegedy 2015; l2: Miyato, Dai, Goodfellow 2017; random_start: Wong, Rice,
    Kolter 2020, Fast is better than free.
    """
    ball = prepare("fgsm", x, eps, bounds, norm)
    return one_step("fgsm", model, x, y, ball, loss, -1.0 if targeted else 1.0, random_start, generator)


def one_step(
    op: str,
    model: Model,
    x: torch.Tensor,
    y: Any,
    ball: Ball,
    loss: Loss | None,
    sign: float,
    random_start: bool,
    generator: torch.Generator | None,
) -> torch.Tensor:
    """`fgsm` with checked arguments; sign is -1 for a step down the loss."""
    check_generator(op, generator)
    if random_start:
        start = draw_start(x, ball, generator)
        return iterate(op, model, x, y, start, times(ball.eps, 1.25 * sign), 1, ball, loss)
    with _autograd():
        grad = _input_gradient(op, model, x, y, loss)
    with torch.no_grad():
        return attack_step(x.detach(), grad, None, times(ball.eps, sign), ball)


def pgd(
    model: Model,
    x: torch.Tensor,
    y: Any,
    eps: Number,
    alpha: Number,
    steps: int,
    *,
    random_start: bool = True,
    restarts: int = 1,
    loss: Loss | None = None,
    bounds: Bounds | None = (0.0, 1.0),
    targeted: bool = False,
    norm: Norm = "linf",
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Adversarial examples by projected gradient descent: `steps` steps of size alpha, each projected to the
    eps-ball around x.

    Args:
        alpha: size of one step, like `eps`.
        steps: number of steps, at least 1.
        random_start: begin at a uniform random point of the ball instead of at x.
        restarts: number of random starts, of which each sample keeps the one with the highest loss (with
            `targeted` the lowest). A `loss` must then give one value per sample.
        generator: torch.Generator on x's device for these points.

    Other arguments, result and errors as in `fgsm`. In the "linf" norm step and projection are one pass over
    memory.
    Source: Madry, Makelov, Schmidt, Tsipras, Vladu 2018, Towards deep learning models resistant to
    adversarial attacks.
    """
    op = "pgd"
    ball = prepare(op, x, eps, bounds, norm)
    sign = -1.0 if targeted else 1.0
    step = times(parameter_of(op, "alpha", alpha, x, low=0), sign)
    check_count(op, "steps", steps)
    check_count(op, "restarts", restarts)
    check_generator(op, generator)
    if restarts > 1 and not random_start:
        raise ValueError(
            f"{op}: {restarts} restarts from the same point find the same; use random_start=True or "
            f"restarts=1"
        )

    def run() -> torch.Tensor:
        start = draw_start(x, ball, generator) if random_start else x.detach()
        return iterate(op, model, x, y, start, step, steps, ball, loss)

    best = run()
    if restarts == 1:
        return best
    highest = sign * _losses(op, model, best, y, loss)
    for _ in range(restarts - 1):
        found = run()
        value = sign * _losses(op, model, found, y, loss)
        better = (value > highest) | highest.isnan()
        best = torch.where(_per_sample(better, x), found, best)
        highest = torch.where(better, value, highest)
    return best


def iterate(
    op: str,
    model: Model,
    x: torch.Tensor,
    y: Any,
    start: torch.Tensor,
    alpha: FgsmParameter,
    steps: int,
    ball: Ball,
    loss: Loss | None,
) -> torch.Tensor:
    """`steps` projected steps from `start` in the ball around x."""
    origin, adversarial = x.detach(), start
    for _ in range(steps):
        with _autograd():
            grad = _input_gradient(op, model, adversarial, y, loss)
        with torch.no_grad():
            adversarial = attack_step(adversarial, grad, origin, alpha, ball)
    return adversarial


@torch.no_grad()
def _losses(op: str, model: Model, x: torch.Tensor, y: Any, loss: Loss | None) -> torch.Tensor:
    """The loss of every sample, (B,), without a trace on the model."""
    with shielded(model), alone(model), plain_checkpoints:
        output = model(x)
    return loss_per_sample(op, loss, output, y, count_of(x))


@torch.no_grad()
def draw_start(x: torch.Tensor, ball: Ball, generator: torch.Generator | None) -> torch.Tensor:
    """A uniform random point of the ball around x, between the bounds."""
    if is_sharded(x):
        return _start_of_parts(x, ball, generator)
    noise = _noise(x, ball.norm, generator)
    return _started(x, noise, ball)


def _noise(x: torch.Tensor, norm: Norm, generator: torch.Generator | None) -> torch.Tensor:
    """A uniform random point of the unit ball for each sample, of the shape of x."""
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    if norm == "linf":
        return torch.rand(x.shape, dtype=work, device=x.device, generator=generator) * 2 - 1
    # A uniform direction times U^(1/d) is uniform in the ball of d dimensions.
    noise = torch.randn(x.shape, dtype=work, device=x.device, generator=generator)
    direction, length = _unit(noise)
    radius = torch.rand(length.shape, dtype=work, device=x.device, generator=generator)
    return direction * radius ** (1 / max(math.prod(x.shape[1:]), 1))


def _started(x: torch.Tensor, noise: torch.Tensor, ball: Ball) -> torch.Tensor:
    return clamp(x.to(noise.dtype) + value_of(ball.eps) * noise, ball.lower, ball.upper).to(x.dtype)


def _start_of_parts(x: Any, ball: Ball, generator: torch.Generator | None) -> torch.Tensor:
    """The start of a DTensor: that of the whole, drawn by the generator of the mesh's first rank. Each rank
    draws all of it and keeps its part.
    """
    mesh, placements = x.device_mesh, x.placements
    state = _state_of(x.device, generator)
    first = seed_of_first_rank(state.to(x.device, copy=True), mesh).to(state.device)
    noise = _noise(x, ball.norm, generator)
    if not torch.equal(first, state):  # its own generator has moved on all the same, as that of the first
        noise = _noise(x, ball.norm, torch.Generator(x.device).set_state(first))
    part = own_part(x.shape, mesh, placements)
    start = _started(x.to_local(), noise[part], _ball_of_part(ball, x, placements))
    return whole_of_parts(start, mesh, placements, x.shape, x.stride())


def _state_of(device: torch.device, generator: torch.Generator | None) -> torch.Tensor:
    """The state of a generator or of the device's default one."""
    if generator is not None:
        return generator.get_state()
    if device.type == "cpu":
        return torch.get_rng_state()
    return torch.get_device_module(device).get_rng_state(device)
