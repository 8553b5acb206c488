"""What other programs do with a converted model is what they do with torch's."""

import copy
import io
import pickle
from operator import getitem

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import DTYPES, run_python, with_seed
from patch_cases import ops_seen
from torch import nn
from torch.overrides import TorchFunctionMode

import fastreg as fr

pytestmark = pytest.mark.filterwarnings("ignore")
MODULES = ("Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "AlphaDropout", "FeatureAlphaDropout")
INPUTS = dict(
    zip(MODULES, ((4, 5), (2, 4, 5), (2, 4, 5, 5), (2, 4, 3, 5, 5), (4, 5), (2, 4, 5)), strict=True)
)


class WithLoss(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.drop = nn.Linear(4, 4), nn.Dropout(0.5)
        self.loss = nn.CrossEntropyLoss(torch.ones(4), label_smoothing=0.1)

    def forward(self, x, y):
        return self.loss(self.drop(self.linear(x)), y)


X, Y = torch.randn(3, 4), torch.tensor([0, 1, 3])
# {function: (a call of it, its arguments)}
CALLS = {
    "dropout": (lambda x: fr.dropout(x, 0.3), X),
    "dropout1d": (lambda x: fr.dropout1d(x, 0.3), X),
    "dropout2d": (lambda x: fr.dropout2d(x, 0.3), torch.ones(2, 3, 4, 5)),
    "dropout3d": (lambda x: fr.dropout3d(x, 0.3), torch.ones(2, 3, 4, 5)),
    "alpha_dropout": (lambda x: fr.alpha_dropout(x, 0.3, training=True), X),
    "feature_alpha_dropout": (lambda x: fr.feature_alpha_dropout(x, training=True), X),
    "drop_path": (lambda x: fr.drop_path(x, 0.3, scale_by_keep=False), X),
    "dropout_with_mask": (lambda x: fr.dropout_with_mask(x, 0.3, seed=5)[0], X),
    "dropout_add": (lambda x, bias: fr.dropout_add(x, X, 0.3, bias), X, X[0]),
    "cross_entropy": (lambda x, y: fr.cross_entropy(x, y, label_smoothing=0.1), X, Y),
    "linear_cross_entropy": (lambda x, w, y: fr.linear_cross_entropy(x, w, y, z_loss=0.1), X, X.t() @ X, Y),
    "scaled_dot_product_attention": (
        lambda x: fr.scaled_dot_product_attention(x, x, x, dropout_p=0.3, is_causal=True),
        X,
    ),
    "pseudo_label_loss": (lambda x: fr.pseudo_label_loss(x, threshold=0.2), X),
    "rotate": (lambda x: fr.augment.functional.rotate(x, 13.0), torch.rand(2, 3, 4, 5)),
}


class TestFx:
    def test_modules_are_leaves(self):
        model = nn.Sequential(nn.Linear(4, 4), *(getattr(nn, name)() for name in MODULES), nn.ReLU())
        nodes = [[(n.op, n.target) for n in torch.fx.symbolic_trace(model).graph.nodes]]
        nodes.append([(n.op, n.target) for n in torch.fx.symbolic_trace(fr.convert(model)).graph.nodes])
        assert nodes[0] == nodes[1] and len(nodes[0]) == len(model) + 2

    def test_mode_may_change_after_tracing(self):
        traced = torch.fx.symbolic_trace(fr.convert(WithLoss()))
        assert type(traced.drop) is fr.nn.Dropout and type(traced.loss) is fr.nn.CrossEntropyLoss
        a, b = (traced.eval()(X, Y) for _ in range(2))
        c, d = (traced.train()(X, Y) for _ in range(2))
        assert a == b and len({a.item(), c.item(), d.item()}) == 3

    def test_modules_without_a_namesake(self):
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.path, self.add = fr.nn.DropPath(0.5), fr.nn.DropoutAdd(0.5)

            def forward(self, x):
                return self.add(self.path(x), x)

        targets = [n.target for n in torch.fx.symbolic_trace(Net()).graph.nodes if n.op == "call_module"]
        assert targets == ["path", "add"]

    def test_feature_extractor_of_torchvision(self):
        vision = pytest.importorskip("torchvision", reason="needs torchvision", exc_type=ImportError)
        from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

        model = vision.models.mobilenet_v3_small(num_classes=3)
        names = get_graph_node_names(model)
        assert get_graph_node_names(fr.convert(model)) == names
        extractor = create_feature_extractor(model, ["classifier.2"])
        assert extractor(torch.ones(2, 3, 32, 32))["classifier.2"].shape == (2, 1024)

    @pytest.mark.parametrize("name", CALLS)
    def test_a_function_by_name_is_one_node(self, name):
        call, *inputs = CALLS[name]
        traced = torch.fx.symbolic_trace(call)
        (node,) = (n for n in traced.graph.nodes if n.op == "call_function" and n.target is not getitem)
        assert node.target is getattr(fr, name, None) or name == "rotate"
        assert torch.equal(*(with_seed(3, function, *inputs) for function in (traced, call)))

    def test_augmentation_is_a_leaf(self):
        traced = torch.fx.symbolic_trace(nn.Sequential(fr.augment.Augment(rotate=10), nn.Flatten()))
        assert [n.op for n in traced.graph.nodes].count("call_module") == 2
        assert traced(torch.rand(2, 3, 4, 4)).shape == (2, 48)


@pytest.mark.skipif(not hasattr(torch.jit, "script"), reason="this torch has no torch.jit.script")
class TestScript:
    def run(self, model, *inputs):
        buffer = io.BytesIO()
        torch.jit.save(torch.jit.script(model), buffer)
        buffer.seek(0)
        return torch.jit.load(buffer)(*inputs)

    @pytest.mark.parametrize("name", MODULES)
    def test_dropout(self, name):
        x = torch.ones(INPUTS[name])
        outputs = []
        for change in (lambda module: module, fr.convert):
            torch.manual_seed(0)
            outputs.append(self.run(change(getattr(nn, name)(0.5)), x))
            assert torch.equal(self.run(change(getattr(nn, name)(0.5)).eval(), x), x)
        assert torch.equal(*outputs) and not torch.equal(outputs[0], x)

    def test_loss(self):
        model = fr.convert(WithLoss().eval())
        torch.testing.assert_close(self.run(model, X, Y), model(X, Y))

    def test_what_torch_does_not_know_is_an_error(self):
        with pytest.raises(Exception, match="does not know rescale"):
            torch.jit.script(fr.nn.Dropout(0.5, rescale="inference"))(X)
        for option in (dict(smoothing="others"), dict(z_loss=0.1), dict(loss_dtype=torch.float64)):
            with pytest.raises(Exception, match="only torch's arguments"):
                torch.jit.script(fr.nn.CrossEntropyLoss(**option))(X, Y)

    def test_stochastic_depth(self):
        x = torch.ones(400, 2)
        modules = [(fr.nn.DropPath(0.5), 2.0), (fr.nn.DropPath(0.5, scale_by_keep=False), 1.0)]
        layers = pytest.importorskip("timm.layers", reason="needs timm", exc_type=ImportError)
        modules.append((fr.convert(layers.DropPath(0.5)), 2.0))
        for module, kept in modules:
            assert self.run(module, x).unique().tolist() == [0.0, kept]
            assert torch.equal(self.run(module.eval(), x), x)

    def test_trace(self):
        model = fr.convert(WithLoss())
        traced = torch.jit.trace(model, (X, Y), check_trace=False)
        traced(X, Y).backward()
        assert model.linear.weight.grad.abs().sum() > 0


class Dropless(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return args[0] if function is F.dropout else function(*args, **(kwargs or {}))


def test_a_mode_sees_torchs_function():
    module, x = fr.convert(nn.Dropout(0.5)), torch.ones(1000)
    with Dropless():
        assert module(x) is x
    assert (module(x) == 0).any()


def test_a_subclass_sees_torchs_function():
    class Recorder(torch.Tensor):
        seen = []  # noqa: RUF012

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            cls.seen.append(function)
            return super().__torch_function__(function, types, args, kwargs or {})

    x = torch.ones(4, 4).as_subclass(Recorder)
    fr.convert(nn.Dropout(0.5))(x)
    fr.convert(nn.CrossEntropyLoss())(x, Y[:1].expand(4))
    assert F.dropout in Recorder.seen and F.cross_entropy in Recorder.seen


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_default_device_leaves_the_masks_ours(compiled):
    module = fr.convert(nn.Sequential(nn.Dropout(0.5)))
    run = torch.compile(module, backend="aot_eager", fullgraph=True) if compiled else module
    with torch.device("cpu"), ops_seen() as seen:
        run(torch.ones(8))
    assert "fastreg::dropout" in seen


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        model = fr.convert(WithLoss())
        loss = model(torch.randn(3, 4), Y)
        loss.backward()
        assert loss.dtype == dtype == model.linear.weight.grad.dtype
    finally:
        torch.set_default_dtype(torch.float32)


def test_attributes_changed_later():
    drop, loss = fr.convert(nn.Dropout(0.5)), fr.convert(nn.CrossEntropyLoss())
    x = torch.ones(1000)
    drop.p = 0.0
    assert drop(x) is x
    drop.p, drop.inplace = torch.tensor(1.0), True
    assert drop(y := x.clone()) is y and not y.any()
    for change in (
        dict(reduction="none"),
        dict(label_smoothing=torch.tensor(0.3)),
        dict(ignore_index=np.int64(1)),
        dict(weight=torch.rand(4)),
        dict(reduction="sum"),
    ):
        for name, value in change.items():
            setattr(loss, name, value)
        options = {name: getattr(loss, name) for name in ("weight", "ignore_index", "label_smoothing")}
        torch.testing.assert_close(loss(X, Y), F.cross_entropy(X, Y, reduction=loss.reduction, **options))


class TestStochasticDepth:
    """`drop_prob` of timm and `p`, `mode` of torchvision are what schedules of others write to."""

    def test_of_timm(self):
        layers = pytest.importorskip("timm.layers", reason="needs timm", exc_type=ImportError)
        module = fr.convert(layers.DropPath(0.5))
        x = torch.ones(400, 2)
        for p, scale in ((0.0, True), (1.0, True), (0.25, True), (0.25, False), (None, True)):
            module.drop_prob, module.scale_by_keep = p, scale
            kept = 1 / (1 - 0.25) if scale else 1.0
            values = {None: [1.0], 0.0: [1.0], 1.0: [0.0], 0.25: [0.0, kept]}[p]
            assert module(x).unique().tolist() == pytest.approx(values) and module.p == (p or 0.0)
        for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            twin.drop_prob = 1.0
            assert not twin(x).any()

    def test_of_torchvision(self):
        ops = pytest.importorskip("torchvision.ops", reason="needs torchvision", exc_type=ImportError)
        module = fr.convert(ops.StochasticDepth(0.5, "row"))
        module.p = 1.0
        assert not module(torch.ones(5, 2)).any()
        module.p, module.mode = 0.5, "batch"
        drawn = {tuple(module(torch.ones(5, 2)).unique().tolist()) for _ in range(60)}
        assert drawn == {(0.0,), (2.0,)}


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loss_of_probabilities_has_the_promoted_dtype(dtype, reduction):
    x, q = torch.randn(5, 3), torch.rand(5, 3).softmax(1)
    for target, weight in ((t, w) for t in DTYPES for w in (None, *DTYPES)):
        given = None if weight is None else torch.tensor([1.0, 0.5, 2.0], dtype=weight)
        options = dict(weight=given, reduction=reduction, label_smoothing=0.1)
        arguments = x.to(dtype), q.to(target)
        for autocast in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                want = F.cross_entropy(*arguments, **options)
                got = [fr.cross_entropy(*arguments, **options), fr.nn.CrossEntropyLoss(**options)(*arguments)]
                got.append(fr.convert(nn.CrossEntropyLoss(**options))(*arguments))
                with fr.patched():
                    got.append(F.cross_entropy(*arguments, **options))
                eye = torch.eye(3, dtype=dtype)
                options["class_weight"] = options.pop("weight")
                got.append(fr.linear_cross_entropy(arguments[0], eye, arguments[1], **options))
                options["weight"] = options.pop("class_weight")
            exact = F.cross_entropy(
                arguments[0].double(), arguments[1].double(), reduction=reduction, label_smoothing=0.1,
                weight=None if given is None else given.double(),
            )  # fmt: skip
            for loss in got:
                assert loss.dtype == want.dtype, (target, weight, autocast)
                torch.testing.assert_close(loss.double(), exact, rtol=3e-2, atol=3e-2)


class TestErrorsAreOfBothTypes:
    @pytest.mark.parametrize(
        "call",
        [
            lambda: fr.cross_entropy(X, torch.tensor([0, 4, 1])),
            lambda: fr.cross_entropy(X.requires_grad_(), torch.tensor([0, -1, 1])),
            lambda: fr.nn.CrossEntropyLoss()(X.detach(), torch.tensor([0, 4, 1])),
            lambda: fr.linear_cross_entropy(X.detach(), torch.eye(4), torch.tensor([0, 4, 1])),
            lambda: torch.func.grad(fr.cross_entropy)(X.detach(), torch.tensor([0, 4, 1])),
        ],
    )
    def test_class_out_of_range(self, call):
        for kind in (ValueError, IndexError):
            with pytest.raises(
                kind, match=r"cross_entropy: target must be in \[0, 4\) .* got (4|-1) at element"
            ):
                call()

    @pytest.mark.parametrize(
        ("call", "kinds"),
        [
            (lambda: fr.cross_entropy(X, torch.zeros(3, 4).long()), (ValueError, RuntimeError)),
            (lambda: fr.cross_entropy(X, Y > 0), (TypeError, RuntimeError)),
            (lambda: fr.cross_entropy(X, Y, label_smoothing=2.0), (ValueError, RuntimeError)),
            (lambda: fr.dropout(torch.ones(3, requires_grad=True), inplace=True), (ValueError, RuntimeError)),
            (lambda: fr.dropout(torch.ones(1).expand(3), inplace=True), (ValueError, RuntimeError)),
            (lambda: fr.dropout(torch.ones(3).long()), (ValueError, NotImplementedError)),
            (lambda: fr.dropout(torch.eye(3).to_sparse()), (ValueError, NotImplementedError)),
            (lambda: fr.dropout1d(torch.ones(3)), (ValueError, RuntimeError)),
            (lambda: fr.dropout2d(torch.ones(3)), (ValueError, RuntimeError)),
        ],
    )
    def test_of_torch(self, call, kinds):
        for kind in kinds:
            with pytest.raises(kind, match=r"^(cross_entropy|dropout|dropout1d|dropout2d): .*(must|cannot) "):
                call()

    def test_they_travel(self):
        with pytest.raises(IndexError) as caught:
            fr.cross_entropy(X, torch.tensor([0, 4, 1]))
        twin = pickle.loads(pickle.dumps(caught.value))
        assert type(twin) is type(caught.value) and twin.args == caught.value.args


def test_a_refusal_counts_dimensions():
    with pytest.raises(ValueError, match=r"dropout2d: input must be at least 2-D, got 1-D of shape \(3,\)"):
        fr.dropout2d(torch.ones(3))


def test_every_module_is_reloaded():
    """As autoreload of a notebook does; operators, which torch registers once, are left as they are."""
    run_python(
        """
import importlib, sys, warnings, torch
import fastreg as fr
warnings.simplefilter("error")
compiled = ("_C", "_autograd_")
for name in sorted(n for n in sys.modules if n.startswith("fastreg")):
    if not name.split(".")[-1].startswith(compiled):
        importlib.reload(sys.modules[name])
x = torch.ones(4, 1000, requires_grad=True)
fr.cross_entropy(fr.dropout(x), torch.tensor([0, 1, 2, 0])).backward()
assert x.grad.any() and (sys.modules["fastreg._dropout"].dropout(x) == 0).any()
assert fr.optim.SGD([x], lr=1.0).step() is None
with fr.patched():
    assert (torch.nn.functional.dropout(x) == 0).any()
""",
        check=True,
    )
