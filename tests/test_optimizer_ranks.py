"""SGD and AdamW with averages and clipping on two processes: DDP, FSDP2, DTensor, distributed checkpoints."""

import pytest
import torch
from helpers import on_ranks

import fastreg as fr

SGD = dict(lr=0.05, momentum=0.9, dampening=0.1, weight_decay=0.02)
KINDS = {fr.optim.SGD: SGD, fr.optim.AdamW: dict(lr=0.05, amsgrad=True, cautious=True)}
SHARED = dict(l1=0.01, ema=0.5, ema_warmup=True, max_norm=0.2)
CLOSE = dict(rtol=1e-4, atol=2e-6)


def model_and_data():
    torch.manual_seed(11)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3))
    return model, [torch.randn(8, 5) for _ in range(6)]


def train(model, optimizer, data, share=slice(None)):
    for x in data:
        optimizer.zero_grad()
        model(x[share]).pow(2).mean().backward()
        optimizer.step()


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def assert_same(params, optimizer, others, other):
    """Parameters, states and the norm of a sharded optimiser, and those of one process."""
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(whole(p.detach()), q.detach(), **CLOSE)
        for name, value in other.state[q].items():
            torch.testing.assert_close(whole(optimizer.state[p][name]), value, **CLOSE)
    assert not hasattr(optimizer.grad_norm, "placements")
    torch.testing.assert_close(optimizer.grad_norm, other.grad_norm, **CLOSE)


def of_one_process(cls, options, mesh, share, folder):
    """DDP and FSDP2, whose 7 and 3 rows are uneven shards, against one process."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
    from torch.distributed.fsdp import fully_shard

    single, data = model_and_data()
    one = cls(single.parameters(), **options)
    train(single, one, data[:4])
    model, _ = model_and_data()
    ddp = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = cls(ddp.parameters(), **options)
    train(ddp, optimizer, data[:4], share)
    assert_same(model.parameters(), optimizer, single.parameters(), one)

    def sharded():
        model, _ = model_and_data()
        for layer in (model[0], model[2], model):
            fully_shard(layer, mesh=mesh)
        return model, cls(model.parameters(), **options)

    model, optimizer = sharded()
    train(model, optimizer, data[:4], share)
    assert_same(model.parameters(), optimizer, single.parameters(), one)
    for p in model.parameters():
        assert optimizer.state[p]["ema"].placements == p.placements

    # The averages, in evaluation and written into a whole model.
    target, _ = model_and_data()
    optimizer.copy_averaged_to(target, source=model)
    with one.averaged(), optimizer.averaged():
        for p, q, r in zip(model.parameters(), single.parameters(), target.parameters(), strict=True):
            torch.testing.assert_close(whole(p.detach()), q.detach(), **CLOSE)
            assert torch.equal(whole(p.detach()), r.detach())
    train(single, one, data[4:])

    # A checkpoint by name, read into a new model.
    names = get_optimizer_state_dict(model, optimizer)
    saved = {"model": model.state_dict(), "optimizer": names}
    dcp.save(saved, checkpoint_id=f"{folder}/{cls.__name__}")
    again, other = sharded()
    read = {"model": again.state_dict(), "optimizer": get_optimizer_state_dict(again, other)}
    dcp.load(read, checkpoint_id=f"{folder}/{cls.__name__}")
    again.load_state_dict(read["model"])
    set_optimizer_state_dict(again, other, read["optimizer"])
    train(again, other, data[4:], share)
    assert_same(again.parameters(), other, single.parameters(), one)


def of_torchs_checkpoint(cls, options, mesh, folder):
    """A distributed checkpoint of torch's optimiser, read by either kind of state dict, goes on as one that
    torch's own state dict was loaded into.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
    from torch.distributed.fsdp import fully_shard

    def sharded(make, **options):
        model, _ = model_and_data()
        fully_shard(model, mesh=mesh)
        return model, make(model.parameters(), **options)

    theirs = torch.optim.SGD if cls is fr.optim.SGD else torch.optim.AdamW
    usual = {name: value for name, value in options.items() if name != "cautious"}
    data = model_and_data()[1]
    model, optimizer = sharded(theirs, **usual)
    train(model, optimizer, data[:3])
    named, path = get_optimizer_state_dict(model, optimizer), f"{folder}/torchs {cls.__name__}"
    dcp.save(
        {"model": model.state_dict(), "named": named, "plain": optimizer.state_dict()}, checkpoint_id=path
    )

    more = {"l1": 0.01, "ema": 0.5, "stochastic_rounding": True}
    results = []
    for kind in ("directly", "named", "plain"):
        again, other = sharded(cls, **options | more)
        train(again, other, data[4:])  # what is read replaces this
        if kind == "directly":
            again.load_state_dict(model.state_dict())
            other.load_state_dict(optimizer.state_dict())
        else:
            state = get_optimizer_state_dict(again, other) if kind == "named" else other.state_dict()
            read = {"model": again.state_dict(), kind: state}
            with pytest.raises(CheckpointException, match="Missing key in checkpoint"):
                dcp.load(read, checkpoint_id=path)
            dcp.load(read, checkpoint_id=path, planner=fr.optim.load_planner())
            again.load_state_dict(read["model"])
            if kind == "named":
                set_optimizer_state_dict(again, other, read[kind])
            else:
                other.load_state_dict(read[kind])
        assert {name: other.param_groups[0][name] for name in more} == more
        train(again, other, data[3:5])
        averages = [other.state[p]["ema"] for p in again.parameters()]
        results.append([whole(t.detach()) for t in (*again.parameters(), *averages)])
    for result in results[1:]:
        for a, b in zip(results[0], result, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
    lacking = {
        "model": model.state_dict(),
        "named": {**get_optimizer_state_dict(again, other), "more": torch.ones(1)},
    }
    with pytest.raises(CheckpointException, match=r"Missing key in checkpoint state_dict: named\.more"):
        dcp.load(lacking, checkpoint_id=path, planner=fr.optim.load_planner())


def into_torchs_optimizer(cls, options, mesh, folder):
    """A distributed checkpoint of ours, averages and all, is read by torch's class, which goes on alike."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
    from torch.distributed.fsdp import fully_shard

    def sharded(make, **options):
        model, data = model_and_data()
        fully_shard(model, mesh=mesh)
        return model, make(model.parameters(), **options), data

    usual = {name: value for name, value in options.items() if name != "cautious"}
    model, optimizer, data = sharded(cls, **usual, ema=0.5, max_norm=1e9)
    train(model, optimizer, data[:3])
    path = f"{folder}/ours {cls.__name__}"
    named = get_optimizer_state_dict(model, optimizer)
    dcp.save({"model": model.state_dict(), "named": named}, checkpoint_id=path)
    again, theirs, _ = sharded(torch.optim.SGD if cls is fr.optim.SGD else torch.optim.AdamW, **usual)
    train(again, theirs, data[4:])  # what is read replaces this
    read = {"model": again.state_dict(), "named": get_optimizer_state_dict(again, theirs)}
    dcp.load(read, checkpoint_id=path)
    again.load_state_dict(read["model"])
    set_optimizer_state_dict(again, theirs, read["named"])
    for each in ((model, optimizer), (again, theirs)):
        train(*each, data[3:])
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(whole(p.detach()), whole(q.detach()), **CLOSE)


def one_tensor(cls, options, mesh, world):
    """Uneven shards, one of which is empty, and replicas; gradients placed otherwise, partial sums too."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    for rows, placements in ((5, [Shard(0)]), (1, [Shard(0)]), (4, [Shard(1)]), (3, [Replicate()])):
        torch.manual_seed(2)
        w, g, v = torch.randn(rows, 3), torch.randn(rows, 3), torch.randn(4)
        q, plain = torch.nn.Parameter(w.clone()), torch.nn.Parameter(v.clone())
        q.grad, plain.grad = g, torch.ones(4)
        one = cls([q, plain], **options)
        one.step()
        for kind in ("same", "replicated", "partial"):
            p, r = (
                torch.nn.Parameter(distribute_tensor(w.clone(), mesh, placements)),
                torch.nn.Parameter(v.clone()),
            )
            if kind == "partial":
                p.grad = DTensor.from_local(g / world, mesh, [Partial()])
            else:
                p.grad = distribute_tensor(g, mesh, placements if kind == "same" else [Replicate()])
            r.grad = torch.ones(4)
            optimizer = cls([p, r], **options)
            optimizer.step()
            assert_same([p, r], optimizer, [q, plain], one)
            assert p.placements == tuple(placements)

    # An overflow in one shard skips the step of all.
    p = torch.nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)]))
    p.grad = distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)])
    if mesh.get_rank() == 0:
        p.grad.to_local()[0, 0] = torch.inf
    optimizer = cls([p], **options)
    optimizer.step()
    assert torch.equal(p.detach().to_local(), torch.ones(2, 3)) and optimizer.grad_norm == torch.inf
    p.grad = distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)])
    optimizer.step()
    assert not torch.equal(p.detach().to_local(), torch.ones(2, 3))


def rounded_at_random(cls, options, mesh):
    """Replicas and shards have the bits of one process, whatever the ranks' generators."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    def stepped(params, place):
        optimizer = cls(params, **options, ema=0.5, stochastic_rounding=True, rounding_seed=9)
        for n in range(3):
            for i, p in enumerate(params):
                generator = torch.Generator().manual_seed(10 * n + i)
                p.grad = place(i, torch.randn(p.shape, generator=generator).bfloat16())
            optimizer.step()
        return [whole(t.detach()) for p in params for t in (p, optimizer.state[p]["ema"])]

    torch.manual_seed(mesh.get_rank())
    layouts = ([Shard(0)], [Shard(1)], [Replicate()], [Shard(0)], [Shard(2)])
    # Cut into uneven rows, columns, not at all, a part for one rank only, and in the last dimension.
    shapes = ((7, 3), (5, 20), (33,), (1, 6), (3, 5, 7))
    start = [torch.linspace(-1, 1, torch.Size(s).numel()).reshape(s).bfloat16() for s in shapes]
    one = stepped([torch.nn.Parameter(t.clone()) for t in start], lambda i, grad: grad)
    sharded = [torch.nn.Parameter(distribute_tensor(t, mesh, p)) for t, p in zip(start, layouts, strict=True)]
    several = stepped(sharded, lambda i, grad: distribute_tensor(grad, mesh, layouts[i]))
    for a, b in zip(one, several, strict=True):
        assert torch.equal(a, b)


def in_groups(cls, options, shard=True):
    """A model, its optimiser with groups of their own options, a stopper of both, and data."""
    from torch.distributed.fsdp import fully_shard

    model, data = model_and_data()
    for layer in (model[0], model[2], model) if shard else ():
        fully_shard(layer)
    groups = fr.optim.penalty_groups(
        model, l1=0.01, l2=0.02, overrides={"2.*": {"lr": 0.02, "ema": 0.3}, "0.bias": {"l1": 0.03}}
    )
    optimizer = cls(groups, **options)
    return model, optimizer, fr.EarlyStopping(model, optimizer), data


def whole_state(model, optimizer, stopper, flat):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    states = get_state_dict(model, optimizer, options=options)
    return options, {"model": states[0], "optimizer": states[1], "stopper": stopper.state_dict()}


SCORES = (3.0, 1.0, 2.0)


def save_on_four(rank, folder):
    import torch.distributed.checkpoint as dcp

    for cls, own in KINDS.items():
        model, optimizer, stopper, data = in_groups(cls, {**own, "ema": 0.5, "max_norm": 0.2})
        for x, score in zip(data, SCORES, strict=False):
            train(model, optimizer, [x], slice(2 * rank, 2 * rank + 2))
            stopper.step(score)
        for flat in (False, True):
            state = whole_state(model, optimizer, stopper, flat)[1]
            dcp.save(state, checkpoint_id=f"{folder}/{cls.__name__} {flat}")


def load_on(rank, world, folder):
    """Options of groups, averages, momenta and the best epoch are those that were saved."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import set_state_dict

    share = slice(8 // world * rank, 8 // world * (rank + 1))
    for cls, own in KINDS.items():
        options = {**own, "ema": 0.5, "max_norm": 0.2}
        for flat in (False, True):
            model, optimizer, stopper, data = in_groups(cls, {**options, "lr": 0.5})
            stopper.step(9.0)
            for group in optimizer.param_groups:
                group["l1"], group["ema"] = 0.7, 0.9
            how, state = whole_state(model, optimizer, stopper, flat)
            dcp.load(state, checkpoint_id=f"{folder}/{cls.__name__} {flat}")
            set_state_dict(
                model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"],
                options=how,
            )  # fmt: skip
            stopper.load_state_dict(state["stopper"])
            train(model, optimizer, data[3:], share)
            one, single, best = one_process(cls, options)
            assert_same(model.parameters(), optimizer, one.parameters(), single)
            for group, other in zip(optimizer.param_groups, single.param_groups, strict=True):
                assert {k: v for k, v in other.items() if k != "params"}.items() <= group.items()
            assert (stopper.best, stopper.best_epoch, stopper.epoch) == (1.0, 1, 3)
            stopper.restore()
            for p, q in zip(model.parameters(), best, strict=True):
                torch.testing.assert_close(whole(p.detach()), q, **CLOSE)


def one_process(cls, options):
    """The model, its optimiser, and the weights after the second step."""
    model, optimizer, _, data = in_groups(cls, options, shard=False)
    train(model, optimizer, data[:2])
    best = [p.detach().clone() for p in model.parameters()]
    train(model, optimizer, data[2:])
    return model, optimizer, best


def worker(rank, world, folder):
    """On each of two gloo ranks; an assertion that fails here fails the spawn."""
    from torch.distributed.tensor import init_device_mesh

    mesh = init_device_mesh("cpu", (world,))
    for cls, own in KINDS.items():
        options = {**own, **SHARED}
        of_one_process(cls, options, mesh, slice(4 * rank, 4 * rank + 4), folder)
        of_torchs_checkpoint(cls, own, mesh, folder)
        into_torchs_optimizer(cls, own, mesh, folder)
        one_tensor(cls, options, mesh, world)
        rounded_at_random(cls, own, mesh)


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_two_ranks(tmp_path):
    on_ranks(2, worker, 2, str(tmp_path))


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_saved_on_four_ranks_and_read_on_fewer(tmp_path):
    on_ranks(4, save_on_four, str(tmp_path))
    for world in (2, 1):
        on_ranks(world, load_on, world, str(tmp_path))
