"""The CUDA kernels of the steps of a policy, executed without a GPU, against the CPU operators: the same
bits.
"""

import itertools

import numpy as np
import pytest
import torch
from cuda_machine import SCHEDULES, interpreted, needs_nvcc, seed_at, structure
from helpers import same_bits
from test_augment_tone_op import EVERY, drawn, strengths_of

from fastreg.augment._tone_op import OPERATIONS

pytestmark = needs_nvcc

OP = "augment"
CPU = torch.ops.fastreg
TonesArgs = structure(
    "TonesArgs",
    """pointer images, output
    int64 batch, channels, height, width
    bool channels_last
    pointer steps, strengths, scratch""",
)
WordsArgs = structure("WordsArgs", "Seed seed\npointer index\nint64 batch, first, count\npointer out")
# One pixel; no inner one; four at a time and a rest; words; two items, of which the second is not full.
SIDES = [(1, 1), (2, 9), (7, 9), (16, 12), (91, 91)]


def scratch_bytes(images):
    return len(images) * (8 + images.shape[1] * 256 * 4)


def run(images, steps, strengths, misaligned=0, **options):
    """(the operator's result, reports) of the CUDA launcher."""
    kept = []

    def make(machine):
        kept[:] = [machine.room(torch.empty_like(images), "output", misaligned)]
        return TonesArgs(
            machine.put(images, "images", misaligned).at, kept[0].at, *images.shape,
            not images.is_contiguous(), machine.put(steps, "steps").at,
            machine.put(strengths, "strengths").at,
            machine.room(torch.empty(scratch_bytes(images), dtype=torch.uint8), "scratch").at,
        )  # fmt: skip

    reports = interpreted("augment").run("augment_tones_cuda", make, TonesArgs, **options)
    return kept[0].result(), reports


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("sides", SIDES)
def test_the_same_bits_as_on_the_cpu(sides, channels, last):
    every = EVERY[: len(OPERATIONS)]
    for levels, low in ((256, 0), (60, 90), (1, 7)):
        images = drawn(len(every), channels, *sides, levels=levels, low=low)
        if last:
            images = images.contiguous(memory_format=torch.channels_last)
        strengths = strengths_of(every)
        want = CPU.augment_tones(images, every, strengths)
        for misaligned in (0, 1):
            got, _ = run(images, every, strengths, misaligned)
            wrong = [OPERATIONS[i] for i in every if not same_bits(got[i], want[i])]
            assert not wrong, (levels, misaligned, wrong)


def test_in_any_order():
    images, strengths = drawn(len(EVERY), 3, 91, 12), strengths_of(EVERY)
    want = CPU.augment_tones(images, EVERY, strengths)
    for schedule in SCHEDULES:
        assert same_bits(run(images, EVERY, strengths, schedule=schedule)[0], want)


def test_strengths_far_from_what_policies_draw():
    images, far = drawn(7, 3, 9, 11), torch.tensor([0, 5.0, 255.0, -1.0, -0.5, 1e6, 1e-9]).double()
    for name in ("Brightness", "Color", "Contrast", "Sharpness"):
        steps = torch.full((7,), OPERATIONS.index(name))
        assert same_bits(run(images, steps, far)[0], CPU.augment_tones(images, steps, far)), name
    shares = torch.tensor([-3.0, 0, 1e-9, 0.5, 1.0, 1.0, 0.999]).double()
    steps = torch.full((7,), OPERATIONS.index("Solarize"))
    assert same_bits(run(images, steps, shares)[0], CPU.augment_tones(images, steps, shares))


def test_what_the_cpu_refuses_is_defined():
    """The host cannot look at a GPU's steps and strengths."""
    images = drawn(5, 3, 6, 8)
    steps = torch.tensor([-1, 15, 99, OPERATIONS.index("Posterize"), OPERATIONS.index("Posterize")])
    strengths = torch.tensor([0.5, 0.5, 0.5, -3.0, 40.0]).double()
    got, _ = run(images, steps, strengths)
    assert same_bits(got[:3], images[:3]) and same_bits(got[4], images[4]) and not got[3].any()
    numbers = torch.tensor([float("nan"), float("inf"), -float("inf")]).double()
    for name in ("Brightness", "Color", "Contrast", "Sharpness", "Posterize", "Solarize"):
        got, _ = run(images[:3], torch.full((3,), OPERATIONS.index(name)), numbers)
        assert got.shape == images[:3].shape


def test_bytes_moved():
    """A sample without one of the three steps that look at the whole image is read once."""
    looks = {OPERATIONS.index(name): 1 for name in ("Contrast", "AutoContrast", "Equalize")}
    planes = drawn(2, 3, 64, 64)
    pixels = planes.contiguous(memory_format=torch.channels_last)
    for step, last in itertools.product(range(len(OPERATIONS)), (False, True)):
        if OPERATIONS[step] == "Sharpness":
            continue  # whose neighbours come from the cache
        images = pixels if last else planes
        steps = torch.full((2,), step)
        _, reports = run(images, steps, strengths_of(steps))
        rows = [row for report in reports for key, row in report.traffic.rows.items() if key[0] == "images"]
        assert len(reports) == 2
        read = images.numel() * (1 + looks.get(step, 0))
        assert sum(row["bytes"] for row in rows) == read
        # Words of neighbouring channels are a third of a sector each; the rest of it comes from the cache.
        assert 32 * sum(row["sectors"] for row in rows) == read * (3 if last else 1)
        assert 32 * sum(row["unique"] // 32 for row in rows) == read


def test_more_items_than_blocks():
    """2^20 blocks and three: the first blocks take a second sample, of another strength."""
    batch, width, written = 2**20 + 3, 256, []
    solarize = OPERATIONS.index("Solarize")

    def pixels_at(at):
        return ((at.reshape(-1, 1) + np.arange(4)) % 251).astype("uint8")

    def make(machine):
        virtual = machine.device.virtual
        images = virtual(
            batch * width, "images", lambda at, _: pixels_at(at).view("uint32").reshape(at.shape)
        )
        steps = virtual(8 * batch, "steps", lambda at, _: at * 0 + solarize)
        strengths = virtual(8 * batch, "strengths", lambda at, _: (at // 8 < 2**20) * 1.0)
        written[:] = [virtual(batch * width, "output", None)]
        scratch = virtual(batch * (8 + 1024), "scratch", lambda at, _: at * 0)
        return TonesArgs(
            images.addr, written[0].addr, batch, 1, 1, width, False, steps.addr, strengths.addr, scratch.addr
        )

    interpreted("augment").run("augment_tones_cuda", make, TonesArgs, blocks=[0, 2, 5])
    at, values = written[0].writes("uint32")
    sample, pixels = 4 * at // width, pixels_at(4 * at)
    assert sorted(set(sample)) == [0, 2, 5, 2**20, 2**20 + 2]
    want = np.where(sample[:, None] < 2**20, pixels, 255 - pixels)
    np.testing.assert_array_equal(values.view("uint8").reshape(-1, 4), want)


@pytest.mark.parametrize(("first", "count"), [(0, 1), (64, 3), (2**31 - 2, 2)])
def test_words_are_the_cpus(first, count):
    index = torch.tensor([0, 7, 2**40, -1] * 70)
    kept = []

    def make(machine, seed):
        kept[:] = [machine.room(torch.empty(len(index), count, 4, dtype=torch.int64), "out")]
        return WordsArgs(
            seed_at(machine, seed), machine.put(index, "index").at, len(index), first, count, kept[0].at
        )

    for value in (5, -(2**63), 2**63 - 1):
        seed = torch.tensor([value])
        interpreted("augment").run("augment_words_cuda", lambda m, seed=seed: make(m, seed), WordsArgs)
        assert torch.equal(kept[0].result(), CPU.augment_words(seed, index, first, count))


TABLE_DTYPES = (torch.uint8,)


def for_the_table(dtype):
    """What tests/cuda_table.py takes: (what, dtype, elements, floor in bytes, reports, op)."""
    images = drawn(4, 3, 128, 128)
    for name in ("Solarize", "Brightness", "Color", "Equalize", "Sharpness"):
        steps = torch.full((4,), OPERATIONS.index(name))
        _, reports = run(images, steps, strengths_of(steps))
        yield f"a policy's {name}", dtype, images.numel(), 2 * images.numel(), reports, "augment"


MUTATIONS = {
    "no barrier before the counts are added up": (
        "    if (step == Tone::kContrast) atomicAdd(&grey, mine);\n    __syncthreads();",
        "    if (step == Tone::kContrast) atomicAdd(&grey, mine);",
        test_in_any_order,
        "uninitialised shared read",  # of a table of counts that came too early
    ),
    "no barrier between two tables": (
        "      });\n    __syncthreads();\n  });",
        "      });\n  });",
        test_more_items_than_blocks,
        "race",
    ),
}
