"""What stands twice, in Python and in the C++ fast path, is held together here: one test per pair of twins.

Each test goes over a table that reaches the edges of the rule, so that it fails where one twin changes alone.
That whole tensors come out with the same bits on both paths is tested in test_autograd.py and test_sgd.py.
"""

import math
import sys

import numpy as np
import pytest
import torch

import fastreg as fr
from fastreg import _registry, _seeds

FAST = _registry.fast
pytestmark = pytest.mark.skipif(FAST is None, reason=f"no C++ autograd: {_registry.why_not_fast}")


class Spy:
    """The functions of the fast path; `taken` tells of each call whether it was not left to Python."""

    def __init__(self):
        self.taken = []

    def __getattr__(self, name):
        def call(*args):
            result = getattr(FAST, name)(*args)
            self.taken.append(result is not None)
            return result

        return call


@pytest.fixture
def taken_alike(monkeypatch):
    """taken_alike(function): whether C++ takes each call of it, once the outcome was that of Python alone.

    The outcome is what it gives, the error that it raises and where it leaves the generator.
    """

    modules = [m for name, m in sys.modules.items() if name.startswith("fastreg.") and "fast" in vars(m)]

    def compare(function):
        outcomes = []
        spy = Spy()
        for path in (None, spy):
            for module in modules:
                monkeypatch.setattr(module, "fast", path)
            torch.manual_seed(7)
            try:
                value = function()
            except Exception as error:
                value = type(error), str(error)
            outcomes.append((bits_of(value), torch.get_rng_state().numpy().tobytes()))
        assert outcomes[0] == outcomes[1]
        return spy.taken

    return compare


def bits_of(value):
    """`value` as something that compares equal only to the same bits."""
    if isinstance(value, torch.Tensor):
        raw = value.detach().contiguous().reshape(-1).view(torch.uint8)
        return value.dtype, value.shape, value.stride(), value.requires_grad, raw.tolist()
    if isinstance(value, (list, tuple)):
        return [bits_of(item) for item in value]
    return value


def recorded(function, op):
    """The arguments, by name, with which Python calls an operator of fastreg: a mode is left to Python."""

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.name() == f"fastreg::{op}":
                declared = func._schema.arguments
                values = {a.name: a.default_value for a in declared if a.has_default_value()}
                values |= zip([a.name for a in declared], args, strict=False)
                calls.append(values | (kwargs or {}))
            return func(*args, **(kwargs or {}))

    calls = []
    with Record():
        function()
    (call,) = calls
    return call


# ---- the seed: mix_seed and draw_seed of common/autograd.h and of _seeds.py


def test_a_generator_and_its_count_make_the_same_seed():
    edges = [0, 1, 2, 4, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 2, 2**64 - 1, 0x9E3779B97F4A7C15]
    for seed in edges:
        for offset in edges:
            assert FAST.mix_seed(seed, offset) == _seeds.mix_seed(seed, offset), (seed, offset)


def test_the_same_seed_is_drawn_on_a_cpu():
    x = torch.ones(4096)
    for start in (0, 1, 2**63, 2**64 - 1):
        torch.manual_seed(start)
        y = FAST.dropout(x, 0.5, True, False)
        after = torch.get_rng_state()
        torch.manual_seed(start)
        seed = _seeds.draw_seed(x.device)
        assert torch.equal(torch.get_rng_state(), after)
        assert torch.equal(fr.dropout_with_mask(x, 0.5, seed=seed)[0], y)


# ---- the scale of dropout: inverted_scale of dropout_autograd.h and its twin in _dropout.py

PROBABILITIES = [
    *(0.0, 2**-60, 2**-34, 2**-33, 2**-32, 1e-7, 0.1, 0.25, 0.3, 1 / 3, 0.5, 0.7, 0.9),
    *(1 - 2**-20, 1 - 2**-31, 1 - 2**-32, 1 - 2**-33, 1 - 2**-34, math.nextafter(1, 0), 1.0),
]


@pytest.mark.parametrize("p", PROBABILITIES)
def test_dropout_has_the_same_scale(p):
    x = torch.ones(8)
    calls = [recorded(lambda: fr.dropout_add(x, x, p, x), "dropout_add")]
    if p:
        calls.append(recorded(lambda: fr.dropout(x, p), "dropout"))
    for call in calls:
        assert call["scale"] == FAST.dropout_scale(p)


# ---- the usual case: what C++ takes, and what it must leave to Python, which converts or refuses

USUAL = [0, 0.0, -0.0, 1, 1.0, 0.5, 2**-40, 1 - 2**-33]
UNUSUAL = [
    *(True, False, None, "0.5", math.nan, math.inf, -5e-324, math.nextafter(1, 2), 2, -1, 10**400),
    *(np.float64(0.5), np.float32(0.5), np.int64(1), torch.tensor(0.5)),
]
FLAGS = [True, False, 1, 0, None, "yes", np.True_]


def named(value):
    return f"{type(value).__name__} {str(value)[:20]}"


@pytest.mark.parametrize("p", USUAL + UNUSUAL, ids=named)
def test_dropout_has_the_same_rules(taken_alike, p):
    usual = any(p is value for value in USUAL)
    for training, inplace in [(flag, False) for flag in FLAGS] + [(True, flag) for flag in FLAGS]:
        taken = taken_alike(lambda t=training, i=inplace: fr.dropout(torch.arange(1.0, 20), p, t, i))
        # What C++ leaves to Python may come back to it, converted.
        assert taken[0] == (usual and type(training) is bool and type(inplace) is bool), (training, inplace)


@pytest.mark.parametrize("p", USUAL + UNUSUAL, ids=named)
def test_dropout_add_has_the_same_rules(taken_alike, p):
    x = torch.arange(1.0, 21).reshape(4, 5)
    usual = any(p is value for value in USUAL)
    # (bias, whether it is one that C++ takes)
    biases = [(None, True), (x[0], True), (x[:1], False), (x[0, :4], False), (x[0].double(), False)]
    biases += [(torch.ones(10)[::2], False), ([1.0] * 5, False)]
    for training in FLAGS:
        for bias, fits in biases:
            taken = taken_alike(lambda t=training, b=bias: fr.dropout_add(x, x * 2, p, b, t))
            assert taken[0] == (usual and fits and type(training) is bool), (training, bias)


LOSS_OPTIONS = {
    # option: (values that C++ takes, values that it leaves to Python)
    "reduction": (["mean", "sum", "none"], ["median", None, 1]),
    "smoothing": (["uniform", "others"], ["other", None, 0]),
    "all_ignored": (["nan", "zero"], ["none", None, 0]),
    "label_smoothing": ([0, 0.0, 1, 1.0, 0.1], UNUSUAL),
    "z_loss": ([0, 0.0, 0.5, 3, sys.float_info.max], [True, None, "1", math.nan, math.inf, -5e-324, 10**400]),
    "ignore_index": ([-100, 1, 2**63 - 1, -(2**63)], [True, None, 1.0, 2**63, -(2**63) - 1, np.int64(1)]),
    "loss_dtype": ([None, torch.float32, torch.float64], [torch.float16, torch.int64, "float32"]),
    "size_average": ([None], [True, False]),
    "reduce": ([None], [True, False]),
}


@pytest.mark.filterwarnings("ignore:.*size_average and reduce:UserWarning")
@pytest.mark.parametrize("option", LOSS_OPTIONS)
def test_cross_entropy_has_the_same_rules(taken_alike, option):
    x = torch.linspace(-3, 3, 35).reshape(7, 5)
    target = torch.arange(7) % 5
    base = {"label_smoothing": 0.1, "smoothing": "others"}
    takes, leaves = LOSS_OPTIONS[option]
    for values, expected in ((takes, True), (leaves, False)):
        for value in values:
            options = base | {option: value}
            taken = taken_alike(lambda options=options: fr.cross_entropy(x, target, **options))
            assert taken[0] == expected, value


# ---- the reader of an optimiser's parameter groups: optimizer_autograd.h, <op>_autograd.h, OnePass._collect

OPTIONS_OF_BOTH = {
    # option: [(value, whether C++ takes the group, whether the step changes by it)]
    "lr": [
        (0.3, True, True),
        (1, True, True),
        (torch.tensor(0.3), True, True),
        (np.float64(0.3), True, True),
    ],
    "weight_decay": [(0, True, True), (0.5, True, True), (np.float32(0.5), True, True)],
    "l1": [(0, True, True), (0.5, True, True), (np.float32(0.5), True, True)],
    "maximize": [(True, True, True), (1, False, True)],
    "stochastic_rounding": [(False, True, False), (True, True, False)],  # of float32 it changes nothing
    "rounding_seed": [(0, True, False), (-7, True, False)],
    "ema": [(None, True, False), (0.5, True, False)],  # the average is no part of what is compared
    "ema_warmup": [(False, True, False), (True, True, False), (0.5, True, False)],
    "foreach": [(True, True, False)],
    "differentiable": [(False, True, False)],
    "fused": [(True, True, False)],
}
OPTIONS = {
    fr.optim.SGD: OPTIONS_OF_BOTH
    | {
        "momentum": [(0, True, True), (0.5, True, True), (1, True, True), (np.float64(0.5), True, True)],
        "dampening": [(0.0, True, False), (0.5, False, True), (-0.5, False, True)],
        "nesterov": [(True, True, True), (1, False, True)],
        "l1_mode": [("subgradient", True, False), ("proximal", True, True)],
        "decoupled": [(True, True, True), (1, False, True)],
        "scale_penalty": [(False, True, False), (True, True, False)],  # l1 goes through the momentum here
    },
    fr.optim.AdamW: OPTIONS_OF_BOTH
    | {
        "betas": [
            ((0.9, 0.999), True, False),
            ((0.5, 0.9), True, True),
            ((0, 0.0), True, True),
            ((torch.tensor(0.5), 0.9), True, True),
            ([0.5, 0.9], True, True),
        ],
        "eps": [(1e-8, True, False), (0, True, True), (0.1, True, True), (np.float64(0.1), True, True)],
        "maximize": [(True, True, True), (1, True, True)],  # torch only asks whether they are true
        "amsgrad": [(True, True, True), (1, True, True)],
        "l1_mode": [("proximal", True, False), ("subgradient", True, True)],
        "cautious": [(True, True, True), (1, False, True)],
        "capturable": [(False, True, False)],
    },
}
USUAL_OPTIONS = {fr.optim.SGD: {"momentum": 0.9}, fr.optim.AdamW: {}}


def stepped(cls, **options):
    """Parameters and state after three steps, the last of which finds what the first has left everywhere."""
    params = [torch.nn.Parameter(torch.linspace(-1, 1, n)) for n in (5, 33)]
    optimizer = cls(
        [{"params": params[:1]}, {"params": params[1:], **options}],
        lr=0.1,
        weight_decay=0.01,
        l1=0.02,
        **USUAL_OPTIONS[cls],
    )
    for step in range(3):
        for p in params:
            p.grad = torch.linspace(2, -1, p.numel()) * (1 - step)  # also against the momentum
        optimizer.step()
    kept = ("momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    return [p.detach() for p in params] + [
        state[name] for state in optimizer.state.values() for name in kept if name in state
    ]


@pytest.mark.parametrize(
    ("cls", "option"),
    [(cls, option) for cls, options in OPTIONS.items() for option in options],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_parameter_group_is_read_alike(taken_alike, cls, option):
    usual = bits_of(stepped(cls))
    for value, takes, changes in OPTIONS[cls][option]:
        assert any(taken_alike(lambda value=value: stepped(cls, **{option: value}))) == takes, value
        assert (bits_of(stepped(cls, **{option: value})) != usual) == changes, value


@pytest.mark.parametrize("cls", OPTIONS, ids=lambda cls: cls.__name__)
def test_every_option_of_a_group_is_in_the_table(cls):
    group = cls([torch.nn.Parameter(torch.ones(1))]).param_groups[0]
    assert group.keys() - {"params"} - {"decoupled_weight_decay"} == OPTIONS[cls].keys()
