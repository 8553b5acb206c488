"""What people do with `torch.optim.SGD` and `AdamW` beside the usual loop: `fr.optim.SGD` and `AdamW` end at
the same numbers, in float64.
"""

import copy
import random

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler, swa_utils

import fastreg as fr

OPTIONS = {
    "SGD": dict(lr=0.1),
    "SGD, momentum": dict(lr=0.1, momentum=0.9, weight_decay=0.1),
    "SGD, dampening": dict(lr=0.1, momentum=0.9, dampening=0.3),
    "SGD, Nesterov": dict(lr=0.1, momentum=0.9, nesterov=True),
    "AdamW": dict(lr=0.1),
    "AdamW, amsgrad": dict(lr=0.1, amsgrad=True, weight_decay=0.1),
}
every = pytest.mark.parametrize("name", OPTIONS)


def numbers(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def weights(*shapes):
    return [nn.Parameter(numbers(*shape, seed=i)) for i, shape in enumerate(shapes)]


def filled(model):
    """The model with numbers that do not depend on the generator."""
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(numbers(*p.shape, seed=i))
    return model


def train(optimizer, params, steps=3, first=0):
    for n in range(first, first + steps):
        for i, p in enumerate(params):
            p.grad = numbers(*p.shape, seed=100 * n + i)
        optimizer.step()


def ends(use, name, *arguments):
    """What `use(make, *arguments)` gives with torch's class and with ours, the states among it."""
    results, kind = [], name.partition(",")[0]
    for module in (torch.optim, fr.optim):
        made = []

        def make(params, module=module, made=made, **options):
            made.append(getattr(module, kind)(params, **{**OPTIONS[name], **options}))
            return made[-1]

        params = use(make, *arguments)
        result = [p.detach() for p in params]
        for optimizer in made:
            for p in params:
                state = optimizer.state.get(p, {})
                names = ("momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step")
                result += [state[key].double() for key in names if state.get(key) is not None]
        results.append(result)
    assert len(results[0]) == len(results[1])
    return zip(*results, strict=True)


def assert_same(use, name, *arguments):
    for theirs, ours in ends(use, name, *arguments):
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-14)


def named_parameters(make):
    model = filled(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)).double())
    optimizer = make([{"params": model[0].named_parameters()}, {"params": [*model[1].named_parameters()]}])
    train(optimizer, [*model.parameters()])
    assert [group["param_names"] for group in optimizer.param_groups] == [["weight", "bias"]] * 2
    return [*model.parameters()]


def parameter_list(make):
    params = nn.ParameterList(weights((2, 3), (3,)))
    train(make(params), [*params])
    return [*params]


def lazy_layers(make):
    """Given before the first batch; one layer never runs."""
    model, unused = nn.LazyLinear(2, dtype=torch.float64), nn.LazyLinear(2)
    optimizer = make([*model.named_parameters("used"), *unused.named_parameters("unused")])
    model(numbers(4, 3))
    filled(model)
    train(optimizer, [*model.parameters()])
    return [*model.parameters()]


def no_elements_and_no_dimensions(make):
    params = weights((), (0,), (2, 0, 3), (1, 1))
    train(make(params), params)
    return params


def integers_beside(make):
    params = weights((3,))
    index = nn.Parameter(torch.arange(3), requires_grad=False)
    train(make([index, *params]), params)
    assert torch.equal(index, torch.arange(3))
    return params


def other_strides(make):
    params = [nn.Parameter(w) for w in (numbers(2, 3, 4, 5), numbers(4, 3).t(), numbers(6, 6)[::2, 1::2])]
    params[0].data = params[0].data.to(memory_format=torch.channels_last)
    optimizer = make(params)
    for n in range(3):
        params[0].grad = numbers(2, 3, 4, 5, seed=n)
        params[1].grad = numbers(1, seed=n).expand(3, 4)
        params[2].grad = numbers(3, 3, seed=n).t()
        optimizer.step()
    return params


def functional_call(make):
    model = nn.Linear(3, 2).double()
    params = {name: numbers(*p.shape).requires_grad_() for name, p in model.named_parameters()}
    optimizer = make(params.values())
    for n in range(3):
        optimizer.zero_grad()
        torch.func.functional_call(model, params, (numbers(4, 3, seed=n),)).square().sum().backward()
        optimizer.step()
    return [*params.values()]


def in_the_backward_pass(make):
    params = weights((3,), (3,))
    optimizers = {p: make([p]) for p in params}

    def step(p):
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in params:
        p.register_post_accumulate_grad_hook(step)
    for _ in range(3):
        (params[0] * params[1] + params[0] ** 2).sum().backward()
    return params


def frozen_and_unfrozen(make):
    params = weights((3,), (2,))
    optimizer = make(params)
    train(optimizer, params)
    params[1].requires_grad_(False)
    optimizer.zero_grad()
    train(optimizer, params[:1], first=3)
    params[1].requires_grad_(True)
    train(optimizer, params, first=6)
    return params


def groups_changed_by_hand(make):
    params = weights((3,), (2,), (4,))
    optimizer = make([{"params": params[:1]}, {"params": params[1:2]}])
    train(optimizer, params[:2])
    optimizer.param_groups[0]["params"].append(params[2])
    optimizer.param_groups.pop(1)
    train(optimizer, params, first=3)
    return params


def values_and_states_exchanged(make):
    params = weights((3,), (2,))
    optimizer = make(params)
    train(optimizer, params)
    params[0].data = numbers(3, seed=9)
    optimizer.state.pop(params[1], None)
    train(optimizer, params, first=3)
    return params


def a_closure_that_adds_a_group(make):
    params = weights((3,), (2,))
    optimizer = make(params[:1])

    def closure():
        if len(optimizer.param_groups) == 1:
            optimizer.add_param_group({"params": params[1:], "lr": 0.3})
        optimizer.zero_grad()
        loss = sum(p.square().sum() for p in params)
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    return params


def hooks_that_change_the_rate(make):
    params = weights((3,))
    optimizer = make(params)
    optimizer.register_step_pre_hook(lambda o, *_: o.param_groups[0].update(lr=o.param_groups[0]["lr"] / 2))
    train(optimizer, params)
    return params


def gradients_set_to_zero(make):
    params = weights((3,))
    optimizer = make(params)
    train(optimizer, params)
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()
    return params


USES = [
    named_parameters, parameter_list, lazy_layers, no_elements_and_no_dimensions, integers_beside,
    other_strides, functional_call, in_the_backward_pass, frozen_and_unfrozen, groups_changed_by_hand,
    values_and_states_exchanged, a_closure_that_adds_a_group, hooks_that_change_the_rate,
    gradients_set_to_zero,
]  # fmt: skip


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
@pytest.mark.parametrize("module", [torch.optim, fr.optim], ids=["torch", "fastreg"])
def test_the_groups_are_the_dicts_of_the_caller(module, kind):
    """Given at construction or later, with names or without; what he changes counts."""
    first, second, third = weights((3,), (3,), (2, 2))
    given = [{"params": first, "lr": 0.5}, {"params": iter([second]), "weight_decay": 0.0}]
    optimizer = getattr(module, kind)(given, lr=0.1)
    later = {"params": [third]}
    optimizer.add_param_group(later)
    for ours, group in zip([*given, later], optimizer.param_groups, strict=True):
        assert (
            ours is group
            and type(ours["params"]) is list
            and ours.keys()
            >= optimizer.defaults.keys()
            - {
                "max_norm",
                "error_if_nonfinite",
            }
        )
    later["lr"] = 0.0
    train(optimizer, [first, second, third], steps=1)
    assert torch.equal(third.detach(), weights((3,), (3,), (2, 2))[2].detach())
    assert not torch.equal(second.detach(), weights((3,), (3,))[1].detach())
    named = {"params": [("a", weights((3,))[0])]}
    optimizer = getattr(module, kind)([named], lr=0.1)
    assert optimizer.param_groups[0] is named and named["param_names"] == ["a"]


def test_a_group_without_decay_is_told_that_l1_leaves_it_out():
    w, b = weights((3, 3), (3,))
    groups = [{"params": [w]}, {"params": [b], "weight_decay": 0.0}]
    optimizer = fr.optim.SGD(groups, lr=0.1, l1=0.1)
    assert optimizer.param_groups[1] is groups[1] and [group["l1"] for group in groups] == [0.1, 0.0]


@every
@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_the_same_end(use, name):
    assert_same(use, name)


@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.parametrize("cls", [fr.optim.SGD, fr.optim.AdamW], ids=lambda cls: cls.__name__)
def test_lazy_layers(cls):
    """Their average begins with their first step; l1 of a free group waits for shapes, or for an l1."""
    model, unused = nn.LazyLinear(2), nn.LazyLinear(2)
    optimizer = cls([*model.parameters(), *unused.parameters()], lr=0.1, ema=0.5, max_norm=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.ones(4, 3)).square().sum().backward()
        optimizer.step()
    assert optimizer.state.keys() == {*model.parameters()}
    assert all(state["n_averaged"] == 2 for state in optimizer.state.values())
    average = optimizer.state[model.weight]["ema"].clone()
    with optimizer.averaged():
        assert torch.equal(model.weight, average)
    free = {"params": [*unused.parameters()], "weight_decay": 0.0}
    decayed = {"params": [*model.parameters()], "weight_decay": 0.1}
    with pytest.raises(ValueError, match=f"{cls.__name__}: whether l1 acts .*run the model once on a batch"):
        cls([free, decayed], lr=0.1, l1=0.5)
    assert cls([free], lr=0.1, l1=0.5).param_groups[0]["l1"] == 0.5  # alone it is not free
    groups = cls([{**free, "l1": 0.25}, decayed], lr=0.1, l1=0.5).param_groups
    assert [group["l1"] for group in groups] == [0.25, 0.5]


SCHEDULES = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 4]),
    "ConstantLR": lr_scheduler.ConstantLR,
    "LinearLR": lr_scheduler.LinearLR,
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 5),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, [lambda n: 1 / (n + 1), lambda n: 0.9**n]),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda n: 0.9),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, [0.3, 0.2], total_steps=10),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=2, cycle_momentum=False),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "SWALR": lambda o: swa_utils.SWALR(o, swa_lr=0.05, anneal_epochs=3),
}


@pytest.mark.parametrize("name", ["SGD, momentum", "AdamW"])
@pytest.mark.parametrize("kind", ["number", "tensor"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules(schedule, kind, name):
    """OneCycleLR moves the momentum, or the first of the betas, too."""

    def use(make):
        rate = (lambda value: torch.tensor(value, dtype=torch.float64)) if kind == "tensor" else float
        params = weights((3,), (2,))
        optimizer = make([{"params": params[:1]}, {"params": params[1:], "lr": rate(0.05)}], lr=rate(0.1))
        scheduler = SCHEDULES[schedule](optimizer)
        for n in range(7):
            train(optimizer, params, 1, n)
            scheduler.step(*([1.0] if schedule == "ReduceLROnPlateau" else []))
        rates = [torch.as_tensor(group["lr"], dtype=torch.float64) for group in optimizer.param_groups]
        return [*params, *rates]

    assert_same(use, name)


def drawn_options(choose, kind):
    options = dict(lr=choose((0.1, 0.01, 0.0, 1)), weight_decay=choose((0, 0.1)))
    options["maximize"] = choose((False, True))
    if kind == "AdamW":
        betas, eps = choose(((0.9, 0.999), (0.5, 0.5), (0.0, 0.9))), choose((1e-8, 1e-3))
        return {**options, "betas": betas, "eps": eps, "amsgrad": choose((False, True))}
    momentum = choose((0, 0.9, 0.5))
    nesterov = momentum > 0 and choose((False, True))
    dampening = 0 if nesterov else choose((0, 0.3))
    return {**options, "momentum": momentum, "nesterov": nesterov, "dampening": dampening}


def drawn(make, seed):
    """Steps between which whatever may happen to an optimiser does, with gradients that are there or not."""
    draw, kind = random.Random(seed), type(make([nn.Parameter(torch.ones(1))])).__name__
    choose, shapes = draw.choice, ((), (3,), (2, 3), (0,), (4, 3, 2, 2))

    def new():
        return nn.Parameter(numbers(*choose(shapes), seed=draw.randrange(10**6)))

    params, base = [new() for _ in range(4)], drawn_options(choose, kind)
    optimizer = make([{"params": params[:2]}, {"params": params[2:], **drawn_options(choose, kind)}], **base)
    for _ in range(25):
        what = draw.randrange(16)
        if what == 0:
            params.append(new())
            optimizer.add_param_group({"params": params[-1:], **drawn_options(choose, kind)})
        elif what == 1:
            changed = drawn_options(choose, kind)
            choose(optimizer.param_groups).update({key: changed[key] for key in ("lr", "weight_decay")})
        elif what == 2:
            saved = copy.deepcopy(optimizer.state_dict())
            params = [nn.Parameter(p.detach().clone(), p.requires_grad) for p in params]
            left = iter(params)
            groups = [{"params": [next(left) for _ in group["params"]]} for group in optimizer.param_groups]
            optimizer = make(groups, **base)
            optimizer.load_state_dict(saved)
        elif what == 3:
            params, optimizer = copy.deepcopy((params, optimizer))
        elif what == 4:
            choose(params).requires_grad_(choose((False, True)))
        elif what == 5:
            optimizer.state.pop(choose(params), None)
        for p in params:
            grad = numbers(*p.shape, seed=draw.randrange(10**6))
            if p.dim() > 1 and choose((False, True)):
                grad = grad.mT.contiguous().mT
            p.grad = grad if p.requires_grad and draw.random() < 0.8 else None
        optimizer.step()
    return params


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_trainings_drawn_at_random(name):
    for seed in range(20):
        for theirs, ours in ends(drawn, name, seed):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11, msg=f"{name}, seed {seed}")
