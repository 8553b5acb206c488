"""The constructors of every class that fastreg stands in for take and refuse what torch's do.

The rows are made of torch's own signatures: each argument of each class, by name and by position, with each
of the values below. Compared are types of errors, what the object has and shows, and what it computes.
"""

import decimal
import fractions
import functools
import inspect
import itertools

import numpy as np
import pytest
import torch
from torch import nn

import fastreg as fr

pytestmark = pytest.mark.filterwarnings("ignore")

T = torch.tensor
VALUES = {
    "0": 0,
    "1": 1,
    "0.0": 0.0,
    "half": 0.5,
    "1.0": 1.0,
    "True": True,
    "False": False,
    "None": None,
    "negative": -0.25,
    "-1": -1,
    "1.5": 1.5,
    "2": 2,
    "NaN": float("nan"),
    "inf": float("inf"),
    "-inf": -float("inf"),
    "huge": 10**30,
    "huge float": 1e300,
    "complex": 0.5 + 0j,
    "np.float16": np.float16(0.5),
    "np.float32": np.float32(0.5),
    "np.float64": np.float64(0.5),
    "np.longdouble": np.longdouble(0.5),
    "np.int64": np.int64(1),
    "np.uint8": np.uint8(1),
    "np.True_": np.True_,
    "np.False_": np.False_,
    "np.complex64": np.complex64(0.5),
    "negative np.float32": np.float32(-0.5),
    "np NaN": np.float64("nan"),
    "0-dim array": np.array(0.5),
    "0-dim array of an integer": np.array(1),
    "1-dim array": np.array([0.5]),
    "array of two": np.array([0.5, 0.5]),
    "array of five": np.ones(5),
    "tensor": T(0.5),
    "float64 tensor": T(0.5, dtype=torch.float64),
    "float16 tensor": T(0.5, dtype=torch.float16),
    "integer tensor": T(1),
    "bool tensor": T(True),
    "complex tensor": T(0.5 + 0j),
    "negative tensor": T(-0.5),
    "NaN tensor": T(float("nan")),
    "meta tensor": T(0.5, device="meta"),
    "learned": T(0.5, requires_grad=True),
    "a parameter": nn.Parameter(T(0.5)),
    "1-D tensor": T([0.5]),
    "tensor of two": T([0.5, 0.5]),
    "tensor of five": torch.ones(5),
    "float64 tensor of five": torch.ones(5, dtype=torch.float64),
    "integer tensor of five": torch.ones(5, dtype=torch.int64),
    "learned tensor of five": torch.ones(5, requires_grad=True),
    "empty tensor": torch.ones(0),
    "matrix": torch.ones(5, 5),
    "decimal": decimal.Decimal("0.5"),
    "fraction": fractions.Fraction(1, 2),
    "digits": "0.5",
    "text": "x",
    "mean": "mean",
    "sum": "sum",
    "none": "none",
    "empty text": "",
    "bytes": b"\x01",
    "list": [0.5],
    "tuple": (0.5,),
    "pair": (0.5, 0.75),
    "list of two": [0.5, 0.75],
    "empty tuple": (),
    "pair of tensors": (T(0.5), T(0.75)),
    "pair of a number and text": (0.5, "x"),
    "pair out of range": (0.5, 1.0),
    "dict": {},
    "set": {0.5},
    "object": object(),
    "a class": float,
    "dtype": torch.float64,
    "device": torch.device("cpu"),
    "cpu": "cpu",
    "ellipsis": ...,
}
SHAPES = {
    "Dropout": (600,),
    "Dropout1d": (40, 30, 2),
    "Dropout2d": (40, 30, 2, 1),
    "Dropout3d": (40, 30, 1, 2, 1),
    "AlphaDropout": (600,),
    "FeatureAlphaDropout": (40, 30, 2),
}
X = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
Y = T([0, 1, 2, 3, 4, 2])


def outcome(call):
    try:
        return call()
    except Exception as error:
        return error


def assert_same(want, got, row, kinds=()):
    """Both are an error, ours of torch's type or of one of `kinds`, or both have equal parts."""
    if isinstance(want, Exception):
        assert isinstance(got, (type(want), *kinds)), f"{row}: {got!r}, torch: {want!r}"
        return
    assert not isinstance(got, Exception), f"{row}: {got!r}, torch: {want!r}"
    for mine, theirs in zip(got, want, strict=True):
        if isinstance(theirs, torch.Tensor):
            assert mine.requires_grad == theirs.requires_grad, row
            torch.testing.assert_close(mine, theirs, equal_nan=True, msg=lambda text: f"{row}: {text}")
        else:
            assert mine == theirs, row


def ways(cls, name, value, base):
    """Arguments of `cls` that give `name` this value: by name, and by position where it has one."""
    parameters = list(inspect.signature(cls).parameters.values())
    yield (), {**base, name: value}
    before = list(itertools.takewhile(lambda parameter: parameter.name != name, parameters))
    if parameters[len(before)].kind is parameters[0].POSITIONAL_OR_KEYWORD:
        args = [base.get(parameter.name, parameter.default) for parameter in before]
        names = {parameter.name for parameter in before}
        yield (*args, value), {key: value for key, value in base.items() if key not in names}


def arguments_of(cls):
    return list(inspect.signature(cls).parameters)


# ---- modules


def used(make, x, *more):
    """What a module is and gives, and what it leaves of its input; for dropout, which values there are."""

    def run():
        module = make()
        given = x.clone()
        torch.manual_seed(0)
        output = module(given, *more)
        shown = repr(module), sorted(module.state_dict())
        if more:
            return output, *shown, torch.equal(given, x)
        values = [round(value, 4) for value in output.unique().tolist()]
        left = output is given, torch.equal(given, x)
        return values, output.dtype, tuple(output.shape), *left, *shown

    return outcome(run)


def doors(theirs, ours, use):
    """{door: what it gives}, of an object of torch's class made by `theirs()` and one of ours."""
    results = {"converted": use(lambda: fr.convert(theirs()))}
    results["class kept"] = use(lambda: fr.convert(theirs(), keep_class=True))
    with fr.patched():
        results["patched"] = use(theirs)
    if ours is not None:
        results["by name"] = use(ours)
    return results


def assert_modules_agree(kind, name, value, base, use, refused=()):
    cls = getattr(nn, kind)
    own = getattr(fr.nn, kind, None)
    for args, kwargs in ways(cls, name, VALUES[value], base):
        theirs = functools.partial(cls, *args, **kwargs)
        want = use(theirs)
        results = doors(theirs, own and functools.partial(own, *args, **kwargs), use)
        for door, got in results.items():
            row = f"{kind}({args}, {kwargs}), {door}"
            if door == "by name" and value in refused:
                assert isinstance(got, (TypeError, ValueError)), f"{row}: {got!r}"
            else:
                # By name the kind of a slip counts; torch's types are those of whatever stumbles first.
                assert_same(want, got, row, (TypeError, ValueError) if door == "by name" else ())


# docs/differences.md: what by name is no probability and no share of the mass.
BOOLS = ("True", "False", "np.True_", "np.False_", "bool tensor")
COMPLEX = ("complex", "np.complex64", "complex tensor")
OUT_OF_RANGE = ("negative", "-1", "NaN", "-inf", "negative np.float32", "np NaN", "negative tensor")
OUT_OF_RANGE = (*OUT_OF_RANGE, "NaN tensor")


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("kind", SHAPES)
def test_dropout(kind, value):
    use = functools.partial(used, x=torch.ones(SHAPES[kind]))
    assert_modules_agree(kind, "p", value, {}, use, (*BOOLS, *COMPLEX))
    assert_modules_agree(kind, "inplace", value, {"p": 0.5}, use)


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("name", arguments_of(nn.CrossEntropyLoss))
def test_cross_entropy(name, value):
    refused = {"label_smoothing": (*BOOLS, *COMPLEX, *OUT_OF_RANGE)}.get(name, ())
    for target in (Y, X.softmax(1)):
        run = lambda make, target=target: used(make, X, target)  # noqa: E731
        assert_modules_agree("CrossEntropyLoss", name, value, {}, run, refused)


@pytest.mark.skipif(not hasattr(nn, "LinearCrossEntropyLoss"), reason="this torch has no such module")
@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize(
    "name", arguments_of(nn.LinearCrossEntropyLoss) if hasattr(nn, "LinearCrossEntropyLoss") else []
)
def test_linear_cross_entropy(name, value):
    def use(make):
        def seeded():
            torch.manual_seed(0)
            return make()

        return used(seeded, X, Y)

    assert_modules_agree("LinearCrossEntropyLoss", name, value, {"in_features": 5, "num_classes": 5}, use)


@pytest.mark.parametrize("kind", [*SHAPES, "CrossEntropyLoss"])
def test_too_many_and_unknown_arguments(kind):
    cls = getattr(nn, kind)
    count = len(arguments_of(cls))
    for theirs in (
        lambda cls: cls(*[None] * (count + 1)),
        lambda cls: cls(probability=0.5),
        lambda cls: cls(**{arguments_of(cls)[0]: None, "P": 0.5}),
        lambda cls: cls(None, **{arguments_of(cls)[0]: None}),
    ):
        want, got = (
            outcome(lambda make=theirs: make(cls)),
            outcome(lambda make=theirs: make(getattr(fr.nn, kind))),
        )
        assert type(want) is TypeError
        assert_same(want, got, kind)


# ---- optimisers


def trained(cls, args, kwargs, params=None):
    """How many groups there are, and the parameter after three steps."""

    def run():
        p = nn.Parameter(T([[2.0, -1.0], [0.5, 3.0]]))
        optimizer = cls([p] if params is None else params(p), *args, **kwargs)
        for n in range(3):
            p.grad = p.detach() * (n + 1) - 1
            optimizer.step()
        return len(optimizer.param_groups), p.detach()

    return outcome(run)


def arguments_of_optimizers():
    for kind in ("SGD", "AdamW"):
        for name in arguments_of(getattr(torch.optim, kind))[1:]:
            for value in VALUES:
                yield pytest.param(kind, name, value, id=f"{kind}-{name}-{value}")


NUMBERS = ("lr", "momentum", "dampening", "weight_decay", "eps")
# docs/differences.md: what stands for no number, though torch may compute with it, or never look at it.
NO_NUMBERS = {
    *COMPLEX,
    "NaN",
    "np NaN",
    "NaN tensor",
    "inf",
    "-inf",
    "array of two",
    "array of five",
    "fraction",
}
# docs/differences.md: what is the number that it stands for, though torch's step may stumble over it, wrap it
# around, or round it.
STAND_FOR_NUMBERS = {
    "lr": {"1-dim array", "np.uint8", "np.float16", "float16 tensor"},
    "momentum": {"0-dim array", "0-dim array of an integer"},
    "dampening": {"bool tensor"},
    "weight_decay": {
        "0-dim array",
        "0-dim array of an integer",
        "bool tensor",
        "np.float16",
        "float16 tensor",
    },
    "eps": {"0-dim array", "0-dim array of an integer"},
}
STAND_FOR_NUMBERS["lr"] |= {"np.True_", "np.False_", "huge"}
for _name in NUMBERS[1:]:
    STAND_FOR_NUMBERS[_name] |= {"True", "huge"}
STAND_FOR_NUMBERS["eps"] |= {"huge float"}


@pytest.mark.parametrize(("kind", "name", "value"), arguments_of_optimizers())
def test_optimizers(kind, name, value):
    theirs, ours = getattr(torch.optim, kind), getattr(fr.optim, kind)
    given = VALUES[value]
    # torch looks at dampening where there is a momentum, ours always.
    bases = {"momentum": [{}], "dampening": [{"momentum": 0.5}]}.get(name, [{}, {"momentum": 0.5}])
    for base in bases if kind == "SGD" else [{}]:
        for args, kwargs in ways(theirs, name, given, base):
            args = args[1:]  # without the parameters
            row = f"{kind}(params, {args}, {kwargs})"
            want, got = trained(theirs, args, kwargs), trained(ours, args, kwargs)
            beyond_float32 = value == "huge float" and name != "eps"
            no_number = value in NO_NUMBERS or beyond_float32 or (name, value) == ("lr", "bool tensor")
            if name in NUMBERS and no_number:
                assert isinstance(got, (TypeError, ValueError)), f"{row}: {got!r}, torch: {want!r}"
            elif name in NUMBERS and value in STAND_FOR_NUMBERS[name]:
                assert_same(trained(ours, (), {**base, name: float(np.ravel(given)[0])}), got, row)
            elif name == "differentiable":
                if outcome(lambda: bool(given)) is False:
                    assert_same(trained(ours, (), base), got, row)
                else:
                    assert isinstance(got, (ValueError, RuntimeError)), f"{row}: {got!r}"
            elif name == "foreach" or (name == "capturable" and isinstance(want, AssertionError)):
                assert_same(trained(ours, (), base), got, row)
            else:
                # Of betas that are no pair torch says what its indexing says.
                assert_same(want, got, row, (TypeError, ValueError) if name == "betas" else ())


PARAMS = {
    "a tensor": lambda p: p,
    "none": lambda p: [],
    "None": lambda p: None,
    "generator": lambda p: (each for each in [p]),
    "tuple": lambda p: (p,),
    "set": lambda p: {p},
    "dict": lambda p: {"params": [p]},
    "dict of names": lambda p: {"w": p},
    "its values": lambda p: {"w": p}.values(),
    "names": lambda p: [("w", p)],
    "some names": lambda p: [("w", p), nn.Parameter(torch.ones(1))],
    "names twice": lambda p: [("w", p), ("w", nn.Parameter(torch.ones(1)))],
    "a group": lambda p: [{"params": [p]}],
    "a group of one tensor": lambda p: [{"params": p}],
    "a group of a set": lambda p: [{"params": {p}}],
    "a group of none": lambda p: [{"params": []}],
    "a group without params": lambda p: [{"lr": 0.1}],
    "a group and a tensor": lambda p: [{"params": [p]}, nn.Parameter(torch.ones(1))],
    "a tensor and a group": lambda p: [p, {"params": [nn.Parameter(torch.ones(1))]}],
    "in two groups": lambda p: [{"params": [p]}, {"params": [p]}],
    "no leaf": lambda p: [p * 1],
    "an array": lambda p: [np.ones(2)],
    "text": lambda p: "weight",
    "a list of text": lambda p: ["weight"],
    "a number": lambda p: 1,
    "a model": lambda p: nn.Linear(1, 1),
    "a list of lists": lambda p: [[p]],
    "integers": lambda p: [p, torch.ones(2, dtype=torch.int64)],
}


@pytest.mark.parametrize("params", PARAMS)
@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_params(kind, params):
    theirs, ours = getattr(torch.optim, kind), getattr(fr.optim, kind)
    assert_same(*(trained(cls, (), {}, PARAMS[params]) for cls in (theirs, ours)), params)


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_too_many_and_unknown_arguments_of_optimizers(kind):
    theirs, ours = getattr(torch.optim, kind), getattr(fr.optim, kind)
    positions = [
        p.default for p in inspect.signature(theirs).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    for args, kwargs in (
        ((*positions[1:], False), {}),
        ((), {"rate": 0.1}),
        ((0.1,), {"lr": 0.1}),
        ((), {"params": []}),
    ):
        want, got = (trained(cls, args, kwargs) for cls in (theirs, ours))
        assert type(want) is TypeError
        assert_same(want, got, f"{kind}(params, {args}, {kwargs})")
    assert_same(*(outcome(cls) for cls in (theirs, ours)), kind)
