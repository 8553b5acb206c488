"""fr.retrain: bit for bit what one does by hand."""

import random
import re

import numpy as np
import pytest
import torch
from early_stopping_cases import run
from helpers import has_state, state_of
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, TensorDataset

from fastreg.early_stopping import EarlyStopping, retrain


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
    assert has_state(model, state_of(want))
    assert optimizer.param_groups[0]["params"][0] is model[0].weight
    if not loader:  # and each ingredient counts
        for other in [
            by_hand(train, train, 3, 5, batch_size=8, shuffle=True),
            by_hand(train, val, 2, 5, batch_size=8, shuffle=True),
            by_hand(train, val, 3, 6, batch_size=8, shuffle=True),
            by_hand(train, val, 3, 5, batch_size=8, shuffle=False),
        ]:
            assert not has_state(model, state_of(other))


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
    assert has_state(got[0], state_of(by_hand(train, val, 3, 1, batch_size=4, shuffle=True)))
    pairs = [list(zip(*data, strict=True)) for data in (train, val)]  # a list of samples is a dataset as well
    got = retrain(make_net, train_net, *pairs, epochs=3, seed=1, batch_size=4)
    assert has_state(got[0], state_of(by_hand(train, val, 3, 1, batch_size=4, shuffle=True)))


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


@pytest.mark.parametrize("kind", ("arrays", "array and tensor", "list", "read only"))
def test_arrays_are_columns_and_no_samples(kind):
    train, val = make_data(21, 0), make_data(9, 1)
    want = by_hand(train, val, 2, 5, batch_size=8, shuffle=True)
    given = []
    for x, y in (train, val):
        x, y = x.numpy().copy(), y if kind == "array and tensor" else y.numpy().copy()
        if kind == "read only":
            x.flags.writeable = False
        given.append([x, y] if kind == "list" else (x, y))
    model, _ = retrain(make_net, train_net, *given, epochs=2, seed=5, batch_size=8)
    assert has_state(model, state_of(want))


class Frame:
    """As pandas has it: a length, and columns where samples are expected."""

    def __len__(self):
        return 2

    def __getitem__(self, name):
        return {"x": [1, 2]}[name]

    def keys(self):
        return ["x"]


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
        (dict(make=3), TypeError, "make must be a function, got an int"),
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
        (
            dict(val_data=np.ones(3)),
            TypeError,
            r"val_data must be .*got a ndarray; .* of one tensor x \(x,\)",
        ),
        (dict(val_data=Frame()), TypeError, "val_data must be .*got a Frame"),
        (dict(val_data="abc"), TypeError, "val_data must be .*got a str"),
        (dict(val_data={1, 2}), TypeError, "val_data must be .*got a set"),
        (dict(val_data=([1.0, 2.0], [0, 1])), TypeError, "val_data as a tuple must hold tensors or arrays"),
        (dict(val_data=(torch.ones(2), [0, 1])), TypeError, "val_data as a tuple must .* got a list"),
        (dict(val_data=[[1.0, 2.0], [0, 1]]), TypeError, r"a list of lists; of columns pass \(torch.tensor"),
        (dict(val_data=(np.array(["a", "b"]),)), TypeError, "val_data as a tuple must hold .* of numbers"),
        (dict(train_data=(np.ones(3), np.ones(4))), ValueError, r"with the same N, got \[\(3,\), \(4,\)\]"),
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
