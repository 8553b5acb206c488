"""fr.patch(compiled=...): whose dropout a program has that torch.compile makes for a GPU.

Without a GPU the tests let the CPU pass for one where the choice is made.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastreg as fr
from fastreg import _patch

X = torch.ones(64, 8)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(_patch, "_is_on_gpu", lambda input: True)
    torch._dynamo.reset()


def operators(function, *inputs):
    """The operators of the graph that torch.compile makes, as "ours", "torch" or both."""
    found = set()

    def backend(graph, example_inputs):
        for node in graph.graph.nodes:
            name = str(node.target)
            if "dropout" in name:
                found.add("ours" if "fastreg" in name else "torch")
        return graph

    torch._dynamo.reset()
    torch.compile(function, backend=backend, fullgraph=True)(*inputs)
    return found


@pytest.mark.parametrize("module", [False, True])
def test_the_choice(as_on_a_gpu, module):
    function = nn.Dropout(0.5) if module else lambda x: F.dropout(x, 0.5)
    assert operators(function, X) == {"torch"}
    with fr.patched():
        assert operators(function, X) == {"torch"}
        with fr.patched(compiled="ours"):
            assert operators(function, X) == {"ours"}
            with fr.patched():  # leaves it
                assert operators(function, X) == {"ours"}
            with fr.patched(compiled="torch"):
                assert operators(function, X) == {"torch"}
            assert operators(function, X) == {"ours"}
        assert operators(function, X) == {"torch"}
    fr.patch(compiled="ours")
    fr.patch()
    assert operators(function, X) == {"ours"}
    fr.unpatch()
    fr.patch()
    assert operators(function, X) == {"torch"}


def test_a_compiled_program_follows_a_later_choice(as_on_a_gpu):
    compiled = torch.compile(lambda x: F.dropout(x, 0.5), backend="aot_eager", fullgraph=True)

    def is_ours():
        torch.manual_seed(1)
        found = compiled(X)
        torch.manual_seed(1)
        return torch.equal(found, fr.dropout(X, 0.5))

    fr.patch()
    assert not is_ours()
    fr.patch(compiled="ours")
    assert is_ours()
    fr.patch(compiled="torch")
    assert not is_ours()


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_recomputes_by_the_choice_of_its_forward_pass(as_on_a_gpu, reentrant):
    x = X.clone().requires_grad_()
    compiled = torch.compile(lambda a: F.dropout(a, 0.5), backend="aot_eager", fullgraph=True)
    with fr.patched(compiled="ours"):
        y = checkpoint(compiled, x, use_reentrant=reentrant)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())
    assert _patch._compiled == "torch" and not _patch._patched


def test_on_a_cpu_it_is_ours_by_default():
    with fr.patched():
        assert operators(lambda x: F.dropout(x, 0.5), X) == {"ours"}
    assert _patch._is_left_to_compiler(X) is False


def test_another_word_is_refused():
    for call in (fr.patch, lambda **options: fr.patched(**options).__enter__()):
        with pytest.raises(
            ValueError, match=r"patch: compiled must be one of 'torch', 'ours', got 'inductor'"
        ):
            call(compiled="inductor")
    assert not _patch._patched


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    x = X.cuda()
    with fr.patched():
        assert operators(lambda a: F.dropout(a, 0.5), x) == {"torch"}
        with fr.patched(compiled="ours"):
            assert operators(lambda a: F.dropout(a, 0.5), x) == {"ours"}
            torch.manual_seed(1)
            found = torch.compile(lambda a: F.dropout(a, 0.5))(x)
            torch.manual_seed(1)
            assert torch.equal(found != 0, fr.dropout(x, 0.5) != 0)
