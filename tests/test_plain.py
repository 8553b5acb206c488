"""The operators in plain torch: the bits of the kernels, and what a device without kernels runs."""

import contextlib
import inspect
import itertools
import json
import math
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import foreign_device
import helpers
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fastreg as fr
from fastreg import _dropout, _dropout_add, _fgsm, _registry, _sgd
from fastreg._checks import DTYPES

# None; one; less than a group; more than a group, not a multiple of one; four dimensions.
SHAPES = ((0,), (), (7,), (5, 33), (4, 3, 6, 2))
ODD = torch.tensor([0.0, -0.0, math.nan, math.inf, -math.inf, 1e-40, -3.0, 0.05, -0.05])


def same_bits(got, want):
    """The same bits, except for those of a NaN, in the same memory format."""
    return got.stride() == want.stride() and helpers.same_bits(got, want)


def numbers(shape, dtype, strided=True):
    """Random numbers and, where there is room, zeros, infinities and NaN; strided ones in another order."""
    t = torch.randn(shape, dtype=torch.float64)
    if t.numel() > 2 * len(ODD):
        t.view(-1)[torch.randperm(t.numel())[: len(ODD)]] = ODD.double()
    t = t.to(dtype)
    if strided and t.dim() == 4:
        return t.to(memory_format=torch.channels_last)
    return t.t().contiguous().t() if strided and t.dim() == 2 else t


def seed():
    return torch.randint(-(2**63), 2**63 - 1, (1,))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "p", [0.0, 0.1, 0.5, 1 / 3, 1 - 1e-9, 1.0]
)  # none, with ties, without, nearly all, all
def test_dropout(dtype, shape, p):
    inners = {1, math.prod(shape[1:])}
    for offset, inner, strided in itertools.product((0, 3, 8, 2**62 + 5), inners, (False, True)):
        x = numbers(shape, dtype, strided)
        for constants in ((1.3, 0.0, 0.0), (0.7, 0.3, -1.1)):
            arguments = p, seed(), offset, inner, *constants
            want, mask = _dropout.dropout_op(x, *arguments)
            got = _dropout.dropout_plain(x, *arguments)
            assert same_bits(got[0], want) and torch.equal(got[1], mask)
            in_place = x.clone()
            assert torch.equal(_dropout.dropout_inplace_plain(in_place, *arguments), mask)
            assert same_bits(in_place, want)
            again = _dropout.dropout_apply_plain(x, mask, inner, *constants)
            assert same_bits(again, _dropout.dropout_apply_op(x, mask, inner, *constants))


def test_the_last_16_bits_decide_as_in_the_kernels():
    """One decision in 65,536 needs them; here there are some 30."""
    x, p, at = torch.ones(2**21), 0.3, torch.tensor([5])
    first = fr._seeds.random_halves(at, 0, x.numel(), x.device)
    assert (first == _dropout.keep_threshold(p) >> 16).sum() > 10
    assert torch.equal(_dropout.dropout_plain(x, p, at)[1], _dropout.dropout_op(x, p, at)[1])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_dropout_add(dtype, shape, p):
    for strided, with_bias in itertools.product((False, True), (False, True) if shape else (False,)):
        x, residual = numbers(shape, dtype, strided), numbers(shape, dtype)
        arguments = x, residual, numbers(shape[-1:], dtype) if with_bias else None, p, seed(), 1.4
        want, mask = _dropout_add.dropout_add_op(*arguments)
        got = _dropout_add.dropout_add_plain(*arguments)
        assert same_bits(got[0], want) and torch.equal(got[1], mask)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fgsm_and_pgd(dtype, shape):
    channels = [torch.rand(shape[1])] if len(shape) == 4 else []
    steps = [0.1, torch.rand(()) * 0.3, *channels]
    lowers = [None, -0.5, *(step - 0.9 for step in steps)]
    uppers = [None, *(step + 0.9 for step in steps)]
    for eps, lower, upper in itertools.product(steps, lowers, uppers):
        x, grad, origin = (numbers(shape, dtype, strided) for strided in (True, False, True))
        step = _fgsm.parameter_of("test", "eps", eps, x)
        (low, lows), (high, highs) = _fgsm.bounds_of("test", lower, upper, x)
        arguments = x, grad, step[0], low, high, step[1], lows, highs
        assert same_bits(_fgsm.fgsm_step_plain(*arguments), _fgsm.fgsm_step_op(*arguments))
        arguments = x, grad, origin, 0.2, step[0], low, high, None, step[1], lows, highs
        assert same_bits(_fgsm.pgd_step_plain(*arguments), _fgsm.pgd_step_op(*arguments))


def sgd_case(choose):
    """Tensors and options of one step, chosen at random: all options meet each other in some cases."""
    momentum = choose((0, 0.9))
    dampening = choose((0, 0.3)) if momentum else 0
    tensors = params, grads, buffers, started, averages, n_averaged = [], [], [], [], [], []
    average = choose((False, True))
    for shape in SHAPES:
        dtype = choose(DTYPES)
        params.append(numbers(shape, dtype, choose((False, True))))
        grads.append(numbers(shape, dtype, choose((False, True))))
        if momentum:
            fresh = choose((False, True))
            buffers.append(torch.zeros_like(params[-1]) if fresh else numbers(shape, dtype))
            if dampening:
                started.append(torch.tensor(float(not fresh)))
        if average:
            averages.append(numbers(shape, dtype, choose((False, True))))
            n_averaged.append(torch.tensor(choose((0.0, 3.0))))
    options = dict(
        lr=choose((0.0, 0.1, 1 / 3)),
        momentum=momentum,
        dampening=dampening,
        weight_decay=choose((0, 0.01)),
        l1=choose((0, 0.02, 0.5)),
        ema=choose((0.0, 0.3, 0.99)),
        nesterov=bool(momentum) and not dampening and choose((False, True)),
        proximal=choose((False, True)),
        decoupled=choose((False, True)),
        maximize=choose((False, True)),
        lr_tensor=choose((None, torch.tensor(0.07), torch.tensor([0.07], dtype=torch.float64))),
        grad_scale=choose((None, torch.tensor(3.0), torch.tensor([7.0], dtype=torch.float64))),
        found_inf=choose((None, None, torch.tensor(0.0), torch.tensor(1.0))),
        clip=choose((None, torch.tensor(0.3))),
        ema_tensor=choose((None, torch.tensor(0.8))),
        seed=choose((None, seed())),
    )
    return tensors, options


def test_sgd():
    choose = random.Random(7).choice
    for _ in range(300):
        tensors, options = sgd_case(choose)
        want, got = ([[t.clone() for t in group] for group in tensors] for _ in range(2))
        torch.ops.fastreg.sgd_(*want, **options)
        _sgd.sgd_plain(*got, **options)
        for mine, theirs in zip(itertools.chain(*got), itertools.chain(*want), strict=True):
            assert same_bits(mine, theirs), options


def test_sgd_checks_all_before_it_steps_any():
    w, wrong = torch.ones(3), torch.ones(3, dtype=torch.int64)
    options = 0.1, 0, 0, 0, 0, 0, False, False, False, False
    with pytest.raises(ValueError, match="SGD: a parameter must be float32"):
        _sgd.sgd_plain([w, wrong], [w, wrong], [], [], [], [], *options)
    assert torch.equal(w, torch.ones(3))


def test_a_tensor_without_elements_shares_no_memory():
    """Whatever its strides are: those of an expanded tensor of length 0, for example."""
    empty = torch.empty(1, 0).expand(3, 0)
    assert 0 in empty.stride()
    _sgd.sgd_plain([empty], [empty], [], [], [], [], 0.1, 0, 0, 0, 0, 0, False, False, False, False)
    torch.ops.fastreg.sgd_([empty], [empty], [], [], [], [], 0.1, 0, 0, 0, 0, 0, False, False, False, False)
    for in_place in (_dropout.dropout_inplace_plain, torch.ops.fastreg.dropout_.default):
        assert in_place(empty, 0.5, seed()).numel() == 0


# ---- devices without kernels


@pytest.mark.parametrize("name", _registry.declared())
def test_an_operator_has_a_plain_definition_with_its_arguments(name):
    plain = _registry.plain_definition(name)
    schema = getattr(torch.ops.fastreg, name).default._schema
    arguments = [argument.name for argument in schema.arguments]
    named = inspect.signature(plain).parameters
    rest = [
        name for name, p in named.items() if p.kind is p.VAR_POSITIONAL
    ]  # the options, taken as one tuple
    names = [name for name in named if name not in rest]
    assert names == arguments[: len(names)] and bool(rest) == (len(names) < len(arguments))
    for argument in schema.arguments[: len(names)]:
        if argument.has_default_value() and not rest:
            default = named[argument.name].default  # of a list, which a signature gives as a tuple
            assert (list(default) if default == () else default) == argument.default_value


@pytest.fixture(scope="module")
def on_foreign_device():
    """{name: None or the error} of the checks in foreign_device.py."""
    from torch.utils import backend_registration

    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip(f"torch {torch.__version__} cannot make a device in Python")
    run = subprocess.run(
        [sys.executable, Path(foreign_device.__file__)], capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("check", foreign_device.CHECKS)
def test_on_a_device_without_kernels(check, on_foreign_device):
    assert on_foreign_device[check] is None, on_foreign_device[check]


CALLS = {
    "dropout": lambda x: fr.dropout(x, 0.3),
    "dropout in place": lambda x: fr.dropout(x * 1, 0.3, inplace=True),
    "dropout2d": lambda x: fr.dropout2d(x, 0.3),
    "alpha_dropout": lambda x: fr.alpha_dropout(x, 0.3, True),
    "dropout_with_mask": lambda x: fr.dropout_with_mask(x, 0.3, seed=3)[0],
    "dropout_add": lambda x: fr.dropout_add(x, x * 2, 0.3, torch.empty(5, device=x.device)),
    "fgsm_step": lambda x: fr.fgsm_step(x, x, 0.1, 0.0, 1.0),
}


@pytest.mark.parametrize("call", CALLS)
def test_on_meta_tensors(call):
    x = channels_last("meta").requires_grad_()
    output = CALLS[call](x)
    assert output.shape == x.shape and output.is_meta and output.stride() == x.stride()
    if call != "fgsm_step":
        output.sum().backward()
        assert x.grad.shape == x.shape and x.grad.is_meta


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("device", ["mps", "xpu"])
def test_on_fake_tensors(call, device):
    """Without derivatives: torch's autograd crashes there if torch was not built for the device."""
    with FakeTensorMode():
        x = channels_last(device)
        output = CALLS[call](x)
    assert output.shape == x.shape and output.device == x.device and output.stride() == x.stride()


def stepped(cls, device):
    """A parameter after one step of an optimiser."""
    p = torch.nn.Parameter(torch.empty(3, 5, device=device))
    # torch asks whether a number is finite only on a device that it was built for, be it fake or not.
    optimizer = cls([p], 0.1, l1=0.01, ema=0.9, max_norm=1.0 if device == "meta" else None)
    p.grad = torch.empty_like(p)
    optimizer.step()
    assert optimizer.state[p]["ema"].device.type == device
    return p.detach()


# Calls whose results have another shape than what they are given, or that step in place: (call, its shape).
OTHER_CALLS = {
    "cross_entropy": (lambda d: fr.cross_entropy(torch.empty(6, 5, device=d), indices(6, d)), ()),
    "linear_cross_entropy": (
        lambda d: fr.linear_cross_entropy(
            torch.empty(6, 8, device=d), torch.empty(5, 8, device=d), indices(6, d), reduction="none"
        ),
        (6,),
    ),
    "attention": (
        lambda d: fr.scaled_dot_product_attention(
            torch.empty(2, 3, 9, 8, device=d), *torch.empty(2, 2, 3, 7, 8, device=d), dropout_p=0.3
        ),
        (2, 3, 9, 8),
    ),
    "augment": (
        lambda d: fr.augment.functional.rotate(torch.empty(2, 3, 9, 8, device=d), 20.0),
        (2, 3, 9, 8),
    ),
    "pgd_step": (
        lambda d: torch.ops.fastreg.pgd_step(*torch.empty(3, 4, 5, device=d), 0.1, 0.2, 0.0, 1.0),
        (4, 5),
    ),
    "SGD": (lambda d: stepped(fr.optim.SGD, d), (3, 5)),
    "AdamW": (lambda d: stepped(fr.optim.AdamW, d), (3, 5)),
    "sum_of_squares": (
        lambda d: torch.ops.fastreg.sum_of_squares([torch.empty(7, device=d), torch.empty((), device=d)]),
        (),
    ),
}


def indices(n, device):
    return torch.empty(n, dtype=torch.int64, device=device)


@pytest.mark.parametrize("call", OTHER_CALLS)
@pytest.mark.parametrize("device", ["meta", "mps", "xpu"])
def test_other_shapes_on_meta_and_fake_tensors(call, device):
    function, shape = OTHER_CALLS[call]
    if call == "linear_cross_entropy" and device != "meta":
        pytest.skip(
            "torch copies an expanded tensor only on a device that it was built for, be it fake or not"
        )
    with contextlib.nullcontext() if device == "meta" else FakeTensorMode():
        output = function(device)
    assert output.shape == shape and output.device.type == device


def channels_last(device):
    return torch.empty(2, 3, 4, 5, device=device).to(memory_format=torch.channels_last)


def test_a_gpu_without_its_kernels_is_an_error(monkeypatch):
    """The plain definition would work there, and hide that the kernels are missing."""
    monkeypatch.setattr(_registry, "cuda", None)
    monkeypatch.setattr(_registry, "why_no_cuda", "fastreg was built without them; rebuild it")

    class OnGpu(torch.Tensor):
        device = torch.device("cuda", 0)

    fallback = _registry._no_kernel("dropout", lambda *arguments: pytest.fail("it ran"))
    for left_out, why in (
        ("", ""),
        ("no nvcc; install it", r" \(the build left them out: no nvcc; install it\)"),
    ):
        kernels = SimpleNamespace(build_info=lambda left_out=left_out: {"no_cuda": left_out})
        monkeypatch.setattr(_registry, "load_kernels", lambda kernels=kernels: kernels)
        text = rf"dropout: .* on 'cuda'; .*rebuild it{why}, or move it with .cpu\(\)"
        with pytest.raises(RuntimeError, match=text):
            fallback(torch.ones(3).as_subclass(OnGpu), 0.5, seed())


def test_tensors_on_two_devices_are_an_error():
    here, there = (torch.ones(3, device="meta").as_subclass(kind) for kind in (OnMps, OnXpu))
    fallback = _registry._no_kernel("dropout_add", lambda *arguments: pytest.fail("it ran"))
    with pytest.raises(RuntimeError, match="dropout_add: expected tensors on one device"):
        fallback(here, there)


class OnMps(torch.Tensor):
    device = torch.device("mps", 0)


class OnXpu(torch.Tensor):
    device = torch.device("xpu", 0)
