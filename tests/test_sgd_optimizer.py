"""SGD as an optimiser: state dicts, groups, closures, GradScaler, the first step, errors."""

import copy
import io
import math
import pickle
import re
import warnings

import numpy as np
import pytest
import torch
from helpers import same_values
from sgd_reference import OP, parameter, rounded_reference, run, scaler_with

import fastreg as fr


class TestOptimizerProtocol:
    def test_gradients_are_left_alone(self, dtype):
        """Bit-identical gradients after a step, whatever the options."""
        for options in (
            dict(momentum=0.9, nesterov=True, weight_decay=0.1, l1=0.1),
            dict(momentum=0.9, maximize=True, weight_decay=0.1),
            dict(momentum=0.9, dampening=0.5, decoupled=True, l1=0.1, l1_mode="proximal"),
        ):
            p, g = parameter(torch.randn(50).to(dtype)), torch.randn(50).to(dtype)
            p.grad = g.clone()
            optimizer = fr.optim.SGD([p], lr=0.1, **options)
            for _ in range(2):
                optimizer.step()
                assert torch.equal(p.grad, g)
                assert p.grad.data_ptr() != optimizer.state[p]["momentum_buffer"].data_ptr()

    def test_closure(self):
        p = parameter(torch.tensor([3.0]))
        optimizer = fr.optim.SGD([p], lr=0.5)

        def closure():
            optimizer.zero_grad()
            loss = (p**2).sum()
            loss.backward()
            return loss

        with torch.no_grad():
            assert optimizer.step(closure).item() == 9.0
        assert p.item() == 0.0 and optimizer.step() is None

    def test_zero_grad(self):
        p = parameter(torch.ones(2))
        optimizer = fr.optim.SGD([p], lr=0.5, l1=0.5)
        p.grad = torch.ones(2)
        optimizer.zero_grad(set_to_none=False)
        assert torch.equal(p.grad, torch.zeros(2))
        optimizer.zero_grad()
        assert p.grad is None

    def test_add_param_group(self):
        a, b = parameter(torch.ones(2)), parameter(torch.ones(2))
        optimizer = fr.optim.SGD([a], lr=0.5, momentum=0.9)
        a.grad = torch.ones(2)
        optimizer.step()
        group = {"params": b, "l1": 1.0, "lr": 0.25}
        optimizer.add_param_group(group)
        b.grad = torch.ones(2)
        optimizer.step()
        assert torch.equal(b.detach(), torch.full((2,), 1 - 0.25 * 2))
        torch.testing.assert_close(a.detach(), torch.full((2,), 0.5 - 0.5 * 1.9))
        with pytest.raises(ValueError, match="more than one parameter group"):
            optimizer.add_param_group({"params": [a]})

    def test_named_parameters(self):
        model = torch.nn.Linear(3, 2)
        optimizer = fr.optim.SGD(model.named_parameters(), lr=0.1, l1=0.1)
        assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
        model(torch.ones(1, 3)).sum().backward()
        before = model.weight.detach().clone()
        optimizer.step()
        torch.testing.assert_close(model.weight.detach(), before - 0.1 * (1 + 0.1 * before.sign()))

    def test_hooks(self):
        seen, p = [], parameter(torch.ones(1))
        optimizer = fr.optim.SGD([p], lr=0.5)
        optimizer.register_step_pre_hook(lambda *a: seen.append(("pre", p.item())))
        optimizer.register_step_post_hook(lambda *a: seen.append(("post", p.item())))
        p.grad = torch.ones(1)
        optimizer.step()
        assert seen == [("pre", 1.0), ("post", 0.5)]

    def test_shared_parameter_once(self):
        """One tensor in two modules, or listed twice, is stepped and penalised once, without torch's
        warning.
        """
        first, second = torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 2, bias=False)
        second.weight = first.weight
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer = fr.optim.SGD(
                [*first.parameters(), *second.parameters()], lr=1.0, weight_decay=0.25, l1=0.125
            )
        before = first.weight.detach().clone()
        first.weight.grad = torch.zeros(2, 2)
        optimizer.step()
        assert torch.equal(first.weight.detach(), before - (0.25 * before + 0.125 * before.sign()))
        assert sum(len(g["params"]) for g in optimizer.param_groups) == 1
        model = torch.nn.Sequential(first, second)
        assert len(fr.optim.SGD(model.parameters(), lr=1.0).param_groups[0]["params"]) == 1

    @pytest.mark.parametrize("copier", ["deepcopy", "pickle", "save", "weights_only"])
    def test_copies_continue(self, copier):
        """A copy made in the middle goes on with the same bits, dampening's flag and l1 included."""
        model = torch.nn.Linear(4, 3)
        options = dict(lr=0.1, momentum=0.9, dampening=0.25, l1=0.01, l1_mode="proximal", weight_decay=0.1)
        optimizer = fr.optim.SGD(model.parameters(), **options)

        def train(model, optimizer, seed):
            torch.manual_seed(seed)
            for _ in range(2):
                optimizer.zero_grad()
                model(torch.randn(5, 4)).pow(2).sum().backward()
                optimizer.step()

        train(model, optimizer, 1)
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
            again = fr.optim.SGD(other.parameters(), lr=99.0)
            again.load_state_dict(saved["optimizer"])
        train(model, optimizer, 2)
        middle = [p.detach().clone() for p in model.parameters()]
        train(other, again, 2)
        assert all(same_values(a, b.detach()) for a, b in zip(middle, other.parameters(), strict=True))
        assert again.param_groups[0]["l1_mode"] == "proximal" and again.param_groups[0]["lr"] == 0.1
        assert all(same_values(a, b.detach()) for a, b in zip(middle, model.parameters(), strict=True))

    @pytest.mark.parametrize("dampening", [0.0, 0.3])
    @pytest.mark.parametrize("direction", ["to torch", "from torch"])
    def test_checkpoints_cross(self, direction, dampening, dtype):
        """A state dict of torch.optim.SGD is continued by ours, and ours by torch's; the groups' l1 stays or
        is carried along.
        """
        options = dict(lr=0.1, momentum=0.9, dampening=dampening, weight_decay=0.1)
        start, grads = [torch.randn(30).to(dtype)], [[torch.randn(30).to(dtype)] for _ in range(4)]
        from_cls, to_cls = (fr.optim.SGD, torch.optim.SGD)[:: 1 if direction == "to torch" else -1]
        (half,), first = run(from_cls, start, grads[:2], **options)
        p = parameter(half.detach().clone())
        extra = {} if to_cls is torch.optim.SGD else dict(l1=0.5, l1_mode="proximal")
        second = to_cls([p], lr=7.0, **extra)
        second.load_state_dict(first.state_dict())
        for key, value in extra.items():
            assert second.param_groups[0][key] == value
            second.param_groups[0][key] = 0.0 if key == "l1" else value
        assert second.param_groups[0]["lr"] == 0.1 and second.param_groups[0]["dampening"] == dampening
        for (g,) in grads[2:]:
            p.grad = g.clone()
            second.step()
        (whole,), _ = run(to_cls, start, grads, **options)
        loose = {torch.float32: 1e-6, torch.float64: 1e-14, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
        torch.testing.assert_close(p.detach(), whole.detach(), rtol=loose, atol=loose)

    def test_own_checkpoint_in_each_dtype(self, dtype):
        """torch's load_state_dict casts all state to the parameter's dtype, dampening's flag too: the bits go
        on the same.
        """
        start, grads = torch.randn(30).to(dtype), [torch.randn(30).to(dtype) for _ in range(3)]
        options = dict(lr=0.1, momentum=0.9, dampening=0.3, l1=0.1)
        p = parameter(start.clone())
        optimizer = fr.optim.SGD([p], **options)
        for g in grads:
            saved, optimizer = optimizer.state_dict(), fr.optim.SGD([p], **options)
            optimizer.load_state_dict(saved)
            p.grad = g.clone()
            optimizer.step()
        assert same_values(p.detach(), rounded_reference(start, grads, **options)[0])

    def test_empty_state_of_torch(self):
        """A state dict taken before torch's first step has no buffers; the first step is then a first
        step.
        """
        p = parameter(torch.ones(2))
        optimizer = fr.optim.SGD([p], lr=1.0, momentum=0.5, dampening=0.5, l1=0.25)
        optimizer.load_state_dict(torch.optim.SGD([p], lr=0.5, momentum=0.5, dampening=0.5).state_dict())
        p.grad = torch.ones(2)
        optimizer.step()
        assert torch.equal(p.detach(), torch.full((2,), 1 - 0.5 * 1.25))

    def test_wrong_number_of_groups(self):
        a, b = parameter(torch.ones(2)), parameter(torch.ones(2))
        two = torch.optim.SGD([{"params": [a]}, {"params": [b]}], lr=0.1).state_dict()
        with pytest.raises(ValueError, match="different number of parameter groups"):
            fr.optim.SGD([a, b], lr=0.1).load_state_dict(two)

    def test_loading_leaves_the_state_dict(self):
        """load_state_dict does not write into what it is given."""
        p = parameter(torch.ones(2))
        saved = torch.optim.SGD([p], lr=0.5).state_dict()
        keys = set(saved["param_groups"][0])
        fr.optim.SGD([p], lr=0.1).load_state_dict(saved)
        assert set(saved["param_groups"][0]) == keys

    def test_inference_and_grad_modes(self):
        """A step works where gradients are on and leaves no graph behind."""
        p = parameter(torch.ones(2))
        p.grad = torch.ones(2)
        optimizer = fr.optim.SGD([p], lr=0.5, momentum=0.9)
        with torch.enable_grad():
            optimizer.step()
        assert p.is_leaf and p.requires_grad and not optimizer.state[p]["momentum_buffer"].requires_grad
        with torch.inference_mode():
            optimizer.step()
        optimizer.step()
        torch.testing.assert_close(p.detach(), torch.full((2,), 1 - 0.5 * (1 + 1.9 + 2.71)))

    def test_autograd_sees_the_change(self):
        """The step counts as an in-place change: a graph that saved the old weight refuses to run
        backward.
        """
        p = parameter(torch.ones(2))
        loss = (p * p * p).sum()
        p.grad = torch.ones(2)
        fr.optim.SGD([p], lr=0.5).step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    def test_repr_and_type(self):
        optimizer = fr.optim.SGD([parameter(torch.ones(1))], lr=0.5, l1=0.125)
        assert isinstance(optimizer, torch.optim.SGD) and "l1: 0.125" in repr(optimizer)

    def test_foreach_and_fused_are_ignored(self):
        w, g = torch.randn(5), torch.randn(5)
        results = [
            run(fr.optim.SGD, [w], [[g]], lr=0.1, foreach=a, fused=b)[0][0]
            for a, b in ((None, None), (True, False), (False, True))
        ]
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])

    def test_numbers_that_numpy_left_behind(self):
        w, g = torch.ones(3), torch.ones(3)
        (p,), _ = run(fr.optim.SGD, [w], [[g]], lr=np.float32(0.5), l1=np.float64(0.25), weight_decay=1)
        assert torch.equal(p.detach(), torch.full((3,), 1 - 0.5 * 2.25))


class TestMomentumStart:
    @pytest.mark.parametrize("dampening", [0.0, 0.5])
    def test_late_first_gradient(self, dampening):
        """A parameter's first step is its own, whenever its first gradient comes."""
        start, late = torch.randn(9), torch.randn(9)
        grads = [[torch.randn(9), None], [torch.randn(9), late], [torch.randn(9), late]]
        options = dict(lr=0.1, momentum=0.9, dampening=dampening)
        (_, p), _ = run(fr.optim.SGD, [torch.randn(9), start], grads, **options)
        assert same_values(p.detach(), rounded_reference(start, [late, late], **options)[0])

    def test_dampening_switched_on_later(self):
        """With a buffer that has already moved, the step that first sees dampening is not a first step."""
        w, g, p = torch.ones(2), torch.ones(2), parameter(torch.ones(2))
        optimizer = fr.optim.SGD([p], lr=0.5, momentum=0.5)
        p.grad = g
        optimizer.step()
        optimizer.param_groups[0]["dampening"] = 0.5
        optimizer.step()
        half, v = rounded_reference(w, [g], lr=0.5, momentum=0.5)
        assert torch.equal(
            p.detach(),
            rounded_reference(half, [g], started=True, v=v, lr=0.5, momentum=0.5, dampening=0.5)[0],
        )

    def test_momentum_switched_on_later(self):
        p = parameter(torch.ones(2))
        optimizer = fr.optim.SGD([p], lr=0.5)
        p.grad = torch.ones(2)
        optimizer.step()
        assert not optimizer.state
        optimizer.param_groups[0]["momentum"] = 0.5
        optimizer.step()
        optimizer.step()
        assert torch.equal(p.detach(), torch.full((2,), 1 - 0.5 - 0.5 - 0.75))

    def test_flag_only_with_dampening(self):
        (p,), optimizer = run(fr.optim.SGD, [torch.ones(2)], [[torch.ones(2)]], lr=0.1, momentum=0.9)
        assert set(optimizer.state[p]) == {"momentum_buffer"}
        (p,), optimizer = run(fr.optim.SGD, [torch.ones(2)], [[torch.ones(2)]], lr=0.1)
        assert not optimizer.state


class TestGradScaler:
    """By default the scaler unscales and skips, as with torch's SGD; with fused=True the step does both."""

    @pytest.mark.parametrize("fused", [None, True])
    @pytest.mark.parametrize("dampening", [0.0, 0.5])
    @pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
    def test_overflow_in_the_first_step(self, bad, dampening, fused):
        """A skipped first step leaves parameters, buffers and flags; what follows is as if it had not
        been.
        """
        start, grads = torch.randn(1000), [torch.randn(1000) for _ in range(3)]
        options = dict(lr=0.1, momentum=0.9, dampening=dampening, weight_decay=0.1, l1=0.01)
        p, clean = parameter(start.clone()), parameter(torch.ones(3))
        groups = [{"params": [p]}, {"params": [clean], "lr": 0.5}]
        optimizer, scaler = fr.optim.SGD(groups, **options, fused=fused), scaler_with(256.0)
        p.grad = torch.full((1000,), 1.0)
        p.grad[777] = bad
        clean.grad = torch.ones(3)
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 128.0
        assert torch.equal(p.detach(), start) and torch.equal(clean.detach(), torch.ones(3))
        assert all((value == 0).all() for state in optimizer.state.values() for value in state.values())
        for g in grads:
            p.grad = g * 128.0
            clean.grad = None
            scaler.step(optimizer)
            scaler.update()
        w, v = rounded_reference(start, grads, **options)
        assert same_values(p.detach(), w) and same_values(optimizer.state[p]["momentum_buffer"], v)

    @pytest.mark.parametrize("fused", [None, True])
    def test_overflow_in_a_later_step(self, dtype, fused):
        start, grads = torch.randn(40).to(dtype), [torch.randn(40).to(dtype) for _ in range(4)]
        options = dict(lr=0.1, momentum=0.9, dampening=0.25, l1=0.01, l1_mode="proximal")
        p = parameter(start.clone())
        optimizer, scaler = fr.optim.SGD([p], **options, fused=fused), scaler_with(4.0)
        if dtype == torch.float16 and not fused:
            p.grad = grads[0]
            with pytest.raises(ValueError, match="unscale FP16 gradients"):  # torch's, for every optimiser
                scaler.step(optimizer)
            return
        for i, g in enumerate(grads):
            p.grad = torch.full_like(g, math.inf) if i == 2 else g * scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
        w, v = rounded_reference(start, grads[:2] + grads[3:], **options)
        assert same_values(p.detach(), w) and same_values(optimizer.state[p]["momentum_buffer"], v)

    @pytest.mark.parametrize("fused", [None, False, True])
    @pytest.mark.parametrize("scale", [1.0, 3.0, 65536.0, 0.01])
    def test_scale(self, scale, fused):
        """The gradient is divided by the scale, to the last bit as torch does it: times the reciprocal
        rounded to float32. By default it is afterwards unscaled where it lies; with fused=True only read.
        """
        w, g = torch.randn(500), torch.randn(500) * scale
        p = parameter(w.clone())
        optimizer, scaler = fr.optim.SGD([p], lr=0.5, momentum=0.9, fused=fused), scaler_with(scale)
        p.grad = g.clone()
        scaler.step(optimizer)
        reciprocal = torch.tensor(scale).double().reciprocal().float()
        assert same_values(p.detach(), w - 0.5 * (g * reciprocal))
        assert torch.equal(p.grad, g if fused else g * reciprocal)
        assert not hasattr(optimizer, "grad_scale") and not hasattr(optimizer, "found_inf")

    def test_float16_gradients_unscale_in_float32(self):
        """Small gradients live under the scale and would be flushed in float16; unscaling happens in
        float32.
        """
        p = parameter(torch.zeros(10, dtype=torch.float16))
        optimizer, scaler = fr.optim.SGD([p], lr=65536.0, fused=True), scaler_with(65536.0)
        p.grad = torch.full((10,), 2.0**-10, dtype=torch.float16)  # truly 2^-26, below float16's least number
        scaler.step(optimizer)
        assert torch.equal(p.detach(), torch.full((10,), -(2.0**-10), dtype=torch.float16))

    @pytest.mark.parametrize("fused", [None, True])
    def test_user_unscales_and_clips(self, fused):
        """scaler.unscale_ and clipping first: the gradients are then taken as they are, and an overflow still
        skips.
        """
        w, g = torch.randn(50), torch.randn(50)
        p = parameter(w.clone())
        optimizer, scaler = fr.optim.SGD([p], lr=0.5, momentum=0.9, fused=fused), scaler_with(1024.0)
        p.grad = g * 1024.0
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_([p], 0.5)
        clipped = p.grad.clone()
        assert clipped.norm() < 0.51
        scaler.step(optimizer)
        scaler.update()
        assert same_values(p.detach(), w - 0.5 * clipped)
        before, buffer = p.detach().clone(), optimizer.state[p]["momentum_buffer"].clone()
        p.grad = torch.full((50,), math.nan)
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(p.detach(), before) and torch.equal(optimizer.state[p]["momentum_buffer"], buffer)
        assert scaler.get_scale() == 512.0

    def test_attributes(self):
        """grad_scale and found_inf set by hand mean what they mean to torch's fused optimisers."""
        for scale, found, expected in (
            (None, None, 0.0),
            (2.0, None, 0.5),
            (None, 1.0, 1.0),
            (2.0, 0.0, 0.5),
            (2.0, 2.0, 1.0),
        ):
            p = parameter(torch.ones(3))
            p.grad = torch.ones(3)
            optimizer = fr.optim.SGD([p], lr=1.0)
            optimizer.grad_scale = None if scale is None else torch.tensor(scale)
            optimizer.found_inf = None if found is None else torch.tensor([found])
            optimizer.step()
            assert torch.equal(p.detach(), torch.full((3,), expected)), (scale, found)

    @pytest.mark.parametrize("fused", [None, True])
    def test_training_loop(self, fused):
        """Two groups, autocast, a scaler: the same weights as torch's unfused SGD, which unscales
        beforehand.
        """
        results = []
        for cls, options in ((fr.optim.SGD, dict(fused=fused)), (torch.optim.SGD, {})):
            torch.manual_seed(3)
            model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
            groups = [
                {"params": list(model[0].parameters()), "lr": 0.05},
                {"params": list(model[2].parameters())},
            ]
            optimizer = cls(groups, lr=0.1, momentum=0.9, weight_decay=0.01, **options)
            scaler = torch.amp.GradScaler("cpu")
            for _ in range(6):
                optimizer.zero_grad()
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    loss = model(torch.randn(12, 6)).float().pow(2).mean()
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
            results.append([p.detach() for p in model.parameters()])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

    def test_disabled_scaler(self):
        p = parameter(torch.ones(2))
        p.grad = torch.ones(2)
        torch.amp.GradScaler("cpu", enabled=False).step(fr.optim.SGD([p], lr=0.5))
        assert torch.equal(p.detach(), torch.full((2,), 0.5))


class TestErrors:
    @pytest.mark.parametrize(
        ("options", "error", "text"),
        [
            (dict(lr=math.nan), ValueError, "lr must be finite and at least 0, got nan"),
            (dict(lr=-0.1), ValueError, "lr must be finite and at least 0, got -0.1"),
            (dict(lr=math.inf), ValueError, "lr must be finite"),
            (dict(lr="0.1"), TypeError, "lr must be a number, got str"),
            (dict(lr=None), TypeError, "lr must be a number, got NoneType"),
            (dict(lr=torch.ones(2)), ValueError, "one element, got torch.float32 \\(2,\\)"),
            (dict(lr=torch.tensor(True)), ValueError, "real tensor of one element, got torch.bool"),
            (dict(lr=torch.tensor(math.nan)), ValueError, "lr must be finite and at least 0, got nan"),
            (dict(lr=torch.tensor(-1.0)), ValueError, "lr must be finite and at least 0, got -1.0"),
            (dict(momentum=math.nan), ValueError, "momentum must be finite"),
            (dict(momentum=-1), ValueError, "momentum must be finite and at least 0, got -1"),
            (dict(momentum="a"), TypeError, "momentum must be a number"),
            (dict(dampening=math.nan), ValueError, "dampening must be finite, got nan"),
            (dict(dampening=-math.inf), ValueError, "dampening must be finite, got -inf"),
            (dict(weight_decay=math.inf), ValueError, "weight_decay must be finite"),
            (dict(weight_decay=-1e-9), ValueError, "weight_decay must be finite and at least 0, got -1e-09"),
            (dict(weight_decay=torch.ones(1)), TypeError, "weight_decay must be a number, got Tensor"),
            (dict(l1=-1), ValueError, "l1 must be finite and at least 0, got -1"),
            (dict(l1=math.nan), ValueError, "l1 must be finite"),
            (dict(l1="x"), TypeError, "l1 must be a number"),
            (
                dict(l1_mode="soft"),
                ValueError,
                "l1_mode must be one of 'subgradient', 'proximal', got 'soft'",
            ),
            (dict(l1_mode=None), ValueError, "l1_mode must be one of"),
            (dict(nesterov=True), ValueError, "nesterov needs momentum > 0 and dampening 0, got 0.* and 0"),
            (dict(nesterov=True, momentum=0.9, dampening=0.1), ValueError, "nesterov needs"),
            (dict(differentiable=True), ValueError, "differentiable must be False.*torch.optim.SGD"),
        ],
    )
    @pytest.mark.parametrize("where", ["constructor", "group", "by hand"])
    def test_hostile_numbers(self, options, error, text, where):
        """Refused in the constructor, in a group, and at the step when someone wrote them there, with nothing
        stepped. torch refuses negative numbers in the constructor alone.
        """
        if where != "constructor" and re.search("at least 0, got -", text) and "l1" not in options:
            return
        a, b = parameter(torch.ones(2)), parameter(torch.ones(2))
        if where == "constructor":
            with pytest.raises(error, match=f"SGD: .*{text}"):
                fr.optim.SGD([a], **options)
        elif where == "group":
            optimizer = fr.optim.SGD([a], lr=0.1)
            with pytest.raises(error, match=f"SGD: .*{text}"):
                optimizer.add_param_group({"params": [b], **options})
            assert len(optimizer.param_groups) == 1
        else:
            optimizer = fr.optim.SGD([{"params": [a]}, {"params": [b]}], lr=0.1, momentum=0.9)
            a.grad, b.grad = torch.ones(2), torch.ones(2)
            optimizer.param_groups[1].update({"momentum": 0.0, **options})
            with pytest.raises(error, match=f"SGD: .*{text}"):
                optimizer.step()
            assert (
                torch.equal(a.detach(), torch.ones(2))
                and torch.equal(b.detach(), torch.ones(2))
                and not optimizer.state
            )

    def test_no_parameters(self):
        for params, error in (
            ([], ValueError),
            (torch.ones(2), TypeError),
            ([1.0], TypeError),
            ([{"params": {1}}], TypeError),
        ):
            with pytest.raises(error):
                fr.optim.SGD(params, lr=0.1)
        with pytest.raises(TypeError, match="ordered collections"):  # a set has no order to repeat
            fr.optim.SGD([{"params": {parameter(torch.ones(1))}}], lr=0.1)
        with pytest.raises(TypeError, match="must be a dict"):
            fr.optim.SGD([parameter(torch.ones(1))], lr=0.1).add_param_group([parameter(torch.ones(1))])

    def check_refused(self, bad, error, text, **options):
        """`bad` in the second group: the first is not touched."""
        good = parameter(torch.ones(2))
        good.grad = torch.ones(2)
        before = bad.detach().clone()
        optimizer = fr.optim.SGD([{"params": [good]}, {"params": [bad]}], lr=0.5, momentum=0.9, **options)
        with pytest.raises(error, match=text):
            optimizer.step()
        assert torch.equal(good.detach(), torch.ones(2)) and torch.equal(bad.detach(), before)

    def test_sparse_gradient(self):
        """Refused where torch's SGD refuses it, with its type and ours."""
        p = parameter(torch.ones(4, 3))
        p.grad = torch.eye(4, 3).to_sparse()
        for error in (TypeError, RuntimeError):
            for options in (dict(weight_decay=0.1), dict(l1=0.1)):
                self.check_refused(
                    p, error, "SGD: gradients must be dense where .*, got torch.sparse_coo; use", **options
                )
        with pytest.raises(RuntimeError):
            torch.optim.SGD([p], lr=0.1, weight_decay=0.1).step()

    def test_gradient_of_another_dtype(self):
        p = parameter(torch.ones(3, dtype=torch.bfloat16))
        p.grad_dtype = None
        p.grad = torch.ones(3)
        self.check_refused(
            p,
            ValueError,
            "SGD: a gradient must have the dtype of its parameter, torch.bfloat16, got torch.float32",
        )

    def test_overlapping_parameter(self):
        """An expanded parameter has several elements at one address: an error, as in torch, and nothing
        stepped.
        """
        with pytest.raises(
            ValueError, match=r"SGD: .*must not share memory, got strides \(0,\); use .clone\(\)"
        ):
            fr.optim.SGD([parameter(torch.ones(1).expand(4))])
        p = parameter(torch.ones(3).as_strided((2, 2), (1, 1)))
        p.grad = torch.ones(p.shape)
        with pytest.raises(ValueError, match=r"SGD: .*must not share memory; use .clone\(\)"):
            fr.optim.SGD([p]).step()
        assert torch.equal(p.detach(), torch.ones(2, 2))

    def test_stochastic_rounding_of_float16(self):
        p = parameter(torch.ones(3, dtype=torch.float16))
        with pytest.raises(ValueError, match="SGD: stochastic_rounding is for bfloat16"):
            fr.optim.SGD([p], lr=0.1, stochastic_rounding=True)
        optimizer = fr.optim.SGD([p], lr=0.1)
        optimizer.param_groups[0]["stochastic_rounding"] = True
        p.grad = torch.ones_like(p)
        with pytest.raises(ValueError, match="stochastic_rounding"):
            optimizer.step()
        assert torch.equal(p.detach(), torch.ones_like(p))

    def test_buffer_of_another_shape(self):
        p = parameter(torch.ones(3))
        optimizer = fr.optim.SGD([p], lr=0.1, momentum=0.9)
        optimizer.state[p]["momentum_buffer"] = torch.zeros(4)
        p.grad = torch.ones(3)
        with pytest.raises(
            ValueError, match=r"momentum buffer must have the shape of its parameter, \(3,\), got \(4,\)"
        ):
            optimizer.step()
        assert torch.equal(p.detach(), torch.ones(3))

    @pytest.mark.parametrize(
        ("change", "text"),
        [
            (dict(grads=[]), "one gradient"),
            (dict(grads=[torch.ones(4)]), "a gradient must have the shape of its parameter"),
            (dict(grads=[torch.ones(3).double()]), "a gradient must have the dtype of its parameter"),
            (dict(buffers=[]), "one buffer"),
            (dict(buffers=[torch.ones(3).half()]), "a momentum buffer must have the dtype"),
            (dict(started=[torch.zeros(()), torch.zeros(())]), "expected one gradient"),
            (dict(started=[torch.zeros((), dtype=torch.float64)]), "momentum_started must be one float32"),
            (dict(lr=-1.0), "at least 0, got -1"),
            (dict(l1=math.nan), "finite and at least 0, got nan"),
            (dict(dampening=math.inf), "dampening must be finite, got inf"),
            (dict(lr_tensor=torch.ones(2)), "lr must be one number"),
            (dict(lr_tensor=torch.ones((), dtype=torch.int32)), "lr must be float32 or float64"),
            (dict(lr_tensor=torch.tensor(math.nan)), "finite and at least 0, got nan"),
            (dict(found_inf=torch.ones(2)), "found_inf must be one number"),
            (dict(seed=torch.ones(1)), "seed must be one int64"),
            (dict(params=[torch.ones(3, dtype=torch.int32)]), "a parameter must be float32"),
        ],
    )
    def test_raw_op_refuses(self, change, text):
        """The op itself checks everything before it writes."""
        p = torch.ones(3)
        values = dict(
            params=[p],
            grads=[torch.ones(3)],
            buffers=[torch.zeros(3)],
            started=[],
            averages=[],
            n_averaged=[],
            lr=0.1,
            momentum=0.9,
            dampening=0.0,
        )
        values.update(
            weight_decay=0.0,
            l1=0.0,
            ema=0.0,
            nesterov=False,
            proximal=False,
            decoupled=False,
            maximize=False,
        )
        names = list(values)
        values.update(change)
        with pytest.raises(ValueError, match=text):
            OP(*[values[n] for n in names], **{n: v for n, v in values.items() if n not in names})
        assert torch.equal(p, torch.ones(3))
