"""Early stopping against the book's algorithm written out, retraining against the loop written by hand."""

import copy
import math
import pickle
import warnings
from collections import OrderedDict, namedtuple

import numpy as np
import pytest
import torch
from early_stopping_cases import INF, NAN, Bag, Tied, run, score_lists, snapshot
from helpers import has_state, state_of
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from fastreg.early_stopping import EarlyStopping


@torch.no_grad()
def disturb(module):
    for p in module.parameters():
        p.add_(torch.randn_like(p))


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

    def progress():
        return {name: value for name, value in vars(stopper).items() if name not in ("tracked", "_snapshot")}

    before, best = progress(), snapshot(stopper)[0]
    for bad in (NAN, -INF):
        with pytest.raises(
            ValueError, match=r"step: expected a finite score, got -?(nan|inf) at epoch 2; .*nan="
        ):
            stopper.step(bad)
        assert progress() == before and all(torch.equal(snapshot(stopper)[0][k], best[k]) for k in best)
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


def test_restore_brings_the_best_epoch_back_into_the_same_tensors():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    stopper = EarlyStopping(model)
    tensors, history = list(model.state_dict(keep_vars=True).values()), []
    for score in [4, 2, 3, NAN, 5]:
        disturb(model)
        model(torch.randn(8, 3))  # moves the running statistics
        history.append(state_of(model))
        stopper.step(score)
    stopper.restore()
    assert has_state(model, history[1])
    assert all(a is b for a, b in zip(model.state_dict(keep_vars=True).values(), tensors, strict=True))
    disturb(model)
    stopper.restore()
    assert has_state(model, history[1])


def test_nan_epoch_is_never_restored():
    model = nn.Linear(2, 2)
    stopper = EarlyStopping(model, patience=3)
    stopper.step(NAN)
    with pytest.raises(RuntimeError, match="expected a snapshot, got none in 1 epochs; call step"):
        stopper.restore()
    stopper.step(1.0)
    good = state_of(model)
    with torch.no_grad():
        model.weight.fill_(NAN)
    stopper.step(NAN)
    stopper.restore()
    assert has_state(model, good)


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
    best = state_of(model)
    (state,) = snapshot(stopper)
    assert state["embed.weight"] is state["out.weight"]
    disturb(model)
    stopper.restore()
    assert has_state(model, best)
    assert model.out.weight is model.embed.weight
    (state,) = snapshot(stopper)
    assert state["embed.weight"] is state["out.weight"]


def test_weights_untied_between_two_snapshots():
    model = Tied()
    stopper = EarlyStopping(model)
    stopper.step(2)
    model.out.weight = nn.Parameter(torch.randn(7, 4))
    stopper.step(1)
    best = state_of(model)
    assert not torch.equal(best["out.weight"], best["embed.weight"])
    disturb(model)
    stopper.restore()
    assert has_state(model, best)


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
    best = state_of(a), state_of(b)
    disturb(b)
    stopper.restore()
    assert has_state(a, best[0]) and has_state(b, best[1])


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
        weights, adam = stopper._snapshot
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
        assert has_state(model, state_of(twin_model))
    torch.manual_seed(1)
    train_some(model, optimizer)
    torch.manual_seed(1)
    train_some(twin_model, twin)
    assert has_state(model, state_of(twin_model))


def test_a_failing_restore_changes_nothing_and_names_the_object():
    model, tail = nn.Linear(3, 2), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    stopper = EarlyStopping(model, optimizer, tail)
    train_some(model, optimizer)
    stopper.step(1)
    best = state_of(model)
    train_some(model, optimizer)
    tail[1] = nn.Linear(2, 5)  # the first layer would load, the second does not
    disturb(tail)
    now = state_of(model), state_of(tail), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(
        RuntimeError,
        match=r"restore: tracked\[2\], a Sequential, (.|\n)*size mismatch(.|\n)*nothing was restored",
    ):
        stopper.restore()
    assert has_state(model, now[0]) and has_state(tail, now[1])
    assert repr(optimizer.state_dict()) == repr(now[2])
    train_some(model, optimizer)  # an optimiser still holding the snapshot's momentum would write into it
    tail[1] = nn.Linear(2, 2)
    stopper.restore()
    assert has_state(model, best)


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
    best = state_of(model)
    with torch.inference_mode():
        stopper.restore()
    train_some(model, optimizer)
    stopper.restore()
    assert has_state(model, best)
    assert torch.is_grad_enabled()


def test_deepcopied_and_pickled():
    model = nn.Linear(2, 2)
    stopper = EarlyStopping(model, patience=2)
    run(stopper, [3, 1, 2])
    for other in (copy.deepcopy(stopper), pickle.loads(pickle.dumps(stopper))):
        disturb(other.tracked[0])
        assert other.step(2)
        other.restore()
        assert other.tracked[0] is not model and has_state(other.tracked[0], state_of(model))
    assert stopper.epoch == 3


def test_a_lazy_model_is_told_to_run_first():
    model = torch.nn.Sequential(torch.nn.LazyLinear(3), torch.nn.LazyBatchNorm1d())
    stopper = EarlyStopping(model)
    with pytest.raises(
        ValueError, match=r"^EarlyStopping.step: 0.weight of a lazy layer .* run the model once"
    ):
        stopper.step(1.0)
    model(torch.ones(2, 4))
    assert not stopper.step(1.0) and stopper.best == 1.0
