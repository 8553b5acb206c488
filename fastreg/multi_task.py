"""Multi-task learning: one objective for several tasks on a shared trunk, with weights that are fixed or
learnt.

    sum over tasks of weight * L,    or with a learnt variance sigma^2 = exp(s) per task
    regression      L / (2 sigma^2) + log sigma
    classification  L / sigma^2     + log sigma

Kendall, Gal, Cipolla 2018, equations 7 and 10. Bounded: log(1 + sigma^2) in place of log sigma, Liebel and
Körner 2018. Normalised: the weights of the losses, divided by their mean.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch

from ._checks import check_number, check_tensor

__all__ = ["MultiTaskLoss"]

# How a task is weighted: by a fixed number, or by a learnt variance in one of two forms.
Form: TypeAlias = float | Literal["regression", "classification"]

_FACTORS = {"regression": 0.5, "classification": 1.0}


class MultiTaskLoss(torch.nn.Module):
    """The weighted sum of the losses of several tasks, auxiliary ones included.

    ::

        total = fr.MultiTaskLoss({"digit": 1.0, "parity": 0.3})
        total = fr.MultiTaskLoss({"digit": "classification", "ink": "regression"})
        groups = fr.optim.penalty_groups(nn.ModuleList([model, total]), l2=1e-4)  # no decay of the variances
        loss = total({"digit": fr.cross_entropy(digit, y), "ink": F.mse_loss(ink, t)})

    Args:
        tasks: dict from a task's name to how it is weighted, or a sequence of the latter:

            - a number, at least 0: that fixed weight;
            - "regression": L / (2 sigma^2) + log sigma for a mean squared error L, the negative log
              likelihood of a Gaussian (per element, up to a constant); at its minimum sigma^2 = L;
            - "classification": L / sigma^2 + log sigma for a cross-entropy L, an approximation of the
              likelihood of logits divided by sigma^2; at its minimum sigma^2 = 2 L.
        bounded: log(1 + sigma^2) in place of log sigma; True if None. The plain form falls without bound as a
            loss goes to 0 and its weight grows with it; bounded, each term of a loss that is at least 0 stays
            above 0.
        normalise: the learnt weights are divided by their mean, so that they sum to the number of their
            tasks. Otherwise a weight, 1 / (2 sigma^2) for one, multiplies the learning rate of all that the
            task trains as its loss falls, and plain SGD soon diverges: on 5,000 handwritten digits with the
            share of ink as second task (lr 0.05, momentum 0.9, 300 steps, three seeds) 87 to 90 % were right
            with normalised weights, 70 to 90 % with fixed weights of 1, 29 to 78 % bounded alone and 10 to
            39 % with neither. The variances are learnt as without, and the value is the weighted sum of the
            losses alone. None: True where `bounded` is None, too.

    The log variance s = log sigma^2 of a task is a float32 parameter of shape (1,), `log_variance_<name>` (a
    sequence's names are "0", "1", ...), 0 at the start; `penalty_groups` leaves it without a penalty, as all
    of fewer than two dimensions.

    Shape: losses, a dict with the same names or a sequence of the same length, of tensors of shape () -> ().
    None in place of a loss leaves its task out, for a batch without labels for it: its variance does not
    move, and the weights of the others stay as they are.

    Raises:
        ValueError: no task, an unknown form, a negative weight, other names or another number of losses, a
            loss that is not of shape () or on another device, None for all of them.
        TypeError: tasks, a weight or a loss of the wrong type.

    Source: Kendall, Gal, Cipolla 2018, Multi-task learning using uncertainty to weigh losses; Liebel and
    Körner 2018, Auxiliary tasks in multi-task learning.
    """

    def __init__(
        self,
        tasks: Mapping[Any, Form] | Sequence[Form],
        *,
        bounded: bool | None = None,
        normalise: bool | None = None,
    ) -> None:
        super().__init__()
        op = "MultiTaskLoss"
        if not isinstance(tasks, (Mapping, list, tuple)):
            raise TypeError(
                f"{op}: tasks must be a dict or a sequence of weights and forms, got {type(tasks).__name__}"
            )
        if not tasks:
            raise ValueError(f"{op}: tasks must name at least one task")
        for name, value in (("bounded", bounded), ("normalise", normalise)):
            if value is not None and not isinstance(value, bool):
                raise TypeError(f"{op}: {name} must be a bool, got {type(value).__name__}")
        self.tasks: dict[Any, Form] = dict(tasks) if isinstance(tasks, Mapping) else dict(enumerate(tasks))
        self.normalise = bounded is None if normalise is None else normalise
        self.bounded, self._named = bounded is not False, isinstance(tasks, Mapping)
        for name, form in self.tasks.items():
            if isinstance(form, str):
                if form not in _FACTORS:
                    raise ValueError(
                        f"{op}: task {name!r} must be a weight, 'regression' or 'classification', got "
                        f"{form!r}"
                    )
                if self._named and (not isinstance(name, str) or "." in name):
                    raise ValueError(
                        f"{op}: the name of a task with a learnt weight must be a string without a dot, got "
                        f"{name!r}"
                    )
                self.register_parameter(
                    f"log_variance_{name}", torch.nn.Parameter(torch.zeros(1, dtype=torch.float32))
                )
            else:
                check_number(op, f"the weight of task {name!r}", form, 0, sys.float_info.max)

    def forward(
        self, losses: Mapping[Any, torch.Tensor | None] | Sequence[torch.Tensor | None]
    ) -> torch.Tensor:
        """The total, of shape ()."""
        terms = []
        weights = self._learnt_weights()
        for name, loss in self._match(losses):
            form = self.tasks[name]
            if not isinstance(form, str):
                terms.append(form * loss)
                continue
            s = self._log_variance(name).squeeze()
            spread = torch.nn.functional.softplus(s) if self.bounded else 0.5 * s
            if self.normalise:
                # The variance descends its own objective, of which only the gradient is taken.
                own = _FACTORS[form] * torch.exp(-s) * loss.detach() + spread
                terms.append(weights[name] * loss + (own - own.detach()))
            else:
                terms.append(weights[name] * loss + spread)
        return sum(terms[1:], terms[0])

    def _learnt_weights(self) -> dict[Any, torch.Tensor]:
        """What the losses with a learnt weight are multiplied by, tensors of shape ()."""
        learnt = {name: _FACTORS[form] for name, form in self.tasks.items() if isinstance(form, str)}
        if not self.normalise or not learnt:
            return {
                name: factor * torch.exp(-self._log_variance(name).squeeze())
                for name, factor in learnt.items()
            }
        logs = [math.log(factor) - self._log_variance(name).detach() for name, factor in learnt.items()]
        weights = len(learnt) * torch.cat(logs).softmax(0)
        return dict(zip(learnt, weights.unbind(), strict=True))

    def weights(self) -> dict[Any, float] | list[float]:
        """What each task's loss is multiplied by now: floats, in a dict or list as `tasks` was given."""
        learnt = self._learnt_weights()
        values = {
            name: learnt[name].item() if name in learnt else float(form) for name, form in self.tasks.items()
        }
        return values if self._named else list(values.values())

    def _log_variance(self, name: Any) -> torch.Tensor:
        return getattr(self, f"log_variance_{name}")

    def extra_repr(self) -> str:
        """The tasks, and the switches where they are not the defaults."""
        tasks = self.tasks if self._named else list(self.tasks.values())
        if self.bounded and self.normalise:
            return f"{tasks}"
        return f"{tasks}, bounded={self.bounded}" + (", normalise=True" if self.normalise else "")

    def _match(self, losses: Any) -> list[tuple[Any, torch.Tensor]]:
        """[(name, loss)] in the order of the tasks, checked."""
        op = "MultiTaskLoss"
        if isinstance(losses, Mapping) != self._named or not isinstance(losses, (Mapping, list, tuple)):
            expected = "a dict" if self._named else "a list or tuple"
            raise TypeError(f"{op}: losses must be {expected}, as tasks was, got {type(losses).__name__}")
        got = dict(losses) if isinstance(losses, Mapping) else dict(enumerate(losses))
        if got.keys() != self.tasks.keys():
            raise ValueError(
                f"{op}: losses must be those of the tasks {list(self.tasks)}, got {list(got)}; give None "
                f"for a task without labels in this batch"
            )
        if all(loss is None for loss in got.values()):
            raise ValueError(f"{op}: losses must hold at least one loss, got None for all; skip such a batch")
        present = [name for name in self.tasks if got[name] is not None]
        for name in present:
            loss = got[name]
            check_tensor(op, f"the loss of task {name!r}", loss)
            if loss.shape != ():
                raise ValueError(
                    f"{op}: the loss of task {name!r} must have shape (), got {tuple(loss.shape)}; reduce it "
                    f"with .mean()"
                )
            if isinstance(self.tasks[name], str):
                device = self._log_variance(name).device
                if device != loss.device:
                    raise ValueError(
                        f"{op}: the loss of task {name!r} is on {loss.device}, its variance on {device}; "
                        f"move the module with .to()"
                    )
        return [(name, got[name]) for name in present]
