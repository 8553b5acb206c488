"""Early stopping for PyTorch-Ignite, by `fastreg.EarlyStopping`."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .. import early_stopping

try:
    from ignite.engine import Engine, Events
except ImportError as error:
    raise ImportError(
        f"fastreg.integrations.ignite needs PyTorch-Ignite and cannot import it ({error}); pip install "
        f"pytorch-ignite"
    ) from error


if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["EarlyStopping"]


class EarlyStopping:
    """Handler that ends a trainer when the evaluator's score stops improving, and brings the best state back.

    ::

        handler = EarlyStopping(lambda engine: -engine.state.metrics["loss"], trainer, model, patience=5)
        evaluator.add_event_handler(Events.COMPLETED, handler)

    Args:
        score_function: callable(engine) -> number; as in ignite's own handler, higher is better unless
            mode="min" is given.
        trainer: Engine to terminate. At its TERMINATE or COMPLETED, whoever ended the run, the best state is
            restored before the handlers that are attached there later. `interrupt`, after which a run may go
            on, and an exception leave the state as it is.
        *tracked: what is brought back: anything with state_dict and load_state_dict; none for the decision
            alone.
        **options: mode (here "max" by default), patience, min_delta and the others of
            `fastreg.EarlyStopping`.

    Attributes:
        stopper: the `fastreg.EarlyStopping`, with best, best_epoch and reason.

    With several ranks all go by the mean of their scores. `state_dict` and `load_state_dict` are those of the
    stopper, for ignite's Checkpoint.

    Raises:
        TypeError, ValueError: arguments refused.

    A run that ends without a run of the evaluator gives a RuntimeWarning.
    """

    def __init__(
        self,
        score_function: Callable[[Engine], Any],
        trainer: Engine,
        *tracked: Any,
        **options: Unpack[early_stopping.StoppingOptions],
    ) -> None:
        if not callable(score_function) or not isinstance(trainer, Engine):
            raise TypeError(
                "EarlyStopping: expected a function and an ignite Engine, got "
                f"{type(score_function).__name__} and {type(trainer).__name__}; they come in the order "
                "of ignite's own handler"
            )
        self.score_function, self.trainer = score_function, trainer
        options.setdefault("mode", "max")
        self.stopper = early_stopping.EarlyStopping(*tracked, **options)
        # terminate(skip_completed=True) leaves COMPLETED out; a run that nobody terminates has no TERMINATE.
        trainer.add_event_handler(Events.TERMINATE, self._restore)
        trainer.add_event_handler(Events.COMPLETED, self._restore)

    def __call__(self, engine: Engine) -> None:
        """Judge one run of the evaluator."""
        if self.stopper.step(self.score_function(engine)):
            self.trainer.terminate()

    def _restore(self, engine: Engine) -> None:
        if self.stopper.epoch == 0:
            warnings.warn(
                "EarlyStopping: the trainer ended without a run of the evaluator, and nothing was judged; "
                "give it the handler, evaluator.add_event_handler(Events.COMPLETED, handler), and run it",
                RuntimeWarning,
                stacklevel=2,
            )
        if self.stopper.tracked and self.stopper.best is not None:
            self.stopper.restore()

    def state_dict(self) -> dict[str, Any]:
        """As `fastreg.EarlyStopping.state_dict`."""
        return self.stopper.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As `fastreg.EarlyStopping.load_state_dict`."""
        self.stopper.load_state_dict(state)
