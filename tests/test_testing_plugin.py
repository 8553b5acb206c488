"""The pytest plugin fastreg.testing.patched, on projects of a few lines."""

import copy
import io
import json
import pickle
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT, run_python
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.optim import SGD, AdamW  # names of this module

import fastreg as fr
from fastreg.testing import patched
from fastreg.testing.patched import Exchange

TORCHS = (SGD, AdamW)  # where no name is exchanged


@pytest.fixture
def exchange():
    """A function that begins an exchange, which ends with the test."""
    begun = []
    yield lambda *options: begun.append(Exchange(options)) or begun[-1]
    for each in begun:
        each.undo()
    assert torch.optim.SGD is SGD is TORCHS[0] and torch.optim.AdamW is AdamW is TORCHS[1]
    assert "__init__" not in vars(nn.Dropout)
    assert type(nn.Dropout()) is nn.Dropout and type(nn.CrossEntropyLoss()) is nn.CrossEntropyLoss
    assert not F.dropout.__code__.co_filename.endswith("_exchange.py")


class Other(torch.Tensor):
    pass


@pytest.mark.parametrize("options", [("convert_keep_class",), ("convert", "convert_keep_class")])
def test_modules_keep_their_class(exchange, options):
    run, x = exchange(*options), torch.ones(2000)
    model = nn.Sequential(nn.Dropout(), nn.CrossEntropyLoss())
    assert type(model[0]) is nn.Dropout and type(model[1]) is nn.CrossEntropyLoss
    assert (model[0](x) == 0).any()
    assert run.counts == {"modules converted": 2, "calls of converted modules": 1}
    copy.deepcopy(model)[0](x)
    assert run.counts["calls of converted modules"] == 2
    run.undo()
    nn.Dropout()(x)
    assert run.counts["modules converted"] == run.counts["calls of converted modules"] == 2


class TestPatch:
    def test_calls_are_counted(self, exchange):
        run, x = exchange("patch"), torch.ones(2000)
        assert (F.dropout(x) == 0).any()
        F.cross_entropy(torch.randn(3, 4), torch.tensor([0, 1, 2]))
        assert run.counts == {"patched calls": 2, "of these handed on to torch": 0}
        nn.Dropout()(x.as_subclass(Other))  # goes to torch's function, which calls itself once more
        assert run.counts == {"patched calls": 4, "of these handed on to torch": 2}
        assert run.summary() == "fastreg: patched calls 4, of these handed on to torch 2"

    def test_attention_is_counted(self, exchange):
        run, q = exchange("patch"), torch.randn(1, 2, 3, 4)
        F.scaled_dot_product_attention(q, q, q, dropout_p=0.5)
        assert run.counts["patched calls"] == 1

    def test_what_is_refused_is_torchs(self, exchange):
        run = exchange("patch")
        with pytest.raises(IndexError):
            F.cross_entropy(torch.randn(1, 4), torch.tensor([4]))
        assert run.counts["patched calls"] == run.counts["of these handed on to torch"] == 1

    def test_compiled_code_stays_one_graph(self, exchange):
        run = exchange("patch", "convert")
        counter = CompileCounter()
        drop = nn.Dropout(0.5)
        step = torch.compile(lambda x: F.dropout(drop(x)), backend=counter, fullgraph=True)
        for _ in range(4):
            step(torch.ones(8))
        assert counter.frame_count == 1 and not run.counts["patched calls"]
        torch._dynamo.reset()


class TestConvert:
    def test_whatever_is_built(self, exchange):
        run = exchange("convert")
        model = nn.Sequential(nn.Dropout(0.3), nn.Dropout2d(), nn.TransformerEncoderLayer(4, 2, 8))
        assert type(model[0]) is fr.nn.Dropout and model[0].p == 0.3
        assert type(model[2].dropout1) is fr.nn.Dropout
        assert type(nn.CrossEntropyLoss(label_smoothing=0.1)) is fr.nn.CrossEntropyLoss
        assert run.counts["modules converted"] == 6  # 2 here, 3 in the layer, and the loss
        assert repr(model[0]) == "Dropout(p=0.3, inplace=False)" and isinstance(model[0], nn.Dropout)
        model[:2](torch.ones(2, 3, 4, 4))
        assert run.counts["calls of converted modules"] == 2

    def test_subclasses_are_left_alone(self, exchange):
        exchange("convert")

        class Mine(nn.Dropout):
            pass

        assert type(Mine()) is Mine and type(nn.Sequential(Mine())[0]) is Mine

    def test_known_by_name(self, exchange):
        layers = pytest.importorskip("timm.layers", reason="needs timm", exc_type=ImportError)
        exchange("convert")
        assert type(nn.Sequential(layers.DropPath(0.1))[0]) is fr.nn.DropPath

    def test_copies_and_pickles(self, exchange):
        exchange("convert")
        model = nn.Sequential(nn.Dropout(0.25), nn.CrossEntropyLoss(torch.ones(3)))
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert [type(m) for m in twin] == [fr.nn.Dropout, fr.nn.CrossEntropyLoss] and twin[0].p == 0.25

    def test_arguments_are_refused_as_before(self, exchange):
        exchange("convert")
        with pytest.raises(ValueError, match="between 0 and 1"):
            nn.Dropout(2.0)
        with pytest.raises(TypeError):
            nn.Dropout(rescale="train")  # is torch's constructor


class TestOptim:
    def test_under_every_name(self, exchange):
        run = exchange("optim")
        assert torch.optim.SGD is sys.modules["torch.optim.sgd"].SGD is SGD is fr.optim.SGD
        p = nn.Parameter(torch.ones(3))
        p.grad = torch.ones(3)
        SGD([p], lr=0.5).step()
        assert run.counts == {"steps of SGD": 1} and p[0] == 0.5
        assert torch.optim.AdamW is sys.modules["torch.optim.adamw"].AdamW is AdamW is fr.optim.AdamW
        AdamW([p], 0.25, (0.0, 0.0), 0.0, 0.0).step()
        assert run.counts["steps of AdamW"] == 1 and p[0] == 0.25

    def test_subclasses_and_pickles(self, exchange):
        before = [kind([nn.Parameter(torch.ones(1))], lr=0.1) for kind in TORCHS]
        exchange("optim")
        for name in ("SGD", "AdamW"):
            kind = getattr(torch.optim, name)

            class Mine(kind):
                pass

            p = nn.Parameter(torch.ones(1))
            assert issubclass(Mine, getattr(fr.optim, name)) and isinstance(Mine([p], lr=0.1), kind)
            buffer = io.BytesIO()
            torch.save(kind([p], lr=0.1), buffer)
            buffer.seek(0)
            assert type(torch.load(buffer, weights_only=False)) is kind
        assert tuple(type(copy.deepcopy(optimizer)) for optimizer in before) == TORCHS


def test_an_exchange_that_reached_nothing_says_so(exchange):
    run = exchange("patch", "convert", "optim")
    nn.Dropout()  # converted, and never called
    assert run.summary() == "fastreg ran nowhere: these tests say nothing about it"


PROJECT = {
    "conftest.py": """
import torch.nn.functional as F
CODE = F.dropout.__code__.co_filename  # as the first line of the project sees it
""",
    "test_one.py": """
import torch, conftest
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.optim import SGD

def test_reached(request):
    on = request.config.getoption("fastreg_patch", False)
    assert conftest.CODE.endswith("_exchange.py") == on
    p = nn.Parameter(torch.ones(100))
    optimizer = SGD([p], lr=0.1)
    nn.Dropout(0.5)(p).sum().backward()
    optimizer.step()
    assert type(optimizer).__module__ == ("fastreg.optim" if on else "torch.optim.sgd")
    assert type(nn.Dropout()).__module__ == ("fastreg.nn" if on else "torch.nn.modules.dropout")
""",
    "test_two.py": """
import torch.nn.functional as F, torch

def test_eval():
    assert F.dropout(torch.ones(3), training=False).sum() == 3
""",
    "test_three.py": """
import copy, io, torch
from torch import nn

class Slow(torch.optim.SGD):
    pass

def make():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 3))
    optimizer = Slow(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    return model, optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.5, total_steps=40)

def train(model, optimizer, schedule, steps):
    x, y = torch.randn(32, 4, generator=torch.Generator().manual_seed(1)), torch.arange(32) % 3
    loss = nn.CrossEntropyLoss(label_smoothing=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss(model(x), y)
        value.backward()
        optimizer.step()
        schedule.step()
    return value.item()

def test_training_goes_on_where_it_was_saved():
    parts, others = make(), make()
    first = train(*parts, 1)
    train(*parts, 10)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in parts], file)
    file.seek(0)
    for part, state in zip(others, torch.load(file, weights_only=True)):
        part.load_state_dict(state)
    ends = []
    for each in (parts, others):
        torch.manual_seed(2)
        ends.append(train(*each, 20))
    assert ends[0] == ends[1] < first

def test_copies():
    model, optimizer, _ = make()
    assert repr(copy.deepcopy(model)) == repr(model)
    assert copy.deepcopy(optimizer).state_dict() == optimizer.state_dict()
""",
}

# One process for all, because each that imports torch takes seconds.
RUN = """
import sys, pytest
plugin = ["-p", "fastreg.testing.patched"]
on = ["--fastreg-patch", "--fastreg-convert", "--fastreg-optim"]
for arguments in ([*plugin, *on], plugin, [*plugin, *on, "-k", "nothing_has_this_name"]):
    print("##", flush=True)
    code = pytest.main(["-p", "no:cacheprovider", "-c", "/dev/null", "--rootdir=.", ".", *arguments])
    for name in ("conftest", "test_one", "test_two", "test_three"):
        sys.modules.pop(name, None)
    print(int(code), flush=True)
"""


def test_a_run_of_pytest(tmp_path):
    for name, text in PROJECT.items():
        (tmp_path / name).write_text(text)
    done = run_python(
        f"import os; os.chdir({str(tmp_path)!r})\n{RUN}", check=True, PYTEST_DISABLE_PLUGIN_AUTOLOAD=1
    )
    with_all, without, of_nothing = done.stdout.split("##\n")[1:]
    summary = ["calls of converted modules 103", "modules converted 9", "patched calls 1", "steps of SGD 52"]
    assert "4 passed" in with_all and with_all.endswith("0\n"), with_all
    assert "fastreg: patch, convert, optim\n" in with_all  # the header
    line = next(line for line in with_all.splitlines() if line.startswith("fastreg: ") and "steps" in line)
    assert sorted(line.removeprefix("fastreg: ").split(", ")) == summary
    assert "4 passed" in without and "fastreg: " not in without, without
    assert "fastreg ran nowhere" in of_nothing


def test_workers_of_xdist_hand_over_their_counts(monkeypatch):
    """A worker has the options only when pytest_configure is called, and its counts reach the other process
    with what it puts out.
    """
    monkeypatch.setattr(patched, "_running", [])
    chosen = SimpleNamespace(fastreg_patch=True, fastreg_convert=False, fastreg_optim=False)
    worker = SimpleNamespace(option=chosen, workeroutput={})
    patched.pytest_configure(worker)
    F.dropout(torch.ones(3))
    patched.pytest_sessionfinish(SimpleNamespace(config=worker))
    patched.pytest_unconfigure()
    assert worker.workeroutput["fastreg"]["patched calls"] == 1 and not patched._running
    patched.pytest_load_initial_conftests(SimpleNamespace(known_args_namespace=chosen))
    patched.pytest_testnodedown(worker)
    lines = []
    patched.pytest_terminal_summary(SimpleNamespace(write_line=lines.append))
    patched.pytest_unconfigure()
    assert lines == ["fastreg: patched calls 1"]


def test_the_page_of_other_projects_is_current():
    pytest.importorskip("tomllib", reason="needs Python 3.11")
    path = str(ROOT / "tests" / "suites" / "run")
    loader = SourceFileLoader("suites_run", path)
    suites = module_from_spec(spec_from_loader("suites_run", loader))
    loader.exec_module(suites)
    results = json.loads(suites.RESULTS.read_text())
    assert suites.PAGE.read_text() == suites.page(results), "run tests/suites/run --page"
    assert results.keys() <= suites.SUITES.keys()
    for suite, result in results.items():
        assert result["version"] == suites.SUITES[suite]["version"]


@pytest.mark.slow
def test_quick_tests_of_others(tmp_path):
    """One file of the tests of timm, pytorch-ignite and skorch each; docs/suites.md has the whole suites."""
    pytest.importorskip("torchvision", reason="timm needs torchvision, and there is none for this torch")
    command = [sys.executable, ROOT / "tests" / "suites" / "run", "--quick", "--work", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count('"version"') == 3, done.stdout
