"""For Lightning's Trainer: early stopping by `fastreg.EarlyStopping`, and validation with averages."""

from __future__ import annotations

import importlib
import sys
import warnings
from typing import TYPE_CHECKING, Any

import torch

from .. import early_stopping
from ._averages import Evaluation, as_evaluated

# Lightning comes under two names, whose classes are not the same. The one that the program has imported is
# meant, or else the newer.
_NAMES = ["lightning.pytorch", "pytorch_lightning"]
if "pytorch_lightning" in sys.modules and "lightning.pytorch" not in sys.modules:
    _NAMES.reverse()
for _name in _NAMES:
    try:
        _callbacks = importlib.import_module(f"{_name}.callbacks")
        break
    except ImportError as _error:
        _why = _error
else:
    raise ImportError(
        f"fastreg.integrations.lightning needs Lightning and cannot import it ({_why}); pip install lightning"
    ) from _why
_Base: Any = _callbacks.EarlyStopping
_Callback: Any = _callbacks.Callback


if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["AveragedWeights", "EarlyStopping"]


class EarlyStopping(_Base):
    """Stop when a logged metric stops improving, and leave the module with its best weights.

    ::

        stop = EarlyStopping("val_loss", patience=5)
        Trainer(callbacks=[stop]).fit(module, train_loader, val_loader)
        stop.stopper.best_epoch

    Whoever logs the metric may do so anywhere in the epoch: this callback runs after the module and the other
    callbacks. Where the Trainer validates once per epoch the metric is read at the end of the epoch.
    Elsewhere a metric that is logged in validation is read after every validation, any other one at the end
    of the epochs in which it was logged. The sanity check and `fast_dev_run` do not count. With several ranks
    all go by the mean of their values, whether or not the module logs with `sync_dist`. A checkpoint holds
    the callback's state, the best weights included. Beside `AveragedWeights` the best weights are the best
    averages.

    Args:
        monitor: name of the metric, as in `self.log(name, ...)`.
        restore: keep a copy of the best weights in memory and load it at the end of training; of what FSDP2
            has split (ModelParallelStrategy), each rank of its part. With False only the decision is taken;
            that suits a strategy that keeps the weights elsewhere, where ModelCheckpoint keeps the best
            epoch.
        **options: mode, patience, min_delta and the others of `fastreg.EarlyStopping`, its defaults included.

    Attributes:
        stopper: the `fastreg.EarlyStopping`, with best, best_epoch and reason. `fit` of another module begins
            a new one.
        wait_count, stopped_epoch, best_score: as of Lightning's own callback, which this is a subclass of.

    Raises:
        ValueError: the metric was not logged in the first epoch that could have it; those that were are
            named. TypeError, ValueError: options refused.

    A training that ends before the metric was ever read gives a RuntimeWarning.
    """

    def __init__(
        self, monitor: str, *, restore: bool = True, **options: Unpack[early_stopping.StoppingOptions]
    ) -> None:
        self.restore, self.options = restore, options
        self.stopper = early_stopping.EarlyStopping(**options)
        # Lightning runs its own class, and so this one, after what else may log at the end of an epoch.
        super().__init__(monitor, patience=self.stopper.patience, mode=self.stopper.mode)
        self._module: torch.nn.Module | None = None
        self._begin()

    def _begin(self) -> None:
        self._first, self._validated = True, False
        # The value from before a validation, the one last judged, and the trainer whose value waits for that.
        self._before: Any = None
        self._judged: Any = None
        self._pending: Any = None
        self._saved = False

    @property
    def state_key(self) -> str:
        """The name of the callback's state in a checkpoint; callbacks on two metrics have two."""
        return self._generate_state_key(monitor=self.monitor)

    def setup(self, trainer: Any, pl_module: torch.nn.Module, stage: str) -> None:
        """A new module begins with a new stopper."""
        if stage != "fit":
            return
        self._begin()
        if self._module is not pl_module:
            self._module = pl_module
            self.stopper = early_stopping.EarlyStopping(
                *([pl_module] if self.restore else []), **self.options
            )

    def on_train_epoch_start(self, trainer: Any, pl_module: torch.nn.Module) -> None:
        """What was logged before the first epoch is nobody's score."""
        self._saved = False
        if self._first:
            self._first, self._judged = False, trainer.callback_metrics.get(self.monitor)

    def on_validation_start(self, trainer: Any, pl_module: torch.nn.Module) -> None:
        """Remember the value from before, to know afterwards whether validation has logged another."""
        if not self._should_skip_check(trainer):
            self._before = trainer.callback_metrics.get(self.monitor)

    def on_validation_end(self, trainer: Any, pl_module: torch.nn.Module) -> None:
        """Judge a validation that has logged the metric, where epochs and validations do not go one to
        one.
        """
        if self._should_skip_check(trainer):
            return
        self._validated = True
        logged = not _same(trainer.callback_metrics.get(self.monitor), self._before)
        if _once_per_epoch(trainer):
            # At the end of the epoch, unless a checkpoint comes first.
            self._pending = trainer if logged else None
        elif logged:
            self._judge(trainer)
        elif trainer.num_training_batches == float("inf"):  # The end of the epoch is too far away.
            self._require(trainer)

    def on_train_epoch_end(self, trainer: Any, pl_module: torch.nn.Module) -> None:
        """Judge an epoch that has been validated at most once, or that has logged the metric itself."""
        if self._should_skip_check(trainer):
            return
        value = trainer.callback_metrics.get(self.monitor)
        if value is None and not self._validated and trainer.enable_validation:
            return  # The first validation is still to come.
        usual = _once_per_epoch(trainer) and not self._saved
        if usual or value is None or not _same(value, self._judged):
            self._judge(trainer)

    def on_train_end(self, trainer: Any, pl_module: torch.nn.Module) -> None:
        """Load the best weights, if there was a best epoch."""
        if self.stopper.epoch == 0 and not self._should_skip_check(trainer):
            warnings.warn(
                f"EarlyStopping: training ended before the metric {self.monitor!r} was read once, and "
                "nothing was judged; train for longer than until the first validation",
                RuntimeWarning,
                stacklevel=2,
            )
        if self.restore and self.stopper.best is not None:
            self.stopper.restore()

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint. An epoch whose training and validation are behind it belongs to the state."""
        if self._pending is not None:
            self._judge(self._pending)
            self._saved = True
        return self.stopper.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From the checkpoint."""
        self.stopper.load_state_dict(state_dict)

    def _should_skip_check(self, trainer: Any) -> bool:
        return trainer.state.fn != "fit" or trainer.sanity_checking or bool(trainer.fast_dev_run)

    def _require(self, trainer: Any) -> Any:
        metrics = trainer.callback_metrics
        if self.monitor not in metrics:
            remedy = f"log it with self.log({self.monitor!r}, ...)"
            if not trainer.enable_validation:
                remedy += ", and if validation does that, give fit a loader for it: none is run"
            raise ValueError(
                f"EarlyStopping: expected the metric {self.monitor!r}, got {sorted(metrics)}; {remedy}"
            )
        return metrics[self.monitor]

    def _judge(self, trainer: Any) -> None:
        self._pending, self._judged = None, self._require(trainer)
        value = self._judged
        with as_evaluated(trainer.optimizers):
            stop = self.stopper.step(value.squeeze() if isinstance(value, torch.Tensor) else value)
        self.wait_count = self.stopper.bad_epochs
        if self.stopper.best is not None:
            self.best_score = torch.tensor(self.stopper.best, device="cpu")
        if stop:
            self.stopped_epoch = trainer.current_epoch
            trainer.should_stop = True


class AveragedWeights(_Callback):
    """Validate, while `fit` runs, with the averages that `fastreg.optim.AdamW(ema=)` or `SGD(ema=)` keep.

    ::

        trainer = Trainer(callbacks=[AveragedWeights(), EarlyStopping("val_loss")])

    The parameters are the averages from the start of a validation to its end, or to an exception in it; an
    optimiser without averages is left alone. Checkpoints have the parameters and, in the optimiser's state,
    the averages. After training `EarlyStopping` leaves the best averages in the module; without it
    `optimizer.copy_averaged_to(module)` leaves the last.
    """

    def __init__(self) -> None:
        self._evaluation = Evaluation()

    def on_validation_start(self, trainer: Any, pl_module: torch.nn.Module) -> None:
        """Exchange."""
        if trainer.state.fn == "fit":
            self._evaluation.begin(trainer.optimizers)

    def on_validation_end(self, trainer: Any, pl_module: torch.nn.Module) -> None:
        """Exchange back."""
        self._evaluation.end()

    def on_exception(self, trainer: Any, pl_module: torch.nn.Module, exception: BaseException) -> None:
        """Exchange back."""
        self._evaluation.end()


def _once_per_epoch(trainer: Any) -> bool:
    return trainer.val_check_interval == 1.0 and trainer.check_val_every_n_epoch == 1


def _same(value: Any, other: Any) -> bool:
    """Whether nothing was logged between two readings of a metric. Lightning hands out views of one tensor
    until the next value comes, which is another tensor.
    """
    if isinstance(value, torch.Tensor) and isinstance(other, torch.Tensor):
        return value.device == other.device and value.data_ptr() == other.data_ptr()
    return value is other
