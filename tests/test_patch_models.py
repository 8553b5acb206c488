"""fr.patch() under whole models: training, torch.compile, checkpoints, processes, an unchanged script."""

import contextlib
import copy
import functools
import gc
import statistics
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import on_ranks, run_python
from patch_cases import (
    INDICES,
    MODELS,
    TORCH,
    TORCH_OPS,
    Functional,
    attention,
    bert,
    encoder,
    gpt2,
    is_patched,
    mlp,
    named,
    ops_seen,
    resnet,
    train,
    uses_fastreg,
)
from torch import nn
from torch._functorch import config as functorch_config
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper, offload_wrapper
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)

import fastreg as fr
from fastreg import _patch

MIN_CUT = "aot_eager_decomp_partition"  # chooses what is computed again, as inductor does


def gradients(model):
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("make", MODELS, ids=named)
def test_models_train_on_fastreg(make, autocast):
    model, loss_of = make(0.1)
    with fr.patched():
        with ops_seen() as seen:
            losses = train(model, loss_of, 1, 0.05, autocast)
        losses += train(model, loss_of, 24, 0.05, autocast)
    assert {"fastreg::dropout", "fastreg::cross_entropy"} <= seen
    assert not seen & TORCH_OPS
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert statistics.fmean(losses[-3:]) < 0.9 * statistics.fmean(losses[:3]), losses
    assert not uses_fastreg(lambda: loss_of(model), "fastreg::cross_entropy")


@pytest.mark.parametrize("make", MODELS, ids=named)
def test_without_dropout_training_is_torchs(make):
    model, loss_of = make(0.0)
    twin = copy.deepcopy(model)
    expected = train(twin, loss_of, 5, 0.02)
    with fr.patched():
        result = train(model, loss_of, 5, 0.02)
    assert result == pytest.approx(expected, rel=1e-5, abs=1e-5)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [bert, resnet], ids=named)
def test_mean_loss_with_dropout_is_torchs(make):
    model, loss_of = make(0.2)
    model.train()
    with torch.no_grad():
        theirs = [loss_of(model).item() for _ in range(150)]
        with fr.patched():
            ours = [loss_of(model).item() for _ in range(150)]
    error = ((statistics.variance(ours) + statistics.variance(theirs)) / 150) ** 0.5
    assert statistics.stdev(ours) > 0
    assert abs(statistics.fmean(ours) - statistics.fmean(theirs)) < 4.5 * error
    assert 0.6 < statistics.stdev(ours) / statistics.stdev(theirs) < 1.6


def uses_fastreg_compiled(model, loss_of, backend):
    """Losses of a compiled training step and of the same steps eagerly, from the same seeds."""
    eager = copy.deepcopy(model)
    torch.manual_seed(5)
    expected = train(eager, loss_of, 3, 0.02)
    compiled = torch.compile(loss_of, backend=backend, fullgraph=True)
    torch.manual_seed(5)
    with ops_seen() as seen:
        result = train(model, compiled, 3, 0.02)
    assert {"fastreg::dropout", "fastreg::cross_entropy"} <= seen
    assert not seen & TORCH_OPS
    return result, expected


@pytest.mark.parametrize(
    "make", [bert, resnet, encoder, attention, pytest.param(gpt2, marks=pytest.mark.slow)], ids=named
)
def test_compiled_fullgraph(make):
    with fr.patched():
        result, expected = uses_fastreg_compiled(*make(0.1), "aot_eager")
    assert result == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("make", [mlp, encoder], ids=named)
def test_compiled_by_inductor(make):
    with fr.patched(), torch._inductor.config.patch(fallback_random=True):
        result, expected = uses_fastreg_compiled(*make(0.1), "inductor")
    assert result == pytest.approx(expected, rel=1e-4)


def test_compiled_under_autocast():
    model, loss_of = mlp(0.1)
    with fr.patched(), ops_seen() as seen:
        losses = train(model, torch.compile(loss_of, backend="aot_eager", fullgraph=True), 2, autocast=True)
    assert {"fastreg::dropout", "fastreg::cross_entropy"} <= seen
    assert all(map(torch.isfinite, map(torch.tensor, losses)))


def traced_targets(function, *args):
    """(compiled function, list to which each compilation adds the functions that its graph calls)."""
    graphs = []

    def backend(graph, _):
        names = set()
        for part in graph.modules():
            if isinstance(part, torch.fx.GraphModule):
                names |= {str(node.target) for node in part.graph.nodes if node.op == "call_function"}
        graphs.append(names)
        return graph.forward

    compiled = torch.compile(function, backend=backend, fullgraph=True)
    compiled(*args)
    return compiled, graphs


@pytest.mark.parametrize("first", ["never compiled", "rules read before", "rules forgotten while patched"])
def test_torch_compile_opens_the_replacements(first):
    """torch.compile knows torch's functions by name; a name that it reads while patched must not hide what is
    behind it.
    """
    x, target = torch.randn(4, 5, requires_grad=True), INDICES
    from torch._dynamo import trace_rules

    trace_rules.clear_lru_cache()
    if first == "rules read before":
        traced_targets(lambda v: F.dropout(v), x)
    with fr.patched():
        if first == "rules forgotten while patched":  # as torch.distributed does
            trace_rules.clear_lru_cache()
        graph = traced_targets(lambda v: F.dropout(v, 0.3), x)[1][0]
        assert any("fastreg.dropout" in name for name in graph), graph
        assert not any("function dropout" in name for name in graph), graph
        graph = traced_targets(lambda v: F.cross_entropy(v, target), x)[1][0]
        assert any("fastreg.cross_entropy" in name for name in graph), graph
        graph = traced_targets(lambda v: F.dropout(v, 0.3), x.detach().to("meta"))[1][0]
        assert any("function dropout" in name for name in graph), graph
    graph = traced_targets(lambda v: F.dropout(v, 0.3), x)[1][0]
    assert graph == {str(TORCH["dropout"])}


@pytest.mark.parametrize(
    "make", [Functional, lambda: nn.Dropout(0.4), lambda: nn.Sequential(nn.Dropout(0.4), nn.ReLU())]
)
def test_what_was_compiled_before_follows_patch_and_unpatch(make):
    x = torch.ones(64, requires_grad=True)
    compiled = torch.compile(make(), backend="aot_eager", fullgraph=True)
    for patched in (False, True, False, True, False):
        with fr.patched() if patched else contextlib.nullcontext():
            assert uses_fastreg(lambda: compiled(x)) == patched


def test_what_was_compiled_while_patched_follows_unpatch():
    x = torch.ones(64, requires_grad=True)
    model = nn.Dropout(0.4)
    with fr.patched():
        half = functools.partial(F.dropout, p=0.5)
        compiled, partial = (torch.compile(f, backend="aot_eager", fullgraph=True) for f in (model, half))
        assert uses_fastreg(lambda: compiled(x)) and uses_fastreg(lambda: partial(x))
    assert not uses_fastreg(lambda: compiled(x))
    assert not uses_fastreg(lambda: partial(x))


def test_a_loss_made_inside_of_compiled_code():
    """As Hugging Face's classifiers do it; torch.compile has a short cut for this class."""
    x = torch.randn(4, 5, requires_grad=True)
    weight = torch.rand(5)
    cases = [
        lambda x: nn.CrossEntropyLoss()(x, INDICES),
        lambda x: nn.CrossEntropyLoss(weight, None, 2, reduction="sum", label_smoothing=0.1)(x, INDICES),
    ]
    for case in cases:
        with fr.patched():
            compiled = torch.compile(case, backend="aot_eager", fullgraph=True)
            assert uses_fastreg(lambda compiled=compiled: compiled(x).backward(), "fastreg::cross_entropy")
            torch.testing.assert_close(compiled(x), case(x))
        assert not uses_fastreg(lambda compiled=compiled: compiled(x).backward(), "fastreg::cross_entropy")
        torch.testing.assert_close(compiled(x), case(x))


@pytest.mark.parametrize("need_weights", [False, True])
def test_compiled_attention(need_weights):
    model = nn.MultiheadAttention(16, 2, 0.3, batch_first=True)
    x = torch.randn(2, 5, 16)
    traced_targets(lambda v: v + 1, x)  # torch.compile reads its rules
    with fr.patched():
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        with ops_seen() as seen:
            torch.manual_seed(7)
            result = compiled(x, x, x, need_weights=need_weights)[0]
            result.sum().backward()
        assert ("fastreg::dropout" if need_weights else "fastreg::attention") in seen
        torch.manual_seed(7)
        torch.testing.assert_close(result, model(x, x, x, need_weights=need_weights)[0])
    assert not uses_fastreg(lambda: compiled(x, x, x))


def test_compiled_transforms_go_to_torch():
    x = torch.randn(4, 5)
    cases = [
        lambda x: torch.vmap(lambda v: F.dropout(v, 0.5), randomness="different")(x),
        lambda x: torch.func.grad(lambda v: F.dropout(v, 0.5).sum())(x),
        lambda x: torch.func.grad(lambda v: F.cross_entropy(v, INDICES))(x),
    ]
    with fr.patched():
        for case in cases:
            with ops_seen() as seen:
                torch.compile(case, backend="aot_eager", fullgraph=True)(x)
            assert not any(name.startswith("fastreg::") for name in seen)


class Recomputed(nn.Module):
    def __init__(self, model, use_reentrant):
        super().__init__()
        self.model, self.use_reentrant = model, use_reentrant

    def forward(self, *args):
        if self.use_reentrant is None:
            return self.model(*args)
        return checkpoint(self.model, *args, use_reentrant=self.use_reentrant)


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["saved", "reentrant"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_checkpoint_recomputes_the_same_mask(use_reentrant, compiled):
    if compiled and use_reentrant:
        pytest.skip("torch.compile does not trace the reentrant kind")
    body = nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.5), nn.GELU(), nn.Dropout(0.3), nn.Linear(16, 4))
    x, target = torch.randn(32, 16, requires_grad=True), torch.randint(4, (32,))
    results = []
    with fr.patched():
        for mode in (None, use_reentrant):
            run = Recomputed(body, mode)
            if compiled:
                run = torch.compile(run, backend="aot_eager", fullgraph=True)
            torch.manual_seed(9)
            body.zero_grad()
            x.grad = None
            with ops_seen() as seen:
                loss = F.cross_entropy(run(x), target)
                loss.backward()
            assert "fastreg::dropout" in seen
            results.append([loss.detach(), x.grad, *(g.clone() for g in gradients(body))])
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)


def selective(body, x):
    def policy(context, op, *args, **kwargs):
        save = op == torch.ops.aten.addmm.default
        return CheckpointPolicy.MUST_SAVE if save else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    return checkpoint(body, x, use_reentrant=False, context_fn=contexts)


def wrapped(wrapper):
    return lambda body, x: wrapper(body)(x)


CHECKPOINTS = {
    "saved": lambda body, x: checkpoint(body, x, use_reentrant=False),
    "reentrant": lambda body, x: checkpoint(body, x, use_reentrant=True),
    "selective": selective,
    "sequential": lambda body, x: checkpoint_sequential(body, 2, x, use_reentrant=False),
    "sequential, reentrant": lambda body, x: checkpoint_sequential(body, 2, x, use_reentrant=True),
    "wrapped module": wrapped(checkpoint_wrapper),
    "offloaded": wrapped(offload_wrapper),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
@pytest.mark.parametrize("first", [True, False], ids=["patched", "not patched"])
@pytest.mark.parametrize("then", [True, False], ids=["patched", "not patched"])
def test_the_mask_of_the_forward_pass_is_recomputed(kind, first, then):
    """Whatever is changed between forward and backward: the patch, the default dtype and device, autocast."""
    body = nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.5), nn.GELU(), nn.Dropout(0.3), nn.Linear(16, 4))
    x = torch.randn(32, 16, requires_grad=True)
    results = []
    for run in (lambda body, x: body(x), CHECKPOINTS[kind]):
        torch.manual_seed(9)
        body.zero_grad()
        x.grad = None
        with fr.patched() if first else contextlib.nullcontext():
            output = run(body, x)
        torch.set_default_dtype(torch.float64)
        try:
            within = fr.patched() if then else contextlib.nullcontext()
            with within, torch.autocast("cpu"), torch.device("meta"):
                output.sum().backward()
                assert is_patched() == then
        finally:
            torch.set_default_dtype(torch.float32)
        results.append([output.detach(), x.grad, *(g.clone() for g in gradients(body))])
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)


FIRST = """
import sys, torch
from torch.utils.checkpoint import checkpoint
import fastreg as fr

def other_masks(change, reentrant):
    x, drop = torch.ones(512, requires_grad=True), torch.nn.Dropout(0.5)
    output = checkpoint(drop, x, use_reentrant=reentrant)
    change(drop)
    output.sum().backward()
    return int(((x.grad != 0) != (output != 0)).sum())

change = {
    "patch": lambda drop: fr.patch(),
    "convert": fr.convert,
    "keep_class": lambda drop: fr.convert(drop, keep_class=True),
}[sys.argv[1]]
print(other_masks(change, sys.argv[2] == "True"))
"""


@pytest.mark.parametrize("change", ["patch", "convert", "keep_class"])
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["saved", "reentrant"])
def test_the_first_change_of_a_process_may_come_before_backward(change, use_reentrant):
    assert run_python(FIRST, change, use_reentrant, check=True).stdout == "0\n"


@pytest.mark.parametrize("kind", CHECKPOINTS)
@pytest.mark.parametrize("keep_class", [False, True], ids=["convert", "keep_class"])
def test_a_model_converted_before_backward_has_the_mask_of_the_forward_pass(kind, keep_class):
    results = []
    for run in (lambda body, x: body(x), CHECKPOINTS[kind]):
        torch.manual_seed(8)
        body = nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.5), nn.GELU(), nn.Dropout(0.3), nn.Linear(16, 4))
        x = torch.randn(32, 16, requires_grad=True)
        output = run(body, x)
        fr.convert(body, keep_class=keep_class)
        output.sum().backward()
        with ops_seen() as seen:  # what is undone for a recomputation is done again
            body(x)
        assert "fastreg::dropout" in seen and (type(body[1]) is nn.Dropout) == keep_class
        results.append([output.detach(), x.grad, *gradients(body)])
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["saved", "reentrant"])
def test_conversions_one_after_the_other(use_reentrant):
    """Each pass is computed again as it was, whatever came after it, in checkpoints of checkpoints too."""
    first, second = nn.Dropout(0.5), nn.Dropout(0.5)

    def within(x):
        return checkpoint(
            first, checkpoint(second, x, use_reentrant=use_reentrant), use_reentrant=use_reentrant
        )

    changes = [lambda: None, lambda: fr.convert(first, keep_class=True), lambda: fr.convert(second)]
    passes = []
    for change in (*changes, lambda: fr.convert(first)):
        change()
        x = torch.ones(512, requires_grad=True)
        passes.append((x, checkpoint(within, x, use_reentrant=use_reentrant)))
    assert type(first) is type(second) is fr.nn.Dropout
    for x, output in passes[::2] + passes[1::2]:
        output.sum().backward()
        assert torch.equal(x.grad != 0, output != 0)
        assert type(first) is type(second) is fr.nn.Dropout and "_fastreg_kept" not in vars(first)


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["saved", "reentrant"])
def test_stochastic_depth_converted_before_backward(use_reentrant):
    ops = pytest.importorskip("torchvision.ops", reason="needs torchvision", exc_type=ImportError)
    drop, x = ops.StochasticDepth(0.5, "row"), torch.ones(64, 2, requires_grad=True)
    output = checkpoint(drop, x, use_reentrant=use_reentrant)
    fr.convert(drop)
    output.sum().backward()
    assert torch.equal(x.grad != 0, output != 0)
    assert type(drop) is fr.nn.DropPath and drop.p == 0.5 and "p" not in vars(drop)


def test_conversions_of_modules_that_are_gone_are_forgotten():
    known = len(_patch._conversions._all)
    models = [fr.convert(nn.Sequential(nn.Dropout(), nn.CrossEntropyLoss())) for _ in range(5)]
    assert len(_patch._conversions._all) >= known + 10
    del models
    gc.collect()
    assert len(_patch._conversions._all) <= known


class WithGenerator(nn.Module):
    """Whatever draws from a generator that it is given."""

    def __init__(self, generator):
        super().__init__()
        self.generator, self.augment = generator, fr.augment.Augment(hflip=0.5, rotate=20, brightness=0.3)

    def forward(self, x):
        g = dict(generator=self.generator)
        x = fr.dropout_add(fr.dropout(x, 0.5, **g), x, 0.3, **g)
        x = fr.drop_path(fr.alpha_dropout(x, 0.1, **g), 0.2, **g)
        x = fr.scaled_dot_product_attention(x, x, x, None, 0.3, **g)
        x = self.augment(x.sigmoid(), **g)
        for mix in (fr.augment.mixup, fr.augment.cutmix):
            x = mix(x, torch.arange(len(x)), num_classes=len(x), **g)[0]
        return x


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_generators_given_by_name_are_not_drawn_from_again(kind):
    first, second = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8)
    results = []
    for run in (lambda body, x: body(x), CHECKPOINTS[kind]):
        generator = torch.Generator().manual_seed(5)
        body = nn.Sequential(WithGenerator(generator), WithGenerator(generator))
        inputs = [x.clone().requires_grad_() for x in (first, second)]
        outputs = [run(body, x) for x in inputs]  # both passes before the first one is computed again
        for output in outputs:
            output.square().sum().backward()
        results.append([*outputs, *(x.grad for x in inputs), fr.dropout(first, 0.5, generator=generator)])
    for plain, recomputed in zip(*results, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-4, atol=1e-4)  # selective: other sums


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["saved", "reentrant"])
def test_generators_in_checkpoints_of_checkpoints(use_reentrant):
    again = functools.partial(checkpoint, use_reentrant=use_reentrant)
    generator, x = torch.Generator().manual_seed(5), torch.ones(512, requires_grad=True)

    def drop(x):
        return fr.dropout(x, 0.3, generator=generator)

    output = again(lambda x: drop(again(lambda x: again(drop, drop(x)), x)), x)
    with pytest.raises(ZeroDivisionError):  # a pass that ends early leaves nothing behind
        again(lambda x: drop(x) / (1 // 0), x)
    output.sum().backward()
    assert torch.equal(x.grad != 0, output != 0)
    fresh = torch.Generator().manual_seed(5)
    for _ in range(4):
        fr.dropout(x, 0.3, generator=fresh)
    assert torch.equal(drop(x) != 0, fr.dropout(x, 0.3, generator=fresh) != 0)


def test_fastreg_may_be_imported_within_a_checkpoint_and_loaded_again():
    run_python(
        """
import importlib, torch
from torch.utils.checkpoint import checkpoint

def drop(x):
    import fastreg
    return fastreg.dropout(x, 0.5, generator=torch.Generator().manual_seed(1))

def both():
    for reentrant in (False, True):
        x = torch.ones(64, requires_grad=True)
        output = checkpoint(drop, x, use_reentrant=reentrant)
        output.sum().backward()
        assert torch.equal(x.grad != 0, output != 0)

both()
from fastreg import _patch
importlib.reload(_patch)
both()
""",
        check=True,
    )


def test_a_torch_with_other_checkpoints_can_be_used():
    """Its names are torch's own, which a later one may change."""
    run_python(
        """
import pytest, torch, torch.utils.checkpoint as checkpoints
reentrant, frame = checkpoints.CheckpointFunction.forward, vars(checkpoints._CheckpointFrame).copy()
hook = checkpoints._checkpoint_hook
del checkpoints._checkpoint_hook
with pytest.warns(UserWarning, match="does not know the checkpoints of torch"):
    import fastreg
checkpoints._checkpoint_hook = hook
assert checkpoints.CheckpointFunction.forward is reentrant and vars(checkpoints._CheckpointFrame) == frame
with fastreg.patched():
    x = torch.ones(64, requires_grad=True)
    output = checkpoints.checkpoint(torch.nn.functional.dropout, x, use_reentrant=False)
    output.sum().backward()
assert torch.equal(x.grad != 0, output != 0)
""",
        check=True,
    )


@pytest.mark.parametrize("door", ["patch", "convert", "by name"])
def test_a_compiled_pass_that_computes_again_has_the_same_mask(door):
    """With a small memory budget the backward pass computes again what was cheap in the forward pass."""
    drop = {"patch": nn.Dropout(0.5), "convert": fr.convert(nn.Dropout(0.5))}.get(door, fr.dropout)
    x, saved = torch.rand(10_000, requires_grad=True), []
    for budget in (1.0, 0.5, 0.0):
        with functorch_config.patch(activation_memory_budget=budget), fr.patched():
            torch._dynamo.reset()
            run = torch.compile(lambda x: (drop(x.exp()) + 1).log().cos(), backend=MIN_CUT, fullgraph=True)
            saved.append(0)

            def count(tensor):
                saved[-1] += tensor.nbytes
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
                output = run(x)
        output.sum().backward()
        assert torch.equal(x.grad == 0, output == 1) and 4500 < (x.grad == 0).sum() < 5500
        x.grad = None
    assert saved[2] < saved[0]


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["saved", "reentrant"])
def test_checkpointed_bert_has_the_gradients_of_bert(use_reentrant):
    model, loss_of = bert(0.2)
    model.train()
    results = []
    with fr.patched():
        for checkpointing in (False, True):
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
                assert model.is_gradient_checkpointing
            model.zero_grad()
            torch.manual_seed(9)
            loss_of(model).backward()
            results.append([g.clone() for g in gradients(model)])
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)


def test_no_grad_and_inference_mode():
    model, loss_of = mlp(0.3)
    with fr.patched():
        for mode in (torch.no_grad, torch.inference_mode):
            with mode(), ops_seen() as seen:
                loss = loss_of(model.train())
            assert not loss.requires_grad and {"fastreg::dropout", "fastreg::cross_entropy"} <= seen


@contextlib.contextmanager
def process_group(folder):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
@pytest.mark.parametrize("door", ["patched", "convert"])
def test_ddp_of_one(tmp_path, door):
    model, loss_of = resnet(0.2)
    alone = copy.deepcopy(model)
    with process_group(tmp_path), fr.patched():
        if door == "convert":
            model = fr.convert(model)
        parallel = nn.parallel.DistributedDataParallel(model)
        with ops_seen() as seen:
            torch.manual_seed(4)
            loss_of(parallel).backward()
        torch.manual_seed(4)
        loss_of(alone).backward()
    assert "fastreg::dropout" in seen
    for ours, theirs in zip(gradients(model), gradients(alone), strict=True):
        torch.testing.assert_close(ours, theirs)


def _one_of_two(rank, door):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 3))
    if door == "patch":
        fr.patch()
    else:
        model = fr.convert(model)
    model = nn.parallel.DistributedDataParallel(model)
    if door == "patch":  # and compiled: starting torch.distributed makes torch.compile read its rules anew
        model = torch.compile(model, backend="aot_eager")
    optimizer, loss = torch.optim.SGD(model.parameters(), lr=0.2), nn.CrossEntropyLoss()
    torch.manual_seed(rank)
    x = torch.randn(64, 8)
    y = x[:, :3].argmax(1)
    losses = []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(30):
            optimizer.zero_grad()
            value = loss(model(x), y)
            value.backward()
            optimizer.step()
            losses.append(value.item())
    seen = {event.key for event in profile.key_averages()}
    assert "fastreg::dropout" in seen and "aten::native_dropout" not in seen, sorted(seen)
    assert losses[-1] < 0.8 * losses[0], losses
    mine = torch.cat([p.detach().flatten() for p in model.parameters()])
    both = [torch.empty_like(mine) for _ in range(2)]
    torch.distributed.all_gather(both, mine)
    assert torch.equal(*both)


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
@pytest.mark.parametrize("door", ["patch", "convert"])
def test_ddp_of_two(door):
    on_ranks(2, _one_of_two, door)


SCRIPT = """
import torch
from torch import nn
from torch.nn.functional import cross_entropy, dropout


@torch.jit.script
def bias_dropout_add(x: torch.Tensor, bias: torch.Tensor, p: float, training: bool) -> torch.Tensor:
    return torch.nn.functional.dropout(x + bias, p=p, training=training) + x


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 32), nn.Linear(32, 3)

    def forward(self, x):
        return self.second(dropout(torch.relu(self.first(x)), 0.2, self.training))


torch.manual_seed(0)
x = torch.randn(128, 8)
y = x[:, :3].argmax(1)
net = Net()
optimizer = torch.optim.SGD(net.parameters(), lr=0.2)
with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
    for epoch in range(40):
        optimizer.zero_grad()
        loss = cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
print("ops", *sorted({event.key for event in profile.key_averages()}))
print("loss", loss.item())
bias_dropout_add(torch.ones(3), torch.ones(3), 0.5, True)
"""


@pytest.mark.parametrize("patched", [True, False])
def test_an_unchanged_script(tmp_path, patched):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    code = f"script = {str(script)!r}; exec(compile(open(script).read(), script, 'exec'))"
    if patched:
        code = f"import fastreg as fr; fr.patch(); {code}"
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    lines = dict(line.split(" ", 1) for line in run.stdout.splitlines() if " " in line)
    ops = set(lines["ops"].split())
    assert ({"fastreg::dropout", "fastreg::cross_entropy"} <= ops) == patched
    assert bool(ops & TORCH_OPS) != patched
    assert float(lines["loss"]) < 0.7
