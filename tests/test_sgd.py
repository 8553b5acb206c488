"""What `fr.optim.SGD` promises, and what torch's own gets wrong.

Proven here: a step equals a reference of 14 lines, bit for bit, for every option, dtype, layout, thread count
and instruction set, and the float64 reference within float32's error; it goes the way of `torch.optim.SGD`
over many steps, schedulers, closures, checkpoints in both directions, pickling and `torch.compile`; the
proximal form gives exact zeros and solves the lasso; under `GradScaler` an overflow changes nothing, in the
first step too; errors come before anything is stepped; stochastic rounding is unbiased and repeatable;
DTensor, FSDP2 and DDP give the numbers of one process; a step allocates no memory. `TestTorchFaults` asserts
the faults of torch 2.13 that fastreg is free of, each beside fastreg's right answer.
"""

import hashlib
import math
import random
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from helpers import DTYPES, on_each_instruction_set, same_values, threads
from hypothesis import given
from sgd_reference import parameter, quick, reference, rounded_reference, run, strided

import fastreg as fr

option_sets = st.fixed_dictionaries(
    dict(
        lr=st.sampled_from([0.1, 1e-3, 0.73, 1.0]),
        momentum=st.sampled_from([0.0, 0.9, 0.31]),
        dampening=st.sampled_from([0.0, 0.0, 0.1, 0.57, -0.3]),
        weight_decay=st.sampled_from([0.0, 1e-2, 0.37]),
        nesterov=st.booleans(),
        l1=st.sampled_from([0.0, 1e-2, 0.29]),
        l1_mode=st.sampled_from(["subgradient", "proximal"]),
        decoupled=st.booleans(),
        maximize=st.booleans(),
    )
).filter(lambda o: not o["nesterov"] or (o["momentum"] > 0 and o["dampening"] == 0))


class TestReference:
    @quick
    @given(option_sets, st.sampled_from(DTYPES), st.integers(0, 2**31), st.booleans())
    def test_exact(self, options, dtype, seed, tensor_lr):
        """Each stored value is the float32 (float64) result rounded once, over three steps."""
        make = torch.Generator().manual_seed(seed)
        # No dimension, none and one element, a vector of 16, two and a rest, and more than a block of 1024.
        shapes = [(), (1,), (7, 5), (16,), (33,), (0, 3), (1030,)]
        start = [torch.randn(s, generator=make).to(dtype) for s in shapes]
        start[3][::3] = 0
        grads = [[torch.randn(s, generator=make).to(dtype) for s in shapes] for _ in range(3)]
        lr = torch.tensor(options["lr"], dtype=torch.float64) if tensor_lr else options["lr"]
        params, optimizer = run(fr.optim.SGD, start, grads, **{**options, "lr": lr})
        for i, p in enumerate(params):
            w, v = rounded_reference(start[i], [g[i] for g in grads], **options)
            assert same_values(p.detach(), w), (shapes[i], p, w)
            if options["momentum"]:
                assert same_values(optimizer.state[p]["momentum_buffer"], v)

    @quick
    @given(option_sets, st.integers(0, 2**31))
    def test_float32_within_float64(self, options, seed):
        """float32 stays within its own error of the float64 reference."""
        make = torch.Generator().manual_seed(seed)
        start, grads = (
            [torch.randn(50, generator=make)],
            [[torch.randn(50, generator=make)] for _ in range(4)],
        )
        (p,), _ = run(fr.optim.SGD, start, grads, **options)
        w, v, crossed = (
            start[0].double(),
            torch.zeros(50, dtype=torch.float64),
            torch.zeros(50, dtype=torch.bool),
        )
        for i, (g,) in enumerate(grads):
            w, v = reference(w, g.double(), v, i == 0, **options)
            crossed |= w.abs() < 1e-5  # beside 0 sign(w) may differ between the two
        torch.testing.assert_close(p.detach().double()[~crossed], w[~crossed], rtol=1e-5, atol=4e-6)
        assert crossed.sum() < 25 or options["l1_mode"] == "proximal"

    @pytest.mark.parametrize("layout", ["contiguous", "transposed", "channels_last", "sliced"])
    @pytest.mark.parametrize(
        "grad_layout", ["contiguous", "transposed", "channels_last", "sliced", "expanded"]
    )
    def test_strides(self, dtype, layout, grad_layout):
        """Any strides of parameter, gradient and buffer; the memory around a parameter stays as it was."""
        shape, options = (3, 4, 5, 37), dict(lr=0.1, momentum=0.9, weight_decay=0.1, l1=0.05)
        values = torch.randn(shape).to(dtype)
        view, base = strided(values, layout)
        p = parameter(view)
        assert p.stride() == view.stride() and p.data_ptr() == view.data_ptr()
        optimizer, grads = fr.optim.SGD([p], **options), []
        outside = torch.ones_like(base, dtype=torch.bool)
        outside.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(False)
        for _ in range(3):
            g = torch.randn(shape).to(dtype)
            if grad_layout == "expanded":
                p.grad = g[:, :, :1, :1].expand(shape)
            else:
                p.grad = strided(g, grad_layout)[0]
            grads.append(p.grad.clone())
            optimizer.step()
        w, v = rounded_reference(values, grads, **options)
        assert same_values(p.detach(), w) and p.stride() == view.stride()
        assert same_values(optimizer.state[p]["momentum_buffer"], v)
        assert (base[outside] == 77).all()

    def test_buffer_of_other_strides(self):
        """A checkpoint may bring a buffer laid out otherwise than its parameter."""
        w, g, v = torch.randn(40, 30), torch.randn(40, 30), torch.randn(40, 30)
        p = parameter(w.clone())
        optimizer = fr.optim.SGD([p], lr=0.1, momentum=0.9)
        optimizer.state[p]["momentum_buffer"] = v.t().contiguous().t()
        p.grad = g.clone()
        optimizer.step()
        assert same_values(p.detach(), rounded_reference(w, [g], started=True, v=v, lr=0.1, momentum=0.9)[0])
        assert optimizer.state[p]["momentum_buffer"].stride() == (1, 40)

    def test_six_dimensions_that_do_not_merge(self):
        values = torch.randn(2, 3, 2, 3, 2, 3)
        base = torch.zeros(4, 6, 4, 6, 4, 6)
        base[::2, ::2, ::2, ::2, ::2, ::2] = values
        p = parameter(base[::2, ::2, ::2, ::2, ::2, ::2].permute(5, 0, 3, 1, 4, 2))
        p.grad = torch.randn(p.shape)
        expected = p.detach() - torch.tensor(0.1) * p.grad
        fr.optim.SGD([p], lr=0.1).step()
        assert same_values(p.detach(), expected)

    @pytest.mark.parametrize("n", [1, 15, 16, 17, 1023, 1024, 1025, 32767, 32768, 32769, 2 * 32768 + 5])
    def test_sizes(self, n, dtype):
        """Borders of the vector, of the block and of the span that one thread takes."""
        start, grads = [torch.randn(n).to(dtype)], [[torch.randn(n).to(dtype)] for _ in range(2)]
        options = dict(lr=0.1, momentum=0.9, weight_decay=0.1, l1=0.05, dampening=0.2)
        for count in (1, 2):
            with threads(count):
                (p,), _ = run(fr.optim.SGD, start, grads, **options)
            assert same_values(p.detach(), rounded_reference(start[0], [g[0] for g in grads], **options)[0])

    def test_many_tensors_of_mixed_dtype(self):
        """One group of 300 tensors of all dtypes and sizes, empty ones and a big one among them; some without
        gradient.
        """
        sizes = [random.Random(i).choice([0, 1, 3, 17, 64, 1000, 5000]) for i in range(299)] + [70001]
        start = [torch.randn(n).to(DTYPES[i % 4]) for i, n in enumerate(sizes)]
        grads = [[None if i % 7 == 0 else torch.randn_like(w) for i, w in enumerate(start)] for _ in range(2)]
        options = dict(lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01, l1=0.02, l1_mode="proximal")
        for count in (1, 2, 5):
            with threads(count):
                params, optimizer = run(fr.optim.SGD, start, grads, **options)
            for i, p in enumerate(params):
                expected = (
                    start[i]
                    if i % 7 == 0
                    else rounded_reference(start[i], [g[i] for g in grads], **options)[0]
                )
                assert same_values(p.detach(), expected), i
            assert len(optimizer.state) == sum(i % 7 != 0 for i in range(300))

    def test_groups_keep_their_own_numbers(self):
        """l1, l1_mode, weight_decay, lr, momentum, decoupled and maximize per group; defaults fill the
        rest.
        """
        start = [torch.randn(40) for _ in range(4)]
        grads = [torch.randn(40) for _ in range(4)]
        own = [
            dict(l1=0.3, lr=0.5),
            dict(weight_decay=0.4, momentum=0.5, l1_mode="proximal"),
            dict(lr=torch.tensor(0.25), decoupled=True, momentum=0.9),
            dict(maximize=True),
        ]
        default = dict(lr=0.1, l1=0.2, weight_decay=0.1)
        params = [parameter(w.clone()) for w in start]
        optimizer = fr.optim.SGD([{"params": [p], **o} for p, o in zip(params, own, strict=True)], **default)
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()
        optimizer.step()
        for p, w, g, o in zip(params, start, grads, own, strict=True):
            assert same_values(
                p.detach(), rounded_reference(w, [g], **{**default, **o, "lr": float(o.get("lr", 0.1))})[0]
            )

    def test_special_values(self, dtype):
        """NaN and inf in weight, gradient or buffer go where the formula sends them, the subnormals too."""
        odd = [
            math.nan,
            math.inf,
            -math.inf,
            0.0,
            -0.0,
            1.0,
            -1.0,
            torch.finfo(dtype).tiny / 4,
            torch.finfo(dtype).max,
        ]
        w = torch.tensor([a for a in odd for _ in odd], dtype=dtype)
        g = torch.tensor([b for _ in odd for b in odd], dtype=dtype)
        for options in (
            dict(lr=0.5),
            dict(lr=0.5, momentum=0.9, l1=0.25),
            dict(lr=0.5, l1=0.25, l1_mode="proximal"),
            dict(lr=0.5, weight_decay=0.25, nesterov=True, momentum=0.5, maximize=True),
        ):
            (p,), _ = run(fr.optim.SGD, [w], [[g]], **options)
            expected, _ = rounded_reference(w, [g], **options)
            assert expected.isnan().sum() > 15 and expected.isinf().sum() > 10
            assert same_values(p.detach(), expected)

    def test_lr_zero_changes_nothing(self, dtype):
        w = torch.randn(70).to(dtype)
        for options in (
            dict(l1=0.1),
            dict(l1=0.1, l1_mode="proximal"),
            dict(weight_decay=0.1, momentum=0.9, decoupled=True),
        ):
            (p,), _ = run(fr.optim.SGD, [w], [[torch.randn(70).to(dtype)]], lr=0.0, **options)
            assert torch.equal(p.detach(), w)

    def test_sign_of_zero_is_zero(self):
        """A weight at 0 with no gradient stays at 0 in both modes, with either sign of the zero."""
        w = torch.tensor([0.0, -0.0])
        for mode in ("subgradient", "proximal"):
            (p,), _ = run(
                fr.optim.SGD, [w], [[torch.zeros(2)]] * 3, lr=0.5, l1=0.3, l1_mode=mode, momentum=0.9
            )
            assert torch.equal(p.detach(), torch.zeros(2))

    def test_no_gradient_no_change(self):
        """Like torch: without a gradient there is no step, and so no penalty."""
        (p,), optimizer = run(
            fr.optim.SGD, [torch.ones(3)], [[None]], lr=1.0, l1=0.1, weight_decay=0.1, momentum=0.9
        )
        assert torch.equal(p.detach(), torch.ones(3)) and not optimizer.state

    @pytest.mark.parametrize("count", [2, 5])
    def test_bits_for_any_thread_count(self, dtype, count):
        # Tensors of several pieces, around one that is a part of a piece.
        start = [torch.randn(n).to(dtype) for n in (100_003, 3, 40_000)]
        grads = [[torch.randn_like(w) for w in start] for _ in range(2)]
        options = dict(lr=0.1, momentum=0.9, weight_decay=0.1, l1=0.05)
        results = []
        for n in (1, count):
            with threads(n):
                results.append(run(fr.optim.SGD, start, grads, **options)[0])
        assert all(same_values(a.detach(), b.detach()) for a, b in zip(*results, strict=True))

    @pytest.mark.slow  # two processes that import torch
    def test_bits_for_any_instruction_set(self):
        """A digest of steps over dtypes, options and layouts, from one process per instruction set."""
        printed = on_each_instruction_set(
            "import sys; sys.path.insert(0, sys.argv[1]); import test_sgd; test_sgd.digest()",
            Path(__file__).parent,
        )
        digests = {}
        for name, line in printed.items():
            got, digests[name] = line.split()
            assert got == name
        assert len(set(digests.values())) == 1
        if len(digests) < 2:
            pytest.skip(f"one instruction set only: {digests}")


def digest():
    """Printed by a process of its own: the instruction set and a hash over the results of many steps."""
    torch.manual_seed(5)
    result = hashlib.sha256()
    for dtype in DTYPES:
        w = torch.randn(40, 77).mul(torch.logspace(-6, 4, 77)).to(dtype)
        w[0, :5] = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0])
        grads = [torch.randn(40, 77).mul(torch.logspace(4, -6, 77)).to(dtype) for _ in range(2)]
        for options in (
            dict(lr=0.1),
            dict(lr=0.1, momentum=0.9, weight_decay=0.1, l1=0.05),
            dict(lr=0.1, momentum=0.9, nesterov=True, l1=0.05, l1_mode="proximal", maximize=True),
            dict(lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.1, l1=0.05, decoupled=True),
            dict(lr=0.1, stochastic_rounding=dtype != torch.float16),
        ):
            for start in (w, w.t().contiguous().t()):
                (p,), _ = run(fr.optim.SGD, [start], [[g] for g in grads], **options)
                bits = p.detach().contiguous()
                bits[bits.isnan()] = math.nan  # which NaN it is, is the processor's affair
                result.update(bits.view(torch.uint8).numpy().tobytes())
    print(fr._C.build_info()["instruction_set"], result.hexdigest())


class TestTorchParity:
    @quick
    @given(option_sets, st.sampled_from([torch.float32, torch.float64]), st.integers(0, 2**31))
    def test_same_way_as_torch(self, options, dtype, seed):
        """Without l1 and decoupled, five steps agree with torch's single-tensor implementation, buffers
        too.
        """
        options = {k: v for k, v in options.items() if k not in ("l1", "l1_mode", "decoupled")}
        make = torch.Generator().manual_seed(seed)
        start = [torch.randn(s, generator=make, dtype=dtype) for s in ((5, 7), (3,), ())]
        grads = [[torch.randn(w.shape, generator=make, dtype=dtype) for w in start] for _ in range(5)]
        ours, our_optimizer = run(fr.optim.SGD, start, grads, **options)
        theirs, their_optimizer = run(torch.optim.SGD, start, grads, foreach=False, **options)
        close = dict(rtol=1e-5, atol=1e-5) if dtype == torch.float32 else dict(rtol=1e-12, atol=1e-12)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a.detach(), b.detach(), **close)
            if options["momentum"]:
                buffers = (
                    our_optimizer.state[a]["momentum_buffer"],
                    their_optimizer.state[b]["momentum_buffer"],
                )
                torch.testing.assert_close(*buffers, **close)

    @pytest.mark.parametrize("dtype16", [torch.float16, torch.bfloat16])
    def test_16_bit_closer_than_torch(self, dtype16):
        """torch rounds between its passes; one rounding per step is nearer to the float64 truth."""
        start, options = [torch.randn(20_000).to(dtype16)], dict(lr=0.1, momentum=0.9, weight_decay=0.05)
        grads = [[torch.randn(20_000).to(dtype16)] for _ in range(8)]
        truth, v = start[0].double(), torch.zeros(20_000, dtype=torch.float64)
        for i, (g,) in enumerate(grads):
            truth, v = reference(truth, g.double(), v, i == 0, **options)
        (ours,), _ = run(fr.optim.SGD, start, grads, **options)
        (theirs,), _ = run(torch.optim.SGD, start, grads, foreach=False, **options)
        errors = [(p.detach().double() - truth).square().mean().sqrt() for p in (ours, theirs)]
        assert errors[0] < 0.95 * errors[1]
        assert errors[0] < 0.1

    def test_l1_as_users_write_it(self):
        """The subgradient form is torch's SGD with l1 * sign(w) added to the gradient."""
        start, grads = [torch.randn(30)], [[torch.randn(30)] for _ in range(4)]
        options = dict(lr=0.05, momentum=0.9, weight_decay=0.01)
        (ours,), _ = run(fr.optim.SGD, start, grads, l1=0.1, **options)
        theirs = parameter(start[0].clone())
        optimizer = torch.optim.SGD([theirs], **options)
        for (g,) in grads:
            theirs.grad = g + 0.1 * theirs.detach().sign()
            optimizer.step()
        torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=1e-5, atol=1e-6)

    def test_signature_is_torchs(self):
        """The same positional order and defaults, so that one can stand for the other."""
        import inspect

        ours, theirs = (inspect.signature(cls.__init__).parameters for cls in (fr.optim.SGD, torch.optim.SGD))
        positional = [p for p in theirs.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
        for name, p in theirs.items():
            assert name in ours and ours[name].default == p.default
        assert list(ours)[: len(positional)] == [p.name for p in positional]
        (p,), _ = run(
            lambda params: fr.optim.SGD(params, 0.5, 0.0, 0.0, 0.25), [torch.ones(1)], [[torch.ones(1)]]
        )
        assert p.item() == 1 - 0.5 * 1.25

    @pytest.mark.parametrize("tensor_lr", [False, True])
    @pytest.mark.parametrize("name", ["cosine", "onecycle", "lambda"])
    def test_schedulers(self, name, tensor_lr):
        """The learning rate (OneCycleLR: the momentum too) follows the schedule, as a float and as a tensor
        changed in place.
        """
        make = {
            "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=7),
            "onecycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.3, total_steps=9),
            "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: np.float32(0.5) ** t),
        }[name]
        start, grads = torch.randn(20), [torch.randn(20) for _ in range(8)]
        results, rates = [], []
        for cls in (fr.optim.SGD, torch.optim.SGD):
            p = parameter(start.clone())
            lr = torch.tensor(0.1) if tensor_lr else 0.1
            optimizer = cls([p], lr=lr, momentum=0.9, weight_decay=0.01)
            scheduler = make(optimizer)
            for g in grads:
                p.grad = g.clone()
                optimizer.step()
                scheduler.step()
                rates.append(float(optimizer.param_groups[0]["lr"]))
            results.append(p.detach())
        assert rates[:8] == rates[8:] and len(set(rates[:8])) > 4
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)

    def test_tensor_lr_is_read_at_every_step(self):
        lr, p = torch.tensor(0.5), parameter(torch.ones(2))
        optimizer = fr.optim.SGD([p], lr=lr)
        p.grad = torch.ones(2)
        optimizer.step()
        lr.fill_(0.25)
        optimizer.step()
        assert torch.equal(p.detach(), torch.full((2,), 0.25))
        assert torch.equal(lr, torch.tensor(0.25))


class TestProximal:
    def test_exact_zeros(self, dtype):
        """Weights within lr * l1 of zero become +0.0 exactly, the others come that much nearer."""
        w = torch.tensor([0.3, -0.3, 0.05, -0.05, 0.1, -0.1, 0.0, 5.0]).to(dtype)
        (p,), _ = run(fr.optim.SGD, [w], [[torch.zeros(8).to(dtype)]], lr=0.5, l1=0.25, l1_mode="proximal")
        expected = (w.double().sign() * (w.double().abs() - 0.125).clamp(min=0)).to(dtype)
        assert torch.equal(p.detach() == 0, torch.tensor([False, False, True, True, True, True, True, False]))
        torch.testing.assert_close(p.detach(), expected)
        assert not p.detach()[p.detach() == 0].signbit().any()

    @pytest.mark.parametrize(
        ("options", "factor"),
        [
            (dict(), 1.0),
            (dict(decoupled=True), 1.0),
            (dict(momentum=0.9), 0.1),
            (dict(momentum=0.9, nesterov=True), 0.1),
            (dict(momentum=0.9, dampening=0.9), 1.0),
        ],
    )
    def test_lasso(self, options, factor):
        """On 1/2 |w - a|^2 the steps end at the soft-threshold of a, zeros exact: the lasso with an
        orthonormal design.

        With momentum the penalty has (1 - momentum) / (1 - dampening) of its strength, as the docstring says.
        """
        a = torch.randn(40, dtype=torch.float64)
        p = parameter(torch.randn(40, dtype=torch.float64))
        optimizer = fr.optim.SGD([p], lr=0.1, l1=0.5 / factor, l1_mode="proximal", **options)
        for _ in range(1500):
            p.grad = p.detach() - a
            optimizer.step()
        expected = a.sign() * (a.abs() - 0.5).clamp(min=0)
        torch.testing.assert_close(p.detach(), expected, rtol=0, atol=1e-9)
        assert torch.equal(p.detach() == 0, expected == 0) and 5 < (p == 0).sum() < 35

    def test_subgradient_reaches_no_zero(self):
        """What the proximal form is for: the subgradient form hovers about zero."""
        a = torch.full((20,), 0.1).double()
        p = parameter(torch.randn(20, dtype=torch.float64))
        optimizer = fr.optim.SGD([p], lr=0.1, l1=0.5)
        for _ in range(500):
            p.grad = p.detach() - a
            optimizer.step()
        assert (p != 0).all() and (p.abs() < 0.1).all()

    def test_decoupled_with_proximal(self):
        """Weight decay beside the momentum, then the threshold; the buffer holds the bare gradient."""
        w, g = torch.tensor([2.0]), torch.tensor([1.0])
        (p,), optimizer = run(
            fr.optim.SGD,
            [w],
            [[g]],
            lr=0.5,
            momentum=0.5,
            weight_decay=0.25,
            l1=0.125,
            l1_mode="proximal",
            decoupled=True,
        )
        assert p.item() == 2 - 0.5 * (1 + 0.5) - 0.5 * 0.125
        assert optimizer.state[p]["momentum_buffer"].item() == 1.0

    def test_decoupled_penalty_passes_by_the_momentum(self):
        """With a gradient of 0 the buffer stays 0, and the weight shrinks by lr * (l2 w + l1 sign w) at every
        step.
        """
        w = torch.tensor([2.0, -1.0], dtype=torch.float64)
        grads = [[torch.zeros(2, dtype=torch.float64)]] * 3
        (p,), optimizer = run(
            fr.optim.SGD, [w], grads, lr=0.5, momentum=0.9, weight_decay=0.25, l1=0.125, decoupled=True
        )
        for _ in range(3):
            w = w - 0.5 * (0.25 * w + 0.125 * w.sign())
        torch.testing.assert_close(p.detach(), w, rtol=1e-14, atol=0)
        assert torch.equal(optimizer.state[p]["momentum_buffer"], torch.zeros(2, dtype=torch.float64))
