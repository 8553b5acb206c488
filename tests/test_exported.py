"""What is exported or traced runs where fastreg is not: in evaluation, and where nothing is dropped, there is
no operator of ours in it, and a converted or patched model exports what torch's exports.
"""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same_bits
from patch_cases import ResNet, encoder
from torch import nn

import fastreg as fr

HOWS = ("export", "strict export", "trace")
X, RESIDUAL, BIAS = torch.randn(2, 8), torch.randn(2, 8), torch.randn(8)
Y = torch.tensor([1, 5])
IMAGES = torch.rand(2, 3, 9, 7)
INPUTS = {"Dropout1d": (2, 4, 5), "Dropout2d": (2, 4, 3, 5), "Dropout3d": (2, 4, 3, 5, 2)}
NAMES = ("Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "AlphaDropout", "FeatureAlphaDropout")
FUNCTIONS = ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout")
AUGMENTATIONS = {
    "nothing is left": dict(hflip=0.5, rotate=15, brightness=0.3, blur=(3, (0.1, 1.0)), erase=0.5),
    "normalised": dict(rotate=15, mean=(0.4, 0.5, 0.6), std=0.2),
    "resized": dict(hflip=0.5, size=(4, 5), mean=0.5, std=0.2),
    "resized, antialias": dict(size=(3, 3), antialias=True),
    "cropped": dict(crop=2, size=(6, 6)),
}


def recorded(how, module, *inputs):
    """(the names of the operators in the recorded program, the program)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if how == "trace":
            program = torch.jit.trace(module, inputs, check_trace=False)
            return {node.kind() for node in program.inlined_graph.nodes()}, program
        exported = torch.export.export(module, inputs, strict=how == "strict export")
    names = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    return names, exported.module()


def is_torchs(names):
    return not any("fastreg" in name or "PythonOp" in name for name in names)


class Calls(nn.Module):
    """A module that calls a function."""

    def __init__(self, function, *arguments):
        super().__init__()
        self.function, self.arguments = function, arguments

    def forward(self, *inputs):
        return self.function(*inputs, *self.arguments, training=self.training) * 1


def modules(p, training):
    """(name, module, its inputs): every module that drops, and every function that has a `training`."""
    for name in fr.nn.__all__:
        if name in ("fold_dropout", "CrossEntropyLoss"):
            continue
        inputs = (X, RESIDUAL, BIAS) if name == "DropoutAdd" else (torch.randn(INPUTS.get(name, (2, 4, 5))),)
        yield name, getattr(fr.nn, name)(p).train(training), inputs
    yield "DropoutAdd without bias", fr.nn.DropoutAdd(p).train(training), (X, RESIDUAL)
    if not training:
        yield "textbook", fr.nn.Dropout(p, rescale="inference").eval(), (X,)
    for name in FUNCTIONS:
        x = torch.randn(INPUTS.get(name.title(), (2, 4, 5)))
        yield name, Calls(getattr(fr, name), p).train(training), (x,)
    yield "drop_path", Calls(fr.drop_path, p).train(training), (X,)
    add = Calls(lambda x, r, b, training: fr.dropout_add(x, r, p, b, training)).train(training)
    yield "dropout_add", add, (X, RESIDUAL, BIAS)


class Together(nn.Module):
    """Many modules with their inputs as one, because each export takes its time."""

    def __init__(self, cases):
        super().__init__()
        self.all = nn.ModuleList([module for _, module, _ in cases])
        self.counts = [len(inputs) for _, _, inputs in cases]

    def forward(self, *inputs):
        outputs, start = [], 0
        for module, count in zip(self.all, self.counts, strict=True):
            outputs.append(module(*inputs[start : start + count]) * 1)
            start += count
        return tuple(outputs)


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize(("p", "training"), [(0.5, False), (0.0, True)])
def test_where_nothing_is_dropped_no_operator_is_ours(how, p, training):
    cases = list(modules(p, training))
    inputs = tuple(x for _, _, each in cases for x in each)
    names, program = recorded(how, Together(cases), *inputs)
    assert is_torchs(names)
    for output, (name, module, own) in zip(program(*inputs), cases, strict=True):
        assert_same_bits(output, module(*own), name)


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_three_additions_are_rounded_once(how, dtype):
    inputs = [torch.randn(64, 32).to(dtype), torch.randn(64, 32).to(dtype), torch.randn(32).to(dtype)]
    module = fr.nn.DropoutAdd(0.1).eval()
    names, program = recorded(how, module, *inputs)
    assert is_torchs(names)
    assert_same_bits(program(*inputs), module(*inputs))
    assert (program(*inputs) != inputs[0] + inputs[2] + inputs[1]).any()  # which rounds twice


@pytest.mark.skipif(not hasattr(torch.jit, "script"), reason="this torch has no torch.jit.script")
def test_scripted_addition():
    module = fr.nn.DropoutAdd(0.5)
    scripted = torch.jit.script(module)
    for dtype in (torch.float32, torch.bfloat16):
        inputs = X.to(dtype), RESIDUAL.to(dtype), BIAS.to(dtype)
        scripted.eval()
        assert_same_bits(scripted(*inputs), copy.deepcopy(module).eval()(*inputs))
        scripted.train()
        dropped = scripted(*inputs) == inputs[1]
        assert dropped.any() and not dropped.all()


def test_compiled_for_evaluation():
    seen = set()

    def backend(graph, example):
        seen.update(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    module = fr.nn.DropoutAdd(0.5).eval()
    compiled = torch.compile(module, backend=backend, fullgraph=True)
    assert_same_bits(compiled(X, RESIDUAL, BIAS), module(X, RESIDUAL, BIAS))
    assert seen and is_torchs(seen)


def test_what_is_refused_is_refused_while_recorded():
    for residual, bias in ((torch.randn(1, 8), BIAS), (RESIDUAL, torch.randn(1))):
        with pytest.raises(ValueError, match="dropout_add: "):
            recorded("trace", fr.nn.DropoutAdd(0.5).eval(), X, residual, bias)


@pytest.mark.parametrize("how", ["trace", "export"])
def test_augmentation_in_evaluation(how):
    cases = [
        (name, fr.augment.Augment(**options).eval(), (images,))
        for name, options in AUGMENTATIONS.items()
        for images in (IMAGES, (IMAGES * 255).to(torch.uint8))
        if how == "trace" or (images is IMAGES and name in ("normalised", "resized, antialias"))
    ]
    inputs = tuple(x for _, _, each in cases for x in each)
    names, program = recorded(how, Together(cases), *inputs)
    assert is_torchs(names), names
    for output, (name, module, own) in zip(program(*inputs), cases, strict=True):
        # A mean of bytes that is half an odd number but for the last bits is rounded to either side.
        level = 1 if "antialias" in name and output.dtype == torch.uint8 else 1e-5
        torch.testing.assert_close(output, module(*own), rtol=1e-5, atol=level, msg=name)
        torch.testing.assert_close(output.double().mean(), module(*own).double().mean(), rtol=2e-3, atol=1e-5)


class WithLoss(nn.Module):
    def __init__(self, loss):
        super().__init__()
        self.linear, self.drop, self.loss = nn.Linear(8, 8), nn.Dropout(0.5), loss

    def forward(self, x, y):
        return self.loss(self.drop(self.linear(x)), y)


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("training", [False, True])
def test_a_model_under_a_door_exports_what_torchs_exports(how, training):
    """Also while training: the program that torch's model exports knows nothing of fastreg."""
    cases = [
        ("", WithLoss(nn.CrossEntropyLoss(label_smoothing=0.1)), (X, Y)),
        ("", ResNet(0.2), (IMAGES,)),
        ("", encoder(0.1)[0], (torch.randn(2, 6, 16),)),
    ][: 1 if how == "strict export" else 3]  # which takes ten times as long
    model, inputs = Together(cases).train(training), [x for _, _, each in cases for x in each]
    expected, _ = recorded(how, model, *inputs)
    with fr.patched():
        names, _ = recorded(how, model, *inputs)
    assert names == expected
    names, _ = recorded(how, fr.convert(model), *inputs)
    assert is_torchs(names)
    # In evaluation ours says nothing where torch's says "dropout, but not now".
    assert all("dropout" in name and not training for name in expected - names)


@pytest.mark.skipif(not hasattr(torch.jit, "_get_trace_graph"), reason="this torch has no such tracer")
@pytest.mark.parametrize("training", [False, True])
def test_values_of_a_trace_have_torchs_names(training):
    """Inputs of ONNX graphs get these names, and programs feed their values by them. Of patched losses,
    docs/differences.md has what they are.
    """
    cases = [(WithLoss(nn.CrossEntropyLoss(torch.ones(8))), (X, Y)), (nn.CrossEntropyLoss(), (X, Y))]
    cases += [(getattr(nn, name)(), (torch.ones(INPUTS.get(name, (4, 5))),)) for name in NAMES]

    def names(model, inputs):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = torch.jit._get_trace_graph(model.train(training), inputs)[0]
        values = [*graph.inputs(), *(output for node in graph.nodes() for output in node.outputs())]
        return [value.debugName() for value in values if not value.debugName().isdigit()]

    for model, inputs in cases:
        wanted = names(model, inputs)
        with fr.patched():
            assert isinstance(model, nn.CrossEntropyLoss | WithLoss) or names(model, inputs) == wanted
        assert names(fr.convert(copy.deepcopy(model), keep_class=True), inputs) == wanted
        assert names(fr.convert(model), inputs) == wanted
    assert "target" in names(*cases[1])


@pytest.mark.parametrize("how", HOWS)
def test_losses_by_name(how):
    options = dict(label_smoothing=0.1, smoothing="others", z_loss=0.1)
    linear = lambda x, w: fr.linear_cross_entropy(x, w, Y, **options)  # noqa: E731
    for module, inputs in (
        (Loss(lambda x: fr.cross_entropy(x, Y, **options)), (X,)),
        (Loss(linear), (X, torch.randn(9, 8))),
        (fr.nn.CrossEntropyLoss(**options), (X, Y)),
    ):
        names, program = recorded(how, module, *inputs)
        assert is_torchs(names), names
        torch.testing.assert_close(program(*inputs), module(*inputs))


class Loss(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


@pytest.mark.parametrize("name", ["DropPath", "DropoutAdd", "dropout", "drop_path", "dropout_add", "loss"])
def test_a_traced_function_keeps_its_derivative(name):
    """Whether or not the example that it was traced with needs a gradient."""
    module = {
        "DropPath": fr.nn.DropPath(0.5),
        "DropoutAdd": Calls(lambda x, training: fr.nn.DropoutAdd(0.5)(x, torch.zeros_like(x), BIAS)),
        "dropout": Calls(fr.dropout, 0.5),
        "drop_path": Calls(fr.drop_path, 0.5),
        "dropout_add": Calls(lambda x, training: fr.dropout_add(x, torch.zeros_like(x), 0.5, BIAS)),
        "loss": Loss(lambda x: fr.cross_entropy(x, torch.zeros(64, dtype=torch.int64))),
    }[name]
    _, program = recorded("trace", module, torch.randn(64, 8))
    x = torch.randn(64, 8, requires_grad=True)
    (program(x).sum() * 2).backward()
    if name == "loss":
        expected = x.detach().clone().requires_grad_()
        (F.cross_entropy(expected, torch.zeros(64, dtype=torch.int64)) * 2).backward()
        torch.testing.assert_close(x.grad, expected.grad)
    else:
        assert x.grad.unique().tolist() == [0.0, 4.0]
