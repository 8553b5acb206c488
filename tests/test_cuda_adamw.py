"""The CUDA kernels of AdamW, executed without a GPU, against the CPU operator: the same bits."""

import random

import pytest
import torch
from adamw_reference import NAMES, USUAL, numbers, step_case
from cuda_machine import DTYPES, SCHEDULES, needs_nvcc, structure, traffic
from cuda_optimizer import AVERAGE, GRAD, PARAM, STATE, run, step_args
from helpers import same_bits as same

import fastreg  # noqa: F401

pytestmark = needs_nvcc

AdamwArgs = structure(
    "AdamwArgs",
    """StepArgs step
    double beta1, beta2, eps
    bool cautious""",
)
LAUNCHER = "_ZN7fastreg15adamw_step_cudaERKNS_9AdamwArgsEPKNS_10StepTensorEmPv"
PLACES = (PARAM, GRAD, STATE, STATE + 1, STATE + 2, None, AVERAGE, None)  # of the lists of NAMES
OWN = ("beta1", "beta2", "eps", "cautious")
FLOAT64_PRODUCTS = 16  # in the powers of beta, by one thread for its block
REGISTERS = {"step_stridedId": 80, "step_tensorsId": 64}


def on_machine(lists, options, step_on_host=None, **machine_options):
    """What `cuda_optimizer.run` gives for lists and options of the operator."""
    seed = options.get("seed")
    given = {k: v for k, v in options.items() if k not in (*OWN, "seed")}

    def args(machine):
        step = step_args(machine, **given, seed=None if seed is None else int(seed))
        return AdamwArgs(step, *(options[name] for name in OWN))

    slots = {place: ts for place, ts in zip(PLACES, lists, strict=True) if place is not None and ts}
    steps = [] if step_on_host is not None else lists[5]
    return run(
        "adamw", LAUNCHER, slots, steps, lists[7], args,
        seed=seed, step=step_on_host or 0.0, **machine_options,
    )  # fmt: skip


def check(lists, options, **machine_options):
    want = [[t.clone() for t in tensors] for tensors in lists]
    torch.ops.fastreg.adamw_(*want, **options)
    slots, steps, n_averaged, reports = on_machine(lists, options, **machine_options)
    got = [slots.get(place, []) if place is not None else [] for place in PLACES]
    got[5], got[7] = steps, n_averaged
    for name, mine, theirs in zip(NAMES, got, want, strict=True):
        assert len(mine) == len(theirs) and all(map(same, mine, theirs)), (name, options)
    return reports


# Less than a word, one whole chunk of a block, two chunks and a rest, one element.
SHAPES = [(5,), (2048,), (71, 67), (1,)]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_as_on_the_cpu(dtype, schedule):
    torch.manual_seed(1)
    choose = random.Random(f"{dtype} {schedule}").choice
    for _ in range(4):
        check(*step_case(choose, SHAPES, (dtype,)), schedule=schedule)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_form(dtype):
    """With and without amsgrad and average, unaligned and strided."""
    torch.manual_seed(2)
    for k in range(4):
        answers = {(False, True): iter([k % 2 == 1, k // 2 == 1])}
        fixed = random.Random(k)

        def choose(values, answers=answers, fixed=fixed):
            return next(answers.get(values, iter(())), None) or fixed.choice(values)

        lists, options = step_case(choose, [(4000,), (7, 9, 11)], (dtype,))
        check(lists, options, misaligned=dtype.itemsize)
        for tensors in lists[:5] + lists[6:7]:
            if tensors:
                tensors[0] = tensors[0].view(40, 100).t()[::2, 1::3]
        check(lists, options)


def test_more_tensors_than_a_launch_holds():
    torch.manual_seed(3)
    choose = random.Random(1).choice
    lists, options = step_case(choose, [(17 * i % 300,) for i in range(170)], (torch.float32,))
    reports = check(lists, {**options, "seed": None})
    assert len(reports) == 3 + 3  # 80 a launch; and their counts


def test_steps_on_the_host():
    w, g = torch.randn(300), torch.randn(300)
    make = lambda: [[w.clone()], [g], [w.abs()], [g.abs()], [], [torch.tensor(9.0)], [], []]  # noqa: E731
    want = make()
    torch.ops.fastreg.adamw_(*want, **USUAL)
    slots, _, _, reports = on_machine(make(), USUAL, step_on_host=9.0)
    assert same(slots[PARAM][0], want[0][0]) and len(reports) == 1


def measured(dtype, average, n=3 * 2**14, **options):
    """(floor in bytes, reports) of a step of one tensor."""
    x = [numbers(lambda values: values[0], (n,), dtype, hostile=False) for _ in range(5)]
    lists = [[x[0]], [x[1]], [x[2]], [x[3].abs()], [], [torch.tensor(3.0)], [x[4]] if average else [], []]
    lists[7] = [torch.tensor(1.0)] if average else []
    return (9 if average else 7) * n * dtype.itemsize, check(lists, {**USUAL, "l1": 0.01, **options})


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_moved(dtype, average):
    floor, reports = measured(dtype, average, proximal=True)
    assert len(reports) == 2  # the step and the counts
    assert floor <= traffic(reports) <= 1.05 * floor, reports[0]


def for_the_table(dtype):
    """What tests/cuda_table.py takes: (what, dtype, elements, floor in bytes, reports, op)."""
    n = 2**17
    for what, average in (("AdamW", False), ("AdamW, moving average", True)):
        floor, reports = measured(dtype, average, n, proximal=True)
        yield what, dtype, n, floor, reports, "adamw"
