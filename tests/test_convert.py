"""fr.convert: the types of modules change, and nothing else."""

import copy
import io
import pickle
import statistics

import pytest
import torch
import torch.nn.functional as F
from patch_cases import (
    INDICES,
    MODELS,
    TORCH_OPS,
    DropPath,
    ResNet,
    assert_compiles,
    attention,
    bert,
    encoder,
    mlp,
    modules_and_inputs,
    named,
    ops_seen,
    resnet,
    train,
    uses_fastreg,
)
from torch import nn

import fastreg as fr

MODULES = (
    "Dropout",
    "Dropout1d",
    "Dropout2d",
    "Dropout3d",
    "AlphaDropout",
    "FeatureAlphaDropout",
    "CrossEntropyLoss",
)


SMALL = [mlp, *MODELS]


def nested_model():
    shared = nn.Dropout(0.3)
    model = nn.Module()
    model.list = nn.ModuleList([nn.Dropout(0.1), nn.Sequential(nn.Linear(4, 4), nn.Dropout1d(0.2)), shared])
    model.dict = nn.ModuleDict(
        {"two": nn.Dropout2d(0.25, inplace=True), "three": nn.Dropout3d(), "shared": shared}
    )
    model.alpha, model.feature = nn.AlphaDropout(0.1), nn.FeatureAlphaDropout(0.1)
    model.loss = nn.CrossEntropyLoss(torch.rand(4), ignore_index=3, reduction="sum", label_smoothing=0.2)
    model.custom = DropPath(0.1)
    return model


def test_convert_changes_types_and_nothing_else():
    model = nested_model()
    model.list[0].eval()
    before = dict(model.named_modules(remove_duplicate=False))
    attributes = {name: dict(vars(module)) for name, module in before.items()}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    classes = {name: type(module) for name, module in before.items()}
    assert fr.convert(model) is model
    after = dict(model.named_modules(remove_duplicate=False))
    assert after.keys() == before.keys()
    for name, module in after.items():
        assert module is before[name]
        assert vars(module).keys() == attributes[name].keys()
        assert all(value is attributes[name][key] for key, value in vars(module).items())
        assert isinstance(module, classes[name])
        expected = classes[name].__name__ if classes[name].__name__ in MODULES else None
        assert type(module) is (getattr(fr.nn, expected) if expected else classes[name])
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())
    assert model.loss.weight is dict(model.named_buffers())["loss.weight"]
    assert [m.p for m in (model.list[0], model.dict["two"])] == [0.1, 0.25] and model.dict["two"].inplace
    assert repr(model.list[0]) == "Dropout(p=0.1, inplace=False)"


def test_convert_twice():
    model = fr.convert(nested_model())
    types_once = [type(module) for module in model.modules()]
    assert fr.convert(model) is model
    assert [type(module) for module in model.modules()] == types_once


def test_convert_leaves_subclasses_alone():
    class Mine(nn.Dropout):
        def forward(self, x):
            return x + 1

    class Loss(nn.CrossEntropyLoss):
        pass

    model = nn.Sequential(Mine(0.5), nn.Sequential(Loss()), fr.nn.Dropout(0.5, rescale="inference"))
    fr.convert(model)
    assert type(model[0]) is Mine and type(model[1][0]) is Loss
    assert model[2].rescale == "inference"


FUNCTIONS = dict(
    zip(
        MODULES,
        (*("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"), ""),
        strict=False,
    )
)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", MODULES)
def test_a_function_that_the_program_replaced_is_called(name, compiled, monkeypatch):
    """As torch's module calls it, whose function somebody has put his own in the place of."""
    modules = [getattr(nn, name)(), fr.convert(getattr(nn, name)())]
    function = "cross_entropy" if name == "CrossEntropyLoss" else FUNCTIONS[name]
    monkeypatch.setattr(F, function, lambda input, *args, **kwargs: input * 7)
    x = torch.rand(2, 3, 4)
    for module in modules:
        run = torch.compile(module, backend="eager") if compiled else module
        arguments = (x, torch.zeros(2, 4, dtype=torch.long)) if "Loss" in name else (x,)
        assert torch.equal(run(*arguments), 7 * x)


@pytest.mark.parametrize("name", MODULES)
def test_a_class_with_another_forward_is_left_alone(name, monkeypatch):
    kind = getattr(nn, name)
    monkeypatch.setattr(kind, "forward", lambda self, x: x * 7)
    module = fr.convert(nn.Sequential(kind()))[0]
    assert type(module) is kind and module(torch.ones(2)).tolist() == [7, 7]


@pytest.mark.parametrize("name", MODULES)
def test_convert_a_lone_module(name):
    module = getattr(nn, name)()
    assert fr.convert(module) is module
    assert type(module) is getattr(fr.nn, name) and isinstance(module, getattr(nn, name))


@pytest.mark.parametrize(
    "wrong", [None, torch.ones(3), F.dropout, nn.Dropout, [nn.Dropout()]], ids=lambda w: type(w).__name__
)
def test_convert_wants_a_module(wrong):
    with pytest.raises(TypeError, match=r"convert: model must be a torch\.nn\.Module, got"):
        fr.convert(wrong)


def test_converted_modules_compute_as_patched_ones_do():
    for module, x in modules_and_inputs():
        torch.manual_seed(2)
        with fr.patched():
            expected = copy.deepcopy(module)(x.clone())
        torch.manual_seed(2)
        with ops_seen() as seen:
            result = fr.convert(module)(x.clone())
        assert "fastreg::dropout" in seen and not seen & TORCH_OPS
        assert torch.equal(result, expected)
        assert torch.equal(module.eval()(x), x)
    x, target = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 1, 1])
    options = {"weight": torch.rand(4), "ignore_index": 3, "reduction": "sum", "label_smoothing": 0.2}
    loss = fr.convert(nn.CrossEntropyLoss(**options))
    assert uses_fastreg(lambda: loss(x, target), "fastreg::cross_entropy")
    torch.testing.assert_close(loss(x, target), F.cross_entropy(x, target, **options))


def test_convert_keeps_hooks_and_own_attributes():
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5))
    calls = []
    model[1].register_forward_hook(lambda *_: calls.append("forward"))
    model[1].register_full_backward_hook(lambda *_: calls.append("backward"))
    model[1].note = "mine"
    fr.convert(model)(torch.ones(2, 3, requires_grad=True)).sum().backward()
    assert calls == ["forward", "backward"] and model[1].note == "mine"


@pytest.mark.parametrize("make", SMALL, ids=named)
def test_converted_models_train(make):
    model, loss_of = make(0.1)
    keys = list(model.state_dict())
    twin = copy.deepcopy(model)
    fr.convert(model)
    with ops_seen() as seen:
        losses = train(model, loss_of, 1, 0.05)
    functional = make in (
        attention,
    )  # its dropout is a call inside MultiheadAttention, which convert leaves to patch
    assert ("fastreg::dropout" in seen) != functional
    losses += train(model, loss_of, 24, 0.05)
    assert statistics.fmean(losses[-3:]) < 0.9 * statistics.fmean(losses[:3])
    assert list(model.state_dict()) == keys
    twin.load_state_dict(model.state_dict())  # back into torch's model
    fresh = fr.convert(make(0.1)[0])
    fresh.load_state_dict(twin.state_dict())
    with torch.no_grad():
        assert torch.equal(loss_of(fresh.eval()), loss_of(twin.eval()))


@pytest.mark.parametrize(
    "make",
    [encoder, pytest.param(resnet, marks=pytest.mark.slow), pytest.param(bert, marks=pytest.mark.slow)],
    ids=named,
)
def test_converted_models_compile(make):
    model, loss_of = make(0.1)
    fr.convert(model)
    assert_compiles(model, loss_of)


def test_convert_after_compiling():
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.ones(4, 8)
    assert not uses_fastreg(lambda: compiled(x))
    fr.convert(compiled)
    assert uses_fastreg(lambda: compiled(x))


def test_converted_model_is_copied_and_pickled():
    model = fr.convert(ResNet(0.2))
    x = torch.randn(2, 3, 8, 8)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ):
        assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
        torch.manual_seed(1)
        expected = model.train()(x)
        torch.manual_seed(1)
        assert torch.equal(twin.train()(x), expected)


def test_converted_loss_is_pickled_with_its_weight():
    loss = fr.convert(nn.CrossEntropyLoss(torch.rand(5), label_smoothing=0.1))
    twin = pickle.loads(pickle.dumps(loss))
    x = torch.randn(4, 5)
    assert type(twin) is fr.nn.CrossEntropyLoss and torch.equal(twin(x, INDICES), loss(x, INDICES))


@pytest.mark.parametrize("strict", [False, True])
def test_export_of_a_converted_model_needs_no_fastreg(strict):
    model = fr.convert(ResNet(0.2)).eval()
    x = torch.randn(2, 3, 8, 8)
    program = torch.export.export(model, (x,), strict=strict)
    assert "fastreg" not in str(program.graph) and "dropout" not in str(program.graph)
    torch.testing.assert_close(program.module()(x), model(x))


def test_export_under_patch_in_evaluation():
    model = ResNet(0.2).eval()
    with fr.patched():
        program = torch.export.export(model, (torch.randn(2, 3, 8, 8),))
    assert "fastreg" not in str(program.graph)
