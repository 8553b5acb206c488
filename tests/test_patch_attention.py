"""fr.patch() under scaled_dot_product_attention, and under other libraries' models."""

import contextlib
import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from patch_cases import NN, TORCH_OPS, ops_seen, train, with_loss
from torch import nn

import fastreg as fr


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
    def test_what_is_not_dropped_is_torchs(self, dtype, mask, scale):
        (q, k, v), attn_mask = self.case(dtype, mask)
        options = dict(attn_mask=attn_mask, is_causal=mask == "causal", scale=scale)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            want = NN.scaled_dot_product_attention(q, k, v, **options)
            with fr.patched():
                got = F.scaled_dot_product_attention(q, k, v, dropout_p=1e-12, **options)  # drops nothing
        assert got.dtype == dtype
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 1e-2)
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
        g = torch.randn_like(got)
        for a, b in zip(
            torch.autograd.grad(got, (q, k, v), g), torch.autograd.grad(want, (q, k, v), g), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)

    def test_it_is_no_method_of_a_class_that_holds_it(self):
        (q, k, v), _ = self.case()
        want = NN.scaled_dot_product_attention(q, k, v)
        with fr.patched():
            held = F.scaled_dot_product_attention

            class Layer(nn.Module):
                attend = F.scaled_dot_product_attention

            assert repr(held) == repr(NN.scaled_dot_product_attention)
            torch.testing.assert_close(Layer().attend(q, k, v), want)
            assert Layer().attend(q, k, v, dropout_p=0.9).ne(want).any()
        torch.testing.assert_close(Layer().attend(q, k, v), want)

    def test_what_holds_it_is_pickled_and_copied(self):
        def saved_and_loaded(model):
            file = io.BytesIO()
            torch.save(model, file)
            file.seek(0)
            return torch.load(file, weights_only=False).attend

        model, (original, (q, k, v)) = nn.Module(), (NN.scaled_dot_product_attention, self.case()[0])
        with fr.patched():
            model.attend = F.scaled_dot_product_attention
            assert saved_and_loaded(model) is original
            assert copy.deepcopy(model).attend is copy.copy(model.attend) is F.scaled_dot_product_attention
        for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
            assert pickle.loads(pickle.dumps(model.attend, protocol)) is original
        assert saved_and_loaded(model) is original
        torch.testing.assert_close(model.attend(q, k, v), original(q, k, v))

    @pytest.mark.parametrize("backend", ["eager", "aot_eager"])
    def test_held_and_compiled(self, backend):
        (q, k, v), _ = self.case()
        with fr.patched():
            model = nn.Module()
            model.attend = F.scaled_dot_product_attention
            run = torch.compile(lambda: model.attend(q, k, v, dropout_p=0.4), backend=backend, fullgraph=True)
            torch.manual_seed(4)
            got = run()
            torch.manual_seed(4)
            torch.testing.assert_close(got, model.attend(q, k, v, dropout_p=0.4))

    def test_dropout_is_fastregs(self):
        (q, k, v), _ = self.case()
        with fr.patched():
            torch.manual_seed(4)
            got = F.scaled_dot_product_attention(q, k, v, dropout_p=0.4)
        torch.manual_seed(4)
        weights = fr.dropout(torch.softmax(q @ k.transpose(-2, -1) / 8**0.5, -1), 0.4)
        torch.testing.assert_close(got, weights @ v)
        assert (weights == 0).any()
        torch.manual_seed(4)
        assert torch.equal(got, fr.scaled_dot_product_attention(q, k, v, dropout_p=0.4))

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

    def test_heads_are_shared(self):
        (q, k, v), mask = self.case(mask="boolean")
        with fr.patched(), ops_seen() as seen:
            got = F.scaled_dot_product_attention(
                q, k[:, :1], v[:, :1], mask, dropout_p=1e-12, scale=-0.3, enable_gqa=True
            )
        assert "fastreg::attention_weights_" in seen and not seen & TORCH_OPS
        want = NN.scaled_dot_product_attention(q, k[:, :1], v[:, :1], mask, scale=-0.3, enable_gqa=True)
        torch.testing.assert_close(got, want)

    def test_the_rest_goes_to_torch(self):
        (q, k, v), mask = self.case(mask="boolean")
        for arguments, options in (
            ((q, k, v), {}),
            ((q, k, v, mask), dict(dropout_p=0.0)),
            ((q, k, v), dict(dropout_p=0.2, scale=float("nan"))),
            ((q.to("meta"), k.to("meta"), v.to("meta")), dict(dropout_p=0.2)),
        ):
            torch.manual_seed(5)
            want = NN.scaled_dot_product_attention(*arguments, **options)
            with fr.patched(), ops_seen() as seen:
                torch.manual_seed(5)
                got = F.scaled_dot_product_attention(*arguments, **options)
            assert not any(name.startswith("fastreg::") for name in seen)
            assert got.device == want.device
            assert got.is_meta or torch.equal(got.nan_to_num(), want.nan_to_num())
        flash = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION)
        with flash, fr.patched(), pytest.raises(RuntimeError):
            F.scaled_dot_product_attention(q, k, v, dropout_p=0.2)  # torch's has no dropout on a CPU

    def test_what_torch_refuses_has_torchs_exception(self):
        (q, k, v), mask = self.case(mask="boolean")
        wide, bad = torch.zeros(5, 7, dtype=torch.float64), torch.zeros(4, 7)
        for wrong, options in (
            ((q, k, v, mask, 0.2, True), {}),  # a mask and causal at once
            ((q.bfloat16(), k, v), {}),
            ((q, k, v, wide), {}),
            ((q, k, v, bad), {}),
            ((q, k, v, mask.long()), {}),
            ((q, k[..., :3], v), {}),
            ((q, k, v[:, :, :3]), {}),
            ((q, k[:, :2], v[:, :2]), {}),
            ((q, k[:, :2], v[:, :2]), dict(enable_gqa=True)),
            ((q[0, 0], k[0, 0], v[0, 0]), dict(enable_gqa=True)),
            ((q[0, 0, 0], k, v), {}),
            ((q, k, v), dict(dropout_p=1.5)),
            ((q, k, v), dict(dropout_p=-0.2)),
            ((q, k, v), dict(dropout_p="0.2")),
            ((q, k, v), dict(is_causal=1)),
            ((q, k, v), dict(scale="0.2")),
            (([q], k, v), {}),
            ((q.int(), k.int(), v.int()), {}),
        ):
            options = options if len(wrong) > 4 else {"dropout_p": 0.2, **options}
            with pytest.raises(Exception) as theirs:
                NN.scaled_dot_product_attention(*wrong, **options)
            with fr.patched(), pytest.raises(theirs.type):
                F.scaled_dot_product_attention(*wrong, **options)

    def test_compiled_code_has_ours(self):
        (q, k, v), _ = self.case()

        def f(q, k, v):
            return F.scaled_dot_product_attention(q, k, v, None, 0.2)

        torch._dynamo.reset()
        with fr.patched():
            run = torch.compile(f, backend="aot_eager", fullgraph=True)
            with ops_seen() as seen:
                torch.manual_seed(4)
                got = run(q, k, v)
            assert "fastreg::attention" in seen
        torch.manual_seed(4)
        torch.testing.assert_close(got, fr.scaled_dot_product_attention(q, k, v, dropout_p=0.2))
        with ops_seen() as seen:  # compiled anew
            run(q, k, v)
        assert "fastreg::attention" not in seen
        torch._dynamo.reset()

    def test_scripted_and_traced_code_has_torchs(self):
        def f(q, k, v):
            return F.scaled_dot_product_attention(q, k, v, None, 0.2)

        with fr.patched():
            scripted = torch.jit.script(attention_to_script)
            traced = torch.fx.symbolic_trace(f)
        assert "aten::scaled_dot_product_attention" in str(scripted.graph)
        assert {node.target for node in traced.graph.nodes if node.op == "call_function"} == {
            NN.scaled_dot_product_attention
        }
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
        if door == "compile":  # the same blocks, few of each, which takes half a minute less
            name = f"test_{name.split('_')[0]}"
        size = {"img_size": 32} if "vit" in name else {}
        model = timm.create_model(name, num_classes=5, drop_rate=0.2, drop_path_rate=0.2, **size)
        self.run(model, door)

    @pytest.mark.slow
    @pytest.mark.parametrize("door", ["patched", "convert", "compile"])
    @pytest.mark.parametrize("name", ["efficientnet_b0", "mobilenet_v3_small"])
    def test_models_of_torchvision(self, name, door):
        models = self.import_or_skip("torchvision.models")
        if door != "compile":
            model = getattr(models, name)(num_classes=5)
        elif name == "efficientnet_b0":  # the same blocks, few of each, as above
            blocks = [(1, 3, 1, 32, 16, 1), (6, 5, 2, 16, 24, 2)]
            module = models.efficientnet
            model = module.EfficientNet([module.MBConvConfig(*each) for each in blocks], 0.2, num_classes=5)
        else:
            blocks = [(16, 3, 16, 16, True, "RE", 2, 1, 1), (16, 5, 96, 40, True, "HS", 2, 1, 1)]
            module = models.mobilenetv3
            model = module.MobileNetV3([module.InvertedResidualConfig(*each) for each in blocks], 64, 5)
        self.run(model, door)

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
