"""AdamW under scalers and compilers, its rounding, its errors, and on several processes."""

import copy
import math
import re

import pytest
import torch
from helpers import same_values
from optimizer_reference import on_both_paths
from sgd_reference import parameter, run, scaler_with, strided
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.optim import lr_scheduler

import fastreg as fr


class TestGradScaler:
    """By default the scaler unscales and skips, as with torch's AdamW; with fused=True the step does both."""

    @pytest.mark.parametrize("fused", [None, True])
    @pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
    def test_overflow_in_the_first_step(self, bad, fused):
        """A skipped first step leaves all as it was, in every group, average and counts included."""
        start, grads = torch.randn(100), [torch.randn(100) for _ in range(3)]
        options = dict(lr=0.1, l1=0.01, ema=0.9, amsgrad=True)
        p, clean = parameter(start.clone()), parameter(torch.ones(3))
        groups = [{"params": [p]}, {"params": [clean], "lr": 0.5}]
        optimizer, scaler = fr.optim.AdamW(groups, **options, fused=fused), scaler_with(256.0)
        p.grad, clean.grad = torch.ones(100), torch.ones(3)
        p.grad[77] = bad
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 128.0
        assert torch.equal(p.detach(), start) and torch.equal(clean.detach(), torch.ones(3))
        for q in (p, clean):
            for name, value in optimizer.state[q].items():
                assert torch.equal(value, q.detach() if name == "ema" else torch.zeros_like(value)), name
        for g in grads:
            p.grad = g * 128.0
            scaler.step(optimizer)
            scaler.update()
        (want,), other = run(fr.optim.AdamW, [start], [[g] for g in grads], **options)
        assert same_values(p.detach(), want.detach())
        for name, value in other.state[want].items():
            assert same_values(optimizer.state[p][name], value), name

    @pytest.mark.parametrize("fused", [None, False, True])
    def test_scale(self, fused):
        """As torch's AdamW with the same scaler, gradients left alone with fused=True only."""
        w, g, results = torch.randn(50), torch.randn(50) * 3, []
        for cls in (fr.optim.AdamW, torch.optim.AdamW):
            p = parameter(w.clone())
            optimizer = cls([p], lr=0.5, fused=fused if cls is fr.optim.AdamW else None)
            scaler = scaler_with(3.0)
            p.grad = g.clone()
            scaler.step(optimizer)
            assert torch.equal(p.grad, g) == (cls is fr.optim.AdamW and fused is True)
            results.append(p.detach())
            assert not hasattr(optimizer, "grad_scale") and not hasattr(optimizer, "found_inf")
        torch.testing.assert_close(*results)

    def test_float16_parameters(self):
        p = parameter(torch.zeros(10, dtype=torch.float16))
        options = dict(lr=2.0**-10, eps=2.0**-26, weight_decay=0.0, fused=True)
        optimizer, scaler = fr.optim.AdamW([p], **options), scaler_with(65536.0)
        p.grad = torch.full((10,), 2.0**-10, dtype=torch.float16)  # truly 2^-26, below float16's least number
        scaler.step(optimizer)
        torch.testing.assert_close(p.detach().float(), torch.full((10,), -(2.0**-11)), rtol=2e-3, atol=0)

    def test_hooks(self):
        seen = []
        for cls in (fr.optim.AdamW, torch.optim.AdamW):
            for fused in (None, True):
                p, calls = parameter(torch.ones(2)), []
                optimizer, scaler = cls([p], lr=0.5, fused=fused), scaler_with(4.0)
                optimizer.register_step_post_hook(lambda *args, calls=calls: calls.append("post"))
                for value in (math.inf, 2.0):
                    p.grad = torch.full_like(p, value)
                    scaler.step(optimizer)
                    scaler.update()
                seen.append(
                    (calls, hasattr(optimizer, "_step_supports_amp_scaling"), optimizer.state[p]["step"])
                )
        assert seen[0] == seen[2] and seen[1] == seen[3] and [len(calls) for calls, *_ in seen[:2]] == [1, 2]

    def test_attributes(self):
        """grad_scale and found_inf set by hand mean what they mean to torch's fused optimisers; the count of
        steps then moves to where a skipped step is known.
        """
        for scale, found in ((None, None), (2.0, None), (None, 1.0), (2.0, 0.0), (2.0, 2.0)):
            p = parameter(torch.ones(3))
            p.grad = torch.full((3,), 4.0)
            optimizer = fr.optim.AdamW([p], lr=0.5, eps=1.0, weight_decay=0.0)
            optimizer.grad_scale = None if scale is None else torch.tensor(scale)
            optimizer.found_inf = None if found is None else torch.tensor([found])
            optimizer.step()
            g = 4.0 / (scale or 1.0)
            want = 1.0 if found else 1 - 0.5 * g / (g + 1)
            torch.testing.assert_close(p.detach(), torch.full((3,), want))
            assert optimizer.state[p]["step"] == (0 if found else 1)

    def test_accelerate(self):
        pytest.importorskip("accelerate", reason='needs pip install "torch-fastreg[test]"')
        from accelerate import Accelerator
        from accelerate.optimizer import AcceleratedOptimizer

        Accelerator(cpu=True)
        p = parameter(torch.ones(2))
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        plain = fr.optim.AdamW([p], lr=0.5, weight_decay=0.0, ema=0.5, max_norm=9.0)
        optimizer = AcceleratedOptimizer(plain, scaler=scaler)
        skipped = []
        for factor in (math.inf, 1.0, math.inf, 1.0):
            optimizer.zero_grad()
            scaler.scale((p * factor).sum()).backward()
            optimizer.step()
            skipped.append(optimizer.step_was_skipped)
        assert skipped == [True, False, True, False]
        torch.testing.assert_close(p.detach(), torch.zeros(2), rtol=0, atol=1e-6)
        torch.testing.assert_close(optimizer.optimizer.grad_norm, torch.tensor(2.0).sqrt())
        with optimizer.optimizer.averaged():
            torch.testing.assert_close(p.detach(), torch.full((2,), 0.25), rtol=0, atol=1e-6)


class TestRounding:
    def test_small_steps_count(self):
        """Steps of a sixteenth of a gap between bfloat16 numbers move weights and averages in the mean."""
        for stochastic in (True, False):
            p = parameter(torch.full((4000,), 0.75, dtype=torch.bfloat16))
            options = dict(lr=2.0**-12, betas=(0.0, 0.0), weight_decay=0.0, ema=15 / 16)
            optimizer = fr.optim.AdamW([p], stochastic_rounding=stochastic, **options)
            for n in range(100):
                torch.manual_seed(n)
                p.grad = torch.ones_like(p)
                optimizer.step()
            moved = (0.75 - p.detach().double().mean()) * 2**8
            behind = (optimizer.state[p]["ema"].double().mean() - p.detach().double().mean()) * 2**8
            # An average with decay d lags d / (1 - d) steps behind.
            assert abs(moved - 6.25) < 0.3 if stochastic else moved == 0
            assert abs(behind - 15 / 16) < 0.2 if stochastic else behind == 0

    def test_float16_is_refused(self):
        p = parameter(torch.ones(3, dtype=torch.float16))
        with pytest.raises(ValueError, match="AdamW: stochastic_rounding is for bfloat16"):
            fr.optim.AdamW([p], stochastic_rounding=True)


def scheduled(cls, make_schedule, backend=None, **options):
    """Two groups stepped under a schedule; gives what was stepped, and the number of graphs."""
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(1)
    params = [parameter(torch.randn(n, generator=generator)) for n in (5, 3, 4)]
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.05}]
    optimizer = cls(groups, **{"lr": 0.1, **copy.deepcopy(options)})
    schedule = make_schedule(optimizer)
    counter = CompileCounterWithBackend(backend) if backend else None
    step = torch.compile(optimizer.step, backend=counter) if backend else optimizer.step
    for n in range(6):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        torch.manual_seed(n)
        step()
        schedule.step()
    values = [p.detach() for p in params] + [v for s in optimizer.state.values() for v in s.values()]
    if "max_norm" in options:
        values.append(optimizer.grad_norm)
    return values, counter.frame_count if counter else 0


class TestCompiled:
    @pytest.mark.parametrize(
        "options",
        [
            dict(amsgrad=True, cautious=True, l1=0.02, l1_mode="subgradient", lr=torch.tensor(0.1)),
            dict(l1=0.02, ema=0.9, ema_warmup=True, max_norm=1.0),
        ],
        ids=str,
    )
    @pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
    def test_graphs_and_values(self, backend, options):
        """As many graphs as torch's AdamW has under a schedule, and the bits of eager."""

        def make(optimizer):
            return lr_scheduler.ExponentialLR(optimizer, 0.9)

        compiled, graphs = scheduled(fr.optim.AdamW, make, backend, **options)
        eager, _ = scheduled(fr.optim.AdamW, make, **options)
        assert graphs == 2  # of the second group, whose rate is a number
        for a, b in zip(compiled, eager, strict=True):
            if backend == "inductor":  # has powers of its own, in the warm-up
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
            else:
                assert same_values(a, b)

    def test_full_graph(self):
        """Also of a parameter that has no gradient, and is averaged."""
        torch._dynamo.reset()
        p, idle = parameter(torch.ones(3)), parameter(torch.ones(2))
        p.grad = torch.ones(3)
        optimizer = fr.optim.AdamW([p, idle], lr=0.5, ema=0.9, max_norm=1.0)
        torch.compile(optimizer.step, backend="aot_eager", fullgraph=True)()
        assert torch.equal(optimizer.state[p]["ema"], p.detach())
        assert torch.equal(optimizer.state[idle]["ema"], torch.ones(2))
        torch.testing.assert_close(optimizer.grad_norm, torch.tensor(3.0).sqrt())


NUMBERS = [
    (dict(lr=math.nan), ValueError, "lr must be finite and at least 0, got nan"),
    (dict(lr=-0.1), ValueError, "lr must be finite and at least 0, got -0.1"),
    (dict(lr="0.1"), TypeError, "lr must be a number, got str"),
    (dict(lr=torch.ones(2)), ValueError, "one element, got torch.float32 \\(2,\\)"),
    (dict(betas=(1.0, 0.9)), ValueError, "betas\\[0\\] must be in \\[0, 1\\), got 1.0"),
    (dict(betas=(0.9, -0.1)), ValueError, "betas\\[1\\] must be in \\[0, 1\\), got -0.1"),
    (dict(betas=(0.9, math.nan)), ValueError, "betas\\[1\\] must be finite"),
    (dict(betas=0.9), TypeError, "betas must be two numbers, got 0.9"),
    (dict(betas=(0.9, torch.ones(2))), TypeError, "betas\\[1\\] must be a number, got Tensor"),
    (dict(eps=-1.0), ValueError, "eps must be finite and at least 0, got -1.0"),
    (dict(eps=math.inf), ValueError, "eps must be finite"),
    (dict(weight_decay=-1e-9), ValueError, "weight_decay must be finite and at least 0, got -1e-09"),
    (dict(l1=-1), ValueError, "l1 must be finite and at least 0, got -1"),
    (dict(l1_mode="soft"), ValueError, "l1_mode must be one of 'subgradient', 'proximal', got 'soft'"),
    (dict(cautious=2), ValueError, "cautious must be one of"),
    (dict(differentiable=True), ValueError, "differentiable must be False.*torch.optim.AdamW"),
    (
        dict(decoupled_weight_decay=False),
        ValueError,
        "decoupled_weight_decay must be True.*torch.optim.Adam ",
    ),
]


class TestErrors:
    @pytest.mark.parametrize(("options", "error", "text"), NUMBERS, ids=[text for _, _, text in NUMBERS])
    @pytest.mark.parametrize("where", ["constructor", "group", "by hand"])
    def test_hostile_numbers(self, options, error, text, where):
        if where != "constructor" and re.search("at least 0, got -", text) and "l1" not in options:
            return  # torch refuses negative numbers in the constructor alone
        if where == "constructor" and "decoupled_weight_decay" in options:
            return  # no argument of torch's either
        a, b = parameter(torch.ones(2)), parameter(torch.ones(2))
        if where == "constructor":
            with pytest.raises(error, match=f"AdamW: .*{text}"):
                fr.optim.AdamW([a], **options)
        elif where == "group":
            optimizer = fr.optim.AdamW([a], lr=0.1)
            with pytest.raises(error, match=f"AdamW: .*{text}"):
                optimizer.add_param_group({"params": [b], **options})
            assert len(optimizer.param_groups) == 1
        else:
            optimizer = fr.optim.AdamW([{"params": [a]}, {"params": [b]}], lr=0.1)
            a.grad, b.grad = torch.ones(2), torch.ones(2)
            optimizer.param_groups[1].update(options)
            with pytest.raises(error, match=f"AdamW: .*{text}"):
                optimizer.step()
            assert torch.equal(a.detach(), b.detach()) and not optimizer.state

    @pytest.mark.parametrize("name", ["lr", "weight_decay"])
    def test_negative_numbers_are_for_groups(self, name):
        w, results = torch.randn(5, dtype=torch.float64), []
        for cls in (fr.optim.AdamW, torch.optim.AdamW):
            p = parameter(w.clone())
            optimizer = cls([{"params": [p], name: -0.25}], lr=0.1)
            for _ in range(2):
                p.grad = torch.ones_like(p)
                optimizer.step()
            results.append(p.detach())
        torch.testing.assert_close(*results, rtol=1e-14, atol=1e-14)

    def test_unknown_names(self):
        p = parameter(torch.ones(2))
        with pytest.raises(TypeError, match=r"AdamW: .*got 'l2'; use weight_decay"):
            fr.optim.AdamW([p], l2=0.1)
        with pytest.raises(ValueError, match="AdamW: a parameter group has 'L1', which nothing reads"):
            fr.optim.AdamW([{"params": [p], "L1": 0.1}])
        with pytest.raises(TypeError, match=r"AdamW: params must be .*model.parameters\(\)"):
            fr.optim.AdamW(torch.nn.Linear(2, 2))

    def check_refused(self, bad, error, text):
        """`bad` in the second group: the first is not touched."""
        good = parameter(torch.ones(2))
        good.grad = torch.ones(2)
        before = bad.detach().clone()
        optimizer = fr.optim.AdamW([{"params": [good]}, {"params": [bad]}], lr=0.5)
        with pytest.raises(error, match=text):
            optimizer.step()
        assert torch.equal(good.detach(), torch.ones(2)) and torch.equal(bad.detach(), before)

    def test_gradients(self):
        p = parameter(torch.ones(4, 3))
        p.grad = torch.eye(4, 3).to_sparse()
        self.check_refused(
            p, TypeError, "AdamW does not support sparse gradients, got torch.sparse_coo; use sparse=False"
        )
        p = parameter(torch.ones(3, dtype=torch.bfloat16))
        p.grad_dtype = None
        p.grad = torch.ones(3)
        self.check_refused(p, ValueError, "AdamW: a gradient must have the dtype of its parameter")

    def test_overlapping_parameter(self):
        with pytest.raises(ValueError, match=r"AdamW: .*must not share memory, got strides \(0,\)"):
            fr.optim.AdamW([parameter(torch.ones(1).expand(4))])
        p = parameter(torch.ones(3).as_strided((2, 2), (1, 1)))
        p.grad = torch.ones(p.shape)
        with pytest.raises(ValueError, match=r"AdamW: .*must not share memory; use .clone\(\)"):
            fr.optim.AdamW([p]).step()
        assert torch.equal(p.detach(), torch.ones(2, 2))


class TestMemory:
    @pytest.mark.parametrize("layout", ["contiguous", "transposed"])
    def test_no_allocation_of_parameter_size(self, layout):
        """After the first step, which makes the state, a step allocates no tensor of a parameter's size."""
        params = [parameter(strided(torch.randn(300, 400), layout)[0]) for _ in range(2)]
        optimizer = fr.optim.AdamW(params, amsgrad=True, l1=0.1, ema=0.9, ema_warmup=True, max_norm=1.0)
        for p in params:
            p.grad = torch.randn(300, 400)
        sizes = []
        for _ in range(2):
            activities = [torch.profiler.ProfilerActivity.CPU]
            with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
                optimizer.step()
            sizes.append(max((e.self_cpu_memory_usage for e in profile.key_averages()), default=0))
        assert sizes[0] >= 300 * 400 * 4 and sizes[1] < 4096
        for p in params:
            for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "ema"):
                assert optimizer.state[p][name].stride() == p.stride()


@pytest.mark.skipif(
    not hasattr(fr._registry.fast, "adamw"), reason=f"no C++ path: {fr._registry.why_not_fast}"
)
class TestBothPaths:
    """The step as Python collects it and as C++ does."""

    @pytest.mark.parametrize("layout", ["contiguous", "transposed", "no dimensions", "empty"])
    @pytest.mark.parametrize(
        "options",
        [
            dict(),
            dict(amsgrad=True, weight_decay=0.1, l1=0.05),
            dict(cautious=True, maximize=True, l1=0.05, l1_mode="subgradient"),
            dict(lr=1, betas=[0.5, 0.75], eps=0.1, ema=0.75),  # a list, as files of settings have it
        ],
        ids=str,
    )
    def test_the_same_bits(self, monkeypatch, dtype, options, layout):
        def tensor(seed):
            t = torch.randn(6, 5, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            t = t.to(dtype)
            return {
                "contiguous": t,
                "transposed": t.transpose(0, 2),
                "no dimensions": t[0, 0, 0].clone(),
                "empty": t[:, :0],
            }[layout]

        def run():
            params = [parameter(tensor(i)) for i in range(3)]
            groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.01, "l1": 0.3}]
            optimizer = fr.optim.AdamW(groups, **{"lr": 0.1, **options})
            for step in range(3):
                for i, p in enumerate(params):
                    p.grad = None if (i, step) == (1, 0) else tensor(10 * step + i + 5)
                optimizer.step()
            states = [value for state in optimizer.state.values() for value in state.values()]
            return [p.detach() for p in params] + states

        # The first step makes the state, in Python; so does that of the parameter whose gradient comes late,
        # unless it has been averaged before.
        assert on_both_paths(monkeypatch, run) == (2 if "ema" in options else 1)


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="this torch cannot even fake a GPU")
class TestCaptured:
    """A step in a CUDA graph, seen through a fake GPU; tests/test_cuda_device.py has a true one."""

    @pytest.mark.parametrize(
        "options", [dict(), dict(capturable=True), dict(fused=True, ema=0.9), dict(max_norm=1.0)], ids=str
    )
    def test_the_counts_lie_on_the_device(self, options, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        with FakeTensorMode():
            p = parameter(torch.ones(3, device="cuda"))
            p.grad = torch.ones(3, device="cuda")
            optimizer = fr.optim.AdamW([p], **options)
            if not options:
                with pytest.raises(RuntimeError, match=r"AdamW: a step in a CUDA graph .*capturable=True"):
                    optimizer.step()
                return
            optimizer.step()
            assert {value.device.type for value in optimizer.state[p].values()} == {"cuda"}

    def test_nothing_waits_for_the_device(self, monkeypatch):
        """A fake tensor has no value that could be read: a step with everything in it reads none, except
        error_if_nonfinite.
        """
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        with FakeTensorMode():
            params = [parameter(torch.ones(3, 4, device="cuda")) for _ in range(3)]
            lr = torch.full((), 0.1, device="cuda")
            options = dict(amsgrad=True, l1=0.1, cautious=True, ema=0.9, ema_warmup=True, max_norm=1.0)
            optimizer = fr.optim.AdamW(params, lr=lr, fused=True, **options)
            optimizer.grad_scale = torch.ones((), device="cuda")
            optimizer.found_inf = torch.zeros((), device="cuda")
            for p in params[:2]:
                p.grad = torch.ones(3, 4, device="cuda")
            for _ in range(2):
                optimizer.step()
            assert optimizer.grad_norm.device.type == "cuda"
            optimizer.defaults["error_if_nonfinite"] = True
            with pytest.raises(DataDependentOutputException):
                optimizer.step()


class TestTorchFaults:
    """What torch (2.14) does, and beside it what fastreg does."""

    def test_fused_ignores_strides(self):
        """A gradient laid out otherwise than its parameter goes to the wrong elements; a sliced parameter is
        overrun.
        """
        g = torch.arange(1.0, 13.0).view(4, 3)
        for cls in (torch.optim.AdamW, fr.optim.AdamW):
            options = dict(lr=1.0, weight_decay=0.0, eps=10.0, fused=True)
            p = parameter(torch.zeros(3, 4).t())
            view, base = strided(torch.zeros(4, 3), "sliced")
            for q in (p, parameter(view)):
                q.grad = g.clone()
                cls([q], **options).step()
                assert torch.allclose(q.detach(), -g / (g + 10)) == (cls is fr.optim.AdamW)
            assert ((base == 77).sum() == base.numel() - 12) == (cls is fr.optim.AdamW)

    def test_float16_divides_by_zero(self):
        """Unfused, v and eps = 1e-8 are both 0 in float16, and the weights infinite after one step."""
        for cls in (torch.optim.AdamW, fr.optim.AdamW):
            p = parameter(torch.ones(4, dtype=torch.float16))
            p.grad = torch.full_like(p, 1e-4)
            cls([p], lr=0.1, weight_decay=0.0).step()
            assert p.isinf().all() if cls is torch.optim.AdamW else (p - 0.9).abs().max() < 1e-3

    def test_clipping_an_infinity(self):
        """clip_grad_norm_ makes NaN of an infinite element, and the step of it a weight."""
        for cls in (torch.optim.AdamW, fr.optim.AdamW):
            p = parameter(torch.ones(3))
            p.grad = torch.tensor([math.inf, 1.0, 1.0])
            if cls is torch.optim.AdamW:
                torch.nn.utils.clip_grad_norm_([p], 1.0)
                cls([p], lr=0.1).step()
            else:
                cls([p], lr=0.1, max_norm=1.0).step()
            assert p.isnan().any() == (cls is torch.optim.AdamW)
