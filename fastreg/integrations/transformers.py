"""Early stopping for the Trainer of Hugging Face transformers, by `fastreg.EarlyStopping`."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch

from .. import early_stopping

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

__all__ = ["EarlyStopping"]


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
        ValueError: a round of evaluations without the metric; those there were are named. TypeError,
            ValueError: options refused.
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
        if self.stopper.step(metrics[self.monitor]):
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
        return {
            "args": {"monitor": self.monitor, "restore": self.restore, **self.options},
            "attributes": {"progress": self.progress},
        }
