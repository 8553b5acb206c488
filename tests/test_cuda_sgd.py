"""The CUDA kernels of SGD, executed without a GPU, against the CPU operator: the same bits."""

import ctypes

import numpy as np
import pytest
import torch
from cuda_machine import (
    DTYPES,
    SCHEDULES,
    Layout,
    dtype_number,
    interpreted,
    layout_of,
    needs_nvcc,
    same,
    seed_at,
    structure,
    traffic,
)

import fastreg  # noqa: F401

pytestmark = needs_nvcc

SgdTensor = structure(
    "SgdTensor",
    """int dtype
    pointer param, momentum, grad, started
    Layout param_layout, grad_layout, momentum_layout""",
)
SgdArgs = structure(
    "SgdArgs",
    """double lr, momentum, dampening, weight_decay, l1, grad_scale
    bool nesterov, proximal, decoupled, maximize
    bool stochastic_rounding
    Seed seed
    pointer lr_at
    bool lr_wide
    pointer grad_scale_at, found_inf_at""",
)
LAUNCHER = "_ZN7fastreg13sgd_step_cudaERKNS_7SgdArgsEPKNS_9SgdTensorEmPv"


def flat(*tensors):
    """Layouts of tensors that fill their memory in the same order: they are walked as flat memory, as the
    glue does.
    """
    strides = {t.stride() for t in tensors}
    dense = all(t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in tensors)
    layouts = [layout_of(t) for t in tensors]
    if len(strides) == 1 and dense:
        for layout in layouts:
            layout.contiguous = True
    return layouts


class Step:
    """Tensors and options of one step, for the machine and for the CPU."""

    def __init__(self, params, grads, buffers=None, started=None, seed=None, lr=0.1, lr_tensor=None,
                 grad_scale=None, found_inf=None, momentum=0.0, dampening=0.0, weight_decay=0.0, l1=0.0,
                 nesterov=False, proximal=False, decoupled=False, maximize=False,
                 misaligned=0):  # fmt: skip
        self.__dict__.update({k: v for k, v in locals().items() if k != "self"})

    def on_cpu(self):
        params = [p.clone() for p in self.params]
        buffers = [b.clone() for b in self.buffers or ()]
        started = [torch.tensor(float(s)) for s in self.started or ()]
        torch.ops.fastreg.sgd_(
            params, self.grads, buffers, started, [], [], self.lr, self.momentum, self.dampening,
            self.weight_decay, self.l1, 0.0, self.nesterov, self.proximal, self.decoupled, self.maximize,
            self.lr_tensor, self.grad_scale, self.found_inf, None, None,
            None if self.seed is None else torch.tensor([self.seed]),
        )  # fmt: skip
        return params, buffers, started

    def on_machine(self, **options):
        slots = {}

        def arguments(machine):
            def number(tensor, name):
                return None if tensor is None else machine.put(tensor, name).at

            slots["params"] = [machine.put(p, "param", self.misaligned, readonly=False) for p in self.params]
            slots["buffers"] = [
                machine.put(b, "momentum", self.misaligned, readonly=False) for b in self.buffers or ()
            ]
            slots["started"] = [
                machine.put(torch.tensor(float(s)), "started", readonly=False) for s in self.started or ()
            ]
            tensors = (SgdTensor * len(self.params))()
            for i, (p, g) in enumerate(zip(self.params, self.grads, strict=True)):
                parts = [p, g, *(self.buffers[i : i + 1] if self.buffers else ())]
                layouts = (
                    flat(*parts) if self.seed is None or p.is_contiguous() else [layout_of(t) for t in parts]
                )
                tensors[i] = SgdTensor(
                    dtype_number(p.dtype), slots["params"][i].at,
                    slots["buffers"][i].at if self.buffers else None,
                    machine.put(g, "grad", self.misaligned).at,
                    slots["started"][i].at if self.started else None,
                    layouts[0], layouts[1], layouts[2] if self.buffers else Layout(),
                )  # fmt: skip
            seed = seed_at(machine, torch.tensor([self.seed or 0]))
            wide = self.lr_tensor is not None and self.lr_tensor.dtype == torch.float64
            args = SgdArgs(
                self.lr, self.momentum, self.dampening, self.weight_decay, self.l1, 1.0,
                self.nesterov, self.proximal, self.decoupled, self.maximize,
                self.seed is not None, seed, number(self.lr_tensor, "lr"), wide,
                number(self.grad_scale, "grad_scale"), number(self.found_inf, "found_inf"),
            )  # fmt: skip
            return ctypes.byref(args), tensors, ctypes.c_size_t(len(self.params))

        reports = interpreted("sgd").call(LAUNCHER, arguments, **options)
        return *([s.result() for s in slots[name]] for name in ("params", "buffers", "started")), reports


def all_same(a, b):
    return len(a) == len(b) and all(map(same, a, b))


def check(step, **options):
    params, buffers, started = step.on_cpu()
    got_params, got_buffers, got_started, reports = step.on_machine(**options)
    assert all_same(got_params, params) and all_same(got_buffers, buffers) and all_same(got_started, started)
    return reports


def numbers(*shape, dtype=torch.float32, seed=0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if x.numel() > 100:
        x.view(-1)[[3, 50, 77, 99]] = torch.tensor(
            [float("nan"), float("inf"), 0.0, -0.0], dtype=torch.float64
        )
    return x.to(dtype)


def tensors(shapes, dtype, count=3):
    return [
        [numbers(*shape, dtype=dtype, seed=7 * i + j) for i, shape in enumerate(shapes)] for j in range(count)
    ]


MODES = {
    "plain": {},
    "l2": dict(weight_decay=0.01),
    "l1": dict(l1=0.02, weight_decay=0.01),
    "momentum": dict(momentum=0.9),
    "nesterov": dict(momentum=0.9, nesterov=True, weight_decay=0.01, l1=0.02),
    "proximal": dict(momentum=0.9, l1=0.5, proximal=True),
    "decoupled": dict(momentum=0.9, l1=0.02, weight_decay=0.1, decoupled=True),
    "maximize": dict(momentum=0.9, maximize=True, l1=0.02),
    "dampening": dict(momentum=0.9, dampening=0.5, started=[0, 1, 0, 1]),
}
SHAPES = [(5,), (2048,), (71, 67), (1,)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_the_same_bits_as_on_the_cpu(mode, dtype):
    params, grads, buffers = tensors(SHAPES, dtype)
    options = MODES[mode]
    step = Step(params, grads, buffers if options.get("momentum") else None, **options)
    for schedule in SCHEDULES:
        check(step, schedule=schedule)


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_read_from_memory(dtype):
    params, grads, buffers = tensors(SHAPES, dtype)
    common = dict(momentum=0.9, l1=0.02, grad_scale=torch.tensor(1024.0), started=[0, 1, 1, 1], dampening=0.1)
    for lr in (torch.tensor(0.3), torch.tensor(0.3, dtype=torch.float64)):
        check(Step(params, grads, buffers, lr_tensor=lr, found_inf=torch.tensor(0.0), **common))
    skipped = Step(params, grads, buffers, lr_tensor=lr, found_inf=torch.tensor(1.0), **common)
    check(skipped)
    assert all_same(skipped.on_machine()[0], params)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_stochastic_rounding(momentum):
    params, grads, buffers = tensors([(4103,), (77, 41), (8, 8)], torch.bfloat16)
    params[1], grads[1] = params[1].t(), grads[1].t()
    buffers[1] = buffers[1].t()
    step = Step(
        params, grads, buffers if momentum else None, momentum=momentum, weight_decay=0.01, seed=-12345
    )
    check(step, schedule="random")
    rounded = Step(
        params, grads, buffers if momentum else None, momentum=momentum, weight_decay=0.01
    ).on_cpu()
    assert not all_same(step.on_cpu()[0], rounded[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_and_unaligned(dtype):
    params, grads, buffers = tensors([(40, 60), (40, 60), (7, 9, 11), (4000,)], dtype)
    params[1] = params[1][::2, 1::3]
    grads[1], buffers[1] = grads[1][:20, :20], buffers[1][::2, ::3]
    params[2], grads[2], buffers[2] = (
        params[2].permute(2, 0, 1),
        grads[2].permute(2, 0, 1),
        buffers[2].permute(2, 0, 1),
    )
    params[0] = params[0].t().contiguous().t()
    check(Step(params, grads, buffers, momentum=0.9, nesterov=True))
    check(Step(params, grads, buffers, momentum=0.9, misaligned=dtype.itemsize))


def test_more_tensors_than_a_launch_holds_and_mixed_dtypes():
    shapes = [(17 * i % 300,) for i in range(200)]
    params, grads, buffers = tensors(shapes, torch.float32)
    for i in range(90, 130):
        params[i], grads[i], buffers[i] = params[i].bfloat16(), grads[i].bfloat16(), buffers[i].bfloat16()
    started = [i % 2 for i in range(200)]
    reports = check(Step(params, grads, buffers, momentum=0.9, dampening=0.2, started=started, seed=9))
    assert len(reports) == 2 + 1 + 1 + 3  # 90 + 40 + 70 tensors, 80 a launch; and their flags


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_moved(dtype, momentum):
    n = 3 * 2**15
    params, grads, buffers = ([numbers(n, dtype=dtype, seed=j)] for j in range(3))
    step = Step(params, grads, buffers if momentum else None, momentum=momentum, weight_decay=0.01, l1=0.01)
    reports = check(step)
    floor = (5 if momentum else 3) * n * dtype.itemsize
    assert len(reports) == 1
    assert floor <= traffic(reports) <= 1.05 * floor, reports[0]


def test_more_than_2_31_elements():
    n = 2**31 + 12345
    buffers = []

    def arguments(machine):
        def fill(offsets, width):
            return (offsets // 4 % 251).astype(np.float32)

        buffers[:] = [machine.device.virtual(4 * n, name, fill) for name in ("param", "grad", "momentum")]
        layout = Layout(n, 1, True)
        param, grad, momentum = (b.addr for b in buffers)
        tensors = (SgdTensor * 1)(SgdTensor(0, param, momentum, grad, None, layout, layout, layout))
        args = SgdArgs(0.5, 0.5, 0.0, 0.0, 0.0, 1.0)
        return ctypes.byref(args), tensors, ctypes.c_size_t(1)

    last = (n - 1) // 2048
    interpreted("sgd").call(LAUNCHER, arguments, blocks=[0, last % 2**20])
    for buffer, factor in ((buffers[0], 1 - 0.5 * 1.5), (buffers[2], 1.5)):
        at, values = buffer.writes(np.float32)
        assert at.max() == n - 1 and len(set(at)) == len(at)
        np.testing.assert_array_equal(values, (at % 251 * factor).astype(np.float32))


def for_the_table(dtype):
    """What tests/cuda_table.py takes: (what, dtype, elements, floor in bytes, reports, op)."""
    n, size, step = 2**17, dtype.itemsize, dict(weight_decay=0.01, l1=0.01)
    x = torch.randn(n).to(dtype)
    yield "SGD", dtype, n, 3 * n * size, Step([x], [x], **step).on_machine()[3], "sgd"
    reports = Step([x], [x], [x], momentum=0.9, **step).on_machine()[3]
    yield "SGD, momentum", dtype, n, 5 * n * size, reports, "sgd"
    if dtype == torch.bfloat16:
        reports = Step([x], [x], [x], momentum=0.9, seed=1, **step).on_machine()[3]
        yield "SGD, momentum, stochastic rounding", dtype, n, 5 * n * size, reports, "sgd"
