"""Complex parameters of the optimisers: the numbers, states and state dicts of torch's."""

import copy
import warnings

import pytest
import torch
from helpers import on_ranks
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import fastreg as fr

DTYPES = [torch.complex64, torch.complex128, torch.complex32]
OPTIONS = {
    "SGD": dict(lr=0.1),
    "SGD, decay": dict(lr=0.1, weight_decay=0.1, maximize=True),
    "SGD, momentum": dict(lr=0.1, momentum=0.9, dampening=0.3, foreach=True),
    "SGD, Nesterov": dict(lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1, foreach=False),
    "SGD, tensor": dict(lr=torch.tensor(0.1).double(), momentum=0.9),
    "AdamW": dict(lr=0.1, foreach=True),
    "AdamW, amsgrad": dict(lr=0.1, amsgrad=True, weight_decay=0.1, foreach=False),
    "AdamW, tensor": dict(lr=torch.tensor(0.1).double(), maximize=True, eps=1e-4),
}
every = pytest.mark.parametrize("name", OPTIONS)
both = pytest.mark.parametrize("kind", ["SGD", "AdamW"])


def numbers(*shape, seed=0, dtype=torch.complex128):
    generator = torch.Generator().manual_seed(seed)
    return torch.view_as_complex(torch.randn(*shape, 2, generator=generator, dtype=torch.float64)).to(dtype)


def weights(dtype=torch.complex128):
    """Of several shapes and strides, beside a real one."""
    complexes = [
        numbers(3, 5),
        numbers(4, 3, seed=1).t(),
        numbers(seed=2),
        numbers(0),
        numbers(6, seed=3)[::2],
    ]
    return [nn.Parameter(w.to(dtype)) for w in complexes] + [nn.Parameter(torch.randn(3).double())]


def train(optimizer, params, steps=3, first=0):
    for n in range(first, first + steps):
        for i, p in enumerate(params):
            g = numbers(*p.shape, seed=100 * n + i)
            g = (g if p.is_complex() else g.real).to(p.dtype)
            p.grad = g if p.grad is None else p.grad.copy_(g)
        optimizer.step()


def made(module, name, params, **options):
    return getattr(module, name.partition(",")[0])(params, **{**OPTIONS.get(name, {}), **options})


def assert_same(ours, theirs, mine, others, **bounds):
    for p, q in zip(mine, others, strict=True):
        torch.testing.assert_close(p, q, **bounds)
        own, their = ours.state[p], theirs.state[q]
        for key, value in their.items():
            if (
                isinstance(value, torch.Tensor) and key != "momentum_started"
            ):  # a loaded one, which torch keeps
                torch.testing.assert_close(own[key], value, **bounds)  # of the same dtype, too


@every
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_states_are_torchs(name, dtype):
    torch.manual_seed(0)
    mine = weights(dtype)
    others = copy.deepcopy(mine)
    ours, theirs = made(fr.optim, name, mine), made(torch.optim, name, others)
    train(ours, mine)
    train(theirs, others)
    half = dict(rtol=0, atol=0.05)  # torch rounds to half precision after each of its operations
    bounds = {torch.complex128: dict(rtol=1e-13, atol=1e-14), torch.complex32: half}.get(dtype, {})
    assert_same(ours, theirs, mine, others, **bounds)


@every
def test_half_precision_is_rounded_once(name):
    p = nn.Parameter(numbers(64).to(torch.complex32))
    exact = nn.Parameter(p.detach().to(torch.complex128))
    g = numbers(64, seed=1).to(torch.complex32)
    for q in (p, exact):
        q.grad = g.to(q.dtype)
        made(fr.optim, name, [q]).step()
    assert torch.view_as_real(p.detach()).equal(torch.view_as_real(exact.detach()).half())


@every
def test_state_dicts_go_both_ways(name):
    torch.manual_seed(0)
    mine = weights()
    others = copy.deepcopy(mine)
    ours, theirs = made(fr.optim, name, mine), made(torch.optim, name, others)
    train(ours, mine)
    train(theirs, others)
    changed_mine, changed_theirs = made(fr.optim, name, mine), made(torch.optim, name, others)
    changed_mine.load_state_dict(theirs.state_dict())
    changed_theirs.load_state_dict(ours.state_dict())
    train(changed_mine, mine, first=3)
    train(changed_theirs, others, first=3)
    assert_same(changed_mine, changed_theirs, mine, others, rtol=1e-12, atol=1e-13)
    assert_same(copy.deepcopy(changed_mine), changed_theirs, [], [])


@both
def test_a_loss_falls(kind):
    """Through autograd, with gradients that are conjugates which nobody has carried out."""
    target, p = numbers(5), nn.Parameter(numbers(5, seed=1))
    optimizer = getattr(fr.optim, kind)([p], lr=0.1, weight_decay=0.0)
    for _ in range(300):
        optimizer.zero_grad()
        (p - target).abs().square().sum().backward()
        p.grad = p.grad.conj().resolve_conj().conj()
        assert p.grad.is_conj()
        optimizer.step()
    torch.testing.assert_close(p.detach(), target, rtol=0, atol=1e-3)


@both
def test_a_graph_notices_the_step(kind):
    p = nn.Parameter(numbers(3))
    loss = (p * p).abs().sum()
    p.grad = numbers(3, seed=1)
    getattr(fr.optim, kind)([p], lr=0.1).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@both
def test_clipping_is_that_of_torch(kind):
    mine = [nn.Parameter(numbers(4)), nn.Parameter(numbers(3, seed=1).real.clone())]
    others = copy.deepcopy(mine)
    ours, theirs = (getattr(m, kind) for m in (fr.optim, torch.optim))
    ours, theirs = ours(mine, lr=0.1, max_norm=0.5), theirs(others, lr=0.1)
    train(ours, mine, steps=1)
    step = theirs.step
    theirs.step = lambda: (norms.append(nn.utils.clip_grad_norm_(others, 0.5)), step())
    norms = []
    train(theirs, others, steps=1)
    assert ours.grad_norm.dtype == torch.float64
    torch.testing.assert_close(ours.grad_norm, norms[0], rtol=1e-14, atol=0)
    assert_same(ours, theirs, mine, others, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_norm_is_real(dtype):
    p = nn.Parameter(numbers(4).to(dtype))
    optimizer = fr.optim.SGD([p], lr=0.1, max_norm=1.0)
    assert optimizer.grad_norm.isnan()
    train(optimizer, [p])
    assert optimizer.grad_norm.dtype == (torch.float64 if dtype == torch.complex128 else torch.float32)


@both
def test_averages_are_those_of_both_parts(kind):
    p, idle = nn.Parameter(numbers(4)), nn.Parameter(numbers(2, seed=1))
    optimizer = getattr(fr.optim, kind)([p, idle], lr=0.1, ema=0.5)
    average = None
    for n in range(3):
        train(optimizer, [p], steps=1, first=n)
        average = p.detach().clone() if average is None else 0.5 * average + 0.5 * p.detach()
        with torch.no_grad():
            idle.add_(1j)
    last = p.detach().clone()
    assert optimizer.state[p]["ema"].dtype == torch.complex128
    with optimizer.averaged():
        torch.testing.assert_close(p.detach(), average, rtol=1e-14, atol=1e-14)
        moved = idle.detach() - numbers(2, seed=1)  # 0, then 1, then 2 times i
        torch.testing.assert_close(moved, torch.full_like(moved, 1.25j), rtol=1e-14, atol=1e-14)
    assert torch.equal(p.detach(), last)


def test_cautious_decay_is_that_of_both_parts():
    p = nn.Parameter(numbers(6))
    pairs = nn.Parameter(torch.view_as_real(p.detach().clone()))
    for q in (p, pairs):
        optimizer = fr.optim.AdamW([q], lr=0.1, weight_decay=0.5, cautious=True)
        for n in range(3):
            g = numbers(6, seed=n + 1)
            q.grad = g if q.is_complex() else torch.view_as_real(g)
            optimizer.step()
    assert torch.equal(torch.view_as_real(p.detach()), pairs.detach())


@both
def test_l1_is_refused_before_anything_is_stepped(kind):
    cls, real, p = getattr(fr.optim, kind), nn.Parameter(torch.ones(2)), nn.Parameter(numbers(3))
    text = rf"{kind}: l1 must be 0 for complex parameters.* got torch.complex128; give their group l1=0"
    with pytest.raises(ValueError, match=text):
        cls([p], lr=0.1, l1=0.1)
    optimizer = cls([{"params": [real], "l1": 0.1}, {"params": [p]}], lr=0.1)
    train(optimizer, [real, p])
    before = [real.detach().clone(), p.detach().clone()]
    optimizer.param_groups[1]["l1"] = 0.1
    with pytest.raises(ValueError, match=text):
        train(optimizer, [real, p])
    assert torch.equal(real.detach(), before[0]) and torch.equal(p.detach(), before[1])


def test_what_else_is_refused():
    with pytest.raises(ValueError, match=r"is for bfloat16 parameters, got torch\.complex32"):
        fr.optim.SGD([nn.Parameter(numbers(3).to(torch.complex32))], lr=0.1, stochastic_rounding=True)
    p = nn.Parameter(numbers(3).conj())
    p.grad = numbers(3)
    with pytest.raises(RuntimeError, match=r"SGD: a complex parameter must lie in memory.*resolve_conj"):
        fr.optim.SGD([p], lr=0.1).step()
    sparse = nn.Parameter(numbers(3))
    sparse.grad = torch.tensor([1j, 0, 0], dtype=torch.complex128).to_sparse()
    with pytest.raises(TypeError, match="does not support sparse gradients"):
        fr.optim.AdamW([sparse], lr=0.1).step()
    fr.optim.SGD([sparse], lr=0.1).step()
    torch.testing.assert_close(sparse.detach(), numbers(3) - torch.tensor([0.1j, 0, 0]))
    optimizer = fr.optim.SGD([nn.Parameter(numbers(3))], lr=0.1, momentum=0.9)
    optimizer.state[optimizer.param_groups[0]["params"][0]]["momentum_buffer"] = torch.zeros(3).double()
    with pytest.raises(ValueError, match="a momentum buffer"):
        train(optimizer, optimizer.param_groups[0]["params"])


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("name", ["SGD, momentum", "AdamW, amsgrad"])
def test_compiled_steps(name, backend):
    torch.manual_seed(0)
    mine = weights()
    others = copy.deepcopy(mine)
    ours, theirs = made(fr.optim, name, mine), made(torch.optim, name, others)
    train(ours, mine, steps=1)
    ours.step = torch.compile(lambda step=ours.step: step(), backend=backend, fullgraph=True)
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Torchinductor does not support code generation for complex"
        )
        train(ours, mine, steps=2, first=1)
    train(theirs, others)
    assert_same(ours, theirs, mine, others, rtol=1e-13, atol=1e-14)


def sharded_steps(rank, name):
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    whole = nn.Parameter(numbers(5, 3))
    for placement in (Shard(0), Replicate()):
        p = nn.Parameter(distribute_tensor(numbers(5, 3), mesh, [placement]))
        q = copy.deepcopy(whole)
        ours, theirs = made(fr.optim, name, [p], max_norm=0.5), made(torch.optim, name, [q])
        for n in range(3):
            q.grad = numbers(5, 3, seed=n + 1)
            p.grad = distribute_tensor(q.grad.clone(), mesh, [placement])
            nn.utils.clip_grad_norm_([q], 0.5)
            ours.step()
            theirs.step()
        assert isinstance(p.data, DTensor)
        torch.testing.assert_close(p.detach().full_tensor(), q.detach(), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("name", ["SGD, momentum", "AdamW, amsgrad"])
def test_shards(name):
    on_ranks(2, sharded_steps, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_penalty(dtype):
    """|z| is the root of both squares, and z itself the derivative of |z|^2 / 2, as torch's decay has it."""
    w = nn.Parameter(numbers(3, 4).to(dtype))
    z = w.detach().to(torch.complex128)
    value = fr.optim.penalty([w], l1=0.5, l2=0.25)
    bounds = dict(rtol=1e-14, atol=0) if dtype == torch.complex128 else dict(rtol=1e-5, atol=0)
    assert value.dtype == (torch.float64 if dtype == torch.complex128 else torch.float32)
    torch.testing.assert_close(value.double(), 0.5 * z.abs().sum() + 0.125 * z.abs().square().sum(), **bounds)
    value.backward()
    bounds = dict(rtol=1e-2, atol=1e-3) if dtype == torch.complex32 else bounds | dict(atol=1e-15)
    torch.testing.assert_close(w.grad.to(z.dtype), 0.5 * z / z.abs() + 0.25 * z, **bounds)
    optimizer = fr.optim.SGD([w], lr=0.1, weight_decay=0.25)
    assert fr.optim.penalty(optimizer) == fr.optim.penalty([w], l2=0.25)
    assert fr.optim.penalty([w]).dtype == value.dtype


def test_sparsity():
    w = torch.tensor([0, 1j, 1, 0], dtype=torch.complex64)
    assert fr.optim.sparsity([w]) == 0.5
