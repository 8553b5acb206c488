"""docs/differences.md: what stays different from torch. Each row names the test here that pins it."""

import copy
import inspect
import pickle
import re
import sys
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT
from torch import nn

import fastreg as fr

PAGE = ROOT / "docs" / "differences.md"
X = torch.ones(4, 1000)


def parameter(*shape, **options):
    p = nn.Parameter(torch.ones(*shape, **options))
    p.grad = torch.ones_like(p)
    return p


# ---- dropout


def test_masks_of_a_seed():
    masks = []
    for function in (F.dropout, fr.dropout):
        torch.manual_seed(0)
        masks.append(function(X) != 0)
    assert not torch.equal(*masks)


def test_a_dropped_infinity_is_zero():
    x = torch.full((1000,), torch.inf)
    assert F.dropout(x).isnan().any() and not fr.dropout(x).isnan().any()


def test_p_true_is_refused_by_name():
    for p in (True, 0.5j, np.complex64(0.5)):
        with pytest.raises(TypeError, match="Dropout: p must be a number"):
            fr.nn.Dropout(p)
    with pytest.raises(TypeError, match="p must be a number, got bool"):
        fr.dropout(X, True)
    assert not F.dropout(X, True).any()
    with fr.patched():
        assert not F.dropout(X, True).any()


def test_training_none_is_refused_by_name():
    with pytest.raises(TypeError, match="training must be True or False, got NoneType"):
        fr.dropout(X, training=None)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64, torch.bool])
def test_other_numbers_are_refused_by_name(dtype):
    with pytest.raises(ValueError, match="input must be float32"):
        fr.dropout(X.to(dtype), 1.0)
    assert not F.dropout(X.to(dtype), 1.0).any()


# ---- cross-entropy


def test_a_class_without_mass_may_have_probability_zero():
    z, q = torch.tensor([[0.0, -torch.inf]]), torch.tensor([[1.0, 0.0]])
    assert F.cross_entropy(z, q).isnan() and fr.cross_entropy(z, q) == 0


def test_half_precision_is_rounded_once():
    z = (torch.randn(64, 50, generator=torch.Generator().manual_seed(1)) * 4).bfloat16()
    y = torch.arange(64) % 50
    exact = F.cross_entropy(z.double(), y, reduction="none", label_smoothing=0.1)
    right = exact.bfloat16()
    assert torch.equal(fr.cross_entropy(z, y, reduction="none", label_smoothing=0.1), right)
    assert not torch.equal(F.cross_entropy(z, y, reduction="none", label_smoothing=0.1), right)


def test_derivatives_of_class_weights_are_refused_by_name():
    x, y, weight = torch.randn(4, 5), torch.arange(4), torch.ones(5)

    def forwards(loss):
        return torch.func.jvp(lambda w: loss(x, y, w), (weight,), (weight,))[1]

    assert forwards(F.cross_entropy) == 0
    with pytest.raises(ValueError, match="weight must not require a gradient"):
        forwards(fr.cross_entropy)


def test_any_integer_is_a_class_index_by_name():
    z = torch.randn(3, 5)
    for dtype in (torch.int32, torch.int16):
        y = torch.tensor([0, 1, 4], dtype=dtype)
        assert fr.cross_entropy(z, y) == fr.cross_entropy(z, y.long())
        with pytest.raises(RuntimeError):
            F.cross_entropy(z, y)


def test_class_weights_of_other_dtypes_by_name():
    z, y, weight = torch.randn(4, 3).bfloat16(), torch.tensor([0, 1, 2, 1]), torch.tensor([1.0, 2, 3])
    exact = F.cross_entropy(z.double(), y, weight.double())
    assert fr.cross_entropy(z, y, weight) == exact.bfloat16()
    with pytest.raises(RuntimeError, match=r"dtype|type"):
        F.cross_entropy(z, y, weight)
    q = torch.rand(4, 3)
    for dtype in (torch.int64, torch.bool, torch.complex64):
        with pytest.raises(TypeError, match="weight must be floating point"):
            fr.cross_entropy(z.float(), q, weight.to(dtype))
        assert F.cross_entropy(z.float(), q, weight.to(dtype)).isfinite()


@pytest.mark.parametrize("smoothing", [True, -0.1, float("nan"), np.complex64(0.1)])
def test_smoothing_that_is_none_is_refused_by_name(smoothing):
    z, y = torch.randn(4, 3), torch.tensor([0, 1, 2, 1])
    with pytest.raises((TypeError, ValueError), match="label_smoothing must be"):
        fr.cross_entropy(z, y, label_smoothing=smoothing)
    F.cross_entropy(z, y, label_smoothing=smoothing)
    with fr.patched():
        F.cross_entropy(z, y, label_smoothing=smoothing)


def test_targets_of_other_shapes_are_refused_by_name():
    z, y = torch.randn(3), torch.tensor([1])
    with pytest.raises(ValueError, match="target must have shape"):
        fr.cross_entropy(z, y)
    empty = torch.zeros(2, 0)
    with pytest.raises(ValueError, match="at least one class"):
        fr.cross_entropy(empty, empty)
    with fr.patched():
        torch.testing.assert_close(F.cross_entropy(z, y), fr.cross_entropy(z, y[0]))
        assert F.cross_entropy(empty, empty, reduction="sum") == 0


def test_an_infinite_class_weight_is_nan():
    z, y, weight = torch.randn(4, 3), torch.tensor([0, 1, 2, 1]), torch.full((3,), torch.inf)
    assert fr.cross_entropy(z, y, weight, reduction="sum").isnan()
    assert F.cross_entropy(z, y, weight, reduction="sum") == torch.inf


# ---- SGD and AdamW

both = pytest.mark.parametrize("kind", ["SGD", "AdamW"])


def test_sparse_gradients_are_made_dense():
    ours, theirs = nn.Embedding(5, 2, sparse=True).double(), nn.Embedding(5, 2, sparse=True).double()
    theirs.load_state_dict(ours.state_dict())
    pairs = []
    for embedding, module in ((ours, fr.optim), (theirs, torch.optim)):
        optimizer = module.SGD(embedding.parameters(), lr=0.1, momentum=0.9, dampening=0.1)
        for index in ([1, 1], [3, 1], [0]):
            optimizer.zero_grad()
            embedding(torch.tensor(index)).square().sum().backward()
            optimizer.step()
        pairs.append(optimizer)
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-14, atol=1e-14)
    kept, torchs = (optimizer.state_dict()["state"][0]["momentum_buffer"] for optimizer in pairs)
    assert kept.layout == torch.strided and torchs.layout == torch.sparse_coo
    torch.testing.assert_close(kept, torchs.to_dense(), rtol=1e-14, atol=1e-14)
    kept, torchs = (copy.deepcopy(optimizer.state_dict()) for optimizer in pairs)
    pairs[0].load_state_dict(torchs)
    pairs[1].load_state_dict(kept)
    for embedding, optimizer in zip((ours, theirs), pairs, strict=True):
        embedding(torch.tensor([2, 1])).square().sum().backward()
        optimizer.step()
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-13, atol=1e-14)


@both
def test_a_conjugate_parameter_is_refused(kind):
    p = nn.Parameter(torch.ones(2, dtype=torch.complex64).conj())
    p.grad = torch.ones(2, dtype=torch.complex64)
    with pytest.raises(RuntimeError, match=r"got a conjugate .*resolve_conj"):
        getattr(fr.optim, kind)([p], lr=0.1).step()
    torch.optim.SGD([p], lr=0.1).step()
    with pytest.raises(RuntimeError):
        torch.optim.AdamW([p], lr=0.1).step()


@both
def test_a_fused_step_takes_complex_parameters(kind):
    params = [parameter(2, dtype=torch.complex64)]
    getattr(fr.optim, kind)(params, lr=0.1, fused=True).step()
    with pytest.raises(RuntimeError, match="floating point"):
        getattr(torch.optim, kind)(params, lr=0.1, fused=True).step()


@both
def test_a_differentiable_step_is_refused(kind):
    with pytest.raises(ValueError, match="differentiable must be False"):
        getattr(fr.optim, kind)([parameter(2)], lr=0.1, differentiable=True)


@both
def test_numbers_that_are_none_are_refused(kind):
    """tests/test_doors_constructors.py has all of them."""
    nan = float("nan")
    options = [{"lr": nan}] if kind == "SGD" else []  # torch's AdamW refuses it too
    options += [{"weight_decay": float("inf")}, {"weight_decay": np.complex64(0.5)}]
    options.append({"dampening": nan} if kind == "SGD" else {"lr": torch.tensor(True)})
    for given in options:
        with pytest.raises((TypeError, ValueError), match=f"^{kind}: {next(iter(given))} must be "):
            getattr(fr.optim, kind)([parameter(2)], **given)
        getattr(torch.optim, kind)([parameter(2)], **given)


@both
def test_a_factor_beyond_float32_is_refused_for_what_is_stepped_in_it(kind):
    wide = getattr(fr.optim, kind)((torch.zeros(2, dtype=torch.float64) for _ in range(2)), lr=1e39)
    assert [len(group["params"]) for group in wide.param_groups] == [2]
    wide.step()
    p = parameter(2)
    p.grad, before = torch.ones(2), p.detach().clone()
    for name in ("lr", "weight_decay", "l1"):
        with pytest.raises(ValueError, match=f"^{kind}: {name} must be within .* torch.float32 parameters"):
            getattr(fr.optim, kind)([p], **{name: 1e39})
        optimizer = getattr(fr.optim, kind)([p], lr=0.1)
        optimizer.param_groups[0][name] = 1e39
        with pytest.raises(RuntimeError, match=f"^{kind}: {name} must be within .* torch.float32 parameters"):
            optimizer.step()
        assert torch.equal(p, before)


def test_betas_that_are_no_pair_name_the_argument():
    for betas in ((0.5,), (), {}, np.float64(0.5), torch.tensor(0.5)):
        with pytest.raises((IndexError, KeyError)):
            torch.optim.AdamW([parameter(2)], betas=betas)
        with pytest.raises((TypeError, ValueError), match=r"^AdamW: betas must be two numbers"):
            fr.optim.AdamW([parameter(2)], betas=betas)


@both
def test_switches_of_torchs_implementations_do_nothing(kind):
    make = getattr(fr.optim, kind)
    plain, others = parameter(2), [parameter(2), parameter(2)]
    make([plain]).step()
    make(others[:1], foreach=torch.ones(2)).step()
    make(others[1:], **({"capturable": True} if kind == "AdamW" else {})).step()
    assert all(torch.equal(plain, other) for other in others)
    with pytest.raises(RuntimeError):
        getattr(torch.optim, kind)([parameter(2)], foreach=torch.ones(2)).step()


@both
def test_a_key_that_nothing_reads_is_refused(kind):
    groups = [{"params": [parameter(2)], "L1": 0.1}]
    getattr(torch.optim, kind)(groups, lr=0.1)
    with pytest.raises(ValueError, match="'L1', which nothing reads"):
        getattr(fr.optim, kind)(groups, lr=0.1)


@both
def test_a_parameter_that_shares_memory_is_refused(kind):
    p = nn.Parameter(torch.ones(1).expand(3))
    with pytest.raises(ValueError, match="must not share memory"):
        getattr(fr.optim, kind)([p], lr=0.1)


@both
def test_a_parameter_listed_twice_is_taken_once(kind):
    p = parameter(2)
    assert len(getattr(fr.optim, kind)([p, p], lr=0.1).param_groups[0]["params"]) == 1


def test_dampening_has_a_flag_in_the_state():
    p = parameter(2)
    optimizer = fr.optim.SGD([p], lr=0.1, momentum=0.9, dampening=0.5)
    optimizer.step()
    assert optimizer.state[p].keys() == {"momentum_buffer", "momentum_started"}


@both
def test_state_of_another_dtype_is_refused(kind):
    ends, options = [], {"momentum": 0.9} if kind == "SGD" else {}
    for module in (torch.optim, fr.optim):
        p = parameter(2)
        optimizer = getattr(module, kind)([p], lr=0.1, **options)
        optimizer.step()
        p.grad, p.data = None, p.data.double()
        p.grad = torch.ones_like(p)
        if module is fr.optim:
            with pytest.raises(ValueError, match="must have the dtype of its parameter"):
                optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.step()
        ends.append(p.detach())
    torch.testing.assert_close(*ends)


@both
def test_state_below_the_normal_numbers_is_zero(kind):
    state = {}
    for module in (torch.optim, fr.optim):
        p = parameter(2)
        p.grad.fill_(1e-39 if kind == "SGD" else 1e-18)
        options = {"momentum": 0.9} if kind == "SGD" else {"eps": 0.0}
        optimizer = getattr(module, kind)([p], lr=0.1, **options)
        optimizer.step()
        state[module] = optimizer.state[p]["momentum_buffer" if kind == "SGD" else "exp_avg_sq"]
        assert torch.isfinite(p).all() == (kind == "SGD" or module is torch.optim)
    assert state[torch.optim].all() and not state[fr.optim].any()


def test_the_constructor_takes_options_of_its_own():
    shared = {"l1", "l1_mode", "stochastic_rounding", "rounding_seed", "ema", "ema_warmup"}
    for kind, more in (("SGD", {"decoupled", "scale_penalty"}), ("AdamW", {"cautious"})):
        ours, theirs = getattr(fr.optim, kind), getattr(torch.optim, kind)
        own = inspect.signature(ours).parameters.keys() - inspect.signature(theirs).parameters
        assert own == shared | more | {"max_norm", "error_if_nonfinite"}
        assert shared | more < ours([parameter(2)], lr=0.1).param_groups[0].keys()


def test_adamw_takes_numbers_and_tensors_in_betas():
    betas = (0.9, torch.tensor(0.99))
    with pytest.raises(ValueError, match="either both floats or both Tensors"):
        torch.optim.AdamW([parameter(2)], betas=betas)
    fr.optim.AdamW([parameter(2)], betas=betas).step()


def test_a_rate_in_bfloat16_is_a_number():
    found = {}
    for name, make in (("torch", torch.optim.AdamW), ("ours", fr.optim.AdamW)):
        p = parameter(3)
        make([p], lr=torch.tensor(0.1, dtype=torch.bfloat16)).step()
        found[name] = p
    exact = parameter(3)
    torch.optim.AdamW([exact], lr=torch.tensor(0.1, dtype=torch.bfloat16).item()).step()
    torch.testing.assert_close(found["ours"], exact)
    assert (found["torch"] - exact).abs().max() > 1e-4


# ---- patch and convert


def test_converted_modules_have_a_class_of_ours():
    module = fr.convert(nn.Dropout())
    assert type(module) is not nn.Dropout and isinstance(module, nn.Dropout)
    assert type(fr.convert(nn.Dropout(), keep_class=True)) is nn.Dropout
    assert b"fastreg" in pickle.dumps(module) and repr(module) == repr(nn.Dropout())


def test_quantisation_knows_modules_by_their_class():
    quantize = pytest.importorskip("torch.ao.quantization.quantize_fx", reason="needs torch.ao")
    options = torch.ao.quantization.get_default_qconfig_mapping("x86"), (torch.ones(2, 4),)

    def back(model):
        fr.convert(model)[1].__class__ = nn.Dropout
        return model

    def kept(model):
        return fr.convert(model, keep_class=True)

    with warnings.catch_warnings(), fr.patched():
        warnings.simplefilter("ignore")
        torchs, ours, *others = (
            quantize.prepare_fx(door(nn.Sequential(nn.Linear(4, 4), nn.Dropout())).eval(), *options)
            for door in (lambda model: model, fr.convert, back, kept)
        )
    assert torchs.code != ours.code and ours(torch.ones(2, 4)).shape == (2, 4)
    assert {each.code for each in others} == {torchs.code}


def test_kept_classes_ask_each_module():
    module, other, x = nn.Dropout(), nn.Dropout(), torch.ones(100)

    def of(run):
        torch.manual_seed(1)
        return run(x)

    before = of(module)
    fr.convert(module, keep_class=True)
    assert nn.Dropout.forward.__code__.co_filename.endswith("_exchange.py")
    assert torch.equal(of(module), of(fr.dropout)) and torch.equal(of(other), before)
    del module._fastreg_kept
    assert torch.equal(of(module), before)


def test_stochastic_depth_is_no_longer_of_its_library():
    layers = pytest.importorskip("timm.layers", reason="needs timm", exc_type=ImportError)
    module = fr.convert(layers.DropPath(0.5))
    assert not isinstance(module, layers.DropPath) and type(module).__name__ == "DropPath"


def test_attention_that_is_kept_in_a_container_is_not_found():
    kept = [F.scaled_dot_product_attention]
    with fr.patched():
        assert kept[0] is not F.scaled_dot_product_attention
    assert kept[0] is F.scaled_dot_product_attention


@pytest.mark.skipif(not hasattr(torch.jit, "_get_trace_graph"), reason="this torch has no such tracer")
@pytest.mark.filterwarnings("ignore")
def test_patched_traces_name_their_inputs():
    class Loss(nn.Module):
        def forward(self, logits, labels):
            return F.cross_entropy(logits, labels)

    def names():
        graph = torch.jit._get_trace_graph(Loss(), (X, torch.arange(4)))[0]
        return [value.debugName() for value in graph.inputs()]

    assert names() == ["logits", "labels"]
    with fr.patched():
        assert names() == ["input", "target"]


def test_patched_code_objects_differ():
    function, code = F.dropout, F.dropout.__code__
    with fr.patched():
        assert F.dropout is function and function.__code__ is not code
    assert function.__code__ is code


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="this torch has no linear_cross_entropy")
def test_chunks_of_ours_do_what_torchs_refuse():
    loss, target = nn.LinearCrossEntropyLoss(3, 5, options=nn.LinearCrossEntropyOptions()), torch.arange(4)
    x, weight = X[:, :3], loss.linear.weight
    kept = loss(x, target)
    kept.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="retain_graph"):
        kept.backward()
    loss.label_smoothing = 0.1
    with pytest.warns(UserWarning, match="options"):
        loss(x, target)
    with fr.patched(), warnings.catch_warnings():
        warnings.simplefilter("error")
        value = loss(x, target)
        value.backward(retain_graph=True)
        first = torch.autograd.grad(value, weight, create_graph=True)[0]
        assert torch.autograd.grad(first.square().sum(), weight)[0].any()


def test_error_types_are_of_both():
    with pytest.raises(IndexError) as caught, fr.patched():
        F.cross_entropy(torch.ones(1, 3), torch.tensor([3]))
    assert isinstance(caught.value, ValueError)


def test_every_row_names_a_test_that_is_here():
    named = re.findall(r"`(test_\w+)` \|$", PAGE.read_text(), flags=re.M)
    here = [name for name in vars(sys.modules[__name__]) if name.startswith("test_")]
    here.remove("test_every_row_names_a_test_that_is_here")
    assert sorted(named) == sorted(here)
