"""fr.convert(keep_class=True): modules compute as converted ones do, and are of torch's class."""

import copy
import inspect
import io
import pickle
import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers import run_python
from patch_cases import (
    INDICES,
    TORCH_OPS,
    ResNet,
    assert_compiles,
    modules_and_inputs,
    ops_seen,
    uses_fastreg,
)
from patch_cases import encoder as make_encoder
from torch import nn

import fastreg as fr
from fastreg import _patch

KINDS = list(_patch._MODULES)
every = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


@pytest.fixture(autouse=True)
def classes_of_torch():
    """No class asks after a test."""
    yield
    for kind in KINDS:
        _patch._asking(kind).exchange(False)


def kept(model):
    return fr.convert(model, keep_class=True)


def is_ours(module, x=None):
    x = torch.ones(2, 3, 4, 4) if x is None else x
    return uses_fastreg(lambda: module(x))


def test_modules_compute_as_converted_ones():
    for module, x in modules_and_inputs():
        kind, keys = type(module), set(vars(module))
        other, twin = copy.deepcopy(module), fr.convert(copy.deepcopy(module))
        assert kept(module) is module and type(module) is kind
        assert repr(module) == repr(other) and set(vars(module)) - keys == {"_fastreg_kept"}
        torch.manual_seed(2)
        expected = twin(x.clone())
        torch.manual_seed(2)
        with ops_seen() as seen:
            result = module(x.clone())
        assert torch.equal(result, expected) and "fastreg::dropout" in seen and not seen & TORCH_OPS
        assert torch.equal(module.eval()(x), x)
        with ops_seen() as seen:
            other(x.clone())
        assert not any(name.startswith("fastreg") for name in seen)
    x, target = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 1, 1])
    options = {"weight": torch.rand(4), "ignore_index": 3, "reduction": "sum", "label_smoothing": 0.2}
    loss = kept(nn.CrossEntropyLoss(**options))
    assert type(loss) is nn.CrossEntropyLoss
    assert uses_fastreg(lambda: loss(x, target), "fastreg::cross_entropy")
    torch.testing.assert_close(loss(input=x, target=target), F.cross_entropy(x, target, **options))
    with pytest.raises(RuntimeError):
        loss(x, target.int())
    loss.label_smoothing = 0.0  # what is changed later is followed
    torch.testing.assert_close(
        loss(x, target), F.cross_entropy(x, target, **options | {"label_smoothing": 0.0})
    )


@every
def test_a_class_keeps_its_forward(kind):
    forward, signature = kind.forward, inspect.signature(kind.forward)
    source = inspect.getsource(forward)
    kept(kind())
    assert kind.forward is forward and inspect.signature(forward) == signature
    assert inspect.getsource(forward) == source

    class Mine(kind):
        def forward(self, *args):
            return super().forward(*args)

    assert "_fastreg_kept" not in vars(kept(Mine()))


def test_copies():
    model = kept(nn.Sequential(nn.Linear(4, 4), nn.Dropout()))
    model[1].note = "mine"
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    pickled = pickle.loads(pickle.dumps(model))
    for twin in (copy.deepcopy(model), copy.copy(model[1]), pickled, loaded):
        last = twin if isinstance(twin, nn.Dropout) else twin[1]
        assert type(last) is nn.Dropout and last.note == "mine" and is_ours(last)
    shallow = copy.copy(model[1]).eval()  # which does not fall back to the original's mode
    assert torch.equal(shallow(torch.ones(50)), torch.ones(50)) and model[1].training
    replica = model[1]._replicate_for_data_parallel()
    replica.p = 0.0
    assert torch.equal(replica(torch.ones(50)), torch.ones(50)) and is_ours(model[1])
    assert nn.Sequential(nn.Linear(4, 4), nn.Dropout()).state_dict().keys() == model.state_dict().keys()


def test_a_pickle_in_another_process(tmp_path):
    path = tmp_path / "module"
    path.write_bytes(pickle.dumps(kept(nn.Dropout(0.25))))
    code = f"""
import pickle, torch
module = pickle.load(open({str(path)!r}, "rb"))
import fastreg as fr
torch.manual_seed(1)
result = module(torch.ones(100))
torch.manual_seed(1)
assert type(module) is torch.nn.Dropout and torch.equal(result, fr.dropout(torch.ones(100), 0.25))
"""
    run_python(code, check=True)


def test_the_way_back():
    module = kept(nn.Dropout())
    assert is_ours(module)
    del module._fastreg_kept
    assert not is_ours(module)
    assert type(fr.convert(kept(module))) is fr.nn.Dropout and "_fastreg_kept" not in vars(module)
    assert is_ours(module) and type(kept(module)) is fr.nn.Dropout


@every
def test_a_class_with_another_forward_is_left_alone(kind, monkeypatch):
    monkeypatch.setattr(kind, "forward", lambda self, x: x * 7)
    module = kept(nn.Sequential(kind()))[0]
    assert "_fastreg_kept" not in vars(module) and module(torch.ones(2)).tolist() == [7, 7]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@every
def test_a_function_that_the_program_replaced_is_called(kind, compiled, monkeypatch):
    module = kept(kind())
    loss = kind is nn.CrossEntropyLoss
    name = "cross_entropy" if loss else re.sub(r"(?<=a|e)(D|A)", r"_\1", kind.__name__).lower()
    monkeypatch.setattr(F, name, lambda input, *args, **kwargs: input * 7)
    x = torch.rand(2, 3, 4)
    run = torch.compile(module, backend="eager") if compiled else module
    assert torch.equal(run(x, torch.zeros(2, 4, dtype=torch.long)) if loss else run(x), 7 * x)


def test_hooks():
    model, calls = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)), []
    model[1].register_forward_hook(lambda *_: calls.append("forward"))
    model[1].register_full_backward_hook(lambda *_: calls.append("backward"))
    kept(model)(torch.ones(2, 3, requires_grad=True)).sum().backward()
    assert calls == ["forward", "backward"]


def test_compiled():
    model, loss_of = make_encoder(0.1)
    kept(model)
    assert_compiles(model, loss_of)


def test_converted_after_compiling():
    models = [nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)) for _ in range(2)]
    compiled = [torch.compile(model, backend="aot_eager", fullgraph=True) for model in models]
    x = torch.ones(4, 8)
    for each in compiled:  # the first exchanges the code of the class, the second finds it exchanged
        assert not uses_fastreg(lambda: each(x))  # noqa: B023
        kept(each)
        assert uses_fastreg(lambda: each(x))  # noqa: B023
    del models[0][1]._fastreg_kept
    assert not uses_fastreg(lambda: compiled[0](x)) and uses_fastreg(lambda: compiled[1](x))


@pytest.mark.parametrize("strict", [False, True])
def test_export_needs_no_fastreg(strict):
    model = kept(ResNet(0.2)).eval()
    x = torch.randn(2, 3, 8, 8)
    program = torch.export.export(model, (x,), strict=strict)
    assert "fastreg" not in str(program.graph) and "dropout" not in str(program.graph)
    torch.testing.assert_close(program.module()(x), model(x))


@every
def test_script_trace_and_fx_are_as_without(kind):
    module, other = kept(kind()), kind()
    loss = kind is nn.CrossEntropyLoss
    shape = {"Dropout1d": (3, 4, 5), "Dropout3d": (2, 3, 4, 5, 2)}.get(kind.__name__, (2, 3, 4, 5))
    arguments = (torch.randn(4, 5), INDICES) if loss else (torch.randn(shape),)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripts = [torch.jit.script(each) for each in (module, other)]
        traces = [torch.jit.trace(each.train(), arguments, check_trace=False) for each in (module, other)]
    assert scripts[0].code == scripts[1].code and traces[0].code == traces[1].code
    torch.manual_seed(1)
    expected = other(*arguments)
    torch.manual_seed(1)
    assert torch.equal(scripts[0](*arguments), expected)
    if not loss:
        graphs = [torch.fx.symbolic_trace(nn.Sequential(each)) for each in (module, other)]
        assert graphs[0].code == graphs[1].code
        assert type(graphs[0].get_submodule("0")) is kind


def test_other_libraries_are_left_alone():
    layers = pytest.importorskip("timm.layers", reason="needs timm", exc_type=ImportError)
    assert type(kept(layers.DropPath(0.5))) is layers.DropPath


def test_the_argument():
    with pytest.raises(ValueError, match="keep_class must be"):
        fr.convert(nn.Dropout(), keep_class="yes")
