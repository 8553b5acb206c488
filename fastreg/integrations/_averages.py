"""What the callbacks of trainers share that evaluate with the averages of an optimiser's parameters."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

from ..optim._average import Averages

# The optimisers whose averages are evaluated. Whoever judges an evaluation, in whatever order the callbacks
# stand, has to see the same weights.
_evaluated: weakref.WeakSet[Averages] = weakref.WeakSet()


def _unwrapped(optimizers: Iterable[Any]) -> list[Averages]:
    """The optimisers that can keep averages, without what accelerate puts around them."""
    own = (getattr(optimizer, "optimizer", optimizer) for optimizer in optimizers)
    return [optimizer for optimizer in own if isinstance(optimizer, Averages)]


class Evaluation:
    """The time of an evaluation, in which parameters are their averages."""

    def __init__(self) -> None:
        self._blocks = contextlib.ExitStack()

    def begin(self, optimizers: Iterable[Any]) -> None:
        """Exchange the parameters of all optimisers, wrapped or not, that keep averages."""
        self.end()
        for own in _unwrapped(optimizers):
            if any(group["ema"] is not None for group in own.param_groups):
                _evaluated.add(own)
                self._blocks.enter_context(own.averaged())

    def end(self) -> None:
        """Exchange them back; nothing happens where nothing has begun."""
        self._blocks.close()


@contextlib.contextmanager
def as_evaluated(optimizers: Iterable[Any]) -> Iterator[None]:
    """The weights that an evaluation had, once more."""
    with contextlib.ExitStack() as blocks:
        for own in _unwrapped(optimizers):
            if own in _evaluated:
                blocks.enter_context(own.averaged())
        yield
