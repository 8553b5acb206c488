"""What the forward pass of a checkpoint has drawn, for when it is computed again.

torch.utils.checkpoint puts back the state of the default generators. A generator that is given by name has
gone on meanwhile, and would give other masks.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

import torch


class Drawn:
    """The seeds that a pass through a checkpoint has drawn from generators given by name, in their order."""

    def __init__(self) -> None:
        self._seeds: list[torch.Tensor] = []

    def begin(self, again: bool) -> None:
        """From now on what this thread draws is remembered here or, `again`, taken from here."""
        _within.passes.append((self, iter(list(self._seeds)) if again else None))

    def end(self) -> None:
        """The end of what the last `begin` began."""
        _within.passes.pop()

    @contextlib.contextmanager
    def drawing(self, again: bool) -> Iterator[None]:
        """`begin` and `end` of a block."""
        self.begin(again)
        try:
            yield
        finally:
            self.end()


class _Within(threading.local):
    """The checkpoints that a thread runs, the outermost first; each with the seeds that are left for it."""

    def __init__(self) -> None:
        self.passes: list[tuple[Drawn, Iterator[torch.Tensor] | None]] = []


_within = _Within()


def drawn(draw: Callable[[], torch.Tensor]) -> torch.Tensor:
    """The seed of the forward pass while that is computed again, and otherwise a new one."""
    passes = _within.passes
    if not passes:
        return draw()
    seed = next((s for _, seeds in passes if seeds is not None for s in (next(seeds, None),)), None)
    seed = draw() if seed is None else seed
    for each, seeds in passes:
        if seeds is None:
            each._seeds.append(seed)
    return seed
