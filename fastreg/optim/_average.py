"""The moving average of the parameters, beside what the operators do: its options, its warm-up, parameters
without a gradient, and its use.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch.compiler import is_compiling

from .._checks import ArgumentError, arithmetic_dtype, check_number
from .._optimizer_math import averaged, count, is_skipped, store
from .._transforms import is_sharded
from ._penalties import without_wrappers

# The exponent of the warm-up, which timm's ModelEmaV3 and diffusers' EMAModel take too.
POWER = 2 / 3

OPTIONS: dict[str, Any] = {"ema": None, "ema_warmup": False}


def check_average(op: str, group: dict[str, Any]) -> None:
    """Raise unless the options of the average make one."""
    ema, warmup = group["ema"], group["ema_warmup"]
    if ema is not None:
        check_number(op, "ema", ema, finite=True)
        if not 0 <= ema < 1:
            raise ArgumentError(f"{op}: ema must be None or a decay in [0, 1), got {ema}")
    if not isinstance(warmup, bool):
        check_number(op, "ema_warmup", warmup, 0, finite=True)


def warmed_up(ema: float, warmup: float | bool, counts: list[torch.Tensor]) -> torch.Tensor:
    """The decay after n updates, the most that one of the counts has: min(ema, 1 - (1 + n)^-power). It is in
    float64 where the device has it: near 1 the weight of what is new, 1 - decay, would lose the digits of a
    float32.
    """
    wide = torch.float32 if counts[0].device.type == "mps" else torch.float64
    power = POWER if warmup is True else float(warmup)
    if counts[0].is_cpu and not is_compiling():  # where reading them takes less time than stacking them
        n = torch.tensor(max(count.item() for count in counts), dtype=wide, device="cpu")
    else:
        n = torch.stack(counts).amax().to(wide)
    return (1 - (1 + n) ** -power).clamp(max=ema)


def average_idle(
    idle: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    ema: float | torch.Tensor,
    found_inf: torch.Tensor | None,
) -> None:
    """Take parameters that have no gradient, and stay as they are, into their averages as the others."""
    for p, average, n_averaged in idle:
        skip = is_skipped(found_inf, p)
        moved = averaged(average, p.to(arithmetic_dtype(p)), n_averaged, ema)
        store(average, moved.to(average.dtype), skip)
        count(n_averaged, skip)


class Averages(torch.optim.Optimizer):
    """What an optimiser with averages can do with them."""

    _op: ClassVar[str]  # what messages call the optimiser
    # How many blocks of `averaged` are open, in whatever threads, and what the first of them has exchanged.
    _blocks: int = 0
    _exchanged: tuple[tuple[torch.Tensor, torch.Tensor], ...] = ()
    _entering: ClassVar[Any] = threading.RLock()

    @property
    def _is_averaged(self) -> bool:
        return self._blocks > 0

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Within the block the parameters are their averages: ``with optimizer.averaged(): evaluate(model)``.

        The averages are exchanged with the parameters where they lie, without further memory except for one
        tensor at a time, and back at the end, also of a block that raises. A parameter that has no average
        yet stays as it is. `state_dict` of a model inside has the averages; that of the optimiser is the one
        of outside. All threads see the averages, and of several blocks, nested or in several threads, the
        first exchanges and the last exchanges back. Inside of autocast the casts of weights that it keeps are
        thrown away at both ends.

        Raises:
            RuntimeError: `step` or `load_state_dict` inside.
            ValueError: no parameter group has an `ema`.
        """
        with self._entering:
            if not self._blocks:
                self._exchange(self._averages())
            self._blocks += 1
        try:
            yield
        finally:
            with self._entering:
                self._blocks -= 1
                if not self._blocks:
                    self._exchange_back()

    def _exchange(self, pairs: dict[torch.Tensor, torch.Tensor]) -> None:
        """Exchange all averages with their parameters, or none of them."""
        try:
            for p, average in pairs.items():
                _exchange(p, average)
                self._exchanged += ((p, average),)
        except BaseException:
            self._exchange_back()
            raise
        _forget_copies(pairs)

    def _exchange_back(self) -> None:
        pairs, self._exchanged = self._exchanged, ()
        for p, average in pairs:
            _exchange(p, average)
        _forget_copies(dict(pairs))

    @torch.no_grad()
    def copy_averaged_to(self, model: torch.nn.Module, *, source: torch.nn.Module | None = None) -> None:
        """Write the averages into a model for good.

        Args:
            model: the model whose parameters this optimiser has, or a copy of it.
            source: with a copy, the model that this optimiser has, by whose names its parameters are found.
                Not needed where the optimiser was given `named_parameters()`. Wrappers around either, such
                as DistributedDataParallel's, torch.compile's or an AveragedModel, do not count in a name.

        Buffers, and parameters of `model` itself without an average, stay as they are; a copy gets the
        parameters of `source` in their place.

        Raises:
            ValueError: no parameter group has an `ema`, a parameter that is not found or has another shape,
                a copy without `source`. Nothing is written then.
            RuntimeError: inside `averaged()`.
        """
        op = f"{self._op}.copy_averaged_to"
        if self._is_averaged:
            raise RuntimeError(f"{op}: must not run inside averaged(); leave the block first")
        averages = self._averages()
        _forget_copies(averages)  # or a module may have other parameters than this optimiser's
        mine = {p for group in self.param_groups for p in group["params"]}
        if source is None and any(p in mine for p in model.parameters()):
            source = model
        if source is not None:
            known = {name: p for name, p in without_wrappers(source) if p in mine}
        else:
            groups = [group for group in self.param_groups if "param_names" in group]
            known = {n: p for g in groups for n, p in zip(g["param_names"], g["params"], strict=True)}
        first: dict[torch.Tensor, str] = {}  # a tied parameter is written once
        for name, p in without_wrappers(model):
            first.setdefault(p, name)
        targets = {name: p for p, name in first.items()}
        missing = [name for name, p in targets.items() if name not in known and p.requires_grad]
        if not known or (missing and source is not model):
            raise ValueError(
                f"{op}: every parameter of model must be one of this optimiser or of its name, got "
                f"{missing[0] if missing else type(model).__name__!r}; give the trained model as source="
            )
        written: dict[torch.Tensor, Any] = {
            target: averages.get(known[name], known[name].detach())
            for name, target in targets.items()
            if name in known
        }
        for target, value in written.items():
            if target.shape != value.shape:
                raise ValueError(
                    f"{op}: a parameter of model must have the shape of its average, {tuple(value.shape)}, "
                    f"got {tuple(target.shape)}; give a copy of the trained model"
                )
        for target, value in written.items():
            whole = hasattr(value, "full_tensor") and not hasattr(target, "to_local")
            target.copy_(value.full_tensor() if whole else value)

    def _averages(self) -> dict[torch.Tensor, torch.Tensor]:
        """{parameter: average} of all that have one."""
        groups = [group for group in self.param_groups if group["ema"] is not None]
        if not groups:
            raise ValueError(
                f"{self._op}: averages need a parameter group with ema, got none; construct with ema=0.999"
            )
        params = (p for group in groups for p in group["params"])
        return {p: self.state[p]["ema"] for p in params if "ema" in self.state.get(p, ())}

    def __getstate__(self) -> dict[str, Any]:
        """What is copied and pickled. A copy from inside of `averaged()` would exchange nothing back."""
        if self._is_averaged:
            raise RuntimeError(
                f"{self._op}: copies must not be made inside averaged(); leave the block first"
            )
        return super().__getstate__()

    def state_dict(self) -> dict[str, Any]:
        """The state as torch's class gives it, inside `averaged()` that of outside except for the weights."""
        shown = self._shown_states()
        own = {p: self.state[p] for p in shown}
        try:  # before torch's class and the hooks see it
            self.state.update(shown)
            return super().state_dict()
        finally:
            self.state.update(own)

    def _shown_states(self) -> dict[torch.Tensor, dict[str, Any]]:
        """The states that a state dict shows otherwise than they are."""
        return {p: {**self.state[p], "ema": p.detach().clone()} for p, _ in self._exchanged}


def _forget_copies(params: Mapping[torch.Tensor, Any]) -> None:
    """Let nobody compute with copies of parameters that have other values now: autocast keeps casts, and a
    module of FSDP2 the whole parameters after a forward pass without a backward one.
    """
    torch.clear_autocast_cache()
    if not any(is_sharded(p) for p in params):
        return
    from torch.distributed import _composable_state
    from torch.distributed.fsdp import FSDPModule

    for module in list(getattr(_composable_state, "_module_state_mapping", ())):
        if isinstance(module, FSDPModule):
            module.reshard()


@torch.no_grad()
def _exchange(p: torch.Tensor, average: torch.Tensor) -> None:
    """Let two tensors have each other's values."""
    before = p.detach().clone()
    p.copy_(average)
    average.copy_(before)
