"""Early stopping for Lightning's Trainer, by `fastreg.EarlyStopping`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .. import early_stopping

try:
    from lightning.pytorch import Callback
except ImportError:
    try:
        from pytorch_lightning import Callback
    except ImportError as error:
        raise ImportError(
            f"fastreg.integrations.lightning needs Lightning and cannot import it ({error}); pip install "
            f"lightning"
        ) from error


if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["EarlyStopping"]


class EarlyStopping(Callback):
    """Stop when a logged metric stops improving, and leave the module with its best weights.

    ::

        stop = EarlyStopping("val_loss", patience=5)
        Trainer(callbacks=[stop]).fit(module, train_loader, val_loader)
        stop.stopper.best_epoch

    Where the Trainer validates once per epoch the metric is read at the end of the epoch, elsewhere after
    every validation; the sanity check and `fast_dev_run` do not count. With several ranks all go by the mean
    of their values, whether or not the module logs with `sync_dist`. A checkpoint holds the callback's state,
    the best weights included.

    Args:
        monitor: name of the metric, as in `self.log(name, ...)`.
        restore: keep a copy of the best weights in memory and load it at the end of training. With False only
            the decision is taken; that suits a strategy that shards the module itself, where ModelCheckpoint
            keeps the best epoch.
        **options: mode, patience, min_delta and the others of `fastreg.EarlyStopping`, its defaults included.

    Attributes:
        stopper: the `fastreg.EarlyStopping`, with best, best_epoch and reason. `fit` of another module begins
            a new one.

    Raises:
        ValueError: the metric was not logged; those that were are named. TypeError, ValueError: options
            refused.
    """

    def __init__(
        self, monitor: str, *, restore: bool = True, **options: Unpack[early_stopping.StoppingOptions]
    ) -> None:
        self.monitor, self.restore, self.options = monitor, restore, options
        self.stopper = early_stopping.EarlyStopping(**options)
        self._module: torch.nn.Module | None = None

    @property
    def state_key(self) -> str:
        """The name of the callback's state in a checkpoint; callbacks on two metrics have two."""
        return self._generate_state_key(monitor=self.monitor)

    def setup(self, trainer: Any, pl_module: torch.nn.Module, stage: str) -> None:
        """A new module begins with a new stopper."""
        if stage == "fit" and self._module is not pl_module:
            self._module = pl_module
            self.stopper = early_stopping.EarlyStopping(
                *([pl_module] if self.restore else []), **self.options
            )

    def on_train_epoch_end(self, trainer: Any, pl_module: torch.nn.Module) -> None:
        """Judge an epoch that has been validated at most once."""
        if _once_per_epoch(trainer):
            self._judge(trainer)

    def on_validation_end(self, trainer: Any, pl_module: torch.nn.Module) -> None:
        """Judge where epochs and validations do not go one to one."""
        if not _once_per_epoch(trainer):
            self._judge(trainer)

    def _judge(self, trainer: Any) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking or trainer.fast_dev_run:
            return
        if self.monitor not in trainer.callback_metrics:
            raise ValueError(
                f"EarlyStopping: expected the metric {self.monitor!r}, got "
                f"{sorted(trainer.callback_metrics)}; log it with self.log({self.monitor!r}, ...)"
            )
        if self.stopper.step(trainer.callback_metrics[self.monitor].squeeze()):
            trainer.should_stop = True

    def on_train_end(self, trainer: Any, pl_module: torch.nn.Module) -> None:
        """Load the best weights, if there was a best epoch."""
        if self.restore and self.stopper.best is not None:
            self.stopper.restore()

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return self.stopper.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From the checkpoint."""
        self.stopper.load_state_dict(state_dict)


def _once_per_epoch(trainer: Any) -> bool:
    return trainer.val_check_interval == 1.0 and trainer.check_val_every_n_epoch == 1
