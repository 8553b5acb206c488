"""Early stopping: end training when the validation error stops falling, keep the weights of its lowest point.

    bad <- 0, w* <- w   if E_val fell, else   bad <- bad + 1;      stop at bad = patience;      w <- w*

This is algorithm 7.1 of Goodfellow, Bengio, Courville, "Deep Learning" (2016), section 7.8, counted in
epochs (one per score); `retrain` is algorithm 7.2. Algorithm 7.3 needs no code: call `restore()`, then go on
with all data under a second stopper whose `target` is the training error of the best epoch (its patience ends
the training where the target is out of reach). Beyond the book there are a least gain, a warm-up, a target,
bounds for divergence and collapse, scores that are not finite, and several ranks.
"""

from __future__ import annotations

import copy
import decimal
import fractions
import math
import numbers
import warnings
from collections.abc import Callable
from typing import Any, Literal, TypeAlias, TypedDict

import torch
import torch.distributed as dist
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, TensorDataset

from ._checks import check_choice, check_count, check_initialised, check_number, names_unknown_arguments
from ._ranks import process_group, told_by_all
from ._seeds import forked_generators

__all__ = ["EarlyStopping", "retrain"]

# Examples to train on: a Dataset with a length, a list of samples, or tensors or arrays of one length.
Examples: TypeAlias = Dataset | tuple[Any, ...] | list[Any]


class StoppingOptions(TypedDict, total=False):
    """The options of `EarlyStopping`, for the callbacks that pass them on."""

    mode: Literal["min", "max"]
    patience: int
    min_delta: float
    relative: bool
    warmup: int
    target: float | None
    diverged: float | None
    collapse: float | None
    nan: Literal["skip", "stop", "raise"]
    group: Any


# The attributes that a state dict has, beside the snapshot.
_PROGRESS = ("mode", "epoch", "best", "best_epoch", "bad_epochs", "reason")


class EarlyStopping:
    """Tell when to stop, and bring the best epoch back.

    ::

        stopper = EarlyStopping(model, optimizer, patience=5)
        for epoch in range(1000):
            train(model, optimizer)
            if stopper.step(validation_error(model)):
                break
        stopper.restore()

    Args:
        *tracked: what the snapshot holds: anything with state_dict and load_state_dict (model, optimiser,
            EMA, scheduler). May be left out where only the decision is wanted. For the averages that
            `fastreg.optim.AdamW(ema=)` keeps, give model and optimiser and ask inside of
            `optimizer.averaged()`: `restore` then leaves the best averages in the model.
        mode: "min" or "max": lower or higher scores are better.
        patience: epochs in a row without improvement that end training, as in Lightning: with 3, the scores
            6, 5, 5, 5, 5 stop at the last. 0 stops at the first such epoch, as 1 does.
        min_delta: the gain over `best` that an improvement must exceed, in units of the score. Small gains
            add up.
        relative: min_delta is a fraction of \\|best\\| (so a negative score must improve too, not merely stay
            close).
        warmup: first epochs that use up no patience. The best is kept among them too, and the other rules
            hold.
        target: stop at the first score this good; that epoch becomes the best even by a gain below min_delta.
        diverged: stop at the first score worse than this.
        collapse: stop at the first score worse than `best` by more than this, whatever the patience: robust
            accuracy falls so in one epoch when training with `fgsm` overfits catastrophically (Wong, Rice,
            Kolter 2020).
        nan: what NaN does: "skip" counts an epoch without improvement, "stop" stops, "raise" raises
            ValueError. An infinity in the improving direction (an overflow, the log of 0) is no achievement
            and is treated as NaN; in the other direction it is just a very bad score. Neither is ever the
            best.
        group: the ranks that decide together, a ProcessGroup or a DeviceMesh of one dimension (None: the
            default group). Where torch.distributed is initialised, every rank calls step with its own score,
            and all go by the mean, which is NaN if one is.

    Attributes:
        best, best_epoch: score and index (from 0) of the best epoch; None before the first finite score.
        epoch: number of scores seen; after a resume, the index of the next epoch.
        bad_epochs: epochs without improvement since the best one, those of the warm-up left out.
        reason: why the last step said stop, in words; None if it did not.

    Memory: one copy of the tracked state, on its own devices, allocated at the first improvement and
    rewritten in place at the later ones; a tied weight is stored once. `restore` holds one more copy while it
    runs.
    """

    @names_unknown_arguments("EarlyStopping")
    def __init__(
        self,
        *tracked: Any,
        mode: Literal["min", "max"] = "min",
        patience: int = 10,
        min_delta: float = 0.0,
        relative: bool = False,
        warmup: int = 0,
        target: float | None = None,
        diverged: float | None = None,
        collapse: float | None = None,
        nan: Literal["skip", "stop", "raise"] = "skip",
        group: Any = None,
    ) -> None:
        op = "EarlyStopping"
        for obj in tracked:
            if isinstance(obj, type) or not (hasattr(obj, "state_dict") and hasattr(obj, "load_state_dict")):
                example = ""
                if isinstance(obj, (int, float)):
                    example = f", such as patience={obj}"
                elif isinstance(obj, str):
                    example = ", such as mode='max'"
                raise TypeError(
                    f"EarlyStopping: expected objects with state_dict and load_state_dict, got {_name(obj)}; "
                    f"pass every model and optimiser as an argument of its own, and options by name{example}"
                )
        check_choice(op, "mode", mode, ("min", "max"))
        check_choice(op, "nan", nan, ("skip", "stop", "raise"))
        check_choice(op, "relative", relative, (False, True))
        check_count(op, "patience", patience, 0)
        check_count(op, "warmup", warmup, 0)
        check_number(op, "min_delta", min_delta, 0, finite=True)
        for name, value in {"target": target, "diverged": diverged}.items():
            if value is not None:
                check_number(op, name, value, finite=True)
        if collapse is not None:
            check_number(op, "collapse", collapse, 0, finite=True)
        self._sign = 1 if mode == "min" else -1
        if target is not None and diverged is not None and self._sign * target > self._sign * diverged:
            raise ValueError(
                f"EarlyStopping: target must be no worse than diverged in mode {mode!r}, "
                f"got target={target}, diverged={diverged}; swap them or change the mode"
            )
        self.tracked, self.mode, self.nan, self.group = tracked, mode, nan, group
        self.patience, self.warmup, self.min_delta, self.relative = patience, warmup, min_delta, relative
        self.target, self.diverged, self.collapse = target, diverged, collapse
        self.best: float | None = None
        self.best_epoch: int | None = None
        self.epoch = self.bad_epochs = 0
        self.reason: str | None = None
        self._snapshot: list[Any] | None = None
        self._lost: Exception | None = None  # why this rank has no snapshot, until all have been told

    def step(self, score: float | torch.Tensor | None, *, count: float | None = None) -> bool:
        """Judge one epoch by its validation score; True means stop.

        Args:
            score: float, int or any other real number (Fraction, Decimal), numpy scalar, or 0-dim array or
                tensor on any device. On several ranks None says that this one has no score: the others' mean
                counts.
            count: what this rank's score weighs in the mean over ranks, such as the number of its samples;
                on all ranks that have a score, or on none.

        On several ranks it is one message, in which every rank also says at which epoch it is and how it
        decides.

        Raises:
            TypeError: any other score.
            ValueError: NaN under nan="raise"; the epoch is not counted. On several ranks also, on all of them
                alike: a rank whose score is none of these, ranks at different epochs, with different bests or
                options, a rank whose last snapshot failed, and a rank that is at another call.
            RuntimeError: a rank has ended, or has not come within the time-out of the group; it is named
                where the others can tell.
        """
        value = self._score_of_all(score, count)
        sign, epoch = self._sign, self.epoch
        broken = math.isnan(value) or sign * value == -math.inf
        if broken and self.nan == "raise":
            raise ValueError(
                f"EarlyStopping.step: expected a finite score, got {value} at epoch {epoch}; "
                'look into the training, or construct with nan="skip" or nan="stop"'
            )

        # Is it the best so far?
        needed = self.min_delta * (abs(self.best) if self.relative and self.best is not None else 1.0)
        gain = 0.0
        if math.isfinite(value):
            gain = math.inf if self.best is None else sign * (self.best - value)
        reached = not broken and self.target is not None and sign * value <= sign * self.target
        if gain > needed or (reached and gain > 0):
            self._keep_best(epoch)
            self.best, self.best_epoch, self.bad_epochs = value, epoch, 0
        elif epoch >= self.warmup:
            self.bad_epochs += 1
        self.epoch += 1

        self.reason = self._why_stop(value, epoch, broken, reached)
        return self.reason is not None

    def _score_of_all(self, score: Any, count: float | None) -> float:
        """The score of an epoch: this process's own, or the mean over ranks."""
        op = "EarlyStopping.step"
        if not _on_several_ranks():
            value = _as_float(score)
            _check_weight(op, count)
            return value
        group = process_group(op, self.group)
        own: dict[str, Any] = {}
        failed: Exception | None = None
        lost, self._lost = self._lost, None
        try:
            if lost is not None:
                raise lost
            own["score"] = None if score is None else _as_float(score)
            _check_weight(op, count)
            own["count"] = None if count is None else float(count)
        except Exception as error:  # whatever it is, the others must hear of it
            failed, own = error, {"error": str(error) or type(error).__name__}
        names = ("epoch", "mode", "best", "patience", "warmup", "min_delta", "relative", "target", "diverged")
        same = {name: getattr(self, name) for name in (*names, "collapse", "nan")}
        same = {name: value.item() if hasattr(value, "item") else value for name, value in same.items()}
        remedy = "call step once per epoch on every rank of the group, with the same options"
        try:
            told = told_by_all(op, group, same, own, remedy)
        except ValueError:
            if failed is not None:
                raise failed from None
            raise
        return _mean([each["score"] for each in told], [each["count"] for each in told])

    def _keep_best(self, epoch: int) -> None:
        """Take the snapshot. On several ranks none may leave the others here: where it fails, all hear of it
        in the next message.
        """
        try:
            self._take_snapshot(self._snapshot)
        except Exception as error:
            if not _on_several_ranks():
                raise
            self._snapshot = None  # the others have a later one
            why = str(error) or type(error).__name__
            self._lost = RuntimeError(
                f"EarlyStopping: the snapshot of epoch {epoch} failed ({why}); free memory, or track less"
            )
            self._lost.__cause__ = error
            warnings.warn(f"{self._lost}; the other ranks are told at the next call", stacklevel=4)

    def _why_stop(self, score: float, epoch: int, broken: bool, reached: bool) -> str | None:
        """The first rule that ends training at this score, in words; None to go on."""
        sign, best = self._sign, self.best
        if broken and self.nan == "stop":
            return f"the score is {score} at epoch {epoch}"
        if reached:
            return f"score {score:g} reached target={self.target:g} at epoch {epoch}"
        if self.diverged is not None and sign * score > sign * self.diverged:
            return f"score {score:g} is worse than diverged={self.diverged:g} at epoch {epoch}"
        if self.collapse is not None and best is not None and sign * (score - best) > self.collapse:
            over = f"by over {self.collapse:g} at epoch {epoch}"
            return f"score {score:g} is worse than the best, {best:g}, {over}"
        if self.bad_epochs >= max(self.patience, 1):
            so_far = "no finite score yet" if best is None else f"best {best:g} at epoch {self.best_epoch}"
            return f"no improvement in {self.bad_epochs} epochs up to epoch {epoch}: {so_far}"
        return None

    def restore(self) -> None:
        """Load the best epoch into the tracked objects: into all of them or, on an error, into none.

        Where torch.distributed is initialised, every rank of the group calls it: it is one message, by which
        an error on one rank restores nothing on all of them.

        The values go through each load_state_dict, so parameters stay the tensors they are, tied ones tied,
        and an optimiser built on them stays valid. Gradients and random states are left alone. May be called
        repeatedly.

        Raises:
            RuntimeError: nothing tracked, no snapshot yet, or an object that no longer fits; it is named. On
                several ranks on all of them alike.
        """
        if not self.tracked:
            raise RuntimeError(
                "EarlyStopping.restore: nothing is tracked; construct with EarlyStopping(model, ...)"
            )
        before = self._load_best_on_all() if _on_several_ranks() else self._load_best()
        # Optimisers keep the very tensors that they are given and would train inside the snapshot. They may
        # have those, and the snapshot is read back into the copy that is no longer needed.
        self._take_snapshot(before)

    def _load_best_on_all(self) -> list[Any]:
        """`_load_best` on every rank of the group, or on none."""
        op = "EarlyStopping.restore"
        group = process_group(op, self.group)
        before, failed = None, None
        try:
            before = self._load_best()
        except Exception as error:  # whatever it is, the others must hear of it
            failed = error
        same = {"best_epoch": self.best_epoch, "best": self.best}
        own = {"error": None if failed is None else str(failed) or type(failed).__name__}
        try:
            told_by_all(op, group, same, own, "call restore on every rank of the group, after the same steps")
        except (ValueError, RuntimeError) as error:
            if before is not None:
                self._load(before)
            raise RuntimeError(str(error)) from (failed or error)
        assert before is not None
        return before

    def _load(self, states: list[Any]) -> None:
        for obj, state in zip(self.tracked, states, strict=True):
            obj.load_state_dict(state)

    def _load_best(self) -> list[Any]:
        """Load the snapshot; gives what was there before."""
        lost, self._lost = self._lost, None
        if lost is not None:
            raise lost
        if self._snapshot is None:
            raise RuntimeError(
                f"EarlyStopping.restore: expected a snapshot, got none in {self.epoch} epochs; "
                "call step with a finite score first"
            )
        before = _copy([obj.state_dict() for obj in self.tracked])
        i = 0
        try:
            for i, obj in enumerate(self.tracked):
                obj.load_state_dict(self._snapshot[i])
        except Exception as error:
            for j in range(i + 1):
                self.tracked[j].load_state_dict(before[j])
            raise RuntimeError(
                f"EarlyStopping.restore: tracked[{i}], {_name(self.tracked[i])}, does not take its snapshot "
                f"({error}); "
                "nothing was restored; undo what changed its structure since the best epoch"
            ) from error
        return before

    def state_dict(self) -> dict[str, Any]:
        """Progress and snapshot, for torch.save; torch.load(weights_only=True) reads it if it reads the
        tracked states.

        The tensors are copies, so that a checkpoint that is loaded into them, and is found broken on the way,
        leaves the snapshot whole. Options (patience and the rest) are not in it, so those given at
        construction hold after a resume.
        """
        return {name: getattr(self, name) for name in _PROGRESS} | {"snapshot": _copy(self._snapshot)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state_dict(), which is copied. The tracked objects are left alone: load their own
        states.

        Raises:
            ValueError: not such a dict, or one of the other mode or of another number of tracked objects.
        """

        def check(what: str, expected: Any, got: Any, remedy: str) -> None:
            if expected != got:
                raise ValueError(
                    f"EarlyStopping.load_state_dict: expected {what} {expected!r}, got {got!r}; {remedy}"
                )

        keys = {*_PROGRESS, "snapshot"}
        got = set(state) if isinstance(state, dict) else _name(state)
        check("the keys", keys, got, "pass what EarlyStopping.state_dict() returned")
        check("mode", self.mode, state["mode"], "construct with the mode of the saved run")
        if state["snapshot"] is not None:
            remedy = "construct with what the saved run tracked, in the same order"
            check("tracked objects:", len(self.tracked), len(state["snapshot"]), remedy)
        self._snapshot = _copy(state["snapshot"])
        for name in keys - {"snapshot"}:
            setattr(self, name, state[name])

    def _take_snapshot(self, old: list[Any] | None) -> None:
        for obj in self.tracked:
            check_initialised("EarlyStopping.step", obj)
        states = [obj.state_dict() for obj in self.tracked]
        # There is no snapshot meanwhile: a copy that is cut short (out of memory, Ctrl-C) mixes two epochs
        # and must not be restored.
        self._snapshot = None
        self._snapshot = _copy(states, old)


def retrain(
    make: Callable[[], Any],
    train_epoch: Callable[..., Any],
    train_data: Examples,
    val_data: Examples,
    *,
    epochs: int | EarlyStopping,
    seed: int,
    batch_size: int,
    shuffle: bool = True,
    **loader_kwargs: Any,
) -> Any:
    """Train anew on training and validation data together, for the number of epochs that early stopping
    found.

    Algorithm 7.2 of Goodfellow et al. (2016), counted in passes over the data. Bit for bit the same as::

        torch.manual_seed(seed)
        made = make()
        loader = DataLoader(ConcatDataset([train_data, val_data]), batch_size, shuffle, **loader_kwargs)
        for _ in range(epochs):
            train_epoch(*made, loader)

    Args:
        make: builds everything fresh and returns the model, or a tuple such as (model, optimizer).
        train_epoch: one pass over the loader; called as train_epoch(model, loader), train_epoch(model,
            optimizer, loader) and so on, as make() returns. What it returns is dropped.
        train_data, val_data: Datasets with a length, lists of samples (tuples), or tuples of tensors or NumPy
            arrays [N, ...] that share N, as in `TensorDataset`. Validation data are trained on as they come:
            give them the transforms of the training data.
        epochs: passes over the data, >= 1; or a stopper, for its best_epoch + 1.
        seed: an int for torch.manual_seed before make(). What draws random numbers are the functions given
            here, from torch's own generators, so that a generator cannot be passed on. The caller's states
            (CPU, and CUDA if in use) are put back.
        batch_size, shuffle, **loader_kwargs: as for torch.utils.data.DataLoader.

    Returns:
        What make() returned, trained.

    Raises:
        TypeError, ValueError: an argument is none of these. Checked before make() is called.
    """
    op = "retrain"
    for name, value in {"make": make, "train_epoch": train_epoch}.items():
        if not callable(value):
            raise TypeError(f"{op}: {name} must be a function, got {_name(value)}; pass it uncalled")
    if isinstance(epochs, EarlyStopping):
        if epochs.best_epoch is None:
            raise ValueError(
                f"{op}: expected a stopper with a best epoch, got one without; call its step first"
            )
        epochs = epochs.best_epoch + 1
    elif not isinstance(epochs, numbers.Integral):
        raise TypeError(f"{op}: epochs must be an int or an EarlyStopping, got {_name(epochs)}")
    check_count(op, "epochs", epochs)
    check_count(op, "seed", seed, -math.inf)
    data: Dataset = ConcatDataset([_dataset("train_data", train_data), _dataset("val_data", val_data)])
    loader: DataLoader = DataLoader(data, batch_size=batch_size, shuffle=shuffle, **loader_kwargs)

    with forked_generators():
        torch.manual_seed(seed)
        made = make()
        parts = made if isinstance(made, tuple) else (made,)
        for _ in range(epochs):
            train_epoch(*parts, loader)
    return made


def _on_several_ranks() -> bool:
    return dist.is_available() and dist.is_initialized()


# Validation often runs in inference mode, and a buffer that is made there can never be rewritten outside.
@torch.inference_mode(False)
@torch.no_grad()
def _copy(value: Any, old: Any = None) -> Any:
    """Deep copy of nested state, written into the tensors of `old`, an earlier copy, where they fit."""
    copies: dict[Any, torch.Tensor] = {}
    taken: set[int] = set()

    def walk(value: Any, old: Any) -> Any:
        if isinstance(value, torch.Tensor):
            region = _region(value)
            if region not in copies:
                # Two names that were tied share a tensor in `old`. Once they differ, only the first of them
                # may have it.
                if id(old) not in taken and _form(old) is not None and _form(old) == _form(value.detach()):
                    copies[region] = old.copy_(value)
                    taken.add(id(old))
                else:
                    copies[region] = value.clone()
            return copies[region]
        if isinstance(value, dict):
            # A module's state_dict keeps its version in an attribute, and so the class and its attributes
            # are copied too.
            made = copy.copy(value)
            for key in value:
                made[key] = walk(value[key], old.get(key) if isinstance(old, dict) else None)
            return made
        if type(value) in (list, tuple):
            olds = old if type(old) is type(value) and len(old) == len(value) else [None] * len(value)
            return type(value)(map(walk, value, olds))
        return copy.deepcopy(value)

    return walk(value, old)


def _form(tensor: Any) -> tuple[Any, ...] | None:
    """What two tensors must have in common for one to be rewritten as the other; None for what is never
    rewritten.
    """
    if not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided:
        return None
    t = tensor
    return type(t), t.shape, t.stride(), t.dtype, t.device, t.is_conj(), t.is_neg()


def _region(tensor: torch.Tensor) -> tuple[Any, ...]:
    """What two names of one tensor have in common. Views that merely overlap differ in it, and each is copied
    by itself.
    """
    tensor_id, tensor = id(tensor), tensor.detach()
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor  # DTensor: this rank's part
    in_memory = type(local) is torch.Tensor and local.layout is torch.strided
    return (local.data_ptr() if in_memory else tensor_id), _form(tensor)


def _as_float(score: Any) -> float:
    number = score
    if isinstance(score, torch.Tensor):
        number = score.item() if score.ndim == 0 else None
    elif getattr(score, "shape", None) == () and hasattr(score, "item"):  # arrays and scalars of NumPy's kind
        number = score.item()
    if isinstance(number, bool) or not isinstance(number, (numbers.Real, decimal.Decimal)):
        raise TypeError(
            "EarlyStopping.step: expected one real number (float, int, numpy scalar, 0-dim tensor), "
            f"got {_name(score)}; pass the mean over the validation set"
        )
    return float(number)


def _check_weight(op: str, count: Any) -> None:
    if count is not None:
        check_number(op, "count", count, 0, finite=True)


def _mean(scores: list[float | None], counts: list[float | None]) -> float:
    """The mean of the scores that are there, weighted where counts are. The sums are exact, so that scores
    that agree already come back unchanged.
    """
    op = "EarlyStopping.step"
    known = [(s, 1 if c is None else c) for s, c in zip(scores, counts, strict=True) if s is not None]
    if not known:
        raise ValueError(
            f"{op}: at least one rank must have a score, got None from all; pass its score there"
        )
    with_count = [c is not None for s, c in zip(scores, counts, strict=True) if s is not None]
    if len(set(with_count)) > 1:
        raise ValueError(f"{op}: count must be given on all ranks or on none, got it on {sum(with_count)}")
    known = [(s, c) for s, c in known if c > 0]
    if not known:
        raise ValueError(f"{op}: count must be above 0 on one rank at least, got 0 on all")
    if not all(math.isfinite(score) for score, _ in known):
        return sum(score for score, _ in known)  # NaN, or the infinity
    weighted = sum(fractions.Fraction(score) * fractions.Fraction(count) for score, count in known)
    return float(weighted / sum(fractions.Fraction(count) for _, count in known))


def _dataset(name: str, data: Any) -> Dataset:
    columns = isinstance(data, tuple) or (isinstance(data, list) and all(map(_is_column, data)))
    if columns and data:
        tensors = [_column(name, each) for each in data]
        if len({t.shape[:1] for t in tensors}) > 1 or tensors[0].ndim == 0:  # [N, ...] each
            shapes = [tuple(t.shape) for t in tensors]
            raise ValueError(f"retrain: the tensors of {name} must be [N, ...] with the same N, got {shapes}")
        return TensorDataset(*tensors)
    if isinstance(data, list) and any(isinstance(each, (list, str)) for each in data):
        raise TypeError(
            f"retrain: a list as {name} holds samples, which are tuples, or tensors [N, ...], got a list of "
            f"lists; of columns pass (torch.tensor(x), torch.tensor(y)), of samples [tuple(s) for s in data]"
        )
    refused = (IterableDataset, DataLoader, torch.Tensor, str, bytes)
    # Arrays and frames have a length too, and keys or positions that are no samples.
    if (
        isinstance(data, refused)
        or hasattr(data, "keys")
        or (_is_column(data) and not isinstance(data, Dataset))
    ):
        known = False
    else:
        known = hasattr(data, "__len__") and hasattr(data, "__getitem__")
    if not known:
        raise TypeError(
            f"retrain: {name} must be a Dataset with a length or a tuple of tensors, got {_name(data)}; "
            "of a DataLoader pass its .dataset, of one tensor x (x,), of a dict tuple(data.values())"
        )
    return data


def _is_column(value: Any) -> bool:
    """Whether a value is a tensor or an array."""
    return isinstance(value, torch.Tensor) or hasattr(value, "__array__")


def _column(name: str, value: Any) -> torch.Tensor:
    """A tensor or an array as a tensor."""
    if isinstance(value, torch.Tensor):
        return value
    try:
        if not _is_column(value):
            raise TypeError
        flags = getattr(value, "flags", None)
        # A tensor may not share memory that must not be written to.
        return torch.as_tensor(value) if flags is None or flags.writeable else torch.tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"retrain: {name} as a tuple must hold tensors or arrays of numbers, got {_name(value)}; of "
            f"samples pass a list, and make columns tensors with torch.tensor"
        ) from None


def _name(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a {value.dtype} tensor of shape {list(value.shape)}"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    kind = type(value).__name__
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"
