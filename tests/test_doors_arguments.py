"""Patched and converted, torch's functions take what torch's parser takes, and refuse it with its types.

Each row is tried on torch alone, then patched, converted and, where that is promised, by name. Compared are
the values (which elements are kept is drawn, so the set of them), dtypes, shapes and types of errors.
"""

import decimal
import fractions
import functools
import itertools
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from doors import FLAGS
from torch import nn

import fastreg as fr

pytestmark = pytest.mark.filterwarnings("ignore")

MODULES = {
    "dropout": ("Dropout", (1500,)),
    "dropout1d": ("Dropout1d", (50, 30, 2)),
    "dropout2d": ("Dropout2d", (50, 30, 2, 2)),
    "dropout3d": ("Dropout3d", (50, 30, 1, 2, 2)),
    "alpha_dropout": ("AlphaDropout", (1500,)),
    "feature_alpha_dropout": ("FeatureAlphaDropout", (50, 30, 2)),
}
T = torch.tensor
NUMBERS = {
    "True": True,
    "False": False,
    "1": 1,
    "0": 0,
    "half": 0.5,
    "np.float64": np.float64(0.5),
    "np.float32": np.float32(0.5),
    "np.float16": np.float16(0.5),
    "np.int64": np.int64(1),
    "np.bool": np.bool_(True),
    "array": np.array(0.5),
    "array of one": np.array([0.5]),
    "tensor": T(0.5),
    "float64 tensor": T(0.5, dtype=torch.float64),
    "bfloat16 tensor": T(0.5, dtype=torch.bfloat16),
    "int tensor": T(1),
    "bool tensor": T(True),
    "1-D tensor": T([0.5]),
    "two": T([0.5, 0.5]),
    "learned": T(0.5, requires_grad=True),
    "complex tensor": T(0.5 + 0j),
    "decimal": decimal.Decimal("0.5"),
    "fraction": fractions.Fraction(1, 2),
    "text": "0.5",
    "None": None,
    "negative": -0.1,
    "above 1": 1.5,
    "NaN": float("nan"),
    "negative tensor": T(-0.1),
    "NaN tensor": T(float("nan")),
    "complex": 0.5 + 0j,
    "huge": 10**30,
}
# What our functions and modules by name take of it, too.
NAMED = {k: v for k, v in NUMBERS.items() if k in ("1", "0", "half", "negative", "NaN", "huge")} | {
    k: v for k, v in NUMBERS.items() if k.startswith(("np.f", "np.i", "float64", "bfloat16", "tensor"))
}


def outcome(function):
    """What a call gives: the type of its error, or dtype, shape and values of its result."""
    try:
        result = function()
    except Exception as error:
        return error
    if result.is_nested:
        return "nested", result.dtype
    if result.layout != torch.strided or result.device.type == "meta":
        return result.layout, result.dtype, tuple(result.shape)
    values = result.detach().double().unique() if not result.is_complex() else result.abs().unique()
    return (
        result.dtype,
        tuple(result.shape),
        [str(abs(round(v, 4))) for v in values.tolist()[:5]],
    )  # NaN is NaN


def assert_same(torchs, **others):
    """Each of `others` has the outcome of `torchs`; one that is None is `torchs` itself, patched."""
    want = outcome(torchs)
    for door, function in others.items():
        if function is None:
            with fr.patched():
                got = outcome(torchs)
        else:
            got = outcome(function)
        same = isinstance(got, type(want)) if isinstance(want, Exception) else got == want
        assert same, f"{door}: {got!r}, torch: {want!r}"


def converted(kind, *args, training=True, **kwargs):
    return fr.convert(getattr(nn, kind)(*args, **kwargs)).train(training)


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("name", MODULES)
def test_p(name, number):
    (kind, shape), p = MODULES[name], NUMBERS[number]
    x = torch.ones(shape)
    named = {"by name": lambda: getattr(fr, name)(x, p, True)} if number in NAMED else {}
    assert_same(lambda: getattr(F, name)(x, p, True), patched=None, **named)
    named = {"by name": lambda: getattr(fr.nn, kind)(p)(x)} if number in NAMED else {}
    assert_same(lambda: getattr(nn, kind)(p)(x), converted=lambda: converted(kind, p)(x), **named)


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("name", MODULES)
def test_training_and_inplace(name, flag):
    (kind, shape), value = MODULES[name], FLAGS[flag]
    for p, arguments in itertools.product((0.0, 0.5), ((value, False), (True, value))):
        run = lambda f, p=p, a=arguments: f(torch.ones(shape), p, *a)  # noqa: E731
        assert_same(
            lambda run=run: run(getattr(F, name)),
            patched=None,
            named=lambda run=run: run(getattr(fr, name)),
        )
    run = lambda convert: convert(getattr(nn, kind)(0.5, value))(torch.ones(shape))  # noqa: E731
    assert_same(lambda: run(lambda module: module), converted=lambda: run(fr.convert))


@pytest.mark.parametrize("dims", range(7))
@pytest.mark.parametrize("name", MODULES)
def test_dimensions(name, dims):
    kind = MODULES[name][0]
    for p, training, inplace in itertools.product((0.0, 0.5, 1.0), (True, False), (False, True)):
        if p == 0.5 and dims == 0 and training and name in ("dropout", "alpha_dropout"):
            continue  # one element, drawn
        x = torch.ones((30, 40)[:dims] + (1,) * (dims - 2)) if p == 0.5 else torch.ones((2,) * dims)
        run = lambda f, x=x, p=p, t=training, i=inplace: f(x.clone(), p, t, i)  # noqa: E731
        make = functools.partial(converted, kind, p, inplace, training=training)
        module = lambda x=x, make=make: make()(x.clone())  # noqa: E731
        assert_same(
            lambda run=run: run(getattr(F, name)),
            patched=None,
            named=lambda run=run: run(getattr(fr, name)),
            converted=module,
        )


INPUTS = {
    **{
        str(dtype): lambda shape, dtype=dtype: torch.ones(shape).to(dtype)
        for dtype in (torch.int64, torch.bool, torch.uint8, torch.complex64, torch.float8_e4m3fn)
    },
    "leaf": lambda shape: torch.ones(shape, requires_grad=True),
    "expanded": lambda shape: torch.ones(1).expand(shape),
    "negative view": lambda shape: torch.ones(shape, dtype=torch.complex64).conj().imag,
    "nested": lambda shape: torch.nested.nested_tensor([torch.ones(400, 3), torch.ones(30, 3)]),
    "jagged": lambda shape: torch.nested.nested_tensor(
        [torch.ones(400, 3), torch.ones(30, 3)], layout=torch.jagged
    ),
    "sparse": lambda shape: torch.eye(3).to_sparse(),
    "csr": lambda shape: torch.eye(3).to_sparse_csr(),
    "meta": lambda shape: torch.ones(shape, device="meta"),
    "None": lambda shape: None,
    "list": lambda shape: [1.0, 2.0],
    "array": lambda shape: np.ones(3),
}


@pytest.mark.parametrize("kind_of_input", INPUTS)
@pytest.mark.parametrize("name", MODULES)
def test_inputs(name, kind_of_input):
    (kind, shape), make = MODULES[name], INPUTS[kind_of_input]
    for training, inplace in itertools.product((True, False), repeat=2):
        assert_same(lambda t=training, i=inplace: getattr(F, name)(make(shape), 0.5, t, i), patched=None)
        # torch's modules of alpha dropout never overwrite.
        module = lambda change, t=training, i=inplace: change(getattr(nn, kind)(0.5, i).train(t))(make(shape))  # noqa: E731
        assert_same(lambda m=module: m(lambda theirs: theirs), converted=lambda m=module: m(fr.convert))


# ---- cross-entropy

X, Y = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), T([0, 1, 2, 1])
Q = torch.rand(4, 3, generator=torch.Generator().manual_seed(1)).softmax(1)
PAIRS = {
    "rows": (X, Y),
    "one row": (X[0], Y[0]),
    "soft": (X, Q),
    "soft row": (X[0], Q[0]),
    "pixels": (X.view(2, 3, 2), Y.view(2, 2)),
    "two labels a row": (X, torch.zeros(4, 3).long()),
    "short": (X, Y[:2]),
    "class 3 of 3": (X, T([0, 1, 2, 3])),
    "class -1": (X, T([0, 1, 2, -1])),
    "lone index": (X, T(1)),
    "list of one": (X[0], Y[:1]),
    "no dimension": (T(1.0), T(0)),
    "no class": (torch.randn(4, 0), Y),
    "no row": (X[:0], Y[:0]),
    "bool": (X, Y.bool()),
    "bool mask": (X, Q.bool()),
    "int32": (X, Y.int()),
    "uint8": (X, Y.byte()),
    "int8": (X, Y.char()),
    "float indices": (X, Y.float()),
    "complex": (X, Q.cfloat()),
    "int logits": (X.long(), Y),
    "complex logits": (X.cfloat(), Y),
    "float8 logits": (X.to(torch.float8_e5m2), Y),
    "soft of another shape": (X, Q[:, :2]),
    "target elsewhere": (X, Y.to("meta")),
    "no target": (X, None),
    "list": ([[1.0, 2.0]], Y),
    "array": (X.numpy(), Y),
    "sparse logits": (X.to_sparse(), Y),
    "sparse target": (X, Q.to_sparse()),
    "learned target": (X, Q.clone().requires_grad_()),
}


def assert_same_loss(x, target, named=False, **options):
    doors = {"converted": lambda: fr.convert(nn.CrossEntropyLoss(**options))(x, target)}
    if named:
        doors["by name"] = lambda: fr.cross_entropy(x, target, **options)
        doors["module by name"] = lambda: fr.nn.CrossEntropyLoss(**options)(x, target)
    assert_same(lambda: F.cross_entropy(x, target, **options), patched=None, **doors)


@pytest.mark.parametrize("pair", PAIRS)
def test_logits_and_targets(pair):
    assert_same_loss(*PAIRS[pair])


@pytest.mark.parametrize("number", NUMBERS)
def test_smoothing_and_ignored_class(number):
    value = NUMBERS[number]
    smooth = number in NAMED and number not in ("negative", "NaN")  # which torch takes for no smoothing
    assert_same_loss(X, Y, smooth, label_smoothing=value)
    assert_same_loss(X, Y, number in ("1", "0", "np.int64", "int tensor", "text", "huge"), ignore_index=value)
    assert_same_loss(X, Q, ignore_index=value)


@pytest.mark.parametrize(
    "reduction", ["none", "sum", "elementwise_mean", "Mean", "", None, 1, True, ["mean"]], ids=str
)
def test_reduction(reduction):
    assert_same_loss(X, Y, True, reduction=reduction)


def test_deprecated_reductions():
    for size_average, reduce in itertools.product((None, True, False, 0, "x"), (None, True, False, 0)):
        assert_same_loss(X, Y, True, size_average=size_average, reduce=reduce)


WEIGHTS = {
    **{
        str(dtype): torch.ones(3).to(dtype) * 2
        for dtype in (
            *(torch.float32, torch.float64, torch.float16, torch.bfloat16),
            *(torch.int64, torch.bool, torch.complex64),
        )
    },
    "four": torch.rand(4),
    "matrix": torch.rand(3, 1),
    "no dimension": torch.rand(()),
    "learned": torch.rand(3, requires_grad=True),
    "elsewhere": torch.rand(3, device="meta"),
    "list": [1.0, 1.0, 1.0],
    "array": np.ones(3),
    "sparse": torch.ones(3).to_sparse(),
}


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("target", [Y, Q], ids=["indices", "probabilities"])
def test_weight(target, weight):
    for smoothing in (0.0, 0.1):
        assert_same_loss(X, target, weight=WEIGHTS[weight], label_smoothing=smoothing)


def test_warnings_begin_as_torchs_do():
    calls = [
        *(lambda d=d: F.dropout2d(torch.ones((2,) * d), 0.5, True) for d in (2, 3, 5)),
        *(lambda d=d: F.dropout3d(torch.ones((2,) * d), 0.5, True) for d in (1, 3, 6)),
        *(lambda d=d: F.dropout2d(torch.ones((2,) * d), 0.5, False) for d in (0, 1)),
        lambda: F.cross_entropy(X, Y, size_average=True),
        lambda: F.cross_entropy(X, Y, reduction="elementwise_mean"),
    ]
    for call in calls:
        heard = []
        for context in (warnings.catch_warnings(), fr.patched()):
            with context, warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                call()
            heard.append([(w.category, str(w.message)[:45]) for w in caught])
        assert heard[0] and heard[0][-1] == heard[1][-1]
