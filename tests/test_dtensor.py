"""Ops of DTensors on two ranks: what they give is what they give for the whole tensor, also when compiled."""

import copy
import itertools
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import on_ranks
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastreg as fr

PLACEMENTS = (Replicate(), Shard(0), Shard(1))


def whole(t):
    return t.full_tensor() if isinstance(t, DTensor) else t


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


def attacks(rank, mesh):
    """The examples of one process, however x is placed and the ranks' generators are seeded."""
    torch.manual_seed(0)
    one = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    model = distribute_module(copy.deepcopy(one), mesh)  # replicated
    x, y = numbers(6, 5, 6).sigmoid(), torch.arange(5) % 3
    lower = x.clone() - 0.01  # a bound for each element, which x keeps up to rounding
    lower[3, 2] = x[3, 2] + 1e-8
    of_sample = torch.linspace(0.01, 0.3, 5).view(5, 1)
    soft = dict(loss=lambda output, y: fr.cross_entropy(output, y, reduction="none", label_smoothing=0.1))
    for placement in PLACEMENTS:
        placed = distribute_tensor(x, mesh, [placement])
        eps = distribute_tensor(of_sample, mesh, [Shard(0)])
        for attack in (
            lambda m, x, y: fr.fgsm(m, x, y, 0.1),
            lambda m, x, y: fr.fgsm(m, x, y, of_sample, norm="l2", targeted=True),
            lambda m, x, y, eps=eps: fr.fgsm(m, x, y, eps if isinstance(x, DTensor) else of_sample),
            lambda m, x, y: fr.fgsm(m, x, y, 0.1, random_start=True, bounds=(lower, 1.0)),
            lambda m, x, y: fr.fgsm(m, x, y, 0.1, norm="l2", bounds=(lower, 1.0)),
            lambda m, x, y: fr.pgd(m, x, y, 0.1, 0.03, 3),
            lambda m, x, y: fr.pgd(m, x, y, of_sample, 0.03, 2, norm="l2"),
            lambda m, x, y: fr.pgd(m, x, y, 0.1, 0.05, 2, restarts=3, **soft),
            lambda m, x, y: fr.adversarial_loss(m, x, y, 0.1),
            lambda m, x, y: fr.adversarial_loss(m, x, y, 0.1, random_start=True),
            lambda m, x, y: fr.adversarial_backward(m, x, y, 0.1),
        ):
            torch.manual_seed(3)
            want = attack(one, x, y)
            after = torch.rand(2)
            torch.manual_seed(3 + rank)
            got = attack(model, placed, y)
            torch.testing.assert_close(got.full_tensor(), want, rtol=1e-5, atol=1e-6)
            assert got.dim() == 0 or got.placements == placed.placements
            assert rank or torch.equal(torch.rand(2), after)
        for p, q in zip(model.parameters(), one.parameters(), strict=True):
            torch.testing.assert_close(p.grad.full_tensor(), q.grad)
            p.grad = q.grad = None
    # What one rank sees is told to all.
    outside = x.clone()
    outside[4, 5] = 1.5
    texts = [None, None]
    with pytest.raises(ValueError, match=r"x must lie within bounds.* to 1\.5; ") as caught:
        fr.fgsm(model, distribute_tensor(outside, mesh, [Shard(0)]), y, 0.1)
    dist.all_gather_object(texts, str(caught.value))
    assert texts[0] == texts[1]
    with pytest.raises(ValueError, match="fgsm: x must be a replicated or sharded DTensor"):
        fr.fgsm(model, DTensor.from_local(x, mesh, [Partial()]), y, 0.1)
    for name, call in (
        ("FreeAdversarial", lambda x: next(fr.FreeAdversarial(0.1)(x))),
        ("robust_accuracy", lambda x: fr.robust_accuracy(model, (x, y), 0.1)),
    ):
        with pytest.raises(TypeError, match=rf"{name}: x must be a plain tensor, got a DTensor; give a rank"):
            call(placed)


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


def dropout_of_parts(rank, mesh):
    """A rank draws for what it holds and for nothing else, and one message brings the seed."""
    drawn = []

    class Draws(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            if op is torch.ops.fastreg.dropout_mask.default:
                drawn.append(args[1])
            return op(*args, **(kwargs or {}))

    x = numbers(0, 4, 6, 5)
    for placement, function in itertools.product(
        (*PLACEMENTS, Shard(2)), (fr.dropout, fr.dropout1d, partial(fr.alpha_dropout, training=True))
    ):
        torch.manual_seed(3)
        want = function(x, 0.5)
        placed = distribute_tensor(x, mesh, [placement])
        torch.manual_seed(3 + rank)
        with CommDebugMode() as messages, Draws():
            got = function(placed, 0.5)
        assert messages.get_total_counts() == 1 and torch.equal(got.full_tensor(), want)
        held = placed.to_local().shape[: 2 if function is fr.dropout1d else 3].numel()
        assert drawn.pop() == held and not drawn


def dropout_by_hand(rank, mesh):
    """Parts of columns, one of them empty, whose ranks are seeded otherwise: one message, one mask."""
    x = numbers(0, 4, 6)
    for first, end in (((0, 2), (2, 6)), ((0, 6), (6, 6))):
        torch.manual_seed(3)
        want = fr.dropout(x, 0.5)
        own = slice((first[0], end[0])[rank], (first[1], end[1])[rank])
        torch.manual_seed(3 + rank)
        with CommDebugMode() as messages:
            got = fr.distributed.dropout(x[:, own], 0.5, shape=(4, 6), start=(0, own.start), group=mesh)
        assert messages.get_total_counts() == 1 and torch.equal(got, want[:, own])


def patched(rank, mesh):
    """torch's names do what ours do; summands are left to torch, which refuses them on a CPU."""
    x, q = numbers(0, 6, 4), numbers(1, 2, 4, 6, 8)
    target = torch.arange(6) % 4
    for placement in PLACEMENTS:
        logits, heads = distribute_tensor(x, mesh, [placement]), distribute_tensor(q, mesh, [placement])
        rows = distribute_tensor(target, mesh, [Shard(0) if placement == Shard(0) else Replicate()])
        for theirs, ours in (
            (lambda t=logits: F.dropout(t, 0.5), lambda t=logits: fr.dropout(t, 0.5)),
            (lambda t=logits: nn.AlphaDropout(0.5)(t), lambda t=logits: fr.alpha_dropout(t, 0.5, True)),
            (
                lambda t=logits, y=rows: F.cross_entropy(t, y, label_smoothing=0.1),
                lambda t=logits, y=rows: fr.cross_entropy(t, y, label_smoothing=0.1),
            ),
            (
                lambda t=heads: F.scaled_dot_product_attention(t, t, t, dropout_p=0.5),
                lambda t=heads: fr.scaled_dot_product_attention(t, t, t, dropout_p=0.5),
            ),
        ):
            results = []
            for function in (theirs, ours):
                torch.manual_seed(3 + rank)
                with fr.patched():
                    results.append(function())
            assert results[0].placements == results[1].placements
            assert torch.equal(*(result.full_tensor() for result in results))
    summands = DTensor.from_local(x, mesh, [Partial()])
    with pytest.raises(RuntimeError, match="bernoulli_"), fr.patched():  # torch's own refusal
        F.dropout(summands, 0.5)


def dropout_add_rounds_once(rank, mesh):
    x, residual, bias = (numbers(i, *shape).bfloat16() for i, shape in enumerate(((6, 8), (6, 8), (8,))))
    for placement, b in itertools.product(PLACEMENTS, (None, bias)):
        torch.manual_seed(3)
        want = fr.dropout_add(x, residual, 0.3, b)
        placed = [distribute_tensor(t, mesh, [placement]) for t in (x, residual)]
        shared = None if b is None else distribute_tensor(b, mesh, [Replicate()])
        torch.manual_seed(3 + rank)
        got = fr.dropout_add(*placed, 0.3, shared)
        assert got.dtype == x.dtype and torch.equal(got.full_tensor(), want)


def mixed_summands(rank, mesh):
    """A plain tensor beside DTensors: an error of torch's class, with the remedy."""
    x = numbers(0, 6, 8)
    placed, bias = distribute_tensor(x, mesh, [Shard(0)]), distribute_tensor(x[0], mesh, [Replicate()])
    for arguments, name in (
        ((x, placed), "input"),
        ((placed, x), "residual"),
        ((placed, placed, 0.5, x[0]), "bias"),
        ((x, x, 0.0, bias), "input"),
    ):
        for error in (TypeError, RuntimeError):
            with pytest.raises(
                error, match=f"dropout_add: .*got a plain {name} beside DTensors; make it one"
            ):
                fr.dropout_add(*arguments)


def augmentation(rank, mesh):
    """Each sample what it becomes in the whole batch, and what cannot be placed so is refused."""
    # Augment and the policies, in training and in evaluation.
    images = numbers(0, 5, 3, 12, 16).sigmoid()
    of_sample = torch.linspace(0.5, 1.5, 5)
    one = fr.augment.Augment(
        hflip=0.5, rotate=15, size=(8, 8), brightness=0.3, blur=(3, (0.1, 2.0)), erase=0.5
    )
    for augment in (one, fr.augment.Augment.rand(2, 9), copy.deepcopy(one).eval()):
        for x in (images, (images * 255).byte(), images[:1]):
            torch.manual_seed(3)
            want, after = augment(x), torch.rand(1)
            for placement in PLACEMENTS[:2]:
                placed = distribute_tensor(x, mesh, [placement])
                torch.manual_seed(3 + rank)
                got = augment(placed)
                assert rank or torch.equal(torch.rand(1), after)
                assert got.placements == (placement,) and torch.equal(got.full_tensor(), want)
                if x is images and placement == Shard(0):
                    torch._dynamo.reset()
                    compiled = torch.compile(augment, backend="aot_eager", fullgraph=True)
                    torch.manual_seed(3 + rank)
                    assert torch.equal(compiled(placed).full_tensor(), want)
    # The gradient, then each function.
    placed = distribute_tensor(images, mesh, [Shard(0)]).requires_grad_()
    (grad,) = torch.autograd.grad(fr.augment.functional.adjust_brightness(placed, of_sample).sum(), placed)
    want = (images * of_sample.view(5, 1, 1, 1) < 1) * of_sample.view(5, 1, 1, 1).expand(images.shape)
    torch.testing.assert_close(grad.full_tensor(), want)
    f = fr.augment.functional
    for function in (
        f.horizontal_flip,
        lambda x: f.affine(x, of_sample * 9, (of_sample, 1.0), of_sample, 0.0, fill=0.5),
        lambda x: f.rotate(x, 30, expand=True),
        lambda x: f.vertical_stretch(x, factor=of_sample),
        lambda x: f.resized_crop(x, 1, 2, 8, 9, 6),
        lambda x: f.adjust_contrast(
            x, distribute_tensor(of_sample, mesh, [Shard(0)]) if isinstance(x, DTensor) else of_sample
        ),
        lambda x: f.gaussian_blur(x, 3, sigma=of_sample),
        lambda x: f.erase(inpt=x, i=of_sample.long(), j=1, h=3, w=4, v=torch.tensor([0.0, 0.5, 1.0])),
        lambda x: f.normalize(x, torch.tensor([0.1, 0.2, 0.3]), 0.5),
        lambda x: f.equalize(x),
        lambda x: f.adjust_sharpness(x, of_sample),
        lambda x: f.solarize(x, of_sample / 2),
    ):
        for placement in PLACEMENTS[:2]:
            placed = distribute_tensor(images, mesh, [placement])
            got = function(placed)
            want = function(images)
            assert got.placements == (placement,), got
            assert torch.equal(got.full_tensor(), want), (got.full_tensor() - want).abs().amax((1, 2, 3))
    placed = distribute_tensor(images.clone(), mesh, [Shard(0)])
    assert f.normalize(placed, 0.5, 0.5, inplace=True) is placed
    assert torch.equal(placed.full_tensor(), f.normalize(images, 0.5, 0.5))
    # What is refused.
    for wrong, error, words, call in (
        ([Shard(1)], ValueError, r"sharded over B, .* call \.redistribute", one),
        ([Shard(2)], ValueError, r"sharded over B, .* call \.redistribute", lambda x: f.rotate(x, 30)),
        ([Shard(0)], TypeError, r"give a rank's own samples, \.to_local", one.sample),
        ([Shard(0)], TypeError, "are moved alone, got targets", lambda x: one(x, masks=images[:, :1].byte())),
        (
            [Shard(0)],
            TypeError,
            "give a rank's own samples",
            lambda x: fr.augment.mixup(x, of_sample.long(), 1.0, 2),
        ),
        (
            [Shard(0)],
            TypeError,
            "give a rank's own samples",
            lambda x: fr.augment.apply(x, one.sample(images)),
        ),
    ):
        with pytest.raises(error, match=words):
            call(distribute_tensor(images, mesh, wrong))


def averages_of_fsdp(rank, mesh):
    """An evaluation, with averages or without, leaves the next step what it would be."""
    x, y = numbers(5, 8, 4), torch.arange(8) % 3
    for cls in (fr.optim.SGD, fr.optim.AdamW):
        results = []
        for evaluates in (False, True):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
            fully_shard(model)
            optimizer = cls(model.parameters(), lr=0.1, ema=0.9)
            for _ in range(4):
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
                if evaluates:
                    with torch.no_grad():
                        raw = model(x)
                        with optimizer.averaged():
                            averaged = model(x)
                        assert torch.equal(model(x), raw)
            results.append([p.full_tensor() for p in optimizer.param_groups[0]["params"]])
        assert not torch.equal(averaged, raw)
        assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
        with torch.no_grad():
            model(x)  # after which its parameters are whole
        optimizer.copy_averaged_to(model)
        with torch.no_grad():
            torch.testing.assert_close(model(x), averaged)


def adversarial_training(rank, mesh):
    """Under DDP with a static graph: the gradients of one process, on both ranks. What looks at inputs alone
    may run on one rank. Buffers, which are the same on both, are not sent: torch 2.10 refuses a backward pass
    after they were sent for a second forward pass.
    """
    x, y = numbers(6, 8, 4).sigmoid(), torch.arange(8) % 3
    mine = slice(4 * rank, 4 * rank + 4)

    def network():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8).eval(), nn.ReLU(), nn.Linear(8, 3))

    for static in (False, True):
        options = dict(static_graph=static, broadcast_buffers=False)
        one, ddp = network(), nn.parallel.DistributedDataParallel(network(), **options)
        for _ in range(3):
            for model, part in ((one, slice(None)), (ddp, mine)):
                model.zero_grad()
                fr.adversarial_loss(model, x[part], y[part], 0.1).backward()
            for p, q in zip(one.parameters(), ddp.module.parameters(), strict=True):
                torch.testing.assert_close(q.grad, p.grad)
    if rank == 0:
        fr.pgd(ddp, x, y, 0.1, 0.05, 2, restarts=2)
        fr.robust_accuracy(ddp, (x, y), 0.1, steps=2)
    dist.barrier()


def compiled_attention(rank, mesh):
    tensors = [numbers(i, 2, 4, 6, 8) for i in range(3)]
    for placement in PLACEMENTS:
        placed = [distribute_tensor(t, mesh, [placement]) for t in tensors]
        torch.manual_seed(3 + rank)
        want = fr.scaled_dot_product_attention(*placed, dropout_p=0.5)
        torch._dynamo.reset()
        torch.manual_seed(3 + rank)
        attention = torch.compile(fr.scaled_dot_product_attention, backend="eager", fullgraph=True)
        assert torch.equal(attention(*placed, dropout_p=0.5).full_tensor(), want.full_tensor())


def penalties(rank, mesh):
    """However many parameters there are, the shards meet in one message."""
    tensors = [numbers(i, 5, 3) for i in range(6)]
    for t in tensors:
        t[t.abs() < 0.5] = 0
    placed = [nn.Parameter(distribute_tensor(t, mesh, [Shard(0)])) for t in tensors]
    mixed = [
        *placed,
        nn.Parameter(tensors[0]),
        nn.Parameter(distribute_tensor(tensors[1], mesh, [Replicate()])),
    ]
    for given, plain in ((placed, tensors), (mixed, [*tensors, tensors[0], tensors[1]])):
        with CommDebugMode() as messages:
            value = fr.optim.penalty(given, l1=0.5, l2=0.25)
        assert messages.get_total_counts() == 1
        torch.testing.assert_close(value, fr.optim.penalty([t.clone() for t in plain], l1=0.5, l2=0.25))
        with CommDebugMode() as messages:
            gradients = torch.autograd.grad(value, given, create_graph=False, retain_graph=True)
        assert messages.get_total_counts() == 0
        first = torch.autograd.grad(value, given, create_graph=True)
        seconds = torch.autograd.grad(sum(whole(g).square().sum() for g in first), given)
        for p, t, gradient, second in zip(given, plain, gradients, seconds, strict=True):
            want = 0.5 * t.sign() + 0.25 * t
            assert getattr(gradient, "placements", None) == getattr(p, "placements", None)
            torch.testing.assert_close(whole(gradient), want)
            torch.testing.assert_close(whole(second), 2 * want * 0.25)
        with CommDebugMode() as messages:
            share = fr.optim.sparsity(given)
        assert messages.get_total_counts() == 1 and share == fr.optim.sparsity([t.clone() for t in plain])


def compiled_step(rank, mesh):
    for make in (
        lambda p: fr.optim.SGD(p, lr=0.1, momentum=0.9, l1=0.01),
        lambda p: fr.optim.AdamW(p, lr=0.1, l1=0.01),
    ):
        results = []
        for compiled in (False, True):
            p = nn.Parameter(distribute_tensor(numbers(0, 7, 3), mesh, [Shard(0)]))
            p.grad = distribute_tensor(numbers(1, 7, 3), mesh, [Shard(0)])
            optimizer = make([p])
            step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
            for _ in range(2):
                step()
            results.append(p.full_tensor())
        assert torch.equal(*results)
        torch._dynamo.reset()


def messages_of_a_step(rank, mesh):
    """Averages are stepped and exchanged shard by shard, and nothing is sent; the norm is one message,
    however many tensors there are.
    """
    for cls in (fr.optim.SGD, fr.optim.AdamW):
        for options, count in (({"ema_warmup": True}, 0), ({"max_norm": 1.0}, 1)):
            params = [nn.Parameter(distribute_tensor(numbers(i, 7, 3), mesh, [Shard(0)])) for i in range(3)]
            optimizer = cls(params, lr=0.1, ema=0.5, **options)
            for step in range(2):
                for i, p in enumerate(params):
                    p.grad = distribute_tensor(numbers(step + i, 7, 3), mesh, [Shard(0)])
                with CommDebugMode() as messages:
                    optimizer.step()
                assert messages.get_total_counts() == count
            with CommDebugMode() as messages, optimizer.averaged():
                pass
            assert messages.get_total_counts() == 0
            assert all(optimizer.state[p]["ema"].placements == p.placements for p in params)


def transforms(rank, mesh):
    """Under torch.func a loss is torch's, what is made of torch's functions is as it is, and all else is
    refused, as batches of gradients are.
    """
    x, w, y = numbers(0, 6, 5).double(), numbers(1, 5, 5).double(), torch.arange(6) % 5
    for placement in PLACEMENTS[:2]:
        placed, target = (distribute_tensor(t, mesh, [placement]) for t in (x, y))
        weight = distribute_tensor(w, mesh, [Replicate()])
        for ours, theirs in (
            (
                lambda t, y=target: fr.cross_entropy(t, y, label_smoothing=0.1),
                lambda t: F.cross_entropy(t, y, label_smoothing=0.1),
            ),
            (
                lambda t, w=weight, y=target: fr.linear_cross_entropy(t, w, y, label_smoothing=0.1),
                lambda t: F.cross_entropy(t @ w.t(), y, label_smoothing=0.1),
            ),
        ):
            for way in (torch.func.grad, torch.func.jacrev):
                torch.testing.assert_close(way(ours)(placed).full_tensor(), way(theirs)(x))
            leaf = placed.detach().requires_grad_()
            with pytest.raises(TypeError, match="cross_entropy: a DTensor has one gradient at a time, got a"):
                torch.autograd.grad(ours(leaf), leaf, torch.ones(2).double(), is_grads_batched=True)
        for made_of in (
            lambda t: fr.optim.penalty([t], l1=0.3, l2=0.2),
            lambda t: fr.pseudo_label_loss(t, threshold=0.3, temperature=0.5),
            lambda t: fr.pseudo_label_loss(t, threshold=0.3, hard=False),
        ):
            torch.testing.assert_close(
                torch.func.grad(made_of)(placed).full_tensor(), torch.func.grad(made_of)(x)
            )
    images = distribute_tensor(numbers(2, 2, 3, 4, 4).sigmoid(), mesh, [Shard(0)])
    for name, call, given in (
        ("dropout", lambda t: fr.dropout(t, 0.5), placed),
        ("alpha_dropout", lambda t: fr.alpha_dropout(t, 0.5, True), placed),
        ("dropout_with_mask", lambda t: fr.dropout_with_mask(t)[0], placed),
        ("dropout_add", lambda t: fr.dropout_add(t, t, 0.5), placed),
        ("dropout_add", lambda t: fr.dropout_add(t, t, 0.0, t.flatten()[:5]), placed),
        (
            "scaled_dot_product_attention",
            lambda t: fr.scaled_dot_product_attention(t, t, t, None, 0.5),
            images,
        ),
        ("rotate", lambda t: fr.augment.functional.rotate(t, 13.0), images),
        ("invert", lambda t: fr.augment.functional.invert(t), images),
        ("augment", fr.augment.Augment(rotate=9), images),
        ("mixup", lambda t: fr.augment.mixup(t, torch.tensor([0, 1]), num_classes=2)[0], images),
        ("cross_entropy", lambda t, y=target: fr.cross_entropy(t, y, z_loss=0.1), placed),
        ("cross_entropy", lambda t: fr.cross_entropy(t, y), placed),
    ):
        with pytest.raises(TypeError, match=rf"{name}: .*DTensors.*; (call|leave|make) "):
            torch.func.grad(lambda t, call=call: call(t).sum())(given)
    with pytest.raises(TypeError, match="dropout: DTensors have derivatives"):
        torch.func.vmap(lambda t: fr.dropout(t, 0.5), randomness="same")(placed)


def second_derivatives(rank, mesh):
    """The gradient of what gradients give is that of one process, which torch 2.10 loses in its own
    functions of DTensors.
    """
    x, y, w = numbers(0, 6, 4).double(), torch.arange(6) % 4, numbers(1, 4, 4).double()
    heads, images = numbers(2, 2, 4, 6, 8).double(), numbers(3, 4, 3, 6, 6).double().sigmoid()
    shared, soft = heads[:, :2].contiguous(), numbers(4, 6, 4).double().softmax(1)
    factors = torch.linspace(0.5, 1.5, 4).double()
    of_rows, anywhere = PLACEMENTS[:2], PLACEMENTS
    cases = {
        "dropout": (anywhere, (x,), lambda t: fr.dropout(t, 0.5)),
        "alpha_dropout": (anywhere, (x,), lambda t: fr.alpha_dropout(t, 0.5, True)),
        "dropout_add": (anywhere, (x, x), lambda t, r: fr.dropout_add(t, r, 0.5)),
        "attention": (anywhere, (heads,), lambda t: fr.scaled_dot_product_attention(t, t, t, dropout_p=0.5)),
        "shared heads": (
            anywhere,
            (heads, shared),
            lambda q, k: fr.scaled_dot_product_attention(q, k, k, dropout_p=0.5, enable_gqa=True),
        ),
        "one head for all": (
            (Shard(1),),
            (heads, shared[:, :1]),
            lambda q, k: fr.scaled_dot_product_attention(q, k, k, dropout_p=0.5, enable_gqa=True),
        ),
        "a mask": (
            (Shard(1),),
            (heads, heads @ heads.transpose(2, 3)),
            lambda q, m: fr.scaled_dot_product_attention(q, q, q, m, 0.5),
        ),
        "brightness": (of_rows, (images,), lambda t: fr.augment.functional.adjust_brightness(t, factors)),
        "rotate": (of_rows, (images,), lambda t: fr.augment.functional.rotate(t, 30.0)),
        "augment": (of_rows, (images,), fr.augment.Augment(rotate=15, brightness=0.3, contrast=0.3)),
        "penalty": (of_rows, (x,), lambda t: fr.optim.penalty([t], l1=0.5, l2=0.25)),
    }
    for reduction in ("mean", "sum", "none"):
        for target in (y, soft):
            options = dict(label_smoothing=0.1, reduction=reduction)
            cases[f"loss, {reduction}, {target.dtype}"] = (
                of_rows,
                (x,),
                lambda t, y=target, o=options: fr.cross_entropy(t, y, **o),
            )
            cases[f"linear loss, {reduction}, {target.dtype}"] = (
                of_rows,
                (x, w),
                lambda t, w, y=target, o=options: fr.linear_cross_entropy(t, w, y, **o),
            )
    for name, (placements, tensors, function) in cases.items():
        for placement in placements:
            results = []
            for given in (
                [t.clone().requires_grad_() for t in tensors],
                [
                    # Where classes are split, a loss has no second derivative, and says so.
                    distribute_tensor(t, mesh, [Replicate() if t is w else placement]).requires_grad_()
                    for t in tensors
                ],
            ):
                torch.manual_seed(3 + rank * isinstance(given[0], DTensor))
                value = (function(*given) ** 3).sum()
                first = torch.autograd.grad(value, given, create_graph=True)
                seconds = torch.autograd.grad(sum(whole((g * g).sum()) for g in first), given)
                results.append([whole(g).detach() for g in (*first, *seconds)])
            for want, got in zip(*results, strict=True):
                torch.testing.assert_close(got, want, msg=f"{name}, {placement}: {got} is not {want}")


def outside(rank, mesh):
    """A rank that holds no part, because it is not in the mesh, is told so."""
    alone = DeviceMesh("cpu", [0])
    placed = distribute_tensor(numbers(0, 4, 3), alone, [Shard(0)])
    for call in (
        lambda: fr.dropout(placed, 0.5),
        lambda: fr.cross_entropy(placed, torch.zeros(4, dtype=torch.long)),
        lambda: fr.fgsm_step(placed, placed, torch.ones(4, 1)),
    ):
        if rank:
            with pytest.raises(ValueError, match=r"a rank of the DTensor's mesh, \[0\], got one outside"):
                call()
        else:
            call()


CHECKS = (
    *(mixed_summands, augmentation, dropout_by_hand, outside),
    *(
        fgsm_step,
        attacks,
        compiled_dropout,
        dropout_of_parts,
        dropout_add_rounds_once,
        patched,
        compiled_attention,
    ),
    *(averages_of_fsdp, adversarial_training, transforms, second_derivatives),
    *(penalties, compiled_step, messages_of_a_step),
)


def on_rank(rank):
    for check in CHECKS:
        check(rank, init_device_mesh("cpu", (2,)))


def test_on_two_ranks():
    on_ranks(2, on_rank)
