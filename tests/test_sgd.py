"""What `fr.optim.SGD` promises, and what torch's own gets wrong.

Proven here: a step equals a reference of 14 lines, bit for bit, for every option, dtype, layout, thread count
and instruction set, and the float64 reference within float32's error; it goes the way of `torch.optim.SGD`
over many steps, schedulers, closures, checkpoints in both directions, pickling and `torch.compile`; the
proximal form gives exact zeros and solves the lasso; under `GradScaler` an overflow changes nothing, in the
first step too; errors come before anything is stepped; stochastic rounding is unbiased and repeatable;
DTensor, FSDP2 and DDP give the numbers of one process; a step allocates no memory. `TestTorchFaults` asserts
the faults of torch 2.13 that fastreg is free of, each beside fastreg's right answer.
"""

import contextlib
import copy
import hashlib
import io
import math
import os
import pickle
import random
import subprocess
import sys
import warnings

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

import fastreg as fr

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
OP = torch.ops.fastreg.sgd_.default


def reference(w, g, v, first, *, lr=1e-3, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False, l1=0.0,
              l1_mode="subgradient", decoupled=False, maximize=False):  # fmt: skip
    """One step in the dtype of w, g, v, every operation rounded as IEEE says; gives the new w and v."""
    lr, momentum, take, l2, l1 = (w.new_tensor(x) for x in (lr, momentum, 1 - dampening, weight_decay, l1))
    penalties = [l2 * w] if l2 else []
    penalties += [l1 * w.sign()] if l1 and l1_mode == "subgradient" else []
    g = -g if maximize else g
    g = g if decoupled else sum(penalties, g)
    if momentum:
        v = g if first else momentum * v + take * g
        g = g + momentum * v if nesterov else v
    w = w - lr * (g + sum(penalties) if decoupled else g)
    if l1 and l1_mode == "proximal":
        w = w.sign() * (w.abs() - lr * l1).clamp(min=0)
    return w, v


def rounded_reference(w, grads, started=False, v=None, **options):
    """Steps over `grads`, computed in float32 (float64 for float64), w and v rounded once a step."""
    wide = torch.float64 if w.dtype == torch.float64 else torch.float32
    v = torch.zeros_like(w) if v is None else v
    for g in grads:
        new_w, new_v = reference(w.to(wide), g.to(wide), v.to(wide), not started, **options)
        w, v, started = new_w.to(w.dtype), new_v.to(w.dtype), True
    return w, v


@contextlib.contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def parameter(data):
    return torch.nn.Parameter(data.detach())


def run(cls, start, grads, after=None, **options):
    """Step copies of the tensors `start` over `grads` (one list a step); gives the parameters and the
    optimiser.
    """
    params = [parameter(w.clone()) for w in start]
    optimizer = cls(params, **options)
    for step_grads in grads:
        for p, g in zip(params, step_grads, strict=True):
            p.grad = None if g is None else g.clone()
        optimizer.step()
        if after:
            after(optimizer)
    return params, optimizer


def same_bits(a, b):
    """Equal shape, dtype and values, NaN equal to NaN; -0 and 0 are one value."""
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.isnan(), b.isnan())
        and torch.equal(a.nan_to_num(), b.nan_to_num())
    )


def strided(values, layout):
    """`values` with other strides, inside memory whose rest is filled with 77; gives the tensor and that
    memory.
    """
    if layout == "contiguous":
        base = torch.full((values.numel() + 5,), 77.0, dtype=values.dtype)
        view = base[3 : 3 + values.numel()].view(values.shape)  # an odd offset: no vector is aligned
    elif layout == "transposed":
        order = tuple(range(values.dim()))[::-1]
        base = torch.full([values.shape[d] for d in order], 77.0, dtype=values.dtype)
        view = base.permute(order)
    elif layout == "channels_last":
        base = view = torch.full_like(values, 77.0, memory_format=torch.channels_last)
    elif layout == "sliced":
        base = torch.full([2 * n + 1 for n in values.shape], 77.0, dtype=values.dtype)
        view = base[tuple(slice(1, None, 2) for _ in values.shape)]
    view.copy_(values)
    return view, base


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
quick = settings(deadline=None, max_examples=60)


class TestReference:
    @quick
    @given(option_sets, st.sampled_from(DTYPES), st.integers(0, 2**31), st.booleans())
    def test_exact(self, options, dtype, seed, tensor_lr):
        """Each stored value is the float32 (float64) result rounded once, over three steps."""
        make = torch.Generator().manual_seed(seed)
        shapes = [(), (1,), (7, 5), (16,), (33,), (0, 3), (1030,)]
        start = [torch.randn(s, generator=make).to(dtype) for s in shapes]
        start[3][::3] = 0
        grads = [[torch.randn(s, generator=make).to(dtype) for s in shapes] for _ in range(3)]
        lr = torch.tensor(options["lr"], dtype=torch.float64) if tensor_lr else options["lr"]
        params, optimizer = run(fr.optim.SGD, start, grads, **{**options, "lr": lr})
        for i, p in enumerate(params):
            w, v = rounded_reference(start[i], [g[i] for g in grads], **options)
            assert same_bits(p.detach(), w), (shapes[i], p, w)
            if options["momentum"]:
                assert same_bits(optimizer.state[p]["momentum_buffer"], v)

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
        assert same_bits(p.detach(), w) and p.stride() == view.stride()
        assert same_bits(optimizer.state[p]["momentum_buffer"], v)
        assert (base[outside] == 77).all()

    def test_buffer_of_other_strides(self):
        """A checkpoint may bring a buffer laid out otherwise than its parameter."""
        w, g, v = torch.randn(40, 30), torch.randn(40, 30), torch.randn(40, 30)
        p = parameter(w.clone())
        optimizer = fr.optim.SGD([p], lr=0.1, momentum=0.9)
        optimizer.state[p]["momentum_buffer"] = v.t().contiguous().t()
        p.grad = g.clone()
        optimizer.step()
        assert same_bits(p.detach(), rounded_reference(w, [g], started=True, v=v, lr=0.1, momentum=0.9)[0])
        assert optimizer.state[p]["momentum_buffer"].stride() == (1, 40)

    def test_six_dimensions_that_do_not_merge(self):
        values = torch.randn(2, 3, 2, 3, 2, 3)
        base = torch.zeros(4, 6, 4, 6, 4, 6)
        base[::2, ::2, ::2, ::2, ::2, ::2] = values
        p = parameter(base[::2, ::2, ::2, ::2, ::2, ::2].permute(5, 0, 3, 1, 4, 2))
        p.grad = torch.randn(p.shape)
        expected = p.detach() - torch.tensor(0.1) * p.grad
        fr.optim.SGD([p], lr=0.1).step()
        assert same_bits(p.detach(), expected)

    @pytest.mark.parametrize("n", [1, 15, 16, 17, 1023, 1024, 1025, 32767, 32768, 32769, 2 * 32768 + 5])
    def test_sizes(self, n, dtype):
        """Borders of the vector, of the tile and of the piece that one thread takes."""
        start, grads = [torch.randn(n).to(dtype)], [[torch.randn(n).to(dtype)] for _ in range(2)]
        options = dict(lr=0.1, momentum=0.9, weight_decay=0.1, l1=0.05, dampening=0.2)
        for count in (1, 2):
            with threads(count):
                (p,), _ = run(fr.optim.SGD, start, grads, **options)
            assert same_bits(p.detach(), rounded_reference(start[0], [g[0] for g in grads], **options)[0])

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
                assert same_bits(p.detach(), expected), i
            assert len(optimizer.state) == sum(i % 7 != 0 for i in range(300))

    def test_groups_keep_their_own_numbers(self):
        """l1, l1_mode, weight_decay, lr, momentum, decoupled and maximize per group; defaults fill the rest."""
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
            assert same_bits(
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
            assert same_bits(p.detach(), expected)

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
        start = [torch.randn(n).to(dtype) for n in (100_003, 3, 40_000)]
        grads = [[torch.randn_like(w) for w in start] for _ in range(2)]
        options = dict(lr=0.1, momentum=0.9, weight_decay=0.1, l1=0.05)
        results = []
        for n in (1, count):
            with threads(n):
                results.append(run(fr.optim.SGD, start, grads, **options)[0])
        assert all(same_bits(a.detach(), b.detach()) for a, b in zip(*results, strict=True))

    @pytest.mark.slow  # two processes that import torch
    def test_bits_for_any_instruction_set(self):
        """A digest of steps over dtypes, options and layouts, from one process per instruction set."""
        available = fr._C.build_info()["instruction_sets"].split(",")
        digests = {}
        for name in available:
            environment = {**os.environ, "FASTREG_CPU_CAPABILITY": name, "OMP_NUM_THREADS": "1"}
            command = [sys.executable, os.path.abspath(__file__), "digest"]
            result = subprocess.run(command, env=environment, capture_output=True, text=True)
            if "that this machine can run" in result.stderr:
                continue
            assert result.returncode == 0, result.stderr
            got, digests[name] = result.stdout.split()
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
        """Without l1 and decoupled, five steps agree with torch's single-tensor implementation, buffers too."""
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
        """One tensor in two modules, or listed twice, is stepped and penalised once, without torch's warning."""
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
        assert all(same_bits(a, b.detach()) for a, b in zip(middle, other.parameters(), strict=True))
        assert again.param_groups[0]["l1_mode"] == "proximal" and again.param_groups[0]["lr"] == 0.1
        assert all(same_bits(a, b.detach()) for a, b in zip(middle, model.parameters(), strict=True))

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
        assert same_bits(p.detach(), rounded_reference(start, grads, **options)[0])

    def test_empty_state_of_torch(self):
        """A state dict taken before torch's first step has no buffers; the first step is then a first step."""
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
        """The step counts as an in-place change: a graph that saved the old weight refuses to run backward."""
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
        assert same_bits(p.detach(), rounded_reference(start, [late, late], **options)[0])

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


def scaler_with(scale):
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10**6)
    scaler.scale(torch.ones(()))  # its scale tensor is made lazily
    return scaler


class TestGradScaler:
    @pytest.mark.parametrize("dampening", [0.0, 0.5])
    @pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
    def test_overflow_in_the_first_step(self, bad, dampening):
        """A skipped first step leaves parameters, buffers and flags; what follows is as if it had not been."""
        start, grads = torch.randn(1000), [torch.randn(1000) for _ in range(3)]
        options = dict(lr=0.1, momentum=0.9, dampening=dampening, weight_decay=0.1, l1=0.01)
        p, clean = parameter(start.clone()), parameter(torch.ones(3))
        optimizer, scaler = (
            fr.optim.SGD([{"params": [p]}, {"params": [clean], "lr": 0.5}], **options),
            scaler_with(256.0),
        )
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
        assert same_bits(p.detach(), w) and same_bits(optimizer.state[p]["momentum_buffer"], v)

    def test_overflow_in_a_later_step(self, dtype):
        start, grads = torch.randn(40).to(dtype), [torch.randn(40).to(dtype) for _ in range(4)]
        options = dict(lr=0.1, momentum=0.9, dampening=0.25, l1=0.01, l1_mode="proximal")
        p = parameter(start.clone())
        optimizer, scaler = fr.optim.SGD([p], **options), scaler_with(4.0)
        for i, g in enumerate(grads):
            p.grad = torch.full_like(g, math.inf) if i == 2 else g * scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
        w, v = rounded_reference(start, grads[:2] + grads[3:], **options)
        assert same_bits(p.detach(), w) and same_bits(optimizer.state[p]["momentum_buffer"], v)

    @pytest.mark.parametrize("scale", [1.0, 3.0, 65536.0, 0.01])
    def test_scale(self, scale):
        """The gradient is divided by the scale, to the last bit as torch does it: times the reciprocal
        rounded to float32.
        """
        w, g = torch.randn(500), torch.randn(500) * scale
        p = parameter(w.clone())
        optimizer, scaler = fr.optim.SGD([p], lr=0.5, momentum=0.9), scaler_with(scale)
        p.grad = g.clone()
        scaler.step(optimizer)
        reciprocal = torch.tensor(scale).double().reciprocal().float()
        assert same_bits(p.detach(), w - 0.5 * (g * reciprocal))
        assert torch.equal(p.grad, g)  # only read
        assert not hasattr(optimizer, "grad_scale") and not hasattr(optimizer, "found_inf")

    def test_float16_gradients_unscale_in_float32(self):
        """Small gradients live under the scale and would be flushed in float16; unscaling happens in float32."""
        p = parameter(torch.zeros(10, dtype=torch.float16))
        optimizer, scaler = fr.optim.SGD([p], lr=65536.0), scaler_with(65536.0)
        p.grad = torch.full((10,), 2.0**-10, dtype=torch.float16)  # truly 2^-26, below float16's least number
        scaler.step(optimizer)
        assert torch.equal(p.detach(), torch.full((10,), -(2.0**-10), dtype=torch.float16))

    def test_user_unscales_and_clips(self):
        """scaler.unscale_ and clipping first: the gradients are then taken as they are, and an overflow still
        skips.
        """
        w, g = torch.randn(50), torch.randn(50)
        p = parameter(w.clone())
        optimizer, scaler = fr.optim.SGD([p], lr=0.5, momentum=0.9), scaler_with(1024.0)
        p.grad = g * 1024.0
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_([p], 0.5)
        clipped = p.grad.clone()
        assert clipped.norm() < 0.51
        scaler.step(optimizer)
        scaler.update()
        assert same_bits(p.detach(), w - 0.5 * clipped)
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

    def test_training_loop(self):
        """Two groups, autocast, a scaler: the same weights as torch's unfused SGD, which unscales beforehand."""
        results = []
        for cls in (fr.optim.SGD, torch.optim.SGD):
            torch.manual_seed(3)
            model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
            groups = [
                {"params": list(model[0].parameters()), "lr": 0.05},
                {"params": list(model[2].parameters())},
            ]
            optimizer, scaler = (
                cls(groups, lr=0.1, momentum=0.9, weight_decay=0.01),
                torch.amp.GradScaler("cpu"),
            )
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
            (
                dict(lr=torch.ones(1, dtype=torch.int64)),
                ValueError,
                "float32 or float64 tensor of one element, got torch.int64",
            ),
            (dict(lr=torch.tensor(math.nan)), ValueError, "lr must be finite and at least 0, got nan"),
            (dict(lr=torch.tensor(-1.0)), ValueError, "lr must be finite and at least 0, got -1.0"),
            (dict(momentum=math.nan), ValueError, "momentum must be finite"),
            (dict(momentum=-1), ValueError, "momentum must be finite and at least 0, got -1"),
            (dict(momentum="a"), TypeError, "momentum must be a number"),
            (dict(dampening=math.nan), ValueError, "dampening must be finite, got nan"),
            (dict(dampening=-math.inf), ValueError, "dampening must be finite, got -inf"),
            (dict(weight_decay=math.inf), ValueError, "weight_decay must be finite"),
            (dict(weight_decay=-1e-9), ValueError, "weight_decay must be finite and at least 0"),
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
        stepped.
        """
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
        p = parameter(torch.ones(4, 3))
        p.grad = torch.eye(4, 3).to_sparse()
        self.check_refused(
            p,
            TypeError,
            "SGD: gradients must be dense, got torch.sparse_coo; use sparse=False or torch.optim.SGD",
        )
        embedding = torch.nn.Embedding(5, 2, sparse=True)
        embedding(torch.tensor([1])).sum().backward()
        self.check_refused(embedding.weight, TypeError, "sparse=False")

    def test_gradient_of_another_dtype(self):
        p = parameter(torch.ones(3, dtype=torch.bfloat16))
        p.grad_dtype = None
        p.grad = torch.ones(3)
        self.check_refused(
            p,
            ValueError,
            "SGD: a gradient must have the dtype of its parameter, torch.bfloat16, got torch.float32",
        )

    def test_complex_parameter(self):
        p = parameter(torch.ones(3, dtype=torch.complex64))
        p.grad = torch.ones(3, dtype=torch.complex64)
        self.check_refused(
            p, TypeError, "float32, float64, float16 or bfloat16, got torch.complex64; use torch.optim.SGD"
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
            lr=0.1,
            momentum=0.9,
            dampening=0.0,
        )
        values.update(
            weight_decay=0.0, l1=0.0, nesterov=False, proximal=False, decoupled=False, maximize=False
        )
        names = list(values)
        values.update(change)
        with pytest.raises(ValueError, match=text):
            OP(*[values[n] for n in names], **{n: v for n, v in values.items() if n not in names})
        assert torch.equal(p, torch.ones(3))


class TestStochasticRounding:
    """bfloat16 has 8 bits: between 1/2 and 1 its numbers lie 2^-8 apart, and rounding to nearest loses an
    update below 2^-9.
    """

    def step(self, start, update, layout=None, seed=1, **options):
        p = parameter(start if layout is None else strided(start, layout)[0])
        p.grad = update
        torch.manual_seed(seed)
        fr.optim.SGD([p], lr=1.0, stochastic_rounding=True, **options).step()
        return p.detach()

    @pytest.mark.parametrize("share", [0.5, 0.25, 1 / 16, 3 / 8, 2**-7])
    def test_unbiased(self, share):
        """A share of the gap between neighbours is crossed by that share of the elements, within 5 standard
        deviations.
        """
        n = 200_000
        start = torch.full((n,), 0.75, dtype=torch.bfloat16)
        update = torch.full((n,), share * 2**-8, dtype=torch.bfloat16)
        result = self.step(start, update)
        down = torch.tensor(0.75 - 2**-8, dtype=torch.bfloat16)
        assert set(result.unique().tolist()) == {0.75, down.item()}
        count, deviation = (result == down).sum().item(), math.sqrt(n * share * (1 - share))
        assert abs(count - n * share) < 5 * deviation

    def test_small_steps_count(self):
        """200 steps of a sixteenth of a gap move the mean by 12.5 gaps; rounded to nearest nothing moves."""
        start, update = (
            torch.full((4000,), 0.75, dtype=torch.bfloat16),
            torch.full((4000,), 2.0**-12, dtype=torch.bfloat16),
        )
        for stochastic in (True, False):
            p = parameter(start.clone())
            optimizer = fr.optim.SGD([p], lr=1.0, stochastic_rounding=stochastic)
            for _ in range(200):
                p.grad = update
                optimizer.step()
            moved = (0.75 - p.detach().double().mean()) * 2**8
            assert abs(moved - 12.5) < 0.3 if stochastic else moved == 0

    @quick
    @given(st.integers(0, 2**31))
    def test_neighbours_only(self, seed):
        """The result is one of the two bfloat16 numbers about the float32 result, and that number itself
        where it is one.
        """
        make = torch.Generator().manual_seed(seed)
        scale = torch.logspace(-30, 30, 300)
        start = (torch.randn(300, generator=make) * scale).bfloat16()
        update = (torch.randn(300, generator=make) * scale).bfloat16()
        exact = start.float() - update.float()
        result = self.step(start.clone(), update, seed=seed)
        toward_zero = (exact.view(torch.int32) & -65536).view(torch.float32)
        away = ((exact.view(torch.int32) & -65536) + 65536).view(torch.float32)
        is_exact = toward_zero == exact
        assert ((result.float() == toward_zero) | (result.float() == away)).all()
        assert (result.float() == exact)[is_exact].all()
        assert not is_exact.all()

    def test_exact_values_stay(self):
        start = torch.randn(5000).bfloat16()
        assert torch.equal(self.step(start.clone(), torch.zeros(5000, dtype=torch.bfloat16)), start)

    def test_inf_and_nan_are_kept(self):
        start = torch.tensor([math.inf, -math.inf, math.nan, 1.0] * 500).bfloat16()
        result = self.step(start.clone(), torch.zeros_like(start))
        assert same_bits(result, start)

    def test_repeatable(self):
        start, update = torch.randn(3000).bfloat16(), torch.randn(3000).bfloat16() * 1e-3
        first, again, other = (self.step(start.clone(), update, seed=s) for s in (1, 1, 2))
        assert torch.equal(first, again)
        assert 0.1 < (first != other).float().mean() < 0.7

    def test_seed_moves_on(self):
        """Two steps draw different bits."""
        p = parameter(torch.full((1000,), 0.75, dtype=torch.bfloat16))
        optimizer, results = fr.optim.SGD([p], lr=1.0, stochastic_rounding=True), []
        for _ in range(2):
            with torch.no_grad():
                p.fill_(0.75)
            p.grad = torch.full((1000,), 2.0**-9, dtype=torch.bfloat16)
            optimizer.step()
            results.append(p.detach().clone())
        assert 0.3 < (results[0] != results[1]).float().mean() < 0.7

    @pytest.mark.parametrize("same_group", [True, False])
    def test_tensors_are_independent(self, same_group):
        """Equal tensors with equal gradients get different bits, in one group and in two."""
        params = [parameter(torch.full((4000,), 0.75, dtype=torch.bfloat16)) for _ in range(3)]
        for p in params:
            p.grad = torch.full((4000,), 2.0**-9, dtype=torch.bfloat16)
        groups = params if same_group else [{"params": [p]} for p in params]
        fr.optim.SGD(groups, lr=1.0, stochastic_rounding=True).step()
        for a, b in ((0, 1), (0, 2), (1, 2)):
            assert 0.45 < (params[a] != params[b]).float().mean() < 0.55

    @pytest.mark.parametrize("layout", ["contiguous", "transposed", "channels_last", "sliced"])
    @pytest.mark.parametrize("momentum", [0.0, 0.9])
    def test_bits_for_any_layout(self, layout, momentum):
        """What an element draws depends on its row-major index alone."""
        start, update = torch.randn(5, 6, 7, 11).bfloat16(), torch.randn(5, 6, 7, 11).bfloat16() * 1e-2
        plain = self.step(start.clone(), update, momentum=momentum)
        assert same_bits(self.step(start, update, layout, momentum=momentum), plain)
        assert same_bits(self.step(start.clone(), strided(update, layout)[0], momentum=momentum), plain)
        assert same_bits(
            self.step(start, strided(update, layout)[0], layout, momentum=momentum), plain
        )  # both: flat otherwise

    def test_bits_for_any_thread_count(self):
        start, update = torch.randn(200_001).bfloat16(), torch.randn(200_001).bfloat16() * 1e-3
        results = []
        for count in (1, 2, 5):
            with threads(count):
                results.append(self.step(start.clone(), update))
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])

    def test_momentum_is_rounded_to_nearest(self):
        g = torch.randn(500).bfloat16()
        p = parameter(torch.randn(500).bfloat16())
        p.grad = g
        optimizer = fr.optim.SGD([p], lr=0.1, momentum=0.9, stochastic_rounding=True)
        optimizer.step()
        optimizer.step()
        assert torch.equal(optimizer.state[p]["momentum_buffer"], (0.9 * g.float() + g.float()).bfloat16())

    @pytest.mark.parametrize("wide", [torch.float32, torch.float64])
    def test_no_effect_on_wide_types(self, wide):
        w, g = torch.randn(300, dtype=wide), torch.randn(300, dtype=wide)
        results = [
            run(fr.optim.SGD, [w], [[g]], lr=0.1, stochastic_rounding=on)[0][0] for on in (True, False)
        ]
        assert torch.equal(*results)

    def test_proximal_zeros_stay_zero(self):
        start = torch.tensor([0.01, -0.01, 0.0] * 300).bfloat16()
        assert (self.step(start, torch.zeros_like(start), l1=0.25, l1_mode="proximal") == 0).all()


class TestCompileAndOp:
    @pytest.mark.parametrize(
        "options",
        [
            dict(l1=0.01, momentum=0.9),
            dict(l1=0.01, l1_mode="proximal", momentum=0.9, dampening=0.5),
            dict(weight_decay=0.1, stochastic_rounding=True),
        ],
    )
    @pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
    def test_compiled_step(self, backend, options):
        """`torch.compile(fullgraph=True)` of a step gives the numbers of eager, buffers and flags included."""
        torch._dynamo.reset()
        results = []
        for compiled in (False, True):
            torch.manual_seed(1)
            dtype = torch.bfloat16 if options.get("stochastic_rounding") else torch.float32
            model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).to(
                dtype
            )
            optimizer = fr.optim.SGD(model.parameters(), lr=torch.tensor(0.1), **options)
            step = (
                torch.compile(lambda o=optimizer: o.step(), backend=backend, fullgraph=True)
                if compiled
                else optimizer.step
            )
            for i in range(4):
                torch.manual_seed(i)
                optimizer.zero_grad()
                model(torch.randn(16, 4, dtype=dtype)).pow(2).sum().backward()
                with torch.no_grad():
                    optimizer.param_groups[0]["lr"].fill_(0.1 / (i + 1))
                step()
            buffers = [b for state in optimizer.state.values() for b in state.values()]
            results.append([p.detach() for p in model.parameters()] + buffers)
        if (
            options.get("stochastic_rounding") and backend == "inductor"
        ):  # inductor has random numbers of its own
            assert all(torch.allclose(a, b, atol=0.05) for a, b in zip(*results, strict=True))
        else:
            assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

    def test_compiled_train_step(self):
        """A compiled function of forward, backward and opt.step(), with a schedule that changes a float lr
        between the calls.
        """
        torch._dynamo.reset()
        results = []
        for compiled in (False, True):
            torch.manual_seed(1)
            model = torch.nn.Linear(4, 2)
            optimizer = fr.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, l1=0.01)
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)

            def train(x, model=model, optimizer=optimizer):
                loss = model(x).pow(2).mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                return loss.detach()

            train = torch.compile(train, backend="aot_eager") if compiled else train
            losses = []
            for _ in range(5):
                losses.append(train(torch.randn(8, 4)))
                scheduler.step()
            results.append(losses + [p.detach() for p in model.parameters()])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)

    @pytest.mark.parametrize(
        "flags", [(False, False, False, False), (False, True, True, True), (True, False, True, False)]
    )
    def test_opcheck(self, flags, dtype):
        make = lambda: [torch.randn(3, 4).to(dtype), torch.randn(5).to(dtype)]  # noqa: E731
        args = (make(), make(), make(), [], 0.1, 0.9, 0.0, 0.01, 0.02, *flags)
        torch.library.opcheck(OP, args)
        scaled = dict(grad_scale=torch.tensor(2.0), found_inf=torch.zeros(1), lr_tensor=torch.tensor(0.1))
        started = [torch.zeros(()), torch.ones(())]
        torch.library.opcheck(OP, (make(), make(), make(), started, 0.0, 0.9, 0.3, 0.0, 0.02, *flags), scaled)
        torch.library.opcheck(
            OP,
            (make(), make(), [], [], 0.1, 0.0, 0.0, 0.0, 0.0, *flags),
            dict(seed=torch.zeros(1, dtype=torch.int64)),
        )

    def test_op_sets_the_flags(self):
        """momentum_started becomes 1 with the step and stays as it is when the step is skipped."""
        for found, expected in ((0.0, [1.0, 1.0]), (1.0, [0.0, 1.0])):
            flags = [torch.zeros(()), torch.ones(())]
            lists = [[torch.ones(3), torch.ones(0)] for _ in range(3)]
            OP(
                *lists,
                flags,
                0.1,
                0.9,
                0.5,
                0.0,
                0.0,
                False,
                False,
                False,
                False,
                found_inf=torch.tensor(found),
            )
            assert [f.item() for f in flags] == expected


class TestMemory:
    def allocated(self, step):
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profile:
            step()
        return max((e.self_cpu_memory_usage for e in profile.key_averages()), default=0)

    @pytest.mark.parametrize("layout", ["contiguous", "transposed"])
    def test_no_allocation_of_parameter_size(self, layout):
        """After the first step, which makes the buffers, a step allocates no tensor of a parameter's size."""
        params = [parameter(strided(torch.randn(300, 400), layout)[0]) for _ in range(2)]
        optimizer = fr.optim.SGD(params, lr=0.1, momentum=0.9, dampening=0.1, weight_decay=0.1, l1=0.1)
        for p in params:
            p.grad = torch.randn(300, 400)
        size = 300 * 400 * 4
        assert self.allocated(optimizer.step) >= 2 * size  # so this does measure
        assert self.allocated(optimizer.step) < 4096
        buffers = [state["momentum_buffer"] for state in optimizer.state.values()]
        assert len(buffers) == 2 and all(
            b.shape == (300, 400) and b.stride() == params[0].stride() for b in buffers
        )

    def test_without_momentum_nothing_at_all(self):
        p = parameter(torch.randn(300, 400))
        optimizer = fr.optim.SGD([p], lr=0.1, weight_decay=0.1, l1=0.1, l1_mode="proximal")
        p.grad = torch.randn(300, 400)
        assert self.allocated(optimizer.step) < 4096 and not optimizer.state


@pytest.mark.skipif(fr._registry.fast is None, reason=f"no C++ path: {fr._registry.why_not_fast}")
class TestBothPaths:
    """The step as Python collects it and as C++ does."""

    class Spy:
        taken = 0

        def sgd(self, groups, state):
            result = fr._registry.fast.sgd(groups, state)
            self.taken += result is True
            return result

    def both(self, monkeypatch, run):
        """What `run` gives must not depend on the path; how many steps C++ took."""
        spy, results = self.Spy(), []
        for path in (None, spy):
            monkeypatch.setattr(fr.optim, "fast", path)
            results.append(run())
        for a, b in zip(*results, strict=True):
            assert a.stride() == b.stride() and same_bits(a.contiguous(), b.contiguous())
        return spy.taken

    @pytest.mark.parametrize(
        "layout", ["contiguous", "transposed", "channels_last", "no dimensions", "empty"]
    )
    @pytest.mark.parametrize(
        "options",
        [
            dict(),
            dict(momentum=0.9),
            dict(momentum=0.9, nesterov=True, weight_decay=0.1, l1=0.05),
            dict(momentum=0.5, l1=0.05, l1_mode="proximal", maximize=True),
            dict(momentum=0.9, weight_decay=0.1, l1=0.05, decoupled=True),
        ],
        ids=str,
    )
    def test_the_same_bits(self, monkeypatch, dtype, options, layout):
        def tensor(seed):
            t = torch.randn(
                6, 5, 4, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
            ).to(dtype)
            return {
                "contiguous": t,
                "transposed": t.transpose(0, 3),
                "channels_last": t.to(memory_format=torch.channels_last),
                "no dimensions": t[0, 0, 0, 0].clone(),
                "empty": t[:, :0],
            }[layout]

        def run():
            params = [parameter(tensor(i)) for i in range(3)]
            groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.01, "l1": 0.3}]
            optimizer = fr.optim.SGD(groups, lr=0.1, **options)
            for step in range(3):
                for i, p in enumerate(params):
                    p.grad = None if (i, step) == (1, 0) else tensor(10 * step + i + 5)
                optimizer.step()
            return [p.detach() for p in params] + [s["momentum_buffer"] for s in optimizer.state.values()]

        # The first step makes the buffers, in Python; so does the first of the parameter whose gradient comes
        # late.
        assert self.both(monkeypatch, run) == (1 if options.get("momentum") else 3)

    @pytest.mark.parametrize(
        "case", ["strides", "dampening", "lr tensor", "stochastic rounding", "scaler", "int lr"]
    )
    def test_the_unusual_is_left_to_python(self, monkeypatch, case):
        def run():
            p = parameter(torch.randn(8, 6, generator=torch.Generator().manual_seed(1)))
            options = {
                "dampening": dict(dampening=0.5),
                "lr tensor": dict(lr=torch.tensor(0.1)),
                "stochastic rounding": dict(stochastic_rounding=True),
                "int lr": dict(lr=1),
            }.get(case, {})
            optimizer = fr.optim.SGD([p], **{"lr": 0.1, "momentum": 0.9, **options})
            scaler = scaler_with(2.0)
            for step in range(2):
                grad = torch.randn(6, 8, generator=torch.Generator().manual_seed(step)).t()
                p.grad = grad if case == "strides" else grad.contiguous()
                torch.manual_seed(step)
                if case == "scaler":
                    scaler.step(optimizer)
                    scaler.update()
                else:
                    optimizer.step()
            return [p.detach()]

        assert self.both(monkeypatch, run) == (case == "int lr")

    def test_an_error_in_a_later_group_finds_nothing_stepped(self, monkeypatch):
        monkeypatch.setattr(fr.optim, "fast", spy := self.Spy())
        a, b = (parameter(torch.ones(3)) for _ in range(2))
        optimizer = fr.optim.SGD([{"params": [a]}, {"params": [b]}], lr=0.1)
        a.grad, b.grad = torch.ones(3), torch.ones(3).to_sparse()
        with pytest.raises(TypeError, match="dense"):
            optimizer.step()
        assert torch.equal(a.detach(), torch.ones(3)) and spy.taken == 0

    def test_a_graph_that_saved_a_weight_finds_out(self, monkeypatch):
        monkeypatch.setattr(fr.optim, "fast", spy := self.Spy())
        p = parameter(torch.ones(3))
        optimizer = fr.optim.SGD([p], lr=0.1)
        p.grad = torch.ones(3)
        loss = (p * p).sum()
        optimizer.step()
        assert spy.taken == 1
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


class TestTorchFaults:
    """Each test asserts what torch (2.13 and 2.14, but where it says so) does, and beside it what fastreg
    does.
    """

    def test_foreach_nesterov_changes_the_gradient(self):
        for cls, expected in ((torch.optim.SGD, 1.9), (fr.optim.SGD, 1.0)):
            p = parameter(torch.ones(2))
            p.grad = torch.ones(2)
            cls([p], lr=0.1, momentum=0.9, nesterov=True, foreach=True).step()
            torch.testing.assert_close(p.grad, torch.full((2,), expected))

    def test_fused_overflow_in_the_first_step(self):
        """torch's skipped first step leaves an uninitialised buffer that the second step takes for momentum."""
        for cls in (torch.optim.SGD, fr.optim.SGD):
            p = parameter(torch.ones(1000))
            optimizer, scaler = cls([p], lr=0.1, momentum=0.9, fused=True), scaler_with(4.0)
            p.grad = torch.full((1000,), math.inf)
            garbage = torch.full((1000,), 7e7)
            with pytest.MonkeyPatch.context() as patch:  # what malloc may hand out, made certain
                if cls is torch.optim.SGD:
                    patch.setattr(torch, "empty_like", lambda g, garbage=garbage, **kwargs: garbage)
                scaler.step(optimizer)
            scaler.update()
            assert torch.equal(p.detach(), torch.ones(1000))
            p.grad = torch.full((1000,), scaler.get_scale())
            scaler.step(optimizer)
            expected = 0.9 if cls is fr.optim.SGD else 1 - 0.1 * (0.9 * 7e7 + 1)
            torch.testing.assert_close(p.detach(), torch.full((1000,), expected))

    def test_fused_raises_when_a_gradient_comes_late(self):
        for cls in (torch.optim.SGD, fr.optim.SGD):
            a, b = parameter(torch.ones(1)), parameter(torch.ones(1))
            optimizer = cls([a, b], lr=0.1, momentum=0.9, fused=True)
            a.grad = torch.ones(1)
            optimizer.step()
            b.grad = torch.ones(1)
            if cls is torch.optim.SGD:
                with pytest.raises(TypeError):
                    optimizer.step()
            else:
                optimizer.step()
                torch.testing.assert_close(b.detach(), torch.tensor([0.9]))

    @pytest.mark.parametrize("momentum", [0.0, 0.9])
    @pytest.mark.parametrize("dtype16", [torch.float16, torch.bfloat16])
    def test_fused_16_bit_does_not_learn(self, dtype16, momentum):
        """torch 2.13's fused CPU kernel computes whole vectors and never stores them; only what does not fill
        one is stepped.
        """
        for cls in (torch.optim.SGD, fr.optim.SGD):
            p = parameter(torch.ones(64, dtype=dtype16))
            p.grad = torch.ones_like(p)
            cls([p], lr=0.5, momentum=momentum, fused=True).step()
            expected = 1.0 if cls is torch.optim.SGD and torch.__version__.startswith("2.13.") else 0.5
            assert torch.equal(p.detach(), torch.full((64,), expected, dtype=dtype16))

    def test_fused_ignores_strides(self):
        """A gradient laid out otherwise than its parameter is applied to the wrong elements; a sliced one
        overruns its slice.
        """
        g = torch.arange(12.0).view(4, 3)
        for cls in (torch.optim.SGD, fr.optim.SGD):
            p = parameter(torch.zeros(3, 4).t())
            p.grad = g.clone()
            cls([p], lr=1.0, fused=True).step()
            assert torch.equal(p.detach(), -g) == (cls is fr.optim.SGD)
            view, base = strided(torch.zeros(4, 3), "sliced")
            sliced = parameter(view)
            sliced.grad = g.clone()
            cls([sliced], lr=1.0, fused=True).step()
            assert torch.equal(sliced.detach(), -g) == (cls is fr.optim.SGD)
            assert ((base == 77).sum() == base.numel() - 12) == (cls is fr.optim.SGD)

    def test_listed_twice_is_stepped_twice(self):
        for cls, expected in ((torch.optim.SGD, 0.5), (fr.optim.SGD, 0.75)):
            p = parameter(torch.ones(1))
            p.grad = torch.ones(1)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                cls([p, p], lr=0.25).step()
            assert p.item() == expected

    def test_nan_lr_is_accepted(self):
        torch.optim.SGD([parameter(torch.ones(1))], lr=math.nan)
        with pytest.raises(ValueError, match="lr"):
            fr.optim.SGD([parameter(torch.ones(1))], lr=math.nan)


OPTIONS = dict(lr=0.05, momentum=0.9, dampening=0.1, weight_decay=0.02, l1=0.01)


def model_and_data():
    torch.manual_seed(11)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3))
    return model, [torch.randn(8, 5) for _ in range(4)]


def train_one_process():
    model, data = model_and_data()
    optimizer = fr.optim.SGD(model.parameters(), **OPTIONS)
    for x in data:
        optimizer.zero_grad()
        model(x).pow(2).mean().backward()
        optimizer.step()
    return model, optimizer


def distributed_worker(rank, world, store):
    """On each of two gloo ranks; an assertion that fails here fails the spawn."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import (
        DTensor,
        Partial,
        Replicate,
        Shard,
        distribute_tensor,
        init_device_mesh,
    )

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,))
    expected, single = train_one_process()
    close = dict(rtol=1e-5, atol=1e-6)

    # DDP: each rank has half of the batch, the gradients are averaged.
    model, data = model_and_data()
    ddp = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = fr.optim.SGD(ddp.parameters(), **OPTIONS)
    for x in data:
        optimizer.zero_grad()
        ddp(x[4 * rank : 4 * rank + 4]).pow(2).mean().backward()
        optimizer.step()
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, **close)

    # FSDP2: 7 and 3 rows on two ranks are uneven shards.
    model, data = model_and_data()
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    optimizer = fr.optim.SGD(model.parameters(), **OPTIONS)
    for x in data:
        optimizer.zero_grad()
        model(x[4 * rank : 4 * rank + 4]).pow(2).mean().backward()
        optimizer.step()
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        assert isinstance(p, DTensor)
        torch.testing.assert_close(p.full_tensor(), q.detach(), **close)
        buffer = optimizer.state[p]["momentum_buffer"]
        assert isinstance(buffer, DTensor) and buffer.placements == p.placements
        torch.testing.assert_close(buffer.full_tensor(), single.state[q]["momentum_buffer"], **close)
    again = fr.optim.SGD(model.parameters(), lr=1.0)
    again.load_state_dict(optimizer.state_dict())
    assert again.param_groups[0]["l1"] == OPTIONS["l1"]
    before = [p.full_tensor().detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    again.step()
    for p, w, q in zip(model.parameters(), before, expected.parameters(), strict=True):
        stepped, _ = reference(w, torch.zeros_like(w), single.state[q]["momentum_buffer"], False, **OPTIONS)
        torch.testing.assert_close(p.full_tensor().detach(), stepped, **close)

    # The penalty and the sparsity of a sharded model are those of the whole one.
    full = [p.full_tensor().detach() for p in model.parameters()]
    by_hand = sum(0.1 * w.abs().sum() + 0.15 * (w * w).sum() for w in full)
    value = fr.optim.penalty(model, l1=0.1, l2=0.3)
    assert not isinstance(value, DTensor)
    torch.testing.assert_close(value.detach(), by_hand, **close)
    optimizer.zero_grad()
    value.backward()
    for p, w in zip(model.parameters(), full, strict=True):
        torch.testing.assert_close(p.grad.full_tensor(), 0.1 * w.sign() + 0.3 * w, **close)
    with torch.no_grad():
        first = next(model.parameters())
        first.to_local().zero_()
    assert fr.optim.sparsity(model) == first.numel() / sum(p.numel() for p in model.parameters())

    # A single tensor, sharded unevenly (one rank holds nothing) or replicated; gradients placed otherwise,
    # partial sums too.
    for rows, placements in ((5, [Shard(0)]), (1, [Shard(0)]), (4, [Shard(1)]), (3, [Replicate()])):
        torch.manual_seed(2)
        w, g = torch.randn(rows, 3), torch.randn(rows, 3)
        for kind in ("same", "replicated", "partial"):
            p = torch.nn.Parameter(distribute_tensor(w.clone(), mesh, placements))
            if kind == "partial":
                p.grad = DTensor.from_local(g / world, mesh, [Partial()])
            else:
                p.grad = distribute_tensor(g, mesh, placements if kind == "same" else [Replicate()])
            optimizer = fr.optim.SGD([p], **OPTIONS)
            optimizer.step()
            torch.testing.assert_close(
                p.full_tensor().detach(), reference(w, g, g, True, **OPTIONS)[0], **close
            )
            assert p.placements == tuple(placements)
    dist.barrier()  # or torch aborts a rank whose partner is gone
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_distributed(tmp_path):
    """DDP, FSDP2 and DTensor on two processes end with the numbers of one."""
    torch.multiprocessing.spawn(distributed_worker, (2, str(tmp_path / "store")), nprocs=2)


if __name__ == "__main__" and sys.argv[1:] == ["digest"]:
    digest()
