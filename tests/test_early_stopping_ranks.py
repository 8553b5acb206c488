"""Early stopping resumed from a state dict, and on several ranks."""

import io
import os
import random
import signal
import time
import warnings

import pytest
import torch
import torch.distributed as dist
from early_stopping_cases import NAN, OPTION_SETS, Bag, Tied, run, score_lists, snapshot
from helpers import has_state, on_ranks, state_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fastreg import _ranks
from fastreg.early_stopping import EarlyStopping


def through_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@settings(deadline=None)
@given(score_lists, OPTION_SETS, st.integers(0, 30))
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
    best = state_of(model)
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
    assert has_state(fresh, best) and fresh.out.weight is fresh.embed.weight


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


def _rank(rank, out):
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
    first = stopper._snapshot[0]["out.weight"]
    stopper.step(1)
    state = stopper._snapshot[0]
    with torch.no_grad():
        model.out.weight.zero_()
    stopper.restore()
    log["dtensor"] = (
        state["out.weight"] is state["embed.weight"] is first,
        model.out.weight is model.embed.weight,
        torch.equal(model.out.weight.full_tensor(), full),
    )
    log["apart"] = apart(rank, mesh)
    log["one fails"] = one_fails(rank)
    log["one is late"] = one_is_late(rank)
    torch.save(log, f"{out}.{rank}")


class Fragile:
    """A state that fails, when told to, on being given or on being loaded."""

    def __init__(self):
        self.state, self.gives, self.takes = torch.zeros(2), True, True

    def state_dict(self):
        if not self.gives:
            raise MemoryError("no room")
        return {"state": self.state.clone()}

    def load_state_dict(self, state):
        if not self.takes:
            self.takes = True  # what was there before
            raise ValueError("another shape")
        self.state = state["state"].clone()


def one_fails(rank):
    """What ranks are told, and what they hold, where the snapshot or its loading fails on rank 1."""
    log = {}
    model = Fragile()
    stopper = EarlyStopping(model)
    stopper.step(2.0)
    model.state += 5
    model.takes = rank == 0
    log["restore"] = said(stopper.restore)
    log["kept"] = model.state.tolist()
    stopper.restore()
    log["restored"] = model.state.tolist()

    model.gives = rank == 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        log["no snapshot"] = stopper.step(1.0), stopper.best, stopper.epoch
    log["warned"] = [str(each.message) for each in caught]
    model.gives = True
    log["next step"] = said(lambda: stopper.step(0.5))
    log["restore without"] = said(stopper.restore)
    log["later"] = stopper.step(0.5), stopper.epoch
    sent = []
    gather, dist.all_gather = dist.all_gather, lambda *out, **more: (sent.append(1), gather(*out, **more))[1]
    stopper.restore()
    dist.all_gather = gather
    log["messages"] = len(sent)
    return log


def one_is_late(rank):
    """What a rank says that has called restore while another has not yet."""
    stopper = EarlyStopping(Bag(w=torch.zeros(2)))
    stopper.step(1.0)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        patch.setattr(_ranks, "_LONG", 0.05)
        if rank:
            time.sleep(1)
        stopper.restore()
        time.sleep(0.2)  # in which whoever does not wait must say nothing
    return [str(each.message) for each in caught]


def said(call):
    try:
        return call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def apart(rank, mesh):
    """What each rank is told where the ranks do not agree, and the best after what they may differ in."""
    log = {}
    ahead = EarlyStopping()
    ahead.epoch = 3 + rank
    log["epoch"] = said(lambda: ahead.step(1.0))
    log["options"] = said(lambda: EarlyStopping(patience=3 + rank).step(1.0))
    log["score"] = said(lambda: EarlyStopping().step("high" if rank else 1.0))
    log["too large"] = said(lambda: EarlyStopping().step(10**400 if rank else 1.0))
    log["long"] = said(lambda: EarlyStopping().step(1.0, count='"é' * 800 if rank else 1))
    log["another call"] = said(
        lambda: (
            EarlyStopping().step(1.0)
            if rank == 0
            else dist.all_gather(
                [torch.empty(2048, dtype=torch.uint8) for _ in range(2)], torch.zeros(2048, dtype=torch.uint8)
            )
        )
    )
    log["no score at all"] = said(lambda: EarlyStopping().step(None))
    log["count on one"] = said(lambda: EarlyStopping().step(1.0, count=3 if rank else None))
    for name, call in (
        ("no score here", lambda s: s.step(None if rank else 4.0)),
        ("count", lambda s: s.step(float(rank), count=1 + 2 * rank)),
        ("count of none", lambda s: s.step(float(rank), count=rank)),
        ("mesh", lambda s: s.step(float(rank))),
    ):
        stopper = EarlyStopping(group=mesh if name == "mesh" else None)
        call(stopper)
        log[name] = stopper.best
    sent = []
    gather, dist.all_gather = dist.all_gather, lambda *out, **more: (sent.append(1), gather(*out, **more))[1]
    EarlyStopping().step(1.0)
    dist.all_gather = gather
    log["messages"] = len(sent)
    return log


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
    on_ranks(2, _rank, tmp_path / "log")
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
    ours, theirs = (log["apart"] for log in logs)
    for name, words in (
        (
            "epoch",
            "ValueError: EarlyStopping.step: rank 1 has epoch 4, rank 0 has 3; call step once per epoch",
        ),
        ("options", "ValueError: EarlyStopping.step: rank 1 has patience 4, rank 0 has 3"),
        ("no score at all", "ValueError: EarlyStopping.step: at least one rank must have a score"),
        ("count on one", "ValueError: EarlyStopping.step: count must be given on all ranks"),
    ):
        assert ours[name].startswith(words) and theirs[name] == ours[name]
    assert "rank 1 of the group cannot go on: EarlyStopping.step: expected one real number" in ours["score"]
    assert theirs["score"].startswith("TypeError: EarlyStopping.step: expected one real number")
    for name, kind in (("too large", "OverflowError"), ("long", "TypeError")):
        assert "rank 1 of the group cannot go on" in ours[name] and theirs[name].startswith(kind), name
    assert "rank 1 of the group is at another call" in ours["another call"]
    for name, best in (("no score here", 4.0), ("count", 0.75), ("count of none", 1.0), ("mesh", 0.5)):
        assert ours[name] == theirs[name] == best
    assert ours["messages"] == 1
    the_failure_of_one(*(log["one fails"] for log in logs))
    (text,) = logs[0]["one is late"]
    assert text.startswith(
        "EarlyStopping.restore: rank 0 of the group has waited 0.05 s for others; call restore"
    )
    assert logs[1]["one is late"] == []


def the_failure_of_one(ours, theirs):
    refused = "EarlyStopping.restore: tracked[0], a Fragile, does not take its snapshot (another shape)"
    assert refused in ours["restore"] and ours["restore"] == theirs["restore"]
    assert ours["restore"].startswith("RuntimeError: EarlyStopping.restore: rank 1 of the group cannot go on")
    assert ours["kept"] == theirs["kept"] == [5.0, 5.0]
    assert ours["restored"] == theirs["restored"] == [0.0, 0.0]
    # A snapshot that fails leaves nobody behind: the rank goes on, and the next message ends it on all.
    assert ours["no snapshot"] == theirs["no snapshot"] == (False, 1.0, 2)
    assert ours["warned"] == [] and "the snapshot of epoch 1 failed (no room)" in theirs["warned"][0]
    assert "rank 1 of the group cannot go on: EarlyStopping: the snapshot of epoch 1" in ours["next step"]
    assert "the snapshot of epoch 1 failed (no room)" in theirs["next step"]
    assert "expected a snapshot, got none" in ours["restore without"] == theirs["restore without"]
    assert ours["later"] == theirs["later"] == (False, 3)
    assert ours["messages"] == 1


def _one_is_killed(rank, out):
    """Rank 1 is killed before its second score."""
    stopper = EarlyStopping(Bag(w=torch.zeros(2)))
    stopper.step(1.0)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    (out / str(rank)).write_text(said(lambda: stopper.step(0.5)))
    os._exit(0)


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
def test_a_killed_rank_is_named(tmp_path):
    on_ranks(3, _one_is_killed, tmp_path, killed=1)
    for rank in (0, 2):
        text = (tmp_path / str(rank)).read_text()
        assert text.startswith("RuntimeError: EarlyStopping.step: not all 3 ranks of the group"), text
        assert "; no word from rank 1 (" in text and "call step once per epoch" in text


def test_a_checkpoint_that_breaks_off_leaves_the_snapshot_whole():
    model = nn.Linear(2, 2)
    stopper = EarlyStopping(model)
    stopper.step(1.0)
    best = state_of(model)
    for tensor in stopper.state_dict()["snapshot"][0].values():  # as torch.distributed.checkpoint.load does
        tensor.zero_()
    with torch.no_grad():
        model.weight.zero_()
    stopper.restore()
    assert has_state(model, best)


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


def _one_of_four(rank, out):
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


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
def test_four_ranks_with_losses_of_their_own_stop_in_the_same_epoch(tmp_path):
    on_ranks(4, _one_of_four, tmp_path / "log")
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
