"""SGD under schedules and scalers that other code drives: compiled steps whose numbers change, steps that a
GradScaler skips.
"""

import copy
import io
import math

import pytest
import torch
from helpers import same_values
from sgd_reference import OP, parameter, scaler_with
from torch._dynamo.testing import CompileCounterWithBackend
from torch.optim import lr_scheduler

import fastreg as fr

HINT = 'needs pip install "torch-fastreg[test]"'


class ByHand:
    """Changes what no scheduler of torch's does."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def step(self):
        for group in self.optimizer.param_groups:
            for name in ("lr", "momentum", "dampening", "weight_decay", "l1"):
                if group.get(name):
                    group[name] *= 0.875


SCHEDULES = {
    "exponential": lambda optimizer: lr_scheduler.ExponentialLR(optimizer, 0.9),
    "one cycle": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, [0.5, 0.25], total_steps=20),
    "warm-up from zero": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: step / 10),
    "by hand": ByHand,
}


def scheduled(cls, make_schedule, backend=None, steps=6, **options):
    """Two groups stepped under a schedule; gives the parameters, and the number of graphs."""
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(1)
    params = [parameter(torch.randn(n, generator=generator)) for n in (5, 3, 4)]
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.05}]
    optimizer = cls(groups, lr=0.1, momentum=0.9, weight_decay=0.01, **options)
    schedule = make_schedule(optimizer)
    counter = CompileCounterWithBackend(backend) if backend else None
    step = torch.compile(optimizer.step, backend=counter) if backend else optimizer.step
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        step()
        schedule.step()
    return [p.detach() for p in params], counter.frame_count if counter else 0


class TestCompiledSchedules:
    @pytest.mark.parametrize("backend", ["eager", "aot_eager"])
    @pytest.mark.parametrize("schedule", SCHEDULES)
    def test_graphs_and_values(self, schedule, backend):
        """As many graphs as torch's SGD has, with every number that may change, and the bits of eager."""
        make, options = SCHEDULES[schedule], dict(l1=0.02, l1_mode="proximal")
        if schedule == "by hand":
            options["dampening"] = 0.25
        # Under aot_eager torch's own makes a graph of every rate.
        _, torchs = scheduled(torch.optim.SGD, make, "eager")
        compiled, graphs = scheduled(fr.optim.SGD, make, backend, **options)
        eager, _ = scheduled(fr.optim.SGD, make, **options)
        assert graphs == torchs == 2
        for a, b in zip(compiled, eager, strict=True):
            assert same_values(a, b)

    def test_inductor(self):
        make = SCHEDULES["one cycle"]
        compiled, graphs = scheduled(fr.optim.SGD, make, "inductor", l1=0.02)
        eager, _ = scheduled(fr.optim.SGD, make, l1=0.02)
        assert graphs == 2
        for a, b in zip(compiled, eager, strict=True):
            assert same_values(a, b)

    def test_what_does_not_change_stays_in_the_graph(self):
        """Numbers that are constants are the operator's own, without tensors made on the CPU."""
        torch._dynamo.reset()
        called = []

        def backend(graph, inputs):
            made = (torch.ones, torch.stack, torch.mul, OP, torch.ops.fastreg.sgd_numbers_.default)
            called.extend(node.target for node in graph.graph.nodes if node.target in made)
            return graph

        p = parameter(torch.ones(3))
        p.grad = torch.ones(3)
        optimizer = fr.optim.SGD([p], lr=0.5)
        step = torch.compile(optimizer.step, backend=backend)
        step(), step()
        assert called == [OP] and torch.equal(p.detach(), torch.zeros(3))

    def test_a_rate_that_is_refused(self):
        """A schedule that leaves the numbers' range is refused in a compiled step too."""
        torch._dynamo.reset()
        p = parameter(torch.ones(3))
        p.grad = torch.ones(3)
        optimizer = fr.optim.SGD([p], lr=1.0)
        step = torch.compile(optimizer.step, backend="eager")
        for rate in (1.0, 0.5, 0.25):
            optimizer.param_groups[0]["lr"] = rate
            step()
        for rate in (math.nan, math.inf):
            optimizer.param_groups[0]["lr"] = rate
            with pytest.raises(Exception, match="lr must be finite"):
                step()
        assert torch.equal(p.detach(), torch.full((3,), -0.75))
        optimizer.param_groups[0]["lr"] = -0.25  # up the gradient, as with torch's
        step()
        assert torch.equal(p.detach(), torch.full((3,), -0.5))

    def test_operator(self):
        """The operator of such graphs, with its fake kernel, by torch's own check."""
        numbers = torch.tensor([0.5, 0.875, 0.25, 0.125, 0.0625, 0.0], dtype=torch.float64)
        lists = [[torch.randn(4)], [torch.randn(4)], [torch.zeros(4)], [torch.zeros(())], [], []]
        wanted = [[t.clone() for t in tensors] for tensors in lists]
        flags = (False, True, False, False)
        torch.library.opcheck(torch.ops.fastreg.sgd_numbers_.default, (*lists, numbers, *flags))
        torch.ops.fastreg.sgd_numbers_(*lists, numbers, *flags)
        OP(*wanted, *numbers.tolist(), *flags)
        assert all(same_values(a[0], b[0]) for a, b in zip(lists[:4], wanted[:4], strict=True))


def overflow(optimizer, scaler, p):
    """One step whose gradient has overflowed."""
    p.grad = torch.full_like(p, math.inf)
    scaler.step(optimizer)
    scaler.update()


class TestSkippedSteps:
    @pytest.mark.parametrize("fused", [None, False, True])
    def test_hooks(self, fused):
        """What observes the steps sees a skipped one as torch's SGD shows it."""
        seen = []
        for cls in (torch.optim.SGD, fr.optim.SGD):
            p, calls = parameter(torch.ones(2)), []
            optimizer, scaler = cls([p], lr=0.5, fused=fused), scaler_with(4.0)
            optimizer.register_step_pre_hook(lambda *args, calls=calls: calls.append("pre"))
            optimizer.register_step_post_hook(lambda *args, calls=calls: calls.append("post"))
            overflow(optimizer, scaler, p)
            p.grad = torch.full_like(p, scaler.get_scale())
            scaler.step(optimizer)
            assert torch.equal(p.detach(), torch.full((2,), 0.5))
            # torch's fused step writes the unscaled gradient; ours reads gradients only.
            grads = None if fused else p.grad.tolist()
            seen.append((calls, grads, hasattr(optimizer, "_step_supports_amp_scaling")))
        assert seen[0] == seen[1] and len(seen[0][0]) == (4 if fused else 2)

    def test_accelerate(self):
        pytest.importorskip("accelerate", reason=HINT)
        from accelerate import Accelerator
        from accelerate.optimizer import AcceleratedOptimizer
        from accelerate.scheduler import AcceleratedScheduler

        Accelerator(cpu=True)
        p = parameter(torch.ones(2))
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        optimizer = AcceleratedOptimizer(fr.optim.SGD([p], lr=0.5), scaler=scaler)
        schedule = AcceleratedScheduler(lr_scheduler.ExponentialLR(optimizer.optimizer, 0.5), optimizer)
        skipped, rates = [], []
        for factor in (math.inf, 1.0, math.inf, 1.0):
            optimizer.zero_grad()
            scaler.scale((p * factor).sum()).backward()
            optimizer.step()
            schedule.step()
            skipped.append(optimizer.step_was_skipped)
            rates.append(optimizer.param_groups[0]["lr"])
        assert skipped == [True, False, True, False] and rates == [0.5, 0.25, 0.25, 0.125]
        assert torch.equal(p.detach(), torch.full((2,), 1 - 0.5 - 0.25))

    def test_copies(self):
        """A copy, a pickle and a loaded checkpoint treat a scaler as their original did."""
        p = parameter(torch.ones(2))
        for fused in (None, True):
            original = fr.optim.SGD([p], lr=0.5, fused=fused)
            buffer = io.BytesIO()
            torch.save(original, buffer)
            buffer.seek(0)
            loaded = fr.optim.SGD([p], lr=0.5, fused=fused)
            loaded.load_state_dict(original.state_dict())
            for optimizer in (copy.deepcopy(original), torch.load(buffer, weights_only=False), loaded):
                assert getattr(optimizer, "_step_supports_amp_scaling", False) == bool(fused)
        original._step_supports_amp_scaling = False  # as some code does by hand
        original.load_state_dict(original.state_dict())
        assert not original._step_supports_amp_scaling


def graphs_of(module, kind, **options):
    """How many graphs five compiled steps make, the rate of which falls; and the parameter."""
    torch._dynamo.reset()
    p = torch.nn.Parameter(torch.linspace(-1, 1, 5))
    optimizer = getattr(module, kind)([p], lr=torch.tensor(0.1), **options)
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(optimizer.step, backend=counter)
    for n in range(5):
        p.grad = torch.linspace(1, n, 5)
        step()
        optimizer.param_groups[0]["lr"].mul_(0.9)
    return counter.frame_count, p.detach()


@pytest.mark.parametrize(
    "kind, options",
    [
        ("AdamW", {}),
        ("AdamW", dict(amsgrad=True, capturable=True)),
        ("AdamW", dict(ema=0.9, max_norm=1.0, stochastic_rounding=True)),
        ("SGD", {}),
        ("SGD", dict(momentum=0.9, dampening=0.1)),
        ("SGD", dict(momentum=0.9, ema=0.9, max_norm=1.0)),
    ],
    ids=str,
)
def test_compiled_steps_with_the_rate_in_a_tensor_are_one_graph(kind, options):
    """The first step, which makes the state, has no graph of its own."""
    count, p = graphs_of(fr.optim, kind, **options)
    assert count == 1
    known = {name: value for name, value in options.items() if name in ("amsgrad", "momentum", "dampening")}
    torchs, q = graphs_of(torch.optim, kind, **known)
    assert count <= torchs  # torch's SGD makes two with momentum
    if "max_norm" not in options:
        torch.testing.assert_close(p, q)
