"""The CUDA kernels of SGD, executed without a GPU, against the CPU operator: the same bits."""

import ctypes

import numpy as np
import pytest
import torch
from cuda_machine import DTYPES, SCHEDULES, Layout, interpreted, needs_nvcc, structure, traffic
from cuda_optimizer import AVERAGE, GRAD, PARAM, STATE, StepArgs, StepTensor, run, step_args
from helpers import same_bits as same

import fastreg  # noqa: F401

pytestmark = needs_nvcc
FLOAT64_PRODUCTS = 2  # 1 less the decay of the average, by one thread for its block

SgdArgs = structure(
    "SgdArgs",
    """StepArgs step
    double momentum, dampening
    bool nesterov, decoupled""",
)
LAUNCHER = "_ZN7fastreg13sgd_step_cudaERKNS_7SgdArgsEPKNS_10StepTensorEmPv"
OWN = dict(momentum=0.0, dampening=0.0, nesterov=False, decoupled=False)
MOMENTUM = STATE  # the slot


class Step:
    """Tensors and options of one step, for the machine and for the CPU."""

    def __init__(self, params, grads, buffers=None, started=None, averages=None, **options):
        self.lists = {PARAM: params, GRAD: grads}
        self.lists |= {} if buffers is None else {MOMENTUM: buffers}
        self.lists |= {} if averages is None else {AVERAGE: averages}
        self.started = [torch.tensor(float(s)) for s in started or ()]
        self.n_averaged = [torch.tensor(float(i % 2)) for i in range(len(averages or ()))]
        self.own = {name: options.pop(name, value) for name, value in OWN.items()}
        self.misaligned, self.places = options.pop("misaligned", 0), options.pop("places", None)
        self.options = options

    def on_cpu(self):
        lists = {slot: [t.clone() for t in group] for slot, group in self.lists.items()}
        started, n_averaged = ([t.clone() for t in group] for group in (self.started, self.n_averaged))
        usual = dict(lr=0.1, weight_decay=0.0, l1=0.0, ema=0.0, proximal=False, maximize=False)
        options = {**usual, **self.own, **self.options}
        if options.get("seed") is not None:
            options["seed"] = torch.tensor([options["seed"]])
            options["places"] = [number for place in self.places or () for number in place]
        torch.ops.fastreg.sgd_(
            lists[PARAM], lists[GRAD], lists.get(MOMENTUM, []), started, lists.get(AVERAGE, []), n_averaged,
            **options,
        )  # fmt: skip
        return lists, started, n_averaged

    def on_machine(self, **options):
        def args(machine):
            return SgdArgs(step_args(machine, **self.options), *self.own.values())

        return run(
            "sgd", LAUNCHER, self.lists, self.started, self.n_averaged, args,
            seed=self.options.get("seed"), misaligned=self.misaligned, places=self.places, **options,
        )  # fmt: skip


def all_same(a, b):
    return len(a) == len(b) and all(map(same, a, b))


def check(step, **options):
    lists, started, n_averaged = step.on_cpu()
    got_lists, got_started, got_averaged, reports = step.on_machine(**options)
    assert all(all_same(got_lists[slot], group) for slot, group in lists.items())
    assert all_same(got_started, started) and all_same(got_averaged, n_averaged)
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
    "average": dict(momentum=0.9, l1=0.02, ema=0.9),
    "average alone": dict(ema=0.25, weight_decay=0.01),
}
# Less than a word, one whole chunk of a block, two chunks and a rest, one element.
SHAPES = [(5,), (2048,), (71, 67), (1,)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_the_same_bits_as_on_the_cpu(mode, dtype):
    params, grads, buffers, averages = tensors(SHAPES, dtype, 4)
    options = MODES[mode]
    buffers = buffers if options.get("momentum") else None
    step = Step(params, grads, buffers, averages=averages if "ema" in options else None, **options)
    for schedule in SCHEDULES:
        check(step, schedule=schedule)


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_read_from_memory(dtype):
    params, grads, buffers, averages = tensors(SHAPES, dtype, 4)
    common = dict(momentum=0.9, l1=0.02, grad_scale=torch.tensor(1024.0), started=[0, 1, 1, 1], dampening=0.1)
    common |= dict(averages=averages, ema_tensor=torch.tensor(0.9), clip=torch.tensor(0.3))
    for lr in (torch.tensor(0.3), torch.tensor(0.3, dtype=torch.float64)):
        check(Step(params, grads, buffers, lr_tensor=lr, found_inf=torch.tensor(0.0), **common))
    skipped = Step(params, grads, buffers, lr_tensor=lr, found_inf=torch.tensor(1.0), **common)
    check(skipped)
    assert all_same(skipped.on_machine()[0][PARAM], params)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_stochastic_rounding(momentum):
    params, grads, buffers, averages = tensors([(4103,), (77, 41), (8, 8)], torch.bfloat16, 4)
    params[1], grads[1] = params[1].t(), grads[1].t()
    buffers[1], averages[1] = buffers[1].t(), averages[1].t()
    step = Step(
        params,
        grads,
        buffers if momentum else None,
        averages=averages,
        ema=0.9,
        momentum=momentum,
        weight_decay=0.01,
        seed=-12345,
    )
    check(step, schedule="random")
    rounded = Step(
        params, grads, buffers if momentum else None, momentum=momentum, weight_decay=0.01
    ).on_cpu()
    assert not all_same(step.on_cpu()[0][PARAM], rounded[0][PARAM])


def test_shards_are_rounded_as_parts_of_the_whole():
    """Rows that begin within a group of eight or at one, and columns, at steps 0 and 7."""
    params, grads, buffers, averages = tensors([(4103,), (4096,), (70, 33), (8, 8)], torch.bfloat16, 4)
    places = [(3, 2**33 + 5, 4103, 4103), (1, 64, 4096, 4096), (2, 11, 33, 90), (0, 0, 64, 0)]
    options = dict(averages=averages, ema=0.9, momentum=0.9, seed=77, started=[0, 7, 7, 0])
    step = Step(params, grads, buffers, places=places, **options)
    check(step)
    whole = Step(params, grads, buffers, **options).on_cpu()[0][PARAM]
    same_as_whole = [same(a, b) for a, b in zip(step.on_cpu()[0][PARAM], whole, strict=True)]
    assert same_as_whole == [False, False, False, False]  # another number or another place


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
    step.lists[AVERAGE], step.n_averaged = [params[0].clone()], [torch.ones(())]
    reports = check(step)
    floor += 2 * n * dtype.itemsize
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
        tensors = (StepTensor * 1)()
        tensors[0].columns = n
        for slot, at in ((PARAM, param), (GRAD, grad), (MOMENTUM, momentum)):
            tensors[0].data[slot], tensors[0].layout[slot] = at, layout
        args = SgdArgs(StepArgs(0.5, grad_factor=1.0, clip=1.0), 0.5)
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
