"""Multi-task learning: one objective for several tasks on a shared trunk, with weights that are fixed or
learnt.

    sum over tasks of weight * L,    or with a learnt variance sigma^2 = exp(s) per task
    regression      L / (2 sigma^2) + log sigma
    classification  L / sigma^2     + log sigma

Kendall, Gal, Cipolla 2018, equations 7 and 10. Bounded: log(1 + sigma^2) in place of log sigma, Liebel and
Körner 2018.
"""

import sys

import torch

from ._checks import check_number, check_tensor

_FACTORS = {"regression": 0.5, "classification": 1.0}


class MultiTaskLoss(torch.nn.Module):
    """The weighted sum of the losses of several tasks, auxiliary ones included.

    ::

        total = fr.MultiTaskLoss({"digit": 1.0, "parity": 0.3})
        total = fr.MultiTaskLoss({"digit": "classification", "ink": "regression"})
        groups = fr.optim.penalty_groups(nn.ModuleList([model, total]), l2=1e-4)  # learns its variances, without decay
        loss = total({"digit": fr.cross_entropy(digit, y), "ink": F.mse_loss(ink, t)})

    Args:
        tasks: dict from a task's name to how it is weighted, or a sequence of the latter:

            - a number, at least 0: that fixed weight;
            - "regression": L / (2 sigma^2) + log sigma for a mean squared error L, the negative log
              likelihood of a Gaussian (per element, up to a constant); at its minimum sigma^2 = L;
            - "classification": L / sigma^2 + log sigma for a cross-entropy L, an approximation of the
              likelihood of logits divided by sigma^2; at its minimum sigma^2 = 2 L.
        bounded: log(1 + sigma^2) in place of log sigma. The plain form falls without bound as a loss goes to
            0 and its weight grows with it; bounded, each term of a loss that is at least 0 stays above 0.

    The log variance s = log sigma^2 of a task is a float32 parameter of shape (1,), `log_variance_<name>` (a
    sequence's names are "0", "1", ...), 0 at the start; `penalty_groups` leaves it without a penalty, as all
    of fewer than two dimensions.

    Shape: losses, a dict with the same names or a sequence of the same length, of tensors of shape () -> ().

    Raises:
        ValueError: no task, an unknown form, a negative weight, other names or another number of losses, a
            loss that is not of shape () or on another device.
        TypeError: tasks, a weight or a loss of the wrong type.

    Source: Kendall, Gal, Cipolla 2018, Multi-task learning using uncertainty to weigh losses; Liebel and
    Körner 2018, Auxiliary tasks in multi-task learning.
    """

    def __init__(self, tasks, *, bounded=False):
        super().__init__()
        op = "MultiTaskLoss"
        if not isinstance(tasks, (dict, list, tuple)):
            raise TypeError(
                f"{op}: tasks must be a dict or a sequence of weights and forms, got {type(tasks).__name__}"
            )
        if not tasks:
            raise ValueError(f"{op}: tasks must name at least one task")
        if not isinstance(bounded, bool):
            raise TypeError(f"{op}: bounded must be a bool, got {type(bounded).__name__}")
        self.tasks = dict(tasks) if isinstance(tasks, dict) else dict(enumerate(tasks))
        self.bounded, self._named = bounded, isinstance(tasks, dict)
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
                self.register_parameter(f"log_variance_{name}", torch.nn.Parameter(torch.zeros(1)))
            else:
                check_number(op, f"the weight of task {name!r}", form, 0, sys.float_info.max)

    def forward(self, losses):
        """The total, of shape ()."""
        terms = []
        for name, loss in self._match(losses):
            s = getattr(self, f"log_variance_{name}", None)
            if s is None:
                terms.append(self.tasks[name] * loss)
                continue
            s = s.squeeze()
            spread = torch.nn.functional.softplus(s) if self.bounded else 0.5 * s
            terms.append(_FACTORS[self.tasks[name]] * torch.exp(-s) * loss + spread)
        return sum(terms[1:], terms[0])

    def weights(self):
        """What each task's loss is multiplied by now: floats, in a dict or list as `tasks` was given."""
        values = {}
        for name, form in self.tasks.items():
            s = getattr(self, f"log_variance_{name}", None)
            values[name] = float(form) if s is None else _FACTORS[form] * torch.exp(-s.detach()).item()
        return values if self._named else list(values.values())

    def extra_repr(self):
        """The tasks, and `bounded` where it is not the default."""
        tasks = self.tasks if self._named else list(self.tasks.values())
        return f"{tasks}" + (", bounded=True" if self.bounded else "")

    def _match(self, losses):
        """[(name, loss)] in the order of the tasks, checked."""
        op = "MultiTaskLoss"
        if isinstance(losses, dict) != self._named or not isinstance(losses, (dict, list, tuple)):
            expected = "a dict" if self._named else "a list or tuple"
            raise TypeError(f"{op}: losses must be {expected}, as tasks was, got {type(losses).__name__}")
        got = losses if self._named else dict(enumerate(losses))
        if got.keys() != self.tasks.keys():
            raise ValueError(f"{op}: losses must be those of the tasks {list(self.tasks)}, got {list(got)}")
        for name in self.tasks:
            loss, s = got[name], getattr(self, f"log_variance_{name}", None)
            check_tensor(op, f"the loss of task {name!r}", loss)
            if loss.shape != ():
                raise ValueError(
                    f"{op}: the loss of task {name!r} must have shape (), got {tuple(loss.shape)}; reduce it "
                    f"with .mean()"
                )
            if s is not None and s.device != loss.device:
                raise ValueError(
                    f"{op}: the loss of task {name!r} is on {loss.device}, its variance on {s.device}; move "
                    f"the module with .to()"
                )
        return [(name, got[name]) for name in self.tasks]
