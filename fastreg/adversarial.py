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
from typing import Any, NamedTuple

import torch

from ._checks import check_choice, check_count, check_generator, check_initialised, check_number, check_tensor
from ._fgsm import both_bounds, fgsm_step_op, parameter_of, times
from ._losses import IGNORED, attacked_loss, check_logits, count_of, row_sum_of_shares, trained_loss
from ._transforms import is_sharded
from ._types import Bounds, FgsmParameter, Loss, Model, Norm, Number
from .attacks import (
    Ball,
    alone,
    around,
    attack_step,
    check_ball,
    clamp,
    computes_in_float16,
    ddp_of,
    draw_start,
    gradient_of,
    iterate,
    no_gradient,
    one_step,
    plain_checkpoints,
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
    # Under static_graph=True a gradient of the input, through the wrapper, would be taken for the pattern of
    # all backward passes: the attack goes past it.
    is_static = any(wrapper.static_graph for wrapper in ddp_of(model))
    if random_start or is_static or not torch.is_grad_enabled() or computes_in_float16(model, x):
        return (1 - weight) * evaluate(x) + weight * evaluate(attack())

    # The usual case: the clean loss is evaluated once and gives the attack its gradient.
    leaf = x.clone().requires_grad_()
    try:
        with plain_checkpoints:
            clean = evaluate(leaf)
            with shielded(model):  # Checkpoints run the model's modules again.
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
        if not value.requires_grad:
            if x.requires_grad:
                raise no_gradient(op)
            raise ValueError(
                f"{op}: the loss depends on no parameter that requires a gradient, so that nothing is "
                f"trained; unfreeze some with requires_grad_(), or take fgsm for the examples alone"
            )
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
            parameter_of(op, "eps", eps, torch.empty(0), low=0, infinite=True)
        check_count(op, "replays", replays)
        both_bounds(op, bounds)
        self.eps, self.replays, self.bounds = eps, replays, bounds
        self._delta: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield x + delta `replays` times; call backward on a loss of it before asking for the next."""
        op = "FreeAdversarial"
        _check_plain(op, x)
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
    predict: Callable[[Any], torch.Tensor] | None = None,
    bounds: Bounds | None = (0.0, 1.0),
    norm: Norm = "linf",
    batch_size: int = 500,
    generator: torch.Generator | None = None,
) -> float:
    """Share of examples that are classified right, and stay so under `restarts` runs of PGD from random
    starts.

    An upper bound of the accuracy against the worst case: more steps and restarts can only lower it.

    Args:
        model: Module or callable that gives logits (B, k), unless `predict` takes something else. A Module is
            put into evaluation mode meanwhile; nothing else of it changes, as in `fgsm`.
        data: a pair of tensors x, (N, ...), and y, (N,) class indices or (N, k) probabilities, whose largest
            is the class; or an iterable of such pairs, such as a DataLoader. Batches go to the device of the
            model's first parameter. Examples of class -100, `cross_entropy`'s ignore_index, are left out.
        eps: radius of the ball: a number, or a tensor with one value per channel (C,).
        alpha: step of the attack, like eps; 2.5 * eps / steps if None (Madry et al. 2018).
        steps, restarts: of the attack; restarts=0 gives the clean accuracy.
        loss: what the attack climbs, as in `fgsm`; called as loss(model(x), y).
        predict: callable from what the model gives to logits (B, k) or class indices (B,), for a model that
            gives a dict, a tuple or one logit: predict=lambda output: output["logits"]. Where it gives logits
            and there is no `loss`, the attack climbs their cross-entropy.
        bounds, norm, generator: as in `pgd`; bounds one value per channel at most.
        batch_size: of a pair of tensors.

    Returns:
        float in [0, 1].

    Raises:
        ValueError: as `pgd`; no data, labels that are neither class indices (B,) of [0, k) or -100 nor
            probabilities (B, k); without `loss`, a model that gives probabilities where logits are expected.
        TypeError: as `pgd`; batches that are no pairs, outputs that are no logits without `predict`.

    Source: Madry et al. 2018; Carlini et al. 2019, On evaluating adversarial robustness.
    """
    op = "robust_accuracy"
    check_count(op, "steps", steps)
    if restarts != 0:
        check_count(op, "restarts", restarts)
    check_choice(op, "norm", norm, ("linf", "l2"))
    check_initialised(op, model)
    check_generator(op, generator)
    pair = both_bounds(op, bounds)
    parameter = next(model.parameters(), None) if isinstance(model, torch.nn.Module) else None
    total = robust = 0
    with _evaluating(model):
        for batch in _pairs(op, data, batch_size):
            x, y = _pair(op, batch)
            _check_plain(op, x)
            x, y = _known(op, x, y)
            if parameter is not None:
                x, y = x.to(parameter.device), y.to(parameter.device)
            lower, upper = (_per_channel(bound, x) for bound in pair)
            ball = check_ball(op, x, _per_channel(eps, x), (lower, upper), norm)
            step = (
                times(ball.eps, 2.5 / steps)
                if alpha is None
                else parameter_of(op, "alpha", _per_channel(alpha, x), x, low=0)
            )
            total += len(x)
            attack = _Attack(op, model, step, steps, restarts, ball, loss, predict, generator)
            robust += attack.standing(x, y) if len(x) else 0
    if not total:
        raise ValueError(
            f"{op}: expected examples, got none; a DataLoader's iterator is empty after its first use"
        )
    return robust / total


def _check_plain(op: str, x: Any) -> None:
    if is_sharded(x):
        raise TypeError(
            f"{op}: x must be a plain tensor, got a DTensor; give a rank's own samples, .to_local()"
        )


def _pairs(op: str, data: Any, batch_size: int) -> Iterable[Any]:
    """The batches (x, y) of `data`."""
    iterable = hasattr(data, "__iter__") or hasattr(data, "__getitem__")
    if isinstance(data, (torch.Tensor, dict)) or not iterable:
        raise TypeError(
            f"{op}: data must be a pair (x, y) of tensors or an iterable of such pairs, got "
            f"{type(data).__name__}"
        )
    pair = isinstance(data, (tuple, list)) and len(data) == 2
    if not pair or any(isinstance(part, (tuple, list)) or hasattr(part, "keys") for part in data):
        return data
    for name, part in zip("xy", data, strict=True):
        if not isinstance(part, torch.Tensor):
            raise TypeError(
                f"{op}: {name} must be a torch.Tensor, got {type(part).__name__}; convert it with "
                f"torch.as_tensor"
            )
    check_count(op, "batch_size", batch_size)
    if len(data[0]) != len(data[1]):
        raise ValueError(f"{op}: x and y must have the same length, got {len(data[0])} and {len(data[1])}")
    return zip(*(part.split(batch_size) for part in data), strict=True)


def _pair(op: str, batch: Any) -> tuple[Any, Any]:
    """(x, y) of a batch."""
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[0], batch[1]
    got, remedy = type(batch).__name__, "((x, y) for x, y, *_ in loader)"
    if isinstance(batch, (tuple, list)):
        got = f"a {got} of {len(batch)}"
    elif hasattr(batch, "keys"):
        got = f"a {got} with {', '.join(map(repr, batch.keys()))}"
        remedy = "((b['image'], b['label']) for b in loader)"
    raise TypeError(f"{op}: each batch of data must be a pair (x, y), got {got}; give {remedy}")


def _known(op: str, x: Any, y: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The examples that have a label, where labels are class indices (B,) or probabilities (B, k)."""
    check_tensor(op, "x", x)
    check_tensor(op, "y", y)
    soft = y.is_floating_point() and y.dim() == 2
    if not soft and (y.dim() != 1 or y.is_floating_point() or y.is_complex() or y.dtype == torch.bool):
        raise ValueError(
            f"{op}: y must be class indices (B,) or probabilities (B, k), got {y.dtype} {tuple(y.shape)}; "
            f"of one-hot rows take .argmax(1), and give a Dataset through a DataLoader"
        )
    if not x.dim() or len(x) != len(y):
        raise ValueError(
            f"{op}: x and y must have the same length, got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    if soft:
        return x, y
    known = y != IGNORED
    return (x, y) if known.all() else (x[known.to(x.device)], y[known])


def _per_channel(value: Any, x: torch.Tensor) -> Any:
    """One value per channel in the shape that broadcasts to x.

    Only some samples of a batch are attacked, and where these are as many as the channels the values could be
    taken for one per sample.
    """
    channels = isinstance(value, torch.Tensor) and value.dim() == 1 and len(value) > 1
    return value.view(-1, *(1,) * (x.dim() - 2)) if channels else value


class _Attack(NamedTuple):
    """The attack of `robust_accuracy`, with checked arguments."""

    op: str
    model: Model
    step: FgsmParameter
    steps: int
    restarts: int
    ball: Ball
    loss: Loss | None
    predict: Callable[[Any], torch.Tensor] | None
    generator: torch.Generator | None

    def standing(self, x: torch.Tensor, y: torch.Tensor) -> int:
        """How many examples of a batch are classified right before and after every run of the attack."""
        around(self.op, x, self.ball)  # All are looked at, and not only those that are attacked.
        logits, right = self._right(x, y)
        loss = self.loss
        if loss is None and self.predict is not None and self.restarts:
            if logits is None:
                raise TypeError(
                    f"{self.op}: predict must give logits (B, k) where there is no loss to climb, got class "
                    f"indices; pass loss=lambda output, y: ... as well"
                )
            loss = self._loss_of_prediction
        elif loss is None and self.restarts and logits is not None:
            _refuse_probabilities(self.op, logits)
        standing = right.nonzero()[:, 0]
        for _ in range(self.restarts):
            if not len(standing):
                break
            some, labels = x[standing], y[standing]
            ball = around(self.op, some, self.ball)
            start = draw_start(some, ball, self.generator)
            found = iterate(self.op, self.model, some, labels, start, self.step, self.steps, ball, loss)
            standing = standing[self._right(found, labels)[1]]
        return len(standing)

    def _loss_of_prediction(self, output: Any, y: torch.Tensor) -> torch.Tensor:
        assert self.predict is not None
        return attacked_loss(self.op, None, self.predict(output), y, len(y))

    @torch.no_grad()
    def _right(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        """(logits, where there are any, and which examples are classified right)."""
        op = self.op
        with shielded(self.model), alone(self.model), plain_checkpoints:
            output = self.model(x)
        if self.predict is not None:
            output = self.predict(output)
            check_tensor(op, "what predict gives", output)
        elif not isinstance(output, torch.Tensor):
            check_logits(op, output, "predict=lambda output: output{key}")
        label = y.argmax(1) if y.dim() == 2 else y
        if self.predict is not None and output.dim() == 1 and not output.is_floating_point():
            if output.shape != label.shape:
                raise ValueError(
                    f"{op}: predict must give one class per example, ({len(y)},), got {tuple(output.shape)}"
                )
            return None, output == label
        if output.dim() != 2 or len(output) != len(y) or output.shape[1] < 2:
            raise ValueError(
                f"{op}: expected logits ({len(y)}, k) of at least two classes, got {tuple(output.shape)}; "
                f"pass predict, for one logit predict=lambda z: (z.view(-1) > 0).long() with a loss that "
                f"takes it"
            )
        if y.dim() == 2 and y.shape != output.shape:
            raise ValueError(
                f"{op}: y and the logits must have one shape, got {tuple(y.shape)} and {tuple(output.shape)}"
            )
        if ((label < 0) | (label >= output.shape[1])).any():
            wrong = label[(label < 0) | (label >= output.shape[1])][0].item()
            raise ValueError(
                f"{op}: y must be class indices in [0, {output.shape[1]}) or {IGNORED}, got {wrong}; mark "
                f"examples without a label with {IGNORED}"
            )
        return output, output.argmax(1) == label


def _refuse_probabilities(op: str, logits: torch.Tensor) -> None:
    if (total := row_sum_of_shares(logits)) is not None:
        raise ValueError(
            f"{op}: the model must give logits, got rows that are at least 0 and sum to {total:g}, as "
            f"probabilities are, which hide the gradient; leave the softmax out, or pass loss=lambda p, y: "
            f"torch.nn.functional.nll_loss(p.log(), y)"
        )


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
