"""torch's linear_cross_entropy while it is patched: its values and errors, and never its logits. Where it has
chunks of its own they are one more witness of what ours gives.
"""

import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers import run_python
from patch_cases import ops_seen
from torch import nn

import fastreg as fr

pytestmark = pytest.mark.skipif(
    not hasattr(F, "linear_cross_entropy"), reason="this torch has no linear_cross_entropy"
)
OURS = "fastreg::linear_cross_entropy"
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}
INDICES = torch.tensor([0, 6, 3, -100, 2, 6, 1, 1])


def layer(dtype=torch.float32, rows=8, width=5, classes=7, seed=0):
    """(input, weight, bias) that require gradients."""
    g = torch.Generator().manual_seed(seed)
    shapes = (rows, width), (classes, width), (classes,)
    return [torch.randn(shape, generator=g).to(dtype).requires_grad_() for shape in shapes]


def outcome(*inputs, patched, **options):
    """The value and the gradients of the inputs, or the error; and whether it was ours."""
    leaves = [x for x in (*inputs, *options.values()) if isinstance(x, torch.Tensor) and x.requires_grad]
    with warnings.catch_warnings(), fr.patched() if patched else warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with ops_seen() as seen:
            try:
                value = F.linear_cross_entropy(*inputs, **options)
            except Exception as error:
                value = error
    if isinstance(value, Exception):
        return value, OURS in seen
    gradients = torch.autograd.grad(value.float().sum(), leaves, allow_unused=True) if leaves else ()
    return (value.detach(), *gradients), OURS in seen


def assert_torchs(*inputs, ours=True, **options):
    """The patched function gives what torch's does, by our kernel or not."""
    expected, _ = outcome(*inputs, patched=False, **options)
    got, reached = outcome(*inputs, patched=True, **options)
    if isinstance(expected, Exception):
        assert isinstance(got, type(expected)), (expected, got)
        return
    assert not isinstance(got, Exception), got
    assert reached == ours
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        size = max(b.abs().nan_to_num().max().item(), 1e-3) if b.numel() else 1
        torch.testing.assert_close(
            a, b, rtol=0, atol=TOLERANCE[inputs[0].dtype] * size, equal_nan=True, check_dtype=False
        )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_values_and_gradients(dtype, chunked, reduction):
    x, w, b = layer(dtype)
    options = dict(reduction=reduction, options=nn.LinearCrossEntropyOptions() if chunked else None)
    class_weight, soft = torch.linspace(0.5, 2, 7).to(dtype), torch.rand(8, 7).softmax(1).to(dtype)
    for bias, weight, smoothing in itertools.product((None, b), (None, class_weight), (0.0, 0.1)):
        own = options | dict(linear_bias=bias, weight=weight, label_smoothing=smoothing)
        assert_torchs(x, w, INDICES, **own)
        assert_torchs(x, w, soft, **own)
    assert_torchs(x, w, INDICES, ignore_index=6, **options)
    assert_torchs(x[0], w, INDICES[0], **options)
    assert_torchs(x[0], w, soft[0], **options)
    assert_torchs(x[:0], w, INDICES[:0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_torchs_chunks_give_the_same_by_name(dtype, reduction):
    """More rows than fit in one chunk, on both sides."""
    x, w, b = layer(dtype, rows=300, width=16, classes=90)
    target = torch.randint(90, (300,), generator=torch.Generator().manual_seed(1))
    target[::7] = -100
    own = dict(reduction=reduction)
    got = fr.linear_cross_entropy(x, w, target, b, **own)
    chunks = nn.LinearCrossEntropyOptions(batch_chunk_size=64, chunking_method=None)
    want = F.linear_cross_entropy(x, w, target, linear_bias=b, options=chunks, **own)
    results = (got, *torch.autograd.grad(got, (x, w, b))), (want, *torch.autograd.grad(want, (x, w, b)))
    for a, e in zip(*results, strict=True):
        assert (a - e).norm() <= TOLERANCE[dtype] * e.norm()


def test_the_module():
    for options in (None, nn.LinearCrossEntropyOptions(allow_retain_graph=True)):
        module = nn.LinearCrossEntropyLoss(5, 7, bias=True, label_smoothing=0.1, options=options)
        x, results = torch.randn(8, 5), []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            want = torch.autograd.grad(module(x, INDICES), module.parameters())
        with fr.patched(), ops_seen() as seen, warnings.catch_warnings():
            warnings.simplefilter("error")  # nothing of the options is ignored
            loss = module(x, INDICES)
            results = torch.autograd.grad(loss, module.parameters())
        assert OURS in seen
        torch.testing.assert_close(results, want)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_logits_are_never_there(smoothing):
    rows, classes = 4096, 512
    module = nn.LinearCrossEntropyLoss(4, classes, label_smoothing=smoothing)
    x, target = torch.randn(rows, 4), torch.randint(classes, (rows,))

    def largest():
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as p:
            module(x, target).backward()
        return max(e.nbytes() for e in p.profiler.kineto_results.events() if e.name() == "[memory]")

    assert largest() >= 4 * rows * classes
    with fr.patched():
        assert largest() <= 0.1 * 4 * rows * classes


def test_what_stays_torchs():
    x, w, _ = layer()
    assert_torchs(x, w, INDICES, options=nn.LinearCrossEntropyOptions(acc_policy="accurate"), ours=False)
    sized = nn.LinearCrossEntropyOptions(batch_chunk_size=3)
    assert_torchs(x, w, INDICES, options=sized, ours=False)
    soft = torch.rand(8, 7).softmax(1).requires_grad_()
    assert_torchs(x, w, soft, ours=False)  # to which a gradient flows
    weight = torch.rand(7, requires_grad=True)
    assert_torchs(x, w, soft.detach(), weight=weight, ours=False)
    deep = torch.randn(7, 2, 3, 5, requires_grad=True)
    assert_torchs(x, deep, torch.randint(7, (8, 2, 3)), ours=False)
    with fr.patched(), torch.autocast("cpu", torch.bfloat16), ops_seen() as seen:
        F.linear_cross_entropy(x, w, INDICES, options=nn.LinearCrossEntropyOptions())
    assert OURS not in seen


REFUSED = {
    "a class out of range": dict(target=torch.full((8,), 7)),
    "too few rows": dict(target=INDICES[:5]),
    "indices of 32 bits": dict(target=INDICES.int()),
    "integers of the logits' shape": dict(target=torch.zeros(8, 7, dtype=torch.int64)),
    "probabilities of another shape": dict(target=torch.rand(8, 6)),
    "ignore_index of probabilities": dict(target=torch.rand(8, 7), ignore_index=1),
    "another width": dict(linear_weight=torch.randn(7, 4)),
    "another dtype": dict(linear_weight=torch.randn(7, 5).double()),
    "a bias of another size": dict(linear_bias=torch.randn(6)),
    "a bias of another dtype": dict(linear_bias=torch.randn(7).double()),
    "class weights of another size": dict(weight=torch.rand(6)),
    "class weights of another dtype": dict(weight=torch.rand(7).double()),
    "three dimensions": dict(input=torch.randn(2, 4, 5)),
    "a vector as layer": dict(linear_weight=torch.randn(5)),
    "an unknown reduction": dict(reduction="average"),
    "a smoothing above 1": dict(label_smoothing=1.5),
    "no tensor": dict(input=[1.0]),
    "no tensor as target": dict(target=3),
    "no classes": dict(linear_weight=torch.randn(0, 5)),
}


@pytest.mark.parametrize("change", REFUSED.values(), ids=REFUSED)
def test_what_torch_refuses_is_refused(change):
    x, w, _ = layer()
    arguments = dict(input=x.detach(), linear_weight=w.detach(), target=INDICES) | change
    first = [arguments.pop(name) for name in ("input", "linear_weight", "target")]
    assert isinstance(outcome(*first, patched=False, **arguments)[0], Exception), "torch takes it"
    assert_torchs(*first, **arguments)


def test_autocast_derivatives_of_derivatives_and_a_kept_graph():
    x, w, b = layer()
    with fr.patched(), torch.autocast("cpu", torch.bfloat16):
        got = F.linear_cross_entropy(x, w, INDICES, linear_bias=b, weight=torch.ones(7))
    with torch.autocast("cpu", torch.bfloat16):
        want = F.linear_cross_entropy(x, w, INDICES, linear_bias=b, weight=torch.ones(7))
    assert got.dtype == want.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=1e-2, atol=0)
    x, w, b = layer(torch.float64)

    def loss(*inputs):
        return F.linear_cross_entropy(*inputs[:2], INDICES, linear_bias=inputs[2])

    with fr.patched():
        assert torch.autograd.gradcheck(loss, (x, w, b)) and torch.autograd.gradgradcheck(loss, (x, w, b))
        value = loss(x, w, b)
        twice = [torch.autograd.grad(value, x, retain_graph=True)[0] for _ in range(2)]
        assert torch.equal(*twice)
        torch.func.jvp(lambda t: loss(t, w, b), (x,), (x,))


@pytest.mark.parametrize("options", [False, True])
def test_compiled(options):
    x, w, b = layer()
    options = nn.LinearCrossEntropyOptions(allow_retain_graph=True) if options else None

    def loss(x, w, b):
        return F.linear_cross_entropy(x, w, INDICES, linear_bias=b, label_smoothing=0.1, options=options)

    with fr.patched(), ops_seen() as seen:
        got = torch.compile(loss, backend="aot_eager", fullgraph=True)(x, w, b)
        gradients = torch.autograd.grad(got, (x, w, b))
    assert OURS in seen
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = loss(x, w, b)
    torch.testing.assert_close(gradients, torch.autograd.grad(want, (x, w, b)))
    torch.testing.assert_close(got, want)


CODE = """
import torch.nn.functional as F
original = F.linear_cross_entropy
def linear_cross_entropy(input, linear_weight, target, *, linear_bias=None, weight=None, another=None):
    return "theirs"
F.linear_cross_entropy = linear_cross_entropy
import fastreg as fr
with fr.patched():
    assert F.linear_cross_entropy(1, 2, 3) == "theirs"
    assert F.dropout.__code__.co_filename.endswith("_exchange.py")
"""


def test_where_torchs_has_other_arguments_it_is_left_alone():
    """It is young; a release of torch that changes it must not keep fastreg from being imported."""
    run_python(CODE, check=True)
