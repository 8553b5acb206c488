"""The doors for code that knows only torch, `patch`, `unpatch`, `patched` and `convert`: whole models, every
mode of torch.

Which operator ran is read from torch's profiler, so that eager, compiled and recomputed code are seen alike.
"""

import contextlib
import copy
import functools
import gc
import inspect
import io
import pickle
import statistics
import subprocess
import sys
import threading
import types
import warnings

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastreg as fr
from fastreg import _patch

DROPOUTS = ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout")
NAMES = (*DROPOUTS, "cross_entropy")
TORCH = {name: getattr(F, name) for name in NAMES}
NN = torch._C._nn  # where no name is exchanged
TORCH_OPS = {
    "aten::native_dropout",
    "aten::dropout",
    "aten::dropout_",
    "aten::feature_dropout",
    "aten::cross_entropy_loss",
}
MODULES = (
    "Dropout",
    "Dropout1d",
    "Dropout2d",
    "Dropout3d",
    "AlphaDropout",
    "FeatureAlphaDropout",
    "CrossEntropyLoss",
)
SHAPES = {"dropout1d": (4, 3, 5), "dropout2d": (4, 3, 5, 2), "dropout3d": (4, 3, 5, 2, 2)}


@pytest.fixture(autouse=True)
def _one_thread_and_unpatched():
    torch.set_num_threads(1)
    yield
    fr.unpatch()
    torch._dynamo.reset()


@contextlib.contextmanager
def ops_seen():
    """The names of all operators that run inside, complete at the end of the block; variants of ours count as
    one.
    """
    seen = set()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        yield seen
    seen.update(event.key for event in profile.key_averages())
    seen.update(
        op
        for op in ("fastreg::dropout", "fastreg::cross_entropy")
        if any(name.startswith(op) for name in seen)
    )


def uses_fastreg(function, op="fastreg::dropout"):
    """Whether fastreg's operator runs in `function`, and torch's does not; one of the two must."""
    with ops_seen() as seen:
        function()
    ours, theirs = op in seen, bool(seen & TORCH_OPS)
    assert ours != theirs, sorted(seen)
    return ours


def arguments(name, dtype=torch.float32):
    if name == "cross_entropy":
        return torch.randn(4, 5, dtype=dtype), torch.tensor([0, 1, 2, 4])
    return torch.randn(SHAPES.get(name, (4, 3, 5)), dtype=dtype), 0.4, True


# --------------------------------------------------------------------------------------------------
# the exchange


def globals_of_all_modules():
    """Every callable by module and name; other globals are clocks and counters that move by themselves."""
    loaded = {
        name: module
        for name, module in sys.modules.items()
        if type(getattr(module, "__dict__", None)) is dict
    }
    return {
        name: {key: v for key, v in module.__dict__.items() if callable(v)} for name, module in loaded.items()
    }


def test_every_name_is_replaced_and_restored():
    from torch._dynamo import trace_rules

    rules = [dict(table) for table in trace_rules.torch_name_rule_map]
    classes = torch._dynamo.variables.user_defined.UserDefinedClassVariable
    methods = dict(vars(classes))
    fr.patch()  # what patching imports is imported before the picture is taken
    fr.unpatch()
    before = globals_of_all_modules()
    fr.patch()
    for name in NAMES:
        assert getattr(F, name) is not TORCH[name]
        assert getattr(F, name) is getattr(nn.functional, name)
    now = globals_of_all_modules()
    changed = {
        (module, name)
        for module in before
        for name, value in before[module].items()
        if now[module].get(name) is not value
    }
    changed = {key for key in changed if not key[0].startswith("fastreg")}
    assert {("torch.nn.functional", name) for name in NAMES} <= changed
    for module, name in changed:
        known = (*TORCH.values(), NN.scaled_dot_product_attention)
        assert before[module][name] in known, f"{module}.{name} is none of the patched functions"
    fr.patch()
    fr.unpatch()
    after = globals_of_all_modules()
    for module, namespace in before.items():
        assert after[module].keys() == namespace.keys(), module
        for name, value in namespace.items():
            if not module.startswith("fastreg"):
                assert after[module][name] is value, f"{module}.{name}"
    assert [dict(table) for table in trace_rules.torch_name_rule_map] == rules
    assert not any("fastreg" in name for table in rules for name in table)
    assert dict(vars(classes)) == methods
    assert {name: getattr(F, name) for name in NAMES} == TORCH


def test_nothing_in_torch_keeps_a_replacement():
    """torch holds functions in tables that are filled when they are first read; none may be filled with ours."""
    with fr.patched():
        replacements = [getattr(F, name) for name in NAMES]
        torch.overrides.get_testing_overrides()
        torch.overrides.get_overridable_functions()
        torch.overrides.resolve_name(F.dropout)
        layer = nn.TransformerEncoderLayer(8, 2, 16, 0.1, batch_first=True)
        torch.compile(layer, backend="aot_eager", fullgraph=True)(torch.randn(2, 3, 8)).sum().backward()
        torch.jit.script(nn.Dropout(0.5))
        torch.fx.symbolic_trace(nn.Sequential(Functional(), nn.Dropout(0.5)))
    torch._dynamo.reset()
    gc.collect()
    ours = vars(_patch)
    allowed = {id(holder) for holder in (ours, replacements, *ours.values())}
    for function in replacements:
        for holder in gc.get_referrers(function):
            if isinstance(holder, (dict, list, set)):
                assert id(holder) in allowed, (
                    f"{function.__name__} is kept in a {type(holder).__name__} of {len(holder)}"
                )


def module_with(code, name="module_made_by_a_test"):
    module = types.ModuleType(name)
    sys.modules[name] = module
    exec(code, module.__dict__)
    return module


@pytest.fixture
def temporary_modules():
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith("module_made_by_a_test"):
            del sys.modules[name]


@pytest.mark.usefixtures("temporary_modules")
class TestNamesOfOthers:
    code = "from torch.nn.functional import dropout, cross_entropy as ce\nimport torch.nn.functional as F"

    def test_a_name_imported_before(self):
        module = module_with(self.code)
        with fr.patched():
            assert module.dropout is F.dropout is not TORCH["dropout"]
            assert module.ce is F.cross_entropy is not TORCH["cross_entropy"]
            assert uses_fastreg(lambda: module.dropout(torch.ones(8)))
        assert module.dropout is TORCH["dropout"]
        assert module.ce is TORCH["cross_entropy"]

    def test_a_name_imported_while_patched(self):
        with fr.patched():
            module = module_with(self.code)
            assert uses_fastreg(lambda: module.dropout(torch.ones(8)))
        assert module.dropout is TORCH["dropout"]
        assert module.ce is TORCH["cross_entropy"]

    def test_a_module_that_is_unloaded_while_patched(self):
        module = module_with(self.code)
        with fr.patched():
            del sys.modules[module.__name__]
        assert module.dropout is TORCH["dropout"]

    def test_what_is_kept_elsewhere_while_patched_calls_torch_afterwards(self):
        with fr.patched():
            half = functools.partial(F.dropout, p=0.5)
            loss = {"loss": F.cross_entropy}
            namespace = {}
            exec(self.code, namespace)  # a script's globals, of no module
            assert uses_fastreg(lambda: half(torch.ones(8)))
        assert not uses_fastreg(lambda: half(torch.ones(8)))
        assert not uses_fastreg(lambda: namespace["dropout"](torch.ones(8)))
        assert not uses_fastreg(lambda: loss["loss"](*arguments("cross_entropy")), "fastreg::cross_entropy")

    def test_a_name_that_its_owner_changed_while_patched_is_left_to_him(self):
        module = module_with(self.code)
        with fr.patched():
            module.dropout = mine = lambda x: x
        assert module.dropout is mine

    def test_values_that_cannot_be_hashed_or_compared(self):
        module = module_with("")

        class Hostile:
            def __hash__(self):
                raise RuntimeError("working outside of application context")

            __eq__ = __bool__ = __getattr__ = __hash__

        module.proxy, module.list, module.array = Hostile(), [], numpy.ones(3)
        sys.modules["module_made_by_a_test_without_a_module"] = None
        sys.modules["module_made_by_a_test_of_another_type"] = object()
        with fr.patched():
            assert F.dropout is not TORCH["dropout"]


def test_patching_twice_and_unpatching_twice():
    fr.patch()
    first = F.dropout
    fr.patch()
    assert F.dropout is first
    fr.unpatch()
    assert F.dropout is TORCH["dropout"]
    fr.unpatch()
    assert F.dropout is TORCH["dropout"]
    fr.patch()
    assert F.dropout is first


def test_unpatch_without_patch():
    fr.unpatch()
    assert {name: getattr(F, name) for name in NAMES} == TORCH


def test_nested_blocks():
    with fr.patched():
        with fr.patched():
            assert F.dropout is not TORCH["dropout"]
        assert F.dropout is not TORCH["dropout"], "the inner block ended the outer one"
    assert F.dropout is TORCH["dropout"]


def test_block_inside_a_patch_of_the_process():
    fr.patch()
    with fr.patched():
        pass
    assert F.dropout is not TORCH["dropout"]
    fr.unpatch()
    assert F.dropout is TORCH["dropout"]


def test_exception_inside_the_block():
    with pytest.raises(ZeroDivisionError), fr.patched():
        raise ZeroDivisionError
    assert {name: getattr(F, name) for name in NAMES} == TORCH


def test_unpatch_inside_the_block():
    with fr.patched():
        fr.unpatch()
        assert F.dropout is TORCH["dropout"]
    assert F.dropout is TORCH["dropout"]


def test_as_a_decorator():
    @fr.patched()
    def run():
        return F.dropout

    assert run() is not TORCH["dropout"]
    assert run() is not TORCH["dropout"]
    assert F.dropout is TORCH["dropout"]


def test_blocks_of_two_threads_may_end_in_any_order():
    entered, leave, results = threading.Event(), threading.Event(), []

    def other():
        with fr.patched():
            entered.set()
            leave.wait(30)
            results.append(F.dropout is not TORCH["dropout"])

    thread = threading.Thread(target=other)
    with fr.patched():
        thread.start()
        assert entered.wait(30)
    leave.set()
    thread.join()
    assert results == [True], "the first thread's end took the patch from the second"
    assert F.dropout is TORCH["dropout"]


@pytest.mark.parametrize("name", NAMES)
def test_signature_name_and_docstring_are_torchs(name):
    original = TORCH[name]
    with fr.patched():
        ours = getattr(F, name)
        assert inspect.signature(ours) == inspect.signature(original)
        # ... and so are the parameters of the function itself, which torch.compile and torch.jit bind
        own = inspect.signature(ours, follow_wrapped=False).parameters
        expected = inspect.signature(original).parameters
        assert [(p.name, p.kind, p.default) for p in own.values()] == [
            (p.name, p.kind, p.default) for p in expected.values()
        ]
        assert (ours.__name__, ours.__qualname__, ours.__module__, ours.__doc__) == (
            original.__name__,
            original.__qualname__,
            original.__module__,
            original.__doc__,
        )
        assert pickle.loads(pickle.dumps(ours)) is ours
        pickled = pickle.dumps(ours)
    assert pickle.loads(pickled) is original


# --------------------------------------------------------------------------------------------------
# where it goes to


@pytest.mark.parametrize("name", NAMES)
def test_functions_reach_fastreg(name, dtype):
    op = "fastreg::cross_entropy" if name == "cross_entropy" else "fastreg::dropout"
    values = arguments(name, dtype)
    with ops_seen() as seen:
        getattr(F, name)(*values)
    assert op not in seen
    with fr.patched(), ops_seen() as seen:
        getattr(F, name)(*values)
    assert op in seen and not seen & TORCH_OPS


@pytest.mark.parametrize("name", NAMES)
def test_same_numbers_as_fastregs_own_function(name):
    values = arguments(name)
    torch.manual_seed(3)
    expected = getattr(fr, name)(*values)
    with fr.patched():
        torch.manual_seed(3)
        assert torch.equal(getattr(F, name)(*values), expected)
        first, second, *rest = inspect.signature(TORCH[name]).parameters  # by keyword
        torch.manual_seed(3)
        named = dict(zip((first, second, *rest), values, strict=False))
        assert torch.equal(getattr(F, name)(**named), expected)


@pytest.mark.parametrize("name", DROPOUTS)
def test_defaults_of_training_and_inplace_are_torchs(name):
    x = arguments(name)[0]
    trains = inspect.signature(TORCH[name]).parameters["training"].default
    with fr.patched():
        assert torch.equal(getattr(F, name)(x, 0.5), x) == (not trains)
        kept = x.clone()
        getattr(F, name)(kept, 0.5, True)
        assert torch.equal(kept, x)
        changed = getattr(F, name)(kept, 0.5, True, True)
        assert changed is kept and not torch.equal(kept, x)


def test_options_of_cross_entropy_arrive():
    x, target = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 1, 1])
    cases = [
        ((torch.rand(4),), {}),
        ((), {"ignore_index": 1, "label_smoothing": 0.2}),
        ((), {"reduction": "none", "weight": torch.rand(4)}),
        ((), {"reduction": "sum"}),
        ((None, None, -100, None, "sum", 0.3), {}),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cases.append(((None, False), {}))
        cases.append(((), {"size_average": True, "reduce": False}))
        for positional, named in cases:
            expected = F.cross_entropy(x, target, *positional, **named)
            with fr.patched(), ops_seen() as seen:
                result = F.cross_entropy(x, target, *positional, **named)
            assert "fastreg::cross_entropy" in seen
            torch.testing.assert_close(result, expected)
    soft = torch.randn(6, 4).softmax(1)
    with fr.patched():
        torch.testing.assert_close(F.cross_entropy(x, soft), TORCH["cross_entropy"](x, soft))


def modules_and_inputs():
    flat, image, volume = torch.randn(4, 6), torch.randn(4, 3, 5, 5), torch.randn(2, 3, 2, 4, 4)
    return [
        (nn.Dropout(0.5), flat),
        (nn.Dropout(0.5, inplace=True), flat),
        (nn.Dropout1d(0.5), torch.randn(4, 3, 5)),
        (nn.Dropout2d(0.5), image),
        (nn.Dropout3d(0.5), volume),
        (nn.AlphaDropout(0.5), flat),
        (nn.FeatureAlphaDropout(0.5), image),
    ]


def test_torchs_modules_follow():
    with fr.patched():
        for module, x in modules_and_inputs():
            with ops_seen() as seen:
                module(x.clone())
            assert "fastreg::dropout" in seen and not seen & TORCH_OPS, module
            with ops_seen() as seen:
                assert torch.equal(module.eval()(x), x)
            assert "fastreg::dropout" not in seen
        assert uses_fastreg(
            lambda: nn.CrossEntropyLoss()(*arguments("cross_entropy")), "fastreg::cross_entropy"
        )


def same_outcome(function):
    """`function` gives under the patch what it gives without: the same values from the same seed, or the same
    error.
    """
    outcomes = []
    for context in (contextlib.nullcontext(), fr.patched()):
        torch.manual_seed(0)
        with context, warnings.catch_warnings(), ops_seen() as seen:
            warnings.simplefilter("ignore")
            try:
                outcomes.append(function())
            except Exception as error:
                outcomes.append((type(error), str(error).split("\n")[0]))
        assert not any(name.startswith("fastreg::") for name in seen), sorted(seen)
    plain, patched = outcomes
    if isinstance(plain, torch.Tensor):
        assert type(plain) is type(patched) and plain.is_nested == patched.is_nested
        if plain.is_nested:
            assert all(map(torch.equal, plain.unbind(), patched.unbind()))
            return patched
        assert (plain.shape, plain.dtype, plain.device, plain.layout) == (
            patched.shape,
            patched.dtype,
            patched.device,
            patched.layout,
        )
        if plain.device.type != "meta" and plain.layout == torch.strided:
            assert torch.equal(plain, patched)
    else:
        assert plain == patched
    return patched


INDICES = torch.tensor([0, 1, 2, 4])


class TestWhatGoesToTorch:
    @pytest.mark.parametrize("name", NAMES)
    def test_meta_tensors(self, name):
        values = [v.to("meta") if isinstance(v, torch.Tensor) else v for v in arguments(name)]
        assert same_outcome(lambda: getattr(F, name)(*values)).device.type == "meta"

    @pytest.mark.parametrize(
        "dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str
    )
    @pytest.mark.parametrize("name", NAMES)
    def test_other_dtypes(self, name, dtype):
        values = [
            v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v
            for v in arguments(name)
        ]
        same_outcome(lambda: getattr(F, name)(*values))

    @pytest.mark.parametrize("name", NAMES)
    def test_no_tensors(self, name):
        same_outcome(lambda: getattr(F, name)([1.0], *arguments(name)[1:]))
        same_outcome(lambda: getattr(F, name)(numpy.ones(3), *arguments(name)[1:]))

    def test_missing_and_unknown_arguments(self):
        for call in (
            lambda f: f(),
            lambda f: f(torch.ones(3), q=1),
            lambda f: f(torch.ones(3), 0.5, True, False, 1),
        ):
            for context in (contextlib.nullcontext(), fr.patched()):
                with context, pytest.raises(TypeError):
                    call(F.dropout)

    def test_sparse_and_nested(self):
        same_outcome(lambda: F.dropout(torch.eye(3).to_sparse()))
        same_outcome(lambda: F.dropout(torch.eye(3).to_sparse_csr()))
        parts = [torch.ones(3), torch.ones(2)]
        for layout in (torch.strided, torch.jagged):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                nested = torch.nested.nested_tensor(parts, layout=layout)
            assert same_outcome(lambda nested=nested: F.dropout(nested)).is_nested

    def test_probabilities_that_are_no_python_numbers(self):
        x = torch.randn(8)
        same_outcome(lambda: F.dropout(x, torch.tensor(0.5)))
        same_outcome(lambda: F.dropout(x, numpy.float32(0.5)))
        with fr.patched():
            assert uses_fastreg(lambda: F.dropout(x, numpy.float64(0.5)))  # a float

    def test_vmap_grad_and_jvp(self):
        x = torch.randn(4, 5)
        same_outcome(lambda: torch.vmap(lambda v: F.dropout(v, 0.5), randomness="different")(x))
        same_outcome(lambda: torch.vmap(lambda v: F.dropout(v, 0.5), randomness="same")(x))
        same_outcome(
            lambda: torch.vmap(lambda v: F.dropout(v, 0.5))(x)
        )  # an error: randomness is not allowed
        same_outcome(lambda: torch.func.grad(lambda v: F.dropout(v, 0.5).sum())(x))
        same_outcome(lambda: torch.func.jvp(lambda v: F.dropout(v, 0.5), (x,), (torch.ones_like(x),))[1])
        same_outcome(lambda: torch.func.grad(lambda v: F.cross_entropy(v, INDICES))(x))
        same_outcome(lambda: torch.func.hessian(lambda v: F.cross_entropy(v, INDICES))(x))
        same_outcome(lambda: torch.vmap(torch.func.grad(F.cross_entropy))(x, INDICES))  # per-sample gradients

    def test_forward_mode_derivatives(self):
        forward_ad = torch.autograd.forward_ad
        x = torch.randn(4, 5)

        def tangent(function):
            with forward_ad.dual_level():
                return forward_ad.unpack_dual(function(forward_ad.make_dual(x, torch.ones_like(x)))).tangent

        assert same_outcome(lambda: tangent(lambda v: F.dropout(v, 0.5))) is not None
        assert same_outcome(lambda: tangent(lambda v: F.cross_entropy(v, INDICES))) is not None

    def test_a_class_weight_that_wants_a_gradient(self):
        x, soft, weight = torch.randn(4, 5), torch.randn(4, 5).softmax(1), torch.rand(5, requires_grad=True)
        same_outcome(lambda: torch.autograd.grad(F.cross_entropy(x, soft, weight), weight)[0])
        same_outcome(lambda: F.cross_entropy(x, INDICES, weight))  # an error of torch's

    def test_fake_tensors(self):
        from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

        with fr.patched(), FakeTensorMode() as mode:
            for name in NAMES:
                values = [mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for v in arguments(name)]
                assert isinstance(getattr(F, name)(*values), FakeTensor)

    def test_torch_jit(self):
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.drop, self.planes, self.loss = (
                    nn.Dropout(0.5),
                    nn.Dropout2d(0.5),
                    nn.CrossEntropyLoss(label_smoothing=0.1),
                )

            def forward(self, x, target):
                x = F.alpha_dropout(self.planes(self.drop(x)), 0.2, training=self.training)
                return self.loss(x.flatten(1), target)

        x, target = torch.randn(4, 3, 2, 2), torch.tensor([0, 3, 5, 11])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with fr.patched():
                scripted = torch.jit.script(Net())
                traced = torch.jit.trace(
                    nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)), x, check_trace=False
                )
            again = torch.jit.script(Net())
        for net in (scripted, again):
            assert torch.isfinite(net(x, target))
        assert not uses_fastreg(lambda: traced(x))
        assert "fastreg::" not in str(scripted.inlined_graph) + str(traced.inlined_graph)

    def test_torch_fx_records_torchs_function(self):
        with fr.patched():
            graph = torch.fx.symbolic_trace(lambda x, t: F.cross_entropy(F.dropout(x, 0.5), t))
        targets = [node.target for node in graph.graph.nodes if node.op == "call_function"]
        assert targets == [TORCH["dropout"], TORCH["cross_entropy"]]
        assert "torch.nn.functional.dropout(x, p = 0.5" in graph.code

    @pytest.mark.parametrize("name", NAMES)
    def test_subclasses_see_torchs_function_and_torchs_arguments(self, name):
        class Logged(torch.Tensor):
            calls = []  # noqa: RUF012

            @classmethod
            def __torch_function__(cls, function, types, args=(), kwargs=None):
                cls.calls.append((function, len(args), sorted(kwargs or {})))
                return super().__torch_function__(function, types, args, kwargs or {})

        values = arguments(name)
        logs = []
        for context in (contextlib.nullcontext(), fr.patched()):
            Logged.calls = []
            with context, ops_seen() as seen:
                result = getattr(F, name)(values[0].as_subclass(Logged), *values[1:])
                calls = list(Logged.calls)
            assert isinstance(result, Logged) and "fastreg::dropout" not in seen
            logs.append(calls[0])
        assert logs[0] == logs[1]
        assert logs[1][0] is TORCH[name]

    def test_a_subclass_as_target_or_weight(self):
        class Mine(torch.Tensor):
            @classmethod
            def __torch_function__(cls, function, types, args=(), kwargs=None):
                return function, kwargs["label_smoothing"]

        x = torch.randn(4, 5)
        with fr.patched():
            assert F.cross_entropy(x, INDICES.as_subclass(Mine), label_smoothing=0.1) == (
                TORCH["cross_entropy"],
                0.1,
            )
            assert F.cross_entropy(x, INDICES, torch.ones(5).as_subclass(Mine)) == (
                TORCH["cross_entropy"],
                0.0,
            )

    def test_a_default_device_is_no_hindrance(self):
        with fr.patched(), torch.device("cpu"):
            assert uses_fastreg(lambda: F.dropout(torch.ones(8)))


def test_in_place_on_a_view():
    """torchvision's classifiers drop out a flattened view in place."""
    x = torch.randn(4, 3, 1, 1, requires_grad=True)
    with fr.patched():
        y = nn.Dropout(0.5, inplace=True)(torch.flatten(x * 1, 1))
        y.sum().backward()
    assert torch.equal(x.grad.flatten(1), torch.where(y != 0, 2.0, 0.0))


# --------------------------------------------------------------------------------------------------
# whole models


def transformers():
    module = pytest.importorskip("transformers", reason="needs the package transformers")
    module.logging.set_verbosity_error()
    return module


def bert(p):
    hf = transformers()
    config = hf.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        hidden_dropout_prob=p,
        attention_probs_dropout_prob=p,
        num_labels=3,
        problem_type="single_label_classification",
        # So that dropout of the attention is a call of a function, not inside a kernel.
        attn_implementation="eager",
    )
    batch = {"input_ids": torch.randint(50, (8, 10)), "labels": torch.randint(3, (8,))}
    return hf.BertForSequenceClassification(config), lambda model: model(**batch).loss


def gpt2(p):
    hf = transformers()
    config = hf.GPT2Config(
        vocab_size=50,
        n_positions=16,
        n_embd=16,
        n_layer=2,
        n_head=2,
        resid_pdrop=p,
        embd_pdrop=p,
        attn_pdrop=p,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation="eager",
    )
    tokens = torch.randint(50, (4, 10))
    model = hf.GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"  # unset, it is logged, which torch.compile cannot trace
    return model, lambda model: model(input_ids=tokens, labels=tokens).loss


class DropPath(nn.Module):
    """As everyone writes it, for the network below."""

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        if not self.training or self.p == 0:
            return x
        kept = torch.rand(x.shape[0], 1, 1, 1, device=x.device) >= self.p
        return x * kept / (1 - self.p)


class Block(nn.Module):
    def __init__(self, width, p):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Dropout2d(p),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.path = DropPath(p)

    def forward(self, x):
        return F.relu(x + self.path(self.body(x)))


class ResNet(nn.Module):
    def __init__(self, p, width=8):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        )
        self.blocks = nn.ModuleList([Block(width, p) for _ in range(2)])
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.ModuleDict({"drop": nn.Dropout(p, inplace=True), "linear": nn.Linear(width, 5)})

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head["linear"](self.head["drop"](torch.flatten(self.pool(x), 1)))


def with_loss(model, x, target, **options):
    loss = nn.CrossEntropyLoss(**options)
    return model, lambda model: loss(model(x), target)


def resnet(p):
    return with_loss(ResNet(p), torch.randn(8, 3, 8, 8), torch.randint(5, (8,)), label_smoothing=0.1)


def encoder(p):
    layer = nn.TransformerEncoderLayer(16, 2, 32, p, batch_first=True)
    layer.self_attn.dropout = 0.0  # that one stays torch's in compiled code
    model = nn.Sequential(
        nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), nn.Flatten(), nn.Linear(16 * 6, 4)
    )
    return with_loss(model, torch.randn(8, 6, 16), torch.randint(4, (8,)))


class Attention(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.attention, self.out = nn.MultiheadAttention(16, 2, p, batch_first=True), nn.Linear(16, 4)

    def forward(self, x):
        return self.out(self.attention(x, x, x, need_weights=True)[0]).transpose(1, 2)


def attention(p):
    return with_loss(Attention(p), torch.randn(8, 6, 16), torch.randint(4, (8, 6)))


def mlp(p):
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(p), nn.Linear(16, 4))
    return with_loss(model, torch.randn(8, 6), torch.randint(4, (8,)))


MODELS = [bert, gpt2, resnet, encoder, attention]
SMALL = [mlp, *MODELS]


def named(function):
    return function.__name__


def train(model, loss_of, steps, lr=0.1, autocast=False):
    """Anyone's training code; it knows nothing of fastreg. Gives the losses."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    losses = []
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = loss_of(model)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


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
        assert str(TORCH["dropout"]) in graph, graph
    graph = traced_targets(lambda v: F.dropout(v, 0.3), x)[1][0]
    assert graph == {str(TORCH["dropout"])}


class Functional(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.4, self.training) + 1


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
        assert ("fastreg::dropout" in seen) == need_weights  # without weights it is a kernel of torch's
        if need_weights:
            torch.manual_seed(7)
            torch.testing.assert_close(result, model(x, x, x)[0])
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


# --------------------------------------------------------------------------------------------------
# modes and parallelism


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


TWO_PROCESSES = """
import sys, torch, torch.distributed as dist, fastreg as fr
from torch import nn
torch.set_num_threads(1)
rank, store, door = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
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
    for step in range(30):
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
dist.all_gather(both, mine)
assert torch.equal(*both)
dist.barrier()  # or torch aborts a rank whose partner is gone
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
@pytest.mark.parametrize("door", ["patch", "convert"])
def test_ddp_of_two(tmp_path, door):
    command = [sys.executable, "-c", TWO_PROCESSES]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store"), door], stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    try:
        for rank in ranks:
            assert not rank.wait(timeout=300), rank.stderr.read()
    finally:
        for rank in ranks:
            rank.kill()
            rank.stderr.close()


# --------------------------------------------------------------------------------------------------
# convert


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
    eager = copy.deepcopy(model)
    torch.manual_seed(5)
    expected = train(eager, loss_of, 3, 0.02)
    torch.manual_seed(5)
    with ops_seen() as seen:
        result = train(model, torch.compile(loss_of, backend="aot_eager", fullgraph=True), 3, 0.02)
    assert "fastreg::dropout" in seen
    assert result == pytest.approx(expected, rel=1e-4)


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


class TestAttention:
    """scaled_dot_product_attention with dropout, which torch has in C++ alone."""

    @staticmethod
    def case(dtype=torch.float32, mask=None):
        g = torch.Generator().manual_seed(3)
        q, k, v = (
            torch.randn(2, 3, n, 8, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
            for n in (5, 7, 7)
        )
        masks = {
            "boolean": torch.rand(2, 1, 5, 7, generator=g) < 0.7,
            "additive": torch.randn(5, 7, generator=g).to(dtype),
            "of -inf": torch.zeros(5, 7)
            .masked_fill(torch.rand(5, 7, generator=g) < 0.3, -torch.inf)
            .to(dtype),
        }
        if mask == "boolean":
            masks[mask][0, 0, 2] = False  # a row without any key
        return (q, k, v), masks.get(mask)

    @pytest.mark.parametrize("mask", [None, "boolean", "additive", "of -inf", "causal"])
    @pytest.mark.parametrize("scale", [None, 0.3])
    def test_what_is_not_dropped_is_torchs(self, monkeypatch, dtype, mask, scale):
        (q, k, v), attn_mask = self.case(dtype, mask)
        options = dict(attn_mask=attn_mask, is_causal=mask == "causal", scale=scale)
        monkeypatch.setattr(_patch, "dropout", lambda input, p: input)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            want = NN.scaled_dot_product_attention(q, k, v, **options)
            with fr.patched():
                got = F.scaled_dot_product_attention(q, k, v, dropout_p=0.5, **options)
        assert got.dtype == dtype
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 1e-2)
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
        g = torch.randn_like(got)
        for a, b in zip(
            torch.autograd.grad(got, (q, k, v), g), torch.autograd.grad(want, (q, k, v), g), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)

    def test_dropout_is_fastregs(self):
        (q, k, v), _ = self.case()
        with fr.patched():
            torch.manual_seed(4)
            got = F.scaled_dot_product_attention(q, k, v, dropout_p=0.4)
        torch.manual_seed(4)
        weights = fr.dropout(torch.softmax(q @ k.transpose(-2, -1) / 8**0.5, -1), 0.4)
        torch.testing.assert_close(got, weights @ v)
        assert (weights == 0).any()

    def test_the_mean_is_torchs(self):
        q, k, v = (torch.randn(1, 1, 4, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
        with fr.patched():
            mean = sum(F.scaled_dot_product_attention(q, k, v, dropout_p=0.3) for _ in range(3000)) / 3000
        torch.testing.assert_close(mean, NN.scaled_dot_product_attention(q, k, v), rtol=0, atol=0.08)

    def test_autocast(self):
        (q, k, v), _ = self.case()
        with fr.patched(), torch.autocast("cpu", torch.bfloat16):
            got = F.scaled_dot_product_attention(q, k, v, dropout_p=0.4)
        assert got.dtype == torch.bfloat16

    def test_modules_of_torch_follow(self):
        layer = nn.TransformerEncoderLayer(16, 2, 32, 0.3, batch_first=True)
        x = torch.randn(8, 6, 16)
        with (
            torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile,
            fr.patched(),
        ):
            layer(x).sum().backward()
        assert not {event.key for event in profile.key_averages()} & TORCH_OPS

    def test_the_rest_goes_to_torch(self):
        (q, k, v), mask = self.case(mask="boolean")
        for arguments, options in (
            ((q, k, v), {}),
            ((q, k, v, mask), dict(dropout_p=0.0)),
            ((q.expand(2, 3, 5, 8), k[:, :1], v[:, :1]), dict(dropout_p=0.2, enable_gqa=True)),
            ((q.to("meta"), k.to("meta"), v.to("meta")), dict(dropout_p=0.2)),
            ((q, k, v), dict(dropout_p=0.2, scale=-0.3)),
            ((q[..., :0], k[..., :0], v), dict(dropout_p=0.2)),
        ):
            torch.manual_seed(5)
            want = NN.scaled_dot_product_attention(*arguments, **options)
            with fr.patched():
                torch.manual_seed(5)
                got = F.scaled_dot_product_attention(*arguments, **options)
            assert got.device == want.device and (got.is_meta or torch.equal(got, want))
        with fr.patched(), pytest.raises(RuntimeError):
            F.scaled_dot_product_attention(q, k, v, mask, 0.2, True)  # a mask and causal at once
        for wrong, words in (
            ((q.bfloat16(), k, v), "same dtype"),
            ((q, k, v, torch.zeros(5, 7, dtype=torch.float64)), "attn_mask dtype"),
        ):
            with fr.patched(), pytest.raises(RuntimeError, match=words):
                F.scaled_dot_product_attention(*wrong, dropout_p=0.2)

    def test_compiled_and_scripted_code_has_torchs(self):
        (q, k, v), _ = self.case()

        def f(q, k, v):
            return F.scaled_dot_product_attention(q, k, v, None, 0.2)

        with fr.patched():
            assert torch.compile(f, backend="aot_eager", fullgraph=True)(q, k, v).shape == q.shape
            scripted = torch.jit.script(attention_to_script)
            traced = torch.fx.symbolic_trace(f)
        assert "aten::scaled_dot_product_attention" in str(scripted.graph)
        assert {node.target for node in traced.graph.nodes if node.op == "call_function"} == {
            NN.scaled_dot_product_attention
        }
        torch._dynamo.reset()
        assert F.scaled_dot_product_attention is NN.scaled_dot_product_attention


def attention_to_script(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, None, 0.2)


class TestOtherLibraries:
    """Run where the library is beside this torch; torchvision and timm exist for other torch versions than
    the tests' own.
    """

    reason = "torchvision and timm need the torch that torchvision was built for"

    def import_or_skip(self, name):
        try:
            return pytest.importorskip(name, reason=self.reason, exc_type=ImportError)
        except (
            RuntimeError
        ) as error:  # torchvision beside another torch: "operator torchvision::nms does not exist"
            pytest.skip(f"{self.reason}: {error}")

    def test_stochastic_depth_of_torchvision(self):
        ops = self.import_or_skip("torchvision.ops")
        row, batch = ops.StochasticDepth(0.4, "row").eval(), ops.StochasticDepth(0.4, "batch")
        calls = []
        row.register_forward_hook(lambda *_: calls.append(1))
        model = nn.ModuleDict({"a": row, "b": row, "c": batch})
        fr.convert(model)
        assert (
            model["a"] is model["b"] is row
            and type(row) is fr.nn.DropPath
            and row.p == 0.4
            and not row.training
        )
        assert type(batch) is ops.StochasticDepth
        x = torch.ones(2000, 3)
        assert torch.equal(row(x), x) and calls
        y = row.train()(x)
        assert y.unique().tolist() == pytest.approx([0, 1 / 0.6])
        assert abs((y[:, 0] == 0).float().mean() - 0.4) < 0.06
        assert fr.convert(ops.StochasticDepth(0.4, "row"))(x).shape == x.shape
        assert repr(row) == "DropPath(p=0.4, scale_by_keep=True)"

    def test_drop_path_of_timm(self):
        self.import_or_skip("torchvision")
        drop_path = self.import_or_skip("timm.layers").DropPath
        model = nn.Sequential(
            drop_path(0.4, scale_by_keep=False), nn.Sequential(drop_path(0.0)), drop_path(0.2)
        )
        before = list(model.modules())
        fr.convert(model)
        assert all(a is b for a, b in zip(before, model.modules(), strict=True))
        assert [m.p for m in model.modules() if isinstance(m, fr.nn.DropPath)] == [0.4, 0.0, 0.2]
        y = model[0].train()(torch.ones(2000, 3))
        assert set(y.unique().tolist()) == {0.0, 1.0} and abs((y[:, 0] == 0).float().mean() - 0.4) < 0.06
        root = drop_path(0.3)
        assert fr.convert(root) is root and type(root) is fr.nn.DropPath
        assert type(pickle.loads(pickle.dumps(root))) is fr.nn.DropPath

    @pytest.mark.slow
    @pytest.mark.parametrize("door", ["patched", "convert", "compile"])
    @pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "efficientnet_b0", "convnext_atto"])
    def test_models_of_timm(self, name, door):
        self.import_or_skip("torchvision")
        timm = self.import_or_skip("timm")
        size = {"img_size": 32} if name.startswith("vit") else {}
        model = timm.create_model(name, num_classes=5, drop_rate=0.2, drop_path_rate=0.2, **size)
        self.run(model, door)

    @pytest.mark.slow
    @pytest.mark.parametrize("door", ["patched", "convert", "compile"])
    @pytest.mark.parametrize("name", ["efficientnet_b0", "mobilenet_v3_small"])
    def test_models_of_torchvision(self, name, door):
        models = self.import_or_skip("torchvision.models")
        self.run(getattr(models, name)(num_classes=5), door)

    def run(self, model, door):
        _, loss_of = with_loss(model, torch.randn(4, 3, 32, 32), torch.randint(5, (4,)), label_smoothing=0.1)
        context = fr.patched()
        if door == "convert":
            context = contextlib.nullcontext()
            model = nn.ModuleDict({"model": model, "loss": nn.CrossEntropyLoss()})
            keys = list(model.state_dict())
            fr.convert(model)
            assert list(model.state_dict()) == keys
            model = model["model"]
        if door == "compile":
            loss_of = torch.compile(loss_of, backend="aot_eager", fullgraph=True)
        with context, ops_seen() as seen:
            losses = train(model, loss_of, 2, 0.001)
        assert "fastreg::dropout" in seen
        if door != "convert":  # which does not reach functions that a model calls itself
            assert "fastreg::cross_entropy" in seen and not seen & TORCH_OPS
        assert all(map(torch.isfinite, map(torch.tensor, losses)))


# --------------------------------------------------------------------------------------------------
# a whole script


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
