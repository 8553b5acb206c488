"""Sharing through everything that torch does to a model, and the same training with the places summed by
hand.
"""

import copy
import io
import pickle

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from helpers import on_ranks
from torch import nn

import fastreg as fr


class Net(nn.Module):
    """Two blocks of one shape around a third, an embedding tied to the output."""

    def __init__(self, width=4, words=7):
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.first = nn.Sequential(nn.Linear(width, width), nn.Tanh())
        self.middle = nn.Linear(width, width)
        self.last = nn.Sequential(nn.Linear(width, width), nn.Tanh())
        self.head = nn.Linear(width, words)

    def forward(self, x):
        return self.head(self.last(self.middle(self.first(self.embed(x)))))


def shared(**kwargs):
    model = Net(**kwargs)
    fr.share_parameters(model, "first", "last")
    fr.share_parameters(model, "embed.weight", "head.weight")
    return model


def check(model, like=None):
    """It is shared as `shared` makes it, and has the values of `like`."""
    assert model.first[0].weight is model.last[0].weight and model.first[0].bias is model.last[0].bias
    assert model.embed.weight is model.head.weight
    assert len(list(model.parameters())) == 6 and isinstance(model.head.weight, nn.Parameter)
    if like is not None:
        mine, theirs = model.state_dict(), like.state_dict()
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


X, Y = torch.tensor([0, 3, 6, 3, 1]), torch.tensor([1, 2, 0, 5, 6])


def loss_of(model):
    return fr.cross_entropy(model(X), Y)


# ---------------------------------------------------------------------------------------------- what sharing
# means


def test_first_named_wins_and_nothing_else_changes():
    model = Net()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.first[0].weight.grad = gradient = torch.ones(4, 4)
    fr.share_parameters(model.first, model.last)
    assert model.last[0].weight is model.first[0].weight and model.last[0].weight.grad is gradient
    for name, p in model.named_parameters(remove_duplicate=False):
        assert torch.equal(p, before[name.replace("last", "first")])


def test_gradients_are_summed_over_the_places():
    model = shared()
    apart = Net()
    apart.load_state_dict(model.state_dict())
    loss_of(model).backward()
    loss_of(apart).backward()
    torch.testing.assert_close(
        model.first[0].weight.grad, apart.first[0].weight.grad + apart.last[0].weight.grad
    )
    torch.testing.assert_close(model.first[0].bias.grad, apart.first[0].bias.grad + apart.last[0].bias.grad)
    torch.testing.assert_close(model.embed.weight.grad, apart.embed.weight.grad + apart.head.weight.grad)
    torch.testing.assert_close(model.middle.weight.grad, apart.middle.weight.grad)


@pytest.mark.parametrize("mode", ["subgradient", "proximal"])
def test_stepped_and_penalised_once(mode):
    model = shared()
    l1, l2, lr = 0.03, 0.1, 0.5
    groups = fr.optim.penalty_groups(model, l1=l1, l2=l2)
    weights = [model.embed.weight, model.first[0].weight, model.middle.weight]
    want = sum(l1 * w.abs().sum() + l2 / 2 * (w * w).sum() for w in weights)
    torch.testing.assert_close(fr.optim.penalty(groups), want)
    torch.testing.assert_close(
        fr.optim.penalty(
            [p for _, p in model.named_parameters(remove_duplicate=False) if p.ndim > 1], l1=l1, l2=l2
        ),
        want,
    )
    optimizer = fr.optim.SGD(groups, lr=lr, l1_mode=mode)
    loss_of(model).backward()
    w, g = model.first[0].weight.detach().clone(), model.first[0].weight.grad.clone()
    optimizer.step()
    if mode == "subgradient":
        expected = w - lr * (g + l2 * w + l1 * w.sign())
    else:
        expected = nn.functional.softshrink(w - lr * (g + l2 * w), lr * l1)
    torch.testing.assert_close(model.last[0].weight.detach(), expected)
    check(model)


def test_three_at_once_and_one_after_the_other():
    a, b, c, d = (nn.Linear(3, 3) for _ in range(4))
    fr.share_parameters(a, b)
    fr.share_parameters(c, d)
    fr.share_parameters(b, c)
    assert a.weight is b.weight is c.weight is d.weight and a.bias is d.bias
    c.load_state_dict(nn.Linear(3, 3).state_dict(), assign=True)
    assert a.weight is b.weight is c.weight is d.weight and a.bias is d.bias
    e, f, g = (nn.Linear(3, 3) for _ in range(3))
    fr.share_parameters(e, f, g)
    assert e.weight is f.weight is g.weight


def test_a_place_that_has_left_does_not_come_along():
    a, b, c = (nn.Linear(3, 3) for _ in range(3))
    fr.share_parameters(a, b)
    b.weight = nn.Parameter(torch.zeros(3, 3))
    fr.share_parameters(b, c)
    assert b.weight is c.weight and a.weight is not b.weight and a.bias is b.bias is c.bias
    a.load_state_dict(nn.Linear(3, 3).state_dict(), assign=True)
    assert b.weight is c.weight and not b.weight.any() and a.bias is b.bias is c.bias


def test_already_tied_by_hand_is_kept_tied():
    model = Net()
    model.head.weight = model.embed.weight
    fr.share_parameters(model, "embed.weight", "head.weight")
    model.load_state_dict(Net().state_dict(), assign=True)
    assert model.head.weight is model.embed.weight


# ---------------------------------------------------------------------------------------------- what it
# survives


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("through_file", [False, True])
def test_load_state_dict(assign, strict, through_file):
    source, model = shared(), shared()
    state = source.state_dict()
    if through_file:
        file = io.BytesIO()
        torch.save(state, file)
        assert file.tell() < 2 * sum(p.numel() * p.element_size() for p in source.parameters()) + 8000
        file.seek(0)
        state = torch.load(file, weights_only=True)
    model.load_state_dict(state, assign=assign, strict=strict)
    check(model, source)
    model.load_state_dict(shared().state_dict(), assign=assign)
    check(model)
    loss_of(model).backward()
    assert model.head.weight.grad is model.embed.weight.grad


@pytest.mark.parametrize("name", ["embed.weight", "head.weight"])
@pytest.mark.parametrize("assign", [False, True])
def test_a_checkpoint_with_one_of_the_names(name, assign):
    model, value = shared(), torch.randn(7, 4)
    missing, unexpected = model.load_state_dict({name: value}, assign=assign, strict=False)
    check(model)
    assert torch.equal(model.embed.weight, value) and name not in missing and not unexpected
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({name: value}, assign=assign)
    check(model)


@pytest.mark.parametrize("part", ["first", "last", "embed", "head"])
def test_loading_a_part_alone(part):
    model, source = shared(), Net()
    getattr(model, part).load_state_dict(getattr(source, part).state_dict(), assign=True)
    check(model)
    for name, p in getattr(source, part).named_parameters():
        assert torch.equal(getattr(model, part).get_parameter(name), p)


@pytest.mark.parametrize("strict", [True, False])
def test_assigning_keeps_what_is_frozen(strict):
    model = shared()
    model.head.weight.requires_grad_(False)
    model.load_state_dict(Net().state_dict(), assign=True, strict=strict)
    check(model)
    assert not model.embed.weight.requires_grad and model.middle.weight.requires_grad


@pytest.mark.parametrize(
    "move", ["half", "double", "to", "to_empty", "apply", "meta and back", "overwriting", "swapping"]
)
def test_moving(move, request):
    model = shared()
    loss_of(model).backward()
    gradient = model.embed.weight.grad.clone()
    source = copy.deepcopy(model)
    if move == "meta and back":
        model.to("meta")
        check(model)
        assert model.embed.weight.is_meta
        model.to_empty(device="cpu")
        check(model)
        model.load_state_dict(source.state_dict())
    elif move == "to_empty":
        with torch.device("meta"):
            model = shared()
        model.to_empty(device="cpu")
        check(model)
        model.load_state_dict(source.state_dict(), assign=True)
    elif move == "apply":
        model._apply(lambda t: t.clone())
    elif move in ("overwriting", "swapping"):  # what torch means to do by default one day
        name = f"set_{'overwrite' if move == 'overwriting' else 'swap'}_module_params_on_conversion"
        getattr(torch.__future__, name)(True)
        request.addfinalizer(lambda: getattr(torch.__future__, name)(False))
        model.double().float()
    else:
        {"half": model.half, "double": model.double, "to": lambda: model.to(torch.bfloat16)}[move]()
        assert (
            model.embed.weight.dtype
            == {"half": torch.float16, "double": torch.float64, "to": torch.bfloat16}[move]
        )
        source.to(model.embed.weight.dtype)
    check(model, source)
    if move in ("half", "double", "to", "apply", "overwriting"):
        torch.testing.assert_close(model.head.weight.grad, gradient.to(model.head.weight.dtype))


def test_moving_a_part():
    model = shared()
    model.last.double()
    check(model)
    assert model.first[0].weight.dtype == torch.float64
    model.head.to("meta")
    check(model)
    assert model.embed.weight.is_meta


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save", "twice"])
def test_copies_are_shared_and_stay_so(how):
    model = shared()

    def through(model, how):
        if how == "deepcopy":
            return copy.deepcopy(model)
        if how == "pickle":
            return pickle.loads(pickle.dumps(model))
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        return torch.load(file, weights_only=False)

    clone = through(through(model, "pickle"), "deepcopy") if how == "twice" else through(model, how)
    check(clone, model)
    assert clone.head.weight is not model.head.weight
    kept = model.state_dict()["head.weight"].clone()
    clone.load_state_dict(Net().state_dict(), assign=True)
    check(clone)
    clone.to("meta")
    clone.to_empty(device="cpu")
    check(clone)
    check(model)
    assert torch.equal(model.head.weight, kept) and model.head.weight.device.type == "cpu"


def test_copy_of_a_part_stands_alone():
    model = shared()
    before = model.first[0].weight.detach().clone()
    part = copy.deepcopy(model.first)
    part.load_state_dict(Net().first.state_dict(), assign=True)
    part.to("meta")
    check(model)
    assert torch.equal(model.first[0].weight, before)


def test_safetensors(tmp_path):
    source, model = shared(), shared()
    safetensors.torch.save_model(source, tmp_path / "model.safetensors")
    with safetensors.safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert len(file.keys()) == 6
    assert safetensors.torch.load_model(model, tmp_path / "model.safetensors") == (set(), [])
    check(model, source)


def test_recurrent_layers_see_the_shared_weight():
    layers = nn.ModuleList([nn.LSTM(3, 3), nn.LSTM(3, 3)])
    fr.share_parameters(*layers)
    layers.load_state_dict(nn.ModuleList([nn.LSTM(3, 3), nn.LSTM(3, 3)]).state_dict(), assign=True)
    x = torch.randn(5, 2, 3)
    assert torch.equal(layers[0](x)[0], layers[1](x)[0])
    layers[0](x)[0].sum().backward()
    assert layers[1].weight_hh_l0.grad.any()


def test_early_stopping_compile_and_functional_call():
    model = shared()
    stopper = fr.EarlyStopping(model)
    stopper.step(1.0)
    want = model(X)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    stopper.restore()
    check(model)
    assert torch.equal(model(X), want)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(X), want)
    zeros = {"embed.weight": torch.zeros(7, 4)}
    out = torch.func.functional_call(model, zeros, (X,))
    assert torch.equal(out, model.head.bias.expand(5, 7))  # the head's weight is zero, too
    check(model)


def _rank(rank):
    torch.manual_seed(0)
    model = shared()
    start = copy.deepcopy(model)
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = fr.optim.SGD(fr.optim.penalty_groups(parallel, l2=0.1), lr=0.5, momentum=0.9)
    xs, ys = (X[:4], X[1:]), (Y[:4], Y[1:])
    for _ in range(3):
        optimizer.zero_grad()
        fr.cross_entropy(parallel(xs[rank]), ys[rank]).backward()
        optimizer.step()
    check(model)
    single = fr.optim.SGD(fr.optim.penalty_groups(start, l2=0.1), lr=0.5, momentum=0.9)
    for _ in range(3):
        single.zero_grad()
        (sum(fr.cross_entropy(start(x), y) for x, y in zip(xs, ys, strict=True)) / 2).backward()
        single.step()
    for mine, want in zip(model.parameters(), start.parameters(), strict=True):
        torch.testing.assert_close(mine, want)

    from torch.distributed.fsdp import fully_shard

    sharded = copy.deepcopy(start)
    fully_shard(sharded)
    check(sharded)
    optimizer = fr.optim.SGD(fr.optim.penalty_groups(sharded, l2=0.1), lr=0.5)
    single = fr.optim.SGD(fr.optim.penalty_groups(start, l2=0.1), lr=0.5)
    single.zero_grad()
    (sum(fr.cross_entropy(start(x), y) for x, y in zip(xs, ys, strict=True)) / 2).backward()
    fr.cross_entropy(sharded(xs[rank]), ys[rank]).backward()
    optimizer.step()
    single.step()
    check(sharded)
    for mine, want in zip(sharded.parameters(), start.parameters(), strict=True):
        torch.testing.assert_close(mine.full_tensor(), want.detach())


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
def test_data_parallel_training_on_two_ranks():
    on_ranks(2, _rank)


# ---------------------------------------------------------------------------------------------- the end of it


def test_unshare():
    model = shared()
    value = model.head.weight.detach().clone()
    fr.unshare_parameters(model, "head.weight")
    assert model.head.weight is not model.embed.weight and torch.equal(model.head.weight, value)
    assert model.first[0].weight is model.last[0].weight
    kept = model.embed.weight, model.first[0].weight
    fr.unshare_parameters(model)
    assert len(list(model.parameters())) == 9
    assert model.embed.weight is kept[0] and model.first[0].weight is kept[1]
    assert all(not {"_apply", "_load_from_state_dict"} & vars(module).keys() for module in model.modules())
    source = Net()
    model.load_state_dict(source.state_dict(), assign=True)
    assert len(list(model.parameters())) == 9 and torch.equal(model.head.weight, source.head.weight)


def test_unshare_one_of_three_and_what_was_never_shared():
    a, b, c = (nn.Linear(3, 3) for _ in range(3))
    fr.share_parameters(a, b, c)
    c.weight.requires_grad_(False)
    fr.unshare_parameters(a)
    assert a.weight is not b.weight and b.weight is c.weight and not a.weight.requires_grad
    b.load_state_dict(nn.Linear(3, 3).state_dict(), assign=True)
    assert b.weight is c.weight and not torch.equal(a.weight, b.weight)
    tied = Net()
    tied.head.weight = tied.embed.weight
    fr.unshare_parameters(tied)
    assert tied.head.weight is tied.embed.weight


def test_a_parameter_given_by_hand_is_left_alone():
    model = shared()
    model.head.weight = own = nn.Parameter(torch.ones(7, 4))
    model.to("meta").to_empty(device="cpu")
    model.load_state_dict(Net().state_dict(), assign=True)
    assert model.head.weight is not model.embed.weight and not torch.equal(
        model.head.weight, model.embed.weight
    )
    assert model.first[0].weight is model.last[0].weight and own.eq(1).all()
    by_hand = model.head.weight
    fr.unshare_parameters(model, "head.weight")
    assert model.head.weight is by_hand


# ---------------------------------------------------------------------------------------------- errors


def frozen(module):
    return module.requires_grad_(False)


L = nn.Linear


@pytest.mark.parametrize(
    "error, words, arguments",
    [
        (ValueError, "expected at least two modules or names to share, got 1", lambda: (L(2, 2),)),
        (
            ValueError,
            "expected at least two modules or names to share, got 1",
            lambda: (Net(), "embed.weight"),
        ),
        (TypeError, r"expected modules, or one module and names .* got \(\)", lambda: ()),
        (TypeError, r"got \(str, str\)", lambda: ("a", "b")),
        (TypeError, r"got \(Parameter, Parameter\)", lambda: (L(2, 2).weight, L(2, 2).weight)),
        (TypeError, r"got \(Net, str, Linear\)", lambda: (Net(), "embed", L(2, 2))),
        (
            ValueError,
            "Net has no parameter or submodule 'embed.wait'",
            lambda: (Net(), "embed.wait", "head.weight"),
        ),
        (
            ValueError,
            "Net has no parameter or submodule 'nose.weight'",
            lambda: (Net(), "head.weight", "nose.weight"),
        ),
        (ValueError, "Net has no parameter or submodule ''", lambda: (Net(), "", "head")),
        (
            ValueError,
            r"one shape, got \(4, 4\) for middle.weight and \(7, 4\) for head.weight; a transposed",
            lambda: (Net(), "middle.weight", "head.weight"),
        ),
        (
            ValueError,
            r"one shape, got \(2, 2\) for Linear.weight and \(2, 3\) for Linear.weight",
            lambda: (L(2, 2), L(3, 2)),
        ),
        (
            ValueError,
            r"the same parameters in both, got \['bias', 'weight'\] in Linear, \['weight'\] in Linear",
            lambda: (L(2, 2), L(2, 2, bias=False)),
        ),
        (ValueError, "Tanh has no parameters to share", lambda: (nn.Tanh(), nn.Tanh())),
        (ValueError, "one dtype, got torch.float32 .* torch.float64", lambda: (L(2, 2), L(2, 2).double())),
        (ValueError, "one device, got cpu .* meta", lambda: (L(2, 2), L(2, 2, device="meta"))),
        (
            ValueError,
            "one requires_grad, got True for Linear.weight and False .* freeze both",
            lambda: (L(2, 2), frozen(L(2, 2))),
        ),
        (
            ValueError,
            "Linear.weight has no shape yet; run the model once",
            lambda: (nn.Linear(2, 2), nn.LazyLinear(2)),
        ),
        (ValueError, "got the same one twice", lambda: (Net(), "embed.weight", "embed.weight")),
        (ValueError, "got the same one twice", lambda: [L(2, 2)] * 2),
    ],
)
def test_errors_say_what_was_expected_and_share_nothing(error, words, arguments):
    arguments = list(arguments())
    modules = [m for m in arguments if isinstance(m, nn.Module)]
    before = [[id(p) for p in m.parameters()] for m in modules]
    with pytest.raises(error, match=f"share_parameters: .*{words}"):
        fr.share_parameters(*arguments)
    assert [[id(p) for p in m.parameters()] for m in modules] == before
    assert all("_apply" not in vars(part) for m in modules for part in m.modules())


def test_unshare_knows_its_names():
    with pytest.raises(ValueError, match="unshare_parameters: Net has no parameter or submodule 'nose'"):
        fr.unshare_parameters(shared(), "nose")
    with pytest.raises(TypeError, match="unshare_parameters: expected modules"):
        fr.unshare_parameters("head.weight")
