"""The doors for code that knows only torch, `patch`, `unpatch`, `patched` and `convert`: whole models, every
mode of torch.

Which operator ran is read from torch's profiler, so that eager, compiled and recomputed code are seen alike.
"""

import contextlib
import functools
import gc
import inspect
import pickle
import sys
import threading
import time
import types
import warnings

import numpy
import pytest
import torch
import torch.nn.functional as F
from patch_cases import (
    DROPOUTS,
    INDICES,
    LOSSES,
    NAMES,
    NN,
    TORCH,
    TORCH_OPS,
    Functional,
    arguments,
    is_patched,
    modules_and_inputs,
    nothing_is_patched,
    ops_seen,
    uses_fastreg,
)
from torch import nn

import fastreg as fr
from fastreg import _patch
from fastreg._exchange import ExchangedName


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
    assert all(map(is_patched, NAMES))
    now = globals_of_all_modules()
    changed = {
        (module, name)
        for module in before
        for name, value in before[module].items()
        if now[module].get(name) is not value and not module.startswith("fastreg")
    }
    assert ("torch.nn.functional", "scaled_dot_product_attention") in changed
    for module, name in changed:
        assert before[module][name] is NN.scaled_dot_product_attention, f"{module}.{name} is not patched"
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
    assert nothing_is_patched()


def test_nothing_in_torch_keeps_a_replacement():
    """torch holds functions in tables that are filled when they are first read; none may be filled with our
    attention.
    """
    with fr.patched():
        replacement = F.scaled_dot_product_attention
        torch.overrides.get_testing_overrides()
        torch.overrides.get_overridable_functions()
        torch.overrides.resolve_name(F.dropout)
        layer = nn.TransformerEncoderLayer(8, 2, 16, 0.1, batch_first=True)
        torch.compile(layer, backend="aot_eager", fullgraph=True)(torch.randn(2, 3, 8)).sum().backward()
        torch.jit.script(nn.Dropout(0.5))
        torch.fx.symbolic_trace(nn.Sequential(Functional(), nn.Dropout(0.5)))
    torch._dynamo.reset()
    gc.unfreeze()  # what is frozen is not among the referrers
    gc.collect()
    allowed = {id(holder) for holder in (vars(_patch), torch.jit._builtins._builtin_table)}
    for holder in gc.get_referrers(replacement):
        if isinstance(holder, (dict, list, set)):
            assert id(holder) in allowed, f"kept in a {type(holder).__name__} of {len(holder)}"


@pytest.mark.usefixtures("temporary_modules")
def test_a_block_costs_little_where_nothing_was_imported():
    """It may stand around each step of a training."""
    with fr.patched():
        pass
    times = []
    for _ in range(200):
        begin = time.thread_time()  # not what others do on this machine
        with fr.patched():
            pass
        times.append(time.thread_time() - begin)
    assert min(times) < 1e-4


class Holder(nn.Module):
    def __init__(self):
        super().__init__()
        self.loss = F.cross_entropy


def test_pickles_go_across_a_patch():
    made_before = Holder()
    with fr.patched():
        assert pickle.loads(pickle.dumps(made_before)).loss is F.cross_entropy
        made_while_patched = pickle.dumps(Holder())
    assert pickle.loads(made_while_patched).loss is TORCH["cross_entropy"]


class NoDropout(torch.overrides.TorchFunctionMode):
    """Turns dropout off, by the function that it knew before, or as it finds it now."""

    known = frozenset({F.dropout})

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in self.known:
            assert function is F.dropout
            return args[0]
        return function(*args, **kwargs or {})


def test_a_mode_sees_torchs_function():
    x = torch.ones(64)
    with fr.patched(), NoDropout():
        assert torch.equal(F.dropout(x), x) and torch.equal(nn.Dropout(0.5)(x), x)
    with fr.patched(), torch.overrides.BaseTorchFunctionMode():
        assert uses_fastreg(lambda: F.dropout(x))


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
            assert module.dropout is F.dropout and module.ce is F.cross_entropy
            assert uses_fastreg(lambda: module.dropout(torch.ones(8)))
        assert not uses_fastreg(lambda: module.dropout(torch.ones(8)))

    def test_a_name_imported_while_patched(self):
        with fr.patched():
            module = module_with(self.code)
            assert uses_fastreg(lambda: module.dropout(torch.ones(8)))
        assert module.dropout is TORCH["dropout"] and module.ce is TORCH["cross_entropy"]

    def test_attention_is_exchanged_among_the_globals_of_modules(self):
        code = "from torch.nn.functional import scaled_dot_product_attention as attention"
        before, unloaded = module_with(code), module_with(code, "module_made_by_a_test_to_be_unloaded")
        with fr.patched():
            while_patched = module_with(code, "module_made_by_a_test_while_patched")
            assert before.attention is while_patched.attention is F.scaled_dot_product_attention
            assert F.scaled_dot_product_attention is not NN.scaled_dot_product_attention
            del sys.modules[unloaded.__name__]
        for module in (before, while_patched, unloaded):
            assert module.attention is NN.scaled_dot_product_attention

    def test_what_was_kept_before_is_patched(self):
        """In a partial, a table, an attribute, a default argument: torch's function is the same function."""
        half, table = functools.partial(F.dropout, p=0.5), {"dropout": F.dropout}

        def later(x, dropout=F.dropout):
            return dropout(x)

        with fr.patched():
            for function in (half, table["dropout"], later):
                assert uses_fastreg(lambda f=function: f(torch.ones(8)))

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
            assert is_patched()


def test_patching_twice_and_unpatching_twice():
    fr.patch()
    first = F.dropout.__code__
    fr.patch()
    assert F.dropout.__code__ is first
    fr.unpatch()
    assert not is_patched()
    fr.unpatch()
    assert not is_patched()
    fr.patch()
    assert F.dropout.__code__ is first


def test_unpatch_without_patch():
    fr.unpatch()
    assert nothing_is_patched()


def test_nested_blocks():
    with fr.patched():
        with fr.patched():
            assert is_patched()
        assert is_patched(), "the inner block ended the outer one"
    assert not is_patched()


def test_block_inside_a_patch_of_the_process():
    fr.patch()
    with fr.patched():
        pass
    assert is_patched()
    fr.unpatch()
    assert not is_patched()


def test_exception_inside_the_block():
    with pytest.raises(ZeroDivisionError), fr.patched():
        raise ZeroDivisionError
    assert nothing_is_patched()


def test_unpatch_inside_the_block():
    with fr.patched():
        fr.unpatch()
        assert not is_patched()
    assert not is_patched()


def test_as_a_decorator():
    @fr.patched()
    def run():
        return is_patched()

    assert run() and run()
    assert not is_patched()


def test_what_runs_after_its_call_is_not_decorated():
    """The block would end before the first line of it runs."""

    def generator():
        yield is_patched()

    async def coroutine():
        return is_patched()

    async def generated_later():
        yield is_patched()

    for function in (generator, coroutine, generated_later):
        with pytest.raises(TypeError, match=r"put `with fastreg.patched\(\):` into its body"):
            fr.patched()(function)


def test_one_block_may_be_entered_again():
    block = fr.patched()
    with block:
        with block:
            assert is_patched()
        assert is_patched()
    assert nothing_is_patched()
    with block:
        assert is_patched()
    assert nothing_is_patched()


def test_modules_are_searched_where_there_are_new_ones(monkeypatch):
    """A search takes milliseconds, entering and leaving without one less than 0.1 ms."""
    searches, search = [], ExchangedName._search
    monkeypatch.setattr(ExchangedName, "_search", lambda self: searches.append(1) or search(self))
    with fr.patched():
        pass
    searches.clear()
    for _ in range(3):
        with fr.patched():
            assert is_patched()
    assert not searches
    monkeypatch.setitem(sys.modules, "a_module_that_is_new", types.ModuleType("a_module_that_is_new"))
    sys.modules["a_module_that_is_new"].attention = F.scaled_dot_product_attention
    with fr.patched():
        assert sys.modules["a_module_that_is_new"].attention is F.scaled_dot_product_attention
    assert searches


def test_threads_that_enter_and_leave_at_the_same_time_find_a_whole_state():
    """Each within its block calls fastreg, and after the last of them nothing is patched."""
    torchs, wrong = F.dropout.__code__, []

    def enter_and_leave():
        for _ in range(500):
            with fr.patched():
                if not is_patched() or F.dropout.__code__ is torchs:
                    wrong.append("torch's")
        wrong.append(None)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads change in the middle of everything
    try:
        threads = [threading.Thread(target=enter_and_leave) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert wrong == [None] * 4
    assert nothing_is_patched()


def test_blocks_of_two_threads_may_end_in_any_order():
    entered, leave, results = threading.Event(), threading.Event(), []

    def other():
        with fr.patched():
            entered.set()
            leave.wait(30)
            results.append(is_patched())

    thread = threading.Thread(target=other)
    with fr.patched():
        thread.start()
        assert entered.wait(30)
    leave.set()
    thread.join()
    assert results == [True], "the first thread's end took the patch from the second"
    assert not is_patched()


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


@pytest.mark.parametrize("name", NAMES)
def test_functions_reach_fastreg(name, dtype):
    op = f"fastreg::{name if name in LOSSES else 'dropout'}"
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
