"""Clipping in the step of SGD and AdamW: torch.nn.utils.clip_grad_norm_ and then torch's step."""

import copy
import math
import pickle

import pytest
import torch
from optimizer_reference import BOTH
from sgd_reference import parameter, scaler_with
from torch.nn.utils import clip_grad_norm_

import fastreg as fr
from fastreg.optim._clip import OPTIONS as CLIPPING

both = pytest.mark.parametrize("cls", BOTH.values(), ids=BOTH)
TORCHS = {fr.optim.SGD: torch.optim.SGD, fr.optim.AdamW: torch.optim.AdamW}
# Matrices and a vector as layers have them, no dimension, and no element.
SHAPES = [(30, 4), (7,), (), (0, 3), (5, 5)]


def parameters(dtype=torch.float64):
    torch.manual_seed(0)
    return [parameter(torch.randn(shape).to(dtype)) for shape in SHAPES]


def grads(n, dtype=torch.float64):
    generator = torch.Generator().manual_seed(50 + n)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


def groups_of(params):
    return [{"params": params[:2]}, {"params": params[2:], "lr": 0.01}]


@both
class TestNumbers:
    @pytest.mark.parametrize("max_norm", [0.0, 0.5, 11.0, 100.0, math.inf])
    def test_against_clip_grad_norm(self, cls, max_norm):
        """Over two groups, with a late gradient; the norm is the one before clipping, gradients stay."""
        params, others = parameters(), parameters()
        optimizer = cls(groups_of(params), lr=0.1, max_norm=max_norm)
        other = TORCHS[cls](groups_of(others), lr=0.1, foreach=False)
        assert optimizer.grad_norm.isnan()
        for n in range(4):
            given = grads(n)
            for i, (p, q) in enumerate(zip(params, others, strict=True)):
                late = n == 0 and i == 1
                p.grad, q.grad = (None, None) if late else (given[i].clone(), given[i].clone())
            norm = clip_grad_norm_(others, max_norm) if max_norm < math.inf else None
            other.step()
            optimizer.step()
            if norm is not None:
                torch.testing.assert_close(optimizer.grad_norm, norm, rtol=1e-14, atol=0)
            assert all(p.grad is None or torch.equal(p.grad, g) for p, g in zip(params, given, strict=True))
        for p, q in zip(params, others, strict=True):
            torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-13, atol=1e-14)

    def test_16_bit(self, cls):
        """The norm is a float32; torch's of the same gradients has their dtype."""
        for narrow in (torch.float16, torch.bfloat16):
            params, others = parameters(narrow), parameters(torch.float32)
            optimizer = cls(params, lr=0.1, max_norm=0.5)
            other = TORCHS[cls](others, lr=0.1)
            for p, q, g in zip(params, others, grads(0, narrow), strict=True):
                p.grad, q.grad = g, g.float()
            norm = clip_grad_norm_(others, 0.5)
            other.step()
            optimizer.step()
            assert optimizer.grad_norm.dtype == torch.float32
            torch.testing.assert_close(optimizer.grad_norm, norm, rtol=1e-6, atol=0)
            for p, q in zip(params, others, strict=True):
                torch.testing.assert_close(p.float(), q, rtol=2 * torch.finfo(narrow).eps, atol=1e-3)

    def test_mixed_dtypes(self, cls):
        """float64 beside float32: one norm over both, in float64."""
        a, b = parameter(torch.randn(5)), parameter(torch.randn(4, dtype=torch.float64))
        optimizer = cls([a, b], lr=0.1, max_norm=1.0)
        a.grad, b.grad = torch.full((5,), 2.0), torch.full((4,), 3.0, dtype=torch.float64)
        optimizer.step()
        torch.testing.assert_close(optimizer.grad_norm, torch.tensor(56.0, dtype=torch.float64).sqrt())

    @pytest.mark.parametrize("fused", [None, True])
    def test_scaler(self, cls, fused):
        """The norm is of the unscaled gradients; what overflows is skipped, and the scale falls."""
        params, others = parameters(torch.float32), parameters(torch.float32)
        optimizer, scaler = cls(params, lr=0.1, max_norm=0.5, fused=fused), scaler_with(1024.0)
        other = TORCHS[cls](others, lr=0.1)
        for n in range(4):
            for p, q, g in zip(params, others, grads(n, torch.float32), strict=True):
                p.grad, q.grad = g * scaler.get_scale(), g
            if n == 2:
                params[0].grad[3, 1] = math.inf
            else:
                norm = clip_grad_norm_(others, 0.5)
                other.step()
            scaler.step(optimizer)
            scaler.update()
            if n != 2:
                torch.testing.assert_close(optimizer.grad_norm, norm, rtol=1e-6, atol=0)
        assert scaler.get_scale() == 512.0
        for p, q in zip(params, others, strict=True):
            torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-5, atol=1e-6)


@both
class TestNotFinite:
    @pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
    def test_skips_the_step(self, cls, bad):
        """All groups, states and averages; the next step is a first one."""
        params, clean = parameters(), parameters()
        optimizer, other = (cls(groups_of(p), lr=0.1, max_norm=0.5, ema=0.5) for p in (params, clean))
        for p, g in zip(params, grads(0), strict=True):
            p.grad = g
        params[0].grad[3, 1] = bad
        optimizer.step()
        assert not optimizer.grad_norm.isfinite()
        assert all(torch.equal(p, q) for p, q in zip(params, clean, strict=True))
        for opt, own in ((optimizer, params), (other, clean)):
            for p, g in zip(own, grads(1), strict=True):
                p.grad = g
            opt.step()
        for p, q in zip(params, clean, strict=True):
            assert torch.equal(p, q)
            assert all(torch.equal(v, other.state[q][name]) for name, v in optimizer.state[p].items())

    def test_raises(self, cls):
        params = parameters()
        optimizer = cls(params, lr=0.1, max_norm=0.5, error_if_nonfinite=True)
        for p, g in zip(params, grads(0), strict=True):
            p.grad = g
        optimizer.step()
        before = [p.detach().clone() for p in params]
        params[1].grad[2] = math.nan
        text = (
            f"{cls.__name__}: the norm of the gradients must be finite, got nan; .*error_if_nonfinite=False"
        )
        with pytest.raises(RuntimeError, match=text):
            optimizer.step()
        with pytest.raises(RuntimeError):  # torch's type
            clip_grad_norm_(params, 0.5, error_if_nonfinite=True)
        assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))

    def test_an_overflow_elsewhere(self, cls):
        """A scaler of several ranks tells also those whose gradients are finite."""
        p = parameter(torch.ones(3))
        optimizer, p.grad = cls([p], lr=0.1, max_norm=0.5, fused=True), torch.ones(3)
        optimizer.found_inf = torch.ones(())
        optimizer.step()
        assert torch.equal(p.detach(), torch.ones(3)) and optimizer.grad_norm.isfinite()

    def test_a_scaler_may_overflow(self, cls):
        """What GradScaler has found is its own business, and not an error."""
        p = parameter(torch.ones(3))
        options = dict(max_norm=0.5, error_if_nonfinite=True, fused=True)
        optimizer, scaler = cls([p], lr=0.1, **options), scaler_with(4.0)
        p.grad = torch.full((3,), math.inf)
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(p.detach(), torch.ones(3)) and scaler.get_scale() == 2.0


@both
class TestUse:
    def test_the_norm(self, cls):
        """A tensor of its own each time; None without max_norm, 0 without gradients."""
        p = parameter(torch.ones(4))
        assert cls([p], lr=0.1).grad_norm is None
        optimizer, seen = cls([p], lr=0.1, max_norm=math.inf), []
        for value in (1.0, 2.0):
            p.grad = torch.full((4,), value)
            optimizer.step()
            seen.append(optimizer.grad_norm)
        assert [norm.item() for norm in seen] == [2.0, 4.0] and seen[0].shape == ()
        optimizer.zero_grad()
        optimizer.step()
        assert optimizer.grad_norm == 0

    def test_copies_and_checkpoints(self, cls):
        """Copies clip as their original; a state dict does not say whether to clip."""
        p = parameter(torch.ones(4))
        optimizer = cls([p], lr=0.1, max_norm=0.5)
        for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
            (q,) = twin.param_groups[0]["params"]
            q.grad = torch.ones(4)
            twin.step()
            assert twin.grad_norm == 2.0
        assert not {"max_norm", "error_if_nonfinite"} & optimizer.param_groups[0].keys()
        plain = cls([p], lr=0.1)
        plain.load_state_dict(optimizer.state_dict())
        p.grad = torch.ones(4)
        plain.step()
        assert plain.grad_norm is None

    def test_copies_of_older_versions(self, cls):
        """A pickle from before there were averages and clipping lacks their options, which are off then."""
        p = parameter(torch.ones(4))
        state = cls([p], lr=0.1).__getstate__()
        for options in (state["defaults"], *state["param_groups"]):
            for name in ("ema", "ema_warmup", "stochastic_rounding", "rounding_seed", *CLIPPING):
                options.pop(name, None)
        again, other = cls.__new__(cls), parameter(torch.ones(4))
        again.__setstate__(state)
        again.add_param_group({"params": [other]})
        p.grad, other.grad = torch.ones(4), torch.ones(4)
        again.step()
        assert again.grad_norm is None and torch.equal(p, other) and (p < 1).all()

    def test_errors(self, cls):
        p = parameter(torch.ones(2))
        for options, error, text in (
            (dict(max_norm=-1.0), ValueError, r"max_norm must be in \[0, inf\], got -1.0"),
            (dict(max_norm=math.nan), ValueError, r"max_norm must be in \[0, inf\], got nan"),
            (dict(max_norm="1"), TypeError, "max_norm must be a number, got str '1'"),
            (dict(error_if_nonfinite=2), ValueError, "error_if_nonfinite must be one of False, True, got 2"),
        ):
            with pytest.raises(error, match=f"{cls.__name__}: {text}"):
                cls([p], lr=0.1, **options)
        with pytest.raises(ValueError, match="max_norm is one for all parameter groups"):
            cls([{"params": [p], "max_norm": 1.0}], lr=0.1)
        optimizer, p.grad = cls([p], lr=0.1, max_norm=1.0), torch.ones(2)
        optimizer.param_groups[0]["max_norm"] = 0.5  # of which nothing would come
        with pytest.raises(ValueError, match="max_norm is one for all parameter groups"):
            optimizer.step()
        assert torch.equal(p.detach(), torch.ones(2))
