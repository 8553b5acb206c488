"""For the Trainer of Hugging Face transformers: early stopping by `fastreg.EarlyStopping`, the smoothed loss
by `fastreg.cross_entropy`, a loss without logits by `fastreg.linear_cross_entropy`, and
`fastreg.optim.AdamW`.
"""

from __future__ import annotations

import dataclasses
import decimal
import numbers
import warnings
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch

from .. import early_stopping
from .._cross_entropy import cross_entropy
from ..optim import AdamW
from ._averages import Evaluation, as_evaluated
from ._fuse_loss import fuse_loss, unfuse_loss
from ._unmade_logits import UnmadeLogits

try:
    from transformers import TrainerCallback
    from transformers.trainer_callback import ExportableState
except ImportError as error:
    raise ImportError(
        f"fastreg.integrations.transformers needs transformers and cannot import it ({error}); "
        "pip install transformers accelerate"
    ) from error


if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["AveragedWeights", "EarlyStopping", "fuse_loss", "loss", "optimizer", "unfuse_loss"]


class EarlyStopping(TrainerCallback, ExportableState):
    """Stop when a metric of the evaluations stops improving, and leave the model with its best weights.

    ::

        stop = EarlyStopping("eval_loss", patience=3)
        Trainer(model, TrainingArguments(..., eval_strategy="epoch"), callbacks=[stop], ...).train()

    Unlike transformers' own callback it needs neither checkpoints nor `load_best_model_at_end` (use one of
    the two to load the best weights, not both). An epoch here is an evaluation during training; `evaluate()`
    after it does not count. With several ranks all go by the mean of their values.

    Args:
        monitor: name of the metric, "eval_" included.
        restore: keep a copy of the best weights in memory and load it at the end of training. With False only
            the decision is taken; that suits a sharded model (DeepSpeed, FSDP), where
            `load_best_model_at_end` keeps the best epoch.
        **options: mode, patience, min_delta and the others of `fastreg.EarlyStopping`, its defaults included.

    Attributes:
        stopper: the `fastreg.EarlyStopping`, with best, best_epoch and reason; a new one for every `train()`.

    With `restore_callback_states_from_checkpoint=True` a resumed training goes on counting. Trainer keeps
    that state as JSON, which has no room for weights: a best epoch from before the resumption is not
    restored, and a warning says so.

    Raises:
        ValueError: at the beginning of a training without evaluations; a round of evaluations without the
            metric, where those there were are named. TypeError, ValueError: options refused.

    A training that ends before its first evaluation gives a RuntimeWarning.
    """

    def __init__(
        self,
        monitor: str = "eval_loss",
        *,
        restore: bool = True,
        **options: Unpack[early_stopping.StoppingOptions],
    ) -> None:
        self.monitor, self.restore, self.options = monitor, restore, options
        self.stopper = early_stopping.EarlyStopping(**options)
        self.progress: dict[str, Any] | None = None
        self._training, self._others = False, set[str]()

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: torch.nn.Module | None = None, **kwargs: Any
    ) -> None:
        """Begin, or go on from the checkpoint's count."""
        if getattr(args.eval_strategy, "value", args.eval_strategy) == "no":
            raise ValueError(
                "EarlyStopping: expected evaluations during training, got eval_strategy='no'; construct "
                "TrainingArguments with eval_strategy='epoch' or 'steps'"
            )
        self.stopper = early_stopping.EarlyStopping(*([model] if self.restore else []), **self.options)
        if self.progress is not None:
            self.stopper.load_state_dict({**self.progress, "snapshot": None})
        self._training, self._others = True, set[str]()

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any
    ) -> None:
        """Judge one evaluation; one of several evaluation sets may lack the metric."""
        if not self._training:
            return
        if self.monitor not in metrics:
            self._others |= set(metrics)
            return
        self._others = set()
        with as_evaluated([kwargs.get("optimizer")]):
            stop = self.stopper.step(_number(metrics[self.monitor]))
        if stop:
            control.should_training_stop = True
        self.progress = {
            name: value for name, value in self.stopper.state_dict().items() if name != "snapshot"
        }

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Where all sets have been evaluated and none had the metric, say so while little is lost."""
        if self._others and self.stopper.epoch == 0:
            raise ValueError(
                f"EarlyStopping: expected the metric {self.monitor!r}, got {sorted(self._others)}; "
                "name one of these, or return it from compute_metrics"
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Load the best weights, if there was a best evaluation."""
        self._training, self.progress = False, None
        if self.stopper.epoch == 0:
            warnings.warn(
                f"EarlyStopping: training ended before an evaluation had {self.monitor!r}, and nothing was "
                "judged; evaluate earlier (eval_steps, eval_delay) or train for longer",
                RuntimeWarning,
                stacklevel=2,
            )
        if not self.restore or self.stopper.best is None:
            return
        if self.stopper.state_dict()["snapshot"] is None:
            warnings.warn(
                f"EarlyStopping: the best evaluation ({self.monitor} {self.stopper.best:g}) was before the "
                "resumption and is not restored; use load_best_model_at_end=True for that",
                RuntimeWarning,
                stacklevel=2,
            )
        else:
            self.stopper.restore()

    def state(self) -> dict[str, Any]:
        """What the Trainer writes to its checkpoint, as JSON."""
        options = {name: _number(value) for name, value in self.options.items()}
        return {
            "args": {"monitor": self.monitor, "restore": self.restore, **options},
            "attributes": {"progress": self.progress},
        }


class AveragedWeights(TrainerCallback):
    """Evaluate, while `train` runs, with the averages that the optimiser of `optimizer(args, ema=...)` keeps.

    ::

        Trainer(..., callbacks=[AveragedWeights(), EarlyStopping("eval_loss")]).train()

    The parameters are the averages from where an evaluation is due to its end. Checkpoints have the
    parameters and, in the optimiser's state, the averages. After training `EarlyStopping` leaves the best
    averages in the model; without it `trainer.optimizer.optimizer.copy_averaged_to(model)` leaves the last.
    An evaluation that raises leaves the averages in the model until the next evaluation or training.
    """

    def __init__(self) -> None:
        self._evaluation = Evaluation()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """What an evaluation that raised has left."""
        self._evaluation.end()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Exchange where an evaluation follows; Trainer has no event of its own for that."""
        if control.should_evaluate:
            self._evaluation.begin([kwargs.get("optimizer")])

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The same."""
        self.on_step_end(args, state, control, **kwargs)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Exchange back."""
        self._evaluation.end()


def _number(value: Any) -> Any:
    """A number of any library as Python's, which JSON can hold; an array of one number too."""
    count = value.numel() if isinstance(value, torch.Tensor) else getattr(value, "size", None)
    if count == 1 and hasattr(value, "item"):
        return value.item()
    if isinstance(value, (numbers.Rational, decimal.Decimal)) and not isinstance(value, (bool, int)):
        return float(value)
    return value


def optimizer(arguments: Any, **options: Any) -> tuple[type[AdamW], dict[str, Any]]:
    """`fastreg.optim.AdamW` for `Trainer(optimizer_cls_and_kwargs=...)`.

    ::

        arguments = TrainingArguments(..., max_grad_norm=0)
        kind = optimizer(arguments, l1=1e-6, ema=0.999, max_norm=1.0)
        trainer = Trainer(model, arguments, optimizer_cls_and_kwargs=kind, ...)
        trainer.train()
        trainer.optimizer.optimizer.copy_averaged_to(trainer.model)

    Trainer makes the parameter groups: biases and norms are free of weight_decay, and of l1 with it.

    Args:
        arguments: TrainingArguments, of which learning_rate, weight_decay, adam_beta1, adam_beta2 and
            adam_epsilon count, as for Trainer's own AdamW.
        **options: further arguments of `fastreg.optim.AdamW`, which win over those.

    Returns:
        (class, its keyword arguments).

    Raises:
        ValueError: max_norm together with a max_grad_norm, by which Trainer clips too.
    """
    clips = getattr(arguments, "max_grad_norm", None)
    if options.get("max_norm") is not None and clips:
        raise ValueError(
            f"optimizer: either Trainer or the optimiser must clip, got max_grad_norm={clips} and "
            f"max_norm={options['max_norm']}; construct TrainingArguments with max_grad_norm=0"
        )
    given = {
        "lr": arguments.learning_rate,
        "betas": (arguments.adam_beta1, arguments.adam_beta2),
        "eps": arguments.adam_epsilon,
        "weight_decay": arguments.weight_decay,
    }
    return AdamW, {**given, **options}


def loss(
    label_smoothing: float = 0.0,
    *,
    smoothing: Literal["uniform", "others"] = "uniform",
    z_loss: float = 0.0,
    weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    shift: bool | None = None,
) -> SmoothedLoss:
    """`fastreg.cross_entropy` for `Trainer(compute_loss_func=...)`, in place of `label_smoothing_factor`.

    ::

        Trainer(model, arguments, compute_loss_func=loss(label_smoothing=0.1), ...)

    Trainer's own smoothing takes the logarithms in the dtype of the logits and goes over them several times.
    Here they are read once and all is float32, float16 and bfloat16 logits included.

    Args:
        label_smoothing, smoothing, z_loss, weight, ignore_index: as in `fastreg.cross_entropy`.
        shift: whether the logits at one token predict the next label, as in a causal language model. None
            finds out from the model's output (CausalLMOutput and its kin).

    Returns:
        Function of (outputs, labels, num_items_in_batch=None). outputs: a dict or ModelOutput with "logits",
        or a tuple that begins with them, [..., classes] in any floating dtype. labels: int64 [...]. The
        result is the mean over the labels that are not ignored, or their sum divided by num_items_in_batch:
        float32, float64 for float64 logits.

    Raises (from the function):
        ValueError: no labels, or shift=None with a tuple of sequences.

    As with Trainer's smoothing, a further term that the model adds to its loss is left out.
    """
    return SmoothedLoss(label_smoothing, smoothing, z_loss, weight, ignore_index, shift)


@dataclasses.dataclass(frozen=True)
class SmoothedLoss:
    """What `loss` returns; it can be pickled."""

    label_smoothing: float
    smoothing: Literal["uniform", "others"]
    z_loss: float
    weight: torch.Tensor | None
    ignore_index: int
    shift: bool | None

    def __call__(
        self,
        outputs: Any,
        labels: torch.Tensor | None,
        num_items_in_batch: torch.Tensor | float | None = None,
    ) -> torch.Tensor:
        """The loss of one batch, as `loss` describes it."""
        if labels is None:
            raise ValueError("loss: expected labels, got None; give the dataset a column 'labels'")
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
        shift = self.shift
        if shift is None:
            shift = "CausalLM" in type(outputs).__name__
            if type(outputs) in (tuple, list) and logits.dim() > 2:
                raise ValueError(
                    "loss: shift must be True or False where the model returns a tuple, got None; causal "
                    "language models need loss(..., shift=True)"
                )
        if shift:
            labels = torch.nn.functional.pad(labels, (0, 1), value=self.ignore_index)[..., 1:]
        rows = logits.reshape(-1, logits.shape[-1])
        total = (rows.loss if isinstance(rows, UnmadeLogits) else partial(cross_entropy, rows))(
            labels.reshape(-1).to(logits.device),
            None if self.weight is None else self.weight.to(logits.device),
            ignore_index=self.ignore_index,
            reduction="mean" if num_items_in_batch is None else "sum",
            label_smoothing=self.label_smoothing,
            smoothing=self.smoothing,
            z_loss=self.z_loss,
            loss_dtype=None if logits.dtype == torch.float64 else torch.float32,
        )
        if num_items_in_batch is None:
            return total
        if isinstance(num_items_in_batch, torch.Tensor):
            num_items_in_batch = num_items_in_batch.to(total.device)
        return total / num_items_in_batch
