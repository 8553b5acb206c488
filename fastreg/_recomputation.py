"""What the forward pass of a checkpoint has drawn, for when it is computed again.

torch.utils.checkpoint puts back the state of the default generators. A generator that is given by name has
gone on meanwhile, and would give other masks.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

import torch
from torch.compiler import is_compiling


class Drawn:
    """What a pass through a checkpoint has drawn from generators given by name, in its order."""

    def __init__(self) -> None:
        self._values: list[torch.Tensor] = []

    def begin(self, again: bool) -> None:
        """From now on what this thread draws is remembered here or, `again`, taken from here."""
        _within.passes.append((self, iter(list(self._values)) if again else None))

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
    """The checkpoints that a thread runs, the outermost first; each with the values that are left for it."""

    def __init__(self) -> None:
        self.passes: list[tuple[Drawn, Iterator[torch.Tensor] | None]] = []


_within = _Within()


def drawn(generator: torch.Generator | None, draw: Callable[[], torch.Tensor]) -> torch.Tensor:
    """What `draw` gives, which draws from `generator`; while a checkpoint is computed again, what it gave in
    the forward pass. The default generator is left to torch.
    """
    if generator is None or is_compiling():
        return draw()
    passes = _within.passes
    if not passes:
        return draw()
    value = next((v for _, values in passes if values is not None for v in (next(values, None),)), None)
    value = draw() if value is None else value
    for each, values in passes:
        if values is None:
            each._values.append(value)
    return value
