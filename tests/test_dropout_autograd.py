"""Dropout's derivatives, and the doors of torch: opcheck, compile, checkpoint, autocast, torch.func,
DTensor.
"""

import weakref

import pytest
import torch
import torch.nn.functional as F
from dropout_reference import OP, OP_APPLY, OP_IN_PLACE, scale_of, values_reference
from helpers import assert_same_bits, on_ranks, with_seed
from torch.utils.checkpoint import checkpoint

import fastreg as fr


@pytest.mark.parametrize("noncontiguous", [False, True])
def test_the_gradient_is_scale_where_kept(dtype, noncontiguous):
    x = torch.randn(31, 67).to(dtype).requires_grad_()
    y, mask = fr.dropout_with_mask(x, 0.3, seed=2)
    assert y.requires_grad and not mask.requires_grad
    grad = torch.randn(67, 31).to(dtype).t() if noncontiguous else torch.randn(31, 67).to(dtype)
    y.backward(grad)
    assert_same_bits(x.grad, values_reference(grad, fr.unpack_mask(mask, x.shape), scale_of(0.3)))


FAMILY = {
    "dropout": lambda x, p=0.4: fr.dropout(x, p),
    "in place": lambda x, p=0.4: fr.dropout(x * 1.0, p, inplace=True),
    "with_mask": lambda x, p=0.4: fr.dropout_with_mask(x, p)[0],
    "dropout1d": lambda x, p=0.4: fr.dropout1d(x, p),
    "alpha": lambda x, p=0.4: fr.alpha_dropout(x, p, True),
    "feature_alpha": lambda x, p=0.4: fr.feature_alpha_dropout(x, p, True),
    "drop_path": lambda x, p=0.4: fr.drop_path(x, p),
    "textbook": lambda x, p=0.4: fr.dropout(x, p, rescale="inference"),
}


@pytest.mark.parametrize("name", FAMILY)
def test_gradcheck_first_and_second_order(name):
    def f(x):
        return with_seed(5, FAMILY[name], x).pow(3)

    x = torch.randn(4, 3, 2, dtype=torch.float64, requires_grad=True)
    assert (
        0 < (f(x) == f(torch.zeros_like(x))).sum() < x.numel()
    )  # some dropped, some kept: the check sees both
    assert torch.autograd.gradcheck(f, x)
    assert torch.autograd.gradgradcheck(f, x)
    assert torch.autograd.gradcheck(f, x, check_forward_ad=True, check_backward_ad=False)


def test_gradients_of_expanded_and_strided_layout():
    x = torch.randn(6, 5, 4, 3).to(memory_format=torch.channels_last).requires_grad_()
    y, mask = fr.dropout_with_mask(x, 0.3, seed=2)
    kept = fr.unpack_mask(mask, x.shape)
    y.sum().backward()  # the gradient that arrives is one number, expanded
    assert_same_bits(x.grad, values_reference(torch.ones(x.shape), kept, scale_of(0.3)))


# Less than a byte of the mask, one byte, whole bytes, and one bit more than whole bytes.
@pytest.mark.parametrize("n", [1, 8, 1000, 4097])
def test_one_bit_per_element_is_saved_and_the_input_is_let_go(dtype, n):
    saved = []
    x = torch.randn(n, dtype=torch.float32).to(dtype).requires_grad_()
    for run, bits in (
        (lambda t: fr.dropout(t, 0.5), n),
        (lambda t: fr.dropout(t * 1, 0.5, inplace=True), n),
        (lambda t: fr.dropout_with_mask(t, 0.5)[0], n),
        (lambda t: fr.drop_path(t.expand(3, n), 0.5), 3),
    ):
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
            y = run(x)
        assert [(t.dtype, t.numel()) for t in saved] == [(torch.uint8, (bits + 7) // 8)]
        y.sum().backward()
    hidden = x * 2
    y, reference = fr.dropout(hidden), weakref.ref(hidden)
    del hidden
    assert reference() is None and y.requires_grad


def test_retain_graph_repeats_and_a_freed_graph_says_so():
    x = torch.randn(50, requires_grad=True)
    y = fr.dropout(x)
    (first,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    (second,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(first, second) and first.any()
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y.sum(), x)


def test_in_place_means_what_it_means_in_torch():
    x = torch.randn(20, 30, requires_grad=True)
    hidden = x * 2
    version = hidden._version
    y = with_seed(1, fr.dropout, hidden, 0.3, inplace=True)
    assert y is hidden and hidden._version == version + 1
    want = with_seed(1, fr.dropout, (x * 2).detach(), 0.3)
    assert torch.equal(y, want)
    y.sum().backward()
    assert_same_bits(x.grad, torch.where(want != 0, torch.tensor(scale_of(0.3)) * 2, torch.tensor(0.0)))


def test_in_place_on_a_view_reaches_its_base():
    x = torch.randn(4, 50, requires_grad=True)
    base = x * 2
    fr.dropout(base[1], 0.5, inplace=True)
    kept = (base[1] != 0).detach()
    assert 0 < kept.sum() < 50
    base.sum().backward()
    want = torch.full((4, 50), 2.0)
    want[1] = torch.where(kept, 4.0, 0.0)
    assert torch.equal(x.grad, want)


def test_in_place_without_gradient_still_invalidates_what_was_saved():
    x, w = torch.randn(10), torch.randn(10, requires_grad=True)
    y = x * w  # saves x
    fr.dropout(x, 0.5, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    with torch.no_grad():
        leaf = torch.ones(1000, requires_grad=True)
        assert fr.dropout(leaf, 0.5, inplace=True) is leaf and 400 < (leaf == 0).sum() < 600
    with torch.inference_mode():
        t = torch.ones(1000)
        assert fr.dropout(t, 0.5, inplace=True) is t and 400 < (t == 0).sum() < 600


def test_in_place_errors_come_before_any_write():
    leaf = torch.ones(100, requires_grad=True)
    with pytest.raises(
        ValueError,
        match="dropout: inplace=True cannot overwrite a leaf tensor that requires a gradient; call it",
    ):
        fr.dropout(leaf, 0.5, inplace=True)
    shared = torch.ones(3, 1)
    for x in (shared.expand(3, 50), torch.ones(12).as_strided((5, 4), (2, 1))):
        with pytest.raises(
            ValueError,
            match=r"dropout: .*elements.* not share memory.*; call it",
        ):
            fr.dropout(x, 0.5, inplace=True)
        assert (x == 1).all()
    whole = torch.arange(10)
    with pytest.raises(ValueError, match=r"dropout: input must be float32, .*got (Long|torch.int64)"):
        fr.dropout(whole, 0.5, inplace=True)
    assert torch.equal(leaf.detach(), torch.ones(100)) and torch.equal(whole, torch.arange(10))


def test_negative_views():
    view = torch.randn(200, dtype=torch.complex64).conj().imag
    assert view.is_neg()
    assert torch.equal(
        fr.dropout_with_mask(view, seed=1)[0], fr.dropout_with_mask(view.resolve_neg(), seed=1)[0]
    )
    with pytest.raises(ValueError, match="negative view"):
        fr.dropout(view, inplace=True)


@pytest.mark.parametrize("layout", ["contiguous", "strided", "empty"])
def test_opcheck(dtype, layout):
    x = {
        "contiguous": torch.randn(3, 5, 8),
        "strided": torch.randn(8, 5, 6)[::2].transpose(0, 2),
        "empty": torch.empty(0, 4),
    }[layout]
    x, seed = x.to(dtype), torch.tensor([5])
    inner = 1 if layout == "empty" else 2
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for args in ((x, 0.3, seed), (x, 0.3, seed, 7, inner, 1.5, 0.5, -1.0)):
        torch.library.opcheck(OP, args, test_utils=utilities)
        torch.library.opcheck(OP_IN_PLACE, (x.clone(), *args[1:]), test_utils=utilities)
    mask = OP(x, 0.3, seed, 0, inner)[1]
    torch.library.opcheck(OP_APPLY, (x, mask, inner, 1.5, 0.5, -1.0), test_utils=utilities)


def compiled_equals_eager(f, inputs, backend, dynamic=None):
    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, backend=backend, dynamic=dynamic)
    for x in inputs:
        results = []
        for run in (f, compiled):
            leaf = x.clone().requires_grad_()
            y = with_seed(3, run, leaf)
            y.pow(2).sum().backward()
            results.append((y.detach(), leaf.grad))
        assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
        assert results[0][1].any()
        assert torch.equal(*(with_seed(4, run, x) for run in (f, compiled)))


@pytest.mark.parametrize("name", FAMILY)
def test_compile_aot_eager(name):
    compiled_equals_eager(FAMILY[name], [torch.randn(6, 5, 4)], "aot_eager")


@pytest.mark.parametrize("name", ["dropout", "in place", "dropout1d", "alpha"])
def test_compile_with_dynamic_shapes(name):
    compiled_equals_eager(
        FAMILY[name],
        [torch.randn(6, 5, 4), torch.randn(3, 9, 7), torch.randn(17, 2, 31)],
        "aot_eager",
        dynamic=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_inductor(dynamic):
    def f(x):
        y = fr.dropout(torch.relu(x) * 2, 0.3)
        return fr.dropout(fr.alpha_dropout(y + 1, 0.3, True) * 1.0, 0.5, inplace=True)

    compiled_equals_eager(f, [torch.randn(6, 5, 4), torch.randn(9, 7, 33)], "inductor", dynamic)


def test_compile_with_dynamic_shapes_and_many_layers():
    """Under dynamic=True every float with a name is a variable: modules' p, globals, default arguments."""
    modules = (
        fr.nn.Dropout(0.1),
        fr.nn.AlphaDropout(0.2),
        fr.nn.Dropout(0.1),
        fr.nn.DropPath(0.3),
        fr.nn.Dropout1d(0.1),
    )
    model = torch.nn.Sequential(*modules, fr.nn.FeatureAlphaDropout(0.1), fr.nn.AlphaDropout(0.3))
    for f in (model, lambda x: fr.alpha_dropout(fr.dropout(fr.alpha_dropout(x, 0.3, True), 0.5), 0.3, True)):
        compiled_equals_eager(f, [torch.randn(6, 5, 4), torch.randn(13, 9, 7)], "aot_eager", dynamic=True)


def test_compile_with_a_probability_that_changes():
    torch._dynamo.reset()
    compiled = torch.compile(fr.dropout, fullgraph=True, backend="aot_eager")
    x = torch.randn(100)
    for p in (0.3, 0.4, 0.5, 0.6, 0.0, 1.0):
        assert torch.equal(with_seed(1, compiled, x, p), with_seed(1, fr.dropout, x, p)), p


def test_compile_writes_in_place_into_the_callers_tensor():
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda t: fr.dropout(t, 0.5, inplace=True) + 1, fullgraph=True, backend="aot_eager"
    )
    mine, want = torch.ones(100), torch.ones(100)
    with_seed(1, compiled, mine)
    with_seed(1, fr.dropout, want, 0.5, inplace=True)
    assert torch.equal(mine, want) and 0 < (mine == 0).sum() < 100


def test_compile_saves_no_more_than_the_mask():
    torch._dynamo.reset()
    saved = []
    compiled = torch.compile(lambda t: fr.dropout(t, 0.5), fullgraph=True, backend="aot_eager")
    x = torch.randn(8000, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        y = compiled(x)
    assert 0 < sum(t.nbytes for t in saved) <= 1008
    y.sum().backward()
    assert torch.equal(x.grad != 0, y != 0)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", FAMILY)
def test_checkpoint_draws_the_same_mask_again(name, use_reentrant):
    x = torch.randn(16, 9, 5, requires_grad=True)
    want = with_seed(2, FAMILY[name], x)
    (want_grad,) = torch.autograd.grad(want.pow(2).sum(), x)
    torch.manual_seed(2)
    y = checkpoint(FAMILY[name], x, use_reentrant=use_reentrant)
    torch.rand(100)  # the generator moves on between forward and recomputation
    y.pow(2).sum().backward()
    assert torch.equal(y, want) and torch.equal(x.grad, want_grad)


def test_no_grad_and_inference_mode():
    x = torch.randn(100, requires_grad=True)
    want = with_seed(1, fr.dropout, x).detach()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y = with_seed(1, fr.dropout, x)
            assert not y.requires_grad and torch.equal(y, want)
            y, mask = fr.dropout_with_mask(x, seed=1)
            assert not y.requires_grad and mask.numel() == 13


def test_autocast_changes_nothing(dtype):
    x = torch.randn(100).to(dtype).requires_grad_()
    want = with_seed(1, fr.dropout, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = with_seed(1, fr.dropout, x)
        assert F.dropout(x).dtype == y.dtype == dtype and torch.equal(y, want)
    y.sum().backward()
    assert torch.equal(x.grad != 0, y != 0)


@pytest.mark.parametrize("name", FAMILY)
def test_manual_seed_reproduces_and_a_second_call_differs(name):
    x = torch.randn(64, 40, 3)
    a, b = with_seed(1, FAMILY[name], x), FAMILY[name](x)
    assert torch.equal(with_seed(1, FAMILY[name], x), a) and not torch.equal(a, b)


def test_a_generator_is_reproducible_and_leaves_the_global_one_alone():
    x = torch.randn(20, 30, 2)
    calls = (
        lambda g: fr.dropout(x, generator=g),
        lambda g: fr.dropout_with_mask(x, generator=g)[0],
        lambda g: fr.dropout1d(x, generator=g),
        lambda g: fr.dropout2d(x[None], generator=g),
        lambda g: fr.dropout3d(x[..., None, None], generator=g),
        lambda g: fr.alpha_dropout(x, training=True, generator=g),
        lambda g: fr.feature_alpha_dropout(x, training=True, generator=g),
        lambda g: fr.drop_path(x, generator=g),
    )
    for call in calls:
        state = torch.get_rng_state()
        g = torch.Generator().manual_seed(7)
        a, b = call(g), call(g)
        torch.rand(3)
        assert torch.equal(call(torch.Generator().manual_seed(7)), a) and not torch.equal(a, b)
        torch.set_rng_state(state)
        call(g)
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", [name for name in FAMILY if name != "drop_path"])
def test_torch_func(name):
    f = FAMILY[name]
    x = torch.randn(3, 4, dtype=torch.float64)
    if name == "dropout1d":
        x = torch.randn(3, 4, 2, dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    (want,) = torch.autograd.grad(with_seed(1, f, leaf).pow(2).sum(), leaf)
    loss = lambda t: f(t).pow(2).sum()  # noqa: E731
    torch.testing.assert_close(with_seed(1, torch.func.grad(loss), x), want)
    output, tangent = with_seed(1, torch.func.jvp, f, (x,), (torch.ones_like(x),))
    jacobian = with_seed(1, torch.func.jacrev(f), x)
    torch.testing.assert_close(jacobian.reshape(x.numel(), -1).sum(1), tangent.flatten())
    torch.testing.assert_close(output, with_seed(1, f, x))
    same = with_seed(1, torch.func.vmap(f, randomness="same"), torch.stack([x, 2 * x]))
    torch.testing.assert_close(same[0], with_seed(1, f, x))
    torch.testing.assert_close(same[1], with_seed(1, f, 2 * x))
    grads = with_seed(1, torch.func.vmap(torch.func.grad(loss), randomness="same"), torch.stack([x, x]))
    torch.testing.assert_close(grads[1], want)
    different = torch.func.vmap(f, randomness="different")(x.expand(20, *x.shape))
    assert len({tuple(sample.flatten().tolist()) for sample in different}) > 3
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(f)(torch.stack([x, x]))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", FAMILY)
def test_where_everything_is_dropped_vmap_need_not_draw(name):
    """As in torch, whose dropout draws nothing for p = 1: a vmap that refuses random numbers has a result."""
    x = torch.randn(3, 4, 2, dtype=torch.float64)
    f = FAMILY[name]
    want = 0.0 if "alpha" not in name else f(x, 1.0)[0, 0, 0]
    squares = lambda t: f(t, 1.0).pow(2).sum()  # noqa: E731
    for derivative in (torch.func.grad, torch.func.jacfwd, torch.func.hessian):
        assert not derivative(squares)(x).any()
        assert not torch.func.vmap(derivative(squares))(torch.stack([x, x])).any()
    assert torch.equal(
        torch.func.vmap(lambda t: f(t, 1.0))(torch.stack([x, x])), torch.zeros(2, 3, 4, 2) + want
    )
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(lambda t: f(t, 0.5))(torch.stack([x, x]))


def test_torch_func_gives_the_bits_of_the_op(dtype):
    x = torch.randn(700).to(dtype)
    for name in ("dropout", "alpha"):
        output, _ = with_seed(1, torch.func.jvp, FAMILY[name], (x,), (x,))
        assert_same_bits(output, with_seed(1, FAMILY[name], x))


def test_compiled_torch_func_gradient():
    torch._dynamo.reset()
    f = torch.func.grad(lambda t: fr.dropout(t).pow(2).sum())
    x = torch.randn(40)
    got = with_seed(1, torch.compile(f, fullgraph=True, backend="aot_eager"), x)
    assert torch.equal(got, with_seed(1, f, x)) and got.any()


def test_meta_and_fake_tensors():
    x = torch.empty(3, 4, 5, 6, device="meta").to(memory_format=torch.channels_last)
    y = fr.dropout(x)
    assert y.device.type == "meta" and y.stride() == x.stride()
    assert fr.dropout_with_mask(x)[1].shape == (45,)
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        y, mask = fr.dropout_with_mask(torch.empty(3, 7, dtype=torch.bfloat16, requires_grad=True))
        assert y.shape == (3, 7) and y.dtype == torch.bfloat16 and mask.shape == (3,)


def _on_shards(rank):
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (2,))
    # Sides that two ranks share evenly, unevenly, and so that one of them gets nothing.
    for shape in ((8, 6), (7, 3, 5), (1, 5, 2, 3)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        channels = fr.dropout2d if len(shape) == 4 else fr.dropout1d
        for f in (fr.dropout, channels, fr.drop_path, lambda t: fr.alpha_dropout(t, 0.5, True)):
            for placement in (Replicate(), Shard(0), Shard(1)):
                whole = x.clone().requires_grad_()
                want = with_seed(1, f, whole)
                want.pow(2).sum().backward()
                part = distribute_tensor(x, mesh, [placement]).requires_grad_()
                got = with_seed(1 + rank, f, part)  # ranks that seed differently agree all the same
                got.pow(2).sum().backward()
                assert got.placements == (placement,)
                assert torch.equal(got.full_tensor(), want) and torch.equal(
                    part.grad.full_tensor(), whole.grad
                )
    part = distribute_tensor(torch.ones(6, 4), mesh, [Shard(0)])
    assert fr.dropout(part, 0.5, inplace=True) is part and 0 < (part.full_tensor() == 0).sum() < 24
    with pytest.raises(
        TypeError, match=r"dropout_with_mask: input must be a plain tensor, got a DTensor; give it \.to_local"
    ):
        fr.dropout_with_mask(part)


@pytest.mark.slow
def test_dtensor_draws_what_the_whole_tensor_draws():
    on_ranks(2, _on_shards)
