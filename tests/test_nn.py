"""Modules are their torch namesakes with our functions inside, down to repr, state and pickle; fold_dropout
moves the textbook factor 1 - p into weights where that is exact, and refuses where it is not."""

import copy
import inspect
import itertools
import math
import pickle

import pytest
import torch
from helpers import with_seed
from torch import nn
from torch.nn.utils import prune

import fastreg as fr

NAMES = ["Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "AlphaDropout", "FeatureAlphaDropout"]
FUNCTION = dict(
    zip(
        NAMES,
        ["dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"],
        strict=True,
    )
)


def input_of(name):
    return torch.randn({"Dropout1d": (3, 4, 5), "Dropout3d": (2, 3, 2, 2, 2)}.get(name, (3, 4, 5, 6)))


# --------------------------------------------------------------------------------------------------
# modules
@pytest.mark.parametrize("name", NAMES)
def test_a_module_is_its_namesake_on_our_function(name):
    ours, theirs = getattr(fr.nn, name), getattr(nn, name)
    assert issubclass(ours, theirs)
    for module, namesake in (
        (ours(), theirs()),
        (ours(0.3, True), theirs(0.3, True)),
        (ours(p=0.2, inplace=False), theirs(0.2)),
    ):
        assert repr(module) == repr(namesake) and module.state_dict() == namesake.state_dict() == {}
        assert (module.p, module.inplace, module.training) == (namesake.p, namesake.inplace, True)
    x = input_of(name)
    module = ours(0.4)
    want = with_seed(1, getattr(fr, FUNCTION[name]), x, 0.4, True)
    got = with_seed(1, module, x)
    assert torch.equal(got, want) and not torch.equal(got, x)
    module.eval()
    assert module(x) is x
    for kind in (ours, theirs):  # torch's modules of alpha dropout have the argument, and never overwrite
        mine = x.clone()
        got = with_seed(1, kind(0.4, inplace=True), mine)
        assert (got is mine) == ("Alpha" not in name)
        assert torch.equal(mine, x if "Alpha" in name else got)
        assert kind is theirs or torch.equal(got, want)


@pytest.mark.parametrize("name", NAMES)
def test_arguments_of_the_constructor_are_torchs(name):
    mine = list(inspect.signature(getattr(fr.nn, name)).parameters.values())
    torchs = list(inspect.signature(getattr(nn, name)).parameters.values())
    assert [(a.name, a.default, a.kind) for a in mine[: len(torchs)]] == [
        (a.name, a.default, a.kind) for a in torchs
    ]
    assert all(a.kind == a.KEYWORD_ONLY for a in mine[len(torchs) :])


@pytest.mark.parametrize("name", [*NAMES, "DropPath"])
def test_a_bad_probability_is_refused_when_the_module_is_made(name):
    for p in (1.5, -0.1, math.nan):
        with pytest.raises(ValueError, match=rf"{name}: p must be in \[0, 1\], got {p}"):
            getattr(fr.nn, name)(p)
    for p, kind in (("0.5", "str"), (None, "NoneType"), (True, "bool")):
        with pytest.raises(TypeError, match=f"{name}: p must be a number, got {kind}"):
            getattr(fr.nn, name)(p)
    with pytest.raises(ValueError, match="Dropout: rescale must be one of 'train', 'inference', got 'x'"):
        fr.nn.Dropout(rescale="x")


@pytest.mark.parametrize("name", [*NAMES, "DropPath"])
def test_deepcopy_and_pickle(name):
    module, x = getattr(fr.nn, name)(0.3), input_of(name)
    want = with_seed(1, module, x)
    for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(again) is type(module) and repr(again) == repr(module)
        assert torch.equal(with_seed(1, again, x), want)
        assert again.eval()(x) is x
    textbook = pickle.loads(pickle.dumps(fr.nn.Dropout(0.3, rescale="inference"))).eval()
    assert torch.equal(textbook(x), x * 0.7)


def test_a_module_of_torch_whose_class_is_exchanged_works():
    module = nn.Dropout(0.3)
    module.__class__ = (
        fr.nn.Dropout
    )  # what fr.convert does: attributes that only our constructor sets must have defaults
    x = torch.randn(50)
    assert torch.equal(with_seed(1, module, x), with_seed(1, fr.dropout, x, 0.3))


def test_drop_path_module():
    x = torch.randn(300, 4)
    for scale_by_keep in (True, False):
        module = fr.nn.DropPath(0.3, scale_by_keep=scale_by_keep)
        assert repr(module) == f"DropPath(p=0.3, scale_by_keep={scale_by_keep})"
        assert torch.equal(
            with_seed(1, module, x), with_seed(1, fr.drop_path, x, 0.3, scale_by_keep=scale_by_keep)
        )
        assert module.eval()(x) is x


def test_textbook_module_trains_without_and_evaluates_with_the_factor():
    module, x = fr.nn.Dropout(0.25, rescale="inference"), torch.randn(1000)
    assert repr(module) == "Dropout(p=0.25, inplace=False, rescale='inference')"
    y = module(x)
    assert torch.equal(y[y != 0], x[y != 0]) and 650 < (y != 0).sum() < 850
    assert torch.equal(module.eval()(x), x * 0.75)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_compiles_and_trains(name):
    torch._dynamo.reset()
    dim = input_of(name).shape[-1]
    model = nn.Sequential(nn.Linear(dim, dim), getattr(fr.nn, name)(0.3), nn.Linear(dim, 2))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x, grads = input_of(name), []
    for run in (model, compiled):
        model.zero_grad()
        with_seed(1, run, x).pow(2).sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        assert a.any()
        torch.testing.assert_close(a, b)


# --------------------------------------------------------------------------------------------------
# fold_dropout
def textbook(p):
    return fr.nn.Dropout(p, rescale="inference")


class Branches(nn.Module):
    """One dropout that two layers read, another between them, reshaping that asks for sizes."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(6, 8)
        self.drop, self.drop2 = textbook(0.3), textbook(0.6)
        self.left, self.right, self.head = nn.Linear(8, 3), nn.Linear(4, 5), nn.Linear(3, 5)

    def forward(self, x):
        h = self.drop(torch.relu(self.body(x)))
        split = h.view(h.size(0) * 2, h.shape[1] // 2)
        right = self.right(split).reshape(h.shape[0], 2, 5).sum(1)
        return self.head(nn.functional.leaky_relu(self.drop2(self.left(h)))) + right


class Embedded(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.embed, self.drop, self.out = nn.Embedding(10, 6, **options), textbook(0.4), nn.Linear(6, 2)

    def forward(self, tokens):
        return self.out(torch.sigmoid(self.drop(self.embed(tokens))))


class EmbeddedLinear(Embedded):
    def forward(self, tokens):
        return self.out(self.drop(self.embed(tokens)))


class Twice(nn.Module):
    """One dropout under two names, called twice."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.first = textbook(0.3)
        self.second = self.first

    def forward(self, x):
        return self.c(self.second(self.b(self.first(self.a(x)))))


FOLDABLE = {
    "mlp": lambda: (
        nn.Sequential(
            nn.Linear(6, 9),
            nn.ReLU(),
            textbook(0.5),
            nn.Linear(9, 7),
            textbook(0.2),
            nn.LeakyReLU(0.1),
            nn.Linear(7, 3),
        ),
        torch.randn(4, 6),
    ),
    "dropout at the input": lambda: (nn.Sequential(textbook(0.2), nn.Linear(6, 3)), torch.randn(4, 6)),
    "two in a row, and torch's": lambda: (
        nn.Sequential(textbook(0.2), nn.Dropout(0.3), fr.nn.Dropout(0.1), textbook(0.5), nn.Linear(6, 3)),
        torch.randn(4, 6),
    ),
    "cnn": lambda: (
        nn.Sequential(
            nn.Conv2d(3, 5, 3, padding=1),
            nn.BatchNorm2d(5),
            nn.ReLU(),
            textbook(0.3),
            nn.MaxPool2d(2),
            nn.Conv2d(5, 6, 3, padding=1, padding_mode="reflect"),
            textbook(0.4),
            nn.AvgPool2d(2, padding=1),
            nn.ConvTranspose2d(6, 4, 2),
            textbook(0.1),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(16, 3),
        ),
        torch.randn(4, 3, 12, 12),
    ),
    "branches": lambda: (Branches(), torch.randn(4, 6)),
    "embedding": lambda: (Embedded(), torch.randint(10, (4, 7))),
    "embedding with max_norm": lambda: (EmbeddedLinear(max_norm=0.5), torch.randint(10, (4, 7))),
    "two names": lambda: (Twice(), torch.randn(4, 6)),
    "p = 1": lambda: (nn.Sequential(nn.Linear(6, 4), textbook(1.0), nn.Linear(4, 3)), torch.randn(4, 6)),
    "unused": lambda: (nn.Sequential(nn.Linear(6, 4), textbook(0.0), nn.Sigmoid()), torch.randn(4, 6)),
}


@pytest.mark.parametrize("name", FOLDABLE)
def test_a_folded_model_computes_what_the_original_does(name):
    model, x = FOLDABLE[name]()
    model = model.double()
    x = x.double() if x.is_floating_point() else x
    model(x)  # a training step's forward: BatchNorm has seen something
    before, hidden = copy.deepcopy(model.state_dict()), repr(model)
    folded = fr.nn.fold_dropout(model)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values(), strict=True))
    assert repr(model) == hidden and model.training and not folded.training
    left = [
        m for m in folded.modules() if isinstance(m, fr.nn.Dropout) and m.rescale == "inference" and m.p > 0
    ]
    assert not left
    want, got = model.eval()(x), folded(x)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    plain = copy.deepcopy(model)
    for module in plain.modules():
        module.p = (
            0.0
            if isinstance(module, fr.nn.Dropout) and module.rescale == "inference"
            else getattr(module, "p", None)
        )
    if name != "unused":
        assert not torch.allclose(
            plain(x), want
        )  # the factor matters for this model: an unfolded copy would be seen
    assert torch.equal(
        folded.train()(x) if name == "mlp" else folded(x), got
    )  # and nothing is dropped any more


class Shared(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind, self.drop, self.fc, self.fc2 = kind, textbook(0.5), nn.Linear(5, 5), nn.Linear(5, 5)
        if kind == "tied":
            self.fc2.weight = self.fc.weight

    def forward(self, x):
        y = self.fc(self.drop(x))
        if self.kind == "called twice":
            return self.fc(y)
        if self.kind == "read by the forward":
            return y @ self.fc.weight
        return self.fc2(y)


class Plus(nn.Module):
    def __init__(self):
        super().__init__()
        self.drop, self.fc = textbook(0.5), nn.Linear(5, 5)

    def forward(self, x):
        return self.fc(self.drop(x) + 1)


class Transposed(Plus):
    def forward(self, x):
        return self.fc(self.drop(x).T.T)


class Branching(Plus):
    def forward(self, x):
        return self.fc(self.drop(x)) if x.sum() > 0 else x


class Functional(Plus):
    def forward(self, x):
        return self.drop(x) @ self.fc.weight


def norm():
    return nn.utils.parametrizations.weight_norm(nn.Linear(5, 5))


REFUSED = {
    "batch norm between": (
        lambda: nn.Sequential(textbook(0.5), nn.BatchNorm1d(5), nn.Linear(5, 5)),
        "reaches BatchNorm1d",
    ),
    "sigmoid between": (
        lambda: nn.Sequential(textbook(0.5), nn.Sigmoid(), nn.Linear(5, 5)),
        "reaches Sigmoid",
    ),
    "addition between": (Plus, "reaches <built-in function add>"),
    "attribute between": (Transposed, "reaches <built-in function getattr>"),
    "weight used as a tensor": (Functional, "reaches <built-in function matmul>"),
    "at the output": (lambda: nn.Sequential(nn.Linear(5, 5), textbook(0.5)), "reaches the model's output"),
    "output through relu": (
        lambda: nn.Sequential(nn.Linear(5, 5), textbook(0.5), nn.ReLU()),
        "reaches the model's output",
    ),
    "alone": (lambda: textbook(0.5), "lone Dropout"),
    "tied weight": (lambda: Shared("tied"), "used in several places"),
    "layer called twice": (lambda: Shared("called twice"), "used in several places"),
    "weight read by the forward": (lambda: Shared("read by the forward"), "used in several places"),
    "weight norm": (lambda: nn.Sequential(textbook(0.5), norm()), "weight of '1' is computed"),
    "control flow": (Branching, "cannot trace the model's forward"),
    "recurrent": (lambda: nn.Sequential(textbook(0.5), nn.GRU(5, 5)), "reaches GRU"),
    "embedding with max_norm and sigmoid": (
        lambda: Embedded(max_norm=1.0),
        "reaches <built-in method sigmoid",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_folded_exactly_is_refused(name):
    make, message = REFUSED[name]
    model = make()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=f"fold_dropout: .*({message})"):
        fr.nn.fold_dropout(model)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values(), strict=True))


def test_a_pruned_layer_is_refused():
    pruned = nn.Sequential(textbook(0.5), nn.Linear(5, 5))
    prune.l1_unstructured(pruned[1], "weight", 0.5)
    with pytest.raises(ValueError, match="fold_dropout: cannot copy the model"):
        fr.nn.fold_dropout(pruned)


def test_a_model_without_textbook_dropout_comes_back_as_a_copy():
    model = nn.Sequential(nn.Linear(3, 3), fr.nn.Dropout(0.5), nn.Sigmoid())
    folded = fr.nn.fold_dropout(model)
    x = torch.randn(2, 3)
    assert folded is not model and not folded.training and torch.equal(folded(x), model.eval()(x))
    assert folded[0].weight is not model[0].weight


# ------------------------------------------------------------------------- the folded network is the mean
# over the masks
def all_masks(n, p):
    """Every 0/1 mask of n elements, (2^n, n), and its probability."""
    masks = torch.tensor(list(itertools.product((0.0, 1.0), repeat=n)), dtype=torch.float64)
    return masks, (1 - p) ** masks.sum(1) * p ** (n - masks.sum(1))


@pytest.mark.parametrize("p", (0.2, 0.5, 0.9))
def test_folded_linear_models_are_the_exact_mean_over_all_masks(p):
    """Linear, Conv and Embedding, on inputs of 6 elements: 64 masks, each with its probability."""
    masks, probability = all_masks(6, p)
    x = torch.randn(6, dtype=torch.float64)
    linear = nn.Sequential(textbook(p), nn.Linear(6, 4)).double()
    conv = nn.Sequential(textbook(p), nn.Conv2d(2, 3, (1, 2))).double()
    for model, shape in ((linear, (6,)), (conv, (2, 1, 3))):
        outputs = model[1]((masks * x).view(-1, *shape))
        mean = torch.einsum("m,m...->...", probability, outputs)
        torch.testing.assert_close(
            fr.nn.fold_dropout(model)(x.view(1, *shape))[0], mean, rtol=1e-12, atol=1e-12
        )
        assert not torch.allclose(model[1](x.view(1, *shape))[0], mean)
    embed = nn.Sequential(nn.Embedding(5, 6), textbook(p), nn.Linear(6, 4)).double()
    token = torch.tensor([3])
    mean = probability @ embed[2](masks * embed[0](token))
    torch.testing.assert_close(fr.nn.fold_dropout(embed)(token)[0], mean, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("p", (0.2, 0.5))
def test_a_folded_softmax_regression_is_the_geometric_mean_of_all_subnetworks(p):
    """Goodfellow et al. 2016, equations 7.56 to 7.66, for any p: the weighted geometric mean, normalised, is
    the folded one.
    """
    masks, probability = all_masks(8, p)
    model, x = nn.Sequential(textbook(p), nn.Linear(8, 3)).double(), torch.randn(8, dtype=torch.float64)
    geometric = (probability @ model[1](masks * x).log_softmax(1)).exp()
    torch.testing.assert_close(
        fr.nn.fold_dropout(model)(x).softmax(0), geometric / geometric.sum(), rtol=1e-12, atol=1e-12
    )


def test_the_sampled_mean_of_a_perceptron_is_the_folded_one_within_its_error():
    """Dropout before the last layer: the output is linear in the mask, so the mean has no other error than
    sampling's.
    """
    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), textbook(0.4), nn.Linear(32, 5))
    x, n = torch.randn(8, 20), 4000
    with torch.no_grad():
        outputs = model(x.expand(n, 8, 20)).double()
        folded, whole = fr.nn.fold_dropout(model)(x).double(), model[3](model[1](model[0](x))).double()
    error = outputs.std(0) / n**0.5
    assert ((outputs.mean(0) - folded).abs() < 4.5 * error).all()
    assert (
        (outputs.mean(0) - whole).abs() > 10 * error
    ).double().mean() > 0.5  # without the factor it would be far off


def test_dropout_of_inputs_and_units_on_the_digits(digits):
    """The folded network decides as the mean of its subnetworks does, and better than one of them."""
    x, y = digits
    drops = textbook(0.2), textbook(0.5)
    model = nn.Sequential(drops[0], nn.Linear(784, 128), nn.ReLU(), drops[1], nn.Linear(128, 10))
    optimizer = fr.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for batch in (b for _ in range(8) for b in torch.randperm(2000).split(100)):
        optimizer.zero_grad()
        fr.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
    x, y = x[4000:], y[4000:]
    with torch.no_grad():
        samples = torch.stack([model(x).softmax(1) for _ in range(40)])
        folded = fr.nn.fold_dropout(model)(x).argmax(1)
        whole = nn.Sequential(*(m for m in model if m not in drops))(x)
    mean = samples.mean(0).argmax(1)
    accuracy = (folded == y).double().mean()
    assert (folded == mean).double().mean() > 0.97 and accuracy > 0.88
    assert accuracy > (samples[0].argmax(1) == y).double().mean() + 0.02
    # Without the factor the logits are too large: the network is as right, but too sure of it.
    assert fr.cross_entropy(fr.nn.fold_dropout(model)(x), y) < fr.cross_entropy(whole, y)
