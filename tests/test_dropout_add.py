"""dropout_add: the mask is dropout's for the same seed, the values are one rounding of (x + bias) * scale +
residual where kept, the residual elsewhere, whatever the layout or the threads; the derivatives read one bit
per element; and all of it holds through every door of torch. References are plain torch and take nothing from
the op but the mask of `fr.dropout`."""

import copy
import math
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same_bits, on_ranks, threads, with_seed
from torch.utils.checkpoint import checkpoint

import fastreg as fr

OP = torch.ops.fastreg.dropout_add.default
# Rows of the bias shorter and longer than vectors, and around blocks of 1024.
SHAPES = [
    (1,),
    (7,),
    (5, 3),
    (3, 5, 7),
    (40, 33),
    (2, 3, 1023),
    (3, 1024),
    (9, 1025),
    (2, 2500),
    (0, 4),
    (4, 0),
]


def tensors(shape, dtype=torch.float32, bias=True):
    x, residual = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    return x, residual, torch.randn(shape[-1:]).to(dtype) if bias else None


def kept_by_dropout(shape, p, seed):
    """What fr.dropout keeps of a tensor of that shape after torch.manual_seed(seed)."""
    return with_seed(seed, fr.dropout, torch.ones(shape, dtype=torch.float64), p) != 0


def reference(x, residual, kept, p, bias=None):
    """In float64."""
    value = x.double() if bias is None else x.double() + bias.double()
    threshold = math.floor((1 - p) * 2**32 + 0.5)
    return torch.where(
        kept, value * (2**32 / threshold if threshold else 0.0) + residual.double(), residual.double()
    )


def assert_rounded(got, want, terms):
    """`got` is `want` after one rounding to its dtype, its arithmetic rounded to float32 (float64) at most
    three times before.
    """
    arithmetic = torch.float64 if got.dtype == torch.float64 else torch.float32
    slack = 3 * torch.finfo(arithmetic).eps * terms
    assert (got.double() - want).abs().le(slack + torch.finfo(got.dtype).eps / 2 * want.abs()).all()


# --------------------------------------------------------------------------------------------------
# the values
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("p", [0.1, 0.5, 1 - 1e-9])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_against_float64(shape, p, bias, dtype):
    x, residual, b = tensors(shape, dtype, bias)
    got = with_seed(3, fr.dropout_add, x, residual, p, b)
    kept = kept_by_dropout(shape, p, 3)
    terms = (x.double().abs() + (b.double().abs() if bias else 0)) / (1 - p) + residual.double().abs()
    assert got.dtype == dtype and got.shape == x.shape
    assert_rounded(got, reference(x, residual, kept, p, b), terms)
    assert torch.equal(got[~kept], residual[~kept])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
# Less than a vector, odd sides, and rows longer than a block of 1024.
@pytest.mark.parametrize("shape", [(7,), (33, 65), (5, 3, 1030)])
@pytest.mark.parametrize("p", [0.0, 0.3, 1 / 3, 1.0])
def test_the_bits_are_those_of_dropout_and_additions(shape, p, dtype):
    x, residual, bias = tensors(shape, dtype)
    for b in (None, bias):
        want = with_seed(5, fr.dropout, x if b is None else x + b, p) + residual
        assert torch.equal(with_seed(5, fr.dropout_add, x, residual, p, b), want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_sixteen_bits_are_float32_arithmetic_rounded_once(dtype):
    x, residual, bias = tensors((61, 129), dtype)
    for b in (None, bias):
        for p in (0.0, 0.1, 0.5):
            wide = [None if t is None else t.float() for t in (x, residual, b)]
            want = with_seed(5, fr.dropout_add, wide[0], wide[1], p, wide[2]).to(dtype)
            assert torch.equal(with_seed(5, fr.dropout_add, x, residual, p, b), want)
    twice = with_seed(5, fr.dropout, x + bias, 0.1) + residual
    assert not torch.equal(
        with_seed(5, fr.dropout_add, x, residual, 0.1, bias), twice
    )  # what rounding thrice gives


def test_evaluation_and_the_ends_of_p(dtype):
    x, residual, bias = tensors((6, 11), dtype)
    state = torch.get_rng_state()
    for b in (None, bias):
        want = reference(x, residual, torch.tensor(True), 0.0, b)
        for got in (fr.dropout_add(x, residual, 0.0, b), fr.dropout_add(x, residual, 0.7, b, False)):
            assert_rounded(got, want, x.double().abs() + bias.double().abs() + residual.double().abs())
    assert torch.equal(torch.get_rng_state(), state)  # nothing was drawn
    for one in (1, 1.0):
        got = fr.dropout_add(x, residual, one, bias)
        assert torch.equal(got, residual) and got.data_ptr() != residual.data_ptr()


def test_a_dropped_infinity_or_nan_does_not_show(dtype):
    hostile = torch.tensor([math.inf, -math.inf, math.nan, 1.0] * 100, dtype=dtype)
    residual = torch.randn(400).to(dtype)
    kept = kept_by_dropout((400,), 0.5, 1)
    got = with_seed(1, fr.dropout_add, hostile, residual, 0.5)
    assert torch.equal(got[~kept], residual[~kept])
    assert_same_bits(got[kept], (hostile[kept].double() * 2 + residual[kept].double()).to(dtype))
    got = with_seed(1, fr.dropout_add, residual, hostile, 0.5)  # in the residual it stays
    assert torch.equal(got.isnan(), hostile.isnan()) and torch.equal(got.isinf(), hostile.isinf())
    got = with_seed(1, fr.dropout_add, residual.view(1, 400), residual.view(1, 400), 0.5, hostile)
    assert torch.equal(got.view(400).isfinite(), hostile.isfinite() | ~kept)


@pytest.mark.parametrize("layout", ["transposed", "channels_last", "steps", "expanded", "offset"])
def test_memory_layouts(layout, dtype):
    change = {
        "transposed": lambda t: t.transpose(0, 2).contiguous().transpose(0, 2),
        "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
        "steps": lambda t: t.repeat_interleave(3, -1)[..., ::3],
        "expanded": lambda t: t[:1].expand(t.shape),
        "offset": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape),
    }[layout]
    x, residual, bias = tensors((4, 3, 17, 29), dtype)
    spread = torch.stack([bias, bias], 1)[:, 0]
    for a, r in ((change(x), residual), (x, change(residual)), (change(x), change(residual))):
        got = with_seed(2, fr.dropout_add, a, r, 0.3, spread)
        assert torch.equal(got, with_seed(2, fr.dropout_add, a.contiguous(), r.contiguous(), 0.3, bias))
        assert got.stride() == torch.empty_like(a).stride()


def test_threads_do_not_change_bits(dtype):
    x, residual, bias = tensors((70, 1999), dtype)
    results = []
    for count in (1, 2, 5):
        with threads(count):
            results.append(with_seed(4, fr.dropout_add, x, residual, 0.3, bias))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_no_dimensions(dtype):
    x, residual = torch.tensor(3.0, dtype=dtype), torch.tensor(0.5, dtype=dtype)
    assert {with_seed(seed, fr.dropout_add, x, residual).item() for seed in range(20)} == {0.5, 6.5}
    assert fr.dropout_add(x, residual, 0.0).shape == ()


# --------------------------------------------------------------------------------------------------
# autograd
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(7,), (5, 3), (4, 0), (3, 5, 130)])
def test_gradients(shape, bias, dtype):
    x, residual, b = tensors(shape, dtype, bias)
    leaves = [None if t is None else t.requires_grad_() for t in (x, residual, b)]
    y = with_seed(1, fr.dropout_add, *leaves[:2], 0.3, leaves[2])
    grad = torch.randn(shape).to(dtype)
    y.backward(grad)
    kept = kept_by_dropout(shape, 0.3, 1)
    want = reference(grad, torch.zeros(shape), kept, 0.3)
    half_unit = torch.finfo(dtype).eps / 2
    assert torch.equal(residual.grad, grad)
    assert_rounded(x.grad, want, want.abs())
    if bias:
        rows = want.reshape(-1, shape[-1]) if want.numel() else want.new_zeros(1, shape[-1])
        slack = half_unit * (4 * rows.abs().sum(0) + rows.sum(0).abs())
        assert (b.grad.double() - rows.sum(0)).abs().le(slack).all()


def test_the_gradient_of_a_long_bias_is_summed_in_float32():
    """4096 equal gradients in bfloat16: added up in bfloat16 they would end at 256."""
    x = torch.zeros(4096, 3, dtype=torch.bfloat16)
    bias = torch.zeros(3, dtype=torch.bfloat16, requires_grad=True)
    fr.dropout_add(x, x, 0.5, bias).sum().backward()
    assert (bias.grad - 4096).abs().max() < 400


@pytest.mark.parametrize("wanted", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1), (1, 1, 1)])
def test_only_what_is_asked_for(wanted):
    leaves = [t.requires_grad_(bool(flag)) for t, flag in zip(tensors((6, 5)), wanted, strict=True)]
    for p in (0.4, 0.0):
        for leaf in leaves:
            leaf.grad = None
        with_seed(1, fr.dropout_add, *leaves[:2], p, leaves[2]).sum().backward()
        kept = kept_by_dropout((6, 5), p, 1)
        expected = kept / (1 - p), torch.ones(6, 5), (kept / (1 - p)).sum(0)
        for leaf, flag, want in zip(leaves, wanted, expected, strict=True):
            assert (leaf.grad is not None) == bool(flag)
            if flag:
                torch.testing.assert_close(leaf.grad, want.float())


@pytest.mark.parametrize("p", [0.0, 0.4, 1.0])
# One row, and rows of several dimensions over which the gradient of the bias is summed.
@pytest.mark.parametrize("shape", [(5,), (4, 3, 2)])
def test_gradcheck_first_and_second_order(shape, p):
    leaves = [t.requires_grad_() for t in tensors(shape, torch.float64)]

    def f(x, residual, bias):
        return with_seed(5, fr.dropout_add, x, residual, p, bias).pow(3)

    assert torch.autograd.gradcheck(f, leaves)
    assert torch.autograd.gradgradcheck(f, leaves)
    assert torch.autograd.gradcheck(f, leaves, check_forward_ad=True, check_backward_ad=False)
    assert torch.autograd.gradcheck(lambda x, residual: f(x, residual, None), leaves[:2])


# Less than a byte of the mask, one byte, whole bytes, and one bit more than whole bytes.
@pytest.mark.parametrize("n", [1, 8, 1000, 4097])
def test_one_bit_per_element_is_saved(n, dtype):
    x, residual, bias = (t.requires_grad_() for t in tensors((n,), dtype))
    for p, sizes in ((0.5, [(torch.uint8, (n + 7) // 8)]), (0.0, [])):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: (saved.append(t), t)[1], lambda t: t
        ):
            y = fr.dropout_add(x, residual, p, bias)
        assert [(t.dtype, t.numel()) for t in saved] == sizes
        y.sum().backward()


def test_expanded_and_repeated_gradients():
    x, residual, bias = (t.requires_grad_() for t in tensors((6, 5)))
    y = with_seed(1, fr.dropout_add, x, residual, 0.4, bias)
    first = torch.autograd.grad(y.sum(), (x, residual, bias), retain_graph=True)
    second = torch.autograd.grad(y.sum(), (x, residual, bias))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)) and first[0].any()
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y.sum(), x)


def test_one_tensor_in_two_places():
    x = torch.randn(8, 5, requires_grad=True)
    with_seed(1, fr.dropout_add, x, x, 0.4).sum().backward()
    torch.testing.assert_close(x.grad, kept_by_dropout((8, 5), 0.4, 1) / 0.6 + 1.0, check_dtype=False)


# --------------------------------------------------------------------------------------------------
# doors of torch
@pytest.mark.parametrize("layout", ["contiguous", "strided", "empty"])
def test_opcheck(layout, dtype):
    x = {
        "contiguous": torch.randn(3, 5, 8),
        "strided": torch.randn(8, 5, 6)[::2].transpose(0, 2),
        "empty": torch.empty(0, 4),
    }[layout].to(dtype)
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for bias in (None, torch.randn(x.shape[-1:]).to(dtype)):
        torch.library.opcheck(OP, (x, x.clone(), bias, 0.3, torch.tensor([5]), 1.5), test_utils=utilities)


def compiled_equals_eager(f, shapes, backend, dynamic=None, same=torch.equal):
    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, backend=backend, dynamic=dynamic)
    for shape in shapes:
        inputs, results = tensors(shape), []
        for run in (f, compiled):
            leaves = [t.clone().requires_grad_() for t in inputs]
            y = with_seed(3, run, *leaves)
            y.pow(2).sum().backward()
            results.append([y.detach(), *(leaf.grad for leaf in leaves)])
        assert all(same(a, b) for a, b in zip(*results, strict=True)) and results[0][1].any()
        assert torch.equal(*(with_seed(4, run, *inputs) for run in (f, compiled)))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    def f(x, residual, bias):
        hidden = fr.dropout_add(x, residual, 0.3, bias)
        return fr.dropout_add(fr.nn.DropoutAdd(0.1)(x, hidden), residual, 0.5, bias, False)

    compiled_equals_eager(f, [(6, 5, 4), (3, 9, 7)] if dynamic else [(6, 5, 4)], "aot_eager", dynamic)


@pytest.mark.slow
def test_compile_inductor():
    f = lambda x, residual, bias: fr.dropout_add(x.relu(), residual, 0.3, bias) * 2  # noqa: E731
    compiled_equals_eager(
        f, [(6, 40)], "inductor", same=torch.allclose
    )  # it adds up the bias's gradient in its own order


def test_compile_saves_no_more_than_the_mask():
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, r, b: fr.dropout_add(x, r, 0.5, b), fullgraph=True, backend="aot_eager"
    )
    leaves, saved = [t.requires_grad_() for t in tensors((100, 80))], []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        y = compiled(*leaves)
    assert 0 < sum(t.nbytes for t in saved) <= 1008
    y.sum().backward()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint_draws_the_same_mask_again(use_reentrant):
    leaves = [t.requires_grad_() for t in tensors((16, 45))]
    f = lambda x, residual, bias: fr.dropout_add(x, residual, 0.4, bias)  # noqa: E731
    want = with_seed(2, f, *leaves)
    wanted = torch.autograd.grad(want.pow(2).sum(), leaves)
    torch.manual_seed(2)
    y = checkpoint(f, *leaves, use_reentrant=use_reentrant)
    torch.rand(100)
    y.pow(2).sum().backward()
    assert torch.equal(y, want) and all(
        torch.equal(leaf.grad, g) for leaf, g in zip(leaves, wanted, strict=True)
    )


def test_no_grad_and_inference_mode():
    leaves = [t.requires_grad_() for t in tensors((9, 5))]
    want = with_seed(1, fr.dropout_add, *leaves[:2], 0.5, leaves[2]).detach()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y = with_seed(1, fr.dropout_add, *leaves[:2], 0.5, leaves[2])
            assert not y.requires_grad and torch.equal(y, want)


def test_autocast_is_compiled():
    x, residual, bias = tensors((6, 5), torch.bfloat16)
    f = lambda x, residual, bias: fr.dropout_add(x, residual, 0.3, bias)  # noqa: E731
    with torch.autocast("cpu", torch.bfloat16):
        args = x, residual.float(), bias.float()
        got = with_seed(1, torch.compile(f, fullgraph=True, backend="aot_eager"), *args)
        assert got.dtype == torch.float32 and torch.equal(got, with_seed(1, f, *args))


def test_autocast_brings_the_three_together():
    x, residual, bias = tensors((6, 5))
    linear = torch.nn.Linear(5, 5, bias=False)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = linear(x)
        assert hidden.dtype == torch.bfloat16
        leaf = hidden.detach().requires_grad_()
        y = with_seed(1, fr.dropout_add, leaf, residual, 0.3, bias)
        assert y.dtype == torch.float32
        assert torch.equal(y, with_seed(1, fr.dropout_add, hidden.float(), residual, 0.3, bias))
        y.sum().backward()
        assert leaf.grad.dtype == torch.bfloat16 and leaf.grad.any()
        narrow = with_seed(1, fr.dropout_add, hidden, residual.bfloat16(), 0.3)
        assert narrow.dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"residual must be torch\.bfloat16"):
        fr.dropout_add(hidden, residual)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_torch_func():
    x, residual, bias = tensors((3, 4), torch.float64)
    f = lambda x, residual, bias: fr.dropout_add(x, residual, 0.4, bias)  # noqa: E731
    loss = lambda *args: f(*args).pow(2).sum()  # noqa: E731
    leaves = [t.clone().requires_grad_() for t in (x, residual, bias)]
    want = torch.autograd.grad(with_seed(1, loss, *leaves), leaves)
    got = with_seed(1, torch.func.grad(loss, argnums=(0, 1, 2)), x, residual, bias)
    torch.testing.assert_close(got, want)
    output, _ = with_seed(1, torch.func.jvp, f, (x, residual, bias), (x, residual, bias))
    torch.testing.assert_close(output, with_seed(1, f, x, residual, bias))
    batch = torch.stack([x, 2 * x]), torch.stack([residual, residual])
    same = with_seed(1, torch.func.vmap(f, in_dims=(0, 0, None), randomness="same"), *batch, bias)
    torch.testing.assert_close(same[1], with_seed(1, f, 2 * x, residual, bias))
    evaluated = torch.func.vmap(lambda x, r: fr.dropout_add(x, r, 0.4, bias, False))(*batch)
    torch.testing.assert_close(evaluated, batch[0] + bias + batch[1])
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(f, in_dims=(0, 0, None))(*batch, bias)
    dropped = torch.func.vmap(lambda x, r: fr.dropout_add(x, r, 1.0, bias))(*batch)
    torch.testing.assert_close(dropped, batch[1])


def test_torch_func_gives_the_bits_of_the_op(dtype):
    x, residual, bias = tensors((20, 35), dtype)
    for p in (0.0, 0.3):
        f = lambda x, p=p: fr.dropout_add(x, residual, p, bias)  # noqa: E731
        output, _ = with_seed(1, torch.func.jvp, f, (x,), (x,))
        assert torch.equal(output, with_seed(1, f, x))


def test_meta_tensors():
    x = torch.empty(3, 4, 5, 6, device="meta").to(memory_format=torch.channels_last)
    y = fr.dropout_add(x, x, 0.3, torch.empty(6, device="meta"))
    assert y.device.type == "meta" and y.stride() == x.stride()


def test_a_generator_is_reproducible_and_leaves_the_global_one_alone():
    x, residual, bias = tensors((20, 30))
    state, g = torch.get_rng_state(), torch.Generator().manual_seed(7)
    a, b = (fr.dropout_add(x, residual, 0.5, bias, generator=g) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state) and not torch.equal(a, b)
    again = torch.Generator().manual_seed(7)
    assert torch.equal(fr.dropout_add(x, residual, 0.5, bias, generator=again), a)
    assert torch.equal(a, fr.dropout(x + bias, 0.5, generator=torch.Generator().manual_seed(7)) + residual)


def _on_shards(rank):
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (2,))
    whole = [torch.randn(s, generator=torch.Generator().manual_seed(0)) for s in ((7, 6), (7, 6), (6,))]
    for p in (0.4, 0.0):
        leaves = [t.clone().requires_grad_() for t in whole]
        want = with_seed(1, fr.dropout_add, *leaves[:2], p, leaves[2])
        want.pow(2).sum().backward()
        for placement in (Replicate(), Shard(0), Shard(1)):
            of_bias = Shard(0) if placement == Shard(1) else Replicate()
            placements = (placement, placement, of_bias)
            parts = [
                distribute_tensor(t, mesh, [by]).requires_grad_()
                for t, by in zip(whole, placements, strict=True)
            ]
            got = with_seed(1 + rank, fr.dropout_add, *parts[:2], p, parts[2])
            got.pow(2).sum().backward()
            assert torch.equal(got.full_tensor(), want)
            for part, leaf in zip(parts, leaves, strict=True):
                torch.testing.assert_close(part.grad.full_tensor(), leaf.grad)


@pytest.mark.slow
def test_dtensor_draws_what_the_whole_tensor_draws():
    on_ranks(2, _on_shards)


# --------------------------------------------------------------------------------------------------
# the module
def test_module():
    x, residual, bias = tensors((6, 5))
    module = fr.nn.DropoutAdd(0.3)
    want = with_seed(1, fr.dropout_add, x, residual, 0.3, bias)
    for copied in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(with_seed(1, copied, x, residual, bias), want)
    assert torch.equal(module.eval()(x, residual), x + residual)
    assert repr(module) == "DropoutAdd(p=0.3)" and not list(module.parameters()) and not module.state_dict()
    with pytest.raises(ValueError, match=r"DropoutAdd: p must be in \[0, 1\], got 1.5"):
        fr.nn.DropoutAdd(1.5)


# --------------------------------------------------------------------------------------------------
# hostile
X = torch.randn(4, 6)
WRONG = {
    "p": (ValueError, r"p must be in \[0, 1\], got 1.5", lambda: fr.dropout_add(X, X, 1.5)),
    "p is NaN": (ValueError, r"p must be in \[0, 1\], got nan", lambda: fr.dropout_add(X, X, math.nan)),
    "p is a bias": (TypeError, "p must be a number, got Tensor", lambda: fr.dropout_add(X, X, X[0])),
    "input": (TypeError, "input must be a torch.Tensor, got list", lambda: fr.dropout_add([1.0], X)),
    "residual": (TypeError, "residual must be a torch.Tensor, got float", lambda: fr.dropout_add(X, 1.0)),
    "bias": (TypeError, "bias must be a torch.Tensor, got float", lambda: fr.dropout_add(X, X, 0.5, 1.0)),
    "shape": (
        ValueError,
        r"residual must have the shape of input, \(4, 6\), got \(6,\); broadcast it with .expand_as\(input\)",
        lambda: fr.dropout_add(X, X[0]),
    ),
    "a larger residual": (ValueError, "residual must have the shape", lambda: fr.dropout_add(X[0], X, 0.0)),
    "dtype": (
        ValueError,
        r"residual must be torch.float32 on cpu as input is, got torch.float64 on cpu; convert it with "
        r".to\(input\)",
        lambda: fr.dropout_add(X, X.double()),
    ),
    "device": (
        ValueError,
        "residual must be .* got torch.float32 on meta",
        lambda: fr.dropout_add(X, X.to("meta")),
    ),
    "columns": (
        ValueError,
        r"bias must have one value per column, shape \(6,\), got \(4,\) for input of shape \(4, 6\); add one "
        r"of another shape",
        lambda: fr.dropout_add(X, X, 0.5, X[:, 0]),
    ),
    "a bias of one": (
        ValueError,
        r"bias must .* got \(1,\)",
        lambda: fr.dropout_add(X, X, 0.5, X[0, :1], False),
    ),
    "a bias of a matrix": (
        ValueError,
        r"bias must .* got \(1, 6\)",
        lambda: fr.dropout_add(X, X, 0.5, X[:1]),
    ),
    "no column": (
        ValueError,
        r"bias must .* got \(\)",
        lambda: fr.dropout_add(X[0, 0], X[0, 0], 0.5, X[0, 0]),
    ),
    "dtype of the bias": (
        ValueError,
        "bias must be torch.float32",
        lambda: fr.dropout_add(X, X, 0.5, X[0].half()),
    ),
    "integers": (ValueError, "input must be float32, .* got Int", lambda: fr.dropout_add(X.int(), X.int())),
    "sparse": (ValueError, "expected dense tensors", lambda: fr.dropout_add(X.to_sparse(), X.to_sparse())),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors(name):
    kind, text, call = WRONG[name]
    state = torch.get_rng_state()
    with pytest.raises(kind, match=f"^dropout_add: .*{text}"):
        call()
    if name not in ("integers", "sparse"):  # which the kernel says, after the draw
        assert torch.equal(torch.get_rng_state(), state)


def test_the_operator_itself_refuses_what_would_read_beyond():
    seed = torch.tensor([1])
    for args, text in (
        ((X, X[:2], None, 0.5, seed), r"residual must have the shape of input, \(4, 6\), got \(2, 6\)"),
        ((X, X.double(), None, 0.5, seed), "residual must have the dtype of input"),
        (
            (X, X, X[0, :3], 0.5, seed),
            r"bias must have the size of input's last dimension, got \(3,\) for \(4, 6\)",
        ),
        ((X, X, X[:1], 0.5, seed), "bias must have the size"),
        ((X, X, X[0].double(), 0.5, seed), "bias must have the dtype of input"),
        ((X.t(), X.t(), X[:, 0], 0.5, seed), "bias must be contiguous"),
        ((X, X, None, 1.5, seed), r"p must be in \[0, 1\]"),
        ((X, X, None, 0.5, seed.float()), "seed must be one int64"),
    ):
        with pytest.raises(ValueError, match=f"^dropout_add: {text}"):
            OP(*args)


def test_torch_agrees_in_the_mean():
    """p and scale are those of torch: the mean over many draws is input + bias + residual for both."""
    x, residual, bias = tensors((4000, 8), torch.float64)
    sigma = ((x + bias).pow(2).sum() * 0.3 / 0.7).sqrt()
    for y in (fr.dropout_add(x, residual, 0.3, bias), F.dropout(x + bias, 0.3) + residual):
        assert (y - x - bias - residual).sum().abs() < 5 * sigma


def test_the_docstring_names_every_argument():
    for name in ("input", "residual", "p", "bias", "training", "generator"):
        assert re.search(rf"\n        {name}: ", fr.dropout_add.__doc__)
