"""64 ranks without 64 processes: torch's fake process group, in which this process is one of them and a seed
comes as it was sent.
"""

import pytest
import torch
import torch.distributed as dist
from torch._subclasses import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

import fastreg as fr
from fastreg._shards import own_part

RANKS, RANK = 64, 29  # in the middle of each mesh, with an empty part of the last dimension
SHAPE = (33, 70, 20)  # no dimension is divided evenly, and the last by 64 leaves empty parts
MESHES = {
    "rows": ((64,), (Shard(0),)),
    "columns": ((64,), (Shard(1),)),
    "the last": ((64,), (Shard(-1),)),
    "replicas": ((64,), (Replicate(),)),
    "two dimensions": ((8, 8), (Shard(0), Shard(1))),
    "inner two": ((8, 8), (Shard(1), Shard(2))),
    "one twice": ((4, 16), (Shard(1), Shard(1))),
    "beside replicas": ((2, 32), (Replicate(), Shard(1))),
    "fsdp beside tp": ((8, 8), (_StridedShard(0, split_factor=8), Shard(0))),
    "fsdp beside tp of columns": ((4, 16), (_StridedShard(1, split_factor=16), Shard(1))),
}


@pytest.fixture(scope="module", autouse=True)
def _ranks():
    dist.init_process_group("fake", store=FakeStore(), rank=RANK, world_size=RANKS)
    yield
    dist.destroy_process_group()


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def placed(x, mesh, placements):
    """This rank's part of a tensor, as a DTensor."""
    placements = [type(p)(p.dim % x.dim()) if type(p) is Shard else p for p in placements]
    part = own_part(x.shape, mesh, placements)
    sizes, starts = compute_local_shape_and_global_offset(x.shape, mesh, placements)
    assert list(sizes) == [each.stop - each.start for each in part]
    assert 0 in sizes or list(starts) == [each.start for each in part]
    local = x[part].contiguous()
    stride = torch.empty(x.shape, device="meta").stride()
    return part, DTensor.from_local(local, mesh, placements, run_check=False, shape=x.shape, stride=stride)


@pytest.mark.parametrize("name", MESHES)
def test_dropout_of_each_part(name):
    sizes, placements = MESHES[name]
    mesh = init_device_mesh("cpu", sizes)
    x = numbers(*SHAPE)
    part, shard = placed(x, mesh, placements)
    for function in (fr.dropout, fr.dropout1d, lambda t, p: fr.alpha_dropout(t, p, True), fr.drop_path):
        torch.manual_seed(5)
        want = function(x, 0.4)
        torch.manual_seed(5)
        got = function(shard, 0.4)
        assert got.placements == shard.placements and torch.equal(got.to_local(), want[part])


@pytest.mark.parametrize("name", MESHES)
def test_dropout_of_a_part_by_hand(name):
    sizes, placements = MESHES[name]
    x = numbers(*SHAPE).requires_grad_()
    part, shard = placed(x.detach(), init_device_mesh("cpu", sizes), placements)
    local = shard.to_local().requires_grad_()
    want = fr.dropout_with_mask(x, 0.4, seed=5)[0]
    got = fr.distributed.dropout(local, 0.4, shape=SHAPE, start=[each.start for each in part], seed=5)
    assert torch.equal(got, want[part])
    gradients = [torch.autograd.grad(t.pow(2).sum(), of)[0] for t, of in ((got, local), (want, x))]
    assert torch.equal(gradients[0], gradients[1][part])


def test_what_is_no_part():
    x = numbers(3, 4)
    dropout = fr.distributed.dropout
    for error, words, call in (
        (ValueError, "shape and start must have a number", lambda: dropout(x, shape=(3, 8), start=(4,))),
        (ValueError, "must lie in the whole", lambda: dropout(x, shape=(3, 8), start=(0, 5))),
        (ValueError, "start must be at least 0", lambda: dropout(x, shape=(3, 8), start=(0, -1))),
        (TypeError, "shape must be an int", lambda: dropout(x, shape=(3, 8.0), start=(0, 0))),
        (TypeError, "group must be a", lambda: dropout(x, shape=(3, 8), start=(0, 0), group="tp")),
        (ValueError, "p must be in", lambda: dropout(x, 2.0, shape=(3, 8), start=(0, 0))),
    ):
        with pytest.raises(error, match=f"^distributed.dropout: .*{words}"):
            call()
    assert dropout(x, training=False, shape=(3, 8), start=(0, 4)) is x


def test_rows_that_do_not_follow_one_another():
    mesh = init_device_mesh("cpu", (64,))
    with pytest.raises(ValueError, match="must be rows that follow one another"):
        own_part(torch.Size(SHAPE), mesh, [_StridedShard(1, split_factor=2)])


@pytest.mark.parametrize("name", MESHES)
def test_rounding_at_random_of_each_part(name):
    """A step of a bfloat16 parameter, wherever its part lies."""
    sizes, placements = MESHES[name]
    mesh = init_device_mesh("cpu", sizes)
    results = []
    for cls in (fr.optim.SGD, fr.optim.AdamW):
        x, g = numbers(*SHAPE).bfloat16(), numbers(*SHAPE, seed=1).bfloat16()
        part, shard = placed(x, mesh, placements)
        for tensor, grad in ((x, g), (shard, placed(g, mesh, placements)[1])):
            p = torch.nn.Parameter(tensor.clone())
            p.grad = grad.clone()
            optimizer = cls([p], lr=0.01, stochastic_rounding=True)
            if name == "inner two" and tensor is shard:
                with pytest.raises(ValueError, match="needs shards of whole rows, or of one dimension"):
                    optimizer.step()
                return
            optimizer.step()
            results.append(p.detach())
        whole, got = results[-2:]
        assert torch.equal(got.to_local(), whole[part])


def test_sizes_without_values():
    """What a step of 64 ranks allocates is found out with tensors that have no values, where no value may be
    looked at: each op gives results of the shapes and placements that it has.
    """
    mesh = init_device_mesh("cpu", (RANKS,))
    with FakeTensorMode():
        x = torch.empty(128, 24)
        rows = distribute_tensor(x, mesh, [Shard(0)]).requires_grad_()
        target, weight = torch.empty(128, dtype=torch.long), torch.empty(40, 24)
        layer = distribute_tensor(weight, mesh, [Replicate()])
        for reduction, shape in (("mean", ()), ("sum", ()), ("none", (128,))):
            loss = fr.cross_entropy(rows, target, label_smoothing=0.1, reduction=reduction)
            assert loss.shape == shape and torch.autograd.grad(loss.sum(), rows)[0].placements == (Shard(0),)
            assert fr.linear_cross_entropy(rows, layer, target, reduction=reduction).shape == shape
        of_classes = distribute_tensor(torch.empty(128, 256), mesh, [Shard(1)]).requires_grad_()
        layer = distribute_tensor(torch.empty(256, 24), mesh, [Shard(0)])
        for reduction, shape in (("mean", ()), ("sum", ()), ("none", (128,))):
            loss = fr.cross_entropy(of_classes, target, label_smoothing=0.1, reduction=reduction)
            assert loss.shape == shape
            assert torch.autograd.grad(loss.sum(), of_classes)[0].placements == (Shard(1),)
            assert fr.linear_cross_entropy(x, layer, target, reduction=reduction).shape == shape
        assert fr.pseudo_label_loss(of_classes).shape == ()
        images = torch.empty(128, 3, 8, 8)
        for placed, batch in ((rows, distribute_tensor(images, mesh, [Shard(0)])), (x, images)):
            assert fr.pseudo_label_loss(placed).shape == ()
            assert fr.fgsm_step(placed, placed, torch.empty(24), bounds=(0, torch.empty(24))).shape == x.shape
            assert fr.fgsm(lambda t: t.flatten(1), placed, target, 0.1).shape == x.shape
            assert fr.augment.Augment(rotate=9, hflip=0.5)(batch).shape == images.shape
            assert fr.augment.Augment.trivial()(batch).shape == images.shape
            assert fr.augment.functional.rotate(batch, torch.empty(128)).shape == images.shape
        assert fr.augment.mixup(images, target, 1.0, 24)[1].shape == x.shape
        assert fr.calibration_error(x, target).shape == ()
