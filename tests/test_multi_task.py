"""The weighted sums against their formulas, the learnt variances against where their optimum lies."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastreg as fr

FORMS = {"regression": 0.5, "classification": 1.0}


def term(form, bounded, loss, s):
    """One task's contribution, in plain numbers."""
    if not isinstance(form, str):
        return form * loss
    variance = math.exp(s)
    return FORMS[form] * loss / variance + (
        math.log(1 + variance) if bounded else math.log(math.sqrt(variance))
    )


def with_log_variances(total, values):
    with torch.no_grad():
        for p, value in zip(total.parameters(), values, strict=True):
            p.fill_(value)
    return total


@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "tasks",
    [
        {"a": "regression"},
        {"a": "classification", "b": 0.3, "c": "regression"},
        {"a": 2, "b": 0},
        {"b": "regression"},
    ],
)
def test_the_total_and_its_gradients(tasks, dtype, bounded):
    total = with_log_variances(
        fr.MultiTaskLoss(tasks, bounded=bounded), torch.randn(sum(isinstance(f, str) for f in tasks.values()))
    )
    losses = {name: torch.rand((), dtype=torch.float64).mul(3).to(dtype).requires_grad_() for name in tasks}
    s = {
        name: p.item()
        for name, p in zip(
            (n for n, f in tasks.items() if isinstance(f, str)), total.parameters(), strict=True
        )
    }
    want = sum(term(form, bounded, losses[name].item(), s.get(name)) for name, form in tasks.items())
    value = total(losses)
    assert value.shape == ()
    assert value.dtype == (torch.promote_types(dtype, torch.float32) if s else dtype)
    assert value.item() == pytest.approx(want, rel=1e-6 if s else torch.finfo(dtype).eps)
    value.backward()
    for name, form in tasks.items():
        weight = form if name not in s else FORMS[form] * math.exp(-s[name])
        assert losses[name].grad.item() == pytest.approx(weight, rel=max(torch.finfo(dtype).eps, 1e-6))
        assert total.weights()[name] == pytest.approx(weight, rel=1e-6)
        if name in s:
            h = 1e-5
            high, low = (term(form, bounded, losses[name].item(), s[name] + d) for d in (h, -h))
            gradient = getattr(total, f"log_variance_{name}").grad.item()
            assert gradient == pytest.approx((high - low) / (2 * h), rel=1e-4, abs=1e-6)


def test_a_sequence_is_a_dict_in_order():
    forms, losses = ["regression", 0.5, "classification"], torch.rand(3).unbind()
    by_place, by_name = fr.MultiTaskLoss(forms), fr.MultiTaskLoss(dict(zip("abc", forms, strict=True)))
    for total in (by_place, by_name):
        with_log_variances(total, [0.3, -0.6])
    a, b, c = losses
    assert torch.equal(by_place(losses), by_name({"c": c, "a": a, "b": b})) and torch.equal(
        by_place(losses), by_place(list(losses))
    )
    assert by_place.weights() == list(by_name.weights().values())
    assert list(by_place.state_dict()) == ["log_variance_0", "log_variance_2"]


def test_regression_is_the_likelihood_of_a_gaussian():
    error, s = torch.randn(50), torch.tensor(0.7)
    total = with_log_variances(fr.MultiTaskLoss(["regression"], bounded=False), [0.7])
    want = -torch.distributions.Normal(0.0, torch.exp(s / 2)).log_prob(error).mean() - 0.5 * math.log(
        2 * math.pi
    )
    torch.testing.assert_close(total([error.square().mean()]), want)


@pytest.mark.parametrize("loss", [0.05, 1.0, 4.0])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bounded", [False, True])
def test_the_variance_learns_its_optimum(form, bounded, loss):
    total = fr.MultiTaskLoss({"task": form}, bounded=bounded)
    optimizer = fr.optim.SGD(total.parameters(), lr=0.2, momentum=0.5)
    for _ in range(600):
        optimizer.zero_grad()
        value = total({"task": torch.tensor(loss)})
        value.backward()
        optimizer.step()
    variance = total.log_variance_task.exp().item()
    # d/dv of k L / v + log(v) / 2, and of k L / v + log(1 + v): a quadratic in v
    k = FORMS[form] * loss
    assert variance == pytest.approx((k + math.sqrt(k * k + 4 * k)) / 2 if bounded else 2 * k, rel=1e-3)
    if bounded:
        assert value.item() > 0
    elif loss == 0.05:
        assert value.item() < 0


@pytest.mark.parametrize("s", [-80.0, -20.0, 0.0, 20.0, 80.0])
def test_bounded_stays_above_zero_and_finite(s):
    total = with_log_variances(fr.MultiTaskLoss(["regression", "classification"], bounded=True), [s, s])
    value = total([torch.tensor(0.0), torch.tensor(0.0)])
    value.backward()
    assert 0 < value.item() < math.inf and total.log_variance_0.grad.isfinite().all()


def test_a_shared_trunk_gets_the_weighted_sum_of_gradients():
    trunk, heads = nn.Linear(4, 3), nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 1)])
    x, y, t = torch.randn(8, 4), torch.randint(2, (8,)), torch.randn(8)
    total = with_log_variances(fr.MultiTaskLoss(["classification", "regression"], bounded=False), [0.4, -0.9])

    def losses():
        h = trunk(x).tanh()
        return [fr.cross_entropy(heads[0](h), y), (heads[1](h)[:, 0] - t).square().mean()]

    grads = [torch.autograd.grad(losses()[i], trunk.weight)[0] for i in range(2)]
    (grad,) = torch.autograd.grad(total(losses()), trunk.weight)
    torch.testing.assert_close(grad, math.exp(-0.4) * grads[0] + 0.5 * math.exp(0.9) * grads[1])


def test_penalty_groups_do_not_decay_the_variances():
    model = nn.ModuleDict(
        {"net": nn.Linear(4, 3), "total": fr.MultiTaskLoss({"a": "regression", "b": 1.0}, bounded=False)}
    )
    groups = fr.optim.penalty_groups(model, l1=0.1, l2=0.2)
    (group,) = (g for g in groups if any(p is model["total"].log_variance_a for p in g["params"]))
    assert group["l1"] == 0 and group["weight_decay"] == 0
    with_log_variances(model["total"], [3.0])
    torch.testing.assert_close(
        fr.optim.penalty(groups), fr.optim.penalty(model["net"].weight, l1=0.1, l2=0.2)
    )
    optimizer = fr.optim.SGD(groups, lr=1.0)
    model["total"](
        {"a": torch.tensor(math.exp(3.0)), "b": torch.tensor(1.0)}
    ).backward()  # at the optimum: only a decay would move it
    optimizer.step()
    assert model["total"].log_variance_a.item() == pytest.approx(3.0, abs=1e-6)


def test_copies_states_and_moves():
    tasks = {"digit": "classification", "ink": "regression", "aux": 0.1}
    total = with_log_variances(fr.MultiTaskLoss(tasks, bounded=True), [0.3, -0.4])
    losses = {name: torch.rand(()) for name in tasks}
    fresh = fr.MultiTaskLoss(tasks, bounded=True)
    fresh.load_state_dict(total.state_dict())
    for other in (fresh, copy.deepcopy(total), pickle.loads(pickle.dumps(total))):
        assert torch.equal(other(losses), total(losses))
    assert sorted(total.state_dict()) == ["log_variance_digit", "log_variance_ink"]
    assert total.double()({name: loss.double() for name, loss in losses.items()}).dtype == torch.float64
    with pytest.raises(RuntimeError, match="log_variance_ink"):
        fr.MultiTaskLoss({"digit": "classification"}).load_state_dict(total.state_dict())
    assert (
        repr(fr.MultiTaskLoss([1, "regression"], bounded=True))
        == "MultiTaskLoss([1, 'regression'], bounded=True)"
    )


def test_normalised_weights_sum_to_the_tasks_and_the_variances_learn_as_without():
    tasks = {"a": "regression", "b": 0.3, "c": "classification", "d": "regression"}
    losses = {name: torch.rand((), requires_grad=True) for name in tasks}
    s = [0.3, -2.0, 4.0]
    for bounded in (False, True):
        plain = with_log_variances(fr.MultiTaskLoss(tasks, bounded=bounded), s)
        total = with_log_variances(fr.MultiTaskLoss(tasks, bounded=bounded, normalise=True), s)
        weights, unscaled = total.weights(), plain.weights()
        mean = sum(unscaled[name] for name in "acd") / 3
        assert weights == pytest.approx(
            {n: w if n == "b" else w / mean for n, w in unscaled.items()}, rel=1e-5
        )
        value = total(losses)
        want = sum(weights[name] * losses[name].item() for name in tasks)
        assert value.item() == pytest.approx(want, rel=1e-5)
        got = torch.autograd.grad(value, list(losses.values()))
        assert [g.item() for g in got] == pytest.approx(list(weights.values()), rel=1e-5)
        for a, b in zip(
            torch.autograd.grad(total(losses), list(total.parameters())),
            torch.autograd.grad(plain(losses), list(plain.parameters())),
            strict=True,
        ):
            torch.testing.assert_close(a, b)
    default = fr.MultiTaskLoss(tasks)
    assert default.bounded and default.normalise and repr(default) == f"MultiTaskLoss({tasks})"
    assert not fr.MultiTaskLoss(tasks, bounded=True).normalise
    assert repr(fr.MultiTaskLoss([1], bounded=False, normalise=True)).endswith(
        "bounded=False, normalise=True)"
    )
    for extreme in (-80.0, 80.0):
        total = with_log_variances(fr.MultiTaskLoss(tasks), [extreme, 0.0, -extreme])
        assert sum(total.weights()[n] for n in "acd") == pytest.approx(3) and total(losses).isfinite()


@pytest.mark.parametrize("options", ({}, dict(bounded=True), dict(bounded=False)), ids=str)
def test_a_batch_without_labels_for_a_task_leaves_it_out(options):
    tasks = {"a": "regression", "b": 0.3, "c": "classification"}
    total = with_log_variances(fr.MultiTaskLoss(tasks, **options), [0.3, -2.0])
    optimizer = fr.optim.SGD(total.parameters(), lr=0.1)
    losses = {"a": torch.tensor(1.5, requires_grad=True), "b": torch.tensor(0.5), "c": torch.tensor(2.0)}
    whole, weights = total(losses), total.weights()
    only = [total(losses | {name: None for name in tasks if name != kept}) for kept in tasks]
    torch.testing.assert_close(sum(only), whole)
    value = total(losses | {"c": None})
    value.backward()
    assert losses["a"].grad.item() == pytest.approx(weights["a"])
    assert total.log_variance_c.grad is None and total.log_variance_a.grad is not None
    optimizer.step()
    assert total.log_variance_c.item() == -2.0 and total.log_variance_a.item() != pytest.approx(0.3)
    by_place = fr.MultiTaskLoss(list(tasks.values()), **options)
    assert by_place([None, torch.tensor(2.0), None]).item() == pytest.approx(0.6)
    with pytest.raises(ValueError, match=r"at least one loss, got None for all; skip such a batch"):
        total(dict.fromkeys(tasks))
    with pytest.raises(ValueError, match=r"give None for a task without labels"):
        total({"a": ONE, "b": ONE})


def digits_and_ink(seed):
    """8 x 8 digits with the share of ink as a second task: inputs, classes, shares."""
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed")
    digits = datasets.load_digits()
    x = torch.as_tensor(digits.data / 16, dtype=torch.float32)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    return x[order], torch.as_tensor(digits.target)[order], x[order].mean(1, keepdim=True)


def test_the_docstrings_example_trains():
    """With plain SGD and momentum, at a rate where the literal objective diverges: the classes are found
    about as with fixed weights, and the second task better.
    """
    right, unexplained = {}, {}
    for name, tasks, options in (
        ("fixed", {"digit": 1.0, "ink": 1.0}, {}),
        ("default", {"digit": "classification", "ink": "regression"}, {}),
        ("literal", {"digit": "classification", "ink": "regression"}, dict(bounded=False)),
    ):
        right[name], unexplained[name] = [], []
        for seed in range(2):
            x, y, ink = digits_and_ink(seed)
            torch.manual_seed(seed)
            trunk, digit, share = (
                nn.Sequential(nn.Linear(64, 128), nn.ReLU()),
                nn.Linear(128, 10),
                nn.Linear(128, 1),
            )
            total = fr.MultiTaskLoss(tasks, **options)
            groups = fr.optim.penalty_groups(nn.ModuleList([trunk, digit, share, total]), l2=1e-4)
            optimizer = fr.optim.SGD(groups, lr=0.05, momentum=0.9)
            for _ in range(300):
                some = torch.randint(1400, (100,))
                h = trunk(x[some])
                loss = total(
                    {"digit": fr.cross_entropy(digit(h), y[some]), "ink": F.mse_loss(share(h), ink[some])}
                )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            with torch.no_grad():
                h = trunk(x[1400:])
                right[name].append((digit(h).argmax(1) == y[1400:]).double().mean().item())
                unexplained[name].append((F.mse_loss(share(h), ink[1400:]) / ink[1400:].var()).item())
    assert min(right["default"]) > 0.8 > 0.7 > min(right["literal"]), right
    assert max(unexplained["default"]) < min(unexplained["fixed"]) and max(unexplained["default"]) < 0.1, (
        unexplained
    )


def test_a_nan_is_seen():
    total = fr.MultiTaskLoss({"a": "regression", "b": 1.0})
    for bad in "ab":
        assert math.isnan(
            total({name: torch.tensor(math.nan if name == bad else 1.0) for name in "ab"}).item()
        )


def test_under_compile():
    total = with_log_variances(fr.MultiTaskLoss({"a": "regression", "b": 0.5}), [0.2])
    losses = {"a": torch.tensor(1.5, requires_grad=True), "b": torch.tensor(2.0)}
    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(losses), total(losses))


ONE = torch.tensor(1.0)


@pytest.mark.parametrize(
    "error, words, tasks",
    [
        (TypeError, "tasks must be a dict or a sequence .* got str", "regression"),
        (ValueError, "at least one task", {}),
        (
            ValueError,
            "task 'a' must be a weight, 'regression' or 'classification', got 'gaussian'",
            {"a": "gaussian"},
        ),
        (ValueError, "the weight of task 'a' must be .* got -1", {"a": -1}),
        (ValueError, "the weight of task 0 must be .* got nan", [math.nan]),
        (ValueError, "the weight of task 0 must be .* got inf", [math.inf]),
        (TypeError, "the weight of task 'a' must be a number, got NoneType", {"a": None}),
        (ValueError, "a string without a dot, got 'a.b'", {"a.b": "regression"}),
        (ValueError, "a string without a dot, got 3", {3: "regression"}),
    ],
)
def test_bad_tasks(error, words, tasks):
    with pytest.raises(error, match=f"MultiTaskLoss: .*{words}"):
        fr.MultiTaskLoss(tasks)


def test_bounded_is_a_switch():
    with pytest.raises(TypeError, match="MultiTaskLoss: bounded must be a bool, got str"):
        fr.MultiTaskLoss([1.0], bounded="no")


@pytest.mark.parametrize(
    "error, words, losses",
    [
        (TypeError, "losses must be a dict, as tasks was, got list", [ONE, ONE]),
        (ValueError, r"those of the tasks \['a', 'b'\], got \['a'\]", {"a": ONE}),
        (
            ValueError,
            r"those of the tasks \['a', 'b'\], got \['a', 'b', 'c'\]",
            {"a": ONE, "b": ONE, "c": ONE},
        ),
        (TypeError, "the loss of task 'b' must be a torch.Tensor, got float", {"a": ONE, "b": 1.0}),
        (
            ValueError,
            r"the loss of task 'a' must have shape \(\), got \(2,\); reduce",
            {"a": ONE.expand(2), "b": ONE},
        ),
        (ValueError, "the loss of task 'a' is on meta, its variance on cpu", {"a": ONE.to("meta"), "b": ONE}),
    ],
)
def test_bad_losses(error, words, losses):
    with pytest.raises(error, match=f"MultiTaskLoss: .*{words}"):
        fr.MultiTaskLoss({"a": "regression", "b": 1.0})(losses)


@pytest.mark.parametrize("losses", [{0: ONE, 1: ONE}, ONE.expand(2), iter([ONE, ONE])])
def test_a_sequence_wants_a_sequence(losses):
    with pytest.raises(TypeError, match="MultiTaskLoss: losses must be a list or tuple, as tasks was"):
        fr.MultiTaskLoss([1.0, 1.0])(losses)
    with pytest.raises(
        ValueError, match=r"MultiTaskLoss: losses must be those of the tasks \[0, 1\], got \[0\]"
    ):
        fr.MultiTaskLoss([1.0, 1.0])([ONE])
