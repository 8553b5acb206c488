"""Training on adversarial examples, at three prices, and the accuracy that it is for.

J~(x, y) = (1 - weight) * J(x, y) + weight * J(x', y) with x' = fgsm(x) (Goodfellow, Shlens, Szegedy 2015,
section 6). A pass is one forward and one backward through the model; plain training costs one per batch:

- `adversarial_loss`: two forward passes, three backward (one of them to the input alone); an expression like
  any other loss;
- `adversarial_backward`: the same gradients by two passes of each kind, since one backward pass gives the
  gradients of the weights and that of the input;
- `FreeAdversarial`: as many as plain training (Shafahi et al. 2019).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from ._checks import check_choice, check_count, check_number, check_tensor
from ._fgsm import fgsm_step_op, number_of, pair_of, times
from ._losses import count_of, trained_loss
from ._types import Bounds, Loss, Model, Norm, Number, Value
from .attacks import (
    Ball,
    attack_step,
    clamp,
    computes_in_float16,
    draw_start,
    gradient_of,
    iterate,
    no_gradient,
    one_step,
    prepare,
    shielded,
)

__all__ = ["FreeAdversarial", "adversarial_backward", "adversarial_loss", "robust_accuracy"]


def adversarial_loss(
    model: Model,
    x: torch.Tensor,
    y: Any,
    eps: Number,
    *,
    weight: float = 0.5,
    loss: Loss | None = None,
    bounds: Bounds | None = (0.0, 1.0),
    norm: Norm = "linf",
    random_start: bool = False,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """The objective of adversarial training, (1 - weight) * J(x, y) + weight * J(x', y) with x' = fgsm(x).

    The clean forward pass serves both the clean loss and the attack, so that the price over plain training is
    one extra forward and backward pass and the gradient's way to the input; `adversarial_backward` saves the
    latter. With `random_start` the attack needs a forward pass of its own. Fast adversarial training (Wong,
    Rice, Kolter 2020) is weight=1, random_start=True.

    Args:
        model: Module or callable, called twice in the mode it is in; its statistics move as in any two
            training passes.
        weight: share of the adversarial examples, in [0, 1]; with 0 or 1 the other kind is not evaluated.
        loss: J, as in `fgsm`; the mean of what it gives is trained on. Mean cross-entropy if None.

    Other arguments as in `fgsm`.

    Returns:
        The loss, (), attached to the model's parameters, not to x.

    Raises:
        ValueError, TypeError: as `fgsm`; weight outside [0, 1].
    """
    op = "adversarial_loss"
    ball = prepare(op, x, eps, bounds, norm)
    check_number(op, "weight", weight, 0, 1)
    x = x.detach()

    def evaluate(x: torch.Tensor) -> torch.Tensor:
        return trained_loss(op, loss, model(x), y, count_of(x))

    def attack() -> torch.Tensor:
        return one_step(op, model, x, y, ball, loss, 1.0, random_start, generator)

    # Only one of the two kinds counts, or the attack cannot use the gradient of the clean loss.
    if weight == 0:
        return evaluate(x)
    if weight == 1:
        return evaluate(attack())
    if random_start or not torch.is_grad_enabled() or computes_in_float16(model, x):
        return (1 - weight) * evaluate(x) + weight * evaluate(attack())

    # The usual case: the clean loss is evaluated once and gives the attack its gradient.
    leaf = x.clone().requires_grad_()
    clean = evaluate(leaf)
    try:
        grad = gradient_of(op, clean, leaf, retain_graph=True)
    except RuntimeError as error:
        # A model under torch.compile may reuse its saved memory in the backward pass, and says so before it
        # begins. That pass belongs to the caller, so the attack needs a forward pass of its own.
        if "donated buffer" not in str(error):
            raise
        adversarial = attack()
    else:
        with torch.no_grad():
            adversarial = attack_step(x, grad, None, ball.eps, ball)
    return (1 - weight) * clean + weight * evaluate(adversarial)


def adversarial_backward(
    model: Model,
    x: torch.Tensor,
    y: Any,
    eps: Number,
    *,
    weight: float = 0.5,
    loss: Loss | None = None,
    bounds: Bounds | None = (0.0, 1.0),
    norm: Norm = "linf",
    scale: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Add the gradient of `adversarial_loss` to the parameters' `.grad`, by two forward and two backward
    passes.

    The backward pass of the clean loss gives the gradients of the weights and of the input at once, and its
    graph is gone before that of the adversarial loss is built, so that half the activations are held.

    ::

        optimizer.zero_grad()
        loss = fr.adversarial_backward(model, x, y, eps=8 / 255)
        optimizer.step()

    Args:
        weight: share of the adversarial examples, inside (0, 1).
        scale: callable(loss) -> loss before each backward pass, such as `scaler.scale` of a GradScaler. In
            float16 it also keeps the signs of small gradients.

    Other arguments as in `adversarial_loss`; under DistributedDataParallel gradients are averaged twice, once
    per backward pass.

    Returns:
        The loss, (), detached and unscaled.

    Raises:
        ValueError, TypeError: as `adversarial_loss`; weight 0 or 1, where one of the passes would be for
            nothing.
    """
    op = "adversarial_backward"
    ball = prepare(op, x, eps, bounds, norm)
    check_number(op, "weight", weight, 0, 1)
    if weight in (0, 1):
        raise ValueError(
            f"{op}: weight must be between 0 and 1, got {weight}; use adversarial_loss(...).backward()"
        )
    x = x.detach()

    def backward(x: torch.Tensor, share: float) -> torch.Tensor:
        value = trained_loss(op, loss, model(x), y, count_of(x))
        part = share * value
        (part if scale is None else scale(part)).backward()
        return value.detach()

    leaf = x.clone().requires_grad_()
    clean = backward(leaf, 1 - weight)
    if leaf.grad is None:
        raise no_gradient(op)
    with torch.no_grad():
        adversarial = attack_step(x, leaf.grad, None, ball.eps, ball)
    attacked = backward(adversarial, weight)
    return (1 - weight) * clean + weight * attacked


class FreeAdversarial:
    """Adversarial training for free: each batch is trained on `replays` times, and every backward pass serves
    weights and attack.

    delta <- clamp(delta + eps * sign(dJ/dx), -eps, eps) after each pass; the next sees clamp(x + delta,
    bounds). delta outlives the batch. Train for 1 / replays of the usual epochs, and it costs what plain
    training does::

        free = fr.FreeAdversarial(eps=8 / 255, replays=4)
        for x, y in loader:
            for x_adv in free(x):
                loss = F.cross_entropy(model(x_adv), y)
                optimizer.zero_grad()
                loss.backward()  # also gives x_adv.grad, which the next pass starts from
                optimizer.step()

    Args:
        eps: radius of the linf ball, as in `fgsm`.
        replays: passes over each batch, at least 1; the paper's m, 4 to 10.
        bounds: (lower, upper) of valid inputs, as in `fgsm`.

    Calling it with x, (B, ...), gives an iterator of `replays` tensors like x that require a gradient. delta
    begins at 0 with the first batch and whenever the shape of a sample, the dtype or the device changes; a
    shorter batch uses its first rows.

    Raises:
        ValueError: arguments as in `fgsm`; no gradient arrived between two passes. TypeError: as in `fgsm`.

    Source: Shafahi, Najibi, Ghiasi, Xu, Dickerson, Studer, Davis, Taylor, Goldstein 2019, Adversarial
    training for free! Unlike there, a pixel at its bound moves too: the gradient is taken behind the clamp.
    """

    def __init__(self, eps: Number, *, replays: int = 4, bounds: Bounds | None = (0.0, 1.0)) -> None:
        op = "FreeAdversarial"
        if not isinstance(eps, torch.Tensor):
            check_number(op, "eps", eps, 0)
        check_count(op, "replays", replays)
        pair_of(op, bounds)
        self.eps, self.replays, self.bounds = eps, replays, bounds
        self._delta: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield x + delta `replays` times; call backward on a loss of it before asking for the next."""
        op = "FreeAdversarial"
        eps, lower, upper, _ = prepare(op, x, self.eps, self.bounds, "linf")
        x = x.detach()
        held = self._delta
        if held is None or held.shape[1:] != x.shape[1:] or held.dtype != x.dtype or held.device != x.device:
            held = torch.zeros_like(x)
        elif len(held) < len(x):
            held = torch.cat([held, torch.zeros_like(x[len(held) :])])
        self._delta = held
        delta = held[: len(x)]
        for _ in range(self.replays):
            adversarial = clamp(x + delta, lower, upper).requires_grad_()
            yield adversarial
            if adversarial.grad is None:
                raise ValueError(
                    f"{op}: expected a gradient of the input, got none; call loss.backward() inside the loop"
                )
            down = times(eps, -1.0)
            delta.copy_(
                fgsm_step_op(delta, adversarial.grad, eps[0], down[0], eps[0], eps[1], down[1], eps[1])
            )


def robust_accuracy(
    model: Model,
    data: tuple[torch.Tensor, torch.Tensor] | Iterable[Any],
    eps: Number,
    *,
    alpha: Number | None = None,
    steps: int = 20,
    restarts: int = 1,
    loss: Loss | None = None,
    bounds: Bounds | None = (0.0, 1.0),
    norm: Norm = "linf",
    batch_size: int = 500,
    generator: torch.Generator | None = None,
) -> float:
    """Share of examples that are classified right, and stay so under `restarts` runs of PGD from random
    starts.

    An upper bound of the accuracy against the worst case: more steps and restarts can only lower it.

    Args:
        model: Module or callable that gives logits (B, k). A Module is put into evaluation mode meanwhile;
            nothing else of it changes, as in `fgsm`.
        data: a pair of tensors x, (N, ...), and y, (N,) class indices; or an iterable of such pairs, such as
            a DataLoader. Batches go to the device of the model's first parameter.
        eps: radius of the ball: a number, or a tensor with one value per channel (C,).
        alpha: step of the attack, like eps; 2.5 * eps / steps if None (Madry et al. 2018).
        steps, restarts: of the attack; restarts=0 gives the clean accuracy.
        loss: what the attack climbs, as in `fgsm`.
        bounds, norm, generator: as in `pgd`; bounds one value per channel at most.
        batch_size: of a pair of tensors.

    Returns:
        float in [0, 1].

    Raises:
        ValueError, TypeError: as `pgd`; no data.

    Source: Madry et al. 2018; Carlini et al. 2019, On evaluating adversarial robustness.
    """
    op = "robust_accuracy"
    check_count(op, "steps", steps)
    if restarts != 0:
        check_count(op, "restarts", restarts)
    check_choice(op, "norm", norm, ("linf", "l2"))
    pair = pair_of(op, bounds)
    parameter = next(model.parameters(), None) if isinstance(model, torch.nn.Module) else None
    total = robust = 0
    with _evaluating(model):
        for x, y in _pairs(op, data, batch_size):
            check_tensor(op, "x", x)
            if parameter is not None:
                x, y = x.to(parameter.device), y.to(parameter.device)
            lower, upper = (_per_channel(bound, x) for bound in pair)
            ball = prepare(op, x, _per_channel(eps, x), (lower, upper), norm)
            step = (
                times(ball.eps, 2.5 / steps)
                if alpha is None
                else number_of(op, "alpha", _per_channel(alpha, x), x, low=0)
            )
            total += len(x)
            robust += _standing(op, model, x, y, step, steps, restarts, ball, loss, generator)
    if not total:
        raise ValueError(
            f"{op}: expected examples, got none; a DataLoader's iterator is empty after its first use"
        )
    return robust / total


def _pairs(op: str, data: Any, batch_size: int) -> Iterable[Any]:
    """The batches (x, y) of `data`."""
    pair = isinstance(data, (tuple, list)) and len(data) == 2
    if not pair or not all(isinstance(part, torch.Tensor) for part in data):
        return data
    check_count(op, "batch_size", batch_size)
    if len(data[0]) != len(data[1]):
        raise ValueError(f"{op}: x and y must have the same length, got {len(data[0])} and {len(data[1])}")
    return zip(*(part.split(batch_size) for part in data), strict=True)


def _per_channel(value: Any, x: torch.Tensor) -> Any:
    """One value per channel in the shape that broadcasts to x.

    Only some samples of a batch are attacked, and where these are as many as the channels the values could be
    taken for one per sample.
    """
    channels = isinstance(value, torch.Tensor) and value.dim() == 1 and len(value) > 1
    return value.view(-1, *(1,) * (x.dim() - 2)) if channels else value


def _standing(
    op: str,
    model: Model,
    x: torch.Tensor,
    y: torch.Tensor,
    step: Value,
    steps: int,
    restarts: int,
    ball: Ball,
    loss: Loss | None,
    generator: torch.Generator | None,
) -> int:
    """How many examples of a batch are classified right before and after every run of the attack."""

    def right(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), shielded(model):
            return model(x).argmax(1) == y

    standing = right(x, y).nonzero()[:, 0]
    for _ in range(restarts):
        if not len(standing):
            break
        some, labels = x[standing], y[standing]
        start = draw_start(some, ball, generator)
        found = iterate(op, model, some, labels, start, step, steps, ball, loss)
        standing = standing[right(found, labels)]
    return len(standing)


@contextlib.contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """A Module in evaluation mode; each submodule gets its own mode back."""
    training = [m for m in model.modules() if m.training] if isinstance(model, torch.nn.Module) else []
    try:
        if training:
            model.eval()
        yield
    finally:
        for module in training:
            module.training = True
