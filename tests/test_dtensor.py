"""Ops of DTensors on two ranks: what they give is what they give for the whole tensor, also when compiled."""

import datetime
import itertools

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import fastreg as fr

PLACEMENTS = (Replicate(), Shard(0), Shard(1))


def numbers(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def fgsm_step(rank, mesh):
    x, grad = numbers(0, 7, 4), numbers(1, 7, 4)
    for placement, eps, upper in itertools.product(
        PLACEMENTS, (0.1, torch.linspace(0.1, 0.4, 4), torch.linspace(0.1, 0.7, 7)), (1, numbers(2, 7, 4) + 9)
    ):
        moved = fr.fgsm_step(
            distribute_tensor(x, mesh, [placement]), distribute_tensor(grad, mesh, [Shard(0)]), eps, -1, upper
        )
        assert moved.placements == (placement,)
        assert torch.equal(moved.full_tensor(), fr.fgsm_step(x, grad, eps, -1, upper))
    placed = distribute_tensor(x, mesh, [Shard(0)])
    with pytest.raises(TypeError, match="got a DTensor as x alone"):
        fr.fgsm_step(placed, grad, 0.1)
    partial = DTensor.from_local(x, mesh, [Partial()])
    with pytest.raises(ValueError, match=r"call \.redistribute\(\) first"):
        fr.fgsm_step(partial, placed, 0.1)


def compiled_dropout(rank, mesh):
    x = numbers(0, 6, 4)
    for placement, backend in itertools.product(PLACEMENTS, ("eager", "aot_eager")):
        placed = distribute_tensor(x, mesh, [placement]).requires_grad_()
        torch.manual_seed(3 + rank)
        want = fr.dropout(placed, 0.5)
        (wanted,) = torch.autograd.grad(want.sum(), placed)
        torch._dynamo.reset()
        torch.manual_seed(3 + rank)
        got = torch.compile(lambda t: fr.dropout(t, 0.5) * 1, backend=backend, fullgraph=True)(placed)
        (grad,) = torch.autograd.grad(got.sum(), placed)
        assert torch.equal(got.full_tensor(), want.full_tensor())
        assert torch.equal(grad.full_tensor(), wanted.full_tensor())


def on_rank(rank, file):
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2, timeout=timeout)
    try:
        for check in (fgsm_step, compiled_dropout):
            check(rank, init_device_mesh("cpu", (2,)))
    finally:
        dist.destroy_process_group()


def test_on_two_ranks(tmp_path):
    mp.spawn(on_rank, args=(str(tmp_path / "store"),), nprocs=2)
