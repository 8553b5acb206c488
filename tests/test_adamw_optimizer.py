"""AdamW as an optimiser: torch's own samples, groups, checkpoints, GradScaler, errors."""

import contextlib
import copy
import io
import math
import pickle
import warnings

import numpy as np
import pytest
import torch
from helpers import same_values
from optimizer_reference import reference
from sgd_reference import parameter, run, scaler_with, strided

import fastreg as fr

# torch's own (torch.testing._internal.common_optimizers), those of GPUs included, and further ones.
SAMPLES = {
    "default": dict(),
    "non-default lr": dict(lr=0.01),
    "nonzero weight_decay": dict(weight_decay=0.1),
    "maximize": dict(weight_decay=0.1, maximize=True),
    "amsgrad": dict(weight_decay=0.1, amsgrad=True),
    "capturable": dict(capturable=True),
    "capturable, amsgrad": dict(weight_decay=0.1, amsgrad=True, capturable=True),
    "Tensor lr with capturable and amsgrad": dict(lr=torch.tensor(0.001), amsgrad=True, capturable=True),
    "Tensor lr, Tensor betas, with capturable and amsgrad": dict(
        lr=torch.tensor(0.001),
        betas=(torch.tensor([[[0.9]]]), torch.tensor([[0.99]])),
        amsgrad=True,
        capturable=True,
    ),
    "Tensor lr, Tensor betas, with capturable": dict(
        lr=torch.tensor(0.001),
        betas=(torch.tensor(0.9), torch.tensor(0.99)),
        amsgrad=False,
        capturable=True,
    ),
    "tensor lr": dict(lr=torch.tensor(0.01)),
    "maximize and amsgrad": dict(maximize=True, amsgrad=True, weight_decay=0.1, lr=0.1),
    "no averages": dict(betas=(0.0, 0.0), eps=0.1),
    "no decay": dict(weight_decay=0),
}


def wide(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def doubled(value):
    """Tensors in float64: with a float32 rate torch rounds 1 - lr * weight_decay to float32."""
    return torch.utils._pytree.tree_map(lambda v: v.double() if isinstance(v, torch.Tensor) else v, value)


def both(start, grads, ours=None, **options):
    """The parameters and optimisers of both classes after the same steps."""
    theirs = run(torch.optim.AdamW, start, grads, foreach=False, **doubled(options))
    return run(fr.optim.AdamW, start, grads, **options, **(ours or {})), theirs


def assert_near(ours, theirs, ulps=4):
    """Parameters and states within some units in the last place of float64."""
    (params, optimizer), (others, other) = ours, theirs
    close = dict(rtol=ulps * 2.3e-16, atol=ulps * 2.3e-16)
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), **close)
        assert optimizer.state[p].keys() == other.state[q].keys()
        for name, value in other.state[q].items():
            torch.testing.assert_close(optimizer.state[p][name], value, check_dtype=name != "step", **close)


class TestTorchsSamples:
    """Against torch.optim.AdamW(foreach=False) in float64."""

    @pytest.mark.parametrize("sample", SAMPLES)
    @pytest.mark.parametrize("case", ["usual", "late gradients", "groups"])
    def test_same_numbers(self, sample, case):
        options = dict(SAMPLES[sample])
        capturable = {"capturable": options.pop("capturable", False)}  # torch refuses it on the CPU
        start = [wide(4, 3, seed=1), wide(5, seed=2), wide(seed=3), wide(0, 2)]
        grads = [[wide(*w.shape, seed=10 * n + i) for i, w in enumerate(start)] for n in range(7)]
        if case == "late gradients":
            grads[0][1] = grads[1][1] = grads[4][0] = None
        if case == "groups":
            results = []
            for cls, more in ((fr.optim.AdamW, capturable), (torch.optim.AdamW, dict(foreach=False))):
                params = [parameter(w.clone()) for w in start]
                groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.03, "betas": (0.5, 0.6)}]
                given = options if cls is fr.optim.AdamW else doubled(options)
                optimizer = cls(groups, **given, **more)
                for step_grads in grads:
                    for p, g in zip(params, step_grads, strict=True):
                        p.grad = g.clone()
                    optimizer.step()
                results.append((params, optimizer))
            assert_near(*results)
        else:
            assert_near(*both(start, grads, capturable, **options))

    def test_the_table_has_torchs_samples(self):
        pytest.importorskip("expecttest", reason='needs pip install "torch-fastreg[test]"')
        from torch.testing._internal.common_optimizers import optim_inputs_func_adamw

        for device in ("cpu", "cuda"):
            for theirs in optim_inputs_func_adamw(device, torch.float64):
                assert repr(SAMPLES[theirs.desc]) == repr(theirs.kwargs)

    @pytest.mark.parametrize("sample", ["default", "amsgrad", "maximize"])
    def test_overflow_first(self, sample):
        """A skipped first step leaves parameters, moments and counts; the rest is as if it had not been."""
        options = SAMPLES[sample]
        start, grads = [wide(30, seed=1)], [[wide(30, seed=n)] for n in range(4)]
        theirs = run(torch.optim.AdamW, start, grads, foreach=False, **options)
        for fused in (None, True):
            p = parameter(start[0].clone())
            optimizer, scaler = fr.optim.AdamW([p], fused=fused, **options), scaler_with(4.0)
            p.grad = torch.full_like(p, math.inf)
            scaler.step(optimizer)
            scaler.update()
            assert torch.equal(p.detach(), start[0])
            assert all((value == 0).all() for value in optimizer.state[p].values())
            for (g,) in grads:
                p.grad = g * scaler.get_scale()
                scaler.step(optimizer)
                scaler.update()
            assert_near(([p], optimizer), theirs)

    def test_16_bit(self):
        """The arithmetic of float32, rounded once a step."""
        for narrow in (torch.float16, torch.bfloat16):
            w, grads = wide(300).to(narrow), [wide(300, seed=n).to(narrow) for n in range(3)]
            options = dict(lr=0.01, eps=1e-4)
            (p,), optimizer = run(fr.optim.AdamW, [w], [[g] for g in grads], **options)
            m, v = torch.zeros(300, dtype=narrow), torch.zeros(300, dtype=narrow)
            for n, g in enumerate(grads):
                w32, m32, v32 = w.float(), 0.9 * m.float() + 0.1 * g.float(), None
                v32 = 0.999 * v.float() + 0.001 * g.float() ** 2
                d = (v32 / (1 - 0.999 ** (n + 1))).sqrt() + 1e-4
                w32 = w32 * (1 - 0.01 * 0.01) - 0.01 / (1 - 0.9 ** (n + 1)) * m32 / d
                w, m, v = w32.to(narrow), m32.to(narrow), v32.to(narrow)
            ulp = 2 * torch.finfo(narrow).eps
            torch.testing.assert_close(p.detach(), w, rtol=ulp, atol=1e-7)
            torch.testing.assert_close(optimizer.state[p]["exp_avg_sq"], v, rtol=ulp, atol=1e-7)
            assert p.dtype == narrow


class TestPenalties:
    @pytest.mark.parametrize(
        "options",
        [
            dict(l1=0.3),
            dict(l1=0.3, l1_mode="subgradient"),
            dict(cautious=True, weight_decay=0.3),
            dict(cautious=True, weight_decay=0.3, l1=0.1, amsgrad=True, maximize=True),
            dict(l1=0.3, ema=0.7),
            dict(ema=0.9, ema_warmup=True),
        ],
        ids=str,
    )
    def test_against_the_reference(self, options):
        w, grads = wide(200), [wide(200, seed=n) for n in range(1, 8)]
        w[:3] = torch.tensor([0.0, 1e-4, -1e-4])
        (p,), optimizer = run(fr.optim.AdamW, [w], [[g] for g in grads], lr=0.05, **options)
        reads = {k: v for k, v in options.items() if k != "ema_warmup"}
        want, m, v, most, average = reference(
            w, grads, lr=0.05, power=2 / 3 if "ema_warmup" in options else None, **reads
        )
        close = dict(rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(p.detach(), want, **close)
        assert torch.equal(p.detach() == 0, want == 0)
        state = optimizer.state[p]
        torch.testing.assert_close(state["exp_avg"], m, **close)
        torch.testing.assert_close(state["exp_avg_sq"], v, **close)
        if "amsgrad" in options:
            torch.testing.assert_close(state["max_exp_avg_sq"], most, **close)
        if average is not None:
            torch.testing.assert_close(state["ema"], average, **close)

    def test_cautious_decay(self):
        """Five lines: what moves away from 0 does not decay; a weight at rest does (u w >= 0)."""
        w = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0, 0.0])
        g = torch.tensor([1.0, 1.0, -1.0, -1.0, 0.0, 0.0, 1.0])
        (p,), _ = run(fr.optim.AdamW, [w], [[g]], lr=0.1, weight_decay=0.5, cautious=True)
        update = g / (g.abs() + 1e-8)
        want = w - 0.1 * (update + 0.5 * (update * w >= 0) * w)
        torch.testing.assert_close(p.detach(), want)
        assert not torch.allclose(want, w - 0.1 * (update + 0.5 * w))

    def test_exact_zeros(self):
        w, grads = torch.full((50,), 0.01), [[torch.zeros(50)]] * 2
        for mode, share in (("proximal", 1.0), ("subgradient", 0.0)):
            (p,), _ = run(fr.optim.AdamW, [w], grads, lr=0.003, l1=0.1, l1_mode=mode)
            assert fr.optim.sparsity([p]) == share

    @pytest.mark.parametrize(("amsgrad", "l2"), [(False, 0.0), (True, 0.0), (False, 0.02)])
    def test_the_fixed_point_is_the_lassos(self, amsgrad, l2):
        """A convex problem whose columns differ in scale by 1000, so that d does too: the optimality of
        E + l1 |w|_1, -dE/dw = l1 sign(w) or at most l1 in size where w is 0; exactly the Lasso's zeros. With
        l2 / 2 |w|_2^2 in E, since AdamW's decay is no part of it, those of the elastic net.
        """
        x = wide(60, 8) * torch.logspace(-1.5, 1.5, 8, dtype=torch.float64)
        y = x @ torch.tensor([20.0, 0, 3, 0, 0.2, 0, 0, 0.01], dtype=torch.float64) + 0.1 * wide(60, seed=5)
        l1, w = 0.05, parameter(torch.zeros(8, dtype=torch.float64))
        options = dict(l1=l1, weight_decay=0.0, betas=(0.9, 0.99), amsgrad=amsgrad)
        optimizer = fr.optim.AdamW([w], lr=0.3, **options)
        for n in range(2000):
            optimizer.param_groups[0]["lr"] = 0.3 * 0.994**n + 1e-7
            w.grad = x.T @ (x @ w.detach() - y) / 60 + l2 * w.detach()
            optimizer.step()
        w = w.detach()
        gradient = -(x.T @ (x @ w - y)) / 60 - l2 * w
        assert (gradient - l1 * w.sign()).abs()[w != 0].max() < 1e-3 and gradient.abs().max() < l1 + 1e-3
        linear = pytest.importorskip("sklearn.linear_model", reason='needs pip install "torch-fastreg[test]"')
        exact = dict(tol=1e-13, max_iter=10**6, fit_intercept=False)
        model = linear.ElasticNet(alpha=l1 + l2, l1_ratio=l1 / (l1 + l2), **exact)
        want = torch.tensor(model.fit(x.numpy(), y.numpy()).coef_)
        assert torch.equal(w == 0, want == 0) and 0 < (want == 0).sum() < 8
        torch.testing.assert_close(w, want, rtol=1e-3, atol=1e-3)


class TestProtocol:
    def test_gradients_are_left_alone(self, dtype):
        for options in (
            dict(l1=0.1, amsgrad=True),
            dict(maximize=True, l1=0.1, l1_mode="subgradient"),
            dict(cautious=True, ema=0.5, max_norm=0.1),
        ):
            p, g = parameter(torch.randn(50).to(dtype)), torch.randn(50).to(dtype)
            p.grad = g.clone()
            optimizer = fr.optim.AdamW([p], lr=0.1, **options)
            for _ in range(2):
                optimizer.step()
                assert torch.equal(p.grad, g)

    def test_closure_and_hooks(self):
        p, seen = parameter(torch.tensor([3.0])), []
        optimizer = fr.optim.AdamW([p], lr=0.5, weight_decay=0.0)
        optimizer.register_step_pre_hook(lambda *a: seen.append(("pre", p.item())))
        optimizer.register_step_post_hook(lambda *a: seen.append(("post", p.item())))

        def closure():
            optimizer.zero_grad()
            loss = (p**2).sum()
            loss.backward()
            return loss

        with torch.no_grad():
            assert optimizer.step(closure).item() == 9.0
        assert seen == [("pre", 3.0), ("post", 2.5)]
        optimizer.zero_grad()
        assert optimizer.step() is None and p.item() == 2.5  # without a gradient nothing decays either

    def test_add_param_group_in_training(self):
        results = []
        for cls in (fr.optim.AdamW, torch.optim.AdamW):
            a, b = parameter(wide(3)), parameter(wide(4, seed=1))
            optimizer = cls([a], lr=0.1)
            for n in range(4):
                if n == 2:
                    optimizer.add_param_group({"params": b, "lr": 0.3, "betas": (0.5, 0.5), "amsgrad": True})
                a.grad, b.grad = wide(3, seed=n + 5), wide(4, seed=n + 9)
                optimizer.step()
            results.append(([a, b], optimizer))
            with pytest.raises(ValueError, match="more than one parameter group"):
                optimizer.add_param_group({"params": [a]})
        assert_near(*results)

    def test_shared_parameter_once(self):
        first, second = torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 2, bias=False)
        second.weight = first.weight
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer = fr.optim.AdamW([*first.parameters(), *second.parameters()], lr=0.1, l1=0.1, ema=0.5)
        first.weight.grad = torch.ones(2, 2)
        optimizer.step()
        assert optimizer.state[first.weight]["step"] == 1 == optimizer.state[first.weight]["n_averaged"]
        assert sum(len(g["params"]) for g in optimizer.param_groups) == 1

    def test_inference_and_grad_modes(self):
        p = parameter(torch.ones(2))
        p.grad = torch.ones(2)
        optimizer = fr.optim.AdamW([p], lr=0.5, ema=0.9)
        with torch.enable_grad():
            optimizer.step()
        assert p.is_leaf and p.requires_grad
        assert not any(value.requires_grad for value in optimizer.state[p].values())
        with torch.inference_mode():
            optimizer.step()
        optimizer.step()
        assert optimizer.state[p]["step"] == 3

    def test_autograd_sees_the_change(self):
        p = parameter(torch.ones(2))
        loss = (p * p * p).sum()
        p.grad = torch.ones(2)
        fr.optim.AdamW([p], lr=0.5).step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    def test_type_and_what_is_ignored(self):
        w, g = torch.randn(5), torch.randn(5)
        results = [
            run(fr.optim.AdamW, [w], [[g]], lr=0.1, **options)[0][0]
            for options in ({}, dict(foreach=True), dict(fused=True), dict(foreach=True, fused=True))
        ]
        assert all(torch.equal(results[0], other) for other in results)
        optimizer = fr.optim.AdamW([parameter(w)], l1=0.125)
        assert isinstance(optimizer, torch.optim.AdamW) and "l1: 0.125" in repr(optimizer)
        assert type(optimizer).__module__ == "fastreg.optim"

    def test_numbers_that_numpy_left_behind(self):
        w, g = torch.ones(3), torch.ones(3)
        plain = dict(lr=0.5, betas=(0.5, 0.75), eps=0.125, weight_decay=0.25, l1=0.25)
        odd = dict(
            lr=np.float32(0.5),
            betas=[np.float64(0.5), torch.tensor(0.75)],
            eps=torch.tensor(0.125),
            weight_decay=np.float32(0.25),
            l1=torch.tensor(0.25, dtype=torch.float64),
        )
        (p,), _ = run(fr.optim.AdamW, [w], [[g]] * 2, **plain)
        (q,), _ = run(fr.optim.AdamW, [w], [[g]] * 2, **odd)
        assert torch.equal(p.detach(), q.detach())

    @pytest.mark.parametrize("layout", ["contiguous", "transposed", "channels_last", "sliced"])
    def test_strides(self, layout, dtype):
        w, g = torch.randn(3, 4, 5, 6).to(dtype), torch.randn(3, 4, 5, 6).to(dtype)
        options = dict(lr=0.1, l1=0.01, amsgrad=True, ema=0.5, eps=1e-3)
        (p,), _ = run(fr.optim.AdamW, [w], [[g]] * 2, **options)
        q = parameter(strided(w, layout)[0])
        optimizer = fr.optim.AdamW([q], **options)
        for _ in range(2):
            q.grad = strided(g, layout)[0]
            optimizer.step()
        assert same_values(p.detach(), q.detach().contiguous())


class TestStateDicts:
    def train(self, model, optimizer, seed, steps=2):
        torch.manual_seed(seed)
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.randn(5, 4)).pow(2).sum().backward()
            optimizer.step()

    @pytest.mark.parametrize("copier", ["deepcopy", "pickle", "save", "weights_only"])
    def test_copies_continue(self, copier):
        model = torch.nn.Linear(4, 3)
        options = dict(lr=0.1, amsgrad=True, l1=0.01, cautious=True, ema=0.9, ema_warmup=True, max_norm=1.0)
        optimizer = fr.optim.AdamW(model.parameters(), **options)
        self.train(model, optimizer, 1)
        if copier == "deepcopy":
            other, again = copy.deepcopy((model, optimizer))
        elif copier == "pickle":
            other, again = pickle.loads(pickle.dumps((model, optimizer)))
        else:
            file = io.BytesIO()
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
            file.seek(0)
            saved = torch.load(file, weights_only=copier == "weights_only")
            other = torch.nn.Linear(4, 3)
            other.load_state_dict(saved["model"])
            again = fr.optim.AdamW(other.parameters(), lr=99.0, max_norm=1.0)
            again.load_state_dict(saved["optimizer"])
        self.train(model, optimizer, 2)
        self.train(other, again, 2)
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(p, q)
            for name, value in optimizer.state[p].items():
                assert torch.equal(value, again.state[q][name]), name
        assert again.param_groups[0]["cautious"] and again.param_groups[0]["lr"] == 0.1
        assert torch.equal(again.grad_norm, optimizer.grad_norm)

    @pytest.mark.parametrize("amsgrad", [False, True])
    @pytest.mark.parametrize("direction", ["to torch", "from torch"])
    @pytest.mark.parametrize("more", [dict(), dict(fused=True), dict(ema=0.9, max_norm=1e9)], ids=str)
    def test_checkpoints_cross(self, direction, amsgrad, more):
        """A state dict of torch's class is continued by ours, and ours by torch's, with late gradients."""
        options = dict(lr=0.1, amsgrad=amsgrad, weight_decay=0.1)
        start = [wide(30), wide(4, seed=9)]
        grads = [[wide(30, seed=n), wide(4, seed=-n) if n > 2 else None] for n in range(6)]
        fused = {"fused": True} if "fused" in more else {"foreach": False}
        kinds = [(fr.optim.AdamW, more), (torch.optim.AdamW, fused)]
        (one, mine), (other, yours) = kinds if direction == "to torch" else kinds[::-1]
        half, first = run(one, start, grads[:2], **options, **mine)
        params = [parameter(p.detach().clone()) for p in half]
        second = other(params, lr=7.0, **yours)
        saved = first.state_dict()
        second.load_state_dict(saved)
        for step_grads in grads[2:]:
            for p, g in zip(params, step_grads, strict=True):
                p.grad = None if g is None else g.clone()
            second.step()
        whole, third = run(torch.optim.AdamW, start, grads, foreach=False, **options)
        for p, q in zip(params, whole, strict=True):
            torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-14, atol=1e-15)
            assert second.state[p]["step"] == third.state[q]["step"]

    def test_the_count_of_steps_lies_where_torch_has_it(self):
        for options, where in ((dict(), "cpu"), (dict(capturable=True), "meta"), (dict(fused=True), "meta")):
            for cls in (fr.optim.AdamW, torch.optim.AdamW):
                if cls is torch.optim.AdamW and "fused" in options:
                    continue  # torch's checks the device first
                p = parameter(torch.ones(3, device="meta"))
                p.grad = torch.ones(3, device="meta")
                optimizer = cls([p], foreach=False, **options)
                with contextlib.suppress(AssertionError, RuntimeError):  # neither computes there
                    optimizer.step()
                step = optimizer.state[p]["step"]
                assert step.device.type == where and step.dtype == torch.float32 and step.shape == ()

    def test_steps_of_another_kind(self):
        """A count in float64, as torch makes it under that default, or a number, as of old."""
        (p,), theirs = run(torch.optim.AdamW, [wide(3)], [[wide(3, seed=1)]] * 3)
        (q,), _ = run(torch.optim.AdamW, [wide(3)], [[wide(3, seed=1)]] * 4)
        for kind in (lambda step: step.double(), lambda step: step.item()):
            saved = copy.deepcopy(theirs.state_dict())
            saved["state"][0]["step"] = kind(saved["state"][0]["step"])
            again = parameter(p.detach().clone())
            optimizer = fr.optim.AdamW([again])
            optimizer.load_state_dict(saved)
            again.grad = wide(3, seed=1)
            optimizer.step()
            torch.testing.assert_close(again.detach(), q.detach(), rtol=1e-15, atol=1e-15)
            assert optimizer.state[again]["step"] == 4

    def test_numbers_survive(self):
        """torch gives loaded state the dtype of its parameter; bfloat16 has no 257, and float16 no 65537."""
        for narrow in (torch.bfloat16, torch.float16):
            ones = torch.ones(3, dtype=narrow)
            (p,), optimizer = run(fr.optim.AdamW, [ones], [[ones]], ema=0.9)
            for name in ("n_averaged", "step"):
                optimizer.state[p][name].fill_(65537.0)
            saved = optimizer.state_dict()
            again = fr.optim.AdamW([p])
            again.register_load_state_dict_pre_hook(lambda _, given: dict(given))
            again.load_state_dict(saved)
            for name in ("n_averaged", "step"):
                assert again.state[p][name] == 65537 and again.state[p][name].dtype == torch.float32
            again.state[p]["n_averaged"].add_(1)
            assert saved["state"][0]["n_averaged"] == 65537

    def test_torchs_state_dict_keeps_our_own_options(self):
        (p,), theirs = run(torch.optim.AdamW, [torch.ones(3)], [[torch.ones(3)]], lr=0.3)
        own = dict(l1=0.2, l1_mode="subgradient", cautious=True, stochastic_rounding=True, ema=0.5)
        optimizer = fr.optim.AdamW([p], **own)
        saved = theirs.state_dict()
        keys = set(saved["param_groups"][0])
        optimizer.load_state_dict(saved)
        group = optimizer.param_groups[0]
        assert group["lr"] == 0.3 and {name: group[name] for name in own} == own
        assert set(saved["param_groups"][0]) == keys

    def test_scheduler_that_writes_tensors(self):
        results = []
        for cls in (fr.optim.AdamW, torch.optim.AdamW):
            p, q = parameter(wide(3)), parameter(wide(3, seed=1))
            groups = [{"params": [p]}, {"params": [q], "lr": torch.tensor(0.2, dtype=torch.float64)}]
            optimizer = cls(groups, lr=torch.tensor(0.1, dtype=torch.float64))
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [0.5, 0.25], total_steps=9)
            for n in range(6):
                p.grad, q.grad = wide(3, seed=n), wide(3, seed=-n)
                optimizer.step()
                schedule.step()
            results.append(([p, q], optimizer))
        assert_near(*results)


def test_proximal_l1_of_a_weight_without_a_gradient():
    """As the docstring warns: what E does not hold at all is 0 within ten steps."""
    p = torch.nn.Parameter(torch.full((3,), 0.95))
    optimizer = fr.optim.AdamW([p], lr=1e-3, l1=1e-6, eps=1e-8, weight_decay=0.0)
    for n in range(10):
        p.grad = torch.tensor([0.0, 1.0, -1.0])
        optimizer.step()
        assert p[0].item() == pytest.approx(max(0.95 - 0.1 * (n + 1), 0), abs=1e-5)
    assert p[1] < 0.95 < p[2]
