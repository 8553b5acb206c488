"""The two paths of autograd, Python and C++: the same bits, the same errors, and the rules by which one is
chosen.
"""

import importlib.util
import itertools
import json
import os
import subprocess
import sys
import threading

import pytest
import torch
import torch.nn.functional as F

import fastreg as fr
from fastreg import _patch, _registry
from fastreg.cli import doctor

FAST = _registry.fast
# Every module that calls the C++ path has it under this name.
OPS = [
    module
    for name, module in sorted(sys.modules.items())
    if name.startswith("fastreg.")
    and getattr(module, "fast", None) is FAST
    and module not in (_registry, _patch)  # the door keeps what it found when it was imported
]
needs_cpp = pytest.mark.skipif(FAST is None, reason=f"no C++ autograd: {_registry.why_not_fast}")


class Spy:
    """The C++ functions, counting the calls that they took."""

    def __init__(self):
        self.taken = 0

    def __getattr__(self, name):
        def call(*args):
            result = getattr(FAST, name)(*args)
            self.taken += result is not None
            return result

        return call


@pytest.fixture
def both(monkeypatch):
    """both(function, taken): what it does must not depend on the path; `taken` says whether C++ must take all
    calls or none.
    """

    def run(function, taken=None):
        seen = []
        spy = Spy()
        for path in (None, spy):
            for op in OPS:
                monkeypatch.setattr(op, "fast", path)
            torch.manual_seed(7)
            try:
                value = function()
            except Exception as error:
                value = type(error), str(error)
            seen.append((value, torch.get_rng_state()))
        assert_same(*seen)
        if taken is not None:
            assert bool(spy.taken) == taken
        return seen[1][0]

    return run


def assert_same(a, b):
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert (a.dtype, a.shape, a.stride(), a.requires_grad) == (
            b.dtype,
            b.shape,
            b.stride(),
            b.requires_grad,
        )
        bits = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
        assert torch.equal(*bits), (a, b)
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


def saved(function):
    """What autograd keeps: (dtype, number of elements) of each tensor, in order."""
    kept = []

    def pack(tensor):
        kept.append((tensor.dtype, tensor.numel()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return kept


def derivatives(function, x):
    """Output, what is saved, and gradients: of a sum, with a graph that is kept, of a square, and of second
    order.
    """
    x = x.detach().requires_grad_()
    kept = saved(lambda: function(x))
    y = function(x)
    if not y.requires_grad:
        return [y, kept]
    out = [y.detach(), kept, y._version]
    y.sum().backward()
    out.append(x.grad)
    y = function(x)
    g = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).reshape(y.shape).requires_grad_()
    out += [
        *torch.autograd.grad(y, x, g, retain_graph=True),
        *torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True),
    ]
    (first,) = torch.autograd.grad(y, x, g, create_graph=True)
    out.append(first.detach())
    inputs = (x, g)
    second = torch.autograd.grad(first.square().sum(), inputs, allow_unused=True, create_graph=True)
    out += [t if t is None else t.detach() for t in second]
    if second[1].requires_grad:
        out += torch.autograd.grad(second[1].square().sum(), inputs, allow_unused=True)
    return out


INPUTS = {
    "0-dim": lambda: torch.tensor(1.5),
    "empty": lambda: torch.randn(0, 3),
    "odd": lambda: torch.randn(3, 7, 13),
    "transposed": lambda: torch.randn(9, 5).t(),
    "channels last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "every other": lambda: torch.randn(6, 11)[::2, 1::3],
    "expanded": lambda: torch.randn(1, 5).expand(4, 5),
    "inf and nan": lambda: torch.tensor([float("inf"), float("nan"), -0.0, 1.0] * 5),
}
DROPOUTS = {
    "dropout": lambda x: fr.dropout(x, 0.3),
    "p as an int": lambda x: fr.dropout(x, 1),
    "p=0": lambda x: fr.dropout(x, 0.0) * 1,
    "evaluation": lambda x: fr.dropout(x, 0.3, False) * 1,
    "textbook": lambda x: fr.dropout(x, 0.3, rescale="inference"),
    "generator": lambda x: fr.dropout(x, 0.3, generator=torch.Generator().manual_seed(3)),
    "alpha": lambda x: fr.alpha_dropout(x, 0.3, True),
    "in place": lambda x: fr.dropout(x * 1, 0.3, inplace=True),
    "module": fr.nn.Dropout(0.7),
}
CHANNELS = {
    "dropout1d": lambda x: fr.dropout1d(x[0], 0.5),
    "dropout2d": lambda x: fr.dropout2d(x, 0.5),
    "dropout3d": lambda x: fr.dropout3d(x, 0.5),
    "feature_alpha": lambda x: fr.feature_alpha_dropout(x, 0.5, True),
    "drop_path": lambda x: fr.drop_path(x, 0.5, scale_by_keep=False),
}


@needs_cpp
@pytest.mark.parametrize("name", DROPOUTS)
def test_dropout_has_the_same_bits(both, name, dtype):
    for make in INPUTS.values():
        x = make().to(dtype)
        both(lambda x=x: derivatives(DROPOUTS[name], x))
        both(lambda x=x: DROPOUTS[name](x))


@needs_cpp
@pytest.mark.parametrize("name", CHANNELS)
def test_dropout_of_channels_has_the_same_bits(both, name, dtype):
    x = torch.randn(2, 3, 4, 5).to(dtype)
    both(lambda: derivatives(CHANNELS[name], x), taken=True)
    both(lambda: CHANNELS[name](x), taken=True)


STEPS = {
    "numbers": (lambda x, g: fr.fgsm_step(x, g, 0.1, 0, 1.0), True),
    "no bounds": (lambda x, g: fr.fgsm_step(x, g, -1), True),
    "infinite bounds": (lambda x, g: fr.fgsm_step(x, g, 0.5, float("-inf"), float("inf")), True),
    "one bound": (lambda x, g: fr.fgsm_step(x, g, 0.5, None, 0.25), True),
    "a leaf and a gradient with a graph": (
        lambda x, g: fr.fgsm_step(x.detach().requires_grad_(), g.detach().requires_grad_() * 2, 0.1),
        True,
    ),
    "bounds as a pair": (lambda x, g: fr.fgsm_step(x, g, 0.1, bounds=(0, 1)), False),
    "a tensor": (lambda x, g: fr.fgsm_step(x, g, torch.tensor(0.1)), False),
    "another shape": (lambda x, g: fr.fgsm_step(x, g[..., None], 0.1), False),
    "another dtype": (lambda x, g: fr.fgsm_step(x, g.to(torch.complex64), 0.1), False),
    "crossed": (lambda x, g: fr.fgsm_step(x, g, 0.1, 1, 0), False),
    "an infinite step": (lambda x, g: fr.fgsm_step(x, g, float("inf")), False),
    "nan": (lambda x, g: fr.fgsm_step(x, g, 0.1, float("nan")), False),
    "no number": (lambda x, g: fr.fgsm_step(x, g, "0.1"), False),
}


@needs_cpp
@pytest.mark.parametrize("name", STEPS)
def test_fgsm_step_has_the_same_bits(both, name, dtype):
    function, taken = STEPS[name]
    for make in INPUTS.values():
        x = make().to(dtype)
        both(lambda x=x: function(x, random(x.shape).to(dtype)), taken=taken)


def random(shape, seed=3):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


ADDED = {
    "bias": lambda x, r, b: fr.dropout_add(x, r, 0.3, b),
    "no bias": lambda x, r, b: fr.dropout_add(x, r, 0.3),
    "p=0": lambda x, r, b: fr.dropout_add(x, r, 0, b),
    "p=1": lambda x, r, b: fr.dropout_add(x, r, 1, b),
    "evaluation": lambda x, r, b: fr.dropout_add(x, r, 0.3, b, False),
    "evaluation, no bias": lambda x, r, b: fr.dropout_add(x, r, 0.3, training=False),
    "module": lambda x, r, b: fr.nn.DropoutAdd(0.7)(x, r, b),
}


@needs_cpp
@pytest.mark.parametrize("name", ADDED)
def test_dropout_add_has_the_same_bits(both, name, dtype):
    """With a gradient wanted of each of the three, and of all."""
    for make in INPUTS.values():
        x = make().to(dtype)
        r, b = random(x.shape).to(dtype), random(x.shape[-1:], seed=4).to(dtype)
        b = b if x.dim() else None
        for function in (
            lambda t, r=r, b=b: ADDED[name](t, r, b),
            lambda t, x=x, b=b: ADDED[name](x, t, b),
            lambda t, r=r, b=b: ADDED[name](t, t * 2, None if b is None else b + t.sum()),
        ):
            both(lambda function=function, x=x: derivatives(function, x), taken=True)
        if b is not None:
            both(lambda r=r, b=b, x=x: derivatives(lambda t: ADDED[name](x, r, t), b), taken=True)
        both(lambda r=r, b=b, x=x: ADDED[name](x, r, b), taken=True)


@needs_cpp
def test_the_mask_is_saved_and_nothing_else(both):
    x = torch.randn(1001, requires_grad=True)
    assert both(lambda: saved(lambda: fr.dropout(x, 0.5)), taken=True) == [(torch.uint8, 126)]
    assert both(lambda: saved(lambda: fr.dropout_add(x, x, 0.5, x)), taken=True) == [(torch.uint8, 126)]
    assert both(lambda: saved(lambda: fr.dropout_add(x, x, 0.0, x)), taken=True) == []


@needs_cpp
def test_dropout_add_converts_what_python_converts(both):
    x, strided = torch.randn(4, 5, requires_grad=True), torch.randn(10)[::2]
    both(lambda: fr.dropout_add(x, x.detach(), 0.5, strided), taken=False)
    both(lambda: fr.dropout_add(x, x, 0.5, generator=torch.Generator().manual_seed(3)), taken=False)
    with torch.autocast("cpu", torch.bfloat16):
        both(lambda: fr.dropout_add(x.bfloat16(), x, 0.5, x[0]), taken=False)
        both(lambda: fr.dropout_add(x, x, 0.5, x[0]), taken=True)
    with torch.inference_mode():
        both(lambda: fr.dropout_add(torch.ones(3), torch.ones(3)), taken=True)


@needs_cpp
def test_in_place_without_a_graph_counts_one_version(both):
    def run():
        x = torch.randn(5, 5)
        before = x._version
        y = fr.dropout(x, 0.5, inplace=True)
        return x, y is x, x._version - before

    assert both(run, taken=True)[1:] == (True, 1)


def logits(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)) * 3


def classes(*shape, k=5):
    return torch.randint(0, k, shape, generator=torch.Generator().manual_seed(2))


IGNORED = torch.where(torch.arange(7) % 3 == 0, -100, classes(7))
# (input, target, does C++ take it)
LOSSES = {
    "2-D": (logits(7, 5), classes(7), True),
    "one row": (logits(1, 5), classes(1), True),
    "ignored": (logits(7, 5), IGNORED, True),
    "all ignored": (logits(3, 5), torch.full((3,), -100), True),
    "empty": (logits(0, 5), classes(0), True),
    "transposed": (logits(5, 7).t(), classes(7), True),
    "3-D": (logits(2, 5, 3), classes(2, 3), True),
    "4-D": (logits(2, 5, 3, 4), classes(2, 3, 4), True),
    "4-D, strided": (logits(2, 3, 4, 5).permute(0, 3, 2, 1), classes(2, 4, 3), False),
    "unbatched": (logits(5), classes(), False),
    "int32": (logits(7, 5), classes(7).int(), False),
    "strided target": (logits(7, 5), classes(7, 2)[:, 0], False),
    "soft": (logits(7, 5), logits(7, 5).softmax(1), True),
    "soft, 4-D": (logits(2, 5, 3, 4), logits(2, 5, 3, 4).softmax(1), True),
    "soft, strided": (logits(7, 5), logits(5, 7).t().softmax(1), True),
}
OPTIONS = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.1},
    "all": {
        "label_smoothing": 0.3,
        "smoothing": "others",
        "z_loss": 0.01,
        "all_ignored": "zero",
        "weight": torch.rand(5),
    },
    "integers": {"label_smoothing": 1, "z_loss": 0, "ignore_index": -1},
    "loss_dtype": {"loss_dtype": torch.float64},
}


@needs_cpp
@pytest.mark.parametrize("name", LOSSES)
def test_cross_entropy_has_the_same_bits(both, name, dtype):
    x, target, taken = LOSSES[name]
    x = x.to(dtype)
    if target.is_floating_point():
        target = target.to(dtype)
    for options, reduction in itertools.product(OPTIONS.values(), ("mean", "sum", "none")):
        weight = options.get("weight")
        if weight is not None and dtype == torch.float64:
            options = options | {"weight": weight.double()}
        if options.get("ignore_index") == -1 and -100 in target:
            continue

        def loss(x, options=options, reduction=reduction):
            return fr.cross_entropy(x, target, reduction=reduction, **options)

        both(lambda loss=loss: derivatives(loss, x), taken)
        both(lambda loss=loss: loss(x), taken)


@needs_cpp
def test_cross_entropy_converts_what_python_converts(both):
    x, y = logits(4, 5).requires_grad_(), classes(4)
    weight = torch.rand(10)[::2]
    both(lambda: fr.cross_entropy(x, y, weight), taken=False)
    both(lambda: fr.cross_entropy(x, y, weight.double()), taken=False)
    both(lambda: fr.cross_entropy(x, y, torch.rand(5), True, -100, False), taken=False)
    both(lambda: fr.cross_entropy(x, logits(4, 5).softmax(1).requires_grad_()), taken=False)
    with torch.autocast("cpu", torch.bfloat16):
        assert both(lambda: fr.cross_entropy(x.bfloat16(), y), taken=True).dtype == torch.float32
    with torch.inference_mode():
        both(lambda: (fr.cross_entropy(logits(4, 5), y), fr.dropout(logits(4, 5))), taken=True)
    module = fr.nn.CrossEntropyLoss(label_smoothing=0.1, reduction="sum")
    both(lambda: derivatives(lambda x: module(x, y), x), taken=True)


Q, K, V = random((2, 3, 5, 4)), random((2, 3, 7, 4)), random((2, 3, 7, 6))
SEEN = random((2, 1, 5, 7)) > -0.5
# (arguments, does C++ take them)
ATTENTIONS = {
    "plain": ((Q, K, V, None, 0.3), True),
    "causal": ((Q, K, V, None, 0.3, True), True),
    "boolean mask": ((Q, K, V, SEEN, 0.3), True),
    "no key": ((Q, K, V, torch.zeros_like(SEEN), 0.3), True),
    "float mask": ((Q, K, V, random((1, 3, 1, 7)), 0.3), True),
    "scale": ((Q, K, V, None, 0.3, False, 2), True),
    "all dropped": ((Q, K, V, None, 1), True),
    "heads": ((Q[0], K[0], V[0], None, 0.3), True),
    "matrices": ((Q[0, 0], K[0, 0], V[0, 0], None, 0.3), True),
    "strided": ((Q.mT.contiguous().mT, K[:, :, :, ::2].repeat(1, 1, 1, 2), V[..., ::2], None, 0.3), True),
    "broadcast": ((Q, K[:1], V, None, 0.3), False),
    "mask of fewer dimensions": ((Q, K, V, SEEN[0, 0], 0.3), False),
    "nothing is dropped": ((Q, K, V, None, 0.0), False),
    "no queries": ((Q[:, :, :0], K, V, None, 0.3), False),
}
WRONG_ATTENTIONS = {
    "mask and causal": (Q, K, V, SEEN, 0.3, True),
    "widths": (Q, K[..., :3], V, None, 0.3),
    "lengths": (Q, K, V[:, :, :4], None, 0.3),
    "heads": (Q, K[:, :2], V, None, 0.3),
    "mask": (Q, K, V, SEEN[..., :4], 0.3),
    "dtypes": (Q, K.double(), V, None, 0.3),
    "integers": (Q.long(), K.long(), V.long(), None, 0.3),
    "p": (Q, K, V, None, 1.5),
    "scale": (Q, K, V, None, 0.3, False, float("inf")),
}


def attention(q, k, v, mask, p, is_causal=False, scale=None):
    return fr.scaled_dot_product_attention(q, k, v, mask, p, is_causal, scale=scale)


@needs_cpp
@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention_has_the_same_bits(both, name, dtype):
    (q, k, v, mask, *options), taken = ATTENTIONS[name]
    q, k, v = (t.to(dtype) for t in (q, k, v))
    if mask is not None and mask.is_floating_point():
        mask = mask.to(dtype)
    both(lambda: attention(q, k, v, mask, *options), taken)
    for function, x in (
        (lambda x: attention(x, k, v, mask, *options), q),
        (lambda x: attention(q, x, v, mask, *options), k),
        (lambda x: attention(q, k, x, mask, *options), v),
        (lambda x: attention(q, k, v, x, *options), mask),
    ):
        if x is not None and x.is_floating_point():
            both(lambda function=function, x=x: derivatives(function, x), taken)


@needs_cpp
@pytest.mark.parametrize("name", WRONG_ATTENTIONS)
def test_attention_has_the_same_errors(both, name):
    assert issubclass(both(lambda: attention(*WRONG_ATTENTIONS[name]), taken=False)[0], ValueError)


@needs_cpp
def test_gradients_of_attention_in_batches(both):
    q = Q.clone().requires_grad_()

    def rows(function):
        g = random((3, 2, 3, 5, 6))
        y = function(q)
        each = torch.stack([torch.autograd.grad(y, q, row, retain_graph=True)[0] for row in g])
        batched = torch.autograd.grad(y, q, g, is_grads_batched=True)[0]
        torch.testing.assert_close(batched, each)
        return batched

    both(lambda: rows(lambda x: attention(x, K, V, None, 0.3)), taken=True)


@needs_cpp
def test_attention_leaves_the_rest_to_python(both):
    with torch.autocast("cpu", torch.bfloat16):
        assert both(lambda: attention(Q, K, V, None, 0.3), taken=False).dtype == torch.bfloat16
    both(lambda: attention(Q, K, V, None, torch.tensor(0.3)), taken=False)
    long = random((1, 1, 800, 4))  # more weights than are few
    both(lambda: attention(long, long, long, None, 0.3), taken=False)
    with torch.inference_mode():
        both(lambda: attention(Q * 1, K * 1, V * 1, None, 0.3), taken=True)


@needs_cpp
def test_the_saved_gradient_is_handed_out_once(both):
    """For loss.backward() without a pass over memory; never where someone may read it again."""
    x = logits(6, 5).requires_grad_()

    def run():
        addresses = []

        def pack(tensor):
            addresses.append(tensor.data_ptr())
            return tensor

        shared = []
        for retain in (False, True):
            x.grad = None
            addresses.clear()
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                loss = fr.cross_entropy(x, classes(6))
            loss.backward(retain_graph=retain)
            shared.append(x.grad.data_ptr() == addresses[0])
            assert not x.grad.requires_grad
        return shared

    assert both(run, taken=True) == [True, False]


def spoil(x, y):
    weight = torch.ones(5)
    loss = fr.cross_entropy(x, y, weight)
    weight.add_(1)
    loss.backward()


def twice(loss):
    loss.sum().backward()
    loss.sum().backward()


X, Y = logits(4, 5).requires_grad_(), classes(4)
STRANGE = torch.ones(10).as_strided(
    (2,) * 17, (1, 0) * 8 + (1,)
)  # more dimensions that do not merge than a kernel walks
WRONG = {
    "p": lambda: fr.dropout(X, 1.5),
    "p is NaN": lambda: fr.dropout(X, float("nan")),
    "p is a bool": lambda: fr.dropout(X, True),
    "p is text": lambda: fr.dropout(X, "0.5"),
    "p is huge": lambda: fr.dropout(X, 10**400),
    "no tensor": lambda: fr.dropout([1.0], 0.5),
    "integers": lambda: fr.dropout(torch.arange(4), 0.5),
    "sparse": lambda: fr.dropout(torch.eye(3).to_sparse(), 0.5),
    "leaf in place": lambda: fr.dropout(X, 0.5, inplace=True),
    "expanded in place": lambda: fr.dropout(torch.randn(1, 3).expand(2, 3), 0.5, inplace=True),
    "dimensions": lambda: fr.dropout(STRANGE, 0.5),
    "dimensions of the gradient": lambda: fr.dropout(
        torch.zeros_like(STRANGE).requires_grad_(), 0.5
    ).backward(STRANGE),
    "residual": lambda: fr.dropout_add(X, X[0]),
    "residual of another dtype": lambda: fr.dropout_add(X, X.double()),
    "bias": lambda: fr.dropout_add(X, X, 0.5, X[:, 0]),
    "bias is text": lambda: fr.dropout_add(X, X, 0.5, "none"),
    "p of dropout_add": lambda: fr.dropout_add(X, X, 1.5),
    "dropout_add of integers": lambda: fr.dropout_add(Y, Y),
    "dropout_add of dimensions": lambda: fr.dropout_add(STRANGE, STRANGE),
    "dropout_add twice": lambda: twice(fr.dropout_add(X, X, 0.5, X[0])),
    "meta": lambda: fr.cross_entropy(X, Y.to("meta")),
    "class": lambda: fr.cross_entropy(X, Y + 5),
    "shape": lambda: fr.cross_entropy(X, Y[:3]),
    "smoothing": lambda: fr.cross_entropy(X, Y, label_smoothing=1.1),
    "smoothing is NaN": lambda: fr.cross_entropy(X, Y, label_smoothing=float("nan")),
    "z_loss": lambda: fr.cross_entropy(X, Y, z_loss=float("inf")),
    "reduction": lambda: fr.cross_entropy(X, Y, reduction="median"),
    "ignore_index": lambda: fr.cross_entropy(X, Y, ignore_index=2**70),
    "ignore_index, soft": lambda: fr.cross_entropy(X, X.detach().softmax(1), ignore_index=1),
    "weight": lambda: fr.cross_entropy(X, Y, torch.ones(4)),
    "weight with gradient": lambda: fr.cross_entropy(X, Y, torch.ones(5, requires_grad=True)),
    "loss_dtype": lambda: fr.cross_entropy(X, Y, loss_dtype=torch.float16),
    "loss_dtype is text": lambda: fr.cross_entropy(X, Y, loss_dtype="float32"),
    "others": lambda: fr.cross_entropy(X[:, :1], Y * 0, label_smoothing=0.1, smoothing="others"),
    "no class": lambda: fr.cross_entropy(X[:, :0], Y),
    "saved and changed": lambda: spoil(X, Y),
    "dropout twice": lambda: twice(fr.dropout(X, 0.5)),
    "loss twice": lambda: twice(fr.cross_entropy(X, Y)),
}


@needs_cpp
@pytest.mark.parametrize("name", WRONG)
def test_errors_do_not_depend_on_the_path(both, name):
    kind, text = both(WRONG[name])
    assert issubclass(kind, Exception) and text


class Subclass(torch.Tensor):
    pass


class Mode(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Dispatch(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@needs_cpp
def test_the_unusual_is_left_to_python():
    """None, and no number drawn: for every kind of input, mode and transform of which the C++ path knows
    nothing.
    """
    x, y = logits(4, 5), classes(4)
    results = []

    def ask(x=x, y=y):
        state = torch.get_rng_state()
        results.append(FAST.dropout(x, 0.5, True, False))
        results.append(FAST.dropout_add(x, x, 0.5, x, True))
        results.append(FAST.dropout_add(torch.ones(4, 5), x, 0.5, None, True))
        results.append(
            FAST.cross_entropy(x, y, None, None, -100, None, "mean", 0.1, "uniform", 0.0, "nan", None)
        )
        assert torch.equal(state, torch.get_rng_state())
        return x

    for unusual in (
        x.as_subclass(Subclass),
        x.to_sparse(),
        x.to("meta"),
        torch._neg_view(x),
        x.int(),
        x.cfloat(),
        None,
        1.0,
    ):
        ask(unusual)
    torch.vmap(ask)(torch.stack([x, x]))
    torch.func.grad(lambda x: ask(x).sum())(x)
    with torch.autograd.forward_ad.dual_level():
        ask()
        ask(torch.autograd.forward_ad.make_dual(x, x))
    with Mode():
        ask()
    with Dispatch():
        ask()
    torch.jit.trace(lambda x: ask(x) * 1, x, check_trace=False)
    assert len(results) > 20 and all(result is None for result in results)
    assert FAST.dropout(x, 0.5, True, False) is not None  # and all is well again


@needs_cpp
def test_batched_gradients_and_checkpoints(both):
    x = logits(4, 5).requires_grad_()

    def batched():
        y = fr.dropout(x, 0.5)
        return torch.autograd.grad(
            y, x, torch.stack([torch.ones_like(y), torch.full_like(y, 2)]), is_grads_batched=True
        )

    both(batched, taken=True)

    def checkpointed():
        x.grad = None
        f = lambda x: fr.cross_entropy(fr.dropout(x.tanh(), 0.5), classes(4))  # noqa: E731
        torch.utils.checkpoint.checkpoint(f, x, use_reentrant=False).backward()
        return x.grad

    both(checkpointed, taken=True)


@needs_cpp
def test_an_unused_output_gives_the_same_gradient(both):
    """An autograd.Function behind may hand no gradient on: zeros arrive, as in Python."""

    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y * 1

        @staticmethod
        def backward(ctx, grad):
            return None

    def run():
        x = logits(4, 5).requires_grad_()
        (g,) = torch.autograd.grad(Nothing.apply(fr.dropout(x, 0.5)).sum(), x, allow_unused=True)
        (h,) = torch.autograd.grad(Nothing.apply(fr.cross_entropy(x, classes(4))), x, allow_unused=True)
        return g, h

    both(run, taken=True)


@needs_cpp
def test_compiled_autograd(both):
    x = logits(4, 5).requires_grad_()

    def run():
        x.grad = None
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
            (fr.cross_entropy(fr.dropout(x, 0.5), classes(4), label_smoothing=0.1) * 2).backward()
        return x.grad

    both(run, taken=True)


@needs_cpp
def test_many_threads_draw_and_differentiate():
    x = logits(64, 5)
    drawn, failed = [], []

    def work():
        try:
            for _ in range(50):
                v = x.clone().requires_grad_()
                y = fr.dropout(v, 0.5)
                fr.cross_entropy(y, classes(64)).backward()
                assert torch.equal(
                    (v.grad == 0).logical_not().logical_and(y.detach() == 0).any(), torch.tensor(False)
                )
                drawn.append(bytes(y.detach().numpy()))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and len(set(drawn)) == len(drawn) == 200


@needs_cpp
def test_patched_code_takes_the_fast_path(monkeypatch):
    x, y = logits(4, 5).requires_grad_(), classes(4)
    for op in OPS:
        monkeypatch.setattr(op, "fast", None)
    with fr.patched():
        names = [f.grad_fn.name() for f in (F.dropout(x, 0.5), F.cross_entropy(x, y, label_smoothing=0.1))]
    assert all("fastreg" in name for name in names), names  # the C++ nodes carry their namespace


# ---- which path is chosen


@pytest.fixture
def choose(monkeypatch):
    """choose(version, wanted): (path, why not) for a torch of that version."""

    def run(version=torch.__version__, wanted=None):
        monkeypatch.setattr(torch, "__version__", version)
        monkeypatch.delenv("FASTREG_AUTOGRAD", raising=False)
        if wanted is not None:
            monkeypatch.setenv("FASTREG_AUTOGRAD", wanted)
        return _registry._load_autograd()

    return run


BUILT = (
    importlib.util.find_spec("fastreg._autograd_" + "_".join(torch.__version__.split(".")[:2])) is not None
)


@pytest.mark.skipif(not BUILT, reason="built without the C++ autograd")
def test_the_path_for_this_torch_is_chosen(choose):
    for wanted in (None, "", "cpp"):
        module, why_not = choose(wanted=wanted)
        assert why_not is None and module.torch.split(".")[:2] == torch.__version__.split(".")[:2]
    assert choose(wanted="python") == (None, "FASTREG_AUTOGRAD=python asks for Python")


@pytest.mark.filterwarnings("error")
def test_another_torch_falls_back_to_python(choose):
    module, why_not = choose("2.99.1+cu999")
    assert module is None and "not built for torch 2.99.1" in why_not and "pip install" in why_not
    with pytest.raises(ImportError, match=r"FASTREG_AUTOGRAD=cpp.*not built for torch 2\.99.*pip install"):
        choose("2.99.1", "cpp")


@pytest.mark.parametrize("wanted", ["c++", "CPP", "1"])
def test_an_unknown_choice_is_refused(choose, wanted):
    with pytest.raises(ImportError, match="must be 'python' or 'cpp', got"):
        choose(wanted=wanted)


def test_a_library_that_does_not_load_is_not_swallowed(choose, monkeypatch, tmp_path):
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"no library")

    class Finder:
        def find_spec(self, name, path=None, target=None):
            return (
                importlib.util.spec_from_file_location(name, broken)
                if name == "fastreg._autograd_2_99"
                else None
            )

    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    with pytest.warns(RuntimeWarning, match=r"cannot be loaded.*broken\.so.*pip install") as caught:
        module, why_not = choose("2.99.0")
    assert module is None and "cannot be loaded" in why_not and len(caught) == 1
    with pytest.raises(ImportError, match=r"cannot be loaded.*pip install"):
        choose("2.99.0", "cpp")


def test_the_doctor_tells(monkeypatch):
    environment = {**os.environ, "FASTREG_AUTOGRAD": "python"}
    command = [sys.executable, "-m", "fastreg", "doctor"]
    printed = subprocess.run(command, env=environment, capture_output=True, text=True).stdout
    assert "Python in use" in printed and "FASTREG_AUTOGRAD=python asks for Python" in printed
    monkeypatch.setattr(_registry, "fast", None)
    monkeypatch.setattr(_registry, "why_not_fast", "the reason")
    info = json.loads(json.dumps(doctor.collect()))
    assert (info["autograd"]["in_use"], info["autograd"]["why_not"]) == ("python", "the reason")
    if FAST is not None:
        monkeypatch.undo()
        info = doctor.collect()
        assert info["autograd"]["in_use"] == "cpp" and info["autograd"]["built_with_torch"] == FAST.torch
        assert ("autograd", f"C++ in use, built with torch {FAST.torch}") in list(doctor._lines(info))


def test_an_unknown_choice_fails_the_import():
    environment = {**os.environ, "FASTREG_AUTOGRAD": "rust"}
    done = subprocess.run(
        [sys.executable, "-c", "import fastreg"], env=environment, capture_output=True, text=True
    )
    assert (
        done.returncode
        and "ImportError: FASTREG_AUTOGRAD must be 'python' or 'cpp', got 'rust'" in done.stderr
    )
