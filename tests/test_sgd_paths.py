"""The paths of a step: stochastic rounding, torch.compile, memory, C++ and Python, several processes; and
faults of torch's.
"""

import math
import warnings

import hypothesis.strategies as st
import pytest
import torch
from helpers import on_ranks, same_values, threads
from hypothesis import given
from optimizer_reference import StepSpy, on_both_paths
from sgd_reference import OP, parameter, quick, reference, run, scaler_with, strided

import fastreg as fr


class TestStochasticRounding:
    """bfloat16 has 8 bits: between 1/2 and 1 its numbers lie 2^-8 apart, and rounding to nearest loses an
    update below 2^-9.
    """

    def step(self, start, update, layout=None, seed=1, **options):
        p = parameter(start if layout is None else strided(start, layout)[0])
        p.grad = update
        fr.optim.SGD([p], lr=1.0, stochastic_rounding=True, rounding_seed=seed, **options).step()
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
        assert same_values(result, start)

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
        assert same_values(self.step(start, update, layout, momentum=momentum), plain)
        assert same_values(self.step(start.clone(), strided(update, layout)[0], momentum=momentum), plain)
        assert same_values(
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
        """`torch.compile(fullgraph=True)` of a step gives the numbers of eager, buffers and flags
        included.
        """
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
        args = (make(), make(), make(), [], [], [], 0.1, 0.9, 0.0, 0.01, 0.02, 0.0, *flags)
        torch.library.opcheck(OP, args)
        scaled = dict(grad_scale=torch.tensor(2.0), found_inf=torch.zeros(1), lr_tensor=torch.tensor(0.1))
        started = [torch.zeros(()), torch.ones(())]
        lists = make(), make(), make(), started, [], []
        torch.library.opcheck(OP, (*lists, 0.0, 0.9, 0.3, 0.0, 0.02, 0.0, *flags), scaled)
        torch.library.opcheck(
            OP,
            (make(), make(), [], [], [], [], 0.1, 0.0, 0.0, 0.0, 0.0, 0.0, *flags),
            dict(seed=torch.zeros(1, dtype=torch.int64)),
        )

    def test_op_sets_the_flags(self):
        """momentum_started becomes 1 with the step and stays as it is when the step is skipped."""
        for found, expected in ((0.0, [1.0, 1.0]), (1.0, [0.0, 1.0])):
            flags = [torch.zeros(()), torch.ones(())]
            lists = [[torch.ones(3), torch.ones(0)] for _ in range(3)]
            numbers = 0.1, 0.9, 0.5, 0.0, 0.0, 0.0
            OP(*lists, flags, [], [], *numbers, *4 * (False,), found_inf=torch.tensor(found))
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
        assert on_both_paths(monkeypatch, run) == (1 if options.get("momentum") else 3)

    @pytest.mark.parametrize("case", ["strides", "dampening", "lr tensor", "scaler", "int lr"])
    def test_the_unusual_is_left_to_python(self, monkeypatch, case):
        def run():
            p = parameter(torch.randn(8, 6, generator=torch.Generator().manual_seed(1)))
            options = {
                "dampening": dict(dampening=0.5),
                "lr tensor": dict(lr=torch.tensor(0.1)),
                "int lr": dict(lr=1),
                "scaler": dict(fused=True),
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

        assert on_both_paths(monkeypatch, run) == (case in ("int lr", "lr tensor"))

    def test_an_error_in_a_later_group_finds_nothing_stepped(self, monkeypatch):
        monkeypatch.setattr(fr.optim._one_pass, "fast", spy := StepSpy())
        a, b = (parameter(torch.ones(3)) for _ in range(2))
        optimizer = fr.optim.SGD([{"params": [a]}, {"params": [b], "weight_decay": 0.1}], lr=0.1)
        a.grad, b.grad = torch.ones(3), torch.ones(3).to_sparse()
        with pytest.raises(TypeError, match="dense"):
            optimizer.step()
        assert torch.equal(a.detach(), torch.ones(3)) and spy.taken == 0

    def test_a_graph_that_saved_a_weight_finds_out(self, monkeypatch):
        monkeypatch.setattr(fr.optim._one_pass, "fast", spy := StepSpy())
        p = parameter(torch.ones(3))
        optimizer = fr.optim.SGD([p], lr=0.1)
        p.grad = torch.ones(3)
        loss = (p * p).sum()
        optimizer.step()
        assert spy.taken == 1
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


class TestTorchFaults:
    """Each test asserts what torch (2.13 and 2.14, except where it says so) does, and beside it what fastreg
    does.
    """

    def test_foreach_nesterov_changes_the_gradient(self):
        for cls, expected in ((torch.optim.SGD, 1.9), (fr.optim.SGD, 1.0)):
            p = parameter(torch.ones(2))
            p.grad = torch.ones(2)
            cls([p], lr=0.1, momentum=0.9, nesterov=True, foreach=True).step()
            torch.testing.assert_close(p.grad, torch.full((2,), expected))

    def test_fused_overflow_in_the_first_step(self):
        """torch's skipped first step leaves an uninitialised buffer that the second step takes for
        momentum.
        """
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
        """Up to torch 2.13, its fused CPU kernel computes whole vectors and never stores them; only what does
        not fill one is stepped.
        """
        for cls in (torch.optim.SGD, fr.optim.SGD):
            p = parameter(torch.ones(64, dtype=dtype16))
            p.grad = torch.ones_like(p)
            cls([p], lr=0.5, momentum=momentum, fused=True).step()
            ends = (0.5, 1.0) if cls is torch.optim.SGD else (0.5,)
            assert set(p.tolist()) in [{end} for end in ends]

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


def distributed_worker(rank):
    """On each of two gloo ranks; an assertion that fails here fails the spawn."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import (
        DTensor,
        Partial,
        Replicate,
        Shard,
        distribute_tensor,
        init_device_mesh,
    )

    mesh = init_device_mesh("cpu", (2,))
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
    value = fr.optim.penalty(model.parameters(), l1=0.1, l2=0.3)
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
                p.grad = DTensor.from_local(g / 2, mesh, [Partial()])
            else:
                p.grad = distribute_tensor(g, mesh, placements if kind == "same" else [Replicate()])
            optimizer = fr.optim.SGD([p], **OPTIONS)
            optimizer.step()
            torch.testing.assert_close(
                p.full_tensor().detach(), reference(w, g, g, True, **OPTIONS)[0], **close
            )
            assert p.placements == tuple(placements)


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_distributed():
    """DDP, FSDP2 and DTensor on two processes end with the numbers of one."""
    on_ranks(2, distributed_worker)
