"""Cross-entropy whose classes are split over ranks, against the formula in float64 of all of them."""

import itertools

import pytest
import torch
import torch.distributed as dist
from cross_entropy_reference import assert_gradient, assert_rounded, case, reference
from helpers import on_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.utils._python_dispatch import TorchDispatchMode

import fastreg as fr
from fastreg import _sharded_cross_entropy as op
from fastreg._shards import own_part

RANKS = 4
# The first class of each rank, and the end: uneven, an empty part, fewer classes than ranks.
SPLITS = {9: (0, 2, 6, 7, 9), 7: (0, 4, 4, 5, 7), 2: (0, 1, 2, 2, 2)}
OPTIONS = (
    dict(),
    dict(label_smoothing=0.1),
    dict(label_smoothing=0.2, smoothing="others", z_loss=1e-3, reduction="sum"),
    dict(label_smoothing=1.0, reduction="none"),
)


def part_of(x, classes, rank, dim=1):
    split = SPLITS[classes]
    return x.narrow(dim, split[rank], split[rank + 1] - split[rank]).clone()


def whole_gradient(x, target, weight, options):
    x = x.double().requires_grad_()
    loss = reference(x, target, weight, **options)
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    return loss.detach(), gradient


def values(rank, group):
    dtypes = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
    for (classes, split), dtype, options in itertools.product(SPLITS.items(), dtypes, OPTIONS):
        if classes != 9 and dtype not in (torch.float32, torch.bfloat16):
            continue  # what an odd split changes depends on no dtype
        for soft, weighted, shape in ((0, 0, (13, classes)), (0, 1, (3, classes, 5)), (1, 1, (4, classes))):
            x, target = case(shape, dtype, soft)
            target = target.to(torch.float64 if dtype == torch.float64 else torch.float32) if soft else target
            weight = torch.rand(classes) if weighted else None
            if weighted:
                weight[0] = 0
            if not soft:
                target.view(-1)[1] = -100
            want, gradient = whole_gradient(x, target, weight, options)
            local = part_of(x, classes, rank).requires_grad_()
            loss = fr.distributed.cross_entropy(
                local, part_of(target, classes, rank) if soft else target, weight, group=group,
                first_class=split[rank], num_classes=classes, loss_dtype=dtype, **options,
            )  # fmt: skip
            what = (classes, dtype, options, soft, weighted)
            assert loss.dtype == dtype and loss.shape == want.shape
            assert_rounded(loss.detach(), want, what)
            (got,) = torch.autograd.grad(loss.sum(), local)
            assert_gradient(got, part_of(gradient, classes, rank), 2.0, what)
            same_on_all_ranks(loss.detach())


def same_on_all_ranks(loss):
    bits = loss.reshape(-1).view(torch.uint8)
    all_bits = [torch.empty_like(bits) for _ in range(RANKS)]
    dist.all_gather(all_bits, bits)
    assert all(torch.equal(bits, other) for other in all_bits)


def hostile(rank, group):
    x, target = case((40, 9), torch.float32)
    far = x.clone()
    far[:, :3] -= 1e4
    just_below = x.clone()
    just_below[:, :3] -= 86  # gradients about 2^-126
    masked = x.clone()
    masked[:, 5:] = -torch.inf
    certain = x.clone()
    certain[torch.arange(40), target] += 12
    for name, logits, options in (
        ("shifted", x + 1e4, dict(label_smoothing=0.1)),
        ("large", x * 1e4, dict(label_smoothing=0.1)),
        ("far apart", far, dict(label_smoothing=0.1, z_loss=1e-6)),
        ("just below", just_below, dict()),
        ("at the end of the range", x / x.abs().max() * 1.5e38, dict()),
        ("masked", masked, dict(ignore_index=int(target[0]))),
        ("certain", certain, dict()),
    ):
        here = target.clamp(max=4) if name == "masked" else target
        want, gradient = whole_gradient(logits, here, None, options)
        local = part_of(logits, 9, rank).requires_grad_()
        loss = fr.distributed.cross_entropy(
            local, here, group=group, first_class=SPLITS[9][rank], num_classes=9, **options
        )
        assert (loss.detach().double() - want).abs() <= 1e-6 * want.abs(), (name, loss, want)
        (got,) = torch.autograd.grad(loss, local)
        wanted = part_of(gradient, 9, rank)
        room = 4e-6 * wanted.abs() + 4e-7 * (1 / 40) * (wanted.abs() > 0) * (name != "certain") + 2.0**-126
        assert ((got.double() - wanted).abs() <= room).all(), name
        assert not ((got != 0) & (got.abs() < 2.0**-126)).any(), name

    # NaN stays in the row that has it, an ignored row has none, and no row at all is no error.
    broken = x.clone()
    broken[3, 8], broken[5, 0], broken[7, :2] = torch.nan, torch.nan, torch.nan  # of row 7 all of rank 0's
    target = target.clone()
    target[5] = -100
    local = part_of(broken, 9, rank).requires_grad_()
    shard = dict(group=group, first_class=SPLITS[9][rank], num_classes=9)
    loss = fr.distributed.cross_entropy(local, target, reduction="none", **shard)
    loss.nansum().backward()
    assert loss.isnan().nonzero().tolist() == [[3], [7]] and loss[5] == 0 and (local.grad[5] == 0).all()
    for all_ignored, want in (("nan", torch.nan), ("zero", 0.0)):
        for rows in (0, 2):
            local = torch.randn(rows, SPLITS[9][rank + 1] - SPLITS[9][rank]).requires_grad_()
            ignored = torch.full((rows,), -100)
            loss = fr.distributed.cross_entropy(local, ignored, all_ignored=all_ignored, **shard)
            loss.backward()
            assert torch.equal(loss.detach(), torch.tensor(want)) or (want != want and loss.isnan())
            assert (local.grad == 0).all()
    local = part_of(x, 9, rank).requires_grad_()
    (fr.distributed.cross_entropy(local, target.clone().fill_(-100), reduction="sum", **shard) / 0).backward()
    assert (local.grad == 0).all()


def linear(rank, group):
    for dtype, options, classes in itertools.product((torch.float32, torch.bfloat16), OPTIONS, (9, 7)):
        torch.manual_seed(1)
        hidden = torch.randn(5, 30, 6).to(dtype)
        weight, bias = torch.randn(classes, 6).to(dtype), torch.randn(classes).to(dtype)
        target = torch.randint(classes, (5, 30))
        target[0, :3] = -100
        class_weight = torch.rand(classes)
        inputs = [t.detach().clone().requires_grad_() for t in (hidden, weight, bias)]
        whole = fr.linear_cross_entropy(
            inputs[0], inputs[1], target, inputs[2], class_weight=class_weight, loss_dtype=torch.float32,
            **options,
        )  # fmt: skip
        want = torch.autograd.grad(whole.sum(), inputs)
        parts = [hidden.clone(), part_of(weight, classes, rank, 0), part_of(bias, classes, rank, 0)]
        parts = [t.requires_grad_() for t in parts]
        loss = fr.distributed.linear_cross_entropy(
            parts[0], parts[1], target, parts[2], group=group, first_class=SPLITS[classes][rank],
            num_classes=classes, class_weight=class_weight, loss_dtype=torch.float32, **options,
        )  # fmt: skip
        got = torch.autograd.grad(loss.sum(), parts)
        rtol = 2e-6 if dtype == torch.float32 else 2**-6
        torch.testing.assert_close(loss, whole, rtol=1e-6 if dtype == torch.float32 else 1e-3, atol=1e-6)
        wants = [want[0], part_of(want[1], classes, rank, 0), part_of(want[2], classes, rank, 0)]
        for g, w in zip(got, wants, strict=True):
            torch.testing.assert_close(g, w, rtol=rtol, atol=rtol * float(w.abs().max()) if w.numel() else 0)


def messages(rank, group):
    """One gather of 16 bytes a row and rank, and nothing in the backward pass."""
    from torch.distributed.tensor.debug import CommDebugMode

    x, target = case((20, 9), torch.float32)
    local = part_of(x, 9, rank).requires_grad_()
    shard = dict(group=group, first_class=SPLITS[9][rank], num_classes=9, label_smoothing=0.1)
    sent = []
    gather = op._all_gather
    op._all_gather = lambda out, t, **more: (sent.append(t.nbytes), gather(out, t, **more))[1]
    try:
        with CommDebugMode() as all_of_it:
            loss = fr.distributed.cross_entropy(local, target, **shard)
        assert sent == [16 * 20] and all_of_it.get_total_counts() == 1
        with CommDebugMode() as all_of_it:
            loss.backward()
        assert all_of_it.get_total_counts() == 0
    finally:
        op._all_gather = gather


def compiled(rank, group):
    x, target = case((20, 9), torch.float32)
    shard = dict(group=group, first_class=SPLITS[9][rank], num_classes=9, label_smoothing=0.1)
    weight = torch.randn(SPLITS[9][rank + 1] - SPLITS[9][rank], 6)
    hidden = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))

    def both(local, hidden, weight):
        loss = fr.distributed.cross_entropy(local * 1, target, **shard)
        return loss, fr.distributed.linear_cross_entropy(hidden * 1, weight, target, **shard)

    results = []
    for f in (both, torch.compile(both, fullgraph=True, backend="aot_eager")):
        inputs = [part_of(x, 9, rank).requires_grad_(), hidden.requires_grad_(), weight.requires_grad_()]
        losses = f(*inputs)
        results.append((*losses, *torch.autograd.grad(sum(losses), inputs)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def refused(rank, group):
    x, target = case((20, 9), torch.float32)
    local = part_of(x, 9, rank).requires_grad_()
    shard = dict(group=group, first_class=SPLITS[9][rank], num_classes=9)
    f = fr.distributed.cross_entropy
    for error, words, call in (
        (ValueError, r"target must be in \[0, 9\)", lambda: f(local, target + 5, **shard)),
        (
            ValueError,
            "first_class must be at least 0",
            lambda: f(local, target, **{**shard, "first_class": -1}),
        ),
        (TypeError, "num_classes must be an int", lambda: f(local, target, **{**shard, "num_classes": 9.0})),
        (TypeError, "group must be a ProcessGroup", lambda: f(local, target, **{**shard, "group": "tp"})),
        (ValueError, "ranks that hold class", lambda: f(local, target, **{**shard, "first_class": 0})),
        (ValueError, "target must have shape", lambda: f(local, target[:5], **shard)),
        (
            ValueError,
            "weight must have one value per class",
            lambda: f(local, target, torch.ones(3), **shard),
        ),
    ):
        with pytest.raises(error, match=words):
            call()
    with pytest.raises(NotImplementedError, match="derivatives of derivatives"):
        torch.autograd.grad(f(local, target, **shard), local, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"transforms of torch\.func"):
        torch.func.grad(lambda x: f(x, target, **shard))(local.detach())


def padded(rank, group):
    """Columns beyond the classes are padding: they may hold anything."""
    x, target = case((20, 9), torch.float32)
    columns = x.new_full((20, 12), torch.nan)
    columns[:, :9] = x
    local = columns[:, 3 * rank : 3 * rank + 3].clone().requires_grad_()
    loss = fr.distributed.cross_entropy(
        local, target, group=group, first_class=3 * rank, num_classes=9, label_smoothing=0.1
    )
    want, gradient = whole_gradient(x, target, None, dict(label_smoothing=0.1))
    assert_rounded(loss.detach(), want)
    loss.backward()
    wanted = torch.zeros(20, 12, dtype=torch.float64)
    wanted[:, :9] = gradient
    assert_gradient(local.grad, wanted[:, 3 * rank : 3 * rank + 3], 2.0)


def own_parts(rank, group):
    """Where a rank's part lies is where torch says it does."""
    flat, square = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2))
    cut = (Replicate(), Shard(0), Shard(1))
    # Sides that ranks share unevenly, that are shorter than there are ranks, without elements, and even.
    for shape in ((9, 5), (2, 3), (1, 1), (0, 4), (8, 8)):
        for mesh, placements in [(flat, p) for p in itertools.product(cut)] + [
            (square, p) for p in itertools.product(cut, cut)
        ]:
            sizes, starts = compute_local_shape_and_global_offset(shape, mesh, placements)
            part = own_part(torch.Size(shape), mesh, placements)
            assert tuple(each.stop - each.start for each in part) == tuple(sizes), (shape, placements)
            assert 0 in sizes or tuple(each.start for each in part) == tuple(starts), (shape, placements)


def placed(rank, group):
    """Of a DTensor the loss and the gradient are those of the whole, however it is placed."""
    flat, square = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2))
    cases = [(flat, [p]) for p in (Replicate(), Shard(0), Shard(1), Shard(2))]
    cases += [
        (square, [a, b]) for a, b in ((Shard(0), Shard(1)), (Shard(1), Shard(1)), (Shard(2), Replicate()))
    ]
    for (mesh, placements), options in itertools.product(cases, OPTIONS[1:]):
        for soft, plain in ((0, 0), (0, 1), (1, 0)):
            x, target = case((6, 9, 5), torch.float32, soft)
            weight = None if soft else torch.linspace(0, 1, 9)
            if not soft:
                target[0, 1:] = -100
            want, gradient = whole_gradient(x, target, weight, options)
            d = distribute_tensor(x, mesh, placements).requires_grad_()
            everywhere = [Replicate()] * mesh.ndim
            t = target if plain else distribute_tensor(target, mesh, everywhere)
            loss = fr.cross_entropy(d, t, weight, **options)
            assert isinstance(loss, DTensor) and loss.shape == want.shape
            if options.get("reduction", "mean") == "mean":
                assert loss.placements == tuple(everywhere)
            what = (placements, options, soft, plain)
            assert_rounded(loss.full_tensor().detach(), want, what)
            (got,) = torch.autograd.grad(loss.sum(), d)  # torch 2.10 gathers what it puts into .grad
            assert got.placements == d.placements
            assert_gradient(got.full_tensor(), gradient, 2.0, what)

    x, target = case((1, 9), torch.float32)
    for placement, reduction in itertools.product((Replicate(), Shard(0)), ("none", "mean")):
        loss = fr.cross_entropy(distribute_tensor(x[0], flat, [placement]), target[0], reduction=reduction)
        torch.testing.assert_close(loss.full_tensor(), fr.cross_entropy(x[0], target[0]))

    x, target = case((2, 3, 4, 2, 3), torch.float32)
    loss = fr.cross_entropy(distribute_tensor(x, flat, [Shard(2)]), target, reduction="none")
    torch.testing.assert_close(loss.full_tensor(), fr.cross_entropy(x, target, reduction="none"))

    partial = DTensor.from_local(torch.ones(8, 9) * rank, flat, [Partial()])
    target = torch.zeros(8, dtype=torch.long)
    loss = fr.cross_entropy(partial, target)
    torch.testing.assert_close(loss.full_tensor(), torch.tensor(9.0).log())


def placed_linear(rank, group):
    """However the rows and the layer are split: the values of the whole, and nobody holds logits."""
    flat, square = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2))
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(3, 4, 6), torch.randn(9, 6), torch.randn(9)
    classes, class_weight = torch.randint(9, (3, 4)), torch.linspace(0, 1, 9)
    classes[0, 1:] = -100
    probabilities = torch.randn(3, 4, 9).softmax(-1)
    cases = [(flat, (h,), (w,)) for h, w in itertools.product((Replicate(), Shard(0), Shard(1)), repeat=2)]
    cases += [
        (square, (Shard(0), Replicate()), (Replicate(), Shard(0))),
        (square, (Shard(1), Shard(2)), (Shard(0), Replicate())),
        (square, (Shard(0), Shard(1)), (Shard(0), Shard(0))),
        (square, (Replicate(), Shard(0)), (Shard(0), Shard(1))),
    ]
    inputs = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
    for (mesh, of_hidden, of_weight), options in itertools.product(cases, OPTIONS):
        for target, weights in ((classes, class_weight), (probabilities, None)):
            options = dict(options, class_weight=weights)
            whole = fr.linear_cross_entropy(inputs[0], inputs[1], target, inputs[2], **options)
            want = torch.autograd.grad(whole.sum(), inputs)
            of_bias = [Shard(0) if p == Shard(0) else Replicate() for p in of_weight]
            parts = [
                distribute_tensor(t, mesh, placements).requires_grad_()
                for t, placements in ((hidden, of_hidden), (weight, of_weight), (bias, of_bias))
            ]
            loss = fr.linear_cross_entropy(parts[0], parts[1], target, parts[2], **options)
            torch.testing.assert_close(loss.full_tensor(), whole)
            for part, got, wanted in zip(parts, torch.autograd.grad(loss.sum(), parts), want, strict=True):
                assert got.placements == part.placements
                torch.testing.assert_close(got.full_tensor(), wanted, rtol=1e-5, atol=1e-6)
            # A plain bias is the same on all ranks, and so is its gradient.
            loss = fr.linear_cross_entropy(parts[0], parts[1], target, inputs[2], **options)
            (got,) = torch.autograd.grad(loss.sum(), inputs[2])
            torch.testing.assert_close(got, want[2], rtol=1e-5, atol=1e-6)


class LargeStorages(TorchDispatchMode):
    """The memory of tensors of at least `least` elements that operators give."""

    def __init__(self, least):
        super().__init__()
        self.least, self.seen = least, {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        for t in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(t, torch.Tensor) and t.numel() >= self.least:
                memory = t.untyped_storage()
                self.seen[memory.data_ptr()] = memory  # kept, so that no address comes twice
        return result


def logits_are_never_whole(rank, group):
    mesh = init_device_mesh("cpu", (2, 2))
    hidden, weight = torch.randn(2048, 8), torch.randn(512, 8)
    target = torch.arange(2048) % 512
    h = distribute_tensor(hidden, mesh, [Shard(0), Replicate()]).requires_grad_()
    w = distribute_tensor(weight, mesh, [Replicate(), Shard(0)]).requires_grad_()
    quarter = 2048 * 512 // 4 // 4  # of the logits that this rank would have
    with LargeStorages(quarter + 1) as made:
        fr.linear_cross_entropy(h, w, target).backward()
    assert not made.seen


def the_gradient_is_all_that_is_made(rank, group):
    """Of the size of a rank's logits, forward and backward."""
    target = torch.arange(64) % 1200
    for dtype in (torch.float32, torch.bfloat16):
        local = torch.randn(64, 300).to(dtype).requires_grad_()
        with LargeStorages(64 * 300 // 2) as made:
            loss = fr.distributed.cross_entropy(
                local, target, group=group, first_class=300 * rank, num_classes=1200, label_smoothing=0.1
            )
            loss.backward()
        assert set(made.seen) - {local.data_ptr()} == {local.grad.data_ptr()}, dtype


def said(call):
    """The error of a call, in its words."""
    with pytest.raises(ValueError) as caught:
        call()
    return f"{type(caught.value).__name__}: {caught.value}"


def one_rank_alone(rank, group):
    """A class index out of range in the rows of one rank is the same error on all, and nobody waits."""
    flat, square = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2))
    x, target = case((20, 9), torch.float32)
    hidden, weight = torch.randn(20, 6), torch.randn(9, 6)
    bad = target.clone()
    bad[11] = 9
    mine = bad if rank == 2 else target
    local = part_of(x, 9, rank).requires_grad_()
    shard = dict(group=group, first_class=SPLITS[9][rank], num_classes=9)
    layer = part_of(weight, 9, rank, 0)
    calls = {}
    calls["classes by hand"] = lambda t: fr.distributed.cross_entropy(local, t, **shard)
    calls["linear by hand"] = lambda t: fr.distributed.linear_cross_entropy(hidden, layer, t, **shard)
    for mesh, of_rows, of_layer in (
        (flat, [Shard(0)], [Replicate()]),
        (flat, [Shard(1)], [Shard(0)]),
        (square, [Shard(0), Shard(1)], [Replicate(), Shard(0)]),
        (square, [Shard(1), Shard(0)], [Shard(0), Replicate()]),
    ):
        logits = distribute_tensor(x, mesh, of_rows)
        h = distribute_tensor(hidden, mesh, [Shard(0) if p == Shard(0) else Replicate() for p in of_rows])
        w = distribute_tensor(weight, mesh, of_layer)
        for reduction in ("mean", "sum", "none"):
            options = dict(reduction=reduction)
            calls[f"{reduction} of {of_rows}"] = lambda t, x=logits, o=options: fr.cross_entropy(x, t, **o)
            calls[f"linear {reduction} of {of_rows}"] = lambda t, h=h, w=w, o=options: (
                fr.linear_cross_entropy(h, w, t, **o)
            )
    for name, call in calls.items():
        # A row of rank 2 alone, and of all, of which some ranks have row 11.
        for target_, place in ((mine, "rank 2"), (bad, "")):
            if "Shard(dim=0)" in name and place and rank == 2:
                target_ = torch.full_like(bad, 9)  # whichever rows it has
            text = said(lambda call=call, t=target_: call(t))
            texts = [None] * RANKS
            dist.all_gather_object(texts, text)
            assert text.startswith("ClassIndexError: ") and "target must be in [0, 9)" in text, (name, text)
            assert set(texts) == {text} and text.endswith(place) and "got 9 at element" in text, (name, texts)
        assert torch.isfinite(call(target.where(target != -100, 0)).detach().sum()), name
    ignored = target.where(torch.arange(20) != 7, -100)
    text = said(lambda: calls["classes by hand"](ignored if rank == 1 else target))
    assert "row 7, which some ranks ignore" in text


CHECKS = (values, hostile, linear, messages, compiled, refused, padded, own_parts, placed)
CHECKS += (placed_linear, logits_are_never_whole, the_gradient_is_all_that_is_made, one_rank_alone)


def on_rank(rank):
    torch.manual_seed(0)
    for check in CHECKS:
        check(rank, dist.group.WORLD)
    padded(rank, init_device_mesh("cpu", (RANKS,)))
    padded(rank, None)


def test_on_four_ranks():
    on_ranks(RANKS, on_rank)


def test_without_a_process_group():
    with pytest.raises(RuntimeError, match="init_process_group"):
        fr.distributed.cross_entropy(
            torch.randn(2, 3), torch.tensor([0, 1]), first_class=0, num_classes=3, group=None
        )
