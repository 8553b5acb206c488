"""Early stopping against the book's algorithm written out, retraining against the loop written by hand."""

import copy
import datetime
import io
import math
import pickle
import random
import re
import warnings
from collections import OrderedDict, namedtuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, TensorDataset

from fastreg.early_stopping import EarlyStopping, retrain

INF, NAN = math.inf, math.nan


def run(stopper, scores):
    """Index at which the stopper stops, None if it never does."""
    return next((i for i, score in enumerate(scores) if stopper.step(score)), None)


def through_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def values(module):
    return {name: p.detach().clone() for name, p in module.state_dict().items()}


def same(module, expected):
    state = module.state_dict()
    return state.keys() == expected.keys() and all(torch.equal(state[k], expected[k]) for k in expected)


@torch.no_grad()
def disturb(module):
    for p in module.parameters():
        p.add_(torch.randn_like(p))


# ---------------------------------------------------------------------------------------------- decisions


@pytest.mark.parametrize(
    "scores, options, stop, best_epoch",
    [
        ([6, 5, 5, 5, 5, 5], dict(patience=3), 4, 1),
        ([6, 5, 5, 5, 4, 5, 5, 5], dict(patience=3), 7, 4),  # counted in a row
        ([3, 4], dict(patience=1), 1, 0),
        ([3, 3], dict(patience=0), 1, 0),
        ([3, 2, 1], dict(patience=0), None, 2),
        ([5] * 11, dict(), 10, 0),
        ([5] * 10, dict(), None, 0),
        # max
        ([1, 2, 2, 2], dict(patience=2, mode="max"), 3, 1),
        ([-3, -2, -1], dict(patience=1, mode="max"), None, 2),
        ([3, 2, 1], dict(patience=1, mode="max"), 1, 0),
        # least gain: exceeded, not merely met; small gains add up
        ([5.0, 4.5, 4.0], dict(patience=2, min_delta=0.5), None, 2),
        ([5.0, 4.5, 4.5], dict(patience=2, min_delta=0.5), 2, 0),
        ([5.0, 4.75, 4.25], dict(patience=2, min_delta=0.5), None, 2),
        ([5.0, 5.5, 6.0], dict(patience=2, min_delta=0.5, mode="max"), None, 2),
        # relative: 10 % of 100 is 10, and 10 % of -100 is 10 as well, downwards
        ([100, 91, 89], dict(patience=2, min_delta=0.1, relative=True), None, 2),
        ([100, 91, 90], dict(patience=2, min_delta=0.1, relative=True), 2, 0),
        ([-100, -91, -105], dict(patience=2, min_delta=0.1, relative=True), 2, 0),
        ([-100, -109, -111], dict(patience=2, min_delta=0.1, relative=True), None, 2),
        ([-100, -91, -89], dict(patience=2, min_delta=0.1, relative=True, mode="max"), None, 2),
        ([-100, -105, -91], dict(patience=2, min_delta=0.1, relative=True, mode="max"), 2, 0),
        ([0, -1e-9], dict(patience=1, min_delta=0.1, relative=True), None, 1),
        # warm-up
        ([1, 2, 2, 2, 2], dict(patience=2, warmup=3), 4, 0),
        ([1, 2, 2, 2], dict(patience=0, warmup=3), 3, 0),
        ([5, 1, 2, 2, 2, 2], dict(patience=2, warmup=2), 3, 1),
        ([5, 9], dict(warmup=5, diverged=8), 1, 0),
        ([5, 1], dict(warmup=5, target=1), 1, 1),
        ([5, NAN], dict(warmup=5, nan="stop"), 1, 0),
        # target, also by a gain below min_delta; never by a score that is no score
        ([5, 4, 3], dict(target=4), 1, 1),
        ([5, 4, 3], dict(target=3.5), 2, 2),
        ([0.1, 0.5, 0.9], dict(mode="max", target=0.5), 1, 1),
        ([5, 4.5], dict(min_delta=1, target=4.5), 1, 1),
        ([5, -INF, 6], dict(target=4), None, 0),
        ([5, NAN, 6], dict(target=4), None, 0),
        # divergence: worse than, not equal to
        ([5, 10, 11], dict(diverged=10), 2, 0),
        ([5, INF], dict(diverged=10), 1, 0),
        ([5, NAN, -INF], dict(diverged=10), None, 0),
        ([0.5, 0.1, 0.0], dict(mode="max", diverged=0.1), 2, 0),
        ([0.5, -INF], dict(mode="max", diverged=0.1), 1, 0),
        # collapse: worse than the best by more than that
        ([0.5, 0.7, 0.55, 0.6, 0.49], dict(mode="max", collapse=0.2), 4, 1),
        ([4, 3, 5, 5.5], dict(collapse=2), 3, 1),
        ([9, 3, 4, 1, 3, 3.5], dict(collapse=2), 5, 3),
        ([5, NAN, 6], dict(collapse=2), None, 0),
        ([5, INF], dict(collapse=2), 1, 0),
        ([NAN, 5, 8], dict(warmup=9, collapse=2), 2, 1),
        ([5, 5.5], dict(collapse=0), 1, 0),
        # not finite
        ([NAN, 5, NAN, 4, NAN, NAN], dict(patience=2), 5, 3),
        ([NAN, NAN], dict(patience=2), 1, None),
        ([INF, 5, 6], dict(patience=2), None, 1),
        ([-INF, 5, 6], dict(patience=2), None, 1),
        ([5, -INF, INF], dict(patience=2), 2, 0),
        ([5, INF, -INF], dict(patience=2, mode="max"), 2, 0),
        ([5, NAN], dict(nan="stop"), 1, 0),
        ([5, -INF], dict(nan="stop"), 1, 0),
        ([5, INF, 4], dict(nan="stop"), None, 2),
        ([5, INF], dict(nan="stop", mode="max"), 1, 0),
        # extremes of float
        ([1.7e308, -1.7e308], dict(patience=1, min_delta=1), None, 1),
        ([1e308, 1e307], dict(patience=1, min_delta=1e10, relative=True), 1, 0),
    ],
)
def test_decisions(scores, options, stop, best_epoch):
    stopper = EarlyStopping(**options)
    assert run(stopper, scores) == stop
    assert stopper.best_epoch == best_epoch
    assert stopper.best == (None if best_epoch is None else scores[best_epoch])
    assert stopper.epoch == (len(scores) if stop is None else stop + 1)
    assert (stopper.reason is None) == (stop is None)


score_lists = st.lists(st.one_of(st.integers(-3, 3).map(float), st.floats()), max_size=30)


@given(score_lists, st.integers(1, 5), st.sampled_from(["min", "max"]))
def test_patience_is_the_distance_to_the_best_so_far(scores, patience, mode):
    sign = 1 if mode == "min" else -1
    cost = [sign * s if math.isfinite(s) else INF for s in scores]
    stopper = EarlyStopping(patience=patience, mode=mode)
    for i, score in enumerate(scores):
        seen = cost[: i + 1]
        best = seen.index(min(seen)) if min(seen) < INF else None
        bad = i - (-1 if best is None else best)
        assert stopper.step(score) == (bad >= patience)
        assert (stopper.best_epoch, stopper.bad_epochs, stopper.epoch) == (best, bad, i + 1)


@given(score_lists, st.integers(1, 5), st.floats(0, 2), st.booleans())
def test_min_and_max_mirror_each_other(scores, patience, min_delta, relative):
    low = EarlyStopping(patience=patience, min_delta=min_delta, relative=relative)
    high = EarlyStopping(patience=patience, min_delta=min_delta, relative=relative, mode="max")
    assert [low.step(s) for s in scores] == [high.step(-s) for s in scores]
    assert low.best_epoch == high.best_epoch


@pytest.mark.parametrize(
    "scores, options, words",
    [
        ([6, 5, 5, 5], dict(patience=2), ["no improvement in 2 epochs", "best 5 at epoch 1"]),
        ([NAN, NAN], dict(patience=2), ["no improvement in 2 epochs", "no finite score"]),
        ([6, 0.25], dict(target=0.5), ["0.25", "target=0.5", "epoch 1"]),
        ([6, 8], dict(diverged=7), ["8", "diverged=7", "epoch 1"]),
        ([6, NAN], dict(nan="stop"), ["nan at epoch 1"]),
        ([6, -INF], dict(nan="stop"), ["-inf at epoch 1"]),
    ],
)
def test_reason_says_why(scores, options, words):
    stopper = EarlyStopping(**options)
    run(stopper, scores)
    for word in words:
        assert word in stopper.reason


def test_reason_of_a_collapse():
    stopper = EarlyStopping(mode="max", collapse=0.2)
    assert run(stopper, [0.5, 0.25]) == 1
    assert stopper.reason == "score 0.25 is worse than the best, 0.5, by over 0.2 at epoch 1"


def test_going_on_after_the_stop():
    stopper = EarlyStopping(patience=2)
    assert [stopper.step(s) for s in [1, 2, 2, 2, 0, 1]] == [False, False, True, True, False, False]
    assert stopper.reason is None and stopper.best_epoch == 4


def test_nan_raise_leaves_everything_as_it_was():
    model = nn.Linear(2, 2)
    stopper = EarlyStopping(model, nan="raise")
    stopper.step(5)
    stopper.step(6)
    before = stopper.state_dict()
    for bad in (NAN, -INF):
        with pytest.raises(
            ValueError, match=r"step: expected a finite score, got -?(nan|inf) at epoch 2; .*nan="
        ):
            stopper.step(bad)
        assert stopper.state_dict() == before
    assert not stopper.step(INF)
    assert stopper.bad_epochs == 2


@pytest.mark.parametrize(
    "score",
    [
        2,
        2.0,
        np.float32(2),
        np.float64(2),
        np.float16(2),
        np.int64(2),
        torch.tensor(2.0),
        torch.tensor(2),
        torch.tensor(2.0, dtype=torch.bfloat16),
        torch.tensor(2.0, dtype=torch.float64, requires_grad=True) * 1,
    ],
)
def test_scores_taken(score):
    stopper = EarlyStopping()
    stopper.step(score)
    assert stopper.best == 2.0 and type(stopper.best) is float


def test_a_score_that_needs_a_gradient_is_taken_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.set_warn_always(True)  # torch says it once per process, perhaps in an earlier test
        try:
            EarlyStopping().step(nn.Parameter(torch.tensor(2.0)) * 1)
        finally:
            torch.set_warn_always(False)


def test_a_tensor_score_is_read_at_once():
    score, stopper = torch.tensor(3.0), EarlyStopping()
    stopper.step(score)
    score.fill_(9)
    assert stopper.best == 3.0


@pytest.mark.parametrize(
    "score",
    [
        *(
            None,
            "1.0",
            True,
            np.bool_(True),
            1j,
            [1.0],
            (1.0,),
            {"loss": 1.0},
            np.array([1.0]),
            nn.Linear(1, 1),
        ),
        *(torch.tensor([1.0]), torch.ones(2), torch.tensor(1j), torch.tensor(True), torch.tensor([])),
    ],
    ids=str,
)
def test_scores_refused(score):
    stopper = EarlyStopping()
    with pytest.raises(
        TypeError, match=r"EarlyStopping.step: expected one real number .*, got .*; pass the mean"
    ):
        stopper.step(score)
    assert stopper.epoch == 0


@pytest.mark.parametrize(
    "options, error",
    [
        (dict(mode="auto"), ValueError),
        (dict(mode=None), ValueError),
        (dict(nan="ignore"), ValueError),
        (dict(nan=True), ValueError),
        (dict(relative=0.01), ValueError),
        (dict(relative="yes"), ValueError),
        (dict(patience=-1), ValueError),
        (dict(patience=2.5), TypeError),
        (dict(patience=NAN), TypeError),
        (dict(patience=True), TypeError),
        (dict(patience=None), TypeError),
        (dict(patience="3"), TypeError),
        (dict(warmup=-1), ValueError),
        (dict(warmup=1.0), TypeError),
        (dict(min_delta=-0.1), ValueError),
        (dict(min_delta=NAN), ValueError),
        (dict(min_delta=INF), ValueError),
        (dict(min_delta="0"), TypeError),
        (dict(target=NAN), ValueError),
        (dict(target=-INF), ValueError),
        (dict(target="0"), TypeError),
        (dict(diverged=NAN), ValueError),
        (dict(diverged=INF), ValueError),
        (dict(collapse=-1), ValueError),
        (dict(collapse=NAN), ValueError),
        (dict(collapse="1"), TypeError),
        (dict(target=5, diverged=4), ValueError),
        (dict(target=4, diverged=5, mode="max"), ValueError),
    ],
    ids=str,
)
def test_options_refused(options, error):
    with pytest.raises(error, match=f"EarlyStopping: {next(iter(options))} must be .*, got"):
        EarlyStopping(**options)


def test_options_taken():
    EarlyStopping(patience=np.int64(3), min_delta=np.float32(0.1), target=-1, diverged=-1, warmup=0)


@pytest.mark.parametrize("tracked", [3, "model", None, [nn.Linear(1, 1)], nn.Linear, torch.ones(1)], ids=str)
def test_tracked_refused(tracked):
    with pytest.raises(TypeError, match=r"state_dict and load_state_dict, got .*argument of its own"):
        EarlyStopping(tracked)


# ---------------------------------------------------------------------------------------------- snapshot and
# restore


class Tied(nn.Module):
    def __init__(self, words=7, width=4):
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.out = nn.Linear(width, words)
        self.out.weight = self.embed.weight

    def forward(self, x):
        return self.out(self.embed(x))


def snapshot(stopper):
    return stopper.state_dict()["snapshot"]


def test_restore_brings_the_best_epoch_back_into_the_same_tensors():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    stopper = EarlyStopping(model)
    tensors, history = list(model.state_dict(keep_vars=True).values()), []
    for score in [4, 2, 3, NAN, 5]:
        disturb(model)
        model(torch.randn(8, 3))  # moves the running statistics
        history.append(values(model))
        stopper.step(score)
    stopper.restore()
    assert same(model, history[1])
    assert all(a is b for a, b in zip(model.state_dict(keep_vars=True).values(), tensors, strict=True))
    disturb(model)
    stopper.restore()
    assert same(model, history[1])


def test_nan_epoch_is_never_restored():
    model = nn.Linear(2, 2)
    stopper = EarlyStopping(model, patience=3)
    stopper.step(NAN)
    with pytest.raises(RuntimeError, match="expected a snapshot, got none in 1 epochs; call step"):
        stopper.restore()
    stopper.step(1.0)
    good = values(model)
    with torch.no_grad():
        model.weight.fill_(NAN)
    stopper.step(NAN)
    stopper.restore()
    assert same(model, good)


def test_restore_too_early():
    with pytest.raises(RuntimeError, match="expected a snapshot"):
        EarlyStopping(nn.Linear(1, 1)).restore()
    stopper = EarlyStopping()
    stopper.step(1)
    with pytest.raises(RuntimeError, match="nothing is tracked"):
        stopper.restore()


def test_tied_weights_are_stored_once_and_stay_tied():
    model = Tied()
    stopper = EarlyStopping(model)
    stopper.step(2)
    disturb(model)
    stopper.step(1)  # the second snapshot goes into the memory of the first
    best = values(model)
    (state,) = snapshot(stopper)
    assert state["embed.weight"] is state["out.weight"]
    disturb(model)
    stopper.restore()
    assert same(model, best)
    assert model.out.weight is model.embed.weight
    (state,) = snapshot(stopper)
    assert state["embed.weight"] is state["out.weight"]


def test_weights_untied_between_two_snapshots():
    model = Tied()
    stopper = EarlyStopping(model)
    stopper.step(2)
    model.out.weight = nn.Parameter(torch.randn(7, 4))
    stopper.step(1)
    best = values(model)
    assert not torch.equal(best["out.weight"], best["embed.weight"])
    disturb(model)
    stopper.restore()
    assert same(model, best)


def test_weights_tied_between_two_snapshots():
    model = Tied()
    model.out.weight = nn.Parameter(torch.randn(7, 4))
    stopper = EarlyStopping(model)
    stopper.step(2)
    model.out.weight = model.embed.weight
    stopper.step(1)
    (state,) = snapshot(stopper)
    assert state["embed.weight"] is state["out.weight"]


def test_a_parameter_of_two_tracked_objects_is_stored_once():
    shared = nn.Linear(3, 3)
    a, b = nn.Sequential(shared), nn.Sequential(nn.Linear(3, 3), shared)
    stopper = EarlyStopping(a, b)
    stopper.step(1)
    first, second = snapshot(stopper)
    assert first["0.weight"] is second["1.weight"]
    best = values(a), values(b)
    disturb(b)
    stopper.restore()
    assert same(a, best[0]) and same(b, best[1])


class Bag:
    """Anything with a state_dict; keeps what it is given, as many a hand-written EMA does."""

    def __init__(self, **state):
        self.state = state

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


def test_views_of_one_storage():
    flat = torch.arange(12.0)
    views = dict(
        head=flat[:4],
        tail=flat[2:8],
        step=flat[::3],
        square=flat[:4].view(2, 2),
        cast=flat[:4].view(torch.int32),
    )
    complex_ = torch.randn(3, dtype=torch.complex64)
    views |= dict(z=complex_, conj=complex_.conj(), neg=complex_.conj().imag)
    expected = {name: view.clone() for name, view in views.items()}
    bag = Bag(**views)
    stopper = EarlyStopping(bag)
    stopper.step(1)
    flat.zero_()
    complex_.zero_()
    stopper.restore()
    assert all(torch.equal(bag.state[name], expected[name]) for name in views)


def test_odd_tensors():
    sparse = torch.eye(3).to_sparse()
    state = dict(
        sparse=sparse,
        empty=torch.empty(0, 3),
        scalar=torch.tensor(1.5),
        expanded=torch.ones(1).expand(1000),
        half=torch.ones(2, dtype=torch.bfloat16),
        meta=torch.empty(2, device="meta"),
        leaf=torch.ones(2, requires_grad=True),
        channels_last=torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    )
    bag = Bag(**state)
    stopper = EarlyStopping(bag)
    stopper.step(2)
    stopper.step(1)
    stopper.restore()
    for name in state.keys() - {"meta"}:
        assert torch.equal(bag.state[name].to_dense(), state[name].to_dense())
        assert not bag.state[name].requires_grad
    assert bag.state["channels_last"].is_contiguous(memory_format=torch.channels_last)


def test_tensor_subclasses_without_memory_of_their_own():
    # Every such wrapper has data_ptr() 0: by that, these two would be one tensor.
    bag = Bag(a=TwoTensor(torch.ones(2), torch.ones(2)), b=TwoTensor(torch.zeros(2), torch.ones(2)))
    stopper = EarlyStopping(bag)
    stopper.step(2)
    stopper.step(1)
    bag.state["a"].a.fill_(9)
    stopper.restore()
    assert type(bag.state["a"]) is TwoTensor
    assert bag.state["a"].a.tolist() == [1, 1] and bag.state["b"].a.tolist() == [0, 0]


Point = namedtuple("Point", "x y")


def test_entries_that_are_no_tensors_are_deep_copied():
    inner = [1, {"k": [2]}]
    bag = Bag(inner=inner, pair=(torch.ones(2), [3]), point=Point(torch.zeros(1), 2), text="a", none=None)
    stopper = EarlyStopping(bag)
    stopper.step(1)
    inner[1]["k"].append(99)
    bag.state["pair"][1].append(99)
    bag.state["point"].x.fill_(7)
    bag.state["new"] = 1
    stopper.restore()
    assert bag.state["inner"] == [1, {"k": [2]}]
    assert bag.state["pair"][1] == [3]
    assert bag.state["point"] == Point(torch.zeros(1), 2)
    assert "new" not in bag.state
    bag.state["inner"].append(5)  # the restored object is not the snapshot either
    bag.state["pair"][0].fill_(5)
    stopper.restore()
    assert bag.state["inner"] == [1, {"k": [2]}] and torch.equal(bag.state["pair"][0], torch.ones(2))


def test_module_versions_survive():
    model = nn.Sequential(nn.BatchNorm1d(2))
    stopper = EarlyStopping(model)
    stopper.step(1)
    (state,) = snapshot(stopper)
    assert type(state) is OrderedDict and state._metadata == model.state_dict()._metadata


def test_snapshot_memory_is_used_again():
    model = Tied()
    optimizer = torch.optim.Adam(model.parameters())
    stopper = EarlyStopping(model, optimizer)
    model(torch.tensor([1, 2])).sum().backward()
    optimizer.step()

    def addresses():
        weights, adam = snapshot(stopper)
        tensors = list(weights.values()) + [t for s in adam["state"].values() for t in s.values()]
        return [t.data_ptr() for t in tensors]

    stopper.step(5)
    first = addresses()
    live = {t.data_ptr() for t in model.state_dict().values()}
    for score in (4, 3):
        optimizer.step()
        stopper.step(score)
        assert addresses() == first and not live & set(first)
    assert torch.equal(snapshot(stopper)[0]["out.weight"], model.out.weight)


def test_snapshot_follows_a_changing_structure():
    bag = Bag(a=torch.ones(2), b=torch.ones(2))
    stopper = EarlyStopping(bag)
    stopper.step(3)
    for score, state in [
        (2, dict(a=torch.zeros(3), c=torch.full((2,), 4.0))),
        (1, dict(a=torch.zeros(3, dtype=torch.int64), c=[torch.ones(2)])),
        (0, dict(a={"deep": torch.ones(1)}, c=[torch.ones(2), torch.zeros(1)])),
    ]:
        bag.state = state
        stopper.step(score)
        bag.state = None
        stopper.restore()
        assert repr(bag.state) == repr(state)


def train_some(model, optimizer, steps=3):
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(5, 3)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize(
    "make_optimizer",
    [lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), lambda p: torch.optim.AdamW(p, lr=0.1)],
    ids=["sgd", "adamw"],
)
@pytest.mark.parametrize("trained_before", [0, 3], ids=["state created later", "state there"])
def test_optimiser_goes_on_as_if_nothing_had_happened(make_optimizer, trained_before):
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = make_optimizer(model.parameters())
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    stopper = EarlyStopping(model, optimizer, schedule)
    train_some(model, optimizer, trained_before)
    stopper.step(1.0)
    twin_model = copy.deepcopy(model)
    twin = make_optimizer(twin_model.parameters())
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(2):  # twice: training after the first restore must not have touched the snapshot
        train_some(model, optimizer)
        schedule.step()
        schedule.step()
        stopper.step(2.0)
        assert optimizer.param_groups[0]["lr"] < 0.05
        stopper.restore()
        assert optimizer.param_groups[0]["lr"] == 0.1 and schedule.last_epoch == 0
        assert optimizer.param_groups[0]["params"][0] is model.weight
        assert len(optimizer.state) == len(twin.state)
        assert same(model, values(twin_model))
    torch.manual_seed(1)
    train_some(model, optimizer)
    torch.manual_seed(1)
    train_some(twin_model, twin)
    assert same(model, values(twin_model))


def test_a_failing_restore_changes_nothing_and_names_the_object():
    model, tail = nn.Linear(3, 2), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    stopper = EarlyStopping(model, optimizer, tail)
    train_some(model, optimizer)
    stopper.step(1)
    best = values(model)
    train_some(model, optimizer)
    tail[1] = nn.Linear(2, 5)  # the first layer would load, the second does not
    disturb(tail)
    now = values(model), values(tail), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(
        RuntimeError,
        match=r"restore: tracked\[2\], a Sequential, (.|\n)*size mismatch(.|\n)*nothing was restored",
    ):
        stopper.restore()
    assert same(model, now[0]) and same(tail, now[1])
    assert repr(optimizer.state_dict()) == repr(now[2])
    train_some(model, optimizer)  # an optimiser still holding the snapshot's momentum would write into it
    tail[1] = nn.Linear(2, 2)
    stopper.restore()
    assert same(model, best)


def test_an_interrupted_snapshot_is_not_restored():
    class Fails:
        def __deepcopy__(self, memo):
            raise MemoryError

    bag = Bag(a=torch.ones(1), b=1)
    stopper = EarlyStopping(bag)
    stopper.step(2)
    bag.state = dict(a=torch.zeros(1), b=Fails())
    with pytest.raises(MemoryError):
        stopper.step(1)
    assert stopper.best == 2 and stopper.epoch == 1
    with pytest.raises(RuntimeError, match="expected a snapshot"):
        stopper.restore()


def test_inside_inference_mode():
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train_some(model, optimizer)
    stopper = EarlyStopping(model, optimizer)
    with torch.inference_mode():
        stopper.step(torch.tensor(2.0))
    train_some(model, optimizer)
    stopper.step(1.0)  # rewrites what was allocated in there
    best = values(model)
    with torch.inference_mode():
        stopper.restore()
    train_some(model, optimizer)
    stopper.restore()
    assert same(model, best)
    assert torch.is_grad_enabled()


def test_deepcopied_and_pickled():
    model = nn.Linear(2, 2)
    stopper = EarlyStopping(model, patience=2)
    run(stopper, [3, 1, 2])
    for other in (copy.deepcopy(stopper), pickle.loads(pickle.dumps(stopper))):
        disturb(other.tracked[0])
        assert other.step(2)
        other.restore()
        assert other.tracked[0] is not model and same(other.tracked[0], values(model))
    assert stopper.epoch == 3


# ---------------------------------------------------------------------------------------------- resume

options = st.fixed_dictionaries(
    dict(
        mode=st.sampled_from(["min", "max"]),
        patience=st.integers(0, 5),
        min_delta=st.sampled_from([0.0, 0.5, 1.0]),
        relative=st.booleans(),
        warmup=st.integers(0, 4),
        nan=st.sampled_from(["skip", "stop"]),
    )
)


@settings(deadline=None)
@given(score_lists, options, st.integers(0, 30))
def test_resume_changes_nothing(scores, options, cut):
    def play(save_at):
        bag = Bag(w=torch.zeros(2))
        stopper, log = EarlyStopping(bag, **options), []
        for i, score in enumerate(scores):
            if i == save_at:
                state = through_file(stopper.state_dict())
                bag = Bag(w=torch.full((2,), -1.0))
                stopper = EarlyStopping(bag, **options)
                stopper.load_state_dict(state)
            bag.state["w"].fill_(i)
            log.append(
                (stopper.step(score), stopper.best, stopper.best_epoch, stopper.bad_epochs, stopper.reason)
            )
        if stopper.best is not None:
            stopper.restore()
            assert bag.state["w"].tolist() == [stopper.best_epoch] * 2
        return log

    assert play(min(cut, len(scores))) == play(None)


def test_state_round_trip_keeps_snapshot_and_ties():
    model = Tied()
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.tensor([1, 2])).sum().backward()
    optimizer.step()
    stopper = EarlyStopping(model, optimizer)
    run(stopper, [3, 2, 4])
    best = values(model)
    state = through_file(stopper.state_dict())
    assert state["snapshot"][0]["embed.weight"].data_ptr() == state["snapshot"][0]["out.weight"].data_ptr()

    fresh = Tied()
    resumed = EarlyStopping(fresh, torch.optim.Adam(fresh.parameters()))
    resumed.load_state_dict(state)
    assert (resumed.epoch, resumed.best, resumed.best_epoch, resumed.bad_epochs) == (3, 2.0, 1, 1)
    for t in state["snapshot"][0].values():
        t.zero_()  # what was loaded is a copy
    loaded = snapshot(resumed)[0]
    assert loaded["embed.weight"] is loaded["out.weight"]
    resumed.restore()
    assert same(fresh, best) and fresh.out.weight is fresh.embed.weight


def test_the_options_of_the_constructor_win_over_the_saved_run():
    old = EarlyStopping(patience=2, min_delta=0.0)
    run(old, [1, 2, 2])
    new = EarlyStopping(patience=4, min_delta=0.5)
    new.load_state_dict(old.state_dict())
    assert (new.patience, new.min_delta) == (4, 0.5)
    assert [new.step(s) for s in [0.75, 2]] == [False, True]
    shorter = EarlyStopping(patience=1)
    shorter.load_state_dict(old.state_dict())
    assert shorter.step(5)


def test_bad_states_are_refused_and_change_nothing():
    model = nn.Linear(1, 1)
    good = EarlyStopping(model)
    good.step(1)
    stopper = EarlyStopping(model)
    stopper.step(7)
    for state, words in [
        ({}, "expected the keys"),
        (None, "got 'a NoneType'"),
        (good.state_dict() | {"patience": 3}, "expected the keys"),
        (good.state_dict() | {"mode": "max"}, "expected mode 'min', got 'max'"),
        (good.state_dict() | {"snapshot": []}, "tracked objects: 1, got 0"),
    ]:
        with pytest.raises(ValueError, match=f"EarlyStopping.load_state_dict: .*{words}"):
            stopper.load_state_dict(state)
        assert stopper.best == 7 and stopper.epoch == 1


# ---------------------------------------------------------------------------------------------- several ranks


def _rank(rank, file, out):
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=60)  # fail, not hang, where the ranks part
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2, timeout=limit)
    log = {}
    for name, options, ranks in RANK_CASES:
        bag = Bag(w=torch.zeros(2))
        stopper, stops = EarlyStopping(bag, **options), []
        for i, score in enumerate(ranks[rank]):
            bag.state["w"].fill_(10 * i + rank)
            try:
                stopped = stopper.step(torch.tensor(score, dtype=torch.float64) if rank else score)
            except ValueError:
                stopped = "raised"
            stops.append(stopped)
        stopper.restore()
        log[name] = stops, stopper.best, stopper.best_epoch, stopper.reason, bag.state["w"].tolist()

    alone = dist.new_group([0])  # a group of its own: ranks outside are told so, the one inside decides alone
    stopper = EarlyStopping(group=alone)
    try:
        log["alone"] = stopper.step(1.0 + rank), stopper.best
    except ValueError as error:
        log["alone"] = str(error)

    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    model = Tied()
    full = torch.arange(28.0).view(7, 4)
    model.embed.weight = model.out.weight = nn.Parameter(distribute_tensor(full, mesh, [Shard(0)]))
    stopper = EarlyStopping(model)
    stopper.step(2)
    first = stopper.state_dict()["snapshot"][0]["out.weight"]
    stopper.step(1)
    state = stopper.state_dict()["snapshot"][0]
    with torch.no_grad():
        model.out.weight.zero_()
    stopper.restore()
    log["dtensor"] = (
        state["out.weight"] is state["embed.weight"] is first,
        model.out.weight is model.embed.weight,
        torch.equal(model.out.weight.full_tensor(), full),
    )
    torch.save(log, f"{out}.{rank}")
    dist.barrier()  # or torch aborts a rank whose partner is gone
    dist.destroy_process_group()


RANK_CASES = [  # name, options, scores of rank 0 and of rank 1
    ("mean", dict(patience=2), ([1, 3, 3, 3, 3], [9, 3, 1, 9, 9])),
    ("nan on one", dict(patience=2), ([5, 4, 3, 6], [5, NAN, NAN, 6])),
    ("nan stops", dict(nan="stop"), ([5, 4, 3], [5, 4, NAN])),
    ("nan raises", dict(nan="raise"), ([5, NAN, 4], [5, 4, 4])),
    ("target", dict(target=2), ([4, 1, 1], [4, 9, 3])),
    ("last bit", dict(patience=1), ([0.1 + 0.2, 0.3], [0.1 + 0.2, 0.3])),
    ("overflow", dict(), ([1.7e308, 1.6e308], [1.7e308, 1.6e308])),
]


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
def test_every_rank_takes_the_same_decision(tmp_path):
    mp.spawn(_rank, (tmp_path / "rendezvous", tmp_path / "log"), nprocs=2)
    logs = [torch.load(tmp_path / f"log.{rank}") for rank in range(2)]
    expected = {
        "mean": ([False, False, False, False, True], 2.0, 2),
        "nan on one": ([False, False, True, True], 5.0, 0),
        "nan stops": ([False, False, True], 4.0, 1),
        "nan raises": ([False, "raised", False], 4.0, 1),
        "target": ([False, False, True], 2.0, 2),
        "last bit": ([False, False], 0.3, 1),
        "overflow": ([False, False], 1.6e308, 1),
    }
    for name, want in expected.items():
        for rank, log in enumerate(logs):
            assert log[name][:3] == want, (name, rank)
        assert logs[0][name][3] == logs[1][name][3]
    # Each rank keeps its own state of the common best epoch.
    assert [log["mean"][4] for log in logs] == [[20.0, 20.0], [21.0, 21.0]]
    assert logs[0]["alone"] == (False, 1.0) and "expected a rank of group" in logs[1]["alone"]
    assert [log["dtensor"] for log in logs] == [(True, True, True)] * 2


def uneven_scores(rank):
    """An overfitting curve per rank: each has its lowest point elsewhere, so that alone each would stop at
    another epoch.
    """
    generator = random.Random(rank)
    return [abs(i - 4 - 3 * rank) + generator.random() for i in range(40)]


FOUR = {  # options, rank -> scores
    "uneven": (dict(patience=3), uneven_scores),
    "nan in the middle": (
        dict(patience=3),
        lambda rank: [NAN if rank == 2 and i in (1, 5, 9) else s for i, s in enumerate(uneven_scores(rank))],
    ),
    "nan from the start": (dict(patience=3), lambda rank: [NAN] * 40 if rank == 3 else uneven_scores(rank)),
    "nan stops": (
        dict(patience=3, nan="stop"),
        lambda rank: [NAN if rank == 1 and i >= 4 else s for i, s in enumerate(uneven_scores(rank))],
    ),
}


def _one_of_four(rank, file, out):
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=4, timeout=limit)
    log = {}
    for name, (options, scores) in FOUR.items():
        model = nn.Linear(1, 1)
        stopper = EarlyStopping(model, **options)
        for epoch, score in enumerate(scores(rank)):
            with torch.no_grad():
                model.weight.fill_(epoch)
            if stopper.step(score):
                break
        if stopper.best is not None:
            stopper.restore()
        log[name] = epoch, stopper.best_epoch, stopper.best, model.weight.item()
    torch.save(log, f"{out}.{rank}")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
def test_four_ranks_with_losses_of_their_own_stop_in_the_same_epoch(tmp_path):
    mp.spawn(_one_of_four, (tmp_path / "rendezvous", tmp_path / "log"), nprocs=4)
    logs = [torch.load(tmp_path / f"log.{rank}") for rank in range(4)]
    for name, (options, scores) in FOUR.items():
        alone = {run(EarlyStopping(**options), scores(rank)) for rank in range(4)}
        assert len(alone) > 1, name  # else the agreement would be no news
        one = EarlyStopping(**options)  # one process that sees the mean
        stop = run(one, [sum(column) / 4 for column in zip(*map(scores, range(4)), strict=True)])
        for log in logs:
            epoch, best_epoch, best, weight = log[name]
            assert (epoch, best_epoch) == (stop, one.best_epoch), name
            assert (
                best == logs[0][name][2] == (None if one.best is None else pytest.approx(one.best, rel=1e-12))
            )
            assert weight == (stop if one.best is None else one.best_epoch)


# ---------------------------------------------------------------------------------------------- retraining


def make_net():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def train_net(model, optimizer, loader):
    for x, y in loader:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def make_data(n, seed):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, generator=g), torch.randint(3, (n,), generator=g)


def by_hand(train, val, epochs, seed, **loader):
    torch.manual_seed(seed)
    model, optimizer = make_net()
    data = ConcatDataset([TensorDataset(*train), TensorDataset(*val)])
    batches = DataLoader(data, **loader)
    for _ in range(epochs):
        train_net(model, optimizer, batches)
    return model


@pytest.mark.parametrize(
    "loader", [{}, dict(shuffle=False), dict(drop_last=True), dict(num_workers=1)], ids=str
)
def test_retrain_is_what_one_does_by_hand(loader):
    train, val = make_data(21, 0), make_data(9, 1)
    model, optimizer = retrain(make_net, train_net, train, val, epochs=3, seed=5, batch_size=8, **loader)
    want = by_hand(train, val, 3, 5, **({"batch_size": 8, "shuffle": True} | loader))
    assert same(model, values(want))
    assert optimizer.param_groups[0]["params"][0] is model[0].weight
    if not loader:  # and each ingredient counts
        for other in [
            by_hand(train, train, 3, 5, batch_size=8, shuffle=True),
            by_hand(train, val, 2, 5, batch_size=8, shuffle=True),
            by_hand(train, val, 3, 6, batch_size=8, shuffle=True),
            by_hand(train, val, 3, 5, batch_size=8, shuffle=False),
        ]:
            assert not same(model, values(other))


def test_retrain_sees_every_sample_once_per_epoch():
    seen = []

    def train_epoch(model, loader):
        seen.append(torch.cat([x for (x,) in loader]).tolist())
        return "dropped"

    train, val = (torch.arange(10),), [torch.arange(10, 14)]
    model = retrain(lambda: nn.Linear(1, 1), train_epoch, train, val, epochs=2, seed=0, batch_size=3)
    assert isinstance(model, nn.Linear)
    assert len(seen) == 2 and seen[0] != seen[1]
    assert all(sorted(epoch) == list(range(14)) for epoch in seen)


def test_retrain_takes_datasets_and_the_stoppers_epochs():
    train, val = make_data(10, 0), make_data(6, 1)
    stopper = EarlyStopping(patience=2)
    run(stopper, [3, 2, 1, 2, 2])
    got = retrain(
        make_net, train_net, TensorDataset(*train), TensorDataset(*val), epochs=stopper, seed=1, batch_size=4
    )
    assert same(got[0], values(by_hand(train, val, 3, 1, batch_size=4, shuffle=True)))
    pairs = [list(zip(*data, strict=True)) for data in (train, val)]  # a list of samples is a dataset as well
    got = retrain(make_net, train_net, *pairs, epochs=3, seed=1, batch_size=4)
    assert same(got[0], values(by_hand(train, val, 3, 1, batch_size=4, shuffle=True)))


@pytest.mark.parametrize("fails", [False, True])
def test_retrain_puts_the_random_state_back(fails):
    def train_epoch(*_):
        torch.rand(3)
        if fails:
            raise KeyError

    torch.manual_seed(3)
    random.seed(3)
    want = torch.rand(2), random.random()
    torch.manual_seed(3)
    random.seed(3)
    data = (torch.ones(2),)
    try:
        retrain(lambda: None, train_epoch, data, data, epochs=1, seed=9, batch_size=1)
    except KeyError:
        assert fails
    assert torch.equal(torch.rand(2), want[0]) and random.random() == want[1]


class Stream(IterableDataset):
    def __iter__(self):
        return iter([1])


@pytest.mark.parametrize(
    "change, error, words",
    [
        (dict(epochs=0), ValueError, "epochs must be at least 1, got 0"),
        (dict(epochs=2.0), TypeError, "epochs must be an int or an EarlyStopping, got a float"),
        (dict(epochs=True), TypeError, "epochs must be an int, got bool"),
        (dict(epochs=EarlyStopping()), ValueError, "with a best epoch"),
        (dict(seed=None), TypeError, "seed must be an int, got NoneType"),
        (dict(seed=1.5), TypeError, "seed must be an int, got float"),
        (dict(make=nn.Module), None, None),
        (dict(make=3), TypeError, "make must be a function, got a int"),
        (dict(train_epoch=None), TypeError, "train_epoch must be a function"),
        (
            dict(train_data=(torch.ones(3), torch.ones(4))),
            ValueError,
            r"train_data must be .*\[\(3,\), \(4,\)\]",
        ),
        (dict(train_data=(torch.tensor(3),)), ValueError, "train_data must be"),
        (dict(val_data=torch.ones(3)), TypeError, r"val_data must be .*shape \[3\]"),
        (dict(val_data=Stream()), TypeError, "val_data must be .*got a Stream"),
        (dict(val_data=DataLoader([1, 2])), TypeError, "val_data must be .*DataLoader"),
        (dict(val_data={"x": torch.ones(2)}), TypeError, "val_data must be .*got a dict"),
        (dict(val_data=None), TypeError, "val_data must be .*NoneType"),
        (dict(batch_size=0), ValueError, "batch_size"),
    ],
    ids=lambda value: re.sub(
        " at 0x[0-9a-f]+", "", str(value)
    ),  # an address differs between processes that share the tests
)
def test_retrain_checks_before_it_makes_anything(change, error, words):
    made = []
    arguments = dict(
        make=lambda: made.append(1),
        train_epoch=lambda *_: None,
        train_data=(torch.ones(3),),
        val_data=(torch.ones(2),),
        epochs=1,
        seed=0,
        batch_size=2,
    )
    if error is None:
        retrain(**(arguments | change))
        return
    with pytest.raises(error, match=words):
        retrain(**(arguments | change))
    assert not made


def test_the_books_three_algorithms_on_a_problem_that_overfits():
    """Few noisy samples, many weights: the validation error falls and rises again."""
    g = torch.Generator().manual_seed(0)
    truth = torch.randn(80, 1, generator=g) / 9

    def sample(n):
        x = torch.randn(n, 80, generator=g)
        return x, x @ truth + torch.randn(n, 1, generator=g)

    def make():
        model = nn.Linear(80, 1)
        return model, torch.optim.SGD(model.parameters(), lr=0.01)

    def train_epoch(model, optimizer, loader):
        for x, y in loader:
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()

    def error(model, data):
        with torch.no_grad():
            return nn.functional.mse_loss(model(data[0]), data[1]).item()

    train, val, test = sample(50), sample(25), sample(500)
    torch.manual_seed(0)
    model, optimizer = make()
    loader = DataLoader(TensorDataset(*train), 25, shuffle=True)
    stopper, curve = EarlyStopping(model, patience=10), []  # 7.1
    for _ in range(200):
        train_epoch(model, optimizer, loader)
        curve.append(error(model, val))
        if stopper.step(curve[-1]):
            break
    assert len(curve) == stopper.best_epoch + 11 < 200 and stopper.best_epoch > 5
    assert error(model, val) > stopper.best
    stopper.restore()
    assert error(model, val) == stopper.best == min(curve)

    again, _ = retrain(make, train_epoch, train, val, epochs=stopper, seed=0, batch_size=25)  # 7.2
    assert error(again, test) < error(model, test)

    goal, before = error(model, train), error(model, val)  # 7.3
    onward = EarlyStopping(model, target=goal, patience=100)
    everything = DataLoader(ConcatDataset([TensorDataset(*train), TensorDataset(*val)]), 25, shuffle=True)
    while not onward.step(error(model, val)):
        train_epoch(model, optimizer, everything)
    assert goal < before and "reached target" in onward.reason and error(model, val) <= goal
